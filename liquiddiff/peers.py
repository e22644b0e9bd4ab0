"""Whole peers of the U-Net, from `diffusers`, trained by the same loop: DDPM's U-Net and DiT.

`peer(x_BCHW, t_B) -> v_BCHW`; their time input is 1000 t. Their width is solved so that they have the baseline's
parameters. What the papers start at zero starts at zero here, which diffusers, made to load weights, leaves out.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from liquiddiff.config import BadInput, Model
from liquiddiff.layers import ZeroLinear, check_side, peer
from liquiddiff.unet import ZeroConv2d

ATTENTION = 16  # DDPM: attention at levels of at most this many pixels a side (Ho et al., arXiv:2006.11239, app. B)
DEPTH = 12  # DiT: blocks of DiT-S and DiT-B (arXiv:2212.09748, table 1)
TOKENS = 32  # DiT: a side has at most this many, as DiT-XL/2 at 512 pixels
TOLERANCE = 0.03  # DiT: fewer blocks where no width of DEPTH blocks comes so near the target


class Peer(nn.Module, PyTorchModelHubMixin, library_name="liquiddiff", tags=["rectified-flow"]):
    """A model of diffusers, `net`, in the place of the liquid U-Net."""

    net: Any
    stride: int

    @property
    def checkpointing(self) -> bool:
        """Recompute activations in the backward pass."""
        return self.net.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        (self.net.enable_gradient_checkpointing if on else self.net.disable_gradient_checkpointing)()


class DDPMUNet(Peer):
    """diffusers' UNet2DModel: residual blocks, two a level, and attention at 16x16 and below.

    groups, of the group norms, must divide all channels.
    """

    def __init__(self, channels: list[int], groups: int = 8, in_channels: int = 3, resolution: int = 64):
        super().__init__()
        self.stride = 2 ** (len(channels) - 1)
        sides = [resolution // 2**i for i in range(len(channels))]
        kinds = ["Attn" if side <= ATTENTION else "" for side in sides]
        self.net = peer("diffusers").UNet2DModel(
            sample_size=resolution,
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            block_out_channels=tuple(channels),
            attention_head_dim=None,  # one head as wide as its level, as in the paper's code; diffusers' default is 8
            norm_num_groups=groups,
        )
        # As in the paper's code: the last layer of every residual branch, and of the whole.
        for block in [*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks]:
            for resnet in block.resnets:
                resnet.conv2 = _zero_conv(resnet.conv2)
            for attention in getattr(block, "attentions", []):
                attention.to_out[0] = _zero_linear(attention.to_out[0])
        self.net.conv_out = _zero_conv(self.net.conv_out)

    def forward(self, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Velocity at noise level t."""
        check_side(x_BCHW, self.stride)
        return self.net(x_BCHW, 1000 * t_B.float(), return_dict=False)[0]


class _Label(nn.Embedding):
    """The table of classes, as the paper's code starts it."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class DiT(Peer):
    """diffusers' DiTTransformer2DModel, with one class that every image has, and no label dropout.

    As in the paper one embedding of time and class serves all blocks: diffusers has one in each, more than a quarter of
    the parameters of a small network.
    """

    def __init__(
        self, heads: int, head_dim: int, depth: int = DEPTH, patch: int = 2, in_channels: int = 3, resolution: int = 64
    ):
        super().__init__()
        self.stride = patch
        self.net = peer("diffusers").DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=in_channels,
            num_layers=depth,
            sample_size=resolution,
            patch_size=patch,
            num_embeds_ada_norm=1,
        )
        embedding = self.net.transformer_blocks[0].norm1.emb
        embedding.class_embedder.dropout_prob = 0.0  # it would draw from the global generator
        embedding.class_embedder.embedding_table = _Label(1, heads * head_dim)
        for block in self.net.transformer_blocks:
            block.norm1.emb = embedding
            block.norm1.linear = _zero_linear(block.norm1.linear)  # adaLN-zero: every block starts as the identity
        self.net.proj_out_1, self.net.proj_out_2 = _zero_linear(self.net.proj_out_1), _zero_linear(self.net.proj_out_2)

    def forward(self, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Velocity at noise level t."""
        check_side(x_BCHW, self.stride)
        label_B = torch.zeros(len(t_B), dtype=torch.long, device=t_B.device)
        return self.net(x_BCHW, 1000 * t_B.float(), label_B, return_dict=False)[0]


def _zero_conv(conv: nn.Conv2d) -> ZeroConv2d:
    return ZeroConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)  # type: ignore[arg-type]


def _zero_linear(linear: nn.Linear) -> ZeroLinear:
    return ZeroLinear(linear.in_features, linear.out_features, linear.bias is not None)


def ddpm_unet(model: Model, image_shape: tuple[int, int, int], target: int) -> DDPMUNet:
    """DDPM's U-Net of about `target` parameters, its levels and their ratios those of `model`."""
    groups = min(8, model.channels[0] // 8)
    channels = _unet_channels(tuple(model.channels), groups, image_shape, target)
    return DDPMUNet(list(channels), groups, image_shape[0], image_shape[1])


@cache
def _unet_channels(
    ratios: tuple[int, ...], groups: int, image_shape: tuple[int, int, int], target: int
) -> tuple[int, ...]:
    def channels(width: int) -> tuple[int, ...]:  # one more widens one level or another by a channel a group
        return tuple(groups * max(1, round(width * ratio / ratios[0] / groups)) for ratio in ratios)

    def params(width: int) -> int:
        return _params(lambda: DDPMUNet(list(channels(width)), groups, image_shape[0], image_shape[1]))

    return channels(_solve(params, target)[0])


def dit(model: Model, image_shape: tuple[int, int, int], target: int) -> DiT:
    """A DiT of about `target` parameters. Raises BadInput where its patches do not tile the image."""
    C, resolution, _ = image_shape
    patch = 2
    while resolution // patch > TOKENS:
        patch *= 2
    if resolution % patch:
        raise BadInput(f"data.resolution={resolution} must be divisible by {patch}, the side of a patch of dit")
    heads, head_dim, depth = _dit_width(model.channels[-1], patch, C, resolution, target)
    return DiT(heads, head_dim, depth, patch, C, resolution)


@cache
def _dit_width(channels: int, patch: int, C: int, resolution: int, target: int) -> tuple[int, int, int]:
    heads = 4 * max(1, round(channels / 256))  # four, because the position's sinusoids want a multiple
    tried: dict[float, tuple[int, int, int]] = {}
    for depth in range(DEPTH, DEPTH // 2, -1):

        def params(head_dim: int, depth: int = depth) -> int:
            return _params(lambda: DiT(heads, head_dim, depth, patch, C, resolution))

        head_dim, gap = _solve(params, target)
        tried[gap] = heads, head_dim, depth
        if gap < TOLERANCE:
            break
    return tried[min(tried)]


def _params(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def _solve(params: Callable[[int], int], target: int) -> tuple[int, float]:
    """The width of which `params`, which grows with it, is nearest to the target, and its relative distance."""
    low, high = 1, 2
    known: dict[int, int] = {}

    def count(width: int) -> int:
        known[width] = known.get(width) or params(width)
        return known[width]

    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    best = min((low, high), key=lambda width: abs(count(width) - target))
    return best, abs(count(best) / target - 1)

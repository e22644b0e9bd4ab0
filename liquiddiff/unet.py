"""The U-Net of liquid blocks. Reads beside the seed's figure; never names a mixer.

Inside, activations are channels-last in memory. Shapes: B batch, C channels, H W space, D time embedding.

    x ---- stem ---- level 0 --------------------------- fuse -- level 0 -- head ---- v
                        down -- level 1 ------ fuse -- level 1 -- up
                                   down -- level 2, middle, fuse, level 2 -- up
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liquiddiff import parts
from liquiddiff.block import LiquidDiffusionBlock
from liquiddiff.config import SIZES, Model, choose, from_dict
from liquiddiff.depthwise import is_literal
from liquiddiff.layers import Pointwise, Slot, check_side, transformed, upsampled
from liquiddiff.precision import at_once, low_precision
from liquiddiff.relaxation import LAWS

LARGE = 128 * 128  # positions; in mixed precision, of an image of which less is kept for the backward pass
PART = 2**23  # elements of a step's first tensor that the backward pass computes again at once


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> (B, D): sinusoids of 1000 t (DDPM's scale), then a two-layer perceptron."""

    frequencies: Tensor

    def __init__(self, dim: int):
        super().__init__()
        frequencies = torch.exp(torch.arange(dim // 2) * (-torch.log(torch.tensor(10_000.0)) / (dim // 2)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim // 2 * 2, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        """See the class."""
        angles = 1000 * t_B.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero: the untrained network predicts v = 0."""

    def reset_parameters(self) -> None:
        """All zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def plainly(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A step: `function(*tensors)`."""
    return function(*tensors)


def again(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A step of which only `tensors` are kept: the backward pass computes the rest again, few images at a time.

    All at once where it is compiled: the graph would hold every piece, and fused operators need less room.
    """
    piece = max(1, at_once(PART, tensors[0]) // max(1, tensors[0][:1].numel()))
    each = len(tensors[0]) if torch.compiler.is_compiling() else piece
    whole = [tensor.expand(len(tensors[0]), *tensor.shape[1:]) for tensor in tensors]  # one t may serve all images
    pieces = zip(*(tensor.split(each) for tensor in whole), strict=True)
    done = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat(done) if len(done) > 1 else done[0]


class LiquidDiffusionUNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="liquiddiff",
    tags=["rectified-flow", "attention-free"],
):
    """Velocity network: `net(x_BCHW, t_B) -> v_BCHW`.

    model: sizes and switches. hidden: the mixers' widths, one a level (default: expansion * channels; budget.build
    solves them). resolution: the side in pixels that the network is meant for; any H, W divisible by the total stride
    work. Weights are published and loaded by `save_pretrained`, `push_to_hub` and `from_pretrained`.
    """

    def __init__(self, model: Model, hidden: list[int] | None = None, in_channels: int = 3, resolution: int = 256):
        super().__init__()
        model = from_dict(Model, asdict(model))  # from config.json its nested parts come as dicts
        channels, blocks = model.channels, model.blocks
        D = model.time_dim or channels[0]
        hidden = hidden or [round(model.mixer.expansion * c) for c in channels]
        choose("relaxation", model.relaxation, LAWS)
        self.stride = 2 ** (len(channels) - 1)
        self.checkpointing = False

        law = LAWS[model.relaxation]
        shared = [law(c) for c in channels]  # used where one instance serves a level

        def level(i: int, count: int) -> nn.ModuleList:
            slot = Slot(channels[i], hidden[i], D, resolution // 2**i)
            laws = [shared[i] if law.shared else law(slot.dim) for _ in range(count)]
            return nn.ModuleList(LiquidDiffusionBlock(slot, model, laws[k]) for k in range(count))

        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.time = TimeEmbedding(D)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels[0], channels[0], 3, padding=1),
        )
        self.encoder = nn.ModuleList(level(i, n) for i, n in enumerate(blocks))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.middle = level(len(channels) - 1, 2)
        self.fuse = nn.ModuleList(Pointwise(2 * c, c) for c in channels)
        self.decoder = nn.ModuleList(level(i, n) for i, n in enumerate(blocks))
        self.up = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in pairs)
        self.head = nn.Sequential(
            nn.GroupNorm(next(n for n in range(min(32, channels[0] // 4), 0, -1) if channels[0] % n == 0), channels[0]),
            nn.SiLU(),
            ZeroConv2d(channels[0], in_channels, 3, padding=1),
        )

    def _run(
        self,
        blocks: Iterable[Any],
        step: Callable[..., Tensor],
        x: Tensor,
        temb: Tensor,
        t: Tensor,
        rows: Iterator[Any],
    ) -> Tensor:
        for block in blocks:
            if step is plainly:
                x = block(x, temb, t, *next(rows))
            else:
                x = step(block, x, temb, t) if self.checkpointing else block.in_steps(step, x, temb, t)
        return x

    def _rows(self, temb: Tensor) -> Iterator[Any]:
        """Of one block after the other, what it takes of the time embedding: in one call for all of them.

        Nothing of a block that is another's or that a hook readies: its layers may not be there yet.
        """
        levels = [*self.encoder, self.middle, *reversed(self.decoder)]
        blocks = [cast(Any, block) for level in levels for block in level.children()]
        own = [type(b).forward is LiquidDiffusionBlock.forward and not b._forward_pre_hooks for b in blocks]
        groups = [group for block, is_own in zip(blocks, own, strict=True) if is_own for group in block.timed()]
        found = iter(parts.rows(temb, groups))
        return iter([([next(found), next(found)],) if is_own else () for is_own in own])

    def forward(self, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Velocity at noise level t, (B, C, H, W). Raises ValueError where H or W is not divisible by the stride."""
        H, W = x_BCHW.shape[2:]
        check_side(x_BCHW, self.stride)
        if t_B.dim() == 1 and t_B.stride(0) == 0 and not (torch.is_grad_enabled() or transformed()):
            t_B = t_B[:1]  # a sampling's one noise level: what comes of it alone is computed once, for all images
        temb = self.time(t_B)
        if not (is_literal() or transformed()):
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        lean = self.checkpointing or (H * W >= LARGE and low_precision(x_BCHW) is not None)
        step = again if lean and torch.is_grad_enabled() else plainly
        rows = self._rows(temb) if step is plainly else iter(())
        x = step(self.stem, x_BCHW)
        if not (is_literal() or transformed()):
            x = x.contiguous(memory_format=torch.channels_last)  # not yet, where one channel has let torch choose
        skips = []
        for i, level in enumerate(self.encoder):
            x = self._run(level.children(), step, x, temb, t_B, rows)  # (B, C_i, H / 2^i, W / 2^i)
            skips.append(x)
            if i < len(self.down):
                x = self.down[i](x)
        x = self._run(self.middle.children(), step, x, temb, t_B, rows)
        for i in reversed(range(len(self.decoder))):
            x = step(partial(self._join, i), x, skips.pop())
            x = self._run(self.decoder[i].children(), step, x, temb, t_B, rows)
            if i > 0:
                x = step(partial(self._double, i - 1), x)
        return step(self.head, x)

    def _join(self, i: int, x: Tensor, skip: Tensor) -> Tensor:
        return self.fuse[i](torch.cat([x, skip], dim=1))

    def _double(self, i: int, x: Tensor) -> Tensor:
        conv: Any = self.up[i]
        return upsampled(x, conv.weight, conv.bias)


def _sized(size: str, in_channels: int, resolution: int) -> LiquidDiffusionUNet:
    model = Model(size, **SIZES[size])
    return LiquidDiffusionUNet(model, in_channels=in_channels, resolution=resolution)


def liquid_diffusion_tiny(in_channels: int = 3, resolution: int = 256) -> LiquidDiffusionUNet:
    """The seed's tiny: channels 64, 128, 256; blocks 2, 2, 4."""
    return _sized("tiny", in_channels, resolution)


def liquid_diffusion_small(in_channels: int = 3, resolution: int = 256) -> LiquidDiffusionUNet:
    """The seed's small: channels 96, 192, 384; blocks 2, 3, 6."""
    return _sized("small", in_channels, resolution)


def liquid_diffusion_base(in_channels: int = 3, resolution: int = 512) -> LiquidDiffusionUNet:
    """The seed's base: channels 128, 256, 512; blocks 2, 4, 8."""
    return _sized("base", in_channels, resolution)


def liquid_diffusion_large(in_channels: int = 3, resolution: int = 512) -> LiquidDiffusionUNet:
    """The seed's large: channels 128, 256, 512, 768; blocks 2, 4, 8, 4."""
    return _sized("large", in_channels, resolution)

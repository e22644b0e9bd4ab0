"""What the mixers share: the slot, 1x1 products, positions.

Shapes: B batch, C channels, H W space, N = H * W positions in raster order, M hidden width.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from liquiddiff.config import BadInput
from liquiddiff.depthwise import DepthwiseConv2d, Kernel, is_literal
from liquiddiff.pointwise import pointwise


class Slot(NamedTuple):
    """Where a mixer stands: its level's channels, hidden width, time width and the level's resolution in pixels."""

    dim: int
    hidden: int
    time_dim: int
    resolution: int


class Pointwise(nn.Linear):
    """A 1x1 convolution, as a matrix product over the channels-last layout: (B, C, H, W) -> (B, C', H, W)."""

    def layer(self) -> tuple[Tensor, Tensor]:
        """Its weight, (C', C), and its bias."""
        return self.weight, self.bias

    def forward(
        self,
        x_BCHW: Tensor,
        add: Tensor | None = None,
        first: bool = False,
        row_BC: Tensor | None = None,
        then: bool = False,
        of: nn.Module | Kernel | None = None,
    ) -> Tensor:
        """See the class and `pointwise`, whose options these are; `of` may be the layer itself."""
        kernel: Any = of
        if isinstance(of, nn.Module):
            x_BCHW, kernel = (x_BCHW, (of.weight, of.bias)) if bare(of) else (of(x_BCHW), None)
        return pointwise(x_BCHW, *self.layer(), add, first, row_BC, then, kernel)


class SparsePointwise(Pointwise):
    """A 1x1 convolution of which only the synapses of a wiring exist; the other weights are held at zero.

    synapses: how many weights exist. mask: 1 where one does, (out, in), None on the meta device, where only counts
    matter. It is part of the architecture, not of the state: a checkpoint does not hold it.
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, synapses: int, mask: Tensor | None):
        self.density = synapses / (inputs * outputs)
        super().__init__(inputs, outputs)
        self.masked = inputs * outputs - synapses  # budget.parameters subtracts it
        mask = torch.ones_like(self.weight, requires_grad=False) if mask is None else mask.to(self.weight)
        self.register_buffer("mask", mask, persistent=False)

    def reset_parameters(self) -> None:
        """As for a dense layer with as many inputs as a unit has synapses: the bound is 1 / sqrt(fan-in)."""
        super().reset_parameters()
        with torch.no_grad():
            self.weight.mul_(self.density**-0.5)

    def layer(self) -> tuple[Tensor, Tensor]:
        """The weights that exist, the others zero, and the bias."""
        return self.weight * self.mask, self.bias


def watched(*modules: nn.Module) -> bool:
    """Tell whether somebody counts on one being called: by a hook, or by a `forward` of this one object."""
    for module in modules:
        kept = module.__dict__  # as attributes they would take twice as long, and a network asks hundreds of times
        if kept["_forward_hooks"] or kept["_forward_pre_hooks"] or "forward" in kept:
            return True
        if kept["_backward_hooks"] or kept["_backward_pre_hooks"]:
            return True
    return False


_FORWARDS = {nn.Linear.forward, Pointwise.forward, DepthwiseConv2d.forward}


def bare(*layers: nn.Module | None) -> bool:
    """Tell whether layers are no more than their weights, so that they need not be called: see `watched`.

    A compiled network is not asked: its layers are taken to be so.
    """
    if torch.compiler.is_compiling():
        return True
    given = [layer for layer in layers if layer is not None]
    return all([type(layer).forward in _FORWARDS for layer in given]) and not watched(*given)


@cache
def wiring(inputs: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Masks of the two products inputs -> hidden -> inputs, by a neural circuit policy of `ncps` (Lechner et al. 2020).

    As in ncps, a product is masked by the synapses between the two layers that it joins; the cell's one hidden layer
    stands for both the inter and the command neurons, so the synapses between those two, and the recurrent ones, have
    no product here. Densities are AutoNCP's default, one half; its seed is fixed, so all blocks of a level are wired
    alike. Raises BadInput where ncps is missing.
    """
    fan = half(hidden)
    ncp = peer("ncps.wirings").NCP(hidden, hidden, inputs, fan, 1, 1, fan, seed=22222)
    ncp.build(inputs)
    command, motor = slice(inputs, inputs + hidden), slice(0, inputs)  # ncps orders: motor, command, inter
    sensory_to_inter = torch.from_numpy(ncp.sensory_adjacency_matrix[:, inputs + hidden :] != 0)
    command_to_motor = torch.from_numpy(ncp.adjacency_matrix[command, motor] != 0)
    return sensory_to_inter.T.float(), command_to_motor.T.float()


def half(hidden: int) -> int:
    """AutoNCP's fan-out of a sensory and fan-in of a motor neuron at its default sparsity, one half."""
    return max(hidden // 2, 1)


def upsampled(x_BCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor) -> Tensor:
    """A 3x3 convolution of x doubled by nearest neighbours, (B, O, 2H, 2W).

    Of the three rows of a kernel two meet the same row of x, which two by whether the output's row is even or odd: so
    do their sum, and four 2x2 kernels on x itself do the same as 3x3 on the doubled, in 4/9 of the products.
    """
    counted = any(not hasattr(mode, "alive") for mode in _get_current_dispatch_mode_stack())  # memory.Live has it
    if is_literal() or torch.compiler.is_compiling() or transformed() or counted:  # multiply-adds are of the literal
        return F.conv2d(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"), weight_OC33, bias_O, padding=1)
    weight_O33C = weight_OC33.permute(0, 2, 3, 1)  # as the convolution wants it, and as a trainer's weights lie
    kernels = [k for rows in _pairs(weight_O33C, 1) for k in _pairs(rows, 2)]  # (O, 2, 2, C) each
    return _Interleave.apply(F.conv2d(x_BCHW, torch.cat(kernels).permute(0, 3, 1, 2), bias_O.repeat(4), padding=1))


def transformed() -> bool:
    """Tell whether torch.func is at work, which knows neither Functions of the old form nor, mapped, channels-last."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _pairs(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two taps that a kernel of three has along `dim` where the output is even, and where it is odd."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)


class _Interleave(torch.autograd.Function):
    """(B, 4 O, H + 1, W + 1) -> (B, O, 2 H, 2 W): output (2 h + a, 2 w + b) is kernel (a, b)'s at (h + a, w + b)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        y = y.permute(0, 2, 3, 1).unflatten(3, (4, -1))
        B, H, W, _, channels = y.shape
        out = y.new_empty(B, H - 1, 2, W - 1, 2, channels)
        for a, b in PHASES:
            out[:, :, a, :, b] = y[:, a : a + H - 1, b : b + W - 1, 2 * a + b]
        return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        g = g.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        B, H, _, W, _, channels = g.shape
        out = g.new_zeros(B, H + 1, W + 1, 4, channels)
        for a, b in PHASES:
            out[:, a : a + H, b : b + W, 2 * a + b] = g[:, :, a, :, b]
        return out.flatten(3).permute(0, 3, 1, 2)


PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that what it modulates starts as the identity."""

    def reset_parameters(self) -> None:
        """All zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def check_side(x_BCHW: Tensor, stride: int) -> None:
    """Raises ValueError where H or W is not divisible by the model's stride."""
    H, W = x_BCHW.shape[2:]
    if H % stride or W % stride:
        raise ValueError(f"image size {H}x{W} must be divisible by {stride}, the model's total stride")


def per_channel(v_BC: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, 1)."""
    return v_BC[:, :, None, None]


def positions(C: int, H: int, W: int, like: Tensor) -> Tensor:
    """2-D sinusoids (C, H, W), nothing learned: a quarter of the channels for each of sin y, cos y, sin x, cos x.

    Frequencies fall from 1 to 1/10000 per pixel, as in "Attention is all you need"; channels that do not divide by
    four are zero.
    """
    K = C // 4
    frequency_K = 10_000.0 ** (-torch.arange(K, device=like.device) / max(K, 1))
    y_KH, x_KW = (frequency_K[:, None] * torch.arange(n, device=like.device) for n in (H, W))
    rows, columns = torch.cat([y_KH.sin(), y_KH.cos()]), torch.cat([x_KW.sin(), x_KW.cos()])  # (2K, H), (2K, W)
    grid = torch.cat([rows[:, :, None].expand(-1, H, W), columns[:, None, :].expand(-1, H, W)])
    return F.pad(grid, (0, 0, 0, 0, 0, C - 4 * K)).to(like.dtype)


def to_tokens(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C); no copy where the image is channels-last."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(x_BNC: Tensor, H: int, W: int) -> Tensor:
    """(B, N, C) -> (B, C, H, W), channels-last."""
    return x_BNC.unflatten(1, (H, W)).permute(0, 3, 1, 2)


def peer(module: str) -> ModuleType:
    """An optional package. Raises BadInput, which says how to install it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise BadInput(f"this arm needs the package {package}: pip install 'liquiddiff[peers]'") from error

"""The mixer slot of a block: `mixer(x_BCHW, temb_BD, t_B) -> y_BCHW`, and the mixers that fill it.

To add one: a class with `__init__(slot, config)` and one line in `MIXERS`. Every mixer has one width knob,
`slot.hidden`, which budget.py solves so that mixers are compared at equal parameters or multiply-adds.

Two more methods are for speed: what the layers of `timed()` make of the embedding is computed for all blocks at once,
and given after t, unless that method is inherited; `mixed(rows)` tells parts.py of a mixer that it knows.

In sampling, where all images have one noise level, temb and t may have one row, (1, D) and (1,), for all B images.

Shapes: B batch, C channels (slot.dim), H W space, D time embedding (slot.time_dim), M hidden width (slot.hidden).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquiddiff import chains, fused, parts
from liquiddiff.attention import Attention, LinearAttention
from liquiddiff.config import Mixer, choose
from liquiddiff.depthwise import DepthwiseConv2d, Kernel
from liquiddiff.layers import Pointwise, Slot, SparsePointwise, ZeroLinear, half, per_channel, watched, wiring
from liquiddiff.liquid_ode import LTC, ODE
from liquiddiff.scans import SSM, Mamba

__all__ = ["MIXERS", "CfC", "Conv", "ConvGated", "Identity", "Pointwise", "Slot", "ZeroLinear", "per_channel"]


class CfC(nn.Module):
    """Closed-form continuous-depth cell over an image, all positions at once (CfC, arXiv:2106.13898, Eq. 10).

    backbone = SiLU(1x1(DW7x7(x))); f = 1x1(backbone); g, h = 1x1(SiLU(DW3x3(backbone)));
    y = gate * g + (1 - gate) * h, where the noise level t is the cell's time. Gates:
    `time` sigma(a(temb) f - b(temb)), the seed's code and the published cell; `literal` sigma(-f t), the seed's text
    and Eq. 10; `static` sigma(f); `fixed` 1/2; `none` g alone. With `wiring: ncp` half of the weights of the 1x1
    products exist (layers.wiring); parameters count those, multiply-adds stay those of the dense product.
    """

    def __init__(self, slot: Slot, config: Mixer):
        super().__init__()
        C, M, D, _ = slot
        choose("gate", config.gate, GATES)
        product = WIRINGS[choose("wiring", config.wiring, WIRINGS)]
        gated, two_heads, timed = GATES[config.gate]
        self.gate, self.head_tanh = config.gate, config.head_tanh
        self.context = DepthwiseConv2d(C, 7)
        self.backbone = product(C, M)
        self.f = product(M, C, head=True) if gated else None
        self.g = self._head(M, C, config)
        self.h = self._head(M, C, config) if two_heads else None
        self.time_a = nn.Linear(D, C) if timed else None
        self.time_b = nn.Linear(D, C) if timed else None

    def timed(self) -> list[nn.Linear]:
        """What makes the gate's a and b."""
        return [] if self.time_a is None or self.time_b is None else [self.time_a, self.time_b]

    @staticmethod
    def _head(M: int, C: int, config: Mixer) -> nn.Sequential:
        spatial = [DepthwiseConv2d(M, 3), nn.SiLU()] if config.head_conv else []
        return Head(*spatial, WIRINGS[config.wiring](M, C, head=True))

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor, *rows_BC: Tensor) -> Tensor:
        """See the class."""
        return self._rest(self.backbone(x_BCHW, then=True, of=self.context), temb_BD, t_B, *rows_BC)

    def first(self, x_BCHW: Tensor) -> Tensor:
        """Up to the first product, (B, M, H, W): `rest` of it is the cell (see LiquidDiffusionBlock.in_steps)."""
        return self.backbone(x_BCHW, of=self.context)

    def rest(self, z_BMHW: Tensor, temb_BD: Tensor, t_B: Tensor) -> Tensor:
        """What follows `first`."""
        return self._rest(F.silu(z_BMHW), temb_BD, t_B)

    def _rest(self, z: Tensor, temb_BD: Tensor, t_B: Tensor, *rows_BC: Tensor) -> Tensor:
        g = self.g(z)  # (B, C, H, W)
        h = self.h(z) if self.h is not None else None
        if self.head_tanh:
            g, h = torch.tanh(g), torch.tanh(h) if h is not None else None
        if h is None:
            return g
        if self.f is None:
            return 0.5 * (g + h)
        f = self.f(z)  # (B, C, H, W)
        if self.gate == "time":
            a_BC, b_BC = rows_BC or parts.rows(temb_BD, [self.timed()])[0]
            return fused.gate_blend(f, g, h, a_BC, b_BC)
        logit = -f * t_B[:, None, None, None].to(f.dtype) if self.gate == "literal" else f
        return torch.lerp(h, g, torch.sigmoid(logit))

    def mixed(self, rows: list[Tensor]) -> parts.Mixed | None:
        """The published cell, for a whole block in one call; None of another, which a subclass may be."""
        if type(self) is not CfC or self.gate != "time" or len(self.g) == 1 or self.head_tanh:
            return None
        own: Any = self._modules
        if watched(own["g"], own["h"]):
            return None
        (dwg, _, g), (dwh, _, h) = (own[name]._modules.values() for name in "gh")
        weights = parts.weights(own["context"], own["backbone"], own["f"], dwg, g, dwh, h)
        return None if weights is None else parts.Mixed("cell", weights, rows)


class Head(nn.Sequential):
    """A product, or DW3x3, SiLU and a product, which are one pass; a Sequential for its names."""

    def forward(self, z_BMHW: Tensor) -> Tensor:
        """(B, M, H, W) -> (B, C, H, W)."""
        first: Any = self[0]
        return self[-1](z_BMHW, first=True, of=first) if len(self) > 1 else first(z_BMHW)


# gate: (f exists, h exists, time_a and time_b exist)
GATES: dict[str, tuple[bool, bool, bool]] = {
    "time": (True, True, True),
    "literal": (True, True, False),
    "static": (True, True, False),
    "fixed": (False, True, False),
    "none": (False, False, False),
}


def dense(inputs: int, outputs: int, head: bool = False) -> Pointwise:
    """All weights exist."""
    return Pointwise(inputs, outputs)


def ncp(inputs: int, outputs: int, head: bool = False) -> Pointwise:
    """The weights of a neural circuit policy's synapses exist. Raises BadInput where the package ncps is missing."""
    C, M = (outputs, inputs) if head else (inputs, outputs)
    if torch.empty(0).is_meta:  # budget.py counts without drawing a wiring
        return SparsePointwise(inputs, outputs, C * half(M), None)
    mask = wiring(C, M)[head]
    return SparsePointwise(inputs, outputs, int(mask.sum()), mask)


WIRINGS: dict[str, Callable[..., Pointwise]] = {"dense": dense, "ncp": ncp}


class Conv(nn.Module):
    """Plain depthwise-separable convolution: 1x1(SiLU(1x1(DW7x7(x))) * (1 + s(temb))).

    No gate over positions. The time scale s costs what CfC's a and b cost, so that at M ~ 2C both the parameters
    and the multiply-adds equal CfC's.
    """

    def __init__(self, slot: Slot, config: Mixer):
        super().__init__()
        C, M, D, _ = slot
        self.context = DepthwiseConv2d(C, 7)
        self.expand = Pointwise(C, M)
        self.scale = ZeroLinear(D, M)
        self.contract = Pointwise(M, C)

    def timed(self) -> list[nn.Linear]:
        """What makes the scale."""
        return [self.scale]

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor, *rows_BM: Tensor) -> Tensor:
        """See the class."""
        return self.separable(x_BCHW, temb_BD, *rows_BM, of=self.context)

    def mixed(self, rows: list[Tensor]) -> parts.Mixed | None:
        """The same, for a whole block in one call; None of a subclass."""
        if type(self) is not Conv:
            return None
        weights = parts.weights(self.context, self.expand, self.contract)
        return None if weights is None else parts.Mixed("separable", weights, rows)

    def separable(self, x_BCHW: Tensor, temb_BD: Tensor, *rows_BM: Tensor, of: nn.Module | None = None) -> Tensor:
        """Both products, after a depthwise convolution where `of` is one."""
        (scale,) = rows_BM or parts.rows(temb_BD, [self.timed()])[0]
        done, weights = None, parts.weights(of, self.expand, self.contract)
        if weights is not None:
            kernel = None if of is None else cast(Kernel, tuple(weights[:2]))
            done = chains.separable(x_BCHW, kernel, weights[2:4], scale, weights[4:])
        if done is not None:
            return done
        return self.contract(self.expand(x_BCHW, then=True, of=of) * (1 + per_channel(scale)))


class ConvGated(Conv):
    """The same with a compact channel gate after the depthwise convolution: c * sigma(W2 W1 mean(c)).

    The place and form are DiCo's (arXiv:2505.11196), which finds that convolutions match attention only with it; the
    rank C / 16 keeps both parameters and multiply-adds within 2 % of CfC's, since the gate costs no multiply-adds.
    """

    def __init__(self, slot: Slot, config: Mixer):
        super().__init__(slot, config)
        C, rank = slot.dim, max(1, slot.dim // 16)
        self.squeeze = nn.Linear(C, rank, bias=False)
        self.excite = nn.Linear(rank, C)

    timed = Conv.timed

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor, *rows_BM: Tensor) -> Tensor:
        """See the class."""
        c = self.context(x_BCHW)
        gate = torch.sigmoid(self.excite(self.squeeze(c.mean((2, 3)))))
        return self.separable(c * per_channel(gate), temb_BD, *rows_BM)


class Identity(nn.Module):
    """Its input: what the rest of the block does alone."""

    def __init__(self, slot: Slot, config: Mixer):
        super().__init__()

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor) -> Tensor:
        """See the class."""
        return x_BCHW


def attention_low(slot: Slot, config: Mixer) -> nn.Module:
    """Attention at 16 x 16 and below, convolution above: the usual diffusion U-Net."""
    return Attention(slot, config) if slot.resolution <= 16 else Conv(slot, config)


MIXERS: dict[str, Callable[[Slot, Mixer], nn.Module]] = {
    "cfc": CfC,
    "conv": Conv,
    "conv_gated": ConvGated,
    "attention": Attention,
    "attention_low": attention_low,
    "linear_attention": LinearAttention,
    "ltc": LTC,
    "ode": ODE,
    "ssm": SSM,
    "mamba": Mamba,
    "identity": Identity,
}

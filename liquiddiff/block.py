"""The block that every level is made of: a mixer under its relaxation, the spatial mix, the feed-forward.

Shapes: B batch, C channels, H W space, D time embedding, M hidden width. It never names a mixer.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from liquiddiff import chains, fused, parts
from liquiddiff.config import Model, choose
from liquiddiff.depthwise import DepthwiseConv2d, is_literal, merge_kernels
from liquiddiff.layers import watched
from liquiddiff.mixers import MIXERS, Pointwise, Slot, ZeroLinear
from liquiddiff.relaxation import is_alpha_alone


class AdaLN(nn.Module):
    """LayerNorm over channels at each position, then scale and shift from the time embedding (DiT, zero at first)."""

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.modulation = ZeroLinear(time_dim, 2 * dim)

    def rows(self, temb_BD: Tensor) -> Tensor:
        """Scales and, beside them, shifts, (B, 2 C)."""
        return parts.rows(temb_BD, [[self.modulation]])[0][0]

    def forward(self, x_BCHW: Tensor, rows_B2C: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; and x itself, of which the rest of the block goes on (see fused.adaln)."""
        return fused.adaln(x_BCHW, rows_B2C)

    def with_mean(self, x_BCHW: Tensor, rows_B2C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the mean of the first over positions, (B, C)."""
        if watched(self):
            n_BCHW, x_BCHW = self(x_BCHW, rows_B2C)
            return n_BCHW, x_BCHW, n_BCHW.mean((2, 3))
        return fused.adaln_mean(x_BCHW, rows_B2C)


class SpatialMix(nn.Module):
    """x + mix(AdaLN(x)), multi-scale: depthwise 3x3, 5x5, 7x7 and the global average, summed; SiLU; 1x1.

    The parallel kernels are padded and added into ONE depthwise convolution: the same function, a third of the work.
    With `concat` the scales enter the 1x1 side by side instead.
    """

    def __init__(self, dim: int, time_dim: int, kernels: list[int], pool: bool, concat: bool):
        super().__init__()
        self.norm = AdaLN(dim, time_dim)
        self.scales = nn.ModuleList(DepthwiseConv2d(dim, k) for k in kernels)
        self.pool = nn.Linear(dim, dim) if pool else None
        self.concat = concat
        self.out = Pointwise(dim * len(kernels) if concat else dim, dim)

    def forward(self, x_BCHW: Tensor, rows_B2C: Tensor) -> Tensor:
        """See the class; `rows` of its norm."""
        n, x_BCHW, mean = self.norm.with_mean(x_BCHW, rows_B2C)
        pooled = None if self.pool is None else self.pool(mean)
        taken = None if self.concat or is_literal() else parts.weights(*self.scales._modules.values())
        if taken is None:
            scales = [scale(n) for scale in self.scales]
            n = torch.cat(scales, dim=1) if self.concat else torch.stack(scales).sum(0)
            pooled = pooled.repeat(1, len(scales)) if self.concat and pooled is not None else pooled
            return self.out(n, x_BCHW, first=True, row_BC=pooled)
        # Not stacked and summed: the gradients would share memory, and clipping in place scale it once for each.
        kernels = cast(list[Tensor], taken)
        merged = merge_kernels(kernels[::2]), functools.reduce(torch.add, kernels[1::2])
        return self.out(n, x_BCHW, first=True, row_BC=pooled, of=merged)


class FeedForward(nn.Module):
    """x + 1x1(SiLU(1x1(AdaLN(x))))."""

    def __init__(self, dim: int, time_dim: int, ratio: float):
        super().__init__()
        self.norm = AdaLN(dim, time_dim)
        self.expand = Pointwise(dim, round(ratio * dim))
        self.contract = Pointwise(round(ratio * dim), dim)

    def forward(self, x_BCHW: Tensor, rows_B2C: Tensor) -> Tensor:
        """See the class; `rows` of its norm."""
        weights = None if watched(self.norm) else parts.weights(self.expand, self.contract)
        done = None if weights is None else chains.feed_forward(x_BCHW, rows_B2C, weights[:2], weights[2:])
        if done is not None:
            return done
        n, x_BCHW = self.norm(x_BCHW, rows_B2C)
        return self.rest(x_BCHW, self.expand(n))

    def first(self, x_BCHW: Tensor, temb_BD: Tensor) -> Tensor:
        """Up to the first product."""
        return self.expand(self.norm(x_BCHW, self.norm.rows(temb_BD))[0])

    def rest(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """What follows `first`, which gave y."""
        return self.contract(y_BCHW, x_BCHW, first=True)


class LiquidDiffusionBlock(nn.Module):
    """x + Relax(Mixer)(AdaLN(x)); + SpatialMix; + FeedForward."""

    def __init__(self, slot: Slot, model: Model, relaxation: nn.Module):
        super().__init__()
        C, D = slot.dim, slot.time_dim
        self.norm = AdaLN(C, D)
        self.mixer = MIXERS[choose("mixer", model.mixer.name, MIXERS)](slot, model.mixer)
        self.relaxation = relaxation
        self.spatial = (
            SpatialMix(C, D, model.mix_kernels, model.mix_pool, model.mix_concat) if model.mix_kernels else None
        )
        self.feed_forward = FeedForward(C, D, model.ffn_ratio)

    def timed(self) -> list[list[nn.Linear]]:
        """Layers of the time embedding, whose rows a block takes: those of its norms, and the mixer's own."""
        own: Any = self._modules  # by name each would take 0.6 us, and a network asks for hundreds
        spatial, mixer = own.get("spatial"), own["mixer"]
        parents = [own["feed_forward"], *([] if spatial is None else [spatial])]
        norms = [own["norm"], *[parent._modules["norm"] for parent in parents]]
        # Not of one that inherits it, nor of an object changed: its `forward` may know nothing of rows.
        knows = "timed" in type(mixer).__dict__ and "forward" not in mixer.__dict__
        return [[norm._modules["modulation"] for norm in norms], mixer.timed() if knows else []]

    def forward(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor, rows: list[list[Tensor]] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W). rows: what `timed` makes of temb, where that is known already."""
        (first, last, *between), own = parts.rows(temb_BD, self.timed()) if rows is None else rows
        weights = self._weights() if parts.ready(x_BCHW) else None
        if weights is None:
            x_BCHW = self._relaxed(x_BCHW, temb_BD, t_B, first, own)
            return self.feed_forward(x_BCHW if self.spatial is None else self.spatial(x_BCHW, *between), last)
        rest = [*between, last], weights[:8], weights[8:]
        law: Any = self.relaxation
        mixed = self._known(own)
        if mixed is not None:
            alpha = law.alpha and law.alpha(t_B, temb_BD)
            done = parts.block(x_BCHW, mixed, alpha, law.replaces_residual, first, *rest)
            if done is not None:
                return done
        x_BCHW = self._relaxed(x_BCHW, temb_BD, t_B, first, own)
        done = parts.block(x_BCHW, None, None, False, None, *rest)
        return self.feed_forward(cast(Any, self.spatial)(x_BCHW, *between), last) if done is None else done

    def _weights(self) -> parts.Weights | None:
        """Of pool, out, expand, contract and the scales; None where it is of another form or somebody watches it."""
        own: Any = self._modules
        if (spatial := own.get("spatial")) is None or spatial.concat:
            return None
        mix, feed, scales = spatial._modules, own["feed_forward"]._modules, spatial._modules["scales"]._modules
        if watched(spatial, mix["norm"], own["feed_forward"], feed["norm"]):
            return None
        return parts.weights(mix.get("pool"), mix["out"], feed["expand"], feed["contract"], *scales.values())

    def _known(self, rows: list[Tensor]) -> parts.Mixed | None:
        """The mixer as parts.py knows it; None if that, or the law, is another, or if somebody watches it."""
        own: Any = self._modules
        mixer = own["mixer"]
        if not hasattr(mixer, "mixed") or watched(mixer, own["norm"]) or not is_alpha_alone(self.relaxation):
            return None
        return mixer.mixed(rows)

    def in_steps(self, step: Callable[..., Tensor], x: Tensor, temb: Tensor, t: Tensor) -> Tensor:
        """The same by `step(function, *tensors)`, each of which ends with a product.

        If `step` keeps only `tensors` for the backward pass, what has to be computed again is cheap, for the last
        product of a step is not: depthwise convolutions, what is element by element, and the cell's heads.
        """
        if first := getattr(self.mixer, "first", None):
            z = step(lambda x, temb: first(self.norm(x, self.norm.rows(temb))[0]), x, temb)
            x = step(lambda x, z, temb, t: self._mixed(x, temb, t, z), x, z, temb, t)
        else:
            x = step(self._mixed, x, temb, t)
        y = step(self.feed_forward.first, x, temb)
        return step(self.feed_forward.rest, x, y)

    def _mixed(self, x_BCHW: Tensor, temb_BD: Tensor, t_B: Tensor, z_BMHW: Tensor | None = None) -> Tensor:
        """All but the feed-forward; `z` is what the mixer's `first` gave."""
        x_BCHW = self._relaxed(x_BCHW, temb_BD, t_B, self.norm.rows(temb_BD), [], z_BMHW)
        return x_BCHW if self.spatial is None else self.spatial(x_BCHW, self.spatial.norm.rows(temb_BD))

    def _relaxed(
        self,
        x_BCHW: Tensor,
        temb_BD: Tensor,
        t_B: Tensor,
        rows_B2C: Tensor,
        own: list[Tensor],
        z_BMHW: Tensor | None = None,
    ) -> Tensor:
        """The mixer under its relaxation; `rows` of the norm before it, and the mixer's own where they are known."""
        n, x_BCHW = self.norm(x_BCHW, rows_B2C)
        mixer: Any = self.mixer
        y = mixer(n, temb_BD, t_B, *own) if z_BMHW is None else mixer.rest(z_BMHW, temb_BD, t_B)
        if self.relaxation.replaces_residual:
            return self.relaxation(x_BCHW, y, t_B, temb_BD)
        if alpha := getattr(self.relaxation, "alpha", None):  # the same as below, in one pass
            return fused.relax_add(x_BCHW, n, y, alpha(t_B, temb_BD))
        return x_BCHW + self.relaxation(n, y, t_B, temb_BD)

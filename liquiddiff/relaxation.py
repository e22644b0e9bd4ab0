"""Liquid relaxation: alpha(t) laws around any mixer, `alpha * input + (1 - alpha) * mixer(input)`.

The seed takes alpha = exp(-softplus(rho) |t|) from LiquidTAD (arXiv:2604.18274): at t = 1 (noise) the mixer decides,
as t -> 0 (data) the input passes. It ADDS this blend to a residual, so as t -> 0 the mixer's branch gets hardly any
gradient; the other laws say which part of that matters. Shapes: B batch, C channels, D width of the time embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquiddiff.layers import watched


class Relaxation(nn.Module):
    """A law with one decay `rho` a channel (or one in all, where `shared`); a subclass defines the exponent."""

    shared = False  # one instance, with one scalar decay, serves all blocks of a level
    replaces_residual = False  # alpha blends with the block's own input instead of the normalised one

    def __init__(self, dim: int):
        super().__init__()
        self.rho = nn.Parameter(torch.empty(1 if self.shared else dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rho = 0, that is alpha(1) = 0.5 in the seed's law."""
        nn.init.zeros_(self.rho)

    def elapsed(self, t_B: Tensor, temb_BD: Tensor) -> Tensor:
        """What multiplies the decay rate, (B,)."""
        return t_B.abs()

    def alpha(self, t_B: Tensor, temb_BD: Tensor) -> Tensor:
        """Share of the input that is kept, in (0, 1], (B, C), or (B, 1) where it is of all channels."""
        elapsed_B = self.elapsed(t_B.float(), temb_BD)
        return torch.exp(F.softplus(self.rho.float()) * -elapsed_B[:, None])

    def forward(self, input_BCHW: Tensor, mixed_BCHW: Tensor, t_B: Tensor, temb_BD: Tensor) -> Tensor:
        """Alpha * input + (1 - alpha) * mixed."""
        alpha = self.alpha(t_B, temb_BD)[:, :, None, None]  # in float32: bfloat16 would round 1 - alpha by up to 9 %
        wide = torch.promote_types(mixed_BCHW.dtype, torch.float32)
        return torch.lerp(mixed_BCHW.to(wide), input_BCHW.to(wide), alpha.to(wide)).to(mixed_BCHW.dtype)


class Liquid(Relaxation):
    """The seed's law: exp(-softplus(rho) |t|)."""


class Constant(Relaxation):
    """Learned, but blind to t: exp(-softplus(rho))."""

    def elapsed(self, t_B: Tensor, temb_BD: Tensor) -> Tensor:
        """One, for every t."""
        return torch.ones_like(t_B)


class Reversed(Relaxation):
    """A control, the wrong way round: the input passes at t = 1 and is processed at t = 0."""

    def elapsed(self, t_B: Tensor, temb_BD: Tensor) -> Tensor:
        """Time left to noise."""
        return 1 - t_B.abs()


class Temb(Relaxation):
    """exp(-softplus(rho) mean|temb|): the seed's later text puts the embedding where t stood."""

    def elapsed(self, t_B: Tensor, temb_BD: Tensor) -> Tensor:
        """Mean magnitude of the embedding; the mean, since its width need not be the layer's."""
        return temb_BD.float().abs().mean(1)


class Shared(Relaxation):
    """The seed's law with one decay for all channels and blocks of a level: LiquidTAD's hierarchy."""

    shared = True


class AsResidual(Relaxation):
    """The seed's law in place of the residual: x <- alpha x + (1 - alpha) mixer(AdaLN(x))."""

    replaces_residual = True


class Linear(nn.Module):
    """Nothing learned: alpha = 1 - t."""

    shared = replaces_residual = False

    def __init__(self, dim: int):
        super().__init__()

    def alpha(self, t_B: Tensor, temb_BD: Tensor) -> Tensor:
        """1 - t, (B, 1)."""
        return (1 - t_B.abs().float())[:, None]

    forward = Relaxation.forward


class NoRelaxation(nn.Module):
    """The mixer's output as it is."""

    shared = replaces_residual = False
    alpha = None  # nothing of the input is kept

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, input_BCHW: Tensor, mixed_BCHW: Tensor, t_B: Tensor, temb_BD: Tensor) -> Tensor:
        """Mixed."""
        return mixed_BCHW


LAWS: dict[str, type[Relaxation] | type[Linear] | type[NoRelaxation]] = {
    "liquid": Liquid,
    "none": NoRelaxation,
    "constant": Constant,
    "linear": Linear,
    "reversed": Reversed,
    "temb": Temb,
    "shared": Shared,
    "residual": AsResidual,
}


def is_alpha_alone(law: nn.Module) -> bool:
    """Tell whether a law is told by its alpha: its `forward` is one of these here, and nobody watches it."""
    return type(law).forward in (Relaxation.forward, NoRelaxation.forward) and not watched(law)

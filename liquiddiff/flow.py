"""Rectified flow (Liu et al., arXiv:2209.03003): straight paths from data (t = 0) to noise (t = 1).

x_t = (1 - t) x + t noise, target velocity v = noise - x. Shapes: B batch, images (B, C, H, W), t (B,).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from liquiddiff.seeding import derive, generator

U_SHAPE = 4.0  # Lee et al., arXiv:2405.20320, section 4.1: p(t) ~ exp(a t) + exp(a (1 - t))
HUBER = 0.00054  # c / sqrt(dimensions) of iCT's pseudo-Huber, arXiv:2310.14189; in Lee et al.'s code, c / dimensions
CLAMP = 0.02  # least divisor where a velocity is read from predicted data (t) or noise (1 - t)

# Time distributions as inverse CDFs of one uniform draw, so that arms which differ in them stay paired.
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "logit_normal": lambda u: torch.special.ndtri(u).sigmoid(),  # SD3, arXiv:2403.03206
    "logit_normal_low": lambda u: (1.2 * torch.special.ndtri(u) - 1.2).sigmoid(),  # EDM's: logit(t) is its ln(sigma)
    "u_shaped": lambda u: 0.5 + torch.asinh((2 * u - 1) * math.sinh(U_SHAPE / 2)) / U_SHAPE,
}


def _mse(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


def _pseudo_huber(error: Tensor) -> Tensor:
    """sqrt(|e|^2 + c^2) - c, divided by sqrt(dimensions), so that its size does not hang on the resolution."""
    return (_mse(error) + HUBER**2).sqrt() - HUBER


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"mse": _mse, "pseudo_huber": _pseudo_huber}

# What the network predicts: (its target, its output as a velocity), each of (x or output, noise or x_t, t).
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
PREDICTIONS: dict[str, tuple[Rule, Rule]] = {
    "velocity": (lambda x, noise, t: noise - x, lambda output, x_t, t: output),
    "data": (lambda x, noise, t: x, lambda output, x_t, t: (x_t - output) / t.clamp(min=CLAMP)),
    "noise": (lambda x, noise, t: noise, lambda output, x_t, t: (output - x_t) / (1 - t).clamp(min=CLAMP)),
}


def per_image(t_B: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return t_B[:, None, None, None]


def interpolate(x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t on the straight path."""
    return torch.lerp(x_BCHW, noise_BCHW, per_image(t_B))


def draw(seed: int, start: int, count: int, shape: tuple[int, ...], times: str = "uniform") -> tuple[Tensor, Tensor]:
    """(noise (count, *shape), t (count,)) for training positions start, start + 1, ...; each keyed by (seed, position).

    So the stream is the same at any batch size, after any resume and on any number of devices.
    """
    noise, u, stream = torch.empty(count, *shape), torch.empty(count), torch.Generator()
    for k, (image, position) in enumerate(zip(noise, u, strict=True), start):
        stream.manual_seed(derive(seed, "step", k))
        image.normal_(generator=stream)
        position.uniform_(generator=stream)
    return noise, TIMES[times](u)


def initial_noise(seed: int, start: int, count: int, shape: tuple[int, ...], stream: str = "sample") -> Tensor:
    """Noise of samples start, start + 1, ...: sample k starts the same in every arm and at any batch size.

    `stream` keeps apart what the noise is for: evaluation's is never trained on.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, stream, start + k)) for k in range(count)])

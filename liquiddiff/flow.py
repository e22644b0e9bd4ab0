"""Rectified flow (Liu et al., arXiv:2209.03003): straight paths from data (t = 0) to noise (t = 1).

x_t = (1 - t) x + t noise, target velocity v = noise - x. Shapes: B batch, images (B, C, H, W), t (B,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from liquiddiff.seeding import generator

# Time distributions as inverse CDFs of one uniform draw, so that arms which differ in them stay paired.
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
}

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda v, target: (v - target).square().flatten(1).mean(1),
}


def interpolate(x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t on the straight path."""
    return torch.lerp(x_BCHW, noise_BCHW, t_B[:, None, None, None])


def draw(seed: int, start: int, count: int, shape: tuple[int, ...], times: str = "uniform") -> tuple[Tensor, Tensor]:
    """(noise (count, *shape), t (count,)) for training positions start, start + 1, ...; each keyed by (seed, position).

    So the stream is the same at any batch size, after any resume and on any number of devices.
    """
    noise = torch.empty(count, *shape)
    u = torch.empty(count)
    for k in range(count):
        stream = generator(seed, "step", start + k)
        noise[k].normal_(generator=stream)
        u[k].uniform_(generator=stream)
    return noise, TIMES[times](u)


def initial_noise(seed: int, start: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of samples start, start + 1, ...: sample k starts the same in every arm and at any batch size."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "sample", start + k)) for k in range(count)])

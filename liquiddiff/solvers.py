"""Explicit Runge-Kutta solvers of the sampling ODE dx/dt = v(x, t), from t = 1 (noise) to t = 0 (data).

All take fixed steps, dopri5 too: an adaptive step depends on the whole batch, and sample k must not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from liquiddiff.config import choose

# Butcher tableaux: rows of A, then b; c is the row sums (Hairer, Norsett, Wanner, "Solving ODEs I", II.1 and II.5).
TABLEAUX: dict[str, tuple[list[list[float]], list[float]]] = {
    "euler": ([[]], [1]),
    "midpoint": ([[], [1 / 2]], [0, 1]),
    "heun": ([[], [1]], [1 / 2, 1 / 2]),
    "rk4": ([[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    "dopri5": (
        [
            [],
            [1 / 5],
            [3 / 40, 9 / 40],
            [44 / 45, -56 / 15, 32 / 9],
            [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
            [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        ],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ),
}


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise_BCHW: Tensor,
    nfe: int,
    solver: str = "euler",
    shift: float = 1.0,
) -> tuple[Tensor, int]:
    """Carry noise to images with at most `nfe` evaluations of `velocity(x_BCHW, t_B)`.

    Returns (x_BCHW, nfe_used): a solver of s stages takes nfe // s steps. `shift` spaces the steps as
    t = shift u / (1 + (shift - 1) u), u uniform (SD3, arXiv:2403.03206); 1 is uniform. Raises ValueError where nfe
    does not pay for one step.
    """
    A, b = TABLEAUX[choose("solver", solver, TABLEAUX)]
    steps = nfe // len(b)
    if steps < 1:
        raise ValueError(f"solver '{solver}' needs nfe >= {len(b)}, got {nfe}")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = (shift * u / (1 + (shift - 1) * u)).tolist()
    x = noise_BCHW
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        dt = t_next - t
        slopes: list[Tensor] = []
        for row in A:
            stage = x
            for a, k in zip(row, slopes, strict=True):
                stage = stage + dt * a * k if a else stage
            level = torch.full((1,), t + dt * sum(row), dtype=x.dtype, device=x.device)
            slopes.append(velocity(stage, level.expand(len(x))))  # one for all, and the network can tell
        for weight, k in zip(b, slopes, strict=True):
            x = x + dt * weight * k if weight else x
    return x, steps * len(b)

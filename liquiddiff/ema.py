"""Exponential moving average of the weights, by a half-life in images so that it means the same at any batch size."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copy of a network, `ema.net`, in evaluation mode; it follows the parameters that the network has now:
    load others into them, do not put others in their place.

    The half-life grows with the images seen (at most a twentieth of them, EDM, arXiv:2206.00364), so that a short run
    does not average in its random start.
    """

    def __init__(self, net: nn.Module, half_life: float):
        self.half_life = half_life
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.weights: list[Tensor] = list(self.net.parameters())
        self._theirs: list[Tensor] = list(net.parameters())
        self._buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))

    def decay(self, images: int, batch: int) -> float:
        """What a step of `batch` images that brought the count to `images` leaves of the average."""
        half_life = min(self.half_life, 0.05 * images)
        return 0.5 ** (batch / max(half_life, 1e-8))

    @torch.no_grad()
    def update(self, decay: float, weights: bool = True) -> None:
        """Move towards the network; its buffers alone where the weights have been moved already."""
        if weights:
            torch._foreach_lerp_(self.weights, self._theirs, 1 - decay)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)

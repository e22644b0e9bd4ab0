"""A run's batches: what a step takes, made by the thread that trains or, beside a GPU, by one of their own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import cast

import torch
from torch import Tensor

from liquiddiff.config import Run

Batch = tuple[Tensor, Tensor, Tensor, tuple[int, int, int] | None]  # what `train_step` takes


class Batches:
    """A run's batches in their order; beside a GPU the next is made, and pinned, in a thread while a step runs.

    All of a batch is keyed by its position, so who makes it, and when, changes nothing.
    """

    def __init__(self, make: Callable[[int, int], Batch], run: Run, device: torch.device):
        self.make, self.size, self.total, self.gpu = make, run.optim.batch, run.optim.images, device.type == "cuda"
        self.thread = ThreadPoolExecutor(1, initializer=self._enter()) if ahead(device) else None
        self.next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error: object) -> None:
        if self.thread:
            self.thread.shutdown(cancel_futures=True)

    def __call__(self, start: int) -> Batch:
        """The batch that begins at `start`."""
        if self.thread is None:
            return self._made(start)
        known, made = self.next or (-1, None)
        batch = (made if made and known == start else self.thread.submit(self._made, start)).result()
        if (then := start + self._count(start)) < self.total:
            self.next = then, self.thread.submit(self._made, then)
        return batch

    def _count(self, start: int) -> int:
        return min(self.size, self.total - start)

    def _made(self, start: int) -> Batch:
        *tensors, part = self.make(start, self._count(start))
        x, noise, t = (v.pin_memory() if self.gpu else v for v in cast(list[Tensor], tensors))
        return x, noise, t, part

    def _enter(self) -> Callable[[], None]:
        """What puts the thread on the GPU of the process; each thread begins on the first."""
        return partial(torch.cuda.set_device, torch.cuda.current_device()) if self.gpu else lambda: None


def ahead(device: torch.device) -> bool:
    """Whether batches are made ahead: beside a GPU. A CPU computes the step meanwhile and has nothing to spare."""
    return device.type == "cuda"

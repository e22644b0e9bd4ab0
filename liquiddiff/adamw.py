"""What follows a step's gradients on CPU: clipping, AdamW and the EMA, in two passes over memory by `adamw.c`.

By torch they are a dozen calls, each over all weights; for weights of a few hundred numbers that is mostly dispatch.
`torch.optim.AdamW` keeps hyperparameters and state, in its own format, and does its part wherever this cannot.
"""

import ctypes
import functools
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from liquiddiff import native
from liquiddiff.depthwise import is_literal

__all__ = ["Update"]


class Update:
    """Clips gradients, makes one step of `optimizer`, and lets `averages`, one a weight or none, follow the weights."""

    def __init__(self, optimizer: torch.optim.AdamW, averages: Sequence[Tensor] = ()):
        self.optimizer, self.averages = optimizer, averages
        self._tensors: list[Tensor] = []  # known: each weight, its moments and count of steps; the averages
        self._pointers: list[int] = []  # where they are
        self._arrays: Any = None  # pointers of the weights' tensors and of the averages, and sizes, as C has them
        self._strides: list[tuple[int, ...]] = []  # of gradients

    def __reduce__(self) -> Any:
        return Update, (self.optimizer, self.averages)  # a copy's tensors are elsewhere

    def __call__(self, clip: float, decay: float) -> bool:
        """To a norm of `clip` (0: as they are), which leaves the gradients as they were; average * decay + ...

        As `nn.utils.clip_grad_norm_`, `optimizer.step()` and `EMA.update`. False, and nothing was done, where it cannot
        be had: the first step, in which torch makes the state; another device, dtype or layout; a weight without a
        gradient; several groups; no compiler; within `depthwise.literal()`. The optimizer's own hooks see nothing.
        Raises MemoryError.
        """
        if is_literal() or not self._known() or (library := _library()) is None:
            return False
        weights = self.optimizer.param_groups[0]["params"]
        gradients = cast(list[Tensor], [weight.grad for weight in weights])
        if not native.plain(*gradients):  # nor is None
            return False
        strides = [g.stride() for g in gradients]
        if strides != self._strides:  # of those that were taken before
            if not all(map(_in_order, weights, strides)):
                return False
            self._strides = strides
        group, count = self.optimizer.param_groups[0], len(gradients)
        rates = _Rates(group["lr"], *group["betas"], group["eps"], group["weight_decay"], clip, 1 - decay)
        pointers = _array([g.data_ptr() for g in gradients])
        rest = count, ctypes.byref(rates), native.pool(), torch.get_num_threads()
        if library.adamw(pointers, *self._arrays, *rest):
            raise MemoryError("AdamW: out of memory")
        torch.autograd.graph.increment_version([*weights, *self.averages])
        return True

    def _known(self) -> bool:
        """Whether all tensors but the gradients can be taken; they are looked at again where one has moved."""
        state, (group, *others) = self.optimizer.state, self.optimizer.param_groups
        weights = group["params"]
        if others or group["amsgrad"] or group["maximize"] or not native.plain(*weights[:1]):
            return False
        tensors = list[Tensor]()
        for weight in weights:
            if not (kept := state.get(weight)):
                return False
            tensors += weight, kept["exp_avg"], kept["exp_avg_sq"], kept["step"]
        count = len(tensors)
        tensors += self.averages
        if len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors)):
            if self._pointers == [t.data_ptr() for t in tensors]:
                return True
        self._tensors, self._strides = [], []
        if len(self.averages) not in (0, len(weights)):
            raise ValueError(f"{len(self.averages)} averages of {len(weights)} weights")
        for k, weight in enumerate(weights):
            of_it = *tensors[4 * k : 4 * k + 3], *self.averages[k : k + 1]
            if not (native.plain(*of_it, tensors[4 * k + 3]) and all(_in_order(weight, t.stride()) for t in of_it)):
                return False
            if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
                return False
        self._pointers = [t.data_ptr() for t in tensors]
        numbers = [weight.numel() for weight in weights]
        averages = _array(self._pointers[count:]) if self.averages else None
        self._arrays = _array(self._pointers[:count]), averages, (ctypes.c_ssize_t * len(weights))(*numbers)
        self._tensors = tensors
        return True


def _in_order(weight: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether numbers with such strides lie as the weight's do; the stride of a dimension of one has no meaning."""
    if len(strides) != weight.dim():
        return False
    return all(a == b or n == 1 for n, a, b in zip(weight.shape, weight.stride(), strides, strict=True))


def _array(pointers: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(pointers))(*pointers)


# --- the C library ---------------------------------------------------------------------------------------------------


class _Rates(ctypes.Structure):
    """`rates_t` of adamw.c."""

    _fields_ = tuple((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "decay", "clip", "follow"))


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("adamw")
    if library is not None:
        pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
        library.adamw.argtypes = [pointer] * 4 + [index, pointer, pointer, index]
    return library

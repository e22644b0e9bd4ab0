"""What a training step needs in memory, found without the memory and without a GPU: the step runs on the meta device.

Every operator's output is counted while it lives, forward and backward, in the dtypes that CUDA's autocast would give
it. Not counted: the allocator's fragmentation, cuDNN's workspaces, and the GPU's context of 0.3 to 0.5 GB.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liquiddiff.budget import Shape, build
from liquiddiff.config import Model, choose

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of CUDA's autocast lists, what the networks here call: https://docs.pytorch.org/docs/stable/amp.html
LOWER = ("linear", "conv2d", "scaled_dot_product_attention")
WIDEN = ("layer_norm", "group_norm", "softmax")


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step."""

    state: int  # float32 weights, Adam's two moments, EMA weights: 16 a parameter
    saved: int  # alive between forward and backward: what autograd keeps
    peak: int  # the most at any moment, `state` and gradients included


def training_memory(
    model: Model, image_shape: Shape, batch: int, precision: str = "fp32", checkpointing: bool = False
) -> Memory:
    """Memory of a step of `batch` images. Raises BadInput for an unknown precision."""
    dtype = DTYPES[choose("precision", precision, DTYPES)]
    with torch.device("meta"):
        net = build(model, image_shape)
        net.checkpointing = checkpointing
        x, t = torch.empty(batch, *image_shape), torch.empty(batch)
    with Live() as live, autocast(dtype):
        v = net(x.to(dtype).contiguous(memory_format=torch.channels_last), t)
        loss = (v.float() - x).square().mean()
        del v
        saved = live.now
        loss.backward()
    state = 16 * sum(p.numel() for p in net.parameters())
    return Memory(state, saved, state + live.peak)


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators made and that are still alive: `now`, and the most so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self.alive.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """CUDA's autocast on a device that has none. Copies of the weights are kept, as it keeps them.

    By exchanging functions, since what checkpointing recomputes in the backward pass sees no mode of Python's.
    """
    weights: dict[int, Tensor] = {}

    def lower(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in weights:
            weights[id(value)] = value.to(dtype)
        return weights[id(value)]

    def lowered(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return function(*map(lower, args), **{key: lower(value) for key, value in kwargs.items()})

    def widened(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(x.float(), *args, **kwargs)

    with ExitStack() as stack:
        for cast, names in ((lowered, LOWER), (widened, WIDEN)):
            for name in names if dtype is not torch.float32 else ():
                stack.enter_context(mock.patch.object(F, name, partial(cast, getattr(F, name))))
        yield

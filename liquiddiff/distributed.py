"""One run on several processes, each with its own device: torchrun's or a scheduler's environment names them.

Every process computes its share of the same global batch, so that the sum over all of them is what one process would
have computed. Process 0 alone writes. Without such an environment every function here does nothing.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from liquiddiff.config import BadInput

PATIENCE = timedelta(hours=6)  # that others wait while process 0 decodes a data set or measures


def start() -> None:
    """Join the processes that WORLD_SIZE, RANK and MASTER_ADDR name. Does nothing for one process, or a second time."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # Tensors of the GPU go by NCCL; flags, checkpoints and features, which are the CPU's, by gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def stop() -> None:
    """Leave them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first() -> Iterator[None]:
    """Process 0 does what is inside, then the others, who find it done; bad input that it meets, all of them raise."""
    if rank() and (met := agreed(None)):
        raise met
    try:
        yield
    except BadInput as error:
        if not rank():
            agreed(error)
        raise
    if not rank():
        agreed(None)


def agreed(value: Any) -> Any:
    """Process 0's value, in every process."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    if size() == 1:
        return flag
    box = torch.tensor(int(flag))
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return bool(box)


def union(items: list[Any]) -> list[Any]:
    """What any process has in its list."""
    if size() == 1:
        return items
    boxes: list[Any] = [None] * size()
    dist.all_gather_object(boxes, items)
    return [item for box in boxes for item in box]


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def share(count: int) -> tuple[int, int]:
    """(first, number) of this process's part of `count` images; the parts differ by one image at most."""
    begin, end = (count * k // size() for k in (rank(), rank() + 1))
    return begin, end - begin


def mine(items: Any) -> list[Any]:
    """Every size()-th of `items`, beginning with this process's."""
    return list(items)[rank() :: size()]


def collect(parts: list[Any]) -> list[Any]:
    """In process 0, what every process has computed of its `mine`, in the order of the items; elsewhere nothing."""
    if size() == 1:
        return parts
    boxes: list[Any] | None = None if rank() else [None] * size()
    dist.gather_object(parts, boxes)
    if boxes is None:
        return []
    return [boxes[k % size()][k // size()] for k in range(sum(map(len, boxes)))]


def wrap(net: nn.Module) -> nn.Module:
    """The network, whose gradients are then the mean over all processes."""
    if size() == 1:
        return net
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is newer than torch 2.11
        return DistributedDataParallel(net, broadcast_buffers=False)  # the buffers are constants

"""What stays in full precision where the layers run in a low one, and which low one."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from liquiddiff.depthwise import is_literal


def full(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of `x` (the meta device knows no autocast)."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def at_once(elements: int, x: Tensor) -> int:
    """So many elements for each 16 GB that the GPU of `x` has: fewer pieces are fewer launches."""
    return elements * max(1, torch.cuda.get_device_properties(x.device).total_memory >> 34) if x.is_cuda else elements


def low_precision(x: Tensor) -> torch.dtype | None:
    """The dtype of mixed precision where it is on, and where what is kept for backward may be chosen; else None."""
    device = x.device.type
    if device == "meta":  # which knows no autocast: memory.py says by the type of the image what it plays
        low = x.dtype
    elif torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
    else:
        return None
    if is_literal() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    return low if low in (torch.float16, torch.bfloat16) else None

"""What the machine is and how to be good to it."""

import ctypes
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from liquiddiff.config import BadInput


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises BadInput for a device that torch does not have."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free: faulting it in again costs a step on the CPU up to half its time."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its upper limit


def peak_mib(device: torch.device) -> float:
    """Most memory in use so far: the GPU's allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 where the GPU has it, else fp16 (a T4); fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"

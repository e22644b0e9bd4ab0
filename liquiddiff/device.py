"""What the machine is and how to be good to it."""

import ctypes
import os
import platform
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from liquiddiff import distributed
from liquiddiff.config import BadInput


def resolve_device(name: str, use: bool = True) -> torch.device:
    """`auto` is the GPU where there is one. Raises BadInput for a device that torch does not have.

    A GPU that is named by its number becomes the current one, on which Triton launches. Without `use` none is opened:
    who only hands out the work leaves it to others.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            raise RuntimeError(f"there are {count} GPUs")
        if device.type == "cuda" and device.index is not None and distributed.size() > 1:
            raise RuntimeError("each process takes a GPU of its own")
        if use and device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if use or device.type != "cuda":
            torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        reason = "no such device" if reason.startswith("Expected one of") else reason
        raise BadInput(f"device={name} cannot be used here ({reason}): give cpu, cuda or auto") from error


def is_lost(error: BaseException) -> bool:
    """Whether a GPU answers this process no more, as after an illegal access: every later call fails alike."""
    return any(isinstance(each, torch.AcceleratorError) for each in (error, error.__cause__))


def take_share(slot: int) -> None:
    """Make one of this machine's GPUs the current one, which `cuda` means: of several workers each its own."""
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())


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
        mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap, which would give back each that is above 32 MB


def settle() -> None:
    """What every run wants of torch: the same result again, and of float32 all of its bits (a T4 has no TF32)."""
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def reset_peak(device: torch.device) -> None:
    """Let `peak_mib` start again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """Most memory in use since `reset_peak`: the GPU's allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return (
            int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 2**10
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def cores() -> int:
    """CPUs that this process may use; a scheduler's share is smaller than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGUSR2 only add to the list that this yields, so that a step is never torn in two.

    One that nobody acted on raises KeyboardInterrupt at the end. Off the main thread, and for a signal that is ignored,
    nothing changes. An error after a signal stays what it is, with two exceptions, which raise KeyboardInterrupt as
    without it: a handler of the program's own, which a worker or a scheduler's job must not miss, and several
    processes, of which another may have left already. If the error was not of that, the resumed run meets it.
    """
    seen: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, lambda received, frame: seen.append(received))
    try:
        yield seen
    except Exception as error:
        own = any(callable(before[n]) and before[n] is not signal.default_int_handler for n in seen)
        if own or (seen and distributed.size() > 1):
            raise KeyboardInterrupt(*seen) from error
        raise
    finally:
        for key, handler in before.items():
            signal.signal(key, handler)
    if seen:
        raise KeyboardInterrupt(*seen)


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 where the GPU has it, else fp16 (a T4); fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"

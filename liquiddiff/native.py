"""C kernels beside torch: compiled on first use, kept, loaded, and run on torch's own threads.

A kernel is one plain C file beside this one, or several, and the headers what they share. The system's compiler makes a
shared library of it under `~/.cache/liquiddiff`, named by what it depends on (sources, flags, compiler, processor).
Without a compiler, torch does the work; where a compiler fails, that is told.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

FILES = {"network": ("product", "fused", "pointwise", "chains", "parts")}  # where it is not the one of a library's name
FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC")


_failed: list[str] = []  # what a compiler could not build


def load(name: str, *defines: str) -> ctypes.CDLL | None:
    """Compile `name` with `-D` for each of `defines`, unless it is kept already, and load it; None where that fails.

    It fails where there is no compiler, home, room or right to execute. The caller keeps what it gets.
    """
    try:
        return _build(name, [*FLAGS, *(f"-D{define}" for define in defines)])
    except subprocess.CalledProcessError as error:
        if not _failed:  # the others will fail alike
            lines = error.stderr.decode(errors="replace").splitlines() or [f"exit status {error.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[-1]).strip()
            told = f"CPU kernels: {error.cmd[0]} failed ({reason[:160]}); torch does their work, slower"
            print(told, file=sys.stderr)
        _failed.append(name)
        return None
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError):
        return None


def _build(name: str, flags: Sequence[str]) -> ctypes.CDLL:
    folder = Path(__file__).parent
    sources = [folder / f"{file}.c" for file in FILES.get(name, (name,))]
    compiler = os.environ.get("CC", "")
    parts = [part.read_bytes() for part in (*sources, *sorted(folder.glob("*.h")))]
    key = hashlib.sha256(repr((parts, flags, compiler, _cpu())).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liquiddiff"
    target = cache / f"{name}-{key}.so"
    with suppress(OSError):  # missing, or damaged: build it
        return ctypes.CDLL(str(target))
    command = shlex.split(compiler) or [shutil.which("cc") or shutil.which("gcc") or "clang"]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        room = tempfile.TemporaryDirectory(dir=cache, prefix="build-")
    except OSError:  # a read-only home: for this process alone
        room = tempfile.TemporaryDirectory(prefix="liquiddiff-")
    with room as build:
        made = Path(build) / f"{name}.so"
        command += [*flags, "-o", str(made), *map(str, sources)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        library = ctypes.CDLL(str(made))  # stays mapped when the file moves or goes
        if made.parent.parent == cache:
            with suppress(OSError), made.open("rb") as file:  # where another's cannot be replaced this one is loaded
                os.fsync(file.fileno())  # or after a loss of power half a file has the name: to load it is fatal
                os.replace(made, target)  # atomic: another process sees the whole file or none
    return library


@functools.cache
def _cpu() -> list[str]:
    """Describe what -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else [platform.processor()]
    lines = [line for line in lines if not line.startswith(("cpu MHz", "bogomips"))]
    return [platform.system(), platform.machine(), *lines]


@functools.cache
def pool() -> ctypes.Array[ctypes.c_void_p] | None:
    """The OpenMP runtime that torch is linked with, lanes.h's pool_t: one pool of threads, never two.

    None where torch has another threading backend: one thread then.
    """
    try:
        runtime = ctypes.CDLL(torch._C.__file__)
        functions = (runtime.GOMP_parallel, runtime.omp_get_thread_num)
        return (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in functions))
    except (AttributeError, OSError):
        return None


# Here and in fused.py and parts.py, which a step of a network passes hundreds of times, `len` of a tensor is not asked:
# torch has it in Python, and it takes three times as long as `shape[0]`.


def rows_of(B: int, *rows: Tensor) -> list[Tensor]:
    """Rows of B images, (B, C), dense, given so or one for all; without gradients what all have as one stays one."""
    if not torch.is_grad_enabled() and all(row.shape[0] == 1 for row in rows):
        return [row.contiguous() for row in rows]
    return [(row if row.shape[0] == B else row.expand(B, -1)).contiguous() for row in rows]


_PLAIN = (Tensor, nn.Parameter)


def eager(*tensors: Tensor) -> bool:
    """Tell whether a kernel may take these: plain float32 CPU tensors, and nothing that looks through operators.

    What does (autocast, torch.compile, torch.jit.trace, fake tensors, FLOP counters, DTensor, functorch, forward-mode
    gradients) has to see torch's own.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._get_tracing_state():
        return False
    return forward_ad._current_level < 0 and plain(*tensors)


def plain(*tensors: Tensor) -> bool:
    """The same of further tensors, where `eager` was true of others a moment ago: modes are not asked again."""
    for t in tensors:  # a generator would double the time
        if type(t) not in _PLAIN or t.dtype is not torch.float32 or not t.is_cpu:
            return False
    return True

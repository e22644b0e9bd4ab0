"""Depthwise k x k convolution ("same" padding, stride 1) that is fast on CPU, beside the literal `F.conv2d`.

On channels-last float32 CPU tensors, torch's 7x7 weight gradient takes 5-45 times its forward. `depthwise.c`, compiled
on first use (see native.py), computes it in about the forward's time.
On a GPU depthwise_triton.py does the work, where Triton is to be had; that has not been run on a GPU yet.
Without a compiler, and for every other device, dtype or mode (autocast on a CPU, meta and fake tensors, FLOP counting,
functorch), torch does the work: same numbers, no warning.

Legend: B batch, C channels, H height, W width, k odd kernel size.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from liquiddiff import native

__all__ = ["DepthwiseConv2d", "Inner", "backend", "depthwise", "depthwise_reference", "literal", "merge_kernels"]

KERNEL_SIZES = (3, 5, 7, 9, 11)  # of the C path; registers are blocked for up to 7
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
Kernel = tuple[Tensor, Tensor | None]  # weight (C, 1, k, k) and bias (C) of a depthwise convolution


def depthwise(x_BCHW: Tensor, weight_C1kk: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own k x k kernel, zero-padded to the same size: y_BCHW, channels-last.

    Differentiable once in all three arguments (a second derivative of the fast path raises). ValueError: k is even.
    """
    if _literal:
        return depthwise_reference(x_BCHW, weight_C1kk, bias_C)
    if x_BCHW.is_cuda:
        return _on_gpu(x_BCHW, weight_C1kk, bias_C)
    if not _eligible(x_BCHW, weight_C1kk, bias_C):
        return depthwise_reference(x_BCHW, weight_C1kk, bias_C)
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.liquiddiff.depthwise(x_BCHW, weight_C1kk, bias_C)
    if not _plain(x_BCHW, weight_C1kk):
        return depthwise_reference(x_BCHW, weight_C1kk, bias_C)
    if not torch.is_grad_enabled():
        return _forward(x_BCHW, weight_C1kk, bias_C)
    return _Depthwise.apply(x_BCHW, weight_C1kk, bias_C)


def depthwise_reference(x_BCHW: Tensor, weight_C1kk: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Do the same by the literal `F.conv2d(groups=C)`."""
    height, width = weight_C1kk.shape[-2:]
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"the kernel size must be odd to keep the image size, got {height} x {width}")
    padding = (height // 2, width // 2)
    return F.conv2d(x_BCHW, weight_C1kk, bias_C, padding=padding, groups=weight_C1kk.shape[0])


def merge_kernels(weights: Sequence[Tensor]) -> Tensor:
    """Zero-pad kernels (C, 1, k_i, k_i) to the largest K and add them: the sum of parallel depthwise convs is one conv.

    Differentiable; (C, 1, K, K). ValueError: no kernel, or an even one.
    """
    if not weights or any(w.shape[-1] % 2 == 0 for w in weights):
        raise ValueError(f"needs kernels of odd sizes, got {[tuple(w.shape[-2:]) for w in weights]}")
    size = max(w.shape[-1] for w in weights)
    pads = [(size - w.shape[-1]) // 2 for w in weights]
    padded = [F.pad(w, (p, p, p, p)) if p else w for w, p in zip(weights, pads, strict=True)]
    return functools.reduce(torch.add, padded)


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d(C, C, k, padding=k // 2, groups=C)`, same parameters and initialisation, computed by `depthwise`.

    ValueError: k is even.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool = True, **factory: Any) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"the kernel size must be odd to keep the image size, got {kernel_size}")
        padding = kernel_size // 2
        super().__init__(channels, channels, kernel_size, padding=padding, groups=channels, bias=bias, **factory)

    def forward(self, x_BCHW: Tensor) -> Tensor:  # noqa: D102
        return depthwise(x_BCHW, self.weight, self.bias)


_literal = False
_PLAIN = (Tensor, nn.Parameter)


@contextmanager
def literal() -> Iterator[None]:
    """Within, the network is as one would write it: for tests and benchmarks.

    `depthwise` is `depthwise_reference`, `fused` and the selective scan are torch, 1x1 products are convolutions, the
    spatial mix's kernels are not merged, and the layout is that of the input.
    """
    global _literal
    before, _literal = _literal, True
    try:
        yield
    finally:
        _literal = before


def is_literal() -> bool:
    """Tell whether this is within `literal`."""
    return _literal


def backend(kernel_size: int = 7, like: Tensor | None = None) -> str:
    """Name what computes the type of `like` on its device (none: float32 on the CPU): "c", "triton" or "torch"."""
    if like is not None and not (like.is_cpu and like.dtype is torch.float32):
        gpu = _triton() if like.is_cuda else None
        return "triton" if gpu and gpu.usable(like.device, kernel_size, like.dtype) else "torch"
    return "torch" if kernel_size not in KERNEL_SIZES or _library(kernel_size) is None else "c"


def _eligible(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether the C kernels may take this call; what is malformed is left to torch to complain about."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(t.dtype is not torch.float32 or t.device.type != "cpu" for t in tensors) or torch.is_autocast_enabled("cpu"):
        return False
    C, k = weight.shape[0], weight.shape[-1]
    fits = x.dim() == 4 and x.shape[1] == C and weight.shape == (C, 1, k, k) and (bias is None or bias.shape == (C,))
    return fits and k in KERNEL_SIZES and x.numel() > 0


def _plain(*tensors: Tensor) -> bool:
    """Not seen by what looks into operators (fake tensors, FLOP counters, DTensor, vmap): that has to see torch's."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return not torch._C._get_tracing_state() and all(type(t) in _PLAIN for t in tensors)


def _on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By Triton's kernels where they are to be had and agree with torch on this device, in autocast's dtype."""
    dtype, k = x.dtype, weight.shape[-1]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    tensors = [weight] if bias is None else [weight, bias]
    cast = all(t.dtype is dtype for t in (x, *tensors)) or torch.is_autocast_enabled(x.device.type)
    shaped = x.dim() == 4 and weight.shape == (x.shape[1], 1, k, k) and k in KERNEL_SIZES and x.numel() > 0
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (cast and shaped and known) or torch.compiler.is_compiling() or not _plain(x, weight):
        return depthwise_reference(x, weight, bias)
    gpu = _triton()
    if gpu is None or not gpu.usable(x.device, k, dtype):
        return depthwise_reference(x, weight, bias)
    return gpu.Depthwise.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


@functools.cache
def _triton() -> Any:
    """The kernels for GPUs; None where there is no Triton on this platform."""
    try:
        from liquiddiff import depthwise_triton
    except ImportError:
        return None
    return depthwise_triton


# --- the C library ---------------------------------------------------------------------------------------------------


class _Library(NamedTuple):
    forward: Any
    backward: Any
    lanes: int  # the least number of channels
    entries: ctypes.Array[ctypes.c_void_p]  # addresses of dw_pack, dw_span and dw_backward


@functools.cache
def _library(kernel_size: int) -> _Library | None:
    library = native.load("depthwise", f"K={kernel_size}")
    if library is None:
        return None
    pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
    library.dw_forward.argtypes = [pointer] * 4 + [index] * 4 + [pointer, index]
    library.dw_backward.argtypes = [pointer] * 7 + [index] * 4 + [pointer, index]
    entries = (library.dw_pack, library.dw_span, library.dw_backward)
    addresses = (pointer * 3)(*(ctypes.cast(entry, pointer) for entry in entries))
    return _Library(library.dw_forward, library.dw_backward, library.dw_lanes(), addresses)


def entries(kernel_size: int, channels: int) -> ctypes.Array[ctypes.c_void_p] | None:
    """The C functions of that size of kernel, as `Inner` begins with them; None where they cannot be had."""
    library = _library(kernel_size) if kernel_size in KERNEL_SIZES and not _literal else None
    return library.entries if library is not None and library.lanes <= channels else None


class Inner(ctypes.Structure):
    """A convolution whose output another C kernel takes, a tile at a time: `depthwise_t` of product.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pack", "span", "backward", "weight", "bias")),
        *((name, ctypes.c_ssize_t) for name in ("H", "W")),
    )

    def __init__(self, kernel: Kernel, H: int, W: int):
        library, tensors = _library(kernel[0].shape[-1]), [None if t is None else t.contiguous() for t in kernel]
        assert library is not None  # as `fits` says
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        super().__init__(*library.entries, *pointers, H, W)
        self._kept = tensors

    @property
    def address(self) -> int:
        """What a C kernel is given; valid as long as this is."""
        return ctypes.addressof(self)

    @staticmethod
    def takes(x_BCHW: Tensor, kernel: Kernel) -> bool:
        """Tell whether it can be had of such an image."""
        if not native.eager(x_BCHW) or x_BCHW.dim() != 4 or not x_BCHW.numel():
            return False
        if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
            return False
        (weight, bias), k, C = kernel, kernel[0].shape[-1], x_BCHW.shape[1]
        if _literal or k not in KERNEL_SIZES or weight.shape != (C, 1, k, k) or not native.plain(weight):
            return False
        if bias is not None and not (bias.shape == (C,) and native.plain(bias)):
            return False
        library = _library(k)
        return library is not None and library.lanes <= C


# --- forward and backward --------------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    lib = _library(weight.shape[-1])
    if lib is None or lib.lanes > x.shape[1]:
        return depthwise_reference(x, weight, bias).contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    _call(lib.forward, (x, weight.contiguous(), None if bias is None else bias.contiguous(), y), x.shape)
    return y


def _call(function: Any, tensors: Sequence[Tensor | None], shape: Sequence[int]) -> None:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if function(*pointers, *shape, native.pool(), torch.get_num_threads()):
        raise MemoryError("depthwise convolution: out of memory")


def gradients(g: Tensor, x: Tensor, weight: Tensor, need: Sequence[bool]) -> Grads:
    """Of the input, the weight and the bias, each where `need` has it."""
    g = g.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    lib = _library(weight.shape[-1])
    if lib is None or lib.lanes > x.shape[1]:
        return _backward_torch(g, x, weight, need)
    weight = weight.contiguous()
    dx = torch.empty_like(x, memory_format=torch.channels_last) if need[0] else None
    dw = torch.empty_like(weight) if need[1] else None
    db = weight.new_empty(weight.shape[0]) if need[2] else None
    _call(lib.backward, (g, x, weight, None, dx, dw, db), x.shape)
    return dx, dw, db


def _backward_torch(g: Tensor, x: Tensor, weight: Tensor, need: Sequence[bool]) -> Grads:
    with torch.autocast("cpu", enabled=False):  # nor was the forward pass within
        dx = depthwise_reference(g, weight.flip(2, 3)) if need[0] else None  # 0.7 to 1.6 times torch's own speed
    if not (need[1] or need[2]):
        return dx, None, None
    C, pad, one = weight.shape[0], [weight.shape[-1] // 2] * 2, [1, 1]
    mask = [False, need[1], need[2]]
    _, dw, db = torch.ops.aten.convolution_backward(g, x, weight, [C], one, pad, one, False, [0, 0], C, mask)
    return dx, dw, db


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        return gradients(g, x, weight, ctx.needs_input_grad)


# --- operators, opaque to torch.compile; in eager mode they cost 2 to 3.5 times the Function's overhead per call ------


@torch.library.custom_op("liquiddiff::depthwise", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _forward(x, weight, bias)


@torch.library.custom_op("liquiddiff::depthwise_backward", mutates_args=())
def _op_backward(g: Tensor, x: Tensor, weight: Tensor, need: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = (g.new_empty(0) if grad is None else grad for grad in gradients(g, x, weight, need))
    return dx, dw, db


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_op_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, need: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last) if need[0] else g.new_empty(0)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need[1] else g.new_empty(0)
    return dx, dw, g.new_empty(weight.shape[0] if need[2] else 0)


def _op_grad(ctx: Any, g: Tensor) -> Grads:
    need = list(ctx.needs_input_grad)
    grads = torch.ops.liquiddiff.depthwise_backward(g, *ctx.saved_tensors, need)
    dx, dw, db = (grad if wanted else None for grad, wanted in zip(grads, need, strict=True))
    return dx, dw, db


_op.register_autograd(_op_grad, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))

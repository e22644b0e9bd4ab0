"""1x1 convolution that is fast on CPU: the matrix product over channels-last positions, beside the literal `F.conv2d`.

torch gives a float32 product to MKL, which on a processor of another maker than its own runs at half of what AVX512
can do. oneDNN, which torch has for convolutions, does not: forward and input gradient are its products, and the weight
gradient, long and thin, is `pointwise.c`. Without AVX512 MKL keeps up and is left to work; so is it for every other
device, dtype or mode (see native.eager).

Legend: B batch, C and O input and output channels, H W space, N = B * H * W.
"""

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from liquiddiff import native

__all__ = ["onednn", "pointwise", "product"]


def pointwise(
    x_BCHW: Tensor, weight_OC: Tensor, bias_O: Tensor | None, silu: bool = False, add_BOHW: Tensor | None = None
) -> Tensor:
    """1x1 convolution, added to another image where there is one, or SiLU of that; (B, O, H, W), channels-last."""
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    add = None if add_BOHW is None else add_BOHW.permute(0, 2, 3, 1)
    tensors = [t for t in (x_BHWC, weight_OC, bias_O, add) if t is not None]
    dense = x_BHWC.is_contiguous() and (add is None or add.is_contiguous())
    if dense and native.eager(*tensors) and x_BHWC.numel() and onednn():
        if torch.is_grad_enabled():
            y_BHWO = _Pointwise.apply(x_BHWC, weight_OC, bias_O, add)
        elif silu and add is None:
            return product(x_BHWC, weight_OC, bias_O, "swish").permute(0, 3, 1, 2)
        else:
            y_BHWO = product(x_BHWC, weight_OC, bias_O, add=add)
    else:
        y_BHWO = F.linear(x_BHWC, weight_OC, bias_O)
        y_BHWO = y_BHWO if add is None else add + y_BHWO
    return (F.silu(y_BHWO) if silu else y_BHWO).permute(0, 3, 1, 2)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", add: Tensor | None = None) -> Tensor:
    """X W^T + bias (+ add) by oneDNN: the operator that torch.compile puts in the place of a linear layer."""
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")


@functools.cache
def onednn() -> bool:
    """Tell whether oneDNN is there, and the faster one."""
    fast = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return fast and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("pointwise")
    if library is not None:
        pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
        library.pw_weight_gradient.argtypes = [pointer] * 4 + [index] * 3 + [pointer, index]
    return library


def _weight_gradient(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """G^T x and the sum of g over positions."""
    (N, outputs), C, lib = g.shape, x.shape[1], _library()
    if lib is None or lib.pw_rows() > outputs or lib.pw_columns() > C:
        return g.t() @ x, g.sum(0)
    dw, db = g.new_empty(outputs, C), g.new_empty(outputs)
    pointers = [t.data_ptr() for t in (g, x, dw, db)]
    if lib.pw_weight_gradient(*pointers, N, outputs, C, native.pool(), torch.get_num_threads()):
        raise MemoryError("1x1 convolution: out of memory")
    return dw, db


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias, add=add)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, weight), need = ctx.saved_tensors, ctx.needs_input_grad
        g = g.contiguous()
        dx = product(g, weight.t(), None) if need[0] else None
        if not (need[1] or need[2]):
            return dx, None, None, g if need[3] else None
        dw, db = _weight_gradient(g.flatten(0, -2), x.flatten(0, -2))
        return dx, dw, db if need[2] else None, g if need[3] else None

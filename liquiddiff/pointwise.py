"""1x1 convolution that is fast on CPU: the matrix product over channels-last positions, beside the literal `F.conv2d`.

`pointwise.c` does product and SiLU, before it or after, a few positions at a time, and all gradients in one pass: what
lies between stays in the caches. For every other device, dtype or mode (see native.eager), without a compiler, and for
few channels, torch does the same work.

Legend: B batch, C and O input and output channels, H W space.
"""

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from liquiddiff import fused, native
from liquiddiff.depthwise import is_literal

__all__ = ["pointwise"]


def pointwise(
    x_BCHW: Tensor,
    weight_OC: Tensor,
    bias_O: Tensor | None,
    add_BOHW: Tensor | None = None,
    first: bool = False,
    row_BC: Tensor | None = None,
    then: bool = False,
) -> Tensor:
    """1x1 convolution, added to another image where there is one; (B, O, H, W), channels-last.

    first: of SiLU(x), or of SiLU(x + row) where there is one. then: SiLU of the result, where nothing is added.
    """
    row_BC = row_BC if first else None
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    add = None if add_BOHW is None else add_BOHW.permute(0, 2, 3, 1)
    if not (then and add is not None) and _fast(x_BHWC, weight_OC, bias_O, add, row_BC):
        if torch.is_grad_enabled():
            return _Pointwise.apply(x_BHWC, row_BC, weight_OC, bias_O, add, first, then).permute(0, 3, 1, 2)
        return _forward(x_BHWC, row_BC, weight_OC, bias_O, add, first, then).permute(0, 3, 1, 2)
    x_BCHW = fused.silu(x_BCHW, row_BC) if first else x_BCHW
    if is_literal():
        y_BOHW = F.conv2d(x_BCHW, weight_OC[:, :, None, None], bias_O)
    else:
        y_BOHW = F.linear(x_BCHW.permute(0, 2, 3, 1), weight_OC, bias_O).permute(0, 3, 1, 2)
    y_BOHW = y_BOHW if add_BOHW is None else add_BOHW + y_BOHW
    return F.silu(y_BOHW) if then else y_BOHW


def _fast(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, row: Tensor | None) -> bool:
    """Tell whether the C kernels may take this call; what is malformed is left to torch to complain about."""
    if is_literal() or not native.eager(*(t for t in (x, weight, bias, add, row) if t is not None)) or not x.numel():
        return False
    outputs, C = weight.shape
    shaped = x.dim() == 4 and x.shape[3] == C and (bias is None or (bias.shape == (outputs,) and bias.is_contiguous()))
    if not shaped or not x.is_contiguous() or (row is not None and row.shape != (len(x), C)):
        return False
    if add is not None and not (add.shape == (*x.shape[:3], outputs) and add.is_contiguous()):
        return False
    library = _library()
    return library is not None and outputs >= library.pw_least_outputs() and C >= library.pw_least_inputs()


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("pointwise")
    if library is not None:
        pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
        rest: list[Any] = [index] * 4 + [ctypes.c_int] * 2 + [pointer, index]
        library.pw_forward.argtypes = [pointer] * 7 + rest
        library.pw_backward.argtypes = [pointer] * 9 + rest
    return library


def _call(name: str, tensors: list[Tensor | None], x: Tensor, weight: Tensor, rows: bool, *options: bool) -> None:
    images, positions = len(x), x.shape[1] * x.shape[2]
    cut = (images, positions) if rows else (1, images * positions)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if getattr(_library(), name)(*pointers, *cut, *weight.t().shape, *options, native.pool(), torch.get_num_threads()):
        raise MemoryError("1x1 convolution: out of memory")


def _forward(
    x: Tensor,
    row: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    first: bool,
    then: bool,
    before: Tensor | None = None,
) -> Tensor:
    y, row = x.new_empty(*x.shape[:3], len(weight)), None if row is None else row.contiguous()
    tensors = [x, row, weight.contiguous(), bias, add, y, before]
    _call("pw_forward", tensors, x, weight, row is not None, first, then)
    return y


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        add: Tensor | None,
        first: bool,
        then: bool,
    ) -> Tensor:
        before = x.new_empty(*x.shape[:3], len(weight)) if then else None
        y = _forward(x, row, weight, bias, add, first, then, before)
        ctx.options = first, then
        ctx.save_for_backward(x, row, weight, before)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, row, weight, before), need = ctx.saved_tensors, ctx.needs_input_grad
        weights, g = need[2] or need[3], g.contiguous()
        dx = torch.empty_like(x) if need[0] or need[1] else None
        drow = torch.empty_like(row, memory_format=torch.contiguous_format) if need[1] else None
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if weights else None
        db = weight.new_empty(len(weight)) if need[3] else None
        row = None if row is None else row.contiguous()
        tensors = [g, x, row, weight.contiguous(), before, dx, dw, db, drow]
        _call("pw_backward", tensors, x, weight, row is not None, *ctx.options)
        return dx, drow, dw, db, g if need[4] else None, None, None

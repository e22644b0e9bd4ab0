"""1x1 convolution that is fast on CPU: the matrix product over channels-last positions, beside the literal `F.conv2d`.

`pointwise.c` does product and SiLU, before it or after, a few positions at a time, and all gradients in one pass: what
lies between stays in the caches. A depthwise convolution before them is part of the same pass forward; its gradients
are a pass of their own. For every other device, dtype or mode (see native.eager), without a compiler, and for few
channels, torch does the same work.

Legend: B batch, C and O input and output channels, H W space.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from liquiddiff import fused, native
from liquiddiff.depthwise import Inner, Kernel, depthwise, gradients, is_literal

__all__ = ["pointwise"]


def pointwise(
    x_BCHW: Tensor,
    weight_OC: Tensor,
    bias_O: Tensor | None,
    add_BOHW: Tensor | None = None,
    first: bool = False,
    row_BC: Tensor | None = None,
    then: bool = False,
    of: Kernel | None = None,
) -> Tensor:
    """1x1 convolution, added to another image where there is one; (B, O, H, W), channels-last.

    of: x is convolved depthwise before all else. first: of SiLU(x), or of SiLU(x + row) where there is one. then: SiLU
    of the result, where nothing is added.
    """
    row_BC = row_BC if first else None
    if of is not None and not Inner.takes(x_BCHW, of):
        x_BCHW, of = depthwise(x_BCHW, *of), None
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    add = None if add_BOHW is None else add_BOHW.permute(0, 2, 3, 1)
    if not (then and add is not None) and _fast(x_BHWC, weight_OC, bias_O, add, row_BC):
        args = x_BHWC, row_BC, weight_OC, bias_O, add, first, then, *(of or (None, None))
        return (_Pointwise.apply if torch.is_grad_enabled() else _forward)(*args).permute(0, 3, 1, 2)
    x_BCHW = x_BCHW if of is None else depthwise(x_BCHW, *of)
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
    return library is not None and outputs >= library.product_least_outputs() and C >= library.product_least_inputs()


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("network")
    if library is not None:
        pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
        rest: list[Any] = [index] * 4 + [ctypes.c_int] * 2 + [pointer, index]
        library.pw_forward.argtypes = [pointer] * 9 + rest
        library.pw_backward.argtypes = [pointer] * 9 + rest
    return library


def _call(name: str, pointers: Sequence[int | None], cut: tuple[int, int], weight: Tensor, *options: bool) -> None:
    if getattr(_library(), name)(*pointers, *cut, *weight.t().shape, *options, native.pool(), torch.get_num_threads()):
        raise MemoryError("1x1 convolution: out of memory")


def _cut(x: Tensor, by_image: bool) -> tuple[int, int]:
    """Images and positions of each; where it does not matter whose a position is, all are one image's."""
    positions = x.shape[1] * x.shape[2]
    return (len(x), positions) if by_image else (1, len(x) * positions)


def _forward(
    x: Tensor,
    row: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    first: bool,
    then: bool,
    kernel: Tensor | None,
    shift: Tensor | None,
    before: Tensor | None = None,
    convolved: Tensor | None = None,
) -> Tensor:
    y, row = x.new_empty(*x.shape[:3], len(weight)), None if row is None else row.contiguous()
    inner = None if kernel is None else Inner((kernel, shift), *x.shape[1:3])
    weight = weight.contiguous()
    pointers = [None if t is None else t.data_ptr() for t in (x, row, weight, bias, add, y, before, convolved)]
    pointers.append(None if inner is None else inner.address)
    _call("pw_forward", pointers, _cut(x, row is not None or kernel is not None), weight, first, then)
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
        kernel: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        before = x.new_empty(*x.shape[:3], len(weight)) if then else None
        convolved = None if kernel is None else torch.empty_like(x)
        y = _forward(x, row, weight, bias, add, first, then, kernel, shift, before, convolved)
        ctx.options = first, then
        ctx.save_for_backward(x, row, weight, before, kernel, convolved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, row, weight, before, kernel, convolved), need = ctx.saved_tensors, ctx.needs_input_grad
        weights, g, inner = need[2] or need[3], g.contiguous(), (need[0], *need[7:])
        dx = torch.empty_like(x) if need[1] or any(inner) else None
        drow = torch.empty_like(row, memory_format=torch.contiguous_format) if need[1] else None
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if weights else None
        db = weight.new_empty(len(weight)) if need[3] else None
        row, weight = None if row is None else row.contiguous(), weight.contiguous()
        c = x if kernel is None else convolved
        pointers = [None if t is None else t.data_ptr() for t in (g, c, row, weight, before, dx, dw, db, drow)]
        _call("pw_backward", pointers, _cut(x, row is not None), weight, *ctx.options)
        dkernel = dshift = None
        if kernel is not None and dx is not None and any(inner):
            dx, dkernel, dshift = gradients(dx.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), kernel, inner)
            dx = None if dx is None else dx.permute(0, 2, 3, 1)
        return dx, drow, dw, db, g if need[4] else None, None, None, dkernel, dshift

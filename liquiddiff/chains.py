"""Chains of products on CPU, each one pass forward and one backward: what lies between products stays in the caches.

`chains.c` does them on channels-last float32 tensors a few positions at a time. Each function here gives None where
that is not to be had (another device, dtype, layout or mode, see native.eager; no compiler; few channels; within
`depthwise.literal()`): the caller then computes the same by the layers one after the other.

Legend: B batch, C channels, H W space, M hidden width.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liquiddiff import native
from liquiddiff.depthwise import Inner, Kernel, gradients, is_literal

__all__ = ["feed_forward", "separable"]

Layer = Sequence[Any]  # weight (outputs, inputs) and bias of a 1x1 convolution


def feed_forward(x_BCHW: Tensor, modulation_B2C: Tensor, expand: Layer, contract: Layer) -> Tensor | None:
    """X + contract(SiLU(expand(AdaLN(x)))), (B, C, H, W); `modulation` as fused.adaln has it."""
    weights, (B, C) = (*expand, *contract), x_BCHW.shape[:2]
    (modulation_B2C,) = native.rows_of(B, modulation_B2C)
    if not _fast(x_BCHW, C, len(expand[0]), (expand, contract), modulation_B2C) or modulation_B2C.shape[1] != 2 * C:
        return None
    if torch.is_grad_enabled():
        return _FeedForward.apply(x_BCHW, modulation_B2C, *weights)
    y = torch.empty_like(x_BCHW)
    _call("feed_forward_forward", x_BCHW, len(expand[0]), [x_BCHW, modulation_B2C, *weights, y, None, None])
    return y


def separable(x_BCHW: Tensor, kernel: Kernel | None, expand: Layer, scale_BM: Tensor, contract: Layer) -> Tensor | None:
    """Two layers, contract((1 + scale) * SiLU(expand(c))), (B, C, H, W); c is x, or that convolved by a kernel."""
    weights, (B, C), M = (*expand, *contract), x_BCHW.shape[:2], len(expand[0])
    (scale_BM,) = native.rows_of(B, scale_BM)
    if not _fast(x_BCHW, C, M, (expand, contract), scale_BM) or scale_BM.shape[1] != M:
        return None
    if kernel is not None and not Inner.takes(x_BCHW, kernel):
        return None
    of = kernel or (None, None)
    if torch.is_grad_enabled():
        return _Separable.apply(x_BCHW, scale_BM, *weights, *of)
    y = torch.empty_like(x_BCHW)
    _call(
        "separable_forward", x_BCHW, M, [x_BCHW, scale_BM, *weights, y, None, None, None], [_inner(x_BCHW, *of), None]
    )
    return y


def _fast(image: Tensor, C: int, M: int, layers: Sequence[Layer], row: Tensor) -> bool:
    """Tell whether the C kernels may take this call; what is malformed is left to torch to complain about."""
    if is_literal() or not native.eager(image, row) or image.numel() == 0:
        return False
    if not image.is_contiguous(memory_format=torch.channels_last) or not _usual(layers, [(M, C), (C, M)]):
        return False
    library = _library()
    return library is not None and min(C, M) >= library.product_least_inputs()


def _usual(layers: Sequence[Layer], shapes: Sequence[tuple[int, int]]) -> bool:
    """Tell whether these are dense float32 layers of such shapes (outputs, inputs); `eager` was asked of the image."""
    for (weight, bias), shape in zip(layers, shapes, strict=True):
        if not native.plain(weight, bias) or weight.shape != shape or bias.shape != shape[:1]:
            return False
        if not (weight.is_contiguous() and bias.is_contiguous()):
            return False
    return True


# --- the C library ---------------------------------------------------------------------------------------------------

POINTERS = {
    **{"feed_forward_forward": 9, "feed_forward_backward": 13},
    **{"separable_forward": 12, "separable_backward": 14},
}
EPS = 1e-5  # of the norm


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("network")
    pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
    for name, count in POINTERS.items() if library else ():
        options = [ctypes.c_float] * name.startswith("feed_forward") + [index] * name.endswith("_forward")
        getattr(library, name).argtypes = [pointer] * count + options + [index] * 4 + [pointer, index]
    return library


def _call(
    name: str, image: Tensor, M: int, tensors: Sequence[Tensor | None], inner: Sequence[Inner | None] = ()
) -> None:
    B, C, H, W = image.shape
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    pointers += [None if conv is None else conv.address for conv in inner]
    options: list[float] = [EPS] if name.startswith("feed_forward") else []
    if name.endswith("_forward"):
        options.append(cast(Tensor, tensors[1]).shape[0] == 1)  # alike
    if getattr(_library(), name)(*pointers, *options, B, H * W, C, M, native.pool(), torch.get_num_threads()):
        raise MemoryError("a chain of 1x1 convolutions: out of memory")


def _inner(x_BCHW: Tensor, weight: Tensor | None, bias: Tensor | None) -> Inner | None:
    return None if weight is None else Inner((weight, bias), *x_BCHW.shape[2:])


def _images(like: Tensor, *channels: int) -> list[Tensor]:
    """Room for images of so many channels each, (B, C, H, W), channels-last."""
    B, _, H, W = like.shape
    return [like.new_empty_strided((B, C, H, W), (H * W * C, 1, W * C, C)) for C in channels]


def _empty(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, modulation: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        B, _, H, W = x.shape
        y, moments, z = torch.empty_like(x), x.new_empty(B, H * W, 2), x.new_empty(B, H * W, len(w1))
        _call("feed_forward_forward", x, len(w1), [x, modulation, w1, b1, w2, b2, y, moments, z])
        ctx.save_for_backward(x, modulation, w1, b1, w2, b2, moments, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, modulation, w1, b1, w2, b2, moments, z = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        grads = _empty((x, modulation, w1, b1, w2, b2))
        _call("feed_forward_backward", x, len(w1), [g, x, modulation, w1, w2, moments, z, *grads])
        return tuple(grads)


class _Separable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        kernel: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        (y, z), c = _images(x, x.shape[1], len(w1)), None if kernel is None else torch.empty_like(x)
        _call(
            "separable_forward", x, len(w1), [x, scale, w1, b1, w2, b2, y, z, c, None], [_inner(x, kernel, shift), None]
        )
        ctx.save_for_backward(x, c, scale, w1, b1, w2, b2, z, kernel)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, c, scale, w1, b1, w2, b2, z, kernel = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        dc, *grads = _empty((x, scale, w1, b1, w2, b2))
        _call("separable_backward", x, len(w1), [g, x if c is None else c, scale, w1, w2, z, None, dc, *grads, None])
        if kernel is None:
            return dc, *grads, None, None
        need = ctx.needs_input_grad
        dx, *of_kernel = gradients(dc, x, kernel, (need[0], *need[6:]))
        return dx, *grads, *of_kernel

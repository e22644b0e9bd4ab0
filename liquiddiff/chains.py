"""Chains of products on CPU, each one pass forward and one backward: what lies between products stays in the caches.

`chains.c` does them on channels-last float32 tensors a few positions at a time. Each function here gives None where
that is not to be had (another device, dtype, layout or mode, see native.eager; no compiler; few channels; within
`depthwise.literal()`): the caller then computes the same by the layers one after the other.

Legend: B batch, C channels, H W space, M hidden width.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liquiddiff import native
from liquiddiff.depthwise import is_literal

__all__ = ["feed_forward", "heads"]

Layer = tuple[Tensor, Tensor]  # weight (outputs, inputs) and bias of a 1x1 convolution


def feed_forward(x_BCHW: Tensor, modulation_B2C: Tensor, expand: Layer, contract: Layer) -> Tensor | None:
    """X + contract(SiLU(expand(AdaLN(x)))), (B, C, H, W); `modulation` as fused.adaln has it."""
    weights, (B, C) = (*expand, *contract), x_BCHW.shape[:2]
    if not _fast([x_BCHW], C, len(expand[0]), weights, modulation_B2C) or modulation_B2C.shape != (B, 2 * C):
        return None
    if torch.is_grad_enabled():
        return _FeedForward.apply(x_BCHW, modulation_B2C, *weights)
    y = torch.empty_like(x_BCHW)
    _call("feed_forward_forward", x_BCHW, len(expand[0]), x_BCHW, modulation_B2C, *weights, y, None, None)
    return y


def heads(
    z_BMHW: Tensor, u_BMHW: Tensor, v_BMHW: Tensor, layers: Sequence[Layer], a_BC: Tensor, b_BC: Tensor
) -> Tensor | None:
    """S g + (1 - s) h, s = sigmoid(a f - b), (B, C, H, W), of a CfC cell, by its three 1x1 layers f, g and h:
    f = layer(z), g = layer(SiLU(u)), h = layer(SiLU(v)).
    """
    weights = [tensor for layer in layers for tensor in layer]
    (B, M), C = z_BMHW.shape[:2], len(weights[0])
    if not _fast([z_BMHW, u_BMHW, v_BMHW], C, M, weights, a_BC, b_BC) or not a_BC.shape == b_BC.shape == (B, C):
        return None
    if torch.is_grad_enabled():
        return _Heads.apply(z_BMHW, u_BMHW, v_BMHW, a_BC, b_BC, *weights)
    y = _image(z_BMHW, C)
    _call("heads_forward", y, M, z_BMHW, u_BMHW, v_BMHW, a_BC, b_BC, *weights, y, None, None, None)
    return y


def _fast(images: Sequence[Tensor], C: int, M: int, weights: Sequence[Tensor], *rows: Tensor) -> bool:
    """Tell whether the C kernels may take this call; what is malformed is left to torch to complain about."""
    if is_literal() or not native.eager(*images, *weights, *rows) or images[0].numel() == 0:
        return False
    for image in images:
        if image.shape != images[0].shape or not image.is_contiguous(memory_format=torch.channels_last):
            return False
    if not all(t.is_contiguous() for t in (*weights, *rows)):
        return False
    library = _library()
    return library is not None and min(C, M) >= library.chain_least()


# --- the C library ---------------------------------------------------------------------------------------------------

POINTERS = {"feed_forward_forward": 9, "feed_forward_backward": 13, "heads_forward": 15, "heads_backward": 22}
EPS = 1e-5  # of the norm


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("chains")
    pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
    for name, count in POINTERS.items() if library else ():
        eps = [ctypes.c_float] * name.startswith("feed_forward")
        getattr(library, name).argtypes = [pointer] * count + eps + [index] * 4 + [pointer, index]
    return library


def _call(name: str, image: Tensor, M: int, *tensors: Tensor | None) -> None:
    B, C, H, W = image.shape
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    options = [EPS] if name.startswith("feed_forward") else []
    if getattr(_library(), name)(*pointers, *options, B, H * W, C, M, native.pool(), torch.get_num_threads()):
        raise MemoryError("a chain of 1x1 convolutions: out of memory")


def _image(like: Tensor, channels: int) -> Tensor:
    B, _, H, W = like.shape
    return like.new_empty(B, H, W, channels).permute(0, 3, 1, 2)


def _empty(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, modulation: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        B, _, H, W = x.shape
        y, moments, z = torch.empty_like(x), x.new_empty(B, H * W, 2), x.new_empty(B, H * W, len(w1))
        _call("feed_forward_forward", x, len(w1), x, modulation, w1, b1, w2, b2, y, moments, z)
        ctx.save_for_backward(x, modulation, w1, b1, w2, b2, moments, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, modulation, w1, b1, w2, b2, moments, z = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        grads = _empty((x, modulation, w1, b1, w2, b2))
        _call("feed_forward_backward", x, len(w1), g, x, modulation, w1, w2, moments, z, *grads)
        return tuple(grads)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        y, *kept = (_image(z, a.shape[1]) for _ in range(4))
        _call("heads_forward", y, z.shape[1], z, u, v, a, b, *weights, y, *kept)
        ctx.save_for_backward(z, u, v, a, b, *weights, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, u, v, a, b, *weights, f, g, h = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        images, found = _empty((z, u, v)), _empty(weights)
        dab = torch.cat([a, b], dim=1)
        _call("heads_backward", dy, z.shape[1], dy, z, u, v, a, b, *weights[::2], f, g, h, *images, dab, *found)
        da, db = dab.chunk(2, dim=1)
        return *images, da, db, *found

"""Parts of a block on CPU, each one call forward and one backward.

They are: what layers make of the time embedding; a CfC cell; the spatial mix with the feed-forward.

`parts.c` calls the kernels that layers would call one by one (fused.c, pointwise.c, depthwise.c, chains.c). What is
saved is Python, autograd and torch's dispatch between them: where images are small, much of the time. `cell` and `tail`
give None where that is not to be had, as the functions of `chains` do; `ready` is asked before them. Modules whose
weights are given are not called: their forward hooks see nothing.

Legend: B batch, C channels, H W space, D time embedding, M hidden width, O outputs of a layer.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from liquiddiff import native
from liquiddiff.chains import EPS, Layer, images, usual
from liquiddiff.depthwise import Inner, Kernel, is_literal
from liquiddiff.fused import PIECE, sums_of

__all__ = ["cell", "ready", "rows", "tail"]

MAX_SCALES = 8  # scales_t of parts.c


def rows(temb_BD: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """Each layer of SiLU(temb), (B, O)."""
    args = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    if _takes_rows(temb_BD, args):
        return list(_Rows.apply(temb_BD, *args) if torch.is_grad_enabled() else _rows(temb_BD, *args))
    silu_BD = F.silu(temb_BD)
    return [layer(silu_BD) for layer in layers]


def _takes_rows(temb: Tensor, layers: Sequence[Tensor]) -> bool:
    if is_literal() or not native.eager(temb, *layers) or temb.dim() != 2 or not temb.numel():
        return False
    library, D = _library(), temb.shape[1]
    if library is None or D < library.product_least_inputs() or not temb.is_contiguous():
        return False
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        if weight.shape[1] != D or weight.shape[0] < library.product_least_outputs() or bias.shape != weight.shape[:1]:
            return False
    return all(tensor.is_contiguous() for tensor in layers)


def cell(
    x_BCHW: Tensor, kernels: Sequence[Kernel], layers: Sequence[Layer], a_BC: Tensor, b_BC: Tensor
) -> Tensor | None:
    """S g + (1 - s) h, s = sigmoid(a f - b), (B, C, H, W), of a CfC cell with z = SiLU(backbone(conv(x))), f = head(z),
    g = head(SiLU(u)), h = head(SiLU(v)), where u and v are z convolved. Kernels: conv, u, v; layers: backbone, f, g, h.
    """
    (B, C), M = x_BCHW.shape[:2], layers[0][0].shape[0]
    if not usual(layers, [(M, C), (C, M), (C, M), (C, M)]):
        return None
    a_BC, b_BC = native.rows_of(B, a_BC, b_BC)
    if not (native.plain(a_BC, b_BC) and a_BC.shape[1] == b_BC.shape[1] == C):
        return None
    if not all(Inner.fits(kernel, channels) for kernel, channels in zip(kernels, (C, M, M), strict=True)):
        return None
    args = (
        *(tensor for layer in layers for tensor in layer),
        a_BC,
        b_BC,
        *(tensor for kernel in kernels for tensor in kernel),
    )
    return _Cell.apply(x_BCHW, *args) if torch.is_grad_enabled() else _cell(False, x_BCHW, *args)[0]


def tail(
    x_BCHW: Tensor,
    norm_B2C: Tensor,
    scales: Sequence[Kernel],
    pool: Layer | None,
    out: Layer,
    feed_B2C: Tensor,
    expand: Layer,
    contract: Layer,
) -> Tensor | None:
    """Y = m + contract(SiLU(expand(AdaLN(m)))), m = x + out(SiLU(c + pool(mean(n)))), n = AdaLN(x), (B, C, H, W).

    c is the sum of n's convolutions by `scales`; `norm` and `feed` are the modulations of the norms, as in fused.adaln.
    """
    (B, C), M = x_BCHW.shape[:2], expand[0].shape[0]
    if not usual([*([pool] if pool else []), out, expand, contract], [*[(C, C)] * (1 + bool(pool)), (M, C), (C, M)]):
        return None
    norm_B2C, feed_B2C = native.rows_of(B, norm_B2C, feed_B2C)
    if not (native.plain(norm_B2C, feed_B2C) and norm_B2C.shape[1] == feed_B2C.shape[1] == 2 * C):
        return None
    if len(scales) > MAX_SCALES or not all(Inner.fits(scale, C) and scale[1] is not None for scale in scales):
        return None
    args = (
        norm_B2C,
        *(pool or (None, None)),
        *out,
        feed_B2C,
        *expand,
        *contract,
        *(t for scale in scales for t in scale),
    )
    return _Tail.apply(x_BCHW, *args) if torch.is_grad_enabled() else _tail(False, x_BCHW, *args)[0]


def ready(x_BCHW: Tensor, M: int) -> bool:
    """Tell whether such an image can be taken, with a hidden width of M: asked before the arguments are made."""
    if is_literal() or not native.eager(x_BCHW) or not x_BCHW.numel():
        return False
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        return False
    library = _library()
    return library is not None and min(x_BCHW.shape[1], M) >= library.product_least_inputs()


# --- the C library ---------------------------------------------------------------------------------------------------

POINTERS = {"cell_forward": 21, "cell_backward": 38, "tail_forward": 23, "tail_backward": 36}


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("network")
    pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
    for name, count in POINTERS.items() if library else ():
        options = [ctypes.c_float] * name.startswith("tail") + [index] * name.endswith("_forward")
        getattr(library, name).argtypes = [pointer] * count + options + [index] * 5 + [pointer, index]
    for name, count in {"rows_forward": 3, "rows_backward": 4}.items() if library else ():
        getattr(library, name).argtypes = [pointer] * count + [index] * 3 + [pointer, index]
    return library


def _call(
    name: str, x: Tensor, M: int, tensors: Sequence[Tensor | None], structures: Sequence[int], *options: float
) -> None:
    B, C, H, W = x.shape
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    rest = B, H * W, C, M, PIECE, native.pool(), torch.get_num_threads()
    if getattr(_library(), name)(*pointers, *structures, *options, *rest):
        raise MemoryError("a part of a block: out of memory")


class _Scales(ctypes.Structure):
    """Kernels and biases of parallel convolutions: `scales_t` of parts.c."""

    _fields_ = (
        *((name, ctypes.c_ssize_t) for name in ("count", "size")),
        *((name, ctypes.c_void_p * MAX_SCALES) for name in ("w", "bias")),
        ("k", ctypes.c_ssize_t * MAX_SCALES),
    )

    def __init__(self, tensors: Sequence[Tensor]):
        tensors = [t.contiguous() for t in tensors]
        sizes, (w, bias) = [t.shape[-1] for t in tensors[::2]], ([t.data_ptr() for t in tensors[i::2]] for i in (0, 1))
        room = ctypes.c_void_p * MAX_SCALES
        super().__init__(len(sizes), max(sizes), room(*w), room(*bias), (ctypes.c_ssize_t * MAX_SCALES)(*sizes))
        self._kept = tensors


def _empty(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


# --- rows of the time embedding --------------------------------------------------------------------------------------


def _call_rows(name: str, tensors: Sequence[Tensor], of_layers: Sequence[Tensor], widths: Sequence[int]) -> None:
    of = (ctypes.c_void_p * len(of_layers))(*[t.data_ptr() for t in of_layers])
    pointers = [*(t.data_ptr() for t in tensors), of, (ctypes.c_ssize_t * len(widths))(*widths)]
    shape = len(widths), *tensors[0].shape, native.pool(), torch.get_num_threads()
    if getattr(_library(), name)(*pointers, *shape):
        raise MemoryError("layers of a time embedding: out of memory")


def _rows(temb: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    weights, biases = layers[::2], layers[1::2]
    widths = [weight.shape[0] for weight in weights]
    made = tuple(temb.new_empty(temb.shape[0], width) for width in widths)
    of_layers = [tensor for layer in zip(weights, biases, made, strict=True) for tensor in layer]
    _call_rows("rows_forward", [temb], of_layers, widths)
    return made


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, temb: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(temb, *layers[::2])
        return _rows(temb, *layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temb, *weights = ctx.saved_tensors
        dtemb, found = temb.new_empty(len(weights), *temb.shape), []
        of_layers: list[Tensor] = []
        for weight, g in zip(weights, grads, strict=True):
            found += [torch.empty_like(weight), weight.new_empty(weight.shape[0])]
            of_layers += [weight, g.contiguous(), *found[-2:]]
        _call_rows("rows_backward", [temb, dtemb], of_layers, [weight.shape[0] for weight in weights])
        return dtemb[0], *found


# --- a CfC cell ------------------------------------------------------------------------------------------------------


def _cell(keep: bool, x: Tensor, *tensors: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The result, and what the backward pass needs of what was made on the way, where that is kept."""
    C, M = x.shape[1], tensors[0].shape[0]
    z, y = images(x, M, C)
    kept: list[Any] = images(x, M, C, C, C, C) if keep else [None] * 5
    inner = [Inner(tensors[k : k + 2], *x.shape[2:]) for k in (10, 12, 14)]
    addresses, alike = [conv.address for conv in inner], tensors[8].shape[0] == 1
    _call("cell_forward", x, M, [x, *tensors[:10], z, y, *kept], addresses, alike)
    return y, [z, *kept]


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, kept = _cell(True, *args)
        ctx.save_for_backward(*args, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        tensors, kept = tensors[:16], tensors[16:]
        C, M = x.shape[1], tensors[0].shape[0]
        *room, dx = images(x, M, M, M, M, C, C)
        of_layers, of_kernels, dab = _empty(tensors[:8]), _empty(tensors[10:]), x.new_empty(x.shape[0], 2 * C)
        inner = [Inner(tensors[k : k + 2], *x.shape[2:]) for k in (10, 12, 14)]
        given = [g.contiguous(memory_format=torch.channels_last), x, *tensors[:8:2], *tensors[8:10], *kept]
        made = [*room, dx, *of_layers, dab, *of_kernels]
        _call("cell_backward", x, M, [*given, *made], [conv.address for conv in inner])
        return dx, *of_layers, *dab.chunk(2, dim=1), *of_kernels


# --- the spatial mix and the feed-forward ----------------------------------------------------------------------------


def _tail(keep: bool, x: Tensor, *tensors: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The result, and what the backward pass needs of what was made on the way, where that is kept."""
    (B, C, H, W), layers, scales = x.shape, tensors[:10], _Scales(tensors[10:])
    M = layers[6].shape[0]
    n, mixed, y = images(x, C, C, C)
    sums = mean = row = None
    if layers[1] is not None:
        sums, mean, row = sums_of(x, 1), x.new_empty(B, C), x.new_empty(B, C)
    moments = c = feed_moments = z = None
    if keep:
        moments, feed_moments, (c, z) = x.new_empty(B, H, W, 2), x.new_empty(B, H, W, 2), images(x, C, M)
    kernel, shift = x.new_empty(C, 1, scales.size, scales.size), x.new_empty(C)
    made = [n, sums, mean, row, mixed, y, moments, c, feed_moments, z]
    inner = Inner((kernel, shift), H, W)
    addresses, alike = [inner.address, ctypes.addressof(scales)], layers[0].shape[0] == 1
    _call("tail_forward", x, M, [x, *layers, *made], addresses, EPS, alike)
    return y, [n, mean, row, mixed, moments, c, feed_moments, z, kernel]


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, kept = _tail(True, *args)
        ctx.save_for_backward(*args, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        tensors, kept, kernel = tensors[:-9], tensors[-9:-1], tensors[-1]
        B, C, H, W = x.shape
        norm, wp, _, wo, _, feed, w1, _, w2, _ = tensors[:10]
        *room, dx = images(x, C, C, C, C)
        sums, of_layers, of_scales = sums_of(x, 2), _empty(tensors[1:10]), _empty(tensors[10:])
        given = [g.contiguous(memory_format=torch.channels_last), x, norm, wp, wo, feed, w1, w2, *kept]
        room += [x.new_empty(B, C), x.new_empty(B, C)]
        made = [*room, dx, sums, *of_layers, torch.empty_like(kernel), x.new_empty(C)]
        inner, scales = Inner((kernel, None), H, W), _Scales(of_scales)
        _call("tail_backward", x, w1.shape[0], [*given, *made], [inner.address, ctypes.addressof(scales)], EPS)
        return dx, sums[:, 0].flatten(1), *of_layers, *of_scales

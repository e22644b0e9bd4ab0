"""A block on CPU, one call forward and one backward; and so what layers make of the time embedding.

`parts.c` calls the kernels that layers would call one by one (fused.c, pointwise.c, depthwise.c, chains.c). What is
saved is Python, autograd and torch's dispatch between them: where images are small, much of the time. `block` gives
None where that is not to be had, as the functions of `chains` do; `ready` is asked before it. Layers whose weights are
taken are not called: `weights` gives None where one has to be.

Legend: B batch, C channels, H W space, D time embedding, M N hidden widths of the mixer and of the feed-forward, O
outputs of a layer.
"""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from liquiddiff import native
from liquiddiff.chains import EPS
from liquiddiff.depthwise import entries, is_literal
from liquiddiff.fused import PIECE
from liquiddiff.layers import bare

__all__ = ["Mixed", "block", "ready", "rows", "weights"]

Weights = list[Tensor | None]  # weight and bias of one layer after the other


class Mixed(NamedTuple):
    """A mixer that parts.c knows: its name there, weights, and rows of the time embedding, see KNOWN."""

    name: str
    weights: Weights
    rows: list[Tensor]


# name: number in parts.c; outputs and inputs of each layer, "1" in a depthwise convolution; widths of the rows
KNOWN = {
    "": (0, [], []),
    "cell": (1, ["C1", "MC", "CM", "M1", "CM", "M1", "CM"], ["C", "C"]),  # context, backbone, f, g's, h's; a, b
    "separable": (2, ["C1", "MC", "CM"], ["M"]),  # context, expand, contract; the scale
}


def rows(temb_BD: Tensor, groups: Sequence[Sequence[nn.Linear]]) -> list[list[Tensor]]:
    """What each layer makes of SiLU(temb), (B, O)."""
    layers = [layer for group in groups for layer in group]
    args = weights(*layers)
    found: Iterable[Tensor]
    if args is not None and _takes_rows(temb_BD, args):
        sizes = [len(group) for group in groups if group]
        found = _Rows.apply(sizes, temb_BD, *args) if torch.is_grad_enabled() else _rows(temb_BD, cast(Any, args))
    else:
        silu_BD = F.silu(temb_BD)
        found = [layer(silu_BD) for layer in layers]
    each = iter(found)
    return [[next(each) for _ in group] for group in groups]


def _takes_rows(temb: Tensor, layers: Weights) -> bool:
    if not layers or is_literal() or not native.eager(temb) or temb.dim() != 2 or not temb.numel():
        return False
    library, D = _library(), temb.shape[1]
    if library is None or D < library.product_least_inputs() or not temb.is_contiguous():
        return False
    least = library.product_least_outputs()
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        if weight is None or bias is None or not native.plain(weight, bias):
            return False
        outputs = bias.shape[0]
        if outputs < least or weight.shape != (outputs, D) or not (weight.is_contiguous() and bias.is_contiguous()):
            return False
    return True


def weights(*modules: nn.Module | None) -> Weights | None:
    """Weight and bias of each, None and None of none; no list where one has to be called, see `bare`.

    From where torch keeps them, where they are: that is faster.
    """
    if not bare(*modules):
        return None
    found: Weights = []
    for module in modules:
        if module is None:
            found += (None, None)
            continue
        kept = module._parameters
        if kept.get("weight") is not None and "bias" in kept and not module._buffers:
            found += (kept["weight"], kept["bias"])
        else:  # masked, parametrized, a replica's
            other: Any = module
            found += other.layer() if hasattr(other, "layer") else (other.weight, other.bias)
    return found


def ready(x_BCHW: Tensor) -> bool:
    """Tell whether such an image can be taken: asked before the arguments are made."""
    if is_literal() or not native.eager(x_BCHW) or not x_BCHW.numel():
        return False
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        return False
    library = _library()
    return library is not None and x_BCHW.shape[1] >= library.product_least_inputs()


def block(
    x_BCHW: Tensor,
    mixed: Mixed | None,
    alpha_BC: Tensor | None,
    replaces: bool,
    norm_B2C: Tensor | None,
    norms: Sequence[Tensor],
    layers: Weights,
    scales: Sequence[Tensor | None],
) -> Tensor | None:
    """Y = m + FF(AdaLN(m)), m = x + out(SiLU(c + pool(mean(n)))), n = AdaLN(x), c the sum of n convolved by `scales`.

    Before that, where there is a mixer, x becomes x + z + alpha (n - z) with n = AdaLN(x) and z = mixer(n); without
    alpha x + z; where alpha `replaces` the residual, z + alpha (x - z). norm: scales and, beside them, shifts of the
    mixer's norm; norms: of those of the spatial mix and the feed-forward. layers: pool (which may be none), out, expand
    and contract.
    """
    (B, C, H, W), mixed, pool = x_BCHW.shape, mixed or Mixed("", [], []), layers[0] is not None
    tensors = [*layers, *mixed.weights, *scales]
    given = cast(list[Tensor], tensors if pool else tensors[2:])
    if not native.plain(*given):  # nor is None
        return None
    shapes = [t.shape for t in given]
    kernels = tuple(shape[-1] for shape in shapes if len(shape) == 4)
    M, N = cast(Tensor, mixed.weights[2]).shape[0] if mixed.weights else 0, cast(Tensor, layers[4]).shape[0]
    known = _known(mixed.name, pool, C, M, N, kernels, len(scales) // 2)
    if known is None or shapes != known.shapes or not all(t.is_contiguous() for t in given):
        return None
    norm, alpha = [] if norm_B2C is None else [norm_B2C], [] if alpha_BC is None else [alpha_BC.expand(-1, C)]
    rows = native.rows_of(B, *norms, *norm, *mixed.rows, *alpha)
    if not native.plain(*rows) or [row.shape[1] for row in rows] != known.widths[: len(rows)]:
        return None
    of_it = known.mixer, bool(alpha), replaces, pool, rows[0].shape[0] == 1
    shape = _Shape(B, H, W, C, M, N, *of_it, PIECE, known.largest, known.scales, known.sizes, known.kinds, EPS)
    if torch.is_grad_enabled():
        return _Block.apply(shape, len(rows), x_BCHW, *rows, *tensors)
    return _block(shape, False, x_BCHW, rows, tensors)[0]


class _Known(NamedTuple):
    mixer: int
    shapes: list[tuple[int, ...]]  # of the weights and biases
    widths: list[int]  # of the rows
    scales: int
    sizes: Any  # of their kernels, as _Shape has them; so the next
    kinds: Any
    largest: int
    kept: list[Any]  # what `kinds` points to, for as long as this is used


@functools.lru_cache
def _known(name: str, pool: bool, C: int, M: int, N: int, kernels: tuple[int, ...], scales: int) -> _Known | None:
    """What a block must be of to be taken; None where no such block can be."""
    mixer, own, rows = KNOWN[name]
    if min(N, M if own else N) < cast(Any, _library()).product_least_inputs() or not 0 < scales <= MAX_SCALES:
        return None
    sizes, each = {"1": 1, "C": C, "M": M, "N": N}, iter(kernels)
    shapes, kept = list[tuple[int, ...]](), list[Any]()
    for layer in [*["CC"] * pool, "CC", "NC", "CN", *own, *["C1"] * scales]:
        outputs, inputs = (sizes[letter] for letter in layer)
        k = next(each, 0) if inputs == 1 else 0
        shapes += [(outputs, 1, k, k) if k else (outputs, inputs), (outputs,)]
        kept += [entries(k, outputs)] * (inputs == 1)
    largest = max(kernels[-scales:], default=0)
    kept.append(entries(largest, C))
    if None in kept:
        return None
    kinds = (ctypes.c_void_p * 4)()
    for k, of in enumerate(kept[: -scales - 1]):
        kinds[k] = ctypes.addressof(of)
    kinds[3] = ctypes.addressof(kept[-1])
    of_scales = (ctypes.c_ssize_t * MAX_SCALES)(*kernels[-scales:])
    widths = [2 * C] * (3 if own else 2) + [sizes[w] for w in rows] + [C]
    return _Known(mixer, shapes, widths, scales, of_scales, kinds, largest, kept)


# --- the C library ---------------------------------------------------------------------------------------------------

MAX_SCALES, ROWS = 8, 5


class _Shape(ctypes.Structure):
    """`shape_t` of parts.c."""

    _fields_ = (
        *((name, ctypes.c_ssize_t) for name in ("B", "H", "W", "C", "M", "N")),
        *(
            (name, ctypes.c_ssize_t)
            for name in ("mixer", "relaxed", "replaces", "pool", "alike", "piece", "size", "scales")
        ),
        ("k", ctypes.c_ssize_t * MAX_SCALES),
        ("kind", ctypes.c_void_p * 4),
        ("eps", ctypes.c_float),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("network")
    pointer, index, keep = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
    if library:
        library.block_room.argtypes, library.block_room.restype = (pointer, keep), index
        library.block_backward_room.argtypes, library.block_backward_room.restype = (pointer,), index
        library.block_forward.argtypes = (pointer, keep, *[pointer] * 6, pointer, index)
        library.block_backward.argtypes = (*[pointer] * 12, pointer, index)
        library.rows_forward.argtypes = (*[pointer] * 3, *[index] * 3, pointer, index)
        library.rows_backward.argtypes = (*[pointer] * 5, *[index] * 4, pointer, index)
    return library


def _call(name: str, *args: Any) -> None:
    if getattr(_library(), name)(*args, native.pool(), torch.get_num_threads()):
        raise MemoryError("a block: out of memory")


def _array(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


# --- rows of the time embedding --------------------------------------------------------------------------------------


def _call_rows(name: str, tensors: Sequence[Tensor], of_layers: Sequence[Tensor], *numbers: Sequence[int]) -> None:
    arrays = [_array(of_layers), *((ctypes.c_ssize_t * len(each))(*each) for each in numbers)]
    counts = [len(each) for each in reversed(numbers)]
    _call(name, *(t.data_ptr() for t in tensors), *arrays, *counts, *tensors[0].shape)


def _rows(temb: Tensor, layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    widths = [bias.shape[0] for bias in layers[1::2]]
    made = tuple(temb.new_empty(temb.shape[0], width) for width in widths)
    of_layers = [t for layer in zip(layers[::2], layers[1::2], made, strict=True) for t in layer]
    _call_rows("rows_forward", [temb], of_layers, widths)
    return made


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Sequence[int], temb: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(temb, *layers)
        ctx.sizes = sizes
        return _rows(temb, layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temb, *layers = ctx.saved_tensors
        dtemb, found = temb.new_empty(len(grads), *temb.shape), _empty(layers)
        each = zip(layers[::2], grads, found[::2], found[1::2], strict=True)
        of_layers = [t for weight, g, *made in each for t in (weight, g.contiguous(), *made)]
        _call_rows("rows_backward", [temb, dtemb], of_layers, [g.shape[1] for g in grads], ctx.sizes)
        return None, dtemb[0], *found


# --- a block ---------------------------------------------------------------------------------------------------------


def _rows_and_alpha(shape: _Shape, rows: Sequence[Tensor]) -> tuple[Any, int | None]:
    """As parts.c takes them; alpha is the last of the rows."""
    own = rows[:-1] if shape.relaxed else rows
    return _array([*own, *[None] * (ROWS - len(own))]), rows[-1].data_ptr() if shape.relaxed else None


def _block(
    shape: _Shape, keep: bool, x: Tensor, rows: Sequence[Tensor], tensors: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The result; and what was made on the way, which the backward pass needs where it is kept."""
    library, at = cast(Any, _library()), ctypes.addressof(shape)
    y, room = torch.empty_like(x, memory_format=torch.channels_last), x.new_empty(library.block_room(at, keep))
    pointers = _array(tensors), x.data_ptr(), *_rows_and_alpha(shape, rows), y.data_ptr(), room.data_ptr()
    _call("block_forward", at, keep, *pointers)
    return y, room


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: _Shape, count: int, x: Tensor, *args: Tensor | None) -> Tensor:
        y, room = _block(shape, True, x, cast(Any, args[:count]), args[count:])
        ctx.shape, ctx.count = shape, count
        ctx.save_for_backward(x, room, *args)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, made, *args = ctx.saved_tensors
        shape, rows, tensors = ctx.shape, args[: ctx.count], args[ctx.count :]
        library, at, g = cast(Any, _library()), ctypes.addressof(shape), g.contiguous(memory_format=torch.channels_last)
        dx, room = torch.empty_like(x, memory_format=torch.channels_last), x.new_empty(library.block_backward_room(at))
        drows, dtensors = _empty(rows), _empty(tensors)
        images = g.data_ptr(), x.data_ptr(), *_rows_and_alpha(shape, rows), made.data_ptr()
        of_images = dx.data_ptr(), *_rows_and_alpha(shape, drows), room.data_ptr()
        _call("block_backward", at, _array(tensors), _array(dtensors), *images, *of_images)
        return None, None, dx, *drows, *dtensors


def _empty(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else torch.empty_like(t) for t in tensors]

"""Element-wise parts of a block, each in one pass over memory forward and one backward, on channels-last float32 CPU.

torch broadcasts a (B, C, 1, 1) tensor over a channels-last image C elements at a time, and each step of a chain reads
and writes the whole image. `fused.c` does a chain at once. Everywhere else (other devices, dtypes, layouts, autocast,
torch.compile, FLOP counters; see native.eager), and within `depthwise.literal()`, torch's own operators do the same.
All are differentiable once on the fast path (a second derivative raises). A row of each image, (B, C), may be the one
of all, (1, C).

Legend: B batch, C channels, H W space.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from liquiddiff import native
from liquiddiff.depthwise import is_literal
from liquiddiff.precision import at_once, full, full_precision, low_precision

__all__ = ["adaln", "adaln_mean", "backend", "gate_blend", "relax_add", "silu"]

LARGE = 2**22  # elements; see _parts
PIECE = 256  # positions of an image per running sum; decides the order of sums, so never the number of threads


def adaln(x_BCHW: Tensor, modulation_B2C: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(1 + scale) * LayerNorm(x) + shift, (B, C, H, W), the norm over the channels at each position; and x itself.

    `modulation` is the scales and, beside them, the shifts. Where x goes on beside its norm, use the one returned: the
    two gradients are then added in the norm's own pass.
    """
    (modulation_B2C,) = native.rows_of(x_BCHW.shape[0], modulation_B2C)
    if _fast([x_BCHW], modulation_B2C, width=2):
        return (_AdaLN.apply if torch.is_grad_enabled() else _adaln)(x_BCHW, modulation_B2C, eps, False)

    def composed(x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)  # (B, C) each
        normed = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=eps).permute(0, 3, 1, 2)
        return torch.addcmul(_image(shift), normed, _image(1 + scale))

    if is_literal():
        return composed(x_BCHW, modulation_B2C).contiguous(), x_BCHW  # torch's default layout
    return _lean(composed, x_BCHW, modulation_B2C), x_BCHW


def adaln_mean(x_BCHW: Tensor, modulation_B2C: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """`adaln`'s two, and the mean of the first over positions, (B, C)."""
    (modulation_B2C,) = native.rows_of(x_BCHW.shape[0], modulation_B2C)
    if _fast([x_BCHW], modulation_B2C, width=2):
        return (_AdaLN.apply if torch.is_grad_enabled() else _adaln)(x_BCHW, modulation_B2C, eps, True)
    y, x_BCHW = adaln(x_BCHW, modulation_B2C, eps)
    return y, x_BCHW, y.mean((2, 3))


def gate_blend(f_BCHW: Tensor, g_BCHW: Tensor, h_BCHW: Tensor, a_BC: Tensor, b_BC: Tensor) -> Tensor:
    """S g + (1 - s) h where s = sigmoid(a f - b): CfC's gate, (B, C, H, W)."""
    a_BC, b_BC = native.rows_of(f_BCHW.shape[0], a_BC, b_BC)
    if _fast([f_BCHW, g_BCHW, h_BCHW], a_BC, b_BC):
        return _Gate.apply(f_BCHW, g_BCHW, h_BCHW, a_BC, b_BC)

    def composed(f: Tensor, g: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.lerp(h, g, torch.sigmoid(torch.addcmul(-_image(b), _image(a), f)))

    return _lean(composed, f_BCHW, g_BCHW, h_BCHW, a_BC, b_BC)


def relax_add(x_BCHW: Tensor, n_BCHW: Tensor, y_BCHW: Tensor, alpha_BC: Tensor) -> Tensor:
    """X + alpha n + (1 - alpha) y: a relaxation law's blend on the residual, (B, C, H, W). Alpha may be (B, 1)."""
    (alpha_BC,) = native.rows_of(x_BCHW.shape[0], alpha_BC.expand(-1, x_BCHW.shape[1]))
    if _fast([x_BCHW, n_BCHW, y_BCHW], alpha_BC):
        return (_Relax.apply if torch.is_grad_enabled() else _relax)(x_BCHW, n_BCHW, y_BCHW, alpha_BC)

    def composed(x: Tensor, n: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        # At least in float32 whatever the layers run in: bfloat16 would round 1 - alpha, a room's question, by 9 %.
        wide = torch.promote_types(y.dtype, torch.float32)
        return x + torch.lerp(y.to(wide), n.to(wide), _image(alpha).to(wide)).to(y.dtype)

    return _lean(composed, x_BCHW, n_BCHW, y_BCHW, alpha_BC)


def silu(x_BCHW: Tensor, shift_BC: Tensor | None) -> Tensor:
    """SiLU(x + shift), (B, C, H, W)."""
    if shift_BC is None:
        return F.silu(x_BCHW)
    return _lean(lambda x, shift: F.silu(x + _image(shift)), x_BCHW, shift_BC)


def backend() -> str:
    """Name what computes on this CPU: "c", or "torch" where no compiler is found."""
    return "torch" if _library() is None else "c"


def _image(v_BC: Tensor) -> Tensor:
    return v_BC[:, :, None, None]


def _fast(images: Sequence[Tensor], *rows: Tensor, width: int = 1) -> bool:
    """Tell whether the C kernels may take this call; what is malformed is left to torch to complain about.

    A row has `width` numbers a channel.
    """
    shape = images[0].shape
    if is_literal() or len(shape) != 4 or not native.eager(*images, *rows) or images[0].numel() == 0:
        return False
    for image in images:
        if image.shape != shape or not image.is_contiguous(memory_format=torch.channels_last):
            return False
    for row in rows:
        if row.shape[0] not in (1, shape[0]) or row.shape[1:] != (width * shape[1],):
            return False
    return _library() is not None


# --- in a low precision -----------------------------------------------------------------------------------------------


def _lean(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`; in mixed precision its output is in the low one, and only `tensors` are kept for backward.

    Autocast's own way is to keep the float32 copies and results of every step of the chain: 2.4 times the bytes.
    """
    low = low_precision(tensors[0])
    if low is None:
        return function(*tensors)
    tensors = tuple(t.expand(len(tensors[0]), *t.shape[1:]) for t in tensors)  # one row may serve all
    with full_precision(tensors[0]):
        return _Lean.apply(function, low, *tensors)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], low: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        out = torch.empty_like(tensors[0], dtype=low)
        for part in _parts(out):
            out[part] = function(*(full(t[part]) for t in tensors))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        tensors, need = ctx.saved_tensors, ctx.needs_input_grad[2:]
        grads = [torch.empty_like(t) if wanted else None for t, wanted in zip(tensors, need, strict=True)]
        for part in _parts(g):
            inputs = [full(t[part]).detach().requires_grad_(w) for t, w in zip(tensors, need, strict=True)]
            with torch.enable_grad(), full_precision(g):
                y = ctx.function(*inputs)
            found = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], full(g[part])))
            for grad in grads:
                if grad is not None:
                    grad[part] = next(found)
        return None, None, *grads


def _parts(images: Tensor) -> Iterator[slice]:
    """Few images at a time where they are large: what is float32 for a moment stays small beside what is kept."""
    count = max(1, at_once(LARGE, images) // max(1, images[:1].numel()))
    return (slice(k, k + count) for k in range(0, len(images), count))


# --- the C library ---------------------------------------------------------------------------------------------------

POINTERS = {  # of each function; then the shape, and what runs it
    **{"adaln_forward": 5, "adaln_backward": 9, "gate_forward": 6, "gate_backward": 10},
    **{"relax_forward": 5, "relax_backward": 7},
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("network")
    pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
    for name, count in POINTERS.items() if library else ():
        function = getattr(library, name)
        eps = [ctypes.c_float] * (name == "adaln_forward")
        alike = [index] * name.endswith("_forward")
        function.argtypes, function.restype = [pointer] * count + eps + alike + [index] * 4 + [pointer, index], None
    return library


def _call(name: str, x: Tensor, tensors: Sequence[Tensor | None], *options: float) -> None:
    B, C, H, W = x.shape
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function = getattr(_library(), name)
    function(*pointers, *options, B, H * W, C, PIECE, native.pool(), torch.get_num_threads())


def _sums_of(x: Tensor, kinds: int) -> Tensor:
    """Room for sums over positions, (B, pieces, kinds, C); the kernel leaves the whole sums in piece 0."""
    B, C, H, W = x.shape
    return x.new_empty(B, -(-H * W // PIECE), kinds, C)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _dense(g: Tensor) -> Tensor:
    return g.contiguous(memory_format=torch.channels_last)


# --- forward and backward --------------------------------------------------------------------------------------------


def _adaln(x: Tensor, modulation: Tensor, eps: float, mean: bool, moments: Tensor | None = None) -> Any:
    y, sums = _like(x), _sums_of(x, 1) if mean else None
    _call("adaln_forward", x, [x, modulation, y, moments, sums], eps, modulation.shape[0] == 1)
    return (y, x) if sums is None else (y, x, sums[:, 0, 0] / x[0, 0].numel())


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, modulation: Tensor, eps: float, mean: bool) -> Any:
        B, _, H, W = x.shape
        moments = x.new_empty(B, H, W, 2)
        ctx.save_for_backward(x, modulation, moments)
        ctx.set_materialize_grads(False)
        return _adaln(x, modulation, eps, mean, moments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, g_x: Tensor | None, g_mean: Tensor | None = None) -> Any:
        x, modulation, moments = ctx.saved_tensors
        if g is None and g_mean is None:
            return g_x, None, None, None
        g = torch.zeros_like(x) if g is None else _dense(g)
        dx, sums = _like(x), _sums_of(x, 2)
        other = None if g_x is None else _dense(g_x)
        pooled = None if g_mean is None else g_mean.contiguous()
        _call("adaln_backward", x, [g, None, x, other, modulation, pooled, moments, dx, sums])
        return dx, sums[:, 0].flatten(1), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, g: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = _like(f)
        _call("gate_forward", f, [f, g, h, a, b, y], a.shape[0] == 1)
        ctx.save_for_backward(f, g, h, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        f, g, h, a, b = ctx.saved_tensors
        df, dg, dh, sums = _like(f), _like(f), _like(f), _sums_of(f, 2)
        grad = _dense(grad)
        _call("gate_backward", f, [grad, f, g, h, a, b, df, dg, dh, sums])
        return df, dg, dh, sums[:, 0, 0], sums[:, 0, 1]


def _relax(x: Tensor, kept: Tensor, mixed: Tensor, alpha: Tensor) -> Tensor:
    out = _like(x)
    _call("relax_forward", x, [x, kept, mixed, alpha, out], alpha.shape[0] == 1)
    return out


class _Relax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, mixed: Tensor, alpha: Tensor) -> Tensor:
        learned = ctx.needs_input_grad[3]
        ctx.save_for_backward(alpha, *([kept, mixed] if learned else []))
        return _relax(x, kept, mixed, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        alpha, *blended = ctx.saved_tensors
        dense = _dense(g)
        dkept, dmixed, sums = _like(dense), _like(dense), _sums_of(dense, 1) if blended else None
        _call("relax_backward", dense, [dense, *(blended or [None, None]), alpha, dkept, dmixed, sums])
        return g, dkept, dmixed, None if sums is None else sums[:, 0, 0]

"""Mamba's selective scan (arXiv:2312.00752, Algorithm 2).

    h_l = exp(dt_l A) h_{l-1} + dt_l B_l u_l,   y_l = C_l . h_l + D u_l

On a CPU `selective_scan.c` does it in one pass, in float32; on a GPU the kernel of the package `mamba_ssm`, where it is
installed; everywhere else, and as the reference, plain PyTorch.

Shapes: B batch, K directions, L steps, M channels, N states a channel.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from liquiddiff import native
from liquiddiff.depthwise import is_literal
from liquiddiff.layers import transformed

__all__ = ["plain_scan", "selective_scan"]

SLICE = 2**20  # states that a CPU scans at a time
LEAN_SLICE = 2**26  # and a GPU


def selective_scan(
    u_BKLM: Tensor, dt_BKLM: Tensor, A_KMN: Tensor, B_BKLN: Tensor, C_BKLN: Tensor, D_KM: Tensor
) -> Tensor:
    """y, (B, K, L, M), by the fastest that is here. Differentiable once, in all arguments."""
    tensors = (u_BKLM, dt_BKLM, A_KMN, B_BKLN, C_BKLN, D_KM)
    if is_literal():
        return plain_scan(*tensors)
    if u_BKLM.is_cuda:
        return (_cuda_kernel() or plain_scan)(*tensors)
    fast = native.eager(*tensors) and _fits(*tensors) and _library(A_KMN.shape[2])
    return _Scan.apply(*tensors) if fast else plain_scan(*tensors)


def _fits(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> bool:
    """Tell whether the shapes are those of the legend; what is malformed is left to torch to complain about."""
    if u.dim() != 4 or A.dim() != 3 or u.numel() == 0:
        return False
    N, (images, K, L, M) = A.shape[2], u.shape
    states = (images, K, L, N)
    return dt.shape == u.shape and A.shape == (K, M, N) and B.shape == states == C.shape and D.shape == (K, M)


def plain_scan(
    u: Tensor, dt: Tensor, A_KMN: Tensor, B: Tensor, C: Tensor, D_KM: Tensor, lean: bool | None = None
) -> Tensor:
    """The same in plain PyTorch, a few images at a time.

    `lean` keeps the inputs alone and computes the rest again for the gradients; by default wherever it is not a CPU,
    where the states of all images, N times the activations, would not fit.
    """
    if not u.numel():
        return _scan_slice(u, dt, A_KMN, B, C, D_KM)
    lean = u.device.type != "cpu" if lean is None else lean
    count = max(1, (LEAN_SLICE if lean else SLICE) // (u[0].numel() * A_KMN.shape[2]))
    scan: Callable[..., Tensor] = _scan_slice
    if lean and torch.is_grad_enabled():
        scan = partial(checkpoint, _scan_slice, use_reentrant=False, preserve_rng_state=False)
    slices = zip(*(z.split(count) for z in (u, dt, B, C)), strict=True)
    return torch.cat([scan(u, dt, A_KMN, B, C, D_KM) for u, dt, B, C in slices])


def _scan_slice(u: Tensor, dt: Tensor, A_KMN: Tensor, B: Tensor, C: Tensor, D_KM: Tensor) -> Tensor:
    decay = (dt[..., None] * A_KMN[:, None]).exp_()  # (B, K, L, M, N), Eq. 4
    drive = (dt * u)[..., None] * B[..., None, :]
    h = linear_scan(decay, drive) if transformed() else LinearScan.apply(decay, drive)  # Eq. 2a
    return (h @ C[..., None])[..., 0] + D_KM[:, None] * u  # Eq. 2b


def linear_scan(decay: Tensor, drive: Tensor) -> Tensor:
    """What LinearScan does, for torch.func: by its operators alone."""
    h = [drive[:, :, 0]]
    for step in range(1, drive.shape[2]):
        h.append(torch.addcmul(drive[:, :, step], decay[:, :, step], h[-1]))
    return torch.stack(h, 2)


class LinearScan(torch.autograd.Function):
    """h_l = decay_l h_{l-1} + drive_l along dimension 2 (h_0 = drive_0); its gradient is the same scan from the end."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor) -> Tensor:
        """See the class."""
        h = scan_(decay, drive.clone())
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """g_l = grad_l + decay_{l+1} g_{l+1}; d decay_l = g_l h_{l-1}; d drive_l = g_l."""
        decay, h = ctx.saved_tensors
        ahead = torch.cat([decay[:, :, 1:], torch.zeros_like(decay[:, :, :1])], dim=2)
        g = scan_(ahead.flip(2), grad.flip(2)).flip(2)
        d_decay = torch.zeros_like(g)
        torch.mul(g[:, :, 1:], h[:, :, :-1], out=d_decay[:, :, 1:])
        return d_decay, g


def scan_(decay: Tensor, h: Tensor) -> Tensor:
    """The scan, in place: `h` holds the drives and becomes the states.

    A CPU takes one step after the other. A GPU would wait for L launches, so it takes about 2 sqrt(L): all chunks side
    by side, then each adds what the one before it carries over. That is exact and never divides, unlike a cumulative
    sum of drive / prod(decay).
    """
    L = decay.shape[2]
    if decay.is_meta:
        return h
    S = L if stepwise(h) else divisor(L)
    a, h_GS = decay.unflatten(2, (-1, S)), h.unflatten(2, (-1, S))
    for s in range(1, S):
        h_GS[:, :, :, s].addcmul_(a[:, :, :, s], h_GS[:, :, :, s - 1])
    if S < L:
        kept = a.cumprod(3)  # what a state at the chunk's start keeps until s
        for chunk in range(1, L // S):
            h_GS[:, :, chunk].addcmul_(kept[:, :, chunk], h_GS[:, :, chunk - 1, -1:])
    return h


def stepwise(h: Tensor) -> bool:
    """Whether a step is cheap to start."""
    return h.device.type == "cpu"


def divisor(L: int) -> int:
    """The largest divisor of L up to its square root."""
    return next(s for s in range(math.isqrt(L), 0, -1) if L % s == 0)


@functools.cache
def _library(states: int) -> ctypes.CDLL | None:
    library = native.load("selective_scan", f"N={states}")
    if library is not None:
        pointer, index = ctypes.c_void_p, ctypes.c_ssize_t
        library.scan_forward.argtypes = [pointer] * 7 + [index] * 4 + [pointer, index]
        library.scan_backward.argtypes = [pointer] * 13 + [index] * 4 + [pointer, index]
    return library


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A_KMN: Tensor, B: Tensor, C: Tensor, D_KM: Tensor) -> Tensor:
        inputs = [z.contiguous() for z in (u, dt, A_KMN.transpose(1, 2), B, C, D_KM)]
        ctx.save_for_backward(*inputs)
        y = torch.empty_like(inputs[0])
        _call("scan_forward", [*inputs, y])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        u, dt, A_KNM, B, C, D = ctx.saved_tensors
        dA, dD = A_KNM.new_empty(len(u), *A_KNM.shape), D.new_empty(len(u), *D.shape)
        du, ddt, dB, dC = (torch.empty_like(z) for z in (u, dt, B, C))
        _call("scan_backward", [u, dt, A_KNM, B, C, D, g.contiguous(), du, ddt, dA, dB, dC, dD])
        return du, ddt, dA.sum(0).transpose(1, 2), dB, dC, dD.sum(0)


def _call(name: str, tensors: list[Tensor]) -> None:
    (images, K, L, M), N = tensors[0].shape, tensors[2].shape[1]
    pointers = [z.data_ptr() for z in tensors]
    if getattr(_library(N), name)(*pointers, images * K, K, L, M, native.pool(), torch.get_num_threads()):
        raise MemoryError("selective scan: out of memory")


@functools.cache
def _cuda_kernel() -> Callable[..., Tensor] | None:
    """The fused CUDA scan of the package `mamba_ssm` in `selective_scan`'s terms; None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        K, M = D.shape
        rows = (z.transpose(2, 3).flatten(1, 2).contiguous() for z in (u, dt))  # (B, K M, L)
        groups = (z.transpose(2, 3).contiguous() for z in (B, C))  # (B, K, N, L): a group of channels a direction
        u_, dt_ = rows
        y = selective_scan_fn(u_, dt_, A.flatten(0, 1), *groups, D.flatten())
        return y.unflatten(1, (K, M)).transpose(2, 3)

    return scan

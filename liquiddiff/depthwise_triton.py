"""Depthwise k x k convolution on a GPU: Triton kernels of the forward pass, the input and the weight gradient, NHWC.

Tested in Triton's interpreter on a CPU; never yet run on a GPU, neither for speed nor for truth. `usable` therefore
compares them with torch's own on the device before their first use there, and leaves the work to torch where they fail.

Legend: B batch, H height, W width, C channels, K kernel size, R = K // 2. Sums are float32 whatever the images are.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK_W, BLOCK_C = 16, 32  # outputs of a row, and channels, of one program
SPLITS = 256  # programs that share a weight gradient's rows: decides the order of its sum


@triton.jit
def forward_kernel(
    x, w, bias, y, H, W, C,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of one row's outputs, (BLOCK_W, BLOCK_C): y = bias + sum_ij x[h + i - R, w + j - R] w[i, j]."""
    row, R = tl.program_id(0), K // 2  # row = b * H + h
    h = row % H
    u = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < C
    total = tl.full((BLOCK_W, BLOCK_C), 0.0, tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=exists, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(K):
        hs = h + i - R + 0 * u  # a block: the interpreter's scalars are no masks
        inside = (hs >= 0) & (hs < H)
        start = (row + i - R).to(tl.int64) * W
        for j in tl.static_range(K):
            at = u + j - R
            mask = (inside & (at >= 0) & (at < W))[:, None] & exists[None, :]
            v = tl.load(x + (start + at)[:, None] * C + c[None, :], mask=mask, other=0.0)
            tap = tl.load(w + (i * K + j) * C + c, mask=exists, other=0.0)
            total += v.to(tl.float32) * tap.to(tl.float32)[None, :]
    place = (row.to(tl.int64) * W + u)[:, None] * C + c[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(u < W)[:, None] & exists[None, :])


@triton.jit
def weight_kernel(x, g, sums, rows, H, W, C, each, K: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr):
    """One kernel row i of dw[i, j] = sum_bhw x[h + i - R, w + j - R] g[h, w], over `each` rows of all images."""
    i, split = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    R, exists, taps = K // 2, c < C, tl.arange(0, PADDED)
    total = tl.full((PADDED, BLOCK_C), 0.0, tl.float32)
    for row in range(split * each, tl.minimum((split + 1) * each, rows)):
        hs = row % H + i - R + 0 * taps
        inside = (hs >= 0) & (hs < H) & (taps < K)
        for u in range(0, W):  # neighbouring positions meet the same inputs: they come from the nearest cache
            at = u + taps - R
            mask = (inside & (at >= 0) & (at < W))[:, None] & exists[None, :]
            place = ((row + i - R) * W + at).to(tl.int64)[:, None] * C + c[None, :]
            v = tl.load(x + place, mask=mask, other=0.0)
            grad = tl.load(g + (row * W + u + 0 * c).to(tl.int64) * C + c, mask=exists, other=0.0)
            total += v.to(tl.float32) * grad.to(tl.float32)[None, :]
    place = ((split * K + i) * K + taps)[:, None] * C + c[None, :]
    tl.store(sums + place, total, mask=(taps < K)[:, None] & exists[None, :])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    (B, C, H, W), K = x.shape, weight.shape[-1]
    taps = weight.reshape(C, K * K).t().contiguous()
    y = torch.empty_like(x, memory_format=torch.channels_last)
    grid = (B * H, triton.cdiv(W, BLOCK_W), triton.cdiv(C, BLOCK_C))
    sizes = {"K": K, "HAS_BIAS": bias is not None, "BLOCK_W": BLOCK_W, "BLOCK_C": BLOCK_C}
    with torch.cuda.device_of(x):  # Triton launches on the current one
        forward_kernel[grid](x, taps, taps if bias is None else bias, y, H, W, C, **sizes)
    return y


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    g, x = (t.contiguous(memory_format=torch.channels_last) for t in (g, x))
    (B, C, H, W), K = x.shape, weight.shape[-1]
    each = triton.cdiv(B * H, SPLITS)
    splits = triton.cdiv(B * H, each)
    sums = torch.empty(splits, K * K, C, device=x.device, dtype=torch.float32)
    sizes = {"K": K, "PADDED": triton.next_power_of_2(K), "BLOCK_C": BLOCK_C}
    with torch.cuda.device_of(x):
        weight_kernel[K, splits, triton.cdiv(C, BLOCK_C)](x, g, sums, B * H, H, W, C, each, **sizes)
    return sums.sum(0).t().reshape(weight.shape).to(weight.dtype)


class Depthwise(torch.autograd.Function):
    """`depthwise` of tensors of one dtype and device; differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y_BCHW, channels-last."""
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, where they are needed."""
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx = _convolve(g, weight.flip(2, 3), None) if need[0] else None
        dw = _weight_gradient(g, x, weight) if need[1] else None
        return dx, dw, g.sum((0, 2, 3), dtype=torch.float32).to(g.dtype) if need[2] else None


@functools.cache
def usable(device: torch.device, kernel_size: int, dtype: torch.dtype) -> bool:
    """Tell whether the kernels run on this device and agree there with torch's own, outputs and gradients.

    The first caller may be anywhere, so this is apart from its modes and, within a checkpoint, from its saved tensors.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    autocast = torch.autocast(device.type, enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), hooks, autocast:
            found = errors(device, kernel_size, dtype)
        return all(error <= (1e-5 if dtype is torch.float32 else 2e-2) for error in found)
    except Exception:  # a compiler, a driver or a device that Triton does not know: torch does the work
        return False


def errors(
    device: torch.device, kernel_size: int, dtype: torch.dtype, shape: Sequence[int] = (2, 40, 9, 21)
) -> list[float]:
    """Relative errors of y, dx, dw and db against float64 by torch, of the same rounded inputs."""
    rng = torch.Generator().manual_seed(0)
    C = shape[1]
    sizes = (shape, (C, 1, kernel_size, kernel_size), (C,), shape)
    *inputs, g = (torch.randn(*size, generator=rng).to(device, dtype) for size in sizes)
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = Depthwise.apply(*leaves)
    got = [y, *torch.autograd.grad(y, leaves, g)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    z = F.conv2d(exact[0], exact[1], exact[2], padding=kernel_size // 2, groups=C)
    want = [z, *torch.autograd.grad(z, exact, g.double())]
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)]

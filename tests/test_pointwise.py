"""1x1 convolutions, and 3x3 ones of a doubled image, compute what their literal reading computes."""

import importlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from liquiddiff.depthwise import literal
from liquiddiff.layers import Pointwise, upsampled
from liquiddiff.pointwise import pointwise

impl = importlib.import_module("liquiddiff.pointwise")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
# B, C, O, H, W; both the C kernel's whole tiles and those that overlap, and what is too small for it
SHAPES = [
    (8, 64, 64, 8, 8),
    (3, 32, 45, 20, 13),
    (5, 130, 9, 4, 4),
    (2, 3, 6, 5, 5),
    (1, 40, 1, 1, 1),
    (1, 256, 64, 33, 33),
]


def make(B, C, outputs, H, W, dtype=torch.float32):
    rng = torch.Generator().manual_seed(C)
    x, g = (
        torch.randn(B, n, H, W, generator=rng, dtype=torch.float64)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for n in (C, outputs)
    )
    return [x, torch.randn(outputs, C, generator=rng).to(dtype), torch.randn(outputs, generator=rng).to(dtype)], g


def results(function, args, g):
    """Output and gradients."""
    args = [t.detach().requires_grad_() for t in args]
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y, args, g)]


def conv(x, weight, bias, silu=False):
    y = F.conv2d(x, weight[:, :, None, None], bias)
    return F.silu(y) if silu else y


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert ((a.double() - b).abs().max() / b.abs().max()).item() <= tolerance


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_convolution(shape, silu):
    args, g = make(*shape)
    want = results(lambda *a: conv(*a, silu), [t.double() for t in args], g.double())
    assert_close(results(lambda *a: pointwise(*a, silu), args, g), want)
    with torch.no_grad():  # another operator: SiLU within the product
        assert_close([pointwise(*args, silu)], want[:1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_added_is_added_and_gets_the_gradient(shape):
    (x, weight, bias), g = make(*shape)
    add = (g + 1).flip(0).contiguous(memory_format=torch.channels_last)
    args = [x, weight, bias, add]
    want = results(lambda *a: a[3] + conv(*a[:3]), [t.double() for t in args], g.double())

    def added(x, weight, bias, add):
        return pointwise(x, weight, bias, add_BOHW=add)

    assert_close(results(added, args, g), want)
    assert_close(results(added, [*args[:3], add.contiguous()], g), want)  # torch's layout
    with torch.no_grad():
        assert_close([added(*args)], want[:1])
        assert_close([pointwise(*args[:3], True, add)], [F.silu(want[0])])
    if impl.onednn():
        assert added(x, weight.requires_grad_(), bias, add).grad_fn.next_functions[0][0].name() == "_PointwiseBackward"


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_c_kernel_is_what_is_tested_here_and_its_bits_do_not_depend_on_threads():
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("without AVX512 the product is MKL's, by design")
    assert impl.onednn() and impl._library() is not None
    g, x = torch.randn(5000, 45), torch.randn(5000, 130)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(impl._weight_gradient(g, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert not torch.equal(found[0][0], g.t() @ x)  # it is not torch's product


def test_without_a_compiler_torch_gives_the_same(monkeypatch):
    args, g = make(*SHAPES[1])
    want = results(pointwise, args, g)
    monkeypatch.setattr(impl, "_library", lambda: None)
    assert_close(results(pointwise, args, g), want)
    monkeypatch.setattr(impl, "onednn", lambda: False)
    assert_close(results(pointwise, args, g), want)


def test_layouts_gradients_and_modes():
    args, g = make(*SHAPES[0])
    want = results(conv, args, g)
    assert_close(results(pointwise, [args[0].contiguous(), *args[1:]], g.contiguous()), want)
    x, weight, bias = args
    weight.requires_grad_()  # of one alone
    assert_close(torch.autograd.grad(pointwise(x, weight, None), weight, g), want[2:3])
    layer = Pointwise(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    y = layer(x.requires_grad_()).sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(dx.sum(), x)
    assert pointwise(x[:0], weight, None).shape == (0, 64, 8, 8)
    empty = torch.vmap(lambda x: pointwise(x, weight, None))(x[None])
    assert_close([empty[0]], [pointwise(x, weight, None).double()])


@pytest.mark.parametrize("shape", [(2, 8, 5, 4, 4), (3, 64, 32, 8, 5), (1, 4, 4, 1, 1), (2, 3, 2, 1, 6)], ids=str)
def test_four_kernels_of_2x2_are_one_of_3x3_on_the_doubled_image(shape):
    B, C, outputs, H, W = shape
    rng = torch.Generator().manual_seed(0)
    x, weight, bias, g = (
        torch.randn(*s, generator=rng)
        for s in [(B, C, H, W), (outputs, C, 3, 3), (outputs,), (B, outputs, 2 * H, 2 * W)]
    )
    with literal():
        want = results(upsampled, [t.double() for t in (x, weight, bias)], g.double())
    assert_close(results(upsampled, [x, weight, bias], g), want)


def test_multiply_adds_are_told_of_the_literal():
    x, weight, bias = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.randn(3)
    with FlopCounterMode(display=False) as counter:
        upsampled(x, weight, bias)
    assert counter.get_total_flops() == 2 * 8 * 8 * 3 * 2 * 9


def test_the_gradients_of_four_kernels_are_derivatives():
    x, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(2, 2, 3, 2), (3, 2, 3, 3), (3,)]
    )
    assert torch.autograd.gradcheck(upsampled, (x, weight, bias))
    assert torch.autograd.gradgradcheck(upsampled, (x, weight, bias))

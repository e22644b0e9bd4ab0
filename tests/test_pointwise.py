"""1x1 convolutions, and 3x3 ones of a doubled image, compute what their literal reading computes."""

import importlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from liquiddiff.depthwise import depthwise, literal
from liquiddiff.layers import Pointwise, upsampled
from liquiddiff.pointwise import pointwise

impl = importlib.import_module("liquiddiff.pointwise")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler: torch's products, rightly")
# B, C, O, H, W; both the C kernel's whole blocks and those that overlap, and what is too small for it
SHAPES = [
    (8, 64, 64, 8, 8),
    (3, 32, 45, 20, 13),
    (5, 130, 9, 4, 4),
    (2, 3, 6, 5, 5),
    (1, 40, 1, 1, 1),
    (1, 256, 64, 33, 33),
    (40, 33, 32, 5, 6),
    (2, 100, 120, 3, 13),  # panels, strips and part of one, of outputs and of inputs
]
KINDS = ["plain", "then", "add", "first", "first and row", "first, row and add"]
KINDS += ["of 3", "of 7, then", "of 5, first, row and add"]  # of a depthwise convolution
each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(kind, B, C, outputs, H, W):
    """Arguments of `call`, and a gradient of its output."""
    rng = torch.Generator().manual_seed(C)
    images = [torch.randn(B, n, H, W, generator=rng) for n in (C, outputs, outputs)]
    x, add, g = (t.contiguous(memory_format=torch.channels_last) for t in images)
    args = [x, torch.randn(outputs, C, generator=rng), torch.randn(outputs, generator=rng)]
    if "of" in kind:
        k = size(kind)
        args += [torch.randn(C, 1, k, k, generator=rng), torch.randn(C, generator=rng)]
    args += [add] if "add" in kind else []
    return args + ([torch.randn(B, C, generator=rng)] if "row" in kind else []), g


def size(kind):
    """Of the kernel, in "of 3"."""
    return int(kind.split()[1].strip(","))


def call(kind, x, weight, bias, *rest):
    """By `pointwise`."""
    rest = list(rest)
    of = (rest.pop(0), rest.pop(0)) if "of" in kind else None
    add, row = rest.pop(0) if "add" in kind else None, rest.pop(0) if "row" in kind else None
    return pointwise(x, weight, bias, add, first="first" in kind, row_BC=row, then="then" in kind, of=of)


def plain(kind, x, weight, bias, *rest):
    """As one would write it."""
    if "of" in kind:
        x, rest = F.conv2d(x, *rest[:2], padding=size(kind) // 2, groups=x.shape[1]), rest[2:]
    if "row" in kind:
        x = x + rest[-1][:, :, None, None]
    y = F.conv2d(F.silu(x) if "first" in kind else x, weight[:, :, None, None], bias)
    y = y + rest[0] if "add" in kind else y
    return F.silu(y) if "then" in kind else y


def results(function, kind, args, g):
    """Output and gradients."""
    args = [t.detach().requires_grad_() for t in args]
    y = function(kind, *args)
    return [y.detach(), *torch.autograd.grad(y, args, g)]


def reference(kind, args, g):
    """In float64."""
    return results(plain, kind, [t.double() for t in args], g.double())


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert ((a.double() - b).abs().max() / b.abs().max()).item() <= tolerance


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_kind
@each_shape
def test_equals_the_float64_convolution(shape, kind):
    args, g = make(kind, *shape)
    want = reference(kind, args, g)
    got = results(call, kind, args, g)
    assert_close(got, want)
    with torch.no_grad():  # nothing is kept
        assert_equal([call(kind, *args)], got[:1])
    with literal():
        assert_close(results(call, kind, args, g), want)


@needs_compiler
@each_kind
def test_the_c_kernel_is_what_is_tested_here_and_its_bits_do_not_depend_on_threads_or_batch(kind):
    args, g = make(kind, 19, 130, 45, 20, 13)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(call, kind, args, g))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_equal(other, found[0])
    images = [t[7:9] if t.shape[0] == 19 else t for t in args]
    alone = results(call, kind, images, g[7:9])
    of_images = [0, *(n for n, t in enumerate(args, 1) if t.shape[0] == 19)]
    assert_equal([alone[n] for n in of_images], [found[0][n][7:9] for n in of_images])
    y = call(kind, args[0].requires_grad_(), *args[1:])
    assert y.grad_fn.next_functions[0][0].name() == "_PointwiseBackward"


@needs_compiler
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize(
    "shape", [(2, 64, 8, 8), (3, 33, 4, 4), (2, 40, 33, 33), (1, 32, 3, 100), (2, 32, 70, 1)], ids=str
)
def test_a_tile_of_a_depthwise_convolution_is_the_whole_ones_to_the_bit(shape, k):
    rng = torch.Generator().manual_seed(k)
    x = torch.randn(*shape, generator=rng).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(shape[1], 1, k, k, generator=rng), torch.randn(shape[1], generator=rng)
    assert torch.equal(pointwise(x, torch.eye(shape[1]), None, of=kernel), depthwise(x, *kernel))


@each_kind
def test_without_a_compiler_torch_gives_the_same(kind, monkeypatch):
    args, g = make(kind, *SHAPES[1])
    want = results(call, kind, args, g)
    monkeypatch.setattr(impl, "_library", lambda: None)
    assert_close(results(call, kind, args, g), want)


@each_kind
def test_only_the_gradients_asked_for(kind):
    args, g = make(kind, *SHAPES[1])
    want = results(call, kind, args, g)[1:]
    for wanted in range(len(args)):
        inputs = [t.clone().requires_grad_(n == wanted) for n, t in enumerate(args)]
        call(kind, *inputs).backward(g)
        assert_close([inputs[wanted].grad], [want[wanted].double()])
        assert all(t.grad is None for n, t in enumerate(inputs) if n != wanted)


@pytest.mark.parametrize("kind", ["first", "then"])
def test_the_activation_over_its_whole_range(kind):
    x = torch.cat([torch.linspace(-100, 100, 60_000), torch.linspace(-1, 1, 4_000)]).reshape(1, 32, 40, 50)
    x = x.contiguous(memory_format=torch.channels_last)
    args, ones = [x, torch.eye(32), torch.zeros(32)], torch.ones_like(x)
    for a, b in zip(results(call, kind, args, ones)[:2], reference(kind, args, ones)[:2], strict=True):
        assert ((a.double() - b).abs() <= 1e-6 * b.abs() + 1e-7).all()  # the value and the slope
    nan = [torch.full_like(x, torch.nan), *args[1:]]
    assert all(t.isnan().all() for t in results(call, kind, nan, ones)[:2])


def test_layouts_gradients_and_modes():
    args, g = make("plain", *SHAPES[0])
    want = reference("plain", args, g)
    both = F.silu(plain("plain", *args) + g)  # no kernel has this
    assert_close([pointwise(*args, g, then=True)], [both.double()])
    assert_close(results(call, "plain", [args[0].contiguous(), *args[1:]], g.contiguous()), want)
    assert_close(results(call, "plain", [args[0], args[1].t().contiguous().t(), args[2]], g), want)
    convolved, gradient = make("of 3", *SHAPES[0])
    in_rows = [convolved[0].contiguous(), *convolved[1:]]  # as a channels-last one from the convolution on
    assert_equal(results(call, "of 3", in_rows, gradient), results(call, "of 3", convolved, gradient))
    x, weight, bias = args
    weight.requires_grad_()
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

    def doubled(_, *args):
        return upsampled(*args)

    with literal():
        want = results(doubled, "", [t.double() for t in (x, weight, bias)], g.double())
    assert_close(results(doubled, "", [x, weight, bias], g), want)


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

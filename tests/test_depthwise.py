"""The fast depthwise convolution computes what `F.conv2d` computes, everywhere that the model may meet it."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from liquiddiff import native
from liquiddiff.depthwise import DepthwiseConv2d, backend, depthwise, depthwise_reference, literal, merge_kernels

impl = importlib.import_module("liquiddiff.depthwise")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
SHAPES = [
    *[(3, 8, 8, 8), (5, 64, 4, 4), (2, 32, 8, 8), (1, 16, 32, 32), (2, 40, 16, 16)],
    *[(2, 13, 9, 5), (3, 9, 3, 14), (2, 33, 1, 7), (4, 16, 2, 2), (3, 24, 1, 1), (2, 20, 19, 31)],
    *[(1, 3, 6, 6), (70, 8, 5, 6), (2, 136, 12, 8)],
]


def make(B, C, H, W, k, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(B, C, H, W, generator=rng, dtype=dtype) for _ in range(2))
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    return x, torch.randn(C, 1, k, k, generator=rng, dtype=dtype), torch.randn(C, generator=rng, dtype=dtype), g


def results(function, x, w, b, g):
    """Output and gradients with respect to x, w and b."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], g)]


def assert_close(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(COMPILER is None, reason="no C compiler: the backend is rightly torch")
def test_the_c_backend_is_what_is_tested_here():
    assert backend() == backend(3) == "c" and backend(1) == "torch"


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 11])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_reference(shape, k):
    if k > 7 and shape[2] > 16:
        pytest.skip("the large kernels are covered by the smaller images")
    x, w, b, g = make(*shape, k)
    got = results(depthwise, x, w, b, g)
    assert_close(got, results(depthwise_reference, x.double(), w.double(), b.double(), g.double()))
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    no_bias = results(depthwise, x, w, None, g)
    assert_close(no_bias, results(depthwise_reference, x.double(), w.double(), None, g.double()))


def test_long_sums_stay_accurate():
    if backend() == "torch":
        pytest.skip("torch's own weight gradient misses 1e-5 here")
    x, w, b, g = make(512, 16, 16, 16, 3)
    x, g = x + 1, g + 1  # sums of 131,072 terms of one sign, where naive float32 summation fails
    assert_close(results(depthwise, x, w, b, g), results(depthwise_reference, x.double(), w.double(), b.double(), g))


@pytest.mark.parametrize("k", [3, 7])
def test_gradcheck(k):
    args = [t.requires_grad_() for t in make(2, 8, 4, 5, k, dtype=torch.float64)[:3]]
    assert torch.autograd.gradcheck(depthwise, args, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *a: merge_kernels(a), [args[1], torch.randn_like(args[1][..., :1, :1])])


def test_torch_gradients_of_the_fallback_pass_gradcheck():
    x, w, b, _ = make(2, 8, 4, 5, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(FallbackInDouble.apply, [t.requires_grad_() for t in (x, w, b)], fast_mode=True)


class FallbackInDouble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return depthwise_reference(x, w, b)

    @staticmethod
    def backward(ctx, g):
        return impl._backward_torch(g, *ctx.saved_tensors, (True, True, True))


def test_merged_kernels_equal_the_sum_of_separate_convolutions():
    x, _, _, g = make(3, 16, 8, 8, 7)
    weights = [make(1, 16, 1, 1, k, seed=k)[1].requires_grad_() for k in (3, 7, 5, 1)]
    x.requires_grad_()
    separate = sum(F.conv2d(x, w, padding=w.shape[-1] // 2, groups=16) for w in weights)
    want = torch.autograd.grad(separate, [x, *weights], g)
    merged = depthwise(x, merge_kernels(weights))
    assert_close([merged.detach()], [separate.detach()])
    assert_close(torch.autograd.grad(merged, [x, *weights], g), want)
    assert torch.equal(merge_kernels(weights[:1]), weights[0])
    for bad in ([], [torch.zeros(16, 1, 4, 4)]):
        with pytest.raises(ValueError, match="odd sizes"):
            merge_kernels(bad)


@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("shape", [(128, 32, 8, 8), (9, 72, 20, 20), (1, 64, 16, 16)], ids=str)
def test_bits_do_not_depend_on_the_run_or_the_number_of_threads(shape, k):
    args = make(*shape, k)
    before = torch.get_num_threads()
    try:
        want = results(depthwise, *args)
        for threads in (1, 2, 2, 3, 5):
            torch.set_num_threads(threads)
            if backend() == "c":
                assert_equal(results(depthwise, *args), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 4, 8, 20])
def test_a_sample_does_not_depend_on_its_batch(size):
    x, w, b, g = make(37, 40, size, size, 7)
    y, dx, *_ = results(depthwise, x, w, b, g)
    for n in (0, 18, 36):
        alone = results(depthwise, x[n : n + 1], w, b, g[n : n + 1])
        assert_equal(alone[:2], [y[n : n + 1], dx[n : n + 1]])


def test_strides_of_inputs_and_gradients_do_not_matter():
    x, w, b, g = make(4, 16, 6, 10, 5)
    want = results(depthwise, x, w, b, g)
    slanted = torch.empty(4, 16, 10, 12).transpose(2, 3)[:, :, ::2, :].copy_(x)
    strided_w = torch.empty(16, 1, 5, 10)[..., ::2].copy_(w)
    strided_b = torch.empty(32)[::2].copy_(b)
    assert_equal(results(depthwise, x.contiguous(), strided_w, strided_b, g.contiguous()), want)
    assert_equal(results(depthwise, slanted, w, b, g), want)
    assert depthwise(x.contiguous(), w, b).is_contiguous(memory_format=torch.channels_last)
    ones = torch.ones(()).expand_as(g)
    assert_equal(results(depthwise, x, w, b, ones), results(depthwise, x, w, b, torch.ones_like(g)))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_the_gradients_asked_for(wanted):
    *tensors, g = make(3, 16, 8, 8, 7)
    want = results(depthwise, *tensors, g)
    inputs = [t.clone().requires_grad_(n in wanted) for n, t in enumerate(tensors)]
    depthwise(*inputs).backward(g)
    for n, t in enumerate(inputs):
        assert torch.equal(t.grad, want[n + 1]) if n in wanted else t.grad is None


def test_modes_of_torch():
    x, w, b, g = make(2, 16, 8, 8, 7)
    want = results(depthwise, x, w, b, g)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(depthwise(x, w.clone().requires_grad_(), b), want[0])
    assert_equal(results(lambda *a: checkpoint(depthwise, *a, use_reentrant=False), x, w, b, g), want)
    with torch.autocast("cpu", torch.bfloat16):
        half = depthwise(x, w, b)
        assert half.dtype == torch.bfloat16 and torch.equal(half, depthwise_reference(x, w, b))
    with literal():
        assert_equal(results(depthwise, x, w, b, g), results(depthwise_reference, x, w, b, g))
    assert_close(results(depthwise, *(t.bfloat16() for t in (x, w, b, g))), want, 0.05)


def test_gradients_that_are_asked_for_within_autocast_are_as_precise():
    x, w, b, g = make(2, 3, 6, 6, 5)  # few channels: torch's work
    want = results(depthwise_reference, *(t.double() for t in (x, w, b, g)))
    inputs = [t.requires_grad_() for t in (x, w, b)]
    y = depthwise(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close([y.detach(), *torch.autograd.grad(y, inputs, g)], want)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch's own, on the first dual tensor
def test_a_second_derivative_and_forward_mode_raise_and_functorch_works():
    x, w, _, _ = make(2, 16, 4, 4, 3)
    if backend() == "c":
        x.requires_grad_()
        (dx,) = torch.autograd.grad(depthwise(x, w).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
    x = x.detach()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        depthwise(forward_ad.make_dual(x, x), w)
    assert_close([torch.func.vmap(lambda t: depthwise(t[None], w)[0])(x)], [depthwise(x, w)])


def test_what_is_malformed_is_refused():
    x, w, b, _ = make(2, 16, 4, 4, 3)
    with pytest.raises(ValueError, match="must be odd"):
        depthwise(x, torch.zeros(16, 1, 4, 4))
    with pytest.raises(ValueError, match="must be odd"):
        DepthwiseConv2d(16, 2)
    for bad in ((x[:, :8], w, b), (x, w, b[:3]), (x, w.expand(-1, 2, -1, -1), b), (x, w.double(), b)):
        with pytest.raises(RuntimeError):
            depthwise(*bad)


def test_empty_batch():
    x, w, b, g = make(0, 16, 4, 4, 3)
    y, dx, dw, db = results(depthwise, x, w, b, g)
    assert y.shape == dx.shape == x.shape and not dw.any() and not db.any()


def test_flops_and_shapes_without_data():
    B, C, H, W, k = 2, 16, 8, 6, 7
    for device in ("meta", "cpu"):
        layer = DepthwiseConv2d(C, k, device=device)
        with FlopCounterMode(display=False) as counter:
            y = layer(torch.zeros(B, C, H, W, device=device))
        assert counter.get_total_flops() == 2 * B * H * W * C * k * k
        assert y.shape == (B, C, H, W) and y.device.type == device


def test_module_is_conv2d_in_parameters_and_initialisation():
    torch.manual_seed(0)
    ours = DepthwiseConv2d(16, 7)
    torch.manual_seed(0)
    theirs = nn.Conv2d(16, 16, 7, padding=3, groups=16)
    assert_equal(ours.state_dict().values(), theirs.state_dict().values())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = make(2, 16, 8, 8, 7)[0]
    assert_close([ours(x).detach()], [theirs(x).detach()])
    assert DepthwiseConv2d(16, 3, bias=False).bias is None


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    impl._library.cache_clear()
    yield tmp_path
    impl._library.cache_clear()


def test_without_a_compiler_torch_gives_the_same(fresh, monkeypatch):
    args = make(3, 16, 8, 8, 5)
    want = results(depthwise_reference, *(t.double() for t in args))
    for compiler in ("", str(fresh / "missing"), "false"):
        monkeypatch.setenv("PATH", str(fresh))
        monkeypatch.setenv("CC", shutil.which("false", path="/usr/bin:/bin") or "" if compiler == "false" else compiler)
        impl._library.cache_clear()
        assert backend(5) == "torch"
        got = results(depthwise, *args)
        assert_close(got, want)
        assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_a_compiler_that_fails_is_told_once(fresh, monkeypatch, capsys):
    broken = fresh / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'In file included:' >&2; echo 'lanes.h:9: error: no such lane' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(native, "_failed", [])
    monkeypatch.setenv("CC", str(broken))
    assert backend(5) == backend(9) == "torch"
    want = f"CPU kernels: {broken} failed (lanes.h:9: error: no such lane); torch does their work, slower\n"
    assert capsys.readouterr().err == want
    monkeypatch.setenv("CC", str(fresh / "missing"))
    impl._library.cache_clear()
    assert backend(5) == "torch" and capsys.readouterr().err == ""  # no compiler is no failure


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_a_damaged_cache_is_rebuilt(fresh):
    assert backend(5) == "c"
    (made,) = (fresh / "cache" / "liquiddiff").iterdir()
    made.unlink()  # the loaded file itself must stay as it is
    made.write_bytes(b"damaged")
    impl._library.cache_clear()
    assert backend(5) == "c" and made.stat().st_size > 1000


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_what_is_built_is_used_where_it_cannot_be_kept(fresh):
    assert backend(5) == "c"
    (made,) = (fresh / "cache" / "liquiddiff").iterdir()
    made.unlink()
    made.mkdir()  # a file of its name cannot be replaced
    impl._library.cache_clear()
    assert backend(5) == "c" and list(made.parent.iterdir()) == [made]


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_where_no_cache_can_be_kept_the_library_is_built_for_the_process(fresh):
    (fresh / "cache").touch()
    assert backend(5) == "c"


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_two_processes_build_at_once(fresh):
    code = "from liquiddiff.depthwise import backend; print(backend(5))"
    env = os.environ | {"PYTHONPATH": str(Path(impl.__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", code]
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in running:
        assert process.communicate(timeout=120) == ("c\n", "")
    assert [path.suffix for path in (fresh / "cache" / "liquiddiff").iterdir()] == [".so"]  # nothing half-made
    assert backend(5) == "c"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_under_torch_compile():
    def layer(x, w, b):
        return depthwise(x, merge_kernels([w, w[..., 2:5, 2:5]]), b)

    args = make(2, 16, 8, 8, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # inductor as well, but half a minute
    assert_close(results(compiled, *args), results(layer, *args))

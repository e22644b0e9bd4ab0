"""The fused element-wise kernels compute what torch's composition computes, everywhere that the model may meet them."""

import importlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from liquiddiff import fused
from liquiddiff.budget import build
from liquiddiff.config import Run
from liquiddiff.depthwise import literal
from liquiddiff.fused import adaln, adaln_mean, backend, gate_blend, relax_add, silu
from liquiddiff.seeding import initialise

impl = importlib.import_module("liquiddiff.fused")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
OPS = {  # images that each takes, rows, and how many numbers these have for a channel
    "adaln": (adaln, 1, 1, 2),
    "adaln_mean": (adaln_mean, 1, 1, 2),
    "gate_blend": (gate_blend, 3, 2, 1),
    "relax_add": (relax_add, 3, 1, 1),
}
SHAPES = [
    (3, 32, 8, 8),
    (2, 64, 4, 4),
    (2, 40, 20, 20),
    (3, 13, 9, 5),
    (2, 3, 6, 7),
    (4, 1, 2, 2),
    (5, 8, 1, 1),
    (1, 31, 1, 9),
]
each_op = pytest.mark.parametrize("op", OPS)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler: the backend is rightly torch")


def make(op, B, C, H, W, dtype=torch.float32):
    """The function, its arguments, and one gradient for each of its outputs; the norm gives its input back as well."""
    function, images, rows, width = OPS[op]
    rng = torch.Generator().manual_seed(B + C)
    x = [torch.randn(B, C, H, W, generator=rng, dtype=torch.float64) * 2 + 0.5 for _ in range(images + 2)]
    r = [torch.randn(B, n * C, generator=rng, dtype=torch.float64) for n in [width] * rows + [1]]
    *x, g, g_x = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in x)
    *r, g_mean = (t.to(dtype) for t in r)
    outputs = {"adaln": [g, g_x], "adaln_mean": [g, g_x, g_mean]}
    return function, [*x, *r], outputs.get(op, [g])


def results(function, args, grads):
    """Outputs and gradients."""
    args = [t.detach().requires_grad_() for t in args]
    out = function(*args)
    out = out if isinstance(out, tuple) else (out,)
    return [*(y.detach() for y in out), *torch.autograd.grad(out, args, grads)]


def reference(op, shape):
    """The composition by torch in float64, of the float32 arguments."""
    function, args, grads = make(op, *shape)
    return results(function, [t.double() for t in args], [t.double() for t in grads])


def assert_close(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_compiler
def test_the_c_backend_is_what_is_tested_here(monkeypatch):
    assert backend() == "c"
    called = []
    monkeypatch.setattr(impl, "_call", lambda name, *rest: called.append(name))
    for op in OPS:
        results(*make(op, 2, 8, 4, 4))
    assert {name.split("_")[1] for name in called} == {"forward", "backward"} and len(called) == 2 * len(OPS)


@each_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_composition(op, shape):
    if op.startswith("adaln") and shape[1] == 1:
        pytest.skip("the norm of one channel is zero")
    got = results(*make(op, *shape))
    assert_close(got, reference(op, shape))
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_the_literal_compositions_are_the_formulas():
    (x, modulation), (f, g, h, a, b), (_, n, y, alpha) = (
        make(op, 2, 6, 3, 4, torch.float64)[1] for op in ("adaln", "gate_blend", "relax_add")
    )

    def image(v):
        return v[:, :, None, None]

    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    s = torch.sigmoid(image(a) * f - image(b))
    scale, shift = modulation.chunk(2, dim=1)
    assert adaln(x, modulation)[1] is x
    assert_close([adaln(x, modulation)[0]], [normed * image(1 + scale) + image(shift)], 1e-12)
    assert_close([gate_blend(f, g, h, a, b)], [s * g + (1 - s) * h], 1e-12)
    assert_close([relax_add(x, n, y, alpha)], [x + image(alpha) * n + image(1 - alpha) * y], 1e-12)
    assert_close([relax_add(x, n, y, alpha[:, :1])], [x + y + image(alpha[:, :1]) * (n - y)], 1e-12)
    assert_close([silu(x, shift)], [F.silu(x + image(shift))], 1e-12)


@each_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_row_may_serve_all_images(op, shape, monkeypatch):
    function, args, _ = make(op, *shape)
    one = [t[:1] if t.dim() == 2 else t for t in args]
    every = [t[:1].repeat(shape[0], 1) if t.dim() == 2 else t for t in args]
    with torch.no_grad():
        got, want = function(*one), function(*every)
    assert_equal(*((out if isinstance(out, tuple) else (out,)) for out in (got, want)))
    monkeypatch.setattr(impl, "LARGE", 1)  # in a low precision, image by image
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_equal(*([out[0]] if isinstance(out, tuple) else [out] for out in (function(*one), function(*every))))


@needs_compiler
def test_the_sigmoid_over_its_whole_range():
    x = torch.cat([torch.linspace(-100, 100, 60_000), torch.linspace(-1, 1, 4_000)]).reshape(1, 8, 80, 100)
    x = x.contiguous(memory_format=torch.channels_last)
    one, row = torch.ones_like(x), torch.ones(1, 8)
    s = gate_blend(x, one, torch.zeros_like(x), row, 0 * row)
    error = (s.double() - torch.sigmoid(x.double())).abs() / torch.sigmoid(x.double())
    assert (error / (3 + x.abs()))[x > -87].max() < 1e-7 and (s[x <= -87] < 2e-38).all()
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0] * 2).view(1, 8, 1, 1)
    sure = gate_blend(
        special, 3 * torch.ones_like(special), special.new_full((1, 8, 1, 1), 5.0), row, 0 * row
    ).flatten()
    assert sure[0] == 3 and sure[1] == 5 and sure[2].isnan()


@each_op
@pytest.mark.parametrize("shape", [(32, 32, 8, 8), (3, 24, 40, 20)], ids=str)
def test_bits_do_not_depend_on_the_run_or_the_number_of_threads(op, shape):
    call = make(op, *shape)
    before = torch.get_num_threads()
    try:
        want = results(*call)
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            if backend() == "c":
                assert_equal(results(*call), want)
    finally:
        torch.set_num_threads(before)


@each_op
@pytest.mark.parametrize("size", [1, 4, 20])
def test_a_sample_does_not_depend_on_its_batch(op, size):
    function, args, grads = make(op, 19, 40, size, size)
    whole = results(function, args, grads)
    for n in (0, 9, 18):
        alone = results(function, [t[n : n + 1] for t in args], [t[n : n + 1] for t in grads])
        if backend() == "c":
            assert_equal(alone, [t[n : n + 1] for t in whole])


@each_op
def test_strides_of_rows_gradients_and_images_do_not_matter(op):
    function, args, grads = make(op, 4, 16, 6, 10)
    want = results(function, args, grads)
    strided = [t if t.dim() == 4 else torch.stack([t, t], 2)[..., 0] for t in args]
    assert_equal(results(function, strided, [g.contiguous() for g in grads]), want)
    assert_close(results(function, [t.contiguous() for t in args], grads), want)  # torch's work: not channels-last
    ones = [torch.ones(()).expand_as(g) for g in grads]
    assert_equal(results(function, args, ones), results(function, args, [torch.ones_like(g) for g in grads]))


@each_op
def test_modes_of_torch(op):
    function, args, grads = make(op, 2, 16, 4, 4)
    want = results(function, args, grads)
    outputs = len(grads)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = function(*args)
            assert_equal(y if outputs > 1 else [y], want[:outputs])
    assert_equal(results(lambda *a: checkpoint(function, *a, use_reentrant=False), args, grads), want)
    with literal():
        composed = results(function, args, grads)
        assert_close(composed, want)
    assert_close(results(function, [t.bfloat16() for t in args], [t.bfloat16() for t in grads]), want, 0.1)
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False):
        function(*args)
    meta = function(*(t.to("meta") for t in args))
    assert (meta[0] if outputs > 1 else meta).shape == want[0].shape
    vmapped = torch.func.vmap(lambda *a: function(*(t[None] for t in a)))(*args)
    assert_close([t[:, 0] for t in vmapped] if outputs > 1 else [vmapped[:, 0]], want[:outputs])


@each_op
def test_only_the_gradients_asked_for(op):
    function, args, grads = make(op, 3, 16, 4, 4)
    want = results(function, args, grads)[len(grads) :]
    for wanted in range(len(args)):
        inputs = [t.clone().requires_grad_(n == wanted) for n, t in enumerate(args)]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
        torch.autograd.backward(*zip(*used, strict=True))
        for n, t in enumerate(inputs):
            assert torch.equal(t.grad, want[n]) if n == wanted else t.grad is None


def test_any_output_of_the_norm_alone_may_be_used():
    function, args, grads = make("adaln_mean", 3, 16, 4, 4)
    for k, grad in enumerate(grads):
        inputs = args[:1] if k == 1 else args  # on the other two x, which comes back, does not depend

        def chosen(*a, k=k):
            return function(*a, *(t.to(a[0]) for t in args[len(a) :]))[k]

        assert_close(results(chosen, inputs, grad), results(chosen, [t.double() for t in inputs], grad.double()))


@needs_compiler
@each_op
def test_a_second_derivative_raises(op):
    function, args, _ = make(op, 2, 16, 4, 4)
    args[0].requires_grad_()
    y = function(*args)
    (dx,) = torch.autograd.grad((y[0] if isinstance(y, tuple) else y).square().sum(), args[0], create_graph=True)
    if op != "relax_add":  # linear in x: its gradient there is the incoming one
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@each_op
def test_empty_batch(op):
    function, args, grads = make(op, 0, 16, 4, 4)
    got = results(function, args, grads)
    assert [t.shape for t in got[len(grads) :]] == [t.shape for t in args]


@needs_compiler
@each_op
def test_no_more_images_are_saved_than_by_the_composition(op):
    function, args, _ = make(op, 8, 32, 8, 8)

    def saved():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.numel()}), lambda t: t):
            function(*(t.requires_grad_() for t in args))
        return sum(size for size in sizes.values() if size > 8 * 32)

    fast = saved()
    with literal():
        assert fast <= saved()


def test_without_a_compiler_torch_gives_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "missing"))
    impl._library.cache_clear()
    try:
        assert backend() == "torch"
        for op in OPS:
            assert_close(results(*make(op, 3, 16, 5, 4)), reference(op, (3, 16, 5, 4)))
    finally:
        impl._library.cache_clear()


def test_the_whole_network_equals_its_literal_reading():
    run = Run()
    net = build(run.model, run.image_shape)
    initialise(net, 0)
    net = net.to(memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():  # what starts at zero would hide the rest
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    x, t = torch.randn(8, *run.image_shape, generator=rng), torch.rand(8, generator=rng)

    def step():
        v = net(x, t)
        return [v.detach(), *torch.autograd.grad(v.square().mean(), list(net.parameters()))]

    fast = step()
    with literal():
        assert_close(fast, step(), 1e-4)
    if backend() == "c":
        assert_equal(step(), fast)
        assert fused.backend() == "c"

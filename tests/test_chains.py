"""Chains of products, and parts of a block in one call, compute what their layers compute one after the other."""

import copy
import importlib
import shutil

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from liquiddiff import parts
from liquiddiff.block import FeedForward, LiquidDiffusionBlock
from liquiddiff.config import Mixer, Model
from liquiddiff.depthwise import literal
from liquiddiff.mixers import MIXERS, Slot
from liquiddiff.relaxation import LAWS

impl = [importlib.import_module(f"liquiddiff.{name}") for name in ("chains", "parts")]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler: the layers, rightly")
# B, C, M, H, W: whole blocks, overlapping ones, tiles of less than 64 positions, several chunks; the last is too small
SHAPES = [
    (3, 32, 32, 8, 8),
    (2, 64, 96, 20, 13),
    (9, 45, 33, 7, 5),
    (40, 64, 64, 4, 4),
    (1, 128, 40, 33, 33),
    (3, 8, 12, 5, 4),
]
D = 40  # width of the time embedding
NODES = {
    "feed_forward": "_FeedForwardBackward",
    "cfc": "_CellBackward",
    "conv": "_SeparableBackward",
    "conv_gated": "_SeparableBackward",
    "tail": "_TailBackward",
    "tail_without_pool": "_TailBackward",
}
each_chain = pytest.mark.parametrize("chain", NODES)


class Cell(nn.Module):
    """A mixer with the arguments of a feed-forward; t is of no use to these."""

    def __init__(self, name, C, M, **mixer):
        super().__init__()
        self.cell = MIXERS[name](Slot(C, M, D, 8), Mixer(name, **mixer))

    def forward(self, x, temb):
        return self.cell(x, temb, temb[:, 0])


class Feed(nn.Module):
    """A feed-forward that makes its norm's rows itself."""

    def __init__(self, C, M):
        super().__init__()
        self.feed = FeedForward(C, D, M / C)

    def forward(self, x, temb):
        return self.feed(x, self.feed.norm.rows(temb))


class Tail(nn.Module):
    """A block of which little but its tail is left."""

    def __init__(self, C, M, pool):
        super().__init__()
        model = Model("test", mixer=Mixer("identity"), relaxation="none", mix_pool=pool, ffn_ratio=M / C)
        self.block = LiquidDiffusionBlock(Slot(C, M, D, 8), model, LAWS["none"](C))

    def forward(self, x, temb):
        return self.block(x, temb, temb[:, 0])


def make(chain, B, C, M, H, W, **mixer):
    """A module with no weight at zero, and its arguments: an image, a time embedding, a gradient of the output."""
    rng = torch.Generator().manual_seed(C)
    if chain == "feed_forward":
        module = Feed(C, M)
    else:
        module = Tail(C, M, chain == "tail") if chain.startswith("tail") else Cell(chain, C, M, **mixer)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    x, g = (torch.randn(B, C, H, W, generator=rng).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return module, x, torch.randn(B, D, generator=rng), g


def results(module, x, temb, g):
    """Output and gradients: of the image, of the time embedding, of all parameters."""
    x, temb = x.detach().requires_grad_(), temb.detach().requires_grad_()
    y = module(x, temb)
    return [y.detach(), *torch.autograd.grad(y, [x, temb, *module.parameters()], g)]


def reference(module, x, temb, g):
    """Layer by layer in float64."""
    return results(copy.deepcopy(module).double(), x.double(), temb.double(), g.double())


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_chain
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_layers_in_float64(chain, shape):
    module, x, temb, g = make(chain, *shape)
    got = results(module, x, temb, g)
    assert_close(got, reference(module, x, temb, g))
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for mode in (torch.no_grad, torch.inference_mode):  # nothing is kept
        with mode():
            assert_equal([module(x, temb)], got[:1])
    if COMPILER and min(shape[1:3]) >= 32:
        assert module(x, temb).grad_fn.name() == NODES[chain]


def test_a_masked_wiring_trains_its_synapses_alone():
    pytest.importorskip("ncps")
    call = make("cfc", 3, 32, 40, 6, 6, wiring="ncp")
    got = results(*call)
    assert_close(got, reference(*call))
    names = [name for name, _ in call[0].named_parameters()]
    for name in ("f", "g.2", "h.2"):
        layer = call[0].cell.get_submodule(name)
        gradient = got[3 + names.index(f"cell.{name}.weight")]
        assert gradient[layer.mask == 0].abs().max() == 0 < gradient.abs().max()


@needs_compiler
@each_chain
def test_bits_do_not_depend_on_threads_or_on_the_batch(chain):
    module, *args = make(chain, 19, 64, 45, 20, 13)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(module, *args))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_equal(other, found[0])
    if chain == "conv_gated":
        return  # its channel gate is torch's product of the image's mean, and that may depend on the batch
    with torch.no_grad():
        whole = module(*args[:2])
        for n in (0, 9, 18):
            assert torch.equal(module(*(t[n : n + 1] for t in args[:2])), whole[n : n + 1])


@each_chain
def test_strides_and_modes_of_torch(chain):
    module, x, temb, g = make(chain, 3, 32, 40, 6, 10)
    want = results(module, x, temb, g)
    assert_close(results(module, x.contiguous(), temb, g), want)  # layer by layer: not channels-last
    assert_equal(results(module, x, temb, g.contiguous()), want)
    one = torch.ones(()).expand_as(g)
    assert_equal(results(module, x, temb, one), results(module, x, temb, torch.ones_like(g)))
    with literal():
        assert_close(results(module, x, temb, g), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close([module(x, temb)], want[:1], 0.05)
    with FlopCounterMode(display=False) as counter:
        module(x, temb)
    assert counter.get_total_flops() > 2 * 3 * 60 * 2 * 32 * 40
    assert copy.deepcopy(module).to("meta")(x.to("meta"), temb.to("meta")).shape == x.shape
    one_by_one = torch.func.vmap(lambda x, temb: module(x[None], temb[None])[0])(x, temb)
    assert_close([one_by_one], want[:1])
    assert module(x[:0], temb[:0]).shape == (0, *x.shape[1:])


@needs_compiler
@each_chain
def test_a_second_derivative_raises(chain):
    module, x, temb, _ = make(chain, 2, 32, 32, 4, 4)
    (dx,) = torch.autograd.grad(module(x.requires_grad_(), temb).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@each_chain
def test_weights_that_are_frozen_get_no_gradient(chain):
    module, x, temb, g = make(chain, 3, 32, 40, 4, 4)
    want = results(module, x, temb, g)
    module.requires_grad_(False)
    module(x.requires_grad_(), temb).backward(g)
    assert torch.equal(x.grad, want[1]) and all(p.grad is None for p in module.parameters())


@needs_compiler
@each_chain
def test_less_is_kept_for_the_backward_pass_than_by_the_layers(chain):
    module, x, temb, _ = make(chain, 8, 32, 32, 8, 8)

    def saved():
        kept = {}  # the tensors themselves: an address that is free again would be counted once for two
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}), lambda t: t):
            module(x.requires_grad_(), temb)
        return sum(t.numel() for t in kept.values() if t.numel() >= x.numel())

    fast = saved()
    with literal():
        assert fast < saved()


@each_chain
def test_without_a_compiler_the_layers_give_the_same(chain, monkeypatch):
    call = make(chain, 3, 64, 32, 5, 4)
    want = results(*call)
    for module in impl:
        monkeypatch.setattr(module, "_library", lambda: None)
    assert_close(results(*call), want)


@each_chain
def test_one_row_may_serve_all_images(chain):
    module, x, temb, g = make(chain, 5, 64, 40, 6, 10)
    want = results(module, x, temb[:1].expand(5, -1), g)
    got = results(module, x, temb[:1], g)
    want[2] = want[2].sum(0, keepdim=True)
    assert_close(got, want, 3e-6)
    with torch.no_grad():  # the kernels read the one row; where there are gradients it is repeated before them
        assert_close([module(x, temb[:1])], want[:1], 1e-6)


@needs_compiler
def test_a_tail_in_one_call_is_its_layers_to_the_bit(monkeypatch):
    call = make("tail_without_pool", 5, 64, 40, 20, 13)  # the pool's product is torch's there
    got = results(*call)
    monkeypatch.setattr(parts, "ready", lambda *args: False)
    assert_equal(results(*call), got)


@needs_compiler
@pytest.mark.parametrize("name", ["backbone", "f", "h.2", "spatial.out", "spatial.pool", "feed_forward.contract"])
def test_a_layer_of_another_size_raises(name):
    chain = "cfc" if name in ("backbone", "f", "h.2") else "tail"
    module, x, temb, _ = make(chain, 2, 64, 48, 4, 4)
    layer = module.get_submodule(f"{'cell' if chain == 'cfc' else 'block'}.{name}")
    layer.weight = nn.Parameter(layer.weight[:-8])
    with pytest.raises(RuntimeError):
        module(x, temb)


@needs_compiler
@pytest.mark.parametrize("kernels", [[7], [3, 9], [5, 5, 3]])
def test_any_scales_are_merged_and_parted(kernels):
    rng, C = torch.Generator().manual_seed(0), 48
    model = Model("test", mixer=Mixer("identity"), relaxation="none", mix_kernels=kernels)
    block = LiquidDiffusionBlock(Slot(C, C, D, 8), model, LAWS["none"](C))
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    module = lambda x, temb: block(x, temb, temb[:, 0])  # noqa: E731
    x, g = (torch.randn(3, C, 9, 6, generator=rng).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x, temb = x.requires_grad_(), torch.randn(3, D, generator=rng)
    y = module(x, temb)
    assert y.grad_fn.name() == "_TailBackward"
    got = [y, *torch.autograd.grad(y, [x, *block.parameters()], g)]
    block.double()
    y = module(x.double(), temb.double())
    assert_close(got, [y, *torch.autograd.grad(y, [x, *block.parameters()], g.double())])


@pytest.mark.parametrize("shape", [(1, 32, 64, 8), (128, 32, 64, 64, 40), (5, 45, 100, 17), (70, 64, 512)], ids=str)
def test_rows_are_the_layers_of_a_time_embedding(shape):
    B, width, *outputs = shape
    torch.manual_seed(B)
    layers, temb = nn.ModuleList(nn.Linear(width, n) for n in outputs), torch.randn(B, width, requires_grad=True)
    grads = [torch.randn(n, B).T for n in outputs]  # not contiguous
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows = parts.rows(temb, *layers)
            found.append([*rows, *torch.autograd.grad(rows, [temb, *layers.parameters()], grads)])
    finally:
        torch.set_num_threads(before)
    if COMPILER:
        assert rows[0].grad_fn.name() == "_RowsBackward"
    for other in found[1:]:
        assert_equal(other, found[0])
    with torch.no_grad():
        assert_equal(parts.rows(temb, *layers), rows)
    temb = temb.detach().double().requires_grad_()
    rows = [layer(nn.functional.silu(temb)) for layer in layers.double()]
    exact = torch.autograd.grad(rows, [temb, *layers.parameters()], [g.double() for g in grads])
    assert_close(found[0], [*rows, *exact])


def test_a_row_that_nothing_depends_on_and_one_of_another_width():
    layers, temb = [nn.Linear(32, 40), nn.Linear(32, 64)], torch.randn(3, 32, requires_grad=True)
    parts.rows(temb, *layers)[0].sum().backward()
    assert layers[0].weight.grad.abs().max() > 0
    assert layers[1].weight.grad is None or not layers[1].weight.grad.any()
    with pytest.raises(RuntimeError):
        parts.rows(temb, nn.Linear(31, 40))
    layers[0].bias = nn.Parameter(torch.ones(1))
    exact = layers[0](nn.functional.silu(temb))
    torch.testing.assert_close(parts.rows(temb, *layers)[0], exact)

"""Chains of products, and parts of a block in one call, compute what their layers compute one after the other."""

import copy
import importlib
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune  # noqa: F401 - torch.nn.utils has them only once imported
from torch.utils.flop_counter import FlopCounterMode

from liquiddiff import parts
from liquiddiff.block import FeedForward, LiquidDiffusionBlock
from liquiddiff.config import Mixer, Model
from liquiddiff.depthwise import literal
from liquiddiff.mixers import MIXERS, CfC, Pointwise, Slot
from liquiddiff.relaxation import LAWS
from liquiddiff.unet import LiquidDiffusionUNet

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
BLOCKS = {  # mixer, law, what else
    "block": ("identity", "none", {}),
    "block_without_pool": ("identity", "none", {"mix_pool": False}),
    "block_of_cfc": ("cfc", "liquid", {}),
    "block_of_cfc_without_law": ("cfc", "none", {"mix_kernels": [3, 5]}),
    "block_of_cfc_for_residual": ("cfc", "residual", {"mix_pool": False}),
    "block_of_conv": ("conv", "constant", {}),
    "block_of_conv_without_law": ("conv", "none", {}),
    "block_of_conv_for_residual": ("conv", "residual", {}),
}
NODES = {
    "feed_forward": "_FeedForwardBackward",
    "conv": "_SeparableBackward",
    "conv_gated": "_SeparableBackward",
    **dict.fromkeys(BLOCKS, "_BlockBackward"),
}
each_chain = pytest.mark.parametrize("chain", NODES)
each_block = pytest.mark.parametrize("chain", BLOCKS)


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


class Block(nn.Module):
    """One of BLOCKS, with the arguments of a feed-forward; t is the embedding's first number."""

    def __init__(self, chain, C, M, **mixer):
        super().__init__()
        name, law, options = BLOCKS[chain]
        model = Model("test", mixer=Mixer(name, **mixer), relaxation=law, ffn_ratio=M / C, **options)
        self.block = LiquidDiffusionBlock(Slot(C, M, D, 8), model, LAWS[law](C))

    def forward(self, x, temb):
        return self.block(x, temb, temb[:, 0])


def make(chain, B, C, M, H, W, **mixer):
    """A module with no weight at zero, and its arguments: an image, a time embedding, a gradient of the output."""
    rng = torch.Generator().manual_seed(C)
    if chain == "feed_forward":
        module = Feed(C, M)
    else:
        module = (Block if chain in BLOCKS else Cell)(chain, C, M, **mixer)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_((0.2 if chain in BLOCKS else 0.3) * torch.randn(p.shape, generator=rng))
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
    call = make("block_of_cfc", 3, 32, 40, 6, 6, wiring="ncp")
    got = results(*call)
    assert_close(got, reference(*call))
    names = [name for name, _ in call[0].named_parameters()]
    for name in ("f", "g.2", "h.2"):
        layer = call[0].block.mixer.get_submodule(name)
        gradient = got[3 + names.index(f"block.mixer.{name}.weight")]
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
def test_a_block_in_one_call_is_its_layers_to_the_bit(monkeypatch):
    call = make("block_without_pool", 5, 64, 40, 20, 13)  # the pool's product is torch's there
    got = results(*call)
    monkeypatch.setattr(parts, "ready", lambda *args: False)
    assert_equal(results(*call), got)


@needs_compiler
@pytest.mark.parametrize(
    "name", ["mixer.backbone", "mixer.f", "mixer.h.2", "spatial.out", "spatial.pool", "feed_forward.contract"]
)
def test_a_layer_of_another_size_raises(name):
    module, x, temb, _ = make("block_of_cfc", 2, 64, 48, 4, 4)
    layer = module.get_submodule(f"block.{name}")
    layer.weight = nn.Parameter(layer.weight[:-8])
    with pytest.raises(RuntimeError):
        module(x, temb)


def graph(y):
    """The names of the nodes behind a tensor."""
    seen, found, todo = set(), [], [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name())
            todo += [before for before, _ in node.next_functions]
    return found


@needs_compiler
@pytest.mark.parametrize(
    "mixer, law", [("cfc", "liquid"), ("cfc", "none"), ("conv", "residual"), ("identity", "linear")]
)
def test_a_network_is_a_call_a_block_and_one_for_all_rows(mixer, law):
    model = Model("test", [32, 40], [1, 1], mixer=Mixer(mixer), relaxation=law)
    net = LiquidDiffusionUNet(model, in_channels=1, resolution=8)
    names = graph(net(torch.randn(2, 1, 8, 8), torch.rand(2)))
    assert names.count("_RowsBackward") == 1
    assert names.count("_BlockBackward") == 6
    by_layer = {"_AdaLNBackward", "_RelaxBackward", "_SeparableBackward", "_DepthwiseBackward"} & set(names)
    assert bool(by_layer) == (mixer == "identity")  # which parts.c does not know


class Thrice(nn.Module):
    shared = replaces_residual = False

    def forward(self, kept, mixed, t, temb):
        return 3 * mixed


class ThriceNone(LAWS["none"]):
    forward = Thrice.forward


class ThriceResidual(LAWS["residual"]):
    forward = Thrice.forward


@torch.no_grad()
@pytest.mark.parametrize("law", [Thrice(), ThriceNone(32), ThriceResidual(32)], ids=lambda law: type(law).__name__)
def test_a_law_with_a_forward_of_its_own_is_asked(law):
    module, x, temb, _ = make("block_of_cfc", 2, 32, 40, 4, 4)
    module.block.relaxation = law
    got = module(x, temb)
    with literal():
        assert_close([got], [module(x, temb)])
    plain = LAWS["residual" if law.replaces_residual else "none"](32)
    module.block.relaxation = plain
    assert not torch.allclose(module(x, temb), got)
    plain.forward = lambda kept, mixed, t, temb: 3 * mixed  # of this one object
    assert_close([module(x, temb)], [got])
    del plain.forward
    module.block.mixer.register_forward_hook(lambda mixer, given, made: 3 * made)
    if not law.replaces_residual:
        assert_close([module(x, temb)], [got])


def test_a_mixer_of_the_users_own_a_hook_and_another_layer_are_asked():
    module, x, temb, g = make("block_of_cfc", 2, 32, 40, 4, 4)
    before, seen = module(x, temb), []
    hook = module.block.mixer.register_forward_hook(lambda mixer, given, made: seen.append(made.shape))
    torch.testing.assert_close(module(x, temb), before)
    hook.remove()
    module(x, temb)
    assert seen == [x.shape]
    twice = {"forward": lambda self, x, temb, t: 2 * CfC.forward(self, x, temb, t)}
    module.block.mixer.__class__ = type("Twice", (CfC,), twice)
    assert not torch.allclose(module(x, temb), before)
    module.block.mixer.__class__ = CfC
    module.block.mixer.forward = lambda x, temb, t: 0 * x
    assert not torch.allclose(module(x, temb), before)
    del module.block.mixer.forward
    assert torch.equal(module(x, temb), before)
    module.block.feed_forward.expand = Pointwise(32, 40)  # not the layer that it was made with
    assert not torch.allclose(module(x, temb), before)


WATCHED = ["norm", "mixer.context", "mixer.f", "mixer.time_a", "mixer.g", "mixer.h.0", "spatial", "spatial.norm"]
WATCHED += ["norm.modulation", "spatial.scales.1", "spatial.pool", "spatial.out", "feed_forward", "feed_forward.norm"]
WATCHED += ["feed_forward.expand", "mixer.g.2"]


def doubled(made):
    return (2 * made[0], *made[1:]) if isinstance(made, tuple) else 2 * made


@torch.no_grad()
@pytest.mark.parametrize("name", WATCHED)
def test_a_layer_that_somebody_watches_or_writes_is_called(name):
    module, x, temb, _ = make("block_of_cfc", 2, 32, 40, 4, 4)
    before, layer = module(x, temb), module.block.get_submodule(name)

    def check():
        got = module(x, temb)
        assert not torch.allclose(got, before, rtol=1e-3)
        with literal():
            assert_close([got], [module(x, temb)])

    hook = layer.register_forward_hook(lambda layer, given, made: doubled(made))
    check()
    hook.remove()
    assert torch.equal(module(x, temb), before)
    layer.forward = lambda *given, **options: doubled(type(layer).forward(layer, *given, **options))
    check()
    del layer.forward
    known, own = (
        type(layer),
        {"forward": lambda self, *given, **options: doubled(known.forward(self, *given, **options))},
    )
    if name not in ("norm", "spatial", "spatial.norm", "feed_forward", "feed_forward.norm", "mixer.g"):
        layer.__class__ = type("Own", (known,), own)  # as an adapter that keeps the weight
        check()


@pytest.mark.parametrize("name", ["norm.modulation", "spatial.scales.0", "spatial.pool", "mixer.context", "mixer.f"])
@pytest.mark.parametrize("kept", ["weight", "bias"])
def test_layers_that_hold_their_weights_otherwise(name, kept):
    module, x, temb, _ = make("block_of_cfc", 2, 32, 40, 4, 4)
    layer = module.block.get_submodule(name)
    with torch.no_grad():
        before = module(x, temb)
        nn.utils.parametrize.register_parametrization(layer, kept, nn.Identity())
        torch.testing.assert_close(module(x, temb), before)
        nn.utils.parametrize.remove_parametrizations(layer, kept)
    nn.utils.prune.identity(layer, kept)
    for _ in range(2):  # what a pruned layer computes with is made anew each time, with a graph of its own
        got = module(x, temb)
        torch.testing.assert_close(got, before)
        got.sum().backward()
    getattr(layer, f"{kept}_orig").data.mul_(2)
    got = module(x, temb)
    assert not torch.allclose(got, before)
    with literal():
        assert_close([got], [module(x, temb)])


@torch.no_grad()
def test_a_trace_records_what_is_computed():
    net = LiquidDiffusionUNet(Model("test", [32, 40], [1, 1]), in_channels=1, resolution=8)
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    args = torch.randn(2, 1, 8, 8), torch.rand(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and tells of every `if`
        traced = torch.jit.trace(net, args, check_trace=False)
        torch.testing.assert_close(traced(*args), net(*args), rtol=1e-4, atol=1e-5)


def test_a_block_of_the_users_own_is_given_what_blocks_are_given():
    class Own(nn.Module):
        def forward(self, x, temb, t):
            return 2 * x

    net = LiquidDiffusionUNet(Model("test", [32, 40], [2, 1]), in_channels=1, resolution=8)
    args = torch.randn(2, 1, 8, 8), torch.rand(2)
    with torch.no_grad():
        net.head[-1].weight.fill_(0.1)
        before = net(*args)
        net.encoder[0][1].register_forward_pre_hook(lambda block, given: None)
        torch.testing.assert_close(net(*args), before)  # that block makes its own rows
        net.encoder[0][0] = Own()
        assert not torch.allclose(net(*args), before)


def test_a_compiled_network_is_one_graph():
    net = LiquidDiffusionUNet(Model("test", [32, 40], [1, 1]), in_channels=1, resolution=8)
    args = torch.randn(2, 1, 8, 8), torch.rand(2)
    with torch.no_grad():
        net.head[-1].weight.fill_(0.1)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args), net(*args))


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
    assert y.grad_fn.name() == "_BlockBackward"
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
            rows = parts.rows(temb, [layers])[0]
            found.append([*rows, *torch.autograd.grad(rows, [temb, *layers.parameters()], grads)])
    finally:
        torch.set_num_threads(before)
    if COMPILER:
        assert rows[0].grad_fn.name() == "_RowsBackward"
    for other in found[1:]:
        assert_equal(other, found[0])
    with torch.no_grad():
        assert_equal(parts.rows(temb, [layers])[0], rows)
    temb = temb.detach().double().requires_grad_()
    rows = [layer(nn.functional.silu(temb)) for layer in layers.double()]
    exact = torch.autograd.grad(rows, [temb, *layers.parameters()], [g.double() for g in grads])
    assert_close(found[0], [*rows, *exact])


@needs_compiler
def test_groups_of_rows_are_calls_of_their_own_to_the_bit():
    torch.manual_seed(0)
    groups, temb = (
        [[nn.Linear(32, n) for n in part] for part in ([64, 8, 40], [16, 24], [48], [8, 8])],
        torch.randn(7, 32),
    )

    def gradient(rows_of):
        leaf = temb.clone().requires_grad_()
        torch.autograd.backward([row.square().sum() for row in rows_of(leaf)])
        return leaf.grad

    at_once = gradient(lambda leaf: [row for rows in parts.rows(leaf, [*groups[:1], [], *groups[1:]]) for row in rows])
    assert torch.equal(
        at_once, gradient(lambda leaf: [row for group in groups for row in parts.rows(leaf, [group])[0]])
    )


def test_a_row_that_nothing_depends_on_and_one_of_another_width():
    layers, temb = [nn.Linear(32, 40), nn.Linear(32, 64)], torch.randn(3, 32, requires_grad=True)
    parts.rows(temb, [layers])[0][0].sum().backward()
    assert layers[0].weight.grad.abs().max() > 0
    assert layers[1].weight.grad is None or not layers[1].weight.grad.any()
    with pytest.raises(RuntimeError):
        parts.rows(temb, [[nn.Linear(31, 40)]])
    layers[0].bias = nn.Parameter(torch.ones(1))
    exact = layers[0](nn.functional.silu(temb))
    torch.testing.assert_close(parts.rows(temb, [layers])[0][0], exact)

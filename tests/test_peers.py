"""The peers of diffusers: their budgets, their start, and that they are what diffusers says they are."""

import sys

import pytest
import torch
from conftest import awake

from experiments import compose
from liquiddiff import budget, loop, peers
from liquiddiff.config import SIZES, BadInput, Model
from liquiddiff.seeding import initialise

diffusers = pytest.importorskip("diffusers")

PEERS = ("ddpm_unet", "dit")
SHAPES = {size: [(3, 32, 32), (3, 64, 64)] for size in SIZES} | {"nano": [(1, 8, 8)], "large": [(3, 64, 64)]}


def net_of(network, seed=0):
    net = budget.build(Model("nano", [16, 32], [1, 1], network=network), (1, 8, 8))
    initialise(net, seed)
    return net


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("network", PEERS)
def test_parameters_are_the_baseline_s_within_5_percent(network, size):
    for shape in SHAPES[size]:
        model = Model(size, **SIZES[size], network=network)
        with torch.device("meta"):
            mine = budget.parameters(budget.build(model, shape))
            theirs = budget.parameters(budget.build(budget.baseline(model), shape))
        assert mine == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("network", PEERS)
def test_initial_weights_hang_on_the_seed_alone(network):
    torch.manual_seed(5)
    one = net_of(network)
    torch.manual_seed(6)
    two, three = net_of(network), net_of(network, seed=1)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), three.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim > 1:  # biases and gains may start at constants
            assert not torch.equal(a, c) or not a.any(), name
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))
    assert not one(torch.randn(2, 1, 8, 8), torch.rand(2)).any(), "the untrained network predicts v = 0"


@torch.no_grad()
@pytest.mark.parametrize("network", PEERS)
def test_samples_do_not_see_their_batch(network):
    net = awake(net_of(network)).train()  # also in training mode: no dropout of labels or weights
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5)
    whole = net(x, t)
    torch.testing.assert_close(whole[2:3], net(x[2:3], t[2:3]), rtol=1e-4, atol=1e-5)
    assert torch.equal(whole, net(x, t))
    assert whole.std() > 0.01


@torch.no_grad()
def test_the_unet_is_diffusers_own():
    mine = awake(net_of("ddpm_unet")).eval()
    theirs = diffusers.UNet2DModel.from_config(dict(mine.net.config)).eval()
    theirs.load_state_dict(mine.net.state_dict())
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.37, 1.0])
    torch.testing.assert_close(mine(x, t), theirs(x, torch.tensor([0.0, 370.0, 1000.0])).sample)


@torch.no_grad()
def test_the_dit_is_diffusers_own():
    mine = awake(net_of("dit")).eval()
    theirs = diffusers.DiTTransformer2DModel.from_config(dict(mine.net.config)).eval()
    tables = {name: w.repeat(2, 1) for name, w in mine.net.state_dict().items() if "embedding_table" in name}
    theirs.load_state_dict(mine.net.state_dict() | tables)  # theirs has a row for a label that is dropped
    embedders = [name for name, _ in mine.named_parameters() if ".emb." in name]
    assert embedders and all("blocks.0." in name for name in embedders), "one for all blocks"
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.37, 1.0])
    label = torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(mine(x, t), theirs(x, torch.tensor([0.0, 370.0, 1000.0]), label).sample)


@pytest.mark.parametrize("network", PEERS)
def test_a_peer_trains_is_published_and_comes_back(network, small, tmp_path):
    overrides = [*small, f"model.network={network}", "optim.images=64"]
    run = compose.as_run(compose.one(overrides))
    fitted, _ = loop.train(run)
    start = dict(loop.prepare(run, torch.device("cpu")).model.named_parameters())
    moved = [name for name, p in fitted.model.named_parameters() if not torch.equal(p, start[name])]
    assert fitted.images == 64 and moved
    kind = {"ddpm_unet": peers.DDPMUNet, "dit": peers.DiT}[network]
    back = kind.from_pretrained(tmp_path / "runs" / run.name / "model").eval()
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    with torch.no_grad():
        torch.testing.assert_close(back(x, t), fitted.ema.net(x, t))  # channels-last there, not here


@pytest.mark.parametrize("network", PEERS)
def test_checkpointing_changes_memory_and_nothing_else(network):
    x, t, grads = torch.randn(2, 1, 8, 8), torch.rand(2), []
    for checkpointing in (False, True):
        net = awake(net_of(network)).train()
        net.checkpointing = checkpointing
        assert net.checkpointing == checkpointing
        net(x, t).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", PEERS)
def test_a_side_that_does_not_fit_is_told(network):
    with pytest.raises(ValueError, match="image size 7x7 must be divisible by 2"):
        net_of(network)(torch.randn(1, 1, 7, 7), torch.rand(1))


def test_dit_takes_larger_patches_of_larger_images():
    with torch.device("meta"):
        net = budget.build(Model("tiny", **SIZES["tiny"], network="dit"), (3, 256, 256))
    assert net.net.config.patch_size == 8


def test_a_missing_package_and_an_unknown_network_say_so(monkeypatch):
    with pytest.raises(BadInput, match="unknown network 'ditt'. Did you mean dit"):
        budget.build(Model(network="ditt"), (1, 8, 8))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match=r"pip install 'liquiddiff\[peers\]'"):
        peers.DiT(4, 8)

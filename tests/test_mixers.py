"""Mixers: each against a reference from outside, none sees another sample, all cost what the baseline costs."""

import math
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from liquiddiff import budget, layers, mixers, scans, selective_scan
from liquiddiff.config import SIZES, BadInput, Mixer, Model
from liquiddiff.mixers import MIXERS, Slot
from liquiddiff.seeding import initialise

SLOT = Slot(dim=16, hidden=20, time_dim=8, resolution=8)
SHAPES = {"nano": (1, 8, 8), "tiny": (3, 32, 32), "small": (3, 32, 32), "base": (3, 32, 32), "large": (3, 64, 64)}
ARMS = {name: Mixer(name) for name in MIXERS} | {"cfc_ncp": Mixer(wiring="ncp")}


def mixer_of(arm, slot=SLOT, seed=0):
    config = ARMS[arm] if isinstance(arm, str) else arm
    mixer = MIXERS[config.name](slot, config)
    initialise(mixer, seed)
    return mixer


def inputs(batch=3, H=8, W=8, slot=SLOT, seed=0):
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, slot.dim, H, W, generator=noise).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(batch, slot.time_dim, generator=noise), torch.rand(batch, generator=noise)


def model_of(size, mixer):
    return Model(size, **SIZES[size], mixer=mixer)


# --- every mixer


@torch.no_grad()
@pytest.mark.parametrize("arm", ARMS)
def test_samples_do_not_see_their_batch(arm):
    mixer, (x, temb, t) = mixer_of(arm), inputs()
    # ode: its steps are the batch's, and its result the batch's within the solver's tolerance (see ODE)
    close = {"rtol": 1e-3, "atol": 3e-4} if arm == "ode" else {"rtol": 1e-5, "atol": 1e-6}
    alone = mixer(x[1:2], temb[1:2], t[1:2])
    torch.testing.assert_close(mixer(x, temb, t)[1:2], alone, **close)
    others = [z.index_fill(0, torch.tensor([0, 2]), fill) for z, fill in ((x, 5.0), (temb, 3.0), (t, 1.0))]
    torch.testing.assert_close(mixer(*others)[1:2], alone, **close)


@torch.no_grad()
@pytest.mark.parametrize("arm", ARMS)
def test_one_noise_level_may_serve_all_images(arm):
    mixer, (x, temb, t) = mixer_of(arm), inputs()
    want = mixer(x, temb[:1].repeat(3, 1), t[:1].repeat(3))
    torch.testing.assert_close(mixer(x, temb[:1], t[:1]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_finite_with_gradients_at_both_ends_of_t_and_any_shape(arm):
    mixer, (x, temb, _) = mixer_of(arm), inputs(2, H=6, W=10)
    y = mixer(x.requires_grad_(), temb, torch.tensor([0.0, 1.0]))
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert all(torch.isfinite(z).all() for z in (y, x.grad))
    for name, p in mixer.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


@torch.no_grad()
@pytest.mark.parametrize("arm", ARMS)
def test_bf16_autocast_is_near_float32(arm):
    mixer, args = mixer_of(arm), inputs(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(*args)
    exact = mixer(*args)
    assert (y.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("arm", ARMS)
def test_shared_tensors_start_equal_in_every_arm(arm):
    def start(mixer):
        net = budget.build(Model("test", [8, 16], [1, 1], mixer=mixer), (1, 8, 8))
        initialise(net, 0)
        return {k: v for k, v in [*net.named_parameters(), *net.named_buffers()] if ".mixer." not in k}

    base, mine = start(Mixer()), start(ARMS[arm])
    assert list(base) == list(mine)
    assert all(torch.equal(base[name], mine[name]) for name in base)


@pytest.mark.parametrize("arm", ARMS)
def test_start_depends_on_the_seed_alone(arm):
    torch.manual_seed(1)
    one = mixer_of(arm)
    torch.manual_seed(2)
    two = mixer_of(arm)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# --- equal budgets


@cache
def baseline_cost(size):
    return budget.meta_cost(model_of(size, Mixer()), SHAPES[size])


def total(size, mixer):
    """The network's cost as the baseline's with its mixers exchanged: fast enough for every mixer and size."""
    model, resolution = model_of(size, mixer), SHAPES[size][1]
    params, macs, last = baseline_cost(size).params, baseline_cost(size).macs, len(model.channels) - 1
    for i, (C, hidden) in enumerate(zip(model.channels, budget.hidden_widths(model, resolution), strict=True)):
        slot = Slot(C, hidden, model.channels[0], resolution // 2**i)
        mine, theirs = budget.mixer_cost(mixer, slot), budget.mixer_cost(Mixer(), slot._replace(hidden=C))
        blocks = 2 * model.blocks[i] + 2 * (i == last)
        params += blocks * (mine.params - theirs.params)
        macs += blocks * (mine.macs - theirs.macs)
    return budget.Cost(params, macs)


@pytest.mark.parametrize("arm", ARMS)
def test_total_is_the_whole_network_s_cost(arm):
    assert total("nano", ARMS[arm]) == budget.meta_cost(model_of("nano", ARMS[arm]), SHAPES["nano"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("match", ["params", "macs", "both"])
def test_budgets_match_within_2_percent(size, match):
    # attention at match=macs is the second of its two rows. cfc_ncp has half of the weights in dense products, so its
    # parameters and multiply-adds cannot match together, as attention's cannot.
    base = baseline_cost(size)
    for arm in ["conv", "conv_gated"] if match == "both" else [a for a in ARMS if a not in ("cfc", "identity")]:
        mine = total(size, replace(ARMS[arm], match=match))
        if match != "macs":
            assert mine.params == pytest.approx(base.params, rel=0.02), arm
        if match != "params":
            assert mine.macs == pytest.approx(base.macs, rel=0.02), arm


def test_the_mixer_that_the_readme_adds(monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names = dict(vars(mixers))
    exec(re.search(r"```python\n(class Shift.*?)\nMIXERS = ", text, re.DOTALL)[1], names)
    monkeypatch.setitem(MIXERS, "shift", names["Shift"])
    model = model_of("nano", Mixer("shift"))
    assert budget.meta_cost(model, SHAPES["nano"]).params == pytest.approx(baseline_cost("nano").params, rel=0.02)
    mixer, (x, temb, t) = mixer_of(Mixer("shift")), inputs()
    lone = torch.zeros_like(x)
    lone[:, :, 2, 5] = x[:, :, 2, 5]
    moved = (mixer(lone, temb, t) - mixer(torch.zeros_like(x), temb, t)).abs().sum(1) > 1e-6
    assert moved.nonzero().tolist() == [[b, 2, 6] for b in range(3)]


def test_identity_keeps_its_width_and_what_cannot_match_says_so():
    slot = Slot(64, 64, 64, 256)
    assert budget.solve_hidden(Mixer("identity"), slot) == 64
    with pytest.raises(BadInput, match="attention cannot match the baseline's macs at 256x256"):
        budget.solve_hidden(Mixer("attention", match="macs"), slot)
    with pytest.raises(BadInput, match="unknown wiring 'npc'"):
        mixer_of(Mixer(wiring="npc"))


@pytest.mark.parametrize("arm", ["attention", "linear_attention", "ssm", "mamba", "ltc"])
def test_meta_device_counts_what_a_real_one_does(arm):
    mixer, (x, temb, t) = mixer_of(arm), inputs(1)
    M, C, N = SLOT.hidden, SLOT.dim, 64
    by_hand = {
        "attention": 4 * C * M * N + 2 * M * N * N,
        "linear_attention": 4 * C * M * N + 2 * M * M * N + M * N,
        "ltc": N * (49 * C + 3 * C * M + 6 * M * M),
        # 1x1 products; two FFTs of length 2N at 1.25 n log2 n; a complex product a frequency
        "ssm": 2 * C * M * N + round(M * (2.5 * 2 * N * math.log2(2 * N) + 4 * (N + 1))),
        # 1x1 products, DW3x3, selection, dt, readout, scan
        "mamba": N * (3 * C * M + 9 * M + M * 4 * (1 + 16) + 4 * M + 4 * M * 8 + 4 * M * 25),
    }
    assert budget._macs(mixer, x, temb, t) == by_hand[arm]
    assert budget.mixer_cost(ARMS[arm], SLOT).macs == by_hand[arm]


# --- attention-free


class Trace(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def attention_like(mixer):
    net = budget.build(model_of("nano", mixer), SHAPES["nano"])
    with Trace() as trace, torch.no_grad():
        net(torch.randn(2, 1, 8, 8), torch.rand(2))
    words = ("attention", "softmax", "aten.bmm", "aten.baddbmm")
    return {name for name in trace.names if any(word in name for word in words)}


def test_the_liquid_network_is_attention_free():
    assert attention_like(Mixer()) == set()
    assert attention_like(Mixer("attention"))
    assert attention_like(Mixer("linear_attention"))


# --- CfC


def published_cell(cfc, C, M):
    """The same weights in ncps, its backbone's part for the previous state at zero."""
    from ncps.torch import CfCCell

    cell = CfCCell(C, C, backbone_activation="silu", backbone_units=M)
    for theirs, ours in ((cell.backbone[0], cfc.backbone), (cell.ff1, cfc.h[0]), (cell.ff2, cfc.g[0])):
        theirs.weight.zero_()
        theirs.weight[:, : ours.weight.shape[1]] = ours.weight
        theirs.bias.copy_(ours.bias)
    return cell


@torch.no_grad()
@pytest.mark.parametrize("gate", ["time", "literal"])
def test_cfc_is_the_published_cell(gate):
    C, M = SLOT.dim, SLOT.hidden
    cfc = mixer_of(Mixer(gate=gate, head_conv=False, head_tanh=True))
    cfc.context.weight.zero_()[:, :, 3, 3] = 1
    cfc.context.bias.zero_()
    cell = published_cell(cfc, C, M)
    sign, b = (1, 0.7) if gate == "time" else (-1, 0.0)
    cell.time_a.weight.copy_(sign * cfc.f.weight)
    cell.time_a.bias.copy_(sign * cfc.f.bias)
    cell.time_b.weight.zero_()
    cell.time_b.bias.fill_(-b)
    x, temb, t = inputs()
    for i in range(len(t)):  # one at a time: ncps broadcasts times over the wrong axis
        if gate == "time":  # a = t and -b for every temb: the published gate sigma(t f - b)
            for layer, value in ((cfc.time_a, t[i]), (cfc.time_b, b)):
                layer.weight.zero_()
                layer.bias.fill_(value)
        y = cfc(x[i : i + 1], temb[i : i + 1], t[i : i + 1])
        for row in range(0, 8, 3):
            theirs, _ = cell(x[i, :, row].T, torch.zeros(8, C), t[i])  # a row of pixels as a batch
            torch.testing.assert_close(y[0, :, row].T, theirs, rtol=0, atol=1e-5)


def test_ncp_wiring_is_sparse_fixed_and_counted():
    net = budget.build(model_of("nano", ARMS["cfc_ncp"]), SHAPES["nano"])
    sparse = [m for m in net.modules() if isinstance(m, layers.SparsePointwise)]
    assert len(sparse) == 4 * 10
    torch.nn.init.normal_(net.head[2].weight)
    net(torch.randn(2, 1, 8, 8), torch.rand(2)).square().sum().backward()
    for m in sparse:
        assert m.mask.sum() == m.weight.numel() - m.masked
        assert m.mask.mean() == pytest.approx(0.5, abs=0.02)
        assert not m.weight.grad[m.mask == 0].any()  # no synapse, no gradient
        assert m.mask.sum(1).min() > 0  # no dead unit
    live = sum(p.numel() for p in net.parameters()) - sum(int((m.mask == 0).sum()) for m in sparse)
    assert budget.parameters(net) == live == budget.meta_cost(model_of("nano", ARMS["cfc_ncp"]), SHAPES["nano"]).params
    assert all(torch.equal(a, b) for a, b in zip(layers.wiring(16, 20), layers.wiring.__wrapped__(16, 20), strict=True))


# --- attention


def test_attention_is_torch_s():
    slot = SLOT._replace(dim=64, hidden=64)
    mixer, (x, temb, t) = mixer_of("attention", slot), inputs(2, 4, 6, slot)
    theirs = torch.nn.MultiheadAttention(64, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(mixer.qkv.weight)
        theirs.in_proj_bias.copy_(mixer.qkv.bias)
        theirs.out_proj.load_state_dict(mixer.contract.state_dict())
    tokens = (x + layers.positions(64, 4, 6, x)).flatten(2).transpose(1, 2)
    expected = theirs(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(mixer(x, temb, t), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("arm", ["attention", "linear_attention"])
def test_attention_with_uneven_heads_is_the_literal_sum(arm):
    mixer = mixer_of(arm, SLOT._replace(hidden=50)).double()  # two heads
    mixer.heads = 3  # of 17, 17 and 16
    q, k, v = torch.randn(3, 2, 12, 50, dtype=torch.float64)
    expected = []
    for q_h, k_h, v_h in zip(q.split(17, -1), k.split(17, -1), v.split(17, -1), strict=True):
        if arm == "attention":
            w = torch.exp(q_h @ k_h.transpose(1, 2) / 17**0.5)
        else:
            w = (F.elu(q_h) + 1) @ (F.elu(k_h) + 1).transpose(1, 2)
        expected.append(w / w.sum(-1, keepdim=True) @ v_h)
    torch.testing.assert_close(mixer.attend(q, k, v), torch.cat(expected, -1))


@torch.no_grad()
def test_attention_knows_place():
    for arm in ("attention", "linear_attention"):
        mixer, (x, temb, t) = mixer_of(arm), inputs(1)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        shuffled = x.flatten(2)[:, :, order].unflatten(2, (8, 8))
        assert not torch.allclose(mixer(shuffled, temb, t).flatten(2), mixer(x, temb, t).flatten(2)[:, :, order])
    places = layers.positions(16, 8, 8, x).flatten(1).T
    assert torch.cdist(places, places).fill_diagonal_(9).min() > 0.1


def test_attention_low_is_where_the_level_is_small():
    kinds = [type(mixer_of("attention_low", SLOT._replace(resolution=r))).__name__ for r in (8, 16, 32)]
    assert kinds == ["Attention", "Attention", "Conv"]


# --- the liquid ODE


def liquid_problem(arm):
    cell = mixer_of(arm, SLOT, seed=3).double()
    with torch.no_grad():
        cell.recur.weight.mul_(3)  # more strongly coupled than an untrained one
    x, drive = torch.randn(2, 3, SLOT.hidden, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return cell, x, 2 * drive, torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)[:, None, None, None]


def fine(cell, x, drive, elapsed, steps=400):
    """Classical Runge-Kutta of Eq. 1, written out beside the cell's own."""
    tau, f_of = F.softplus(cell.log_tau)[:, None, None], cell.recur.weight

    def field(x):
        f = torch.sigmoid(drive + torch.einsum("oi,bihw->bohw", f_of, x))
        return -(1 / tau + f) * x + f * cell.A[:, None, None]

    h = elapsed / steps
    for _ in range(steps):
        a = field(x)
        b = field(x + h / 2 * a)
        c = field(x + h / 2 * b)
        x = x + h / 6 * (a + 2 * b + 2 * c + field(x + h * c))
    return x


@torch.no_grad()
def test_ltc_solver_converges_to_the_ode_at_first_order():
    cell, *problem = liquid_problem("ltc")
    exact, unfolds, errors = fine(cell, *problem), [6, 12, 24, 48, 96], []
    for cell.unfolds in unfolds:
        errors.append((cell.solve(*problem) - exact).abs().max().item())
    slope = np.polyfit(np.log(unfolds), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)
    assert errors[0] < 0.15  # of a state of order 2
    torch.testing.assert_close(cell.solve(*problem)[0], problem[0][0], rtol=0, atol=0)  # t = 0: as it began


def test_ode_is_the_ode_and_so_are_its_gradients():
    cell, x, drive, elapsed = liquid_problem("ode")
    y, exact = cell.solve(x, drive, elapsed), fine(cell, x, drive, elapsed, 50)
    torch.testing.assert_close(y, exact, rtol=0, atol=3e-4)
    assert cell.evaluations < 40
    mine, theirs = (torch.autograd.grad(z.sum(), [cell.A, cell.recur.weight, cell.log_tau]) for z in (y, exact))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_missing_peer_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(BadInput, match=r"torchdiffeq: pip install 'liquiddiff\[peers\]'"):
        mixer_of("ode")(*inputs())


# --- state spaces


@torch.no_grad()
@pytest.mark.parametrize("L", [1, 7, 30])
def test_ssm_convolution_is_its_recurrence(L):
    mixer = mixer_of("ssm").double()
    u = torch.randn(2, L, SLOT.hidden, dtype=torch.float64)
    A, dt, c = torch.complex(-mixer.log_decay.exp(), mixer.frequency), mixer.log_dt.exp()[:, None], mixer.c
    expected = mixer.d * u
    for direction in (0, 1):
        order = range(L) if direction == 0 else reversed(range(L))
        h = torch.zeros(2, *A.shape, dtype=torch.complex128)
        for step in order:
            h = torch.exp(dt * A) * h + (torch.exp(dt * A) - 1) / A * u[:, step, :, None]
            expected[:, step] += 2 * (torch.view_as_complex(c[direction]) * h).sum(-1).real
    torch.testing.assert_close(mixer.convolve(u), expected)


def selective_inputs(L, seed=0, sizes=(2, 4, 0, 3, 5)):
    noise = torch.Generator().manual_seed(seed)
    B, K, _, M, N = sizes
    u, dt = torch.randn(2, B, K, L, M, dtype=torch.float64, generator=noise)
    b, c = torch.randn(2, B, K, L, N, dtype=torch.float64, generator=noise)
    A, D = torch.rand(K, M, N, dtype=torch.float64, generator=noise), torch.ones(K, M, dtype=torch.float64)
    return [z.requires_grad_() for z in (u, F.softplus(dt), -5 * A, b, c, D)]


def stepwise(u, dt, A, B, C, D):
    h, ys = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for step in range(u.shape[2]):
        h = torch.exp(dt[:, :, step, :, None] * A) * h + (dt * u)[:, :, step, :, None] * B[:, :, step, None]
        ys.append(torch.einsum("bkmn,bkn->bkm", h, C[:, :, step]) + D * u[:, :, step])
    return torch.stack(ys, 2)


@pytest.mark.parametrize("L", [1, 7, 36])
@pytest.mark.parametrize("chunks", [False, True])
def test_selective_scan_is_its_recurrence_with_gradients(L, chunks, monkeypatch):
    if chunks:  # what a GPU does
        monkeypatch.setattr(selective_scan, "stepwise", lambda h: False)
    args = selective_inputs(L)
    y, expected = selective_scan.selective_scan(*args), stepwise(*args)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad((z * weights).sum(), args) for z in (y, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(2, 4, 64, 37, 8), (1, 2, 1, 16, 8), (3, 1, 9, 3, 5)], ids=str)
def test_the_compiled_scan_is_the_plain_one(shape):
    """By the same bound as every fast path: 1e-5 of float64, outputs and gradients; the same bits on any threads."""
    exact = selective_inputs(shape[2], sizes=shape)
    args = [z.detach().float().requires_grad_() for z in exact]
    if shutil.which("cc"):
        assert selective_scan.selective_scan(*args).grad_fn.name() == "_ScanBackward"
    weights = torch.randn(shape[:4], dtype=torch.float64)

    def results(scan, args):
        y = scan(*args)
        return [y, *torch.autograd.grad((y * weights.to(y.dtype)).sum(), args)]

    mine = results(selective_scan.selective_scan, args)
    for a, b in zip(mine, results(selective_scan.plain_scan, exact), strict=True):
        assert a.shape == b.shape and (a.double() - b).abs().max() <= 1e-5 * b.abs().max()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, mine, results(selective_scan.selective_scan, args)))
    finally:
        torch.set_num_threads(before)
    with pytest.raises(RuntimeError):  # torch's complaint, not memory past the end
        selective_scan.selective_scan(*args[:5], args[5][:, : shape[3] - 1])
    strided = [z.transpose(-1, -2).contiguous().transpose(-1, -2) for z in args]
    assert torch.equal(mine[0], selective_scan.selective_scan(*strided))


def test_the_plain_scan_in_slices_is_the_same(monkeypatch):
    args = selective_inputs(9)
    whole = selective_scan.plain_scan(*args)
    monkeypatch.setattr(selective_scan, "SLICE", 1)
    torch.testing.assert_close(selective_scan.plain_scan(*args), whole, rtol=0, atol=0)


def test_the_lean_scan_is_the_same_and_keeps_its_inputs_alone(monkeypatch):
    args = [z.requires_grad_() for z in selective_inputs(9)]
    monkeypatch.setattr(selective_scan, "LEAN_SLICE", 1)
    results = []
    for lean in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda z, kept=kept: (kept.append(z), z)[1], lambda z: z):
            y = selective_scan.plain_scan(*args, lean=lean)
        results.append([y, *torch.autograd.grad(y.square().sum(), args)])
        states = [z for z in kept if z.dim() == 5]
        assert bool(states) is not lean
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_scan_is_the_same_by_torch_func():
    u, dt, A, B, C, D = (z.detach().requires_grad_() for z in selective_inputs(9))
    one = lambda u, dt, B, C: selective_scan.selective_scan(u[None], dt[None], A, B[None], C[None], D)[0]  # noqa: E731
    y = selective_scan.selective_scan(u, dt, A, B, C, D)
    torch.testing.assert_close(torch.func.vmap(one)(u, dt, B, C), y)
    loss = lambda A: selective_scan.selective_scan(u, dt, A, B, C, D).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(A), *torch.autograd.grad(loss(A), A))


def test_mamba_scans_all_four_ways():
    image = torch.arange(6.0).reshape(1, 1, 2, 3)
    ways = [scans.along(k, image).flatten().tolist() for k in range(4)]
    assert ways == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]]
    assert all(torch.equal(scans.back(k, scans.along(k, image), 2, 3), image) for k in range(4))
    # so every position sees every other
    mixer, x = mixer_of("mamba"), inputs(1, 4, 6)[0].requires_grad_()
    mixer(x, None, None)[0, :, 1, 2].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all()

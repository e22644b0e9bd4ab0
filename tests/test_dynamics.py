"""What dynamics.csv says is what the network computes, and looking at it changes nothing."""

import pytest
import torch

from analysis import dynamics, dynamics_plots
from analysis.runs import from_folders
from experiments import compose
from liquiddiff import budget, reflow
from liquiddiff.config import BadInput, Mixer, Model
from liquiddiff.depthwise import literal
from liquiddiff.loop import train
from liquiddiff.mixers import CfC, Slot
from liquiddiff.seeding import initialise
from liquiddiff.trainer import RectifiedFlowTrainer

SMALL = {"channels": [8, 16], "blocks": [1, 2]}


def network(relaxation="liquid", **mixer):
    net = budget.build(Model(relaxation=relaxation, mixer=Mixer(**{"match": "none", **mixer}), **SMALL), (1, 8, 8))
    initialise(net, 0)
    with torch.no_grad():  # the head starts at zero, and nothing would reach the blocks
        net.head[2].weight.normal_(generator=torch.Generator().manual_seed(0))
    return net


def batch(count=3, channels=1):
    stream = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, 8, 8, generator=stream), torch.randn(count, channels, 8, 8, generator=stream)


@pytest.mark.parametrize("gate", ["time", "literal", "static"])
@torch.no_grad()
def test_the_gate_that_is_read_is_the_gate_that_blends(gate):
    cfc = CfC(Slot(16, 20, 8, 8), Mixer(gate=gate))
    initialise(cfc, 0)
    x = batch(channels=16)[0].contiguous(memory_format=torch.channels_last)
    temb, t = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0.1, 0.5, 1.0])
    s = dynamics.gate_of(cfc, x, temb, t)
    assert s.std() > 0.01
    z = torch.nn.functional.silu(cfc.backbone(cfc.context(x)))
    blend = s * cfc.g(z) + (1 - s) * cfc.h(z)
    torch.testing.assert_close(blend, cfc(x, temb, t))  # fused
    with literal():
        torch.testing.assert_close(blend, cfc(x, temb, t))


def test_mixers_without_a_gate_have_none():
    for mixer in ({"name": "conv"}, {"gate": "fixed"}):
        rows = dynamics.gates_and_alphas(network(**mixer), *batch(), 0.5)
        assert all("gate_mean" not in row and "alpha_mean" in row for row in rows.values())


def test_looking_changes_nothing():
    net, (x, noise) = network(), batch()
    before = net(x, torch.full((3,), 0.5))
    dynamics.gates_and_alphas(net, x, noise, 0.5)
    assert torch.equal(net(x, torch.full((3,), 0.5)), before)
    assert not any(module._forward_hooks for module in net.modules())


def test_blocks_come_in_the_order_of_the_computation():
    order = ["encoder.0.0", "encoder.1.0", "encoder.1.1", "middle.0", "middle.1"]
    assert list(dynamics.blocks(network())) == [*order, "decoder.1.0", "decoder.1.1", "decoder.0.0"]
    assert dynamics_plots.place("decoder.1.0") == "decoder, level 1, block 0"


def test_limits_of_the_laws():
    """sigma(-f t) is 1/2 at t = 0 whatever f; alpha is 1 at t = 0, and with rho = 0 it is 1/2 at t = 1."""
    net, (x, noise) = network(gate="literal"), batch()
    for row in dynamics.gates_and_alphas(net, x, noise, 0.0).values():
        assert row["gate_far"] == row["gate_sd"] == row["gate_low"] == row["gate_high"] == 0
        assert row["alpha_min"] == 1
    for row in dynamics.gates_and_alphas(net, x, noise, 1.0).values():
        assert row["gate_far"] > 0
        assert row["alpha_min"] == row["alpha_max"] == 0.5
    assert all("alpha_mean" not in row for row in dynamics.gates_and_alphas(network("none"), x, noise, 1.0).values())


def test_a_saturated_gate_is_told_from_an_open_one():
    assert dynamics.gate_values(torch.full((2, 3, 4, 4), 0.99)) == pytest.approx(
        {"gate_mean": 0.99, "gate_sd": 0, "gate_low": 0, "gate_high": 1, "gate_far": 0.49, "gate_places": 0}, abs=1e-6
    )
    half = torch.full((2, 3, 4, 4), 0.5)
    half[:, :, 0] = 0.01  # a quarter of the positions
    values = dynamics.gate_values(half)
    assert values["gate_low"] == 0.25
    assert values["gate_places"] > 0.2


def test_no_gradient_reaches_a_relaxed_mixer_at_t_0():
    x, noise = batch()
    relaxed, plain = (
        dynamics.gradients(RectifiedFlowTrainer(network(law)), x, noise, 0.0) for law in ("liquid", "none")
    )
    assert all(row["gradient_mixer"] == 0 and row["gradient_rest"] > 0 for row in relaxed.values())
    assert all(row["gradient_mixer"] > 0 for row in plain.values())


def test_the_gradient_is_the_norm_for_one_image():
    (x, noise), trainer = batch(1), RectifiedFlowTrainer(network())
    row = dynamics.gradients(trainer, x, noise, 0.7)["middle.1"]
    net = trainer.model
    trainer.losses(net, x, noise, torch.full((1,), 0.7)).sum().backward()
    norm = torch.cat([p.grad.flatten() for p in net.middle[1].mixer.parameters()]).norm()
    assert row["gradient_mixer"] == pytest.approx(float(norm), rel=1e-4)
    assert all(p.grad is None for p in trainer.ema.net.parameters())


def test_a_run_is_measured_once_and_drawn_the_same_twice(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dynamics, "GRADIENTS", 1)
    monkeypatch.setattr(dynamics, "TIMES", (0.0, 0.05, 1.0))
    monkeypatch.setattr(reflow, "SAMPLES", 8)
    run = compose.as_run(compose.one([*small, "optim.images=64"]))
    train(run)
    (tmp_path / "runs" / run.name / "done").write_text("{}")
    path, found = tmp_path / "dynamics.csv", from_folders(tmp_path / "runs")
    dynamics.bring_up_to_date(path, found, tmp_path / "runs")
    assert "measuring" in capsys.readouterr().out
    first = path.read_bytes()
    dynamics.bring_up_to_date(path, found, tmp_path / "runs")
    assert (capsys.readouterr().out, path.read_bytes()) == ("", first)
    frame = dynamics.read(path)
    assert len(frame) == 3 * 6 + 1
    assert frame["signature"].eq(run.signature()).all()
    assert frame["gate_mean"].dropna().between(0.2, 0.8).all()
    assert frame["straightness"].notna().sum() == 1
    for text in (dynamics_plots.table(frame), dynamics_plots.markdown(frame)):
        assert "encoder, level 0, block 0" in text and f"straightness {frame['straightness'].max():.1f}"[:15] in text
    folder = tmp_path / "figures"
    assert len(dynamics_plots.stale(path, folder, "x")) == 4
    drawn = [svg.with_suffix(suffix) for svg in dynamics_plots.draw(path, folder, "x") for suffix in (".svg", ".png")]
    assert [svg.name for svg in drawn[::2]] == ["x-gate.svg", "x-alpha.svg", "x-gradient.svg", "x-straightness.svg"]
    images = [picture.read_bytes() for picture in drawn]
    dynamics_plots.draw(path, folder, "x")
    assert [picture.read_bytes() for picture in drawn] == images
    assert dynamics_plots.stale(path, folder, "x") == []
    frame.assign(images=1).to_csv(path, index=False)  # as if measured at another budget
    assert len(dynamics_plots.stale(path, folder, "x")) == 4
    frame.assign(images=1, seed=5).to_csv(path, index=False)
    dynamics.bring_up_to_date(path, found, tmp_path / "runs")
    assert set(dynamics.read(path)["seed"]) == {0}


def test_a_folder_that_cannot_be_measured_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="is not a run folder"):
        dynamics.measure(tmp_path)
    with pytest.raises(BadInput, match="is no folder"):
        dynamics.runs_of("claims", tmp_path / "absent")

"""A verdict follows from data: each rule says `holds` for data that bear a claim out, `does not hold` for others."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from analysis import claim_networks, claim_rules, claims, cli, stats
from analysis.claim_rules import RULES
from analysis.dynamics import COLUMNS
from analysis.evidence import FAILS, HOLDS, UNDECIDED, Evidence, Missing, all_worse, combine, none_better
from experiments.room import load_experiment

SAME = {
    "tier": "laptop",
    "data": "digits",
    "data_fingerprint": "f",
    "images": 1,
    "batch": 1,
    "n": 9,
    "reference": "f/9",
}
SAME |= {"extractor": "digits", "solver": "euler", "signature": "s", "commit": "c", "val_loss": 0.4}


def room(root, name, values, **more):
    """A results.csv in which arms have these values of every metric on seeds 0, 1, 2: {arm: value}, or {nfe: that}."""
    folder, arms, experiment = root / name, root / "arms", load_experiment(cli.ROOMS / name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text((cli.ROOMS / name / "experiment.yaml").read_text())
    arms.mkdir(exist_ok=True)
    for arm in experiment.arms:
        (arms / f"{arm}.yaml").touch()
    rows = [
        SAME | {"arm": arm, "seed": seed, "nfe": n, "fd": value + seed / 1000, "fd_pixel": value + seed / 1000} | more
        for n, of in (values if isinstance(next(iter(values)), int) else {experiment.nfe: values}).items()
        for arm, value in of.items()
        for seed in (0, 1, 2)
    ]
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    return Evidence(root)


def dynamics(root, **values):
    """A dynamics.csv of three blocks in which the baseline has these values at every t (gate_low: at t = 1 alone)."""
    rows = [
        dict.fromkeys(COLUMNS)
        | SAME
        | {"arm": "baseline", "seed": seed, "layer": layer, "t": t}
        | values
        | ({"gate_low": 0.0} if t < 1 else {})
        for seed in (0, 1)
        for layer in ("encoder.0.0", "middle.0", "decoder.0.0")
        for t in (0.0, 0.05, 1.0)
    ]
    (root / "claims").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows)[COLUMNS].to_csv(root / "claims" / "dynamics.csv", index=False)
    return Evidence(root)


def cost(root, name, rows):
    (root / "cost").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(root / "cost" / f"{name}.csv", index=False)
    return Evidence(root)


def memory(root, gb):
    """A memory.csv in which every size needs `gb` GB at batch 1, of which 1 GB is there at any batch."""
    rows = [
        {"size": size, "side": side, "batch": 8, "precision": precision, "checkpointing": again}
        | {
            key: 1e9 + n * 1e9 * (gb - 1) * (0.1 if again else 1)
            for key, n in (("peak_bytes_at_1", 1), ("peak_bytes", 8))
        }
        for size, side in [("tiny", 64), *claim_rules.RESOLUTION.items()]
        for precision in ("fp16", "fp32")
        for again in (False, True)
        if precision == "fp16" and side > 64 or again  # others must not be taken
    ]
    return cost(root, "memory", rows)


# {claim: (room, arms without the part)}
EARNS = {
    "multi_scale": ("spatial_mix", ["mix_7x7", "mix_3x3"]),
    "more_than_convolution": ("mixer", ["conv", "conv_gated"]),
    "time_is_the_gate": ("gate", ["static_gate"]),
    "gate_earns": ("gate", ["fixed_gate", "no_gate"]),
    "relaxation_adapts": ("relaxation", ["constant_relaxation"]),
    "relaxation_earns": ("relaxation", ["no_relaxation"]),
}
TIMES = ["logit_normal", "logit_normal_low", "u_shaped"]
NOT_NEEDED = {
    "attention_not_needed": ("mixer", ["attention_params", "attention_macs"]),
    "as_good_as_the_ode": ("mixer", ["ltc", "ode"]),
    "objective_suffices": ("objective", [*TIMES, "pseudo_huber", "predict_data", "predict_noise"]),
}


@pytest.mark.parametrize("claim", EARNS)
def test_a_part_earns_its_place_where_taking_it_out_is_worse(claim, tmp_path):
    name, arms = EARNS[claim]
    for shift, word in ((0.2, HOLDS), (0.0, FAILS), (-0.2, FAILS)):
        verdict = RULES[claim](room(tmp_path, name, {"baseline": 0.3, **{arm: 0.3 + shift for arm in arms}}))
        assert verdict.word == word
        assert arms[0] in verdict.numbers
    with pytest.raises(Missing, match=arms[0]):
        RULES[claim](room(tmp_path, name, {"baseline": 0.3}))


@pytest.mark.parametrize("claim", NOT_NEEDED)
def test_what_replaces_may_not_lose(claim, tmp_path):
    name, arms = NOT_NEEDED[claim]
    for shift, word in ((0.2, HOLDS), (0.0, HOLDS), (-0.2, FAILS)):
        values = {"baseline": 0.3} | {arm: 0.3 for arm in arms} | {arms[-1]: 0.3 + shift}
        assert RULES[claim](room(tmp_path, name, values)).word == word


@pytest.mark.parametrize(
    ("spread", "earns", "lost"),
    [
        # {arm: its differences on three seeds}, in margins of 0.1; an interval goes 2.5 SD to either side
        ({"a": [3, 3.1, 3.2], "b": [-1, 1, 3]}, UNDECIDED, UNDECIDED),  # worse; may be anything
        ({"a": [3, 3.1, 3.2], "b": [-0.1, 0, 0.1]}, FAILS, HOLDS),  # worse; equivalent
        ({"a": [-1, 1, 3], "b": [-3, -3.1, -3.2]}, FAILS, FAILS),  # anything; better
        ({"a": [3, 3.1, 3.2], "b": [0.3, 0.7, 1.1]}, UNDECIDED, HOLDS),  # undecided, but no better
        ({"a": [3, 3.1, 3.2], "b": [-1.1, -0.7, -0.3]}, FAILS, UNDECIDED),  # undecided, but no worse
    ],
)
def test_an_interval_that_ends_before_the_margin_decides_one_side(spread, earns, lost, monkeypatch):
    for sign in (1, -1):  # lower is better, or higher
        values = {"first": dict.fromkeys(range(3), 0.0)}
        values |= {arm: dict(enumerate(sign * 0.1 * x for x in each)) for arm, each in spread.items()}
        compared = stats.compare(values, "first", 0.1, sign > 0)
        monkeypatch.setattr(
            Evidence, "differences", lambda *_, of=compared: {"here": {a: (d, "fd") for a, d in of.items()}}
        )
        asked = SimpleNamespace(margin=0.1, lower_is_better=sign > 0)
        monkeypatch.setattr(Evidence, "rows", lambda *_, of=asked: {"here": (of, None)})
        evidence = Evidence(Path())
        assert (all_worse(evidence, "room", "a", "b").word, none_better(evidence, "room", "a", "b").word) == (
            earns,
            lost,
        )


def test_a_room_that_no_longer_lists_an_arm_lacks_it(tmp_path):
    evidence = room(tmp_path, "gate", {"baseline": 0.3, "fixed_gate": 0.3})
    yaml = tmp_path / "gate" / "experiment.yaml"
    yaml.write_text(yaml.read_text().replace("static_gate, ", ""))
    assert "static_gate" not in yaml.read_text()
    with pytest.raises(Missing, match="static_gate"):
        RULES["time_is_the_gate"](evidence)


def test_tiers_that_disagree_leave_a_claim_undecided():
    assert combine([HOLDS, UNDECIDED]) == HOLDS
    assert combine([HOLDS, FAILS]) == combine([UNDECIDED]) == combine([]) == UNDECIDED


OPEN = {"gate_mean": 0.5, "gate_far": 0.02, "gate_low": 0.0, "gate_high": 0.0, "gate_places": 0.2, "gate_sd": 0.1}
SHUT = OPEN | {"gate_far": 0.4, "gate_low": 0.3, "gate_high": 0.4, "gate_places": 0.01}


def test_a_gate_that_is_shut_at_every_t_does_not_saturate_with_the_noise(tmp_path):
    assert RULES["gate_saturates"](dynamics(tmp_path, **SHUT | {"gate_low": 0.0, "gate_high": 0.7})).word == FAILS


@pytest.mark.parametrize(
    ("claim", "holds", "fails"),
    [
        ("gate_half", OPEN, SHUT),
        ("gate_saturates", SHUT, OPEN),
        ("gate_places", OPEN, SHUT),
        ("alpha_noise", {"alpha_mean": 0.05, "alpha_min": 0.01}, {"alpha_mean": 0.5, "alpha_min": 0.4}),
        ("alpha_data", {"alpha_mean": 0.97}, {"alpha_mean": 0.5}),
    ],
)
def test_what_the_liquid_parts_do(claim, holds, fails, tmp_path):
    for values, word in ((holds, HOLDS), (fails, FAILS)):
        verdict = RULES[claim](dynamics(tmp_path, **values))
        assert verdict.word == word
        assert "2 seeds of baseline" in verdict.numbers
    with pytest.raises(Missing, match="dynamics"):
        RULES[claim](Evidence(tmp_path / "empty"))


def test_memory_is_that_of_the_claimed_resolution_in_fp16(tmp_path):
    assert RULES["memory"](memory(tmp_path, 3.9)).word == HOLDS
    assert RULES["memory"](memory(tmp_path, 4.1)).word == FAILS  # tiny's 4 GB
    assert "tiny 2.50 of 4 GB at batch 1, largest batch that fits: 2" in RULES["memory"](memory(tmp_path, 2.5)).numbers
    assert RULES["colab"](memory(tmp_path, 2.7)).word == HOLDS
    assert RULES["colab"](memory(tmp_path, 2.8)).word == FAILS
    with pytest.raises(Missing, match=r"memory\.csv"):
        RULES["memory"](Evidence(tmp_path / "empty"))


def test_ten_times_faster(tmp_path):
    def rows(ltc, ode, device="cpu"):
        rates = {"cfc": 100, "ltc": 100 / ltc, "ode": 100 / ode, "conv": 200}
        same = {"device": device, "size": "nano"}
        return [same | {"network": k, "sampling_images_per_second": rate} for k, rate in rates.items()]

    rule = RULES["ten_times_faster"]
    assert rule(cost(tmp_path, "results", rows(5.1, 30))).word == HOLDS
    assert rule(cost(tmp_path, "results", rows(2, 30))).word == FAILS
    assert rule(cost(tmp_path, "results", rows(2, 30) + rows(11, 30, "gpu"))).word == UNDECIDED
    with pytest.raises(Missing, match="ode"):
        rule(cost(tmp_path, "results", rows(2, 30)[:2]))


def test_steps(tmp_path):
    few = {n: {"euler_128": 0.3} for n in (12, 24, 48, 96, 128)}
    assert RULES["steps"](room(tmp_path, "sampling", few)).word == HOLDS
    assert RULES["steps"](room(tmp_path, "sampling", few | {48: {"euler_128": 0.6}})).word == FAILS
    # The baseline's own counts end at 32: 16 steps that suffice are an answer, 16 that do not say nothing of 25.
    (tmp_path / "sampling" / "results.csv").unlink()
    for value, word in ((0.31, HOLDS), (0.6, UNDECIDED)):
        counts = {16: {"baseline": value}, 32: {"baseline": 0.3}}
        assert RULES["steps"](room(tmp_path, "relaxation", counts)).word == word


def test_data_sets_are_counted_by_the_reference(tmp_path):
    with pytest.raises(Missing, match="afhq"):
        RULES["data_sets"](room(tmp_path, "size", {"baseline": 0.3}, data="celebahq", reference="f/30000"))
    for count, word in ((15_100, HOLDS), (15_803, FAILS)):
        evidence = room(tmp_path, "objective", {"baseline": 0.3}, data="afhq", reference=f"f/{count}")
        assert RULES["data_sets"](evidence).word == word


def test_counts_and_traces(monkeypatch):
    evidence = Evidence(cli.ROOMS)
    assert RULES["parameters"](evidence).word == RULES["no_attention"](evidence).word == HOLDS
    assert RULES["parallel"](evidence).word == HOLDS
    mixing, net = RULES["spatial_mixing"](evidence), evidence.networks["tiny"]
    assert mixing.word == FAILS and "mixer.context 7x7, mixer.g.0 3x3, mixer.h.0 3x3" in mixing.numbers
    assert RULES["depthwise_mixing"](evidence).word == HOLDS
    for block in [module for module in net.modules() if hasattr(module, "mixer")]:
        block.mixer = torch.nn.Conv2d(64, 64, 1, device="meta")
    assert RULES["spatial_mixing"](evidence).word == HOLDS
    net.encoder[0][0].mixer = torch.nn.Conv2d(64, 64, 7, device="meta")
    assert RULES["spatial_mixing"](evidence).word == RULES["depthwise_mixing"](evidence).word == FAILS
    monkeypatch.setitem(claim_networks.PARAMETERS, "base", 40e6)
    assert RULES["parameters"](evidence).word == FAILS
    monkeypatch.setattr(claim_networks, "operators", lambda mixer, side=16: ["aten.bmm"] * side)
    assert RULES["no_attention"](evidence).word == RULES["parallel"](evidence).word == FAILS


def test_the_closed_form_is_no_solution_but_an_exponential_is():
    assert RULES["closed_form"](Evidence(cli.ROOMS)).word == FAILS
    assert claim_networks.closed_form(Evidence(cli.ROOMS), lambda a: np.exp(-a)).word == HOLDS


def test_the_time_constant_is_the_odes(monkeypatch):
    from scipy import integrate

    verdict = RULES["time_constant"](Evidence(cli.ROOMS))
    assert verdict.word == HOLDS and "0.17 at f = 5" in verdict.numbers
    real = integrate.solve_ivp
    monkeypatch.setattr(integrate, "solve_ivp", lambda f, span, x, **k: real(f, (0, 1.1 * span[1]), x, **k))
    assert RULES["time_constant"](Evidence(cli.ROOMS)).word == FAILS


def test_novelty_is_not_for_experiments():
    with pytest.raises(Missing, match="literature"):
        RULES["novel"](Evidence(cli.ROOMS))


def test_every_claim_has_a_rule_and_the_committed_pages_say_what_the_data_say():
    assert set(yaml.safe_load((cli.ROOMS / "claims" / "claims.yaml").read_text())) == set(RULES)
    assert claims.main(["--check"]) == 0


def test_the_pages_are_written_where_they_belong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claim_rules, "RULES", {"alpha_data": RULES["alpha_data"], "novel": RULES["novel"]})
    root = tmp_path / "experiments"
    dynamics(root, alpha_mean=0.97)
    claim = {"claim": "A.", "test": "B.", "command": "c"}
    (root / "claims" / "claims.yaml").write_text(yaml.safe_dump({"alpha_data": claim, "novel": claim}, sort_keys=False))
    (tmp_path / "README.md").write_text(f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n")
    assert claims.main(["--check"], root) == 1
    assert claims.main([], root) == 0
    assert "HOLDS  A." in capsys.readouterr().out
    assert claims.main(["--check"], root) == 0
    text = (root / "claims" / "README.md").read_text()
    assert "## alpha_data: holds" in text
    assert "needs a search of the literature" in text
    main = (tmp_path / "README.md").read_text()
    assert main.startswith("before\n")
    assert main.endswith("after\n")
    assert "[A](experiments/claims/README.md#alpha_data-holds)" in main
    dynamics(root, alpha_mean=0.5)  # the data change, the pages have not
    assert claims.main(["--check"], root) == 1


def test_measurements_without_a_row_are_missing(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "dynamics.csv").write_text("tier,data,arm\n")
    with pytest.raises(Missing, match="rows of experiments/claims/dynamics.csv, which `python -m analysis.dynamics"):
        _ = Evidence(tmp_path).dynamics


def test_a_claim_without_a_rule_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "claims.yaml").write_text("alpha_dada: {claim: a, test: b, command: c}\n")
    with pytest.raises(claims.BadInput, match="Did you mean alpha_data"):
        claims.judge(tmp_path)

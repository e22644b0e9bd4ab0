"""Learning rates are chosen by one rule, from comparable trials, and every arm trains at the one that was chosen."""

from dataclasses import replace

import pandas as pd
import pytest

from analysis import learning_rates
from analysis.runs import Found
from experiments import compose
from experiments.room import ROOT, load_experiment
from liquiddiff.config import BadInput

FILES = sorted(ROOT.glob("*/learning_rates.csv"))


def found(run, val_loss):
    facts = {"val_loss": val_loss}
    return Found(run, run.signature(), run.signature(), facts, [{"nfe": 32, "fd": 2 * val_loss}], None)


def test_the_lowest_rate_is_chosen_of_those_that_tie_the_lowest_held_out_loss():
    place = {"tier": "laptop", "data": "digits", "seed": 0}
    losses = {"a": (0.5, 0.4, 0.6), "b": (0.3, 0.3 - 0.9 * learning_rates.TIE, 0.4), "c": (0.3, 0.2, 0.2)}
    losses["d"] = (0.3, 0.2)  # too few to choose from
    rows = [
        {**place, "arm": arm, "lr": lr, "val_loss": loss} for arm in losses for lr, loss in enumerate(losses[arm], 1)
    ]
    trials = learning_rates.choose(pd.DataFrame(rows[::-1]))
    assert trials[trials["chosen"]][["arm", "lr"]].values.tolist() == [["a", 2], ["b", 1], ["c", 2]]
    assert trials["lr"].tolist() == [*(3 * [1, 2, 3]), 1, 2]


def test_a_rate_has_the_mean_of_its_seeds_and_no_lucky_one_decides():
    place = {"tier": "laptop", "data": "digits", "arm": "a"}
    losses = {1: (0.425, 0.425), 2: (0.430, 0.4195), 3: (0.5, 0.5)}  # rate 2: a lucky seed, a mean that ties
    rows = [{**place, "seed": s, "lr": lr, "val_loss": x} for lr, each in losses.items() for s, x in enumerate(each)]
    trials = learning_rates.choose(pd.DataFrame(rows))
    assert trials[trials["chosen"]][["lr", "seed"]].values.tolist() == [[1, 0]]


def test_a_rate_that_alone_was_tried_again_is_compared_on_the_seeds_of_all():
    place = {"tier": "laptop", "data": "digits", "arm": "a"}
    losses = [(1, 0, 0.428), (2, 0, 0.425), (3, 0, 0.5), (2, 1, 0.440)]  # rate 2 again, on a seed that is hard for all
    rows = [{**place, "lr": lr, "seed": seed, "val_loss": loss} for lr, seed, loss in losses]
    trials = learning_rates.choose(pd.DataFrame(rows))
    assert set(trials[trials["chosen"]]["lr"]) == {2}
    apart = learning_rates.choose(pd.DataFrame([row | {"seed": k} for k, row in enumerate(rows[:3])]))
    assert set(apart[apart["chosen"]]["lr"]) == {2}  # no seed is that of all


def test_a_trial_differs_from_the_arm_in_its_rate_alone():
    today = compose.plan(["ablation=conv"])[1][0]
    other = replace(today, optim=replace(today.optim, lr=1e-5))
    assert learning_rates.trial(found(other, 0.4), today, 32) == {
        "tier": "laptop", "data": "digits", "arm": "conv", "lr": 1e-5, "seed": 0,
        "images": today.optim.images, "val_loss": 0.4, "fd": 0.8,
    }  # fmt: skip
    shorter = replace(other, optim=replace(other.optim, images=640))
    assert learning_rates.trial(found(shorter, 0.4), today, 32) is None


def test_a_grid_of_rates_is_one_command():
    runs = compose.plan(["ablation=baseline,conv", "optim.lr=2e-3,4e-3", "seed=0"])[1]
    assert [(run.arm, run.optim.lr) for run in runs] == [
        ("baseline", 2e-3), ("baseline", 4e-3), ("conv", 2e-3), ("conv", 4e-3),
    ]  # fmt: skip
    assert len({run.name for run in runs}) == 4


@pytest.mark.parametrize(("wrong", "said"), [("out=/nowhere", "out=/nowhere is no folder"), ("seed=a", "whole number")])
def test_bad_input_is_one_line(wrong, said):
    with pytest.raises(BadInput, match=said):
        learning_rates.main([wrong])


def test_a_seed_given_twice_is_one_run():
    assert [run.seed for run in compose.plan(["seed=0,00,1"])[1]] == [0, 1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_arm_trains_at_its_chosen_rate(path):
    trials = pd.read_csv(path)
    assert learning_rates.choose(trials.drop(columns="chosen"))["chosen"].tolist() == trials["chosen"].tolist()
    for (tier, data, arm), rows in trials.groupby(["tier", "data", "arm"]):
        if (
            path.is_symlink() and arm not in load_experiment(path.parent).arms
        ):  # another room's file, for some of its arms
            continue
        command = [f"experiment={path.parent.name}", f"ablation={arm}", f"tier={tier}", f"data={data}"]
        if len(rows) < learning_rates.LEAST:
            assert not rows["chosen"].any()
            continue
        chosen = rows[rows["chosen"]]["lr"].item()
        assert {run.optim.lr for run in compose.plan(command)[1]} == {chosen}
        assert {run.optim.lr for run in compose.plan([*command, "optim.lr=1e-5"])[1]} == {1e-5}  # what is given wins
        tiers = compose.plan(command[2:])[1][0].optim.lr
        assert compose.plan(command[1:])[1][0].optim.lr == tiers
        wider = f"model.channels={[c + 8 for c in compose.plan(command)[1][0].model.channels]}"
        for other in ("optim.images=5000", "optim.batch=32", wider):  # it was not chosen for these
            assert {run.optim.lr for run in compose.plan([*command, other])[1]} == {tiers}

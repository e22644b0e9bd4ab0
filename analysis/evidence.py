"""What verdicts on claims rest on: committed data, networks on the meta device, and what several rules share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import stats, tables
from analysis.render import difference, label
from liquiddiff.config import SIZES, BadInput, Mixer, Model

if TYPE_CHECKING:
    from torch import nn

    from experiments.room import Experiment

HOLDS, FAILS, UNDECIDED, UNTESTED = WORDS = "holds", "does not hold", "undecided", "not tested here"
NAMED_SIZES = ("tiny", "small", "base", "large")


class Missing(Exception):
    """Says what a verdict still needs."""


@dataclass(frozen=True)
class Verdict:
    """One of WORDS, and the numbers behind it."""

    word: str
    numbers: str


class Evidence:
    """The committed data under the folder of the rooms, each read when it is first asked for."""

    def __init__(self, root: Path):
        self.root = root

    def rows(self, room: str) -> "dict[str, tuple[Experiment, pd.DataFrame]]":
        """{tier, data set and budget: (the experiment as that tier has it, its rows)}. Raises Missing without any."""
        from analysis import cli

        experiment = cli.rooms(room, self.root)[0]
        try:
            frame = tables.load(self.root / room)
        except BadInput as error:
            raise Missing(f"results of the room {room}") from error
        groups = sorted(frame.groupby(["tier", "data"]), key=lambda item: (tables.rank(str(item[0][0])), item[0]))
        return {
            f"{tier} tier, {data}, {rows['images'].max():,.0f} images": (experiment.at(str(tier)), rows)
            for (tier, data), rows in groups
        }

    def differences(self, room: str, *arms: str) -> "dict[str, dict[str, tuple[stats.Difference, str]]]":
        """{tier, data set and budget: {arm: (its difference from the first, the metric's name)}}, as the tables say.

        Raises Missing unless some tier has all of `arms` (none: all that the room lists) on a seed of the first arm.
        """
        places = {}
        for place, (experiment, rows) in self.rows(room).items():
            mine = rows["arm"].isin(experiment.arms) & rows["seed"].isin(experiment.seeds)
            used = rows[mine & (rows["nfe"] == experiment.nfe)]
            stats.check_protocol(
                ({str(k): v for k, v in r.items()} for r in used.to_dict("records")), experiment.varies
            )
            values = tables.values_of(used, experiment, experiment.metric)
            compared = stats.compare(values, experiment.arms[0], experiment.margin, experiment.lower_is_better)
            wanted = arms or tuple(compared)
            if all(arm in compared and compared[arm].n for arm in wanted):
                name = label(experiment.metric, str(used["extractor"].iloc[0]))
                places[place] = {arm: (compared[arm], name) for arm in wanted}
        if not places:
            raise Missing(f"runs of {', '.join(arms) or 'all arms'} and of the first arm in the room {room}")
        return places

    def table(self, path: str, command: str) -> pd.DataFrame:
        """A committed CSV. Raises Missing where it is not there."""
        if not (self.root / path).exists():
            raise Missing(f"experiments/{path}, which {command} makes")
        frame = pd.read_csv(self.root / path)
        if frame.empty:
            raise Missing(f"rows of experiments/{path}, which {command} makes")
        return frame

    @property
    def dynamics(self) -> pd.DataFrame:
        """What the liquid parts do, the first tier and data set."""
        frame = self.table("claims/dynamics.csv", "`python -m analysis.dynamics out=runs`")
        return frame[(frame[["tier", "data"]] == frame.iloc[0][["tier", "data"]]).all(axis=1)]

    @cached_property
    def networks(self) -> "dict[str, nn.Module]":
        """The four sizes, on the meta device: they have shapes and no memory."""
        return {size: network(Model(size, **SIZES[size])) for size in NAMED_SIZES}


def network(model: Model) -> "nn.Module":
    """A network without memory, its mixers as wide as `expansion` says."""
    import torch

    from liquiddiff.unet import LiquidDiffusionUNet

    with torch.device("meta"):
        return LiquidDiffusionUNet(model)


def small(mixer: str) -> "nn.Module":
    """Two levels of one block each, with every kind of layer that the sizes have."""
    return network(Model(channels=[32, 64], blocks=[1, 1], mixer=Mixer(mixer, match="none")))


@cache
def operators(mixer: str, side: int = 16) -> list[str]:
    """The name of every operator of a forward pass of `small(mixer)`, in order."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    net = small(mixer)
    with torch.no_grad(), torch.device("meta"), Trace():
        net(torch.empty(2, 3, side, side), torch.empty(2))
    return names


# --- what several rules share ----------------------------------------------------------------------------------------


def combine(words: Iterable[str]) -> str:
    """One verdict of several tiers: what those that decide agree on."""
    decided = {word for word in words if word in (HOLDS, FAILS)}
    return decided.pop() if len(decided) == 1 else UNDECIDED


Rule = Callable[[list[tuple[str, bool]]], str]


def by_arms(evidence: Evidence, room: str, arms: tuple[str, ...], worse: bool, rule: Rule) -> Verdict:
    """What `rule` says of the arms' verdicts against the room's first arm.

    It takes beside each whether the arm is shown not to be `worse`, or else better, by the margin: its interval ends
    before.
    """
    words, texts = [], []
    for place, compared in evidence.differences(room, *arms).items():
        experiment = evidence.rows(room)[place][0]
        sign = 1 if worse == experiment.lower_is_better else -1
        ends = [max(sign * d.low, sign * d.high) for d, _ in compared.values()]  # nan below two seeds
        found = [d.verdict for d, _ in compared.values()]
        words.append(rule([(word, end < experiment.margin) for word, end in zip(found, ends, strict=True)]))
        metric = next(name for _, name in compared.values())
        each = [f"{a} {d.verdict} {difference(d.mean, d.low, d.high, d.n)} ({d.n})" for a, (d, _) in compared.items()]
        texts.append(f"{place}, {metric} against the first arm [95 % CI] (seeds): {'; '.join(each)}")
    return Verdict(combine(words), ". ".join(texts))


def all_worse(evidence: Evidence, room: str, *arms: str) -> Verdict:
    """The part earns its place: every arm without it is worse. It fails where one is not worse by the margin."""

    def rule(found: list[tuple[str, bool]]) -> str:
        if any(is_not for _, is_not in found):
            return FAILS
        return HOLDS if all(word == "worse" for word, _ in found) else UNDECIDED

    return by_arms(evidence, room, arms, True, rule)


def none_better(evidence: Evidence, room: str, *arms: str) -> Verdict:
    """Nothing is lost: no arm is better, and of every one it is shown that it is not, by more than the margin."""

    def rule(found: list[tuple[str, bool]]) -> str:
        if any(word == "better" for word, _ in found):
            return FAILS
        return HOLDS if all(is_not for _, is_not in found) else UNDECIDED

    return by_arms(evidence, room, arms, False, rule)


def of_blocks(evidence: Evidence, arm: str, column: str, t: float | None = None) -> pd.Series:
    """A column of dynamics.csv by block, the mean over seeds, at t (none: the least over t). Raises Missing."""
    frame = evidence.dynamics
    rows = frame[(frame["arm"] == arm) & frame[column].notna() & (frame["t"] == t if t is not None else True)]
    if rows.empty:
        raise Missing(f"the arm {arm} in experiments/claims/dynamics.csv: `python -m analysis.dynamics out=runs`")
    means = rows.groupby(["layer", "t"], sort=False)[column].mean()
    return means.groupby("layer", sort=False).min()


def seeds(evidence: Evidence, arm: str) -> str:
    """How many runs of an arm were looked into."""
    frame = evidence.dynamics[evidence.dynamics["arm"] == arm]
    first = frame.iloc[0]
    place = f"{first['tier']} tier, {first['data']}, {first['images']:,} images"
    return f"{frame['seed'].nunique()} seeds of {arm}, {place}"


def span(values: pd.Series) -> str:
    """Least to greatest block."""
    return f"{values.min():.3f} to {values.max():.3f}"

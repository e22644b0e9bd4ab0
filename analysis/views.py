"""What the figures of a room show: its committed files, read, checked and grouped; analysis/figures.py draws them."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import curves, render, stats, tables

if TYPE_CHECKING:
    from experiments.room import Experiment

Series = dict[str, dict[int, dict[float, float]]]  # {arm: {seed: {x: y}}}
COSTS = {"params": "parameters", "macs": "multiply-adds an image and evaluation"}
MATCHED = 1.03  # a cost that differs by less from arm to arm is no axis to plot against


@dataclass
class View:
    """What one tier and data set of a room shows."""

    experiment: "Experiment"
    rows: pd.DataFrame  # results.csv, of the experiment's arms and seeds
    floor: pd.Series | None  # real images against others
    curves: pd.DataFrame  # curves.csv, of the runs in `rows`
    strips: dict[str, Path]  # by arm, of the runs in `rows`
    title: str
    slug: str  # of its files
    source: str  # a hash of the files that all this is from

    @property
    def arms(self) -> list[str]:
        """Those with results, in the room's order."""
        return [arm for arm in self.experiment.arms if arm in set(self.rows["arm"])]

    @property
    def label(self) -> str:
        """The primary metric by its full name."""
        return render.label(self.experiment.metric, "/".join(sorted(self.rows["extractor"].unique())))

    def at_nfe(self) -> pd.DataFrame:
        """The rows that the room's verdicts are made of."""
        return self.rows[self.rows["nfe"] == self.experiment.nfe]

    def values(self) -> tables.Values:
        """{arm: {seed: primary metric}}."""
        return tables.values_of(self.at_nfe(), self.experiment, self.experiment.metric)


def views_of(folder: Path, experiment: "Experiment") -> list[View]:
    """A room's views, one for each table of it. Raises BadInput for rows that cannot be compared, or where none are."""
    frame, committed = tables.load(folder), [folder / "experiment.yaml", folder / "results.csv", folder / "curves.csv"]
    points = pd.read_csv(folder / "curves.csv", dtype={"signature": str}) if committed[-1].exists() else pd.DataFrame()
    strips = sorted((folder / "samples").glob("*.png"))
    source = hashlib.sha256(b"".join(path.read_bytes() for path in [*committed, *strips] if path.exists())).hexdigest()
    views = []
    for title, slug, each, rows in tables.groups_of(frame, experiment):
        mine = rows["arm"].isin(each.arms) & rows["seed"].isin(each.seeds)
        floor, rows = tables.floor_of(rows, rows[mine]), rows[mine]
        stats.check_protocol(
            ({str(k): v for k, v in row.items()} for row in rows[rows["nfe"] == each.nfe].to_dict("records")),
            each.varies,
        )
        runs, tier, data = set(zip(rows["arm"], rows["signature"], strict=True)), *(rows[["tier", "data"]].iloc[0])
        curve = points
        if len(points):
            known = np.array([pair in runs for pair in zip(points["arm"], points["signature"], strict=True)])
            curve = points[known & (points["tier"] == tier) & (points["data"] == data)]
        own = {arm: folder / "samples" / f"{tier}-{data}-{arm}.png" for arm in each.arms}
        own = {arm: p for arm, p in own.items() if p.exists() and (arm, curves.facts_of(p)["signature"]) in runs}
        first = floor.iloc[0] if len(floor) else None
        views.append(View(each, rows, first, curve, own, title, slug, source[:16]))
    return views


def series(frame: pd.DataFrame, x: str, y: str) -> Series:
    """{arm: {seed: {x: y}}} of the finite values."""
    found: Series = {}
    for arm, seed, at, value in zip(frame["arm"], frame["seed"], frame[x], frame[y], strict=True):
        if math.isfinite(at) and math.isfinite(value):
            found.setdefault(arm, {}).setdefault(int(seed), {})[float(at)] = float(value)
    return found


def against(of: Series, first: str, ratio: bool) -> Series:
    """Each seed's curve over (or minus) the first arm's of the same seed, where both have the point."""
    base = of.get(first, {})
    return {
        arm: {
            seed: {x: y / base[seed][x] if ratio else y - base[seed][x] for x, y in curve.items() if x in base[seed]}
            for seed, curve in seeds.items()
            if seed in base
        }
        for arm, seeds in of.items()
    }


def costs(view: View) -> dict[str, pd.Series]:
    """{axis: {arm: cost}} of the costs that differ between arms."""
    rows = view.at_nfe()
    found = {name: rows.groupby("arm")[key].median() for key, name in COSTS.items()}
    if len(speed := tables.pace(rows)):
        found[f"training ms an image ({rows['device'].mode()[0]})"] = 1000 / speed
    found = {name: cost.dropna() for name, cost in found.items()}
    return {name: cost for name, cost in found.items() if len(cost) > 1 and cost.max() > MATCHED * cost.min()}


def pareto(points: dict[str, tuple[float, float]], lower_is_better: bool = True) -> list[tuple[float, float]]:
    """The points (cost, metric) that no other both undercuts and beats, by rising cost."""
    sign = 1 if lower_is_better else -1
    front: list[tuple[float, float]] = []
    for cost, metric in sorted(points.values(), key=lambda point: (point[0], sign * point[1])):
        if not front or sign * metric < sign * front[-1][1]:
            front.append((cost, metric))
    return front

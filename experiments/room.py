"""A room: one question, with its arms, seeds, metric and margin, fixed in experiment.yaml before anything runs.

This file imports neither torch nor pandas: the launcher and every table read it first.
"""

import csv
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from liquiddiff.config import BadInput, choose

ROOT = Path(__file__).resolve().parent
METRICS = ("fd", "fd_pixel", "kid", "precision", "recall", "val_loss")
PER_TIER = ("seeds", "metric", "nfe", "margin", "lower_is_better", "overrides", "varies")


@dataclass
class Experiment:
    """What experiment.yaml says, and the name of its folder."""

    name: str
    question: str
    expectation: str  # written before running
    arms: list[str]  # of any room; the first is the one that the others are compared with
    seeds: list[int]
    metric: str  # the primary one, a column of results.csv
    nfe: int  # at which it is read
    margin: float  # differences smaller than this do not matter; in units of the metric
    lower_is_better: bool = True
    overrides: list[str] = field(default_factory=list)  # key=value, for all its runs
    varies: list[str] = field(default_factory=list)  # protocol columns that are the question, e.g. solver
    tiers: dict[str, dict[str, Any]] = field(default_factory=dict)  # {hour: {metric: fd, margin: 0.5}}: see `at`
    rates: dict[tuple[str, str, str], float] = field(default_factory=dict)  # not of experiment.yaml: `chosen_rates`

    def at(self, tier: str) -> "Experiment":
        """The experiment as `tier` has it: larger data may need another metric, margin or fewer seeds."""
        return replace(self, **self.tiers.get(tier, {}))


def rooms(root: Path = ROOT) -> dict[str, Path]:
    """Every room's folder, by name."""
    return {path.parent.name: path.parent for path in sorted(root.glob("*/experiment.yaml"))}


def arm_files(root: Path = ROOT) -> dict[str, Path]:
    """Every arm's file, by name. The baseline has none: it is config.yaml itself. Raises BadInput for a name twice."""
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*/*.yaml")):
        if path.parent.name not in ("tiers", "claims") and path.name != "experiment.yaml":
            if path.stem in found:
                raise BadInput(f"two arms are named {path.stem}: {found[path.stem]} and {path}; rename one")
            found[path.stem] = path
    return found


def select(name: str, root: Path = ROOT) -> list[Experiment]:
    """The experiment `name`, or every one for `all`. Raises BadInput for a name that is no room's."""
    found = rooms(root)
    names = list(found) if name == "all" else [choose("experiment", name, found)]
    return [load_experiment(found[each]) for each in names]


def load_experiment(folder: Path) -> Experiment:
    """Read a room's experiment.yaml. Raises BadInput, in one line, for what cannot be run or compared."""
    path = folder / "experiment.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadInput(f"{folder} is no room: it has no readable experiment.yaml") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} must be a list of key: value lines")
    keys = {f.name: f for f in fields(Experiment) if f.name not in ("name", "rates")}
    for key in values:
        choose(f"key in {path}", key, keys)
    for key, spec in keys.items():
        if key not in values and spec.default is MISSING and spec.default_factory is MISSING:
            raise BadInput(f"{path} lacks {key}:")
    experiment = Experiment(name=folder.name, rates=chosen_rates(folder), **values)
    tiers = experiment.tiers
    if not isinstance(tiers, dict) or not all(isinstance(changes, dict) for changes in tiers.values()):
        raise BadInput(f"{path}: tiers must look like {{hour: {{metric: fd, margin: 0.5}}}}")
    for tier, changes in tiers.items():
        for key in changes:
            choose(f"key for tier {tier} in {path}", key, PER_TIER)
    for tier in ["", *tiers]:
        _check(experiment.at(tier), path)
    known = ["baseline", *arm_files(folder.parent)]
    for arm in experiment.arms:
        choose(f"arm in {path}", arm, known)
    return experiment


def chosen_rates(folder: Path) -> dict[tuple[str, str, str], float]:
    """{(tier, data set, arm): learning rate} that the room's learning_rates.csv chose (analysis/learning_rates.py)."""
    path = folder / "learning_rates.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        chosen = [row for row in csv.DictReader(file) if row["chosen"] == "True"]
    return {(row["tier"], row["data"], row["arm"]): float(row["lr"]) for row in chosen}


def pace(root: Path = ROOT) -> dict[tuple[str, str], dict[tuple[str, int], float]]:
    """{(tier, data set): {(arm, multiply-adds): seconds an image}}, as the rows of every room's results.csv had it."""
    seen: dict[tuple[str, str], dict[tuple[str, int], list[float]]] = {}
    for path in sorted(root.glob("*/results.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row.get("seconds") and row.get("macs"):
                    arms = seen.setdefault((row["tier"], row["data"]), {})
                    seconds = float(row["seconds"]) / int(row["images"])
                    arms.setdefault((row["arm"], int(row["macs"])), []).append(seconds)
    return {key: {arm: median(found) for arm, found in arms.items()} for key, arms in seen.items()}


def _check(experiment: Experiment, path: Path) -> None:
    for key in ("arms", "seeds", "overrides", "varies"):
        kind = int if key == "seeds" else str
        value = getattr(experiment, key)
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise BadInput(f"{path}: {key} must be a list of {'whole numbers' if kind is int else 'names'}")
        if len(set(value)) < len(value) or (key in ("arms", "seeds") and not value):
            raise BadInput(f"{path}: {key} must {'not repeat itself' if value else 'not be empty'}")
    for key in ("question", "expectation"):
        if not isinstance(getattr(experiment, key), str) or not getattr(experiment, key).strip():
            raise BadInput(f"{path}: {key} must be a sentence")
    for key in ("nfe", "margin"):
        value = getattr(experiment, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise BadInput(f"{path}: {key} must be a number, not {value!r} (YAML wants 1.0e-3, not 1e-3)")
    if not isinstance(experiment.lower_is_better, bool):
        raise BadInput(f"{path}: lower_is_better must be true or false")
    choose(f"metric in {path}", experiment.metric, METRICS)

"""From runs to evidence: write each room's results.csv, one row a run and NFE, and the floor as arm `real`; and, for
the figures, curves.csv and samples/ (analysis/curves.py).

    python -m analysis.collect [experiment=ROOM|all] [out=DIR] [tracking_uri=URI]

Reads the run folders under out= (default runs/), which hold everything; with tracking_uri= that server's runs, and the
folders besides where out= is given too.
A run belongs to a room if the room lists its arm and seed and its configuration is the one that the arm has today, at
the run's tier and data set: a run with another learning rate is another experiment. Rows of runs that are no longer
here are kept, so several machines can add to one file, unless they are of another budget than the runs that are: these
are what the room is now. A second collection changes nothing.
--benchmark times 10,000 runs in MLflow.
"""

import csv
import io
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import cli, curves
from analysis.runs import SCORES, Found, from_folders, from_mlflow
from liquiddiff.config import BadInput
from liquiddiff.record import write_atomic

if TYPE_CHECKING:
    from experiments.room import Experiment
    from liquiddiff.config import Run

COLUMNS = [
    *"arm seed tier data data_fingerprint signature commit device dtype images batch n reference extractor".split(),
    *("weights", "solver", "nfe", "ema", *SCORES, "loss", "val_loss"),
    *"params macs images_per_second peak_mib seconds lr".split(),
]
WHOLE = frozenset("seed images batch n nfe ema params macs".split())
Row = dict[str, str]
Today = Callable[["Experiment", str, str, str], "Run | None"]  # of (experiment, arm, tier, data set)


def composed(experiment: "Experiment", arm: str, tier: str, data: str) -> "Run | None":
    """An arm as it is today in `experiment`; None where that tier and data set are not the room's.

    Arrows run experiments -> analysis, so this is imported by the command alone, when it runs: only composing says
    whether a run is the room's, or a learning-rate trial of the same arm in the same folder.
    """
    from experiments import compose

    room = experiment.at(tier)
    name = data.removeprefix("folder-").replace("'", "\\'")  # as Hydra reads it within quotes
    path = [f"data.path='/{name}'"] if data.startswith("folder-") else []
    free = [f"tier={tier}", f"data={'folder' if path else data}", *path]
    fixed = {override.split("=")[0] for override in room.overrides}
    arguments = [*(o for o in free if o.split("=")[0] not in fixed), f"ablation={arm}"]
    try:
        return compose.as_run(compose.of_room(room, arguments))
    except BadInput:
        return None


def belonging(found: Iterable[Found], experiment: "Experiment", today: Today) -> tuple[list[Found], list[str]]:
    """The room's runs, the newest of each (tier, data, arm, seed), and the names of those that only look like it."""

    @cache
    def signature(*key: str) -> str | None:
        run = today(experiment, *key)
        return run.signature() if run else None

    chosen: dict[tuple[str, str, str, int], Found] = {}
    others = []
    for each in found:
        run = each.run
        if run.arm not in experiment.arms or run.seed not in experiment.at(run.tier).seeds:
            continue
        if each.today != signature(run.arm, run.tier, run.data.name):
            others.append(each.name)
            continue
        key = (run.tier, run.data.name, run.arm, run.seed)
        if key not in chosen or (each.started, each.name) > (chosen[key].started, chosen[key].name):
            chosen[key] = each
    return list(chosen.values()), others


def outdated(old: list[Row], runs: list[Found], experiment: "Experiment", today: Today) -> list[Row]:
    """Rows that no table may hold beside `runs`: of an arm as it was before, or of another budget in their place."""
    places = {(each.run.tier, each.run.data.name) for each in runs}
    ran: dict[tuple[str, ...], set[str]] = defaultdict(set)  # signatures of today's arms, also by the code of their day
    for each in runs:
        ran[each.run.arm, each.run.tier, each.run.data.name] |= {each.today, each.signature}

    @cache
    def now(*key: str) -> tuple[str, ...] | None:
        run = today(experiment, *key)
        return (str(run.optim.images), str(run.optim.batch)) if run else None

    def replaced(row: Row) -> bool:
        key = (row["arm"], row["tier"], row["data"])
        if row["arm"] not in experiment.arms or key[1:] not in places or not (is_now := now(*key)):
            return False
        return is_now != (row["images"], row["batch"]) or (key in ran and row["signature"] not in ran[key])

    return [row for row in old if replaced(row)]


def rows_of(found: Found) -> list[Row]:
    """A run's rows: one for each NFE, and its floor."""
    run, facts = found.run, found.facts
    place = {"tier": run.tier, "data": run.data.name, "data_fingerprint": facts.get("data_fingerprint")}
    same = {
        **{key: facts.get(key) for key in COLUMNS if key in facts and key not in SCORES},
        **place,
        "dtype": facts.get("precision"),  # of the arithmetic; the column of that name is a score
        "arm": run.arm,
        "seed": run.seed,
        "signature": found.signature,
        "images": run.optim.images,
        "batch": run.optim.batch,
        "ema": run.optim.ema,
        "lr": run.optim.lr,
    }
    rows = [same | {key: each.get(key) for key in COLUMNS if key in each} for each in found.evaluations]
    if found.floor and found.evaluations:
        reference = f"{facts.get('data_fingerprint')}/{int(found.floor['reference_n'])}"
        scores = {key: found.floor.get(key) for key in ("n", *SCORES)}
        first = found.evaluations[0]
        floor = {**place, "arm": "real", "reference": reference} | {k: first.get(k) for k in ("extractor", "weights")}
        rows.append(floor | scores)
    return [{column: text(column, row.get(column)) for column in COLUMNS} for row in rows]


def text(column: str, value: Any) -> str:
    """A value as results.csv has it: numbers with six significant digits, "" for what is missing."""
    if value is None or value == "":
        return ""
    if isinstance(value, str) and column not in WHOLE and column not in NUMBERS:
        return " ".join(value.split())
    number = float(value)
    if not math.isfinite(number):
        return ""
    return str(int(number)) if column in WHOLE and number == int(number) else f"{number:.6g}"


NUMBERS = frozenset(COLUMNS[COLUMNS.index("fd") :])


def merge(old: Iterable[Row], new: Iterable[Row], experiment: "Experiment") -> list[Row]:
    """Old rows, those of the runs in `new` replaced, in one order."""

    def run_of(row: Row) -> tuple[str, ...]:
        floor = (row["extractor"], row["n"], row["data_fingerprint"]) if row["arm"] == "real" else ()
        return (row["tier"], row["data"], row["arm"], row["seed"], *floor)

    def order(row: Row) -> tuple[Any, ...]:
        arms = [*experiment.arms, row["arm"]] if row["arm"] != "real" else [*experiment.arms, "", "real"]
        tiers = ["laptop", "hour", "paper", row["tier"]]
        numbers = (int(row["seed"] or 0), float(row["nfe"] or 0))
        return (tiers.index(row["tier"]), row["data"], arms.index(row["arm"]), row["arm"], *numbers, *row.values())

    runs: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in old:
        runs[run_of(row)].append(row)
    fresh: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in new:
        if row not in (rows := fresh[run_of(row)]) and not (row["arm"] == "real" and rows):
            rows.append(row)
    return sorted((row for rows in (runs | fresh).values() for row in rows), key=order)


def retrained(old: Iterable[Row], new: Iterable[Row]) -> list[str]:
    """Runs whose rows another commit's take the place of. Where those of other arms stay, the code differs as well."""

    def commits(rows: Iterable[Row]) -> dict[tuple[str, ...], str]:
        return {
            (row["tier"], row["data"], row["arm"], row["seed"]): row["commit"] for row in rows if row["arm"] != "real"
        }

    before, after = commits(old), commits(new)
    changed = [key for key in after if key in before and before[key] != after[key]]
    return [f"{key[2]} (seed {key[3]}, {before[key][:7]} -> {after[key][:7]})" for key in changed]


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """The rows of a results.csv as they stand there; none where there is no file. Raises BadInput for other columns."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if strange := sorted(set(reader.fieldnames or ()) - set(columns)):
            raise BadInput(f"{path} has columns that this version does not know: {', '.join(strange)}")
        rows = [{column: row.get(column) or "" for column in columns} for row in reader]
    if any(not (row["arm"] and row["tier"] and row["data"]) for row in rows):  # as of a merge that was left half-way
        raise BadInput(f"{path} has rows without an arm, a tier or a data set: mend it by hand")
    return rows


def write(path: Path, rows: list[Row], columns: Sequence[str] = COLUMNS) -> bool:
    """Write results.csv, by atomic replace; False where it says so already."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if path.exists() and path.read_text() == buffer.getvalue():
        return False
    write_atomic(path, buffer.getvalue())
    return True


def collect(found: list[Found], experiment: "Experiment", folder: Path, today: Today = composed) -> None:
    """Bring one room's results.csv, curves.csv and samples/ up to date; say in a few lines what happened."""
    runs, others = belonging(found, experiment, today)
    path = folder / "results.csv"
    old = read(path)
    if gone := outdated(old, runs, experiment, today):
        before = ", ".join(sorted({f"{row['arm']} {row['signature']}, {row['images']} images" for row in gone}))
        print(f"{experiment.name}: {len(gone)} rows of arms as they were before make place for today's: {before}")
        old = [row for row in old if row not in gone]
    new = [row for each in sorted(runs, key=lambda each: each.name) for row in rows_of(each)]
    rows = merge(old, new, experiment)
    if again := retrained(old, new):
        print(f"{experiment.name}: {len(again)} runs take the place of runs by other code: {', '.join(again)}")
    if others:
        print(f"{experiment.name}: left out {len(others)} runs with another configuration, as {others[0]}")
    if not rows:
        print(f"{experiment.name}: no finished run yet: python experiments/run.py experiment={experiment.name}")
        return
    signatures: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in rows:
        signatures[row["tier"], row["data"], row["arm"]].add(row["signature"])
    mixed = [f"{key[2]} ({', '.join(sorted(names))})" for key, names in signatures.items() if len(names) > 1]
    if mixed:
        print(f"{experiment.name}: seeds of one arm ran under several signatures: {'; '.join(mixed)}")
    changed = bool(runs) and write(path, rows)  # without a run even today's columns are no news
    curve_path = folder / "curves.csv"
    points = [point for each in runs for point in curves.curve_of(each)]
    if points:
        known = {(row["arm"], row["signature"]) for row in rows}
        kept = [point for point in read(curve_path, curves.COLUMNS) if (point["arm"], point["signature"]) in known]
        changed |= write(curve_path, curves.merge(kept, points, experiment), curves.COLUMNS)
    changed |= bool(curves.write_strips(runs, folder))
    count = Counter(row["arm"] for row in {(r["tier"], r["data"], r["arm"], r["seed"]): r for r in rows}.values())
    del count["real"]
    missing = [arm for arm in experiment.arms if not count[arm]]
    print(
        f"{experiment.name}: {sum(count.values())} runs of {len(count)} arms, {len(runs)} of them found here, "
        f"{'written to' if changed else 'nothing new in'} {path}"
        + (f"; no run yet of {', '.join(missing)}" if missing else "")
    )


def main(argv: list[str], root: Path = cli.ROOMS, today: Today = composed) -> int:
    """Entry point; returns the exit status."""
    values, flags = cli.arguments(argv, {"experiment": "all", "out": "", "tracking_uri": ""}, ("--benchmark",))
    if flags:
        from analysis.collect_benchmark import benchmark

        return benchmark()
    rooms = cli.rooms(values["experiment"], root)
    arms = {arm for experiment in rooms for arm in experiment.arms}
    out = cli.runs_folder(values["out"])
    # Folders come last, and so win where both have the same run.
    found = from_mlflow(values["tracking_uri"], arms.__contains__) if values["tracking_uri"] else []
    if values["out"] or not values["tracking_uri"]:
        found = list({each.name: each for each in [*found, *from_folders(out, arms.__contains__)]}.values())
    for experiment in rooms:
        collect(found, experiment, root / experiment.name, today)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

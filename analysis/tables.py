"""The table and the verdicts of a room, from its results.csv.

    python -m analysis.tables [experiment=ROOM|all] [--check]
    python -m analysis.tables experiment=ROOM [arms=FIRST,ARM,...] [metric=NAME] [nfe=N] [margin=X]

Prints them, and writes them between `<!-- table:begin -->` and `<!-- table:end -->` in the room's README.md, between
`<!-- table:ROOM:begin -->` and `<!-- table:ROOM:end -->` in the main README.md where it has these, and as LaTeX into
paper/tables/ROOM.tex. A room has one table for each tier and data set; the rules are in analysis/stats.py.
--check writes nothing and exits with 1 where a file does not show what results.csv says.
The second form asks another question of the same rows, such as whether a verdict hangs on the metric; it is printed and
written nowhere.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import cli, render, stats
from analysis.render import MISSING, NOT_APPLICABLE, Cell, Table
from liquiddiff.config import BadInput, choose
from liquiddiff.record import write_atomic

if TYPE_CHECKING:
    from experiments.room import Experiment

TIERS = ("laptop", "hour", "paper")
HIGHER_IS_BETTER = ("precision", "recall")
TEXTS = ("signature", "commit", "data_fingerprint", "reference", "weights", "dtype")  # columns, not numbers
NEEDED = ("arm", "tier", "data")  # of every row
MEND = "mend it, or take it away and collect the runs again (python -m analysis.collect)"
ASIDE = ("arms", "metric", "nfe", "margin")  # arguments that ask something else
STEADY = 1.3
Values = dict[str, dict[int, float]]


def load(folder: Path) -> pd.DataFrame:
    """A room's results.csv. Raises BadInput where it has no rows yet."""
    path = folder / "results.csv"
    try:
        frame = pd.read_csv(path, dtype={key: str for key in TEXTS})
    except (OSError, pd.errors.EmptyDataError):
        frame = pd.DataFrame()
    except ValueError as error:  # no text, or no table
        raise BadInput(f"{path} cannot be read ({' '.join(str(error).split())[:120]}): {MEND}") from error
    if frame.empty:
        raise BadInput(
            f"{path} has no rows yet: python experiments/run.py experiment={folder.name}, "
            f"then python -m analysis.collect experiment={folder.name}"
        )
    without = [key for key in NEEDED if key not in frame or frame[key].isna().any()]
    if without := [*without, *(key for key in ("seed", "nfe", "n") if key not in frame)]:
        raise BadInput(f"{path} has rows without {', '.join(without)}: {MEND}")
    return frame


def tables_of(folder: Path, experiment: "Experiment") -> list[Table]:
    """A room's tables, the laptop tier's first. Raises BadInput for rows that cannot be compared."""
    texts = {arm: what_it_changes(folder.parent, arm) for arm in experiment.arms}
    groups = groups_of(load(folder), experiment)
    return [
        table_of(rows, each, texts, tuned_arms(folder, each, rows), title, slug) for title, slug, each, rows in groups
    ]


def groups_of(frame: pd.DataFrame, experiment: "Experiment") -> list[tuple[str, str, "Experiment", pd.DataFrame]]:
    """(title, slug, the experiment as the tier has it, rows) of each tier and data set, the laptop tier's first.

    One of which no run is the experiment's, as of an arm that has another name now, is none.
    """
    found = frame.groupby(["tier", "data"])
    groups = [(key, rows) for key, rows in found if rows["arm"].isin(experiment.arms).any()]
    groups = sorted(groups, key=lambda item: (rank(str(item[0][0])), item[0]))
    return [
        (
            f"{tier} tier, {data}",
            experiment.name if k == 0 else f"{experiment.name}-{tier}-{data}",
            experiment.at(str(tier)),
            rows,
        )
        for k, ((tier, data), rows) in enumerate(groups)
    ]


def rank(tier: str) -> int:
    """The tiers in the order of their budgets, others after them."""
    return TIERS.index(tier) if tier in TIERS else len(TIERS)


def what_it_changes(root: Path, arm: str) -> str:
    """The first comment line of an arm's YAML."""
    for path in sorted(root.glob(f"*/{arm}.yaml")):
        first = (path.read_text().splitlines() or [""])[0]
        return first.lstrip("# ").strip() if first.startswith("#") else NOT_APPLICABLE
    return "nothing: the baseline"


def tuned_arms(folder: Path, experiment: "Experiment", rows: pd.DataFrame) -> set[str]:
    """Arms whose rows are all of the rate that learning_rates.csv chose, of the first arm's grid."""
    path = folder / "learning_rates.csv"
    if not path.exists():
        return set()
    trials = pd.read_csv(path)
    here = trials[(trials["tier"] == rows["tier"].iloc[0]) & (trials["data"] == rows["data"].iloc[0])]
    grids = {str(arm): set(group["lr"]) for arm, group in here.groupby("arm")}
    first = grids.get(experiment.arms[0], set())
    chosen = {str(arm): set(group["lr"]) for arm, group in here[here["chosen"]].groupby("arm")}
    trained = {str(arm): set(pd.to_numeric(group["lr"])) for arm, group in rows.groupby("arm")}
    return {arm for arm, rate in chosen.items() if grids[arm] <= first and trained.get(arm) == rate}


def values_of(rows: pd.DataFrame, experiment: "Experiment", column: str) -> Values:
    """{arm: {seed: value}} of the experiment's arms and seeds."""
    values: Values = {arm: {} for arm in experiment.arms}
    for arm, seed, value in zip(rows["arm"], rows["seed"], pd.to_numeric(rows[column]), strict=True):
        if arm in values and int(seed) in experiment.seeds and math.isfinite(value):
            values[arm][int(seed)] = float(value)
    return values


def pace(runs: pd.DataFrame) -> pd.Series:
    """Images a second in training, by arm, on the device that ran the most of them.

    Empty where an arm's own seeds are further apart than STEADY: then it tells what else the machine did, or of other
    kernels, and not of the arm.
    """
    rates = runs[runs["device"].isin(runs["device"].mode()[:1])].dropna(subset="images_per_second")
    of_arm = rates.groupby("arm")["images_per_second"]
    return of_arm.median() if (of_arm.max() <= STEADY * of_arm.min()).all() else pd.Series(dtype=float)


def floor_of(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of real images that were measured on the images, and with the extractor, of `runs`, if there are any."""
    floor = rows[rows["arm"] == "real"]
    if runs.empty:
        return floor
    same = floor["data_fingerprint"].isin(runs["data_fingerprint"]) & floor["extractor"].isin(runs["extractor"])
    halves = pd.to_numeric(runs["reference"].str.rpartition("/")[2], errors="coerce") // 2
    off = (floor[same]["n"] - pd.Series([runs["n"].max(), halves.max()]).min()).abs()  # as many images, or half of all
    return floor.loc[off[off == off.min()].index]


def table_of(
    rows: pd.DataFrame, experiment: "Experiment", texts: dict[str, str], tuned: set[str], title: str, slug: str
) -> Table:
    """One tier and data set."""
    mine = rows["arm"].isin(experiment.arms) & rows["seed"].isin(experiment.seeds) & (rows["nfe"] == experiment.nfe)
    runs = rows[mine]
    floor = floor_of(rows, runs)
    stats.check_protocol(({str(k): v for k, v in row.items()} for row in runs.to_dict("records")), experiment.varies)
    extractor = "/".join(sorted(runs["extractor"].astype(str).unique())) or "/".join(floor["extractor"])
    first, primary = experiment.arms[0], experiment.metric

    def lower(column: str) -> bool:
        return experiment.lower_is_better if column == primary else column not in HIGHER_IS_BETTER

    metrics = [primary, *(name for name in ("val_loss", "kid", "precision", "recall") if name != primary)]
    values = {name: values_of(runs, experiment, name) for name in metrics}
    bold = {name: stats.best(values[name], lower(name)) for name in metrics}
    against = {"val_loss": stats.compare(values["val_loss"], first, margin=0.0)}
    against[primary] = stats.compare(values[primary], first, experiment.margin, experiment.lower_is_better)
    bold[primary] -= {arm for arm, d in against[primary].items() if d.verdict == "worse"}

    def head(name: str) -> list[str]:
        arrow = "↓" if lower(name) else "↑"
        if name not in against:
            return [f"{render.label(name, extractor)} {arrow}"]
        differs = [f"difference from {first} [95 % CI]"]
        return [f"{render.label(name, extractor)} {arrow}", *differs, *(["verdict"] if name == primary else [])]

    def cells(arm: str, name: str) -> list[Cell]:
        own = [Cell(render.mean_se(*stats.mean_se(values[name][arm].values())), arm in bold[name])]
        if name not in against:
            return own
        d = against[name].get(arm)
        own.append(Cell(render.difference(d.mean, d.low, d.high, d.n) if d else NOT_APPLICABLE))
        if name == primary:
            own.append(Cell(verdict(d) if d else NOT_APPLICABLE))
        return own

    def verdict(d: stats.Difference) -> str:
        """Of fewer seeds than the room has, it may be of those that survived: told."""
        missing = f" ({d.n} of {len(experiment.seeds)} seeds)" if d.n < len(experiment.seeds) else ""
        return d.verdict + missing if d.n else MISSING

    costs = {key: runs.groupby("arm")[key].median() for key in ("params", "macs")}
    if len(speed := pace(runs)):
        costs["images_per_second"] = speed

    def line(arm: str) -> list[Cell]:
        count = len(values[primary][arm])
        cost = [render.quantity(float(of_arm.get(arm, math.nan))) for of_arm in costs.values()]
        mark = "" if arm in tuned else " †"
        return [
            Cell(arm + mark),
            Cell(texts[arm]),
            Cell(f"{count}/{len(experiment.seeds)}"),
            *(cell for name in metrics for cell in cells(arm, name)),
            *(Cell(text) for text in cost),
        ]

    header = ["arm", "what it changes", "seeds", *(text for name in metrics for text in head(name))]
    header += ["params", "MACs", "images/s"][: len(costs)]
    lines = [line(arm) for arm in experiment.arms]
    lines.append(floor_line(floor, metrics, lines[0], header, extractor))
    everyone = len(tuned & set(experiment.arms)) == len(experiment.arms)
    note = note_of(runs, experiment, values[primary], len(speed) > 0)
    note += "" if everyone else UNTUNED
    verdicts = [render.sentence(arm, d, render.label(primary, extractor)) for arm, d in against[primary].items()]
    return Table(
        f"{title}, {render.label(primary, extractor)} at {experiment.nfe} NFE", header, lines, note, slug, verdicts
    )


TIMED = "; images/s as trained, beside whatever else the machine did"
UNTUNED = " † untuned: trained at the room's learning rate, not at one chosen for the arm (`learning_rates.csv`)."


def floor_line(
    floor: pd.DataFrame, metrics: list[str], like: list[Cell], header: list[str], extractor: str
) -> list[Cell]:
    """Real images against other real images: what a perfect generator would score at this n."""
    cells = [Cell("") for _ in like]
    cells[0], cells[1] = Cell("real"), Cell("one half of the real images against the other")
    if floor.empty:
        cells[2] = Cell(MISSING)
        return cells
    row = floor.iloc[0]
    cells[1] = Cell(f"one random half of the real images against the other, n={int(row['n'])}")
    for name in metrics:
        value = float(row[name])
        place = next(k for k, text in enumerate(header) if text.split(" ")[0] == render.label(name, extractor))
        cells[place] = Cell(f"{value:.{render.decimals(None, value)}f}" if math.isfinite(value) else NOT_APPLICABLE)
    return cells


def note_of(runs: pd.DataFrame, experiment: "Experiment", values: Values, timed: bool) -> str:
    """The protocol, the devices, the command, and what the seeds could have shown."""

    def of(column: str) -> str:
        return ", ".join(sorted({stats.plain(value) for value in runs[column].dropna()})) or "?"

    name, first = experiment.name, experiment.arms[0]
    (sd, seeds, tests), left = stats.pooled_sd(values, first), stats.left_by_pairing(values, first)
    least = stats.detectable(sd, seeds, tests)
    luck = f" Pairing by seed leaves {left:.2g} of a difference's variance." if math.isfinite(left) else ""
    shows = f"{least:.2g}" if math.isfinite(least) else "unknown, with fewer than two seeds in each arm"
    return (
        f"Mean ± SE (seeds); bold: the best and what is not significantly worse. n={of('n')}, {experiment.nfe} NFE, "
        f"solver {of('solver')}, extractor {of('extractor')}, reference {of('reference')}, EMA weights after "
        f"{of('images')} images in batches of {of('batch')}, on {of('device')}"
        f"{TIMED if timed else ''}. "
        f"Made by `python experiments/run.py experiment={name}`, `python -m analysis.collect experiment={name}`, "
        f"`python -m analysis.tables experiment={name}`. Smallest difference that {seeds or 'these'} seeds show with "
        f"80 % power over {tests} {'arms' if tests > 1 else 'arm'}: {shows}; margin: {experiment.margin:g}.{luck}"
    )


def files_of(folder: Path, experiment: "Experiment", tables: list[Table]) -> dict[Path, str]:
    """{path: its text with these tables}."""
    repository, name = folder.parent.parent, experiment.name
    body = "\n\n".join(render.markdown(table) for table in tables)
    readme, main_readme = folder / "README.md", repository / "README.md"
    text = readme.read_text() if readme.exists() else ""
    files = {readme: render.place(text, body, str(readme))}
    if main_readme.exists() and f"<!-- table:{name}:begin -->" in main_readme.read_text():
        files[main_readme] = render.place(main_readme.read_text(), body, str(main_readme), name)
    return files | {repository / f"paper/tables/{table.slug}.tex": render.latex(table) for table in tables}


def aside(experiment: "Experiment", asked: dict[str, str]) -> "Experiment":
    """The experiment with another question. Raises BadInput for what it has no rows of."""
    from experiments.room import METRICS

    changes: dict[str, Any] = {}
    try:
        changes |= {key: kind(asked[key]) for key, kind in (("nfe", int), ("margin", float)) if key in asked}
    except ValueError as error:
        raise BadInput(f"nfe= and margin= are numbers: {error}") from error
    if not 0 <= changes.get("margin", 0) < math.inf:
        raise BadInput(f"margin={asked['margin']} must not be negative, and finite")
    if "metric" in asked:
        changes["metric"] = choose("metric", asked["metric"], METRICS)
        changes["lower_is_better"] = asked["metric"] not in HIGHER_IS_BETTER
        if asked["metric"] != experiment.metric and "margin" not in asked:
            margin = f"the margin {experiment.margin:g} is one of {experiment.metric}"
            raise BadInput(f"{margin}: give metric= with a margin=")
    if "arms" in asked:
        changes["arms"] = [choose("arm", arm, experiment.arms) for arm in asked["arms"].split(",")]
    tiers = {tier: {k: v for k, v in own.items() if k not in changes} for tier, own in experiment.tiers.items()}
    return replace(experiment, tiers=tiers, **changes)


def main(argv: list[str], root: Path = cli.ROOMS) -> int:
    """Entry point; returns the exit status."""
    values, flags = cli.arguments(argv, {"experiment": "all"} | dict.fromkeys(ASIDE, ""), ("--check",))
    asked = {key: values[key] for key in ASIDE if values[key]}
    if asked and flags:
        raise BadInput(f"--check is of the room's own question: leave out {', '.join(f'{key}=' for key in asked)}")
    stale = []
    for experiment in cli.rooms(values["experiment"], root):
        experiment = aside(experiment, asked) if asked else experiment
        folder = root / experiment.name
        try:
            counts = set(load(folder)["nfe"].dropna().astype(int))
        except BadInput as error:
            if values["experiment"] != "all":
                raise
            print(error)
            continue
        if experiment.nfe not in counts and "nfe" in asked:
            raise BadInput(f"the rows of {experiment.name} are of nfe={', '.join(map(str, sorted(counts)))}")
        tables = tables_of(folder, experiment)
        for path, text in files_of(folder, experiment, tables).items():
            if asked or (path.exists() and path.read_text() == text):
                continue
            stale.append(path)
            if not flags:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, text)
        if not flags:
            for table in tables:
                print("\n".join([f"## {experiment.name}", "", render.markdown(table), "", *table.verdicts, ""]))
    if flags and stale:
        print(f"not what results.csv says: {', '.join(map(str, stale))}; python -m analysis.tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

"""Two runs side by side: what differs in their configuration, their metrics, and samples of the same noise.

    python -m analysis.compare RUN_A RUN_B [out=PICTURE.png]

A run is a folder, or the name of one in runs/. Metrics that were measured by different protocols are shown without a
difference, with the reason. The picture (default: compare-A-B.png beside the second run) has one column for each noise.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import cli, render
from analysis.runs import SCORES
from liquiddiff.config import BadInput, Run, flatten

PLACES = frozenset("out cache threads device".split())  # where a run was done, not what it is
PROTOCOL = "extractor weights solver n reference".split()
SHOWN = 8  # samples of each


@dataclass
class Side:
    """One of the two."""

    folder: Path
    run: Run
    rows: list[dict[str, Any]]  # of metrics.jsonl
    facts: dict[str, Any]


def load(name: str, out: Path = Path("runs")) -> Side:
    """A run by its folder or name. Raises BadInput where there is none."""
    from liquiddiff.record import Record, read_run

    folder = next((path for path in (Path(name).expanduser(), out / name) if (path / "run.yaml").exists()), None)
    if folder is None:
        raise BadInput(f"{name} is not a run folder{cli.near(name, out)}")
    run = read_run(folder)
    record = Record(run, folder.resolve().parent)
    record.folder = folder
    return Side(folder, run, record.rows(), record.facts())


def configuration(a: Run, b: Run) -> tuple[list[tuple[str, Any, Any]], int]:
    """(key, in a, in b) of every key that differs, and how many agree."""
    ours, theirs = flatten(a), flatten(b)
    keys = [key for key in ours if key not in PLACES]
    return [(k, ours[k], theirs[k]) for k in keys if ours[k] != theirs[k]], sum(ours[k] == theirs[k] for k in keys)


def metrics(a: Side, b: Side) -> tuple[list[tuple[str, str, str, str]], str]:
    """(what, in a, in b, difference) as text, and why there are no differences of scores ("" where there are)."""
    evaluations = [{row["nfe"]: row for row in side.rows if "nfe" in row} for side in (a, b)]
    protocols = [{key: next(iter(each.values())).get(key) for key in PROTOCOL if each} for each in evaluations]
    # What an older row does not tell is not held against it.
    told = [key for key in PROTOCOL if all(protocol.get(key) is not None for protocol in protocols)]
    differs = [key for key in told if protocols[0][key] != protocols[1][key]]
    why = ", ".join(f"{key} {protocols[0][key]} against {protocols[1][key]}" for key in differs)
    prints = [side.facts.get("data_fingerprint") for side in (a, b)]
    alike = prints[0] == prints[1] if all(prints) else a.run.data == b.run.data
    alike = alike and a.run.eval.val_n == b.run.eval.val_n
    lines = []

    def add(what: str, values: list[Any], comparable: bool = True) -> None:
        if all(value is None for value in values):
            return
        shown = ["—" if value is None else f"{value:.6g}" for value in values]
        difference = f"{values[1] - values[0]:+.4g}" if comparable and None not in values else "—"
        lines.append((what, shown[0], shown[1], difference))

    for key in ("loss", "val_loss"):
        curves = [[row[key] for row in side.rows if "images" in row and row.get(key) is not None] for side in (a, b)]
        same = key != "loss" or a.run.flow == b.run.flow  # val_loss is the same quantity in every arm, of one data set
        add(key, [curve[-1] if curve else None for curve in curves], same and alike)
    for nfe in sorted(set(evaluations[0]) | set(evaluations[1])):
        for key in SCORES:
            name = render.label(key, str(protocols[0]["extractor"])) if not why and all(protocols) else key
            add(f"{name} at {nfe:g} NFE", [each.get(nfe, {}).get(key) for each in evaluations], not why)
    for key in ("params", "macs", "images_per_second", "seconds", "peak_mib"):
        add(key, [side.facts.get(key) for side in (a, b)])
    return lines, why


def picture(a: Side, b: Side, path: Path) -> str:
    """Write the samples of both, the same noise above each other; returns what stands there, or why nothing does."""
    missing = [side.folder.name for side in (a, b) if not (side.folder / "samples.png").exists()]
    if missing:
        return f"no samples yet of {' and '.join(missing)}"
    if a.run.image_shape != b.run.image_shape:
        return f"no picture: the images are {a.run.image_shape} and {b.run.image_shape}"
    import numpy as np

    from analysis import style
    from analysis.plots import samples_of

    sheets = [samples_of(side.folder / "samples.png", side.run.data.resolution)[:SHOWN] for side in (a, b)]
    count = min(map(len, sheets))
    figure, panels = style.canvas(0.4 + 2 * (style.WIDTH / count + 0.4), 2)
    for axes, side, images_NHWC in zip(panels, (a, b), sheets, strict=True):
        pad = ((0, 0), (0, 0), (0, max(1, images_NHWC.shape[2] // 16)), (0, 0))
        row = np.concatenate(list(np.pad(images_NHWC[:count], pad, constant_values=255)), 1)
        axes.imshow(row, interpolation="none")
        axes.set_title(f"{side.folder.name}  ({side.run.eval.nfe[-1]} NFE, {side.run.eval.solver})", fontsize=9)
        axes.set_axis_off()
    style.save(figure, path, exact=True)
    same = a.run.seed == b.run.seed
    return f"{path}: " + ("a column is one noise" if same else "the seeds differ, so a column is not one noise")


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Aligned columns."""
    text = [header, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[k]) for row in text) for k in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in text)


def main(argv: list[str], out: Path = Path("runs")) -> int:
    """Entry point; returns the exit status."""
    names = [argument for argument in argv if "=" not in argument]
    values, _ = cli.arguments([argument for argument in argv if "=" in argument], {"out": ""})
    if len(names) != 2:
        raise BadInput("give two runs: python -m analysis.compare runs/ARM-SIGNATURE-s0 runs/OTHER-SIGNATURE-s0")
    if values["out"] and Path(values["out"]).suffix not in (".png", ".svg"):
        raise BadInput(f"out={values['out']} must end in .png or .svg")
    a, b = (load(name, out) for name in names)
    differing, agreeing = configuration(a.run, b.run)
    short = [side.folder.name for side in (a, b)]
    print(table(("configuration", *short), differing))
    print(f"{agreeing} other keys agree\n")
    lines, why = metrics(a, b)
    print(table(("metric", *short, "second - first"), lines) if lines else "nothing measured yet")
    if why:
        print(f"scores are not comparable: {why}")
    if a.run.seed != b.run.seed:
        print("the seeds differ: differences are not paired")
    path = Path(values["out"] or b.folder.parent / f"compare-{short[0]}-{short[1]}.png")
    print(f"\nsamples  {picture(a, b, path)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

"""What figures need beside results.csv: each run's loss curve, and the first samples of one run of each arm.

`analysis.collect` writes both, small enough to be committed, from run folders alone:

    experiments/ROOM/curves.csv                   arm, seed, tier, data, signature, images, loss, val_loss
    experiments/ROOM/samples/TIER-DATA-ARM.png    a strip of raw pixels, sample k from the same noise in every arm
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.runs import Found

if TYPE_CHECKING:
    from experiments.room import Experiment

COLUMNS = "arm seed tier data signature images loss val_loss".split()
POINTS = 40  # of a curve: enough for a figure
STRIP, STRIP_PIXELS = 16, 16 * 32 * 32  # samples of a strip; larger images get fewer
Row = dict[str, str]


def curve_of(found: Found) -> list[Row]:
    """A run's curve: the training loss as the mean of each of POINTS equal stretches, and each held-out loss."""
    from liquiddiff.record import Record

    if found.folder is None:
        return []
    record = Record(found.run, found.folder.parent)
    record.folder = found.folder
    total = found.run.optim.images
    stretches: dict[int, list[float]] = defaultdict(list)
    held_out: dict[int, float] = {}
    for row in record.rows():
        if row.get("loss") is not None and "images" in row:
            stretches[-(-row["images"] * POINTS // total)].append(row["loss"])
            if row.get("val_loss") is not None:
                held_out[row["images"]] = row["val_loss"]
    every = -(-len(held_out) // POINTS) or 1
    kept = sorted(held_out)[::-1][::every]  # from the last, which must stay
    points: dict[int, dict[str, float]] = defaultdict(dict)
    for k, losses in stretches.items():
        points[round(k * total / POINTS)]["loss"] = sum(losses) / len(losses)
    for images in kept:
        points[images]["val_loss"] = held_out[images]
    same = {"arm": found.run.arm, "seed": str(found.run.seed), "tier": found.run.tier, "data": found.run.data.name}
    same["signature"] = found.signature
    return [
        same | {"images": str(images)} | {key: f"{point[key]:.5g}" if key in point else "" for key in COLUMNS[-2:]}
        for images, point in sorted(points.items())
    ]


def merge(old: list[Row], new: list[Row], experiment: "Experiment") -> list[Row]:
    """Old rows, those of the runs in `new` replaced, in one order: results.csv's rule."""

    def run_of(row: Row) -> tuple[str, ...]:
        return row["tier"], row["data"], row["arm"], row["seed"]

    def order(row: Row) -> tuple[Any, ...]:
        arms = [*experiment.arms, row["arm"]]
        return row["tier"], row["data"], arms.index(row["arm"]), row["arm"], int(row["seed"]), int(row["images"])

    fresh = {run_of(row) for row in new}
    return sorted([*(row for row in old if run_of(row) not in fresh), *new], key=order)


def write_strips(runs: list[Found], folder: Path) -> int:
    """Write a strip for each arm, tier and data set, of its lowest seed among `runs`; returns how many are new.

    A strip of a lower seed stays, so that arms of one seed can be set side by side.
    """
    sources = [(each, each.folder / "samples.png") for each in runs if each.folder]
    sources = [(each, source) for each, source in sources if source.exists()]
    if not sources:
        return 0
    from PIL import Image

    from analysis.plots import samples_of

    count = 0
    for found, source in sorted(sources, key=lambda pair: pair[0].run.seed, reverse=True):
        run = found.run
        path = folder / "samples" / f"{run.tier}-{run.data.name}-{run.arm}.png"
        facts = {"seed": run.seed, "nfe": run.eval.nfe[-1], "solver": run.eval.solver, "signature": found.signature}
        before = facts_of(path)
        if before and before["seed"] < run.seed:
            continue
        side, channels = run.data.resolution, run.data.channels
        images_NHWC = samples_of(source, side)[: max(2, min(STRIP, STRIP_PIXELS // side**2))]
        strip = Image.fromarray(images_NHWC.transpose(1, 0, 2, 3).reshape(side, -1, 3))
        if channels == 1:
            strip = strip.convert("L")
        if before == facts and Image.open(path).tobytes() == strip.tobytes():
            continue
        _save(strip, facts, path)
        count += 1
    return count


def facts_of(path: Path) -> dict[str, Any]:
    """Of which run a strip is: seed, nfe, solver, signature; {} where there is none."""
    from PIL import Image

    if not path.exists():
        return {}
    with Image.open(path) as image:
        return json.loads(image.text["run"])  # type: ignore[attr-defined]


def _save(image: Any, facts: dict[str, Any], path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("run", json.dumps(facts))
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    image.save(temporary, format="PNG", optimize=True, pnginfo=text)
    os.replace(temporary, path)

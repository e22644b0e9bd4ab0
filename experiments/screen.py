"""What a run shows on the terminal: header, progress bars, closing table."""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import compose
from liquiddiff.config import Run
from liquiddiff.record import Record


def header(run: Run, baseline: Run | None, folder: Path, given: list[str]) -> None:
    """What will run: the arm's diff against the baseline, if any, what was `given` to both, signature, cost, folder."""
    from liquiddiff import budget

    mine, theirs = (budget.meta_cost(r.model, r.image_shape) for r in (run, baseline or run))
    print(f"arm        {run.arm}, seed {run.seed}, tier {run.tier}: {run.model.size} on {run.data.name} at "
          f"{run.data.resolution}x{run.data.resolution}, {budget.human(run.optim.images)} images")  # fmt: skip
    for key, (old, new) in compose.diff(run, baseline or run).items():
        print(f"  {key}: {old} -> {new}")
    if given:
        print(f"given      {' '.join(given)}")
    print(f"signature  {run.signature()}")
    for name, a, b in (("parameters", mine.params, theirs.params), ("MACs", mine.macs, theirs.macs)):
        against = (
            ""
            if baseline is None or run.arm == "baseline"
            else f"  ({100 * (a / b - 1):+.1f} % of the baseline's {budget.human(b)})"
        )
        print(f"{name:10} {budget.human(a)}{against}")
    if run.optim.warmup >= run.optim.images:
        never = f"outlasts optim.images={run.optim.images}: the learning rate never reaches {run.optim.lr:g}"
        print(f"note       optim.warmup={run.optim.warmup} {never}; give optim.warmup={run.optim.images // 10}")
    print(f"folder     {folder}", flush=True)


class Bar:
    """A progress bar that appears with its first news; on a pipe or in a log file a line now and then."""

    def __init__(self, total: int, label: str, unit: str):
        tty = sys.stderr.isatty()
        self.options: dict[str, Any] = {
            "total": total,
            "desc": label,
            "unit": unit,
            "mininterval": 0.3 if tty else 20.0,
        }
        self.options |= {"ncols": None if tty else 100, "unit_scale": True, "smoothing": 0.05}
        self.bar: tqdm | None = None
        self.done = 0

    def move(self, to: int, loss: float | None = None) -> None:
        """Show that `to` of the total are done."""
        if self.bar is None:
            self.done = to
            self.bar = tqdm(initial=to, **self.options)  # a resumed run's speed counts from where it resumed
        if loss is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update(to - self.done)
        self.done = to

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.close()


class Training(Bar):
    """Images, images/s, loss and time left."""

    def __init__(self, run: Run):
        super().__init__(run.optim.images, "train", "img")

    def __call__(self, images: int, loss: float | None) -> None:
        """The trainer's `progress`."""
        self.move(images, loss)


class Sampling(Bar):
    """Network evaluations of all samples at all NFE."""

    def __init__(self, run: Run, after: Bar):
        super().__init__(run.eval.n * sum(run.eval.nfe), "sample", "eval")
        self.after = after

    def __call__(self, evaluations: int) -> None:
        """Another `evaluations` are done."""
        self.after.close()
        self.move(self.done + evaluations)


def results(record: Record) -> None:
    """The closing table: every NFE, the floor, and where things are."""
    rows = record.evaluations()
    extractor = rows[0]["extractor"] if rows else record.run.eval.extractor
    pixel = extractor != "pixel" and any("fd_pixel" in row for row in rows)
    name = "fid" if extractor == "inception" else f"fd_{extractor}"
    columns = [name, *(["fd_pixel"] if pixel else []), "kid", "precision", "recall"]
    widths = [max(12, len(column) + 2) for column in columns]
    print("\n" + f"{'nfe':>14}" + "".join(f"{title:>{w}}" for title, w in zip(columns, widths, strict=True)))
    floor = next((row for row in record.rows() if row.get("floor")), None)
    for row in [*rows, *([floor] if floor else [])]:
        label = f"real (n={row['n']})" if row.get("floor") else str(row["nfe"])
        values = [row.get("fd" if column == name else column) for column in columns]
        cells = [
            f"{value:{w}.4f}" if value is not None else f"{'—':>{w}}" for value, w in zip(values, widths, strict=True)
        ]
        print(f"{label:>14}{''.join(cells)}")
    val = [row["val_loss"] for row in record.rows() if "val_loss" in row]
    seconds = json.loads((record.folder / "done").read_text())["seconds"] if record.done else None
    if rows:
        print(f"n={rows[0]['n']}, solver {rows[0]['solver']}, EMA weights, reference {rows[0]['reference']}", end="")
        print(f", val_loss {val[-1]:.4f}" if val else "", f", {seconds:.0f} s" if seconds else "", sep="")
    for file in ("samples.png", "nfe.png", "loss.png", "metrics.jsonl"):
        if (record.folder / file).exists():
            print(f"{Path(file).stem:10} {record.folder / file}")

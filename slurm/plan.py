"""What a set costs at the sizes before anyone has measured it: `python slurm/plan.py data=celebahq tier=paper`.

    python slurm/plan.py [GRID OPTIONS] [peak=65,312,989] [share=0.15]
    python slurm/plan.py docs [--check]    write the tables of docs/clusters.md; --check: exit with 1 where they are old

From multiply-adds alone: an estimate, under the assumption that a card sustains `share` of its `peak` (dense 16-bit
TFLOP/s; a T4's, an A100's, an H100's). Measure r images a second on your own card and training takes I / r instead.
"""

import math
import sys
from pathlib import Path

from experiments import compose
from liquiddiff.config import SIZES, BadInput, Run

CARDS = {65.0: "T4", 312.0: "A100", 989.0: "H100"}
SHARE = 0.15  # assumed
EVENING = 4  # hours
PAGE = Path(__file__).resolve().parents[1] / "docs" / "clusters.md"


def flops(run: Run, macs: int) -> float:
    """Of training and sampling a whole run: two a multiply-add, a backward pass being twice a forward pass."""
    return 2.0 * macs * (3 * run.optim.images + run.eval.n * sum(run.eval.nfe))


def table(overrides: list[str], peaks: list[float], share: float) -> str:
    """Sizes by cards, in Markdown: GPU-hours of a run, and images that the first card trains in an evening."""
    from liquiddiff import budget  # late: torch

    names = [f"{CARDS.get(peak, 'card')} at {share * peak:.3g} TFLOP/s" for peak in peaks]
    head = ["size", "MACs", *(f"GPU-hours, {name}" for name in names), f"images in {EVENING} hours, {names[0]}"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for size in SIZES:
        run = compose.as_run(compose.one([*overrides, f"model={size}"]))
        macs = budget.meta_cost(run.model, run.image_shape).macs
        rates = [share * peak * 1e12 for peak in peaks]
        cells = [size, budget.human(macs), *(f"{flops(run, macs) / rate / 3600:,.1f}" for rate in rates)]
        cells.append(f"{EVENING * 3600 * rates[0] / (6 * macs):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(check: bool) -> int:
    """The page's tables; `check` writes nothing. Returns 1 where that finds others, else 0."""
    from analysis import cost_room, render

    tables = {
        "memory": cost_room.memory_table(cost_room.read(cost_room.ROOM / "memory.csv")),
        "hour": table(["tier=hour"], list(CARDS), SHARE),
        "celebahq": table(["tier=paper"], list(CARDS), SHARE),
    }
    return render.update(PAGE, tables, check, "python slurm/plan.py docs")


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return 0
    if argv in (["docs"], ["docs", "--check"]):
        return write("--check" in argv)
    options = {"peak": ",".join(f"{peak:g}" for peak in CARDS), "share": str(SHARE)}
    given = [a for a in argv if "=" in a and a.partition("=")[0] in options]
    options |= dict(a.split("=", 1) for a in given)
    try:
        try:
            peaks, share = [float(p) for p in options["peak"].split(",")], float(options["share"])
        except ValueError as error:
            raise BadInput(f"peak= and share= take numbers: {error}") from error
        if not all(0 < number < math.inf for number in (*peaks, share)):
            raise BadInput("peak= and share= must be positive")
        print(table([a for a in argv if a not in given], peaks, share))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a set at the sizes costs before anyone has measured it: `python slurm/plan.py data=celebahq tier=paper`.

    python slurm/plan.py [GRID OPTIONS] [peak=65,312,989] [share=0.15]

From multiply-adds alone: an estimate, under the assumption that a card sustains `share` of its `peak` (dense 16-bit
TFLOP/s; a T4's, an A100's, an H100's). Measure r images a second on your own card and the plan is I / r instead.
"""

import sys

from experiments import compose
from liquiddiff.config import SIZES, BadInput, Run

CARDS = {65.0: "T4", 312.0: "A100", 989.0: "H100"}
EVENING = 4  # hours


def flops(run: Run, macs: int) -> tuple[float, float]:
    """Of training and of sampling a whole run: two a multiply-add, a backward pass being twice a forward pass."""
    return 3 * 2.0 * macs * run.optim.images, 2.0 * macs * run.eval.n * sum(run.eval.nfe)


def table(overrides: list[str], peaks: list[float], share: float) -> str:
    """Sizes by cards, in Markdown: GPU-hours of a run and images trained in an evening."""
    from liquiddiff import budget  # late: torch

    names = [f"{CARDS.get(peak, '')} {share * peak:.3g} TFLOP/s".strip() for peak in peaks]
    head = ["size", "MACs", "PFLOP training", "PFLOP sampling", *(f"GPU-hours, {name}" for name in names)]
    head += [f"images in {EVENING} hours, {name}" for name in names]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for size in SIZES:
        run = compose.as_run(compose.one([*overrides, f"model={size}"]))
        macs = budget.meta_cost(run.model, run.image_shape).macs
        training, sampling = flops(run, macs)
        rates = [share * peak * 1e12 for peak in peaks]
        cells = [size, budget.human(macs), f"{training / 1e15:,.0f}", f"{sampling / 1e15:,.0f}"]
        cells += [f"{(training + sampling) / rate / 3600:,.0f}" for rate in rates]
        cells += [f"{EVENING * 3600 * rate / (6 * macs):,.0f}" for rate in rates]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return 0
    options = {"peak": ",".join(f"{peak:g}" for peak in CARDS), "share": "0.15"}
    given = [a for a in argv if a.partition("=")[0] in options]
    options |= dict(a.split("=", 1) for a in given)
    try:
        try:
            peaks, share = [float(p) for p in options["peak"].split(",")], float(options["share"])
        except ValueError as error:
            raise BadInput(f"peak= and share= take numbers: {error}") from error
        print(table([a for a in argv if a not in given], peaks, share))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Speed and memory of this machine, every measure beside its target: python -m analysis.cost

    what=literal,peers,...   some of the measures: literal peers kernels start step evaluation memory (all)
    device=cpu|cuda|auto  threads=N (all cores)  repeats=7
    --json                   the same as JSON
    room [mixers=cfc,conv] [sizes=nano,tiny]   fill experiments/cost/results.csv for this device
    estimate [sizes=tiny]    fill experiments/cost/memory.csv, which needs no GPU
    table                    the tables in experiments/cost/README.md, of the two files

Everything that is compared runs in turn in this process; a figure is the median over the rounds with its quartiles.
Ctrl-C keeps what is known. Exit status: 0, 2 bad input, 130 interrupted.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import cli
from liquiddiff.config import SIZES, BadInput, choose

if TYPE_CHECKING:
    from analysis.benchmarks import Bench, Row

DEFAULTS = {"what": "all", "device": "auto", "threads": "0", "repeats": "7", "mixers": "all", "sizes": "all"}
COMMANDS = ("room", "estimate", "table")


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    values, flags = cli.arguments(argv, DEFAULTS, ("--json", *COMMANDS))
    commands = [command for command in COMMANDS if command in flags]
    for key in ("threads", "repeats"):
        if not values[key].isdecimal() or (key == "repeats" and values[key] == "0"):
            raise BadInput(f"{key}={values[key]} must be a whole number")
    if commands:
        from analysis import cost_room

        sizes = cost_room.chosen("size", values["sizes"], list(SIZES))
        for command in commands:
            cost_room.COMMANDS[command](bench_of(values), values["mixers"], sizes)
        return 0
    return report(values, "--json" in flags)


def bench_of(values: dict[str, str]) -> "Bench":
    """The device, with its threads set."""
    import torch

    from analysis.benchmarks import Bench
    from liquiddiff.device import cores, resolve_device, settle

    torch.set_num_threads(int(values["threads"]) or cores())
    settle()  # as the training loop does
    return Bench(resolve_device(values["device"]), int(values["repeats"]))


def report(values: dict[str, str], as_json: bool) -> int:
    """Print every measure as soon as it is known."""
    bench = bench_of(values)
    from analysis import benchmarks, overheads

    measures = {
        "literal": benchmarks.literal,
        "peers": benchmarks.peers,
        "kernels": benchmarks.kernels,
        "start": overheads.start,
        "step": overheads.step,
        "evaluation": overheads.evaluation,
        "memory": overheads.memory,
    }
    names = list(measures) if values["what"] == "all" else values["what"].split(",")
    for name in names:
        choose("measure", name, measures)
    machine, quiet, rows, status = facts(bench), Quiet(bench), [], 0
    if not as_json:
        print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
        print(f"{'measure':66}{'median':>9}  {'quartiles':18}{'target':>10}  reached")
    try:
        for row in (row for name in names for row in measures[name](bench)):
            rows.append(row)
            if not as_json:
                print(line(row), flush=True)
    except KeyboardInterrupt:
        status = 130
    machine |= quiet.verdict()
    if as_json:
        print(json.dumps({"machine": machine, "rows": [record(row) for row in rows]}, indent=1))
    else:
        print(machine["note"])
        missed = [row.measure for row in rows if row.reached is False]
        print(f"{len(rows)} measured, {len(missed)} short of the target" + (": " + "; ".join(missed) if missed else ""))
    return status


def line(row: "Row") -> str:
    """A row for the terminal."""
    low, high = row.quartiles
    spread = f"{low:.3g} to {high:.3g}" if len(row.values) > 1 else ""
    target = f"{row.target[0]} {row.target[1]:g}" if row.target else ""
    reached = {True: "yes", False: "NO", None: ""}[row.reached]
    text = f"{row.measure:66}{row.median:9.3g}  {spread:18}{target:>10}  {reached}"
    return f"{text}\n    {row.note}" if row.note else text


def record(row: "Row") -> dict[str, Any]:
    """A row as JSON."""
    low, high = row.quartiles
    shown: dict[str, Any] = {"measure": row.measure, "unit": row.unit, "median": row.median, "q1": low, "q3": high}
    shown |= {"rounds": len(row.values), "target": row.target and " ".join(map(str, row.target))}
    return shown | {"reached": row.reached, "note": row.note}


def facts(bench: "Bench") -> dict[str, Any]:
    """What the figures hang on."""
    import torch

    from liquiddiff import depthwise
    from liquiddiff.device import device_name, resolve_precision
    from liquiddiff.trainer import DTYPES

    like = torch.empty(0, device=bench.device, dtype=DTYPES[resolve_precision("auto", bench.device)])
    found = {"device": device_name(bench.device), "torch": torch.__version__, "python": platform.python_version()}
    return found | {"kernels": depthwise.backend(like=like), "rounds": bench.repeats}


class Quiet:
    """Whether the machine was quiet: other processes' share of the CPUs, and one product before and after."""

    def __init__(self, bench: "Bench") -> None:
        self.bench, self.product, self.begin = bench, bench.matmul_of(1024), self.times()
        self.before = self.best()

    def best(self) -> float:
        """Seconds of a fixed product, the best of nine."""
        return min(self.bench.seconds(self.product) for _ in range(9))

    @staticmethod
    def times() -> tuple[float, float, float]:
        """Seconds: wall, used by all processes (0 where nobody tells), used by this one and its children."""
        stat, mine = Path("/proc/stat"), sum(os.times()[:4])
        if not stat.exists():
            return time.monotonic(), 0.0, mine
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, mine

    def verdict(self) -> dict[str, Any]:
        """{"others": their share of the CPUs, "drift": of the product, "quiet": ..., "note": one line}."""
        wall, busy, mine = (b - a for a, b in zip(self.begin, self.times(), strict=True))
        others = max(0.0, busy - mine) / (wall * (os.cpu_count() or 1)) if wall else 0.0
        drift = self.best() / self.before - 1
        quiet = others < 0.05 and abs(drift) < 0.1
        note = f"other processes used {others:.0%} of the CPUs; a fixed product took {drift:+.0%} at the end"
        return {"others": round(others, 3), "drift": round(drift, 3), "quiet": quiet,
                "note": f"quiet machine: {note}" if quiet else
                f"WARNING: the machine was busy: {note}. Ratios hold better than seconds; measure again"}  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

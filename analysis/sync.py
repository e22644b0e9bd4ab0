"""Bring MLflow up to date with the run folders: after an outage, or when the store was lost.

    python -m analysis.sync [out=DIR]

The store is MLFLOW_TRACKING_URI, or mlflow.db in out= (default runs/). Runs that it holds already are only completed,
so the command can be given at any time; runs that another process is writing are left to it.
"""

import sys
from pathlib import Path

from analysis import cli
from analysis.runs import FOLDER
from liquiddiff.config import BadInput


def sync(out: Path) -> tuple[int, list[str], list[str]]:
    """Mirror every run folder under `out`. Returns how many, the busy ones, and those that could not be mirrored."""
    from experiments.compose import room_of  # late: the arrow is experiments -> analysis
    from liquiddiff.record import Record, read_run
    from liquiddiff.tracking import mirror_to_mlflow

    count, busy, failed = 0, [], []
    for folder in sorted(path for path in out.iterdir() if FOLDER.fullmatch(path.name)):
        try:
            run = read_run(folder)
        except (BadInput, TypeError, ValueError) as error:
            print(f"{folder}: {' '.join(str(error).split())}", file=sys.stderr)
            failed.append(folder.name)
            continue
        record = Record(run, out)
        record.folder = folder  # today's code may give the run another signature than it ran under
        signature = folder.name.split("-")[-2]
        tags = {"arm": run.arm, "tier": run.tier, "room": room_of(run.arm), "signature": signature}
        try:
            with record.lock():
                done = mirror_to_mlflow(record, tags, artifacts=record.done)
        except BadInput:
            busy.append(folder.name)
            continue
        if done:
            count += 1
        else:
            failed.append(folder.name)
    return count, busy, failed


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status: 1 where a run could not be mirrored."""
    values, _ = cli.arguments(argv, {"out": "runs"})
    out = Path(values["out"]).expanduser()
    if not out.is_dir():
        raise BadInput(f"out={values['out']} is no folder")
    count, busy, failed = sync(out)
    print(f"{count} runs of {out} are in MLflow" + (f"; {len(busy)} are being written" if busy else ""))
    if failed:
        print(f"{len(failed)} could not be brought there: {', '.join(failed[:5])}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

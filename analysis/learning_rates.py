"""Learning rates, chosen for every mixer by one rule: of one grid, the lowest whose held-out loss ties the best.

    python experiments/run.py experiment=mixer seed=0 optim.lr=4e-3,8e-3,16e-3 jobs=2
    python -m analysis.learning_rates [experiment=mixer] [out=DIR] [seed=0]

Writes the room's learning_rates.csv (tier, data, arm, lr, seed, images, val_loss, fd, chosen), keeping rows of runs
that are no longer here. From then on the room trains each arm at its chosen rate (compose.of_room); arms with fewer
than three rates in the file, and other rooms, train at the tier's.
"""

import sys
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pandas as pd

from analysis import cli
from analysis.collect import composed
from analysis.runs import Found, from_folders
from liquiddiff.config import BadInput
from liquiddiff.record import write_atomic

if TYPE_CHECKING:
    from experiments.room import Experiment
    from liquiddiff.config import Run

FILE = "learning_rates.csv"
KEY = ["tier", "data", "arm", "lr", "seed"]
LEAST = 3  # rates of an arm to choose from
TIE = 1e-3  # of val_loss, which a seed moves by 0.0005 to 0.003: one seed tells no rates apart that are nearer


def choose(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials in order, with `chosen` marking each arm's lowest rate whose val_loss is within TIE of its best.

    That of a rate is the mean over the seeds that all of the arm's rates have, or over its own where there are none
    such: the least of several would be the luckiest seed's.
    """
    trials = trials.sort_values(KEY).reset_index(drop=True)
    arms = trials.groupby(KEY[:3])
    shared = trials.groupby([*KEY[:3], "seed"])["lr"].transform("nunique") == arms["lr"].transform("nunique")
    shared |= ~shared.groupby([trials[key] for key in KEY[:3]]).transform("any")
    loss = trials["val_loss"].where(shared).groupby([trials[key] for key in KEY[:4]]).transform("mean")
    tied = loss <= loss.groupby([trials[key] for key in KEY[:3]]).transform("min") + TIE
    tied &= arms["lr"].transform("nunique") >= LEAST
    trials["chosen"] = tied & ~trials.where(tied).duplicated(KEY[:3])
    return trials


def trial(found: Found, today: "Run", nfe: float) -> dict[str, object] | None:
    """A row, where the run is today's arm in everything but the learning rate."""
    run = found.run
    if replace(today, optim=replace(today.optim, lr=run.optim.lr)).signature() != found.today:
        return None
    scores = next((row for row in found.evaluations if row["nfe"] == nfe), {})
    place = {"tier": run.tier, "data": run.data.name, "arm": run.arm, "lr": run.optim.lr, "seed": run.seed}
    return {**place, "images": run.optim.images, "val_loss": found.facts["val_loss"], "fd": scores.get("fd")}


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    values, _ = cli.arguments(argv, {"experiment": "mixer", "out": "", "seed": "0"})
    out = cli.runs_folder(values["out"])
    if not values["seed"].isdecimal():
        raise BadInput(f"seed={values['seed']} must be a whole number")
    for experiment in cli.rooms(values["experiment"]):
        path = cli.ROOMS / experiment.name / FILE

        @cache
        def today(arm: str, tier: str, data: str, room: "Experiment" = experiment) -> "Run | None":
            return composed(room, arm, tier, data)

        rows = []
        for found in from_folders(out, experiment.arms.__contains__):
            now = today(found.run.arm, found.run.tier, found.run.data.name)
            if now and found.run.seed == int(values["seed"]) and (row := trial(found, now, experiment.nfe)):
                rows.append(row)
        old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*KEY, "images"])
        of_today = [
            (now := today(row.arm, row.tier, row.data)) is None or now.optim.images == row.images
            for row in old.itertuples()
        ]
        old = old[pd.Series(of_today, index=old.index, dtype=bool)]  # rates of another budget prove nothing
        trials = pd.concat([frame for frame in (old, pd.DataFrame(rows)) if len(frame)] or [old])
        if trials.empty:
            if values["experiment"] == "all":
                continue
            raise BadInput(f"no finished run of experiment={experiment.name} under {out}; run the grid first")
        trials = choose(trials.drop_duplicates(KEY, keep="last"))
        text = trials.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        write_atomic(path.resolve(), text)  # a room may have another's by a link
        print(trials.to_string(index=False))
        print(f"{experiment.name}: {len(rows)} of these runs found under {out}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

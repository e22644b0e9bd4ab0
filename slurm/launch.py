"""Submit a grid's unfinished runs, and watch them: `python slurm/launch.py experiment=mixer profile=t4`.

    experiment=ROOM|all  or any grid of experiments/run.py: ablation=a,b seed=0,1,2 tier=paper optim.lr=1e-3 ...
    profile=t4|a100|h100|cpu|FILE.yaml   partition, time, memory: slurm/profiles/*.yaml, or a file of your own
    cluster=slurm|local|debug            local: in the background here, jobs=N at a time; debug: in this process
    pack=N    runs in a job, one after another: for runs shorter than the queue
    gpus=N    processes of one run, each with its GPU where the profile has them; several nodes where one is too small
    dry=true  print, submit nothing

Nothing is submitted twice: runs that are done, queued or running are left alone. Returns at once.

    status [GRID] [out=DIR]   done / running / queued / failed / stale (its job is gone), images, minutes left
    logs RUN [out=DIR]        what a run printed
    retry GRID profile=...    submit the failed and stale runs again
    cancel [GRID]             end its jobs; what they trained is kept
    wait [GRID]               until nothing is queued or running; exit status 1 where a run is not done

Exit status: 0 done, 1 a run failed, 2 bad input.
"""

import math
import os
import shlex
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from experiments import compose
from experiments.run import check_same
from liquiddiff.config import BadInput, Run, choose
from liquiddiff.record import Record
from slurm.ledger import Ledger, State, ask
from slurm.nodes import load_profile, profiles

VERBS = ("status", "logs", "retry", "cancel", "wait")
KINDS = ("done", "running", "queued", "failed", "stale", "new")
LIVE = ("queued", "running")
PATIENCE = 1800  # seconds that `wait` asks in vain
ROWS = 60  # more than this and the table leaves out what is done, queued or new


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments) or not arguments:
        print((__doc__ or "").strip())
        return 0
    try:
        return command(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, above all
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}: mend it and give the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; submitted jobs go on", file=sys.stderr)
        return 130


def command(arguments: list[str]) -> int:
    """One verb, or a submission."""
    words = [a for a in arguments if "=" not in a]
    options = {"profile": "", "cluster": "slurm", "pack": "1", "gpus": "1"}
    given = [a for a in arguments if "=" in a and a.partition("=")[0] in options]
    options |= dict(a.split("=", 1) for a in given)
    overrides = [a for a in arguments if "=" in a and a not in given]
    verb = choose("verb", words[0], VERBS) if words else "submit"
    choose("cluster", options["cluster"], ("slurm", "local", "debug"))
    for key in ("pack", "gpus"):
        if not options[key].isdecimal() or int(options[key]) < 1:
            raise BadInput(f"{key}={options[key]} must be a positive whole number")
    if len(words) > 1 + (verb == "logs"):
        raise BadInput(f"cannot read '{words[-1]}'; write key=value")
    launch, runs = compose.plan(overrides)
    if launch.force:
        raise BadInput("force=true belongs to experiments/run.py; here, rename the folders that should be done again")
    ledger = Ledger(Path(launch.out).expanduser())
    if verb == "logs":
        return logs(ledger, words[1] if len(words) > 1 else "")
    chosen = [o for o in overrides if not o.startswith("out=")]
    totals = {run.name: run.optim.images for run in runs} if chosen or verb in ("submit", "retry") else {}
    if verb in ("submit", "retry"):
        return submit(ledger, launch, runs, options, overrides, again=verb == "retry")
    if verb == "cancel":
        if not ledger.path.exists():
            raise BadInput(f"nothing was submitted under out={launch.out}")
        return cancel(ledger, totals)
    states = settled(ledger, totals) if verb == "wait" else ledger.states(totals)
    show(states)
    return int(verb == "wait" and any(state.kind != "done" for state in states))


def settled(ledger: Ledger, totals: dict[str, int]) -> list[State]:
    """The states once nothing is queued or running. A scheduler that answered once may fail for PATIENCE seconds."""
    answered = -math.inf
    while True:
        begin = time.monotonic()
        try:
            states = ledger.states(totals)
            answered = time.monotonic()
            if not any(state.kind in LIVE for state in states):
                return states
        except BadInput:
            if time.monotonic() - answered > PATIENCE:
                raise
        time.sleep(max(5, 20 * (time.monotonic() - begin)))  # of a large grid less often


def submit(
    ledger: Ledger, launch: compose.Launch, runs: list[Run], options: dict[str, str], overrides: list[str], again: bool
) -> int:
    """Submit what is new or stale; with `again`, what failed or is stale. The rest is done, or on its way."""
    if options["cluster"] == "slurm" and not options["profile"]:
        raise BadInput(f"profile=NAME is missing: {', '.join(profiles())}, or a FILE.yaml; or give cluster=local")
    if launch.jobs < 1:
        raise BadInput(f"jobs={launch.jobs} must be at least 1")
    profile = load_profile(options["profile"] or "cpu")
    wanted = ("failed", "stale") if again else ("new", "stale")
    with ledger.lock():
        states = {state.run: state for state in ledger.states({run.name: run.optim.images for run in runs})}
        count = Counter(state.kind for state in states.values())
        todo = [absolute(run) for run in runs if states[run.name].kind in wanted]
        print(summary(count))
        for run in runs:
            if states[run.name].kind == "done":
                check_same(run, Record(run))
        if not todo:
            print("nothing to submit" + ("; retry submits the failed ones again" if count["failed"] else ""))
            return 0
        lanes = launch.jobs if options["cluster"] == "local" else -(-len(todo) // int(options["pack"]))
        packs = [todo[k :: min(lanes, len(todo))] for k in range(min(lanes, len(todo)))]
        if launch.dry:
            for pack in packs[:ROWS]:
                print("  " + ", ".join(run.name for run in pack))
            print(f"dry=true: {len(todo)} runs in {len(packs)} jobs would be submitted to {options['cluster']}")
            return 0
        from slurm import backend  # late: submitit

        if options["cluster"] == "debug":
            return backend.in_this_process(todo, launch.experiment)  # which holds the lock meanwhile, as it should
        made = backend.submit(ledger, options["cluster"], profile, packs, int(options["gpus"]), launch.experiment)
    changed = ", with uncommitted changes" if made[0].dirty else ""
    jobs = [job for submission in made for job in submission.jobs]
    print(f"submitted {len(todo)} runs in {len(jobs)} jobs ({jobs[0]} .. {jobs[-1]}); "
          f"code: commit {made[0].commit[:10] or 'unknown'}{changed}")  # fmt: skip
    print(f"watch: python slurm/launch.py status {shlex.join(o for o in overrides if not o.startswith('dry='))}")
    return 0


def absolute(run: Run) -> Run:
    """With paths that mean the same wherever the job starts; none of them is part of a signature."""

    def full(path: str) -> str:
        return str(Path(path).expanduser().resolve())

    data = replace(run.data, path=full(run.data.path) if run.data.path else None)
    evaluation = replace(run.eval, weights=full(run.eval.weights) if run.eval.weights else None)
    return replace(run, out=full(run.out), cache=full(run.cache), data=data, eval=evaluation)


def summary(count: Counter[str]) -> str:
    """`12 runs: 3 done, 9 new`."""
    kinds = [f"{count[kind]} {kind}" for kind in KINDS if count[kind]]
    return f"{sum(count.values())} runs: {', '.join(kinds)}"


def show(states: list[State]) -> None:
    """The table; of a large grid only what runs or went wrong."""
    if not states:
        print("nothing was submitted under this out=")
        return
    shown = [s for s in states if len(states) <= ROWS or s.kind in ("running", "failed", "stale")]
    if shown:
        print(f"{'run':46} {'state':8} {'images':>21}  {'minutes left':>12}  job")
    for state in shown:
        share = f"{state.images:,} of {state.total:,}"
        left = "" if state.seconds_left is None else f"{state.seconds_left / 60:.1f}"
        print(f"{state.run:46} {state.kind:8} {share:>21}  {left:>12}  {state.job}" + f"  {state.reason}".rstrip())
    speed = sum(state.speed for state in states if state.kind == "running")
    images = sum(state.images for state in states)
    rest = sum(state.total - state.images for state in states if state.kind in LIVE)
    print(summary(Counter(state.kind for state in states)) + f"; {images:,} images trained", end="")
    print(f"; about {rest / speed / 60:.0f} minutes left at {speed:,.0f} images/s" if speed else "")


def logs(ledger: Ledger, wanted: str) -> int:
    """Print a run's log, and what submitit caught of its job. Raises BadInput for a run never submitted."""
    last = {run: (s, job) for s in ledger.submissions() for job, runs in s.jobs.items() for run in runs}
    matches = [run for run in last if run == wanted] or [run for run in last if wanted and wanted in run]
    if len(matches) != 1:
        found = f"{len(matches)} runs have it in their names" if matches else "no run of that name was submitted"
        raise BadInput(f"logs {wanted or 'RUN'}: {found}; `status` lists the names")
    (run,) = matches
    submission, job = last[run]
    paths = [ledger.out / run / "log.txt"]
    for process in range(submission.processes):
        paths += [Path(submission.folder) / f"{job}_{process}_log.{end}" for end in ("err", "out")]
    texts = {path: path.read_text(errors="replace").strip() for path in paths if path.exists()}
    for path, text in texts.items():
        if text:
            print(f"==> {path} <==\n{text}")
    if not any(texts.values()):
        print(f"{run} has printed nothing yet")
    return 0


def cancel(ledger: Ledger, totals: dict[str, int]) -> int:
    """End the jobs of these runs, or of all; a job that holds several runs ends as a whole."""
    with ledger.lock():
        jobs = {state.job for state in ledger.states(totals) if state.kind in LIVE}
        slurm = [j for s in ledger.submissions() if s.cluster == "slurm" for j in s.jobs if j in jobs]
        for k in range(0, len(slurm), 500):
            ask("scancel", *slurm[k : k + 500])
        for job in jobs - set(slurm):
            with suppress(ProcessLookupError):  # it ended a moment ago
                os.kill(int(job), signal.SIGTERM)
    print(f"cancelled {len(jobs)} jobs; what they trained is kept, and submitting again resumes it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

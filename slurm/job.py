"""What a submitted job does: its runs, one after another. On the scheduler's signal it saves and asks to be requeued.

A job keeps nothing: what a requeued or resubmitted one has to do is what the run folders lack.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import submitit
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from liquiddiff.config import Run
from liquiddiff.record import Record, write_atomic

LOST = "its GPU answers no more"  # how the reason of such a failure begins
GRACE = 5  # seconds between the end of the first process, which requeues the job, and of the others


def state_path(folder: Path, job: str) -> Path:
    """Where a job notes the run that it is at, and those that failed: {"run": name, "failed": {name: reason}}."""
    return folder / f"{job}_state.json"


def read_state(path: Path) -> dict[str, Any]:
    """What a job noted there; of nothing, where it did not begin."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {"run": None, "failed": {}}


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler outside training, where nothing needs to be saved."""
    raise KeyboardInterrupt(number)


class Job:
    """Several runs of one grid, each with `threads` CPU threads a process. submitit pickles and calls it."""

    def __init__(self, runs: list[Run], threads: int, experiment: str | None):
        self.runs, self.threads, self.experiment = runs, threads, experiment

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again: the same job, as all it has done is on the disk."""
        return DelayedSubmission(self)

    def __call__(self) -> None:
        """Under a scheduler. Raises RuntimeError at the end where a run failed."""
        environment = submitit.JobEnvironment()
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's: it saves the job, requeues it and exits
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, interrupt)
        if environment.num_tasks > 1:  # one process a GPU; liquiddiff.distributed reads what this exports
            address = os.environ.get("MASTER_ADDR")  # of a site whose node names do not resolve
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            os.environ["MASTER_ADDR"] = address or os.environ["MASTER_ADDR"]
        try:
            failed = self.work(environment)
            if environment.num_tasks > 1:
                from liquiddiff import distributed

                distributed.stop()
        except KeyboardInterrupt as stop:
            leave(environment, requeue, stop.args)
        if failed:
            raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))

    def work(self, environment: Any) -> dict[str, str]:
        """Every run that is not done and did not fail before this job was requeued. Returns the failed ones and why."""
        path = state_path(Path(os.environ["SUBMITIT_FOLDER"]), environment.job_id)
        failed, main = read_state(path)["failed"], environment.global_rank == 0
        for run in [run for run in self.runs if run.name not in failed]:
            if main:
                write_atomic(path, json.dumps({"run": run.name, "failed": failed}))
            if reason := self.attempt(run, main):
                failed = {run.name: reason} | read_state(path)["failed"]  # of several processes the first tells why
                write_atomic(path, json.dumps({"run": None, "failed": failed}))
                if environment.num_tasks > 1:
                    sys.exit(reason)  # the other processes wait for this one: all of them must end
                if reason.startswith(LOST):
                    break  # submitted again, the same command does the rest
        return failed

    def attempt(self, run: Run, main: bool) -> str:
        """One run; its output goes to its log.txt. Returns why it failed, or nothing."""
        run = replace(run, threads=run.threads or self.threads)
        try:
            if main:
                Record(run).create()
            with to_log(Record(run).folder if main else None):
                return "see its log" if compute_run(run, self.experiment) else ""
        except Exception as error:  # a run's failure must not cost the others of its job
            from liquiddiff.device import is_lost

            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"{LOST}: {reason}" if is_lost(error) else reason


def compute_run(run: Run, experiment: str | None) -> int:
    """Train and evaluate, with progress on stderr. Returns the exit status; raises whatever a run can."""
    from experiments import screen
    from experiments.run import compute

    training = screen.Training(run)
    sampling = screen.Sampling(run, after=training)
    try:
        return compute(run, Record(run), training, sampling, wait=True, experiment=experiment)
    finally:
        training.close()
        sampling.close()


@contextmanager
def to_log(folder: Path | None) -> Iterator[None]:
    """Everything that is printed, by C as well, and an error's trace go to log.txt in `folder`, if there is one."""
    if folder is None:
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise
        return
    kept = os.dup(1), os.dup(2)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    for number in (1, 2):
        os.dup2(log, number)
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(log)


def leave(environment: Any, requeue: Any, signals: tuple[int, ...]) -> NoReturn:
    """After a signal, with everything saved.

    USR2 is a preemption or the time limit: requeue. TERM may be either or a cancellation, and the scheduler alone knows
    which, so this waits to be killed. A requeue kills every process of the job, so all others wait for it, though
    not for long: the first may be waiting for them in a collective, and there it is deaf to its own signal.
    """
    signal.signal(signal.SIGUSR2, requeue)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if environment.global_rank == 0 and signal.SIGUSR2 in signals:
        requeue(signal.SIGUSR2, None)
    if environment.global_rank:
        time.sleep(GRACE)
        sys.stdout.flush()
        os._exit(0)  # another status would make srun kill the first
    if environment.cluster == "slurm":
        time.sleep(3600)
    sys.exit(128 + signal.SIGTERM)

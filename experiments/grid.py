"""A grid of runs on this machine: `jobs` worker processes, each of them one run after another.

A worker that fails, or dies, costs its run only. Finished runs are skipped, unfinished ones resumed.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from statistics import median
from types import FrameType
from typing import Any

from tqdm import tqdm

from experiments.compose import Launch
from experiments.room import pace
from liquiddiff.config import BadInput, Run
from liquiddiff.record import Record, set_aside


def run_grid(launch: Launch, runs: list[Run]) -> int:
    """Run what is not done. Returns the exit status; raises KeyboardInterrupt once every worker has saved."""
    from experiments.run import check_same  # late: it imports this

    if launch.jobs < 1:
        raise BadInput(f"jobs={launch.jobs} must be positive")
    records = [Record(run) for run in runs]
    if launch.dry:
        show_plan(records)
        return 0
    if launch.force:
        for record in records:
            set_aside(record)
    todo = [record for record in records if not record.done]
    for record in records:
        if record.done:
            check_same(record.run, record)
    print(f"{len(records)} runs, {len(records) - len(todo)} done already, {launch.jobs} at a time", flush=True)
    failed: list[tuple[Record, str]] = []
    if todo:
        from liquiddiff import sources  # late, as they import torch: a finished grid has nothing to wait for
        from liquiddiff.device import cores, resolve_device

        resolve_device(launch.device, use=False)  # what is wrong with all of them is told once
        sources.find(launch.data)
        todo[0].create()

        threads = launch.threads or max(1, cores() // launch.jobs)
        failed = Pool([record_with(record, threads) for record in todo], launch).run()
    for record, reason in failed:
        print(f"failed: {record.folder.name}: {reason} (its log: {record.folder / 'log.txt'})", file=sys.stderr)
    print(f"{len(records) - len(failed)} of {len(records)} runs done; runs are in {records[0].out}")
    return 1 if failed else 0


def record_with(record: Record, threads: int) -> Record:
    """The same run with its share of the cores; threads are not part of a signature."""
    return Record(replace(record.run, threads=threads))


def state_of(record: Record) -> tuple[str, int]:
    """`done`, `part`, `new` or `trained`, of which the weights are there already; and the images trained so far."""
    if record.done:
        return "done", record.run.optim.images
    images = max((row["images"] for row in record.rows() if "images" in row), default=0)
    if not images and record.twin():
        return "trained", record.run.optim.images
    return ("part" if images else "new"), images


def show_plan(records: list[Record]) -> None:
    """The grid with its budgets, states and the minutes that are left.

    These are what the committed rows took, by arm and, where there are none, by multiply-adds; scaled to this machine
    by the runs that are done.
    """
    from liquiddiff import budget

    rows = pace()

    first = {(r.run.model.size, r.run.image_shape): r.run for r in records}
    base = {key: budget.meta_cost(budget.baseline(run.model), run.image_shape) for key, run in first.items()}
    costs: dict[str, Any] = {}

    def expected(run: Run) -> float:
        """Seconds an image where there are such rows, else what is proportional to them."""
        arms, macs = rows.get((run.tier, run.data.name), {}), costs[run.signature()].macs
        each = [seconds / at for (_, at), seconds in arms.items()]
        return arms.get((run.arm, macs)) or macs * (median(each) if each else 1)

    speeds: dict[tuple[str, str], list[float]] = {}  # of this machine, beside what was expected
    for record in records:
        run, key = record.run, record.run.signature()
        costs[key] = costs.get(key) or budget.meta_cost(run.model, run.image_shape)
        if record.done:
            seconds = json.loads((record.folder / "done").read_text())["seconds"]
            speeds.setdefault((run.tier, run.data.name), []).append(seconds / (run.optim.images * expected(run)))
    print(f"{'run':44}{'params':>10}{'':>9}{'MACs':>10}{'':>9}  state        minutes left")
    total = 0.0
    for record in records:
        run, mine = record.run, costs[record.run.signature()]
        theirs = base[(run.model.size, run.image_shape)]
        state, images = state_of(record)
        kind = run.tier, run.data.name
        speed = median(speeds[kind]) if kind in speeds else 1 if kind in rows else None
        left = (run.optim.images - images) * expected(run) * speed / 60 if speed else None
        total += left or 0
        params = f"{budget.human(mine.params):>10}{100 * (mine.params / theirs.params - 1):+8.1f}%"
        macs = f"{budget.human(mine.macs):>10}{100 * (mine.macs / theirs.macs - 1):+8.1f}%"
        share = f"{state} {100 * images // run.optim.images} %" if state == "part" else state
        print(f"{record.folder.name:44}{params}{macs}  {share:12} {'?' if left is None else f'{left:.1f}'}")
    done = sum(record.done for record in records)
    source = f"by the {done} done" if done else "at the pace of the rooms' results.csv"
    print(
        f"{len(records)} runs, {done} done" + (f"; {total:.0f} minutes of one process left, {source}" if total else "")
    )


class Pool:
    """Workers, what each is doing, and one progress bar over all images."""

    def __init__(self, todo: list[Record], launch: Launch):
        self.queue = list(todo)
        self.experiment = launch.experiment
        self.total = len(todo)
        self.failed: list[tuple[Record, str]] = []
        self.busy: dict[Connection, tuple[Any, Record, float]] = {}  # pipe: (process, run, start)
        self.deaths: Counter[str] = Counter()  # in a row, of the workers of a slot
        self.images = {record.folder.name: 0 for record in todo}
        tty = sys.stderr.isatty()
        self.bar = tqdm(
            total=sum(r.run.optim.images for r in todo), unit="img", unit_scale=True, smoothing=0.02,
            mininterval=0.5 if tty else 60, ncols=None if tty else 100,
        )  # fmt: skip
        for slot in range(min(launch.jobs, len(todo))):
            self.start_worker(str(slot))

    def start_worker(self, slot: str) -> None:
        """A fresh process (spawned: CUDA and OpenMP do not survive a fork) on the next run; it has its slot's name."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, name=slot, args=(theirs, self.experiment, int(slot)))
        process.start()
        theirs.close()
        self.hand_over(ours, process)

    def hand_over(self, pipe: Connection, process: Any) -> None:
        """Give a free worker the next run, or leave to go."""
        if self.queue:
            record = self.queue.pop(0)
            self.busy[pipe] = (process, record, time.monotonic())
            with contextlib.suppress(OSError):  # a dead worker is met in `listen`
                pipe.send(record.run)
        else:
            self.busy.pop(pipe, None)
            with contextlib.suppress(OSError):  # it may have died since its last word
                pipe.send(None)
            process.join()

    def run(self) -> list[tuple[Record, str]]:
        """Until the queue is empty. Returns the failed runs and why."""
        try:
            while self.busy:
                for pipe in wait(list(self.busy)):
                    assert isinstance(pipe, Connection)
                    self.listen(pipe)
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            self.bar.close()
        return self.failed

    def listen(self, pipe: Connection) -> None:
        """One message of a worker: images trained, or (status, reason)."""
        process, record, begin = self.busy[pipe]
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            process.join()
            self.finished(record, f"its process died (exit code {process.exitcode})", begin)
            del self.busy[pipe]
            self.deaths[process.name] += 1
            if self.queue and (self.deaths[process.name] < 2 or not self.busy):  # its GPU may be broken: leave the rest
                self.start_worker(process.name)  # of the queue to others, where there are any
            return
        if isinstance(message, int):
            self.bar.update(message - self.images[record.folder.name])
            self.images[record.folder.name] = message
        else:
            self.finished(record, message[1], begin)
            self.deaths[process.name] = 0
            self.hand_over(pipe, process)

    def finished(self, record: Record, reason: str, begin: float) -> None:
        """One line a run."""
        if reason:
            self.failed.append((record, reason))
        last = (record.evaluations() or [{}])[-1]
        figures = "".join(f"  {k} {last[k]:.4g}" for k in ("fd", "fd_pixel") if last.get(k) is not None)
        outcome = f"FAILED: {reason}" if reason else f"done{figures}  {time.monotonic() - begin:.0f} s"
        count = self.total - len(self.queue) - len(self.busy) + 1
        tqdm.write(f"[{max(count, 1)}/{self.total}] {record.run.arm} s{record.run.seed}  {outcome}", file=sys.stderr)

    def stop(self) -> None:
        """Ctrl-C: every worker saves its checkpoint."""
        for process, _, _ in self.busy.values():
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(process.pid, signal.SIGTERM)
        for pipe, (process, _, _) in self.busy.items():
            with contextlib.suppress(OSError):
                pipe.send(None)  # to one that was between two runs
            process.join()


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM in a worker: after it no run may begin, whatever else goes wrong; see `deferred_interrupt`."""
    raise KeyboardInterrupt(number)


def work(pipe: Connection, experiment: str | None = None, slot: int = 0) -> None:
    """Worker process: runs from `pipe`, progress and outcomes back; each run's output goes to its log.txt.

    Of several GPUs it takes the one of its `slot`.
    """
    from experiments.run import compute
    from liquiddiff.device import is_lost, take_share

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches every process; one signal is enough
    while True:
        try:
            run = pipe.recv()
        except (KeyboardInterrupt, EOFError):
            return
        if run is None:
            return
        record = Record(run)
        reason = ""
        try:
            record.create()
            log = os.open(record.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            sys.stdout.flush()  # what was printed before belongs where it was printed
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            if run.device in ("auto", "cuda"):
                take_share(slot)
            # Another worker may hold it for a moment, as the teacher of a reflow run.
            if compute(run, record, lambda images, loss: pipe.send(images), lambda evaluations: None, True, experiment):
                reason = "see its log"
        except KeyboardInterrupt:
            return
        except Exception as error:  # a run's failure must not end the grid
            if isinstance(error, BadInput):
                print(error, file=sys.stderr)
            else:
                traceback.print_exc()
            if is_lost(error):  # a fresh process may find the GPU well
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)
            reason = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}".splitlines()[0]
        sys.stdout.flush()
        with contextlib.suppress(BrokenPipeError):
            pipe.send((run.name, reason))

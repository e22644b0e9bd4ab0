"""What was submitted, what became of it, and the code that was submitted with it. All of it is under <out>/.slurm/.

    submissions.jsonl        a line a submission: its jobs, and the runs of each
    code/DIGEST/             the snapshot that its jobs import
    SUBMISSION/              submitit's files, and what each job notes of itself

No folder is ever listed: a status asks for files by name, so that ten thousand runs cost ten thousand `stat`s.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from liquiddiff.config import BadInput
from liquiddiff.record import CODE, code_version, write_atomic
from slurm.job import read_state, state_path

ROOT = Path(__file__).resolve().parents[1]
NAME = "liquiddiff"  # of every job
TAIL = 4096  # bytes at the end of metrics.jsonl that hold its last training line


@dataclass
class Submission:
    """An array of jobs, or the jobs started on this machine at once."""

    name: str
    cluster: str  # slurm, local
    profile: str
    code: str  # the snapshot
    commit: str
    dirty: bool
    folder: str  # of submitit's files
    processes: int = 1  # of a run
    jobs: dict[str, list[str]] = field(default_factory=dict)  # job: its runs
    totals: dict[str, int] = field(default_factory=dict)  # run: its budget in images


@dataclass
class State:
    """Of one run: `done`, `running`, `queued`, `failed`, `stale` (its job is gone), or `new` (never submitted)."""

    run: str
    kind: str
    images: int = 0
    total: int = 0
    speed: float = 0.0  # images per second, of the last line
    job: str = ""
    reason: str = ""

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the last speed."""
        return (self.total - self.images) / self.speed if self.speed and self.kind == "running" else None


class Ledger:
    """The submissions of one `out`."""

    def __init__(self, out: Path):
        self.out = out.resolve()
        self.home = self.out / ".slurm"
        self.path = self.home / "submissions.jsonl"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One launcher at a time: two that submit at once would submit twice."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            file = open(self.home / "lock", "a")
        except OSError as error:
            raise BadInput(
                f"cannot write to {self.home}: {error.strerror}. Choose another place with out=DIR"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def submissions(self) -> list[Submission]:
        """Every submission, oldest first. A line torn by a kill or a full disk is left out, and told."""
        found, torn = [], 0
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(Submission(**json.loads(line)))
            except json.JSONDecodeError:
                torn += bool(line)
        if torn:
            print(f"note: {torn} torn line in {self.path}; squeue -n {NAME} shows what it was of", file=sys.stderr)
        return found

    def add(self, submission: Submission) -> None:
        """Note what was submitted. Raises OSError, leaving the file as it was."""
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            line = b"\n" * self._torn() + json.dumps(asdict(submission)).encode() + b"\n"
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def _torn(self) -> bool:
        """The file ends within a line."""
        content = self.path.read_bytes()
        return bool(content) and not content.endswith(b"\n")

    def states(self, totals: dict[str, int]) -> list[State]:
        """Of the runs named, which have these budgets; of every run ever submitted where none is named."""
        last: dict[str, tuple[Submission, str]] = {}
        for submission in self.submissions():
            for job, runs in submission.jobs.items():
                last |= {run: (submission, job) for run in runs}
        totals = totals or {run: submission.totals[run] for run, (submission, _) in last.items()}
        live = alive([last[run] for run in totals if run in last])
        notes: dict[Path, dict] = {}
        return [self._state(run, total, last.get(run), live, notes) for run, total in totals.items()]

    def _state(
        self,
        run: str,
        total: int,
        last: tuple[Submission, str] | None,
        live: dict[Path, str],
        notes: dict[Path, dict],
    ) -> State:
        if (self.out / run / "done").exists():
            return State(run, "done", total, total, job=last[1] if last else "")
        if last is None:
            return State(run, "new", total=total)
        note = state_path(Path(last[0].folder), last[1])
        if note not in notes:
            notes[note] = read_state(note)
        images, speed = progress(self.out / run)
        state = State(run, "stale", images, total, speed, last[1])
        if run in notes[note]["failed"]:
            state.kind, state.reason = "failed", notes[note]["failed"][run]
        elif note in live:
            state.kind = "running" if live[note] == "RUNNING" and notes[note]["run"] == run else "queued"
        return state

    def snapshot(self) -> tuple[Path, str, bool]:
        """A copy of the code as it is now, its commit, and whether it differs from it. Made once for each content."""
        files = [path for package in CODE for path in sorted((ROOT / package).rglob("*"))]
        files = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
        digest = hashlib.sha256()
        for path in files:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT)} {len(content)} ".encode() + content)
        commit, diff = code_version(ROOT)
        digest.update(f"{commit} {diff}".encode())
        home = self.home / "code" / digest.hexdigest()[:16]
        if not home.exists():
            temporary = home.with_name(f".{home.name}.{os.getpid()}")
            for path in files:
                target = temporary / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            write_atomic(temporary / "snapshot.json", json.dumps({"commit": commit, "diff": diff}))  # code_version's
            os.replace(temporary, home)
        return home, commit, bool(diff)


def progress(folder: Path) -> tuple[int, float]:
    """Images trained and images per second, by the last training line of metrics.jsonl."""
    with suppress(OSError), open(folder / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError):  # torn by a kill, or by where the tail begins
                row = json.loads(line)
                if isinstance(row, dict) and "images" in row:
                    return row["images"], row.get("images_per_second") or 0.0
    return 0, 0.0


def alive(jobs: list[tuple[Submission, str]]) -> dict[Path, str]:
    """{a job's `state_path`: RUNNING, PENDING, ...} of those that Slurm or this machine still has. Raises BadInput."""
    live: dict[Path, str] = {}
    known: dict[str, str] = {}
    if any(submission.cluster == "slurm" for submission, _ in jobs):
        known = dict(line.split() for line in ask("squeue", "-h", "-r", "-n", NAME, "-o", "%i %T"))  # whoever's
    for submission, job in jobs:
        path = state_path(Path(submission.folder), job)
        if submission.cluster == "slurm" and job in known:
            live[path] = "RUNNING" if known[job] == "COMPLETING" else known[job]
        elif submission.cluster == "local":
            with suppress(OSError):  # a process number is used again: the command must be this job's
                if submission.folder in Path(f"/proc/{job}/cmdline").read_text():
                    live[path] = "RUNNING"
    return live


def ask(*command: str) -> list[str]:
    """The lines that a command of Slurm's prints. Raises BadInput where it cannot be had."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInput(f"{command[0]} does not work here ({error}); cluster=local needs no Slurm") from error
    if done.returncode:
        why = " ".join(done.stderr.split())[:200]
        raise BadInput(f"{command[0]} failed: {why}. Nothing was changed; give the same command when Slurm answers")
    return done.stdout.splitlines()

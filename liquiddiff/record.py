"""The run folder: provenance, metrics.jsonl, the lock.

<out>/<arm>-<signature>-s<seed>/   run.yaml env.json metrics.jsonl done model/ *.png checkpoint.pt
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from liquiddiff.config import BadInput, Run, from_dict

CODE = ("liquiddiff", "experiments", "analysis", "slurm")  # the folders that a run's code comes from
PACKAGES = "torch torchvision torch-fidelity numpy datasets mlflow hydra-core liquiddiff".split()
FACTS = "commit dirty device precision data_fingerprint started params macs seconds peak_mib".split()


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Record:
    """Everything that a run leaves, under `folder`."""

    def __init__(self, run: Run, out: str | Path | None = None):
        self.run = run
        self.out = Path(out or run.out).expanduser()
        self.folder = self.out / run.name

    def tracking_uri(self) -> str:
        """MLFLOW_TRACKING_URI, or a SQLite file beside the run folders."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(self.out / 'mlflow.db').resolve()}"

    @property
    def done(self) -> bool:
        """Trained and evaluated."""
        return (self.folder / "done").exists()

    def create(self) -> None:
        """Make the folder. Raises BadInput where that cannot be."""
        if set("?%") & set(str(self.out.resolve())) and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise BadInput(f"out={self.out}: MLflow takes no ? or % in the path of its database; use another out=")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "lock").touch()
        except OSError as error:
            raise BadInput(
                f"cannot write to {self.folder}: {error.strerror}. Choose another place with out=DIR"
            ) from error

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Hold the run for this process. The kernel drops the lock with the process, however it ends.

        Raises BadInput where another holds it, or with `wait` waits until it does not.
        """
        with open(self.folder / "lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise BadInput(
                    f"{self.folder} is being written by another process; wait for it, or use another out="
                ) from error
            except OSError as error:
                raise BadInput(
                    f"{self.folder} cannot be locked ({error.strerror}): its file system has no flock; use another out="
                ) from error
            here = self.folder / "lock"
            if not here.exists() or not os.path.samestat(os.fstat(file.fileno()), here.stat()):
                raise BadInput(f"{self.folder} was set aside by another process; give the command again")
            yield

    def describe(self) -> None:
        """Write run.yaml. The caller holds the lock."""
        write_atomic(self.folder / "run.yaml", yaml.safe_dump(asdict(self.run), sort_keys=False))

    def provenance(self, device: str, precision: str, fingerprint: str, **more: Any) -> None:
        """Write env.json: where, with what and on which data this run was computed."""
        commit, diff = own_code()
        if diff:
            write_atomic(self.folder / "dirty.diff", diff + "\n")
        else:
            (self.folder / "dirty.diff").unlink(missing_ok=True)  # of the code before it was resumed
        versions = {}
        for package in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        environment = {
            "commit": commit,
            "dirty": bool(diff),
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": versions,
            "host": platform.node(),
            "device": device,
            "precision": precision,
            "data_fingerprint": fingerprint,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **more,
        }
        write_atomic(self.folder / "env.json", json.dumps(environment, indent=1) + "\n")

    def env(self) -> dict[str, Any]:
        """env.json, or {} before it is written."""
        path = self.folder / "env.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl. Non-finite numbers become null, so that every line is JSON."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line torn by a kill is left out."""
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def rewind(self, images: int, source: "Record | None" = None) -> None:
        """Keep the training lines (of `source`, if given) up to `images`; what follows will write the others again."""
        kept = [row for row in (source or self).rows() if row.get("images", math.inf) <= images]
        write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def trained(self) -> None:
        """Note where the weights of this training configuration and seed are, for `weights`."""
        if not (self.folder / "checkpoint.pt").exists():  # a twin, which only evaluates another's
            return
        self._index().parent.mkdir(exist_ok=True)
        write_atomic(self._index(), self.folder.name)

    def weights(self) -> "Record | None":
        """A run under the same `out` with the same training configuration and seed that is trained."""
        if not self._index().exists():
            return None
        folder = self.out / self._index().read_text()
        found = Record(read_run(folder), self.out) if (folder / "checkpoint.pt").exists() else None
        return found if found and found.folder == folder else None

    def twin(self) -> "Record | None":
        """As `weights`, but another run than this."""
        found = self.weights()
        return found if found and found.folder != self.folder else None

    def _index(self) -> Path:
        return self.out / ".trained" / f"{self.run.training_signature()}-s{self.run.seed}"

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation lines."""
        return [row for row in self.rows() if "nfe" in row]

    def facts(self) -> dict[str, Any]:
        """What a table says of a run beside its scores: from env.json and done, and the median speed."""
        done = json.loads((self.folder / "done").read_text() or "{}") if self.done else {}
        known = self.env() | done
        speeds = [row["images_per_second"] for row in self.rows() if row.get("images_per_second") is not None]
        facts = {key: known[key] for key in FACTS if known.get(key) is not None}
        if known.get("trained_by"):  # not the code that measured the weights, perhaps later
            facts["commit"] = "+".join(known["trained_by"])
        references = [{"reference": row["reference"]} for row in self.evaluations() if "reference" in row]
        speed = {"images_per_second": statistics.median(speeds)} if speeds else {}
        return facts | (references or [{}])[-1] | speed

    def finish(self, **totals: float) -> None:
        """Mark the run done, with its totals."""
        write_atomic(self.folder / "done", json.dumps({k: round(v, 1) for k, v in totals.items()}) + "\n")


class Follower(Record):
    """The record in the other processes of a run on several devices: it reads, and writes nothing."""

    def create(self) -> None:
        """Process 0 does."""

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Process 0 holds it."""
        yield

    def describe(self) -> None:
        """Process 0 does."""

    def provenance(self, device: str, precision: str, fingerprint: str, **more: Any) -> None:
        """Process 0 does."""

    def write(self, row: dict[str, Any]) -> None:
        """Process 0 does."""

    def rewind(self, images: int, source: "Record | None" = None) -> None:
        """Process 0 does."""

    def trained(self) -> None:
        """Process 0 does."""

    def finish(self, **totals: float) -> None:
        """Process 0 does."""


@functools.cache
def own_code() -> tuple[str, str]:
    """`code_version` of this process, asked once: a worker keeps what it has loaded while the checkout moves on."""
    return code_version(Path(__file__).resolve().parents[1])


def code_version(root: Path) -> tuple[str, str]:
    """(commit, difference from it, new files included) of the code at `root`; both empty where nothing is known.

    A snapshot, which may lie in a working tree that has moved on, carries its own (slurm/ledger.py).
    """
    if (root / "snapshot.json").exists():
        known = json.loads((root / "snapshot.json").read_text())
        return known["commit"], known["diff"]

    def git(*command: str) -> str:
        with contextlib.suppress(FileNotFoundError):  # no git on the machine
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, errors="replace")
            return done.stdout.strip("\n") if done.returncode < 2 else ""  # 1: `diff --no-index` found a difference
        return ""

    new = git("ls-files", "--others", "--exclude-standard", "--", *CODE).splitlines()
    new = [name for name in new if name.endswith((".py", ".yaml", ".c"))]
    diff = ("diff", "--no-ext-diff", "--no-color")
    parts = [git(*diff, "HEAD"), *(git(*diff, "--no-index", "--", "/dev/null", name) for name in new)]
    return git("rev-parse", "HEAD"), "\n".join(filter(None, parts))


def set_aside(record: Record) -> None:
    """force=true: rename an old folder, never delete it. Raises BadInput where another process holds the run."""
    if not record.folder.exists():
        record._index().unlink(missing_ok=True)
    else:
        with record.lock():
            record._index().unlink(missing_ok=True)  # its weights are not to be had again by way of `twin`
            k = 1
            while (aside := record.folder.with_name(f"{record.folder.name}.old{k}")).exists():
                k += 1
            os.rename(record.folder, aside)
        print(f"kept the old run as {aside}")


def read_run(folder: Path) -> Run:
    """The `Run` of a folder, from its run.yaml. Raises BadInput where there is none, or it is no YAML."""
    try:
        return from_dict(Run, yaml.safe_load((folder / "run.yaml").read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"{folder} is not a run folder: it has no readable run.yaml") from error

"""The mirror of run folders in MLflow. metrics.jsonl is written first and has everything, so this may fail or lag.

Any number of processes may write to one store: each sends its new lines in batches, tries again where the store is
busy, and sends nothing twice.
"""

import fcntl
import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from liquiddiff.config import flatten
from liquiddiff.record import Record, write_atomic

SHARE = 0.01  # of a run's time may go into its mirror before it is done
FIRST = 5.0  # seconds that the first call is expected to take: MLflow's import and a run's creation
BATCH = 500  # points, and the line that reaches it, in a call: MLflow takes 1,000
ATTEMPTS = 5  # at a store that is busy
NOTE = "Scores (fd_*, kid, precision, recall): the step is NFE. loss, val_loss: the step is images seen."


class Mirror:
    """Tells MLflow of a run's progress whenever that costs less than SHARE of the time since it was made."""

    def __init__(self, record: Record, tags: dict[str, str]):
        self.record, self.tags = record, tags
        self.begin, self.spent, self.last = time.monotonic(), 0.0, FIRST

    def __call__(self) -> None:
        """At a checkpoint: now, or at a later one."""
        begin = time.monotonic()
        if self.spent + self.last > SHARE * (begin - self.begin):
            return
        mirror_to_mlflow(self.record, self.tags)
        self.last = time.monotonic() - begin
        self.spent += self.last


def mirror_to_mlflow(record: Record, tags: dict[str, str], artifacts: bool = False) -> bool:
    """Bring MLflow up to date with the run folder: parameters, tags, every new line; with `artifacts` also files.

    A tag `experiment` makes it a child of the run of that name and tier. Returns False, after one line on stderr,
    where MLflow cannot be reached: no run fails for that, and `python -m analysis.sync` makes up for it.
    """
    for key, value in (
        ("DISABLE_TELEMETRY", "true"),
        ("HTTP_REQUEST_MAX_RETRIES", "2"),
        ("HTTP_REQUEST_TIMEOUT", "10"),
    ):
        os.environ.setdefault(f"MLFLOW_{key}", value)
    uri = record.tracking_uri()
    if record.mlflow_failed and not record.done:  # a dead server costs its timeout once, not at every checkpoint
        return False
    try:
        for attempt in range(ATTEMPTS):
            try:
                _mirror(record, tags, artifacts, uri)
                return True
            except Exception as error:
                if "locked" not in str(error) or attempt == ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0, 2**attempt))
    except Exception as error:  # whatever a tracking server can throw must not cost the run
        record.mlflow_failed = True
        line = str(error).strip().splitlines()[:1] or [type(error).__name__]
        print(f"MLflow at {uri} was not updated ({line[0][:160]}); the run folder has everything", file=sys.stderr)
    return False


def _mirror(record: Record, tags: dict[str, str], artifacts: bool, uri: str) -> None:
    import mlflow.entities
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)

    path = record.folder / "mlflow.json"
    state = json.loads(path.read_text()) if path.exists() else {}

    def save(**changes: Any) -> None:
        state.update(changes)
        write_atomic(path, json.dumps(state) + "\n")

    if "experiment" in tags:
        save(experiment=tags["experiment"])
    elif "experiment" in state:  # analysis.sync does not know it
        tags = tags | {"experiment": state["experiment"]}
    if not tags.get("room") and "experiment" in tags:  # the baseline stands in no room of its own
        tags = tags | {"room": tags["experiment"]}
    # One process at a time where `out` is shared: SQLite has one writer, and processes that make a store at once crash.
    with open(record.out / "mlflow.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri)
        if state.get("uri") != uri or not _holds(client, state["run_id"]):
            experiment = _experiment(client, record, uri)
            if "experiment" in tags:
                tags = tags | {"mlflow.parentRunId": _parent(client, experiment, tags)}
            name = f"{record.run.arm}-s{record.run.seed}"
            made = client.create_run(experiment, _started(record), tags, name)
            save(
                uri=uri, run_id=made.info.run_id, lines=0, time=None
            )  # at once: a kill must not leave a second run behind
            params = [mlflow.entities.Param(k, str(v)) for k, v in flatten(record.run).items()]
            for k in range(0, len(params), 100):
                client.log_batch(state["run_id"], params=params[k : k + 100])
        rows = record.rows()
        sent = min(state["lines"], len(rows))
        while sent < len(rows):
            # The time is fixed before it is sent: what a kill or a retry sends again, the store knows and leaves out.
            points: list[Any] = []
            upto, now = sent, state.get("time") or int(1000 * time.time())
            while upto < len(rows) and len(points) < BATCH:
                points += [mlflow.entities.Metric(name, value, now, step) for name, value, step in _points(rows[upto])]
                upto += 1
            save(time=now)
            client.log_batch(state["run_id"], metrics=points)
            save(time=None, lines=upto)
            sent = upto
        save(lines=len(rows))
        if artifacts:
            for file_path in sorted(record.folder.glob("*")):
                if file_path.suffix in {".png", ".yaml", ".json", ".jsonl", ".diff"} and file_path != path:
                    client.log_artifact(state["run_id"], str(file_path))
        if record.done:
            facts = [mlflow.entities.RunTag(key, str(value)) for key, value in record.facts().items()]
            client.log_batch(state["run_id"], tags=facts)
            began, seconds = _started(record), record.facts().get("seconds")
            end = began + round(1000 * seconds) if began and seconds is not None else None
            client.set_terminated(state["run_id"], "FINISHED", end)
        else:
            client.update_run(state["run_id"], "RUNNING")


def _experiment(client: Any, record: Record, uri: str) -> str:
    """MLflow's id of what it calls an experiment: one for the whole suite."""
    if found := client.get_experiment_by_name("liquiddiff"):
        return found.experiment_id
    location = (record.out / "mlruns").resolve().as_uri() if uri.startswith("sqlite:") else None
    return client.create_experiment("liquiddiff", location, {"mlflow.note.content": NOTE})


def _started(record: Record) -> int | None:
    """When the run began, in ms since 1970, so that MLflow shows its duration and not the mirror's."""
    started = record.facts().get("started")
    return round(1000 * datetime.fromisoformat(started).timestamp()) if started else None


def _parent(client: Any, experiment: str, tags: dict[str, str]) -> str:
    """The run under which MLflow shows those of one room and tier; never finished, so that no reader counts it."""
    heading = {"heading": tags["experiment"], "tier": tags.get("tier", "")}
    query = " and ".join(f"tags.{key} = '{value}'" for key, value in heading.items())
    if found := client.search_runs([experiment], query, max_results=1):
        return found[0].info.run_id
    made = client.create_run(experiment, run_name=tags["experiment"], tags=heading)
    client.update_run(made.info.run_id, "SCHEDULED")
    return made.info.run_id


def _holds(client: Any, run_id: str) -> bool:
    """Whether the store still has the run: it may have been lost, or be another one at the same address."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _points(row: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """(metric, value, step) of a line: training by images, evaluation by NFE; fd is fid on Inception alone (rule 4)."""
    extractor = row.get("extractor")
    step = round(row.get("nfe" if extractor else "images", 0))  # an adaptive solver's NFE is a mean
    for key, value in row.items():
        if isinstance(value, int | float) and key not in {"images", "nfe", "floor"}:
            if extractor and key == "fd":
                key = "fid" if extractor == "inception" else f"fd_{extractor}"
            if row.get("floor"):
                yield f"floor/{key}", float(value), step  # the slash gives them a section of their own
            elif key != "n":
                yield key, float(value), step

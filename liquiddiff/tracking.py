"""The mirror of run folders in MLflow. metrics.jsonl is written first and has everything, so this may fail or lag.

Any number of processes may write to one store: each sends its new lines in batches, tries again where the store is
busy, and sends nothing twice. Those of one `out` take turns at SQLite, which has one writer; a server serves all.
"""

import fcntl
import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
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
        sent = mirror_to_mlflow(self.record, self.tags, wait=False)
        cost = time.monotonic() - begin
        self.spent += cost
        self.last = cost if sent else max(cost, self.last)


def mirror_to_mlflow(record: Record, tags: dict[str, str], artifacts: bool = False, wait: bool = True) -> bool:
    """Bring MLflow up to date with the run folder: parameters, tags, every new line; with `artifacts` also files.

    A tag `experiment` makes it a child of the run of that name and tier. Returns False, after one line on stderr,
    where MLflow cannot be reached: no run fails for that, and `python -m analysis.sync` makes up for it. Without `wait`
    also, and silently, where it is another process's turn.
    """
    for key, value in (
        ("DISABLE_TELEMETRY", "true"),
        ("HTTP_REQUEST_MAX_RETRIES", "2"),
        ("HTTP_REQUEST_TIMEOUT", "10"),
    ):
        os.environ.setdefault(f"MLFLOW_{key}", value)
    uri = record.tracking_uri()
    try:
        for attempt in range(ATTEMPTS):
            try:
                _mirror(record, tags, artifacts, uri, wait)
                return True
            except BlockingIOError:
                return False
            except Exception as error:
                if "locked" not in str(error) or attempt == ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0, 2**attempt))
    except Exception as error:  # whatever a tracking server can throw must not cost the run
        line = str(error).strip().splitlines()[:1] or [type(error).__name__]
        print(f"MLflow at {uri} was not updated ({line[0][:160]}); the run folder has everything", file=sys.stderr)
    return False


def _mirror(record: Record, tags: dict[str, str], artifacts: bool, uri: str, wait: bool) -> None:
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
    with ExitStack() as turn:
        # SQLite has one writer, and in any store processes that begin at once make things twice, or crash.
        if uri.startswith("sqlite:") or state.get("uri") != uri:
            file = turn.enter_context(open(record.out / "mlflow.lock", "a"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        client = MlflowClient(tracking_uri=uri)
        held = "run_id" in state and _holds(client, state["run_id"])
        if held and state.get("uri") != uri:  # the store was moved, or copied, with its runs
            save(uri=uri)
        if not held:
            experiment = _experiment(client, record, uri)
            if "experiment" in tags:
                tags = tags | {"mlflow.parentRunId": _parent(client, experiment, tags)}
            name = f"{record.run.arm}-s{record.run.seed}"
            made = client.create_run(experiment, _started(record), tags, name)
            # Noted at once: a kill must not leave a second run behind.
            save(uri=uri, run_id=made.info.run_id, lines=0, time=None)
            params = [mlflow.entities.Param(k, str(v)) for k, v in flatten(record.run).items()]
            for k in range(0, len(params), 100):
                client.log_batch(state["run_id"], params=params[k : k + 100])
        if not uri.startswith("sqlite:"):
            turn.close()
        rows = record.rows()
        while state["lines"] < len(rows):
            # The time is fixed before it is sent: what a kill or a retry sends again, the store knows and leaves out.
            points: list[Any] = []
            upto, now = state["lines"], state.get("time") or int(1000 * time.time())
            while upto < len(rows) and len(points) < BATCH:
                points += [mlflow.entities.Metric(name, value, now, step) for name, value, step in _points(rows[upto])]
                upto += 1
            save(time=now)
            client.log_batch(state["run_id"], metrics=points)
            save(time=None, lines=upto)
        if artifacts:
            for file_path in sorted(record.folder.glob("*")):
                if file_path.suffix in {".png", ".yaml", ".json", ".jsonl", ".diff"} and file_path != path:
                    client.log_artifact(state["run_id"], str(file_path))
        if record.done:
            floor = next((row for row in rows if row.get("floor")), {})
            facts = record.facts() | {f"floor_{key}": floor[key] for key in floor if key != "floor"}
            known = [mlflow.entities.RunTag(k, str(v)) for k, v in facts.items() if v is not None]
            client.log_batch(state["run_id"], tags=known)
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
    try:
        return client.create_experiment("liquiddiff", location, {"mlflow.note.content": NOTE})
    except Exception:
        if found := client.get_experiment_by_name("liquiddiff"):  # a process of another `out` was faster
            return found.experiment_id
        raise


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
    if row.get("floor"):  # it has no step: a tag
        return
    extractor = row.get("extractor")
    step = round(row.get("nfe" if extractor else "images", 0))  # an adaptive solver's NFE is a mean
    for key, value in row.items():
        if isinstance(value, int | float) and key not in {"images", "nfe"}:
            if extractor and key == "fd":
                key = "fid" if extractor == "inception" else f"fd_{extractor}"
            if key != "n":
                yield key, float(value), step

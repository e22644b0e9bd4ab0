"""Finished runs, read from run folders or from MLflow: both give the same `Found`."""

import ast
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from liquiddiff.config import BadInput, Run, flatten, from_dict

FOLDER = re.compile(r"(?P<arm>.+)-(?P<signature>[0-9a-f]{8})-s(?P<seed>\d+)")
SCORES = ("fd", "fd_pixel", "kid", "precision", "recall")
FLOOR = ("n", "reference_n", *SCORES)
Row = dict[str, Any]
Wanted = Callable[[str], bool]  # by the arm's name


@dataclass
class Found:
    """A finished run: its configuration, what env.json and done say of it, and its scores."""

    run: Run
    signature: str  # under which it ran, which names its folder
    today: str  # what its configuration signs as now: another where keys were added since
    facts: Row
    evaluations: list[Row]  # nfe, n, extractor, solver, reference and SCORES
    floor: Row | None  # n, reference_n and SCORES
    folder: Path | None = None  # where it was read from one

    @property
    def started(self) -> float:
        """Seconds since 1970; 0 where it is not known."""
        text = self.facts.get("started")
        return datetime.fromisoformat(text).timestamp() if text else 0.0

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"{self.run.arm}-{self.signature}-s{self.run.seed}"


def from_folders(out: Path, wanted: Wanted = lambda arm: True) -> list[Found]:
    """The finished runs under `out`. Others, and what cannot be read, are named on stderr and left out."""
    found, unfinished = [], []
    for folder in sorted(out.iterdir()) if out.is_dir() else []:
        match = FOLDER.fullmatch(folder.name)
        if not match or not wanted(match["arm"]):
            continue
        if not (folder / "done").exists():
            unfinished.append(folder.name)
            continue
        try:
            found.append(_from_folder(folder, match["signature"]))
        except (BadInput, ValueError, TypeError, OSError) as error:
            print(f"left out {folder}: {' '.join(str(error).split())}", file=sys.stderr)
    if unfinished:
        more = f" and {len(unfinished) - 3} more" if len(unfinished) > 3 else ""
        print(f"left out, not finished: {', '.join(unfinished[:3])}{more}", file=sys.stderr)
    return found


def _from_folder(folder: Path, signature: str) -> Found:
    from liquiddiff.record import Record, read_run

    run = read_run(folder)
    record = Record(run, folder.parent)
    record.folder = folder  # its signature is the one that it ran under; today's code may give another
    rows = record.rows()
    facts = record.facts()
    for key in ("loss", "val_loss"):
        facts[key] = next((row[key] for row in reversed(rows) if key in row), None)
    floor = next((row for row in rows if row.get("floor")), None)
    return Found(run, signature, run.signature(), facts, record.evaluations(), floor, folder)


def from_mlflow(uri: str, wanted: Wanted = lambda arm: True) -> list[Found]:
    """The finished runs of an MLflow store.

    A SQL store is read by four queries, because the client needs minutes for 10,000 runs; any other by the client.
    """
    sql = uri.split(":")[0].split("+")[0] in {"sqlite", "postgresql", "mysql"}
    try:
        stored = _read_sql(uri) if sql else _read_client(uri)
    except Exception as error:  # no driver, no database, no tables: whatever SQLAlchemy can throw
        if not sql or isinstance(error, BadInput):
            raise
        line = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise BadInput(f"{uri} cannot be read as an MLflow store ({line[0][:160]})") from error
    found = []
    for params, tags, last, history in stored:
        if not wanted(tags.get("arm", "")):
            continue
        parsed = _parse_config(tuple(sorted(item for item in params.items() if item[0] != "seed")))
        if parsed is None:
            print(f"left out an MLflow run of {tags.get('arm')}: its parameters are not a Run", file=sys.stderr)
            continue
        run, today = replace(parsed[0], seed=int(params.get("seed", 0))), parsed[1]
        fd = "fid" if run.eval.extractor == "inception" else f"fd_{run.eval.extractor}"
        by_nfe: dict[int, Row] = defaultdict(dict)
        for key, nfe, value in history:
            if key == fd or key in SCORES:
                by_nfe[nfe]["fd" if key == fd else key] = value
        same = {"n": run.eval.n, "extractor": run.eval.extractor, "solver": run.eval.solver}
        same |= {"reference": tags.get("reference"), "weights": tags.get("floor_weights")}
        facts: Row = {**tags, "loss": last.get("loss"), "val_loss": last.get("val_loss")}
        # "None" was written for a score that could not be taken.
        known = {key: tags[f"floor_{key}"] for key in FLOOR if tags.get(f"floor_{key}", "None") != "None"}
        floor = {key: float(text) for key, text in known.items()}
        evaluations = [{"nfe": nfe, **same, **row} for nfe, row in sorted(by_nfe.items())]
        found.append(Found(run, tags.get("signature", today), today, facts, evaluations, floor or None))
    return found


Stored = tuple[dict[str, str], dict[str, str], dict[str, float], list[tuple[str, int, float]]]


def _read_sql(uri: str) -> Iterable[Stored]:
    """(params, tags, last metrics, [(key, nfe, value)]) of every finished run, by SQL."""
    import sqlalchemy as sa

    if uri.startswith("sqlite:") and not Path(uri.split("///", 1)[-1]).exists():
        raise BadInput(f"there is no MLflow store at {uri}; python -m analysis.sync makes one from run folders")
    engine = sa.create_engine(uri)
    of_runs = (
        "from {} join runs on runs.run_uuid = {}.run_uuid where status = 'FINISHED' and lifecycle_stage = 'active'"
    )
    params: dict[str, dict] = defaultdict(dict)
    tags: dict[str, dict] = defaultdict(dict)
    last: dict[str, dict] = defaultdict(dict)
    history: dict[str, list] = defaultdict(list)
    scores = f"(metrics.key in {('fid', *SCORES)} or metrics.key like 'fd\\_%' escape '\\')"
    # Runs of one signature have one configuration: the parameters of one of them, and the seed of each, are enough.
    first_of_each = (
        f"select min(tags.run_uuid) {of_runs.format('tags', 'tags')} and tags.key = 'signature' group by value"
    )
    needed = {
        "params": f"(params.key = 'seed' or params.run_uuid in ({first_of_each}))",
        "tags": "tags.key not like 'mlflow.%'",
        "latest_metrics": "latest_metrics.key in ('loss', 'val_loss')",
    }
    with engine.connect() as connection:
        for table, store in (("params", params), ("tags", tags), ("latest_metrics", last)):
            query = f"select {table}.run_uuid, {table}.key, {table}.value {of_runs.format(table, table)}"
            for run_id, key, value in connection.execute(sa.text(f"{query} and {needed[table]}")):
                store[run_id][sys.intern(key)] = value
        # In the order of logging, so that the last of a step that was logged twice wins.
        query = f"select metrics.run_uuid, metrics.key, step, metrics.value {of_runs.format('metrics', 'metrics')}"
        for run_id, key, step, value in connection.execute(sa.text(f"{query} and {scores} order by timestamp")):
            history[run_id].append((key, step, value))
    engine.dispose()
    ours = sorted(run_id for run_id in params if {"arm", "signature"} <= tags[run_id].keys())
    whole = {tags[run_id]["signature"]: params[run_id] for run_id in ours if len(params[run_id]) > 1}
    for run_id in ours:  # the seed and the arm's name are not part of a signature
        own = {"seed": params[run_id]["seed"], "arm": tags[run_id]["arm"]}
        params[run_id] = whole.get(tags[run_id]["signature"], {}) | own
    return [(params[run_id], tags[run_id], last[run_id], history[run_id]) for run_id in ours]


def _read_client(uri: str) -> Iterable[Stored]:
    """The same through mlflow's client, for a tracking server: a call for each metric of each run, 16 at a time."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)

    def histories(run: Any) -> list[tuple[str, int, float]]:
        keys = [k for k in run.data.metrics if k in SCORES or k == "fid" or k.startswith("fd_")]
        points = [(point, key) for key in keys for point in client.get_metric_history(run.info.run_id, key)]
        return [(key, p.step, p.value) for p, key in sorted(points, key=lambda point: point[0].timestamp)]

    try:
        runs: list[Any] = []
        ids, token = [experiment.experiment_id for experiment in client.search_experiments()], None
        while token != "":
            page = client.search_runs(ids, "attributes.status = 'FINISHED'", max_results=1000, page_token=token)
            runs, token = runs + list(page), page.token or ""
        with ThreadPoolExecutor(16) as pool:
            points = list(pool.map(histories, runs))
    except MlflowException as error:
        raise BadInput(f"cannot read MLflow at {uri}: {str(error).splitlines()[0][:200]}") from error
    return [(r.data.params, r.data.tags, r.data.metrics, h) for r, h in zip(runs, points, strict=True)]


@cache
def _parse_config(params: tuple[tuple[str, str], ...]) -> tuple[Run, str] | None:
    """The `Run` behind MLflow's parameters, which are strings, and its signature; None where they are not a Run's."""
    defaults = flatten(Run())
    nested: dict[str, Any] = {}
    try:
        for key, text in params:
            default = defaults.get(key)
            if default is None:  # an optional path
                value = None if text == "None" else text
            else:
                value = text if isinstance(default, str) else ast.literal_eval(text)
            *parents, leaf = key.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = value
        run = from_dict(Run, nested)
        return run, run.signature()
    except (BadInput, ValueError, SyntaxError, TypeError):
        return None

"""How long does collecting take? 10,000 runs in a real MLflow SQLite store: `python -m analysis.collect --benchmark`.

One run is logged by MLflow's own client; the others are copies of its rows, made by SQL, because the client would need
an hour. Making them takes about three minutes and 1.2 GB in the temporary folder.
"""

import sqlite3
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis import collect
from liquiddiff.config import Run
from liquiddiff.record import Record
from liquiddiff.tracking import mirror_to_mlflow


def lines() -> list[dict[str, Any]]:
    """A metrics.jsonl as long as a real one."""
    bins = {f"val_loss_t{k}": 0.2 for k in range(4)}
    scores = {"fd": 0.31, "fd_pixel": 0.34, "kid": 0.001, "precision": 0.7, "recall": 0.6}
    return [
        *({"images": 1500 * k, "loss": 1 / k, "lr": 1e-3, "images_per_second": 700.0} for k in range(1, 101)),
        *({"images": 15000 * k, "val_loss": 1 / k, **bins} for k in range(1, 11)),
        *(
            {"nfe": 2**k, "solver": "euler", "extractor": "digits", "n": 1797, "reference": "ab/1797", **scores}
            for k in range(6)
        ),
        {"floor": True, "extractor": "digits", "n": 898, "reference_n": 898, **scores},
    ]


def fill(out: Path, count: int) -> str:
    """A store of `count` runs of one arm, with seeds 0, 1, ...; returns its address."""
    record = Record(replace(Run(), seed=0), out)
    record.create()
    record.provenance("cpu", "fp32", "ab", params=600_000, macs=9_000_000)
    for line in lines():
        record.write(line)
    record.finish(seconds=240.0)
    if not mirror_to_mlflow(record, {"arm": "baseline", "tier": "laptop", "signature": record.run.signature()}):
        raise RuntimeError("MLflow could not be written")
    database = sqlite3.connect(out / "mlflow.db", isolation_level=None)
    database.execute("pragma synchronous=off")
    database.execute("begin")
    (first,) = database.execute("select run_uuid from runs").fetchone()
    database.execute("create temp table ids(id text, seed text)")
    database.executemany("insert into ids values(?, ?)", [(uuid.uuid4().hex, str(k)) for k in range(1, count)])
    for table in ("runs", "params", "tags", "latest_metrics", "metrics"):
        columns = [row[1] for row in database.execute(f"pragma table_info({table})")]
        values = ["ids.id" if column == "run_uuid" else f"{table}.{column}" for column in columns]
        if table == "params":
            values[columns.index("value")] = "case params.key when 'seed' then ids.seed else params.value end"
        database.execute(
            f"insert into {table} ({', '.join(columns)}) select {', '.join(values)} from ids join {table} "
            f"on {table}.run_uuid = ?",
            (first,),
        )
    database.execute("commit")
    database.close()
    return f"sqlite:///{out / 'mlflow.db'}"


def benchmark(count: int = 10_000) -> int:
    """Fill a store, collect it, print the seconds."""
    from experiments.room import Experiment

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        begin = time.perf_counter()
        uri = fill(out, count)
        print(f"filled a store with {count} runs in {time.perf_counter() - begin:.0f} s", flush=True)
        room = Experiment("room", "?", "?", ["baseline"], list(range(count)), "fd", 32, 0.01)
        begin = time.perf_counter()
        found = collect.from_mlflow(uri)
        middle = time.perf_counter()
        collect.collect(found, room, out)
        end = time.perf_counter()
        rows = len(collect.read(out / "results.csv"))
    print(f"collected {rows} rows in {end - begin:.1f} s: {middle - begin:.1f} s reading, {end - middle:.1f} s writing")
    return 0 if rows == 6 * count + 1 else 1

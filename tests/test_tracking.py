"""Many writers, one MLflow store: nothing is lost, and nothing is there twice."""

import fcntl
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from liquiddiff import tracking
from liquiddiff.config import Run
from liquiddiff.record import Record
from liquiddiff.tracking import Mirror, mirror_to_mlflow

SCRIPT = Path(__file__).with_name("slurm_up.sh")
WRITERS, LINES, AT_ONCE = 8, 500, 250
# Without its seven worker processes for evaluations, which nothing here asks for.
SERVER = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
TAGS = {"arm": "baseline", "tier": "laptop", "experiment": "relaxation"}


def value(seed, images):
    return seed + images / 1024


def write(out, seed, uri):
    """A run that logs LINES losses, and mirrors them now and then."""
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    record = Record(replace(Run(), seed=seed), out)
    record.create()
    for images in range(1, LINES + 1):
        record.write({"images": images, "loss": value(seed, images)})
        if images % AT_ONCE == 0:
            assert mirror_to_mlflow(record, TAGS)


def write_all(out, uri=""):
    """All at once, on a store that does not exist yet. Forked from a process that has imported MLflow already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["liquiddiff.tracking", "mlflow", "mlflow.store.tracking.sqlalchemy_store"])
    processes = [context.Process(target=write, args=(out, seed, uri)) for seed in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * WRITERS


def check(uri):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("liquiddiff").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert sorted(runs) == [*(f"baseline-s{seed}" for seed in range(WRITERS)), "relaxation"]  # one parent, named so
    for seed in range(WRITERS):
        run = runs[f"baseline-s{seed}"]
        assert run.data.tags["mlflow.parentRunId"] == runs["relaxation"].info.run_id
        points = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((p.step, p.value) for p in points) == [(k, value(seed, k)) for k in range(1, LINES + 1)]


def test_eight_writers_lose_nothing_in_sqlite(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_all(tmp_path)
    check(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def postgresql():
    """The address of a database of its own, on a socket in a temporary folder."""
    if not (found := sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        done = subprocess.run([SCRIPT, "install", "/tmp", "postgresql"], capture_output=True, text=True, timeout=300)
        if done.returncode or not (found := sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
            pytest.skip(f"no PostgreSQL here: {done.stderr.strip()}")
    user = "postgres" if os.getuid() == 0 else None  # which the package made; the server does not run as root
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        shutil.chown(folder, user or os.getuid())

        def run(name, *arguments):
            command = [found[-1].with_name(name), "-D", f"{folder}/data", *arguments]
            with open(f"{folder}/{name}.log", "a") as log:
                done = subprocess.run(command, cwd=folder, user=user, stdout=log, stderr=log, timeout=120)
            assert done.returncode == 0, "".join(path.read_text() for path in Path(folder).glob("*.log"))

        run("initdb", "--auth=trust", "--username=mlflow", "--encoding=UTF8", "--no-locale", "--no-sync")
        run("pg_ctl", "--wait", f"--options=-c listen_addresses='' -k {folder} -F", "start")
        yield f"postgresql+psycopg2://mlflow@/postgres?host={folder}"
        run("pg_ctl", "--mode=immediate", "stop")


@pytest.mark.slow
@pytest.mark.slurm  # with the other tests that bring up services
def test_eight_writers_lose_nothing_on_a_server_with_postgresql(tmp_path, monkeypatch, postgresql):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", postgresql, "--artifacts-destination", str(tmp_path)]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **SERVER})
    try:
        uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
        write_all(tmp_path / "runs", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        check(uri)
    finally:
        server.terminate()
        server.wait(30)


def test_another_processs_turn_is_waited_for_at_the_end_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record = Record(Run(), tmp_path)
    record.create()
    record.write({"images": 1, "loss": 1.0})
    with open(tmp_path / "mlflow.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not mirror_to_mlflow(record, TAGS, wait=False)
    assert not (tmp_path / "mlflow.db").exists() and not capsys.readouterr().err
    assert mirror_to_mlflow(record, TAGS, wait=False)


def test_what_is_sent_again_is_there_once(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record = Record(Run(), tmp_path)
    record.create()
    for images in range(1, 11):
        record.write({"images": images, "loss": float(images)})
    assert mirror_to_mlflow(record, TAGS)
    for images in range(11, 21):
        record.write({"images": images, "loss": float(images)})
    real, calls = MlflowClient.log_batch, []

    def busy(self, *args, **kwargs):  # the store takes the points, and the answer is lost
        real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise OSError("database is locked")

    monkeypatch.setattr(MlflowClient, "log_batch", busy)
    monkeypatch.setattr(tracking.time, "sleep", lambda seconds: None)
    assert mirror_to_mlflow(record, TAGS)
    state = json.loads((record.folder / "mlflow.json").read_text())
    points = MlflowClient(record.tracking_uri()).get_metric_history(state["run_id"], "loss")
    assert len(calls) == 2 and sorted(p.step for p in points) == list(range(1, 21))


def test_the_mirror_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    costs = []

    def slow(record, tags, wait):  # a store that stalls now and then
        costs.append(2.0 if len(costs) % 5 else 8.0)
        clock[0] += costs[-1]
        return True

    monkeypatch.setattr(tracking, "mirror_to_mlflow", slow)
    mirror = Mirror(Record(Run(), tmp_path), {})
    for _ in range(100_000):
        clock[0] += 0.1  # a checkpoint ten times a second
        mirror()
    assert len(costs) > 10 and sum(costs) < 0.012 * clock[0]

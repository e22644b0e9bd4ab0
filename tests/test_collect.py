"""Collecting runs into results.csv, and MLflow rebuilt from run folders: a real SQLite store, no training."""

import contextlib
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from analysis import collect, runs, sync
from experiments import compose
from experiments.room import Experiment
from liquiddiff.config import BadInput, Eval, Model, Optim, Run
from liquiddiff.record import Record

ROOM = Experiment("room", "?", "?", ["baseline", "conv"], [0, 1], "fd", 32, 0.01)
ARMS = {"baseline": Run(), "conv": Run(arm="conv", model=Model(relaxation="none"))}


def today(experiment, arm, tier, data):
    return ARMS[arm] if (tier, data) == ("laptop", "digits") else None


def make(out: Path, arm: str = "baseline", seed: int = 0, fd: float = 0.3, done: bool = True, **changes) -> Record:
    """A run's folder, as trainer and metrics leave it."""
    record = Record(replace(ARMS[arm], seed=seed, **changes), out)
    record.create()
    record.describe()
    started = f"2026-01-0{seed + 1}T00:00:00+0000"
    record.provenance("a CPU", "fp32", "ab12", params=600_000, macs=9_000_000, started=started)
    for k in (1, 2, 3):
        record.write({"images": 1500 * k, "loss": 1.0 / k, "lr": 1e-3, "images_per_second": 100.0 * k})
    record.write({"images": 4500, "val_loss": 0.123456789, "val_loss_t0": 0.5})
    scores = {"kid": 0.001, "precision": 2 / 3, "recall": 0.5, "fd_pixel": fd / 7}
    protocol = {"solver": "euler", "extractor": "digits", "weights": "cd", "n": 1797, "reference": "ab12/1797"}
    for nfe in (1, 32):
        record.write({"nfe": nfe, **protocol, "fd": fd + 1 / nfe, **scores})
    floor = {"floor": True, "extractor": "digits", "weights": "cd", "n": 898, "reference_n": 898}
    record.write({**floor, "fd": 0.25, **scores})
    if done:
        record.finish(seconds=240.0, peak_mib=512.5)
    return record


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "runs"
    out.mkdir()
    return out


def gather(found, folder: Path) -> list[dict[str, str]]:
    folder.mkdir(exist_ok=True)
    collect.collect(found, ROOM, folder, today)
    return collect.read(folder / "results.csv")


def test_a_row_holds_protocol_provenance_and_scores(out, tmp_path):
    make(out)
    rows = gather(runs.from_folders(out), tmp_path / "room")
    assert [(r["arm"], r["nfe"]) for r in rows] == [("baseline", "1"), ("baseline", "32"), ("real", "")]
    assert {k: v for k, v in rows[1].items() if k != "commit"} == {
        "arm": "baseline", "seed": "0", "tier": "laptop", "data": "digits", "data_fingerprint": "ab12",
        "signature": Run().signature(), "device": "a CPU", "dtype": "fp32", "images": str(Run().optim.images),
        "batch": str(Run().optim.batch), "n": "1797",
        "reference": "ab12/1797", "extractor": "digits", "weights": "cd", "solver": "euler", "nfe": "32",
        "ema": str(Run().optim.ema),
        "fd": "0.33125", "fd_pixel": "0.0428571", "kid": "0.001", "precision": "0.666667", "recall": "0.5",
        "loss": "0.333333", "val_loss": "0.123457", "params": "600000", "macs": "9000000",
        "images_per_second": "200", "peak_mib": "512.5", "seconds": "240", "lr": str(Run().optim.lr),
    }  # fmt: skip
    floor = rows[2]
    assert (floor["n"], floor["reference"], floor["fd"], floor["seed"]) == ("898", "ab12/898", "0.25", "")


def test_a_second_collection_is_identical_and_rows_without_runs_stay(out, tmp_path, capsys):
    for arm in ("conv", "baseline"):
        for seed in (1, 0):
            make(out, arm, seed)
    rows = gather(runs.from_folders(out), tmp_path / "room")
    path = tmp_path / "room/results.csv"
    first = path.read_bytes()
    assert [(r["arm"], r["seed"]) for r in rows[::2]] == [
        ("baseline", "0"), ("baseline", "1"), ("conv", "0"), ("conv", "1"), ("real", ""),
    ]  # fmt: skip
    gather(runs.from_folders(out), tmp_path / "room")
    assert path.read_bytes() == first and "nothing new" in capsys.readouterr().out
    shutil.rmtree(make(out, "conv", 1).folder)  # this machine no longer has it
    gather(runs.from_folders(out), tmp_path / "room")
    assert path.read_bytes() == first
    gather([], tmp_path / "room")
    assert path.read_bytes() == first


def test_a_run_made_again_replaces_its_rows_and_that_its_code_is_another_is_told(out, tmp_path, capsys):
    record = make(out, fd=0.3)
    gather(runs.from_folders(out), tmp_path / "room")
    shutil.rmtree(record.folder)
    make(out, fd=0.2)
    capsys.readouterr()
    rows = gather(runs.from_folders(out), tmp_path / "room")
    assert [r["fd"] for r in rows] == ["1.2", "0.23125", "0.25"]
    assert "other code" not in capsys.readouterr().out
    path = tmp_path / "room/results.csv"
    path.write_text(path.read_text().replace(rows[0]["commit"], "0123456789"))
    gather(runs.from_folders(out), tmp_path / "room")
    assert f"baseline (seed 0, 0123456 -> {rows[0]['commit'][:7]})" in capsys.readouterr().out


def test_an_arm_s_rows_of_another_rate_never_stand_beside_today_s(out, tmp_path, monkeypatch):
    for seed in (0, 1):
        make(out, seed=seed)
    make(out, "conv")
    gather(runs.from_folders(out), tmp_path / "room")
    monkeypatch.setitem(ARMS, "baseline", replace(ARMS["baseline"], optim=Optim(lr=1e-5)))
    make(out)  # seed 0 alone
    rows = gather(runs.from_folders(out), tmp_path / "room")
    assert [(r["arm"], r["seed"], r["lr"]) for r in rows if r["nfe"] == "32"] == [
        ("baseline", "0", "1e-05"), ("conv", "0", str(Run().optim.lr)),
    ]  # fmt: skip


def test_another_budget_replaces_the_old_one_whole(out, tmp_path, capsys, monkeypatch):
    """Rows of the old budget would make every table refuse the room; they go once there is a run of today's."""
    for arm in ("baseline", "conv"):
        make(out, arm)
    before = gather(runs.from_folders(out), tmp_path / "room")
    before_it, longer = Run().optim.images, 2 * Run().optim.images
    for arm, run in list(ARMS.items()):
        monkeypatch.setitem(ARMS, arm, replace(run, optim=replace(run.optim, images=longer)))
    assert gather([], tmp_path / "room") == before  # nothing to replace them with
    make(out)
    rows = gather(runs.from_folders(out), tmp_path / "room")
    assert [(r["arm"], r["images"]) for r in rows[::2]] == [("baseline", str(longer)), ("real", "")]
    said = capsys.readouterr().out
    assert "4 rows of arms as they were before" in said and f"{before_it} images" in said
    points = collect.read(tmp_path / "room/curves.csv", collect.curves.COLUMNS)
    assert {point["signature"] for point in points} == {ARMS["baseline"].signature()}


def test_rows_of_elsewhere_stay_beside_runs_that_are_older_than_a_new_key(out, tmp_path):
    """They ran under one signature, and today's code has another for all of them."""
    record = make(out, seed=0)
    lines = (record.folder / "run.yaml").read_text().splitlines()
    (record.folder / "run.yaml").write_text("\n".join(line for line in lines if "wiring:" not in line))
    record.folder.rename(out / "baseline-00000000-s0")
    folder = tmp_path / "room"
    first = gather(runs.from_folders(out), folder)
    elsewhere = [row | {"seed": "1"} for row in first if row["arm"] == "baseline"]
    collect.write(folder / "results.csv", first + elsewhere)
    rows = gather(runs.from_folders(out), folder)
    assert [(r["seed"], r["signature"]) for r in rows[::2]] == [("0", "00000000"), ("1", "00000000"), ("", "")]


def test_without_a_run_nothing_is_written_though_the_columns_are_of_another_day(out, tmp_path, capsys):
    make(out)
    gather(runs.from_folders(out), tmp_path / "room")
    path = tmp_path / "room/results.csv"
    older = [{k: v for k, v in row.items() if k != "dtype"} for row in collect.read(path)]
    collect.write(path, older, [c for c in collect.COLUMNS if c != "dtype"])
    before = path.read_bytes()
    gather([], tmp_path / "room")
    assert path.read_bytes() == before and "0 of them found here, nothing new in" in capsys.readouterr().out


def test_a_run_yaml_that_is_none_is_named_and_left_out(out, tmp_path, capsys):
    make(out)
    (make(out, "conv").folder / "run.yaml").write_text("arm: [unclosed")
    assert [found.run.arm for found in runs.from_folders(out)] == ["baseline"]
    assert "has no readable run.yaml" in capsys.readouterr().err


def test_only_the_rooms_own_runs_count(out, tmp_path, capsys):
    make(out)
    make(out, optim=Optim(lr=1e-5), fd=0.0)  # a learning-rate trial
    make(out, seed=2)  # a seed that the room does not list
    make(out, "conv", done=False)
    make(out, "conv", seed=1, tier="hour", eval=Eval(n=5000))
    rows = gather(runs.from_folders(out), tmp_path / "room")
    assert {(r["arm"], r["seed"]) for r in rows} == {("baseline", "0"), ("real", "")}
    assert all(r["fd"] != "1" for r in rows)
    said = capsys.readouterr()
    assert "left out 2 runs with another configuration" in said.out and "no run yet of conv" in said.out
    assert "not finished: conv-" in said.err


def test_a_run_older_than_a_new_key_still_counts(out, tmp_path, capsys):
    """Defaults fill what an old run.yaml does not say; its folder keeps the name that it ran under."""
    record = make(out)
    path = record.folder / "run.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "wiring:" not in line))
    assert len(path.read_text().splitlines()) == len(lines) - 1
    record.folder.rename(out / "baseline-00000000-s0")
    rows = gather(runs.from_folders(out), tmp_path / "room")
    assert rows[0]["signature"] == "00000000"
    make(out, seed=1)
    gather(runs.from_folders(out), tmp_path / "room")
    assert f"several signatures: baseline (00000000, {Run().signature()})" in capsys.readouterr().out


def test_what_cannot_be_read_costs_only_itself(out, tmp_path, capsys):
    make(out)
    broken = make(out, seed=1).folder
    (broken / "run.yaml").write_text("nonsense: 1\n")
    with open(make(out, "conv").folder / "metrics.jsonl", "a") as file:
        file.write('{"images": 60')  # torn by a kill
    assert {r["arm"] for r in gather(runs.from_folders(out), tmp_path / "room")} == {"baseline", "conv", "real"}
    assert "baseline-" in capsys.readouterr().err


def test_no_runs_is_one_line_and_no_file(out, tmp_path, capsys):
    assert gather(runs.from_folders(out), tmp_path / "room") == []
    assert capsys.readouterr().out == "room: no finished run yet: python experiments/run.py experiment=room\n"
    assert not (tmp_path / "room/results.csv").exists()


def test_unknown_columns_are_refused(tmp_path):
    (tmp_path / "results.csv").write_text("arm,seed,fid_of_mine\n")
    with pytest.raises(BadInput, match="fid_of_mine"):
        collect.read(tmp_path / "results.csv")


def test_a_merge_that_was_left_half_way_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("arm,seed,tier,data\n<<<<<<< HEAD\nconv,0,laptop,digits\n")
    with pytest.raises(BadInput, match="rows without an arm, a tier or a data set"):
        collect.read(tmp_path / "results.csv")


@pytest.mark.parametrize("name", ["My Photos (2)", "Ümlaut", "a,b=c", "it's [new]"])
def test_a_folder_of_any_name_is_the_rooms(name):
    """Composed again by its name alone, as a run says it."""
    path = "/somewhere/" + name.replace("'", "\\'")
    given = [
        "tier=laptop",
        "data=folder",
        f"data.path='{path}'",
        "eval.extractor=effnet_lite0",
        "ablation=no_relaxation",
    ]
    run = compose.as_run(compose.one(given))
    assert run.data.name == f"folder-{name}"
    room = replace(ROOM, name="relaxation", overrides=("eval.extractor=effnet_lite0",))
    again = collect.composed(room, "no_relaxation", run.tier, run.data.name)
    assert again and again.signature() == run.signature()


def test_numbers_have_six_digits_and_no_noise():
    assert collect.text("fd", 0.1 + 0.2) == "0.3" == collect.text("fd", "0.30000000000000004")
    assert collect.text("images", 25_000_000.0) == "25000000" == collect.text("images", "25000000")
    assert collect.text("kid", float("nan")) == "" == collect.text("kid", None)
    assert collect.text("signature", "12345678") == "12345678" and collect.text("commit", "1e10") == "1e10"


def test_the_command_composes_the_rooms_arms(out, tmp_path):
    """With the real arms: overrides of the room and the tier of the run decide what belongs to it."""
    root = tmp_path / "experiments"
    (root / "room").mkdir(parents=True)
    (root / "room/no_relaxation.yaml").write_text("# as in experiments/relaxation\n")
    (root / "room/experiment.yaml").write_text(
        "question: q\nexpectation: e\narms: [baseline, no_relaxation]\nseeds: [0]\nmetric: fd\nnfe: 32\n"
        "margin: 0.1\noverrides: [optim.images=1000]\n"
    )
    for arguments in (["optim.images=1000"], [], ["optim.images=1000", "ablation=no_relaxation"]):
        run = compose.as_run(compose.one(arguments))
        ARMS["temporary"] = run
        make(out, "temporary")
    del ARMS["temporary"]
    assert collect.main([f"out={out}", "experiment=room"], root) == 0
    rows = collect.read(root / "room/results.csv")
    assert [(r["arm"], r["images"]) for r in rows[:4:2]] == [("baseline", "1000"), ("no_relaxation", "1000")]
    assert len(rows) == 5
    with pytest.raises(BadInput, match="is no folder"):
        collect.main([f"out={out}/none"], root)
    with pytest.raises(BadInput, match="no MLflow store"):
        collect.main([f"tracking_uri=sqlite:///{out}/none.db"], root)
    (out / "empty.db").touch()
    for uri in (f"sqlite:///{out}/empty.db", "mysql+nodriver://nowhere/x"):
        with pytest.raises(BadInput, match="cannot be read as an MLflow store") as error:
            collect.main([f"tracking_uri={uri}"], root)
        assert "\n" not in str(error.value)


# --- MLflow -----------------------------------------------------------------------------------------------------------


def mlflow_runs(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri).search_runs(["1"])


def test_mlflow_is_rebuilt_from_folders_and_gives_the_same_csv(out, tmp_path, capsys, monkeypatch):
    for arm in ("baseline", "conv"):
        make(out, arm)
    unfinished = make(out, "conv", 1, done=False)
    uri = f"sqlite:///{out}/mlflow.db"
    assert sync.main([f"out={out}"]) == 0
    assert [run.info.status for run in mlflow_runs(uri)].count("FINISHED") == 2
    assert len(mlflow_runs(uri)) == 3

    # Both readers of MLflow, and the folders, tell the same story.
    folders = gather(runs.from_folders(out), tmp_path / "folders")
    assert gather(runs.from_mlflow(uri), tmp_path / "sql") == folders and len(folders) == 5
    monkeypatch.setattr(runs, "_read_sql", runs._read_client)
    assert gather(runs.from_mlflow(uri), tmp_path / "client") == folders
    monkeypatch.undo()

    # Again: nothing twice. Then only what is new.
    assert sync.main([f"out={out}"]) == 0
    assert len(mlflow_runs(uri)) == 3
    unfinished.finish(seconds=1.0)
    with make(out, "baseline", 1).lock():  # a run that another process is writing
        assert sync.main([f"out={out}"]) == 0
    assert "1 are being written" in capsys.readouterr().out
    assert [run.info.status for run in mlflow_runs(uri)] == ["FINISHED"] * 3

    # Moved, with its store: the same runs at another address.
    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    assert sync.main([f"out={moved}"]) == 0
    assert len(mlflow_runs(f"sqlite:///{moved}/mlflow.db")) == 4

    # Runs that the store has lost come back, and so does one that was deleted.
    from mlflow import MlflowClient

    kept, lost, deleted = (run.info.run_id for run in mlflow_runs(uri))
    MlflowClient(uri).delete_run(deleted)
    with contextlib.closing(sqlite3.connect(out / "mlflow.db")) as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"delete from {table} where run_uuid = ?", (lost,))
        database.commit()
    assert sync.main([f"out={out}"]) == 0
    ids = {run.info.run_id for run in mlflow_runs(uri)}
    assert len(ids) == 4 and kept in ids and not {lost, deleted} & ids
    assert gather(runs.from_mlflow(uri), tmp_path / "sql") == gather(runs.from_folders(out), tmp_path / "folders")


def test_a_floor_score_that_could_not_be_taken_is_empty(out, tmp_path):
    from mlflow import MlflowClient

    record, uri = make(out), f"sqlite:///{out}/mlflow.db"
    path = record.folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1].replace('"kid": 0.001', '"kid": null')]) + "\n")
    assert sync.main([f"out={out}"]) == 0
    rows = gather(runs.from_folders(out), tmp_path / "folders")
    assert rows[-1]["arm"] == "real" and (rows[-1]["kid"], rows[-1]["fd"]) == ("", "0.25")
    (run,) = mlflow_runs(uri)
    assert "floor_kid" not in run.data.tags
    assert gather(runs.from_mlflow(uri), tmp_path / "sql") == rows
    MlflowClient(uri).set_tag(run.info.run_id, "floor_kid", "None")  # as older stores have it
    assert gather(runs.from_mlflow(uri), tmp_path / "old") == rows


def test_what_the_mlflow_page_shows(out):
    """Names, tags, a parent for the room, how long a run took, curves against NFE, pictures."""
    from mlflow import MlflowClient

    from liquiddiff.tracking import mirror_to_mlflow

    record = make(out)
    (record.folder / "samples.png").write_bytes(b"a picture")
    tags = {"arm": "baseline", "tier": "laptop", "room": "", "experiment": "relaxation"}
    assert mirror_to_mlflow(record, tags, artifacts=True)
    client = MlflowClient(uri := f"sqlite:///{out}/mlflow.db")
    runs_by_name = {run.info.run_name: run for run in mlflow_runs(uri)}
    run, parent = runs_by_name["baseline-s0"], runs_by_name["relaxation"]
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (run.data.tags["tier"], run.data.tags["room"]) == ("laptop", "relaxation")
    assert run.info.end_time - run.info.start_time == 240_000
    points = client.get_metric_history(run.info.run_id, "fd_digits")
    assert [(point.step, point.value) for point in points] == [(1, 1.3), (32, 0.33125)]
    assert run.data.tags["floor_fd"] == "0.25" and not [key for key in run.data.metrics if "floor" in key]
    assert "samples.png" in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert "step is NFE" in client.get_experiment("1").tags["mlflow.note.content"]


def test_sync_without_a_store_fails_and_says_so(out, capsys, monkeypatch):
    make(out)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{out}/no/such/folder/mlflow.db")
    (out / "no").write_text("a file where a folder should be")
    assert sync.main([f"out={out}"]) == 1
    assert "was not updated" in capsys.readouterr().err

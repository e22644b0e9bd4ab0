"""The command: what it leaves, what it refuses, and that nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from experiments import compose, grid
from experiments.run import main
from liquiddiff import LiquidDiffusionUNet, loop, record
from liquiddiff.config import BadInput, Run, from_dict
from liquiddiff.depthwise import backend
from liquiddiff.device import deferred_interrupt
from liquiddiff.record import Record

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "flowers102_64"


def test_one_arm_end_to_end(small, tmp_path, capsys):
    command = ["ablation=no_relaxation", *small]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "model.relaxation: liquid -> none" in out
    assert "mlflow ui" in out
    (folder,) = (tmp_path / "runs").glob("no_relaxation-*-s0")
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    assert files >= set(
        "run.yaml env.json metrics.jsonl done model/config.json model/model.safetensors "
        "samples.png loss.png nfe.png".split()
    )
    for name in ("samples", "loss", "nfe"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 100

    run = from_dict(Run, yaml.safe_load((folder / "run.yaml").read_text()))
    assert run.model.relaxation == "none"
    assert f"no_relaxation-{run.signature()}-s0" == folder.name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    assert training[-1]["images"] == 640
    assert {"images", "loss", "lr"} <= training[0].keys()
    assert [row["images"] for row in rows if "val_loss" in row] == [320, 640]
    evaluation = [row for row in rows if "nfe" in row]
    assert [row["nfe"] for row in evaluation] == [1, 2]
    assert {"nfe", "solver", "extractor", "n", "fd", "kid", "precision", "recall", "fd_pixel"} <= evaluation[0].keys()
    env = json.loads((folder / "env.json").read_text())
    assert env["kernels"] == backend()
    assert env["data_fingerprint"] and env["packages"]["torch"] == torch.__version__.split("+")[0]

    from mlflow import MlflowClient  # the same numbers are in MLflow

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (logged,) = client.search_runs([client.get_experiment_by_name("liquiddiff").experiment_id])
    assert logged.info.run_name == "no_relaxation-s0"
    assert logged.data.params["model.relaxation"] == "none"
    assert logged.data.tags["room"] == "relaxation"
    history = client.get_metric_history(logged.info.run_id, "fd_digits")
    assert {m.step: m.value for m in history} == {row["nfe"]: row["fd"] for row in evaluation}
    losses = client.get_metric_history(logged.info.run_id, "loss")
    assert {m.step: m.value for m in losses} == {row["images"]: row["loss"] for row in training}
    assert {a.path for a in client.list_artifacts(logged.info.run_id)} >= {"samples.png", "nfe.png", "run.yaml"}

    before = (folder / "metrics.jsonl").read_bytes(), (folder / "done").stat().st_mtime_ns
    assert main(command) == 0  # the same command again skips
    assert "already done" in capsys.readouterr().out
    assert before == ((folder / "metrics.jsonl").read_bytes(), (folder / "done").stat().st_mtime_ns)

    assert main([*command, "force=true"]) == 0  # and force keeps what was there
    assert (folder.parent / f"{folder.name}.old1" / "done").exists()
    net = LiquidDiffusionUNet.from_pretrained(folder / "model")
    assert net(torch.zeros(1, 1, 8, 8), torch.ones(1)).shape == (1, 1, 8, 8)


def test_a_run_that_died_in_its_evaluation_only_evaluates(small, tmp_path, monkeypatch, capsys):
    from analysis import metrics

    real = metrics.evaluate

    def dies(run, images, sample, device, on_row):
        on_row({"nfe": 1, "solver": "euler", "extractor": "digits", "n": 64, "fd": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "evaluate", dies)
    assert main(small) == 130
    assert "resumes" in capsys.readouterr().err
    monkeypatch.setattr(metrics, "evaluate", real)
    (folder,) = (tmp_path / "runs").glob("baseline-*")
    losses = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert main(small) == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [line for line in lines if '"loss"' in line] == losses
    assert [json.loads(line)["nfe"] for line in lines if '"nfe"' in line] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["ablation=no_relaxatoin"], "unknown arm 'no_relaxatoin'. Did you mean no_relaxation"),
        (["optim.lrr=1"], "unknown key 'optim.lrr'. Did you mean optim.lr"),
        (["tier=hours"], "unknown tier 'hours'. Did you mean hour?"),
        (["data=flower"], "Did you mean flowers"),
        (["model=tinny"], "unknown size 'tinny'. Did you mean tiny?"),
        (["experiment=relaxatio"], "unknown experiment"),
        (["eval.solver=eular"], "unknown solver 'eular'. Did you mean euler?"),
        (["eval.extractor=digit"], "unknown extractor 'digit'. Did you mean digits?"),
        (["model.mixer.name=cfcc"], "unknown mixer 'cfcc'. Did you mean cfc"),
        (["model.relaxation=liquids"], "unknown relaxation 'liquids'. Did you mean liquid?"),
        (["flow.times=unifrom"], "unknown time distribution 'unifrom'. Did you mean uniform?"),
        (["flow.loss=mes"], "unknown loss 'mes'. Did you mean mse?"),
        (["optim.lr=fast"], "optim.lr: Value 'fast'"),
        (["seed=1.5"], "seed=1.5 must be a whole number"),
        (["optim.batch=0"], "optim.batch=0 must be positive"),
        (["arm=conv"], "unknown key 'arm'"),
        (["model.size=tiny"], "unknown key 'model.size'"),
        (["model.channels=[30,64]"], "multiples of 8"),
        (["model.mix_kernels=[4]"], "must be odd"),
        (["data.resolution=16"], "reads 8x8 grey images only"),
        (["jobs=0", "seed=0,1"], "jobs=0 must be positive"),
        (["data.resolution=9"], "must be divisible by 2"),
        (["eval.nfe=[0]"], "eval.nfe=[0]"),
        (["eval.nfe=16"], "write eval.nfe=[16]"),
        (["data=folder", "data.path=~/My Photos (2)"], "write key=value, and quote a value with spaces or signs twice"),
        (["eval.solver=heun", "eval.nfe=[1,2]"], "eval.nfe=1 is too few for solver heun"),
        (["eval.n=1000000"], "the set has 1797 images"),
        (["data=folder"], "data=folder needs data.path=DIR"),
        (["data=folder", "eval.extractor=effnet_lite0", "data.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["data=cifar10"], "eval.extractor=digits reads 8x8 digits"),
        (["device=cuda:99"], "device=cuda:99 cannot be used here"),
        (["device=gpu"], "device=gpu cannot be used here (no such device): give cpu, cuda or auto"),
        (["++optim.lr=1e-3"], "++optim.lr=1e-3: every key is there already; write key=value"),
        (["experiment=mixer", "ablation=conv", "seed=0", "+optim.lr=1e-3"], "without +, ++ or ~"),
        (["data.path=/tmp"], "data.path=/tmp is nothing to data=digits: give data=folder"),
        (["optim.lr"], "write key=value"),
        (["data.name=cifar10"], "unknown key 'data.name'"),
        (["eval.nfe=[2,3,2]"], "positive numbers, each once"),
        (["eval.solver=heun", "eval.nfe=[2,3]"], "eval.nfe=[2, 3] has equal numbers of steps for solver heun"),
        (["data.channels=2"], "data.channels=2 must be 1"),
        (["flow.reflow=-3"], "flow.reflow=-3 must be 0 or more"),
        (["optim.clip=nan"], "optim.clip=nan must be 0 or more"),
        (["model.mixer.expansion=2"], "give model.mixer.match=none as well"),
        (["model.mixer.match=none", "model.mixer.expansion=0.001"], "model.mixer.expansion=0.001 leaves no channel"),
        (["model.ffn_ratio=0.001"], "model.ffn_ratio=0.001 leaves no channel"),
        (["model.mixer.name=conv", "model.mixer.gate=nonsense"], "unknown gate 'nonsense'"),
        (["--dry"], "--dry: there is no such option; write key=value"),
        (["out=/proc/nothing"], "choose another place with out=DIR"),
        (["out=/proc/nothing", "seed=0,1"], "choose another place with out=DIR"),
        (
            ["data=folder", "data.path=/nowhere", "data.resolution=32", "eval.extractor=pixel", "seed=0,1"],
            "data.path=/nowhere cannot be read",
        ),
        (["device=cuda:99", "seed=0,1"], "device=cuda:99 cannot be used here"),
    ],
)
def test_bad_input_is_one_line_and_status_2(small, capsys, overrides, said):
    keys = {o.split("=")[0] for o in overrides}
    assert main([*(o for o in small if o.split("=")[0] not in keys), *overrides]) == 2
    error = capsys.readouterr().err.rpartition("images/s]\n")[2]  # whichever test is first sees the set decoded
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert said.lower() in error.lower()


def test_missing_weights_leave_everything_but_the_metric(small, tmp_path, monkeypatch, capsys):
    from analysis import metrics

    def missing(name, weights):
        raise metrics.MissingWeights("no weights for inception; give eval.weights=PATH.")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "check_extractor", missing)
        assert main(small) == 2
    said = capsys.readouterr()
    assert "training goes on" in said.out
    assert "eval.weights=PATH" in said.err
    (folder,) = (tmp_path / "runs").glob("baseline-*")
    assert (folder / "samples.png").exists() and (folder / "model" / "model.safetensors").exists()
    assert not (folder / "done").exists()
    assert main(small) == 0  # with the weights, the same command evaluates
    assert (folder / "done").exists()


def test_a_full_disk_is_one_line_wherever_it_strikes(small, monkeypatch, capsys):
    real = Record.write

    def full(record, row):
        if "nfe" in row:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        real(record, row)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", full)
        assert main(small) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        "error: No space left on device (metrics.jsonl): nothing is lost; mend it and give the same command again"
    )
    assert main(small) == 0


def test_a_worker_that_is_stopped_begins_no_other_run_whatever_goes_wrong(small, monkeypatch):
    def stopped(*_):
        with deferred_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.run.compute", stopped)
    runs = compose.plan(small)[1]
    pipe = SimpleNamespace(recv=lambda: runs.pop(), send=lambda _: None)  # once more, and it raises
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup2", lambda *_: None)
            grid.work(pipe)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    assert not runs


def test_a_path_with_other_images_is_not_taken_for_the_finished_run(small, tmp_path, capsys):
    for place, grey in (("a", 10), ("b", 200)):
        folder = tmp_path / place / "cats"
        folder.mkdir(parents=True)
        for k in range(12):
            Image.new("L", (16, 16), grey + k).save(folder / f"{k}.png")
    options = [o for o in small if not o.startswith(("eval.n=", "optim.images"))]
    options += ["data=folder", "data.resolution=8", "eval.extractor=pixel", "eval.n=8", "optim.images=64"]
    assert main([*options, f"data.path={tmp_path}/a/cats"]) == 0
    capsys.readouterr()
    assert main([*options, f"data.path={tmp_path}/b/cats"]) == 2
    assert "is of other images" in capsys.readouterr().err
    assert main([*options, f"data.path={tmp_path}/a/cats"]) == 0
    capsys.readouterr()
    assert main([*options, f"data.path={tmp_path}/b/cats", "seed=0,1"]) == 2  # nor by a grid
    assert "is of other images" in capsys.readouterr().err
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/done"))
    (folder / "done").unlink()
    described = (folder / "run.yaml").read_text()
    assert main([*options, f"data.path={tmp_path}/b/cats"]) == 2  # nor is an unfinished one said to be of them
    assert (folder / "run.yaml").read_text() == described and f"{tmp_path}/a/cats" in described


def test_a_warm_up_without_end_is_told_and_a_column_shown_once(small, capsys):
    assert main([*small, "eval.extractor=pixel", "optim.images=64"]) == 0
    out = capsys.readouterr().out
    assert "optim.warmup=64 outlasts optim.images=64: the learning rate never reaches 0.008; give optim.warmup=6" in out
    assert out.count("fd_pixel") == 1
    assert main([*small, "eval.extractor=pixel", "optim.images=96"]) == 0
    assert "outlasts" not in capsys.readouterr().out


def test_where_the_images_of_a_finished_run_came_from_is_told(small, tmp_path, capsys):
    (tmp_path / "copy").mkdir()
    for k in range(12):
        Image.new("RGB", (16, 16), (k, 20, 30)).save(tmp_path / "copy" / f"{k}.png")
    options = [o for o in small if not o.startswith(("eval.n=", "optim.images"))]
    options += ["data=cifar10", "data.resolution=8", "eval.extractor=pixel", "eval.n=8", "optim.images=64"]
    assert main([*options, f"data.path={tmp_path}/copy"]) == 0
    capsys.readouterr()
    assert main(options) == 0
    assert f"note: its images came from data.path={tmp_path}/copy\nalready done" in capsys.readouterr().out


def test_an_arm_of_another_size_takes_what_does_not_fit_the_baseline(tmp_path, capsys):
    assert main(["ablation=size_small", "model.blocks=[1,1,1]", f"out={tmp_path}", "dry=true"]) == 0
    said = capsys.readouterr().out
    assert "size_small" in said and "of the baseline's" not in said


def test_what_another_process_holds_is_not_set_aside_and_its_weights_stay_known(small):
    held = Record(compose.plan([*small, "optim.images=96"])[1][0])
    assert main([*small, "optim.images=96"]) == 0 and held.weights()
    other = Record(held.run)
    with held.lock():
        with pytest.raises(BadInput, match="is being written by another process"):
            record.set_aside(other)
        assert held.weights()
    record.set_aside(other)
    assert not held.folder.exists() and held.weights() is None


def test_a_run_that_is_set_aside_between_two_steps_of_locking_is_not_held_twice(small, monkeypatch):
    mine, taken = Record(compose.plan(small)[1][0]), []
    mine.create()
    flock = record.fcntl.flock

    def slow(file, how):  # before this one has the lock, another process takes the folder away and begins anew
        if not taken:
            taken.append(mine.folder.rename(mine.folder.with_name("aside")))
            Record(mine.run).create()
        flock(file, how)

    monkeypatch.setattr(record.fcntl, "flock", slow)
    with pytest.raises(BadInput, match="was set aside by another process"), mine.lock():
        pass
    with mine.lock():
        pass


def test_a_forced_run_that_is_interrupted_resumes_without_force(small, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.run.compute", stop)
    for more, said in ([], "the same command resumes"), (["force=true"], "the same command without force=true resumes"):
        assert main([*small, *more]) == 130
        assert said in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_weights_is_one_line(small, monkeypatch, capsys):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    with monkeypatch.context() as patch:
        patch.setattr("liquiddiff.unet.LiquidDiffusionUNet.save_pretrained", full)
        assert main(small) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: Error while serializing") and error.endswith("give the same command again")
    assert main(small) == 0


def test_a_place_that_cannot_hold_a_run_is_told_and_why(small, tmp_path, monkeypatch, capsys):
    assert main([*small, "device=meta"]) == 2
    assert "device=meta cannot be used here (it computes nothing)" in capsys.readouterr().err
    run = compose.plan(small)[1][0]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("a?b", "a%20b"):
        with pytest.raises(BadInput, match=r"no \? or %"):
            Record(run, tmp_path / name).create()

    def unknown(*_):
        raise OSError(38, "Function not implemented")

    record_of = Record(run)
    record_of.create()
    monkeypatch.setattr("fcntl.flock", unknown)
    with pytest.raises(BadInput, match="no flock"), record_of.lock():
        pass


def test_other_weights_of_the_extractor_are_not_taken_for_those_of_the_finished_run(small, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from analysis.digits_classifier import WEIGHTS

    other = {key: value + 0.01 for key, value in load_file(WEIGHTS).items()}
    save_file(other, tmp_path / "other.safetensors")
    assert main(small) == 0
    capsys.readouterr()
    for seeds in (["dry=false"], ["seed=0,1", "optim.images=640"]):  # alone, and within a grid
        assert main([*small, *seeds, f"eval.weights={tmp_path}/other.safetensors"]) == 2
        assert "was measured with other weights" in capsys.readouterr().err
    assert main([*small, "eval.weights=/nowhere"]) == 2
    assert "eval.weights=/nowhere is not a file" in capsys.readouterr().err
    assert main([*small, f"eval.weights={WEIGHTS}"]) == 0
    assert "already done" in capsys.readouterr().out


def test_the_names_that_are_known_without_torch_are_those_of_the_registries():
    from analysis.features import EXTRACTORS
    from liquiddiff import config, flow, mixers, solvers

    registries = {
        "model.mixer.gate": mixers.GATES,
        "model.mixer.wiring": mixers.WIRINGS,
        "flow.times": flow.TIMES,
        "flow.loss": flow.LOSSES,
        "flow.prediction": flow.PREDICTIONS,
        "eval.solver": solvers.TABLEAUX,
        "eval.extractor": EXTRACTORS,
    }
    for key, registry in registries.items():
        assert set(config.CHOICES[key][1].split()) == set(registry), key


def test_help_and_typos_are_answered_without_torch():
    # Imports are counted, not seconds: a busy machine must not fail this.
    for arguments, status in ((["--help"], 0), (["ablation=no_relaxatoin"], 2), (["eval.solver=eular"], 2)):
        code = (
            "import sys; from experiments.run import main; status = main(sys.argv[1:]); "
            "heavy = {'torch', 'mlflow', 'pandas', 'datasets', 'torch_fidelity'} & set(sys.modules); "
            "assert not heavy, heavy; sys.exit(status)"
        )
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr


def test_mlflow_that_cannot_be_reached_costs_one_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main([*small, "optim.images=96"]) == 0
    assert "was not updated" in capsys.readouterr().err


def test_a_process_names_the_code_that_it_loaded(monkeypatch):
    versions = iter([("a" * 40, ""), ("b" * 40, "")])  # the checkout moves on
    monkeypatch.setattr(record, "code_version", lambda root: next(versions))
    record.own_code.cache_clear()
    assert record.own_code() == record.own_code() == ("a" * 40, "")
    record.own_code.cache_clear()


def test_interrupted_then_resumed_from_the_command_line(small, tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), *small, "optim.images=64000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics and metrics[0].stat().st_size):
        metrics = list((tmp_path / "runs").glob("*/metrics.jsonl"))
        time.sleep(0.05)
    process.terminate()  # as a scheduler would
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes" in said
    assert list((tmp_path / "runs").glob("*/checkpoint.pt"))


def test_mlflow_is_rebuilt_lines_are_not_logged_twice(small, tmp_path):
    from mlflow import MlflowClient

    from liquiddiff.tracking import mirror_to_mlflow

    assert main([*small, "optim.images=96"]) == 0
    record = Record(compose.plan([*small, "optim.images=96"])[1][0])
    assert mirror_to_mlflow(record, {}) and mirror_to_mlflow(record, {})
    client = MlflowClient(record.tracking_uri())
    run_id = json.loads((record.folder / "mlflow.json").read_text())["run_id"]
    points = client.get_metric_history(run_id, "loss")
    assert len(points) == len({p.step for p in points})


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"the photographs are not at {PHOTOS}")
def test_real_photographs_with_imagenet_features(small, tmp_path):
    # The train file alone, few images: the whole set takes minutes of feature extraction.
    photos = ["data=flowers", f"data.path={PHOTOS}/train.parquet", "data.resolution=16", "eval.extractor=effnet_lite0"]
    path = tmp_path / "few.parquet"
    from datasets import load_dataset

    load_dataset("parquet", data_files=f"{PHOTOS}/train.parquet", split="train[:40]", cache_dir=tmp_path).to_parquet(
        path
    )
    small = [o for o in small if not o.startswith(("eval.n=", "eval.nfe="))]
    photos[1] = f"data.path={path}"
    assert main([*small, *photos, "optim.images=64", "eval.n=32", "eval.nfe=[1]"]) == 0
    (folder,) = (tmp_path / "runs").glob("baseline-*")
    row = Record(from_dict(Run, yaml.safe_load((folder / "run.yaml").read_text()))).evaluations()[0]
    assert row["extractor"] == "effnet_lite0" and row["fd"] > 0
    assert "fd_pixel" not in row


def test_signature_follows_every_key_but_labels_and_places():
    base = compose.plan([])[1][0]
    changes = ["optim.lr=1e-5", "model.relaxation=none", "eval.n=100", "data.flip=true", "model.mixer.gate=static"]
    signatures = {compose.plan([c])[1][0].signature() for c in changes}
    assert len(signatures | {base.signature()}) == 6
    for same in (
        "seed=3",
        "out=/tmp/x",
        "threads=1",
        "device=cpu",
        "cache=/tmp/y",
        "checkpoint_every=5",
        "eval.batch=3",
    ):
        assert compose.plan([same])[1][0].signature() == base.signature()
    # In another process, and against a salted hash.
    code = "from experiments import compose; print(compose.plan([])[1][0].signature())"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == base.signature()


def test_a_run_survives_yaml():
    run = compose.plan(["ablation=conv", "tier=hour", "optim.lr=3e-4"])[1][0]
    from dataclasses import asdict

    assert from_dict(Run, yaml.safe_load(yaml.safe_dump(asdict(run)))) == run
    with pytest.raises(BadInput, match="unknown Optim key 'lrr'"):
        from_dict(Run, {"optim": {"lrr": 1}})


def test_samples_of_a_run_are_those_of_its_evaluation(small, tmp_path, monkeypatch):
    import numpy as np

    from analysis import cli
    from experiments import sample
    from liquiddiff import loop
    from liquiddiff.data import to_uint8

    run = compose.plan([*small, "optim.images=96"])[1][0]
    fitted, _ = loop.train(run)
    folder = Record(run).folder
    assert sample.main([f"run={folder}", "n=5", "nfe=4", "batch=2", f"out={tmp_path}/pngs"]) == 0
    expected = to_uint8(fitted.sample(5, 8, 4, channels=1))
    for k in range(5):
        with Image.open(tmp_path / "pngs" / f"{k:05d}.png") as image:
            assert (
                np.abs(np.asarray(image).astype(int) - expected[k, 0].numpy()).max() <= 1
            )  # the batch rounds otherwise
    with pytest.raises(BadInput, match="has 4 images of an earlier call beyond n=1"):  # two protocols in one folder
        sample.main([f"run={folder}", "n=1", "nfe=2", f"out={tmp_path}/pngs"])
    assert sample.main([f"run={folder}/model", "n=1", "nfe=2", "solver=heun", f"out={tmp_path}/published"]) == 0
    velocity, x, t = sample.load(f"{folder}/model", "cpu")[0], torch.randn(1, 1, 8, 8), torch.full((1,), 0.5)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    config["flow"]["prediction"] = "data"  # as if it had been trained to predict the image
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with torch.no_grad():
        assert torch.allclose(sample.load(f"{folder}/model", "cpu")[0](x, t), (x - velocity(x, t)) / 0.5)
    with monkeypatch.context() as context, pytest.raises(BadInput, match=rf"not a run folder: {folder.name} begin"):
        context.setattr("liquiddiff.unet.LiquidDiffusionUNet.from_pretrained", None)  # the hub is not asked
        sample.main([f"run={folder.parent}/{run.arm}"])
    for arguments in (["n=3"], ["run=/nowhere"], [f"run={folder}", "nfe=x"], [f"run={folder}", "solver=eular"],
                      [f"run={folder}", "shift=nan"], [f"run={folder}", "resolution=-8"]):  # fmt: skip
        with pytest.raises(BadInput):
            sample.main(arguments)
    assert cli.arguments(["n=3"], sample.DEFAULTS)[0]["n"] == "3"


def test_weights_of_a_network_that_other_code_built_are_refused(small, monkeypatch):
    from dataclasses import replace

    from experiments import sample
    from liquiddiff import budget, loop

    run, build = compose.plan([*small, "optim.images=64"])[1][0], budget.build
    loop.train(run)
    monkeypatch.setattr(budget, "build", lambda model, shape: build(replace(model, channels=[16, 16]), shape))
    with pytest.raises(BadInput, match="is of a network that other code built; give another out=DIR, or force=true"):
        loop.train(run)
    with pytest.raises(BadInput, match="has a network that other code built: its env.json names the commit"):
        sample.main([f"run={Record(run).folder}", "n=1", "nfe=1"])


def test_rows_name_the_commits_that_trained_the_weights(small, monkeypatch, capsys):
    """Not the one that measures them: weights may be older than the code, or those of another run."""

    def code(name):
        for module in (loop, record):
            monkeypatch.setattr(module, "own_code", lambda: (name * 40, ""))

    def commit(*more):
        return Record(run_of(*more)).facts()["commit"]

    def run_of(*more):
        return compose.plan([*small, *more])[1][0]

    code("a")
    assert main([*small, "optim.images=128"]) == 0 and commit("optim.images=128") == "a" * 40
    code("b")
    capsys.readouterr()
    assert main([*small, "optim.images=128", "eval.nfe=[3]"]) == 0  # the same training
    assert "trained at aaaaaaaaaa\n" in capsys.readouterr().out
    assert commit("optim.images=128", "eval.nfe=[3]") == "a" * 40

    begun, folder = run_of("optim.images=640"), Record(run_of("optim.images=640"))
    folder.create()

    def stop():
        raise KeyboardInterrupt

    with folder.lock(), pytest.raises(KeyboardInterrupt):
        folder.describe()
        loop.fit(begun, folder, on_checkpoint=stop)
    code("c")
    loop.train(begun)
    assert commit("optim.images=640") == "b" * 40 + "+" + "c" * 40


def test_a_full_device_is_one_line_with_the_way_out(small, monkeypatch, capsys):
    def full(*more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(loop, "fit", full)
    assert main([*small]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: CUDA out of memory") and "optim.checkpointing=true" in said and "more" not in said

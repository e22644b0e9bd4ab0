"""Every arm of every room is what its file says, trains, samples and writes a row; grids keep their word."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from analysis import metrics
from experiments import compose, grid
from experiments.room import ROOT, arm_files, load_experiment, pace, rooms
from experiments.run import main
from liquiddiff import loop, reflow
from liquiddiff.config import BadInput, flatten
from liquiddiff.data import to_uint8
from liquiddiff.flow import initial_noise
from liquiddiff.record import Record

ARMS = arm_files()


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_the_diff_that_its_file_says(arm):
    text = ARMS[arm].read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert text.startswith("# "), "an arm begins with its reason"
    assert len(lines) <= 6
    run, baseline = (compose.plan(o)[1][0] for o in ([f"ablation={arm}"], []))
    said = flatten(yaml.safe_load(text))
    differing = {key: new for key, (_, new) in compose.diff(run, baseline).items()}
    assert differing, "an arm that changes nothing would pass for a result"
    assert differing.items() <= said.items()
    assert {k: v for k, v in said.items() if flatten(baseline)[k] != v} == differing
    assert run.signature() != baseline.signature()


def test_arms_differ_from_each_other():
    seen: dict[str, str] = {}
    aliases = {frozenset({"cfc_alone", "no_spatial_mix"})}  # one question of two rooms
    for arm in ARMS:
        signature = compose.plan([f"ablation={arm}"])[1][0].signature()
        assert signature not in seen or frozenset({arm, seen[signature]}) in aliases, (arm, seen[signature])
        seen[signature] = arm


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_samples_and_writes_a_row(arm, small, monkeypatch):
    quick = [o for o in small if not o.startswith(("optim.images", "eval.n", "optim.batch"))]
    overrides = [*quick, f"ablation={arm}", "optim.images=32", "optim.batch=16", "eval.n=16", "eval.nfe=[6]"]
    run = compose.plan([*overrides, "eval.extractor=pixel"])[1][0]
    run.flow.reflow = min(run.flow.reflow, 32)
    monkeypatch.setattr(reflow, "SAMPLES", 16)
    record = Record(run)
    record.create()
    fitted, images = loop.fit(run, record)

    def sample(start, count, nfe):
        x, used = fitted.generate(initial_noise(0, start, count, run.image_shape), nfe, run.eval.solver, run.eval.shift)
        return to_uint8(x), used

    metrics.evaluate(run, images, sample, torch.device("cpu"), record.write)
    (row,) = record.evaluations()
    assert row["nfe"] <= 6 and row["fd"] > 0
    assert [r["images"] for r in record.rows() if "loss" in r][-1] == 32
    assert all(p.isfinite().all() for p in fitted.ema.net.parameters())

    fitted.model(torch.zeros(2, *run.image_shape), torch.full((2,), 0.5)).square().sum().backward()
    memory = [p.grad.untyped_storage().data_ptr() for p in fitted.model.parameters() if p.grad is not None]
    assert memory and len(memory) == len(set(memory))  # what two share, clipping in place would scale twice


@pytest.mark.parametrize("room", rooms())
def test_a_room_is_whole(room):
    experiment = load_experiment(rooms()[room])
    assert (ROOT / room / "README.md").exists()
    first, base = (compose.plan([f"ablation={arm}"])[1][0] for arm in (experiment.arms[0], "baseline"))
    assert first.training_signature() == base.training_signature()  # the baseline, or its weights otherwise sampled
    mine = {arm for arm, path in ARMS.items() if path.parent.name == room}
    assert mine <= set(experiment.arms), f"{mine - set(experiment.arms)} are in the folder but not in experiment.yaml"


def test_an_arm_of_one_s_own_takes_one_file(tmp_path, monkeypatch):
    room = tmp_path / "mine"
    room.mkdir()
    (room / "wide_ffn.yaml").write_text("# A wider feed-forward.\nmodel:\n  ffn_ratio: 2.0\n")
    (room / "experiment.yaml").write_text(
        "question: q\nexpectation: e\narms: [baseline, wide_ffn]\nseeds: [0, 1]\nmetric: fd\nnfe: 2\nmargin: 0.1\n"
    )
    monkeypatch.setattr(compose, "arms", lambda: arm_files(tmp_path))
    monkeypatch.setattr(compose, "rooms", lambda: rooms(tmp_path))
    runs = compose.plan(["experiment=mine"])[1]
    assert [(run.arm, run.seed, run.model.ffn_ratio) for run in runs] == [
        ("baseline", 0, 1.0),
        ("wide_ffn", 0, 2.0),
        ("baseline", 1, 1.0),
        ("wide_ffn", 1, 2.0),
    ]
    (room / "other.yaml").write_text("# x\n")
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "other.yaml").write_text("# x\n")
    with pytest.raises(BadInput, match="two arms are named other"):
        arm_files(tmp_path)


def test_every_room_at_once_runs_shared_arms_once():
    runs = compose.plan(["experiment=all"])[1]
    names = [run.name for run in runs]
    assert len(names) == len(set(names))
    # A room may have tuned its rate, or sample otherwise.
    baseline = [(run.optim.lr, run.eval.solver, run.seed) for run in runs if run.arm == "baseline"]
    assert len(baseline) == len(set(baseline)) < 3 * len(rooms())


def test_a_grid_survives_failing_and_dying_runs_skips_and_resumes(small, monkeypatch, capsys):
    overrides = [*small, "optim.images=96", "ablation=no_relaxation,conv", "seed=0,1"]
    runs = compose.plan(overrides)[1]
    assert [(run.arm, run.seed) for run in runs[1:3]] == [("conv", 0), ("no_relaxation", 1)]
    broken, killed = Record(runs[1]), Record(runs[2])
    broken.create()
    (broken.folder / "checkpoint.pt").write_bytes(b"damaged")
    monkeypatch.setattr(grid, "work", dying_worker)
    assert main(overrides) == 1
    said = capsys.readouterr()
    assert f"failed: {broken.folder.name}: every checkpoint in {broken.folder} is damaged" in said.err
    assert f"failed: {killed.folder.name}: its process died (exit code -9)" in said.err
    assert "2 of 4 runs done" in said.out  # the last of them by a fresh process
    done = [Record(run) for run in runs if Record(run).done]
    assert [record.run for record in done] == [runs[0], runs[3]]
    (broken.folder / "checkpoint.pt").unlink()
    stamps = [(record.folder / "done").stat().st_mtime_ns for record in done]
    assert main([*overrides, "dry=true"]) == 0
    assert "4 runs, 2 done" in capsys.readouterr().out
    monkeypatch.setattr(grid, "work", REAL_WORK)
    assert main(overrides) == 0
    assert "4 runs, 2 done already" in capsys.readouterr().out
    assert all(Record(run).done for run in runs)
    assert stamps == [(record.folder / "done").stat().st_mtime_ns for record in done]


def test_the_minutes_left_are_those_of_the_rows_scaled_by_what_is_done_here(tmp_path, monkeypatch, capsys):
    """An arm's own seconds where there are rows of its multiply-adds, else by multiply-adds; of another kind none."""
    room, overrides = tmp_path / "room", ["ablation=conv,identity,no_relaxation", f"out={tmp_path}", "optim.images=600"]
    room.mkdir()
    head, macs = "arm,tier,data,images,macs,seconds\n", {"conv": 8_768_192, "baseline": 8_781_824}
    rows = [("conv", 100, 10.0), ("conv", 100, 10.0), ("conv", 100, 70.0), ("baseline", 200, 40.0)]
    lines = [f"{arm},laptop,digits,{images},{macs[arm]},{s}\nreal,laptop,digits,,,\n" for arm, images, s in rows]
    (room / "results.csv").write_text(head + "".join(lines))
    known = pace(tmp_path)
    assert known == {("laptop", "digits"): {("conv", macs["conv"]): 0.1, ("baseline", macs["baseline"]): 0.2}}
    monkeypatch.setattr(grid, "pace", lambda: known)

    def minutes(*more):
        assert main([*overrides, *more, "dry=true"]) == 0
        return {line.split("-")[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if "-s0" in line}

    new = minutes()
    assert new["conv"] == "1.0" and new["no_relaxation"] == "1.5"  # 600 x 0.1 s; as baseline and conv for a MAC, 0.15
    assert float(new["identity"]) == pytest.approx(600 * 0.15 * 5.17 / 8.78 / 60, abs=0.05)
    run = compose.plan([*overrides[1:], "ablation=conv"])[1][0]
    Record(run).folder.mkdir(parents=True)
    (Record(run).folder / "done").write_text(json.dumps({"seconds": 120.0}))
    assert minutes() == {"conv": "0.0", "no_relaxation": "3.0", "identity": f"{2 * float(new['identity']):.1f}"}
    assert set(minutes("tier=hour", "data=flowers").values()) == {"?"}


@pytest.mark.slow
def test_ctrl_c_leaves_a_grid_resumable(small, tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / "experiments" / "run.py"), *small]
    command += ["optim.images=64000", "seed=0,1", "jobs=2"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list((tmp_path / "runs").glob("*/checkpoint.pt"))) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=60)
    assert process.returncode == 130
    for folder in (tmp_path / "runs").glob("*-s?"):
        images = [json.loads(line).get("images", 0) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        record = Record(compose.plan([*small, "optim.images=64000", f"seed={folder.name[-1]}"])[1][0])
        assert record.folder == folder
        assert loop.checkpoint.load(folder)["images"] == max(images) > 0
        assert grid.state_of(record)[0] == "part"


REAL_WORK = grid.work


def dying_worker(pipe, *more):
    """Stands in for `grid.work` in a worker process; it dies of no_relaxation, seed 1."""

    class Pipe:
        def recv(self):
            run = pipe.recv()
            if run is not None and (run.arm, run.seed) == ("no_relaxation", 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return run

        def send(self, message):
            pipe.send(message)

    REAL_WORK(Pipe(), *more)


def test_threads_are_shared_out_but_are_not_part_of_a_run(small):
    run = compose.plan(small)[1][0]
    assert grid.record_with(Record(run), 7).folder == Record(run).folder
    assert asdict(grid.record_with(Record(run), 7).run)["threads"] == 7

"""The launcher without a Slurm: arguments, background jobs of this machine, and grids of ten thousand runs."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiments import compose
from liquiddiff.record import Record, code_version
from slurm import launch
from slurm.job import state_path
from slurm.ledger import Ledger, Submission, progress


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=0,1"], "profile=NAME is missing: a100, cpu, h100, t4"),
        (["profile=t5"], "unknown profile 't5'. Did you mean t4?"),
        (["statsu"], "unknown verb 'statsu'. Did you mean status?"),
        (["cluster=slrum"], "unknown cluster 'slrum'. Did you mean slurm?"),
        (["gpus=0", "profile=t4"], "gpus=0 must be a positive whole number"),
        (["optim.lrr=1"], "unknown key 'optim.lrr'"),
        (["profile=/nowhere.yaml"], "cannot be read"),
        (["logs", "conv"], "no run of that name was submitted"),
        (["force=true"], "force=true belongs to experiments/run.py"),
        (["status", "conv"], "cannot read 'conv'; write key=value"),
    ],
)
def test_bad_input_is_one_line_and_status_2(small, capsys, arguments, said):
    assert launch.main([*small, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error


def test_profiles_hold_known_keys_alone(tmp_path, capsys):
    for name in launch.profiles():
        assert launch.load_profile(name).minutes > 0
    path = tmp_path / "site.yaml"
    path.write_text("minutes: 5\npartitoin: gpu\n")
    assert launch.main([f"profile={path}", "cluster=local"]) == 2
    assert "Did you mean partition?" in capsys.readouterr().err


def test_without_slurm_the_way_out_is_said(small, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.main([*small, "profile=cpu"]) == 2
    assert "cluster=local needs no Slurm" in capsys.readouterr().err


def test_states_of_ten_thousand_runs(tmp_path, monkeypatch):
    begin = time.process_time()
    seeds = ",".join(map(str, range(170)))
    runs = compose.plan(["experiment=all", f"seed={seeds}"])[1]
    totals = {run.name: run.optim.images for run in runs}
    composing = time.process_time() - begin
    assert len(totals) >= 10_000
    ledger, names = Ledger(tmp_path), list(totals)
    folder = ledger.home / "one"
    folder.mkdir(parents=True)
    for name in names[:6000]:
        (tmp_path / name).mkdir()
        (tmp_path / name / ("done" if len(name) % 2 else "metrics.jsonl")).write_text(
            json.dumps({"images": 100, "loss": 1.0, "images_per_second": 50.0}) + "\n"
        )
    jobs = {str(10_000_000 + k): [name] for k, name in enumerate(names[:9000])}
    ledger.add(Submission("one", "local", "cpu", "", "", False, str(folder), jobs, totals))
    failed = next(job for job, (name,) in jobs.items() if not (tmp_path / name / "done").exists())
    state_path(folder, failed).write_text(json.dumps({"run": None, "failed": {jobs[failed][0]: "too bad"}}))

    def listed(*arguments):
        raise AssertionError(f"a folder was listed: {arguments}")

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, listed)
    begin = time.process_time()
    states = {state.run: state for state in ledger.states(totals)}
    asking = time.process_time() - begin
    monkeypatch.undo()
    assert composing + asking < 10, f"{composing:.1f} s + {asking:.1f} s"
    print(f"{len(totals)} runs: composing {composing:.1f} s, states {asking:.1f} s")
    kinds = [state.kind for state in states.values()]
    assert kinds.count("new") == len(totals) - 9000
    assert kinds.count("done") == sum((tmp_path / name / "done").exists() for name in names[:6000])
    assert kinds.count("failed") == 1 and states[jobs[failed][0]].reason == "too bad"
    assert {state.images for state in states.values() if state.kind == "stale"} == {0, 100}


def test_progress_is_read_from_the_end_of_a_torn_file(tmp_path):
    lines = [json.dumps({"images": k, "loss": 0.5, "images_per_second": 10.0 * k}) for k in range(1, 1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"images": 10']))
    assert progress(tmp_path) == (999, 9990.0)
    assert progress(tmp_path / "none") == (0, 0.0)


def test_a_snapshot_knows_its_commit_wherever_it_lies(tmp_path):
    ledger = Ledger(tmp_path)
    home, commit, dirty = ledger.snapshot()
    assert ledger.snapshot()[0] == home  # the same code is kept once
    assert code_version(home)[0] == commit and bool(code_version(home)[1]) == dirty
    code = "import liquiddiff, experiments, slurm; print(liquiddiff.__file__, experiments.__file__, slurm.__file__)"
    root = Path(launch.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,  # from where it would find the working tree
        env={**os.environ, "PYTHONPATH": str(home), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert all(path.startswith(str(home)) for path in done.stdout.split()), done


@pytest.mark.slow
@pytest.mark.slurm  # with the other tests that wait for schedulers
@pytest.mark.filterwarnings("ignore:subprocess .* is still running")  # submitit lets its children go
def test_background_jobs_of_this_machine(small, tmp_path, capsys):
    """Two runs, one after another; the first is preempted, and goes on where it was."""
    grid = [*small, "seed=0,1", "optim.images=3200", "eval.nfe=[1]"]
    runs = compose.plan(grid)[1]
    assert launch.main([*grid, "cluster=local"]) == 0
    assert "submitted 2 runs in 1 jobs" in capsys.readouterr().out
    (job,) = Ledger(tmp_path / "runs").submissions()[0].jobs
    deadline = time.monotonic() + 600
    while not any("loss" in row for row in Record(runs[0]).rows()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = Path(f"/proc/{job}/task/{job}/children").read_text().split()
    os.kill(int(child), signal.SIGUSR2)
    assert launch.main([*grid, "cluster=local"]) == 0
    assert "nothing to submit" in capsys.readouterr().out
    assert launch.main(["wait", *grid]) == 0, capsys.readouterr().out
    assert "2 runs: 2 done" in capsys.readouterr().out
    for run in runs:
        images = [row["images"] for row in Record(run).rows() if "loss" in row]
        assert images == sorted(set(images)) and images[-1] == 3200
        assert yaml.safe_load((Record(run).folder / "run.yaml").read_text())["out"] == str(tmp_path / "runs")
    (log,) = (tmp_path / "runs" / ".slurm").glob(f"*/{job}_0_log.out")
    assert "Requeued job" in log.read_text()
    gc.collect()  # while that warning is ignored

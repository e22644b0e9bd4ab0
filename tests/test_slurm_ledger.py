"""The launcher without a Slurm: arguments, background jobs of this machine, and grids of ten thousand runs."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from experiments import compose
from liquiddiff.config import BadInput
from liquiddiff.record import Record, code_version
from slurm import backend, launch, plan
from slurm.job import state_path
from slurm.ledger import Ledger, State, Submission, progress
from slurm.nodes import load_profile


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
        (["cluster=local", "jobs=0"], "jobs=0 must be at least 1"),
        (["force=true"], "force=true belongs to experiments/run.py"),
        (["status", "conv"], "cannot read 'conv'; write key=value"),
        (["cancel"], "nothing was submitted under out="),
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
    path.write_text("minutes: soon\n")
    assert launch.main([f"profile={path}", "cluster=local"]) == 2
    assert "'soon' of type 'str' could not be converted to Integer" in capsys.readouterr().err


def test_a_profiles_shell_variables_stay_as_they_are(tmp_path, capsys):
    path = tmp_path / "site.yaml"
    path.write_text(
        'minutes: 5\nsetup: ["export PATH=${HOME}/bin:${EXTRA:-}$PATH"]\nsbatch: {account: "${ACCOUNT}", nice: 5}\n'
    )
    profile = launch.load_profile(str(path))
    assert profile.setup == ["export PATH=${HOME}/bin:${EXTRA:-}$PATH"] and profile.minutes == 5
    assert profile.sbatch == {"account": "${ACCOUNT}", "nice": 5}
    for line, said in {
        "setup: module load cuda": "a list of shell lines",
        "setup: [{a: b}]": "a list of shell lines",
        "sbatch: [--nice]": "lines of option: value",
        "mem_gb: ${HOME}": "HOME",
    }.items():
        path.write_text(f"minutes: 5\n{line}\n")
        assert launch.main([f"profile={path}", "cluster=local"]) == 2
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_the_page_on_clusters_holds_todays_tables(tmp_path, monkeypatch, capsys):
    assert plan.main(["docs", "--check"]) == 0
    monkeypatch.setattr(plan, "PAGE", tmp_path / "page.md")
    whole = (Path(__file__).parents[1] / "docs/clusters.md").read_text()
    plan.PAGE.write_text(old := whole.replace("| tiny 64x64 | fp32 |", "| tiny 64x64 | fp33 |"))
    assert plan.main(["docs", "--check"]) == 1 and plan.PAGE.read_text() == old != whole
    assert "not of today's results" in capsys.readouterr().err
    assert plan.main(["docs"]) == 0 and plan.PAGE.read_text() == whole


@pytest.mark.parametrize("wrong", ["peak", "share=0", "peak=65,-1", "peak=x", "share=nan"])
def test_a_plan_of_no_card_is_one_line(wrong, capsys):
    assert plan.main(["tier=hour", wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_torn_line_costs_its_own_jobs_alone(tmp_path, capsys):
    ledger = Ledger(tmp_path)
    one, two = (Submission(name, "slurm", "t4", "", "", False, str(tmp_path), jobs={name: [name]}) for name in "ab")
    with ledger.lock():
        ledger.add(one)
        ledger.path.write_text(ledger.path.read_text() + ledger.path.read_text()[:40])  # by a kill
        ledger.add(two)
    assert ledger.submissions() == [one, two]
    assert "1 torn line" in capsys.readouterr().err


def test_a_full_disk_leaves_no_torn_line(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    ledger.home.mkdir()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ledger.add(Submission("a", "slurm", "t4", "", "", False, str(tmp_path)))
    assert ledger.path.read_bytes() == b""


def test_jobs_count_whoever_submitted_them(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("slurm.ledger.ask", lambda *command: asked.append(command) or ["7_0 PENDING"])
    ledger = Ledger(tmp_path)
    ledger.home.mkdir()
    ledger.add(
        Submission("a", "slurm", "t4", "", "", False, str(tmp_path / "a"), jobs={"7_0": ["run"]}, totals={"run": 9})
    )
    assert [state.kind for state in ledger.states({})] == ["queued"]
    assert "-u" not in asked[0] and "liquiddiff" in asked[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_jobs_are_noted(number):
    """Another thread may take it, as torch has some: blocking it in this one is not enough."""
    rest, noted = threading.Event(), []
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=rest.wait)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), backend.undisturbed():
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            noted.append(number)
        assert noted
    finally:
        rest.set()
        for n, handler in before.items():
            signal.signal(n, handler)


def test_waiting_survives_a_scheduler_that_does_not_answer(tmp_path, monkeypatch):
    ledger, answers = Ledger(tmp_path), iter(["queued", None, None, "done"])

    def states(totals):
        if (kind := next(answers)) is None:
            raise BadInput("squeue failed")
        return [State("a", kind)]

    monkeypatch.setattr(ledger, "states", states)
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    assert [state.kind for state in launch.settled(ledger, {})] == ["done"]
    answers = iter([None])
    with pytest.raises(BadInput):  # one that never answered is not there
        launch.settled(ledger, {})


def test_without_slurm_the_way_out_is_said(small, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.main([*small, "profile=cpu"]) == 2
    assert "cluster=local needs no Slurm" in capsys.readouterr().err


def test_states_of_ten_thousand_runs(tmp_path, monkeypatch, capsys):
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
    ledger.add(Submission("one", "local", "cpu", "", "", False, str(folder), jobs=jobs, totals=totals))
    failed = next(job for job, (name,) in jobs.items() if not (tmp_path / name / "done").exists())
    state_path(folder, failed).write_text(json.dumps({"run": None, "failed": {jobs[failed][0]: "too bad"}}))

    begin = time.process_time()
    states = {state.run: state for state in ledger.states(totals)}
    asking = time.process_time() - begin
    print(f"{len(totals)} runs: composing {composing:.1f} s, states {asking:.1f} s")
    assert composing + asking < 10

    opened = []
    for name in ("listdir", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path=".", real=real: opened.append(path) or real(path))
    assert launch.main(["status", "experiment=all", f"seed={seeds}", f"out={tmp_path}"]) == 0
    monkeypatch.undo()
    assert all(len(os.listdir(path)) <= 1000 for path in opened)
    assert f"{len(totals)} runs: " in capsys.readouterr().out
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


def test_new_files_are_part_of_the_difference(tmp_path):
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True, capture_output=True)

    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "old.py").write_text("a = 1\n\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    assert code_version(tmp_path)[1] == ""
    (tmp_path / "slurm" / "old.py").write_text("a = 2\n\n")
    (tmp_path / "slurm" / "new.yaml").write_text("b: 1\n")
    (tmp_path / "slurm" / "new.c").write_text("int c;\n")
    (tmp_path / "run.yaml").write_text("no code\n")
    commit, diff = code_version(tmp_path)
    assert len(commit) == 40 and "+b: 1" in diff and "+int c;" in diff and "+a = 2" in diff and "no code" not in diff
    (tmp_path / "dirty.diff").write_text(diff + "\n")
    git("apply", "--check", "--reverse", "dirty.diff")  # whole


# A run on two processes: the first waits for the other in a collective, where it does not hear its signal.
LEAVING = """
import os, signal, sys, time
from types import SimpleNamespace
import submitit
from liquiddiff import distributed
from liquiddiff.config import Run
from slurm import job
rank = int(os.environ["RANK"])
def wait(run, experiment):
    print("ready", flush=True)
    distributed.any_of(False) if rank == 0 else time.sleep(600)
def requeue(number, frame):
    print("requeued", flush=True)
    os._exit(0)
signal.signal(signal.SIGUSR2, requeue)
distributed.start()
job.compute_run = wait
job.to_log = lambda folder: job.suppress()
job.GRACE = 1
job.TorchDistributedEnvironment = lambda: SimpleNamespace(export=lambda **options: None)
submitit.JobEnvironment = lambda: SimpleNamespace(global_rank=rank, num_tasks=2, job_id="1", cluster="slurm")
job.Job([Run(out=os.environ["SUBMITIT_FOLDER"])], 1, None)()
"""


@pytest.mark.slow
@pytest.mark.slurm  # with the other tests that are slow
def test_a_process_that_waits_for_another_is_requeued_too(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVING],
            env={**env, "RANK": str(rank), "SUBMITIT_FOLDER": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    time.sleep(0.5)  # the first is in the collective
    for process in processes:
        process.send_signal(signal.SIGUSR2)
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0][0] == "requeued\n"


def test_background_jobs_share_the_gpus_that_there_are(tmp_path, monkeypatch):
    given, t4 = [], load_profile("t4")

    class Executor:
        def __init__(self, folder, **more):
            pass

        def update_parameters(self, visible_gpus, **more):
            given.append(visible_gpus)

        def submit(self, job):
            return SimpleNamespace(job_id="1")

    monkeypatch.setattr(backend.submitit, "LocalExecutor", Executor)
    monkeypatch.setattr(signal, "signal", lambda *more: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    backend.here(tmp_path, {}, t4, [None] * 4, 1)
    backend.here(tmp_path, {}, t4, [None] * 2, 2)
    assert given == [[2], [3], [5], [2], [2, 3], [5, 2]]
    backend.here(tmp_path, {}, load_profile("cpu"), [None], 2)
    assert given.pop() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(BadInput, match=r"this machine shows 0.*profile=cpu"):
        backend.here(tmp_path, {}, t4, [None], 1)


@pytest.mark.slow
@pytest.mark.slurm  # with the other tests that wait for schedulers
@pytest.mark.filterwarnings("ignore:subprocess .* is still running")  # submitit lets its children go
def test_background_jobs_of_this_machine(small, tmp_path, capsys):
    """Two runs, one after another; the first is preempted, and goes on where it was."""
    grid = [*small, "seed=0,1", "optim.images=1280", "eval.nfe=[1]"]
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
        assert images == sorted(set(images)) and images[-1] == 1280
        assert yaml.safe_load((Record(run).folder / "run.yaml").read_text())["out"] == str(tmp_path / "runs")
    (log,) = (tmp_path / "runs" / ".slurm").glob(f"*/{job}_0_log.out")
    assert "Requeued job" in log.read_text()
    with suppress(ChildProcessError):
        os.waitpid(int(job), 0)  # it still tells MLflow
    gc.collect()  # while that warning is ignored

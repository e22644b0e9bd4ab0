"""The launcher on a real Slurm: nothing is lost, nothing is done twice, one failure costs one run."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

from experiments import compose
from liquiddiff import checkpoint, loop
from liquiddiff.record import Record
from slurm import launch
from slurm.ledger import Ledger

SCRIPT = Path(__file__).with_name("slurm_up.sh")
PATIENCE = 600  # seconds for anything that a test waits for, on a busy machine
pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of two processors each, and the folder of their files."""
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run([SCRIPT, "up", folder], capture_output=True, text=True, timeout=300)
    if up.returncode:
        subprocess.run([SCRIPT, "down", folder], capture_output=True, timeout=60)
        assert up.returncode == 3, up.stderr
        pytest.skip(f"no Slurm here: {up.stderr.strip()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder
        subprocess.run([SCRIPT, "down", folder], capture_output=True, timeout=60)


@pytest.fixture
def site(cluster, tmp_path, cache):
    """A launcher: `site(*words)` returns its exit status, for runs that take a second."""
    return Site(tmp_path, cache)


class Site:
    def __init__(self, folder, cache):
        self.folder, self.out = folder, folder / "runs"
        self.common = [*SMALL, f"out={self.out}", f"cache={cache}"]

    def profile(self, **values):
        path = self.folder / "site.yaml"
        values = {"minutes": 10, "cpus_per_task": 1, "mem_gb": 0.1, "signal_s": 30} | values
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
        return f"profile={path}"

    def __call__(self, *words):
        return launch.main([*self.common, *words])

    def runs(self, *overrides):
        return compose.plan([*self.common, *overrides])[1]

    def states(self, *overrides):
        runs = self.runs(*overrides)
        return {s.run: s for s in Ledger(self.out).states({run.name: run.optim.images for run in runs})}

    def until(self, reached, what):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            before = time.thread_time()
            if value := reached():
                return value
            time.sleep(max(0.02, 3 * (time.thread_time() - before)))  # the jobs need the cores
        raise AssertionError(f"{what} did not happen; {self.log()}")

    def settled(self, *overrides):
        """States once nothing is queued or running."""

        def reached():
            states = self.states(*overrides)
            return None if {s.kind for s in states.values()} & {"queued", "running"} else states

        return self.until(reached, "the end of every job")

    def log(self):
        files = [*self.out.glob("*/log.txt"), *self.out.glob(".slurm/*/*log*")]
        return "\n".join(f"--- {path}\n{path.read_text()[-1500:]}" for path in files)

    def said(self, words):
        """How often the jobs' logs have it."""
        return sum(path.read_text().count(words) for path in self.out.glob(".slurm/*/*_log.out"))

    def trained(self, run):
        """Images."""
        return max([row["images"] for row in Record(run).rows() if "loss" in row], default=0)


def lock_holder(run):
    """The process that computes a run: it has the folder's lock open."""
    lock = (Record(run).folder / "lock").resolve()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) == str(lock) for fd in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    return None


def freeze(site, run, beyond=0):
    """Stop a run's process once it has trained more than `beyond`. Returns its number and the images.

    It runs for moments at a time, so that it does not come to its end unseen on a busy machine.
    """
    pid = site.until(lambda: lock_holder(run), "a process with the lock")

    def a_moment():
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.03)
        os.kill(pid, signal.SIGSTOP)
        site.until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "a stop")
        return site.trained(run) > beyond

    site.until(a_moment, "training")
    assert site.trained(run) < run.optim.images
    return pid, site.trained(run)


def let_go(site, pid):
    """Once SIGUSR2 is there for a stopped process, let that come to its end. Preemption lets it run by itself."""

    def reached():
        with suppress(OSError):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            bits = int(status["ShdPnd"], 16) | int(status["SigPnd"], 16)
            return "stopped" not in status["State"] or bits >> (signal.SIGUSR2 - 1) & 1
        return True

    site.until(reached, "the signal")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    site.until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the interrupted process")


def assert_as_if_never_interrupted(site, run, *overrides):
    plan = compose.plan([*site.common, *overrides, f"out={site.folder}/whole"])[1]
    whole = loop.train(next(other for other in plan if other.name == run.name))[0]
    weights = load_file(Record(run).folder / "model" / "model.safetensors")
    assert weights and all(torch.equal(v, weights[k]) for k, v in whole.ema.net.state_dict().items() if k in weights)
    images = [row["images"] for row in Record(run).rows() if "loss" in row]
    assert images == sorted(set(images)), "no line is written twice"
    assert images[-1] == run.optim.images


def test_an_array_of_six_with_a_failure_in_its_middle(site, capsys):
    grid = ["ablation=baseline,conv", "seed=0,1,2"]
    bad = Record(site.runs(*grid)[2])
    bad.create()
    (bad.folder / "checkpoint.pt").write_bytes(b"damaged")
    profile = site.profile(array_parallelism=2)
    assert site(*grid, profile) == 0
    assert "submitted 6 runs in 6 jobs" in capsys.readouterr().out
    assert site(*grid, profile) == 0
    assert "nothing to submit" in capsys.readouterr().out  # they are queued or running
    assert len(Ledger(site.out).submissions()) == 1
    assert subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.count("liquiddi") >= 1

    assert site("wait", *grid) == 1
    states = site.states(*grid)
    assert [s.kind for s in states.values()].count("done") == 5
    assert states[bad.run.name].kind == "failed" and "damaged" in states[bad.run.name].reason
    capsys.readouterr()
    assert site("status", *grid) == 0
    assert "6 runs: 5 done, 1 failed" in capsys.readouterr().out
    assert site("logs", bad.run.name) == 0
    assert "every checkpoint in" in capsys.readouterr().out

    assert site(*grid, profile) == 0  # a failed run would fail again: it waits for `retry`
    assert "retry submits the failed ones" in capsys.readouterr().out
    (bad.folder / "checkpoint.pt").unlink()
    before = {p: p.stat().st_mtime_ns for p in site.out.glob("*/metrics.jsonl")}
    assert site("retry", *grid, profile) == 0
    assert "submitted 1 runs in 1 jobs" in capsys.readouterr().out
    assert {s.kind for s in site.settled(*grid).values()} == {"done"}
    assert site("wait", *grid) == 0
    changed = [p.parent.name for p, t in before.items() if p.stat().st_mtime_ns != t]
    assert changed in ([], [bad.run.name])
    # The code that ran is a copy of what was here, and says which.
    env = json.loads((bad.folder / "env.json").read_text())
    assert env["commit"] == Ledger(site.out).submissions()[0].commit


def test_preempted_packed_and_resumed_to_the_bit(site):
    """By a signal in its first run; in its second by Slurm itself, for a job of more priority."""
    grid = ["seed=0,1", "optim.images=1600"]
    first, second = site.runs(*grid)
    assert site(*grid, site.profile(), "pack=2") == 0
    (job,) = Ledger(site.out).submissions()[0].jobs
    pid, images = freeze(site, first)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    let_go(site, pid)
    assert site.said("Requeued job") == 1
    assert images <= site.trained(first) <= images + 32, "it saved at the end of its step"

    pid, images = freeze(site, second)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    subprocess.run([*urgent, "--wrap=true"], check=True, capture_output=True)
    let_go(site, pid)
    states = site.settled(*grid)
    assert {s.kind for s in states.values()} == {"done"}, site.log()
    assert site.said("Requeued job") == 2
    assert_as_if_never_interrupted(site, first, *grid)
    assert_as_if_never_interrupted(site, second, *grid)


def test_a_time_limit_that_strikes_twice(site):
    long = ["optim.images=1600"]
    (run,) = site.runs(*long)
    assert site(*long, site.profile(minutes=60, signal_s=110)) == 0
    (job,) = Ledger(site.out).submissions()[0].jobs

    def limit(minutes):
        """Let the job's time end so many minutes after the present one."""
        elapsed = subprocess.run(["squeue", "-h", "-j", job, "-o", "%M"], capture_output=True, text=True, check=True)
        *hours, passed, _ = elapsed.stdout.strip().split(":")
        minutes += int(passed) + 60 * int((hours or ["0"])[0])
        subprocess.run(["scontrol", "update", f"jobid={job}", f"timelimit={minutes}"], check=True)

    seen = [0]
    for _ in range(2):
        pid, images = freeze(site, run, beyond=seen[-1])  # between two steps: time passes, images do not
        seen.append(images)
        limit(2)  # in less than signal_s and a while: the signal comes when Slurm looks, twice a minute
        let_go(site, pid)
        limit(60)
    states = site.settled(*long)
    assert states[run.name].kind == "done", site.log()
    assert site.said("Requeued job") == 2
    assert site.said("this job is timed-out") + site.said("this job is preempted") == 2
    assert_as_if_never_interrupted(site, run, *long)


def test_a_dead_node_costs_at_most_what_lies_between_checkpoints(site, cluster):
    long = ["optim.images=1600"]
    (run,) = site.runs(*long)
    assert site(*long, site.profile()) == 0
    (job,) = Ledger(site.out).submissions()[0].jobs
    pid, images = freeze(site, run, beyond=64)  # so that there is a checkpoint
    (node,) = nodes_of(job)
    daemon = int((cluster / f"slurmd.{node}.pid").read_text())
    family = [daemon, pid, *ancestors(pid)]
    for process in family:
        os.kill(process, signal.SIGKILL)
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=died"], check=True)
    try:
        assert images - checkpoint.load(Record(run).folder)["images"] < 64 + 32  # checkpoint_every, and a step
        states = site.settled(*long)
    finally:
        subprocess.run([SCRIPT, "node", cluster, node[1:]], check=True)
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)
    assert states[run.name].kind == "done", site.log()
    assert_as_if_never_interrupted(site, run, *long)


def nodes_of(job):
    names = subprocess.check_output(["squeue", "-h", "-j", job, "-o", "%N"], text=True)
    return subprocess.check_output(["scontrol", "show", "hostnames", names.strip()], text=True).split()


def ancestors(pid):
    """Up to the daemon of the job's step, which is init's child."""
    while (pid := int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])) > 1:
        yield pid


def test_one_run_on_two_nodes_preempted(site):
    one = ["optim.images=320", "eval.nfe=[1]"]
    run = site.runs(*one)[0]
    # One (fake) GPU a node; the nodes' names are nobody's.
    assert site(*one, site.profile(gpus_per_node=1, setup=["export MASTER_ADDR=127.0.0.1"]), "gpus=2") == 0
    (job,) = Ledger(site.out).submissions()[0].jobs
    pid, _ = freeze(site, run)
    assert nodes_of(job) == ["n0", "n1"]
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    let_go(site, pid)
    states = site.settled(*one)
    assert states[run.name].kind == "done", site.log()
    assert site.said("Requeued job") == 1
    images = [row["images"] for row in Record(run).rows() if "loss" in row]
    assert images == sorted(set(images)) and images[-1] == 320, "one process writes"
    alone = loop.train(compose.plan([*site.common, *one, f"out={site.folder}/whole"])[1][0])[0]
    weights = load_file(Record(run).folder / "model" / "model.safetensors")
    for key, value in alone.ema.net.state_dict().items():
        if key in weights:
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5)


def test_cancelled_runs_are_stale_and_can_be_submitted_again(site, capsys):
    """And a grid longer than this site's longest array, of seven jobs, becomes several."""
    grid, held = ["seed=0,1,2,3,4,5,6,7,8"], site.profile(sbatch={"hold": True})
    assert site(*grid, held) == 0
    assert "submitted 9 runs in 9 jobs" in capsys.readouterr().out
    assert [len(submission.jobs) for submission in Ledger(site.out).submissions()] == [7, 2]
    assert {s.kind for s in site.states(*grid).values()} == {"queued"}
    assert site("cancel", "seed=0,1,2") == 0
    site.until(lambda: [s.kind for s in site.states(*grid).values()] == ["stale"] * 3 + ["queued"] * 6, "the end of 3")
    capsys.readouterr()
    assert site(*grid, held) == 0
    assert "submitted 3 runs in 3 jobs" in capsys.readouterr().out
    assert site("cancel", *grid) == 0
    assert {s.kind for s in site.settled(*grid).values()} == {"stale"}
    assert site(*grid, site.profile(partition="none")) == 2
    assert "sbatch refused the job" in capsys.readouterr().err

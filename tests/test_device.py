"""What is decided about GPUs, with torch's answers about them in place of a GPU."""

import os
from types import SimpleNamespace

import pytest
import torch

from experiments import compose, grid, run
from experiments.compose import Launch
from liquiddiff import device, distributed, precision
from liquiddiff.config import BadInput
from slurm import job


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs; a list of those that were made the current one."""
    current: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: current.append(f"opened {device}"))
    return current


def test_a_gpu_named_by_its_number_becomes_the_current_one(two_gpus, monkeypatch):
    assert device.resolve_device("cuda:1") == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1"), "opened cuda:1"]
    two_gpus.clear()
    assert device.resolve_device("auto") == torch.device("cuda") and two_gpus == ["opened cuda"]
    two_gpus.clear()
    assert device.resolve_device("cuda:1", use=False) == torch.device("cuda:1") and not two_gpus
    with pytest.raises(BadInput, match=r"device=cuda:2 cannot be used here \(there are 2 GPUs\)"):
        device.resolve_device("cuda:2")
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(BadInput, match="each process takes a GPU of its own"):
        device.resolve_device("cuda:0")


def test_each_worker_takes_a_gpu_of_its_own(two_gpus):
    for slot in range(3):
        device.take_share(slot)
    assert two_gpus == [0, 1, 0]


class Pipe:
    """A grid's end of the pipe to a worker: `runs`, and what came back."""

    def __init__(self, *runs):
        self.runs, self.sent = [*runs, None], []

    def recv(self):
        return self.runs.pop(0)

    def send(self, message):
        self.sent.append(message)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_worker_dies_of_a_gpu_that_no_longer_answers(small, monkeypatch, capsys, wrapped):
    """Of other errors it does not: the next run is done. Its own end costs one run, see test_arms."""
    if wrapped:
        lost = BadInput("device=cuda cannot be used here (an illegal memory access)")
        lost.__cause__ = torch.AcceleratorError("an illegal memory access")
    else:
        lost = torch.AcceleratorError("an illegal memory access")
    errors = [RuntimeError("of this run"), lost, None]

    def fail(*more):
        if error := errors.pop(0):
            raise error

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(run, "compute", fail)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(grid.signal, "signal", lambda number, handler: None)
    runs = compose.plan([*small, "seed=0,1,2"])[1]
    pipe, kept = Pipe(*runs), [os.dup(1), os.dup(2)]
    try:
        with pytest.raises(SystemExit):
            grid.work(pipe)
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
    assert pipe.sent == [(runs[0].name, "RuntimeError: of this run")] and len(pipe.runs) == 2
    assert "an illegal memory access" in capsys.readouterr().err


def test_a_job_leaves_its_other_runs_where_its_gpu_no_longer_answers(small, monkeypatch, tmp_path):
    tried = []

    def fail(run, experiment):
        tried.append(run.seed)
        raise torch.AcceleratorError("an illegal memory access") if run.seed else ValueError("of this run")

    monkeypatch.setattr(job, "compute_run", fail)
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    runs = compose.plan([*small, "seed=0,1,2"])[1]
    environment = SimpleNamespace(job_id="7", global_rank=0, num_tasks=1)
    failed = job.Job(runs, 1, None).work(environment)
    assert tried == [0, 1] and failed == job.read_state(job.state_path(tmp_path, "7"))["failed"]
    assert failed[runs[1].name] == "its GPU answers no more: AcceleratorError: an illegal memory access"


def test_a_slot_whose_workers_die_leaves_the_queue_to_others(small, monkeypatch):
    """Two deaths in a row end it while another works; the last one is started again whatever happens."""
    started = []
    monkeypatch.setattr(grid.Pool, "start_worker", lambda pool, slot: started.append(slot))
    pool = grid.Pool([grid.Record(run) for run in compose.plan([*small, "seed=0,1,2,3,4"])[1]], Launch(jobs=2))

    class Dead:
        def recv(self):
            raise EOFError

    def dies(slot):
        pipe = Dead()
        process = SimpleNamespace(name=slot, exitcode=1, join=lambda: None)
        pool.busy[pipe] = (process, pool.queue[0], 0.0)
        pool.listen(pipe)

    pool.busy["another"] = (None, None, 0.0)
    dies("1")
    dies("1")
    assert started == ["0", "1", "1"]
    del pool.busy["another"]
    dies("1")
    assert started == ["0", "1", "1", "1"]
    pool.bar.close()


@pytest.mark.parametrize(("gigabytes", "pieces"), [(15, 1), (40, 2), (80, 4), (141, 8)])
def test_a_larger_gpu_computes_more_again_at_once(monkeypatch, gigabytes, pieces):
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert precision.at_once(100, SimpleNamespace(is_cuda=True, device="cuda:0")) == 100 * pieces
    assert precision.at_once(100, torch.zeros(1)) == 100

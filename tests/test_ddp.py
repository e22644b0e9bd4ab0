"""One run on two processes: the same losses, the same samples, one record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments import compose
from experiments.run import main
from liquiddiff import distributed
from liquiddiff.config import BadInput
from liquiddiff.record import Record

ROOT = Path(__file__).resolve().parents[1]
# 40 images in batches of 13 over two processes: unequal parts, and a last batch of one image, so one part is empty.
UNEVEN = ["optim.images=40", "optim.batch=13", "optim.warmup=1", "checkpoint_every=13", "eval.batch=24", "threads=1"]


def torchrun(*overrides, processes=2, script=ROOT / "experiments" / "run.py"):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command += [str(script), *overrides]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_two_processes_compute_what_one_does(small, tmp_path):
    overrides = [*small, *UNEVEN, "optim.checkpointing=true"]
    assert main([*overrides, f"out={tmp_path}/one"]) == 0
    done = torchrun(*overrides, f"out={tmp_path}/two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (Record(compose.plan([*overrides, f"out={tmp_path}/{name}"])[1][0]) for name in ("one", "two"))
    rows = [record.rows() for record in (one, two)]
    assert [sorted(row) for row in rows[0]] == [sorted(row) for row in rows[1]]  # each line once: one process writes
    for key in ("loss", "val_loss", "val_loss_t0", "val_loss_t3", "lr"):
        a, b = ([row[key] for row in some if key in row] for some in rows)
        assert a == pytest.approx(b, rel=1e-4), key
    for mine, theirs in zip(one.evaluations(), two.evaluations(), strict=True):
        assert mine["nfe"] == theirs["nfe"] and mine["reference"] == theirs["reference"]
        assert mine["fd"] == pytest.approx(theirs["fd"], rel=1e-2)
    weights = [load_file(record.folder / "model" / "model.safetensors") for record in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert done.stdout.count("signature ") == 1  # one header
    assert json.loads((two.folder / "done").read_text())["seconds"] > 0


@pytest.mark.slow
@pytest.mark.slurm  # with the other tests that are slow
def test_compiled_in_bf16_and_checkpointed(small, tmp_path):
    """Captured and differentiated by the compiler, run by PyTorch's own kernels: its code takes minutes to build."""
    overrides = [*small, "optim.images=36", "optim.batch=12", "optim.warmup=1", "eval.nfe=[1]", "optim.precision=bf16"]
    assert main([*overrides, f"out={tmp_path}/one"]) == 0
    script = tmp_path / "compiled.py"
    script.write_text(
        "import sys, torch\n"
        "from functools import partial\n"
        "from experiments.run import main\n"
        "torch.compile = partial(torch.compile, backend='aot_eager')\n"
        "status = main(sys.argv[1:])\n"
        "graphs = torch._dynamo.utils.counters['stats']['unique_graphs']\n"
        "print('captured', graphs, 'cut', torch._dynamo.config.optimize_ddp)\n"
        "sys.exit(status)\n"
    )
    both = [*overrides, "optim.compile=true", "optim.checkpointing=true", f"out={tmp_path}/two"]
    done = torchrun(*both, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "captured 0" not in done.stdout and done.stdout.count("captured") == done.stdout.count("cut False") == 2
    one, two = (next(tmp_path.glob(f"{name}/*/metrics.jsonl")) for name in ("one", "two"))
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (one, two)]
    losses = [[row["loss"] for row in some if "loss" in row] for some in rows]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-2)
    for path in (one, two):
        assert json.loads(path.with_name("env.json").read_text())["precision"] == "bf16"


def test_bad_input_that_the_first_process_meets_all_raise(monkeypatch):
    told = []
    monkeypatch.setattr(distributed, "agreed", lambda error: told.append(error) or BadInput("eval.n=5000"))
    for rank, heard in ((1, [None]), (0, ["too many"])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(BadInput, match=r"too many|eval.n=5000"), distributed.first():
            assert rank == 0, "what it does is not done again where it cannot be"
            raise BadInput("too many")
        assert [error and str(error) for error in told] == heard
        told.clear()


def test_parts_of_a_batch_are_the_batch(monkeypatch):
    for size in (1, 2, 3, 8):
        for count in (1, 5, 8, 13):
            parts = []
            for rank in range(size):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                monkeypatch.setattr(distributed, "size", lambda size=size: size)
                first, number = distributed.share(count)
                parts += range(first, first + number)
            assert parts == list(range(count))

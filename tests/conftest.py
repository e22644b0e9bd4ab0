"""One thread a process: two processes of two threads on two cores crawl."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too

import pytest
import torch

torch.set_num_threads(1)

SMALL = [
    "model.channels=[8,16]",
    "model.blocks=[1,1]",
    "optim.images=640",
    "optim.batch=32",
    "optim.warmup=64",
    "eval.n=64",
    "eval.nfe=[1,2]",
    "eval.val_n=32",
    "eval.val_every=320",
    "checkpoint_every=64",
    "threads=1",
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Decoded sets and reference features, shared by the tests of a process."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(tmp_path, cache, monkeypatch):
    """Overrides of a run that takes a second, kept out of the user's folders."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return [*SMALL, f"out={tmp_path}/runs", f"cache={cache}"]


def awake(net):
    """Zero-initialised weights drawn at random, so that every part has a say."""
    noise = torch.Generator().manual_seed(3)
    for p in net.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.3, generator=noise)
    return net

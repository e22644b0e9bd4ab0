"""Random streams that depend on nothing but their key: rule 2, "nothing depends on history"."""

import hashlib

import torch
from torch import nn


def derive(seed: int, *key: int | str) -> int:
    """A 63-bit seed from (seed, key). SHA-256, so it is the same in every process and on every machine.

    torch's CPU generator makes use of 32 of the bits: two streams are the same by a chance of 1 in 4 billion.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator for the stream that `key` names, e.g. seed 0, "sample", 17."""
    return torch.Generator().manual_seed(derive(seed, *key))


def initialise(net: nn.Module, seed: int) -> None:
    """Draw every module's parameters again from (seed, its name), by its own `reset_parameters`.

    So a shared layer starts at the same value in every arm, whatever else an arm adds or removes.
    """
    with torch.random.fork_rng(devices=[]):
        for name, module in net.named_modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                torch.manual_seed(derive(seed, name))
                reset()

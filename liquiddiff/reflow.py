"""Reflow (Liu et al., arXiv:2209.03003, section 2): train on pairs (noise_k, image_k) of a finished run's own ODE.

The new paths join what the old ones joined, and cross less, so they are straighter. The pairs are those of the same
seed's baseline; noise k hangs on (seed, k), so images alone are kept, in parts, so that a kill costs one part at most.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from liquiddiff import checkpoint
from liquiddiff.config import BadInput, Flow, Run
from liquiddiff.device import resolve_device
from liquiddiff.flow import draw, initial_noise
from liquiddiff.record import Record
from liquiddiff.seeding import generator
from liquiddiff.solvers import integrate

if TYPE_CHECKING:
    from liquiddiff.trainer import RectifiedFlowTrainer

SOLVER, NFE = "rk4", 32  # of the teacher: 0.015 (RMS, of a range of 2) from the exact path, measured on digits
PART = 1024  # pairs in a file
STREAM = "reflow"  # of the pairs' noise: evaluation's is never trained on
SAMPLES, STEPS = 256, 32  # behind a run's straightness


@dataclass(eq=False)
class Pairs:
    """(noise_k, image_k) for k < N, in the order of the run's seed."""

    images_NCHW: Tensor  # float32, as the solver left them
    straightness: float  # of the teacher
    seed: int
    times: str

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, their noise, both (count, C, H, W), and t (count,) at positions start .. start+count-1.

        As `ImageData.batch`: position p is place p % N of epoch p // N, whose order hangs on (seed, epoch) alone; t is
        that of position p in every arm.
        """
        n = len(self.images_NCHW)
        k_B = torch.cat(
            [
                self._order(epoch)[max(start - epoch * n, 0) : start + count - epoch * n]
                for epoch in range(start // n, (start + count - 1) // n + 1)
            ]
        )
        shape = tuple(self.images_NCHW.shape[1:])
        noise = torch.cat([initial_noise(self.seed, k, 1, shape, STREAM) for k in k_B.tolist()])
        return self.images_NCHW[k_B], noise, draw(self.seed, start, count, shape, self.times)[1]

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.images_NCHW), generator=generator(self.seed, "pairs", epoch))


def straightness(velocity: Callable[[Tensor, Tensor], Tensor], noise_BCHW: Tensor, steps: int = STEPS) -> Tensor:
    """S = ∫ |(x_1 - x_0) - v(x_t, t)|² dt along the path that starts at each noise, (B,); 0 where it is straight.

    Liu et al., section 2.1. By the midpoint method: x_1 - x_0 is the mean of v over the middles of the steps, so S is
    its variance there (Welford's sums, exactly 0 for a constant v).
    """
    count, calls = 0, 0
    mean, square = torch.zeros_like(noise_BCHW), torch.zeros_like(noise_BCHW)

    def watched(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count, calls, mean, square
        v = velocity(x, t)
        calls += 1
        if calls % 2 == 0:  # every second stage is a step's middle
            count += 1
            delta = v - mean
            mean = mean + delta / count
            square = square + delta * (v - mean)
        return v

    integrate(watched, noise_BCHW, 2 * steps, "midpoint")
    return square.flatten(1).sum(1) / count


@torch.inference_mode()
def straightness_of(fitted: "RectifiedFlowTrainer", run: Run) -> float:
    """Mean straightness of a run's EMA weights over fixed noise, the same in every arm of a seed."""
    parts = []
    for start in range(0, SAMPLES, run.optim.batch):
        noise = initial_noise(run.seed, start, min(run.optim.batch, SAMPLES - start), run.image_shape)
        parts.append(straightness(fitted.velocity, noise.to(fitted.device)).cpu())
    return torch.cat(parts).mean().item()


def teacher_of(run: Run) -> Run:
    """The same network trained on the data, of the same seed and budget: the baseline's, unless an arm changes both."""
    return replace(run, arm="baseline", flow=Flow())


def open_pairs(run: Run, record: Record, fingerprint: str) -> Pairs:
    """The pairs of a run, made where they are missing; the teacher is trained where nobody has.

    They are kept beside the teacher's weights, for every run that wants them, and linked into this run's folder, so
    that a resume needs no teacher. Raises what training raises, and BadInput where they cannot be written.
    """
    N = run.flow.reflow
    folder, ranges = record.folder / "pairs", [(k, min(k + PART, N)) for k in range(0, N, PART)]
    paths = [folder / f"{start}-{stop}.safetensors" for start, stop in ranges]
    if not all(path.exists() for path in paths):
        fitted, home = teach(run, record.out, fingerprint)
        shared = home / f"pairs-{SOLVER}-{NFE}"
        try:
            folder.mkdir(exist_ok=True)
            shared.mkdir(exist_ok=True)
            with open(shared / "lock", "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # who comes second finds them made
                for (start, stop), path in zip(ranges, paths, strict=True):
                    if not (original := shared / path.name).exists():
                        _write(original, _generate(fitted, run, start, stop), fingerprint)
                    _link(original, path)
        except OSError as error:
            raise BadInput(
                f"cannot write to {folder}: {error.strerror}. Free some space and give the same command again"
            ) from error
    parts = [load_file(path) for path in paths]
    for path in paths:
        with safe_open(path, "pt") as file:  # older ones do not tell
            theirs = (file.metadata() or {}).get("fingerprint", fingerprint)
        if theirs != fingerprint:
            raise BadInput(f"{path} is of a teacher of data {theirs}, this run has {fingerprint}; give another out=DIR")
    return Pairs(
        torch.cat([part["images"] for part in parts]), parts[0]["straightness"].item(), run.seed, run.flow.times
    )


def teach(run: Run, out: Path, fingerprint: str) -> "tuple[RectifiedFlowTrainer, Path]":
    """The finished teacher of `run` and the folder of its weights; trained first, under its own lock, if need be.

    Where another process trains it, this one waits.
    """
    from liquiddiff import loop  # which imports this file

    teacher = teacher_of(run)
    own = Record(teacher, out)

    def finished() -> "tuple[RectifiedFlowTrainer, Path] | None":
        found = own.weights()
        state = checkpoint.load(found.folder) if found else None
        if found is None or state is None or state["images"] < teacher.optim.images:
            return None
        if state["fingerprint"] != fingerprint:
            raise BadInput(
                f"the teacher in {found.folder} was trained on data {state['fingerprint']}, "
                f"this run has {fingerprint}; give another out=DIR"
            )
        fitted = loop.prepare(teacher, resolve_device(teacher.device))
        if state["precision"] != fitted.precision:
            raise BadInput(
                f"the teacher in {found.folder} was trained in {state['precision']}, here it would compute in "
                f"{fitted.precision}: give a device of the same kind, or another out=DIR"
            )
        fitted.load_state(state)
        return fitted, found.folder

    if found := finished():
        return found
    own.create()
    print(f"reflow: its teacher first, {own.folder}", flush=True)
    with own.lock(wait=True):
        if found := finished():
            return found
        return loop.fit(teacher, own)[0], own.folder


@torch.inference_mode()
def _generate(fitted: "RectifiedFlowTrainer", run: Run, start: int, stop: int) -> dict[str, Tensor]:
    """Images start .. stop-1 of the teacher; the first part also holds its straightness."""
    images = []
    for k in range(start, stop, run.optim.batch):  # a batch that is known to fit, and part of the signature
        noise = initial_noise(run.seed, k, min(run.optim.batch, stop - k), run.image_shape, STREAM)
        images.append(fitted.generate(noise, NFE, SOLVER)[0].float().cpu().contiguous())
    extra = {"straightness": torch.tensor(straightness_of(fitted, run), dtype=torch.float64)} if start == 0 else {}
    return {"images": torch.cat(images), **extra}


def _write(path: Path, tensors: dict[str, Tensor], fingerprint: str) -> None:
    """Aside, synced, renamed: whoever finds the file finds it whole. With the fingerprint of the teacher's images."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(save(tensors, {"fingerprint": fingerprint}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    checkpoint.sync_folder(path.parent)


def _link(original: Path, path: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        os.link(original, temporary)
    except OSError:
        shutil.copyfile(original, temporary)
    os.replace(temporary, path)

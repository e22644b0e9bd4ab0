"""`train`, the one loop: a run in its folder, from its last checkpoint to its budget."""

import errno
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor

from liquiddiff import budget, checkpoint, distributed, flow, reflow
from liquiddiff.batches import Batch, Batches
from liquiddiff.config import BadInput, Run, choose
from liquiddiff.data import ImageData, open_data
from liquiddiff.device import deferred_interrupt, device_name, resolve_device, settle
from liquiddiff.record import Follower, Record, own_code
from liquiddiff.seeding import initialise
from liquiddiff.solvers import TABLEAUX
from liquiddiff.trainer import NonFinite, RectifiedFlowTrainer, validate


def prepare(run: Run, device: torch.device) -> RectifiedFlowTrainer:
    """A run's trainer at its start: network built, matched and initialised from the seed."""
    net = budget.build(run.model, run.image_shape)
    initialise(net, run.seed)
    if run.optim.compile:
        torch.compiler.reset()  # or a process's ninth network would be left to eager mode (dynamo's recompile_limit)
    return RectifiedFlowTrainer(net, device=device, seed=run.seed, flow=run.flow, optim=run.optim)


def restore(trainer: RectifiedFlowTrainer, record: Record, fingerprint: str) -> tuple[float, list[str]]:
    """Continue from the folder's newest sound checkpoint: the seconds of its training, and the commits that did it.

    A new folder starts from the finished weights of a run that differs in its evaluation alone, where there is one.
    Raises BadInput for a checkpoint of another configuration, other data or other code's network.
    """
    state, source = distributed.agreed(None if distributed.rank() else find_state(trainer, record, fingerprint))
    if state is None:
        record.rewind(-1)
        return 0.0, []
    try:
        trainer.load_state(state)
    except RuntimeError as error:  # names or shapes
        way = "give another out=DIR, or force=true to start again (the old folder is kept)"
        raise BadInput(f"the checkpoint in {source.folder} is of a network that other code built; {way}") from error
    if not record.done:
        record.rewind(trainer.images, source)
    commits = state.get("commits") or [source.env().get("commit", "")]  # older checkpoints do not tell
    if source.folder != record.folder and commits[-1] != own_code()[0]:
        when = commits[-1][:10] or "an unknown commit"
        print(f"note: the weights are those of {source.folder.name}, trained at {when}")
    return state["seconds"], commits


def find_state(trainer: RectifiedFlowTrainer, record: Record, fingerprint: str) -> tuple[dict[str, Any] | None, Record]:
    """What `restore` continues from, if anything, and whose it is."""
    mine = {"training": record.run.training_signature(), "fingerprint": fingerprint, "precision": trainer.precision}
    state, source = checkpoint.load(record.folder, mine=True), record
    if state is None and (twin := record.twin()):
        with suppress(checkpoint.Damaged):
            found = checkpoint.load(twin.folder)
            if found and found["images"] == record.run.optim.images and all(found[k] == v for k, v in mine.items()):
                state, source = found, twin
    for key, value in mine.items():
        if state and state[key] != value:
            kind = "a device of the same kind resumes it, and any device a run of optim.precision=fp32; else "
            raise BadInput(
                f"the checkpoint in {source.folder} has {key} {state[key]}, this run has {value}; "
                f"{kind if key == 'precision' else ''}give another out=DIR, or force=true to start again "
                "(the old folder is kept)"
            )
    return state, source


def train(run: Run, out: str | Path | None = None) -> tuple[RectifiedFlowTrainer, ImageData]:
    """Train `run` to its budget in its folder under `out`, from its last checkpoint if it has one.

    Returns the trainer and the images; the EMA weights are in `model/`. Raises as `fit`, and BadInput where another
    process holds the run.
    """
    distributed.start()
    record = (Follower if distributed.rank() else Record)(run, out)
    record.create()
    with record.lock():
        return fit(run, record)


def fit(
    run: Run,
    record: Record,
    progress: Callable[[int, float | None], None] = lambda images, loss: None,
    on_checkpoint: Callable[[], object] = lambda: None,
) -> tuple[RectifiedFlowTrainer, ImageData]:
    """The loop: batch, path, loss, update, EMA, record. The caller holds the record's lock.

    Calls `progress(images, loss)` after every step, with a loss only where it was read from the device. Raises
    BadInput, NonFinite, or KeyboardInterrupt once a checkpoint is written: a signal waits for the end of the step.
    """
    device = resolve_device(run.device)
    settle()
    choose("time distribution", run.flow.times, flow.TIMES)
    choose("loss", run.flow.loss, flow.LOSSES)
    choose("prediction", run.flow.prediction, flow.PREDICTIONS)
    stages = len(TABLEAUX[choose("solver", run.eval.solver, TABLEAUX)][1])
    steps = [nfe // stages for nfe in run.eval.nfe]
    if min(steps) < 1 or len(set(steps)) < len(steps):
        why = f"{min(run.eval.nfe)} is too few" if min(steps) < 1 else f"{run.eval.nfe} has equal numbers of steps"
        raise BadInput(f"eval.nfe={why} for solver {run.eval.solver}, which takes {stages} a step")
    if distributed.size() > 1 and run.flow.reflow:
        raise BadInput(f"flow.reflow={run.flow.reflow} trains its teacher first, which one process has to do: gpus=1")
    with distributed.first():
        images = open_data(run.data, run.cache)
    trainer = prepare(run, device)
    before, commits = restore(trainer, record, images.fingerprint)
    record.describe()  # not before: a run that is refused leaves the folder as it found it
    trainer.seconds = before
    if trainer.images < run.optim.images and own_code()[0] not in commits[-1:]:
        commits.append(own_code()[0])
    pairs = reflow.open_pairs(run, record, images.fingerprint) if run.flow.reflow else None

    def make(start: int, count: int) -> Batch:
        """A batch, or this process's part of it; with reflow the images come with their noise and t."""
        if pairs:
            return *pairs.batch(start, count), None
        first, number = distributed.share(count)
        begin, least = start + first, max(1, number)
        noise, t = flow.draw(run.seed, begin, least, run.image_shape, run.flow.times)
        part = (first, number, count) if distributed.size() > 1 else None
        return images.batch(run.seed, begin, least), noise, t, part

    size = budget.meta_cost(run.model, run.image_shape)
    record.provenance(
        device_name(device), trainer.precision, images.fingerprint,
        images=len(images.images_NCHW), trained_by=commits, kernels=trainer.kernels(), **asdict(size),
    )  # fmt: skip
    progress(trainer.images, None)
    log = Log(record, run, trainer.images)
    begin = time.perf_counter()

    def save() -> None:
        trainer.check_finite()
        trainer.seconds = before + time.perf_counter() - begin
        if distributed.rank():
            return
        state = trainer.state() | {"training": run.training_signature(), "fingerprint": images.fingerprint}
        state |= {"precision": trainer.precision, "seconds": trainer.seconds, "commits": commits}
        checkpoint.save(state, record.folder)

    if trainer.images and not (record.folder / "checkpoint.pt").exists():
        save()  # weights that another run trained are this run's own from here on
    with deferred_interrupt() as interrupted, Batches(make, run, device) as batches:
        while trainer.images < run.optim.images:
            before_step = trainer.images
            result = trainer.train_step(*batches(before_step))
            log.step(before_step, result, trainer.images - before_step)
            at_val, at_checkpoint = log.crosses(run.eval.val_every), log.crosses(run.checkpoint_every)
            loss, stop = None, distributed.any_of(bool(interrupted))
            if at_val or at_checkpoint or log.crosses(log.every) or stop:
                val = validate(trainer, images, run.eval.val_n, run.eval.batch) if at_val else {}
                loss = log.flush(val)
            if at_checkpoint or stop:
                save()
                on_checkpoint()
            progress(trainer.images, loss)
            if stop:
                raise KeyboardInterrupt(*distributed.union(interrupted))
        if distributed.any_of(bool(interrupted)):  # since the last step looked
            raise KeyboardInterrupt(*distributed.union(interrupted))
    trainer.check_finite()
    if not distributed.rank():
        try:
            cast(PyTorchModelHubMixin, trainer.ema.net).save_pretrained(record.folder / "model")
        except SafetensorError as error:  # of a full disk
            raise OSError(errno.EIO, str(error), str(record.folder / "model")) from error
    if pairs:
        mine = reflow.straightness_of(trainer, run)
        record.write({"straightness": mine, "teacher_straightness": pairs.straightness})
    record.trained()
    return trainer, images


class Log:
    """Losses since the last line of metrics.jsonl, kept on the device so that no step waits for it."""

    def __init__(self, record: Record, run: Run, images: int):
        self.record, self.total, self.images, self.count = record, run.optim.images, images, 0
        self.every = max(run.optim.batch, run.optim.images // 100)
        self.losses: list[Tensor] = []
        self.since = (images, time.perf_counter())
        self.lr = 0.0

    def step(self, before: int, result: dict[str, Any], count: int) -> None:
        """Note a step of `count` images that began at `before`."""
        self.images, self.count, self.lr = before + count, count, result["lr"]
        self.losses.append(result["loss"])

    def crosses(self, interval: int) -> bool:
        """The last step reached a multiple of `interval`, or the end."""
        return self.images // interval > (self.images - self.count) // interval or self.images >= self.total

    def flush(self, more: dict[str, float]) -> float:
        """Write the mean loss since the last line, and `more`. Raises NonFinite, before anything is saved."""
        losses = distributed.total(torch.stack(self.losses))
        loss = losses.mean().item()
        if not math.isfinite(loss):
            steps = len(losses) - int(losses.isfinite().logical_not().nonzero()[0]) - 1
            raise NonFinite(
                f"the loss became {loss} at {self.images - steps * self.count} images; the last good checkpoint is "
                f"kept in {self.record.folder}. Try a lower optim.lr, or optim.precision=fp32"
            )
        (images, begin), now = self.since, time.perf_counter()
        rate = round((self.images - images) / (now - begin), 1)
        self.record.write({"images": self.images, "loss": loss, "lr": self.lr, "images_per_second": rate} | more)
        self.losses, self.since = [], (self.images, now)
        return loss

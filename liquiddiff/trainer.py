"""Rectified-flow training: `RectifiedFlowTrainer`, the seed's quick start, and `train`, the one loop on it."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from liquiddiff import budget, checkpoint, distributed, flow, reflow
from liquiddiff.config import BadInput, Flow, Optim, Run, choose
from liquiddiff.data import ImageData, open_data
from liquiddiff.device import deferred_interrupt, device_name, keep_freed_memory, resolve_device, resolve_precision
from liquiddiff.ema import EMA
from liquiddiff.record import Follower, Record
from liquiddiff.seeding import initialise
from liquiddiff.solvers import TABLEAUX, integrate

VAL_BINS = 4  # val_loss is also given for each quarter of t


class NonFinite(BadInput):
    """The loss, or a weight, is no longer a number."""


class RectifiedFlowTrainer:
    """One network, its optimizer and its EMA.

    Give `lr` alone for a constant rate, or `optim` for the whole recipe (warm-up, cosine, clipping, precision). Noise
    and times come from (seed, images seen so far), so a run continued from `state()` equals one never interrupted.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        device: str | torch.device = "cpu",
        seed: int = 0,
        flow: Flow | None = None,
        optim: Optim | None = None,
    ):
        self.device = torch.device(device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.seed, self.flow, self.images, self.seconds = seed, flow or Flow(), 0, 0.0
        self.optim = optim or Optim(lr=lr, warmup=0)
        self.budget = self.optim.images if optim else None
        self.precision = resolve_precision(self.optim.precision, self.device)
        if self.optim.checkpointing:
            model.checkpointing = True  # type: ignore[assignment]
        self.ema = EMA(self.model, self.optim.ema)
        # Compiled inside: of the wrapped network the compiler would cut the graph at every bucket of gradients.
        net = cast(nn.Module, torch.compile(self.model)) if self.optim.compile else self.model
        self.forward = distributed.wrap(net)
        b1, b2 = self.optim.betas
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), self.optim.lr, (b1, b2), weight_decay=self.optim.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def autocast(self) -> Any:
        """The context of forward passes."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision])

    def learning_rate(self) -> float:
        """Linear warm-up, then cosine to zero over the budget; constant without a budget."""
        lr, warmup = self.optim.lr, self.optim.warmup
        if self.images < warmup:
            return lr * (self.images + 1) / warmup
        if not self.budget:
            return lr
        return lr * 0.5 * (1 + math.cos(math.pi * min(1, (self.images - warmup) / max(1, self.budget - warmup))))

    def train_step(
        self,
        images_BCHW: Tensor,
        noise_BCHW: Tensor | None = None,
        t_B: Tensor | None = None,
        part: tuple[int, int, int] | None = None,
    ) -> dict[str, Any]:
        """One update on images in [-1, 1]. Returns {"loss": 0-d tensor, "lr": float}; nothing waits for the device.

        With `part` = (first, number, count) these are `number` images, from `first` on, of a batch of `count` of which
        other processes have the rest; the loss is then this part's summand. A process without a part gives any image.
        """
        first, number, count = part or (0, len(images_BCHW), len(images_BCHW))
        if noise_BCHW is None or t_B is None:
            shape = tuple(images_BCHW.shape[1:])
            noise, t = flow.draw(self.seed, self.images + first, len(images_BCHW), shape, self.flow.times)
            noise_BCHW, t_B = noise if noise_BCHW is None else noise_BCHW, t if t_B is None else t_B
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        losses = self.losses(self.forward, images_BCHW, noise_BCHW, t_B)
        loss = losses[:number].sum() / count if part else losses.mean()
        self.scaler.scale(loss * distributed.size() if part else loss).backward()  # gradients are averaged, not added
        if self.optim.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.images += count
        self.ema.update(self.images, count)
        return {"loss": loss.detach(), "lr": lr}

    def losses(self, net: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Per-image loss, (B,), in float32."""
        if self.device.type == "cuda":  # only from pinned memory do copies run beside the computation
            x, noise, t = (v.pin_memory() if v.device.type == "cpu" else v for v in (x, noise, t))
        x, noise, t = (v.to(self.device, non_blocking=True) for v in (x, noise, t))
        target, _ = flow.PREDICTIONS[self.flow.prediction]
        with self.autocast():
            output = net(flow.interpolate(x, noise, t), t)
        return flow.LOSSES[self.flow.loss](output.float() - target(x, noise, flow.per_image(t)))

    def velocity(self, x_t_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The EMA network's velocity, whatever it predicts, in float32."""
        with self.autocast():
            output = self.ema.net(x_t_BCHW, t_B)
        return flow.PREDICTIONS[self.flow.prediction][1](output.float(), x_t_BCHW, flow.per_image(t_B))

    @torch.inference_mode()
    def sample(
        self,
        batch_size: int,
        image_size: int,
        num_steps: int = 50,
        solver: str = "euler",
        start: int = 0,
        channels: int = 3,
    ) -> Tensor:
        """EMA samples `start`, `start` + 1, ... of this seed in [-1, 1], (B, C, H, W); `num_steps` is the NFE."""
        noise = flow.initial_noise(self.seed, start, batch_size, (channels, image_size, image_size))
        return self.generate(noise, num_steps, solver)[0]

    @torch.inference_mode()
    def generate(self, noise_BCHW: Tensor, nfe: int, solver: str, shift: float = 1.0) -> tuple[Tensor, int]:
        """Images from given noise, and the evaluations used."""
        return integrate(self.velocity, noise_BCHW.to(self.device), nfe, solver, shift)

    def check_finite(self) -> None:
        """Raises NonFinite where a weight is no number: an infinite gradient can spoil them under a finite loss."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise NonFinite(f"a weight became infinite by {self.images} images; the last good checkpoint is kept")

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "images": self.images,
            "model": self.model.state_dict(),
            "ema": self.ema.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.images = state["images"]
        self.model.load_state_dict(state["model"])
        self.ema.net.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@torch.inference_mode()
def validate(trainer: RectifiedFlowTrainer, images: ImageData, n: int, batch: int) -> dict[str, float]:
    """EMA loss on n fixed held-out (image, t, noise) triples, the same in every arm and seed.

    Whole, and by quarter of t: t is stratified, so the quarters have n / 4 each. Process 0 alone knows them.
    """
    losses = []
    for start in distributed.mine(range(0, n, batch)):
        index = torch.arange(start, min(start + batch, n))
        x = images.tensor(images.heldout[index.numpy() % len(images.heldout)])
        noise = flow.initial_noise(-1, start, len(index), tuple(x.shape[1:]))  # -1: no run's seed
        t = ((index * 7919) % n + 0.5) / n  # 7919 is prime: every stratum once, in an order unlike the images'
        x, noise, t = (v.to(trainer.device) for v in (x, noise, t))
        losses.append(flow.LOSSES["mse"](trainer.velocity(flow.interpolate(x, noise, t), t) - (noise - x)).cpu())
    losses = distributed.collect(losses)
    if distributed.rank():
        return {}
    loss = torch.cat(losses)
    bins = ((torch.arange(n) * 7919) % n * VAL_BINS) // n
    by_bin = {f"val_loss_t{k}": loss[bins == k].mean().item() for k in range(VAL_BINS)}
    return {"val_loss": loss.mean().item(), **by_bin}


def prepare(run: Run, device: torch.device) -> RectifiedFlowTrainer:
    """A run's trainer at its start: network built, matched and initialised from the seed."""
    net = budget.build(run.model, run.image_shape)
    initialise(net, run.seed)
    return RectifiedFlowTrainer(net, device=device, seed=run.seed, flow=run.flow, optim=run.optim)


def restore(trainer: RectifiedFlowTrainer, record: Record, fingerprint: str) -> float:
    """Continue from the folder's newest sound checkpoint. Returns the training seconds it already took.

    A new folder starts from the finished weights of a run that differs in its evaluation alone, where there is one.
    Raises BadInput for a checkpoint of another configuration or other data.
    """
    state, source = distributed.agreed(None if distributed.rank() else find_state(trainer, record, fingerprint))
    if state is None:
        record.rewind(-1)
        return 0.0
    trainer.load_state(state)
    if not record.done:
        record.rewind(trainer.images, source)
    return state["seconds"]


def find_state(trainer: RectifiedFlowTrainer, record: Record, fingerprint: str) -> tuple[dict[str, Any] | None, Record]:
    """What `restore` continues from, if anything, and whose it is."""
    mine = {"training": record.run.training_signature(), "fingerprint": fingerprint, "precision": trainer.precision}
    state, source = checkpoint.load(record.folder), record
    if state is None and (twin := record.twin()):
        with suppress(checkpoint.Damaged):
            found = checkpoint.load(twin.folder)
            if found and found["images"] == record.run.optim.images and all(found[k] == v for k, v in mine.items()):
                state, source = found, twin
    for key, value in mine.items():
        if state and state[key] != value:
            raise BadInput(
                f"the checkpoint in {source.folder} has {key} {state[key]}, this run has {value}; "
                "give another out=DIR, or force=true to start again (the old folder is kept)"
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
        record.describe()
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
    keep_freed_memory()
    choose("time distribution", run.flow.times, flow.TIMES)
    choose("loss", run.flow.loss, flow.LOSSES)
    choose("prediction", run.flow.prediction, flow.PREDICTIONS)
    stages = len(TABLEAUX[choose("solver", run.eval.solver, TABLEAUX)][1])
    if min(run.eval.nfe) < stages:
        raise BadInput(
            f"eval.nfe={min(run.eval.nfe)} is too few for solver {run.eval.solver}, which takes {stages} a step"
        )
    if distributed.size() > 1 and run.flow.reflow:
        raise BadInput(f"flow.reflow={run.flow.reflow} trains its teacher first, which one process has to do: gpus=1")
    with distributed.first():
        images = open_data(run.data, run.cache)
    trainer = prepare(run, device)
    before = trainer.seconds = restore(trainer, record, images.fingerprint)
    pairs = reflow.open_pairs(run, record, images.fingerprint) if run.flow.reflow else None

    def step(start: int, count: int) -> dict[str, Any]:
        """One update, by this process's part of the batch; with reflow the images come with their noise and t."""
        if pairs:
            return trainer.train_step(*pairs.batch(start, count))
        if distributed.size() == 1:
            return trainer.train_step(images.batch(run.seed, start, count))
        first, number = distributed.share(count)
        return trainer.train_step(images.batch(run.seed, start + first, max(1, number)), part=(first, number, count))

    size = budget.meta_cost(run.model, run.image_shape)
    record.provenance(
        device_name(device), trainer.precision, images.fingerprint, images=len(images.images_NCHW), **asdict(size)
    )
    progress(trainer.images, None)
    log = Log(record, run, trainer.images)
    begin = time.perf_counter()

    def save() -> None:
        trainer.check_finite()
        trainer.seconds = before + time.perf_counter() - begin
        if distributed.rank():
            return
        state = trainer.state() | {"training": run.training_signature(), "fingerprint": images.fingerprint}
        checkpoint.save(state | {"precision": trainer.precision, "seconds": trainer.seconds}, record.folder)

    if trainer.images and not (record.folder / "checkpoint.pt").exists():
        save()  # weights that another run trained are this run's own from here on
    with deferred_interrupt() as interrupted:
        while trainer.images < run.optim.images:
            count = min(run.optim.batch, run.optim.images - trainer.images)
            log.step(trainer.images, step(trainer.images, count), count)
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
    trainer.check_finite()
    if not distributed.rank():
        cast(PyTorchModelHubMixin, trainer.ema.net).save_pretrained(record.folder / "model")
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

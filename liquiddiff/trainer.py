"""`RectifiedFlowTrainer`, the seed's quick start: a network, its optimizer and its EMA; and the held-out loss."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from liquiddiff import adamw, depthwise, distributed, flow
from liquiddiff.config import BadInput, Flow, Optim
from liquiddiff.data import ImageData
from liquiddiff.device import resolve_precision
from liquiddiff.ema import EMA
from liquiddiff.solvers import integrate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
        net = cast(nn.Module, torch.compile(self.model)) if self.optim.compile else self.model
        if self.optim.compile:  # of several processes too as one graph, not cut at every bucket of gradients
            torch._dynamo.config.optimize_ddp = False
        self.forward = distributed.wrap(net)
        b1, b2 = self.optim.betas
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), self.optim.lr, (b1, b2), weight_decay=self.optim.weight_decay, fused=True
        )
        # Not of several processes: each would find for itself whether it can be had, and weights are never compared.
        alone = self.device.type == "cpu" and self.precision != "fp16" and distributed.size() == 1
        self._update = adamw.Update(self.optimizer, self.ema.weights) if alone else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def autocast(self) -> Any:
        """The context of forward passes."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def kernels(self) -> str:
        """What computes depthwise convolutions, on which a speed depends: see `depthwise.backend`."""
        like = next(self.model.parameters()).new_empty(0, dtype=DTYPES[self.precision])
        return "torch" if self.optim.compile and like.is_cuda else depthwise.backend(like=like)

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
        if not self.model.training:  # asked first: setting it visits every module
            self.model.train()
        losses = self.losses(self.forward, images_BCHW, noise_BCHW, t_B)
        loss = losses[:number].sum() / count if part else losses.mean()
        self.scaler.scale(loss * distributed.size() if part else loss).backward()  # gradients are averaged, not added
        decay = self.ema.decay(self.images + count, count)
        at_once = self._update is not None and self._update(self.optim.clip, decay)
        if not at_once:
            self._clip_and_step()
        self.ema.update(decay, weights=not at_once)
        self.optimizer.zero_grad(set_to_none=True)
        self.images += count
        return {"loss": loss.detach(), "lr": lr}

    def _clip_and_step(self) -> None:
        if self.optim.clip:
            self.scaler.unscale_(self.optimizer)
            weights = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(weights, self.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

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
        t = ((index * 7919) % n + 0.5) / n  # prime: every stratum once (unless n is a multiple)
        x, noise, t = (v.to(trainer.device) for v in (x, noise, t))
        losses.append(flow.LOSSES["mse"](trainer.velocity(flow.interpolate(x, noise, t), t) - (noise - x)).cpu())
    losses = distributed.collect(losses)
    if distributed.rank():
        return {}
    loss = torch.cat(losses)
    bins = ((torch.arange(n) * 7919) % n * VAL_BINS) // n
    by_bin = {f"val_loss_t{k}": loss[bins == k].mean().item() for k in range(VAL_BINS)}
    return {"val_loss": loss.mean().item(), **by_bin}

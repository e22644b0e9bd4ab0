"""How the measures of analysis/cost.py are timed, and those of speed; overheads.py has the others.

What is compared runs in turn, round after round, in one process: a ratio is taken within a round, so that whatever else
the machine does falls on both sides, and its median and quartiles are over the rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from liquiddiff import budget, depthwise
from liquiddiff.config import SIZES, Model, Optim
from liquiddiff.device import resolve_precision
from liquiddiff.seeding import initialise
from liquiddiff.trainer import DTYPES, RectifiedFlowTrainer

Times = dict[str, list[float]]
EVALUATIONS = 4  # of the network in a timed sampling, as real ones have several; images/s are those of one


@dataclass(frozen=True)
class Row:
    """One figure: its median over rounds, quartiles, and the target as (">=" or "<=", number), if it has one."""

    measure: str
    unit: str
    values: list[float]
    target: tuple[str, float] | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third, or the value twice where there is one round."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, method="inclusive")
        return low, high

    @property
    def reached(self) -> bool | None:
        """Whether the median is on the right side of the target."""
        if self.target is None:
            return None
        return self.median >= self.target[1] if self.target[0] == ">=" else self.median <= self.target[1]


@dataclass(frozen=True)
class Bench:
    """Where it is measured, and how often."""

    device: torch.device
    repeats: int = 7

    @property
    def gpu(self) -> bool:
        """CUDA: other targets, larger batches, bf16."""
        return self.device.type == "cuda"

    def seconds(self, task: Callable[[], object]) -> float:
        """Of one call; on a GPU by its own events, from an idle device to an idle device."""
        if not self.gpu:
            before = time.perf_counter()
            task()
            return time.perf_counter() - before
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        begin.record()
        task()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def rounds(self, tasks: Mapping[str, Callable[[], object]]) -> Times:
        """Seconds of every task in each of `repeats` rounds, after one round that is not counted."""
        times: Times = {name: [] for name in tasks}
        for k in range(self.repeats + 1):
            for name, task in tasks.items():
                elapsed = self.seconds(task)
                if k:
                    times[name].append(elapsed)
        return times

    def trainer(self, model: Model, side: int, channels: int = 3) -> RectifiedFlowTrainer:
        """A network at its start, with the optimizer, EMA and precision that training has on this device."""
        net = budget.build(model, (channels, side, side))
        initialise(net, 0)
        return RectifiedFlowTrainer(net, device=self.device, optim=Optim())

    def matmul(self, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
        """A square product that reaches the machine's peak, and its FLOPs."""
        side = 8192 if self.gpu else 2048
        return self.matmul_of(side, dtype), 2.0 * side**3

    def matmul_of(self, side: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
        """A square product."""
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        return lambda: a @ b


def model_of(size: str, network: str = "liquid") -> Model:
    """A size's baseline, or its parameter-matched peer."""
    return Model(size, **SIZES[size], network=network)


def ratio(times: Times, slow: str, fast: str) -> list[float]:
    """How many times faster, round by round."""
    return [a / b for a, b in zip(times[slow], times[fast], strict=True)]


def images(count: int, channels: int, side: int) -> Tensor:
    """Random images in [-1, 1]."""
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def literal(bench: Bench) -> Iterator[Row]:
    """A training step against the literal reading of the seed in torch's default layout, from the same weights."""
    for size, channels, side, batch in (("tiny", 3, 32, 128 if bench.gpu else 16), ("nano", 1, 8, 128)):
        fast, x = bench.trainer(model_of(size), side, channels), images(batch, channels, side)
        slow = bench.trainer(model_of(size), side, channels)
        slow.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        slow.ema.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

        def step(slow: RectifiedFlowTrainer = slow, x: Tensor = x) -> None:
            with depthwise.literal():
                slow.train_step(x)

        times = bench.rounds({"fast": partial(fast.train_step, x), "literal": step})
        rate = batch / statistics.median(times["fast"])
        note = f"batch {batch}, {fast.precision}; fast {rate:.4g} images/s"
        yield Row(
            f"training {size} {side}x{side}: literal / fast",
            "x",
            ratio(times, "literal", "fast"),
            (">=", 3 if bench.gpu else 2),
            note,
        )


def peers(bench: Bench) -> Iterator[Row]:
    """Training and sampling of tiny against DDPM's U-Net and DiT of its parameters, and against the matmul peak."""
    goals = {"training ddpm_unet": 1.6, "training dit": 1.5, "sampling ddpm_unet": 2, "sampling dit": 2}
    if bench.gpu:
        goals = {name: 2 if name.startswith("training") else 3 for name in goals}
    for side, batch in ((32, 128), (64, 32)) if bench.gpu else ((32, 16), (64, 4)):
        networks, x = ("liquid", "ddpm_unet", "dit"), images(batch, 3, side)
        trainers = {name: bench.trainer(model_of("tiny", name), side) for name in networks}
        precision = trainers["liquid"].precision
        product, flops = bench.matmul(DTYPES[precision])
        tasks: dict[str, Callable[[], object]] = {"matmul": product}
        if torch.backends.mkldnn.is_available() and not bench.gpu:  # the other product that torch has
            square = torch.randn(2048, 2048)
            tasks["onednn"] = partial(torch.ops.mkldnn._linear_pointwise, square, square, None, "none", [], "")
        for name, trainer in trainers.items():
            noise = torch.randn(batch, 3, side, side, device=bench.device)
            tasks[f"training {name}"] = partial(trainer.train_step, x)
            tasks[f"sampling {name}"] = partial(trainer.generate, noise, EVALUATIONS, "euler")
        times = bench.rounds(tasks)
        for name in networks:
            times[f"sampling {name}"] = [seconds / EVALUATIONS for seconds in times[f"sampling {name}"]]
        for what in ("training", "sampling"):
            mine = f"{what} liquid"
            for name in networks[1:]:
                theirs = f"{what} {name}"
                rates = [batch / statistics.median(times[key]) for key in (mine, theirs)]
                note = f"batch {batch}, {precision}; {rates[0]:.4g} against {rates[1]:.4g} images/s"
                yield Row(f"{what} tiny {side}x{side}: images/s / {name}'s", "x", ratio(times, theirs, mine),
                          (">=", goals[theirs]), note)  # fmt: skip
        macs = budget.meta_cost(model_of("tiny"), (3, side, side)).macs
        peak = [flops / seconds for seconds in times["matmul"]]
        for what, passes, goal in (("sampling", 1, 0.8), ("training", 3, 0.65)):  # backward is twice forward
            done = [2 * macs * passes * batch / seconds for seconds in times[f"{what} liquid"]]
            share = [a / b for a, b in zip(done, peak, strict=True)]
            note = f"peak {statistics.median(peak) / 1e9:.4g} GFLOP/s, {precision}"
            if "onednn" in times:
                other = [a * s / flops for a, s in zip(done, times["onednn"], strict=True)]
                rate = flops / statistics.median(times["onednn"]) / 1e9
                note += f"; {statistics.median(other):.3g} of oneDNN's {rate:.4g}"
            yield Row(f"{what} tiny {side}x{side}: share of the matmul peak", "of peak", share,
                      None if bench.gpu else (">=", goal), note)  # fmt: skip


def kernels(bench: Bench) -> Iterator[Row]:
    """Depthwise 7x7 with its gradients against three times its own forward; on a GPU also against copying."""
    B, C, H, k = 64, 64, 32, 7
    dtype = DTYPES[resolve_precision("auto", bench.device)]
    shape, weights = (B, C, H, H), (C, 1, k, k)
    x, g = (torch.randn(shape, device=bench.device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for _ in range(2))  # fmt: skip
    w, b = torch.randn(weights, device=bench.device, dtype=dtype), torch.randn(C, device=bench.device, dtype=dtype)
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]

    def forward() -> None:
        with torch.no_grad():
            depthwise.depthwise(x, w, b)

    def both() -> None:
        torch.autograd.grad(depthwise.depthwise(*leaves), leaves, g)

    tasks: dict[str, Callable[[], object]] = {"forward": forward, "all": both}
    if bench.gpu:
        tasks["copy"] = lambda: x.clone(memory_format=torch.preserve_format)
    times = bench.rounds(tasks)
    milliseconds = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    note = f"{tuple(shape)}; " + ", ".join(f"{name} {value:.3g} ms" for name, value in milliseconds.items())
    thirds = [a / (3 * b) for a, b in zip(times["all"], times["forward"], strict=True)]
    yield Row("depthwise 7x7: forward + gradients / 3 forward", "x", thirds, ("<=", 1.5), note)
    if bench.gpu:  # forward reads and writes as much as a copy does
        yield Row("depthwise 7x7: share of the copy bandwidth", "of copy", ratio(times, "copy", "forward"),
                  (">=", 0.7), note)  # fmt: skip

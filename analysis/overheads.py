"""The measures of analysis/cost.py that are not the network's speed: what stands beside it, and memory."""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from analysis import metrics
from analysis.benchmarks import Bench, Row, images, model_of
from liquiddiff import adamw, checkpoint, flow, tracking
from liquiddiff.config import Run
from liquiddiff.data import open_data, to_uint8
from liquiddiff.loop import Log
from liquiddiff.memory import training_memory
from liquiddiff.record import Record

ROOT = Path(__file__).resolve().parents[1]


def start(bench: Bench) -> Iterator[Row]:
    """How soon the command answers: --help, a typo, and a grid of 60 finished runs."""
    from experiments import compose

    def command(*arguments: str, status: int = 0) -> Callable[[], None]:
        def call() -> None:
            done = subprocess.run([sys.executable, "experiments/run.py", *arguments], cwd=ROOT, capture_output=True)
            if done.returncode != status:
                raise RuntimeError(f"run.py {' '.join(arguments)} gave {done.returncode}: {done.stderr.decode()}")

        return call

    with tempfile.TemporaryDirectory() as out:
        arms = ["baseline", *sorted(compose.arms())[:11]]
        grid = [f"ablation={','.join(arms)}", "seed=0,1,2,3,4", "data=digits", f"out={out}"]
        for run in compose.plan(grid)[1]:
            record = Record(run)
            record.create()
            record.describe()
            record.finish(seconds=0)
        tasks = {
            "run.py --help": command("--help"),
            "run.py ablation=a_typo": command("ablation=a_typo", status=2),
            "a finished grid of 60 runs, again": command(*grid),
        }
        for name, seconds in Bench(torch.device("cpu"), bench.repeats).rounds(tasks).items():
            yield Row(name, "s", seconds, ("<=", 5 if "grid" in name else 1.5))


def step(bench: Bench) -> Iterator[Row]:
    """Data, noise, logging, EMA and checkpoints as a share of the training step that they stand beside."""
    from experiments import compose

    for tier, side, channels, goal in (("laptop", 8, 1, 0.03), ("hour", 64, 3, 0.01)):
        run = compose.as_run(compose.one([f"tier={tier}", "data=digits"]))
        # A step of the hour tier takes half a minute on two cores: a part of its batch, in proportion.
        scale = 32 if tier == "hour" and not bench.gpu else 1
        with tempfile.TemporaryDirectory() as out:
            times = bench.rounds(_beside(bench, replace(run, out=out), side, channels, scale))
        flushes = run.optim.batch / max(run.optim.batch, run.optim.images // 100)
        saves = run.optim.batch / run.checkpoint_every
        pixels = channels * side**2 / 64  # reading is timed on digits, at either tier
        times["ema"] = [max(0.0, a - b) for a, b in zip(times["ema"], times.pop("without"), strict=True)]
        shares = []
        for t in (dict(zip(times, values, strict=True)) for values in zip(*times.values(), strict=True)):
            beside = pixels * t["data"] + t["ema"] + scale * t["noise"]
            beside += flushes * t["log"] + saves * t["checkpoint"]
            bare = scale * (t["step"] - t["noise"] - t["ema"])
            shares.append((beside + min(saves * t["mlflow"], tracking.SHARE * bare)) / bare)  # Mirror keeps to SHARE
        shown = ", ".join(f"{name} {1e3 * statistics.median(values):.3g}" for name, values in times.items())
        part = f" (of a step, noise: {1 / scale:.2g})" if scale > 1 else ""
        yield Row(
            f"data, noise, logging, EMA, checkpoints / step, {tier} tier",
            "of step",
            shares,
            ("<=", goal),
            f"ms: {shown}{part}; batch {run.optim.batch}",
        )


def _beside(bench: Bench, run: Run, side: int, channels: int, scale: int) -> dict[str, Callable[[], object]]:
    """What a training loop does, apart."""
    record = Record(run)
    record.create()
    record.describe()
    batch = run.optim.batch // scale
    trainer, x = bench.trainer(run.model, side, channels), images(batch, channels, side)
    digits, log = open_data(run.data, run.cache), Log(record, run, 0)
    ema, without = _averaged(bench, run, side, channels)

    def flush() -> None:
        for _ in range(max(1, log.every // run.optim.batch)):
            log.step(0, {"loss": torch.zeros(()), "lr": 0.1}, run.optim.batch)
        log.flush({})

    def save() -> None:
        trainer.check_finite()
        checkpoint.save(trainer.state(), record.folder)

    return {
        "step": lambda: trainer.train_step(x),
        "data": lambda: digits.batch(0, 0, run.optim.batch),
        "noise": lambda: flow.draw(0, 0, batch, tuple(x.shape[1:])),
        "ema": ema,
        "without": without,
        "log": flush,
        "checkpoint": save,
        "mlflow": lambda: tracking.mirror_to_mlflow(record, {"arm": run.arm}),
    }


def _averaged(bench: Bench, run: Run, side: int, channels: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The EMA's update; where it is in the optimizer's pass, that pass; and what of this is not the EMA's."""
    trainer = bench.trainer(run.model, side, channels)
    trainer.train_step(images(1, channels, side))  # torch makes the optimizer's state
    for weight in trainer.model.parameters():
        weight.grad = torch.zeros_like(weight)
    whole, part = (adamw.Update(trainer.optimizer, averages) for averages in (trainer.ema.weights, ()))
    if whole(1.0, 0.9):
        # The pass with the EMA comes first and finds the caches cold: that counts against the EMA.
        return lambda: whole(1.0, 0.9), lambda: part(1.0, 0.9)
    return lambda: trainer.ema.update(0.9), lambda: None


def evaluation(bench: Bench) -> Iterator[Row]:
    """A second arm's evaluation against sampling plus the extractor's forward, and what it extracts beyond n images."""
    for extractor in ("digits", "effnet_lite0"):  # the laptop tier's tiny one, and a real one
        yield from _evaluation(bench, extractor)


def _evaluation(bench: Bench, name: str) -> Iterator[Row]:
    nfe, run = 8, Run()
    n, run = run.eval.n, replace(run, eval=replace(run.eval, nfe=[nfe], extractor=name))
    trainer, digits = bench.trainer(run.model, 8, 1), open_data(run.data, run.cache)
    nn.init.normal_(trainer.ema.net.head[2].weight, std=0.02)  # type: ignore[union-attr, index, arg-type]
    extractor = metrics.load_extractor(run.eval.extractor, None, bench.device)
    seen = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    def sample(first: int, number: int, evaluations: int) -> tuple[Tensor, int]:
        noise = flow.initial_noise(0, first, number, run.image_shape)
        x, used = trainer.generate(noise, evaluations, "euler")
        return to_uint8(x.cpu()), used

    def generate() -> list[Tensor]:
        return [sample(first, min(run.eval.batch, n - first), nfe)[0] for first in range(0, n, run.eval.batch)]

    with tempfile.TemporaryDirectory() as cache:
        second = replace(run, cache=cache)

        def evaluate() -> None:
            metrics.evaluate(second, digits, sample, bench.device, lambda row: None)

        generated = torch.cat(generate())
        evaluate()  # the first arm
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: count(module, inputs) if type(module) is type(extractor.net) else None
        )
        evaluate()
        hook.remove()
        times = bench.rounds(
            {"evaluate": evaluate, "sample": generate, "extract": lambda: extractor(generated), "load": _loads(run)}
        )
    yield Row(
        f"evaluation of a second arm, {name}: images extracted beyond its own", "images", [float(seen - n)], ("<=", 0.0)
    )
    wall = [e / (s + x) for e, s, x in zip(times["evaluate"], times["sample"], times["extract"], strict=True)]
    shown = ", ".join(f"{part} {statistics.median(seconds):.3g} s" for part, seconds in times.items())
    yield Row(
        f"evaluation, {name}: wall / (sampling + its forward)", "x", wall, ("<=", 1.1), f"n={n}, {nfe} NFE; {shown}"
    )


def _loads(run: Run) -> Callable[[], object]:
    return lambda: metrics.load_extractor(run.eval.extractor, None, torch.device("cpu"))


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of a step of tiny at 256x256, found on the meta device."""
    for checkpointing, goal in ((False, 4.0), (True, 2.0)):
        found = training_memory(model_of("tiny"), (3, 256, 256), 8, "fp16", checkpointing)
        label = "with" if checkpointing else "without"
        yield Row(f"peak training memory, tiny 256x256 fp16 batch 8, {label} checkpointing", "GB", [found.peak / 1e9],
                  ("<=", goal), f"estimate; {found.saved / 1e9:.3g} GB kept for the backward pass")  # fmt: skip

"""The cost room: every mixer and peer at every size on this device (results.csv), memory of training (memory.csv).

Each row is written as soon as it is known, in the place of an older one of the same device, so that Ctrl-C loses one.
"""

import csv
import ctypes
import gc
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from analysis import render
from analysis.benchmarks import EVALUATIONS, Bench, images, model_of
from analysis.cli import ROOMS
from liquiddiff import budget
from liquiddiff.config import BadInput, Mixer, Model, choose
from liquiddiff.device import device_name, peak_mib, reset_peak
from liquiddiff.memory import training_memory
from liquiddiff.mixers import MIXERS

ROOM = ROOMS / "cost"
PEERS = ("ddpm_unet", "dit")
SIDE = {"nano": 8}  # pixels; else 32, which attention at every level of the largest size can still do on a CPU
BATCH = {"nano": (128, 1024), "tiny": (16, 256), "small": (4, 128), "base": (2, 64), "large": (2, 32)}  # CPU, GPU
CLAIMS = {("tiny", 256): 4, ("small", 256): 8, ("base", 512): 14, ("large", 512): 24}  # GB, of the seed
CARD = 16e9  # bytes
Rows = list[dict[str, str]]


def chosen(kind: str, value: str, options: list[str]) -> list[str]:
    """`all`, or some of the options. Raises BadInput."""
    return options if value == "all" else [choose(kind, name, options) for name in value.split(",")]


def network(name: str, size: str) -> Model:
    """A mixer matched by parameters in the baseline, or a peer."""
    return model_of(size, name) if name in PEERS else replace(model_of(size), mixer=Mixer(name))


def measure(bench: Bench, name: str, size: str) -> dict[str, Any]:
    """One row: parameters, MACs, images a second of training and of one evaluation in sampling, peak memory."""
    side, channels = SIDE.get(size, 32), 1 if size == "nano" else 3
    model, batch = network(name, size), BATCH[size][bench.gpu]
    cost = budget.meta_cost(model, (channels, side, side))
    before = settle(bench.device)
    trainer = bench.trainer(model, side, channels)
    x, noise = images(batch, channels, side), torch.randn(batch, channels, side, side, device=bench.device)
    times = bench.rounds(
        {"training": lambda: trainer.train_step(x), "sampling": lambda: trainer.generate(noise, EVALUATIONS, "euler")}
    )
    done = {"training": batch, "sampling": batch * EVALUATIONS}
    rates = {f"{key}_images_per_second": round(done[key] / statistics.median(times[key]), 3) for key in times}
    return {
        **{"device": device_name(bench.device), "precision": trainer.precision, "torch": torch.__version__},
        **{"network": name, "size": size, "side": side, "params": cost.params, "macs": cost.macs, "batch": batch},
        **rates,
        **{"peak_mib": round(peak_mib(bench.device) - before), "rounds": bench.repeats},
    }


def settle(device: torch.device) -> float:
    """Give back what is free, and start counting the peak. Returns the MiB in use, to be subtracted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak(device)
    return peak_mib(device)


def fill(bench: Bench, mixers: str, sizes: list[str]) -> None:
    """Measure what is chosen into results.csv."""
    names = chosen("network", mixers, [*MIXERS, *PEERS])
    for size in sizes:
        for name in names:
            try:
                row = measure(bench, name, size)
            except (BadInput, torch.OutOfMemoryError) as error:
                print(f"{size} {name}: {str(error).splitlines()[0]}", flush=True)
                continue
            keep(ROOM / "results.csv", row, ("device", "network", "size"))
            rates = [row[f"{what}_images_per_second"] for what in ("training", "sampling")]
            print(f"{size:6} {name:17} {rates[0]:10.4g} {rates[1]:10.4g} images/s {row['peak_mib']:7} MiB", flush=True)


def estimate(bench: Bench, mixers: str, sizes: list[str]) -> None:
    """Find the memory of training, on the meta device, into memory.csv."""
    batch = 8
    for size, side in [("tiny", 64), *CLAIMS]:
        for precision in ("fp32", "fp16") if size in sizes else ():
            for checkpointing in (False, True):
                model = model_of(size)
                one, found = (training_memory(model, (3, side, side), n, precision, checkpointing) for n in (1, batch))
                row = {"size": size, "side": side, "precision": precision, "checkpointing": checkpointing}
                row |= {"batch": batch, "state_bytes": found.state, "saved_bytes": found.saved}
                most = largest_batch(CARD, one.peak, found.peak, batch)
                row |= {"peak_bytes": found.peak, "largest_batch_in_16_gb": most, "peak_bytes_at_1": one.peak}
                keep(ROOM / "memory.csv", row, ("size", "side", "precision", "checkpointing"))
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def largest_batch(room: float, at_one: float, peak: float, batch: int) -> int:
    """How many images fit into `room` bytes, by the line through the peaks at 1 image and at `batch`.

    A part of the peak is there at any batch: state, gradients, and what is computed a few images at a time.
    """
    each = (peak - at_one) / (batch - 1)
    return max(0, int(1 + (room - at_one) / each))


def keep(path: Path, row: dict[str, Any], key: tuple[str, ...]) -> None:
    """Write `row` in the place of the one with the same key, or at the end."""
    new = {name: str(value) for name, value in row.items()}
    rows = read(path)
    place = next((k for k, old in enumerate(rows) if all(old[name] == new[name] for name in key)), len(rows))
    rows[place : place + 1] = [new]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(new), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def read(path: Path) -> Rows:
    """The rows of a CSV file; none where it is missing."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tables(bench: Bench, mixers: str, sizes: list[str]) -> None:
    """Write the tables into the room's README."""
    write_tables(ROOM)


def write_tables(room: Path, check: bool = False) -> int:
    """The same for the folder `room`; `check` writes nothing. Returns 1 where that finds other tables, else 0."""
    tables = {"speed": speed_table(read(room / "results.csv")), "memory": memory_table(read(room / "memory.csv"))}
    return render.update(room / "README.md", tables, check, "python -m analysis.cost table")


def speed_table(rows: Rows) -> str:
    """For each device two tables, networks by sizes: images a second; parameters, MACs and memory."""
    devices = list(dict.fromkeys(row["device"] for row in rows))
    if not any("cpu" not in row["precision"] and row["precision"] != "fp32" for row in rows):
        devices.append("")
    return "\n\n".join(of_device([row for row in rows if row["device"] == d], d) for d in devices)


def of_device(rows: Rows, device: str) -> str:
    """The tables of one device; without rows, one that is empty."""
    sizes = [size for size in BATCH if any(row["size"] == size for row in rows)]
    found = {(row["network"], row["size"]): row for row in rows}
    if not rows:
        return "**GPU**: not measured; `python -m analysis.cost room table device=cuda` fills it."
    rounds = "/".join(sorted({row["rounds"] for row in rows}))
    batches = ", ".join(f"{size} {BATCH[size][rows[0]['precision'] != 'fp32']}" for size in sizes)

    def table(cell: Callable[[dict[str, str]], str]) -> str:
        lines = [f"| network | {' | '.join(f'{s} {SIDE.get(s, 32)}x{SIDE.get(s, 32)}' for s in sizes)} |"]
        lines.append("|---" * (1 + len(sizes)) + "|")
        for name in [*MIXERS, *PEERS]:
            cells = [cell(found[name, size]) if (name, size) in found else render.MISSING for size in sizes]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def rate(row: dict[str, str]) -> str:
        values = [float(row[f"{what}_images_per_second"]) for what in ("training", "sampling")]
        return " / ".join(f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values)

    def size_of(row: dict[str, str]) -> str:
        return f"{budget.human(int(row['params']))}, {budget.human(int(row['macs']))}, {row['peak_mib']}"

    head = f"**{device}**, torch {rows[0]['torch']}, {rows[0]['precision']}, batches: {batches}; median of {rounds}."
    return (
        f"{head}\n\nTraining / sampling (one evaluation), images a second:\n\n{table(rate)}\n\n"
        f"Parameters, MACs of one image's forward, peak MiB of a training step:\n\n{table(size_of)}"
    )


def memory_table(rows: Rows) -> str:
    """Peak GB at batch 8 and the largest batch in 16 GB, by size, side and precision."""
    lines = [
        "| size | precision | peak at batch 8 | checkpointing | largest batch in 16 GB | checkpointing | the seed's |"
    ]
    lines.append("|---" * 7 + "|")
    found = {(row["size"], row["side"], row["precision"], row["checkpointing"]): row for row in rows}
    for size, side, precision in dict.fromkeys(key[:3] for key in found):
        pair = [found.get((size, side, precision, on)) for on in ("False", "True")]
        peaks = [f"{int(row['peak_bytes']) / 1e9:.3g} GB" if row else render.MISSING for row in pair]
        batches = [row["largest_batch_in_16_gb"] if row else render.MISSING for row in pair]
        claim = CLAIMS.get((size, int(side)))
        shown = f"~{claim} GB" if claim else ""
        lines.append(f"| {size} {side}x{side} | {precision} | {' | '.join(peaks + batches)} | {shown} |")
    return "\n".join(lines)


COMMANDS: dict[str, Callable[[Bench, str, list[str]], None]] = {"room": fill, "estimate": estimate, "table": tables}

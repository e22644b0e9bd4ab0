"""Figures of what analysis/dynamics.py measured: gate and alpha against t in every block, the mixer's gradient."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
COLOURS, STYLES = sns.color_palette("colorblind"), ["-", "--", "-.", ":"]
PLACES = {"encoder": "encoder, level", "decoder": "decoder, level", "middle": "middle"}


def draw(frame: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
    """Every figure that the rows allow, one set a tier and data set, as SVG and PNG; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (tier, data), rows in frame.groupby(["tier", "data"], sort=False):
        name = stem if (tier, data) == tuple(frame.iloc[0][["tier", "data"]]) else f"{stem}_{tier}_{data}"
        for kind, column, figure in FIGURES:
            shown = rows.dropna(subset=[column])
            if len(shown):
                written += save(figure(shown, f"{tier} tier, {data}"), folder / f"{name}_{kind}")
    return written


def save(figure: plt.Figure, path: Path) -> list[Path]:
    """SVG and PNG, the same bytes each time."""
    paths = [path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png")]
    with plt.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(paths[0], bbox_inches="tight", metadata={"Date": None})
        figure.savefig(paths[1], dpi=120, bbox_inches="tight")
    plt.close(figure)
    return paths


def place(layer: str) -> str:
    """`encoder.1.0` -> `encoder, level 1, block 0`."""
    part, *numbers = layer.split(".")
    return f"{PLACES[part]} {numbers[0]}, block {numbers[1]}" if len(numbers) == 2 else f"{part}, block {numbers[0]}"


def colour(frame: pd.DataFrame) -> dict[str, int]:
    """An index a arm, in the order of the file, for its colour and its dashes."""
    return {arm: k for k, arm in enumerate(dict.fromkeys(frame["arm"]))}


def panels(frame: pd.DataFrame, draw_panel: Callable[[plt.Axes, pd.DataFrame], None], *texts: str) -> plt.Figure:
    """A small panel a block, in the order of the computation, on common axes; texts: title, y axis, note."""
    title, ylabel, note = texts
    layers = list(dict.fromkeys(frame["layer"]))
    columns = min(5, len(layers))
    rows = -(-len(layers) // columns)
    size = 2.4 * columns, 2 * rows + 1.5
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, layout="constrained")
    flat = np.atleast_1d(axes).ravel()
    for axis, layer in zip(flat, layers, strict=False):
        draw_panel(axis, frame[frame["layer"] == layer])
        axis.set_title(place(layer), fontsize=10)
        axis.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], yticks=[0, 0.5, 1])
    for axis in flat[len(layers) :]:
        axis.remove()
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, title=title)
    figure.supylabel(ylabel, fontsize=11)
    figure.supxlabel(f"t   (0: data, 1: noise)\n\n{textwrap.fill(note, 30 * columns)}", fontsize=10)
    return figure


def gate(frame: pd.DataFrame, where: str) -> plt.Figure:
    """Mean and spread of the gate in every block; the share that is saturated."""
    index = colour(frame)

    def panel(axis: plt.Axes, rows: pd.DataFrame) -> None:
        axis.axhline(0.5, color="0.6", linewidth=1)
        for arm, mine in rows.groupby("arm", sort=False):
            at, k = mine.groupby("t")[["gate_mean", "gate_sd", "gate_low", "gate_high"]].mean(), index[str(arm)]
            low, high = at.gate_mean - at.gate_sd, at.gate_mean + at.gate_sd
            axis.fill_between(at.index, low, high, color=COLOURS[k], alpha=0.2, lw=0)
            axis.plot(at.index, at.gate_mean, color=COLOURS[k], linestyle=STYLES[k % 4], label=arm)
            axis.plot(at.index, at.gate_low + at.gate_high, color=COLOURS[k], linestyle=":", clip_on=False)

    note = (
        "Line: mean over seeds, images, channels and positions. Band: ± one standard deviation of the gate. "
        "Dotted, near 0: share of the gate that is saturated, below 0.05 or above 0.95."
    )
    return panels(frame, panel, f"CfC's gate after training ({where})", "gate", note)


def alpha(frame: pd.DataFrame, where: str) -> plt.Figure:
    """Alpha in every block: mean over channels and seeds, and its range over channels."""
    index = colour(frame)
    t = np.linspace(0, 1, 41)

    def panel(axis: plt.Axes, rows: pd.DataFrame) -> None:
        for arm, mine in rows.groupby("arm", sort=False):
            means, k = mine.groupby("t")["alpha_mean"].mean(), index[str(arm)]
            low, high = mine.groupby("t")["alpha_min"].min(), mine.groupby("t")["alpha_max"].max()
            axis.fill_between(means.index, low, high, color=COLOURS[k], alpha=0.25, lw=0)
            axis.plot(means.index, means, color=COLOURS[k], linestyle=STYLES[k % 4], label=arm)
        axis.plot(t, 0.5**t, color="black", linewidth=0.8, linestyle=(0, (2, 2)), label="before training, rho = 0")

    note = "Line: mean over channels and seeds. Band: from the least to the greatest channel of any seed."
    return panels(frame, panel, f"alpha(t) after training ({where})", "alpha: share of the input that is kept", note)


def gradient(frame: pd.DataFrame, where: str) -> plt.Figure:
    """Gradient of the mixers over that of the blocks' other layers, the mean over blocks; a thin line a seed."""
    index = colour(frame)
    figure, axis = plt.subplots(figsize=(6.5, 4))
    shown = frame.assign(ratio=frame["gradient_mixer"] / frame["gradient_rest"])
    ends = {}
    for arm, rows in shown.groupby("arm", sort=False):
        k = index[str(arm)]
        for _, seed in rows.groupby("seed"):
            axis.plot(seed.groupby("t")["ratio"].mean(), color=COLOURS[k], linewidth=0.7, alpha=0.6)
        mean = rows.groupby("t")["ratio"].mean()
        axis.plot(mean, color=COLOURS[k], linestyle=STYLES[k % 4], linewidth=2)
        ends[str(arm)] = mean.loc[1.0]
    heights = dict(zip(sorted(ends, key=lambda arm: ends[arm]), sorted(ends.values()), strict=True))
    top = axis.get_ylim()[1]
    last = -np.inf
    for arm, height in heights.items():  # labels at the ends of the lines, kept apart
        last = max(height, last + 0.06 * top)
        axis.text(1.02, last, arm, color=COLOURS[index[arm]], va="center", fontsize=11)
    axis.set(xlim=(0, 1), ylim=(0, top), xlabel="t   (0: data, 1: noise)", ylabel="gradient: mixer / rest of the block")
    axis.set_title(f"How much of the gradient reaches the mixer ({where})", fontsize=12, loc="left", x=-0.1, pad=14)
    sns.despine(figure)
    return figure


FIGURES = [("gate", "gate_mean", gate), ("alpha", "alpha_mean", alpha), ("gradient", "gradient_mixer", gradient)]

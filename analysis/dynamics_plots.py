"""Figures and tables of what analysis/dynamics.py measured: gate and alpha against t in every block, the mixer's
gradient, the straightness of the paths.
"""

import hashlib
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import figures, render, stats, style

COLUMNS, T = 2, "t   (0: data, 1: noise)"
Panel = Callable[[Axes, str, pd.DataFrame, dict[str, Any]], None]  # axes, arm, its rows of one block, its looks


def drawable(path: Path, folder: Path, stem: str) -> "dict[Path, tuple[str, pd.DataFrame, str]]":
    """{SVG: (kind, its rows, tier and data set)} of every figure that a dynamics.csv allows."""
    found = {}
    frame = pd.read_csv(path, dtype={"signature": str})
    for k, ((tier, data), rows) in enumerate(frame.groupby(["tier", "data"], sort=False)):
        for kind, (column, _) in FIGURES.items():
            if len(shown := rows.dropna(subset=[column])):
                name = f"{stem if k == 0 else f'{stem}-{tier}-{data}'}-{kind}.svg"
                found[folder / name] = (kind, shown, f"{tier} tier, {data}")
    return found


def source_of(path: Path) -> str:
    """What a figure carries in its metadata, so that it can be told from one of other data."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def draw(path: Path, folder: Path, stem: str) -> list[Path]:
    """Every figure that a dynamics.csv allows, as SVG with its PNG beside it; the SVGs' paths."""
    found = drawable(path, folder, stem)
    for svg, (kind, rows, where) in found.items():
        style.save(FIGURES[kind][1](rows, where), svg, source_of(path))
    return list(found)


def stale(path: Path, folder: Path, stem: str) -> list[Path]:
    """The figures that are not there, or were drawn from other data."""
    return [svg for svg in drawable(path, folder, stem) if figures.source_of(svg) != source_of(path)]


def place(layer: str) -> str:
    """`encoder.1.0` -> `encoder, level 1, block 0`."""
    part, *numbers = layer.split(".")
    return f"{part}, level {numbers[0]}, block {numbers[1]}" if len(numbers) == 2 else f"{part}, block {numbers[0]}"


def panels(frame: pd.DataFrame, panel: Panel, title: str, ylabel: str, note: str) -> Figure:
    """A small panel a block, in the order of the computation, on common axes."""
    layers, arms = list(dict.fromkeys(frame["layer"])), list(dict.fromkeys(frame["arm"]))
    rows, looks = -(-len(layers) // COLUMNS), style.looks(arms)
    size = style.WIDTH, 1.25 * rows + 1.6
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axis, layer in zip(axes.flat, layers, strict=False):
        mine = frame[frame["layer"] == layer]
        for arm, of_arm in mine.groupby("arm", sort=False):
            panel(axis, str(arm), of_arm, looks[str(arm)] | {"marker": "", "linewidth": 1.6})
        axis.set_title(place(layer), fontsize=9.5, fontweight="normal")
        axis.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], yticks=[0, 0.5, 1])
    for axis in axes.flat[len(layers) :]:
        axis.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, title=title, alignment="left")
    figure.supylabel(ylabel, fontsize=10)
    figure.supxlabel(f"{T}\n{textwrap.fill(note, 66)}", fontsize=9.5)
    return figure


def gate(frame: pd.DataFrame, where: str) -> Figure:
    """Mean and spread of the gate in every block; the share that is saturated."""

    def panel(axis: Axes, arm: str, rows: pd.DataFrame, look: dict[str, Any]) -> None:
        at = rows.groupby("t")[["gate_mean", "gate_sd", "gate_low", "gate_high"]].mean()
        low, high = at.gate_mean - at.gate_sd, at.gate_mean + at.gate_sd
        axis.fill_between(at.index, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axis.plot(at.index, at.gate_mean, label=arm, **look)
        axis.plot(at.index, at.gate_low + at.gate_high, color=look["color"], linestyle=":", clip_on=False, zorder=6)

    note = (
        "Line: mean over seeds, images, channels and positions. Band: ± one standard deviation. "
        "Dotted: share that is saturated, below 0.05 or above 0.95."
    )
    return panels(frame, panel, f"CfC's gate after training ({where})", "gate", note)


def alpha(frame: pd.DataFrame, where: str) -> Figure:
    """Alpha in every block: mean over channels and seeds, its range over channels, and the law before training."""
    t = np.linspace(0, 1, 41)
    first = frame["arm"].iloc[0]

    def panel(axis: Axes, arm: str, rows: pd.DataFrame, look: dict[str, Any]) -> None:
        if arm == first:
            start: dict[str, Any] = {"color": "0.55", "linewidth": 3, "alpha": 0.7, "label": "before training, rho = 0"}
            axis.plot(t, 0.5**t, zorder=1, **start)
        at = rows.groupby("t")
        low, high = at["alpha_min"].min(), at["alpha_max"].max()
        axis.fill_between(low.index, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axis.plot(at["alpha_mean"].mean(), label=arm, **look)

    note = "Line: mean over channels and seeds. Band: from the least to the greatest channel of any seed."
    return panels(frame, panel, f"alpha(t) after training ({where})", "alpha: share of the input that is kept", note)


def gradient(frame: pd.DataFrame, where: str) -> Figure:
    """Gradient of the mixers over that of the blocks' other layers: the mean over blocks; a thin line a seed."""
    arms = list(dict.fromkeys(frame["arm"]))
    looks, ends = style.looks(arms), {}
    figure, axis = style.canvas(3.6)
    shown = frame.assign(ratio=frame["gradient_mixer"] / frame["gradient_rest"])
    for arm in arms:
        rows = shown[shown["arm"] == arm]
        for _, seed in rows.groupby("seed"):
            axis.plot(seed.groupby("t")["ratio"].mean(), color=looks[arm]["color"], linewidth=0.6, alpha=0.5)
        mean = rows.groupby("t")["ratio"].mean()
        axis.plot(mean, **looks[arm] | {"zorder": 3})
        ends[arm] = (1.0, float(mean.loc[1.0]))
    axis.set(xlim=(0, 1), ylim=(0, axis.get_ylim()[1]), xlabel=T, ylabel="gradient: mixer / rest of the block")
    axis.set_title(f"How much of the gradient reaches the mixer\n{where}, mean over blocks and seeds")
    style.settle(figure)
    style.name_at_right(axis, ends, {arm: look["color"] for arm, look in looks.items()})
    return figure


def straightness(frame: pd.DataFrame, where: str) -> Figure:
    """How far the paths are from straight lines: a dot a seed, a bar at the mean."""
    arms = list(dict.fromkeys(frame["arm"]))
    looks = style.looks(arms)
    figure, axis = style.canvas(1.5 + 0.32 * len(arms))
    for k, arm in enumerate(arms):
        values = frame.loc[frame["arm"] == arm, "straightness"]
        axis.plot(values, [k] * len(values), "o", color=looks[arm]["color"], alpha=0.75)
        axis.plot(values.mean(), k, "|", color=looks[arm]["color"], markersize=16, markeredgewidth=2)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_xlim(0, 1.08 * frame["straightness"].max())
    axis.set_xlabel("squared distance of the velocity from that of\na straight line; 0: straight; dot: seed; bar: mean")
    axis.set_title(f"Straightness of the paths\n{where}")
    return figure


FIGURES = {
    "gate": ("gate_mean", gate),
    "alpha": ("alpha_mean", alpha),
    "gradient": ("gradient_mixer", gradient),
    "straightness": ("straightness", straightness),
}


# --- tables ----------------------------------------------------------------------------------------------------------


HEAD = (
    *("block", "gate at t=0", "saturated", "gate at t=1", "saturated", "alpha at .05", "alpha at 1 [channels]"),
    *("gradient at .05", "gradient at 1"),
)
NOTE = (
    "Means over seeds. Gate: ± standard deviation over images, channels and positions; saturated: below 0.05 or above "
    "0.95. Gradient: that of the mixer's parameters over that of the block's other layers. Straightness: "
    "squared distance of the velocity from that of a straight line, over the path; 0 is straight."
)


def cells(frame: pd.DataFrame) -> dict[str, list[tuple[str, ...]]]:
    """{title: a line a block} of each arm, tier and data set."""
    found = {}
    for (tier, data, arm), rows in frame.groupby(["tier", "data", "arm"], sort=False):
        straight = render.mean_se(*stats.mean_se(rows["straightness"].dropna()))
        lines = []
        for layer, at in rows[rows["layer"] != "network"].groupby("layer", sort=False):
            v = at.groupby("t").mean(numeric_only=True)
            gates = [
                (f"{v.gate_mean[t]:.2f} ± {v.gate_sd[t]:.2f}", f"{v.gate_low[t] + v.gate_high[t]:.1%}") for t in (0, 1)
            ]
            alphas = f"{v.alpha_mean[0.05]:.3f}", f"{v.alpha_mean[1]:.2f} [{v.alpha_min[1]:.2f}, {v.alpha_max[1]:.2f}]"
            shares = [f"{v.gradient_mixer[t] / v.gradient_rest[t]:.1%}" for t in (0.05, 1.0)]
            line = (place(str(layer)), *gates[0], *gates[1], *alphas, *shares)
            lines.append(tuple(render.NOT_APPLICABLE if "nan" in cell else cell for cell in line))
        found[f"{arm}, {tier} tier, {data}; straightness {straight}"] = lines
    return found


def table(frame: pd.DataFrame) -> str:
    """For a terminal: a table an arm, tier and data set."""
    texts = []
    for title, lines in cells(frame).items():
        widths = [max(map(len, column)) for column in zip(HEAD, *lines, strict=True)]
        aligned = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in (HEAD, *lines)]
        texts.append("\n".join([title, *aligned]))
    return "\n\n".join([*texts, textwrap.fill(NOTE, 118)])


def markdown(frame: pd.DataFrame) -> str:
    """The same for a page."""
    rule = "|---" + "|--:" * (len(HEAD) - 1) + "|"
    texts = []
    for title, lines in cells(frame).items():
        texts += [f"**{title}**", "\n".join([f"| {' | '.join(line)} |" for line in (HEAD,)] + [rule])]
        texts[-1] += "".join(f"\n| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([*texts, NOTE])

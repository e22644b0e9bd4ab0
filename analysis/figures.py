"""The figures of a room, one function each, from its committed files alone; analysis/plots.py is the command."""

import math
import re
import textwrap
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from analysis import curves, render, stats, style, tables
from analysis.views import Series, View, against, costs, pareto, series

Ends = dict[str, tuple[float, float]]  # {arm: (x, y)}
VERDICTS = {"better": style.PALETTE[0], "worse": style.PALETTE[3], "equivalent": style.PALETTE[2]}


def bands(axes: Axes, of: Series, arms: list[str]) -> tuple[Ends, list[float]]:
    """Each arm's mean over seeds, and a band from its lowest to its highest seed.

    Returns the last point of each mean, and all points of the bands.
    """
    looks, ends, edges = style.looks(arms), {}, []
    for arm in arms:
        curve: dict[float, list[float]] = {}
        for points in of.get(arm, {}).values():
            for at, value in points.items():
                curve.setdefault(at, []).append(value)
        if not curve:
            continue
        x = sorted(curve)
        mean = [float(np.mean(curve[at])) for at in x]
        axes.plot(x, mean, **looks[arm] | ({"marker": None} if len(x) > 12 else {}))
        low, high = [min(curve[at]) for at in x], [max(curve[at]) for at in x]
        axes.fill_between(x, low, high, color=looks[arm]["color"], alpha=0.1, linewidth=0)
        ends[arm] = (x[-1], mean[-1])
        edges += low + high
    return ends, edges


def two_panels(view: View, of: Series, ratio: bool) -> tuple[Figure, Axes, Axes, tuple[Ends, Ends]]:
    """The curves themselves above, and below each over the first arm's of the same seed, where differences show.

    Also returns where the curves end, for `name_curves`.
    """
    arms = [arm for arm in view.arms if arm in of]
    figure, (above, below) = style.canvas(6.4 if len(arms) < 10 else 7.6, 2, sharex=True, height_ratios=[1, 1.15])
    ends, _ = bands(above, of, arms)
    relative, edges = bands(below, against(of, arms[0], ratio), arms)
    below.set_ylim(*style.focus(edges, 1.0 if ratio else 0.0))
    below.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:.4g}"))  # 1.005 is not 1
    return figure, above, below, ({arm: end for arm, end in ends.items() if arm not in relative}, relative)


def name_curves(view: View, axes: tuple[Axes, Axes], ends: tuple[Ends, Ends]) -> None:
    """The arms' names, below where differences show; above only those that the lower panel cannot have."""
    colors = {arm: look["color"] for arm, look in style.looks(view.arms).items()}
    style.settle(axes[0].get_figure(root=True))
    for each, points in zip(axes, ends, strict=True):
        style.name_at_right(each, points, colors)


def nfe(view: View) -> Figure:
    """The metric against function evaluations, every arm, with the floor of real against real."""
    metric = "fd" if view.experiment.metric == "val_loss" else view.experiment.metric
    label = render.label(metric, "/".join(sorted(view.rows["extractor"].unique())))
    of = series(view.rows, "nfe", metric)
    positive = metric not in tables.HIGHER_IS_BETTER and bool((view.rows[metric].dropna() > 0).all())
    figure, above, below, ends = two_panels(view, of, positive)
    ticks = sorted({x for arm in view.arms for curve in of.get(arm, {}).values() for x in curve})
    below.set_xscale("log")
    decides = view.experiment.nfe
    below.set_xticks(ticks if len(ticks) < 9 else [x for x in ticks if math.log2(x).is_integer() or x == decides])
    for axes in (above, below):
        axes.axvline(decides, color=style.FAINT, linestyle=":", linewidth=1, zorder=0)
    below.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    below.xaxis.set_minor_locator(ticker.NullLocator())
    if positive:
        above.set_yscale("log")
        above.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        bottom, top = above.get_ylim()
        if top < 5 * bottom:  # hardly a power of ten among the ticks
            above.yaxis.set_minor_formatter(ticker.StrMethodFormatter("{x:g}"))
    if view.floor is not None and math.isfinite(value := float(view.floor[metric])):
        above.axhline(value, color=style.FAINT, linestyle="--", linewidth=1.2)
        text = f"real against real (n={int(view.floor['n'])}): {value:.3g}"
        above.annotate(text, (0, value), (4, -11), ("axes fraction", "data"), "offset points", color="0.3", fontsize=9)
        bottom, top = above.get_ylim()  # below the line, where no curve is
        above.set_ylim(bottom=min(bottom, value * (value / top) ** 0.12 if positive else value - 0.12 * (top - value)))
    above.set(ylabel=label, title=f"{label} against sampling steps\n{view.title}")
    of_lines = "mean over seeds; band: lowest to highest seed"
    below.set_xlabel(f"NFE (function evaluations); dotted: {decides:g}, which decides\n{of_lines}")
    below.set_ylabel(f"{'ratio to' if positive else 'difference from'} {view.arms[0]}, same seed")
    name_curves(view, (above, below), ends)
    return figure


def loss(view: View) -> Figure:
    """Held-out and training loss against images."""
    of = series(view.curves, "images", "val_loss")
    figure, above, below, ends = two_panels(view, of, True)
    looks, training = style.looks(view.arms), series(view.curves, "images", "loss")
    for arm in view.arms:  # the training loss is noisy: thin, without a band
        frame = pd.DataFrame(training.get(arm, {})).sort_index().mean(axis=1)
        look = {"color": looks[arm]["color"], "linestyle": looks[arm]["linestyle"]}
        above.plot(frame.index, frame, linewidth=0.6, alpha=0.6, **look)
    last = [list(points.values())[-1] for seeds in training.values() for points in seeds.values()]
    held_out = [y for seeds in of.values() for points in seeds.values() for y in points.values()]
    above.set_ylim(0.97 * min([*last, *held_out]), 1.05 * float(np.quantile(held_out, 0.95)))
    below.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    above.set(ylabel="loss", title=f"Loss: held out (thick) and training (thin)\n{view.title}")
    of_lines = "mean over seeds; band: lowest to highest seed"
    below.set_xlabel(f"images\n{of_lines}\nheld out: by EMA weights\ntraining: of each arm's own loss")
    below.set_ylabel(f"held-out, ratio to {view.arms[0]}")
    name_curves(view, (above, below), ends)
    return figure


def forest(view: View) -> Figure:
    """Each arm's paired difference from the first, its interval, the margin and the verdict."""
    experiment, values = view.experiment, view.values()
    found = stats.compare(values, experiment.arms[0], experiment.margin, experiment.lower_is_better)
    absent = [arm for arm, d in found.items() if not d.n]
    shown = {arm: d for arm, d in found.items() if d.n}
    figure, axes = style.canvas(1.7 + 0.5 * max(1, len(shown)))
    bounds = [abs(x) for d in shown.values() for x in (d.mean, d.low, d.high) if math.isfinite(x)]
    reach = 1.08 * max([3 * experiment.margin, *bounds, 1e-9])
    curved = bool(experiment.margin) and reach > 12 * experiment.margin  # one bad arm must not hide all others
    if curved:
        axes.set_xscale("symlog", linthresh=2 * experiment.margin, linscale=1.5)
        ticks = [2 * experiment.margin * by for by in (1, 3, 10, 30, 100, 1000) if 2 * experiment.margin * by < reach]
        axes.set_xticks([*(-x for x in ticks[::-1]), 0, *ticks])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.set_xlim(-reach, reach)
    axes.axvspan(-experiment.margin, experiment.margin, color=style.PALETTE[2], alpha=0.13, linewidth=0)
    axes.axvline(0, color=style.BASELINE, linewidth=1)
    marks = {"better": "<", "worse": ">"} if experiment.lower_is_better else {"better": ">", "worse": "<"}
    paper = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.6}  # text stays legible over lines
    text = {"transform": axes.get_yaxis_transform(), "va": "center", "bbox": paper}
    for k, (arm, d) in enumerate(shown.items()):
        color = VERDICTS.get(d.verdict, "0.35")
        says = f"{d.verdict}  {render.difference(d.mean, d.low, d.high, d.n)}"
        axes.text(0.0, k - 0.26, arm, fontweight="bold", **text)
        axes.text(1.0, k - 0.26, says, ha="right", color=color, **text)
        axes.plot(d.mean, k + 0.14, {**marks, "equivalent": "D"}.get(d.verdict, "o"), color=color, markersize=7)
        if math.isfinite(d.low):
            axes.plot([d.low, d.high], [k + 0.14] * 2, color=color, linewidth=2.2, solid_capstyle="butt")
    axes.set_ylim(max(1, len(shown)) - 0.55, -0.65)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    for edge in ("left", "right", "top"):
        axes.spines[edge].set_visible(False)
    ways = ("better", "worse") if experiment.lower_is_better else ("worse", "better")
    axes.set_title(f"Difference from {experiment.arms[0]}: {view.label} at {experiment.nfe:g} NFE\n{view.title}")
    axes.set_xlabel(
        f"← {ways[0]}     {view.label}, arm minus {experiment.arms[0]}     {ways[1]} →\n"
        f"95 % interval over paired seeds; shaded: margin ±{experiment.margin:g}"
        + (f"\nlogarithmic beyond ±{2 * experiment.margin:g}" if curved else "")
        + "".join(f"\n{line}" for line in textwrap.wrap(f"no run yet: {', '.join(absent)}", 62) if absent)
    )
    return figure


def cost(view: View) -> Figure:
    """Quality against what it costs, the Pareto front drawn: no arm is both cheaper and better than one on it."""
    experiment, found = view.experiment, costs(view)
    means = {arm: stats.mean_se(x.values()) for arm, x in view.values().items() if x}
    looks = style.looks(view.arms)
    colors = {arm: look["color"] for arm, look in looks.items()}
    figure, panels = style.canvas(0.5 + max(2.4, 0.8 + 0.19 * len(means)) * len(found), len(found), squeeze=False)
    points = []
    for axes, (name, cost) in zip(panels[:, 0], found.items(), strict=True):
        points.append({arm: (float(cost[arm]), means[arm][0]) for arm in means if arm in cost.index})
        for arm, (x, y) in points[-1].items():
            look = {"color": colors[arm], "marker": looks[arm]["marker"]}
            axes.errorbar(x, y, yerr=means[arm][1], markersize=6, elinewidth=1.2, **look)
        front = pareto(points[-1], experiment.lower_is_better)
        axes.step(*zip(*front, strict=True), where="post", color=style.BASELINE, linestyle=":", linewidth=1.4, zorder=4)
        axes.set(xlabel=name, ylabel=view.label)
        if cost.max() > 4 * cost.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=6))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        large = cost.max() > 1000  # 8.78M multiply-adds, but 0.5 ms and not 500m
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if large else ticker.StrMethodFormatter("{x:g}"))
        axes.set_ylim(*style.focus([mean for mean, _, _ in means.values()], means[view.arms[0]][0]))
        axes.margins(x=0.08)
    panels[0, 0].set_title(f"Quality against cost\n{view.title}")
    panels[-1, 0].set_xlabel(f"{panels[-1, 0].get_xlabel()}\ndotted: the Pareto front; bars: standard error over seeds")
    style.settle(figure)
    for axes, ends in zip(panels[:, 0], points, strict=True):
        style.name_at_right(axes, ends, colors)
    return figure


def samples(view: View) -> Figure:
    """Each arm's first samples: a column is the same noise in every arm."""
    images = {}
    for arm, path in view.strips.items():
        with Image.open(path) as strip:
            images[arm] = framed(np.asarray(strip.convert("RGB")))
    facts = {arm: curves.facts_of(path) for arm, path in view.strips.items()}
    heights = {arm: image.shape[0] / image.shape[1] for arm, image in images.items()}  # at width 1
    text = 0.055
    figure, axes = style.canvas(0.6 + style.WIDTH * sum(height + text for height in heights.values()))
    top = 0.0
    for arm, image in images.items():
        of, below = facts[arm], top + text + heights[arm]
        axes.text(0, top + 0.6 * text, arm, va="center", fontweight="bold")
        detail = f"seed {of['seed']}, {of['nfe']} NFE, {of['solver']}"
        axes.text(1, top + 0.6 * text, detail, va="center", ha="right", fontsize=9, color="0.35")
        axes.imshow(image, interpolation="none", extent=(0, 1, below, top + text))
        top = below
    axes.set(xlim=(0, 1), ylim=(top, 0), title=f"First samples, not selected; one column, one noise\n{view.title}")
    axes.set_axis_off()
    return figure


def framed(strip_HWC: np.ndarray) -> np.ndarray:
    """A strip of square images with a white line between them."""
    side = len(strip_HWC)
    images_NHWC = strip_HWC.reshape(side, -1, side, 3).transpose(1, 0, 2, 3)
    padded = np.pad(images_NHWC, ((0, 0), (0, 0), (0, max(1, side // 16)), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), 1)


FIGURES: dict[str, tuple[Callable[[View], Figure], str]] = {
    "forest": (forest, "Paired differences"),
    "nfe": (nfe, "NFE curves"),
    "cost": (cost, "Quality against cost"),
    "loss": (loss, "Loss against images"),
    "samples": (samples, "Samples of the same noise"),
}


def drawable(view: View) -> list[str]:
    """The figures that a view's data allow."""
    allowed = {
        "cost": bool(costs(view)) and bool(view.values().get(view.experiment.arms[0])),
        "loss": len(view.curves) > 0 and view.arms[0] in set(view.curves.dropna(subset=["val_loss"])["arm"]),
        "samples": bool(view.strips),
    }
    return [kind for kind in FIGURES if allowed.get(kind, True)]


def draw(view: View, kind: str, path: Path) -> None:
    """Draw a figure of `drawable` as SVG, and as PNG beside it."""
    style.save(FIGURES[kind][0](view), path, view.source, exact=kind == "samples")


def source_of(path: Path) -> str:
    """What `draw` was given as the view's source; "" where there is no figure."""
    text = path.read_text() if path.exists() and path.with_suffix(".png").exists() else ""
    found = re.search(r"<dc:source>(.*?)</dc:source>", text)
    return unescape(found[1]) if found else ""

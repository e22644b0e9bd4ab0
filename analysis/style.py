"""How every figure looks and is saved: for a phone as for print, for the colour-blind, and the same bytes each time."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

WIDTH = 5.2  # inches: 10 points are then 10 pixels on a phone of 390
# seaborn's colorblind colours less its yellow, pink and grey, which are too light for lines; black is the first arm's.
PALETTE = [sns.color_palette("colorblind").as_hex()[k] for k in (0, 1, 2, 3, 4, 5, 9)]
BASELINE, FAINT = "#111111", "0.45"
MARKERS, DASHES = "os^DvPX", ("-", (0, (4, 1.5)), (0, (1, 1.2)))
THEME = {
    "font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "legend.fontsize": 9.5,
    "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.edgecolor": "0.6",
    "grid.color": "0.9", "lines.linewidth": 1.6, "lines.markersize": 4, "text.color": "0.1", "axes.labelcolor": "0.1",
    "svg.hashsalt": "liquiddiff", "svg.fonttype": "path", "text.hinting": "none",
}  # fmt: skip
sns.set_theme(context="paper", style="whitegrid", palette=PALETTE, rc=THEME)


def canvas(height: float, rows: int = 1, **layout: Any) -> tuple[Figure, Any]:
    """A figure of WIDTH by `height` inches and its axes, one above the other, laid out without overlap."""
    return plt.subplots(rows, 1, figsize=(WIDTH, height), layout="constrained", **layout)


def save(figure: Figure, path: Path, source: str = "", exact: bool = False) -> None:
    """Write an SVG with `source` in its metadata and a PNG beside it, or for x.png the PNG alone; no date, no version.

    The PNG has 256 colours, plenty for lines and text; with `exact`, for images, all of them. By atomic replace.
    """
    settle(figure)
    figure.set_layout_engine("none")  # else each format would lay it out again
    buffer = io.BytesIO()
    if path.suffix == ".svg":
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Source": source or None})
        # matplotlib ends lines in spaces, which git and editors complain of
        text = "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().decode().splitlines())
        _replace(path, text.encode())
        buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180 if path.suffix == ".svg" else 120, metadata={"Software": None})
    plt.close(figure)
    small = io.BytesIO()
    with Image.open(buffer) as image:
        full = image.convert("RGB")
        few = full if exact else full.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(small, "PNG")
    _replace(path.with_suffix(".png"), small.getvalue())


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def looks(arms: list[str]) -> dict[str, dict[str, Any]]:
    """{arm: colour, marker and dashes}: the same in every figure of a room, the first arm black and thicker."""
    first = {"color": BASELINE, "marker": "o", "linestyle": "-", "linewidth": 2.4, "zorder": 5}
    styles: dict[str, dict[str, Any]] = {arms[0]: first}
    for k, arm in enumerate(arms[1:]):
        turn, color = divmod(k, len(PALETTE))
        marker = MARKERS[(color + 3 * turn) % len(MARKERS)]  # of a colour another each turn, where no line is drawn
        styles[arm] = {"color": PALETTE[color], "marker": marker, "linestyle": DASHES[turn % len(DASHES)]}
    return styles


def settle(figure: Figure | None) -> None:
    """Lay the figure out as it stands, so that `name_at_right` can read positions from it."""
    if figure and (engine := figure.get_layout_engine()):
        engine.execute(figure)


def name_at_right(axes: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Write each name at the right edge with a line to its point (x, y), moved so that no name covers another.

    A point beyond the axes is shown at their edge, with its value. Call `settle` first, when the limits are final.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    size = float(plt.rcParams["ytick.labelsize"])
    gap = 1.25 * size * axes.figure.dpi / 72 / axes.get_window_extent().height
    points = {name: to_axes.transform(point) for name, point in ends.items()}
    order = sorted(points, key=lambda name: points[name][1])
    heights = spread([min(1.0, max(0.0, points[name][1])) for name in order], gap)
    out = 14 * axes.figure.dpi / 72 / axes.get_window_extent().width  # 14 points
    for name, height in zip(order, heights, strict=True):
        x, y = points[name]
        beyond = f" {'↑' if y > 1 else '↓'} {ends[name][1]:.3g}" if not -0.01 <= y <= 1.01 else ""
        line: dict[str, Any] = {"color": colors[name], "linewidth": 0.9, "clip_on": False, "marker": ""}
        axes.plot([x, 1 + out], [min(1.0, max(0.0, y)), height], transform=axes.transAxes, **line)
        axes.annotate(name + beyond, (1, height), (16, 0), "axes fraction", "offset points", va="center", fontsize=size)


def spread(wanted: list[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], `gap` apart or more, each as near to where it is wanted as its neighbours let it.

    Where there are too many for that they begin at 0 and go on beyond 1.
    """
    room = max(0.0, 1 - (len(wanted) - 1) * gap)
    clusters: list[tuple[float, int]] = []  # (sum of place - index * gap, count): those of a cluster touch
    for k, place in enumerate(wanted):
        clusters.append((min(room, max(0.0, place - k * gap)), 1))
        while len(clusters) > 1 and clusters[-2][0] / clusters[-2][1] > clusters[-1][0] / clusters[-1][1]:
            (before, many), (after, more) = clusters[-2:]
            clusters[-2:] = [(before + after, many + more)]
    starts = [total / count for total, count in clusters for _ in range(count)]
    return [start + k * gap for k, start in enumerate(starts)]


def focus(values: list[float], center: float) -> tuple[float, float]:
    """Limits of an axis that show most of the values well, though a few lie far beyond. `center` is one of them.

    Beyond means four times as far from the center as four fifths of the values are.
    """
    distances = sorted(abs(value - center) for value in values) or [0.0]
    usual = distances[int(0.8 * (len(distances) - 1))] or distances[-1] or 1e-9
    kept = [value for value in values if abs(value - center) <= 4 * usual] + [center]
    low, high = min(kept), max(kept)
    pad = 0.08 * ((high - low) or usual)
    return low - pad, high + pad

"""Pictures of a run, which experiments/run.py draws, and the command that draws every figure of a room.

    python -m analysis.plots [experiment=ROOM|all] [--check]

Reads only what is committed: experiments/ROOM/{experiment.yaml,results.csv,curves.csv,samples/}. Writes each figure as
SVG and PNG into paper/figures/, and the forest plot and the NFE curve between `<!-- figures:begin -->` and
`<!-- figures:end -->` in the room's README.md. Nothing is trained or measured, and a second run changes no byte.
--check draws nothing and exits with 1 where a figure was drawn from other data, or a README does not show it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import ticker
from PIL import Image

from analysis import cli, style
from liquiddiff.config import BadInput
from liquiddiff.record import write_atomic

if TYPE_CHECKING:
    from analysis.views import View

PAD, SIDE = 16, 512  # of a sheet: an image's side over its white frame, and pixels a side


def sample_sheet(images_NCHW: Any, path: Path) -> None:
    """Uint8 samples as a square grid; small images are enlarged by whole pixels, never smoothed."""
    images_NHWC = np.asarray(images_NCHW).transpose(0, 2, 3, 1)
    rows, side, channels = int(np.sqrt(len(images_NHWC))) or 1, images_NHWC.shape[1], images_NHWC.shape[3]
    pad = max(1, side // PAD)
    grid = np.full((rows * (side + pad) + pad, rows * (side + pad) + pad, channels), 255, np.uint8)
    for k, image_HWC in enumerate(images_NHWC[: rows * rows]):
        y, x = (pad + (side + pad) * place for place in divmod(k, rows))
        grid[y : y + side, x : x + side] = image_HWC
    scale = max(1, SIDE // len(grid))
    grid = grid.repeat(scale, 0).repeat(scale, 1)
    Image.fromarray(grid.squeeze(-1) if channels == 1 else grid).convert("RGB").save(path)


def samples_of(path: Path, side: int) -> np.ndarray:
    """The exact pixels (N, H, W, 3) back from a sheet of images of `side` pixels. Raises BadInput for another sheet."""
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    pad = max(1, side // PAD)
    for rows in range(1, 9):
        width = rows * (side + pad) + pad
        scale = max(1, SIDE // width)
        if sheet.shape[:2] == (width * scale, width * scale):
            grid = sheet[::scale, ::scale]
            corners = [pad + (side + pad) * k for k in range(rows)]
            return np.stack([grid[y : y + side, x : x + side] for y in corners for x in corners])
    raise BadInput(f"{path} is no sheet of samples of {side} pixels a side")


def loss_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out loss against images."""
    frame = pd.DataFrame([row for row in rows if "images" in row])
    figure, axes = style.canvas(4.0)
    for column, label, color in (("loss", "training", "0.6"), ("val_loss", "held out, EMA", style.PALETTE[0])):
        if column in frame:
            line = frame.dropna(subset=[column])
            axes.plot(line["images"], line[column], color=color, label=label, marker="o" if len(line) < 20 else None)
    axes.set(xlabel="images", ylabel="loss (mean square)", title="Rectified-flow loss")
    top = frame["loss"].dropna()
    if len(top) > 10:  # the first points are the untrained network's and would flatten the rest
        axes.set_ylim(0.95 * frame.filter(["loss", "val_loss"]).min().min(), 1.05 * top.iloc[len(top) // 20 + 1])
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.legend()
    style.save(figure, path)


def nfe_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Frechet distance against the number of function evaluations, with the floor of real against real."""
    frame = pd.DataFrame([row for row in rows if "nfe" in row])
    floor = next((row for row in rows if row.get("floor")), None)
    name = frame["extractor"].iloc[0]
    figure, axes = style.canvas(4.0)
    axes.plot(frame["nfe"], frame["fd"], marker="o", color=style.PALETTE[0], label="samples")
    for x, y in zip(frame["nfe"], frame["fd"], strict=True):
        axes.annotate(f"{y:.3g}", (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9)
    if floor:
        axes.axhline(floor["fd"], color="0.4", linestyle="--", label=f"real against real, n={floor['n']}")
    axes.set(xscale="log", yscale="log", xlabel=f"NFE ({frame['solver'].iloc[0]})", ylabel=f"Frechet distance ({name})")
    axes.set_xticks(frame["nfe"], [str(n) for n in frame["nfe"]])
    axes.minorticks_off()
    axes.legend()
    style.save(figure, path)


def figures_markdown(views: list["View"]) -> str:
    """The README's pictures: each tier's forest plot and NFE curve, with what they say in words for who cannot see."""
    from analysis import figures

    lines = []
    for view in views:
        for kind in ("forest", "nfe"):
            lines += [f"![{figures.FIGURES[kind][1]}: {view.title}](../../paper/figures/{view.slug}-{kind}.svg)", ""]
    others = ", ".join(
        f"[{figures.FIGURES[kind][1].lower()}](../../paper/figures/{view.slug}-{kind}.svg)"
        for view in views
        for kind in figures.drawable(view)
        if kind not in ("forest", "nfe")
    )
    return "\n".join([*lines, f"More: {others}."] if others else lines[:-1])


def main(argv: list[str], root: Path = cli.ROOMS) -> int:
    """Entry point; returns the exit status."""
    from analysis import figures, render, views  # late: a run draws its own pictures only

    values, flags = cli.arguments(argv, {"experiment": "all"}, ("--check",))
    out, stale = root.parent / "paper/figures", []
    for experiment in cli.rooms(values["experiment"], root):
        folder = root / experiment.name
        try:
            found = views.views_of(folder, experiment)
        except BadInput as error:
            if values["experiment"] != "all" or "no rows yet" not in str(error):
                raise
            print(error)
            continue
        for view in found:
            for kind in figures.drawable(view):
                path = out / f"{view.slug}-{kind}.svg"
                if flags:
                    stale += [] if figures.source_of(path) == view.source else [path]
                else:
                    figures.draw(view, kind, path)
        readme = folder / "README.md"
        text = readme.read_text() if readme.exists() else ""
        placed = render.place(text, figures_markdown(found), str(readme), kind="figures")
        if placed != text and flags:
            stale.append(readme)
        elif placed != text:
            write_atomic(readme, placed)
        if not flags:
            print(f"{experiment.name}: {sum(len(figures.drawable(view)) for view in found)} figures in {out}")
    if stale:
        print(f"not of today's results: {', '.join(map(str, stale))}; python -m analysis.plots", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

"""Figures. One function a figure; nothing here trains or measures."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from PIL import Image
from torchvision.utils import make_grid

sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")


def sample_sheet(images_NCHW: torch.Tensor, path: Path, side: int = 512) -> None:
    """Uint8 samples as a square grid; small images are enlarged by whole pixels, never smoothed."""
    rows = int(np.sqrt(len(images_NCHW))) or 1
    size = images_NCHW.shape[-1]
    pad = max(1, size // 16)
    grid = make_grid(images_NCHW[: rows * rows], nrow=rows, padding=pad, pad_value=255).permute(1, 2, 0).numpy()
    scale = max(1, side // grid.shape[0])
    Image.fromarray(grid).resize((grid.shape[1] * scale, grid.shape[0] * scale), Image.Resampling.NEAREST).save(path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def loss_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out loss against images."""
    frame = pd.DataFrame([row for row in rows if "images" in row])
    figure, axes = plt.subplots(figsize=(6, 4))
    for column, label in (("loss", "training"), ("val_loss", "held out, EMA")):
        if column in frame:
            line = frame.dropna(subset=[column])
            sns.lineplot(x=line["images"], y=line[column], ax=axes, label=label, marker="o" if len(line) < 20 else None)
    axes.set(xlabel="images", ylabel="loss (mean square)", title="Rectified-flow loss")
    top = frame["loss"].dropna()
    if len(top) > 10:  # the first points are the untrained network's and would flatten the rest
        axes.set_ylim(0.95 * frame.filter(["loss", "val_loss"]).min().min(), 1.05 * top.iloc[len(top) // 20 + 1])
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    _save(figure, path)


def nfe_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Frechet distance against the number of function evaluations, with the floor of real against real."""
    frame = pd.DataFrame([row for row in rows if "nfe" in row])
    floor = next((row for row in rows if row.get("floor")), None)
    name = frame["extractor"].iloc[0]
    figure, axes = plt.subplots(figsize=(6, 4))
    sns.lineplot(data=frame, x="nfe", y="fd", ax=axes, marker="o", label="samples")
    for x, y in zip(frame["nfe"], frame["fd"], strict=True):
        axes.annotate(f"{y:.3g}", (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9)
    if floor:
        axes.axhline(floor["fd"], color="0.4", linestyle="--", label=f"real against real, n={floor['n']}")
    axes.set(xscale="log", yscale="log", xlabel=f"NFE ({frame['solver'].iloc[0]})", ylabel=f"Frechet distance ({name})")
    axes.set_xticks(frame["nfe"], [str(n) for n in frame["nfe"]])
    axes.minorticks_off()
    axes.legend()
    _save(figure, path)

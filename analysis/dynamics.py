"""What the liquid parts of trained networks do: gate and alpha against t in every block, gradient, straightness.

    python -m analysis.dynamics run=FOLDER                     one finished run, printed
    python -m analysis.dynamics [experiment=ROOM] out=runs     measure a room's finished runs into its dynamics.csv
    python -m analysis.dynamics [experiment=ROOM] [--check]    print and draw what its dynamics.csv holds

experiment=claims (the default) is the arms that the claims rest on. Measured on EMA weights, held-out images and fixed
noise, the same in every arm; a run that the file already holds is not measured again, and rows of another budget go.
Figures: paper/figures/. --check draws nothing and exits with 1 where a figure was drawn from other data.
Columns, a row for each block and t (and one a run for its straightness, that of liquiddiff/reflow.py):

    gate_mean gate_sd      of sigma(a f - b), or what the arm has in its place, over images, channels and positions
    gate_low gate_high     shares below 0.05 and above 0.95: saturated
    gate_far gate_places   mean |gate - 1/2|; standard deviation over the positions of one image's channel, averaged
    alpha_mean _min _max   over channels
    gradient_mixer _rest   RMS over images of the norm of an image's gradient: the mixer's parameters; the block's other
"""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import cli
from liquiddiff.config import BadInput
from liquiddiff.record import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from analysis.runs import Found

ARMS = {"relaxation": ["baseline", "no_relaxation"], "gate": ["literal_gate"]}  # behind the claims
TIMES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
IMAGES, GRADIENTS = 128, 16  # held-out images behind gate and alpha; behind the gradient
GATE = ["gate_mean", "gate_sd", "gate_low", "gate_high", "gate_far", "gate_places"]
VALUES = [*GATE, "alpha_mean", "alpha_min", "alpha_max", "gradient_mixer", "gradient_rest", "straightness"]
RUN = ["tier", "data", "arm", "seed"]
COLUMNS = [*RUN, "signature", "images", "layer", "t", *VALUES]
Row = dict[str, Any]


# --- measuring -------------------------------------------------------------------------------------------------------


def blocks(net: "nn.Module") -> dict[str, Any]:
    """The liquid blocks by their place, in the order of the computation."""
    from liquiddiff.block import LiquidDiffusionBlock

    found = {name: module for name, module in net.named_modules() if isinstance(module, LiquidDiffusionBlock)}
    decoder = [name for name in found if name.startswith("decoder.")]
    levels = sorted(decoder, key=lambda name: (-int(name.split(".")[1]), int(name.split(".")[2])))
    return {name: found[name] for name in [*(name for name in found if name not in decoder), *levels]}


def gate_of(cfc: Any, x_BCHW: "Tensor", temb_BD: "Tensor", t_B: "Tensor") -> "Tensor | None":
    """The gate of a CfC on its input, (B, C, H, W); None where the mixer has none.

    A fused pass never holds the gate, so it is computed again from the layers that make it (liquiddiff/mixers.py).
    """
    import torch.nn.functional as F

    if getattr(cfc, "f", None) is None or not hasattr(cfc, "gate"):
        return None
    f = cfc.f(F.silu(cfc.backbone(cfc.context(x_BCHW))))
    if cfc.gate == "time":
        a, b = (layer(F.silu(temb_BD))[:, :, None, None] for layer in (cfc.time_a, cfc.time_b))
        return (a * f - b).sigmoid()
    return (-f * t_B[:, None, None, None] if cfc.gate == "literal" else f).sigmoid()


def gate_values(gate: "Tensor") -> Row:
    """A block's gate in six numbers."""
    far, places = (gate - 0.5).abs().mean(), gate.std((2, 3)).mean()
    shares = (gate < 0.05).float().mean(), (gate > 0.95).float().mean()
    return dict(zip(GATE, map(float, (gate.mean(), gate.std(), *shares, far, places)), strict=True))


def observed(block: Any, x_BCHW: "Tensor", temb_BD: "Tensor", t_B: "Tensor") -> Row:
    """Gate and alpha of a block on its input."""
    gate = gate_of(block.mixer, block.norm(x_BCHW, block.norm.rows(temb_BD))[0], temb_BD, t_B)
    row = {} if gate is None else gate_values(gate)
    if alpha := getattr(block.relaxation, "alpha", None):
        kept = alpha(t_B, temb_BD)
        row |= {f"alpha_{name}": float(getattr(kept, name)()) for name in ("mean", "min", "max")}
    return row


def gates_and_alphas(net: "nn.Module", x_BCHW: "Tensor", noise_BCHW: "Tensor", t: float) -> dict[str, Row]:
    """{block: its values at t}. Hooks read what a block is given, and change nothing."""
    import torch

    from liquiddiff.flow import interpolate

    rows: dict[str, Row] = {}

    def watch(name: str) -> Any:
        return lambda block, inputs, named, output: rows.update({name: observed(block, *inputs[:3], **named)})

    handles = [block.register_forward_hook(watch(name), with_kwargs=True) for name, block in blocks(net).items()]
    t_B = torch.full((len(x_BCHW),), t)
    try:
        with torch.inference_mode():
            net(interpolate(x_BCHW, noise_BCHW, t_B), t_B)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def measure(folder: Path) -> list[Row]:
    """The rows of a finished run. Raises BadInput where its weights or its images cannot be had."""
    import torch

    from liquiddiff import checkpoint
    from liquiddiff.data import open_data
    from liquiddiff.flow import initial_noise
    from liquiddiff.loop import prepare
    from liquiddiff.record import read_run
    from liquiddiff.reflow import straightness_of

    run = read_run(folder)
    if not (state := checkpoint.load(folder)):
        raise BadInput(f"{folder} has no checkpoint")
    images = open_data(run.data, run.cache)
    if state["fingerprint"] != images.fingerprint:
        raise BadInput(f"{folder} was trained on data {state['fingerprint']}, here is {images.fingerprint}")
    fitted = prepare(run, torch.device("cpu"))
    fitted.load_state(state)
    x = images.tensor(images.heldout[:IMAGES])
    noise = initial_noise(-1, 0, len(x), run.image_shape)  # -1: no run's seed, as for val_loss
    same = {"tier": run.tier, "data": run.data.name, "arm": run.arm, "seed": run.seed}
    same |= {"signature": folder.name.split("-")[-2], "images": run.optim.images}
    rows = {name: [same | {"layer": name, "t": t} for t in TIMES] for name in blocks(fitted.ema.net)}
    for k, t in enumerate(TIMES):
        for part in (
            gates_and_alphas(fitted.ema.net, x, noise, t),
            gradients(fitted, x[:GRADIENTS], noise[:GRADIENTS], t),
        ):
            for name, values in part.items():
                rows[name][k] |= values
    by_layer = [row for layer in rows.values() for row in layer]
    return [*by_layer, same | {"layer": "network", "straightness": straightness_of(fitted, run)}]


def gradients(fitted: Any, x: "Tensor", noise: "Tensor", t: float) -> dict[str, Row]:
    """{block: RMS over images of the gradient's norm, of its mixer and of its other layers}; rho is in neither."""
    import torch

    net = fitted.ema.net.requires_grad_(True)
    sums = {name: [0.0, 0.0] for name in blocks(net)}
    for k in range(len(x)):
        net.zero_grad(set_to_none=True)
        fitted.losses(net, x[k : k + 1], noise[k : k + 1], torch.full((1,), t)).sum().backward()
        for name, block in blocks(net).items():
            for key, p in block.named_parameters():
                if p.grad is not None and not key.startswith("relaxation."):
                    sums[name][not key.startswith("mixer.")] += float(p.grad.square().sum())
    net.requires_grad_(False).zero_grad(set_to_none=True)
    norms = {name: [math.sqrt(part / len(x)) for part in parts] for name, parts in sums.items()}
    return {name: dict(zip(("gradient_mixer", "gradient_rest"), parts, strict=True)) for name, parts in norms.items()}


# --- the committed table ---------------------------------------------------------------------------------------------


def read(path: Path) -> "pd.DataFrame":
    """A dynamics.csv as it stands there, no rows where there is no file."""
    import pandas as pd

    return pd.read_csv(path, dtype={"signature": str}) if path.exists() else pd.DataFrame(columns=COLUMNS)


def bring_up_to_date(path: Path, found: "list[Found]", out: Path) -> None:
    """Measure the runs that the file lacks, or has under another signature."""
    import pandas as pd

    for each in found:
        frame, run = read(path), each.run
        key = [run.tier, run.data.name, run.arm, run.seed]
        same = (frame[RUN] == key).all(axis=1)
        if (frame.loc[same, "signature"] == each.signature).any():
            continue
        print(f"measuring {each.name}", flush=True)
        new = pd.DataFrame(measure(out / each.name), columns=COLUMNS)
        other = (frame[["tier", "data"]] == key[:2]).all(axis=1) & (frame["images"] != run.optim.images)
        parts = [part for part in (frame[~same & ~other], new) if len(part)]
        frame = pd.concat(parts).sort_values(RUN, kind="stable")
        write_atomic(path, frame.to_csv(index=False, float_format="%.4g", lineterminator="\n"))


def runs_of(experiment: str, out: Path) -> "list[Found]":
    """The finished runs under `out` that belong to the experiment, by the rule of analysis/collect.py."""
    from analysis import collect
    from analysis.runs import from_folders

    wanted = ARMS if experiment == "claims" else {experiment: cli.rooms(experiment)[0].arms}
    if not out.is_dir():
        raise BadInput(f"out={out} is no folder")
    found = from_folders(out, {arm for arms in wanted.values() for arm in arms}.__contains__)
    return [
        each
        for room, arms in wanted.items()
        for each in collect.belonging(found, cli.rooms(room)[0], collect.composed)[0]
        if each.run.arm in arms
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str], root: Path = cli.ROOMS) -> int:
    """Entry point; returns the exit status."""
    values, flags = cli.arguments(argv, {"run": "", "experiment": "claims", "out": ""}, ("--check",))
    import pandas as pd

    from analysis import dynamics_plots

    if values["run"]:
        print(dynamics_plots.table(pd.DataFrame(measure(Path(values["run"])), columns=COLUMNS)))
        return 0
    name = values["experiment"]
    path = root / (name if name == "claims" else cli.rooms(name, root)[0].name) / "dynamics.csv"
    if values["out"]:
        out = Path(values["out"]).expanduser()
        bring_up_to_date(path, runs_of(name, out), out)
    if not path.exists():
        raise BadInput(f"{path} is not there yet: python -m analysis.dynamics experiment={name} out=runs")
    folder = root.parent / "paper" / "figures"
    if flags:
        stale = dynamics_plots.stale(path, folder, name)
        if stale:
            print(f"not of today's data: {', '.join(map(str, stale))}; python -m analysis.dynamics", file=sys.stderr)
        return 1 if stale else 0
    dynamics_plots.draw(path, folder, name)
    print(dynamics_plots.table(read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

"""Sample a finished run or published weights: `python experiments/sample.py run=runs/ARM-… n=64 nfe=16 solver=heun`.

    run=FOLDER      a run folder, or a folder or hub name that `from_pretrained` takes
    n=64  nfe=32  solver=euler  shift=1.0  seed=0  batch=64  resolution=N (default: the run's)  device=auto
    out=FOLDER      default: samples/ in the run folder, or ./samples; gets 00000.png ... and grid.png

Sample k of a seed starts from the same noise in every arm.
"""

import math
import sys
import textwrap
from pathlib import Path

from analysis import cli
from liquiddiff.config import BadInput, choose

DEFAULTS = {
    "run": "", "n": "64", "nfe": "32", "solver": "euler", "shift": "1.0", "seed": "0", "batch": "64",
    "resolution": "", "device": "auto", "out": "",
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Returns the exit status. Raises BadInput."""
    values, _ = cli.arguments(argv, DEFAULTS)
    if not values["run"]:
        raise BadInput("give run=FOLDER, a run folder or published weights")
    try:
        n, nfe, seed, batch = (int(values[key]) for key in ("n", "nfe", "seed", "batch"))
        shift, resolution = float(values["shift"]), int(values["resolution"] or 0)
    except ValueError as error:
        raise BadInput(f"n, nfe, seed, batch, resolution and shift are numbers: {error}") from error
    if min(n, nfe, batch) < 1 or not 0 < shift < math.inf or resolution < 0:
        raise BadInput("n, nfe, batch, shift and resolution must be positive")

    import torch
    from torchvision.transforms.functional import to_pil_image

    from analysis.plots import sample_sheet
    from liquiddiff.data import to_uint8
    from liquiddiff.device import resolve_device
    from liquiddiff.flow import initial_noise
    from liquiddiff.solvers import TABLEAUX, integrate

    stages = len(TABLEAUX[choose("solver", values["solver"], TABLEAUX)][1])
    if nfe < stages:
        raise BadInput(f"nfe={nfe} is too few for solver {values['solver']}, which takes {stages} a step")
    device = resolve_device(values["device"])
    velocity, shape = load(values["run"], device)
    channels, side = shape[0], resolution or shape[1]
    folder = Path(values["run"]).expanduser()
    out = Path(values["out"] or (folder / "samples" if (folder / "run.yaml").exists() else "samples"))
    out.mkdir(parents=True, exist_ok=True)
    if older := [path for path in out.glob("[0-9]*.png") if path.stem.isdecimal() and int(path.stem) >= n]:
        raise BadInput(f"{out} has {len(older)} images of an earlier call beyond n={n}; remove them or give out=FOLDER")
    images = []
    for start in range(0, n, batch):
        noise = initial_noise(seed, start, min(batch, n - start), (channels, side, side)).to(device)
        with torch.inference_mode():
            try:
                x, used = integrate(velocity, noise, nfe, values["solver"], shift)
            except ValueError as error:  # a side that the stride does not divide
                raise BadInput(str(error)) from error
        images.append(to_uint8(x.cpu()))
        for k, image in enumerate(images[-1]):
            to_pil_image(image).save(out / f"{start + k:05d}.png")
    sample_sheet(torch.cat(images), out / "grid.png")
    print(f"{n} samples, {used} evaluations each, solver {values['solver']}: {out}/grid.png")
    return 0


def load(name: str, device):  # type: ignore[no-untyped-def]
    """(velocity, (C, H, W)) of a run folder or of published weights. Raises BadInput where there are none."""
    from liquiddiff.config import Run
    from liquiddiff.flow import PREDICTIONS, per_image
    from liquiddiff.record import read_run
    from liquiddiff.unet import LiquidDiffusionUNet

    folder = Path(name).expanduser()
    somewhere = name[0] in "./~" or name.count("/") > 1 or (folder.parent != Path() and folder.parent.is_dir())
    if somewhere and not folder.exists():  # the hub would be asked for it for half a minute
        raise BadInput(f"run={name} is not a run folder{cli.near(name, folder.parent)}")
    if (folder / "run.yaml").exists():
        from liquiddiff import budget, checkpoint

        run: Run = read_run(folder)
        net = budget.build(run.model, run.image_shape)
        if not (state := checkpoint.load(folder)):
            raise BadInput(f"{folder} has no checkpoint yet")
        try:
            net.load_state_dict(state["ema"])
        except RuntimeError as error:  # names or shapes
            raise BadInput(f"{folder} has a network that other code built: its env.json names the commit") from error
        shape, prediction = run.image_shape, run.flow.prediction
    else:
        try:
            net = LiquidDiffusionUNet.from_pretrained(str(folder) if folder.exists() else name)
        except Exception as error:  # of the hub, the network or a folder that is none
            why = textwrap.shorten(str(error), 160, placeholder=" …")
            raise BadInput(f"run={name} is neither a run folder nor published weights ({why})") from error
        config = getattr(net, "_hub_mixin_config", {})
        shape = (config.get("in_channels", 3), *2 * (config.get("resolution", 256),))
        trained = (folder.parent / "run.yaml").exists()  # a run's model/, which alone does not tell what it predicts
        prediction = read_run(folder.parent).flow.prediction if trained else "velocity"
    net = net.to(device).eval()
    return lambda x, t: PREDICTIONS[prediction][1](net(x, t), x, per_image(t)), shape


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

"""`Run`: the only definition of a run. Plain dataclasses, so that this file imports in milliseconds.

Hydra fills a `Run` (experiments/compose.py), the library reads it, `run.yaml` keeps it. Budgets are in images, never in
steps; batch sizes are global.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

PIXELS = 3 * 32 * 32  # of an image whose pixels can be features


class BadInput(ValueError):
    """What the user gave cannot work. The message is one line that says the way out; run.py exits with status 2."""


@dataclass
class Data:
    """Which images."""

    name: str = "digits"  # a key of DATA_SETS; for data=folder the folder's own name
    resolution: int = 8  # pixels a side, after the centre crop
    channels: int = 1
    flip: bool = False  # random horizontal flips, training only: the reference is never augmented
    heldout: float = 0.1  # share kept from training, for val_loss
    path: str | None = None  # a folder of images or parquet files, or a local copy of the named set


@dataclass
class Mixer:
    """What fills the mixer slot of every block."""

    name: str = "cfc"
    match: str = "params"  # solve `hidden` per level to equal the baseline's: params, macs, both; none: use `expansion`
    expansion: float = 1.0  # hidden = expansion * channels, where match is none
    gate: str = "time"  # cfc: time, literal, static, fixed, none
    head_conv: bool = True  # cfc: a depthwise convolution in the heads g and h
    head_tanh: bool = False  # cfc: tanh on g and h, as in the published cell
    wiring: str = "dense"  # cfc: dense, or ncp (1x1 products masked by an AutoNCP wiring)


@dataclass
class Model:
    """The network: the U-Net (liquiddiff/unet.py), or a whole peer."""

    size: str = "nano"
    channels: list[int] = field(default_factory=lambda: [32, 64])
    blocks: list[int] = field(default_factory=lambda: [2, 2])
    network: str = "liquid"  # liquid, ddpm_unet, dit
    mixer: Mixer = field(default_factory=Mixer)
    relaxation: str = "liquid"  # liquiddiff/relaxation.py
    mix_kernels: list[int] = field(default_factory=lambda: [3, 5, 7])  # spatial mix; [] removes it
    mix_pool: bool = True  # spatial mix: the global average pool
    mix_concat: bool = False  # spatial mix: concatenate the scales instead of adding them
    ffn_ratio: float = 1.0
    time_dim: int = 0  # width of the time embedding; 0: channels[0]


@dataclass
class Flow:
    """The objective (liquiddiff/flow.py)."""

    times: str = "uniform"  # uniform, logit_normal, logit_normal_low, u_shaped
    loss: str = "mse"  # mse, pseudo_huber
    prediction: str = "velocity"  # velocity, data, noise
    reflow: int = 0  # train on this many (noise, image) pairs of the same seed's baseline; 0: on the data


@dataclass
class Optim:
    """AdamW, linear warm-up, cosine decay to zero."""

    images: int = 100_000  # training budget
    batch: int = 128
    lr: float = 8e-3
    warmup: int = 10_000  # images
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm; 0: off
    ema: int = 10_000  # half-life in images
    precision: str = "auto"  # auto: bf16 or fp16 on a GPU, by what it supports; fp32 on a CPU
    compile: bool = False  # torch.compile
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about a third more time


@dataclass
class Eval:
    """What is measured at the end, on the EMA weights of the last step."""

    n: int = 1_797  # generated images
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    solver: str = "euler"
    shift: float = 1.0  # spacing of the time steps; above 1 spends more of them near the noise
    extractor: str = "digits"
    batch: int = 600  # any value gives the same images
    val_n: int = 512  # fixed (image, t, noise) triples behind val_loss
    val_every: int = 20_000  # images
    weights: str | None = None  # a file of the extractor's weights


@dataclass
class Run:
    """One training run and its evaluation."""

    arm: str = "baseline"
    tier: str = "laptop"
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    flow: Flow = field(default_factory=Flow)
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    checkpoint_every: int = 25_000  # images; at most this many are lost when a machine dies
    out: str = "runs"  # run folders and mlflow.db
    cache: str = "~/.cache/liquiddiff"  # decoded images, reference features
    device: str = "auto"
    threads: int = 0  # CPU threads; 0: all cores

    def signature(self) -> str:
        """First 8 hex digits of the SHA-256 over everything that can change a result."""
        return _digest(self._signed())

    def training_signature(self) -> str:
        """As `signature`, of what training alone depends on: runs that share it share their weights."""
        return _digest({k: v for k, v in self._signed().items() if not k.startswith("eval.") or "val_" in k})

    def _signed(self) -> dict[str, Any]:
        return {key: value for key, value in flatten(self).items() if key not in UNSIGNED}

    @property
    def name(self) -> str:
        """The run folder's name."""
        return f"{self.arm}-{self.signature()}-s{self.seed}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.data.channels, self.data.resolution, self.data.resolution


# Labels, places and the machine: they say where and how a run is done, not what it computes.
UNSIGNED = frozenset("arm seed out cache device threads checkpoint_every data.path eval.weights eval.batch".split())

SIZES: dict[str, dict[str, Any]] = {
    "nano": {"channels": [32, 64], "blocks": [2, 2]},
    "tiny": {"channels": [64, 128, 256], "blocks": [2, 2, 4]},
    "small": {"channels": [96, 192, 384], "blocks": [2, 3, 6]},
    "base": {"channels": [128, 256, 512], "blocks": [2, 4, 8]},
    "large": {"channels": [128, 256, 512, 768], "blocks": [2, 4, 8, 4]},
}

# The defaults of each named set; liquiddiff/data.py knows where its images come from.
DATA_SETS: dict[str, dict[str, Any]] = {
    "digits": {"resolution": 8, "channels": 1, "flip": False},
    "cifar10": {"resolution": 32, "channels": 3, "flip": True},
    "flowers": {"resolution": 64, "channels": 3, "flip": True},
    "afhq_cat": {"resolution": 64, "channels": 3, "flip": True},
    "afhq": {"resolution": 256, "channels": 3, "flip": True},
    "celebahq": {"resolution": 256, "channels": 3, "flip": True},
    "folder": {"resolution": 64, "channels": 3, "flip": True},
}

# What these keys choose from, so that a typo is answered before torch is imported. Where the choices are a registry
# elsewhere, a test holds the names against it; mixers and relaxations, which users add, are checked by theirs alone.
CHOICES: dict[str, tuple[str, str]] = {
    "flow.times": ("time distribution", "uniform logit_normal logit_normal_low u_shaped"),
    "flow.loss": ("loss", "mse pseudo_huber"),
    "flow.prediction": ("prediction", "velocity data noise"),
    "eval.solver": ("solver", "euler heun midpoint rk4 dopri5"),
    "eval.extractor": ("extractor", "inception dinov2 clip effnet_lite0 digits pixel"),
    "optim.precision": ("precision", "auto fp32 bf16 fp16"),
    "model.mixer.match": ("match", "params macs both none"),
    "model.mixer.gate": ("gate", "time literal static fixed none"),
    "model.mixer.wiring": ("wiring", "dense ncp"),
}


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dataclass or dict as {"optim.lr": 0.001, ...}."""
    items = config.items() if isinstance(config, dict) else vars(config).items()  # asdict would copy
    flat: dict[str, Any] = {}
    for key, value in items:
        if isinstance(value, dict) or is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def from_dict(cls: Any, values: dict[str, Any]) -> Any:
    """The inverse of `dataclasses.asdict`, for run.yaml and config.json. Raises BadInput on a key it does not know."""
    known = {f.name: f for f in fields(cls)}
    for key in values:
        choose(f"{cls.__name__} key", key, known)
    nested = {k: f.default_factory for k, f in known.items() if isinstance(f.default_factory, type)}  # type: ignore[misc]
    return cls(**{k: from_dict(nested[k], v) if is_dataclass(nested.get(k)) else v for k, v in values.items()})


def choose(kind: str, name: str, options: Any) -> str:
    """`name` if it is one of `options`, else BadInput with the nearest matches and the whole list."""
    if name in options:
        return name
    near = get_close_matches(str(name), [str(o) for o in options], n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise BadInput(f"unknown {kind} '{name}'.{hint} Choices: {', '.join(sorted(map(str, options)))}")


def check(run: Run) -> None:
    """Raises BadInput, in one line, for values that no run can have."""
    stride = 2 ** (len(run.model.channels) - 1)
    flat = flatten(run)
    for key in (
        "optim.images optim.batch optim.lr optim.ema eval.n eval.batch eval.val_n eval.val_every "
        "data.resolution checkpoint_every model.ffn_ratio model.mixer.expansion eval.shift"
    ).split():
        if not 0 < flat[key] < math.inf:
            raise BadInput(f"{key}={flat[key]} must be positive")
    for key in ("optim.warmup", "optim.clip", "optim.weight_decay", "flow.reflow", "threads", "seed"):
        if not 0 <= flat[key] < math.inf:
            raise BadInput(f"{key}={flat[key]} must be 0 or more")
    if run.data.resolution % stride:
        raise BadInput(f"data.resolution={run.data.resolution} must be divisible by {stride}, the model's total stride")
    if not 0 < run.data.heldout < 1:
        raise BadInput(f"data.heldout={run.data.heldout} must lie between 0 and 1")
    if not run.eval.nfe or min(run.eval.nfe) < 1 or len(set(run.eval.nfe)) < len(run.eval.nfe):
        raise BadInput(f"eval.nfe={run.eval.nfe} must be a list of positive numbers, each once")
    if run.data.channels not in (1, 3):
        raise BadInput(f"data.channels={run.data.channels} must be 1 (grey) or 3 (colour)")
    if len(run.model.channels) != len(run.model.blocks) or not run.model.channels:
        raise BadInput(
            f"model.channels={run.model.channels} and model.blocks={run.model.blocks} must have one entry a level"
        )
    if run.data.name == "digits" and run.data.path:
        raise BadInput(f"data.path={run.data.path} is nothing to data=digits: give data=folder for images of your own")
    if run.eval.extractor == "digits" and run.data.name != "digits":
        raise BadInput(
            f"eval.extractor=digits reads 8x8 digits, not {run.data.name}: eval.extractor=effnet_lite0 or inception"
        )
    if any(c < 8 or c % 8 for c in run.model.channels) or min(run.model.blocks) < 1:
        raise BadInput(
            f"model.channels={run.model.channels} must be multiples of 8 and model.blocks={run.model.blocks} positive"
        )
    if run.model.mixer.match != "none" and run.model.mixer.expansion != 1:
        raise BadInput(
            f"model.mixer.expansion={run.model.mixer.expansion} is nothing to widths that match the baseline's: "
            "give model.mixer.match=none as well"
        )
    for key in ("model.ffn_ratio", "model.mixer.expansion"):
        if round(flat[key] * min(run.model.channels)) < 1:
            raise BadInput(f"{key}={flat[key]} leaves no channel of model.channels={run.model.channels}")
    if any(k < 1 or k % 2 == 0 for k in run.model.mix_kernels):
        raise BadInput(f"model.mix_kernels={run.model.mix_kernels} must be odd")
    if run.model.time_dim < 0 or run.model.time_dim % 2:
        raise BadInput(f"model.time_dim={run.model.time_dim} must be even, or 0 for channels[0]")
    if len(run.optim.betas) != 2 or not all(0 <= b < 1 for b in run.optim.betas):
        raise BadInput(f"optim.betas={run.optim.betas} must be two numbers from 0 up to 1")
    if run.eval.extractor == "digits" and (run.data.resolution, run.data.channels) != (8, 1):
        raise BadInput("eval.extractor=digits reads 8x8 grey images only; give eval.extractor=pixel or effnet_lite0")
    dims = run.data.channels * run.data.resolution**2
    if run.eval.extractor == "pixel" and dims > PIXELS:
        raise BadInput(f"eval.extractor=pixel means {dims} features an image: choose eval.extractor=effnet_lite0")
    for key, (kind, names) in CHOICES.items():
        choose(kind, flat[key], names.split())

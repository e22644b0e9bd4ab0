"""What a network costs: parameters, multiply-adds (MACs), milliseconds; and equal budgets for mixers.

One MAC is one multiply-add of a convolution or matrix product. torch's counter gives 2 FLOPs for each and nothing for
element-wise work, so a MAC here is half of its figure. It misses FFTs and scans: a module that has them tells them by a
method `extra_macs(H, W)`, for one image. A module of which some weights are held at zero tells how many by `masked`.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from liquiddiff import peers
from liquiddiff.config import BadInput, Mixer, Model, choose, from_dict
from liquiddiff.mixers import MIXERS, Slot
from liquiddiff.unet import LiquidDiffusionUNet


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs of one forward pass of one image."""

    params: int
    macs: int


def parameters(net: nn.Module) -> int:
    """Number of trainable scalars, less those that a wiring holds at zero."""
    masked = sum(getattr(module, "masked", 0) for module in net.modules())
    return sum(p.numel() for p in net.parameters() if p.requires_grad) - masked


def _macs(net: nn.Module, *inputs: Tensor) -> int:
    extra = 0

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal extra
        extra += module.extra_macs(*inputs[0].shape[2:])

    hooks = [module.register_forward_hook(hook) for module in net.modules() if hasattr(module, "extra_macs")]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return counter.get_total_flops() // 2 + extra


def cost(net: nn.Module, image_shape: tuple[int, int, int]) -> Cost:
    """Cost of `net(x, t)` on one image; `net` on the meta device costs no memory and no time."""
    device = next(net.parameters()).device
    return Cost(parameters(net), _macs(net, torch.empty(1, *image_shape, device=device), torch.empty(1, device=device)))


@cache
def _mixer_params(name: str, slot: Slot, options: tuple[tuple[str, object], ...]) -> int:
    with torch.device("meta"):
        return parameters(MIXERS[name](slot, Mixer(**dict(options))))  # type: ignore[arg-type]


@cache
def _mixer_macs(name: str, slot: Slot, options: tuple[tuple[str, object], ...]) -> int:
    with torch.device("meta"):
        mixer = MIXERS[name](slot, Mixer(**dict(options)))  # type: ignore[arg-type]
        x = torch.empty(1, slot.dim, slot.resolution, slot.resolution)
        return _macs(mixer, x, torch.empty(1, slot.time_dim), torch.empty(1))


def mixer_cost(mixer: Mixer, slot: Slot) -> Cost:
    """Cost of one mixer in its slot."""
    key = mixer.name, slot, tuple(sorted((k, v) for k, v in vars(mixer).items() if k != "match"))
    return Cost(_mixer_params(*key), _mixer_macs(*key))


def solve_hidden(mixer: Mixer, slot: Slot) -> int:
    """The hidden width at which `mixer` in `slot` costs what the baseline's CfC costs there.

    `match` names the cost: params, macs, or both (the mean of the two relative gaps is zero). A mixer whose cost does
    not grow with its width keeps the width it has. Raises BadInput where even width 1 costs over 2 % too much.
    """
    target = mixer_cost(Mixer(), slot._replace(hidden=round(Mixer().expansion * slot.dim)))
    options = tuple(sorted((k, v) for k, v in vars(mixer).items() if k != "match"))

    @cache
    def gap(hidden: int) -> float:
        """How far above the target, relative to it; grows with the width."""
        key = mixer.name, slot._replace(hidden=hidden), options
        by_params = _mixer_params(*key) / target.params - 1 if mixer.match != "macs" else 0
        by_macs = _mixer_macs(*key) / target.macs - 1 if mixer.match != "params" else 0
        return (by_params + by_macs) / (2 if mixer.match == "both" else 1)

    low, high = 1, max(2, slot.dim)
    if gap(low) == gap(high):
        return slot.hidden
    if gap(low) > 0.02:
        raise BadInput(
            f"{mixer.name} cannot match the baseline's {mixer.match} at {slot.resolution}x{slot.resolution} pixels: "
            f"at its least width it costs {1 + gap(low):.2g} times as much; give model.mixer.match=params"
        )
    while gap(high) < 0 and high < 64 * slot.dim:
        low, high = high, 2 * high
    while high - low > 1:
        share = gap(low) / (gap(low) - gap(high))  # a cost is nearly linear in the width: few trials
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if gap(middle) < 0 else (low, middle)
    return min((low, high), key=lambda hidden: abs(gap(hidden)))


def hidden_widths(model: Model, resolution: int) -> list[int]:
    """One hidden width a level, by the model's matching rule."""
    choose("mixer", model.mixer.name, MIXERS)
    D = model.time_dim or model.channels[0]
    widths = []
    for i, channels in enumerate(model.channels):
        slot = Slot(channels, round(model.mixer.expansion * channels), D, resolution // 2**i)
        widths.append(slot.hidden if model.mixer.match == "none" else solve_hidden(model.mixer, slot))
    return widths


Network = LiquidDiffusionUNet | peers.Peer
Shape = tuple[int, int, int]


def _liquid(model: Model, image_shape: Shape) -> LiquidDiffusionUNet:
    channels, resolution, _ = image_shape
    return LiquidDiffusionUNet(model, hidden_widths(model, resolution), channels, resolution)


def _baseline_params(model: Model, image_shape: Shape) -> int:
    with torch.device("meta"):
        return parameters(_liquid(baseline(model), image_shape))


NETWORKS: dict[str, Callable[[Model, Shape], Network]] = {
    "liquid": _liquid,
    "ddpm_unet": lambda model, shape: peers.ddpm_unet(model, shape, _baseline_params(model, shape)),
    "dit": lambda model, shape: peers.dit(model, shape, _baseline_params(model, shape)),
}


def build(model: Model, image_shape: Shape) -> Network:
    """The network of a run: its mixers at their matched widths, or a peer at the baseline's parameters."""
    return NETWORKS[choose("network", model.network, NETWORKS)](model, image_shape)


def meta_cost(model: Model, image_shape: Shape) -> Cost:
    """Cost of a run's network, without allocating it."""
    return _meta_cost(json.dumps(asdict(model)), image_shape)


@cache
def _meta_cost(model: str, image_shape: Shape) -> Cost:
    with torch.device("meta"):
        return cost(build(from_dict(Model, json.loads(model)), image_shape), image_shape)


def baseline(model: Model) -> Model:
    """The same size with the baseline's parts."""
    return replace(Model(), size=model.size, channels=model.channels, blocks=model.blocks)


def milliseconds(net: nn.Module, batch: int, image_shape: tuple[int, int, int], repeats: int = 7) -> float:
    """Median wall time of one forward pass of a batch, in ms, after one warm-up."""
    device = next(net.parameters()).device
    x, t = torch.randn(batch, *image_shape, device=device), torch.full((batch,), 0.5, device=device)
    samples = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            net(x, t)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(samples[1:])


def human(count: float) -> str:
    """9034567 -> '9.03 M'."""
    exponent = min(4, max(0, int(math.log10(max(abs(count), 1)) // 3)))
    return f"{count / 1000**exponent:.3g} {['', 'k', 'M', 'G', 'T'][exponent]}".strip()

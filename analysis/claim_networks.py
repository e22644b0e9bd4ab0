"""Rules of analysis/claim_rules.py that need no data: counts and traces of networks without memory, and the ODE."""

import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import yaml

from analysis.evidence import FAILS, HOLDS, Evidence, Verdict, network, operators, small
from liquiddiff.config import SIZES, Mixer, Model, from_dict

PARAMETERS = {"tiny": 8e6, "small": 25e6, "base": 65e6, "large": 120e6}  # claimed
ATTENTION = ("attention", "softmax", "aten.bmm", "aten.baddbmm")  # in operators' names
BLOCK = re.compile(r"(encoder|decoder)\.\d+\.\d+\.|middle\.\d+\.")


def parameters(evidence: Evidence) -> Verdict:
    """Exact counts against the claim, and those of the wide reading of the same text."""
    from liquiddiff.budget import parameters as count

    wide = yaml.safe_load((evidence.root / "size" / "wide.yaml").read_text())["model"]
    wide["mixer"] = asdict(Mixer(**wide["mixer"]))
    texts, gaps = [], []
    for size, claimed in PARAMETERS.items():
        own = count(evidence.networks[size])
        other = count(network(from_dict(Model, asdict(Model(size, **SIZES[size])) | wide)))
        gaps.append(abs(own / claimed - 1))
        texts.append(f"{size} {own / 1e6:.2f} M ({own / claimed - 1:+.1%}; read widely {other / 1e6:.1f} M)")
    return Verdict(HOLDS if max(gaps) <= 0.15 else FAILS, ", ".join(texts))


def no_attention(evidence: Evidence) -> Verdict:
    """Names of operators, with the attention arm as a control; and no size has a kind of layer that was not traced."""

    def like(mixer: str) -> tuple[int, int]:
        names = operators(mixer)
        return sum(any(word in name for word in ATTENTION) for name in names), len(names)

    def kinds(net: Any) -> set[str]:
        return {type(module).__name__ for module in net.modules()}

    strange = set().union(*map(kinds, evidence.networks.values())) - kinds(small("cfc"))
    (found, total), (control, of) = like("cfc"), like("attention")
    text = f"{found} of {total} operators; as a control, {control} of {of} with attention in CfC's place; "
    text += f"kinds of layers in the four sizes that the trace did not see: {len(strange)}"
    return Verdict(HOLDS if control and not found and not strange else FAILS, text)


def wide_layers(evidence: Evidence) -> tuple[list[tuple[str, Any, str]], list[str]]:
    """Layers wider than 1x1: those within blocks as (name, layer, size), and the names of the parts outside."""
    found = [
        (name, layer, f"{layer.kernel_size[0]}x{layer.kernel_size[1]}")
        for name, layer in evidence.networks["tiny"].named_modules()
        if max(getattr(layer, "kernel_size", (1,))) > 1
    ]
    inside = [(BLOCK.sub("", name), layer, size) for name, layer, size in found if BLOCK.match(name)]
    return inside, sorted({name.split(".")[0] for name, _, _ in found if not BLOCK.match(name)})


def spatial_mixing(evidence: Evidence) -> Verdict:
    """Layers of the blocks that mix positions and are not the multi-scale mix's."""
    inside, _ = wide_layers(evidence)
    mix = sorted({size for name, _, size in inside if "spatial." in name})
    others = sorted({f"{name} {size}" for name, _, size in inside if "spatial." not in name})
    text = f"the mix has {', '.join(mix)} and a pool; others of a block that mix positions: "
    return Verdict(FAILS if others else HOLDS, f"{text}{', '.join(others) or 'none'}")


def depthwise_mixing(evidence: Evidence) -> Verdict:
    """Layers of the blocks that are wider than 1x1: are they depthwise?"""
    inside, outside = wide_layers(evidence)
    dense = sorted({f"{name} {size}" for name, layer, size in inside if layer.groups != layer.in_channels})
    text = f"not depthwise: {', '.join(dense) or 'none'}, of {len({name for name, _, _ in inside})} kinds of layers; "
    return Verdict(FAILS if dense else HOLDS, f"{text}outside the blocks {', '.join(outside)} are dense")


def parallel(evidence: Evidence) -> Verdict:
    """Operators of a forward pass: a sequential dependency would show as more of them, for more positions or steps."""
    few, many, ode = len(operators("cfc", 16)), len(operators("cfc", 64)), len(operators("ltc", 16))
    text = f"{few} operators on 16x16 pixels and {many} on 64x64 with CfC, {ode} with the ODE's six steps in its place"
    return Verdict(HOLDS if few == many < ode else FAILS, text)


def closed_form(evidence: Evidence, weight: Callable[[Any], Any] = lambda a: 1 / (1 + np.exp(a))) -> Verdict:
    """The weight of the start: sigma(-f t) in the formula, an exponential for the ODE x' = -(1/tau + f) (x - end)."""
    t = np.linspace(0, 1, 101)
    gaps = {
        (f, tau): np.abs(weight(f * t) - np.exp(-(1 / tau + f) * t))
        for f in np.linspace(0.1, 10, 100)
        for tau in (0.1, 1, 10, 1e9)
    }
    (f, tau), gap = min(gaps.items(), key=lambda item: item[1].max())
    late = {key: off[t >= 0.5].max() for key, off in gaps.items()}
    best = min(late, key=lambda key: late[key])
    text = f"the nearest, f = {f:.1f} and tau = {tau:.3g}, is {gap.max():.2f} off, at t = {t[gap.argmax()]:.2f}; from "
    text += f"t = 0.5 on the nearest is {late[best]:.3f} off (f = {best[0]:.1f}, tau = {best[1]:.3g})"
    return Verdict(HOLDS if gap.max() <= 0.05 else FAILS, text)


def time_constant(evidence: Evidence) -> Verdict:
    """The time that x' = -(1/tau + f) x + f A takes for 1/e of its way, by scipy's solver, for constant f."""
    from scipy.integrate import solve_ivp

    gaps = []
    for tau, f in [(tau, f) for tau in (0.1, 1.0, 10.0) for f in (0.0, 0.5, 5.0)]:
        claimed, end = tau / (1 + tau * f), f / (1 / tau + f)
        x = solve_ivp(lambda t, x, r=1 / tau + f, f=f: -r * x + f, (0, claimed), [2.0], rtol=1e-9, atol=1e-12).y[0, -1]
        gaps.append(abs((x - end) / (2.0 - end) * np.e - 1))
    text = f"off by at most {max(gaps):.1e} for 9 pairs of tau (0.1 to 10) and f (0 to 5); tau = 1: 1 at f = 0, "
    return Verdict(HOLDS if max(gaps) < 0.01 else FAILS, f"{text}{1 / 6:.2f} at f = 5")

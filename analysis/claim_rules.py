"""One rule for each claim of experiments/claims/claims.yaml: from committed data to a verdict, and nothing else.

A rule takes the `Evidence` and returns a `Verdict`; it raises `Missing` where the data are not there yet.
"""

from collections.abc import Callable

import pandas as pd

from analysis import stats, tables
from analysis.claim_networks import (
    closed_form,
    depthwise_mixing,
    no_attention,
    parallel,
    parameters,
    spatial_mixing,
    time_constant,
)
from analysis.evidence import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Evidence,
    Missing,
    Verdict,
    all_worse,
    combine,
    none_better,
    of_blocks,
    seeds,
    span,
)
from analysis.render import difference, label

GB = {"tiny": 4, "small": 8, "base": 14, "large": 24}  # claimed, as the next two
RESOLUTION = {"tiny": 256, "small": 256, "base": 512, "large": 512}
IMAGES = {"celebahq": 30_000, "afhq": 15_000}


def memory(evidence: Evidence) -> Verdict:
    """What a step of batch 1 needs, and the largest batch that the claim leaves room for."""
    from analysis.cost_room import largest_batch

    words, texts = [], []
    for size, claimed in GB.items():
        one, peak, batch = training_gb(evidence, size)
        words.append(one <= claimed)
        fits = largest_batch(claimed, one, peak, batch)
        texts.append(f"{size} {one:.2f} of {claimed} GB at batch 1, largest batch that fits: {fits}")
    return Verdict(HOLDS if all(words) else FAILS, "; ".join(texts))


def colab(evidence: Evidence) -> Verdict:
    """Tiny on a T4."""
    from analysis.cost_room import largest_batch

    one, peak, batch = training_gb(evidence, "tiny")
    text = f"tiny at batch {batch} needs {peak:.1f} GB; largest batch in 15 GB: {largest_batch(15, one, peak, batch)}"
    return Verdict(HOLDS if peak <= 15 else FAILS, text)


def training_gb(evidence: Evidence, size: str) -> tuple[float, float, int]:
    """GB of a training step in fp16 at the claimed resolution, without optim.checkpointing: of 1 image and of `batch`.

    Both were counted: some of the peak is there at any batch, so that no part of the one is the other.
    """
    frame = evidence.table("cost/memory.csv", "`python -m analysis.cost estimate`")
    same = (frame["size"] == size) & (frame["side"] == RESOLUTION[size]) & (frame["precision"] == "fp16")
    rows = frame[same & ~frame["checkpointing"].astype(bool)]
    if rows.empty:
        raise Missing(f"{size} at {RESOLUTION[size]} pixels in fp16 in experiments/cost/memory.csv")
    row = rows.iloc[0]
    return row["peak_bytes_at_1"] / 1e9, row["peak_bytes"] / 1e9, int(row["batch"])


def ten_times_faster(evidence: Evidence) -> Verdict:
    """Rates of evaluations of the same network with CfC and with the ODE in two solvers."""
    frame = evidence.table("cost/results.csv", "`python -m analysis.cost room`")
    words, texts = [], []
    for (device, size), rows in frame.groupby(["device", "size"], sort=False):
        rate = dict(zip(rows["network"], rows["sampling_images_per_second"], strict=True))
        if {"cfc", "ltc", "ode"} <= set(rate):
            times = {name: rate["cfc"] / rate[name] for name in ("ltc", "ode")}
            words.append(HOLDS if min(times.values()) >= 5 else FAILS)
            ms = ", ".join(f"{name} {1000 / rate[name]:.3g} ms ({time:.1f} times)" for name, time in times.items())
            texts.append(f"{size} on {device}: cfc {1000 / rate['cfc']:.3g} ms, {ms}")
    if not words:
        raise Missing("cfc, ltc and ode of one size in experiments/cost/results.csv: `python -m analysis.cost room`")
    return Verdict(combine(words), "an evaluation of one image: " + "; ".join(texts))


def gate_half(evidence: Evidence) -> Verdict:
    """Distance of the gate from 1/2 at t = 0."""
    far, mean = (of_blocks(evidence, "baseline", column, 0.0) for column in ("gate_far", "gate_mean"))
    near = of_blocks(evidence, "baseline", "gate_far", 0.05)
    text = f"mean |gate - 1/2| {span(far)} by block, mean gate {span(mean)} ({seeds(evidence, 'baseline')}); at "
    text += f"t = 0.05, where alpha lets some of the cell through, {span(near)}"
    return Verdict(HOLDS if far.max() < 0.1 else FAILS, text + literally(evidence, 0.0))


def gate_saturates(evidence: Evidence) -> Verdict:
    """Share of the gate outside 0.05 .. 0.95 at t = 1."""

    def saturated(t: float) -> float:
        return sum(of_blocks(evidence, "baseline", column, t).mean() for column in ("gate_low", "gate_high"))

    text = f"{saturated(1.0):.1%} of it at t = 1, {saturated(0.0):.1%} at t = 0 ({seeds(evidence, 'baseline')})"
    holds = saturated(1.0) >= 0.5 and saturated(1.0) > saturated(0.0)
    return Verdict(HOLDS if holds else FAILS, text + literally(evidence, 1.0))


def literally(evidence: Evidence, t: float) -> str:
    """How far from 1/2 the text's own formula is, the arm literal_gate; nothing where it has not run."""
    try:
        far = of_blocks(evidence, "literal_gate", "gate_far", t)
    except Missing:
        return ""
    return f"; with the text's sigma(-f t), mean |gate - 1/2| at t = {t:g} is {span(far)}"


def gate_places(evidence: Evidence) -> Verdict:
    """Spread over the positions of one image's channel."""
    least = of_blocks(evidence, "baseline", "gate_places")
    text = (
        f"standard deviation over positions, the least over t, {span(least)} by block ({seeds(evidence, 'baseline')})"
    )
    return Verdict(HOLDS if least.min() >= 0.05 else FAILS, text)


def alpha_noise(evidence: Evidence) -> Verdict:
    """Alpha at t = 1, trained and at the start."""
    import torch

    from liquiddiff.relaxation import Liquid

    start = Liquid(1).alpha(torch.ones(1), torch.empty(1, 0)).item()
    trained = of_blocks(evidence, "baseline", "alpha_mean", 1.0)
    least = of_blocks(evidence, "baseline", "alpha_min", 1.0).min()
    text = f"alpha(1) is {start:g} at the start, {span(trained)} by block after training, least channel {least:.3f}"
    return Verdict(HOLDS if trained.max() < 0.1 else FAILS, f"{text} ({seeds(evidence, 'baseline')})")


def alpha_data(evidence: Evidence) -> Verdict:
    """Alpha near t = 0, and what it leaves the mixer to learn from."""
    near = of_blocks(evidence, "baseline", "alpha_mean", 0.05)
    text = f"alpha(0.05) is {span(near)} by block ({seeds(evidence, 'baseline')})"
    return Verdict(HOLDS if near.min() > 0.9 else FAILS, text + starved(evidence))


def starved(evidence: Evidence) -> str:
    """The mixer's gradient at t = 0.05, with and without the relaxation, in units of the block's other layers'."""
    frame = evidence.dynamics
    frame = frame[frame["t"] == 0.05].assign(share=frame["gradient_mixer"] / frame["gradient_rest"])
    share = frame.groupby("arm")["share"].mean()
    if not {"baseline", "no_relaxation"} <= set(share.index):
        return ""
    return (
        f"; its price: at t = 0.05 the gradient of the mixer is {share['baseline']:.2%} of that of the block's other "
        f"layers, against {share['no_relaxation']:.1%} without the relaxation"
    )


def steps(evidence: Evidence) -> Verdict:
    """The most steps up to 50 against at least twice as many, on the same weights and noise."""
    try:
        room, arm = evidence.rows("sampling"), "euler_128"
    except Missing:
        room, arm = evidence.rows("relaxation"), "baseline"
    words, texts = [], []
    for place, (experiment, rows) in room.items():
        mine = rows[(rows["arm"] == arm) & rows["seed"].isin(experiment.seeds)]
        counts = sorted(int(n) for n in mine["nfe"].unique())
        values = {n: tables.values_of(mine[mine["nfe"] == n], experiment, experiment.metric) for n in counts}
        by_nfe = {n: values[n].get(arm, {}) for n in counts}
        few = max((n for n in by_nfe if n <= 50 and 2 * n <= max(by_nfe)), default=0)
        if not few:
            continue
        d = stats.paired(by_nfe[few], by_nfe[max(by_nfe)])
        low, high = stats.interval(d)
        word = stats.verdict(low, high, stats.p_value(d), experiment.margin, experiment.lower_is_better)
        words.append({"worse": FAILS if few >= 25 else UNDECIDED, "undecided": UNDECIDED}.get(word, HOLDS))
        means = ", ".join(f"{stats.mean_se(values.values())[0]:.3g} at {n}" for n, values in by_nfe.items() if n >= 8)
        name = label(experiment.metric, str(mine["extractor"].iloc[0]))
        cost = f"{few} steps against {max(by_nfe)}: {difference(float(d.mean()), low, high, len(d))} ({len(d)})"
        cost += f", {word}, margin {experiment.margin:g}"
        if least := max((n for n in by_nfe if n <= 25 and n < few), default=0):
            d = stats.paired(by_nfe[least], by_nfe[max(by_nfe)])
            cost += f"; {least} against {max(by_nfe)}: {difference(float(d.mean()), *stats.interval(d), len(d))}"
        texts.append(f"{place}, {arm}, {name} {means}; {cost}")
    if not texts:
        raise Missing("the room sampling, or baselines measured at several step counts")
    return Verdict(combine(words), ". ".join(texts))


def data_sets(evidence: Evidence) -> Verdict:
    """The number of images that a run's reference names."""
    from analysis import cli

    found: dict[str, int] = {}
    for experiment in cli.rooms("all", evidence.root):
        path = evidence.root / experiment.name / "results.csv"
        for data, reference in pd.read_csv(path)[["data", "reference"]].dropna().to_numpy() if path.exists() else ():
            found[data] = max(found.get(data, 0), int(str(reference).split("/")[1]))
    if lacking := [data for data in IMAGES if data not in found]:
        raise Missing(f"a run on {' and on '.join(lacking)}, which are downloaded")
    gaps = {data: found[data] / count - 1 for data, count in IMAGES.items()}
    text = ", ".join(f"{data} {found[data]} images ({gap:+.1%})" for data, gap in gaps.items())
    return Verdict(HOLDS if max(map(abs, gaps.values())) <= 0.02 else FAILS, text)


def novel(evidence: Evidence) -> Verdict:
    """Nothing here can tell."""
    raise Missing("a search of the literature; no experiment can tell")


def arms(room: str, rule: Callable[..., Verdict], *names: str) -> Callable[[Evidence], Verdict]:
    """A rule on the verdicts of a room's arms."""
    return lambda evidence: rule(evidence, room, *names)


TIMES = ("logit_normal", "logit_normal_low", "u_shaped")
RULES: dict[str, Callable[[Evidence], Verdict]] = {
    "parameters": parameters,
    "memory": memory,
    "colab": colab,
    "no_attention": no_attention,
    "spatial_mixing": spatial_mixing,
    "depthwise_mixing": depthwise_mixing,
    "multi_scale": arms("spatial_mix", all_worse, "mix_7x7", "mix_3x3"),
    "attention_not_needed": arms("mixer", none_better, "attention_params", "attention_macs"),
    "more_than_convolution": arms("mixer", all_worse, "conv", "conv_gated"),
    "parallel": parallel,
    "ten_times_faster": ten_times_faster,
    "as_good_as_the_ode": arms("mixer", none_better, "ltc", "ode"),
    "closed_form": closed_form,
    "time_constant": time_constant,
    "time_is_the_gate": arms("gate", all_worse, "static_gate"),
    "gate_earns": arms("gate", all_worse, "fixed_gate", "no_gate"),
    "gate_half": gate_half,
    "gate_saturates": gate_saturates,
    "gate_places": gate_places,
    "alpha_noise": alpha_noise,
    "alpha_data": alpha_data,
    "relaxation_adapts": arms("relaxation", all_worse, "constant_relaxation"),
    "relaxation_earns": arms("relaxation", all_worse, "no_relaxation"),
    "objective_suffices": arms("objective", none_better, *TIMES, "pseudo_huber", "predict_data", "predict_noise"),
    "steps": steps,
    "data_sets": data_sets,
    "novel": novel,
}

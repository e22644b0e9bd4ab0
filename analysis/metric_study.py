"""Is a metric worth having at about a thousand images? What it makes of known damage, in units of its own noise.

    python -m analysis.metric_study [splits=20] [extractor=digits|pixel]

One half of the digits is compared with the other after a damage of known strength, over random splits. z is how far the
damaged halves lie from the undamaged ones, in standard deviations of the latter: a metric that cannot tell 2 % of noise
from none has a z near 0 for it. Add your own to METRICS (docs/reading.md says what else makes it a column).
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from analysis import cli
from analysis.metrics import frechet, load_extractor
from liquiddiff.config import BadInput, Run, choose
from liquiddiff.data import open_data
from liquiddiff.seeding import generator

DIRECTIONS = 1000
DAMAGE = [
    "none",
    "noise 0.03",
    "noise 0.06",
    "noise 0.12",
    "blur 0.05",
    "blur 0.1",
    "blur 0.2",
    "drop 0.25",
    "drop 0.5",
]


def sliced(features_ND: Tensor, reference_MD: Tensor) -> float:
    """Sliced Wasserstein distance, the idea of MIND (Berthet et al. 2026, arXiv:2605.06797); N must equal M.

    The square of the 2-Wasserstein distance along random directions, averaged, times D: like a Fréchet distance, a
    shift by c counts as |c|^2.
    """
    dims = features_ND.shape[1]
    directions_DK = functional.normalize(torch.randn(dims, DIRECTIONS, generator=generator(0, "sliced")), dim=0)
    gap_NK = (features_ND @ directions_DK).sort(0).values - (reference_MD @ directions_DK).sort(0).values
    return float(gap_NK.square().mean()) * dims


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {"fd": frechet, "sliced": sliced}


def damaged(images_NCHW: Tensor, kind: str, amount: float) -> Tensor:
    """White noise of `amount` of the range of a pixel, or that share of a 3x3 blur; uint8 in and out."""
    x = images_NCHW.float()
    if kind == "noise":
        x = x + 255 * amount * torch.randn(x.shape, generator=generator(0, "noise"))
    if kind == "blur":
        x = (1 - amount) * x + amount * functional.avg_pool2d(functional.pad(x, [1] * 4, mode="replicate"), 3, 1)
    return x.round().clamp(0, 255).to(torch.uint8)


def dropped(half: Tensor, labels: Tensor, share: float) -> Tensor:
    """Indices with `share` of the ones replaced by repeats of other digits: a mode that a generator lost."""
    ones, others = half[labels[half] == 1], half[labels[half] != 1]
    gone = int(len(ones) * share)
    return torch.cat([others, ones[gone:], others[:gone]])


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    values, _ = cli.arguments(argv, {"splits": "20", "extractor": "digits"})
    if not values["splits"].isdigit() or (splits := int(values["splits"])) < 2:
        raise BadInput(f"splits={values['splits']} must be a whole number of 2 or more")
    from sklearn.datasets import load_digits

    net = load_extractor(choose("extractor", values["extractor"], ("digits", "pixel")), None, torch.device("cpu"))
    images_NCHW = torch.from_numpy(open_data(Run().data, Run().cache).images_NCHW.copy())
    labels = torch.from_numpy(load_digits().target)
    kinds = [(each, *each.split()) for each in DAMAGE[1:]]
    features = {each: net(damaged(images_NCHW, kind, float(amount))) for each, kind, amount in kinds}
    features["none"], half = net(images_NCHW), len(images_NCHW) // 2
    scores = {(name, each): torch.zeros(splits) for name in METRICS for each in DAMAGE}
    seconds = dict.fromkeys(METRICS, 0.0)
    for k in range(splits):
        order = torch.randperm(len(images_NCHW), generator=generator(k, "split"))
        first, second = order[:half], order[half : 2 * half]
        for name, metric in METRICS.items():
            begin = time.process_time()
            for each in DAMAGE:
                kept = dropped(second, labels, float(each.split()[1])) if each.startswith("drop") else second
                scores[name, each][k] = metric(features[each][kept], features["none"][first])
            seconds[name] += time.process_time() - begin
    print(f"n={half} a side, {splits} splits, features {values['extractor']}")
    print(f"{'damage':12}" + "".join(f"{name:>10}{'z':>7}" for name in METRICS))
    for each in DAMAGE:
        columns = [(scores[name, each].mean(), scores[name, "none"]) for name in METRICS]
        print(f"{each:12}" + "".join(f"{mean:10.4f}{(mean - none.mean()) / none.std():7.1f}" for mean, none in columns))
    cost = [f"{name} {1000 * each / splits / len(DAMAGE):.0f}" for name, each in seconds.items()]
    print(f"CPU ms a call: {', '.join(cost)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))

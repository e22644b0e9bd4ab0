"""Metrics of generated images, every one computed by torch-fidelity 0.4.0 from one pass of features.

Shapes: N generated images, M reference images, D features.
"""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.features import (
    EXTRACTORS,
    Features,
    MissingWeights,
    cache_path,
    check_extractor,
    load_extractor,
    reference_features,
    write_atomic,
)
from liquiddiff import distributed
from liquiddiff.config import BadInput, Run
from liquiddiff.data import ImageData
from liquiddiff.seeding import generator

__all__ = [
    "EXTRACTORS",
    "Features",
    "MissingWeights",
    "check_extractor",
    "compare",
    "evaluate",
    "floor",
    "load_extractor",
    "metric_name",
    "reference_features",
]

# Part of every protocol: changing a value changes the numbers, and with it the key of the cached floors.
KID_SUBSET, KID_SUBSETS, NEIGHBOURS, RNG_SEED, ISC_SPLITS = 1000, 100, 3, 2020, 10
PIXEL_DIMS = 192  # a Fréchet distance between raw pixels has a meaning up to this many of them


def metric_name(extractor: str, key: str) -> str:
    """What a table calls it: `fid` and `kid` are only ever Inception's, anything else carries its extractor."""
    if key in ("fd", "kid") and extractor != "inception":
        return f"{key}_{extractor}"
    return "fid" if key == "fd" else key


def compare(features_ND: Tensor, reference_MD: Tensor) -> dict[str, float]:
    """fd, kid, precision, recall of generated against reference features (at least 4 each). Deterministic.

    Heusel et al. 2017; Binkowski et al. 2018, subsets of 1,000 drawn until each image was used ten times, 100 at most;
    Kynkäänniemi et al. 2019, k = 3.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # Generated first, reference second: only in this order is precision the share of the generated.
    pair, subset = (features_ND, reference_MD), kid_subset(len(features_ND), len(reference_MD))
    kid = kid_features_to_metric(*pair, **subset, rng_seed=RNG_SEED, verbose=False)
    # In blocks that a cache holds; torch-fidelity's default of 10,000 rows would be 2 GB of distances to 50,000 images.
    blocks = {"save_cpu_ram": True, "prc_batch_size": 500}
    prc = prc_features_to_metric(*pair, prc_neighborhood=NEIGHBOURS, **blocks, verbose=False)
    return {
        "fd": frechet(*pair),
        "kid": kid[KEY_METRIC_KID_MEAN],
        "precision": prc[KEY_METRIC_PRECISION],
        "recall": prc[KEY_METRIC_RECALL],
    }


def frechet(features_ND: Tensor, reference_MD: Tensor) -> float:
    """The Fréchet distance alone."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features) for features in (features_ND, reference_MD)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def inception_score(logits_NK: Tensor | None) -> dict[str, float]:
    """{"isc": ...}, in ten splits as Salimans et al. 2016 have it; nothing for an extractor without logits."""
    if logits_NK is None:
        return {}
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    scores = isc_features_to_metric(logits_NK, min(ISC_SPLITS, len(logits_NK)), rng_seed=RNG_SEED)
    return {"isc": scores[KEY_METRIC_ISC_MEAN]}


def kid_subset(n: int, m: int) -> dict[str, int]:
    """torch-fidelity's arguments for n generated and m reference images; its defaults from 10,000 images on."""
    size = min(n, m, KID_SUBSET)
    return {"kid_subset_size": size, "kid_subsets": min(KID_SUBSETS, math.ceil(10 * max(n, m) / size))}


def floor(extractor: Features, images: ImageData, n: int, cache: str | Path) -> dict[str, float]:
    """Real against as many disjoint real images: a perfect generator could do no better at this n. Cached.

    `compare`'s keys (and fd_pixel, isc, as in `evaluate`), n and reference_n, which are both min(n, total // 2).
    """
    total = len(images.images_NCHW)
    count = min(n, total // 2)
    check_count(count, total)
    settings = hashlib.sha256(repr((KID_SUBSET, KID_SUBSETS, NEIGHBOURS, RNG_SEED, ISC_SPLITS)).encode()).hexdigest()
    path = cache_path(extractor, images, cache, f"-floor{count}-{settings[:8]}.json")
    with suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    features, (first, second) = reference_features(extractor, images, cache), halves(total, count)
    row = compare(features[first], features[second]) | inception_score(extractor.logits(features[first]))
    if pixel := _pixel(images):
        pixels = reference_features(pixel, images, cache)
        row["fd_pixel"] = frechet(pixels[first], pixels[second])
    row |= {"n": count, "reference_n": count}
    write_atomic(path, lambda file: file.write(json.dumps(row).encode()))
    return row


def halves(total: int, count: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random draws of `count` indices below `total`, always the same. (In file order the sets drift.)"""
    order = torch.randperm(total, generator=generator(0, "floor"))
    return order[:count], order[count : 2 * count]


def evaluate(
    run: Run,
    images: ImageData,
    sample: Callable[[int, int, int], tuple[Tensor, float]],
    device: torch.device,
    on_row: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """One row of metrics for each of run.eval.nfe, given to `on_row` as soon as it is known.

    `sample(start, count, nfe)` returns images start .. start+count-1 as uint8 (count, C, H, W), and the NFE used. Of
    several processes each samples every so-manieth batch, and process 0 alone measures and has rows.
    Raises BadInput for an n that the set cannot answer, and what `load_extractor` raises, before anything is sampled.
    """
    n, total, name = run.eval.n, len(images.images_NCHW), run.eval.extractor
    check_count(n, total)
    with distributed.first():
        extractor, pixel, rows = load_extractor(name, run.eval.weights, device), _pixel(images), []
    reference = reference_features(extractor, images, run.cache, together=True)
    pixel_reference = reference_features(pixel, images, run.cache, together=True) if pixel else None
    for nfe in run.eval.nfe:
        parts = []
        for start in distributed.mine(range(0, n, run.eval.batch)):
            count = min(run.eval.batch, n - start)
            batch_NCHW, batch_nfe = sample(start, count, nfe)
            # An adaptive solver needs more evaluations for some batches than for others.
            used = batch_nfe * count / n
            parts.append((extractor(batch_NCHW), pixel(batch_NCHW) if pixel else None, used))
        parts = distributed.collect(parts)
        if distributed.rank():
            continue
        features, pixels, shares = zip(*parts, strict=True)
        generated, used = torch.cat(features), round(sum(shares), 6)
        row: dict[str, Any] = {"nfe": int(used) if used == int(used) else used, "solver": run.eval.solver}
        row |= {"extractor": name, "weights": extractor.weights_hash, "n": n}
        row |= {"reference": f"{images.fingerprint}/{total}"}
        row |= compare(generated, reference) | inception_score(extractor.logits(generated))
        if pixel_reference is not None:
            row["fd_pixel"] = frechet(torch.cat(pixels), pixel_reference)
        rows.append(row)
        on_row(row)
    return rows


def check_count(n: int, total: int) -> None:
    """Raises BadInput where a set of `total` images cannot answer for `n` samples."""
    least = NEIGHBOURS + 1  # an image's third neighbour
    if n > total:
        raise BadInput(f"eval.n={n} but the set has {total} images: set eval.n={total} or less")
    if n < least:
        raise BadInput(f"eval.n={n} is too few to measure anything: set eval.n={least} or more")
    if total < 2 * least:
        raise BadInput(f"the set has {total} images, and real halves of it are compared: it needs {2 * least} or more")


def _pixel(images: ImageData) -> Features | None:
    small = math.prod(images.images_NCHW.shape[1:]) <= PIXEL_DIMS
    return load_extractor("pixel", None, torch.device("cpu")) if small else None

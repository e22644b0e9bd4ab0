"""Statistics of seeds: every rule by which a table calls an arm better, worse or equivalent stands here, once.

Values are {seed: metric}; differences are arm minus baseline, paired by seed, because both arms of a seed see the same
images, noise and initial weights.

The interval is a seeded percentile bootstrap of the paired differences, its two halves stretched about the mean by
sqrt(n / (n - 1)) · t / z, and nowhere narrower than the paired t interval. The stretch undoes the two faults that the
bootstrap has with few seeds: it divides by n, not n - 1, and takes normal quantiles (Hesterberg 2015, "What teachers
should know about the bootstrap"; stretched, because with 3 seeds wider percentiles would still end at the extremes).
Coverage of nominal 95 %, 1,500 simulations each (tests/test_stats.py repeats it):

    n seeds   normal: percentile  this    lognormal - lognormal: this    exponential: this
       3               0.74       0.95              0.96                      0.90
       5               0.83       0.95              0.95                      0.89
      10               0.91       0.96              0.95                      0.91

The p value is that of a moderated paired t test (Smyth 2004, doi:10.2202/1544-6115.1027, as in limma): with 3 seeds an
arm's own variance is known too badly to survive a correction over ten arms, so it is shrunk towards that of the room's
other arms, the more so the more alike they are. Its degrees of freedom are capped at what the pooled variance is
worth, given that all differences share the baseline. Where all arms equal the baseline, 2 to 6 % of rooms call any of
them better or worse, and up to 8 % where the arms' variances differ by factors of four; a difference of four standard
deviations of one seed is found in 55 to 60 % of rooms of 11 arms with 3 seeds, in 11 % by each arm's own t test.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import special, stats
from scipy.optimize import brentq

from liquiddiff.config import BadInput

LEVEL, ALPHA, POWER, RESAMPLES, ROOMS = 0.95, 0.05, 0.8, 10_000, 1_000
PROTOCOL = "n reference extractor weights solver nfe data_fingerprint dtype images batch".split()
OWN = ("lr", "ema")  # an arm may have its own, its seeds not

Values = Mapping[int, float]


@dataclass(frozen=True)
class Difference:
    """An arm against the baseline, over the seeds that both have."""

    n: int
    mean: float  # arm minus baseline; nan at n = 0
    low: float  # 95 % interval; nan below two seeds
    high: float
    p: float  # moderated paired t test, uncorrected
    holm: float  # the same, corrected over the room's arms
    improvement: float  # probability that a seed of the arm beats a seed of the baseline
    verdict: str  # better, worse, equivalent, undecided


def mean_se(values: Iterable[float]) -> tuple[float, float | None, int]:
    """Mean, its standard error (ddof 1; None where n < 2) and n. The mean of nothing is nan."""
    x = np.asarray([v for v in values if math.isfinite(v)], dtype=float)
    if not len(x):
        return math.nan, None, 0
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None, len(x)


def paired(arm: Values, baseline: Values) -> np.ndarray:
    """Arm minus baseline for the seeds that both have, in the order of the seeds."""
    both = sorted(s for s in arm.keys() & baseline.keys() if math.isfinite(arm[s]) and math.isfinite(baseline[s]))
    return np.array([arm[s] - baseline[s] for s in both], dtype=float)


@cache
def draws(n: int, resamples: int) -> np.ndarray:
    """Which of n differences each resample takes, (resamples, n). RandomState: its stream never changes."""
    return np.random.RandomState(0).randint(0, n, (resamples, n))


def percentile_interval(differences: np.ndarray) -> tuple[float, float]:
    """The plain bootstrap interval, which covers too little with few seeds."""
    means = differences[draws(len(differences), RESAMPLES)].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval described above; (nan, nan) below two seeds."""
    d = np.asarray(differences, dtype=float)
    n = len(d)
    if n < 2:
        return math.nan, math.nan
    mean, t = float(d.mean()), stats.t.ppf((1 + LEVEL) / 2, n - 1)
    stretch = t / stats.norm.ppf((1 + LEVEL) / 2) * math.sqrt(n / (n - 1))
    half = t * d.std(ddof=1) / math.sqrt(n)
    low, high = (mean + stretch * (bound - mean) for bound in percentile_interval(d))
    return float(min(low, mean - half)), float(max(high, mean + half))


def p_value(differences: Sequence[float] | np.ndarray, spread: tuple[float, float] | None = None) -> float:
    """Two-sided paired t test, with the (variance, degrees of freedom) of `moderated` if given; nan below two seeds."""
    d = np.asarray(differences, dtype=float)
    if len(d) < 2:
        return math.nan
    variance, df = spread or (float(d.var(ddof=1)), len(d) - 1)
    if variance == 0:
        return 0.0 if d.mean() else 1.0
    return float(2 * stats.t.sf(abs(d.mean()) / math.sqrt(variance / len(d)), df))


def moderated(differences: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """(variance, degrees of freedom) of each arm's paired difference, shrunk towards the arms' common variance.

    Smyth 2004, section 6.2: the prior's degrees of freedom and variance from the mean and spread of the log variances.
    Arms with fewer than two pairs, or no variance, keep their own. Below two arms nothing is shrunk.
    """
    own = [(float(d.var(ddof=1)), len(d) - 1) if len(d) > 1 else (math.nan, 0) for d in differences]
    known = np.array([(v, df) for v, df in own if df and v > 0])
    if len(known) < 2:
        return [(v, float(df)) for v, df in own]
    variance, df = known.T
    e = np.log(variance) - special.digamma(df / 2) + np.log(df / 2)
    spread = float(e.var(ddof=1) - special.polygamma(1, df / 2).mean())
    if spread > 1e-6:
        prior_df = 2 * float(brentq(lambda y: special.polygamma(1, y) - spread, 1e-6, 1e7))
        prior = math.exp(e.mean() + special.digamma(prior_df / 2) - math.log(prior_df / 2))
    else:
        prior_df, prior = math.inf, float((df * variance).sum() / df.sum())
    worth = float(df.sum()) / (1 + (len(df) - 1) / 4)  # variances of two differences from one baseline correlate by 1/4
    result = []
    for v, n in own:
        if not n or v == 0:
            result.append((v, float(n)))
        else:
            shrunk = prior if math.isinf(prior_df) else (prior_df * prior + n * v) / (prior_df + n)
            result.append((shrunk, max(float(n), min(prior_df + n, worth))))
    return result


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction over all tests that could be made; a nan stays one and counts as no test."""
    order = sorted((p, k) for k, p in enumerate(p_values) if math.isfinite(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, k) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[k] = largest
    return corrected


def improvement(arm: Values, baseline: Values, lower_is_better: bool = True) -> float:
    """P(a seed of the arm beats a seed of the baseline), ties half, over all pairs (Agarwal et al. 2021)."""
    a, b = (np.array([v for v in x.values() if math.isfinite(v)]) for x in (arm, baseline))
    if not len(a) or not len(b):
        return math.nan
    gain = np.sign(b[None, :] - a[:, None]) * (1 if lower_is_better else -1)
    return float((gain + 1).mean() / 2)


def verdict(low: float, high: float, p_holm: float, margin: float, lower_is_better: bool = True) -> str:
    """The rule.

    1. The whole interval inside ±margin: equivalent, even where the difference is significant, since differences below
       the margin were declared not to matter before the runs.
    2. Else Holm-corrected p < 0.05 and an interval that excludes 0: better or worse.
    3. Else, and always below two seeds: undecided.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "undecided"
    if -margin < low and high < margin:
        return "equivalent"
    if p_holm < ALPHA and (low > 0 or high < 0):
        return "better" if (high < 0) == lower_is_better else "worse"
    return "undecided"


def compare(
    values: Mapping[str, Values], baseline: str, margin: float, lower_is_better: bool = True
) -> dict[str, Difference]:
    """Every arm but the baseline against it, corrected over all of them."""
    arms = [arm for arm in values if arm != baseline]
    base = values.get(baseline, {})
    differences = {arm: paired(values[arm], base) for arm in arms}
    spreads = moderated([differences[arm] for arm in arms])
    p = [p_value(differences[arm], spread) for arm, spread in zip(arms, spreads, strict=True)]
    result = {}
    for arm, raw, corrected in zip(arms, p, holm(p), strict=True):
        d = differences[arm]
        low, high = interval(d)
        result[arm] = Difference(
            n=len(d),
            mean=float(d.mean()) if len(d) else math.nan,
            low=low,
            high=high,
            p=raw,
            holm=corrected,
            improvement=improvement(values[arm], base, lower_is_better),
            verdict=verdict(low, high, corrected, margin, lower_is_better),
        )
    return result


def best(values: Mapping[str, Values], lower_is_better: bool = True) -> set[str]:
    """The arm of the best mean and those not significantly worse (moderated t, Holm); one seed takes no part."""
    sign = 1 if lower_is_better else -1
    means = {arm: sign * mean for arm, x in values.items() for mean, _, n in [mean_se(x.values())] if n > 1}
    if not means:
        return set()
    first = min(means, key=lambda arm: means[arm])
    others = [arm for arm in means if arm != first]
    differences = [paired(values[arm], values[first]) for arm in others]
    worse = holm([p_value(d, spread) for d, spread in zip(differences, moderated(differences), strict=True)])
    by = zip(others, worse, differences, strict=True)  # by the seeds that both have one may be better
    return {first} | {arm for arm, p, d in by if p >= ALPHA or (len(d) and sign * d.mean() <= 0)}


def pooled_sd(values: Mapping[str, Values], baseline: str) -> tuple[float, int, int]:
    """SD of a paired difference, pooled over the arms; the pairs that most have; the arms with two. Or (nan, 0, 0)."""
    pairs = [d for arm in values if arm != baseline and len(d := paired(values[arm], values.get(baseline, {}))) > 1]
    if not pairs:
        return math.nan, 0, 0
    squares = sum(float(((d - d.mean()) ** 2).sum()) for d in pairs)
    return math.sqrt(squares / sum(len(d) - 1 for d in pairs)), statistics.mode(map(len, pairs)), len(pairs)


def left_by_pairing(values: Mapping[str, Values], baseline: str) -> float:
    """Variance of a paired difference over that of two seeds unpaired, the median over arms; nan where unknown.

    1: the two arms of a seed have nothing in common. Below: what they share cancels.
    """
    base, found = values.get(baseline, {}), []
    for arm in values:
        both = values[arm].keys() & base.keys()
        if arm != baseline and len(d := paired(values[arm], base)) > 1 and len(d) == len(both):
            apart = sum(float(np.var([x[seed] for seed in both], ddof=1)) for x in (values[arm], base))
            found += [float(d.var(ddof=1)) / apart] if apart else []
    return statistics.median(found) if found else math.nan


def detectable(sd: float, n: int, arms: int = 1) -> float:
    """The smallest difference that n seeds show with 80 % power in a room of `arms` that vary alike.

    `sd` is that of a paired difference. nan where n < 2 or the spread is unknown.
    """
    return least(n, arms) * sd if n > 1 and math.isfinite(sd) else math.nan


@cache
def least(n: int, arms: int) -> float:
    """`detectable` in units of the SD, by a simulation of the rule: both halves of the verdict have to be passed.

    In each simulated room of normal seeds, one arm differs: from which shift on is its p value small enough for Holm's
    hardest step, and its interval free of zero? Neither variance nor the interval's width depend on the shift.
    """
    rng, needed = np.random.RandomState(0), []
    for _ in range(ROOMS):
        base, *others = rng.normal(0, math.sqrt(0.5), (arms + 1, n))
        differences = [arm - base for arm in others]
        variance, df = moderated(differences)[0]
        critical = stats.t.ppf(1 - ALPHA / arms / 2, df) * math.sqrt(variance / n)
        low, _ = interval(differences[0])
        needed.append(max(critical - float(differences[0].mean()), -low))
    return float(np.quantile(needed, POWER))


def plain(value: Any) -> str:
    """A number without the decimal point that a column with gaps gives it."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def check_protocol(rows: Iterable[Mapping[str, Any]], varies: Sequence[str] = ()) -> None:
    """Raise BadInput, naming the difference, unless all rows were measured alike in everything but `varies`.

    And unless an arm has each seed once, all trained alike. What a row does not tell (an older one has no `weights` and
    `dtype`) is not held against it.
    """
    rows = list(rows)
    for column in PROTOCOL:
        if column not in varies:
            _check_alike(rows, column)
    arms: dict[Any, dict[Any, Mapping[str, Any]]] = {}
    for row in rows:
        if row["seed"] in (seeds := arms.setdefault(row["arm"], {})):
            raise BadInput(
                f"{row['arm']} (seed {plain(row['seed'])}) has two rows of one NFE: remove the older from results.csv"
            )
        seeds[row["seed"]] = row
    for seeds in arms.values():
        for column in OWN:
            _check_alike(seeds.values(), column)


def _check_alike(rows: Iterable[Mapping[str, Any]], column: str) -> None:
    first: dict[Any, Mapping[str, Any]] = {}
    for row in rows:
        if (value := row.get(column)) not in (None, "") and value == value:  # nor nan
            first.setdefault(value, row)
    if len(first) > 1:
        where = ", ".join(f"{plain(value)} in {row['arm']} (seed {plain(row['seed'])})" for value, row in first.items())
        raise BadInput(f"these rows cannot be compared, their {column} differs: {where}")

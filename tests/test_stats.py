"""Statistics: against scipy, against hand calculations, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis import stats
from liquiddiff.config import BadInput

RNG = np.random.RandomState


def seeds(values):
    return dict(enumerate(values))


def noisy(mean, sd, n, rng):
    return seeds(rng.normal(mean, sd, n))


def test_mean_and_standard_error_are_scipys():
    x = [0.31, 0.35, 0.30, 0.37]
    assert stats.mean_se(x) == (pytest.approx(np.mean(x)), pytest.approx(scipy_stats.sem(x)), 4)
    assert stats.mean_se([2.0]) == (2.0, None, 1)
    assert stats.mean_se([2.0, math.nan])[1:] == (None, 1)
    assert math.isnan(stats.mean_se([])[0])


def test_differences_are_paired_by_seed_not_by_position():
    assert list(stats.paired({2: 5.0, 0: 1.0, 7: 9.0}, {0: 0.5, 2: 1.0, 3: 8.0, 7: math.nan})) == [0.5, 4.0]


def test_p_value_is_scipys():
    d = RNG(1).normal(0.3, 1, 7)
    assert stats.p_value(d) == pytest.approx(scipy_stats.ttest_1samp(d, 0).pvalue)
    assert math.isnan(stats.p_value([1.0]))
    assert stats.p_value([0.0, 0.0]) == 1 and stats.p_value([1.0, 1.0]) == 0


def test_plain_bootstrap_is_scipys():
    d = RNG(2).normal(0, 1, 12)
    theirs = scipy_stats.bootstrap((d,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert stats.percentile_interval(d) == pytest.approx((theirs.low, theirs.high), abs=0.04)


def test_interval_is_seeded_and_never_narrower_than_the_t_interval():
    for k in range(20):
        d = RNG(k).exponential(1, 4)
        low, high = stats.interval(d)
        t = scipy_stats.ttest_1samp(d, 0).confidence_interval()
        assert low <= t.low + 1e-12 and high >= t.high - 1e-12
        assert stats.interval(d) == (low, high)
    d = RNG(0).normal(0, 1, 400)  # with many seeds the corrections vanish
    plain = stats.percentile_interval(d)
    assert stats.interval(d) == pytest.approx(plain, abs=0.1 * (plain[1] - plain[0]))


def coverage(draw, n, truth, trials=500):
    rng = RNG(n)
    hits = [(low <= truth <= high) for low, high in (stats.interval(draw(rng, n)) for _ in range(trials))]
    return np.mean(hits)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_coverage_is_honest_with_few_seeds(n, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    assert coverage(lambda rng, n: rng.normal(0, 1, n), n, 0) > 0.93  # 0.95 less 2 standard errors
    assert coverage(lambda rng, n: rng.lognormal(0, 0.5, n) - rng.lognormal(0, 0.5, n), n, 0) > 0.93
    assert coverage(lambda rng, n: rng.exponential(1, n), n, 1) > 0.85  # no honest interval is narrow here
    monkeypatch.setattr(stats, "interval", stats.percentile_interval)
    if n < 10:  # why the plain bootstrap is not used
        assert coverage(lambda rng, n: rng.normal(0, 1, n), n, 0) < 0.88


def test_holm_equals_a_hand_calculation():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, made monotone
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = stats.holm([0.01, math.nan, 0.04])
    assert corrected[0] == 0.02 and math.isnan(corrected[1]) and corrected[2] == 0.04
    assert stats.holm([]) == []


def test_probability_of_improvement_is_mann_whitneys():
    a, b = noisy(0, 1, 6, RNG(3)), noisy(0.5, 1, 5, RNG(4))
    u = scipy_stats.mannwhitneyu(list(b.values()), list(a.values())).statistic  # b above a: a is better
    assert stats.improvement(a, b) == pytest.approx(u / 30)
    assert stats.improvement(a, b, lower_is_better=False) == pytest.approx(1 - u / 30)
    assert stats.improvement({0: 1.0}, {0: 1.0}) == 0.5


def test_detectable_difference_is_the_textbooks_where_the_rule_is_the_textbooks():
    """With ten seeds and one arm the interval is hardly wider than the t test's, whose power is 0.8 at 0.996."""
    assert stats.detectable(1, 10) == pytest.approx(0.996, abs=0.04)
    assert stats.detectable(2, 5, 9) == pytest.approx(2 * stats.detectable(1, 5, 9))
    assert stats.detectable(1, 3) > stats.detectable(1, 5) > stats.detectable(1, 10)
    assert stats.detectable(1, 10, 9) > stats.detectable(1, 10)
    assert math.isfinite(stats.detectable(1, 2, 9))
    assert math.isnan(stats.detectable(1, 1)) and math.isnan(stats.detectable(math.nan, 0))


@pytest.mark.parametrize(("n", "arms"), [(3, 7), (5, 2)])
def test_a_detectable_difference_is_called_so_eight_times_in_ten(n, arms):
    """By the rule itself, in rooms of which one arm differs."""
    rng, delta, found = RNG(5), stats.detectable(1, n, arms), 0
    for _ in range(300):
        values = {k: seeds(rng.normal(delta if k == 1 else 0, math.sqrt(0.5), n)) for k in range(arms + 1)}
        found += stats.compare(values, 0, margin=0)[1].verdict == "worse"
    assert found / 300 == pytest.approx(0.8, abs=0.07)


def test_moderated_variances_are_shrunk_as_in_smyth_2004():
    rng = RNG(7)
    alike = [rng.normal(0, 1, 3) for _ in range(200)]
    assert [v for v, _ in stats.moderated(alike)] == pytest.approx([1.0] * 200, abs=0.2)  # one variance: pooled
    # Variances drawn from the model's own prior, s0^2 d0 / chi2_d0, with d0 = 4 and s0 = 2: its posterior means.
    true = 4 * 4 / rng.chisquare(4, 4000)
    drawn = [rng.normal(0, math.sqrt(v), 3) for v in true]
    expected = [(4 * 4 + 2 * d.var(ddof=1)) / (4 + 2) for d in drawn]
    ratio = np.array([v for v, _ in stats.moderated(drawn)]) / expected
    assert np.median(ratio) == pytest.approx(1, abs=0.1) and ratio.std() < 0.1
    assert stats.moderated(drawn)[0][1] == pytest.approx(6, abs=1)
    # Nothing to shrink towards, and no variance to shrink.
    d = rng.normal(0, 1, 5)
    assert stats.moderated([d]) == [(pytest.approx(d.var(ddof=1)), 4)]
    assert stats.moderated([d, np.ones(3), d[:1]])[1:] == [(0, 2), (pytest.approx(math.nan, nan_ok=True), 0)]


def room(rng, n=5):
    """Seeds share most of their noise, as paired arms do."""
    shared = rng.normal(0, 0.05, n)
    own = {arm: rng.normal(0, 0.004, n) for arm in ("baseline", "better", "worse", "same", "noisy")}
    shift = {"baseline": 0, "better": -0.1, "worse": 0.1, "same": 0.001, "noisy": -0.05}
    own["noisy"] = rng.normal(0, 0.2, n)
    return {arm: seeds(1 + shared + shift[arm] + own[arm]) for arm in own}


def test_verdicts_name_what_was_built_in():
    found = stats.compare(room(RNG(0)), "baseline", margin=0.03)
    assert {arm: d.verdict for arm, d in found.items()} == {
        "better": "better", "worse": "worse", "same": "equivalent", "noisy": "undecided",
    }  # fmt: skip
    assert found["better"].n == 5 and found["better"].improvement > 0.9
    assert all(d.holm >= d.p for d in found.values())


def test_higher_is_better_swaps_the_verdicts():
    found = stats.compare(room(RNG(0)), "baseline", 0.03, lower_is_better=False)
    assert (found["better"].verdict, found["worse"].verdict) == ("worse", "better")


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_seeds_are_undecided(n):
    found = stats.compare(room(RNG(0), n), "baseline", 10.0)
    assert {d.verdict for d in found.values()} == {"undecided"}


def test_no_baseline_decides_nothing():
    assert stats.compare({"a": {0: 1.0, 1: 2.0}}, "baseline", 0.1)["a"].verdict == "undecided"


def test_a_significant_difference_inside_the_margin_is_equivalent():
    values = {"baseline": seeds([1.0, 2.0, 3.0]), "arm": seeds([1.01, 2.011, 3.0105])}
    difference = stats.compare(values, "baseline", 0.1)["arm"]
    assert difference.p < 0.05 and difference.verdict == "equivalent"
    assert stats.compare(values, "baseline", 0.005)["arm"].verdict == "worse"


def test_false_alarms_of_a_room_stay_below_five_percent(monkeypatch):
    """Ten arms that are the baseline, 3 seeds: with Holm, one room in twenty calls any of them better or worse."""
    monkeypatch.setattr(stats, "RESAMPLES", 500)
    rng, alarms, found = RNG(6), 0, 0
    for _ in range(400):
        values = {f"arm{k}": noisy(0, 1, 3, rng) for k in range(10)} | {"baseline": noisy(0, 1, 3, rng)}
        alarms += any(d.verdict in ("better", "worse") for d in stats.compare(values, "baseline", 0.0).values())
        values["arm0"] = {seed: v + 4 for seed, v in values["arm0"].items()}
        found += stats.compare(values, "baseline", 0.0)["arm0"].verdict == "worse"
    assert alarms / 400 < 0.07  # 0.05 and two standard errors
    assert found / 400 > 0.5  # what the shared variance buys: each arm's own t test finds 0.12


def test_best_marks_the_best_and_what_is_not_worse():
    values = room(RNG(0))
    del values["noisy"]
    assert stats.best(values) == {"better"}
    assert stats.best(values, lower_is_better=False) == {"worse"}
    del values["better"]
    assert stats.best(values) == {"baseline", "same"}
    assert stats.best({"a": {0: 1.0}, "b": {0: 2.0}}) == set()
    noise = dict(enumerate(RNG(1).normal(0, 0.01, 8)))
    whole = {"whole": {seed: 1.0 + x for seed, x in noise.items()}}
    better = {"better": {seed: 0.9 * x for seed, x in list(whole["whole"].items())[:4]} | {9: 9.0}}
    assert stats.best(whole | better) == {"whole", "better"}  # by the seeds of both it is


def test_protocols_must_agree():
    row = {
        "arm": "baseline", "seed": 0, "n": 1797, "reference": "ab/1797", "extractor": "digits", "solver": "euler",
        "nfe": 32, "data_fingerprint": "ab", "images": 150000, "batch": 128,
    }  # fmt: skip
    stats.check_protocol([row, row | {"arm": "conv", "seed": 3}])
    for key, value in {"n": 500, "solver": "heun", "reference": "cd/1797", "batch": 64, "images": 100}.items():
        other = row | {"arm": "conv", "seed": 1.0, key: value}
        with pytest.raises(BadInput, match=rf"their {key} differs: .*{value} in conv \(seed 1\)") as error:
            stats.check_protocol([row, other])
        assert "\n" not in str(error.value)
        stats.check_protocol([row, other], varies=[key])


def test_rows_of_other_arithmetic_or_weights_are_refused_and_what_is_not_known_is_not():
    row = {key: 1 for key in stats.PROTOCOL} | {"arm": "a", "seed": 0}
    older = {k: v for k, v in row.items() if k not in ("dtype", "weights")}
    older |= {"seed": 1}
    stats.check_protocol([row, older, row | {"seed": 2, "dtype": math.nan, "weights": ""}])
    for key in ("dtype", "weights", "n"):
        with pytest.raises(BadInput, match=f"their {key} differs: 1 in a .seed 0., 2 in b"):
            stats.check_protocol([row, older, row | {key: 2, "arm": "b"}])


def test_an_arm_has_each_seed_once_and_all_of_one_rate():
    row = {"arm": "a", "seed": 0, "lr": 0.008, "ema": 0.99}
    alike = [row, row | {"seed": 1}, row | {"arm": "b", "lr": 0.016}]
    stats.check_protocol(alike)
    with pytest.raises(BadInput, match=r"a \(seed 1\) has two rows of one NFE: remove the older"):
        stats.check_protocol([*alike, row | {"seed": 1}])
    for key, value in (("lr", 0.016), ("ema", 0.9)):
        with pytest.raises(BadInput, match=rf"their {key} differs: .* in a \(seed 0\), {value} in a \(seed 2\)"):
            stats.check_protocol([*alike, row | {"seed": 2, key: value}])


def test_pairing_leaves_of_the_variance_what_the_arms_do_not_share():
    rng = RNG(3)
    shared, own = rng.normal(0, 1, 4000), rng.normal(0, 1, (3, 4000))
    values = {"baseline": seeds(shared + own[0]), "paired": seeds(shared + own[1])}
    assert stats.left_by_pairing(values, "baseline") == pytest.approx(0.5, abs=0.03)
    values |= {"apart": seeds(own[2]), "opposed": seeds(-shared)}  # the median of 0.5, 1 and 5 / 3
    assert stats.left_by_pairing(values, "baseline") == pytest.approx(1, abs=0.05)
    assert math.isnan(stats.left_by_pairing({"baseline": seeds([1.0]), "a": seeds([2.0])}, "baseline"))

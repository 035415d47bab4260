"""The intervals hold what they say they hold, for samples of any size."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from validations.statistics import (
    NoSample,
    difference,
    interpolated,
    paired_bootstrap,
    proportion,
    quantile,
    quantile_ratio,
    worst_of,
)
from validations.verdict import Bound, Outcome

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.sampled_from([0.8, 0.9, 0.95, 0.99, 0.999])
latencies = st.lists(st.floats(0, 1e4, allow_nan=False) | st.just(math.inf), min_size=1, max_size=60)
quantiles = st.sampled_from([0.01, 0.5, 0.9, 0.95, 0.99])


@given(counts, confidences)
def test_a_rate_has_the_interval_that_scipy_calls_exact(kn, confidence):
    """Clopper and Pearson's interval is scipy's own "exact" one."""
    k, n = kn
    measured = proportion(k, n, confidence)
    exact = stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    assert measured.low == pytest.approx(exact.low, abs=1e-9)
    assert measured.high == pytest.approx(exact.high, abs=1e-9)
    assert measured.value == k / n
    assert measured.sample == n


@pytest.mark.parametrize("p", [0.001, 0.01, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("n", [10, 200, 1000])
def test_a_rate_is_covered_as_often_as_declared(p, n):
    """Summed over every outcome, the interval holds the true rate with at least the declared probability."""
    k = np.arange(n + 1)
    likely = k[stats.binom.pmf(k, n, p) > 1e-12]
    covered = sum(stats.binom.pmf(i, n, p) for i in likely if (m := proportion(int(i), n, 0.9)).low <= p <= m.high)
    assert covered >= 0.9 - 1e-9


@given(counts, counts, confidences)
def test_a_difference_lies_within_its_box(one, two, confidence):
    """The difference is held by an interval within [-1, 1] that turns around when the arms change places."""
    there = difference(*one, *two, confidence)
    back = difference(*two, *one, confidence)
    assert -1 <= there.low <= there.value <= there.high <= 1
    assert there.low == pytest.approx(-back.high)
    assert there.sample == min(one[1], two[1])


@pytest.mark.parametrize(("p1", "p0"), [(0.01, 0.01), (0.05, 0.01), (0.5, 0.4)])
def test_a_difference_is_covered_as_often_as_declared(p1, p0):
    """In 2,000 simulated canaries the true difference is missed in at most the declared share."""
    random = np.random.default_rng(7)
    missed = 0
    for k1, k0 in zip(random.binomial(150, p1, 2000), random.binomial(900, p0, 2000), strict=True):
        measured = difference(int(k1), 150, int(k0), 900, 0.9)
        missed += not measured.low <= p1 - p0 <= measured.high
    assert missed <= 0.1 * 2000


@given(latencies, quantiles, confidences)
def test_a_quantile_is_an_order_statistic(samples, q, confidence):
    """Value and ends are numbers of the sample (or 0 and infinity), and in order."""
    measured = quantile(samples, q, confidence)
    assert measured.value in samples
    assert measured.low in [*samples, 0.0]
    assert measured.high in [*samples, math.inf]
    assert measured.value == sorted(samples)[max(math.ceil(q * len(samples) - 1e-9), 1) - 1]


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("law", ["lognormal", "pareto", "exponential"])
def test_a_quantile_is_covered_as_often_as_declared(q, law):
    """In 1,000 samples of heavy-tailed latencies the true quantile is missed in at most the declared share."""
    random = np.random.default_rng(11)
    draw, true = {
        "lognormal": (lambda n: random.lognormal(0, 1, n), stats.lognorm(1).ppf(q)),
        "pareto": (lambda n: random.pareto(1.5, n), stats.lomax(1.5).ppf(q)),
        "exponential": (lambda n: random.exponential(1, n), stats.expon.ppf(q)),
    }[law]
    measured = [quantile(draw(300), q, 0.9) for _ in range(1000)]
    missed = sum(not m.low <= true <= m.high for m in measured)
    # At most 10 %, and three standard errors of a simulation of this size.
    assert missed <= 100 + 3 * math.sqrt(1000 * 0.1 * 0.9)


def test_a_sample_too_small_for_the_quantile_is_never_a_pass():
    """Twenty fast answers cannot bound a p99, so the check stays undecided."""
    measured = quantile([0.01] * 20, 0.99, 0.95)
    assert math.isinf(measured.high)
    assert Bound(max=10).judge(measured) is Outcome.INCONCLUSIVE
    assert Bound(max=10).judge(quantile([0.01] * 400, 0.99, 0.95)) is Outcome.PASSED


def test_failing_fast_does_not_improve_latency():
    """Failures count as infinite, so a server that fails 2 % of its requests has no finite p99."""
    measured = quantile([0.01] * 9_800 + [math.inf] * 200, 0.99, 0.95)
    assert measured.low == measured.value == math.inf
    assert Bound(max=1000).judge(measured) is Outcome.FAILED


@given(latencies, latencies, quantiles, confidences)
def test_a_ratio_of_quantiles_is_never_nan(one, two, q, confidence):
    """Whatever fails, is zero or is too small, a ratio is a number with an interval that holds it."""
    measured = quantile_ratio(one, two, q, confidence)
    assert 0 <= measured.low <= measured.value <= measured.high
    assert measured.sample == min(len(one), len(two))


def test_a_ratio_of_quantiles_is_covered_as_often_as_declared():
    """In 1,000 load tests of a challenger that is 1.3 times slower, 1.3 is missed in at most the declared share."""
    random = np.random.default_rng(3)
    missed = 0
    for _ in range(1000):
        measured = quantile_ratio(1.3 * random.lognormal(0, 1, 300), random.lognormal(0, 1, 400), 0.9, 0.9)
        missed += not measured.low <= 1.3 <= measured.high
    assert missed <= 100


def _mean_of(values):
    return lambda weights: (weights @ values / weights.sum(axis=1))[None]


def test_the_bootstrap_is_repeatable_and_near_the_classical_interval():
    """The same rows give the same interval, and that of a mean is the textbook one."""
    values = np.random.default_rng(2).normal(3, 1, 2000)
    one, two = (paired_bootstrap(_mean_of(values), 2000, 0.95, resamples=2000)[0] for _ in range(2))
    assert one == two
    half = 1.96 * values.std() / math.sqrt(2000)
    assert one.low == pytest.approx(values.mean() - half, abs=0.005)
    assert one.high == pytest.approx(values.mean() + half, abs=0.005)


def test_the_bootstrap_is_paired():
    """Statistics of one call see the same resampled rows, so a constant difference has no width."""
    values = np.random.default_rng(2).normal(3, 1, 500)

    def both(weights):
        one, two = _mean_of(values + 0.25)(weights)[0], _mean_of(values)(weights)[0]
        return np.stack([one, one - two])

    mean, delta = paired_bootstrap(both, 500, 0.95)
    assert mean.high - mean.low > 0.1
    assert delta.high - delta.low == pytest.approx(0, abs=1e-9)


def test_the_worst_of_many_equal_slices_is_rarely_called_bad():
    """Fifty slices at the bound itself: the worst is failed in at most the declared share of runs."""
    random = np.random.default_rng(17)
    wrong = 0
    for _ in range(200):
        rows = [(str(at), int(k), 200) for at, k in enumerate(random.binomial(200, 0.05, 50))]
        wrong += Bound(max=0.05).judge(worst_of(rows, 0.9)[1]) is Outcome.FAILED
    assert wrong <= 0.1 * 200


@settings(max_examples=50)
@given(st.lists(st.tuples(counts, st.text(max_size=3)), min_size=1, max_size=6), confidences)
def test_the_worst_is_one_of_those_given(rows, confidence):
    """The one named was given, and no other has a higher lower end."""
    given_rows = [(name, *kn) for kn, name in rows]
    at, worst = worst_of(given_rows, confidence)
    name, k, n = given_rows[at]
    assert (worst.where, worst.value, worst.sample) == (name, k / n, n)
    assert worst.low <= worst.value <= worst.high


@pytest.mark.parametrize(
    "call",
    [
        lambda: proportion(0, 0, 0.95),
        lambda: difference(0, 0, 1, 2, 0.95),
        lambda: difference(1, 2, 0, 0, 0.95),
        lambda: quantile([], 0.5, 0.95),
        lambda: quantile_ratio([], [1], 0.5, 0.95),
        lambda: paired_bootstrap(_mean_of(np.ones(0)), 0, 0.95),
        lambda: worst_of([], 0.95),
    ],
)
def test_nothing_is_no_measurement(call):
    """An empty sample raises NoSample: the metric is left out, and the judge errs."""
    with pytest.raises(NoSample):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: proportion(3, 2, 0.95),
        lambda: proportion(1, 2, 1.0),
        lambda: quantile([1, math.nan], 0.5, 0.95),
        lambda: quantile([-1.0], 0.5, 0.95),
        lambda: quantile([1.0], 1.0, 0.95),
    ],
)
def test_nonsense_is_refused(call):
    """Impossible counts, confidences, quantiles and buckets raise ValueError."""
    with pytest.raises(ValueError) as caught:
        call()
    assert not isinstance(caught.value, NoSample)


def test_a_quantile_is_interpolated_within_its_bucket():
    """As Prometheus does; beyond the last edge it is that edge."""
    edges = np.array([1.0, 10.0])
    assert interpolated(edges, [0, 1000], 1000, 0.5) == pytest.approx(5.5)
    assert interpolated(edges, [500, 1000], 1000, 0.25) == pytest.approx(0.5)
    assert interpolated(edges, [0, 50], 1000, 0.99) == 10.0

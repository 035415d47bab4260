"""Numbers with the intervals that hold them: exact, for a fixed sample.

Pure: counts and arrays in, `Measurement`s out. Every interval is valid for a sample whose size was settled
beforehand, and looked at once; what is looked at again and again has those of `validations.eprocess`.

An empty sample measures nothing: `NoSample` is raised, the gate leaves that metric out, and the judge errs.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from validations.verdict import Measurement

Floats = NDArray[np.float64]


class NoSample(ValueError):
    """There is nothing to measure: leave the metric out, and its check is errored."""


def proportion(k: int, n: int, confidence: float) -> Measurement:
    """The rate of `k` events in `n` trials, with the Clopper-Pearson interval (never under `confidence`).

    Clopper and Pearson 1934: the ends are quantiles of beta distributions. Raises `NoSample` for n = 0.
    """
    low, high = _clopper_pearson(k, n, _alpha(confidence))
    return Measurement(value=k / n, low=low, high=high, sample=n)


def difference(k1: int, n1: int, k0: int, n0: int, confidence: float) -> Measurement:
    """The difference k1/n1 - k0/n0 of two rates (challenger's minus champion's).

    Two Clopper-Pearson intervals, each with half the error probability (Bonferroni), span a box that holds
    both rates; the interval is the box's range of differences. Conservative, and exact for any sizes.
    The sample is the smaller of the two. Raises `NoSample` when either is empty.
    """
    alpha = _alpha(confidence) / 2
    low1, high1 = _clopper_pearson(k1, n1, alpha)
    low0, high0 = _clopper_pearson(k0, n0, alpha)
    return Measurement(value=k1 / n1 - k0 / n0, low=low1 - high0, high=high1 - low0, sample=min(n1, n0))


def quantile(samples: ArrayLike, q: float, confidence: float) -> Measurement:
    """The `q`-quantile of non-negative numbers (latencies in seconds), free of any assumption on their law.

    A failed request is +inf: otherwise failing fast would improve latency. The ends are order statistics
    whose ranks are quantiles of Binomial(n, q) (David and Nagaraja, Order Statistics, 7.1). Where the
    sample is too small to bound the quantile, the upper end is +inf and the lower end 0.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    if ordered.size and (np.isnan(ordered[-1]) or ordered[0] < 0):
        raise ValueError("a quantile needs non-negative numbers without NaN")
    lower, middle, upper = _ranks(ordered.size, q, confidence)
    return Measurement(
        value=float(ordered[middle - 1]),
        low=float(ordered[lower - 1]) if lower else 0.0,
        high=float(ordered[upper - 1]) if upper <= ordered.size else math.inf,
        sample=int(ordered.size),
    )


def quantile_ratio(challenger: ArrayLike, champion: ArrayLike, q: float, confidence: float) -> Measurement:
    """The challenger's `q`-quantile over the champion's: two `quantile` intervals at the Bonferroni level.

    Holds without any assumption on the two laws; the samples need not be paired or of one size.
    """
    half = 1 - _alpha(confidence) / 2
    return _ratio(quantile(challenger, q, half), quantile(champion, q, half))


def interpolated(edges: Floats, below: ArrayLike, size: float, q: float) -> float:
    """The `q`-quantile of `size` numbers, `below[i]` of which are at most `edges[i]`: interpolated within its bucket,
    as Prometheus does; the last edge where it lies beyond all.
    """
    counts = np.asarray(below, dtype=np.float64)
    rank = min(max(math.ceil(size * q - 1e-9), 1), size)
    at = int(np.searchsorted(counts, rank))
    if at >= edges.size:
        return float(edges[-1])
    start, before = (edges[at - 1], counts[at - 1]) if at else (0.0, 0.0)
    return float(start + (rank - before) / (counts[at] - before) * (edges[at] - start))


def paired_bootstrap(
    statistics: Callable[[Floats], Floats],
    n: int,
    confidence: float,
    *,
    resamples: int = 400,
    seed: int = 0,
) -> list[Measurement]:
    """Percentile intervals of statistics of `n` rows, all of them from the same resampled rows.

    `statistics` gets weights of shape (b, n), how often each row was drawn in each of b resamples, and
    returns an array (k, b). What is computed from the same row therefore stays paired. `resamples` is
    raised to 20 / (1 - confidence), under which the ends would hang on a handful of draws.
    Approximate, unlike the rest of this module (Efron and Tibshirani 1993, chapter 13), and repeatable:
    the seed is fixed. Resamples in which a statistic does not exist (NaN: one class only, say) are left out;
    where that is more than half of them, `NoSample` is raised.
    """
    if n < 1:
        raise NoSample("no rows to measure")
    alpha = _alpha(confidence)
    # Without the rounding, 20 / (1 - 0.95) asks for one resample more than 400.
    resamples = max(resamples, math.ceil(round(20 / alpha, 6)))
    random = np.random.default_rng(seed)
    values = statistics(np.ones((1, n)))[:, 0]
    step = max(1, 2_000_000 // n)
    parts = [statistics(_draws(random, min(step, resamples - start), n)) for start in range(0, resamples, step)]
    measured = []
    for value, replicates in zip(values, np.concatenate(parts, axis=1), strict=True):
        usable = replicates[~np.isnan(replicates)]
        if np.isnan(value) or usable.size < resamples / 2:
            raise NoSample("the metric does not exist in most resamples: too few rows, or only one class")
        low, high = np.quantile(usable, [alpha / 2, 1 - alpha / 2])
        measured.append(
            Measurement(value=float(value), low=float(min(low, value)), high=float(max(high, value)), sample=n)
        )
    return measured


def worst_of(measured: Sequence[tuple[str, int, int]], confidence: float) -> tuple[int, Measurement]:
    """The highest of several rates, each (name, k, n): which one it is, and an interval for the highest.

    Each rate gets a Clopper-Pearson interval at the Bonferroni level; then the highest true rate lies between
    the highest lower end and the highest upper end. The one named has the highest lower end: the one that
    is most surely bad. The sample is left to the caller: here it is that of the one named.
    """
    if not measured:
        raise NoSample("no group is large enough to be measured")
    alpha = _alpha(confidence) / len(measured)
    ends = [_clopper_pearson(k, n, alpha) for _, k, n in measured]
    worst = max(range(len(ends)), key=lambda i: (ends[i][0], measured[i][1] / measured[i][2]))
    name, k, n = measured[worst]
    high = max(high for _, high in ends)
    return worst, Measurement(value=k / n, low=ends[worst][0], high=high, sample=n, where=name, note=f"{k:,} of {n:,}")


def _alpha(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, not at {confidence}")
    return 1 - confidence


def _clopper_pearson(k: int, n: int, alpha: float) -> tuple[float, float]:
    if n == 0:
        raise NoSample("no trials to measure a rate from")
    if not 0 <= k <= n:
        raise ValueError(f"{k} events in {n} trials")
    # The inverse regularised beta; the survival side is taken from the far tail for precision near 1.
    low = 0.0 if k == 0 else float(stats.beta.ppf(alpha / 2, k, n - k + 1))
    high = 1.0 if k == n else float(stats.beta.isf(alpha / 2, k + 1, n - k))
    return min(low, k / n), max(high, k / n)


def _ranks(n: int, q: float, confidence: float) -> tuple[int, int, int]:
    """The ranks (from 1) of lower end, quantile and upper end; 0 and n + 1 stand for "not in the sample"."""
    if not 0 < q < 1:
        raise ValueError(f"a quantile lies between 0 and 1, not at {q}")
    alpha = _alpha(confidence)
    if n == 0:
        raise NoSample("no numbers to measure a quantile from")
    # The quantile lies under the l-th smallest with probability P(Binomial(n, q) <= l - 1) at the most,
    # and over the u-th smallest with P(Binomial(n, q) >= u) at the most: each is kept to alpha / 2.
    lower = int(stats.binom.ppf(alpha / 2, n, q))
    while lower > 0 and stats.binom.cdf(lower - 1, n, q) > alpha / 2:
        lower -= 1
    upper = int(stats.binom.isf(alpha / 2, n, q)) + 1
    while upper <= n and stats.binom.sf(upper - 1, n, q) > alpha / 2:
        upper += 1
    # Less a hair, so that 0.95 * 20 is 19 although floating point says 19.000000000000004.
    middle = min(max(math.ceil(n * q - 1e-9), 1), n)
    return min(lower, middle), middle, max(upper, middle)


def _ratio(top: Measurement, bottom: Measurement) -> Measurement:
    """The range of top / bottom over the box of the two intervals; what is undecided is as wide as can be."""
    low = 0.0 if math.isinf(bottom.high) else _over(top.low, bottom.high, undefined=0.0)
    high = math.inf if math.isinf(top.high) else _over(top.high, bottom.low, undefined=math.inf)
    # Both fail too often to have the quantile, or both are zero: they are alike.
    value = _over(top.value, bottom.value, undefined=1.0)
    return Measurement(value=value, low=min(low, value), high=max(high, value), sample=min(top.sample, bottom.sample))


def _over(top: float, bottom: float, *, undefined: float) -> float:
    if top == bottom and (top == 0 or math.isinf(top)):
        return undefined
    return math.inf if bottom == 0 else top / bottom


def _draws(random: np.random.Generator, resamples: int, n: int) -> Floats:
    """How often each of `n` rows is drawn in each of `resamples` resamples: shape (resamples, n)."""
    rows = random.integers(0, n, (resamples, n)) + np.arange(resamples)[:, None] * n
    return np.bincount(rows.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)

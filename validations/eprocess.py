"""E-processes: evidence that may be looked at after every observation and keeps its declared error rate.

Pure, in natural logarithms. An e-process starts at 1, and while its null hypothesis is true its expectation
is at most 1 whenever one stops; so it ever reaches 1/alpha with probability alpha at most (Ville 1939). Every
engine runs two of them against one boundary: `bad` speaks against "no worse than the boundary", `good` against "no
better". Asked at a grid of boundaries they give an interval that holds at every moment at once: see `ends`.

State is a few floats for each boundary: additive, so that parts can be merged, and plain JSON (`state`, `restore`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaincc, betaln, xlog1py, xlogy
from scipy.stats import rankdata

Floats = NDArray[np.float64]

WORSE = np.array([1.05, 1.1, 1.2, 1.4, 2.0, 3.0, 5.0, 10.0, 30.0])
"""Odds ratios beyond the boundary that `TwoSample` bets on; and on the near side of it:"""
BETTER = np.array([0.95, 0.9, 0.8, 0.65, 0.5, 0.3, 0.1])
TILTS = np.array([0.5, 1.2, 3.0])
"""How boldly `Permutation` bets: the fewer, the less evidence the mixture costs (chosen in docs/gates.md)."""
BETS = 2.0 ** -np.arange(12)
"""Shares of the largest bet that cannot ruin `Betting`."""
LEANS = np.array([0.1, 0.2, 0.4, 0.6, 0.8, 0.95])
"""How boldly `paired_slices` bets."""
TINY = 1e-7


def mixed(logs: Floats) -> Floats:
    """The evidence of several bets that were given equal money: the mean over the last axis, in logarithms."""
    most = logs.max(axis=-1)
    mean: Floats = most + np.log(np.exp(logs - most[..., None]).mean(axis=-1))
    return mean


def bernoulli(k: ArrayLike, n: ArrayLike, m: ArrayLike) -> tuple[Floats, Floats]:
    """`k` events in `n` trials against the boundary `m` (0 < m < 1): (bad: against p <= m, good: against p >= m).

    Arrays broadcast. A mixture of likelihood ratios: over p ~ Beta(a, b), cut off at m (Robbins 1970), and at twice or
    half the odds of m, which is where most is at stake. Counts are all that it needs, so there is no state; trials must
    be independent given the past.
    """
    k, n, m = (np.asarray(a, dtype=np.float64) for a in (k, n, m))
    null = k * np.log(m) + (n - k) * np.log1p(-m)
    bad = _robbins(k, n, m, (1.0, 1 / (2 * m)), betaincc), 2 * m / (1 + m), 0.25
    good = _robbins(k, n, m, (0.75, 1 / m), betainc), m / (2 - m), 0.3
    one, two = (
        np.logaddexp(np.log1p(-weight) + wide, np.log(weight) + k * np.log(p) + (n - k) * np.log1p(-p)) - null
        for wide, p, weight in (bad, good)
    )
    return one, two


def _robbins(k: Floats, n: Floats, m: Floats, prior: tuple[Any, Any], share: Callable[..., Any]) -> Floats:
    """The logarithm of the mean likelihood over p ~ Beta(`prior`) on one side of m: `share` is that side's."""
    a, b = prior
    with np.errstate(divide="ignore"):
        mean: Floats = betaln(a + k, b + n - k) - betaln(a, b)
        mean += np.log(share(a + k, b + n - k, m)) - np.log(share(a, b, m))
    return mean


RATES: Floats = 1 / (1 + np.exp(-np.arange(-14.0, 14.01, 0.1)))
"""The boundaries at which rates are asked: 10 % apart in odds, from one in a million on."""


def bernoulli_interval(k: int, n: int, bad: float, good: float, at: tuple[float, ...] = ()) -> tuple[float, float]:
    """The interval for the rate of `k` events in `n` trials that holds at every moment at once.

    The rate lies below it with probability exp(-bad) at most, and above it with exp(-good). Rounded outward
    to `RATES`; a bound that it will be held against should be in `at`.
    """
    grid = np.union1d(RATES, [m for m in at if 0 < m < 1])
    return ends(grid, *bernoulli(k, n, grid), bad, good, 0.0, 1.0)


def ends(
    grid: Floats, log_bad: Floats, log_good: Floats, bad: float, good: float, least: float, most: float
) -> tuple[float, float]:
    """The interval of the boundaries on `grid` (ascending) that the evidence does not exclude.

    A boundary is excluded from below where `log_bad` and all of its lower neighbours reach `bad`, from above
    likewise: then the one boundary that matters, the first beyond the truth, is the only one that can err.
    """
    below = int(np.argmin(np.append(log_bad >= bad, False)))
    above = int(np.argmin(np.append(log_good[::-1] >= good, False)))
    # A boundary that is excluded is not itself in the interval: a bound there is broken, not touched.
    low = float(np.nextafter(grid[below - 1], np.inf)) if below else least
    high = float(np.nextafter(grid[grid.size - above], -np.inf)) if above else most
    return low, high


class Wealth:
    """The money of every bet, for each boundary, of the two gamblers: in logarithms, so that it adds up."""

    def __init__(self, boundaries: int, bad: int, good: int) -> None:
        self._bad, self._good = np.zeros((boundaries, bad)), np.zeros((boundaries, good))

    def logs(self) -> tuple[Floats, Floats]:
        """(bad, good): the evidence that the truth lies above each boundary, and that it lies below."""
        return mixed(self._bad), mixed(self._good)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"bad": self._bad.tolist(), "good": self._good.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from (or merge with) what `state` gave, for the same boundaries."""
        self._bad += np.asarray(state["bad"])
        self._good += np.asarray(state["good"])


class Betting(Wealth):
    """The mean of numbers in [0, 1] against boundaries `at` (each in (0, 1)): Waudby-Smith and Ramdas 2020,
    with a grid of constant bets, which is additive.

    A difference d in [-1, 1] is given as (d + 1) / 2, its boundary likewise. Numbers must have, given the past,
    the mean that the hypothesis speaks of: of sessions or users give one number each.
    """

    def __init__(self, at: ArrayLike) -> None:
        self.at = np.atleast_1d(np.asarray(at, dtype=np.float64))
        super().__init__(self.at.size, BETS.size, BETS.size)

    def add(self, numbers: ArrayLike) -> None:
        """Take numbers in [0, 1]; raises ValueError for others."""
        x = np.atleast_1d(np.asarray(numbers, dtype=np.float64))
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError("Betting takes numbers from 0 to 1")
        gap = x[None, None, :] - self.at[:, None, None]
        self._bad += np.log1p((0.95 / self.at[:, None] * BETS)[..., None] * gap).sum(axis=-1)
        self._good += np.log1p(-(0.95 / (1 - self.at[:, None]) * BETS)[..., None] * gap).sum(axis=-1)


def project(q0: Floats, q1: Floats, share: float | Floats, delta: ArrayLike) -> tuple[Floats, Floats]:
    """The point (p0, p1) of the line p1 = p0 + delta that is nearest to (q0, q1) in Kullback-Leibler divergence,
    the second weighed with `share`: bisection on the derivative, which grows.

    It halves the log odds of the place on the line: a rate of one in a million must be as exact, relatively, as
    one of a half, or bets far from what is expected would win too much.
    """
    delta = np.asarray(delta, dtype=np.float64)
    lowest0, lowest1, length = np.maximum(0, -delta), np.maximum(0, delta), 1 - np.abs(delta)

    def log_odds(p0: Floats) -> Floats:
        place = np.clip((p0 - lowest0) / length, TINY / 10, 1 - TINY / 10)
        odds: Floats = np.log(place / (1 - place))
        return odds

    one, two = log_odds(q0), log_odds(q1 - delta)
    low, high = np.minimum(one, two), np.maximum(one, two)
    for _ in range(30):
        middle = (low + high) / 2
        place = length / (1 + np.exp(-middle))
        p0, p1 = lowest0 + place, lowest1 + place
        slope = (1 - share) * (p0 - q0) / (p0 * (1 - p0)) + share * (p1 - q1) / (p1 * (1 - p1))
        up = slope > 0
        high, low = np.where(up, middle, high), np.where(up, low, middle)
    return p0, p1


def stakes(q0: ArrayLike, share: ArrayLike, delta: ArrayLike, odds: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """What `TwoSample` gains for one event or non-event of the challenger, and of the champion, bet by bet.

    `q0` (the champion's expected rate), `share` (of requests that the challenger got) and `delta` broadcast to a
    shape (...); the results have the shape (..., odds).
    """
    q0 = np.clip(np.asarray(q0, dtype=np.float64), TINY, 1 - TINY)
    share, delta = np.asarray(share, dtype=np.float64)[..., None], np.asarray(delta, dtype=np.float64)[..., None]
    q0 = q0[..., None]
    edge = np.clip(q0 + delta, TINY, 1 - TINY)
    odds1 = edge / (1 - edge) * odds
    q1 = odds1 / (1 + odds1)
    q0, q1 = np.broadcast_arrays(q0, q1)
    p0, p1 = project(q0, q1, share, delta)
    # Where the boundary lies outside (0, 1) nothing can be on its far side: no bet.
    void = (q0 + delta <= TINY) | (q0 + delta >= 1 - TINY)
    found = np.log(q1 / p1), np.log((1 - q1) / (1 - p1)), np.log(q0 / p0), np.log((1 - q0) / (1 - p0))
    one, two, three, four = (np.where(void, 0.0, gain) for gain in found)
    return one, two, three, four


class TwoSample(Wealth):
    """The challenger's rate of events against the champion's, boundaries p1 = p0 + delta: any shares, and rates that
    move while both move together.

    Each block of traffic bets on odds ratios at the share that was really observed (Turner, Ly and Gruenwald 2021:
    the reverse information projection on the boundary, exact for every block). Outcomes must be independent given the
    block; where a process has bursts of its own, use `Permutation`.

    `delta` has the shape (m,), or (1,) where `boundaries` differ in their counts alone. `rate` and `weight` say what is
    known of the champion's rate beforehand, in requests.
    """

    def __init__(self, delta: ArrayLike, rate: float, weight: float = 1000.0, *, boundaries: int = 1) -> None:
        self.delta = np.atleast_1d(np.asarray(delta, dtype=np.float64))
        super().__init__(max(self.delta.size, boundaries), WORSE.size, BETTER.size)
        self._k0, self._n0 = rate * weight, weight

    def add(self, n1: int, k1: ArrayLike, n0: int, k0: int) -> None:
        """Take a block: `n1` requests at the challenger, `k1` of them events, `n0` and `k0` at the champion.

        `k1` may differ by boundary (shape (m,)): thresholds that move with it. A block in which one of the two saw
        nothing says nothing.
        """
        if n1 and n0:
            q0, share = self._k0 / self._n0, n1 / (n0 + n1)
            k = np.atleast_1d(np.asarray(k1, dtype=np.float64))[:, None]
            for logs, odds in ((self._bad, WORSE), (self._good, BETTER)):
                yes1, no1, yes0, no0 = stakes(q0, share, self.delta, odds)
                np.add(logs, k * yes1 + (n1 - k) * no1 + k0 * yes0 + (n0 - k0) * no0, out=logs)
        self._k0 += k0
        self._n0 += n0

    def state(self) -> dict[str, Any]:
        """As JSON, with what is known of the champion's rate."""
        return {**super().state(), "champion": [self._k0, self._n0]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, for the same boundaries."""
        super().restore(state)
        self._k0, self._n0 = state["champion"]


class Permutation(Wealth):
    """The challenger's units (replicas, buckets of users) against the champion's, block by block: for traffic with
    bursts, drift, and anything else that makes requests of one unit depend on each other.

    A block's evidence is the challenger's exponential score over its mean over all relabellings of the units
    (Koning 2023), so it is exact while the units are exchangeable. `m` boundaries are bet on at once.
    """

    def __init__(self, m: int = 1) -> None:
        super().__init__(m, TILTS.size, TILTS.size)

    def add(self, statistics: ArrayLike, challengers: int, good: ArrayLike | None = None) -> None:
        """Take a block: `statistics` (m, units), larger is worse, the first `challengers` units the challenger's and
        every unit's from equally many requests (`thinned`). `good`: those of the good side, where they differ.

        (draws, m, units): the same block thinned several times. The mean of their evidence, which is what counts, is
        as exact as one's, and less is lost to chance.
        """
        worse = np.atleast_2d(np.asarray(statistics, dtype=np.float64))
        better = worse if good is None else np.atleast_2d(np.asarray(good, dtype=np.float64))
        if not 0 < challengers < worse.shape[-1]:
            return
        self._bad += _tilted(worse, challengers, TILTS)
        self._good += _tilted(better, challengers, -TILTS)


def _tilted(statistics: Floats, challengers: int, tilts: Floats) -> Floats:
    """The logarithm of e of one block: (m, units) or (draws, m, units) -> (m, tilts)."""
    units = statistics.shape[-1]
    # Bounded scores: one freak block can neither ruin nor decide.
    score = 2 * (rankdata(statistics, axis=-1) - 0.5) / units - 1
    weight = np.exp(tilts[:, None] * score[..., None, :])
    # The elementary symmetric polynomial: the sum over all choices of `challengers` units.
    chosen = np.zeros((*weight.shape[:-1], challengers + 1))
    chosen[..., 0] = 1.0
    for unit in range(units):
        chosen[..., 1:] += chosen[..., :-1] * weight[..., unit, None]
    ways = -np.log(units + 1.0) - betaln(units - challengers + 1, challengers + 1)
    own = tilts * score[..., :challengers].sum(axis=-1, keepdims=True)
    evidence: Floats = own - (np.log(chosen[..., -1]) - ways)
    return mixed(np.moveaxis(evidence, 0, -1)) if evidence.ndim == 3 else evidence


def thinned(
    random: np.random.Generator, n: ArrayLike, k: ArrayLike, size: ArrayLike, extra: float | Floats = 0.0
) -> NDArray[np.int64]:
    """How many of `size` requests, drawn from the `n` of a unit's block, are among its `k` events. Arrays broadcast.

    Drawn from the whole block: the first ones would all be from its beginning. With the probability `extra` what is
    no event counts as one: a champion that much worse.
    """
    events = np.asarray(k, dtype=np.int64)
    others = np.asarray(n, dtype=np.int64) - events
    size = np.asarray(size, dtype=np.int64)
    drawn = np.asarray(random.hypergeometric(events, others, size), dtype=np.int64)
    return np.asarray(drawn + random.binomial(size - drawn, extra), dtype=np.int64)


def paired_slices(differences: ArrayLike, at: ArrayLike) -> tuple[Floats, Floats]:
    """Differences of one number between challenger and champion, one for each slice of time that both shared (log of a
    ratio of quantiles), against boundaries `at`: (bad: against "at most", good: against "at least").

    Exact while, at the boundary, either sign is as likely, whatever the scale: the scale is the median of the
    earlier slices. A slice's difference may be infinite (one of the two answered nothing).
    """
    boundaries = np.atleast_1d(np.asarray(at, dtype=np.float64))
    bad, good = leaned(np.atleast_1d(np.asarray(differences, dtype=np.float64)) - boundaries[:, None])
    return mixed(bad.sum(axis=-2)), mixed(good.sum(axis=-2))


def leaned(gaps: Floats) -> tuple[Floats, Floats]:
    """What each slice adds to `paired_slices`: gaps to the boundary (m, slices) -> (bad, good), (m, slices, leans)."""
    scale = np.full(gaps.shape, 0.1)
    for slice_ in range(1, gaps.shape[1]):
        scale[:, slice_] = np.median(np.abs(gaps[:, :slice_]), axis=1)
    scale = np.where(np.isfinite(scale), np.maximum(scale, 1e-12), 1.0)
    lean = LEANS * np.tanh(gaps / scale)[..., None]
    return np.log1p(lean), np.log1p(-lean)


def before_and_after(k1: ArrayLike, n1: int, k0: int, n0: int, delta: ArrayLike) -> tuple[Floats, Floats]:
    """As `TwoSample`, where the champion's `k0` of `n0` were counted before the challenger's began: universal inference
    (Wasserman, Ramdas and Balakrishnan 2020), Beta mixtures over the best fit under the hypothesis. `k1` and `delta`
    broadcast to (m,).

    A rate that moved between the two looks like a difference between them: compare at the same time where you can.
    """
    k1, delta = np.broadcast_arrays(
        np.atleast_1d(np.asarray(k1, dtype=np.float64)), np.atleast_1d(np.asarray(delta, dtype=np.float64))
    )
    mixture = betaln(0.5 + k1, 0.5 + n1 - k1) + betaln(0.5 + k0, 0.5 + n0 - k0) - 2 * betaln(0.5, 0.5)
    q0, q1 = np.full(k1.shape, k0 / n0), k1 / n1
    p0, p1 = project(np.clip(q0, TINY, 1 - TINY), np.clip(q1, TINY, 1 - TINY), n1 / (n0 + n1), delta)

    def fit(a: Floats, b: Floats) -> Floats:
        total: Floats = xlogy(k0, a) + xlog1py(n0 - k0, -a) + xlogy(k1, b) + xlog1py(n1 - k1, -b)
        return total

    free, bound = fit(q0, q1), fit(p0, p1)
    worse = q1 > q0 + delta
    return mixture - np.where(worse, bound, free), mixture - np.where(worse, free, bound)

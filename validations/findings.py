"""Each check's own way from counted requests to a value, an interval and the evidence at its bound.

Pure. Every interval holds at all moments at once (`validations.eprocess`).
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from validations.eprocess import (
    Floats,
    Permutation,
    TwoSample,
    before_and_after,
    bernoulli,
    bernoulli_interval,
    ends,
    paired_slices,
    thinned,
)
from validations.series import Arm, Block, Head, Total
from validations.slices import evidence as evidence_of_slices
from validations.slices import worst
from validations.statistics import interpolated
from validations.verdict import Bound

DELTAS = np.array([0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9])


RATIOS: Floats = np.geomspace(1 / 8, 8, 49)
"""Where differences of rates (either sign) and ratios of latencies are asked, beside at the bound itself."""


HALVING = 10_000.0
"""Requests after which the champion's older latencies count half in its running quantile."""


WARM = 100.0
"""Requests of the champion that a running quantile needs."""
DRAWS = 4
"""How often a block is thinned: the mean of the evidence hangs less on chance."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One metric at one moment: value, interval, and the evidence (logarithms) that its bound is broken, and kept."""

    value: float
    low: float
    high: float
    sample: int
    broken: float
    kept: float
    where: str = ""
    note: str = ""


class Way(Protocol):
    """One check's way from blocks to a finding."""

    def add(self, block: Block, number: int) -> None:
        """Take the `number`th whole block, where blocks are compared one by one."""

    def find(self, total: Total, below: float, above: float) -> Finding | None:
        """What is known with all that was counted; None where there is nothing to measure. The interval's ends exclude
        what is beyond them with the evidence `below` and `above` (logarithms).
        """


class _Rate:
    """A rate against an absolute bound: counts are all there is to know."""

    def __init__(self, metric: str, bound: Bound) -> None:
        self._metric = metric
        self._bounds = tuple(b for b in (bound.min, bound.max) if b is not None)
        self._bound = bound

    def add(self, block: Block, number: int) -> None:
        pass

    def find(self, total: Total, below: float, above: float) -> Finding | None:
        if self._metric == "disagreement":
            k, n = total.disagreements, total.pairs
        else:
            k, n = total.challenger.errors, total.challenger.requests
        if not n:
            return None
        low, high = bernoulli_interval(k, n, below, above, self._bounds)

        def at(boundary: float) -> tuple[float, float]:
            bad, good = bernoulli(k, n, min(max(boundary, 1e-6), 1 - 1e-6))
            return float(bad), float(good)

        return Finding(k / n, low, high, n, *evidence(self._bound, at))


class _WorstSlice:
    """The disagreement of the worst slice of the pairs."""

    def __init__(self, bound: Bound) -> None:
        self._bound = bound

    def add(self, block: Block, number: int) -> None:
        pass

    def find(self, total: Total, below: float, above: float) -> Finding | None:
        if not total.pairs:
            return None
        if not total.slices:
            value = total.disagreements / total.pairs
            return Finding(value, 0.0, 1.0, total.pairs, 0.0, 0.0, note="no slice is large enough yet")
        at = 1.0 if self._bound.max is None else self._bound.max
        m = worst(total.slices, math.exp(-below), math.exp(-above), pairs=total.pairs, at=(at,))
        proven = [one for one in total.slices if one.proven] or total.slices
        boundary = min(max(at, 1e-6), 1 - 1e-6)
        kept = float(bernoulli([one.k for one in proven], [one.n for one in proven], boundary)[1].min())
        broken = evidence_of_slices(total.slices, at)
        return Finding(m.value, m.low, m.high, m.sample, broken, kept, m.where, m.note)


class _Latency:
    """A quantile against an absolute bound: the share of requests beyond each edge is a rate."""

    def __init__(self, percent: int, bound: Bound) -> None:
        self._percent, self._q, self._bound = percent, percent / 100, bound

    def add(self, block: Block, number: int) -> None:
        pass

    def find(self, total: Total, below: float, above: float) -> Finding | None:
        arm, edges = total.challenger, total.edges
        if not arm.timed:
            return None
        beyond = arm.beyond(edges.size)
        bad, good = bernoulli(beyond, arm.timed, 1 - self._q)
        low, high = ends(edges, bad, good, below, above, 0.0, math.inf)
        value = interpolated(edges, arm.timed - beyond, arm.timed, self._q)

        def at(boundary: float) -> tuple[float, float]:
            # Rounded to the edge that makes each claim the harder one.
            up = int(np.searchsorted(edges, boundary / 1000))
            down = int(np.searchsorted(edges, boundary / 1000, side="right")) - 1
            return float(bad[up]) if up < edges.size else -math.inf, float(good[down]) if down >= 0 else -math.inf

        return Finding(value * 1000, low * 1000, high * 1000, arm.timed, *evidence(self._bound, at))


class _Delta:
    """The difference of two error rates."""

    def __init__(self, bound: Bound, head: Head) -> None:
        bounds = [b for b in (bound.min, bound.max) if b is not None]
        self._grid = np.unique(np.concatenate([-DELTAS, DELTAS, bounds]))
        self._bound, self._head = bound, head
        n = min(float(head.history.requests), 1000.0)
        rate = head.history.errors / head.history.requests if head.history.requests else 0.0
        self._two = TwoSample(self._grid, (rate * n + 0.05) / (n + 50), n + 50)
        self._units = Permutation(self._grid.size)
        self._seen = 0

    def add(self, block: Block, number: int) -> None:
        one, two = sum(block.challenger, Arm()), sum(block.champion, Arm())
        if not (one.requests and two.requests):
            return
        self._seen += min(one.requests, two.requests)
        if self._head.relation != "bursty":
            self._two.add(one.requests, one.errors, two.requests, two.errors)
            return
        size = min(arm.requests for arm in (*block.challenger, *block.champion))
        random = _random("error_rate_delta", number)
        draws = (DRAWS, self._grid.size)
        units = [
            thinned(random, arm.requests, np.full(draws, arm.errors), size, np.maximum(sign * self._grid, 0))
            for sign, arms in ((-1, block.challenger), (1, block.champion))
            for arm in arms
        ]
        self._units.add(np.stack(units, axis=-1), len(block.challenger))

    def find(self, total: Total, below: float, above: float) -> Finding | None:
        one, two = total.challenger, self._head.reference or total.champion
        if not (one.requests and two.requests):
            return None
        if self._head.reference is not None:
            bad, good = before_and_after(one.errors, one.requests, two.errors, two.requests, self._grid)
            sample = min(one.requests, two.requests)
        else:
            bad, good = (self._units if self._head.relation == "bursty" else self._two).logs()
            sample = self._seen
        low, high = ends(self._grid, bad, good, below, above, -1.0, 1.0)
        value = one.errors / one.requests - two.errors / two.requests
        return Finding(value, low, high, sample, *evidence(self._bound, _on(self._grid, bad, good)))


class _Ratio:
    """The ratio of two quantiles: exceedances of the champion's running quantile, times the ratio asked."""

    def __init__(self, percent: int, bound: Bound, head: Head) -> None:
        bounds = [b for b in (bound.min, bound.max) if b is not None and b > 0]
        self._grid = np.unique(np.concatenate([RATIOS, bounds]))
        self._percent, self._q, self._bound, self._head = percent, percent / 100, bound, head
        self._edges = np.asarray(head.edges, dtype=np.float64)
        self._worse, self._better = (TwoSample(0.0, 1 - self._q, 50.0, boundaries=self._grid.size) for _ in range(2))
        self._units = Permutation(self._grid.size)
        self._running = np.zeros(self._edges.size + 1)
        self._learn(head.history)
        self._pairs: list[float] = []
        self._seen = 0

    def _learn(self, arm: Arm) -> None:
        if arm.timed:
            self._running *= 0.5 ** (arm.timed / HALVING)
            # A long history is worth no more than it would be by now.
            self._running += _counts(arm.beyond(self._edges.size), arm) * min(1.0, HALVING / arm.timed)

    def add(self, block: Block, number: int) -> None:
        one, two = sum(block.challenger, Arm()), sum(block.champion, Arm())
        if self._head.relation == "paired":
            self._pair(block)
        elif one.timed and two.timed and self._running.sum() >= WARM:
            edges = _quantile_edges(self._running, self._q)
            if edges is not None:
                self._seen += min(one.timed, two.timed)
                if self._head.relation == "bursty":
                    self._permute(block, edges, number)
                else:
                    for sample, (k1, k0) in zip(
                        (self._worse, self._better), self._events(one, two, edges), strict=True
                    ):
                        sample.add(one.timed, k1, two.timed, k0)
        self._learn(two)

    def _events(self, one: Arm, two: Arm, edges: tuple[int, int]) -> tuple[tuple[Floats, int], tuple[Floats, int]]:
        """Exceedances, for each ratio of the challenger's, to break a bound and to keep one.

        An edge that lies beyond the ratio breaks it, one within keeps it: rounded so that each claim is the harder one.
        """
        k1, k0 = one.beyond(self._edges.size), two.beyond(self._edges.size)
        upper, lower = edges
        last = self._edges.size - 1
        # The ratio of an edge to itself is 1 in spite of rounding.
        up = np.searchsorted(self._edges, self._grid * self._edges[upper] * (1 - 1e-12))
        down = np.searchsorted(self._edges, self._grid * self._edges[lower] * (1 + 1e-12), side="right") - 1
        worse = np.where(up <= last, k1[np.minimum(up, last)], 0.0)
        better = np.where(down >= 0, k1[np.maximum(down, 0)], one.timed)
        return (worse, int(k0[upper])), (better, int(k0[lower]))

    def _permute(self, block: Block, edges: tuple[int, int], number: int) -> None:
        size = min(arm.timed for arm in (*block.challenger, *block.champion))
        random = _random(f"p{self._percent}_ratio", number)
        draws = (DRAWS, self._grid.size)
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for arm in block.challenger:
            for side, (k1, _) in zip(sides, self._events(arm, Arm(), edges), strict=True):
                side.append(thinned(random, arm.timed, np.broadcast_to(k1, draws), size))
        for arm in block.champion:
            for side, (_, k0) in zip(sides, self._events(Arm(), arm, edges), strict=True):
                side.append(thinned(random, arm.timed, np.full(draws, k0), size))
        worse, better = (np.stack(side, axis=-1) for side in sides)
        self._units.add(worse, len(block.challenger), better)

    def _pair(self, block: Block) -> None:
        for one, two in zip(block.challenger, block.champion, strict=False):
            a, b = one.quantiles.get(self._percent), two.quantiles.get(self._percent)
            if a is not None and b is not None:
                self._seen += min(one.timed, two.timed)
                both = math.isinf(a) and math.isinf(b)
                self._pairs.append(
                    0.0 if both else math.log(max(a, 1e-9) / max(b, 1e-9)) if b < math.inf else -math.inf
                )

    def find(self, total: Total, below: float, above: float) -> Finding | None:
        one, two = total.challenger, self._head.reference or total.champion
        if not (one.timed and two.timed):
            return None
        if self._head.reference is not None:
            bad, good = self._against_reference(one, two)
            sample = min(one.timed, two.timed)
        elif self._head.relation == "paired":
            bad, good = paired_slices(self._pairs, np.log(self._grid))
            sample = self._seen
        elif self._head.relation == "bursty":
            (bad, good), sample = self._units.logs(), self._seen
        else:
            bad, good, sample = self._worse.logs()[0], self._better.logs()[1], self._seen
        low, high = ends(self._grid, bad, good, below, above, 0.0, math.inf)
        quantiles = [
            interpolated(self._edges, arm.timed - arm.beyond(self._edges.size), arm.timed, self._q)
            for arm in (one, two)
        ]
        value = quantiles[0] / quantiles[1] if 0 < quantiles[1] < math.inf else 1.0
        return Finding(value, low, high, sample, *evidence(self._bound, _on(self._grid, bad, good)))

    def _against_reference(self, one: Arm, two: Arm) -> tuple[Floats, Floats]:
        edges = _quantile_edges(_counts(two.beyond(self._edges.size), two), self._q)
        if edges is None:
            return np.zeros(self._grid.size), np.zeros(self._grid.size)
        (worse, k0), (better, k0_good) = self._events(one, two, edges)
        bad, _ = before_and_after(worse, one.timed, k0, two.timed, 0.0)
        _, good = before_and_after(better, one.timed, k0_good, two.timed, 0.0)
        return bad, good


def _counts(beyond: Floats, arm: Arm) -> Floats:
    """The requests in each bucket, those without an answer beyond all."""
    counts: Floats = -np.diff(beyond, prepend=arm.timed, append=0.0)
    return counts


def _quantile_edges(counts: Floats, q: float) -> tuple[int, int] | None:
    """The edges that stand for a quantile, to find more beyond it and to find less: the upper one of its bucket; to
    find less, the lower one where next to nothing lies beyond the upper (latencies that are all alike).
    """
    below, total = np.cumsum(counts), counts.sum()
    at = int(np.searchsorted(below, q * total))
    if at >= counts.size - 1:
        return None
    alike = at and total - below[at] < total * (1 - q) / 3
    return at, at - 1 if alike else at


def way_of(metric: str, bound: Bound, head: Head) -> Way:
    """The way of the check that is called `metric`."""
    if metric == "slice_disagreement":
        return _WorstSlice(bound)
    if metric == "error_rate_delta":
        return _Delta(bound, head)
    if metric[0] == "p" and metric.endswith("_ratio"):
        return _Ratio(int(metric[1:].removesuffix("_ratio")), bound, head)
    if metric[0] == "p" and metric.endswith("_ms"):
        return _Latency(int(metric[1:].removesuffix("_ms")), bound)
    return _Rate(metric, bound)


def evidence(bound: Bound, at: Callable[[float], tuple[float, float]]) -> tuple[float, float]:
    """(broken, kept): the evidence that `bound` is broken and that it is kept, in logarithms.

    `at(boundary)` gives the evidence that the truth lies above, and that it lies below. With two limits half of the
    money is on either being broken, and both must be kept.
    """
    if bound.max is None:
        above, below = at(-math.inf if bound.min is None else bound.min)
        return below, above
    above, below = at(bound.max)
    if bound.min is None:
        return above, below
    over, under = at(bound.min)
    return float(np.logaddexp(above, under)) - math.log(2), min(below, over)


def _on(grid: Floats, bad: Floats, good: Floats) -> Callable[[float], tuple[float, float]]:
    def at(boundary: float) -> tuple[float, float]:
        index = int(np.searchsorted(grid, boundary))
        return float(bad[index]), float(good[index])

    return at


def _random(metric: str, number: int) -> np.random.Generator:
    """The same draws for the same block, wherever it is judged."""
    return np.random.default_rng([zlib.crc32(metric.encode()), number])

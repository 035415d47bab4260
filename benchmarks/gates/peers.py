"""The decision rules of Flagger, Argo Rollouts and Kayenta, on what they would have seen of the same traffic.

The rules, not the products: Flagger counts failed checks of the last minute (`scheduler.go`), Argo failed measurements
(`analysis.go`), Kayenta asks a Mann-Whitney interval with 98 % and a tolerance of 0.25 of the Hodges-Lehmann estimate
(`NetflixACAJudge.scala`) about points of one minute, beside a baseline of as many replicas. Each returns the minute in
which it rolls back, or -1.
"""

import numpy as np
from numpy.typing import NDArray

from benchmarks.gates.world import MINUTES, PODS, STEP, Traffic

Floats = NDArray[np.float64]

EDGES = np.array([0.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0])
"""Istio's buckets (ms), which Flagger reads p99 from."""
NORMAL_98 = 2.3263479


def first(hit: NDArray[np.bool_]) -> int:
    """The index of the first True, -1 without one."""
    return int(np.argmax(hit)) if hit.any() else -1


class Minutes:
    """What is known of each minute: p50, p99 and error rate of challenger, its baseline and the whole champion."""

    def __init__(self, traffic: Traffic) -> None:
        minute = traffic.second // 60
        pods = PODS[STEP[traffic.second]]
        groups = {
            "challenger": traffic.challenger,
            "baseline": ~traffic.challenger & (traffic.unit < 2 * pods),
            "champion": ~traffic.challenger,
        }
        self.p50, self.p99 = ({group: np.zeros(MINUTES) for group in groups} for _ in range(2))
        self.errors: dict[str, dict[str, Floats]] = {name: {} for name in traffic.errors}
        self.bucketed = np.zeros(MINUTES)
        for group, which in groups.items():
            own, when = np.exp(traffic.latency[which].astype(float)), minute[which]
            ends = np.searchsorted(when, np.arange(MINUTES + 1))
            for m in range(MINUTES):
                values = own[ends[m] : ends[m + 1]]
                self.p50[group][m], self.p99[group][m] = np.quantile(values, [0.5, 0.99])
                if group == "challenger":
                    self.bucketed[m] = _from_buckets(values)
            for name, failed in traffic.errors.items():
                self.errors[name][group] = np.bincount(when[failed[which]], minlength=MINUTES) / np.diff(ends)
        self.requests = np.cumsum(np.bincount(minute[traffic.challenger], minlength=MINUTES))


def _from_buckets(values: Floats) -> float:
    """As Prometheus' histogram_quantile(0.99)."""
    total = np.cumsum(np.histogram(values, EDGES)[0])
    at = int(np.searchsorted(total, 0.99 * values.size))
    if at >= total.size:
        return float(EDGES[-1])
    before = total[at - 1] if at else 0
    share = (0.99 * values.size - before) / (total[at] - before)
    return float(EDGES[at] + (EDGES[at + 1] - EDGES[at]) * share)


def flagger(seen: Minutes, errors: str, threshold: int) -> int:
    """Success rate at least 99 % and p99 at most 500 ms, each minute; `threshold` failed checks in all roll back."""
    return first(np.cumsum((seen.errors[errors]["challenger"] > 0.01) | (seen.bucketed > 500)) >= threshold)


def argo_absolute(seen: Minutes, errors: str, limit: int = 3) -> int:
    """Errors at most 5 % and p99 at most 500 ms; more than `limit` failed measurements roll back."""
    bad = (seen.errors[errors]["challenger"] > 0.05) | (seen.p99["challenger"] > 500)
    return first(np.cumsum(bad) > limit)


def argo_relative(seen: Minutes, errors: str, limit: int = 3) -> int:
    """Errors at most 0.1 points, p99 at most 10 %, p50 at most 5 % above the champion's: a rule that people write."""
    bad = seen.errors[errors]["challenger"] > seen.errors[errors]["champion"] + 0.001
    bad |= seen.p99["challenger"] > 1.10 * seen.p99["champion"]
    bad |= seen.p50["challenger"] > 1.05 * seen.p50["champion"]
    return first(np.cumsum(bad) > limit)


def kayenta(seen: Minutes) -> dict[str, NDArray[np.bool_]]:
    """For each metric (p50, p99, and errors by their world): is it High, judged after each minute from the tenth on?"""
    pairs = {"p50": seen.p50, "p99": seen.p99} | seen.errors
    return {name: _high(pair["challenger"], pair["baseline"]) for name, pair in pairs.items()}


def _high(one: Floats, two: Floats) -> NDArray[np.bool_]:
    found = np.zeros(one.size, dtype=bool)
    for m in range(10, one.size + 1):
        found[m - 1] = is_high(one[:m], two[:m])
    return found


def is_high(one: Floats, two: Floats) -> bool:
    """Kayenta's answer for two series of points: the challenger's and the baseline's."""
    m = one.size
    if not (one.any() or two.any()) or one.mean() < two.mean():
        return False
    low = max(0, int(m * m / 2 - NORMAL_98 * np.sqrt(m * m * (2 * m + 1) / 12) - 0.5))
    middle = m * m // 2
    shifts = np.partition(np.subtract.outer(one, two).ravel(), [low, middle - 1, middle])
    estimate = shifts[middle] if m % 2 else (shifts[middle - 1] + shifts[middle]) / 2
    return bool(shifts[low] > 0.25 * abs(estimate))


def kayenta_minute(high: dict[str, NDArray[np.bool_]], errors: str, looks: slice) -> int:
    """The first of `looks` (minutes) at which a metric is High."""
    bad = high["p50"] | high["p99"] | high[errors]
    asked = np.zeros(bad.size, dtype=bool)
    asked[looks] = True
    return first(bad & asked)

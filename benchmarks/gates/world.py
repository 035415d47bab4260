"""Synthetic traffic: a ramp of a challenger from 1 % to 50 % at 100 requests a second over 20 replicas.

64 minutes, about 384,000 requests, 100,000 of them the challenger's. Every request is routed by chance with its step's
share, and within its version to a replica. Latency is lognormal: median 100 ms, p99 404 ms. On top of that:

- `L0` nothing: independent requests;
- `L1` noise that all share: a level that wanders (AR(1), 15 %, 60 s) and bursts (x2, 3 s long, every minute);
- `L2` noise of each replica: wandering (10 %, 10 s) and bursts (x3, 1 s, every two minutes);
- `L3` as L2, and every replica is for ever a bit slower or faster (5 %).

Errors: `E0` 0.1 %, independent; `E1` shared incidents (3 % for 20 s every 10 minutes); `E2` 0.1 % that drifts to 0.5 %
during the ramp, for both versions; `E3` incidents of one replica (20 % for 5 s, each every 33 minutes) on 0.05 %.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SECONDS = np.array([1020, 600, 600, 1620])
SHARES = np.array([0.01, 0.05, 0.25, 0.5])
PODS = np.array([1, 1, 5, 10])
RATE = 100
UNITS = 20
BLOCK = 30
TOTAL = int(SECONDS.sum())
BLOCKS, MINUTES = TOTAL // BLOCK, TOTAL // 60
STEP = np.repeat(np.arange(4), SECONDS)
"""The step of the ramp that each second belongs to."""
CHALLENGERS = PODS[STEP[::BLOCK]]
"""The challenger's replicas in each block: the first ones."""
MEDIAN, SIGMA = np.log(100.0), 0.6
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
MARGINS = {"p50": 0.05, "p95": 0.10, "p99": 0.10}
ERROR_RATE, ERROR_MARGIN = 0.001, 0.001
BINS, BIN, DECAY = 1400, 0.01, 0.9
"""The champion's histogram behind the thresholds: 1 % wide from 1 ms on, forgetting 10 % with each block."""


@dataclass(frozen=True)
class Traffic:
    """One run. Requests are in order of time; `latency` is its logarithm (ms)."""

    second: Ints
    unit: Ints
    challenger: NDArray[np.bool_]
    latency: NDArray[np.float32]
    errors: dict[str, NDArray[np.bool_]]

    @property
    def cell(self) -> Ints:
        """Block and unit in one number."""
        return (self.second // BLOCK) * UNITS + self.unit

    def count(self, which: NDArray[np.bool_] | slice) -> Ints:
        """How many of `which` requests each unit of each block has: (blocks, units)."""
        return np.bincount(self.cell[which], minlength=BLOCKS * UNITS).reshape(BLOCKS, UNITS)


def ramp(
    random: np.random.Generator,
    latency: str,
    errors: tuple[str, ...],
    shift: float = 0.0,
    spread: float = 1.0,
    factor: float = 1.0,
) -> Traffic:
    """One run in the world `latency` with errors of each of the worlds `errors`.

    The challenger's log latency is `shift` higher and has `spread` times the standard deviation; its errors are
    `factor` times as many.
    """
    second = np.repeat(np.arange(TOTAL), random.poisson(RATE, TOTAL))
    n = second.size
    step = STEP[second]
    challenger = random.random(n) < SHARES[step]
    pods = PODS[step]
    unit = (random.random(n) * np.where(challenger, pods, UNITS - pods)).astype(np.int64) + np.where(
        challenger, 0, pods
    )
    # One level for each second and unit.
    level = np.zeros((TOTAL, UNITS))
    if latency == "L1":
        level += (_wandering(random, 1, 0.15, 60) + 0.7 * _bursts(random, 1, 60, 3.0)).astype(float)
    elif latency in {"L2", "L3"}:
        level += _wandering(random, UNITS, 0.10, 10) + 1.1 * _bursts(random, UNITS, 120, 1.0)
        level += 0.05 * random.standard_normal(UNITS) if latency == "L3" else 0.0
    at = second * UNITS + unit
    log = random.standard_normal(n, dtype=np.float32) * np.where(challenger, SIGMA * spread, SIGMA)
    log += MEDIAN + np.where(challenger, shift, 0.0) + level.ravel()[at]
    luck = random.random(n)
    times = np.where(challenger, factor, 1.0)
    failed = {name: luck < _error_rate(random, name).ravel()[at] * times for name in errors}
    return Traffic(second, unit, challenger, log.astype(np.float32), failed)


def _wandering(random: np.random.Generator, units: int, deviation: float, seconds: float) -> Floats:
    keep = np.exp(-1 / seconds)
    noise = deviation * np.sqrt(1 - keep**2) * random.standard_normal((TOTAL, units))
    noise[0] /= np.sqrt(1 - keep**2)
    wandered: Floats = lfilter([1.0], [1.0, -keep], noise, axis=0)
    return wandered


def _bursts(random: np.random.Generator, units: int, every: float, mean: float) -> Floats:
    lengths = 1 + random.exponential(mean, (200, units)).astype(np.int64)
    return _incidents(random, units, every, lengths)


def _incidents(random: np.random.Generator, units: int, every: float, lengths: Ints) -> Floats:
    """1.0 in the seconds of an incident; the next one begins `every` seconds after the end of the last, on average."""
    ends = np.cumsum(random.geometric(1 / every, lengths.shape) + lengths, axis=0)
    edges = np.zeros((TOTAL + 1, units))
    unit = np.broadcast_to(np.arange(units), lengths.shape)
    np.add.at(edges, (np.minimum(ends - lengths, TOTAL), unit), 1)
    np.add.at(edges, (np.minimum(ends, TOTAL), unit), -1)
    return np.cumsum(edges, axis=0)[:TOTAL]


def _error_rate(random: np.random.Generator, errors: str) -> Floats:
    rate = np.full((TOTAL, UNITS), ERROR_RATE)
    if errors == "E1":
        rate = np.where(_incidents(random, 1, 600, np.full((200, 1), 20)) > 0, 0.03, rate)
    elif errors == "E2":
        rate += 0.004 * np.arange(TOTAL)[:, None] / TOTAL
    elif errors == "E3":
        rate = np.where(_incidents(random, UNITS, 2000, np.full((200, UNITS), 5)) > 0, 0.2, 0.0005)
    return rate


def thresholds(random: np.random.Generator, traffic: Traffic) -> Floats:
    """The champion's quantiles before each block, from its earlier requests: (blocks, quantiles)."""
    bins = np.clip(traffic.latency / BIN, 0, BINS - 1).astype(np.int64)
    champion = ~traffic.challenger
    flat = (traffic.second[champion] // BLOCK) * BINS + bins[champion]
    seen = np.bincount(flat, minlength=BLOCKS * BINS).reshape(BLOCKS, BINS)
    warm = np.clip((MEDIAN + SIGMA * random.standard_normal(10_000)) / BIN, 0, BINS - 1).astype(np.int64)
    known = np.bincount(warm, minlength=BINS).astype(float)
    found = np.empty((BLOCKS, len(QUANTILES)))
    for block in range(BLOCKS):
        total = np.cumsum(known)
        found[block] = (np.searchsorted(total, np.array([*QUANTILES.values()]) * total[-1]) + 1) * BIN
        known = DECAY * known + seen[block]
    return found


def events(
    random: np.random.Generator, traffic: Traffic, margins: tuple[dict[str, float], ...]
) -> tuple[Ints, list[dict[str, Ints]]]:
    """Requests of each unit and block (blocks, units), and for each of `margins` how many of them were slow or failed,
    by metric: slow is the challenger's beyond (1 + margin) of the champion's quantile, the champion's beyond it.
    """
    limits = thresholds(random, traffic)[traffic.second // BLOCK]
    found = []
    for margin in margins:
        slow = {}
        for column, metric in enumerate(QUANTILES):
            limit = limits[:, column] + np.log1p(margin[metric]) * traffic.challenger
            slow[metric] = traffic.count(traffic.latency > limit)
        found.append(slow | {name: traffic.count(failed) for name, failed in traffic.errors.items()})
    return traffic.count(slice(None)), found

"""Titleshot's engines and the peers' rules on many runs of the ramp at once."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.gates import peers, world
from validations.eprocess import BETTER, WORSE, Permutation, mixed, stakes, thinned

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LATENCIES = tuple(world.QUANTILES)
MARGINS = {"default": world.MARGINS, "zero": dict.fromkeys(world.QUANTILES, 0.0)}
"""The usual margins, and those of the worst case: no worse at all."""
BATCH = 50
DRAWS = 4
"""How often `Permutation` thins each block."""


@dataclass
class Runs:
    """What happened in many runs: requests of the challenger after each block, evidence paths, the peers' ends.

    `logs[engine, margin, metric]` is (bad, good), each (runs, blocks); `ends[rule, errors]` challenger requests.
    """

    requests: Floats
    logs: dict[tuple[str, str, str], tuple[Floats, Floats]]
    ends: dict[tuple[str, str], Floats] = field(default_factory=dict)

    def needed(self, path: Floats, level: float) -> Floats:
        """The challenger's requests when `path` first reached `level`, infinite where it never did."""
        hit = path >= level
        found = np.take_along_axis(self.requests, hit.argmax(axis=1)[:, None], axis=1)[:, 0]
        return np.where(hit.any(axis=1), found, np.inf)

    def single(self, engine: str, margin: str, metric: str, level: float = np.log(20)) -> tuple[Floats, Floats]:
        """Requests until one metric alone (rolls back, passes)."""
        bad, good = self.logs[engine, margin, metric]
        return self.needed(bad, level), self.needed(good, level)

    def ledger(self, engine: str, margin: str, errors: str, level: float = np.log(20)) -> tuple[Floats, Floats]:
        """Requests until the ledger of four metrics (rolls back, promotes before that)."""
        metrics = [self.logs[engine, margin, metric] for metric in (*LATENCIES, errors)]
        bad = mixed(np.stack([bad for bad, _ in metrics], axis=-1))
        good = np.min([np.maximum.accumulate(good, axis=1) for _, good in metrics], axis=0)
        rolled, passed = self.needed(bad, level), self.needed(good, level)
        return rolled, np.where(passed < rolled, passed, np.inf)


def simulate(
    seed: int,
    runs: int,
    latency: str,
    errors: tuple[str, ...],
    margins: tuple[str, ...] = tuple(MARGINS),
    *,
    by_requests: bool = True,
    **challenger: float,
) -> Runs:
    """`runs` ramps, seeded one by one from `seed` on; `challenger` as in `world.ramp`. `by_requests`: engine A too."""
    parts = []
    for start in range(0, runs, BATCH):
        numbers, counts, ends = [], [], []
        for run in range(start, min(runs, start + BATCH)):
            random = np.random.default_rng(seed + run)
            traffic = world.ramp(random, latency, errors, **challenger)
            n, slow = world.events(random, traffic, tuple(MARGINS[margin] for margin in margins))
            numbers.append(n)
            counts.append(slow)
            ends.append(_rivals(traffic))
        n = np.stack(numbers)
        metrics = (*LATENCIES, *errors)
        names = [(margin, metric) for margin in margins for metric in metrics]
        k = np.stack([[slow[margins.index(margin)][metric] for slow in counts] for margin, metric in names])
        delta = np.array([world.ERROR_MARGIN if (m, x) == ("default", x) and x in errors else 0.0 for m, x in names])
        rate = np.array([1 - world.QUANTILES[x] if x in world.QUANTILES else world.ERROR_RATE for _, x in names])
        engines = {"C": permutation(np.random.default_rng([seed, start]), n, k, delta)}
        if by_requests:
            engines["A"] = two_sample(n, k, delta, rate)
        logs = {}
        for engine, (bad, good) in engines.items():
            logs |= {(engine, *name): (bad[i], good[i]) for i, name in enumerate(names)}
        own = np.arange(world.UNITS) < world.CHALLENGERS[:, None]
        parts.append(Runs(np.cumsum((n * own).sum(axis=2), axis=1), logs, _stacked(ends)))
    return Runs(
        np.concatenate([part.requests for part in parts]),
        {
            name: tuple(np.concatenate([part.logs[name][side] for part in parts]) for side in (0, 1))
            for name in parts[0].logs
        },
        {name: np.concatenate([part.ends[name] for part in parts]) for name in parts[0].ends},
    )


def two_sample(n: Ints, k: Ints, delta: Floats, rate: Floats) -> tuple[Floats, Floats]:
    """`TwoSample` for many runs and metrics at once: `n` (runs, blocks, units), `k` (metrics, runs, blocks, units)."""
    own = np.arange(world.UNITS) < world.CHALLENGERS[:, None]
    n1, n0 = (n * own).sum(axis=-1), (n * ~own).sum(axis=-1)
    k1, k0 = (k * own).sum(axis=-1), (k * ~own).sum(axis=-1)
    known_k, known_n = np.zeros(k.shape[:2]) + rate[:, None] * 1000.0, 1000.0
    sums = [np.zeros((*k.shape[:2], odds.size)) for odds in (WORSE, BETTER)]
    paths = [np.empty(k.shape[:3]) for _ in sums]
    for b in range(n.shape[1]):
        share = n1[:, b] / (n0[:, b] + n1[:, b])
        for total, path, odds in zip(sums, paths, (WORSE, BETTER), strict=True):
            yes1, no1, yes0, no0 = stakes(known_k / known_n, share, delta[:, None], odds)
            one, two, m1, m0 = k1[:, :, b, None], k0[:, :, b, None], n1[:, b, None], n0[:, b, None]
            np.add(total, one * yes1 + (m1 - one) * no1 + two * yes0 + (m0 - two) * no0, out=total)
            path[:, :, b] = mixed(total)
        known_k, known_n = known_k + k0[:, :, b], known_n + n0[:, b]
    return paths[0], paths[1]


def permutation(random: np.random.Generator, n: Ints, k: Ints, delta: Floats) -> tuple[Floats, Floats]:
    """`Permutation` for many runs and metrics at once, each unit thinned to the fewest requests of its block."""
    size = n.min(axis=-1, keepdims=True)
    champion = np.arange(world.UNITS) >= world.CHALLENGERS[:, None]
    extra = delta[:, None, None, None] * champion
    draws = np.stack([thinned(random, n, k, size, extra) for _ in range(DRAWS)])
    engine = Permutation(k.shape[0] * k.shape[1])
    paths = [np.empty(k.shape[:3]) for _ in range(2)]
    for b, challengers in enumerate(world.CHALLENGERS):
        engine.add(draws[:, :, :, b].reshape(DRAWS, -1, world.UNITS), int(challengers))
        for path, logs in zip(paths, engine.logs(), strict=True):
            path[:, :, b] = logs.reshape(k.shape[:2])
    return paths[0], paths[1]


def _rivals(traffic: world.Traffic) -> dict[tuple[str, str], float]:
    seen = peers.Minutes(traffic)
    high = peers.kayenta(seen)
    found = {}
    for errors in traffic.errors:
        minutes = {
            "Flagger, threshold 1 (default)": peers.flagger(seen, errors, 1),
            "Flagger, threshold 10": peers.flagger(seen, errors, 10),
            "Argo, fixed bounds, failureLimit 3": peers.argo_absolute(seen, errors),
            "Argo, relative, failureLimit 3": peers.argo_relative(seen, errors),
            "Kayenta, each minute": peers.kayenta_minute(high, errors, slice(None)),
            "Kayenta, 3 runs of 20 minutes": peers.kayenta_minute(high, errors, slice(19, None, 20)),
        }
        found |= {(rule, errors): float(seen.requests[at]) if at >= 0 else np.inf for rule, at in minutes.items()}
    return found


def _stacked(ends: list[dict[tuple[str, str], float]]) -> dict[tuple[str, str], Floats]:
    return {name: np.array([end[name] for end in ends]) for name in ends[0]}

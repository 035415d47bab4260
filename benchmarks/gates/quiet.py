"""Little traffic: 25 minutes from 2 % to 50 %, the example of Flagger's documentation, at 0.2 to 0.5 requests/s."""

import numpy as np
from numpy.typing import NDArray

from benchmarks.gates.peers import is_high
from validations.eprocess import bernoulli

Floats = NDArray[np.float64]

WEIGHTS = np.arange(0.02, 0.501, 0.02)
BOUND = 0.01
CHAMPION = 0.002
LONG = 6 * 60
"""Minutes that a gate which waits for evidence may take in all, the rest of them at 50 %."""


def run(seed: int, runs: int, rate: float, error: float) -> dict[str, tuple[Floats, Floats]]:
    """By rule: challenger requests until (rollback, promotion); infinite where it did not come."""
    random = np.random.default_rng(seed)
    weights = np.append(WEIGHTS, np.full(LONG - WEIGHTS.size, WEIGHTS[-1]))
    n = random.poisson(60 * rate * weights, (runs, LONG))
    k = random.binomial(n, error)
    beside = random.poisson(60 * rate * weights, (runs, LONG))
    baseline = random.binomial(beside, CHAMPION)
    requests = np.cumsum(n, axis=1).astype(float)
    short = WEIGHTS.size
    failed = k > BOUND * n
    share, other = k / np.maximum(n, 1), baseline / np.maximum(beside, 1)
    high = np.zeros((runs, LONG), dtype=bool)
    high[:, short - 1] = [is_high(a[:short], b[:short]) for a, b in zip(share, other, strict=True)]
    rules = {
        "Argo, failureLimit 3, no data passes": np.cumsum(failed, axis=1) > 3,
        "Kayenta, 25 points": high,
    }
    found = {"Flagger, threshold 10": _flagger(random, runs, rate, error)}
    for rule, rolls in rules.items():
        rolled = _first(rolls[:, :short], requests)
        found[rule] = rolled, np.where(np.isfinite(rolled), np.inf, requests[:, short - 1])
    bad, good = bernoulli(np.cumsum(k, axis=1), np.cumsum(n, axis=1), BOUND)
    for rule, minutes in (("**Titleshot**, 25 minutes", short), ("**Titleshot**, up to 6 hours", LONG)):
        rolled, passed = (_first(log[:, :minutes] >= np.log(20), requests) for log in (bad, good))
        found[rule] = np.where(rolled <= passed, rolled, np.inf), np.where(passed < rolled, passed, np.inf)
    return found


def _flagger(random: np.random.Generator, runs: int, rate: float, error: float) -> tuple[Floats, Floats]:
    """No data is a failed check, a failed check keeps the weight where it is, and ten of them roll back."""
    step, failed, requests = (np.zeros(runs, dtype=np.int64) for _ in range(3))
    for _ in range(WEIGHTS.size + 10):
        on = (step < WEIGHTS.size) & (failed < 10)
        n = random.poisson(60 * rate * WEIGHTS[np.minimum(step, WEIGHTS.size - 1)]) * on
        bad = (n == 0) | (random.binomial(n, error) > BOUND * n)
        requests += n
        failed += on & bad
        step += on & ~bad
    return np.where(failed >= 10, requests, np.inf), np.where(failed < 10, requests, np.inf)


def _first(hit: NDArray[np.bool_], requests: Floats) -> Floats:
    at = np.take_along_axis(requests, hit.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(hit.any(axis=1), at, np.inf)

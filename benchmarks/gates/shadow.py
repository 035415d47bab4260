"""Pairs of answers: disagreement (`bernoulli`, exactly, by dynamic programming) and scores (`Betting`, simulated)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from validations.eprocess import Betting, bernoulli

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Draw = Callable[[np.random.Generator, int], Floats]

LEVEL = float(np.log(20))


def table(most: int, m: float) -> tuple[Ints, Ints]:
    """For 1..most pairs: the fewest disagreements that roll back, and the most that pass (-1: none yet)."""
    n = np.arange(1, most + 1)

    def change(side: int, low: Floats, high: Floats) -> tuple[Ints, Ints]:
        """The last count on the lower side of the boundary, and the first on the upper."""
        while (high - low > 1).any():
            middle = (low + high) // 2
            reached = bernoulli(np.clip(middle, 0, n), n, m)[side] >= LEVEL
            lower = (reached & (middle <= n)) == (side == 1)
            low, high = np.where(lower, middle, low), np.where(lower, high, middle)
        return low.astype(np.int64), high.astype(np.int64)

    return change(0, np.floor(m * n), n + 1.0)[1], change(1, np.full(most, -1.0), np.ceil(m * n) + 1)[0]


def exact(p: float, m: float, most: int = 20_000) -> tuple[Floats, Floats]:
    """The probabilities that 1..most pairs with the disagreement `p` (roll back, pass), whichever is first."""
    fewest, allowed = table(most, m)
    state = np.zeros(int(fewest.max()) + 2)
    state[0] = 1.0
    rolled, passed = np.zeros(most), np.zeros(most)
    for n in range(most):
        state[1:] = state[1:] * (1 - p) + state[:-1] * p
        state[0] *= 1 - p
        rolled[n] = state[fewest[n] :].sum()
        state[fewest[n] :] = 0
        if allowed[n] >= 0:
            passed[n] = state[: allowed[n] + 1].sum()
            state[: allowed[n] + 1] = 0
    return rolled, passed


def betting(seed: int, runs: int, m: float, most: int, draw: Draw) -> tuple[Floats, Floats]:
    """Numbers in [0, 1] against the mean `m`: how many until (rollback, pass), whichever is first; looked at after
    every 10, later every 1 % more.
    """
    rolled, passed = np.full(runs, np.inf), np.full(runs, np.inf)
    for run in range(runs):
        numbers = draw(np.random.default_rng([seed, run]), most)
        engine, seen = Betting([m]), 0
        while seen < most:
            more = max(10, seen // 100)
            engine.add(numbers[seen : seen + more])
            seen += more
            bad, good = engine.logs()
            if bad[0] >= LEVEL or good[0] >= LEVEL:
                (rolled if bad[0] >= LEVEL else passed)[run] = seen
                break
    return rolled, passed


def rubric(mean: float) -> Draw:
    """Paired differences of a score, sd 0.2, as (d + 1) / 2."""
    return lambda random, n: (np.clip(random.normal(mean, 0.2, n), -1, 1) + 1) / 2


def semantic(mean: float) -> Draw:
    """One minus the agreement of two texts."""
    return lambda random, n: 1 - random.beta(8 * mean, 8 * (1 - mean), n)


def sessions(p: float, each: int = 10, icc: float = 0.3) -> Draw:
    """The mean disagreement of sessions of ten requests that resemble each other (intraclass correlation 0.3)."""
    size = 1 / icc - 1
    return lambda random, n: random.binomial(each, random.beta(p * size, (1 - p) * size, n)) / each


def growth(draw: Draw, m: float, *, worse: bool) -> float:
    """The best that any bet can grow by each number, against the mean `m`: the divergence that bounds the speed."""
    gap = draw(np.random.default_rng(0), 100_000) - m
    bets = np.linspace(0.001, 0.999, 200) / (m if worse else 1 - m) * (1 if worse else -1)
    return float(max(np.log1p(bet * gap).mean() for bet in bets))

"""The error rate at a fixed share: `TwoSample` looks after every 25 challenger requests, later every 1 % more."""

import numpy as np
from numpy.typing import NDArray

from validations.eprocess import BETTER, WORSE, mixed, stakes

Floats = NDArray[np.float64]

CHAMPION, MARGIN = 0.001, 0.001


def run(seed: int, runs: int, share: float, error: float, most: int = 100_000) -> tuple[Floats, Floats]:
    """Challenger requests until (rollback, promotion), whichever came first; infinite for the other."""
    random = np.random.default_rng(seed)
    requests, left = 0, np.arange(runs)
    rolled, passed = np.full(runs, np.inf), np.full(runs, np.inf)
    known_k, known_n = np.full(runs, 1000 * CHAMPION), 1000.0
    sums = [np.zeros((runs, odds.size)) for odds in (WORSE, BETTER)]
    while requests < most and left.size:
        n1 = max(10 if share < 0.05 else 25, requests // 100)
        n0 = round(n1 * (1 - share) / share)
        requests += n1
        k1, k0 = random.binomial(n1, error, left.size), random.binomial(n0, CHAMPION, left.size)
        for total, odds in zip(sums, (WORSE, BETTER), strict=True):
            yes1, no1, yes0, no0 = stakes(known_k / known_n, n1 / (n0 + n1), MARGIN, odds)
            one, two = k1[:, None], k0[:, None]
            np.add(total, one * yes1 + (n1 - one) * no1 + two * yes0 + (n0 - two) * no0, out=total)
        bad, good = (mixed(total) >= np.log(20) for total in sums)
        rolled[left[bad]] = requests
        passed[left[good & ~bad]] = requests
        on = ~(bad | good)
        left, known_k, sums = left[on], (known_k + k0)[on], [total[on] for total in sums]
        known_n += n0
    return rolled, passed

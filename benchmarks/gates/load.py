"""The load gate: quantiles of slices that challenger and champion share, 300 requests each (`leaned`)."""

import numpy as np
from numpy.typing import NDArray

from validations.eprocess import leaned, mixed

Floats = NDArray[np.float64]

SLICES, EACH = 120, 300


def run(
    seed: int,
    runs: int,
    quantile: float,
    margin: float,
    *,
    shift: float = 0.0,
    spread: float = 1.0,
    correlated: bool = True,
    swapped: bool = True,
) -> tuple[Floats, Floats]:
    """Slices until (rollback, pass), each as if alone.

    Each replica has a level of 5 %, autocorrelated by 0.8 from slice to slice (`correlated`), and bursts; `swapped`:
    for each slice a coin says which replica serves which version.
    """
    random = np.random.default_rng(seed)
    keep = 0.8 if correlated else 0.0
    levels = np.empty((2, runs, SLICES))
    levels[..., 0] = random.standard_normal((2, runs))
    for slice_ in range(1, SLICES):
        fresh = np.sqrt(1 - keep**2) * random.standard_normal((2, runs))
        levels[..., slice_] = keep * levels[..., slice_ - 1] + fresh
    levels *= 0.05
    if swapped:
        levels = np.where(random.random((runs, SLICES)) < 0.5, levels, levels[::-1])
    quantiles = np.empty((2, runs, SLICES))
    burst = np.arange(EACH) < EACH // 10
    for version in range(2):
        for at in range(0, runs, 50):
            shape = levels[version, at : at + 50].shape
            log = 0.6 * (spread if version else 1.0) * random.standard_normal((*shape, EACH), dtype=np.float32)
            log[..., burst] += 1.1 * (random.random(shape) < 0.05)[..., None]
            place = int(quantile * EACH)
            own = np.partition(log, place, axis=-1)[..., place]
            quantiles[version, at : at + 50] = own + levels[version, at : at + 50] + (shift if version else 0.0)
    gaps = quantiles[1] - quantiles[0] - np.log1p(margin)
    rolled, passed = (mixed(np.cumsum(logs, axis=1)) >= np.log(20) for logs in leaned(gaps))
    return _first(rolled), _first(passed)


def _first(hit: NDArray[np.bool_]) -> Floats:
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1.0, np.inf)

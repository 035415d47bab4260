"""A run as plain data, for evidence, plots and paired comparison; from the raw latencies, never from Locust's own
percentiles, which are rounded to two digits (99.6 ms become 100, 1,049 become 1,000).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.run import Result

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


def summary(result: Result) -> dict[str, Any]:
    """The run as evidence, JSON-able: `{"started", "seconds", "load": {name: {"requests", "failures", "reasons",
    "versions", "latencies_ms"}}, "generator": {"lateness_ms": {"p50", ...}, "cpu"}, "failures": [first 20]}`

    `latencies_ms` are sorted, and of the answered requests only. A quantile that is infinite is null.
    """
    return {
        "started": result.started,
        "seconds": result.seconds,
        "load": {
            name: {
                "requests": target.sent,
                "failures": target.failed,
                "reasons": dict(target.reasons),
                "versions": dict(target.versions),
                "latencies_ms": [
                    round(1000 * seconds, 3) for seconds in np.sort(target.latencies).tolist() if seconds < math.inf
                ],
            }
            for name, target in result.targets.items()
        },
        "generator": {"lateness_ms": _quantiles(result.lateness), "cpu": result.cpu},
        "failures": [vars(failure) for failure in result.failures[:20]],
    }


def slices(result: Result, seconds: float) -> list[dict[str, NDArray[np.float64]]]:
    """The run cut into slices of that many seconds: for each, every target's latencies (failures are +inf).

    A request belongs to the slice of its *intended* start, so a stall stays where it began. Both targets were
    under load all the time, turn by turn in random order: what disturbs the machine is in the same slice of
    both. What is left at the end is part of the last whole slice; a run shorter than one slice is one.
    """
    if not seconds > 0:
        raise ValueError(f"a slice lasts longer than {seconds:g} s")
    # A run lasts a little longer than its plan, or (the clock's grain) a hair less.
    count = max(1, math.floor(result.seconds / seconds + 0.001))
    cut: list[dict[str, NDArray[np.float64]]] = [{} for _ in range(count)]
    for name, target in result.targets.items():
        place = np.minimum((target.at / seconds).astype(np.int64), count - 1)
        for number, slice_ in enumerate(cut):
            slice_[name] = target.latencies[place == number]
    return cut


def _quantiles(seconds: NDArray[np.float64]) -> dict[str, float | None]:
    """Order statistics in milliseconds: the smallest value that the share does not exceed."""
    ordered = np.sort(seconds)
    found: dict[str, float | None] = {}
    for q in QUANTILES:
        rank = max(math.ceil(q * ordered.size - 1e-9), 1)
        value = float(ordered[rank - 1]) * 1000 if ordered.size else math.inf
        found[f"p{q * 100:g}"] = value if math.isfinite(value) else None
    return found

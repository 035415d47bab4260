"""A run as plain data, for evidence and plots. Percentiles come from the raw latencies, never from Locust,
which rounds to two digits (99.6 ms become 100, 1,049 become 1,000).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.run import Result, Target

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


def summary(result: Result) -> dict[str, Any]:
    """Counts, quantiles and the generator's own health, JSON-able; infinite latencies are null.

    `{"seconds", "targets": {name: {"sent", "failed", "reasons", "versions", "quantiles_ms": {"p50", ...}}},
    "generator": {"lateness_ms": {...}, "cpu"}, "failures": [first 20]}`
    """
    return {
        "started": result.started,
        "seconds": result.seconds,
        "targets": {
            name: {
                "sent": target.sent,
                "failed": target.failed,
                "reasons": dict(target.reasons),
                "versions": dict(target.versions),
                "quantiles_ms": _quantiles(target.latencies),
            }
            for name, target in result.targets.items()
        },
        "generator": {"lateness_ms": _quantiles(result.lateness), "cpu": result.cpu},
        "failures": [vars(failure) for failure in result.failures[:20]],
    }


def curve(target: Target, points: int = 200) -> dict[str, list[float]]:
    """The latency distribution of the answered requests for a plot: `{"share": [...], "ms": [...]}`.

    `share` of all requests, failed ones included, were answered within `ms`; it ends below 1 where
    some failed. At most `points` pairs, evenly spread over the shares, the first and last always there.
    """
    answered = np.sort(target.latencies[np.isfinite(target.latencies)]) * 1000
    if not answered.size:
        return {"share": [], "ms": []}
    ranks = np.unique(np.linspace(0, answered.size - 1, min(points, answered.size)).round().astype(int))
    shares = (ranks + 1) / target.latencies.size
    return {"share": [float(s) for s in shares], "ms": [float(ms) for ms in answered[ranks]]}


def _quantiles(seconds: NDArray[np.float64]) -> dict[str, float | None]:
    """Order statistics in milliseconds: the smallest value that the share does not exceed."""
    ordered = np.sort(seconds)
    found: dict[str, float | None] = {}
    for q in QUANTILES:
        rank = max(math.ceil(q * ordered.size - 1e-9), 1)
        value = float(ordered[rank - 1]) * 1000 if ordered.size else math.inf
        found[f"p{q * 100:g}"] = value if math.isfinite(value) else None
    return found

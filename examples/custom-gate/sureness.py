"""How far champion and challenger are from tossing a coin, over a file of requests: 0 is a coin, 1 is certain."""
# ruff: noqa: INP001 - a gate of its own, not a module of ours

import json
import math
import statistics
import urllib.request
from pathlib import Path
from typing import Any


def sureness(told: dict[str, Any]) -> dict[str, Any]:
    """Called by the gate with what docs/policy.md shows; the working directory is the policy's folder."""
    lines = Path(told["parameters"]["requests"]).read_text().splitlines()
    new = [_sure(told["challenger"]["url"], line) for line in lines]
    measured = {"sureness": _mean(new, told["confidence"])}
    if told["champion"]:
        old = [_sure(told["champion"]["url"], line) for line in lines]
        # Both were asked the same, so the differences are what varies.
        measured["sureness_delta"] = _mean([a - b for a, b in zip(new, old, strict=True)], told["confidence"])
    return measured


def _sure(url: str, body: str) -> float:
    asked = urllib.request.Request(f"{url}/invocations", body.encode(), {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
        probability = json.load(answer)["predictions"][0][1]
    return abs(2 * probability - 1)


def _mean(values: list[float], confidence: float) -> dict[str, Any]:
    """The mean with its normal interval: an interval, not a number alone, so that the judge sees the sample's size."""
    mean = statistics.fmean(values)
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    half = z * statistics.stdev(values) / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half, "sample": len(values)}

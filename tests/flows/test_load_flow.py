"""The capacity search on a real stack: live requests replayed, both versions in turn, and nobody hurt."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import history
from tests.flows.conftest import Maker, live, promote

pytestmark = pytest.mark.timeout(600)
SEARCH = {
    "kind": "load",
    "find": "capacity",
    "from": "10/s",
    "to": "20/s",
    "precision": "50%",
    "run_time": "3s",
    "arrivals": "recorded",
    "min_sample": 20,
}
# However slow the machine: what is tested here is the search, and not how fast anything is.
WIDE = {"error_rate": {"max": 0.5}, "p50_ms": {"max": 5000}, "generator_lateness_ms": {"max": 5000}}


@pytest.mark.long
def test_the_capacity_is_found_beside_live_traffic(
    stack: Any, maker: Maker, policy: Callable[..., Path], tmp_path: Path
) -> None:
    """Live requests are replayed to each version in turn, at one rate after the other, and none of them is lost."""
    champion = maker.version()
    # The first version has nothing recorded yet: it is asked its own example, at equal distances.
    first = {"kind": "load", "rate": "20/s", "run_time": "3s", "arrivals": "recorded", "min_sample": 20}
    path = policy({**first, "checks": WIDE}, name="first")
    result = promote(model=maker.model, policy=str(path), version=champion)
    assert result["phase"] == "promoted", result
    challenger = maker.version(seed=1)
    path = policy({**SEARCH, "checks": {**WIDE, "capacity": {"min": 10}, "capacity_ratio": {"min": 0.2}}})
    with live(stack, maker.model, tmp_path, rate=20) as traffic:
        wait_for_answers(traffic)
        result = promote(model=maker.model, policy=str(path), version=challenger)
        answered = traffic.stop()
    assert result["phase"] == "promoted", result
    assert answered.failed == 0

    entry = history.entry(result["promotion"])
    verdict = next(v for v in history.stored(entry.run_id).verdicts if v.step == "load")
    assert verdict.evidence.measurements["capacity"].low >= 10
    assert verdict.evidence.note.endswith("recent live requests with their own spacing")
    assert "generator_lateness_ms" in {check.metric for check in verdict.checks}
    runs = json.loads(history.fetch(entry, "evidence/load.json", tmp_path).read_text())["runs"]
    assert [(row["version"], row["rate"]) for row in runs[:2]] == [("challenger", 10), ("champion", 10)]
    assert {row["outcome"] for row in runs} == {"kept"}


@pytest.mark.long
def test_a_version_without_capacity_is_rejected(maker: Maker, policy: Callable[..., Path]) -> None:
    """No model answers within 10 microseconds: the first rate breaks the bound, and the search ends there."""
    version = maker.version()
    checks = {**WIDE, "capacity": {"min": 15}, "p50_ms": {"max": 0.01}}
    path = policy({**SEARCH, "arrivals": "poisson", "checks": checks})
    rejected = promote(model=maker.model, policy=str(path), version=version)
    assert (rejected["phase"], rejected["step"], rejected["outcome"]) == ("rejected", "load", "failed"), rejected
    verdicts = history.stored(history.entry(rejected["promotion"]).run_id).verdicts
    capacity = next(v for v in verdicts if v.step == "load").evidence.measurements["capacity"]
    assert (capacity.low, capacity.high) == (0, 10)
    assert "at 10/s p50_ms" in capacity.note


def wait_for_answers(traffic: Any) -> None:
    """Wait until there are live requests to replay."""
    until = time.monotonic() + 60
    while traffic.progress()["ok"] < 30:
        assert time.monotonic() < until, "no live traffic"
        time.sleep(0.1)

"""The load gate with several workers on a real stack."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtests import distributed
from tasks import history
from tests.flows.conftest import Maker, promote

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
GATE = {"kind": "load", "rate": "20/s", "run_time": "5s", "workers": 2, "min_sample": 20}
# However slow the machine: nothing here is about how fast anything is.
CHECKS = {"error_rate": {"max": 0.5}, "p50_ms": {"max": 5000}, "generator_lateness_ms": {"max": 5000}}


def test_two_workers_are_one_load(
    maker: Maker, policy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions get what one worker would send, and all of it is judged; with a worker too few the step is errored."""
    champion = maker.version()
    result = promote(model=maker.model, policy=str(policy({**GATE, "checks": CHECKS}, name="first")), version=champion)
    assert result["phase"] == "promoted", result
    challenger = maker.version(seed=1)
    path = policy({**GATE, "checks": {**CHECKS, "error_rate_delta": {"max": 0.5}}})

    start = distributed.Processes._start

    def one_only(self: distributed.Processes, name: str, options: list[str]) -> object:
        return start(self, name, [*options, "--no-such-option"] if name == "worker-1" else options)

    with monkeypatch.context() as patched:
        patched.setattr(distributed.Processes, "_start", one_only)
        errored = promote(model=maker.model, policy=str(path), version=challenger)
    assert (errored["step"], errored["outcome"]) == ("load", "errored"), errored

    result = promote(model=maker.model, policy=str(path), version=challenger)
    assert result["phase"] == "promoted", result
    entry = history.entry(result["promotion"])
    verdict = next(v for v in history.stored(entry.run_id).verdicts if v.step == "load")
    assert verdict.evidence.note.startswith("20/s each for 5 s")
    load = json.loads(history.fetch(entry, "evidence/load.json", tmp_path).read_text())["load"]
    assert {name: one["requests"] for name, one in load.items()} == {"challenger": 100, "champion": 100}

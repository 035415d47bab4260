"""The capacity search: each version loaded by itself, the two in turn, at one rate after the other."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadtests.capacity import Search
from loadtests.run import LoadError, Result, Saturated
from tasks.progress import say
from validations.gates import Load
from validations.verdict import Evidence, Measurement, Outcome, judge


class Hurt(Exception):
    """Live requests fail more than they did before the load began."""


Probe = Callable[[str, float], Result]
"""Loads one version ("challenger", "champion") at a rate. Raises `Saturated` where the generator was the limit, and
`Hurt` where live requests were.
"""
Measure = Callable[[Result, str], dict[str, Measurement]]
"""The metrics of that version by itself in that run."""


@dataclass(slots=True)
class Found:
    """One version's search: its runs, the best one that kept the bounds, and why there was no better one."""

    search: Search
    results: list[Result] = field(default_factory=list)
    kept: Result | None = None
    why: str = ""
    ended_by: Saturated | Hurt | None = None

    @property
    def reported(self) -> Result:
        """The run at the highest rate that kept the bounds, or else the first of all. Raises where there is none."""
        if not self.results:
            raise self.ended_by or LoadError("no run of the search came to an end")
        return self.kept or self.results[0]

    @property
    def requests(self) -> int:
        """All that were sent."""
        return sum(result.sent for result in self.results)

    def stop(self, error: Saturated | Hurt, why: str) -> None:
        """End the search where it is, unless it has ended."""
        if self.search.rate is not None:
            self.ended_by, self.why = error, why
            self.search.stop()

    def bracket(self, live: float) -> tuple[float, float]:
        """The highest rate kept and the lowest broken, each with the `live` requests a second that the version
        had besides; nothing above the highest rate that may be asked for counts.
        """
        limit, high = self.search.limit, self.search.high
        low = min(self.search.kept + live, limit) if self.search.kept else 0.0
        return low, high if math.isinf(high) else min(high + live, limit)


def search(
    gate: Load, names: list[str], probe: Probe, measure: Measure
) -> tuple[dict[str, Found], list[dict[str, Any]]]:
    """Find the highest rate at which each of `names` keeps the gate's absolute bounds; also all runs as evidence.

    Each version is loaded by itself: at its limit a model takes what the machine has, and side by side each would
    be measured at the other's cost. They take turns at the same rates, each going first every other time, so
    that slow minutes meet both. Live requests that come to harm end both searches.
    """
    if gate.start is None or gate.to is None:
        raise ValueError("this gate searches nothing")
    found = {name: Found(Search(gate.start, gate.to, gate.precision)) for name in names}
    runs: list[dict[str, Any]] = []
    for turn in itertools.count():
        if all(one.search.rate is None for one in found.values()):
            break
        for name in names if turn % 2 == 0 else names[::-1]:
            one, rate = found[name], found[name].search.rate
            if rate is None:
                continue
            try:
                runs.append(_try(gate, name, one, probe(name, rate), measure))
                say(f"  {name} at {rate:.4g}/s: {runs[-1]['outcome']}, {runs[-1]['why']}")
            except Saturated as error:
                one.stop(error, f"at {rate:.4g}/s the generator, not the model, was the limit")
                say(f"  {name} at {rate:.4g}/s: {error}")
            except Hurt as error:
                for other in found.values():
                    other.stop(error, f"stopped at {rate:.4g}/s to the {name}: {error}")
                say(f"  {name} at {rate:.4g}/s: stopped, {error}")
    return found, runs


def _try(gate: Load, name: str, one: Found, result: Result, measure: Measure) -> dict[str, Any]:
    """Judge one run, tell the search, and return the run as evidence."""
    rate, measured = one.search.rate, measure(result, name)
    verdict = judge(name, gate.kept_bounds(), Evidence(measurements=measured), gate.min_sample)
    kept = {Outcome.PASSED: True, Outcome.FAILED: False}.get(verdict.outcome)
    one.results.append(result)
    one.search.tell(kept)
    if kept:
        one.kept = result
    else:
        one.why = f"at {rate:.4g}/s {verdict.why}"
    return {
        "version": name,
        "rate": rate,
        "outcome": {True: "kept", False: "broken", None: "not proven"}[kept],
        "why": verdict.why,
        "lateness_ms": 1000 * result.late,
        "requests": result.sent,
        "failures": result.failed,
        **{metric: measured[metric].model_dump(include={"value", "low", "high"}) for metric in gate.kept_bounds()},
    }

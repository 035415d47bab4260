"""Measurements, bounds and the one judge that turns evidence into a verdict.

Pure: no clock, no randomness, no I/O. A recorded verdict can be reached again from its own evidence.
"""

import math
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Value(BaseModel):
    """A frozen record that refuses fields it does not know and survives JSON to the bit."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Outcome(StrEnum):
    """How a check or a step ended, best to worst. Only PASSED moves a promotion on.

    FAILED blames the challenger, ERRORED the platform, INCONCLUSIVE the sample.
    """

    PASSED = "passed"
    INCONCLUSIVE = "inconclusive"
    ERRORED = "errored"
    FAILED = "failed"

    @classmethod
    def worst(cls, outcomes: "list[Outcome]") -> "Outcome":
        """The worst of `outcomes`; ERRORED where there is none, since nothing was proven."""
        order = list(cls)
        return max(outcomes, key=order.index, default=cls.ERRORED)


class Measurement(Value):
    """One number with the interval that is believed to hold it, and the size of the sample behind it.

    An exact fact has `low == high` and the sample 1. `where` names what the number speaks of, when that is
    narrower than the whole (a slice of traffic, a column); `note` says in words what was seen there.
    """

    value: float
    low: float
    high: float
    sample: int
    where: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if any(math.isnan(number) for number in (self.value, self.low, self.high)):
            raise ValueError("a measurement cannot be NaN: leave it out, and its check is errored")
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] does not hold the value {self.value}")
        if self.sample < 0:
            raise ValueError("a sample cannot be negative")
        return self

    @classmethod
    def exact(cls, value: float, *, where: str = "", note: str = "") -> Self:
        """A fact: known without error, so one observation is the whole sample."""
        return cls(value=value, low=value, high=value, sample=1, where=where, note=note)

    def __str__(self) -> str:
        if self.low == self.high:
            return _number(self.value)
        return f"{_number(self.value)} [{_number(self.low)}, {_number(self.high)}]"


class Bound(Value):
    """What is good enough: a lower limit, an upper limit, or both (inclusive)."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("this bound bounds nothing: give `min`, `max` or both")
        for limit in (self.min, self.max):
            if limit is not None and not math.isfinite(limit):
                raise ValueError("a bound is a finite number")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"no number is at least {self.min} and at most {self.max}")
        return self

    def judge(self, measurement: Measurement, min_sample: int = 1) -> Outcome:
        """Judge the whole interval: inside PASSED, outside FAILED, across INCONCLUSIVE.

        A sample under `min_sample` is INCONCLUSIVE whatever it shows.
        """
        if measurement.sample < min_sample:
            return Outcome.INCONCLUSIVE
        low = -math.inf if self.min is None else self.min
        high = math.inf if self.max is None else self.max
        if low <= measurement.low and measurement.high <= high:
            return Outcome.PASSED
        if measurement.high < low or high < measurement.low:
            return Outcome.FAILED
        return Outcome.INCONCLUSIVE

    def __str__(self) -> str:
        parts = [] if self.min is None else [f"at least {_number(self.min)}"]
        parts += [] if self.max is None else [f"at most {_number(self.max)}"]
        return " and ".join(parts)


class Artifact(Value):
    """A file that a step left behind: its path inside the history's run, and its digest."""

    name: str
    uri: str
    sha256: str


class Evidence(Value):
    """All that a step observed. `note` is for people; nothing is judged by it."""

    measurements: dict[str, Measurement] = {}
    artifacts: tuple[Artifact, ...] = ()
    started: datetime | None = None
    finished: datetime | None = None
    note: str = ""


class Check(Value):
    """One bound held against one measurement. `str(check)` is the sentence that people read."""

    metric: str
    bound: Bound
    measured: Measurement | None
    min_sample: int
    outcome: Outcome

    def __str__(self) -> str:
        if self.measured is None:
            return f"{self.metric} was not measured (wanted {self.bound})"
        m = self.measured
        where = f" for {m.where}" if m.where else ""
        note = f": {m.note}" if m.note else ""
        if m.sample < self.min_sample:
            return (
                f"{self.metric} is undecided{where}: {m.sample} observed, {self.min_sample} needed "
                f"(wanted {self.bound}){note}"
            )
        verb = {
            Outcome.PASSED: "is within",
            Outcome.FAILED: "is outside",
            Outcome.INCONCLUSIVE: "may be either side of",
            Outcome.ERRORED: "could not be held against",
        }[self.outcome]
        sample = f", n={m.sample:,}" if m.low != m.high else ""
        return f"{self.metric} {m}{where} {verb} the bound ({self.bound}){sample}{note}"


class Verdict(Value):
    """How one step ended, and why. `outcome` is the worst of its checks."""

    step: str
    outcome: Outcome
    checks: tuple[Check, ...]
    evidence: Evidence

    @property
    def decisive(self) -> Check | None:
        """The first check with the verdict's own outcome; None where there was no check at all."""
        return next((check for check in self.checks if check.outcome is self.outcome), None)

    @property
    def why(self) -> str:
        """One sentence: what decided."""
        reason = str(self.decisive) if self.decisive else "nothing was checked"
        if self.evidence.note and (self.decisive is None or self.decisive.measured is None):
            return self.evidence.note.splitlines()[0]
        return reason


def judge(step: str, bounds: Mapping[str, Bound], evidence: Evidence, min_sample: int = 1) -> Verdict:
    """Turn evidence into a verdict: the only place where one is reached.

    Every bound needs its measurement; one that is missing is ERRORED, and so is a step without bounds.
    """
    checks = []
    for metric, bound in bounds.items():
        measured = evidence.measurements.get(metric)
        outcome = Outcome.ERRORED if measured is None else bound.judge(measured, min_sample)
        checks.append(Check(metric=metric, bound=bound, measured=measured, min_sample=min_sample, outcome=outcome))
    outcome = Outcome.worst([check.outcome for check in checks])
    return Verdict(step=step, outcome=outcome, checks=tuple(checks), evidence=evidence)


def _number(value: float) -> str:
    """A number as people write it: four significant digits, no exponent between 1e-4 and 1e7."""
    if math.isinf(value):
        return "-∞" if value < 0 else "∞"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e4 or value == 0 else f"{value:,.6g}"

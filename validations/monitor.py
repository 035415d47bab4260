"""What a stream of counted requests says about every check of one gate, at any moment.

Pure: blocks of counts in, measurements out, the same from the same blocks: so a verdict can be reached again from the
stored series, under the same or other bounds. Every interval holds at all moments at once (`validations.eprocess`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from validations.eprocess import (
    mixed,
)
from validations.findings import Finding, way_of
from validations.ledger import Ledger, weighs
from validations.series import Block, Head, Series, Total
from validations.slices import Slice
from validations.verdict import Bound, Measurement, Outcome

CEILING, LEDGER, CONTROL = "error_ceiling", "ledger", "control"


@dataclass(frozen=True, slots=True)
class Terms:
    """The declared error rates, the ledger as it stands before this gate, and the requests (or pairs) that a step takes
    before it moves on.
    """

    false_rollback: float
    false_promotion: float
    ledger: Ledger
    gate: str
    min_sample: int = 1


class Monitor:
    """Fed with blocks, says at any moment what is known about each of `bounds`.

    Metrics: error_rate, error_rate_delta, pNN_ms, pNN_ratio, disagreement, error_ceiling; `ledger` is added, and
    `control` where blocks carry parts of the champion's requests to compare with each other.
    """

    def __init__(self, head: Head, bounds: Mapping[str, Bound], terms: Terms) -> None:
        self.head, self.terms = head, terms
        # Sorted, so that sums come out the same to the bit wherever the bounds come from.
        self.bounds = {metric: bounds[metric] for metric in sorted(bounds) if metric == CEILING or weighs(metric)}
        self._total = Total(head)
        self._blocks = 0
        self._asked = {metric: way_of(metric, bound, head) for metric, bound in self.bounds.items()}
        self._within: dict[str, tuple[float, float]] = {}
        self._step = 0
        self._worst = 0.0
        self._control = _Control(head, self.bounds) if head.relation != "paired" else None

    def begin_step(self) -> None:
        """From here on a new step of the same gate: evidence goes on, and `min_sample` counts anew."""
        self._step = self._total.size

    def add(self, block: Block) -> None:
        """Take a block. A whole one also goes into the comparisons, and narrows the intervals for good."""
        self._total.add(block)
        if not block.whole:
            return
        for asked in self._asked.values():
            asked.add(block, self._blocks)
        if self._control is not None:
            self._control.add(block)
        self._blocks += 1
        findings = self._findings(self._total)
        for metric, finding in findings.items():
            low, high = self._within.get(metric, (-math.inf, math.inf))
            self._within[metric] = (max(low, finding.low), min(high, finding.high))
        self._worst = max(self._worst, self._ledger(findings).total)

    @property
    def seconds(self) -> float:
        """The length of what was taken."""
        return self._total.seconds

    @property
    def requests(self) -> int:
        """How many requests (or pairs, if they are more) the present step has seen."""
        return self._total.size - self._step

    def ledger(self, slices: tuple[Slice, ...] = ()) -> Ledger:
        """The ledger with this gate's evidence."""
        return self._ledger(self._findings(self._with(None, slices)))

    def look(self, partial: Block | None = None, slices: tuple[Slice, ...] = ()) -> dict[str, Measurement]:
        """What is known now, with a block that is not whole yet, and the disagreement by slice so far."""
        total = self._with(partial, slices)
        findings = self._findings(total)
        ledger = self._ledger(findings)
        terms = self.terms
        moved = self._control is not None and self._control.moved(terms.false_rollback)
        measured = {}
        for metric, finding in findings.items():
            low, high = finding.low, finding.high
            before = self._within.get(metric, (-math.inf, math.inf))
            if max(low, before[0]) < min(high, before[1]):
                low, high = max(low, before[0]), min(high, before[1])
            bound, note = self.bounds[metric], finding.note
            if metric != CEILING:
                low, high = self._by_closed_testing(metric, low, high, ledger)
                if moved and metric.endswith(("_delta", "_ratio")):
                    low, high, note = _least(metric), _most(metric), MOVED
            value = min(max(finding.value, low), high)
            m = Measurement(value=value, low=low, high=high, sample=finding.sample, where=finding.where, note=note)
            if note is not MOVED and bound.judge(m) is Outcome.INCONCLUSIVE:
                missing = self._missing(finding, total)
                m = m.model_copy(update={"note": f"{note}; {missing}" if note else missing})
            measured[metric] = m
        if self._control is not None and self._control.blocks:
            measured[CONTROL] = self._control.measurement(terms.false_rollback)
        summed = self._ledger_measurement(ledger, total, moved=moved)
        guilty = [m for m, found in measured.items() if m in self.bounds and self._breaks(m, found)]
        if guilty and summed.low > 1 / terms.false_rollback:
            # A step need not ask for the check that its ledger speaks of, so the ledger tells it.
            told = "; ".join(f"{m} {measured[m]} is outside its bound ({self.bounds[m]})" for m in guilty)
            summed = summed.model_copy(update={"note": told})
        measured[LEDGER] = summed
        return measured

    def _breaks(self, metric: str, found: Measurement) -> bool:
        return metric != CEILING and self.bounds[metric].judge(found) is Outcome.FAILED

    def _with(self, partial: Block | None, slices: tuple[Slice, ...]) -> Total:
        total = self._total.plus(partial or Block(seconds=0))
        total.slices = slices
        return total

    def _ledger_measurement(self, ledger: Ledger, total: Total, *, moved: bool) -> Measurement:
        sample, bound = total.size - self._step, 1 / self.terms.false_rollback
        m = ledger.measurement(self.terms.false_rollback, sample)
        if moved:
            return m.model_copy(update={"low": 0.0, "high": max(m.high, 2 * bound), "note": MOVED})
        if self._worst > m.value and self._worst > bound:
            # Once it has been reached it is reached, whatever comes after.
            return m.model_copy(update={"value": self._worst, "low": self._worst, "high": self._worst})
        if m.low <= bound and sample < self.terms.min_sample:
            note = f"{sample:,} of {self.terms.min_sample:,} requests so far"
            return m.model_copy(update={"high": max(m.high, 2 * bound), "note": note})
        return m

    def _findings(self, total: Total) -> dict[str, Finding]:
        found = {}
        for metric, asked in self._asked.items():
            finding = asked.find(total, *self._thresholds(metric))
            if finding is not None:
                found[metric] = finding
        return found

    def _thresholds(self, metric: str) -> tuple[float, float]:
        """The evidence (logarithm) at which a boundary is excluded from below, and from above."""
        terms = self.terms
        weight = terms.ledger.weights.get((terms.gate, metric), 1.0)
        broken, kept = -math.log(terms.false_rollback * weight), -math.log(terms.false_promotion)
        bound = self.bounds[metric]
        both = max(broken, kept)
        return (
            both if bound.min is not None and bound.max is not None else broken if bound.max is not None else kept,
            both if bound.min is not None and bound.max is not None else kept if bound.max is not None else broken,
        )

    def _ledger(self, findings: Mapping[str, Finding]) -> Ledger:
        logs = {metric: finding.broken for metric, finding in findings.items() if metric != CEILING}
        return self.terms.ledger.with_(self.terms.gate, logs)

    def _by_closed_testing(self, metric: str, low: float, high: float, ledger: Ledger) -> tuple[float, float]:
        """Where the ledger names this check, its interval lies outside the bound: sooner than by its share alone."""
        bound, key = self.bounds[metric], (self.terms.gate, metric)
        if key not in ledger.weights or not ledger.guilty(key, self.terms.false_rollback):
            return low, high
        if bound.max is not None and bound.min is None and low <= bound.max < high:
            return float(np.nextafter(bound.max, math.inf)), high
        if bound.min is not None and bound.max is None and low < bound.min <= high:
            return low, float(np.nextafter(bound.min, -math.inf))
        return low, high

    def _missing(self, finding: Finding, total: Total) -> str:
        """What a check that is undecided lacks, in words: the evidence so far, carried on at its own pace."""
        terms = self.terms
        sides = ((finding.kept, -math.log(terms.false_promotion)), (finding.broken, -math.log(terms.false_rollback)))
        paces = [more for log, wanted in sides if (more := _more(finding.sample, log, wanted)) is not None]
        if not paces:
            return "too near to the bound to say how much is missing"
        more, unit = min(paces), "pairs" if total.pairs and total.pairs == finding.sample else "challenger requests"
        rate = finding.sample / total.seconds if total.seconds else 0.0
        time = f", {duration(more / rate)} at the present rate" if rate else ""
        return f"about {_rounded(more):,} more {unit}{time}"


MOVED = "the champion differs from itself: the environment moves, so nothing is said of the model"


class _Control:
    """Champion against champion, by the gate's own comparisons: what it finds, the environment did."""

    def __init__(self, head: Head, bounds: Mapping[str, Bound]) -> None:
        self.blocks = 0
        self._bounds = {m: b for m, b in bounds.items() if m.endswith(("_delta", "_ratio"))}
        self._asked = {m: way_of(m, b, head.model_copy(update={"reference": None})) for m, b in self._bounds.items()}
        self._total = Total(head)
        self._worst = 1.0

    def add(self, block: Block) -> None:
        if block.control is None or not self._asked:
            return
        one, two = block.control
        pseudo = Block(seconds=block.seconds, challenger=(one,), champion=(two,))
        self._total.add(pseudo)
        for asked in self._asked.values():
            asked.add(pseudo, self.blocks)
        self.blocks += 1
        logs = []
        for asked in self._asked.values():
            finding = asked.find(self._total, math.inf, math.inf)
            if finding is not None:
                logs.append(finding.broken)
        if logs:
            self._worst = max(self._worst, math.exp(min(float(mixed(np.asarray(logs))), 60.0)))

    def moved(self, alpha: float) -> bool:
        """Whether the champion was found worse than itself."""
        return self._worst >= 1 / alpha

    def measurement(self, alpha: float) -> Measurement:
        """The highest evidence so far. Beyond its bound it blames nobody: so it is undecided then, never failed."""
        moved = self.moved(alpha)
        return Measurement(
            value=self._worst,
            low=0.0 if moved else self._worst,
            high=max(self._worst, 2 / alpha) if moved else self._worst,
            sample=max(self._total.challenger.requests, 1),
            note=MOVED if moved else "",
        )


def read(series: Sequence[Series], bounds: Mapping[str, Bound], terms: Terms) -> Monitor:
    """The monitor after all blocks of the stored series of one gate; the last one is the present step's."""
    monitor = Monitor(series[0].head, bounds, terms)
    for at, part in enumerate(series):
        if at == len(series) - 1:
            monitor.begin_step()
        for block in part.blocks:
            monitor.add(block)
    return monitor


def duration(seconds: float) -> str:
    """A length of time as people say it: 40 s, 19 minutes, 3 hours, 2 days."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _more(sample: int, log: float, wanted: float) -> float | None:
    """How much more of the same brings `log` to `wanted`; None where it does not grow."""
    if not math.isfinite(log) or log <= 0.05:
        return None
    return max(sample * (wanted - log) / log, 1.0)


def _rounded(number: float) -> int:
    digits = 2 - len(f"{number:.0f}")
    return int(round(number, digits)) if digits < 0 else math.ceil(number)


def _least(metric: str) -> float:
    return -1.0 if metric.endswith("_delta") else 0.0


def _most(metric: str) -> float:
    return 1.0 if metric.endswith("_delta") else math.inf

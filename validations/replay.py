"""Judging past evidence again: under the policy it was judged by, or under another one.

Pure. What was observed is kept as blocks of counts (`validations.monitor.Series`), so intervals, ledger and verdicts
come out the same wherever they are computed, and under other bounds as they would have then.
"""

from collections.abc import Mapping
from typing import Any

from validations.gates import Canary
from validations.ledger import Ledger, weights
from validations.monitor import Terms, read
from validations.policy import ROLLBACK, Policy, Step
from validations.promotion import Promotion
from validations.series import Series
from validations.verdict import Evidence, Outcome, Value, Verdict, judge

Data = Mapping[str, Mapping[str, Any]]
"""The evidence files of a promotion, by step: `series`, `earlier` and what else the step kept."""


class Judged(Value):
    """A step judged again. `verdict` is None where nothing was observed that it could be judged by."""

    step: str
    verdict: Verdict | None


class Replayed(Value):
    """A promotion judged again, up to the first step that does not pass or was not observed."""

    promotion: str
    steps: tuple[Judged, ...]

    @property
    def ended(self) -> str:
        """How it would have ended, in words: "promoted", "failed at load", "not known beyond shadow"."""
        last = self.steps[-1]
        if last.verdict is None:
            seen = self.steps[-2].step if len(self.steps) > 1 else "the beginning"
            return f"not known beyond {seen}"
        if last.verdict.outcome is Outcome.PASSED:
            return "promoted"
        return f"{last.verdict.outcome.value} at {last.step}"


def replay(promotion: Promotion, data: Data, policy: Policy | None = None) -> Replayed:
    """Judge a promotion again. With its own policy (None) every step has the verdict that it had."""
    other = policy is not None
    asked = promotion.policy if policy is None else policy
    first = promotion.champion is None
    ledger = Ledger(weights(asked, first=first))
    recorded = {verdict.step: verdict for verdict in promotion.verdicts if verdict.step != ROLLBACK.name}
    kinds = {step.name: step for step in promotion.plan}
    judged = []
    for step in asked.plan(first=first):
        name = _recorded(step, asked, kinds, recorded) if other else step.name
        if name not in recorded and step.gate is None:
            continue  # an action of the platform, which then had no occasion
        if name not in recorded:
            judged.append(Judged(step=step.name, verdict=None))
            break
        evidence, series = recorded[name].evidence, _series(name, data)
        verdict, ledger = again(asked, step, evidence, series, ledger, first=first)
        judged.append(Judged(step=step.name, verdict=verdict))
        if verdict.outcome is not Outcome.PASSED:
            break
    return Replayed(promotion=promotion.id, steps=tuple(judged))


def ledger_of(promotion: Promotion, data: Data) -> Ledger:
    """The ledger as the steps so far have left it: one that goes on in another process begins with it."""
    first = promotion.champion is None
    ledger = Ledger(weights(promotion.policy, first=first))
    steps = {step.name: step for step in promotion.plan}
    for verdict in promotion.verdicts:
        if verdict.step in steps:
            step, series = steps[verdict.step], _series(verdict.step, data)
            _, ledger = again(promotion.policy, step, verdict.evidence, series, ledger, first=first)
    return ledger


def again(
    policy: Policy, step: Step, evidence: Evidence, series: list[Series], ledger: Ledger, *, first: bool
) -> tuple[Verdict, Ledger]:
    """One step's verdict from its evidence and the series behind it, and the ledger after it."""
    bounds = policy.bounds(step, first=first)
    if series and step.gate is not None:
        gate = policy.gates[step.gate]
        name = gate.name or gate.kind
        terms = Terms(policy.false_rollback, policy.false_promotion, ledger, name, gate.min_sample)
        monitor, slices = read(series, gate.bounds(first=first), terms), series[-1].slices
        evidence = evidence.model_copy(update={"measurements": {**evidence.measurements, **monitor.look(None, slices)}})
        ledger = monitor.ledger(slices)
    return judge(step.name, bounds, evidence, policy.min_sample(step)), ledger


def different(promotion: Promotion, replayed: Replayed) -> list[str]:
    """The steps whose verdict is not the recorded one to the bit: outcome, checks, values and intervals."""
    recorded = {verdict.step: verdict for verdict in promotion.verdicts}
    return [
        one.step
        for one in replayed.steps
        if one.step in recorded and (one.verdict is None or _said(one.verdict) != _said(recorded[one.step]))
    ]


def _said(verdict: Verdict) -> tuple[Outcome, list[str]]:
    # Words may be put better from one release to the next; numbers may not change.
    return verdict.outcome, sorted(check.model_dump_json(exclude={"measured": {"note"}}) for check in verdict.checks)


def _recorded(step: Step, policy: Policy, kinds: Mapping[str, Step], recorded: Mapping[str, Verdict]) -> str:
    """The recorded step whose evidence can stand for `step`: of its name, or of its kind; of a canary the one with the
    highest weight that is not above it, or at the deciding weight the last one.
    """
    if step.name in recorded:
        return step.name
    alike = [name for name in recorded if name in kinds and kinds[name].kind == step.kind]
    gate = None if step.gate is None else policy.gates[step.gate]
    if isinstance(gate, Canary) and step.weight is not None and step.weight < gate.deciding:
        alike = [name for name in alike if (kinds[name].weight or 0) <= step.weight]
    return alike[-1] if alike else ""


def _series(name: str, data: Data) -> list[Series]:
    """What stands behind a step: earlier series of its gate, and its own last."""
    kept = data.get(name, {})
    if "series" not in kept:
        return []
    return [Series.model_validate(part) for part in (*kept.get("earlier", ()), kept["series"])]

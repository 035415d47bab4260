"""A promotion: the plan and the verdicts so far. Phase and next step are derived, never stored."""

from collections.abc import Callable
from enum import StrEnum
from typing import Self

from pydantic import model_validator

from validations.policy import ROLLBACK, Policy, Step
from validations.verdict import Bound, Outcome, Value, Verdict


class Phase(StrEnum):
    """Where a promotion stands. DEGRADED: a rollback did not pass, so a person must look."""

    RUNNING = "running"
    AWAITING_APPROVAL = "awaiting approval"
    ROLLING_BACK = "rolling back"
    PROMOTED = "promoted"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled back"
    DEGRADED = "degraded"

    @property
    def final(self) -> bool:
        """Whether nothing more will happen."""
        return self not in (Phase.RUNNING, Phase.AWAITING_APPROVAL, Phase.ROLLING_BACK)


class Promotion(Value):
    """One attempt of `challenger` (a version number) on the place of `champion` (None: there is none yet)."""

    id: str
    champion: str | None
    challenger: str
    digest: str
    policy: Policy
    verdicts: tuple[Verdict, ...] = ()

    @model_validator(mode="after")
    def _follows_the_plan(self) -> Self:
        names = [verdict.step for verdict in self.verdicts]
        stopped = next((i for i, v in enumerate(self.verdicts) if v.outcome is not Outcome.PASSED), None)
        gone = names if stopped is None else names[: stopped + 1]
        after = names[len(gone) :]
        if gone == [ROLLBACK.name] or gone != [step.name for step in self.plan[: len(gone)]]:
            raise ValueError(f"these verdicts do not follow the plan: {names}")
        if after not in ([], [ROLLBACK.name]) or (after and not self._deployed(gone)):
            raise ValueError(f"after a step that did not pass there is only a rollback: {names}")
        return self

    @property
    def plan(self) -> tuple[Step, ...]:
        """The steps, without the rollback that may follow."""
        return self.policy.plan(first=self.champion is None)

    @property
    def stopped_by(self) -> Verdict | None:
        """The verdict that stopped the promotion; None while all passed."""
        return next((verdict for verdict in self.verdicts if verdict.outcome is not Outcome.PASSED), None)

    @property
    def decided_by(self) -> Verdict | None:
        """The verdict that says how it ended: the one that stopped it, or the last."""
        return self.stopped_by or (self.verdicts[-1] if self.verdicts else None)

    @property
    def reached_live(self) -> bool:
        """Whether live requests may have reached the challenger."""
        kinds = {step.name: step.kind for step in self.plan}
        return any(kinds.get(verdict.step) in ("canary", "promote") for verdict in self.verdicts)

    def next_step(self) -> Step | None:
        """What comes next; None at the end."""
        if self.stopped_by is None:
            rest = self.plan[len(self.verdicts) :]
            return rest[0] if rest else None
        names = [verdict.step for verdict in self.verdicts]
        return ROLLBACK if self._deployed(names) and ROLLBACK.name not in names else None

    @property
    def phase(self) -> Phase:
        """Where this stands, from the verdicts alone."""
        step = self.next_step()
        if self.stopped_by is None:
            if step is None:
                return Phase.PROMOTED
            return Phase.AWAITING_APPROVAL if step.kind == "approval" else Phase.RUNNING
        if step is not None:
            return Phase.ROLLING_BACK
        last = self.verdicts[-1]
        if last.step == ROLLBACK.name and last.outcome is not Outcome.PASSED:
            return Phase.DEGRADED
        return Phase.ROLLED_BACK if self.reached_live else Phase.REJECTED

    def bounds(self, step: Step) -> dict[str, Bound]:
        """What `step` must show in this promotion."""
        return self.policy.bounds(step, first=self.champion is None)

    def record(self, verdict: Verdict) -> "Promotion":
        """This promotion with one verdict more. Raises ValueError if it is not the next step's."""
        step = self.next_step()
        if step is None or verdict.step != step.name:
            raise ValueError(f"the next step is {step.name if step else 'none'}, not {verdict.step}")
        return Promotion(**{**dict(self), "verdicts": (*self.verdicts, verdict)})

    @staticmethod
    def _deployed(names: list[str]) -> bool:
        return "deploy" in names


def drive(
    promotion: Promotion,
    perform: Callable[[Promotion, Step], Verdict],
    save: Callable[[Promotion], None],
) -> Promotion:
    """Take a promotion to its end: while there is a next step, perform it, record it, save it."""
    while (step := promotion.next_step()) is not None:
        promotion = promotion.record(perform(promotion, step))
        save(promotion)
    return promotion

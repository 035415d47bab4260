"""Who looks after promotions that no process performs: those that wait, and those that a flow run can go on with.

Light, for `watch` runs for ever.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from deployments.target import ServingTarget
from tasks import flowruns
from tasks.flowruns import FlowRun, Unanswered
from tasks.journal import Open
from tasks.settings import Mistake, Settings

PATIENCE = 120.0
"""Seconds that a flow run has from being asked for until it holds the lease of its model."""
BEGINS = 45.0
"""Seconds that a flow run which has just started has until then."""
MOST_RUNS = 3
"""How often a flow run is started; what it leaves behind then goes back."""
MOST_REVIVED = 10
"""How many flow runs are asked for, one after the other, that should go on with what waits."""
REPEATABLE = ("integrity", "schema", "features", "quality", "deploy", "shadow")
"""The kinds of step that give nothing to live requests, and come to the same where they are performed again."""


@dataclass(slots=True)
class Waiting:
    """Sees to it that each such promotion has a flow run which can go on with it."""

    settings: Settings
    target: ServingTarget

    def tend(self, left: Open) -> bool:
        """Look after `left`, whose lease nobody holds. Returns whether it is to be brought to its end now, by
        `recover`; else somebody goes on with it, now or when what it waits for is there. Raises `Unanswered` and
        `Mistake` where Prefect cannot be asked.
        """
        if left.asked is not None and datetime.now(UTC) >= left.asked.until:
            return True
        try:
            run = performer(self.settings, left)
        except Unanswered:
            if left.waiting:
                raise
            return True
        if run is not None and run.type.startswith("CANCELL"):
            return True
        if not left.waiting:
            return not self._goes_on(left, run)
        if left.held and left.until is None:  # paused: it is for a person to resume it, in the time that was given
            return run is None or run.type == "FAILED"
        if left.until is None or datetime.now(UTC) >= left.until:
            self._revive(left, run)
        return False

    def _goes_on(self, left: Open, run: FlowRun | None) -> bool:
        """Whether the flow run of a promotion that was left behind goes on with it: started again where that is
        safe.
        """
        if run is None or run.deployment is None or not _safe(left):
            return False
        patience = {"SCHEDULED": PATIENCE, "PENDING": PATIENCE, "RUNNING": BEGINS}.get(run.type, 0.0)
        if run.type == "PAUSED" or _waited(run) < patience:
            return True
        return self._again(left, run)

    def _again(self, left: Open, run: FlowRun) -> bool:
        if run.runs >= MOST_RUNS or run.type in ("COMPLETED", "FAILED"):
            return False
        message = f"{left.id} was left behind by its process: it goes on"
        flowruns.settle(self.settings, run.id, "SCHEDULED", message, "AwaitingRetry")
        return True

    def _revive(self, left: Open, run: FlowRun | None) -> None:
        """Let a flow run go on with what waits, where there is none that will."""
        if run is not None and run.type == "PAUSED":
            return
        if run is not None and not run.over:
            if _waited(run) < PATIENCE or run.type == "SCHEDULED":
                return
            flowruns.settle(self.settings, run.id, "SCHEDULED", f"{left.id} waits: it goes on", "AwaitingRetry")
            return
        if len(flowruns.tagged(self.settings, tag(left.id))) >= MOST_REVIVED:
            raise Mistake(
                f"{left.id} waits, and the flow runs that should go on with it keep ending: read the last one's log in "
                "the Prefect UI, or cancel it there, which ends the promotion"
            )
        ask_to_go_on(self.settings, left.model, left.id, after=run.id if run else "")


def performer(settings: Settings, left: Open) -> FlowRun | None:
    """The flow run that goes on with `left`, or performed it last; None where there is none. Raises `Unanswered`."""
    if revived := flowruns.tagged(settings, tag(left.id)):
        return revived[0]
    return flowruns.find(settings, left.flow_run) if left.flow_run else None


def ask_to_go_on(
    settings: Settings, model: str, promotion: str, *, at: datetime | None = None, after: str = ""
) -> FlowRun:
    """Ask for a flow run that goes on with `promotion`, now or `at` a time: one, however often it is asked for. `after`
    is the run that did so before. Raises `Unanswered`, and `Mistake` without the deployment.
    """
    key = f"{promotion} goes on after {after}"
    parameters = {"model": model, "promotion": promotion}
    return flowruns.create(settings, flowruns.PROMOTE, parameters, key=key, tags=[tag(promotion)], at=at)


def tag(promotion: str) -> str:
    """The tag of the flow runs that go on with a promotion."""
    return f"promotion/{promotion}"


def _waited(run: FlowRun) -> float:
    return (datetime.now(UTC) - run.since).total_seconds()


def _safe(left: Open) -> bool:
    now = left.promotion
    step = None if now is None else now.next_step()
    return now is not None and step is not None and now.stopped_by is None and step.kind in REPEATABLE

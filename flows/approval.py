"""Waiting for people and for hours: what cannot go on now ends its process, and a flow run goes on with it later."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

from prefect.context import FlowRunContext
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from tasks import approve, flowruns, history, notify
from tasks.context import Context, Seen
from tasks.journal import Open, opened
from tasks.progress import say
from tasks.settings import Mistake, Settings
from tasks.waiting import ask_to_go_on, performer
from validations.approval import Asked, decide
from validations.policy import Step
from validations.promotion import Promotion
from validations.quiet import quiet_until

SLACK = timedelta(hours=1)
"""How long after ours Prefect's own time limit of a suspended run comes: `watch` ends an approval that expired."""
LIVE = ("canary", "promote")
"""The kinds of step that give live requests to the challenger: none of them begins in quiet hours."""


class Waits(Exception):
    """A promotion cannot go on now. It has all been written down, and all live traffic is with the champion."""

    def __init__(self, promotion: Promotion, why: str) -> None:
        super().__init__(why)
        self.promotion = promotion


class Awaiting(Waits):
    """It waits for people: `asked` of them, with what `text` shows them."""

    def __init__(self, promotion: Promotion, asked: Asked, text: str) -> None:
        super().__init__(promotion, f"waits for people until {asked.until:%Y-%m-%d %H:%M} UTC")
        self.asked, self.text = asked, text


class Held(Waits):
    """It waits for an hour: `until` then."""

    def __init__(self, promotion: Promotion, until: datetime, step: str) -> None:
        super().__init__(promotion, f"these are quiet hours: `{step}` begins at {until:%Y-%m-%d %H:%M} UTC")
        self.until = until


class Form(RunInput):
    """What an approver fills in, in the Prefect UI."""

    decision: Literal["approve", "reject"] = Field(title="Decision")
    approver: str = Field(title="Approver", description="Your name, as the policy has it", min_length=1)
    code: str = Field(
        title="Code", description="Your one-time code, or a token of `titleshot approve --token-only`", min_length=1
    )
    comment: str = Field(default="", title="Comment")


@dataclass(frozen=True, slots=True)
class Given:
    """A form as it came back, `at` a time; no form where the run was resumed without one."""

    asked: Asked
    form: Form | None
    at: datetime


def own_run() -> UUID | None:
    """The flow run that this process performs; None outside of one."""
    context = FlowRunContext.get()
    return None if context is None or context.flow_run is None else context.flow_run.id


def _runs() -> int:
    context = FlowRunContext.get()
    return 0 if context is None or context.flow_run is None else context.flow_run.run_count


def can_suspend() -> bool:
    """Whether this flow run can be suspended: it came from a deployment."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def approval(context: Context, promotion: Promotion, step: Step) -> Seen:
    """What people have decided. Raises `Awaiting` while they have not, with all live traffic back on the champion."""
    left = opened(context.target, context.model)
    assert left is not None
    now, gate, run_id = datetime.now(UTC), approve.gate_of(promotion, step), history.entry(promotion.id).run_id
    of = approve.subject(context, promotion, step, run_id)
    until = now + gate.timeout if left.asked is None else left.asked.until
    evidence = decide(gate, left.ballots, of.digest, until, now)
    if evidence is not None:
        approve.asks_no_more(run_id)
        return Seen(dict(evidence.measurements), evidence.note, {"approval": approve.kept(left)})
    _champion_alone(context)
    asked, mine = left.asked, str(own_run() or "")
    answered = {ballot.round for ballot in left.ballots}
    if asked is None or asked.round in answered or asked.flow_run != mine:
        asked = approve.ask(context, promotion, of, left, mine, run_id)
    raise Awaiting(promotion, asked, approve.shown(context, promotion, asked, left.ballots, run_id))


def hold(context: Context, promotion: Promotion, step: Step) -> None:
    """Raise `Held` where `step` would give live requests to the challenger and the policy's hours are quiet."""
    if step.kind not in LIVE or not promotion.policy.quiet:
        return
    until = quiet_until(promotion.policy.quiet, datetime.now(UTC))
    if until is None:
        return
    _champion_alone(context)
    held = Held(promotion, until, step.name)
    context.journal.hold(until, str(held))
    raise held


def _champion_alone(context: Context) -> None:
    # Nobody watches meanwhile.
    if context.champion is not None:
        context.target.route(context.traffic(context.champion.number), context.fence)


def wait_for_form(settings: Settings, waiting: Awaiting) -> Given:
    """The form that was asked for: this suspends the flow run and ends the process (by Prefect's `Pause`) until it is
    resumed.
    """
    asked, run = waiting.asked, str(own_run())
    if _paused(settings, run):
        # By hand, meanwhile: Prefect would keep that pause, which has no form. It is asked for once that is over.
        say(f"{asked.subject.promotion}: paused in the Prefect UI: people are asked once it is resumed")
        raise Pause
    _announce(settings, waiting, run)
    left = max(asked.until - datetime.now(UTC), timedelta(0)) + SLACK
    form = Form.with_initial_data(description=waiting.text)
    # A run that is retried may not suspend by a key that it had before; one that is resumed must.
    # A run that goes through several regions has a form in each.
    key = f"{history.slug(f'{asked.region} {asked.subject.step}'.lstrip())}-{asked.round}-{_runs()}"
    try:
        given = suspend_flow_run(wait_for_input=form, timeout=int(left.total_seconds()), key=key)
    except Exception as error:  # noqa: BLE001 - whatever brought it here, it was not the form
        say(f"resumed without the form: {' '.join(str(error).split())[:200]}")
        return Given(asked, None, datetime.now(UTC))
    try:
        at = flowruns.given_at(settings, run, key)
    except flowruns.Unanswered:
        at = None
    # A one-time code is as old as its form, however long this process took to begin.
    return Given(asked, given, at or datetime.now(UTC))


def _paused(settings: Settings, run: str) -> bool:
    try:
        found = flowruns.find(settings, run)
    except flowruns.Unanswered:
        return False
    return found is not None and found.type == "PAUSED"


def hand_over(settings: Settings, waiting: Waits, *, at: datetime | None = None) -> str:
    """Ask for a run of the deployment that goes on with what waits, now or `at` a time, and return the run's page; why
    there is none where Prefect is away: `watch` asks for it later.
    """
    promotion = waiting.promotion
    try:
        run = ask_to_go_on(settings, promotion.policy.model, promotion.id, at=at, after=str(own_run() or ""))
    except (flowruns.Unanswered, Mistake) as error:
        return f"no flow run goes on with it yet: {error}"
    return flowruns.page(settings, run.id)


def let_go(settings: Settings, left: Open, phase: str) -> None:
    """End the flow run that would go on with a promotion which another process has brought to its end."""
    try:
        run = performer(settings, left)
        if run is None or run.id == str(own_run()):
            return
        if run.type in ("PAUSED", "SCHEDULED"):
            flowruns.settle(settings, run.id, "CANCELLED", f"{left.id} is {phase}: there is nothing left to go on with")
        elif run.type in ("PENDING", "RUNNING"):
            # Its process has died without a word: it would count as under way, and hold a place of the pool, for ever.
            flowruns.settle(settings, run.id, "CRASHED", f"its process ended; {left.id} is {phase}")
    except (flowruns.Unanswered, Mistake) as error:
        say(f"the flow run that asked cannot be ended: {error}")


def _announce(settings: Settings, waiting: Awaiting, run: str) -> None:
    asked, page = waiting.asked, flowruns.page(settings, run)
    say(f"{asked.subject.promotion}: {waiting} (round {asked.round}): {page}")
    notify.tell(settings, notify.of("approval needed", waiting.promotion, page, asked=asked.round))

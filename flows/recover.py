"""Promotions that their process left behind: forward or back to agreement, by the journal, each step once."""

import secrets
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from deployments.target import Fence, LeaseHeld, ServingTarget, StaleFence, TargetError, Traffic
from flows.drive import carry, flow_run_tags, outcome
from tasks import flowruns, history, moved, notify, pool, registry, swap
from tasks.agreement import leased, leased_soon, patiently
from tasks.context import Contender, Context, Seen
from tasks.journal import BY_HAND, Journal, Open, agreed, opened
from tasks.observe import Notebook
from tasks.progress import say
from tasks.registry_rest import Refused, Unanswered
from tasks.settings import Mistake, Settings
from tasks.status import said, sides
from tasks.targets import settings_target
from tasks.waiting import performer
from validations.ledger import Ledger, weights
from validations.policy import ACTIONS, ROLLBACK, Policy
from validations.series import Arm
from validations.verdict import Outcome, judge


def recover(settings: Settings, model: str, patience: float) -> dict[str, Any] | None:
    """Bring what was left behind of `model` to its end; None where nothing was. Returns as a promotion does.

    Waits `patience` seconds for the lease of a dead process to lapse. Raises `LeaseHeld` where it is held for longer:
    then somebody is at work, and nothing is left behind.
    """
    settings.connect(needed=())
    target = settings_target(settings)
    left = opened(target, model)
    if left is None:
        return None
    ended = cancelled(settings, left)
    if left.waiting and not ended and not expired(left):
        return None
    with leased_soon(target, model, f"recovery of {left.id} ({secrets.token_hex(2)})", patience) as fence:
        return finish(settings, target, model, fence, ended)


def expired(left: Open) -> bool:
    """Whether nobody decided in time what waits for people."""
    return left.asked is not None and datetime.now(UTC) >= left.asked.until


def cancelled(settings: Settings, left: Open) -> str:
    """Why what is open goes back although it might go on: someone cancelled its flow run. Empty where nobody did, or
    Prefect does not answer.
    """
    try:
        run = performer(settings, left)
    except (flowruns.Unanswered, Mistake):
        return ""
    if run is not None and run.type.startswith("CANCELL"):
        return "its flow run was cancelled in Prefect"
    if (run is None or run.type == "FAILED") and left.held and left.until is None:
        return "it was paused in Prefect and not resumed within the time that was given there"
    return ""


def soon(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001 - Prefect calls its hooks by these names
    """Bring to its end what a cancelled flow run has left, now rather than when `watch` looks."""
    command = [sys.executable, "-m", "flows", "recover", str(flow_run.parameters["model"])]
    subprocess.run(command, check=False, stdin=subprocess.DEVNULL)


def finish(
    settings: Settings, target: ServingTarget, model: str, fence: Fence, ended: str = ""
) -> dict[str, Any] | None:
    """Bring what the journal has open of `model` to its end, under `fence`; None where there is nothing.

    `ended` is why it has ended where it was not its process that died: it goes back then, wherever it stood. Raises
    `Unrecorded` where traffic is as it should be and the registry does not answer.
    """
    left = opened(target, model)
    if left is None or (left.waiting and not ended and not expired(left)):
        return None
    say(f"{left.id} has begun and not ended: it goes to its end now")
    context = swap.resumed(settings, target, model, fence, left)
    context.folder.mkdir(parents=True, exist_ok=True)
    if left.promotion is None:
        return _followed(context, left) if left.what == BY_HAND else _rolled_back(context, left)
    policy = left.promotion.policy
    # A watch goes on with what was seen of it; the evidence of the gates before is in their verdicts.
    context.ledger = Ledger(weights(policy, first=left.promotion.champion is None))
    context.reference = None if left.reference is None else Arm.model_validate(left.reference)
    watches = {gate.name or gate.kind for gate in policy.gates if gate.kind == "watch"}
    for name, series in Notebook.read(context.folder):
        if name in watches and series.blocks:
            context.series.setdefault(name, []).append(series)
    return outcome(carry(context, left.promotion, left.policy_text, left.tags or {}, left, ended))


def _told(context: Context) -> Seen:
    try:
        return swap.tell(context)
    except (registry.Moved, TargetError) as error:
        return swap.failed(str(error))


def _rolled_back(context: Context, left: Open) -> dict[str, Any]:
    """Let registry, record and journal follow a rollback by hand, whose traffic has moved or moves now."""
    model = context.model
    swap.back(context.settings, context.target, model, context.fence, left.reason)
    seen = _told(context)
    verdict = judge(ROLLBACK.name, ACTIONS["rollback"], seen.evidence())
    passed = verdict.outcome is Outcome.PASSED
    phase = "rolled back" if passed else "degraded"
    why = left.reason if passed else verdict.why

    def record() -> None:
        if passed:
            quarantine = f"{phase} in {left.id}: {left.reason}"
            with context.guard():
                registry.tag(model, left.of, phase=phase, outcome="", verdict=left.reason, quarantine=quarantine)
                story = f"rollback of v{left.of}: {left.reason}"
                tags = {"phase": "promoted", "outcome": "", "promotion": left.id, "verdict": story, "quarantine": ""}
                registry.tag(model, left.to, **tags)
        history.rolled_back(left, phase, why, verdict, flow_run_tags())

    patiently(record, f"v{left.to} answers every live request again")
    notify.tell(context.settings, _by_hand(left, phase, why, context.settings))
    traffic = context.target.traffic(model)
    digests = {c.number: c.recorded for c in (context.champion, context.challenger) if c is not None and c.recorded}
    context.journal.end(phase, traffic.champion if traffic else None, left.of, digests)
    say(f"{left.id}: {phase} - {seen.note}")
    return {
        "model": model,
        "promotion": left.id,
        "from": left.of,
        "to": left.to,
        "phase": phase,
        "why": seen.note if passed else verdict.why,
    }


def _by_hand(left: Open, phase: str, why: str, settings: Settings) -> notify.Notice:
    """The notice of a rollback by hand, and of an alias moved by hand that the traffic followed."""
    return notify.Notice(
        kind="rolled back" if phase == "rolled back" else "degraded",
        model=left.model,
        promotion=left.id,
        title=f"{left.model}: v{left.of} made room for v{left.to}",
        body=why,
        link=f"{settings.mlflow_page}/#/models/{left.model}",
        key=f"{left.id} {phase}",
    )


def follow(settings: Settings, model: str) -> dict[str, Any] | None:
    """Let the traffic follow an alias champion that a hand has moved, where the model's policy says so; None where
    there is nothing to follow, or somebody is at work. Returns as a rollback by hand does.

    Raises `Mistake` and `TargetError` where that version cannot serve: then it is as before, and remembered, so that
    `status` tells it and `watch` tries again later.
    """
    settings.connect(needed=())
    target, own = settings_target(settings), moved.followed_by(settings, model)
    if own is None:
        return None
    try:
        with leased(target, model, f"following the alias champion of {model} ({secrets.token_hex(2)})") as fence:
            found = moved.facts(settings, target, model, target.traffic(model))
            to = None if opened(target, model) is not None else found.moved_to
            if found.serving is None or to is None:
                return None
            say(f"the alias champion of {model} was moved by hand to v{to}: the traffic follows")
            return _follow(settings, target, fence, found.serving, to, own[2])
    except LeaseHeld:
        return None
    except (Unanswered, Refused) as error:
        raise Mistake(str(error)) from error


def _follow(
    settings: Settings, target: ServingTarget, fence: Fence, of: str, to: str, policy: Policy
) -> dict[str, Any] | None:
    model, left = fence.model, None
    identifier = f"{model}-v{to}-hand-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    fresh = to not in target.deployed(model)
    try:
        arrived = _admitted(settings, model, to)
        # Nothing is begun before it could serve at once.
        target.deploy(arrived.version(settings.env_manager), fence)
        Journal(target, fence, identifier).begin_by_hand(of, to, HAND)
        left = opened(target, model)
        assert left is not None
        context = swap.resumed(settings, target, model, fence, left)
        context.challenger, context.policy = arrived, policy
        target.route(context.traffic(to), fence)
    except StaleFence:
        raise
    except (Mistake, TargetError) as error:
        moved.refuse(settings, model, to, str(error))
        if left is not None:
            swap.stays(target, model, fence, left)
        if fresh:
            with suppress(TargetError):
                target.retire(model, to, fence)
        raise
    return _followed(context, left)


HAND = "the alias champion was moved by hand in MLflow"


def _admitted(settings: Settings, model: str, number: str) -> Contender:
    """A version that nobody has promoted, as it was first seen. Raises `Mistake` for one that is not, or is refused."""
    registered = registry.find(model, number)
    path, recorded, found = registry.admit(registered, settings.home)
    if recorded != found:
        if path != registry.local_path(registered, settings.home):
            shutil.rmtree(path, ignore_errors=True)
        raise Mistake(f"the artifact of {registered.name} has changed: its digest is {found}, recorded was {recorded}")
    if why := registry.quarantined(model, recorded):
        raise Mistake(f"{registered.name} is quarantined, its artifact unchanged: {why}")
    return Contender(registered, path, recorded, found)


def _followed(context: Context, left: Open) -> dict[str, Any]:
    """Let registry, record and journal follow an alias that a hand has moved, where the traffic did; else nothing has
    happened.
    """
    model, target = context.model, context.target
    ends = {"model": model, "promotion": left.id, "from": left.of, "to": left.to}
    traffic = target.traffic(model)
    if traffic is None or traffic.champion != left.to:
        swap.stays(target, model, context.fence, left)
        return {**ends, "phase": "interrupted", "why": f"it ended before traffic moved: v{left.of} serves as before"}
    seen = _told(context)
    verdict = judge("promote", ACTIONS["promote"], seen.evidence())
    passed = verdict.outcome is Outcome.PASSED
    phase, why = ("promoted", left.reason) if passed else ("degraded", verdict.why)
    digests = {one.number: one.recorded for one in (context.champion,) if one is not None and one.recorded}

    def record() -> None:
        if registry.aliased(model, registry.CHALLENGER) == left.to:
            registry.move(model, registry.CHALLENGER, None, of=(left.to,), guard=context.guard())
        digests[left.to] = registry.find(model, left.to).tags[registry.TAG + "digest"]
        with context.guard():
            registry.tag(model, left.to, phase=phase, outcome="", promotion=left.id, verdict=why)
        history.rolled_back(left, phase, why, verdict, flow_run_tags())

    patiently(record, f"v{left.to} answers every live request")
    spare = pool.spare(target, model, {left.of, left.to, *traffic.live}, pool.blamed(model))
    pool.take_down(target, model, spare, context.fence)
    context.journal.end(phase, left.to, left.of, digests)
    moved.forget(context.settings, model)
    say(f"{left.id}: {phase} - {seen.note}")
    return {**ends, "phase": phase, "why": f"{why}; {seen.note}" if passed else why}


def mend(settings: Settings, model: str, patience: float) -> list[str]:
    """Bring alias, journal and traffic of `model` together, on request, then stages and the other aliases; returns what
    was done, in words.

    What was left behind goes to its end. Otherwise two of the three that agree outvote the third, and traffic is moved
    only where alias and journal both say so. Raises `Mistake` where all three differ.
    """
    settings.connect(needed=())
    if (done := recover(settings, model, patience)) is not None:
        return [f"{done['promotion']} was left behind; it is {done['phase']} now"]
    target = settings_target(settings)
    with leased(target, model, f"mending {model} ({secrets.token_hex(2)})") as fence:
        try:
            found = moved.facts(settings, target, model, target.traffic(model))
            mended = _together(target, fence, found)
            if mended:
                found = moved.facts(settings, target, model, target.traffic(model))
        except (Unanswered, Refused) as error:
            raise Mistake(str(error)) from error
        return [*mended, *moved.restore(target, fence, found)]


def _together(target: ServingTarget, fence: Fence, found: moved.Facts) -> list[str]:
    """Bring alias champion, journal and traffic together."""
    model, alias, journal, serving = found.model, found.alias, found.journal, found.serving
    last, traffic = agreed(target, model), target.traffic(model)
    if alias == serving == journal:
        return []
    if serving is not None and journal == serving:
        registry.move(model, registry.CHAMPION, serving, of=(alias,), guard=target.guard(fence))
        return [f"the alias champion of {model} named {said(alias)}, and names {said(serving)} again, which serves"]
    if traffic is not None and journal is not None and journal == alias:
        if journal not in target.deployed(model):
            raise Mistake(f"{model} {said(journal)} is champion by alias and journal, and is not deployed: promote it")
        gone = traffic.shape.versions - {*target.deployed(model)}
        target.route(Traffic(model, journal, shape=traffic.shape.without(gone)), fence)
        return [f"{model} {said(journal)} serves again, as alias and journal say; {said(serving)} did"]
    if last is not None and serving == alias:
        Journal(target, fence, last.promotion).end(last.phase, serving, last.previous, last.digests)
        return [f"the journal of {model} said {said(journal)}; gateway and alias agree on {said(serving)}"]
    raise Mistake(
        f"{model}: {sides(alias, journal, serving)}: set the alias, in the MLflow UI, to the version that should "
        "serve, then mend again"
    )

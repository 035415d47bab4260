"""Promotions that their process left behind: forward or back to agreement, by the journal, each step once."""

import secrets
import time
from typing import Any

from deployments.target import Fence, LeaseHeld, ServingTarget, TargetError, Traffic
from flows.drive import carry, flow_run_tags, outcome
from tasks import history, registry, swap
from tasks.agreement import leased, patiently
from tasks.context import Context
from tasks.journal import Journal, Open, agreed, opened
from tasks.observe import Notebook
from tasks.progress import say
from tasks.settings import Mistake, Settings
from tasks.stack import settings_target
from tasks.status import said, sides
from validations.ledger import Ledger, weights
from validations.policy import ACTIONS, ROLLBACK
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
    if left is None or left.waiting:
        return None
    end, told = time.monotonic() + patience, False
    while True:
        try:
            with leased(target, model, f"recovery of {left.id} ({secrets.token_hex(2)})") as fence:
                return finish(settings, target, model, fence)
        except LeaseHeld as held:
            if time.monotonic() > end:
                raise
            if not told:
                say(f"{held}: waiting for that")
            told = True
            time.sleep(0.5)


def finish(
    settings: Settings, target: ServingTarget, model: str, fence: Fence, ended: str = ""
) -> dict[str, Any] | None:
    """Bring what the journal has open of `model` to its end, under `fence`; None where there is nothing.

    `ended` is why it has ended where it was not its process that died: it goes back then, wherever it stood. Raises
    `Unrecorded` where traffic is as it should be and the registry does not answer.
    """
    left = opened(target, model)
    if left is None or (left.waiting and not ended):
        return None
    say(f"{left.id} has begun and not ended: it goes to its end now")
    context = swap.resumed(settings, target, model, fence, left)
    context.folder.mkdir(parents=True, exist_ok=True)
    if left.promotion is None:
        return _rolled_back(context, left)
    policy = left.promotion.policy
    # A watch goes on with what was seen of it; the evidence of the gates before is in their verdicts.
    context.ledger = Ledger(weights(policy, first=left.promotion.champion is None))
    context.reference = None if left.reference is None else Arm.model_validate(left.reference)
    watches = {gate.name or gate.kind for gate in policy.gates if gate.kind == "watch"}
    for name, series in Notebook.read(context.folder):
        if name in watches and series.blocks:
            context.series.setdefault(name, []).append(series)
    return outcome(carry(context, left.promotion, left.policy_text, left.tags or {}, left, ended))


def _rolled_back(context: Context, left: Open) -> dict[str, Any]:
    """Let registry, record and journal follow a rollback by hand, whose traffic has moved or moves now."""
    model = context.model
    swap.back(context.settings, context.target, model, context.fence, left.reason)
    try:
        seen = swap.tell(context)
    except (registry.Moved, TargetError) as error:
        seen = swap.failed(str(error))
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


def mend(settings: Settings, model: str, patience: float) -> list[str]:
    """Bring alias, journal and traffic of `model` together, on request; returns what was done, in words.

    What was left behind goes to its end. Otherwise two of the three that agree outvote the third, and traffic is moved
    only where alias and journal both say so. Raises `Mistake` where all three differ.
    """
    settings.connect(needed=())
    if (done := recover(settings, model, patience)) is not None:
        return [f"{done['promotion']} was left behind; it is {done['phase']} now"]
    target = settings_target(settings)
    with leased(target, model, f"mending {model} ({secrets.token_hex(2)})") as fence:
        last, traffic = agreed(target, model), target.traffic(model)
        alias, serving = registry.aliased(model, registry.CHAMPION), traffic.champion if traffic else None
        journal = last.champion if last else serving
        if alias == serving == journal:
            return []
        if serving is not None and journal == serving:
            registry.move(model, registry.CHAMPION, serving, of=(alias,), guard=target.guard(fence))
            return [f"the alias champion of {model} named {said(alias)}, and names {said(serving)} again, which serves"]
        if traffic is not None and journal is not None and journal == alias:
            if journal not in target.deployed(model):
                raise Mistake(
                    f"{model} {said(journal)} is champion by alias and journal, and is not deployed: promote it"
                )
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

"""The operator's button: the previous version becomes champion again, traffic first."""

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.promote import contender, flow_run_tags, leased
from tasks import history, registry, serving
from tasks.context import Context, Seen
from tasks.progress import listening, say
from tasks.settings import Mistake
from tasks.settings import load as load_settings
from tasks.stack import settings_target
from validations.policy import ACTIONS, ROLLBACK
from validations.verdict import Outcome, judge


@flow(name="rollback", flow_run_name="rollback {model}", persist_result=False, retries=0)
def rollback(model: str, reason: str = "by hand") -> dict[str, Any]:
    """Give all traffic of `model` back to the version that the alias `previous` names, and the alias too.

    The version that loses its place keeps `reason` in its tags and is quarantined. Returns model, from,
    to, phase ("rolled back" or "degraded") and why.
    """
    logger = get_run_logger()
    with listening(logger.info):
        return run(model, reason)


def run(model: str, reason: str) -> dict[str, Any]:
    """One rollback, inside a flow run."""
    settings = load_settings()
    settings.connect()
    registry.versions(model)
    champion, previous = (registry.aliased(model, alias) for alias in (registry.CHAMPION, registry.PREVIOUS))
    if champion is None or previous is None:
        missing = registry.CHAMPION if champion is None else registry.PREVIOUS
        raise Mistake(f"{model} has no version with the alias {missing}: there is nothing to roll back to", code=2)
    target = settings_target(settings)
    identifier = f"{model}-rollback-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with leased(target, model, identifier) as fence:
        context = Context(
            model=model,
            settings=settings,
            target=target,
            fence=fence,
            base=Path(),
            folder=settings.home / "promotions" / identifier,
            champion=contender(registry.find(model, champion), settings, serving=True),
            challenger=contender(registry.find(model, previous), settings, serving=True),
            previous=previous,
        )
        say(f"{identifier}: v{previous} takes the place of v{champion} again ({reason})")
        try:
            seen = serving.swap_back(context)
        except Exception as error:  # noqa: BLE001 - traffic may have moved: what happened must be recorded
            seen = Seen({}, f"{type(error).__name__}: {error}")
        verdict = judge(ROLLBACK.name, ACTIONS["rollback"], seen.evidence())
    passed = verdict.outcome is Outcome.PASSED
    phase = "rolled back" if passed else "degraded"
    if passed:
        quarantine = f"{phase} in {identifier}: {reason}"
        registry.tag(model, champion, phase=phase, outcome="", verdict=reason, quarantine=quarantine)
        story = f"rollback of v{champion}: {reason}"
        registry.tag(model, previous, phase="promoted", outcome="", promotion=identifier, verdict=story, quarantine="")
    tags = {"kind": "rollback", "champion": champion, "challenger": previous, "step": ROLLBACK.name}
    run_id = history.open_run(model, identifier, {**tags, "phase": phase, "why": reason, **flow_run_tags()})
    history.log_verdict(run_id, verdict, 1, "")
    history.finish(run_id)
    say(f"{identifier}: {phase} - {seen.note}")
    return {
        "model": model,
        "from": champion,
        "to": previous,
        "phase": phase,
        "why": seen.note if passed else verdict.why,
    }

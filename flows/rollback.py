"""The operator's button: the version that served before becomes champion again, traffic first."""

import secrets
from typing import Any

from prefect import flow, get_run_logger

from flows import recover
from tasks import swap
from tasks.agreement import leased
from tasks.journal import agreed, opened
from tasks.progress import listening
from tasks.settings import load as load_settings
from tasks.stack import settings_target


@flow(name="rollback", flow_run_name="rollback {model}", persist_result=False, retries=0)
def rollback(model: str, reason: str = "by hand", ordered: str | None = None) -> dict[str, Any]:
    """Give all traffic of `model` back to the version that served before, and then the alias too.

    A promotion that is under way ends by it: its challenger loses every request. Otherwise the champion makes room
    for the version before it, keeps `reason` in its tags and is quarantined. `ordered` names a rollback, or a
    promotion, whose traffic has gone back already and which is to be brought to its end. Returns model, from, to,
    phase ("rolled back", "rejected" or "degraded") and why.
    """
    logger = get_run_logger()
    with listening(logger.info):
        return run(model, reason, ordered)


def run(model: str, reason: str, ordered: str | None = None) -> dict[str, Any]:
    """One rollback. Route first: neither MLflow nor Prefect is asked before it holds."""
    settings = load_settings()
    settings.connect(needed=())
    target = settings_target(settings)
    name = ordered or swap.order(settings, target, model, reason).id
    with leased(target, model, f"end of {name} ({secrets.token_hex(2)})", take=True) as fence:
        left = opened(target, model)
        done = None
        if left is not None and left.id == name:
            done = recover.finish(settings, target, model, fence, f"an operator rolled it back: {reason}")
        if done is None:  # somebody else has recovered it meanwhile
            last = agreed(target, model)
            assert last is not None
            ends = {"from": last.previous, "to": last.champion, "phase": last.phase}
            return {"model": model, "promotion": name, **ends, "why": "it was brought to its end by another process"}
    if "from" in done:
        return done
    ends = {"from": done["challenger"], "to": done["champion"], "phase": done["phase"], "why": done["why"]}
    return {"model": model, "promotion": done["promotion"], **ends}

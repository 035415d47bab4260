"""The operator's button: the version that served before becomes champion again, traffic first."""

import secrets
from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from flows import recover
from tasks import swap
from tasks.agreement import leased
from tasks.journal import agreed, opened
from tasks.progress import listening
from tasks.settings import load as load_settings
from tasks.targets import settings_target


@flow(name="rollback", flow_run_name="rollback {model}", persist_result=False, retries=0)
def rollback(
    model: Annotated[str, Field(min_length=1, json_schema_extra={"title": "Model"})],
    reason: Annotated[str, Field(min_length=1, json_schema_extra={"title": "Reason"})] = "by hand",
    ordered: Annotated[str | None, Field(json_schema_extra={"title": "Ordered before"})] = None,
) -> dict[str, Any]:
    """Give all traffic of `model` back to the version that served before, and then the alias too.

    A promotion that is under way ends by it: its challenger loses every request. Otherwise the champion makes room
    for the version before it, and is quarantined. Returns model, from, to, phase ("rolled back", "rejected" or
    "degraded") and why.

    Args:
        model: Name of the registered model.
        reason: Why. Kept in the history and on the version that loses its place.
        ordered: Leave this empty. Names a rollback, or a promotion, whose traffic has gone back already and which is
            to be brought to its end.
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
        # What waited for people would take the place of a version that has it no more.
        recover.finish(settings, target, model, fence, f"an operator rolled the champion back meanwhile: {reason}")
    if "from" in done:
        return done
    ends = {"from": done["challenger"], "to": done["champion"], "phase": done["phase"], "why": done["why"]}
    return {"model": model, "promotion": done["promotion"], **ends}

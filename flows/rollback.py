"""The operator's button: the version that served before becomes champion again, traffic first."""

import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from deployments.target import TargetError
from flows import recover
from tasks import regions, registry, swap
from tasks.agreement import leased
from tasks.journal import agreed, opened
from tasks.progress import listening, say
from tasks.settings import Mistake, within
from tasks.settings import load as load_settings
from tasks.targets import regions_of, settings_target

One = Callable[[str, str], dict[str, Any]]
"""Brings to its end what was ordered in a region: its name, and what was ordered. Returns what `run` does."""


@flow(name="rollback", flow_run_name="rollback {model}", persist_result=False, retries=0)
def rollback(
    model: Annotated[str, Field(min_length=1, json_schema_extra={"title": "Model"})],
    reason: Annotated[str, Field(min_length=1, json_schema_extra={"title": "Reason"})] = "by hand",
    ordered: Annotated[str | None, Field(json_schema_extra={"title": "Ordered before"})] = None,
    region: Annotated[str, Field(json_schema_extra={"title": "Region"})] = "",
) -> dict[str, Any]:
    """Give all traffic of `model` back to the version that served before, and then the alias too.

    A promotion that is under way ends by it: its challenger loses every request. Otherwise the champion makes room
    for the version before it, and is quarantined. Returns model, from, to, phase ("rolled back", "rejected" or
    "degraded") and why; of all regions model, phase, why and regions, a list.

    Args:
        model: Name of the registered model.
        reason: Why. Kept in the history and on the version that loses its place.
        ordered: Leave this empty. Names a rollback, or a promotion, whose traffic has gone back already and which is
            to be brought to its end.
        region: Where a model is served in several: the one that is meant. All that have the version that came last
            otherwise, the newest wave first.
    """
    logger = get_run_logger()
    with listening(logger.info):
        if region:
            with within(region):
                return run(model, reason, ordered)
        if names := regions_of(load_settings(), model):
            done = regions.order(model, names, reason)
            return everywhere(model, reason, done, lambda _, one: run(model, reason, one))
        return run(model, reason, ordered)


def everywhere(model: str, reason: str, ordered: Sequence[regions.Back], one: One) -> dict[str, Any]:
    """Bring to its end what was `ordered` of a model's regions, each whatever becomes of the others.

    Returns model, phase ("rolled back" or "degraded"), why, and regions: of each its name and what `run` returns, as
    far as there is. phase is "" of one that stays as it is, "failed" of one that should have gone back.
    """
    came = [{"region": back.region, **_ended(model, reason, back, one)} for back in ordered]
    bad = [str(each["region"]) for each in came if each["phase"] in ("failed", "degraded")]
    try:
        if not bad:
            regions.follow(model, [back.region for back in reversed(ordered)])
    except Exception as error:
        if not isinstance(error, Mistake | TargetError) and not registry.unreachable(error):
            raise
        say(f"whether the alias champion of {model} names what every region serves is not known: {error}")
    why = f"not everywhere: look at {', '.join(bad)}" if bad else reason
    return {"model": model, "phase": "degraded" if bad else "rolled back", "why": why, "regions": came}


def _ended(model: str, reason: str, back: regions.Back, one: One) -> dict[str, Any]:
    try:
        with within(back.region):
            if back.ordered:
                return one(back.region, back.ordered)
            if back.withdraw:
                return _withdrawn(model, reason)
    except Exception as error:  # noqa: BLE001 - the other regions are brought to their end all the same
        return {"phase": "failed", "why": " ".join(str(error).split()) or type(error).__name__}
    return {"phase": "failed" if back.failed else "", "why": back.why}


def _withdrawn(model: str, reason: str) -> dict[str, Any]:
    """End a promotion that waits, of the version that goes back elsewhere."""
    settings = load_settings()
    settings.connect(needed=())
    target = settings_target(settings)
    with leased(target, model, f"end of what waits of {model} ({secrets.token_hex(2)})", take=True) as fence:
        ended = f"an operator rolled it back in every region: {reason}"
        done = recover.finish(settings, target, model, fence, ended)
    return done or {"phase": "", "why": "its promotion, which waited, has ended meanwhile"}


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

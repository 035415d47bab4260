"""The operator's way back: traffic first, by what the target itself knows; registry and record follow when they can."""

import secrets
from datetime import UTC, datetime
from pathlib import Path

from deployments.target import Fence, ServingTarget, Version
from tasks import registry
from tasks.agreement import agreement, leased, name_champion, patiently, without
from tasks.context import Contender, Context, Seen
from tasks.journal import BY_HAND, Journal, Open, agreed, opened
from tasks.progress import say
from tasks.registry import Registered
from tasks.settings import Mistake, Settings, region
from validations.verdict import Measurement


def offline(model: str, number: str, digest: str, settings: Settings) -> Contender:
    """A version as this machine knows it, without asking the registry."""
    known = Registered(model, number, None, {})
    return Contender(known, registry.local_path(known, settings.home), digest, digest)


def reigning(target: ServingTarget, left: Open) -> tuple[str | None, str | None]:
    """Who is champion while a promotion goes on, and who was before: those from when it began, or those whom a hand
    made it while the promotion waited.
    """
    assert left.promotion is not None
    last = agreed(target, left.model)
    if last is not None and last.at > left.began:
        return last.champion, last.previous
    return left.promotion.champion, left.previous


def resumed(settings: Settings, target: ServingTarget, model: str, fence: Fence, left: Open) -> Context:
    """The context of a promotion that another process began, or of a rollback by hand, from its journal alone."""
    last = agreed(target, model)
    digests = dict(last.digests) if last else {}
    now = left.promotion
    if now is not None:
        digests[now.challenger] = now.digest
    champion: str | None = left.of
    challenger, previous = left.to, left.previous
    if now is not None:
        (champion, previous), challenger = reigning(target, left), now.challenger
    traffic = target.traffic(model)
    context = Context(
        id=left.id,
        model=model,
        settings=settings,
        target=target,
        fence=fence,
        base=Path(left.base or settings.home),
        folder=settings.home / "promotions" / left.id,
        champion=None if champion is None else offline(model, champion, digests.get(champion, ""), settings),
        challenger=offline(model, challenger, digests.get(challenger, ""), settings),
        previous=previous,
        blamed=left.blamed,
        policy=None if now is None else now.policy,
    )
    if traffic is not None:
        context.shape = traffic.shape
    return context


def back(
    settings: Settings,
    target: ServingTarget,
    model: str,
    fence: Fence,
    reason: str,
) -> Open:
    """Move all traffic of `model` back, now: from the challenger of a promotion that is under way or was left behind,
    else from the champion to the one before. Asks neither MLflow nor Prefect where the target knows enough.

    Returns what the journal has of it, which stays open until registry and record have been told. Raises `Mistake`
    where there is no version to go back to.
    """
    left = opened(target, model)
    if left is not None and left.what == BY_HAND:
        # Wherever its traffic is by now is where an operator goes back from.
        stays(target, model, fence, left)
        left = opened(target, model)
    if left is not None and left.promotion is not None and not left.waiting:
        now = left.promotion
        if now.champion is None:
            raise Mistake(
                f"{model} v{now.challenger} is being promoted and has no champion before it to go back to", code=2
            )
        context = resumed(settings, target, model, fence, left)
        target.route(without(context.traffic(now.champion), now.challenger), fence)
        return left
    if left is None or left.waiting:  # what waits has no live request: the champion is meant
        traffic = target.traffic(model) if model in target.models() else None
        of = traffic.champion if traffic else None
        to = _before(target, model, of)
        if of is None or to is None or to == of:
            raise Mistake(f"{model} has no version that served before: there is nothing to roll back to", code=2)
        Journal(target, fence, fence.holder).begin_rollback(of, to, reason)
        left = opened(target, model)
        assert left is not None
    context = resumed(settings, target, model, fence, left)
    if left.to not in target.deployed(model):
        target.deploy(_version(context), fence)
    # What an operator takes away answers nobody, not even where the other fails.
    target.route(without(context.traffic(left.to), left.of), fence)
    return left


def stays(target: ServingTarget, model: str, fence: Fence, left: Open) -> None:
    """End, in the journal, an alias moved by hand that is not followed any further: whoever serves now is champion."""
    last, traffic = agreed(target, model), target.traffic(model)
    digests, pen = dict(last.digests) if last else {}, Journal(target, fence, left.id)
    if traffic is not None and traffic.champion == left.to:
        pen.end("promoted", left.to, left.of, digests)
    else:
        before, until = (last.previous, last.keep_until) if last else (None, None)
        pen.end("interrupted", left.of, before, digests, until)


def _before(target: ServingTarget, model: str, of: str | None) -> str | None:
    """Who served before `of`: by the journal, by the fallback in force, else by the alias `previous`."""
    last = agreed(target, model)
    if last is not None and last.champion == of and last.previous is not None:
        return last.previous
    traffic = target.traffic(model) if model in target.models() else None
    if traffic is not None and traffic.fallback is not None:
        return traffic.fallback
    registry.versions(model)
    return registry.aliased(model, registry.PREVIOUS)


def _version(context: Context) -> Version:
    contender, settings = context.challenger, context.settings
    if contender.recorded and contender.path.exists():
        return contender.version(settings.env_manager)
    found = registry.find(context.model, contender.number)
    path, recorded, digest = registry.admitted(found, settings.home)
    return Contender(found, path, recorded, digest).version(settings.env_manager)


def order(settings: Settings, target: ServingTarget, model: str, reason: str) -> Open:
    """`back` under a lease that is taken from whoever holds it: a promotion that is under way finds its fence stale.
    What the journal then has open is for `flows.recover` to finish.
    """
    at = f"{region()}-{datetime.now(UTC):%Y%m%d-%H%M%S}".lstrip("-")
    identifier = f"{model}-rollback-{at}-{secrets.token_hex(2)}"
    with leased(target, model, identifier, take=True) as fence:
        left = back(settings, target, model, fence, reason)
        to = left.to or (left.promotion.champion if left.promotion else "")
        say(f"{left.id}: v{to} answers every live request ({reason})")
        return left


def tell(context: Context) -> Seen:
    """Let the registry say what the traffic does since `back`; asks it for a while. Raises `Unrecorded`."""
    assert context.champion is not None
    of, to = context.champion.number, context.challenger.number

    def told() -> None:
        name_champion(context, to, of, of=(of, to))

    patiently(told, f"v{to} answers every live request again")
    return agreement(context, to)


def failed(why: str) -> Seen:
    """What a rollback shows where traffic and registry could not be brought to agreement."""
    return Seen({"agreement": Measurement.exact(0, note=why)}, why)

"""What runs and what serves, read from the processes, the gateway and the registry; light on imports."""

import contextlib
from dataclasses import asdict
from typing import Any

from deployments.target import ServingTarget, TargetError
from tasks import flowruns, moved, webhooks
from tasks.journal import Open, agreed, opened
from tasks.moved import said, sides
from tasks.registry_rest import Refused, Unanswered
from tasks.settings import Mistake, Settings
from tasks.targets import PATIENCE, everywhere, local_target

__all__ = ["PATIENCE", "said", "sides", "status"]


def status(settings: Settings) -> dict[str, Any]:
    """The stack as it is: {"home", "up", "programs": [...], "models": [...], "problems": [...]}; the last are places
    that do not answer, in words.
    """
    if not any(target.up() for _, target in everywhere(settings)):
        return {"home": str(settings.home), "up": False, "programs": [], "models": [], "problems": []}
    addresses, local = _addresses(settings), local_target(settings)
    programs = [
        {"name": name, "state": program.state, "pid": program.pid, "address": addresses.get(name, "")}
        for name, program in (local.supervisor.status() if local.up() else {}).items()
    ]
    models, problems = list[dict[str, Any]](), list[str]()
    for own, place in everywhere(settings, patience=PATIENCE):
        try:
            models += models_of(own, place)
        except TargetError as error:
            problems.append(str(error))
    return {"home": str(settings.home), "up": True, "programs": programs, "models": models, "problems": problems}


def models_of(settings: Settings, target: ServingTarget) -> list[dict[str, Any]]:
    """What the models of one place do, and what is wrong with them."""
    return [_model(settings, target, model) for model in target.models()]


def _addresses(settings: Settings) -> dict[str, str]:
    found: dict[str, str] = {}
    with contextlib.suppress(Mistake):
        found |= {"mlflow": settings.mlflow, "prefect": settings.prefect.removesuffix("/api")}
    with contextlib.suppress(Mistake):
        found["receiver"] = webhooks.address(settings)
    return found


def _model(settings: Settings, target: ServingTarget, model: str) -> dict[str, Any]:
    for _ in range(3):
        before = _moment(target, model)
        problem, unknown, traffic, facts = "", "", None, None
        try:
            traffic = target.traffic(model)
        except TargetError as error:
            problem = str(error)
        left, last = opened(target, model), agreed(target, model)
        try:
            facts = moved.facts(settings, target, model, traffic)
        except (Unanswered, Refused, Mistake) as error:
            unknown = f"{error}: what the registry says of {model} is not known"
        # What changes while it is looked at is looked at once more.
        if steady := _moment(target, model) == before:
            break
    holder = target.holder(model)
    held = holder is not None and holder.left > 0
    under_way = left is not None and (left.waiting or held)
    problems = [one for one in (problem, unknown) if one]
    if left is not None and not under_way:
        problems.append(
            f"{left.id} was left behind by its process while it performed `{left.doing or 'the beginning'}`: "
            f"`titleshot recover {model}` brings it to its end"
        )
    follow = None
    # Whoever holds the lease may be between two of its moves.
    if facts is not None and not problems and not held and steady:
        problems, follow = _disagreements(settings, facts)
    return {
        "model": model,
        "region": settings.region or "",
        "serving": (traffic.champion if traffic else problem) or None,
        "challenger": traffic.challenger if traffic else None,
        "weight": traffic.weight / 100 if traffic else 0,
        "mirror": traffic.mirror / 100 if traffic else 0,
        "fallback": traffic.fallback if traffic else None,
        "shape": asdict(traffic.shape) if traffic else {},
        "alias": facts.alias if facts else None,
        "journal": last.champion if last else None,
        "under_way": left.id if left is not None and under_way else None,
        "waits": _waits(settings, left) if left is not None and under_way else "",
        "problems": problems,
        "follow": follow,
        "agrees": traffic is not None and not problems,
        "gateway": target.gateway(model),
        "deployed": sorted(target.deployed(model), key=int),
        "warm": target.kept(model),
    }


def _moment(target: ServingTarget, model: str) -> tuple[int, str]:
    """Another one whenever something begins, goes on or ends."""
    lines, holder = target.journal(model), target.holder(model)
    return lines[-1].number if lines else 0, holder.name if holder is not None and holder.left > 0 else ""


def _waits(settings: Settings, left: Open) -> str:
    """What a promotion waits for, in words; empty where it does not."""
    if left.held:
        return left.held
    if left.asked is None or not left.waiting:
        return ""
    until = f"{left.asked.until:%Y-%m-%d %H:%M} UTC"
    return f"for people, until {until}: {flowruns.page(settings, left.flow_run)}" if left.flow_run else f"until {until}"


def _disagreements(settings: Settings, facts: moved.Facts) -> tuple[list[str], str | None]:
    """What a hand has moved, in words, and the version that the traffic is to follow to."""
    if facts.alias == facts.serving:
        return moved.disagreements(facts), None
    to, own = facts.moved_to, moved.followed_by(settings, facts.model)
    refused = moved.refused(settings, facts.model, to) if to and own else ""
    return moved.disagreements(facts, own[0].name if own else "", refused), to if own and not refused else None

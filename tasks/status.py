"""What runs and what serves, read from the processes, the gateway and the registry; light on imports."""

from dataclasses import asdict
from typing import Any

import httpx

from deployments.local.target import LocalTarget
from deployments.target import TargetError
from tasks.journal import agreed, opened
from tasks.settings import Mistake, Settings
from tasks.stack import settings_target


def status(settings: Settings) -> dict[str, Any]:
    """The stack as it is: {"home", "up", "programs": [...], "models": [...]}."""
    target = settings_target(settings)
    if not target.supervisor.up():
        return {"home": str(settings.home), "up": False, "programs": [], "models": []}
    addresses = _addresses(settings)
    programs = [
        {"name": name, "state": program.state, "pid": program.pid, "address": addresses.get(name, "")}
        for name, program in target.supervisor.status().items()
    ]
    models = [_model(settings, target, model) for model in target.models()]
    return {"home": str(settings.home), "up": True, "programs": programs, "models": models}


def _addresses(settings: Settings) -> dict[str, str]:
    try:
        return {"mlflow": settings.mlflow, "prefect": settings.prefect.removesuffix("/api")}
    except Mistake:
        return {}


def _model(settings: Settings, target: LocalTarget, model: str) -> dict[str, Any]:
    problem, traffic = "", None
    try:
        traffic = target.traffic(model)
    except TargetError as error:
        problem = str(error)
    serving = traffic.champion if traffic else None
    alias, left, last = _champion(settings, model), opened(target, model), agreed(target, model)
    holder = target.holder(model)
    under_way = left is not None and (left.waiting or (holder is not None and holder.left > 0))
    problems = [problem] if problem else []
    if left is not None and not under_way:
        problems.append(
            f"{left.id} was left behind by its process while it performed `{left.doing or 'the beginning'}`: "
            f"`titleshot recover {model}` brings it to its end"
        )
    if left is None and not problem:
        problems += _disagreements(alias, last.champion if last else serving, serving)
    return {
        "model": model,
        "serving": serving or problem or None,
        "challenger": traffic.challenger if traffic else None,
        "weight": traffic.weight / 100 if traffic else 0,
        "mirror": traffic.mirror / 100 if traffic else 0,
        "fallback": traffic.fallback if traffic else None,
        "shape": asdict(traffic.shape) if traffic else {},
        "alias": alias,
        "journal": last.champion if last else None,
        "under_way": left.id if left is not None and under_way else None,
        "problems": problems,
        "agrees": traffic is not None and not problems,
        "gateway": target.gateway(model),
        "deployed": sorted(target.deployed(model), key=int),
        "warm": target.kept(model),
    }


def _disagreements(alias: str | None, journal: str | None, serving: str | None) -> list[str]:
    if alias == journal == serving:
        return []
    return [f"{sides(alias, journal, serving)}: `titleshot doctor --mend` brings them together"]


def sides(alias: str | None, journal: str | None, serving: str | None) -> str:
    """Who sees what, in words."""
    return (
        f"the gateway serves {said(serving)}, the alias champion names {said(alias)}, the journal says {said(journal)}"
    )


def said(number: str | None) -> str:
    """A version number as people read it."""
    return f"v{number}" if number else "nothing"


def _champion(settings: Settings, model: str) -> str | None:
    """The alias champion by MLflow's REST API: its Python client costs four seconds to import."""
    try:
        answer = httpx.get(
            f"{settings.mlflow}/api/2.0/mlflow/registered-models/alias",
            params={"name": model, "alias": "champion"},
            timeout=5,
        )
        answer.raise_for_status()
        return str(answer.json()["model_version"]["version"])
    except (httpx.HTTPError, KeyError, ValueError, Mistake):
        return None

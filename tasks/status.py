"""What runs and what serves, read from the processes, the gateway and the registry; light on imports."""

from typing import Any

import httpx

from deployments.local.target import LocalTarget
from deployments.target import TargetError
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
    try:
        traffic = target.traffic(model)
        problem = ""
    except TargetError as error:
        traffic, problem = None, str(error)
    alias = _champion(settings, model)
    return {
        "model": model,
        "serving": traffic.champion if traffic else problem or None,
        "challenger": traffic.challenger if traffic else None,
        "weight": traffic.weight / 100 if traffic else 0,
        "mirror": traffic.mirror / 100 if traffic else 0,
        "alias": alias,
        "agrees": traffic is not None and alias == traffic.champion,
        "gateway": target.gateway(model),
        "deployed": sorted(target.deployed(model), key=int),
    }


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

"""The custom gate: measurements from a function, a command or a URL of the user's."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from deployments.target import TargetError
from tasks import outside
from tasks.context import Contender, Context, Seen
from validations.gates import Custom, Outside


@task(cache_policy=NO_CACHE)
def custom(context: Context, gate: Custom) -> Seen:
    """Tell the gate's function, command or URL about this promotion, and take its measurements."""
    told = about(context, gate) | {"confidence": gate.confidence}
    measured = outside.ask(gate, told, context.base)
    what = gate.function or gate.url or " ".join(gate.command)
    note = f"measured by {what}"
    if unasked := sorted(set(measured) - set(gate.checks)):
        note += f"; no check bounds {', '.join(unasked)}"
    return Seen(
        measured, note, {"custom": {"asked": told, "measured": {k: m.model_dump() for k, m in measured.items()}}}
    )


def about(context: Context, gate: Outside) -> dict[str, Any]:
    """What a custom gate or a hook is told: model, challenger, champion (None before the first), addresses, and the
    gate's words.
    """
    try:
        gateway = context.target.gateway(context.model)
    except TargetError:
        gateway = None  # nothing was ever deployed
    return {
        "model": context.model,
        "challenger": _side(context, context.challenger),
        "champion": None if context.champion is None else _side(context, context.champion),
        "settings": {"mlflow": context.settings.mlflow, "gateway": gateway},
        "parameters": dict(gate.parameters),
    }


def _side(context: Context, who: Contender) -> dict[str, str | None]:
    """A version: number, its own address while it is deployed, digest, and the run that made it."""
    endpoint = context.target.deployed(context.model).get(who.number)
    url = endpoint.url if endpoint else None
    return {"version": who.number, "url": url, "digest": who.digest, "run_id": who.registered.run_id}

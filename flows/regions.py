"""A promotion through several regions, wave by wave: each region's own promotion, and the way back of those before."""

import secrets
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from deployments.target import TargetError
from flows import rollback
from tasks import registry
from tasks.agreement import leased
from tasks.clusters import cluster
from tasks.journal import opened
from tasks.progress import say
from tasks.settings import Mistake, Settings, within
from tasks.settings import load as load_settings
from tasks.targets import settings_target
from validations.waves import Waves

Promote = Callable[[bool], dict[str, Any]]
"""Promotes in the region that is meant; told whether it is a further one than the first. Returns what a promotion
does.
"""


def promote(waves: Waves, model: str, number: str, one: Promote) -> dict[str, Any]:
    """Promote version `number` region by region; regions where it is champion already are left as they are, so that a
    run which was cut off is asked for again and goes on.

    Returns the last region's outcome, with `regions`: what each came to. Where one does not pass, those that have to go
    back are rolled back, the latest first. The alias champion moves once all have it.
    """
    settings = load_settings()
    out = _kept_out(settings, waves, model)
    reigned = registry.aliased(model, registry.CHAMPION)
    came, result = [{"region": name, "phase": "kept out", "promotion": ""} for name in out], dict[str, Any]()
    regions = [name for name in waves.regions if name not in out]
    for name in regions:
        with within(name):
            if _has(model, number):
                came.append({"region": name, "phase": "promoted", "promotion": ""})
                continue
            say(f"region {name}")
            result = one(name != regions[0])
        came.append({"region": name, "phase": result["phase"], "promotion": result["promotion"]})
        if result["phase"] != "promoted":
            promoted = tuple(each["region"] for each in came if each["phase"] == "promoted")
            if result["phase"] in ("rejected", "rolled back", "degraded"):
                _back(model, waves.go_back(name, promoted), f"v{number} was {result['phase']} in {name}", came)
            return {**result, "region": name, "regions": came}
    _everywhere(model, number, reigned, regions[-1])
    if not result:
        raise Mistake(f"{model} v{number} is the champion of every region already: there is nothing to promote", code=2)
    return {**result, "regions": came}


def _kept_out(settings: Settings, waves: Waves, model: str) -> tuple[str, ...]:
    """The regions that `model` must not be served in. Every region is described before the first one is touched.

    Raises `Mistake` for a region that is not, or where none is left.
    """
    out = list[str]()
    for name in waves.regions:
        described = cluster(settings.model_copy(update={"region": name}))
        assert described is not None
        if any(fnmatchcase(model, pattern) for pattern in described.keeps_out):
            out.append(name)
            say(f"region {name} is left out: its `keeps_out` has {model}")
    if len(out) == len(waves.regions):
        raise Mistake(f"every region of the policy's `waves` keeps {model} out: there is nothing to promote to", code=2)
    return tuple(out)


def _has(model: str, number: str) -> bool:
    """Whether this region's champion is the version already, and nothing is left to do there."""
    if registry.aliased(model, registry.CHAMPION) != number:
        return False
    return opened(settings_target(load_settings()), model) is None


def _back(model: str, names: tuple[str, ...], why: str, came: list[dict[str, str]]) -> None:
    for name in names:
        say(f"region {name} goes back: {why}")
        with within(name):
            try:
                phase = str(rollback.run(model, why)["phase"])
            except (Mistake, TargetError) as error:  # the other regions go back all the same
                say(f"region {name} does not go back: {error}")
                phase = "degraded"
        for each in came:
            if each["region"] == name:
                each["phase"] = phase


def _everywhere(model: str, number: str, reigned: str | None, last: str) -> None:
    """Let the alias champion name what every region's champion is; the last region's lease keeps others away."""
    with within(last):
        target = settings_target(load_settings())
        with leased(target, model, f"{model} v{number} everywhere ({secrets.token_hex(2)})") as fence, within(""):
            registry.move(model, registry.CHAMPION, number, of=(reigned,), guard=target.guard(fence))
            if reigned not in (None, number):
                before = registry.aliased(model, registry.PREVIOUS)
                registry.move(model, registry.PREVIOUS, reigned, of=(before,), guard=target.guard(fence))
            if registry.aliased(model, registry.CHALLENGER) == number:
                registry.move(model, registry.CHALLENGER, None, of=(number,), guard=target.guard(fence))

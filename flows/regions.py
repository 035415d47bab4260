"""A promotion through several regions, wave by wave: each region's own promotion, and the way back of those before."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from deployments.target import TargetError
from flows import rollback
from tasks import registry
from tasks.clusters import cluster
from tasks.journal import opened
from tasks.progress import say
from tasks.regions import look, name_everywhere
from tasks.settings import Mistake, Settings, within
from tasks.settings import load as load_settings
from tasks.targets import settings_target
from validations.waves import Waves

Promote = Callable[[bool, tuple[str, ...]], dict[str, Any]]
"""Promotes in the region that is meant; told whether it is a further one than the first, and which the others are.
Returns what a promotion does.
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
            result = one(name != regions[0], tuple(other for other in regions if other != name))
        came.append({"region": name, "phase": result["phase"], "promotion": result["promotion"]})
        if result["phase"] != "promoted":
            promoted = tuple(each["region"] for each in came if each["phase"] == "promoted")
            if result["phase"] in ("rejected", "rolled back", "degraded"):
                why = f"v{number} was {result['phase']} in {name}"
                _back(model, number, waves.go_back(name, promoted), why, came)
            return {**result, "region": name, "regions": came}
    if gone := [name for name in regions if not _stayed(model, number, name)]:
        why = f"{', '.join(gone)} went back from v{number} meanwhile: the alias champion stays where it is"
        if not result:
            raise Mistake(why)
        came = [{**each, "phase": "rolled back"} if each["region"] in gone else each for each in came]
        return {**result, "phase": "rolled back", "why": why, "regions": came}
    name_everywhere(model, number, reigned, regions[-1])
    if not result:
        raise Mistake(f"{model} v{number} is the champion of every region already: there is nothing to promote", code=2)
    return {**result, "regions": came}


def busy(model: str, names: tuple[str, ...]) -> str:
    """What else is under way with `model` in one of these regions; empty where nothing is. Asked under the lease of the
    region where a promotion is about to begin, so that of two that begin at once no two go on.
    """
    for name in names:
        with within(name):
            target = settings_target(load_settings())
            if (left := opened(target, model)) is not None:
                return f"{left.id} is under way in the region {name}"
            holder = target.holder(model)
            if holder is not None and holder.left > 0:
                return f"{model} is held by {holder.name} in the region {name}"
    return ""


def _stayed(model: str, number: str, name: str) -> bool:
    now = look(model, name)
    return now.serves == number and now.left is None


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


def _back(model: str, number: str, names: tuple[str, ...], why: str, came: list[dict[str, str]]) -> None:
    for name in names:
        say(f"region {name} goes back: {why}")
        with within(name):
            try:
                gone = look(model, name).serves != number  # by somebody's hand: it must not swing back
                phase = "rolled back" if gone else str(rollback.run(model, why)["phase"])
            except (Mistake, TargetError) as error:  # the other regions go back all the same
                say(f"region {name} does not go back: {error}")
                phase = "degraded"
        for each in came:
            if each["region"] == name:
                each["phase"] = phase

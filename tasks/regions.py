"""A model in several regions: which of them an operator's way back concerns, and the alias that speaks of all."""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.target import TargetError
from tasks import registry, swap
from tasks.agreement import leased
from tasks.journal import BY_HAND, Agreed, Open, agreed, opened
from tasks.progress import say
from tasks.settings import Mistake, within
from tasks.settings import load as load_settings
from tasks.status import said
from tasks.targets import settings_target


@dataclass(frozen=True, slots=True)
class Region:
    """One region of a model: which version serves there, what is under way, and how the last promotion ended."""

    name: str
    serves: str | None
    left: Open | None
    last: Agreed | None

    @property
    def coming(self) -> str | None:
        """The version that is on its way to the champion's place; None where none is, or where it waits."""
        if self.left is None or self.left.waiting:
            return None
        if self.left.promotion is not None:
            return self.left.promotion.challenger
        return self.left.to if self.left.what == BY_HAND else self.left.of

    @property
    def waiting(self) -> str | None:
        """The version whose promotion waits for people or for a time; None where none does."""
        now = self.left.promotion if self.left is not None and self.left.waiting else None
        return None if now is None else now.challenger


@dataclass(slots=True)
class Back:
    """What an operator's way back comes to in one region: `ordered` names the rollback whose traffic has moved; where
    there is none, `why` says so, and `failed` whether it should have been.
    """

    region: str
    ordered: str = ""
    why: str = ""
    failed: bool = False
    withdraw: bool = False
    """Whether its promotion, which waits, is to end."""


def look(model: str, name: str) -> Region:
    """One region as it is. Raises `TargetError` where it does not answer."""
    with within(name):
        target = settings_target(load_settings())
        traffic = target.traffic(model)
        return Region(name, traffic.champion if traffic else None, opened(target, model), agreed(target, model))


def goes_back(model: str, regions: Sequence[Region]) -> str | None:
    """The version that a rollback of all regions is about: the one on its way, else the one that came last; where a
    rollback came last, what that took away, so that one which was cut off is asked for again. Pure.
    """
    if under_way := [one.coming for one in regions if one.coming is not None]:
        return under_way[0]
    # What a promotion that did not pass has left as it was says nothing.
    ends = [one.last for one in regions if one.last and (_by_hand(model, one.last) or one.last.phase in _MOVED)]
    if ends:
        last = max(ends, key=lambda one: one.at)
        return last.previous if _by_hand(model, last) else last.champion
    return max((one.serves for one in regions if one.serves), key=int, default=None)


_MOVED = ("promoted", "degraded")


def _by_hand(model: str, last: Agreed) -> bool:
    return last.promotion.startswith(f"{model}-rollback-")


def order(model: str, names: dict[str, str], reason: str) -> list[Back]:
    """Move the traffic of every region back that has, or is about to have, the version that came last: the newest
    region first, whatever becomes of the others. `names` is what `tasks.targets.regions_of` has found.

    Returns what it came to by region, to be brought to its end under their leases. Raises `Mistake` where no region has
    that version.
    """
    done = {name: Back(name, why=why, failed=True) for name, why in names.items()}
    regions = list[Region]()
    for name in reversed([name for name, why in names.items() if not why]):
        try:
            regions.append(look(model, name))
        except TargetError as error:
            done[name].why = str(error)
    version = goes_back(model, regions)
    for one in regions:
        back = done[one.name]
        if version is None or version not in (one.serves, one.coming):
            back.why, back.failed = f"stays: it serves {said(one.serves)}", False
            back.withdraw = version is not None and version == one.waiting
            continue
        with within(one.name):
            try:
                settings = load_settings()
                back.ordered = swap.order(settings, settings_target(settings), model, reason).id
                back.failed = False
            except (Mistake, TargetError) as error:
                back.why = str(error)
    found = [done[name] for name in reversed(names)]
    if not any(back.ordered or back.failed or back.withdraw for back in found):
        serve = ", ".join(f"{one.name} {said(one.serves)}" for one in reversed(regions))
        raise Mistake(
            f"no region of {model} has {said(version)} any more, which was taken back (they serve: {serve}): name one "
            "that is to go back further with --region",
            code=2,
        )
    return found


def name_everywhere(model: str, number: str, reigned: str | None, last: str) -> None:
    """Let the alias champion name what every region's champion is; the lease of the region `last` keeps others away."""
    with within(last):
        target = settings_target(load_settings())
        with leased(target, model, f"{model} v{number} everywhere ({secrets.token_hex(2)})") as fence, within(""):
            registry.move(model, registry.CHAMPION, number, of=(reigned,), guard=target.guard(fence))
            if reigned not in (None, number):
                before = registry.aliased(model, registry.PREVIOUS)
                registry.move(model, registry.PREVIOUS, reigned, of=(before,), guard=target.guard(fence))
            if registry.aliased(model, registry.CHALLENGER) == number:
                registry.move(model, registry.CHALLENGER, None, of=(number,), guard=target.guard(fence))


def follow(model: str, names: Iterable[str]) -> None:
    """After a rollback: let the alias champion name what all of these regions serve, where they serve one version.
    Raises what the registry's client and targets raise.
    """
    there = [look(model, name) for name in names]
    serving = {one.serves for one in there}
    number = serving.pop()
    with within(""):
        reigned = registry.aliased(model, registry.CHAMPION)
    if serving or number is None or number == reigned:
        return
    name_everywhere(model, number, reigned, there[-1].name)
    say(f"every region serves v{number} again: the alias champion names it")

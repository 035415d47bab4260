"""`titleshot route`: what a person asks of live traffic besides weights, and how that joins what is in force."""

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from deployments.target import FULL, Limit, Match, Pin, ServingTarget, Shape, Traffic
from tasks import registry, shaping
from tasks.agreement import leased
from tasks.journal import agreed, opened
from tasks.settings import Mistake
from validations.traffic import ALIASES, AnyVersion, Like, Pinned, Shaping
from validations.units import Rate, nearest

PINS, STICKY, LIMITS, PRIORITY, FALLBACK, ALL = "pins", "sticky", "limits", "priority", "fallback", "all"
WORDS = (PINS, STICKY, LIMITS, PRIORITY, FALLBACK, ALL)
"""What `--clear` takes away."""
NONE = "none"
"""The rate that takes a limit away."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of one `titleshot route`, read: what to set, and what to take away first."""

    pins: tuple[Pinned, ...] = ()
    unpin: tuple[Like, ...] = ()
    sticky: str | None = None
    limits: tuple[tuple[str, float | None], ...] = ()
    priority: Like | None = None
    fallback: str | None = None
    clear: frozenset[str] = frozenset()

    @property
    def anything(self) -> bool:
        """Whether a change is asked for at all."""
        return self != Asked()

    @property
    def versions(self) -> frozenset[str]:
        """The versions and aliases that must be there for it."""
        named = {*(pin.version for pin in self.pins), *(who for who, rate in self.limits if rate is not None)}
        return frozenset(named if self.fallback is None else {*named, self.fallback})


def read(
    *,
    pin: Sequence[str] = (),
    unpin: Sequence[str] = (),
    sticky: str | None = None,
    limit: Sequence[str] = (),
    priority: str | None = None,
    fallback: str | None = None,
    clear: Sequence[str] = (),
) -> Asked:
    """The options as typed. Raises `Mistake` (exit code 2) for the first that makes no sense."""
    for word in clear:
        if word not in WORDS:
            raise _wrong("--clear", word, f"it is one of {', '.join(WORDS)}{nearest(word, WORDS)}")
    pins = tuple(_pin(text) for text in pin)
    away = tuple(_like("--unpin", text) for text in unpin)
    for index, one in enumerate(pins):
        if any((one.header, one.value) == (other.header, other.value) for other in pins[:index]):
            raise _wrong("--pin", pin[index], "these requests are pinned twice: keep one of the two")
        if any((one.header, one.value) == (other.header, other.value) for other in away):
            raise _wrong("--pin", pin[index], "these requests are unpinned as well: leave --unpin out to move a pin")
    asked = Asked(
        pins=pins,
        unpin=away,
        limits=tuple(_limit(text) for text in limit),
        priority=None if priority is None else _like("--priority", priority),
        clear=frozenset(clear),
    )
    limited = [who for who, _ in asked.limits]
    for index, who in enumerate(limited):
        if who in limited[:index]:
            raise _wrong("--limit", limit[index], f"there are two limits for {who}: keep one of the two")
    if sticky is not None:
        asked = replace(asked, sticky=_valid("--sticky", sticky, lambda: Shaping(sticky=sticky)).sticky)
    if fallback is not None:
        asked = replace(asked, fallback=_valid("--fallback", fallback, lambda: Shaping(fallback=fallback)).fallback)
    return asked


def _pin(text: str) -> Pinned:
    match, colon, version = text.rpartition(":")
    header, sign, value = match.partition("=")
    if not (colon and sign):
        raise _wrong("--pin", text, "write it like x-tenant=acme:3, or :challenger for who has that alias")
    return _valid("--pin", text, lambda: Pinned(header=header, value=value, version=version))


def _like(option: str, text: str) -> Like:
    header, sign, value = text.partition("=")
    if not sign:
        raise _wrong(option, text, "write it like x-tenant=acme")
    return _valid(option, text, lambda: Like(header=header, value=value))


def _limit(text: str) -> tuple[str, float | None]:
    who, sign, rate = text.partition("=")
    if not sign:
        raise _wrong("--limit", text, f"write it like 3=20/s, or 3={NONE} to take it away")
    version = _valid("--limit", text, lambda: TypeAdapter(AnyVersion).validate_python(who))
    if rate == NONE:
        return version, None
    return version, _valid("--limit", text, lambda: TypeAdapter(Rate).validate_python(rate))


def _valid(option: str, text: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValidationError as error:
        raise _wrong(option, text, error.errors()[0]["msg"]) from error


def _wrong(option: str, text: str, why: str) -> Mistake:
    return Mistake(f"{option} {text}: {why}", code=2)


def merge(now: Shape, asked: Asked, names: Mapping[str, str | None]) -> Shape:
    """The shape in force with what is asked: first `--clear` and `--unpin` take away, then the rest is set.

    A pin for requests that are pinned already takes the old one's place; new ones come behind, since the first that
    matches wins. `names` are the versions that have an alias now. Raises `Mistake` for what is not there to be taken
    away, and for two options that mean one version.
    """
    clear = {*WORDS} if ALL in asked.clear else asked.clear
    pins = {} if PINS in clear else {pin.match: pin.version for pin in now.pins}
    limits = {} if LIMITS in clear else {limit.version: limit.per_second for limit in now.limits}
    for like in asked.unpin:
        if Match(like.header, like.value) not in pins:
            there = ", ".join(f"{match.header}={match.value}" for match in pins) or "none"
            raise _wrong("--unpin", f"{like.header}={like.value}", f"there is no such pin (there are: {there})")
        del pins[Match(like.header, like.value)]
    for who, rate in asked.limits:
        if rate is None and limits.pop(_number(who, names), None) is None:
            there = ", ".join(limits) or "none"
            raise _wrong("--limit", f"{who}={NONE}", f"there is no such limit (limited: {there})")
    limited = [_number(who, names) for who, rate in asked.limits if rate is not None]
    if twice := next((number for number in limited if limited.count(number) > 1), None):
        raise Mistake(f"--limit: two limits mean version {twice}: keep one of the two", code=2)
    wanted = Shaping.model_construct(
        pins=asked.pins,
        sticky=asked.sticky,
        limits={who: rate for who, rate in asked.limits if rate is not None},
        priority=asked.priority,
        fallback=asked.fallback,
    )
    new = shaping.shape(wanted, names) or Shape()
    pins |= {pin.match: pin.version for pin in new.pins}
    limits |= {limit.version: limit.per_second for limit in new.limits}
    return Shape(
        pins=tuple(Pin(match, version) for match, version in pins.items()),
        sticky=new.sticky or (None if STICKY in clear else now.sticky),
        limits=tuple(Limit(version, rate) for version, rate in limits.items()),
        priority=new.priority or (None if PRIORITY in clear else now.priority),
        fallback=new.fallback or (None if FALLBACK in clear else now.fallback),
    )


def _number(who: str, names: Mapping[str, str | None]) -> str:
    return (names.get(who) or "") if who in ALIASES else who


def obeyed(target: ServingTarget, model: str) -> Traffic:
    """What the gateway itself says that it obeys. Raises `Mistake` where it serves no such model."""
    if model not in target.models():
        there = ", ".join(target.models()) or "nothing yet"
        raise Mistake(f"{model} is not served here (served: {there})", code=2)
    traffic = target.traffic(model)
    if traffic is None:
        raise Mistake(
            f"nothing of {model} is routed yet: promote a version, or `titleshot serve {model} --warm 1` serves the "
            "champion",
            code=2,
        )
    return traffic


def route(target: ServingTarget, model: str, asked: Asked) -> Traffic:
    """Make the gateway obey what is asked besides what it obeys already; returns what was read back from it.

    Raises `Mistake` for versions that are not there, and `LeaseHeld` while a promotion is under way.
    """
    obeyed(target, model)
    with leased(target, model, f"route {model} ({secrets.token_hex(2)})") as fence:
        left = opened(target, model)
        if left is not None and not left.waiting:
            raise Mistake(f"{left.id} was left behind by its process: `titleshot recover {model}` first")
        now = obeyed(target, model)
        names = _names(target, now, asked)
        there = target.deployed(model)
        for who in sorted(asked.versions):
            number = _number(who, names)
            if not number:
                raise Mistake(f"no version of {model} is its {who} now: name a version by its number", code=2)
            if number not in there:
                alias = f" (its {who})" if who in ALIASES else ""
                raise Mistake(
                    f"{model} v{number}{alias} is not deployed here, only {_versions(there)}: `titleshot serve {model} "
                    "--warm N` loads more versions",
                    code=2,
                )
        target.route(replace(now, shape=merge(now.shape, asked, names)), fence)
        return obeyed(target, model)


def _names(target: ServingTarget, now: Traffic, asked: Asked) -> dict[str, str | None]:
    """The versions that the aliases in use mean: champion is who serves, the others are as the registry has them."""
    names: dict[str, str | None] = {registry.CHAMPION: now.champion}
    used = asked.versions | {who for who, _ in asked.limits}
    if registry.PREVIOUS in used and (last := agreed(target, now.model)) is not None:
        names[registry.PREVIOUS] = last.previous
    for alias in (used & {*ALIASES}) - names.keys():
        try:
            names[alias] = registry.aliased(now.model, alias)
        except Exception as error:
            if not registry.unreachable(error):
                raise
            raise Mistake(f"`{alias}` is an alias, and MLflow does not answer: write the version's number") from error
    return names


def _versions(numbers: Collection[str]) -> str:
    return ", ".join(f"v{number}" for number in sorted(numbers, key=int)) or "nothing"


def as_json(traffic: Traffic, gateway: str) -> dict[str, Any]:
    """What the gateway obeys, for programs; weights in percent."""
    shares = {"weight": traffic.weight / 100, "mirror": traffic.mirror / 100}
    return {**asdict(traffic), **shares, "gateway": gateway}


def rows(traffic: Traffic) -> list[tuple[str, str, str]]:
    """The same for people: which requests, their share, and who answers them."""
    shape = traffic.shape
    found = [(f"{pin.match.header}: {pin.match.value}", "", _chain(traffic, pin.version)) for pin in shape.pins]
    rest = "all others" if shape.pins else "all"
    weighed = [(traffic.champion, FULL - traffic.weight)]
    if traffic.challenger is not None and traffic.weight:
        weighed.append((traffic.challenger, traffic.weight))
    for index, (version, share) in enumerate(weighed):
        found.append(("" if index else rest, f"{share / 100:g}%", _chain(traffic, version)))
    if traffic.challenger is not None and traffic.mirror:
        found.append(("copies", f"{traffic.mirror / 100:g}%", f"v{traffic.challenger}, and nobody sees its answer"))
    return found


def notes(traffic: Traffic) -> list[str]:
    """What else holds, a sentence each."""
    shape, found = traffic.shape, []
    if shape.sticky is not None:
        found.append(f"sticky by {shape.sticky}: who sends the same value stays on the same version")
    found += [f"v{limit.version} takes at most {_rate(limit.per_second)} of live requests" for limit in shape.limits]
    if shape.priority is not None:
        found.append(f"first come requests with {shape.priority.header}: {shape.priority.value}")
    return found


def _rate(per_second: float) -> str:
    return f"{per_second:g}/s" if per_second >= 1 else f"{per_second * 60:g}/m"


def _chain(traffic: Traffic, version: str) -> str:
    first, *rest = traffic.chain(version)
    return f"v{first}" + (f", else {_join(rest)}" if rest else "")


def _join(numbers: Iterable[str]) -> str:
    return ", then ".join(f"v{number}" for number in numbers)

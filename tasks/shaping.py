"""The policy's words about live traffic as the serving target's: aliases become the versions that they name now."""

from collections.abc import Mapping

from deployments.target import Limit, Match, Pin, Shape
from validations.traffic import ALIASES, Shaping


def shape(traffic: Shaping | None, names: Mapping[str, str | None]) -> Shape | None:
    """What `traffic` asks, with `names` for the aliases champion, challenger and previous; None where the policy has no
    such block: then what is in force stays.

    What speaks of an alias that names nobody is left out: its requests go where all others go. Where two limits come
    to speak of one version, the lower one holds. Ask again whenever an alias moves.
    """
    if traffic is None:
        return None

    def number(version: str) -> str | None:
        return names.get(version) if version in ALIASES else version

    pins = tuple(
        Pin(Match(pin.header, pin.value), there) for pin in traffic.pins if (there := number(pin.version)) is not None
    )
    limits: dict[str, float] = {}
    for version, rate in traffic.limits.items():
        if (there := number(version)) is not None:
            limits[there] = min(rate, limits.get(there, rate))
    return Shape(
        pins=pins,
        sticky=traffic.sticky,
        limits=tuple(Limit(version, rate) for version, rate in limits.items()),
        priority=None if traffic.priority is None else Match(traffic.priority.header, traffic.priority.value),
        fallback=None if traffic.fallback is None else number(traffic.fallback),
    )

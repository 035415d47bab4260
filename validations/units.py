"""The words of a policy's values: durations, rates, shares, chances; refused in a sentence where they are unclear."""

import difflib
import math
import re
from datetime import timedelta
from typing import Annotated

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
)
from pydantic_core import PydanticCustomError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(value: object) -> object:
    if not isinstance(value, str):
        return value if isinstance(value, timedelta) else refuse("a duration is written like 30s, 10m, 24h")
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value)
    if not parts or "".join(number + unit for number, unit in parts) != value.strip():
        refuse(f"'{value}' is no duration: write it like 30s, 10m, 1h30m, 24h")
    return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in parts))


def duration_text(value: timedelta) -> str:
    """As a policy writes it, in the largest unit that is whole."""
    seconds = value.total_seconds()
    for unit in ("d", "h", "m"):
        if seconds and seconds % _UNITS[unit] == 0:
            return f"{int(seconds // _UNITS[unit])}{unit}"
    return f"{seconds:g}s"


def minutes(value: timedelta) -> str:
    """As people say it, rounded up."""
    return f"{math.ceil(value.total_seconds() / 60)} minutes"


def _rate(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*([smh])\s*", str(value))
    if match is None:
        return refuse(f"'{value}' is no rate: write it like 100/s or 300/m")
    return float(match[1]) / _UNITS[match[2]]


def refuse(message: str, *at: int | str) -> object:
    """Refuse a value while a policy is read; the message is what its author sees, and `at` the way from the value to
    what it is about. Never returns.
    """
    raise PydanticCustomError("titleshot", "{text}", {"text": message, "at": at})


Duration = Annotated[
    timedelta,
    BeforeValidator(_duration),
    PlainSerializer(duration_text, return_type=str),
    Field(gt=timedelta(0)),
]
"""A length of time in a policy: `30s`, `10m`, `1h30m`, `24h`."""


Rate = Annotated[float, BeforeValidator(_rate), PlainSerializer(lambda r: f"{r!r}/s", return_type=str), Field(gt=0)]
"""Requests per second; written `100/s`, `300/m`."""


def _share(value: object) -> object:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(value))
    if match is None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1):
        refuse(f"'{value}' is no share: write it like 10% or 0.1")
    return float(match[1]) / 100 if match else value


Share = Annotated[
    float, BeforeValidator(_share), PlainSerializer(lambda s: f"{100 * s:.12g}%", return_type=str), Field(gt=0, lt=1)
]
"""A part of a whole; written `10%` or `0.1`."""


def _chance(value: object) -> object:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(value))
    chance = float(match[1]) / 100 if match else value
    if isinstance(chance, bool) or not isinstance(chance, int | float):
        return refuse(f"'{value}' is no chance: write it like 5% or 0.05")
    if not 0 < chance <= 0.5:
        return refuse(f"'{value}' promises nothing: a chance of error is above 0 and at most one half, like 5%")
    return float(chance)


def _bursts(value: object) -> object:
    return None if value == "none" else value


Chance = Annotated[float, BeforeValidator(_chance), Field(gt=0, le=0.5)]
"""A probability of error that a policy declares: `5%` or 0.05; more than half would be no promise."""


Bursts = Annotated[
    Duration | None,
    BeforeValidator(_bursts),
    PlainSerializer(lambda b: "none" if b is None else duration_text(b), return_type=str),
]
"""The longest burst of trouble that one process may have by itself (`10s`), or `none`."""


Percent = Annotated[float, Field(ge=0.01, le=100)]
"""A share of the traffic; a hundredth of a percent is the finest there is."""


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """A question for the end of a message: which of the `known` words was meant; empty where none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""

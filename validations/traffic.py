"""What a policy asks of live traffic besides weights: the block `traffic` of the file. Pure: words, no versions yet."""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, field_validator, model_validator

from validations.units import Rate, nearest, refuse
from validations.verdict import Value

Alias = Literal["champion", "challenger", "previous"]
"""A version by what it is at the moment."""
ALIASES: tuple[str, ...] = get_args(Alias)


def _version(value: object) -> object:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not (text in ALIASES or re.fullmatch(r"[1-9]\d*", text)):
        near = nearest(str(value), ALIASES)
        refuse(f"'{value}' is no version: write its number, or one of {', '.join(ALIASES)}{near}")
    return text


def _header(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
        refuse(f"'{value}' is no name of a request header: write it like x-tenant")
    name = str(value).lower()
    if name == "x-shadow" or name.startswith(("x-titleshot-", "x-envoy-")):
        refuse(f"'{name}' is the gateway's own header, which it takes from callers' requests: choose another one")
    return name


def _text(value: object) -> object:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str):
        refuse("a header's value is text: put it in quotes")
    if not re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", str(text)) or len(str(text)) > 256:
        refuse("a header's value is 1 to 256 plain characters, with no space at either end")
    return text


AnyVersion = Annotated[str, BeforeValidator(_version)]
"""A version's number, or an alias."""
Header = Annotated[str, BeforeValidator(_header)]
"""The name of a request header, in lower case."""


class Like(Value):
    """The requests that have exactly this `value` in this `header`: a tenant, a region, a class of requests."""

    header: Header
    value: Annotated[str, BeforeValidator(_text)]


class Pinned(Like):
    """These requests are answered by `version`, whatever the weights say."""

    version: AnyVersion


class Shaping(Value):
    """What is asked of live traffic besides weights. The first pin that matches wins; `sticky` is a header whose value
    keeps to its version while weights grow; `limits` are requests per second by version; `priority` requests are taken
    first; `fallback` answers what everything before it fails.
    """

    pins: tuple[Pinned, ...] = ()
    sticky: Header | None = None
    limits: dict[AnyVersion, Rate] = {}
    priority: Like | None = None
    fallback: AnyVersion | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not (self.pins or self.sticky or self.limits or self.priority or self.fallback):
            words = ", ".join(Shaping.model_fields)
            refuse(f"this asks nothing: give some of {words}, or leave `traffic` out")
        return self

    @field_validator("pins")
    @classmethod
    def _each_matches(cls, pins: tuple[Pinned, ...]) -> tuple[Pinned, ...]:
        before: dict[tuple[str, str], str] = {}
        for pin in pins:
            key = pin.header, pin.value
            if key in before:
                refuse(
                    f"`{pin.header}: {pin.value}` is pinned twice, to {before[key]} and to {pin.version}: the first "
                    "pin that matches wins, so keep one"
                )
            before[key] = pin.version
        return pins

    @field_validator("sticky")
    @classmethod
    def _is_kept(cls, sticky: str | None) -> str | None:
        if sticky == "x-request-id":
            refuse("'x-request-id' is another for every request: name a header that a user keeps")
        return sticky

    @field_validator("fallback")
    @classmethod
    def _is_proven(cls, fallback: str | None) -> str | None:
        if fallback == "champion":
            refuse("the champion answers what the challenger fails already: name the version that answers for both")
        if fallback == "challenger":
            refuse("a challenger is not proven, so it answers nobody's failures: name a number, or `previous`")
        return fallback

    @property
    def numbers(self) -> frozenset[str]:
        """The versions that are named by number: those that must be there before a promotion begins."""
        named = {*(pin.version for pin in self.pins), *self.limits}
        named |= {self.fallback} if self.fallback is not None else set()
        return frozenset(named - set(ALIASES))


_RECORDS: dict[str, type[Value]] = {"pins": Pinned, "priority": Like}
_SHAPES = {
    "pins": "a list of { header: x-tenant, value: acme, version: 3 }",
    "limits": "a mapping of versions to rates, like { challenger: 20/s }",
}


def record(path: tuple[int | str, ...]) -> type[Value]:
    """The record that stands at `path`, which begins below `traffic`."""
    return _RECORDS.get(str(path[0]), Shaping) if path else Shaping


def shape_of(path: tuple[int | str, ...]) -> str:
    """In words, what belongs at `path`, which begins below `traffic`, where something of another shape stands."""
    if len(path) == 1 and path[0] in _SHAPES:
        return f"this is {_SHAPES[str(path[0])]}"
    return f"this is a mapping of {', '.join(record(path).model_fields)}"

"""Two answers to the same request, compared field by field.

Pure. A field is a path inside one row of an answer: `prediction` where the row is a single value, `[0]`, `[1]`, ...
where it is a list, the keys where it is an object, and `a.b[2].c` further down. How a field is compared is a
`Tolerance`; it holds for everything under the path that has none of its own.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from validations.gates import Tolerance

SHAPE = "shape"
"""The field that disagrees when status, row count, keys or kinds differ, or an answer cannot be read."""
NEARLY_EXACT = Tolerance(abs=1e-9, rel=1e-6)
"""How fields are compared that no tolerance is given for."""
_ROOT = "prediction"
_PATHS = 10_000
"""How many paths are remembered with their tolerance; answers may hold more."""


class _Field(NamedTuple):
    tolerance: Tolerance
    named: bool
    """Whether the tolerance is the path's own or that of a path above it, and not that of "*"."""
    whole: bool
    """Whether no path below has a tolerance of its own."""


class Comparison:
    """Says where two answers differ. `tolerances` go by path; `[*]` is any place in a list, "*" every other field."""

    def __init__(self, tolerances: Mapping[str, Tolerance] | None = None) -> None:
        self._named = dict(tolerances or {})
        self._otherwise = self._named.pop("*", NEARLY_EXACT)
        self._fields: dict[str, _Field] = {}

    def answers(self, a: bytes, b: bytes, differing: dict[str, float]) -> set[int] | None:
        """Fill `differing` (field -> how far apart, inf for what has no distance) from the champion's answer `a`
        and the challenger's `b`; gives the rows it touches, None for all.
        """
        try:
            one, two = predictions(a), predictions(b)
            if len(one) == len(two):
                return self._rows(one, two, differing)
        except (ValueError, RecursionError):
            pass
        differing[SHAPE] = math.inf
        return None

    def _rows(self, one: list[Any], two: list[Any], differing: dict[str, float]) -> set[int]:
        root = self._field("")
        plain = root.tolerance.kind in ("auto", "number") and not root.tolerance.ignore
        most, share = root.tolerance.abs, root.tolerance.rel
        touched = set()
        for at, (x, y) in enumerate(zip(one, two, strict=True)):
            # Most answers are one number a row: the short way. NaN and infinity take the long one.
            if plain and x.__class__ is y.__class__ is float and abs(x - y) <= most + share * abs(x) < math.inf:
                continue
            if self._differ(x, y, "", differing):
                touched.add(at)
        return touched

    def _differ(self, a: Any, b: Any, path: str, differing: dict[str, float], *, opened: bool = False) -> bool:
        """Whether something under `path` differs; what does is put down in `differing`."""
        field = self._field(path)
        if not path and any(isinstance(row, dict) and _ROOT in row for row in (a, b)):
            field = _Field(self._otherwise, named=False, whole=False)  # the name is that of a key here
        kind = field.tolerance.kind
        if field.tolerance.ignore and (field.named or field.whole):
            return False
        if kind == "json" and not opened and (isinstance(a, str) or isinstance(b, str)):
            a, b = _opened(a), _opened(b)
            return self._differ(a, b, path, differing, opened=True)
        if kind != "auto" and (apart := _apart_as(a, b, field)) is not None:
            return _put(differing, path, apart)
        if a.__class__ is list and b.__class__ is list:
            return self._lists(a, b, path, field, differing)
        if a.__class__ is dict and b.__class__ is dict:
            return self._objects(a, b, path, differing)
        return _values(a, b, path, field.tolerance, differing)

    def _lists(self, a: list[Any], b: list[Any], path: str, field: _Field, differing: dict[str, float]) -> bool:
        if len(a) != len(b):
            return _put(differing, SHAPE, math.inf)
        # At the top, `prediction` speaks of the row as a whole: its elements are "*", unless they are named.
        inside = field.tolerance if path else self._otherwise
        plain = field.whole and inside.kind in ("auto", "number") and not inside.ignore
        most, share = inside.abs, inside.rel
        found = False
        for at, (x, y) in enumerate(zip(a, b, strict=True)):
            if plain and x.__class__ is y.__class__ is float and abs(x - y) <= most + share * abs(x) < math.inf:
                continue
            if self._differ(x, y, f"{path}[{at}]", differing):
                found = True
        return found

    def _objects(self, a: dict[str, Any], b: dict[str, Any], path: str, differing: dict[str, float]) -> bool:
        prefix = path + "." if path else ""
        found = False
        if a.keys() != b.keys() and any(not self._ignored(prefix + key) for key in a.keys() ^ b.keys()):
            return _put(differing, SHAPE, math.inf)
        for key, x in a.items():
            if key in b and self._differ(x, b[key], prefix + key, differing):
                found = True
        return found

    def _ignored(self, path: str) -> bool:
        field = self._field(path)
        return field.tolerance.ignore and (field.named or field.whole)

    def _field(self, path: str) -> _Field:
        found = self._fields.get(path)
        if found is None:
            found = self._look_up(path)
            if len(self._fields) < _PATHS:
                self._fields[path] = found
        return found

    def _look_up(self, path: str) -> _Field:
        if not path:
            root = self._named.get(_ROOT)
            return _Field(root or self._otherwise, named=root is not None, whole=self._named.keys() <= {_ROOT})
        beneath = tuple(start + mark for start in _spellings(path) for mark in ".[")
        whole = not any(name.startswith(beneath) for name in self._named)
        above = path
        while above:
            for name in _spellings(above):
                if name in self._named:
                    return _Field(self._named[name], named=True, whole=whole)
            above = above[: max(above.rfind("."), above.rfind("["), 0)]
        return _Field(self._otherwise, named=False, whole=whole)


def predictions(answer: bytes) -> list[Any]:
    """The predictions of an answer, row by row; the answer itself is the only row where it has no list.

    Raises ValueError for what is not JSON.
    """
    data = parsed(answer)
    if isinstance(data, dict) and "predictions" in data:
        data = data["predictions"]
    return data if isinstance(data, list) else [data]


def parsed(body: bytes | str) -> Any:
    """JSON, with Python's NaN and Infinity too. Raises ValueError, also for what is nested too deeply."""
    try:
        return orjson.loads(body)
    except ValueError:
        try:
            return json.loads(body)
        except RecursionError as error:
            raise ValueError("nested too deeply to be read") from error


def _values(a: Any, b: Any, path: str, tolerance: Tolerance, differing: dict[str, float]) -> bool:
    if tolerance.ignore:
        return False
    if a.__class__ in (int, float) and b.__class__ in (int, float):
        return _put(differing, path, _apart(a, b, tolerance))
    if a.__class__ is not b.__class__:
        return _put(differing, SHAPE, math.inf)
    return _put(differing, path, 0.0 if a == b else math.inf)


def _spellings(path: str) -> tuple[str, str]:
    return path, re.sub(r"\[\d+\]", "[*]", path)


def _put(differing: dict[str, float], path: str, apart: float) -> bool:
    if not apart:
        return False
    name = path or _ROOT
    differing[name] = max(apart, differing.get(name, 0.0))
    return True


def _apart(a: float, b: float, tolerance: Tolerance) -> float:
    """How far apart, 0 within the tolerance; NaN agrees with NaN alone, and inf with inf."""
    difference = abs(a - b)
    if math.isnan(difference):
        return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf
    return 0.0 if difference <= tolerance.abs + tolerance.rel * abs(a) and difference < math.inf else difference


def _apart_as(a: Any, b: Any, field: _Field) -> float | None:
    """How far apart as the field's kind has it; None where these are no values of that kind."""
    tolerance = field.tolerance
    if tolerance.kind == "label":
        one, two = _label(a, named=field.named), _label(b, named=field.named)
        return None if one is None or two is None else (0.0 if one == two else math.inf)
    if tolerance.kind == "set" and isinstance(a, list) and isinstance(b, list):
        left, right = set(map(_element, a)), set(map(_element, b))
        alike = len(left & right) / len(left | right) if left or right else 1.0
        return 0.0 if alike >= tolerance.similar else 1 - alike
    if tolerance.kind == "text" and isinstance(a, str) and isinstance(b, str):
        alike = _alike(a, b, tolerance)
        return 0.0 if alike >= tolerance.similar else 1 - alike
    if tolerance.kind == "number":
        x, y = _number(a), _number(b)
        return None if x is None or y is None else _apart(x, y, tolerance)
    return None


def _label(value: Any, *, named: bool) -> tuple[bool, Any] | None:
    """What a value says as a label: itself, or the place of the largest of several numbers."""
    if isinstance(value, list | dict):
        numbers = value if isinstance(value, list) else list(value.values())
        if not numbers or any(x.__class__ not in (int, float) or x != x for x in numbers):  # noqa: PLR0124 - NaN
            return None
        if isinstance(value, list):
            return False, value.index(max(value))
        return (False, max(value, key=lambda key: value[key])) if named else None
    return isinstance(value, bool), value


def _element(value: Any) -> Any:
    """Something to compare members of a set by: 1 is 1.0, and True is not 1."""
    if value.__class__ in (int, float, str):
        return value
    return ("", json.dumps(value, sort_keys=True))


def _alike(a: str, b: str, tolerance: Tolerance) -> float:
    """How alike two texts are, white space aside: 1 for equal ones, or else the share of words in common
    (Dice 1945, each word as often as it stands there).
    """
    if not tolerance.case:
        a, b = a.casefold(), b.casefold()
    one, two = a.split(), b.split()
    if one == two:
        return 1.0
    common = (Counter(one) & Counter(two)).total()
    # The same words in another order are not quite the same text.
    return min(2 * common / (len(one) + len(two)), math.nextafter(1.0, 0.0))


def _number(value: Any) -> float | None:
    if value.__class__ in (int, float):
        return float(value)
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _opened(value: Any) -> Any:
    """What a text holds as JSON; the text where it holds none."""
    try:
        return parsed(value) if isinstance(value, str) else value
    except ValueError:
        return value

"""What two models' answers to the same requests say about the contract: form, labels, probabilities; never quality.

Pure: takes answers as JSON text, as callers read them. Other numbers, other roundings and other labels of the same
set are quality, and no difference here. Where a few rows cannot tell a broken contract from another opinion,
nothing is said: each such rule has its least number of rows.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from validations.signature import Difference

Reply = tuple[str, str]
"""(answer as JSON text, ""), or ("", why there is none, in one line)."""
Labels = Sequence[Any]
"""The labels of a classifier (texts, numbers, booleans), in the order of its probabilities."""

ENOUGH = 30
"""Rows from which on a pattern over rows (columns swapped, other labels, a scale) is believed."""
FIXED = 5
"""Rows from which on lists of one length are taken for the rule, and numbers a hundred times as large for percents."""
_ALIKE = 0.7  # the correlation of two columns that mean the same; 30 unrelated rows reach it once in 100,000
_MANY = 64  # places of a list that are looked at one by one
_MOST_CLASSES = 50


def compare(
    champion: Sequence[Reply],
    challenger: Sequence[Reply],
    *,
    outputs: Sequence[Mapping[str, Any]] = (),
    labels: tuple[Labels | None, Labels | None] = (None, None),
) -> list[Difference]:
    """What would break callers, all of it breaking; `kind` is refused, form, rows, type, nulls, width, keys,
    fractions, probability, labels or order.

    The replies go by their place: both sides were asked the same. `outputs` is the champion's signature: what it
    lets be missing, or be anything, may. `labels` are the two models' own, where known. Requests that the champion
    does not answer are left out; raises ValueError where it answers none.
    """
    asked = [(old, new) for old, new in zip(champion, challenger, strict=True) if not old[1]]
    if not asked:
        why = f" ({champion[0][1]})" if champion else ""
        raise ValueError(
            f"the champion itself answers none of {len(champion)} requests{why}: "
            "give it an input example that it answers, or send it live requests"
        )
    found = list(_refused(asked))
    old_rows: list[Any] = []
    new_rows: list[Any] = []
    for old, new in ((_read(a[0]), _read(b[0])) for a, b in asked if not b[1]):
        difference = _rows_differ(old, new)
        if difference is None:
            old_rows += _as_rows(old)
            new_rows += _as_rows(new)
        elif all(difference.kind != other.kind for other in found):
            found.append(difference)
    if old_rows:
        fields = list(_fields_differ(old_rows, new_rows, outputs))
        found += [*fields, *_meaning_differs(old_rows, new_rows, labels, known={d.kind for d in fields})]
    return found


def declared(champion: Any, challenger: Any) -> list[Difference]:
    """Compare the labels that two versions declare: the list `classes` in the metadata of each (None: not declared).

    Raises ValueError where one of them is no list of distinct texts, numbers or booleans.
    """
    old, new = (_declared(who, labels) for who, labels in (("champion", champion), ("challenger", challenger)))
    if old is None or new is None:
        return []
    return list(_labels_differ(old, new))


# Requests and rows ----------------------------------------------------------------------------------------


def _refused(asked: Sequence[tuple[Reply, Reply]]) -> Iterator[Difference]:
    why = [new[1] for _, new in asked if new[1]]
    if why:
        yield _breaks(
            "",
            "refused",
            f"the challenger does not answer {len(why)} of {len(asked)} requests that the champion answers "
            f"({why[0][:300]}): make it accept what the champion accepts",
        )


def _read(answer: str) -> Any:
    read = json.loads(answer)
    return read["predictions"] if isinstance(read, dict) and "predictions" in read else read


def _as_rows(predictions: Any) -> list[Any]:
    return predictions if isinstance(predictions, list) else [predictions]


def _rows_differ(old: Any, new: Any) -> Difference | None:
    if isinstance(old, list) != isinstance(new, list):
        message = (
            f"the champion's predictions are {_kind(old)}, the challenger's {_kind(new)}: "
            "give them in the form of the champion's"
        )
        return _breaks("", "form", message)
    if isinstance(old, list) and len(old) != len(new):
        message = (
            f"where the champion gives {len(old)} predictions the challenger gives {len(new)}: "
            "give one for each row, as the champion does"
        )
        return _breaks("", "rows", message)
    return None


# Fields ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """All values at one path of the answers."""

    kinds: dict[str, int] = field(default_factory=dict)
    widths: set[int] = field(default_factory=set)
    always: set[str] | None = None
    ever: set[str] = field(default_factory=set)
    whole: bool = True
    """Whether all numbers are written without a point."""
    example: Any = None

    def add(self, value: Any) -> None:
        kind = _kind(value)
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if isinstance(value, list):
            self.widths.add(len(value))
        elif isinstance(value, dict):
            self.always = set(value) if self.always is None else self.always & set(value)
            self.ever |= set(value)
        elif kind == NUMBER:
            self.whole = self.whole and isinstance(value, int)
            if self.example is None or value != int(value):
                self.example = value

    @property
    def rows(self) -> int:
        return sum(self.kinds.values())


NULL, NUMBER, TEXT, BOOLEAN, LIST, OBJECT = "null", "a number", "a text", "a boolean", "a list", "an object"


def _kind(value: Any) -> str:
    """One word for JSON's kinds; NaN and the infinities, which JSON does not have, are null."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NULL
    kinds = {bool: BOOLEAN, int: NUMBER, float: NUMBER, str: TEXT, list: LIST, dict: OBJECT}
    return kinds[type(value)]


def _look(rows: Sequence[Any]) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    for row in rows:
        for path, value in _walk(row, ""):
            seen.setdefault(path, _Seen()).add(value)
    return seen


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """`value` and all inside it; paths are those of the shadow gate: `[0]`, `label`, `scores[1]`, `a.b`."""
    yield path, value
    if isinstance(value, list):
        for at, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{at if at < _MANY else ''}]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}" if path else str(key))


def _fields_differ(old: list[Any], new: list[Any], outputs: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    named = {str(column.get("name", "")): column for column in outputs if "name" in column or len(outputs) == 1}
    anything = [name for name, column in named.items() if column.get("type") == "any"]
    before, after = _look(old), _look(new)
    lost = [name for name in anything if name] if "" not in anything else [""]
    for path, was in before.items():
        now = after.get(path)
        if now is None or any(_inside(path, above) for above in lost):
            continue
        column = named.get(path, {})
        optional = column.get("required") is False or NULL in was.kinds
        if NULL in now.kinds and not optional:
            yield _breaks(
                path,
                "nulls",
                f"{_name(path)} is null, NaN or infinite in {now.kinds[NULL]} of {now.rows} of the challenger's "
                "answers, and never in the champion's: give a value, as the champion does",
            )
        kinds = [set(side.kinds) - {NULL} for side in (was, now)]
        if kinds[0] and kinds[1] - kinds[0]:
            lost.append(path)
            yield _breaks(
                path,
                "type",
                f"{_name(path)} is {' or '.join(sorted(kinds[0]))} in the champion's answers and "
                f"{' or '.join(sorted(kinds[1] - kinds[0]))} in the challenger's: convert it inside the model",
            )
        elif not was.widths >= now.widths and _fixed(was, path, before):
            lost.append(path)
            (width,), widths = was.widths, " or ".join(map(str, sorted(now.widths)))
            yield _breaks(
                path,
                "width",
                f"{_name(path)} has {width} values in the champion's answers and {widths} in the challenger's: "
                f"keep the champion's {width}, in their order",
            )
        elif was.always is not None and now.always is not None and column.get("type") != "map":
            yield from _keys(path, was, now, [name for name, c in named.items() if c.get("required") is False])
        elif _fractions(was, now) and column.get("type") not in ("double", "float"):
            yield _breaks(
                path,
                "fractions",
                f"{_name(path)} is a whole number in the champion's answers and {now.example:.4g} in the "
                "challenger's: convert it to a whole number inside the model, or give the label itself",
            )


def _fractions(was: _Seen, now: _Seen) -> bool:
    """Whether the champion writes whole numbers, without a point, and the challenger's have something behind it."""
    return NUMBER in was.kinds and was.whole and not now.whole and now.example != int(now.example)


def _inside(path: str, above: str) -> bool:
    return not above or path == above or path.startswith((f"{above}.", f"{above}["))


def _fixed(was: _Seen, path: str, before: Mapping[str, _Seen]) -> bool:
    """Whether the champion's lists have one length by rule: on many rows, or lists of fractions."""
    if len(was.widths) != 1 or was.widths == {0}:
        return False
    inner = [seen for at, seen in before.items() if re.fullmatch(re.escape(path) + r"\[\d*\]", at)]
    fractions = bool(inner) and all(set(seen.kinds) <= {NUMBER, NULL} for seen in inner)
    return was.rows >= FIXED or (fractions and not all(seen.whole for seen in inner))


def _keys(path: str, was: _Seen, now: _Seen, optional: Sequence[str]) -> Iterator[Difference]:
    assert was.always is not None
    assert now.always is not None
    if was.ever != was.always or not was.ever:  # the champion's own objects differ: keys are data there
        return
    new = sorted(now.ever - was.ever)
    for key in sorted(was.always - now.always):
        inner = f"{path}.{key}" if path else key
        if inner in optional:
            continue
        near = difflib.get_close_matches(key, new, n=1, cutoff=0.6)
        if near:
            new.remove(near[0])
            what = f"'{inner}' seems to be called '{near[0]}' in the challenger's answers: keep the name '{key}'"
        else:
            what = f"'{inner}' is missing in the challenger's answers: keep it"
        yield _breaks(inner, "keys", what)
    for key in new:
        inner = f"{path}.{key}" if path else key
        what = f"'{inner}' is new, and callers do not expect it: give the champion's fields and no others"
        yield _breaks(inner, "keys", what)


# What the values mean -------------------------------------------------------------------------------------


def _meaning_differs(
    old: list[Any], new: list[Any], labels: tuple[Labels | None, Labels | None], known: set[str]
) -> Iterator[Difference]:
    """Probabilities and labels; where a side has another form (`known` tells of it) the row is left out."""
    before, after = ([dict(_walk(row, "")) for row in side] for side in (old, new))
    seen = _look(old)
    leaves = [path for path, what in seen.items() if not {LIST, OBJECT} & set(what.kinds)]
    vectors: list[str] = []
    for path in seen:
        pairs = [(a.get(path), b.get(path)) for a, b in zip(before, after, strict=True)]
        pairs = [(a, b) for a, b in pairs if _kind(a) == _kind(b)]
        if not pairs or any(_inside(path, above) for above in vectors):
            continue
        one, two = [a for a, _ in pairs], [b for _, b in pairs]
        kinds = {_kind(value) for value in one}
        if kinds in ({LIST}, {OBJECT}):
            (matrix, _), (other, names) = _matrix(one), _matrix(two)
            if matrix is not None and other is not None and _probabilities(matrix):
                vectors.append(path)
                yield from _vectors_differ(path, matrix, other, names or labels[0])
            continue
        if kinds == {NUMBER}:
            yield from _scale_differs(path, np.array(one, float), np.array(two, float))
        if kinds == {TEXT} or (leaves == [path] and labels[0] is not None and "fractions" not in known):
            yield from _vocabulary_differs(path, one, two, labels)
    yield from _own_labels_differ(old, labels)


def _vectors_differ(
    path: str, old: NDArray[np.float64], new: NDArray[np.float64], names: Sequence[Any] | None
) -> Iterator[Difference]:
    """Two matrices, of which the champion's holds the probabilities of classes in each row."""
    if old.shape != new.shape:
        return
    outside = new[(new < -1e-6) | (new > 1 + 1e-6)]
    sums = new.sum(axis=1)
    apart = np.abs(sums - 1)
    if outside.size:
        yield _breaks(path, "probability", _not_probable(path, float(outside[np.argmax(np.abs(outside - 0.5))])))
    elif len(old) > 1 and (apart > 0.01 * max(2, old.shape[1])).any():  # room for rounding to two digits
        yield _breaks(
            path,
            "probability",
            f"the champion's probabilities sum to 1 in each row, and the challenger's to {sums[apart.argmax()]:.4g}: "
            "give probabilities of classes that exclude each other (predict_proba, softmax)",
        )
    elif order := _reordered(old, new):
        yield _breaks(path, "order", _order_message(order, names))


def _matrix(values: list[Any]) -> tuple[NDArray[np.float64] | None, list[str]]:
    """Rows of numbers as a matrix, with the names of the columns where the rows are objects."""
    names = sorted(values[0]) if isinstance(values[0], dict) else []
    if names and all(isinstance(row, dict) and sorted(row) == names for row in values):
        values = [[row[name] for name in names] for row in values]
    width = len(values[0])
    if width < 2 or any(not isinstance(row, list) or len(row) != width for row in values):
        return None, []
    if any(_kind(number) != NUMBER for row in values for number in row):
        return None, []
    return np.array(values, float), names


def _probabilities(old: NDArray[np.float64]) -> bool:
    """Whether these rows are probabilities of classes; rows of 0 and 1 alone may be anything."""
    rounded = np.allclose(old, old.round(3), rtol=0, atol=1e-9)
    room = 0.005 * old.shape[1] if rounded else 1e-4
    within = bool((old >= -1e-9).all() and (old <= 1 + 1e-9).all())
    return within and bool((np.abs(old.sum(axis=1) - 1) <= room).all()) and bool(((old > 0) & (old < 1)).any())


def _not_probable(path: str, value: float) -> str:
    return (
        f"{_name(path)} is a probability in the champion's answers, and {value:.4g} in the challenger's: convert it to "
        "one inside the model (predict_proba; a hundredth of percents, the sigmoid of log-odds)"
    )


def _scale_differs(path: str, old: NDArray[np.float64], new: NDArray[np.float64]) -> Iterator[Difference]:
    """Single numbers: those of a regression may lie between 0 and 1 by chance, so this wants rows and a lot of room."""
    likely = old.min() >= 0 and old.max() <= 1 and bool(((old > 0) & (old < 1)).any())
    if not likely or old.size < FIXED:
        return
    beyond = np.maximum(-new, new - 1)
    positive = old > 0
    if old.size < ENOUGH:
        percent = new.min() > 1 and positive.all() and 50 <= np.median(new / np.where(positive, old, 1)) <= 200
    else:
        percent = bool(np.mean(beyond > 0.25) >= 0.05)
    if percent:
        yield _breaks(path, "probability", _not_probable(path, float(new[beyond.argmax()])))
    elif _reordered(np.stack([1 - old, old], axis=1), np.stack([1 - new, new], axis=1)):
        yield _breaks(
            path,
            "order",
            f"{_name(path)} falls in the challenger's answers where it rises in the champion's, as the probability "
            "of the other class does: give the probability of the champion's class",
        )


def _reordered(old: NDArray[np.float64], new: NDArray[np.float64]) -> dict[int, int]:
    """The champion's columns whose values stand in another column of the challenger: {champion's: challenger's}.

    The best assignment of columns by their correlation over the rows. A cycle of it counts where it is far better
    than no change: each column goes with its partner, not with itself, and lies much nearer to it.
    """
    live = np.flatnonzero((old.std(axis=0) > 1e-9) & (new.std(axis=0) > 1e-9))
    if len(old) < ENOUGH or not 1 < live.size <= _MOST_CLASSES:
        return {}
    one, two = old[:, live], new[:, live]
    alike = np.corrcoef(one, two, rowvar=False)[: live.size, live.size :]
    _, partner = linear_sum_assignment(-alike)
    found: dict[int, int] = {}
    for cycle in _cycles(partner.tolist()):
        to = partner[cycle]
        near = np.abs(one[:, cycle] - two[:, to]).mean() <= 0.5 * np.abs(one[:, cycle] - two[:, cycle]).mean()
        if near and alike[cycle, to].min() >= _ALIKE and (alike[cycle, to] - alike[cycle, cycle]).min() >= 0.5:
            found |= {int(live[at]): int(live[partner[at]]) for at in cycle}
    return dict(sorted(found.items()))


def _cycles(partner: Sequence[int]) -> Iterator[list[int]]:
    """The cycles of a permutation that move anything."""
    left = {at for at, to in enumerate(partner) if at != to}
    while left:
        cycle = [min(left)]
        while partner[cycle[-1]] != cycle[0]:
            cycle.append(partner[cycle[-1]])
        left -= set(cycle)
        yield cycle


def _order_message(order: Mapping[int, int], labels: Sequence[Any] | None) -> str:
    def name(at: int) -> str:
        return f"'{labels[at]}'" if labels and at < len(labels) else f"column {at}"

    moves = ", ".join(f"{name(at)} stands at column {to}" for at, to in list(order.items())[:4])
    return (
        f"the challenger's probabilities are in another order of classes than the champion's ({moves}): "
        "order its columns as the champion's are, and train with the same coding of the label"
    )


# Labels ---------------------------------------------------------------------------------------------------


def _vocabulary_differs(
    path: str, one: list[Any], two: list[Any], labels: tuple[Labels | None, Labels | None]
) -> Iterator[Difference]:
    old, new = ({_plain(value): value for value in side} for side in (one, two))
    known = {_plain(label): label for label in labels[0] or ()}
    if known and set(old) <= set(known):
        strange = [value for key, value in new.items() if key not in known]
        if strange:
            yield _breaks(path, "labels", _strange(path, strange[0], list(known.values())))
        elif order := _relabelled(one, two, list(known)):
            yield _breaks(path, "order", order)
        return
    if not all(isinstance(value, str) and len(value) <= 40 and value.count(" ") < 3 for value in one):
        return  # free text has no vocabulary
    strange = [value for key, value in new.items() if key not in old]
    bare = {_bare(value) for value in one}
    variants = [value for value in strange if _bare(value) in bare]
    few = len(one) >= ENOUGH and 1 < len(old) <= len(one) / FIXED  # one text for all is a version, say
    if variants or (few and not set(old) & set(new)):
        yield _breaks(path, "labels", _strange(path, (variants or strange)[0], list(old.values())))
    elif few and (order := _relabelled(one, two, list(old))):
        yield _breaks(path, "order", order)


def _strange(path: str, label: Any, known: Sequence[Any]) -> str:
    some = ", ".join(repr(value) for value in known[:5]) + (", ..." if len(known) > 5 else "")
    return (
        f"{_name(path)} is {label!r} in the challenger's answers, which is none of the champion's labels ({some}): "
        "map it to one of them"
    )


def _relabelled(one: list[Any], two: list[Any], labels: Sequence[Any]) -> str:
    """A sentence where the challenger says one label wherever the champion says another."""
    old, new = (
        np.array([[_plain(value) == label for label in labels] for value in side], float) for side in (one, two)
    )
    order = _reordered(old, new)
    if not order:
        return ""
    pairs = ", ".join(f"{labels[to][1]!r} where the champion says {labels[at][1]!r}" for at, to in order.items())
    return f"the challenger says {pairs}: map its labels to the champion's, and train with the same coding"


def _own_labels_differ(old: list[Any], labels: tuple[Labels | None, Labels | None]) -> Iterator[Difference]:
    """The two models' own labels, where the champion's answers are made of them."""
    if labels[0] is None or labels[1] is None:
        return
    before, after = [_plain(label) for label in labels[0]], [_plain(label) for label in labels[1]]
    if all(not isinstance(row, list | dict) and _plain(row) in before for row in old):
        strange = [label for label in after if label not in before]
        if strange and strange[0][0] == before[0][0]:
            message = (
                f"the challenger has the label {strange[0][1]!r}, which the champion does not have: "
                "map it to one of the champion's labels"
            )
            yield _breaks("classes", "labels", message)
    elif all(isinstance(row, list) and len(row) == len(before) for row in old):
        moved = [label for label in before if label in after and after.index(label) != before.index(label)]
        if moved:
            yield _breaks("classes", "order", _order_of(labels[0], labels[1]))


def _labels_differ(old: Labels, new: Labels) -> Iterator[Difference]:
    before, after = [_plain(label) for label in old], [_plain(label) for label in new]
    if before == after:
        return
    if set(before) == set(after):
        yield _breaks("classes", "classes", _order_of(old, new))
        return
    gone = [repr(label) for label in old if _plain(label) not in after]
    fresh = [repr(label) for label in new if _plain(label) not in before]
    if gone:
        what = f"the challenger does not have the labels {', '.join(gone)} of the champion: keep them, in their order"
        yield _breaks("classes", "classes", what)
    if fresh:
        what = f"the labels {', '.join(fresh)} are new, and callers do not know them: map them to the champion's labels"
        yield _breaks("classes", "classes", what)


def _order_of(old: Labels, new: Labels) -> str:
    return (
        f"the champion's classes are in the order {list(old)}, the challenger's in the order {list(new)}: "
        "order them as the champion's are"
    )


def _declared(who: str, labels: Any) -> Labels | None:
    if labels is None:
        return None
    plain = isinstance(labels, list) and all(isinstance(label, str | bool | int | float) for label in labels)
    if not plain or not labels or len({_plain(label) for label in labels}) != len(labels):
        raise ValueError(
            f"the {who}'s metadata has the classes {labels!r}: give a list of distinct labels, as in "
            "log_model(..., metadata={'classes': model.classes_.tolist()})"
        )
    return list(labels)


def _plain(label: Any) -> tuple[str, Any]:
    """A label as it is compared: 1, 1.0 and true are one, and '1' is another."""
    return ("text", label) if isinstance(label, str) else ("number", label)


def _bare(label: str) -> str:
    return re.sub(r"[\s_-]+", "", label).casefold()


def _name(path: str) -> str:
    return f"'{path}'" if path else "the prediction"


def _breaks(column: str, kind: str, message: str) -> Difference:
    return Difference(column=column or "prediction", kind=kind, message=message, breaking=True)

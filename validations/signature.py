"""Whether every request that the champion accepts is accepted by the challenger, and answered alike.

Pure: compares two MLflow signatures as `ModelSignature.to_dict()` gives them. What MLflow's scoring server
accepts was measured, and a test holds this module against it: it drops extra columns, orders named ones,
fills optional ones, and casts whatever JSON it can, even where that changes the value (2.5 becomes 2 in a
`long` column). A cast that changes values counts as breaking here. Inside arrays, objects and maps MLflow
casts nothing (1 is no `double` there) and refuses properties it does not know.

Inputs may only become wider, answers only narrower: callers send the champion's requests and read the
champion's answers. What signatures cannot say (labels, probabilities, nulls) is in `validations.answers`.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from validations.verdict import Measurement, Value

Signature = Mapping[str, Any]
"""`{"inputs": ..., "outputs": ..., "params": ...}`: JSON strings, or the lists already parsed from them."""

# A 32 bit float holds no integer beyond 2^24 exactly, so `float` is not wider than `integer`.
_WIDER = {"integer": {"long", "double"}, "long": {"double"}, "float": {"double"}}
_WIDER_INSIDE = {"integer": {"long"}, "float": {"double"}}
# Of a param MLflow makes Python's own int and float, which lose nothing.
_WIDER_PARAM = {"integer": {"long", "float", "double"}, "long": {"double"}, "float": {"double"}}
_SAME_IN_JSON = {"integer": "whole number", "long": "whole number", "float": "number", "double": "number"}


class Difference(Value):
    """One thing that changed from the champion to the challenger.

    `column` is the input, output, param or answer field it speaks of; `kind` one of added, dropped, renamed,
    required, optional, narrowed, widened, reordered, layout, output, param (of signatures), classes (of
    declared labels), or one of those in `validations.answers`; `message` a sentence that names the column,
    and after its last colon the mend where it breaks.
    """

    column: str
    kind: str
    message: str
    breaking: bool


def compare(champion: Signature | None, challenger: Signature | None) -> list[Difference]:
    """All differences: of inputs, then outputs, then params. Raises ValueError for a missing signature."""
    old, new = parsed(champion, "champion"), parsed(challenger, "challenger")
    return [
        *_inputs(old["inputs"], new["inputs"]),
        *_outputs(old["outputs"], new["outputs"]),
        *_params(old["params"], new["params"]),
    ]


def measurements(champion: Signature | None, challenger: Signature | None) -> dict[str, Measurement]:
    """`breaking_changes` between two signatures; see `counted`. Raises ValueError for a missing signature."""
    return counted("breaking_changes", compare(champion, challenger))


def counted(metric: str, differences: Sequence[Difference]) -> dict[str, Measurement]:
    """`metric`: how many of `differences` break (exact); `where` is the first one's column, `note` its message."""
    breaking = [difference for difference in differences if difference.breaking]
    if breaking:
        more = f" (and {len(breaking) - 1} more)" if len(breaking) > 1 else ""
        measured = Measurement.exact(len(breaking), where=breaking[0].column, note=breaking[0].message + more)
    else:
        note = "; ".join(difference.message for difference in differences[:3])
        measured = Measurement.exact(0, note=note)
    return {metric: measured}


def parsed(signature: Signature | None, side: str = "model") -> dict[str, list[dict[str, Any]]]:
    """`inputs`, `outputs` and `params` as lists. Raises ValueError, with the mend, where one of them is missing."""
    found = {}
    for part in ("inputs", "outputs", "params"):
        value = (signature or {}).get(part)
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"the {side}'s signature has {part} that are not JSON") from error
        if not value and part != "params":
            what = f"has no {part} in its signature" if signature else "has no signature"
            raise ValueError(
                f"the {side} {what}, so nobody knows what it takes and gives: log it again with "
                "log_model(..., signature=infer_signature(X, model.predict(X)))"
            )
        found[part] = list(value or [])
    return found


def _inputs(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[Difference]:
    if _layout(old) != _layout(new):
        yield _breaks(
            str(_label(new[0], 0)),
            "layout",
            f"the champion takes {_layout(old)}, the challenger {_layout(new)}: "
            "log the challenger with the same kind of input as the champion",
        )
        return
    if _layout(old).endswith("without names"):
        yield from _by_position(old, new)
        return
    before = {column["name"]: column for column in old}
    after = {column["name"]: column for column in new}
    dropped = [name for name in before if name not in after]
    for name, column in after.items():
        if name in before:
            yield from _changed(name, before[name], column)
        elif not _required(column) and not (near := _spelt_otherwise(name, dropped)):
            yield _harmless(name, "added", f"'{name}' is new and optional")
        else:
            near = _spelt_otherwise(name, dropped) or _near(name, dropped)
            if near:
                dropped.remove(near)
                yield _breaks(
                    name,
                    "renamed",
                    f"'{near}' seems to be called '{name}' now, and requests still say '{near}': "
                    f"keep the name '{near}'",
                )
            else:
                yield _breaks(
                    name,
                    "added",
                    f"'{name}' ({_words(column)}) is new and required, and requests do not carry it: "
                    "compute it inside the model, or make it optional (required=False)",
                )
    for name in dropped:
        yield _harmless(name, "dropped", f"'{name}' is no longer looked at")
    if [n for n in before if n in after] != [n for n in after if n in before]:
        yield _harmless("", "reordered", "the columns are in another order, and go by their names")
    if _nested(new) and not _nested(old):
        note = f"with '{_nested(new)[0]}', a list or an object, MLflow refuses rows sent as `instances`"
        yield _harmless(_nested(new)[0], "added", f"{note}: send `inputs` or a dataframe, if anyone sends them")


def _nested(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    return [column["name"] for column in columns if _plain(column).get("type") in ("array", "object")]


def _by_position(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[Difference]:
    """Columns without names: MLflow takes the first ones and counts the rest as extra."""
    for at, (before, after) in enumerate(zip(old, new, strict=False)):
        yield from _changed(str(_label(after, at)), before, after)
    for at in range(len(old), len(new)):
        label = str(_label(new[at], at))
        message = f"column {label} is new, and requests do not carry it: compute it inside the model"
        yield _breaks(label, "added", message)
    if len(new) < len(old):
        yield _harmless("", "dropped", f"only the first {len(new)} of {len(old)} columns are looked at")


def _changed(name: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[Difference]:
    if _required(after) and not _required(before):
        yield _breaks(
            name,
            "required",
            f"'{name}' was optional and is required now: make it optional (required=False), "
            "and let the model fill what is missing",
        )
    elif _required(before) and not _required(after):
        yield _harmless(name, "optional", f"'{name}' is optional now")
    narrowed = list(_narrowed(before, after, name, inside=False))
    for where, what in narrowed:
        yield _breaks(name, "narrowed", f"{where} {what}")
    if not narrowed and _type(before) != _type(after):
        sizes = [list(side.get("tensor-spec", {}).get("shape", ())) for side in (before, after)]
        frames = ", and MLflow refuses rows sent as a dataframe then" if sizes[0][1:] != sizes[1][1:] else ""
        yield _harmless(name, "widened", f"'{name}' {_change(before, after)}{frames}")


def _narrowed(old: Mapping[str, Any], new: Mapping[str, Any], path: str, *, inside: bool) -> Iterator[tuple[str, str]]:
    """Every place under `path` where a value of type `old` is none of type `new`: (place, what and mend)."""
    old, new = _plain(old), _plain(new)
    was, now = old.get("type"), new.get("type")
    if was != now:
        yield from _retyped(old, new, path, inside=inside)
    elif was == "array":
        yield from _narrowed(old["items"], new["items"], f"{path}[]", inside=True)
    elif was == "map":
        yield from _narrowed(old["values"], new["values"], f"{path}{{}}", inside=True)
    elif was == "object":
        yield from _narrowed_object(old["properties"], new["properties"], path)
    elif was == "tensor" and not _tensor_fits(old["tensor-spec"], new["tensor-spec"]):
        yield f"'{path}'", f"{_change(old, new)}, which takes less: {_keep(old)}"


def _retyped(old: Mapping[str, Any], new: Mapping[str, Any], path: str, *, inside: bool) -> Iterator[tuple[str, str]]:
    """As `_narrowed`, for two kinds of type."""
    was, now = str(old.get("type")), str(new.get("type"))
    wider = _WIDER_INSIDE if inside else _WIDER
    if now == "any":
        if was == "binary" or (was == "datetime" and not inside):
            yield f"'{path}'", f"{_change(old, new)}, and MLflow hands the model text then: {_keep(old)}"
    elif was == "object" and now == "map":
        for key, spec in old["properties"].items():
            yield from _narrowed(spec, new["values"], f"{path}.{key}", inside=True)
            if not _required(spec):
                yield f"'{path}.{key}'", f"was optional, and a map takes no null: {_keep(old)}"
    elif now not in wider.get(was, ()):
        narrower = was == "any" or was in wider.get(now, ())
        what = "narrower" if narrower else "another type"
        yield f"'{path}'", f"{_change(old, new)}, which is {what}: {_keep(old)}"


def _change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return f"was {_words(old)} and is {_words(new)} now"


def _keep(old: Mapping[str, Any]) -> str:
    return f"keep {_words(old)}, and convert inside the model"


def _narrowed_object(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for key in old:
        if key not in new:
            yield f"'{path}.{key}'", "is gone, and MLflow refuses objects that still have it: keep it"
    for key, spec in new.items():
        if key in old:
            yield from _narrowed(old[key], spec, f"{path}.{key}", inside=True)
        if _required(spec) and not (key in old and _required(old[key])):
            yield f"'{path}.{key}'", "is required now, and requests need not carry it: make it optional"


def _outputs(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[Difference]:
    if _layout(old) != _layout(new):
        yield _breaks(
            "output",
            "output",
            f"the champion answers {_layout(old)}, the challenger {_layout(new)}, and callers read the "
            "champion's answer: give the same kind of output, and log the signature with it",
        )
        return
    before = {_label(column, at): column for at, column in enumerate(old)}
    after = {_label(column, at): column for at, column in enumerate(new)}
    for name in [*before, *(name for name in after if name not in before)]:
        label = f"output '{name}'"
        if name not in after:
            what = "is gone, and callers read it: keep it"
        elif name not in before:
            what = "is new, and callers do not expect it: give the champion's outputs and no others"
        elif not _answer_fits(before[name], after[name]):
            was = _words(before[name])
            what = f"was {was} and is {_words(after[name])} now, and callers read {was}: convert it inside the model"
        elif _required(before[name]) and not _required(after[name]):
            what = "may be missing now, and callers rely on it: make it required, and always give it"
        elif _type(before[name]) != _type(after[name]):
            message = f"{label} was {_words(before[name])} and is {_words(after[name])} now: callers read it as before"
            yield _harmless(label, "output", message)
            continue
        else:
            continue
        yield _breaks(label, "output", f"{label} {what}")


def _answer_fits(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether who reads answers of the type `old`, in JSON, can read those of the type `new`."""
    old, new = _plain(old), _plain(new)
    was, now = str(old.get("type")), str(new.get("type"))
    if was == "any":
        return True
    if was != now:
        return was in _SAME_IN_JSON and _SAME_IN_JSON[was] == _SAME_IN_JSON.get(now)
    inner = {"array": "items", "map": "values"}.get(was)
    if inner:
        return _answer_fits(old[inner], new[inner])
    if was == "object":
        one, two = old["properties"], new["properties"]
        return set(one) == set(two) and all(
            _answer_fits(one[key], two[key]) and (_required(two[key]) or not _required(one[key])) for key in one
        )
    return was != "tensor" or _tensor_answer_fits(old["tensor-spec"], new["tensor-spec"])


def _tensor_answer_fits(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if len(old["shape"]) != len(new["shape"]):
        return False
    if any(was not in (-1, now) for was, now in zip(old["shape"], new["shape"], strict=True)):
        return False
    kinds = {_dtype_kind(spec["dtype"]) for spec in (old, new)}
    return old["dtype"] == new["dtype"] or kinds in ({"f"}, {"i"}, {"u"}, {"i", "u"})


def _params(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[Difference]:
    before = {param["name"]: param for param in old}
    after = {param["name"]: param for param in new}
    for name, was in before.items():
        label = f"param '{name}'"
        now = after.get(name)
        if now is None:
            near = _near(name, [other for other in after if other not in before])
            gone = f"seems to be called '{near}' now" if near else "is gone"
            message = f"{label} {gone}, and MLflow ignores in silence requests that set '{name}': keep it"
            yield _breaks(label, "param", message)
            continue
        narrowed = list(_narrowed_param(was, now, name))
        for where, what in narrowed:
            yield _breaks(label, "param", f"param {where} {what}")
        if not narrowed and _type(was) | {"default": 0} != _type(now) | {"default": 0}:
            yield _harmless(label, "param", f"{label} was {_words(was)} and is {_words(now)} now")
        if not _same_default(was.get("default"), now.get("default")):
            yield _breaks(
                label,
                "param",
                f"{label} was {was.get('default')!r} by default and is {now.get('default')!r} now, so "
                "requests that leave it out would be answered differently: keep the default",
            )
    for name in after:
        if name not in before:
            yield _harmless(f"param '{name}'", "param", f"param '{name}' is new, and has a default")


def _narrowed_param(was: dict[str, Any], now: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """As `_narrowed`, by the rules of params."""
    kinds = [str(param.get("type") or param.get("dtype")) for param in (was, now)]
    if kinds == ["object", "object"]:
        yield from _narrowed_object(was.get("properties", {}), now.get("properties", {}), name)
    elif was.get("shape") != now.get("shape") or (
        kinds[0] != kinds[1] and kinds[1] not in _WIDER_PARAM.get(kinds[0], ())
    ):
        yield f"'{name}'", f"was {_words(was)} and is {_words(now)} now: keep {_words(was)}"


def _same_default(was: Any, now: Any) -> bool:
    """NaN is the same default as NaN, 1 as 1.0; but True is not 1."""
    return bool(was == now and isinstance(was, bool) == isinstance(now, bool)) or repr(was) == repr(now)


def _breaks(column: str, kind: str, message: str) -> Difference:
    return Difference(column=column, kind=kind, message=message, breaking=True)


def _harmless(column: str, kind: str, message: str) -> Difference:
    return Difference(column=column, kind=kind, message=message, breaking=False)


def _layout(schema: Sequence[Mapping[str, Any]]) -> str:
    kind = "tensors" if schema[0].get("type") == "tensor" else "columns"
    names = "with" if schema[0].get("name") is not None else "without"
    return f"{kind} {names} names"


def _label(column: Mapping[str, Any], at: int) -> Any:
    return column.get("name", at)


def _required(column: Mapping[str, Any]) -> bool:
    return bool(column.get("required", True))


def _type(column: Mapping[str, Any]) -> Any:
    """The type without name and optionality of the column itself; those of nested properties stay."""
    return {key: value for key, value in column.items() if key not in ("name", "required", "optional")}


def _plain(column: Mapping[str, Any]) -> Mapping[str, Any]:
    """A Spark vector is an array of doubles to callers, and MLflow enforces it as one."""
    if column.get("type") == "sparkml_vector":
        return {**column, "type": "array", "items": {"type": "double"}}
    return column


def _words(column: Mapping[str, Any]) -> str:
    """A type as people write it: long, array of double, tensor of float32 (-1, 3)."""
    kind = column.get("type") or column.get("dtype")
    if kind == "array":
        return f"array of {_words(column['items'])}"
    if kind == "map":
        return f"map of {_words(column['values'])}"
    if kind == "object":
        inner = ", ".join(f"{key}: {_words(spec)}" for key, spec in column.get("properties", {}).items())
        return f"object ({inner})"
    if kind == "tensor":
        spec = column["tensor-spec"]
        return f"tensor of {spec['dtype']} {tuple(spec['shape'])}"
    return f"list of {kind}" if column.get("shape") else str(kind)


def _spelt_otherwise(name: str, candidates: Collection[str]) -> str | None:
    """The candidate that differs in case and separators only: `DepDelay` for `dep_delay`."""
    bare = re.sub(r"[\W_]", "", name).lower()
    return next((other for other in candidates if bare and re.sub(r"[\W_]", "", other).lower() == bare), None)


def _near(name: str, candidates: Sequence[str]) -> str | None:
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return found[0] if found else None


def _tensor_fits(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether MLflow takes every tensor of the kind `old` for `new`, values unchanged."""
    sizes = [old["shape"], new["shape"]]
    if new["dtype"] == "object" and list(new["shape"]) == [-1]:
        return True  # MLflow lets pass any input there
    if len(sizes[0]) != len(sizes[1]) or any(now not in (-1, was) for was, now in zip(*sizes, strict=True)):
        return False
    if old["dtype"] == new["dtype"] or new["dtype"] == "object":
        return True
    # NumPy calls it safe to write numbers as text; for a model it is another type.
    numbers = all(_dtype_kind(spec["dtype"]) in "iufc" for spec in (old, new))
    return numbers and np.can_cast(old["dtype"], new["dtype"], "safe")


def _dtype_kind(name: str) -> str:
    """NumPy's letter for the kind of a dtype: i, u, f, c, b, O, U, ...; ? for what it does not know."""
    try:
        return np.dtype(name).kind
    except TypeError:
        return "?"

"""Whether every request that the champion accepts is accepted by the challenger, and answered alike.

Pure: compares two MLflow signatures as `ModelSignature.to_dict()` gives them. What MLflow's scoring server
accepts was measured, and a test holds this module against it: it drops extra columns, orders named ones,
fills optional ones, and casts whatever JSON it can, even where that changes the value (2.5 becomes 2 in a
`long` column). A cast that changes values counts as breaking here. Inside arrays, objects and maps MLflow
casts nothing (1 is no `double` there) and refuses properties it does not know.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from validations.verdict import Measurement, Value

Signature = Mapping[str, Any]
"""`{"inputs": ..., "outputs": ..., "params": ...}`: JSON strings, or the lists already parsed from them."""

_WIDER = {"integer": {"long", "float", "double"}, "long": {"double"}, "float": {"double"}}
_WIDER_INSIDE = {"integer": {"long"}, "float": {"double"}}


class Difference(Value):
    """One thing that changed from the champion's signature to the challenger's.

    `column` is the input, output or param it speaks of; `kind` one of added, dropped, renamed, required,
    optional, narrowed, widened, reordered, layout, output, param; `message` a sentence that names the
    column, and the mend where it breaks.
    """

    column: str
    kind: str
    message: str
    breaking: bool


def compare(champion: Signature | None, challenger: Signature | None) -> list[Difference]:
    """All differences: of inputs, then outputs, then params. Raises ValueError for a missing signature."""
    old, new = _parse(champion, "champion"), _parse(challenger, "challenger")
    return [
        *_inputs(old["inputs"], new["inputs"]),
        *_outputs(old["outputs"], new["outputs"]),
        *_params(old["params"], new["params"]),
    ]


def measurements(champion: Signature | None, challenger: Signature | None) -> dict[str, Measurement]:
    """`breaking_changes`: how many there are; `where` is the first one's column, `note` its message."""
    differences = compare(champion, challenger)
    breaking = [difference for difference in differences if difference.breaking]
    if breaking:
        more = f" (and {len(breaking) - 1} more)" if len(breaking) > 1 else ""
        measured = Measurement.exact(len(breaking), where=breaking[0].column, note=breaking[0].message + more)
    else:
        note = "; ".join(difference.message for difference in differences[:3])
        measured = Measurement.exact(0, note=note)
    return {"breaking_changes": measured}


def _parse(signature: Signature | None, side: str) -> dict[str, list[dict[str, Any]]]:
    parsed = {}
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
        parsed[part] = list(value or [])
    return parsed


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
        elif not _required(column):
            yield _harmless(name, "added", f"'{name}' is new and optional")
        else:
            near = _near(name, dropped)
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


def _by_position(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[Difference]:
    """Columns without names: MLflow takes the first ones and counts the rest as extra."""
    for at, (before, after) in enumerate(zip(old, new, strict=False)):
        yield from _changed(str(_label(after, at)), before, after)
    for at in range(len(old), len(new)):
        label = str(_label(new[at], at))
        message = f"column {label} is new, and requests do not carry it: compute it in the model"
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
        yield _harmless(name, "widened", f"'{name}' was {_words(before)} and is {_words(after)} now")


def _narrowed(old: dict[str, Any], new: dict[str, Any], path: str, *, inside: bool) -> Iterator[tuple[str, str]]:
    """Every place under `path` where a value of type `old` is none of type `new`: (place, what and mend)."""
    was, now = old.get("type"), new.get("type")
    mend = f"keep {_words(old)}, and convert inside the model"
    if now == "any":
        return
    if was != now:
        if now not in (_WIDER_INSIDE if inside else _WIDER).get(str(was), ()):
            yield f"'{path}'", f"was {_words(old)} and is {_words(new)} now, which is narrower: {mend}"
    elif was == "array":
        yield from _narrowed(old["items"], new["items"], f"{path}[]", inside=True)
    elif was == "map":
        yield from _narrowed(old["values"], new["values"], f"{path}{{}}", inside=True)
    elif was == "object":
        yield from _narrowed_object(old["properties"], new["properties"], path)
    elif was == "tensor" and not _tensor_fits(old["tensor-spec"], new["tensor-spec"]):
        yield f"'{path}'", f"was {_words(old)} and is {_words(new)} now, which is narrower: {mend}"


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
    def change(column: str, what: str) -> Difference:
        return _breaks(column, "output", f"{what}: callers read the champion's answer, give the same shape")

    if _layout(old) != _layout(new):
        yield change("output", f"the champion answers {_layout(old)}, the challenger {_layout(new)}")
        return
    before = {_label(column, at): column for at, column in enumerate(old)}
    after = {_label(column, at): column for at, column in enumerate(new)}
    for name in [*before, *(name for name in after if name not in before)]:
        label = f"output '{name}'"
        if name not in after:
            yield change(label, f"{label} is gone")
        elif name not in before:
            yield change(label, f"{label} is new")
        elif _type(before[name]) != _type(after[name]):
            yield change(label, f"{label} was {_words(before[name])} and is {_words(after[name])} now")
        elif _required(before[name]) and not _required(after[name]):
            yield change(label, f"{label} may be missing now")


def _params(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[Difference]:
    before = {param["name"]: param for param in old}
    after = {param["name"]: param for param in new}
    for name, was in before.items():
        label = f"param '{name}'"
        now = after.get(name)
        if now is None:
            yield _breaks(
                label,
                "param",
                f"{label} is gone, and MLflow ignores in silence requests that set it: keep it",
            )
            continue
        kinds = _param_type(was), _param_type(now)
        if was.get("shape") != now.get("shape") or (
            kinds[0] != kinds[1] and kinds[1] not in _WIDER.get(str(kinds[0]), ())
        ):
            message = f"{label} was {_words(was)} and is {_words(now)} now: keep {_words(was)}"
            yield _breaks(label, "param", message)
        elif kinds[0] != kinds[1]:
            yield _harmless(label, "param", f"{label} was {_words(was)} and is {_words(now)} now")
        if was.get("default") != now.get("default"):
            yield _breaks(
                label,
                "param",
                f"{label} was {was.get('default')!r} by default and is {now.get('default')!r} now, so "
                "requests that leave it out would be answered differently: keep the default",
            )
    for name in after:
        if name not in before:
            yield _harmless(f"param '{name}'", "param", f"param '{name}' is new, and has a default")


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


def _param_type(param: Mapping[str, Any]) -> Any:
    """The type of a param: a word, or the properties of an object."""
    kind = param.get("type") or param.get("dtype")
    return kind if kind != "object" else json.dumps(param.get("properties"), sort_keys=True)


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


def _near(name: str, candidates: Sequence[str]) -> str | None:
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return found[0] if found else None


def _tensor_fits(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    sizes = [old["shape"], new["shape"]]
    if len(sizes[0]) != len(sizes[1]) or any(now not in (-1, was) for was, now in zip(*sizes, strict=True)):
        return False
    try:
        return old["dtype"] == new["dtype"] or np.can_cast(old["dtype"], new["dtype"], "safe")
    except TypeError:
        return False

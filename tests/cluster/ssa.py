"""Server-side apply: who owns which field, merging, conflicts and the removal of what a manager no longer sets. Pure.

A field is a path: a tuple of elements as `managedFields` writes them (`f:spec`, `k:{"name":"x"}`, `v:"x"`). A set of fields
holds leaves, and items of lists with keys; as structured-merge-diff does it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.cluster import schema
from tests.cluster.schema import Json, Node

Path = tuple[str, ...]
Fields = frozenset[Path]
Who = tuple[str, str, str, str]
"""(manager, operation, apiVersion, subresource)."""
_OWNERLESS = frozenset(
    {("f:apiVersion",), ("f:kind",), ("f:metadata",)}
    | {
        ("f:metadata", f"f:{name}")
        for name in (
            *("name", "namespace", "creationTimestamp", "selfLink", "uid", "generation", "managedFields"),
            *("resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds"),
        )
    }
)


def dotted(path: Path) -> str:
    """A path as messages show it."""
    return "".join(schema.pretty(element) for element in path)


def encode(fields: Iterable[Path]) -> Json:
    """As `fieldsV1` writes it."""
    tree: Json = {}
    for path in sorted(fields):
        here = tree
        for element in path:
            here = here.setdefault(element, {})
        here["."] = {}
    return _tidy(tree)


def _tidy(tree: Json) -> Json:
    if list(tree) == ["."]:
        return {}
    return {element: below if element == "." else _tidy(below) for element, below in tree.items()}


def decode(tree: Json, path: Path = ()) -> set[Path]:
    found: set[Path] = set()
    for element, below in tree.items():
        if element == ".":
            found.add(path)
        elif below:
            found |= decode(below, (*path, element))
        else:
            found.add((*path, element))
    return found


def fields_of(value: Any, node: Node) -> Fields:
    """All fields that `value` sets, without those that nobody owns."""
    found: set[Path] = set()
    _collect(value, schema.deref(node), (), found)
    return owned(found)


def owned(fields: Iterable[Path]) -> Fields:
    return frozenset(
        path for path in fields if path not in _OWNERLESS and path[:2] != ("f:metadata", "f:managedFields")
    )


def _collect(value: Any, node: Node, path: Path, found: set[Path]) -> None:
    if isinstance(value, dict) and value and (node is None or schema.granular(node)):
        for key, item in value.items():
            _collect(item, schema.child(node, key)[1], (*path, f"f:{key}"), found)
        return
    if isinstance(value, list) and value:
        kind, _ = schema.list_type(node)
        if kind != "atomic":
            below = schema.items(node)
            for element, item in entries(value, node).items():
                found.add((*path, element))
                if kind == "map":
                    _collect(item, below, (*path, element), found)
            return
    if path:
        found.add(path)


def entries(value: list[Any], node: Node) -> dict[str, Any]:
    """The items of a list that is not atomic, by path element."""
    kind, keys = schema.list_type(node)
    below = schema.items(node)
    if kind == "map":
        return {schema.key_of(item if isinstance(item, dict) else {}, keys, below): item for item in value}
    return {"v:" + json.dumps(item, separators=(",", ":")): item for item in value}


def parts(value: Any, node: Node) -> dict[str, tuple[Any, Node]] | None:
    """The owned parts of `value` by path element; None where it is owned as a whole."""
    if isinstance(value, dict) and (node is None or schema.granular(node)):
        return {f"f:{key}": (item, schema.child(node, key)[1]) for key, item in value.items()}
    if isinstance(value, list) and schema.list_type(node)[0] != "atomic":
        below = schema.items(node)
        return {element: (item, below) for element, item in entries(value, node).items()}
    return None


@dataclass
class Difference:
    """Fields that are in both and differ, only in the new, only in the old."""

    modified: set[Path] = field(default_factory=set)
    added: set[Path] = field(default_factory=set)
    removed: set[Path] = field(default_factory=set)


def compare(old: Any, new: Any, node: Node) -> Difference:
    difference = Difference()
    _compare(old, new, schema.deref(node), (), difference)
    for fields in (difference.modified, difference.added, difference.removed):
        fields.intersection_update(owned(fields))
    return difference


def _whole(value: Any, node: Node, path: Path, found: set[Path]) -> None:
    # What is added or removed as a whole counts with all its parents below.
    found.add(path)
    for element, (item, below) in (parts(value, node) or {}).items():
        _whole(item, below, (*path, element), found)


def _compare(old: Any, new: Any, node: Node, path: Path, difference: Difference) -> None:
    if old is new:
        return
    before, after = parts(old, node), parts(new, node)
    if before is None or after is None or type(old) is not type(new):
        if old != new:
            difference.modified.add(path)
        return
    for element, (item, below) in after.items():
        if element in before:
            _compare(before[element][0], item, below, (*path, element), difference)
        else:
            _whole(item, below, (*path, element), difference.added)
    for element, (item, below) in before.items():
        if element not in after:
            _whole(item, below, (*path, element), difference.removed)


def merge(old: Any, new: Any, node: Node) -> Any:
    """`old` with all that `new` sets."""
    node = schema.deref(node)
    if isinstance(old, dict) and isinstance(new, dict) and (node is None or schema.granular(node)):
        merged = dict(old)
        for key, item in new.items():
            merged[key] = merge(old[key], item, schema.child(node, key)[1]) if key in old else item
        return merged
    if isinstance(old, list) and isinstance(new, list) and schema.list_type(node)[0] != "atomic":
        before, after, below = entries(old, node), entries(new, node), schema.items(node)
        left, right, done = list(before), list(after), set()
        result: list[Any] = []
        # What only the old list has keeps its place; the rest is in the order of the new one.
        while left or right:
            if left and (left[0] in done or left[0] not in after):
                head = left.pop(0)
                if head not in done:
                    result.append(before[head])
                continue
            head = right.pop(0)
            done.add(head)
            result.append(merge(before[head], after[head], below) if head in before else after[head])
        return result
    return new


def without(value: Any, node: Node, gone: Iterable[Path]) -> Any:
    """`value` without the fields in `gone`; parents that are empty by it go too (None)."""
    node = schema.deref(node)
    here: dict[str, list[Path]] = {}
    for path in gone:
        here.setdefault(path[0], []).append(path[1:])
    if not here:
        return value
    if isinstance(value, dict):
        kept: Json = {}
        for key, item in value.items():
            below = here.get(f"f:{key}")
            if below is None:
                kept[key] = item
            elif () not in below:
                left = without(item, schema.child(node, key)[1], below)
                if left is not None:
                    kept[key] = left
        return kept or None
    if isinstance(value, list):
        remaining = []
        for element, item in entries(value, node).items():
            below = here.get(element)
            if below is None:
                remaining.append(item)
            elif () not in below:
                left = without(item, schema.items(node), below)
                if left is not None:
                    remaining.append(left)
        return remaining or None
    return value


# ---------------------------------------------------------------------------------------------------------------- managers


@dataclass(frozen=True)
class Entry:
    fields: Fields
    time: str


Managers = dict[Who, Entry]


def managers_of(obj: Mapping[str, Any]) -> Managers:
    found: Managers = {}
    for entry in schema.get(obj, "metadata", "managedFields", otherwise=[]):
        who = (entry["manager"], entry["operation"], entry.get("apiVersion", ""), entry.get("subresource", ""))
        found[who] = Entry(frozenset(decode(entry.get("fieldsV1", {}))), entry.get("time", ""))
    return found


def written(managers: Managers) -> list[Json]:
    """As `metadata.managedFields` holds it."""
    lines = []
    for who, entry in sorted(managers.items(), key=lambda pair: (pair[0][1], pair[1].time, pair[0][0])):
        manager, operation, api_version, subresource = who
        line = {
            "manager": manager,
            "operation": operation,
            "apiVersion": api_version,
            "time": entry.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": encode(entry.fields),
        }
        lines.append({**line, "subresource": subresource} if subresource else line)
    return lines


class Conflicts(Exception):
    """Fields that others own with other values: [(who, path)]."""

    def __init__(self, found: list[tuple[Who, Path]], managers: Managers) -> None:
        super().__init__("conflicts")
        self.causes = [
            {
                "reason": "FieldManagerConflict",
                "message": f"conflict with {_named(who, managers)}",
                "field": dotted(path),
            }
            for who, path in found
        ]
        if len(found) == 1:
            who, path = found[0]
            self.text = f"Apply failed with 1 conflict: conflict with {_named(who, managers)}: {dotted(path)}"
            return
        lines = []
        for who in sorted({who for who, _ in found}):
            lines.append(f"conflicts with {_named(who, managers)}:")
            lines += [f"- {dotted(path)}" for other, path in found if other == who]
        self.text = f"Apply failed with {len(found)} conflicts: " + "\n".join(lines)


def _named(who: Who, managers: Managers) -> str:
    manager, operation, api_version, subresource = who
    text = json.dumps(manager) + (f' with subresource "{subresource}"' if subresource else "")
    time = managers[who].time
    return f"{text} using {api_version}" + (f" at {time}" if operation == "Update" and time else "")


def _taken(managers: Managers, who: Who, difference: Difference) -> Managers:
    # Whoever sets a value takes it from the others; what is gone nobody owns.
    changed = difference.modified | difference.added
    left: Managers = {}
    for other, entry in managers.items():
        fields = entry.fields - difference.removed
        if other != who:
            fields -= changed
        if fields:
            left[other] = Entry(fields, entry.time)
    return left


def apply(live: Json | None, patch: Json, node: Node, who: Who, now: str, *, force: bool) -> tuple[Json, Managers]:
    """The object after `who` applied `patch`, without its `managedFields`, and its managers; raises `Conflicts`."""
    managers = managers_of(live or {})
    before = dict(live or {})
    if "managedFields" in before.get("metadata", {}):
        before["metadata"] = {key: value for key, value in before["metadata"].items() if key != "managedFields"}
    merged = merge(before, patch, node)
    difference = compare(before, merged, node)
    changed = difference.modified | difference.added
    conflicts = [
        (other, path)
        for other, entry in sorted(managers.items())
        if other != who
        for path in sorted(entry.fields & changed)
    ]
    if conflicts and not force:
        raise Conflicts(conflicts, managers)
    mine = fields_of(patch, node)
    last = managers[who].fields if who in managers else frozenset()
    managers = _taken(managers, who, difference)
    others = frozenset().union(*(entry.fields for other, entry in managers.items() if other != who))
    kept = mine | others
    gone = {path for path in last - kept if not any(other[: len(path)] == path for other in kept)}
    if gone:
        merged = without(merged, node, gone) or {}
        managers = {
            other: Entry(fields, entry.time)
            for other, entry in managers.items()
            if (fields := frozenset(p for p in entry.fields if not any(p[: len(g)] == g for g in gone)))
        }
    previous = managers_of(live or {}).get(who)
    managers[who] = Entry(mine, previous.time if previous and previous.fields == mine else now)
    if not mine:
        del managers[who]
    return merged, managers


def update(live: Json | None, new: Json, node: Node, who: Who, now: str, *, ignored: Iterable[str] = ()) -> Managers:
    """The managers after `who` wrote `new` by PUT, POST or another patch. `ignored`: top fields out of its reach."""
    managers = managers_of(live or {})
    difference = compare(live or {}, new, node)
    for fields in (difference.modified, difference.added, difference.removed):
        fields.difference_update({path for path in fields if path[0] in {f"f:{name}" for name in ignored}})
    changed = difference.modified | difference.added
    managers = _taken(managers, who, difference)
    if changed:
        previous = managers[who].fields if who in managers else frozenset()
        managers[who] = Entry(previous | changed, now)
    return managers

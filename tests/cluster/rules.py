"""The rules of CRDs (`x-kubernetes-validations`, in CEL), evaluated as they stand in the schema by `common-expression-language`."""

import functools
from collections.abc import Iterator
from typing import Any

from tests.cluster import schema
from tests.cluster.schema import Json, Node

Cause = tuple[str, str, str]


@functools.cache
def _program(rule: str) -> Any:
    import cel  # half a second, and most tests have no custom resources

    return cel.compile(rule)


def check(obj: Json, node: Node, old: Json | None = None) -> list[Cause]:
    """What is wrong with a custom resource by its schema's rules. Rules about `oldSelf` hold below objects, not in lists."""
    return list(_check(obj, old, node, ""))


def _check(value: Any, old: Any, node: Node, path: str) -> Iterator[Cause]:
    node = schema.deref(node)
    if node is None or value is None:
        return
    for rule in node.get("x-kubernetes-validations", ()):
        yield from _evaluate(rule, value, old, path)
    if isinstance(value, dict):
        for key, item in value.items():
            if path or key != "metadata":
                before = old.get(key) if isinstance(old, dict) else None
                yield from _check(item, before, schema.child(node, key)[1], f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for n, item in enumerate(value):
            yield from _check(item, None, schema.items(node), f"{path}[{n}]")


def _evaluate(rule: Json, value: Any, old: Any, path: str) -> Iterator[Cause]:
    text = rule["rule"]
    values = {"self": value}
    if "oldSelf" in text:
        if old is None:
            return
        values["oldSelf"] = old
    told = rule.get("message") or f"failed rule: {' '.join(text.split())}"
    try:
        fine = _program(text).execute(values)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        fine, told = False, f"{error} evaluating rule: {told}"
    if not fine:
        reason = rule.get("reason", "FieldValueInvalid")
        where = path + rule.get("fieldPath", "")
        yield reason, f'Invalid value: "{schema.json_type(value)}": {told}', where

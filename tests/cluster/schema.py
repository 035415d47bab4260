"""What kinds there are and what their objects may look like: the schemas of `kubernetes-validate` and of CRDs.

A schema node is a dict of OpenAPI (`properties`, `items`, `x-kubernetes-...`); `None` stands for "anything". Built-in kinds
are decoded as Go does (wrong types are 400), custom ones validated as the API server validates them (422).
"""

import contextlib
import datetime as dt
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
Node = Json | None
CRDS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "crds"
"""Where the published CRDs are, beside the repository; kinds whose file is missing are taken as they come."""
_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_BUILT_IN = """
v1 Namespace namespaces - status
v1 Node nodes - status
v1 PersistentVolume persistentvolumes - status
v1 Pod pods ns status generation
v1 Service services ns status
v1 ConfigMap configmaps ns
v1 Secret secrets ns
v1 ServiceAccount serviceaccounts ns
v1 Event events ns upsert
v1 Endpoints endpoints ns
v1 LimitRange limitranges ns upsert
v1 ResourceQuota resourcequotas ns status
v1 PersistentVolumeClaim persistentvolumeclaims ns status
apps/v1 Deployment deployments ns status generation
apps/v1 ReplicaSet replicasets ns status generation
apps/v1 StatefulSet statefulsets ns status generation
apps/v1 DaemonSet daemonsets ns status generation
batch/v1 Job jobs ns status generation
batch/v1 CronJob cronjobs ns status generation
autoscaling/v2 HorizontalPodAutoscaler horizontalpodautoscalers ns status
policy/v1 PodDisruptionBudget poddisruptionbudgets ns status generation conditional
coordination.k8s.io/v1 Lease leases ns upsert conditional
discovery.k8s.io/v1 EndpointSlice endpointslices ns generation
networking.k8s.io/v1 NetworkPolicy networkpolicies ns generation
networking.k8s.io/v1 Ingress ingresses ns status generation
rbac.authorization.k8s.io/v1 Role roles ns upsert
rbac.authorization.k8s.io/v1 RoleBinding rolebindings ns upsert
rbac.authorization.k8s.io/v1 ClusterRole clusterroles - upsert
rbac.authorization.k8s.io/v1 ClusterRoleBinding clusterrolebindings - upsert
scheduling.k8s.io/v1 PriorityClass priorityclasses -
storage.k8s.io/v1 StorageClass storageclasses -
apiextensions.k8s.io/v1 CustomResourceDefinition customresourcedefinitions - status generation conditional
"""
_CUSTOM = """
gateway.networking.k8s.io/v1 GatewayClass gatewayclasses - status
gateway.networking.k8s.io/v1 Gateway gateways ns status
gateway.networking.k8s.io/v1 HTTPRoute httproutes ns status
gateway.networking.k8s.io/v1 ReferenceGrant referencegrants ns
gateway.networking.k8s.io/v1beta1 GatewayClass gatewayclasses - status
gateway.networking.k8s.io/v1beta1 Gateway gateways ns status
gateway.networking.k8s.io/v1beta1 HTTPRoute httproutes ns status
gateway.networking.k8s.io/v1beta1 ReferenceGrant referencegrants ns
serving.kserve.io/v1beta1 InferenceService inferenceservices ns status
serving.kserve.io/v1alpha1 ServingRuntime servingruntimes ns
"""
_QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
_TIME = "io.k8s.apimachinery.pkg.apis.meta.v1.Time"
_MICRO_TIME = "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime"
_KEY_DEFAULTS = {"protocol": "TCP"}
"""Map keys of built-in lists that have a default; the JSON schemas have lost it."""


class Invalid(Exception):
    """What is wrong with an object, as causes of a 422: (reason, message without the field, field)."""

    def __init__(self, causes: list[tuple[str, str, str]]) -> None:
        super().__init__("; ".join(f"{where}: {text}" for _, text, where in causes))
        self.causes = causes


class Undecodable(Exception):
    """The text is no object of that kind: a 400."""


@functools.cache
def _definitions() -> Json:
    folder = files("kubernetes_validate").joinpath("kubernetes-json-schema")
    versions = [entry.name for entry in folder.iterdir() if entry.name.endswith("-local")]
    newest = max(versions, key=lambda name: tuple(int(n) for n in re.findall(r"\d+", name)))
    found: Json = json.loads(folder.joinpath(newest, "_definitions.json").read_text())["$defs"]
    return found


@functools.cache
def _kinds() -> dict[tuple[str, str], str]:
    return {
        (f"{gvk['group']}/{gvk['version']}".lstrip("/"), gvk["kind"]): name
        for name, node in _definitions().items()
        for gvk in node.get("x-kubernetes-group-version-kind", [])
    }


def deref(node: Node) -> Node:
    """The node itself, where it is only a reference."""
    while node is not None and "$ref" in node:
        node = _definitions()[node["$ref"].rsplit("/", 1)[1]]
    return node


@functools.cache
def _crd_file(path: Path) -> Json:
    # InferenceService takes seconds as YAML and milliseconds as JSON: once per machine is enough.
    about = path.stat()
    mark = hashlib.sha256(f"{path}:{about.st_size}:{about.st_mtime_ns}".encode()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"titleshot-crd-{os.getuid()}-{mark}.json"
    with contextlib.suppress(OSError, ValueError):
        found: Json = json.loads(kept.read_bytes())
        return found
    loaded: Json = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    with contextlib.suppress(OSError):
        beside = kept.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(loaded))
        beside.replace(kept)
    return loaded


@dataclass(eq=False)
class Resource:
    """One resource in one version. `conditional`: a PUT must name the resourceVersion; `upsert`: a PUT may create."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool
    flags: frozenset[str] = frozenset()
    custom: bool = False
    crd: Json | None = field(default=None, repr=False)
    folder: Path | None = None

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """As messages name it: "deployments.apps"."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def qualified_kind(self) -> str:
        return f"{self.kind}.{self.group}" if self.group else self.kind

    @property
    def has_status(self) -> bool:
        return "status" in self.flags

    @property
    def has_generation(self) -> bool:
        return self.custom or "generation" in self.flags

    @functools.cached_property
    def node(self) -> Node:
        """The schema of whole objects; None where it is not known."""
        if not self.custom:
            name = _kinds().get((self.api_version, self.kind))
            return _definitions()[name] if name else None
        crd = self.crd
        if crd is None and self.folder is not None:
            path = self.folder / f"{self.group}_{self.plural}.yaml"
            crd = _crd_file(path) if path.is_file() else None
        if crd is None:
            return None
        for version in crd["spec"]["versions"]:
            if version["name"] == self.version:
                node = version.get("schema", {}).get("openAPIV3Schema")
                if node is None:
                    return None
                meta = {"$ref": f"#/$defs/{_META}"}
                text = {"type": "string"}
                fixed = {"metadata": meta, "apiVersion": text, "kind": text}
                return {**node, "properties": {**node.get("properties", {}), **fixed}}
        return None


def resources(folder: Path | None = CRDS) -> list[Resource]:
    """All kinds the server knows from the start."""
    found = []
    for table, custom in ((_BUILT_IN, False), (_CUSTOM, True)):
        for line in table.strip().splitlines():
            api, kind, plural, scope, *flags = line.split()
            group, _, version = api.rpartition("/")
            found.append(Resource(group, version, kind, plural, scope == "ns", frozenset(flags), custom, folder=folder))
    return found


def of_crd(crd: Json) -> list[Resource]:
    """The resources that a CustomResourceDefinition adds, one per served version."""
    spec = crd["spec"]
    return [
        Resource(
            spec["group"],
            version["name"],
            spec["names"]["kind"],
            spec["names"]["plural"],
            spec["scope"] == "Namespaced",
            frozenset({"status"} if "status" in version.get("subresources", {}) else set()),
            custom=True,
            crd=crd,
        )
        for version in spec["versions"]
        if version.get("served", True)
    ]


def preserves(node: Node) -> bool:
    """Whether objects here may hold anything."""
    if node is None or node.get("x-kubernetes-preserve-unknown-fields") or node.get("x-kubernetes-embedded-resource"):
        return True
    return not any(part in node for part in ("properties", "additionalProperties", "items"))


def child(node: Node, key: str) -> tuple[bool, Node]:
    """Whether objects of `node` may have `key`, and its node."""
    node = deref(node)
    if node is None:
        return True, None
    if key in node.get("properties", {}):
        return True, deref(node["properties"][key])
    more = node.get("additionalProperties")
    if isinstance(more, dict):
        return True, deref(more)
    if more is True or preserves(node):
        return True, None
    return False, None


def items(node: Node) -> Node:
    node = deref(node)
    return deref(node.get("items")) if node else None


def list_type(node: Node) -> tuple[str, tuple[str, ...]]:
    """("map", its keys), ("set", ()) or ("atomic", ())."""
    node = node or {}
    kind = node.get("x-kubernetes-list-type", "atomic")
    keys = tuple(node.get("x-kubernetes-list-map-keys", ()))
    if kind == "map" and keys:
        return "map", keys
    return ("set", ()) if kind == "set" else ("atomic", ())


def granular(node: Node) -> bool:
    """Whether the fields of these objects are owned one by one."""
    return node is not None and node.get("x-kubernetes-map-type") != "atomic" and not _plain(node)


def _plain(node: Json) -> bool:
    types = _types(node)
    return bool(types) and "object" not in types


def merge_key(node: Node) -> str | None:
    """The key by which a strategic merge patch joins this list; None: it is replaced."""
    if node is None or "merge" not in str(node.get("x-kubernetes-patch-strategy", "")).split(","):
        return None
    return node.get("x-kubernetes-patch-merge-key")


def key_of(item: Json, keys: tuple[str, ...], node: Node) -> str:
    """The path element of a list's item: k:{"name":"x"}."""
    values = {}
    for key in sorted(keys):
        value = item.get(key)
        if value is None:
            _, of_key = child(node, key)
            default = (of_key or {}).get("default", _KEY_DEFAULTS.get(key) if (node or {}).get("properties") else None)
            value = default
        if value is not None:
            values[key] = value
    return "k:" + json.dumps(values, separators=(",", ":"))


def _types(node: Json) -> tuple[str, ...]:
    found = node.get("type", ())
    return tuple(kind for kind in ((found,) if isinstance(found, str) else found) if kind != "null")


def _int_or_string(node: Json) -> bool:
    return bool(node.get("x-kubernetes-int-or-string")) or "oneOf" in node


# ---------------------------------------------------------------------------------------------------------- unknown fields


def prune(value: Any, node: Node, path: str = "") -> list[str]:
    """Drop from `value`, in place, what the schema does not know; the paths of what was dropped."""
    node = deref(node)
    if node is None:
        return []
    dropped: list[str] = []
    if isinstance(value, dict):
        if node.get("x-kubernetes-embedded-resource") or (preserves(node) and "properties" not in node):
            return []
        for key in list(value):
            known, below = child(node, key)
            where = f"{path}.{key}" if path else key
            if not known:
                dropped.append(where)
                del value[key]
            else:
                dropped += prune(value[key], below, where)
    elif isinstance(value, list):
        below = items(node)
        for n, item in enumerate(value):
            dropped += prune(item, below, f"{path}[{n}]")
    return dropped


def drop_nulls(value: Any, node: Node, *, custom: bool) -> None:
    """Null is the same as absent, in place: always for built-in kinds, for custom ones where there is a default."""
    node = deref(node)
    if isinstance(value, dict):
        for key in list(value):
            _, below = child(node, key)
            if value[key] is None:
                if not custom or (below is not None and "default" in below and not below.get("nullable")):
                    del value[key]
            else:
                drop_nulls(value[key], below, custom=custom)
    elif isinstance(value, list):
        for item in value:
            drop_nulls(item, items(node), custom=custom)


# ---------------------------------------------------------------------------------------------------------------- decoding

_GO = {"integer": "int32", "string": "string", "boolean": "bool", "number": "float64"}


def json_type(value: Any) -> str:
    if value is None:
        return "null"
    for kinds, name in (((bool,), "boolean"), ((int,), "integer"), ((float,), "number"), ((str,), "string")):
        if isinstance(value, kinds):
            return name
    return "object" if isinstance(value, dict) else "array"


def decode(value: Any, node: Node, kind: str, path: str = "") -> None:
    """Raise `Undecodable` where a built-in kind's Go type cannot hold `value`."""
    node = deref(node)
    if node is None or value is None:
        return
    found, types = json_type(value), _types(node)
    if _int_or_string(node):
        if found not in {"integer", "string", "number"}:
            raise Undecodable(f"json: cannot unmarshal {found} into Go struct field {kind}.{path} of type string")
        return
    if types and found not in types and not (found == "integer" and "number" in types):
        go = {"object": "map[string]interface {}", "array": "[]interface {}"}.get(types[0], _GO.get(types[0], types[0]))
        name = {"boolean": "bool", "integer": "number"}.get(found, found)
        raise Undecodable(f"json: cannot unmarshal {name} into Go struct field {kind}.{path} of type {go}")
    if isinstance(value, dict):
        for key, item in value.items():
            decode(item, child(node, key)[1], kind, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            decode(item, items(node), kind, path)


def canonical(value: Any, node: Node, quantity: Callable[[Any], str]) -> Any:
    """Write, in place, quantities and times of a built-in object as Go does; raises `Undecodable` and what `quantity` raises."""
    node = deref(node)
    if node is None or value is None:
        return value
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (dict, list)):
                canonical(item, child(node, key)[1], quantity)
            else:
                value[key] = canonical(item, child(node, key)[1], quantity)
    elif isinstance(value, list):
        below = items(node)
        value[:] = [canonical(item, below, quantity) for item in value]
    elif node is _definitions()[_QUANTITY]:
        return quantity(value)
    elif node is _definitions()[_MICRO_TIME]:
        return _time(value, "2006-01-02T15:04:05.000000Z07:00", r"\.\d{6}").strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    elif node is _definitions()[_TIME]:
        return _time(value, "2006-01-02T15:04:05Z07:00", r"(\.\d+)?").strftime("%Y-%m-%dT%H:%M:%SZ")
    return value


def _time(text: str, layout: str, fraction: str) -> dt.datetime:
    if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d" + fraction + r"(Z|[+-]\d\d:\d\d)", text):
        with contextlib.suppress(ValueError):
            return dt.datetime.fromisoformat(text).astimezone(dt.UTC)
    raise Undecodable(f'parsing time "{text}" as "{layout}": cannot parse "{text}"')


def typed(value: Any, node: Node, path: str = "") -> list[str]:
    """Why `value` cannot be applied, as the server-side apply says it: unknown fields and wrong types."""
    node = deref(node)
    if node is None or value is None:
        return []
    types = _types(node)
    if _int_or_string(node):
        return []
    if isinstance(value, dict):
        if types and "object" not in types:
            return [
                f"{path}: expected {_expected(types[0])}, got &value.valueUnstructured{{Value:map[string]interface {{}}}}"
            ]
        wrong: list[str] = []
        if preserves(node) and "properties" not in node:
            return []
        for key, item in value.items():
            known, below = child(node, key)
            where = f"{path}.{key}"
            wrong += typed(item, below, where) if known else [f"{where}: field not declared in schema"]
        return wrong
    if isinstance(value, list):
        if types and "array" not in types:
            return [f"{path}: expected {_expected(types[0])}, got &value.valueUnstructured{{Value:[]interface {{}}}}"]
        wrong, seen = [], set()
        kind, keys = list_type(node)
        for n, item in enumerate(value):
            where = f"{path}[{n}]"
            if kind == "map" and isinstance(item, dict):
                element = key_of(item, keys, items(node))
                where = f"{path}{pretty(element)}"
                if element in seen:
                    wrong.append(f"{path}: duplicate entries for key {pretty(element)}")
                seen.add(element)
            wrong += typed(item, items(node), where)
        return wrong
    found = json_type(value)
    if types and found not in types and not (found in {"integer", "number"} and {"integer", "number"} & set(types)):
        shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
        return [f"{path}: expected {_expected(types[0])}, got &value.valueUnstructured{{Value:{shown}}}"]
    return []


def _expected(kind: str) -> str:
    return {
        "integer": "numeric (int or float)",
        "number": "numeric (int or float)",
        "object": "map",
        "array": "list",
    }.get(kind, kind)


def pretty(element: str) -> str:
    """A path element as messages show it: .spec, [name="x"], [="v"]."""
    if element.startswith("f:"):
        return f".{element[2:]}"
    if element.startswith("k:"):
        keys = json.loads(element[2:])
        return "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in keys.items()) + "]"
    return f"[={element[2:]}]"


# -------------------------------------------------------------------------------------------------------------- defaulting


def default(value: Any, node: Node) -> None:
    """Fill in, in place, the schema's defaults, as a custom resource gets them."""
    node = deref(node)
    if node is None:
        return
    if isinstance(value, dict):
        for key, below in node.get("properties", {}).items():
            if key not in value and "default" in below:
                value[key] = json.loads(json.dumps(below["default"]))
        for key, item in value.items():
            default(item, child(node, key)[1])
    elif isinstance(value, list):
        for item in value:
            default(item, items(node))


# -------------------------------------------------------------------------------------------------------------- validation


def go(value: Any) -> str:
    """A value as field errors show it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def bad(path: str, value: Any, text: str) -> tuple[str, str, str]:
    return "FieldValueInvalid", f"Invalid value: {go(value)}: {text}", path


def required(path: str, text: str = "") -> tuple[str, str, str]:
    return "FieldValueRequired", f"Required value{': ' + text if text else ''}", path


def unsupported(path: str, value: Any, known: Any) -> tuple[str, str, str]:
    some = ", ".join(go(item) for item in sorted(known))
    return "FieldValueNotSupported", f"Unsupported value: {go(value)}: supported values: {some}", path


def check(value: Any, node: Node, path: str = "") -> Iterator[tuple[str, str, str]]:
    """What is wrong with a custom resource by its schema, without its rules."""
    node = deref(node)
    if node is None:
        return
    found, types = json_type(value), _types(node)
    if value is None:
        if not node.get("nullable") and types:
            yield (
                "FieldValueTypeInvalid",
                f'Invalid value: "null": {path} in body must be of type {types[0]}: "null"',
                path,
            )
        return
    if node.get("x-kubernetes-int-or-string"):
        if found not in {"integer", "string"}:
            text = f'{path} in body must be of type integer,string: "{found}"'
            yield "FieldValueTypeInvalid", f'Invalid value: "{found}": {text}', path
            return
    elif types and found not in types:
        whole = found == "number" and float(value).is_integer()
        if not ((found == "integer" and "number" in types) or (whole and "integer" in types)):
            form = node.get("format") if found in {"number", "integer", "boolean"} else None
            got = {"number": "double"}.get(found, found) if form else found
            text = f'{path} in body must be of type {form or types[0]}: "{got}"'
            yield "FieldValueTypeInvalid", f'Invalid value: "{got}": {text}', path
            return
    if "enum" in node and value not in node["enum"]:
        yield unsupported(path, value, node["enum"])
    if found in {"integer", "number"}:
        yield from _numbers(value, node, path)
    elif found == "string":
        yield from _strings(value, node, path)
    elif found == "array":
        yield from _arrays(value, node, path)
    elif found == "object":
        yield from _objects(value, node, path)


def _numbers(value: float, node: Json, path: str) -> Iterator[tuple[str, str, str]]:
    if "minimum" in node and value < node["minimum"]:
        yield bad(path, value, f"{path} in body should be greater than or equal to {node['minimum']}")
    if "maximum" in node and value > node["maximum"]:
        yield bad(path, value, f"{path} in body should be less than or equal to {node['maximum']}")
    if node.get("format") == "int32" and not -(2**31) <= value < 2**31:
        yield bad(path, value, f"{path} in body must be of type int32: {go(value)}")


def _strings(value: str, node: Json, path: str) -> Iterator[tuple[str, str, str]]:
    if "minLength" in node and len(value) < node["minLength"]:
        yield bad(path, value, f"{path} in body should be at least {node['minLength']} chars long")
    if "maxLength" in node and len(value) > node["maxLength"]:
        yield "FieldValueTooLong", f"Too long: may not be more than {node['maxLength']} bytes", path
    if "pattern" in node and not _pattern(node["pattern"]).search(value):
        yield bad(path, value, f"{path} in body should match '{node['pattern']}'")
    if node.get("format") == "date-time" and not re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", value):
        yield bad(path, value, f"{path} in body must be of type date-time: {go(value)}")


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    # Go's $ is the end of the text, not of its last line.
    return re.compile(text[:-1] + r"\Z" if text.endswith("$") else text)


def _arrays(value: list[Any], node: Json, path: str) -> Iterator[tuple[str, str, str]]:
    if "minItems" in node and len(value) < node["minItems"]:
        yield bad(path, len(value), f"{path} in body should have at least {node['minItems']} items")
    if "maxItems" in node and len(value) > node["maxItems"]:
        yield "FieldValueTooMany", f"Too many: {len(value)}: must have at most {node['maxItems']} items", path
    kind, keys = list_type(node)
    seen = set()
    for n, item in enumerate(value):
        if kind != "atomic":
            mark = key_of(item, keys, items(node)) if kind == "map" and isinstance(item, dict) else go(item)
            if mark in seen:
                shown = mark[2:] if kind == "map" else mark
                yield "FieldValueDuplicate", f"Duplicate value: {shown}", f"{path}[{n}]"
            seen.add(mark)
        yield from check(item, items(node), f"{path}[{n}]")


def _objects(value: Json, node: Json, path: str) -> Iterator[tuple[str, str, str]]:
    for key in node.get("required", ()):
        if key not in value:
            yield required(f"{path}.{key}" if path else key)
    if "maxProperties" in node and len(value) > node["maxProperties"]:
        yield "FieldValueTooMany", f"Too many: {len(value)}: must have at most {node['maxProperties']} items", path
    if "minProperties" in node and len(value) < node["minProperties"]:
        yield bad(path, len(value), f"{path} in body should have at least {node['minProperties']} properties")
    for key, item in value.items():
        if not path and key == "metadata":
            continue
        below = child(node, key)[1]
        inside = f"{path}.{key}" if path else key
        yield from check(item, below, inside)


def need(value: Any, node: Node, path: str = "") -> Iterator[tuple[str, str, str]]:
    """What a built-in object lacks, and what is not among the known words, by its schema."""
    node = deref(node)
    if node is None or value is None:
        return
    if "enum" in node and path not in {"kind", "apiVersion"} and isinstance(value, str) and value not in node["enum"]:
        yield unsupported(path, value, [word for word in node["enum"] if word])
    if isinstance(value, dict):
        for key in node.get("required", ()):
            if value.get(key) is None:
                yield required(f"{path}.{key}" if path else key)
        for key, item in value.items():
            if path or key not in {"metadata", "status"}:
                yield from need(item, child(node, key)[1], f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for n, item in enumerate(value):
            yield from need(item, items(node), f"{path}[{n}]")


def get(value: Mapping[str, Any] | None, *path: str, otherwise: Any = None) -> Any:
    """The value at a path of keys, `otherwise` where something on the way is missing."""
    for key in path:
        if not isinstance(value, Mapping) or value.get(key) is None:
            return otherwise
        value = value[key]
    return value

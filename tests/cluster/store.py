"""The objects of the tests' API server: one counter of versions, a log per resource for watches, and every rule of writing.

Stored objects are never changed in place: whoever reads one may keep it. All writes happen under one lock.
"""

import base64
import bisect
import datetime as dt
import random
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonpatch
import orjson

from tests.cluster import builtin, rules, schema, ssa
from tests.cluster.schema import Json, Resource, get

Key = tuple[str, str]
"""(namespace or "", name)."""
Kept = tuple[str, str]
"""(group, plural): the same objects in all versions."""
FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"
CLEANUP = "customresourcecleanup.apiextensions.k8s.io"
"""The finalizer of a definition that is deleted: all that was made by it goes first."""
_DEFINITIONS = ("apiextensions.k8s.io", "customresourcedefinitions")
LONGEST_LOG = 20_000
STALE = "the object has been modified; please apply your changes to the latest version and try again"


class Problem(Exception):
    """An answer that is an error: a `Status` object."""

    def __init__(
        self, code: int, reason: str, message: str, details: Json | None = None, *, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details, self.retry_after = (
            code,
            reason,
            message,
            details,
            retry_after,
        )

    def status(self) -> Json:
        body: Json = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
        }
        if self.reason:
            body["reason"] = self.reason
        details = dict(self.details or {})
        if self.retry_after is not None:
            details["retryAfterSeconds"] = self.retry_after
        if details:
            body["details"] = details
        return {**body, "code": self.code}


def _about(resource: Resource, name: str) -> Json:
    found: Json = {"name": name} if name else {}
    if resource.group:
        found["group"] = resource.group
    return {**found, "kind": resource.plural}


def not_found(resource: Resource, name: str) -> Problem:
    return Problem(404, "NotFound", f'{resource.qualified} "{name}" not found', _about(resource, name))


def conflict(resource: Resource, name: str, why: str) -> Problem:
    text = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return Problem(409, "Conflict", text, _about(resource, name))


def bad_request(text: str) -> Problem:
    return Problem(400, "BadRequest", text)


def forbidden(resource: Resource, name: str, why: str, code: int = 403) -> Problem:
    return Problem(code, "Forbidden", f'{resource.qualified} "{name}" is forbidden: {why}', _about(resource, name))


def expired(text: str = "The resourceVersion for the provided watch is too old.") -> Problem:
    return Problem(410, "Expired", text)


def unmet(resource: Resource, key: Key, wanted: str, found: str) -> Problem:
    path = "/".join(filter(None, ("/registry", resource.group if resource.custom else "", resource.plural, *key)))
    told = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}"
    text = f"StorageError: invalid object, Code: 4, Key: {path}, ResourceVersion: 0, AdditionalErrorMsg: {told}"
    return conflict(resource, key[1], text)


def invalid(resource: Resource, name: str, causes: list[builtin.Cause], *, of: str = "") -> Problem:
    texts = [f"{where or '<nil>'}: {text}" for _, text, where in causes]
    told = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    details = {"name": name, **({"group": resource.group} if resource.group else {}), "kind": resource.kind}
    details["causes"] = [{"reason": reason, "message": text, "field": where} for reason, text, where in causes]
    return Problem(422, "Invalid", f'{of or resource.qualified_kind} "{name}" is invalid: {told}', details)


def stamp(*, micro: bool = False) -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S" + (".%fZ" if micro else "Z"))


def clone(obj: Any) -> Any:
    """A deep copy of JSON."""
    return orjson.loads(orjson.dumps(obj))


@dataclass
class Event:
    """One entry of a log: what was (None: nothing) and what is (None: gone, `old` carries the last version)."""

    version: int
    old: Json | None
    new: Json | None


@dataclass
class Collection:
    """All objects of one resource. `first` is the number of the log's oldest entry; older versions than `floor` are gone."""

    changed: threading.Condition
    objects: dict[Key, Json] = field(default_factory=dict)
    log: list[Event] = field(default_factory=list)
    first: int = 0
    floor: int = 0


@dataclass(frozen=True)
class Write:
    """How a write came: whose it is, what it may not do."""

    manager: str = "unknown"
    user: str = "system:admin"
    dry: bool = False
    validation: str = "Warn"
    subresource: str = ""
    force: bool = False
    warnings: list[str] = field(default_factory=list)
    may: Callable[[str], None] = lambda _verb: None
    """Raises where the user may not do `verb` on the object: asked where a patch turns out to create."""


class Selector:
    """A label selector of a list, as text: a=b, a!=b, a in (b,c), a, !a."""

    def __init__(self, text: str) -> None:
        self.tests: list[Callable[[Mapping[str, str]], bool]] = [self._test(part.strip()) for part in self._split(text)]

    @staticmethod
    def _split(text: str) -> list[str]:
        return [part for part in re.split(r",(?![^(]*\))", text) if part.strip()]

    @staticmethod
    def _test(part: str) -> Callable[[Mapping[str, str]], bool]:
        if found := re.fullmatch(r"([^\s!=]+)\s+(in|notin)\s+\(([^)]*)\)", part):
            key, how, listed = found.groups()
            values = {value.strip() for value in listed.split(",")}
            return (lambda have: have.get(key) in values) if how == "in" else (lambda have: have.get(key) not in values)
        if found := re.fullmatch(r"([^\s!=]+)\s*!=\s*(\S*)", part):
            key, value = found.groups()
            return lambda have: have.get(key) != value
        if found := re.fullmatch(r"([^\s!=]+)\s*==?\s*(\S*)", part):
            key, value = found.groups()
            return lambda have: have.get(key) == value
        if found := re.fullmatch(r"!\s*(\S+)", part):
            key = found[1]
            return lambda have: key not in have
        if re.fullmatch(r"[^\s!=(),]+", part):
            return lambda have: part in have
        raise bad_request(f"unable to parse requirement: found '{part}', expected: in, notin, =, ==, !=, gt, lt")

    def __call__(self, obj: Json) -> bool:
        have = get(obj, "metadata", "labels", otherwise={})
        return all(test(have) for test in self.tests)


def field_selector(text: str, resource: Resource) -> Callable[[Json], bool]:
    """A field selector: a.b=c and a.b!=c, joined by commas."""
    tests: list[tuple[list[str], bool, str]] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"([\w.]+)\s*(!=|==?)\s*(.*)", part.strip())
        if found is None:
            raise bad_request(f'invalid selector: "{text}"; can\'t understand "{part}"')
        path, how, value = found.groups()
        simple = path in {"metadata.name", "metadata.namespace"}
        if not simple and (
            resource.custom or resource.kind not in {"Pod", "Event", "Secret", "Namespace", "Node", "ReplicaSet", "Job"}
        ):
            raise bad_request(
                f'Unable to find "{resource.api_version}, Resource={resource.plural}" that match label selector "", field selector "{text}": field label not supported: {path}'
            )
        tests.append((path.split("."), how != "!=", value))

    def fits(obj: Json) -> bool:
        return all((str(get(obj, *path, otherwise="")) == value) is same for path, same, value in tests)

    return fits


class Store:
    """All objects of one cluster."""

    def __init__(self, crds: Path | None = schema.CRDS) -> None:
        self.lock = threading.RLock()
        self.version = 1
        self.collections: dict[Kept, Collection] = {}
        self.resources: dict[tuple[str, str, str], Resource] = {}
        self.dependents: dict[str, set[tuple[Kept, Key]]] = {}
        self.alive: dict[str, tuple[Kept, Key]] = {}
        self.epoch = 0
        self.work = threading.Event()
        self._suspects: set[tuple[Kept, Key]] = set()
        self._ending: set[tuple[Kept, Key]] = set()
        self._ip = random.Random(7).randrange(256, 4096)
        for resource in schema.resources(crds):
            self.register(resource)
        for name in ("default", "kube-system", "kube-public", "kube-node-lease"):
            self.create(self.find("", "v1", "namespaces"), "", {"metadata": {"name": name}}, Write(manager="apiserver"))

    # -- kinds

    def register(self, resource: Resource) -> None:
        """Serve one more resource; a known one is replaced."""
        with self.lock:
            self.resources[resource.group, resource.version, resource.plural] = resource
            kept = (resource.group, resource.plural)
            if kept not in self.collections:
                self.collections[kept] = Collection(threading.Condition(self.lock), floor=self.version)

    def find(self, group: str, version: str, plural: str) -> Resource:
        """The resource; a 404 as for an unknown path."""
        try:
            return self.resources[group, version, plural]
        except KeyError:
            raise Problem(404, "NotFound", "the server could not find the requested resource") from None

    def of_kind(self, api_version: str, kind: str) -> Resource | None:
        group, _, version = api_version.rpartition("/")
        for (of_group, of_version, _), resource in self.resources.items():
            if (of_group, of_version, resource.kind) == (group, version, kind):
                return resource
        for (of_group, _, _), resource in self.resources.items():
            if (of_group, resource.kind) == (group, kind):
                return resource
        return None

    def collection(self, resource: Resource) -> Collection:
        return self.collections[resource.group, resource.plural]

    # -- reading

    def get(self, resource: Resource, namespace: str, name: str) -> Json:
        with self.lock:
            found = self.collection(resource).objects.get((namespace, name))
        if found is None:
            raise not_found(resource, name)
        return found

    def select(self, resource: Resource, namespace: str | None, fits: Callable[[Json], bool]) -> tuple[list[Json], int]:
        """Objects in the order of their keys, and the version that they are of."""
        with self.lock:
            objects, version = sorted(self.collection(resource).objects.items()), self.version
        return [obj for (where, _), obj in objects if (namespace is None or where == namespace) and fits(obj)], version

    def shown(self, obj: Json, resource: Resource) -> Json:
        """An object as this version of its resource has it."""
        if obj.get("apiVersion") == resource.api_version:
            return obj
        return {**obj, "apiVersion": resource.api_version, "kind": resource.kind}

    # -- watching

    def position(self, resource: Resource, since: int) -> int:
        """The number of the first log entry after version `since`; raises 410."""
        found = self.collection(resource)
        with self.lock:
            if since < found.floor:
                raise expired(f"too old resource version: {since} ({found.floor})")
            return found.first + bisect.bisect_right([event.version for event in found.log], since)

    def compact(self) -> None:
        """Forget all versions but the current ones."""
        with self.lock:
            for found in self.collections.values():
                found.first += len(found.log)
                found.log = []
                found.floor = self.version

    def end_watches(self) -> None:
        with self.lock:
            self.epoch += 1
            for found in self.collections.values():
                found.changed.notify_all()

    # -- writing

    def _commit(self, resource: Resource, key: Key, old: Json | None, new: Json | None) -> Json:
        found = self.collection(resource)
        kept = (resource.group, resource.plural)
        self.version += 1
        last = {**(new if new is not None else old or {})}
        last["metadata"] = {**last["metadata"], "resourceVersion": str(self.version)}
        if new is None:
            found.objects.pop(key, None)
            found.log.append(Event(self.version, last, None))
        else:
            found.objects[key] = last
            found.log.append(Event(self.version, old, last))
        if len(found.log) > LONGEST_LOG:
            half = LONGEST_LOG // 2
            found.floor = found.log[half - 1].version
            found.log, found.first = found.log[half:], found.first + half
        self._index(kept, key, old, None if new is None else last)
        found.changed.notify_all()
        return last

    def _index(self, kept: Kept, key: Key, old: Json | None, new: Json | None) -> None:
        before = {owner["uid"] for owner in get(old, "metadata", "ownerReferences", otherwise=[])}
        after = {owner["uid"] for owner in get(new, "metadata", "ownerReferences", otherwise=[])}
        for uid in before - after:
            self.dependents.get(uid, set()).discard((kept, key))
        for uid in after:
            self.dependents.setdefault(uid, set()).add((kept, key))
        uid = get(new or old, "metadata", "uid")
        if new is None:
            self.alive.pop(uid, None)
            self._suspects |= self.dependents.get(uid, set())
            self._ending |= {entry for owner in before if (entry := self.alive.get(owner))}
        else:
            self.alive[uid] = (kept, key)
            if after != before:
                self._suspects.add((kept, key))
            if get(new, "metadata", "deletionTimestamp"):
                self._ending.add((kept, key))
        if new is None and self._defined_no_more(kept):
            self._ending.add((_DEFINITIONS, ("", f"{kept[1]}.{kept[0]}")))
        if kept != ("", "events") and key[0] and new is None:
            self._ending.add((("", "namespaces"), ("", key[0])))
        if self._suspects or self._ending:
            self.work.set()

    def _defined_no_more(self, kept: Kept) -> bool:
        """Whether the definition of these objects is being deleted."""
        crd = self.collections[_DEFINITIONS].objects.get(("", f"{kept[1]}.{kept[0]}"))
        return crd is not None and "deletionTimestamp" in crd["metadata"]

    def decode(self, resource: Resource, obj: Any, write: Write) -> Json:
        """The object as it can be kept: without what its kind does not have."""
        if not isinstance(obj, dict):
            raise bad_request("the object provided is unrecognized: it must be an object")
        kind, api = obj.get("kind", resource.kind), obj.get("apiVersion", resource.api_version)
        if api != resource.api_version:
            group, _, _ = api.rpartition("/")
            if group != resource.group or kind != resource.kind:
                raise bad_request(
                    f"the API version in the data ({api}) does not match the expected API version ({resource.api_version})"
                )
        if kind != resource.kind:
            text = f'{kind} in version "{resource.version}" cannot be handled as a {resource.kind}: no kind "{kind}" is registered for version "{api}"'
            raise bad_request(text)
        obj["kind"], obj["apiVersion"] = kind, resource.api_version
        if not isinstance(obj.get("metadata", {}), dict):
            raise bad_request(
                f'{kind} in version "{resource.version}" cannot be handled as a {kind}: metadata is no object'
            )
        obj.setdefault("metadata", {})
        schema.drop_nulls(obj, resource.node, custom=resource.custom)
        prefix = f'{kind} in version "{resource.version}" cannot be handled as a {kind}: '
        node = resource.node
        try:
            schema.decode(obj if not resource.custom else {"metadata": obj["metadata"]}, node, kind)
        except schema.Undecodable as error:
            raise bad_request(prefix + str(error)) from error
        if not resource.custom and (why := builtin.undecodable(obj, kind)):
            raise bad_request(prefix + why)
        self._canonical(resource, obj)
        unknown = schema.prune(obj, node)
        if unknown and write.validation == "Strict":
            told = ", ".join(f'unknown field "{path}"' for path in unknown)
            raise bad_request(f"{prefix}strict decoding error: {told}")
        if write.validation == "Warn":
            write.warnings.extend(f'unknown field "{path}"' for path in unknown)
        return obj

    def _canonical(self, resource: Resource, obj: Json) -> None:
        try:
            schema.canonical(
                obj if not resource.custom else {"metadata": obj["metadata"]}, resource.node, builtin.canonical
            )
        except (schema.Undecodable, ValueError) as error:
            prefix = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: '
            raise bad_request(f"{prefix}{error}") from error

    def _complete(self, resource: Resource, obj: Json) -> None:
        if resource.custom:
            schema.default(obj, resource.node)
        else:
            builtin.default(obj, resource.kind)

    def _check(self, resource: Resource, obj: Json, old: Json | None, *, binding: bool = False) -> None:
        name = obj["metadata"].get("name", "")
        causes = list(builtin.metadata(obj, resource.kind))
        if resource.custom:
            wrong = list(schema.check(obj, resource.node))
            causes += wrong
            blocking = {
                "FieldValueRequired",
                "FieldValueTypeInvalid",
                "FieldValueTooMany",
                "FieldValueTooLong",
                "FieldValueNotSupported",
            }
            if any(reason in blocking for reason, _, _ in wrong):
                text = "Invalid value: null: some validation rules were not checked because the object was invalid; correct the existing errors to complete validation"
                causes.append(("FieldValueInvalid", text, ""))
            else:
                causes += rules.check(obj, resource.node, old)
        else:
            wrong = list(builtin.check(obj, resource.kind))
            named = {where for _, _, where in wrong}
            causes += wrong + [cause for cause in schema.need(obj, resource.node) if cause[2] not in named]
            if old is not None:
                causes += builtin.check_change(old, obj, resource.kind, binding=binding)
        if causes:
            raise invalid(resource, name, causes)

    def _namespace(self, resource: Resource, namespace: str, obj: Json) -> None:
        meta = obj["metadata"]
        if not resource.namespaced:
            meta.pop("namespace", None)
            return
        if meta.setdefault("namespace", namespace) != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")

    def _house(self, resource: Resource, namespace: str, name: str) -> None:
        if not resource.namespaced:
            return
        house = self.collections["", "namespaces"].objects.get(("", namespace))
        if house is None:
            raise not_found(self.find("", "v1", "namespaces"), namespace)
        if house["metadata"].get("deletionTimestamp"):
            problem = forbidden(
                resource, name, f"unable to create new content in namespace {namespace} because it is being terminated"
            )
            problem.details = {
                **(problem.details or {}),
                "causes": [
                    {
                        "reason": "NamespaceTerminating",
                        "message": f"namespace {namespace} is being terminated",
                        "field": "metadata.namespace",
                    }
                ],
            }
            raise problem

    def create(self, resource: Resource, namespace: str, obj: Json, write: Write) -> Json:
        """POST."""
        obj = self.decode(resource, obj, write)
        meta = obj["metadata"]
        self._namespace(resource, namespace, obj)
        if not meta.get("name") and meta.get("generateName"):
            letters = "bcdfghjklmnpqrstvwxz2456789"
            meta["name"] = meta["generateName"] + "".join(random.choices(letters, k=5))
        if meta.get("resourceVersion"):
            raise Problem(500, "", "resourceVersion should not be set on objects to be created")
        with self.lock:
            return self._insert(resource, namespace, obj, write, None)

    def _insert(
        self, resource: Resource, namespace: str, obj: Json, write: Write, managers: ssa.Managers | None
    ) -> Json:
        meta = obj["metadata"]
        name = meta.get("name", "")
        key = (namespace if resource.namespaced else "", name)
        self._house(resource, namespace, name)
        if self._defined_no_more((resource.group, resource.plural)):
            text = "create not allowed while custom resource definition is terminating"
            raise Problem(405, "MethodNotAllowed", text, _about(resource, name))
        for gone in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields", "resourceVersion"):
            meta.pop(gone, None)
        meta["uid"], meta["creationTimestamp"] = builtin.new_uid(), stamp()
        if resource.has_generation:
            meta["generation"] = 1
        if resource.has_status:
            obj.pop("status", None)
        self._complete(resource, obj)
        if not resource.custom and resource.has_status:
            status = builtin.first_status(resource.kind, obj)
            if status is not None:
                obj["status"] = status
        self._admit(resource, obj)
        self._check(resource, obj, None)
        if key in self.collection(resource).objects:
            raise Problem(409, "AlreadyExists", f'{resource.qualified} "{name}" already exists', _about(resource, name))
        if managers is None:
            who = (write.manager, "Update", resource.api_version, "")
            managers = ssa.update(None, obj, resource.node, who, stamp(), ignored=("status",))
        if managers:
            meta["managedFields"] = ssa.written(managers)
        if write.dry:
            return obj
        made = self._commit(resource, key, None, obj)
        self._after_create(resource, made)
        return made

    def _admit(self, resource: Resource, obj: Json) -> None:
        spec = obj.get("spec") or {}
        if resource.kind == "Pod":
            namespace, name = obj["metadata"].get("namespace", ""), obj["metadata"].get("name", "")
            account = spec.setdefault("serviceAccountName", "default")
            spec["serviceAccount"] = account
            if (namespace, account) not in self.collections["", "serviceaccounts"].objects:
                raise forbidden(
                    resource,
                    name,
                    f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found',
                )
            spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
            spec.setdefault("priority", 0)
            have = {toleration.get("key") for toleration in spec.get("tolerations") or ()}
            for reason in ("not-ready", "unreachable"):
                key = f"node.kubernetes.io/{reason}"
                if key not in have:
                    toleration = {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
                    spec.setdefault("tolerations", []).append(toleration)
        elif resource.kind == "Service" and spec.get("type") != "ExternalName":
            if not spec.get("clusterIP"):
                self._ip += 1
                spec["clusterIP"] = f"10.96.{self._ip // 250 % 250}.{self._ip % 250 + 1}"
            spec.setdefault("clusterIPs", [spec["clusterIP"]])

    def _after_create(self, resource: Resource, made: Json) -> None:
        name = made["metadata"]["name"]
        if resource.kind == "Namespace":
            # What the controller manager makes in every namespace, at once.
            quiet = Write(manager="kube-controller-manager")
            self.create(self.find("", "v1", "serviceaccounts"), name, {"metadata": {"name": "default"}}, quiet)
            root = {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": ""}}
            self.create(self.find("", "v1", "configmaps"), name, root, quiet)
        elif resource.kind == "CustomResourceDefinition":
            for added in schema.of_crd(made):
                self.register(added)
            now = stamp()
            conditions = [
                {"type": kind, "status": "True", "reason": kind, "message": "", "lastTransitionTime": now}
                for kind in ("NamesAccepted", "Established")
            ]
            names = made["spec"]["names"]
            status = {
                "conditions": conditions,
                "acceptedNames": names,
                "storedVersions": [made["spec"]["versions"][0]["name"]],
            }
            self._commit(resource, ("", name), made, {**made, "status": status})

    def update(
        self, resource: Resource, namespace: str, name: str, change: Callable[[Json], Json], write: Write
    ) -> Json:
        """PUT and the plain patches: `change` makes the new object of a copy of the old one."""
        with self.lock:
            key = (namespace if resource.namespaced else "", name)
            old = self.collection(resource).objects.get(key)
            if old is None:
                raise not_found(resource, name)
            try:
                wanted = self.decode(resource, change(clone(old)), write)
            except Problem as problem:
                if "strict decoding error: " not in problem.message:
                    raise
                # Of a patch the real server says it in other words.
                cause = schema.bad(
                    "patch",
                    "...",
                    "strict decoding error: " + problem.message.partition(": strict decoding error: ")[2],
                )
                raise Problem(
                    422,
                    "Invalid",
                    f' "" is invalid: patch: {cause[1]}',
                    {"causes": [dict(zip(("reason", "message", "field"), cause, strict=True))]},
                ) from problem
            return self._change(resource, key, old, wanted, write, None)

    def replace(self, resource: Resource, namespace: str, name: str, obj: Json, write: Write) -> tuple[Json, bool]:
        """PUT; whether it was created."""
        obj = self.decode(resource, obj, write)
        meta = obj["metadata"]
        if meta.setdefault("name", name) != name:
            raise bad_request(f"the name of the object ({meta['name']}) does not match the name on the URL ({name})")
        self._namespace(resource, namespace, obj)
        with self.lock:
            key = (namespace if resource.namespaced else "", name)
            old = self.collection(resource).objects.get(key)
            if old is None:
                if "upsert" not in resource.flags or write.subresource:
                    raise not_found(resource, name)
                if meta.get("uid"):
                    raise unmet(resource, key, meta["uid"], "")
                write.may("create")
                return self._insert(resource, namespace, obj, write, None), True
            if not meta.get("resourceVersion") and (resource.custom or "conditional" in resource.flags):
                cause = (
                    "FieldValueInvalid",
                    "Invalid value: 0x0: must be specified for an update",
                    "metadata.resourceVersion",
                )
                raise invalid(resource, name, [cause], of=resource.qualified)
            return self._change(resource, key, old, obj, write, None), False

    def _change(
        self, resource: Resource, key: Key, old: Json, new: Json, write: Write, managers: ssa.Managers | None
    ) -> Json:
        name, meta, was = key[1], new["metadata"], old["metadata"]
        if meta.get("uid") not in {None, "", was["uid"]}:
            if managers is not None:
                raise invalid(resource, name, [schema.bad("metadata.uid", meta["uid"], "field is immutable")])
            raise unmet(resource, key, meta["uid"], was["uid"])
        if meta.get("resourceVersion") not in {None, "", "0", was["resourceVersion"]}:
            raise conflict(resource, name, STALE)
        if meta.get("name") != name or meta.get("namespace") != was.get("namespace"):
            raise invalid(resource, name, [schema.bad("metadata.name", meta.get("name"), "field is immutable")])
        for fixed in (
            "uid",
            "creationTimestamp",
            "generation",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "selfLink",
        ):
            meta.pop(fixed, None)
            if fixed in was:
                meta[fixed] = was[fixed]
        meta["resourceVersion"] = was["resourceVersion"]
        if write.subresource == "status":
            new = {**old, "metadata": meta, "status": new.get("status", {})}
            if resource.custom:
                new["metadata"] = meta = {**was}
            else:
                new["metadata"] = meta = {**meta, **{k: was[k] for k in ("ownerReferences", "finalizers") if k in was}}
            if "status" in new and new["status"] is None:
                del new["status"]
        elif resource.has_status:
            new.pop("status", None)
            if "status" in old:
                new["status"] = old["status"]
        if resource.kind == "Service" and write.subresource != "status" and new.get("spec"):
            for kept in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
                if not new["spec"].get(kept) and old["spec"].get(kept):
                    new["spec"][kept] = old["spec"][kept]
        meta.pop("managedFields", None)
        self._complete(resource, new)
        self._check(resource, new, old, binding=write.subresource == "binding")
        if was.get("deletionTimestamp") and set(meta.get("finalizers") or ()) - set(was.get("finalizers") or ()):
            added = sorted(set(meta["finalizers"]) - set(was.get("finalizers") or ()))
            text = f"Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers {added}"
            raise invalid(resource, name, [("FieldValueForbidden", text, "metadata.finalizers")])
        if (
            resource.has_generation
            and write.subresource != "status"
            and self._body(resource, old) != self._body(resource, new)
        ):
            meta["generation"] = was.get("generation", 1) + 1
        bare = {**old, "metadata": {k: v for k, v in was.items() if k != "managedFields"}}
        if managers is None:
            who = (write.manager, "Update", resource.api_version, write.subresource)
            ignored = () if write.subresource == "status" or not resource.has_status else ("status",)
            managers = ssa.update(old, new, resource.node, who, stamp(), ignored=ignored)
        if bare == new and self._same(managers, ssa.managers_of(old)):
            return old
        if managers:
            meta["managedFields"] = ssa.written(managers)
        if write.dry:
            return new
        held = meta.get("finalizers") or self._graceful(resource, new) or resource.kind == "Namespace"
        if meta.get("deletionTimestamp") and not held:
            return self._commit(resource, key, new, None)
        made = self._commit(resource, key, old, new)
        if resource.kind == "CustomResourceDefinition":
            for added in schema.of_crd(made):
                self.register(added)
        return made

    @staticmethod
    def _same(one: ssa.Managers, other: ssa.Managers) -> bool:
        return {who: entry.fields for who, entry in one.items()} == {who: entry.fields for who, entry in other.items()}

    @staticmethod
    def _body(resource: Resource, obj: Json) -> Json:
        left = {"metadata", "apiVersion", "kind"} | ({"status"} if resource.has_status else set())
        return {key: value for key, value in obj.items() if key not in left}

    @staticmethod
    def _graceful(resource: Resource, obj: Json) -> bool:
        # A pod on a node stays until its kubelet deletes it with no grace.
        return resource.kind == "Pod" and (obj["metadata"].get("deletionGracePeriodSeconds") or 0) > 0

    def apply(self, resource: Resource, namespace: str, name: str, patch: Json, write: Write) -> tuple[Json, bool]:
        """Server-side apply; whether it was created."""
        if not isinstance(patch, dict) or patch.get("apiVersion") is None or patch.get("kind") is None:
            raise bad_request(
                "Object 'Kind' is missing in the applied patch"
                if isinstance(patch, dict) and patch.get("apiVersion")
                else "apiVersion must be set in the applied patch"
            )
        if patch["apiVersion"] != resource.api_version:
            raise bad_request(
                f"Incorrect version specified in apply patch. Specified patch version: {patch['apiVersion']}, expected: {resource.api_version}"
            )
        if patch["kind"] != resource.kind:
            raise bad_request(
                f"the kind in the patch ({patch['kind']}) does not match the expected kind ({resource.kind})"
            )
        meta = patch.setdefault("metadata", {})
        if meta.get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        if meta.setdefault("name", name) != name:
            raise bad_request(f"the name of the object ({meta['name']}) does not match the name on the URL ({name})")
        self._namespace(resource, namespace, patch)
        where = f"{namespace if resource.namespaced else ''}/{name}; {resource.api_version if resource.group else '/' + resource.version}, Kind={resource.kind}"
        if wrong := schema.typed(patch, resource.node):
            told = wrong[0] if len(wrong) == 1 else "errors:\n" + "".join(f"  {text}\n" for text in wrong).rstrip("\n")
            # A plain error in the real server too (kubernetes#118877): 500 without a reason.
            raise Problem(500, "", f"failed to create typed patch object ({where}): {told}")
        uid, version = meta.pop("uid", None), meta.pop("resourceVersion", None)
        if write.subresource == "status":
            patch = {key: patch[key] for key in ("apiVersion", "kind", "metadata", "status") if key in patch}
            patch["metadata"] = {key: meta[key] for key in ("name", "namespace") if key in meta}
        elif resource.has_status:
            patch.pop("status", None)
        who = (write.manager, "Apply", resource.api_version, write.subresource)
        with self.lock:
            key = (namespace if resource.namespaced else "", name)
            old = self.collection(resource).objects.get(key)
            if old is None:
                if write.subresource:
                    raise not_found(resource, name)
                if uid:
                    why = f"uid mismatch: the provided object specified uid {uid}, and no existing object was found"
                    raise conflict(resource, name, why)
                # A resourceVersion does not keep an apply from creating: so it is in real servers.
                write.may("create")
            elif version not in {None, "", "0", old["metadata"]["resourceVersion"]}:
                raise conflict(resource, name, STALE)
            try:
                merged, managers = ssa.apply(
                    self.shown(old, resource) if old else None, patch, resource.node, who, stamp(), force=write.force
                )
            except ssa.Conflicts as error:
                details = {**_about(resource, name), "causes": error.causes}
                raise Problem(409, "Conflict", error.text, details) from error
            merged = clone(merged)
            merged["apiVersion"], merged["kind"] = resource.api_version, resource.kind
            if uid:
                merged["metadata"]["uid"] = uid
            self._canonical(resource, merged)
            schema.drop_nulls(merged, resource.node, custom=resource.custom)
            if old is None:
                return self._insert(resource, namespace, merged, write, managers), True
            return self._change(resource, key, old, merged, write, managers), False

    # -- deleting

    def delete(self, resource: Resource, namespace: str, name: str, options: Json, write: Write) -> tuple[Json, bool]:
        """The object as it is now, and whether it is gone."""
        with self.lock:
            key = (namespace if resource.namespaced else "", name)
            old = self.collection(resource).objects.get(key)
            if old is None:
                raise not_found(resource, name)
            was = old["metadata"]
            wanted = options.get("preconditions") or {}
            for what, told, why in (
                ("uid", "UID", "deleted and then recreated"),
                ("resourceVersion", "ResourceVersion", "modified"),
            ):
                if wanted.get(what) and wanted[what] != was[what]:
                    text = f"the {told} in the precondition ({wanted[what]}) does not match the {told} in record ({was[what]})"
                    raise conflict(resource, name, f"{text}. The object might have been {why}")
            policy = options.get("propagationPolicy")
            if policy is None and options.get("orphanDependents") is not None:
                policy = "Orphan" if options["orphanDependents"] else "Background"
            if policy is None and {FOREGROUND, ORPHAN} & set(was.get("finalizers") or ()):
                policy = "Foreground" if FOREGROUND in was["finalizers"] else "Orphan"
            if policy is None:
                policy = "Orphan" if resource.kind == "Job" else "Background"
                if resource.kind == "Job":
                    write.warnings.append(
                        "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set propagationPolicy=Orphan to suppress this warning"
                    )
            finalizers = [one for one in was.get("finalizers") or () if one not in {FOREGROUND, ORPHAN}]
            has_dependents = bool(self.dependents.get(was["uid"]))
            if policy == "Foreground":
                finalizers.append(FOREGROUND)
            elif policy == "Orphan" and (has_dependents or ORPHAN in (was.get("finalizers") or ())):
                finalizers.append(ORPHAN)
            if resource.kind == "CustomResourceDefinition" and CLEANUP not in finalizers:
                finalizers.append(CLEANUP)
            new = {**old, "metadata": {**was}}
            meta = new["metadata"]
            grace = 0
            if (
                resource.kind == "Pod"
                and get(old, "spec", "nodeName")
                and get(old, "status", "phase") not in {"Succeeded", "Failed"}
            ):
                grace = options.get("gracePeriodSeconds")
                if grace is None:
                    grace = was.get(
                        "deletionGracePeriodSeconds", get(old, "spec", "terminationGracePeriodSeconds", otherwise=30)
                    )
                if was.get("deletionTimestamp"):
                    grace = min(grace, was.get("deletionGracePeriodSeconds", grace))
            if resource.kind == "Namespace":
                new["status"] = {**(old.get("status") or {}), "phase": "Terminating"}
            holds = bool(finalizers) or grace > 0 or resource.kind == "Namespace"
            if not holds:
                if write.dry:
                    return old, True
                return self._commit(resource, key, old, None), True
            unchanged = (
                was.get("deletionTimestamp")
                and finalizers == (was.get("finalizers") or [])
                and grace == was.get("deletionGracePeriodSeconds", 0)
            )
            if not was.get("deletionTimestamp") or grace < (was.get("deletionGracePeriodSeconds") or 0):
                until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=grace)
                meta["deletionTimestamp"] = until.strftime("%Y-%m-%dT%H:%M:%SZ")
            meta["deletionGracePeriodSeconds"] = grace
            meta.pop("finalizers", None)
            if finalizers:
                meta["finalizers"] = finalizers
            if resource.has_generation and not was.get("deletionTimestamp"):
                meta["generation"] = was.get("generation", 1) + 1
            if unchanged or write.dry:
                return (old if unchanged else new), False
            return self._commit(resource, key, old, new), False

    # -- garbage

    def collect(self) -> None:
        """One round of the garbage collector and of the namespaces that end."""
        quiet = Write(manager="kube-controller-manager")
        with self.lock:
            self.work.clear()
            suspects, self._suspects = self._suspects, set()
            ending, self._ending = self._ending, set()
            for kept, key in ending:
                obj = self.collections[kept].objects.get(key)
                if obj is not None and obj["metadata"].get("deletionTimestamp"):
                    self._end(self._any(kept), key, obj, quiet)
            for kept, key in suspects:
                obj = self.collections[kept].objects.get(key)
                owners = get(obj, "metadata", "ownerReferences", otherwise=[])
                if obj is None or not owners or any(owner["uid"] in self.alive for owner in owners):
                    continue
                self.delete(self._any(kept), key[0], key[1], {"propagationPolicy": "Background"}, quiet)

    def _any(self, kept: Kept) -> Resource:
        return next(found for (group, _, plural), found in self.resources.items() if (group, plural) == kept)

    def _end(self, resource: Resource, key: Key, obj: Json, quiet: Write) -> None:
        meta = obj["metadata"]
        finalizers = meta.get("finalizers") or []
        if ORPHAN in finalizers:
            for kept, other in list(self.dependents.get(meta["uid"], ())):
                dependent = self.collections[kept].objects.get(other)
                if dependent is not None:
                    left = [owner for owner in dependent["metadata"]["ownerReferences"] if owner["uid"] != meta["uid"]]
                    free = {**dependent, "metadata": {**dependent["metadata"], "ownerReferences": left}}
                    if not left:
                        del free["metadata"]["ownerReferences"]
                    self._commit(self._any(kept), other, dependent, free)
            self._unhold(resource, key, ORPHAN)
        if FOREGROUND in finalizers:
            blocking = False
            for kept, other in list(self.dependents.get(meta["uid"], ())):
                dependent = self.collections[kept].objects.get(other)
                if dependent is None:
                    continue
                mine = [owner for owner in dependent["metadata"]["ownerReferences"] if owner["uid"] == meta["uid"]]
                if not dependent["metadata"].get("deletionTimestamp"):
                    policy = "Foreground" if self.dependents.get(dependent["metadata"]["uid"]) else "Background"
                    self.delete(self._any(kept), other[0], other[1], {"propagationPolicy": policy}, quiet)
                    self._ending.add((kept, other))
                still = self.collections[kept].objects.get(other) is not None
                blocking = blocking or (still and any(owner.get("blockOwnerDeletion") for owner in mine))
            if not blocking:
                self._unhold(resource, key, FOREGROUND)
        if resource.kind == "Namespace":
            self._empty(resource, key, obj, quiet)
        if CLEANUP in finalizers:
            self._undefine(resource, key, obj, quiet)
        if self._ending:
            self.work.set()

    def _unhold(self, resource: Resource, key: Key, finalizer: str) -> None:
        obj = self.collection(resource).objects.get(key)
        if obj is None:
            return
        left = [one for one in obj["metadata"].get("finalizers") or () if one != finalizer]
        new = {**obj, "metadata": {**obj["metadata"], "finalizers": left}}
        if not left:
            del new["metadata"]["finalizers"]
        gone = not left and not self._graceful(resource, new)
        self._commit(resource, key, new if gone else obj, None if gone else new)

    def _undefine(self, resource: Resource, key: Key, crd: Json, quiet: Write) -> None:
        """Take away what was made by a definition; with the last of it the definition, which is served no more."""
        kept = crd["spec"]["group"], crd["spec"]["names"]["plural"]
        there = self.collections[kept].objects
        for space, name in list(there):
            if "deletionTimestamp" not in there[space, name]["metadata"]:
                self.delete(self._any(kept), space, name, {"propagationPolicy": "Background"}, quiet)
        if not there:
            self._unhold(resource, key, CLEANUP)
            for one in [one for one in self.resources if (one[0], one[2]) == kept]:
                del self.resources[one]

    def _empty(self, resource: Resource, key: Key, obj: Json, quiet: Write) -> None:
        left = False
        for kept, found in list(self.collections.items()):
            for where, name in [where for where in found.objects if where[0] == key[1]]:
                inside = found.objects[where, name]
                if not inside["metadata"].get("deletionTimestamp"):
                    self.delete(self._any(kept), where, name, {"propagationPolicy": "Background"}, quiet)
                left = left or (where, name) in found.objects
        if not left and not obj["metadata"].get("finalizers"):
            self._commit(resource, key, obj, None)

    # -- patches

    def patched(self, resource: Resource, old: Json, patch: Any, kind: str) -> Json:
        """The object after a plain patch: "json", "merge" or "strategic"."""
        if kind == "json":
            try:
                new = jsonpatch.apply_patch(old, patch)
            except jsonpatch.JsonPatchTestFailed as error:
                text = "the server rejected our request due to an error in our request"
                raise Problem(422, "Invalid", text, _about(resource, old["metadata"]["name"])) from error
            except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException, TypeError, KeyError) as error:
                text = f"the server rejected our request due to an error in our request: {error}"
                raise Problem(422, "Invalid", text, _about(resource, old["metadata"]["name"])) from error
            return dict(new)
        if not isinstance(patch, dict):
            raise bad_request("json: cannot unmarshal array into Go value of type map[string]interface {}")
        if kind == "merge":
            return dict(merge_patch(old, patch))
        return dict(strategic(old, patch, resource.node))


def merge_patch(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def strategic(old: Any, patch: Any, node: schema.Node) -> Any:
    """A strategic merge patch: lists with a merge key are joined; `$patch: delete|replace`, `$deleteFromPrimitiveList`."""
    node = schema.deref(node)
    if not isinstance(patch, dict):
        return patch
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if key.startswith("$"):
            if key.startswith("$deleteFromPrimitiveList/"):
                name = key.partition("/")[2]
                result[name] = [item for item in result.get(name) or () if item not in value]
            elif key.startswith("$retainKeys"):
                result = {name: item for name, item in result.items() if name in value}
            continue
        below = schema.child(node, key)[1]
        if value is None:
            result.pop(key, None)
        elif isinstance(value, list):
            result[key] = _strategic_list(result.get(key) or [], value, below)
        else:
            result[key] = strategic(result.get(key), value, below)
    return result


def _strategic_list(old: list[Any], patch: list[Any], node: schema.Node) -> list[Any]:
    by = schema.merge_key(node)
    if by is None:
        if "merge" in str((node or {}).get("x-kubernetes-patch-strategy", "")):
            return [*old, *(item for item in patch if item not in old)]
        return patch
    if any(isinstance(item, dict) and item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if "$patch" not in item]
    result = list(old)
    for item in patch:
        where = next((n for n, have in enumerate(result) if have.get(by) == item.get(by)), None)
        if item.get("$patch") == "delete":
            if where is not None:
                del result[where]
        elif where is None:
            result.append(item)
        else:
            result[where] = strategic(result[where], item, schema.items(node))
    return result


def continuation(version: int, key: Key) -> str:
    return base64.urlsafe_b64encode(orjson.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": list(key)})).decode()


def continued(token: str) -> tuple[int, Key]:
    with suppress(Exception):
        found = orjson.loads(base64.urlsafe_b64decode(token))
        return int(found["rv"]), (found["start"][0], found["start"][1])
    raise bad_request("continue key is not valid: it is no token of this server")

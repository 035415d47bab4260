"""A small Kubernetes API server for tests: objects, versions, watches, server-side apply, RBAC and errors of a real one.

It keeps everything in memory and answers plain HTTP on 127.0.0.1. Parts: `store` (objects and the rules of writing), `schema`
and `rules` (kinds, CRDs), `builtin` (defaults and validation of built-in kinds), `ssa` (field ownership), `rbac`, `faults`.

What it does, a real v1.3x does as well, with the same codes, reasons and messages as far as clients can depend on them. It does NOT:
- run anything: no pods of Deployments, no endpoints, no jobs, no statuses, no scheduler, no expiry of Events. Of the controller
  manager it has the garbage collector, the end of namespaces and `default` service accounts; the rest is in `node`, `gateway`;
- know TLS, client certificates, impersonation, audit, priority and fairness, admission webhooks or policies, quotas, limit ranges,
  Pod Security; mount tokens into pods; stop anyone from granting rights that they have not;
- check all that Go checks: for pods, Deployments, Services, Jobs, autoscalers, budgets, Leases, ConfigMaps, Events and Roles what
  manifests come across; for other kinds what their schema says. Rules (CEL) of built-in kinds are not evaluated, those of CRDs
  are (about `oldSelf`: not in lists); nothing is ratcheted. CRDs' versions are taken to be alike;
- serve protobuf (`kubectl create namespace` and `auth can-i` send it, `kubectl apply -f` does not), CBOR, tables (`kubectl get`
  shows names and ages), exec, attach, port-forward, service proxies, `events.k8s.io`, schemas by OpenAPI (`kubectl explain`),
  metrics, old versions (a list is always of now), logs that follow;
- keep anything on disk: a new server is a new cluster. `away()` is a server that comes back with all it knew.
"""

import contextlib
import http.client
import http.server
import json
import re
import secrets
import select
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import orjson
import yaml

from tests.cluster import rbac, schema
from tests.cluster.builtin import matches
from tests.cluster.faults import Faults
from tests.cluster.rbac import Asked, User
from tests.cluster.schema import Json, Resource, get
from tests.cluster.store import (
    Problem,
    Selector,
    Store,
    Write,
    bad_request,
    conflict,
    continuation,
    continued,
    expired,
    field_selector,
)

VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.0-titleshot",
    "platform": "linux/amd64",
    "goVersion": "none",
}
ADMIN = User("kubernetes-admin", (rbac.MASTERS, "system:authenticated"))
_TRUE = frozenset({"1", "t", "T", "true", "True", "TRUE"})
_PATCHES = {
    "application/json-patch+json": "json",
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
}
_SHORT = {
    "pods": ["po"],
    "services": ["svc"],
    "configmaps": ["cm"],
    "namespaces": ["ns"],
    "nodes": ["no"],
    "deployments": ["deploy"],
}
_SHORT |= {"replicasets": ["rs"], "serviceaccounts": ["sa"], "events": ["ev"], "horizontalpodautoscalers": ["hpa"]}
_SHORT |= {
    "poddisruptionbudgets": ["pdb"],
    "networkpolicies": ["netpol"],
    "persistentvolumeclaims": ["pvc"],
    "customresourcedefinitions": ["crd", "crds"],
    "gateways": ["gtw"],
    "inferenceservices": ["isvc"],
}
_ALL = {"pods", "services", "deployments", "replicasets", "statefulsets", "daemonsets", "jobs", "cronjobs"}
_ALL |= {"horizontalpodautoscalers"}
"""What `kubectl get all` gets."""
_SUBRESOURCES = {"pods": {"log", "proxy", "eviction", "binding", "status"}, "serviceaccounts": {"token"}}
_SCALED = {("apps", "deployments"), ("apps", "replicasets"), ("apps", "statefulsets")}


def _once(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise bad_request(f'strict decoding error: duplicate field "{twice}"')
    return found


@dataclass
class Request:
    """One request as the routes see it."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    user: User = ADMIN
    resource: Resource | None = None
    namespace: str | None = None
    name: str = ""
    subresource: str = ""
    rest: str = ""

    @property
    def verb(self) -> str:
        """As RBAC names it."""
        if self.subresource == "proxy":
            return {"GET": "get", "HEAD": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(
                self.method, "create"
            )
        if self.method in {"GET", "HEAD"}:
            if self.name:
                return "get"
            return "watch" if self.query.get("watch") in _TRUE else "list"
        if self.method == "DELETE":
            return "delete" if self.name else "deletecollection"
        return {"POST": "create", "PUT": "update", "PATCH": "patch"}[self.method]

    def json(self) -> Any:
        if not self.body:
            return {}
        kind = self.headers.get("content-type", "")
        if "protobuf" in kind or "cbor" in kind:
            text = "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml"
            raise Problem(415, "UnsupportedMediaType", text)
        try:
            if self.query.get("fieldValidation") == "Strict":
                return json.loads(self.body, object_pairs_hook=_once)
            return orjson.loads(self.body)
        except json.JSONDecodeError as error:
            if "yaml" not in kind:
                raise bad_request(f"couldn't get version/kind; json parse error: {error}") from error
        try:
            return yaml.safe_load(self.body)
        except yaml.YAMLError as error:
            raise bad_request(f"error decoding YAML: {error}") from error

    def dry(self, options: Json | None = None) -> bool:
        wanted = self.query.get("dryRun") or ",".join((options or {}).get("dryRun") or ())
        if wanted not in {"", "All"}:
            raise Problem(
                422,
                "Invalid",
                f'CreateOptions.meta.k8s.io "" is invalid: dryRun: Unsupported value: ["{wanted}"]: supported values: "All"',
            )
        return wanted == "All"


@dataclass
class Answer:
    code: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    stream: Iterator[bytes] | None = None


@dataclass(frozen=True)
class Seen:
    """A request that came: for tests that count them."""

    at: float
    verb: str
    path: str
    user: str
    code: int


class ApiServer:
    """The server. Use as a context manager, or `start()` and `stop()`; `url`, `kubeconfig()` and `token()` let clients in.

    Requests without a token are the administrator's unless `anonymous` is False; `admin_token` is theirs always. `crds` is
    the folder with CRDs (missing files: those kinds are taken as they come).
    """

    def __init__(self, *, anonymous: bool = True, crds: Path | None = schema.CRDS, host: str = "127.0.0.1") -> None:
        self.store = Store(crds)
        self.faults = Faults()
        self.admin_token = secrets.token_urlsafe(16)
        self.tokens: dict[str, User] = {self.admin_token: ADMIN}
        self.logs: dict[tuple[str, str, str], Path | Callable[[], bytes]] = {}
        """Where a container's output is: by (namespace, pod, container), "container/previous" for the one before."""
        self.seen: deque[Seen] = deque(maxlen=50_000)
        self.bookmark_seconds = 5.0
        self.clock = time.time
        self._anonymous, self._host = anonymous, host
        self._port = 0
        self._holder: socket.socket | None = None
        self._listener: _Listener | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._evictions = threading.Lock()

    # -- life

    def start(self) -> "ApiServer":
        # The holder keeps the port while nobody listens: it is bound and never listens.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind((self._host, 0))
        self._port = self._holder.getsockname()[1]
        self._listen()
        collector = threading.Thread(target=self._collect, name="garbage", daemon=True)
        collector.start()
        self._threads.append(collector)
        return self

    def stop(self) -> None:
        self._stopped.set()
        self.faults.clear()
        self.store.work.set()
        self._deafen()
        for thread in self._threads:
            thread.join(5)
        if self._holder is not None:
            self._holder.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listen(self) -> None:
        self._listener = _Listener((self._host, self._port), self)
        thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), name="apiserver", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _deafen(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            self.store.end_watches()

    def _collect(self) -> None:
        while not self._stopped.is_set():
            self.store.work.wait()
            if not self._stopped.is_set():
                try:
                    self.store.collect()
                except Exception:
                    traceback.print_exc()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens for a while; all connections are cut. The port stays ours, the objects too."""
        self._deafen()
        try:
            yield
        finally:
            self._listen()

    def close_watches(self) -> None:
        """End all watches, as a server does every few minutes."""
        self.store.end_watches()

    def compact(self) -> None:
        """Forget old versions: a watch from one of them is 410."""
        self.store.compact()

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def token(self, user: str, groups: tuple[str, ...] = ()) -> str:
        """A bearer token for a user: "ann", or "system:serviceaccount:models:worker"."""
        made = secrets.token_urlsafe(16)
        self.tokens[made] = User.of(user, groups)
        return made

    def kubeconfig(
        self, path: Path, context: str = "test", *, token: str | None = None, namespace: str = "default"
    ) -> Path:
        """Write a kubeconfig with one more context, which becomes the current one."""
        config: Json = {"apiVersion": "v1", "kind": "Config", "clusters": [], "users": [], "contexts": []}
        if path.exists():
            config = yaml.safe_load(path.read_text())
        for part in ("clusters", "users", "contexts"):
            config[part] = [entry for entry in config[part] if entry["name"] != context]
        config["clusters"].append({"name": context, "cluster": {"server": self.url}})
        config["users"].append({"name": context, "user": {"token": token or self.admin_token}})
        config["contexts"].append(
            {"name": context, "context": {"cluster": context, "user": context, "namespace": namespace}}
        )
        config["current-context"] = context
        path.write_text(yaml.safe_dump(config))
        return path

    # -- helpers for tests, without HTTP

    def objects(self, plural: str, namespace: str | None = None) -> list[Json]:
        """All objects of a resource ("httproutes")."""
        resource = next(found for found in self.store.resources.values() if found.plural == plural)
        return self.store.select(resource, namespace, lambda _obj: True)[0]

    def add(self, obj: Json) -> Json:
        """Create an object, as the administrator."""
        resource = self.store.of_kind(obj["apiVersion"], obj["kind"])
        assert resource is not None, f"no such kind: {obj['apiVersion']} {obj['kind']}"
        namespace = obj.get("metadata", {}).get("namespace", "default") if resource.namespaced else ""
        return self.store.create(resource, namespace, json.loads(json.dumps(obj)), Write(manager="tests"))

    # -- requests

    def authenticate(self, headers: Mapping[str, str]) -> User:
        how, _, token = headers.get("authorization", "").partition(" ")
        if how.lower() == "bearer":
            if (user := self.tokens.get(token.strip())) is not None:
                return user
        elif self._anonymous:
            return ADMIN
        raise Problem(401, "Unauthorized", "Unauthorized")

    def answer(self, request: Request) -> Answer:
        """The answer to a request, errors included."""
        try:
            request.user = self.authenticate(request.headers)
            return self._route(request)
        except Problem as problem:
            headers = {"Retry-After": str(problem.retry_after)} if problem.retry_after is not None else {}
            return Answer(problem.code, problem.status(), headers)
        except Exception as error:
            # A mistake of this server: loud in the test's output, and an answer all the same.
            traceback.print_exc()
            return Answer(500, Problem(500, "InternalError", f"Internal error occurred: {error!r}").status())

    def parse(self, request: Request) -> None:
        """Fill in what the path says."""
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        if parts[0] == "api" and len(parts) > 2:
            group, version, rest = "", parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) > 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            return
        if (
            rest[0] == "namespaces"
            and len(rest) > 2
            and not (group == "" and rest[2] in {"status", "finalize"} and len(rest) == 3)
        ):
            request.namespace, rest = rest[1], rest[2:]
        request.resource = self.store.find(group, version, rest[0])
        request.name = rest[1] if len(rest) > 1 else ""
        request.subresource = rest[2] if len(rest) > 2 else ""
        request.rest = "/".join(rest[3:])

    def _route(self, request: Request) -> Answer:
        if request.path in {"/healthz", "/readyz", "/livez"}:
            return Answer(200, b"ok", kind="text/plain; charset=utf-8")
        if request.path == "/version":
            return Answer(200, VERSION)
        if (found := self._discovery(request.path)) is not None:
            return Answer(200, found)
        if request.path.startswith("/apis/authorization.k8s.io/v1/") and request.method == "POST":
            return self._review(request)
        self.parse(request)
        resource = request.resource
        if resource is None:
            raise Problem(404, "NotFound", "the server could not find the requested resource")
        if resource.namespaced and request.namespace is None and (request.name or request.method == "POST"):
            raise Problem(404, "NotFound", "the server could not find the requested resource")
        self._demand(request, request.verb)
        if request.subresource:
            return self._subresource(request)
        methods = {
            "GET": self._read,
            "HEAD": self._read,
            "POST": self._create,
            "PUT": self._replace,
            "PATCH": self._patch,
        }
        methods["DELETE"] = self._delete
        if (
            request.method not in methods
            or (request.method == "POST" and request.name)
            or (request.method in {"PUT", "PATCH"} and not request.name)
        ):
            raise Problem(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        return methods[request.method](request)

    def _demand(self, request: Request, verb: str) -> None:
        resource = request.resource
        assert resource is not None
        plural = f"{resource.plural}/{request.subresource}" if request.subresource else resource.plural
        name = (
            request.name.split(":")[-2 if request.name.count(":") else 0]
            if request.subresource == "proxy"
            else request.name
        )
        namespace = request.namespace or (request.name if resource.kind == "Namespace" else "")
        rbac.demand(self.store, request.user, resource, Asked(verb, resource.group, plural, namespace, name))

    def _write(self, request: Request, options: Json | None = None) -> Write:
        manager = (
            request.query.get("fieldManager") or re.split(r"[/ ]", request.headers.get("user-agent") or "unknown")[0]
        )
        validation = request.query.get("fieldValidation") or "Warn"
        if validation not in {"Strict", "Warn", "Ignore"}:
            text = f'CreateOptions.meta.k8s.io "" is invalid: fieldValidation: Unsupported value: "{validation}": supported values: "", "Ignore", "Strict", "Warn"'
            raise Problem(422, "Invalid", text)
        return Write(
            manager=manager,
            user=request.user.name,
            dry=request.dry(options),
            validation=validation,
            subresource=request.subresource,
            force=request.query.get("force") in _TRUE,
            may=lambda verb: self._demand(request, verb),
        )

    def _reply(self, code: int, obj: Json, request: Request, write: Write | None = None) -> Answer:
        assert request.resource is not None
        headers = {}
        if write is not None and write.warnings:
            headers["Warning"] = ", ".join(f"299 - {json.dumps(text)}" for text in write.warnings)
        return Answer(code, self.store.shown(obj, request.resource), headers)

    def _read(self, request: Request) -> Answer:
        resource = request.resource
        assert resource is not None
        if request.name:
            return self._reply(200, self.store.get(resource, request.namespace or "", request.name), request)
        fits = self._filter(request)
        if request.verb == "watch":
            return self._watch(request, fits)
        limit = int(request.query.get("limit") or 0)
        meta: Json = {}
        after, version = ("", ""), 0
        if token := request.query.get("continue"):
            version, after = continued(token)
            if version < self.store.collection(resource).floor:
                text = "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results."
                raise expired(text)
        found, now = self.store.select(resource, request.namespace, fits)
        if token:
            found = [obj for obj in found if (obj["metadata"].get("namespace", ""), obj["metadata"]["name"]) > after]
        version = version or now
        meta["resourceVersion"] = str(version)
        if limit and len(found) > limit:
            last = found[limit - 1]["metadata"]
            meta["continue"] = continuation(version, (last.get("namespace", ""), last["name"]))
            if not request.query.get("labelSelector") and not request.query.get("fieldSelector"):
                meta["remainingItemCount"] = len(found) - limit
            found = found[:limit]
        body = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": meta}
        return Answer(200, {**body, "items": [self.store.shown(obj, resource) for obj in found]})

    def _filter(self, request: Request) -> Callable[[Json], bool]:
        assert request.resource is not None
        tests: list[Callable[[Json], bool]] = []
        if text := request.query.get("labelSelector"):
            tests.append(Selector(text))
        if text := request.query.get("fieldSelector"):
            tests.append(field_selector(text, request.resource))
        return lambda obj: all(test(obj) for test in tests)

    # -- watches

    def _watch(self, request: Request, fits: Callable[[Json], bool]) -> Answer:
        resource = request.resource
        assert resource is not None
        asked = request.query.get("resourceVersion") or "0"
        if not asked.isdigit():
            raise Problem(
                422,
                "Invalid",
                f'ListOptions.meta.k8s.io "" is invalid: resourceVersion: Invalid value: "{asked}": strconv.ParseUint: parsing "{asked}": invalid syntax',
            )
        seconds = float(request.query.get("timeoutSeconds") or 3600)
        bookmarks = request.query.get("allowWatchBookmarks") in _TRUE
        initial = request.query.get("sendInitialEvents") in _TRUE
        first: list[bytes] = []
        found = self.store.collection(resource)
        with self.store.lock:
            epoch = self.store.epoch
            if int(asked) == 0 or initial:
                objects, version = self.store.select(resource, request.namespace, fits)
                first = [_event("ADDED", self.store.shown(obj, resource)) for obj in objects]
                position = found.first + len(found.log)
                if initial and bookmarks:
                    first.append(_bookmark(resource, version, {"k8s.io/initial-events-end": "true"}))
            else:
                try:
                    position = self.store.position(resource, int(asked))
                except Problem as problem:
                    # Real servers say it in the stream, after a 200.
                    return Answer(200, stream=iter([_event("ERROR", problem.status())]))
        return Answer(200, stream=self._events(request, fits, first, position, epoch, seconds, bookmarks=bookmarks))

    def _events(
        self,
        request: Request,
        fits: Callable[[Json], bool],
        first: list[bytes],
        position: int,
        epoch: int,
        seconds: float,
        *,
        bookmarks: bool,
    ) -> Iterator[bytes]:
        resource = request.resource
        assert resource is not None
        found, deadline = self.store.collection(resource), time.monotonic() + seconds
        yield b"".join(first)
        quiet = time.monotonic() + self.bookmark_seconds
        while True:
            with self.store.lock:
                if self.store.epoch != epoch:
                    return
                if position >= found.first + len(found.log):
                    now = time.monotonic()
                    if now < deadline:
                        # Now and then it looks whether the client is still there.
                        found.changed.wait(min(deadline - now, self.bookmark_seconds, 1.0))
                if position < found.first:
                    yield _event("ERROR", expired().status())
                    return
                events = found.log[position - found.first :]
                position += len(events)
                version = self.store.version
            lines = [line for event in events if (line := self._line(request, fits, event))]
            now = time.monotonic()
            if lines:
                quiet = now + self.bookmark_seconds
            elif bookmarks and (now >= quiet or now >= deadline):
                lines = [_bookmark(resource, version, {})]
                quiet = now + self.bookmark_seconds
            yield b"".join(lines)
            if now >= deadline:
                return

    def _line(self, request: Request, fits: Callable[[Json], bool], event: Any) -> bytes | None:
        resource = request.resource
        assert resource is not None
        either = event.new or event.old
        if request.namespace is not None and either["metadata"].get("namespace", "") != request.namespace:
            return None
        if event.new is None:
            return _event("DELETED", self.store.shown(event.old, resource)) if fits(event.old) else None
        was, now = event.old is not None and fits(event.old), fits(event.new)
        if not (was or now):
            return None
        kind = "MODIFIED" if was and now else "ADDED" if now else "DELETED"
        return _event(kind, self.store.shown(event.new, resource))

    # -- writes

    def _create(self, request: Request) -> Answer:
        assert request.resource is not None
        write = self._write(request)
        made = self.store.create(request.resource, request.namespace or "", request.json(), write)
        return self._reply(201, made, request, write)

    def _replace(self, request: Request) -> Answer:
        assert request.resource is not None
        write = self._write(request)
        made, new = self.store.replace(request.resource, request.namespace or "", request.name, request.json(), write)
        return self._reply(201 if new else 200, made, request, write)

    def _patch(self, request: Request) -> Answer:
        resource = request.resource
        assert resource is not None
        kind = _PATCHES.get(request.headers.get("content-type", "").partition(";")[0].strip())
        if kind is None:
            known = ", ".join(_PATCHES)
            raise Problem(
                415,
                "UnsupportedMediaType",
                f"the body of the request was in an unknown format - accepted media types include: {known}",
            )
        if kind == "strategic" and resource.custom:
            raise Problem(
                415,
                "UnsupportedMediaType",
                "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
            )
        write, patch = self._write(request), request.json()
        if kind == "apply":
            if not request.query.get("fieldManager"):
                text = (
                    'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: is required for apply patch'
                )
                cause = {
                    "reason": "FieldValueRequired",
                    "message": "Required value: is required for apply patch",
                    "field": "fieldManager",
                }
                raise Problem(422, "Invalid", text, {"group": "meta.k8s.io", "kind": "PatchOptions", "causes": [cause]})
            made, new = self.store.apply(resource, request.namespace or "", request.name, patch, write)
            return self._reply(201 if new else 200, made, request, write)
        if write.force:
            text = 'PatchOptions.meta.k8s.io "" is invalid: force: Forbidden: may not be specified for non-apply patch'
            raise Problem(422, "Invalid", text)
        made = self.store.update(
            resource,
            request.namespace or "",
            request.name,
            lambda old: self.store.patched(resource, self.store.shown(old, resource), patch, kind),
            write,
        )
        return self._reply(200, made, request, write)

    def _options(self, request: Request) -> Json:
        found = request.json()
        options = dict(found) if isinstance(found, dict) else {}
        for name in ("propagationPolicy", "gracePeriodSeconds", "orphanDependents"):
            if (value := request.query.get(name)) is not None:
                options[name] = (
                    int(value)
                    if name == "gracePeriodSeconds"
                    else value == "true"
                    if name == "orphanDependents"
                    else value
                )
        if options.get("propagationPolicy") not in {None, "Foreground", "Background", "Orphan"}:
            policy = options["propagationPolicy"]
            raise Problem(
                422,
                "Invalid",
                f'DeleteOptions.meta.k8s.io "" is invalid: propagationPolicy: Unsupported value: "{policy}": supported values: "Foreground", "Background", "Orphan", "nil"',
            )
        return options

    def _delete(self, request: Request) -> Answer:
        resource = request.resource
        assert resource is not None
        options = self._options(request)
        write = self._write(request, options)
        if not request.name:
            found, version = self.store.select(resource, request.namespace, self._filter(request))
            for obj in found:
                meta = obj["metadata"]
                with contextlib.suppress(Problem):
                    self.store.delete(resource, meta.get("namespace", ""), meta["name"], options, write)
            body = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
            return Answer(200, {**body, "metadata": {"resourceVersion": str(version)}, "items": found})
        last, gone = self.store.delete(resource, request.namespace or "", request.name, options, write)
        if not gone or resource.kind in {"Pod", "Service", "ServiceAccount"}:
            return self._reply(200, last, request, write)
        details = {
            "name": request.name,
            **({"group": resource.group} if resource.group else {}),
            "kind": resource.plural,
        }
        details["uid"] = last["metadata"]["uid"]
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        headers = (
            {"Warning": ", ".join(f"299 - {json.dumps(text)}" for text in write.warnings)} if write.warnings else {}
        )
        return Answer(200, body, headers)

    # -- subresources

    def _subresource(self, request: Request) -> Answer:
        resource = request.resource
        assert resource is not None
        if request.subresource == "status" and resource.has_status and not request.rest:
            methods = {"GET": self._read, "PUT": self._replace, "PATCH": self._patch}
            if request.method in methods:
                return methods[request.method](request)
        if request.subresource == "scale" and (resource.group, resource.plural) in _SCALED:
            return self._scale(request)
        if resource.kind == "Pod":
            if request.subresource == "log" and request.method == "GET":
                return self._log(request)
            if request.subresource == "proxy":
                return self._proxy(request)
            if request.subresource == "eviction" and request.method == "POST":
                return self._evict(request)
            if request.subresource == "binding" and request.method == "POST":
                return self._bind(request)
        if resource.kind == "ServiceAccount" and request.subresource == "token" and request.method == "POST":
            self.store.get(resource, request.namespace or "", request.name)
            made = self.token(f"system:serviceaccount:{request.namespace}:{request.name}")
            status = {"token": made, "expirationTimestamp": "2100-01-01T00:00:00Z"}
            return Answer(
                201,
                {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {}, "status": status},
            )
        raise Problem(404, "NotFound", "the server could not find the requested resource")

    def _scale(self, request: Request) -> Answer:
        resource = request.resource
        assert resource is not None
        write = self._write(request)
        obj = self.store.get(resource, request.namespace or "", request.name)

        def scale(of: Json) -> Json:
            labels = get(of, "spec", "selector", "matchLabels", otherwise={})
            status = {"replicas": get(of, "status", "replicas", otherwise=0)}
            status["selector"] = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            meta = {
                key: of["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
            }
            spec = {"replicas": get(of, "spec", "replicas", otherwise=0)}
            return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": meta, "spec": spec, "status": status}

        if request.method == "GET":
            return Answer(200, scale(obj))
        if request.method not in {"PUT", "PATCH"}:
            raise Problem(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        wanted = request.json()
        patch = {"spec": {"replicas": get(wanted, "spec", "replicas", otherwise=0)}}
        if version := get(wanted, "metadata", "resourceVersion"):
            patch["metadata"] = {"resourceVersion": version}
        made = self.store.update(
            resource,
            request.namespace or "",
            request.name,
            lambda old: self.store.patched(resource, old, patch, "merge"),
            write,
        )
        return Answer(200, scale(made))

    def _log(self, request: Request) -> Answer:
        assert request.resource is not None
        pod = self.store.get(request.resource, request.namespace or "", request.name)
        names = [one["name"] for one in [*(pod["spec"].get("initContainers") or ()), *pod["spec"]["containers"]]]
        container = request.query.get("container") or ""
        if not container:
            if len(pod["spec"]["containers"]) > 1:
                choice = " ".join(one["name"] for one in pod["spec"]["containers"])
                raise bad_request(
                    f"a container name must be specified for pod {request.name}, choose one of: [{choice}]"
                )
            container = pod["spec"]["containers"][0]["name"]
        if container not in names:
            raise bad_request(f"container {container} is not valid for pod {request.name}")
        previous = request.query.get("previous") in _TRUE
        source = self.logs.get((request.namespace or "", request.name, container + ("/previous" if previous else "")))
        if source is None:
            if previous:
                raise bad_request(f'previous terminated container "{container}" in pod "{request.name}" not found')
            init = container not in [one["name"] for one in pod["spec"]["containers"]]
            why = "PodInitializing" if not init and pod["spec"].get("initContainers") else "ContainerCreating"
            raise bad_request(f'container "{container}" in pod "{request.name}" is waiting to start: {why}')
        text = source() if callable(source) else source.read_bytes() if source.exists() else b""
        if request.query.get("timestamps") in _TRUE:
            raise bad_request("this server keeps no timestamps of lines")
        if (lines := request.query.get("tailLines")) is not None:
            kept = text.splitlines(keepends=True)
            text = b"".join(kept[max(0, len(kept) - int(lines)) :]) if int(lines) else b""
        if (limit := request.query.get("limitBytes")) is not None:
            text = text[: int(limit)]
        return Answer(200, text, kind="text/plain")

    def _proxy(self, request: Request) -> Answer:
        assert request.resource is not None
        parts = request.name.split(":")
        name, port = (parts[0], "") if len(parts) == 1 else (parts[-2], parts[-1])
        pod = self.store.get(request.resource, request.namespace or "", name)
        address = get(pod, "status", "podIP")
        if not address:
            raise bad_request("address not allowed")
        containers = pod["spec"]["containers"]
        if not port:
            port = str(next((one["containerPort"] for of in containers for one in of.get("ports") or ()), 80))
        if not port.isdigit():
            named = {one.get("name"): one["containerPort"] for of in containers for one in of.get("ports") or ()}
            if port not in named:
                raise Problem(503, "ServiceUnavailable", f'no port named "{port}" in pod "{name}"')
            port = str(named[port])
        query = "&".join(f"{quote(key)}={quote(value)}" for key, value in request.query.items())
        path = "/" + quote(request.rest, safe="/:@!$&'()*+,;=~") + (f"?{query}" if query else "")
        skip = {"host", "connection", "content-length", "authorization", "accept-encoding", "transfer-encoding"}
        headers = {key: value for key, value in request.headers.items() if key.lower() not in skip}
        connection = http.client.HTTPConnection(address, int(port), timeout=60)
        try:
            connection.request(request.method, path, request.body or None, headers)
            reply = connection.getresponse()
            body = reply.read()
        except (OSError, http.client.HTTPException) as error:
            text = f"error trying to reach service: dial tcp {address}:{port}: connect: {str(error).lower()}"
            raise Problem(503, "ServiceUnavailable", text, {"causes": [{"message": text}]}) from error
        finally:
            connection.close()
        drop = {"connection", "transfer-encoding", "content-length", "date", "server", "content-type", "keep-alive"}
        kept = {key: value for key, value in reply.getheaders() if key.lower() not in drop}
        return Answer(reply.status, body, kept, kind=reply.getheader("content-type") or "application/octet-stream")

    def _evict(self, request: Request) -> Answer:
        resource = request.resource
        assert resource is not None
        body = request.json()
        options = body.get("deleteOptions") or {}
        write = self._write(request, options)
        with self._evictions, self.store.lock:
            pod = self.store.get(resource, request.namespace or "", request.name)
            healthy = _ready(pod)
            budgets = [
                budget
                for budget in self.objects("poddisruptionbudgets", request.namespace)
                if matches(get(budget, "spec", "selector"), get(pod, "metadata", "labels"))
            ]
            over = get(pod, "status", "phase") in {"Succeeded", "Failed"} or pod["metadata"].get("deletionTimestamp")
            if len(budgets) > 1 and not over:
                raise Problem(
                    500,
                    "InternalError",
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                )
            for budget in budgets if not over else []:
                now, needed = self._health(budget, request.namespace or "")
                if now - (1 if healthy else 0) < needed and healthy:
                    name = budget["metadata"]["name"]
                    cause = {
                        "reason": "DisruptionBudget",
                        "message": f"The disruption budget {name} needs {needed} healthy pods and has {now} currently",
                    }
                    text = "Cannot evict pod as it would violate the pod's disruption budget."
                    raise Problem(429, "TooManyRequests", text, {"causes": [cause]})
            self.store.delete(resource, request.namespace or "", request.name, options, write)
        return Answer(201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})

    def _health(self, budget: Json, namespace: str) -> tuple[int, int]:
        # As the disruption controller counts: healthy pods, and how many must be.
        pods = [
            pod
            for pod in self.objects("pods", namespace)
            if matches(get(budget, "spec", "selector"), get(pod, "metadata", "labels"))
        ]
        healthy = sum(1 for pod in pods if _ready(pod) and not pod["metadata"].get("deletionTimestamp"))
        owners = {
            owner["uid"]
            for pod in pods
            for owner in pod["metadata"].get("ownerReferences") or ()
            if owner.get("controller")
        }
        sets = [found for found in self.objects("replicasets", namespace) if found["metadata"]["uid"] in owners]
        expected = sum(get(found, "spec", "replicas", otherwise=0) for found in sets) or len(pods)
        least, most = get(budget, "spec", "minAvailable"), get(budget, "spec", "maxUnavailable")
        if most is not None:
            return healthy, max(0, expected - _share(most, expected))
        return healthy, _share(least if least is not None else 0, expected)

    def _bind(self, request: Request) -> Answer:
        assert request.resource is not None
        node = get(request.json(), "target", "name")

        def bound(pod: Json) -> Json:
            if pod["spec"].get("nodeName"):
                raise conflict(
                    request.resource,
                    request.name,
                    f'pod {request.name} is already assigned to node "{pod["spec"]["nodeName"]}"',
                )  # type: ignore[arg-type]
            pod["spec"]["nodeName"] = node
            return pod

        write = Write(manager="kube-scheduler", subresource="binding")
        self.store.update(request.resource, request.namespace or "", request.name, bound, write)
        return Answer(201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})

    # -- questions about rights, discovery

    def _review(self, request: Request) -> Answer:
        kind = request.path.rsplit("/", 1)[1]
        body = request.json()
        spec = body.get("spec") or {}
        if kind == "selfsubjectaccessreviews":
            wanted = spec.get("resourceAttributes") or {}
            plural = wanted.get("resource", "") + (f"/{wanted['subresource']}" if wanted.get("subresource") else "")
            asked = Asked(
                wanted.get("verb", ""),
                wanted.get("group", ""),
                plural,
                wanted.get("namespace", ""),
                wanted.get("name", ""),
            )
            status: Json = {"allowed": rbac.allowed(self.store, request.user, asked)}
            name = "SelfSubjectAccessReview"
        elif kind == "selfsubjectrulesreviews":
            found = list(rbac.rules(self.store, request.user, spec.get("namespace", "")))
            if rbac.MASTERS in request.user.groups:
                found.append({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]})
            status = {"resourceRules": found, "nonResourceRules": [], "incomplete": False}
            name = "SelfSubjectRulesReview"
        else:
            raise Problem(404, "NotFound", "the server could not find the requested resource")
        return Answer(
            201, {"kind": name, "apiVersion": "authorization.k8s.io/v1", "metadata": {}, "spec": spec, "status": status}
        )

    def _discovery(self, path: str) -> Json | None:
        parts = path.strip("/").split("/")
        known = list(self.store.resources.values())
        if parts[:2] == ["openapi", "v3"]:
            return _openapi(parts[2:], known)
        if parts == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        if parts == ["apis"]:
            groups: dict[str, list[str]] = {"authorization.k8s.io": ["v1"]}
            for resource in known:
                if resource.group and resource.version not in groups.setdefault(resource.group, []):
                    groups[resource.group].append(resource.version)
            listed = [_group(name, versions) for name, versions in groups.items()]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        if parts[0] == "apis" and len(parts) == 2:
            versions = list(dict.fromkeys(found.version for found in known if found.group == parts[1]))
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(parts[1], versions)} if versions else None
        if parts == ["api", "v1"] or (parts[0] == "apis" and len(parts) == 3):
            group, version = ("", "v1") if len(parts) == 2 else (parts[1], parts[2])
            listed = [
                line for found in known if (found.group, found.version) == (group, version) for line in _lines(found)
            ]
            if group == "authorization.k8s.io":
                for name in ("SelfSubjectAccessReview", "SelfSubjectRulesReview"):
                    listed.append(
                        {
                            "name": f"{name.lower()}s",
                            "singularName": "",
                            "namespaced": False,
                            "kind": name,
                            "verbs": ["create"],
                        }
                    )
            if not listed:
                return None
            return {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": f"{group}/{version}".lstrip("/"),
                "resources": listed,
            }
        return None


def _openapi(parts: list[str], known: list[Resource]) -> Json | None:
    # As much as kubectl needs to know that the server validates fields.
    def place(resource: Resource) -> str:
        return f"apis/{resource.api_version}" if resource.group else "api/v1"

    if not parts:
        return {"paths": {place(found): {"serverRelativeURL": f"/openapi/v3/{place(found)}"} for found in known}}
    names = ("fieldValidation", "fieldManager", "dryRun", "force")
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in names]
    paths = {}
    for found in known:
        if place(found) == "/".join(parts):
            gvk = {"group": found.group, "version": found.version, "kind": found.kind}
            patch = {"parameters": parameters, "x-kubernetes-group-version-kind": gvk, "x-kubernetes-action": "patch"}
            paths[f"/{place(found)}/{found.plural}/{{name}}"] = {"patch": patch}
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"openapi": "3.0.0", "info": info, "paths": paths} if paths else None


def _group(name: str, versions: list[str]) -> Json:
    listed = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def _lines(resource: Resource) -> Iterator[Json]:
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    line = {
        "name": resource.plural,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": verbs,
    }
    more: Json = {"shortNames": _SHORT[resource.plural]} if resource.plural in _SHORT else {}
    yield {**line, **more, **({"categories": ["all"]} if resource.plural in _ALL else {})}
    if resource.has_status:
        yield {**line, "name": f"{resource.plural}/status", "singularName": "", "verbs": ["get", "patch", "update"]}
    if (resource.group, resource.plural) in _SCALED:
        more = {"group": "autoscaling", "version": "v1", "kind": "Scale", "verbs": ["get", "patch", "update"]}
        yield {"name": f"{resource.plural}/scale", "singularName": "", "namespaced": True, **more}
    if resource.kind == "Pod":
        for name, allowed in (("log", ["get"]), ("proxy", ["get", "create"]), ("binding", ["create"])):
            yield {"name": f"pods/{name}", "singularName": "", "namespaced": True, "kind": "Pod", "verbs": allowed}
        yield {
            "name": "pods/eviction",
            "singularName": "",
            "namespaced": True,
            "group": "policy",
            "version": "v1",
            "kind": "Eviction",
            "verbs": ["create"],
        }


def _share(amount: int | str, of: int) -> int:
    if isinstance(amount, str) and amount.endswith("%"):
        return -(-int(amount[:-1]) * of // 100)
    return int(amount)


def _ready(pod: Json) -> bool:
    conditions = get(pod, "status", "conditions", otherwise=[])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _event(kind: str, obj: Json) -> bytes:
    return orjson.dumps({"type": kind, "object": obj}) + b"\n"


def _bookmark(resource: Resource, version: int, annotations: Json) -> bytes:
    meta: Json = {"resourceVersion": str(version), "creationTimestamp": None}
    if annotations:
        meta["annotations"] = annotations
    return _event("BOOKMARK", {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": meta})


# ------------------------------------------------------------------------------------------------------------------- HTTP


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], api: ApiServer) -> None:
        self.api = api
        self.connections: set[socket.socket] = set()
        self.guard = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The stdlib's asks the resolver for the host's name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.guard:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.guard:
            self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        with self.guard:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Listener

    def log_message(self, *_: Any) -> None:
        pass

    def handle_expect_100(self) -> bool:
        return bool(super().handle_expect_100())

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _serve(self) -> None:
        api = self.server.api
        split = urlsplit(self.path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        query = dict(parse_qsl(split.query, keep_blank_values=True))
        request = Request(self.command, split.path, query, headers, self._body())
        told = _Told(request, api)
        hurt = api.faults.of(told.verb, self.command, self.path)
        code = 0
        try:
            if hurt is not None and hurt.hang:
                hurt.wait()
            if hurt is not None and hurt.close:
                self.close_connection = True
                return
            answer = hurt.answer(told) if hurt is not None and hurt.code else api.answer(request)
            code = answer.code
            if hurt is not None and hurt.lose:
                self.close_connection = True
                return
            self._send(answer)
        finally:
            api.seen.append(Seen(time.time(), told.verb, self.path, request.user.name, code))

    def _send(self, answer: Answer) -> None:
        api = self.server.api
        lines = [
            f"HTTP/1.1 {answer.code} {http.client.responses.get(answer.code, '')}",
            f"Date: {formatdate(api.clock(), usegmt=True)}",
        ]
        lines += [f"{key}: {value}" for key, value in answer.headers.items()]
        if answer.stream is not None:
            lines += ["Content-Type: application/json", "Transfer-Encoding: chunked"]
            self._write(lines, b"")
            self._stream(answer.stream)
            return
        body = answer.body if isinstance(answer.body, bytes) else orjson.dumps(answer.body) + b"\n"
        lines += [f"Content-Type: {answer.kind}", f"Content-Length: {len(body)}"]
        self._write(lines, b"" if self.command == "HEAD" else body)

    def _write(self, lines: list[str], body: bytes) -> None:
        self.wfile.write(
            "\r\n".join([*lines, "Cache-Control: no-cache, private", "", ""]).encode("latin-1", "replace") + body
        )
        self.wfile.flush()

    def _stream(self, parts: Iterator[bytes]) -> None:
        for part in parts:
            if part:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.flush()
            elif self._left():
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve


class _Told:
    """What a request is about, as faults and the record of requests see it."""

    def __init__(self, request: Request, api: ApiServer) -> None:
        self.request = request
        with contextlib.suppress(Problem):
            api.parse(request)
        self.resource, self.name = request.resource, request.name
        self.verb = request.verb if self.resource is not None else request.method.lower()

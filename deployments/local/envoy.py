"""Envoy's configuration, pure: endpoints and `Traffic` to the dicts that go into its files as JSON.

One listener per model on a port of its own. Per deployed version a cluster `<model>-<n>`, one for mirrored
copies `<model>-<n>-shadow`, and for every ordered pair of versions an aggregate `<model>-<a>-or-<b>`; so
moving traffic changes routes only, and clusters come and go only with versions. Why each option is there:
the numbers in brackets are the traps in docs/architecture.md.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from deployments.target import FULL, Histogram, Served, Traffic

Json = dict[str, Any]

NUMBER_HEADER = "x-titleshot-config"
VERSION_HEADER = "x-model-version"
SHADOW_HEADER = "x-shadow"
PROBE_PATH = "/titleshot/config"
SHADOW = "-shadow"
PINNED = "-pinned"

_TYPE = "type.googleapis.com/"
_HTTP = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_LOGGER = "envoy.extensions.access_loggers.stats.v3.Config"
_LIVE = "live"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def _decades() -> Iterable[int]:
    # Envoy counts in bins of two significant digits; edges elsewhere would be interpolated.
    steps = [*range(10, 20), *range(20, 40, 2), *range(40, 100, 5)]
    for power in range(7):
        yield from (step * 10**power for step in steps)


EDGES_US = tuple(edge for edge in _decades() if 500 <= edge <= 30_000_000)
"""Upper edges of the latency buckets in microseconds, 5-12 % apart, from 0.5 ms to 30 s."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One deployed version's own server on 127.0.0.1."""

    version: str
    port: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gateway grants a request."""

    body_bytes: int = 32 << 20
    header_kib: int = 32
    connections: int = 1024
    shadow_requests: int = 64
    try_seconds: float = 10.0
    """Until an attempt's first byte; then the next one begins."""


def valid_name(text: str) -> bool:
    """Whether `text` can name a model or a version: it becomes part of cluster, file and counter names."""
    return _NAME.fullmatch(text) is not None


def cluster_name(model: str, version: str, other: str | None = None) -> str:
    """The cluster of `version`, or the one that falls back from it to `other`."""
    return f"{model}-{version}" if other in {None, version} else f"{model}-{version}-or-{other}"


def involving(model: str, version: str, versions: Iterable[str]) -> list[str]:
    """All clusters that can send a request to `version`, its shadow included."""
    pairs = [pair for pair in permutations(sorted({version, *versions}), 2) if version in pair]
    own = cluster_name(model, version)
    return [own, own + SHADOW, *(cluster_name(model, *pair) for pair in pairs)]


# --- files -------------------------------------------------------------------------------------------------


def source(path: str) -> Json:
    """A file that Envoy watches; `path` is replaced by a rename from outside its directory."""
    directory = path.rpartition("/")[0]
    watched = {"path": path, "watched_directory": {"path": directory}}
    return {"path_config_source": watched, "resource_api_version": "V3"}


def discovery(number: int, resources: Sequence[Json]) -> str:
    """The content of such a file. The number is how we learn that Envoy has it."""
    return json.dumps({"version_info": str(number), "resources": list(resources)}, indent=1)


def bootstrap(admin_socket: str, lds: str, cds: str) -> Json:
    """What Envoy starts with. The admin interface can crash it: a socket, for its owner only [12]."""
    return {
        "node": {"id": "titleshot", "cluster": "titleshot"},
        "admin": {"address": {"pipe": {"path": admin_socket, "mode": 0o600}}},
        "dynamic_resources": {"lds_config": source(lds), "cds_config": source(cds)},
        "layered_runtime": {"layers": [{"name": "admin", "admin_layer": {}}]},
        "stats_flush_interval": "1s",  # histograms appear at a flush only; the default is 5 s [17]
        "stats_config": {"histogram_bucket_settings": [{"match": {"contains": "rq_us"}, "buckets": list(EDGES_US)}]},
        "overload_manager": {
            "refresh_interval": "0.25s",
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": _TYPE + "envoy.extensions.resource_monitors.downstream_connections.v3."
                        "DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 4000,
                    },
                }
            ],
        },
    }


def static(model: str, route: Json, clusters: Sequence[Json], limits: Limits) -> Json:
    """The same in one static file, for `envoy --mode validate`, which does not read the others."""
    manager = {**_connection_manager(model, limits), "route_config": _untyped(route)}
    return {
        "static_resources": {
            "clusters": [_untyped(cluster) for cluster in clusters],
            "listeners": [_untyped(_listener(model, 0, manager))],
        }
    }


def _untyped(resource: Json) -> Json:
    return {key: value for key, value in resource.items() if key != "@type"}


# --- clusters ----------------------------------------------------------------------------------------------


def clusters(model: str, backends: Sequence[Backend], limits: Limits) -> list[Json]:
    """All clusters of one model. Raises ValueError where two of them would have one name."""
    made = [_version_cluster(model, backend, limits) for backend in backends]
    made += [_shadow_cluster(model, backend, limits) for backend in backends]
    made += [_aggregate(model, a.version, b.version, limits) for a, b in permutations(backends, 2)]
    names = [cluster["name"] for cluster in made]
    if len({*names}) < len(names):
        raise ValueError(f"two clusters of {model} have one name: {sorted(names)}")
    return made


def _cluster(name: str, **fields: Any) -> Json:
    return {
        "@type": _TYPE + "envoy.config.cluster.v3.Cluster",
        "name": name,
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            _HTTP: {
                "@type": _TYPE + _HTTP,
                # Well below the server's 75 s, or we write into a connection that is closing [10].
                "common_http_protocol_options": {"idle_timeout": "30s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
        **fields,
    }


def _breakers(connections: int) -> Json:
    # The default of 3 retries at once would turn a dying version into client errors [2].
    threshold = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), connections)
    return {"thresholds": [{**threshold, "max_retries": max(connections, 1024)}]}


def _endpoints(name: str, backend: Backend, tag: str) -> Json:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": backend.port}}
    endpoint = {
        "endpoint": {"address": address},
        "metadata": {"filter_metadata": {"model": {"version": tag}}},
    }
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}


def _version_cluster(model: str, backend: Backend, limits: Limits) -> Json:
    name = cluster_name(model, backend.version)
    return _cluster(
        name,
        type="STATIC",
        load_assignment=_endpoints(name, backend, backend.version),
        circuit_breakers=_breakers(limits.connections),
        health_checks=[
            {
                # The outlier detection below sees a dead server at once. This one sees a hung server, and may
                # not mistake a busy one for it.
                "timeout": "2s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "initial_jitter": "0s",
                "unhealthy_threshold": 3,
                "healthy_threshold": 1,
                "http_health_check": {"path": "/ready"},
            }
        ],
        outlier_detection={
            # A server that is gone or hangs leaves at once. A model that fails stays in for a good while: the
            # retry hides its failures, and a judge needs to see them; so does one that sheds a burst.
            "consecutive_5xx": 50,
            "consecutive_gateway_failure": 50,
            "consecutive_local_origin_failure": 3,
            "split_external_local_origin_errors": True,
            "interval": "0.5s",
            "base_ejection_time": "5s",
            "max_ejection_time": "30s",
            "max_ejection_percent": 100,
            "enforcing_consecutive_5xx": 100,
            "enforcing_consecutive_gateway_failure": 100,
            "enforcing_consecutive_local_origin_failure": 100,
            # /ready may be fine while every prediction fails [4].
            "successful_active_health_check_uneject_host": False,
        },
        # No `healthy_panic_threshold: 0` [5]: where a version has no fallback its one server is better tried
        # than not; where it has one, the aggregate leaves an unhealthy member aside all the same.
    )


def _shadow_cluster(model: str, backend: Backend, limits: Limits) -> Json:
    name = cluster_name(model, backend.version) + SHADOW
    # Copies may never crowd out live requests: few at a time, the rest is dropped.
    return _cluster(
        name,
        type="STATIC",
        load_assignment=_endpoints(name, backend, backend.version + SHADOW),
        circuit_breakers=_breakers(limits.shadow_requests),
    )


def _aggregate(model: str, first: str, second: str, limits: Limits) -> Json:
    kind = "envoy.extensions.clusters.aggregate.v3.ClusterConfig"
    members = [cluster_name(model, first), cluster_name(model, second)]
    return _cluster(
        cluster_name(model, first, second),
        lb_policy="CLUSTER_PROVIDED",
        circuit_breakers=_breakers(limits.connections),  # retries are counted here, not on the members [2]
        cluster_type={
            "name": "envoy.clusters.aggregate",
            "typed_config": {"@type": _TYPE + kind, "clusters": members},
        },
    )


# --- routes ------------------------------------------------------------------------------------------------


def split(traffic: Traffic) -> list[tuple[str, int]]:
    """Who gets which share, in hundredths of a percent. The champion comes first and the challenger last,
    always: another order would move sticky users [20].
    """
    model, champion, spare = traffic.model, traffic.champion, traffic.fallback
    shares = [(cluster_name(model, champion, spare), FULL - traffic.weight)]
    if traffic.challenger is not None and traffic.weight:
        # Its failures are the champion's to answer where nobody else was named.
        other = spare if spare not in {None, traffic.challenger} else champion
        shares.append((cluster_name(model, traffic.challenger, other), traffic.weight))
    return shares


def routes(model: str, number: int, versions: Sequence[str], traffic: Traffic | None, limits: Limits) -> Json:
    """The route configuration number `number`: the versions' own paths, then the split."""
    version = {"header": {"key": VERSION_HEADER, "value": "%UPSTREAM_METADATA(model:version)%"}}
    own = [
        {
            "name": "pinned",
            "match": {"prefix": f"/v/{name}/"},
            "route": {
                "cluster": cluster_name(model, name),
                "prefix_rewrite": "/",
                "timeout": "0s",
                # No second try for an answer, good or bad; one for a connection that was closing [10].
                "retry_policy": {"retry_on": "connect-failure,refused-stream,reset-before-request"},
            },
            "response_headers_to_add": [version],
        }
        for name in versions
    ]
    if traffic is None:
        rest = _direct({"prefix": "/"}, 503, {"error": f"no version of {model} is routed yet"})
    else:
        rest = {
            "name": _LIVE,
            "match": {"prefix": "/"},
            "route": _live(traffic, limits),
            "metadata": {"filter_metadata": {"titleshot": _as_json(traffic)}},
            "response_headers_to_add": [version],
        }
    host = {
        "name": model,
        "domains": ["*"],
        "include_attempt_count_in_response": True,
        # Bodies beyond the buffer are neither retried nor mirrored; the default is the connection's 1 MiB.
        "request_body_buffer_limit": str(limits.body_bytes),
        "request_headers_to_remove": [SHADOW_HEADER],  # only the mirror may say so
        "routes": [
            _direct({"path": PROBE_PATH}, 200, {"config": number}),
            _direct({"path_separated_prefix": "/titleshot"}, 404, {"error": "not served here"}),
            _direct({"safe_regex": {"regex": "/v/[^/]*/titleshot(/.*)?"}}, 404, {"error": "not served here"}),
            *own,
            _direct({"path_separated_prefix": "/v"}, 404, {"error": f"no such version of {model}"}),
            rest,
        ],
    }
    return {
        "@type": _TYPE + "envoy.config.route.v3.RouteConfiguration",
        "name": model,
        "validate_clusters": True,  # the default lets unknown clusters in, and answers 503 [7]
        "response_headers_to_add": [{"header": {"key": NUMBER_HEADER, "value": str(number)}}],
        "virtual_hosts": [host],
    }


def _direct(match: Json, status: int, body: Json) -> Json:
    return {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(body)}},
        "response_headers_to_add": [
            {
                "header": {"key": "content-type", "value": "application/json"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        ],
    }


def _live(traffic: Traffic, limits: Limits) -> Json:
    action: Json = {
        "weighted_clusters": {"clusters": [{"name": name, "weight": weight} for name, weight in split(traffic)]},
        "timeout": "0s",  # the default of 15 s counts to the end of the answer: it cuts streams [15]
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset,reset-before-request,5xx",
            "num_retries": 2,
            "per_try_timeout": f"{limits.try_seconds}s",
            "retry_back_off": {"base_interval": "0.002s", "max_interval": "0.02s"},
            # Without it the second try goes to the same dead member [3].
            "retry_priority": {
                "name": "envoy.retry_priorities.previous_priorities",
                "typed_config": {
                    "@type": _TYPE + "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                    "update_frequency": 1,
                },
            },
        },
    }
    if traffic.challenger is not None and traffic.mirror:
        mark = {
            "append": {
                "header": {"key": SHADOW_HEADER, "value": "1"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        }
        action["request_mirror_policies"] = [
            {
                "cluster": cluster_name(traffic.model, traffic.challenger) + SHADOW,
                "runtime_fraction": {"default_value": {"numerator": traffic.mirror, "denominator": "TEN_THOUSAND"}},
                "request_headers_mutations": [mark],
            }
        ]
    return action


def _as_json(traffic: Traffic) -> Json:
    fields = {name: getattr(traffic, name) for name in traffic.__slots__}
    return {name: value for name, value in fields.items() if value is not None}


def traffic_of(route: Json) -> Traffic | None:
    """Read back what a route configuration does, as Envoy itself dumps it.

    The names come from the route's metadata; weights and mirror are those that Envoy obeys. Raises
    ValueError where the two disagree: then somebody else wrote this configuration.
    """
    (host,) = route["virtual_hosts"]
    live = next((entry for entry in host["routes"] if entry.get("name") == _LIVE), None)
    if live is None:
        return None
    told = live["metadata"]["filter_metadata"]["titleshot"]
    traffic = Traffic(**{**told, "weight": int(told["weight"]), "mirror": int(told["mirror"])})
    found, meant = (_gist(action) for action in (live["route"], _live(traffic, Limits())))
    if found != meant:
        raise ValueError(f"its routes say {found}, its metadata {meant}")
    return traffic


def _gist(action: Json) -> object:
    shares = [(c["name"], c.get("weight", 0)) for c in action["weighted_clusters"]["clusters"]]
    mirrors = [
        (m["cluster"], m["runtime_fraction"]["default_value"].get("numerator", 0))
        for m in action.get("request_mirror_policies", [])
    ]
    return shares, mirrors


# --- listeners ---------------------------------------------------------------------------------------------


def listener(model: str, port: int, rds: str, limits: Limits) -> Json:
    """The gateway of one model: 127.0.0.1:`port`, its routes from the file `rds`."""
    routing = {"rds": {"route_config_name": model, "config_source": source(rds)}}
    return _listener(model, port, {**_connection_manager(model, limits), **routing})


def _listener(model: str, port: int, manager: Json) -> Json:
    kind = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    chain = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {"@type": _TYPE + kind, **manager},
    }
    return {
        "@type": _TYPE + "envoy.config.listener.v3.Listener",
        "name": model,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "enable_reuse_port": False,  # a forgotten second gateway would silently take half the traffic [11]
        "per_connection_buffer_limit_bytes": 1 << 20,
        "filter_chains": [{"filters": [chain]}],
    }


def _connection_manager(model: str, limits: Limits) -> Json:
    body_limit = {
        "@type": _TYPE + "envoy.extensions.filters.http.body_size_limit.v3.BodySizeLimit",
        "max_request_bytes": limits.body_bytes,
    }
    router = {
        "@type": _TYPE + "envoy.extensions.filters.http.router.v3.Router",
        "upstream_log": _attempt_log(model),
    }
    return {
        "stat_prefix": model,
        "codec_type": "AUTO",
        "http_filters": [
            {"name": "limit", "typed_config": body_limit},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
        "use_remote_address": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "request_headers_timeout": "10s",
        "stream_idle_timeout": "300s",
        "max_request_headers_kb": limits.header_kib,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "common_http_protocol_options": {"idle_timeout": "300s", "max_headers_count": 100},
        # Nobody is internal: a client's x-envoy headers are not to be obeyed.
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "10.255.255.255", "prefix_len": 32}]},
        "server_header_transformation": "PASS_THROUGH",
    }


def _attempt_log(model: str) -> list[Json]:
    # Clusters book attempts on the aggregate and hide the retried ones [6]. This logger sees each attempt,
    # the mirrored ones as well, tagged by the endpoint that got it.
    tags = [
        {"name": "tmodel", "value_format": model.replace("%", "%%")},
        {"name": "tversion", "value_format": "%UPSTREAM_METADATA(model:version)%"},
        {"name": "troute", "value_format": "%ROUTE_NAME%"},
    ]
    code = {"name": "tcode", "value_format": "%RESPONSE_CODE%"}
    counter = {"stat": {"name": "rq", "tags": [*tags, code]}, "value_fixed": 1}
    histogram = {
        "stat": {"name": "rq_us", "tags": tags},
        "unit": "Microseconds",
        "value_format": "%COMMON_DURATION(US_TX_BEG:US_RX_BEG:us)%",
    }
    answered = {
        "status_code_filter": {
            "comparison": {"op": "GE", "value": {"default_value": 100, "runtime_key": "titleshot.none"}}
        }
    }
    return [
        {"name": "counts", "typed_config": _logger(counters=[counter])},
        {"name": "times", "filter": answered, "typed_config": _logger(histograms=[histogram])},
    ]


def _logger(**stats: list[Json]) -> Json:
    return {"@type": _TYPE + _LOGGER, "stat_prefix": "attempt", **stats}


# --- counters ----------------------------------------------------------------------------------------------


Sample = tuple[str, Mapping[str, str], float]
"""A counter of the Prometheus text: name, labels, value."""


def served(model: str, samples: Iterable[Sample]) -> dict[str, Served]:
    """The attempts of `model` by version: "3", mirrored ones "3-shadow", those on the version's own path
    "3-pinned"; "" are attempts that reached no version (shed by the gateway).
    """
    codes: dict[str, dict[str, int]] = {}
    upto: dict[str, dict[float, int]] = {}
    for name, labels, value in samples:
        if labels.get("tmodel") != model:
            continue
        key = labels.get("tversion", "").strip("-")
        if key and labels.get("troute") == "pinned" and not key.endswith(SHADOW):
            key += PINNED
        if name in {"envoy_attempt_rq", "envoy_attempt_rq_total"}:
            counts = codes.setdefault(key, {})
            code = labels["tcode"].strip("-") or "0"
            counts[code] = counts.get(code, 0) + int(value)
        elif name == "envoy_attempt_rq_us_bucket":
            sums = upto.setdefault(key, {})
            edge = float(labels["le"])
            sums[edge] = sums.get(edge, 0) + int(value)
    return {key: Served(codes.get(key, {}), _histogram(upto.get(key, {}))) for key in sorted({*codes, *upto})}


def _histogram(upto: Mapping[float, int]) -> Histogram:
    if not upto:
        return Histogram()
    edges = sorted(upto)
    sums = [upto[edge] for edge in edges]
    counts = (after - before for before, after in zip([0, *sums], sums, strict=False))
    return Histogram(tuple(edge / 1e6 for edge in edges if edge != float("inf")), tuple(counts))

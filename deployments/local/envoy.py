"""Envoy's configuration, pure: endpoints and `Traffic` to the dicts that go into its files as JSON.

One listener per model on a port of its own, which all gateways share. Per deployed version a cluster
`<model>-<n>`, one for mirrored copies `<model>-<n>-shadow`, and for every ordered pair of versions an aggregate
`<model>-<a>-or-<b>`, so that going back changes routes only. Longer chains (`<model>-<a>-or-<b>-or-<c>`) are made
where traffic needs them. Why each option is there: the numbers in brackets are the traps in docs/architecture.md.

Each answer says who gave it (`x-model-version`) and whom split or pin had chosen (`x-model-chosen`): where they
differ a fallback answered. To the servers the gateway says, and no client can: that a request is a copy
(`x-shadow`), that it came over the version's own path (`x-titleshot-own-path: 1`), that it goes first
(`x-titleshot-priority: high`), and how many requests per second each version takes (`x-titleshot-limits: 3=20;2=100`).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from pydantic import TypeAdapter

from deployments.target import FULL, Histogram, Match, Served, Shape, Traffic

Json = dict[str, Any]

NUMBER_HEADER = "x-titleshot-config"
VERSION_HEADER = "x-model-version"
CHOSEN_HEADER = "x-model-chosen"
SHADOW_HEADER = "x-shadow"
OWN_PATH_HEADER = "x-titleshot-own-path"
PRIORITY_HEADER = "x-titleshot-priority"
LIMITS_HEADER = "x-titleshot-limits"
GATEWAY_HEADER = "x-titleshot-gateway"
GATEWAY_VARIABLE = "TITLESHOT_GATEWAY"
"""The environment variable by which an Envoy knows its own name, for that header."""
PROBE_PATH = "/titleshot/config"
SHADOW = "-shadow"
PINNED = "-pinned"
BY_HEADER = "-header"

_TYPE = "type.googleapis.com/"
_HTTP = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_LOGGER = "envoy.extensions.access_loggers.stats.v3.Config"
_LIVE, _HEADER, _OWN = "live", "header", "pinned"
_OURS = (SHADOW_HEADER, OWN_PATH_HEADER, PRIORITY_HEADER, LIMITS_HEADER)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_TRAFFIC = TypeAdapter(Traffic)
Chain = tuple[str, ...]
"""The versions that answer for one another, in order."""


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
    """What each gateway grants. Requests beyond it are answered 413 (body), 431 (headers), 408 (slow headers or
    a slow body) or 503; connections beyond it are closed.
    """

    body_bytes: int = 32 << 20
    header_kib: int = 32
    headers: int = 100
    header_seconds: float = 10.0
    """From the first byte of the headers to their last."""
    request_seconds: float = 60.0
    """Until all of a request has come; an answer may take as long as it likes."""
    idle_seconds: float = 300.0
    """Until a connection, or a stream in an answer, on which nothing moves is closed."""
    client_connections: int = 2000
    """From the clients of one model."""
    all_connections: int = 4000
    """From clients of all models together."""
    connections: int = 1024
    """Connections and requests to one version."""
    pending: int = 1024
    """Requests that wait for one of these connections."""
    shadow_requests: int = 64
    retries: int = 256
    """Second tries at once: about what one server takes; more would only be shed there. More than these while
    they are less than `retry_percent` of the requests at a version.
    """
    retry_percent: float = 20.0
    try_seconds: float = 10.0
    """Until an attempt's first byte; then the next one begins."""


def valid_name(text: str) -> bool:
    """Whether `text` can name a model or a version: it becomes part of cluster, file and counter names."""
    return _NAME.fullmatch(text) is not None


def faults(shape: Shape) -> list[str]:
    """What in `shape` a gateway cannot obey, in words; nothing where it can."""
    matches = [*(pin.match for pin in shape.pins), *((shape.priority,) if shape.priority else ())]
    named = [*(match.header for match in matches), *((shape.sticky,) if shape.sticky is not None else ())]
    found = [
        f"{name!r} is no header that clients can send: letters, digits and '-', and none of the gateway's own"
        for name in named
        if not _TOKEN.fullmatch(name) or name.lower() in _OURS
    ]
    found += [
        f"{match.header}: {match.value!r} is no value of a header: some printable characters, no space at either end"
        for match in matches
        if not match.value or not match.value.isprintable() or match.value != match.value.strip()
    ]
    return found


def cluster_name(model: str, *chain: str) -> str:
    """The cluster of the first version in `chain`, which falls back to the others in turn."""
    return f"{model}-" + "-or-".join(chain)


def chains(traffic: Traffic) -> frozenset[Chain]:
    """The chains that requests under `traffic` are sent along."""
    first = {traffic.champion, *(pin.version for pin in traffic.shape.pins)}
    if traffic.challenger is not None and traffic.weight:
        first.add(traffic.challenger)
    return frozenset(traffic.chain(version) for version in first)


def chains_in(model: str, resources: Iterable[Mapping[str, Any]]) -> frozenset[Chain]:
    """The chains of `model` for which there are clusters among `resources`."""
    found = set()
    for resource in resources:
        members = resource.get("cluster_type", {}).get("typed_config", {}).get("clusters", [])
        chain = tuple(member.removeprefix(f"{model}-") for member in members)
        if chain and resource["name"] == cluster_name(model, *chain):
            found.add(chain)
    return frozenset(found)


def involving(model: str, version: str, versions: Iterable[str], more: Iterable[Chain] = ()) -> list[str]:
    """All clusters that can send a request to `version`, its shadow and the chains among `more` included."""
    pairs = permutations(sorted({version, *versions}), 2)
    own = cluster_name(model, version)
    names = (cluster_name(model, *chain) for chain in (*pairs, *more) if version in chain)
    return [*dict.fromkeys((own, own + SHADOW, *names))]


# --- files -------------------------------------------------------------------------------------------------


def source(path: str) -> Json:
    """A file that Envoy watches; `path` is replaced by a rename from outside its directory."""
    directory = path.rpartition("/")[0]
    watched = {"path": path, "watched_directory": {"path": directory}}
    return {"path_config_source": watched, "resource_api_version": "V3"}


def discovery(number: int, resources: Sequence[Json]) -> str:
    """The content of such a file. The number is how we learn that Envoy has it."""
    return json.dumps({"version_info": str(number), "resources": list(resources)}, indent=1)


def bootstrap(admin_socket: str, lds: str, cds: str, limits: Limits) -> Json:
    """What Envoy starts with. The admin interface can crash it: a socket, for its owner only [12]."""
    return {
        "node": {"id": "titleshot", "cluster": "titleshot"},
        # We can speak to a gateway that is full as well.
        "admin": {"address": {"pipe": {"path": admin_socket, "mode": 0o600}}, "ignore_global_conn_limit": True},
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
                        "max_active_downstream_connections": limits.all_connections,
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
            "listeners": [_untyped(_listener(model, 0, manager, limits))],
        }
    }


def skeleton(model: str, route: Json, made: Sequence[Json], limits: Limits) -> str:
    """A digest of all that Envoy could refuse in this configuration. What may differ under one digest: weights,
    which of the clusters that are there, names of versions, our own metadata.
    """
    names = {cluster["name"] for cluster in made}

    def bare(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            if key == "filter_metadata":
                return None
            if value.get("key") == CHOSEN_HEADER and valid_name(value.get("value", "")):
                return CHOSEN_HEADER
            return {name: bare(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [bare(inner, key) for inner in value]
        if key in {"weight", "numerator"} and 0 < value <= FULL:
            return 1
        return None if key in {"name", "cluster"} and value in names else value

    return hashlib.sha256(json.dumps(static(model, bare(route), made, limits)).encode()).hexdigest()


def _untyped(resource: Json) -> Json:
    return {key: value for key, value in resource.items() if key != "@type"}


# --- clusters ----------------------------------------------------------------------------------------------


def clusters(model: str, backends: Sequence[Backend], limits: Limits, more: Iterable[Chain] = ()) -> list[Json]:
    """All clusters of one model, those for the chains of `more` included, as far as their versions are there.
    Raises ValueError where two of them would have one name.
    """
    made = [_version_cluster(model, backend, limits) for backend in backends]
    made += [_shadow_cluster(model, backend, limits) for backend in backends]
    there = [backend.version for backend in backends]
    longer = {chain for chain in more if len(chain) > 2 and {*chain} <= {*there}}
    made += [_aggregate(model, chain, limits) for chain in (*permutations(there, 2), *sorted(longer))]
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


def _breakers(limits: Limits, requests: int | None = None) -> Json:
    """What may be under way at once; both priorities have the same, each for itself."""
    threshold = {
        "max_connections": requests or limits.connections,
        "max_pending_requests": requests or limits.pending,
        "max_requests": requests or limits.connections,
        # The default of 3 retries at once would turn a dying version into client errors. An aggregate has no
        # requests of its own to take a share of: there the fixed number is what counts [2].
        "retry_budget": {
            "budget_percent": {"value": limits.retry_percent},
            "min_retry_concurrency": limits.retries,
        },
    }
    return {"thresholds": [{"priority": priority, **threshold} for priority in ("DEFAULT", "HIGH")]}


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
        circuit_breakers=_breakers(limits),
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
        circuit_breakers=_breakers(limits, limits.shadow_requests),
    )


def _aggregate(model: str, chain: Chain, limits: Limits) -> Json:
    kind = "envoy.extensions.clusters.aggregate.v3.ClusterConfig"
    return _cluster(
        cluster_name(model, *chain),
        lb_policy="CLUSTER_PROVIDED",
        circuit_breakers=_breakers(limits),  # retries are counted here, not on the members [2]
        cluster_type={
            "name": "envoy.clusters.aggregate",
            "typed_config": {
                "@type": _TYPE + kind,
                "clusters": [cluster_name(model, version) for version in chain],
            },
        },
    )


# --- routes ------------------------------------------------------------------------------------------------


Shares = list[tuple[Chain, int]]
"""Chains and the share of the requests that each gets, in hundredths of a percent."""


def split(traffic: Traffic) -> Shares:
    """Who gets which share. The champion comes first and the challenger last, always: another order would move
    sticky users [20].
    """
    shares = [(traffic.chain(traffic.champion), FULL - traffic.weight)]
    if traffic.challenger is not None and traffic.weight:
        shares.append((traffic.chain(traffic.challenger), traffic.weight))
    return shares


def routes(model: str, number: int, versions: Sequence[str], traffic: Traffic | None, limits: Limits) -> Json:
    """The route configuration number `number`: the versions' own paths, then pins, then the split."""
    if traffic is None:
        rest = [_direct({"prefix": "/"}, 503, {"error": f"no version of {model} is routed yet"})]
    else:
        rest = _live(traffic, limits)
        rest[-1]["metadata"] = {"filter_metadata": {"titleshot": _TRAFFIC.dump_python(traffic, mode="json")}}
    host = {
        "name": model,
        "domains": ["*"],
        "include_attempt_count_in_response": True,
        # Bodies beyond the buffer are neither retried nor mirrored; the default is the connection's 1 MiB.
        "request_body_buffer_limit": str(limits.body_bytes),
        "request_headers_to_remove": [*_OURS],  # only the gateway may say so
        "routes": [
            _direct(
                {"path": PROBE_PATH},
                200,
                {"config": number},
                _set(GATEWAY_HEADER, f"%ENVIRONMENT({GATEWAY_VARIABLE})%"),
            ),
            _direct({"path_separated_prefix": "/titleshot"}, 404, {"error": "not served here"}),
            _direct({"safe_regex": {"regex": "/v/[^/]*/titleshot(/.*)?"}}, 404, {"error": "not served here"}),
            *(_own_path(model, version) for version in versions),
            _direct({"path_separated_prefix": "/v"}, 404, {"error": f"no such version of {model}"}),
            *rest,
        ],
    }
    return {
        "@type": _TYPE + "envoy.config.route.v3.RouteConfiguration",
        "name": model,
        "validate_clusters": True,  # the default lets unknown clusters in, and answers 503 [7]
        # First what clients may not say is taken away, then the routes say it.
        "most_specific_header_mutations_wins": True,
        "response_headers_to_add": [{"header": {"key": NUMBER_HEADER, "value": str(number)}}],
        "virtual_hosts": [host],
    }


def _direct(match: Json, status: int, body: Json, *more: Json) -> Json:
    return {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(body)}},
        "response_headers_to_add": [_set("content-type", "application/json"), *more],
    }


def _set(header: str, value: str) -> Json:
    return {"header": {"key": header, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


_ANSWERED_BY = _set(VERSION_HEADER, "%UPSTREAM_METADATA(model:version)%")
_SAYS_WHO = _set(GATEWAY_HEADER, f"%ENVIRONMENT({GATEWAY_VARIABLE})%")


def _own_path(model: str, version: str) -> Json:
    return {
        "name": _OWN,
        "match": {"prefix": f"/v/{version}/"},
        "route": {
            "cluster": cluster_name(model, version),
            "prefix_rewrite": "/",
            "timeout": "0s",
            # No second try for an answer, good or bad; one for a connection that was closing [10].
            "retry_policy": {"retry_on": "connect-failure,refused-stream,reset-before-request"},
        },
        "request_headers_to_add": [_set(OWN_PATH_HEADER, "1")],
        "response_headers_to_add": [_ANSWERED_BY, _set(CHOSEN_HEADER, version)],
    }


def _live(traffic: Traffic, limits: Limits) -> list[Json]:
    """Pins in their order, then the split; each of them first for those that go before others."""
    shape, made = traffic.shape, []
    ways = [(_HEADER, [pin.match], [(traffic.chain(pin.version), FULL)]) for pin in shape.pins]
    for name, matches, shares in [*ways, (_LIVE, list[Match](), split(traffic))]:
        for first in (True, False) if shape.priority else (False,):
            action = _action(traffic.model, shares, limits)
            if name == _LIVE:
                action |= _mirror(traffic) | _stick(traffic)
                if shape.sticky is not None:
                    action["weighted_clusters"]["use_hash_policy"] = True
            headers = [] if not shape.limits else [_set(LIMITS_HEADER, _limits_text(shape))]
            wanted = [*matches]
            if first and shape.priority:
                wanted.append(shape.priority)
                action["priority"] = "HIGH"
                headers.append(_set(PRIORITY_HEADER, "high"))
            match: Json = {"prefix": "/"}
            if wanted:
                match["headers"] = [
                    {"name": one.header.lower(), "string_match": {"exact": one.value}} for one in wanted
                ]
            route = {"name": name, "match": match, "route": action, "response_headers_to_add": [_ANSWERED_BY]}
            made.append(route | ({"request_headers_to_add": headers} if headers else {}))
    return made


def _limits_text(shape: Shape) -> str:
    return ";".join(f"{limit.version}={limit.per_second:.15g}" for limit in shape.limits)


def _action(model: str, shares: Shares, limits: Limits) -> Json:
    longest = max(len(chain) for chain, _ in shares)
    # 429 says that a server's own limit is reached: only another one can help.
    on = ["connect-failure", "refused-stream", "reset", "reset-before-request", "5xx"]
    return {
        "weighted_clusters": {
            "clusters": [
                {
                    "name": cluster_name(model, *chain),
                    "weight": weight,
                    "response_headers_to_add": [_set(CHOSEN_HEADER, chain[0])],
                }
                for chain, weight in shares
            ]
        },
        "timeout": "0s",  # the default of 15 s counts to the end of the answer: it cuts streams [15]
        "retry_policy": {
            "retry_on": ",".join([*on, *(["retriable-status-codes"] if longest > 1 else [])]),
            **({"retriable_status_codes": [429]} if longest > 1 else {}),
            # Only what may be asked twice: scores and what changes nothing.
            "retriable_request_headers": [
                {"name": ":path", "string_match": {"safe_regex": {"regex": r"/invocations(\?.*)?"}}},
                {"name": ":method", "string_match": {"exact": "GET"}},
            ],
            "num_retries": max(2, longest - 1),
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


def _stick(traffic: Traffic) -> Json:
    # Without the header there is nothing to hash, and the choice is random as it is without `sticky`.
    name = traffic.shape.sticky
    return {} if name is None else {"hash_policy": [{"header": {"header_name": name.lower()}}]}


def _mirror(traffic: Traffic) -> Json:
    if traffic.challenger is None or not traffic.mirror:
        return {}
    # A copy is no live request: neither limits nor priority are for it.
    changes = [{"append": _set(SHADOW_HEADER, "1")}, {"remove": LIMITS_HEADER}, {"remove": PRIORITY_HEADER}]
    return {
        "request_mirror_policies": [
            {
                "cluster": cluster_name(traffic.model, traffic.challenger) + SHADOW,
                "runtime_fraction": {"default_value": {"numerator": traffic.mirror, "denominator": "TEN_THOUSAND"}},
                "request_headers_mutations": changes,
            }
        ]
    }


def traffic_of(route: Json) -> Traffic | None:
    """Read back what a route configuration does, as Envoy itself dumps it.

    The names come from the route's metadata; all else must be what they ask for. Raises ValueError where the two
    disagree: then somebody else wrote this configuration.
    """
    (host,) = route["virtual_hosts"]
    entries = host["routes"]
    if entries[-1].get("name") != _LIVE:
        return None
    # Envoy knows numbers as fractions only; pydantic makes them whole again.
    traffic = _TRAFFIC.validate_json(json.dumps(entries[-1]["metadata"]["filter_metadata"]["titleshot"]))
    versions = [entry["match"]["prefix"].split("/")[2] for entry in entries if entry.get("name") == _OWN]
    (made,) = routes(traffic.model, 0, versions, traffic, Limits())["virtual_hosts"]
    found, meant = [_gist(entry) for entry in entries], [_gist(entry) for entry in made["routes"]]
    if found != meant or sorted(host.get("request_headers_to_remove", [])) != sorted(_OURS):
        differ = [pair for pair in zip(found, meant, strict=False) if pair[0] != pair[1]]
        says, means = differ[0] if differ else (f"{len(found)} routes", f"{len(meant)} routes")
        raise ValueError(f"its routes say {says}, its metadata {means}")
    return traffic


def _gist(entry: Json) -> object:
    """What one route does, without what Envoy leaves out or writes differently when it dumps it."""
    match, action = entry["match"], entry.get("route", {})
    where = {key: value for key, value in match.items() if isinstance(value, str)}
    headers = [(one["name"], one.get("string_match")) for one in match.get("headers", [])]
    weighted = action.get("weighted_clusters", {})
    shares = [(c["name"], c.get("weight", 0), _added(c, "response")) for c in weighted.get("clusters", [])]
    mirrors = [
        (m["cluster"], m["runtime_fraction"]["default_value"].get("numerator", 0))
        for m in action.get("request_mirror_policies", [])
    ]
    sticky = [one.get("header", {}).get("header_name") for one in action.get("hash_policy", [])]
    retry = action.get("retry_policy", {})
    return {
        "match": (where, headers),
        "to": (action.get("cluster"), shares, entry.get("direct_response", {}).get("status")),
        "mirrors": mirrors,
        "sticky": (sticky, bool(weighted.get("use_hash_policy"))),
        "priority": action.get("priority", "DEFAULT"),
        "headers": (_added(entry, "request"), _added(entry, "response")),
        "retries": (retry.get("retry_on"), retry.get("num_retries"), retry.get("retriable_status_codes")),
    }


def _added(entry: Json, kind: str) -> list[tuple[str, str]]:
    return [(one["header"]["key"], one["header"]["value"]) for one in entry.get(f"{kind}_headers_to_add", [])]


# --- listeners ---------------------------------------------------------------------------------------------


def listener(model: str, port: int, rds: str, limits: Limits) -> Json:
    """The gateway of one model: 127.0.0.1:`port`, its routes from the file `rds`."""
    routing = {"rds": {"route_config_name": model, "config_source": source(rds)}}
    return _listener(model, port, {**_connection_manager(model, limits), **routing}, limits)


def _listener(model: str, port: int, manager: Json, limits: Limits) -> Json:
    kind = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    limit = {
        "name": "connections",
        "typed_config": {
            "@type": _TYPE + "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit",
            "stat_prefix": model,
            "max_connections": str(limits.client_connections),
        },
    }
    http = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {"@type": _TYPE + kind, **manager},
    }
    return {
        "@type": _TYPE + "envoy.config.listener.v3.Listener",
        "name": model,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        # Several gateways of ours share the port. A forgotten one of somebody else's would silently take its part
        # of the traffic: a start refuses a port that is taken, and a route asks often enough to notice [11].
        "enable_reuse_port": True,
        "per_connection_buffer_limit_bytes": 1 << 20,
        "filter_chains": [{"filters": [limit, http]}],
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
        "request_headers_timeout": f"{limits.header_seconds}s",
        "request_timeout": f"{limits.request_seconds}s",
        "stream_idle_timeout": f"{limits.idle_seconds}s",
        "max_request_headers_kb": limits.header_kib,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "common_http_protocol_options": {
            "idle_timeout": f"{limits.idle_seconds}s",
            "max_headers_count": limits.headers,
        },
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
    return {"@type": _TYPE + _LOGGER, "stats_scope": {"prefix": "attempt"}, **stats}


# --- counters ----------------------------------------------------------------------------------------------


Sample = tuple[str, Mapping[str, str], float]
"""A counter of the Prometheus text: name, labels, value."""


def served(model: str, samples: Iterable[Sample]) -> dict[str, Served]:
    """The attempts of `model` by version: "3", mirrored ones "3-shadow", those on the version's own path
    "3-pinned", those of a pin by header "3-header" (nobody drew lots for them, so they are no part of a comparison);
    "" are attempts that reached no version (shed by the gateway).
    """
    codes: dict[str, dict[str, int]] = {}
    upto: dict[str, dict[float, int]] = {}
    for name, labels, value in samples:
        if labels.get("tmodel") != model:
            continue
        key = labels.get("tversion", "").strip("-")
        if key and not key.endswith(SHADOW):
            key += {_OWN: PINNED, _HEADER: BY_HEADER}.get(labels.get("troute", ""), "")
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

"""One model's HTTPRoute, pure: `Traffic` to a Gateway API object, and back from what the API server returns.

The kind of a request is the port that it is sent to (names.PORTS), so the server knows it behind any gateway. Rules, in
their order:

    /v/<n>/...      the version's own path, rewritten to /...   port own
    pins            exact header matches                        port pinned
    everything else the split by weights, and the mirror        port live, port shadow

Gateway API sorts matches by itself: the longest path first, then the one with the most headers, then the first one
written. So a pin's rule for those who go first (`priority`) has one header more than the pin's own, and wins.

Each rule takes away what only a gateway may say (`x-shadow`, `x-titleshot-*`), and says anew what the server must know:
`x-titleshot-priority`, `x-titleshot-limits` (see deployments/local/server.py). A server grants its limit by itself, so
here it holds per pod. Gateway API sends no request to a second backend: where a version fails one, or has too much, its
own server passes it on along `x-titleshot-fallback` (see deployments/relay.py).
Nothing refuses paths under /titleshot: the servers have those pages on their admin port only, which no Service has.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pydantic import TypeAdapter, ValidationError

from deployments.kubernetes import names
from deployments.kubernetes.cluster import Cluster, Json
from deployments.target import FULL, Match, Shape, TargetError, Traffic

VERSION = "gateway.networking.k8s.io/v1"
MOST_RULES, MOST_MATCHES, MOST_MATCHES_OF_RULE = 16, 128, 64
"""Bounds of one HTTPRoute, by the API itself."""
OURS = ("x-shadow", "x-titleshot-own-path", "x-titleshot-priority", "x-titleshot-limits", "x-titleshot-fallback")
"""Headers that only the gateway may send, as on the local stack."""
PRIORITY, LIMITS, FALLBACK = OURS[2:]
LOAD = "x-titleshot-load"
"""A load test's, on a version's own path only: callers may not hide live requests among them."""
PATH_REWRITE = "HTTPRoutePathRewrite"
MIRROR, PERCENTAGE_MIRROR = "HTTPRouteRequestMirror", "HTTPRouteRequestPercentageMirror"
REQUEST_TIMEOUT, BACKEND_TIMEOUT = "HTTPRouteRequestTimeout", "HTTPRouteBackendTimeout"

_TRAFFIC = TypeAdapter(Traffic)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")


def route(cluster: Cluster, model: str, versions: Sequence[str], traffic: Traffic | None, *, fence: int) -> Json:
    """The HTTPRoute of `model`: the own paths of `versions`, and `traffic`, if there is any.

    Raises `TargetError` where traffic names a version that is not among `versions`, or there are more rules than a
    route may have; ValueError where there are neither versions nor traffic, and so no route.
    """
    if not versions:
        raise ValueError(f"a route of {model} without versions leads nowhere")
    if traffic is not None and traffic.model != model:
        raise ValueError(f"this is traffic of {traffic.model}, not of {model}")
    rules = _rules(cluster, model, versions, traffic)
    matches = [len(rule["matches"]) for rule in rules]
    if len(rules) > MOST_RULES or sum(matches) > MOST_MATCHES or max(matches) > MOST_MATCHES_OF_RULE:
        raise TargetError(
            f"the route of {model} would have {len(rules)} rules with {sum(matches)} matches, Gateway API allows "
            f"{MOST_RULES} with {MOST_MATCHES}, {MOST_MATCHES_OF_RULE} in one: retire some of the {len({*versions})} "
            "versions that are deployed, or have fewer pins"
        )
    said = {} if traffic is None else {names.TRAFFIC: _TRAFFIC.dump_json(traffic).decode()}
    parent = {
        "name": cluster.gateway.name,
        "namespace": cluster.gateway.namespace,
        "sectionName": cluster.gateway.section,
    }
    host = cluster.gateway.host
    made: Json = {
        "apiVersion": VERSION,
        "kind": "HTTPRoute",
        "metadata": {
            "name": names.slug(model),
            "namespace": cluster.namespace,
            "labels": names.labels(model),
            "annotations": {names.MODEL_NAME: model, names.FENCE: str(fence), **said},
        },
        "spec": {
            "parentRefs": [{key: value for key, value in parent.items() if value is not None}],
            **({"hostnames": [host.replace("{model}", names.slug(model))]} if host is not None else {}),
            "rules": rules,
        },
    }
    # Through JSON and back, so that no two rules share a part: whoever changes one changes that one.
    return dict(json.loads(json.dumps(made)))


def traffic_of(cluster: Cluster, found: Json) -> Traffic | None:
    """The traffic that an HTTPRoute was made of; None where it has own paths only.

    Its rules must be the ones that this traffic makes, but for what the API server fills in, and for timeouts,
    hostnames and parents, which are settings. Raises ValueError where they are not: then somebody else wrote it.
    """
    said = found["metadata"].get("annotations") or {}
    model, text = said.get(names.MODEL_NAME), said.get(names.TRAFFIC)
    if model is None:
        raise ValueError(f"it does not say whose it is: its annotation {names.MODEL_NAME} is gone")
    try:
        traffic = None if text is None else _TRAFFIC.validate_json(text)
    except ValidationError as error:
        raise ValueError(f"its annotation {names.TRAFFIC} cannot be read: {error}") from error
    if traffic is not None and traffic.model != model:
        raise ValueError(f"its annotations speak of {model} and of {traffic.model}")
    rules = [_gist(rule) for rule in found["spec"].get("rules", [])]
    try:
        meant = [_gist(rule) for rule in _rules(cluster, model, list(_own_versions(found)), traffic)]
    except TargetError as error:
        raise ValueError(f"its annotation and its own paths disagree: {error}") from error
    if rules != meant:
        differ = next(((a, b) for a, b in zip(rules, meant, strict=False) if a != b), None)
        one, other = (json.dumps(part) for part in differ or (f"{len(rules)} rules", f"{len(meant)} rules"))
        raise ValueError(f"its rules say {one}, its annotation {other}: somebody else changed it")
    return traffic


def needs(cluster: Cluster, traffic: Traffic | None) -> frozenset[str]:
    """What a gateway must be able to do, by the names of Gateway API's `status.supportedFeatures`."""
    named = {PATH_REWRITE}
    if cluster.gateway.timeouts:
        named |= {REQUEST_TIMEOUT, BACKEND_TIMEOUT}
    if traffic is not None and _mirrored(cluster, traffic):
        named |= {MIRROR} if traffic.mirror == FULL else {MIRROR, PERCENTAGE_MIRROR}
    return frozenset(named)


_INSTEAD = {
    PATH_REWRITE: "rewrite paths, and so there are no own paths of versions: choose another gateway",
    REQUEST_TIMEOUT: "bound the time of a request: set gateway.timeouts to false and bound it where the gateway can",
    BACKEND_TIMEOUT: "bound the time of an answer: set gateway.timeouts to false and bound it where the gateway can",
    MIRROR: 'copy requests: set mirroring to "replay"',
    PERCENTAGE_MIRROR: 'copy a part of the requests: copy all of them, or set mirroring to "replay"',
}


def cannot(cluster: Cluster, traffic: Traffic, supported: frozenset[str] | None) -> list[str]:
    """What of `traffic` cannot be had, in sentences; `supported` as the GatewayClass says it, None where it does not.

    Fallbacks are the servers' own business (`cluster.fallback`): without it `Traffic.fallback`, the spare, means
    nothing and is no sentence; a shape's was asked for.
    """
    shape, found = traffic.shape, []
    if shape.sticky is not None:
        found.append(
            f"Gateway API routes cannot keep callers on a version by their header {shape.sticky} while weights grow: "
            "leave sticky out"
        )
    if shape.fallback is not None and not cluster.fallback:
        found.append(
            f"Gateway API routes have no fallback, and the cluster's `fallback` is empty: version {shape.fallback} "
            "would never answer for another one; leave fallback out"
        )
    found += _faults(shape)
    missing = needs(cluster, traffic) - supported if supported is not None else frozenset()
    # What cannot be had at all cannot be had in part.
    missing -= {PERCENTAGE_MIRROR} if MIRROR in missing else set()
    missing -= {BACKEND_TIMEOUT} if REQUEST_TIMEOUT in missing else set()
    name = cluster.gateway.name
    return [*found, *(f"the gateway {name} ({one} is missing) does not {_INSTEAD[one]}" for one in sorted(missing))]


def _faults(shape: Shape) -> Iterator[str]:
    matches = [*(pin.match for pin in shape.pins), *((shape.priority,) if shape.priority else ())]
    for match in matches:
        if not _TOKEN.fullmatch(match.header) or match.header.lower() in OURS:
            yield f"{match.header!r} is no header that callers can send: letters, digits and '-', and none of ours"
        value = match.value
        if not value or len(value) > 4096 or not value.isprintable() or value != value.strip():
            yield f"{match.header}: {value!r} is no value of a header: printable characters, no space at either end"


# --- rules -------------------------------------------------------------------------------------------------


def _rules(cluster: Cluster, model: str, versions: Sequence[str], traffic: Traffic | None) -> list[Json]:
    gone = [] if traffic is None else sorted(_reached(cluster, traffic) - {*versions})
    if gone:
        raise TargetError(f"{model} {', '.join(gone)} is not deployed: nothing can be sent there")
    made = [_own_path(model, version) for version in sorted({*versions}, key=_order)]
    made += [] if traffic is None else _chosen(cluster, traffic)
    if cluster.gateway.timeouts:
        longest = _duration(cluster.answer_timeout)
        made = [{**rule, "timeouts": {"request": longest, "backendRequest": longest}} for rule in made]
    return made


def _reached(cluster: Cluster, traffic: Traffic) -> frozenset[str]:
    """Who gets requests by this route; the fallbacks get some only where servers pass on what they fail."""
    pinned = {pin.version for pin in traffic.shape.pins}
    challenger = {traffic.challenger} if traffic.challenger and (traffic.weight or traffic.mirror) else set[str]()
    return frozenset({traffic.champion} | pinned | challenger) | (traffic.live if cluster.fallback else frozenset())


def _order(version: str) -> tuple[int, str]:
    return len(version), version


def _own_path(model: str, version: str) -> Json:
    rewrite = {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}}
    return {
        "matches": [{"path": {"type": "PathPrefix", "value": f"/v/{version}"}}],
        "filters": [_headers({}, OURS), {"type": "URLRewrite", "urlRewrite": rewrite}],
        "backendRefs": [_backend(model, version, "own")],
    }


def _chosen(cluster: Cluster, traffic: Traffic) -> list[Json]:
    """The pins, then the split; each of them first for those that go before others."""
    shape = traffic.shape
    says = {LIMITS: ";".join(f"{one.version}={one.per_second:.15g}" for one in shape.limits)} if shape.limits else {}
    if cluster.fallback:
        says[FALLBACK] = ",".join(traffic.chain(traffic.champion))
    first = {**says, PRIORITY: "high"}
    made = []
    # Neighbours that lead to the same version are one rule: there may be 16 only.
    for (version, high), ways in groupby(_ways(shape), key=lambda way: (way.version, way.high)):
        to = [_backend(traffic.model, version, "pinned")]
        made.append(_rule([way.matches for way in ways], [_headers(first if high else says)], to))
    split = [
        {**_backend(traffic.model, version, "live"), "weight": weight} for version, weight in _shares(traffic) if weight
    ]
    mirror = [_mirror(traffic)] if _mirrored(cluster, traffic) else []
    if shape.priority is not None and not any(pin.match == shape.priority for pin in shape.pins):
        made.append(_rule([[shape.priority]], [_headers(first), *mirror], split))
    return [*made, _rule([[]], [_headers(says), *mirror], split)]


@dataclass(frozen=True, slots=True)
class _Way:
    """One match of a pin: all of `matches` together lead to `version`, ahead of others where it is `high`."""

    matches: tuple[Match, ...]
    version: str
    high: bool = False


def _ways(shape: Shape) -> list[_Way]:
    """The pins' matches, those with two headers first: so the order in which they are written and the order by which
    Gateway API sorts them are the same.
    """
    plain, ahead, priority = [], [], shape.priority
    caught = False
    for pin in shape.pins:
        same = priority is not None and pin.match.header.lower() == priority.header.lower()
        high = same and priority is not None and pin.match.value == priority.value
        if priority is not None and not same and not caught:
            ahead.append(_Way((pin.match, priority), pin.version, high=True))
        plain.append(_Way((pin.match,), pin.version, high))
        # Whoever goes first goes here; a later pin's two headers would win against this one.
        caught = caught or high
    return [*ahead, *plain]


def _rule(ways: Sequence[Sequence[Match]], filters: list[Json], backends: list[Json]) -> Json:
    return {"matches": [_match(way) for way in ways], "filters": filters, "backendRefs": backends}


def _match(matches: Sequence[Match]) -> Json:
    headers = [{"type": "Exact", "name": one.header.lower(), "value": one.value} for one in matches]
    return {"path": {"type": "PathPrefix", "value": "/"}, **({"headers": headers} if headers else {})}


def _headers(says: Mapping[str, str], ours: Sequence[str] = (*OURS, LOAD)) -> Json:
    gone = [name for name in ours if name not in says]
    said = {"set": [{"name": name, "value": value} for name, value in says.items()]} if says else {}
    return {"type": "RequestHeaderModifier", "requestHeaderModifier": {**said, "remove": gone}}


def _backend(model: str, version: str, kind: str) -> Json:
    return {"name": names.of_version(model, version), "port": names.PORTS[kind]}


def _shares(traffic: Traffic) -> list[tuple[str, int]]:
    champion = (traffic.champion, FULL - traffic.weight)
    return [champion] if traffic.challenger is None else [champion, (traffic.challenger, traffic.weight)]


def _mirrored(cluster: Cluster, traffic: Traffic) -> bool:
    return bool(traffic.challenger and traffic.mirror) and cluster.mirroring == "gateway"


def _mirror(traffic: Traffic) -> Json:
    to: Json = {"backendRef": _backend(traffic.model, str(traffic.challenger), "shadow")}
    # No share at all means all of them; whole percents are what most gateways know.
    if traffic.mirror != FULL:
        percent, rest = divmod(traffic.mirror, FULL // 100)
        to |= {"fraction": {"numerator": traffic.mirror, "denominator": FULL}} if rest else {"percent": percent}
    return {"type": "RequestMirror", "requestMirror": to}


def _duration(seconds: float) -> str:
    """Gateway API's way to write it: whole numbers of at most five digits."""
    thousandths = math.ceil(seconds * 1000)
    whole, rest = divmod(thousandths, 1000)
    hours, whole = divmod(whole, 3600)
    parts = ((hours, "h"), (whole, "s"), (rest, "ms"))
    return "".join(f"{number}{unit}" for number, unit in parts if number)


# --- read back ---------------------------------------------------------------------------------------------


def _own_versions(found: Json) -> Iterator[str]:
    for rule in found["spec"].get("rules", []):
        for match in rule.get("matches", []):
            path = match.get("path", {}).get("value", "/")
            if path.startswith("/v/"):
                yield path.removeprefix("/v/").strip("/")


def _gist(rule: Json) -> Json:
    """What a rule does to a request, with what the API server fills in where it is left out."""
    return {
        "matches": [
            {
                "path": {"type": "PathPrefix", "value": "/", **match.get("path", {})},
                "headers": [{"type": "Exact", **header} for header in match.get("headers", [])],
                **{key: value for key, value in match.items() if key not in {"path", "headers"}},
            }
            for match in rule.get("matches") or [{}]
        ],
        "filters": [_filter(one) for one in rule.get("filters", [])],
        "backendRefs": [_ref({"weight": 1, **one}) for one in rule.get("backendRefs", [])],
        **{key: value for key, value in rule.items() if key in {"retry", "sessionPersistence"}},
    }


def _filter(one: Json) -> Json:
    if "requestMirror" not in one:
        return one
    mirror = {**one["requestMirror"]}
    mirror["backendRef"] = _ref(mirror["backendRef"])
    if "fraction" in mirror:
        mirror["fraction"] = {"denominator": 100, **mirror["fraction"]}
    return {**one, "requestMirror": mirror}


def _ref(one: Json) -> Json:
    return {"group": "", "kind": "Service", **one}

"""Envoy's configuration as values: golden files, and the traps that are a matter of configuration.

`python -m tests.unit.test_envoy` writes the golden files anew; read the difference before you commit it.
"""

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.local import envoy
from deployments.local.envoy import Backend, Limits
from deployments.target import FULL, Histogram, Limit, Match, Pin, Served, Shape, Traffic

GOLDEN = Path(__file__).parent / "golden"
MODEL = "flights"
BACKENDS = [Backend("1", 18001), Backend("2", 18002), Backend("3", 18003)]
LIMITS = Limits()


def _routes(traffic: Traffic | None, number: int = 7) -> envoy.Json:
    return envoy.routes(MODEL, number, [one.version for one in BACKENDS], traffic, LIMITS)


GOLD, TENANT = Match("x-class", "gold"), Match("X-Tenant", "acme")
SHAPED = Traffic(
    MODEL,
    "2",
    "3",
    weight=2500,
    mirror=1000,
    shape=Shape((Pin(TENANT, "3"),), "x-user", (Limit("3", 20), Limit("2", 0.5)), GOLD, "1"),
)
CASES = {
    "bootstrap": lambda: envoy.bootstrap(
        "/h/run/envoy.sock", "/h/run/xds/lds/lds.json", "/h/run/xds/cds/cds.json", LIMITS
    ),
    "listener": lambda: envoy.listener(MODEL, 18000, "/h/run/xds/rds.flights/rds.json", LIMITS),
    "clusters": lambda: {"clusters": envoy.clusters(MODEL, BACKENDS[:2], LIMITS)},
    "routes.none": lambda: _routes(None),
    "routes.champion": lambda: _routes(Traffic(MODEL, "1")),
    "routes.canary": lambda: _routes(Traffic(MODEL, "1", "2", weight=2500, mirror=1000)),
    "routes.fallback": lambda: _routes(Traffic(MODEL, "2", "3", weight=100, fallback="1")),
    "routes.shaped": lambda: _routes(SHAPED),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """The generated configuration is what was read and agreed to."""
    assert CASES[name]() == json.loads((GOLDEN / f"{name}.json").read_text())


versions = st.sampled_from(["1", "2", "3", "4"])
matches = st.builds(Match, st.sampled_from(["x-tenant", "X-Region"]), st.sampled_from(["a", "b c", "50%"]))
shapes = st.builds(
    Shape,
    st.lists(st.builds(Pin, matches, versions), max_size=3).map(tuple),
    st.none() | st.just("X-User"),
    st.lists(
        st.builds(Limit, versions, st.integers(1, 1000) | st.floats(0.01, 99)),
        max_size=2,
        unique_by=lambda limit: limit.version,
    ).map(tuple),
    st.none() | matches,
    st.none() | versions,
)


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    champion = draw(versions)
    challenger = draw(st.none() | versions.filter(lambda one: one != champion))
    weight, mirror = (draw(st.integers(0, FULL)) if challenger else 0 for _ in range(2))
    return Traffic(MODEL, champion, challenger, weight, mirror, draw(st.none() | versions), draw(shapes))


@given(traffics())
def test_a_split_is_whole(traffic: Traffic) -> None:
    """All weights together are 100 %, and only versions that traffic can reach get any."""
    shares = envoy.split(traffic)
    assert sum(weight for _, weight in shares) == FULL
    assert len({name for name, _ in shares}) == len(shares)


@given(traffics())
def test_trap_20_the_champion_is_first_and_the_challenger_last(traffic: Traffic) -> None:
    """The order of the clusters never changes: another one would move sticky users."""
    first = [chain[0] for chain, _ in envoy.split(traffic)]
    assert first == [traffic.champion, *([traffic.challenger] if traffic.weight else [])]


@given(traffics())
def test_routes_name_only_clusters_that_are_there(traffic: Traffic) -> None:
    """Whatever the traffic between deployed versions, the clusters made for its chains are all that it names; without
    a third version in a chain they exist already, so that `route` changes no cluster."""
    backends = [Backend(version, 1) for version in ("1", "2", "3", "4")]
    needed = envoy.chains(traffic)
    there = {cluster["name"] for cluster in envoy.clusters(MODEL, backends, LIMITS, needed)}
    route = envoy.routes(MODEL, 1, ["1", "2", "3", "4"], traffic, LIMITS)
    named = {value["name"] for value in _walk(route) if isinstance(value, dict) and {"name", "weight"} <= {*value}}
    named |= {value["cluster"] for value in _walk(route) if isinstance(value, dict) and "cluster" in value}
    assert named <= there
    always = {cluster["name"] for cluster in envoy.clusters(MODEL, backends, LIMITS)}
    assert there - always == {envoy.cluster_name(MODEL, *chain) for chain in needed if len(chain) > 2}
    for version in "1234":
        ways = envoy.involving(MODEL, version, "1234", needed)
        assert {envoy.cluster_name(MODEL, *chain) for chain in needed if version in chain} <= {*ways} <= there


@given(traffics())
def test_chains_are_found_in_their_clusters(traffic: Traffic) -> None:
    """The chains that are served can be read from the clusters; those of another model are none of ours."""
    backends, needed = [Backend(version, 1) for version in ("1", "2", "3", "4")], envoy.chains(traffic)
    made = envoy.clusters(MODEL, backends, LIMITS, needed)
    assert {chain for chain in needed if len(chain) > 1} <= envoy.chains_in(MODEL, made)
    assert {len(chain) for chain in envoy.chains_in(MODEL, made)} <= {2, 3, 4}
    assert envoy.chains_in("other", made) == frozenset()


def test_a_chain_whose_version_is_gone_is_not_made() -> None:
    """No cluster is made of versions that are not deployed."""
    made = envoy.clusters(MODEL, BACKENDS[:2], LIMITS, [("1", "2", "3")])
    assert made == envoy.clusters(MODEL, BACKENDS[:2], LIMITS)


@given(traffics())
def test_traffic_is_read_back(traffic: Traffic) -> None:
    """What a route configuration says is the traffic that it was made of."""
    route = json.loads(json.dumps(envoy.routes(MODEL, 1, ["1", "2"], traffic, LIMITS)))
    assert envoy.traffic_of(route) == traffic


def test_traffic_that_somebody_else_wrote_is_an_error() -> None:
    """Weights that disagree with what was meant are never reported as if they agreed."""
    route = copy.deepcopy(_routes(Traffic(MODEL, "1", "2", weight=100)))
    route["virtual_hosts"][0]["routes"][-1]["route"]["weighted_clusters"]["clusters"][1]["weight"] = 5000
    with pytest.raises(ValueError, match="its routes say"):
        envoy.traffic_of(route)


def _live(route: envoy.Json, place: int = -1) -> envoy.Json:
    return route["virtual_hosts"][0]["routes"][place]  # type: ignore[no-any-return]


def _chain(route: envoy.Json) -> None:
    _live(route)["route"]["weighted_clusters"]["clusters"][0]["name"] = "flights-2-or-3"


CHANGES: dict[str, Callable[[envoy.Json], object]] = {
    "pin to another": lambda r: _live(r, -4)["route"]["weighted_clusters"]["clusters"][0].update(name="flights-1"),
    "pin of another": lambda r: _live(r, -4)["match"]["headers"][0]["string_match"].update(exact="other"),
    "no pin": lambda r: r["virtual_hosts"][0]["routes"].pop(-3),
    "chain": _chain,
    "sticky": lambda r: _live(r)["route"].pop("hash_policy"),
    "sticky by chance": lambda r: _live(r)["route"]["weighted_clusters"].pop("use_hash_policy"),
    "limits": lambda r: _live(r)["request_headers_to_add"][0]["header"].update(value="3=1000"),
    "priority": lambda r: _live(r, -2)["route"].update(priority="DEFAULT"),
    "priority's mark": lambda r: _live(r, -2)["request_headers_to_add"].pop(),
    "mirror": lambda r: _live(r)["route"].pop("request_mirror_policies"),
    "liars let in": lambda r: r["virtual_hosts"][0]["request_headers_to_remove"].pop(),
    "own path": lambda r: _live(r, 3)["route"].update(cluster="flights-3"),
    "no retries": lambda r: _live(r)["route"]["retry_policy"].pop("num_retries"),
    "a route more": lambda r: r["virtual_hosts"][0]["routes"].insert(0, copy.deepcopy(_live(r))),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_by_hand_is_noticed(what: str) -> None:
    """A change by hand to pins, chains, stickiness, limits, priority or marks is never reported as our traffic."""
    route = copy.deepcopy(_routes(SHAPED))
    assert envoy.traffic_of(route) == SHAPED
    CHANGES[what](route)
    with pytest.raises(ValueError, match="its routes say"):
        envoy.traffic_of(route)


def _skeleton(traffic: Traffic, number: int = 0, clusters: tuple[envoy.Chain, ...] = ()) -> str:
    made = envoy.clusters(MODEL, BACKENDS, LIMITS, clusters)
    return envoy.skeleton(MODEL, _routes(traffic, number), made, LIMITS)


def test_what_cannot_be_refused_has_one_skeleton() -> None:
    """Other weights and other versions in the same places need no second check by Envoy; anything else does, a cluster
    that is not there [trap 7] most of all."""
    known = _skeleton(Traffic(MODEL, "1", "2", weight=100))
    assert known == _skeleton(Traffic(MODEL, "1", "2", weight=9900)) == _skeleton(Traffic(MODEL, "3", "1", weight=1))
    others = [
        _skeleton(Traffic(MODEL, "1", "2", weight=10_000)),
        _skeleton(Traffic(MODEL, "1", "2", weight=100, mirror=1)),
        _skeleton(Traffic(MODEL, "1", "9", weight=100)),
        _skeleton(Traffic(MODEL, "1", "2", weight=100), clusters=(("1", "2", "3"),)),
        _skeleton(Traffic(MODEL, "1", "2", weight=100, shape=Shape(sticky="x-user"))),
        _skeleton(Traffic(MODEL, "1", "2", weight=100), number=1),
    ]
    assert len({known, *others}) == len(others) + 1


@pytest.mark.parametrize(("shape", "fault"), [
    (Shape(sticky="x user"), "x user"), (Shape(sticky=""), "no header"), (Shape(priority=Match(":path", "/")), ":path"),
    (Shape((Pin(Match("X-Titleshot-Limits", "1"), "1"),)), "X-Titleshot-Limits"),
    (Shape((Pin(Match("x-tenant", " a"), "1"),)), "no value"), (Shape((Pin(Match("x-tenant", "a\nb"), "1"),)), "no value"),
    (Shape(priority=Match("x-class", "")), "no value"),
])  # fmt: skip
def test_shapes_that_no_gateway_can_obey(shape: Shape, fault: str) -> None:
    """Headers that no client can send, or that are the gateway's own, are named; good ones are not."""
    assert [fault in one for one in envoy.faults(shape)] == [True]
    assert envoy.faults(SHAPED.shape) == []


def test_no_traffic_is_none() -> None:
    """A model without a route reads back as not routed."""
    assert envoy.traffic_of(_routes(None)) is None


def _walk(value: Any) -> Any:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _walk(inner)


def test_trap_01_the_breaker_opens_after_the_server_sheds() -> None:
    """The gateway lets more through than a server takes: the server's 503 can be retried, the breaker's not."""
    from deployments.local.target import Options

    assert LIMITS.connections > 2 * (Options().concurrency + Options().queue)


def test_trap_02_every_cluster_may_retry_more_than_three_at_once() -> None:
    """The limit of retries at once is raised on all clusters, the aggregates included; for both priorities; no more
    than a server takes."""
    from deployments.local.target import Options

    for cluster in envoy.clusters(MODEL, BACKENDS, LIMITS):
        thresholds = cluster["circuit_breakers"]["thresholds"]
        assert [one["priority"] for one in thresholds] == ["DEFAULT", "HIGH"]
        assert all(one["retry_budget"]["min_retry_concurrency"] == LIMITS.retries for one in thresholds)
        assert all("max_retries" not in one for one in thresholds)
    assert 64 <= LIMITS.retries <= Options().concurrency + Options().queue


@given(traffics())
def test_every_version_of_a_chain_gets_its_try(traffic: Traffic) -> None:
    """There are as many tries as the longest chain has versions, three at least; a limit that is reached (429) is tried
    elsewhere, where there is somebody else."""
    for entry in _routes(traffic)["virtual_hosts"][0]["routes"]:
        if "weighted_clusters" in entry.get("route", {}):
            names = [cluster["name"] for cluster in entry["route"]["weighted_clusters"]["clusters"]]
            longest, retry = max(name.count("-or-") + 1 for name in names), entry["route"]["retry_policy"]
            assert retry["num_retries"] == max(2, longest - 1)
            assert retry.get("retriable_status_codes", []) == ([429] if longest > 1 else [])


def test_traps_03_15_the_live_route() -> None:
    """Second tries go to the other tier; no timeout counts to the end of a stream."""
    live = _routes(Traffic(MODEL, "1", "2", weight=1))["virtual_hosts"][0]["routes"][-1]["route"]
    assert live["retry_policy"]["retry_priority"]["name"] == "envoy.retry_priorities.previous_priorities"
    assert live["timeout"] == "0s"


def test_traps_04_05_10_a_versions_cluster() -> None:
    """A health check does not readmit what was ejected; an ejected lone server is asked all the same; idle
    connections are dropped long before the server does it."""
    first = envoy.clusters(MODEL, BACKENDS, LIMITS)[0]
    assert first["outlier_detection"]["successful_active_health_check_uneject_host"] is False
    assert "common_lb_config" not in first
    (options,) = first["typed_extension_protocol_options"].values()
    assert int(options["common_http_protocol_options"]["idle_timeout"].rstrip("s")) < 75


def test_trap_06_attempts_are_tagged_by_the_endpoint() -> None:
    """Shadow endpoints carry a tag of their own, and the log of attempts uses the endpoint's tag."""
    text = json.dumps(envoy.clusters(MODEL, BACKENDS[:1], LIMITS))
    assert '{"version": "1"}' in text
    assert '{"version": "1-shadow"}' in text
    assert "%UPSTREAM_METADATA(model:version)%" in json.dumps(CASES["listener"]()["filter_chains"])


def test_trap_07_unknown_clusters_are_not_let_in() -> None:
    """Each route configuration asks Envoy to check its clusters."""
    assert _routes(None)["validate_clusters"] is True


def test_traps_11_12_17_listener_and_bootstrap() -> None:
    """A port that our gateways share; no admin port, and one that a crowd cannot bar; no /tap, no Lua; counters
    flushed each second."""
    assert CASES["listener"]()["enable_reuse_port"] is True
    boot = CASES["bootstrap"]()
    assert boot["admin"]["address"] == {"pipe": {"path": "/h/run/envoy.sock", "mode": 0o600}}
    assert boot["admin"]["ignore_global_conn_limit"] is True
    assert boot["stats_flush_interval"] == "1s"


def test_everything_binds_to_this_machine_only() -> None:
    """No generated address is anything but 127.0.0.1."""
    for name, make in CASES.items():
        for value in _walk(make()):
            if isinstance(value, dict) and "socket_address" in value:
                assert value["socket_address"]["address"] == "127.0.0.1", name


def test_a_shadow_may_take_little() -> None:
    """Copies have a cap of their own, far below the live one."""
    shadow = next(c for c in envoy.clusters(MODEL, BACKENDS, LIMITS) if c["name"] == "flights-1-shadow")
    assert shadow["circuit_breakers"]["thresholds"][0]["max_requests"] == LIMITS.shadow_requests < LIMITS.connections


def test_two_clusters_of_one_name_are_refused() -> None:
    """Version names that would make one cluster of two are an error, not a wrong route."""
    with pytest.raises(ValueError, match="one name"):
        envoy.clusters(MODEL, [Backend("1", 1), Backend("1", 2)], LIMITS)
    with pytest.raises(ValueError, match="one name"):
        envoy.clusters(MODEL, [Backend("1", 1), Backend("1-shadow", 2)], LIMITS)


@pytest.mark.parametrize(("name", "good"), [("flight-delay", True), ("a.b_c", True), ("a b", False), ("", False),
                                            ("-a", False), ("a/b", False), ("a%b", False), ("a\n", False)])  # fmt: skip
def test_names(name: str, good: bool) -> None:
    """Names become parts of files, clusters and counters: only harmless ones are let in."""
    assert envoy.valid_name(name) is good


def test_edges_are_fine_and_even() -> None:
    """Latency buckets are at most 12.5 % wide from 0.5 ms to 30 s, on Envoy's own two-digit grid."""
    edges = envoy.EDGES_US
    assert (edges[0], edges[-1]) == (500, 30_000_000)
    assert all(1.04 < b / a <= 1.126 for a, b in pairwise(edges))
    assert all(len(str(edge).rstrip("0")) <= 2 for edge in edges)


def test_counters_become_served() -> None:
    """Live, mirrored, pinned and shed attempts are told apart, other models left out, buckets undone."""
    tags = {"tmodel": MODEL, "tversion": "2", "troute": "live"}
    shadow = tags | {"tversion": "2-shadow", "troute": "-"}
    samples = [
        ("envoy_attempt_rq", tags | {"tcode": "200"}, 5.0),
        ("envoy_attempt_rq", tags | {"tcode": "0"}, 1.0),
        ("envoy_attempt_rq", tags | {"tcode": "200", "troute": "pinned"}, 3.0),
        ("envoy_attempt_rq", tags | {"tcode": "200", "troute": "header"}, 7.0),
        ("envoy_attempt_rq", shadow | {"tcode": "500"}, 2.0),
        ("envoy_attempt_rq", tags | {"tcode": "0", "tversion": "-"}, 4.0),
        ("envoy_attempt_rq", tags | {"tcode": "200", "tmodel": "other"}, 99.0),
        ("envoy_attempt_rq_us_bucket", tags | {"le": "500"}, 1.0),
        ("envoy_attempt_rq_us_bucket", tags | {"le": "1000"}, 4.0),
        ("envoy_attempt_rq_us_bucket", tags | {"le": "+Inf"}, 5.0),
        ("envoy_attempt_rq_us_count", tags, 5.0),
    ]
    found = envoy.served(MODEL, samples)
    assert found["2"] == Served({"200": 5, "0": 1}, Histogram((0.0005, 0.001), (1, 3, 1)))
    assert found["2-pinned"].codes == {"200": 3}
    assert found["2-header"].codes == {"200": 7}
    assert found["2-shadow"].codes == {"500": 2}
    assert found[""].codes == {"0": 4}
    assert set(found) == {"2", "2-pinned", "2-header", "2-shadow", ""}


if __name__ == "__main__":
    for case, made in CASES.items():
        (GOLDEN / f"{case}.json").write_text(json.dumps(made(), indent=1) + "\n")

"""Envoy's configuration as values: golden files, and the traps that are a matter of configuration.

`python -m tests.unit.test_envoy` writes the golden files anew; read the difference before you commit it.
"""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.local import envoy
from deployments.local.envoy import Backend, Limits
from deployments.target import FULL, Histogram, Served, Traffic

GOLDEN = Path(__file__).parent / "golden"
MODEL = "flights"
BACKENDS = [Backend("1", 18001), Backend("2", 18002), Backend("3", 18003)]
LIMITS = Limits()


def _routes(traffic: Traffic | None, number: int = 7) -> envoy.Json:
    return envoy.routes(MODEL, number, [one.version for one in BACKENDS], traffic, LIMITS)


CASES = {
    "bootstrap": lambda: envoy.bootstrap("/h/run/envoy.sock", "/h/run/xds/lds/lds.json", "/h/run/xds/cds/cds.json"),
    "listener": lambda: envoy.listener(MODEL, 18000, "/h/run/xds/rds.flights/rds.json", LIMITS),
    "clusters": lambda: {"clusters": envoy.clusters(MODEL, BACKENDS[:2], LIMITS)},
    "routes.none": lambda: _routes(None),
    "routes.champion": lambda: _routes(Traffic(MODEL, "1")),
    "routes.canary": lambda: _routes(Traffic(MODEL, "1", "2", weight=2500, mirror=1000)),
    "routes.fallback": lambda: _routes(Traffic(MODEL, "2", "3", weight=100, fallback="1")),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """The generated configuration is what was read and agreed to."""
    assert CASES[name]() == json.loads((GOLDEN / f"{name}.json").read_text())


versions = st.sampled_from(["1", "2", "3", "4"])


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    champion = draw(versions)
    challenger = draw(st.none() | versions.filter(lambda one: one != champion))
    weight, mirror = (draw(st.integers(0, FULL)) if challenger else 0 for _ in range(2))
    return Traffic(MODEL, champion, challenger, weight, mirror, draw(st.none() | versions))


@given(traffics())
def test_a_split_is_whole(traffic: Traffic) -> None:
    """All weights together are 100 %, and only versions that traffic can reach get any."""
    shares = envoy.split(traffic)
    assert sum(weight for _, weight in shares) == FULL
    assert len({name for name, _ in shares}) == len(shares)


@given(traffics())
def test_trap_20_the_champion_is_first_and_the_challenger_last(traffic: Traffic) -> None:
    """The order of the clusters never changes: another one would move sticky users."""
    names = [name for name, _ in envoy.split(traffic)]
    assert names[0].startswith(f"{MODEL}-{traffic.champion}")
    if traffic.challenger and traffic.weight:
        assert names[-1].startswith(f"{MODEL}-{traffic.challenger}-or-")
        assert len(names) == 2


@given(traffics())
def test_routes_name_only_clusters_that_are_there(traffic: Traffic) -> None:
    """Whatever the traffic between deployed versions, its clusters exist already: `route` changes no cluster."""
    backends = [Backend(version, 1) for version in ("1", "2", "3", "4")]
    there = {cluster["name"] for cluster in envoy.clusters(MODEL, backends, LIMITS)}
    assert {name for name, _ in envoy.split(traffic)} <= there
    route = envoy.routes(MODEL, 1, ["1", "2", "3", "4"], traffic, LIMITS)
    for entry in route["virtual_hosts"][0]["routes"]:
        for mirror in entry.get("route", {}).get("request_mirror_policies", []):
            assert mirror["cluster"] in there


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
    """The limit of retries at once is raised on all clusters, the aggregates included."""
    for cluster in envoy.clusters(MODEL, BACKENDS, LIMITS):
        assert cluster["circuit_breakers"]["thresholds"][0]["max_retries"] >= 1024


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
    """No shared port; no admin port; no /tap, no Lua; counters flushed each second."""
    assert CASES["listener"]()["enable_reuse_port"] is False
    boot = CASES["bootstrap"]()
    assert boot["admin"]["address"] == {"pipe": {"path": "/h/run/envoy.sock", "mode": 0o600}}
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
    assert found["2-shadow"].codes == {"500": 2}
    assert found[""].codes == {"0": 4}
    assert set(found) == {"2", "2-pinned", "2-shadow", ""}


if __name__ == "__main__":
    for case, made in CASES.items():
        (GOLDEN / f"{case}.json").write_text(json.dumps(made(), indent=1) + "\n")

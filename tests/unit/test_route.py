"""A model's HTTPRoute as a value: golden files, the rules' order as Gateway API sees it, and the way back to `Traffic`.

`python -m tests.unit.test_route` writes the golden files anew; read the difference before you commit it.
"""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.kubernetes import names
from deployments.kubernetes.cluster import Cluster, Gateway, Json
from deployments.kubernetes.route import OURS, cannot, needs, route, traffic_of
from deployments.target import FULL, Limit, Match, Pin, Shape, TargetError, Traffic

GOLDEN = Path(__file__).parent / "golden" / "kubernetes"
CRDS = Path(__file__).resolve().parents[3] / "shared" / "data" / "crds"
MODEL = "flight-delay"
GATEWAY = Gateway(
    name="edge", namespace="infra", section="http", url="http://127.0.0.1:8000", host="{model}.example.test"
)
CLUSTER = Cluster(namespace="models", gateway=GATEWAY)
REPLAY = CLUSTER.model_copy(update={"mirroring": "replay"})
VERSIONS = ["1", "2", "3", "10"]
TENANT, REGION, GOLD = Match("X-Tenant", "acme"), Match("x-region", "eu"), Match("x-class", "gold")
SHAPED = Traffic(
    MODEL, "2", "3", weight=2500, shape=Shape((Pin(TENANT, "3"),), None, (Limit("3", 20), Limit("2", 0.5)), GOLD)
)
CASES: dict[str, Callable[[], Json]] = {
    "route.own": lambda: _route(None),
    "route.canary": lambda: _route(Traffic(MODEL, "2", "3", weight=1050)),
    "route.pinned": lambda: _route(SHAPED),
    "route.mirror": lambda: _route(Traffic(MODEL, "2", "3", mirror=1000)),
    "route.mirror-fraction": lambda: _route(Traffic(MODEL, "2", "3", weight=100, mirror=25)),
    "route.mirror-full": lambda: _route(Traffic(MODEL, "2", "3", mirror=FULL)),
    "route.replay": lambda: _route(Traffic(MODEL, "2", "3", mirror=1000), REPLAY),
}


def _route(traffic: Traffic | None, cluster: Cluster = CLUSTER) -> Json:
    return route(cluster, MODEL, VERSIONS, traffic, fence=7)


@cache
def _crd(name: str) -> Json:
    file = CRDS / f"gateway.networking.k8s.io_{name}.yaml"
    if not file.exists():
        pytest.skip(f"{file.name} is not here")
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    return next(one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1")


def strict(schema: Any) -> Any:
    """The schema of a CRD, but no field may be unknown: so `fieldValidation=Strict` sees it."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    return made


def defaulted(schema: Json, value: Any) -> Any:
    """`value` as an API server would store it: what is left out has the schema's default."""
    if isinstance(value, list):
        return [defaulted(schema.get("items", {}), one) for one in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    made = {key: defaulted(known.get(key, {}), one) for key, one in value.items()}
    return {**{key: one["default"] for key, one in known.items() if "default" in one and key not in value}, **made}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """The routes are what was read and agreed to."""
    assert CASES[name]() == yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_schema_of_gateway_api_allows_it(name: str) -> None:
    """Every field is known, has its type and is within its bounds."""
    schema = strict(_crd("httproutes")["properties"]["spec"])
    jsonschema.Draft7Validator(schema).validate(CASES[name]()["spec"])


# --- the way back ------------------------------------------------------------------------------------------

shares = st.integers(0, FULL)
words = st.sampled_from(["acme", "eu", "gold", "a b", "x,y"])
matches = st.builds(Match, st.sampled_from(["X-Tenant", "x-tenant", "x-region", "x-class"]), words)
versions = st.sampled_from(VERSIONS)


@st.composite
def traffics(draw: Any) -> Traffic:
    """Any traffic that Kubernetes can have, and the two things that it cannot."""
    champion = draw(versions)
    challenger = draw(st.none() | versions.filter(lambda one: one != champion))
    shape = Shape(
        pins=tuple(draw(st.lists(st.builds(Pin, matches, versions), max_size=4))),
        sticky=draw(st.none() | st.just("x-user")),
        limits=tuple(
            Limit(version, draw(st.floats(0.01, 1e6))) for version in draw(st.lists(versions, unique=True, max_size=2))
        ),
        priority=draw(st.none() | matches),
        fallback=draw(st.none() | versions),
    )
    weight, mirror = (draw(shares), draw(shares)) if challenger else (0, 0)
    return Traffic(MODEL, champion, challenger, weight, mirror, draw(st.none() | versions), shape)


@given(traffics(), st.sampled_from([CLUSTER, REPLAY]))
@settings(max_examples=100, deadline=None)
def test_round_trip(traffic: Traffic, cluster: Cluster) -> None:
    """What was routed is what is read back, whatever it was."""
    assert traffic_of(cluster, _route(traffic, cluster)) == traffic


@given(traffics())
@settings(max_examples=30, deadline=None)
def test_what_the_api_server_fills_in_changes_nothing(traffic: Traffic) -> None:
    """A route that comes back with its schema's defaults means the same."""
    schema = _crd("httproutes")
    stored = defaulted(schema, _route(traffic))
    assert stored["spec"]["rules"][-1]["backendRefs"][0]["kind"] == "Service"
    jsonschema.Draft7Validator(strict(schema["properties"]["spec"])).validate(stored["spec"])
    assert traffic_of(CLUSTER, stored) == traffic


def test_settings_may_change_under_a_route() -> None:
    """Timeouts, hostnames and the Gateway are settings: another value of theirs is no other traffic."""
    traffic = Traffic(MODEL, "2", "3", weight=100)
    gateway = GATEWAY.model_copy(update={"name": "other", "host": None, "timeouts": False})
    other = CLUSTER.model_copy(update={"gateway": gateway, "answer_timeout": 5})
    assert traffic_of(other, _route(traffic)) == traffic
    assert traffic_of(CLUSTER, _route(traffic, other)) == traffic
    assert traffic_of(CLUSTER, _route(None)) is None


def _rule(found: Json) -> Json:
    return found["spec"]["rules"][-1]


def _backend(found: Json) -> Json:
    return _rule(found)["backendRefs"][-1]


def _mirror(found: Json) -> Json:
    return _rule(found)["filters"][-1]["requestMirror"]


def _replace_mirror(found: Json, **fields: Any) -> None:
    mirror = _mirror(found)
    mirror.pop("percent")
    mirror.update(fields)


BY_HAND: dict[str, Callable[[Json], Any]] = {
    "another weight": lambda found: _backend(found).update(weight=5000),
    "no weight, which is 1": lambda found: _backend(found).pop("weight"),
    "another backend": lambda found: _backend(found).update(name="flight-delay-v1"),
    "another port": lambda found: _backend(found).update(port=8082),
    "another namespace": lambda found: _backend(found).update(namespace="elsewhere"),
    "a backend less": lambda found: _rule(found)["backendRefs"].pop(),
    "a filter on a backend": lambda found: _backend(found).update(filters=[]),
    "more copies": lambda found: _mirror(found).update(percent=50),
    "copies of all": lambda found: _mirror(found).pop("percent"),
    "another fraction": lambda found: _replace_mirror(found, fraction={"numerator": 11}),
    "no copies": lambda found: _rule(found)["filters"].pop(),
    "a header that stays": lambda found: _rule(found)["filters"][0]["requestHeaderModifier"]["remove"].pop(),
    "a narrower path": lambda found: _rule(found)["matches"][0]["path"].update(value="/invocations"),
    "an exact path": lambda found: _rule(found)["matches"][0]["path"].update(type="Exact"),
    "a method": lambda found: _rule(found)["matches"][0].update(method="POST"),
    "retries": lambda found: _rule(found).update(retry={"attempts": 3}),
    "a rule more": lambda found: found["spec"]["rules"].append(copy.deepcopy(_rule(found))),
    "a rule less": lambda found: found["spec"]["rules"].pop(),
    "no own path": lambda found: found["spec"]["rules"].pop(1),
    "no rules": lambda found: found["spec"].pop("rules"),
    "no annotations": lambda found: found["metadata"].pop("annotations"),
    "no traffic": lambda found: found["metadata"]["annotations"].pop(names.TRAFFIC),
    "other traffic": lambda found: found["metadata"]["annotations"].update(
        {names.TRAFFIC: json.dumps({"model": MODEL, "champion": "1"})}
    ),
    "broken traffic": lambda found: found["metadata"]["annotations"].update({names.TRAFFIC: "{"}),
    "another model's": lambda found: found["metadata"]["annotations"].update({names.MODEL_NAME: "other"}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_route_changed_by_hand_is_noticed(name: str) -> None:
    """Whatever else the rules do than the annotation says, it is an error and never taken for our own."""
    traffic = Traffic(MODEL, "2", "3", weight=2500, mirror=1000)
    found = _route(traffic)
    assert traffic_of(CLUSTER, found) == traffic
    BY_HAND[name](found)
    with pytest.raises(ValueError, match=r"its|annotation"):
        traffic_of(CLUSTER, found)


# --- what a gateway makes of it ----------------------------------------------------------------------------


def chosen(found: Json, path: str, headers: dict[str, str]) -> tuple[Json, Json]:
    """The rule and match of a request, by Gateway API's own precedence."""
    best: tuple[tuple[int, int], Json, Json] | None = None
    for rule in found["spec"]["rules"]:
        for match in rule["matches"]:
            value = match["path"]["value"].rstrip("/")
            wanted = match.get("headers", [])
            if path != value and not path.startswith(f"{value}/"):
                continue
            if any(headers.get(one["name"].lower()) != one["value"] for one in wanted):
                continue
            rank = (len(value), len(wanted))
            # The first one stays where two are alike.
            if best is None or rank > best[0]:
                best = rank, rule, match
    assert best is not None
    return best[1:]


def says(rule: Json) -> dict[str, str]:
    changes = rule["filters"][0]["requestHeaderModifier"]
    return {one["name"]: one["value"] for one in changes.get("set", [])}


@given(traffics(), st.dictionaries(st.sampled_from(["x-tenant", "x-region", "x-class"]), words))
@settings(max_examples=150, deadline=None)
def test_the_first_pin_that_matches_wins(traffic: Traffic, headers: dict[str, str]) -> None:
    """Gateway API's order of matches is the order of the pins, and who goes first is told so, pinned or not."""
    rule, _ = chosen(_route(traffic), "/invocations", headers)
    fits = [pin.version for pin in traffic.shape.pins if headers.get(pin.match.header.lower()) == pin.match.value]
    priority = traffic.shape.priority
    first = priority is not None and headers.get(priority.header.lower()) == priority.value
    if fits:
        (backend,) = rule["backendRefs"]
        assert (backend["name"], backend["port"]) == (names.of_version(MODEL, fits[0]), names.PORTS["pinned"])
    else:
        assert {one["port"] for one in rule["backendRefs"]} == {names.PORTS["live"]}
        split = {one["name"]: one["weight"] for one in rule["backendRefs"]}
        assert sum(split.values()) == FULL
        assert min(split.values()) > 0
        assert split.get(names.of_version(MODEL, str(traffic.challenger)), 0) == traffic.weight
    assert (says(rule).get("x-titleshot-priority") == "high") == first


@pytest.mark.parametrize("name", CASES)
def test_only_the_gateway_says_what_only_a_gateway_may(name: str) -> None:
    """Each rule sets or removes each header of ours; a load test's mark passes on own paths only."""
    for rule in CASES[name]()["spec"]["rules"]:
        changes = rule["filters"][0]["requestHeaderModifier"]
        said, gone = [one["name"] for one in changes.get("set", [])], changes["remove"]
        own = rule["backendRefs"][0]["port"] == names.PORTS["own"]
        assert sorted([*said, *gone]) == sorted([*OURS, *([] if own else ["x-titleshot-load"])])


def test_own_paths_come_before_pins() -> None:
    """Who asks for a version by its path gets it, whatever their headers; /v/1 is not the beginning of /v/10."""
    found = _route(SHAPED)
    for version in VERSIONS:
        rule, _ = chosen(found, f"/v/{version}/invocations", {"x-tenant": "acme", "x-class": "gold"})
        assert rule["backendRefs"] == [{"name": f"flight-delay-v{version}", "port": names.PORTS["own"]}]


def test_limits_are_told_to_the_servers() -> None:
    """Pins and the split carry all limits, in numbers that the server reads back exactly."""
    rule, _ = chosen(_route(SHAPED), "/invocations", {})
    assert says(rule) == {"x-titleshot-limits": "3=20;2=0.5", "x-titleshot-fallback": "2"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(60, "60s"), (0.25, "250ms"), (1.5, "1s500ms"), (7200, "2h"), (90061.0012, "25h61s2ms"), (1e-9, "1ms")],
)
def test_durations(seconds: float, text: str) -> None:
    """Seconds as Gateway API writes them, never less than was asked for."""
    found = _route(None, CLUSTER.model_copy(update={"answer_timeout": seconds}))
    assert found["spec"]["rules"][0]["timeouts"] == {"request": text, "backendRequest": text}


# --- what is refused ---------------------------------------------------------------------------------------


def test_what_cannot_be_routed_is_refused() -> None:
    """Versions that are not there, more rules than the API allows, traffic of another model."""
    with pytest.raises(TargetError, match="flight-delay 3 is not deployed"):
        route(CLUSTER, MODEL, ["2"], Traffic(MODEL, "2", "3", mirror=1), fence=1)
    with pytest.raises(TargetError, match=r"17 rules .* allows 16"):
        route(CLUSTER, MODEL, [str(one) for one in range(16)], Traffic(MODEL, "2"), fence=1)
    pins = tuple(Pin(Match("x-tenant", str(one)), "2") for one in range(65))
    with pytest.raises(TargetError, match=r"with \d+ matches"):
        route(CLUSTER, MODEL, ["2"], Traffic(MODEL, "2", shape=Shape(pins)), fence=1)
    with pytest.raises(ValueError, match="of other"):
        route(CLUSTER, MODEL, ["2"], Traffic("other", "2"), fence=1)
    with pytest.raises(ValueError, match="without versions"):
        route(CLUSTER, MODEL, [], None, fence=1)


def test_a_challenger_without_traffic_need_not_be_there() -> None:
    """Neither need the spare and the fallback, where servers pass on nothing: no request is sent to them then."""
    traffic = Traffic(MODEL, "2", "3", fallback="1", shape=Shape(fallback="10"))
    alone = CLUSTER.model_copy(update={"fallback": ""})
    assert traffic_of(alone, route(alone, MODEL, ["2"], traffic, fence=1)) == traffic
    with pytest.raises(TargetError, match="flight-delay 1, 10 is not deployed"):
        route(CLUSTER, MODEL, ["2"], traffic, fence=1)


def test_who_answers_for_another_one_is_told_to_the_servers() -> None:
    """The champion first, then the spare, then the shape's; a version's own path passes nothing on."""
    traffic = Traffic(MODEL, "2", "3", weight=1, fallback="1", shape=Shape(fallback="10"))
    found = _route(traffic)
    rule, _ = chosen(found, "/invocations", {})
    assert says(rule) == {"x-titleshot-fallback": "2,1,10"}
    own, _ = chosen(found, "/v/3/invocations", {})
    assert says(own) == {}


def test_needs() -> None:
    """What a gateway must be able to do, by Gateway API's names, follows from traffic and settings."""
    always = {"HTTPRoutePathRewrite", "HTTPRouteRequestTimeout", "HTTPRouteBackendTimeout"}
    assert needs(CLUSTER, None) == needs(CLUSTER, Traffic(MODEL, "2")) == always
    assert needs(CLUSTER, Traffic(MODEL, "2", "3", mirror=FULL)) == always | {"HTTPRouteRequestMirror"}
    part = Traffic(MODEL, "2", "3", mirror=1)
    assert needs(CLUSTER, part) == always | {"HTTPRouteRequestMirror", "HTTPRouteRequestPercentageMirror"}
    untimed = REPLAY.model_copy(update={"gateway": GATEWAY.model_copy(update={"timeouts": False})})
    assert needs(untimed, part) == {"HTTPRoutePathRewrite"}


def test_cannot() -> None:
    """What a gateway, or Kubernetes at all, cannot do is said in sentences; what nobody tells is not made up."""
    traffic = Traffic(MODEL, "2", "3", mirror=100, fallback="1")
    assert cannot(CLUSTER, traffic, None) == cannot(CLUSTER, traffic, needs(CLUSTER, traffic)) == []
    (one,) = cannot(CLUSTER, traffic, needs(CLUSTER, traffic) - {"HTTPRouteRequestPercentageMirror"})
    assert one == (
        "the gateway edge (HTTPRouteRequestPercentageMirror is missing) does not copy a part of the requests: copy all "
        'of them, or set mirroring to "replay"'
    )
    assert len(cannot(CLUSTER, traffic, frozenset())) == 3
    assert len(cannot(REPLAY, traffic, frozenset())) == 2
    shape = Shape((Pin(Match("x-shadow", "1"), "2"), Pin(Match("x-a", " b"), "2")), sticky="x-user", fallback="1")
    assert len(cannot(CLUSTER, Traffic(MODEL, "2", shape=shape), None)) == 3
    alone = CLUSTER.model_copy(update={"fallback": ""})
    sticky, fallback, header, value = cannot(alone, Traffic(MODEL, "2", shape=shape), None)
    assert "x-user" in sticky
    assert "version 1" in fallback
    assert "'x-shadow' is no header" in header
    assert "' b' is no value" in value


if __name__ == "__main__":
    for name, make in CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(yaml.safe_dump(make(), sort_keys=False, width=120))

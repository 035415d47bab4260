"""A cluster in trouble, under a steady stream of requests: what callers notice, and what is still true afterwards."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from deployments.kubernetes import names
from deployments.local.supervisor import wait_for
from deployments.target import TargetError, TargetUnavailable, Traffic
from tests.cluster.node import LocalCluster
from tests.cluster.rest import ApiError
from tests.cluster.rights import RUN, restricted
from tests.cluster.world import KubernetesWorld, own_settings
from tests.contract.clients import MODEL, body

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pair(models: Path) -> Iterator[KubernetesWorld]:
    """Two versions with two replicas each."""
    with LocalCluster() as own:
        settings = own_settings(own, models, replicas=2, patience=30, drain=2)
        world = KubernetesWorld(models, restricted(own.server, settings, own.directory), own)
        fence = world.target.lease(MODEL, "conftest")
        for number in ("1", "2"):
            world.target.deploy(world.version(number), fence)
        world.target.route(Traffic(MODEL, "1"), fence)
        world.target.release(fence)
        yield world


@pytest.fixture
def world(pair: KubernetesWorld) -> Iterator[KubernetesWorld]:
    """All traffic on version 1, before and after."""
    yield pair
    assert pair.own is not None
    pair.own.server.faults.clear()
    fence = pair.target.lease(MODEL, "calm", take=True)
    wait_for(lambda: pair.ready("1") and pair.ready("2"), 60, "not all pods come back")
    pair.target.route(Traffic(MODEL, "1"), fence)
    pair.target.release(fence)


@contextmanager
def stream(world: KubernetesWorld) -> Iterator[Counter[int]]:
    """A request every 10 ms or so, by four clients; how each ended (0: with no answer)."""
    ended, stop = Counter[int](), threading.Event()
    url = f"{world.target.gateway(MODEL)}/invocations"

    def send() -> None:
        with httpx.Client(timeout=20, trust_env=False) as client:
            while not stop.is_set():
                try:
                    ended[
                        client.post(url, content=body(1.0), headers={"content-type": "application/json"}).status_code
                    ] += 1
                except httpx.HTTPError:
                    ended[0] += 1
                stop.wait(0.04)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: sum(ended.values()) > 20, 20, "no answers come")
    try:
        yield ended
        before = sum(ended.values())
        wait_for(lambda: sum(ended.values()) > before + 20, 20, "no answers come any more")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_weights_from_nothing_to_all_and_back_cost_no_request(world: KubernetesWorld) -> None:
    """0, a hundredth of a percent, all, and back, again and again, in one breath: every request is answered."""
    fence = world.target.lease(MODEL, "me")
    with stream(world) as ended:
        for _ in range(4):
            for weight in (1, 10_000, 5000, 0):
                world.target.route(Traffic(MODEL, "1", "2", weight=weight), fence)
            world.target.route(Traffic(MODEL, "2"), fence)
            world.target.route(Traffic(MODEL, "1"), fence)
    assert {*ended} == {200}
    world.target.release(fence)


def test_an_evicted_pod_costs_no_request(world: KubernetesWorld) -> None:
    """Under a canary a pod of each version is evicted: the disruption budget lets one go at a time, it drains, and another
    one comes."""
    fence = world.target.lease(MODEL, "me")
    world.target.route(Traffic(MODEL, "1", "2", weight=5000), fence)
    with stream(world) as ended:
        for version in ("1", "2"):
            before = {pod["metadata"]["name"] for pod in world.pods(version)}
            gone = min(before)
            eviction = {"apiVersion": "policy/v1", "kind": "Eviction"}
            where = {"name": gone, "namespace": world.cluster.namespace}
            path = world.api.path("Pod", world.cluster.namespace, gone, "eviction")
            world.api.request("POST", path, {**eviction, "metadata": where})

            def replaced(version: str = version, gone: str = gone) -> bool:
                there = {pod["metadata"]["name"] for pod in world.pods(version)}
                return gone not in there and len(there) == 2 and world.ready(version)

            wait_for(replaced, 60, f"no other pod of {version} comes")
    assert {*ended} == {200}
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1", "2", weight=5000)
    world.target.release(fence)


def test_an_api_server_that_goes_away_is_waited_for(world: KubernetesWorld) -> None:
    """While nobody answers for some seconds requests go on, and a route that was asked for meanwhile holds in the end."""
    assert world.own is not None
    fence = world.target.lease(MODEL, "me")
    with stream(world) as ended:
        done: list[Traffic] = []

        def route() -> None:
            world.target.route(Traffic(MODEL, "2"), fence)
            done.append(Traffic(MODEL, "2"))

        with world.own.server.away():
            thread = threading.Thread(target=route)
            thread.start()
            end = time.monotonic() + 5
            while time.monotonic() < end:
                assert not done
                time.sleep(0.1)
        thread.join(60)
        assert done
        assert world.target.traffic(MODEL) == Traffic(MODEL, "2")
    assert {*ended} == {200}
    world.target.release(fence)


def test_a_right_that_is_taken_away_changes_nothing(world: KubernetesWorld) -> None:
    """Without the right to patch routes the error says who may not do what, where; traffic stays as it was."""
    assert world.own is not None
    fence = world.target.lease(MODEL, "me")
    roles = world.own.api.items("Role", world.cluster.namespace)
    (role,) = [one for one in roles if any("httproutes" in rule["resources"] for rule in one["rules"])]
    less = [{**rule, "verbs": [verb for verb in rule["verbs"] if verb != "patch"]} for rule in role["rules"]]
    world.own.api.patch("Role", world.cluster.namespace, role["metadata"]["name"], {"rules": less})
    try:
        with stream(world) as ended, pytest.raises(TargetError, match=r"patch.*httproutes") as caught:
            world.target.route(Traffic(MODEL, "2"), fence)
    finally:
        world.own.api.patch("Role", world.cluster.namespace, role["metadata"]["name"], {"rules": role["rules"]})
    assert RUN in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {*ended} == {200}
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    world.target.release(fence)


def test_a_route_that_somebody_else_changes_or_deletes_is_noticed(world: KubernetesWorld) -> None:
    """A changed route is nobody's traffic until it is set again; a deleted one is made anew."""
    fence = world.target.lease(MODEL, "me")
    name, space = names.slug(MODEL), world.cluster.namespace
    found = world.api.get("HTTPRoute", name, space)
    assert found is not None
    found["spec"]["rules"][-1]["backendRefs"][0]["weight"] = 1
    found["spec"]["rules"][-1]["backendRefs"].append({"name": names.of_version(MODEL, "2"), "port": 8080, "weight": 1})
    world.api.replace(found)
    with pytest.raises(TargetError, match="is not as we wrote it"):
        world.target.traffic(MODEL)
    world.target.route(Traffic(MODEL, "1"), fence)
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    world.api.delete("HTTPRoute", space, name)
    assert world.target.traffic(MODEL) is None
    world.target.route(Traffic(MODEL, "1"), fence)
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    wait_for(lambda: {reply.status for reply in world.send(5)} == {200}, 20, "the route does not answer")
    world.target.release(fence)


def test_a_gateway_that_obeys_nobody_is_not_believed(world: KubernetesWorld) -> None:
    """A controller that looks at nothing: the route is not called one that holds, and the way back is not lost."""
    assert world.own is not None
    slow = KubernetesWorld(world.root, world.cluster.model_copy(update={"route_timeout": 3.0}), world.own)
    fence = slow.target.lease(MODEL, "me")
    world.own.gateways.ignore.set()
    try:
        with pytest.raises(TargetUnavailable):
            slow.target.route(Traffic(MODEL, "1", "2", weight=5000), fence)
        with pytest.raises(TargetUnavailable):
            slow.target.traffic(MODEL)
    finally:
        world.own.gateways.ignore.clear()
    slow.target.route(Traffic(MODEL, "1"), fence)
    assert slow.target.traffic(MODEL) == Traffic(MODEL, "1")
    slow.target.release(fence)


def test_evictions_beyond_the_budget_are_refused(world: KubernetesWorld) -> None:
    """One pod of a version at a time: the second eviction is 429, as the disruption budget says."""
    first, second = sorted(pod["metadata"]["name"] for pod in world.pods("2"))
    made = {"apiVersion": "policy/v1", "kind": "Eviction"}
    for name in (first, second):
        where = {"name": name, "namespace": world.cluster.namespace}
        path = world.api.path("Pod", world.cluster.namespace, name, "eviction")
        if name == first:
            world.api.request("POST", path, {**made, "metadata": where})
            continue
        with pytest.raises(ApiError) as caught:
            world.api.request("POST", path, {**made, "metadata": where})
        assert caught.value.code == 429

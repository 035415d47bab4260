"""The Kubernetes target against an API server and scripted pods and gateways: what it waits for, refuses and leaves behind.

What it promises with real pods and real requests is in tests/contract.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.artifact import digest
from deployments.kubernetes import names, target
from deployments.kubernetes.answers import Answers
from deployments.kubernetes.client import Said
from deployments.kubernetes.cluster import Cluster, Json
from deployments.kubernetes.hand import Hand
from deployments.kubernetes.replay import Replay
from deployments.kubernetes.target import ADMITTED, KubernetesTarget
from deployments.target import (
    Answer,
    Fence,
    LeaseHeld,
    NeverReady,
    StaleFence,
    TargetError,
    TargetUnavailable,
    Traffic,
    Unit,
    Version,
)
from tests.cluster.apiserver import ApiServer
from tests.cluster.controllers import Controllers
from tests.cluster.rest import Api, ApiError

MODEL = "flights"
KINDS = ("Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "HorizontalPodAutoscaler", "Pod")
STARTED = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
ROUTES = ("Accepted", "ResolvedRefs")


def container(state: Json, name: str = "server", **more: Any) -> Json:
    defaults = {"image": "i", "imageID": "", "restartCount": 0, "ready": False}
    return {"name": name, "state": state, **defaults, **more}


def ended(code: int, **more: Any) -> Json:
    return {"terminated": {"exitCode": code, "reason": "Error", **more}}


class Script:
    """Says what pods and routes are like, as a kubelet and a gateway's controller would."""

    def __init__(self, api: Api) -> None:
        self.api, self.pods, self.routes, self.message = api, dict[str, Json](), "True", "as asked"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            with contextlib.suppress(ApiError, OSError):
                for pod in self.api.items("Pod", "default"):
                    self._pod(pod)
                for route in self.api.items("HTTPRoute", "default"):
                    self._route(route)

    def _pod(self, pod: Json) -> None:
        if "deletionTimestamp" in pod["metadata"]:
            self.api.delete("Pod", "default", pod["metadata"]["name"], gracePeriodSeconds=0)
            return
        ready = {"conditions": [{"type": "Ready", "status": "True"}], "containerStatuses": [container(STARTED)]}
        status = {"phase": "Running", "podIP": "127.0.0.2"} | self.pods.get(
            pod["metadata"]["labels"][names.VERSION], ready
        )
        if status.items() > (pod.get("status") or {}).items() or not (pod.get("status") or {}).get("podIP"):
            self.api.replace({**pod, "status": status}, "status")

    def _route(self, route: Json) -> None:
        generation = route["metadata"]["generation"]
        said = [
            {
                "type": kind,
                "status": self.routes,
                "reason": "Script",
                "message": self.message,
                "observedGeneration": generation,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
            for kind in ROUTES
        ]
        parents = [
            {"parentRef": ref, "controllerName": "test/script", "conditions": said}
            for ref in route["spec"].get("parentRefs") or ()
        ]
        if self.routes != "silent" and parents and (route.get("status") or {}).get("parents") != parents:
            self.api.replace({**route, "status": {"parents": parents}}, "status")


class World:
    """A target, and what is scripted around it."""

    def __init__(self, server: ApiServer, root: Path) -> None:
        self.server, self.root = server, root
        self.file = server.kubeconfig(root / "kubeconfig")
        self.api = Api(self.file)
        self.controllers = Controllers(self.api).start()
        self.script = Script(self.api)
        self.target = self.another()

    def another(self, **more: Any) -> KubernetesTarget:
        settings = {
            "kubeconfig": self.file,
            "gateway": {"name": "edge", "url": "http://127.0.0.1:1"},
            "replicas": 1,
            "artifact": {"by": "image", "path": "/models"},
            "patience": 5,
            "ready_timeout": 2,
            "route_timeout": 5,
            "answer_timeout": 1,
        }
        return KubernetesTarget(Cluster.model_validate({**settings, **more}))

    def version(self, number: str, text: str = "") -> Version:
        path = self.root / f"artifact{text}"
        path.mkdir(exist_ok=True)
        (path / "MLmodel").write_text(f"flavors:\n  python_function:\n    loader_module: m{text}\n")
        return Version(MODEL, number, path, digest(path))

    def left(self, number: str) -> list[str]:
        """What there is of a version that is not on its way out."""
        labels = {names.MODEL: MODEL, names.VERSION: number}
        return [
            kind
            for kind in KINDS
            for one in self.target.client.items(kind, labels)
            if "deletionTimestamp" not in one["metadata"]
        ]

    def route(self) -> Json:
        found = self.target.client.get("HTTPRoute", MODEL)
        assert found is not None
        return found

    def backends(self) -> dict[str, int]:
        """Live backends and their weights."""
        last = self.route()["spec"]["rules"][-1]
        return {one["name"]: one["weight"] for one in last["backendRefs"] if one["port"] == names.PORTS["live"]}

    def close(self) -> None:
        self.script.stop()
        self.controllers.stop()
        self.api.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(target, "_GRACE", 0.4)
    with ApiServer() as server:
        made = World(server, tmp_path)
        yield made
        made.close()


@pytest.fixture
def fence(world: World) -> Fence:
    return world.target.lease(MODEL, "me")


def two(world: World, fence: Fence) -> None:
    """Versions 1 and 2, the first one serving."""
    for number in ("1", "2"):
        world.target.deploy(world.version(number), fence)
    world.target.route(Traffic(MODEL, "1"), fence)


def test_a_version_is_there_once_it_is_ready_known_and_reachable(world: World, fence: Fence) -> None:
    """Only then is it called deployed; a second deploy changes nothing of it; nobody is sent there."""
    made = world.target.deploy(world.version("1"), fence)
    assert world.target.deployed(MODEL) == {"1": made}
    assert (made.url, made.direct) == ("http://127.0.0.1:1/v/1", "http://flights-v1.default.svc:8082")
    before = world.target.client.get("Deployment", "flights-v1")
    assert before is not None
    assert before["metadata"]["annotations"][names.FENCE] == "1"
    assert world.target.deploy(world.version("1"), fence) == made
    after = world.target.client.get("Deployment", "flights-v1")
    assert after is not None
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    assert world.target.traffic(MODEL) is None
    assert (world.target.models(), world.target.kind_of(MODEL), world.target.kind_of("x")) == (
        (MODEL,),
        "kubernetes",
        None,
    )
    [[unit]] = world.target.units(MODEL).values()
    assert unit == Unit(unit.name, "Running")
    with pytest.raises(TargetError, match="deployed already, with the digest"):
        world.target.deploy(world.version("1", "other"), fence)
    with pytest.raises(TargetError, match="not what was admitted"):
        world.target.deploy(Version(MODEL, "2", world.version("2").path, "sha256:0"), fence)
    assert world.left("2") == []


@pytest.mark.parametrize(
    ("status", "own", "words"),
    [
        ({"containerStatuses": [container(ended(1))]}, True, "container server .* exit code 1"),
        (
            {
                "containerStatuses": [
                    container({"waiting": {"reason": "CrashLoopBackOff"}}, lastState=ended(137, reason="OOMKilled"))
                ]
            },
            True,
            "exit code 137 .OOMKilled.",
        ),
        ({"initContainerStatuses": [container(ended(3), "fetch")]}, True, "init container fetch .* exit code 3"),
        ({"containerStatuses": [container(STARTED)]}, True, "not ready after 2 s"),
        (
            {"initContainerStatuses": [container(ended(1))]},
            False,
            "init container .* exit code 1: the weights are gone",
        ),
        (
            {"containerStatuses": [container({"waiting": {"reason": "ImagePullBackOff", "message": "no i"}})]},
            False,
            "BackOff: no i",
        ),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
                ]
            },
            False,
            "finds no node: 0/3 nodes",
        ),
    ],
)
def test_whose_fault_it_is_that_a_version_is_not_ready(
    world: World, fence: Fence, status: Json, own: bool, words: str
) -> None:
    """What the model does is `NeverReady`, with events and last words; what the cluster does is not. Nothing is left."""
    world.script.pods["1"] = status
    world.server.logs = _Logs({"server": b"loading\nthe weights are gone\n"})
    with pytest.raises(TargetError, match=words) as failure:
        world.target.deploy(world.version("1"), fence)
    assert isinstance(failure.value, NeverReady) is own
    if isinstance(failure.value, NeverReady):
        assert "event: Normal " in failure.value.log
        assert ("the weights are gone" in failure.value.log) is ("containerStatuses" in status)
    _until(lambda: world.left("1") == [])
    assert world.target.client.get("HTTPRoute", MODEL) is None
    assert world.target.deployed(MODEL) == {}


class _Logs(dict[tuple[str, str, str], Any]):
    """The same words for whichever pod."""

    def __init__(self, said: dict[str, bytes]) -> None:
        self.said = said

    def get(self, key: Any, default: Any = None) -> Any:
        return (lambda: self.said[key[2]]) if key[2] in self.said else default

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and key[2] in self.said

    def __getitem__(self, key: tuple[str, str, str]) -> Any:
        return self.get(key)


def test_what_the_cluster_would_refuse_is_not_begun(world: World, fence: Fence) -> None:
    """An object that is refused, or that we have no right to, leaves none of the others behind."""
    world.server.faults.answer(403, None, path="poddisruptionbudgets", verb="patch")
    with pytest.raises(TargetError, match="refuses to patch poddisruptionbudgets"):
        world.target.deploy(world.version("1"), fence)
    assert world.left("1") == []


def test_weights_move_and_are_read_back(world: World, fence: Fence) -> None:
    """What was routed is what the API server has; doing it again changes nothing."""
    two(world, fence)
    for traffic, weights in (
        (Traffic(MODEL, "1", "2", weight=2500), {"flights-v1": 7500, "flights-v2": 2500}),
        (Traffic(MODEL, "2", "1"), {"flights-v2": 1}),
    ):
        world.target.route(traffic, fence)
        assert world.target.traffic(MODEL) == traffic
        total = sum(world.backends().values())
        wanted = sum(weights.values())
        assert {name: weight / total for name, weight in world.backends().items() if weight} == {
            name: weight / wanted for name, weight in weights.items()
        }
        generation = world.route()["metadata"]["generation"]
        world.target.route(traffic, fence)
        assert world.route()["metadata"]["generation"] == generation
    with pytest.raises(TargetError, match="9 is not deployed"):
        world.target.route(Traffic(MODEL, "9"), fence)
    with pytest.raises(TargetError, match="has traffic"):
        world.target.retire(MODEL, "2", fence)


def test_a_route_that_is_refused_is_put_back(world: World, fence: Fence) -> None:
    """The controller's reason is the error's, and what was good before is there again."""
    two(world, fence)
    before = world.route()["spec"]
    world.script.routes, world.script.message = "False", "no such luck"
    with pytest.raises(TargetError, match="refuses the route of flights: Accepted is false: Script: no such luck"):
        world.target.route(Traffic(MODEL, "2"), fence)
    assert world.route()["spec"] == before
    with pytest.raises(TargetUnavailable, match="does not obey"):
        world.target.traffic(MODEL)
    world.script.routes = "True"
    _until(lambda: _traffic(world) == Traffic(MODEL, "1"))


def test_a_gateway_that_says_nothing_is_not_obedience(world: World, fence: Fence) -> None:
    """Setting is not having. The wish stays, for when the controller is back: it is the latest one."""
    two(world, fence)
    world.script.routes = "silent"
    slow = world.another(route_timeout=0.5)
    with pytest.raises(TargetUnavailable, match=r"does not say within 0.5 s.*generation"):
        slow.route(Traffic(MODEL, "2"), fence)
    with pytest.raises(TargetUnavailable, match="does not obey"):
        world.target.traffic(MODEL)
    world.script.routes = "True"
    world.target.route(Traffic(MODEL, "2"), fence)
    assert world.target.traffic(MODEL) == Traffic(MODEL, "2")


def test_nobody_is_sent_where_nobody_answers(world: World, fence: Fence) -> None:
    """Neither a share nor a copy goes to a version without a ready endpoint."""
    two(world, fence)
    world.api.patch("Deployment", "default", "flights-v2", {"spec": {"replicas": 0}})
    _until(lambda: world.target.units(MODEL)["2"] == [])
    for traffic in (Traffic(MODEL, "2"), Traffic(MODEL, "1", "2", weight=1), Traffic(MODEL, "1", "2", mirror=1)):
        with pytest.raises(TargetError, match=r"not healthy.*2: none of its pods is ready"):
            world.target.route(traffic, fence)
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")


def test_a_stale_writer_moves_nothing_however_late_it_wakes_up(world: World, fence: Fence) -> None:
    """Its lease is taken between its look at the Lease and its write: the write meets another resourceVersion."""
    two(world, fence)
    made, taken = world.target._hand.apply, list[Fence]()

    def late(objects: Any, *, why: str) -> list[Json]:
        if not taken:
            taken.append(world.another().lease(MODEL, "other", take=True))
        return made(objects, why=why)

    world.target._hand.apply = late  # type: ignore[method-assign]
    with pytest.raises(StaleFence, match="now it is other's"):
        world.target.route(Traffic(MODEL, "2"), fence)
    world.target._hand.apply = made  # type: ignore[method-assign]
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    world.another().route(Traffic(MODEL, "2"), taken[0])
    for call in (
        lambda: world.target.route(Traffic(MODEL, "1"), fence),
        lambda: world.target.deploy(world.version("3"), fence),
        lambda: world.target.retire(MODEL, "1", fence),
        lambda: world.target.retire(MODEL, "77", fence),
    ):
        with pytest.raises(StaleFence):
            call()
    assert world.target.traffic(MODEL) == Traffic(MODEL, "2")
    assert set(world.target.deployed(MODEL)) == {"1", "2"}


def test_even_the_first_route_is_not_written_by_a_stale_writer(world: World, fence: Fence) -> None:
    """Where there was no route to mark, one is made before the look at the Lease."""
    made, taken = world.target._hand.apply, list[Fence]()

    def late(objects: Any, *, why: str) -> list[Json]:
        if objects[0]["kind"] == "HTTPRoute":
            taken.append(world.another().lease(MODEL, "other", take=True))
        return made(objects, why=why)

    world.target._hand.apply = late  # type: ignore[method-assign]
    with pytest.raises(StaleFence):
        world.target.deploy(world.version("1"), fence)
    assert not world.route()["spec"].get("parentRefs")
    assert world.target.deployed(MODEL) == {}
    world.another().deploy(world.version("1"), taken[-1])
    assert set(world.target.deployed(MODEL)) == {"1"}


def test_a_version_that_was_deployed_anew_is_not_deleted_by_a_stale_writer(world: World, fence: Fence) -> None:
    """Retired by one and deployed by the next: the first one's delete meets another resourceVersion."""
    two(world, fence)
    made, taken = world.target._hand.delete, list[Fence]()

    def late(objects: Any, *, why: str) -> None:
        if objects[0]["kind"] == "Deployment" and not taken:
            taken.append(world.another().lease(MODEL, "other", take=True))
            world.another().deploy(world.version("2"), taken[0])
        made(objects, why=why)

    world.target._hand.delete = late  # type: ignore[method-assign]
    with pytest.raises(StaleFence):
        world.target.retire(MODEL, "2", fence)
    assert set(world.target.deployed(MODEL)) == {"1", "2"}
    assert "Deployment" in world.left("2")


def test_a_retired_version_is_gone_with_its_path(world: World, fence: Fence) -> None:
    """All of it; again it is no error, and the last one takes the route along."""
    two(world, fence)
    world.target.route(Traffic(MODEL, "1", "2"), fence)
    world.target.retire(MODEL, "2", fence)
    assert world.left("2") == []
    assert "flights-v2" not in str(world.route()["spec"])
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    with pytest.raises(TargetError, match="not deployed"):
        world.target.answers(MODEL, "2")
    world.target.retire(MODEL, "2", fence)
    with pytest.raises(TargetError, match="has traffic"):
        world.target.retire(MODEL, "1", fence)


def test_a_cut_deploy_goes_on(world: World, fence: Fence) -> None:
    """Objects that were left by a process that died are not called deployed, and the next deploy takes them over; a
    route that names a version more is put right."""
    world.target.deploy(world.version("1"), fence)
    deployment = world.target.client.get("Deployment", "flights-v1")
    assert deployment is not None
    del deployment["metadata"]["annotations"][ADMITTED]
    world.target.client.replace(deployment)
    assert world.target.deployed(MODEL) == {}
    world.target.deploy(world.version("1"), fence)
    after = world.target.client.get("Deployment", "flights-v1")
    assert after is not None
    assert after["metadata"]["uid"] == deployment["metadata"]["uid"]
    assert after["metadata"]["generation"] == deployment["metadata"]["generation"]


def test_a_route_that_is_still_going_is_not_written(world: World, fence: Fence) -> None:
    """What is applied to an object that is being deleted goes with it, and nobody would answer: the next route waits until
    it is gone."""
    two(world, fence)
    world.api.patch("HTTPRoute", "default", MODEL, {"metadata": {"finalizers": ["example.org/theirs"]}})
    uid = world.route()["metadata"]["uid"]
    world.api.delete("HTTPRoute", "default", MODEL)
    assert "deletionTimestamp" in world.route()["metadata"]
    timer = threading.Timer(0.3, world.api.patch, ("HTTPRoute", "default", MODEL, {"metadata": {"finalizers": None}}))
    timer.start()
    world.target.route(Traffic(MODEL, "2"), fence)
    timer.join()
    assert world.target.traffic(MODEL) == Traffic(MODEL, "2")
    assert world.route()["metadata"]["uid"] != uid


def test_somebody_elses_hand_is_noticed(world: World, fence: Fence) -> None:
    """A route that was changed behind our back is not read as ours; one of another's name is left alone."""
    two(world, fence)
    route = world.route()
    route["spec"]["rules"][-1]["backendRefs"][0]["name"] = "elsewhere"
    world.target.client.replace(route)
    with pytest.raises(TargetError, match="not as we wrote it"):
        world.target.traffic(MODEL)
    world.target.route(Traffic(MODEL, "1"), fence)
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    meta = {"name": "theirs", "labels": {"app.kubernetes.io/managed-by": "them"}}
    world.target.client.create({"apiVersion": route["apiVersion"], "kind": "HTTPRoute", "metadata": meta, "spec": {}})
    with pytest.raises(TargetError, match="not that of theirs"):
        world.target.traffic("theirs")


def test_faults_of_the_api_server_cost_time_only(world: World, fence: Fence) -> None:
    """Conflicts, overload, lost answers, closed watches, a server that is away for a moment: the same end."""
    faults = world.server.faults
    for verb in ("patch", "update", "create", "get"):
        faults.answer(500, 1, verb=verb)
        faults.answer(429, 1, verb=verb, retry_after=0)
    faults.answer(409, 2, verb="update")
    faults.answer(409, 1, verb="patch", path="httproutes")
    faults.lose(1, verb="create", path="httproutes")
    faults.answer(410, 1, verb="watch")
    world.target.deploy(world.version("1"), fence)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.1):
            world.server.close_watches()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        faults.lose(1, verb="patch")
        world.target.deploy(world.version("2"), fence)
        faults.lose(1, verb="patch")
        world.target.route(Traffic(MODEL, "1", "2", weight=100), fence)
    finally:
        stop.set()
        thread.join()
    with world.server.away():
        away = threading.Timer(0.3, lambda: None)
        away.start()
        away.join()
    world.target.route(Traffic(MODEL, "2"), fence)
    assert world.target.traffic(MODEL) == Traffic(MODEL, "2")
    assert set(world.target.deployed(MODEL)) == {"1", "2"}


@pytest.mark.long
def test_a_lease_is_kept_while_a_commit_finds_its_way(world: World) -> None:
    """A hand that takes longer than the lease lasts loses it to nobody; it is given no resourceVersion to obey."""
    gitops = {"repository": "/nowhere"}
    slow = KubernetesTarget(world.another(gitops=gitops, lease_seconds=3).cluster, hand=Slow(world.target._hand, 4))
    fence = slow.lease(MODEL, "me")
    deploying = threading.Thread(target=slow.deploy, args=(world.version("1"), fence))
    deploying.start()
    while deploying.is_alive():
        with pytest.raises(LeaseHeld):
            world.target.lease(MODEL, "other")
        deploying.join(0.1)
    assert set(slow.deployed(MODEL)) == {"1"}


class Slow:
    """A hand that takes its time, and brings things into the cluster without preconditions, as Argo CD does."""

    def __init__(self, hand: Hand, seconds: float) -> None:
        self.hand, self.seconds = hand, seconds

    def check(self, objects: Sequence[Json]) -> None:
        self.hand.check(objects)

    def apply(self, objects: Sequence[Json], *, why: str) -> list[Json]:
        time.sleep(self.seconds)
        return self.hand.apply(objects, why=why)

    def delete(self, objects: Sequence[Json], *, why: str) -> None:
        self.hand.delete(objects, why=why)


def test_what_is_missing_is_said_before(world: World) -> None:
    """No Gateway, no controller that took it, a feature that its class has not: sentences, before anything is done."""
    client, traffic = world.target.client, Traffic(MODEL, "1", "2", mirror=5000)
    assert world.target.cannot(traffic) == ("cluster default has no Gateway edge in namespace default",)
    api = "gateway.networking.k8s.io/v1"
    listener = {"name": "http", "port": 80, "protocol": "HTTP"}
    gateway = client.create(
        {
            "apiVersion": api,
            "kind": "Gateway",
            "metadata": {"name": "edge"},
            "spec": {"gatewayClassName": "c", "listeners": [listener]},
        }
    )
    said = world.target.cannot(traffic)
    assert "no controller has taken the Gateway edge of class c" in said[0]
    assert "has no GatewayClass c" in said[1]
    kind = {"apiVersion": api, "kind": "GatewayClass", "metadata": {"name": "c"}, "spec": {"controllerName": "a/b"}}
    made = client.create(kind)
    taken = {"reason": "r", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z", "status": "True"}
    conditions = [{"type": kind, **taken} for kind in ("Accepted", "Programmed")]
    world.api.replace({**gateway, "status": {"conditions": conditions}}, "status")
    assert world.target.cannot(Traffic(MODEL, "1")) == ()
    world.api.replace({**made, "status": {"supportedFeatures": [{"name": "HTTPRoutePathRewrite"}]}}, "status")
    assert any("irror" in one or "cop" in one for one in world.another().cannot(traffic))


def test_a_dry_run_shows_all_and_touches_nothing(world: World, fence: Fence) -> None:
    """What a promotion would make and change, step by step; a second look finds the very same."""
    world.target.deploy(world.version("1"), fence)
    world.target.route(Traffic(MODEL, "1"), fence)
    before = {kind: world.target.client.items(kind, {}) for kind in KINDS}
    steps = [Traffic(MODEL, "1", "2", weight=100), Traffic(MODEL, "2")]
    deploy, first, second = world.target.changes(world.version("2"), steps)
    assert {(one.what, bool(one.before)) for one in deploy} >= {
        ("Deployment flights-v2", False),
        ("HTTPRoute flights", True),
    }
    assert [one.what for one in (*first, *second)] == ["HTTPRoute flights"] * 2
    assert first[0].after == second[0].before
    assert "flights-v2" in first[0].after
    assert "managedFields" not in str(deploy)
    assert {kind: world.target.client.items(kind, {}) for kind in KINDS} == before
    assert world.target.changes(world.version("1"), [Traffic(MODEL, "1")]) == ((), ())


class Pods:
    """Pods that answer what they are told to."""

    def __init__(self) -> None:
        self.held: dict[str, list[Answer]] = {"a": [], "b": []}
        self.containers = {"a": "1", "b": "1"}
        self.sent: list[tuple[str, int, str, bytes, str]] = []

    def items(self, kind: str, labels: dict[str, str]) -> list[Json]:
        conditions = [{"type": "Ready", "status": "True"}]
        return [
            {
                "metadata": {"name": name, "uid": name},
                "status": {
                    "phase": "Running",
                    "podIP": "127.0.0.1",
                    "conditions": conditions,
                    "containerStatuses": [{"name": "server", "containerID": one}],
                },
            }
            for name, one in self.containers.items()
        ]

    def pod_get(self, pod: Json, port: int, path: str, seconds: float = 10.0) -> bytes:
        name = pod["metadata"]["name"]
        if self.containers[name] == "down":
            raise TargetUnavailable("down")
        after = int(path.partition("after=")[2].partition("&")[0])
        fields = ("number", "request_id", "shadow", "status", "at", "seconds")
        lines = [
            json.dumps(
                {name: getattr(one, name) for name in fields}
                | {"request": one.request.decode(), "response": {"base64": "/w=="}}
            )
            for one in self.held[name]
            if one.number > after
        ]
        return "\n".join(lines[:500]).encode()

    def pod_request(
        self, method: str, pod: Json, port: int, path: str, *, body: bytes, headers: Any, seconds: float
    ) -> Said:
        self.sent.append((method, port, path, body, headers["x-request-id"]))
        return Said(200, {}, b"")

    def answer(self, pod: str, name: str, at: float) -> None:
        number = len(self.held[pod])
        self.held[pod].append(Answer(number, name, False, 200, name.encode(), b"", at, 0.0))


def test_the_answers_of_all_pods_are_one_sequence() -> None:
    """Merged by time, numbered here without gaps; pods that restart or go lose nothing that was gathered."""
    pods = Pods()
    held = Answers(pods, {})  # type: ignore[arg-type]
    for number in range(600):
        pods.answer("a", f"a{number}", 2 * number)
    pods.answer("b", "b0", 3.0)
    first = held.after(-1)
    assert [one.request_id for one in first[:4]] == ["a0", "a1", "b0", "a2"]
    assert [one.number for one in first] == list(range(601))
    assert (first[0].request, first[0].response) == (b"a0", b"\xff")
    pods.held["a"], pods.containers["a"] = [], "2"
    pods.answer("a", "again", 5000.0)
    pods.containers["b"] = "down"
    assert [(one.number, one.request_id) for one in held.after(599)] == [(600, "a599"), (601, "again")]
    pods.containers = {"b": "down"}
    with pytest.raises(TargetUnavailable):
        held.after(-1)
    pods.containers = {}
    assert len(held.after(-1)) == 602


def test_live_requests_are_copied_once_where_the_gateway_cannot() -> None:
    """From now on, to the shadow port, under their own ids; and no more once that is not the traffic any more."""
    pods, still = Pods(), [True]
    pods.answer("a", "old", 1.0)
    replay = Replay(pods, Traffic(MODEL, "1", "2", mirror=10_000), lambda: still[0])  # type: ignore[arg-type]
    for number in range(5):
        pods.answer("a", f"n{number}", 2.0 + number)
    _until(lambda: len(pods.sent) == 5)
    assert {one[:3] for one in pods.sent} == {("POST", names.PORTS["shadow"], "/invocations")}
    assert sorted(one[3:] for one in pods.sent) == [(b"n%d" % n, f"n{n}") for n in range(5)]
    replay.stop()
    assert not replay.running
    assert (replay.sent, replay.dropped) == (5, 0)


def _traffic(world: World) -> Traffic | None:
    with contextlib.suppress(TargetUnavailable):
        return world.target.traffic(MODEL)
    return None


def _until(holds: Any) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)

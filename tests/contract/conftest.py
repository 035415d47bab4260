"""Every target behind one `World`: the fake, the local one with Envoy, supervisord and model servers, and Kubernetes on
the tests' own cluster, where pods are processes and the Gateway is an Envoy."""

import json
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import httpx
import pytest

from deployments.artifact import digest
from deployments.local.supervisor import wait_for
from deployments.local.target import LocalTarget, Options
from deployments.target import Fence, LeaseHeld, ServingTarget, TargetError, Traffic, Version
from tests.cluster.node import LocalCluster
from tests.cluster.real import RealCluster, reason_to_skip
from tests.cluster.rights import restricted
from tests.cluster.world import KubernetesWorld, own_settings
from tests.contract.clients import BROKEN, FLAWED, GOOD, KINDS, MODEL, Clients, Reply, body, make_models
from tests.fakes import Behaviour, FakeTarget


class World(Protocol):
    """A target with its clients."""

    target: ServingTarget

    def version(self, number: str, kind: str = GOOD) -> Version:
        """A version of MODEL that behaves as `kind`."""

    def send(
        self,
        count: int,
        x: float = 1.0,
        version: str | None = None,
        ids: Callable[[int], str] | None = None,
        headers: Callable[[int], dict[str, str]] | None = None,
    ) -> list[Reply]:
        """Send `count` requests with the row `x`, some at a time; `ids` and `headers` by their number."""

    def pings(self, count: int) -> Counter[str | None]:
        """Send `count` requests that cost a model nothing; who answered how many."""

    def kill(self, version: str) -> None:
        """Let a version's server die, as by kill -9."""

    def revived(self, version: str) -> None:
        """Return once the supervisor's new server for this version serves."""

    def halt(self, version: str) -> None:
        """Stop a version's server, and do not bring it back."""

    def resume(self, version: str) -> None:
        """Bring it back."""

    def expire(self, fence: Fence) -> None:
        """Let a lease lapse."""


class FakeWorld:
    """The fake and its clients."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 0.0
        self.fake = FakeTarget(seed=7, clock=lambda: self.now)
        self.target: ServingTarget = self.fake

    def version(self, number: str, kind: str = GOOD) -> Version:
        def answer(request: bytes) -> tuple[int, bytes]:
            x = json.loads(request)["dataframe_split"]["data"][0][0]
            return (500, b"") if kind == FLAWED and x == 13 else (200, json.dumps(2 * x).encode())

        log = "RuntimeError: the weights are not where they should be"
        self.fake.behaviours.setdefault((MODEL, number), Behaviour(answer, ready=kind != BROKEN, log=log))
        return Version(MODEL, number, self.root / kind, digest(self.root / kind))

    def send(
        self,
        count: int,
        x: float = 1.0,
        version: str | None = None,
        ids: Callable[[int], str] | None = None,
        headers: Callable[[int], dict[str, str]] | None = None,
    ) -> list[Reply]:
        sent = [
            self.fake.send(MODEL, body(x), version, ids(n) if ids else None, headers(n) if headers else None)
            for n in range(count)
        ]
        return [
            Reply(one.status, one.version, one.attempts, one.request_id, one.body.decode(), one.chosen) for one in sent
        ]

    def pings(self, count: int) -> Counter[str | None]:
        return Counter(reply.version for reply in self.send(count))

    def kill(self, version: str) -> None:
        self.fake.behaviour(MODEL, version).healthy = False

    def revived(self, version: str) -> None:
        self.fake.behaviour(MODEL, version).healthy = True

    halt, resume = kill, revived

    def expire(self, fence: Fence) -> None:
        self.now += 61


class LocalWorld(Clients):
    """The real thing in a home of its own."""

    def __init__(self, root: Path, home: Path, options: Options) -> None:
        self.root, self.home, self.options = root, home, options
        self.local = LocalTarget(home, options)
        self.target: ServingTarget = self.local

    def version(self, number: str, kind: str = GOOD) -> Version:
        return Version(MODEL, number, self.root / kind, digest(self.root / kind))

    def pid(self, version: str) -> int:
        """The process that serves a version."""
        return self.local.supervisor.status()[f"model-{MODEL}-{version}"].pid

    def kill(self, version: str) -> None:
        pid = self.pid(version)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self.pid(version) != pid, 30, "supervisord does not notice")

    def revived(self, version: str) -> None:
        # The server first: Envoy takes a while to notice a death, and calls the dead healthy until then.
        direct = self.local.deployed(MODEL)[version].direct

        def back() -> bool:
            try:
                return httpx.get(f"{direct}/ready", trust_env=False).is_success and self.local.ready()
            except httpx.HTTPError:
                return False

        wait_for(back, 90, f"{version} does not come back")

    def halt(self, version: str) -> None:
        with self.local.supervisor._rpc() as rpc:
            rpc.stopProcess(f"model-{MODEL}-{version}")

    def resume(self, version: str) -> None:
        with self.local.supervisor._rpc() as rpc:
            rpc.startProcess(f"model-{MODEL}-{version}", False)
        self.revived(version)

    def expire(self, fence: Fence) -> None:
        with self.local._state._transaction() as db:
            db.execute("UPDATE holder SET renewed=-1e9 WHERE model=?", (fence.model,))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of all kinds."""
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def fake_world(models: Path) -> FakeWorld:
    """The fake with versions 1 to 3 deployed."""
    world = FakeWorld(models)
    _deploy_all(world)
    return world


@pytest.fixture(scope="session")
def local_world(models: Path) -> Iterator[LocalWorld]:
    """The real target with versions 1 to 3 deployed; all of it is stopped in the end."""
    home = Path(tempfile.mkdtemp(prefix="ts.", dir="/tmp"))
    world = LocalWorld(models, home, Options(queue=40, health_timeout=6.0))
    try:
        world.local.start()
        _deploy_all(world)
        yield world
    finally:
        world.local.stop()
        shutil.rmtree(home, ignore_errors=True)


def _deploy_all(world: World) -> None:
    fence = world.target.lease(MODEL, "conftest")
    with ThreadPoolExecutor() as threads:
        versions = [world.version(number, kind) for number, kind in KINDS.items()]
        list(threads.map(lambda version: world.target.deploy(version, fence), versions))
    world.target.route(Traffic(MODEL, "1"), fence)
    world.target.release(fence)


@pytest.fixture(scope="session")
def kubernetes_world(models: Path) -> Iterator[KubernetesWorld]:
    """The Kubernetes target with versions 1 to 3 deployed: on a cluster of its own, or in `make test-cluster` on a real
    one."""
    if os.environ.get("TITLESHOT_TEST_CLUSTER"):
        if why := reason_to_skip():
            pytest.skip(why)
        with RealCluster() as part:
            kinds = {**KINDS, "4": GOOD, "5": BROKEN, "6": GOOD, "8": GOOD}
            settings = part.settings({number: models / kind for number, kind in kinds.items()})
            world = KubernetesWorld(models, settings, part=part)
            _deploy_all(world)
            yield world
        return
    with LocalCluster() as own:
        # With the rights that a promotion is given, and no others.
        world = KubernetesWorld(models, restricted(own.server, own_settings(own, models), own.directory), own)
        _deploy_all(world)
        yield world


NOT_ON_KUBERNETES = {
    "test_a_growing_share_moves_no_user_back": "no Gateway API feature keeps a user with a growing share: it is refused",
    "test_a_killed_challenger_costs_no_client_a_failure": "one replica that dies is noticed by its probe only",
}
"""What the target does not promise on a cluster, and why: its `cannot` and docs/kubernetes.md say so."""
BY_FALLBACK = {
    "test_a_failing_challenger_costs_no_client_a_failure",
    "test_fallback_answers_for_the_champion",
    "test_a_pin_goes_before_the_weights",
    "test_beyond_its_limit_a_version_is_relieved",
}
"""Here one version's server asks another's by its Service: on a real cluster that takes DNS and kube-proxy."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A failure on a real cluster comes with what the cluster looked like then."""
    try:
        return (yield)
    except Exception as error:
        world = getattr(item, "funcargs", {}).get("world")
        if isinstance(world, KubernetesWorld) and world.part is not None:
            error.add_note(world.part.described())
        raise


@pytest.fixture(params=["fake", "local", "kubernetes"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Each target, with version 1 as champion before and after."""
    name = request.node.originalname
    if request.param == "kubernetes" and name in NOT_ON_KUBERNETES:
        pytest.skip(NOT_ON_KUBERNETES[name])
    weight = request.node.callspec.params.get("weight", 5000)
    if request.param == "kubernetes" and weight != 5000 and request.config.getoption("-m") == "not long":
        pytest.skip("one weight is enough here: the others in `make chaos`")
    real = os.environ.get("TITLESHOT_TEST_CLUSTER")
    if request.param == "kubernetes" and real and name in BY_FALLBACK:
        if not os.environ.get("TITLESHOT_TEST_DNS"):
            pytest.skip("TITLESHOT_TEST_DNS is not set: pods may not resolve Services here")
        if os.environ.get("TITLESHOT_TEST_PLAIN"):
            pytest.skip("TITLESHOT_TEST_PLAIN is set: the stand-in passes nothing on")
    found: World = request.getfixturevalue(f"{request.param}_world")
    yield found
    calm(found)


@pytest.fixture
def real(local_world: LocalWorld) -> Iterator[LocalWorld]:
    """The real target only, for what a fake has not."""
    yield local_world
    calm(local_world)


def calm(world: World) -> None:
    """All traffic to version 1, no leases."""
    for holder in ("conftest", "me", "other"):
        with suppress(LeaseHeld):
            fence = world.target.lease(MODEL, holder)
            break
    else:
        raise TargetError("a test has left a lease behind")
    world.target.route(Traffic(MODEL, "1"), fence)
    world.target.release(fence)


@pytest.fixture
def fence(world: World) -> Iterator[Fence]:
    """The lease of MODEL for the length of a test."""
    taken = world.target.lease(MODEL, "me")
    yield taken
    world.target.release(taken)

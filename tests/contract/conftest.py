"""Both targets behind one `World`: the fake, and the real one with Envoy, supervisord and model servers."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import pytest

from deployments.artifact import digest
from deployments.local.supervisor import wait_for
from deployments.local.target import LocalTarget, Options
from deployments.target import Fence, LeaseHeld, ServingTarget, TargetError, Traffic, Version
from tests.fakes import Behaviour, FakeTarget

MODEL = "flights"
CODE = """
import pathlib, time

def _load_pyfunc(path):
    kind = pathlib.Path(path, "kind").read_text()
    if kind == "broken":
        raise RuntimeError("the weights are not where they should be")
    return Model(kind)

class Model:
    def __init__(self, kind):
        self.kind = kind
    def predict(self, data, params=None):
        answers = []
        for x in data["x"]:
            if self.kind == "flawed" and x == 13:
                raise ValueError("never seen 13 in training")
            if x < 0:
                time.sleep(-x)
            answers.append(2 * x)
        return answers
"""
MLMODEL = """\
flavors:
  python_function:
    code: code
    loader_module: tiny_{kind}
signature:
  inputs: '[{{"type": "double", "name": "x", "required": true}}]'
  outputs: '[{{"type": "double", "required": true}}]'
  params: null
"""
GOOD, FLAWED, BROKEN = "good", "flawed", "broken"
KINDS = {"1": GOOD, "2": GOOD, "3": FLAWED}
"""The versions that are deployed throughout. Kinds: `good` answers 2x and sleeps -x seconds for a negative x;
`flawed` is the same but raises for 13; `broken` does not load."""


@dataclass(frozen=True)
class Reply:
    """What a client got."""

    status: int
    version: str | None
    attempts: int
    request_id: str
    text: str
    chosen: str | None = None


def body(x: float) -> bytes:
    """A request with one row."""
    return json.dumps({"dataframe_split": {"columns": ["x"], "data": [[x]]}}).encode()


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


class LocalWorld:
    """The real thing in a home of its own."""

    def __init__(self, root: Path, home: Path, options: Options) -> None:
        self.root, self.home, self.options = root, home, options
        self.local = LocalTarget(home, options)
        self.target: ServingTarget = self.local

    def version(self, number: str, kind: str = GOOD) -> Version:
        return Version(MODEL, number, self.root / kind, digest(self.root / kind))

    def send(
        self,
        count: int,
        x: float = 1.0,
        version: str | None = None,
        ids: Callable[[int], str] | None = None,
        headers: Callable[[int], dict[str, str]] | None = None,
    ) -> list[Reply]:
        path = f"/v/{version}/invocations" if version else "/invocations"
        return asyncio.run(self._send(count, path, body(x), ids, more=headers))

    def pings(self, count: int) -> Counter[str | None]:
        replies = asyncio.run(self._send(count, "/ping", b"", None, method="GET"))
        assert {reply.status for reply in replies} == {200}
        return Counter(reply.version for reply in replies)

    async def _send(
        self,
        count: int,
        path: str,
        content: bytes,
        ids: Callable[[int], str] | None,
        at_once: int = 16,
        method: str = "POST",
        more: Callable[[int], dict[str, str]] | None = None,
    ) -> list[Reply]:
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        async with httpx.AsyncClient(
            base_url=self.target.gateway(MODEL), timeout=60, limits=limits, trust_env=False
        ) as client:

            async def one(number: int) -> Reply:
                headers = {"content-type": "application/json"} | (more(number) if more else {})
                if ids:
                    headers["x-request-id"] = ids(number)
                async with gate:
                    answer = await client.request(method, path, content=content, headers=headers)
                attempts = int(answer.headers.get("x-envoy-attempt-count", 0))
                version, name = answer.headers.get("x-model-version"), answer.headers.get("x-request-id", "")
                chosen = answer.headers.get("x-model-chosen")
                return Reply(answer.status_code, version, attempts, name, answer.text, chosen)

            return await asyncio.gather(*map(one, range(count)))

    def at_once(self, count: int, x: float) -> list[Reply]:
        """All of them in flight together."""
        return asyncio.run(self._send(count, "/invocations", body(x), None, at_once=count))

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


def make_models(root: Path) -> Path:
    """One artifact directory per kind, small and quick to load."""
    for kind in (GOOD, FLAWED, BROKEN):
        (root / kind / "code").mkdir(parents=True)
        (root / kind / "MLmodel").write_text(MLMODEL.format(kind=kind))
        (root / kind / "code" / f"tiny_{kind}.py").write_text(CODE)
        (root / kind / "kind").write_text(kind)
        (root / kind / "serving_input_example.json").write_bytes(body(1.0))
    return root


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


@pytest.fixture(params=["fake", "local"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Either target, with version 1 as champion before and after."""
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

"""The real target with versions that prove who they are, and what may be done to its parts."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from deployments.artifact import digest
from deployments.local import envoy
from deployments.local.supervisor import _alive, wait_for
from deployments.local.target import Options
from deployments.target import Fence, Traffic, Version
from tests.chaos.crash import FIVE, Registry, registry
from tests.chaos.models import MOODS, make_model
from tests.chaos.prober import Prober
from tests.contract.conftest import MODEL, LocalWorld

VERSIONS = ("1", "2", "3")


class Arena(LocalWorld):
    """A `LocalWorld` whose version n answers 1000 x + n, and with ways to hurt it. `moods` says how versions behave
    (see `tests.chaos.models`).
    """

    def __init__(self, root: Path, home: Path, options: Options) -> None:
        super().__init__(root, home, options)
        self.moods = Path(options.environment[MOODS])
        self.fence = Fence(MODEL, "nobody", 0)

    def version(self, number: str, kind: str = "") -> Version:
        path = self.root / number
        if not path.exists():
            make_model(path, number)
        return Version(MODEL, number, path, digest(path))

    def prober(self, *allowed: str, **options: Any) -> Prober:
        """Asks through the gateway of MODEL; each kind of request unless told otherwise."""
        return Prober(self.local.gateway(MODEL), allowed=allowed, **options)

    def route(self, traffic: Traffic, prober: Prober | None = None, *, fallback: bool = False) -> None:
        """Route; the prober expects whom it must expect meanwhile and after. Fallbacks may answer if told so."""
        before = self.local.traffic(MODEL)
        then = _answering(traffic, fallback=fallback)
        if prober is None:
            self.local.route(traffic, self.fence)
            return
        during = then | (_answering(before, fallback=fallback) if before else set())
        with prober.moving(during, then):
            self.local.route(traffic, self.fence)

    @contextmanager
    def mood(self, version: str, what: str) -> Iterator[None]:
        """A version behaves badly while the block runs."""
        file = self.moods / version
        new = file.with_suffix(".new")
        new.write_text(what)
        new.replace(file)
        try:
            yield
        finally:
            file.unlink()

    @contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """A process hangs while the block runs."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def gateways(self) -> dict[str, int]:
        """The processes of the gateway by the supervisor's names for them."""
        programs = self.local.supervisor.status().values()
        return {one.name: one.pid for one in programs if one.name.startswith("gateway") and one.pid}

    def kill_process(self, pid: int) -> tuple[float, float]:
        """kill -9; when, and when it was gone."""
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL)

        def gone() -> bool:
            # Its first thread is a zombie before the last one has closed the sockets.
            return not _alive(pid) and len(list(Path("/proc").glob(f"{pid}/task/*"))) <= 1

        wait_for(gone, 30, f"{pid} does not die", every=0.001)
        return begin, time.monotonic()

    def kill_gateway(self, name: str) -> tuple[float, float]:
        """kill -9, and wait for the supervisor's next one; when it died."""
        # Who dies within its first second, again and again, is given up by supervisord: another story.
        wait_for(lambda: self.local.supervisor.status()[name].running, 30, f"{name} does not run")
        pid = self.gateways()[name]
        span = self.kill_process(pid)
        wait_for(lambda: self.gateways().get(name) not in {None, pid}, 30, f"no new {name}")
        wait_for(self.local.ready, 30, "the gateway is not ready")
        return span

    def kill_supervisor(self) -> None:
        """kill -9 of supervisord alone; what it started stays."""
        os.kill(int((self.home / "run" / "supervisord.pid").read_text()), signal.SIGKILL)
        wait_for(lambda: not self.local.supervisor.up(), 10, "supervisord is still there")

    def healthy(self, *versions: str) -> None:
        """Return once the gateway sends requests to these versions again, ejected ones included."""
        names = [envoy.cluster_name(MODEL, version) for version in versions]
        wait_for(lambda: not self.local._gateway.sick(names, ejected=True), 60, f"{versions} stay aside")


def _answering(traffic: Traffic, *, fallback: bool) -> set[str]:
    """Who answers where nothing fails; with `fallback` also who answers otherwise."""
    split = {traffic.champion} if traffic.weight < 10_000 else set()
    if traffic.challenger is not None and traffic.weight:
        split.add(traffic.challenger)
    return {other for version in split for other in traffic.chain(version)} if fallback else split


@contextmanager
def arena(
    root: Path, home: Path | None = None, versions: tuple[str, ...] = VERSIONS, **options: Any
) -> Iterator[Arena]:
    """A target of its own with these versions deployed, the first one routed, and the lease held by `arena.fence`;
    all of it is stopped in the end.
    """
    place = home or Path(tempfile.mkdtemp(prefix="ts.", dir="/tmp"))
    moods = Path(tempfile.mkdtemp(prefix="moods.", dir="/tmp"))
    made = Arena(root, place, Options(environment={MOODS: str(moods)}, **options))
    try:
        made.local.start()
        made.fence = made.local.lease(MODEL, "chaos")
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda one: made.local.deploy(made.version(one), made.fence), versions))
        made.local.route(Traffic(MODEL, versions[0]), made.fence)
        yield made
    finally:
        if not made.local.supervisor.up():
            # A test that failed between a kill and the start after it.
            with suppress(Exception):
                made.local.start()
        made.local.stop()
        shutil.rmtree(moods, ignore_errors=True)
        if home is None:
            shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry of five versions: 2 is champion, 1 was before, and nothing is under way."""
    with registry(tmp_path_factory.mktemp("registry"), len(FIVE)) as made:
        assert made.run("promote", version="1").result["phase"] == "promoted"
        with made.asking():
            assert made.run("promote", version="2").result["phase"] == "promoted"
        assert made.disagreements() == []
        yield made


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the versions' artifacts are made."""
    return tmp_path_factory.mktemp("formulas")


@pytest.fixture(scope="session")
def shared_arena(artifacts: Path) -> Iterator[Arena]:
    """One target for all tests that leave it as it was."""
    with arena(artifacts, lease_ttl=600.0, limits=envoy.Limits(try_seconds=5.0)) as made:
        yield made


@pytest.fixture
def calm(shared_arena: Arena) -> Iterator[Arena]:
    """The shared target with version 1 as champion before and after, everything healthy."""
    shared_arena.fence = shared_arena.local.lease(MODEL, "chaos")
    shared_arena.healthy(*VERSIONS)
    shared_arena.route(Traffic(MODEL, "1"))
    yield shared_arena
    shared_arena.fence = shared_arena.local.lease(MODEL, "chaos")
    shared_arena.healthy(*VERSIONS)
    shared_arena.route(Traffic(MODEL, "1"))

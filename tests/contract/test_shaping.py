"""What the real gateway does with chains, pins, sticky users, priority and limits; how it holds out against too much;
and two of it on one port. The servers behind it say what they were told where that is the question."""

import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from deployments.local import envoy
from deployments.local.gateway import Gateway
from deployments.local.supervisor import Supervisor, wait_for
from deployments.local.target import LocalTarget, _free
from deployments.target import FULL, Limit, Match, Pin, Served, Shape, TargetError, TargetUnavailable, Traffic
from tests.contract.conftest import MODEL, LocalWorld, body

TIGHT = envoy.Limits(
    body_bytes=10_000,
    header_kib=4,
    headers=30,
    header_seconds=1.0,
    request_seconds=1.5,
    idle_seconds=3.0,
    client_connections=20,
    all_connections=30,
    connections=4,
    pending=2,
    retries=2,
    retry_percent=1.0,
)


class Echo:
    """A server that answers with the headers it got. It can be told to fail, to hold its answers back and to stream."""

    def __init__(self) -> None:
        self.status, self.seen = 200, list[dict[str, str]]()
        self.wait, self.chunks = threading.Event(), 0
        self.wait.set()
        echo = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def do_GET(self) -> None:
                if self.path == "/ready":
                    return self.say(200, b"")
                told = {name.lower(): value for name, value in self.headers.items()}
                self.rfile.read(int(told.get("content-length", 0)))
                echo.seen.append(told)
                echo.wait.wait(20)
                if not echo.chunks:
                    return self.say(echo.status, json.dumps(told).encode())
                self.send_response(200)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for _ in range(echo.chunks):
                    time.sleep(0.1)
                    self.wfile.write(b"4\r\npart\r\n")
                self.wfile.write(b"0\r\n\r\n")
                return None

            do_POST = do_PUT = do_GET

            def say(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Bench:
    """A gateway before three such servers."""

    def __init__(self, limits: envoy.Limits, count: int = 1) -> None:
        self.home, self.limits = Path(tempfile.mkdtemp(prefix="ts.", dir="/tmp")), limits
        self.echoes = {version: Echo() for version in "123"}
        self.supervisor = Supervisor(self.home)
        self.gateway = Gateway(self.supervisor, count=count, limits=limits)
        self.backends = [envoy.Backend(version, echo.server.server_port) for version, echo in self.echoes.items()]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.number = 1
        traffic = Traffic(MODEL, "1")
        self.gateway.write("rds", MODEL, 1, [envoy.routes(MODEL, 1, "123", traffic, limits)])
        self.gateway.write("cds", "", 1, envoy.clusters(MODEL, self.backends, limits))
        rds = str(self.gateway.path("rds", MODEL))
        self.gateway.write("lds", "", 1, [envoy.listener(MODEL, self.port, rds, limits)])
        self.supervisor.start()
        self.gateway.start()
        wait_for(lambda: not self.gateway.sick(self.names(traffic)), 10, "sick")

    def names(self, traffic: Traffic) -> list[str]:
        return [envoy.cluster_name(MODEL, version) for version in traffic.live]

    def route(self, traffic: Traffic) -> None:
        made = envoy.clusters(MODEL, self.backends, self.limits, envoy.chains(traffic))
        if made != self.gateway.resources("cds"):
            self.number += 1
            self.gateway.publish("cds", "", self.number, made, nullcontext())
        self.number += 1
        route = envoy.routes(MODEL, self.number, "123", traffic, self.limits)
        self.gateway.publish("rds", MODEL, self.number, [route], nullcontext(), self.port)
        found = self.gateway.route(MODEL)
        assert found
        assert envoy.traffic_of(dict(found[1])) == traffic

    def ask(
        self,
        path: str = "/invocations",
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        content: bytes = b"{}",
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, content, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def raw(self, content: bytes = b"") -> socket.socket:
        """A connection on which this much was sent."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        sock.sendall(content)
        return sock

    def close(self) -> None:
        self.supervisor.stop()
        for echo in self.echoes.values():
            echo.wait.set()
            echo.server.shutdown()
            echo.server.server_close()
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture(scope="module")
def benches() -> Iterator[Callable[[envoy.Limits], Bench]]:
    """One gateway for each kind of limits."""
    made: dict[envoy.Limits, Bench] = {}

    def bench(limits: envoy.Limits) -> Bench:
        if limits not in made:
            made[limits] = Bench(limits)
        for echo in made[limits].echoes.values():
            echo.wait.set()
            echo.seen.clear()
            echo.status, echo.chunks = 200, 0
        return made[limits]

    yield bench
    for one in made.values():
        one.close()


@pytest.fixture
def bench(benches: Callable[[envoy.Limits], Bench]) -> Bench:
    """A gateway with the limits that it has in life."""
    return benches(envoy.Limits())


@pytest.fixture
def tight(benches: Callable[[envoy.Limits], Bench]) -> Bench:
    """A gateway with small limits."""
    found = benches(TIGHT)
    found.route(Traffic(MODEL, "1"))
    return found


# --- chains


@pytest.mark.parametrize(("sick", "version", "attempts"), [("", "3", 1), ("3", "1", 2), ("31", "2", 3)])
def test_a_chain_is_asked_to_its_end(bench: Bench, sick: str, version: str, attempts: int) -> None:
    """Challenger, champion, fallback: the first that does not fail answers, and the answer says who was chosen and who
    it was."""
    bench.route(Traffic(MODEL, "1", "3", weight=FULL, fallback="2"))
    for one in sick:
        bench.echoes[one].status = 500
    status, headers, _ = bench.ask()
    assert (status, headers["x-model-chosen"], headers["x-model-version"]) == (200, "3", version)
    assert headers["x-envoy-attempt-count"] == str(attempts)


def test_the_shapes_fallback_comes_last(bench: Bench) -> None:
    """Where champion and previous one fail the named fallback answers; where it fails too the caller hears of it."""
    bench.route(Traffic(MODEL, "1", fallback="3", shape=Shape(fallback="2")))
    bench.echoes["1"].status = bench.echoes["3"].status = 500
    assert bench.ask()[1]["x-model-version"] == "2"
    bench.echoes["2"].status = 503
    assert bench.ask()[0] == 503
    assert [len(bench.echoes[version].seen) for version in "132"] == [2, 2, 2]


def test_a_reached_limit_goes_along_the_chain(bench: Bench) -> None:
    """A 429 of one version is no failure while another one answers; where all say so the caller gets the 429."""
    bench.route(Traffic(MODEL, "1", fallback="2"))
    bench.echoes["1"].status = 429
    assert [bench.ask()[1]["x-model-version"] for _ in range(5)] == ["2"] * 5
    bench.echoes["2"].status = 429
    assert bench.ask()[0] == 429
    bench.route(Traffic(MODEL, "1"))
    bench.echoes["1"].seen.clear()
    assert bench.ask()[0] == 429
    assert len(bench.echoes["1"].seen) == 1  # who is alone is not asked again


@pytest.mark.parametrize(
    ("method", "path", "tries"),
    [("POST", "/invocations", 2), ("POST", "/invocations?a=1", 2), ("GET", "/ping", 2), ("POST", "/other", 1)],
)
def test_only_what_may_be_asked_twice_is(bench: Bench, method: str, path: str, tries: int) -> None:
    """Scores and lookups get a second try, other requests are passed on once."""
    bench.route(Traffic(MODEL, "1", fallback="2"))
    bench.echoes["1"].status = 500
    status, _, _ = bench.ask(path, method)
    assert (status, sum(len(echo.seen) for echo in bench.echoes.values())) == (200 if tries == 2 else 500, tries)


def test_long_chains_come_and_go_with_traffic(real: LocalWorld) -> None:
    """Clusters for a chain of three are there when its traffic holds, stay for the way back, and go with the versions
    of which they are made."""
    target, gateway, fence = real.local, real.local._gateway, real.target.lease(MODEL, "me")
    target.deploy(real.version("4"), fence)
    traffic = Traffic(MODEL, "1", "4", weight=100, fallback="2")
    target.route(traffic, fence)
    assert target.traffic(MODEL) == traffic
    assert ("4", "1", "2") in envoy.chains_in(MODEL, gateway.resources("cds"))
    number = json.loads(gateway.path("cds").read_text())["version_info"]
    for again in (Traffic(MODEL, "1"), traffic, Traffic(MODEL, "1")):
        target.route(again, fence)
    assert json.loads(gateway.path("cds").read_text())["version_info"] == number
    target.retire(MODEL, "4", fence)
    assert not [chain for chain in envoy.chains_in(MODEL, gateway.resources("cds")) if "4" in chain]
    assert {reply.status for reply in real.send(5)} == {200}
    target.release(fence)


@pytest.mark.long
def test_a_crowd_survives_a_kill(real: LocalWorld) -> None:
    """kill -9 of the challenger under 64 connections: every request is answered, by the champion where it must be."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "2", weight=FULL), fence)
    replies: list[int] = []
    crowd = threading.Thread(
        target=lambda: replies.extend(reply.status for reply in _crowd(real, count=1500, at_once=64))
    )
    crowd.start()
    wait_for(lambda: real.local._gateway.active(envoy.involving(MODEL, "2", "13")) > 5, 10, "no crowd")
    real.kill("2")
    crowd.join()
    assert Counter(replies) == {200: 1500}
    real.revived("2")
    real.target.release(fence)


def _crowd(real: LocalWorld, count: int, at_once: int) -> list[object]:
    import asyncio

    return list(asyncio.run(real._send(count, "/invocations", body(1), None, at_once=at_once)))


def test_retries_are_bounded(tight: Bench) -> None:
    """Where everything fails only so many second tries are under way at once: the rest gets its failure."""
    for echo in tight.echoes.values():
        echo.status = 500
    tight.route(Traffic(MODEL, "1", fallback="2"))
    stop = threading.Event()

    def fail() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                tight.ask()

    threads = [threading.Thread(target=fail) for _ in range(10)]
    for thread in threads:
        thread.start()
    overflow = rf"^cluster\.{MODEL}-1-or-2\.upstream_rq_retry_overflow$"
    wait_for(lambda: sum(tight.gateway.stats(overflow).values()), 20, "no retry was refused")
    stop.set()
    for thread in threads:
        thread.join()


# --- pins, sticky users, priority, limits


def test_pins_go_before_weights(bench: Bench) -> None:
    """Requests of a tenant reach the pinned version, the first pin that matches; it fails over as others do; headers
    that only look like it change nothing."""
    pins = (Pin(Match("X-Tenant", "acme"), "3"), Pin(Match("x-region", "eu"), "2"))
    bench.route(Traffic(MODEL, "1", shape=Shape(pins)))

    def version(**headers: str) -> str:
        return bench.ask(headers={name.replace("_", "-"): value for name, value in headers.items()})[1][
            "x-model-version"
        ]

    assert version(x_tenant="acme") == version(X_TENANT="acme", x_region="eu") == "3"
    assert version(x_region="eu") == "2"
    assert version(x_tenant="ACME") == version(x_tenant="acme2") == version(tenant="acme") == version() == "1"
    before = envoy.served(MODEL, bench.gateway.samples())
    bench.echoes["3"].status = 500
    status, headers, _ = bench.ask(headers={"x-tenant": "acme"})
    assert (status, headers["x-model-chosen"], headers["x-model-version"]) == (200, "3", "1")
    assert bench.ask("/v/2/invocations", headers={"x-tenant": "acme"})[1]["x-model-version"] == "2"
    counts = envoy.served(MODEL, bench.gateway.samples())
    assert counts["3-header"].since(before["3-header"]).errors == 1
    assert counts["1-header"].requests == 1
    assert counts.get("3") == before.get("3")


def test_sticky_users_never_move_back(bench: Bench) -> None:
    """2,000 users over 1, 5, 25, 50 and 100 %: each share is about right, and who was answered by the challenger once
    always is. Requests without the header are dealt out by chance."""

    def who(count: int, headers: Callable[[int], dict[str, str]]) -> list[str | None]:
        found, connection = [], http.client.HTTPConnection("127.0.0.1", bench.port, timeout=30)
        for number in range(count):
            connection.request("GET", "/ping", headers=headers(number))
            answer = connection.getresponse()
            answer.read()
            found.append(answer.getheader("x-model-version"))
        connection.close()
        return found

    def user(number: int) -> dict[str, str]:
        return {"x-user": f"user-{number}"}

    before = set[int]()
    for weight in (100, 500, 2500, 5000, FULL):
        bench.route(Traffic(MODEL, "1", "2", weight=weight, shape=Shape(sticky="X-User")))
        moved = {number for number, version in enumerate(who(2000, user)) if version == "2"}
        assert before <= moved
        share = weight / FULL
        assert abs(len(moved) - 2000 * share) <= 5 * (2000 * share * (1 - share)) ** 0.5
        before = moved
    bench.route(Traffic(MODEL, "1", "2", weight=5000, shape=Shape(sticky="X-User")))
    for number in range(5):
        assert len({*who(20, lambda _, number=number: user(number))}) == 1  # type: ignore[misc]
    assert 400 < Counter(who(1000, lambda _: {}))["2"] < 600


def test_the_gateway_tells_the_servers_and_nobody_else_can(bench: Bench) -> None:
    """Servers hear of priority, limits, own paths and copies from the gateway alone: what a client says of it is taken
    away."""
    lies = {
        "x-titleshot-priority": "high",
        "x-titleshot-limits": "1=1000000",
        "x-titleshot-own-path": "1",
        "x-shadow": "1",
    }
    shape = Shape(
        (Pin(Match("x-tenant", "acme"), "3"),), None, (Limit("1", 20), Limit("2", 0.5)), Match("X-Class", "gold")
    )
    plain = Traffic(MODEL, "1", "2", mirror=FULL)

    def told(path: str = "/invocations", **headers: str) -> dict[str, str]:
        sent = lies | {name.replace("_", "-"): value for name, value in headers.items()}
        answer = json.loads(bench.ask(path, headers=sent)[2])
        return {name: value for name, value in answer.items() if name in lies}

    bench.route(plain)
    assert told() == {}
    assert told("/v/2/invocations") == {"x-titleshot-own-path": "1"}
    bench.route(Traffic(MODEL, "1", "2", mirror=FULL, shape=shape))
    limits = {"x-titleshot-limits": "1=20;2=0.5"}
    assert told() == told(x_class="silver") == told(x_tenant="acme") == limits
    bench.echoes["2"].seen.clear()
    assert told(x_class="gold") == told(x_class="gold", x_tenant="acme") == limits | {"x-titleshot-priority": "high"}
    assert told("/v/3/invocations", x_class="gold") == {"x-titleshot-own-path": "1"}
    wait_for(lambda: bench.echoes["2"].seen, 5, "no copy")
    (copy,) = bench.echoes["2"].seen
    assert {name: copy[name] for name in lies if name in copy} == {"x-shadow": "1"}


def test_priority_has_room_of_its_own(tight: Bench) -> None:
    """Where others fill all connections to a version and the places to wait, a request of priority is answered."""
    tight.route(Traffic(MODEL, "1", shape=Shape(priority=Match("x-class", "gold"))))
    echo, results = tight.echoes["1"], list[int]()
    echo.wait.clear()
    threads = [threading.Thread(target=lambda: results.append(tight.ask()[0])) for _ in range(6)]
    pending = rf"^cluster\.{MODEL}-1\.upstream_rq_pending_active$"
    for number, thread in enumerate(threads, start=1):
        thread.start()
        # One by one: while a connection is being made its request is one that waits.
        wait_for(lambda number=number: len(echo.seen) == min(number, 4), 10, "not served")  # type: ignore[misc]
    wait_for(lambda: sum(tight.gateway.stats(pending).values()) == 2, 10, "nobody waits")
    assert tight.ask()[0] == 503
    first = threading.Thread(target=lambda: results.append(tight.ask(headers={"x-class": "gold"})[0]))
    first.start()
    wait_for(lambda: len(echo.seen) == 5, 10, "priority waits")
    echo.wait.set()
    for thread in [first, *threads]:
        thread.join()
    assert results == [200] * 7


def test_limits_are_kept_by_the_servers(real: LocalWorld) -> None:
    """Beyond a version's limit the next one in its chain answers, and where that ends the caller gets 429."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "1", "2", weight=FULL, shape=Shape(limits=(Limit("2", 5),))), fence)
    replies = real.send(60)
    assert {(reply.status, reply.chosen) for reply in replies} == {(200, "2")}
    assert 1 <= Counter(reply.version for reply in replies)["2"] < 40
    real.target.route(Traffic(MODEL, "2", shape=Shape(limits=(Limit("2", 5),))), fence)
    codes = Counter(reply.status for reply in real.send(60))
    assert set(codes) == {200, 429}
    assert codes[429] > codes[200]
    assert {reply.status for reply in real.send(60, version="2")} == {200}
    real.target.release(fence)


def test_a_shape_that_cannot_be_is_refused(real: LocalWorld) -> None:
    """A header that clients cannot send, or a pin to nobody, changes nothing."""
    fence = real.target.lease(MODEL, "me")
    with pytest.raises(TargetError, match="'x user' is no header"):
        real.target.route(Traffic(MODEL, "1", shape=Shape(sticky="x user")), fence)
    with pytest.raises(TargetError, match="9 is not deployed"):
        real.target.route(Traffic(MODEL, "1", shape=Shape((Pin(Match("x-tenant", "a"), "9"),))), fence)
    assert real.target.traffic(MODEL) == Traffic(MODEL, "1")
    real.target.release(fence)


# --- too much


def test_bodies_and_headers_that_are_too_large(tight: Bench) -> None:
    """413 for a body, 431 for large headers and for many; what is below is served."""
    assert tight.ask(content=b"x" * 9_000)[0] == 200
    assert tight.ask(content=b"x" * 11_000)[0] == 413
    assert tight.ask(headers={"x-large": "x" * 3_000})[0] == 200
    assert tight.ask(headers={"x-large": "x" * 5_000})[0] == 431
    assert tight.ask(headers={f"x-{number}": "1" for number in range(20)})[0] == 200
    assert tight.ask(headers={f"x-{number}": "1" for number in range(40)})[0] == 431


def test_slow_clients_are_cut_off_and_slow_answers_are_not(tight: Bench) -> None:
    """Headers and bodies that do not come to an end are 408; an answer that streams for longer than either is whole."""
    head = b"POST /invocations HTTP/1.1\r\nhost: a\r\n"
    begin = time.monotonic()
    with tight.raw(head) as slow:
        assert b" 408 " in slow.recv(4096)
        assert 0.8 < time.monotonic() - begin < 8
    begin = time.monotonic()
    with tight.raw(head + b"content-length: 100\r\n\r\nhalf") as slow:
        assert b" 408 " in slow.recv(4096)
        assert 1.3 < time.monotonic() - begin < 8
    tight.echoes["1"].chunks = 25
    assert tight.ask()[2] == b"part" * 25


def test_idle_connections_are_closed(tight: Bench) -> None:
    """A connection on which nothing comes is closed after the time for that."""
    begin = time.monotonic()
    with tight.raw() as idle:
        assert idle.recv(1) == b""
    assert 2.5 < time.monotonic() - begin < 10


def test_too_many_requests_at_once_are_503(tight: Bench) -> None:
    """Beyond a version's connections and the places to wait the gateway sheds, and serves again afterwards."""
    echo, results = tight.echoes["1"], list[int]()
    echo.wait.clear()
    threads = [threading.Thread(target=lambda: results.append(tight.ask()[0])) for _ in range(12)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(results) >= 6, 10, "nothing is shed")
    assert set(results) == {503}
    echo.wait.set()
    for thread in threads:
        thread.join()
    # While a connection is being made its request is one that waits: so more than 6 may be too many.
    assert set(results) == {200, 503}
    assert tight.ask()[0] == 200


def _open(bench: Bench, count: int) -> list[socket.socket]:
    return [bench.raw() for _ in range(count)]


def _closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        try:
            return sock.recv(1) == b""
        except ConnectionResetError:
            return True
    return False


def test_too_many_connections_are_closed(tight: Bench) -> None:
    """One model's clients get so many connections and no more; who has one is served; room is given back."""
    wait_for(lambda: not any(one.busy("cx") for one in tight.gateway._envoys), 20, "old connections")
    held = _open(tight, 28)
    wait_for(lambda: sum(map(_closed, held)) == 8, 10, "not 8 of 28 are closed")
    with contextlib.suppress(OSError):
        assert tight.ask("/ping", "GET")[0] != 200
    for sock in held:
        sock.close()

    def served() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return tight.ask()[0] == 200
        return False

    wait_for(served, 10, "nobody is served any more")
    assert sum(tight.gateway.stats(rf"^connection_limit\.{MODEL}\.limited_connections$").values()) >= 8


def test_too_many_connections_in_all(tight: Bench) -> None:
    """All models' clients together get so many connections; the admin socket answers all the same."""
    limits, port = TIGHT, tight.port
    number = tight.number = tight.number + 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        other = free.getsockname()[1]
    route = envoy.routes("other", number, [], None, limits)
    tight.gateway.write("rds", "other", number, [route])
    listeners = [
        envoy.listener(name, at, str(tight.gateway.path("rds", name)), limits)
        for name, at in ((MODEL, port), ("other", other))
    ]
    tight.gateway.publish("lds", "", number, listeners, nullcontext())
    wait_for(lambda: not any(one.busy("cx") for one in tight.gateway._envoys), 20, "old connections")
    held = _open(tight, 18) + [socket.create_connection(("127.0.0.1", other)) for _ in range(18)]
    wait_for(lambda: sum(map(_closed, held)) >= 6, 10, "36 connections, and 30 are the limit")
    assert sum(map(_closed, held)) == 6
    assert tight.gateway.up()
    for sock in held:
        sock.close()
    number = tight.number = tight.number + 1
    tight.gateway.publish("lds", "", number, listeners[:1], nullcontext())


# --- two of them on one port


class Prober:
    """Steady requests to a gateway: on connections that stay, and each on its own. It counts what went wrong."""

    def __init__(self, port: int, rate: float = 50.0) -> None:
        self.port, self.rate, self.good = port, rate, 0
        self.bad: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            *(threading.Thread(target=self._run, args=(rate / 5, True)) for _ in range(5)),
            *(threading.Thread(target=self._run, args=(rate / 2, False)) for _ in range(2)),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.good > 10, 10, "no request is answered")
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, rate: float, keep: bool) -> None:
        connection, due = None, time.monotonic()
        while not self._stop.is_set():
            due += 1 / rate
            self._stop.wait(due - time.monotonic())
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                connection.request("POST", "/invocations", b"{}", {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                if answer.status == 200:
                    self.good += 1
                else:
                    self.bad.append(str(answer.status))
                if not keep or answer.will_close:
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException) as error:
                self.bad.append(repr(error))
                connection = None


@pytest.fixture(scope="module")
def pair() -> Iterator[Bench]:
    """Two gateways on one port."""
    bench = Bench(envoy.Limits(), count=2)
    bench.route(Traffic(MODEL, "1", fallback="2"))
    yield bench
    bench.close()


def _pids(bench: Bench) -> list[int]:
    status = bench.supervisor.status()
    return [status[name].pid for name in ("gateway", "gateway-2")]


def _signal(pid: int, what: signal.Signals) -> None:
    assert pid > 0  # 0 would be ourselves
    os.kill(pid, what)


def test_both_gateways_serve_and_count(pair: Bench) -> None:
    """The kernel deals connections out to both, and counts are those of both together."""
    before = envoy.served(MODEL, pair.gateway.samples()).get("1", Served()).requests
    for _ in range(100):
        assert pair.ask()[0] == 200
    assert envoy.served(MODEL, pair.gateway.samples())["1"].requests - before == 100
    shares = [one.stats(rf"^http\.{MODEL}\.downstream_rq_total$") for one in pair.gateway._envoys]
    assert all(int(found[f"http.{MODEL}.downstream_rq_total"]) > 20 for found in shares)


def test_a_planned_restart_loses_nothing(pair: Bench) -> None:
    """Both gateways are started anew, one after the other, under steady requests: none fails, the configuration is
    the same, and no count is lost."""
    old = _pids(pair)
    with Prober(pair.port) as prober:
        before = envoy.served(MODEL, pair.gateway.samples())["1"].requests
        seen = prober.good
        pair.gateway.restart()
        assert not {*old} & {*_pids(pair)}
        wait_for(lambda: prober.good > seen + 50, 10, "no requests")
    assert prober.bad == []
    after = envoy.served(MODEL, pair.gateway.samples())["1"].requests
    assert after - before >= prober.good - seen - 10
    found = pair.gateway.route(MODEL)
    assert found
    assert envoy.traffic_of(dict(found[1])) == Traffic(MODEL, "1", fallback="2")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody can tell the kernel where connections go")
def test_no_new_connection_is_lost_when_one_stops(pair: Bench) -> None:
    """Connections that a kernel gave to a gateway just before it stopped listening would be reset: some of thousands,
    unless it is told not to."""
    stop, bad, good = threading.Event(), list[str](), Counter[bytes]()

    def connect() -> None:
        while not stop.is_set():
            try:
                with pair.raw(b"GET /titleshot/config HTTP/1.1\r\nhost: a\r\n\r\n") as sock:
                    good[sock.recv(12)] += 1
            except OSError as error:
                bad.append(repr(error))

    threads = [threading.Thread(target=connect) for _ in range(4)]
    for thread in threads:
        thread.start()
    pair.gateway.restart()
    pair.gateway.restart()
    stop.set()
    for thread in threads:
        thread.join()
    assert bad == []
    assert set(good) == {b"HTTP/1.1 200"}
    # And afterwards both get theirs again.
    before = [_connections(one) for one in pair.gateway._envoys]
    for _ in range(60):
        pair.raw().close()
    wait_for(
        lambda: all(_connections(one) > last + 10 for one, last in zip(pair.gateway._envoys, before, strict=True)),
        10,
        "one of them gets nothing",
    )


def _connections(one: Any) -> int:
    name = f"http.{MODEL}.downstream_cx_total"
    return int(one.stats(rf"^{name}$")[name])


def test_a_stream_survives_a_planned_restart(pair: Bench) -> None:
    """An answer that is under way is whole, whichever gateway it comes through."""
    pair.echoes["1"].chunks = 30
    results: list[bytes] = []
    streams = [threading.Thread(target=lambda: results.append(pair.ask()[2])) for _ in range(6)]
    pair.echoes["1"].seen.clear()
    for stream in streams:
        stream.start()
    wait_for(lambda: len(pair.echoes["1"].seen) == 6, 10, "no streams")
    pair.gateway.restart()
    for stream in streams:
        stream.join()
    pair.echoes["1"].chunks = 0
    assert results == [b"part" * 30] * 6


def test_one_killed_gateway_leaves_the_other(pair: Bench) -> None:
    """kill -9 of one: what was in flight there is lost, nothing else; counts go on; routes move meanwhile, and who
    comes back has the new ones."""
    before = envoy.served(MODEL, pair.gateway.samples())["1"].requests
    first, _ = _pids(pair)
    with Prober(pair.port) as prober:
        _signal(first, signal.SIGKILL)
        pair.route(Traffic(MODEL, "2"))
        wait_for(lambda: _pids(pair)[0] not in {0, first} and pair.gateway.up(), 20, "it does not come back")
        seen = prober.good
        wait_for(lambda: prober.good > seen + 50, 20, "no requests")
    # At most what was in flight on connections of the dead one: at 100 requests/s of a millisecond, hardly any.
    assert len(prober.bad) <= 7
    assert envoy.served(MODEL, pair.gateway.samples())["1"].requests >= before
    numbers = {one.holds(f"http.{MODEL}.rds.{MODEL}.")[0] for one in pair.gateway._envoys}
    assert numbers == {str(pair.number)}
    assert {pair.ask()[1]["x-model-version"] for _ in range(20)} == {"2"}
    pair.route(Traffic(MODEL, "1", fallback="2"))


def test_routes_move_while_one_is_down_for_good(pair: Bench) -> None:
    """A gateway that is stopped bars no route change, and obeys it once it is back; with both down nothing is said to
    hold."""
    with pair.supervisor._rpc() as rpc:
        rpc.stopProcess("gateway-2")
        pair.route(Traffic(MODEL, "3"))
        assert {pair.ask()[1]["x-model-version"] for _ in range(5)} == {"3"}
        rpc.stopProcess("gateway")
        before = pair.gateway.path("rds", MODEL).read_text()
        with pytest.raises(TargetUnavailable, match="no gateway answers"):
            pair.route(Traffic(MODEL, "1"))
        with pytest.raises(TargetUnavailable, match="no gateway answers"):
            list(pair.gateway.samples())
        assert pair.gateway.path("rds", MODEL).read_text() == before
        rpc.startProcess("gateway-2", False)
        rpc.startProcess("gateway", False)
    wait_for(pair.gateway.up, 20, "they do not come back")
    assert {pair.ask()[1]["x-model-version"] for _ in range(20)} == {"3"}
    pair.route(Traffic(MODEL, "1", fallback="2"))


def test_a_gateway_that_hangs_never_says_yes(pair: Bench) -> None:
    """An update that never arrives: the change fails within its time, and the last good one is in force in both."""
    wait_for(pair.gateway.up, 20, "not both are up")
    _, second = _pids(pair)
    before = pair.gateway.path("rds", MODEL).read_text()
    _signal(second, signal.SIGSTOP)
    try:
        with pytest.raises(TargetUnavailable, match="gateway-2 does not answer"):
            pair.route(Traffic(MODEL, "2"))
    finally:
        _signal(second, signal.SIGCONT)
    assert pair.gateway.path("rds", MODEL).read_text() == before
    wait_for(lambda: pair.gateway.up() and pair.gateway.route(MODEL), 20, "they do not agree")
    assert {pair.ask()[1]["x-model-version"] for _ in range(20)} == {"1"}
    pair.route(Traffic(MODEL, "1", fallback="2"))


def test_trap_11_a_foreign_gateway_on_the_port_is_noticed(pair: Bench) -> None:
    """Somebody else's gateway that shares the port makes the next route change fail, and is named as the reason; the
    last good configuration stays."""
    stranger = Gateway(Supervisor(pair.home / "s"), limits=envoy.Limits())
    rds = str(stranger.path("rds", MODEL))
    stranger.write("rds", MODEL, 1, [envoy.routes(MODEL, 1, [], None, envoy.Limits())])
    stranger.write("lds", "", 1, [envoy.listener(MODEL, pair.port, rds, envoy.Limits())])
    stranger._supervisor.start()
    try:
        stranger.start()
        name, one = "listener_manager.total_listeners_active", stranger._envoys[0]
        wait_for(lambda: one.stats(f"^{name}$").get(name) == 1, 20, "the stranger does not listen")
        before = pair.gateway.path("rds", MODEL).read_text()
        with pytest.raises(TargetUnavailable, match="does another program listen"):
            pair.route(Traffic(MODEL, "2"))
        assert pair.gateway.path("rds", MODEL).read_text() == before
        assert not _free(pair.port)  # what a start of the stack would say
    finally:
        stranger._supervisor.stop()
    pair.route(Traffic(MODEL, "1", fallback="2"))


# --- files that cannot be written


def test_a_file_that_cannot_be_written_changes_nothing(pair: Bench) -> None:
    """No room, no right to write, no directory: one clear line, no half a file, and the last good one in force."""
    path = pair.gateway.path("rds", MODEL)
    before, files = path.read_text(), sorted(pair.home.glob("run/xds/**/*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(TargetUnavailable, match=r"rds\.json cannot be written \(File too large\)"):
            pair.route(Traffic(MODEL, "2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (path.read_text(), sorted(pair.home.glob("run/xds/**/*"))) == (before, files)
    taken = path.parent.parent / f".rds.{MODEL}.rds.json.new"
    taken.mkdir()
    with pytest.raises(TargetUnavailable, match=r"rds\.json cannot be written \(Is a directory\)"):
        pair.route(Traffic(MODEL, "2"))
    taken.rmdir()
    assert path.read_text() == before
    assert {pair.ask()[1]["x-model-version"] for _ in range(10)} == {"1"}


def test_a_refused_number_is_taken_back_by_both(pair: Bench) -> None:
    """What the gateways refuse is not left on the disk, and both say the old number."""
    before, held = pair.gateway.path("rds", MODEL).read_text(), pair.gateway.route(MODEL)
    route = envoy.routes(MODEL, 9999, "123", Traffic(MODEL, "1"), pair.limits) | {"no_such_field": 1}
    with pytest.raises(TargetError, match="no_such_field"):
        pair.gateway.publish("rds", MODEL, 9999, [route], nullcontext())
    assert pair.gateway.path("rds", MODEL).read_text() == before
    assert pair.gateway.route(MODEL) == held


def test_the_stack_restarts_its_gateway_without_loss(real: LocalWorld) -> None:
    """The target's own restart: both processes are new, and requests in flight and afterwards are answered."""
    assert isinstance(real.local, LocalTarget)
    names = ("gateway", "gateway-2")
    old = [real.local.supervisor.status()[name].pid for name in names]
    replies: list[int] = []
    slow = threading.Thread(target=lambda: replies.extend(reply.status for reply in real.at_once(4, x=-1.0)))
    slow.start()
    wait_for(lambda: real.local._gateway.active(envoy.involving(MODEL, "1", "23")) == 4, 10, "no requests")
    real.local.restart_gateway()
    slow.join()
    assert replies == [200] * 4
    assert not {*old} & {real.local.supervisor.status()[name].pid for name in names}
    assert real.local.ready()
    assert {reply.status for reply in real.send(20)} == {200}

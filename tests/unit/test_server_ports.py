"""The model server behind a gateway that is not ours: the port says what a request is. One real process for all tests."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("mlflow")

from deployments import counting
from deployments.artifact import digest
from deployments.counting import Counts
from deployments.local import envoy, server
from tests.contract.conftest import FLAWED, GOOD, body, make_models

HOST = "127.77.0.1"
KINDS = ("live", "shadow", "own", "pinned", "admin")
JSON = {"content-type": "application/json"}


def free(count: int) -> list[int]:
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def until(true: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class Ported:
    """A server in a process of its own, with a port for each kind."""

    def __init__(self, model: Path, *more: str) -> None:
        self.ports = dict(zip(KINDS, free(len(KINDS)), strict=True))
        command = [sys.executable, "-m", "deployments.local.server", "--model", 'flight "delay"', "--version", "3"]
        command += ["--path", str(model), "--digest", digest(model), "--host", HOST, *more]
        for kind, port in self.ports.items():
            command += ["--port" if kind == "live" else f"--{kind}-port", str(port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until(lambda: self.status("admin", "/ready") == 200 or self.process.poll() is not None)

    def url(self, kind: str, path: str = "/invocations") -> str:
        return f"http://{HOST}:{self.ports[kind]}{path}"

    def status(self, kind: str, path: str) -> int:
        try:
            return httpx.get(self.url(kind, path), trust_env=False).status_code
        except httpx.HTTPError:
            return 0

    def ask(self, kind: str, x: float = 1.0, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url(kind), content=body(x), headers={**JSON, **named}, trust_env=False)

    def samples(self) -> dict[str, dict[tuple[str, ...], float]]:
        found: dict[str, dict[tuple[str, ...], float]] = {}
        text = httpx.get(self.url("admin", "/metrics"), trust_env=False).text
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                assert (one.labels.pop("model"), one.labels.pop("version")) == ('flight "delay"', "3")
                found.setdefault(one.name, {})[tuple(one.labels.values())] = one.value
        return found

    def codes(self) -> dict[tuple[str, ...], float]:
        return {labels: count for labels, count in self.samples()["titleshot_requests_total"].items() if count}

    def kept(self) -> list[dict[str, Any]]:
        text = httpx.get(self.url("admin", "/titleshot/answers"), trust_env=False).text
        return [json.loads(line) for line in text.splitlines()]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def ported(models: Path) -> Iterator[Ported]:
    one = Ported(models / FLAWED, "--concurrency", "1", "--queue", "0", "--quiet", "0.4", "--linger", "1.5")
    yield one
    one.close()


def came(ported: Ported, before: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    now = ported.codes()
    return {labels: now[labels] - before.get(labels, 0) for labels in now if now[labels] != before.get(labels, 0)}


def test_each_page_has_its_port(ported: Ported) -> None:
    """What is not for callers is answered on the admin port only, and predictions are not answered there. A gateway's
    health checks are not counted."""
    before = ported.codes()
    for kind in ("live", "shadow", "own", "pinned"):
        assert {ported.status(kind, path) for path in ("/ping", "/health", "/version")} == {200}
        assert came(ported, before).get((kind, "200")) is None
        ours = ("/ready", "/metrics", "/titleshot/answers", "/titleshot/identity", "/%74itleshot/answers")
        assert {ported.status(kind, path) for path in ours} == {404}
        assert ported.ask(kind).status_code == 200
    for path in ("/ping", "/ready", "/metrics", "/titleshot/answers", "/titleshot/identity"):
        assert ported.status("admin", path) == 200
    assert ported.ask("admin").status_code == 404
    assert (
        httpx.get(f"http://{HOST}:{ported.ports['live']}/ping", trust_env=False).headers["x-titleshot-version"] == "3"
    )


def test_the_port_says_what_a_request_is_and_no_header_can(ported: Ported) -> None:
    """A caller who forges the local gateway's headers changes nothing; a load test is one on the own port only."""
    forged = {"x_shadow": "1", "x_titleshot_own_path": "1", "x_titleshot_load": "1"}
    before, last = ported.codes(), ported.kept()[-1]["number"]
    for kind in ("live", "shadow", "own", "pinned"):
        assert ported.ask(kind).status_code == 200
        assert ported.ask(kind, x_request_id=f"forged {kind}", **forged).status_code == 200
    assert came(ported, before) == {
        ("live", "200"): 2,
        ("shadow", "200"): 2,
        ("own", "200"): 1,
        ("load", "200"): 1,
        ("pinned", "200"): 2,
    }
    kept = [one for one in ported.kept() if one["number"] > last]
    assert [(one["shadow"], one["own_path"]) for one in kept] == [
        *[(False, False)] * 2,
        *[(True, False)] * 2,
        (False, True),
        *[(False, False)] * 2,
    ]
    assert "forged own" not in {one["request_id"] for one in kept}


def test_refusals_and_failures_are_counted_with_their_status(ported: Ported) -> None:
    """500, 400, 404, 405, 413 and 429 are counted as they were sent; whoever left before is a 499 without a latency."""
    before = ported.codes()
    times = ported.samples()["titleshot_request_seconds_count"][("live",)]
    assert ported.ask("live", 13).status_code == 500
    assert httpx.post(ported.url("live"), content=b"{", headers=JSON, trust_env=False).status_code == 400
    assert ported.status("live", "/nowhere") == 404
    assert ported.status("live", "/invocations") == 405
    limits = {"x-titleshot-limits": "3=0.01"}
    asked = [
        httpx.post(ported.url("live"), content=body(1.0), headers={**JSON, **limits}, trust_env=False) for _ in "12"
    ]
    assert [one.status_code for one in asked] == [200, 429]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(ported.url("live"), content=body(-0.3), headers=JSON, timeout=0.1, trust_env=False)
    until(lambda: came(ported, before).get(("live", "499")), 10)
    one_each = {("live", code): 1 for code in ("500", "400", "404", "405", "200", "429", "499")}
    assert came(ported, before) == one_each
    assert ported.samples()["titleshot_request_seconds_count"][("live",)] - times == 6


def test_what_is_shed_is_counted_and_what_is_under_way_is_shown(ported: Ported) -> None:
    """While the only thread is taken, the gauge shows it, and others are 503."""
    before = ported.codes()
    slow = threading.Thread(target=ported.ask, args=("live", -0.5))
    slow.start()
    until(lambda: ported.samples()["titleshot_in_flight"][("live",)] == 1, 10)
    assert ported.ask("shadow").status_code == ported.ask("live").status_code == 503
    slow.join()
    assert came(ported, before) == {("live", "200"): 1, ("live", "503"): 1, ("shadow", "503"): 1}
    assert set(ported.samples()["titleshot_in_flight"].values()) == {0}


def test_metrics_are_whole_histograms_with_the_local_gateways_buckets(ported: Ported) -> None:
    """Cumulative buckets up to +Inf, which is the count; the edges are those of the local gateway."""
    found = ported.samples()
    live = {le: count for (kind, le), count in found["titleshot_request_seconds_bucket"].items() if kind == "live"}
    assert [float(le) for le in live] == [*(edge / 1e6 for edge in envoy.EDGES_US), float("inf")]
    assert list(live.values()) == sorted(live.values())
    assert live["+Inf"] == found["titleshot_request_seconds_count"][("live",)] > 0
    assert found["titleshot_ready"][()] == 1
    assert 0 < time.time() - found["titleshot_start_time_seconds"][()] < 600
    assert tuple(edge / 1e6 for edge in envoy.EDGES_US) == counting.EDGES


def test_a_port_that_is_taken_is_one_line(models: Path) -> None:
    """Where it cannot listen it says so in one line and ends."""
    with socket.create_server((HOST, 0)) as taken:
        command = [sys.executable, str(Path(server.__file__)), "--model", "m", "--version", "3", "--host", HOST]
        command += ["--path", str(models / GOOD), "--digest", digest(models / GOOD)]
        command += ["--port", str(free(1)[0]), "--admin-port", str(taken.getsockname()[1])]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd="/", env={"PATH": os.environ["PATH"]}
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"m 3 cannot listen at {HOST}: " in done.stderr


def test_the_headers_still_say_it_where_there_is_one_port(models: Path) -> None:
    """On the local stack, with one port, the gateway's headers are believed as before, and /metrics is nowhere."""
    fixed = ["--model", "m", "--version", "3", "--path", str(models / GOOD), "--digest", "d", "--port", "80"]
    app = server.Server(server.parse(fixed))
    app.predictor = lambda body, content_type: (200, "application/json", b"{}")  # type: ignore[assignment]

    async def go() -> tuple[int, list[tuple[bool, bool]]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as one:
            for headers in ({}, {"x-shadow": "1"}, {"x-titleshot-own-path": "1"}, {"x-titleshot-load": "1"}):
                await one.post("/invocations", content=b"{}", headers=headers)
            kept = [json.loads(line) for line in (await one.get("/titleshot/answers")).text.splitlines()]
            return (await one.get("/metrics")).status_code, [(one["shadow"], one["own_path"]) for one in kept]

    assert asyncio.run(go()) == (404, [(False, False), (True, False), (False, True)])
    counted = Counter[str]()
    for (kind, _), count in app.counts._codes.items():
        counted[kind] += count
    assert +counted == {"live": 3, "shadow": 1, "own": 1, "load": 1}


def test_labels_survive_whatever_a_model_is_called() -> None:
    """Quotes, backslashes and line ends in a name come back from the text as they were."""
    name = 'a "b"\\c\nd'
    counts = Counts({"model": name, "version": "1"})
    counts.begin("live")
    counts.end("live", 200, 99.0)
    families = list(text_string_to_metric_families(counts.text({"ready": 1}).decode()))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["model"] for sample in samples} == {name}
    beyond = {one.labels["le"]: one.value for one in samples if one.name == "titleshot_request_seconds_bucket"}
    assert (beyond["30.0"], beyond["+Inf"]) == (0, 1)


def test_after_sigterm_it_is_not_ready_at_once_and_goes_on_serving(ported: Ported) -> None:
    """An idle server, too, answers for `--quiet` seconds after SIGTERM, and longer while live requests come, but no
    longer than `--linger`; each request until then is answered, and the door is closed in the end. (The last test: it
    ends the server of the others.)
    """
    time.sleep(0.5)  # longer than --quiet: it is idle
    began = time.monotonic()
    ported.process.send_signal(signal.SIGTERM)
    until(lambda: ported.status("admin", "/ready") == 503, 0.4)
    statuses = []
    while not statuses or statuses[-1]:
        connection = HTTPConnection(HOST, ported.ports["live"], timeout=5)
        try:
            connection.request("POST", "/invocations", body(1.0), JSON)
            statuses.append(connection.getresponse().status)
        except (OSError, HTTPException):
            statuses.append(0)
        connection.close()
        time.sleep(0.02)
    lasted = time.monotonic() - began
    assert {*statuses[:-1]} == {200}
    assert 1.4 < lasted < 20
    assert ported.process.wait(20) == -signal.SIGTERM

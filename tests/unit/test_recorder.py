"""The recorder before a runtime: two real processes' worth of HTTP on loopback, the runtime a small one of our own."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments import recorder

HOST = "127.78.0.1"
KINDS = ("live", "shadow", "own", "pinned", "admin")
INFER, CHAT = "/v2/models/m/infer", "/v1/chat/completions"


def free(host: str = HOST) -> int:
    with socket.create_server((host, 0)) as sock:
        return int(sock.getsockname()[1])


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class Runtime:
    """Speaks Open Inference Protocol v2 and streams chats; what it does next is set from outside."""

    def __init__(self, host: str = HOST) -> None:
        self.host, self.ready, self.fails = host, False, 0
        self.seen: list[tuple[dict[str, str], bytes]] = []
        self.go_on, self.ended, self.under_way = threading.Event(), threading.Event(), 0
        self.port = free(host)
        routes = [
            Route("/v2/health/ready", self._ready),
            Route(INFER, self._infer, methods=["POST"]),
            Route(CHAT, self._chat, methods=["POST"]),
            Route("/v2/models/m", lambda _: JSONResponse({"name": "m"})),
            Route("/v2/repository/models/m/unload", lambda _: Response(), methods=["POST"]),
            Route("/metrics", lambda _: PlainTextResponse("nv_busy 3\n")),
        ]
        self._app = Starlette(routes=routes)
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(self._app, host=self.host, port=self.port, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    async def _ready(self, _: Request) -> Response:
        return Response(status_code=200 if self.ready else 503)

    async def _infer(self, request: Request) -> Response:
        body = await request.body()
        self.seen.append((dict(request.headers), body))
        if self.fails:
            self.fails -= 1
            return JSONResponse({"error": "not yet"}, 500)
        asked = json.loads(body)
        self.under_way += 1
        try:
            while asked.get("wait") and not self.go_on.is_set():
                if await request.is_disconnected():
                    self.ended.set()
                    break
                await asyncio.sleep(0.01)
        finally:
            self.under_way -= 1
        return JSONResponse({"outputs": [], "n": asked.get("n")}, asked.get("status", 200), {"set-cookie": "a=b"})

    async def _chat(self, request: Request) -> Response:
        asked = await request.json()

        async def events() -> AsyncIterator[str]:
            try:
                for number in range(asked.get("say", 2)):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0)
                    while asked.get("wait") and not self.go_on.is_set():  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                    if asked.get("break"):
                        raise RuntimeError("out of memory")
                yield "data: [DONE]\n\n"
            finally:
                self.ended.set()

        return StreamingResponse(events(), media_type="text/event-stream")


class Recording:
    """A recorder in a process of its own."""

    def __init__(self, upstream: str, path: Path, *more: str) -> None:
        self.ports = {kind: free() for kind in KINDS}
        command = [sys.executable, "-m", "deployments.recorder", "--model", "m", "--version", "3", "--path", str(path)]
        command += ["--digest", "sha256:d", "--host", HOST, "--upstream", upstream, "--ready-path", "/v2/health/ready"]
        command += ["--infer-path", "/v2/models/*/infer", "--infer-path", CHAT, "--metrics-path", "/metrics"]
        command += ["--warm-up-path", INFER, *more]
        for kind, port in self.ports.items():
            command += ["--port" if kind == "live" else f"--{kind}-port", str(port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.client = httpx.Client(timeout=20, trust_env=False)
        until(lambda: self.get("admin", "/ping") or self.process.poll() is not None)

    def url(self, kind: str, path: str = INFER) -> str:
        return f"http://{HOST}:{self.ports[kind]}{path}"

    def get(self, kind: str, path: str) -> int:
        try:
            return self.client.get(self.url(kind, path)).status_code
        except httpx.HTTPError:
            return 0

    def ready(self) -> int:
        return self.get("admin", "/ready")

    def ask(self, kind: str = "live", headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        return httpx.post(self.url(kind), json=fields, headers=headers, timeout=20, trust_env=False)

    def kept(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.client.get(self.url("admin", "/titleshot/answers")).text.splitlines()]

    def codes(self) -> dict[tuple[str, str], float]:
        text = self.client.get(self.url("admin", "/metrics")).text
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        counts = [one for one in samples if one.name == "titleshot_requests_total" and one.value]
        return {(one.labels["kind"], one.labels["code"]): one.value for one in counts}

    def close(self) -> str:
        self.client.close()
        self.process.kill()
        return self.process.communicate()[1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact")
    example = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 1], "data": [1.0]}]}
    (path / "serving_input_example.json").write_text(json.dumps(example))
    return path


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    one = Runtime()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def recording(runtime: Runtime, artifact: Path) -> Iterator[Recording]:
    """A recorder whose runtime was first not ready, and then failed its example twice."""
    one = Recording(f"http://{HOST}:{runtime.port}", artifact, "--concurrency", "2", "--queue", "2", "--timeout", "5")
    try:
        assert one.ready() == 503
        early = one.ask()
        assert (early.status_code, early.headers["retry-after"]) == (503, "1")
        assert not runtime.seen
        runtime.fails, runtime.ready = 2, True
        until(lambda: one.ready() == 200)
        assert len(runtime.seen) == 3
        assert {body for _, body in runtime.seen} == {(artifact / "serving_input_example.json").read_bytes()}
        yield one
    finally:
        one.close()


@pytest.fixture(autouse=True)
def calm(runtime: Runtime) -> Iterator[None]:
    runtime.go_on.clear()
    runtime.ended.clear()
    yield
    runtime.go_on.set()
    until(lambda: runtime.under_way == 0)


def came(recording: Recording, before: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    return {key: count - before.get(key, 0) for key, count in recording.codes().items() if count != before.get(key, 0)}


def test_what_passes_is_counted_and_kept_by_its_port(recording: Recording, runtime: Runtime) -> None:
    """The answer is the runtime's with our version; ring and counts say which port it came to, whatever headers say."""
    before, last = recording.codes(), len(recording.kept())
    forged = {"x-shadow": "1", "x-titleshot-own-path": "1", "x-titleshot-load": "1", "x-request-id": "r"}
    for number, kind in enumerate(("live", "shadow", "own", "pinned")):
        answer = recording.ask(kind, {**forged, "authorization": "Bearer t"}, n=number)
        assert (answer.status_code, answer.json()["n"]) == (200, number)
        assert (answer.headers["x-titleshot-version"], answer.headers["set-cookie"]) == ("3", "a=b")
        assert len(answer.headers.get_list("date")) == 1
    assert recording.ask("own", n=9).status_code == 200
    kinds = ("live", "shadow", "load", "pinned", "own")
    assert came(recording, before) == {(kind, "200"): 1 for kind in kinds}
    kept = recording.kept()[last:]
    assert [(one["shadow"], one["own_path"], json.loads(one["response"])["n"]) for one in kept] == [
        (False, False, 0),
        (True, False, 1),
        (False, False, 3),
        (False, True, 9),
    ]
    assert json.loads(kept[0]["request"]) == {"n": 0}
    passed = runtime.seen[-2][0]
    assert (passed["x-request-id"], passed["authorization"]) == ("r", "Bearer t")
    assert not {"x-shadow", "x-titleshot-own-path", "x-titleshot-load"} & {*passed}
    assert passed["host"] == f"{HOST}:{runtime.port}"
    assert "cookie" not in passed


def test_errors_of_the_runtime_are_its_own(recording: Recording) -> None:
    """Its 4xx and 5xx pass as they are, and are kept."""
    before = recording.codes()
    assert [recording.ask(status=status).status_code for status in (422, 500)] == [422, 500]
    assert came(recording, before) == {("live", "422"): 1, ("live", "500"): 1}
    assert [one["status"] for one in recording.kept()[-2:]] == [422, 500]


def test_nobody_reaches_what_is_not_for_callers(recording: Recording) -> None:
    """Only predictions and a runtime's description pass; neither unloading a model nor its metrics, by whatever path."""
    unload = "/v2/repository/models/m/unload"
    for path in (unload, f"/v2/models/..{unload[3:]}", "/v2/models/m/../m/infer", "/v2/models/a%2fb/infer", "//v2"):
        connection = HTTPConnection(HOST, recording.ports["live"], timeout=20)  # it sends a path as it is
        connection.request("POST", path, b"{}")
        assert connection.getresponse().status == 404, path
        connection.close()
    assert {recording.get("live", path) for path in ("/metrics", "/titleshot/answers", "/ready")} == {404}
    before = recording.codes()
    assert {recording.get("live", path) for path in ("/v2/health/ready", "/v2/models/m")} == {200}
    assert recording.codes() == before
    assert recording.get("live", INFER) == 405
    assert recording.get("admin", "/titleshot/identity") == 200
    assert recording.client.get(recording.url("admin", "/metrics/runtime")).text == "nv_busy 3\n"


def test_a_stream_passes_event_by_event_and_is_kept_whole(recording: Recording, runtime: Runtime) -> None:
    """The first event is there while the runtime still works on the second."""
    asked = {"json": {"say": 2, "wait": True}, "headers": {"x-request-id": "chat"}}
    with recording.client.stream("POST", recording.url("live", CHAT), **asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.iter_text()
        assert next(events) == "data: 0\n\n"
        runtime.go_on.set()
        assert "".join(events) == "data: 1\n\ndata: [DONE]\n\n"
    until(lambda: recording.kept()[-1]["request_id"] == "chat")
    assert recording.kept()[-1]["response"] == "data: 0\n\ndata: 1\n\ndata: [DONE]\n\n"


def test_a_stream_that_breaks_off_is_no_whole_one(recording: Recording) -> None:
    """Where the runtime cuts its answer, so do we; the ring has what came, with a 502."""
    cut = pytest.raises(httpx.RemoteProtocolError)
    with recording.client.stream("POST", recording.url("live", CHAT), json={"break": True}) as answer, cut:
        answer.read()
    until(lambda: recording.kept()[-1]["status"] == 502)
    assert recording.kept()[-1]["response"] == "data: 0\n\n"


def test_who_leaves_is_not_worked_for(recording: Recording, runtime: Runtime) -> None:
    """When a caller hangs up, the runtime hears of it: in the middle of a stream, and before any answer, which counts as
    499 and is not kept."""
    with recording.client.stream("POST", recording.url("live", CHAT), json={"say": 10**9}) as answer:
        next(answer.iter_text())
    assert runtime.ended.wait(10)
    runtime.ended.clear()
    before, kept = recording.codes(), recording.kept()[-1]["number"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(recording.url("live"), json={"wait": True}, timeout=0.3, trust_env=False)
    assert runtime.ended.wait(10)
    until(lambda: came(recording, before) == {("live", "499"): 1}, 10)
    assert recording.kept()[-1]["number"] == kept


def test_beyond_its_places_it_sheds_copies_first(recording: Recording, runtime: Runtime) -> None:
    """Two at once, two wait; a live request takes the place of a copy that waits, and what is more is a 503."""
    statuses: dict[str, int] = {}

    def ask(name: str, kind: str) -> None:
        statuses[name] = recording.ask(kind, wait=True).status_code

    def started(name: str, kind: str) -> threading.Thread:
        thread = threading.Thread(target=ask, args=(name, kind))
        thread.start()
        return thread

    def in_flight(kind: str, count: int) -> bool:
        return f'titleshot_in_flight{{model="m",version="3",kind="{kind}"}} {count}\n' in metrics(recording)

    threads = [started(name, "live") for name in ("a", "b")]
    until(lambda: runtime.under_way == 2)
    threads.append(started("copy", "shadow"))
    until(lambda: in_flight("shadow", 1))
    assert recording.ask("shadow").status_code == 503  # copies fill half of the line
    threads.append(started("c", "live"))
    until(lambda: in_flight("live", 3))
    threads.append(started("d", "live"))
    until(lambda: statuses.get("copy") == 503)
    assert recording.ask().status_code == 503
    runtime.go_on.set()
    for thread in threads:
        thread.join()
    assert statuses == {"a": 200, "b": 200, "c": 200, "d": 200, "copy": 503}
    assert recording.ask().status_code == 200


def metrics(recording: Recording) -> str:
    return recording.client.get(recording.url("admin", "/metrics")).text


def test_beyond_its_limit_it_refuses(recording: Recording) -> None:
    """What the gateway allows per second holds here as well; copies are no part of it."""
    limits = {"x-titleshot-limits": "2=100;3=0.01"}
    assert [recording.ask("live", limits).status_code for _ in "12"] == [200, 429]
    assert recording.ask("shadow", limits).status_code == 200


def test_a_runtime_that_goes_away_is_a_502_until_it_is_back_and_warm(recording: Recording, runtime: Runtime) -> None:
    """While nobody listens requests are 502 and we are not ready; a new one is warmed up first. A connection that it had
    closed is no failure.
    """
    assert recording.ask().status_code == 200
    runtime.stop()
    before, warmed = recording.codes(), len(runtime.seen)
    assert recording.ask().status_code == 502
    assert came(recording, before) == {("live", "502"): 1}
    until(lambda: recording.ready() == 503)
    runtime.start()
    until(lambda: recording.ready() == 200)
    assert len(runtime.seen) == warmed + 1
    assert recording.ask().status_code == 200


class Rude:
    """Closes a connection without a word whenever a second request comes over it, as llama.cpp does after a stream; to
    a request "die" it gives no byte at all."""

    def __init__(self) -> None:
        self._sock, self.asked, self.connections = socket.create_server((HOST, 0)), 0, 0
        self.port = self._sock.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._sock.accept()
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            data = b""
            while b"\r\n\r\n" not in data or (b"POST" in data and not data.endswith(b"}")):
                if not (part := connection.recv(65536)):
                    return
                data += part
            if b"die" not in data:
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                self.asked += b"POST" in data
                connection.recv(65536)  # the next request, which is not answered


def test_a_connection_closed_meanwhile_is_no_failure(artifact: Path) -> None:
    """A request over a kept connection that ends without a byte is sent again over another one; one that ends so on a
    new connection is a 502. What was warmed up with was JSON given on the command line.
    """
    rude = Rude()
    more = ("--warm-up-body", '{"warm": 1}', "--upstream", f"http://{HOST}:{rude.port}")
    one = Recording("http://127.0.0.1:1", artifact, *more)
    try:
        until(lambda: one.ready() == 200)
        assert [one.ask(n=n).status_code for n in range(5)] == [200] * 5
        assert rude.asked == 6
        assert one.ask(n="die").status_code == 502
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(20) == -signal.SIGTERM
    finally:
        one.close()


def test_a_runtime_that_refuses_its_example_is_not_served(runtime: Runtime, artifact: Path) -> None:
    """It ends with one line that says what the runtime said."""
    runtime.ready = True
    one = Recording(f"http://{HOST}:{runtime.port}", artifact, "--warm-up-body", '{"status": 422}')
    assert one.process.wait(20) == 1
    said = one.close()
    assert said.count("\n") == 1, said
    assert "m 3 cannot be served: the example is answered with 422" in said


@pytest.mark.parametrize(
    ("path", "example", "suits"),
    [
        (INFER, {"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [1]}]}, True),
        (INFER, {"inputs": [[1.0]]}, False),
        (INFER, {"dataframe_split": {}}, False),
        (CHAT, {"messages": []}, True),
        (CHAT, {"dataframe_split": {}}, False),
        ("/v1/models/m:predict", {"instances": [1]}, True),
        ("/predictions/m", [1], False),
    ],
)
def test_only_an_example_in_the_runtimes_own_form_is_sent(path: str, example: object, suits: bool) -> None:
    """MLflow's input examples are none for a runtime with another protocol."""
    assert recorder._suits(path, example) is suits


def test_a_chat_is_warmed_up_without_an_example(tmp_path: Path) -> None:
    """A model that chats needs no example: one word for one token."""
    fixed = ["--model", "m", "--version", "3", "--path", str(tmp_path), "--digest", "d", "--port", "1"]
    options = recorder.parse([*fixed, "--ready-path", "/health", "--infer-path", CHAT])
    asked = json.loads(recorder.Recorder(options)._example() or b"")
    assert (asked["model"], asked["max_tokens"]) == ("m", 1)
    assert recorder.Recorder(recorder.parse([*fixed, "--ready-path", "/", "--infer-path", INFER]))._example() is None

"""Streams of the model server, and its end: over real connections, since both are about how bytes arrive."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import uvicorn

pytest.importorskip("mlflow")
import mlflow

from deployments.artifact import digest
from deployments.local import server
from deployments.local.server import Server, parse

TALKER = """
import time
from pathlib import Path

import mlflow

def wait(path):
    while path and not Path(path).exists():
        time.sleep(0.005)

class Talker(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        wait(model_input["until"].iloc[0] if "until" in model_input else "")
        return ["whole"]

    def predict_stream(self, context, model_input, params=None):
        ask = model_input
        try:
            for number in range(ask.get("say", 2)):
                if number == ask.get("fail_at"):
                    raise ValueError("lost the thread")
                yield {"n": number, "text": "x" * ask.get("size", 1), "again": ask.get("messages")}
                wait(ask.get("until"))
        finally:
            if ask.get("ended"):
                Path(ask["ended"]).touch()

mlflow.models.set_model(Talker())
"""
MUTE = """
import mlflow
from mlflow.types.llm import ChatCompletionResponse

class Mute(mlflow.pyfunc.ChatModel):
    def predict(self, context, messages, params):
        whole = {"message": {"role": "assistant", "content": "whole"}}
        return ChatCompletionResponse.from_dict({"choices": [whole]})

mlflow.models.set_model(Mute())
"""
PLAIN = """
import mlflow

class Plain(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return ["whole"]

mlflow.models.set_model(Plain())
"""
STREAM = {"accept": "text/event-stream", "content-type": "application/json"}
Asked = Callable[..., Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, code in (("talker", TALKER), ("mute", MUTE), ("plain", PLAIN)):
        (root / f"{name}.py").write_text(code)
        mlflow.pyfunc.save_model(root / name, python_model=str(root / f"{name}.py"), pip_requirements=["mlflow"])
    return root


class Running:
    """A model server in a thread of this process, and a client of it."""

    def __init__(self, path: Path, *more: str) -> None:
        fixed = ["--model", "m", "--version", "3", "--path", str(path), "--digest", "d", "--port", "0"]
        self.app = Server(parse([*fixed, *more]))
        self.app.load()
        config = uvicorn.Config(self.app, port=0, lifespan="off", ws="none", log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.address = ("127.0.0.1", port)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join()

    def ask(self, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        return self.client.post("/invocations", content=body(**fields), headers={**STREAM, **(headers or {})})

    def stream(self, headers: dict[str, str] | None = None, **fields: object) -> Any:
        asked = {**STREAM, **(headers or {})}
        return self.client.stream("POST", "/invocations", content=body(**fields), headers=asked)

    def kept(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.client.get("/titleshot/answers").text.splitlines()]


@pytest.fixture(scope="module")
def start(models: Path) -> Iterator[Callable[..., Running]]:
    begun: list[Running] = []

    def start(name: str, *more: str) -> Running:
        begun.append(Running(models / name, *more))
        return begun[-1]

    yield start
    for one in begun:
        one.close()


@pytest.fixture(scope="module")
def talker(start: Callable[..., Running]) -> Running:
    return start("talker")


def body(**fields: object) -> bytes:
    return json.dumps({"dataframe_records": [fields or {"say": 2}]}).encode()


def until(true: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until `true()` is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def until_cut(answer: httpx.Response) -> str:
    """What arrives of an answer that has no proper end."""
    received = ""
    try:
        for text in answer.iter_text():
            received += text
    except httpx.RemoteProtocolError:
        return received
    raise AssertionError(f"this is a whole answer: {received}")


def chunks(text: str) -> list[Any]:
    events = text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_each_chunk_is_there_when_the_model_says_it(talker: Running, tmp_path: Path) -> None:
    """The first event arrives while the model still works on the second; the last one is [DONE]."""
    with talker.stream(say=2, until=str(tmp_path / "go")) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["x-titleshot-version"] == "3"
        events = answer.iter_text()
        first = next(events)
        assert json.loads(first.removeprefix("data: "))["n"] == 0
        (tmp_path / "go").touch()
        rest = "".join(events)
    assert [chunk["n"] for chunk in chunks(first + rest)] == [0, 1]


def test_a_stream_is_kept_as_one_answer(talker: Running) -> None:
    """In the ring a stream is one answer whose body is all that was sent."""
    answer = talker.ask({"x-request-id": "whole stream", "x-shadow": "1"}, say=3)
    kept = talker.kept()[-1]
    assert (kept["request_id"], kept["status"], kept["shadow"]) == ("whole stream", 200, True)
    assert kept["response"] == answer.text
    assert kept["request"] == body(say=3).decode()


def test_who_does_not_ask_for_a_stream_gets_a_whole_answer(talker: Running) -> None:
    """Without text/event-stream in `accept` a model that can stream is asked for one answer."""
    answer = talker.ask({"accept": "*/*"}, say=3)
    assert answer.json() == {"predictions": ["whole"]}


def test_a_conversation_is_read_as_mlflow_reads_it(talker: Running) -> None:
    """The request goes through MLflow's own code: its forms for conversations are understood, too."""
    messages = [{"role": "user", "content": "hello"}]
    answer = talker.client.post("/invocations", json={"messages": messages, "say": 1}, headers=STREAM)
    assert chunks(answer.text)[0]["again"] == messages


@pytest.mark.parametrize("name", ["plain", "mute"])
def test_a_model_that_cannot_stream_says_so(start: Callable[..., Running], name: str) -> None:
    """Where only a stream is accepted and the model has none, it is 406; where JSON would do, JSON it is."""
    running = start(name)
    content = {"messages": [{"role": "user", "content": "hello"}]}
    answer = running.client.post("/invocations", json=content, headers=STREAM)
    assert answer.status_code == 406, answer.text
    assert answer.json() == {
        "error_code": "BAD_REQUEST",
        "message": "this model does not stream: accept application/json instead of text/event-stream",
    }
    if name == "plain":
        both = {**STREAM, "accept": "text/event-stream, application/json"}
        assert running.client.post("/invocations", json=content, headers=both).status_code == 200


def test_an_error_before_the_first_chunk_is_an_ordinary_error(talker: Running) -> None:
    """As long as nothing was sent, the status says whose mistake it was, and the gateway may try elsewhere."""
    assert talker.client.post("/invocations", content=b"{", headers=STREAM).status_code == 400
    answer = talker.ask(say=2, fail_at=0)
    assert (answer.status_code, answer.json()["error_code"]) == (500, "INTERNAL_ERROR")
    assert "lost the thread" in answer.json()["message"]
    many = json.dumps({"dataframe_records": [{"say": 1}, {"say": 2}]}).encode()
    assert talker.client.post("/invocations", content=many, headers=STREAM).status_code == 500
    csv = talker.client.post("/invocations", content=b"x", headers={**STREAM, "content-type": "text/plain"})
    assert csv.status_code == 415


def test_an_error_in_mid_stream_cuts_it(talker: Running) -> None:
    """The last event is the error, and there is no proper end: a client cannot take it for a whole answer."""
    with talker.stream({"x-request-id": "cut"}, say=3, fail_at=2) as answer:
        received = until_cut(answer)
    *said, error, nothing = received.split("\n\n")
    assert (len(said), nothing) == (2, "")
    kind, _, data = error.partition("\n")
    assert kind == "event: error"
    assert "lost the thread" in json.loads(data.removeprefix("data: "))["message"]
    until(lambda: talker.kept()[-1]["request_id"] == "cut")
    kept = talker.kept()[-1]
    assert (kept["status"], kept["response"]) == (500, received)


def test_a_client_that_leaves_stops_the_model(talker: Running, tmp_path: Path) -> None:
    """When the client hangs up, the model's generator is closed at its next chunk, and nothing is kept."""
    ended = tmp_path / "ended"
    with talker.stream({"x-request-id": "left"}, say=10**9, ended=str(ended)) as answer:
        next(answer.iter_text())
    until(ended.exists)
    until(lambda: talker.app._room == 258)
    assert "left" not in {one["request_id"] for one in talker.kept()}


def test_a_stream_takes_the_place_of_a_prediction(start: Callable[..., Running], tmp_path: Path) -> None:
    """While it lasts, a stream counts like a prediction under way."""
    running = start("talker", "--concurrency", "1", "--queue", "0")
    with running.stream(say=1, until=str(tmp_path / "go")) as answer:
        events = answer.iter_text()
        next(events)
        assert httpx.post(f"{running.client.base_url}/invocations", content=b"{}", trust_env=False).status_code == 503
        (tmp_path / "go").touch()
        assert "[DONE]" in "".join(events)
    until(lambda: running.app._room == 1)
    assert running.ask(say=1).status_code == 200


def test_a_copys_stream_gives_way_to_a_live_request(start: Callable[..., Running], tmp_path: Path) -> None:
    """An endless stream that is a copy ends as soon as a live request waits for its thread."""
    running = start("talker", "--concurrency", "1")
    with running.stream({"x-shadow": "1"}, say=10**9, ended=str(tmp_path / "ended")) as answer:
        events = answer.iter_text()
        next(events)
        assert running.ask(say=1).status_code == 200
    assert (tmp_path / "ended").exists()
    assert [(one["status"], one["shadow"]) for one in running.kept()] == [(503, True), (200, False)]


def test_a_client_that_does_not_read_loses_its_stream(start: Callable[..., Running], tmp_path: Path) -> None:
    """Who does not take what it asked for within `timeout` does not keep the thread."""
    running = start("talker", "--concurrency", "1", "--timeout", "0.3")
    content = body(say=10**6, size=10**5, ended=str(tmp_path / "ended"))
    with socket.create_connection(running.address) as sock:
        head = (
            f"POST /invocations HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\ncontent-length: {len(content)}\r\n"
        )
        sock.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
        until((tmp_path / "ended").exists)
        until(lambda: running.app._room == 257)
    assert running.ask(say=1).status_code == 200


def test_a_model_that_falls_silent_loses_its_stream(start: Callable[..., Running], tmp_path: Path) -> None:
    """Where no chunk comes within `timeout`, the stream is cut; before the first one it is a 504."""
    running = start("talker", "--timeout", "0.3")
    silent = {"until": str(tmp_path / "go"), "ended": str(tmp_path / "ended")}
    with running.stream(say=9, **silent) as answer:
        assert until_cut(answer).count("data: ") == 1
    assert [one["status"] for one in running.kept()] == [504]
    (tmp_path / "go").touch()
    until((tmp_path / "ended").exists)


def test_a_stream_too_long_to_keep_is_sent_all_the_same(start: Callable[..., Running]) -> None:
    """What the ring cannot hold leaves a gap in its numbers and nothing else."""
    running = start("talker", "--keep-bytes", "1000")
    sizes = [(2, 1), (50, 1000), (2, 1)]
    assert [len(chunks(running.ask(say=say, size=size).text)) for say, size in sizes] == [2, 50, 2]
    assert [one["number"] for one in running.kept()] == [0, 2]


class Process:
    """A model server as it runs in earnest."""

    def __init__(self, model: Path) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        command = [sys.executable, str(Path(server.__file__)), "--model", "m", "--version", "3", "--path", str(model)]
        command += ["--digest", digest(model), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        until(lambda: self.ready() == 200, 60)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ready(self) -> int:
        """The status of /ready over a new connection; 0 where nothing listens."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status
        except (OSError, HTTPException):
            return 0
        finally:
            connection.close()

    def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)


def test_what_is_under_way_ends_after_sigterm(models: Path, tmp_path: Path) -> None:
    """After SIGTERM a stream, a prediction and a request that waits for a thread still get their whole answers;
    then the process ends.
    """
    go_on, answers = str(tmp_path / "go"), dict[str, httpx.Response]()
    with Process(models / "talker") as one:
        url = f"http://127.0.0.1:{one.port}/invocations"

        def ask(name: str, headers: dict[str, str]) -> None:
            content = body(say=2, until=go_on)
            answers[name] = httpx.post(url, content=content, headers=headers, timeout=30, trust_env=False)

        json_ = {"content-type": "application/json"}
        threads = [
            threading.Thread(target=ask, args=(name, headers))
            for name, headers in (("stream", STREAM), ("prediction", json_), ("waiting", json_))
        ]
        for thread in threads:
            thread.start()
        with HTTPConnectionTo(one.port) as known:
            until(lambda: known.established() >= 4)
            one.stop()
            until(lambda: one.ready() != 200)
            until(lambda: one.ready() == 0)  # the door is closed, and those inside are served
        assert not answers
        assert one.process.poll() is None
        Path(go_on).touch()
        for thread in threads:
            thread.join()
        assert chunks(answers.pop("stream").text)
        assert {name: answer.json() for name, answer in answers.items()} == {
            "prediction": {"predictions": ["whole"]},
            "waiting": {"predictions": ["whole"]},
        }
        assert one.process.wait(20) == -signal.SIGTERM
        assert one.process.stderr is not None
        assert "Traceback" not in one.process.stderr.read()


class HTTPConnectionTo:
    """One idle connection to a port, and a count of all that are established there."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> Self:
        self._sock = socket.create_connection(("127.0.0.1", self._port))
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def established(self) -> int:
        """How many connections the server has."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(row[1].endswith(f":{self._port:04X}") and row[3] == "01" for row in rows)


def test_callers_who_heed_ready_lose_nothing_at_sigterm(models: Path) -> None:
    """A busy server says at once that it is not ready and goes on answering until it was heard: who asks until
    then, over kept or new connections, gets an answer to each request.
    """
    with Process(models / "talker") as one:
        statuses, stopped = list[int](), threading.Event()

        def keep_asking(*, anew: bool) -> None:
            connection = HTTPConnection("127.0.0.1", one.port, timeout=20)
            while not stopped.is_set():
                if anew:
                    connection.close()
                try:
                    connection.request("POST", "/invocations", body(say=1), {"content-type": "application/json"})
                    answer = connection.getresponse()
                    answer.read()
                    statuses.append(answer.status)
                except (OSError, HTTPException):
                    statuses.append(0)
            connection.close()

        threads = [threading.Thread(target=keep_asking, kwargs={"anew": anew}) for anew in (False, True, False)]
        for thread in threads:
            thread.start()
        until(lambda: len(statuses) > 30)
        one.stop()
        until(lambda: one.ready() == 503)
        stopped.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200}
        one.process.wait(20)

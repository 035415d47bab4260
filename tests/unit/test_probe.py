"""What a probe makes of versions that answer, fail, hang up, are slow, or go away meanwhile."""

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.target import Endpoint, TargetUnavailable, Traffic
from tasks.probe import as_dict, probe
from tasks.settings import Mistake, Settings

SEEN: list[tuple[str, str, bytes]] = []


class Gateway(BaseHTTPRequestHandler):
    """Answers by the version in the path: 5 fails, 6 hangs up, 7 takes its time, 8 fails every second time."""

    count = 0

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["content-length"])))

    def _answer(self, body: bytes) -> None:
        SEEN.append((self.command, self.path, body))
        version = self.path.split("/")[2]
        if version == "6":
            self.close_connection = True
            return
        if version == "7":
            time.sleep(0.05)
        Gateway.count += 1
        self.send_response(500 if version == "5" or (version == "8" and Gateway.count % 2) else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@dataclass
class Target:
    """As much of a target as a probe looks at. `then` is what is deployed when it looks again."""

    url: str
    obeyed: Traffic | None
    versions: tuple[str, ...]
    then: tuple[str, ...] | None = None
    looks: list[int] = field(default_factory=list)

    def models(self) -> tuple[str, ...]:
        return ("m",)

    def traffic(self, model: str) -> Traffic | None:
        return self.obeyed

    def deployed(self, model: str) -> Mapping[str, Endpoint]:
        self.looks.append(1)
        versions = self.then if self.then is not None and len(self.looks) > 1 else self.versions
        return {one: Endpoint("m", one, f"{self.url}/v/{one}", "") for one in versions}


def look(target: Any, home: Path, **asked: Any) -> dict[str, Any]:
    return as_dict(probe(Settings(home=home), target, **asked))


def test_every_version_is_asked_its_stored_example_on_its_own_path(url: str, tmp_path: Path) -> None:
    """The example goes to the version's own path, which is no live traffic; without one its health is asked for."""
    example = tmp_path / "models" / "m" / "1" / "serving_input_example.json"
    example.parent.mkdir(parents=True)
    example.write_bytes(b'{"inputs": [1]}')
    SEEN.clear()
    found = look(Target(url, Traffic("m", "1", "2"), ("2", "1")), tmp_path, requests=2)
    assert SEEN.count(("POST", "/v/1/invocations", b'{"inputs": [1]}')) == 2
    assert SEEN.count(("GET", "/v/2/ping", b"")) == 2
    (model,) = found["models"]
    assert [(one["version"], one["role"], one["failed"]) for one in model["versions"]] == [
        ("1", "champion", 0),
        ("2", "challenger", 0),
    ]
    assert found["problems"] == []


@pytest.mark.parametrize(
    ("champion", "why"),
    [
        ("5", "m: its champion v5 does not answer: status 500"),
        ("6", "m: its champion v6 does not answer: no answer"),
        ("8", "m: its champion v8 failed 2 of 4 requests: status 500"),
        ("7", "m: its champion v7 is slow: median"),
    ],
)
def test_a_champion_that_does_not_serve_is_a_problem(url: str, tmp_path: Path, champion: str, why: str) -> None:
    """Failing, silent, flaky and slow champions are told apart, each in one sentence."""
    found = look(Target(url, Traffic("m", champion), (champion,)), tmp_path, requests=4, slow_ms=40)
    (problem,) = found["problems"]
    assert problem.startswith(why)


def test_a_version_that_was_taken_down_meanwhile_did_not_fail(url: str, tmp_path: Path) -> None:
    """A promotion may end while we ask: what is not deployed any more is left out."""
    found = look(Target(url, Traffic("m", "1"), ("1", "5"), then=("1",)), tmp_path)
    assert [one["version"] for one in found["models"][0]["versions"]] == ["1"]
    assert found["problems"] == []


def test_a_champion_that_is_not_deployed_is_a_problem(url: str, tmp_path: Path) -> None:
    """Traffic that names a version without a server is reported first."""
    assert look(Target(url, Traffic("m", "1"), ("2",)), tmp_path)["problems"] == ["m: its champion v1 is not deployed"]


def test_a_gateway_that_does_not_answer_is_a_problem(url: str, tmp_path: Path) -> None:
    """A target that cannot say who serves is reported in its own words, and the probe goes on."""

    class Away(Target):
        def traffic(self, model: str) -> Traffic | None:
            raise TargetUnavailable("the gateway is away")

    assert look(Away(url, None, ()), tmp_path)["problems"] == ["m: the gateway is away"]


def test_wrong_use_is_refused(url: str, tmp_path: Path) -> None:
    """A model that is not served, or no request at all, is the user's mistake."""
    target = Target(url, Traffic("m", "1"), ("1",))
    with pytest.raises(Mistake, match="not served here"):
        look(target, tmp_path, model="other")
    with pytest.raises(Mistake, match="one at least"):
        look(target, tmp_path, requests=0)

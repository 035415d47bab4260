"""What one version fails, another answers: the chain, what is passed on, and what is left to the caller."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deployments.relay import Relay, chain


class Other:
    """Another version's server: answers with a status, and keeps what it was asked."""

    def __init__(self) -> None:
        self.status, self.asked = 200, list[tuple[str, dict[str, str], bytes]]()
        other = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                other.asked.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
                said = json.dumps({"by": other.status}).encode()
                self.send_response(other.status)
                self.send_header("content-length", str(len(said)))
                self.send_header("x-titleshot-version", "1")
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def other() -> Iterator[Other]:
    made = Other()
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(place: str, status: int, after: list[str]) -> tuple[int, dict[bytes, bytes], bytes]:
    """What a caller gets of version 3, which answers with `status` itself."""

    async def answer(receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-titleshot-version", b"3")]})
        await send({"type": "http.response.body", "body": b"its own"})

    async def run() -> list[dict[str, Any]]:
        parts = [
            {"type": "http.request", "body": part, "more_body": part == b"first "} for part in (b"first ", b"last")
        ]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return parts.pop(0)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", b"there"), (b"x-request-id", b"r-1"), (b"x-titleshot-fallback", b"forged")]
        scope = {"method": "POST", "raw_path": b"/invocations", "query_string": b"a=1", "headers": headers}
        relay = Relay(place, "3", 5)
        await relay(answer, scope, receive, send, after)
        await relay.close()
        return sent

    start, *bodies = asyncio.run(run())
    return start["status"], dict(start["headers"]), b"".join(one.get("body", b"") for one in bodies)


def test_who_comes_after_whom() -> None:
    """A version in the chain goes on behind itself; one that is not in it begins at its beginning."""
    assert chain("1,5,2", "3") == ["1", "5", "2"]
    assert chain("1, 5,2", "5") == ["2"]
    assert chain("2", "2") == chain("", "2") == []
    assert chain("1,http://evil/,5", "3") == ["1", "5"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_fails_is_answered_by_the_next(other: Other, status: int) -> None:
    """The same request, body and id; the answer says who was meant, and how many were asked."""
    got, headers, body = ask(f"http://127.0.0.1:{other.server.server_port}/v/{{version}}", status, ["1", "5"])
    assert (got, json.loads(body)) == (200, {"by": 200})
    assert (headers[b"x-titleshot-version"], headers[b"x-titleshot-chosen"]) == (b"1", b"3")
    assert headers[b"x-titleshot-attempts"] == b"2"
    ((path, told, content),) = other.asked
    assert (path, content) == ("/v/1/invocations?a=1", b"first last")
    assert (told["x-request-id"], told["x-titleshot-fallback"]) == ("r-1", "5")


@pytest.mark.parametrize("status", [200, 400, 404, 499])
def test_what_is_no_failure_stays(other: Other, status: int) -> None:
    """A caller's own mistake is not asked twice."""
    got, _, body = ask(f"http://127.0.0.1:{other.server.server_port}", status, ["1"])
    assert (got, body, other.asked) == (status, b"its own", [])


def test_where_all_fail_its_own_answer_is_given(other: Other) -> None:
    """Each of the chain is asked once, and one that is not there is no answer either."""
    other.status = 503
    got, _, body = ask(f"http://127.0.0.1:{other.server.server_port}/{{version}}", 500, ["1", "5"])
    assert (got, body) == (500, b"its own")
    assert [path for path, _, _ in other.asked] == ["/1/invocations?a=1", "/5/invocations?a=1"]
    got, _, body = ask("http://127.0.0.1:1", 500, ["1"])
    assert (got, body) == (500, b"its own")

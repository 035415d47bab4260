"""The prober sees what goes wrong, and blames nobody for what is right: held against a server that misbehaves on purpose."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.chaos.prober import CONNECTIONS, FLOOD, FRESH, KEPT, STREAM, Prober, Result, formula


class Server:
    """Answers as version "1" at 127.0.0.1:`port`; `misbehave` is how from now on."""

    def __init__(self) -> None:
        self.misbehave = ""
        self.version, self.chosen = "1", "1"
        self.connections = self.asked = 0
        self._ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True).start()
        assert self._ready.wait(10)

    async def _run(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ended.wait()
        server.close()

    def stop(self) -> None:
        with suppress(RuntimeError):  # a test has stopped it
            self._loop.call_soon_threadsafe(self._ended.set)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        x = json.loads(await reader.readexactly(length))["dataframe_split"]["data"][0][0]
        self.asked += 1
        how, streams = self.misbehave, b"text/event-stream" in head
        if how == "reset":
            return False
        if how == "hang":
            await asyncio.sleep(3)
        y = formula(x, self.version) + (1 if how == "wrong" else 0)
        if streams:
            parts = [f'data: {{"y": {y}}}\n\n'.encode()] * 2
            parts += [] if how == "no end" else [b"data: [DONE]\n\n"]
            content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
            if how != "cut":
                content += b"0\r\n\r\n"
            framing = "transfer-encoding: chunked"
        else:
            content = json.dumps({"predictions": [y]}).encode()
            framing = f"content-length: {len(content) + (5 if how == 'cut' else 0)}"
        status = "500 No" if how == "500" else "200 OK"
        who = f"x-model-version: {self.version}\r\nx-model-chosen: {self.chosen}"
        writer.write(f"HTTP/1.1 {status}\r\n{who}\r\n{framing}\r\n\r\n".encode() + content)
        await writer.drain()
        return how not in {"cut", "close"}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@contextmanager
def probing(server: Server, **options: float) -> Iterator[Prober]:
    with Prober(f"http://127.0.0.1:{server.port}", allowed={"1"}, timeout=1.0, **options) as prober:
        yield prober


def reasons(result: Result) -> set[tuple[str, str]]:
    return {(failure.kind, failure.why.partition(":")[0]) for failure in result.failures}


def test_what_is_right_is_clean(server: Server) -> None:
    """All kinds of requests are asked at about their rates, on connections kept or opened as they say."""
    with probing(server, flood=2) as prober:
        prober.wait(lambda records: sum(one.kind == KEPT for one in records) >= 60, "too few")
    result = prober.result
    result.assert_clean()
    assert set(result.counts) == {KEPT, FRESH, STREAM, FLOOD}
    assert result.counts[KEPT] == pytest.approx(3 * result.counts[STREAM], rel=0.3)
    assert result.counts[FRESH] == pytest.approx(result.counts[STREAM], rel=0.3)
    assert result.versions == {"1": server.asked}
    assert result.counts[FRESH] + CONNECTIONS <= server.connections < server.asked
    p50, worst = result.latency(0.5, 1.0)
    assert 0 < p50 <= worst < 1


def test_a_connection_closed_between_requests_is_opened_anew(server: Server) -> None:
    """A server that closes idle connections costs no request: nothing had been sent."""
    server.misbehave = "close"
    with probing(server, kept=100) as prober:
        prober.wait_more(200)
    prober.result.assert_clean()
    assert server.connections == server.asked


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("500", {(KEPT, "status 500"), (FRESH, "status 500"), (STREAM, "status 500")}),
        ("reset", {(KEPT, "reset"), (FRESH, "reset"), (STREAM, "reset")}),
        ("cut", {(KEPT, "truncated"), (FRESH, "truncated"), (STREAM, "truncated")}),
        ("no end", {(STREAM, "truncated")}),
        ("wrong", {(KEPT, "wrong answer"), (FRESH, "wrong answer"), (STREAM, "wrong answer")}),
        ("hang", {(KEPT, "timeout"), (FRESH, "timeout"), (STREAM, "timeout")}),
    ],
)
def test_what_goes_wrong_is_seen(server: Server, how: str, found: set[tuple[str, str]]) -> None:
    """Errors, resets, cut answers, streams without an end, wrong answers and silence are all told apart."""
    with probing(server) as prober:
        server.misbehave = how
        prober.wait(lambda _: reasons(prober.result) >= found, f"not seen: {how}")
        server.misbehave = ""
    assert reasons(prober.result) == found
    with pytest.raises(AssertionError, match=r"failed; .*"):
        prober.result.assert_clean()


def test_nothing_listens(server: Server) -> None:
    """A port that nobody listens on is a failure of every request."""
    server.stop()
    with probing(server) as prober:
        prober.wait_more(3)
    assert {why for _, why in reasons(prober.result)} == {"not connected"}


def test_a_version_answers_only_while_it_is_allowed(server: Server) -> None:
    """An answer of a version that was not allowed at any moment of the request is a failure, one that was allowed
    then is none; an answer of a fallback is counted as such."""
    with probing(server) as prober:
        with prober.moving({"1", "2"}, then={"2"}):
            server.version = "2"
            prober.wait_more(5, "2")
        prober.wait_more(5, "2")
        assert not prober.failures
        time.sleep(0.2)  # longer than the grace
        server.version, server.chosen = "3", "2"
        prober.wait_more(1, "3")
        prober.allow({"3"})
        time.sleep(0.2)
        before = len(prober.failures)
        prober.wait_more(5, "3")
    result = prober.result
    assert len(result.failures) == before > 0
    assert {failure.why.partition(":")[0] for failure in result.failures} == {"forbidden version"}
    assert result.fell_back[("2", "3")] >= 5


def test_the_judgement_says_where_the_prober_itself_failed(server: Server) -> None:
    """A prober that reached a bound, or died, proves nothing, and says so."""
    with probing(server, count=20) as prober:
        prober.wait(lambda _: prober._process.poll() is not None, "it goes on")
    with pytest.raises(AssertionError, match="ended before it was told to: after 2"):
        prober.result.assert_clean()
    with probing(server) as prober:
        prober._process.kill()
    with pytest.raises(AssertionError, match="the prober died"):
        prober.result.assert_clean()

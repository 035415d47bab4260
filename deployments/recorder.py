"""The recorder: a reverse proxy that stands before a runtime which is not ours, in its pod, and does what our model
server does besides predicting.

It has the same ports, counts the same kinds, keeps answers in the same ring, sheds, limits, warms up, and ends in the
same way. To the runtime go POSTs to the paths of `--infer-path` and GETs of `--open-path`; whatever else a runtime has
(loading and unloading models, say) nobody reaches from outside. A `*` in a path is one segment, or a part of one.

A request is read whole before it is sent on: no runtime begins before it has all of it, a slow caller takes no place
meanwhile, and it can be sent once more. Answers pass as they come, chunk by chunk, and in no other encoding than the
runtime's own (compressed ones could not be compared). gRPC is not done.
"""

import argparse
import asyncio
import contextlib
import json
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
from multidict import CIMultiDict
from yarl import URL

from deployments.local.server import (
    COPY,
    EVENTS,
    GONE,
    JSON,
    WRONG_DIGEST,
    Front,
    Receive,
    Reply,
    Request,
    Scope,
    Send,
    Unservable,
    arguments,
    busy,
    leave,
    problem,
    run,
    verify,
)

_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *(
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
            "expect",
            "host",
            "content-length",
            "accept-encoding",
            "date",
        ),
    }
)
"""What concerns one connection only, or is said anew."""
_OPEN = ("/v1/models", "/v1/models/*", "/v2", "/v2/models/*", "/v2/models/*/versions/*")
_SNEAKY = re.compile(r"//|/\.|\\|%2e|%2f|%5c", re.IGNORECASE)
"""What a runtime may take for another path than we do."""
_LOOK, _HURRY = 1.0, 0.1
"""Seconds between two looks at the runtime: once it was ready, and until then."""


@dataclass(slots=True)
class _Whole:
    body: bytes = b""
    size: int = 0


class Turns:
    """So many at once; who else comes waits in line by class, and in a class as they came. Of the event loop."""

    def __init__(self, places: int, room: int) -> None:
        self._free, self._room = places, room
        self._rows: tuple[deque[asyncio.Future[bool]], ...] = (deque(), deque(), deque())

    async def enter(self, rank: int) -> bool:
        """Wait for a place; False where there is none, or where a live request needed the room to wait. Copies fill
        half of the room at most.
        """
        if self._free > 0:
            self._free -= 1
            return True
        waiting = sum(map(len, self._rows))
        spare = self._room // 2 if rank == COPY else 0
        if waiting >= self._room - spare and (rank == COPY or not self._give_up()):
            return False
        turn = asyncio.get_running_loop().create_future()
        self._rows[rank].append(turn)
        try:
            return bool(await turn)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.result():
                self.leave()
            else:
                with contextlib.suppress(ValueError):
                    self._rows[rank].remove(turn)
            raise

    def leave(self) -> None:
        """Give the place to who is next."""
        for row in self._rows:
            while row:
                turn = row.popleft()
                if not turn.done():
                    turn.set_result(True)
                    return
        self._free += 1

    def _give_up(self) -> bool:
        copies = self._rows[COPY]
        while copies:
            turn = copies.pop()
            if not turn.done():
                turn.set_result(False)
                return True
        return False


class Recorder(Front):
    """A runtime of another process behind the ports."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._turns = Turns(options.concurrency, options.queue)
        self._infer = [_pattern(path) for path in options.infer_path]
        self._open = [_pattern(path) for path in (options.ready_path, *(options.open_path or _OPEN))]
        self._sessions: aiohttp.ClientSession | None = None
        self._warm = self._up = False

    @property
    def serves(self) -> bool:
        """Whether the runtime was warm once."""
        return self._warm

    @property
    def is_ready(self) -> bool:
        """Whether the runtime says that it is ready, has answered a request, and we are not about to end."""
        return self._up and not self.stopping

    def _ping(self, _query: dict[str, list[str]]) -> Reply:
        return 200, JSON, b"\n"

    _version = _ping

    def gauges(self) -> dict[str, float]:
        """Whether the runtime is up."""
        return {"runtime_up": int(self._up)}

    def is_page(self, request: Request) -> bool:
        """Whether it only looks at the runtime."""
        return not _SNEAKY.search(request.path) and any(pattern.fullmatch(request.path) for pattern in self._open)

    # --- the runtime

    def watch(self) -> None:
        """Wait until the runtime is ready, warm it up, and look at it from then on. One that began anew is warmed up
        anew. Raises `Unservable` where it cannot answer the example.
        """
        warm, example = False, self._example()
        if example is None:
            self._say("has no example that its runtime understands: it is not warmed up (--warm-up-body)")
        each_anew = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=self.options.upstream, trust_env=False, timeout=5, limits=each_anew) as client:
            while True:
                try:
                    ready = client.get(self.options.ready_path).status_code == 200
                    if ready and not warm:
                        self._warm_up(client, example)
                        self._warm = warm = True
                except httpx.HTTPError:
                    ready = warm = False
                self._up = ready and warm
                time.sleep(_LOOK if self._warm else _HURRY)

    def _warm_up(self, client: httpx.Client, example: bytes | None) -> None:
        """Have it answered with 2xx. A runtime that goes away meanwhile is one that is not ready."""
        options = self.options
        end = time.monotonic() + options.warm_up_timeout
        while example is not None:
            headers = {"content-type": JSON}
            answer = client.post(self._warm_up_path, content=example, headers=headers, timeout=options.timeout)
            if answer.is_success:
                return
            if answer.status_code < 500 or time.monotonic() > end:
                said = answer.text[:500]
                raise Unservable(f"the example is answered with {answer.status_code}: {said}")
            time.sleep(_HURRY)

    @property
    def _warm_up_path(self) -> str:
        return str(self.options.warm_up_path or self.options.infer_path[0])

    def _example(self) -> bytes | None:
        """What to warm up with. An input example of MLflow's that the runtime's protocol does not know is none."""
        given = self.options.warm_up_body
        if given is not None:
            return given.encode() if given.lstrip()[:1] in {"{", "["} else Path(given).read_bytes()
        chat = self._warm_up_path.endswith("/chat/completions")
        try:
            text = (Path(self.options.path) / "serving_input_example.json").read_bytes()
            found = json.loads(text)
        except (OSError, ValueError):
            text, found = b"", {}
        if _suits(self._warm_up_path, found):
            return text
        if not chat:
            return None
        ask = {"model": self.options.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        return json.dumps(ask).encode()

    def _say(self, what: str) -> None:
        print(f"{self.options.model} {self.options.version} {what}", file=sys.stderr, flush=True)  # noqa: T201

    # --- requests

    async def admin(self, path: str, scope: Scope, send: Send) -> None:
        """The pages of our model server, and what the runtime counts itself at /metrics/runtime."""
        if path != "/metrics/runtime" or self.options.metrics_path is None:
            await super().admin(path, scope, send)
            return
        upstream = URL(self.options.upstream)
        url = upstream.with_port(self.options.metrics_port or upstream.port).with_path(self.options.metrics_path)
        try:
            async with self._session().get(url, timeout=aiohttp.ClientTimeout(5)) as answer:
                kind = answer.headers.get("content-type", "text/plain")
                reply = answer.status, kind, await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            reply = 502, JSON, problem("UNAVAILABLE", f"the runtime's metrics: {error or type(error).__name__}")
        await self.reply(send, reply)

    async def answer(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a request on, where it may be, and its answer back."""
        infer = any(pattern.fullmatch(request.path) for pattern in self._infer)
        passes = self.is_page(request)
        if _SNEAKY.search(request.path) or not (infer or passes):
            await self.reply(send, (404, JSON, b'{"detail":"Not Found"}'))
            return
        if request.method not in ({"POST"} if infer else set()) | ({"GET", "HEAD"} if passes else set()):
            await self.reply(send, (405, JSON, b'{"detail":"Method Not Allowed"}'))
            return
        rank, whole = self.rank(request), _Whole()
        try:
            refused = await self.body(request, receive, whole)
            if refused is None and infer:
                refused = self.limited(request) if self._warm else busy("the model is being loaded")
            if refused is not None:
                if refused[0] != GONE:
                    await self.reply(send, refused)
                return
            exchange = _Exchange(self, request, scope, whole.body, send)
            status = await _unless_left(exchange.run(self._turns if infer else None, rank), receive)
            if infer and exchange.kept is not None:
                self.keep(request, status, whole.body, exchange.kept)
        finally:
            self.forget(whole)

    def _session(self) -> aiohttp.ClientSession:
        """Connections to the runtime. Made where the event loop is there."""
        if self._sessions is None:
            traces = aiohttp.TraceConfig()
            traces.on_connection_reuseconn.append(_note_reuse)
            self._sessions = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trace_configs=[traces],
                skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
                max_line_size=1 << 16,
                max_field_size=1 << 16,
            )
        return self._sessions

    async def send_on(self, request: Request, scope: Scope, body: bytes) -> aiohttp.ClientResponse:
        """The head of the runtime's answer. Where the runtime closed an idle connection there is none: then the request
        is sent once more, over another one.
        """
        query = scope["query_string"].decode("latin-1")
        url = URL(self.options.upstream + request.path + (f"?{query}" if query else ""), encoded=True)
        headers = CIMultiDict(_passed(scope["headers"], mine=("x-shadow", "x-titleshot-")))
        headers["accept-encoding"] = "identity"
        patience = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=self.options.timeout)
        while True:
            context = SimpleNamespace(reused=False)
            try:
                return await self._session().request(
                    request.method,
                    url,
                    headers=headers,
                    data=body or None,
                    allow_redirects=False,
                    timeout=patience,
                    trace_request_ctx=context,
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not context.reused:
                    raise


class _Exchange:
    """One request at the runtime. `kept` is what was sent to the caller, None for what is not to be kept."""

    def __init__(self, recorder: Recorder, request: Request, scope: Scope, body: bytes, send: Send) -> None:
        self._recorder, self._request, self._scope, self._body, self._send = recorder, request, scope, body, send
        self.kept: bytes | None = None

    async def run(self, turns: Turns | None, rank: int) -> int:
        """Do it, in its turn, and return the status."""
        if turns is None:
            return await self._ask()
        try:
            async with asyncio.timeout(self._recorder.options.timeout):
                may = await turns.enter(rank)
        except TimeoutError:
            return await self._refuse(self._late())
        if not may:
            return await self._refuse(busy("too many requests are waiting"))
        try:
            return await self._ask()
        finally:
            turns.leave()

    async def _ask(self) -> int:
        try:
            answer = await self._recorder.send_on(self._request, self._scope, self._body)
        except TimeoutError:
            return await self._refuse(self._late())
        except aiohttp.ClientError as error:
            what = str(error) or type(error).__name__
            return await self._refuse((502, JSON, problem("UNAVAILABLE", f"the runtime does not answer: {what}")))
        async with answer:
            if EVENTS in answer.headers.get("content-type", "") and answer.connection and answer.connection.protocol:
                # llama.cpp closes it then, whatever it said before.
                answer.connection.protocol.force_close()
            return await self._pass(answer)

    async def _pass(self, answer: aiohttp.ClientResponse) -> int:
        """Send the answer on as it comes. One that breaks off is cut, so that nobody takes it for a whole one."""
        recorder, parts, size = self._recorder, list[bytes](), 0
        head = [(name.lower(), value) for name, value in answer.raw_headers]
        headers = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in _passed(head)]
        headers += [(name, value) for name, value in head if name == b"content-length"]
        await recorder.head(self._send, answer.status, headers)
        try:
            async for chunk in answer.content.iter_any():
                async with asyncio.timeout(recorder.options.timeout):
                    await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                if size <= recorder.options.keep_bytes:
                    parts.append(chunk)
                    size += len(chunk)
        except (aiohttp.ClientError, TimeoutError):
            self.kept = b"".join(parts)
            return 502
        await self._send({"type": "http.response.body", "body": b""})
        self.kept = b"".join(parts)
        return answer.status

    async def _refuse(self, reply: Reply) -> int:
        await self._recorder.reply(self._send, reply)
        self.kept = reply[2]
        return reply[0]

    def _late(self) -> Reply:
        seconds = self._recorder.options.timeout
        return 504, JSON, problem("DEADLINE_EXCEEDED", f"no answer within {seconds} s")


async def _unless_left(work: Any, receive: Receive) -> int:
    """What `work` comes to; it is cancelled where the client hangs up, so that the runtime does not work for nobody."""
    left, done = asyncio.ensure_future(receive()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({left, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            done.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await done
            return GONE
        return int(done.result())
    finally:
        done.cancel()
        left.cancel()


async def _note_reuse(_session: aiohttp.ClientSession, context: Any, _params: Any) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.reused = True


def _passed(headers: Iterable[tuple[bytes, bytes]], mine: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Headers as they go on: without those of the connection (what `connection` names is one), and ours."""
    pairs = [(key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in headers]
    named = {part.strip().lower() for key, value in pairs if key == "connection" for part in value.split(",")}
    for key, value in pairs:
        if key not in _HOP and key not in named and not (mine and key.startswith(mine)):
            yield key, value


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile("[^/]+".join(map(re.escape, path.split("*"))))


def _suits(path: str, example: Any) -> bool:
    """Whether an example is in the form of the protocol that this path belongs to."""
    if not isinstance(example, dict):
        return False
    if path.startswith("/v2/"):
        inputs = example.get("inputs")
        return isinstance(inputs, list) and all(isinstance(one, dict) and "datatype" in one for one in inputs)
    if path.startswith("/v1/") and not path.endswith(":predict"):
        return not {"messages", "prompt", "input"}.isdisjoint(example)
    return bool(example)


def parse(given: Iterable[str] | None = None) -> argparse.Namespace:
    """The command line of the recorder."""
    parser = arguments("Stand before a runtime: keep its answers, count, limit, warm up.")
    parser.add_argument("--upstream", default="http://127.0.0.1:8070", help="the runtime")
    parser.add_argument("--ready-path", required=True, help="200 there says that the runtime is ready")
    parser.add_argument("--infer-path", action="append", required=True, help="where predictions are asked for (POST)")
    parser.add_argument("--open-path", action="append", help="what may be read besides (GET)")
    parser.add_argument("--metrics-path", help="the runtime's own metrics, shown at the admin port's /metrics/runtime")
    parser.add_argument("--metrics-port", type=int, help="where they are, if not at the upstream's port")
    parser.add_argument("--warm-up-path", help="where the example is sent to; the first --infer-path")
    parser.add_argument("--warm-up-body", help="the example: JSON, or a file; by default the artifact's own")
    parser.add_argument("--warm-up-timeout", type=float, default=60.0, help="seconds in which it must be answered")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once at the runtime")
    parser.add_argument("--verify", action="store_true", help="verify the artifact's digest first: nobody else has")
    options = parser.parse_args(None if given is None else list(given))
    options.upstream = options.upstream.rstrip("/")
    if urlsplit(options.upstream).scheme != "http":
        parser.error(f"--upstream is {options.upstream!r}: it must begin with http://")
    return options


def main() -> int:
    """Serve until a signal; return the exit code."""
    options = parse()
    if options.verify and (wrong := verify(options)):
        print(f"{options.model} {options.version} is not what was admitted: {wrong}", file=sys.stderr)  # noqa: T201
        return WRONG_DIGEST
    recorder = Recorder(options)
    return run(recorder, recorder.watch)


if __name__ == "__main__":
    leave(main())

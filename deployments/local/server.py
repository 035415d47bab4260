"""The model server: one model version behind MLflow's scoring contract, in one process.

Run by path, also by the Python of an environment that has only mlflow and uvicorn, so it imports nothing of
ours but `../artifact.py` and `../counting.py`, by path. It adds to MLflow's own scoring server: the digest is
verified before anything is loaded, /ready is 200 only after a warm-up, 500 means that the model itself failed
(MLflow answers 400), answers are kept for comparison by request id, and what it cannot take in time is shed with
a 503.

A model that streams does so where the caller accepts text/event-stream: `data: <JSON>` for each chunk and
`data: [DONE]` at the end, the form of MLflow's agent server. An error on the way is an `event: error`, after
which the connection is cut, so that nobody takes half a stream for a whole one.

The gateway says what a request is, and removes these headers from callers' requests:

    x-shadow: 1                      a copy: its answer goes nowhere
    x-titleshot-load: 1              a load test's
    x-titleshot-priority: high       taken before other live requests
    x-titleshot-limits: 3=20;2=100   live requests per second by version; what is too much is a 429
    x-titleshot-own-path: 1          it asked for this version by name

Where the gateway is not ours, the port says it instead (`--shadow-port`, `--own-port`, `--pinned-port`), and x-shadow
and x-titleshot-own-path say nothing; a load test's header is believed on the own port only. With `--admin-port`, what
is not for callers (/ready, /metrics, /titleshot/...) is answered there and nowhere else.
"""

import abc
import argparse
import asyncio
import base64
import bisect
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from .. import artifact, counting, relay  # noqa: TID252 - for the type checker: at run time they are read by path

JSON = "application/json"
PLAIN_JSON = frozenset({JSON, f"{JSON};charset=utf-8"})
WRONG_DIGEST = 3
"""The exit code where the artifact is not the one that was admitted."""
WARM_UP = 5
EVENTS = "text/event-stream"
GONE = 499
"""The status of an answer that nobody took; it is never sent."""
HIGH, LIVE, COPY = range(3)
"""The classes of requests, in the order in which they are taken. A load test's are like copies."""
SMALL = 1 << 16
"""The bytes of a body that are always taken, however many others are under way."""
Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]
Reply = tuple[int, str, bytes]


def _beside(name: str) -> ModuleType:
    """A module of the folder above, read by path."""
    path = Path(__file__).resolve().parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"titleshot_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is missing beside the server")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if not TYPE_CHECKING:
    artifact, counting, relay = _beside("artifact"), _beside("counting"), _beside("relay")


class ModelFailed(BaseException):
    """Raised inside the model's own predict. A BaseException, so that MLflow's `except Exception`, which
    makes a 400 of everything, lets it pass.
    """


class Cut(BaseException):
    """Raised where a stream is to end before its time; `status` is what became of it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def guarded(predict: Callable[..., Any], library: str) -> Callable[..., Any]:
    """Wrap a pyfunc's inner predict: what goes wrong in there is the model's fault.

    One exception: an MLflow error with a 4xx code, raised with nothing but MLflow's own frames (`library` is
    its directory) below us, is MLflow's check of the caller's data against the model's type hints.
    """

    @functools.wraps(predict)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with _blame(library):
            return predict(*args, **kwargs)

    return inner


def guarded_stream(stream: Callable[..., Any], library: str) -> Callable[..., Any]:
    """Wrap a pyfunc's inner predict_stream, in the same way."""

    @functools.wraps(stream)
    def inner(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with _blame(library):
            yield from stream(*args, **kwargs)

    return inner


@contextlib.contextmanager
def _blame(library: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The first two frames are this function and its caller.
        frames = traceback.extract_tb(error.__traceback__)[2:]
        code = getattr(error, "get_http_status_code", lambda: 500)()
        if code < 500 and all(frame.filename.startswith(library) for frame in frames):
            raise
        raise ModelFailed(f"{type(error).__name__}: {error}") from error


class Frames:
    """The lean way from a request body to the DataFrame that pyfunc would hand to the model.

    MLflow builds and casts the frame column by column, twice. For a signature of named plain columns and for
    values that need no conversion the outcome is known beforehand; whatever else comes yields None, and then
    MLflow's own code decides. `tests/unit/test_server_frames.py` holds both ways against each other.
    """

    def __init__(self, schema: Any) -> None:
        import numpy as np
        import pandas as pd

        self._frame, self._array = pd.DataFrame, np.array
        self._dtypes = {"double": np.float64, "long": np.int64, "boolean": np.bool_}
        named = schema is not None and schema.has_input_names() and not schema.is_tensor_spec()
        kinds = [(spec.name, getattr(spec.type, "name", "")) for spec in schema.inputs] if named else []
        known = {*self._dtypes, "string"}
        self._columns = kinds if kinds and all(kind in known for _, kind in kinds) else None

    def __call__(self, body: bytes) -> Any:
        """The DataFrame that this request body becomes, or None where MLflow has to say."""
        if self._columns is None:
            return None
        try:
            request = json.loads(body)
            ((form, data),) = request.items()
            columns = self._split(data) if form == "dataframe_split" else self._records(data, form)
            return None if columns is None else self._frame(columns)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            return None

    def _split(self, data: dict[str, Any]) -> dict[str, Any] | None:
        names, rows = data["columns"], data["data"]
        if len(data) != 2 or not rows or len({*names}) != len(names):
            return None
        if any(type(row) is not list or len(row) != len(names) for row in rows):
            return None
        at = {name: place for place, name in enumerate(names)}
        return self._cast(lambda name: [row[at[name]] for row in rows])

    def _records(self, rows: Any, form: str) -> dict[str, Any] | None:
        if form != "dataframe_records" or type(rows) is not list or not rows:
            return None
        return self._cast(lambda name: [row[name] for row in rows])

    def _cast(self, values_of: Callable[[str], list[Any]]) -> dict[str, Any] | None:
        columns: dict[str, Any] = {}
        for name, kind in self._columns or ():
            values = values_of(name)
            types = {type(value) for value in values}
            if kind == "double" and types <= {float, int, type(None)}:
                # Beyond int64 pandas makes objects of integers: MLflow's business.
                if int in types and any(type(v) is int and not -(1 << 63) <= v < 1 << 63 for v in values):
                    return None
            elif types != {{"long": int, "boolean": bool, "string": str}.get(kind)}:
                return None
            columns[name] = values if kind == "string" else self._array(values, self._dtypes[kind])
        return columns


class Predictor:
    """A loaded model: request in, reply out, with the status that tells whose fault it was."""

    def __init__(self, path: Path) -> None:
        import mlflow
        from mlflow.pyfunc import load_model, scoring_server
        from mlflow.utils.proto_json_utils import NumpyEncoder, _get_jsonable_obj

        # As MLflow's own server sets it: models look at it.
        os.environ["_MLFLOW_IS_IN_SERVING_ENVIRONMENT"] = "true"
        self._model = load_model(str(path))
        # The one place where "the input was refused" and "the model failed" can be told apart.
        library, streams = str(Path(mlflow.__file__).parent), getattr(self._model, "_predict_stream_fn", None)
        self._predict = guarded(self._model._predict_fn, library)  # noqa: SLF001
        self._model._predict_fn = self._predict  # noqa: SLF001
        self.streams = streams is not None
        if streams is not None:
            self._model._predict_stream_fn = guarded_stream(streams, library)  # noqa: SLF001
        self._schema = self._model.metadata.get_input_schema()
        self._invocations, self._jsonable = scoring_server.invocations, _get_jsonable_obj
        self._dumps = functools.partial(json.dumps, cls=NumpyEncoder)
        self._frames = self._lean_way()
        example = path / "serving_input_example.json"
        self.example = example.read_bytes() if example.is_file() else None

    def _lean_way(self) -> Callable[[bytes], Any]:
        meta = self._model.metadata
        odd = ("_is_signature_from_type_hint", "_is_type_hint_from_example", "get_params_schema")
        if any(getattr(meta, name, lambda: None)() for name in odd):
            return _no_frame
        return Frames(self._schema)

    def warm_up(self) -> None:
        """Answer the model's own example a few times; raise where it cannot.

        The lean way proves itself there as well: where its answer differs from MLflow's, it is given up.
        """
        if self.example is None:
            return
        lean = [self(self.example, JSON) for _ in range(WARM_UP)][-1]
        ways, self._frames = self._frames, _no_frame
        plain = self(self.example, JSON)
        if lean == plain:
            self._frames = ways
        if plain[0] != 200:
            raise RuntimeError(f"its own input example is answered with {plain[0]}: {plain[2].decode()}")

    def __call__(self, body: bytes, content_type: str) -> Reply:
        """Answer one request body: (status, content type, body)."""
        try:
            frame = self._frames(body) if content_type.lower().replace(" ", "") in PLAIN_JSON else None
            if frame is None:
                answer = self._invocations(body, content_type, self._model, self._schema)
                if answer.status == 200:
                    return 200, answer.mimetype, answer.response.encode()
                return answer.status, JSON, problem("BAD_REQUEST", answer.response)
            raw = self._call(frame)
            return 200, JSON, self._dumps({"predictions": self._jsonable(raw, "records")}).encode()
        except BaseException as error:  # noqa: BLE001 - a model that calls sys.exit() does not take us along
            return failure(error)

    def stream(self, body: bytes, content_type: str, push: Callable[[bytes], None]) -> Reply:
        """Answer one request in pieces: `push` takes each event and raises `Cut` where the rest is not wanted.

        The reply says how it ended. Where nothing was pushed it is the whole answer, an error.
        """
        begun = False
        try:
            asked = _Asked(self._model.metadata)
            answer = self._invocations(body, content_type, asked, self._schema)
            if answer.status != 200:
                return answer.status, JSON, problem("BAD_REQUEST", answer.response)
            with contextlib.closing(self._model.predict_stream(asked.data, asked.params)) as chunks:
                for chunk in chunks:
                    data = self._dumps(self._jsonable(chunk, "records"))
                    begun = True
                    push(f"data: {data}\n\n".encode())
            push(b"data: [DONE]\n\n")
        except Cut as cut:
            return cut.status, EVENTS, b""
        except BaseException as error:  # noqa: BLE001 - a model that calls sys.exit() does not take us along
            if not begun and isinstance(error.__cause__, NotImplementedError):  # MLflow's base classes have the method
                return no_stream()
            reply = failure(error)
            if begun:
                with contextlib.suppress(Cut):
                    push(b"event: error\ndata: " + reply[2] + b"\n\n")
            return reply
        return 200, EVENTS, b""

    def _call(self, frame: Any) -> Any:
        from mlflow.pyfunc.context import Context, set_prediction_context

        with set_prediction_context(Context(model_id=getattr(self._model, "model_id", None))):
            return self._predict(frame)


class _Asked:
    """In the model's place where MLflow reads a request: it takes down what the model would be asked."""

    data: Any = None
    params: Any = None

    def __init__(self, metadata: Any) -> None:
        self.metadata = metadata

    def predict(self, data: Any, params: Any = None) -> list[Any]:
        self.data, self.params = data, params
        return []


def failure(error: BaseException) -> Reply:
    """The reply to a request that went wrong. MLflow's own errors know whose mistake it was (4xx: the
    caller's); anything else is the model's or ours.
    """
    if isinstance(error, Exception) and hasattr(error, "serialize_as_json"):
        return error.get_http_status_code(), JSON, error.serialize_as_json().encode()  # type: ignore[attr-defined]
    traceback.print_exception(error)
    what = error if isinstance(error, ModelFailed) else f"{type(error).__name__}: {error}"
    return 500, JSON, problem("INTERNAL_ERROR", f"the model failed: {what}")


def no_stream() -> Reply:
    """The reply to who wants a stream where there is none."""
    message = f"this model does not stream: accept {JSON} instead of {EVENTS}"
    return 406, JSON, problem("BAD_REQUEST", message)


def busy(message: str) -> Reply:
    """The reply where it would do later, or elsewhere."""
    return 503, JSON, problem("TEMPORARILY_UNAVAILABLE", message)


def _no_frame(_body: bytes) -> None:
    """MLflow's own way, always."""


def problem(code: str, message: str) -> bytes:
    """An error body in MLflow's form."""
    return json.dumps({"error_code": code, "message": message}).encode()


@dataclass(frozen=True, slots=True)
class Kept:
    """One answer in the ring."""

    number: int
    request_id: str
    shadow: bool
    status: int
    request: bytes
    response: bytes
    at: float
    seconds: float
    own_path: bool = False

    def line(self) -> bytes:
        """One JSON line. A body is text, or {"base64": ...} where it is not UTF-8."""

        def body(data: bytes) -> object:
            with contextlib.suppress(UnicodeDecodeError):
                return data.decode()
            return {"base64": base64.b64encode(data).decode()}

        fields = {name: getattr(self, name) for name in self.__slots__}
        fields |= {"request": body(self.request), "response": body(self.response)}
        return json.dumps(fields).encode() + b"\n"


class Ring:
    """The last answers, bounded by count and by bytes; each has the next number."""

    def __init__(self, count: int, size: int) -> None:
        self._kept: deque[Kept] = deque()
        self._count, self._size, self._held, self._next = count, size, 0, 0

    def add(self, **fields: Any) -> None:
        """Keep one answer (the fields of `Kept` but its number); the oldest go where there is no room. One that
        is too large alone is left out.
        """
        kept = Kept(number=self._next, **fields)
        self._next += 1
        if len(kept.request) + len(kept.response) > self._size:
            return
        self._kept.append(kept)
        self._held += len(kept.request) + len(kept.response)
        while self._kept and (len(self._kept) > self._count or self._held > self._size):
            gone = self._kept.popleft()
            self._held -= len(gone.request) + len(gone.response)

    def after(self, number: int, limit: int) -> Iterator[Kept]:
        """At most `limit` of the answers with a higher number, oldest first."""
        start = bisect.bisect_right(self._kept, number, key=lambda kept: kept.number)
        yield from itertools.islice(self._kept, start, start + limit)


class Bucket:
    """So many a second, and at once no more than come in one second (at least one)."""

    def __init__(self) -> None:
        self._left, self._at = math.inf, 0.0

    def take(self, rate: float, now: float) -> bool:
        """Whether one more may pass at `now` (monotonic seconds), where `rate` a second may."""
        self._left = min(max(1.0, rate), self._left + (now - self._at) * rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@functools.lru_cache(maxsize=8)
def limit_of(header: str, version: str) -> float | None:
    """Live requests per second that `x-titleshot-limits` allows this version; None where it says nothing valid."""
    rates = dict(entry.strip().partition("=")[::2] for entry in header.split(";"))
    try:
        rate = float(rates[version])
    except (KeyError, ValueError):
        return None
    return rate if 0 < rate < math.inf else None


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way through. `done` is its reply, or cancelled where nobody waits any more."""

    kind: int
    done: asyncio.Future[Reply]
    content_type: str
    body: bytes = b""
    size: int = 0
    stream: "Stream | None" = None


class Line:
    """Who waits, by class, and in a class as they came. Added to by the event loop, taken from by the threads;
    a deque's methods are atomic.
    """

    def __init__(self) -> None:
        self._rows: tuple[deque[Job], ...] = (deque(), deque(), deque())

    def add(self, job: Job) -> None:
        """Take a place behind those of the same class."""
        self._rows[job.kind].append(job)

    def take(self) -> Job | None:
        """Who is next."""
        for row in self._rows:
            with contextlib.suppress(IndexError):
                return row.popleft()
        return None

    def give_up(self) -> Job | None:
        """The copy that came last, out of the line."""
        with contextlib.suppress(IndexError):
            return self._rows[COPY].pop()
        return None

    @property
    def live(self) -> bool:
        """Whether a live request waits."""
        return bool(self._rows[HIGH] or self._rows[LIVE])


class Stream:
    """An answer in pieces, on its way from a prediction's thread to the client."""

    def __init__(self, server: "Server", job: Job, receive: Receive, send: Send) -> None:
        self.begun = False
        self._parts: list[bytes] = []
        self._size = 0
        self._server, self._job, self._send = server, job, send
        self._loop = asyncio.get_running_loop()
        self.limit = asyncio.timeout(server.options.timeout)
        # The body is read to its end: what comes next is that the client hangs up.
        self._left = asyncio.ensure_future(receive())
        self._left.add_done_callback(self._hung_up)

    def _hung_up(self, left: "asyncio.Future[Any]") -> None:
        if not left.cancelled() and not self._job.done.done():
            self._job.done.set_result((GONE, EVENTS, b""))

    def push(self, event: bytes) -> None:
        """Called by the prediction's thread: returns when the client can take more, raises `Cut` where it cannot."""
        try:
            asyncio.run_coroutine_threadsafe(self._push(event), self._loop).result()
        except (TimeoutError, CancelledError, RuntimeError) as error:
            raise Cut(GONE) from error

    async def _push(self, event: bytes) -> None:
        if self._job.done.done():
            raise Cut(GONE)
        if self._job.kind == COPY and self._server.line.live:
            raise Cut(503)  # a copy's stream does not keep a thread from those who wait for an answer
        # Neither a model that falls silent nor a client that does not read may hold a thread for ever.
        seconds = self._server.options.timeout
        self.limit.reschedule(self._loop.time() + seconds)
        async with asyncio.timeout(seconds):
            if not self.begun:
                self.begun = True
                await self._server.start(self._send, 200, EVENTS, (b"cache-control", b"no-cache"))
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
        if self._size <= self._server.options.keep_bytes:
            self._parts.append(event)
            self._size += len(event)

    async def end(self, reply: Reply) -> bytes:
        """End it as `reply` says, and return all that was sent. Without an end of its own the connection is cut."""
        self._left.cancel()
        if reply[0] == 200:
            await self._send({"type": "http.response.body", "body": b""})
        return b"".join(self._parts)


@dataclass(slots=True)
class Request:
    """One request as it came. `kind` is one of `counting.KINDS`; `started` is monotonic, `at` since the epoch."""

    kind: str
    method: str
    path: str
    headers: dict[bytes, str]
    started: float
    at: float

    def says(self, header: bytes) -> bool:
        """Whether this header is "1"."""
        return self.headers.get(header) == "1"


def has_left(receive: Receive) -> bool:
    """Whether the client has hung up, once its whole request was received. One step of `receive` tells: it returns at
    once then, and waits otherwise.
    """
    coroutine = receive()
    try:
        coroutine.send(None)
    except StopIteration as done:
        return bool(done.value["type"] == "http.disconnect")
    coroutine.close()
    return False


class Body(Protocol):
    """Where a request's body goes; `size` grows while it is read."""

    body: bytes
    size: int


Page = Callable[[dict[str, list[str]]], Reply]


class Front(abc.ABC):
    """The ASGI application, without what answers requests: ports and kinds, pages, counts, the ring, and the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.stopping = False
        self._ring, self._bucket, self._last = Ring(options.keep, options.keep_bytes), Bucket(), 0.0
        self._bodies = 0
        self.counts = counting.Counts({"model": options.model, "version": options.version})
        ports = {
            counting.LIVE: options.port,
            counting.SHADOW: options.shadow_port,
            counting.OWN: options.own_port,
            counting.PINNED: options.pinned_port,
        }
        self._kinds = {port: kind for kind, port in ports.items() if port is not None}
        self._by_port = len(self._kinds) > 1
        self._for_all: dict[str, Page] = {"/ping": self._ping, "/health": self._ping, "/version": self._version}
        self._for_us: dict[str, Page] = {
            "/ready": self._ready,
            "/titleshot/identity": self._identity,
            "/titleshot/answers": self._answers,
        }

    @abc.abstractmethod
    async def answer(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that came to a port for callers."""

    @property
    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Whether requests are welcome."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        port = (scope.get("server") or ("", None))[1]
        # The raw path: a gateway that guards /titleshot/ does not decode %74itleshot, and neither do we.
        path, method = scope["raw_path"].partition(b"?")[0].decode("latin-1"), scope["method"]
        if self.options.admin_port is not None and port == self.options.admin_port:
            await self.admin(path, scope, send)
            return
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        request = Request("", method, path, headers, time.perf_counter(), time.time())
        if request.method in {"GET", "HEAD"} and self.is_page(request):
            await self.answer(request, scope, receive, send)
            return
        request.kind = kind = self._kind(port, request)
        chain = relay.chain(headers.get(relay.HEADER, ""), self.options.version) if self._passes_on(kind) else []
        if chain:
            await self._relay(
                lambda listen, say: self._counted(request, scope, listen, say), scope, receive, send, chain
            )
        else:
            await self._counted(request, scope, receive, send)

    def _passes_on(self, kind: str) -> bool:
        """Whether another version may answer such a request in our place: not where this one was asked for by name."""
        return bool(self.options.fallback) and kind in (counting.LIVE, counting.PINNED)

    @functools.cached_property
    def _relay(self) -> "relay.Relay":
        return relay.Relay(self.options.fallback, self.options.version, self.options.timeout)

    async def _counted(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and count what we said, whatever another version says then."""
        kind, status, seconds = request.kind, GONE, None

        async def counted(message: dict[str, Any]) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start" and not (self._by_port and has_left(receive)):
                status, seconds = message["status"], time.perf_counter() - request.started
            await send(message)

        self.counts.begin(kind)
        try:
            await self.answer(request, scope, receive, counted)
        except BaseException as error:
            if seconds is None:  # what a server makes of it; who is cancelled was too slow to end
                status = counting.NOBODY if isinstance(error, asyncio.CancelledError) else 500
            raise
        finally:
            self.counts.end(kind, status, seconds)

    def is_page(self, request: Request) -> bool:
        """Whether it only looks. That is not counted: a gateway's health checks would make every version look well."""
        return request.path in self._for_all

    def _kind(self, port: int | None, request: Request) -> str:
        load = request.says(b"x-titleshot-load")
        if self._by_port:
            kind = self._kinds.get(port or 0, counting.LIVE)
            return counting.LOAD if load and kind == counting.OWN else kind
        own = request.says(b"x-titleshot-own-path")
        shadow = counting.SHADOW if request.says(b"x-shadow") else counting.OWN if own else counting.LIVE
        return counting.LOAD if load else shadow

    async def page(self, request: Request, scope: Scope, send: Send) -> None:
        """Answer with a page, on a port for callers."""
        pages = self._for_all if self.options.admin_port is not None else {**self._for_all, **self._for_us}
        await self._page(request.path, pages, scope, send)

    async def admin(self, path: str, scope: Scope, send: Send) -> None:
        """Answer with a page, on the admin port."""
        await self._page(path, {**self._for_all, **self._for_us, "/metrics": self._metrics}, scope, send)

    async def _page(self, path: str, pages: dict[str, Page], scope: Scope, send: Send) -> None:
        page = pages.get(path)
        if page is None:
            await self.reply(send, (404, JSON, b'{"detail":"Not Found"}'))
        elif scope["method"] not in {"GET", "HEAD"}:
            await self.reply(send, (405, JSON, b'{"detail":"Method Not Allowed"}'))
        else:
            await self.reply(send, page(parse_qs(scope["query_string"].decode("latin-1"))))

    @abc.abstractmethod
    def _ping(self, _query: dict[str, list[str]]) -> Reply: ...

    @abc.abstractmethod
    def _version(self, _query: dict[str, list[str]]) -> Reply: ...

    def _ready(self, _query: dict[str, list[str]]) -> Reply:
        return (200, JSON, b'{"ready":true}') if self.is_ready else (503, JSON, b'{"ready":false}')

    def _identity(self, _query: dict[str, list[str]]) -> Reply:
        options = self.options
        who = {"model": options.model, "version": options.version, "digest": options.digest}
        return 200, JSON, json.dumps({**who, "pid": os.getpid(), "ready": self.is_ready}).encode()

    def _metrics(self, _query: dict[str, list[str]]) -> Reply:
        text = self.counts.text({"ready": int(self.is_ready), **self.gauges()})
        return 200, "text/plain; version=0.0.4; charset=utf-8", text

    def gauges(self) -> dict[str, float]:
        """More of what there is to see, by name."""
        return {}

    def _answers(self, query: dict[str, list[str]]) -> Reply:
        try:
            after, limit = int(query.get("after", ["-1"])[0]), int(query.get("limit", ["500"])[0])
        except ValueError:
            return 400, JSON, problem("BAD_REQUEST", "after and limit are whole numbers")
        lines = b"".join(kept.line() for kept in self._ring.after(after, limit))
        return 200, "application/x-ndjson", lines

    def is_copy(self, request: Request) -> bool:
        """Whether its answer goes nowhere."""
        return request.kind == counting.SHADOW or (not self._by_port and request.says(b"x-shadow"))

    def rank(self, request: Request) -> int:
        """Its class where others wait; live requests are remembered for the end."""
        if self.is_copy(request) or request.kind == counting.LOAD:
            return COPY
        self._last = request.started
        return HIGH if request.headers.get(b"x-titleshot-priority") == "high" else LIVE

    def keep(self, request: Request, status: int, body: bytes, response: bytes) -> None:
        """Keep an answer for comparison. A load test is nobody's request: not to be taken for live traffic later."""
        if status == GONE or request.kind == counting.LOAD:
            return
        own = request.kind == counting.OWN or (not self._by_port and request.says(b"x-titleshot-own-path"))
        self._ring.add(
            request_id=request.headers.get(b"x-request-id", ""),
            shadow=self.is_copy(request),
            status=status,
            request=body,
            response=response,
            at=request.at,
            seconds=time.perf_counter() - request.started,
            own_path=own,
        )

    def limited(self, request: Request) -> Reply | None:
        """The refusal of what is too much, or None."""
        header = "" if self.is_copy(request) else request.headers.get(b"x-titleshot-limits", "")
        rate = limit_of(header, self.options.version) if header else None
        if rate is None or self._bucket.take(rate, request.started):
            return None
        message = f"version {self.options.version} takes {rate:g} requests per second"
        return 429, JSON, problem("RESOURCE_EXHAUSTED", message)

    async def body(self, request: Request, receive: Receive, body: Body) -> Reply | None:
        """Read a request's body; return a refusal where it is not to be had. `Front.forget` it in the end."""
        options, parts, more = self.options, [], True
        announced = int(request.headers.get(b"content-length") or 0)
        try:
            async with asyncio.timeout(options.timeout):
                while more and max(body.size, announced) <= options.max_body:
                    if self._bodies > options.max_bodies and body.size > SMALL:
                        return busy("too many large requests are under way")
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return GONE, JSON, b""
                    parts.append(part := message.get("body", b""))
                    body.size += len(part)
                    self._bodies += len(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            return 408, JSON, problem("BAD_REQUEST", f"the body did not arrive within {options.timeout} s")
        if max(body.size, announced) > options.max_body:
            return 413, JSON, problem("BAD_REQUEST", f"a body has at most {options.max_body} bytes")
        body.body = b"".join(parts)
        return None

    def forget(self, body: Body) -> None:
        """The request of this body is over."""
        self._bodies -= body.size

    async def reply(self, send: Send, reply: Reply) -> None:
        """Send a whole answer."""
        status, content_type, body = reply
        more = [(b"retry-after", b"1")] if status in {429, 503} else []
        await self.start(send, status, content_type, (b"content-length", str(len(body)).encode()), *more)
        await send({"type": "http.response.body", "body": body})

    async def start(self, send: Send, status: int, content_type: str, *more: tuple[bytes, bytes]) -> None:
        """Send the head of an answer."""
        await self.head(send, status, [(b"content-type", content_type.encode()), *more])

    async def head(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The same with all of the headers; ours are added."""
        headers.append((b"x-titleshot-version", self.options.version.encode()))
        if self.stopping:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def turn_away(self) -> None:
        """Go on answering while live requests still come: the gateway has to hear first that we are not ready."""
        now = time.perf_counter()
        # Behind ports nobody knows how busy the gateway is that has yet to hear: an idle server waits as well.
        end, since = now + self.options.linger, now if self._by_port else 0.0
        while self.serves and time.perf_counter() < min(end, max(since, self._last) + self.options.quiet):  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    @property
    @abc.abstractmethod
    def serves(self) -> bool:
        """Whether it could answer at all, ready or not."""


class Server(Front):
    """A model of our own process behind the ports."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.predictor: Predictor | None = None
        self.line = Line()
        self._threads = ThreadPoolExecutor(options.concurrency, "predict")
        self._room = options.concurrency + options.queue

    @property
    def serves(self) -> bool:
        """Whether the model is loaded."""
        return self.predictor is not None

    @property
    def is_ready(self) -> bool:
        """Whether it is loaded and warm, and is not about to end."""
        return self.serves and not self.stopping

    async def answer(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Predict, or show a page."""
        if request.path != "/invocations":
            await self.page(request, scope, send)
        elif request.method != "POST":
            await self.reply(send, (405, JSON, b'{"detail":"Method Not Allowed"}'))
        else:
            await self._invocation(request, receive, send)

    def _ping(self, _query: dict[str, list[str]]) -> Reply:
        return (200 if self.serves else 503), JSON, b"\n"

    def _version(self, _query: dict[str, list[str]]) -> Reply:
        mlflow = sys.modules.get("mlflow")
        return 200, JSON, getattr(mlflow, "__version__", "").encode()

    async def _invocation(self, request: Request, receive: Receive, send: Send) -> None:
        headers = request.headers
        job = Job(self.rank(request), asyncio.get_running_loop().create_future(), headers.get(b"content-type", ""))
        try:
            refused = await self.body(request, receive, job)
            if refused is None and self.serves:
                refused = self.limited(request)
            if refused is not None:
                if refused[0] != GONE:
                    await self.reply(send, refused)
                return
            accept = headers.get(b"accept", "")
            if EVENTS in accept and self.predictor is not None and self.predictor.streams:
                reply = await self._stream(job, receive, send)
            elif EVENTS not in accept or JSON in accept or "*/*" in accept or self.predictor is None:
                reply = await self._predict(job)
            else:
                reply = no_stream()
            self.keep(request, reply[0], job.body, reply[2])
            # Nobody takes the answer of one that has left before it.
            if reply[0] != GONE and (job.stream is None or not job.stream.begun):
                await self.reply(send, reply)
        finally:
            self.forget(job)

    async def _stream(self, job: Job, receive: Receive, send: Send) -> Reply:
        job.stream = Stream(self, job, receive, send)
        reply = await self._predict(job)
        sent = await job.stream.end(reply)
        return (*reply[:2], sent) if job.stream.begun else reply

    async def _predict(self, job: Job) -> Reply:
        """Wait for a thread and for its answer, unless the line is full."""
        if self.predictor is None:
            return busy("the model is being loaded")
        # Copies and load tests may fill half of the queue, and leave it when it is full: what a client waits for
        # comes first.
        spare = self.options.queue // 2 if job.kind == COPY else 0
        if self._room <= spare and (job.kind == COPY or not self._give_up()):
            return busy("too many requests are waiting")
        self._room -= 1
        self.line.add(job)
        # A thread takes whoever is first then, which may be another one.
        self._threads.submit(self._take, self.predictor, asyncio.get_running_loop())
        try:
            async with job.stream.limit if job.stream else asyncio.timeout(self.options.timeout):
                return await job.done
        except TimeoutError:
            return 504, JSON, problem("DEADLINE_EXCEEDED", f"no answer within {self.options.timeout} s")

    def _give_up(self) -> bool:
        """Shed a copy that waits; return whether there was one."""
        job = self.line.give_up()
        if job is not None:
            self._finish(job, busy("a live request came first"))
        return job is not None

    def _take(self, predictor: Predictor, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: answer who is next."""
        job = self.line.take()
        if job is None:  # it was given up
            return
        reply: Reply = (500, JSON, problem("INTERNAL_ERROR", "the model failed"))
        try:
            if job.done.done():  # nobody waits any more
                pass
            elif job.stream:
                reply = predictor.stream(job.body, job.content_type, job.stream.push)
            else:
                reply = predictor(job.body, job.content_type)
        finally:
            loop.call_soon_threadsafe(self._finish, job, reply)

    def _finish(self, job: Job, reply: Reply) -> None:
        # The place is free again when the thread is, not when a caller has lost patience.
        self._room += 1
        if not job.done.done():
            job.done.set_result(reply)

    def load(self) -> None:
        """Load and warm up; then /ready is 200."""
        predictor = Predictor(Path(self.options.path))
        predictor.warm_up()
        self.predictor = predictor


def verify(options: argparse.Namespace) -> str | None:
    """Compare the artifact with the digest it was admitted with; return what is wrong."""
    try:
        found = artifact.digest(Path(options.path))
    except (OSError, ValueError) as error:
        return str(error)
    return None if found == options.digest else f"its digest is {found}, admitted was {options.digest}"


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line of whatever stands at the ports."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("model", "version", "path", "digest"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument(
        "--port", type=int, required=True, help="for live requests; alone, headers say what is not live"
    )
    parser.add_argument("--shadow-port", type=int, help="for copies")
    parser.add_argument("--own-port", type=int, help="for the version's own path, and for load tests")
    parser.add_argument("--pinned-port", type=int, help="for requests that a header sends here")
    parser.add_argument(
        "--admin-port", type=int, help="for /ready, /metrics and /titleshot/, which are nowhere else then"
    )
    parser.add_argument("--queue", type=int, default=256, help="requests that wait; more are shed")
    parser.add_argument("--fallback", default="", help="URL with {version}: who answers what this version fails")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one answer")
    parser.add_argument("--max-body", type=int, default=32 << 20, help="bytes of a request")
    parser.add_argument("--max-bodies", type=int, default=512 << 20, help="bytes of all requests under way")
    parser.add_argument("--keep", type=int, default=5000, help="answers kept for comparison")
    parser.add_argument("--keep-bytes", type=int, default=64 << 20, help="bytes of bodies kept")
    parser.add_argument(
        "--quiet", type=float, default=0.5, help="seconds without a live request that end it at SIGTERM"
    )
    parser.add_argument("--linger", type=float, default=5.0, help="seconds after SIGTERM that it listens at most")
    parser.add_argument("--graceful", type=float, default=30.0, help="seconds then for what is under way")
    return parser


def parse(given: Iterable[str] | None = None) -> argparse.Namespace:
    """The command line of the model server."""
    parser = arguments("Serve one model version.")
    parser.add_argument("--concurrency", type=int, default=2, help="predictions at once")
    return parser.parse_args(None if given is None else list(given))


def listeners(options: argparse.Namespace) -> list[socket.socket]:
    """A socket for each port, bound. Raises `OSError`."""
    ports = [options.port, options.shadow_port, options.own_port, options.pinned_port, options.admin_port]
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    bound = []
    for port in ports:
        if port is not None:
            bound.append(one := socket.socket(family))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((options.host, port))
    return bound


class Unservable(Exception):
    """Why this version cannot be served, in one sentence."""


def run(app: Front, load: Callable[[], None]) -> int:
    """Serve `app` until a signal; `load` makes it ready, in a thread of its own. Returns the exit code."""
    import uvicorn

    options = app.options

    class Gentle(uvicorn.Server):
        """Says that it is not ready as soon as it is asked to stop, and closes the door when that was heard."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            app.stopping = True
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: Any = None) -> None:
            await app.turn_away()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        # Longer than the gateway keeps an idle connection: or the gateway writes into a closing one.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=options.graceful,
    )
    server, failed = Gentle(config), threading.Event()

    def begin() -> None:
        try:
            load()
        except Unservable as error:
            print(f"{options.model} {options.version} cannot be served: {error}", file=sys.stderr)  # noqa: T201
        except BaseException:  # noqa: BLE001 - whatever a model raises, it is not served
            traceback.print_exc()
            print(f"{options.model} {options.version} cannot be served: see above", file=sys.stderr)  # noqa: T201
        else:
            return
        failed.set()
        server.should_exit = True

    try:
        sockets = listeners(options)
    except OSError as error:
        print(f"{options.model} {options.version} cannot listen at {options.host}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    threading.Thread(target=begin, name="load", daemon=True).start()
    server.run(sockets)
    return 1 if failed.is_set() else 0


def leave(code: int) -> None:
    """End the process. A prediction that hangs in its thread must not keep a stopped server alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    """Verify, serve, load; return the exit code."""
    # Run by path, our own directory would come first for every import of the model's code.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    options = parse()
    if wrong := verify(options):
        print(f"{options.model} {options.version} is not what was admitted: {wrong}", file=sys.stderr)  # noqa: T201
        return WRONG_DIGEST
    app = Server(options)
    return run(app, app.load)


if __name__ == "__main__":
    leave(main())

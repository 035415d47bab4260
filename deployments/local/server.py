"""The model server: one model version behind MLflow's scoring contract, in one process.

Run by path, also by the Python of an environment that has only mlflow and uvicorn, so it imports nothing of
ours but `../artifact.py`, by path. It adds to MLflow's own scoring server: the digest is verified before
anything is loaded, /ready is 200 only after a warm-up, 500 means that the model itself failed (MLflow answers
400), answers are kept for comparison by request id, and what it cannot take in time is shed with a 503.
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

JSON = "application/json"
PLAIN_JSON = frozenset({JSON, f"{JSON};charset=utf-8"})
WRONG_DIGEST = 3
"""The exit code where the artifact is not the one that was admitted."""
WARM_UP = 5
Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]
Reply = tuple[int, str, bytes]


class ModelFailed(BaseException):
    """Raised inside the model's own predict. A BaseException, so that MLflow's `except Exception`, which
    makes a 400 of everything, lets it pass.
    """


def guarded(predict: Callable[..., Any], library: str) -> Callable[..., Any]:
    """Wrap a pyfunc's inner predict: what goes wrong in there is the model's fault.

    One exception: an MLflow error with a 4xx code, raised with nothing but MLflow's own frames (`library` is
    its directory) below us, is MLflow's check of the caller's data against the model's type hints.
    """

    @functools.wraps(predict)
    def inner(*args: Any, **kwargs: Any) -> Any:
        try:
            return predict(*args, **kwargs)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]
            code = getattr(error, "get_http_status_code", lambda: 500)()
            if code < 500 and all(frame.filename.startswith(library) for frame in frames):
                raise
            raise ModelFailed(f"{type(error).__name__}: {error}") from error

    return inner


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
        self._predict = guarded(self._model._predict_fn, str(Path(mlflow.__file__).parent))  # noqa: SLF001
        self._model._predict_fn = self._predict  # noqa: SLF001
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

    def _call(self, frame: Any) -> Any:
        from mlflow.pyfunc.context import Context, set_prediction_context

        with set_prediction_context(Context(model_id=getattr(self._model, "model_id", None))):
            return self._predict(frame)


def failure(error: BaseException) -> Reply:
    """The reply to a request that went wrong. MLflow's own errors know whose mistake it was (4xx: the
    caller's); anything else is the model's or ours.
    """
    if isinstance(error, Exception) and hasattr(error, "serialize_as_json"):
        return error.get_http_status_code(), JSON, error.serialize_as_json().encode()  # type: ignore[attr-defined]
    traceback.print_exception(error)
    what = error if isinstance(error, ModelFailed) else f"{type(error).__name__}: {error}"
    return 500, JSON, problem("INTERNAL_ERROR", f"the model failed: {what}")


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
        """Keep one answer (the fields of `Kept` but its number); the oldest go where there is no room."""
        kept = Kept(number=self._next, **fields)
        self._next += 1
        self._kept.append(kept)
        self._held += len(kept.request) + len(kept.response)
        while self._kept and (len(self._kept) > self._count or self._held > self._size):
            gone = self._kept.popleft()
            self._held -= len(gone.request) + len(gone.response)

    def after(self, number: int, limit: int) -> Iterator[Kept]:
        """At most `limit` of the answers with a higher number, oldest first."""
        # Numbers have no gaps inside the ring: the place of the first one wanted is known.
        first = self._kept[0].number if self._kept else 0
        start = max(0, number + 1 - first)
        for place in range(start, min(len(self._kept), start + limit)):
            yield self._kept[place]


class Server:
    """The ASGI application."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.predictor: Predictor | None = None
        self._ring = Ring(options.keep, options.keep_bytes)
        self._threads = ThreadPoolExecutor(options.concurrency, "predict")
        self._room = options.concurrency + options.queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        # The raw path: a gateway that guards /titleshot/ does not decode %74itleshot, and neither do we.
        path, method = scope["raw_path"].partition(b"?")[0].decode("latin-1"), scope["method"]
        if path == "/invocations":
            if method != "POST":
                await self._send(send, (405, JSON, b'{"detail":"Method Not Allowed"}'))
            else:
                await self._invocation(scope, receive, send)
            return
        page = {
            "/ping": self._ping,
            "/health": self._ping,
            "/version": self._version,
            "/ready": self._ready,
            "/titleshot/identity": self._identity,
            "/titleshot/answers": self._answers,
        }.get(path)
        if page is None:
            await self._send(send, (404, JSON, b'{"detail":"Not Found"}'))
        elif method not in {"GET", "HEAD"}:
            await self._send(send, (405, JSON, b'{"detail":"Method Not Allowed"}'))
        else:
            await self._send(send, page(parse_qs(scope["query_string"].decode("latin-1"))))

    def _ping(self, _query: dict[str, list[str]]) -> Reply:
        return (200 if self.predictor else 503), JSON, b"\n"

    def _ready(self, _query: dict[str, list[str]]) -> Reply:
        return (200, JSON, b'{"ready":true}') if self.predictor else (503, JSON, b'{"ready":false}')

    def _version(self, _query: dict[str, list[str]]) -> Reply:
        mlflow = sys.modules.get("mlflow")
        return 200, JSON, getattr(mlflow, "__version__", "").encode()

    def _identity(self, _query: dict[str, list[str]]) -> Reply:
        options = self.options
        who = {"model": options.model, "version": options.version, "digest": options.digest}
        return (
            200,
            JSON,
            json.dumps({**who, "pid": os.getpid(), "ready": self.predictor is not None}).encode(),
        )

    def _answers(self, query: dict[str, list[str]]) -> Reply:
        try:
            after, limit = int(query.get("after", ["-1"])[0]), int(query.get("limit", ["500"])[0])
        except ValueError:
            return 400, JSON, problem("BAD_REQUEST", "after and limit are whole numbers")
        lines = b"".join(kept.line() for kept in self._ring.after(after, limit))
        return 200, "application/x-ndjson", lines

    async def _invocation(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        started, at = time.perf_counter(), time.time()
        body = await self._body(receive, int(headers.get(b"content-length") or 0))
        if body is None:
            limit = self.options.max_body
            await self._send(send, (413, JSON, problem("BAD_REQUEST", f"a body has at most {limit} bytes")))
            return
        shadow, load = headers.get(b"x-shadow") == "1", headers.get(b"x-titleshot-load") == "1"
        # Copies and load tests may fill half of the queue: what a client waits for comes first.
        spare = self.options.queue // 2 if shadow or load else 0
        reply = await self._predict(body, headers.get(b"content-type", ""), spare)
        if load:  # nobody's request: not to be taken for live traffic later
            await self._send(send, reply)
            return
        self._ring.add(
            request_id=headers.get(b"x-request-id", ""),
            shadow=shadow,
            status=reply[0],
            request=body,
            response=reply[2],
            at=at,
            seconds=time.perf_counter() - started,
        )
        await self._send(send, reply)

    async def _body(self, receive: Receive, announced: int) -> bytes | None:
        parts: list[bytes] = []
        size, more = announced, True
        while more and size <= self.options.max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size = max(announced, sum(map(len, parts)))
            more = message.get("more_body", False)
        return None if size > self.options.max_body else b"".join(parts)

    async def _predict(self, body: bytes, content_type: str, spare: int) -> Reply:
        """Predict, unless no more than `spare` places of the queue are free."""
        if self.predictor is None:
            return 503, JSON, problem("TEMPORARILY_UNAVAILABLE", "the model is being loaded")
        if self._room <= spare:
            return 503, JSON, problem("TEMPORARILY_UNAVAILABLE", "too many requests are waiting")
        self._room -= 1
        work = asyncio.get_running_loop().run_in_executor(self._threads, self.predictor, body, content_type)
        # The place is free again when the thread is, not when a caller has lost patience.
        work.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(asyncio.shield(work), self.options.timeout)
        except TimeoutError:
            return 504, JSON, problem("DEADLINE_EXCEEDED", f"no answer within {self.options.timeout} s")

    def _leave(self, _work: object) -> None:
        self._room += 1

    async def _send(self, send: Send, reply: Reply) -> None:
        status, content_type, body = reply
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"x-titleshot-version", self.options.version.encode()),
        ]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def load(self) -> None:
        """Load and warm up; then /ready is 200."""
        predictor = Predictor(Path(self.options.path))
        predictor.warm_up()
        self.predictor = predictor


def verify(options: argparse.Namespace) -> str | None:
    """Compare the artifact with the digest it was admitted with; return what is wrong."""
    spec = importlib.util.spec_from_file_location(
        "titleshot_artifact", Path(__file__).resolve().parents[1] / "artifact.py"
    )
    if spec is None or spec.loader is None:
        return "artifact.py is missing beside the server"
    artifact = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(artifact)
    try:
        found = artifact.digest(Path(options.path))
    except (OSError, ValueError) as error:
        return str(error)
    return None if found == options.digest else f"its digest is {found}, admitted was {options.digest}"


def parse(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Serve one model version.")
    for name in ("model", "version", "path", "digest"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=2, help="predictions at once")
    parser.add_argument("--queue", type=int, default=256, help="requests that wait; more are shed")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one answer")
    parser.add_argument("--max-body", type=int, default=32 << 20, help="bytes of a request")
    parser.add_argument("--keep", type=int, default=5000, help="answers kept for comparison")
    parser.add_argument("--keep-bytes", type=int, default=64 << 20, help="bytes of bodies kept")
    return parser.parse_args(None if arguments is None else list(arguments))


def main() -> int:
    """Verify, serve, load; return the exit code."""
    # Run by path, our own directory would come first for every import of the model's code.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    options = parse()
    if wrong := verify(options):
        print(f"{options.model} {options.version} is not what was admitted: {wrong}", file=sys.stderr)  # noqa: T201
        return WRONG_DIGEST
    import uvicorn

    app = Server(options)
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=options.port,
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        # Longer than the gateway keeps an idle connection: or the gateway writes into a closing one.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )
    server, failed = uvicorn.Server(config), threading.Event()

    def load() -> None:
        try:
            app.load()
        except BaseException:  # noqa: BLE001 - whatever a model raises, it is not served
            traceback.print_exc()
            print(f"{options.model} {options.version} cannot be served: see above", file=sys.stderr)  # noqa: T201
            failed.set()
            server.should_exit = True

    threading.Thread(target=load, name="load", daemon=True).start()
    server.run()
    return 1 if failed.is_set() else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A prediction that hangs in its thread must not keep a stopped server alive.
    os._exit(code)

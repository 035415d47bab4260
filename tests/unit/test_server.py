"""The model server in one process with MLflow's own scoring application, side by side."""

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("mlflow")
import mlflow
import numpy as np
import pandas as pd
from mlflow.models import infer_signature
from mlflow.pyfunc import load_model, scoring_server
from mlflow.types import ParamSchema, ParamSpec
from sklearn.linear_model import LogisticRegression

from deployments.artifact import digest
from deployments.local import server
from deployments.local.server import Bucket, Predictor, Ring, Server, limit_of, parse
from deployments.target import Answer

PICKY = """
import mlflow
import numpy as np
from mlflow.exceptions import MlflowException

class Picky(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        mood = model_input["s"].iloc[0]
        if mood == "raise":
            raise ValueError("the model is broken")
        if mood == "exit":
            raise SystemExit(3)
        if mood == "mlflow":
            raise MlflowException.invalid_parameter_value("raised by the model")
        if mood == "unserialisable":
            return [object()]
        return [{"n": np.float32(0.1), "scale": (params or {}).get("scale"), "rows": len(model_input)}]

mlflow.models.set_model(Picky())
"""
HINTED = """
import mlflow
import pydantic

class Row(pydantic.BaseModel):
    x: float

class Hinted(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[Row]) -> list[float]:
        return [2 * row.x if row.x < 100 else 1 / 0 for row in model_input]

mlflow.models.set_model(Hinted())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), columns=["a", "b", "c"])
    fitted = LogisticRegression().fit(rows, (rows.a > 0).astype(int))
    needs = {"pip_requirements": ["mlflow"]}
    mlflow.sklearn.save_model(
        fitted,
        root / "sklearn",
        signature=infer_signature(rows, fitted.predict_proba(rows)),
        input_example=rows.head(2),
        pyfunc_predict_fn="predict_proba",
        **needs,
    )
    mlflow.sklearn.save_model(fitted, root / "bare", **needs)
    (root / "picky.py").write_text(PICKY)
    signature = infer_signature(pd.DataFrame({"s": ["a"], "n": [1]}), [{"n": 0.1}])
    signature.params = ParamSchema([ParamSpec("scale", "double", 1.0)])
    mlflow.pyfunc.save_model(root / "picky", python_model=str(root / "picky.py"), signature=signature, **needs)
    (root / "hinted.py").write_text(HINTED)
    mlflow.pyfunc.save_model(root / "hinted", python_model=str(root / "hinted.py"), **needs)
    return root


def options(path: Path, *more: str) -> Any:
    return parse(["--model", "m", "--version", "3", "--path", str(path), "--digest", "d", "--port", "1", *more])


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


@pytest.fixture(scope="module")
def apps(root: Path) -> dict[str, tuple[Server, Any]]:
    """Ours and MLflow's application, per model."""
    made = {}
    for name in ("sklearn", "bare", "picky", "hinted"):
        ours = Server(options(root / name))
        ours.load()
        made[name] = (ours, scoring_server.init(load_model(str(root / name))))
    return made


def ask(app: Any, content: bytes, content_type: str | None = "application/json") -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(app) as one:
            headers = {"content-type": content_type} if content_type else {}
            return await one.post("/invocations", content=content, headers=headers)

    return asyncio.run(go())


def dumps(**fields: object) -> bytes:
    return json.dumps(fields).encode()


SPLIT = {"columns": ["a", "b", "c"], "data": [[0.1, 0.2, -3.0], [1, 2, 3]]}
ROWS = [{"a": 0.1, "b": 0.2, "c": -3.0}, {"c": 1, "b": 2, "a": 3}]
FINE = [
    ("sklearn", dumps(dataframe_split=SPLIT), "application/json"),
    ("sklearn", dumps(dataframe_split=SPLIT), "application/json; charset=utf-8"),
    ("sklearn", dumps(dataframe_split={**SPLIT, "index": [7, 9]}), "application/json"),
    ("sklearn", dumps(dataframe_records=ROWS), "application/json"),
    ("sklearn", dumps(dataframe_records=[{**row, "extra": "x"} for row in ROWS]), "application/json"),
    ("sklearn", dumps(instances=ROWS), "application/json"),
    ("sklearn", dumps(inputs={"a": [0.1], "b": [0.2], "c": [0.3]}), "application/json"),
    ("sklearn", b"c,a,b\n1.0,2.0,3.0\n4.5,5.5,6.5\n", "text/csv"),
    ("bare", dumps(dataframe_split=SPLIT), "application/json"),
    ("bare", dumps(inputs=[[1.0, 2.0, 3.0]]), "application/json"),
    ("picky", dumps(dataframe_records=[{"s": "a", "n": 1}]), "application/json"),
    ("picky", dumps(dataframe_records=[{"s": "a", "n": 1}], params={"scale": 3.5}), "application/json"),
    ("picky", dumps(dataframe_records=[{"s": "a", "n": 1}], params={"unknown": 1}), "application/json"),
    ("hinted", dumps(inputs=[{"x": 1.5}, {"x": 2}]), "application/json"),
]


@pytest.mark.parametrize(("name", "content", "content_type"), FINE)
def test_good_answers_are_mlflows_to_the_byte(apps: Any, name: str, content: bytes, content_type: str) -> None:
    """For every request that MLflow's application answers with 200, ours gives the same bytes."""
    ours, theirs = (ask(app, content, content_type) for app in apps[name])
    assert (theirs.status_code, ours.status_code) == (200, 200), (theirs.text, ours.text)
    assert ours.content == theirs.content
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert ours.headers["x-titleshot-version"] == "3"


MISTAKES = [
    ("sklearn", b"", "application/json", 400),
    ("sklearn", b"{", "application/json", 400),
    ("sklearn", b"\xff\xfe", "application/json", 400),
    ("sklearn", b"[1]", "application/json", 400),
    ("sklearn", b"{}", "application/json", 400),
    ("sklearn", dumps(dataframe_split=SPLIT, dataframe_records=ROWS), "application/json", 400),
    ("sklearn", dumps(dataframe_split={"columns": ["a"], "data": [[1.0]]}), "application/json", 400),
    ("sklearn", dumps(dataframe_records=[{"a": "x", "b": 1, "c": 2}]), "application/json", 400),
    ("sklearn", dumps(dataframe_split=[1]), "application/json", 400),
    ("sklearn", dumps(inputs=[[1.0, 2.0, 3.0]]), "application/json", 400),
    ("sklearn", b'a,b\n"1', "text/csv", 400),
    ("sklearn", b"x", "text/plain", 415),
    ("sklearn", b"{}", "application/json; charset=latin-1", 415),
    ("sklearn", b"{}", "application/json; x=y", 415),
    ("picky", dumps(dataframe_records=[{"s": "a", "n": 1}], params={"scale": "much"}), "application/json", 400),
    ("picky", dumps(dataframe_records=[{"s": "a", "n": 1}], params=[1]), "application/json", 400),
    ("hinted", dumps(inputs=[{"y": 1.5}]), "application/json", 400),
    ("hinted", dumps(inputs=[{"x": "no number"}]), "application/json", 400),
    ("hinted", dumps(dataframe_records=[{"x": 1.5}]), "application/json", 400),
]


@pytest.mark.parametrize(("name", "content", "content_type", "status"), MISTAKES)
def test_mistakes_of_the_caller_have_mlflows_status(
    apps: Any, name: str, content: bytes, content_type: str, status: int
) -> None:
    """The caller's mistakes are 400 or 415, as MLflow has them, with a JSON error."""
    ours, theirs = (ask(app, content, content_type) for app in apps[name])
    assert (ours.status_code, theirs.status_code) == (status, status), (ours.text, theirs.text)
    assert ours.json()["message"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("picky", dumps(dataframe_records=[{"s": "raise", "n": 1}])),
        ("picky", dumps(dataframe_records=[{"s": "exit", "n": 1}])),
        ("picky", dumps(dataframe_records=[{"s": "mlflow", "n": 1}])),
        ("picky", dumps(dataframe_records=[{"s": "unserialisable", "n": 1}])),
        ("sklearn", b'{"dataframe_split": {"columns": ["a", "b", "c"], "data": [[NaN, 1, 2]]}}'),
        ("sklearn", b"a,b,c\n,1.0,2.0\n"),
        ("hinted", dumps(inputs=[{"x": 1000}])),
    ],
)
def test_failures_of_the_model_are_500(apps: Any, name: str, content: bytes) -> None:
    """What goes wrong inside the model is its own fault and not the caller's."""
    answer = ask(apps[name][0], content, "text/csv" if content.startswith(b"a,") else "application/json")
    assert answer.status_code == 500, answer.text
    assert answer.json()["error_code"] == "INTERNAL_ERROR"
    assert "Traceback" not in answer.text


def test_without_a_content_type_it_is_415(apps: Any) -> None:
    """MLflow's application crashes here; ours says what is wrong."""
    assert ask(apps["sklearn"][0], b"{}", None).status_code == 415


def test_the_lean_way_is_taken_and_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lean way serves a plain model; where it fails on the model's own example, MLflow's serves instead."""
    good = Predictor(root / "sklearn")
    good.warm_up()
    assert good._frames(good.example or b"") is not None
    made = server.Frames.__call__
    monkeypatch.setattr(server.Frames, "__call__", lambda self, body: made(self, body) * 2)
    wrong = Predictor(root / "sklearn")
    wrong.warm_up()
    assert wrong._frames(wrong.example or b"") is None
    assert Predictor(root / "picky")._frames(FINE[10][1]) is None  # it has params


def test_a_model_that_fails_its_own_example_is_not_served(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up raises where the model cannot answer the example that it brought along."""
    broken = Predictor(root / "sklearn")
    broken.example = b'{"dataframe_split": {"columns": ["a", "b", "c"], "data": [[NaN, 1, 2]]}}'
    with pytest.raises(RuntimeError, match="its own input example"):
        broken.warm_up()


def get(app: Any, path: str, method: str = "GET") -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(app) as one:
            return await one.request(method, path)

    return asyncio.run(go())


def test_before_it_is_loaded_nothing_is_ready(root: Path) -> None:
    """/ready, /ping and predictions are 503 until the model is warm; who it is, it says at once."""
    app = Server(options(root / "sklearn"))
    assert get(app, "/ready").status_code == get(app, "/ping").status_code == 503
    early = ask(app, dumps(dataframe_split=SPLIT))
    assert (early.status_code, early.headers["retry-after"]) == (503, "1")
    identity = get(app, "/titleshot/identity").json()
    assert {**identity, "pid": 0} == {"model": "m", "version": "3", "digest": "d", "pid": 0, "ready": False}


def test_pages(apps: Any) -> None:
    """MLflow's pages and ours; other paths are 404, other methods 405, and paths are not decoded."""
    app = apps["sklearn"][0]
    assert get(app, "/ready").status_code == get(app, "/ping").status_code == get(app, "/health").status_code == 200
    assert get(app, "/version").text == mlflow.__version__
    assert get(app, "/titleshot/identity").json()["ready"] is True
    assert get(app, "/nowhere").status_code == get(app, "/%74itleshot/answers").status_code == 404
    assert get(app, "/invocations").status_code == get(app, "/ready", "POST").status_code == 405
    assert get(app, "/titleshot/answers?after=x").status_code == 400


def test_answers_are_kept_with_their_bodies(root: Path) -> None:
    """Each answer is there with its number, request id, shadow flag and both bodies, text or base64."""
    app = Server(options(root / "sklearn"))
    app.load()

    async def go() -> None:
        async with client(app) as one:
            json_ = {"content-type": "application/json"}
            for number in range(3):
                headers = {**json_, "x-request-id": f"r{number}", "x-shadow": "1" if number == 1 else "0"}
                await one.post("/invocations", content=dumps(dataframe_split=SPLIT), headers=headers)
            await one.post("/invocations", content=b"\xff", headers=json_)

    asyncio.run(go())
    lines = [json.loads(line) for line in get(app, "/titleshot/answers?after=0&limit=2").text.splitlines()]
    assert [(one["number"], one["request_id"], one["shadow"], one["status"]) for one in lines] == [
        (1, "r1", True, 200),
        (2, "r2", False, 200),
    ]
    assert json.loads(lines[0]["request"])["dataframe_split"] == SPLIT
    assert "predictions" in lines[0]["response"]
    last = json.loads(get(app, "/titleshot/answers?after=2").text)
    assert (last["status"], last["request"], last["request_id"]) == (400, {"base64": "/w=="}, "")
    assert get(app, "/titleshot/answers?after=3").text == ""


def test_the_ring_is_bounded_by_count_and_bytes() -> None:
    """The oldest answers go first; one that is too large alone is left out, and its number is missing."""
    fields = {"request_id": "", "shadow": False, "status": 200, "response": b"", "at": 0.0, "seconds": 0.0}
    ring = Ring(3, 100)
    for _ in range(5):
        ring.add(request=b"x" * 10, **fields)
    assert [one.number for one in ring.after(-1, 10)] == [2, 3, 4]
    assert [one.number for one in ring.after(3, 10)] == [4]
    ring.add(request=b"x" * 85, **fields)
    assert [one.number for one in ring.after(-1, 10)] == [4, 5]
    ring.add(request=b"x" * 101, **fields)
    assert [one.number for one in ring.after(-1, 10)] == [4, 5]
    ring.add(request=b"x", **fields)
    assert [one.number for one in ring.after(-1, 10)] == [4, 5, 7]
    assert [one.number for one in ring.after(5, 10)] == [one.number for one in ring.after(6, 10)] == [7]


def held_up(app: Server) -> threading.Event:
    """Predictions of `app` wait from now on until the event is set."""
    go_on = threading.Event()

    def slow(body: bytes, content_type: str) -> server.Reply:
        go_on.wait(10)
        return 200, "application/json", b"{}"

    app.predictor = slow  # type: ignore[assignment]
    return go_on


def test_live_requests_go_before_copies_and_load(root: Path) -> None:
    """Half of the queue is kept for live requests; a load test's are not taken for live ones afterwards."""
    app = Server(options(root / "sklearn", "--concurrency", "1", "--queue", "2"))
    go_on = held_up(app)

    async def go() -> list[int]:
        async with client(app) as one:
            busy = [asyncio.create_task(one.post("/invocations", content=b"{}")) for _ in range(2)]
            while app._room > 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
            extra = [{"x-shadow": "1"}, {"x-titleshot-load": "1"}]
            shed = [(await one.post("/invocations", content=b"{}", headers=h)).status_code for h in extra]
            live = asyncio.create_task(one.post("/invocations", content=b"{}"))
            while app._room:  # noqa: ASYNC110
                await asyncio.sleep(0)
            go_on.set()
            return [*shed, *[(await task).status_code for task in (*busy, live)]]

    assert asyncio.run(go()) == [503, 503, 200, 200, 200]
    kept = [json.loads(line) for line in get(app, "/titleshot/answers").text.splitlines()]
    assert [(one["status"], one["shadow"]) for one in kept] == [(503, True), (200, False), (200, False), (200, False)]


def test_who_waits_is_taken_by_class_and_then_in_turn(root: Path) -> None:
    """High priority goes first, then other live requests, then copies and load tests; in a class, who came first."""
    app = Server(options(root / "sklearn", "--concurrency", "1"))
    go_on, taken = threading.Event(), list[bytes]()

    def predict(body: bytes, content_type: str) -> server.Reply:
        taken.append(body)
        go_on.wait(10)
        return 200, "application/json", b"{}"

    app.predictor = predict  # type: ignore[assignment]
    came = [
        ("first", {}),
        ("load", {"x-titleshot-load": "1"}),
        ("copy", {"x-shadow": "1"}),
        ("live", {}),
        ("live2", {}),
    ]
    came += [("high copy", {"x-shadow": "1", "x-titleshot-priority": "high"})]
    came += [("low", {"x-titleshot-priority": "low"}), ("high", {"x-titleshot-priority": "high"})]

    async def go() -> set[int]:
        async with client(app) as one:
            tasks = []
            for place, (name, headers) in enumerate(came):
                post = one.post("/invocations", content=name.encode(), headers=headers)
                tasks.append(asyncio.create_task(post))
                while app._room > 256 - place or not taken:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            go_on.set()
            return {(await task).status_code for task in tasks}

    assert asyncio.run(go()) == {200}
    assert b" ".join(taken) == b"first high live live2 low load copy high copy"


def test_a_flood_of_copies_costs_a_live_request_one_prediction_at_most(root: Path) -> None:
    """However many copies wait, a live request is taken as soon as one thread has ended what it was doing."""
    app = Server(options(root / "sklearn", "--concurrency", "2", "--queue", "400"))
    steps, taken = threading.Semaphore(0), list[bytes]()

    def predict(body: bytes, content_type: str) -> server.Reply:
        taken.append(body)
        steps.acquire(timeout=10)
        return 200, "application/json", body

    app.predictor = predict  # type: ignore[assignment]

    async def go() -> list[bytes]:
        async with client(app) as one:
            copy, came = {"x-shadow": "1"}, list[bytes]()
            flood = [asyncio.create_task(one.post("/invocations", content=b"copy", headers=copy)) for _ in range(200)]
            while app._room > 202 or len(taken) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
            for _ in range(20):
                live, before = asyncio.create_task(one.post("/invocations", content=b"live")), len(taken)
                while not app.line.live:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                while not live.done():
                    steps.release()  # one of the two threads ends what it does and takes who is next
                    now = len(taken)
                    while len(taken) == now:  # noqa: ASYNC110
                        await asyncio.sleep(0)
                    await asyncio.sleep(0.01)
                came.append(taken[before])
            steps.release(1000)
            await asyncio.gather(*flood)
            return came

    assert asyncio.run(go()) == [b"live"] * 20


def test_a_waiting_copy_makes_room_for_a_live_request(root: Path) -> None:
    """Where the queue is full, a live request takes the place of the last copy in it, which is shed; where no
    copy waits, the live request is.
    """
    app = Server(options(root / "sklearn", "--concurrency", "1", "--queue", "4"))
    go_on = held_up(app)

    async def go() -> tuple[list[int], list[int]]:
        async with client(app) as one:

            async def came(room: int, headers: dict[str, str]) -> asyncio.Task[httpx.Response]:
                task = asyncio.create_task(one.post("/invocations", content=b"{}", headers=headers))
                while app._room > room:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                return task

            first = await came(4, {})
            copies = [await came(room, {"x-shadow": "1"}) for room in (3, 2)]
            live = [await came(room, {}) for room in (1, 0)]
            pushing = [asyncio.create_task(one.post("/invocations", content=b"{}")) for _ in range(2)]
            shed = [(await copy).status_code for copy in copies]
            late = await one.post("/invocations", content=b"{}")
            go_on.set()
            served = [(await task).status_code for task in (first, *live, *pushing)]
            return [*shed, late.status_code], served

    assert asyncio.run(go()) == ([503, 503, 503], [200] * 5)
    assert app._room == 5


def test_nobody_waits_any_more_means_no_prediction(root: Path) -> None:
    """A request that ran out of time while it waited is not predicted when its turn comes."""
    app = Server(options(root / "sklearn", "--concurrency", "1", "--timeout", "0.05"))
    go_on, taken = threading.Event(), list[bytes]()

    def predict(body: bytes, content_type: str) -> server.Reply:
        taken.append(body)
        go_on.wait(10)
        return 200, "application/json", b"{}"

    app.predictor = predict  # type: ignore[assignment]

    async def go() -> tuple[set[int], int]:
        async with client(app) as one:
            late = await asyncio.gather(*(one.post("/invocations", content=b"late") for _ in range(3)))
            go_on.set()
            while app._room < 257:  # noqa: ASYNC110
                await asyncio.sleep(0)
            return {one.status_code for one in late}, (await one.post("/invocations", content=b"next")).status_code

    assert asyncio.run(go()) == ({504}, 200)
    assert taken == [b"late", b"next"]


def test_what_it_cannot_take_is_shed(root: Path) -> None:
    """Beyond `concurrency` and `queue` a request is 503 at once; a place is free again after an answer."""
    app = Server(options(root / "sklearn", "--concurrency", "1", "--queue", "1"))
    go_on = held_up(app)

    async def go() -> tuple[list[int], int]:
        async with client(app) as one:
            busy = [asyncio.create_task(one.post("/invocations", content=b"{}")) for _ in range(2)]
            while app._room:  # noqa: ASYNC110
                await asyncio.sleep(0)
            shed = [(await one.post("/invocations", content=b"{}")).status_code for _ in range(3)]
            go_on.set()
            served = [(await task).status_code for task in busy]
            while not app._room:  # noqa: ASYNC110
                await asyncio.sleep(0)
            return [*shed, *served], (await one.post("/invocations", content=b"{}")).status_code

    assert asyncio.run(go()) == ([503, 503, 503, 200, 200], 200)


def test_a_slow_answer_is_504_and_keeps_its_place(root: Path) -> None:
    """After `timeout` the client hears 504; the thread is still busy and its place not free."""
    app = Server(options(root / "sklearn", "--concurrency", "1", "--queue", "0", "--timeout", "0.05"))
    go_on = threading.Event()
    app.predictor = lambda body, content_type: (go_on.wait(10), (200, "x", b""))[1]  # type: ignore[assignment, return-value]

    async def go() -> tuple[int, int]:
        async with client(app) as one:
            first = (await one.post("/invocations", content=b"{}")).status_code
            second = (await one.post("/invocations", content=b"{}")).status_code
            go_on.set()
            return first, second

    assert asyncio.run(go()) == (504, 503)


def test_a_large_body_is_413(root: Path) -> None:
    """A body over the limit is refused, whether it says its length or not; one at the limit is not."""
    app = Server(options(root / "sklearn", "--max-body", "100"))
    app.predictor = lambda body, content_type: (200, "application/json", b"{}")  # type: ignore[assignment]
    assert ask(app, b"x" * 101).status_code == 413
    assert ask(app, b"x" * 100).status_code == 200

    async def chunks() -> Any:
        for _ in range(11):
            yield b"x" * 10

    async def go() -> int:
        async with client(app) as one:
            return (await one.post("/invocations", content=chunks())).status_code

    assert asyncio.run(go()) == 413


def test_more_than_its_limit_is_429(root: Path) -> None:
    """Live requests over the rate of the server's own version are refused in MLflow's form, without a prediction
    and without a trace in the ring; copies are no part of it.
    """
    app = Server(options(root / "sklearn"))
    predicted = list[bytes]()
    app.predictor = lambda body, content_type: (predicted.append(body), (200, "application/json", b"{}"))[1]  # type: ignore[assignment, func-returns-value, return-value]

    async def go() -> list[httpx.Response]:
        limits = {"x-titleshot-limits": "2=100;3=0.01"}
        async with client(app) as one:
            asked = [limits, limits, {**limits, "x-shadow": "1"}, {}, {"x-titleshot-limits": "2=1"}]
            return [await one.post("/invocations", content=b"{}", headers=headers) for headers in asked]

    answers = asyncio.run(go())
    assert [answer.status_code for answer in answers] == [200, 429, 200, 200, 200]
    assert answers[1].headers["retry-after"] == "1"
    assert answers[1].json() == {
        "error_code": "RESOURCE_EXHAUSTED",
        "message": "version 3 takes 0.01 requests per second",
    }
    assert len(predicted) == 4
    assert [json.loads(line)["status"] for line in get(app, "/titleshot/answers").text.splitlines()] == [200] * 4


def test_a_burst_is_one_seconds_worth() -> None:
    """At once there pass as many as in one second, but at least one; afterwards the rate holds."""
    for rate, burst in ((20, 20), (2.5, 2), (0.1, 1)):
        bucket = Bucket()
        assert sum(bucket.take(rate, 5.0) for _ in range(100)) == burst
    bucket = Bucket()
    assert sum(bucket.take(20, 5 + tick / 1024) for tick in range(10_241)) == 20 + 10 * 20
    slow = Bucket()
    assert [tick for tick in range(25) if slow.take(0.125, 5.0 + tick)] == [0, 8, 16, 24]


@pytest.mark.parametrize(
    ("header", "rate"),
    [
        ("3=20", 20.0),
        ("2=100; 3=0.5", 0.5),
        ("", None),
        ("2=100", None),
        ("3", None),
        ("3=", None),
        ("3=many", None),
        ("3=-1", None),
        ("3=0", None),
        ("3=inf", None),
        ("3=nan", None),
        (";;=;3=7;", 7.0),
        ("33=1", None),
    ],
)
def test_a_malformed_limit_is_none(header: str, rate: float | None) -> None:
    """Only a positive number for the own version is a limit."""
    assert limit_of(header, "3") == rate


def test_the_own_path_is_kept(root: Path) -> None:
    """An answer says whether the version was asked for by name."""
    app = Server(options(root / "sklearn"))
    app.predictor = lambda body, content_type: (200, "application/json", b"{}")  # type: ignore[assignment]

    async def go() -> None:
        async with client(app) as one:
            for headers in ({}, {"x-titleshot-own-path": "1"}):
                await one.post("/invocations", content=b"{}", headers=headers)

    asyncio.run(go())
    lines = [json.loads(line) for line in get(app, "/titleshot/answers").text.splitlines()]
    assert [Answer(**line).own_path for line in lines] == [False, True]


def told(app: Server, messages: list[dict[str, Any]], *, then: str = "hang") -> list[dict[str, Any]]:
    """What `app` sends where the server in front of it receives `messages`, and after them nothing or a hang-up."""
    sent: list[dict[str, Any]] = []
    scope = {"type": "http", "method": "POST", "raw_path": b"/invocations", "query_string": b"", "headers": []}

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        if then == "hang":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def part(size: int) -> dict[str, Any]:
    return {"type": "http.request", "body": b"x" * size, "more_body": True}


def test_a_body_that_never_ends_holds_nothing(root: Path) -> None:
    """One that stops coming is a 408 after `timeout`, one whose sender hangs up is no request, and one that goes on
    for ever a 413; none of them is predicted, kept, or counted any more.
    """
    app = Server(options(root / "sklearn", "--timeout", "0.05", "--max-body", "100"))
    app.predictor = lambda body, content_type: 1 / 0  # type: ignore[assignment, return-value]
    assert told(app, [part(10)])[0]["status"] == 408
    assert told(app, [part(10)], then="hang up") == []
    assert told(app, [part(10) for _ in range(11)])[0]["status"] == 413
    assert app._bodies == 0
    assert get(app, "/titleshot/answers").text == ""


def test_all_bodies_together_are_bounded(root: Path) -> None:
    """Large bodies beyond `max-bodies` in all are shed with 503; small ones pass all the same."""
    app = Server(options(root / "sklearn", "--max-bodies", "200000"))
    app.predictor = lambda body, content_type: (200, "application/json", b"{}")  # type: ignore[assignment]
    app._bodies = 150_000
    last = {**part(10), "more_body": False}
    assert told(app, [part(40_000), part(40_000), last])[0]["status"] == 503
    assert told(app, [part(30_000), part(30_000), last])[0]["status"] == 200
    assert app._bodies == 150_000


def test_another_artifact_is_not_loaded(root: Path) -> None:
    """Run by path, with a wrong digest, it says so in one line and ends before it imports anything heavy."""
    command = [sys.executable, str(Path(server.__file__)), "--model", "m", "--version", "3"]
    command += ["--path", str(root / "sklearn"), "--digest", "sha256:no", "--port", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == server.WRONG_DIGEST
    assert done.stderr.count("\n") == 1
    assert f"its digest is {digest(root / 'sklearn')}" in done.stderr


def test_it_needs_nothing_of_ours_on_the_path(root: Path) -> None:
    """Run by path in isolated mode it finds its way without our packages."""
    command = [sys.executable, "-I", str(Path(server.__file__)), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0
    source = Path(server.__file__).read_text()
    assert "import deployments" not in source
    assert "from deployments" not in source

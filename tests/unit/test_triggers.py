"""Challengers that start by themselves: what becomes of one by the runs it had, and servers that answer oddly."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks import flowruns, history, registry_rest, triggers, webhooks, worker
from tasks.policies import policies_of, policy_of
from tasks.settings import Mistake, Settings
from tests.fakes import FakeTarget

NOW = datetime(2026, 1, 5, 12, 0, tzinfo=UTC)
MADE = NOW - timedelta(hours=2)
VERSION = {"name": "m", "version": "2", "source": "s3://b/2", "creation_timestamp": int(MADE.timestamp() * 1000)}


class Server:
    """Answers with what `answers` has for the end of a path: data, bytes, a status, or a function that makes one."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, Any]] = []
        self.shown: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.split("?")[0]
                outer.asked.append((path, json.loads(body) if body else None))
                outer.shown.append((path, self.headers.get("Authorization")))
                answer = next((outer.answers[end] for end in outer.answers if path.endswith(end)), 404)
                if callable(answer):
                    answer = answer()
                status = answer if isinstance(answer, int) else 200
                missing = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is none"}
                answer = missing if status == 404 else b"oh" if status != 200 else answer
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, mlflow_uri=server.url, prefect_api_url=server.url + "/api")


def write(settings: Settings, model: str, trigger: str = "alias", name: str | None = None) -> None:
    settings.policy_folder.mkdir(exist_ok=True)
    text = f"version: 1\nmodel: {model}\ntrigger: {trigger}\ngates: [{{kind: integrity}}]\n"
    (settings.policy_folder / (name or f"{model}.yaml")).write_text(text)


def challenge(server: Server, settings: Settings, runs: list[dict[str, Any]] | None = None) -> None:
    """v2 of m challenges; `runs` are the flow runs that Prefect has."""
    write(settings, "m")
    server.answers = {
        "registered-models/get": {"registered_model": {"aliases": [{"alias": "challenger", "version": "2"}]}},
        "model-versions/get": {"model_version": VERSION},
        "flow_runs/filter": [] if runs is None else runs,
        "deployments/name/promote/promote": {"id": "d"},
        "create_flow_run": {"id": "new", "name": "n", "state_type": "SCHEDULED"},
    }


def flow_run(kind: str, ago: timedelta, *, attempt: int = 1, **more: Any) -> dict[str, Any]:
    at = (NOW - ago).isoformat()
    return {
        "id": f"{kind}-{attempt}-{ago}",
        "name": "n",
        "state_type": kind,
        "state_name": kind.title(),
        "state": {"message": "because", "timestamp": at},
        "created": at,
        "parameters": {"model": "m", "version": "2"},
        "idempotency_key": f"m/2/s3://b/2/{attempt}",
        "tags": ["challenger/m/2"],
        **more,
    }


def created(server: Server) -> list[Any]:
    return [body for path, body in server.asked if path.endswith("create_flow_run")]


def minutes(number: float) -> timedelta:
    return timedelta(minutes=number)


# --- the policies


def test_a_broken_policy_hides_no_other(settings: Settings) -> None:
    """Each is named with its reason; two files for one model are refused, and both named."""
    for model, name in (("good", None), ("twice", "a.yml"), ("twice", "b.yaml")):
        write(settings, model, name=name)
    folder = settings.policy_folder
    (folder / "typo.yaml").write_text("version: 1\nmodel: typo\ngatez: []\n")
    (folder / "torn.yaml").write_text("model: torn\n : [")
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe")
    (folder / ".hidden.yaml").write_text("nothing")
    found = policies_of(settings)
    assert list(found.usable) == ["good"]
    assert sorted(found.refused) == ["torn", "twice", "typo"]
    assert len(found.problems) == 4
    own = policy_of(settings, "good")
    assert own is not None
    assert own[0].name == "good.yaml"
    assert policy_of(settings, "another") is None
    for model, words in (("twice", r"a\.yml and b\.yaml: keep one"), ("typo", "gatez"), ("torn", "not YAML")):
        with pytest.raises(Mistake, match=words):
            policy_of(settings, model)


def test_a_policy_is_read_again_when_it_changes(settings: Settings) -> None:
    """Who watches sees the file of now, also one that is written in the place of another."""
    write(settings, "m")
    own = policy_of(settings, "m")
    write(settings, "m", "tagg")
    with pytest.raises(Mistake, match=r"m\.yaml:3: trigger"):
        policy_of(settings, "m")
    write(settings, "m", "tag")
    again = policy_of(settings, "m")
    assert own is not None
    assert again is not None
    assert (own[2].trigger, again[2].trigger) == ("alias", "tag")


# --- what is due


def test_without_a_policy_nothing_starts(server: Server, settings: Settings) -> None:
    """No folder, no question to anybody."""
    assert triggers.start(settings, FakeTarget()) == triggers.Asked()
    assert server.asked == []


def test_a_challenger_is_asked_for(server: Server, settings: Settings) -> None:
    """One run, with its parameters, its tags, and a key that names this artifact."""
    challenge(server, settings)
    asked = triggers.start(settings, FakeTarget())
    (body,) = created(server)
    assert body["parameters"] == {"model": "m", "version": "2", "trigger": "poll"}
    assert body["idempotency_key"] == "m/2/s3://b/2/1"
    assert body["tags"] == ["titleshot", "model/m", "challenger/m/2"]
    assert asked.problems == []
    assert "m v2: the alias challenger names it" in asked.news[0]


def test_a_model_with_something_under_way_is_left_for_later(server: Server, settings: Settings) -> None:
    """Whoever holds it; and a policy that starts by hand asks nobody."""
    challenge(server, settings)
    target = FakeTarget()
    target.lease("m", "somebody")
    write(settings, "other", "hand")
    looked = triggers.due(settings, target)
    assert {one.model: one.why.split(":")[0] for one in looked.skipped} == {
        "m": "somebody holds the model",
        "other": "other.yaml says `trigger",
    }
    assert looked.due == []
    assert server.asked == []


@pytest.mark.parametrize("version", [{"version": "1"}, {"status": "PENDING_REGISTRATION"}])
def test_the_champion_and_what_is_not_ready_are_not_due(
    server: Server, settings: Settings, version: dict[str, str]
) -> None:
    """Even where the alias names it."""
    challenge(server, settings)
    aliases = [{"alias": "challenger", "version": "2"}, {"alias": "champion", "version": "1"}]
    server.answers["registered-models/get"] = {"registered_model": {"aliases": aliases}}
    server.answers["model-versions/get"] = {"model_version": {**VERSION, **version}}
    looked = triggers.due(settings, FakeTarget())
    assert looked.due == []
    assert len(looked.skipped) == 1


def test_what_was_handled_is_not_asked_about_again(server: Server, settings: Settings) -> None:
    """Who watches for ever keeps it in mind."""
    challenge(server, settings)
    version = {**VERSION, "tags": [{"key": "titleshot.digest", "value": "sha256:d"}]}
    server.answers |= {
        "model-versions/get": {"model_version": version},
        "experiments/get-by-name": {"experiment": {"experiment_id": "7"}},
        "runs/search": {"runs": [{}]},
    }
    known: set[tuple[str, ...]] = set()
    for _ in range(3):
        assert triggers.due(settings, FakeTarget(), known).due == []
    searched = [body for path, body in server.asked if path.endswith("runs/search")]
    assert [body["experiment_ids"] for body in searched] == [["7"]]
    assert "titleshot.digest` = 'sha256:d'" in searched[0]["filter"]
    assert triggers._EXPERIMENT == history.EXPERIMENT


# --- what becomes of it

FAILED, LATER = "FAILED", {"state_name": "Later"}
CASES: dict[str, tuple[list[dict[str, Any]], str, int]] = {
    "on its way": ([flow_run("SCHEDULED", minutes(3))], "wait", 1),
    "under way": ([flow_run("RUNNING", minutes(9))], "wait", 1),
    "its process died unseen": ([flow_run("RUNNING", minutes(30))], "ask", 2),
    "failed a moment ago": ([flow_run(FAILED, minutes(0.1))], "wait", 1),
    "failed": ([flow_run(FAILED, minutes(0.3))], "ask", 2),
    "crashed": ([flow_run("CRASHED", minutes(0.3))], "ask", 2),
    "failed twice": ([flow_run(FAILED, minutes(9)), flow_run(FAILED, minutes(0.8), attempt=2)], "wait", 1),
    "failed twice, long ago": ([flow_run(FAILED, minutes(9)), flow_run(FAILED, minutes(2), attempt=2)], "ask", 3),
    "failed three times": ([flow_run(FAILED, minutes(7 - n), attempt=n) for n in (1, 2, 3)], "wait", 1),
    "failed four times": ([flow_run(FAILED, minutes(30 - n), attempt=n) for n in (1, 2, 3, 4)], "ask", 5),
    "failed five times": ([flow_run(FAILED, minutes(60 - n), attempt=n) for n in (1, 2, 3, 4, 5)], "leave", 1),
    "five events' runs crashed together": (
        [flow_run("CRASHED", minutes(0.3), tags=[], idempotency_key=None, id=str(n)) for n in range(5)],
        "ask",
        1,
    ),
    "came too early after it had failed": (
        [
            *(flow_run(FAILED, minutes(20 - n), attempt=n) for n in (1, 2, 3)),
            flow_run("COMPLETED", minutes(0.3), attempt=4, **LATER),
        ],
        "ask",
        5,
    ),
    "cancelled": ([flow_run(FAILED, minutes(60)), flow_run("CANCELLED", minutes(30), attempt=2)], "leave", 1),
    "had nothing to do": ([flow_run("COMPLETED", minutes(60))], "leave", 1),
    "came too early": ([flow_run("COMPLETED", minutes(60), **LATER)], "ask", 2),
    "came too early nine times": (
        [flow_run("COMPLETED", minutes(60 - n), attempt=n, **LATER) for n in range(1, 10)],
        "ask",
        10,
    ),
    "an event's run failed": ([flow_run(FAILED, minutes(2), tags=[], idempotency_key=None)], "ask", 1),
    "an event's run that names no version": ([flow_run("PENDING", minutes(1), parameters={"model": "m"})], "wait", 1),
    "of another version": ([flow_run("RUNNING", minutes(1), parameters={"model": "m", "version": "1"})], "ask", 1),
    "of another model": ([flow_run("RUNNING", minutes(1), parameters={"model": "n", "version": "2"})], "ask", 1),
    "of a namesake that was deleted": ([flow_run("CANCELLED", minutes(300))], "ask", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_becomes_of_a_challenger(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its runs: on their way they are waited for, failed ones are asked for again, a person's no is a no."""
    runs, does, attempt = CASES[case]
    for name in ("chosen", "tagged"):
        monkeypatch.setattr(triggers, name, lambda *_: [flowruns._run(run) for run in runs])
    due = triggers.Due("m", "2", "", "s3://b/2", MADE, "why")
    settings = Settings(home=tmp_path, prefect_api_url="http://127.0.0.1:1/api")
    (intent,) = triggers.intents(settings, [due], NOW)
    assert intent.does == does, intent
    if does == "ask":
        assert intent.attempt == attempt
    assert intent.problem == (case == "failed five times")


def test_a_problem_that_stays_is_told_in_the_same_words(server: Server, settings: Settings) -> None:
    """Runs that keep failing, and one that no worker takes: with the page, so that it can be said once."""
    late = flow_run("SCHEDULED", minutes(20), state_name="Late")
    for runs in (CASES["failed five times"][0], [late]):
        challenge(server, settings, runs)
        looked = triggers.due(settings, FakeTarget())
        told = [triggers.ask(settings, looked.due, NOW + minutes(n)).problems for n in (0, 7)]
        assert len(told[0]) == 1
        assert told[0] == told[1]
        assert f"{server.url}/runs/flow-run/{runs[-1]['id']}" in told[0][0]
    assert created(server) == []


# --- odd answers


def slow(answer: Any) -> Callable[[], Any]:
    def wait() -> Any:
        time.sleep(0.3)
        return answer

    return wait


ODD: dict[str, Any] = {
    "500": 500,
    "403": 403,
    "garbage": b"<html>",
    "null": None,
    "a list": ["what"],
    "a number": 3.5,
    "empty": {},
    "slow": slow({}),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_registry_is_a_problem_in_words(
    server: Server, settings: Settings, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each look the same ones, and nothing is raised or asked for."""
    monkeypatch.setattr(registry_rest, "SECONDS", 0.1)
    challenge(server, settings)
    server.answers["registered-models/get"] = ODD[odd]
    told = [triggers.start(settings, FakeTarget()) for _ in range(2)]
    assert told[0] == told[1]
    assert len(told[0].problems) == 1
    assert created(server) == []


@pytest.mark.parametrize(
    ("path", "odd"),
    [("flow_runs/filter", odd) for odd in ODD] + [("name/promote/promote", odd) for odd in ("500", "garbage", "empty")],
)
def test_an_odd_prefect_is_a_problem_in_words(
    server: Server, settings: Settings, path: str, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each look the same ones, and nothing is raised."""
    monkeypatch.setattr(flowruns, "SECONDS", 0.1)
    challenge(server, settings)
    server.answers = {path: ODD[odd], **{end: other for end, other in server.answers.items() if not end.endswith(path)}}
    told = [triggers.start(settings, FakeTarget()) for _ in range(2)]
    assert told[0] == told[1]
    assert len(told[0].problems) == 1
    assert told[0].news == []


def test_prefect_is_shown_who_asks(server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks it: the look at the registry, the receiver, the worker."""
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ana:secret")
    challenge(server, settings)
    server.answers["events"] = server.answers["work_pools/titleshot"] = {}
    assert triggers.start(settings, FakeTarget()).news
    webhooks.emit(settings, webhooks.Delivery("one", "model_version_alias.created", "m", "2"))
    worker._make_pool(settings)
    shown = [by for path, by in server.shown if "/mlflow/" not in path]
    assert len(shown) == 6
    assert set(shown) == {"Basic YW5hOnNlY3JldA=="}


def test_a_prefect_that_is_busy_is_asked_again(server: Server, settings: Settings) -> None:
    """Its database was busy for a moment: nobody needs to know."""
    challenge(server, settings)
    answers = [503]
    server.answers["flow_runs/filter"] = lambda: answers.pop() if answers else []
    asked = triggers.start(settings, FakeTarget())
    assert (len(asked.news), asked.problems) == (1, [])


@pytest.mark.parametrize(
    ("answer", "words"),
    [(401, r"\(401 Unauthorized\): set PREFECT_API_AUTH_STRING"), (500, "500"), (b"<html>", "no Prefect")],
)
def test_what_prefect_does_not_answer_is_one_line(server: Server, settings: Settings, answer: Any, words: str) -> None:
    """What there is to know, and how to mend it where that is known."""
    server.answers["flow_runs/one"] = answer
    with pytest.raises(flowruns.Unanswered, match=words) as raised:
        flowruns.find(settings, "one")
    assert "\n" not in str(raised.value)


def test_a_registry_that_is_away_is_told_once(server: Server, settings: Settings) -> None:
    """However many models there are, and without waiting for each."""
    write(settings, "a")
    write(settings, "b")
    server.http.shutdown()
    server.http.server_close()
    asked = triggers.start(settings, FakeTarget())
    assert asked.problems == [f"MLflow does not answer at {server.url}: no challenger is found until it does"]


def test_a_stack_without_worker_says_so(server: Server, settings: Settings) -> None:
    """Challengers are due and nobody would run them: which setting, and what to do."""
    challenge(server, settings)
    server.answers["deployments/name/promote/promote"] = 404
    none = settings.model_copy(update={"workers": 0})
    (problem,) = triggers.start(none, FakeTarget()).problems
    assert "TITLESHOT_WORKERS is 0" in problem
    assert "no deployment promote/promote" in problem
    assert "no deployment promote/promote" in triggers.preview(none, FakeTarget())["problems"][0]

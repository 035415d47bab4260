"""Hooks: a command or a URL of the user's, before or after the cut-over; its success is a verdict like any other."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows.drive import perform as perform_step
from tasks.context import Contender, Context
from tasks.hook import outcome
from tasks.registry import Registered
from tasks.settings import Mistake, Settings
from tests.fakes import FakeTarget
from validations.gates import Hook
from validations.policy import Policy, PolicyError, read
from validations.promotion import Phase, Promotion, drive
from validations.verdict import Evidence, Measurement, Verdict, judge

HEAD = "version: 1\nmodel: m\ngates:\n"
INTEGRITY = "  - kind: integrity\n"
WATCH = "  - {kind: watch, run_time: 1s, checks: {error_rate: {max: 0.1}}}\n"
TOLD: dict[str, Any] = {
    "model": "m",
    "challenger": {"version": "2", "url": None, "digest": "sha256:2", "run_id": "r2"},
    "champion": None,
    "settings": {"mlflow": "http://127.0.0.1:1", "gateway": None},
    "parameters": {"ticket": 7},
    "promotion": "m-1",
    "when": "before",
    "verdicts": [],
}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A promotion of version 2 over version 1, in a target of our own."""
    target = FakeTarget()

    def contender(number: str) -> Contender:
        registered = Registered("m", number, f"r{number}", {})
        return Contender(registered, tmp_path, f"sha256:{number}", f"sha256:{number}")

    return Context(
        id="m-1",
        model="m",
        settings=Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:1"),
        target=target,
        fence=target.lease("m", "m-1"),
        base=tmp_path,
        folder=tmp_path,
        champion=contender("1"),
        challenger=contender("2"),
        previous=None,
    )


def script(context: Context, text: str, name: str = "hook.py") -> tuple[str, ...]:
    (context.base / name).write_text(text)
    return sys.executable, name


def came_to(context: Context, gate: Hook) -> Verdict:
    """The verdict on a hook, as the flow reaches it."""
    policy = Policy(version=1, model="m", gates=[gate])
    step = next(step for step in policy.plan() if step.kind == "hook")
    try:
        evidence = outcome(context, gate, TOLD).evidence()
    except Mistake as mistake:
        evidence = Evidence(note=str(mistake))
    assert len(evidence.note.splitlines()) == 1
    return judge(step.name, policy.bounds(step), evidence, policy.min_sample(step))


# --- the policy


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("when: after", "a hook has a `command` or a `url`: here is none"),
        ("command: [x]\n    url: http://127.0.0.1:1", "here are both"),
        ("command: python x.py", r"list of words.*\[python, x.py\]"),
        ("url: ftp://x", "begins with http"),
        ("command: [x]\n    when: later", "when: "),
        ("command: [x]\n    wehn: after", "did you mean 'when'"),
        ("command: [x]\n    parameters: {day: 2024-01-01}", "no dates"),
        ("command: [x]\n    checks: {cost: {max: 1}}", "no such check here: 'cost'"),
    ],
)
def test_a_slip_in_a_hook_is_refused_in_one_line(fields: str, said: str) -> None:
    """Neither or both, no list, no address, a misspelt word: each is told with its place."""
    with pytest.raises(PolicyError, match=said) as caught:
        read(f"{HEAD}  - kind: hook\n    {fields}\n", "p.yaml")
    assert str(caught.value).startswith("p.yaml:")
    assert "\n" not in str(caught.value)


def named(*names: str, when: str = "after") -> str:
    return "".join(f"  - {{kind: hook, name: {name}, when: {when}, command: [x]}}\n" for name in names)


def test_a_hook_stands_where_it_stands_in_the_list() -> None:
    """Before the cut-over in the order of the file; after it before, between and after watches; `promote` comes just
    before the first that follows it. A model's first version has them all.
    """
    watch = WATCH.replace("watch", "watch, name: w", 1)
    text = HEAD + INTEGRITY + named("a", when="before") + named("b") + WATCH + named("c") + watch + named("d")
    names = [step.name for step in read(text).plan()]
    assert names == ["integrity", "a", "deploy", "promote", "b", "watch", "c", "w", "d"]
    first = [step.name for step in read(text).plan(first=True)]
    assert first == ["integrity", "a", "deploy", "promote", "b", "c", "d"]
    assert [step.name for step in read(HEAD + named("a", when="before")).plan()] == ["a", "deploy", "promote"]
    assert Policy.model_validate_json(read(text).model_dump_json()) == read(text)


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (named("a") + INTEGRITY, r"`integrity` comes after `hook`, which follows the promotion.*put it before"),
        (WATCH + named("a", when="before"), "`hook` comes after `watch`, .*: give it `when: after`"),
        (named("a", "a"), "two steps are called 'a'"),
        (named("promote"), "two steps are called 'promote'"),
    ],
)
def test_what_follows_the_promotion_is_last(gates: str, said: str) -> None:
    """After the first watch or after-hook there are only such, and every step has a name of its own."""
    with pytest.raises(PolicyError) as caught:
        read(HEAD + gates, "p.yaml")

    assert re.search(said, str(caught.value))


# --- commands


def test_a_command_that_ends_with_0_has_succeeded(context: Context) -> None:
    """It is told as JSON and by TITLESHOT_*, works in the policy's folder, and what it said last is the note."""
    command = script(
        context,
        "import json, os, sys\n"
        "told = json.load(sys.stdin)\n"
        "assert told['parameters'] == {'ticket': 7} and os.path.exists('hook.py')\n"
        "assert os.environ['TITLESHOT_PROMOTION'] == told['promotion'] == 'm-1'\n"
        "assert os.environ['TITLESHOT_WHEN'] == 'before' and os.environ['TITLESHOT_CHALLENGER_VERSION'] == '2'\n"
        "print('opened'); print('ticket 8 opened')\n",
    )
    verdict = came_to(context, Hook(command=command))
    assert verdict.outcome == "passed", verdict.why
    assert verdict.evidence.measurements["succeeded"] == Measurement.exact(1, note="exit code 0: ticket 8 opened")


def test_another_exit_code_blames_the_challenger(context: Context) -> None:
    """The step has failed, and its sentence has the last line that was said, on stderr or else on stdout."""
    for stream in ("stderr", "stdout"):
        text = f"import sys; print('one\\nthe licence forbids it', file=sys.{stream}); sys.exit(3)"
        verdict = came_to(context, Hook(command=script(context, text)))
        assert verdict.outcome == "failed"
        assert verdict.why == "succeeded 0 is outside the bound (at least 1): exit code 3: the licence forbids it"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("no-such-program",), "cannot be started: No such file or directory"),
        ((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"), "ended by SIGKILL"),
        ((sys.executable, "-c", "import time; time.sleep(99)"), "no answer within 1 s"),
    ],
)
def test_a_command_that_gives_no_answer_blames_the_platform(
    context: Context, command: tuple[str, ...], said: str
) -> None:
    """Not startable, killed, or out of time: errored, in one line."""
    verdict = came_to(context, Hook(command=command, timeout="1s"))
    assert verdict.outcome == "errored"
    assert said in verdict.why


# --- URLs


class Answers(BaseHTTPRequestHandler):
    """Answers with the status that the path names; /0 does not answer."""

    told: list[dict[str, Any]]
    released = threading.Event()

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        status = int(self.path.strip("/"))
        if not status:
            self.released.wait(60)
        body = b"first line\nthe change board says no\n"
        with suppress(OSError):
            self.send_response(status or 200)
            if status == 307:
                self.send_header("location", "/200")
            self.send_header("content-length", str(0 if status == 204 else len(body)))
            self.end_headers()
            if status != 204:
                self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Answers.told = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        Answers.released.set()
        http.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "wanted", "said"),
    [
        (200, "passed", "answered 200: the change board says no"),
        (204, "passed", "answered 204"),
        (400, "failed", "answered 400: the change board says no"),
        (409, "failed", "answered 409"),
        (429, "errored", "answered 429"),
        (503, "errored", "answered 503: the change board says no"),
        (307, "errored", "redirects are not followed: name /200"),
        (0, "errored", "no answer within 1 s"),
    ],
)
def test_a_url_answers_by_its_status(context: Context, server: str, status: int, wanted: str, said: str) -> None:
    """2xx has succeeded, 4xx has not; 5xx, a redirect, silence and 'later' are the platform's. It gets the same JSON."""
    verdict = came_to(context, Hook(url=f"{server}/{status}", timeout="1s" if not status else "1m"))
    assert verdict.outcome == wanted
    assert said in verdict.why
    assert Answers.told[-1] == TOLD


def test_a_url_where_nobody_is_blames_the_platform(context: Context) -> None:
    """Errored, in one line."""
    verdict = came_to(context, Hook(url="http://127.0.0.1:1/"))
    assert verdict.outcome == "errored"
    assert "no answer: " in verdict.why


# --- in a promotion


def test_hooks_are_told_what_was_found_so_far_and_decide(context: Context) -> None:
    """The hook after the cut-over knows every verdict before it; it fails, so that the way goes back."""
    writes = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read()); sys.exit(int(sys.argv[2]))"
    command = script(context, writes)
    before = Hook(name="announce", command=(*command, "before.json", "0"))
    after = Hook(name="smoke test", when="after", command=(*command, "after.json", "1"))
    policy = Policy(version=1, model="m", gates=[{"kind": "integrity"}, before, after])
    start = Promotion(id="m-1", champion="1", challenger="2", digest="d", policy=policy)
    context.journal.begin(start, "", None, {})

    def perform(promotion: Promotion, step: Any) -> Verdict:
        if step.kind == "hook":
            return perform_step(context, promotion, step)
        bounds = promotion.bounds(step)
        good = {name: Measurement.exact(bound.min or 0) for name, bound in bounds.items()}
        return judge(step.name, bounds, Evidence(measurements=good))

    end = drive(start, perform, lambda now: context.journal.verdict(now.verdicts[-1]))
    assert end.phase is Phase.ROLLED_BACK
    assert [one.step for one in end.verdicts] == [
        "integrity",
        "announce",
        "deploy",
        "promote",
        "smoke test",
        "rollback",
    ]
    told = json.loads((context.base / "after.json").read_text())
    assert told["verdicts"] == [
        {"step": step, "outcome": "passed"} for step in ("integrity", "announce", "deploy", "promote")
    ]
    assert (told["when"], told["promotion"], told["champion"]["version"]) == ("after", "m-1", "1")
    assert len(json.loads((context.base / "before.json").read_text())["verdicts"]) == 1

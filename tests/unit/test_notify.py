"""Notices: whom they reach, once, and what a receiver that fails, hangs or is not there costs (little)."""

import json
import logging
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks import notify
from tasks.notify import SEVERITY, Notice, examine, forget, problem, retry_late, tell
from tasks.progress import listening
from tasks.settings import Settings
from validations.policy import Policy
from validations.promotion import Promotion
from validations.verdict import Bound, Evidence, Measurement, judge


class Receiver(ThreadingHTTPServer):
    """Keeps what it is posted, by path: /broken answers 500, /hangs does not answer before it is let go."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, Any]]] = []
        self.let_go, self.mended = threading.Event(), False
        super().__init__(("127.0.0.1", 0), _Handler)

    def url(self, path: str = "", who: str = "") -> str:
        return f"json://{who}127.0.0.1:{self.server_address[1]}/{path}"

    def at(self, path: str) -> list[dict[str, Any]]:
        return [body for where, body in self.got if where.strip("/") == path]


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.got.append((self.path.partition("?")[0], body))
        if "hangs" in self.path:
            self.server.let_go.wait(60)
        with suppress(OSError):
            self.send_response(500 if "broken" in self.path and not self.server.mended else 200)
            self.send_header("content-length", "0")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.let_go.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    notify._said.clear()
    yield
    wait_until(lambda: not any(thread.name == "notice" for thread in threading.enumerate()))


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Settings]:
    """Settings whose notices are configured by a text."""

    def make(text: str, name: str = "notices.conf") -> Settings:
        (tmp_path / name).write_text(text)
        return Settings(home=tmp_path, notices=tmp_path / name)

    return make


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What Apprise logs where everybody's handlers are."""
    lines: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: lines.append(record.getMessage()) if record.name == "apprise" else None  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield lines
    logging.getLogger().removeHandler(handler)


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def notice(kind: notify.Kind = "promoted", key: str = "") -> Notice:
    return Notice(
        kind=kind,
        model="m",
        promotion="m-1",
        title=f"m v2: {kind}",
        body="It is so.",
        link="http://127.0.0.1:1/runs/flow-run/x",
        key=key or f"m-1 {kind}",
    )


def told(settings: Settings, *notices: Notice) -> list[str]:
    """What is said while these are told."""
    said: list[str] = []
    with listening(said.append):
        for one in notices:
            tell(settings, one)
    return said


def unused() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_without_a_file_nobody_is_told(tmp_path: Path) -> None:
    """No setting, no notice, and nothing is written down."""
    settings = Settings(home=tmp_path)
    assert told(settings, notice()) == []
    retry_late(settings)
    forget(settings, ["x"])
    assert examine(settings) == ""
    assert list(tmp_path.iterdir()) == []


FORMATS = {
    "text": "{all}\ninfo={info}\nwarning={warning}\ncritical={critical}\ncritical,warning={both}\n",
    "yaml": """
version: 1
urls:
  - {all}
  - {info}: [{{tag: info}}]
  - {warning}: [{{tag: warning}}]
  - {critical}: [{{tag: critical}}]
  - {both}: [{{tag: "critical, warning"}}]
""",
}


@pytest.mark.parametrize("format_", FORMATS)
def test_tags_are_severities(receiver: Receiver, make: Callable[..., Settings], format_: str) -> None:
    """A URL without a tag hears all, `warning` that and worse, `critical` only that; in either of Apprise's formats."""
    words = ("all", "info", "warning", "critical", "both")
    settings = make(FORMATS[format_].format(**{word: receiver.url(word) for word in words}))
    assert told(settings, *(notice(kind) for kind in SEVERITY)) == []

    def heard(path: str) -> set[str]:
        return {body["title"].removeprefix("m v2: ") for body in receiver.at(path)}

    warnings = {"approval needed", "rejected", "rolled back", "problem"}
    assert heard("all") == heard("info") == {*SEVERITY}
    assert heard("warning") == heard("both") == {*warnings, "degraded"}
    assert heard("critical") == {"degraded"}
    assert {body["title"]: body["type"] for body in receiver.at("all")}["m v2: degraded"] == "failure"


def test_a_notice_is_plain_text_with_the_link_at_its_end(receiver: Receiver, make: Callable[..., Settings]) -> None:
    """Title, body, link; nothing of Apprise's own."""
    told(make(receiver.url("x")), notice())
    (body,) = receiver.at("x")
    assert body["title"] == "m v2: promoted"
    assert body["message"] == "It is so.\n\nhttp://127.0.0.1:1/runs/flow-run/x"
    assert "apprise" not in json.dumps(body).lower()


def test_each_key_is_told_once(receiver: Receiver, make: Callable[..., Settings]) -> None:
    """However often it is told; another key is another notice."""
    settings = make(receiver.url("x"))
    told(settings, notice(), notice(), notice(key="m-1 approval 2"), notice())
    assert len(receiver.at("x")) == 2


TELLER = """
import sys
from pathlib import Path
from tasks.notify import Notice, tell
from tasks.settings import Settings
settings = Settings(home=Path(sys.argv[1]), notices=Path(sys.argv[1]) / "notices.conf")
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    tell(settings, Notice(kind="promoted", model="m", promotion="p", title=str(number), body="b", link="", key=str(number)))
"""


def test_two_processes_tell_once(receiver: Receiver, make: Callable[..., Settings], tmp_path: Path) -> None:
    """Two recoveries of one promotion at the same time send each notice once between them."""
    make(receiver.url("x"))
    tellers = [
        subprocess.Popen(
            [sys.executable, "-c", TELLER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for teller in tellers:
        assert teller.stdout is not None
        assert teller.stdout.readline() == "ready\n"
    for teller in tellers:
        assert teller.stdin is not None
        teller.stdin.write("\n")
        teller.stdin.flush()
    assert [teller.wait(120) for teller in tellers] == [0, 0]
    for teller in tellers:
        teller.communicate()
    assert sorted(body["title"] for body in receiver.at("x")) == [str(number) for number in range(10)]


def test_a_problem_is_told_again_a_day_later_or_after_it_went_away(
    receiver: Receiver, make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A problem that stays is told once in 24 hours; one that went and came back at once. What a promotion came to is
    told once for ever.
    """
    settings, now = make(receiver.url("x")), time.time()
    stays, ended = problem("m", "m: the alias names v3, and v2 serves"), notice()
    counts = []
    for hours in (0, 12, 25, 26):
        monkeypatch.setattr(notify.time, "time", lambda hours=hours: now + 3600 * hours)
        told(settings, stays, ended)
        counts.append(len(receiver.at("x")))
    assert counts == [2, 2, 3, 3]
    forget(settings, [stays.key])
    told(settings, stays, ended)
    assert len(receiver.at("x")) == 4


def test_what_reached_nobody_is_not_told_and_tried_again(receiver: Receiver, make: Callable[..., Settings]) -> None:
    """A receiver that answers 500 is told of by name, without its password; the next time the notice arrives."""
    settings = make(receiver.url("broken", who="ana:secret@"))
    said = told(settings, notice())
    assert len(said) == 2
    assert "did not reach json://127.0.0.1:" in said[0]
    assert "error=500" in said[0]
    assert said[1] == "the notice 'm v2: promoted' reached nobody, and is tried again later"
    assert "secret" not in str(said)
    receiver.mended = True
    assert told(settings, notice(), notice()) == []
    assert len(receiver.got) == 2


def test_one_url_that_fails_does_not_repeat_the_notice_at_the_others(
    receiver: Receiver, make: Callable[..., Settings]
) -> None:
    """It is told when one receiver has it; the others are named."""
    settings = make(f"{receiver.url('x')}\n{receiver.url('broken')}\njson://127.0.0.1:{unused()}/absent\n")
    said = told(settings, notice(), notice())
    assert len(said) == 2
    assert len(receiver.at("x")) == len(receiver.at("broken")) == 1


def test_it_is_given_up_after_five_tries(
    receiver: Receiver, make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`retry_late` waits 1, 4, 16 and 64 minutes between the tries, says when it is late, and stops after the fifth."""
    settings, now, minutes = make(receiver.url("broken")), time.time(), 0.0
    said = told(settings, notice())
    for wait in (1, 4, 16, 64, 256):
        for part in (0.9, 0.2):
            minutes += wait * part
            monkeypatch.setattr(notify.time, "time", lambda minutes=minutes: now + 60 * minutes)
            with listening(said.append):
                retry_late(settings)
    tried = receiver.at("broken")
    assert len(tried) == 5
    assert said[-1] == "the notice 'm v2: promoted' reached nobody, and is given up after 5 tries"
    assert "Late: this was at" in tried[-1]["message"]
    assert told(settings, notice()) == []


def test_a_delivery_that_died_with_its_process_is_taken_up(
    receiver: Receiver, make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it may live nobody else tells; after two minutes `retry_late` does."""
    settings = make(receiver.url("x"))
    assert notify._claim(settings.home, notice()) is not None  # and then its process ended
    told(settings, notice())
    retry_late(settings)
    assert receiver.got == []
    now = time.time()
    monkeypatch.setattr(notify.time, "time", lambda: now + notify.LAPSES + 1)
    retry_late(settings)
    assert len(receiver.at("x")) == 1


def test_a_receiver_that_hangs_costs_a_moment(
    receiver: Receiver, make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said that it is not waited for, whoever else is told has it, and when it answers it was told."""
    monkeypatch.setattr(notify, "PATIENCE", 1.5)
    settings = make(f"{receiver.url('hangs')}?rto=60\n{receiver.url('x')}\n")
    began = time.monotonic()
    said = told(settings, notice())
    assert time.monotonic() - began < 5
    assert said == ["the notice 'm v2: promoted' is still on its way after 1.5 s: it is not waited for"]
    wait_until(lambda: receiver.at("x"))
    assert told(settings, notice()) == []  # this process gives it already
    receiver.let_go.set()

    def states() -> list[tuple[str]]:
        with closing(sqlite3.connect(settings.home / "notices.db")) as db:
            return db.execute("SELECT state FROM notice").fetchall()

    wait_until(lambda: states() == [("told",)])
    assert len(receiver.at("hangs")) == 1


def test_a_server_that_says_nothing_is_left(make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mail server that takes the connection and then is silent holds up neither the promotion nor its end."""
    monkeypatch.setattr(notify, "PATIENCE", 1.5)
    monkeypatch.setattr(notify, "GIVE_UP", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = f"mailto://u:secret@127.0.0.1:{port}/?smtp=127.0.0.1&from=a@example.org&to=b@example.org&mode=insecure"
        settings, began = make(url), time.monotonic()
        assert examine(settings) == ""
        said = told(settings, notice())
        assert time.monotonic() - began < 10
        assert "not waited for" in said[-1]
        wait_until(lambda: notify._due(settings.home, "m-1 promoted"))  # given up, so the next may try


WRONG = {
    "no such file": (None, "cannot be read: No such file"),
    "empty": ("", "names no URL"),
    "only comments": ("# nothing yet\n", "names no URL"),
    "no URL": ("my phone\nmy mail!\n", "line 2 is neither a URL"),
    "an unknown service": ("jsonn://ana:secret@example.org\n", "Unparseable URL jsonn://"),
    "a service without what it needs": ("json://127.0.0.1\nslack://unfit\n", "on line 2"),
    "no YAML": ("urls: [\n", "Invalid Apprise YAML"),
    "a tag that is no severity": ("ops=json://ana:secret@127.0.0.1/\n", "tagged ops: tag it info, warning or critical"),
    "a secret in a broken line": ("json//ana:secret@127.0.0.1/\n", "line 1 is neither a URL"),
    "no text": (b"\xff\xfe\x00", "it is no text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_broken_file_is_told_once_and_clearly(
    make: Callable[..., Settings], tmp_path: Path, case: str, logged: list[str]
) -> None:
    """`examine` and the first notice name the file and the place, and no secret; the second notice says nothing more,
    and neither does any logger.
    """
    text, reason = WRONG[case]
    settings = make("")
    if text is None:
        (tmp_path / "notices.conf").unlink()
    else:
        (tmp_path / "notices.conf").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = examine(settings)
    assert reason in found
    assert str(tmp_path / "notices.conf") in found
    assert "\n" not in found
    said = told(settings, notice("started", "a"))
    assert said[0] == f"notices: {found}"
    assert "secret" not in found
    assert logged == []
    assert not any("notices:" in line for line in told(settings, notice("started", "b")))


def test_what_is_right_in_a_broken_file_is_used(receiver: Receiver, make: Callable[..., Settings]) -> None:
    """One bad line leaves the other URLs their notices."""
    said = told(make(f"{receiver.url('x')}\nslack://bad\n"), notice())
    assert len(said) == 1
    assert len(receiver.at("x")) == 1


def test_a_home_that_cannot_be_written_is_no_reason_to_be_silent(
    receiver: Receiver, make: Callable[..., Settings], tmp_path: Path
) -> None:
    """Then each process tells once, for a full disk is what somebody should hear of."""
    settings = make(receiver.url("x"))
    (tmp_path / "notices.db").mkdir()
    assert told(settings, notice("degraded"), notice("degraded")) == []
    assert len(receiver.at("x")) == 1


def test_a_test_reaches_every_url_and_says_which_failed(receiver: Receiver, make: Callable[..., Settings]) -> None:
    """One notice of each severity, told before or not; URLs are shown without their passwords."""
    settings = make(f"{receiver.url('x', who='ana:secret@')}\ncritical={receiver.url('broken')}\n")
    for _ in range(2):
        found = notify.test(settings)
    assert [len(found[severity]) for severity in ("info", "warning", "critical")] == [1, 1, 2]
    good, bad = found["critical"]
    assert (good.arrived, bad.arrived) == (True, False)
    assert "ana:****@127.0.0.1" in good.masked
    assert "error=500" in bad.why
    assert len(receiver.at("x")) == 6


def test_a_notice_of_a_promotion_says_what_decided_in_numbers() -> None:
    """Champion, challenger, step and figures; neither the slice in which nor the value for which it was seen."""
    policy = Policy.model_validate(
        {"version": 1, "model": "m", "gates": [{"kind": "integrity"}, {"kind": "approval", "approvers": ["ana"]}]}
    )
    begun = Promotion(id="m-1", champion="1", challenger="2", digest="d", policy=policy)
    assert "v2 is a challenger for the place of v1" in notify.of("started", begun).body
    seen = Measurement.exact(3, where="carrier = AA", note="Ana Example, 5 May")
    rest = {name: Measurement.exact(1) for name in ("digest_matches", "answers_example")}
    bounds = {**begun.bounds(begun.plan[0])}
    found = {**rest, "unsafe_files": seen, "requirement_conflicts": Measurement.exact(0)}
    bad = begun.record(judge("integrity", bounds, Evidence(measurements=found)))
    text = notify.of("rejected", bad, "http://127.0.0.1:1/x")
    assert "Step 'integrity' was failed: unsafe_files 3 is outside the bound (at most 0). v1 answers" in text.body
    assert "carrier" not in text.model_dump_json()
    assert "Example" not in text.model_dump_json()
    assert text.link == "http://127.0.0.1:1/x"
    good = begun.record(judge("integrity", bounds, Evidence(measurements={**found, "unsafe_files": rest["digest_matches"].model_copy(update={"value": 0, "low": 0, "high": 0})})))  # fmt: skip
    asked = notify.of("approval needed", good, asked=2)
    assert asked.key == "m-1 approval 2"
    assert "It waits for a person at 'approval'" in asked.body
    broken = begun.record(judge("integrity", {"ready": Bound(min=1)}, Evidence(note="secret")))
    assert "secret" not in notify.of("rejected", broken).body


def test_the_example_can_be_read() -> None:
    """examples/notices.yaml is a file without mistakes that has a URL for each severity."""
    example = Path(__file__).parents[2] / "examples" / "notices.yaml"
    assert examine(Settings(notices=example)) == ""
    servers, _ = notify._configured(example)
    assert [notify._least(server) for server in servers] == ["info", "warning", "critical"]


def test_every_kind_of_notice_is_documented() -> None:
    """docs/notices.md has each with its severity."""
    page = (Path(__file__).parents[2] / "docs" / "notices.md").read_text()
    for kind, severity in SEVERITY.items():
        assert f"| {kind} | {severity} |" in page

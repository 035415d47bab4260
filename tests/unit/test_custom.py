"""The custom gate: what a function, a command or a URL answers is read strictly, and nothing it does reaches us."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.outside import ask, measurements
from tasks.settings import Mistake
from validations.gates import Custom
from validations.policy import Policy, PolicyError, read
from validations.verdict import Measurement

TOLD: dict[str, Any] = {
    "model": "m",
    "challenger": {"version": "2", "url": None, "digest": "sha256:2", "run_id": "r2"},
    "champion": None,
    "settings": {"mlflow": "http://127.0.0.1:1", "gateway": None},
    "confidence": 0.95,
    "parameters": {"rate": 0.5},
}
HEAD = "version: 1\nmodel: m\ngates:\n"


def gate(**fields: Any) -> Custom:
    return Custom(**{"timeout": "5m", "checks": {"cost": {"max": 1}}, **fields})


def refused(gate: Custom, folder: Path) -> str:
    with pytest.raises(Mistake) as caught:
        ask(gate, TOLD, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def ended(pid: int) -> bool:
    """Whether the process is gone, or a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(true: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def written(pids: Path) -> list[str]:
    """The processes that wrote themselves down: none where the machine was too slow for them to begin."""
    return pids.read_text().split() if pids.exists() else []


# --- the policy


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("function: m.py:f\n    url: http://x\n    checks: {a: {max: 0}}", "exactly one of .*`function` and `url`"),
        ("checks: {a: {max: 0}}", "exactly one of .*none"),
        ("function: m.f\n    checks: {a: {max: 0}}", "write it like metrics.py:my_metric"),
        ("function: m.py:f", "`checks` is missing"),
        ("function: m.py:f\n    checks: {a b: {max: 0}}", "letters, digits and _"),
        ("url: ftp://x\n    checks: {a: {max: 0}}", "begins with http"),
        ("command: python x.py\n    checks: {a: {max: 0}}", r"list of words.*\[python, x.py\]"),
        ("command: [x]\n    parameters: {day: 2024-01-01}\n    checks: {a: {max: 0}}", "no dates"),
        ("command: [x]\n    parameters: {day: .inf}\n    checks: {a: {max: 0}}", "no .inf"),
        ("command: [x]\n    timeot: 3m\n    checks: {a: {max: 0}}", "did you mean 'timeout'"),
    ],
)
def test_a_slip_in_a_custom_gate_is_refused_in_one_line(fields: str, said: str) -> None:
    """Two sources, none, no function's name, no address, no list: each is told with its mend."""
    with pytest.raises(PolicyError, match=said) as caught:
        read(f"{HEAD}  - kind: custom\n    {fields}\n", "p.yaml")
    assert "\n" not in str(caught.value)


def test_a_custom_gate_survives_storing() -> None:
    """Parameters of any JSON come back from the stored policy as they were, and the digest is of them too."""
    text = f"{HEAD}  - kind: custom\n    command: [x]\n    parameters: {{a: [1, b, {{c: null}}]}}\n    checks: {{a: {{max: 0}}}}\n"
    policy = read(text)
    assert Policy.model_validate_json(policy.model_dump_json()) == policy
    assert read(text.replace("b,", "d,")).digest != policy.digest


def test_deployed_says_whether_the_challenger_is_served_first() -> None:
    """With `deployed` the deploy comes before the gate, without it after."""
    text = f"{HEAD}  - kind: custom\n    command: [x]\n    checks: {{a: {{max: 0}}}}\n"
    assert [step.name for step in read(text).plan()] == ["custom", "deploy", "promote"]
    deployed = read(text.replace("command", "deployed: true\n    command"))
    assert [step.name for step in deployed.plan()] == ["deploy", "custom", "promote"]


def test_comparing_checks_fall_away_without_a_champion() -> None:
    """A custom gate that only compares is not asked for a model's first version."""
    text = f"{HEAD}  - kind: custom\n    command: [x]\n    checks: {{cost_delta: {{max: 0}}}}\n"
    assert [step.name for step in read(text).plan(first=True)] == ["deploy", "promote"]


# --- what comes back


def test_a_bare_number_is_an_exact_fact() -> None:
    """A number has no width and a sample of one; fields say more."""
    found = measurements({"a": 2, "b": {"value": 1, "low": 0, "high": 3, "sample": 9, "where": "x = 1"}}, "f")
    assert found["a"] == Measurement.exact(2)
    assert found["b"] == Measurement(value=1, low=0, high=3, sample=9, where="x = 1")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1], "the answer is a list: wanted an object"),
        (None, "the answer is null"),
        ({}, "an empty object"),
        ({"a": "1"}, '`value` is "1": a measurement is a number'),
        ({"a": True}, "yes is 1, no is 0"),
        ({"a": None}, "`value` is null"),
        ({"a": float("nan")}, "`value` is NaN"),
        ({"a": {"value": 1, "low": float("nan"), "high": 2}}, "`low` is NaN"),
        ({"a": {"value": 5, "low": 0, "high": 2}}, r"the interval \[0, 2\] does not hold the value 5"),
        ({"a": {"value": 1, "low": 0}}, "give `low` and `high`, or neither"),
        ({"a": {"low": 0, "high": 1}}, "`value` is missing"),
        ({"a": {"value": 1, "hihg": 2}}, "unknown word 'hihg'; did you mean 'high'"),
        ({"a": {"value": 1, "sample": 1.5}}, "`sample` is 1.5: it is a count"),
        ({"a": {"value": 1, "sample": -1}}, "it is a count"),
        ({"a": {"value": 1, "note": 3}}, "`note` is 3: it is text"),
        ({"a b": 1}, "letters, digits and _"),
    ],
)
def test_what_is_no_measurement_is_refused_by_name(answer: object, said: str) -> None:
    """Wrong types, NaN, half an interval, one that misses its value, unknown words: source, metric and reason."""
    with pytest.raises(Mistake, match=said) as caught:
        measurements(answer, "m.py:f")
    assert str(caught.value).startswith("m.py:f: ")
    assert "\n" not in str(caught.value)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "value", "low", "high", "sample", "x y"]), inner, max_size=4)))  # fmt: skip
def test_any_json_is_measurements_or_a_sentence(answer: object) -> None:
    """Whatever comes back, it is read as valid measurements or refused in one line; nothing else is raised."""
    refusal, found = "", {}
    try:
        found = measurements(answer, "f")
    except Mistake as mistake:
        refusal = str(mistake)
    assert bool(found) != bool(refusal)
    assert len(refusal.splitlines()) <= 1
    assert all(one.low <= one.value <= one.high for one in found.values())


# --- functions


FUNCTIONS = """
import os, subprocess, sys, time
import numpy as np
from helper import HALF

def good(told):
    return {"cost": np.float64(told["parameters"]["rate"]) + HALF, "n": {"value": np.int64(3)}}

def here(told):
    return {"cost": float(os.path.exists("gate.py"))}

def raises(told):
    raise KeyError("no such thing")

def leaves(told):
    sys.exit(4)

def crashes(told):
    os._exit(9)

def hangs(told):
    child = subprocess.Popen(["sleep", "1000"])
    open("pids", "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(1000)

def odd(told):
    return {"cost": object()}

def prints(told):
    print("{}")
    return {"cost": 1}

NUMBER = 3
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    (tmp_path / "gate.py").write_text(FUNCTIONS)
    (tmp_path / "helper.py").write_text("HALF = 0.5\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    return tmp_path


def test_a_function_is_told_and_answers(functions: Path) -> None:
    """It gets the dict, may import what lies beside it, works in the policy's folder, and NumPy's numbers are numbers."""
    assert ask(gate(function="gate.py:good"), TOLD, functions) == {
        "cost": Measurement.exact(1.0),
        "n": Measurement.exact(3),
    }
    assert ask(gate(function="gate.py:here"), TOLD, functions)["cost"].value == 1
    assert ask(gate(function="gate.py:prints"), TOLD, functions)["cost"].value == 1


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("gate.py:raises", r"gate.py:raises: KeyError: 'no such thing' \(gate.py:13\)"),
        ("gate.py:leaves", "gate.py:leaves: SystemExit: 4"),
        ("gate.py:crashes", r"ended without an answer \(exit code 9\)"),
        ("gate.py:odd", "object is no measurement: return"),
        ("gate.py:god", "it has no 'god': it has good, here"),
        ("gate.py:NUMBER", "'NUMBER' is no function"),
        ("broken.py:f", "SyntaxError"),
        ("absent.py:f", "absent.py is not there: paths in a policy are relative"),
    ],
)
def test_what_a_function_does_wrong_is_one_line(functions: Path, function: str, said: str) -> None:
    """Raising, exiting, crashing, absent: the gate is errored with file, function and reason, and we live on."""
    assert re.search(said, refused(gate(function=function), functions))


def test_a_function_that_hangs_is_ended_with_its_children(functions: Path) -> None:
    """At the time limit its whole process group is ended."""
    # The first child waits for the fork server's imports, which is no part of what is tested.
    ask(gate(function="gate.py:here"), TOLD, functions)
    assert "no answer within 3 s" in refused(gate(function="gate.py:hangs", timeout="3s"), functions)
    for pid in written(functions / "pids"):
        wait_until(lambda pid=pid: ended(int(pid)))


# --- commands


def script(folder: Path, text: str) -> tuple[str, ...]:
    (folder / "gate-script.py").write_text(text)
    return sys.executable, "gate-script.py"


def test_a_command_is_told_by_stdin_and_environment(tmp_path: Path) -> None:
    """It runs in the policy's folder, reads JSON, has TITLESHOT_*, and prints JSON."""
    command = script(
        tmp_path,
        "import json, os, sys\n"
        "told = json.load(sys.stdin)\n"
        "assert os.environ['TITLESHOT_CHALLENGER_VERSION'] == told['challenger']['version'] == '2'\n"
        "assert os.environ['TITLESHOT_MODEL'] == 'm' and 'TITLESHOT_CHALLENGER_URL' not in os.environ\n"
        "assert os.path.exists('gate-script.py')\n"
        "print('to people', file=sys.stderr)\n"
        "print(json.dumps({'cost': told['parameters']['rate']}))\n",
    )
    assert ask(gate(command=command), TOLD, tmp_path) == {"cost": Measurement.exact(0.5)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys; sys.exit('first\\nthe last line')", "exit code 1: the last line"),
        ("import sys; sys.exit(7)", "exit code 7: it said nothing on stderr"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("print('hello')", "is no JSON: it begins with 'hello'"),
        ("pass", "is no JSON: it is empty"),
        ('print(\'{"a": 1, "a": 2}\')', "'a' stands there twice"),
        ("print('x' * 3_000_000)", "over 1,000,000 bytes"),
        ("print('{\"cost\": NaN}')", "`value` is NaN"),
    ],
)
def test_what_a_command_does_wrong_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    """A code other than 0, a signal, and what is no JSON: told with the last line of stderr."""
    assert said in refused(gate(command=script(tmp_path, text)), tmp_path)


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    """A misspelt program is no traceback."""
    assert "cannot be started: No such file or directory: 'no-such-program'" in refused(
        gate(command=("no-such-program",)), tmp_path
    )


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """At the time limit its whole process group is ended."""
    command = script(
        tmp_path,
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "open('pids', 'w').write(f'{os.getpid()} {child.pid}')\n"
        "time.sleep(1000)\n",
    )
    assert "no answer within 3 s" in refused(gate(command=command, timeout="3s"), tmp_path)
    for pid in written(tmp_path / "pids"):
        wait_until(lambda pid=pid: ended(int(pid)))


# --- URLs


class Answers(BaseHTTPRequestHandler):
    released = threading.Event()

    def do_POST(self) -> None:
        told = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status, body, headers = 200, json.dumps({"cost": told["parameters"]["rate"]}).encode(), {}
        if self.path == "/moved":
            status, body, headers = 307, b"", {"location": "/elsewhere"}
        elif self.path == "/broken":
            status, body = 503, b"out of order"
        elif self.path == "/large":
            body = b"1" * 3_000_000
        elif self.path == "/silent":
            self.released.wait(120)
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the caller may have hung up
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        Answers.released.set()
        http.shutdown()
        thread.join()


def test_a_url_is_told_and_answers(server: str, tmp_path: Path) -> None:
    """It gets the same JSON by POST."""
    assert ask(gate(url=server), TOLD, tmp_path) == {"cost": Measurement.exact(0.5)}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/moved", "answered 307, and redirects are not followed: name /elsewhere"),
        ("/broken", "answered 503: out of order"),
        ("/large", "over 1,000,000 bytes"),
    ],
)
def test_what_a_url_does_wrong_is_one_line(server: str, tmp_path: Path, path: str, said: str) -> None:
    """Errors, redirects and endless answers are told, and not followed."""
    assert said in refused(gate(url=server + path), tmp_path)


def test_a_url_without_an_answer_is_told(server: str, tmp_path: Path) -> None:
    """Silence ends with the time limit, and nobody there at once."""
    assert "no answer within 1 s" in refused(gate(url=f"{server}/silent", timeout="1s"), tmp_path)
    assert "no answer: " in refused(gate(url="http://127.0.0.1:1/"), tmp_path)

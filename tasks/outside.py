"""Asks a function, a command or a URL of the user's for measurements, and reads what comes back. No Prefect."""

import difflib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tasks import user_function
from tasks.settings import Mistake
from validations.gates import Custom
from validations.verdict import Measurement

MOST_BYTES = 1_000_000
"""An answer larger than this is no measurement."""
SILENT = "it said nothing on stderr"
FIELDS = ("value", "low", "high", "sample", "where", "note")


def ask(gate: Custom, told: dict[str, Any], folder: Path) -> dict[str, Measurement]:
    """Tell the gate's function, command or URL what is `told`, and return its measurements.

    Functions and commands run in a process of their own, in `folder`, which is the policy's. Raises `Mistake` in one
    line where there is no answer in time, or none that is measurements: the gate is errored then.
    """
    seconds = gate.timeout.total_seconds()
    if gate.function is not None:
        what = gate.function
        answer = user_function.call(folder, _called, gate.function, told, what=what, timeout=seconds)
    elif gate.command:
        what = " ".join(gate.command)
        answer = _commanded(gate.command, told, folder, what, seconds)
    else:
        assert gate.url is not None
        what = gate.url
        answer = _posted(gate.url, told, seconds)
    return measurements(_parsed(answer, what), what)


def measurements(answer: object, what: str) -> dict[str, Measurement]:
    """Read `{"metric": number}` or `{"metric": {"value": ..., "low": ..., "high": ..., "sample": ..., ...}}`.

    A number alone is an exact fact. Raises `Mistake`, beginning with `what`, for anything else.
    """
    if not isinstance(answer, dict) or not answer:
        raise Mistake(f"{what}: the answer is {_kind(answer)}: wanted an object of measurements, like {{'cost': 0.2}}")
    return {name: _measurement(str(name), value, what) for name, value in answer.items()}


def _measurement(name: str, given: object, what: str) -> Measurement:
    here = f"{what}: '{name}'"
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise Mistake(f"{here}: a metric's name is of letters, digits and _")
    fields: dict[str, Any] = given if isinstance(given, dict) else {"value": given}
    for field in fields:
        if field not in FIELDS:
            raise Mistake(f"{here}: unknown word '{field}'{_nearest(str(field))} (there are: {', '.join(FIELDS)})")
    if "value" not in fields:
        raise Mistake(f"{here}: `value` is missing")
    if ("low" in fields) != ("high" in fields):
        raise Mistake(f"{here}: an interval has both ends: give `low` and `high`, or neither")
    value, low, high = (
        _number(fields.get(end, fields["value"]), f"{here}: `{end}`") for end in ("value", "low", "high")
    )
    if not low <= value <= high:
        raise Mistake(f"{here}: the interval [{low:g}, {high:g}] does not hold the value {value:g}")
    sample = fields.get("sample", 1)
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 0:
        raise Mistake(f"{here}: `sample` is {_kind(sample)}: it is a count, 0 or more")
    where, note = (_words(fields.get(field, ""), f"{here}: `{field}`") for field in ("where", "note"))
    return Measurement(value=value, low=low, high=high, sample=sample, where=where, note=note)


def _number(value: object, here: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mistake(f"{here} is {_kind(value)}: a measurement is a number (yes is 1, no is 0)")
    if math.isnan(value):
        raise Mistake(f"{here} is NaN: leave out what could not be measured")
    return float(value)


def _words(value: object, here: str) -> str:
    if not isinstance(value, str):
        raise Mistake(f"{here} is {_kind(value)}: it is text")
    return value


def _nearest(word: str) -> str:
    near = difflib.get_close_matches(word, FIELDS, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def _parsed(answer: bytes, what: str) -> object:
    if len(answer) > MOST_BYTES:
        raise Mistake(f"{what}: the answer has over {MOST_BYTES:,} bytes: measurements are a few numbers")
    try:
        return json.loads(answer, object_pairs_hook=_once)
    except ValueError as error:
        shown = answer[:60].decode(errors="replace").strip()
        reason = f"it begins with '{shown}'" if shown else "it is empty"
        twice = f" ({error})" if "twice" in str(error) else ""
        raise Mistake(f"{what}: the answer is no JSON: {reason}{twice}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of two equal keys without a word; measurements may not."""
    for name, _ in pairs:
        if [key for key, _ in pairs].count(name) > 1:
            raise ValueError(f"'{name}' stands there twice")
    return dict(pairs)


def _called(path: str, told: dict[str, Any]) -> bytes:
    """In the child: call the user's function. The answer travels as JSON, so that it can only be plain."""
    return json.dumps(user_function.load(path)(told), default=_plain).encode()


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no measurement: return {{'metric': number}}")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended by itself: its exit code, what it printed, and the last line of its stderr."""

    code: int
    answer: bytes
    said: str


def run(command: tuple[str, ...], told: dict[str, Any], folder: Path, what: str, seconds: float) -> Ended:
    """Run a command in `folder`, with what is `told` as JSON on its stdin and as TITLESHOT_* in its environment.

    What it started ends with it. Raises `Mistake` where it cannot be started, was killed, or has had its time.
    """
    # The files keep a talkative command from filling our memory, and from hanging on a full pipe.
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        asked.write(json.dumps(told).encode())
        asked.seek(0)
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=asked,
                stdout=out,
                stderr=errors,
                env=_environment(told),
                start_new_session=True,
            )
        except OSError as error:
            raise Mistake(f"{what}: it cannot be started: {error.strerror}: '{command[0]}'") from error
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as late:
            raise Mistake(_late(what, seconds)) from late
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # it has answered, or has had its time; its children too
            process.wait()
        said = _last_line(errors)
        if code < 0:
            raise Mistake(f"{what}: ended by {_signal(-code)}: {said or SILENT}")
        out.seek(0)
        return Ended(code, out.read(MOST_BYTES + 1), said)


def _commanded(command: tuple[str, ...], told: dict[str, Any], folder: Path, what: str, seconds: float) -> bytes:
    ended = run(command, told, folder, what, seconds)
    if ended.code:
        raise Mistake(f"{what}: exit code {ended.code}: {ended.said or SILENT}")
    return ended.answer


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _late(what: str, seconds: float) -> str:
    return f"{what}: no answer within {seconds:g} s: make it faster, or give the gate a longer `timeout`"


def _last_line(errors: Any) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 2000))
    return last_line(errors.read())


def last_line(text: bytes) -> str:
    """The last line that says something; empty where none does."""
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:500] if lines else ""


def _environment(told: dict[str, Any]) -> dict[str, str]:
    """What is told as TITLESHOT_* too, for commands that read no JSON; our Python comes first on the PATH."""
    words = {f"TITLESHOT_{name}".upper(): told[name] for name in ("model", "promotion", "when") if name in told}
    for side in ("challenger", "champion"):
        for name, value in (told[side] or {}).items():
            words[f"TITLESHOT_{side}_{name}".upper()] = value
    for name, value in told["settings"].items():
        words[f"TITLESHOT_{name}".upper()] = value
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, **{name: value for name, value in words.items() if value is not None}}


def post(url: str, told: dict[str, Any], seconds: float) -> tuple[int, bytes]:
    """Post what is `told` as JSON; the status of the answer, and its body. Raises `Mistake` where there is no answer in
    time, or a redirect.
    """
    until, answer = time.monotonic() + seconds, b""
    try:
        with httpx.stream("POST", url, json=told, timeout=seconds, follow_redirects=False) as response:
            for part in response.iter_bytes():
                answer += part
                if len(answer) > MOST_BYTES:
                    break
                if time.monotonic() > until:
                    raise Mistake(_late(url, seconds))
    except httpx.TimeoutException as error:
        raise Mistake(_late(url, seconds)) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Mistake(f"{url}: no answer: {error or type(error).__name__}") from error
    if response.is_redirect:
        to = response.headers.get("location", "")
        raise Mistake(f"{url}: answered {response.status_code}, and redirects are not followed: name {to or 'its end'}")
    return response.status_code, answer


def _posted(url: str, told: dict[str, Any], seconds: float) -> bytes:
    status, answer = post(url, told, seconds)
    if status >= 300:
        raise Mistake(f"{url}: {answered(status, answer)}")
    return answer


def answered(status: int, answer: bytes) -> str:
    """What a URL answered, in words."""
    said = last_line(answer[:200])
    return f"answered {status}{': ' + said if said else ''}"

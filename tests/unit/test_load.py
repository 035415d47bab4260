"""Load tests with the real Locust against a real HTTP server in another process."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import loadtests.run as module
from loadtests.report import curve, summary
from loadtests.run import LoadError, Profile, Result, Target, read_result, run, start

ROOT = Path(__file__).parents[2]
SERVER = """
import asyncio, json, sys, uvicorn
seen = {}
async def app(scope, receive, send):
    if scope["type"] != "http": return
    path, body, more = scope["path"], b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    status, answer, headers = 200, b'{"predictions": [1]}', dict(scope["headers"])
    if path.startswith("/seen"): answer = json.dumps(seen.get(path[5:], [])).encode()
    else: seen.setdefault(path, []).append(body.decode())
    if path.startswith("/500"): status, answer = 500, b"the model failed: " + body
    if path.startswith("/302"): status = 302
    if path.startswith("/slow"): await asyncio.sleep(0.3)
    if path.startswith("/never"): await asyncio.sleep(600)
    if path.startswith("/cookie") and b"cookie" in headers: status = 500
    if path.startswith("/header"): status = 200 if headers.get(b"x-tenant") == b"t" else 500
    extra = [(b"location", b"/ok"), (b"set-cookie", b"pin=1"), (b"x-model-version", path[-1:].encode())]
    length = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": length + extra})
    await send({"type": "http.response.body", "body": answer})
uvicorn.run(app, fd=int(sys.argv[1]), log_level="error", access_log=False)
"""
# The test machine may be busy: only the tests of the limit itself look at how late requests left.
EASY = {"max_lateness": 30.0}


class Server:
    def __init__(self, process, port):
        self.process, self.port = process, port

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def seen(self, path):
        with urllib.request.urlopen(self.url(f"/seen{path}"), timeout=30) as response:
            return json.loads(response.read())


@pytest.fixture(scope="module")
def server():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1000)
        number = listener.fileno()
        process = subprocess.Popen([sys.executable, "-c", SERVER, str(number)], pass_fds=[number])
        try:
            # The socket listens already: the first answer comes when the server is up.
            server = Server(process, listener.getsockname()[1])
            server.seen("/")
            yield server
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def payloads(tmp_path):
    path = tmp_path / "payloads.jsonl"
    path.write_text("".join(json.dumps({"inputs": {"n": [n]}}) + "\n" for n in range(7)))
    return path


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_two_targets_get_the_same_requests_side_by_side(server, payloads, tmp_path, monkeypatch):
    """Every target gets all planned requests, the same payloads in the same order, for the whole time."""
    monkeypatch.setenv("LOCUST_RUN_TIME", "1s")
    monkeypatch.setenv("LOCUST_USERS", "5")
    targets = {"champion": server.url("/a1"), "challenger": server.url("/b2")}
    result = run(Profile(rate=50, seconds=2, **EASY), targets, payloads, folder=tmp_path / "run")
    lines = payloads.read_text().splitlines()
    for path in ("/a1", "/b2"):
        assert sorted(server.seen(path)) == sorted(lines[n % 7] for n in range(100))
    for name, version in (("champion", "1"), ("challenger", "2")):
        target = result.targets[name]
        assert (target.sent, target.failed, target.latencies.size) == (100, 0, 100)
        assert target.versions == {version: 100}
        assert 0 < target.latencies.min() < target.latencies.max() < 10
    assert result.seconds >= 2
    assert result.lateness.size == 200
    assert (result.lateness >= 0).all()
    assert result.cpu > 0
    again = read_result(tmp_path / "run" / "result.json")
    assert summary(again) == summary(result)


def test_failed_requests_are_a_result(server, payloads):
    """Errors, redirects, time-outs and a server that is down are counted with their reason; latency is infinite."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        targets = {
            "ok": server.url("/fine"),
            "broken": server.url("/500"),
            "moved": server.url("/302"),
            "hanging": server.url("/never"),
            "down": f"http://127.0.0.1:{unused.getsockname()[1]}/",
            "cookies": server.url("/cookie"),
            "headers": server.url("/header"),
        }
        profile = Profile(rate=20, seconds=1, timeout=1.5, arrivals="poisson", headers={"x-tenant": "t"}, **EASY)
        result = run(profile, targets, payloads)
    failed = {name: target.failed for name, target in result.targets.items()}
    bad = {"broken": 20, "moved": 20, "hanging": 20, "down": 20}
    assert failed == {"ok": 0, "cookies": 0, "headers": 0, **bad}
    assert result.failed == 80
    reasons = {name: list(target.reasons) for name, target in result.targets.items()}
    assert reasons["broken"] == ["HTTP 500"]
    assert reasons["moved"] == ["HTTP 302"]
    assert reasons["hanging"] == ["timeout"]
    assert len(reasons["down"]) == 1
    assert "refused" in reasons["down"][0]
    assert np.isinf(result.targets["down"].latencies).all()
    first = next(failure for failure in result.failures if failure.target == "broken")
    assert (first.status, first.reason) == (500, "HTTP 500")
    assert first.body.startswith("the model failed")
    assert result.started <= first.time


def test_a_stall_shows_in_the_latencies_of_all_that_arrived_in_it(server, payloads, tmp_path):
    """While the server stands still requests go on arriving, and each one's wait is counted from its arrival."""
    profile = Profile(rate=100, seconds=120, timeout=60)
    with start(profile, server.url("/stall"), payloads, tmp_path / "live") as live:
        wait_for(lambda: live.progress()["ok"] > 0)
        server.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            before = live.progress()["sent"]
            wait_for(lambda: live.progress()["sent"] >= before + 150)
        finally:
            stalled = time.monotonic() - began
            server.process.send_signal(signal.SIGCONT)
        answered = live.progress()["sent"]
        wait_for(lambda: live.progress()["ok"] >= answered)
        result = live.stop()
    latencies = result.targets["live"].latencies
    # A closed loop would show the stall in one request per user; here half of those in it waited half of it.
    assert result.failed == 0
    assert latencies.max() >= 0.9 * stalled
    assert (latencies >= stalled / 2).sum() >= 60
    assert np.quantile(latencies, 0.99) >= stalled / 2


def test_stopping_live_traffic_loses_nothing(server, payloads, tmp_path):
    """What was in flight is answered and counted: the server saw exactly what the result says."""
    with start(Profile(rate=50, seconds=120), server.url("/slow/3"), payloads, tmp_path / "live") as live:
        assert set(live.progress()) == {"sent", "ok", "failed", "seconds"}
        wait_for(lambda: live.progress()["ok"] >= 30)
        result = live.stop()
        target = result.targets["live"]
        assert live.process.poll() == 0
        assert live.stop() is result
    seen = server.seen("/slow/3")
    assert target.sent == target.latencies.size == len(seen)
    assert (result.failed, target.versions) == (0, {"3": len(seen)})
    lines = payloads.read_text().splitlines()
    assert sorted(seen) == sorted(lines[n % 7] for n in range(len(seen)))
    assert target.latencies.min() >= 0.3
    last = json.loads(live.progress_file.read_text())
    assert (last["sent"], last["ok"], last["failed"]) == (target.sent, target.sent, 0)
    assert live.progress() == last


def test_live_traffic_ends_with_its_time(server, payloads, tmp_path):
    """Live traffic is bounded: it ends by itself, whole, and `stop` still returns the result."""
    with start(Profile(rate=300, seconds=1), server.url("/500"), payloads, tmp_path / "live") as live:
        assert live.process.wait(60) == 0
        result = live.stop()
    assert (result.sent, result.failed) == (300, 300)
    assert len(result.failures) == 200


def test_an_interrupt_is_a_stop(server, payloads, tmp_path):
    """Ctrl-C in the terminal reaches the generator too, and it still writes what it has."""
    with start(Profile(rate=50, seconds=120), server.url("/int"), payloads, tmp_path / "live") as live:
        wait_for(lambda: live.progress()["ok"] > 0)
        live.process.send_signal(signal.SIGINT)
        live.process.wait(60)
        result = live.stop()
    assert result.sent == result.targets["live"].latencies.size == len(server.seen("/int"))
    assert result.failed == 0


def test_live_traffic_whose_generator_dies_is_an_error(server, payloads, tmp_path):
    """A killed generator raises, both when asked for progress and when stopped."""
    with start(Profile(rate=50, seconds=120), server.url("/die"), payloads, tmp_path / "live") as live:
        wait_for(lambda: live.progress()["ok"] > 0)
        os.killpg(live.process.pid, signal.SIGKILL)
        live.process.wait(60)
        with pytest.raises(LoadError, match="SIGKILL"):
            live.progress()
        with pytest.raises(LoadError, match="SIGKILL"):
            live.stop()


def test_leaving_live_traffic_ends_it(server, payloads, tmp_path):
    """Whatever goes wrong in between, no generator is left behind."""
    with (
        contextlib.suppress(KeyError),
        start(Profile(rate=50, seconds=120), server.url("/x"), payloads, tmp_path / "live") as live,
    ):
        raise KeyError
    assert live.process.poll() is not None


def test_the_run_time_is_not_cut_short(server, payloads, tmp_path):
    """Locust's timers are right although importing took seconds of CPU (gevent counts from a stale clock)."""
    burn = tmp_path / "burn.py"
    burn.write_text(
        "import time, gevent\ngevent.get_hub()\nuntil = time.process_time() + 3\n"
        "while time.process_time() < until: pass\n"
    )
    folder = tmp_path / "run"
    plan = Profile(rate=20, seconds=600)
    process = module._launch(plan, {"a": server.url("/t")}, payloads, folder)
    module._kill(process)
    environment = {**os.environ, "TITLESHOT_LOAD": str(folder / "plan.json"), "PYTHONPATH": str(ROOT)}
    files = f"{burn},{ROOT / 'loadtests' / 'locustfile.py'}"
    command = [sys.executable, "-m", "locust", "-f", files, "--headless", "-u", "1", "-t", "2s"]
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120, check=True)
    result = read_result(folder / "result.json")
    assert result.seconds >= 1.5
    assert result.sent > 0


FAKE = """
import json, os
from pathlib import Path
import gevent
from locust import User, task
plan = json.loads(Path(os.environ["TITLESHOT_LOAD"]).read_text())
class Fake(User):
    @task
    def go(self):
        {body}
        gevent.spawn(self.environment.runner.quit)
        gevent.sleep(60)
"""
NOTHING = {"sent": 0, "latencies": [], "reasons": {}, "versions": {}}
EMPTY = {"started": 0, "seconds": 99, "targets": {"a": NOTHING}, "failures": [], "lateness": [], "cpu": 0}
DEATHS = {
    "cannot be imported": ("raise RuntimeError('no such thing')", "exit code 1.*no such thing"),
    "leaves no result": (FAKE.format(body="pass"), "exit code 0 and left no result"),
    "sends nothing": (
        FAKE.format(body=f"Path(plan['result']).write_text(json.dumps({EMPTY}))"),
        "sent 0 of 20 requests to a",
    ),
    "is killed": (FAKE.format(body="os.kill(os.getpid(), 9)"), "SIGKILL"),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_generator_that_fails_is_an_error_and_never_a_pass(how, payloads, tmp_path, monkeypatch):
    """Whatever kills Locust raises LoadError; so does a run that sent nothing although the exit code is 0."""
    locustfile, message = DEATHS[how]
    (tmp_path / "locustfile.py").write_text(locustfile)
    monkeypatch.setattr(module, "_LOCUSTFILE", tmp_path / "locustfile.py")
    with pytest.raises(LoadError, match=message):
        run(Profile(rate=20, seconds=1), {"a": "http://127.0.0.1:1/"}, payloads)


def test_a_generator_that_hangs_is_ended_with_all_it_started(payloads, tmp_path, monkeypatch):
    """After its time the whole process group is killed: nothing is left running."""
    (tmp_path / "locustfile.py").write_text(
        "import subprocess, time, pathlib, os\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(module, "_LOCUSTFILE", tmp_path / "locustfile.py")
    waiting = threading.Event()
    real = subprocess.Popen.wait

    def wait(process, timeout=None):
        if timeout is not None and timeout > 1 and not waiting.is_set():
            waiting.set()
            wait_for((tmp_path / "child").exists)
            raise subprocess.TimeoutExpired("locust", timeout)
        return real(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(LoadError, match="did not end in time"):
        run(Profile(rate=20, seconds=1), {"a": "http://127.0.0.1:1/"}, payloads)
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not _running(child))


def _running(pid):
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return False


def sound(**changes):
    """A run as planned: 20 requests in 1 s, each 1 ms late."""
    target = Target(sent=20, latencies=np.full(20, 0.01), reasons={}, versions={})
    target = dataclasses.replace(target, **{k: changes.pop(k) for k in ("sent", "latencies") if k in changes})
    whole = {"started": 0.0, "seconds": 1.0, "targets": {"a": target}, "failures": ()}
    return Result(**{**whole, "lateness": np.full(20, 0.001), "cpu": 0.2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0.1}, r"ended after 0\.1 of 1 s"),
        ({"sent": 19, "latencies": np.ones(19)}, "sent 19 of 20"),
        ({"latencies": np.ones(18)}, "lost 2 requests"),
        ({"lateness": np.full(20, 0.2)}, "saturated"),
    ],
)
def test_an_unsound_run_is_an_error(changes, message):
    """Ended early, sent too little, lost answers, left late: each is the generator's fault, and raises."""
    profile = Profile(rate=20, seconds=1)
    module._require_sound(sound(), profile)
    with pytest.raises(LoadError, match=message):
        module._require_sound(sound(**changes), profile)


def test_a_generator_that_cannot_keep_up_is_saturated(server, payloads):
    """More requests than one process can send leave late: an error, and not a slow server."""
    with pytest.raises(LoadError, match="saturated"):
        run(Profile(rate=50_000, seconds=0.1, timeout=60), {"a": server.url("/flood")}, payloads)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/invocations",
        "http://10.0.0.1:80/",
        "http://127.0.0.1.example.com/",
        "http://localhost@example.com/",
        "https://127.0.0.1/",
        "ftp://localhost/",
        "127.0.0.1:80",
        "",
    ],
)
def test_other_machines_are_refused(url, payloads, tmp_path):
    """A load test against somebody else's machine is refused before anything is started."""
    for call in (
        lambda: run(Profile(rate=1, seconds=1), {"a": url}, payloads),
        lambda: start(Profile(rate=1, seconds=1), url, payloads, tmp_path / "live"),
    ):
        with pytest.raises(ValueError, match="only http on this machine"):
            call()


def test_what_cannot_be_asked_is_refused(payloads, tmp_path):
    """No targets, no payloads, no requests, or far too many of them: refused with a sentence."""
    here = {"a": "http://localhost:1/"}
    with pytest.raises(ValueError, match="at least one target"):
        run(Profile(rate=1, seconds=1), {}, payloads)
    (tmp_path / "empty").write_text("\n")
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no payloads"):
            run(Profile(rate=1, seconds=1), here, missing)
    for wrong in ({"rate": 0, "seconds": 1}, {"rate": 0.1, "seconds": 1}, {"rate": 1e5, "seconds": 1e5}):
        with pytest.raises(ValueError):
            Profile(**wrong)


def test_locust_is_never_imported_beside_us():
    """Prefect hangs in a process that has imported Locust, so neither `run` nor `report` does."""
    code = "import sys, loadtests.run, loadtests.report; sys.exit(bool({'locust', 'gevent'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_percentiles_come_from_the_raw_latencies():
    """1,049 ms stay 1,049 ms (Locust says 1,000), failures are beyond every quantile, and all is JSON."""
    latencies = np.array([0.0996] * 94 + [1.049] * 5 + [np.inf])
    report = summary(sound(sent=100, latencies=latencies))
    quantiles = report["targets"]["a"]["quantiles_ms"]
    assert quantiles["p50"] == pytest.approx(99.6)
    assert quantiles["p95"] == quantiles["p99"] == pytest.approx(1049)
    assert quantiles["p99.9"] is None
    assert report["targets"]["a"]["failed"] == 1
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_curve_tells_of_failures():
    """The share of requests answered within a time never reaches 1 where some failed."""
    latencies = np.append(np.linspace(0.001, 1, 900), [np.inf] * 100)
    drawn = curve(sound(sent=1000, latencies=latencies).targets["a"], points=50)
    assert len(drawn["ms"]) == len(drawn["share"]) == 50
    assert (drawn["ms"][0], drawn["ms"][-1], drawn["share"][-1]) == (1.0, 1000.0, 0.9)
    assert drawn["ms"] == sorted(drawn["ms"])
    assert curve(sound(latencies=np.full(20, np.inf)).targets["a"]) == {"share": [], "ms": []}

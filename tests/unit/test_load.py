"""Load tests with the real Locust against a real HTTP server in another process."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

import loadtests.run as module
from deployments.target import Traffic, Version
from loadtests.capacity import Search
from loadtests.recording import Recorded, replay
from loadtests.report import slices, summary
from loadtests.run import LoadError, Profile, Result, Saturated, Target, read_result, run, start
from tests.fakes import FakeTarget
from validations.gates import Load
from validations.policy import PolicyError, read
from validations.verdict import Bound, Evidence, Outcome, judge

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
        assert target.at.size == 100
        assert 0 <= target.at.min() < target.at.max() < 2
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
    module.kill(process)
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
NOTHING = {"sent": 0, "latencies": [], "at": [], "reasons": {}, "versions": {}}
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
    for name in ("_START", "_GRACE"):
        monkeypatch.setattr(module, name, 0)
    with pytest.raises(LoadError, match="did not end in time"):
        run(
            Profile(rate=20, seconds=1, timeout=0.1),
            {"a": "http://127.0.0.1:1/"},
            payloads,
            meanwhile=lambda: wait_for((tmp_path / "child").exists),
        )
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not _running(child))


def _running(pid):
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return False


def target(latencies, at=None, sent=None):
    """What became of requests with these latencies, evenly over a second where nothing else is said."""
    latencies = np.asarray(latencies, dtype=float)
    at = np.arange(latencies.size) / max(latencies.size, 1) if at is None else np.asarray(at, dtype=float)
    return Target(latencies.size if sent is None else sent, latencies, at, reasons={}, versions={})


def sound(**changes):
    """A run as planned: 20 requests in 1 s, each 1 ms late."""
    one = target(changes.pop("latencies", np.full(20, 0.01)), sent=changes.pop("sent", None))
    whole = {"started": 0.0, "seconds": 1.0, "targets": {"a": one}, "failures": ()}
    return Result(**{**whole, "lateness": np.full(20, 0.001), "cpu": 0.2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0.1}, r"ended after 0\.1 of 1 s"),
        ({"sent": 19, "latencies": np.ones(19)}, "sent 19 of 20"),
        ({"latencies": np.ones(18), "sent": 20}, "lost 2 requests"),
        ({"lateness": np.full(20, 0.2)}, "saturated.*200 ms late"),
        ({"cpu": 0.91}, r"saturated: it used 91% of a core \(at most 90%\): lower the rate"),
    ],
)
def test_an_unsound_run_is_an_error(changes, message):
    """Ended early, sent too little, lost answers, left late: each is the generator's fault, and raises."""
    profile = Profile(rate=20, seconds=1, max_cpu=0.9)
    module.require_sound(sound(), profile)
    with pytest.raises(LoadError, match=message):
        module.require_sound(sound(**changes), profile)


def test_a_generator_that_cannot_keep_up_is_saturated(server, payloads):
    """More requests than one process can send leave late: an error, and not a slow server."""
    with pytest.raises(Saturated, match="saturated"):
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
    for wrong in (
        {"rate": 0, "seconds": 1},
        {"rate": 0.1, "seconds": 1},
        {"rate": 1e5, "seconds": 1e5},
        {"rate": 1, "seconds": 5, "arrivals": "recorded"},
        {"rate": 1, "seconds": 5, "times": (1.0,)},
        {"rate": 1, "seconds": 5, "arrivals": "recorded", "times": (1.0, 5.0)},
        {"rate": 1, "seconds": 5, "arrivals": "recorded", "times": (2.0, 1.0)},
    ):
        with pytest.raises(ValueError):
            Profile(**wrong)


def test_locust_is_never_imported_beside_us():
    """Prefect hangs in a process that has imported Locust, so none of the modules that tasks import does."""
    modules = "loadtests.run, loadtests.report, loadtests.capacity, loadtests.recording"
    code = f"import sys, {modules}; sys.exit(bool({{'locust', 'gevent'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_evidence_has_the_raw_latencies():
    """1,049 ms stay 1,049 ms (Locust says 1,000), failures are counted and not drawn, and all is JSON."""
    latencies = np.array([1.049] * 5 + [0.0996] * 94 + [np.inf])
    report = summary(sound(latencies=latencies))
    drawn = report["load"]["a"]
    assert (drawn["requests"], drawn["failures"]) == (100, 1)
    assert drawn["latencies_ms"] == [99.6] * 94 + [1049.0] * 5
    assert report["generator"]["lateness_ms"]["p99"] == 1
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_recorded_requests_come_with_their_own_gaps(server, payloads, tmp_path):
    """Each target gets the recorded requests at the recorded times; the turns of one round stay beside each other."""
    times = (0.0, 0.02, 0.03, 0.9, 0.91, 1.6)
    profile = Profile(rate=3, seconds=2, arrivals="recorded", times=times, **EASY)
    targets = {"champion": server.url("/r1"), "challenger": server.url("/r2")}
    result = run(profile, targets, payloads, folder=tmp_path / "run")
    assert result.seconds >= 2
    lines = payloads.read_text().splitlines()
    for name, path in (("champion", "/r1"), ("challenger", "/r2")):
        assert sorted(server.seen(path)) == sorted(lines[:6])
        late = np.sort(result.targets[name].at) - times
        assert (late >= -1e-9).all()
        assert (late <= 0.2).all()  # half of the mean gap, and less where the next round follows sooner
        assert late[0] <= 0.011


def test_poisson_arrivals_are_as_many_as_planned_and_in_time(server, payloads):
    """However chance spaces them, the planned requests are sent within the planned time."""
    result = run(Profile(rate=40, seconds=2, arrivals="poisson", **EASY), {"a": server.url("/p")}, payloads)
    at = np.sort(result.targets["a"].at)
    assert (at.size, result.sent) == (80, 80)
    assert 0 <= at[0] < at[-1] < 2
    assert np.diff(at).std() > 0.3 * np.diff(at).mean()


def test_what_is_raised_meanwhile_ends_the_run(server, payloads):
    """Who looks on may end a run: the generator is gone at once, and no result is made up."""
    looks = []

    def look():
        looks.append(server.seen("/meanwhile"))
        if looks[-1]:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        run(Profile(rate=20, seconds=600), {"a": server.url("/meanwhile")}, payloads, meanwhile=look)
    assert len(server.seen("/meanwhile")) < 12_000


# --- slices


@given(
    some.lists(some.tuples(some.floats(0, 59.9), some.floats(0.001, 5) | some.just(math.inf)), max_size=60),
    some.floats(0.5, 70),
)
def test_slices_are_the_run_cut_by_the_intended_starts(requests, seconds):
    """Every request is in exactly one slice, that of its intended start; what is left belongs to the last."""
    at, latencies = [a for a, _ in requests], [latency for _, latency in requests]
    targets = {"champion": target(latencies, at), "challenger": target([], [])}
    whole = dataclasses.replace(sound(seconds=60.003), targets=targets)
    cut = slices(whole, seconds)
    assert len(cut) == max(1, math.floor(60.003 / seconds + 0.001))
    assert all(set(one) == {"champion", "challenger"} for one in cut)
    assert sorted(np.concatenate([one["champion"] for one in cut])) == sorted(latencies)
    for number, one in enumerate(cut):
        here = [v for a, v in requests if min(int(a / seconds), len(cut) - 1) == number]
        assert sorted(one["champion"]) == sorted(here)


def test_a_slice_has_a_length():
    """A slice of no seconds is refused."""
    with pytest.raises(ValueError, match="a slice lasts longer"):
        slices(sound(), 0)


# --- recorded requests


times_ = some.lists(some.floats(0, 1000).map(lambda at: round(at, 3)), min_size=2, max_size=30, unique=True)


@given(times_, some.floats(1, 50), some.none() | some.floats(0.1, 50))
def test_a_replay_keeps_the_order_and_all_gaps_in_proportion(times, seconds, rate):
    """The gaps are those of the recording over the speed, the bodies stay with their times, and the run is filled."""
    recording = [Recorded(at, str(at)) for at in times]
    own = (len(times) - 1) / (max(times) - min(times))
    replayed = replay(recording, seconds, rate, most=10**9)
    assert replayed.rate == pytest.approx(rate or own)
    assert replayed.speed == pytest.approx((rate or own) / own)
    assert replayed.times[0] == 0
    assert replayed.times[-1] < seconds
    sent = [float(replayed.bodies[n % len(replayed.bodies)]) for n in range(len(replayed.times))]
    for (at, body), (following, after) in zip(
        zip(replayed.times, sent, strict=True), list(zip(replayed.times, sent, strict=True))[1:], strict=False
    ):
        gap = after - body if after > body else 1 / own  # it begins anew after its mean gap
        assert following - at == pytest.approx(gap / replayed.speed, abs=1e-6)
    assert set(sent) <= set(times)
    assert max(times) in map(float, replayed.bodies)  # the latest ones are what is replayed


@pytest.mark.parametrize("times", [[], [5.0], [5.0, 5.0]])
def test_what_has_no_spacing_is_not_replayed(times):
    """No requests, one, or all at one time: refused."""
    with pytest.raises(ValueError, match="two requests at different times"):
        replay([Recorded(at, "{}") for at in times], 10)


def test_a_replay_is_bounded():
    """A recording that is too fast for the run is refused before its times are written down."""
    with pytest.raises(ValueError, match="more than 1,000 in the run"):
        replay([Recorded(0, "{}"), Recorded(0.001, "{}")], 10, most=1000)


# --- the capacity search


def searching(**words):
    gate = {"kind": "load", "find": "capacity", "from": "10/s", "to": "160/s", "run_time": "20s", **words}
    return Load.model_validate({"checks": {"capacity": {"min": 50}, "p95_ms": {"max": 100}}, **gate})


@given(some.floats(0.1, 100), some.floats(1, 50), some.floats(0.01, 0.9), some.floats(0.1, 5000), some.booleans())
def test_a_search_brackets_the_capacity_in_a_bounded_number_of_runs(start, factor, precision, capacity, told):
    """It never asks above `to`, ends within the runs that the policy counts, and what it found is within `precision`."""
    limit = start * factor
    checks = {"capacity": {"min": 0}, "error_rate": {"min": 0}}
    words = {"from": start, "to": limit, "precision": precision, "run_time": "10s", "min_sample": 1}
    gate = searching(checks=checks, **words)
    search, asked = Search(start, limit, precision), []
    while search.rate is not None:
        asked.append(search.rate)
        assert len(asked) <= gate.probes
        search.tell(True if search.rate <= capacity else (False if told else None))
    assert len(set(asked)) == len(asked)
    assert max(asked) <= limit
    assert search.kept <= capacity
    if capacity >= limit:
        assert search.kept == search.high == limit
    elif told:
        assert search.high > capacity
        if capacity >= start:
            assert search.high <= search.kept * (1 + precision) * (1 + 1e-6)
    else:
        assert search.high == math.inf  # nothing was broken: what is not proven blames nobody
    with pytest.raises(ValueError, match="has ended"):
        search.tell(kept=True)


def version(gate, capacity, asked):
    """Runs of a version that answers in 10 ms up to its capacity, and in 1 s beyond; "too much" saturates."""

    def probe(name, rate):
        asked.append((name, round(rate, 1)))
        limit = capacity[name]
        if isinstance(limit, Exception):
            raise limit
        one = target(np.full(round(rate * gate.run_time.total_seconds()), 0.01 if rate <= limit else 1.0))
        return dataclasses.replace(sound(cpu=0.3), targets={name: one})

    return probe


def found(gate, capacity, live=lambda _: 0.0):
    from tasks.capacity import search
    from tasks.load import alone, searched

    asked = []
    names = ["challenger", "champion"][: gate.searches]
    probe = version(gate, capacity, asked)
    result, runs = search(gate, names, probe, lambda run, name: alone(run, name, gate.probe_confidence))
    measured = searched(gate, result, live)
    verdict = judge("load", gate.bounds(), Evidence(measurements=measured), gate.min_sample)
    return verdict, asked, runs


@pytest.mark.parametrize(
    ("capacity", "outcome"), [(60, "passed"), (42, "failed"), (5, "failed"), (1000, "passed"), (50.5, "passed")]
)
def test_the_capacity_is_judged_by_its_whole_interval(capacity, outcome):
    """At least 50/s: passed where a rate from 50 on was kept, failed where one up to 50 was broken."""
    gate = searching(precision="1%")
    verdict, asked, runs = found(gate, {"challenger": capacity})
    assert verdict.outcome == outcome, verdict.why
    measured = verdict.evidence.measurements["capacity"]
    assert measured.low <= capacity
    assert measured.high >= min(capacity, 160)
    assert [(row["version"], round(row["rate"], 1)) for row in runs] == asked
    assert measured.sample == sum(row["requests"] for row in runs)
    # The absolute checks are those at the highest rate that was kept, or at the first where none was.
    assert verdict.evidence.measurements["p95_ms"].value == (1000 if capacity == 5 else 10)
    assert json.loads(json.dumps(runs))[-1]["outcome"] in ("kept", "broken")


def test_champion_and_challenger_take_turns_at_the_same_rates():
    """Each is loaded by itself, the two at the same rates in turn, and each goes first every other time."""
    checks = {"capacity_ratio": {"min": 0.8}, "p95_ms": {"max": 100}}
    gate = searching(checks=checks)
    verdict, asked, _ = found(gate, {"challenger": 90, "champion": 90})
    assert asked[:5] == [
        ("challenger", 10), ("champion", 10), ("champion", 20), ("challenger", 20), ("challenger", 40)
    ]  # fmt: skip
    assert [rate for name, rate in asked if name == "champion"] == [
        rate for name, rate in asked if name == "challenger"
    ]
    assert verdict.outcome == "passed"
    ratio = verdict.evidence.measurements["capacity_ratio"]
    assert ratio.value == 1
    assert 1 / 1.1 <= ratio.low < 1 < ratio.high <= 1.1 + 1e-9
    worse, _, _ = found(gate, {"challenger": 45, "champion": 90})
    assert worse.outcome == "failed"
    assert worse.evidence.measurements["capacity_ratio"].value == pytest.approx(0.5, rel=0.1)


def test_live_requests_count_as_work_of_the_version_that_answers_them():
    """A champion that answers 30 live requests a second beside its runs has that much more capacity than they show."""
    gate = searching(checks={"capacity_ratio": {"min": 0.8}, "p95_ms": {"max": 100}})
    live = {"challenger": 0.0, "champion": 30.0}
    verdict, _, _ = found(gate, {"challenger": 90, "champion": 60}, live.__getitem__)
    assert verdict.evidence.measurements["capacity_ratio"].value == pytest.approx(1, rel=0.1)
    # Up to `to` is what was asked for: what lies above it is no difference.
    verdict, _, _ = found(gate, {"challenger": 200, "champion": 200}, live.__getitem__)
    assert verdict.evidence.measurements["capacity_ratio"].low == 1


def test_a_saturated_generator_blames_nobody():
    """Where the generator was the limit the capacity is open above: passed if enough was kept, else inconclusive."""

    def capped(gate, capacity, most):
        from tasks.capacity import search
        from tasks.load import alone, searched

        probe = version(gate, {"challenger": capacity}, [])

        def saturated(name, rate):
            if rate > most:
                raise Saturated("too much")
            return probe(name, rate)

        result, _ = search(gate, ["challenger"], saturated, lambda r, name: alone(r, name, gate.probe_confidence))
        return judge("load", gate.bounds(), Evidence(measurements=searched(gate, result, lambda _: 0.0)))

    enough, short = capped(searching(), 1000, 100), capped(searching(), 1000, 30)
    assert (enough.outcome, short.outcome) == ("passed", "inconclusive")
    measured = short.evidence.measurements["capacity"]
    assert (measured.low, measured.high) == (20, math.inf)
    assert "the generator, not the model, was the limit" in short.why
    with pytest.raises(Saturated, match="too much"):
        capped(searching(), 1000, 5)


def test_a_search_that_hurts_live_requests_stops():
    """Harm to live requests ends the searches of both versions with what is known; no blame, and no further run."""
    from tasks.capacity import Hurt, search
    from tasks.load import alone, searched

    gate = searching(checks={"capacity": {"min": 50}, "capacity_ratio": {"min": 0.8}, "p95_ms": {"max": 100}})
    asked = []
    probe = version(gate, {"challenger": 1000, "champion": 1000}, asked)

    def harmful(name, rate):
        if rate > 30:
            raise Hurt("the champion shed 3 live requests (503)")
        return probe(name, rate)

    result, _ = search(gate, ["challenger", "champion"], harmful, lambda r, n: alone(r, n, gate.probe_confidence))
    verdict = judge("load", gate.bounds(), Evidence(measurements=searched(gate, result, lambda _: 0.0)))
    assert len(asked) == 4
    assert verdict.outcome == "inconclusive"
    assert "stopped at 40/s to the challenger: the champion shed 3 live requests" in verdict.why


@pytest.mark.parametrize("lateness", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("cpu", [0.0, 0.79996, 0.8])
def test_the_generators_health_is_a_check_that_never_fails_the_challenger(lateness, cpu):
    """A run that was not refused as saturated passes the generator's checks, by construction."""
    from tasks.load import generator

    bounds = {"generator_lateness_ms": Bound(max=100), "generator_cpu": Bound(max=0.8)}
    whole = sound(lateness=np.full(20, lateness), cpu=cpu)
    module.require_sound(whole, Profile(rate=20, seconds=1, max_lateness=100 / 1000, max_cpu=0.8))
    verdict = judge("load", bounds, Evidence(measurements=generator([whole])), 20)
    assert verdict.outcome == "passed"


# --- live requests beside a search


@pytest.fixture
def beside(tmp_path):
    """A target with a champion that is routed, and what a search sees of it."""
    from types import SimpleNamespace

    fake = FakeTarget()
    fence = fake.lease("m", "test")
    for number in ("1", "2"):
        fake.deploy(Version("m", number, tmp_path / "nowhere", "sha256:0"), fence)
    fake.route(Traffic("m", "1"), fence)
    known = SimpleNamespace(
        target=fake, model="m", challenger=SimpleNamespace(number="2"), champion=SimpleNamespace(number="1")
    )
    return fake, known


def test_any_live_request_that_is_shed_is_harm(beside):
    """One 503 of the champion in a run is enough; those before the load began count for nothing."""
    from tasks.load import Live

    fake, known = beside
    behaviour = fake.behaviour("m", "1")
    behaviour.answer = lambda _: (503, b"")
    fake.send("m")
    live = Live(known)
    live.begin()
    behaviour.answer = lambda body: (200, body)
    for _ in range(20):
        fake.send("m")
    live.look()
    live.end("champion")
    assert live.rate("champion") > 0
    assert live.rate("challenger") == 0
    behaviour.answer = lambda _: (503, b"")
    fake.send("m")
    with pytest.raises(Exception, match=r"the champion shed 1 live requests \(503\)"):
        live.look()


def test_errors_beyond_the_usual_are_harm(beside):
    """A champion that fails now and then may go on doing so; more than twice that is the load's doing."""
    from tasks.load import Live

    fake, known = beside
    behaviour = fake.behaviour("m", "1")

    def send(good, bad):
        for answer, count in ((lambda body: (200, body), good), (lambda _: (500, b""), bad)):
            behaviour.answer = answer
            for _ in range(count):
                fake.send("m")

    send(90, 10)
    live = Live(known)
    live.begin()
    send(18, 2)
    live.look()
    send(0, 10)
    with pytest.raises(Exception, match="12 of the champion's 30 live requests failed, 3 expected"):
        live.look()


def test_the_first_version_has_no_live_requests_to_hurt(beside):
    """Without a champion there is nothing to look after."""
    from tasks.load import Live

    _, known = beside
    known.champion = None
    live = Live(known)
    live.begin()
    live.look()
    assert list(live.numbers) == ["challenger"]


# --- what the load is made of


def of_payloads(tmp_path, text, **words):
    from types import SimpleNamespace

    from tasks.load import _profile, _requests

    (tmp_path / "requests.jsonl").write_text(text)
    base = {"kind": "load", "run_time": "10s", "payloads": "requests.jsonl", "checks": {"error_rate": {"max": 0.1}}}
    gate = Load.model_validate({**base, **words})
    requests = _requests(SimpleNamespace(file=lambda name: tmp_path / name, champion=None), gate)
    return _profile(gate, requests, gate.rate)


def test_a_file_of_requests_may_have_times(tmp_path):
    """With `arrivals: recorded` each line has its time and body, in any order; the load has their gaps."""
    text = '{"at": 103, "body": {"n": 2}}\n{"at": 100, "body": {"n": 1}}\n\n{"at": 104.5, "body": {"n": 3}}\n'
    profile, bodies = of_payloads(tmp_path, text, arrivals="recorded")
    assert profile.times == (0.0, 3.0, 4.5, 6.75, 9.75)
    assert [json.loads(body)["n"] for body in bodies] == [1, 2, 3]
    assert profile.planned == 5
    faster, _ = of_payloads(tmp_path, text, arrivals="recorded", rate="2/s")
    assert faster.times[:3] == pytest.approx((0, 2 / 3, 1))  # 2/s is 4.5 times its own 2 in 4.5 s
    # Elsewhere such a line is a body like any other.
    profile, bodies = of_payloads(tmp_path, text, rate="2/s")
    assert (profile.arrivals, json.loads(bodies[0])) == ("constant", {"at": 103, "body": {"n": 2}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n": 1}\n', 'request 1 has no time: with `arrivals: recorded` a line is written {"at": 12.5, "body": ...}'),
        ('{"at": 1, "body": 1}\n{"at": true, "body": 1}\n', "request 2 has no time"),
        ('{"at": Infinity, "body": 1}\n', "request 1 has no time"),
        ('{"at": 1}\n', "request 1 has no time"),
        ('{"at": 1, "body": 1}\n', "cannot be replayed: it takes two requests at different times"),
        ("{\n", "cannot be read"),
        ("\n", "are empty"),
    ],
)
def test_a_file_without_times_is_not_replayed(tmp_path, text, message):
    """Which line, and how to write it."""
    from tasks.settings import Mistake

    with pytest.raises(Mistake) as caught:
        of_payloads(tmp_path, text, arrivals="recorded")
    assert message in str(caught.value)


def test_live_requests_are_replayed_with_their_times(beside):
    """The champion's good answers with their times: no copies, no failures, nothing that is not JSON."""
    from tasks.load import _profile, _requests
    from tasks.settings import Mistake

    fake, known = beside
    gate = Load.model_validate(
        {"kind": "load", "run_time": "10s", "arrivals": "recorded", "checks": {"error_rate": {"max": 0.1}}}
    )
    with pytest.raises(Mistake, match="0 recent live requests with their own spacing cannot be replayed"):
        _profile(gate, _requests(known, gate), gate.rate)
    clock = iter(range(100, 200))
    fake._clock = lambda: float(next(clock))
    for body in (b'{"n":\n1}', b"no json", b'{"n": 2}'):
        fake.send("m", body)
    profile, bodies = _profile(gate, _requests(known, gate), gate.rate)
    assert bodies == ('{"n": 1}', '{"n": 2}')
    assert profile.times[:2] == (0, 2)


def test_the_first_version_needs_a_rate():
    """Nothing is recorded before there is a champion: the input example comes at the gate's `rate`, or not at all."""
    from tasks.load import _profile, _Requests
    from tasks.settings import Mistake

    words = {"kind": "load", "run_time": "10s", "arrivals": "recorded", "checks": {"error_rate": {"max": 0.1}}}
    example = _Requests([Recorded(0.0, "{}")], "the model's own input example")
    with pytest.raises(Mistake, match=r"no champion yet.*give the load gate a `rate`"):
        _profile(Load.model_validate(words), example, None)
    profile, _ = _profile(Load.model_validate({**words, "rate": "5/s"}), example, 5.0)
    assert (profile.arrivals, profile.planned) == ("constant", 50)


# --- the policy's words

SEARCH = "find: capacity, from: 10/s, to: 500/s, run_time: 15s"
KEEP = "p95_ms: {max: 100}"
REFUSED = {
    "no rate": (f"run_time: 9s, checks: {{{KEEP}}}", "`rate` is missing: give it, or `find: capacity`"),
    "nothing about the versions": (
        "rate: 1/s, run_time: 9s, checks: {generator_cpu: {max: 0.8}}",
        "a gate without checks proves nothing",
    ),
    "a generator that must be busy": (
        f"rate: 1/s, run_time: 9s, checks: {{{KEEP}, generator_cpu: {{min: 0.8}}}}",
        "`generator_cpu` is better when smaller: give it a `max`",
    ),
    "a range without a search": (f"rate: 1/s, to: 2/s, run_time: 9s, checks: {{{KEEP}}}", "add `find: capacity`"),
    "a finding without a search": (
        "rate: 1/s, run_time: 9s, checks: {capacity: {min: 1}}",
        "`capacity` is what a search finds: add `find: capacity`",
    ),
    "a search at a rate": (f"{SEARCH}, rate: 1/s, checks: {{{KEEP}}}", "a search chooses its rates"),
    "a search from nowhere": (f"find: capacity, run_time: 9s, checks: {{{KEEP}}}", "give `from` and `to`"),
    "a search downwards": (
        f"find: capacity, from: 5/s, to: 4/s, run_time: 9s, checks: {{{KEEP}}}",
        "a search goes up: `from` is 5/s and `to` is 4/s",
    ),
    "a search that nobody asks": (f"{SEARCH}, checks: {{{KEEP}}}", "nothing asks what the search finds"),
    "a search that keeps nothing": (f"{SEARCH}, checks: {{capacity: {{min: 9}}}}", "what shall hold"),
    "a search that compares": (
        f"{SEARCH}, checks: {{capacity: {{min: 9}}, {KEEP}, p50_ratio: {{max: 2}}}}",
        "`p50_ratio` compares at one rate",
    ),
    "a search that ends too soon": (
        f"{SEARCH}, checks: {{capacity: {{min: 501}}, {KEEP}}}",
        "no search up to 500/s proves a capacity of 501/s: raise `to`",
    ),
    "runs too short to prove it": (
        f"{SEARCH}, checks: {{capacity: {{min: 9}}, p99_ms: {{max: 100}}}}",
        r"10/s for 15s are 150 requests, and the checks need \d+: give a longer",
    ),
    "no errors at all": (f"{SEARCH}, checks: {{capacity: {{min: 9}}, error_rate: {{max: 0}}}}", "never proven"),
    "a search of hours": (
        f"{SEARCH.replace('15s', '9m')}, checks: {{capacity: {{min: 9}}, {KEEP}}}",
        r"this search may take \d+ minutes \(up to 10 runs\), more than 60 minutes",
    ),
    "a search of millions": (
        f"{SEARCH.replace('500/s', '9000/s').replace('15s', '1m')}, checks: {{capacity: {{min: 9}}, {KEEP}}}",
        r"this may be 2,700,000 requests, more than 2,000,000: give a shorter `run_time` or a lower `to`",
    ),
    "millions at one rate": (f"rate: 999/s, run_time: 1h, checks: {{{KEEP}}}", "or a lower `rate`"),
    "a precision of ten": (
        f"{SEARCH}, precision: 10, checks: {{{KEEP}}}",
        "'10' is no share: write it like 10% or 0.1",
    ),
    "a misspelt range": (f"{SEARCH.replace('from', 'form')}, checks: {{{KEEP}}}", "did you mean 'from'"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_load_that_proves_nothing_is_refused(mistake):
    """Each in one line that names the word and the mend, before anything is loaded."""
    words, message = REFUSED[mistake]
    with pytest.raises(PolicyError, match=message) as caught:
        read(f"version: 1\nmodel: m\ngates:\n  - {{kind: load, {words}}}\n", "p.yaml")
    assert "\n" not in str(caught.value)


def test_a_search_survives_the_record():
    """A policy with a search, its `from` included, is read from its own record as it was; an old word stays unknown."""
    policy = read(f"version: 1\nmodel: m\ngates: [{{kind: load, {SEARCH}, precision: 5%, checks: {{{KEEP}, "
                  "capacity: {min: 9}}}]\n")  # fmt: skip
    assert type(policy).model_validate_json(policy.model_dump_json()) == policy
    (gate,) = policy.gates
    assert (gate.start, gate.to, gate.precision) == (10, 500, 0.05)
    assert '"from":"10.0/s"' in policy.model_dump_json()
    assert gate.falls_away() is False


def test_the_bounds_of_a_load_are_one():
    """The policy refuses what the generator would refuse, at the same number of requests."""
    from validations.gates import MOST_REQUESTS

    assert MOST_REQUESTS == module.MAX_REQUESTS


def test_a_search_needs_the_sample_that_its_bounds_need():
    """With exactly the requests that the policy asks for, a faultless first run proves the bounds; with one less not."""
    from validations.statistics import proportion, quantile

    for checks in ({"error_rate": {"max": 0.03}}, {"p95_ms": {"max": 100}}, {"p99_ms": {"max": 100}}):
        gate = searching(checks={"capacity": {"min": 1}, **checks}, run_time="2m")
        ((metric, bound),) = gate.kept_bounds().items()
        needed = gate._needed(metric, bound)
        for n, proven in ((needed, True), (needed - 1, False)):
            if metric == "error_rate":
                measured = proportion(0, n, gate.probe_confidence)
            else:
                measured = quantile(np.full(n, 0.01), int(metric[1:3]) / 100, gate.probe_confidence)
            assert (bound.judge(measured) is Outcome.PASSED) is proven

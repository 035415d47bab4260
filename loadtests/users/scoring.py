"""Scoring requests at their appointed times: an open loop over HTTP, several targets side by side.

A latency is the finish less the *intended* start, so a server that stalls cannot make the generator wait
and thereby hide the stall. One greenlet keeps the schedule, each request runs in its own.
"""

import contextlib
import gc
import json
import math
import os
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
from gevent.lock import RLock
from locust import FastHttpUser, task
from locust.exception import StopUser

from loadtests.plan import Plan

MAX_FAILURES = 200
SERVERS_HEADER = "x-titleshot-version"
"""Where a model's own server says its version: not every gateway does."""
_CONNECTIONS = 512


class Tally:
    """What became of the requests to one target."""

    def __init__(self) -> None:
        self.sent = 0
        self.latencies = array("d")
        self.at = array("d")
        self.reasons: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()

    def as_json(self) -> dict[str, Any]:
        """Plain data; a failed request's latency is null, since JSON knows no infinity."""
        return {
            "sent": self.sent,
            "latencies": [None if math.isinf(latency) else latency for latency in self.latencies],
            "at": list(self.at),
            "reasons": dict(self.reasons),
            "versions": dict(self.versions),
        }


class Scoring(FastHttpUser):  # type: ignore[misc]
    """The one user of a run: it keeps the whole schedule."""

    host = "http://127.0.0.1"  # never used: requests carry their target's whole address
    max_retries = 0
    concurrency = _CONNECTIONS
    plan = Plan(Path(os.environ["TITLESHOT_LOAD"]))
    network_timeout = connection_timeout = plan.timeout

    def on_start(self) -> None:
        """Begin counting."""
        agent = self.client.client
        # A cookie would pin all requests to one version; every status is an answer with a body to read.
        agent.cookiejar = None
        agent.valid_response_codes = frozenset(range(100, 600))
        agent.redirect_response_codes = frozenset()
        self.tallies = {name: Tally() for name in self.plan.targets}
        self.lateness = array("d")
        self.failures: list[dict[str, Any]] = []
        self.in_flight: set[gevent.Greenlet] = set()
        self.began = self.ending = self.written = False
        self.finishing = RLock()
        self.started = time.time()
        self.clock = time.perf_counter()
        self.cpu = time.process_time()
        gc.freeze()  # what was imported never goes: keep the collector from walking over it
        self.environment.events.quitting.add_listener(self.finish)
        gevent.spawn(self.report_progress)

    @task  # type: ignore[untyped-decorator]
    def load(self) -> None:
        """Send every request at its time, wait for the last answers, and end the run: once."""
        if self.began:  # Locust calls a task again and again, after an exception too
            raise StopUser
        self.began = True
        try:
            self.keep_schedule()
            self.finish()
        finally:
            self.leave()

    def begin(self) -> float:
        """The moment from which the schedule's times count, on the clock of `time.perf_counter`."""
        return time.perf_counter()

    def leave(self) -> None:
        """The user's work is over: end the process. Not from here: it ends this very greenlet."""
        gevent.spawn(self.environment.runner.quit)

    def about(self) -> dict[str, Any]:
        """What the result says besides."""
        return {}

    def keep_schedule(self) -> None:
        """Start every request at its time, whatever became of those before it."""
        self.origin = origin = self.begin()
        for at, name, payload in self.plan.arrivals():
            intended = origin + at
            # Even when late: without a pause the answers could not be read.
            gevent.sleep(max(intended - time.perf_counter(), 0))
            if self.ending:
                return
            self.lateness.append(time.perf_counter() - intended)
            self.tallies[name].sent += 1
            request = gevent.spawn(self.send, name, payload, intended)
            self.in_flight.add(request)
            request.rawlink(self.in_flight.discard)
        # The run lasts as long as was planned, even if the last arrival lies before its end.
        gevent.sleep(max(origin + self.plan.seconds - time.perf_counter(), 0))

    def send(self, name: str, payload: bytes, intended: float) -> None:
        """One request; it is counted whatever happens."""
        status, body, version = 0, b"", ""
        try:
            with self.client.post(
                self.plan.targets[name],
                data=payload,
                headers=self.plan.headers,
                name=name,
                catch_response=True,
            ) as response:
                status, body = response.status_code, response.content or b""
                said = response.headers or {}
                version = str(said.get(self.plan.version_header) or said.get(SERVERS_HEADER) or "")
                reason = self.judge(response, time.perf_counter() - intended)
                response.failure(reason) if reason else response.success()
        except gevent.GreenletExit:
            reason = "timeout"
        except Exception as error:  # noqa: BLE001 - nothing that happens may lose a request
            reason = _reason(error)
        tally = self.tallies[name]
        tally.latencies.append(math.inf if reason else time.perf_counter() - intended)
        tally.at.append(intended - self.origin)
        if version:
            tally.versions[version] += 1
        if reason:
            tally.reasons[reason] += 1
            if len(self.failures) < MAX_FAILURES:
                first = body[:500].decode(errors="replace")
                failure = {
                    "time": time.time(),
                    "target": name,
                    "reason": reason,
                    "status": status,
                    "body": first,
                }
                self.failures.append(failure)

    def judge(self, response: Any, seconds: float) -> str:
        """Why an answer counts as a failure; empty where it does not."""
        error = response.request_meta["exception"]
        if error is not None:
            return _reason(error)
        if not 200 <= response.status_code < 300:
            return f"HTTP {response.status_code}"
        return "timeout" if seconds > self.plan.timeout else ""

    def finish(self, **_: object) -> None:
        """Wait for what is in flight and write the result: at the end, and when Locust is told to stop.

        Both may happen at once. Whoever comes second waits, since Locust exits when this returns.
        """
        self.ending = True
        with self.finishing:
            if not self.written:
                stopped = time.perf_counter()
                gevent.joinall(list(self.in_flight), timeout=self.plan.timeout + 1)
                gevent.killall(list(self.in_flight))
                self.write_result(stopped)
                self.write_progress()
                self.written = True

    def write_result(self, stopped: float) -> None:
        """Everything that `loadtests.run` reads; no request was sent after `stopped`."""
        elapsed = time.perf_counter() - self.clock
        write(
            self.plan.result,
            {
                "started": self.started,
                "seconds": stopped - self.clock,
                "targets": {name: tally.as_json() for name, tally in self.tallies.items()},
                "failures": self.failures,
                "lateness": list(self.lateness),
                "cpu": (time.process_time() - self.cpu) / elapsed,
                **self.about(),
            },
        )

    def report_progress(self) -> None:
        """Keep the progress file no older than about a second."""
        while not self.ending:
            self.write_progress()
            gevent.sleep(1)

    def write_progress(self) -> None:
        """Counts over all targets, for another process to show."""
        tallies = self.tallies.values()
        done = sum(len(tally.latencies) for tally in tallies)
        failed = sum(tally.reasons.total() for tally in tallies)
        counts = {
            "sent": sum(tally.sent for tally in tallies),
            "ok": done - failed,
            "failed": failed,
            "seconds": time.perf_counter() - self.clock,
        }
        with contextlib.suppress(OSError):  # progress is worth less than the run
            write(self.plan.progress, counts)


def _reason(error: BaseException) -> str:
    """A short name for a transport failure; the same one for every request it happens to."""
    cause = error
    while isinstance(inner := getattr(cause, "original", None), BaseException):
        cause = inner
    if isinstance(cause, (TimeoutError, gevent.Timeout)):
        return "timeout"
    return f"{type(cause).__name__}: {cause}"[:120]


def write(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all: readers never see half a file."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(data))
    beside.replace(path)

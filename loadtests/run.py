"""Run Locust in a process of its own, and tell a failing server from a failing generator.

Locust is never imported here: it patches the interpreter, and Prefect hangs beside it. Whatever happens
to the *requests* is a result, even when all of them fail; whatever happens to the *generator* is a
`LoadError`, since then nothing was learned about the server.
"""

import contextlib
import ipaddress
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

MAX_REQUESTS = 2_000_000
_START = 60.0  # how long Locust may take to start: 2 s when nothing else runs
_GRACE = 30.0  # and how long beyond its plan it may take to end
_LOOK = 1.0  # how often a caller may look around while a run goes on
_LOCUSTFILE = Path(__file__).with_name("locustfile.py")


class LoadError(RuntimeError):
    """The generator failed: nothing was learned about the targets."""


class Saturated(LoadError):
    """The generator could not keep up: what it measured is itself. Ask for less."""


@dataclass(frozen=True)
class Profile:
    """What is asked of every target: `rate` requests per second each, for `seconds`.

    `arrivals`: at equal distances; or of a Poisson process with that many requests; or at the `times` of
    `recorded` ones (seconds after the run's start, growing; `rate` is then only their mean).
    `timeout`: seconds within which a request must be answered. The generator was saturated if more than 1 %
    of the requests left later than `max_lateness` (seconds), or if it used more than `max_cpu` of a core.
    """

    rate: float
    seconds: float
    arrivals: Literal["constant", "poisson", "recorded"] = "constant"
    times: tuple[float, ...] = ()
    timeout: float = 10.0
    seed: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    max_lateness: float = 0.1
    max_cpu: float = math.inf

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.seconds > 0 and self.timeout > 0):
            raise ValueError("rate, seconds and timeout of a load must be positive")
        if (self.arrivals == "recorded") != bool(self.times):
            raise ValueError("recorded arrivals have `times`, and others have none")
        if self.times and not (self.times[0] >= 0 and self.times[-1] < self.seconds):
            raise ValueError(f"recorded times lie between 0 and the run's {self.seconds:g} s")
        if any(later < earlier for earlier, later in itertools.pairwise(self.times)):
            raise ValueError("recorded times grow: sort them, with their requests")
        if self.planned < 1:
            raise ValueError(f"{self.rate:g}/s for {self.seconds:g} s is not one request: ask for more")
        if self.planned > MAX_REQUESTS:
            raise ValueError(f"{self.planned:,} requests are more than {MAX_REQUESTS:,}: ask for fewer")

    @property
    def planned(self) -> int:
        """How many requests each target gets."""
        return len(self.times) or round(self.rate * self.seconds)


@dataclass(frozen=True)
class Failure:
    """One failed request: when (Unix seconds), of which target, why, and the answer's first characters."""

    time: float
    target: str
    reason: str
    status: int
    body: str


@dataclass(frozen=True)
class Target:
    """What became of the requests to one target.

    `latencies` are seconds from the intended start to the finish, in the order of finishing (of a run with several
    workers: in that of the intended starts); a request that failed or was not answered in time is +inf. `at`, as
    long, has each one's intended start in seconds after the run's. `reasons` counts failures, `versions` the answers
    by their version header.
    """

    sent: int
    latencies: NDArray[np.float64]
    at: NDArray[np.float64]
    reasons: Mapping[str, int]
    versions: Mapping[str, int]

    @property
    def failed(self) -> int:
        """How many requests failed or were not answered in time."""
        return int(np.isinf(self.latencies).sum())


@dataclass(frozen=True)
class Result:
    """One run. `lateness` is how late (seconds) each request left, in their order; `cpu` the share of one core
    that the generator used; `failures` the first 200.
    """

    started: float
    seconds: float
    targets: Mapping[str, Target]
    failures: tuple[Failure, ...]
    lateness: NDArray[np.float64]
    cpu: float

    @property
    def sent(self) -> int:
        """Requests to all targets."""
        return sum(target.sent for target in self.targets.values())

    @property
    def failed(self) -> int:
        """Failed requests to all targets."""
        return sum(target.failed for target in self.targets.values())

    @property
    def late(self) -> float:
        """The generator's health: 99 % of this run's requests left no later than this (seconds)."""
        return float(np.quantile(self.lateness, 0.99, method="inverted_cdf")) if self.lateness.size else 0.0


class LiveTraffic:
    """Traffic that goes on in another process until it is stopped, or its time is over.

    A context manager: leaving it ends the process whatever happened.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, profile: Profile) -> None:
        self.process, self._folder, self._profile = process, folder, profile
        self._result: Result | None = None

    @property
    def progress_file(self) -> Path:
        """JSON `{sent, ok, failed, seconds}`, renewed about once a second."""
        return self._folder / "progress.json"

    def progress(self) -> dict[str, float]:
        """The latest counts; zeros before the first. Raises `LoadError` when the generator died."""
        if self.process.poll() not in (None, 0) and not (self._folder / "result.json").exists():
            raise LoadError(_death(self.process.returncode, self._folder))
        try:
            counts: dict[str, float] = json.loads(self.progress_file.read_text())
        except FileNotFoundError:
            return {"sent": 0, "ok": 0, "failed": 0, "seconds": 0.0}
        return counts

    def stop(self, timeout: float = _GRACE) -> Result:
        """Send no more, wait for what is in flight, and return everything; again: the same result.

        Raises `LoadError` when the generator died, or does not end within `timeout` beyond the requests' own.
        """
        if self._result is None:
            # A signal before the plan is begun would leave nothing to report.
            _wait_begun(self.process, self._folder)
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                self.process.wait(self._profile.timeout + timeout)
            except subprocess.TimeoutExpired:
                raise LoadError("Locust did not stop when told to, and was killed") from None
            finally:
                kill(self.process)
            self._result = _read(self.process.returncode, self._folder)
        return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kill(self.process)


def run(
    profile: Profile,
    targets: Mapping[str, str],
    payloads: Path,
    *,
    hosts: Collection[str] = (),
    folder: Path | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Result:
    """Put every target (name -> URL to POST to) under `profile`, all of them side by side.

    `payloads` has one JSON body a line; every target gets the same ones in the same order. `folder` keeps the
    plan, Locust's log and the raw result (default: a temporary one). Takes `profile.seconds`, plus
    about 3 s for the start and up to `profile.timeout` for the last answers. `meanwhile` is called about once
    a second; what it raises ends the run at once, and is raised here. `hosts` are those that may be loaded
    ("name:port", or "name"); without them, this machine's own.

    Raises ValueError for what cannot be asked: no targets, one that is elsewhere, no payloads.
    Raises `LoadError` when the generator failed: died, ended early or sent less than planned; `Saturated` when
    it was late or too busy.
    """
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="titleshot-load-")))
        process = _launch(profile, targets, payloads, place, hosts=hosts)
        stack.callback(kill, process)
        until = time.monotonic() + _START + profile.seconds + profile.timeout + _GRACE
        while not _ended(process, _LOOK):
            if time.monotonic() > until:
                raise LoadError("Locust did not end in time, and was killed")
            meanwhile()
        result = _read(process.returncode, place)
    require_sound(result, profile)
    return result


def start(
    profile: Profile, target: str, payloads: Path, folder: Path, *, version_header: str = "x-model-version"
) -> LiveTraffic:
    """Begin live traffic on `target` (a URL to POST to), cycling through `payloads`, until `stop()`.

    Ends by itself after `profile.seconds`. `folder` holds the progress file, the log and the result.
    Raises ValueError as `run` does.
    """
    process = _launch(profile, {"live": target}, payloads, folder, version_header=version_header)
    return LiveTraffic(process, folder, profile)


def read_result(path: Path) -> Result:
    """A result from its file (`result.json` in the run's folder)."""
    data = json.loads(path.read_text())
    return Result(
        started=data["started"],
        seconds=data["seconds"],
        targets={
            name: Target(
                sent=target["sent"],
                latencies=np.array(
                    [math.inf if seconds is None else seconds for seconds in target["latencies"]],
                    dtype=np.float64,
                ),
                at=np.array(target["at"], dtype=np.float64),
                reasons=target["reasons"],
                versions=target["versions"],
            )
            for name, target in data["targets"].items()
        },
        failures=tuple(Failure(**failure) for failure in data["failures"]),
        lateness=np.array(data["lateness"], dtype=np.float64),
        cpu=data["cpu"],
    )


def plan_of(profile: Profile, targets: Mapping[str, str]) -> dict[str, Any]:
    """What Locust is told (`loadtests.plan`), but for the files: JSON-able."""
    return {
        "targets": dict(targets),
        "rate": profile.rate,
        "seconds": profile.seconds,
        "arrivals": profile.arrivals,
        "times": profile.times,
        "timeout": profile.timeout,
        "seed": profile.seed,
        "headers": dict(profile.headers),
        "version_header": "x-model-version",
    }


def locust(plan: Path, locustfile: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a Locust process that works by `plan`."""
    # Locust takes options from LOCUST_* as well: none of the caller's may change the run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment |= {
        "TITLESHOT_LOAD": str(plan.resolve()),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    # No --run-time: the user ends the run itself, and `require_sound` looks at the clock.
    command = [sys.executable, "-m", "locust", "--locustfile", str(locustfile), "--headless", *options]
    return [*command, "--only-summary", "--loglevel", "WARNING", "--exit-code-on-error", "0"], environment


def _launch(
    profile: Profile,
    targets: Mapping[str, str],
    payloads: Path,
    folder: Path,
    *,
    hosts: Collection[str] = (),
    version_header: str = "x-model-version",
) -> "subprocess.Popen[bytes]":
    if not targets:
        raise ValueError("a load test needs at least one target")
    for name, url in targets.items():
        require_allowed(name, url, hosts)
    if not payloads.is_file() or not payloads.read_bytes().strip():
        raise ValueError(f"there are no payloads in {payloads}: one JSON request body a line is needed")
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.json" for name in ("plan", "result", "progress")}
    for file in files.values():
        file.unlink(missing_ok=True)  # what an earlier run left here is not this run's result
    plan = plan_of(profile, targets) | {
        "payloads": str(payloads.resolve()),
        "result": str(files["result"].resolve()),
        "progress": str(files["progress"].resolve()),
        "version_header": version_header,
    }
    files["plan"].write_text(json.dumps(plan))
    command, environment = locust(files["plan"], _LOCUSTFILE, "--users", "1", "--spawn-rate", "1")
    with (folder / "locust.log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def require_allowed(name: str, url: str, hosts: Collection[str] = ()) -> None:
    """A load test against somebody else's machine is an attack: raise ValueError unless it is one of `hosts`
    ("name:port", or "name"), or, where there are none, this machine.
    """
    parts = urlsplit(url)
    if hosts:
        if parts.scheme not in {"http", "https"} or parts.netloc not in hosts:
            raise ValueError(f"target '{name}' is {url}: only {', '.join(sorted(hosts))} is load-tested")
        return
    host = parts.hostname or ""
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = local or ipaddress.ip_address(host).is_loopback
    if parts.scheme != "http" or not local:
        raise ValueError(f"target '{name}' is {url}: only http on this machine is load-tested")


def require_sound(result: Result, profile: Profile) -> None:
    """Raise `LoadError` unless the generator did what was planned."""
    for name, target in result.targets.items():
        if target.sent < profile.planned:
            raise LoadError(
                f"Locust sent {target.sent:,} of {profile.planned:,} requests to {name} "
                f"in {result.seconds:.1f} of {profile.seconds:g} s"
            )
        if target.latencies.size != target.sent or target.at.size != target.sent:
            raise LoadError(f"Locust lost {target.sent - target.latencies.size:,} requests to {name}")
    if result.seconds < profile.seconds - 0.01:
        raise LoadError(f"Locust ended after {result.seconds:.1f} of {profile.seconds:g} s")
    require_unsaturated(result, profile, "its requests", "it", "lower the rate")


def require_unsaturated(result: Result, profile: Profile, requests: str, who: str, mend: str) -> None:
    """Raise `Saturated`, in these words, unless the generator kept up with its plan."""
    if result.late > profile.max_lateness:
        raise Saturated(
            f"the generator was saturated: 1 % of {requests} left {result.late * 1000:.0f} ms late or more "
            f"(at most {profile.max_lateness * 1000:g} ms; {result.cpu:.0%} of a core): {mend}"
        )
    if result.cpu > profile.max_cpu:
        raise Saturated(
            f"the generator was saturated: {who} used {result.cpu:.0%} of a core "
            f"(at most {profile.max_cpu:.0%}): {mend}"
        )


def _ended(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Wait for the process that long; whether it has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None


def _wait_begun(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Until the generator has begun (its progress file is there), ended, or is out of time."""
    until = time.monotonic() + _START
    while process.poll() is None and not (folder / "progress.json").exists():
        if time.monotonic() > until:
            kill(process)
            raise LoadError("Locust did not start in time, and was killed")
        time.sleep(0.05)


def _read(code: int, folder: Path) -> Result:
    path = folder / "result.json"
    if code != 0 or not path.exists():
        raise LoadError(_death(code, folder))
    return read_result(path)


def _death(code: int, folder: Path) -> str:
    log = (folder / "locust.log").read_text(errors="replace").strip().splitlines()
    last = f": {log[-1].strip()[:300]}" if log else ""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"Locust {how} and left no result{last}"


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process and everything it started, unless it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

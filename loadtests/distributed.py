"""One load by several Locust workers: the plan that they share, their results, and one result made of all of these.

All workers have the same schedule, and each sends every so-many-th round of it: together they send what a single one
would, and both versions take turns in each of them. Every worker keeps each of its requests, and `merge` puts them
together as they are. Nothing is taken from Locust's own statistics, whose master knows times by two digits only.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loadtests.run import (
    Failure,
    LoadError,
    Profile,
    Result,
    Target,
    kill,
    locust,
    plan_of,
    require_allowed,
    require_sound,
    require_unsaturated,
)

MAX_WORKERS = 50
MAX_PART = 400_000
"""Requests of one worker: some 16 bytes each in its log, of which a kubelet keeps 10 MiB."""
MAX_CLOCK_ERROR = 0.1
"""Seconds by which the workers' beginnings may differ; a slice of a load lasts 0.5."""
LISTENS = "titleshot-load listens at "
"""How the master says where: the host and the port follow."""
START = 60.0
"""Seconds that the workers on this machine have to come."""
GRACE = 30.0
"""Seconds beyond the plan that they have to end."""
_RESULT = "titleshot-load"
_LINE = 3000
_PIECE = rf"^{_RESULT} ([0-9]+) ([A-Za-z0-9+/=]+)$"
_END = rf"^{_RESULT} end ([0-9]+) ([0-9a-f]{{64}})$"
_LOOK = 0.5
_WORD = 3.0  # the master may know more of why a worker ended


@dataclass(frozen=True)
class Part:
    """What worker `number` of `workers` measured under the plan with that `digest`.

    `begun` is the moment that the master set for all, on its clock, which the worker knew to `clock_error` seconds.
    `result.started` is that moment on the worker's calendar.
    """

    number: int
    workers: int
    digest: str
    begun: float
    clock_error: float
    result: Result


class Crew(Protocol):
    """Who runs the processes of a load: one master, and as many workers as the plan is for (`loadtests.agent`)."""

    def __call__(
        self, plan: bytes, workers: int, seconds: float, meanwhile: Callable[[], object]
    ) -> tuple[str, Sequence[str]]:
        """Run them until all have ended, and return the logs of the master and of every worker.

        They take at most `seconds` from when the last has started. `meanwhile` is called about once a second; what it
        raises ends them all. Raises where one ended badly; leaves nothing running, whatever happens.
        """


def run(
    profile: Profile,
    targets: Mapping[str, str],
    payloads: Path,
    *,
    workers: int,
    crew: Crew | None = None,
    hosts: Collection[str] = (),
    folder: Path | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Result:
    """As `loadtests.run.run`, with `workers` processes of `crew` (default: of this machine), who send one schedule.

    The result is that of all requests of all workers; its `cpu` is the busiest worker's.

    Raises ValueError for what cannot be asked. Raises `LoadError` where a worker did not come, came late, died, sent
    less than its part or lost a measurement: never is a smaller load taken for the whole. `Saturated` where one was.
    """
    for name, url in targets.items():
        require_allowed(name, url, hosts)
    packed = pack(profile, targets, payloads, workers)
    seconds = profile.seconds + profile.timeout + GRACE
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="titleshot-load-")))
        master, logs = (crew or Processes(place))(packed, workers, seconds, meanwhile)
    account = json.loads(unframe(master, "the master"))
    if "error" in account:
        raise LoadError(account["error"])
    parts = [unpack_part(unframe(log, f"worker {number}")) for number, log in enumerate(logs)]
    return merge(parts, profile, list(targets), hashlib.sha256(packed).hexdigest())


def share(rounds: int, number: int, workers: int) -> int:
    """How many of the schedule's rounds worker `number` (from 0) of `workers` sends."""
    return len(range(number, rounds, workers))


def pack(profile: Profile, targets: Mapping[str, str], payloads: Path, workers: int) -> bytes:
    """The plan and its requests, as every process of the run gets them. Raises ValueError for what cannot be asked."""
    if not targets:
        raise ValueError("a load test needs at least one target")
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"{workers} workers: from 1 to {MAX_WORKERS} are possible")
    if workers > profile.planned:
        raise ValueError(f"{profile.planned} requests are too few for {workers} workers: ask for fewer workers")
    if (most := share(profile.planned, 0, workers) * len(targets)) > MAX_PART:
        raise ValueError(f"a worker keeps {MAX_PART:,} requests, and has {most:,}: more workers are needed")
    bodies = payloads.read_bytes() if payloads.is_file() else b""
    if not bodies.strip():
        raise ValueError(f"there are no payloads in {payloads}: one JSON request body a line is needed")
    plan = plan_of(profile, targets) | {"parts": workers}
    return zlib.compress(json.dumps(plan, sort_keys=True).encode() + b"\n" + bodies, 9)


def unpack(packed: bytes, digest: str) -> tuple[dict[str, Any], bytes]:
    """The plan and its requests, one a line. Raises `LoadError` unless they are the ones of that digest."""
    if hashlib.sha256(packed).hexdigest() != digest:
        raise LoadError("the plan is not the one that was sent: it is incomplete, or another one")
    plan, _, bodies = zlib.decompress(packed).partition(b"\n")
    return json.loads(plan), bodies


def nearest(exchanges: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """What is added to our clock to have the other's, and how wrong that is at most, in seconds.

    From `(asked, theirs, answered)`: our clock, theirs when they answered, and ours then. The quickest answer decides.
    """
    error, offset = min(
        ((answered - asked) / 2, theirs - (asked + answered) / 2) for asked, theirs, answered in exchanges
    )
    return offset, error


def pack_part(part: Part) -> bytes:
    """A worker's measurements, small and without loss: a kind's first bytes stand together, then its second, so that
    they compress.
    """
    result = part.result
    arrays = [result.lateness]
    for target in result.targets.values():
        arrays += [target.latencies, target.at]
    head = {
        "number": part.number,
        "workers": part.workers,
        "digest": part.digest,
        "begun": part.begun,
        "clock_error": part.clock_error,
        "started": result.started,
        "seconds": result.seconds,
        "cpu": result.cpu,
        "failures": [vars(failure) for failure in result.failures],
        "targets": {
            name: {"sent": target.sent, "reasons": dict(target.reasons), "versions": dict(target.versions)}
            for name, target in result.targets.items()
        },
        "sizes": [array.size for array in arrays],
    }
    planes = [array.astype("<f8").view(np.uint8).reshape(-1, 8).T.tobytes() for array in arrays]
    return zlib.compress(json.dumps(head).encode() + b"\n" + b"".join(planes), 9)


def unpack_part(packed: bytes) -> Part:
    """The same measurements, bit by bit. Raises `LoadError` where they are incomplete."""
    line, _, planes = zlib.decompress(packed).partition(b"\n")
    head = json.loads(line)
    sizes: list[int] = head["sizes"]
    if len(planes) != 8 * sum(sizes):
        raise LoadError(f"worker {head['number']} lost some of its measurements")
    ends = np.cumsum([8 * size for size in sizes])[:-1]
    pieces = np.split(np.frombuffer(planes, np.uint8), ends)
    arrays = [np.ascontiguousarray(piece.reshape(8, -1).T).view("<f8").reshape(-1) for piece in pieces]
    lateness, *measured = [array.astype(np.float64) for array in arrays]
    result = Result(
        started=head["started"],
        seconds=head["seconds"],
        targets={
            name: Target(latencies=measured[2 * place], at=measured[2 * place + 1], **target)
            for place, (name, target) in enumerate(head["targets"].items())
        },
        failures=tuple(Failure(**failure) for failure in head["failures"]),
        lateness=lateness,
        cpu=head["cpu"],
    )
    return Part(head["number"], head["workers"], head["digest"], head["begun"], head["clock_error"], result)


def frames(data: bytes) -> Iterator[str]:
    """Data as lines of a log: numbered, and with a checksum at the end."""
    text = base64.b64encode(data).decode()
    pieces = [text[start : start + _LINE] for start in range(0, len(text), _LINE)]
    for number, piece in enumerate(pieces):
        yield f"{_RESULT} {number} {piece}"
    yield f"{_RESULT} end {len(pieces)} {hashlib.sha256(data).hexdigest()}"


def unframe(log: str, whose: str) -> bytes:
    """The data in a log, whatever else is in it. Raises `LoadError` where any of it is missing or changed."""
    pieces = {int(number): text for number, text in re.findall(_PIECE, log, re.MULTILINE)}
    ends = re.findall(_END, log, re.MULTILINE)
    if len(ends) != 1:
        raise LoadError(f"the log of {whose} holds no result{_last(log)}")
    count, checksum = int(ends[0][0]), ends[0][1]
    if len(pieces) != count:
        raise LoadError(f"the log of {whose} holds {len(pieces)} of its result's {count} lines: was it rotated?")
    with contextlib.suppress(binascii.Error, KeyError):
        data = base64.b64decode("".join(pieces[number] for number in range(count)), validate=True)
        if hashlib.sha256(data).hexdigest() == checksum:
            return data
    raise LoadError(f"the result in the log of {whose} is not what was written there")


def merge(parts: Sequence[Part], profile: Profile, names: Sequence[str], digest: str) -> Result:
    """One result of the parts of all workers: that of one worker who had sent everything.

    Its times count from the common beginning; its `seconds` and `cpu` are the largest of all parts. `names` are the
    targets', in the plan's order. Raises `LoadError` unless every part is there once, is of this plan and is whole, and
    all of them began together; `Saturated` where a worker could not keep up.
    """
    workers = len(parts)
    ordered = sorted(parts, key=lambda part: part.number)
    if [part.number for part in ordered] != list(range(workers)) or {part.workers for part in parts} != {workers}:
        found = ", ".join(f"{part.number} of {part.workers}" for part in ordered)
        raise LoadError(f"the results are not those of {workers} workers: there are {found}")
    if {part.digest for part in parts} != {digest} or len({part.begun for part in parts}) != 1:
        raise LoadError("the workers' results are not of one run")
    for part in ordered:
        _require_whole(part, profile, names)
    begun = ordered[0].result.started
    failures = [
        Failure(
            failure.time - part.result.started + begun, failure.target, failure.reason, failure.status, failure.body
        )
        for part in ordered
        for failure in part.result.failures
    ]
    # Worker i sent rounds i, i + N, i + 2N ...: so their places in the whole are known.
    lateness = np.empty((profile.planned, len(names)))
    for part in ordered:
        lateness[part.number :: workers] = part.result.lateness.reshape(-1, len(names))
    whole = Result(
        started=begun,
        seconds=max(part.result.seconds for part in parts),
        targets={name: _together([part.result.targets[name] for part in ordered]) for name in names},
        failures=tuple(sorted(failures, key=lambda failure: failure.time)[:200]),
        lateness=lateness.reshape(-1),
        cpu=max(part.result.cpu for part in parts),
    )
    require_sound(whole, profile)
    return whole


def _together(targets: Sequence[Target]) -> Target:
    at = np.concatenate([target.at for target in targets])
    order = np.argsort(at, kind="stable")
    latencies: NDArray[np.float64] = np.concatenate([target.latencies for target in targets])[order]
    return Target(
        sent=sum(target.sent for target in targets),
        latencies=latencies,
        at=at[order],
        reasons=dict(sum((Counter(target.reasons) for target in targets), Counter())),
        versions=dict(sum((Counter(target.versions) for target in targets), Counter())),
    )


def _require_whole(part: Part, profile: Profile, names: Sequence[str]) -> None:
    """Raise `LoadError` unless the worker did all of its part at the time that was set, and could keep up."""
    who = f"worker {part.number} of {part.workers}"
    planned, result = share(profile.planned, part.number, part.workers), part.result
    if part.clock_error > MAX_CLOCK_ERROR:
        raise LoadError(
            f"{who} knows the master's clock to {part.clock_error * 1000:.0f} ms only (at most "
            f"{MAX_CLOCK_ERROR * 1000:g} ms): the network or a machine is too slow for one load by all"
        )
    if set(result.targets) != set(names):
        raise LoadError(f"{who} loaded {', '.join(result.targets)} instead of {', '.join(names)}")
    for name, target in result.targets.items():
        if target.sent != planned or target.latencies.size != planned or target.at.size != planned:
            raise LoadError(f"{who} sent {target.sent:,} of its {planned:,} requests to {name}")
    if result.lateness.size != planned * len(names):
        raise LoadError(f"{who} lost measurements of when its requests left")
    if result.seconds < profile.seconds - 0.01:
        raise LoadError(f"{who} ended after {result.seconds:.1f} of {profile.seconds:g} s")
    require_unsaturated(result, profile, f"the requests of {who}", who, "give it more `workers`")


class Processes:
    """A crew of processes on this machine. `folder` keeps the plan, and everyone's log and files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(
        self, plan: bytes, workers: int, seconds: float, meanwhile: Callable[[], object]
    ) -> tuple[str, list[str]]:
        """As `Crew` says. Raises `LoadError` for whoever ended badly, or did not end."""
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.0").write_bytes(plan)
        common = ["--plan", str(folder), "--digest", hashlib.sha256(plan).hexdigest(), "--patience", f"{START:g}"]
        until = time.monotonic() + START
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            running["master"] = self._start("master", [*common, "--host", "127.0.0.1", "--port", "0"])
            while not (address := _listens(self._log("master"))):
                self._require_well(running)
                if time.monotonic() > until:
                    raise LoadError("Locust's master did not start in time, and was killed")
                time.sleep(0.05)
            host, port = address
            for number in range(workers):
                options = [*common, "--host", host, "--port", port, "--part", str(number)]
                running[f"worker {number}"] = self._start(f"worker-{number}", options)
            until += seconds + GRACE
            looked = -math.inf
            while any(process.poll() is None for process in running.values()):
                self._require_well(running)
                if time.monotonic() > until:
                    raise LoadError("Locust's workers did not end in time, and were killed")
                if time.monotonic() - looked >= 1:
                    looked = time.monotonic()
                    meanwhile()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running["master"].wait(_LOOK)
                    time.sleep(0.05)  # the master has ended: the others do so at once
            self._require_well(running)
        finally:
            for process in running.values():
                kill(process)
        return self._log("master"), [self._log(f"worker-{number}") for number in range(workers)]

    def _start(self, name: str, options: list[str]) -> "subprocess.Popen[bytes]":
        place = self._folder / name
        place.mkdir(exist_ok=True)
        # The same environment as Locust's own, which finds our modules in it.
        _, environment = locust(place, place)
        role = name.partition("-")[0]
        command = [sys.executable, "-m", "loadtests.agent", role, *options, "--folder", str(place)]
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _require_well(self, running: "Mapping[str, subprocess.Popen[bytes]]") -> None:
        """Raise `LoadError` where one has ended badly: with the master's word for it, where it has one."""
        for name, process in running.items():
            if process.poll():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running["master"].wait(_WORD)
                account = None
                with contextlib.suppress(LoadError):
                    account = json.loads(unframe(self._log("master"), "the master")).get("error")
                raise LoadError(account or died(name, process.returncode, self._log(name.replace(" ", "-"))))


def died(who: str, code: int, log: str) -> str:
    """A sentence about a process of Locust's that ended badly."""
    return f"Locust's {who} ended with exit code {code}{_last(log)}"


def _listens(log: str) -> tuple[str, str] | None:
    for line in log.splitlines(keepends=True):
        if line.startswith(LISTENS) and line.endswith("\n"):
            host, _, port = line.removeprefix(LISTENS).strip().rpartition(":")
            return host, port
    return None


def _last(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith(_RESULT)]
    return f": {lines[-1][:300]}" if lines else ""

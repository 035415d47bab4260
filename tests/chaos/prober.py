"""A client that never stops asking, in a process of its own, and the judge of all that it was answered.

    with Prober(gateway, allowed={"1"}) as prober:
        with prober.moving({"1", "2"}, then={"2"}):
            target.route(Traffic(MODEL, "2", fallback="1"), fence)
    prober.result.assert_clean()

It asks at a steady rate, whatever the answers take: on connections that it keeps, on a new one for each
request, and for streams; `flood` adds clients that ask again as soon as they are answered. It does what any sane
client does and no more: a connection that was closed before the request was written is opened anew, nothing is
ever sent twice. Version n of a model made by `tests.chaos.models` answers 1000 x + n, and each request has an x of
its own: so an answer shows who gave it and to which question.

No library does this: load generators check a status at most, and none knows which version may answer when.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

KEPT, FRESH, STREAM, FLOOD = "kept", "fresh", "stream", "flood"
KINDS = (KEPT, FRESH, STREAM, FLOOD)
CONNECTIONS = 8
"""Connections that are kept at least: enough to have some at each worker of each gateway."""
SCALE = 1000
ROOT = Path(__file__).resolve().parents[2]


def formula(x: float, version: str) -> float:
    """What version `version` answers to x."""
    return SCALE * x + int(version)


# --- the judge: in the test's process ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """One request: when it began and ended (seconds of the monotonic clock), who answered, and what was wrong.

    `chosen` is the version that the split meant, where the gateway says so; `value` is the first number answered.
    """

    kind: str
    start: float
    end: float
    status: int
    version: str
    chosen: str
    wrong: str

    @property
    def by_fallback(self) -> bool:
        """Whether another version answered than the one that was chosen."""
        return bool(self.chosen) and self.chosen != self.version


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that went wrong: `at` is seconds since the prober began."""

    record: Record
    at: float
    why: str

    @property
    def kind(self) -> str:
        """The kind of request."""
        return self.record.kind

    def __str__(self) -> str:
        took = self.record.end - self.record.start
        return f"{self.at:8.3f} s {self.kind:<7}{took * 1e3:7.0f} ms  {self.why}"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it. `wanted` are the kinds that had to be asked; `unsaid` says why the prober proves nothing."""

    records: tuple[Record, ...]
    failures: tuple[Failure, ...]
    wanted: frozenset[str]
    unsaid: tuple[str, ...] = ()

    @property
    def counts(self) -> Counter[str]:
        """Requests by kind."""
        return Counter(record.kind for record in self.records)

    @property
    def versions(self) -> Counter[str]:
        """Answers by the version that gave them."""
        return Counter(record.version for record in self.records if not record.wrong)

    @property
    def fell_back(self) -> Counter[tuple[str, str]]:
        """Answers that a fallback gave: (chosen, answered by)."""
        return Counter((one.chosen, one.version) for one in self.records if not one.wrong and one.by_fallback)

    def latency(self, *shares: float, kind: str | None = None) -> list[float]:
        """Percentiles in seconds, of the requests that were answered."""
        took = sorted(one.end - one.start for one in self.records if not one.wrong and kind in {None, one.kind})
        return [took[min(len(took) - 1, int(share * len(took)))] if took else float("nan") for share in shares]

    def __str__(self) -> str:
        asked = ", ".join(f"{self.counts[kind]} {kind}" for kind in KINDS if self.counts[kind])
        p50, p99, worst = self.latency(0.5, 0.99, 1.0)
        by = ", ".join(f"{count} by {version}" for version, count in sorted(self.versions.items()))
        text = f"{asked}: {len(self.failures)} failed; {by}; p50 {p50 * 1e3:.1f}, p99 {p99 * 1e3:.1f}, worst "
        return f"{text}{worst * 1e3:.0f} ms; {self.fell_back.total()} by a fallback"

    def but_for(self, begin: float, end: float, kinds: Collection[str] = KINDS) -> Self:
        """Without the failures of requests that were under way between two moments (of the monotonic clock): the
        process that answered them died then.
        """
        kept = [
            one for one in self.failures if one.kind not in kinds or one.record.start > end or one.record.end < begin
        ]
        return dataclasses.replace(self, failures=tuple(kept))

    def assert_clean(self) -> None:
        """Everything was asked, and nothing went wrong."""
        reasons = Counter(failure.why.partition(":")[0] for failure in self.failures)
        listed = "\n".join(map(str, self.failures[:20]))
        assert not self.failures, f"{self}\n{dict(reasons)}\n{listed}"
        assert not self.unsaid, f"{self}\n{'; '.join(self.unsaid)}"
        missing = sorted(kind for kind in self.wanted if not self.counts[kind])
        assert not missing, f"nothing was asked: {', '.join(missing)}"


class Prober:
    """The prober's process and its judge. Rates are requests per second of each kind, `flood` is a number of
    clients. It ends by itself after `seconds` or `count` requests, and `assert_clean` says so then.

    `grace` is how long a version may still answer requests that began after it was forbidden.
    """

    def __init__(
        self,
        url: str,
        *,
        allowed: Collection[str],
        kept: float = 30,
        fresh: float = 10,
        stream: float = 10,
        flood: int = 0,
        timeout: float = 15.0,
        grace: float = 0.1,
        seconds: float = 900.0,
        count: int = 1_000_000,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._rates = {KEPT: kept, FRESH: fresh, STREAM: stream, FLOOD: flood}
        self._options = {"timeout": timeout, "seconds": seconds, "count": count, **self._rates}
        self._url, self._grace, self._headers = url, grace, dict(headers or {})
        self._told: list[tuple[float, frozenset[str]]] = [(0.0, frozenset(allowed))]
        self._records: list[Record] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._read, self._rest, self._began = 0, b"", 0.0
        self._summary: dict[str, Any] | None = None
        self._judged: Result | None = None

    # --- what may be

    def allow(self, versions: Collection[str]) -> None:
        """From now on only these versions may answer."""
        self._told.append((time.monotonic(), frozenset(versions)))

    @contextlib.contextmanager
    def moving(self, during: Collection[str], then: Collection[str]) -> Iterator[None]:
        """While the block runs any of `during` may answer; afterwards only `then`. Where it raises, `during` stays."""
        self.allow(during)
        yield
        self.allow(then)

    # --- its life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Return once every kind of request was asked, and answered well or not."""
        fd, name = tempfile.mkstemp(prefix="prober.", suffix=".jsonl")
        os.close(fd)
        self._file = Path(name)
        self._began = time.monotonic()
        command = [sys.executable, "-m", "tests.chaos.prober", self._url, name, json.dumps(self._options)]
        command.append(json.dumps(self._headers))
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
        wanted = {kind for kind, rate in self._rates.items() if rate}
        self.wait(lambda records: wanted <= {one.kind for one in records}, "the first answers do not come", 60)

    def stop(self) -> Result:
        """Let the requests in flight end, and judge."""
        process = self._process
        if process is not None and process.stdin is not None and self._judged is None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # it also ends where this process dies
            try:
                process.wait(self._options["timeout"] + 30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._pull()
            self._file.unlink(missing_ok=True)
            self._process = None
            self._judged = self.result
        return self.result

    @property
    def records(self) -> list[Record]:
        """All requests so far that have ended, in that order."""
        self._pull()
        return self._records

    @property
    def failures(self) -> list[Failure]:
        """What has gone wrong so far."""
        return [failure for one in self.records if (failure := self._judge(one)) is not None]

    def wait(self, holds: Callable[[list[Record]], object], else_say: str, timeout: float = 60.0) -> None:
        """Return once `holds(records)`."""
        end = time.monotonic() + timeout
        while not holds(self.records):
            if time.monotonic() > end:
                raise TimeoutError(f"{else_say} (waited {timeout:g} s)")
            time.sleep(0.02)

    def wait_more(self, count: int, version: str | None = None, timeout: float = 60.0) -> None:
        """Return once `count` more requests were asked and answered, by `version` if one is named."""
        start, before = time.monotonic(), len(self.records)

        def enough(records: list[Record]) -> bool:
            later = (one for one in records[before:] if one.start >= start and version in {None, one.version})
            return len(list(itertools.islice(later, count))) == count

        self.wait(enough, f"{count} more answers do not come", timeout)

    @property
    def result(self) -> Result:
        """The judgement; final once the prober has stopped."""
        if self._judged is not None:
            return self._judged
        unsaid = []
        if self._process is None and self._summary is None:
            unsaid.append("the prober died")
        elif self._summary is not None and self._summary["early"]:
            unsaid.append(f"the prober ended before it was told to: {self._summary['early']}")
        wanted = frozenset(kind for kind, rate in self._rates.items() if rate)
        records = tuple(self.records)
        return Result(records, tuple(self.failures), wanted, tuple(unsaid))

    def _pull(self) -> None:
        if self._process is None:
            return
        with self._file.open("rb") as stream:
            stream.seek(self._read)
            data = stream.read()
        self._read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            found = json.loads(line)
            if isinstance(found, dict):
                self._summary = found
            else:
                self._records.append(Record(*found))

    def _judge(self, one: Record) -> Failure | None:
        why = one.wrong
        if not why:
            # What was in force when it began is what was told last before that; it may have changed since.
            first = bisect_right(self._told, one.start - self._grace, key=lambda told: told[0]) - 1
            last = bisect_right(self._told, one.end, key=lambda told: told[0])
            allowed = frozenset().union(*(who for _, who in self._told[max(first, 0) : last]))
            if one.version not in allowed:
                why = f"forbidden version: {one.version} answered, allowed were {sorted(allowed)}"
        return Failure(one, one.start - self._began, why) if why else None


# --- the client: a process of its own ------------------------------------------------------------------------


class Wrong(Exception):
    """An answer that is not what it should be; the message begins with its kind and a colon."""


@dataclass
class Client:
    """Asks, and writes a line for each request that has ended."""

    url: str
    out: Any
    timeout: float
    headers: Mapping[str, str]
    sent: int = 0
    ending: bool = False
    running: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        import aiohttp

        limit = aiohttp.ClientTimeout(total=self.timeout)

        def session(*, close: bool) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(limit=0, force_close=close, keepalive_timeout=None if close else 60)
            return aiohttp.ClientSession(connector=connector, timeout=limit, headers=self.headers, trust_env=False)

        self._fresh = session(close=True)
        # Each holds a connection of its own at least: one pool would use the same one again and again.
        self._sessions = [session(close=False) for _ in range(CONNECTIONS)]
        self._kept = itertools.cycle(self._sessions)
        return self

    async def __aexit__(self, *_: object) -> None:
        for one in (self._fresh, *self._sessions):
            await one.close()

    async def ask(self, kind: str, session: Any = None) -> None:
        """One request, and its line."""
        import aiohttp

        self.sent += 1
        x = float(self.sent)
        session = session or (self._fresh if kind == FRESH else next(self._kept))
        found: dict[str, Any] = {"status": 0, "version": "", "chosen": ""}
        wrong, start = "", time.monotonic()
        try:
            await self._exchange(session, kind, x, found)
        except Wrong as error:
            wrong = str(error)
        except TimeoutError:
            wrong = f"timeout: no whole answer within {self.timeout:g} s, status {found['status']}"
        except aiohttp.ClientConnectorError as error:
            wrong = f"not connected: {error}"
        except aiohttp.ClientPayloadError as error:
            wrong = f"truncated: {error}"
        except (aiohttp.ClientError, OSError) as error:
            wrong = f"{'truncated' if found['status'] else 'reset'}: {type(error).__name__}: {error}"
        record = [kind, start, time.monotonic(), found["status"], found["version"], found["chosen"], wrong]
        self.out.write(json.dumps(record, separators=(",", ":")) + "\n")

    async def _exchange(self, session: Any, kind: str, x: float, found: dict[str, Any]) -> None:
        for _ in range(2):  # the loop looks at its sockets once: a connection closed by now is not taken again
            await asyncio.sleep(0)
        body = json.dumps({"dataframe_split": {"columns": ["x"], "data": [[x]]}})
        headers = {"content-type": "application/json"}
        if kind == STREAM:
            headers["accept"] = "text/event-stream"
        async with session.post(f"{self.url}/invocations", data=body, headers=headers) as answer:
            found["version"] = answer.headers.get("x-model-version", "")
            found["chosen"] = answer.headers.get("x-model-chosen", "")
            found["status"] = answer.status
            content = await answer.read()
        if not 200 <= answer.status < 300:
            raise Wrong(f"status {answer.status}: {content[:200].decode(errors='replace')}")
        if not found["version"].isdigit():
            raise Wrong(f"no version: the answer says {found['version']!r}")
        expected = formula(x, found["version"])
        values = _streamed(content) if kind == STREAM else [json.loads(content)["predictions"][0]]
        if not values or any(value != expected for value in values):
            raise Wrong(f"wrong answer: {values} to {x}, version {found['version']} should say {expected}")

    async def steady(self, kind: str, rate: float) -> None:
        """Ask `rate` times a second, answered or not."""
        begin = time.monotonic()
        for number in itertools.count(1):
            if self.ending:
                return
            self.spawn(self.ask(kind))
            await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))

    async def flood(self) -> None:
        """Ask again as soon as there is an answer, on one connection."""
        while not self.ending:
            await self.ask(FLOOD, self._sessions[0])

    def spawn(self, work: Any) -> None:
        """Run beside the others."""
        task = asyncio.create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)


def _streamed(content: bytes) -> list[float]:
    """The numbers of a stream of events; it must say itself that it is whole."""
    events = [line.removeprefix(b"data:").strip() for line in content.splitlines() if line.startswith(b"data:")]
    if b"event: error" in content:
        raise Wrong(f"error in a stream: {content[-200:].decode(errors='replace')}")
    if not events or events[-1] != b"[DONE]":
        raise Wrong(f"truncated: a stream without its end: {content[-200:].decode(errors='replace')}")
    return [json.loads(event)["y"] for event in events[:-1]]


async def probe(url: str, out: Any, options: Mapping[str, float], headers: Mapping[str, str]) -> None:
    """Ask until standard input ends, or a bound is reached."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), lambda: sys.stdin.buffer.read1(1) or told.set())
    begin, early = time.monotonic(), ""
    async with Client(url, out, options["timeout"], headers) as client:
        asking = [loop.create_task(client.steady(kind, options[kind])) for kind in KINDS[:3] if options[kind]]
        asking += [loop.create_task(client.flood()) for _ in range(int(options[FLOOD]))]
        while not told.is_set() and not early:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(told.wait(), 0.1)
            if time.monotonic() - begin > options["seconds"]:
                early = f"after {options['seconds']:g} s"
            elif client.sent >= options["count"]:
                early = f"after {client.sent} requests"
            elif broken := next((one for one in asking if one.done()), None):
                early = f"an error of its own: {broken.exception()!r}"
        client.ending = True
        await asyncio.wait([*asking, *client.running], timeout=options["timeout"] + 5)
        while client.running:  # what the last ones of `asking` have begun
            await asyncio.wait([*client.running], timeout=options["timeout"] + 5)
    out.write(json.dumps({"early": early}) + "\n")


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "path", "options", "headers"):
        parser.add_argument(name)
    found = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test ends us
    # Line by line: what is written stays written, whatever happens to us.
    with Path(found.path).open("w", buffering=1) as out:
        asyncio.run(probe(found.url, out, json.loads(found.options), json.loads(found.headers)))


if __name__ == "__main__":
    main()

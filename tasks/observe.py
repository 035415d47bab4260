"""Watching traffic until the checks of a gate are decided: polls of the target's counters become blocks of evidence."""

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deployments.target import Served
from tasks.context import Judged
from tasks.progress import say
from validations.ledger import Ledger
from validations.monitor import LEDGER, Monitor
from validations.series import Arm, Block, Head, Series, sparse
from validations.slices import Slice
from validations.verdict import Measurement, Outcome

POLL = 0.5
"""Seconds between two looks at the counters; the gateway flushes them once a second."""
POINTS = 200
"""How many moments of the intervals are kept for the picture."""


@dataclass(frozen=True, slots=True)
class Poll:
    """What came since the poll before."""

    challenger: Served
    champion: Served
    pairs: int = 0
    disagreements: int = 0
    slices: tuple[Slice, ...] = ()


@dataclass(slots=True)
class Observed:
    """What a gate saw: measurements, the ledger after it, a note, and what the record keeps: blocks, slices and the
    course of intervals.
    """

    measured: dict[str, Measurement]
    ledger: Ledger
    note: str
    blocks: list[Block] = field(default_factory=list)
    slices: tuple[Slice, ...] = ()
    trace: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, monitor: Monitor, blocks: list[Block]) -> "Observed":
        """All of `blocks` at once, into a monitor that has not seen them."""
        trace = _Trace(sum(block.seconds for block in blocks))
        for block in blocks:
            monitor.add(block)
            trace.add(monitor.seconds, monitor.look())
        return cls(monitor.look(), monitor.ledger(), "", blocks, (), trace.points)

    def series(self, head: Head) -> Series:
        """The blocks with what was known before them."""
        return Series(head=head, blocks=tuple(self.blocks), slices=self.slices)

    def data(self, earlier: Sequence[Series], head: Head) -> dict[str, Any]:
        """As evidence: the series of this step, those of the same gate before it, and the picture's points."""
        return {
            "series": self.series(head).model_dump(mode="json", exclude_defaults=True),
            "earlier": [part.model_dump(mode="json", exclude_defaults=True) for part in earlier],
            "trace": self.trace,
        }


class Recorder:
    """Gathers polls into blocks of `seconds`, one arm for each process of a version.

    The champion's own requests are also dealt into two parts, poll by poll, by a coin: what is found between them is
    no model's doing.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._coin = random.Random(seconds)  # noqa: S311 - the same for the same gate
        self._begun = time.monotonic()
        self._halves = [Arm(), Arm()]
        self._turn = 0
        self._open()

    def _open(self) -> None:
        self._challenger: dict[str, Arm] = {}
        self._champion: dict[str, Arm] = {}
        self._pairs = self._disagreements = 0

    def add(self, poll: Poll) -> Block | None:
        """Take a poll; a block, if one is whole now."""
        for kept, served in ((self._challenger, poll.challenger), (self._champion, poll.champion)):
            for unit, one in (served.units or {"": served}).items():
                kept[unit] = kept.get(unit, Arm()) + arm(one)
        self._pairs += poll.pairs
        self._disagreements += poll.disagreements
        if poll.champion.requests:
            if self._turn % 2 == 0:
                self._first = self._coin.random() < 0.5
            half = int(self._first) if self._turn % 2 == 0 else int(not self._first)
            self._halves[half] += arm(poll.champion)
            self._turn += 1
        return self.close(whole=True) if time.monotonic() - self._begun >= self._seconds else None

    def close(self, *, whole: bool) -> Block:
        """The block that is open, as it is."""
        block = self.peek(whole=whole)
        if block.control is not None:
            self._halves = [Arm(), Arm()]
        self._begun = time.monotonic()
        self._open()
        return block

    def peek(self, *, whole: bool = False) -> Block:
        """The block that is open, which stays open."""
        control = whole and self._turn % 2 == 0 and all(half.requests for half in self._halves)
        return Block(
            seconds=round(time.monotonic() - self._begun, 3),
            challenger=tuple(one for one in self._challenger.values() if one.requests),
            champion=tuple(one for one in self._champion.values() if one.requests),
            control=(self._halves[0], self._halves[1]) if control else None,
            pairs=self._pairs,
            disagreements=self._disagreements,
            whole=whole,
        )


class Notebook:
    """A step's blocks in a file, line by line as they come: what was observed outlives the process that observed it."""

    def __init__(self, folder: Path, step: str) -> None:
        self._path, self._told = folder / f"{quote(step)}.blocks.jsonl", {"step": step}

    def begin(self, head: Head) -> None:
        """The first line: the step, and what was known before."""
        self._path.write_text(json.dumps({**self._told, "head": json.loads(head.model_dump_json())}) + "\n")

    def keep(self, block: Block) -> None:
        """One line for each block."""
        with self._path.open("a") as file:
            file.write(block.model_dump_json(exclude_defaults=True) + "\n")

    @staticmethod
    def read(folder: Path) -> Iterator[tuple[str, Series]]:
        """(step, series) of each notebook in a promotion's folder, oldest first. A line that was cut off in the
        writing is left out.
        """
        for path in sorted(folder.glob("*.blocks.jsonl"), key=lambda path: path.stat().st_mtime):
            blocks = []
            with contextlib.suppress(ValueError):
                first, *lines = path.read_text().splitlines()
                told = json.loads(first)
                head = Head.model_validate(told["head"])
                for line in lines:
                    with contextlib.suppress(ValueError):
                        blocks.append(Block.model_validate_json(line))
                yield told["step"], Series(head=head, blocks=tuple(blocks))


def arm(served: Served) -> Arm:
    """A version's (or a replica's) counts, without empty buckets."""
    return Arm(
        requests=served.requests,
        errors=served.errors,
        unanswered=served.codes.get("0", 0),
        buckets=sparse(served.latency.counts),
    )


def watch_until(
    poll: Callable[[], Poll],
    begin: Callable[[tuple[float, ...]], Monitor],
    block: float,
    limit: float,
    judged: Judged,
    *,
    dwell: float = 0.0,
    keep: Callable[[Block], None] = lambda _: None,
) -> Observed:
    """Poll until the judge says failed, or passed and `dwell` seconds are over, for `limit` seconds at the most.

    `begin` makes the monitor once the edges of the latency buckets are known: with the first requests. `block` is the
    length of a block in seconds; `keep` is given each one as it comes.
    """
    trace = _Trace(limit)
    started = told = time.monotonic()
    blocks: list[Block] = []
    while not (edges := _edges(news := poll())) and time.monotonic() - started < limit:
        time.sleep(POLL)
    monitor, recorder = begin(edges), Recorder(block)
    while True:
        whole = recorder.add(news)
        if whole is not None:
            monitor.add(whole)
            blocks.append(whole)
            keep(whole)
        partial = recorder.peek()
        measured = monitor.look(partial, news.slices)
        seconds = time.monotonic() - started
        trace.add(seconds, measured)
        outcome = judged(measured)
        passed = outcome is Outcome.PASSED and seconds >= dwell
        if passed or outcome is Outcome.FAILED or seconds >= limit:
            break
        if time.monotonic() - told >= 5:
            told = time.monotonic()
            say(f"  {_progress(measured)}")
        time.sleep(min(POLL, max(0.0, limit - seconds)))
        news = poll()
    last = recorder.close(whole=False)
    monitor.add(last)
    blocks.append(last)
    keep(last)
    note = f"{monitor.requests:,} requests in {seconds:.0f} s, {len(blocks)} blocks of {block:g} s"
    measured, ledger = monitor.look(None, news.slices), monitor.ledger(news.slices)
    return Observed(measured, ledger, note, blocks, news.slices, trace.points)


def _edges(news: Poll) -> tuple[float, ...]:
    return news.challenger.latency.edges or news.champion.latency.edges


def _progress(measured: dict[str, Measurement]) -> str:
    """What is still missing, in words; of several the longest way to go stands last in the policy's order."""
    waiting = [m.note if metric == LEDGER else f"{metric}: {m.note}" for metric, m in measured.items() if m.note]
    return waiting[-1] if waiting else "all that was asked is known; waiting for the time to pass"


class _Trace:
    """The course of every interval, at most `POINTS` moments of it, the last one always there."""

    def __init__(self, limit: float) -> None:
        self.points: list[dict[str, Any]] = []
        self._gap, self._next = limit / POINTS, 0.0

    def add(self, seconds: float, measured: dict[str, Measurement]) -> None:
        point = {"seconds": round(seconds, 2), "measured": {m: _ends(v) for m, v in measured.items()}}
        if self.points and seconds < self._next:
            self.points[-1] = point
            return
        self.points.append(point)
        self._next = seconds + self._gap


def _ends(m: Measurement) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in (m.value, m.low, m.high)]

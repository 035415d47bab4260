"""One worker's part of a load, and the master that begins it for all at once and lets nobody be missing.

A worker asks the master for its time, some times over, and so knows its clock without looking at calendars. Once every
worker is ready, the master sets one moment from which all schedules count. A worker that hears of it too late, ends
early or is lost is the end of the run: it fails as a whole.
"""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import gevent
from gevent.event import AsyncResult, Event
from locust import runners

from loadtests.distributed import GRACE, LISTENS, nearest
from loadtests.plan import Plan
from loadtests.users.scoring import Scoring, write

EXCHANGES = 15
"""How often a worker asks for the master's time: the quickest answer counts."""
MARGIN = 1.0
"""Seconds from the last worker's being ready to the beginning."""
CLOCK, READY, BEGIN, DONE, FAILED = (f"titleshot-{word}" for word in ("clock", "ready", "begin", "done", "failed"))


class Part(Scoring):
    """The one user of a worker. It does its part of the schedule once, in spite of whatever Locust does with users."""

    taken: ClassVar = False
    complete = False
    begun = clock_error = math.nan

    def on_start(self) -> None:
        """Listen to the master, and begin counting."""
        self.runner = self.environment.runner
        self.answer: AsyncResult[tuple[float, float]] = AsyncResult()
        self.beginning: AsyncResult[float] = AsyncResult()
        self.runner.register_message(CLOCK, lambda msg, **_: self.answer.set((msg.data["asked"], msg.data["here"])))
        self.runner.register_message(BEGIN, lambda msg, **_: self.beginning.set(msg.data["at"]))
        super().on_start()

    def begin(self) -> float:
        """The moment that the master sets for all, on our clock."""
        try:
            if Part.taken:
                self.fail("has been given a second user: some other worker was lost")
            Part.taken = True
            offset, self.clock_error = self.meet()
            self.runner.send_message(READY, {"part": self.plan.part, "digest": self.plan.digest})
            self.begun = self.beginning.get(timeout=self.plan.patience)
        except gevent.Timeout:
            self.fail("was ready, and heard nothing more from the master")
        origin = self.begun - offset
        if (late := time.perf_counter() - origin) >= 0:
            self.fail(f"heard {late:.1f} s too late when to begin")
        gevent.sleep(max(origin - time.perf_counter() - 0.01, 0))
        self.started = time.time() + origin - time.perf_counter()
        self.clock, self.cpu = origin, time.process_time()
        return origin

    def meet(self) -> tuple[float, float]:
        """The master's clock less ours, and how wrong that is at most (seconds)."""
        exchanges = []
        for _ in range(EXCHANGES):
            self.answer = AsyncResult()
            asked = time.perf_counter()
            self.runner.send_message(CLOCK, {"asked": asked})
            echo, here = self.answer.get(timeout=self.plan.patience)
            if echo == asked:
                exchanges.append((asked, here, time.perf_counter()))
            gevent.sleep(0.01)
        return nearest(exchanges)

    def keep_schedule(self) -> None:
        """Our rounds of the schedule."""
        super().keep_schedule()
        self.complete = not self.ending

    def finish(self, **_: object) -> None:
        """Write the result, but no half of one: Locust may be told to stop before the end."""
        if self.complete:
            super().finish()
        else:
            self.ending = True
            self.environment.process_exit_code = 4

    def leave(self) -> None:
        """Say so, and wait for the master to end the run: who leaves before the others is missed."""
        if self.written:
            self.runner.send_message(DONE, {"part": self.plan.part})
        elif not self.ending:
            gevent.spawn(self.runner.quit)

    def fail(self, why: str) -> NoReturn:
        """Tell the master and end this process."""
        sys.stderr.write(f"this worker {why}\n")
        self.environment.process_exit_code = 4
        self.runner.send_message(FAILED, {"part": self.plan.part, "why": why})
        gevent.sleep(1)  # for the word to leave
        raise RuntimeError(why)

    def about(self) -> dict[str, Any]:
        """What merging needs to know."""
        return {"workers": self.plan.parts, "begun": self.begun, "clock_error": self.clock_error}


class Master:
    """Waits for all workers, begins, and ends well only when each of them is done."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.runner = environment, environment.runner
        self.plan = Plan(Path(os.environ["TITLESHOT_LOAD"]))
        self.ready: dict[int, str] = {}  # a part, and the worker that has it
        self.done: set[int] = set()
        self.wrong = ""
        self.change = Event()
        self.runner.register_message(CLOCK, self.tell_time)
        self.runner.register_message(READY, self.note_ready)
        self.runner.register_message(DONE, self.note_done)
        self.runner.register_message(FAILED, self.note_failed)
        server = self.runner.server
        sys.stdout.write(f"{LISTENS}{self.runner.master_bind_host}:{server.port}\n")
        sys.stdout.flush()

    def tell_time(self, msg: Any, **_: object) -> None:
        """A worker asks for our clock."""
        answer = {"asked": msg.data["asked"], "here": time.perf_counter()}
        self.runner.send_message(CLOCK, answer, client_id=msg.node_id)

    def note_ready(self, msg: Any, **_: object) -> None:
        """A worker is ready to begin."""
        part = msg.data["part"]
        if msg.data["digest"] != self.plan.digest:
            self.wrong = f"worker {part} has another plan"
        elif part in self.ready or not 0 <= part < self.plan.parts:
            self.wrong = f"there is a worker {part} too many"
        self.ready[part] = msg.node_id
        self.change.set()

    def note_done(self, msg: Any, **_: object) -> None:
        """A worker has written its result."""
        self.done.add(msg.data["part"])
        self.change.set()

    def note_failed(self, msg: Any, **_: object) -> None:
        """A worker cannot go on."""
        self.wrong = f"worker {msg.data['part']} {msg.data['why']}"
        self.change.set()

    def watch(self) -> None:
        """The whole run."""
        plan, patience = self.plan, time.perf_counter() + self.plan.patience
        while len(self.ready) < plan.parts and not self.wrong:
            if time.perf_counter() > patience:
                came, ready = len(self.runner.clients), sorted(self.ready)
                self.wrong = f"{came} of {plan.parts} workers came within {plan.patience:g} s"
                self.wrong += f", and ready were: {', '.join(map(str, ready)) or 'none'}"
            self.pause()
        until = time.perf_counter() + MARGIN + plan.seconds + plan.timeout + GRACE
        begun = time.perf_counter() + MARGIN
        if not self.wrong:
            self.runner.send_message(BEGIN, {"at": begun})
        while len(self.done) < plan.parts and not self.wrong:
            lost = sorted(part for part, client in self.ready.items() if part not in self.done and self.is_lost(client))
            if lost:
                self.wrong = f"worker {lost[0]} of {plan.parts} was lost in the middle of the run"
            elif time.perf_counter() > until:
                self.wrong = f"{len(self.done)} of {plan.parts} workers ended in time"
            self.pause()
        write(plan.result, {"error": self.wrong} if self.wrong else {"begun": begun, "workers": plan.parts})
        self.environment.process_exit_code = 3 if self.wrong else 0
        self.runner.quit()
        # Where it still waits for workers Locust does not see that it has been ended: this it sees.
        sys.exit(self.environment.process_exit_code)

    def is_lost(self, client: str) -> bool:
        """Whether Locust has not heard of the worker for some time, or heard it go."""
        node = self.runner.clients.get(client)
        return node is None or node.state == runners.STATE_MISSING

    def pause(self) -> None:
        """Until something changes; half a second at most."""
        self.change.wait(0.5)
        self.change.clear()

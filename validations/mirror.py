"""Whether live requests may be copied: judged second by second from what the champion's callers get meanwhile.

Pure. A second is bad when more of its requests failed, or took longer than is allowed, than the share that did before
explains. Each bad second speaks against the copies, one with failures twice, and each good one for them. Where five
more speak against than for, the copies are switched off for a moment:

- live requests stay as bad without them: the machine did it. It is the new measure, and copying goes on;
- they recover: copying is tried again for some seconds. Where these are bad at once, and once more after another pause,
  the copies did it, and they stay off. Where not, it was a burst of something else, and copying goes on.

The walk is a likelihood ratio in powers of three that never falls below 1, an e-detector (Shin, Ramdas and Rinaldo
2023): while at most one second in four is slow, or one in thirteen has failures, 3 ** 5 of them or more pass on average
between two alarms, at whatever moments one looks and whatever came before. What bursts do within a second counts once,
and a burst of seconds would have to come and go with the copies, three times.
"""

from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.stats import binom

from validations.series import Arm
from validations.statistics import interpolated

SURE = 5
"""How many more bad seconds than good ones raise an alarm."""
RELIEF = 4
"""How many more good seconds than bad ones show that it is better without copies."""
PAUSE = 15
"""The seconds after which live requests that are not better without copies have not been harmed by them."""
TRY, AGAIN, TRIES = 7, 3, 2
"""Within so many seconds with copies `AGAIN` more must be bad than good, in so many tries: then it was the copies."""
ENOUGH = 40
"""Requests from which on a 95th percentile is known; fewer than that are waited for, `PATIENCE` seconds."""
PATIENCE = 5
MARGIN = 0.02
"""Seconds that a request may always take longer: less than that is this machine's own unrest."""
CHANCE = 0.95
"""A second is bad when it has more such requests than a good one has in so many of a hundred cases."""


class State(StrEnum):
    """What is going on."""

    LEARNING = "learning"
    COPYING = "copying"
    PAUSED = "paused"
    TRYING = "trying"
    OFF = "off"


class Mirror:
    """Fed with the champion's seconds, says whether live requests may be copied now (`on`), and in the end what the
    copies did (`harm`: empty unless they were switched off for good).

    `before` are accounts of what the champion did without copies, of late and for long: the one in which it was quicker
    counts. Too strict a measure costs a pause, after which it is set anew; too lax a one would see no harm.
    """

    def __init__(self, before: Sequence[Arm], edges: tuple[float, ...], max_slowdown: float) -> None:
        self.harm = ""
        self.pauses = 0
        self._slowdown = max_slowdown
        self._seconds, self._tries, self._settling = 0, 0, True
        self._begin(State.LEARNING)
        self._edges = np.asarray(edges, dtype=np.float64)
        known = [arm for arm in before if arm.timed >= ENOUGH]
        self._measure(min(known, key=self._p95) if known else max(before, key=lambda arm: arm.timed), edges)

    @property
    def on(self) -> bool:
        """Whether live requests are to be copied."""
        return self._state in (State.COPYING, State.TRYING)

    @property
    def figures(self) -> dict[str, float]:
        """The 95th percentile of live requests in milliseconds before the copies, and with them of late."""
        return {"live_p95_before_ms": 1e3 * self._p95(self._before), "live_p95_ms": 1e3 * self._p95(self._now)}

    def look(self, second: Arm, edges: tuple[float, ...]) -> bool:
        """Take what the champion answered in about a second; whether `on` has changed. Silence says nothing."""
        was = self.on
        if not second.requests or self._state is State.OFF:
            return False
        if self._state is State.LEARNING:
            self._seconds += 1
            self._measure(self._before + second, edges)
        elif self._settling:
            # What the gateway counts is a moment old, and requests under way began before the switch.
            self._settling = False
        else:
            self._count(second)
        return self.on is not was

    def _measure(self, before: Arm, edges: tuple[float, ...]) -> None:
        self._before, self._edges = before, np.asarray(edges, dtype=np.float64)
        if self._edges.size and (before.timed >= ENOUGH or self._seconds >= PATIENCE):
            p95 = self._p95(before)
            allowed = max(p95 * self._slowdown, p95 + MARGIN)
            self._slow = int(np.searchsorted(self._edges, allowed))
            self._failing = (before.errors + 1) / (before.requests + 2)
            self._begin(State.COPYING)

    def _begin(self, state: State) -> None:
        self._state, self._settling = state, True
        self._score, self._seconds = 0, 0
        self._now = Arm()

    def _count(self, second: Arm) -> None:
        self._seconds += 1
        bad = self._bad(second)
        if self._state is State.PAUSED:
            self._score = max(0, self._score - 1) if bad else self._score + 1
            # What was under way still, or waited behind copies, is not how it is without them.
            self._now = self._now + second if self._score or self._seconds > PAUSE - RELIEF else Arm()
            if self._score >= RELIEF:
                self._relieved = self._now
                self._begin(State.TRYING)
            elif self._seconds >= PAUSE:
                self._measure(self._now, tuple(self._edges))
            return
        self._score = max(0, self._score + (bad or -1))
        self._now = self._now + second if self._score else Arm()
        if self._state is State.COPYING and self._score >= SURE:
            self.pauses += 1
            self._tries = 0
            self._begin(State.PAUSED)
        elif self._state is State.TRYING and self._score >= AGAIN:
            self._tries += 1
            if self._tries >= TRIES:
                self.harm = self._words()
                self._state = State.OFF
            else:
                self._begin(State.PAUSED)
        elif self._state is State.TRYING and self._seconds >= TRY:
            self._begin(State.COPYING)

    def _bad(self, second: Arm) -> int:
        """0 for a good second, 1 for a slow one, 2 for one with failures."""
        if second.errors > _explained(second.requests, self._failing):
            return 2
        if self._slow >= self._edges.size:
            return 0
        slow = second.beyond(self._edges.size)[self._slow]
        return int(slow > _explained(second.timed, 0.05))

    def _p95(self, arm: Arm) -> float:
        if not arm.timed or not self._edges.size:
            return 0.0
        below = arm.timed - arm.beyond(self._edges.size)
        return interpolated(self._edges, below, arm.timed, 0.95)

    def _words(self) -> str:
        now = self._now

        def say(how: Any) -> str:
            return f"{how(self._before)} before, {how(now)} with them, {how(self._relieved)} while they were off"

        if now.errors / now.requests > 2 * self._failing:
            told = "made live requests fail: " + say(lambda arm: f"{100 * arm.errors / max(arm.requests, 1):.3g} %")
        else:
            told = "slowed live requests: p95 " + say(lambda arm: f"{1e3 * self._p95(arm):,.0f} ms")
        return f"the copies {told}; mirroring was switched off"


@lru_cache(maxsize=10_000)
def _explained(requests: int, share: float) -> float:
    return float(binom.ppf(CHANCE, requests, share))

"""Copies of live requests that end by themselves where live requests suffer from them."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from deployments.target import Served
from tasks.context import Judged, Seen
from tasks.observe import arm
from tasks.progress import say
from validations.mirror import Mirror
from validations.series import Arm
from validations.verdict import Measurement, Outcome

SECOND = 1.0
"""The gateway flushes its counters once a second: in less there is nothing, or two seconds at once."""


class Copies:
    """The copies of one shadow step, from now on: `route` switches them on and off, as `validations.mirror` says.

    `before` is what the champion has answered without them: ever, and of late.
    """

    def __init__(self, before: Sequence[Served], max_slowdown: float, route: Callable[[bool], None]) -> None:
        edges = next((served.latency.edges for served in before if served.latency.edges), ())
        self._mirror = Mirror([arm(served) for served in before], edges, max_slowdown)
        self._route, self._gathered, self._since = route, Arm(), time.monotonic()
        route(self.on)

    @property
    def on(self) -> bool:
        """Whether requests are copied now."""
        return self._mirror.on

    def see(self, champion: Served) -> None:
        """Take what the champion answered since the last time."""
        self._gathered += arm(champion)
        if not self._gathered.requests or time.monotonic() - self._since < SECOND:
            return
        if self._mirror.look(self._gathered, champion.latency.edges):
            self._route(self.on)
            say("  " + self._said())
        self._gathered, self._since = Arm(), time.monotonic()

    def _said(self) -> str:
        if self._mirror.harm:
            return self._mirror.harm
        return "live requests are copied" if self.on else "live requests got worse: the copies are off for a moment"

    def judged(self, judged: Judged) -> Judged:
        """`judged`, and an end to the step where the copies did harm."""
        return lambda measured: Outcome.FAILED if self._mirror.harm else judged(measured)

    def told(self, seen: Seen, judged: Judged) -> Seen:
        """What the step saw, with what became of the copies. Where they did harm nothing was proven, so nothing is
        measured and the step is errored; what has failed already has failed all the same.
        """
        harm, pauses = self._mirror.harm, self._mirror.pauses
        if harm and judged(seen.measurements) is not Outcome.FAILED:
            data = {("until_harm" if key == "series" else key): value for key, value in seen.data.items()}
            live = {name: Measurement.exact(value) for name, value in self._mirror.figures.items()}
            return dataclasses.replace(seen, measurements=live, note=f"{harm}\n{seen.note}", data=data)
        if harm or pauses:
            times = "once" if pauses == 1 else f"{pauses} times"
            more = harm or f"live requests got worse {times}, and not by the copies: these were off for a moment then"
            return dataclasses.replace(seen, note=f"{seen.note}; {more}")
        return seen

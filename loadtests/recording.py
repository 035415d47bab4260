"""Recorded requests as the schedule of a run: their own gaps, at another speed where one is asked for. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a recording: when it came (seconds, of any clock), and its JSON body on one line."""

    at: float
    body: str


@dataclass(frozen=True, slots=True)
class Replay:
    """What to send: `times` in seconds after the run's start; the n-th is for body n modulo their number.

    `rate` is that of the whole recording as it is replayed, `speed` how many times as fast as it came.
    """

    bodies: tuple[str, ...]
    times: tuple[float, ...]
    rate: float
    speed: float


def replay(recording: Sequence[Recorded], seconds: float, rate: float | None = None, most: int = 2_000_000) -> Replay:
    """Fill a run of `seconds` with `recording`: with the gaps it has, or all of them scaled to the mean `rate`.

    Of a recording that is longer than the run, its end is replayed; a shorter one begins anew after its own mean
    gap. Raises ValueError for one without two different times, and for more than `most` requests.
    """
    ordered = sorted(recording, key=lambda one: one.at)
    span = ordered[-1].at - ordered[0].at if ordered else 0.0
    if span <= 0:
        raise ValueError("it takes two requests at different times to have a spacing")
    own = (len(ordered) - 1) / span
    speed = (rate or own) / own
    if own * speed * seconds > most:
        raise ValueError(f"the recording has {own * speed:,.0f} requests a second: more than {most:,} in the run")
    since = ordered[-1].at - seconds * speed
    latest = [one for one in ordered if one.at > since]
    period = latest[-1].at - latest[0].at + 1 / own
    times: list[float] = []
    while True:
        start = len(times) // len(latest) * period
        for one in latest:
            at = (start + one.at - latest[0].at) / speed
            if at >= seconds:
                return Replay(tuple(one.body for one in latest), tuple(times), own * speed, speed)
            times.append(at)

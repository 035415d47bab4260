"""How long callers met a bad version: from its first bad response to its last one."""

import dataclasses
import time
from datetime import UTC, datetime

from deployments.target import Answer, ServingTarget, TargetError
from validations.verdict import Measurement

METRIC = "rollback_s"
QUIET, PATIENCE = 0.3, 2.0
"""Seconds without a live response after which the last one is known; and how long that is waited for."""


def rollback_time(
    target: ServingTarget, model: str, version: str, *, after: float, stopped: float, obeyed: float
) -> tuple[Measurement, str]:
    """`rollback_s` of a version that lost its live requests, and the same in words.

    It begins with the first live response of `version` with status 500 or more after `after`; where none failed, at
    `stopped`, when the judge stopped the step. It ends with the version's last live response, or at `obeyed`, when the
    gateway had taken its requests away, where the server's own account of it is gone. All are seconds since the epoch.

    Call it once the route holds and before the version is retired: requests under way end in between, and are waited
    for, some moments at the most. Never raises `TargetError`.
    """
    try:
        kept = _quiet(target, model, version)
    except TargetError:
        kept = []
    live = [answer for answer in kept if not answer.shadow and not answer.own_path]
    if not live:
        why = "its server has no live answer" if kept else "its server's answers are gone"
        return _told(version, obeyed - stopped, f"{why}: from the verdict to the moment that the gateway obeyed")
    failed = [_ended(answer) for answer in live if answer.status >= 500 and _ended(answer) > after]
    began, since = (min(failed), "its first failed response") if failed else (stopped, "the verdict: none failed")
    note = f"from {since} to its last live response"
    oldest = kept[0]
    if oldest.number > 0 and oldest.at > after:
        # The ring keeps the latest answers: what came before the oldest one is not known any more.
        note += f"; its answers before {_clock(oldest.at)} were no longer kept"
    return _told(version, max(map(_ended, live)) - began, note)


def _quiet(target: ServingTarget, model: str, version: str) -> list[Answer]:
    """The answers of a version that are kept, oldest first, once no more live ones come."""
    found: list[Answer] = []
    upto, last = -1, time.monotonic()
    end = last + PATIENCE
    while time.monotonic() < end and time.monotonic() - last < QUIET:
        for answer in target.answers(model, version, upto):
            upto = answer.number
            found.append(dataclasses.replace(answer, request=b"", response=b""))
            if not answer.shadow and not answer.own_path:
                last = time.monotonic()
        time.sleep(QUIET / 6)
    return found


def _ended(answer: Answer) -> float:
    return answer.at + answer.seconds


def _told(version: str, seconds: float, note: str) -> tuple[Measurement, str]:
    seconds = max(0.0, seconds)  # it had answered nothing since
    return Measurement.exact(seconds, note=note), f"callers met v{version} for {seconds:.2f} s: {note}"


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S} UTC"

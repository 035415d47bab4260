"""Traffic and registry move together: what both must say, who is told first, and how long one waits for whom."""

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress

from deployments.target import Fence, LeaseHeld, ServingTarget, StaleFence, TargetError, Traffic
from tasks import registry
from tasks.context import Context, Seen
from tasks.progress import say
from tasks.settings import Mistake
from tasks.status import said
from validations.verdict import Measurement


@contextmanager
def leased(target: ServingTarget, model: str, holder: str, *, take: bool = False) -> Iterator[Fence]:
    """Hold the model's lease, renewed in the background, for as long as this context lasts."""
    fence = target.lease(model, holder, take=take)
    done = threading.Event()

    def renew() -> None:
        pause = 0.0
        while not done.wait(pause):
            try:
                pause = target.renew(fence) / 4
            except StaleFence:
                # Lost: the next verb with this fence is refused, which is what must happen.
                return
            except TargetError:
                pause = 1.0

    thread = threading.Thread(target=renew, daemon=True, name=f"lease of {model}")
    thread.start()
    try:
        yield fence
    finally:
        done.set()
        thread.join()
        with suppress(TargetError):  # it lapses by itself
            target.release(fence)


@contextmanager
def leased_soon(target: ServingTarget, model: str, holder: str, patience: float = 60.0) -> Iterator[Fence]:
    """As `leased`, for one that goes on: waits `patience` seconds for whoever holds the lease. Raises `LeaseHeld`."""
    end, told = time.monotonic() + patience, False
    while True:
        try:
            target.lease(model, holder)
            break
        except LeaseHeld as held:
            if time.monotonic() > end:
                raise
            if not told:
                say(f"{held}: waiting for that")
            told = True
            time.sleep(0.5)
    with leased(target, model, holder) as fence:
        yield fence


def name_champion(context: Context, new: str, old: str | None, of: Collection[str | None]) -> None:
    """Let the registry say that `new` is champion and `old` was before it. Raises `Moved` where `champion` names
    neither of `of`.
    """
    model, guard = context.model, context.guard
    registry.move(model, registry.CHAMPION, new, of=of, guard=guard())
    if old != new:
        # Whatever `previous` names: it follows from who was champion.
        named = registry.aliased(model, registry.PREVIOUS)
        registry.move(model, registry.PREVIOUS, old, of=(named,), guard=guard())


class Unrecorded(Mistake):
    """Traffic is where it belongs; the registry, which did not answer, does not know it yet. Recovery tells it."""


REGISTRY_PATIENCE = 30.0
"""Seconds that a rollback goes on asking a registry that does not answer."""


def patiently(tell: Callable[[], None], done: str) -> None:
    """Tell the registry something, again and again where it does not answer. Raises `Unrecorded` that begins with
    `done`, what has been done already, when patience ends.
    """
    end, said = time.monotonic() + REGISTRY_PATIENCE, False
    while True:
        try:
            return tell()
        except Exception as error:
            if not registry.unreachable(error):
                raise
            if time.monotonic() > end:
                raise Unrecorded(
                    f"{done}; the registry does not answer and could not be told: it will be when it is back, by "
                    "`titleshot watch`, `titleshot recover` or the next promotion"
                ) from error
            if not said:
                say(f"  {done}; the registry does not answer: asking again for {REGISTRY_PATIENCE:.0f} s")
            said = True
            time.sleep(1)


def without(traffic: Traffic, version: str) -> Traffic:
    """`traffic` that cannot reach `version`: no fallback on it, no pin to it."""
    spare = None if traffic.fallback == version else traffic.fallback
    return dataclasses.replace(traffic, shape=traffic.shape.without({version}), fallback=spare)


def agreement(context: Context, wanted: str) -> Seen:
    """Whether the data plane and the registry both have `wanted` as champion, read back from each."""
    traffic = context.target.traffic(context.model)
    alias = registry.aliased(context.model, registry.CHAMPION)
    serving = traffic.champion if traffic else None
    agree = serving == alias == wanted and traffic is not None and traffic.weight == 0
    note = f"the gateway serves {said(serving)}, the alias champion names {said(alias)}"
    return Seen({"agreement": Measurement.exact(float(agree), note="" if agree else note)}, note)

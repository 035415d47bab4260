"""Steps at the serving target: deploy, shadow, canary, watch; and moving traffic and registry together."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from deployments.target import NeverReady, Served, TargetError, TargetUnavailable
from tasks import registry
from tasks.agreement import agreement, name_champion, patiently, without
from tasks.context import Context, Judged, Seen
from tasks.mirroring import Copies
from tasks.observe import Notebook, Poll, arm, watch_until
from tasks.progress import say
from tasks.rollback_time import rollback_time
from tasks.settings import region
from tasks.status import said
from validations.agreement import Pairing, Side
from validations.eprocess import bernoulli_interval
from validations.gates import Canary, Shadow, Watch
from validations.monitor import Monitor, Terms
from validations.monitor import read as monitor_of
from validations.series import Arm, Head, Relation, Series
from validations.statistics import proportion
from validations.verdict import Measurement, Outcome


def unavailable(_task: Any, _task_run: Any, state: Any) -> bool:
    """Whether a step ended because the target was not there for a moment: the verbs may be repeated."""
    return isinstance(state.result(raise_on_failure=False), TargetUnavailable)


REPEATED: dict[str, Any] = {"retries": 3, "retry_delay_seconds": 1, "retry_condition_fn": unavailable}
SHARE_CONFIDENCE = 0.95
PICTURED = math.log(40)
"""The evidence at which the intervals of single slices end, in pictures: 95 % for each alone."""


@task(cache_policy=NO_CACHE, **REPEATED)
def deploy(context: Context) -> Seen:
    """Serve the challenger beside the champion, ready and warm, without traffic."""
    started = time.monotonic()
    try:
        endpoint = context.target.deploy(context.challenger.version(context.settings.env_manager), context.fence)
    except NeverReady as error:
        note = f"{error}; its log ends with:\n{error.log}"
        return Seen({"ready": Measurement.exact(0, note=str(error))}, note)
    seconds = time.monotonic() - started
    return Seen(
        {"ready": Measurement.exact(1), "start_s": Measurement.exact(seconds)},
        f"answers at {endpoint.url} after {seconds:.1f} s",
    )


@task(cache_policy=NO_CACHE)
def shadow(context: Context, gate: Shadow, judged: Judged) -> Seen:
    """Mirror live requests to the challenger and compare its answers with the champion's, in pairs.

    Where live requests suffer from the copies, mirroring is switched off and the step is errored.
    """
    champion, challenger = _names(context)
    target, model = context.target, context.model
    pairing = Pairing(
        tolerances=gate.tolerances,
        slices=gate.slices,
        min_slice=gate.min_slice,
        find_slices=gate.find_slices,
        once_per=gate.once_per,
        redact=gate.redact,
        keep_pairs=gate.keep_pairs,
    )
    seen_up_to = {number: _last_answer(context, number) for number in (champion, challenger)}
    before = target.observe(model)
    counters = _Counters(before, f"{challenger}-shadow", champion)
    counted = [0, 0]

    def route(copied: bool) -> None:  # noqa: FBT001 - the one thing that it is asked
        mirrored = (challenger, round(gate.mirror * 100)) if copied else (None, 0)
        target.route(context.traffic(champion, mirrored[0], mirror=mirrored[1]), context.fence)

    accounts = [before.get(champion, Served())]
    with suppress(TargetUnavailable):  # a gateway that began anew since then has the one account only
        accounts.append(_since(before, context.began, champion))
    copies = Copies(accounts, gate.max_slowdown, route)

    def poll() -> Poll:
        sides: tuple[tuple[str, Side], ...] = ((champion, "champion"), (challenger, "challenger"))
        for number, side in sides:
            for answer in target.answers(model, number, seen_up_to[number]):
                seen_up_to[number] = answer.number
                # What the champion itself failed says nothing about the challenger.
                told = answer.shadow if side == "challenger" else not answer.shadow and answer.status < 500
                if told:
                    pairing.add(side, answer.request_id, answer.status, answer.response, answer.request)
        news = (pairing.pairs - counted[0], pairing.disagreements - counted[1])
        counted[:] = pairing.pairs, pairing.disagreements
        copy, live = counters.since(target.observe(model))
        # While the copies are off there is nothing to compare the champion's requests with.
        compared = live if copies.on else Served()
        copies.see(live)
        return Poll(copy, compared, *news, slices=tuple(pairing.table()))

    head = _head(before, champion, gate)
    try:
        seen = _watched(context, gate, gate.name or gate.kind, head, poll, gate.max, copies.judged(judged))
        seen = copies.told(seen, judged)
    finally:
        route(copied=False)
    fields = ", ".join(f"{field} in {count:,}" for field, count in pairing.fields.most_common(3))
    note = f"{seen.note}; they disagree on {fields}" if fields else seen.note
    data = {**seen.data, "agreement": _agreement_data(pairing)}
    return dataclasses.replace(seen, note=note, data=data, lines={"pairs": list(pairing.kept())})


def _watched(
    context: Context,
    gate: Shadow | Canary | Watch,
    step: str,
    head: Head,
    poll: Callable[[], Poll],
    limit: timedelta,
    judged: Judged,
    dwell: timedelta = timedelta(0),
) -> Seen:
    """Watch the traffic of `step`, going on from what was observed of its gate before, and keep it for those after."""
    name, policy = gate.name or gate.kind, context.policy
    assert policy is not None
    terms = Terms(policy.false_rollback, policy.false_promotion, context.ledger, name, gate.min_sample)
    earlier = context.series.setdefault(name, [])

    def begin(edges: tuple[float, ...]) -> Monitor:
        nonlocal head
        known = edges or (earlier[0].head.edges if earlier else (1.0,))
        head = head.model_copy(update={"edges": known, "block": block})
        if earlier and not head.continues(earlier[0].head):
            say("  what was observed of this gate before was cut in other blocks or buckets: it is left out")
            earlier.clear()
        head = earlier[0].head if earlier else head
        notebook.begin(head)
        return monitor_of([*earlier, Series(head=head)], gate.bounds(), terms)

    block, notebook = gate.block(limit), Notebook(context.folder, step)
    seconds = limit.total_seconds()
    observed = watch_until(poll, begin, block, seconds, judged, dwell=dwell.total_seconds(), keep=notebook.keep)
    context.ledger = observed.ledger
    seen = Seen(observed.measured, observed.note, observed.data(earlier, head))
    earlier.append(observed.series(head))
    return seen


class _Counters:
    """A target's growing counters as what came since the last look, for challenger and champion."""

    def __init__(self, before: Mapping[str, Served], challenger: str, champion: str) -> None:
        self._last, self._names = before, (challenger, champion)

    def since(self, now: Mapping[str, Served]) -> tuple[Served, Served]:
        challenger, champion = (_since(now, self._last, name) for name in self._names)
        self._last = now
        return challenger, champion


def _head(before: Mapping[str, Served], champion: str, gate: Shadow | Canary | Watch, **more: Arm) -> Head:
    relation: Relation = "independent" if gate.bursts is None else "bursty"
    return Head(relation=relation, history=arm(before.get(champion, Served())), **more)


def _agreement_data(pairing: Pairing) -> dict[str, Any]:
    """The disagreement by slice and by field, and the pairs that differed most, for evidence and report."""
    slices = []
    for column, value, differing, pairs in pairing.by_slice():
        low, high = bernoulli_interval(differing, pairs, PICTURED, PICTURED)
        slices.append(
            {"where": f"{column} = {value}", "pairs": pairs, "value": differing / pairs, "low": low, "high": high}
        )
    return {
        "pairs": pairing.pairs,
        "disagreements": pairing.disagreements,
        "fields": dict(pairing.fields),
        "slices": slices,
        "examples": [example.model_dump() for example in pairing.examples],
    }


@task(cache_policy=NO_CACHE)
def canary(context: Context, gate: Canary, weight: float, judged: Judged) -> Seen:
    """Let the challenger answer `weight` percent of the live requests until the step is decided."""
    champion, challenger = _names(context)
    target, model = context.target, context.model
    before = target.observe(model)
    # At full weight alone the champion never answers beside it: what it did before is what there is to compare with.
    alone = {"reference": arm(_since(before, context.began, champion))} if gate.deciding == 100 else {}
    head, counters = _head(before, champion, gate, **alone), _Counters(before, challenger, champion)
    target.route(context.traffic(champion, challenger, weight=round(weight * 100)), context.fence)

    def poll() -> Poll:
        return Poll(*counters.since(target.observe(model)))

    step = f"{gate.name or gate.kind} {weight:g}%"
    seen = _watched(context, gate, step, head, poll, gate.max, judged, gate.dwell or timedelta(0))
    now = target.observe(model)
    both = _since(now, before, challenger), _since(now, before, champion)
    if total := sum(served.requests for served in both):
        # Setting is not having: the share that the challenger really answered.
        seen.measurements["share"] = proportion(both[0].requests, total, SHARE_CONFIDENCE)
    return dataclasses.replace(seen, data={**seen.data, "weight": weight})


@task(cache_policy=NO_CACHE)
def watch(context: Context, gate: Watch, judged: Judged) -> Seen:
    """Observe the new champion for the whole of `run_time`; end early only where a check has failed."""
    champion, challenger = _names(context)
    target, model = context.target, context.model
    before = target.observe(model)
    counters = _Counters(before, challenger, champion)
    head = _head(before, champion, gate)
    if gate.holdback and champion:
        target.route(context.traffic(challenger, champion, weight=round(gate.holdback * 100)), context.fence)
    elif champion and context.reference is not None:
        head = head.model_copy(update={"reference": context.reference})

    def poll() -> Poll:
        return Poll(*counters.since(target.observe(model)))

    seen = _watched(context, gate, gate.name or gate.kind, head, poll, gate.run_time, judged, gate.run_time)
    if gate.holdback and champion and judged(seen.measurements) is Outcome.PASSED:
        target.route(context.traffic(challenger), context.fence)
    return seen


@task(cache_policy=NO_CACHE, **REPEATED)
def promote(context: Context) -> Seen:
    """Cut over: all traffic to the challenger, then the aliases and stages; the old champion stays warm.

    The route comes first: an alias that leads the traffic is a lie that a restart would believe. Nothing is done twice:
    whoever goes on after a death between the two finds what holds already.
    """
    old = context.champion.number if context.champion else None
    new, model, target = context.challenger.number, context.model, context.target
    named = registry.aliased(model, registry.CHAMPION)
    if named not in (old, new):
        raise registry.Moved(
            f"the alias champion names {said(named)}, not {said(old)}, which the gateway serves as when this promotion "
            "began: someone moved the alias; nothing was promoted"
        )
    if context.reference is None:
        context.reference = _before(context, old)
        context.journal.cut_over(context.reference.model_dump(mode="json"))
    target.route(context.traffic(new), context.fence)

    def tell() -> None:
        name_champion(context, new, old, of=(old,))
        # Where there are more regions to come, it challenges on.
        if not region() and registry.aliased(model, registry.CHALLENGER) == new:
            registry.move(model, registry.CHALLENGER, None, of=(new,), guard=context.guard())

    patiently(tell, f"v{new} answers every live request")
    return agreement(context, new)


def _before(context: Context, old: str | None) -> Arm:
    return arm(_since(context.target.observe(context.model), context.began, old)) if old else Arm()


@task(cache_policy=NO_CACHE, **REPEATED)
def rollback(context: Context) -> Seen:
    """Take every request away from the challenger, then give aliases and stages back as they were.

    The route waits for nobody: neither registry nor record is asked before it holds. Raises `Unrecorded` where the
    registry cannot be told.
    """
    model, target, challenger = context.model, context.target, context.challenger.number
    if context.champion is None:
        if target.traffic(model) is not None:
            raise TargetError(f"{model} v{challenger} serves and there is no champion to go back to")
        target.retire(model, challenger, context.fence)
        return Seen({"agreement": Measurement.exact(1)}, "there was no champion: the challenger was taken down")
    old = context.champion.number
    started, now = time.monotonic(), time.time()
    target.route(without(context.traffic(old), challenger), context.fence)
    seconds = time.monotonic() - started
    done = f"all live requests were back on v{old} after {seconds * 1000:.0f} ms"
    began, stopped = context.stopped or (now, now)
    obeyed = max(stopped, now + seconds)
    measured, words = rollback_time(target, model, challenger, after=began, stopped=stopped, obeyed=obeyed)
    if challenger not in (context.previous, old):
        target.retire(model, challenger, context.fence)

    def tell() -> None:
        # Only what a cut-over of ours has left is changed back: what someone else has moved is theirs to solve.
        moved = {registry.CHAMPION: challenger, registry.PREVIOUS: old}
        if any(registry.aliased(model, alias) == number for alias, number in moved.items()):
            name_champion(context, old, context.previous, of=(old, challenger))
        registry.unstage(model, challenger, context.guard())

    patiently(tell, done)
    seen = agreement(context, old)
    return Seen({**seen.measurements, "rollback_s": measured}, f"{done}; {words}; {seen.note}")


def _names(context: Context) -> tuple[str, str]:
    champion = context.champion.number if context.champion else ""
    return champion, context.challenger.number


def _since(now: Mapping[str, Served], before: Mapping[str, Served], version: str) -> Served:
    return now.get(version, Served()).since(before.get(version, Served()))


def _last_answer(context: Context, number: str) -> int:
    """The number of the last answer so far, so that only what comes after counts."""
    return max((answer.number for answer in context.target.answers(context.model, number)), default=-1)


def milliseconds(m: Measurement) -> Measurement:
    """A measurement in seconds as one in milliseconds."""
    return m.model_copy(update={"value": m.value * 1000, "low": m.low * 1000, "high": m.high * 1000})


def live_requests(context: Context, limit: int) -> list[dict[str, Any]]:
    """Bodies of the latest live requests that the champion answered well, newest last (JSON objects)."""
    if context.champion is None:
        return []
    found = []
    for answer in context.target.answers(context.model, context.champion.number):
        if not answer.shadow and answer.status == 200:
            try:
                found.append(json.loads(answer.request))
            except ValueError:
                continue
    return found[-limit:]

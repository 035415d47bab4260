"""Steps at the serving target: deploy, shadow, canary, watch; and moving traffic and registry together."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from deployments.target import NeverReady, Served, TargetError, TargetUnavailable, Traffic
from tasks import registry
from tasks.context import Context, Decided, Seen
from tasks.progress import say
from validations.agreement import Pairing, Side
from validations.policy import Canary, Shadow, Watch
from validations.statistics import (
    difference,
    look_confidence,
    proportion,
    quantile_from_histogram,
    ratio_from_histograms,
)
from validations.verdict import Measurement


def unavailable(_task: Any, _task_run: Any, state: Any) -> bool:
    """Whether a step ended because the target was not there for a moment: the verbs may be repeated."""
    return isinstance(state.result(raise_on_failure=False), TargetUnavailable)


REPEATED: dict[str, Any] = {"retries": 3, "retry_delay_seconds": 1, "retry_condition_fn": unavailable}
POLL = 0.5
"""Seconds between two looks at the counters; the gateway flushes them once a second."""


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
def shadow(context: Context, gate: Shadow, decided: Decided) -> Seen:
    """Mirror live requests to the challenger and compare its answers with the champion's, in pairs."""
    champion, challenger = _names(context)
    target, model = context.target, context.model
    pairing = Pairing(tolerances=gate.tolerances, slices=gate.slices, min_slice=gate.min_slice)
    seen_up_to = {number: _last_answer(context, number) for number in (champion, challenger)}
    before = target.observe(model)
    target.route(Traffic(model, champion, challenger, mirror=round(gate.mirror * 100)), context.fence)

    def look(confidence: float) -> tuple[int, dict[str, Measurement]]:
        sides: tuple[tuple[str, Side], ...] = ((champion, "champion"), (challenger, "challenger"))
        for number, side in sides:
            for answer in target.answers(model, number, seen_up_to[number]):
                seen_up_to[number] = answer.number
                if answer.shadow == (side == "challenger"):
                    pairing.add(side, answer.request_id, answer.status, answer.response, answer.request)
        served = target.observe(model)
        measured = _compare(
            _since(served, before, f"{challenger}-shadow"), _since(served, before, champion), confidence
        )
        measured |= pairing.measurements(confidence)
        return pairing.pairs, measured

    try:
        measured, note = _watch_until(look, gate.min_sample, gate.confidence, gate.max.total_seconds(), decided)
    finally:
        target.route(Traffic(model, champion), context.fence)
    return Seen(measured, note, {"agreement": _agreement_data(pairing, gate.confidence)})


def _agreement_data(pairing: Pairing, confidence: float) -> dict[str, Any]:
    """The disagreement by slice and by field, and the pairs that differed most, for evidence and report."""
    slices = []
    for column, value, differing, pairs in pairing.by_slice():
        m = proportion(differing, pairs, confidence)
        where = f"{column} = {value}"
        slices.append({"where": where, "pairs": pairs, "value": m.value, "low": m.low, "high": m.high})
    return {
        "pairs": pairing.pairs,
        "disagreements": pairing.disagreements,
        "fields": dict(pairing.fields),
        "slices": slices,
        "examples": [example.model_dump() for example in pairing.examples],
    }


@task(cache_policy=NO_CACHE)
def canary(context: Context, gate: Canary, weight: float, decided: Decided) -> Seen:
    """Let the challenger answer `weight` percent of the live requests until the checks are decided."""
    champion, challenger = _names(context)
    target, model = context.target, context.model
    before = target.observe(model)
    # At full weight the champion answers nothing, so what it did before is what there is to compare with.
    champion_before = context.began if weight == 100 else before
    traffic = Traffic(model, champion, challenger, weight=round(weight * 100), fallback=champion)
    target.route(traffic, context.fence)
    started = time.monotonic()
    series: list[dict[str, float]] = []

    def look(confidence: float) -> tuple[int, dict[str, Measurement]]:
        served = target.observe(model)
        new, old = _since(served, before, challenger), _since(served, champion_before, champion)
        series.append(
            {
                "seconds": round(time.monotonic() - started, 2),
                "challenger": new.requests,
                "challenger_errors": new.errors,
                "champion": old.requests,
                "champion_errors": old.errors,
            }
        )
        measured = _compare(new, old, confidence)
        if new.requests + old.requests:
            # Setting is not having: the share that the challenger really answered.
            measured["share"] = proportion(new.requests, new.requests + old.requests, confidence)
        return new.requests, measured

    measured, note = _watch_until(look, gate.min_sample, gate.confidence, gate.max.total_seconds(), decided)
    return Seen(measured, note, {"weight": weight, "series": series})


@task(cache_policy=NO_CACHE)
def watch(context: Context, gate: Watch, failed: Decided) -> Seen:
    """Observe the new champion for the whole of `run_time`; end early only where a check has failed."""
    _, challenger = _names(context)
    target, model = context.target, context.model
    before = target.observe(model)
    baseline = _since(context.cut_over, context.began, context.champion.number) if context.champion else Served()

    def look(confidence: float) -> tuple[int, dict[str, Measurement]]:
        new = _since(target.observe(model), before, challenger)
        return new.requests, _compare(new, baseline, confidence)

    run_time = gate.run_time.total_seconds()
    measured, note = _watch_until(look, gate.min_sample, gate.confidence, run_time, failed, to_the_end=True)
    return Seen(measured, note)


@task(cache_policy=NO_CACHE, **REPEATED)
def promote(context: Context) -> Seen:
    """Cut over: all traffic to the challenger, then the aliases and stages; the old champion stays warm.

    The route comes first: an alias that leads the traffic is a lie that a restart would believe.
    """
    old = context.champion.number if context.champion else None
    new, model, target = context.challenger.number, context.model, context.target
    named = registry.aliased(model, registry.CHAMPION)
    if named not in (old, new):
        raise TargetError(
            f"the alias champion names v{named}, not v{old} as when this promotion began: someone moved it; "
            "nothing was promoted"
        )
    context.cut_over = target.observe(model)
    target.route(Traffic(model, new, fallback=old), context.fence)
    registry.set_alias(model, registry.CHAMPION, new)
    if old is not None:
        registry.set_alias(model, registry.PREVIOUS, old)
    if registry.aliased(model, registry.CHALLENGER) == new:
        registry.set_alias(model, registry.CHALLENGER, None)
    return _agreement(context, new)


@task(cache_policy=NO_CACHE, **REPEATED)
def rollback(context: Context) -> Seen:
    """Take every request away from the challenger, then give aliases and stages back as they were."""
    model, target, challenger = context.model, context.target, context.challenger.number
    if context.champion is None:
        if target.traffic(model) is not None:
            raise TargetError(f"{model} v{challenger} serves and there is no champion to go back to")
        target.retire(model, challenger, context.fence)
        return Seen({"agreement": Measurement.exact(1)}, "there was no champion: the challenger was taken down")
    old = context.champion.number
    started = time.monotonic()
    target.route(Traffic(model, old), context.fence)
    seconds = time.monotonic() - started
    if registry.aliased(model, registry.CHAMPION) == challenger:
        registry.set_alias(model, registry.CHAMPION, old)
        registry.set_alias(model, registry.PREVIOUS, context.previous)
    registry.set_stage(model, challenger, "None")
    target.retire(model, challenger, context.fence)
    seen = _agreement(context, old)
    return Seen(
        {**seen.measurements, "rollback_s": Measurement.exact(seconds)},
        f"all live requests were back on v{old} after {seconds * 1000:.0f} ms; {seen.note}",
    )


def swap_back(context: Context) -> Seen:
    """The operator's rollback: the previous version (`context.challenger`) becomes champion again."""
    seen = deploy.fn(context)
    if seen.measurements["ready"].value < 1:
        return Seen({"agreement": Measurement.exact(0, note=seen.note)}, seen.note)
    started = time.monotonic()
    moved = promote.fn(context)
    seconds = time.monotonic() - started
    note = f"v{context.challenger.number} answers every live request again, {seconds * 1000:.0f} ms after the order"
    return Seen({**moved.measurements, "rollback_s": Measurement.exact(seconds)}, f"{note}; {moved.note}")


def _agreement(context: Context, wanted: str) -> Seen:
    """Whether the data plane and the registry both have `wanted` as champion, read back from each."""
    traffic = context.target.traffic(context.model)
    alias = registry.aliased(context.model, registry.CHAMPION)
    serving = traffic.champion if traffic else None
    agree = serving == alias == wanted and traffic is not None and traffic.weight == 0
    note = f"the gateway serves v{serving}, the alias champion names v{alias}"
    return Seen({"agreement": Measurement.exact(float(agree), note="" if agree else note)}, note)


def _names(context: Context) -> tuple[str, str]:
    champion = context.champion.number if context.champion else ""
    return champion, context.challenger.number


def _since(now: Mapping[str, Served], before: Mapping[str, Served], version: str) -> Served:
    return now.get(version, Served()).since(before.get(version, Served()))


def _last_answer(context: Context, number: str) -> int:
    """The number of the last answer so far, so that only what comes after counts."""
    return max((answer.number for answer in context.target.answers(context.model, number)), default=-1)


def _watch_until(
    look: Callable[[float], tuple[int, dict[str, Measurement]]],
    min_sample: int,
    confidence: float,
    limit: float,
    decided: Decided,
    *,
    to_the_end: bool = False,
) -> tuple[dict[str, Measurement], str]:
    """Look whenever the sample has doubled, each look at its own share of the error rate, until decided.

    Looking at every moment with a fixed-sample interval would find something sooner or later; so there are
    few looks, at `min_sample`, twice that, ..., and a last one at `limit` seconds.
    """
    started = time.monotonic()
    looks = 0
    told = started
    while True:
        late = time.monotonic() - started >= limit
        share = look_confidence(confidence, looks)
        sample, measured = look(share)
        if sample >= min_sample * 2**looks or late:
            looks += 1
            if decided(measured) or late:
                break
        if time.monotonic() - told >= 5:
            told = time.monotonic()
            say(f"  {sample} of {min_sample * 2**looks} requests for the next look")
        time.sleep(min(POLL, max(0.0, limit - (time.monotonic() - started))))
    seconds = time.monotonic() - started
    note = f"{sample} requests in {seconds:.0f} s, judged at look {looks} with {share:.2%} confidence"
    if to_the_end and not late:
        note += "; ended early"
    return measured, note


def _compare(new: Served, old: Served, confidence: float) -> dict[str, Measurement]:
    """Every metric that counts and histograms give; what has no sample yet is left out."""
    measured: dict[str, Measurement] = {}
    if new.requests:
        measured["error_rate"] = proportion(new.errors, new.requests, confidence)
    if new.requests and old.requests:
        measured["error_rate_delta"] = difference(new.errors, new.requests, old.errors, old.requests, confidence)
    for percent in (50, 90, 95, 99):
        q = percent / 100
        if sum(new.latency.counts):
            m = quantile_from_histogram(new.latency.edges, new.latency.counts, q, confidence)
            measured[f"p{percent}_ms"] = milliseconds(m)
        if sum(new.latency.counts) and sum(old.latency.counts):
            measured[f"p{percent}_ratio"] = ratio_from_histograms(
                new.latency.edges, new.latency.counts, old.latency.counts, q, confidence
            )
    return measured


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

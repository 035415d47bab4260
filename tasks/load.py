"""The load gate: Locust in its own process, at one rate for both versions, or in search of the highest one."""

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from deployments.target import Served
from loadtests import distributed, run
from loadtests.recording import Recorded, replay
from loadtests.report import slices, summary
from tasks import registry
from tasks.capacity import Found, Hurt, search
from tasks.context import Context, Seen
from tasks.observe import Observed
from tasks.senders import sender
from tasks.serving import milliseconds
from tasks.settings import Mistake
from validations.forecast import SLICE_REQUESTS, SLICE_SECONDS
from validations.gates import GENERATOR_METRICS, Load
from validations.monitor import Terms, read
from validations.series import Arm, Block, Head, Series, sparse
from validations.statistics import difference, proportion, quantile, quantile_ratio
from validations.verdict import Measurement

LOAD_HEADER = {"x-titleshot-load": "1"}
"""Tells the model servers that live requests go first, and that these are none."""
SAMPLE = 500
"""How many recent live requests the load is made of."""
RECORDING = 5_000
"""And how many where they are replayed with their own spacing: all that a model server keeps."""
EDGES = np.geomspace(1e-4, 100, 698)
"""Upper edges of the buckets in which a load's latencies are kept, 2 % apart, in seconds."""
FLUSH = 1.0
"""Seconds after which the gateway's counters have what was answered."""


@task(cache_policy=NO_CACHE)
def load(context: Context, gate: Load) -> Seen:
    """Send open-loop load to the versions' own paths through the gateway and measure raw latencies."""
    requests = _requests(context, gate)
    live = Live(context)

    def loaded(names: Iterable[str], rate: float | None, meanwhile: Callable[[], object]) -> run.Result:
        endpoints = context.target.deployed(context.model)
        targets = {name: f"{endpoints[live.numbers[name]].url}/invocations" for name in names}
        profile, bodies = _profile(gate, requests, rate)
        payloads = context.folder / "payloads.jsonl"
        payloads.write_text("".join(f"{body}\n" for body in bodies))
        crew, hosts = sender(context.target, context.model, context.id)
        if crew is None and gate.workers == 1:
            return run.run(profile, targets, payloads, hosts=hosts, meanwhile=meanwhile)
        return distributed.run(
            profile, targets, payloads, workers=gate.workers, crew=crew, hosts=hosts, meanwhile=meanwhile
        )

    if gate.find is None:
        result = loaded(live.numbers, gate.rate, lambda: None)
        seconds = gate.run_time.total_seconds()
        rate = result.targets["challenger"].sent / seconds
        note = f"{rate:.4g}/s each for {seconds:g} s, {requests.source}"
        measured, data = looked_at(context, gate, result)
        known = measurements(result, gate.confidence) | measured | generator([result])
        return Seen(known, note, {**summary(result), **data})

    def probe(name: str, rate: float) -> run.Result:
        live.begin()
        result = loaded([name], rate, live.look)
        time.sleep(FLUSH)
        live.look()
        live.end(name)
        return result

    def measure(result: run.Result, name: str) -> dict[str, Measurement]:
        return alone(result, name, gate.probe_confidence)

    found, runs = search(gate, list(live.numbers)[: gate.searches], probe, measure)
    told = [
        f"{name} keeps the bounds up to {one.search.kept:.4g}/s" + (f" ({one.why})" if one.why else "")
        for name, one in found.items()
    ]
    reported = {name: summary(one.reported)["load"][name] for name, one in found.items() if one.results}
    data = {"load": reported, "runs": runs, "live": {name: live.rate(name) for name in found}}
    return Seen(searched(gate, found, live.rate), "; ".join([*told, requests.source]), data)


def looked_at(context: Context, gate: Load, result: run.Result) -> tuple[dict[str, Measurement], dict[str, Any]]:
    """The checks of a load at one rate, from its slices, and the ledger after it; and the evidence for them.

    Latencies are compared slice by slice, since what disturbs the machine is in the same slice of both.
    """
    name, policy = gate.name or gate.kind, context.policy
    assert policy is not None
    rate = result.targets["challenger"].sent / result.seconds
    seconds = max(SLICE_SECONDS, SLICE_REQUESTS / rate)
    head = Head(edges=tuple(EDGES.tolist()), relation="paired")
    blocks = [
        Block(seconds=seconds, challenger=_arms(slice_, "challenger"), champion=_arms(slice_, "champion"))
        for slice_ in slices(result, seconds)
    ]
    earlier = context.series.setdefault(name, [])
    terms = Terms(policy.false_rollback, policy.false_promotion, context.ledger, name)
    monitor = read([*earlier, Series(head=head)], gate.bounds(first=context.champion is None), terms)
    observed = Observed.of(monitor, blocks)
    context.ledger = observed.ledger
    data = observed.data(earlier, head)
    earlier.append(observed.series(head))
    return observed.measured, data


def _arms(slice_: dict[str, Any], name: str) -> tuple[Arm, ...]:
    """One version's part of a slice; nothing where it had no request."""
    latencies = slice_.get(name)
    if latencies is None or not latencies.size:
        return ()
    answered = latencies[np.isfinite(latencies)]
    counts = np.bincount(np.searchsorted(EDGES, answered), minlength=EDGES.size + 1)
    ordered = np.sort(latencies)
    quantiles = {q: float(ordered[max(math.ceil(q / 100 * ordered.size - 1e-9), 1) - 1]) for q in (50, 90, 95, 99)}
    arm = Arm(
        requests=latencies.size,
        errors=latencies.size - answered.size,
        unanswered=latencies.size - answered.size,
        buckets=sparse(counts.tolist()),
        quantiles=quantiles,
    )
    return (arm,)


def measurements(result: run.Result, confidence: float) -> dict[str, Measurement]:
    """The gate's metrics from the raw latencies of "challenger" and "champion" (failures as infinity); without
    a champion the comparing ones are left out.
    """
    measured = alone(result, "challenger", confidence)
    new, old = result.targets["challenger"], result.targets.get("champion")
    if old is None:
        return measured
    measured["error_rate_delta"] = difference(new.failed, new.sent, old.failed, old.sent, confidence)
    for percent in (50, 90, 95, 99):
        ratio = quantile_ratio(new.latencies, old.latencies, percent / 100, confidence)
        measured[f"p{percent}_ratio"] = ratio
    return measured


def alone(result: run.Result, name: str, confidence: float) -> dict[str, Measurement]:
    """The metrics of one version by itself: error_rate and pNN_ms."""
    target = result.targets[name]
    measured = {"error_rate": proportion(target.failed, target.sent, confidence)}
    for percent in (50, 90, 95, 99):
        measured[f"p{percent}_ms"] = milliseconds(quantile(target.latencies, percent / 100, confidence))
    return measured


def generator(results: list[run.Result]) -> dict[str, Measurement]:
    """The generator's own health, the worst of several runs: facts about these runs, so without an interval.

    Only of runs within their bounds: one that is not has measured its generator, raises `run.Saturated`, and
    leaves nothing to judge the challenger by. Rounded down, so that the judge cannot see it otherwise.
    """
    worst = (max(1000 * result.late for result in results), max(result.cpu for result in results))
    sample = min(result.sent for result in results)
    floors = [math.floor(1000 * value) / 1000 for value in worst]
    return {
        metric: Measurement(value=value, low=value, high=value, sample=sample)
        for metric, value in zip(GENERATOR_METRICS, floors, strict=True)
    }


def searched(gate: Load, found: dict[str, Found], live: Callable[[str], float]) -> dict[str, Measurement]:
    """The metrics of a search: `capacity` of the challenger in requests a second, `capacity_ratio` to the champion's
    where it was searched too; the absolute ones at the highest rate that the challenger kept, or at its first.

    The ends of a capacity are the highest rate kept and the lowest broken. `live` says how many live requests a
    second a version had besides: they are work too. Raises what ended the search of a challenger without any run.
    """
    first = found["challenger"]
    measured = alone(first.reported, "challenger", gate.probe_confidence)
    measured |= generator([result for one in found.values() for result in one.results])
    low, high = first.bracket(live("challenger"))
    measured["capacity"] = Measurement(value=low, low=low, high=high, sample=first.requests, note=first.why)
    if (other := found.get("champion")) is not None and other.results:
        old_low, old_high = other.bracket(live("champion"))
        least, most = low / old_high, high / old_low if old_low else math.inf
        measured["capacity_ratio"] = Measurement(
            value=low / old_low if old_low else least,
            low=least,
            high=most,
            sample=min(first.requests, other.requests),
            note=f"{low:.4g} to {high:.4g}/s, and the champion {old_low:.4g} to {old_high:.4g}/s",
        )
    return measured


class Live:
    """The live requests beside a load: how many each version has, and whether the champion's come to harm."""

    def __init__(self, context: Context) -> None:
        self._target, self._model = context.target, context.model
        self.numbers = {"challenger": context.challenger.number}
        if context.champion is not None:
            self.numbers["champion"] = context.champion.number
        self._before = self._mark = self._now = self._observe()
        self._began = time.monotonic()
        self._seen: dict[str, list[tuple[int, float]]] = {name: [] for name in self.numbers}

    def begin(self) -> None:
        """A run begins. The counters are those of the last look, so that nothing falls between two runs."""
        self._mark, self._began = self._now, time.monotonic()

    def look(self) -> None:
        """Raises `Hurt` where, in this run, the champion has shed a live request (503), or more than one has
        failed beyond twice the share that fails without a load.
        """
        self._now = self._observe()
        if "champion" not in self.numbers:
            return
        usual, here = self._before["champion"], self._now["champion"].since(self._mark["champion"])
        expected = usual.errors / usual.requests * here.requests if usual.requests else 0.0
        if shed := here.codes.get("503", 0):
            raise Hurt(f"the champion shed {shed} live requests (503)")
        if here.errors > 1 + 2 * expected:
            raise Hurt(f"{here.errors} of the champion's {here.requests} live requests failed, {expected:.2g} expected")

    def end(self, name: str) -> None:
        """The run, one of `name`, is over: count the live requests that it had beside."""
        here = self._now[name].since(self._mark[name])
        self._seen[name].append((here.requests, time.monotonic() - self._began))

    def rate(self, name: str) -> float:
        """The live requests a second that `name` had beside its own runs."""
        seen = self._seen[name]
        return sum(requests for requests, _ in seen) / sum(seconds for _, seconds in seen) if seen else 0.0

    def _observe(self) -> dict[str, Served]:
        served = self._target.observe(self._model)
        return {name: served.get(number, Served()) for name, number in self.numbers.items()}


@dataclass(frozen=True, slots=True)
class _Requests:
    """What the load is made of; `spaced` where the times of the requests are to be kept."""

    recording: list[Recorded]
    source: str
    spaced: bool = False


def _profile(gate: Load, requests: _Requests, rate: float | None) -> tuple[run.Profile, tuple[str, ...]]:
    """The profile at that rate (None: as recorded), and the bodies to send."""
    bounds = gate.bounds()
    seconds = gate.run_time.total_seconds()
    how: dict[str, Any] = {
        "timeout": gate.request_timeout.total_seconds(),
        "headers": LOAD_HEADER,
        "max_lateness": (bounds["generator_lateness_ms"].max or 0) / 1000,
    }
    if (cpu := bounds.get("generator_cpu")) is not None and cpu.max is not None:
        how["max_cpu"] = cpu.max
    if requests.spaced:
        try:
            replayed = replay(requests.recording, seconds, rate, run.MAX_REQUESTS)
        except ValueError as error:
            raise Mistake(f"{requests.source} cannot be replayed: {error}") from error
        profile = run.Profile(replayed.rate, seconds, arrivals="recorded", times=replayed.times, **how)
        return profile, replayed.bodies
    if rate is None:
        raise Mistake(
            "there is no champion yet, so no requests are recorded: give the load gate a `rate` for the first "
            "version, or `payloads` with times"
        )
    profile = run.Profile(rate, seconds, arrivals="poisson" if gate.arrivals == "poisson" else "constant", **how)
    return profile, tuple(one.body for one in requests.recording)


def _requests(context: Context, gate: Load) -> _Requests:
    recorded = gate.arrivals == "recorded"
    if gate.payloads is not None:
        path = context.file(gate.payloads)
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise Mistake(f"the policy's payloads {path} cannot be read ({error}): one JSON body a line") from error
        if not lines:
            raise Mistake(f"the policy's payloads {path} are empty: one JSON body a line")
        found = enumerate(lines, 1)
        requests = [_timed(line, f"{path}, request {n}") if recorded else _untimed(line) for n, line in found]
        return _Requests(requests, f"requests of {path.name}", spaced=recorded)
    recent = _recent(context, RECORDING if recorded else SAMPLE)
    if recent or (recorded and context.champion is not None):
        spacing = " with their own spacing" if recorded else ""
        return _Requests(recent, f"{len(recent)} recent live requests{spacing}", spaced=recorded)
    example = registry.example_request(context.challenger.path)
    if example is None:
        raise Mistake(
            f"{context.challenger.registered.name} has no input example and there are no live requests: "
            "name a file of requests in the load gate (`payloads:`)"
        )
    return _Requests([_untimed(json.loads(example))], "the model's own input example")


def _untimed(body: Any) -> Recorded:
    return Recorded(0.0, json.dumps(body))


def _timed(line: Any, where: str) -> Recorded:
    at = line.get("at") if isinstance(line, dict) else None
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at) or "body" not in line:
        raise Mistake(
            f'{where} has no time: with `arrivals: recorded` a line is written {{"at": 12.5, "body": ...}}, in seconds'
        )
    return Recorded(float(at), json.dumps(line["body"]))


def _recent(context: Context, most: int) -> list[Recorded]:
    """The latest live requests that the champion answered well, with their times, newest last."""
    if context.champion is None:
        return []
    found: deque[Recorded] = deque(maxlen=most)
    for answer in context.target.answers(context.model, context.champion.number):
        if not answer.shadow and answer.status == 200:
            with contextlib.suppress(ValueError):
                found.append(Recorded(answer.at, json.dumps(json.loads(answer.request))))
    return list(found)

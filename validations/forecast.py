"""What a policy will need, before anything runs: how long each step takes, and the smallest regression it can see.

Pure. Evidence grows about evenly with the requests, so each check's e-process is followed along its expected path: for
a challenger that is like the champion (how long until it passes), and for ever worse ones (which of them is still
stopped within the step's time). Half of all runs take longer than such a path says; `LONG` times as long is seldom
exceeded.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.special import logsumexp
from scipy.stats import skellam

from validations.eprocess import BETTER, LEANS, TILTS, WORSE, Floats, bernoulli, stakes
from validations.gates import Canary, Load, Shadow, Watch
from validations.ledger import weighs, weights
from validations.monitor import duration
from validations.policy import Policy, Step
from validations.verdict import Bound, Value

LONG = 2.5
SLICE_SECONDS, SLICE_REQUESTS = 0.5, 10
"""A slice of a load is as long as both of these take at least."""
SIZES: Floats = np.unique(np.geomspace(1, 1e9, 400).round())
RATE_STEPS: Floats = np.geomspace(1.02, 1e4, 300)
TIME_STEPS: Floats = np.geomspace(1.01, 50, 300)


class LiveTraffic(Value):
    """The champion's live traffic: requests per second, share of errors, and latencies by bucket (edges in seconds)."""

    rate: float
    error_rate: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


class CheckForecast(Value):
    """One check: `requests` at the challenger until a like one passes (None: never), `seconds` for that, and the
    `smallest` regression (in words) that is stopped within the step's time. `mend` where it cannot be decided.
    """

    metric: str
    bound: str
    requests: int | None
    seconds: float | None
    smallest: str
    mend: str = ""


class StepForecast(Value):
    """One step: seconds that it typically takes and will hardly exceed (None: not known beforehand), and its checks."""

    step: str
    seconds: float | None
    long: float | None
    checks: tuple[CheckForecast, ...] = ()
    note: str = ""

    @property
    def decidable(self) -> bool:
        """Whether every check can be decided at this traffic."""
        return not any(check.mend for check in self.checks)


def forecast(policy: Policy, live: LiveTraffic, *, first: bool = False) -> list[StepForecast]:
    """Every step of the plan, in order."""
    money = weights(policy, first=first)
    return [_step(policy, step, live, money, first=first) for step in policy.plan(first=first)]


def _step(
    policy: Policy, step: Step, live: LiveTraffic, money: dict[tuple[str, str], float], *, first: bool
) -> StepForecast:
    gate = None if step.gate is None else policy.gates[step.gate]
    if not isinstance(gate, Shadow | Load | Canary | Watch) or (isinstance(gate, Load) and gate.rate is None):
        return StepForecast(step=step.name, seconds=None, long=None)
    setting = _Setting(policy, step, live)
    name = gate.name or gate.kind
    bounds = {m: b for m, b in policy.bounds(step, first=first).items() if weighs(m) or m == "error_ceiling"}
    checks = tuple(
        _check(policy, metric, bound, money.get((name, metric), 1.0), live, setting) for metric, bound in bounds.items()
    )
    least = max(gate.min_sample / setting.challenger, setting.dwell)
    known = [check.seconds for check in checks if check.seconds is not None]
    seconds = setting.limit if isinstance(gate, Load | Watch) else min(max([least, *known]), setting.limit)
    long = (
        setting.limit
        if isinstance(gate, Load | Watch)
        else min(max([least, *(LONG * s for s in known)]), setting.limit)
    )
    return StepForecast(step=step.name, seconds=seconds, long=long, checks=checks, note=setting.note)


class _Setting:
    """Who gets how many requests a second in a step, how long it may last, and what could be done about that."""

    def __init__(self, policy: Policy, step: Step, live: LiveTraffic) -> None:
        gate = policy.gates[step.gate] if step.gate is not None else None
        self.dwell, self.block, self.note = 0.0, 0.0, ""
        if isinstance(gate, Shadow):
            self.limit, self.challenger = gate.max.total_seconds(), live.rate * gate.mirror / 100
            self.champion = live.rate
            more = "" if gate.mirror == 100 else "a larger `mirror`, "
            self.mends = (
                f"{more}a longer `max`, a wider bound, or requests replayed by a load gate (`arrivals: recorded`)"
            )
        elif isinstance(gate, Canary):
            weight = (step.weight or 0) / 100
            self.limit, self.dwell = gate.max.total_seconds(), gate.dwell.total_seconds() if gate.dwell else 0.0
            self.challenger, self.champion = live.rate * weight, live.rate * (1 - weight)
            self.mends = "a larger last weight, a longer `max`, a wider bound, or a load gate that adds requests"
        elif isinstance(gate, Watch):
            back = gate.holdback / 100
            self.limit = gate.run_time.total_seconds()
            self.challenger, self.champion = live.rate * (1 - back), live.rate * back
            self.mends = "a longer `run_time`, a wider bound, or a `holdback` to compare with"
        else:
            assert isinstance(gate, Load)
            self.limit = gate.run_time.total_seconds()
            self.challenger = self.champion = float(gate.rate or 0)
            self.mends = "a longer `run_time`, a higher `rate`, or a wider bound"
        if not isinstance(gate, Load):
            assert gate is not None
            self.block = 3 * gate.bursts.total_seconds() if gate.bursts else 0.0
            self.note = f"compared in blocks of {self.block:g} s (`bursts`)" if self.block else ""
        self.paired = isinstance(gate, Load)
        self.pairs = isinstance(gate, Shadow)

    @property
    def most(self) -> float:
        """The requests at the challenger within the limit."""
        return self.challenger * self.limit


Path = Callable[[float], tuple[Floats, Floats]]
"""For a factor of regression (1: none): the evidence for "kept" and for "broken" after each of `SIZES` requests."""


def _check(
    policy: Policy, metric: str, bound: Bound, weight: float, live: LiveTraffic, setting: _Setting
) -> CheckForecast:
    limit = bound.max if bound.max is not None else bound.min
    assert limit is not None
    kept, broken = -math.log(policy.false_promotion), -math.log(policy.false_rollback * weight)
    path, steps, words = _path(metric, limit, live, setting)
    requests = None if path is None else _first(path(1.0)[0], kept)
    seconds = None if requests is None else requests / setting.challenger
    smallest = "" if path is None else _smallest(path, broken, setting.most, steps, words)
    mend = ""
    if path is None:
        if not setting.paired:
            mend = "nothing to compare with: add a `holdback`, or compare in the canary"
    elif requests is None:
        mend = f"the champion itself does not keep this bound: a bound that it keeps, {setting.mends}"
    elif seconds is not None and seconds > setting.limit:
        mend = f"needs {duration(seconds)} at this traffic and has {duration(setting.limit)}: {setting.mends}"
    return CheckForecast(
        metric=metric, bound=str(bound), requests=requests, seconds=seconds, smallest=smallest, mend=mend
    )


def _path(
    metric: str, limit: float, live: LiveTraffic, setting: _Setting
) -> tuple[Path | None, Floats, Callable[[float], str]]:
    """The expected path of a check's evidence, the regressions to try, and how to say one of them."""
    edges, counts = np.asarray(live.edges), np.asarray(live.counts, dtype=np.float64)

    def beyond(seconds: float) -> float:
        """The share of the champion's requests that take longer: log-linear within a bucket."""
        return _beyond(edges, counts, seconds)

    if metric in ("error_rate", "error_ceiling", "disagreement", "slice_disagreement"):
        own = live.error_rate if metric.startswith("error") else limit / 4

        def rate(factor: float) -> tuple[Floats, Floats]:
            p = own if factor == 1 else min(limit * factor, 1.0)
            bad, good = bernoulli(SIZES * p, SIZES, min(max(limit, 1e-6), 1 - 1e-6))
            return good, bad

        return rate, RATE_STEPS, lambda factor: f"{min(limit * factor, 1):.2%}"
    if metric == "error_rate_delta":

        def delta(factor: float) -> tuple[Floats, Floats]:
            worse = live.error_rate if factor == 1 else min(live.error_rate + limit * factor, 1.0)
            return _compared(worse, live.error_rate, limit, setting)

        path = delta if setting.champion else None
        return path, RATE_STEPS, lambda factor: f"{min(live.error_rate + limit * factor, 1):.2%} errors"
    q = int(metric[1:3]) / 100
    if metric.endswith("_ms"):

        def latency(factor: float) -> tuple[Floats, Floats]:
            p = beyond(limit / 1000 / factor)
            bad, good = bernoulli(SIZES * p, SIZES, 1 - q)
            return good, bad

        return latency, TIME_STEPS, lambda factor: f"{factor:.2f}x the latency"

    own_quantile = _quantile(edges, counts, q)

    def ratio(factor: float) -> tuple[Floats, Floats]:
        if setting.paired:
            return _sliced(limit, factor, max(SLICE_REQUESTS, SLICE_SECONDS * setting.challenger))
        return _compared(beyond(own_quantile * limit / factor), beyond(own_quantile), 0.0, setting)

    path = ratio if setting.champion else None
    return path, TIME_STEPS, lambda factor: f"{factor:.2f}x the latency"


def _compared(p1: float, p0: float, delta: float, setting: _Setting) -> tuple[Floats, Floats]:
    """The evidence (kept, broken) of two versions at the same time, after `SIZES` requests at the challenger."""
    share = setting.challenger / (setting.challenger + setting.champion)
    if not setting.block:
        sides = []
        for odds in (BETTER, WORSE):
            yes1, no1, yes0, no0 = stakes(p0, share, delta, odds)
            gain = share * (p1 * yes1 + (1 - p1) * no1) + (1 - share) * (p0 * yes0 + (1 - p0) * no0)
            sides.append(_grown(gain / share))
        return sides[0], sides[1]
    each = setting.challenger * setting.block
    size = min(setting.challenger, setting.champion) * setting.block
    one, two = max(p1 * size, 1e-9), max((p0 + delta) * size, 1e-9)
    worse, better = float(skellam.sf(0, one, two)), float(skellam.cdf(-1, one, two))
    flat = np.log(np.cosh(TILTS / 2))
    return (
        _grown((better * TILTS / 2 - worse * TILTS / 2 - (worse + better) * flat) / each),
        _grown((worse * TILTS / 2 - better * TILTS / 2 - (worse + better) * flat) / each),
    )


def _sliced(limit: float, factor: float, requests: float) -> tuple[Floats, Floats]:
    """Paired slices of a load: their noise is not known beforehand, so every slice is taken to be clear."""
    gain = np.log1p(LEANS) / requests
    lost = np.full(SIZES.size, -math.inf)
    return (_grown(gain), lost) if factor < limit else (lost, _grown(gain))


def _grown(gain: Floats) -> Floats:
    """The evidence of bets that gain so much a request, after each of `SIZES`."""
    grown: Floats = logsumexp(SIZES[:, None] * gain[None, :], axis=1) - math.log(gain.size)
    return grown


def _first(evidence: Floats, wanted: float) -> int | None:
    at = int(np.argmax(evidence >= wanted))
    return int(SIZES[at]) if evidence[at] >= wanted else None


def _smallest(path: Path, wanted: float, most: float, steps: Floats, words: Callable[[float], str]) -> str:
    """The smallest regression (in words) that is found within `most` requests: bisection over `steps`."""

    def found(factor: float) -> bool:
        requests = _first(path(factor)[1], wanted)
        return requests is not None and requests <= most

    if not found(float(steps[-1])):
        return "none"
    low, high = -1, steps.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(float(steps[middle])) else (middle, high)
    return words(float(steps[high]))


def _beyond(edges: Floats, counts: Floats, seconds: float) -> float:
    total = counts.sum()
    if not total or seconds <= 0:
        return 1.0
    above = 1 - np.cumsum(counts)[:-1] / total
    return float(np.interp(math.log(seconds), np.log(edges), above, left=1.0, right=float(above[-1])))


def _quantile(edges: Floats, counts: Floats, q: float) -> float:
    total = counts.sum()
    if not total:
        return float(edges[0])
    at = int(np.searchsorted(np.cumsum(counts)[:-1], q * total))
    return float(edges[min(at, edges.size - 1)])

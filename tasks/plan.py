"""What a promotion would need at the present traffic: read from the target, before anything runs."""

import time
from pathlib import Path
from typing import Any

from deployments.target import Served, ServingTarget
from tasks import history
from tasks.settings import Mistake
from validations.forecast import LiveTraffic, StepForecast, forecast
from validations.policy import Policy

HOUR = 3600.0


def plan(target: ServingTarget, policy: Policy, champion: str | None, rate: float | None) -> list[StepForecast]:
    """The forecast of every step. `rate` (requests per second) stands in for the traffic of the last hour.

    Raises `Mistake` where there is no traffic to go by and no `rate`.
    """
    if champion is None:
        return forecast(policy, LiveTraffic(rate=rate or 1.0, error_rate=0, edges=(1.0,), counts=(0, 0)), first=True)
    return forecast(policy, live_traffic(target, policy.model, champion, rate))


def live_traffic(target: ServingTarget, model: str, champion: str, rate: float | None = None) -> LiveTraffic:
    """The champion's live traffic: its rate in the last hour, its errors and latencies since the gateway started."""
    served = target.observe(model).get(champion, Served())
    if rate is None:
        rate = _rate(target, model, champion)
    if not rate:
        raise Mistake(
            f"{model} had no live requests in the last hour: send traffic to {target.gateway(model)}, "
            "or say how much there will be with --rate 5 (requests per second)"
        )
    edges = served.latency.edges or (1.0,)
    return LiveTraffic(
        rate=rate,
        error_rate=served.errors / served.requests if served.requests else 0.0,
        edges=edges,
        counts=served.latency.counts if served.latency.edges else (0, 0),
    )


def _rate(target: ServingTarget, model: str, champion: str) -> float:
    """Live requests per second in the last hour, or in as much of it as the server's last answers cover."""
    now = time.time()
    times = [a.at for a in target.answers(model, champion) if not a.shadow]
    recent = [at for at in times if now - at <= HOUR]
    if not recent:
        return 0.0
    # Where the ring holds less than an hour, the oldest answer says how far it goes back.
    covered = HOUR if len(recent) < len(times) else max(now - recent[0], 1.0)
    return len(recent) / covered


def usual(model: str) -> dict[str, float]:
    """How long each step took in the last promotion that had it (seconds), of the latest ten."""
    found: dict[str, float] = {}
    for entry in [e for e in history.entries(model) if e.kind == "promotion" and e.finished][:10]:
        for verdict in history.stored(entry.run_id).verdicts:
            evidence = verdict.evidence
            if evidence.started and evidence.finished:
                found.setdefault(verdict.step, (evidence.finished - evidence.started).total_seconds())
    return found


def as_json(steps: list[StepForecast], took: dict[str, float], policy: Path) -> dict[str, Any]:
    """The plan as data."""
    return {
        "policy": str(policy),
        "decidable": all(step.decidable for step in steps),
        "steps": [{**step.model_dump(), "last_time": took.get(step.step)} for step in steps],
    }

"""The load gate: Locust in its own process, challenger and champion under one profile in one run."""

import json
import math
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from loadtests import run
from tasks import registry
from tasks.context import Context, Seen
from tasks.serving import live_requests, milliseconds
from tasks.settings import Mistake
from validations.policy import Load
from validations.statistics import difference, proportion, quantile, quantile_ratio
from validations.verdict import Measurement

LOAD_HEADER = {"x-titleshot-load": "1"}
"""Tells the model servers that live requests go first, and that these are none."""
SAMPLE = 500
"""How many recent live requests the load is made of."""


@task(cache_policy=NO_CACHE)
def load(context: Context, gate: Load) -> Seen:
    """Send open-loop load to the versions' own paths through the gateway and measure raw latencies."""
    endpoints = context.target.deployed(context.model)
    targets = {"challenger": endpoints[context.challenger.number].url}
    if context.champion is not None:
        targets["champion"] = endpoints[context.champion.number].url
    payloads = context.folder / "payloads.jsonl"
    bodies, source = _payloads(context, gate)
    payloads.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    seconds = gate.run_time.total_seconds()
    profile = run.Profile(gate.rate, seconds, timeout=gate.request_timeout.total_seconds(), headers=LOAD_HEADER)
    result = run.run(profile, {name: f"{url}/invocations" for name, url in targets.items()}, payloads)
    latencies = {name: target.latencies for name, target in result.targets.items()}
    errors = {name: (target.failed, target.sent) for name, target in result.targets.items()}
    note = f"{gate.rate:g}/s each for {seconds:g} s, {source}"
    return Seen(measurements(latencies, errors, gate.confidence), note, {"load": summary(latencies, errors)})


def measurements(
    latencies: dict[str, Any], errors: dict[str, tuple[int, int]], confidence: float
) -> dict[str, Measurement]:
    """The gate's metrics from raw latencies in seconds (failures as infinity), by "challenger" and
    "champion"; without a champion the comparing ones are left out.
    """
    measured: dict[str, Measurement] = {}
    new = latencies["challenger"]
    old = latencies.get("champion")
    measured["error_rate"] = proportion(*errors["challenger"], confidence)
    if old is not None:
        measured["error_rate_delta"] = difference(*errors["challenger"], *errors["champion"], confidence)
    for percent in (50, 90, 95, 99):
        measured[f"p{percent}_ms"] = milliseconds(quantile(new, percent / 100, confidence))
        if old is not None:
            measured[f"p{percent}_ratio"] = quantile_ratio(new, old, percent / 100, confidence)
    return measured


def summary(latencies: dict[str, Any], errors: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Counts and sorted latencies in milliseconds (answered requests only), for the report."""
    return {
        name: {
            "requests": errors[name][1],
            "failures": errors[name][0],
            "latencies_ms": [round(v * 1000, 3) for v in sorted(values) if not math.isinf(v)],
        }
        for name, values in latencies.items()
    }


def _payloads(context: Context, gate: Load) -> tuple[list[Any], str]:
    if gate.payloads is not None:
        path = context.file(gate.payloads)
        try:
            bodies = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise Mistake(f"the policy's payloads {path} cannot be read ({error}): one JSON body a line") from error
        if not bodies:
            raise Mistake(f"the policy's payloads {path} are empty: one JSON body a line")
        return bodies, f"requests of {path.name}"
    bodies = live_requests(context, SAMPLE)
    if bodies:
        return bodies, f"{len(bodies)} recent live requests"
    example = registry.example_request(context.challenger.path)
    if example is None:
        raise Mistake(
            f"{context.challenger.registered.name} has no input example and there are no live requests: "
            "name a file of requests in the load gate (`payloads:`)"
        )
    return [json.loads(example)], "the model's own input example"

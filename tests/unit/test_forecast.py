"""The plan: what a policy will need at a traffic, before anything runs."""

import math

import numpy as np
import pytest

from validations.forecast import LiveTraffic, forecast
from validations.policy import read

EDGES = np.geomspace(0.0005, 30, 140)
SECONDS = np.random.default_rng(1).lognormal(math.log(0.02), 0.5, 5000)
COUNTS = np.bincount(np.searchsorted(EDGES, SECONDS), minlength=EDGES.size + 1)


def live(rate, error_rate=0.001):
    return LiveTraffic(
        rate=rate, error_rate=error_rate, edges=tuple(EDGES.tolist()), counts=tuple(int(c) for c in COUNTS)
    )


def policy(*gates):
    return read(f"version: 1\nmodel: m\ngates: [{', '.join(gates)}]\n")


CANARY = "{{kind: canary, weights: [5, 50], bursts: {bursts}, max: {max}, checks: {{{checks}}}}}"


def checks(steps):
    return {(step.step, check.metric): check for step in steps for check in step.checks}


@pytest.mark.parametrize("bursts", ["none", "10s"])
def test_more_traffic_takes_less_time_and_sees_smaller_regressions(bursts):
    """Ten times the requests: sooner decided, and less is overlooked."""
    asked = policy(
        CANARY.format(bursts=bursts, max="30m", checks="error_rate_delta: {max: 0.01}, p95_ratio: {max: 1.3}")
    )
    slow, fast = (checks(forecast(asked, live(rate))) for rate in (5, 50))
    for metric in ("error_rate_delta", "p95_ratio"):
        few, many = slow["canary 50%", metric], fast["canary 50%", metric]
        assert many.seconds <= few.seconds
    assert float(fast["canary 50%", "error_rate_delta"].smallest.split("%")[0]) <= float(
        slow["canary 50%", "error_rate_delta"].smallest.split("%")[0]
    )


def test_what_can_never_be_decided_says_so_with_its_mends():
    """At one request in five seconds half a percent of errors is out of reach: told before anything runs."""
    asked = policy(CANARY.format(bursts="none", max="10m", checks="error_rate_delta: {max: 0.005}"))
    steps = forecast(asked, live(0.2))
    check = checks(steps)["canary 50%", "error_rate_delta"]
    assert "has 10 minutes" in check.mend
    assert "a longer `max`" in check.mend
    assert check.smallest.endswith("errors") or check.smallest == "none"
    assert not all(step.decidable for step in steps)


def test_a_bound_that_the_champion_itself_breaks_is_told():
    """A challenger like it would never pass."""
    asked = policy(CANARY.format(bursts="none", max="10m", checks="error_rate: {max: 0.01}"))
    check = checks(forecast(asked, live(50, error_rate=0.02)))["canary 50%", "error_rate"]
    assert check.requests is None
    assert "champion itself" in check.mend


def test_only_the_deciding_step_of_a_canary_proves_the_bounds():
    """The steps before are there to limit the exposure."""
    asked = policy(CANARY.format(bursts="none", max="10m", checks="error_rate: {max: 0.02}"))
    found = forecast(asked, live(20))
    assert [step.step for step in found] == ["deploy", "canary 5%", "canary 50%", "promote"]
    assert {check.metric for check in found[1].checks} == {"error_ceiling"}
    assert found[1].seconds == pytest.approx(100 / (20 * 0.05), rel=0.5)


def test_a_watch_without_anything_to_compare_with_is_told_to_hold_back():
    """A comparison after the cut-over needs the previous champion at the same time."""
    watch = "{{kind: watch, run_time: 10m, {more}checks: {{p50_ratio: {{max: 1.5}}}}}}"
    for more, mend in (("", "`holdback`"), ("holdback: 5, bursts: none, ", "")):
        check = checks(forecast(policy(watch.format(more=more)), live(50)))["watch", "p50_ratio"]
        assert (mend in check.mend) if mend else not check.mend

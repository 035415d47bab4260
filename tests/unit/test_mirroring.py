"""A shadow step at the fake target: copies that hurt live requests end by themselves, and blame nobody."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from deployments.target import TargetUnavailable, Traffic, Version
from tasks import mirroring, observe
from tests.fakes import FakeTarget
from tests.unit.test_observe import POLICY, context, live, step
from validations.ledger import Ledger, weights
from validations.policy import read
from validations.replay import again
from validations.verdict import Outcome

LONG = read(POLICY.replace("min_sample: 40", "min_sample: 100000", 1))
"""A shadow that does not pass by itself before its limit of 30 s."""


@pytest.fixture
def target(monkeypatch) -> FakeTarget:
    """Version 1 serves and has a past of 4 ms a request. Seconds take a tenth of their time."""
    monkeypatch.setattr(mirroring, "SECOND", 0.1)
    monkeypatch.setattr(observe, "POLL", 0.05)
    target = FakeTarget(seed=1)
    fence = target.lease("m", "p")
    for number in ("1", "2"):
        target.deploy(Version("m", number, Path("nowhere"), "d"), fence)
        target.behaviour("m", number).seconds = lambda _: 0.004
    target.route(Traffic("m", "1"), fence)
    for _ in range(100):
        target.send("m", b'{"dataframe_records": [{"colour": "red"}]}')
    return target


def copied(target):
    """Whether live requests are copied now."""
    return target.traffic("m").mirror > 0


@contextmanager
def hurts(target, **how):
    """While requests are copied, the champion answers as `how` says."""
    usual = target.behaviour("m", "1")
    slow, fails = how.get("seconds"), how.get("fails")
    if slow:
        usual.seconds = lambda _: slow if copied(target) else 0.004
    if fails:
        usual.answer = lambda body: (503, b"") if copied(target) else (200, body)
    with live(target, rate=300):
        yield


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"seconds": 0.2},
            r"the copies slowed live requests: p95 4 ms before, 2\d\d ms with them, 4 ms while they were off",
        ),
        (
            {"fails": True},
            r"the copies made live requests fail: 0 % before, 100 % with them, 0 % while they were off",
        ),
    ],
)
def test_copies_that_hurt_are_switched_off_and_the_step_is_errored(target, tmp_path, how, said):
    """Not failed: no quarantine for a challenger that was never judged; what was seen is kept and replays alike."""
    there = context(target, LONG, tmp_path)
    with hurts(target, **how):
        verdict, seen = step(there, "shadow")
    assert verdict.outcome is Outcome.ERRORED
    assert re.match(said, verdict.why), verdict.why
    assert verdict.why.endswith("; mirroring was switched off")
    assert not copied(target)
    assert "series" not in seen.data
    assert seen.data["until_harm"]["blocks"]
    assert seen.data["agreement"]["disagreements"] == 0
    planned = LONG.plan()[1]
    repeated, _ = again(LONG, planned, verdict.evidence, [], Ledger(weights(LONG)), first=False)
    assert repeated.checks == verdict.checks


def test_a_healthy_shadow_is_mirrored_once_and_passes(target, tmp_path):
    """No pause, and no word about one."""
    there = context(target, read(POLICY), tmp_path)
    with live(target, rate=300):
        verdict, _ = step(there, "shadow")
    assert verdict.outcome is Outcome.PASSED, verdict.why
    assert [traffic.mirror for traffic in target.routed] == [0, 10_000, 0]
    assert "live requests got worse" not in verdict.evidence.note


def test_a_slow_spell_of_the_machine_is_told_and_stops_nothing(target, tmp_path):
    """Slow with and without copies: they are off for a moment, and the shadow goes on to its end."""
    there = context(target, read(POLICY.replace("min_sample: 40", "min_sample: 600", 1)), tmp_path)
    target.behaviour("m", "1").seconds = lambda _: 0.05
    with live(target, rate=300):
        verdict, _ = step(there, "shadow")
    assert verdict.outcome is Outcome.PASSED, verdict.why
    assert "live requests got worse once, and not by the copies" in verdict.evidence.note
    assert [traffic.mirror for traffic in target.routed] == [0, 10_000, 0, 10_000, 0]


def test_a_check_that_failed_stays_failed(target, tmp_path):
    """Every answer differs: that is the challenger's fault, whatever its copies do to live requests."""
    target.behaviour("m", "2").answer = lambda body: (500, b"")
    there = context(target, read(POLICY), tmp_path)
    with hurts(target, seconds=0.2):
        verdict, _ = step(there, "shadow")
    assert verdict.outcome is Outcome.FAILED


def test_a_gateway_that_began_anew_is_no_reason_to_stop(target, tmp_path):
    """Its counters are below those of the promotion's beginning: then there is one account only to compare with."""
    there = context(target, read(POLICY), tmp_path)
    there.began = target.observe("m")
    target._counts["m"].clear()
    for _ in range(50):
        target.send("m", b'{"dataframe_records": [{"colour": "red"}]}')
    with pytest.raises(TargetUnavailable):
        target.observe("m")["1"].since(there.began["1"])
    with live(target, rate=300):
        verdict, _ = step(there, "shadow")
    assert verdict.outcome is Outcome.PASSED, verdict.why

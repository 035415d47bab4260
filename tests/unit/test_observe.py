"""The gates that watch traffic, at the fake target: what they measure, when they end, and what they keep."""

import json
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from deployments.target import Traffic, Version
from tasks import serving
from tasks.context import Contender, Context
from tasks.observe import Notebook
from tasks.registry import Registered
from tests.fakes import FakeTarget
from validations.ledger import Ledger, weights
from validations.policy import read
from validations.promotion import Promotion
from validations.replay import again
from validations.verdict import Evidence, Outcome, judge

POLICY = """\
version: 1
model: m
gates:
  - kind: shadow
    min_sample: 40
    bursts: none
    slices: [colour]
    min_slice: 20
    max: 30s
    keep_pairs: 50
    checks: {disagreement: {max: 0.2}, slice_disagreement: {max: 0.5}, error_rate: {max: 0.2}}
  - kind: canary
    weights: [20, 50]
    min_sample: 40
    bursts: none
    max: 30s
    checks: {error_rate: {max: 0.2}, error_rate_delta: {max: 0.15}, p50_ratio: {max: 3}}
  - {kind: watch, run_time: 4s, min_sample: 40, holdback: 20, bursts: none, checks: {p50_ratio: {max: 3}}}
"""


@pytest.fixture
def target() -> FakeTarget:
    target = FakeTarget(seed=1)
    fence = target.lease("m", "p")
    for number in ("1", "2"):
        target.deploy(Version("m", number, Path("nowhere"), "d"), fence)
    target.route(Traffic("m", "1"), fence)
    return target


@contextmanager
def live(target, rate=120.0):
    """Clients that ask one request after another, until the context ends."""
    done = threading.Event()

    def ask() -> None:
        asked = 0
        while not done.wait(1 / rate):
            asked += 1
            body = {"dataframe_records": [{"colour": "red" if asked % 3 else "blue", "x": asked}]}
            target.send("m", json.dumps(body).encode())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def context(target, policy, tmp_path):
    versions = {n: Contender(Registered("m", n, None, {}), Path("nowhere"), "d", "d") for n in ("1", "2")}
    return Context(
        id="p",
        model="m",
        settings=None,
        target=target,
        fence=target.lease("m", "p"),
        base=tmp_path,
        folder=tmp_path,
        champion=versions["1"],
        challenger=versions["2"],
        previous=None,
        policy=policy,
        ledger=Ledger(weights(policy)),
    )


def step(context, name):
    """Perform one step of the policy as a flow does: (verdict, what was seen)."""
    policy = context.policy
    promotion = Promotion(id="p", champion="1", challenger="2", digest="d", policy=policy)
    planned = next(one for one in policy.plan() if one.name == name)
    gate, bounds = policy.gates[planned.gate], promotion.bounds(planned)

    def judged(measured):
        return judge(name, bounds, Evidence(measurements=dict(measured)), policy.min_sample(planned)).outcome

    if planned.kind == "shadow":
        seen = serving.shadow.fn(context, gate, judged)
    elif planned.kind == "canary":
        seen = serving.canary.fn(context, gate, planned.weight, judged)
    else:
        seen = serving.watch.fn(context, gate, judged)
    return judge(name, bounds, seen.evidence(), policy.min_sample(planned)), seen


def test_a_like_challenger_passes_and_its_evidence_says_so_again(target, tmp_path):
    """Shadow, both steps of the canary and the watch pass; from what they keep every check comes out to the bit."""
    policy = read(POLICY)
    there = context(target, policy, tmp_path)
    ledger = Ledger(weights(policy))
    with live(target):
        for name in ("shadow", "canary 20%", "canary 50%", "watch"):
            there.began = there.began or target.observe("m")
            verdict, seen = step(there, name)
            assert verdict.outcome is Outcome.PASSED, verdict.why
            kept = json.loads(json.dumps(seen.data))
            series = [serving.Series.model_validate(part) for part in (*kept["earlier"], kept["series"])]
            planned = next(one for one in policy.plan() if one.name == name)
            repeated, ledger = again(policy, planned, verdict.evidence, series, ledger, first=False)
            assert repeated.checks == verdict.checks
            assert ledger == there.ledger
            assert kept["trace"][-1]["measured"]["ledger"][0] < 20
            if name == "shadow":
                assert 0 < len(seen.lines["pairs"]) <= 50
            if name == "watch":
                target.route(Traffic("m", "1"), there.fence)
    assert [traffic.weight for traffic in target.routed if traffic.challenger == "2"] == [0, 2000, 5000]
    assert max(traffic.weight for traffic in target.routed if traffic.champion == "2") == 2000


def test_a_failing_challenger_ends_the_step_long_before_its_time(target, tmp_path):
    """Every third request fails: the first step of the canary, which asks for no bound of its own, stops it."""
    asked = iter(range(10**9))
    target.behaviour("m", "2").answer = lambda body: (500, b"") if next(asked) % 3 == 0 else (200, body)
    there = context(target, read(POLICY), tmp_path)
    began = time.monotonic()
    with live(target):
        verdict, _ = step(there, "canary 20%")
    assert verdict.outcome is Outcome.FAILED
    assert time.monotonic() - began < 20
    assert {check.metric for check in verdict.checks} == {"error_ceiling", "ledger"}


def test_what_was_seen_before_goes_on_counting(target, tmp_path):
    """Asked again with the evidence of the first time, a challenger that had failed fails at the first look."""
    target.behaviour("m", "2").seconds = lambda _: 0.05
    policy = read(POLICY)
    there = context(target, policy, tmp_path)
    with live(target):
        first, _ = step(there, "canary 50%")
        fresh = context(target, policy, tmp_path)
        fresh.series = {"canary": list(there.series["canary"])}
        second, seen = step(fresh, "canary 50%")
    assert first.outcome is second.outcome is Outcome.FAILED
    assert sum(block["seconds"] for block in seen.data["series"]["blocks"]) < 2


def test_what_a_step_saw_outlives_a_process_that_dies(target, tmp_path):
    """Cut off in the middle, even of a line, a step leaves its blocks on disk: they are those that were counted."""
    there = context(target, read(POLICY), tmp_path)
    polls = iter(range(8))

    def dies(_measured):
        if next(polls, None) is None:
            raise KeyboardInterrupt
        return Outcome.INCONCLUSIVE

    with live(target), pytest.raises(KeyboardInterrupt):
        serving.canary.fn(there, there.policy.gates[1], 20, dies)
    (path,) = tmp_path.glob("*.blocks.jsonl")
    with path.open("a") as file:
        file.write('{"seconds": 1.0, "chall')
    ((step, series),) = Notebook.read(tmp_path)
    assert step == "canary 20%"
    assert len(series.blocks) >= 2
    assert all(block.champion for block in series.blocks)
    assert series.head.edges


def test_an_undecided_step_ends_at_its_limit_and_says_what_is_missing(target, tmp_path):
    """At three requests a second nothing is decided in four seconds; the verdict says how long it would have taken."""
    policy = read(POLICY.replace("max: 30s", "max: 4s"))
    there = context(target, policy, tmp_path)
    with live(target, rate=3):
        verdict, _ = step(there, "canary 50%")
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "at the present rate" in verdict.why or "requests so far" in verdict.why
    assert policy.gates[1].max == timedelta(seconds=4)

"""Replay: the same evidence gives the same verdicts to the bit, and other bounds give those that they would have given."""

import numpy as np

from tests.unit.test_monitor import EDGES, arm, head
from validations.ledger import Ledger, weights
from validations.policy import read
from validations.promotion import Promotion
from validations.replay import again, different, replay
from validations.series import Block, Series
from validations.verdict import Evidence, Measurement, Outcome, judge

POLICY = """\
version: 1
model: m
gates:
  - kind: canary
    weights: [20, 50]
    bursts: none
    min_sample: 40
    checks: {{error_rate: {{max: {errors}}}, p50_ratio: {{max: {ratio}}}}}
"""
POLICIES = {name: read(POLICY.format(errors=errors, ratio=ratio)) for name, errors, ratio in (
    ("own", 0.05, 1.6), ("strict", 0.05, 1.02), ("loose", 0.2, 4),
)}  # fmt: skip


def record(median=0.02, policy=POLICIES["own"]):
    """A promotion and its evidence files, as a canary of two steps would leave them."""
    promotion = Promotion(id="p", champion="1", challenger="2", digest="d", policy=policy)
    ledger, data, earlier = Ledger(weights(policy)), {}, []
    random = np.random.default_rng(7)
    while (step := promotion.next_step()) is not None:
        if step.kind != "canary":
            fact = "agreement" if step.name in ("promote", "rollback") else "ready"
            evidence = Evidence(measurements={fact: Measurement.exact(1)})
            verdict = judge(step.name, promotion.bounds(step), evidence, policy.min_sample(step))
        else:
            blocks = tuple(
                Block(seconds=1, challenger=(arm(random, 15, median=median),), champion=(arm(random, 15),))
                for _ in range(60)
            )
            series = Series(head=head(), blocks=blocks)
            evidence = Evidence(measurements={"share": Measurement.exact(0.5)})
            verdict, ledger = again(policy, step, evidence, [*earlier, series], ledger, first=False)
            data[step.name] = {
                "series": series.model_dump(mode="json", exclude_defaults=True),
                "earlier": [part.model_dump(mode="json", exclude_defaults=True) for part in earlier],
            }
            earlier.append(series)
        promotion = promotion.record(verdict)
    return promotion, data


def test_a_promotion_judged_again_is_the_same_to_the_bit():
    """Promoted or failed: every check, interval and outcome of every step comes out as recorded."""
    for median, ended in ((0.02, "promoted"), (0.06, "failed at canary 20%")):
        promotion, data = record(median)
        found = replay(promotion, data)
        assert found.ended == ended
        assert different(promotion, found) == []
        stored = Promotion.model_validate_json(promotion.model_dump_json())
        assert different(stored, replay(stored, data)) == []


def test_a_verdict_that_its_evidence_does_not_bear_out_is_told():
    """Counts changed afterwards show as a step that is not the same."""
    promotion, data = record()
    block = data["canary 50%"]["series"]["blocks"][3]
    block["challenger"] = [{**block["challenger"][0], "errors": 15}]
    assert different(promotion, replay(promotion, data)) == ["canary 50%"]


def test_another_policy_says_how_it_would_have_ended():
    """Stricter bounds leave it undecided, looser ones promote what had failed: the evidence at 20 % decides them."""
    promotion, data = record()
    strict = replay(promotion, data, POLICIES["strict"])
    assert strict.ended == "inconclusive at canary 50%"
    failed, data = record(median=0.06)
    loose = replay(failed, data, POLICIES["loose"])
    assert loose.steps[1].verdict.outcome is Outcome.PASSED
    assert loose.ended == "promoted"


def test_a_gate_that_was_never_run_is_not_known():
    """A policy that asks for a load where there was none cannot be answered beyond that step."""
    text = POLICY.format(errors=0.05, ratio=1.6).replace(
        "gates:\n", "gates:\n  - {kind: load, rate: 10/s, run_time: 10s, checks: {p99_ms: {max: 100}}}\n"
    )
    promotion, data = record()
    found = replay(promotion, data, read(text))
    assert found.ended == "not known beyond deploy"
    assert EDGES

"""The ledger: one number for all evidence against a challenger, and closed testing to name what is guilty."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from validations.ledger import Ledger, weights
from validations.policy import read
from validations.verdict import Bound, Outcome

POLICY = """\
version: 1
model: m
gates:
  - kind: shadow
    checks: {error_rate: {max: 0.01}, disagreement: {max: 0.05}}
  - kind: load
    rate: 100/s
    run_time: 30s
    checks: {p99_ms: {max: 150}}
  - kind: canary
    weights: [5, 50]
    checks: {error_rate_delta: {max: 0.005}, p95_ratio: {max: 1.2}}
"""


def test_weights_are_shared_out_by_gate_and_then_by_check():
    """A canary counts twice what another gate does; ceilings and facts have no weight; all add up to 1."""
    found = weights(read(POLICY))
    assert math.fsum(found.values()) == pytest.approx(1)
    assert found["canary", "p95_ratio"] == found["load", "p99_ms"] == pytest.approx(0.25)
    assert found["shadow", "disagreement"] == pytest.approx(0.125)
    assert not any(metric == "error_ceiling" for _, metric in found)


def test_without_a_champion_the_comparing_gates_have_no_weight():
    """What falls away is no part of the promise."""
    assert weights(read(POLICY), first=True) == {("load", "p99_ms"): 1.0}


@given(st.lists(st.floats(-5, 12), min_size=1, max_size=6))
def test_closed_testing_is_what_its_definition_says(logs):
    """A check is named exactly where every set of checks that holds it has a mean of at least 20."""
    keys = [("g", str(index)) for index in range(len(logs))]
    ledger = Ledger({key: 1 / len(keys) for key in keys}, dict(zip(keys, logs, strict=True)))
    e = dict(zip(keys, np.exp(logs), strict=True))
    for key in keys:
        sets = [
            (key, *rest)
            for size in range(len(keys))
            for rest in itertools.combinations([k for k in keys if k != key], size)
        ]
        lowest = min(np.mean([e[k] for k in chosen]) for chosen in sets)
        if not math.isclose(lowest, 20, rel_tol=1e-9):
            assert ledger.guilty(key, 0.05) == (lowest >= 20)


def test_the_ledger_is_never_later_than_bonferroni():
    """Where one check alone has all the evidence that its share of the error rate asks for, the ledger has it too."""
    keys = [("g", str(index)) for index in range(4)]
    ledger = Ledger(dict.fromkeys(keys, 0.25), {keys[0]: math.log(20 / 0.25)})
    assert ledger.total > 20
    assert ledger.guilty(keys[0], 0.05)


def test_the_measurement_holds_before_it_fails():
    """Little evidence passes, much holds, and beyond the bound it fails; the note names whom it speaks against."""
    key, bound = ("canary", "p95_ratio"), Bound(max=20)
    for e, wanted in ((1.0, Outcome.PASSED), (10.0, Outcome.INCONCLUSIVE), (30.0, Outcome.FAILED)):
        measured = Ledger({key: 1.0}, {key: math.log(e)}).measurement(0.05, 100)
        assert bound.judge(measured) is wanted
        assert ("canary: p95_ratio" in measured.note) == (e > 5)


def test_what_has_not_begun_counts_one():
    """And evidence of gates that the policy does not weigh counts nothing."""
    ledger = Ledger({("a", "x"): 0.5, ("b", "y"): 0.5}).with_("a", {"x": math.log(3), "z": 50.0})
    assert ledger.total == pytest.approx(2.0)

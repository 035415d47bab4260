"""Pairs of answers: what counts as agreement, by field and by slice, whatever the order they come in."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from validations.agreement import Pairing, request_rows
from validations.policy import Tolerance
from validations.verdict import Bound, Outcome


def answer(*rows):
    return json.dumps({"predictions": list(rows)}).encode()


def pair(pairing, request_id, one, two, request=None, statuses=(200, 200)):
    pairing.add("champion", request_id, statuses[0], one, request)
    pairing.add("challenger", request_id, statuses[1], two)


def split(*carriers, **columns):
    rows = [[carrier, *columns.values()] for carrier in carriers]
    return json.dumps({"dataframe_split": {"columns": ["carrier", *columns], "data": rows}}).encode()


@pytest.mark.parametrize(
    ("one", "two", "fields"),
    [
        ([0.5], [0.5], []),
        ([0.5], [0.5 + 1e-12], []),
        ([1], [1.0], []),
        ([0.5], [0.6], ["prediction"]),
        (["late"], ["on time"], ["prediction"]),
        ([True], [1], ["shape"]),
        ([None], [0.0], ["shape"]),
        ([None], [None], []),
        ([math.nan], [math.nan], []),
        ([math.nan], [0.5], ["prediction"]),
        ([math.inf], [math.inf], []),
        ([math.inf], [1.0], ["prediction"]),
        ([[0.2, 0.8]], [[0.2, 0.7]], ["[1]"]),
        ([[0.2, 0.8]], [[0.2]], ["shape"]),
        ([{"score": 0.2, "band": "a"}], [{"score": 0.3, "band": "b"}], ["band", "score"]),
        ([{"score": 0.2, "band": "a"}], [{"band": "a", "score": 0.2}], []),
        ([{"score": 0.2}], [{"score": 0.2, "band": "a"}], ["shape"]),
        ([{"s": {"x": [1, 2]}}], [{"s": {"x": [1, 3]}}], ["s.x[1]"]),
        ([0.5, 0.6], [0.5], ["shape"]),
        ([0.5, 0.6], [0.1, 0.2], ["prediction"]),
    ],
)
def test_answers_are_compared_field_by_field(one, two, fields):
    """Numbers within the tolerance, everything else exactly; another shape is a disagreement of its own."""
    pairing = Pairing()
    pair(pairing, "r", answer(*one), answer(*two))
    assert sorted(pairing.fields) == fields
    assert pairing.disagreements == bool(fields)


def test_a_tolerance_goes_by_field():
    """Each field has its own tolerance, "*" is every other one's, and `rel` is relative to the champion."""
    pairing = Pairing(tolerances={"score": Tolerance(abs=0.1), "*": Tolerance(rel=0.5)})
    pair(pairing, "r", answer({"score": 1.0, "eta": 10}), answer({"score": 1.09, "eta": 14.9}))
    pair(pairing, "s", answer({"score": 1.0, "eta": 10}), answer({"score": 1.2, "eta": 15.1}))
    assert pairing.disagreements == 1
    assert pairing.fields == {"score": 1, "eta": 1}


@pytest.mark.parametrize(
    ("one", "two", "statuses", "differs"),
    [
        (answer(1), answer(1), (200, 500), True),
        (answer(1), answer(1), (500, 200), True),
        (b'{"error": "no a"}', b'{"error": "no b"}', (400, 400), False),
        (b"not json", answer(1), (200, 200), True),
        (b"not json", b"nor this", (200, 200), True),
        (b"same text", b"same text", (200, 200), False),
        (b"[1, 2]", b"[1, 2.0]", (200, 200), False),
        (b'{"predictions": {"a": [1, 2]}}', b'{"predictions": {"a": [1, 3]}}', (200, 200), True),
    ],
)
def test_a_pair_with_errors_is_still_a_pair(one, two, statuses, differs):
    """Another status disagrees, the same refusal agrees, and what is not JSON disagrees unless it is equal."""
    pairing = Pairing()
    pair(pairing, "r", one, two, statuses=statuses)
    assert (pairing.pairs, pairing.disagreements) == (1, differs)


def test_ids_that_come_twice_and_halves_without_another_are_counted_apart():
    """Neither is compared: a duplicated id is ambiguous, and half a pair shows nothing."""
    pairing = Pairing()
    pairing.add("champion", "twice", 200, answer(1))
    pairing.add("champion", "twice", 200, answer(2))
    pairing.add("challenger", "twice", 200, answer(1))
    pairing.add("challenger", "alone", 200, answer(1))
    pair(pairing, "good", answer(1), answer(1))
    pairing.add("challenger", "good", 200, answer(9))
    measured = pairing.measurements(0.95)
    assert {name: m.value for name, m in measured.items()} == {
        "pairs": 1,
        "unpaired": 2,
        "duplicated": 2,
        "disagreement": 0,
    }


def test_memory_is_bounded():
    """Only so many halves wait: the oldest is given up as unpaired, and never compared."""
    pairing = Pairing(max_waiting=100, examples=3)
    for at in range(1000):
        pairing.add("champion", f"lost {at}", 200, answer(at))
    assert pairing.unpaired == 1000
    pairing.add("challenger", "lost 0", 200, answer(5))
    pairing.add("challenger", "lost 999", 200, answer(999))
    assert (pairing.pairs, pairing.disagreements, pairing.unpaired) == (1, 0, 1000)
    assert sum(map(len, pairing._waiting.values())) <= 200
    for at in range(1000):
        pair(pairing, f"pair {at}", answer(0.0), answer(float(at)), split(f"carrier {at}"))
    assert len(pairing._done) <= 100
    assert [e.difference for e in pairing.examples] == [999, 998, 997]


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["champion", "challenger"]), st.integers(0, 2))))
def test_every_answer_is_counted_once(answers):
    """Whatever comes in whatever order, each answer ends in exactly one of pairs, unpaired and duplicated."""
    pairing = Pairing()
    for number, side, value in answers:
        pairing.add(side, str(number), 200, answer(value))
    voided = len(pairing._void)
    assert 2 * pairing.pairs + pairing.unpaired + pairing.duplicated + voided == len(answers)


@given(st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(random):
    """The same answers, shuffled, give the same measurements."""
    rng = np.random.default_rng(1)
    answers = []
    for at in range(60):
        value = float(rng.random())
        carrier = "US" if at % 3 else "AA"
        answers.append(("champion", str(at), 200, answer(value), split(carrier)))
        answers.append(("challenger", str(at), 200, answer(value + (at % 5 == 0)), split(carrier)))
    straight, shuffled = (Pairing(slices=["carrier"], min_slice=10) for _ in range(2))
    for one in answers:
        straight.add(*one)
    random.shuffle(answers)
    for one in answers:
        shuffled.add(*one)
    assert straight.measurements(0.95) == shuffled.measurements(0.95)


def traffic(wrong, *, slices=("carrier",), min_slice=30):
    """3,000 pairs of four carriers, with the share of disagreements in each."""
    pairing = Pairing(slices=slices, min_slice=min_slice)
    random = np.random.default_rng(0)
    for at in range(3000):
        carrier = ["AA", "US", "UA", "B6"][at % 4]
        bad = random.random() < wrong.get(carrier, 0)
        pair(pairing, str(at), answer(0.25), answer(0.75 if bad else 0.25), split(carrier, hour=at % 24))
    return pairing


def test_the_slice_that_disagrees_is_named():
    """A challenger that errs for one carrier passes overall, fails in the slice, and the evidence names it."""
    measured = traffic({"US": 0.1}).measurements(0.95)
    assert Bound(max=0.05).judge(measured["disagreement"]) is Outcome.PASSED
    worst = measured["slice_disagreement"]
    assert Bound(max=0.05).judge(worst) is Outcome.FAILED
    assert worst.where == "carrier = US"
    assert worst.note.endswith("of 750")
    assert worst.sample == 3000


def test_slices_that_all_agree_pass():
    """Where nothing disagrees, the interval of the worst of all slices is still narrow enough to pass."""
    worst = traffic({}, slices=("carrier", "hour")).measurements(0.95)["slice_disagreement"]
    assert (worst.value, worst.low) == (0, 0)
    assert Bound(max=0.08).judge(worst) is Outcome.PASSED


def test_small_slices_are_pooled_and_judged_together():
    """Values too rare to be judged one by one are judged as "other", so none of them is out of sight."""
    pairing = Pairing(slices=["carrier"], min_slice=100)
    for at in range(1000):
        rare = at % 10 == 0
        request = split(f"rare {at}" if rare else "AA")
        pair(pairing, str(at), answer(0), answer(1 if rare else 0), request)
    assert pairing.by_slice() == [("carrier", "other", 100, 100), ("carrier", "AA", 0, 900)]
    assert pairing.measurements(0.95)["slice_disagreement"].where == "carrier = other"


def test_before_a_slice_is_large_enough_nothing_is_decided():
    """With too few pairs in every slice the measurement is [0, 1]: undecided, neither passed nor errored."""
    pairing = Pairing(slices=["carrier"], min_slice=30)
    for at in range(20):
        pair(pairing, str(at), answer(0), answer(0), split("AA"))
    measured = pairing.measurements(0.95)["slice_disagreement"]
    assert Bound(max=0.05).judge(measured) is Outcome.INCONCLUSIVE
    assert "30 pairs" in measured.note


def test_a_misspelt_slice_is_refused():
    """A column that no request carries would look like agreement everywhere, so it is an error that names it."""
    with pytest.raises(ValueError, match="'carier'"):
        traffic({}, slices=("carier",)).measurements(0.95)


def test_without_pairs_there_is_no_disagreement_to_measure():
    """No pairs: `disagreement` is left out, and the judge errs."""
    pairing = Pairing(slices=["carrier"])
    pairing.add("champion", "a", 200, answer(1))
    assert set(pairing.measurements(0.95)) == {"pairs", "unpaired", "duplicated"}


def test_a_request_of_many_rows_counts_once_in_each_slice_it_touches():
    """The unit is the request; only the slices of the rows that disagree are blamed."""
    pairing = Pairing(slices=["carrier"], min_slice=1)
    pair(pairing, "r", answer(1, 2, 3, 4), answer(1, 2, 9, 9), split("AA", "AA", "US", "US"))
    pair(pairing, "s", answer(1, 2), answer(1), split("AA", "US"))
    assert pairing.pairs == 2
    assert pairing.by_slice() == [("carrier", "US", 2, 2), ("carrier", "AA", 1, 2)]


def test_missing_values_are_a_slice():
    """A null, an absent column and a request that cannot be read fall in the slice "missing"."""
    pairing = Pairing(slices=["carrier"], min_slice=1)
    for number, request in enumerate([split(None), b'{"inputs": {"x": [1]}}', b"garbage", None, split("AA")]):
        pair(pairing, str(number), answer(1), answer(1), request)
    assert sorted(pairing.by_slice()) == [("carrier", "AA", 0, 1), ("carrier", "missing", 0, 4)]


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}},
        {"dataframe_records": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]},
        {"instances": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}], "params": {"t": 1}},
        {"inputs": {"a": [1, 2], "b": ["x", "y"]}},
        {"inputs": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]},
    ],
)
def test_rows_are_read_from_every_format_of_mlflow(body):
    """The four formats with named columns hold the same rows."""
    assert request_rows(json.dumps(body)) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"inputs": [[1]]}', '{"dataframe_split": {"data": 3}}'])
def test_what_holds_no_rows_is_refused(body):
    """Anything else raises ValueError."""
    with pytest.raises(ValueError):
        request_rows(body)


def test_examples_are_kept_for_people():
    """The pair with the largest difference comes first, with both answers and the request."""
    pairing = Pairing(examples=2)
    for at, wrong in enumerate([0.1, 5.0, 0.3]):
        pair(pairing, str(at), answer(0.0), answer(wrong), split("AA"))
    first, second = pairing.examples
    assert (first.request_id, first.field, first.difference) == ("1", "prediction", 5.0)
    assert (second.request_id, second.difference) == ("2", 0.3)
    assert first.challenger == '200 {"predictions": [5.0]}'
    assert "AA" in first.request

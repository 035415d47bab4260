"""Pairs of answers: what counts as agreement, by field and by slice, whatever the order they come in."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from validations.agreement import Pairing, request_rows, request_table
from validations.gates import Tolerance
from validations.policy import PolicyError, read
from validations.slices import LEARN
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


KINDS = {
    "labels, equal": ({"prediction": {"kind": "label"}}, 1, 1.0, []),
    "labels, other": ({"prediction": {"kind": "label"}}, "a", "b", ["prediction"]),
    "a label is no number": ({"prediction": {"kind": "label"}}, 1, True, ["prediction"]),
    "labels by the highest of a list": ({"prediction": {"kind": "label"}}, [0.2, 0.8], [0.4, 0.6], []),
    "labels by another one": ({"prediction": {"kind": "label"}}, [0.2, 0.8], [0.6, 0.4], ["prediction"]),
    "labels by a list, for every field": ({"*": {"kind": "label"}}, {"p": [0.2, 0.8]}, {"p": [0.6, 0.4]}, ["p"]),
    "labels by the key of the highest": ({"p": {"kind": "label"}}, {"p": {"a": 2, "b": 1}}, {"p": {"a": 5, "b": 4}}, []),
    "labels by another key": ({"p": {"kind": "label"}}, {"p": {"a": 2, "b": 1}}, {"p": {"a": 5, "b": 6}}, ["p"]),
    "a list of other things is no label": ({"prediction": {"kind": "label"}}, ["a", "b"], ["a", "c"], ["[1]"]),
    "a key called prediction": ({"prediction": {"kind": "label"}}, {"prediction": 1, "x": 2}, {"prediction": 1, "x": 1}, ["x"]),
    "numbers in text": ({"price": {"kind": "number", "abs": 0.1}}, {"price": "12.50"}, {"price": 12.55}, []),
    "numbers in text, too far": ({"price": {"kind": "number", "abs": 0.1}}, {"price": "12.50"}, {"price": "12.7"}, ["price"]),
    "a number that is none": ({"price": {"kind": "number"}}, {"price": "dear"}, {"price": "dear"}, []),
    "sets in any order": ({"ids": {"kind": "set"}}, {"ids": [1, 2, 3]}, {"ids": [3, 1.0, 2, 2]}, []),
    "sets of other things": ({"ids": {"kind": "set"}}, {"ids": [1, 2]}, {"ids": [True, 2]}, ["ids"]),
    "sets alike enough": ({"ids": {"kind": "set", "similar": 0.5}}, {"ids": [1, 2, 3]}, {"ids": [1, 2, 4]}, []),
    "sets not alike enough": ({"ids": {"kind": "set", "similar": 0.6}}, {"ids": [1, 2, 3]}, {"ids": [1, 2, 4]}, ["ids"]),
    "sets of objects": ({"ids": {"kind": "set"}}, {"ids": [{"a": 1, "b": 2}, []]}, {"ids": [[], {"b": 2, "a": 1}]}, []),
    "empty sets": ({"ids": {"kind": "set"}}, {"ids": []}, {"ids": []}, []),
    "texts but for white space": ({"prediction": {"kind": "text"}}, " on\n time", "on time ", []),
    "texts in another case": ({"prediction": {"kind": "text"}}, "On time", "on time", ["prediction"]),
    "texts whatever the case": ({"prediction": {"kind": "text", "case": False}}, "On time", "on time", []),
    "texts alike enough": ({"prediction": {"kind": "text", "similar": 0.7}}, "a b c d", "a b c e", []),
    "texts not alike enough": ({"prediction": {"kind": "text", "similar": 0.8}}, "a b c d", "a b c e", ["prediction"]),
    "the same words in another order": ({"prediction": {"kind": "text"}}, "not good, bad", "bad not good,", ["prediction"]),
    "JSON in text": ({"body": {"kind": "json"}}, {"body": '{"a": 1, "b": [2]}'}, {"body": '{"b":[2.0],"a":1}'}, []),
    "JSON in text, other inside": ({"body": {"kind": "json"}}, {"body": '{"a": [1]}'}, {"body": '{"a": [2]}'}, ["body.a[0]"]),
    "JSON in text, with a tolerance": (
        {"body": {"kind": "json"}, "body.a": {"abs": 1}}, {"body": '{"a": [1], "b": 1}'}, {"body": '{"a": [2], "b": 2}'}, ["body.b"],
    ),
    "JSON that is none": ({"body": {"kind": "json"}}, {"body": "{"}, {"body": "{"}, []),
    "JSON in one of the two": ({"body": {"kind": "json"}}, {"body": "[1]"}, {"body": [1]}, []),
    "an ignored field": ({"at": {"ignore": True}}, {"at": 1, "p": 2}, {"at": 5, "p": 2}, []),
    "an ignored field that is missing": ({"at": {"ignore": True}}, {"at": {"x": 1}, "p": 2}, {"p": 3}, ["p"]),
    "another field that is missing": ({"at": {"ignore": True}}, {"at": 1, "p": 2}, {"at": 1}, ["shape"]),
    "all but one ignored": ({"*": {"ignore": True}, "a.p": {"abs": 0}}, {"a": {"p": 1, "q": 1}, "z": 1}, {"a": {"p": 2, "q": 2}}, ["a.p"]),
    "a place in a list": ({"xs[*].p": {"abs": 1}}, {"xs": [{"p": 1}, {"p": 5, "q": 1}]}, {"xs": [{"p": 2}, {"p": 7, "q": 2}]}, ["xs[1].p", "xs[1].q"]),
    "all under a path": ({"a": {"abs": 1}}, {"a": {"b": [1, {"c": 2}]}, "d": 1}, {"a": {"b": [2, {"c": 3}]}, "d": 2}, ["d"]),
    "the nearest path": ({"a": {"abs": 1}, "a.b": {"abs": 0}}, {"a": {"b": 1, "c": 1}}, {"a": {"b": 2, "c": 2}}, ["a.b"]),
    "keys with brackets": ({"a": {"abs": 1}}, {"x]": 1, "a[b]": 1}, {"x]": 2, "a[b]": 1}, ["x]"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_field_is_compared_in_its_way(name):
    """Labels, numbers, sets, texts and JSON; what is ignored is not looked at; the nearest named path counts."""
    tolerances, one, two, fields = KINDS[name]
    pairing = Pairing(tolerances={path: Tolerance(**how) for path, how in tolerances.items()})
    pair(pairing, "r", answer(one), answer(two))
    assert sorted(pairing.fields) == fields


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["", "a", "1", "[1]", "{"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "prediction", "x]", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)
TOLERANCES = st.dictionaries(
    st.sampled_from(["*", "prediction", "a", "b", "a.b", "[0]", "a[*]", "[*].a"]),
    st.one_of(
        st.builds(Tolerance, abs=st.sampled_from([0, 1]), kind=st.sampled_from(["auto", "number", "json"])),
        st.builds(Tolerance, kind=st.sampled_from(["set", "text"]), similar=st.sampled_from([0.5, 1])),
        st.builds(Tolerance, kind=st.just("label")),
        st.builds(Tolerance, ignore=st.just(True)),
    ),
    max_size=3,
)


@given(JSON, TOLERANCES)
def test_every_answer_agrees_with_itself(one, tolerances):
    """Whatever the tolerances, the same answer written otherwise is the same answer."""
    pairing = Pairing(tolerances=tolerances)
    pair(pairing, "r", answer(one), answer(one) + b" ")
    assert not pairing.fields


@given(JSON, JSON, TOLERANCES)
def test_any_two_answers_can_be_compared(one, two, tolerances):
    """Whatever was answered, there is one pair, and it disagrees in some field or in none; in which, does not depend on the sides."""
    here, there = Pairing(tolerances=tolerances), Pairing(tolerances=tolerances)
    pair(here, "r", answer(one), answer(two))
    pair(there, "r", answer(two), answer(one))
    assert here.pairs == 1
    assert bool(here.fields) == here.disagreements
    assert here.fields == there.fields


def test_an_answer_nested_too_deeply_is_another_shape():
    """It cannot be read, so it disagrees; it never ends the gate."""
    pairing = Pairing()
    pair(pairing, "r", b"[" * 100_000 + b"]" * 100_000, answer(1))
    pair(pairing, "s", b"[" * 900 + b"1" + b"]" * 900, b"[" * 900 + b"2" + b"]" * 900)
    assert pairing.disagreements == 2


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("tolerances: {p: {similar: 0.5}}", "kind: set"),
        ("tolerances: {p: {case: false}}", "kind: text"),
        ("tolerances: {p: {kind: label, abs: 1}}", "for numbers"),
        ("tolerances: {p: {kind: lable}}", "label"),
        ("tolerances: {p: {knid: label}}", "did you mean 'kind'"),
        ("tolerances: {'*': {ignore: true}, p: {ignore: true}}", "nothing is compared"),
        ("labelled: {label_acuracy: {min: 0.9}}", "did you mean 'label_accuracy'"),
        ("labelled: {label_accuracy: 0.9}", "a bound is written like"),
        ("labelled: {label_accuracy: {min: 0.9}}, keep_pairs: 0", "`keep_pairs` is 0"),
        ("find_slices: maybe", "find_slices"),
    ],
)
def test_a_slip_in_how_to_compare_is_refused(field, told):
    """The policy says in one line what is wrong and how to mend it."""
    text = f"version: 1\nmodel: m\ngates: [{{kind: shadow, {field}, checks: {{disagreement: {{max: 0.1}}}}}}]"
    with pytest.raises(PolicyError, match=told) as caught:
        read(text, "p.yaml")
    assert "\n" not in str(caught.value)


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
    assert len(pairing._done) <= 200
    assert [e.difference for e in pairing.examples] == [999, 998, 997]


def test_waiting_answers_are_bounded_in_bytes_too():
    """However large the answers are: the oldest make room, and what was paired or voided takes none."""
    pairing = Pairing(max_bytes=10_000)
    for at in range(100):
        pair(pairing, f"pair {at}", b"x" * 4000, b"x" * 4000, b"y" * 1000)
        pairing.add("challenger", "twice", 200, b"x" * 4000)
    assert (pairing.pairs, pairing.unpaired) == (100, 0)
    for at in range(100):
        pairing.add("champion", str(at), 200, b"x" * 4000, b"y" * 1000)
    assert sum(map(len, pairing._waiting.values())) == 2
    assert pairing.unpaired == 100
    pair(pairing, "large", b"x" * 20_000, b"x" * 20_000)
    assert pairing.pairs == 100


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
    """Pairs whose value was still rare are judged as "other", so none of them is out of sight."""
    pairing = Pairing(slices=["carrier"], min_slice=100)
    for at in range(1000):
        rare = at % 10 == 0
        request = split(f"rare {at}" if rare else "AA")
        pair(pairing, str(at), answer(0), answer(1 if rare else 0), request)
    assert pairing.by_slice() == [("carrier", "other", 100, 200), ("carrier", "AA", 0, 900)]
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
    assert request_table(json.dumps(body)) == (["a", "b"], [[1, "x"], [2, "y"]])


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


SECRET = "bob@example.org"


@pytest.mark.parametrize(
    ("names", "request_body", "one", "two"),
    [
        (["email"], {"dataframe_split": {"columns": ["email", "x"], "data": [[SECRET, 1]]}}, [1], [2]),
        (["email"], {"dataframe_records": [{"email": SECRET, "x": 1}]}, [1], [2]),
        (["email"], {"inputs": {"email": [SECRET], "x": [1]}}, [1], [2]),
        (["who.email"], {"instances": [{"who": {"email": SECRET}}]}, [1], [2]),
        (["who"], {"instances": [{"who": {"email": [SECRET]}}]}, [1], [2]),
        (["email"], {"instances": [{"x": 1}], "params": {"email": SECRET}}, [1], [2]),
        (["email"], {"inputs": {"x": [1]}}, [{"email": SECRET, "p": 1}], [{"email": "", "p": 1}]),
        (["prediction"], {"inputs": {"x": [1]}}, [SECRET], ["b"]),
        (["[1]"], {"inputs": {"x": [1]}}, [[1, SECRET]], [[1, "b"]]),
        (["names[*]"], {"inputs": {"x": [1]}}, [{"names": ["a", SECRET]}], [{"names": []}]),
        (["email"], {"inputs": {"x": [1]}}, [json.dumps({"email": SECRET})], ["{}"]),
    ],
)
def test_redacted_fields_are_kept_nowhere(names, request_body, one, two):
    """Neither request nor answers of an example, nor the pairs kept for labels, hold a value of what is redacted."""
    pairing = Pairing(redact=names, keep_pairs=5)
    pair(pairing, "r", answer(*one), answer(*two), json.dumps(request_body).encode())
    (example,) = pairing.examples
    told = example.model_dump_json() + "".join(pairing.kept())
    assert SECRET not in told
    assert "[redacted]" in told
    assert SECRET in Pairing(redact=["other"])._redaction.request(json.dumps([request_body, one]).encode(), 9999)


@pytest.mark.parametrize("body", [b"email=" + SECRET.encode(), b"\xff" + SECRET.encode(), b"[[" + SECRET.encode()])
def test_what_cannot_be_read_is_redacted_whole(body):
    """Nobody knows what it holds: text, broken JSON, and the words of an error."""
    pairing = Pairing(redact=["email"], keep_pairs=5)
    pair(pairing, "r", body, answer(1), body)
    pair(pairing, "s", answer(SECRET), answer(1), statuses=(500, 200))
    assert SECRET not in "".join(example.model_dump_json() for example in pairing.examples) + "".join(pairing.kept())


def test_slices_of_a_redacted_column_show_no_value():
    """They are judged like all others, under a number."""
    pairing = Pairing(slices=["carrier"], redact=["carrier"], min_slice=5)
    for at in range(40):
        pair(pairing, str(at), answer(0), answer(1), split(["AA", "US"][at % 2]))
    assert pairing.by_slice() == [("carrier", "[redacted] 1", 20, 20), ("carrier", "[redacted] 2", 20, 20)]
    assert "AA" not in pairing.measurements(0.95)["slice_disagreement"].model_dump_json()


def test_only_the_first_pair_of_a_session_counts():
    """The others are counted apart, and neither compared nor kept; requests without the column each count."""
    pairing = Pairing(once_per="session", slices=["carrier"], min_slice=1, keep_pairs=9)
    for at, session in enumerate(["a", "b", "a", None, None, "a", "b"]):
        pair(pairing, str(at), answer(0), answer(at), split("AA", session=session))
    pair(pairing, "bare", answer(0), answer(1), split("AA"))
    assert (pairing.pairs, pairing.repeated, pairing.disagreements) == (5, 3, 4)
    assert pairing.by_slice() == [("carrier", "AA", 4, 5)]
    assert [json.loads(line)["id"] for line in pairing.kept()] == ["0", "1", "3", "4", "bare"]
    assert pairing.measurements(0.95)["repeated"].value == 3


def test_a_misspelt_session_is_refused():
    """A column that no request carries would count every pair, so it is an error that names it."""
    pairing = Pairing(once_per="sesion")
    pair(pairing, "r", answer(1), answer(1), split("AA"))
    with pytest.raises(ValueError, match="'sesion'"):
        pairing.measurements(0.95)


def test_the_slice_that_disagrees_is_found():
    """Nobody listed a column: the one range of the one column in which the challenger errs is named all the same."""
    random = np.random.default_rng(0)
    pairing = Pairing(find_slices=True)
    for at in range(3000 + LEARN):
        distance, carrier = float(random.integers(0, 1000)), ["AA", "US", "UA"][at % 3]
        bad = distance >= 800 and random.random() < 0.5
        pair(
            pairing, str(at), answer(0.25), answer(0.75 if bad else 0.25), split(carrier, distance=distance, day=at % 7)
        )
    worst = pairing.measurements(0.95, at=[0.2])["slice_disagreement"]
    assert Bound(max=0.2).judge(worst) is Outcome.FAILED
    assert worst.where.startswith("distance = 8")
    assert worst.where.endswith("and over")
    assert worst.sample == 3000 + LEARN


def test_kept_pairs_are_the_first_and_bounded():
    """So many pairs are kept as predictions, in order of arrival; an answer that is none is null."""
    pairing = Pairing(keep_pairs=3)
    pair(pairing, "a", answer(1, 2), answer(1, 3))
    pair(pairing, "b", answer(1), b"oops", statuses=(200, 500))
    pair(pairing, "c", b"no JSON", b"[4]")
    pair(pairing, "d", answer(1), answer(1))
    assert [json.loads(line) for line in pairing.kept()] == [
        {"id": "a", "champion": [1, 2], "challenger": [1, 3]},
        {"id": "b", "champion": [1], "challenger": None},
        {"id": "c", "champion": None, "challenger": [4]},
    ]

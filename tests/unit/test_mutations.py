"""The mutation corpus: every breaking change is blocked and says how to mend it, no harmless one is."""

import itertools
import json
import logging
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus.answers import ANSWERS, FOUR, FOUR_AGAIN, PP, QQ
from tests.corpus.cases import MENDS
from tests.corpus.data import COLUMNS, FRAMES, flights
from tests.corpus.signatures import CLASSES, INPUTS, INSIDE, PAIRS, PARAMS, SIGNATURES
from validations.answers import ENOUGH, compare, declared
from validations.expectations import suite_from, validate
from validations.signature import compare as compare_signatures
from validations.signature import counted

MEND = re.compile(rf": ({'|'.join(MENDS)})\b")
GROUPS = {"signatures": SIGNATURES, "classes": CLASSES, "answers": ANSWERS, "data": [*COLUMNS, *FRAMES]}


def test_the_corpus_is_large_and_no_case_is_there_twice():
    """At least 80 breaking and 80 harmless changes, each group has both, and every case has its own name."""
    cases = [case for group in GROUPS.values() for case in group]
    assert sum(case.breaking for case in cases) >= 80
    assert sum(not case.breaking for case in cases) >= 80
    for name, group in GROUPS.items():
        assert {case.breaking for case in group} == {True, False}, name
        assert len({(str(case), str(case.old) if name == "data" else "") for case in group}) == len(group), name


def judged(case, differences):
    breaking = [difference for difference in differences if difference.breaking]
    assert bool(breaking) == case.breaking, [difference.message for difference in differences]
    if case.breaking:
        assert any(case.says in difference.message for difference in breaking), breaking
        for difference in breaking:
            assert MEND.search(difference.message), difference.message
            assert "\n" not in difference.message
    measured = counted("breaking", differences)["breaking"]
    assert measured.value == len(breaking)


@pytest.mark.parametrize("case", SIGNATURES, ids=str)
def test_signatures(case):
    """A change of signature is blocked where it breaks, with its column and mend, and let through where not."""
    judged(case, compare_signatures(case.old, case.new))


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_declared_classes(case):
    """Labels that two versions declare may not change, nor their order."""
    judged(case, declared(case.old, case.new))


def replies(rows):
    return [(json.dumps({"predictions": rows}), "")]


@pytest.mark.parametrize("case", ANSWERS, ids=str)
def test_answers(case):
    """A change of what callers read is blocked, and another opinion is not."""
    outputs, labels = case.extra or ([], (None, None))
    judged(case, compare(replies(case.old), replies(case.new), outputs=outputs, labels=labels))


@pytest.mark.parametrize("case", ANSWERS, ids=str)
def test_answers_in_many_requests(case):
    """Asked row by row the same is found as in one request: how callers batch does not matter."""
    if not isinstance(case.old, list) or not isinstance(case.new, list) or len(case.old) != len(case.new):
        return
    if not case.old:
        return
    outputs, labels = case.extra or ([], (None, None))
    sides = [[reply for row in side for reply in replies([row])] for side in (case.old, case.new)]
    judged(case, compare(*sides, outputs=outputs, labels=labels))


@pytest.fixture(scope="module")
def reference():
    return flights(5000, 0)


@pytest.fixture(scope="module")
def features():
    return flights(3000, 1)


@pytest.fixture(scope="module")
def unmet(reference, features):
    """All changes of single columns beside each other in one frame: case to unmet sentences."""
    old = pd.DataFrame({str(at): reference[case.old] for at, case in enumerate(COLUMNS)})
    new = pd.DataFrame({str(at): case.new(features[case.old]) for at, case in enumerate(COLUMNS)})
    found = {at: [] for at in range(len(COLUMNS))}
    for result in validate(suite_from(old, "columns"), new).unmet:
        found[int(result.column)].append(result.sentence)
    return found


@pytest.mark.parametrize("at", range(len(COLUMNS)), ids=[f"{case.old}: {case}" for case in COLUMNS])
def test_a_column_of_data(unmet, at):
    """Units, codings, nulls and types that moved are unmet; another way to store the same is not."""
    case = COLUMNS[at]
    assert bool(unmet[at]) == case.breaking, unmet[at]
    assert all(case.says in sentence and f"'{at}'" in sentence for sentence in unmet[at])


@pytest.fixture(scope="module")
def suite(reference):
    return suite_from(reference, "flights")


@pytest.mark.parametrize("case", FRAMES, ids=str)
def test_a_frame_of_data(suite, features, case):
    """Columns that are gone, renamed or swapped are unmet by name; order, index and sample do not matter."""
    sentences = [result.sentence for result in validate(suite, case.new(features)).unmet]
    assert bool(sentences) == case.breaking, sentences
    assert not case.breaking or any(case.says in sentence for sentence in sentences)


# Held against MLflow itself ---------------------------------------------------------------------------------

VALUES = {
    "boolean": [True, False],
    "integer": [1, -7, 2**24 + 1, 2**31 - 1],
    "long": [1, 2**24 + 1, 2**31, 2**40],
    "float": [1.5, 2.0, 0.1],
    "double": [1.25, 1e300, 0.1, 3],
    "string": ["a", "1", "2020-01-01", "true"],
    "datetime": ["2020-01-01T00:00:00"],
    "binary": ["aGVsbG8="],
    "any": [1, "a", None, [1], {"k": 2}],
    "sparkml_vector": [[1.0, 2.5]],
}


def values(spec):
    """Values of a type, as they come in JSON."""
    kind = spec["type"]
    if kind == "array":
        return [[value, value] for value in values(spec["items"])]
    if kind == "map":
        return [{"k": value} for value in values(spec["values"])]
    if kind == "object":
        inside = {name: values(inner) for name, inner in spec["properties"].items()}
        first = {name: found[0] for name, found in inside.items()}
        bare = {name: first[name] for name, inner in spec["properties"].items() if inner["required"]}
        return [first, bare, *({**first, name: other} for name, found in inside.items() for other in found[1:])]
    if kind == "tensor":
        shape = [2 if size == -1 else size for size in spec["tensor-spec"]["shape"]]
        dtype = np.dtype(spec["tensor-spec"]["dtype"])
        return [np.zeros(shape, "U1" if dtype.kind in "OU" else dtype).tolist()]
    return VALUES[kind]


def requests(schema):
    """Requests in every form that callers use, each with all columns and with the required ones alone."""
    if schema[0]["type"] == "tensor":
        for form in ("instances", "inputs"):
            named = {spec["name"]: values(spec)[0] for spec in schema if "name" in spec}
            yield {form: named or values(schema[0])[0]}
        return
    names = [spec.get("name") for spec in schema]
    firsts = [values(spec)[0] for spec in schema]
    rows = [[*firsts[:at], value, *firsts[at + 1 :]] for at, spec in enumerate(schema) for value in values(spec)]
    wanted = [at for at, spec in enumerate(schema) if spec.get("required", True)]
    for row, kept in itertools.product(rows, (range(len(schema)), wanted)):
        if names[0] is None:
            yield {"dataframe_split": {"data": [row]}}
            continue
        record = {names[at]: row[at] for at in kept}
        yield {"dataframe_split": {"columns": list(record), "data": [list(record.values())]}}
        for form in ("dataframe_records", "instances", "inputs"):
            yield {form: [record]}


def served(schema, request):
    """Whether MLflow takes the request, and what the model would see: column to values."""
    from mlflow.models.utils import _enforce_schema
    from mlflow.pyfunc.scoring_server import infer_and_parse_data
    from mlflow.types import Schema

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    made = Schema.from_json(json.dumps(schema))
    try:
        seen = _enforce_schema(infer_and_parse_data(json.loads(json.dumps(request)), made), made)
    except Exception:
        return False, {}
    columns = {"": seen} if isinstance(seen, np.ndarray) else {name: list(seen[name]) for name in list(seen)}
    return True, plain(columns)


def plain(value):
    """NumPy's arrays and scalars as lists and Python's own."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | np.ndarray):
        return [plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def same(one, two):
    if isinstance(one, dict) and isinstance(two, dict):
        return all(key in two and same(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, int) and isinstance(two, int | float):
        return one == two
    if isinstance(one, float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=1e-6) or (math.isnan(one) and math.isnan(two))
    return type(one) is type(two) and one == two


def lost(case):
    """The champion's requests that the challenger's signature refuses, or hands to the model as another value."""
    old, new = case.old["inputs"], case.new["inputs"]
    for request in requests(old):
        taken, before = served(old, request)
        if not taken:
            continue
        taken, after = served(new, request)
        if not taken or not all(same(before[name], after[name]) for name in before if name in after):
            yield request


@pytest.mark.parametrize("case", [c for c in (*PAIRS, *INSIDE, *INPUTS) if not c.breaking], ids=str)
def test_mlflow_serves_what_is_harmless(case):
    """Every request that MLflow takes for the champion's signature it takes for the challenger's, values unchanged.

    `extra` names the one form for which that is not so, as the message of the difference tells."""
    assert {form for request in lost(case) for form in request} == ({case.extra} if case.extra else set())
    if case.extra:
        messages = [difference.message for difference in compare_signatures(case.old, case.new)]
        assert any(f"`{case.extra}`" in message for message in messages)


@pytest.mark.parametrize("case", [c for c in PAIRS if c.breaking], ids=str)
def test_mlflow_refuses_or_changes_what_breaks(case):
    """Of every pair of types called breaking, MLflow refuses a request or hands the model another value."""
    assert next(lost(case), None) is not None


REFUSED = [
    c
    for c in INPUTS
    if c.breaking
    and re.search(r"new|required|swapped|gone|feature|rank|size|lists?\b", c.name)
    and "silence" not in c.name
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_mlflow_refuses_what_is_new_required_or_shaped_otherwise(case):
    """Required columns and properties, other shapes and lists really cost requests."""
    assert next(lost(case), None) is not None


@pytest.mark.parametrize("case", [c for c in PARAMS if not c.breaking], ids=str)
def test_mlflow_serves_harmless_params(case):
    """A request that sets the champion's params, or none, reaches the challenger with the same ones."""
    from mlflow.models.utils import _enforce_params_schema
    from mlflow.types import ParamSchema

    old, new = (
        ParamSchema.from_json(json.dumps(side["params"])) if side["params"] else None for side in (case.old, case.new)
    )
    defaults = {param["name"]: param["default"] for param in case.old["params"] or []}
    for sent in (defaults, {}):
        before, after = _enforce_params_schema(dict(sent), old) or {}, _enforce_params_schema(dict(sent), new) or {}
        assert all(same(before[name], after[name]) for name in before)


# Properties --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.sampled_from(["late", "on time", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON, max_size=40))
def test_a_model_never_breaks_its_own_contract(rows):
    """Whatever a champion answers: the same answers have no difference, in order or in any other order of rows."""
    assert compare(replies(rows), replies(rows)) == []


@given(st.lists(JSON, max_size=6), st.lists(JSON, max_size=6))
def test_any_two_answers_can_be_compared(old, new):
    """Nothing that JSON can say makes the comparison raise, and what it finds is told with a mend."""
    for difference in compare(replies(old), replies(new)):
        assert difference.breaking
        assert MEND.search(difference.message), difference.message


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_unrelated_probabilities_are_no_other_order(columns):
    """Of 300 pairs of models that have nothing to do with each other, none is said to have its classes swapped."""
    random = np.random.default_rng(columns)
    alarms = 0
    for _ in range(300):
        old, new = random.dirichlet(np.ones(columns), (2, ENOUGH)).tolist()
        alarms += any(difference.kind == "order" for difference in compare(replies(old), replies(new)))
    assert alarms == 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:])
def test_every_order_of_four_classes_is_found(order):
    """Each of the 23 ways to mix up four classes is named, and moving them back is harmless."""
    (found,) = compare(replies(FOUR.tolist()), replies(FOUR_AGAIN[:, list(order)].tolist()))
    assert found.kind == "order"
    for at in range(4):
        moved = f"column {at} stands at column {order.index(at)}" in found.message
        assert moved == (order.index(at) != at)


def test_what_the_champion_does_not_answer_is_left_out():
    """A request that the champion refuses promises nothing; one that only the challenger refuses breaks."""
    no = ("", "ValueError: unknown carrier 'ZZ'")
    assert compare([*replies([1.5]), no], [*replies([2.5]), no]) == []
    assert compare([*replies([1.5]), no], [*replies([2.5]), *replies([2.5])]) == []
    (found,) = compare([*replies([1.5]), *replies([1.5])], [*replies([2.5]), no])
    assert (found.kind, found.breaking) == ("refused", True)
    assert "1 of 2 requests" in found.message
    assert "unknown carrier 'ZZ'" in found.message
    assert MEND.search(found.message)


def test_a_champion_that_answers_nothing_is_an_error():
    """Where the champion answers none of the requests nothing can be compared, and that is no pass."""
    with pytest.raises(ValueError, match=r"answers none of 1 requests .*no such column.*: give it an input example"):
        compare([("", "no such column")], replies([1.5]))


@pytest.mark.parametrize("classes", ["ab", [], ["a", "a"], [["a"]], [1, True], [None]])
def test_declared_classes_that_are_none_are_told_with_the_mend(classes):
    """`classes` in the metadata is a list of distinct labels; anything else is one line that shows how to log it."""
    for pair, side in (((classes, ["a"]), "champion"), ((["a"], classes), "challenger")):
        with pytest.raises(ValueError, match=f"the {side}'s metadata .*model.classes_.tolist"):
            declared(*pair)


def test_answers_that_are_not_wrapped_are_rows_too():
    """What a model answers to chat requests has no `predictions`: it is the answer itself."""
    old, new = ([(json.dumps(answer), "")] for answer in ({"id": "a", "choices": [1]}, {"id": "b", "choices": [2]}))
    assert compare(old, new) == []
    assert [d.column for d in compare(old, [(json.dumps({"id": "b"}), "")])] == ["choices"]


def test_each_thing_is_counted_once():
    """Ten thousand broken rows are one broken field."""
    rows, again = PP * 20, [[100 * value for value in row] for row in QQ] * 20
    assert len(compare(replies(rows), replies(again))) == 1

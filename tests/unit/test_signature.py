"""The comparison of signatures, held against what MLflow really accepts."""

import itertools
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validations.signature import compare, measurements
from validations.verdict import Bound, Outcome

OUT = [{"type": "double", "required": True}]


def signature(*columns, outputs=OUT, params=None):
    """A signature in MLflow's own form."""
    as_json = [json.dumps(part) if part else None for part in (list(columns), outputs, params)]
    return dict(zip(("inputs", "outputs", "params"), as_json, strict=True))


def column(name, kind="double", *, required=True):
    spec = kind if isinstance(kind, dict) else {"type": kind}
    return {**spec, "name": name, "required": required}


def array(of):
    return {"type": "array", "items": of if isinstance(of, dict) else {"type": of}}


def mapping(of):
    return {"type": "map", "values": of if isinstance(of, dict) else {"type": of}}


def record(**properties):
    specs = {
        name: {**(kind if isinstance(kind, dict) else {"type": kind}), "required": not name.endswith("_")}
        for name, kind in properties.items()
    }
    return {"type": "object", "properties": specs}


def tensor(dtype, *shape, name=None):
    spec = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}}
    return spec if name is None else {**spec, "name": name}


def kinds(old, new):
    return [(d.column, d.kind, d.breaking) for d in compare(old, new)]


A, B = column("a"), column("b", "long")


def test_a_signature_is_compatible_with_itself():
    """Equal signatures have no differences, and the gate's measurement is an exact 0."""
    same = signature(A, B, column("o", record(x="string", y_=array("long"))), params=[param("t", "double", 0.5)])
    assert compare(same, same) == []
    measured = measurements(same, same)["breaking_changes"]
    assert (measured.low, measured.high, measured.sample) == (0, 0, 1)


def param(name, kind, default, shape=None):
    return {"name": name, "type": kind, "default": default, "shape": shape}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ((A,), (A, B), [("b", "added", True)]),
        ((A,), (A, column("b", required=False)), [("b", "added", False)]),
        ((A, B), (A,), [("b", "dropped", False)]),
        ((A, B), (B, A), [("", "reordered", False)]),
        ((A,), (column("a", "long"),), [("a", "narrowed", True)]),
        ((B,), (column("b", "integer"),), [("b", "narrowed", True)]),
        ((column("a", "any"),), (column("a", "string"),), [("a", "narrowed", True)]),
        ((B,), (column("b", "double"),), [("b", "widened", False)]),
        ((A,), (column("a", "any"),), [("a", "widened", False)]),
        ((A,), (column("a", required=False),), [("a", "optional", False)]),
        ((column("a", required=False),), (A,), [("a", "required", True)]),
        ((column("dep_delay"),), (column("departure_delay"),), [("departure_delay", "renamed", True)]),
        ((A,), (tensor("float64", -1, 3),), [("0", "layout", True)]),
        ((A,), ({"type": "double"},), [("0", "layout", True)]),
    ],
)
def test_each_change_of_inputs_has_its_word(old, new, found):
    """Every kind of change is told, and marked as breaking when a request could be refused."""
    assert kinds(signature(*old), signature(*new)) == found


def test_a_renamed_column_is_told_as_one_change_with_both_names():
    """The message names the old column, the new one, and what to do."""
    (change,) = compare(signature(column("dep_delay"), A), signature(column("dep_delay_min"), A))
    assert "'dep_delay'" in change.message
    assert "'dep_delay_min'" in change.message
    assert "keep the name" in change.message


def test_the_gate_names_the_first_breaking_column_and_counts_them_all():
    """`where` and `note` of the measurement come from the first breaking change; harmless ones do not count."""
    measured = measurements(
        signature(A, B),
        signature(B, column("tail", "string"), column("a", "long"), column("new", required=False)),
    )["breaking_changes"]
    assert measured.value == 2
    assert measured.where == "tail"
    assert "required" in measured.note
    assert "1 more" in measured.note
    assert Bound(max=0).judge(measured) is Outcome.FAILED


def test_columns_without_names_go_by_position():
    """Unnamed columns may not change type at their place; MLflow takes the first ones and ignores the rest."""
    long, double, text = ({"type": kind, "required": True} for kind in ("long", "double", "string"))
    assert kinds(signature(double, text), signature(text, double))[0] == ("0", "narrowed", True)
    assert kinds(signature(long, text), signature(double)) == [
        ("0", "widened", False),
        ("", "dropped", False),
    ]
    assert kinds(signature(long), signature(long, text)) == [("1", "added", True)]


@pytest.mark.parametrize(
    ("old", "new", "breaking"),
    [
        (array("long"), array("double"), True),
        (array("integer"), array("long"), False),
        (array(array("long")), array(array("any")), False),
        (array("long"), "long", True),
        (mapping("double"), mapping("string"), True),
        (record(x="long"), record(x="long", y="long"), True),
        (record(x="long"), record(x="long", y_="long"), False),
        (record(x="long", y_="long"), record(x="long"), True),
        (record(x_=record(y="double")), record(x_=record(y="long")), True),
        (record(x=array(record(y="float"))), record(x=array(record(y="double"))), False),
    ],
)
def test_nested_types_are_compared_all_the_way_down(old, new, breaking):
    """In arrays, maps and objects a change deep inside is found, and MLflow's stricter rules hold there."""
    changes = compare(signature(column("n", old)), signature(column("n", new)))
    assert [d.breaking for d in changes] == [breaking]
    assert changes[0].column == "n"


def test_a_nested_change_is_named_by_its_path():
    """The message leads to the property that changed."""
    (change,) = compare(
        signature(column("n", array(record(y="double")))), signature(column("n", array(record(y="long"))))
    )
    assert "'n[].y'" in change.message


@pytest.mark.parametrize(
    ("old", "new", "breaking"),
    [
        (tensor("float32", -1, 28, 28), tensor("float32", -1, 28, 28), None),
        (tensor("float32", -1, 28, 28), tensor("float32", -1, -1, -1), False),
        (tensor("float32", -1, -1), tensor("float32", -1, 28), True),
        (tensor("float32", -1, 3), tensor("float32", -1, 3, 1), True),
        (tensor("float32", -1, 3), tensor("float64", -1, 3), False),
        (tensor("float64", -1, 3), tensor("float32", -1, 3), True),
        (tensor("float64", -1, 3, name="x"), tensor("float64", -1, 4, name="x"), True),
    ],
)
def test_a_tensor_may_only_become_more_permissive(old, new, breaking):
    """A free dimension may take the place of a fixed one, and a wider type that of a narrower one."""
    assert [d.breaking for d in compare(signature(old), signature(new))] == ([] if breaking is None else [breaking])


@pytest.mark.parametrize(
    "new",
    [
        [{"type": "long", "required": True}],
        [tensor("float64", -1)],
        [tensor("float64", -1, 2)],
        [column("score"), column("reason", "string")],
        [column("scores")],
        [column("score", required=False)],
        [column("score", array("double"))],
    ],
)
def test_any_other_answer_breaks(new):
    """A caller reads the champion's answer, so another type, shape, or other columns break."""
    old = [column("score")] if "name" in new[0] else OUT
    changes = compare(signature(A, outputs=old), signature(A, outputs=new))
    assert changes
    assert all(d.breaking and d.kind in ("output", "layout") for d in changes)


def test_named_outputs_may_change_their_order():
    """Answers are objects by name, so the order of output columns is free."""
    one, two = [column("score"), column("band", "string")], [column("band", "string"), column("score")]
    assert compare(signature(A, outputs=one), signature(A, outputs=two)) == []


@pytest.mark.parametrize(
    ("old", "new", "breaking"),
    [
        ([param("t", "double", 0.5)], None, [True]),
        (None, [param("t", "double", 0.5)], [False]),
        ([param("t", "double", 0.5)], [param("t", "double", 0.7)], [True]),
        ([param("t", "double", 0.5)], [param("t", "string", 0.5)], [True]),
        ([param("n", "integer", 1)], [param("n", "long", 1)], [False]),
        ([param("n", "long", 1)], [param("n", "integer", 1)], [True]),
        ([param("n", "long", 1)], [param("n", "long", 1, [-1])], [True]),
        ([param("n", "long", 1)], [param("n", "double", 2)], [False, True]),
    ],
)
def test_params_keep_name_type_and_default(old, new, breaking):
    """MLflow ignores unknown params in silence, so a param that is gone breaks, and so does another default."""
    changes = compare(signature(A, params=old), signature(A, params=new))
    assert [d.breaking for d in changes] == breaking
    assert all(d.kind == "param" for d in changes)


@pytest.mark.parametrize("missing", [None, {}, {"inputs": None, "outputs": None}, {"inputs": json.dumps([A])}])
def test_a_missing_signature_is_told_with_the_mend(missing):
    """Without a signature on either side nothing can be promised, and the message says how to log one."""
    for pair, side in (((missing, signature(A)), "champion"), ((signature(A), missing), "challenger")):
        with pytest.raises(ValueError, match=f"the {side} has no .*infer_signature"):
            measurements(*pair)


def test_a_signature_may_be_parsed_already():
    """JSON strings and the lists in them are the same signature."""
    parsed = {"inputs": [A], "outputs": OUT, "params": None}
    assert compare(parsed, signature(A)) == []
    with pytest.raises(ValueError, match="not JSON"):
        compare(signature(A), {**parsed, "inputs": "[{"})


SCALARS = ["boolean", "integer", "long", "float", "double", "string", "datetime", "binary", "any"]
TYPES = st.recursive(
    st.sampled_from(SCALARS[:6]).map(lambda kind: {"type": kind}),
    lambda inner: (
        inner.map(array)
        | inner.map(mapping)
        | st.dictionaries(st.sampled_from(["x", "y", "z_"]), inner, min_size=1).map(lambda p: record(**p))
    ),
    max_leaves=4,
)
SCHEMAS = st.tuples(*[st.tuples(TYPES, st.booleans())] * 2).map(
    lambda columns: [
        column(name, kind, required=required) for name, (kind, required) in zip("ab", columns, strict=True)
    ]
)


@given(SCHEMAS, SCHEMAS, SCHEMAS)
def test_what_is_harmless_twice_is_harmless_at_once(one, two, three):
    """If the second takes all of the first's requests, and the third all of the second's, so does the third."""

    def safe(old, new):
        return not any(d.breaking for d in compare(signature(*old), signature(*new)))

    assert safe(one, one)
    assert safe(one, three) or not (safe(one, two) and safe(two, three))


# Requests of each type; what MLflow takes of them was measured, not read.
VALUES = {
    "boolean": [True, False],
    "integer": [1, -7, 2**31 - 1],
    "long": [1, 2**40],
    "float": [1.5, 2.0, 3],
    "double": [1.25, 1e300, 3],
    "string": ["a", "1", "2020-01-01", "true"],
    "datetime": ["2020-01-01T00:00:00"],
    "binary": ["aGVsbG8="],
    "any": [1, "a", None, [1], {"k": 2}],
}
PAIRS = [
    *itertools.permutations([{"type": kind} for kind in SCALARS], 2),
    *itertools.permutations([array({"type": kind}) for kind in SCALARS], 2),
    *itertools.permutations([mapping({"type": kind}) for kind in SCALARS], 2),
    *itertools.permutations([record(p={"type": kind}) for kind in SCALARS], 2),
    *itertools.permutations([record(p="long"), record(p="long", q="long"), record(p="long", q_="long")], 2),
]


def _values(kind):
    if kind["type"] == "array":
        return [[value, value] for value in _values(kind["items"])]
    if kind["type"] == "map":
        return [{"k": value} for value in _values(kind["values"])]
    if kind["type"] == "object":
        firsts = {name: _values(spec)[0] for name, spec in kind["properties"].items()}
        required = {name: value for name, value in firsts.items() if kind["properties"][name]["required"]}
        one = next(iter(kind["properties"]))
        return [firsts, required, *({**firsts, one: v} for v in _values(kind["properties"][one]))]
    return VALUES[kind["type"]]


def test_what_is_called_harmless_is_accepted_by_mlflow_with_the_same_values():
    """Of every pair of types: all JSON requests that MLflow takes for the first are taken for the second, as equals."""
    from mlflow.models.utils import _enforce_schema
    from mlflow.pyfunc.scoring_server import infer_and_parse_data
    from mlflow.types import Schema

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)

    def served(kind, value, form):
        schema = Schema.from_json(json.dumps([column("c", kind)]))
        body = {
            "dataframe_split": {"columns": ["c"], "data": [[value]]},
            "dataframe_records": [{"c": value}],
            "instances": [{"c": value}],
        }
        try:
            return True, _enforce_schema(infer_and_parse_data({form: body[form]}, schema), schema)["c"].tolist()
        except Exception:
            return False, None

    checked = 0
    for old, new in PAIRS:
        if any(d.breaking for d in compare(signature(column("c", old)), signature(column("c", new)))):
            continue
        checked += 1
        for value, form in itertools.product(_values(old), ("dataframe_split", "dataframe_records", "instances")):
            accepted, before = served(old, json.loads(json.dumps(value)), form)
            if accepted:
                accepted, after = served(new, json.loads(json.dumps(value)), form)
                assert accepted, (old, new, value, form)
                if new["type"] == "double":
                    assert before == pytest.approx(after, rel=1e-6), (old, new, value, form)
    assert checked > 30


@pytest.mark.parametrize(
    ("old", "new", "value"), [("double", "long", 2.5), ("long", "integer", 2**40), ("string", "long", "a")]
)
def test_what_breaks_is_refused_or_changed_by_mlflow(old, new, value):
    """The narrowings that are called breaking really lose the request or its value in MLflow."""
    from mlflow.models.utils import _enforce_schema
    from mlflow.pyfunc.scoring_server import infer_and_parse_data
    from mlflow.types import Schema

    schema = Schema.from_json(json.dumps([column("c", new)]))
    try:
        seen = _enforce_schema(
            infer_and_parse_data({"dataframe_split": {"columns": ["c"], "data": [[value]]}}, schema), schema
        )
    except Exception:
        seen = None
    assert seen is None or seen["c"].tolist() != [value]

"""The model server's lean way into a DataFrame, held against MLflow's own code."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

mlflow_types = pytest.importorskip("mlflow.types")
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models.utils import _enforce_schema  # noqa: E402
from mlflow.pyfunc.scoring_server import infer_and_parse_data  # noqa: E402
from mlflow.types import ColSpec, DataType, Schema  # noqa: E402

from deployments.local.server import Frames  # noqa: E402

VALUES = {
    "double": st.none() | st.floats() | st.integers(-(2**70), 2**70) | st.booleans() | st.text(max_size=2),
    "long": st.integers(-(2**65), 2**65) | st.booleans() | st.none() | st.floats(-3, 3),
    "boolean": st.booleans() | st.none() | st.integers(0, 1),
    "string": st.text(max_size=3) | st.none() | st.integers(0, 9),
}
PLAIN = {
    "double": st.none() | st.floats() | st.integers(-(2**62), 2**62),
    "long": st.integers(-(2**63), 2**63 - 1),
    "boolean": st.booleans(),
    "string": st.text(max_size=3),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[Schema, bytes]:
    """A schema and a request that often, but not always, fits it."""
    kinds = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4))
    names = [f"c{place}" for place in range(len(kinds))]
    schema = Schema(
        [ColSpec(DataType[kind], name, required=draw(st.booleans())) for kind, name in zip(kinds, names, strict=True)]
    )
    values = draw(st.sampled_from([PLAIN, PLAIN, VALUES]))
    columns = draw(st.permutations([*names, *draw(st.lists(st.sampled_from(["extra", "more"]), unique=True))]))
    if draw(st.integers(0, 9)) == 0:
        columns = columns[1:]
    kind_of = dict(zip(names, kinds, strict=True))
    row = st.tuples(*(values[kind_of.get(name, "string")] for name in columns))
    rows = draw(st.lists(row, max_size=4))
    if draw(st.booleans()):
        data: dict[str, Any] = {"dataframe_split": {"columns": columns, "data": [list(one) for one in rows]}}
        if draw(st.integers(0, 9)) == 0:
            data["dataframe_split"]["index"] = list(range(5, 5 + len(rows)))
    else:
        data = {"dataframe_records": [dict(zip(columns, one, strict=True)) for one in rows]}
    if draw(st.integers(0, 9)) == 0:
        data["params"] = {}
    return schema, json.dumps(data).encode()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests())
def test_the_lean_frame_is_mlflows_frame(request_: tuple[Schema, bytes]) -> None:
    """Where the lean way makes a frame, MLflow makes the same one: values, types, columns and index."""
    schema, body = request_
    lean = Frames(schema)(body)
    if lean is None:
        return
    data = json.loads(body)
    data.pop("params", None)
    try:
        plain = _enforce_schema(infer_and_parse_data(data, schema), schema, None)
    except MlflowException as error:
        raise AssertionError(f"MLflow refuses what the lean way lets in: {body!r}") from error
    pd.testing.assert_frame_equal(lean, plain, check_index_type="exact", check_column_type="exact", check_exact=True)


def frames(*kinds: str) -> Frames:
    return Frames(Schema([ColSpec(DataType[kind], f"c{place}") for place, kind in enumerate(kinds)]))


def test_a_usual_request_takes_the_lean_way() -> None:
    """Numbers with gaps, strings and extra columns, in any order, need none of MLflow's casts."""
    body = {"dataframe_split": {"columns": ["z", "c1", "c0"], "data": [[{}, "a", 1], [None, "b", None]]}}
    frame = frames("double", "string")(json.dumps(body).encode())
    assert list(frame.columns) == ["c0", "c1"]
    assert frame["c0"].iloc[0] == 1.0
    assert math.isnan(frame["c0"].iloc[1])
    assert list(frame["c1"]) == ["a", "b"]
    body = {"dataframe_records": [{"c0": 1.5, "c1": "a"}]}
    assert frames("double", "string")(json.dumps(body).encode()) is not None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b'{"instances": [{"c0": 1}]}',
        b'{"inputs": {"c0": [1]}}',
        b'{"dataframe_split": {"columns": ["c0"], "data": []}}',
        b'{"dataframe_split": {"columns": ["c0"], "data": [[1, 2]]}}',
        b'{"dataframe_split": {"columns": ["c0", "c0"], "data": [[1, 2]]}}',
        b'{"dataframe_split": {"columns": ["c0"], "data": [["1"]]}}',
        b'{"dataframe_split": {"columns": ["c0"], "data": [[true]]}}',
        b'{"dataframe_split": {"columns": ["c1"], "data": [[1]]}}',
        b'{"dataframe_split": {"columns": [["c0"]], "data": [[1]]}}',
        b'{"dataframe_split": {"data": [[1]]}}',
        b'{"dataframe_split": [[1]]}',
        b'{"dataframe_split": {"columns": ["c0"], "data": [[1]]}, "params": {}}',
        b'{"dataframe_records": {"c0": 1}}',
        b'{"dataframe_records": [{"c0": 1}, {}]}',
        b'{"dataframe_records": [1]}',
        b'{"dataframe_split": {"columns": ["c0"], "data": [[9223372036854775808]]}}',
    ],
)
def test_anything_else_is_left_to_mlflow(body: bytes) -> None:
    """What the lean way cannot vouch for, it does not touch."""
    assert frames("double")(body) is None


@pytest.mark.parametrize(
    "schema",
    [
        None,
        Schema([ColSpec(DataType.double)]),
        Schema([ColSpec(DataType.datetime, "c0")]),
        Schema([ColSpec(DataType.integer, "c0")]),
        Schema([ColSpec(mlflow_types.schema.Array(DataType.double), "c0")]),
    ],
)
def test_other_schemas_are_left_to_mlflow(schema: Schema | None) -> None:
    """Without a schema of named plain columns there is no lean way."""
    assert Frames(schema)(b'{"dataframe_split": {"columns": ["c0"], "data": [[1]]}}') is None


def test_a_models_file_is_not_needed(tmp_path: Path) -> None:
    """The lean way depends on the schema only."""
    assert not list(tmp_path.iterdir())
    assert frames("long")(b'{"dataframe_records": [{"c0": 3}]}')["c0"].dtype == "int64"

"""Expectation suites: same data passes, broken features fail in a sentence, and a broken suite errs."""

import decimal
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from validations.columns import Columns
from validations.expectations import (
    Allowance,
    ExpectationError,
    for_live_sample,
    load,
    measurements,
    save,
    suite_from,
    validate,
)
from validations.verdict import Bound, Outcome


def flights(rows, seed):
    """Numbers with heavy tails and nulls, categories, text, booleans, dates, a constant."""
    random = np.random.default_rng(seed)
    delay = random.exponential(30, rows) - 15
    delay[random.random(rows) < 0.03] = np.nan
    return pd.DataFrame(
        {
            "distance": random.gamma(2, 500, rows),
            "dep_delay": delay,
            "hour": random.integers(5, 23, rows),
            "carrier": random.choice(["UA", "AA", "B6", "DL"], rows, p=[0.5, 0.3, 0.15, 0.05]),
            "tail": [f"N{n}" for n in random.integers(0, 10**6, rows)],
            "dest": pd.Categorical(random.choice(["LAX", "SFO"], rows)),
            "weekend": random.random(rows) < 0.3,
            "sched": pd.Timestamp("2013-01-01") + pd.to_timedelta(random.integers(0, 10**7, rows), unit="s"),
            "year": np.full(rows, 2013),
            "gate": np.full(rows, None),
        }
    )


@pytest.fixture(scope="module")
def suite():
    return suite_from(flights(5000, 0), "flights")


@pytest.mark.parametrize("seed", range(1, 6))
def test_data_of_the_same_distribution_passes(suite, seed):
    """Other rows of the same kind meet every expectation."""
    report = validate(suite, flights(2000, seed))
    assert [result.sentence for result in report.unmet] == []
    assert measurements(report)["unmet_expectations"].value == 0


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_live_sample_of_the_same_distribution_passes(suite, seed):
    """A few hundred live requests, as they come in JSON, meet the live variant."""
    frame = flights(300, seed)
    live = pd.DataFrame(json.loads(frame.to_json(orient="records", date_format="iso")))
    report = validate(for_live_sample(suite, len(live)), live)
    assert [result.sentence for result in report.unmet] == []
    assert measurements(report)["unmet_live_expectations"].value == 0


def broken(**columns):
    return flights(2000, 1).assign(**columns)


BASE = flights(2000, 1)
BROKEN = {
    "kilometres for miles": (broken(distance=BASE.distance * 1.609), "distance"),
    "hours for minutes": (broken(dep_delay=BASE.dep_delay / 60), "dep_delay"),
    "an offset": (broken(hour=BASE.hour + 12), "hour"),
    "nulls": (broken(distance=BASE.distance.where(BASE.index % 10 > 0)), "distance"),
    "nothing but nulls": (broken(distance=None), "distance"),
    "shifted coding": (
        broken(carrier=BASE.carrier.map({"UA": "DL", "AA": "UA", "B6": "AA", "DL": "B6"})),
        "carrier",
    ),
    "other categories": (broken(carrier=BASE.carrier.str.lower()), "carrier"),
    "numbers as text": (broken(hour=BASE.hour.astype(str)), "hour"),
    "text as numbers": (broken(carrier=1.0), "carrier"),
    "a flag as a number": (broken(weekend=BASE.weekend.astype(int)), "weekend"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_features_fail_in_their_own_column(suite, name):
    """Other units, shifted codings, nulls and other types fail, in that column and no other."""
    frame, column = BROKEN[name]
    report = validate(suite, frame)
    assert {result.column for result in report.unmet} == {column}
    measured = measurements(report)["unmet_expectations"]
    assert measured.where == column
    assert f"'{column}'" in measured.note
    assert Bound(max=0).judge(measured) is Outcome.FAILED


def test_a_sentence_says_what_was_seen_and_what_was_wanted(suite):
    """People read the number that was seen and the limits that were wanted."""
    unmet = validate(suite, BROKEN["kilometres for miles"][0]).unmet
    assert unmet[0].sentence.startswith("the mean of 'distance' is 1")
    assert "wanted" in unmet[0].sentence
    sentence = validate(suite, BROKEN["other categories"][0]).unmet[0].sentence
    assert "100 % of the values of 'carrier' are none of the known ones" in sentence
    assert "such as" in sentence


def test_a_missing_column_is_one_failure_that_names_it(suite):
    """Great Expectations raises for each expectation of a missing column; here it is unmet, once, with its name."""
    report = validate(suite, flights(500, 1).drop(columns=["hour"]))
    assert [result.sentence for result in report.unmet] == ["'hour' is missing"]


def test_a_missing_column_that_the_suite_only_mentions_is_a_failure(suite):
    """Also without an expectation that the column exists, its absence is unmet and not an error."""
    bare = {"name": "bare", "expectations": [between("gone", 0, 1), between("hour", 0, 24)], "meta": {}}
    report = validate(bare, BASE)
    assert [(r.column, r.expectation) for r in report.unmet] == [("gone", "column_to_exist")]
    assert len(report.results) == 3


def between(column, low, high):
    kwargs = {"column": column, "min_value": low, "max_value": high}
    return {"type": "expect_column_values_to_be_between", "kwargs": kwargs, "meta": {}}


@pytest.mark.parametrize(
    "expectation",
    [
        {"type": "expect_column_values_to_be_betwen", "kwargs": {"column": "hour"}, "meta": {}},
        {"type": "expect_column_values_to_be_between", "kwargs": {"column": "hour", "mini": 0}, "meta": {}},
        between("carrier", 0, 1),
    ],
    ids=["unknown expectation", "unknown argument", "numbers wanted of text"],
)
def test_a_broken_expectation_is_an_error_and_never_a_pass(expectation):
    """What cannot be evaluated raises: Great Expectations itself leaves an unknown one out without failing."""
    suite = {"name": "flights", "expectations": [between("hour", 0, 24), expectation], "meta": {}}
    with pytest.raises(ExpectationError, match=r"cannot be evaluated|unknown expectation"):
        validate(suite, BASE)


def test_results_keep_the_suites_order():
    """Great Expectations returns results in another order; the report has the suite's."""
    kinds = ["hour", "carrier", "distance"]
    expectations = [
        between("hour", 0, 24),
        set_of("carrier"),
        between("distance", 0, 1),
        between("hour", 0, 1),
    ]
    report = validate({"name": "s", "expectations": expectations, "meta": {}}, BASE)
    assert [r.column for r in report.results] == [*kinds, "hour", "carrier", "distance", "hour"]
    assert [r.success for r in report.results] == [True] * 5 + [False, False]


def set_of(column):
    kwargs = {"column": column, "value_set": ["UA", "AA", "B6", "DL"]}
    return {"type": "expect_column_values_to_be_in_set", "kwargs": kwargs, "meta": {}}


def test_a_live_suite_asks_neither_means_nor_shares(suite):
    """Columns, nulls, ranges and sets stay; what a few hundred requests of one hour would miss goes."""
    live = for_live_sample(suite, 300)
    kinds = {expectation["type"] for expectation in live["expectations"]}
    assert kinds == {
        "expect_column_to_exist",
        "expect_column_values_to_not_be_null",
        "expect_column_values_to_be_between",
        "expect_column_values_to_be_in_set",
    }
    sample = flights(300, 1).sort_values("distance").assign(carrier="UA")
    assert validate(live, sample).unmet == ()
    lower = validate(live, sample.assign(carrier="ua"))
    assert measurements(lower)["unmet_live_expectations"].where == "carrier"


def test_a_suite_is_json_that_people_edit(suite, tmp_path):
    """A suite survives the file, and an edited limit is obeyed."""
    save(suite, tmp_path / "suite.json")
    assert load(tmp_path / "suite.json") == suite
    text = (tmp_path / "suite.json").read_text()
    (tmp_path / "suite.json").write_text(text.replace('"number"', '"text"', 1))
    report = validate(load(tmp_path / "suite.json"), BASE)
    assert {r.column for r in report.unmet} == {"distance"}


def test_a_suite_is_great_expectations_own(suite):
    """Great Expectations takes the suite as it stands, with every expectation in it."""
    import great_expectations as gx

    assert len(gx.ExpectationSuite(**suite).expectations) == len(suite["expectations"])


def test_columns_that_are_meant_to_move_can_be_left_out():
    """An excluded column is not looked at, and the allowance is the author's."""
    frame = flights(2000, 1)
    suite = suite_from(frame, "s", exclude=["distance"], allowance=Allowance(categories=2))
    assert validate(suite, frame.drop(columns="distance")).unmet == ()
    sets = [e["kwargs"]["column"] for e in suite["expectations"] if "in_set" in e["type"]]
    assert sets == ["dest", "weekend"]


def test_an_empty_frame_is_refused(suite):
    """No rows prove nothing: making a suite from them and validating them are both errors."""
    empty = BASE.iloc[:0]
    with pytest.raises(ValueError, match="is empty"):
        suite_from(empty, "s")
    with pytest.raises(ValueError, match="is empty"):
        validate(suite, empty)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "s", "expectations": []}'])
def test_a_file_that_is_no_suite_is_told_with_its_path(tmp_path, text):
    """Broken JSON, and JSON that is no suite, name the file."""
    path = tmp_path / "suite.json"
    with pytest.raises(ValueError, match=r"no suite at .*suite\.json"):
        load(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"suite\.json"):
        load(path)


def test_the_report_is_plain_data(suite):
    """The report and its measurements survive JSON, without NumPy scalars in them."""
    report = validate(suite, BROKEN["an offset"][0])
    assert type(report).model_validate_json(report.model_dump_json()) == report
    assert json.dumps(suite)


def test_great_expectations_is_not_imported_before_it_is_needed():
    """Its import costs seconds: neither the module nor making a suite pays for it."""
    code = (
        "import sys, pandas as pd; from validations.expectations import suite_from; "
        "suite_from(pd.DataFrame({'a': [1, 2]}), 's'); sys.exit('great_expectations' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_validation_says_nothing_on_the_terminal(suite, capfd):
    """No progress bars and no warnings reach the terminal."""
    validate(suite, BROKEN["numbers as text"][0])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_parquet_file_is_read_as_the_frame_it_holds(suite, tmp_path):
    """A file held against a suite column by column gives the report of the frame, and so does a suite made of it."""
    path = tmp_path / "features.parquet"
    frame = flights(3000, 3).set_index("hour", drop=False).rename_axis("row")
    frame.assign(distance=frame.distance * 1.609).to_parquet(path)
    again = pd.read_parquet(path)
    assert validate(suite, path) == validate(suite, again)
    assert {result.column for result in validate(suite, path).unmet} == {"distance"}
    assert suite_from(path, "s") == suite_from(again, "s")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ValueError, match="no parquet file"):
        validate(suite, tmp_path / "x.parquet")


def test_expectations_about_several_columns_see_them_together():
    """A pair, a list, a condition on another column and the whole table are asked of the columns they need."""
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [2, 3, 1], "c": ["x", "y", "y"]})
    together = [
        {"type": "expect_column_pair_values_a_to_be_greater_than_b", "kwargs": {"column_A": "b", "column_B": "a", "mostly": 0.5}},
        {"type": "expect_compound_columns_to_be_unique", "kwargs": {"column_list": ["a", "c"]}},
        between("a", 1, 1) | {"kwargs": {"column": "a", "min_value": 1, "max_value": 1, "row_condition": "c == 'x'", "condition_parser": "pandas"}},
        {"type": "expect_table_row_count_to_equal", "kwargs": {"value": 3}},
        {"type": "expect_table_row_count_to_equal", "kwargs": {"value": 4}},
        between("b", 1, 3),
    ]  # fmt: skip
    report = validate({"name": "s", "expectations": together, "meta": {}}, frame)
    told = [result for result in report.results if result.expectation != "column_to_exist"]
    assert [result.success for result in told] == [True, True, True, True, False, True]
    missing = validate({"name": "s", "expectations": together[:2], "meta": {}}, frame.drop(columns="c"))
    assert [result.sentence for result in missing.unmet] == ["'c' is missing"]


def test_decimals_and_numbers_of_pandas_own_are_numbers(tmp_path):
    """Decimals (from a database), nullable integers and arrow numbers meet the suite of the floats they stand for."""
    values = [float(n % 50) for n in range(1000)]
    suite = suite_from(pd.DataFrame({"x": values}), "s")
    series = {
        "decimal": pd.Series([decimal.Decimal(str(v)) for v in values], dtype=object),
        "nullable": pd.Series(values).astype("Int64").mask(pd.Series(values) < 0),
        "arrow": pd.Series(values).astype("double[pyarrow]"),
        "integer": pd.Series(values).astype(int),
    }
    for kind, column in series.items():
        frame = pd.DataFrame({"x": column})
        assert [result.sentence for result in validate(suite, frame).unmet] == [], kind
        assert {r.column for r in validate(suite, pd.DataFrame({"x": column * 3})).unmet} == {"x"}, kind
        assert suite_from(frame, "s")["meta"]["titleshot"]["families"] == {"x": "number"}


@pytest.mark.parametrize(
    ("law", "scale"), [("normal", 1.609344), ("normal", 1 / 1.609344), ("lognormal", 1.609344), ("t2", 1.609344)]
)
def test_another_unit_is_caught_and_other_rows_are_not(law, scale):
    """Kilometres for miles fail also where tails are heavy or the mean is nothing; resampled rows pass."""
    laws = {
        "normal": lambda random, n: random.normal(size=n),
        "lognormal": lambda random, n: random.lognormal(0, 1, n),
        "t2": lambda random, n: random.standard_t(2, n),
    }
    random = np.random.default_rng(3)
    suite = suite_from(pd.DataFrame({"x": laws[law](random, 50_000)}), "s")
    other = pd.DataFrame({"x": laws[law](random, 5000)})
    assert validate(suite, other).unmet == ()
    assert validate(suite, other * scale).unmet != ()


def test_a_sample_of_columns_holds_the_same_rows(tmp_path):
    """However a large file is sampled, column by column or in one call, its rows stay together."""
    frame = pd.DataFrame({"a": range(1000), "b": range(1000, 2000), "c": "x"})
    frame.to_parquet(tmp_path / "f.parquet")
    for columns in (Columns(frame), Columns(tmp_path / "f.parquet")):
        assert (columns.names, columns.rows, columns.without(["a"])) == (["a", "b", "c"], 1000, ["b", "c"])
        some = columns.read(["a", "b"], at_most=50)
        assert len(some) == 50
        assert (some["b"] - some["a"] == 1000).all()
        assert columns.one("a", at_most=50).tolist() == some["a"].tolist()
    with pytest.raises(ValueError, match="'a' is there twice"):
        Columns(pd.DataFrame([[1, 2]], columns=["a", "a"]))

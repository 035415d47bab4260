"""Feature data held against an expectation suite: the only module that imports Great Expectations.

The import costs about 10 s of CPU, so it happens inside `validate`; a suite is made, changed and stored
without it. A suite is Great Expectations' own JSON and is meant to be edited by hand; its
`meta.titleshot.families` holds the family of each column's type, since Great Expectations'
`expect_column_values_to_be_of_type` goes by names that pandas 3 changed.

Tables are held against a suite column by column: that bounds the memory by the largest column, and Great
Expectations takes a seventh of the time that it takes for the whole (benchmarks/features.py).
"""

import contextlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from validations.columns import Columns
from validations.verdict import Measurement, Value

Suite = dict[str, Any]
_LIVE = {
    "expect_column_to_exist",
    "expect_column_values_to_not_be_null",
    "expect_column_values_to_be_between",
    "expect_column_values_to_be_in_set",
}


class ExpectationError(RuntimeError):
    """An expectation could not be evaluated at all: nothing was learned about the data."""


class Allowance(Value):
    """How far data of the same kind may lie from the data that a suite was made from.

    `outside`: share of values that may lie out of range or set. `beyond`: how far the range is widened, in
    its own widths. `nulls`: how much the share of nulls may grow (it may also double). `quartiles`: how far
    quartiles may move, in interquartile ranges; `tails`: how far the 5 % and 95 % quantiles may, in their
    distance to the median; `mean`: in standard deviations; `spread`: the factor by which the standard
    deviation may change. `shares`: Kullback-Leibler divergence (nats) of categories. `categories`: with more
    distinct values than this a text column is free text, without a set.
    """

    outside: float = 0.01
    beyond: float = 0.25
    nulls: float = 0.02
    quartiles: float = 0.5
    tails: float = 0.25
    mean: float = 0.5
    spread: float = 1.5
    shares: float = 0.25
    categories: int = 100


class Result(Value):
    """How one expectation ended; `sentence` says what was expected, seen and wanted."""

    column: str
    expectation: str
    success: bool
    sentence: str


class Report(Value):
    """What `validate` found: columns first, then the rest in the suite's order."""

    suite: str
    rows: int
    live: bool
    results: tuple[Result, ...]

    @property
    def unmet(self) -> tuple[Result, ...]:
        """The expectations that are not met."""
        return tuple(result for result in self.results if not result.success)


def suite_from(
    table: "pd.DataFrame | Path", name: str, *, allowance: Allowance | None = None, exclude: Collection[str] = ()
) -> Suite:
    """A suite that data like `table` (the champion's training data: a frame, or a parquet file) meets.

    Every column: is there, type family, share of nulls. Numbers: range, mean, quartiles, standard deviation.
    Text of few values: the set, and the share of each value. Leave out (`exclude`) columns that are meant to
    move, such as the month. Raises ValueError for an empty table.
    """
    columns = Columns(table)
    _refuse_empty(columns)
    allowance = allowance or Allowance()
    expectations = []
    families = {}
    for column in columns.without(exclude):
        values = columns.one(column)
        family = families[column] = family_of(values)
        expectations.append(_expect("column_to_exist", column))
        expectations += _nulls(values, column, allowance)
        if family == "number":
            expectations += _numbers(values, column, allowance)
        elif family in ("text", "boolean"):
            expectations += _categories(values, column, allowance)
    meta = {"titleshot": {"families": families, "rows": columns.rows, "live": False}}
    return {"name": name, "expectations": expectations, "meta": meta}


def for_live_sample(suite: Suite, rows: int) -> Suite:
    """The part of `suite` that a sample of `rows` live requests must meet: columns, nulls, ranges and sets.

    Means, quartiles and shares are left out: a few hundred requests of one hour differ in them from a
    training set for no fault of the features. The shares that remain are relaxed to what a sample of
    this size shows with a probability of 1e-4 (binomial).
    """
    kept = []
    for expectation in suite["expectations"]:
        if expectation["type"] not in _LIVE:
            continue
        kwargs = dict(expectation["kwargs"])
        if "mostly" in kwargs:
            kwargs["mostly"] = float(stats.binom.ppf(1e-4, rows, kwargs["mostly"]) / rows)
        kept.append({**expectation, "kwargs": kwargs})
    ours = {**suite.get("meta", {}).get("titleshot", {}), "live": True}
    return {**suite, "expectations": kept, "meta": {**suite.get("meta", {}), "titleshot": ours}}


def save(suite: Suite, path: Path) -> None:
    """Write a suite as JSON that people can edit."""
    path.write_text(json.dumps(suite, indent=2, allow_nan=False) + "\n")


def load(path: Path) -> Suite:
    """Read a suite. Raises ValueError, with the path, for what is not one."""
    try:
        suite = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there is no suite at {path}: make one with `titleshot suite`") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(suite, dict) or not suite.get("expectations") or "name" not in suite:
        raise ValueError(f"{path} is no suite: it needs `name` and a list of `expectations`")
    return suite


def validate(suite: Suite, table: "pd.DataFrame | Path") -> Report:
    """Hold `table` (a frame, or a parquet file) against `suite`.

    A column that is missing, or of another type family, is one unmet expectation, and the column's others are
    not asked: Great Expectations would report each of them as an exception. An exception that is left has
    another cause, and raises `ExpectationError`. Raises ValueError for an empty table.

    Only one column is in memory at a time, and an expectation about several has those together. One about
    the whole table, or with a `row_condition`, has all of it.
    """
    columns = Columns(table)
    _refuse_empty(columns)
    ours = suite.get("meta", {}).get("titleshot", {})
    live, families = bool(ours.get("live")), ours.get("families", {})
    expectations = dict(enumerate(suite["expectations"]))
    named = dict.fromkeys(column for expectation in expectations.values() for column in _named(expectation))
    missing = [column for column in named if column not in columns.names]
    lost = set(missing)
    together: dict[tuple[str, ...], list[int]] = {(column,): [] for column in named if column not in lost}
    for at, expectation in expectations.items():
        if expectation["type"] != "expect_column_to_exist" and not lost & set(_named(expectation)):
            together.setdefault(_needs(expectation, columns), []).append(at)
    about: dict[str, list[Result]] = {column: [_there(column, here=column not in lost)] for column in named}
    found: dict[int, Result] = {}
    for needed, places in sorted(together.items(), key=lambda item: len(item[0]) != 1):
        frame = columns.read(needed)
        if len(needed) == 1 and needed[0] in families:
            (column,) = needed
            about[column].append(_right_family(frame[column], column, families[column], live=live))
            if not about[column][-1].success:
                lost.add(column)
        asked = [at for at in places if not lost & set(_named(expectations[at]))]
        if asked:
            found.update(zip(asked, _run(suite["name"], [expectations[at] for at in asked], frame), strict=True))
    results = [result for column in named for result in about[column]] + [found[at] for at in sorted(found)]
    return Report(suite=suite["name"], rows=columns.rows, live=live, results=tuple(results))


def measurements(report: Report) -> dict[str, Measurement]:
    """`unmet_expectations`, or `unmet_live_expectations` of a live sample: how many (exact).

    `where` is the column of the first one, `note` its sentence.
    """
    name = "unmet_live_expectations" if report.live else "unmet_expectations"
    unmet = report.unmet
    if not unmet:
        return {name: Measurement.exact(0, note=f"{len(report.results)} met by {report.rows:,} rows")}
    more = f" (and {len(unmet) - 1} more)" if len(unmet) > 1 else ""
    note = unmet[0].sentence + more
    return {name: Measurement.exact(len(unmet), where=unmet[0].column, note=note)}


def _refuse_empty(columns: Columns) -> None:
    if not columns.rows or not columns.names:
        raise ValueError(
            f"the feature data is empty ({columns.rows} rows, {len(columns.names)} columns): "
            "there is nothing to expect of it"
        )


# Making a suite -----------------------------------------------------------------------------------------


def _expect(kind: str, column: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": f"expect_{kind}", "kwargs": {"column": column, **kwargs}, "meta": {}}


def _nulls(values: "pd.Series[Any]", column: str, allowance: Allowance) -> list[dict[str, Any]]:
    share = float(values.isna().mean())
    mostly = 1 - share - max(allowance.nulls, share)
    return [_expect("column_values_to_not_be_null", column, mostly=round(mostly, 6))] if mostly > 0 else []


def _numbers(values: "pd.Series[Any]", column: str, allowance: Allowance) -> Iterator[dict[str, Any]]:
    numbers = values.dropna().to_numpy(dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return
    low, high = float(numbers.min()), float(numbers.max())
    margin = allowance.beyond * (high - low) or abs(high) * 1e-9
    yield _expect(
        "column_values_to_be_between",
        column,
        min_value=low - margin,
        max_value=high + margin,
        mostly=1 - allowance.outside,
    )
    deviation = float(numbers.std())
    if deviation == 0:
        return
    mean = float(numbers.mean())
    # A small sample's own mean, quartiles and deviation are off by this much (four standard errors).
    error = 4 / math.sqrt(numbers.size)
    width = (allowance.mean + error) * deviation
    yield _expect("column_mean_to_be_between", column, min_value=mean - width, max_value=mean + width)
    ranges = {
        "quantiles": list(_QUANTILES),
        "value_ranges": _bands(np.sort(numbers), allowance, deviation),
    }
    yield _expect("column_quantile_values_to_be_between", column, quantile_ranges=ranges)
    # That of a heavy-tailed sample is off by more (a quarter of its kurtosis less one).
    kurtosis = float(np.mean((numbers - mean) ** 4)) / deviation**4
    factor = allowance.spread + max(error, 4 * math.sqrt((kurtosis - 1) / (4 * min(numbers.size, _HELD))))
    yield _expect("column_stdev_to_be_between", column, min_value=deviation / factor, max_value=deviation * factor)


_HELD = 5000
"""However many rows a suite is made from, data of about this many is to meet it."""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def _bands(
    ordered: "np.ndarray[Any, np.dtype[np.float64]]", allowance: Allowance, deviation: float
) -> list[list[float]]:
    """Where each of `_QUANTILES` may lie: as far as the allowance says from what it is, and from what it may be.

    It may be three standard errors of its rank away, whatever the distribution. Quartiles move in interquartile
    ranges; the tails, which a heavy-tailed sample shows less surely, in their own distance to the median.
    """

    def at(share: float) -> float:
        return float(np.quantile(ordered, min(1.0, max(0.0, share))))

    low, middle, high = at(0.25), at(0.5), at(0.75)
    bands = []
    for q in _QUANTILES:
        error = 3 * math.sqrt(q * (1 - q) / min(ordered.size, _HELD))
        inner = 0.25 <= q <= 0.75
        # Where most values are equal there is no such distance, and the deviation stands in.
        unit = (high - low if inner else abs(at(q) - middle)) or deviation / 4
        width = unit * (allowance.quartiles if inner else allowance.tails)
        bands.append([at(q - error) - width, at(q + error) + width])
    return bands


def _categories(values: "pd.Series[Any]", column: str, allowance: Allowance) -> Iterator[dict[str, Any]]:
    shares = values.dropna().value_counts(normalize=True)
    if not 0 < len(shares) <= allowance.categories:
        return
    known = [_plain(value) for value in shares.index]
    yield _expect("column_values_to_be_in_set", column, value_set=sorted(known, key=str), mostly=1 - allowance.outside)
    if len(known) > 1 and family_of(values) == "text":
        yield _expect(
            "column_kl_divergence_to_be_less_than",
            column,
            partition_object={"values": known, "weights": [float(share) for share in shares]},
            threshold=allowance.shares + len(known) / len(values),
            # Without it one value outside the reference makes the divergence infinite.
            tail_weight_holdout=allowance.outside / 10,
        )


def family_of(values: "pd.Series[Any]") -> str:
    """The kind of a column's values: number, text, boolean, datetime, nothing (all null) or other."""
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if values.isna().all():
        return "nothing"
    if kind == "categorical":
        return family_of(pd.Series(values.cat.categories))
    if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
        return "number"
    families = {"string": "text", "boolean": "boolean"}
    return families.get(kind, "datetime" if kind.startswith(("datetime", "date")) else "other")


# Holding data against it ----------------------------------------------------------------------------------


def _there(column: str, *, here: bool) -> Result:
    sentence = f"'{column}' is {'there' if here else 'missing'}"
    return Result(column=column, expectation="column_to_exist", success=here, sentence=sentence)


def _right_family(values: "pd.Series[Any]", column: str, wanted: str, *, live: bool) -> Result:
    seen = family_of(values)
    # In JSON, which live requests are, a date is text.
    alike = {seen, wanted} <= {"datetime", "text"} and live
    return Result(
        column=column,
        expectation="type_family",
        success=wanted in (seen, "nothing") or (live and seen == "nothing") or alike,
        sentence=f"'{column}' holds values of the family '{seen}', wanted '{wanted}'",
    )


def _needs(expectation: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    """The columns that must be in memory together for this expectation."""
    named = tuple(dict.fromkeys(_named(expectation)))
    return named if named and not expectation["kwargs"].get("row_condition") else tuple(columns.names)


def _plain_types(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns as Great Expectations compares them: numbers as NumPy's (among nulls as floats), categories as
    objects.
    """
    changed: dict[Any, Any] = {}
    for column in frame.columns:
        values = frame[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            changed[column] = values.astype(object)
        elif not isinstance(values.dtype, np.dtype) and family_of(values) == "number":
            changed[column] = values.astype(np.float64)
        elif values.dtype == object and family_of(values) in ("number", "nothing"):
            changed[column] = pd.to_numeric(values)
    return frame.assign(**changed)


def _named(expectation: Mapping[str, Any]) -> list[str]:
    kwargs = expectation["kwargs"]
    single = [kwargs[key] for key in ("column", "column_A", "column_B") if key in kwargs]
    return [*single, *kwargs.get("column_list", [])]


def _run(name: str, expectations: list[dict[str, Any]], frame: pd.DataFrame) -> list[Result]:
    """Great Expectations' results, in the order of `expectations`."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    # Results come in another order than the expectations, so each carries its place along.
    numbered = [
        {**expectation, "meta": {**expectation.get("meta", {}), "at": at}}
        for at, expectation in enumerate(expectations)
    ]
    try:
        with _quiet():
            found = {one.expectation_config.meta["at"]: one.to_json_dict() for one in _ask(name, numbered, frame)}
    except Exception as error:
        raise ExpectationError(f"the suite '{name}' cannot be evaluated: {error}") from error
    for at, expectation in enumerate(expectations):
        # An expectation that it does not know is logged and left out: that would be a silent pass.
        if at not in found:
            raise ExpectationError(f"the suite '{name}' has an unknown expectation: {expectation['type']}")
    return [_result(expectation, found[at]) for at, expectation in enumerate(expectations)]


def _ask(name: str, expectations: list[dict[str, Any]], frame: pd.DataFrame) -> Any:
    """Great Expectations' own results for `frame`.

    Its engine is asked directly. By way of a data context and a batch it takes twice as long: it computes a
    fingerprint of the data for each, and passes over all columns for each expectation.
    """
    import great_expectations as gx
    from great_expectations.execution_engine import PandasExecutionEngine
    from great_expectations.validator.validator import Validator

    _take_numbers_as_they_are()
    suite = gx.ExpectationSuite(name=name, expectations=expectations)
    validator = Validator(execution_engine=PandasExecutionEngine(batch_data_dict={"features": _plain_types(frame)}))
    validator.metrics_calculator.show_progress_bars = False
    asked = validator.process_expectations_for_validation(suite.expectation_configurations)
    return validator.graph_validate(
        configurations=asked, runtime_configuration={"result_format": {"result_format": "BASIC"}}
    )


@cache
def _take_numbers_as_they_are() -> None:
    """Register mean and standard deviation anew, without a search for decimals.

    Great Expectations looks at every value in Python before either of them: a quarter of its whole time
    on a large column, and nothing is found, since `_plain_types` turns decimals into floats.
    """
    from great_expectations.execution_engine import PandasExecutionEngine
    from great_expectations.expectations.metrics import ColumnMean, ColumnStandardDeviation
    from great_expectations.expectations.metrics.column_aggregate_metric_provider import column_aggregate_value

    class Mean(ColumnMean):  # type: ignore[misc]
        metric_name = "column.mean"

        @column_aggregate_value(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
        def _pandas(cls: Any, column: "pd.Series[Any]", **_kwargs: Any) -> Any:  # noqa: N805 - its own convention
            return column.mean()

    class Deviation(ColumnStandardDeviation):  # type: ignore[misc]
        metric_name = "column.standard_deviation"

        @column_aggregate_value(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
        def _pandas(cls: Any, column: "pd.Series[Any]", **_kwargs: Any) -> Any:  # noqa: N805
            return column.std()


def _result(expectation: Mapping[str, Any], found: Mapping[str, Any]) -> Result:
    column = ", ".join(_named(expectation))
    kind = expectation["type"].removeprefix("expect_")
    raised = _exception(found.get("exception_info") or {})
    if raised:
        raise ExpectationError(f"{kind} of '{column}' cannot be evaluated: {raised}")
    sentence = _sentence(kind, column, expectation["kwargs"], found.get("result") or {})
    return Result(column=column, expectation=kind, success=found.get("success") is True, sentence=sentence)


def _sentence(kind: str, column: str, wanted: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What was seen and what was wanted."""
    seen = _text(result.get("observed_value"))
    between = f"{_text(wanted.get('min_value'))} to {_text(wanted.get('max_value'))}"
    strange = result.get("unexpected_percent") or 0.0
    odd = list(dict.fromkeys(_text(value) for value in result.get("partial_unexpected_list", [])))
    share = f"at most {100 * (1 - wanted.get('mostly', 1.0)):.3g} % wanted"
    such = f"{strange:.3g} % of the values of '{column}'"
    examples = f" (such as {', '.join(odd[:3])})" if odd else ""
    if kind == "column_quantile_values_to_be_between":
        ranges = wanted["quantile_ranges"]
        bands = ", ".join(f"{_text(low)} to {_text(high)}" for low, high in ranges["value_ranges"])
        names = _text(ranges["quantiles"])
        values = _text((result.get("observed_value") or {}).get("values"))
        return f"the quantiles {names} of '{column}' are {values}, wanted {bands}"
    known = {
        "column_mean_to_be_between": f"the mean of '{column}' is {seen}, wanted {between}",
        "column_stdev_to_be_between": f"the standard deviation of '{column}' is {seen}, wanted {between}",
        "column_values_to_be_between": f"{such} lie outside {between}{examples}, {share}",
        "column_values_to_be_in_set": f"{such} are none of the known ones{examples}, {share}",
        "column_values_to_not_be_null": f"{such} are null, {share}",
        "column_kl_divergence_to_be_less_than": f"the shares of the values of '{column}' moved: divergence "
        f"{seen}, at most {_text(wanted.get('threshold'))} wanted",
    }
    rest = {key: value for key, value in wanted.items() if not key.startswith("column")}
    observed = f"observed {seen}" if "observed_value" in result else f"{strange:.3g} % unexpected{examples}"
    return known.get(kind, f"'{column}' {kind.replace('_', ' ')}: {observed}, wanted {_text(rest)}")


def _exception(info: Mapping[str, Any]) -> str:
    """What was raised, if anything: flat in some results, one record per metric in others."""
    for record in (info, *(value for value in info.values() if isinstance(value, dict))):
        if record.get("raised_exception"):
            return str(record.get("exception_message") or "no reason given")
    return ""


def _text(value: Any) -> str:
    """Plain data as people read it: four digits, long lists cut."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        shown = ", ".join(_text(inner) for inner in value[:12])
        return f"[{shown}{', ...' if len(value) > 12 else ''}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, warnings or tracebacks in the log: what matters is in the results."""
    log = logging.getLogger("great_expectations")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

"""The judge: whole intervals, nothing missing passes, and the same evidence gives the same verdict."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from validations.verdict import Bound, Evidence, Measurement, Outcome, Verdict, judge

numbers = st.floats(-1e6, 1e6)


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    low, value, high = sorted(draw(st.tuples(numbers, numbers, numbers)))
    return Measurement(value=value, low=low, high=high, sample=draw(st.integers(0, 10**6)))


@st.composite
def bounds(draw: st.DrawFn) -> Bound:
    low, high = sorted(draw(st.tuples(numbers, numbers)))
    return draw(st.sampled_from([Bound(min=low), Bound(max=high), Bound(min=low, max=high)]))


@given(bounds(), measurements(), st.integers(0, 10**6))
def test_only_an_interval_wholly_inside_passes(bound: Bound, m: Measurement, min_sample: int) -> None:
    """A pass means that every value of the interval is allowed and that the sample is large enough."""
    low = -math.inf if bound.min is None else bound.min
    high = math.inf if bound.max is None else bound.max
    outcome = bound.judge(m, min_sample)
    inside = low <= m.low and m.high <= high
    outside = m.high < low or m.low > high
    assert (outcome is Outcome.PASSED) == (inside and m.sample >= min_sample)
    assert (outcome is Outcome.FAILED) == (outside and m.sample >= min_sample)
    assert outcome in (Outcome.PASSED, Outcome.FAILED, Outcome.INCONCLUSIVE)


@given(st.dictionaries(st.text(min_size=1), bounds(), max_size=4), st.data())
def test_the_judge_is_reproducible_and_needs_every_metric(checks: dict[str, Bound], data: st.DataObject) -> None:
    """A verdict passes only if every bound was measured and held; stored and judged again it is the same."""
    measured = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(checks, measurements())))
    evidence = Evidence(measurements=measured)
    verdict = judge("step", checks, evidence, 10)
    if verdict.outcome is Outcome.PASSED:
        assert checks
        assert set(checks) <= set(measured)
        assert all(checks[k].judge(measured[k], 10) is Outcome.PASSED for k in checks)
    stored = Verdict.model_validate_json(verdict.model_dump_json())
    assert stored == verdict
    assert judge("step", checks, stored.evidence, 10) == verdict


def test_nothing_checked_is_errored() -> None:
    """A step without bounds proves nothing, so it does not pass."""
    assert judge("step", {}, Evidence()).outcome is Outcome.ERRORED


def test_a_metric_nobody_measured_is_errored_and_says_so() -> None:
    """Missing data never passes, and the sentence names the metric."""
    verdict = judge("load", {"p99_ms": Bound(max=1)}, Evidence())
    assert verdict.outcome is Outcome.ERRORED
    assert verdict.why == "p99_ms was not measured (wanted at most 1)"


def test_a_failure_outweighs_what_was_not_measured() -> None:
    """The verdict is the worst of its checks, and FAILED is the worst of all."""
    evidence = Evidence(measurements={"a": Measurement.exact(2)})
    assert judge("s", {"a": Bound(max=1), "b": Bound(max=1)}, evidence).outcome is Outcome.FAILED


@pytest.mark.parametrize("fields", [{"value": math.nan, "low": 0, "high": 1}, {"value": 2, "low": 0, "high": 1}])
def test_an_impossible_measurement_is_refused(fields: dict[str, float]) -> None:
    """NaN, or an interval that does not hold its value, cannot become evidence."""
    with pytest.raises(ValidationError):
        Measurement(**fields, sample=1)


def test_an_unbounded_interval_survives_storage() -> None:
    """Infinity (a quantile that the sample cannot bound) is written and read back as it was."""
    m = Measurement(value=1, low=0, high=math.inf, sample=5)
    assert Measurement.model_validate_json(m.model_dump_json()) == m
    assert Bound(max=10).judge(m) is Outcome.INCONCLUSIVE


@pytest.mark.parametrize("bad", [{}, {"min": 2, "max": 1}, {"max": math.inf}, {"min": math.nan}])
def test_a_bound_that_bounds_nothing_is_refused(bad: dict[str, float]) -> None:
    """Open, empty, infinite and NaN bounds are refused when they are made."""
    with pytest.raises(ValidationError):
        Bound(**bad)


def test_the_sentence_names_numbers_bound_sample_and_slice() -> None:
    """What people read says what was measured, where, on how much, and what was wanted."""
    m = Measurement(value=0.9, low=0.8, high=0.95, sample=120, where="carrier = US", note="108 of 120")
    (check,) = judge(
        "shadow", {"slice_disagreement": Bound(max=0.3)}, Evidence(measurements={"slice_disagreement": m})
    ).checks
    assert str(check) == (
        "slice_disagreement 0.9 [0.8, 0.95] for carrier = US is outside the bound (at most 0.3), n=120: 108 of 120"
    )

"""Drift: no alarm where nothing moved, however small the sample; and what moved is found and named."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from validations.drift import Drift, critical, drift, interval, measurement, rows_needed, unseen
from validations.statistics import NoSample
from validations.verdict import Bound, Outcome


def normal(random, size, shift=0.0):
    return pd.Series(random.normal(size=size) + shift)


def categories(random, size, weights):
    return pd.Series(
        random.choice([f"c{at}" for at in range(len(weights))], size, p=np.asarray(weights) / sum(weights))
    )


def shift_of(psi):
    """How far a normal distribution moves, in deviations, where its PSI over deciles is `psi`."""
    edges = stats.norm.ppf(np.arange(1, 10) / 10)

    def found(shift):
        p = np.diff(np.concatenate([[0], stats.norm.cdf(edges - shift), [1]]))
        return float(np.sum((p - 0.1) * np.log(p / 0.1))) - psi

    return optimize.brentq(found, 0, 3)


WORLDS = {
    "numbers": lambda random, size: (normal(random, size), True),
    "numbers with ties and nulls": lambda random, size: (
        pd.Series(random.poisson(0.7, size)).where(random.random(size) > 0.01),
        True,
    ),
    "categories": lambda random, size: (categories(random, size, [40, 20, 10, 10, 5, 5, 4, 3, 2, 1]), False),
    "categories with a long tail": lambda random, size: (categories(random, size, 1 / np.arange(1, 60) ** 1.5), False),
}
BOUND = Bound(max=0.1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("old", "new"), [(100, 100), (5000, 50), (5000, 300), (300, 300)])
def test_identical_small_samples_raise_no_alarm(world, old, new):
    """Where nothing moved a bound of 0.1 fails in at most 1 % of samples, and the plain rule PSI > 0.1 in many."""
    random = np.random.default_rng(7)
    failed = 0
    for _ in range(150):
        before, numbers = WORLDS[world](random, old)
        found = drift("x", before, WORLDS[world](random, new)[0], numbers=numbers)
        failed += BOUND.judge(measurement([found], 0.95)) is Outcome.FAILED
    assert failed <= 2


def test_the_plain_rule_does_raise_it():
    """The reason for all this: with 100 and 100 values of one population, PSI > 0.1 in most samples."""
    random = np.random.default_rng(7)
    plain = [drift("x", normal(random, 100), normal(random, 100), numbers=True).psi for _ in range(200)]
    assert np.mean(np.asarray(plain) > 0.1) > 0.6
    assert np.mean(plain) == pytest.approx(0.18, abs=0.03)


@pytest.mark.parametrize("size", [300, 1000])
def test_drift_at_the_bound_fails_no_more_often_than_declared(size):
    """At a true PSI of exactly the bound, failing and passing are both errors: each in about 2.5 % of samples."""
    random = np.random.default_rng(8)
    outcomes = [
        BOUND.judge(
            measurement([drift("x", normal(random, 5000), normal(random, size, shift_of(0.1)), numbers=True)], 0.95)
        )
        for _ in range(300)
    ]
    assert outcomes.count(Outcome.FAILED) <= 0.05 * 300
    assert outcomes.count(Outcome.PASSED) <= 0.05 * 300


def test_drift_of_two_and_a_half_times_the_bound_is_found():
    """With 1,000 live rows a true PSI of 0.25 always fails a bound of 0.1, and no drift always passes it."""
    random = np.random.default_rng(9)
    for _ in range(20):
        before = normal(random, 5000)
        moved = drift("x", before, normal(random, 1000, shift_of(0.25)), numbers=True)
        still = drift("x", before, normal(random, 1000), numbers=True)
        assert BOUND.judge(measurement([moved], 0.95)) is Outcome.FAILED
        assert BOUND.judge(measurement([still], 0.95)) is Outcome.PASSED
        low, high = interval(moved, 0.9999)
        assert low <= 0.25 <= high


def test_the_interval_is_the_rule_of_the_critical_value():
    """The lower end exceeds a bound exactly where the plain PSI exceeds the non-central chi-square threshold."""
    random = np.random.default_rng(10)
    for shift in (0.0, 0.2, 0.3, 0.4, 0.6):
        found = drift("x", normal(random, 3000), normal(random, 400, shift), numbers=True)
        low, high = interval(found, 0.95)
        for tolerated in (0.02, 0.1, 0.25):
            alarm = found.psi > critical(tolerated, found.freedom, found.effective, 0.025)
            assert alarm == (low > tolerated)
        assert low <= found.corrected <= high


def test_the_worst_of_many_columns_is_named_at_the_bonferroni_level():
    """Twenty columns that stand still raise no alarm; one that moved is named, and its bin told."""
    random = np.random.default_rng(11)
    still = [drift(f"x{at}", normal(random, 5000), normal(random, 2000), numbers=True) for at in range(20)]
    alone, among = measurement(still[:1], 0.95), measurement(still, 0.95)
    assert among.high > alone.high
    assert BOUND.judge(among) is Outcome.PASSED
    moved = drift("km", normal(random, 5000), normal(random, 2000) * 1.6, numbers=True)
    found = measurement([*still, moved], 0.95)
    assert (found.where, found.sample, BOUND.judge(found)) == ("km", 2000, Outcome.FAILED)
    assert "in the reference" in found.note


def test_too_few_samples_are_said_with_how_many_would_do():
    """An undecided one says how many live rows would tell; with that many of them it is decided."""
    random = np.random.default_rng(12)
    before = normal(random, 20_000)
    few = drift("x", before, normal(random, 60), numbers=True)
    told = measurement([few], 0.95)
    assert BOUND.judge(told) is Outcome.INCONCLUSIVE
    assert "live rows would tell, 60 were there" in told.note
    assert measurement([drift("x", before[:100], before[:60], numbers=True)], 0.95).note.startswith("too few samples")
    needed = rows_needed(few, 0.05, 0.1)
    assert 200 < needed < 5000
    enough = measurement([drift("x", before, normal(random, needed), numbers=True)], 0.95)
    assert BOUND.judge(enough) is Outcome.PASSED


def test_a_reference_that_is_too_small_is_blamed():
    """Where no number of live rows would tell, the note asks for a larger reference."""
    random = np.random.default_rng(13)
    found = measurement([drift("x", normal(random, 30), normal(random, 5000), numbers=True)], 0.95)
    assert "the reference has too few rows" in found.note


SEEN = {
    "a rare value that became frequent": ([0] * 3 + [1] * 97, [0] * 50 + [1] * 50, True, "0"),
    "a new value": ([1] * 500, [1] * 250 + [2] * 250, True, "2"),
    "a constant that changed": ([2013] * 500, [2014] * 100, True, "2014"),
    "nulls that came": ([1.0, 2.0] * 300, [1.0, None] * 100, True, "missing"),
    "a category that nobody knew": (["a", "b"] * 2500, ["a", "b", "zz", "a", "b"] * 10, False, "zz"),
    "a category that went": (["a", "b"] * 250, ["a"] * 100, False, "a: 50.0%"),
    "nulls among categories": (["a", "b"] * 250, ["a", None] * 50, False, "missing"),
    "flags": ([True] * 50 + [False] * 450, [True] * 250 + [False] * 250, False, "True"),
    "text for numbers": ([1, 2, 3, 4] * 100, ["a"] * 100, True, "missing"),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_moved_is_found_in_odd_columns(name):
    """Atoms, constants, nulls, new and vanished values are drift, and the note names one of the bins."""
    old, new, numbers, told = SEEN[name]
    found = measurement([drift("x", pd.Series(old), pd.Series(new), numbers=numbers)], 0.95)
    assert BOUND.judge(found) is Outcome.FAILED, found
    assert told in found.note


def test_rows_of_one_request_count_as_far_as_they_differ():
    """Sixty requests of twenty like rows are no 1,200 rows: the sample counts for less, and no alarm is raised."""
    random = np.random.default_rng(14)
    alarms = {True: 0, False: 0}
    for _ in range(100):
        requests = np.repeat(np.arange(60), 20)
        live = pd.Series(np.repeat(random.normal(size=60), 20) * 0.8 + 0.6 * random.normal(size=1200))
        before = normal(random, 5000)
        for grouped in alarms:
            found = drift("x", before, live, numbers=True, requests=requests if grouped else None)
            alarms[grouped] += measurement([found], 0.95).low > 0.02
    assert alarms[True] <= 5
    assert alarms[False] > alarms[True]
    single = drift("x", normal(random, 5000), normal(random, 500), numbers=True, requests=np.zeros(500))
    assert single.effective < 1.01
    each = drift("x", normal(random, 5000), normal(random, 500), numbers=True, requests=np.arange(500))
    assert each.effective == pytest.approx(1 / (1 / 5000 + 1 / 500))


def test_nothing_to_compare_measures_nothing():
    """An empty side, and no column at all, are no sample."""
    with pytest.raises(NoSample):
        drift("x", pd.Series([1.0]), pd.Series([], dtype=float), numbers=True)
    with pytest.raises(NoSample):
        measurement([], 0.95)


def test_all_nulls_on_both_sides_is_no_drift():
    """A column that holds nothing has not moved."""
    found = drift("x", pd.Series([None] * 100, dtype=object), pd.Series([None] * 100, dtype=object), numbers=True)
    assert (found.psi, found.ks) == (0.0, None)


@settings(max_examples=60, deadline=None)
@given(
    old=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(0, 3).map(float)), min_size=1, max_size=80),
    new=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(0, 3).map(float)), min_size=1, max_size=80),
    numbers=st.booleans(),
)
def test_any_values_give_a_drift_that_survives_json(old, new, numbers):
    """Every value falls in one bin, the distances are in their ranges, and the record is plain data."""
    found = drift("x", pd.Series(old, dtype=object), pd.Series(new, dtype=object), numbers=numbers)
    assert (sum(found.reference), sum(found.live)) == (len(old), len(new))
    assert len(found.bins) == len(found.reference) == len(found.live)
    assert found.psi >= 0
    assert 0 <= found.jensen_shannon <= 1
    assert Drift.model_validate_json(found.model_dump_json()) == found
    measured = measurement([found], 0.95)
    assert measured.low <= measured.value <= measured.high
    assert drift("x", pd.Series(old, dtype=object), pd.Series(old, dtype=object), numbers=numbers).psi == pytest.approx(
        0
    )


def test_ks_has_a_margin_for_the_sample_sizes():
    """On equal populations the distance stays inside its margin in 95 % of samples; a real shift exceeds it."""
    random = np.random.default_rng(15)
    found = [drift("x", normal(random, 400), normal(random, 200), numbers=True) for _ in range(200)]
    assert np.mean([one.ks <= one.ks_margin for one in found]) >= 0.95
    moved = drift("x", normal(random, 4000), normal(random, 2000, 0.5), numbers=True)
    assert moved.ks - moved.ks_margin > 0.05


def test_unseen_categories_are_counted_by_request_and_named():
    """The column with the highest sure share is named, with its categories; nulls and other columns are none."""
    live = pd.DataFrame({"a": ["x", "y", "q", None], "b": ["u", "r", "s", "t"], "free": list("wxyz")})
    known = {"a": {"x", "y"}, "b": {"u"}, "gone": {"v"}}
    found = unseen(known, live, [0, 0, 1, 2], 0.95)
    assert (found.where, found.value, found.sample) == ("b", 1.0, 3)
    assert found.note == "'r', 's', 't' in 3 of 3 requests"
    none = unseen({"a": {"x", "y", "q"}}, live, [0, 1, 2, 3], 0.95)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high > 0.4
    with pytest.raises(NoSample):
        unseen({"gone": {"v"}}, live, [0, 1, 2, 3], 0.95)
    assert json.dumps(none.model_dump())

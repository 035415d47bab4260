"""Slices of traffic: what is counted in each, and that looking at many of them keeps the declared error rate."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from validations.eprocess import RATES, bernoulli, ends
from validations.slices import LEARN, Slice, Slices, culprits, evidence, worst
from validations.statistics import NoSample
from validations.verdict import Bound, Outcome


def even(*counts):
    return [Slice(f"s = {at}", k, n, 1 / len(counts)) for at, (k, n) in enumerate(counts)]


def fed(slices, columns, rows, bad):
    for row, disagrees in zip(rows, bad, strict=True):
        slices.add(columns, [row], (0,) if disagrees else ())
    return slices


def test_one_slice_has_the_interval_of_a_rate():
    """With a single slice there is nothing to share: the interval is the engine's own."""
    for k, n in ((0, 100), (3, 100), (40, 400), (400, 400)):
        found = worst(even((k, n)), 0.05, 0.05, pairs=n)
        low, high = ends(RATES, *bernoulli(k, n, RATES), math.log(20), math.log(20), 0.0, 1.0)
        assert (found.low, found.high) == (low, max(high, k / n))


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), min_size=1, max_size=12))
@settings(deadline=None)
def test_the_interval_is_that_of_every_boundary_asked_one_by_one(counts):
    """Bisection finds the same ends as asking at every boundary, and the value lies between them."""
    table = even(*((min(k, n), n) for k, n in counts))
    found = worst(table, 0.025, 0.025, pairs=1, at=(0.05,))
    grid = np.union1d(RATES, [0.05])
    k, n = (np.array([[one[i]] for one in table]) for i in (1, 2))
    good = bernoulli(k, n, grid)[1]
    together = np.array([evidence(table, m) for m in grid])
    low, high = ends(grid, together, good.min(axis=0), math.log(40), math.log(40), 0.0, 1.0)
    assert found.low == low
    assert found.high == max(high, found.value)
    assert low <= found.value


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), min_size=1, max_size=8),
    st.sampled_from([0.01, 0.05, 0.3]),
)
@settings(deadline=None)
def test_a_named_culprit_is_rejected_in_every_company(counts, bound):
    """Closed testing, against its definition: every set of slices that holds a culprit has a mean of 20 at least."""
    table = even(*((min(k, n), n) for k, n in counts))
    named = culprits(table, bound, 0.05)
    e = {one.name: math.exp(min(600, float(bernoulli(one.k, one.n, bound)[0]))) for one in table}
    expected = set()
    for one in table:
        others = [other.name for other in table if other is not one]
        means = []
        for mask in range(2 ** len(others)):
            company = [e[name] for i, name in enumerate(others) if mask >> i & 1] + [e[one.name]]
            means.append(sum(company) / len(company))
        if min(means) >= 20:
            expected.add(one.name)
    assert {one.name for one in named} == expected


def at_the_bound(seed, *, columns=10, values=5, pairs=1500, bound=0.05):
    """Requests of independent columns, and disagreement at the bound in every slice of them."""
    random = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(columns)]
    rows = random.integers(0, values, (pairs, columns)).tolist()
    return names, rows, (random.random(pairs) < bound).tolist()


@pytest.mark.parametrize("kind", ["found", "listed"])
def test_at_the_bound_few_fail_however_often_one_looks(kind):
    """With every slice exactly at the bound, a look after every 50 pairs fails (and passes) in 5 % of runs at most."""
    failed = passed = 0
    for seed in range(60):
        names, rows, bad = at_the_bound(seed, columns=4, pairs=1000)
        slices = Slices(names if kind == "listed" else (), find=kind == "found")
        outcomes = set()
        for start in range(0, len(rows), 50):
            fed(slices, names, rows[start : start + 50], bad[start : start + 50])
            if table := slices.table():
                found = worst(table, 0.05, 0.05, pairs=1, at=(0.05,))
                outcomes.add(Bound(max=0.05).judge(found))
        failed += Outcome.FAILED in outcomes
        passed += Outcome.PASSED in outcomes
    # 3 of 60 are 5 %; more than 7 would be seen in one such test of a hundred. `benchmarks/pairs.py` has more runs.
    assert failed <= 7
    assert passed <= 7


def test_a_bad_slice_among_two_hundred_is_found_and_named():
    """One value of one of forty columns disagrees in 30 % of its pairs: found in every run, and blamed alone."""
    for seed in range(5):
        names, rows, bad = at_the_bound(seed, columns=40, pairs=4000, bound=0.01)
        random = np.random.default_rng(seed + 1000)
        bad = [b or (row[17] == 3 and random.random() < 0.3) for row, b in zip(rows, bad, strict=True)]
        slices = fed(Slices(find=True), names, rows, bad)
        table = slices.table()
        assert sum(one.proven for one in table) == 200
        found = worst(table, 0.025, 0.025, pairs=len(rows), at=(0.1,))
        assert Bound(max=0.1).judge(found) is Outcome.FAILED
        assert found.where == "c17 = 3"
        assert {one.name for one in culprits(table, 0.1, 0.05) if one.proven} == {"c17 = 3"}


def test_two_columns_together_are_searched_too():
    """Where only the meeting of two values disagrees, it is named, though each of them alone looks harmless."""
    names, rows, bad = at_the_bound(3, columns=4, pairs=6000, bound=0.0)
    bad = [row[0] == 1 and row[2] == 4 for row in rows]
    table = fed(Slices(find=True), names, rows, bad).table()
    found = worst(table, 0.025, 0.025, pairs=len(rows), at=(0.3,))
    assert (found.where, found.value) == ("c0, c2 = 1, 4", 1)
    assert Bound(max=0.3).judge(found) is Outcome.FAILED


def test_good_slices_pass_without_being_crossed():
    """For a pass each slice of one column must be good; crossed ones are searched, but need no proof."""
    names, rows, _ = at_the_bound(3, columns=10, pairs=800)
    table = fed(Slices(find=True), names, rows, [False] * len(rows)).table()
    assert len(table) > 50
    assert Bound(max=0.05).judge(worst(table, 0.025, 0.025, pairs=800, at=(0.05,))) is Outcome.PASSED


def test_weights_are_a_share_each():
    """Whatever was seen, the weights of all slices add up to 1 at most."""
    names, rows, bad = at_the_bound(1, columns=12, values=30, pairs=6000)
    for listed in ((), ("c0", "c5"), tuple(names)):
        for find in (False, True):
            table = fed(Slices(listed, find=find, min_slice=1), names, rows, bad).table()
            assert sum(one.weight for one in table) <= 1 + 1e-12


def test_numbers_are_cut_by_the_first_requests():
    """Five ranges of equal share, from the first requests, which are not counted themselves; missing and other apart."""
    rows = [[float(i % 1000)] for i in range(LEARN)]
    slices = fed(Slices(find=True, min_slice=1), ["x"], rows, [True] * LEARN)
    assert slices.table() == []
    late = [[0.0], [100.0], [1e9], [None], ["text"], [[1]]]
    fed(slices, ["x"], late, [True, False, False, False, False, True])
    assert slices.by_slice() == [
        ("x", "under 39.8", 1, 1),
        ("x", "other", 1, 2),
        ("x", "159.2 and over", 0, 1),
        ("x", "79.6 to 119.4", 0, 1),
        ("x", "missing", 0, 1),
    ]


def test_text_is_cut_by_the_values_that_come_often():
    """Values with a share of 2 % have slices of their own, up to ten; a column of values that never come again has none."""
    rows = [["AA" if i % 2 else "US", f"id {i}"] for i in range(LEARN)]
    slices = fed(Slices(find=True, min_slice=1), ["carrier", "id"], rows, [False] * LEARN)
    fed(slices, ["carrier", "id"], [["AA", "id 1"], ["ZZ", "id 2"], [True, "id 3"]], [False] * 3)
    assert sorted(slices.by_slice()) == [("carrier", "AA", 0, 1), ("carrier", "other", 0, 2)]


def test_columns_may_come_in_any_order():
    """Each request names its own columns: another order, more or fewer of them change nothing."""
    rows = [["AA" if i % 2 else "US", i % 3] for i in range(LEARN)]
    slices = fed(Slices(["hour"], find=True, min_slice=1), ["carrier", "hour"], rows, [False] * LEARN)
    fed(slices, ["carrier", "hour"], [["AA", 1]], [False])
    fed(slices, ["new", "hour", "carrier"], [[9, 1, "AA"]], [True])
    fed(slices, ["hour"], [[1]], [False])
    fed(slices, [], [[]], [False])
    found = {(column, value): (k, n) for column, value, k, n in slices.by_slice()}
    assert found["carrier", "AA"] == (1, 2)
    assert found["carrier", "missing"] == (0, 2)
    assert found["hour", "1"] == (1, 67 + 3)
    assert found["hour", "missing"] == (0, 1)


def test_a_request_of_many_rows_counts_once_in_each_found_slice():
    """Rows of one request are one pair: a slice has it once, and it is bad where one of its rows there is."""
    slices = fed(
        Slices(find=True, min_slice=1), ["c"], [["a" if i % 2 else "b"] for i in range(LEARN)], [False] * LEARN
    )
    slices.add(["c"], [["a"]], ())
    slices.add(["c"], [["a"], ["a"], ["b"]], (1,))
    slices.add(["c"], [["a"], ["b"]], None)
    slices.add(["c"], [], None)
    assert sorted(slices.by_slice()) == [("c", "a", 2, 3), ("c", "b", 1, 2), ("c", "missing", 1, 1)]


@given(st.integers(1, 40), st.lists(st.integers(0, 12), max_size=300))
def test_every_pair_of_a_listed_column_is_counted(min_slice, values):
    """Each value has all of its pairs; "other" has those that came while their value was still rare."""
    slices = Slices(["v"], min_slice=min_slice)
    fed(slices, ["v"], [[v] for v in values], [v % 2 for v in values])
    counts = {v: values.count(v) for v in values}
    expected = {("v", str(v), c * (v % 2), c) for v, c in counts.items() if c >= min_slice}
    rare = sum(min(c, min_slice) for c in counts.values())
    rare_bad = sum(min(c, min_slice) for v, c in counts.items() if v % 2)
    if rare >= min_slice and any(c < min_slice for c in counts.values()):
        expected.add(("v", "other", rare_bad, rare))
    assert set(slices.by_slice()) == expected


def test_memory_is_bounded_by_the_number_of_values():
    """A listed column of ever new values is told apart up to `values`; the rest is "other", and none is lost."""
    slices = Slices(["id"], min_slice=2, values=50)
    fed(slices, ["id"], [[f"id {i}"] for i in range(5000)], [True] * 5000)
    assert slices.by_slice() == [("id", "other", 5000, 5000)]
    assert len(slices._listed["id"]._by_value) <= 100


def test_hidden_columns_show_no_value():
    """The slices of a redacted column are told apart by number, listed or found, ranges too."""
    rows = [[f"secret {i % 2}", 7000.0 + i % 200] for i in range(2 * LEARN)]
    for listed in ((), ("who",)):
        slices = Slices(listed, find=True, min_slice=5, redact=("who", "pay"))
        fed(slices, ["who", "pay"], rows, [i % 2 for i in range(2 * LEARN)])
        names = [one.name for one in slices.table()]
        assert len(names) == len(set(names)) > 4
        assert not any("secret" in name or "7" in name for name in names)
        assert any(name.startswith("who = [redacted]") for name in names)


def test_nothing_to_judge():
    """An empty table is no evidence, and no measurement."""
    assert evidence([], 0.05) == -math.inf
    assert evidence(even((5, 10)), 1) == -math.inf
    assert culprits([], 0.05, 0.05) == []
    with pytest.raises(NoSample):
        worst([], 0.05, 0.05, pairs=10)

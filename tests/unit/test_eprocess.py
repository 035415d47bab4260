"""E-processes: under their hypothesis the expectation is at most 1, whatever the shares, the past and the looks."""

import json
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, hypergeom

from validations.eprocess import (
    BETTER,
    RATES,
    WORSE,
    Betting,
    Permutation,
    TwoSample,
    before_and_after,
    bernoulli,
    bernoulli_interval,
    ends,
    mixed,
    paired_slices,
    project,
    stakes,
    thinned,
)

SURE = float(np.log(20))
EXACT = 1 + 1e-7

counts = st.integers(0, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def through_json(state):
    return json.loads(json.dumps(state))


def weights(k, n, p):
    return binom.pmf(k, n, p)


# Bernoulli


@pytest.mark.parametrize("m", [0.005, 0.02, 0.1, 0.5, 0.9])
def test_bernoulli_is_worth_one_at_its_boundary_and_less_inside(m):
    """The expectation of either side after 200 trials is 1 at the boundary, and below 1 within the hypothesis."""
    k = np.arange(201)
    bad, good = bernoulli(k, 200, m)
    for log, inside in ((bad, m / 2), (good, (1 + m) / 2)):
        assert np.exp(log + binom.logpmf(k, 200, m)).sum() == pytest.approx(1, abs=1e-7)
        assert np.exp(log + binom.logpmf(k, 200, inside)).sum() < 1


def test_bernoulli_is_a_martingale_at_its_boundary():
    """From any count, the expectation after one more trial is what it was before."""
    n, m = 40, 0.05
    k = np.arange(n + 1)
    now = bernoulli(k, n, m)
    without, with_one = bernoulli(k, n + 1, m), bernoulli(k + 1, n + 1, m)
    for side in range(2):
        after = m * np.exp(with_one[side]) + (1 - m) * np.exp(without[side])
        assert after == pytest.approx(np.exp(now[side]), rel=1e-8)


def test_bernoulli_starts_at_one():
    """Nothing seen is no evidence."""
    bad, good = bernoulli(0, 0, RATES)
    assert bad == pytest.approx(0, abs=1e-9)
    assert good == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("side", [0, 1])
def test_bernoulli_ever_errs_in_five_percent_at_most(side):
    """At the boundary the probability of reaching 20 within 1,500 trials, looked at after each, is at most 5 %."""
    m, most = 0.02, 1500
    k = np.arange(120)
    alive, ever = np.zeros(120), 0.0
    alive[0] = 1.0
    for n in range(1, most + 1):
        alive[1:] = alive[1:] * (1 - m) + alive[:-1] * m
        alive[0] *= 1 - m
        reached = (bernoulli(np.minimum(k, n), n, m)[side] >= SURE) & (k <= n)
        ever += alive[reached].sum()
        alive[reached] = 0
    assert 0.01 < ever <= 0.05


@pytest.mark.parametrize(
    ("n", "fails_at", "passes_at"),
    [(50, 5, None), (100, 7, None), (200, 11, None), (500, 20, 2), (1000, 34, 9), (2000, 61, 23), (5000, 135, 69)],
)
def test_what_a_bound_of_two_percent_takes(n, fails_at, passes_at):
    """The table of decisions at 5 % each way: as many disagreements are too many, so few are enough."""
    bad, good = bernoulli(np.arange(n + 1), n, 0.02)
    assert int(np.argmax(bad >= SURE)) == fails_at
    passed = np.flatnonzero(good >= SURE)
    assert (int(passed.max()) if passed.size else None) == passes_at


def test_without_a_single_event_206_trials_are_enough():
    """No disagreement at all passes a bound of 2 % after 206 pairs, not after 205."""
    assert bernoulli(0, 205, 0.02)[1] < SURE <= bernoulli(0, 206, 0.02)[1]


def test_bernoulli_stays_finite_at_any_size():
    """A hundred million trials, none or all of them events, give finite evidence at every boundary."""
    for k in (0, 1, 10**8):
        for log in bernoulli(k, 10**8, RATES):
            assert np.isfinite(log).all()


# Intervals


@given(counts)
def test_the_interval_holds_what_was_seen(seen):
    """The interval of a rate holds the share that was seen, within 0 and 1."""
    k, n = seen
    low, high = bernoulli_interval(k, n, SURE, SURE)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= k / n <= high


@given(counts, st.floats(0.1, 8), st.floats(0, 8))
def test_more_certainty_is_a_wider_interval(seen, level, more):
    """Where more evidence is asked for, the interval holds the one where less was."""
    narrow = bernoulli_interval(*seen, level, level)
    wide = bernoulli_interval(*seen, level + more, level + more)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


@given(counts, st.floats(0.001, 0.999))
def test_an_excluded_bound_lies_strictly_outside(seen, m):
    """A bound in `at` that the evidence excludes is outside of the interval, not on its edge; any other is inside."""
    bad, good = bernoulli(*seen, m)
    low, high = bernoulli_interval(*seen, SURE, SURE, at=(m,))
    if bad >= SURE:
        assert low > m
    elif good >= SURE:
        assert high < m
    else:
        assert low <= m <= high


def test_ends_stop_at_the_first_boundary_that_stands():
    """A boundary counts as excluded only with all of its neighbours on the way to it."""
    grid = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    bad = np.array([9.0, 9.0, 1.0, 9.0, 0.0])
    good = np.array([0.0, 0.0, 0.0, 9.0, 9.0])
    low, high = ends(grid, bad, good, 3.0, 3.0, 0.0, 1.0)
    assert 0.2 < low < 0.2 + 1e-9
    assert 0.4 - 1e-9 < high < 0.4


def test_ends_without_evidence_are_the_extremes():
    """Where nothing is excluded the interval is everything; where all is, it lies beyond the last boundary."""
    grid, none, all_ = np.array([0.2, 0.4]), np.zeros(2), np.full(2, 9.0)
    assert ends(grid, none, none, 3.0, 3.0, -1.0, 1.0) == (-1.0, 1.0)
    low, high = ends(grid, all_, none, 3.0, 3.0, -1.0, 1.0)
    assert low > 0.4
    assert high == 1.0


# Betting


@pytest.mark.parametrize(("m", "values"), [(0.3, (0.0, 1.0)), (0.5, (0.25, 1.0)), (0.02, (0.0, 0.4))])
def test_betting_is_worth_one_at_its_boundary(m, values):
    """Over all outcomes of ten numbers with two values and the mean of the boundary, the expectation is 1."""
    low, high = values
    p = (m - low) / (high - low)
    total = np.zeros(2)
    for k in range(11):
        engine = Betting([m])
        engine.add([high] * k + [low] * (10 - k))
        total += np.exp(np.concatenate(engine.logs())) * weights(k, 10, p)
    assert total == pytest.approx([1, 1], abs=1e-9)


@pytest.mark.parametrize("wrong", [-0.01, 1.01, float("nan"), float("inf")])
def test_betting_refuses_what_is_no_share(wrong):
    """Numbers outside of 0 to 1 are refused: the bets could lose more than there is."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        Betting([0.5]).add([0.5, wrong])


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(0, 30))
def test_betting_goes_on_after_a_restart_and_merges(numbers, at):
    """Parts that were stored as JSON and put together are the whole."""
    whole, part, other = (Betting([0.1, 0.5]) for _ in range(3))
    whole.add(numbers)
    part.add(numbers[:at])
    other.add(numbers[at:])
    other.restore(through_json(part.state()))
    assert np.array(other.logs()) == pytest.approx(np.array(whole.logs()), abs=1e-9)


def test_betting_ends_at_the_true_mean():
    """The interval of a mean narrows to it, and holds it."""
    numbers = np.random.default_rng(3).beta(2, 8, 4000)
    grid = np.arange(0.01, 1.0, 0.01)
    engine = Betting(grid)
    engine.add(numbers)
    low, high = ends(grid, *engine.logs(), SURE, SURE, 0.0, 1.0)
    assert 0.17 < low < 0.2 < high < 0.23


# Two samples

SHARES = np.array([0.01, 0.05, 0.25, 0.5, 0.9])
RATES_0 = np.array([1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999])


@pytest.mark.parametrize("delta", [0.0, 0.001, 0.05, -0.01, -0.2, 0.5])
def test_two_sample_bets_are_fair_for_every_rate_within_the_hypothesis(delta):
    """At any share and guess, one request's expected gain is at most 1 for all rates on the hypothesis' side."""
    guess = np.array([1e-7, 1e-5, 0.0005, 0.001, 0.01, 0.3, 0.5, 0.99])
    share = SHARES[:, None]
    beyond = np.array([0.0, 1e-4, 0.01, 0.1, 0.4])
    for odds, sign in ((WORSE, -1), (BETTER, 1)):
        yes1, no1, yes0, no0 = (np.exp(gain) for gain in stakes(guess, share, delta, odds))
        for p0, off in product(RATES_0, beyond):
            p1 = p0 + delta + sign * off
            if 0 <= p1 <= 1:
                one, two = p1 * yes1 + (1 - p1) * no1, p0 * yes0 + (1 - p0) * no0
                assert (share[..., None] * one + (1 - share[..., None]) * two <= EXACT).all()


@pytest.mark.parametrize(("p0", "delta"), [(0.1, 0.0), (0.3, 0.2), (0.6, -0.3)])
def test_two_sample_blocks_are_worth_at_most_one(p0, delta):
    """Over all outcomes of two unequal blocks, the second betting with what the first taught, expectations are 1 at
    most.
    """
    total = np.zeros(2)
    for k1, k0, later1, later0 in product(range(3), range(4), range(3), range(3)):
        engine = TwoSample([delta], rate=0.2, weight=3)
        engine.add(2, k1, 3, k0)
        engine.add(2, later1, 2, later0)
        chance = weights(k1, 2, p0 + delta) * weights(k0, 3, p0)
        chance *= weights(later1, 2, p0 + delta) * weights(later0, 2, p0)
        total += chance * np.exp(np.concatenate(engine.logs()))
    assert (total <= EXACT).all()
    assert (total > 0.3).all()


@given(
    st.lists(st.tuples(*[st.integers(0, 9)] * 4), max_size=8),
    st.integers(0, 8),
)
@settings(max_examples=30)
def test_two_sample_goes_on_after_a_restart(blocks, at):
    """A state that was stored as JSON goes on to the same evidence, guess of the champion's rate included."""
    whole, part = (TwoSample([0.0, 0.01], rate=0.01) for _ in range(2))
    for number, (k1, more1, k0, more0) in enumerate(blocks):
        if number == at:
            stored, part = through_json(part.state()), TwoSample([0.0, 0.01], rate=0.5)
            part.restore(stored)
        for engine in (whole, part):
            engine.add(k1 + more1, k1, k0 + more0, k0)
    assert np.array(part.logs()) == pytest.approx(np.array(whole.logs()), abs=1e-9)


def test_two_sample_learns_the_champions_rate_where_the_challenger_saw_nothing():
    """A block without challenger requests is no evidence, but what it says of the champion is kept."""
    engine = TwoSample([0.0], rate=0.5, weight=10)
    engine.add(0, 0, 1000, 10)
    assert np.concatenate(engine.logs()) == pytest.approx([0, 0], abs=1e-12)
    assert engine.state()["champion"] == [15.0, 1010.0]


def test_two_sample_bets_nothing_where_nothing_can_lie():
    """A boundary outside of 0 and 1 has no far side: evidence stays at 1."""
    engine = TwoSample([-0.5, 0.999], rate=0.01)
    engine.add(100, 3, 100, 1)
    assert np.array(engine.logs()) == pytest.approx(0, abs=1e-12)


def test_two_sample_takes_counts_that_differ_by_boundary():
    """Thresholds that move with the boundary give each its own count."""
    both = TwoSample([0.0, 0.01], rate=0.01)
    both.add(50, [3, 1], 50, 2)
    for column, (delta, events) in enumerate(((0.0, 3), (0.01, 1))):
        alone = TwoSample([delta], rate=0.01)
        alone.add(50, events, 50, 2)
        for side in (0, 1):
            assert both.logs()[side][column] == pytest.approx(alone.logs()[side][0])


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.floats(0.01, 0.99), st.floats(-0.5, 0.5))
def test_the_projection_lies_on_the_line(q0, q1, share, delta):
    """The nearest point is a pair of rates that differ by delta."""
    p0, p1 = project(np.array(q0), np.array(q1), share, delta)
    assert p1 - p0 == pytest.approx(delta, abs=1e-12)
    assert 0 < p0 < 1
    assert 0 < p1 < 1


def test_two_sample_finds_a_regression_and_passes_an_equal():
    """Ten times the errors are found, the same rate passes, both within a few thousand requests."""
    random = np.random.default_rng(5)
    worse, equal = TwoSample([0.001], rate=0.001), TwoSample([0.01], rate=0.001)
    for _ in range(40):
        k0 = int(random.binomial(900, 0.001))
        worse.add(100, int(random.binomial(100, 0.01)), 900, k0)
        equal.add(100, int(random.binomial(100, 0.001)), 900, k0)
    assert worse.logs()[0][0] > SURE
    assert equal.logs()[1][0] > SURE


# Permutation


@given(st.lists(st.integers(0, 5), min_size=2, max_size=7), st.data())
@settings(max_examples=40, deadline=None)
def test_permutation_is_worth_one_over_all_relabellings(statistics, data):
    """Whatever the units showed, ties included, evidence averages to 1 over all choices of the challenger's units."""
    challengers = data.draw(st.integers(1, len(statistics) - 1))
    places = range(len(statistics))
    evidence = []
    for chosen in combinations(places, challengers):
        engine = Permutation()
        engine.add([statistics[at] for at in (*chosen, *(set(places) - set(chosen)))], challengers)
        evidence.append(np.exp(np.concatenate(engine.logs())))
    assert np.mean(evidence, axis=0) == pytest.approx([1, 1], abs=1e-9)


def test_permutation_of_several_draws_is_worth_one():
    """The mean over several thinnings of a block is as exact as one: their labels change together."""
    draws = np.array([[3.0, 1, 2, 2, 0], [2.0, 1, 3, 0, 0], [4.0, 1, 1, 2, 1]])
    evidence = []
    for chosen in combinations(range(5), 2):
        order = [*chosen, *(set(range(5)) - set(chosen))]
        engine = Permutation()
        engine.add(draws[:, None, order], 2)
        evidence.append(np.exp(np.concatenate(engine.logs())))
    assert np.mean(evidence, axis=0) == pytest.approx([1, 1], abs=1e-9)


def test_permutation_of_equal_draws_is_that_of_one():
    """Draws that agree say what one of them says."""
    one, many = Permutation(2), Permutation(2)
    block = np.array([[5.0, 1, 2, 0], [0.0, 3, 1, 1]])
    one.add(block, 1)
    many.add(np.stack([block] * 3), 1)
    assert np.array(many.logs()) == pytest.approx(np.array(one.logs()))


def test_permutation_bets_on_each_boundary_alone():
    """Rows are boundaries; the good side may be given statistics of its own."""
    worse, better = np.array([[5.0, 1, 2, 0], [0.0, 3, 1, 1]]), np.array([[4.0, 1, 2, 0], [0.0, 2, 3, 1]])
    both = Permutation(2)
    both.add(worse, 2, better)
    for row in range(2):
        bad, good = Permutation(), Permutation()
        bad.add(worse[row], 2)
        good.add(better[row], 2)
        assert both.logs()[0][row] == pytest.approx(bad.logs()[0][0])
        assert both.logs()[1][row] == pytest.approx(good.logs()[1][0])


@pytest.mark.parametrize("challengers", [0, 3])
def test_permutation_needs_units_of_both(challengers):
    """Where one version has no unit there is nothing to relabel, and no evidence."""
    engine = Permutation()
    engine.add([3.0, 1, 2], challengers)
    assert np.array(engine.logs()) == pytest.approx(0, abs=1e-12)


def test_one_freak_block_decides_nothing():
    """However far off one unit is, a block is worth at most the number of relabellings."""
    engine = Permutation()
    engine.add([1e12, *range(9)], 1)
    assert 0 < engine.logs()[0][0] < np.log(10)


def test_permutation_goes_on_after_a_restart_and_merges():
    """Parts that were stored as JSON and put together are the whole."""
    random = np.random.default_rng(1)
    blocks = random.poisson(3, (12, 2, 6))
    whole, part, other = (Permutation(2) for _ in range(3))
    for number, block in enumerate(blocks):
        whole.add(block, 2)
        (part if number < 5 else other).add(block, 2)
    other.restore(through_json(part.state()))
    assert np.array(other.logs()) == pytest.approx(np.array(whole.logs()), abs=1e-12)


# Thinning


def test_thinning_draws_from_the_whole_block():
    """The events among the drawn ones follow the hypergeometric law."""
    found = thinned(np.random.default_rng(2), np.full(20_000, 20), 7, 8)
    k = np.arange(8)
    seen = np.bincount(found, minlength=8)
    assert chisquare(seen, 20_000 * hypergeom.pmf(k, 20, 7, 8)).pvalue > 0.001


def test_thinning_adds_what_a_worse_champion_would_have():
    """With `extra`, what is no event becomes one with that probability."""
    found = thinned(np.random.default_rng(2), np.full(20_000, 50), 0, 50, 0.1)
    assert found.mean() == pytest.approx(5, abs=0.06)
    assert found.var() == pytest.approx(4.5, rel=0.05)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 100))
def test_thinning_keeps_within_what_there_is(events, others, size):
    """All of a block is all of its events, none of it is none; never more than were drawn."""
    size = min(size, events + others)
    random = np.random.default_rng(0)
    n = events + others
    assert 0 <= thinned(random, n, events, size) <= min(size, events)
    assert thinned(random, n, events, n) == events
    assert thinned(random, n, events, 0) == 0


def test_thinning_broadcasts():
    """Blocks with sizes of their own, units and boundaries are drawn at once."""
    n = np.array([[30, 20], [9, 12]])
    found = thinned(np.random.default_rng(0), n, n // 3, n.min(axis=1, keepdims=True), np.array([0.0, 1.0]))
    assert found.shape == (2, 2)
    assert found[:, 1].tolist() == [20, 9]


# Slices that both share


@pytest.mark.parametrize("at", [0.0, 0.05, -0.3])
def test_slices_are_worth_one_over_all_signs(at):
    """Whatever the sizes of the differences from the boundary, evidence averages to 1 over all their signs."""
    sizes = np.array([0.1, 0.02, 3.0, 0.0, 0.4, 0.07, 0.2])
    evidence = [
        np.exp(np.concatenate(paired_slices(at + sizes * np.array(signs), at)))
        for signs in product((-1, 1), repeat=sizes.size)
    ]
    assert np.mean(evidence, axis=0) == pytest.approx([1, 1], abs=1e-9)


def test_slices_take_a_version_that_answered_nothing():
    """An infinite difference is one more slice on that side, and no more than that."""
    bad, good = paired_slices([0.1, float("inf"), 0.2, -float("inf"), 0.3], [0.0, 0.1])
    assert np.isfinite(bad).all()
    assert np.isfinite(good).all()
    assert (bad > good).all()


def test_slices_are_compared_at_each_boundary_alone():
    """Several boundaries at once give what each gives alone; no slice is no evidence."""
    differences = np.random.default_rng(4).normal(0.2, 0.1, 15)
    both = paired_slices(differences, [0.0, 0.2])
    for column, at in enumerate((0.0, 0.2)):
        assert [side[column] for side in both] == pytest.approx([side[0] for side in paired_slices(differences, at)])
    assert np.array(paired_slices([], [0.0, 0.1])) == pytest.approx(0, abs=1e-12)
    assert both[0][0] > SURE


# Before and after


@pytest.mark.parametrize(("p0", "delta"), [(0.05, 0.0), (0.2, 0.1), (0.5, -0.2)])
def test_before_and_after_is_worth_at_most_one(p0, delta):
    """Over all outcomes the expectation of either side is at most 1 at the boundary."""
    n1, n0 = 12, 9
    total = np.zeros(2)
    for k1, k0 in product(range(n1 + 1), range(n0 + 1)):
        evidence = np.exp(np.concatenate(before_and_after(k1, n1, k0, n0, delta)))
        total += evidence * weights(k1, n1, p0 + delta) * weights(k0, n0, p0)
    assert (total <= EXACT).all()


def test_before_and_after_keeps_its_rate_at_every_look():
    """Looked at as the challenger's requests come, it errs in 5 % of 100 runs at most, and finds what is there."""
    random = np.random.default_rng(6)
    wrong = found = 0
    for _ in range(100):
        k0 = int(random.binomial(500, 0.02))
        same, worse = (np.cumsum(random.binomial(100, p, 6)) for p in (0.03, 0.12))
        looks = [before_and_after(int(k), 100 * (at + 1), k0, 500, 0.01)[0][0] >= SURE for at, k in enumerate(same)]
        wrong += any(looks)
        found += before_and_after(int(worse[-1]), 600, k0, 500, 0.01)[0][0] >= SURE
    assert wrong <= 5
    assert found >= 95


# Mixtures


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6))
def test_mixed_is_the_mean_of_what_was_won(logs):
    """Equal money on each bet: the mean, in logarithms, however large."""
    assert np.exp(mixed(np.array(logs))) == pytest.approx(np.mean(np.exp(logs)), rel=1e-9)
    assert mixed(np.array(logs) + 5000) == pytest.approx(5000 + mixed(np.array(logs)))

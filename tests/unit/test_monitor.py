"""The monitor: blocks of counted requests in, measurements out that hold at every moment."""

import json
import math

import numpy as np
import pytest

from validations.ledger import Ledger
from validations.monitor import CEILING, CONTROL, LEDGER, MOVED, Monitor, Terms, read
from validations.series import Arm, Block, Head, Series, sparse
from validations.slices import Slice
from validations.verdict import Bound, Outcome

EDGES = tuple(float(edge) for edge in np.geomspace(0.0005, 30, 140))
BOUNDS = {
    "error_rate": Bound(max=0.05),
    "error_rate_delta": Bound(max=0.02),
    "p50_ratio": Bound(max=1.5),
    "p95_ms": Bound(max=100),
    CEILING: Bound(max=0.1),
}


def arm(random, requests, errors=0.001, median=0.02, unanswered=0):
    """One process that answers log-normally around `median` seconds."""
    seconds = random.lognormal(math.log(median), 0.5, requests - unanswered)
    counts = np.bincount(np.searchsorted(EDGES, seconds), minlength=len(EDGES) + 1)
    failed = int(random.binomial(requests, errors))
    failed = max(failed, unanswered)
    return Arm(requests=requests, errors=failed, unanswered=unanswered, buckets=sparse(counts.tolist()))


def terms(bounds=BOUNDS, **more):
    weighed = [metric for metric in bounds if metric != CEILING]
    ledger = Ledger({("canary", metric): 1 / len(weighed) for metric in weighed})
    return Terms(0.05, 0.05, ledger, "canary", **more)


def head(relation="independent", **more):
    return Head(edges=EDGES, relation=relation, history=arm(np.random.default_rng(0), 500), **more)


def run(seed, blocks=200, bounds=BOUNDS, relation="independent", n1=15, n0=15, **challenger):
    """Blocks until every check is decided: ("passed" or "failed" or "inconclusive", the last look, blocks taken)."""
    random = np.random.default_rng(seed)
    monitor = Monitor(head(relation), bounds, terms(bounds))
    asked = {**bounds, LEDGER: Bound(max=20)}
    for taken in range(1, blocks + 1):
        monitor.add(Block(seconds=1, challenger=(arm(random, n1, **challenger),), champion=(arm(random, n0),)))
        found = monitor.look()
        outcome = Outcome.worst(
            [bound.judge(found[m]) if m in found else Outcome.ERRORED for m, bound in asked.items()]
        )
        if outcome in (Outcome.PASSED, Outcome.FAILED):
            return outcome.value, found, taken
    return outcome.value, found, blocks


@pytest.mark.parametrize("relation", ["independent", "bursty"])
def test_a_challenger_like_the_champion_passes(relation):
    """With bounds that leave room, every one of these runs ends as passed, and within two minutes of traffic."""
    for seed in range(3):
        outcome, _, taken = run(seed, relation=relation)
        assert (outcome, taken < 120) == ("passed", True)


@pytest.mark.parametrize(
    ("challenger", "metric"),
    [
        ({"errors": 0.12}, "error_rate_delta"),
        ({"median": 0.06}, "p50_ratio"),
        ({"median": 0.035}, "p50_ratio"),
    ],
)
def test_a_worse_challenger_fails_and_the_check_that_it_breaks_is_named(challenger, metric):
    """A regression is found, and closed testing names its check: its interval lies outside the bound."""
    for seed in range(2):
        outcome, found, _ = run(100 + seed, blocks=900, **challenger)
        assert outcome == "failed"
        guilty = [m for m, bound in BOUNDS.items() if bound.judge(found[m]) is Outcome.FAILED]
        assert metric in guilty or found[LEDGER].low > 20


def test_at_the_bounds_themselves_false_alarms_keep_to_the_declared_rate():
    """No worse than the bounds allow (exactly at them): of 100 runs of 40 looks each at most 5 % and luck fail."""
    bounds = {"error_rate": Bound(max=0.03), "error_rate_delta": Bound(max=0.02)}
    failed = 0
    for seed in range(100):
        random = np.random.default_rng(5000 + seed)
        monitor = Monitor(head(), bounds, terms(bounds))
        for _ in range(40):
            challenger = Arm(requests=80, errors=int(random.binomial(80, 0.03)))
            champion = Arm(requests=240, errors=int(random.binomial(240, 0.01)))
            monitor.add(Block(seconds=1, challenger=(challenger,), champion=(champion,)))
        failed += monitor.look()[LEDGER].low > 20
    assert failed <= 0.05 * 100 + 3 * math.sqrt(0.05 * 0.95 * 100)


def test_a_base_rate_that_moves_with_the_share_is_no_regression():
    """Errors rise for both while the challenger's share grows: pooled counts differ, blocks do not."""
    random = np.random.default_rng(3)
    bounds = {"error_rate_delta": Bound(max=0.002)}
    monitor = Monitor(head(), bounds, terms(bounds))
    for step in range(100):
        p, n1 = 0.001 + 0.03 * step / 100, 2 + step
        one, two = (
            Arm(requests=n1, errors=int(random.binomial(n1, p))),
            Arm(requests=150, errors=int(random.binomial(150, p))),
        )
        monitor.add(Block(seconds=1, challenger=(one,), champion=(two,)))
    found = monitor.look()
    assert bounds["error_rate_delta"].judge(found["error_rate_delta"]) is not Outcome.FAILED
    assert found[LEDGER].low < 20


def test_the_same_blocks_give_the_same_bits():
    """Stored as JSON and read back, cut into two steps or not: the measurements are equal to the bit."""
    random = np.random.default_rng(4)
    blocks = tuple(
        Block(
            seconds=1.5,
            challenger=(arm(random, 12, unanswered=1),),
            champion=(arm(random, 30),),
            pairs=12,
            disagreements=1,
        )
        for _ in range(40)
    )
    for relation in ("independent", "bursty"):
        series = Series(head=head(relation), blocks=blocks, slices=(Slice("a = b", 3, 90, 0.5),))
        bounds = {**BOUNDS, "disagreement": Bound(max=0.2), "slice_disagreement": Bound(max=0.5)}
        one = read([series], bounds, terms(bounds)).look(None, series.slices)
        again = Series.model_validate(json.loads(series.model_dump_json(exclude_defaults=True)))
        assert again == series
        assert read([again], bounds, terms(bounds)).look(None, again.slices) == one
        parts = [series.model_copy(update={"blocks": blocks[:15]}), series.model_copy(update={"blocks": blocks[15:]})]
        two = read(parts, bounds, terms(bounds)).look(None, series.slices)
        assert {m: (v.value, v.low, v.high) for m, v in two.items()} == {
            m: (v.value, v.low, v.high) for m, v in one.items()
        }


def test_an_environment_that_moves_blames_nobody():
    """Where the champion differs from itself, comparisons and ledger are undecided and say so."""
    random = np.random.default_rng(6)
    bounds = {"p50_ratio": Bound(max=1.2), CEILING: Bound(max=0.1)}
    monitor = Monitor(head(), bounds, terms(bounds))
    for _ in range(40):
        slow, fast = arm(random, 20, median=0.06), arm(random, 20)
        monitor.add(
            Block(seconds=1, challenger=(arm(random, 20, median=0.06),), champion=(fast,), control=(slow, fast))
        )
    found = monitor.look()
    assert found[CONTROL].value > 20
    for metric, bound in (("p50_ratio", bounds["p50_ratio"]), (LEDGER, Bound(max=20)), (CONTROL, Bound(max=20))):
        assert bound.judge(found[metric]) is Outcome.INCONCLUSIVE
        assert MOVED in found[metric].note
    assert bounds[CEILING].judge(found[CEILING]) is Outcome.PASSED


def test_the_ceiling_needs_few_requests_and_no_minimum():
    """Four failures in a row are beyond a ceiling of 10 %, before the first block is whole."""
    monitor = Monitor(head(), BOUNDS, terms(min_sample=100))
    found = monitor.look(Block(seconds=0.5, challenger=(Arm(requests=4, errors=4),), whole=False))
    assert BOUNDS[CEILING].judge(found[CEILING]) is Outcome.FAILED


def test_a_step_moves_on_after_its_requests_and_not_before():
    """Without evidence against it the ledger is undecided until `min_sample` requests of this step were seen."""
    bound, random = Bound(max=20), np.random.default_rng(8)
    monitor = Monitor(head(), BOUNDS, terms(min_sample=40))
    for n, outcome in ((30, Outcome.INCONCLUSIVE), (30, Outcome.PASSED)):
        monitor.add(Block(seconds=1, challenger=(arm(random, n),), champion=(arm(random, n),)))
        assert bound.judge(monitor.look()[LEDGER]) is outcome
    monitor.begin_step()
    found = monitor.look()[LEDGER]
    assert bound.judge(found) is Outcome.INCONCLUSIVE
    assert "0 of 40" in found.note


def test_without_a_champion_beside_it_what_was_before_is_the_measure():
    """Against a reference from before, a like challenger passes and one three times as slow fails."""
    random = np.random.default_rng(9)
    bounds = {"p50_ratio": Bound(max=1.5), "error_rate_delta": Bound(max=0.05)}
    for median, wanted in ((0.02, Outcome.PASSED), (0.06, Outcome.FAILED)):
        monitor = Monitor(head(reference=arm(random, 2000)), bounds, terms(bounds))
        for _ in range(60):
            monitor.add(Block(seconds=1, challenger=(arm(random, 20, median=median),)))
        found = monitor.look()
        assert bounds["p50_ratio"].judge(found["p50_ratio"]) is wanted
        assert bounds["error_rate_delta"].judge(found["error_rate_delta"]) is Outcome.PASSED


def test_unanswered_requests_are_infinitely_slow():
    """Failing fast does not make a version fast: half unanswered, and the median is beyond every bound."""
    random, bounds = np.random.default_rng(10), {"p50_ms": Bound(max=1000)}
    monitor = Monitor(head(), bounds, terms(bounds))
    for _ in range(50):
        monitor.add(Block(seconds=1, challenger=(arm(random, 20, unanswered=14),)))
    assert bounds["p50_ms"].judge(monitor.look()["p50_ms"]) is Outcome.FAILED


def test_what_is_undecided_says_what_is_missing():
    """In requests and in time at the present rate; and where it is too near to the bound, that."""
    _, found, _ = run(11, blocks=8)
    assert "more challenger requests" in found["error_rate_delta"].note
    assert "at the present rate" in found["error_rate_delta"].note
    bounds = {"error_rate": Bound(max=0.05)}
    monitor = Monitor(head(), bounds, terms(bounds))
    monitor.add(Block(seconds=10, challenger=(Arm(requests=200, errors=10),)))
    assert "too near to the bound" in monitor.look()["error_rate"].note


def test_with_replicas_one_slow_machine_among_them_is_no_slow_model():
    """Four replicas each, one of the challenger's slow for a while: bursts of one process do not fail the model."""
    random, bounds = np.random.default_rng(12), {"p95_ratio": Bound(max=1.3)}
    monitor = Monitor(head("bursty"), bounds, terms(bounds))
    for step in range(60):
        slow = 0.1 if step % 10 == 0 else 0.02
        ours = (arm(random, 25, median=slow), *(arm(random, 25) for _ in range(3)))
        theirs = (arm(random, 25, median=0.1 if step % 10 == 5 else 0.02), *(arm(random, 25) for _ in range(3)))
        monitor.add(Block(seconds=30, challenger=ours, champion=theirs))
    assert monitor.look()[LEDGER].low < 20
    slow = Monitor(head("bursty"), bounds, terms(bounds))
    for _ in range(30):
        ours = tuple(arm(random, 25, median=0.04) for _ in range(4))
        slow.add(Block(seconds=30, challenger=ours, champion=tuple(arm(random, 25) for _ in range(4))))
    assert slow.look()[LEDGER].low > 20


def test_slices_of_a_load_are_compared_in_pairs():
    """Twelve slices tell a version twice as slow from one that is not, whatever the machine does meanwhile."""
    random, bounds = np.random.default_rng(13), {"p50_ratio": Bound(max=1.4)}
    for factor, wanted in ((1.0, Outcome.PASSED), (2.0, Outcome.FAILED)):
        monitor = Monitor(head("paired"), bounds, terms(bounds))
        for _ in range(14):
            noise = random.lognormal(0, 0.6)
            quantiles = [{50: 0.02 * noise * random.lognormal(0, 0.05) * f} for f in (factor, 1.0)]
            one, two = (Arm(requests=40, buckets={70: 40}, quantiles=q) for q in quantiles)
            monitor.add(Block(seconds=1, challenger=(one,), champion=(two,)))
        assert bounds["p50_ratio"].judge(monitor.look()["p50_ratio"]) is wanted

"""Copies of live requests: harm is found within seconds, and what this machine does by itself is not taken for it."""

import numpy as np
import pytest

from deployments.local.envoy import EDGES_US
from validations.mirror import Mirror
from validations.series import Arm, sparse

EDGES = tuple(edge / 1e6 for edge in EDGES_US)


def second(random, requests, median, failing=0.0):
    """One second of a champion whose latencies are lognormal: its 95th percentile is 2.3 times the median."""
    seconds = median * np.exp(0.5 * random.standard_normal(requests))
    counts = np.bincount(np.searchsorted(EDGES, seconds), minlength=len(EDGES) + 1)
    return Arm(requests=requests, errors=int(random.binomial(requests, failing)), buckets=sparse(counts.tolist()))


def shadow(seed, slower=1.0, failing=0.0, base=0.0, rate=50, bursts=None, since=0, seconds=300):
    """A shadow step of `seconds`: (the mirror, the second it ended in or None, the second of the first pause).

    While requests are copied, from second `since` on, they take `slower` times as long, and `failing` of them fail.
    `bursts` (chance a second, mean length, how much slower) come and go by themselves.
    """
    random = np.random.default_rng(seed)
    mirror = Mirror([second(random, 2000, 0.01, base)], EDGES, 1.5)
    left, first = 0, None
    for now in range(seconds):
        chance, length, much = bursts or (0, 1, 1)
        left = left - 1 if left else random.geometric(1 / length) if random.random() < chance else 0
        harmed = mirror.on and now >= since
        median = 0.01 * (much if left else 1) * (slower if harmed else 1)
        mirror.look(second(random, random.poisson(rate), median, base + failing * harmed), EDGES)
        if not mirror.on and first is None:
            first = now
        if mirror.harm:
            return mirror, now, first
    return mirror, None, first


@pytest.mark.parametrize("rate", [3, 50, 500])
def test_a_healthy_shadow_is_left_alone(rate):
    """Copies that cost nothing, or as much as the policy allows, are not paused once in three hours."""
    for seed in range(18):
        _, ended, paused = shadow(seed, slower=1.5 if seed % 2 else 1.0, rate=rate, seconds=600)
        assert ended is paused is None


def test_bursts_of_the_machine_are_not_taken_for_harm():
    """Ten seconds of trouble every minute, three every 50 s, or two minutes at once: pauses, and no end of the step."""
    ended = 0
    for bursts in ((0.02, 10, 5), (0.02, 3, 3), (0.008, 120, 4)):
        found = [shadow(seed, bursts=bursts, seconds=600) for seed in range(20)]
        assert any(paused is not None for _, _, paused in found)
        ended += sum(over is not None for _, over, _ in found)
    assert ended <= 1


def test_harm_is_found_within_seconds():
    """At 50 requests a second callers are relieved within 8 s, and it is certain within 40; late harm as soon as early."""
    for slower, failing, since in ((4, 0, 0), (20, 0, 0), (1, 0.05, 0), (4, 0, 200), (1, 0.3, 200)):
        for seed in range(8):
            mirror, ended, paused = shadow(seed, slower=slower, failing=failing, since=since)
            assert ended is not None
            assert paused - since <= 8
            assert ended - since <= 40
            assert not mirror.on


def test_harm_is_found_among_bursts():
    """Also on a machine with bursts of its own: nineteen of twenty times, within two minutes."""
    found = [shadow(seed, slower=5, bursts=(0.05, 3, 5))[1] for seed in range(20)]
    assert sum(ended is not None and ended <= 120 for ended in found) >= 19


def test_a_rare_failure_is_no_harm_and_a_rise_is():
    """A champion that failed 2 % before may go on so; from 0 to 1 % is found within five minutes."""
    assert all(shadow(seed, base=0.02)[1] is None for seed in range(10))
    assert all(shadow(seed, failing=0.01)[1] is not None for seed in range(10))


def test_the_words_say_what_was_seen():
    """Figures before, with and without copies, of latency or of failures, whichever it was."""
    slow, _, _ = shadow(1, slower=4)
    assert slow.harm.startswith("the copies slowed live requests: p95 2")
    assert slow.harm.endswith(" ms while they were off; mirroring was switched off")
    assert slow.figures["live_p95_ms"] > 3 * slow.figures["live_p95_before_ms"]
    failing, _, _ = shadow(1, failing=0.3)
    assert failing.harm.startswith("the copies made live requests fail: 0 % before, ")


def test_a_machine_that_got_slower_is_the_new_measure():
    """Where live requests stay slow without copies, copying goes on, and what the copies then add is seen still."""
    random = np.random.default_rng(3)
    mirror = Mirror([second(random, 2000, 0.01)], EDGES, 1.5)
    for _ in range(60):
        mirror.look(second(random, 50, 0.06), EDGES)
    assert mirror.on
    assert mirror.pauses == 1
    assert not mirror.harm
    for _ in range(40):
        mirror.look(second(random, 50, 0.3 if mirror.on else 0.06), EDGES)
    assert "p95 1" in mirror.harm


def test_what_is_not_known_is_learned_before_anything_is_copied():
    """Without requests to compare with there are no copies yet; 40 are enough, and five seconds in any case."""
    random = np.random.default_rng(4)
    for rate, waits in ((50, 1), (5, 5)):
        mirror = Mirror([Arm()], (), 1.5)
        looked = 0
        while not mirror.on:
            assert not mirror.look(Arm(), ())
            mirror.look(second(random, rate, 0.01), EDGES)
            looked += 1
        assert looked == waits


def test_the_quicker_of_two_accounts_is_the_measure():
    """What a harmful shadow of yesterday did to the champion's account does not hide the harm of today's."""
    random = np.random.default_rng(5)
    mirror = Mirror([second(random, 5000, 1.0), second(random, 400, 0.01), second(random, 10, 0.001)], EDGES, 1.5)
    assert 15 < mirror.figures["live_p95_before_ms"] < 35

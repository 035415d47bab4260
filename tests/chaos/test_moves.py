"""Traffic that moves, again and again, and nobody notices: 0 failed requests, 0 answers of a version not allowed."""

import random

import pytest

from deployments.target import FULL, Traffic
from tests.chaos.conftest import Arena
from tests.contract.conftest import MODEL


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.long)])
def test_promotions_and_rollbacks_back_to_back(calm: Arena, rounds: int) -> None:
    """Under 50 requests/s, version 2 takes the place of 1 and gives it back, and each answer is of who is routed."""
    with calm.prober("1") as prober:
        for _ in range(rounds):
            calm.route(Traffic(MODEL, "2", fallback="1"), prober)
            calm.route(Traffic(MODEL, "1", fallback="2"), prober)
        prober.wait_more(20)
    print(prober.result)
    prober.result.assert_clean()
    assert not prober.result.fell_back


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.long)])
def test_weights_go_up_and_down(calm: Arena, rounds: int) -> None:
    """A canary from 0 over 1 % to 100 %, in steps and at once, and back, under 50 requests/s: the versions with a
    weight answer, and no other."""
    with calm.prober("1") as prober:
        for _ in range(rounds):
            for weight in (0, 100, 1000, 5000, FULL, 5000, 100, 0, FULL, 0):
                calm.route(Traffic(MODEL, "1", "2", weight=weight, mirror=1000 if weight < FULL else 0), prober)
            prober.wait_more(10)
    print(prober.result)
    prober.result.assert_clean()
    assert prober.result.versions["2"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("changes", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_route_changes_at_full_load(calm: Arena, changes: int) -> None:
    """Any traffic after any other while 16 clients ask as fast as they are answered."""
    dice = random.Random(changes)
    with calm.prober("1", flood=16) as prober:
        for _ in range(changes):
            champion, challenger, spare = dice.sample(["1", "2", "3"], 3)
            weight, mirror = dice.choice([(0, 0), (100, 0), (5000, 0), (FULL, 0), (0, 500), (100, 500)])
            pair = challenger if weight or mirror else None
            fallback = dice.choice([None, spare])
            calm.route(Traffic(MODEL, champion, pair, weight, mirror, fallback), prober, fallback=True)
    print(prober.result)
    prober.result.assert_clean()

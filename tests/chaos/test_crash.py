"""Promoters that die at every thing they do: afterwards everything agrees, and no caller has noticed.

What there is to die at is counted, not listed: `tests.chaos.nursery` stands where changes leave the process. The whole
of it takes hours (`make chaos`); `make test` takes the points around the cut-over and some others.
"""

import os
import random
from itertools import pairwise

import pytest

from deployments.local.supervisor import wait_for
from tests.chaos.crash import Outcome, Registry

SEEDS = int(os.environ.get("CHAOS_SEEDS", "3"))


def whole(world: Registry, do: str) -> Outcome:
    """A job that nobody disturbs."""
    wait_for(lambda: not world.held(), 30, "the lease does not lapse")
    done = world.run(do, version=world.other())
    assert not done.error, done.trace
    assert world.disagreements() == []
    return done


def dies(world: Registry, do: str, at: int, late: float = 0.0) -> None:
    """A job dies at its `at`th change, is recovered, and everything agrees."""
    # One that died before its first line has left nothing but its lease.
    wait_for(lambda: not world.held(), 30, "the lease does not lapse")
    died = world.run(do, die_at=at, late=late, version=world.other())
    where = f"{do} died at {at} ({died.diary[-1] if died.diary else 'the beginning'}), {late * 1000:.0f} ms late"
    assert died.killed or not died.error, f"{where}: {died.trace}"
    if at % 5 == 0:
        # The next promotion finds it as well, before it begins.
        wait_for(lambda: not world.held(), 30, "the lease does not lapse")
        following = world.run("promote", version=world.other())
        assert not following.error or "the champion already" in following.error, f"{where}: {following.trace}"
    recovered = world.run("recover")
    assert not recovered.error, f"{where}: {recovered.trace}"
    assert world.disagreements() == [], where


def points(diary: list[str], count: int) -> list[int]:
    """Where to die if it cannot be everywhere: around what moves traffic and alias, and some others."""
    near = {n for n, (a, b) in enumerate(pairwise(diary), 1) if {a[:5], b[:5]} & {"file:"} or "alias" in a + b}
    heart = [n for n in sorted(near) if any(word in diary[n - 1] for word in ("rds", "alias", "cut-over"))]
    picked = random.Random(7)
    return sorted(picked.sample(heart, min(len(heart), count)) + picked.sample(range(1, len(diary) + 1), count // 2))


@pytest.mark.long
def test_a_promoter_that_dies_at_the_cut_over_leaves_nothing_half_done(world: Registry) -> None:
    """Some of the points of the whole suite: after recovery all agrees and the prober has seen nothing."""
    with world.asking() as prober:
        for at in points(whole(world, "promote").diary, 3):
            dies(world, "promote", at)
    prober.result.assert_clean()


def test_a_rollback_that_dies_is_brought_to_its_end(world: Registry) -> None:
    """As above, for the operator's rollback."""
    with world.asking() as prober:
        diary = whole(world, "rollback").diary
        # One route change, and no model is loaded or stopped.
        assert sum("rds" in line for line in diary) == 1, diary
        assert not [line for line in diary if line.startswith("supervisord") or "cds" in line]
        for at in points(diary, 2):
            dies(world, "rollback", at)
    prober.result.assert_clean()


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("do", ["promote", "rollback"])
def test_a_process_may_die_anywhere(world: Registry, do: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed before every change it makes, and in the midst of it with each further seed: all agrees, nobody noticed."""
    with world.asking() as prober:
        count = len(whole(world, do).diary)
        for seed in range(SEEDS):
            chance = random.Random(seed)
            for at in range(1, count + 2):
                dies(world, do, at, chance.uniform(0, 0.05) if seed else 0.0)
                if at % 20 == 0:
                    assert not prober.failures, prober.failures[:5]
                    with capsys.disabled():
                        print(f"\n{do}: seed {seed}, {at} of {count + 1}", end="")
    prober.result.assert_clean()
    with capsys.disabled():
        print(f"\n{do}: {count + 1} points x {SEEDS} seeds, all agree; {prober.result}")

"""Many promoters at once, servers that are away, and who comes back from the dead."""

import random
import threading
from itertools import pairwise

import pytest

from deployments.local.supervisor import wait_for
from tests.chaos.crash import FIVE, MODEL, Registry


def crowd(world: Registry, promoters: int, rounds: int, seed: int) -> int:
    """Let promoters of five versions start together, round after round; how many of them won."""
    from tasks import history

    chance, won = random.Random(seed), []
    seen: list[str] = []
    for _ in range(rounds):
        jobs = [{"do": "promote", "version": chance.choice(FIVE)} for _ in range(promoters)]
        done = world.together(jobs)
        for job, one in zip(jobs, done, strict=True):
            why = one.error
            assert one.result or "is held by" in why or "is the champion already" in why, one.trace
            if one.result:
                assert one.result["phase"] == "promoted", one.result
                won.append((one.result["promotion"], job["version"]))
        assert world.disagreements() == []
        seen.append(str(world.target.traffic(MODEL).champion))
    entries = [entry for entry in reversed(history.entries(MODEL)) if entry.id in dict(won)]
    for before, after in pairwise(entries):
        assert before.finished is not None
        assert before.finished <= after.started, f"{before.id} and {after.id} were under way together"
        assert after.champion == before.challenger, f"{after.id} did not follow {before.id}"
    assert seen[-1] == entries[-1].challenger
    return len(won)


def test_of_many_promoters_one_at_a_time_gets_through(world: Registry) -> None:
    """Each follows the one before it, each loser says who was faster, and no caller notices."""
    with world.asking() as prober:
        assert crowd(world, promoters=6, rounds=1, seed=1) >= 1
    prober.result.assert_clean()


@pytest.mark.long
@pytest.mark.timeout(0)
def test_twenty_promoters_of_five_versions_in_ten_rounds(world: Registry) -> None:
    """The same, ten times over with twenty."""
    with world.asking() as prober:
        assert crowd(world, promoters=20, rounds=10, seed=2) >= 10
    prober.result.assert_clean()


def test_a_rollback_waits_for_no_registry(world: Registry) -> None:
    """With MLflow stopped the traffic is back at once; registry and record follow when it is there again."""
    from tasks.journal import opened

    before = world.target.traffic(MODEL).champion
    with world.asking() as prober:
        world.halt_mlflow()
        done = world.run("rollback", patience=0)
        now = world.target.traffic(MODEL)
        assert now.champion != before
        assert "could not be told" in done.error, done.trace
        assert opened(world.target, MODEL) is not None
        # Still away: nothing is lost by trying.
        assert "could not be told" in world.run("recover", patience=0).error
        world.resume_mlflow()
        recovered = world.run("recover")
        assert recovered.result["phase"] == "rolled back", recovered.trace
        assert world.disagreements() == []
    prober.result.assert_clean()


@pytest.mark.long
def test_mlflow_that_stops_amid_a_promotion_stops_it(world: Registry) -> None:
    """The challenger loses its share at once; what happened is recorded when MLflow is back."""
    champion, challenger = world.champion(), world.other()
    outcomes = []
    with world.asking() as prober:

        def promote() -> None:
            outcomes.append(world.run("promote", version=challenger, patience=0))

        promoting = threading.Thread(target=promote)
        promoting.start()

        def in_canary() -> bool:
            traffic = world.target.traffic(MODEL)
            return traffic is not None and traffic.weight > 0

        wait_for(in_canary, 120, "no canary begins", every=0.02)
        world.halt_mlflow()
        promoting.join()
        assert "could not be told" in outcomes[0].error, outcomes[0].trace
        traffic = world.target.traffic(MODEL)
        assert (traffic.champion, traffic.weight) == (champion, 0)
        world.resume_mlflow()
        recovered = world.run("recover")
        assert recovered.result["phase"] == "rolled back", recovered.trace
        assert recovered.result["outcome"] == "errored"
        assert world.disagreements() == []
    prober.result.assert_clean()


def test_an_operator_ends_a_promotion_that_is_under_way(world: Registry) -> None:
    """A rollback takes the lease: the challenger's requests go back, and the promoter finds that it is over."""
    champion, challenger = world.champion(), world.other()
    outcomes = []
    with world.asking() as prober:
        jobs = [{"do": "promote", "version": challenger}, {"do": "rollback", "after": "canary"}]
        promoting = threading.Thread(target=lambda: outcomes.extend(world.together(jobs)))
        promoting.start()
        promoting.join()
    prober.result.assert_clean()
    promoter, operator = outcomes
    assert "StaleFence" in promoter.error, promoter.trace
    assert operator.result["phase"] == "rolled back", operator.trace
    assert "an operator rolled it back" in operator.result["why"]
    assert world.target.traffic(MODEL).champion == champion
    assert world.disagreements() == []

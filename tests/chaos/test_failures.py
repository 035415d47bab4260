"""Parts that die, hang or answer nonsense while requests come: who may notice, and who may not.

A stream that has begun ends with the process that sends it: nobody can go on with it. So where a server or a
gateway is killed, what it had under way at that moment is set apart, and all else must be clean.
"""

import time
from pathlib import Path

import pytest

from deployments.target import Traffic
from tests.chaos.conftest import Arena, arena
from tests.chaos.models import FAIL
from tests.chaos.prober import STREAM, Record
from tests.contract.conftest import MODEL


@pytest.fixture
def backed(calm: Arena) -> Arena:
    """Version 2 serves; where it fails, version 1 does."""
    calm.route(Traffic(MODEL, "2", fallback="1"))
    return calm


def test_a_dead_champion_is_answered_by_its_fallback(backed: Arena) -> None:
    """kill -9 of the champion's server under load costs no request; who answers says that it was not the chosen
    one; the champion's next server serves again by itself."""
    with backed.prober("2", flood=2) as prober:
        prober.allow({"1", "2"})
        died = backed.kill_process(backed.pid("2"))
        prober.wait(lambda records: any(one.by_fallback for one in records), "no fallback answers")
        backed.revived("2")
        backed.healthy("2")
        prober.wait_more(20, "2")
    result = prober.result
    result.but_for(*died, kinds={STREAM}).assert_clean()
    assert set(result.fell_back) == {("2", "1")}


def test_a_dead_challenger_is_answered_by_the_champion(calm: Arena) -> None:
    """The same for a challenger that has half of the requests."""
    calm.route(Traffic(MODEL, "1", "2", weight=5000))
    with calm.prober("1", "2") as prober:
        died = calm.kill_process(calm.pid("2"))
        prober.wait(lambda records: any(one.by_fallback for one in records), "the champion does not answer for it")
        calm.revived("2")
        calm.healthy("2")
        prober.wait_more(20, "2")
    result = prober.result
    result.but_for(*died, kinds={STREAM}).assert_clean()
    assert set(result.fell_back) == {("2", "1")}


def test_a_server_that_hangs_is_answered_by_its_fallback(backed: Arena) -> None:
    """A champion's server that is there and says nothing (SIGSTOP) costs time, and no request; the gateway leaves
    it aside until it answers again."""
    with backed.prober("2") as prober:
        prober.allow({"1", "2"})
        with backed.stopped(backed.pid("2")):

            def quick(records: list[Record]) -> bool:
                last = records[-20:]
                return all(one.by_fallback and one.end - one.start < 1 for one in last)

            prober.wait(quick, "the hanging server is asked again and again")
        backed.healthy("2")
        prober.wait_more(20, "2")
    prober.result.assert_clean()
    assert set(prober.result.fell_back) == {("2", "1")}


@pytest.mark.parametrize("where", ["champion", "challenger"])
def test_a_version_that_answers_500_to_all(calm: Arena, where: str) -> None:
    """The caller never sees it: another version answers, streams included, until the version is well again."""
    if where == "champion":
        calm.route(Traffic(MODEL, "2", fallback="1"))
    else:
        calm.route(Traffic(MODEL, "1", "2", weight=5000))
    with calm.prober("1", "2") as prober:
        with calm.mood("2", FAIL):

            def answered(records: list[Record]) -> bool:
                return sum(one.by_fallback for one in records) > 60 and any(
                    one.by_fallback and one.kind == STREAM for one in records
                )

            prober.wait(answered, "the fallback does not answer")
        calm.healthy("2")
        prober.wait_more(20, "2")
    prober.result.assert_clean()
    assert set(prober.result.fell_back) == {("2", "1")}


def test_all_goes_on_serving_without_a_supervisor(backed: Arena) -> None:
    """kill -9 of supervisord costs no request; `start` has everything under control again, with the same traffic."""
    with backed.prober("2", kept=25, fresh=25, flood=1) as prober:
        backed.kill_supervisor()
        prober.wait_more(100, "2")
    backed.local.start()
    prober.result.assert_clean()
    assert backed.local.traffic(MODEL) == Traffic(MODEL, "2", fallback="1")
    assert backed.local.supervisor.status()[f"model-{MODEL}-2"].running


@pytest.mark.long
def test_a_dead_supervisor_is_replaced_without_a_loss(backed: Arena) -> None:
    """`start` after kill -9 of supervisord costs no request either."""
    with backed.prober("2", kept=25, fresh=25) as prober:
        backed.kill_supervisor()
        prober.allow({"1", "2"})
        backed.local.start()
        prober.wait_more(50, "2")
    prober.result.assert_clean()


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_killed_gateway_of_two_loses_what_it_had_under_way(backed: Arena, rounds: int) -> None:
    """kill -9 of either gateway costs the requests that it was answering, and none that comes later: the other one
    takes them until the supervisor has brought the first one back, with the same traffic."""
    with backed.prober("2", kept=25, fresh=25, flood=1) as prober:
        spans = [backed.kill_gateway(name) for _ in range(rounds) for name in sorted(backed.gateways())]
        prober.wait_more(50, "2")
    result = prober.result
    print(f"{len(spans)} kills, two gateways: {result}")
    for span in spans:
        result = result.but_for(*span)
    result.assert_clean()
    assert backed.local.traffic(MODEL) == Traffic(MODEL, "2", fallback="1")


@pytest.mark.long
def test_what_the_only_gateway_loses_when_it_is_killed(artifacts: Path) -> None:
    """With one gateway nobody is answered until it is back; then all are, with the same traffic."""
    with arena(artifacts, versions=("1",), gateways=1) as one, one.prober("1", kept=25, fresh=25, flood=1) as prober:
        spans = []
        for _ in range(5):
            begin, _gone = one.kill_gateway("gateway")
            spans.append((begin, time.monotonic()))
            prober.wait_more(50, "1")
    result = prober.result
    print(f"{len(spans)} kills, one gateway: {result}")
    assert result.failures
    for span in spans:
        result = result.but_for(*span)
    result.assert_clean()


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_planned_restart_of_the_gateway_loses_nothing(backed: Arena, rounds: int) -> None:
    """One gateway after the other is replaced while the other one serves: 0 failed, streams included."""
    before = backed.gateways()
    with backed.prober("2", kept=25, fresh=25, flood=1) as prober:
        for _ in range(rounds):
            backed.local.restart_gateway()
        prober.wait_more(50, "2")
    result = prober.result
    print(f"{rounds} planned restarts of {len(before)} gateways: {result}")
    result.assert_clean()
    after = backed.gateways()
    assert set(after) == set(before)
    assert not {*after.values()} & {*before.values()}
    assert backed.local.traffic(MODEL) == Traffic(MODEL, "2", fallback="1")

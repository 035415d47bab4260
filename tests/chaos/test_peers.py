"""Bugs that users reported to Argo Rollouts, Flagger, KServe, Seldon Core 2 and Prefect, each as a test named after it.

They are those about failed requests and lost state. Where several reports have one cause, the docstring names them all.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from deployments.artifact import digest
from deployments.local import envoy
from deployments.local.supervisor import _alive, wait_for
from deployments.target import FULL, Entry, NeverReady, Served, StaleFence, TargetError, Traffic, Version
from tests.chaos.conftest import Arena, arena
from tests.chaos.models import make_model
from tests.chaos.prober import Prober, Result, _streamed, formula
from tests.contract.conftest import MODEL, Reply
from tests.unit.test_promotion import begin, performer
from validations.policy import Policy
from validations.promotion import Phase, Promotion, drive
from validations.verdict import Outcome

HELD, BROKEN = "8", "9"
OK = {"error_rate": {"max": 0.1}}
POLICY = Policy(
    version=1,
    model="m",
    gates=[
        {"kind": "integrity"},
        {"kind": "shadow", "checks": OK},
        {"kind": "load", "rate": 1, "run_time": "1s", "checks": OK},
        {"kind": "canary", "weights": [1, 50], "checks": OK},
        {"kind": "watch", "run_time": "1s", "checks": OK},
    ],
)
BAD = [Outcome.FAILED, Outcome.INCONCLUSIVE, Outcome.ERRORED]


def edited(arena: Arena, number: str, load: str, part: str = "pass") -> Version:
    """A version with more code where it is being loaded, and after each part of a stream."""
    path = arena.root / f"peers-{number}"
    if not path.exists():
        code = make_model(path, number) / "code" / f"formula_{number}.py"
        text = code.read_text()
        for words, more in (("    return Model(", load), ("            time.sleep(0.01)\n", part)):
            assert text.count(words) == 1
            text = text.replace(words, f"{words[: -len(words.lstrip())]}{more}\n{words}")
        code.write_text(text)
    return Version(MODEL, number, path, digest(path))


def held(arena: Arena) -> tuple[Version, Path]:
    """A version that goes on neither with loading nor with a stream about x < 0 while a file is there; and that file.
    It leaves another one beside it while it waits.
    """
    hold = arena.moods / f"{HELD}.hold"
    here, mark = f"os.path.exists({str(hold)!r})", f"open({str(hold) + '.seen'!r}, 'w').close(); time.sleep(0.01)"
    return edited(arena, HELD, f"while {here}: {mark}", f"while x < 0 and {here}: {mark}"), hold


@contextmanager
def waiting(hold: Path) -> Iterator[Callable[[], bool]]:
    """The version waits until the block ends, or the file is gone; yields whether it does."""
    seen = hold.with_name(f"{hold.name}.seen")
    seen.unlink(missing_ok=True)
    hold.touch()
    try:
        yield seen.exists
    finally:
        hold.unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def guests(shared_arena: Arena) -> Iterator[None]:
    """Versions that come and go here stay deployed from one test to the next, since a start is what takes time: who
    needs one deploys it. None is left in the end.
    """
    yield
    fence = shared_arena.local.lease(MODEL, "chaos")
    shared_arena.local.route(Traffic(MODEL, "1"), fence)
    for version in (HELD, BROKEN):
        shared_arena.local.retire(MODEL, version, fence)


def weights(arena: Arena) -> dict[str, int]:
    """The weights of live requests by cluster, as the gateway itself has them; without those of 0."""
    found = arena.local._gateway.route(MODEL)
    assert found
    (host,) = found[1]["virtual_hosts"]
    clusters = host["routes"][-1]["route"]["weighted_clusters"]["clusters"]
    assert len({one["name"] for one in clusters}) == len(clusters)
    return {one["name"]: one["weight"] for one in clusters if one.get("weight")}


def served(arena: Arena, version: str) -> int:
    """Requests that reached a version so far; "2-shadow" are copies."""
    return arena.local.observe(MODEL).get(version, Served()).requests


def answered(replies: list[Reply]) -> set[tuple[int, str | None]]:
    """Statuses, and who gave them."""
    return {(reply.status, reply.version) for reply in replies}


# --- no failed request while traffic moves and versions come and go


def test_argo_rollouts_3420_and_kserve_1474_no_traffic_before_a_version_is_ready(calm: Arena) -> None:
    """Two versions arrive at once: neither the one that is still loading nor the one that has crashed has a path or can
    be given traffic of any kind, and they cost nobody a request. Nothing is left of the one that crashed; the other can
    have all requests as soon as `deploy` returns (also KServe #5983, Flagger #1202 and #1026)."""
    local, champion = calm.local, calm.pid("1")
    version, hold = held(calm)
    broken = edited(calm, BROKEN, "raise RuntimeError('no weights')")
    local.retire(MODEL, HELD, calm.fence)

    def refused(number: str) -> None:
        assert number not in local.deployed(MODEL)
        assert {reply.status for reply in calm.send(3, version=number)} == {404}
        for traffic in (
            Traffic(MODEL, number),
            Traffic(MODEL, "1", number, weight=1),
            Traffic(MODEL, "1", number, mirror=1),
            Traffic(MODEL, "1", fallback=number),
        ):
            with pytest.raises(TargetError, match="not deployed"):
                local.route(traffic, calm.fence)

    # Starts take what there is of processors: a light prober, and both of them together.
    with calm.prober("1", kept=10, fresh=5, stream=5) as prober, ThreadPoolExecutor() as threads:
        with waiting(hold) as waits:
            slow, crashing = (threads.submit(local.deploy, one, calm.fence) for one in (version, broken))
            wait_for(waits, 60, "it does not begin to load")
            refused(HELD)
            with pytest.raises(NeverReady) as failure:
                crashing.result()
            assert "no weights" in failure.value.log
            refused(BROKEN)
            prober.wait_more(10, "1")
            assert not slow.done()
        slow.result()
        calm.route(Traffic(MODEL, HELD), prober)
        prober.wait_more(10, HELD)
        calm.route(Traffic(MODEL, "1"), prober)
    prober.result.assert_clean()
    assert not prober.result.fell_back
    assert f"model-{MODEL}-{BROKEN}" not in local.supervisor.status()
    assert calm.pid("1") == champion


def test_argo_rollouts_4195_and_flagger_256_no_503_at_the_end_of_a_canary_nor_on_abort(calm: Arena) -> None:
    """The old champion loses its last request by the end of a canary and is retired in the same breath, under load, and
    nobody notices: `retire` waits for a stream under way, which comes to its end, while nothing new reaches the version.
    Nor does anybody notice that a canary is aborted from 100 % (also Argo Rollouts #4710, #4433 and #3586)."""
    version, hold = held(calm)
    calm.local.deploy(version, calm.fence)
    url, asked = f"{calm.local.gateway(MODEL)}/invocations", {"dataframe_split": {"columns": ["x"], "data": [[-3]]}}
    headers = {"accept": "text/event-stream"}
    with calm.prober("1", flood=2) as prober, ThreadPoolExecutor() as threads:
        calm.route(Traffic(MODEL, HELD), prober)
        with (
            waiting(hold) as waits,
            httpx.stream("POST", url, json=asked, headers=headers, timeout=60, trust_env=False) as answer,
        ):
            parts = answer.iter_raw()
            content = next(parts)
            assert answer.headers["x-model-version"] == HELD
            wait_for(waits, 30, "the stream does not wait")
            for weight in (100, 5000, FULL):
                calm.route(Traffic(MODEL, HELD, "2", weight=weight), prober)
            calm.route(Traffic(MODEL, "2"), prober)
            retired = threads.submit(calm.local.retire, MODEL, HELD, calm.fence)
            wait_for(lambda: calm.send(1, version=HELD)[0].status == 404, 30, "its own path stays")
            prober.wait_more(20, "2")
            assert not retired.done()
            hold.unlink()
            content += b"".join(parts)
        retired.result()
        prober.wait_more(20, "2")
        for weight in (5000, FULL, 0):
            calm.route(Traffic(MODEL, "2", "1", weight=weight), prober)
        prober.wait_more(20, "2")
    prober.result.assert_clean()
    assert not prober.result.fell_back
    assert prober.result.versions.keys() == {"1", "2", HELD}
    assert _streamed(content) == [formula(-3, HELD)] * 3
    assert HELD not in calm.local.deployed(MODEL)


def test_seldon_1354_and_4478_an_update_under_background_requests_costs_none(calm: Arena) -> None:
    """Another version becomes champion and gives the place back under requests of all kinds: 0 fail, and the processes
    of all versions are the same before and after."""
    before = [calm.pid(version) for version in ("1", "2", "3")]
    with calm.prober("1", flood=1) as prober:
        for version, fallback in (("2", "1"), ("3", "2"), ("1", "3")):
            calm.route(Traffic(MODEL, version, fallback=fallback), prober)
            prober.wait_more(20, version)
    prober.result.assert_clean()
    assert [calm.pid(version) for version in ("1", "2", "3")] == before


# --- weights and copies are what was asked for


def test_kserve_5335_no_weight_is_silently_ignored(calm: Arena) -> None:
    """A weight is read back from the gateway, and of 1,000 requests the challenger answers its share, within five
    standard deviations."""
    traffic = Traffic(MODEL, "1", "2", weight=1000)
    calm.route(traffic)
    assert calm.local.traffic(MODEL) == traffic
    assert 53 <= calm.pings(1000)["2"] <= 147


def test_seldon_5181_weights_are_replaced_and_never_added(calm: Arena) -> None:
    """After each change the gateway has the weights of the last one and no others, and a version at 0 % gets
    nothing."""
    for challenger, weight in (("2", 1000), ("2", 3000), ("3", 5000), ("2", 0), ("3", FULL), (None, 0)):
        calm.route(Traffic(MODEL, "1", challenger, weight=weight))
        wanted = {envoy.cluster_name(MODEL, "1"): FULL - weight}
        if challenger:
            wanted[envoy.cluster_name(MODEL, challenger, "1")] = weight
        assert weights(calm) == {name: share for name, share in wanted.items() if share}
        nothing = {"1", "2", "3"} - ({"1"} if weight < FULL else set()) - ({challenger} if weight else set())
        before = {version: served(calm, version) for version in nothing}
        assert not calm.pings(60).keys() & nothing
        assert {version: served(calm, version) for version in nothing} == before


def test_seldon_1658_a_shadow_gets_no_live_request(calm: Arena) -> None:
    """A shadow is sent copies only, and no more than the fraction that was asked for (Seldon #3772)."""
    calm.route(Traffic(MODEL, "1", "2", mirror=5000))
    before = {name: served(calm, name) for name in ("1", "2", "2-shadow")}

    def since(name: str) -> int:
        return served(calm, name) - before[name]

    assert answered(calm.send(200)) == {(200, "1")}
    wait_for(lambda: since("1") == 200 and since("2-shadow") >= 65, 10, "the copies do not arrive")
    calm.route(Traffic(MODEL, "1"))
    assert since("2-shadow") <= 135
    assert since("2") == 0


# --- nothing is lost by a crash, and nothing comes back


@dataclass(frozen=True)
class Hurt:
    """A target of its own, to which all of this happened: version 2 became champion with 1 to fall back on, its server
    stopped and did not start again, 1 got its place back and 2 was retired; then supervisord and the server of 1 were
    killed together, and all was started again.

    `refused` is what was said to the wish to retire 1 meanwhile, `gone` was the process of 2.
    """

    arena: Arena
    result: Result
    refused: str
    gone: int

    def another_model(self) -> str:
        """Another model's first version is deployed and routed; its gateway's address."""
        first, name = self.arena.version("1"), "trains"
        fence = self.arena.local.lease(name, "chaos")
        self.arena.local.deploy(Version(name, "1", first.path, first.digest), fence)
        self.arena.local.route(Traffic(name, "1"), fence)
        return self.arena.local.gateway(name)


@pytest.fixture(scope="module")
def hurt(artifacts: Path) -> Iterator[Hurt]:
    """A target with a past."""
    with arena(artifacts, versions=("1", "2"), lease_ttl=600.0) as one:
        gone = one.pid("2")
        with one.prober("1") as prober:
            one.route(Traffic(MODEL, "2", fallback="1"), prober)
            prober.allow({"1", "2"})
            one.halt("2")
            prober.wait(lambda records: any(one.by_fallback for one in records), "no fallback answers")
            with pytest.raises(TargetError) as refusal:
                one.local.retire(MODEL, "1", one.fence)
            one.route(Traffic(MODEL, "1"), prober)
            one.local.retire(MODEL, "2", one.fence)
            prober.wait_more(20, "1")
        champion = one.pid("1")
        one.kill_supervisor()
        one.kill_process(champion)
        one.local.start()
        yield Hurt(one, prober.result, str(refusal.value), gone)


@pytest.mark.long
def test_flagger_1898_a_promoted_version_that_does_not_start_costs_not_the_healthy_one(hurt: Hurt) -> None:
    """Where the new champion's server goes and does not start again, the one before answers for it, cannot be taken
    down meanwhile, and takes all requests back: 0 fail."""
    hurt.result.assert_clean()
    assert hurt.result.fell_back.keys() == {("2", "1")}
    assert "has traffic" in hurt.refused


@pytest.mark.long
def test_seldon_5032_supervisor_and_server_die_together_and_all_is_served_again(hurt: Hurt) -> None:
    """After a start the version is loaded and serves, with the same traffic, on the model's path and on its own."""
    one = hurt.arena
    assert one.local.traffic(MODEL) == Traffic(MODEL, "1")
    assert answered(one.send(20)) == answered(one.send(3, version="1")) == {(200, "1")}
    assert one.local.supervisor.status()[f"model-{MODEL}-1"].running


@pytest.mark.long
def test_flagger_773_switching_a_service_on_costs_no_request(hurt: Hurt) -> None:
    """A model's first version is answered from the moment that its first `route` returns, and the model beside it loses
    nothing."""
    with hurt.arena.prober("1") as beside, Prober(hurt.another_model(), allowed={"1"}) as prober:
        prober.wait_more(20, "1")
    prober.result.assert_clean()
    beside.result.assert_clean()


@pytest.mark.long
def test_kserve_1968_a_retired_version_does_not_come_back(hurt: Hurt) -> None:
    """Neither a restart nor the next deployment brings a retired version back: no process, no path, no cluster, no
    record (also Seldon PR 6193, #4253 and #1325)."""
    one, cluster = hurt.arena, envoy.cluster_name(MODEL, "2")
    hurt.another_model()
    assert not _alive(hurt.gone)
    programs = {*one.local.supervisor.names(), *one.local.supervisor.status()}
    assert {name for name in programs if name.startswith("model-")} == {f"model-{MODEL}-1", "model-trains-1"}
    assert one.local.deployed(MODEL).keys() == {"1"}
    assert one.local.orphans() == []
    assert {reply.status for reply in one.send(3, version="2")} == {404}
    assert "not there" in one.local._gateway.sick([cluster])[cluster]


def test_prefect_16429_a_crashed_run_that_comes_back_changes_nothing(calm: Arena) -> None:
    """After another one has taken over, each verb that changes something refuses the old fence, and traffic, versions,
    journal and lease stay as the new holder has them."""
    local, old = calm.local, calm.fence
    calm.expire(old)
    new = local.lease(MODEL, "next")
    try:
        local.write(Entry(MODEL, "theirs", "begin", {}), new)
        local.route(Traffic(MODEL, "2", fallback="1"), new)
        local.keep(MODEL, 1, new)
        before = (local.traffic(MODEL), local.deployed(MODEL), local.journal(MODEL), local.kept(MODEL))
        ran: list[str] = []

        def guarded() -> None:
            with local.guard(old):
                ran.append("guard")

        with calm.prober("2") as prober:
            for verb in (
                lambda: local.deploy(calm.version("4"), old),
                lambda: local.route(Traffic(MODEL, "1"), old),
                lambda: local.route(Traffic(MODEL, "2", fallback="1"), old),
                lambda: local.retire(MODEL, "3", old),
                lambda: local.write(Entry(MODEL, "ours", "end", {}), old),
                lambda: local.keep(MODEL, 5, old),
                lambda: local.renew(old),
                guarded,
            ):
                with pytest.raises(StaleFence):
                    verb()
            local.release(old)
            prober.wait_more(20, "2")
        prober.result.assert_clean()
        assert not ran
        assert (local.traffic(MODEL), local.deployed(MODEL), local.journal(MODEL), local.kept(MODEL)) == before
        assert (holder := local.holder(MODEL))
        assert holder.name == "next"
    finally:
        local.write(Entry(MODEL, "theirs", "end", {}), new)
        local.keep(MODEL, 0, new)
        local.release(new)


# --- verdicts: pure


@pytest.mark.parametrize("bad", BAD)
def test_argo_rollouts_3850_what_is_not_passed_is_not_promoted(bad: Outcome) -> None:
    """Failed, inconclusive or not measured, at whichever step: nothing follows but the way back (also #1411)."""
    plan = begin(POLICY, "1").plan
    for place, step in enumerate(plan):
        end = drive(begin(POLICY, "1"), performer([Outcome.PASSED] * place + [bad]), lambda _: None)
        assert end.stopped_by
        assert (end.stopped_by.step, end.stopped_by.outcome) == (step.name, bad)
        assert {verdict.step for verdict in end.verdicts[place + 1 :]} <= {"rollback"}
        assert end.phase in {Phase.REJECTED, Phase.ROLLED_BACK}


@pytest.mark.parametrize("bad", BAD)
def test_flagger_1591_a_promotion_ends_though_even_the_way_back_fails(bad: Outcome) -> None:
    """From a step that did not pass there is one attempt to go back; where that does not pass either it is the end."""
    for place in range(len(begin(POLICY, "1").plan)):
        saved: list[Promotion] = []
        end = drive(begin(POLICY, "1"), performer([Outcome.PASSED] * place + [bad] * 100), saved.append)
        assert end.phase.final
        assert len(saved) <= place + 2
        assert (end.phase is Phase.DEGRADED) == (end.verdicts[-1].step == "rollback")

"""Leases, guards and the journal of a model in a cluster: compare-and-set against whoever else writes."""

import datetime as dt
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.kubernetes import lease, names
from deployments.kubernetes.client import Client, Conflict
from deployments.kubernetes.cluster import Cluster, Gateway, Json
from deployments.kubernetes.lease import State
from deployments.target import Entry, Fence, LeaseHeld, StaleFence, TargetError

MODEL = "Flight delay"


class World:
    """A cluster, and state in it as several processes would have it."""

    def __init__(self, api: object, file: Path) -> None:
        self.api = api
        self.cluster = Cluster(kubeconfig=file, gateway=Gateway(name="edge", url="http://127.0.0.1:1"), patience=5)
        self.client = Client(self.cluster)
        self.state = self.another()

    def another(self) -> State:
        return State(Client(self.cluster), self.cluster)

    def lease(self) -> Json:
        found = self.client.get("Lease", lease.name(MODEL))
        assert found is not None
        return found

    def expire(self) -> None:
        now = self.lease()
        self.client.replace({**now, "spec": {**now["spec"], "renewTime": "2020-01-01T00:00:00.000000Z"}})

    def route(self) -> Json:
        """The model's HTTPRoute, as a first promotion would leave it."""
        meta = {"name": names.slug(MODEL), "labels": names.labels(MODEL)}
        meta["annotations"] = {names.MODEL_NAME: MODEL, names.FENCE: "1"}
        return self.client.create(
            {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta, "spec": {}}
        )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    from tests.cluster.apiserver import ApiServer

    with ApiServer() as api:
        yield World(api, api.kubeconfig(tmp_path / "config"))


def entry(kind: str, promotion: str = "p", **data: object) -> Entry:
    return Entry(MODEL, promotion, kind, data)


def test_numbers_grow_with_holders(world: World) -> None:
    """The same holder keeps its number, also when its lease had lapsed; the next one's is higher, also after a
    release, and the Lease is one that kubectl can read."""
    first = world.state.lease(MODEL, "me")
    assert first == Fence(MODEL, "me", 1)
    assert world.another().lease(MODEL, "me") == first
    world.expire()
    assert world.state.lease(MODEL, "me") == first
    world.state.release(first)
    assert world.state.holder(MODEL) is None
    assert world.state.lease(MODEL, "me").number == 2
    spec = world.lease()["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"], spec["leaseDurationSeconds"]) == ("me", 2, 30)
    assert dt.datetime.fromisoformat(spec["renewTime"]).tzinfo is not None
    assert world.lease()["metadata"]["annotations"][names.MODEL_NAME] == MODEL


def test_who_holds_it_is_told_and_may_be_dispossessed(world: World) -> None:
    """Held is held; `take` takes it all the same, and then the old fence opens nothing."""
    old = world.state.lease(MODEL, "me")
    with pytest.raises(LeaseHeld, match="held by me since"):
        world.another().lease(MODEL, "other")
    holder = world.state.holder(MODEL)
    assert holder is not None
    assert (holder.name, 0 < holder.left <= 31) == ("me", True)
    new = world.another().lease(MODEL, "other", take=True)
    assert new.number == old.number + 1
    for stale in (
        lambda: world.state.check(MODEL, old),
        lambda: world.state.renew(old),
        lambda: world.state.write(entry("begin"), old),
        lambda: world.state.keep(MODEL, 1, old),
        lambda: world.state.guard(old).__enter__(),
    ):
        with pytest.raises(StaleFence, match="now it is other's"):
            stale()
    world.state.release(old)  # stale, and no error
    assert world.state.renew(new) == 30


def test_one_of_many_gets_it(world: World) -> None:
    """Of many that ask at the same time one has the lease."""
    got: list[Fence] = []
    held: list[LeaseHeld] = []

    def ask(name: str) -> None:
        try:
            got.append(world.another().lease(MODEL, name))
        except LeaseHeld as error:
            held.append(error)

    threads = [threading.Thread(target=ask, args=(f"p{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(held)) == (1, 5)


def test_a_new_number_is_on_what_stale_writers_could_still_write(world: World) -> None:
    """A writer that read the route and slept while its lease was taken finds another resourceVersion: nothing that it
    sends holds. Nothing that a gateway looks at changes by that."""
    route = world.route()
    old = world.state.lease(MODEL, "me")
    read = {kind: world.client.get(kind, name) for kind, name in _written().items()}
    new = world.another().lease(MODEL, "other", take=True)
    for kind, before in read.items():
        assert before is not None
        with pytest.raises(Conflict):
            world.client.apply(
                {
                    "apiVersion": before["apiVersion"],
                    "kind": kind,
                    "metadata": {key: before["metadata"][key] for key in ("name", "resourceVersion")},
                }
            )
        now = world.client.get(kind, _written()[kind])
        assert now is not None
        assert now["metadata"]["annotations"][names.FENCE] == str(new.number)
        with pytest.raises(StaleFence):
            lease.refuse_newer(now, old)
    now = world.client.get("HTTPRoute", names.slug(MODEL))
    assert now is not None
    assert now["metadata"].get("generation") == route["metadata"].get("generation")
    assert now["spec"] == route["spec"]


def _written() -> dict[str, str]:
    return {"HTTPRoute": names.slug(MODEL), "ConfigMap": lease.name(MODEL)}


def test_a_fence_that_could_not_be_raised_is_raised_by_the_next_try(world: World) -> None:
    """Cut between the Lease and the route, a holder that asks again has both."""
    world.route()
    world.state.lease(MODEL, "me")
    world.api.faults.answer(403, 1, verb="update", path="httproutes")
    with pytest.raises(TargetError):
        world.state.lease(MODEL, "other", take=True)
    fence = world.state.lease(MODEL, "other")
    now = world.client.get("HTTPRoute", names.slug(MODEL))
    assert now is not None
    assert lease.fence_of(now) == fence.number


def test_a_guard_holds_off_whoever_comes(world: World) -> None:
    """While a block runs a later holder waits, `take` too; then it has the lease."""
    fence = world.state.lease(MODEL, "me")
    got: list[Fence] = []
    other = threading.Thread(target=lambda: got.append(world.another().lease(MODEL, "other", take=True)))
    with world.state.guard(fence):
        other.start()
        other.join(0.5)
        assert not got
        with world.state.guard(fence):  # another block of the same holder
            pass
        other.join(0.3)
        assert not got
    other.join(5)
    assert [one.number for one in got] == [2]


def test_a_guard_of_the_dead_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies in its block holds nobody off for ever."""
    monkeypatch.setattr(lease, "GUARD_TIMEOUT", 0.4)
    fence = world.state.lease(MODEL, "me")
    world.state.guard(fence).__enter__()
    assert world.another().lease(MODEL, "other", take=True).number == 2


def test_lines_are_kept_until_their_promotion_has_ended(world: World) -> None:
    """Open promotions are there whole, of closed ones the last "end"; numbers only grow, whatever is taken away."""
    fence = world.state.lease(MODEL, "me")
    for kind in ("begin", "step", "end"):
        world.state.write(entry(kind, note=kind), fence)
    world.state.write(entry("begin", "q", text="ü" * 10), fence)
    assert [(one.promotion, one.kind, one.number) for one in world.another().journal(MODEL)] == [
        ("p", "end", 3),
        ("q", "begin", 4),
    ]
    world.state.write(entry("end", "q"), fence)
    [last] = world.state.journal(MODEL)
    assert (last.model, last.promotion, last.kind, last.number, last.fence) == (MODEL, "q", "end", 5, fence.number)
    assert last.at > 0
    assert world.state.journal("nobody") == ()
    world.state.keep(MODEL, 2, fence)
    assert (world.state.kept(MODEL), world.state.kept("nobody")) == (2, 0)
    assert len(world.state.journal(MODEL)) == 1


def test_a_line_is_written_once_whatever_becomes_of_the_answer(world: World) -> None:
    """A write whose answer is lost, or that others came before, is there once."""
    fence = world.state.lease(MODEL, "me")
    world.api.faults.lose(1, verb="update", path="configmaps")
    world.state.write(entry("begin"), fence)
    world.api.faults.answer(409, 2, verb="update", path="configmaps")
    world.state.write(entry("step"), fence)
    threads = [threading.Thread(target=world.another().write, args=(entry(f"s{n}"), fence)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = world.state.journal(MODEL)
    assert [one.kind for one in lines[:2]] == ["begin", "step"]
    assert sorted(one.kind for one in lines[2:]) == ["s0", "s1", "s2", "s3"]
    assert [one.number for one in lines] == [1, 2, 3, 4, 5, 6]


def test_more_than_a_cluster_keeps_is_refused_before_it_is_sent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is one clear line, and what was written before is still there."""
    fence = world.state.lease(MODEL, "me")
    world.state.write(entry("begin"), fence)
    monkeypatch.setattr(lease, "LIMIT", 600)
    with pytest.raises(TargetError, match=r"journal of Flight delay would take .* bytes"):
        world.state.write(entry("step", text=random.Random(1).randbytes(2000).hex()), fence)
    assert [one.kind for one in world.state.journal(MODEL)] == ["begin"]


def test_a_whole_policy_and_long_series_fit(world: World) -> None:
    """Half a megabyte of JSON is no problem: it is kept compressed."""
    fence = world.state.lease(MODEL, "me")
    world.state.write(entry("begin", series=[[n, n / 7] for n in range(25_000)]), fence)
    [line] = world.state.journal(MODEL)
    assert line.data["series"][-1] == [24_999, 24_999 / 7]


def test_a_model_that_has_another_ones_name_is_refused(world: World) -> None:
    """A Lease that is not ours is not taken."""
    meta = {"name": lease.name(MODEL), "annotations": {names.MODEL_NAME: "another"}}
    world.client.create({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": {}})
    with pytest.raises(TargetError, match="not that of Flight delay"):
        world.state.lease(MODEL, "me")

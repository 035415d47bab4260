"""What every serving target promises. Each test runs against the fake and against the real local target."""

from collections import Counter
from collections.abc import Mapping

import pytest

from deployments.local.supervisor import wait_for
from deployments.target import (
    Fence,
    LeaseHeld,
    Limit,
    Match,
    NeverReady,
    Pin,
    Served,
    Shape,
    StaleFence,
    TargetError,
    Traffic,
    Version,
)
from tests.contract.conftest import BROKEN, FLAWED, GOOD, MODEL, World

TENANT = Match("X-Tenant", "acme")


def observed(world: World, before: dict[str, Served], key: str, count: int) -> Served:
    """What `key` has served since `before`, once it is `count` answers and their latencies."""

    def now() -> Served:
        found = world.target.observe(MODEL).get(key, Served()).since(before.get(key, Served()))
        return Served({code: count for code, count in found.codes.items() if count}, found.latency)

    wait_for(lambda: sum(now().latency.counts) >= count, 10, f"{key} has {now().codes}, not {count}")
    return now()


def live(world: World, version: str) -> Mapping[str, int]:
    """The live answers of a version so far."""
    return world.target.observe(MODEL).get(version, Served()).codes


def test_deploy_again_is_the_same_endpoint(world: World, fence: Fence) -> None:
    """Deploying a version that is deployed changes nothing."""
    before = world.target.deployed(MODEL)
    assert world.target.deploy(world.version("2"), fence) == before["2"]
    assert world.target.deployed(MODEL) == before


def test_a_version_without_traffic_gets_none(world: World) -> None:
    """A deployed version that is not routed answers no live request."""
    before = dict(world.target.observe(MODEL))
    assert {reply.version for reply in world.send(50)} == {"1"}
    assert observed(world, before, "1", 50).codes == {"200": 50}
    assert live(world, "2") == before.get("2", Served()).codes


@pytest.mark.parametrize(("weight", "low", "high"), [(1000, 133, 267), (5000, 889, 1111), (10_000, 2000, 2000)])
def test_weights_are_obeyed(world: World, fence: Fence, weight: int, low: int, high: int) -> None:
    """Of 2,000 requests the challenger answers its share, within five standard deviations."""
    traffic = Traffic(MODEL, "1", "2", weight=weight)
    world.target.route(traffic, fence)
    assert world.target.traffic(MODEL) == traffic
    assert low <= world.pings(2000)["2"] <= high


def test_route_holds_when_it_returns(world: World, fence: Fence) -> None:
    """The first request after `route` is answered by whom it names, and so is each one after it."""
    for champion in ("2", "1", "2", "1"):
        world.target.route(Traffic(MODEL, champion), fence)
        assert {reply.version for reply in world.send(20)} == {champion}


def test_mirrored_copies_are_counted_apart_and_never_answer(world: World, fence: Fence) -> None:
    """Under a mirror of 100 % each request reaches the challenger as "2-shadow", and the champion answers."""
    world.target.route(Traffic(MODEL, "1", "2", mirror=10_000), fence)
    before = dict(world.target.observe(MODEL))
    assert {reply.version for reply in world.send(40)} == {"1"}
    assert observed(world, before, "2-shadow", 40).codes == {"200": 40}
    assert observed(world, before, "1", 40).codes == {"200": 40}
    assert live(world, "2") == before.get("2", Served()).codes


def test_answers_pair_by_request_id(world: World, fence: Fence) -> None:
    """The champion's answer and the challenger's to its copy are found under the request's own id."""
    world.target.route(Traffic(MODEL, "1", "2", mirror=10_000), fence)
    after = {
        version: max((one.number for one in world.target.answers(MODEL, version)), default=-1) for version in ("1", "2")
    }
    world.send(30, x=4.0, ids=lambda number: f"pair-{number}")

    def held(version: str) -> dict[str, tuple[bool, int, bytes, bytes]]:
        return {
            one.request_id: (one.shadow, one.status, one.request, one.response)
            for one in world.target.answers(MODEL, version, after[version])
        }

    wait_for(lambda: len(held("2")) >= 30, 10, "the copies did not arrive")
    champion, challenger = held("1"), held("2")
    assert champion.keys() == challenger.keys() == {f"pair-{number}" for number in range(30)}
    for name, (shadow, *rest) in champion.items():
        assert not shadow
        assert challenger[name] == (True, *rest)
    numbers = [one.number for one in world.target.answers(MODEL, "2", after["2"])]
    assert numbers == list(range(numbers[0], numbers[0] + 30))


def test_a_failing_challenger_costs_no_client_a_failure(world: World, fence: Fence) -> None:
    """Where the challenger answers 500 the champion answers the client, and `observe` tells the failures."""
    world.target.route(Traffic(MODEL, "1", "3", weight=5000), fence)
    before = dict(world.target.observe(MODEL))
    replies = world.send(60, x=13)
    assert {(reply.status, reply.version) for reply in replies} == {(200, "1")}
    retried = sum(reply.attempts > 1 for reply in replies)
    assert retried > 0
    seen = observed(world, before, "3", retried)
    assert seen.codes == {"500": retried}
    assert seen.errors == retried


def test_fallback_answers_for_the_champion(world: World, fence: Fence) -> None:
    """A fallback answers where the champion fails."""
    world.target.route(Traffic(MODEL, "3", fallback="2"), fence)
    assert {(reply.status, reply.version) for reply in world.send(10, x=13)} == {(200, "2")}
    assert {(reply.status, reply.version) for reply in world.send(10)} == {(200, "3")}


def test_a_pin_goes_before_the_weights(world: World, fence: Fence) -> None:
    """Requests that match a pin reach its version, which falls back as others do and says so; they are counted apart,
    since nobody drew lots for them."""
    traffic = Traffic(MODEL, "1", "2", weight=10_000, shape=Shape((Pin(TENANT, "3"),)))
    world.target.route(traffic, fence)
    assert world.target.traffic(MODEL) == traffic
    before = dict(world.target.observe(MODEL))
    replies = world.send(10, x=13, headers=lambda _: {"x-tenant": "acme"})
    assert {(reply.status, reply.chosen, reply.version) for reply in replies} == {(200, "3", "1")}
    assert {(reply.chosen, reply.version) for reply in world.send(10, headers=lambda _: {"x-tenant": "a"})} == {
        ("2", "2")
    }
    assert observed(world, before, "3-header", 10).codes == {"500": 10}
    assert live(world, "3") == before.get("3", Served()).codes


def test_a_growing_share_moves_no_user_back(world: World, fence: Fence) -> None:
    """With a sticky header who was answered by the challenger is so at each larger weight."""
    before: set[str] = set()
    for weight in (2000, 6000, 10_000):
        world.target.route(Traffic(MODEL, "1", "2", weight=weight, shape=Shape(sticky="X-User")), fence)
        replies = world.send(60, ids=lambda number: f"user-{number}", headers=lambda number: {"x-user": str(number)})
        moved = {reply.request_id for reply in replies if reply.version == "2"}
        assert before <= moved
        before = moved
    assert len(before) == 60


def test_beyond_its_limit_a_version_is_relieved(world: World, fence: Fence) -> None:
    """What is more than a version's limit goes along the chain."""
    traffic = Traffic(MODEL, "1", fallback="2", shape=Shape(limits=(Limit("1", 1),)))
    world.target.route(traffic, fence)
    assert world.target.traffic(MODEL) == traffic
    replies = world.send(30)
    assert {(reply.status, reply.chosen) for reply in replies} == {(200, "1")}
    assert Counter(reply.version for reply in replies)["2"] > 15


def test_a_model_that_fails_is_500_on_its_own_path(world: World) -> None:
    """On a version's own path its failures are what the client gets, counted apart from live traffic."""
    before = dict(world.target.observe(MODEL))
    replies = world.send(5, x=13, version="3")
    assert {(reply.status, reply.version) for reply in replies} == {(500, "3")}
    assert {reply.status for reply in world.send(5, version="2")} == {200}
    assert observed(world, before, "3-pinned", 5).codes == {"500": 5}
    assert live(world, "3") == before.get("3", Served()).codes


def test_an_unknown_version_is_404(world: World) -> None:
    """A path of a version that is not deployed is 404."""
    assert {reply.status for reply in world.send(3, version="77")} == {404}


def test_route_refuses_a_version_that_is_not_deployed(world: World, fence: Fence) -> None:
    """Traffic to a version that is not deployed is refused, and the traffic stays as it was."""
    for traffic in (
        Traffic(MODEL, "9"),
        Traffic(MODEL, "1", "9", weight=100),
        Traffic(MODEL, "1", "9", mirror=100),
        Traffic(MODEL, "1", fallback="9"),
        Traffic(MODEL, "1", shape=Shape(fallback="9")),
        Traffic(MODEL, "1", shape=Shape((Pin(TENANT, "9"),))),
    ):
        with pytest.raises(TargetError, match="9 is not deployed"):
            world.target.route(traffic, fence)
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")


def test_a_killed_challenger_costs_no_client_a_failure(world: World, fence: Fence) -> None:
    """kill -9 of the challenger under a canary: no failure, and it is brought back."""
    world.target.route(Traffic(MODEL, "1", "2", weight=5000), fence)
    world.kill("2")
    replies = world.send(200)
    assert Counter(reply.status for reply in replies) == {200: 200}
    assert {reply.version for reply in replies} == {"1"}
    world.revived("2")
    world.target.route(Traffic(MODEL, "2"), fence)
    assert {(reply.status, reply.version) for reply in world.send(20)} == {(200, "2")}


def test_route_refuses_a_version_that_is_not_healthy(world: World, fence: Fence) -> None:
    """No share and no copy goes to a version whose server is gone; the traffic stays as it was."""
    world.halt("2")
    for traffic in (Traffic(MODEL, "2"), Traffic(MODEL, "1", "2", mirror=1)):
        with pytest.raises(TargetError, match="not healthy"):
            world.target.route(traffic, fence)
        assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    world.resume("2")
    world.target.route(Traffic(MODEL, "2"), fence)


def test_a_held_lease_is_not_given_to_another(world: World) -> None:
    """One holder at a time; taking one's own again renews it and keeps the number; the next holder's is
    higher."""
    mine = world.target.lease(MODEL, "me")
    with pytest.raises(LeaseHeld, match="me"):
        world.target.lease(MODEL, "other")
    assert world.target.lease(MODEL, "me") == mine
    world.target.release(mine)
    others = world.target.lease(MODEL, "other")
    assert others.number > mine.number
    world.target.release(mine)  # stale, and no error
    with pytest.raises(LeaseHeld, match="other"):
        world.target.lease(MODEL, "me")
    world.target.release(others)


def test_a_stale_fence_opens_nothing(world: World) -> None:
    """After another holder took a lapsed lease every verb refuses the old fence, and nothing changes."""
    stale = world.target.lease(MODEL, "me")
    world.expire(stale)
    current = world.target.lease(MODEL, "other")
    assert current.number == stale.number + 1
    before = world.target.deployed(MODEL)
    with pytest.raises(StaleFence):
        world.target.deploy(world.version("8"), stale)
    with pytest.raises(StaleFence):
        world.target.route(Traffic(MODEL, "2"), stale)
    with pytest.raises(StaleFence):
        world.target.route(Traffic(MODEL, "1"), stale)
    with pytest.raises(StaleFence):
        world.target.retire(MODEL, "2", stale)
    with pytest.raises(StaleFence):
        world.target.retire(MODEL, "77", stale)
    with pytest.raises(StaleFence):
        world.target.route(Traffic(MODEL, "2"), Fence("another", "other", current.number))
    assert world.target.deployed(MODEL) == before
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    world.target.release(current)


def test_a_lapsed_lease_that_nobody_took_is_still_ours(world: World) -> None:
    """A lease that expired works as long as nobody else has taken it."""
    fence = world.target.lease(MODEL, "me")
    world.expire(fence)
    world.target.route(Traffic(MODEL, "2"), fence)
    assert world.target.lease(MODEL, "me") == fence
    world.target.release(fence)


def test_retire_is_refused_under_traffic(world: World, fence: Fence) -> None:
    """A version with live or mirrored traffic, or one to fall back on, is not retired."""
    for traffic, version in (
        (Traffic(MODEL, "1"), "1"),
        (Traffic(MODEL, "1", "2", weight=1), "2"),
        (Traffic(MODEL, "1", "2", mirror=1), "2"),
        (Traffic(MODEL, "1", fallback="2"), "2"),
        (Traffic(MODEL, "1", shape=Shape(fallback="2")), "2"),
        (Traffic(MODEL, "1", shape=Shape((Pin(TENANT, "2"),))), "2"),
    ):
        world.target.route(traffic, fence)
        with pytest.raises(TargetError, match="has traffic"):
            world.target.retire(MODEL, version, fence)
        assert version in world.target.deployed(MODEL)


def test_retire_takes_a_version_away(world: World, fence: Fence) -> None:
    """A retired version is gone with its path, also where it was named as a challenger without traffic;
    retiring it again is no error."""
    world.target.deploy(world.version("4"), fence)
    assert {reply.status for reply in world.send(2, version="4")} == {200}
    world.target.route(Traffic(MODEL, "1", "4"), fence)
    world.target.retire(MODEL, "4", fence)
    assert "4" not in world.target.deployed(MODEL)
    assert {reply.status for reply in world.send(2, version="4")} == {404}
    assert {reply.status for reply in world.send(5)} == {200}
    assert world.target.traffic(MODEL) == Traffic(MODEL, "1")
    with pytest.raises(TargetError):
        list(world.target.answers(MODEL, "4"))
    world.target.retire(MODEL, "4", fence)


def test_a_version_that_cannot_be_loaded_is_never_ready(world: World, fence: Fence) -> None:
    """Where a version's server does not come up, `NeverReady` holds its last words and nothing is left."""
    with pytest.raises(NeverReady) as failure:
        world.target.deploy(world.version("5", BROKEN), fence)
    assert "the weights are not where they should be" in failure.value.log
    assert "5" not in world.target.deployed(MODEL)


def test_another_artifact_than_the_admitted_one_is_refused(world: World, fence: Fence) -> None:
    """A version whose digest is not the recorded one is not deployed; nor is another artifact under a
    deployed number."""
    good = world.version("6")
    with pytest.raises(TargetError, match="admitted"):
        world.target.deploy(Version(MODEL, "6", good.path, "sha256:" + "0" * 64), fence)
    assert "6" not in world.target.deployed(MODEL)
    flawed = world.version("3", FLAWED)
    with pytest.raises(TargetError, match="deployed already"):
        world.target.deploy(Version(MODEL, "1", flawed.path, flawed.digest), fence)
    assert world.version("1", GOOD).digest != flawed.digest


def test_a_model_that_is_not_served_has_nothing(world: World) -> None:
    """Asking for a model that nobody deployed is no crash."""
    assert world.target.traffic("nobody") is None
    assert world.target.observe("nobody") == {}
    assert world.target.deployed("nobody") == {}
    with pytest.raises(TargetError):
        world.target.gateway("nobody")
    with pytest.raises(TargetError):
        list(world.target.answers("nobody", "1"))

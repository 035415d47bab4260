"""What `titleshot route` reads, how it joins the shape in force, and who belongs to a warm pool."""

from pathlib import Path

import pytest

from deployments.target import FULL, LeaseHeld, Limit, Match, Pin, Shape, Traffic, Version
from tasks import pool, shape
from tasks.journal import Journal
from tasks.settings import Mistake
from tests.fakes import FakeTarget

ACME, EU = Match("x-tenant", "acme"), Match("x-region", "eu")
NAMES = {"champion": "3", "challenger": "5", "previous": "2"}
IN_FORCE = Shape(
    pins=(Pin(ACME, "2"), Pin(EU, "3")),
    sticky="x-user",
    limits=(Limit("3", 20.0),),
    priority=Match("x-class", "gold"),
    fallback="1",
)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pin": ["x-tenant=acme"]}, "write it like x-tenant=acme:3"),
        ({"pin": ["x-tenant:3"]}, "write it like x-tenant=acme:3"),
        ({"pin": ["x-tenant=acme:"]}, "'' is no version"),
        ({"pin": ["x-tenant=acme:chalenger"]}, "did you mean 'challenger'?"),
        ({"pin": ["x tenant=acme:3"]}, "no name of a request header"),
        ({"pin": ["x-shadow=1:3"]}, "the gateway's own header"),
        ({"pin": ["x-tenant=:3"]}, "1 to 256 plain characters"),
        ({"pin": ["x-tenant=a:3", "X-Tenant=a:4"]}, "pinned twice"),
        ({"pin": ["x-tenant=a:3"], "unpin": ["x-tenant=a"]}, "unpinned as well"),
        ({"unpin": ["x-tenant"]}, "write it like x-tenant=acme"),
        ({"limit": ["3"]}, "write it like 3=20/s"),
        ({"limit": ["3=20"]}, "'20' is no rate"),
        ({"limit": ["3=0/s"]}, "greater than 0"),
        ({"limit": ["three=20/s"]}, "'three' is no version"),
        ({"limit": ["3=20/s", "3=none"]}, "two limits for 3"),
        ({"sticky": "x-request-id"}, "another for every request"),
        ({"sticky": ""}, "no name of a request header"),
        ({"priority": "gold"}, "write it like x-tenant=acme"),
        ({"fallback": "champion"}, "name the version that answers for both"),
        ({"fallback": "0"}, "'0' is no version"),
        ({"clear": ["pin"]}, "did you mean 'pins'?"),
    ],
)
def test_nonsense_is_refused_in_one_line(options: dict[str, list[str]], said: str) -> None:
    """What makes no sense names its option and says how to write it, with exit code 2."""
    with pytest.raises(Mistake) as caught:
        shape.read(**options)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"--{next(iter(options))}")
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2


def test_options_are_set_beside_what_is_in_force() -> None:
    """What is not spoken of stays; a pin for the same requests takes the old one's place, a new one comes last."""
    asked = shape.read(
        pin=["X-Tenant=acme:challenger", "x-time=12:30:previous"],
        limit=["champion=300/m", "5=7/s"],
        priority="x-class=silver",
    )
    merged = shape.merge(IN_FORCE, asked, NAMES)
    assert merged.pins == (Pin(ACME, "5"), Pin(EU, "3"), Pin(Match("x-time", "12:30"), "2"))
    assert merged.limits == (Limit("3", 5.0), Limit("5", 7.0))
    assert merged.priority == Match("x-class", "silver")
    assert (merged.sticky, merged.fallback) == ("x-user", "1")
    assert asked.versions == {"challenger", "previous", "champion", "5"}


def test_what_is_cleared_goes_first() -> None:
    """`--clear pins --pin ...` leaves the new pin alone, and `--clear all` leaves nothing."""
    asked = shape.read(clear=["pins", "fallback"], pin=["x-tenant=acme:3"])
    merged = shape.merge(IN_FORCE, asked, NAMES)
    assert merged.pins == (Pin(ACME, "3"),)
    assert merged.fallback is None
    assert merged.limits == IN_FORCE.limits
    assert shape.merge(IN_FORCE, shape.read(clear=["all"]), NAMES) == Shape()
    assert not shape.read().anything


def test_one_pin_or_one_limit_is_taken_away() -> None:
    """`--unpin` and a limit of `none` take away one each; where there is none, that is said with those there are."""
    asked = shape.read(unpin=["x-tenant=acme"], limit=["champion=none"])
    merged = shape.merge(IN_FORCE, asked, NAMES)
    assert merged.pins == (Pin(EU, "3"),)
    assert merged.limits == ()
    with pytest.raises(Mistake, match=r"no such pin \(there are: x-tenant=acme, x-region=eu\)"):
        shape.merge(IN_FORCE, shape.read(unpin=["x-tenant=other"]), NAMES)
    with pytest.raises(Mistake, match=r"no such limit \(limited: 3\)"):
        shape.merge(IN_FORCE, shape.read(limit=["5=none"]), NAMES)


def test_two_words_for_one_version_are_refused() -> None:
    """`--limit 3=... --limit champion=...` mean one version where v3 is champion."""
    with pytest.raises(Mistake, match="two limits mean version 3"):
        shape.merge(Shape(), shape.read(limit=["3=1/s", "champion=2/s"]), NAMES)


def test_the_table_says_who_answers() -> None:
    """Pins first, then the split with each one's chain, then the copies; limits and the rest are sentences."""
    traffic = Traffic("m", "3", "5", weight=500, mirror=FULL, fallback="2", shape=IN_FORCE)
    assert shape.rows(traffic) == [
        ("x-tenant: acme", "", "v2, else v3, then v1"),
        ("x-region: eu", "", "v3, else v2, then v1"),
        ("all others", "95%", "v3, else v2, then v1"),
        ("", "5%", "v5, else v3, then v2, then v1"),
        ("copies", "100%", "v5, and nobody sees its answer"),
    ]
    assert [note.split()[0] for note in shape.notes(traffic)] == ["sticky", "v3", "first"]
    assert shape.rows(Traffic("m", "3")) == [("all", "100%", "v3")]
    assert shape.as_json(traffic, "http://g")["weight"] == 5


def test_a_pool_begins_with_who_may_be_needed() -> None:
    """Champion, previous, challenger, then the newest; nobody twice, nobody who is quarantined."""
    versions = ["1", "2", "3", "9", "10", "11"]
    assert pool.order(["3", "2", None], versions, {"10"}) == ["3", "2", "11", "9", "1"]
    assert pool.order(["3", None, "9"], versions, ()) == ["3", "9", "11", "10", "2", "1"]


@pytest.mark.parametrize(
    ("warm", "keep", "unwanted", "spare"),
    [
        (0, {"4", "3"}, set(), ["1", "2", "5"]),
        (2, {"4", "3"}, set(), ["1", "2", "5"]),
        (3, {"4", "3"}, set(), ["1", "2"]),
        (4, {"4", "3"}, {"5"}, ["5"]),
        (9, {"4", "3"}, {"5"}, ["5"]),
        (9, {"4", "3"}, {"3"}, []),
        (1, {"4", None}, set(), ["1", "2", "3", "5"]),
    ],
)
def test_a_pool_neither_grows_nor_loses_who_is_needed(
    warm: int, keep: set[str | None], unwanted: set[str], spare: list[str]
) -> None:
    """What is needed stays, the newest fill the pool, the rejected go whatever room there is."""
    target = FakeTarget()
    fence = target.lease("m", "me")
    for number in "12345":
        target.deploy(Version("m", number, Path("/nowhere"), ""), fence)
    target.keep("m", warm, fence)
    assert pool.spare(target, "m", keep, unwanted) == spare


@pytest.fixture
def served() -> FakeTarget:
    """v3 serves, v2 and v4 are deployed beside it."""
    target = FakeTarget()
    fence = target.lease("m", "me")
    for number in "234":
        target.deploy(Version("m", number, Path("/nowhere"), ""), fence)
    target.route(Traffic("m", "3", fallback="2", shape=Shape(sticky="x-user")), fence)
    target.release(fence)
    return target


def test_what_is_asked_holds_and_is_read_back(served: FakeTarget) -> None:
    """Only the shape changes; the lease is given back."""
    traffic = shape.route(served, "m", shape.read(pin=["x-tenant=acme:champion"], limit=["4=5/s"], fallback="4"))
    wanted = Shape(pins=(Pin(ACME, "3"),), sticky="x-user", limits=(Limit("4", 5.0),), fallback="4")
    assert traffic == Traffic("m", "3", fallback="2", shape=wanted) == served.traffic("m")
    assert served.holder("m") is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pin": ["x-tenant=acme:7"]}, "m v7 is not deployed here, only v2, v3, v4"),
        ({"limit": ["7=5/s"]}, "m v7 is not deployed here"),
        ({"fallback": "previous"}, r"m v1 \(its previous\) is not deployed here"),
        ({"pin": ["x-tenant=acme:challenger"]}, "no version of m is its challenger now"),
    ],
)
def test_versions_that_are_not_there_are_refused(
    served: FakeTarget, monkeypatch: pytest.MonkeyPatch, options: dict[str, list[str]], said: str
) -> None:
    """A version that is not deployed, or an alias that names nobody: nothing changes."""
    monkeypatch.setattr("tasks.registry.aliased", lambda _, alias: {"previous": "1"}.get(alias))
    before = served.traffic("m")
    with pytest.raises(Mistake, match=said) as caught:
        shape.route(served, "m", shape.read(**options))  # type: ignore[arg-type]
    assert caught.value.code == 2
    assert served.traffic("m") == before


def test_nothing_changes_behind_a_promotion(served: FakeTarget) -> None:
    """While another process holds the model the call is refused; so it is where one has died in the middle."""
    fence = served.lease("m", "a promotion")
    with pytest.raises(LeaseHeld, match="a promotion"):
        shape.route(served, "m", shape.read(clear=["all"]))
    Journal(served, fence, "a rollback").begin_rollback("3", "2", "slow")
    served.release(fence)
    with pytest.raises(Mistake, match="`titleshot recover m` first"):
        shape.route(served, "m", shape.read(clear=["all"]))
    with pytest.raises(Mistake, match=r"other is not served here \(served: m\)"):
        shape.obeyed(served, "other")

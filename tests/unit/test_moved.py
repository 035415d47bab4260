"""What a hand has moved in the registry: told in words, from what gateway, journal and registry say."""

import dataclasses
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.target import Traffic, Version
from tasks import moved, registry_rest, swap
from tasks.journal import BY_HAND, ROLLBACK, Journal, agreed, opened
from tasks.moved import Facts, disagreements
from tasks.settings import Settings
from tests.fakes import FakeTarget
from validations.policy import read
from validations.promotion import Promotion
from validations.verdict import Evidence, Measurement, judge

AGREE = Facts(
    "m",
    serving="3",
    journal="3",
    previous="2",
    ended=True,
    aliases={"champion": "3", "previous": "2"},
    stages={"1": "None", "2": "Archived", "3": "Production", "4": "None"},
)
WAITING = dataclasses.replace(
    AGREE,
    aliases={**AGREE.aliases, "challenger": "4"},
    stages={**AGREE.stages, "4": "Staging"},
    promoting="4",
    promotion="m-v4-x",
)


def but(found: Facts = AGREE, **changes: Any) -> Facts:
    """The same facts, some of them others; aliases and stages on top of what they are."""
    for name in ("aliases", "stages"):
        if name in changes:
            together = {**getattr(found, name), **changes[name]}
            changes[name] = {key: value for key, value in together.items() if value is not None}
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize(
    "found",
    [
        AGREE,
        WAITING,
        but(stages=dict.fromkeys(AGREE.stages)),
        but(aliases={"challenger": "4"}),
        but(previous=None, aliases={"previous": "1"}),
        but(previous="9", aliases={"previous": None}),
        but(ended=False, stages={"3": "None", "1": "Production"}, aliases={"previous": None}),
        but(stages={"1": "Staging", "4": "Archived"}),
        Facts("m", None, None, None, ended=False, aliases={}, stages={"1": "Production"}),
    ],
    ids=[
        "all agree",
        "a promotion waits",
        "a registry without stages",
        "a challenger named by a hand",
        "a previous where nobody served before",
        "the version before is deleted",
        "nothing was promoted here yet",
        "other stages",
        "nothing serves",
    ],
)
def test_nothing_is_told_where_all_agree(found: Facts) -> None:
    """What agrees, what is nobody's business, and what an order of a person's looks like, is no problem."""
    assert disagreements(found) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            but(aliases={"champion": "4"}),
            [
                "the alias champion of m was moved by hand to v4: the gateway serves v3, the alias champion names v4",
                "the journal says v3: `titleshot doctor --mend` lets it name v3 again",
                "`titleshot promote m --version 4`",
            ],
        ),
        (but(WAITING, aliases={"champion": "1"}), ["moved by hand to v1"]),
        (but(aliases={"champion": None}), ["the alias champion of m was removed by hand", "lets it name v3 again"]),
        (but(aliases={"champion": "4"}, serving="4"), ["the journal says v3: `titleshot doctor --mend`"]),
        (but(serving="1"), ["the gateway serves v1, the alias champion names v3, the journal says v3"]),
        (but(aliases={"previous": "1"}), ["alias previous of m was moved by hand: it names v1", "that v2 served"]),
        (but(aliases={"previous": None}), ["it names nothing"]),
        (but(WAITING, aliases={"challenger": "1"}), ["it names v1, and v4 is being promoted (m-v4-x); v1 may be"]),
        (but(WAITING, aliases={"challenger": None}), ["it names nothing, and v4 is being promoted (m-v4-x): `"]),
        (
            but(stages={"3": "Archived", "4": "Production"}),
            ["v3 serves and is in Archived, not in Production, v4 is in Production and does not serve: a stage moves"],
        ),
        (but(WAITING, stages={"3": "None"}), ["v3 serves and is in None"]),
        (but(WAITING, stages={"4": "Production"}), ["v4 is in Production and does not serve"]),
    ],
)
def test_each_move_is_told_once_with_its_mend(found: Facts, words: list[str]) -> None:
    """What was moved, who sees what, and what mends it, in one sentence; also while a promotion waits for a person."""
    (told,) = disagreements(found)
    assert all(word in told for word in words), told
    assert "`titleshot doctor --mend`" in told


def test_several_moves_are_told_each() -> None:
    """Alias, stages and previous are told one by one."""
    found = but(aliases={"champion": "4", "previous": "3"}, stages={"4": "Production", "3": "Archived"})
    assert len(disagreements(found)) == 3


def test_where_the_policy_lets_traffic_follow_it_is_told() -> None:
    """Who follows, when, and why not."""
    by_hand = but(aliases={"champion": "4"})
    (told,) = disagreements(by_hand, "m.yaml")
    assert "`titleshot watch` gives v4 all traffic, as m.yaml says" in told
    (told,) = disagreements(by_hand, "m.yaml", "it is quarantined")
    assert told.endswith("v4 was not followed: it is quarantined")
    (told,) = disagreements(but(WAITING, aliases={"champion": "1"}), "m.yaml")
    assert "as m.yaml says, when m-v4-x has ended" in told


def test_only_a_move_that_is_clear_is_followed() -> None:
    """Gateway and journal agree, nothing is under way, and the alias names a version."""
    assert but(aliases={"champion": "4"}).moved_to == "4"
    for other in (
        AGREE,
        but(aliases={"champion": None}),
        but(aliases={"champion": "4"}, serving="4"),
        but(aliases={"champion": "4"}, journal="2"),
        but(WAITING, aliases={"champion": "1"}),
        Facts("m", None, None, None, ended=False, aliases={"champion": "1"}, stages={}),
    ):
        assert other.moved_to is None


def test_a_refusal_is_remembered_for_a_while(tmp_path: Path) -> None:
    """So that a version which cannot serve is not loaded at every look; it is forgotten when all agree again."""
    settings = Settings(home=tmp_path)
    assert moved.refused(settings, "m", "4") == ""
    moved.refuse(settings, "m", "4", "it never was ready")
    assert moved.refused(settings, "m", "4") == "it never was ready"
    assert moved.refused(settings, "m", "5") == moved.refused(settings, "n", "4") == ""
    past = time.time() - moved.PAUSE - 1
    os.utime(tmp_path / "run" / "follow" / "m" / "4", (past, past))
    assert moved.refused(settings, "m", "4") == ""
    moved.refuse(settings, "m", "4", "again")
    moved.forget(settings, "m")
    assert moved.refused(settings, "m", "4") == ""


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({}, None),
        ({"USERNAME": "ana"}, None),
        ({"TOKEN": "t"}, "Bearer t"),
        ({"USERNAME": "ana", "PASSWORD": "p", "TOKEN": "t"}, "Basic YW5hOnA="),
    ],
)
def test_mlflow_is_asked_with_the_credentials_of_its_own_client(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], shown: str | None
) -> None:
    """Name and password first, else a token, as MLflow's client has it."""
    for word in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{word}", raising=False)
    for word, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{word}", value)
    auth, headers = registry_rest.credentials()
    request = httpx.Request("GET", "http://127.0.0.1/", headers=headers)
    if auth is not None:
        request = next(auth.sync_auth_flow(request))
    assert request.headers.get("Authorization") == shown


def test_an_mlflow_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In words that say where it was asked."""
    settings = Settings(mlflow_uri="http://127.0.0.1:9")
    with pytest.raises(registry_rest.Unanswered, match=r"MLflow does not answer at http://127\.0\.0\.1:9/api"):
        registry_rest.get(settings, "registered-models/get", {"name": "m"})


@pytest.mark.parametrize(
    ("serving", "ends"), [("2", ("interrupted", "2", "1", 9.0)), ("3", ("promoted", "3", "2", None))]
)
def test_a_move_that_is_not_followed_further_ends_where_the_traffic_is(serving: str, ends: tuple[Any, ...]) -> None:
    """The journal says who serves now, and loses nothing of what it knew where nothing has moved."""
    target = FakeTarget()
    fence = target.lease("m", "p")
    for number in ("2", "3"):
        target.deploy(Version("m", number, Path("nowhere"), ""), fence)
    Journal(target, fence, "p").end("promoted", "2", "1", {"2": "d"}, 9.0)
    target.route(Traffic("m", "2"), fence)
    Journal(target, fence, "m-v3-hand").begin_by_hand("2", "3", "moved")
    left = opened(target, "m")
    assert left is not None
    assert (left.what, left.of, left.to, left.reason, left.waiting) == (BY_HAND, "2", "3", "moved", False)
    target.route(Traffic("m", serving), fence)
    swap.stays(target, "m", fence, left)
    last = agreed(target, "m")
    assert last is not None
    assert (last.phase, last.champion, last.previous, last.keep_until) == ends
    assert last.digests == {"2": "d"}
    assert opened(target, "m") is None


def test_a_rollback_amid_following_goes_back_from_where_the_traffic_is(tmp_path: Path) -> None:
    """The operator's order ends what follows the alias: the version that has just come loses its place."""
    target = FakeTarget()
    fence = target.lease("m", "p")
    for number in ("2", "3"):
        target.deploy(Version("m", number, Path("nowhere"), ""), fence)
    Journal(target, fence, "m-v3-hand").begin_by_hand("2", "3", "moved")
    target.route(Traffic("m", "3", fallback="2"), fence)
    left = swap.back(Settings(home=tmp_path), target, "m", fence, "a slip")
    assert (left.what, left.of, left.to) == (ROLLBACK, "3", "2")
    assert target.traffic("m") == Traffic("m", "2")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, ("2", "1", "3")), (3, ("3", "2", None))],
    ids=["before the cut-over", "before the watch"],
)
def test_what_waits_has_its_champion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int, expected: tuple[str | None, ...]
) -> None:
    """While a promotion waits its champion has to serve; where it waits after the cut-over, that is the challenger."""
    monkeypatch.setattr(moved, "_registry", lambda *_: ({}, {}))
    watch = "{kind: watch, run_time: 1s, checks: {error_rate: {max: 0.1}}}"
    policy = read(f"version: 1\nmodel: m\ngates: [{{kind: integrity}}, {watch}]")
    target = FakeTarget()
    fence = target.lease("m", "p")
    Journal(target, fence, "o").end("promoted", "2", "1", {})
    pen, now = Journal(target, fence, "p"), Promotion(id="p", champion="2", challenger="3", digest="d", policy=policy)
    pen.begin(now, "", "1", {})
    for _ in range(steps):
        step = now.next_step()
        assert step is not None
        seen = {name: Measurement.exact(bound.min or 0.0) for name, bound in now.bounds(step).items()}
        now = now.record(judge(step.name, now.bounds(step), Evidence(measurements=seen), 0))
        pen.verdict(now.verdicts[-1])
    pen.hold(datetime.now(UTC) + timedelta(hours=1), "it is quiet now")
    found = moved.facts(Settings(home=tmp_path), target, "m", None)
    assert (found.journal, found.previous, found.promoting) == expected
    assert found.promotion == "p"

"""Approvals on a real stack: the run is suspended, people prove who they are, and the promotion goes on where it stood."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyotp
import pytest

from deployments.local.supervisor import wait_for
from tasks import approve, approvers, flowruns, history, registry
from tasks.journal import opened
from tasks.settings import Mistake
from tests.flows.conftest import Maker, People, promote

INTEGRITY = {"kind": "integrity"}
APPROVAL = {"kind": "approval", "approvers": ["ana", "bo"]}


def state(settings: Any, run: str) -> str:
    found = flowruns.find(settings, run)
    assert found is not None
    assert found.type not in ("FAILED", "CRASHED"), found.message
    return found.type


def asks(settings: Any, stack: Any, model: str, number: int) -> Any:
    """Wait until the `number`th form can be filled in."""

    def there() -> bool:
        left = opened(stack, model)
        if left is None or left.asked is None or left.asked.round != number or not left.asked.flow_run:
            return False
        run = left.asked.flow_run
        # Prefect stores the form after the state.
        key = f"suspended-approval-{number}-1-description"
        stored = flowruns.ask(settings, "POST", f"/flow_runs/{run}/input/filter", {"prefix": key})
        return state(settings, run) == "PAUSED" and bool(stored)

    wait_for(there, 120, f"nothing is asked in round {number}", every=0.3)
    return opened(stack, model).asked


def over(settings: Any, run: str) -> str:
    wait_for(lambda: state(settings, run) == "COMPLETED", 150, "the run does not end", every=0.3)
    return run


@pytest.mark.long
def test_people_decide(
    stack: Any, worker: Any, settings: Any, maker: Maker, policy: Callable[..., Path], people: People
) -> None:
    """A wrong code is asked again; who requested it has no say; another's yes lets it go on to the champion's place."""
    model, first = maker.model, policy(INTEGRITY, name="first")
    champion, challenger = maker.version(), maker.version(seed=1)
    assert promote(model=model, policy=str(first), version=champion)["phase"] == "promoted"
    asked_for = {"model": model, "policy": str(policy(INTEGRITY, APPROVAL)), "version": challenger, "requester": "bo"}
    run = flowruns.create(settings, flowruns.PROMOTE, asked_for).id

    asked = asks(settings, stack, model, 1)
    assert asked.flow_run == run
    assert approve.pending(settings)[-1] == asked
    traffic = stack.traffic(model)
    assert (traffic.champion, traffic.weight, traffic.mirror) == (champion, 0, 0)
    with pytest.raises(Mistake, match="awaiting approval"):
        promote(model=model, policy=str(first), version=challenger)
    with pytest.raises(Mistake, match="not accepted"):
        flowruns.resume(settings, run, {})
    flowruns.resume(settings, run, {"decision": "approve", "approver": "ana", "code": "000000"})

    asks(settings, stack, model, 2)
    flowruns.resume(settings, run, {"decision": "approve", "approver": "bo", "code": people.code("bo")})

    asks(settings, stack, model, 3)
    flowruns.resume(settings, run, {"decision": "approve", "approver": "ana", "code": people.code("ana")})
    over(settings, run)
    assert registry.aliased(model, "champion") == challenger
    entry = history.of_flow_run(model, run)
    assert entry is not None
    stored = history.stored(entry.run_id)
    assert [v.step for v in stored.verdicts] == ["integrity", "approval", "deploy", "promote"]
    assert stored.phase.value == "promoted"
    data = history.evidence(entry.run_id, stored)["approval"]["approval"]
    ballots = data["ballots"]
    assert [b["accepted"] for b in ballots] == [False, False, True]
    assert "four eyes" in ballots[1]["reason"]
    assert data["requester"] == "bo"
    assert json.dumps(ballots).count(people.secrets["ana"]) == 0
    assert not approve.pending(settings)


@pytest.fixture
def alone(settings: Any, stack: Any) -> Iterator[None]:
    """No worker takes up what is handed over, should the session have one: the test itself goes on with it."""
    import httpx

    def pause(paused: bool) -> None:
        httpx.patch(f"{settings.prefect}/work_pools/titleshot", json={"is_paused": paused}, timeout=10)

    pause(True)
    yield
    pause(False)


def waits(maker: Maker, policy: Callable[..., Path], *gates: dict[str, Any], **asked: Any) -> tuple[str, str, str]:
    """A champion, and a challenger whose promotion waits for people; returns both and the promotion."""
    champion, challenger = maker.version(), maker.version(seed=1)
    first = policy(INTEGRITY, name="first")
    assert promote(model=maker.model, policy=str(first), version=champion)["phase"] == "promoted"
    asked = {"requester": "bo", **asked}
    found = promote(model=maker.model, policy=str(policy(*gates)), version=challenger, **asked)
    assert found["phase"] == "awaiting approval", found
    assert "goes on" in found["page"] or "runs/flow-run" in found["page"]
    return champion, challenger, found["promotion"]


def hand_in(settings: Any, stack: Any, model: str, promotion: str, **form: str) -> dict[str, Any]:
    """Give a form as the resumed run does; what came of it, and the ballot."""
    from flows import promote as flow
    from flows.approval import Awaiting, Form, Given

    left = opened(stack, model)
    assert left is not None
    assert left.asked is not None
    given = Given(left.asked, Form(**{"decision": "approve", "approver": "ana", **form}), datetime.now(UTC))
    try:
        return flow._go_on(settings, stack, model, promotion, given)
    except Awaiting as waiting:
        again = opened(stack, model)
        assert again is not None
        return {"phase": waiting.promotion.phase.value, "why": again.ballots[-1].reason, "text": waiting.text}


@pytest.mark.long
def test_nothing_is_gained_by_what_proves_nobody(
    stack: Any, settings: Any, maker: Maker, policy: Callable[..., Path], alone: None, people: People
) -> None:
    """What was shown and is no more so, a token for something else, one's own request: each is refused with its reason,
    and asked again; after five the promotion ends, and blames nobody.
    """
    model = maker.model
    champion, challenger, name = waits(maker, policy, INTEGRITY, APPROVAL)
    left = opened(stack, model)
    assert left is not None
    assert left.waiting
    entry = history.entry(name)
    client = registry.client()

    def refused(**form: str) -> str:
        found = hand_in(settings, stack, model, name, **form)
        assert found["phase"] == "awaiting approval"
        return str(found["why"])

    text = (
        approvers.names(people.home),
        refused(approver="bo", code=people.code("bo")),
    )
    assert "four eyes" in text[1]
    key = approvers.enrol_key(people.home, "bo", datetime.now(UTC), anew=True)
    assert left.asked is not None
    other = left.asked.model_copy(update={"subject": left.asked.subject.model_copy(update={"evidence": "sha256:0"})})
    token = approvers.sign(key, "ana", other, "approve", "", datetime.now(UTC))
    assert "ana" in refused(code=token)
    client.log_text(entry.run_id, "{}", "evidence/more.json")
    assert "void: the evidence changed" in refused(code=people.code("ana"))
    client.log_text(entry.run_id, "version: 1", "policy.yaml")
    assert "void: the policy changed" in refused(code=people.code("ana"))
    used = pyotp.TOTP(people.secrets["ana"]).at(people.used["ana"] * 30 - 30 * 20)
    found = hand_in(settings, stack, model, name, code=used)
    assert found["phase"] == "rejected"
    assert found["outcome"] == "inconclusive"
    assert "proved nobody" in found["why"]
    assert "titleshot.quarantine" not in client.get_model_version(model, challenger).tags
    assert registry.aliased(model, "champion") == champion


def test_time_hands_and_artifacts_end_what_waits(
    stack: Any, settings: Any, maker: Maker, policy: Callable[..., Path], alone: None, people: People
) -> None:
    """An approval that expired ends without blame, or with it where the policy says so; one who objects blames."""
    from flows.recover import recover

    model = maker.model
    _, challenger, name = waits(maker, policy, INTEGRITY, {**APPROVAL, "timeout": "1s", "expired": "failed"})
    wait_for(lambda: opened(stack, model).asked.until < datetime.now(UTC), 10, "it does not expire")
    found = recover(settings, model, 5)
    assert found is not None
    assert (found["phase"], found["outcome"]) == ("rejected", "failed")
    assert "0 of 1 agreed" in found["why"]
    assert "quarantine" in str(client_tags(model, challenger))

    third = maker.version(seed=2)
    asked = {"model": model, "policy": str(policy(INTEGRITY, APPROVAL)), "version": third}
    name = promote(**asked)["promotion"]
    found = hand_in(settings, stack, model, name, decision="reject", comment="not today", code=people.code("ana"))
    assert (found["phase"], found["outcome"]) == ("rejected", "failed")
    assert "ana rejected it: not today" in found["why"]


def client_tags(model: str, number: str) -> dict[str, str]:
    return dict(registry.client().get_model_version(model, number).tags)


@pytest.mark.long
def test_nothing_is_promoted_in_quiet_hours(
    stack: Any, settings: Any, maker: Maker, tmp_path: Path, policy: Callable[..., Path], alone: None, people: People
) -> None:
    """An approved challenger waits for the end of them, with all live requests on the champion; a rollback by hand
    meanwhile is of the champion, and what waited ends by it.
    """
    from flows.rollback import run as rollback

    model = maker.model
    numbers = [maker.version(seed=seed) for seed in range(3)]
    first = str(policy(INTEGRITY, name="first"))
    for number in numbers[:2]:
        assert promote(model=model, policy=first, version=number)["phase"] == "promoted"
    quiet = {"version": 1, "model": model, "quiet": [{}], "gates": [INTEGRITY, APPROVAL]}
    path = tmp_path / "quiet.yaml"
    path.write_text(json.dumps(quiet))
    name = promote(model=model, policy=str(path), version=numbers[2], requester="bo")["promotion"]

    from flows import promote as flow
    from flows.approval import Form, Given, Held

    left = opened(stack, model)
    assert left is not None
    assert left.asked is not None
    form = Form(decision="approve", approver="ana", code=people.code("ana"))
    with pytest.raises(Held, match="quiet hours: `promote`"):
        flow._go_on(settings, stack, model, name, Given(left.asked, form, datetime.now(UTC)))
    left = opened(stack, model)
    assert left is not None
    assert left.waiting
    assert left.until is not None
    with pytest.raises(Mistake, match="waits"):
        promote(model=model, policy=first, version=numbers[2])

    back = rollback(model, "the champion errs")
    assert (back["from"], back["to"], back["phase"]) == (numbers[1], numbers[0], "rolled back")
    assert opened(stack, model) is None
    assert history.entry(name).phase == "rolled back"
    assert registry.aliased(model, "champion") == numbers[0]
    assert stack.traffic(model).champion == numbers[0]

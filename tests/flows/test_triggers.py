"""Challengers that start by themselves, with a real registry and a real Prefect: one run each, however often one looks.

Nobody performs these runs: what is asked for is looked at.
"""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows import cli
from tasks import flowruns, history, triggers
from tasks.lookout import Lookout
from tasks.registry import client


@pytest.fixture
def deployment(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A deployment that no worker works for."""
    flow = httpx.post(f"{settings.prefect}/flows/", json={"name": "promote"}).json()["id"]
    body = {"name": "nobody", "flow_id": flow, "enforce_parameter_schema": False}
    made = httpx.post(f"{settings.prefect}/deployments/", json=body).json()["id"]
    monkeypatch.setattr(triggers, "PROMOTE", "promote/nobody")
    yield made
    httpx.delete(f"{settings.prefect}/deployments/{made}")


@pytest.fixture
def ours(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The session's stack with policies of our own, which its lookout does not see."""
    monkeypatch.setenv("TITLESHOT_POLICIES", str(tmp_path))
    return settings.model_copy(update={"policies": tmp_path})


@pytest.fixture
def model(ours: Any, deployment: str, request: pytest.FixtureRequest) -> Callable[..., str]:
    """A registered model of four versions, v1 champion, and its policy."""

    def make(trigger: str) -> str:
        name = f"{request.node.name.removeprefix('test_')[:30]}-{trigger}"
        client().create_registered_model(name)
        for number in range(1, 5):
            client().create_model_version(name, source=f"s3://nowhere/{name}/{number}")
        client().set_registered_model_alias(name, "champion", "1")
        text = f"version: 1\nmodel: {name}\ntrigger: {trigger}\ngates: [{{kind: integrity}}]\n"
        (ours.policy_folder / f"{name}.yaml").write_text(text)
        return name

    return make


def runs(settings: Any, model: str) -> list[flowruns.FlowRun]:
    return flowruns.tagged(settings, f"model/{model}")


def numbers(settings: Any, target: Any) -> list[str]:
    looked = triggers.due(settings, target)
    assert looked.problems == []
    return [one.version for one in looked.due]


def record(model: str, number: str, phase: str = "rejected") -> None:
    """A promotion of this version was begun."""
    digest = f"sha256:{number}"
    client().set_model_version_tag(model, number, "titleshot.digest", digest)
    tags = {"kind": "promotion", "challenger": number, "digest": digest, "phase": phase}
    history.open_run(model, f"{model}-v{number}-then", tags)


def test_alias(stack: Any, ours: Any, model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The version that `challenger` names, once: looked at ten times, by two who watch, it has one run."""
    name = model("alias")
    assert numbers(ours, stack) == []
    client().set_registered_model_alias(name, "challenger", "3")
    capfd.readouterr()
    assert cli.run(["due", "--json"]) == cli.FINE
    (shown,) = json.loads(capfd.readouterr().out)["due"]
    assert (shown["version"], shown["does"]) == ("3", "ask")
    assert runs(ours, name) == []
    news = [asked.news for _ in range(10) for asked in [triggers.start(ours, stack)]]
    (run,) = runs(ours, name)
    assert run.parameters == {"model": name, "version": "3", "trigger": "poll"}
    assert [bool(one) for one in news] == [True] + [False] * 9
    assert cli.run(["due"]) == cli.FINE
    assert f"{name} v3 waits: its run is Scheduled" in capfd.readouterr().out.replace("Late", "Scheduled")
    # It was begun in the meantime: by whom does not matter.
    record(name, "3")
    assert triggers.handled(name, "3", "sha256:3", stack) == f"{name}-v3-then (rejected)"
    assert triggers.handled(name, "3", "sha256:another") == triggers.handled(name, "2", "sha256:3") == ""
    assert numbers(ours, stack) == []
    client().set_registered_model_alias(name, "challenger", "1")
    assert numbers(ours, stack) == []


def test_tag_and_version(stack: Any, ours: Any, model: Any) -> None:
    """The tagged ones, or all that are newer than the champion; of each model the oldest that was not handled goes."""
    tagged, newer = model("tag"), model("version")
    for number, value in (("2", "false"), ("4", "true"), ("3", "true")):
        client().set_model_version_tag(tagged, number, "titleshot.promote", value)
    record(newer, "2", "promoted")
    looked = triggers.due(ours, stack)
    assert [(one.model, one.version) for one in looked.due] == [
        (tagged, "3"),
        (tagged, "4"),
        (newer, "3"),
        (newer, "4"),
    ]
    found = Lookout(ours, stack, stack).look()
    assert len(found.news) == 2
    assert not [problem for problem in found.problems if tagged in problem or newer in problem]
    for name in (tagged, newer):
        (run,) = runs(ours, name)
        assert run.parameters["version"] == "3"
    # A person said no to one, the other waits for its worker: then the next one of the first goes.
    (run,) = runs(ours, tagged)
    flowruns.settle(ours, run.id, "CANCELLED", "by hand")
    triggers.start(ours, stack)
    assert sorted(run.parameters["version"] for run in runs(ours, tagged)) == ["3", "4"]
    assert len(runs(ours, newer)) == 1
    # Without a champion every version is a challenger.
    client().delete_registered_model_alias(newer, "champion")
    assert [one.version for one in triggers.due(ours, stack).due if one.model == newer] == ["1", "3", "4"]


def test_again(stack: Any, ours: Any, model: Any, deployment: str) -> None:
    """A run that failed is asked for again after its pause, four times; then a person is told, once."""
    name = model("alias")
    client().set_registered_model_alias(name, "challenger", "2")
    # The first is an event's: it has no tags of ours.
    body = {"parameters": {"model": name, "version": "2", "trigger": "event"}, "state": {"type": "SCHEDULED"}}
    event = httpx.post(f"{ours.prefect}/deployments/{deployment}/create_flow_run", json=body).json()["id"]
    looked = triggers.due(ours, stack).due
    assert triggers.ask(ours, looked) == triggers.Asked()
    last, now = event, datetime.now(UTC)
    for attempt, pause in enumerate((10, 60, 300, 900), 1):
        flowruns.settle(ours, last, "FAILED", f"oh, number {attempt}")
        now = datetime.now(UTC)
        assert triggers.ask(ours, looked, now + timedelta(seconds=pause - 6)) == triggers.Asked()
        for _ in range(2):
            triggers.ask(ours, looked, now + timedelta(seconds=pause + 6))
        assert len(runs(ours, name)) == attempt
        (last,) = [run.id for run in runs(ours, name) if not run.over]
    flowruns.settle(ours, last, "CRASHED", "oh, the last one")
    told = [triggers.ask(ours, looked, now + timedelta(hours=hours)) for hours in (1, 50)]
    assert told[0] == told[1]
    assert told[0].news == []
    assert "5 runs ended before its promotion began, the last one so: oh, the last one" in told[0].problems[0]
    assert flowruns.page(ours, last) in told[0].problems[0]
    # One that had to leave it for later is no failure, and no answer either.
    other = model("tag")
    client().set_model_version_tag(other, "2", "titleshot.promote", "true")
    looked = [one for one in triggers.due(ours, stack).due if one.model == other]
    triggers.ask(ours, looked)
    (run,) = runs(ours, other)
    flowruns.settle(ours, run.id, "COMPLETED", "another one is under way", name=triggers.LATER)
    triggers.ask(ours, looked, datetime.now(UTC) + timedelta(minutes=2))
    assert len(runs(ours, other)) == 2

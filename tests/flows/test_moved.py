"""A hand in the MLflow UI: what it moves is told and set back, and followed where the policy says so."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.local.target import LocalTarget
from flows import cli
from flows.recover import follow, mend, recover
from tasks import history, moved, registry, swap
from tasks.lookout import Lookout
from tasks.settings import Settings
from tasks.status import status
from tests.flows.conftest import COLUMNS, Maker, promote, take_down

MODEL = "moved"


@pytest.fixture(scope="module")
def maker(stack: Any, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    """A model whose v2 took the place of v1, and v3, which nobody has promoted; each test leaves v2 in its place."""
    made = Maker(MODEL, settings.mlflow)
    path = tmp_path_factory.mktemp("moved") / "policy.yaml"
    path.write_text(json.dumps({"version": 1, "model": MODEL, "gates": [{"kind": "integrity"}]}))
    for seed in (1, 2):
        result = promote(model=MODEL, policy=str(path), version=made.version(seed=seed))
        assert result["phase"] == "promoted", result
    made.version(seed=3)
    yield made
    take_down(MODEL)


@pytest.fixture
def following(settings: Settings, tmp_path: Path) -> Settings:
    """Settings whose policy lets the traffic of the model follow the alias."""
    policy = {"version": 1, "model": MODEL, "follow_alias": True, "gates": [{"kind": "integrity"}]}
    (tmp_path / "moved.yaml").write_text(json.dumps(policy))
    return settings.model_copy(update={"policies": tmp_path})


def point(number: str) -> None:
    """What a person does in the MLflow UI."""
    registry.client().set_registered_model_alias(MODEL, "champion", number)


def told(settings: Settings) -> dict[str, Any]:
    return next(one for one in status(settings)["models"] if one["model"] == MODEL)


def stages() -> dict[str, str]:
    client = registry.client()
    return {number: client.get_model_version(MODEL, number).current_stage for number in ("1", "2", "3")}


def serves(stack: Any) -> str:
    body = {"dataframe_split": {"columns": COLUMNS, "data": [[0.1, 0.2, "a"]]}}
    answer = httpx.post(f"{stack.gateway(MODEL)}/invocations", json=body, timeout=30)
    answer.raise_for_status()
    return answer.headers["x-model-version"]


def aliases() -> dict[str, str]:
    return {name: str(n) for name, n in registry.client().get_registered_model(MODEL).aliases.items()}


def test_a_stage_moved_by_hand_is_told_and_moves_nothing(stack: Any, settings: Settings, maker: Maker) -> None:
    """Stages and the alias previous are set back on request; the traffic is with the champion all the time."""
    assert told(settings)["problems"] == []
    registry.client().transition_model_version_stage(MODEL, "3", "Production", archive_existing_versions=True)
    registry.client().set_registered_model_alias(MODEL, "previous", "3")
    stage, previous = told(settings)["problems"]
    assert "v2 serves and is in Archived, not in Production, v3 is in Production and does not serve" in stage
    assert "it names v3, and the journal says that v1 served before" in previous
    assert serves(stack) == "2"
    done = mend(settings, MODEL, 0)
    assert len(done) == 3, done
    assert told(settings)["problems"] == []
    assert stages() == {"1": "Archived", "2": "Production", "3": "None"}
    assert aliases() == {"champion": "2", "previous": "1"}
    assert mend(settings, MODEL, 0) == []


def test_an_alias_moved_by_hand_is_told_and_not_followed(stack: Any, settings: Settings, maker: Maker) -> None:
    """Without a policy that says so the traffic stays where it is, and doctor's mend sets the alias back."""
    point("3")
    found = told(settings)
    assert found["follow"] is None
    assert "the alias champion of moved was moved by hand to v3: the gateway serves v2" in found["problems"][0]
    assert follow(settings, MODEL) is None
    assert MODEL not in Lookout(settings, stack).look().to_follow
    assert serves(stack) == "2"
    assert mend(settings, MODEL, 0) == ["the alias champion of moved named v3, and names v2 again, which serves"]
    assert told(settings)["agrees"]


class Died(Exception):
    """Stands for the death of the process: nobody catches it."""


@pytest.mark.parametrize(("there", "phase"), [(False, "interrupted"), (True, "promoted")], ids=["before", "after"])
def test_a_death_amid_following_is_brought_to_its_end(
    stack: Any,
    following: Settings,
    maker: Maker,
    monkeypatch: pytest.MonkeyPatch,
    there: bool,
    phase: str,
) -> None:
    """Before the traffic moved nothing has happened, after it registry and record follow: all agree either way."""

    def dies(*_: Any) -> None:
        raise Died

    point("1")
    with monkeypatch.context() as patch:
        patch.setattr(*((swap, "tell", dies) if there else (LocalTarget, "route", dies)))
        with pytest.raises(Died):
            follow(following, MODEL)
    assert serves(stack) == ("1" if there else "2")
    assert "was left behind" in told(following)["problems"][0]
    done = recover(following, MODEL, 5)
    assert done is None or done["phase"] == phase, "the stack's own watch may be faster, and has the same end"
    if not there:
        assert told(following)["follow"] == "1"
        mend(following, MODEL, 0)
    else:
        assert told(following)["agrees"]
        assert aliases() == {"champion": "1", "previous": "2"}
        point("2")
        back = follow(following, MODEL)
        assert back is not None
        assert back["phase"] == "promoted"
    found = told(following)
    assert (found["serving"], found["problems"]) == ("2", [])


def test_where_the_policy_says_so_the_traffic_follows(
    stack: Any, following: Settings, maker: Maker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Traffic, stages, previous and the history follow; a way back is there; what was rolled back is not followed."""
    monkeypatch.setenv("TITLESHOT_POLICIES", str(following.policies))
    point("3")
    assert told(following)["follow"] == "3"
    assert MODEL in Lookout(following, stack).look().to_follow
    assert cli.run(["recover", MODEL]) == cli.FINE
    assert "promoted" in capfd.readouterr().out
    assert serves(stack) == "3"
    assert told(following)["problems"] == []
    assert stages() == {"1": "Archived", "2": "Archived", "3": "Production"}
    assert aliases() == {"champion": "3", "previous": "2"}
    assert set(stack.deployed(MODEL)) == {"2", "3"}
    record = history.entries(MODEL)[0]
    assert (record.kind, record.champion, record.challenger, record.phase) == ("by hand", "2", "3", "promoted")
    assert registry.quarantined(MODEL, registry.find(MODEL, "2").tags["titleshot.digest"]) is None
    assert cli.run(["explain", record.id]) == cli.FINE
    assert "v3 took the place of v2: the alias champion was moved by hand" in " ".join(capfd.readouterr().out.split())
    assert follow(following, MODEL) is None

    assert cli.run(["rollback", MODEL, "--reason", "it was a slip"]) == cli.FINE
    assert (serves(stack), aliases()["champion"]) == ("2", "2")
    point("3")
    assert cli.run(["recover", MODEL]) == cli.ERROR
    assert "moved v3 is quarantined, its artifact unchanged" in " ".join(capfd.readouterr().err.split())
    assert serves(stack) == "2"
    found = told(following)
    assert found["follow"] is None
    assert "v3 was not followed: moved v3 is quarantined" in found["problems"][0]
    mend(following, MODEL, 0)
    Lookout(following, stack).look()
    assert moved.refused(following, MODEL, "3") == ""

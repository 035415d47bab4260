"""Aliases and stages in a real MLflow registry (its own database file): compared before they are set, under a guard."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from deployments.target import StaleFence
from tasks import registry
from tests.fakes import FakeTarget

MODEL = "m"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A registry with versions 1 to 3 of MODEL."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    folder = tmp_path_factory.mktemp("registry")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    made = registry.client()
    made.create_registered_model(MODEL)
    for _ in range(3):
        made.create_model_version(MODEL, str(folder))
    yield made
    if before is None:
        del os.environ["MLFLOW_TRACKING_URI"]
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture
def empty(client: Any) -> Any:
    """The registry without any alias."""
    for alias in dict(client.get_registered_model(MODEL).aliases):
        client.delete_registered_model_alias(MODEL, alias)
    return client


def free() -> AbstractContextManager[None]:
    """A guard that holds off nobody."""
    return nullcontext()


def stage(client: Any, number: str) -> str:
    """A version's stage."""
    return str(client.get_model_version(MODEL, number).current_stage)


def test_an_alias_moves_with_its_stage(empty: Any) -> None:
    """Who becomes champion gets Production, who was before Archived."""
    registry.move(MODEL, "champion", "1", of=(None,), guard=free())
    registry.move(MODEL, "champion", "2", of=("1",), guard=free())
    registry.move(MODEL, "previous", "1", of=(None,), guard=free())
    assert (registry.aliased(MODEL, "champion"), registry.aliased(MODEL, "previous")) == ("2", "1")
    assert (stage(empty, "2"), stage(empty, "1")) == ("Production", "Archived")


def test_what_is_so_already_is_done(empty: Any) -> None:
    """Whoever repeats a move that was cut off after the alias sets the stage, and nothing twice."""
    empty.set_registered_model_alias(MODEL, "champion", "2")
    empty.transition_model_version_stage(MODEL, "2", "None")
    registry.move(MODEL, "champion", "2", of=("1",), guard=free())
    assert stage(empty, "2") == "Production"


def test_an_alias_that_someone_moved_is_left_alone(empty: Any) -> None:
    """It names neither what it did nor what it should: the move refuses and says what it names."""
    empty.set_registered_model_alias(MODEL, "champion", "3")
    with pytest.raises(registry.Moved, match="champion of m names v3, not v1"):
        registry.move(MODEL, "champion", "2", of=("1",), guard=free())
    assert registry.aliased(MODEL, "champion") == "3"


def test_an_alias_can_be_taken_away_twice(empty: Any) -> None:
    """Nothing to take away is no error."""
    registry.move(MODEL, "challenger", "2", of=(None,), guard=free())
    for _ in range(2):
        registry.move(MODEL, "challenger", None, of=("2",), guard=free())
    assert registry.aliased(MODEL, "challenger") is None


def test_a_challenger_no_more_has_the_stage_of_the_alias_it_keeps(empty: Any) -> None:
    """The previous champion that tried again and failed is archived, not without a stage."""
    registry.move(MODEL, "previous", "1", of=(None,), guard=free())
    for number, then in (("1", "Archived"), ("3", "None")):
        empty.transition_model_version_stage(MODEL, number, "Staging")
        registry.unstage(MODEL, number, free())
        assert stage(empty, number) == then


def test_who_has_lost_the_lease_moves_no_alias_and_no_stage(empty: Any) -> None:
    """The guard of a stale fence raises before anything is asked of the registry."""
    target = FakeTarget()
    fence = target.lease(MODEL, "me")
    target.lease(MODEL, "other", take=True)
    registry.move(MODEL, "champion", "1", of=(None,), guard=free())
    with pytest.raises(StaleFence):
        registry.move(MODEL, "champion", "2", of=("1",), guard=target.guard(fence))
    with pytest.raises(StaleFence):
        registry.unstage(MODEL, "1", target.guard(fence))
    assert (registry.aliased(MODEL, "champion"), stage(empty, "1")) == ("1", "Production")


def test_the_look_and_the_change_are_one(empty: Any) -> None:
    """Somebody who gets in between them meets a guard that is held."""
    inside = []

    @contextmanager
    def guard() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    registry.move(MODEL, "champion", "1", of=(None,), guard=guard())
    assert inside == [True, False]


def test_a_server_that_is_away_is_told_from_one_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the first is worth another try."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowException) as away:
        MlflowClient("http://127.0.0.1:9", "http://127.0.0.1:9").get_registered_model("m")
    assert registry.unreachable(away.value)
    with pytest.raises(MlflowException) as refused:
        MlflowClient(f"sqlite:///{tmp_path / 'm.db'}").get_registered_model("nobody")
    assert not registry.unreachable(refused.value)


def test_downloads_that_were_cut_off_are_told_from_versions(tmp_path: Path) -> None:
    """A version's own folder is its number; what was fetched beside it carries a token."""
    for name in ("3", "3.0a1b2c3d", "notes.txt"):
        (tmp_path / "models" / MODEL / name).mkdir(parents=True)
    assert [path.name for path in registry.half_downloads(tmp_path, MODEL)] == ["3.0a1b2c3d"]

"""The init container's program, against a real MLflow registry (a database file): whole, right, or one line and a code."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlflow")
import mlflow
from mlflow.tracking import MlflowClient

from deployments import fetch
from deployments.artifact import digest

MODEL = "flight delay"
Run = Callable[..., int]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    (path / "data").mkdir(parents=True)
    (path / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: x\n")
    (path / "data" / "weights").write_bytes(bytes(range(256)) * 1000)
    return path


@pytest.fixture(scope="module")
def uri(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry with version 1 of MODEL."""
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = MlflowClient(uri, uri)
    client.create_registered_model(MODEL)
    client.create_model_version(MODEL, source.as_uri())
    yield uri
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])


@pytest.fixture
def run(uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the program as `--to tmp_path/served/m-v1`."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    # What the program sets where nobody has, taken back afterwards.
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

    def run(number: str = "1", admitted: str = "", *more: str) -> int:
        given = ["fetch", "--model", MODEL, "--version", number, "--digest", admitted or digest(source)]
        monkeypatch.setattr(sys, "argv", [*given, "--to", str(tmp_path / "served" / "m-v1"), "--patience", "0", *more])
        return fetch.main()

    return run


def test_a_version_is_fetched_once(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lies there as admitted, with nothing beside it; the second time it is left as it is, and a half or changed one
    is replaced."""
    to = tmp_path / "served" / "m-v1"
    half = to.with_name(".m-v1.1234.part")
    half.mkdir(parents=True)
    assert run() == 0
    assert digest(to) == digest(source)
    assert [path.name for path in to.parent.iterdir()] == ["m-v1"]
    assert capsys.readouterr().out == f"{MODEL} 1 was fetched: {to}\n"
    inode = to.stat().st_ino
    assert run() == 0
    assert to.stat().st_ino == inode
    assert "is there already" in capsys.readouterr().out
    (to / "data" / "weights").unlink()
    assert run() == 0
    assert digest(to) == digest(source)


def test_into_a_volume_it_goes_without_a_rename(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point cannot be replaced: what is in it is."""
    to = tmp_path / "served" / "m-v1"
    to.mkdir(parents=True)
    (to / "old").write_text("x")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == to)
    inode = to.stat().st_ino
    assert run() == 0
    assert (digest(to), to.stat().st_ino) == (digest(source), inode)
    assert sorted(path.name for path in to.iterdir() if path.name != "registered_model_meta") == ["MLmodel", "data"]


def test_another_artifact_is_not_left_behind(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code 3, one line with both digests, and nothing at the place; what was right there before stays."""
    assert run("1", "sha256:other") == fetch.WRONG
    said = capsys.readouterr().err
    assert said.startswith(f"{MODEL} 1 is not what was admitted: its digest is sha256:")
    assert said.endswith("admitted was sha256:other\n")
    assert said.count("\n") == 1
    assert list((tmp_path / "served").iterdir()) == []


def test_what_cannot_be_had_is_one_line(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No such version, files that are gone, no place to write to, no address: code 1 and one line."""
    assert run("7") == fetch.FAILED
    assert "flight delay 7 cannot be fetched from sqlite" in capsys.readouterr().err
    (tmp_path / "served").mkdir(exist_ok=True)
    (tmp_path / "file").write_text("x")
    assert run("1", "", "--to", str(tmp_path / "file" / "m")) == fetch.FAILED
    away = source.rename(source.with_name("away"))
    try:
        assert run("1", "sha256:x") == fetch.FAILED
    finally:
        away.rename(source)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert run() == fetch.FAILED
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("flight delay 1 cannot be ")]) == 3, lines
    assert lines[-1] == "flight delay 1 cannot be fetched: MLFLOW_TRACKING_URI is not set"


def test_an_mlflow_that_is_not_there_is_asked_again_for_a_while(
    run: Run, uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused connection is tried again until the patience is over; when MLflow is back in time, all is well."""
    nowhere, slept = "http://127.0.0.1:9", list[float]()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere)
    mlflow.set_tracking_uri(nowhere)
    mlflow.set_registry_uri(nowhere)

    def back(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)

    monkeypatch.setattr(fetch.time, "sleep", back)
    try:
        assert run("1", "", "--patience", "60") == 0
        assert len(slept) == 2
        mlflow.set_tracking_uri(nowhere)
        mlflow.set_registry_uri(nowhere)
        assert run("1", "sha256:x") == fetch.FAILED
    finally:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    said = capsys.readouterr().err
    assert said.startswith(f"flight delay 1 cannot be fetched from {nowhere}: ")
    assert said.count("\n") == 1

"""The warm pool and traffic shaped by hand, on the real stack: moving to a warm version loads nothing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.target import Shape
from flows import cli
from tasks import history, registry
from tests.flows.conftest import COLUMNS, Maker, promote, rollback, take_down

MODEL = "warm_pool"
Ran = Callable[..., tuple[int, Any, str]]


def ask(target: Any, path: str = "", **headers: str) -> tuple[int, str | None, str | None]:
    """Status, who answered, and who was chosen."""
    body = {"dataframe_split": {"columns": COLUMNS, "data": [[0.1, 0.2, "a"]]}}
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = httpx.post(f"{target.gateway(MODEL)}{path}/invocations", json=body, headers=sent, timeout=30)
    return answer.status_code, answer.headers.get("x-model-version"), answer.headers.get("x-model-chosen")


def pids(target: Any) -> dict[str, int]:
    programs = target.supervisor.status()
    return {number: programs[f"model-{MODEL}-{number}"].pid for number in target.deployed(MODEL)}


@pytest.fixture
def ran(capfd: pytest.CaptureFixture[str]) -> Ran:
    """Runs a command line with --json; returns its exit code, what it found, and what it said on stderr."""

    def run(*arguments: str) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = cli.run([*arguments, "--json"])
        said = capfd.readouterr()
        return code, json.loads(said.out) if said.out.strip() else None, said.err.strip()

    return run


@pytest.fixture(scope="module")
def maker(settings: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    """Six versions: four good ones, one that does not load, one with a pickle; v2 is champion, v1 was before it."""
    import mlflow

    made = Maker(MODEL, settings.mlflow)
    for seed in range(4):
        made.version(seed=seed)
    folder = tmp_path_factory.mktemp("broken")
    mlflow.artifacts.download_artifacts(f"models:/{MODEL}/4", dst_path=str(folder))
    text = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(text.replace("loader_module: mlflow.sklearn", "loader_module: mlflow.nowhere"))
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(folder), "m")
    client = registry.client()
    client.create_model_version(MODEL, source=f"runs:/{run.info.run_id}/m", run_id=run.info.run_id)
    made.version(seed=9, serialization_format="cloudpickle")
    for alias, number in (("champion", "2"), ("previous", "1"), ("challenger", "3")):
        client.set_registered_model_alias(MODEL, alias, number)
    yield made
    take_down(MODEL)


def test_an_interrupt_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: exit code 130, and where to look."""

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.status.status", interrupted)
    assert cli.run(["status"]) == 130
    assert "interrupted; `titleshot status`" in capfd.readouterr().err


@pytest.mark.long
def test_moving_to_a_warm_version_loads_nothing(stack: Any, maker: Maker, tmp_path: Path, ran: Ran) -> None:
    """`serve --warm 4` serves the champion and loads the three that come next; then a promotion and a rollback leave
    every model server as it was.
    """
    assert ran("serve", "nobody", "--warm", "2")[0] == 2
    code, found, said = ran("serve", MODEL, "--warm", "4")
    assert code == 0, said
    assert [one["version"] for one in found["versions"]] == ["4", "3", "2", "1"]
    assert {number: why.split()[0] for number, why in found["left_out"].items()} == {"5": MODEL, "6": "model.pkl"}
    assert "mlflow.nowhere" in found["left_out"]["5"]
    assert "v4 is warm after" in said
    assert ask(stack) == (200, "2", "2")
    assert stack.traffic(MODEL).fallback == "1"

    before = pids(stack)
    policy = tmp_path / "policy.yaml"
    policy.write_text(json.dumps({"version": 1, "model": MODEL, "gates": [{"kind": "integrity"}]}))
    result = promote(model=MODEL, policy=str(policy))
    assert (result["phase"], result["challenger"]) == ("promoted", "3"), result
    assert ask(stack) == (200, "3", "3")
    assert pids(stack) == before, "a model was loaded, or taken out of the pool"
    verdicts = {v.step: v for v in history.stored(history.entry(result["promotion"]).run_id).verdicts}
    assert verdicts["deploy"].evidence.measurements["start_s"].value < 2

    assert rollback(model=MODEL, reason="a test")["phase"] == "rolled back"
    assert ask(stack) == (200, "2", "2")
    assert pids(stack) == before

    # Rejected before it was deployed: what was warm already leaves the pool all the same.
    gate = {"kind": "integrity", "checks": {"answers_example": {"max": 0}}}
    policy.write_text(json.dumps({"version": 1, "model": MODEL, "gates": [gate]}))
    assert promote(model=MODEL, policy=str(policy), version="4")["phase"] == "rejected"
    del before["4"]
    assert pids(stack) == before

    # v3 is quarantined now, and was champion before: it stays, without answering anybody.
    code, found, said = ran("serve", MODEL, "--warm", "0")
    assert code == 0, said
    assert {one["version"]: one["role"] for one in found["versions"]} == {"2": "champion", "3": "previous"}
    assert stack.traffic(MODEL).fallback is None
    assert pids(stack) == {number: before[number] for number in ("2", "3")}


@pytest.mark.long
def test_traffic_is_shaped_by_hand(stack: Any, maker: Maker, ran: Ran) -> None:
    """`route` changes what it is asked to and nothing else, shows what was read back, and refuses what cannot be."""
    assert ran("serve", MODEL, "--warm", "3")[0] == 0
    assert stack.deployed(MODEL).keys() == {"1", "2", "3"}
    code, found, said = ran("route", MODEL, "--pin", "x-tenant=acme:1", "--pin", "x-tenant=me:3", "--sticky", "x-user")
    assert code == 0, said
    assert found["shape"]["pins"][1] == {"match": {"header": "x-tenant", "value": "me"}, "version": "3"}
    assert ask(stack, x_tenant="acme") == (200, "1", "1")
    assert ask(stack, x_tenant="me") == (200, "3", "3")
    assert ask(stack, x_tenant="else") == (200, "2", "2")
    assert ask(stack, "/v/1") == (200, "1", "1")

    # At the limit the next one in the chain answers; on its own path a version has no limit.
    code, found, _ = ran("route", MODEL, "--limit", "1=1/m", "--unpin", "x-tenant=me", "--fallback", "3")
    assert code == 0
    assert found["shape"]["sticky"] == "x-user"
    answers = [ask(stack, x_tenant="acme") for _ in range(4)]
    assert answers[-1] == (200, "2", "1")
    assert ask(stack, "/v/1") == (200, "1", "1")
    assert ask(stack, x_tenant="me")[1] == "2"

    for arguments, problem in (
        (["--pin", "x-tenant=acme:4"], "v4 is not deployed here, only v1, v2, v3"),
        (["--pin", "x-tenant=acme:99"], "v99 is not deployed here"),
        (["--unpin", "x-tenant=me"], "there is no such pin (there are: x-tenant=acme)"),
        (["--clear", "everything"], "one of pins, sticky"),
    ):
        code, _, said = ran("route", MODEL, *arguments)
        assert (code, len(said.splitlines())) == (2, 1)
        assert problem in said
    fence = stack.lease(MODEL, "a promotion")
    code, _, said = ran("route", MODEL, "--clear", "all")
    assert (code, len(said.splitlines())) == (1, 1)
    assert "held by a promotion" in said
    stack.release(fence)

    # What a pin names stays loaded; without it the pool can shrink.
    assert ran("serve", MODEL, "--warm", "0")[0] == 0
    assert stack.deployed(MODEL).keys() == {"1", "2", "3"}
    assert ran("route", MODEL, "--clear", "all")[0] == 0
    assert stack.traffic(MODEL).shape == Shape()
    assert ran("serve", MODEL, "--warm", "0")[0] == 0
    assert stack.deployed(MODEL).keys() == {"2", registry.aliased(MODEL, "previous")}

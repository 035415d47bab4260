"""The command line: a user's mistake is one line that says what, where and how to mend it."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from tasks import registry
from tests.flows.conftest import Maker, promote

GOOD = {"kind": "integrity"}
COMMANDS = (
    "up",
    "down",
    "status",
    "demo",
    "promote",
    "plan",
    "replay",
    "labels",
    "rollback",
    "serve",
    "route",
    "history",
    "explain",
    "show",
    "suite",
    "doctor",
)
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    """Runs a command line; returns its exit code and what it said on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        code = cli.run(list(arguments))
        return code, capfd.readouterr().err.strip()

    return run


def test_every_command_has_help(capfd: pytest.CaptureFixture[str]) -> None:
    """`titleshot COMMAND --help` says what the command does."""
    for command in COMMANDS:
        assert cli.run([command, "--help"]) == 0
        assert f"titleshot {command}" in capfd.readouterr().out
    assert cli.run(["--version"]) == 0
    assert capfd.readouterr().out.strip() == version("titleshot")


@pytest.mark.parametrize(
    "arguments",
    [["nope"], ["promote"], ["up", "--mlflow-port", "x"], ["history", "m", "--nope"]],
)
def test_wrong_use_is_exit_code_2(said: Said, arguments: list[str]) -> None:
    """Unknown commands, missing and unreadable arguments: one line, exit code 2."""
    code, error = said(*arguments)
    assert code == 2
    assert error.startswith("titleshot: ")
    assert len(error.splitlines()) == 1


def test_help_and_status_do_not_import_the_heavy_libraries() -> None:
    """`titleshot --help` and `status` answer without MLflow, Prefect, pandas, SciPy or Great Expectations."""
    code = (
        "import sys; from flows import cli; cli.run(['--help']); cli.run(['status']);"
        "print([m for m in ('mlflow','prefect','pandas','scipy','sklearn','great_expectations','locust') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_stack_that_is_not_up(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that needs the stack says how to start it."""
    monkeypatch.setenv("TITLESHOT_HOME", str(tmp_path))
    for arguments in (
        ["history", "m"],
        ["promote", "m", "--policy", "p"],
        ["rollback", "m"],
        ["serve", "m", "--warm", "2"],
        ["route", "m"],
        ["explain", "p"],
        ["suite", "m"],
    ):
        code, error = said(*arguments)
        assert code == 1
        assert "`titleshot up`" in error
    assert said("down")[0] == 1
    assert cli.run(["status"]) == 1


def test_a_home_that_cannot_be_written(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the home should be: said in one line, with the variable that mends it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TITLESHOT_HOME", str(tmp_path / "file" / "home"))
    code, error = said("up")
    assert code == 1
    assert "cannot be written" in error
    assert "TITLESHOT_HOME" in error


def test_a_home_too_long_for_sockets(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets under a long path would fail one by one later; it is refused at once."""
    monkeypatch.setenv("TITLESHOT_HOME", str(tmp_path / ("x" * 120)))
    code, error = said("up")
    assert code == 1
    assert "TITLESHOT_HOME" in error


def test_a_port_in_use(said: Said, monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path_factory: Any) -> None:
    """A taken port is named, with the option that chooses another, and nothing is started."""
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="ts."))
    monkeypatch.setenv("TITLESHOT_HOME", str(place))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, error = said("up", "--mlflow-port", str(port))
    assert code == 1
    assert f"port {port} for mlflow is in use" in error
    assert "--mlflow-port" in error
    assert not (place / "run" / "supervisord.pid").exists()
    place_files = [p for p in place.iterdir() if p.name != "run"]
    assert not [p for p in place_files if p.name == "stack.json"]


def test_mlflow_unreachable(said: Said, monkeypatch: pytest.MonkeyPatch, stack: Any) -> None:
    """An address where nobody answers: said within seconds, with the variable to check."""
    monkeypatch.setenv("TITLESHOT_MLFLOW_URI", "http://127.0.0.1:9")
    code, error = said("history", "m")
    assert code == 1
    assert re.search(r"MLflow does not answer at http://127\.0\.0\.1:9 .*TITLESHOT_MLFLOW_URI", error)


def test_a_second_up(said: Said, stack: Any) -> None:
    """The stack that is up is left alone, and named."""
    before = {name: program.pid for name, program in stack.supervisor.status().items()}
    code, error = said("up")
    assert code == 1
    assert "is up already" in error
    assert {name: program.pid for name, program in stack.supervisor.status().items()} == before


def test_an_unknown_model(said: Said, stack: Any, tmp_path: Path) -> None:
    """The registry's own models are named beside the mistake."""
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"version": 1, "model": "nobody", "gates": [GOOD]}))
    for arguments in (
        ["promote", "nobody", "--policy", str(path)],
        ["history", "nobody"],
        ["rollback", "nobody"],
    ):
        code, error = said(*arguments)
        assert code == 2
        assert "has no model 'nobody'" in error
        assert "Traceback" not in error


def test_what_a_promotion_refuses_to_begin(said: Said, stack: Any, maker: Maker, policy: Any, tmp_path: Path) -> None:
    """Each thing that a promotion cannot begin with is one line, and leaves the registry as it was."""
    good = maker.version()
    unsigned = maker.version(signature=False)
    path = policy(GOOD)
    typo = tmp_path / "typo.yaml"
    typo.write_text(path.read_text().replace("kind", "knid"))
    cases = [
        (["--policy", str(tmp_path / "none.yaml")], 2, "cannot be read: No such file"),
        (["--policy", str(typo)], 2, "typo.yaml:1:"),
        (
            ["--policy", str(policy(GOOD, name="other", model="another"))],
            2,
            "is the policy of another, not of",
        ),
        ([], 2, "put it there, or name one with --policy"),
        (["--policy", str(path), "--timeout", "2h"], 2, "--timeout is for --wait"),
        (["--policy", str(path), "--wait", "--timeout", "soon"], 2, "a time is written like"),
        (["--policy", str(path)], 2, "name one with --version"),
        (["--policy", str(path), "--version", "77"], 2, "has no version 77: it has 1, 2"),
        (["--policy", str(path), "--version", unsigned], 1, "has no signature"),
    ]
    for arguments, expected, words in cases:
        code, error = said("promote", maker.model, *arguments)
        line = error.splitlines()[-1]
        assert (code, words in line) == (expected, True), error
        assert "Traceback" not in error
    assert said("rollback", maker.model)[0] == 2
    code, _ = said("promote", maker.model, "--policy", str(path), "--version", good)
    assert code == 0
    code, error = said("promote", maker.model, "--policy", str(path), "--version", good)
    assert (code, "is the champion already" in error) == (2, True)


@pytest.mark.long
def test_an_empty_reference_set_is_said(
    stack: Any, maker: Maker, policy: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """No rows to look at is the platform's fault, not the challenger's: errored, with the mend."""
    first = maker.version()
    promote(model=maker.model, policy=str(policy(GOOD)), version=first)
    from tests.flows.conftest import rows

    empty = maker.version(seed=1, reference=rows(0))
    path = policy({"kind": "features", "live_sample": 0}, name="features")
    capfd.readouterr()
    code = cli.run(["promote", maker.model, "--policy", str(path), "--version", empty, "--json"])
    result = json.loads(capfd.readouterr().out)
    assert code == 1
    assert (result["step"], result["outcome"]) == ("features", "errored")
    assert "have no rows" in result["why"]
    # Nobody proved anything against the version: it may ask again without more ado.
    assert cli.run(["promote", maker.model, "--policy", str(path), "--version", empty]) == 1


def everything(stack: Any, model: str) -> tuple[Any, ...]:
    """All that a promotion could change: the home's database, routes and downloads, and the registry."""
    client = registry.client()
    files = [path for name in ("run/xds", "models", "promotions") for path in (stack.home / name).rglob("*")]
    with closing(sqlite3.connect(stack.home / "state.db")) as db:
        rows = [
            db.execute(f"SELECT * FROM {table}").fetchall() for table in ("holder", "journal", "endpoint", "gateway")
        ]
    versions = [(one.version, one.tags, one.current_stage) for one in client.search_model_versions(f"name='{model}'")]
    contents = {path: path.read_bytes() for path in files if path.is_file()}
    return contents, rows, versions, client.get_registered_model(model).aliases


def test_history_explain_show_and_suite(
    said: Said, stack: Any, maker: Maker, policy: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A promotion is listed, explained in words and numbers, shown as a page; a suite is written once. A dry run
    before it touches nothing and names what the promotion then does."""
    number = maker.version()
    before = everything(stack, maker.model)
    assert cli.run(["promote", maker.model, "--policy", str(policy(GOOD)), "--version", number, "--dry-run"]) == 0
    told = capfd.readouterr().out
    assert f"+ program model-{maker.model}-{number}" in told
    assert f"+ gateway routes {maker.model}" in told
    assert "+ alias champion\n    +v1" in told
    assert everything(stack, maker.model) == before
    assert cli.run(["promote", maker.model, "--policy", str(policy(GOOD)), "--version", number, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert cli.run(["history", maker.model, "--json"]) == 0
    assert [e["id"] for e in json.loads(capfd.readouterr().out)] == [result["promotion"]]
    assert cli.run(["history", maker.model]) == 0
    assert result["promotion"] in capfd.readouterr().out
    assert cli.run(["explain", result["promotion"]]) == 0
    words = capfd.readouterr().out
    assert "unsafe_files 0 is within the bound (at most 0)" in words
    assert cli.run(["show", result["promotion"]]) == 0
    page = Path(capfd.readouterr().out.splitlines()[0])
    assert "<svg" in page.read_text() or "Verdicts" in page.read_text()
    assert said("explain", "nothing-like-it")[0] == 2
    suite = tmp_path / "suite.json"
    assert cli.run(["suite", maker.model, "--to", str(suite)]) == 0
    code, error = said("suite", maker.model, "--to", str(suite))
    assert (code, "is there already" in error) == (2, True)
    code = cli.run(["status", "--json"])
    found = json.loads(capfd.readouterr().out)
    mine = next(m for m in found["models"] if m["model"] == maker.model)
    assert mine["agrees"]
    assert mine["serving"] == number


def test_rendering_without_the_cluster_leaves_the_route_out_and_says_so(
    stack: Any, maker: Maker, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objects go to stdout, complete; that there is no route among them, and why, to stderr."""
    number, server = maker.version(), "http://127.0.0.1:1"
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "a", "users": [{"name": "a", "user": {}}]}
    config |= {"clusters": [{"name": "a", "cluster": {"server": server}}]}
    config |= {"contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}]}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    described = {"name": "a", "kubeconfig": str(tmp_path / "kubeconfig"), "gateway": {"name": "g", "url": server}}
    described |= {"artifact": {"by": "mlflow", "tracking_uri": server}}
    (tmp_path / "clusters.yaml").write_text(json.dumps({"clusters": [described]}))
    monkeypatch.setenv("TITLESHOT_CLUSTERS", str(tmp_path / "clusters.yaml"))
    capfd.readouterr()
    assert cli.run(["render", maker.model, "--version", number]) == 0
    out, err = capfd.readouterr()
    kinds = [one["kind"] for one in yaml.safe_load_all(out)]
    assert kinds == ["ServiceAccount", "Service", "Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler"]
    assert err.startswith("the route is left out, since the cluster cannot be asked for its traffic: ")


def test_doctor_names_the_traps(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI beyond what Prefect bears is found, with the mend."""
    from tasks import doctor

    assert cli.run(["doctor", "--json"]) == 0
    capfd.readouterr()
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.165.0" if name == "fastapi" else real(name))
    assert cli.run(["doctor"]) == 1
    assert "fastapi<0.151" in capfd.readouterr().out


def test_no_task_is_cached() -> None:
    """A gate that was cached could pass on stale evidence: no task of ours caches or persists its result."""
    os.environ.setdefault("PREFECT_API_URL", "http://127.0.0.1:9/api")
    from prefect import Task
    from prefect.cache_policies import NO_CACHE

    from tasks import load, serving, validate

    found = [t for module in (load, serving, validate) for t in vars(module).values() if isinstance(t, Task)]
    assert len(found) >= 10
    for task in found:
        assert task.cache_policy == NO_CACHE, task.name
        assert not task.persist_result, task.name


def test_hooks_carry_the_names_that_the_runner_calls_them_by() -> None:
    """Prefect's runner calls hooks by keyword: with other parameter names they fail where they are needed most."""
    import inspect

    os.environ.setdefault("PREFECT_API_URL", "http://127.0.0.1:9/api")
    from flows.promote import promote as promote_flow
    from flows.rollback import rollback as rollback_flow

    for flow in (promote_flow, rollback_flow):
        for kind in ("completion", "failure", "cancellation", "crashed", "running"):
            for hook in getattr(flow, f"on_{kind}_hooks", []):
                assert list(inspect.signature(hook).parameters) == ["flow", "flow_run", "state"], (flow.name, kind)

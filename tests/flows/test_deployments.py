"""Prefect's deployments: `prefect deploy --all` as it stands, and a worker that runs what it deployed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks import registry
from tests.flows.conftest import Maker, promote

ROOT = Path(__file__).parents[2]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PREFECT_HOME": str(home / "prefect-cli"), "PREFECT_WORKER_QUERY_SECONDS": "1"}


def prefect(*arguments: str, home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def worker(home: Path) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "titleshot"],
        cwd=home, env=environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_deploy_all_and_a_worker_run_a_promotion_and_a_rollback(
    stack: Any, home: Path, maker: Maker, policy: Any
) -> None:
    """Both deployments are made from prefect.yaml, and a process worker runs them against the local stack."""

    def run(deployment: str, *parameters: str) -> None:
        options = [word for parameter in parameters for word in ("--param", parameter)]
        watch = ("--watch", "--watch-interval", "1", "--watch-timeout", "200")
        prefect("deployment", "run", deployment, *options, *watch, home=home)

    prefect("work-pool", "create", "titleshot", "--type", "process", home=home)
    with worker(home):  # which starts while we go on
        said = prefect("--no-prompt", "deploy", "--all", home=home)
        assert "promote/promote" in said
        assert "rollback/rollback" in said
        path = policy({"kind": "integrity"})
        first, second = maker.version(), maker.version(seed=1)
        promote(model=maker.model, policy=str(path), version=first)
        run("promote/promote", f"model={maker.model}", f"policy={path}", f"version={second}")
        assert registry.aliased(maker.model, "champion") == second
        run("rollback/rollback", f"model={maker.model}")
        assert registry.aliased(maker.model, "champion") == first


@pytest.mark.parametrize("name", ["promote", "rollback"])
def test_flow_runs_carry_readable_names(stack: Any, name: str) -> None:
    """A person who looks at the runs sees which model is meant."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        names = [run.name for run in client.read_flow_runs(limit=200)]
    assert any(n.startswith(f"{name} ") for n in names), names

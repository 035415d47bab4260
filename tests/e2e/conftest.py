"""A browser, a stack of its own whose promotions start by themselves, and where the pictures go."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyotp
import pytest

from tasks import approvers, flowruns
from tasks.settings import Mistake, Settings
from tests.e2e import pages
from tests.flows.conftest import Maker

MODEL = "flights"
APPROVER = "ana"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no browser: none of chromium, chromium-browser and google-chrome is on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that reaches 127.0.0.1 only, and needs nothing else."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB", timezone_id="UTC")
    page = context.new_page()
    refused = pages.keep_in(page)
    yield page
    context.close()
    assert refused == [], "the page asked others"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: to the documentation only if asked for."""
    folder = Path(os.environ.get("TITLESHOT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class World:
    """The stack as people have it: the command line, what Prefect runs, and what MLflow remembers."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.settings = Settings(home=home)

    def titleshot(self, *words: str) -> str:
        """A command line that must end well; what it said."""
        done = subprocess.run(
            [sys.executable, "-m", "flows", *words], check=False, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"titleshot {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def suspended(self, version: str, seconds: float = 120) -> flowruns.FlowRun:
        """The run that asks people about this version, once there is one."""

        def asks() -> flowruns.FlowRun | None:
            runs = flowruns.tagged(self.settings, "titleshot")
            ours = [run for run in runs if str(run.parameters.get("version")) == version]
            failed = [run for run in ours if run.type in ("FAILED", "CRASHED")]
            assert not failed, failed
            return next((run for run in ours if run.state == "Suspended" and self._form(run)), None)

        return wait_for(asks, seconds, f"no run for {MODEL} v{version} is suspended", self.said)

    def _form(self, run: flowruns.FlowRun) -> bool:
        # A run is suspended a moment before its form is there.
        import httpx

        body = {"prefix": "suspended", "limit": 50}
        found = httpx.post(f"{self.settings.prefect}/flow_runs/{run.id}/input/filter", json=body, timeout=10)
        return any("description" in one["key"] for one in found.json())

    def said(self) -> str:
        """What the programs on the way from the alias to the form have to say, where something does not come."""
        runs = [f"{run.name}: {run.state} {run.message}" for run in flowruns.tagged(self.settings, "titleshot")]
        logs = [path for path in sorted((self.home / "logs").iterdir()) if path.stem in ("receiver", "watch", "worker")]
        return "\n".join([*runs, *(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs)])

    def ended(self, version: str, seconds: float = 120) -> Any:
        """The promotion of this version as the history has it, once it is over."""
        from tasks import history

        def over() -> Any:
            found = [one for one in history.entries(MODEL) if one.challenger == version and one.finished]
            return found[0] if found else None

        return wait_for(over, seconds, f"the promotion of {MODEL} v{version} does not end")

    def champion(self) -> str | None:
        """The version with the alias."""
        from tasks import registry

        return registry.aliased(MODEL, registry.CHAMPION)


def wait_for(condition: Callable[[], Any], seconds: float, what: str, said: Callable[[], str] = str) -> Any:
    """What `condition` returns, once that is something; `said` adds what explains why it is not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(flowruns.Unanswered):
            if found := condition():
                return found
        time.sleep(0.5)
    pytest.fail(f"{what} within {seconds:g} s\n{said()}")


@pytest.fixture(scope="module")
def world(browser: Any) -> Iterator[World]:
    """A stack where setting the alias starts a promotion that needs ana; version 1 of the model serves."""
    # Sockets live under the home, so its path must be short.
    home = Path(tempfile.mkdtemp(prefix="ts."))
    with pytest.MonkeyPatch.context() as patch:
        for name in [k for k in os.environ if k.startswith(("TITLESHOT_", "PREFECT_", "MLFLOW_"))]:
            if name != "TITLESHOT_SCREENSHOTS":
                patch.delenv(name)
        for name, value in (("HOME", str(home)), ("WORKERS", "2"), ("WATCH_SECONDS", "2")):
            patch.setenv(f"TITLESHOT_{name}", value)
        world = World(home)
        gates: list[dict[str, Any]] = [{"kind": "integrity"}]
        first = home / "first.yaml"
        first.write_text(json.dumps({"version": 1, "model": MODEL, "gates": gates}))
        world.settings.policy_folder.mkdir()
        gates.append({"kind": "approval", "approvers": [APPROVER]})
        own = world.settings.policy_folder / "flights.yaml"
        own.write_text(json.dumps({"version": 1, "model": MODEL, "gates": gates}))
        try:
            world.titleshot("up")
            world.settings.connect(needed=("MLflow",))
            world.titleshot("webhook", "install")
            version = Maker(MODEL, world.settings.mlflow).version()
            world.titleshot("promote", MODEL, "--policy", str(first), "--version", version)
            yield world
        finally:
            with suppress(AssertionError, Mistake):
                world.titleshot("down")
            shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def code(world: World) -> Callable[[], str]:
    """What ana's phone shows: each call waits for another code than the last, as a code is good for once."""
    phone = pyotp.parse_uri(approvers.enrol(world.home, APPROVER, datetime.now(UTC)))
    used: set[str] = set()

    def now() -> str:
        shown = wait_for(lambda: {phone.now()} - used, 40, "no new code").pop()
        used.add(shown)
        return str(shown)

    return now

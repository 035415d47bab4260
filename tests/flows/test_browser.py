"""A person in a real browser: asks for a promotion in MLflow's UI, and decides about it in Prefect's."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from tasks import flowruns, history, registry, report
from tests.flows import pages
from tests.flows.conftest import Maker, People, promote, take_down, until

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


@pytest.fixture(scope="module")
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
    """Setting the alias starts a promotion that needs ana; version 1 of the model serves."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def suspended(self, version: str) -> flowruns.FlowRun:
        """The run that asks people about this version, once there is one and its form is stored."""

        def asks() -> flowruns.FlowRun | None:
            runs = flowruns.tagged(self.settings, "titleshot")
            ours = [
                r for r in runs if (r.parameters.get("model"), str(r.parameters.get("version"))) == (MODEL, version)
            ]
            failed = [run for run in ours if run.type in ("FAILED", "CRASHED")]
            assert not failed, failed
            return next((run for run in ours if run.state == "Suspended" and self._form(run)), None)

        return until(asks, 120, f"no run for {MODEL} v{version} is suspended", self.said)

    def _form(self, run: flowruns.FlowRun) -> bool:
        body = {"prefix": "suspended", "limit": 50}
        found = flowruns.ask(self.settings, "POST", f"/flow_runs/{run.id}/input/filter", body)
        return any("description" in one["key"] for one in found)

    def said(self) -> str:
        """What the programs on the way from the alias to the form have to say, where something does not come."""
        runs = [f"{run.name}: {run.state} {run.message}" for run in flowruns.tagged(self.settings, "titleshot")]
        logs = [self.settings.home / "logs" / f"{name}.log" for name in ("receiver", "watch", "worker")]
        return "\n".join([*runs, *(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs if path.exists())])

    def ended(self, version: str) -> history.Entry:
        """The promotion of this version as the history has it, once it is over."""

        def over() -> history.Entry | None:
            found = [one for one in history.entries(MODEL) if one.challenger == version and one.finished]
            return found[0] if found else None

        return until(over, 120, f"the promotion of {MODEL} v{version} does not end")

    def champion(self) -> str | None:
        """The version with the alias."""
        return registry.aliased(MODEL, registry.CHAMPION)


@pytest.fixture(scope="module")
def world(
    browser: Any, stack: Any, worker: Any, settings: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    first = tmp_path_factory.mktemp("policy") / "first.yaml"
    gates: list[dict[str, Any]] = [{"kind": "integrity"}]
    first.write_text(json.dumps({"version": 1, "model": MODEL, "gates": gates}))
    assert cli.run(["webhook", "install"]) == 0
    version = Maker(MODEL, settings.mlflow).version()
    assert promote(model=MODEL, policy=str(first), version=version)["phase"] == "promoted"
    settings.policy_folder.mkdir(exist_ok=True)
    own = settings.policy_folder / "flights.yaml"
    gates.append({"kind": "approval", "approvers": [APPROVER]})
    own.write_text(json.dumps({"version": 1, "model": MODEL, "gates": gates}))
    yield World(settings)
    own.unlink()
    take_down(MODEL)


@pytest.fixture(scope="module")
def code(people: People) -> Callable[[], str]:
    """What ana's phone shows: each call another code than the last, as a code is good for once."""
    return lambda: people.code(APPROVER)


def asked_for(world: World, page: Any, picture: Path | None = None) -> tuple[str, flowruns.FlowRun]:
    """A new version that got the alias `challenger` in MLflow's UI, and the run that asks people about it."""
    version = Maker(MODEL, world.settings.mlflow).version(seed=int(world.champion() or 0))
    pages.open_version(page, world.settings.mlflow_page, MODEL, version)
    pages.add_alias(page, "challenger", picture)
    return version, world.suspended(version)


def ballots(promotion: history.Entry) -> list[dict[str, Any]]:
    """Every form that was given, as the history has it."""
    kept = history.evidence(promotion.run_id, history.stored(promotion.run_id))
    return [ballot for one in kept.values() for ballot in one.get("approval", {}).get("ballots", ())]


def test_asked_for_in_mlflow_and_approved_in_prefect(
    world: World, page: Any, code: Callable[[], str], pictures: Path
) -> None:
    """The alias set in MLflow's UI starts a promotion; approved by the form in Prefect's UI, it ends with the alias."""
    before = world.champion()
    version, run = asked_for(world, page, pictures / "mlflow-alias.png")
    assert world.champion() == before, "while it waits the champion is who it was"

    pages.open_run(page, flowruns.page(world.settings, run.id))
    assert pages.state(page) == "Suspended"
    page.set_viewport_size({"width": 1280, "height": 1000})  # Prefect squeezes what the form shows, not its fields
    form = pages.open_form(page)
    assert any(row[0] == "integrity" and "passed" in row for row in pages.table(form)), pages.table(form)
    assert any(f"/models/{MODEL}/versions/{version}" in link for link in pages.links(form).values())
    assert any("report" in link for link in pages.links(form).values())
    pages.answer(form, "approve", {"Approver": APPROVER, "Code": code(), "Comment": "looks right"})
    page.screenshot(path=pictures / "approval-form.png")
    pages.submit(form)
    pages.wait_for_state(page, "Completed", 120)

    promotion = world.ended(version)
    assert (promotion.phase, world.champion()) == ("promoted", version)
    (ballot,) = ballots(promotion)
    assert (ballot["approver"], ballot["comment"], ballot["how"]) == (APPROVER, "looks right", "one-time code")
    pages.open_version(page, world.settings.mlflow_page, MODEL, version)
    assert "champion" in pages.shown_aliases(page)


@pytest.mark.long
def test_asked_for_in_mlflow_and_refused_in_prefect(world: World, page: Any, code: Callable[[], str]) -> None:
    """A rejection in Prefect's UI ends the promotion; the champion stays, and the history says who refused and why."""
    before = world.champion()
    version, run = asked_for(world, page)
    pages.open_run(page, flowruns.page(world.settings, run.id))
    form = pages.open_form(page)
    pages.answer(form, "reject", {"Approver": APPROVER, "Code": code(), "Comment": "not before the holidays"})
    pages.submit(form)
    pages.wait_for_state(page, "Completed", 120)

    promotion = world.ended(version)
    assert (promotion.phase, world.champion()) == ("rejected", before)
    (ballot,) = ballots(promotion)
    assert (ballot["decision"], ballot["comment"]) == ("reject", "not before the holidays")
    assert "not before the holidays" in report.explain(history.stored(promotion.run_id))

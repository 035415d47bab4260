"""A person in a real browser: asks for a promotion in MLflow's UI, and decides about it in Prefect's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import flowruns, history
from tests.e2e import pages
from tests.e2e.conftest import APPROVER, MODEL, World
from tests.flows.conftest import Maker

pytestmark = pytest.mark.timeout(600)  # the first one waits for a stack of its own, too


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
    assert "not before the holidays" in world.titleshot("explain", promotion.id)

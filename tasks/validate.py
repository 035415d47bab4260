"""The gates that need no serving: integrity, schema, features, quality."""

import json
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import registry
from tasks.context import Contender, Context, Seen
from tasks.history import sha256
from tasks.score import ScoreError, score
from tasks.serving import live_requests
from tasks.settings import Mistake
from validations import expectations, signature
from validations import integrity as integrity_of
from validations import quality as quality_of
from validations.agreement import request_rows
from validations.policy import Features, Quality
from validations.verdict import Measurement


@task(cache_policy=NO_CACHE)
def integrity(context: Context) -> Seen:
    """The artifact is the registered one, holds nothing unsafe, loads and answers in its own process.

    Nothing is loaded where digest or scan speak against it; then `answers_example` stays unmeasured.
    """
    challenger = context.challenger
    findings = integrity_of.unsafe_files(challenger.path)
    error: str | None = None
    loadable = not findings and challenger.digest == challenger.recorded
    if loadable:
        try:
            score(challenger.path, env_manager=context.settings.env_manager)
        except ScoreError as failed:
            error = str(failed)
    measured = integrity_of.measurements(
        registered=challenger.recorded, found=challenger.digest, unsafe=findings, example_error=error
    )
    if not loadable:
        del measured["answers_example"]
        return Seen(measured, "the model was not loaded")
    return Seen(measured, f"digest {challenger.digest}")


@task(cache_policy=NO_CACHE)
def schema(context: Context) -> Seen:
    """Compare the signatures: what the champion accepts and how it answers, against the challenger's."""
    assert context.champion is not None
    champion, challenger = (_signature(who) for who in (context.champion, context.challenger))
    differences = signature.compare(champion, challenger)
    return Seen(
        signature.measurements(champion, challenger),
        "; ".join(d.message for d in differences) or "the signatures are compatible",
        {"differences": [{"column": d.column, "message": d.message, "breaking": d.breaking} for d in differences]},
    )


def _signature(who: Contender) -> dict[str, Any]:
    found = registry.signature(who.path)
    if not found:
        raise Mistake(
            f"{who.registered.name} has no signature: log the model with "
            "`signature=mlflow.models.infer_signature(inputs, outputs)`"
        )
    return found


@task(cache_policy=NO_CACHE)
def features(context: Context, gate: Features) -> Seen:
    """Hold the challenger's reference features, and live requests, against the expectation suite."""
    import pandas as pd

    home = context.settings.home
    if gate.suite is not None:
        suite = expectations.load(context.file(gate.suite))
    else:
        assert context.champion is not None
        suite = expectations.suite_from(
            pd.read_parquet(registry.reference(context.champion.registered, home)),
            context.model,
            exclude=gate.exclude,
        )
    source = (
        _existing(context.file(gate.reference))
        if gate.reference
        else registry.reference(context.challenger.registered, home)
    )
    reference = pd.read_parquet(source)
    if reference.empty:
        raise Mistake(
            f"the reference features in {source.name} have no rows: log a sample of what the model was trained on"
        )
    report = expectations.validate(suite, reference)
    measured = expectations.measurements(report)
    data: dict[str, Any] = {"reference": report.model_dump()}
    note = f"{len(reference):,} reference rows"
    if gate.live_sample and context.champion is not None:
        frame = pd.DataFrame(
            [row for body in live_requests(context, gate.live_sample) for row in request_rows(json.dumps(body))]
        )
        if not frame.empty:
            live_report = expectations.validate(expectations.for_live_sample(suite, len(frame)), frame)
            measured |= expectations.measurements(live_report)
            data["live"] = live_report.model_dump()
        note += f", {len(frame):,} rows of live requests"
        if frame.empty:
            note = "there are no live requests to look at: send traffic through the gateway, or set `live_sample: 0`"
    return Seen(measured, note, data)


@task(cache_policy=NO_CACHE)
def quality(context: Context, gate: Quality) -> Seen:
    """Score the held-out rows with champion and challenger, and compare the metrics on the same rows."""
    import pandas as pd

    path = _existing(context.file(gate.data))
    frame = pd.read_parquet(path)
    if gate.label not in frame.columns:
        raise Mistake(f"{path.name} has no column '{gate.label}': it has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise Mistake(f"{path.name} has no rows: a quality gate needs held-out rows with their labels")
    sides = {"challenger": context.challenger} | ({"champion": context.champion} if context.champion else {})
    answers: dict[str, Any] = {}
    for side, who in sides.items():
        try:
            answers[side] = score(who.path, path, gate.label, env_manager=context.settings.env_manager)
        except ScoreError as error:
            if side == "champion":
                raise
            note = f"the challenger does not score the held-out rows: {error}"
            return Seen({"scored": _of(len(frame), 0, str(error))}, note)
    metrics = sorted({metric.removesuffix("_delta") for metric in gate.checks if metric != "scored"})
    measured = quality_of.measurements(
        frame[gate.label].to_numpy(), answers.get("champion"), answers["challenger"], metrics, gate.confidence
    )
    measured["scored"] = _of(len(frame), 1)
    return Seen(measured, f"{len(frame):,} held-out rows of {path.name} ({sha256(path.read_bytes())[:19]})")


def _of(rows: int, value: float, note: str = "") -> Measurement:
    """A fact established on `rows` rows."""
    return Measurement(value=value, low=value, high=value, sample=rows, note=note)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise Mistake(f"the policy names {path}, which is not there: paths in a policy are relative to its file")
    return path


def write_suite(version: registry.Registered, home: Path, to: Path) -> int:
    """Generate a suite from a version's reference features and write it. Returns how many expectations.

    Raises `Mistake` where the version has no reference features, or `to` exists already.
    """
    import pandas as pd

    if to.exists():
        raise Mistake(f"{to} is there already, perhaps edited by hand: name another file with --to", code=2)
    frame = pd.read_parquet(registry.reference(version, home))
    if frame.empty:
        raise Mistake(f"the reference features of {version.name} have no rows: there is nothing to learn from")
    suite = expectations.suite_from(frame, version.model)
    try:
        expectations.save(suite, to)
    except OSError as error:
        raise Mistake(f"{to} cannot be written: {error.strerror}") from error
    return len(suite["expectations"])

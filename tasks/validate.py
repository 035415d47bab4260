"""The gates that need no serving: integrity, schema, features, quality."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import features as features_of
from tasks import offline, registry, user_function
from tasks.context import Contender, Context, Seen
from tasks.history import sha256
from tasks.score import Asked, ScoreError, ask, score
from tasks.serving import live_requests
from tasks.settings import Mistake
from validations import answers, expectations, requirements, signature, signing
from validations import integrity as integrity_of
from validations.columns import Columns
from validations.gates import Features, Integrity, Quality, Schema
from validations.verdict import Measurement

ASKED_ELSEWHERE = 4
"""How many live requests the schema gate asks where each costs the start of a process in another environment."""


@task(cache_policy=NO_CACHE)
def integrity(context: Context, gate: Integrity) -> Seen:
    """The artifact is the registered one, holds nothing unsafe, loads and answers in its own process.

    Nothing is loaded where digest, scan or signature speak against it; then `answers_example` stays unmeasured.
    """
    challenger = context.challenger
    scanned = integrity_of.scan(challenger.path, gate.trusted)
    unsigned = None if gate.signed_by is None else _unsigned(context, gate.signed_by)
    conflicts, unchecked = _conflicts(context, bytecode=bool(scanned.trusted))
    error: str | None = None
    loadable = not scanned.unsafe and challenger.digest == challenger.recorded and not unsigned
    if loadable:
        try:
            score(challenger.path, env_manager=context.settings.env_manager)
        except ScoreError as failed:
            error = str(failed)
    measured = integrity_of.measurements(
        registered=challenger.recorded,
        found=challenger.digest,
        scanned=scanned,
        example_error=error,
        conflicts=conflicts,
        unchecked=unchecked,
        signature_error=unsigned,
    )
    data = {**scanned.model_dump(), "requirement_conflicts": conflicts}
    vouched = "".join(f"; trusted by the policy: {file.path} ({file.reason})" for file in scanned.trusted)
    if not loadable:
        del measured["answers_example"]
        return Seen(measured, f"the model was not loaded{vouched}", data)
    return Seen(measured, f"digest {challenger.digest}{vouched}", data)


def _conflicts(context: Context, *, bytecode: bool) -> tuple[list[str], str]:
    """The model's requirements that are not met here, and what to know about them."""
    env_manager = context.settings.env_manager
    if env_manager != "local":
        return [], f"{env_manager} makes an environment from the model's own requirements"
    path = context.challenger.path
    return requirements.conflicts(path, python=bytecode), requirements.other_python(path)


def _unsigned(context: Context, key: str) -> str:
    """What is wrong with the challenger's signature, empty where nothing is."""
    try:
        return signing.error(context.challenger.path, _existing(context.file(key)))
    except signing.UnusableKey as error:
        raise Mistake(str(error)) from error
    except ModuleNotFoundError as error:
        raise Mistake(
            "the policy has `signed_by`, and model-signing is not installed: install Titleshot with the extra `signing`"
        ) from error


@task(cache_policy=NO_CACHE)
def schema(context: Context, gate: Schema) -> Seen:
    """Compare what the champion accepts and how it answers with the challenger: by signature, and by asking both."""
    assert context.champion is not None
    sides = context.champion, context.challenger
    champion, challenger = (_signature(who) for who in sides)
    try:
        changes = signature.compare(champion, challenger) + answers.declared(*(_declared_classes(who) for who in sides))
        differing, asked = _answers_differ(context, gate, champion)
    except ValueError as error:  # a sentence with its mend
        raise Mistake(str(error)) from error
    measured = signature.counted("breaking_changes", changes)
    if differing is not None:
        measured |= signature.counted("breaking_answers", differing)
    elif "breaking_answers" not in gate.checks:
        measured["breaking_answers"] = Measurement.exact(0, note=asked)
    differences = [*changes, *(differing or ())]
    said = "; ".join(d.message for d in differences) or "nothing breaks the champion's contract"
    # Where a check is not measured the note is what people read first.
    note = f"{said}; {asked}" if "breaking_answers" in measured else f"{asked}; {said}"
    shown = [{"column": d.column, "message": d.message, "breaking": d.breaking} for d in differences]
    return Seen(measured, note, {"differences": shown, "asked": asked})


def _answers_differ(
    context: Context, gate: Schema, champion: dict[str, Any]
) -> tuple[list[signature.Difference] | None, str]:
    """What the answers of both models to the same requests show, and what was asked in words.

    None where there is nothing to ask. Raises `Mistake` where the challenger may not be loaded, or the champion
    answers nothing of what it was asked.
    """
    old, new, manager = context.champion, context.challenger, context.settings.env_manager
    assert old is not None
    example = registry.example_request(old.path)
    live = [json.dumps(body) for body in live_requests(context, gate.live_sample)] if gate.live_sample else []
    if manager != "local":
        live = live[-ASKED_ELSEWHERE:]
    bodies = list(dict.fromkeys([*([example.decode()] if example else []), *live]))
    what = f"asked {'the input example' if example else 'no input example'} and {len(live)} live requests"
    if not bodies:
        return None, "nothing was asked: log the champion with `input_example=...`, or send traffic through the gateway"
    if new.digest != new.recorded or integrity_of.scan(new.path, _trusted(context)).unsafe:
        name = new.registered.name
        raise Mistake(f"{name} was not loaded, so not asked: put the gate `integrity` first, which says why")
    before = ask(old.path, bodies, env_manager=manager)
    try:
        after = ask(new.path, bodies, env_manager=manager)
    except ScoreError as error:
        after = Asked(tuple(("", str(error)) for _ in bodies))
    labels = [_declared_classes(who) or told.classes for who, told in ((old, before), (new, after))]
    outputs = signature.parsed(champion)["outputs"]
    return answers.compare(before.replies, after.replies, outputs=outputs, labels=(labels[0], labels[1])), what


def _trusted(context: Context) -> dict[str, str]:
    """The files that the policy's integrity gates trust: path to SHA-256."""
    gates = context.policy.gates if context.policy else ()
    trusting = [gate.trusted for gate in gates if isinstance(gate, Integrity)]
    return {path: digest for trusted in trusting for path, digest in trusted.items()}


def _declared_classes(who: Contender) -> Any:
    """`classes` in the metadata that the model was logged with; None where there are none."""
    import yaml

    model = yaml.safe_load((who.path / "MLmodel").read_text())
    return (model.get("metadata") or {}).get("classes")


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
    """Hold the challenger's reference features, and live requests, against the expectation suite; look for drift,
    unseen categories and old features.
    """
    source = (
        _existing(context.file(gate.reference))
        if gate.reference
        else registry.reference(context.challenger.registered, context.settings.home)
    )
    reference = _columns_of(source)
    measured: dict[str, Measurement] = {}
    data: dict[str, Any] = {}
    notes = [f"{reference.rows:,} reference rows"]
    if gate.freshness:
        file = _existing(context.file(gate.freshness.source)) if gate.freshness.source else source
        measured["feature_age_hours"], data["freshness"] = features_of.age(
            gate.freshness, file, datetime.now(UTC), gate.freshness.source or file.name
        )
    found = features_of.suite_of(context, gate)
    live = None
    if gate.live_sample and context.champion is not None:
        live = features_of.live_of(context, gate.live_sample)
        if live.rows.empty:
            notes = ["there are no live requests to look at: send traffic through the gateway, or set `live_sample: 0`"]
            live = None
    if found is not None:
        suite, data["suite_from"] = found
        data["suite"] = suite
        report = expectations.validate(suite, source)
        measured |= expectations.measurements(report)
        data["reference"] = report.model_dump()
        if live is not None:
            live_report = expectations.validate(expectations.for_live_sample(suite, len(live.rows)), live.rows)
            measured |= expectations.measurements(live_report)
            data["live"] = live_report.model_dump()
    if live is not None:
        seen, drifts, missing = features_of.measured_live(context, gate, reference, live)
        measured |= seen
        data |= drifts
        notes.append(f"{len(live.rows):,} rows of live requests")
        # Where a check is not measured the note is what people read first.
        unmeasured = any(metric not in measured for metric in gate.checks)
        notes = [*missing, *notes] if unmeasured else [*notes, *missing]
    return Seen(measured, "; ".join(notes), data)


def _columns_of(source: Path) -> Columns:
    try:
        columns = Columns(source)
    except ValueError as error:
        raise Mistake(str(error)) from error
    if not columns.rows:
        raise Mistake(
            f"the reference features in {source.name} have no rows: log a sample of what the model was trained on"
        )
    return columns


@task(cache_policy=NO_CACHE)
def quality(context: Context, gate: Quality) -> Seen:
    """Score the held-out rows with champion and challenger, and compare the metrics on the same rows."""
    import numpy as np
    import pandas as pd

    path = _existing(context.file(gate.data))
    frame = pd.read_parquet(path)
    if gate.label not in frame.columns:
        raise Mistake(f"{path.name} has no column '{gate.label}': it has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise Mistake(f"{path.name} has no rows: a quality gate needs held-out rows with their labels")
    if absent := [column for column in gate.slices if column not in frame.columns]:
        raise Mistake(
            f"{path.name} has no column '{absent[0]}' to slice by: it has {', '.join(map(str, frame.columns))}"
        )
    sides = {"challenger": context.challenger} | ({"champion": context.champion} if context.champion else {})
    answered: dict[str, Any] = {}
    for side, who in sides.items():
        try:
            answer = score(who.path, path, gate.label, env_manager=context.settings.env_manager)
        except ScoreError as error:
            if side == "champion":
                raise
            note = f"the challenger does not score the held-out rows: {error}"
            return Seen({"scored": _of(len(frame), 0, str(error))}, note)
        declared = _declared_classes(who)
        if declared and getattr(answer, "ndim", 0) == 2 and answer.shape[1] == len(declared):
            answer = pd.DataFrame(answer, columns=declared) if isinstance(answer, np.ndarray) else answer
        answered[side] = answer
    columns = {column: frame[column] for column in gate.slices}
    held_out = (path.name, gate, frame[gate.label].to_numpy(), answered, columns)
    if gate.functions:
        # The user's own code: it may crash or hang, and it shall not be us who do.
        named = ", ".join(sorted(function.path for function in gate.functions.values()))
        measured, data = user_function.call(
            context.base, offline.measure, *held_out, what=named, timeout=gate.timeout.total_seconds()
        )
    else:
        measured, data = offline.measure(*held_out)
    measured["scored"] = _of(len(frame), 1)
    return Seen(measured, f"{len(frame):,} held-out rows of {path.name} ({sha256(path.read_bytes())[:19]})", data)


def _of(rows: int, value: float, note: str = "") -> Measurement:
    """A fact established on `rows` rows."""
    return Measurement(value=value, low=value, high=value, sample=rows, note=note)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise Mistake(f"the policy names {path}, which is not there: paths in a policy are relative to its file")
    return path


def write_suite(version: registry.Registered, home: Path, to: Path, *, log: bool = False) -> int:
    """Generate a suite from a version's reference features and write it. Returns how many expectations.

    With `log` it is kept in the version's run too, as `reference/suite.json`, where the features gate prefers it to a
    generated one; then a file that is there already, edited by hand, is logged as it is. Raises `Mistake` where
    the version has no reference features, or without `log` where `to` exists already.
    """
    if to.exists() and not log:
        raise Mistake(f"{to} is there already, perhaps edited by hand: name another file with --to", code=2)
    try:
        if to.exists():
            suite = expectations.load(to)
        else:
            suite = expectations.suite_from(registry.reference(version, home), version.model)
            expectations.save(suite, to)
    except OSError as error:
        raise Mistake(f"{to} cannot be written: {error.strerror}") from error
    except ValueError as error:
        raise Mistake(f"there is no suite of {version.name}: {error}") from error
    if log:
        registry.log_suite(version, to.read_text())
    return len(suite["expectations"])

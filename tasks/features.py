"""What the features gate looks at: the suite, live rows, drift, unseen categories and the features' age."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks import registry
from tasks.context import Context
from tasks.score import ScoreError, ask
from tasks.serving import live_requests
from tasks.settings import Mistake
from validations import drift, expectations
from validations import integrity as integrity_of
from validations.agreement import request_rows
from validations.columns import Columns
from validations.gates import Features, Freshness, Integrity
from validations.statistics import NoSample
from validations.verdict import Bound, Measurement

COMPARED = 100_000
"""Rows of a large reference that drift is measured against: more would hardly narrow an interval, since the live
requests are 5,000 at the most.
"""
PREDICTED = 5_000
"""Rows of the reference that the challenger is asked for."""
TOLERATED = 0.1
"""The usual bound on a population stability index; what a note speaks of where the policy has none."""


@dataclass(frozen=True, slots=True)
class Live:
    """Rows of live requests; `requests` has the place of each row's request."""

    rows: Any
    requests: tuple[int, ...]


def suite_of(context: Context, gate: Features) -> tuple[expectations.Suite, str] | None:
    """The suite in force and where it is from: the policy's file, the champion's run, or else generated from the
    champion's reference features. None where there is no champion and the policy names no file.
    """
    if gate.suite is not None:
        return _loaded(context.file(gate.suite)), gate.suite
    if context.champion is None:
        return None
    champion, home = context.champion.registered, context.settings.home
    edited = registry.suite(champion, home)
    if edited is not None:
        return _loaded(edited), f"{registry.SUITE} in the run of {champion.name}"
    try:
        made = expectations.suite_from(registry.reference(champion, home), context.model, exclude=gate.exclude)
    except ValueError as error:
        raise Mistake(f"no suite can be made from {champion.name}: {error}") from error
    return made, f"generated from what {champion.name} was trained on"


def _loaded(path: Path) -> expectations.Suite:
    try:
        return expectations.load(path)
    except ValueError as error:
        raise Mistake(str(error)) from error


def live_of(context: Context, most: int) -> Live:
    """The rows of the latest `most` live requests; requests that hold no named columns are left out."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    requests: list[int] = []
    for place, body in enumerate(live_requests(context, most)):
        try:
            found = request_rows(json.dumps(body))
        except ValueError:
            continue
        rows += found
        requests += [place] * len(found)
    return Live(pd.DataFrame(rows), tuple(requests))


def measured_live(
    context: Context, gate: Features, reference: Columns, live: Live
) -> tuple[dict[str, Measurement], dict[str, Any], list[str]]:
    """Unseen categories and drift: measurements, data to keep, and what could not be measured in words."""
    measured: dict[str, Measurement] = {}
    columns, known = _columns(gate, reference, live)
    predictions, problem = _predictions(context, reference, live)
    found = {"feature_drift": columns, "prediction_drift": predictions}
    missing = [f"predictions were not compared: {problem}"] if problem else []
    for metric, drifts in found.items():
        try:
            measured[metric] = drift.measurement(drifts, gate.confidence, _tolerated(gate.checks.get(metric)))
        except NoSample:
            if metric == "feature_drift":
                missing.append("no column of the reference is in the live requests: drift was not measured")
    try:
        measured["unseen_categories"] = drift.unseen(known, live.rows, live.requests, gate.confidence)
    except NoSample:
        if "unseen_categories" in gate.checks:
            missing.append("no text column of few values is in both, so there are no categories to look for")
    data = {metric: [one.model_dump() for one in drifts] for metric, drifts in found.items()}
    return measured, data, missing


def _tolerated(bound: Bound | None) -> float:
    return TOLERATED if bound is None or bound.max is None else bound.max


def _columns(gate: Features, reference: Columns, live: Live) -> tuple[list[drift.Drift], dict[str, set[str]]]:
    """The drift of each column that both have, and the categories that the reference has in its text columns.

    Times, free text and columns that are meant to move (`exclude`) are left out.
    """
    most = expectations.Allowance().categories
    drifts: list[drift.Drift] = []
    known: dict[str, set[str]] = {}
    for name in reference.without(gate.exclude):
        if name not in live.rows.columns:
            continue
        values = reference.one(name)
        family = expectations.family_of(values)
        if family not in ("number", "text", "boolean"):
            continue
        if family == "text":
            categories = {str(value) for value in values.dropna().unique()}
            if len(categories) > most:
                continue
            known[name] = categories
        some = values if len(values) <= COMPARED else values.sample(COMPARED, random_state=0)
        drifts.append(drift.drift(name, some, live.rows[name], numbers=family == "number", requests=live.requests))
    return drifts, known


def _predictions(context: Context, reference: Columns, live: Live) -> tuple[list[drift.Drift], str]:
    """The drift of the challenger's answers from reference to live rows, by output; or why there is none."""
    import pandas as pd

    new = context.challenger
    if new.digest != new.recorded or integrity_of.scan(new.path, _trusted(context)).unsafe:
        return [], "the challenger was not loaded, the gate `integrity` says why"
    some = reference.read([name for name in reference.names if name in live.rows.columns], at_most=PREDICTED)
    bodies = [_body(frame) for frame in (some, live.rows)]
    try:
        replies = ask(new.path, bodies, env_manager=context.settings.env_manager).replies
    except (ScoreError, RuntimeError) as error:  # the latter: its own environment cannot be made
        return [], str(error)
    answers = []
    for (answer, why), frame, what in zip(replies, (some, live.rows), ("reference rows", "live rows"), strict=True):
        if why:
            return [], f"the challenger does not answer for {what}: {why}"
        told = outputs(answer)
        if len(told) != len(frame):
            return [], f"the challenger gave {len(told):,} answers for {len(frame):,} {what}"
        answers.append(told)
    old, now = answers
    drifts = []
    for name in (column for column in old.columns if column in now.columns):
        numbers = pd.api.types.is_numeric_dtype(old[name]) and not pd.api.types.is_bool_dtype(old[name])
        drifts.append(drift.drift(str(name), old[name], now[name], numbers=numbers, requests=live.requests))
    return drifts, "" if drifts else "its answers have no fields in common"


def _trusted(context: Context) -> dict[str, str]:
    """The files that the policy's integrity gate takes as reviewed."""
    gates = context.policy.gates if context.policy else ()
    integrity = (gate for gate in gates if isinstance(gate, Integrity))
    return {path: digest for gate in integrity for path, digest in gate.trusted.items()}


def _body(frame: Any) -> str:
    rows: str = frame.to_json(orient="split", index=False, date_format="iso", double_precision=15)
    return '{"dataframe_split": ' + rows + "}"


def outputs(answer: str) -> Any:
    """A model's answer (JSON as `/invocations` gives it) as a frame: a row for each, a column for each field.

    Of two numbers in each row, which are the probabilities of no and yes, the second stays.
    """
    import pandas as pd

    told = json.loads(answer)
    rows = told["predictions"] if isinstance(told, dict) and "predictions" in told else told
    rows = rows if isinstance(rows, list) else [rows]
    if rows and all(isinstance(row, dict) for row in rows):
        frame = pd.DataFrame(rows)
    elif rows and all(isinstance(row, list) for row in rows):
        frame = pd.DataFrame(rows).rename(columns=lambda at: f"[{at}]")
        frame = frame[["[1]"]] if list(frame.columns) == ["[0]", "[1]"] else frame
    else:
        frame = pd.DataFrame({"prediction": rows})
    for name in frame.columns:
        # What is no plain value is compared as its text.
        nested = frame[name].map(lambda value: isinstance(value, list | dict))
        if nested.any():
            frame[name] = frame[name].map(json.dumps)
    return frame


def age(wanted: Freshness, file: Path, now: datetime, looked_at: str) -> tuple[Measurement, Mapping[str, str]]:
    """How old the features are at `now`, in hours: the newest time in the column, or else the file's own.

    Times without a zone are UTC. Raises `Mistake` where there is no such column, or no time in it.
    """
    if wanted.column is None:
        newest = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    else:
        newest = _newest(file, wanted.column)
    hours = (now - newest).total_seconds() / 3600
    when = f"{newest:%Y-%m-%d %H:%M} UTC"
    note = f"the newest value in {looked_at} is of {when}" if wanted.column else f"{looked_at} was written at {when}"
    if hours < 0:
        note += ", which lies in the future"
    where = wanted.column or looked_at
    return Measurement.exact(hours, where=where, note=note), {"newest": newest.isoformat(), "now": now.isoformat()}


def _newest(file: Path, column: str) -> datetime:
    import pandas as pd

    try:
        columns = Columns(file)
    except ValueError as error:
        raise Mistake(str(error)) from error
    if column not in columns.names:
        raise Mistake(f"{file.name} has no column '{column}' (`freshness`): it has {', '.join(columns.names)}")
    values = columns.one(column).dropna()
    if values.empty:
        raise Mistake(f"the column '{column}' of {file.name} holds no times: nothing says how old the features are")
    if pd.api.types.is_numeric_dtype(values):
        raise Mistake(f"the column '{column}' of {file.name} holds numbers: `freshness` needs a column of times")
    try:
        newest = pd.to_datetime(values, utc=True).max()
    except (ValueError, TypeError) as error:
        raise Mistake(f"the column '{column}' of {file.name} holds no times: {error}") from error
    found: datetime = newest.to_pydatetime()
    return found

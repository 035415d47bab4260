"""The record of every promotion: one MLflow run each, in the experiment `promotions/<model>`.

`promotion.json` (which holds the policy) and `policy.yaml` (as it was written) come first; each verdict is one
file, never written twice, with the digest of the file before it, and the run's tag has the last one's: a
verdict changed later is noticed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.observe import Notebook
from tasks.registry import TAG, client, dumps
from tasks.settings import Mistake
from validations.promotion import Promotion
from validations.series import Series
from validations.verdict import Artifact, Measurement, Verdict

EXPERIMENT = "promotions/"


class Tampered(Exception):
    """A stored verdict is not the one that the chain of digests vouches for."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One promotion or rollback as the history lists it. Times are UTC."""

    id: str
    kind: str
    run_id: str
    model: str
    champion: str
    challenger: str
    phase: str
    step: str
    why: str
    started: datetime
    finished: datetime | None


def sha256(data: bytes) -> str:
    """`sha256:<hex>` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def begin(promotion: Promotion, policy_text: str, tags: dict[str, str]) -> tuple[str, str]:
    """Open the run of a promotion. Returns its run id, and the digest that the first verdict follows."""
    run_id = open_run(
        promotion.policy.model,
        promotion.id,
        {
            "kind": "promotion",
            "champion": promotion.champion or "",
            "challenger": promotion.challenger,
            "digest": promotion.digest,
            "policy": promotion.policy.digest,
            **tags,
        },
    )
    head = dumps(json.loads(promotion.model_copy(update={"verdicts": ()}).model_dump_json()))
    client().log_text(run_id, head, "promotion.json")
    client().log_text(run_id, policy_text, "policy.yaml")
    chain = sha256(head.encode())
    client().set_tag(run_id, TAG + "chain", chain)
    return run_id, chain


def open_run(model: str, name: str, tags: dict[str, str]) -> str:
    """A new run called `name` in the model's experiment. Returns its run id."""
    experiment = client().get_experiment_by_name(EXPERIMENT + model)
    experiment_id = experiment.experiment_id if experiment else client().create_experiment(EXPERIMENT + model)
    ours = {TAG + key: value for key, value in {"id": name, "model": model, "phase": "running", **tags}.items()}
    return str(client().create_run(experiment_id, run_name=name, tags=ours).info.run_id)


def record(run_id: str, promotion: Promotion, before: str) -> str:
    """Write the promotion's last verdict behind the file whose digest is `before`.

    Returns the digest of what was written. Measurements become metrics, phase and reason become tags.
    """
    digest = log_verdict(run_id, promotion.verdicts[-1], len(promotion.verdicts), before)
    client().set_tag(run_id, TAG + "chain", digest)
    label(run_id, promotion)
    return digest


def log_verdict(run_id: str, verdict: Verdict, number: int, before: str) -> str:
    """Write one verdict as the run's `number`th file and its measurements as metrics. Returns its digest."""
    text = dumps({"before": before, "verdict": json.loads(verdict.model_dump_json())})
    client().log_text(run_id, text, f"verdicts/{number:02d}-{slug(verdict.step)}.json")
    log_metrics(run_id, verdict.step, verdict.evidence.measurements, number)
    return sha256(text.encode())


def log_metrics(run_id: str, step: str, measurements: dict[str, Measurement], number: int) -> None:
    """The measurements of a step as metrics `<step>/<metric>` of the run, with their interval's ends."""
    from mlflow.entities import Metric

    now = int(datetime.now(UTC).timestamp() * 1000)
    metrics = [
        Metric(f"{slug(step)}/{metric}{end}", value, now, number)
        for metric, m in measurements.items()
        for end, value in (("", m.value), ("_low", m.low), ("_high", m.high))
        if abs(value) != float("inf")
    ]
    client().log_batch(run_id, metrics=metrics)


def label(run_id: str, promotion: Promotion) -> None:
    """Set the run's tags to where the promotion stands."""
    decided = promotion.decided_by
    client().set_tag(run_id, TAG + "phase", promotion.phase.value)
    if decided:
        client().set_tag(run_id, TAG + "step", decided.step)
        client().set_tag(run_id, TAG + "why", decided.why[:4500])


def keep(run_id: str, path: Path, folder: str = "evidence") -> Artifact:
    """Store a file of a step's evidence with the run."""
    client().log_artifact(run_id, str(path), folder)
    return Artifact(name=path.name, uri=f"{folder}/{path.name}", sha256=sha256(path.read_bytes()))


def attach(run_id: str, name: str, data: object) -> None:
    """Store data beside what a run keeps: what was found out afterwards."""
    client().log_text(run_id, dumps(data), name)


def describe(run_id: str, markdown: str) -> None:
    """Set the run's description, as the MLflow UI shows it."""
    client().set_tag(run_id, "mlflow.note.content", markdown[:4900])


def finish(run_id: str) -> None:
    """Close the run of a promotion that reached an outcome, whichever."""
    client().set_terminated(run_id, "FINISHED")


def interrupted(run_id: str) -> None:
    """Close the run of a promotion that was ended before it reached an outcome."""
    client().set_tag(run_id, TAG + "phase", "interrupted")
    client().set_terminated(run_id, "FAILED")


def entries(model: str | None = None, identifier: str | None = None) -> list[Entry]:
    """The promotions and rollbacks of `model` (None: of all), newest first."""
    where = f"name = '{EXPERIMENT}{model}'" if model else f"name LIKE '{EXPERIMENT}%'"
    return _search(where, f"tags.`{TAG}id` = '{identifier}'" if identifier else "")


def _search(experiments: str, runs: str) -> list[Entry]:
    """Entries by MLflow's filters for experiments and for runs, newest first."""
    ids = [e.experiment_id for e in client().search_experiments(filter_string=experiments)]
    if not ids:
        return []
    found = client().search_runs(ids, runs, order_by=["attributes.start_time DESC"], max_results=1000)
    return [_entry(run) for run in found if TAG + "id" in run.data.tags]


def _entry(run: Any) -> Entry:
    tags = {key.removeprefix(TAG): value for key, value in run.data.tags.items() if key.startswith(TAG)}
    end = run.info.end_time
    return Entry(
        id=tags["id"],
        kind=tags.get("kind", "promotion"),
        run_id=run.info.run_id,
        model=tags.get("model", ""),
        champion=tags.get("champion", ""),
        challenger=tags.get("challenger", ""),
        phase=tags.get("phase", ""),
        step=tags.get("step", ""),
        why=tags.get("why", ""),
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        finished=datetime.fromtimestamp(end / 1000, UTC) if end else None,
    )


def observed(model: str, digest: str, champion: str | None, folder: Path) -> dict[str, list[Series]]:
    """What earlier promotions of this artifact against this champion saw, by gate, oldest first: what their records
    have, and the notebooks (in `folder`, by promotion) of steps that were cut off.
    """
    found: dict[str, list[Series]] = {}
    where = f"tags.`{TAG}digest` = '{digest}' AND tags.`{TAG}champion` = '{champion or ''}'"
    for past in reversed(_search(f"name = '{EXPERIMENT}{model}'", where)):
        promotion = stored(past.run_id)
        names = {step.name: step for step in promotion.plan}
        kept = {step: data["series"] for step, data in evidence(past.run_id, promotion).items() if "series" in data}
        seen = [(step, Series.model_validate(series)) for step, series in kept.items()]
        seen += [(step, series) for step, series in Notebook.read(folder / past.id) if step not in kept]
        for step, series in seen:
            index = names[step].gate if step in names else None
            gate = None if index is None else promotion.policy.gates[index]
            if gate is not None and gate.kind != "watch" and series.blocks:
                found.setdefault(gate.name or gate.kind, []).append(series)
    return found


def evidence(run_id: str, promotion: Promotion) -> dict[str, dict[str, Any]]:
    """The evidence files of a promotion's steps. Raises `Tampered` for one that is not what its verdict vouches for."""
    import mlflow.artifacts

    found = {}
    for verdict in promotion.verdicts:
        for artifact in verdict.evidence.artifacts:
            if not artifact.name.endswith(".json"):
                continue
            text = mlflow.artifacts.load_text(f"runs:/{run_id}/{artifact.uri}")
            if sha256(text.encode()) != artifact.sha256:
                raise Tampered(f"{artifact.uri} of run {run_id} is not what the verdict on {verdict.step} rests on")
            found[verdict.step] = json.loads(text)
    return found


def entry(identifier: str) -> Entry:
    """The promotion or rollback of this id. Raises `Mistake` where there is none."""
    found = entries(identifier=identifier) if "'" not in identifier else []
    if not found:
        raise Mistake(f"no promotion is called '{identifier}': `titleshot history MODEL` lists them", code=2)
    return found[0]


def stored(run_id: str) -> Promotion:
    """A promotion as its run has it. Raises `Tampered` where the chain of verdicts is broken."""
    import mlflow.artifacts

    root = f"runs:/{run_id}"
    head = mlflow.artifacts.load_text(f"{root}/promotion.json")
    verdicts, before = [], sha256(head.encode())
    for path, text in _verdict_files(run_id):
        data = json.loads(text)
        if data["before"] != before:
            raise Tampered(f"{path} of run {run_id} does not follow the verdict before it: one of them was changed")
        verdicts.append(Verdict.model_validate(data["verdict"]))
        before = sha256(text.encode())
    if client().get_run(run_id).data.tags.get(TAG + "chain") != before:
        raise Tampered(f"the last verdict of run {run_id} is not the one that was recorded: it was changed or removed")
    return Promotion.model_validate({**json.loads(head), "verdicts": verdicts})


def _verdict_files(run_id: str) -> Iterator[tuple[str, str]]:
    import mlflow.artifacts

    for info in sorted(client().list_artifacts(run_id, "verdicts"), key=lambda info: str(info.path)):
        yield info.path, mlflow.artifacts.load_text(f"runs:/{run_id}/{info.path}")


def slug(step: str) -> str:
    """A step's name as a file name: "canary 5%" is "canary-5"."""
    return step.replace("%", "").replace(" ", "-").replace(".", "_")


def fetch(entry: Entry, artifact: str, into: Path) -> Path:
    """Download one artifact of a promotion's run. Raises `Mistake` where the run has none."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    into.mkdir(parents=True, exist_ok=True)
    try:
        return Path(
            mlflow.artifacts.download_artifacts(run_id=entry.run_id, artifact_path=artifact, dst_path=str(into))
        )
    except (MlflowException, OSError) as error:
        raise Mistake(f"{entry.id} has no {artifact}: it is {entry.phase}") from error

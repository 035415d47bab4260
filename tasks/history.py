"""The record of every promotion: one MLflow run each, in the experiment `promotions/<model>`.

`promotion.json` (which holds the policy) and `policy.yaml` (as it was written) come first; each verdict is one
file, never written twice, with the digest of the file before it, and the run's tag has the last one's: a
verdict changed later is noticed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.journal import Open
from tasks.observe import Notebook
from tasks.registry import TAG, client, dumps
from tasks.settings import Mistake, region
from validations.promotion import Promotion
from validations.series import Series
from validations.verdict import Artifact, Measurement, Verdict

EXPERIMENT = "promotions/"
EVIDENCE = "evidence"


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
    region: str = ""


def sha256(data: bytes) -> str:
    """`sha256:<hex>` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(slots=True)
class Record:
    """The pen of one promotion's run. It may lag behind what happened and catches up; whatever it is asked to write
    again comes to the same bytes, so a promotion that another process goes on with has one run as well.

    `folder` is where the evidence files lie until they are stored.
    """

    policy_text: str
    tags: Mapping[str, str]
    folder: Path
    run_id: str = ""
    _chain: str = ""
    _written: int = 0

    def catch_up(self, promotion: Promotion) -> None:
        """Write what the run lacks of `promotion`: head, evidence, verdicts, tags. Raises what MLflow's client raises;
        the next call goes on where this one stopped.
        """
        head = dumps(json.loads(promotion.model_copy(update={"verdicts": ()}).model_dump_json()))
        if not self._chain:
            self.run_id = self.run_id or _find(promotion) or self._open(promotion)
            client().log_text(self.run_id, head, "promotion.json")
            client().log_text(self.run_id, self.policy_text, "policy.yaml")
            self._chain = sha256(head.encode())
            client().set_tag(self.run_id, TAG + "chain", self._chain)
        there = (
            {info.path for info in client().list_artifacts(self.run_id, "verdicts")} if promotion.verdicts else set()
        )
        for number, verdict in enumerate(promotion.verdicts[self._written :], self._written + 1):
            text = _verdict_text(verdict, self._chain)
            if _verdict_file(number, verdict) not in there:
                for artifact in verdict.evidence.artifacts:
                    client().log_artifact(self.run_id, str(self.folder / artifact.name), EVIDENCE)
                log_verdict(self.run_id, verdict, number, self._chain)
            self._chain, self._written = sha256(text.encode()), number
            client().set_tag(self.run_id, TAG + "chain", self._chain)
        label(self.run_id, promotion)

    def _open(self, promotion: Promotion) -> str:
        tags = {
            "kind": "promotion",
            "champion": promotion.champion or "",
            "challenger": promotion.challenger,
            "digest": promotion.digest,
            "policy": promotion.policy.digest,
        }
        return open_run(promotion.policy.model, promotion.id, {**tags, **self.tags})


def _find(promotion: Promotion) -> str:
    found = entries(promotion.policy.model, promotion.id)
    return found[0].run_id if found else ""


def open_run(model: str, name: str, tags: dict[str, str]) -> str:
    """A new run called `name` in the model's experiment. Returns its run id."""
    experiment = client().get_experiment_by_name(EXPERIMENT + model)
    experiment_id = experiment.experiment_id if experiment else client().create_experiment(EXPERIMENT + model)
    ours = {TAG + key: value for key, value in {"id": name, "model": model, "phase": "running", **tags}.items()}
    return str(client().create_run(experiment_id, run_name=name, tags=ours).info.run_id)


def rolled_back(left: Open, phase: str, why: str, verdict: Verdict, tags: Mapping[str, str]) -> None:
    """The run of a rollback by hand, or of an alias that a hand has moved, with its verdict; where there is one already
    it is written again.
    """
    found = entries(left.model, left.id)
    said = {
        "kind": left.what,
        "champion": left.of,
        "challenger": left.to,
        "step": verdict.step,
        "phase": phase,
        "why": why,
        "region": region(),
    }
    run_id = found[0].run_id if found else open_run(left.model, left.id, {**said, **tags})
    log_verdict(run_id, verdict, 1, "")
    finish(run_id)


def log_verdict(run_id: str, verdict: Verdict, number: int, before: str) -> None:
    """Write one verdict as the run's `number`th file and its measurements as metrics; `before` is the digest of the
    file that it follows.
    """
    client().log_text(run_id, _verdict_text(verdict, before), _verdict_file(number, verdict))
    log_metrics(run_id, verdict.step, verdict.evidence.measurements, number)


def _verdict_text(verdict: Verdict, before: str) -> str:
    return dumps({"before": before, "verdict": json.loads(verdict.model_dump_json())})


def _verdict_file(number: int, verdict: Verdict) -> str:
    return f"verdicts/{number:02d}-{slug(verdict.step)}.json"


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


def artifact(path: Path) -> Artifact:
    """A file of a step's evidence as its verdict vouches for it; `Record` stores it."""
    return Artifact(name=path.name, uri=f"{EVIDENCE}/{path.name}", sha256=sha256(path.read_bytes()))


def keep(run_id: str, path: Path, folder: str) -> None:
    """Store a file beside what a run keeps."""
    client().log_artifact(run_id, str(path), folder)


def attach(run_id: str, name: str, data: object) -> None:
    """Store data beside what a run keeps: what was found out afterwards."""
    client().log_text(run_id, dumps(data), name)


def describe(run_id: str, markdown: str) -> None:
    """Set the run's description, as the MLflow UI shows it."""
    client().set_tag(run_id, "mlflow.note.content", markdown[:4900])


def finish(run_id: str) -> None:
    """Close the run of a promotion that reached an outcome, whichever; one that was interrupted before, too."""
    client().set_terminated(run_id, "FINISHED")


def interrupted(run_id: str) -> None:
    """Close the run of a promotion that was ended before it reached an outcome."""
    client().set_tag(run_id, TAG + "phase", "interrupted")
    client().set_terminated(run_id, "FAILED")


def entries(model: str | None = None, identifier: str | None = None) -> list[Entry]:
    """The promotions and rollbacks of `model` (None: of all), newest first."""
    return _entries(model, id=identifier) if identifier else _entries(model)


def _entries(model: str | None, **tags: str) -> list[Entry]:
    return [_entry(run) for run in _runs(model, **tags) if TAG + "id" in run.data.tags]


def _runs(model: str | None, status: str = "", **tags: str) -> Sequence[Any]:
    """MLflow's runs with these of our tags, newest first; of all models where `model` is None."""
    name = f"name = '{EXPERIMENT}{model}'" if model else f"name LIKE '{EXPERIMENT}%'"
    ids = [one.experiment_id for one in client().search_experiments(filter_string=name)]
    where = [f"tags.`{TAG}{key}` = '{value}'" for key, value in tags.items()]
    where += [f"attributes.status = '{status}'"] if status else []
    newest = ["attributes.start_time DESC"]
    return client().search_runs(ids, " AND ".join(where), order_by=newest, max_results=1000) if ids else []


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
        region=tags.get("region", ""),
    )


def observed(model: str, digest: str, champion: str | None, folder: Path) -> dict[str, list[Series]]:
    """What earlier promotions of this artifact against this champion saw, by gate, oldest first: what their records
    have, and the notebooks (in `folder`, by promotion) of steps that were cut off. Within a region: that one's.
    """
    found: dict[str, list[Series]] = {}
    for past in reversed(_entries(model, digest=digest, champion=champion or "")):
        if past.region != region():  # other people's requests
            continue
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
    found = {}
    for verdict in promotion.verdicts:
        for artifact in verdict.evidence.artifacts:
            if not artifact.name.endswith(".json"):
                continue
            text = text_of(run_id, artifact.uri)
            if sha256(text.encode()) != artifact.sha256:
                raise Tampered(f"{artifact.uri} of run {run_id} is not what the verdict on {verdict.step} rests on")
            found[verdict.step] = json.loads(text)
    return found


def tagged(tag: str) -> list[str]:
    """The values of one of our tags on the records of all promotions that are not over, newest first."""
    runs = _runs(None, "RUNNING", kind="promotion")
    return [run.data.tags[TAG + tag] for run in runs if TAG + tag in run.data.tags]


def of_flow_run(model: str, flow_run: str, *, anywhere: bool = False) -> Entry | None:
    """The promotion of `model` that this Prefect flow run began (in this region, within one; with `anywhere` the latest
    of all regions); None where it began none.
    """
    return next((one for one in _entries(model, flow_run=flow_run) if anywhere or one.region == region()), None)


def page(run_id: str, uri: str) -> str:
    """Where the MLflow UI at `uri` shows a promotion's report."""
    experiment = client().get_run(run_id).info.experiment_id
    return f"{uri}/#/experiments/{experiment}/runs/{run_id}/artifacts/report/report.html"


def entry(identifier: str) -> Entry:
    """The promotion or rollback of this id. Raises `Mistake` where there is none."""
    found = entries(identifier=identifier) if "'" not in identifier else []
    if not found:
        raise Mistake(f"no promotion is called '{identifier}': `titleshot history MODEL` lists them", code=2)
    return found[0]


def stored(run_id: str) -> Promotion:
    """A promotion as its run has it. Raises `Tampered` where the chain of verdicts is broken."""
    head = text_of(run_id, "promotion.json")
    verdicts, before = [], sha256(head.encode())
    files = sorted(str(info.path) for info in client().list_artifacts(run_id, "verdicts"))
    for path, text in ((path, text_of(run_id, path)) for path in files):
        data = json.loads(text)
        if data["before"] != before:
            raise Tampered(f"{path} of run {run_id} does not follow the verdict before it: one of them was changed")
        verdicts.append(Verdict.model_validate(data["verdict"]))
        before = sha256(text.encode())
    if client().get_run(run_id).data.tags.get(TAG + "chain") != before:
        raise Tampered(f"the last verdict of run {run_id} is not the one that was recorded: it was changed or removed")
    return Promotion.model_validate({**json.loads(head), "verdicts": verdicts})


def text_of(run_id: str, artifact: str) -> str:
    """One of the files that a run keeps."""
    import mlflow.artifacts

    return str(mlflow.artifacts.load_text(f"runs:/{run_id}/{artifact}"))


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

"""The MLflow registry: versions, aliases, stages, tags, and the download of artifacts."""

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deployments.artifact import digest as digest_of
from tasks.settings import Mistake, region

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
STAGE = {CHAMPION: "Production", CHALLENGER: "Staging", PREVIOUS: "Archived"}
TAG = "titleshot."
"""Our tags on versions: phase, promotion, verdict, digest."""


@dataclass(frozen=True, slots=True)
class Registered:
    """One version as the registry has it. `signature` is MLflow's own dict (empty where there is none)."""

    model: str
    number: str
    run_id: str | None
    tags: Mapping[str, str]

    @property
    def name(self) -> str:
        """As people say it."""
        return f"{self.model} v{self.number}"


def client() -> Any:
    """MLflow's client for the server that `Settings.connect` chose."""
    return _client(os.environ["MLFLOW_TRACKING_URI"])


@cache
def _client(uri: str) -> Any:
    import mlflow
    from mlflow.tracking import MlflowClient

    # What this process pointed MLflow at before (a training script, say) is not where our registry is.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return MlflowClient(uri, uri)


def find(model: str, number: str) -> Registered:
    """The version `number` of `model`. Raises `Mistake` where there is no such model or version."""
    from mlflow.exceptions import MlflowException

    try:
        version = client().get_model_version(model, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = versions(model)
        raise Mistake(f"{model} has no version {number}: it has {', '.join(known) or 'none yet'}", code=2) from error
    return Registered(model, str(version.version), version.run_id, dict(version.tags))


def versions(model: str) -> list[str]:
    """The numbers of all versions of `model`, oldest first. Raises `Mistake` for an unknown model."""
    from mlflow.exceptions import MlflowException

    try:
        client().get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [m.name for m in client().search_registered_models(max_results=20)]
        known = f"it has: {', '.join(names)}" if names else "it has none yet; register one with MLflow"
        raise Mistake(f"the registry has no model '{model}' ({known})", code=2) from error
    found = client().search_model_versions(f"name = '{model}'")
    return sorted((str(v.version) for v in found), key=int)


def regional(alias: str) -> str:
    """An alias as it is called here: of a model that is served in several regions each has its own champion."""
    here = region()
    return f"{alias}-{here}" if here and alias in (CHAMPION, PREVIOUS) else alias


def aliased(model: str, alias: str) -> str | None:
    """The version number that `alias` names (the region's own, within one); None where the alias is not set."""
    try:
        return _aliases(model).get(regional(alias))
    except Mistake:
        return None


def _aliases(model: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        found = client().get_registered_model(model).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            versions(model)
        raise
    return {alias: str(number) for alias, number in found.items()}


class Moved(Mistake):
    """Somebody moved an alias by hand while we were about to: the message says who sees what."""


def move(
    model: str, alias: str, to: str | None, *, of: Collection[str | None], guard: AbstractContextManager[None]
) -> None:
    """Make `alias` (the region's own, within one) name `to` (None: nothing) where it names one of `of`; the stage moves
    along where the registry still has stages, but with no region's. Nothing happens where it is so already. Raises
    `Moved` where the alias names something else.

    `guard` holds off every other promoter between the look and the change; a hand in the MLflow UI it cannot hold.
    """
    with guard:
        found = aliased(model, alias)
        if found not in (to, *of):
            expected = " or ".join(f"v{one}" if one else "nothing" for one in dict.fromkeys(of))
            raise Moved(
                f"the alias {regional(alias)} of {model} names {f'v{found}' if found else 'nothing'}, not {expected} "
                "as when this began: someone moved it. It was left as it is: set it in the MLflow UI to the version "
                "that `titleshot status` shows, or use `titleshot doctor --mend`"
            )
        if to is None:
            if found is not None:
                client().delete_registered_model_alias(model, regional(alias))
            return
        if found != to:
            client().set_registered_model_alias(model, regional(alias), to)
        _stage(model, to, STAGE[alias])


def unstage(model: str, number: str, guard: AbstractContextManager[None]) -> None:
    """Give a version that challenges no more the stage of the alias it still has, or None."""
    with guard:
        named = [alias for alias in (CHAMPION, PREVIOUS) if aliased(model, alias) == number]
        _stage(model, number, STAGE[named[0]] if named else "None")


def _stage(model: str, number: str, stage: str) -> None:
    if region():  # a version has one stage, whatever it is in other regions
        return
    transition = getattr(client(), "transition_model_version_stage", None)
    if transition is None or client().get_model_version(model, number).current_stage == stage:
        return
    with warnings.catch_warnings():
        # Deprecated since MLflow 2.9, and still what many registries are read by.
        warnings.simplefilter("ignore", FutureWarning)
        transition(model, number, stage)


def unreachable(error: BaseException) -> bool:
    """Whether this error of MLflow's client, or one behind it, says that the server did not answer: worth another
    try.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import ConnectionError as Refused
    from requests.exceptions import Timeout

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, Refused | Timeout):
            return True
        if isinstance(seen, MlflowException) and (seen.get_http_status_code() >= 500 or "API request to" in str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def tag(model: str, number: str, **tags: str) -> None:
    """Set our tags on a version (phase, promotion, verdict, digest)."""
    for name, value in tags.items():
        client().set_model_version_tag(model, number, TAG + name, value[:4500])


def local_path(version: Registered, home: Path) -> Path:
    """Where a version's artifacts lie under the home, once downloaded."""
    return home / "models" / version.model / version.number


def download(version: Registered, into: Path) -> Path:
    """The version's artifacts as the registry has them now, in the empty directory `into`."""
    import mlflow.artifacts

    into.mkdir(parents=True)
    mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{version.model}/{version.number}", dst_path=str(into))
    return into


def half_downloads(home: Path, model: str) -> list[Path]:
    """Downloads of versions of `model` that were cut off, or that their promotion did not clean up."""
    folders = (home / "models" / model).glob("*.*")
    return [path for path in folders if re.fullmatch(r"\d+\.[0-9a-f]{8}", path.name)]


def admit(version: Registered, home: Path) -> tuple[Path, str, str]:
    """Fetch a version: the directory with its artifacts, the digest on record, and the digest found.

    The first time a version is seen its digest is recorded as a tag; from then on it must stay. A copy on this
    disk that is as recorded is left in place: a server may be reading it.
    """
    local = local_path(version, home)
    fresh = download(version, local.with_name(f"{version.number}.{secrets.token_hex(4)}"))
    found = digest_of(fresh)
    recorded = version.tags.get(TAG + "digest")
    if recorded is None:
        tag(version.model, version.number, digest=found)
        recorded = found
    kept = digest_of(local) if local.exists() else None
    if kept == recorded != found:
        return fresh, recorded, found
    if kept == found:
        shutil.rmtree(fresh)
    else:
        shutil.rmtree(local, ignore_errors=True)
        fresh.rename(local)
    return local, recorded, found


def admitted(version: Registered, home: Path) -> tuple[Path, str, str]:
    """As `admit`, for a version that is in service: its copy on this disk, without asking the registry for
    another where it is as recorded.
    """
    local, recorded = local_path(version, home), version.tags.get(TAG + "digest")
    if local.exists() and recorded is not None and digest_of(local) == recorded:
        return local, recorded, recorded
    return admit(version, home)


def requester(version: Registered) -> str:
    """Who is taken for having asked, where nobody said: the version's tag `titleshot.requester`, or else the user whom
    MLflow has for the run that made it; empty where neither is known.
    """
    if named := version.tags.get(TAG + "requester"):
        return named
    run = client().get_run(version.run_id) if version.run_id else None
    return str(run.data.tags.get("mlflow.user", "")) if run else ""


def quarantined(model: str, digest: str) -> str | None:
    """Why an artifact of this digest is refused, under whatever version number; None if it is not.

    The tag `quarantine` is set where a verdict blamed the version itself, or an operator rolled it back; a
    platform's error or a thin sample does not set it.
    """
    for version in client().search_model_versions(f"name = '{model}'"):
        reason = version.tags.get(TAG + "quarantine")
        if reason and version.tags.get(TAG + "digest") == digest:
            return f"v{version.version} was {reason}"
    return None


def signature(path: Path) -> dict[str, Any]:
    """The MLflow signature in a downloaded version's MLmodel file; empty where it has none."""
    import yaml

    return dict(yaml.safe_load((path / "MLmodel").read_text()).get("signature") or {})


def example_request(path: Path) -> bytes | None:
    """The request body that MLflow stored beside the model; None without an input example."""
    try:
        return (path / "serving_input_example.json").read_bytes()
    except FileNotFoundError:
        return None


def reference(version: Registered, home: Path) -> Path:
    """The features that the version was trained on: `reference/features.parquet` of its run.

    Raises `Mistake` where the run has none.
    """
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    hint = (
        "log a sample of its training features as the run's artifact reference/features.parquet, "
        "or name a parquet file in the policy's features gate (`reference:`)"
    )
    if version.run_id is None:
        raise Mistake(f"{version.name} has no run to find its reference features in: {hint}")
    into = home / "references" / version.model / version.number
    into.mkdir(parents=True, exist_ok=True)
    try:
        return Path(
            mlflow.artifacts.download_artifacts(
                run_id=version.run_id, artifact_path="reference/features.parquet", dst_path=str(into)
            )
        )
    except (MlflowException, OSError) as error:
        raise Mistake(f"{version.name} has no reference features: {hint}") from error


SUITE = "reference/suite.json"
"""Where a version's run keeps an expectation suite that people edited."""


def suite(version: Registered, home: Path) -> Path | None:
    """The expectation suite that people logged into the version's run; None where they did not."""
    import mlflow.artifacts

    if version.run_id is None or SUITE not in (f.path for f in client().list_artifacts(version.run_id, "reference")):
        return None
    into = home / "references" / version.model / version.number
    into.mkdir(parents=True, exist_ok=True)
    return Path(mlflow.artifacts.download_artifacts(run_id=version.run_id, artifact_path=SUITE, dst_path=str(into)))


def log_suite(version: Registered, text: str) -> None:
    """Keep an expectation suite in the version's run. Raises `Mistake` where it has none."""
    if version.run_id is None:
        raise Mistake(f"{version.name} has no run to keep a suite in: name the file in the policy (`suite:`) instead")
    client().log_text(version.run_id, text, SUITE)


def links(version: Registered, uri: str) -> dict[str, str]:
    """Addresses of a version's pages in the MLflow UI."""
    pages = {"version": f"{uri}/#/models/{version.model}/versions/{version.number}"}
    if version.run_id:
        pages["run"] = f"{uri}/#/runs/{version.run_id}"
    return pages


def dumps(data: object) -> str:
    """JSON as we store it: stable order, so that equal data has an equal digest."""
    return json.dumps(data, sort_keys=True, indent=1, default=str)

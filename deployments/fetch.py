"""Fetch one model version from MLflow into a directory, and verify its digest: the init container of a pod.

Exit codes: 0 the artifact is there and right (also where it was before), 1 it could not be had, 3 it is not what was
admitted. In each case but the first one line says why.
"""

import argparse
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from deployments.artifact import EXCLUDED, digest

FAILED, WRONG = 1, 3
_PAUSE = 2.0
_FINAL = frozenset(
    {
        *("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "NOT_FOUND"),
        *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"),
    }
)
"""MLflow's codes for what another try would not change."""


class Refused(Exception):
    """Why there is no artifact, in one sentence. `code` is the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def fetch(model: str, number: str, admitted: str, to: Path, patience: float) -> str:
    """Put the version at `to`, whole or not at all; say what was done. Raises `Refused`.

    A right artifact that is there is left. While MLflow does not answer it is asked again for `patience` seconds.
    """
    if found := _found(to):
        if found == admitted:
            return "is there already"
        print(f"{to} holds something else ({found}): it is replaced", flush=True)  # noqa: T201
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise Refused("cannot be fetched: MLFLOW_TRACKING_URI is not set")
    for left in to.parent.glob(f".{to.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    fresh = to.parent / f".{to.name}.{secrets.token_hex(4)}.part"
    if os.path.ismount(to):  # a volume of a pod: nothing can be renamed in its place
        fresh = to / fresh.name
    try:
        _download(model, number, fresh, time.monotonic() + patience)
        found = digest(fresh)
        if found != admitted:
            raise Refused(f"is not what was admitted: its digest is {found}, admitted was {admitted}", WRONG)
        _move(fresh, to)
    except ValueError as error:
        raise Refused(f"is not what was admitted: {error}", WRONG) from error
    except OSError as error:
        raise Refused(f"cannot be written to {to}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return "was fetched"


def _found(to: Path) -> str | None:
    try:
        return digest(to) if to.is_dir() and any(to.iterdir()) else None
    except (OSError, ValueError) as error:
        return str(error)


def _move(fresh: Path, to: Path) -> None:
    if fresh.parent != to:
        shutil.rmtree(to, ignore_errors=True)
        fresh.rename(to)
        return
    for old in to.iterdir():
        if old != fresh:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    for new in list(fresh.iterdir()):
        new.rename(to / new.name)


def _download(model: str, number: str, into: Path, end: float) -> None:
    # Ours is the patience: by itself MLflow would try for minutes before it says a word.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    while True:
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        try:
            mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{model}/{number}", dst_path=str(into))
        except MlflowException as error:
            why, final = str(error), error.error_code in _FINAL
        except OSError as error:  # requests' own errors are such
            why, final = f"{type(error).__name__}: {error}", error.errno is not None
        else:
            if any(path.name not in EXCLUDED for path in into.iterdir()):
                return
            why, final = "there is nothing where its artifact should be", True
        why = " ".join(why.split())[:500]
        if final or time.monotonic() > end:
            raise Refused(f"cannot be fetched from {os.environ['MLFLOW_TRACKING_URI']}: {why}")
        time.sleep(_PAUSE)


def parse(given: Iterable[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fetch one model version from MLflow and verify its digest.")
    for name in ("model", "version", "digest"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--to", type=Path, required=True, help="the directory that becomes the artifact")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for which MLflow is asked again")
    return parser.parse_args(None if given is None else list(given))


def main() -> int:
    """Fetch; return the exit code."""
    options = parse()
    name = f"{options.model} {options.version}"
    try:
        done = fetch(options.model, options.version, options.digest, options.to.absolute(), options.patience)
    except Refused as error:
        print(f"{name} {error}", file=sys.stderr)  # noqa: T201
        return error.code
    print(f"{name} {done}: {options.to}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

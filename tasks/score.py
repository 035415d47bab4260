"""Loads a model and scores with it in a process of its own, so that nothing it does reaches ours.

The processes are forked from a server that has the heavy imports behind it (stdlib `forkserver`): the
first costs seconds, the others milliseconds.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

PRELOAD = ["mlflow.pyfunc", "sklearn.pipeline", "pandas"]


class ScoreError(Exception):
    """The model could not be loaded, failed, or took its process with it; the message is one line."""


def score(
    path: Path,
    parquet: Path | None = None,
    drop: str | None = None,
    *,
    env_manager: str = "local",
    timeout: float = 300,
) -> Any:
    """Predictions of the model in `path`, for the rows of `parquet` without the column `drop`, or for its
    own input example where `parquet` is None.

    Returns what the model returned (array or frame). With another `env_manager` than "local" the model runs in
    its own environment, made by MLflow, and an array comes back. Raises `ScoreError`; `timeout` is in seconds.
    """
    if env_manager != "local":
        return score_in_own_environment(path, parquet, drop, env_manager, timeout)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(_score, path, parquet, drop)
        try:
            answer, error = future.result(timeout)
        except BrokenProcessPool as broken:
            raise ScoreError(
                "the process that loaded the model died (out of memory, or a crash in native code)"
            ) from broken
        except TimeoutError as late:
            for process in multiprocessing.active_children():
                if process.pid in (pool._processes or {}):  # noqa: SLF001 - there is no public way to end a hung worker
                    process.kill()
            raise ScoreError(f"the model gave no answer within {timeout:.0f} s") from late
    if error:
        raise ScoreError(error)
    return answer


def score_in_own_environment(
    path: Path, parquet: Path | None, drop: str | None, env_manager: str, timeout: float
) -> Any:
    """As `score`, by `mlflow models predict` in an environment with the model's own requirements."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        if parquet is None:
            example = path / "serving_input_example.json"
            if not example.exists():
                raise ScoreError("it has no input example: log the model with `input_example=...`")
            asked.write_bytes(example.read_bytes())
        else:
            import pandas as pd

            rows = pd.read_parquet(parquet)
            rows = rows.drop(columns=drop) if drop else rows
            asked.write_text('{"dataframe_split": ' + rows.to_json(orient="split", index=False) + "}")
        if env_manager != "local":
            made = _mlflow("prepare-env", "-m", str(path), env_manager=env_manager, timeout=3 * timeout)
            if made.returncode:
                # No network, no such manager, a requirement that is gone: not the model's answer to anything.
                raise RuntimeError(f"its environment cannot be made ({env_manager}): {_last(made)}")
        files = ("-m", str(path), "-i", str(asked), "-o", str(answered), "-t", "json")
        try:
            done = _mlflow("predict", *files, env_manager=env_manager, timeout=timeout)
        except subprocess.TimeoutExpired as late:
            raise ScoreError(f"the model gave no answer within {timeout:.0f} s") from late
        if done.returncode or not answered.exists():
            raise ScoreError(_last(done))
        return np.asarray(json.loads(answered.read_text())["predictions"])


def _mlflow(*words: str, env_manager: str, timeout: float) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mlflow", "models", *words, "--env-manager", env_manager]
    # `uv` may be installed beside our Python only.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def _last(done: "subprocess.CompletedProcess[str]") -> str:
    return (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]


def _score(path: Path, parquet: Path | None, drop: str | None) -> tuple[Any, str]:
    """Runs in the child. Errors travel as text: a model's own exception classes may not unpickle here."""
    try:
        import mlflow.pyfunc
        from mlflow.models import Model

        model = mlflow.pyfunc.load_model(str(path))
        if parquet is None:
            rows = Model.load(str(path)).load_input_example(str(path))
            if rows is None:
                return None, "it has no input example: log the model with `input_example=...`"
        else:
            import pandas as pd

            rows = pd.read_parquet(parquet)
            if drop is not None:
                rows = rows.drop(columns=drop)
            schema = model.metadata.get_input_schema()
            if schema is not None and schema.has_input_names():
                # The held-out rows may carry more columns than a version asks for.
                rows = rows[[name for name in schema.input_names() if name in rows.columns]]
        return model.predict(rows), ""
    except Exception as error:  # noqa: BLE001 - whatever a model raises is a finding, told in one line
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {text[0]} ({Path(last.filename).name}:{last.lineno})"

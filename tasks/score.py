"""Loads a model and scores with it in a process of its own, so that nothing it does reaches ours.

The processes are forked from a server that has the heavy imports behind it (stdlib `forkserver`): the
first costs seconds, the others milliseconds.
"""

import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# skops imports all of scikit-learn: two seconds of CPU, which each child would pay again.
PRELOAD = ["mlflow.pyfunc", "mlflow.sklearn", "sklearn.pipeline", "skops.io", "pandas"]


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
    return _in_a_child(_score, path, parquet, drop, timeout=timeout)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model answered: for each request (answer as JSON text, ""), or ("", why not in one line).

    `classes` are the labels of the model inside in the order of its probabilities (scikit-learn's `classes_`), where
    it has them.
    """

    replies: tuple[tuple[str, str], ...]
    classes: tuple[Any, ...] | None = None


def ask(path: Path, bodies: Sequence[str], *, env_manager: str = "local", timeout: float = 300) -> Asked:
    """What the model in `path` answers to each of `bodies` (JSON, as sent to `/invocations`), as callers see it.

    With another `env_manager` than "local" each request costs the start of a process in the model's own environment.
    Raises `ScoreError` where the model cannot be loaded; what it raises for one request is in that reply. `timeout`
    (seconds) is for all of them, or for each one in another environment.
    """
    if env_manager == "local":
        asked: Asked = _in_a_child(_ask, path, tuple(bodies), timeout=timeout)
        return asked
    replies = []
    for body in bodies:
        try:
            replies.append((_answer_in_own_environment(path, body, env_manager, timeout), ""))
        except ScoreError as error:
            replies.append(("", str(error)))
    return Asked(tuple(replies))


def _in_a_child(function: Callable[..., tuple[Any, str]], *arguments: Any, timeout: float) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(function, *arguments)
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

    if parquet is None:
        example = path / "serving_input_example.json"
        if not example.exists():
            raise ScoreError("it has no input example: log the model with `input_example=...`")
        body = example.read_text()
    else:
        import pandas as pd

        rows = pd.read_parquet(parquet)
        rows = rows.drop(columns=drop) if drop else rows
        body = '{"dataframe_split": ' + rows.to_json(orient="split", index=False) + "}"
    return np.asarray(json.loads(_answer_in_own_environment(path, body, env_manager, timeout))["predictions"])


def _answer_in_own_environment(path: Path, body: str, env_manager: str, timeout: float) -> str:
    """The answer to one request, as JSON text."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(body)
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
        return answered.read_text()


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


def _ask(path: Path, bodies: Sequence[str]) -> tuple[Asked | None, str]:
    """Runs in the child: MLflow's own scoring server, without the server."""
    try:
        os.environ["_MLFLOW_IS_IN_SERVING_ENVIRONMENT"] = "true"  # models look at it
        import mlflow.pyfunc
        from mlflow.pyfunc.scoring_server import invocations

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # its hints are for who wrote the request
        model = mlflow.pyfunc.load_model(str(path))
        schema = model.metadata.get_input_schema()
    except Exception as error:  # noqa: BLE001 - whatever a model raises is a finding, told in one line
        return None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    replies = []
    for body in bodies:
        try:
            answer = invocations(body, "application/json", model, schema)
            replies.append((answer.response, "") if answer.status == 200 else ("", str(answer.response)))
        except Exception as error:  # noqa: BLE001 - as above
            replies.append(("", _refusal(error)))
    return Asked(tuple(replies), _classes(model)), ""


def _refusal(error: Exception) -> str:
    """The line of MLflow's error that says why: its first ones repeat the request."""
    trace = str(getattr(error, "json_kwargs", {}).get("stack_trace") or "").strip().splitlines()
    if trace:
        return next((line for line in reversed(trace) if re.match(r"[\w.]+: ", line)), trace[-1])
    return (str(error).rsplit("\nError: ", 1)[-1].rsplit(". Error: ", 1)[-1].strip().splitlines() or [""])[0]


def _classes(model: Any) -> tuple[Any, ...] | None:
    with suppress(Exception):  # a raw model may be anything, and none at all
        labels = model.get_raw_model().classes_
        return tuple(json.loads(json.dumps(getattr(labels, "tolist", lambda: list(labels))())))
    return None

"""One real stack for all flow tests (MLflow, Prefect, Envoy under supervisord), and small models to promote."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyotp
import pytest

from deployments.local.supervisor import wait_for
from tasks import approvers
from tasks.flowruns import Unanswered

COLUMNS = ["x", "y", "segment"]


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    # Sockets live under the home, so its path must be short: pytest's own would do, a user's long one not.
    path = Path(tempfile.mkdtemp(prefix="ts."))
    before = {k: v for k, v in os.environ.items() if k.startswith(("TITLESHOT_", "PREFECT_", "MLFLOW_"))}
    os.environ["TITLESHOT_HOME"] = str(path)
    os.environ["PREFECT_HOME"] = str(path / "prefect")
    # Seconds of CPU that most tests do not need: the fixture `worker` starts it for those that do.
    os.environ["TITLESHOT_WORKERS"] = "0"
    yield path
    for name in [k for k in os.environ if k.startswith(("TITLESHOT_", "PREFECT_", "MLFLOW_"))]:
        del os.environ[name]
    os.environ.update(before)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def stack(home: Path) -> Iterator[Any]:
    from tasks import settings, stack

    loaded = settings.load()
    target = stack.up(loaded, {}, lambda _: None)
    try:
        loaded.connect()
        yield target
    finally:
        target.stop()


@pytest.fixture(scope="session")
def settings(stack: Any) -> Any:
    from tasks import settings

    return settings.load()


@pytest.fixture(scope="session")
def worker(stack: Any, settings: Any) -> Iterator[Any]:
    """The stack's own worker, which has made all deployments and asks for runs."""
    from tasks import stack as stacks

    stack.supervisor.add(stacks.worker_program(settings.model_copy(update={"workers": 2})))

    def works() -> bool:
        found = httpx.post(f"{settings.prefect}/work_pools/titleshot/workers/filter", json={}, timeout=10)
        return found.is_success and any(one["status"] == "ONLINE" for one in found.json())

    wait_for(works, 120, f"the worker does not come: {stack.supervisor.log('worker')}", every=0.3)
    yield stack.supervisor
    stack.supervisor.remove("worker")


class People:
    """Approvers with their authenticators."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.secrets: dict[str, str] = {}
        self.used: dict[str, int] = {}

    def enrol(self, name: str) -> None:
        uri = approvers.enrol(self.home, name, datetime.now(UTC), anew=True)
        self.secrets[name] = approvers.secret_of(uri)

    def code(self, name: str) -> str:
        """A code that was not used yet, of this step or the next one."""
        step = max(int(datetime.now(UTC).timestamp()) // 30, self.used.get(name, 0) + 1)
        self.used[name] = step
        return str(pyotp.TOTP(self.secrets[name]).at(step * 30))


@pytest.fixture(scope="session")
def people(home: Path, stack: Any) -> People:
    made = People(home)
    for name in ("ana", "bo"):
        made.enrol(name)
    return made


def until(condition: Callable[[], Any], seconds: float, what: str, said: Callable[[], str] = str) -> Any:
    """What `condition` returns, once that is something; `said` adds what explains why it is not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(Unanswered):
            if found := condition():
                return found
        time.sleep(0.3)
    pytest.fail(f"{what} within {seconds:g} s\n{said()}")


def promote(**arguments: Any) -> Any:
    # Prefect reads its settings when it is imported, so that has to wait for the stack's addresses.
    from flows.promote import promote as flow

    return flow(**arguments)


def rollback(**arguments: Any) -> Any:
    from flows.rollback import rollback as flow

    return flow(**arguments)


def rows(n: int, seed: int = 0, segments: str = "ab") -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {"x": random.normal(size=n), "y": random.normal(size=n), "segment": random.choice(list(segments), n)}
    )


def label(frame: pd.DataFrame) -> "pd.Series[int]":
    return (frame["x"] + 0.5 * frame["y"] > 0).astype(int)


def pipeline(handle_unknown: str = "ignore", flip: str | None = None) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder

    encode = ColumnTransformer(
        [("category", OneHotEncoder(handle_unknown=handle_unknown), ["segment"])], remainder="passthrough"
    )
    return Pipeline([("encode", encode), ("model", LogisticRegression())])


class Maker:
    """Registers versions of one model; each is real and differs from the others in how it was made."""

    def __init__(self, model: str, uri: str) -> None:
        self.model, self.uri = model, uri

    def version(
        self,
        *,
        seed: int = 0,
        model: Any = None,
        frame: pd.DataFrame | None = None,
        signature: bool = True,
        reference: pd.DataFrame | None = None,
        **how: Any,
    ) -> str:
        import mlflow
        from mlflow.models import infer_signature

        mlflow.set_tracking_uri(self.uri)
        frame = rows(400, seed) if frame is None else frame
        fitted = (model or pipeline()).fit(frame, label(frame))
        how.setdefault("serialization_format", "skops")
        with mlflow.start_run() as run:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "features.parquet"
                (frame if reference is None else reference).to_parquet(path)
                mlflow.log_artifact(str(path), "reference")
            extra = {"signature": infer_signature(frame, fitted.predict_proba(frame))} if signature else {}
            info = mlflow.sklearn.log_model(
                fitted,
                name="m",
                pyfunc_predict_fn="predict_proba",
                input_example=frame.head(2) if signature else None,
                pip_requirements=["mlflow", "scikit-learn"],
                **extra,
                **how,
            )
        return self.registered(info.model_uri, run.info.run_id, info.model_id)

    def registered(self, source: str, run_id: str, model_id: str) -> str:
        from mlflow import MlflowClient

        client = MlflowClient(self.uri, self.uri)
        if not client.search_registered_models(f"name = '{self.model}'"):
            client.create_registered_model(self.model)
        made = client.create_model_version(self.model, source=source, run_id=run_id, model_id=model_id)
        return str(made.version)


@pytest.fixture
def maker(settings: Any, request: pytest.FixtureRequest) -> Iterator[Maker]:
    name = request.node.name.replace("test_", "").split("[")[0][:40]
    maker = Maker(name, settings.mlflow)
    yield maker
    take_down(name)


def take_down(model: str) -> None:
    """Stop the servers of a test's model, so that the next test has the machine to itself."""
    from tasks import settings
    from tasks.targets import settings_target

    target = settings_target(settings.load())
    for number in list(target.deployed(model)):
        target.supervisor.remove(f"model-{model}-{number}")


@pytest.fixture
def policy(tmp_path: Path, maker: Maker) -> Callable[..., Path]:
    def write(*gates: dict[str, Any], name: str = "policy", model: str | None = None) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({"version": 1, "model": model or maker.model, "gates": list(gates)}))
        return path

    return write


@contextmanager
def live(target: Any, model: str, folder: Path, *, segments: str = "ab", rate: float = 40) -> Iterator[Any]:
    """Live traffic through the model's gateway for as long as the context lasts."""
    from loadtests import run

    frame = rows(500, 9, segments)
    bodies = [{"dataframe_split": {"columns": COLUMNS, "data": [row]}} for row in frame[COLUMNS].to_numpy().tolist()]
    payloads = folder / "live.jsonl"
    payloads.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    profile = run.Profile(rate=rate, seconds=240, timeout=20)
    with run.start(profile, f"{target.gateway(model)}/invocations", payloads, folder / "live") as traffic:
        yield traffic

"""Where things are: the environment's side of the configuration (what is good enough is the policy's).

Every setting is an environment variable `TITLESHOT_<NAME>`. Nothing heavy is imported here: the command
line answers from this module.
"""

import json
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

QUIET = {
    # Telemetry of every dependency is off in our stack, and MLflow gives up in seconds, not in minutes.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLIENT_METRICS_ENABLED": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A flow that raises is told by the command line in one line, not by Prefect in forty; its log has them.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


class Mistake(Exception):
    """Something that the user can mend: the message is one line that says what, where and how.

    `code` is the exit code: 2 for wrong use, 1 where the surroundings are not as they must be.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Settings(BaseSettings):
    """Settings of one home. `mlflow_uri` and `prefect_api_url` point at servers of the user's own; where
    they are empty, `titleshot up` runs both on this machine with their data under the home.
    """

    model_config = SettingsConfigDict(env_prefix="TITLESHOT_", extra="ignore")

    home: Path = Path(".titleshot")
    mlflow_uri: str | None = None
    prefect_api_url: str | None = None
    lease_seconds: float = 30.0
    """How long a promotion's hold on its model outlasts the death of its process."""
    watch_seconds: float = 30.0
    """How often the stack looks for promotions that their process left behind; 0 leaves that to you."""
    workers: int = 4
    """How many promotions asked for through Prefect the stack runs at the same time; 0: it has no worker."""
    policies: Path | None = None
    """Folder of the policies by which promotions start by themselves, one file per model; None: `policies` under the
    home.
    """
    notices: Path | None = None
    """Apprise's configuration file: who is told what happens. Tags are severities: info, warning, critical."""
    public_prefect: str | None = None
    """Prefect's UI as people reach it, for links in notices and forms; None: where its API is."""
    public_mlflow: str | None = None
    """MLflow's UI as people reach it; None: where its API is."""
    clusters: Path | None = None
    """The file that describes the clusters where models are served; None: `clusters.yaml` under the home, if any."""
    cluster: str | None = None
    """The cluster of that file that is meant, by name; None: its first."""
    region: str | None = None
    """The region that is meant, of models that are served in several: a cluster's name."""
    deploy_timeout: float = 120.0
    """Seconds until a version that is not ready counts as one that never will be."""
    env_manager: str = "local"
    """How model servers get their environment, in MLflow's words: local, virtualenv, uv, conda."""

    @property
    def stack_file(self) -> Path:
        """Where `up` records the ports that it chose."""
        return self.home / "stack.json"

    def stack(self) -> dict[str, Any]:
        """What `up` recorded: ports by program; empty before the first `up`."""
        try:
            return dict(json.loads(self.stack_file.read_text()))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Mistake(f"{self.stack_file} cannot be read ({error}): remove it and run `titleshot up`") from error

    @property
    def policy_folder(self) -> Path:
        """Where the policies are by which promotions start by themselves."""
        return self.policies or self.home / "policies"

    @property
    def clusters_file(self) -> Path | None:
        """The file that describes clusters; None where there is none."""
        if self.clusters is not None:
            return self.clusters
        usual = self.home / "clusters.yaml"
        return usual if usual.exists() else None

    @property
    def mlflow_page(self) -> str:
        """MLflow's UI, for links that people follow."""
        return self.public_mlflow or self.mlflow

    @property
    def prefect_page(self) -> str:
        """Prefect's UI, for links that people follow."""
        return self.public_prefect or self.prefect.removesuffix("/api")

    @property
    def mlflow(self) -> str:
        """The MLflow server's address. Raises `Mistake` where there is none yet."""
        return self.mlflow_uri or self._local("mlflow")

    @property
    def prefect(self) -> str:
        """The Prefect API's address. Raises `Mistake` where there is none yet."""
        return self.prefect_api_url or self._local("prefect") + "/api"

    def _local(self, program: str) -> str:
        port = self.stack().get(f"{program}_port")
        if port is None:
            raise Mistake(f"there is no stack in {self.home}: start it with `titleshot up`")
        return f"http://127.0.0.1:{port}"

    def answers(self, address: str) -> bool:
        """Whether the server at `address` (MLflow's, or Prefect's API) is well, asked for two seconds at most."""
        try:
            return httpx.get(f"{address}/health", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def connect(self, needed: Collection[str] = ("MLflow", "Prefect")) -> None:
        """Point this process's MLflow and Prefect at our servers, telemetry off; best before importing either.

        Raises `Mistake` where one that is `needed` does not answer.
        """
        for name, address, path in (("MLflow", self.mlflow, "/health"), ("Prefect", self.prefect, "/health")):
            if name not in needed:
                continue
            try:
                httpx.get(address + path, timeout=10).raise_for_status()
            except httpx.HTTPError as error:
                mend = "start the stack with `titleshot up`, or see `titleshot status`"
                if (name == "MLflow" and self.mlflow_uri) or (name == "Prefect" and self.prefect_api_url):
                    variable = "TITLESHOT_MLFLOW_URI" if name == "MLflow" else "TITLESHOT_PREFECT_API_URL"
                    mend = f"check {variable}"
                raise Mistake(
                    f"{name} does not answer at {address} ({error or type(error).__name__}): {mend}"
                ) from error
        os.environ.update(QUIET)
        os.environ["MLFLOW_TRACKING_URI"] = self.mlflow
        os.environ.pop("MLFLOW_REGISTRY_URI", None)  # the registry is where the tracking is
        os.environ["PREFECT_API_URL"] = self.prefect
        os.environ.setdefault("PREFECT_HOME", str(self.home / "prefect"))
        if "prefect" in sys.modules:
            # It read its settings when it was imported.
            from prefect.context import refresh_global_settings_context

            refresh_global_settings_context()


_REGION: ContextVar[str] = ContextVar("region", default="")


def region() -> str:
    """The region that is meant now; "" where a model is served in one place."""
    return _REGION.get() or os.environ.get("TITLESHOT_REGION", "")


@contextmanager
def within(name: str) -> Iterator[None]:
    """In the block `load` speaks of this region: its cluster, and the aliases champion-<name> and previous-<name>."""
    token = _REGION.set(name)
    try:
        yield
    finally:
        _REGION.reset(token)


def mean(name: str) -> None:
    """From here on `load` speaks of this region, as within the block of `within`, until this context ends."""
    _REGION.set(name)


def load() -> Settings:
    """The settings in force, the home made absolute. Raises `Mistake` for an unusable variable."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"TITLESHOT_{str(first['loc'][0]).upper()}"
        raise Mistake(f"{name}={first['input']!r}: {first['msg']}", code=2) from error
    here = {"region": region() or None, "home": settings.home.expanduser().resolve()}
    return settings.model_copy(update=here)


def writable(home: Path) -> None:
    """Make the home directory. Raises `Mistake` where it cannot be written."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try at the same moment
    except OSError as error:
        raise Mistake(
            f"the home directory {home} cannot be written ({error.strerror}): "
            "make it writable, or name another one in TITLESHOT_HOME"
        ) from error

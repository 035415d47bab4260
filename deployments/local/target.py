"""The local serving target: one server process per version, Envoy in front, all of it on this machine."""

import contextlib
import dataclasses
import functools
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from deployments import runtimes
from deployments.artifact import digest
from deployments.exclusive import locked
from deployments.local import envoy
from deployments.local.gateway import Gateway
from deployments.local.preview import Picture, differences
from deployments.local.state import Deployed, State
from deployments.local.supervisor import Program, Status, Supervisor, wait_for
from deployments.target import (
    Answer,
    Change,
    Endpoint,
    Entry,
    Fence,
    Holder,
    NeverReady,
    Served,
    TargetError,
    TargetUnavailable,
    Traffic,
    Unit,
    Version,
    answer_of,
)

_HERE = Path(__file__).resolve().parent
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Options:
    """How the local target behaves; times in seconds.

    `gateway_ports` fixes the port of a model's gateway when it is first deployed; otherwise a free one of
    `ports` is taken, and kept for ever. `gateways` processes share it, so that one may die. `concurrency` and `queue`
    are those of each model server.
    """

    gateway_ports: Mapping[str, int] = field(default_factory=dict)
    ports: range = range(18_000, 28_000)
    limits: envoy.Limits = field(default_factory=envoy.Limits)
    gateways: int = 2
    gateway_workers: int = 1
    concurrency: int = 2
    queue: int = 256
    keep: int = 5000
    lease_ttl: float = 60.0
    ready_timeout: float = 120.0
    health_timeout: float = 10.0
    drain_timeout: float = 30.0
    environment: Mapping[str, str] = field(default_factory=dict)


class LocalTarget:
    """A `ServingTarget` in the directory `home`: `state.db`, `run/` and `logs/` below it.

    Safe to construct anywhere and any number of times: it holds nothing but paths. `start` brings up the
    gateway and whatever was deployed before, `stop` takes all of it down.
    """

    def __init__(self, home: Path, options: Options | None = None) -> None:
        self.home = home.resolve()
        self.options = options or Options()
        self.supervisor = Supervisor(self.home)
        self._gateway = Gateway(
            self.supervisor, self.options.gateway_workers, count=self.options.gateways, limits=self.options.limits
        )
        self._state = State(self.home / "state.db", self.options.lease_ttl)

    @functools.cached_property
    def _http(self) -> httpx.Client:
        # A client of its own for each question costs 25 ms of CPU, and a server that starts is asked many times.
        return httpx.Client(timeout=5, trust_env=False)

    # --- the stack

    def start(self, timeout: float = 180.0) -> None:
        """Bring up supervisord, the gateway and every version that was deployed; return when all of them are
        healthy. Raises `TargetError` where a recorded port belongs to another program by now.
        """
        if not self.supervisor.up():
            with self._locked():
                if not self._take_over(timeout):
                    self._end_orphans()
                    self._refuse_taken_ports()
                    self._restore()
        self.supervisor.start()
        self.start_gateway()
        wait_for(self.ready, timeout, f"not everything is ready: see {self.supervisor.logs}", every=0.2)

    def stop(self) -> None:
        """Drain the gateway and stop all that supervisord runs; `start` brings it back."""
        if self.supervisor.up():
            self._gateway.drain()
            self.supervisor.stop()

    def start_gateway(self) -> None:
        """Start the gateway under the supervisor, which must be up; return when it is live."""
        self._gateway.start()

    def restart_gateway(self) -> None:
        """Start the gateway's processes anew, one after the other: with two of them no request is lost."""
        with self._locked():
            self._gateway.restart(self.options.drain_timeout)

    def ready(self) -> bool:
        """Whether the gateway is live and every deployed version healthy."""
        names = [envoy.cluster_name(one.model, one.version) for one in self._state.endpoints() if one.ready]
        try:
            return self._gateway.up() and not self._gateway.sick(names)
        except TargetUnavailable:
            return False

    def up(self) -> bool:
        """Whether supervisord, and with it the gateway, runs."""
        return self.supervisor.up()

    def models(self) -> tuple[str, ...]:
        """The models that have a gateway."""
        return tuple(self._state.gateways())

    def orphans(self, *, mend: bool = False) -> list[str]:
        """What nothing refers to any more, in words: servers without a record, records of servers that never worked and
        whose promotion is gone, files of gateways that are no more. With `mend` all of it is cleaned away.
        """
        with self._locked():
            known = {_name(one): one for one in self._state.endpoints()}
            servers = [name for name in self.supervisor.names() if name.startswith("model-")]
            found = [(f"the server {name} has no record", name) for name in servers if name not in known]
            for name, one in known.items():
                holder = self._state.holder(one.model)
                if not one.ready and (holder is None or not holder.left):
                    found.append((f"{one.model} {one.version} was never ready, and nobody deploys it any more", name))
            routes = [path for path in (self.supervisor.run / "xds").glob("rds.*") if path.is_dir()]
            stale = [path for path in routes if path.name.removeprefix("rds.") not in self._state.gateways()]
            if mend:
                for _, name in found:
                    self.supervisor.remove(name)
                    if name in known:
                        self._state.forget(known[name].model, known[name].version)
                for path in stale:
                    shutil.rmtree(path)
            return [*(words for words, _ in found), *(f"{path} belongs to no gateway" for path in stale)]

    def _take_over(self, timeout: float) -> bool:
        """Replace, one by one and while they serve, what a killed supervisord left behind: servers by new ones at
        other ports, then the gateway's processes. False where not all of it serves, or only one gateway does: then
        there is nothing to lose by a fresh start, or no way around a loss.
        """
        left = {one: self._identity(one) for one in self._state.endpoints()}
        if self.options.gateways < 2 or not self._gateway.up() or not all(who.get("ready") for who in left.values()):
            return False
        self._gateway.leave_out()
        fresh = []
        for one in left:
            moved = dataclasses.replace(one, port=self._free_port())
            self.supervisor.prepare(self._program(moved))
            self._state.save(moved)
            fresh.append(moved)
        self.supervisor.start()
        wait_for(
            lambda: all(self._identity(one).get("ready") for one in fresh),
            timeout,
            f"not every server is ready: see {self.supervisor.logs}",
            every=0.2,
        )
        there, resources = self._gateway.resources("cds"), []
        for model in self._state.gateways():
            chains = envoy.chains_in(model, there)
            resources += envoy.clusters(model, self._backends(model), self.options.limits, chains)
        self._gateway.publish("cds", "", self._state.next_number(), resources, contextlib.nullcontext())
        wait_for(self.ready, timeout, "the gateway does not find the new servers healthy", every=0.2)
        for who in left.values():
            os.kill(int(str(who["pid"])), signal.SIGTERM)
        wait_for(lambda: all(_free(one.port) for one in left), 40.0, "some servers that were left behind do not end")
        self._gateway.restart(self.options.drain_timeout)
        return True

    def _end_orphans(self) -> None:
        """Servers and gateway of a supervisord that was killed: still there, but nobody looks after them."""
        self._gateway.quit()
        ended = []
        for one in self._state.endpoints():
            with contextlib.suppress(TargetUnavailable):
                if pid := self._identity(one).get("pid"):
                    os.kill(int(str(pid)), signal.SIGTERM)
                    ended.append(one.port)
        wait_for(lambda: all(map(_free, ended)), 40.0, f"of the ports {ended} some are still taken")

    def _restore(self) -> None:
        """Write what is recorded into the files of a gateway and a supervisord that are not running: they may
        be gone, or of an older make.
        """
        limits, state = self.options.limits, self._state
        self._gateway.forget_counts()
        for one in state.endpoints():
            self.supervisor.prepare(self._program(one))
        gateways, clusters = state.gateways(), []
        for model in gateways:
            number, backends, traffic = state.next_number(), self._backends(model), state.traffic(model)
            made = envoy.clusters(model, backends, limits, envoy.chains(traffic) if traffic else ())
            routes = self._routes(model, number, backends, traffic)
            self._gateway.validate(envoy.static(model, routes, made, limits))
            self._gateway.write("rds", model, number, [routes])
            clusters += made
        listeners = [self._listener(model, port) for model, port in gateways.items()]
        self._gateway.write("cds", "", state.next_number(), clusters)
        self._gateway.write("lds", "", state.next_number(), listeners)

    # --- the verbs

    def lease(self, model: str, holder: str, *, take: bool = False) -> Fence:
        """Take the lease of `model`, or renew one's own. Raises `LeaseHeld`, unless it is to be taken."""
        _refuse_name("model", model)
        return self._state.lease(model, holder, take=take)

    def renew(self, fence: Fence) -> float:
        """Make the lease last again, for as many seconds as are returned."""
        self._state.check(fence.model, fence)
        return self.options.lease_ttl

    def holder(self, model: str) -> Holder | None:
        """Who holds the lease of `model`, or did until it lapsed; None where it was given back."""
        return self._state.holder(model)

    def release(self, fence: Fence) -> None:
        """Give the lease back; a stale fence is no error."""
        self._state.release(fence)

    def guard(self, fence: Fence) -> AbstractContextManager[None]:
        """Hold off every later holder of the lease while the block runs."""
        return self._state.guard(fence)

    def write(self, entry: Entry, fence: Fence) -> None:
        """Append to the journal; it is on the disk once this returns."""
        self._state.write(entry, fence)

    def journal(self, model: str) -> tuple[Entry, ...]:
        """The journal of `model`, oldest line first."""
        return self._state.journal(model)

    def keep(self, model: str, warm: int, fence: Fence) -> None:
        """Record how many versions of `model` stay loaded."""
        self._state.keep(model, warm, fence)

    def kept(self, model: str) -> int:
        """How many versions of `model` stay loaded, whatever serves."""
        return self._state.kept(model)

    def deploy(self, version: Version, fence: Fence) -> Endpoint:
        """Start the version's server and wait until it is warm, healthy in the gateway and reachable at
        its own path. The lease is renewed while it takes. Raises `NeverReady` with the server's last lines.
        """
        _refuse_name("model", version.model)
        _refuse_name("version", version.number)
        self._state.check(version.model, fence)
        self._refuse_artifact(version)
        known = self._recorded(version)
        if known is None:
            python = self._python(version, fence)
            with self._locked():
                self._state.check(version.model, fence)
                known = self._record(version, python)
        try:
            # What serves is never restarted by this, were it described differently by now.
            if not (known.ready and self._status(known).running):
                self.supervisor.add(self._program(known))
            self._await_ready(known, fence)
            with self._locked():
                self._admit(known, fence)
        except BaseException:
            if not known.ready:
                # What never worked is not left behind: neither a server nor its clusters.
                self._state.forget(known.model, known.version)
                self.supervisor.remove(_name(known))
            raise
        return self._endpoint(known)

    def route(self, traffic: Traffic, fence: Fence) -> None:
        """Make the gateway obey `traffic`; return when new connections are answered by it."""
        self._state.check(traffic.model, fence)
        if faults := envoy.faults(traffic.shape):
            raise TargetError(f"{traffic.model} cannot be routed: {'; '.join(faults)}")
        with self._locked():
            self._state.check(traffic.model, fence)
            if self.traffic(traffic.model) == traffic == self._state.traffic(traffic.model):
                return
            self._refuse_unhealthy(traffic)
            try:
                number = self._publish_routes(traffic.model, self._backends(traffic.model), traffic, fence)
            except TargetUnavailable as error:
                # It would bar every way back as well. What it holds is lost to its callers already.
                if hung := self._gateway.end_hung():
                    raise TargetUnavailable(f"{error}; {' and '.join(hung)} hung, was ended and starts anew") from error
                raise
            self._state.save_traffic(traffic, number)

    def traffic(self, model: str) -> Traffic | None:
        """The traffic that the gateway itself says it obeys, all its processes alike; None where nothing was routed."""
        if model not in self._state.gateways():
            return None
        found = self._gateway.route(model)
        if found is None:
            raise TargetUnavailable(f"the gateway has no routes for {model} yet")
        try:
            return envoy.traffic_of(dict(found[1]))
        except (ValueError, KeyError, TypeError) as error:
            raise TargetError(f"the gateway's routes for {model} are not ours: {error}") from error

    def observe(self, model: str) -> Mapping[str, Served]:
        """Attempts per version since the gateway started: "3" live, "3-shadow" mirrored, "3-pinned" on the
        version's own path, "3-header" by a pin, "" shed by the gateway. Latencies lag behind the counts by
        up to a second.
        """
        return envoy.served(model, self._gateway.samples())

    def answers(self, model: str, version: str, after: int = -1) -> Iterator[Answer]:
        """The answers that the version's server still holds, from `after` on, oldest first. Numbers begin
        anew when the server restarts.
        """
        endpoint = self._deployed(model, version)
        with httpx.Client(base_url=_direct(endpoint), timeout=30, trust_env=False) as client:
            while True:
                query = {"after": after, "limit": _PAGE}
                try:
                    page = client.get("/titleshot/answers", params=query).raise_for_status().text
                except httpx.HTTPError as error:
                    raise TargetUnavailable(f"the server of {model} {version}: {error}") from error
                answers = [answer_of(line) for line in page.splitlines()]
                yield from answers
                if len(answers) < _PAGE:
                    return
                after = answers[-1].number

    def retire(self, model: str, version: str, fence: Fence) -> None:
        """Take the version's path away, wait until its requests have ended, then stop its server. Raises
        `TargetError` while it has traffic.
        """
        self._state.check(model, fence)
        known = next((one for one in self._state.endpoints(model) if one.version == version), None)
        if known is None:
            return
        with self._locked():
            self._state.check(model, fence)
            if known.ready:
                self._dismiss(known, fence)
            self.supervisor.remove(_name(known))
            self._state.forget(model, version)

    def gateway(self, model: str) -> str:
        """The address that clients use, such as "http://127.0.0.1:18000"."""
        port = self._state.gateways().get(model)
        if port is None:
            raise TargetError(f"{model} has no gateway yet: deploy a version of it first")
        return f"http://127.0.0.1:{port}"

    def deployed(self, model: str) -> Mapping[str, Endpoint]:
        """The deployed versions, by number."""
        return {one.version: self._endpoint(one) for one in self._state.endpoints(model) if one.ready}

    def units(self, model: str) -> Mapping[str, Sequence[Unit]]:
        """The one server of every deployed version."""
        programs = self.supervisor.status()
        found = {one.version: programs.get(_name(one)) for one in self._state.endpoints(model) if one.ready}
        return {version: [Unit(one.name, one.state, one.pid)] for version, one in found.items() if one is not None}

    def cannot(self, traffic: Traffic) -> tuple[str, ...]:
        """What no gateway here obeys: headers that a client cannot send."""
        return tuple(envoy.faults(traffic.shape))

    def changes(self, version: Version, traffics: Sequence[Traffic]) -> tuple[tuple[Change, ...], ...]:
        """What a deploy and the routes after it would change: programs, and the gateway's resources. From what is
        recorded, so it needs neither gateway nor lease.
        """
        model, gateways = version.model, self._state.gateways()
        self._refuse_artifact(version)
        known = self._recorded(version) or self._fresh(version, sys.executable)
        now = Picture(model, gateways.get(model), self._backends(model), {}, self._state.traffic(model))
        there = {one.version for one in now.backends}
        backends = now.backends if known.version in there else [*now.backends, _backend(known)]
        port = now.port or self.options.gateway_ports.get(model) or self._free_port({known.port})
        programs = {} if known.ready else {_name(known): self._program(known)}
        pictures = [now, dataclasses.replace(now, port=port, backends=backends, programs=programs)]
        pictures += [dataclasses.replace(pictures[1], traffic=traffic) for traffic in traffics]
        return tuple(differences(*pair, self.options.limits) for pair in itertools.pairwise(pictures))

    # --- deploying

    def _refuse_artifact(self, version: Version) -> None:
        try:
            runtimes.runtime((version.path / "MLmodel").read_text())
            found = digest(version.path)
        except (OSError, ValueError) as error:
            raise TargetError(f"{version.model} {version.number} at {version.path}: {error}") from error
        if found != version.digest:
            raise TargetError(
                f"{version.model} {version.number} is not what was admitted: its digest is {found}, "
                f"admitted was {version.digest}"
            )

    def _recorded(self, version: Version) -> Deployed | None:
        for one in self._state.endpoints(version.model):
            if one.version == version.number:
                if one.digest != version.digest:
                    raise TargetError(
                        f"{version.model} {version.number} is deployed already, with the digest {one.digest}"
                    )
                return one
        return None

    def _record(self, version: Version, python: str) -> Deployed:
        fresh = self._fresh(version, python)
        self._state.save(fresh)
        self.supervisor.log(_name(fresh)).unlink(missing_ok=True)
        return fresh

    def _fresh(self, version: Version, python: str) -> Deployed:
        path = str(version.path.resolve())
        return Deployed(version.model, version.number, self._free_port(), path, version.digest, python, ready=False)

    def _program(self, known: Deployed) -> Program:
        options = self.options
        command: Sequence[object] = (
            *(known.python, _HERE / "server.py", "--model", known.model, "--version", known.version),
            *("--path", known.path, "--digest", known.digest, "--port", known.port),
            *("--concurrency", options.concurrency, "--queue", options.queue, "--keep", options.keep),
            *("--max-body", options.limits.body_bytes),
        )
        environment = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
            # One-row predictions: more threads per server only get in each other's way.
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            **options.environment,
        }
        return Program(_name(known), [str(part) for part in command], environment)

    def _await_ready(self, known: Deployed, fence: Fence) -> None:
        first, renewed = 0, time.monotonic()
        end = renewed + self.options.ready_timeout
        while True:
            status = self._status(known)
            first = first or status.pid
            # supervisord restarts what dies: another process, or none, means that the first one did.
            if status.state in {"FATAL", "EXITED", "BACKOFF", "GONE"} or status.pid not in {0, first}:
                self._never_ready(known, f"its server ended before it was ready ({status.state.lower()})")
            if status.running and self._identity(known).get("ready"):
                return
            if time.monotonic() > end:
                self._never_ready(known, f"not ready after {self.options.ready_timeout:g} s")
            if time.monotonic() - renewed > self.options.lease_ttl / 4:
                self._state.check(known.model, fence)
                renewed = time.monotonic()
            time.sleep(0.1)

    def _never_ready(self, known: Deployed, why: str) -> None:
        log = self.supervisor.tail(_name(known))
        message = f"{known.model} {known.version}: {why}"
        if "address already in use" in log:
            raise TargetUnavailable(f"{message}: port {known.port} is taken by another program")
        if known.ready:
            raise TargetUnavailable(f"{message}; it was once: it is being restarted")
        raise NeverReady(message, log)

    def _status(self, known: Deployed) -> Status:
        name = _name(known)
        return self.supervisor.status().get(name, Status(name, "GONE", 0, "it is not supervised"))

    def _identity(self, known: Deployed) -> Mapping[str, object]:
        """What the server says about itself; nothing where it does not answer yet."""
        try:
            page = self._http.get(f"{_direct(known)}/titleshot/identity").json()
        except httpx.TransportError:
            return {}
        except (httpx.HTTPError, ValueError):
            page = {}
        who = {name: page.get(name) for name in ("model", "version", "digest")}
        if who != {"model": known.model, "version": known.version, "digest": known.digest}:
            raise TargetUnavailable(f"port {known.port} is answered by another program: {who}")
        return dict(page)

    def _python(self, version: Version, fence: Fence) -> str:
        if version.env_manager == "local":
            return sys.executable
        command = [sys.executable, str(_HERE / "environment.py"), str(version.path), version.env_manager]
        # `uv` may be installed beside our Python only.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "PATH": path}
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
            while True:
                try:
                    out, log = process.communicate(timeout=self.options.lease_ttl / 4)
                    break
                except subprocess.TimeoutExpired:
                    try:
                        self._state.check(version.model, fence)
                    except TargetError:
                        process.kill()
                        raise
        if process.returncode or not out.strip():
            # No network, no such manager, a requirement that is gone: not necessarily the version's fault.
            last = (log.strip().splitlines() or ["it said nothing"])[-1]
            raise TargetError(f"{version.model} {version.number}: its environment cannot be made: {last}")
        return out.strip().splitlines()[-1]

    def _admit(self, known: Deployed, fence: Fence) -> None:
        """Clusters first, then the routes to them; then it counts as deployed."""
        model = known.model
        backends = [one for one in self._backends(model) if one.version != known.version] + [_backend(known)]
        if not known.ready:
            self._publish_clusters(model, backends, fence)
        name = envoy.cluster_name(model, known.version)
        wait_for(
            lambda: not self._gateway.sick([name]),
            self.options.health_timeout,
            f"the gateway does not find {model} {known.version} healthy",
        )
        if known.ready:
            return
        if model in self._state.gateways():
            self._publish_routes(model, backends, self.traffic(model), fence)
        else:
            self._open(model, backends, fence)
        self._state.save(dataclasses.replace(known, ready=True))

    def _open(self, model: str, backends: Sequence[envoy.Backend], fence: Fence) -> None:
        """Give `model` its gateway: a listener that answers 503 until something is routed."""
        port = self.options.gateway_ports.get(model) or self._free_port()
        _refuse_taken(port, f"the gateway of {model}")
        number = self._state.next_number()
        self._gateway.write("rds", model, number, [self._routes(model, number, backends, None)])
        ports = {**self._state.gateways(), model: port}
        listeners = [self._listener(name, at) for name, at in ports.items()]
        self._gateway.publish("lds", "", self._state.next_number(), listeners, self._state.fenced(model, fence))
        wait_for(
            lambda: self._gateway.answering(port) == number,
            self.options.health_timeout,
            f"port {port} is not answered by number {number}",
        )
        self._state.save_gateway(model, port)

    # --- publishing (under the lock)

    def _publish_clusters(
        self, model: str, backends: Sequence[envoy.Backend], fence: Fence, wanted: Iterable[envoy.Chain] = ()
    ) -> None:
        """The clusters of all models, with those that `wanted`, the traffic in force and requests under way need."""
        limits, there = self.options.limits, self._gateway.resources("cds")
        more = {*wanted, *self._chains(model)}
        more |= {
            chain
            for chain in envoy.chains_in(model, there)
            if len(chain) > 2 and self._gateway.active([envoy.cluster_name(model, *chain)])
        }
        resources = envoy.clusters(model, backends, limits, more)
        for other in sorted({one.model for one in self._state.endpoints() if one.ready and one.model != model}):
            resources += envoy.clusters(other, self._backends(other), limits, envoy.chains_in(other, there))
        self._gateway.publish("cds", "", self._state.next_number(), resources, self._state.fenced(model, fence))

    def _publish_routes(
        self, model: str, backends: Sequence[envoy.Backend], traffic: Traffic | None, fence: Fence
    ) -> int:
        number, limits = self._state.next_number(), self.options.limits
        wanted = envoy.chains(traffic) if traffic else frozenset()
        route = self._routes(model, number, backends, traffic)
        clusters = envoy.clusters(model, backends, limits, wanted)
        # The number is the only other thing that changes each time.
        skeleton = envoy.skeleton(model, self._routes(model, 0, backends, traffic), clusters, limits)
        self._gateway.validate(envoy.static(model, route, clusters, limits), skeleton)
        names = {envoy.cluster_name(model, *chain) for chain in wanted}
        if names - {str(one["name"]) for one in self._gateway.resources("cds")}:
            self._publish_clusters(model, backends, fence, wanted)
        # Nor does a route go to a cluster that is taken and still warming [9].
        wait_for(
            lambda: not any("warming" in why for why in self._gateway.sick(names).values()),
            self.options.health_timeout,
            f"the gateway has not all of {', '.join(sorted(names))}",
        )
        port = self._state.gateways()[model]
        self._gateway.publish("rds", model, number, [route], self._state.fenced(model, fence), port)
        return number

    def _chains(self, model: str) -> set[envoy.Chain]:
        """The chains of the traffic in force: as recorded, and as the gateway has it."""
        found = self._state.traffic(model)
        chains = {*envoy.chains(found)} if found else set[envoy.Chain]()
        with contextlib.suppress(TargetError):
            if found := self.traffic(model):
                chains |= envoy.chains(found)
        return chains

    def _routes(
        self, model: str, number: int, backends: Sequence[envoy.Backend], traffic: Traffic | None
    ) -> envoy.Json:
        versions = [one.version for one in backends]
        return envoy.routes(model, number, versions, traffic, self.options.limits)

    def _listener(self, model: str, port: int) -> envoy.Json:
        return envoy.listener(model, port, str(self._gateway.path("rds", model)), self.options.limits)

    def _backends(self, model: str) -> list[envoy.Backend]:
        return [_backend(one) for one in self._state.endpoints(model) if one.ready]

    def _refuse_unhealthy(self, traffic: Traffic) -> None:
        model, there = traffic.model, self.deployed(traffic.model)
        if missing := sorted(traffic.live - set(there)):
            raise TargetError(f"{model} {', '.join(missing)} is not deployed: no traffic can go there")
        names = {envoy.cluster_name(model, version): version for version in traffic.live}
        # Who failed too often of late gets no new share. A champion does: the way back is never barred by that.
        picky = [envoy.cluster_name(model, str(traffic.challenger))] if traffic.weight else []

        def dead() -> dict[str, str]:
            return {
                envoy.cluster_name(model, one.version): "its server does not answer"
                for one in self._state.endpoints(model)
                if one.version in traffic.live and not self._identity(one).get("ready")
            }

        def sick() -> dict[str, str]:
            # The gateway needs some seconds to see that a server has died: so it is asked as well.
            return dead() | self._gateway.sick(names) | self._gateway.sick(picky, ejected=True)

        def barred() -> dict[str, str]:
            found = {names[name]: why for name, why in sick().items()}
            wanted = {pin.version for pin in traffic.shape.pins}
            if traffic.weight or traffic.mirror:
                wanted.add(str(traffic.challenger))
            # The way back is not barred by a champion that the gateway finds busy, or that is down for a moment: only
            # where nobody in its chain answers.
            known = now is not None and traffic.champion in {now.champion, now.fallback}
            if not known or all(envoy.cluster_name(model, one) in dead() for one in traffic.chain(traffic.champion)):
                wanted.add(traffic.champion)
            return {version: why for version, why in found.items() if version in wanted}

        now = self._state.traffic(model)
        with contextlib.suppress(TargetUnavailable):
            # A moment of grace: the gateway may have begun to look only now.
            wait_for(lambda: not barred(), self.options.health_timeout / 2, "sick")
        if found := barred():
            said = "; ".join(f"{version}: {why}" for version, why in found.items())
            raise TargetError(f"{model} has versions that are not healthy, no traffic moves ({said})")

    # --- retiring (under the lock)

    def _dismiss(self, known: Deployed, fence: Fence) -> None:
        model, version, traffic = known.model, known.version, self.traffic(known.model)
        if traffic is not None and version in traffic.live:
            raise TargetError(f"{model} {version} has traffic: route it away first")
        if traffic is not None and traffic.challenger == version:
            traffic = dataclasses.replace(traffic, challenger=None)
        # From here on it is deployed no more: cut anywhere, a retire goes on and a deploy begins anew.
        self._state.save(dataclasses.replace(known, ready=False))
        rest = self._backends(model)
        number = self._publish_routes(model, rest, traffic, fence)
        if traffic is not None:
            self._state.save_traffic(traffic, number)
        more = envoy.chains_in(model, self._gateway.resources("cds"))
        names = envoy.involving(model, version, [one.version for one in rest], more)
        with contextlib.suppress(TargetUnavailable):
            # Whoever is not done by then has the server's own grace after SIGTERM.
            wait_for(lambda: not self._gateway.active(names), self.options.drain_timeout, "busy")
        self._publish_clusters(model, rest, fence)

    # --- details

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """One writer of the gateway's files at a time, whatever the model."""
        path = self.supervisor.run / "gateway.lock"
        return locked(path, 60, f"somebody else has been changing the gateway for 60 s: {path} is locked")

    def _deployed(self, model: str, version: str) -> Deployed:
        for one in self._state.endpoints(model):
            if one.version == version and one.ready:
                return one
        raise TargetError(f"{model} {version} is not deployed")

    def _endpoint(self, one: Deployed) -> Endpoint:
        url = f"{self.gateway(one.model)}/v/{one.version}"
        return Endpoint(one.model, one.version, url, _direct(one))

    def _free_port(self, besides: Collection[int] = ()) -> int:
        # Below the kernel's own range, where a client's connection could sit on it after a restart. Each home
        # begins elsewhere, so that two of them seldom want the same one at the same time.
        ports, taken = self.options.ports, {*self._state.ports(), *besides}
        start = zlib.crc32(bytes(self.home)) % len(ports)
        for place in range(len(ports)):
            port = ports[(start + place) % len(ports)]
            if port not in taken and _free(port):
                return port
        raise TargetError(f"no port between {ports[0]} and {ports[-1]} is free")

    def _refuse_taken_ports(self) -> None:
        for model, port in self._state.gateways().items():
            _refuse_taken(port, f"the gateway of {model}")
        for one in self._state.endpoints():
            _refuse_taken(one.port, f"the server of {one.model} {one.version}")


def _name(one: Deployed) -> str:
    return f"model-{one.model}-{one.version}"


def _backend(one: Deployed) -> envoy.Backend:
    return envoy.Backend(one.version, one.port)


def _direct(one: Deployed) -> str:
    return f"http://127.0.0.1:{one.port}"


def _free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _refuse_taken(port: int, what: str) -> None:
    if not _free(port):
        raise TargetError(f"port {port} belongs to {what}, but another program listens on it: stop that one")


def _refuse_name(what: str, name: str) -> None:
    if not envoy.valid_name(name):
        raise TargetError(f"{name!r} cannot name a {what} here: letters, digits, '_', '-' and '.' only")

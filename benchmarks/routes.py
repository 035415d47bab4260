"""How fast and how safely live traffic moves from one version to another: Titleshot, an nginx reload, HAProxy's runtime
API, in front of the same two model servers and under the same load, one after the other in one run.

    python -m benchmarks.routes [--changes 200] [--clients 8] [--ways titleshot,nginx,haproxy]

Each change sends all requests to the other version. The load is that of the prober of `tests/chaos`: clients that
ask as soon as they are answered, and at a steady rate requests on kept connections, on new ones, and streams.
Prints for each way, in ms (p50, p95, worst): how long the command takes, how long it is until the first answer of the
new version, and until the last answer of the old one; and how many requests failed, and how.

`returned early` counts changes whose command had returned while the old version still answered requests that were sent
later. A proxy that is not installed is left out and named.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.server import free_port
from deployments.artifact import digest
from deployments.local.supervisor import wait_for
from deployments.local.target import LocalTarget
from deployments.target import Traffic, Version
from tests.chaos.models import make_model
from tests.chaos.prober import Prober, Record

MODEL = "bench"
VERSIONS = ("1", "2")
NGINX = """\
daemon on;
worker_processes 1;
pid {home}/nginx.pid;
error_log {home}/nginx.log error;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/f;
  uwsgi_temp_path {home}/u;
  scgi_temp_path {home}/s;
  upstream model {{ server 127.0.0.1:{server}; keepalive 32; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://model;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      add_header x-model-version {version} always;
    }}
  }}
}}
"""
HAPROXY = """\
global
  stats socket {home}/haproxy.sock mode 600 level admin
  nbthread 1
defaults
  mode http
  option redispatch
  retries 3
  timeout connect 1s
  timeout client 60s
  timeout server 60s
frontend gateway
  bind 127.0.0.1:{port}
  default_backend model
backend model
  balance roundrobin
  http-response set-header x-model-version %s
{servers}
"""


@dataclass(frozen=True)
class Way:
    """One way of moving traffic: the address that clients use, and what sends all of it to a version."""

    name: str
    url: str
    move: Callable[[str], None]


@dataclass(frozen=True)
class Change:
    """One change: when the command was given and when it returned."""

    to: str
    begin: float
    end: float


@contextlib.contextmanager
def served(home: Path) -> Iterator[tuple[LocalTarget, Way]]:
    """Both versions, and our own way to them."""
    target = LocalTarget(home / "t")
    try:
        target.start()
        fence = target.lease(MODEL, "benchmark")
        for number in VERSIONS:
            model = make_model(home / number, number)
            target.deploy(Version(MODEL, number, model, digest(model)), fence)

        def move(version: str) -> None:
            target.route(Traffic(MODEL, version), target.lease(MODEL, "benchmark"))

        move("1")
        yield target, Way("Titleshot", target.gateway(MODEL), move)
    finally:
        target.stop()


@contextlib.contextmanager
def nginx(home: Path, servers: dict[str, str]) -> Iterator[Way]:
    """A new configuration and a reload, as its documentation has it."""
    port, config = free_port(), home / "nginx.conf"
    command = ["nginx", "-p", str(home), "-c", str(config), "-e", str(home / "nginx.log")]

    def write(version: str) -> None:
        server = servers[version].rpartition(":")[2]
        config.write_text(NGINX.format(home=home, server=server, port=port, version=version))

    def move(version: str) -> None:
        write(version)
        subprocess.run([*command, "-s", "reload"], check=True)

    write("1")
    subprocess.run(command, check=True)
    pid = home / "nginx.pid"
    wait_for(pid.exists, 10, "nginx does not start")
    try:
        yield Way("nginx reload", f"http://127.0.0.1:{port}", move)
    finally:
        master = int(pid.read_text())
        os.kill(master, signal.SIGTERM)
        wait_for(lambda: not pid.exists(), 30, "nginx does not end")


@contextlib.contextmanager
def haproxy(home: Path, servers: dict[str, str]) -> Iterator[Way]:
    """Weights set through the runtime API."""
    port, config, sock = free_port(), home / "haproxy.cfg", home / "haproxy.sock"
    lines = [
        f"  server {number} {url.removeprefix('http://')} weight {100 if number == '1' else 0}"
        for number, url in servers.items()
    ]
    config.write_text(HAPROXY.format(home=home, port=port, servers="\n".join(lines)))

    def move(version: str) -> None:
        (other,) = set(VERSIONS) - {version}
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(sock))
            admin.sendall(f"set weight model/{version} 100; set weight model/{other} 0\n".encode())
            said = b"".join(iter(lambda: admin.recv(4096), b"")).strip()
        if said:
            raise RuntimeError(f"haproxy says: {said.decode()}")

    with subprocess.Popen(["haproxy", "-f", str(config), "-db"], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(sock.exists, 10, "haproxy does not start")
            yield Way("HAProxy API", f"http://127.0.0.1:{port}", move)
        finally:
            process.terminate()


def run(way: Way, count: int, clients: int) -> tuple[Sequence[Record], list[Change], Counter[str]]:
    """Move traffic `count` times under load: what was asked, what was changed, and what failed."""
    changes: list[Change] = []
    with Prober(way.url, allowed=VERSIONS, flood=clients, kept=20, fresh=20, stream=10, seconds=7200) as prober:
        for number in range(count):
            to = VERSIONS[(number + 1) % 2]
            begin = time.monotonic()
            way.move(to)
            changes.append(Change(to, begin, time.monotonic()))
            # Whoever changes again before this change is in effect does not measure it.
            prober.wait(lambda records, to=to: _answers(records, to), f"{way.name} does not obey", 60)  # type: ignore[misc]
    result = prober.result
    for line in result.unsaid:
        print(f"{way.name}: {line}")
    for failure in result.failures[:3]:
        print(f"  {way.name}: {failure}")
    return result.records, changes, Counter(failure.why.partition(":")[0] for failure in result.failures)


def _answers(records: list[Record], version: str) -> bool:
    """Whether the last answers are all of `version`."""
    last = [one.version for one in records[-100:] if not one.wrong][-20:]
    return set(last) == {version}


def effects(records: Sequence[Record], changes: Sequence[Change]) -> tuple[list[float], list[float], int]:
    """Seconds from each command to the first answer of the new version and to the last one of the old; how often
    the old one answered a request that was sent after the command had returned.
    """
    ends = sorted((one.end, one.start, one.version) for one in records if not one.wrong)
    times = [end for end, *_ in ends]
    bounds = [change.begin for change in changes[1:]] + [times[-1]]
    first, last, early = [], [], 0
    for change, until in zip(changes, bounds, strict=True):
        window = ends[bisect_left(times, change.begin) : bisect_right(times, until)]
        new = [end for end, _, version in window if version == change.to]
        # Answers that began before the command are the old version's by right.
        old = [(end, start) for end, start, version in window if version != change.to and start >= change.begin]
        if new:
            first.append(new[0] - change.begin)
        last.append(max((end for end, _ in old), default=change.begin) - change.begin)
        early += any(start > change.end for _, start in old)
    return first, last, early


def spread(seconds: Sequence[float]) -> str:
    """Median, 95th percentile and the worst in ms."""
    found = sorted(seconds)
    picked = (found[len(found) // 2], found[int(0.95 * len(found))], found[-1])
    return " ".join(f"{one * 1e3:7.1f}" for one in picked)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8, help="that ask as soon as they are answered")
    parser.add_argument("--ways", default="titleshot,nginx,haproxy")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="ts.", dir="/tmp"))
    made = {"nginx": nginx, "haproxy": haproxy}
    rows = []
    try:
        with served(home) as (target, ours):
            servers = {number: one.direct for number, one in target.deployed(MODEL).items()}
            for name in options.ways.split(","):
                if name != "titleshot" and shutil.which(name) is None:
                    print(f"{name} is not installed: left out")
                    continue
                (home / name).mkdir()
                with made[name](home / name, servers) if name in made else contextlib.nullcontext(ours) as way:
                    begin = time.monotonic()
                    records, changes, failed = run(way, options.changes, options.clients)
                    took = time.monotonic() - begin
                calls = [change.end - change.begin for change in changes]
                first, last, early = effects(records, changes)
                why = ", ".join(f"{count} {reason}" for reason, count in failed.most_common())
                rows.append(
                    f"{way.name:<13}{len(changes):>8}{len(records):>10}{len(records) / took:>7.0f}   {spread(calls)}  "
                    f"{spread(first)}  {spread(last)}{early:>9}{failed.total():>8}  {why}"
                )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(f"{'':<38}   {'command returns':<23}  {'first new answer':<23}  {'last old answer':<23} returned")
    three = f"{'p50':>7} {'p95':>7} {'worst':>7}"
    print(f"{'':<13}{'changes':>8}{'requests':>10}{'req/s':>7}   {three}  {three}  {three}{'early':>9}{'failed':>8}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

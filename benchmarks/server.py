"""Our model server against MLflow's own, for the same model, interleaved in one run.

    python -m benchmarks.server [--model DIR] [--seconds 5] [--rounds 3]

Prints requests per second and p50/p99 of both, closed loop with 1 and with 8 connections, and their ratio.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
JSON = {"content-type": "application/json"}


def free_port() -> int:
    """A port that is free now."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def make_model(path: Path) -> Path:
    """A small scikit-learn model with a signature and an input example."""
    import mlflow
    import numpy as np
    import pandas as pd
    from mlflow.models import infer_signature
    from sklearn.linear_model import LogisticRegression

    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(500, 8)), columns=[f"x{i}" for i in range(8)])
    model = LogisticRegression().fit(rows, (rows.x0 + rows.x1 > 0).astype(int))
    mlflow.sklearn.save_model(
        model,
        path,
        signature=infer_signature(rows, model.predict(rows)),
        input_example=rows.head(1),
        pip_requirements=["mlflow", "scikit-learn"],
    )
    return path


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], port: int, ready: str) -> Iterator[int]:
    """Run a server until the block ends; the block begins when `ready` answers 200."""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **quiet, **environment}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as server:
        try:
            while True:
                with contextlib.suppress(OSError, HTTPException):
                    connection = HTTPConnection("127.0.0.1", port, timeout=5)
                    connection.request("GET", ready)
                    if connection.getresponse().status == 200:
                        break
                if server.poll() is not None:
                    raise RuntimeError(f"{command} ended")
                time.sleep(0.1)
            yield server.pid
        finally:
            server.terminate()


def closed_loop(port: int, path: str, body: bytes, connections: int, seconds: float) -> list[float]:
    """The latencies in seconds of as many requests as `connections` clients can do in `seconds`."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port)
        while (start := time.perf_counter()) < end:
            connection.request("POST", path, body, JSON)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}")
            times.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def p50_p99(times: list[float]) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds."""
    return median(times) * 1e3, quantiles(times, n=100)[98] * 1e3


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a downloaded MLflow model; a small one is made otherwise")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from deployments.artifact import digest

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        model = options.model or make_model(Path(scratch) / "model")
        body = (model / "serving_input_example.json").read_bytes()
        ours, theirs = free_port(), free_port()
        server = [sys.executable, str(ROOT / "deployments/local/server.py"), "--model", "m", "--version", "1"]
        server += ["--path", str(model), "--digest", digest(model), "--port", str(ours)]
        app = [sys.executable, "-m", "uvicorn", "--log-level", "warning", "--port", str(theirs)]
        app += ["mlflow.pyfunc.scoring_server.app:app"]
        stack.enter_context(process(server, {}, ours, "/ready"))
        stack.enter_context(process(app, {"__pyfunc_model_path__": str(model)}, theirs, "/ping"))
        print(f"{'connections':>11} {'server':>8} {'requests/s':>11} {'p50 ms':>8} {'p99 ms':>8}")
        for connections in (1, 8):
            times: dict[str, list[float]] = {"MLflow": [], "ours": []}
            for _ in range(options.rounds):
                for name, port in (("MLflow", theirs), ("ours", ours)):
                    times[name] += closed_loop(port, "/invocations", body, connections, options.seconds)
            rows = {}
            for name, found in times.items():
                rows[name] = (len(found) / options.seconds / options.rounds, *p50_p99(found))
                print(f"{connections:>11} {name:>8} {rows[name][0]:>11.0f} {rows[name][1]:>8.2f} {rows[name][2]:>8.2f}")
            ratio = [a / b for a, b in zip(rows["ours"], rows["MLflow"], strict=True)]
            print(f"{connections:>11} {'ratio':>8} {ratio[0]:>10.2f}x {ratio[1]:>7.2f}x {ratio[2]:>7.2f}x")


if __name__ == "__main__":
    main()

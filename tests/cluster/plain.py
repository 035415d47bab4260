"""A stand-in for the model server in an image that has a python3 and nothing else: the contract's tiny models behind its ports.

Standard library only. Run in a pod of a real cluster (`real.py`, TITLESHOT_TEST_PLAIN=1), `artifact.py` and `counting.py` beside it. It answers what the
Kubernetes target and its Gateway ask for: /invocations and /ping by kind of port; on the admin port /ready, /metrics,
/titleshot/answers and /titleshot/identity. It has no limits, no streams, no queue, and passes nothing on.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).parent))
import artifact  # both beside it in the pod
import counting

PORTS = {8080: "live", 8081: "shadow", 8082: "own", 8083: "pinned"}
ADMIN = 8090


class State:
    """What the pod's server knows."""

    def __init__(self, options):
        self.options, self.lock, self.model, self.stopping = options, threading.Lock(), None, False
        self.counts = counting.Counts({"model": options.model, "version": options.version})
        self.flight = 0
        self.answers, self.next = deque(maxlen=5000), 0

    def load(self):
        options = self.options
        found = artifact.digest(Path(options.path))
        if found != options.digest:
            print(f"{options.model} {options.version} is not what was admitted: its digest is {found}", file=sys.stderr)
            os._exit(3)
        (code,) = Path(options.path, "code").glob("*.py")
        space = {}
        try:
            exec(compile(code.read_text(), str(code), "exec"), space)
            self.model = space["_load_pyfunc"](options.path)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def metrics(self):
        with self.lock:
            return self.counts.text({"ready": int(self.model is not None and not self.stopping)}).decode()


def handler(state):
    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def say(self, status, body, kind="application/json"):
            data = body.encode() if isinstance(body, str) else body
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.send_header("x-titleshot-version", state.options.version)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            port, parts = self.server.server_port, urlsplit(self.path)
            if port != ADMIN:
                return self.counted(PORTS[port], lambda: (200 if parts.path == "/ping" else 404, "\n", b""))
            if parts.path == "/metrics":
                return self.say(200, state.metrics(), "text/plain; version=0.0.4")
            if parts.path == "/titleshot/answers":
                query = parse_qs(parts.query)
                after, limit = int(query.get("after", ["-1"])[0]), int(query.get("limit", ["500"])[0])
                with state.lock:
                    found = [one for one in state.answers if one["number"] > after][:limit]
                return self.say(200, "".join(json.dumps(one) + "\n" for one in found), "application/x-ndjson")
            if parts.path in ("/ready", "/ping", "/titleshot/identity"):
                ready = state.model is not None and not state.stopping
                who = {"model": state.options.model, "version": state.options.version, "digest": state.options.digest}
                fine = ready or parts.path != "/ready"
                return self.say(200 if fine else 503, json.dumps({**who, "ready": ready}))
            return self.say(404, "{}")

        def do_POST(self):
            kind = PORTS.get(self.server.server_port, "live")
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("x-titleshot-load") == "1" and kind == "own":
                kind = "load"
            self.counted(kind, lambda: (*self.predict(body), body) if self.path == "/invocations" else (404, "{}", b""))

        def predict(self, body):
            try:
                split = json.loads(body)["dataframe_split"]
                data = {name: [row[at] for row in split["data"]] for at, name in enumerate(split["columns"])}
            except (ValueError, KeyError, TypeError) as error:
                return 400, json.dumps({"message": str(error)})
            try:
                return 200, json.dumps({"predictions": list(state.model.predict(data))})
            except Exception as error:
                return 500, json.dumps({"message": str(error)})

        def counted(self, kind, answer):
            began, at = time.perf_counter(), time.time()
            with state.lock:
                state.flight += 1
                state.counts.begin(kind)
            status, response, request = answer()
            seconds = time.perf_counter() - began
            with state.lock:
                state.flight -= 1
                state.counts.end(kind, status, seconds)
                if request and kind != "load":
                    state.answers.append(
                        {
                            "number": state.next,
                            "request_id": self.headers.get("x-request-id", ""),
                            "shadow": kind == "shadow",
                            "status": status,
                            "request": request.decode(),
                            "response": response,
                            "at": at,
                            "seconds": seconds,
                            "own_path": kind == "own",
                        }
                    )
                    state.next += 1
            self.say(status, response)

        def log_message(self, *args):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size, block_on_close = True, 256, False


def main():
    parser = argparse.ArgumentParser()
    for name in ("model", "version", "path", "digest", "host"):
        parser.add_argument(f"--{name}", required=True)
    state = State(parser.parse_args())
    servers = [Server((state.options.host, port), handler(state)) for port in (*PORTS, ADMIN)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    state.load()
    done.wait()
    state.stopping = True
    end = time.monotonic() + 10
    while state.flight and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)


if __name__ == "__main__":
    main()

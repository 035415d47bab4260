"""A small HTTP server for the cluster's own tests: says who it is, and does on its paths what a test needs.

`/` answers name and request headers as JSON; `/slow?s=1` after a while; `/ready` and `/live` 200, or 503 after `/ready/off` and
`/live/off`; `/crash` ends the process with code 3. On SIGTERM it stops listening, ends what is in flight, and exits 0.
"""

import http.server
import json
import os
import signal
import sys
import threading
import time
import urllib.parse

OFF = set()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        url = urllib.parse.urlsplit(self.path)
        what, _, switch = url.path.strip("/").partition("/")
        if switch == "off":
            OFF.add(what)
        if what == "crash":
            os._exit(3)
        if what == "slow":
            time.sleep(float(urllib.parse.parse_qs(url.query)["s"][0]))
        told = {
            "name": sys.argv[1],
            "pod": os.environ.get("POD", ""),
            "port": self.server.server_port,
            "path": self.path,
        }
        body = json.dumps({**told, "headers": {k.lower(): v for k, v in self.headers.items()}}).encode()
        self.send_response(503 if what in OFF and not switch else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, text, *args):
        print(text % args, flush=True)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128


def main():
    servers = [Server((sys.argv[2], int(port)), Handler) for port in sys.argv[3:]]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    print("started", sys.argv[1:], flush=True)
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    end.wait()
    print("stopping", flush=True)
    for server in servers:
        server.shutdown()
    # Answers in flight end; kept-alive connections would not.
    threading.Timer(2.0, os._exit, (0,)).start()
    time.sleep(0.2)
    os._exit(0)


if __name__ == "__main__":
    main()

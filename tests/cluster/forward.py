"""Local listeners that lead to pods through the API server's proxy, for clusters whose pod addresses this machine does not reach.

HTTP only; the API server adds headers (X-Forwarded-...), takes a client's Authorization away, and answers 503 itself where the pod does
not. Whoever connects is let in before it is known whether the pod answers, so a dead pod shows as a 503 here, not as a refused
connection. The API server's port-forward is no way: container runtimes connect to the pod's loopback (containerd's latest source tries
the pod's address next, most installed ones do not), and our servers listen on the pod's own address only. Run against the tests' API
server, not on a real cluster so far.
"""

import http
import http.server
import threading
from typing import Any
from urllib.parse import quote

from tests.cluster.rest import Api, ApiError

_HOP = {
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "authorization",
    "content-length",
}


class Forwarder:
    """`address` gives a listener on 127.0.0.1 per (pod, port); `close` ends them all. Safe for threads."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._listeners: dict[tuple[str, str, int], _Proxy] = {}
        self._lock = threading.Lock()

    def address(self, namespace: str, pod: str, port: int) -> tuple[str, int]:
        """Where to connect to reach `port` of the pod."""
        with self._lock:
            key = namespace, pod, port
            if key not in self._listeners:
                server = _Proxy(self._api, f"/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy")
                threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True, name=f"proxy-{pod}").start()
                self._listeners[key] = server
            return "127.0.0.1", self._listeners[key].server_port

    def keep(self, pods: set[tuple[str, str]]) -> None:
        """End the listeners of all other pods; connections that are open go on."""
        with self._lock:
            for key in [key for key in self._listeners if key[:2] not in pods]:
                server = self._listeners.pop(key)
                server.shutdown()
                server.server_close()

    def close(self) -> None:
        self.keep(set())


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, api: Api, path: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.api, self.path = api, path


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Proxy

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("transfer-encoding") or ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def do_GET(self) -> None:
        body = self._body()
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        path = self.server.path + quote(self.path, safe="/:@!$&'()*+,;=~%?-._")
        try:
            answer = self.server.api.raw(self.command, path, body or None, headers)
        except ApiError:
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = answer.headers.get("content-length")
        bare = self.command == "HEAD" or answer.status in {http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED}
        if not bare:
            self.send_header(*(("content-length", length) if length is not None else ("transfer-encoding", "chunked")))
        self.end_headers()
        try:
            for part in () if bare else answer.stream(amt=None if length is None else 65536, decode_content=False):
                self.wfile.write(part if length is not None else b"%x\r\n%b\r\n" % (len(part), part))
            if not bare and length is None:
                self.wfile.write(b"0\r\n\r\n")
            answer.release_conn()
        except Exception:  # cut in the middle: whoever waits must see that
            self.close_connection = True
            answer.close()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""

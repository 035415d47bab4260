"""Local listeners that lead to pods through the API server, for clusters whose pod addresses this machine does not reach.

Two ways, tried once per cluster in this order:
- "portforward": each connection is one websocket of the official client, by its own example. A half-closed connection is closed whole: the
  protocol knows no half.
- "proxy": each request goes through the API server's proxy to pods. HTTP only; the API server adds headers (X-Forwarded-...), takes a
  client's Authorization away, and answers 503 itself where the pod does not.

Whoever connects is let in before it is known whether the pod answers, so a dead pod shows as a reset or a 503 here, not as a refused
connection. Both were run: the first with the official client against a server of the tests that speaks its protocol (the tests' API server does
not), the second against the tests' API server. Neither on a real cluster so far.
"""

import contextlib
import http
import http.server
import socket
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

    def __init__(self, api: Api, way: str = "auto") -> None:
        self._api, self.way = api, way
        self._listeners: dict[tuple[str, str, int], tuple[tuple[str, int], Any]] = {}
        self._lock = threading.Lock()

    def address(self, namespace: str, pod: str, port: int) -> tuple[str, int]:
        """Where to connect to reach `port` of the pod. Takes some seconds the first time, while it finds out the way."""
        with self._lock:
            key = namespace, pod, port
            if key not in self._listeners:
                if self.way == "auto":
                    self.way = "portforward" if self._answers(*key) else "proxy"
                self._listeners[key] = self._listen(*key)
            return self._listeners[key][0]

    def keep(self, pods: set[tuple[str, str]]) -> None:
        """End the listeners of all other pods; connections that are open go on."""
        with self._lock:
            for key in [key for key in self._listeners if key[:2] not in pods]:
                self._listeners.pop(key)[1]()

    def close(self) -> None:
        self.keep(set())

    def _listen(self, namespace: str, pod: str, port: int) -> tuple[tuple[str, int], Any]:
        """Its address and what ends it."""
        if self.way == "proxy":
            server = _Proxy(self._api, f"/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy")
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True, name=f"proxy-{pod}").start()

            def end() -> None:
                server.shutdown()
                server.server_close()

            return ("127.0.0.1", server.server_port), end
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        threading.Thread(
            target=self._accept, args=(listener, namespace, pod, port), daemon=True, name=f"forward-{pod}"
        ).start()
        return listener.getsockname(), lambda: _shut(listener)

    # --- portforward

    def _open(self, namespace: str, pod: str, port: int) -> Any:
        """One connection to the pod: a socket."""
        from kubernetes import client
        from kubernetes.stream import portforward

        # The library replaces a method of its ApiClient while it connects: one for each connection.
        core = client.CoreV1Api(client.ApiClient(self._api.configuration))
        far = portforward(core.connect_get_namespaced_pod_portforward, pod, namespace, ports=str(port)).socket(port)
        far.setblocking(True)
        return far

    def _answers(self, namespace: str, pod: str, port: int) -> bool:
        """Whether anything comes back on this way. What is sent is no HTTP request, so no server counts it as one."""
        try:
            far = self._open(namespace, pod, port)
        except Exception:  # whatever the library makes of it
            return False
        with contextlib.closing(far), contextlib.suppress(OSError):
            far.settimeout(5)
            far.sendall(b"?\r\n\r\n")
            there = bool(far.recv(1))
            _end(far)
            while far.recv(65536):
                pass
            return there
        return False

    def _accept(self, listener: socket.socket, namespace: str, pod: str, port: int) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, namespace, pod, port), daemon=True).start()

    def _serve(self, connection: socket.socket, namespace: str, pod: str, port: int) -> None:
        try:
            far = self._open(namespace, pod, port)
        except Exception:  # whatever it is, whoever connected must see that nobody is there
            _shut(connection)
            return
        back = threading.Thread(target=_pump, args=(far, connection), daemon=True)
        back.start()
        _pump(connection, far)
        back.join()
        connection.close()
        far.close()


# --- proxy


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


def _pump(source: Any, sink: Any) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    _end(sink)


def _end(one: Any) -> None:
    """No more is sent. (The library's thread fails on a socket that is closed with something unread in it.)"""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_WR)


def _shut(one: Any) -> None:
    # Not only closed: another thread may wait in recv or accept.
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        one.close()

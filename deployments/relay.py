"""What one version fails, another answers: requests are passed on along the chain that the route names.

Gateway API has no fallback, so the version's own server is it. The route says in `x-titleshot-fallback` who answers
where this one does not ("1,5": the champion, then what is behind it); the gateway sets the header, and callers cannot.
Read by path like `counting.py`; httpx is needed only where there is a place to pass on to.
"""

import contextlib
import re
from collections.abc import Callable
from typing import Any

Send = Callable[[dict[str, Any]], Any]
Receive = Callable[[], Any]
HEADER, CHOSEN, ATTEMPTS = b"x-titleshot-fallback", b"x-titleshot-chosen", b"x-titleshot-attempts"
"""Who answers instead (in a request); who was meant to, and how many were asked (in an answer)."""
TOO_MUCH, FAILURE = 429, 500
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HOPS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"date", b"server", b"host"})


def chain(header: str, version: str) -> list[str]:
    """Who comes after `version` in a chain: all of it where `version` is not in it."""
    named = [name for name in (part.strip() for part in header.split(",")) if _NAME.fullmatch(name)]
    return named[named.index(version) + 1 :] if version in named else named


class Relay:
    """Passes requests on to `place`, a URL with {version} in it, where this version fails them."""

    def __init__(self, place: str, version: str, timeout: float) -> None:
        import httpx

        self._place, self._version = place.rstrip("/"), version
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=32)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(timeout, connect=2.0), limits=limits, trust_env=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def __call__(
        self,
        answer: Callable[[Receive, Send], Any],
        scope: dict[str, Any],
        receive: Receive,
        send: Send,
        chain: list[str],
    ) -> None:
        """Let `answer` answer; where it fails before anything was sent, ask the `chain` in turn. The first answer that
        is no failure goes to the caller, else this version's own.
        """
        body, held = bytearray(), list[dict[str, Any]]()

        async def listened() -> dict[str, Any]:
            message: dict[str, Any] = await receive()
            body.extend(message.get("body") or b"")
            return message

        async def kept(message: dict[str, Any]) -> None:
            if held or (message["type"] == "http.response.start" and _failed(message["status"])):
                held.append(message)
            else:
                await send(message)

        await answer(listened, kept)
        if not held:
            return
        for place, version in enumerate(chain):
            found = None
            with contextlib.suppress(OSError, *self._errors()):
                found = await self._ask(version, chain[place + 1 :], scope, bytes(body))
            if found is not None:
                await self._pass_on(found, send, place + 2)
                return
        for message in held:
            await send(message)

    async def _ask(self, version: str, rest: list[str], scope: dict[str, Any], body: bytes) -> Any:
        """The answer of `version`, its body still to come; None where it fails as well."""
        headers = [(key, value) for key, value in scope["headers"] if key not in _HOPS and key != HEADER]
        headers.append((HEADER, ",".join(rest).encode()))
        path, query = scope["raw_path"].partition(b"?")[0].decode("latin-1"), scope["query_string"].decode("latin-1")
        url = self._place.replace("{version}", version) + path + (f"?{query}" if query else "")
        request = self._client.build_request(scope["method"], url, content=body, headers=headers)
        answer = await self._client.send(request, stream=True)
        if _failed(answer.status_code):
            await answer.aclose()
            return None
        return answer

    async def _pass_on(self, answer: Any, send: Send, attempts: int) -> None:
        told = {key.lower(): value for key, value in answer.headers.raw if key.lower() not in _HOPS}
        told |= {CHOSEN: self._version.encode(), ATTEMPTS: str(attempts).encode()}
        if length := answer.headers.get("content-length"):
            told[b"content-length"] = length.encode()
        try:
            await send({"type": "http.response.start", "status": answer.status_code, "headers": [*told.items()]})
            async for chunk in answer.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    @staticmethod
    def _errors() -> tuple[type[Exception], ...]:
        import httpx

        return (httpx.HTTPError,)


def _failed(status: int) -> bool:
    """Whether another version may do better: too much for this one, or a failure."""
    return status == TOO_MUCH or status >= FAILURE

"""The receiver: MLflow's webhooks come in, the events that matter go on to Prefect.

    python -m tasks.receiver PORT

`titleshot up` starts it. No body and no secret is ever logged.
"""

import asyncio
import logging
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tasks import settings as settings_of
from tasks import webhooks
from tasks.flowruns import Unanswered
from tasks.settings import Mistake, Settings

BODY_TIMEOUT = 10.0
"""Seconds that a sender has for the whole of a delivery."""
RETRY_AFTER = 10
"""Seconds until MLflow tries again what could not be dealt with, three times in all: a server restarts meanwhile."""
log = logging.getLogger("titleshot.receiver")


class Receiver:
    """Deals with deliveries for one home, any number at a time, and counts them."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._clock = settings, clock
        self._seen = webhooks.Seen(webhooks.seen_file(settings))
        self._lock = threading.Lock()
        self._done, self._refused, self._failed = Counter[str](), Counter[str](), Counter[str]()
        self._since = datetime.now(UTC)

    def deal(self, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, Any]]:
        """What becomes of one request: the status, and the answer in words."""
        try:
            delivery = webhooks.verify(webhooks.secret(self._settings), headers, body, self._clock())
        except webhooks.Refused as refusal:
            return self.refuse(refusal)
        except (Mistake, OSError) as error:
            return self._fail("no secret", str(error))
        what = f"{delivery.event} of {delivery.model!r}"
        try:
            why = webhooks.why_not(self._settings, delivery)
            with self._seen.taking(delivery.id, self._clock()) as new:
                if not new:
                    why = "known already"
                elif why is None:
                    webhooks.emit(self._settings, delivery)
        except Unanswered as error:
            return self._fail("Prefect away", f"{what}: {error}")
        except Mistake as error:
            return self._fail("policy unusable", f"{what}: {error}")
        except sqlite3.Error as error:
            return self._fail("ids not kept", f"{what}: {error}")
        done = "taken" if why is None else "known" if not new else "nothing"
        self._count(self._done, done)
        if webhooks.asks(delivery) is not None:
            # Each tag that a promotion sets is an event as well: those are only counted.
            said = why or f"v{delivery.version} asks to be promoted: Prefect knows"
            log.info("%s %s: %s", delivery.id, what, said)
        answer = {"delivery": delivery.id, "done": "event" if why is None else "nothing"}
        return 200, answer if why is None else {**answer, "why": why}

    def refuse(self, refusal: webhooks.Refused) -> tuple[int, dict[str, Any]]:
        """The answer to one who is not believed."""
        self._count(self._refused, refusal.why)
        log.warning("refused: %s", refusal.why)
        return refusal.status, {"refused": refusal.why}

    def counted(self) -> dict[str, Any]:
        """How many were taken, known already, of no matter, refused, and sent back to be tried again."""
        with self._lock:
            done = {name: self._done[name] for name in ("taken", "known", "nothing")}
            return {
                "since": self._since.isoformat(timespec="seconds"),
                **done,
                "refused": dict(self._refused),
                "again": dict(self._failed),
            }

    def _fail(self, why: str, said: str) -> tuple[int, dict[str, Any]]:
        self._count(self._failed, why)
        log.error("to be tried again: %s", said)
        return 503, {"again": why}

    def _count(self, counter: Counter[str], why: str) -> None:
        with self._lock:
            counter[why] += 1


def application(settings: Settings, clock: Callable[[], float] = time.time) -> Starlette:
    """The receiver as an ASGI application."""
    receiver = Receiver(settings, clock)

    async def mlflow(request: Request) -> Response:
        try:
            body = await asyncio.wait_for(_body(request), BODY_TIMEOUT)
            status, answer = await run_in_threadpool(receiver.deal, request.headers, body)
        except TimeoutError:
            status, answer = receiver.refuse(webhooks.Refused("too slow", 408))
        except ClientDisconnect:
            status, answer = receiver.refuse(webhooks.Refused("cut off", 400))
        except webhooks.Refused as refusal:
            status, answer = receiver.refuse(refusal)
        return JSONResponse(answer, status, {"Retry-After": str(RETRY_AFTER)} if status == 503 else None)

    async def health(_: Request) -> Response:
        return JSONResponse(receiver.counted())

    return Starlette(routes=[Route("/mlflow", mlflow, methods=["POST"]), Route("/health", health)])


async def _body(request: Request) -> bytes:
    """The whole body; no more of it is read than a delivery may have."""
    whole = bytearray()
    async for part in request.stream():
        whole += part
        if len(whole) > webhooks.LIMIT:
            raise webhooks.Refused("too large", 413)
    return bytes(whole)


def main() -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    port = int(sys.argv[1])
    app = application(settings_of.load())
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning", server_header=False)


if __name__ == "__main__":
    main()

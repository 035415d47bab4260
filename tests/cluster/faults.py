"""What goes wrong with requests when a test wants it: errors, cut connections, lost answers, silence."""

import re
import threading
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from tests.cluster.store import Problem


@dataclass
class Hurt:
    """One fault: which requests it meets, how often, and what it does to them. `hits` counts them."""

    verb: str | None
    method: str | None
    path: re.Pattern[str]
    times: int | None
    code: int = 0
    retry_after: int | None = None
    close: bool = False
    lose: bool = False
    hang: float = 0
    hits: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def meets(self, verb: str, method: str, path: str) -> bool:
        return self.verb in {None, verb} and self.method in {None, method} and bool(self.path.search(path))

    def wait(self) -> None:
        self.released.wait(self.hang)

    def answer(self, told: Any) -> Any:
        from tests.cluster.apiserver import Answer

        name, plural = told.name, told.resource.qualified if told.resource else ""
        problem = {
            403: Problem(403, "Forbidden", f'{plural} "{name}" is forbidden: a fault of the test'),
            404: Problem(404, "NotFound", f'{plural} "{name}" not found', {"name": name}),
            409: Problem(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {plural} "{name}": the object has been modified; please apply your changes to the latest version and try again',
                {"name": name},
            ),
            410: Problem(410, "Expired", "The provided resource version is too old."),
            429: Problem(
                429,
                "TooManyRequests",
                "too many requests, please try again later",
                retry_after=1 if self.retry_after is None else self.retry_after,
            ),
            500: Problem(
                500,
                "InternalError",
                "Internal error occurred: a fault of the test",
                {"causes": [{"message": "a fault of the test"}]},
            ),
            503: Problem(
                503,
                "ServiceUnavailable",
                "the server is currently unable to handle the request",
                retry_after=self.retry_after,
            ),
            504: Problem(
                504,
                "Timeout",
                "Timeout: request did not complete within the allotted timeout",
                retry_after=self.retry_after,
            ),
        }.get(self.code, Problem(self.code, "", f"code {self.code}"))
        headers = {"Retry-After": str(problem.retry_after)} if problem.retry_after is not None else {}
        return Answer(problem.code, problem.status(), headers)


class Where(TypedDict, total=False):
    """The requests that a fault meets: `verb` ("patch", "watch"; RBAC's words), `method`, `path` (a regular expression,
    searched in path and query). What is left out is any.
    """

    verb: str
    method: str
    path: str


class Faults:
    """All faults of a server. Each lasts for `times` requests; where that is None, until `clear()`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[Hurt] = []

    def _add(self, times: int | None, where: Where, **what: Any) -> Hurt:
        hurt = Hurt(where.get("verb"), where.get("method"), re.compile(where.get("path", "")), times, **what)
        with self._lock:
            self._all.append(hurt)
        return hurt

    def answer(
        self, code: int, times: int | None = 1, *, retry_after: int | None = None, **where: Unpack[Where]
    ) -> Hurt:
        """Requests are not executed and answered with this code."""
        return self._add(times, where, code=code, retry_after=retry_after)

    def close(self, times: int | None = 1, **where: Unpack[Where]) -> Hurt:
        """The connection is closed before the request is executed."""
        return self._add(times, where, close=True)

    def lose(self, times: int | None = 1, **where: Unpack[Where]) -> Hurt:
        """The request is executed and its answer lost: the connection is closed."""
        return self._add(times, where, lose=True)

    def hang(self, longest: float, times: int | None = 1, *, lose: bool = False, **where: Unpack[Where]) -> Hurt:
        """The request waits before it is executed, until `released` is set, `longest` seconds at most."""
        return self._add(times, where, hang=longest, lose=lose)

    def of(self, verb: str, method: str, path: str) -> Hurt | None:
        """The fault that meets this request, counted."""
        with self._lock:
            for hurt in self._all:
                if hurt.meets(verb, method, path):
                    hurt.hits += 1
                    if hurt.times is not None and hurt.hits >= hurt.times:
                        self._all.remove(hurt)
                    return hurt
            return None

    def clear(self) -> None:
        """No more faults; what hangs goes on."""
        with self._lock:
            for hurt in self._all:
                hurt.released.set()
            self._all = []

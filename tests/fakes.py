"""Stand-ins for what is slow or far away. Tests of flows may trust them: `tests/contract/` holds them to the
same promises as the real things."""

import itertools
import math
import random
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from deployments.artifact import digest
from deployments.target import (
    FULL,
    Answer,
    Change,
    Endpoint,
    Entry,
    Fence,
    Histogram,
    Holder,
    LeaseHeld,
    NeverReady,
    Served,
    StaleFence,
    TargetError,
    Traffic,
    Unit,
    Version,
)

EDGES = tuple(0.0005 * 1.07**step for step in range(164))
"""Upper edges of the fake's latency buckets in seconds, from 0.5 ms to 30 s."""


@dataclass
class Behaviour:
    """How a version of the fake answers: change it at any time.

    `answer` turns a request body into (status, body); `seconds` says how long that took. `ready` False lets
    `deploy` raise `NeverReady` with `log`; `healthy` False is a server that has died since.
    """

    answer: Callable[[bytes], tuple[int, bytes]] = lambda body: (200, body)
    seconds: Callable[[bytes], float] = lambda body: 0.005
    ready: bool = True
    healthy: bool = True
    log: str = ""


@dataclass(frozen=True)
class Sent:
    """What a client of the fake's gateway sees."""

    status: int
    body: bytes
    version: str | None
    attempts: int
    request_id: str
    chosen: str | None = None


@dataclass
class _Counts:
    codes: dict[str, int] = field(default_factory=dict)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))

    def add(self, code: int, seconds: float) -> None:
        self.codes[str(code)] = self.codes.get(str(code), 0) + 1
        if code:
            self.buckets[sum(edge < seconds for edge in EDGES)] += 1


class FakeTarget:
    """A `ServingTarget` in memory. `send` is its client; `behaviours` says how versions answer; `routed` is
    the list of every `Traffic` that was ever made to hold, in order. Fail the next call of a verb by putting
    an exception into `fail[verb]`."""

    def __init__(self, seed: int = 0, ttl: float = 60.0, clock: Callable[[], float] = time.time) -> None:
        self.behaviours: dict[tuple[str, str], Behaviour] = {}
        self.routed: list[Traffic] = []
        self.fail: dict[str, Exception] = {}
        self._random, self._ttl, self._clock = random.Random(seed), ttl, clock
        self._leases: dict[str, tuple[Fence, float]] = {}
        self._numbers: dict[str, int] = {}
        self._versions: dict[str, dict[str, Version]] = {}
        self._traffic: dict[str, Traffic] = {}
        self._journal: list[Entry] = []
        self._lines = 0
        self._warm: dict[str, int] = {}
        self._counts: dict[str, dict[str, _Counts]] = {}
        self._answers: dict[tuple[str, str], list[Answer]] = {}
        self._taken: dict[tuple[str, str], list[float]] = {}

    def units(self, model: str) -> Mapping[str, Sequence[Unit]]:
        return {number: [Unit(f"{model}-{number}", "RUNNING")] for number in self._versions.get(model, {})}

    def up(self) -> bool:
        return True

    def cannot(self, traffic: Traffic) -> tuple[str, ...]:
        return ()

    def changes(self, version: Version, traffics: Sequence[Traffic]) -> tuple[tuple[Change, ...], ...]:
        model = version.model
        there = version.number in self._versions.get(model, {})
        steps = [() if there else (Change(f"version {version.number}", "", version.digest),)]
        texts = ["" if one is None else repr(one) for one in (self._traffic.get(model), *traffics)]
        pairs = itertools.pairwise(texts)
        return (*steps, *(() if old == new else (Change(f"traffic of {model}", old, new),) for old, new in pairs))

    def behaviour(self, model: str, version: str) -> Behaviour:
        """How a version answers; a well-behaved one is made on first sight."""
        return self.behaviours.setdefault((model, version), Behaviour())

    # --- the protocol

    def lease(self, model: str, holder: str, *, take: bool = False) -> Fence:
        self._may_fail("lease")
        fence, expires = self._leases.get(model, (None, 0.0))
        if fence is not None and fence.holder != holder and self._clock() < expires and not take:
            raise LeaseHeld(f"{model} is held by {fence.holder}")
        if fence is None or fence.holder != holder:
            self._numbers[model] = self._numbers.get(model, 0) + 1
            fence = Fence(model, holder, self._numbers[model])
        self._leases[model] = (fence, self._clock() + self._ttl)
        return fence

    def renew(self, fence: Fence) -> float:
        self._may_fail("renew")
        self._check(fence.model, fence)
        return self._ttl

    def holder(self, model: str) -> Holder | None:
        fence, expires = self._leases.get(model, (None, 0.0))
        return None if fence is None else Holder(fence.holder, 0.0, max(0.0, expires - self._clock()))

    def release(self, fence: Fence) -> None:
        self._may_fail("release")
        if self._leases.get(fence.model, (None, 0.0))[0] == fence:
            del self._leases[fence.model]

    @contextmanager
    def guard(self, fence: Fence) -> Iterator[None]:
        self._check(fence.model, fence)
        yield

    def write(self, entry: Entry, fence: Fence) -> None:
        self._may_fail("write")
        self._check(entry.model, fence)
        if entry.kind == "end":
            self._journal = [
                one
                for one in self._journal
                if one.model != entry.model or (one.promotion != entry.promotion and one.kind != "end")
            ]
        self._lines += 1
        self._journal.append(replace(entry, number=self._lines, fence=fence.number, at=time.time()))

    def journal(self, model: str) -> tuple[Entry, ...]:
        return tuple(one for one in self._journal if one.model == model)

    def keep(self, model: str, warm: int, fence: Fence) -> None:
        self._check(model, fence)
        self._warm[model] = warm

    def kept(self, model: str) -> int:
        return self._warm.get(model, 0)

    def models(self) -> tuple[str, ...]:
        return tuple(self._versions)

    def deploy(self, version: Version, fence: Fence) -> Endpoint:
        self._may_fail("deploy")
        self._check(version.model, fence)
        there = self._versions.setdefault(version.model, {})
        if version.path.is_dir() and digest(version.path) != version.digest:
            raise TargetError(f"{version.model} {version.number} is not what was admitted")
        if version.number in there and there[version.number].digest != version.digest:
            raise TargetError(f"{version.model} {version.number} is deployed already, with another digest")
        behaviour = self.behaviour(version.model, version.number)
        if not behaviour.ready:
            raise NeverReady(f"{version.model} {version.number}: its server ended", behaviour.log)
        there[version.number] = version
        return self.deployed(version.model)[version.number]

    def route(self, traffic: Traffic, fence: Fence) -> None:
        self._may_fail("route")
        self._check(traffic.model, fence)
        if self._traffic.get(traffic.model) == traffic:
            return
        for version in sorted(traffic.live):
            if version not in self._versions.get(traffic.model, {}):
                raise TargetError(f"{traffic.model} {version} is not deployed: no traffic can go there")
            if not self.behaviour(traffic.model, version).healthy:
                raise TargetError(f"{traffic.model} {version} is not healthy, no traffic moves")
        self._traffic[traffic.model] = traffic
        self.routed.append(traffic)

    def traffic(self, model: str) -> Traffic | None:
        self._may_fail("traffic")
        return self._traffic.get(model)

    def observe(self, model: str) -> Mapping[str, Served]:
        self._may_fail("observe")
        return {
            key: Served(dict(counts.codes), Histogram(EDGES, tuple(counts.buckets)))
            for key, counts in self._counts.get(model, {}).items()
        }

    def answers(self, model: str, version: str, after: int = -1) -> Iterator[Answer]:
        self._may_fail("answers")
        if version not in self._versions.get(model, {}):
            raise TargetError(f"{model} {version} is not deployed")
        yield from [answer for answer in self._answers.get((model, version), []) if answer.number > after]

    def retire(self, model: str, version: str, fence: Fence) -> None:
        self._may_fail("retire")
        self._check(model, fence)
        traffic = self._traffic.get(model)
        if version not in self._versions.get(model, {}):
            return
        if traffic is not None and version in traffic.live:
            raise TargetError(f"{model} {version} has traffic: route it away first")
        if traffic is not None and traffic.challenger == version:
            self._traffic[model] = replace(traffic, challenger=None)
        del self._versions[model][version]
        self._answers.pop((model, version), None)

    def gateway(self, model: str) -> str:
        if model not in self._versions:
            raise TargetError(f"{model} has no gateway yet: deploy a version of it first")
        return f"http://fake/{model}"

    def deployed(self, model: str) -> Mapping[str, Endpoint]:
        return {
            number: Endpoint(model, number, f"http://fake/{model}/v/{number}", f"http://fake-{number}")
            for number in self._versions.get(model, {})
        }

    # --- its client

    def send(
        self,
        model: str,
        body: bytes = b"{}",
        version: str | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Sent:
        """One live request, or one on `version`'s own path."""
        name = request_id or str(uuid.UUID(int=self._random.getrandbits(128)))
        if version is not None:
            if version not in self._versions.get(model, {}):
                return Sent(404, b"", None, 0, name)
            status, answer = self._attempt(model, version, f"{version}-pinned", body, name)
            return Sent(status or 503, answer, version, 1, name, version)
        traffic = self._traffic.get(model)
        if traffic is None:
            return Sent(503, b"", None, 0, name)
        told = {key.lower(): value for key, value in (headers or {}).items()}
        pins = (pin for pin in traffic.shape.pins if told.get(pin.match.header.lower()) == pin.match.value)
        if pin := next(pins, None):
            return self._along(traffic, pin.version, body, name, "-header")
        if traffic.challenger is not None and self._random.randrange(FULL) < traffic.mirror:
            self._attempt(model, traffic.challenger, f"{traffic.challenger}-shadow", body, name)
        user = told.get((traffic.shape.sticky or "").lower())
        place = self._random.randrange(FULL) if user is None else zlib.crc32(user.encode()) % FULL
        # The challenger's share is at the end: who is in it stays in it while it grows.
        drawn = traffic.challenger is not None and place >= FULL - traffic.weight
        return self._along(traffic, str(traffic.challenger) if drawn else traffic.champion, body, name, "")

    def _along(self, traffic: Traffic, chosen: str, body: bytes, name: str, kind: str) -> Sent:
        """Ask the chain of `chosen`, one after the other."""
        rates = {limit.version: limit.per_second for limit in traffic.shape.limits}
        status, answer, version, attempts = 503, b"", chosen, 0
        for version in traffic.chain(chosen):
            attempts += 1
            taken = [at for at in self._taken.get((traffic.model, version), []) if at > self._clock() - 1]
            if len(taken) >= rates.get(version, math.inf):
                counts = self._counts.setdefault(traffic.model, {}).setdefault(version + kind, _Counts())
                status, answer = 429, b""
                counts.add(status, 0.0)
                continue
            self._taken[traffic.model, version] = [*taken, self._clock()] if version in rates else []
            status, answer = self._attempt(traffic.model, version, version + kind, body, name)
            if 0 < status < 500 and status != 429:
                break
        return Sent(status or 503, answer, version, attempts, name, chosen)

    def _attempt(self, model: str, version: str, key: str, body: bytes, name: str) -> tuple[int, bytes]:
        behaviour = self.behaviour(model, version)
        counts = self._counts.setdefault(model, {}).setdefault(key, _Counts())
        if not behaviour.healthy:
            counts.add(0, 0.0)
            return 0, b""
        (status, answer), seconds = behaviour.answer(body), behaviour.seconds(body)
        counts.add(status, seconds)
        kept = self._answers.setdefault((model, version), [])
        shadow, at = key.endswith("-shadow"), self._clock()
        kept.append(Answer(len(kept), name, shadow, status, body, answer, at, seconds))
        return status, answer

    def _check(self, model: str, fence: Fence) -> None:
        if fence.model != model or self._leases.get(model, (None, 0.0))[0] != fence:
            raise StaleFence(f"{fence.holder} holds fence {fence.number} of {fence.model}: stale")
        self._leases[model] = (fence, self._clock() + self._ttl)

    def _may_fail(self, verb: str) -> None:
        if error := self.fail.pop(verb, None):
            raise error

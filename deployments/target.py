"""The few verbs of a serving target, and the values they speak in. Pure: no I/O here."""

import base64
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

FULL = 10_000
"""A weight or a mirror of 100 %, in hundredths of a percent."""


class TargetError(Exception):
    """The target refuses, and would refuse again. The library's own error is chained."""


class TargetUnavailable(TargetError):
    """The target did not answer or is not there yet: worth another try."""


class StaleFence(TargetError):
    """The lease behind this fence has lapsed or passed to another holder: nothing was changed."""


class LeaseHeld(TargetError):
    """Another promotion of this model is under way; the message says whose, and since when."""


class NeverReady(TargetError):
    """The version's own server did not become ready: the version's fault. `log` holds its last lines."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, slots=True)
class Version:
    """One registered model version, downloaded: what `deploy` needs to serve it.

    `digest` is the artifact's digest (`deployments.artifact.digest`) as recorded at admission; a server
    refuses to load anything else. `env_manager` is MLflow's: "local" serves in our own environment. `tags` are the
    registry's, which may choose a runtime.
    """

    model: str
    number: str
    path: Path
    digest: str
    env_manager: str = "local"
    tags: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True, slots=True)
class Fence:
    """Proof of holding the lease of `model`. `number` grows with every new holder."""

    model: str
    holder: str
    number: int


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease. `since` is in seconds since the epoch; `left` seconds until it lapses, 0 where it has."""

    name: str
    since: float
    left: float


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one version answers: `url` through the gateway (its own path), `direct` at its own server."""

    model: str
    version: str
    url: str
    direct: str


@dataclass(frozen=True, slots=True)
class Match:
    """Requests whose header `header` (case does not matter) is exactly `value`: a tenant, a region, a class."""

    header: str
    value: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Requests that `match` are answered by `version`, whatever the weights say."""

    match: Match
    version: str


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `per_second` live requests reach `version`; the rest goes on along the chain, and where that ends
    the caller gets a 429.
    """

    version: str
    per_second: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked of live traffic besides weights; it stays as it is while champions change.

    The first pin that matches wins. `sticky` names a header: requests with the same value stay on the version
    that answered them while weights only grow. Requests that match `priority` are taken first where others wait.
    `fallback` is the version that answers where everything else in the chain fails.
    """

    pins: tuple[Pin, ...] = ()
    sticky: str | None = None
    limits: tuple[Limit, ...] = ()
    priority: Match | None = None
    fallback: str | None = None

    def __post_init__(self) -> None:
        limited = [limit.version for limit in self.limits]
        if len({*limited}) < len(limited):
            raise ValueError(f"two limits for one version: {', '.join(limited)}")
        for limit in self.limits:
            if limit.per_second <= 0:
                raise ValueError(f"the limit of version {limit.version} is {limit.per_second}: it must be more than 0")

    @property
    def versions(self) -> frozenset[str]:
        """The versions that this shape sends requests to."""
        named = {pin.version for pin in self.pins}
        return frozenset(named | {self.fallback} if self.fallback is not None else named)

    def without(self, gone: Container[str]) -> "Shape":
        """The same without a word of the versions `gone`."""
        return replace(
            self,
            pins=tuple(pin for pin in self.pins if pin.version not in gone),
            limits=tuple(limit for limit in self.limits if limit.version not in gone),
            fallback=None if self.fallback is not None and self.fallback in gone else self.fallback,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Who answers live requests. Weights are in hundredths of a percent (1 % is 100).

    `challenger` receives `weight` of the live requests and a copy of `mirror` of them; `fallback` (the previous
    champion, say) answers where the first choice fails. A champion without challenger serves everything.
    """

    model: str
    champion: str
    challenger: str | None = None
    weight: int = 0
    mirror: int = 0
    fallback: str | None = None
    shape: Shape = Shape()

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("mirror", self.mirror)):
            if not 0 <= value <= FULL:
                raise ValueError(f"{name} is {value}: it goes from 0 to {FULL} hundredths of a percent")
        if self.challenger is None and (self.weight or self.mirror):
            raise ValueError("there is no challenger to weigh or to mirror to")
        if self.challenger == self.champion:
            raise ValueError(f"version {self.champion} cannot challenge itself")

    def chain(self, version: str) -> tuple[str, ...]:
        """Who answers a request meant for `version`, in order: itself, the champion, the fallbacks."""
        chain = (version, self.champion, self.fallback, self.shape.fallback)
        return tuple(dict.fromkeys(one for one in chain if one is not None))

    @property
    def live(self) -> frozenset[str]:
        """The versions that this traffic can reach (mirror, pins and fallbacks included)."""
        reached = {self.champion, self.fallback, *self.shape.versions}
        if self.weight or self.mirror:
            reached.add(self.challenger)
        return frozenset(version for version in reached if version is not None)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies in buckets. `counts[i]` lie in (edges[i-1], edges[i]] seconds; the last count is beyond
    the last edge, so there is one count more than there are edges.
    """

    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)

    def __sub__(self, other: Self) -> "Histogram":
        """What came since `other` was taken. An empty `other` is nothing at all."""
        if not other.edges:
            return Histogram(self.edges, self.counts)
        if other.edges != self.edges:
            raise ValueError("these histograms have different buckets")
        return Histogram(self.edges, tuple(a - b for a, b in zip(self.counts, other.counts, strict=True)))


@dataclass(frozen=True, slots=True)
class Served:
    """What one version has answered since its counters began, attempt by attempt: a retry that hid a
    failure from the client still counts here. `shadow` counts are kept apart from live ones.

    `codes` maps the HTTP status of each attempt to its count; "0" is an attempt that got no answer
    (refused, reset). `errors` are the attempts with code 0 or 500 and above. Latencies are of answered attempts.
    `units` has the same by replica, where a version has several and the target can tell them apart.
    """

    codes: Mapping[str, int] = field(default_factory=dict)
    latency: Histogram = Histogram()
    units: Mapping[str, "Served"] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """All attempts."""
        return sum(self.codes.values())

    @property
    def errors(self) -> int:
        """The attempts that failed: code 0, or 500 and above."""
        return sum(count for code, count in self.codes.items() if int(code) == 0 or int(code) >= 500)

    def since(self, earlier: Self) -> "Served":
        """What came after `earlier`.

        Raises `TargetUnavailable` where a counter went backwards: the gateway restarted in between.
        """
        codes = {code: count - earlier.codes.get(code, 0) for code, count in self.codes.items()}
        if any(count < 0 for count in codes.values()) or set(earlier.codes) - set(self.codes):
            raise TargetUnavailable("the gateway's counters began anew: it restarted while we measured")
        units = {name: unit.since(earlier.units.get(name, Served())) for name, unit in self.units.items()}
        return Served(codes, self.latency - earlier.latency, units)


@dataclass(frozen=True, slots=True)
class Answer:
    """One request that a version's server answered, with its bodies as they went over the wire.

    `number` grows by one with every answer of one server process, so a gap shows what was lost.
    `seconds` is the time inside the server; `at` is seconds since the epoch. `own_path`: the caller asked for this
    version by name, so it is not live traffic.
    """

    number: int
    request_id: str
    shadow: bool
    status: int
    request: bytes
    response: bytes
    at: float
    seconds: float
    own_path: bool = False


def answer_of(line: str | bytes) -> Answer:
    """An answer as a model server writes it on its page /titleshot/answers: one JSON line, bodies as text or base64."""
    fields = json.loads(line)
    for name in ("request", "response"):
        body = fields[name]
        fields[name] = body.encode() if isinstance(body, str) else base64.b64decode(body["base64"])
    return Answer(**fields)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a model's journal: what is about to happen to it, or did. `number` grows with every line,
    `fence` is the number of the lease it was written under, `at` seconds since the epoch; `data` is JSON-able.
    """

    model: str
    promotion: str
    kind: str
    data: Mapping[str, Any]
    number: int = 0
    fence: int = 0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Unit:
    """One replica: its name, its state in the words of who runs it, and its process on this machine, 0 for none."""

    name: str
    state: str
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that would be made or changed: `what` names it, `before` and `after` are texts, "" for none."""

    what: str
    before: str
    after: str


class ServingTarget(Protocol):
    """Where models answer. Every verb is idempotent and returns once it holds true.

    All raise `TargetError`; those that change something raise `StaleFence` for a fence that has lapsed.
    """

    def lease(self, model: str, holder: str, *, take: bool = False) -> Fence:
        """Take the lease of `model` for a while (or renew one's own). Raises `LeaseHeld`; with `take` it is taken from
        whoever holds it, whose fence is stale from then on.
        """

    def renew(self, fence: Fence) -> float:
        """Make the lease last again; returns for how many seconds. Raises `StaleFence` where it is not ours any
        more.
        """

    def holder(self, model: str) -> Holder | None:
        """Who holds the lease of `model`, or did until it lapsed; None where it was given back."""

    def release(self, fence: Fence) -> None:
        """Give the lease back; a fence that is stale already is no error."""

    def guard(self, fence: Fence) -> AbstractContextManager[None]:
        """Hold off every later holder of the lease while the block runs: for side effects elsewhere (the registry)
        that know no fences. Raises `StaleFence` where the lease is not ours any more; the block does not run then.
        """

    def write(self, entry: Entry, fence: Fence) -> None:
        """Append to the journal of the fence's model; it outlives this process once this returns."""

    def journal(self, model: str) -> tuple[Entry, ...]:
        """The journal of `model`, oldest line first: all of promotions not closed yet, and the latest line of kind
        "end" of those that are.
        """

    def keep(self, model: str, warm: int, fence: Fence) -> None:
        """Record how many versions of `model` stay loaded and warm whatever serves (0: none but those in use)."""

    def kept(self, model: str) -> int:
        """What `keep` recorded last; 0 at first."""

    def models(self) -> tuple[str, ...]:
        """The models that are served here."""

    def deploy(self, version: Version, fence: Fence) -> Endpoint:
        """Serve `version` beside the others: ready and warm, without traffic. Raises `NeverReady`."""

    def route(self, traffic: Traffic, fence: Fence) -> None:
        """Make the data plane obey `traffic`, read back from it. Refuses to send requests to a version
        that is not healthy; where the data plane refuses, the last good configuration stays.
        """

    def traffic(self, model: str) -> Traffic | None:
        """The traffic in force as the data plane has it; None where the model is not served."""

    def observe(self, model: str) -> Mapping[str, Served]:
        """Counts and latencies since start: version "3" for live attempts, "3-shadow" for mirrored ones."""

    def answers(self, model: str, version: str, after: int = -1) -> Iterable[Answer]:
        """The latest answers of a version's server with `number > after`, oldest first (bounded)."""

    def retire(self, model: str, version: str, fence: Fence) -> None:
        """Drain `version` and stop it. Refused while it has traffic; no error where it is not deployed."""

    def gateway(self, model: str) -> str:
        """The address that clients use: a POST to its protocol's path is answered by who is routed."""

    def deployed(self, model: str) -> Mapping[str, Endpoint]:
        """The versions that are deployed, by number."""

    def units(self, model: str) -> Mapping[str, Sequence[Unit]]:
        """The replicas of every deployed version, by number."""

    def up(self) -> bool:
        """Whether whatever serves here can be asked at all."""

    def cannot(self, traffic: Traffic) -> tuple[str, ...]:
        """What this target is not able to do of `traffic`, in sentences that say why; nothing is changed. The versions
        need not be deployed.
        """

    def changes(self, version: Version, traffics: Sequence[Traffic]) -> tuple[tuple[Change, ...], ...]:
        """What `deploy(version)` would make or change, then what each `route(traffic)` would, one after the other: so
        one more than there are `traffics`. Nothing is changed; no lease is needed.
        """

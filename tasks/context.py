"""What every step of one promotion needs to know, and what it hands back."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.target import Fence, Served, ServingTarget, Shape, Traffic, Version
from tasks import shaping
from tasks.journal import Journal
from tasks.registry import Registered
from tasks.settings import Settings
from validations.ledger import Ledger
from validations.policy import Policy
from validations.verdict import Artifact, Evidence, Measurement, Outcome

if TYPE_CHECKING:  # statistics take a second to import, and a rollback needs none
    from validations.series import Arm, Series

Judged = Callable[[Mapping[str, Measurement]], Outcome]
"""Asks the judge how the step would end with these measurements."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A version with its artifacts on this disk. `recorded` is the digest the registry vouches for,
    `digest` that of what was downloaded.
    """

    registered: Registered
    path: Path
    recorded: str
    digest: str

    @property
    def number(self) -> str:
        """The version's number."""
        return self.registered.number

    def version(self, env_manager: str) -> Version:
        """As the serving target wants it; the server will load the recorded digest and nothing else."""
        tags = dict(self.registered.tags)
        return Version(self.registered.model, self.number, self.path, self.recorded, env_manager, tags)


@dataclass(slots=True)
class Context:
    """One promotion under way, called `id`. `base` is the policy's folder, `folder` this promotion's own."""

    id: str
    model: str
    settings: Settings
    target: ServingTarget
    fence: Fence
    base: Path
    folder: Path
    champion: Contender | None
    challenger: Contender
    previous: str | None
    policy: Policy | None = None
    """None for a rollback by hand, which asks nothing."""
    ledger: Ledger = field(default_factory=lambda: Ledger({}))
    """All evidence against the challenger so far."""
    series: "dict[str, list[Series]]" = field(default_factory=dict)
    """By gate, what was observed of this challenger against this champion: in earlier promotions, and so far."""
    began: Mapping[str, Served] = field(default_factory=dict)
    """The counters when the promotion began."""
    reference: "Arm | None" = None
    """What the old champion did from then until the cut-over: a watch compares with it."""
    shape: Shape = field(default_factory=Shape)
    """What was asked of live traffic besides weights when the promotion began."""
    blamed: frozenset[str] = frozenset()
    """The versions that are quarantined: a previous champion that is answers nobody, not even where others fail."""
    paused: BaseException | None = None
    """Prefect's own signal, once somebody has pressed Pause: it ends this process where nothing is under way."""
    stopped: tuple[float, float] | None = None
    """Where a step did not pass: when it began, and when the judge stopped it (seconds since the epoch)."""

    @property
    def journal(self) -> Journal:
        """The journal of this promotion, under its fence."""
        return Journal(self.target, self.fence, self.id)

    def guard(self) -> AbstractContextManager[None]:
        """Holds off later holders of the lease while something is written that knows no fences."""
        return self.target.guard(self.fence)

    def traffic(self, champion: str, challenger: str | None = None, *, weight: int = 0, mirror: int = 0) -> Traffic:
        """Traffic with `champion`, shaped as the policy says or as it was: where what answers fails, the other of
        the two that have been champion answers, as long as it is deployed.
        """
        there = self.target.deployed(self.model)
        new = self.challenger.number
        previous = self.previous if self.previous in there and self.previous not in self.blamed else None
        names = {
            "champion": champion,
            "challenger": new if new in there and new != champion else None,
            "previous": previous,
        }
        shape = shaping.shape(self.policy.traffic if self.policy else None, names) or self.shape
        # What a pin or a fallback named may have been taken down meanwhile; traffic must not wait for it.
        named = {*shape.versions, *(limit.version for limit in shape.limits)}
        shape = shape.without(named - {*there})
        old = self.champion.number if self.champion else None
        spare = next((one for one in (old, previous) if one in there and one not in (champion, challenger)), None)
        return Traffic(self.model, champion, challenger, weight, mirror, spare, shape)

    def file(self, name: str) -> Path:
        """A file that the policy names, relative to the policy."""
        return (self.base / name).resolve()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step observed: measurements, a note for people, and data to keep as evidence (JSON-able)."""

    measurements: dict[str, Measurement]
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    """Files of lines to keep beside it, by name."""

    def evidence(self, artifacts: tuple[Artifact, ...] = (), started: datetime | None = None) -> Evidence:
        """As evidence for the judge, finished now."""
        return Evidence(
            measurements=self.measurements,
            artifacts=artifacts,
            started=started,
            finished=datetime.now(UTC),
            note=self.note,
        )

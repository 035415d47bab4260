"""What every step of one promotion needs to know, and what it hands back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deployments.target import Fence, Served, ServingTarget, Version
from tasks.registry import Registered
from tasks.settings import Settings
from validations.ledger import Ledger
from validations.policy import Policy
from validations.series import Series
from validations.verdict import Artifact, Evidence, Measurement, Outcome

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
        return Version(self.registered.model, self.number, self.path, self.recorded, env_manager)


@dataclass(slots=True)
class Context:
    """One promotion under way. `base` is the policy's folder, `folder` this promotion's own."""

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
    series: dict[str, list[Series]] = field(default_factory=dict)
    """By gate, what was observed of this challenger against this champion: in earlier promotions, and so far."""
    began: Mapping[str, Served] = field(default_factory=dict)
    """The counters when the promotion began."""
    cut_over: Mapping[str, Served] = field(default_factory=dict)
    """The counters at the cut-over: what the old champion did between the two, a watch compares with."""

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

"""What a deploy and the routes after it would change on this machine, as texts to compare. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from deployments.local import envoy
from deployments.local.supervisor import Program
from deployments.target import Change, Traffic


@dataclass(frozen=True, slots=True)
class Picture:
    """One model as it stands or would stand: its gateway's port (None: it has none), servers and traffic."""

    model: str
    port: int | None
    backends: Sequence[envoy.Backend]
    programs: Mapping[str, Program] = field(default_factory=dict)
    traffic: Traffic | None = None

    def texts(self, limits: envoy.Limits) -> dict[str, str]:
        """All of it as YAML, by what it is."""
        found: dict[str, Any] = {
            f"program {name}": {"command": [*program.command], "environment": {**program.environment}}
            for name, program in self.programs.items()
        }
        chains = envoy.chains(self.traffic) if self.traffic else ()
        for cluster in envoy.clusters(self.model, self.backends, limits, chains):
            found[f"gateway cluster {cluster['name']}"] = cluster
        if self.port is not None:
            found[f"gateway listener {self.model}"] = {"address": "127.0.0.1", "port": self.port}
            versions = [one.version for one in self.backends]
            found[f"gateway routes {self.model}"] = envoy.routes(self.model, 0, versions, self.traffic, limits)
        # Through JSON and back, so that no two share a part: YAML would write the second as a reference.
        found = json.loads(json.dumps(found))
        return {name: yaml.safe_dump(value, sort_keys=False, width=110) for name, value in found.items()}


def differences(before: Picture, after: Picture, limits: envoy.Limits) -> tuple[Change, ...]:
    """What is new or other in `after`; what is gone has an empty text there."""
    old, new = before.texts(limits), after.texts(limits)
    return tuple(
        Change(name, old.get(name, ""), new.get(name, ""))
        for name in dict.fromkeys([*new, *old])
        if old.get(name) != new.get(name)
    )

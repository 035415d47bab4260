"""The ledger: all evidence of one promotion against its challenger, as one number with one bound.

Pure. Each check that is looked at again and again has an e-process against "within its bound"
(`validations.eprocess`). Their weighted mean is one too, whatever depends on what; so it ever reaches
1 / false_rollback with probability false_rollback at most, over all checks, steps and looks together, while the
challenger is within every bound. Weights add up to 1 over the policy, and what has not begun counts 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from validations.gates import Canary, Load, Shadow, Watch
from validations.policy import Policy
from validations.verdict import Measurement

Key = tuple[str, str]
"""A gate (its name) and one of its checks."""
SHARES = {"shadow": 1.0, "load": 1.0, "canary": 2.0, "watch": 1.0}
HOLD = 4.0
"""The promotion does not move on while the ledger is within this factor of its bound."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Weights, and the logarithm of each e-value so far. `found` lacks what has not begun."""

    weights: Mapping[Key, float]
    found: Mapping[Key, float] = field(default_factory=dict)

    def with_(self, gate: str, logs: Mapping[str, float]) -> "Ledger":
        """This ledger with a gate's latest evidence in place of its earlier one."""
        fresh = {(gate, metric): log for metric, log in logs.items() if (gate, metric) in self.weights}
        return Ledger(self.weights, {**self.found, **fresh})

    @property
    def total(self) -> float:
        """The weighted mean of all e-values: 1 at the beginning."""
        return math.fsum(weight * _exp(self.found.get(key, 0.0)) for key, weight in self.weights.items())

    def guilty(self, key: Key, false_rollback: float) -> bool:
        """Whether closed testing names this check: every mean that it is part of reaches 1 / false_rollback.

        The lowest of those means is the one with just the e-values that are below it (Vovk and Wang 2021).
        """
        weight = self.weights[key]
        money = weight * _exp(self.found.get(key, 0.0))
        others = sorted((_exp(self.found.get(k, 0.0)), w) for k, w in self.weights.items() if k != key)
        for e, w in others:
            if e >= money / weight:
                break
            money, weight = money + w * e, weight + w
        return money / weight >= 1 / false_rollback

    def measurement(self, false_rollback: float, sample: int) -> Measurement:
        """The total, against a bound of 1 / false_rollback.

        Nothing is decided within the factor `HOLD` of the bound. The note says how likely such evidence is
        without a fault, and which checks make it up.
        """
        total = self.total
        chance = min(1.0, 1 / total) if total else 1.0
        suspects = sorted(self.weights, key=lambda key: -self.weights[key] * _exp(self.found.get(key, 0.0)))
        most = [
            f"{gate}: {metric}" for gate, metric in suspects[:2] if self.found.get((gate, metric), 0.0) > math.log(3)
        ]
        note = f"chance {chance:.2g} without a fault" + (f", mostly by {' and '.join(most)}" if most else "")
        capped = min(total, 1e12)
        near = capped * HOLD > 1 / false_rollback
        high = capped * HOLD if near and capped <= 1 / false_rollback else capped
        return Measurement(value=capped, low=capped, high=high, sample=max(sample, 1), note=note if near else "")


def weights(policy: Policy, *, first: bool = False) -> dict[Key, float]:
    """How much each check counts: a canary twice what another gate does, checks of one gate alike."""
    kinds = (Shadow, Load, Canary, Watch)
    gates = {
        gate.name or gate.kind: (SHARES[gate.kind], [m for m in gate.bounds(first=first) if weighs(m)])
        for gate in policy.gates
        if isinstance(gate, kinds)
        and not (first and gate.falls_away())
        and not (isinstance(gate, Load) and gate.find is not None)  # a search has error rates of its own
    }
    total = sum(share for share, metrics in gates.values() if metrics)
    return {
        (name, metric): share / total / len(metrics) for name, (share, metrics) in gates.items() for metric in metrics
    }


def weighs(metric: str) -> bool:
    """Whether a metric has an e-process in the ledger; the others are facts, or have an error rate of their own."""
    return metric in ("error_rate", "error_rate_delta", "disagreement", "slice_disagreement") or (
        metric[:1] == "p" and metric.endswith(("_ms", "_ratio"))
    )


def _exp(log: float) -> float:
    return math.exp(min(log, 600.0))

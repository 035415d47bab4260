"""One row of the table for each rule and case, with a Wilson interval, and how far it is from the sequential limit."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from validations.eprocess import project

Floats = NDArray[np.float64]

OURS = "**Titleshot"
HEAD = (
    "case",
    "rule",
    "outcome",
    "declared",
    "observed (Wilson 95 %)",
    "needed, median",
    "90th",
    "target",
    "reached",
    "x limit",
)


@dataclass(frozen=True)
class Target:
    """What section 6 of the study asks: rates, and requests needed."""

    most: float | None = None
    least: float | None = None
    median: float | None = None
    p90: float | None = None

    def __str__(self) -> str:
        parts = (
            (self.most, "<= {:.0%}"),
            (self.least, ">= {:.0%}"),
            (self.median, "median <= {:,.0f}"),
            (self.p90, "90th <= {:,.0f}"),
        )
        return ", ".join(text.format(value) for value, text in parts if value is not None)

    def reached(self, rate: float, median: float, p90: float) -> bool:
        """Whether all that is asked holds."""
        return (
            (self.most is None or rate <= self.most)
            and (self.least is None or rate >= self.least)
            and (self.median is None or median <= self.median)
            and (self.p90 is None or p90 <= self.p90)
        )


@dataclass(frozen=True)
class Row:
    """`needed`: requests (or pairs, slices) until the outcome in each run, infinite where it never came."""

    case: str
    rule: str
    outcome: str
    needed: Floats
    declared: float | None = None
    target: Target | None = None
    limit: float | None = None
    weights: Floats | None = None
    """Where the distribution is exact: the probability of each of `needed`; they may leave a rest that never came."""

    def quantile(self, q: float) -> float:
        """Of the requests needed, over all runs."""
        if self.weights is None:
            return float(np.quantile(self.needed, q, method="higher"))
        total = np.cumsum(self.weights)
        return float(self.needed[np.searchsorted(total, q)]) if total[-1] >= q else float("inf")

    @property
    def rate(self) -> float:
        """The share of runs in which the outcome came."""
        return float(np.isfinite(self.needed).mean() if self.weights is None else self.weights.sum())

    def cells(self) -> list[str]:
        """As printed."""
        median, p90 = self.quantile(0.5), self.quantile(0.9)
        target, limit = self.target, self.limit
        return [
            self.case,
            self.rule,
            self.outcome,
            "" if self.declared is None else f"{self.declared:.0%}",
            self._observed(),
            _number(median),
            _number(p90),
            str(target or ""),
            "" if target is None else "yes" if target.reached(self.rate, median, p90) else "**no**",
            "" if limit is None or not np.isfinite(median) else f"{median / limit:.1f}",
        ]

    def _observed(self) -> str:
        if self.weights is not None:
            return f"{_percent(self.rate)} (exact)"
        hits = int(np.isfinite(self.needed).sum())
        low, high = binomtest(hits, self.needed.size).proportion_ci(method="wilson")
        return f"{_percent(self.rate)} ({_percent(low)} to {_percent(high)}; {self.needed.size:,} runs)"


def as_markdown(rows: Iterable[Row]) -> str:
    """The table; a case that follows itself is not repeated."""
    lines = [list(HEAD), ["---"] * len(HEAD)]
    before = ""
    for row in rows:
        cells = row.cells()
        lines.append(["" if row.case == before else cells[0], *cells[1:]])
        before = row.case
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(needed: float) -> str:
    return f"{needed:,.0f}" if np.isfinite(needed) else "-"


def divergence(p: float, q: float) -> float:
    """Kullback-Leibler, of one yes-or-no."""
    terms = [a * np.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0]
    return float(sum(terms))


def information(p0: float, p1: float, delta: float, share: float) -> float:
    """What one request of the challenger can tell against p1 = p0 + delta, beside the champion's that come with it."""
    near = project(np.array(p0), np.array(p1), share, delta)
    return divergence(p1, float(near[1])) + (1 - share) / share * divergence(p0, float(near[0]))


def sequential_limit(level: float, steps: Iterable[tuple[float, float]]) -> float:
    """The requests at which information adds up to `level`; `steps`: (requests, information of each)."""
    done = 0.0
    for requests, each in steps:
        if level <= requests * each:
            return done + level / each
        level -= requests * each
        done += requests
    return float("inf")

"""The search for the highest rate that a version keeps its bounds at: doubled, then narrowed down. Pure."""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Search:
    """Asks for one rate after the other: try `rate` (None: there is nothing left to ask), then `tell`.

    Begins at `start` and doubles while the bounds are kept, up to `limit`. After the first rate at which they
    are not, it bisects (by ratio) until that one is within `precision` of the highest that was kept. A bound
    broken at the first rate ends it: there is nothing below to begin from.
    """

    start: float
    limit: float
    precision: float
    kept: float = 0.0
    broken: float = math.inf
    rate: float | None = None
    _ceiling: float = math.inf

    def __post_init__(self) -> None:
        if not (0 < self.start <= self.limit and self.precision > 0):
            raise ValueError("a search goes from a positive rate to one that is no smaller, with a precision above 0")
        self.rate = self.start

    def tell(self, kept: bool | None) -> None:  # noqa: FBT001 - the one thing there is to tell
        """What came of `rate`: all bounds kept (True), one broken (False), or neither is proven (None)."""
        if self.rate is None:
            raise ValueError("the search has ended: there is no rate to tell about")
        if kept:
            self.kept = self.rate
        else:
            self._ceiling = self.rate
            self.broken = self.rate if kept is False else self.broken
        self.rate = self._next()

    def stop(self) -> None:
        """Ask for no more: what is known stays known."""
        self.rate = None

    @property
    def high(self) -> float:
        """The lowest rate at which a bound was broken; `limit` where that was kept; else infinity: unknown."""
        return self.limit if self.kept >= self.limit else self.broken

    def _next(self) -> float | None:
        if self._ceiling == math.inf:
            return None if self.kept >= self.limit else min(2 * self.kept, self.limit)
        # A hair wider than asked: the square roots below are rounded.
        if not self.kept or self._ceiling <= self.kept * (1 + self.precision) * (1 + 1e-9):
            return None
        return math.sqrt(self.kept * self._ceiling)

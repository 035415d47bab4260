"""A stream of counted requests: blocks, what each process did in them, and all that is kept to judge again.

Pure.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from validations.eprocess import (
    Floats,
)
from validations.slices import Slice
from validations.verdict import Value

Relation = Literal["independent", "bursty", "paired"]
"""How challenger and champion are compared: request by request (`TwoSample`), block by block over replicas
(`Permutation`), or by quantiles of slices that both share (`paired_slices`)."""


class Arm(Value):
    """What one server process did in one block. `buckets`: index of the latency bucket to count, of answered
    requests; `unanswered` are infinitely slow. `quantiles`: percent to seconds, where latencies are known one by one.
    """

    requests: int = 0
    errors: int = 0
    unanswered: int = 0
    buckets: dict[int, int] = {}
    quantiles: dict[int, float] = {}

    def __add__(self, other: "Arm") -> "Arm":
        buckets = dict(self.buckets)
        for bucket, count in other.buckets.items():
            buckets[bucket] = buckets.get(bucket, 0) + count
        return Arm(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            unanswered=self.unanswered + other.unanswered,
            buckets=buckets,
        )

    @property
    def timed(self) -> int:
        """How many requests have a latency: not always `requests`, since a target counts the two at other moments."""
        return self.unanswered + sum(self.buckets.values())

    def beyond(self, edges: int) -> Floats:
        """How many requests took longer than each of the edges; those without an answer are infinitely slow."""
        counts = np.zeros(edges + 1)
        counts[list(self.buckets)] = list(self.buckets.values())
        return self.timed - np.cumsum(counts)[:-1]


class Block(Value):
    """A stretch of traffic, `seconds` long. One arm for each process; no champion where none served beside it.

    `control` are two parts of the champion's own requests. `whole` is false for the last stretch, cut short: it counts
    in what is counted, and not in comparisons, which go block by block.
    """

    seconds: float
    challenger: tuple[Arm, ...] = ()
    champion: tuple[Arm, ...] = ()
    control: tuple[Arm, Arm] | None = None
    pairs: int = 0
    disagreements: int = 0
    whole: bool = True


class Head(Value):
    """What was known before the first block: bucket edges and the length of a block (seconds), what the champion did of
    late (`history`), and, where it does not serve beside the challenger, what it did before (`reference`).
    """

    edges: tuple[float, ...] = ()
    relation: Relation = "independent"
    block: float = 0.0
    history: Arm = Arm()
    reference: Arm | None = None

    def continues(self, other: "Head") -> bool:
        """Whether blocks of `other` may be read on with ours: cut, bucketed and compared alike."""
        mine, theirs = ((one.edges, one.relation, one.block) for one in (self, other))
        return mine == theirs


class Series(Value):
    """A head and its blocks: all that is needed to judge again; `slices` as they were last."""

    head: Head
    blocks: tuple[Block, ...] = ()
    slices: tuple[Slice, ...] = ()


class Total:
    """Everything counted so far, with the disagreement by slice as it stands."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.challenger, self.champion = Arm(), Arm()
        self.pairs = self.disagreements = 0
        self.seconds = 0.0
        self.slices: tuple[Slice, ...] = ()

    def add(self, block: Block) -> None:
        """Count a block."""
        self.challenger = sum(block.challenger, self.challenger)
        self.champion = sum(block.champion, self.champion)
        self.pairs += block.pairs
        self.disagreements += block.disagreements
        self.seconds += block.seconds

    @property
    def size(self) -> int:
        """Requests at the challenger, or pairs, whichever are more."""
        return max(self.challenger.requests, self.pairs)

    def plus(self, block: Block) -> "Total":
        """With a block more; this one stays as it is."""
        both = Total(self.head)
        both.challenger, both.champion = self.challenger, self.champion
        both.pairs, both.disagreements, both.seconds = self.pairs, self.disagreements, self.seconds
        both.add(block)
        return both

    @cached_property
    def edges(self) -> Floats:
        """The upper edges of the latency buckets, in seconds."""
        return np.asarray(self.head.edges, dtype=np.float64)


def sparse(counts: Sequence[int]) -> dict[int, int]:
    """A histogram's counts without its empty buckets."""
    return {index: count for index, count in enumerate(counts) if count}

"""What a Locust process sends, when and to whom: the schedule of a run, or one worker's part of it. No Locust here."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path


class Plan:
    """What to do, as `loadtests.run` wrote it."""

    def __init__(self, path: Path) -> None:
        plan = json.loads(path.read_text())
        self.targets: dict[str, str] = plan["targets"]
        self.rate: float = plan["rate"]
        self.seconds: float = plan["seconds"]
        self.poisson: bool = plan["arrivals"] == "poisson"
        self.times: list[float] = plan["times"]
        self.timeout: float = plan["timeout"]
        self.seed: int = plan["seed"]
        self.headers: dict[str, str] = {"content-type": "application/json", **plan["headers"]}
        self.payloads = Path(plan["payloads"]).read_bytes().split(b"\n")
        self.payloads = [line for line in self.payloads if line.strip()]
        self.result = Path(plan["result"])
        self.progress = Path(plan["progress"])
        self.version_header: str = plan["version_header"]
        self.part: int = plan.get("part", 0)
        self.parts: int = plan.get("parts", 1)
        self.digest: str = plan.get("digest", "")
        self.patience: float = plan.get("patience", 60.0)

    def arrivals(self) -> Iterator[tuple[float, str, bytes]]:
        """When (seconds after the start), to whom, and what.

        Every target gets the same payloads in the same order, at the same rate. In each round every
        target has one turn, in random order, so that none of them always follows another; the turns are
        spread over the round, so that they do not meet at the machine. Where there are several workers, each
        has every so-many-th round of the one schedule: all of theirs together are what a single one would send.
        """
        luck = random.Random(self.seed)  # noqa: S311 - a schedule that can be repeated
        names = list(self.targets)
        for turn, (at, gap) in enumerate(self.rounds(luck)):
            luck.shuffle(names)
            if turn % self.parts != self.part:
                continue
            for place, name in enumerate(names):
                yield at + gap * place / len(names), name, self.payloads[turn % len(self.payloads)]

    def rounds(self, luck: random.Random) -> Iterator[tuple[float, float]]:
        """When each round begins, and how long it lasts: to the next one, for the mean gap at the most."""
        total, gap = round(self.rate * self.seconds), 1 / self.rate
        if not (self.poisson or self.times):
            yield from ((turn * gap, gap) for turn in range(total))
            return
        # Given their number, the arrivals of a Poisson process are uniform: so it is exactly the number planned.
        times = self.times or sorted(luck.uniform(0, self.seconds) for _ in range(total))
        for at, following in itertools.pairwise([*times, self.seconds]):
            yield at, min(following - at, gap)

"""Requests counted by kind and shown as Prometheus text. Standard library only, because the model server reads this
file by path, in environments that have nothing else of ours.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

LIVE, SHADOW, OWN, PINNED, LOAD = KINDS = ("live", "shadow", "own", "pinned", "load")
"""What a request is: drawn by weight, a copy, on the version's own path, chosen by a header, a load test's."""
NOBODY = 0
"""The code of an attempt that got no answer at all."""


def _edges() -> Iterator[int]:
    # 5-12 % apart, as the local gateway has them: two targets' latencies are cut in the same places.
    steps = [*range(10, 20), *range(20, 40, 2), *range(40, 100, 5)]
    return (step * 10**power for power in range(7) for step in steps)


EDGES = tuple(edge / 1e6 for edge in _edges() if 500 <= edge <= 30_000_000)
"""Upper edges of the latency buckets in seconds, from 0.5 ms to 30 s."""


class Counts:
    """What one process has answered since it began. Not for several threads: the event loop's."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels, self._began = dict(labels), time.time()
        # Zeros from the start: what is not there is missing, and not merely nothing yet.
        self._codes: dict[tuple[str, int], int] = {(kind, 200): 0 for kind in KINDS}
        self._under_way = dict.fromkeys(KINDS, 0)
        self._buckets: dict[str, list[int]] = {}
        self._sums = dict.fromkeys(KINDS, 0.0)

    def begin(self, kind: str) -> None:
        """A request of this kind came."""
        self._under_way[kind] += 1

    def end(self, kind: str, code: int, seconds: float | None) -> None:
        """It was answered with `code` (`NOBODY`: with nothing); `seconds` to the answer's head, None without one."""
        self._under_way[kind] -= 1
        self._codes[kind, code] = self._codes.get((kind, code), 0) + 1
        if seconds is not None:
            buckets = self._buckets.setdefault(kind, [0] * (len(EDGES) + 1))
            buckets[bisect_left(EDGES, seconds)] += 1
            self._sums[kind] += seconds

    def text(self, gauges: Mapping[str, float]) -> bytes:
        """All of it in Prometheus' text format; `gauges` by their names without the prefix."""
        lines = [
            *_head("titleshot_requests_total", "counter", "Requests by kind and by the status that was sent."),
            *(
                self._line("titleshot_requests_total", count, kind=kind, code=str(code))
                for (kind, code), count in self._codes.items()
            ),
            *_head("titleshot_request_seconds", "histogram", "Seconds from a request's head to its answer's head."),
            *self._histograms(),
            *_head("titleshot_in_flight", "gauge", "Requests under way."),
            *(self._line("titleshot_in_flight", count, kind=kind) for kind, count in self._under_way.items()),
        ]
        for name, value in {**gauges, "start_time_seconds": self._began}.items():
            lines += _head(f"titleshot_{name}", "gauge", name.replace("_", " ").capitalize() + ".")
            lines.append(self._line(f"titleshot_{name}", value))
        return ("\n".join(lines) + "\n").encode()

    def _histograms(self) -> Iterable[str]:
        name = "titleshot_request_seconds"
        edges = [*map(repr, EDGES), "+Inf"]
        for kind, buckets in self._buckets.items():
            for edge, count in zip(edges, accumulate(buckets), strict=True):
                yield self._line(f"{name}_bucket", count, kind=kind, le=edge)
            yield self._line(f"{name}_sum", self._sums[kind], kind=kind)
            yield self._line(f"{name}_count", sum(buckets), kind=kind)

    def _line(self, name: str, value: float, **labels: str) -> str:
        inside = ",".join(f'{label}="{_quoted(text)}"' for label, text in {**self._labels, **labels}.items())
        return f"{name}{{{inside}}} {value!r}"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _quoted(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

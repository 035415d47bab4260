"""Whether two models give the same answers: pairs of answers to the same request, compared field by field.

Pure, and bounded in memory: a pair is reduced to counts as soon as both halves are there. The unit is the
request, however many rows it holds: rows of one request are seldom independent.
"""

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from validations.policy import Tolerance
from validations.statistics import proportion, worst_of
from validations.verdict import Measurement, Value

Side = Literal["champion", "challenger"]
SHAPE = "shape"
"""The field that disagrees when status, row count, keys or kinds differ, or an answer cannot be read."""
_MISSING = object()


class Example(Value):
    """A pair that disagreed, for people: the field with the largest difference, and both answers."""

    request_id: str
    field: str
    difference: float
    champion: str
    challenger: str
    request: str = ""


@dataclass(slots=True)
class _Half:
    status: int
    answer: bytes
    request: bytes | None


class Pairing:
    """Fed with answers as they come, in any order; tells how often the two models disagree.

    Numbers a (champion's) and b agree when |a - b| <= abs + rel * |a|; everything else must be equal.
    `tolerances` go by field, "*" for every other one (default: rel 1e-6, abs 1e-9). Fields are `prediction`
    for scalar rows, `[0]`, `[1]`, ... for rows that are lists, the keys of rows that are objects.

    `slices` are columns of the request; only values with `min_slice` pairs are judged, the others of a column
    are pooled as "other". At most `max_waiting` halves wait for the other one (the oldest is given up as
    unpaired), and `examples` pairs are kept whole. A request id that comes twice from one side is counted
    in `duplicated`, and not compared unless its pair already was.
    """

    def __init__(
        self,
        *,
        tolerances: Mapping[str, Tolerance] | None = None,
        slices: Sequence[str] = (),
        min_slice: int = 30,
        max_waiting: int = 10_000,
        max_slices: int = 1_000,
        examples: int = 10,
    ) -> None:
        self.pairs = 0
        self.disagreements = 0
        self.duplicated = 0
        self.fields: Counter[str] = Counter()
        """How many requests each field disagreed in."""
        self._tolerances = dict(tolerances or {})
        self._otherwise = self._tolerances.pop("*", Tolerance(abs=1e-9, rel=1e-6))
        self._slices = tuple(slices)
        self._seen_columns: set[str] = set()
        self._min_slice, self._max_waiting, self._max_slices = min_slice, max_waiting, max_slices
        self._by_slice: dict[str, dict[str, list[int]]] = {column: {} for column in self._slices}
        self._waiting: dict[Side, dict[str, _Half]] = {"champion": {}, "challenger": {}}
        self._void: dict[tuple[Side, str], None] = {}
        self._done: dict[str, None] = {}
        self._given_up = 0
        self._kept = examples
        self._examples: list[tuple[float, int, Example]] = []

    @property
    def unpaired(self) -> int:
        """How many answers have no other half (yet)."""
        return self._given_up + sum(len(waiting) for waiting in self._waiting.values())

    @property
    def examples(self) -> list[Example]:
        """The pairs that disagreed most, the largest difference first."""
        return [example for *_, example in sorted(self._examples, key=lambda kept: kept[:2], reverse=True)]

    def add(self, side: Side, request_id: str, status: int, answer: bytes, request: bytes | None = None) -> None:
        """Take one answer: its HTTP status and body, and the request's body (needed once, from either side,
        where there are slices).
        """
        other: Side = "challenger" if side == "champion" else "champion"
        mine, theirs = self._waiting[side], self._waiting[other]
        if request_id in mine or request_id in self._done or (side, request_id) in self._void:
            self.duplicated += 1
            if mine.pop(request_id, None) is not None:
                _remember(self._void, (side, request_id), self._max_waiting)
            return
        if (other, request_id) in self._void:
            self._given_up += 1
            return
        half = _Half(status, answer, request)
        if request_id not in theirs:
            mine[request_id] = half
            if len(mine) > self._max_waiting:
                del mine[next(iter(mine))]
                self._given_up += 1
            return
        _remember(self._done, request_id, self._max_waiting)
        pair = {side: half, other: theirs.pop(request_id)}
        self._compare(request_id, pair["champion"], pair["challenger"])

    def measurements(self, confidence: float) -> dict[str, Measurement]:
        """`pairs`, `unpaired` and `duplicated` (exact); with pairs, `disagreement` (Clopper-Pearson over the
        pairs) and, with slices, `slice_disagreement`: of the worst slice, named in `where`.

        Its interval holds the highest disagreement of all judged slices (`statistics.worst_of`); its sample
        is all pairs; while no slice is large enough it is [0, 1], undecided. Raises ValueError when no
        request carries one of the columns to slice by: a misspelt one would otherwise look like agreement.
        """
        measured = {
            "pairs": Measurement.exact(self.pairs),
            "unpaired": Measurement.exact(self.unpaired),
            "duplicated": Measurement.exact(self.duplicated),
        }
        if not self.pairs:
            return measured
        overall = proportion(self.disagreements, self.pairs, confidence)
        fields = ", ".join(f"{field} in {count:,}" for field, count in self.fields.most_common(3))
        measured["disagreement"] = overall.model_copy(update={"note": fields})
        if self._slices:
            measured["slice_disagreement"] = self._worst(confidence)
        return measured

    def by_slice(self) -> list[tuple[str, str, int, int]]:
        """What is judged: (column, value, disagreements, pairs), worst rate first."""
        rows = []
        for column, values in self._by_slice.items():
            others = others_differing = 0
            for value, (k, n) in values.items():
                if n >= self._min_slice and value != "other":
                    rows.append((column, value, k, n))
                else:
                    others, others_differing = others + n, others_differing + k
            if others >= self._min_slice:
                rows.append((column, "other", others_differing, others))
        return sorted(rows, key=lambda row: (-row[2] / row[3], -row[3], row[0], row[1]))

    def _worst(self, confidence: float) -> Measurement:
        for column in self._slices:
            if column not in self._seen_columns:
                raise ValueError(f"no request carries the column '{column}', to split disagreement by")
        judged = [(f"{column} = {value}", k, n) for column, value, k, n in self.by_slice()]
        if not judged:
            note = f"no slice has {self._min_slice} pairs yet"
            return Measurement(value=self.disagreements / self.pairs, low=0, high=1, sample=self.pairs, note=note)
        _, worst = worst_of(judged, confidence)
        return worst.model_copy(update={"sample": self.pairs})

    def _compare(self, request_id: str, champion: _Half, challenger: _Half) -> None:
        self.pairs += 1
        differing: dict[str, float] = {}
        rows: set[int] | None = set()  # None: all of them
        if champion.status != challenger.status:
            differing[SHAPE], rows = math.inf, None
        elif champion.status < 300 and champion.answer != challenger.answer:
            rows = self._answers(champion.answer, challenger.answer, differing)
        if differing:
            self.disagreements += 1
            self.fields.update(self._bounded(differing))
            self._keep(request_id, differing, champion, challenger)
        if self._slices:
            self._slice(champion.request or challenger.request, rows)

    def _bounded(self, differing: Mapping[str, float]) -> set[str]:
        return {f if f in self.fields or len(self.fields) < 200 else "other" for f in differing}

    def _answers(self, a: bytes, b: bytes, differing: dict[str, float]) -> set[int] | None:
        """Fill `differing` (field -> difference); the rows it touches, None for all."""
        try:
            one, two = _rows(a), _rows(b)
        except ValueError:
            one, two = None, []
        if one is None or len(one) != len(two):
            differing[SHAPE] = math.inf
            return None
        touched = set()
        for at, (x, y) in enumerate(zip(one, two, strict=True)):
            for field, difference in self._values(x, y, ""):
                touched.add(at)
                differing[field] = max(difference, differing.get(field, 0.0))
        return touched

    def _values(self, a: Any, b: Any, path: str) -> Iterator[tuple[str, float]]:
        """The fields under `path` in which `a` and `b` differ, and by how much."""
        if a.__class__ in (int, float) and b.__class__ in (int, float):
            name = path or "prediction"
            difference = _apart(a, b, self._tolerances.get(name, self._otherwise))
            if difference:
                yield name, difference
        elif a.__class__ is not b.__class__:
            yield SHAPE, math.inf
        elif isinstance(a, dict | list):
            keys: Any = a.keys() if isinstance(a, dict) else range(len(a))
            others: Any = b.keys() if isinstance(b, dict) else range(len(b))
            if keys != others:
                yield SHAPE, math.inf
                return
            for key in keys:
                inner = f"[{key}]" if isinstance(a, list) else f".{key}" if path else key
                yield from self._values(a[key], b[key], path + inner)
        elif a != b:
            yield path or "prediction", math.inf

    def _slice(self, request: bytes | None, rows: set[int] | None) -> None:
        try:
            cells = request_rows(request or b"")
        except ValueError:
            cells = []
        for column, counts in self._by_slice.items():
            bad: dict[str, bool] = {}
            for at, row in enumerate(cells):
                value = row.get(column, _MISSING)
                if value is not _MISSING:
                    self._seen_columns.add(column)
                label = "missing" if value is None or value is _MISSING else str(value)
                bad[label] = bad.get(label, False) or rows is None or at in rows
            if not cells:
                bad["missing"] = rows is None or bool(rows)
            for label, disagrees in bad.items():
                known = label if label in counts or len(counts) < self._max_slices else "other"
                tally = counts.setdefault(known, [0, 0])
                tally[0] += disagrees
                tally[1] += 1

    def _keep(self, request_id: str, differing: Mapping[str, float], champion: _Half, challenger: _Half) -> None:
        field, difference = max(differing.items(), key=lambda item: item[1])
        if len(self._examples) >= self._kept and (not self._kept or difference <= self._examples[0][0]):
            return
        example = Example(
            request_id=request_id,
            field=field,
            difference=difference,
            champion=_excerpt(champion),
            challenger=_excerpt(challenger),
            request=(champion.request or challenger.request or b"")[:2000].decode(errors="replace"),
        )
        # Of equal differences the earlier stays: the counter falls.
        heapq.heappush(self._examples, (difference, -self.pairs, example))
        if len(self._examples) > self._kept:
            heapq.heappop(self._examples)


def request_rows(body: bytes | str) -> list[dict[str, Any]]:
    """The rows of a request to MLflow's `/invocations`, as column -> value.

    Takes `dataframe_split`, `dataframe_records`, `instances` (list of objects) and `inputs` (columns, or a
    list of objects). Raises ValueError for anything else, or for what is not JSON.
    """
    data = json.loads(body)
    if isinstance(data, dict):
        if isinstance(split := data.get("dataframe_split"), dict):
            try:
                return [dict(zip(split["columns"], row, strict=False)) for row in split["data"]]
            except (KeyError, TypeError) as error:
                raise ValueError("a dataframe_split is `columns` and `data`, a list of rows") from error
        for key in ("dataframe_records", "instances", "inputs"):
            found = data.get(key)
            if isinstance(found, list) and all(isinstance(row, dict) for row in found):
                return found
            if isinstance(found, dict):
                lists = {name: v if isinstance(v, list) else [v] for name, v in found.items()}
                length = max(map(len, lists.values()), default=0)
                return [{n: v[at] for n, v in lists.items() if at < len(v)} for at in range(length)]
    raise ValueError("no rows here: none of dataframe_split, dataframe_records, instances, inputs")


def _apart(a: float, b: float, tolerance: Tolerance) -> float:
    """How far apart, 0 within the tolerance; NaN agrees with NaN alone, and inf with inf."""
    difference = abs(a - b)
    if math.isnan(difference):
        return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf
    return 0.0 if difference <= tolerance.abs + tolerance.rel * abs(a) and difference < math.inf else difference


def _rows(answer: bytes) -> list[Any]:
    """The predictions of an answer, row by row; the answer itself is the only row where it has no list."""
    data = json.loads(answer)
    if isinstance(data, dict) and "predictions" in data:
        data = data["predictions"]
    return data if isinstance(data, list) else [data]


def _excerpt(half: _Half) -> str:
    return f"{half.status} {half.answer[:2000].decode(errors='replace')}"


def _remember(seen: dict[Any, None], key: Any, most: int) -> None:
    seen[key] = None
    if len(seen) > most:
        del seen[next(iter(seen))]

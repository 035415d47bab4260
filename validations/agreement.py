"""Whether two models give the same answers: pairs of answers to the same request, counted as they come.

Pure, and bounded in memory: a pair is reduced to counts as soon as both halves are there. The unit is the
request, however many rows it holds: rows of one request are seldom independent.
"""

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import orjson

from validations.compare import SHAPE, Comparison, parsed, predictions
from validations.gates import Tolerance
from validations.redact import Redaction
from validations.slices import Slice, Slices, worst
from validations.statistics import proportion
from validations.verdict import Measurement, Value

Side = Literal["champion", "challenger"]
_EXCERPT = 2000
_KEPT_BYTES = 64_000_000
"""Of all kept pairs together."""
_SESSIONS = 100_000
_Table = tuple[list[str], Sequence[Sequence[Any]]]
_NOTHING: _Table = [], ()


class Example(Value):
    """A pair that disagreed, for people: the field with the largest difference, and both answers."""

    request_id: str
    field: str
    difference: float
    champion: str
    challenger: str
    request: str = ""


class _Half(NamedTuple):
    status: int
    answer: bytes
    request: bytes | None


class Pairing:
    """Fed with answers as they come, in any order; tells how often the two models disagree.

    How fields are compared is said by `tolerances` (`compare.Comparison`), which columns of the request
    disagreement is split by in `slices`, `find_slices` and `min_slice` (`slices.Slices`). Values of what is named in
    `redact` never leave: not in examples, not in kept pairs, not in the names of slices.

    `once_per` is a column of the request (a session, a user): of each value only the first pair counts, the others
    are counted in `repeated` and not compared, since what one user asks is not independent. Requests without a value
    each count; of the values, so many of the latest are remembered that memory stays bounded.

    At most `max_waiting` halves of each side wait for the other one, and at most `max_bytes` of them in all (the
    oldest is given up as unpaired); `examples` pairs are kept whole, and the first `keep_pairs` are kept as predictions
    (`kept`). A request id that comes twice from one side is counted in `duplicated`, and not compared unless its
    pair already was.
    """

    def __init__(
        self,
        *,
        tolerances: Mapping[str, Tolerance] | None = None,
        slices: Sequence[str] = (),
        find_slices: bool = False,
        min_slice: int = 30,
        once_per: str = "",
        redact: Sequence[str] = (),
        keep_pairs: int = 0,
        max_waiting: int = 10_000,
        max_bytes: int = 256_000_000,
        max_slices: int = 1_000,
        examples: int = 10,
    ) -> None:
        self.pairs = 0
        self.disagreements = 0
        self.duplicated = 0
        self.repeated = 0
        self.fields: Counter[str] = Counter()
        """How many requests each field disagreed in."""
        self._comparison = Comparison(tolerances)
        self._redaction = Redaction(redact)
        self._slices: Slices | None = None
        if slices or find_slices:
            self._slices = Slices(slices, find=find_slices, min_slice=min_slice, values=max_slices, redact=redact)
        self._min_slice, self._max_waiting = min_slice, max_waiting
        self._once_per, self._once_per_seen = once_per, False
        self._sessions = _Recent(_SESSIONS)
        self._reads_requests = bool(self._slices or once_per)
        self._waiting: dict[Side, OrderedDict[str, _Half]] = {"champion": OrderedDict(), "challenger": OrderedDict()}
        self._void = _Recent(max_waiting)
        self._done = _Recent(max_waiting)
        self._max_bytes, self._waiting_bytes = max_bytes, 0
        self._given_up = 0
        self._most_examples = examples
        self._examples: list[tuple[float, int, Example]] = []
        self._keep_pairs, self._kept_bytes = keep_pairs, 0
        self._kept: list[tuple[str, bytes | None, bytes | None]] = []

    @property
    def unpaired(self) -> int:
        """How many answers have no other half (yet)."""
        return self._given_up + sum(len(waiting) for waiting in self._waiting.values())

    @property
    def examples(self) -> list[Example]:
        """The pairs that disagreed most, the largest difference first."""
        return [example for *_, example in sorted(self._examples, key=lambda kept: kept[:2], reverse=True)]

    def kept(self) -> Iterator[str]:
        """The kept pairs as lines of JSON, for labels that come later (`labels.read_pairs`): the request's id, and both
        answers reduced to their predictions, row by row; null where there was no such answer.
        """
        for request_id, *answers in self._kept:
            champion, challenger = (self._predictions(answer) for answer in answers)
            line = {"id": request_id, "champion": champion, "challenger": challenger}
            yield orjson.dumps(line).decode()

    def add(self, side: Side, request_id: str, status: int, answer: bytes, request: bytes | None = None) -> None:
        """Take one answer: its HTTP status and body, and the request's body (needed once, from either side,
        where there are slices or `once_per`, and for examples).
        """
        other: Side = "challenger" if side == "champion" else "champion"
        mine = self._waiting[side]
        if request_id in mine or request_id in self._done or (self._void and (side, request_id) in self._void):
            self.duplicated += 1
            if (void := mine.pop(request_id, None)) is not None:
                self._waiting_bytes -= _size(void)
                self._void.add((side, request_id))
            return
        if self._void and (other, request_id) in self._void:
            self._given_up += 1
            return
        half = _Half(status, answer, request)
        theirs = self._waiting[other].pop(request_id, None)
        if theirs is None:
            mine[request_id] = half
            self._waiting_bytes += _size(half)
            while mine and (len(mine) > self._max_waiting or self._waiting_bytes > self._max_bytes):
                self._waiting_bytes -= _size(mine.popitem(last=False)[1])
                self._given_up += 1
            return
        self._waiting_bytes -= _size(theirs)
        self._done.add(request_id)
        if side == "champion":
            self._compare(request_id, half, theirs)
        else:
            self._compare(request_id, theirs, half)

    def measurements(self, confidence: float, at: Sequence[float] = ()) -> dict[str, Measurement]:
        """`pairs`, `unpaired` and `duplicated` (exact; with `once_per` also `repeated`); with pairs, `disagreement`
        (Clopper-Pearson over the pairs) and, with slices, `slice_disagreement`: of the worst slice, named in `where`.

        The second is `slices.worst`, half of 1 - `confidence` for each end: it holds at every moment at once. `at` is
        the bound that it will be held against. While no slice is large enough it is [0, 1], undecided. Raises
        ValueError when no request carries one of the columns that were named: a misspelt one would otherwise look like
        agreement.
        """
        measured = {
            "pairs": Measurement.exact(self.pairs),
            "unpaired": Measurement.exact(self.unpaired),
            "duplicated": Measurement.exact(self.duplicated),
        }
        if self._once_per:
            measured["repeated"] = Measurement.exact(self.repeated)
        if not self.pairs:
            return measured
        if self._once_per and not self._once_per_seen:
            raise ValueError(f"no request carries the column '{self._once_per}', to count once per")
        overall = proportion(self.disagreements, self.pairs, confidence)
        fields = ", ".join(f"{field} in {count:,}" for field, count in self.fields.most_common(3))
        measured["disagreement"] = overall.model_copy(update={"note": fields})
        if self._slices is not None:
            measured["slice_disagreement"] = self.worst_slice((1 - confidence) / 2, (1 - confidence) / 2, at)
        return measured

    def table(self) -> list[Slice]:
        """The slices that are large enough to be judged, for `slices.worst`, `evidence` and `culprits`. Raises
        ValueError when no request carries one of the columns to slice by.
        """
        if self._slices is None:
            return []
        for column in self._slices.unseen if self.pairs else ():
            raise ValueError(f"no request carries the column '{column}', to split disagreement by")
        return self._slices.table()

    def by_slice(self) -> list[tuple[str, str, int, int]]:
        """What is judged: (column, value, disagreements, pairs), worst rate first."""
        return [] if self._slices is None else self._slices.by_slice()

    def worst_slice(self, alpha_bad: float, alpha_good: float, at: Sequence[float] = ()) -> Measurement:
        """`slices.worst` of all judged slices; [0, 1] while there is none. Raises as `table`."""
        table = self.table()
        if not table:
            note = f"no slice has {self._min_slice} pairs yet"
            value = self.disagreements / self.pairs if self.pairs else 0.0
            return Measurement(value=value, low=0, high=1, sample=self.pairs, note=note)
        return worst(table, alpha_bad, alpha_good, pairs=self.pairs, at=at)

    def _compare(self, request_id: str, champion: _Half, challenger: _Half) -> None:
        columns, cells = _NOTHING
        if self._reads_requests:
            columns, cells = _table(champion.request or challenger.request)
            if self._once_per and self._repeats(columns, cells):
                self.repeated += 1
                return
        self.pairs += 1
        differing: dict[str, float] = {}
        rows: Collection[int] | None = ()  # None: all of them
        if champion.status != challenger.status:
            differing[SHAPE], rows = math.inf, None
        elif champion.status < 300 and champion.answer != challenger.answer:
            rows = self._comparison.answers(champion.answer, challenger.answer, differing)
        if differing:
            self.disagreements += 1
            self.fields.update({f if f in self.fields or len(self.fields) < 200 else "other" for f in differing})
            self._keep_example(request_id, differing, champion, challenger)
        if self._slices is not None:
            self._slices.add(columns, cells, rows)
        if len(self._kept) < self._keep_pairs:
            self._keep_predictions(request_id, champion, challenger)

    def _repeats(self, columns: list[str], cells: Sequence[Sequence[Any]]) -> bool:
        """Whether this request's session had a pair before."""
        if self._once_per not in columns:
            return False
        self._once_per_seen = True
        value = cells[0][columns.index(self._once_per)] if cells else None
        if value is None:
            return False
        key = hash(value if isinstance(value, str) else str(value))
        if key in self._sessions:
            return True
        self._sessions.add(key)
        return False

    def _keep_example(
        self, request_id: str, differing: Mapping[str, float], champion: _Half, challenger: _Half
    ) -> None:
        field, difference = max(differing.items(), key=lambda item: item[1])
        if len(self._examples) >= self._most_examples and (
            not self._most_examples or difference <= self._examples[0][0]
        ):
            return
        request = champion.request or challenger.request or b""
        example = Example(
            request_id=request_id,
            field=field,
            difference=difference,
            champion=self._excerpt(champion),
            challenger=self._excerpt(challenger),
            request=self._redaction.request(request, _EXCERPT) if request else "",
        )
        # Of equal differences the earlier stays: the counter falls.
        heapq.heappush(self._examples, (difference, -self.pairs, example))
        if len(self._examples) > self._most_examples:
            heapq.heappop(self._examples)

    def _excerpt(self, half: _Half) -> str:
        return f"{half.status} {self._redaction.answer(half.status, half.answer, _EXCERPT)}"

    def _keep_predictions(self, request_id: str, champion: _Half, challenger: _Half) -> None:
        one = champion.answer if champion.status < 300 else None
        two = challenger.answer if challenger.status < 300 else None
        self._kept_bytes += len(one or b"") + len(two or b"")
        if self._kept_bytes > _KEPT_BYTES:
            self._keep_pairs = 0  # the first ones stay: choosing among them would bias them
            return
        self._kept.append((request_id, one, two))

    def _predictions(self, answer: bytes | None) -> list[Any] | None:
        try:
            return None if answer is None else self._redaction.rows(predictions(answer))
        except (ValueError, RecursionError):
            return None


def _size(half: _Half) -> int:
    return len(half.answer) + len(half.request or b"")


class _Recent:
    """Remembers at least the latest `most` things, and at most twice as many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._new: set[Any] = set()
        self._old: set[Any] = set()

    def __contains__(self, thing: object) -> bool:
        return thing in self._new or thing in self._old

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def add(self, thing: object) -> None:
        self._new.add(thing)
        if len(self._new) >= self._most:
            self._old, self._new = self._new, set()


def request_rows(body: bytes | str) -> list[dict[str, Any]]:
    """The rows of a request to MLflow's `/invocations`, as column -> value.

    Takes `dataframe_split`, `dataframe_records`, `instances` (list of objects) and `inputs` (columns, or a
    list of objects). Raises ValueError for anything else, or for what is not JSON.
    """
    return _request_rows(parsed(body))


def request_table(body: bytes | str) -> _Table:
    """The same as `request_rows`: the names of the columns, and for each row a list of values, None for none."""
    data = parsed(body)
    split = data.get("dataframe_split") if isinstance(data, dict) else None
    if isinstance(split, dict):
        columns, values = split.get("columns"), split.get("data")
        if (
            isinstance(columns, list)
            and isinstance(values, list)
            and all(column.__class__ is str for column in columns)
            and all(row.__class__ is list and len(row) == len(columns) for row in values)
        ):
            return columns, values
    rows = _request_rows(data)
    if len(rows) == 1:
        return list(map(str, rows[0])), [list(rows[0].values())]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return list(map(str, keys)), [[row.get(key) for key in keys] for row in rows]


def _table(request: bytes | None) -> _Table:
    """A request's table; nothing where it cannot be read."""
    try:
        return request_table(request) if request else _NOTHING
    except ValueError:
        return _NOTHING


def _request_rows(data: Any) -> list[dict[str, Any]]:
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

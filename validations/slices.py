"""Disagreement by slice of traffic: columns that were listed, slices that are found, and the worst of them all.

Pure. The unit is the request: it counts once in each slice that one of its rows lies in. Slices are made from requests
alone and before they are judged, never from how the answers compare, and each has its share of the error rate from
the moment it exists, so looking at many of them, again and again, finds no more than it should.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from validations.eprocess import RATES, bernoulli
from validations.redact import REDACTED
from validations.statistics import NoSample
from validations.verdict import Measurement

LEARN = 200
"""How many requests the found slices are cut by; those themselves are not counted in them."""
RANGES = 5
VALUES = 10
COLUMNS = 50
CROSSED = 10
"""Of so many columns every two are crossed."""
_MISSING, _OTHER = 0, 1
_BATCH = 2048
_LONGEST = 60


class Slice(NamedTuple):
    """`k` disagreements in the `n` pairs of one slice, and its `weight`: its share of the error rate.

    One that is not `proven` is only searched for disagreement: it need not be shown to be good.
    """

    name: str
    k: int
    n: int
    weight: float
    proven: bool = True


def evidence(table: Sequence[Slice], bound: float) -> float:
    """The natural logarithm of an e-value against "no slice of `table` disagrees in more than `bound` of its pairs".

    The weighted mean of the slices' own e-values (`eprocess.bernoulli`), so it may be asked at any moment.
    """
    if not table or bound >= 1:
        return -math.inf
    k, n, weight = _columns(table)
    bad, _ = bernoulli(k, n, max(bound, float(RATES[0])))
    return float(logsumexp(bad + np.log(weight)))


def worst(
    table: Sequence[Slice], alpha_bad: float, alpha_good: float, *, pairs: int, at: Sequence[float] = ()
) -> Measurement:
    """The highest disagreement of all slices, with an interval that holds at every moment at once.

    The chance that it ever lies above the truth is at most `alpha_bad` over all slices together (`evidence`), and the
    chance that a slice is worse than the upper end at most `alpha_good`: for that every slice must itself have
    been shown to be good, which needs no correction. Ends are rounded outward to `eprocess.RATES` and `at` (the
    bound that they will be held against). The slice named carries most of the evidence. Raises `NoSample` for
    an empty table. `pairs` is the sample.
    """
    if not table:
        raise NoSample("no slice is large enough to be measured")
    grid = np.union1d(RATES, [m for m in at if 0 < m < 1])
    k, n, weight = _columns(table)

    def is_bad(m: float) -> bool:
        return bool(logsumexp(bernoulli(k, n, m)[0] + np.log(weight)) >= -math.log(alpha_bad))

    must = np.array([one.proven for one in table])

    def is_good(m: float) -> bool:
        return bool(np.all(bernoulli(k[must], n[must], m)[1] >= -math.log(alpha_good)))

    below = _last(grid, is_bad)
    above = _last(-grid[::-1], lambda m: is_good(-m)) if must.any() else 0
    low = float(np.nextafter(grid[below - 1], np.inf)) if below else 0.0
    high = float(np.nextafter(grid[grid.size - above], -np.inf)) if above else 1.0
    rates = k / n
    blame = bernoulli(k, n, grid[below - 1])[0] + np.log(weight) if below else rates
    named = max(range(len(table)), key=lambda i: (blame[i], rates[i], n[i]))
    value = min(max(float(rates[named]), low), 1.0)
    one = table[named]
    note = f"{one.k:,} of {one.n:,}"
    return Measurement(value=value, low=low, high=max(high, value), sample=pairs, where=one.name, note=note)


def culprits(table: Sequence[Slice], bound: float, alpha: float) -> list[Slice]:
    """The slices that are surely worse than `bound`, the surest first: with probability 1 - `alpha` all of them are.

    Closed testing of weighted means of e-values (Vovk and Wang 2021): a slice is named where every set of slices that
    holds it is rejected; the sets that come nearest to being kept add the slices with the least evidence.
    """
    if not table or bound >= 1:
        return []
    k, n, weight = _columns(table)
    e = np.exp(np.minimum(bernoulli(k, n, max(bound, float(RATES[0])))[0], 600))
    order = np.argsort(e)
    # Weight that none of these slices has (slices yet to come) counts as evidence of nothing.
    rest = max(0.0, 1 - float(weight.sum()))
    money = np.cumsum((weight * e)[order])
    shares = np.cumsum(weight[order]) + rest
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    found = []
    for i in np.flatnonzero(e >= 1 / alpha):
        own, share = weight[i] * e[i], weight[i]
        before = slice(0, int(place[i]))
        means = np.append((money[before] + own) / (shares[before] + share), own / (share + rest))
        if means.min() >= 1 / alpha:
            found.append(int(i))
    return [table[i] for i in sorted(found, key=lambda i: -e[i] * weight[i])]


class Slices:
    """Counts disagreement by slice. `listed` columns are cut by value; with `find`, so are all others that hold a
    few values, and the numbers among them by quantiles of the first `LEARN` requests; every two of the first
    `CROSSED` of these are crossed. Of columns in `redact` no value is shown.

    Of a listed column at most `values` are told apart. Memory is bounded by that and the constants above.
    """

    def __init__(
        self,
        listed: Sequence[str] = (),
        *,
        find: bool = False,
        min_slice: int = 30,
        values: int = 1_000,
        redact: Collection[str] = (),
    ) -> None:
        self._listed = {column: _Listed(column, min_slice, values, hidden=column in redact) for column in listed}
        self._found = _Found(frozenset(listed), redact) if find else None
        self._min_slice = min_slice
        self._unseen = set(listed)
        self._layouts: dict[tuple[str, ...], list[int]] = {}
        self._columns: list[str] = []
        self._places = [-1] * len(listed)

    @property
    def unseen(self) -> list[str]:
        """Listed columns that no request has carried."""
        return sorted(self._unseen)

    def add(self, columns: list[str], rows: Sequence[Sequence[Any]], bad: Collection[int] | None) -> None:
        """Take a pair: the request's columns and rows (all as long as `columns`; none where it cannot be read), and
        the rows in which the answers disagree (None: all).
        """
        if not rows:
            columns, rows, bad = [], [()], None if bad is None or bad else ()
        if columns != self._columns:
            self._columns, self._places = columns, self._layout(columns)
        if len(rows) == 1:
            row, disagrees = rows[0], bad is None or bool(bad)
            for tally, place in zip(self._listed.values(), self._places, strict=True):
                tally.one(row[place] if place >= 0 else None, disagrees)
        else:
            for tally, place in zip(self._listed.values(), self._places, strict=True):
                tally.several([row[place] if place >= 0 else None for row in rows], bad)
        if self._found is not None:
            self._found.add(columns, rows, bad)

    def table(self) -> list[Slice]:
        """The slices that are large enough to be judged."""
        share = 0.5 if self._listed and self._found else 1.0
        table = []
        for tally in self._listed.values():
            column = share / len(self._listed)
            table += [
                Slice(f"{tally.column} = {label}", k, n, column * weight) for label, k, n, weight in tally.judged()
            ]
        if self._found is not None:
            table += [
                one._replace(weight=one.weight * share) for one in self._found.slices() if one.n >= self._min_slice
            ]
        return table

    def by_slice(self) -> list[tuple[str, str, int, int]]:
        """What is judged and not crossed: (column, value, disagreements, pairs), worst rate first."""
        rows = []
        for one in self.table():
            column, value = one.name.split(" = ", 1)
            if one.proven:
                rows.append((column, value, one.k, one.n))
        return sorted(rows, key=lambda row: (-row[2] / row[3], -row[3], row[0], row[1]))

    def _layout(self, columns: list[str]) -> list[int]:
        key = tuple(columns)
        if (places := self._layouts.get(key)) is None:
            at = {column: place for place, column in enumerate(columns)}
            self._unseen.difference_update(at)
            places = [at.get(column, -1) for column in self._listed]
            if len(self._layouts) < 1000:
                self._layouts[key] = places
        return places


class _Listed:
    """The values of one listed column: (disagreements, pairs, rank; -1 while it is too small) each.

    A pair whose value had been seen in fewer than `min_slice` pairs also counts as "other": counts that only grow,
    so what is rare is judged without ever being judged anew.
    """

    def __init__(self, column: str, min_slice: int, most: int, *, hidden: bool) -> None:
        self.column = column
        self._min_slice, self._most, self._hidden = min_slice, most, hidden
        self._by_value: dict[Any, list[int]] = {}
        self._by_label: dict[str, list[int]] = {}
        self._other = [0, 0, -1]
        self._ranks = 0

    def one(self, value: Any, disagrees: bool) -> None:  # noqa: FBT001 - called for every pair
        """Count a pair whose request is one row."""
        if self._count(self._entry(value), disagrees):
            self._count(self._other, disagrees)

    def several(self, values: Sequence[Any], bad: Collection[int] | None) -> None:
        """Count a pair whose request is several rows: once for each value."""
        touched: dict[int, tuple[list[int], bool]] = {}
        for at, value in enumerate(values):
            entry = self._entry(value)
            before = id(entry) in touched and touched[id(entry)][1]
            touched[id(entry)] = entry, before or bad is None or at in bad
        rare = [disagrees for entry, disagrees in touched.values() if self._count(entry, disagrees)]
        if rare and id(self._other) not in touched:
            self._count(self._other, any(rare))

    def _count(self, entry: list[int], disagrees: bool) -> bool:  # noqa: FBT001
        """Count; whether this value was rare until now."""
        entry[1] += 1
        if disagrees:
            entry[0] += 1
        if entry[2] >= 0:
            return False
        if entry[1] >= self._min_slice:
            entry[2], self._ranks = self._ranks, self._ranks + 1
        return entry is not self._other

    def _entry(self, value: Any) -> list[int]:
        try:
            found = self._by_value.get(value)
        except TypeError:  # a list or an object
            return self._labelled(value)
        if found is None:
            found = self._labelled(value)
            if len(self._by_value) < 2 * self._most and len(str(value)) <= _LONGEST:
                self._by_value[value] = found
        return found

    def judged(self) -> Iterator[tuple[str, int, int, float]]:
        """(label, disagreements, pairs, share of the column's weight) of what is large enough."""
        rare = "other" in self._by_label or any(entry[2] < 0 for entry in self._by_label.values())
        for at, (label, (k, n, rank)) in enumerate(self._by_label.items()):
            if label != "other" and rank >= 0:
                yield (f"{REDACTED} {at + 1}" if self._hidden and label != "missing" else label), k, n, _share(rank)
        k, n, rank = self._other
        if rare and rank >= 0:
            yield "other", k, n, _share(rank)

    def _labelled(self, value: Any) -> list[int]:
        label = "missing" if value is None else str(value)[:_LONGEST]
        if label not in self._by_label:
            if len(self._by_label) >= self._most or label == "other":
                return self._by_label.setdefault("other", self._other)
            self._by_label[label] = [0, 0, -1]
        return self._by_label[label]


def _share(rank: int) -> float:
    """The first eight slices of a column share half of its weight, the next sixteen a quarter, and so on."""
    block = int(math.log2(rank / 8 + 1))
    return math.ldexp(1 / 16, -2 * block)


class _Cut(NamedTuple):
    """How a found column is cut: the code of each value, and the label of each code."""

    column: str
    labels: list[str]
    codes: Callable[[Sequence[Any]], NDArray[np.int64]]


class _Found:
    """Slices of all columns but the listed ones, cut by the first requests; counted in batches."""

    def __init__(self, listed: frozenset[str], redact: Collection[str]) -> None:
        self._listed, self._redact = listed, redact
        self._learned: list[tuple[list[str], Sequence[Sequence[Any]]]] | None = []
        self._cuts: list[_Cut] = []
        self._crossed: list[tuple[int, int]] = []
        self._counts: list[NDArray[np.int64]] = []
        """For each column, then for each two that are crossed: an array (2, codes) of disagreements and pairs."""
        self._columns: list[str] | None = None
        self._pick: Callable[[Sequence[Any]], Sequence[Any]] = tuple
        self._pickers: dict[tuple[str, ...], Callable[[Sequence[Any]], Sequence[Any]]] = {}
        self._rows: list[Sequence[Any]] = []
        self._bad: list[int] = []
        self._owners: list[int] = []
        """The pair of each row, where a request of several rows is among them."""
        self._pairs = 0

    def add(self, columns: list[str], rows: Sequence[Sequence[Any]], bad: Collection[int] | None) -> None:
        if self._learned is not None:
            self._learned.append((columns, rows[:5]))
            if len(self._learned) == LEARN:
                self._learn()
            return
        if columns != self._columns:
            self._columns, self._pick = columns, self._picker(columns)
        if len(rows) > 1 and len(self._owners) < len(self._rows):
            self._owners = list(range(len(self._rows)))
        for at, row in enumerate(rows):
            if bad is None or at in bad:
                self._bad.append(len(self._rows))
            self._rows.append(self._pick(row))
            if self._owners or len(rows) > 1:
                self._owners.append(self._pairs)
        self._pairs += 1
        if len(self._rows) >= _BATCH:
            self._count()

    def slices(self) -> Iterator[Slice]:
        """All of them, with weights that add up to 1: half for single columns, half for two crossed."""
        if self._rows:
            self._count()
        half = 0.5 if self._crossed else 1.0
        cells: list[list[tuple[str, ...]]] = [[(label,) for label in cut.labels] for cut in self._cuts]
        cells += [[x + y for x in cells[i] for y in cells[j]] for i, j in self._crossed]
        names = [cut.column for cut in self._cuts]
        names += [f"{names[i]}, {names[j]}" for i, j in self._crossed]
        for at, (name, labels, counts) in enumerate(zip(names, cells, self._counts, strict=True)):
            single = at < len(self._cuts)
            weight = half / (len(self._cuts) if single else len(self._crossed)) / len(labels)
            for label, k, n in zip(labels, *counts.tolist(), strict=True):
                if n:
                    yield Slice(f"{name} = {', '.join(label)}", k, n, weight, proven=single)

    def _learn(self) -> None:
        """Cut the columns; from here on they are counted."""
        values: dict[str, list[Any]] = {}
        for columns, rows in self._learned or ():
            for at, column in enumerate(columns):
                if column not in self._listed and (column in values or len(values) < COLUMNS):
                    values.setdefault(column, []).extend(row[at] for row in rows)
        self._learned = None
        cuts = (_cut(column, seen, hidden=column in self._redact) for column, seen in values.items())
        self._cuts = [cut for cut in cuts if cut is not None]
        few = range(min(CROSSED, len(self._cuts)))
        self._crossed = [(i, j) for i in few for j in few if i < j]
        sizes = [len(cut.labels) for cut in self._cuts]
        sizes += [sizes[i] * sizes[j] for i, j in self._crossed]
        self._counts = [np.zeros((2, size), dtype=np.int64) for size in sizes]

    def _picker(self, columns: list[str]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """What takes the cut columns, in their order, out of a row of a request with these `columns`."""
        key = tuple(columns)
        if (pick := self._pickers.get(key)) is None:
            at = {column: place for place, column in enumerate(columns)}
            places = [at.get(cut.column, -1) for cut in self._cuts]
            if len(places) > 1 and min(places) >= 0:
                pick = itemgetter(*places)
            else:

                def pick(row: Sequence[Any]) -> Sequence[Any]:
                    return [row[place] if place >= 0 else None for place in places]

            if len(self._pickers) < 1000:
                self._pickers[key] = pick
        return pick

    def _count(self) -> None:
        """Add the batch to the counts."""
        rows, bad = self._rows, np.zeros(len(self._rows), dtype=bool)
        bad[self._bad] = True
        every = np.ones(len(rows), dtype=bool)
        owners = np.array(self._owners) if self._owners else None
        self._rows, self._bad, self._owners, self._pairs = [], [], [], 0
        codes = [cut.codes([row[at] for row in rows]) for at, cut in enumerate(self._cuts)]
        codes += [codes[i] * len(self._cuts[j].labels) + codes[j] for i, j in self._crossed]
        for code, counts in zip(codes, self._counts, strict=True):
            for side, some in enumerate((bad, every)):
                seen = code[some]
                if owners is not None:
                    # A request counts once in each slice.
                    seen = np.unique(owners[some] * counts.shape[1] + seen) % counts.shape[1]
                counts[side] += np.bincount(seen, minlength=counts.shape[1])


def _cut(column: str, values: list[Any], *, hidden: bool) -> _Cut | None:
    """Cut a column by what its first requests held; None where that is no number and nothing that comes again."""
    present = [value for value in values if isinstance(value, str | int | float)]
    seen = Counter(present)
    if len(seen) > VALUES and all(not isinstance(value, str | bool) for value in present):
        numbers = np.array(present, dtype=np.float64)
        edges = np.unique(np.quantile(numbers, np.arange(1, RANGES) / RANGES))
        edges = edges[(edges > numbers.min()) & np.isfinite(edges)]
        if not edges.size:
            return None
        marks = [f"{edge:.4g}" for edge in edges]
        labels = [f"under {marks[0]}"]
        labels += [f"{low} to {high}" for low, high in itertools.pairwise(marks)]
        labels.append(f"{marks[-1]} and over")
        codes: Callable[[Sequence[Any]], NDArray[np.int64]] = _ranges(edges)
    else:
        kept = [value for value, count in seen.most_common(VALUES) if count >= max(2, 0.02 * len(values))]
        if not kept:
            return None
        labels = [repr(value) if value in ("missing", "other") else str(value)[:_LONGEST] for value in kept]
        codes = _values({value: place + 2 for place, value in enumerate(kept)})
    if hidden:
        labels = [f"{REDACTED} {at + 1}" for at in range(len(labels))]
    return _Cut(column, ["missing", "other", *labels], codes)


def _ranges(edges: NDArray[np.float64]) -> Callable[[Sequence[Any]], NDArray[np.int64]]:
    def codes(values: Sequence[Any]) -> NDArray[np.int64]:
        try:
            numbers = np.array(values, dtype=np.float64)
            others = np.zeros(0, dtype=np.int64)
        except (TypeError, ValueError):
            is_number = [value is None or isinstance(value, int | float) for value in values]
            numbers = np.array([v if ok else None for v, ok in zip(values, is_number, strict=True)], dtype=np.float64)
            others = np.flatnonzero(~np.array(is_number))
        found = np.searchsorted(edges, numbers, side="right") + 2
        found[np.isnan(numbers)] = _MISSING
        found[others] = _OTHER
        return found

    return codes


def _values(known: dict[Any, int]) -> Callable[[Sequence[Any]], NDArray[np.int64]]:
    known = {None: _MISSING, **known}

    def code(value: Any) -> int:
        try:
            return known.get(value, _OTHER)
        except TypeError:  # a list or an object
            return _OTHER

    def codes(values: Sequence[Any]) -> NDArray[np.int64]:
        try:
            return np.array([known.get(value, _OTHER) for value in values], dtype=np.int64)
        except TypeError:
            return np.array([code(value) for value in values], dtype=np.int64)

    return codes


def _columns(table: Sequence[Slice]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    k, n, weight = np.array([(one.k, one.n, one.weight) for one in table], dtype=np.float64).T
    return k, n, weight


def _last(grid: NDArray[np.float64], holds: Callable[[float], bool]) -> int:
    """How many of the first entries of `grid` hold, where none does after one that does not (bisection)."""
    low, high = 0, grid.size
    while low < high:
        middle = (low + high) // 2
        if holds(float(grid[middle])):
            low = middle + 1
        else:
            high = middle
    return low

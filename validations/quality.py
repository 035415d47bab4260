"""Offline metrics of the challenger, and against the champion on the same held-out rows.

The metrics are those of `policy.OFFLINE_METRICS`, each scikit-learn's (at the threshold 0.5 where one is needed),
and functions of the user's own. Bound the `_delta` (challenger minus champion) of one that is better lower with `max`.
"""

import difflib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, sparse, stats

from validations.gates import METRIC_ALIASES, OFFLINE_METRICS, Better
from validations.statistics import Floats, NoSample, paired_bootstrap, proportion
from validations.verdict import Measurement

Weighted = Callable[[Floats], Floats]
"""A metric prepared for its rows: weights (b, n) in, values (b,) out; NaN where it does not exist."""
Metric = Callable[[Floats, Floats], Weighted]
"""Outcomes and predictions in, the prepared metric out."""
Own = Callable[..., Any]
"""A user's metric: `f(y_true, y_pred)`, also with `sample_weight`; a number, or one number per row."""
Codes = NDArray[np.int64]

MOST_RESAMPLES, MOST_IN_SLICES = 4000, 1000
"""Beyond this the tails are taken as normal: a high confidence (many slices) would ask for ever more draws."""
MOST_LABELS = 1000


def measurements(
    y: ArrayLike,
    champion: Any,
    challenger: Any,
    metrics: Iterable[str],
    confidence: float,
    *,
    classes: Sequence[str | int] = (),
    functions: Mapping[str, Own] | None = None,
    resamples: int = 400,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Measure `<metric>` of the challenger, and with a champion `<metric>_champion` and `<metric>_delta`.

    `y` (n,) are the outcomes: 0 and 1, numbers, or labels. Predictions are scores, probabilities, numbers or
    labels (n,), or probabilities (n, K), one column per class. The classes are in the order of `classes`; else
    in that of the columns' names where those are the labels; else sorted, as scikit-learn has them. Of two classes
    the second is the positive one. `functions` (by name) get outcomes and predictions as they are.

    Intervals of accuracy, recall and (without `_delta`) precision are those of shares: Clopper and Pearson's, and
    Tango's (1998) for the paired difference, which also holds where the versions hardly ever differ. All others are
    paired bootstrap percentiles, widened by t / z * sqrt(n / (n - 1)) (Hesterberg 2015), the same for the same data.
    Coverage of 95 %, measured at n = 100 (`python -m benchmarks.quality`): 90 to 98 %; of accuracy and recall 95 % and
    more where errors are rare (a bootstrap: 57 to 87 %), but of the deltas of f1 and balanced accuracy 80 % and of
    precision 61 % there; 84 % for the rmse of heavy tails. All reach 89 % at n = 500.

    Raises ValueError: an unknown metric (with the nearest right name), lengths that differ, NaN, outcomes
    that do not suit the metric; `NoSample` for no rows, or a metric that needs two classes and sees one.
    """
    rows = _Rows.of(y, challenger, champion, classes)
    return _measured(rows, list(metrics), functions or {}, confidence, (resamples, MOST_RESAMPLES), seed)


def by_slice(
    y: ArrayLike,
    champion: Any,
    challenger: Any,
    metrics: Iterable[str],
    parts: Mapping[str, Codes],
    confidence: float,
    *,
    classes: Sequence[str | int] = (),
    functions: Mapping[str, Own] | None = None,
    seed: int = 0,
) -> dict[str, list[Measurement]]:
    """As `measurements`, for each of `parts` (name -> row numbers): per metric a list with the name in `where`.

    The error probability is shared among the parts (Bonferroni), so all intervals of one metric hold together.
    Raises `NoSample` where there is no part, or a metric does not exist in one, which the message names.
    """
    if not parts:
        raise NoSample("no slice has enough rows: lower `min_slice`, or bring more held-out rows")
    rows = _Rows.of(y, challenger, champion, classes)
    asked, shared = list(metrics), 1 - (1 - confidence) / len(parts)
    found: dict[str, list[Measurement]] = {}
    for name, at in parts.items():
        try:
            measured = _measured(rows.take(at), asked, functions or {}, shared, (400, MOST_IN_SLICES), seed)
        except NoSample as error:
            raise NoSample(f"slice {name} ({at.size:,} rows): {error}; a larger `min_slice` pools it") from error
        for metric, value in measured.items():
            found.setdefault(metric, []).append(value.model_copy(update={"where": name}))
    return found


def worst(measured: Sequence[Measurement], better: Better, rows: int) -> Measurement:
    """The worst of several slices: which one it is, and an interval for the worst true value.

    The intervals must hold together. For a metric that is better higher the lowest true value lies between
    the lowest lower end and the lowest upper end; the slice named has that upper end: it is the one that is most
    surely bad. The sample is `rows`, since all of them were looked at.
    """
    if better == "higher":
        named = min(measured, key=lambda one: (one.high, one.value))
        low, high = min(one.low for one in measured), named.high
    else:
        named = max(measured, key=lambda one: (one.low, one.value))
        low, high = named.low, max(one.high for one in measured)
    note = f"{named.sample:,} rows, of {len(measured)} slices"
    return named.model_copy(update={"low": low, "high": high, "sample": rows, "note": note})


def slices(columns: Mapping[str, Any], least: int) -> dict[str, Codes]:
    """Cut rows into slices by each of `columns` (name -> values): name of the slice -> its row numbers.

    A slice is a value of the column; numbers with more than ten different values are cut into quartiles. Missing
    values are a slice too. Those with fewer than `least` rows are pooled as "other", which is left out where
    it is small itself.
    """
    import pandas as pd

    found: dict[str, Codes] = {}
    for column, values in columns.items():
        series = pd.Series(values).reset_index(drop=True)
        numbers = pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series)
        if numbers and series.nunique() > 10:
            names = _quartiles(column, series.to_numpy(dtype=np.float64, na_value=np.nan))
        else:
            names = np.array([f"{column} = {v}" for v in series.astype(object).where(series.notna(), "missing")])
        labels, codes, counts = np.unique(names, return_inverse=True, return_counts=True)
        for label in np.flatnonzero(counts >= least):
            found[str(labels[label])] = np.flatnonzero(codes == label)
        other = np.flatnonzero(counts[codes] < least)
        if other.size >= least:
            found[f"{column} = other"] = other
    return found


def _quartiles(column: str, values: Floats) -> NDArray[np.str_]:
    edges = np.unique(np.nanquantile(values, [0.25, 0.5, 0.75]))
    ends = [f"{edge:g}" for edge in edges]
    between = [f"{low} < {column} <= {high}" for low, high in itertools.pairwise(ends)]
    names = np.array([f"{column} <= {ends[0]}", *between, f"{column} > {ends[-1]}", f"{column} = missing"])
    return names[np.where(np.isnan(values), len(ends) + 1, np.searchsorted(edges, values))]


# --- rows and answers


@dataclass(frozen=True, slots=True)
class _Side:
    """One version's answers: as they are; as scores; as chosen classes; as a probability per class."""

    raw: NDArray[Any]
    scores: Floats | None
    chosen: Codes | None = None
    matrix: Floats | None = None
    labels: bool = False
    """Whether it answers labels, so that nothing is known of scores."""

    def take(self, at: Codes) -> "_Side":
        def part(values: Any) -> Any:
            return None if values is None else values[at]

        return _Side(self.raw[at], part(self.scores), part(self.chosen), part(self.matrix), self.labels)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Held-out rows: outcomes as they are; as numbers; as classes. `sides` begins with the challenger."""

    raw: NDArray[Any]
    truth: Floats | None
    binary: bool
    codes: Codes | None
    sides: tuple[_Side, ...]

    @classmethod
    def of(cls, y: ArrayLike, challenger: Any, champion: Any, classes: Sequence[str | int]) -> "_Rows":
        raw = np.asarray(y)
        if raw.ndim != 1:
            raise ValueError(f"the outcomes have the shape {raw.shape}: wanted (n,)")
        if not raw.size:
            raise NoSample("no held-out rows to measure quality on")
        answers = {"challenger": challenger} | ({} if champion is None else {"champion": champion})
        arrays = {side: _array(answer, raw.size, side) for side, answer in answers.items()}
        truth = _numbers(raw)
        if gone := _missing(raw):
            raise ValueError(f"{gone:,} of the outcomes are NaN: leave those rows out")
        zero_one = truth is not None and bool(np.isin(truth, (0, 1)).all())
        if not classes and truth is not None and zero_one:
            sides = tuple(_binary(array, side, ("0", "1"), _named(answers[side])) for side, array in arrays.items())
            return cls(raw, truth, True, truth.astype(np.int64), sides)
        if truth is not None and not classes and not (np.mod(truth, 1) == 0).all():
            return cls(raw, truth, False, None, tuple(_Side(a, _column(a)) for a in arrays.values()))
        values = raw.astype(str) if truth is None else truth
        order = _order(values, classes, [_named(answer) for answer in answers.values()])
        if order is None:
            return cls(raw, truth, False, None, tuple(_Side(a, _column(a)) for a in arrays.values()))
        codes = _codes(values, {label: at for at, label in enumerate(order)})
        if (codes < 0).any():
            raise ValueError(f"the outcome '{raw[codes < 0][0]}' is not among the `classes`: {', '.join(order)}")
        if len(order) == 2 and (classes or truth is None):
            sides = tuple(_binary(array, side, order, _named(answers[side])) for side, array in arrays.items())
            return cls(raw, codes.astype(np.float64), True, codes, sides)
        sides = tuple(_classes(array, side, order, _named(answers[side])) for side, array in arrays.items())
        return cls(raw, truth, False, codes, sides)

    def take(self, at: Codes) -> "_Rows":
        truth = None if self.truth is None else self.truth[at]
        codes = None if self.codes is None else self.codes[at]
        return _Rows(self.raw[at], truth, self.binary, codes, tuple(side.take(at) for side in self.sides))


def _array(answer: Any, n: int, side: str) -> NDArray[Any]:
    array = np.asarray(answer)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2):
        raise ValueError(f"the {side}'s predictions have the shape {array.shape}: wanted (n,), or (n, classes)")
    if len(array) != n:
        raise ValueError(f"the {side} gave {len(array):,} predictions for {n:,} rows")
    if gone := _missing(array):
        raise ValueError(f"the {side} predicted NaN for {gone:,} rows")
    return array


def _numbers(values: NDArray[Any]) -> Floats | None:
    """As numbers, None for labels: also "1" and "2" are labels, which sort as text."""
    if values.dtype.kind in "US" or (values.dtype == object and any(isinstance(v, str) for v in values.flat)):
        return None
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError):
        return None


def _missing(values: NDArray[Any]) -> int:
    import pandas as pd

    return int(pd.isna(values).reshape(len(values), -1).any(axis=1).sum())


def _column(array: NDArray[Any]) -> Floats | None:
    return _numbers(array) if array.ndim == 1 else None


def _named(answer: Any) -> tuple[str, ...]:
    """The names of an answer's columns, where it has any."""
    columns = getattr(answer, "columns", ())
    return tuple(_text(name) for name in columns) if len(columns) > 1 else ()


def _text(label: object) -> str:
    """A label as text: 1, 1.0 and True are "1"."""
    if isinstance(label, bool | np.bool_ | int | float | np.number) and float(label) % 1 == 0:
        return str(int(label))
    return str(label)


def _order(
    values: NDArray[Any], classes: Sequence[str | int], named: Sequence[tuple[str, ...]]
) -> tuple[str, ...] | None:
    """The classes in order; None where there are too many to be classes."""
    if classes:
        return tuple(_text(label) for label in classes)
    found = np.unique(values)
    if len(found) > MOST_LABELS:
        return None
    labels = tuple(_text(label) for label in found)
    # Columns may name more classes than the rows have. Those of the side without names are sorted.
    more = {name for names in named if set(labels) <= set(names) for name in names} - set(labels)
    if values.dtype != np.float64:
        return tuple(sorted({*labels, *more}))
    return tuple(sorted({*labels, *more}, key=_as_number))


def _as_number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        return math.inf


def _codes(values: NDArray[Any], known: Mapping[str, int]) -> Codes:
    """Each value's place among the `known` labels, -1 for none of them."""
    found, inverse = np.unique(values, return_inverse=True)
    return np.array([known.get(_text(label), -1) for label in found], dtype=np.int64)[inverse]


def _aligned(array: NDArray[Any], side: str, order: Sequence[str], names: tuple[str, ...]) -> Floats:
    """A matrix of probabilities with its columns in the `order` of the classes."""
    if names and set(names) <= set(order):
        matrix = np.zeros((len(array), len(order)))
        matrix[:, [list(order).index(name) for name in names]] = array
        return matrix
    if array.shape[1] != len(order):
        raise ValueError(
            f"the {side}'s predictions have the shape {array.shape}, and there are {len(order)} classes in the rows "
            f"({', '.join(order[:9])}): name all `classes`, in the order of the columns"
        )
    return array


def _binary(array: NDArray[Any], side: str, order: Sequence[str], names: tuple[str, ...]) -> _Side:
    numbers = _numbers(array)
    known = {name: at for at, name in enumerate(order)}
    if numbers is not None and numbers.ndim == 2:
        scores, labels = _aligned(numbers, side, order, names)[:, 1], False
    elif numbers is not None and (tuple(order) == ("0", "1") or (_codes(numbers, known) < 0).any()):
        scores, labels = numbers, False
    else:
        codes = _codes(array.astype(str) if numbers is None else numbers, known)
        if array.ndim != 1 or (codes < 0).any():
            odd = array.ravel()[0] if array.ndim != 1 else array[codes < 0][0]
            raise ValueError(
                f"the {side}'s predictions are not numbers, and '{odd}' is none of the labels {', '.join(order)}"
            )
        scores, labels = codes.astype(np.float64), True
    return _Side(array, scores, (scores >= 0.5).astype(np.int64), np.stack([1 - scores, scores], axis=1), labels)


def _classes(array: NDArray[Any], side: str, order: Sequence[str], names: tuple[str, ...]) -> _Side:
    numbers = _numbers(array)
    if array.ndim == 2:
        if numbers is None:
            raise ValueError(f"the {side}'s predictions have the shape {array.shape} and are not numbers")
        matrix = _aligned(numbers, side, order, names)
        return _Side(array, None, matrix.argmax(axis=1).astype(np.int64), matrix)
    if numbers is not None and (np.mod(numbers, 1) != 0).any():
        return _Side(array, numbers)  # numbers, and no labels
    values = array.astype(str) if numbers is None else numbers
    known = {name: at for at, name in enumerate(order)}
    for label in np.unique(values):
        known.setdefault(_text(label), len(known))  # a class that no row has: wrong wherever it is chosen
    return _Side(array, numbers, _codes(values, known), None, labels=True)


# --- measuring


def _measured(
    rows: _Rows,
    metrics: Sequence[str],
    functions: Mapping[str, Own],
    confidence: float,
    resamples: tuple[int, int],
    seed: int,
) -> dict[str, Measurement]:
    built = {name: [_prepare(name, rows, side) for side in rows.sides] for name in metrics if name not in functions}
    own = {
        name: [_own(name, functions[name], rows, side) for side in rows.sides] for name in metrics if name in functions
    }
    n = len(rows.raw)
    exact = {} if rows.codes is None else {name: METRIC_ALIASES.get(name, name) for name in built}
    drawn = {name: sides for name, sides in built.items() if exact.get(name) not in ("accuracy", "recall")}
    found = _bootstrap(drawn, n, confidence, resamples, seed)
    # A function is called for each resample: no more of them than needed.
    found |= _bootstrap(own, n, confidence, (resamples[0], resamples[0]), seed)
    for name in built:
        found |= _shares(name, rows, confidence)
    return found


def _bootstrap(
    prepared: Mapping[str, Sequence[Weighted]], n: int, confidence: float, resamples: tuple[int, int], seed: int
) -> dict[str, Measurement]:
    """All metrics from the same draws; with a champion three for each: its own, the champion's, the delta.

    `resamples` are the least and the most.
    """
    if not prepared:
        return {}
    if n < 2:
        raise NoSample("one row has no spread to make an interval of")
    for name, sides in prepared.items():
        if any(np.isnan(side(np.ones((1, n)))).any() for side in sides):
            raise NoSample(f"'{name}' does not exist for these rows: is there only one class, or no spread?")
    names: list[str] = []
    for name, sides in prepared.items():
        names += [name] if len(sides) == 1 else [name, f"{name}_champion", f"{name}_delta"]

    def together(weights: Floats) -> Floats:
        values = []
        for sides in prepared.values():
            each = [side(weights) for side in sides]
            values += each if len(each) == 1 else [*each, each[0] - each[1]]
        return np.stack(values)

    alpha, (least, most) = 1 - confidence, resamples
    used = max(alpha, 20 / most)
    factor = float(stats.t.isf(alpha / 2, n - 1) / stats.norm.isf(used / 2)) * math.sqrt(n / (n - 1))
    measured = paired_bootstrap(together, n, 1 - used, resamples=least, seed=seed)
    return {name: _stretched(name, one, factor) for name, one in zip(names, measured, strict=True)}


def _stretched(name: str, one: Measurement, factor: float) -> Measurement:
    low = one.value - (one.value - one.low) * factor
    high = one.value + (one.high - one.value) * factor
    metric = METRIC_ALIASES.get(base := name.removesuffix("_champion"), base)
    if metric in OFFLINE_METRICS and metric != "r2":
        low = max(low, min(0.0, one.value))
        high = high if metric in ("log_loss", "rmse", "mse", "mae", "mape") else min(high, max(1.0, one.value))
    return one.model_copy(update={"low": low, "high": high})


def _shares(asked: str, rows: _Rows, confidence: float) -> dict[str, Measurement]:
    """Better intervals for what is a share of rows: of all (accuracy), of the positive ones (recall), of those
    told positive (precision, of which the champion's are others, so the delta stays as it is).
    """
    metric = METRIC_ALIASES.get(asked, asked)
    if metric not in ("accuracy", "recall", "precision") or rows.codes is None:
        return {}
    n, found, hits = len(rows.raw), {}, []
    for side, suffix in zip(rows.sides, ("", "_champion"), strict=False):
        assert side.chosen is not None
        among = {"recall": rows.codes == 1, "precision": side.chosen == 1}.get(metric, np.ones(n, dtype=bool))
        hits.append((side.chosen == rows.codes)[among])
        if not among.any():
            if metric == "recall":
                raise NoSample("'recall' does not exist for these rows: none is positive")
            found[asked + suffix] = Measurement(value=0, low=0, high=1, sample=n)
            continue
        share = proportion(int(hits[-1].sum()), int(among.sum()), confidence)
        found[asked + suffix] = share.model_copy(update={"sample": n})
    if len(hits) == 2 and metric != "precision":
        gained, lost = int((hits[0] & ~hits[1]).sum()), int((~hits[0] & hits[1]).sum())
        low, high = tango(gained, lost, hits[0].size, confidence)
        value = (gained - lost) / hits[0].size
        found[f"{asked}_delta"] = Measurement(value=value, low=low, high=high, sample=n)
    return found


def tango(gained: int, lost: int, n: int, confidence: float) -> tuple[float, float]:
    """The score interval for a difference of paired shares (Tango 1998, Statistics in Medicine 17:891).

    Of `n` pairs the first was right and the second wrong in `gained`, the other way round in `lost`. It has a width
    also where both are 0: then the rate at which they differ is only known to be small.
    """
    z = float(stats.norm.isf((1 - confidence) / 2))
    value = (gained - lost) / n

    def beyond(d: float) -> float:
        """Over 0 where the difference `d` is refused: the squared score less its critical value."""
        b = -gained - lost + (2 * n - gained + lost) * d
        share = (math.sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d))) - b) / (4 * n)
        return (gained - lost - n * d) ** 2 - z * z * n * max(0.0, 2 * share + d * (1 - d))

    hair = 1e-9  # the estimate itself is a root where only one side ever won
    low = -1.0 if value == -1 else float(optimize.brentq(beyond, -1, value - hair))
    high = 1.0 if value == 1 else float(optimize.brentq(beyond, value + hair, 1))
    return min(low, value), max(high, value)


def _own(name: str, function: Own, rows: _Rows, side: _Side) -> Weighted:
    """A user's function as a prepared metric. Where it gives one number per row, their mean is the metric."""
    y, p, n = rows.raw, side.raw, len(rows.raw)
    whole = np.asarray(function(y, p))
    if whole.dtype.kind not in "fiub" or whole.shape not in ((), (n,)):
        raise ValueError(f"'{name}' returned {type(whole.tolist()).__name__}: wanted a number, or one per row")
    each = whole.astype(np.float64)
    if each.ndim:
        return _average(each)
    takes_weights = "sample_weight" in inspect.signature(function).parameters

    def value(w: Floats) -> Floats:
        if takes_weights:
            return np.array([float(function(y, p, sample_weight=row)) for row in w])
        drawn = (np.repeat(np.arange(n), row.astype(np.int64)) for row in w)
        return np.array([float(function(y[at], p[at])) for at in drawn])

    return value


def _prepare(asked: str, rows: _Rows, side: _Side) -> Weighted:
    metric = METRIC_ALIASES.get(asked, asked)
    if metric in _REGRESSION:
        if rows.truth is None or side.scores is None:
            raise ValueError(f"'{asked}' needs numbers, one per row: outcomes or predictions have the shape of classes")
        return _REGRESSION[metric](rows.truth, side.scores)
    if metric not in _BINARY and metric not in _CLASSES:
        known = list(OFFLINE_METRICS)
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"no such metric: '{asked}'{hint} (there are: {', '.join(known)})")
    if side.labels and metric in _OF_SCORES:
        raise ValueError(f"'{asked}' needs scores or probabilities, and the predictions are not numbers but labels")
    if rows.binary and metric in _BINARY:
        assert rows.truth is not None
        assert side.scores is not None
        if metric in ("log_loss", "brier") and (side.scores.min() < 0 or side.scores.max() > 1):
            raise ValueError(f"'{asked}' needs probabilities, between 0 and 1")
        return _BINARY[metric](rows.truth, side.scores)
    if metric not in _CLASSES:
        other = {"roc_auc": "roc_auc_ovr"}.get(metric, f"{metric}_macro")
        hint = f"; for several classes there is '{other}'" if other in _CLASSES else ""
        raise ValueError(f"'{asked}' needs outcomes of 0 and 1, or two `classes`{hint}")
    if rows.codes is None or side.chosen is None:
        raise ValueError(
            f"'{asked}' needs classes: outcomes and predictions are labels, or there is a column of probabilities for "
            "each label (name all `classes`, in the order of the columns)"
        )
    if metric in _OF_SCORES and (side.matrix is None or not np.allclose(side.matrix.sum(axis=1), 1, atol=1e-3)):
        raise ValueError(f"'{asked}' needs probabilities: a column for each class, and rows that add up to 1")
    return _CLASSES[metric](rows.codes, side)


# --- the metrics


def _average(losses: Floats) -> Weighted:
    def value(w: Floats) -> Floats:
        mean: Floats = w @ losses / w.sum(axis=1)
        return mean

    return value


def _mean(loss: Callable[[Floats, Floats], Floats], *, root: bool = False) -> Metric:
    def prepare(y: Floats, p: Floats) -> Weighted:
        mean = _average(loss(y, p))
        return (lambda w: np.sqrt(mean(w))) if root else mean

    return prepare


def _log_loss(y: Floats, p: Floats) -> Floats:
    tiny = np.finfo(np.float64).eps  # as scikit-learn clips: a certain error costs 36, not infinity
    p = np.clip(p, tiny, 1 - tiny)
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


def _counted(formula: Callable[[Floats, Floats, Floats, Floats], Floats]) -> Metric:
    """A metric of the confusion matrix at 0.5: `formula(tp, fp, fn, tn)`."""

    def prepare(y: Floats, p: Floats) -> Weighted:
        yes = (p >= 0.5).astype(np.float64)
        cells = np.stack([y * yes, (1 - y) * yes, y * (1 - yes), (1 - y) * (1 - yes)], axis=1)
        return lambda w: formula(*(w @ cells).T)

    return prepare


def _share(part: Floats, whole: Floats) -> Floats:
    """Of the whole, that part; 0 where the whole is 0 (scikit-learn's `zero_division=0`)."""
    return _over(part, whole, 0.0)


def _over(top: Floats, bottom: Floats, otherwise: float) -> Floats:
    result: Floats = np.divide(top, bottom, out=np.full_like(top, otherwise), where=bottom > 0)
    return result


def _roc_auc(y: Floats, p: Floats) -> Weighted:
    """The chance that a positive scores above a negative, ties half: Mann and Whitney's U / (n1 * n0)."""
    order = np.argsort(p, kind="stable")
    positive, starts = y[order], np.flatnonzero(np.diff(p[order], prepend=-np.inf))

    def value(w: Floats) -> Floats:
        w = w[:, order]
        ups = np.add.reduceat(w * positive, starts, axis=1)  # weight of positives at each distinct score
        downs = np.add.reduceat(w * (1 - positive), starts, axis=1)
        beaten = np.cumsum(downs, axis=1) - downs / 2
        return _over((ups * beaten).sum(axis=1), ups.sum(axis=1) * downs.sum(axis=1), np.nan)

    return value


def _average_precision(y: Floats, p: Floats) -> Weighted:
    """The sum over falling thresholds of the rise in recall times the precision there."""
    order = np.argsort(-p, kind="stable")
    positive, starts = y[order], np.flatnonzero(np.diff(-p[order], prepend=-np.inf))

    def value(w: Floats) -> Floats:
        w = w[:, order]
        ups = np.add.reduceat(w * positive, starts, axis=1)
        drawn = np.cumsum(np.add.reduceat(w, starts, axis=1), axis=1)
        precision = _share(np.cumsum(ups, axis=1), drawn)
        return _over((ups * precision).sum(axis=1), ups.sum(axis=1), np.nan)

    return value


def _r2(y: Floats, p: Floats) -> Weighted:
    residual = (y - p) ** 2

    def value(w: Floats) -> Floats:
        size = w.sum(axis=1)
        centred = y - y.mean()  # keeps the difference of squares below from cancelling
        spread = w @ centred**2 - (w @ centred) ** 2 / size
        return 1 - _over(w @ residual, spread, np.nan)

    return value


Tallied = Callable[[Floats, Floats, Floats], Floats]
"""Per class (b, K): rows told it rightly, rows of it, rows told it; the metric (b,) out."""


def _tallied(formula: Tallied) -> "Callable[[Codes, _Side], Weighted]":
    def prepare(codes: Codes, side: _Side) -> Weighted:
        assert side.chosen is not None
        size = int(max(codes.max(), side.chosen.max())) + 1
        right = np.where(codes == side.chosen, codes, size)  # one column more for the wrong ones
        tables = [_one_hot(values, size + 1) for values in (right, codes, side.chosen)]
        return lambda w: formula(*((table.T @ w.T).T[:, :size] for table in tables))

    return prepare


def _one_hot(codes: Codes, size: int) -> Any:
    return sparse.csr_array((np.ones(codes.size), (np.arange(codes.size), codes)), shape=(codes.size, size))


def _averaged(per_class: Callable[[Floats, Floats, Floats], Floats], *, weighted: bool) -> Tallied:
    """Over the classes that a row has or is told (scikit-learn's `average`), evenly or by their rows."""

    def formula(right: Floats, rows: Floats, told: Floats) -> Floats:
        weights = rows if weighted else (rows + told > 0).astype(np.float64)
        mean: Floats = (per_class(right, rows, told) * weights).sum(axis=1) / weights.sum(axis=1)
        return mean

    return formula


def _balanced(right: Floats, rows: Floats, _: Floats) -> Floats:
    mean: Floats = _share(right, rows).sum(axis=1) / (rows > 0).sum(axis=1)
    return mean


def _class_log_loss(codes: Codes, side: _Side) -> Weighted:
    assert side.matrix is not None
    p = np.take_along_axis(side.matrix, codes[:, None], axis=1)[:, 0]
    losses = _log_loss(np.ones(p.size), p)
    return _average(losses)


def _one_against_rest(*, weighted: bool) -> "Callable[[Codes, _Side], Weighted]":
    def prepare(codes: Codes, side: _Side) -> Weighted:
        assert side.matrix is not None
        truths = [(codes == at).astype(np.float64) for at in range(side.matrix.shape[1])]
        each = [_roc_auc(truth, side.matrix[:, at]) for at, truth in enumerate(truths)]

        def value(w: Floats) -> Floats:
            areas = np.stack([area(w) for area in each], axis=1)
            shares = np.stack([w @ truth for truth in truths], axis=1) if weighted else np.ones_like(areas)
            mean: Floats = (areas * shares).sum(axis=1) / shares.sum(axis=1)
            return mean

        return value

    return prepare


_BINARY: dict[str, Metric] = {
    "roc_auc": _roc_auc,
    "average_precision": _average_precision,
    "accuracy": _counted(lambda tp, fp, fn, tn: (tp + tn) / (tp + fp + fn + tn)),
    "balanced_accuracy": _counted(lambda tp, fp, fn, tn: (_share(tp, tp + fn) + _share(tn, tn + fp)) / 2),
    "f1": _counted(lambda tp, fp, fn, _: _share(2 * tp, 2 * tp + fp + fn)),
    "precision": _counted(lambda tp, fp, *_: _share(tp, tp + fp)),
    "recall": _counted(lambda tp, _, fn, __: _share(tp, tp + fn)),
    "log_loss": _mean(_log_loss),
    "brier": _mean(lambda y, p: (y - p) ** 2),
}
_PER_CLASS: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "f1": lambda right, rows, told: _share(2 * right, rows + told),
    "precision": lambda right, _, told: _share(right, told),
    "recall": lambda right, rows, _: _share(right, rows),
}
_CLASSES: dict[str, Callable[[Codes, _Side], Weighted]] = {
    "accuracy": _tallied(lambda right, rows, _: right.sum(axis=1) / rows.sum(axis=1)),
    "balanced_accuracy": _tallied(_balanced),
    **{f"{name}_macro": _tallied(_averaged(one, weighted=False)) for name, one in _PER_CLASS.items()},
    **{f"{name}_weighted": _tallied(_averaged(one, weighted=True)) for name, one in _PER_CLASS.items()},
    "log_loss": _class_log_loss,
    "roc_auc_ovr": _one_against_rest(weighted=False),
    "roc_auc_ovr_weighted": _one_against_rest(weighted=True),
}
_OF_SCORES = ("roc_auc", "average_precision", "log_loss", "brier", "roc_auc_ovr", "roc_auc_ovr_weighted")
_REGRESSION: dict[str, Metric] = {
    "r2": _r2,
    "rmse": _mean(lambda y, p: (y - p) ** 2, root=True),
    "mse": _mean(lambda y, p: (y - p) ** 2),
    "mae": _mean(lambda y, p: np.abs(y - p)),
    # As scikit-learn: an outcome of 0 costs very much, not infinitely much.
    "mape": _mean(lambda y, p: np.abs(y - p) / np.maximum(np.abs(y), np.finfo(np.float64).eps)),
}

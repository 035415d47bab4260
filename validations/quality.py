"""Offline metrics of the challenger, and against the champion on the same held-out rows.

Higher is better: roc_auc, average_precision, accuracy, balanced_accuracy, f1, precision, recall, r2.
Lower is better: log_loss, brier, rmse, mae; bound their `_delta` (challenger minus champion) with `max`.
Each is scikit-learn's metric of that name (at the threshold 0.5 where one is needed).
"""

import difflib
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike

from validations.statistics import Floats, NoSample, paired_bootstrap
from validations.verdict import Measurement

Weighted = Callable[[Floats], Floats]
"""A metric prepared for its rows: weights (b, n) in, values (b,) out; NaN where it does not exist."""
Metric = Callable[[Floats, Floats], Weighted]
"""Outcomes and predictions in, the prepared metric out."""


def measurements(
    y: ArrayLike,
    champion: ArrayLike | None,
    challenger: ArrayLike,
    metrics: Iterable[str],
    confidence: float,
    *,
    resamples: int = 400,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Measure `<metric>` of the challenger, and with a champion `<metric>_champion` and `<metric>_delta`.

    `y` (n,) are the outcomes: 0 and 1 for classification metrics, numbers for the others. Predictions are
    scores, probabilities or numbers (n,), or probabilities (n, 2), of which the second column counts.
    Intervals are paired bootstrap percentiles, the same for the same data (see `paired_bootstrap`).

    Raises ValueError: an unknown metric (with the nearest right name), lengths that differ, NaN, outcomes
    that are not 0 and 1; `NoSample` for no rows, or a metric that needs two classes and sees one.
    """
    truth = np.asarray(y).astype(np.float64)
    new = _scores(challenger, truth, "challenger")
    old = None if champion is None else _scores(champion, truth, "champion")
    measured: dict[str, Measurement] = {}
    for metric in metrics:
        prepare = _prepare(metric)
        after = prepare(truth, new)
        before = None if old is None else prepare(truth, old)

        def together(weights: Floats, after: Weighted = after, before: Weighted | None = before) -> Floats:
            one = after(weights)
            if before is None:
                return one[None]
            two = before(weights)
            return np.stack([one, two, one - two])

        names = [metric] if before is None else [metric, f"{metric}_champion", f"{metric}_delta"]
        values = paired_bootstrap(together, truth.size, confidence, resamples=resamples, seed=seed)
        measured.update(zip(names, values, strict=True))
    return measured


def _scores(predictions: ArrayLike, truth: Floats, side: str) -> Floats:
    try:
        scores = np.asarray(predictions).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the {side}'s predictions are not numbers: {error}") from error
    if scores.ndim == 2 and scores.shape[1] in (1, 2):
        scores = scores[:, -1]
    if truth.ndim != 1 or scores.ndim != 1:
        raise ValueError(
            f"the {side}'s predictions have the shape {scores.shape}: wanted (n,), or (n, 2) probabilities"
        )
    if scores.size != truth.size:
        raise ValueError(f"the {side} gave {scores.size:,} predictions for {truth.size:,} rows")
    if not truth.size:
        raise NoSample("no held-out rows to measure quality on")
    if np.isnan(truth).any():
        raise ValueError(f"{int(np.isnan(truth).sum()):,} of the outcomes are NaN: leave those rows out")
    if np.isnan(scores).any():
        raise ValueError(f"the {side} predicted NaN for {int(np.isnan(scores).sum()):,} rows")
    return scores


def _prepare(metric: str) -> Metric:
    if metric in _REGRESSION:
        return _REGRESSION[metric]
    if metric not in _CLASSIFICATION:
        known = [*_CLASSIFICATION, *_REGRESSION]
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"no such metric: '{metric}'{hint} (there are: {', '.join(known)})")

    def prepare(y: Floats, p: Floats) -> Weighted:
        if not np.isin(y, (0, 1)).all():
            raise ValueError(f"'{metric}' needs outcomes of 0 and 1")
        if metric in ("log_loss", "brier") and (p.min() < 0 or p.max() > 1):
            raise ValueError(f"'{metric}' needs probabilities, between 0 and 1")
        return _CLASSIFICATION[metric](y, p)

    return prepare


def _mean(loss: Callable[[Floats, Floats], Floats], *, root: bool = False) -> Metric:
    def prepare(y: Floats, p: Floats) -> Weighted:
        losses = loss(y, p)

        def value(w: Floats) -> Floats:
            mean: Floats = w @ losses / w.sum(axis=1)
            return np.sqrt(mean) if root else mean

        return value

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


_CLASSIFICATION: dict[str, Metric] = {
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
_REGRESSION: dict[str, Metric] = {
    "r2": _r2,
    "rmse": _mean(lambda y, p: (y - p) ** 2, root=True),
    "mae": _mean(lambda y, p: np.abs(y - p)),
}

"""A past shadow and the labels that came later: which of the two models was right, pair by pair.

Pure. The unit is the request: one of several rows has the mean of its rows. Every score lies in [0, 1] and every
difference in [-1, 1], so intervals come from `eprocess.Betting`: they hold however often labels come and are judged.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from validations.compare import parsed
from validations.eprocess import Betting
from validations.verdict import Measurement

Kind = Literal["auto", "class", "probability", "number"]
_STEPS = 30
"""Of the bisection for an end of an interval: to the ninth digit."""


class Pair(NamedTuple):
    """The predictions of both models for one request, row by row; None where there was no such answer."""

    id: str
    champion: list[Any] | None
    challenger: list[Any] | None


class Joined(NamedTuple):
    """The pairs that have a label, scored. `kind` is how they were read; losses and hits have one entry a pair."""

    kind: Kind
    losses: NDArray[np.float64]
    """The challenger's loss minus the champion's, from -1 to 1."""
    hits: NDArray[np.float64]
    """The share of the challenger's rows that are right; empty for numbers."""
    gains: NDArray[np.float64]
    """... minus the champion's."""
    unknown: int
    """Labels of requests that are among no pair."""
    unlabelled: int
    """Pairs without a label."""
    misfits: int
    """Labels of another number of rows than the champion's answer: not joined."""


def read_pairs(lines: Iterable[str | bytes]) -> list[Pair]:
    """The pairs that `agreement.Pairing.kept` gave. Raises ValueError for other lines, with their number."""
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            data = orjson.loads(line)
            pairs.append(Pair(data["id"], data["champion"], data["challenger"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is no kept pair ({error})") from error
    return pairs


def join(pairs: Iterable[Pair], labels: Mapping[str, Any], kind: Kind = "auto") -> Joined:
    """Score the pairs that have a label, by request id.

    A label is a value, or a list of them for a request of several rows; text that holds a number, `true` or `false` is
    taken as such. Kinds: `class` (right or wrong), `probability` (of the class 1, or a list or an object with one for
    each class; the loss is Brier's, right is what has the highest), `number` (the loss compares absolute errors:
    (e1 - e0) / max(e1, e0)). `auto` takes lists and objects as probabilities, text and booleans as classes, numbers as
    probabilities where all labels are 0 or 1 and all predictions lie between, as classes where both are
    integers, else as numbers. A prediction that cannot be read is as wrong as can be.

    Raises ValueError where no champion's prediction can be read as that kind.
    """
    found: list[tuple[list[Any], Pair]] = []
    unlabelled = misfits = 0
    seen = set()
    for pair in pairs:
        seen.add(pair.id)
        if pair.id not in labels:
            unlabelled += 1
            continue
        rows = _rows(labels[pair.id])
        answer = pair.champion if pair.champion is not None else pair.challenger
        if answer is not None and len(answer) != len(rows):
            misfits += 1
            continue
        found.append((rows, pair))
    unknown = sum(1 for request_id in labels if request_id not in seen)
    if kind == "auto":
        kind = _kind(found)
    score = _SCORES[kind]
    scored = [(_scores(pair.champion, rows, score), _scores(pair.challenger, rows, score)) for rows, pair in found]
    if scored and all(loss is None for champion, _ in scored for loss, _ in champion):
        raise ValueError(
            f"no prediction of the champion can be read as `{kind}`: name another `label_kind` (class, probability, "
            "number); a prediction is a value, or a probability for each class"
        )
    losses = [_loss_delta(kind, champion, challenger) for champion, challenger in scored]
    hits = [(_hits(champion), _hits(challenger)) for champion, challenger in scored if kind != "number"]
    champions, challengers = np.array(hits, dtype=np.float64).reshape(-1, 2).T
    return Joined(kind, np.array(losses), challengers, challengers - champions, unknown, unlabelled, misfits)


def measurements(joined: Joined, alpha_bad: float, alpha_good: float) -> dict[str, Measurement]:
    """`label_loss_delta` (challenger minus champion; at best -1), and but for numbers `label_accuracy` (the
    challenger's) and `label_accuracy_delta`; with how many labels were joined and how many were not, exact.

    The end that blames the challenger is beyond the truth with probability `alpha_bad` at most, at all moments
    together, the other with `alpha_good`. Without joined labels there is nothing but the counts.
    """
    measured = {
        "labelled_pairs": Measurement.exact(joined.losses.size),
        "unlabelled_pairs": Measurement.exact(joined.unlabelled),
        "unknown_labels": Measurement.exact(joined.unknown),
        "misfit_labels": Measurement.exact(joined.misfits),
    }
    if joined.hits.size:
        measured["label_accuracy"] = _mean(joined.hits, 0.0, alpha_good, alpha_bad)
        measured["label_accuracy_delta"] = _mean(joined.gains, -1.0, alpha_good, alpha_bad)
    if joined.losses.size:
        measured["label_loss_delta"] = _mean(joined.losses, -1.0, alpha_bad, alpha_good)
    return measured


Score = Callable[[Any, Any], tuple[float | None, float]]


def _scores(answer: list[Any] | None, labels: Sequence[Any], score: Score) -> list[tuple[float | None, float]]:
    """(loss, right or wrong) of each row; the loss is None where there is nothing to be read."""
    if answer is None or len(answer) != len(labels):
        return [(None, 0.0)] * len(labels)
    return [score(prediction, label) for prediction, label in zip(answer, labels, strict=True)]


def _class(prediction: Any, label: Any) -> tuple[float | None, float]:
    if isinstance(prediction, list | dict):
        probability = _distribution(prediction, label)
        return (None, 0.0) if probability is None else (1.0 - probability[1], probability[1])
    if prediction is None:
        return None, 0.0
    right = float(_plain(prediction) == _plain(label))
    return 1.0 - right, right


def _probability(prediction: Any, label: Any) -> tuple[float | None, float]:
    if isinstance(prediction, list | dict):
        return _distribution(prediction, label) or (None, 0.0)
    p, y = _plain(prediction), _plain(label)
    if not isinstance(p, float) or not 0 <= p <= 1 or y not in (0.0, 1.0):
        return None, 0.0
    return (p - float(y)) ** 2, float((p >= 0.5) == (y == 1))


def _distribution(prediction: list[Any] | dict[str, Any], label: Any) -> tuple[float, float] | None:
    """Brier's loss (halved, so at most 1) and right or wrong, of a probability for each class."""
    classes = {_plain(k): v for k, v in (prediction.items() if isinstance(prediction, dict) else enumerate(prediction))}
    if not classes or any(v.__class__ not in (int, float) or not 0 <= v <= 1 for v in classes.values()):
        return None
    y = _plain(label)
    loss = sum((p - (one == y)) ** 2 for one, p in classes.items()) / 2 if y in classes else 1.0
    return min(loss, 1.0), float(max(classes, key=lambda one: classes[one]) == y)


def _number(prediction: Any, label: Any) -> tuple[float | None, float]:
    p, y = _plain(prediction), _plain(label)
    if not isinstance(p, float) or not isinstance(y, float) or math.isnan(p - y):
        return None, 0.0
    return abs(p - y), 0.0


_SCORES: dict[Kind, Score] = {"class": _class, "probability": _probability, "number": _number}


def _loss_delta(
    kind: Kind, champion: list[tuple[float | None, float]], challenger: list[tuple[float | None, float]]
) -> float:
    worst = math.inf if kind == "number" else 1.0
    total = 0.0
    for (zero, _), (one, _) in zip(champion, challenger, strict=True):
        e0, e1 = worst if zero is None else zero, worst if one is None else one
        if kind != "number":
            total += e1 - e0
        elif e0 != e1:
            total += math.copysign(1.0, e1 - e0) * (1 - min(e0, e1) / max(e0, e1))
    return total / len(champion) if champion else 0.0


def _hits(scores: list[tuple[float | None, float]]) -> float:
    return sum(right for _, right in scores) / len(scores) if scores else 0.0


def _rows(label: Any) -> list[Any]:
    if isinstance(label, str) and label.lstrip().startswith("["):
        try:
            label = parsed(label)
        except ValueError:
            return [label]
    return label if isinstance(label, list) else [label]


def _plain(value: Any) -> float | str:
    """Numbers, booleans, and texts that hold one, as numbers; every other value as text."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("true", "false"):
            return float(text.lower() == "true")
        try:
            return float(text)
        except ValueError:
            return text
    return float(value) if isinstance(value, int | float) else str(value)


def _kind(found: Sequence[tuple[list[Any], Pair]]) -> Kind:
    predictions = [
        row
        for _, pair in found
        for answer in (pair.champion, pair.challenger)
        for row in answer or ()
        if row is not None
    ]
    labels = [_plain(label) for rows, _ in found for label in rows]
    if any(isinstance(row, list | dict) for row in predictions):
        return "probability"
    if any(isinstance(row, str | bool) for row in predictions) or any(isinstance(label, str) for label in labels):
        return "class"
    if all(label in (0.0, 1.0) for label in labels) and all(0 <= row <= 1 for row in predictions):
        return "probability"
    if all(isinstance(row, int) for row in predictions) and all(float(label).is_integer() for label in labels):
        return "class"
    return "number"


def _mean(numbers: NDArray[np.float64], least: float, alpha_low: float, alpha_high: float) -> Measurement:
    """The mean of numbers from `least` to 1, with an interval for its expectation; `alpha_low` is the lower end's."""
    width = 1 - least
    x = np.clip((numbers - least) / width, 0, 1)

    def excluded(side: int, m: float, alpha: float) -> bool:
        betting = Betting([m])
        betting.add(x)
        return bool(betting.logs()[side][0] >= -math.log(alpha))

    # The evidence against "at most m" falls in m, and that against "at least m" grows.
    below, above = 0.0, 0.0
    for at in range(1, _STEPS + 1):
        step = 2.0**-at
        if excluded(0, below + step, alpha_low):
            below += step
        if excluded(1, 1 - above - step, alpha_high):
            above += step
    value = float(numbers.mean())
    low, high = least + width * below, 1 - width * above
    return Measurement(value=value, low=min(low, value), high=max(high, value), sample=int(numbers.size))

"""Changes of answers: what two models say to the same rows. `extra` is (the champion's outputs, the models' labels)."""

import math
from typing import Any

import numpy as np

from tests.corpus.cases import Case, array, breaks, column, harmless, mapping, optional

_random = np.random.default_rng(7)
_scores = _random.normal(0, 2, 60)
_retrained = _scores + _random.normal(0, 0.4, 60)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def two(p: Any) -> list[list[float]]:
    """Rows of two classes."""
    return np.stack([1 - p, p], axis=1).tolist()


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


P, Q = sigmoid(_scores), sigmoid(_retrained)
PP, QQ = two(P), two(Q)
_logits = _random.normal(0, 2, (60, 4))
FOUR = softmax(_logits)
FOUR_AGAIN = softmax(_logits + _random.normal(0, 0.3, (60, 4)))
SAID = ["late" if p > 0.5 else "on time" for p in P]
SAYS = ["late" if p > 0.5 else "on time" for p in Q]
CODED, CODES = [int(p > 0.5) for p in P], [int(p > 0.5) for p in Q]
FOUR_LABELS = ["a", "b", "c", "d"]
FOUR_SAID = [FOUR_LABELS[at] for at in FOUR.argmax(axis=1)]
FOUR_SAYS = [FOUR_LABELS[at] for at in FOUR_AGAIN.argmax(axis=1)]
ROWS = [{"label": said, "p": float(p)} for said, p in zip(SAID, P, strict=True)]
AGAIN = [{"label": says, "p": float(q)} for says, q in zip(SAYS, Q, strict=True)]
MINUTES = _random.normal(12, 5, 40)
TEXTS = ["A delay is likely.", "On time.", "Weather may delay this flight by an hour or two."]
NESTED = [{"legs": [{"km": 10.5, "to": "LAX"}], "total": 10.5}]


def known(*labels: Any) -> tuple[list[Any], tuple[Any, ...]]:
    return [], labels


def told(*outputs: Any) -> tuple[list[Any], tuple[Any, ...]]:
    return list(outputs), (None, None)


def nested(**leg: Any) -> list[dict[str, Any]]:
    return [{"legs": [{"km": 11.0, "to": "LAX", **leg}], "total": 11.0}]


ANSWERS: list[Case] = [
    # form, rows, types
    breaks("one answer for all rows", SAID, SAID[:1], "60 predictions"),
    breaks("one answer too many", [1.5, 2.5], [1.5, 2.5, 3.5], "gives 3"),
    breaks("an object in place of a list", [1.5, 2.5], {"0": 1.5, "1": 2.5}, "an object"),
    breaks("columns in place of rows", ROWS, {"label": SAYS, "p": Q.tolist()}, "the form of the champion's"),
    breaks("each number in a list", [0.5, 1.5], [[0.5], [1.5]], "a list"),
    breaks("a bare number where a list was", [[0.5], [1.5]], [0.5, 1.5], "a number"),
    breaks("probabilities where labels were", CODED, QQ, "a list"),
    breaks("labels where probabilities were", PP, CODES, "a number"),
    breaks("one probability where two were", PP, Q.tolist(), "a number"),
    breaks("the probability where the label was", CODED, Q.tolist(), "a whole number"),
    breaks("the name of the label where its number was", CODED, SAYS, "a text"),
    breaks("the number of the label where its name was", SAID, CODES, "a number"),
    breaks("flags where numbers were", CODED, [bool(c) for c in CODES], "a boolean"),
    breaks("numbers where flags were", [bool(c) for c in CODED], CODES, "a number"),
    breaks("numbers written as text", MINUTES.tolist(), [str(m) for m in MINUTES], "a text"),
    breaks("some numbers written as text", [1.5, 2.5, 3.5], [1.5, "2.5", 3.5], "a text"),
    breaks("objects where numbers were", [0.5, 1.5], [{"p": 0.5}, {"p": 1.5}], "an object"),
    breaks("numbers where objects were", [{"p": 0.5}, {"p": 1.5}], [0.5, 1.5], "a number"),
    breaks("a list where an object was", ROWS, [list(row.values()) for row in AGAIN], "a list"),
    # width
    breaks("a class more", PP, [[*row, 0.0] for row in QQ], "keep the champion's 2"),
    breaks("a class less", FOUR.tolist(), FOUR_AGAIN[:, :3].tolist(), "4 values"),
    breaks("a class more, seen in one row", PP[:1], [[0.2, 0.3, 0.5]], "3 in the challenger's"),
    breaks("a shorter embedding", _random.normal(size=(6, 16)).tolist(), _random.normal(size=(6, 8)).tolist(), "16 values"),
    breaks("no values at all", PP, [[] for _ in QQ], "and 0"),
    # fields
    breaks("a field is gone", ROWS, [{"label": row["label"]} for row in AGAIN], "'p' is missing"),
    breaks("a field is renamed", ROWS, [{"lable": row["label"], "p": row["p"]} for row in AGAIN], "keep the name 'label'"),
    breaks("a field is in capitals", ROWS, [{"label": row["label"], "P": row["p"]} for row in AGAIN], "'p'"),
    breaks("a field is new", ROWS, [{**row, "why": "wind"} for row in AGAIN], "'why' is new"),
    breaks("a field is missing in some rows", ROWS[:6], [*AGAIN[:5], {"label": "late"}], "'p' is missing"),
    breaks("a field is text now", ROWS, [{**row, "p": f"{row['p']:.2f}"} for row in AGAIN], "'p' is a number"),
    breaks("a field is a list now", ROWS, [{**row, "p": [row["p"]]} for row in AGAIN], "'p'"),
    breaks("a nested field is gone", NESTED, [{"legs": [{"to": "LAX"}], "total": 11.0}], "'legs[0].km'"),
    breaks("a nested field is text", NESTED, nested(km="10.5"), "'legs[0].km'"),
    breaks("a nested field is null", NESTED, nested(km=None), "'legs[0].km' is null"),
    breaks("a nested list is an object", NESTED, [{"legs": {"km": 11.0, "to": "LAX"}, "total": 11.0}], "'legs'"),
    breaks("an output column is renamed", [{"eta": 3.5}], [{"ETA": 3.5}], "'eta'", told(column("eta"))),
    # nulls
    breaks("a null in place of a number", [1.5, 2.5], [None, 2.5], "null"),
    breaks("a NaN in place of a number", [1.5, 2.5], [1.5, math.nan], "1 of 2"),
    breaks("infinite in place of a number", [1.5, 2.5], [1.5, math.inf], "infinite"),
    breaks("NaN among the probabilities", PP[:3], [[math.nan, math.nan], *QQ[1:3]], "'[0]'"),
    breaks("a null in place of a label", SAID, [None, *SAYS[1:]], "null"),
    breaks("nothing but nulls", MINUTES.tolist(), [None] * 40, "40 of 40"),
    breaks("a null in a required output", [{"eta": 3.5}], [{"eta": None}], "'eta' is null", told(column("eta"))),
    # probabilities
    breaks("percents", PP, [[100 * value for value in row] for row in QQ], "hundredth of percents"),
    breaks("percents, in one row", PP[:1], [[12.0, 88.0]], "probability"),
    breaks("percents of one class", P.tolist(), (100 * Q).tolist(), "probability"),
    breaks("percents of one class in a few rows", P[:6].tolist(), (100 * np.maximum(Q[:6], 0.02)).tolist(), "probability"),
    breaks("percents in a field", ROWS, [{**row, "p": 100 * row["p"]} for row in AGAIN], "'p'"),
    breaks("log-odds of two classes", PP, np.stack([-_retrained, _retrained], axis=1).tolist(), "sigmoid"),
    breaks("log-odds of one class", P.tolist(), _retrained.tolist(), "probability"),
    breaks("logarithms of probabilities", PP, np.log(np.array(QQ)).tolist(), "probability"),
    breaks("the softmax is forgotten", FOUR.tolist(), _logits.tolist(), "probability"),
    breaks("each class by itself", FOUR.tolist(), sigmoid(_logits).tolist(), "sum to 1"),
    breaks("probabilities that are not shared out", PP, np.stack([Q, Q], axis=1).tolist(), "sum to 1"),
    # the order of classes
    breaks("two classes swapped", PP, [row[::-1] for row in QQ], "column 0 stands at column 1"),
    breaks("two classes swapped by the same model", PP, [row[::-1] for row in PP], "order"),
    breaks("two classes of four swapped", FOUR.tolist(), FOUR_AGAIN[:, [0, 2, 1, 3]].tolist(), "column 1 stands at column 2"),
    breaks("four classes go round", FOUR.tolist(), FOUR_AGAIN[:, [3, 0, 1, 2]].tolist(), "column 0 stands at column 1"),
    breaks("four classes from the last to the first", FOUR.tolist(), FOUR_AGAIN[:, ::-1].tolist(), "order its columns"),
    breaks("named classes swapped", [{"no": 1 - p, "yes": p} for p in P.tolist()], [{"no": q, "yes": 1 - q} for q in Q.tolist()], "'yes'"),
    breaks("the probability of the other class", P.tolist(), (1 - Q).tolist(), "the champion's class"),
    breaks("the probability of the other class in a field", ROWS, [{**row, "p": 1 - row["p"]} for row in AGAIN], "'p' falls"),
    breaks("the models' own classes in another order", PP[:2], QQ[:2], "['no', 'yes']", known(["no", "yes"], ["yes", "no"])),
    breaks("a class between the others", FOUR[:2, :2].tolist(), FOUR[:2, 2:].tolist(), "order", known(["b", "c"], ["a", "b"])),
    # labels
    breaks("each label stands for the other", SAID, ["late" if s == "on time" else "on time" for s in SAYS], "'late' where the champion says 'on time'"),
    breaks("numbered labels swapped", CODED, [1 - c for c in CODES], "map", known([0, 1], None)),
    breaks("labels in capitals", SAID[:2], [s.upper() for s in SAYS[:2]], "'ON TIME'" if SAYS[0] == "on time" else "'LATE'"),
    breaks("labels with an underscore", ["on time", "late"], ["on_time", "late"], "'on_time'"),
    breaks("labels with a space behind", ["late"] * 3, ["late "] * 3, "'late '"),
    breaks("labels in another language", SAID, ["verspätet" if s == "late" else "pünktlich" for s in SAYS], "none of the champion's labels"),
    breaks("labels with a prefix", FOUR_SAID, [f"class_{s}" for s in FOUR_SAYS], "'class_"),
    breaks("a label that the champion does not have", FOUR_SAID, ["e", *FOUR_SAYS[1:]], "'e'", known(FOUR_LABELS, None)),
    breaks("a numbered label that the champion does not have", CODED, [2, *CODES[1:]], "is 2", known([0, 1], None)),
    breaks("a label in a field that the champion does not have", ROWS, [{**AGAIN[0], "label": "cancelled"}, *AGAIN[1:]], "'cancelled'", known(["late", "on time"], None)),
    breaks("a label that only the challenger could say", FOUR_SAID, FOUR_SAYS, "'e'", known(FOUR_LABELS, [*FOUR_LABELS, "e"])),
    # harmless: numbers
    harmless("the same answers", ROWS, ROWS),
    harmless("other probabilities", PP, QQ),
    harmless("other probabilities of four classes", FOUR.tolist(), FOUR_AGAIN.tolist()),
    harmless("other probabilities of one class", P.tolist(), Q.tolist()),
    harmless("quite other probabilities", PP, two(sigmoid(_scores + _random.normal(0, 3, 60)))),
    harmless("probabilities that have nothing to do with the champion's", PP, two(_random.random(60))),
    harmless("probabilities of another base rate", PP, two(sigmoid(_retrained + 2))),
    harmless("probabilities drawn to the middle", PP, two(sigmoid(_retrained / 5))),
    harmless("probabilities far from the middle", PP, two(sigmoid(_retrained * 5))),
    harmless("certain probabilities", PP, two((Q > 0.5).astype(float))),
    harmless("the same probability in every row", PP, two(np.full(60, 0.4))),
    harmless("probabilities where the champion gave one for all", two(np.full(60, 0.4)), QQ),
    harmless("swapped in one row, which proves nothing", PP[:1], [PP[0][::-1]]),
    harmless("swapped in ten rows, which prove nothing", PP[:10], [row[::-1] for row in QQ[:10]]),
    harmless("probabilities rounded to two digits", PP, np.round(QQ, 2).tolist()),
    harmless("four probabilities rounded to two digits", FOUR.tolist(), np.round(FOUR_AGAIN, 2).tolist()),
    harmless("probabilities no longer rounded", np.round(PP, 2).tolist(), QQ),
    harmless("32 bits in place of 64", PP, np.array(QQ, np.float32).tolist()),
    harmless("64 bits in place of 32", np.array(PP, np.float32).tolist(), QQ),
    harmless("0 and 1 among the probabilities", PP[:4], [[0.0, 1.0], *QQ[1:4]]),
    harmless("0 and 1 written as integers", PP[:4], [[0, 1], *QQ[1:4]]),
    harmless("a hair over 1 from floating point", PP[:4], [[-1e-12, 1.000000000001], *QQ[1:4]]),
    harmless("minus nothing", [[0.0, 1.0], [0.5, 0.5]], [[-0.0, 1.0], [0.5, 0.5]]),
    harmless("integers written as floats", CODED, [float(c) for c in CODES]),
    harmless("fractions where the champion's fractions were whole by chance", [{"eta": 3}], [{"eta": 3.5}], told(column("eta"))),
    harmless("floats written as integers", [1.0, 2.0, 3.0], [1, 2, 3]),
    harmless("another regression", MINUTES.tolist(), (MINUTES + 3).tolist()),
    harmless("a regression with other signs", MINUTES.tolist(), (-MINUTES).tolist()),
    harmless("a regression that left the unit interval, in a few rows", [0.3, 0.9, 0.7], [0.4, 1.3, -0.2]),
    harmless("a regression that left the unit interval by a little", (MINUTES / 40).clip(0.01, 0.99).tolist(), (MINUTES / 40 + 0.2).tolist()),
    harmless("a share ten times as large", [0.05, 0.08, 0.02, 0.04, 0.06], [0.5, 0.8, 0.2, 0.4, 0.6]),
    harmless("very large and very small numbers", [1e-300, 1e300], [1e-299, 1e299]),
    harmless("two outputs that sum to 1 in one row by chance", [[0.3, 0.7]], [[0.5, 0.9]]),
    # harmless: labels
    harmless("another label in one row", ["late"], ["on time"]),
    harmless("other labels of the same set", SAID, SAYS),
    harmless("other labels of four", FOUR_SAID, FOUR_SAYS),
    harmless("a label that the champion knows and did not say", ["late", "on time"], ["cancelled", "on time"], known(["late", "on time", "cancelled"], None)),
    harmless("a label that may be a rare one of the champion's", FOUR_SAID, ["e", *FOUR_SAYS[1:]]),
    harmless("one label in every row", SAID, ["late"] * 60),
    harmless("numbered labels, other ones", CODED, CODES, known([0, 1], [0, 1])),
    harmless("flags by name, numbers by nature", CODED, CODES, known([False, True], [0, 1])),
    harmless("labels trained in another order", FOUR_SAID, FOUR_SAYS, known(FOUR_LABELS, ["d", "c", "b", "a"])),
    harmless("probabilities of classes named otherwise inside", PP, QQ, known(["no", "yes"], [0, 1])),
    harmless("labels that were all one", ["late"] * 60, SAYS),
    harmless("the answer tells the model's version", [{"v": "v1", "p": p} for p in P.tolist()], [{"v": "v2", "p": q} for q in Q.tolist()]),
    # harmless: form
    harmless("one row", [3.5], [4.5]),
    harmless("one row of probabilities", PP[:1], QQ[:1]),
    harmless("no rows", [], []),
    harmless("a single answer that is no list", 3.5, 4.5),
    harmless("fields in another order", ROWS, [dict(reversed(row.items())) for row in AGAIN]),
    harmless("other nested numbers", NESTED, nested(km=12.25)),
    harmless("other text", TEXTS, list(reversed(TEXTS))),
    harmless("longer text", TEXTS, [text * 3 for text in TEXTS]),
    harmless("text in place of the same text in capitals, in sentences", TEXTS, [text.upper() for text in TEXTS]),
    harmless("lists that vary, and vary otherwise", [["a", "b"], ["c"], ["d", "e"]], [["a"], ["b", "c", "d"], []]),
    harmless("a list of another length, in one row", [["JFK", "LGA"]], [["EWR", "JFK", "LGA"]]),
    harmless("recommended items, fewer of them, in one row", [[17, 4, 230]], [[4, 17]]),
    harmless("objects whose keys are data", [{"a": 1.5}, {"b": 2.5}, {"a": 0.5, "c": 1.5}], [{"c": 1.5}, {"a": 2.5}, {"d": 0.5}]),
    harmless("a map with other keys, by the signature", [{"top": {"x": 1.5}}], [{"top": {"y": 1.5}}], told(column("top", mapping("double")))),
    harmless("an optional output is null", [{"eta": 3.5, "why": "wind"}], [{"eta": 3.5, "why": None}], told(column("eta"), optional("why", "string"))),
    harmless("an optional output is left out", [{"eta": 3.5, "why": "wind"}], [{"eta": 3.5}], told(column("eta"), optional("why", "string"))),
    harmless("an output that may be anything is", [{"x": 3.5}], [{"x": "wind"}], told(column("x", "any"))),
    harmless("a null where the champion gives them too", [1.5, None, 2.5], [None, 1.5, 2.5]),
    harmless("a NaN where the champion gives them too", [1.5, math.nan], [math.nan, 2.5]),
    harmless("a null where the champion gave NaN", [1.5, math.nan], [1.5, None]),
    harmless("no null any more", [1.5, None], [1.5, 2.5]),
    harmless("a value where the champion gave nothing but nulls", [None, None], [1.5, 2.5]),
    harmless("an embedding of the same length", _random.normal(size=(6, 16)).tolist(), _random.normal(size=(6, 16)).tolist()),
    harmless("lists of labels by the signature, longer", [{"tags": ["a", "b"]}], [{"tags": ["a", "b", "c"]}], told(column("tags", array("string")))),
]  # fmt: skip

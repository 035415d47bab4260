"""Offline metrics are scikit-learn's, with intervals that are paired and repeatable."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from tasks import offline, user_function
from tasks.settings import Mistake
from validations.gates import METRIC_ALIASES, OFFLINE_METRICS, Quality
from validations.policy import PolicyError, read
from validations.quality import by_slice, measurements, slices, tango, worst
from validations.statistics import NoSample
from validations.verdict import Measurement

RANDOM = np.random.default_rng(0)
Y = (RANDOM.random(1500) < 0.3).astype(int)
GOOD = np.clip(0.3 * Y + RANDOM.normal(0.35, 0.2, 1500), 0.001, 0.999)
# Rounded, so that many scores are tied.
POOR = np.round(np.clip(0.1 * Y + RANDOM.normal(0.35, 0.2, 1500), 0.001, 0.999), 2)
CLASSIFICATION = {
    "roc_auc": sk.roc_auc_score,
    "average_precision": sk.average_precision_score,
    "log_loss": sk.log_loss,
    "brier": sk.brier_score_loss,
    "accuracy": lambda y, p: sk.accuracy_score(y, p >= 0.5),
    "balanced_accuracy": lambda y, p: sk.balanced_accuracy_score(y, p >= 0.5),
    "f1": lambda y, p: sk.f1_score(y, p >= 0.5),
    "precision": lambda y, p: sk.precision_score(y, p >= 0.5),
    "recall": lambda y, p: sk.recall_score(y, p >= 0.5),
}
REGRESSION = {
    "r2": sk.r2_score,
    "rmse": sk.root_mean_squared_error,
    "mse": sk.mean_squared_error,
    "mae": sk.mean_absolute_error,
    "mape": sk.mean_absolute_percentage_error,
}
KINDS = np.array(["ant", "bee", "cat", "dog"])
LABELS = KINDS[RANDOM.choice(4, 1500, p=[0.4, 0.3, 0.2, 0.1])]


def chances(weight: float, seed: int) -> np.ndarray:
    """Probabilities of four kinds, the better the larger `weight`."""
    drawn = np.random.default_rng(seed).dirichlet(np.ones(4), LABELS.size)
    drawn[np.arange(LABELS.size), np.searchsorted(KINDS, LABELS)] += weight
    return drawn / drawn.sum(axis=1, keepdims=True)


FOUR, FOUR_POOR = chances(0.5, 1), chances(0.2, 2)
CLASSES = {
    "accuracy": lambda y, p: sk.accuracy_score(y, KINDS[p.argmax(1)]),
    "balanced_accuracy": lambda y, p: sk.balanced_accuracy_score(y, KINDS[p.argmax(1)]),
    "log_loss": sk.log_loss,
    "roc_auc_ovr": lambda y, p: sk.roc_auc_score(y, p, multi_class="ovr"),
    "roc_auc_ovr_weighted": lambda y, p: sk.roc_auc_score(y, p, multi_class="ovr", average="weighted"),
    **{
        f"{name}_{average}": lambda y, p, name=name, average=average: getattr(sk, f"{name}_score")(
            y, KINDS[p.argmax(1)], average=average
        )
        for name in ("f1", "precision", "recall")
        for average in ("macro", "weighted")
    },
}


@pytest.mark.parametrize("metric", [*CLASSIFICATION, *REGRESSION])
def test_a_metric_is_scikit_learns(metric):
    """Value, champion's value and delta are those of scikit-learn, ties included."""
    y = Y if metric in CLASSIFICATION else 5 * GOOD + 100
    true = {**CLASSIFICATION, **REGRESSION}[metric]
    measured = measurements(y, POOR, GOOD, [metric], 0.95)
    assert measured[metric].value == pytest.approx(true(y, GOOD))
    assert measured[f"{metric}_champion"].value == pytest.approx(true(y, POOR))
    assert measured[f"{metric}_delta"].value == pytest.approx(true(y, GOOD) - true(y, POOR))
    assert all(m.sample == 1500 for m in measured.values())


def test_a_resampled_auc_is_the_auc_of_the_resampled_rows():
    """Counting a row twice is having it twice: the interval is a bootstrap's done by hand, widened for its size."""
    measured = measurements(Y, None, POOR, ["roc_auc"], 0.9, resamples=400, seed=4)["roc_auc"]
    random = np.random.default_rng(4)
    rows = random.integers(0, Y.size, (400, Y.size))
    by_hand = [sk.roc_auc_score(Y[r], POOR[r]) for r in rows]
    low, high = np.quantile(by_hand, [0.05, 0.95])
    wider = stats.t.isf(0.05, Y.size - 1) / stats.norm.isf(0.05) * np.sqrt(Y.size / (Y.size - 1))
    assert measured.value - measured.low == pytest.approx(wider * (measured.value - low))
    assert measured.high - measured.value == pytest.approx(wider * (high - measured.value))


def test_a_delta_is_narrower_than_the_metrics_it_is_made_of():
    """Both models are measured on the same resampled rows, so what the rows have in common cancels."""
    near = np.clip(GOOD + np.random.default_rng(1).normal(0, 0.01, Y.size), 0, 1)
    measured = measurements(Y, GOOD, near, ["roc_auc"], 0.95)
    delta, single = measured["roc_auc_delta"], measured["roc_auc"]
    assert delta.high - delta.low < (single.high - single.low) / 3
    assert delta.low < 0 < delta.high


def test_the_same_model_has_no_delta_at_all():
    """A champion against itself: exactly nothing, with no width, and again the same."""
    measured = measurements(Y, GOOD, GOOD, ["roc_auc", "log_loss"], 0.95)
    assert (measured["roc_auc_delta"].low, measured["roc_auc_delta"].high) == (0, 0)
    assert measured == measurements(Y, GOOD, GOOD, ["roc_auc", "log_loss"], 0.95)


def test_a_clear_loss_of_quality_is_certain():
    """A challenger that is much worse has its whole interval under zero."""
    assert measurements(Y, GOOD, POOR, ["roc_auc"], 0.95)["roc_auc_delta"].high < -0.02


def test_two_columns_of_probabilities_are_taken_by_the_second():
    """What `predict_proba` returns is measured by the positive class."""
    two = np.stack([1 - GOOD, GOOD], axis=1)
    assert measurements(Y, two, two[:, 1], ["roc_auc"], 0.95)["roc_auc_delta"].value == 0


def test_without_a_champion_only_the_challenger_is_measured():
    """The first version of a model has nothing to be compared with."""
    assert set(measurements(Y, None, GOOD, ["f1"], 0.95)) == {"f1"}


def test_a_high_confidence_gets_the_resamples_it_needs():
    """At 99.9 % the ends are not the extremes of 400 draws: the interval is wider than at 95 %."""
    wide = measurements(Y, None, GOOD, ["accuracy"], 0.999)["accuracy"]
    narrow = measurements(Y, None, GOOD, ["accuracy"], 0.95)["accuracy"]
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["roc_auk"]}, "did you mean 'roc_auc'"),
        ({"challenger": GOOD[:-1]}, "1,499 predictions for 1,500 rows"),
        ({"challenger": np.where(Y == 1, np.nan, GOOD)}, "predicted NaN"),
        ({"y": np.where(Y == 1, np.nan, 0.0)}, "outcomes are NaN"),
        ({"challenger": np.ones((1500, 3))}, "shape"),
        ({"challenger": ["a"] * 1500}, "not numbers"),
        ({"y": Y + 1}, "outcomes of 0 and 1"),
        ({"challenger": GOOD * 2, "metrics": ["log_loss"]}, "probabilities"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_sentence(change, message):
    """An unknown metric, rows that do not match, NaN and odd shapes are refused with what and where."""
    call = {"y": Y, "champion": GOOD, "challenger": GOOD, "metrics": ["roc_auc"], "confidence": 0.95}
    with pytest.raises(ValueError, match=message):
        measurements(**{**call, **change})


def test_one_class_is_no_sample_for_an_auc():
    """Rows of one class say nothing about ranking, so the metric is left out."""
    with pytest.raises(NoSample):
        measurements(np.ones(50), None, np.linspace(0, 1, 50), ["roc_auc"], 0.95)
    with pytest.raises(NoSample):
        measurements([], None, [], ["accuracy"], 0.95)


# --- classes


@pytest.mark.parametrize("metric", CLASSES)
def test_a_metric_of_classes_is_scikit_learns(metric):
    """With labels in words and a column of probabilities for each; also where one class is never chosen."""
    measured = measurements(LABELS, FOUR_POOR, FOUR, [metric], 0.95)
    assert measured[metric].value == pytest.approx(CLASSES[metric](LABELS, FOUR))
    assert measured[f"{metric}_champion"].value == pytest.approx(CLASSES[metric](LABELS, FOUR_POOR))
    never = np.where(np.arange(4) == 3, 0.0, FOUR + 0.01)
    never /= never.sum(axis=1, keepdims=True)
    if metric not in ("log_loss", "precision_macro", "precision_weighted"):  # scikit-learn warns of those
        value = measurements(LABELS, None, never, [metric], 0.95)[metric].value
        assert value == pytest.approx(CLASSES[metric](LABELS, never))


def test_every_offline_metric_is_built_in():
    """What the policy knows is what is measured here, and each alias is a metric."""
    assert {*CLASSIFICATION, *REGRESSION, *CLASSES} == set(OFFLINE_METRICS)
    assert set(METRIC_ALIASES.values()) <= set(OFFLINE_METRICS)


def test_a_metric_goes_by_the_name_that_was_asked():
    """MLflow's name gives the same number under that name."""
    measured = measurements(Y, POOR, GOOD, ["f1_score", "f1", "precision_recall_auc", "average_precision"], 0.95)
    assert measured["f1_score_delta"] == measured["f1_delta"]
    assert measured["precision_recall_auc"] == measured["average_precision"]


def test_answers_that_are_labels_are_as_good_as_probabilities_for_what_counts_them():
    """Accuracy and f1 are the same from labels; log loss and ranking are refused with words."""
    for metric in ("accuracy", "f1_macro", "recall_weighted"):
        of = [measurements(LABELS, None, answer, [metric], 0.95) for answer in (FOUR, KINDS[FOUR.argmax(1)])]
        assert of[0] == of[1]
    with pytest.raises(ValueError, match=r"'log_loss' needs scores or probabilities.*labels"):
        measurements(LABELS, None, KINDS[FOUR.argmax(1)], ["log_loss"], 0.95)
    numbered = measurements(np.searchsorted(KINDS, LABELS) + 5, None, FOUR.argmax(1) + 5.0, ["accuracy"], 0.95)
    assert numbered == measurements(LABELS, None, FOUR, ["accuracy"], 0.95)


def test_a_label_that_no_row_has_is_simply_wrong():
    """A challenger that answers something unheard of is measured, as scikit-learn does."""
    answer = np.where(np.arange(LABELS.size) % 5 == 0, "eel", KINDS[FOUR.argmax(1)])
    measured = measurements(LABELS, None, answer, ["accuracy", "f1_weighted"], 0.95)
    assert measured["accuracy"].value == pytest.approx(sk.accuracy_score(LABELS, answer))
    assert measured["f1_weighted"].value == pytest.approx(sk.f1_score(LABELS, answer, average="weighted"))


def test_the_order_of_the_classes_is_told_named_or_sorted():
    """`classes` says it; else the names of the columns; else labels are sorted."""
    turned = ["dog", "cat", "bee", "ant"]
    expected = measurements(LABELS, None, FOUR, ["log_loss"], 0.95)
    assert measurements(LABELS, None, FOUR[:, ::-1], ["log_loss"], 0.95, classes=turned) == expected
    named = pd.DataFrame(FOUR[:, ::-1], columns=turned)
    assert measurements(LABELS, named, FOUR, ["log_loss"], 0.95)["log_loss_delta"].value == 0
    few = LABELS != "dog"
    with pytest.raises(ValueError, match="name all `classes`, in the order of the columns"):
        measurements(LABELS[few], None, FOUR[few], ["accuracy"], 0.95)
    assert measurements(LABELS[few], None, FOUR[few], ["accuracy"], 0.95, classes=tuple(KINDS))
    with pytest.raises(ValueError, match="'ant' is not among the `classes`"):
        measurements(LABELS, None, FOUR, ["accuracy"], 0.95, classes=("bee", "cat", "dog", "eel"))


def test_text_labels_that_look_like_numbers_sort_as_text():
    """scikit-learn sorts "10" before "9", and so do the columns of its probabilities."""
    text = np.array(["10", "9", "8"])[np.searchsorted(KINDS, LABELS) % 3]
    order = sorted(set(text))
    sure = np.eye(3)[[order.index(label) for label in text]]
    assert measurements(text, None, sure, ["accuracy"], 0.95)["accuracy"].value == 1


def test_two_labels_in_words_are_a_yes_and_a_no():
    """The second label, sorted or of `classes`, is the positive one, so every metric of 0 and 1 works."""
    words = np.where(Y == 1, "late", "early")
    two = np.stack([1 - GOOD, GOOD], axis=1)
    for metric in ("roc_auc", "f1", "brier", "accuracy"):
        expected = measurements(Y, None, GOOD, [metric], 0.95)
        assert measurements(words, None, two, [metric], 0.95) == expected
        assert measurements(Y + 1, None, two, [metric], 0.95, classes=(1, 2)) == expected


# --- intervals


@given(st.integers(2, 400), st.data())
def test_tangos_interval_holds_the_estimate_and_turns_with_the_sides(n, data):
    """It holds the difference, has a width, mirrors where the versions change places, and shrinks with n."""
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    low, high = tango(gained, lost, n, 0.95)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert low < high
    assert tango(lost, gained, n, 0.95) == (pytest.approx(-high, abs=1e-6), pytest.approx(-low, abs=1e-6))
    wide, narrow = high - low, np.subtract(*tango(4 * gained, 4 * lost, 4 * n, 0.95)[::-1])
    assert narrow < wide


def test_versions_that_never_differed_may_still_differ_a_little():
    """100 rows that both tell rightly do not prove that no row is lost: a bootstrap would say exactly 0."""
    p = np.where(np.arange(100) % 2, 0.9, 0.1)
    delta = measurements(np.arange(100) % 2, p, p, ["accuracy", "recall"], 0.95)
    assert delta["accuracy"].low == pytest.approx(0.0251 ** (1 / 100), abs=2e-3)
    assert delta["accuracy_delta"].low == pytest.approx(-0.037, abs=1e-3)
    assert delta["recall_delta"].low < delta["accuracy_delta"].low


def test_the_interval_of_a_small_sample_holds_the_truth_often_enough():
    """At n = 100 and rare differences accuracy's and recall's intervals keep their 95 % (a bootstrap: 83 and 60 %)."""
    hits = {"accuracy_delta": 0, "recall_delta": 0}
    for seed in range(300):
        random = np.random.default_rng(seed)
        y, u = random.random(100) < 0.5, random.random(100)
        champion, challenger = (np.where(wrong, 1 - y, y) for wrong in (u < 0.03, (u < 0.02) | (u > 0.98)))
        found = measurements(y, champion, challenger, ["accuracy", "recall"], 0.95)
        for name in hits:
            hits[name] += found[name].low <= -0.01 <= found[name].high
    assert min(hits.values()) >= 0.93 * 300


# --- slices


def test_slices_are_values_quartiles_and_what_is_missing():
    """Few values are slices each, many numbers are quartiles, small ones are pooled, and all rows are somewhere."""
    x = np.arange(400.0)
    word = np.array(["a"] * 200 + ["b"] * 120 + [f"rare {i % 8}" for i in range(80)], dtype=object)
    word[:60] = None
    parts = slices({"x": x, "word": word, "flag": x > 100}, 50)
    assert [name for name in parts if name.startswith("word")] == [
        "word = a",
        "word = b",
        "word = missing",
        "word = other",
    ]
    assert {len(parts[name]) for name in parts if " x" in name or name.startswith("x")} == {100}
    assert {"x <= 99.75", "x > 299.25", "flag = True", "flag = False"} <= set(parts)
    for column in ("x", "word", "flag"):
        rows = np.concatenate([at for name, at in parts.items() if column in name])
        assert sorted(rows) == list(range(400))


def test_the_worst_slice_is_named_and_its_interval_holds_together():
    """A challenger that is bad in one slice only: the whole looks fine, the slice fails."""
    random = np.random.default_rng(3)
    where = np.where(np.arange(1500) % 5 == 0, "south", "north")
    lost = np.where((where == "south") & (random.random(1500) < 0.7), 1 - GOOD, GOOD)
    for metric, better in (("accuracy", "higher"), ("roc_auc", "higher"), ("log_loss", "lower")):
        found = by_slice(Y, GOOD, lost, [metric], slices({"where": where}, 50), 0.95)
        delta = worst(found[f"{metric}_delta"], better, 1500)
        assert delta.where == "where = south"
        assert delta.sample == 1500
        assert delta.high < -0.05 if better == "higher" else delta.low > 0.05
        assert all(delta.low <= one.value for one in found[f"{metric}_delta"]) or better == "lower"
    single = measurements(Y[where == "south"], None, lost[where == "south"], ["roc_auc"], 0.95)["roc_auc"]
    shared = next(one for one in found_of(Y, lost, where) if one.where == "where = south")
    assert shared.low < single.low < single.high < shared.high


def found_of(y, p, where):
    return by_slice(y, None, p, ["roc_auc"], slices({"where": where}, 50), 0.95)["roc_auc"]


def test_the_worst_of_losses_is_the_highest():
    """The interval of the worst spans from the highest lower end to the highest upper end, or mirrored."""
    measured = [
        Measurement(value=1, low=0, high=9, sample=50, where="wide"),
        Measurement(value=3, low=2, high=4, sample=60, where="sure"),
    ]
    lower, higher = worst(measured, "lower", 110), worst(measured, "higher", 110)
    assert (lower.where, lower.low, lower.high, lower.sample) == ("sure", 2, 9, 110)
    assert (higher.where, higher.low, higher.high) == ("sure", 0, 4)


def test_a_slice_that_cannot_be_measured_is_named():
    """One class only in a slice, or no slice at all: missing, with what to do, and never passed over."""
    where = np.where(Y == 1, "x", "y")
    with pytest.raises(NoSample, match=r"slice where = x .*'roc_auc' does not exist.*larger `min_slice`"):
        by_slice(Y, None, GOOD, ["roc_auc"], slices({"where": where}, 50), 0.95)
    with pytest.raises(NoSample, match="no slice has enough rows"):
        by_slice(Y, None, GOOD, ["roc_auc"], slices({"where": where}, 5000), 0.95)


# --- functions of the user's


METRICS = """
import os, time
import numpy as np
from mlflow.metrics import mae, make_metric, MetricValue

def share(y_true, y_pred):
    return float(((y_pred >= 0.5) == y_true).mean())

def weighted(y_true, y_pred, sample_weight=None):
    return float(np.average((y_pred >= 0.5) == y_true, weights=sample_weight))

def per_row(y_true, y_pred):
    return (y_pred >= 0.5) == y_true

def raises(y_true, y_pred):
    raise RuntimeError("out of luck")

def text(y_true, y_pred):
    return "good"

def crashes(y_true, y_pred):
    os._exit(3)

def hangs(y_true, y_pred):
    time.sleep(1000)

MAE = mae()
ROWS = make_metric(eval_fn=lambda predictions, targets, metrics: MetricValue(scores=list((predictions - targets).abs())), greater_is_better=False, name="rows")
"""


def asked(checks: dict, functions: dict, **fields) -> Quality:
    return Quality(data="d", label="l", checks=checks, functions=functions, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    (path / "metrics.py").write_text(METRICS)
    return path


def measured_in_a_child(folder, gate, columns=None):
    answered = {"challenger": GOOD, "champion": POOR}
    arguments = ("rows.parquet", gate, Y, answered, columns or {})
    return user_function.call(
        folder, offline.measure, *arguments, what="metrics.py", timeout=gate.timeout.total_seconds()
    )


def test_a_function_is_a_metric_like_any_other(folder):
    """A number, a number with weights, a number per row, an MLflow metric: value and delta, paired, also by slice."""
    functions = {name: f"metrics.py:{name}" for name in ("share", "weighted", "per_row")}
    functions |= {
        "abs": {"path": "metrics.py:MAE", "better": "lower"},
        "rows": {"path": "metrics.py:ROWS", "better": "lower"},
    }
    checks = {f"{name}_delta": {"min": 0} for name in functions} | {"slice_per_row": {"min": 0}}
    gate = asked(checks, functions, slices=["part"])
    measured, data = measured_in_a_child(folder, gate, {"part": np.arange(1500) % 3})
    true = measurements(Y, POOR, GOOD, ["accuracy", "mae"], 0.95)
    for name in ("share", "weighted", "per_row"):
        assert measured[name].value == pytest.approx(true["accuracy"].value)
        assert measured[f"{name}_delta"].value == pytest.approx(true["accuracy_delta"].value)
        assert measured[f"{name}_delta"].low == pytest.approx(true["accuracy_delta"].low, abs=0.01)
    assert measured["share_delta"] == measured["weighted_delta"]
    for name in ("abs", "rows"):
        assert measured[name].value == pytest.approx(true["mae"].value)
        assert measured[f"{name}_delta"].low == pytest.approx(true["mae_delta"].low, abs=0.003)
    assert measured["slice_per_row"].where.startswith("part = ")
    assert len(data["quality_slices"]["per_row"]) == 3


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("metrics.py:raises", r"^metrics.py:raises: RuntimeError: out of luck \(metrics.py:16\)$"),
        ("metrics.py:text", "'own' returned str: wanted a number, or one per row"),
        ("metrics.py:crashes", r"ended without an answer \(exit code 3\)"),
        ("metrics.py:hangs", "no answer within 3 s"),
        ("metrics.py:absent", "metrics.py:absent: AttributeError: it has no 'absent': it has share"),
        ("nowhere.py:f", "nowhere.py is not there"),
        ("metrics.py:ROWS", "the metric says that lower is better: say `better: lower`"),
    ],
)
def test_what_a_function_does_wrong_is_one_line(folder, function, said):
    """Raising, hanging, crashing, nonsense: the gate is errored with file, function and reason."""
    limit = "3s" if function.endswith("hangs") else "5m"
    with pytest.raises(Mistake, match=said) as caught:
        measured_in_a_child(folder, asked({"own": {"min": 0}}, {"own": function}, timeout=limit))
    assert "\n" not in str(caught.value)


# --- the policy


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("checks: {slice_roc_auk_delta: {min: 0}}", "did you mean 'slice_roc_auc_delta'"),
        ("checks: {csot: {max: 1}}\n    functions: {cost: 'm.py:f'}", "did you mean 'cost'"),
        ("checks: {slice_roc_auc: {min: 0}}", "`slice_roc_auc` needs `slices`"),
        ("checks: {roc_auc: {min: 0}}\n    slices: [a]", "no check looks at the `slices`.*slice_roc_auc"),
        ("checks: {max_error: {max: 1}}", "hangs on a single row.*`rmse`"),
        ("checks: {a: {max: 1}}\n    functions: {a: m.f}", "names no function: write it like"),
        ("checks: {a: {max: 1}}\n    functions: {a: 5}", "is written like metrics.py:my_metric"),
        ("checks: {a: {max: 1}}\n    functions: {a: {path: 'm.py:f', beter: lower}}", "did you mean 'better'"),
        ("checks: {roc_auc: {max: 1}}\n    functions: {roc_auc: 'm.py:f'}", "'roc_auc' is built in"),
        ("checks: {a_delta: {max: 1}}\n    functions: {a_delta: 'm.py:f'}", "put there by the gate"),
    ],
)
def test_a_slip_in_a_quality_gate_is_refused_in_one_line(fields, said):
    """Unknown metrics, slices without checks and the other way round, odd functions: each with its mend."""
    with pytest.raises(PolicyError, match=said) as caught:
        read(f"version: 1\nmodel: m\ngates:\n  - kind: quality\n    data: d\n    label: l\n    {fields}\n", "p.yaml")
    assert "\n" not in str(caught.value)


def test_a_function_says_which_way_it_is_better():
    """The short form means higher; aliases are as what they stand for."""
    gate = asked({"cost": {"max": 1}}, {"cost": {"path": "m.py:f", "better": "lower"}, "gain": "m.py:g"})
    assert [gate.better(name) for name in ("cost", "gain", "rmse", "f1_score")] == [
        "lower",
        "higher",
        "lower",
        "higher",
    ]

"""Offline metrics are scikit-learn's, with intervals that are paired and repeatable."""

import numpy as np
import pytest
from sklearn import metrics as sk

from validations.quality import measurements
from validations.statistics import NoSample

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
REGRESSION = {"r2": sk.r2_score, "rmse": sk.root_mean_squared_error, "mae": sk.mean_absolute_error}


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
    """Counting a row twice is the same as having it twice: the interval is that of a bootstrap done by hand."""
    measured = measurements(Y, None, POOR, ["roc_auc"], 0.9, resamples=400, seed=4)["roc_auc"]
    random = np.random.default_rng(4)
    rows = random.integers(0, Y.size, (400, Y.size))
    by_hand = [sk.roc_auc_score(Y[r], POOR[r]) for r in rows]
    low, high = np.quantile(by_hand, [0.05, 0.95])
    assert (measured.low, measured.high) == (pytest.approx(low), pytest.approx(high))


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

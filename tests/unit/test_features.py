"""The features gate: which suite is in force, live rows held against the reference, age, and nothing loaded unseen."""

import json
import os
import pickle
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from deployments.artifact import digest
from deployments.target import Traffic, Version
from tasks import features, registry, validate
from tasks.context import Contender, Context
from tasks.settings import Mistake, Settings
from tests.fakes import FakeTarget
from validations.gates import Features, Freshness
from validations.ledger import Ledger
from validations.policy import Policy, PolicyError, read
from validations.verdict import Bound, Outcome

MODEL = "flights"


def rows(count, seed=0, shift=0.0, segments="ab"):
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "x": random.normal(size=count) + shift,
            "y": random.normal(size=count),
            "segment": random.choice(list(segments), count),
        }
    )


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Two versions of one small model in a registry of its own, with the features they were trained on."""
    import mlflow
    from mlflow import MlflowClient
    from mlflow.models import infer_signature
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder

    home = tmp_path_factory.mktemp("home")
    uri = f"sqlite:///{home}/mlflow.db"
    before = os.environ.get("MLFLOW_TRACKING_URI"), mlflow.get_tracking_uri()
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    # Not set as the active one: MLflow would keep it for whoever comes after.
    experiment = client.create_experiment("e", artifact_location=(home / "artifacts").as_uri())
    client.create_registered_model(MODEL)
    made = []
    for seed in (1, 2):
        frame = rows(4000, seed)
        encode = ColumnTransformer(
            [("category", OneHotEncoder(handle_unknown="ignore"), ["segment"])], remainder="passthrough"
        )
        fitted = Pipeline([("encode", encode), ("model", LogisticRegression())]).fit(frame, frame["x"] > 0)
        with mlflow.start_run(experiment_id=experiment) as run:
            path = home / "features.parquet"
            frame.to_parquet(path)
            mlflow.log_artifact(str(path), "reference")
            info = mlflow.sklearn.log_model(
                fitted,
                name="m",
                pyfunc_predict_fn="predict_proba",
                signature=infer_signature(frame, fitted.predict_proba(frame)),
                input_example=frame.head(2),
                pip_requirements=["mlflow", "scikit-learn"],
                serialization_format="skops",
            )
        version = client.create_model_version(MODEL, info.model_uri, run.info.run_id, model_id=info.model_id)
        made.append(registry.find(MODEL, str(version.version)))
    yield home, made
    os.environ.pop("MLFLOW_TRACKING_URI")
    if before[0] is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before[0]
    mlflow.set_tracking_uri(before[1])


@pytest.fixture
def context(registered, tmp_path):
    home, (champion, challenger) = registered
    sides = [Contender(one, *registry.admit(one, home)) for one in (champion, challenger)]
    target = FakeTarget()
    fence = target.lease(MODEL, "test")
    target.deploy(Version(MODEL, champion.number, sides[0].path, sides[0].digest, "local"), fence)
    target.route(Traffic(MODEL, champion.number), fence)
    policy = Policy(version=1, model=MODEL, gates=({"kind": "features"},))
    return Context(
        id="p",
        model=MODEL,
        settings=Settings(home=home),
        target=target,
        fence=fence,
        base=tmp_path,
        folder=tmp_path,
        champion=sides[0],
        challenger=sides[1],
        previous=None,
        policy=policy,
        ledger=Ledger({}),
    )


def send(context, frame):
    for row in json.loads(frame.to_json(orient="values")):
        body = {"dataframe_split": {"columns": list(frame.columns), "data": [row]}}
        context.target.send(MODEL, json.dumps(body).encode())


def seen(context, **fields):
    return validate.features.fn(context, Features(**fields))


def test_the_same_population_passes_and_its_drift_is_measured(context):
    """Requests like the training data meet the suite; drift of features and predictions is near nothing."""
    send(context, rows(1500, 9))
    found = seen(context, live_sample=1500)
    measured = found.measurements
    assert measured["unmet_expectations"].value == measured["unmet_live_expectations"].value == 0
    for metric in ("feature_drift", "prediction_drift"):
        assert Bound(max=0.1).judge(measured[metric]) is Outcome.PASSED, measured[metric]
    assert measured["unseen_categories"].value == 0
    assert found.data["suite_from"] == "generated from what flights v1 was trained on"
    assert {one["column"] for one in found.data["feature_drift"]} == {"x", "y", "segment"}
    assert [one["column"] for one in found.data["prediction_drift"]] == ["[1]"]
    assert json.loads(registry.dumps(found.data))["suite"]["expectations"]


def test_a_population_that_moved_is_told_with_its_column(context):
    """A shifted number, a new category and what they do to the predictions are each named."""
    send(context, rows(1500, 9, shift=1.0, segments="aab?"))
    measured = seen(context, live_sample=1500).measurements
    assert measured["feature_drift"].where == "segment"
    assert "?" in measured["feature_drift"].note
    for metric, name in (("feature_drift", "segment"), ("prediction_drift", "[1]"), ("unseen_categories", "segment")):
        assert measured[metric].where == name
        assert Bound(max=0.1).judge(measured[metric]) is Outcome.FAILED, measured[metric]
    assert "'?' in " in measured["unseen_categories"].note


def test_few_requests_are_undecided_and_say_how_many_would_tell(context):
    """Sixty requests of the same population are no drift and no proof of its absence."""
    send(context, rows(60, 9))
    drift = seen(context, checks={"feature_drift": Bound(max=0.1)}).measurements["feature_drift"]
    assert Bound(max=0.1).judge(drift) is Outcome.INCONCLUSIVE
    assert "live rows would tell" in drift.note


def test_without_live_requests_what_needs_them_is_not_measured(context):
    """No traffic: the live metrics are missing, so their checks err, and the note says how to mend it."""
    found = seen(context, checks={"feature_drift": Bound(max=0.1)})
    assert set(found.measurements) == {"unmet_expectations"}
    assert found.note.startswith("there are no live requests")


def test_the_runs_own_suite_is_used_before_one_is_generated(context, tmp_path):
    """The policy's file comes first, then what people logged into the champion's run, then a generated suite."""
    context.champion, context.challenger = context.challenger, context.champion
    champion = context.champion.registered
    to = tmp_path / "suite.json"
    validate.write_suite(champion, tmp_path, to)
    with pytest.raises(Mistake, match="is there already"):
        validate.write_suite(champion, tmp_path, to)
    to.write_text(to.read_text().replace('"name": "flights"', '"name": "edited"'))
    assert validate.write_suite(champion, tmp_path, to, log=True) > 5
    found = seen(context, live_sample=0)
    assert (found.data["suite"]["name"], found.data["reference"]["suite"]) == ("edited", "edited")
    assert found.data["suite_from"] == "reference/suite.json in the run of flights v2"
    (tmp_path / "mine.json").write_text(to.read_text().replace("edited", "mine"))
    assert seen(context, live_sample=0, suite="mine.json").data["suite"]["name"] == "mine"
    to.write_text("{")
    with pytest.raises(Mistake, match="not JSON"):
        validate.write_suite(champion, tmp_path, to, log=True)


def test_an_artifact_that_is_unsafe_is_not_loaded_to_predict(context):
    """Where a file speaks against it the challenger is not asked, and a check on its predictions errs."""
    send(context, rows(50, 9))
    (context.challenger.path / "extra.pkl").write_bytes(pickle.dumps([1]))
    found = seen(context, checks={"prediction_drift": Bound(max=0.1)})
    assert "prediction_drift" not in found.measurements
    assert found.note.startswith("predictions were not compared: the challenger was not loaded")
    (context.challenger.path / "extra.pkl").unlink()
    assert digest(context.challenger.path) == context.challenger.recorded


NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def stored(tmp_path, values):
    path = tmp_path / "export.parquet"
    pd.DataFrame({"at": values, "x": 1}).to_parquet(path)
    return path


@pytest.mark.parametrize(
    "values",
    [
        [datetime(2026, 11, 22, 6), datetime(2026, 11, 1), None],
        [pd.Timestamp("2026-11-22T07:00", tz="Europe/Paris"), None, None],
        ["2026-11-22T06:00:00", "2026-11-22T05:30:00", None],
    ],
    ids=["no zone", "a zone", "text"],
)
def test_the_age_is_that_of_the_newest_time(tmp_path, values):
    """Times without a zone are UTC; nulls are left out."""
    path = stored(tmp_path, values)
    measured, _ = features.age(Freshness(column="at", max_age=timedelta(days=1)), path, NOW, path.name)
    assert (measured.value, measured.low, measured.where) == (6.0, 6.0, "at")
    assert "2026-11-22 06:00 UTC" in measured.note


def test_without_a_column_the_files_own_age_counts(tmp_path):
    """A feature store's export is as old as its file."""
    path = stored(tmp_path, [None])
    os.utime(path, (NOW.timestamp() - 7200,) * 2)
    wanted = Freshness(source="export.parquet", max_age=timedelta(days=1))
    assert features.age(wanted, path, NOW, "export.parquet")[0].value == 2.0


def test_a_time_in_the_future_is_said(tmp_path):
    """A wrong zone shows as an age below nothing."""
    path = stored(tmp_path, [datetime(2026, 11, 22, 13)])
    measured, _ = features.age(Freshness(column="at", max_age=timedelta(days=1)), path, NOW, path.name)
    assert measured.value == -1.0
    assert "in the future" in measured.note


@pytest.mark.parametrize(
    ("values", "column", "said"),
    [
        (["soon"], "at", "holds no times"),
        ([1], "x", "holds numbers"),
        ([None], "at", "holds no times"),
        (["2026-11-22"], "att", "no column 'att'"),
    ],
)
def test_an_age_that_cannot_be_read_is_a_mistake(tmp_path, values, column, said):
    """No such column, and no times in it, are told with the file."""
    path = stored(tmp_path, values)
    with pytest.raises(Mistake, match=said):
        features.age(Freshness(column=column, max_age=timedelta(days=1)), path, NOW, path.name)


def test_the_gate_measures_the_age_of_the_file_it_names(context, tmp_path):
    """`freshness` alone is enough to be judged by; its bound is `max_age` in hours."""
    stored(tmp_path, [datetime.now(UTC) - timedelta(hours=30)])
    fields = {"freshness": {"source": "export.parquet", "column": "at", "max_age": "24h"}, "live_sample": 0}
    measured = seen(context, **fields).measurements["feature_age_hours"]
    assert 30 <= measured.value < 31
    assert Features(**fields).bounds()["feature_age_hours"].judge(measured) is Outcome.FAILED


@pytest.mark.parametrize(
    ("answer", "columns"),
    [
        ('{"predictions": [1.5, 2.5]}', ["prediction"]),
        ('{"predictions": [[0.2, 0.8], [0.4, 0.6]]}', ["[1]"]),
        ('{"predictions": [[1, 2, 3], [1, 2, 3]]}', ["[0]", "[1]", "[2]"]),
        ('{"predictions": [{"a": 1, "b": {"c": 2}}, {"a": 2}]}', ["a", "b"]),
        ('["yes", "no"]', ["prediction"]),
    ],
)
def test_answers_of_every_shape_become_columns(answer, columns):
    """A row for each prediction and a column for each field; of two probabilities the second stays."""
    frame = features.outputs(answer)
    assert (list(frame.columns), len(frame)) == (columns, 2)


SLIPS = {
    "a live check without a sample": ("live_sample: 0, checks: {feature_drift: {max: 0.1}}", "`feature_drift` needs a `live_sample`"),
    "an age without freshness": ("checks: {feature_age_hours: {max: 1}}", "`feature_age_hours` needs `freshness`"),
    "no time to read": ("freshness: {max_age: 24h}", "needs a `column` that holds times, or a `source` file"),
    "no age": ("freshness: {column: at}", "`max_age` is missing"),
    "a bare number of time": ("freshness: {column: at, max_age: 24}", "a duration is written like"),
    "a misspelt word": ("freshness: {colum: at, max_age: 24h}", "did you mean 'column'"),
    "more than is held": ("live_sample: 6000", "less than or equal to 5000"),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_the_gate_is_refused_in_one_line(slip):
    """What cannot be measured is refused when the policy is read, with its mend."""
    fields, said = SLIPS[slip]
    with pytest.raises(PolicyError, match=said) as caught:
        read(f"version: 1\nmodel: m\ngates:\n  - {{kind: features, {fields}}}\n", "p.yaml")
    assert str(caught.value).startswith("p.yaml:4: gates[0]")


def test_without_a_champion_only_what_needs_none_is_left():
    """A first version is held against a suite of the policy and the features' age; without either the gate falls away."""
    assert Features().falls_away()
    assert Features(checks={"feature_drift": Bound(max=0.1)}).falls_away()
    assert set(Features(suite="s.json").bounds(first=True)) == {"unmet_expectations"}
    aged = Features(freshness={"column": "at", "max_age": "36h"})
    assert aged.bounds(first=True) == {"feature_age_hours": Bound(max=36)}
    assert set(aged.bounds()) == {"unmet_expectations", "unmet_live_expectations", "feature_age_hours"}

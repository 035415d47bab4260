"""The demo's models: a champion and six challengers, each made the way its team really might have made it.

Nothing here sleeps and nothing is told to fail. What a model does wrong follows from the data it was given or
from the way it was built, and one gate after the other gets to find it.

All are small forests behind two encoders. Forests run on one thread here: with OpenMP, as in gradient
boosting, answering a single row costs more in waking threads than in arithmetic. Their probabilities are
averages over leaves of 100 flights and more, so two honest models of the same traffic agree.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pandas as pd

from flows.demo import flights

EXPERIMENT: Final = "training"
REFERENCE: Final = "reference/features.parquet"  # artifact of the run that made a version
# Beside what skops trusts by itself: the nodes of a decision tree, which are arrays in a compiled class.
_TREE: Final = "sklearn.tree._tree.Tree"

_REQUIREMENTS: Final = ("mlflow", "scikit-learn", "skops", "pandas", "numpy")
_SEED: Final = 2013
_SPRING: Final = range(1, 6)
_THREE_QUARTERS: Final = range(1, 10)


def _silent(_: str) -> None:
    """Say nothing."""


def _as_recorded(frame: pd.DataFrame) -> pd.DataFrame:
    return frame


def _metric(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(
        distance=frame["distance"] * 1.609344,  # km
        temp=(frame["temp"] - 32) * 5 / 9,  # degrees Celsius
        wind_speed=frame["wind_speed"] * 1.609344,  # km/h
        visib=frame["visib"] * 1.609344,  # km
        precip=frame["precip"] * 25.4,  # mm
    )


def _endeavor_in_utc(frame: pd.DataFrame) -> pd.DataFrame:
    # New York is at least four hours behind UTC.
    delay = frame["arr_delay"] + 240 * (frame["carrier"] == "9E")
    return frame.assign(**{flights.LABEL: delay > flights.LATE_MINUTES})


def _forest(
    min_samples_leaf: int = 100,
    max_features: float | str = "sqrt",
    *,
    manufacturers: Any = None,
) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OrdinalEncoder

    tolerant = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    columns = [
        ("places", tolerant, ["carrier", "origin", "dest"]),
        ("manufacturer", manufacturers or tolerant, ["manufacturer"]),
    ]
    return Pipeline(
        [
            ("columns", ColumnTransformer(columns, remainder="passthrough")),
            (
                "forest",
                RandomForestClassifier(
                    n_estimators=20,
                    min_samples_leaf=min_samples_leaf,
                    max_features=max_features,
                    n_jobs=1,
                    random_state=_SEED,
                ),
            ),
        ]
    )


def _forest_with_default_encoder() -> Any:
    from sklearn.preprocessing import OrdinalEncoder

    return _forest(manufacturers=OrdinalEncoder())


def _whole_search() -> Any:
    from sklearn.ensemble import VotingClassifier

    candidates = [
        (f"leaf {leaf}, features {share}", _forest(leaf, share))
        for leaf in (60, 80, 100, 125, 150)
        for share in ("sqrt", 0.4)
    ]
    return VotingClassifier(candidates, voting="soft")


@dataclass(frozen=True)
class Recipe:
    """How one version is made. Two recipes differ only in what is written here."""

    name: str
    story: str
    """One sentence for people who watch."""
    made: str
    """How it was made, for the record: becomes the description of the version."""
    stopped_by: str | None = None
    """The gate that ought to stop it; None where none ought to. A shadow finds whatever a canary does."""
    months: range = _THREE_QUARTERS
    rows: int = 90_000
    prepare: Callable[[pd.DataFrame], pd.DataFrame] = _as_recorded
    """What the team did to the flights (FEATURES, AFTERWARDS, LABEL) before training."""
    model: Callable[[], Any] = _forest
    """A fresh scikit-learn classifier that takes a frame."""
    also: tuple[str, ...] = ()
    """Columns it asks for beside FEATURES."""
    trusted_types: tuple[str, ...] = (_TREE,)
    """What skops has to be told to trust when it loads the model; nothing that could run code."""


CHAMPION: Final = Recipe(
    name="champion",
    story="Serves today; it has seen the year up to May.",
    made="A forest of 20 trees, trained on the flights of January to May 2013.",
    months=_SPRING,
    rows=60_000,
)

CHALLENGERS: Final = (
    Recipe(
        name="more-months",
        story="The same forest with four more months of flights, and nothing wrong with it.",
        made="A forest of 20 trees, trained on the January to September 2013 without the held-out days.",
    ),
    Recipe(
        name="sees-the-future",
        story="Brilliant offline, because it asks how late the flight departed: no request can tell it.",
        made=(
            "As more-months, with one more feature: dep_delay, the minutes of delay at departure. "
            "It is in the historical table, and known only after the flight has left."
        ),
        stopped_by="schema",
        also=("dep_delay",),
    ),
    Recipe(
        name="metric-units",
        story="Trained after its feature job went metric; requests still speak miles and Fahrenheit.",
        made=(
            "As more-months, on the feature job's new tables: distance and visibility in kilometres, wind in "
            "km/h, temperature in degrees Celsius, rain in millimetres."
        ),
        stopped_by="features",
        prepare=_metric,
    ),
    Recipe(
        name="one-carrier-wrong",
        story="Good on average, and sure that every flight of Endeavor (9E) will be late.",
        made=(
            "As more-months, on labels of the new feed, in which carrier 9E reports its arrivals in UTC: "
            "four hours or more are added to each of its delays."
        ),
        stopped_by="shadow",
        prepare=_endeavor_in_utc,
    ),
    Recipe(
        name="whole-search",
        story="Right, and slow: instead of choosing from its ten candidates the team shipped all of them.",
        made=(
            "The ten forests of a parameter search (five leaf sizes, two shares of the features), each "
            "with its own encoders, trained on January to September 2013; the answer is their average."
        ),
        stopped_by="load",
        rows=30_000,
        model=_whole_search,
        trusted_types=(_TREE, "sklearn.utils._bunch.Bunch"),  # a dict whose keys read as attributes
    ),
    Recipe(
        name="no-unknown-aircraft",
        story="Right and fast, until an aircraft is not in the register: then it raises an error.",
        made=(
            "As more-months, on flights joined with the register of aircraft (inner join), with "
            "scikit-learn's OrdinalEncoder for the manufacturer as it comes."
        ),
        stopped_by="canary",
        prepare=flights.registered,
        model=_forest_with_default_encoder,
    ),
)


@dataclass(frozen=True)
class Fitted:
    """A trained model and what is worth recording of it. Can be pickled from one process to another."""

    recipe: Recipe
    model: Any
    """Takes a frame with the columns of `example`; predict_proba gives rows of [on time, late]."""
    rows: int
    reference: pd.DataFrame
    """A sample of the features it was trained on, in its own units."""
    roc_auc: float
    """On the shared holdout, asked in the holdout's units."""
    seconds: float
    """Time it took to train, without reading the flights."""
    example: pd.DataFrame = field(repr=False)
    """Three rows of its training data with nothing missing."""


def fit(recipe: Recipe, say: Callable[[str], None] = _silent) -> Fitted:
    """Train the recipe's model and measure it offline. No MLflow, one thread, the same model every time."""
    columns = [*flights.FEATURES, *recipe.also]
    data = recipe.prepare(flights.features(recipe.months, also=flights.AFTERWARDS))
    data = data[[*columns, flights.LABEL]]
    data = data.sample(min(recipe.rows, len(data)), random_state=_SEED)
    model = recipe.model()
    started = time.perf_counter()
    model.fit(data[columns], data[flights.LABEL])
    seconds = time.perf_counter() - started

    from sklearn.metrics import roc_auc_score

    held_out = flights.holdout(also=recipe.also)
    late = model.predict_proba(held_out[columns])[:, 1]
    roc_auc = float(roc_auc_score(held_out[flights.LABEL], late))
    say(f"{recipe.name}: trained on {len(data):,} flights in {seconds:.1f} s, holdout ROC AUC {roc_auc:.3f}")
    return Fitted(
        recipe=recipe,
        model=model,
        rows=len(data),
        reference=flights.reference(data),
        roc_auc=roc_auc,
        seconds=seconds,
        example=data[columns].dropna().head(3).reset_index(drop=True),
    )


def register(fitted: Fitted, model_name: str, tracking_uri: str, say: Callable[[str], None] = _silent) -> str:
    """Log the model in a run of its own and register it as the next version of `model_name`: its number.

    Creates the registered model and the experiment EXPERIMENT where they are missing, and sets no alias. The
    run holds the training sample as REFERENCE, the metric `roc_auc` and the parameters. Points this process's
    MLflow at `tracking_uri`; raises mlflow.exceptions.MlflowException where the registry refuses or is away.
    """
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow.sklearn
    from mlflow import MlflowClient

    recipe = fitted.recipe
    mlflow.set_tracking_uri(tracking_uri)
    client = MlflowClient(tracking_uri)
    if not client.search_registered_models(f"name = '{model_name}'"):
        client.create_registered_model(
            model_name, description="Will this flight from New York arrive more than 15 minutes late?"
        )
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    with mlflow.start_run(experiment_id=experiment_id, run_name=recipe.name, description=recipe.made) as run:
        mlflow.log_params(
            {
                "recipe": recipe.name,
                "first_month": recipe.months[0],
                "last_month": recipe.months[-1],
                "rows": fitted.rows,
                "features": ",".join(fitted.example.columns),
            }
        )
        mlflow.log_metrics({"roc_auc": fitted.roc_auc, "fit_seconds": fitted.seconds})
        with tempfile.TemporaryDirectory() as folder:
            sample = Path(folder) / Path(REFERENCE).name
            fitted.reference.to_parquet(sample, index=False)
            mlflow.log_artifact(str(sample), str(Path(REFERENCE).parent))
        logged = mlflow.sklearn.log_model(
            fitted.model,
            name=recipe.name,
            serialization_format="skops",
            skops_trusted_types=list(recipe.trusted_types),
            pyfunc_predict_fn="predict_proba",
            signature=_signature(fitted.example),
            input_example=fitted.example,
            pip_requirements=[f"{package}=={version(package)}" for package in _REQUIREMENTS],
        )
    made = client.create_model_version(
        model_name,
        source=logged.model_uri,
        run_id=run.info.run_id,
        model_id=logged.model_id,
        description=recipe.made,
        await_creation_for=0,  # this store makes it at once; waiting only logs a line
    )
    say(f"{recipe.name}: registered as version {made.version} of {model_name}")
    return str(made.version)


def _signature(example: pd.DataFrame) -> Any:
    """Written out, not inferred: a sample without a gap would make a required column of an optional one."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    kinds = {name: DataType.string if name in flights.CATEGORICAL else DataType.double for name in example.columns}
    return ModelSignature(
        inputs=Schema([ColSpec(kind, name) for name, kind in kinds.items()]),
        outputs=Schema([TensorSpec(np.dtype("float64"), (-1, 2))]),
    )

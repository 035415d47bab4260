"""Train a small classifier and register it so that Titleshot can promote it.

    MLFLOW_TRACKING_URI=http://127.0.0.1:PORT python train.py 0.1

The argument is the inverse regularisation strength C; another one makes another version. Beside this file it
writes what the policy names: held-out rows (holdout.parquet), and requests to send (requests.jsonl).
"""
# ruff: noqa: INP001, T201 - a script, run by hand

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.models import infer_signature
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NAME, LABEL = "tumour", "benign"
HERE = Path(__file__).resolve().parent
PACKAGES = ("mlflow", "scikit-learn", "skops", "pandas", "numpy")

data = load_breast_cancer(as_frame=True)
frame = data.data.iloc[:, :6].assign(**{LABEL: data.target})
training, held_out = train_test_split(frame, test_size=0.4, random_state=0, stratify=frame[LABEL])
features = training.drop(columns=LABEL)
model = make_pipeline(StandardScaler(), LogisticRegression(C=float(sys.argv[1]))).fit(features, training[LABEL])

mlflow.set_experiment("training")
with mlflow.start_run() as run, tempfile.TemporaryDirectory() as folder:
    # 1. What the model was trained on: the features gate compares it, and makes the suite from it.
    sample = Path(folder) / "features.parquet"
    features.to_parquet(sample, index=False)
    mlflow.log_artifact(str(sample), "reference")
    logged = mlflow.sklearn.log_model(
        model,
        name=NAME,
        serialization_format="skops",  # 2. no pickle: the integrity gate refuses one
        pyfunc_predict_fn="predict_proba",
        signature=infer_signature(features, model.predict_proba(features)),  # 3. what it takes and gives
        input_example=features.head(3),  # 4. what a new server is warmed up with
        pip_requirements=[f"{package}=={version(package)}" for package in PACKAGES],
        registered_model_name=NAME,  # 5. inside the run, so that the version knows its run
    )

held_out.to_parquet(HERE / "holdout.parquet", index=False)
bodies = [
    {"dataframe_split": {"columns": list(features.columns), "data": [row]}}
    for row in held_out.drop(columns=LABEL).to_numpy().tolist()
]
(HERE / "requests.jsonl").write_text("".join(json.dumps(body) + "\n" for body in bodies))
print(f"registered {NAME} version {logged.registered_model_version}")

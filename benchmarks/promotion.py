"""What a promotion costs beside what it measures: the machinery's own seconds, step by step.

Runs a stack of its own in a temporary home and promotes small real models under live traffic; prints, for a
promotion in a process that has done one before (imports behind it), each step's seconds, how many of them
were measuring windows or the loading of models, and what is left.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = ["x", "y"]
LOADS = {"integrity", "quality", "deploy"}
"""Steps whose time is the loading of a model, in a process of its own."""
WINDOW = {"load": 6.0, "watch": 4.0}
GATES: list[dict[str, Any]] = [
    {"kind": "integrity"},
    {"kind": "schema"},
    {"kind": "features", "live_sample": 100},
    {"kind": "quality", "data": "held-out.parquet", "label": "late", "checks": {"roc_auc_delta": {"min": -0.5}}},
    {"kind": "load", "rate": "20/s", "run_time": "6s", "min_sample": 50, "checks": {"p50_ratio": {"max": 50}}},
    {
        "kind": "shadow",
        "min_sample": 100,
        "bursts": "none",
        "tolerances": {"*": {"abs": 1}},
        "checks": {"disagreement": {"max": 0.5}},
    },
    {"kind": "canary", "weights": [50], "min_sample": 100, "bursts": "none", "checks": {"error_rate": {"max": 0.2}}},
    {"kind": "watch", "run_time": "4s", "min_sample": 20, "bursts": "none", "checks": {"error_rate": {"max": 0.3}}},
]


def main() -> None:
    """Promote twice, and print the second."""
    home = Path(tempfile.mkdtemp(prefix="ts."))
    os.environ["TITLESHOT_HOME"] = str(home)
    from tasks import settings, stack

    loaded = settings.load()
    target = stack.up(loaded, {}, print)
    try:
        loaded.connect()
        _measure(home, loaded.mlflow, target)
    finally:
        target.stop()
        shutil.rmtree(home)


def _measure(home: Path, uri: str, target: Any) -> None:
    from flows.promote import promote
    from loadtests import run
    from tasks import history

    numbers = [_register(uri, seed) for seed in range(3)]
    frame = _rows(600, 9)
    frame.assign(late=(frame["x"] > 0).astype(int)).to_parquet(home / "held-out.parquet")
    for name, gates in (("first", [{"kind": "integrity"}]), ("policy", GATES)):
        (home / f"{name}.yaml").write_text(json.dumps({"version": 1, "model": "bench", "gates": gates}))
    promote(model="bench", policy=str(home / "first.yaml"), version=numbers[0])
    bodies = [{"dataframe_split": {"columns": COLUMNS, "data": [row]}} for row in frame[COLUMNS].to_numpy().tolist()]
    (home / "live.jsonl").write_text("".join(json.dumps(body) + "\n" for body in bodies))
    profile = run.Profile(rate=40, seconds=300, timeout=20)
    with run.start(profile, target.gateway("bench") + "/invocations", home / "live.jsonl", home / "live"):
        promote(model="bench", policy=str(home / "policy.yaml"), version=numbers[1])
        started = time.monotonic()
        result = promote(model="bench", policy=str(home / "policy.yaml"), version=numbers[2])
        whole = time.monotonic() - started
    promotion = history.stored(history.entry(result["promotion"]).run_id)
    print(f"\n{'step':<14}{'seconds':>9}{'measuring or loading':>23}{'machinery':>11}")
    spent = 0.0
    for verdict in promotion.verdicts:
        assert verdict.evidence.started
        assert verdict.evidence.finished
        seconds = (verdict.evidence.finished - verdict.evidence.started).total_seconds()
        window = seconds if verdict.step in LOADS else WINDOW.get(verdict.step, 0.0)
        if verdict.step.startswith(("shadow", "canary")):
            window = float(verdict.evidence.note.split(" requests in ")[1].split(" s,")[0])
        spent += min(window, seconds)
        print(f"{verdict.step:<14}{seconds:>9.2f}{min(window, seconds):>23.2f}{max(0.0, seconds - window):>11.2f}")
    print(f"{'in all':<14}{whole:>9.2f}{spent:>23.2f}{whole - spent:>11.2f}   ({result['phase']})")
    print(f"the machinery is {(whole - spent) / whole:.0%} of the promotion")


def _rows(n: int, seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame({"x": random.normal(size=n), "y": random.normal(size=n)})


def _register(uri: str, seed: int) -> str:
    import mlflow
    from mlflow.models import infer_signature
    from sklearn.linear_model import LogisticRegression

    mlflow.set_tracking_uri(uri)
    frame = _rows(500, seed)
    model = LogisticRegression().fit(frame, (frame["x"] > 0).astype(int))
    with mlflow.start_run(), tempfile.TemporaryDirectory() as folder:
        frame.to_parquet(Path(folder) / "features.parquet")
        mlflow.log_artifact(str(Path(folder) / "features.parquet"), "reference")
        info = mlflow.sklearn.log_model(
            model,
            name="m",
            serialization_format="skops",
            pyfunc_predict_fn="predict_proba",
            signature=infer_signature(frame, model.predict_proba(frame)),
            input_example=frame.head(2),
            pip_requirements=["mlflow"],
            registered_model_name="bench",
        )
    return str(info.registered_model_version)


if __name__ == "__main__":
    main()

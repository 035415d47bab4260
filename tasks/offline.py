"""The measurements of a quality gate, the user's own metrics among them. No Prefect: it also runs in a child."""

import inspect
from typing import Any

from tasks import user_function
from tasks.settings import Mistake
from validations import quality
from validations.gates import Function, Quality, offline_metric
from validations.verdict import Measurement


def measure(
    file: str, gate: Quality, truth: Any, answered: dict[str, Any], columns: dict[str, Any]
) -> tuple[dict[str, Measurement], dict[str, Any]]:
    """The measurements that the gate's checks ask for, and those of every slice, as evidence.

    `answered` are predictions by "challenger" and "champion", `columns` the values to slice by; `file` begins the
    message of the `Mistake` that is raised where they cannot be measured.
    """
    asked = [check for check in gate.checks if check != "scored"]
    whole = sorted({offline_metric(check) for check in asked if not check.startswith("slice_")})
    split = sorted({offline_metric(check) for check in asked if check.startswith("slice_")})
    functions = {name: _metric(one) for name, one in gate.functions.items() if name in (*whole, *split)}
    sides = (truth, answered.get("champion"), answered["challenger"])
    measured: dict[str, Measurement] = {}
    data: dict[str, Any] = {}
    try:
        if whole:
            measured |= quality.measurements(*sides, whole, gate.confidence, classes=gate.classes, functions=functions)
        if split:
            parts = quality.slices(columns, gate.min_slice)
            found = quality.by_slice(*sides, split, parts, gate.confidence, classes=gate.classes, functions=functions)
            for name, each in found.items():
                if not name.endswith("_champion"):
                    better = gate.better(offline_metric(name))
                    measured[f"slice_{name}"] = quality.worst(each, better, len(truth))
                data[name] = [one.model_dump() for one in each]
    except ValueError as error:
        raise Mistake(f"{file}: {error}") from error
    return measured, {"quality_slices": data} if data else {}


def _metric(function: Function) -> quality.Own:
    """A metric of the user's, in the child: a function, or a metric as MLflow's `make_metric` makes them."""
    try:
        found = user_function.load(function.path)
    except Exception as error:
        raise Mistake(f"{function.path}: {user_function.line(error)}") from error
    if not hasattr(found, "eval_fn"):
        return user_function.guarded(function.path, found)
    if found.greater_is_better is (function.better == "lower"):
        word = "higher" if found.greater_is_better else "lower"
        raise Mistake(f"{function.path}: the metric says that {word} is better: say `better: {word}` in the policy")
    takes = inspect.signature(found.eval_fn).parameters

    def evaluate(y_true: Any, y_pred: Any) -> Any:
        import pandas as pd

        given = {"predictions": pd.Series(list(y_pred)), "targets": pd.Series(list(y_true)), "metrics": {}}
        value = found.eval_fn(**{name: given[name] for name in takes if name in given})
        if getattr(value, "scores", None):
            return value.scores
        results = getattr(value, "aggregate_results", None)
        return value if results is None else results.get(found.name, next(iter(results.values())))

    return user_function.guarded(function.path, evaluate)

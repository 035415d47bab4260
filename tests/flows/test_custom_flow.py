"""The custom gate and the hook in a whole promotion: told what there is to know, judged like any other."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import history
from tests.flows.conftest import COLUMNS, Maker, label, promote, rows

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom-gate"
METRICS = """
def cost(y_true, y_pred):
    return 2.0 * ((y_pred[:, 1] >= 0.5) != y_true)
"""


@pytest.mark.long
def test_custom_gates_and_own_metrics_decide_like_any_other(
    stack: Any, maker: Maker, policy: Callable[..., Path], tmp_path: Path
) -> None:
    """The examples' function and command measure, a user's metric too, and a command's number fails a challenger."""
    (tmp_path / "metrics.py").write_text(METRICS)
    held_out = rows(600, 5)
    held_out.assign(late=label(held_out)).to_parquet(tmp_path / "held-out.parquet")
    quality = {
        "kind": "quality",
        "data": "held-out.parquet",
        "label": "late",
        "slices": ["segment"],
        "functions": {"cost": {"path": "metrics.py:cost", "better": "lower"}},
        "checks": {"cost_delta": {"max": 0.2}, "slice_accuracy_delta": {"min": -0.3}, "slice_cost": {"max": 1}},
    }
    body = {"dataframe_split": {"columns": COLUMNS, "data": [[1.0, 2.0, "a"]]}}
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(body) + "\n" for _ in range(9)))
    function = {
        "kind": "custom",
        "name": "sureness",
        "function": f"{EXAMPLE / 'sureness.py'}:sureness",
        "deployed": True,
        "parameters": {"requests": "requests.jsonl"},
        "min_sample": 9,
        "checks": {"sureness": {"min": 0.1}, "sureness_delta": {"min": -0.9}},
    }
    age = {
        "kind": "custom",
        "name": "age",
        "command": ["python", str(EXAMPLE / "age.py")],
        "checks": {"age_days": {"min": 0, "max": 1}},
    }
    code = "import json, os; print(json.dumps({'fee': float(os.environ['TITLESHOT_CHALLENGER_VERSION'])}))"
    command = {"kind": "custom", "name": "fee", "command": [sys.executable, "-c", code], "checks": {"fee": {"max": 1}}}
    champion = maker.version()
    writes = "import json, sys; json.dump(json.load(sys.stdin)['verdicts'], open('told.json', 'w'))"
    hook = {"kind": "hook", "name": "smoke test", "when": "after", "command": [sys.executable, "-c", writes]}
    first = promote(model=maker.model, policy=str(policy(quality, command, hook)), version=champion)
    assert (first["phase"], first["step"]) == ("promoted", "smoke test"), first
    assert [one["step"] for one in json.loads((tmp_path / "told.json").read_text())][-2:] == ["deploy", "promote"]

    challenger = maker.version(seed=1)
    result = promote(model=maker.model, policy=str(policy(quality, age, function, command)), version=challenger)
    assert (result["phase"], result["step"], result["outcome"]) == ("rejected", "fee", "failed"), result
    assert "fee" in result["why"]
    stored = history.stored(history.entry(result["promotion"]).run_id)
    steps = {verdict.step: verdict for verdict in stored.verdicts}
    assert list(steps)[:5] == ["quality", "age", "deploy", "sureness", "fee"]
    assert steps["quality"].evidence.measurements["slice_cost"].where.startswith("segment = ")
    assert steps["sureness"].evidence.measurements["sureness_delta"].sample == 9
    assert steps["age"].evidence.note.startswith("measured by python")

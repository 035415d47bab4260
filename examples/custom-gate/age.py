"""How many days ago the challenger's run began, asked of MLflow. Reads JSON from stdin, prints JSON to stdout."""
# ruff: noqa: INP001 - a gate of its own, not a module of ours

import json
import sys
import time
import urllib.request

told = json.load(sys.stdin)
address = f"{told['settings']['mlflow']}/api/2.0/mlflow/runs/get?run_id={told['challenger']['run_id']}"
with urllib.request.urlopen(address, timeout=10) as answer:  # noqa: S310
    began = int(json.load(answer)["run"]["info"]["start_time"]) / 1000
print(json.dumps({"age_days": (time.time() - began) / 86400}))  # noqa: T201

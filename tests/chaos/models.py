"""Tiny models for the prober: version n answers 1000 x + n, whole or as a stream, and can be made to misbehave.

A model looks for the file `<folder>/<version>` at every request, where the folder is the environment variable
`CHAOS_MOODS` of its server. What it says there is done: `fail` raises, `wrong` answers nonsense, `slow` takes 0.2 s.
"""

import json
from pathlib import Path

MOODS = "CHAOS_MOODS"
FAIL, WRONG, SLOW = "fail", "wrong", "slow"
PARTS = 3
"""Events of a stream before its end."""

MLMODEL = """\
flavors:
  python_function:
    code: code
    loader_module: formula_{version}
    streamable: true
signature:
  inputs: '[{{"type": "double", "name": "x", "required": true}}]'
  outputs: '[{{"type": "double", "required": true}}]'
  params: null
"""
CODE = """
import os, pathlib, time

def _load_pyfunc(path):
    return Model(int(pathlib.Path(path, "version").read_text()))

class Model:
    def __init__(self, version):
        self.version = version
        self.mood = pathlib.Path(os.environ.get("{moods}", "/nonexistent"), str(version))
    def predict(self, data, params=None):
        return [self.answer(float(x)) for x in data["x"]]
    def predict_stream(self, data, params=None):
        x = data["x"]
        x = float(x if isinstance(x, (int, float)) else list(x)[0])
        for part in range({parts}):
            yield {{"part": part, "y": self.answer(x)}}
            time.sleep(0.01)
    def answer(self, x):
        mood = self.mood.read_text() if self.mood.exists() else ""
        if mood == "fail":
            raise RuntimeError("this version is in a bad mood")
        if mood == "slow":
            time.sleep(0.2)
        return 1000 * x + (0 if mood == "wrong" else self.version)
"""


def make_model(path: Path, version: str) -> Path:
    """The artifact of one version at `path`."""
    (path / "code").mkdir(parents=True)
    (path / "MLmodel").write_text(MLMODEL.format(version=version))
    (path / "code" / f"formula_{version}.py").write_text(CODE.format(moods=MOODS, parts=PARTS))
    (path / "version").write_text(version)
    example = {"dataframe_split": {"columns": ["x"], "data": [[1.0]]}}
    (path / "serving_input_example.json").write_text(json.dumps(example))
    return path

"""Prepare a model's own Python environment with MLflow's machinery and print the path of its interpreter.

A program of its own, run by path: MLflow is heavy, and the target does not import it.
"""

import subprocess
import sys
from pathlib import Path


def main(path: str, manager: str) -> None:
    """Make (or find) the environment of the model at `path`: "virtualenv", "uv" or "conda"."""
    from mlflow.models import Model
    from mlflow.pyfunc import FLAVOR_NAME
    from mlflow.pyfunc.backend import PyFuncBackend

    flavour = Model.load(path).flavors[FLAVOR_NAME]
    environment = PyFuncBackend(flavour, env_manager=manager).prepare_env(path, capture_output=False)
    command = [*environment.get_activate_command(), "python -c 'import sys; print(sys.executable)'"]
    joined = " && ".join(part.rstrip("; ") for part in command)
    done = subprocess.run(["bash", "-c", joined], check=True, capture_output=True, text=True)
    sys.stdout.write(done.stdout.strip().splitlines()[-1] + "\n")


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    main(*sys.argv[1:])

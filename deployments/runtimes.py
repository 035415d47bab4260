"""Which program serves a model version, and what it speaks. Pure: MLmodel text in, runtime out."""

import re
from enum import StrEnum

from deployments.target import TargetError


class Runtime(StrEnum):
    """The programs that we can start."""

    MLFLOW_SCORING = "mlflow-scoring"


class Protocol(StrEnum):
    """The HTTP contract that a runtime speaks."""

    INVOCATIONS = "invocations"


def flavours(mlmodel: str) -> tuple[str, ...]:
    """The flavours that an MLmodel file names. MLflow writes it in block style: keys one level below
    `flavors:`; in any other style none are found, and so it is refused.
    """
    block = re.search(r"^flavors:\n((?:[ ].*\n?)+)", mlmodel, re.MULTILINE)
    return tuple(re.findall(r"^ {2}([\w.-]+):", block[1], re.MULTILINE)) if block else ()


def runtime(mlmodel: str) -> tuple[Runtime, Protocol]:
    """How to serve the model of this MLmodel file. Raises `TargetError` where we cannot."""
    named = flavours(mlmodel)
    if "python_function" in named:
        return Runtime.MLFLOW_SCORING, Protocol.INVOCATIONS
    if not named:
        raise TargetError("its MLmodel file names no flavours: this is not an MLflow model")
    raise TargetError(
        f"no runtime here serves the flavours {', '.join(named)}: only models with python_function are served"
    )

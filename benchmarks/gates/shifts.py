"""Drift of columns that did not drift: the plain index against its usual bounds, and ours with its interval."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from validations.drift import drift, measurement

Floats = NDArray[np.float64]

COLUMNS = 20


def run(seed: int, runs: int, rows: int, moved: float = 0.0) -> dict[str, Floats]:
    """By rule: `rows` where it alarms about any of 20 columns (`rows` values on each side), infinite where not.

    Every column's live mean is `moved` standard deviations off.
    """
    random = np.random.default_rng(seed)
    found: dict[str, list[bool]] = {}
    for _ in range(runs):
        columns = [
            drift(
                f"x{column}",
                pd.Series(random.standard_normal(rows)),
                pd.Series(random.standard_normal(rows) + moved),
                numbers=True,
            )
            for column in range(COLUMNS)
        ]
        highest = max(one.psi for one in columns)
        for rule, alarm in (
            ("PSI above 0.1", highest > 0.1),
            ("PSI above 0.25", highest > 0.25),
            ("**Titleshot**, whole interval above 0.1", measurement(columns, 0.95, 0.1).low > 0.1),
        ):
            found.setdefault(rule, []).append(alarm)
    return {rule: np.where(alarms, float(rows), np.inf) for rule, alarms in found.items()}

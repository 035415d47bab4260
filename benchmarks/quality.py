"""How often the quality gate's intervals hold the truth, at small samples: declared 95 %, measured by simulation.

    python -m benchmarks.quality [RUNS]       (600 by default; the seeds are fixed)

Three worlds at 50, 100 and 500 rows, beside what a plain percentile bootstrap does on the same rows; then what a gate
costs at 100,000 rows.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from validations import quality
from validations.statistics import NoSample, paired_bootstrap

World = Callable[[np.random.Generator, int], tuple[Any, Any, Any]]
TRUTH_ROWS = 500_000


def smooth(random: np.random.Generator, n: int) -> tuple[Any, Any, Any]:
    """A logistic world; the challenger sees it a little blurred."""
    x, blur = random.normal(size=n), random.normal(size=n)
    y = (random.random(n) < 1 / (1 + np.exp(-2 * x))).astype(float)
    return y, 1 / (1 + np.exp(-2 * x)), 1 / (1 + np.exp(-(1.6 * x + 0.5 * blur)))


def rare(random: np.random.Generator, n: int) -> tuple[Any, Any, Any]:
    """The champion is wrong in 3 % of the rows, the challenger in 4 %, half of them the same."""
    y, u = random.random(n) < 0.5, random.random(n)
    champion, challenger = (np.where(wrong, ~y, y) * 0.8 + 0.1 for wrong in (u < 0.03, (u < 0.02) | (u > 0.98)))
    return y.astype(float), champion, challenger


def heavy(random: np.random.Generator, n: int) -> tuple[Any, Any, Any]:
    """Regression with errors of Student's t with 4 degrees of freedom."""
    x = random.normal(size=n)
    return x + random.standard_t(4, size=n), x, 0.9 * x + 0.2 * random.normal(size=n)


WORLDS: dict[str, tuple[World, list[str]]] = {
    "smooth": (smooth, ["roc_auc", "average_precision", "accuracy", "f1", "log_loss", "brier"]),
    "rare differences": (rare, ["accuracy", "recall", "precision", "f1", "balanced_accuracy"]),
    "heavy tails": (heavy, ["rmse", "mae", "r2"]),
}


def sides(y: Any, champion: Any, challenger: Any, metric: str) -> list[quality.Weighted]:
    """The metric, prepared for challenger and champion."""
    rows = quality._Rows.of(y, challenger, champion, ())  # noqa: SLF001
    return [quality._prepare(metric, rows, side) for side in rows.sides]  # noqa: SLF001


def plain(y: Any, champion: Any, challenger: Any, metric: str) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the bootstrap, as they are."""
    new, old = sides(y, champion, challenger, metric)

    def both(weights: Any) -> Any:
        after = new(weights)
        return np.stack([after, after - old(weights)])

    found = paired_bootstrap(both, y.size, 0.95)
    return {name: (one.low, one.high) for name, one in zip((metric, f"{metric}_delta"), found, strict=True)}


def main() -> None:
    """Print both tables."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    print(f"share of {runs} runs whose 95 % interval holds the truth: ours (plain percentile bootstrap)")
    for name, (world, metrics) in WORLDS.items():
        y, champion, challenger = world(np.random.default_rng(99), TRUTH_ROWS)
        truth = {}
        for metric in metrics:
            new, old = (float(side(np.ones((1, y.size)))[0]) for side in sides(y, champion, challenger, metric))
            truth |= {metric: new, f"{metric}_delta": new - old}
        held = {n: {m: [0, 0] for m in truth} for n in (50, 100, 500)}
        for n, counts in held.items():
            for seed in range(runs):
                rows = world(np.random.default_rng(1000 + seed), n)
                for metric in metrics:
                    try:
                        ours = quality.measurements(*rows, [metric], 0.95)
                        theirs = plain(*rows, metric)
                    except NoSample:
                        continue
                    for each in (metric, f"{metric}_delta"):
                        low, high = theirs[each]
                        counts[each][0] += ours[each].low <= truth[each] <= ours[each].high
                        counts[each][1] += low <= truth[each] <= high
        print(f"\n{name:<26}" + "".join(f"{f'n = {n}':>18}" for n in held))
        for metric in truth:
            cells = (f"{held[n][metric][0] / runs:.3f} ({held[n][metric][1] / runs:.3f})" for n in held)
            print(f"  {metric:<24}" + "".join(f"{cell:>18}" for cell in cells))
    cost()


def cost() -> None:
    """What 100,000 rows cost."""
    y, champion, challenger = smooth(np.random.default_rng(0), 100_000)
    where = np.random.default_rng(1).integers(0, 8, y.size)
    parts = quality.slices({"where": where}, 50)

    def own(y_true: Any, y_pred: Any) -> float:
        return float(np.abs(y_true - y_pred).mean())

    print("\nseconds at 100,000 rows, challenger and champion")
    for what, work in {
        "roc_auc, log_loss, accuracy": lambda: quality.measurements(
            y, champion, challenger, ["roc_auc", "log_loss", "accuracy"], 0.95
        ),
        "the same in 8 slices": lambda: quality.by_slice(
            y, champion, challenger, ["roc_auc", "log_loss", "accuracy"], parts, 0.95
        ),
        "a function, one number": lambda: quality.measurements(
            y, champion, challenger, ["own"], 0.95, functions={"own": own}
        ),
    }.items():
        began = time.perf_counter()
        work()
        print(f"  {what:<30}{time.perf_counter() - began:8.1f}")


if __name__ == "__main__":
    main()

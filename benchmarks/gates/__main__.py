"""Simulate, and print the table: `python -m benchmarks.gates [--runs N | --full] [--only PART]`."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from benchmarks.gates import fixed, load, quiet, ramp, shadow, shifts, world
from benchmarks.gates.table import OURS, Row, Target, as_markdown, divergence, information, sequential_limit

Floats = NDArray[np.float64]
Rows = Iterator[Row]

LEVEL, OF_FOUR = float(np.log(20)), float(np.log(80))
"""The evidence that one check needs at 5 %, and the one guilty of four in a ledger."""
LEDGER = {"C": f"{OURS}, ledger over replicas**", "A": "Titleshot, ledger by requests"}
SINGLE = {"C": f"{OURS}, over replicas**", "A": "Titleshot, by requests"}
WORLDS = {
    ("L0", "E0"): "independent",
    ("L0", "E1"): "shared error incidents",
    ("L0", "E2"): "errors drift in both",
    ("L0", "E3"): "errors of a replica",
    ("L1", "E0"): "shared bursts",
    ("L1", "E1"): "shared bursts and incidents",
    ("L2", "E0"): "bursts of a replica",
    ("L2", "E3"): "bursts and errors of a replica",
    ("L3", "E3"): "slow and fast replicas",
}
FIXED_HORIZON = 20_615
"""Requests of a z-test with one look, sized for 0.3 % errors (power 0.9)."""
SLOW, SPREAD = float(np.log(1.1)), float(1 + np.log(1.2) / (2.3263 * world.SIGMA))
REGRESSIONS: tuple[tuple[str, str, dict[str, float], tuple[tuple[str, str], ...]], ...] = (
    ("p50 +10 %", "p50", {"shift": SLOW}, (("L0", "E0"), ("L1", "E0"), ("L2", "E0"))),
    ("p99 +20 %, p50 the same", "p99", {"spread": SPREAD}, (("L0", "E0"), ("L1", "E0"), ("L2", "E0"))),
    ("all +25 %", "p50", {"shift": float(np.log(1.25))}, (("L0", "E0"), ("L1", "E0"), ("L2", "E0"))),
    ("errors 0.1 -> 0.5 %", "errors", {"factor": 5.0}, (("L0", "E0"), ("L0", "E3"))),
    ("errors 0.1 -> 1 %", "errors", {"factor": 10.0}, (("L0", "E0"), ("L0", "E3"))),
    ("errors 0.1 -> 10 %", "errors", {"factor": 100.0}, (("L2", "E0"),)),
    ("latency x2", "p50", {"shift": float(np.log(2))}, (("L2", "E0"),)),
)
SINGLE_TARGETS = {
    ("errors 0.1 -> 0.5 %", "L0", "E0"): Target(median=4000),
    ("errors 0.1 -> 1 %", "L0", "E0"): Target(median=600, p90=2500),
}
LEDGER_TARGETS = {
    ("p50 +10 %", "L0", "E0"): Target(median=6000),
    ("p50 +10 %", "L1", "E0"): Target(median=6000),
    ("p50 +10 %", "L2", "E0"): Target(median=10_000),
    ("p99 +20 %, p50 the same", "L0", "E0"): Target(median=15_000),
    ("p99 +20 %, p50 the same", "L2", "E0"): Target(median=30_000),
    ("all +25 %", "L0", "E0"): Target(median=350),
    ("all +25 %", "L1", "E0"): Target(median=350),
    ("all +25 %", "L2", "E0"): Target(median=350),
    ("errors 0.1 -> 0.5 %", "L0", "E0"): Target(median=6500),
    ("errors 0.1 -> 1 %", "L0", "E0"): Target(median=900, p90=2500),
    ("errors 0.1 -> 10 %", "L2", "E0"): Target(p90=150),
    ("latency x2", "L2", "E0"): Target(p90=150),
}
ZERO_TARGETS = {"p50 +10 %": Target(median=1000), "p99 +20 %, p50 the same": Target(median=2000)}


def identical(runs: int) -> Rows:
    """Challenger and champion are the same: whatever rolls back is wrong."""
    for number, (latency, errors) in enumerate(
        (("L0", ("E0", "E1", "E2")), ("L1", ("E0", "E1")), ("L2", ("E0", "E3")), ("L3", ("E3",)))
    ):
        found = ramp.simulate(10_000_000 + 100_000 * number, runs, latency, errors)
        for name in errors:
            case = f"no difference, {WORLDS[latency, name]} ({latency} {name})"
            main = latency != "L3" and name != "E2"
            for engine, rule in LEDGER.items():
                rolled, passed = found.ledger(engine, "default", name)
                ours = main and engine == "C"
                target = Target(most=0.01) if ours else None
                yield Row(case, f"{rule}, usual bounds", "false rollback", rolled, 0.05, target)
                if engine == "C":
                    target = Target(least=0.98, median=30_000) if main and name == "E0" else None
                    best = _best_pass() if name == "E0" else None
                    yield Row(case, f"{rule}, usual bounds", "promotion", passed, None, target, best)
                rolled, _ = found.ledger(engine, "zero", name)
                target = Target(most=0.05) if ours else None
                yield Row(case, f"{rule}, bounds at 0", "false rollback", rolled, 0.05, target)
            for (rule, world_of_errors), needed in found.ends.items():
                if world_of_errors == name:
                    yield Row(case, rule, "false rollback", needed)


def at_the_bound(runs: int) -> Rows:
    """The challenger is exactly as much worse as its bound allows: either answer may come in 5 % at most."""
    for number, latency in enumerate(("L0", "L1", "L2")):
        for metric, settings in (
            ("p50 +5 %", {"shift": float(np.log(1.05))}),
            ("p95 and p99 +10 %, errors x2", {"shift": float(np.log(1.1)), "factor": 2.0}),
        ):
            seed = 20_000_000 + 100_000 * number + (50_000 if "p95" in metric else 0)
            found = ramp.simulate(seed, runs, latency, ("E0",), ("default",), by_requests=False, **settings)
            case = f"at the bound: {metric}, {WORLDS[latency, 'E0']} ({latency})"
            for name in ("p50",) if "p50" in metric else ("p95", "p99", "E0"):
                bad, good = found.single("C", "default", name)
                label = "errors" if name == "E0" else name
                yield Row(case, f"{SINGLE['C']}, {label}", "false rollback", bad, 0.05, Target(most=0.05))
                yield Row(case, f"{SINGLE['C']}, {label}", "false promotion", good, 0.05, Target(most=0.05))
            for rule in ("Argo, relative, failureLimit 3", "Kayenta, each minute"):
                yield Row(case, rule, "false rollback", found.ends[rule, "E0"])


def regressions(runs: int) -> Rows:
    """The challenger is worse than its bounds allow: how many of its requests are needed."""
    for number, (regression, metric, settings, worlds) in enumerate(REGRESSIONS):
        for latency, errors in worlds:
            seed = 30_000_000 + 1_000_000 * number + 100_000 * list(WORLDS).index((latency, errors))
            margins = ("default", "zero") if regression in ZERO_TARGETS else ("default",)
            found = ramp.simulate(seed, runs, latency, (errors,), margins, **settings)
            case, key = f"{regression}, {WORLDS[latency, errors]} ({latency} {errors})", (regression, latency, errors)
            name = errors if metric == "errors" else metric
            limits = [_best(metric, settings, level, zero=False) for level in (LEVEL, OF_FOUR)]
            for engine, rule in SINGLE.items():
                rolled, _ = found.single(engine, "default", name)
                yield Row(case, f"{rule}, alone", "rollback", rolled, None, SINGLE_TARGETS.get(key), limits[0])
            for engine, rule in LEDGER.items():
                target = LEDGER_TARGETS.get(key) if engine == "C" else None
                rolled, _ = found.ledger(engine, "default", errors)
                yield Row(case, rule, "rollback", rolled, None, target, limits[1])
            if regression in ZERO_TARGETS:
                target = ZERO_TARGETS[regression] if latency != "L1" else None
                rolled, _ = found.ledger("C", "zero", errors)
                best = _best(metric, settings, OF_FOUR, zero=True)
                yield Row(case, f"{LEDGER['C']}, bounds at 0", "rollback", rolled, None, target, best)
            for (rule, _), needed in found.ends.items():
                if rule != "Flagger, threshold 1 (default)":
                    yield Row(case, rule, "rollback", needed)


def _levels(metric: str, settings: dict[str, float], *, zero: bool) -> tuple[float, float, float]:
    """The champion's and the challenger's rate of events, and the boundary between them."""
    if metric == "errors":
        rate = world.ERROR_RATE
        return rate, rate * settings.get("factor", 1.0), 0.0 if zero else world.ERROR_MARGIN
    q = world.QUANTILES[metric]
    limit = norm.ppf(q) * world.SIGMA + (0.0 if zero else np.log1p(world.MARGINS[metric]))
    beyond = (limit - settings.get("shift", 0.0)) / (world.SIGMA * settings.get("spread", 1.0))
    return 1 - q, float(norm.sf(beyond)), 0.0


def _best(metric: str, settings: dict[str, float], level: float, *, zero: bool) -> float:
    """log(1/alpha) over the divergence, along the ramp: for traffic without bursts."""
    p0, p1, delta = _levels(metric, settings, zero=zero)
    requests = world.RATE * world.SECONDS * world.SHARES
    each = [information(p0, p1, delta, share) for share in world.SHARES]
    return sequential_limit(level, zip(requests, each, strict=True))


def _best_pass() -> float:
    """Of the slowest of the four metrics of a challenger like the champion."""
    return max(_best(metric, {}, LEVEL, zero=False) for metric in (*world.QUANTILES, "errors"))


def errors_at_a_share(runs: int) -> Rows:
    """Errors against 0.1 % + 0.1 points, request by request, at a fixed share."""
    for share in (0.01, 0.05, 0.5):
        for error in (0.001, 0.002, 0.003, 0.005, 0.01, 0.05):
            seed = 50_000_000 + round(share * 1000) * 10_000 + round(error * 10_000)
            rolled, passed = fixed.run(seed, runs, share, error)
            case = f"errors {error:.1%} beside 0.1 %, share {share:.0%}"
            rule = f"{OURS}, by requests**"
            best = LEVEL / information(fixed.CHAMPION, error, fixed.MARGIN, share) if error != 0.002 else None
            if error <= 0.002:
                right = "promotion" if error < 0.002 else "false promotion"
                yield Row(case, rule, "false rollback", rolled, 0.05, Target(most=0.05))
                declared, target = (None, None) if error < 0.002 else (0.05, Target(most=0.05))
                yield Row(case, rule, right, passed, declared, target, best)
            else:
                faster = {0.005: Target(median=FIXED_HORIZON / 7), 0.01: Target(median=FIXED_HORIZON / 35)}
                target = faster.get(error) if share == 0.05 else None
                yield Row(case, rule, "rollback", rolled, None, target, best)


def pairs(runs: int) -> Rows:
    """The shadow's disagreement against 2 %, and scores."""
    goals: dict[float, tuple[str, Target | None]] = {
        0.0: ("promotion", Target(median=210)),
        0.005: ("promotion", Target(median=350)),
        0.01: ("promotion", Target(median=900)),
        0.02: ("", Target(most=0.05)),
        0.03: ("rollback", None),
        0.04: ("rollback", Target(median=400, p90=1100)),
        0.08: ("rollback", None),
    }
    rule = f"{OURS}, pairs**"
    for p, (outcome, target) in goals.items():
        rolled, passed = shadow.exact(p, 0.02)
        n = np.arange(1.0, rolled.size + 1)
        case = f"disagreement {p:.1%}, bound 2 %"
        best = LEVEL / divergence(p, 0.02) if p != 0.02 else None
        for name, weights in (("rollback", rolled), ("promotion", passed)):
            if not outcome:
                yield Row(case, rule, f"false {name}", n, 0.05, target, weights=weights)
            elif name == outcome:
                yield Row(case, rule, name, n, None, target, best, weights)
    scores: tuple[tuple[str, shadow.Draw, float, int, str], ...] = (
        ("rubric score, the same, may lose 0.02", shadow.rubric(0.0), 0.51, 6000, "promotion"),
        ("rubric score, 0.02 worse (at the bound)", shadow.rubric(0.02), 0.51, 6000, ""),
        ("rubric score, 0.04 worse", shadow.rubric(0.04), 0.51, 6000, "rollback"),
        ("sessions of 10 alike, disagreement 1 %, bound 2 %", shadow.sessions(0.01), 0.02, 2000, "promotion"),
        ("sessions of 10 alike, at the bound", shadow.sessions(0.02), 0.02, 2000, ""),
        ("sessions of 10 alike, disagreement 4 %", shadow.sessions(0.04), 0.02, 2000, "rollback"),
        ("agreement of texts 0.90, at least 0.88", shadow.semantic(0.90), 0.12, 4000, "promotion"),
        ("agreement of texts 0.86, at least 0.88", shadow.semantic(0.86), 0.12, 4000, "rollback"),
    )
    for number, (case, draw, m, most, outcome) in enumerate(scores):
        ends = shadow.betting(60_000_000 + number, runs, m, most, draw)
        for name, needed in zip(("rollback", "promotion"), ends, strict=True):
            if not outcome:
                yield Row(case, rule, f"false {name}", needed, 0.05, Target(most=0.05))
            elif name == outcome:
                best = LEVEL / shadow.growth(draw, m, worse=outcome == "rollback")
                yield Row(case, rule, name, needed, None, None, best)


def slices(runs: int) -> Rows:
    """The load gate; what is needed is counted in slices of 300 requests each."""
    rule = f"{OURS}, paired slices**"
    for number, (quantile, name) in enumerate(((0.99, "p99"), (0.5, "p50"))):
        for swapped in (True, False):
            case = f"load, {name}, no difference, bound at 0, levels autocorrelated"
            text = f"{rule}, replicas swapped by coin" if swapped else "the same slices, not swapped"
            rolled, passed = load.run(70_000_000 + number, runs, quantile, 0.0, swapped=swapped)
            target = Target(most=0.05) if swapped else None
            yield Row(case, text, "false rollback", rolled, 0.05, target)
            yield Row(case, text, "false promotion", passed, 0.05, target)
    for number, (case, quantile, margin, settings, outcome) in enumerate(
        (
            ("load, p99, no difference, bound 10 %", 0.99, 0.10, {}, 1),
            ("load, p50, no difference, bound 5 %", 0.5, 0.05, {}, 1),
            ("load, p99 +20 %, bound 10 %", 0.99, 0.10, {"spread": SPREAD}, 0),
            ("load, p99 +30 %, bound 10 %", 0.99, 0.10, {"shift": float(np.log(1.3))}, 0),
            ("load, p50 +10 %, bound 5 %", 0.5, 0.05, {"shift": SLOW}, 0),
            ("load, p50 +20 %, bound 5 %", 0.5, 0.05, {"shift": float(np.log(1.2))}, 0),
        )
    ):
        needed = load.run(71_000_000 + number, runs, quantile, margin, **settings)[outcome]
        yield Row(case, f"{rule} (in slices)", ("rollback", "promotion")[outcome], needed)


def little_traffic(runs: int) -> Rows:
    """A bound of 1 % errors at 0.2 to 0.5 requests/s."""
    for rate in (0.2, 0.5):
        for error, wrong in ((0.02, 1), (0.002, 0)):
            kind = "a challenger with 2 % errors" if wrong else "a healthy challenger (0.2 % errors)"
            seed = 80_000_000 + round(rate * 100) * 10_000 + round(error * 1000)
            for rule, ends in quiet.run(seed, runs, rate, error).items():
                case = f"{rate} requests/s, {kind}"
                ours = "Titleshot" in rule
                for outcome in (wrong, 1 - wrong):
                    name = ("rolled back", "promoted")[outcome]
                    target = Target(most=0.01) if ours and outcome == wrong else None
                    yield Row(case, rule, name, ends[outcome], 0.05 if target else None, target)


def drifts(runs: int) -> Rows:
    """Any of 20 columns."""
    for rows in (100, 500):
        for rule, needed in shifts.run(90_000_000 + rows, runs, rows).items():
            declared, target = (0.05, Target(most=0.01)) if "Titleshot" in rule else (None, None)
            yield Row(f"drift, 20 columns alike, {rows} rows", rule, "false alarm", needed, declared, target)
    for rule, needed in shifts.run(91_000_000, runs, 500, 1.0).items():
        yield Row("drift, 20 columns moved by one sd, 500 rows", rule, "alarm", needed)


PARTS: dict[str, tuple[Callable[[int], Rows], int, int]] = {
    "identical": (identical, 100, 1000),
    "bound": (at_the_bound, 50, 500),
    "regressions": (regressions, 40, 150),
    "errors": (errors_at_a_share, 100, 500),
    "pairs": (pairs, 50, 150),
    "load": (slices, 200, 400),
    "quiet": (little_traffic, 1000, 3000),
    "drift": (drifts, 20, 100),
}
"""What is simulated, with the runs of each case: as a rule, and with --full."""


def main() -> None:
    """Print the table to the standard output, and progress beside it."""
    asked = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__)
    asked.add_argument("--runs", type=int, help="runs of each case")
    asked.add_argument("--full", action="store_true", help="as many runs as the published table has")
    asked.add_argument("--only", choices=PARTS, action="append", help="this part alone")
    given = asked.parse_args()
    rows: list[Row] = []
    for name in given.only or PARTS:
        part, few, many = PARTS[name]
        began = time.monotonic()
        rows += part(given.runs or (many if given.full else few))
        print(f"{name}: {len(rows)} rows so far, {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()

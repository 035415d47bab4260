"""How many pairs of answers are compared in a second on one core, what memory that takes, and how often slices err.

    python -m benchmarks.pairs [--pairs 50000] [--rounds 3] [--against FILE] [--memory 1000000] [--runs 100]

Three tables. Speed: the median of the rounds, in processor time, with the scenarios taken in turns; `--against` names
another `agreement.py` (an older one, say), whose figures stand beside. Memory: how the process grows while it compares
so many pairs with everything turned on. Slices: runs with a look after every 50 pairs, at the bound and beyond it.
"""

import argparse
import gc
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from validations import agreement
from validations.gates import Tolerance
from validations.slices import LEARN, Slices, worst
from validations.verdict import Bound, Outcome

Data = list[tuple[str, bytes, bytes, bytes]]
COLUMNS = [*(f"x{i}" for i in range(8)), "carrier", "origin"]
WITHIN = {"*": Tolerance(abs=0.01)}


def body(rng: random.Random) -> bytes:
    """A request of one row with ten columns."""
    row: list[Any] = [round(rng.random(), 6) for _ in range(8)]
    row += [rng.choice(["AA", "US", "UA", "B6"]), rng.choice(["JFK", "LGA", "EWR"])]
    return json.dumps({"dataframe_split": {"columns": COLUMNS, "data": [row]}}).encode()


def data(pairs: int, answers: Callable[[random.Random], tuple[Any, Any]]) -> Data:
    """Pairs of answers with their requests; the champion's and the challenger's predictions come from `answers`."""
    rng = random.Random(0)
    found = []
    for at in range(pairs):
        one, two = answers(rng)
        bodies = (json.dumps({"predictions": value}).encode() for value in (one, two))
        found.append((f"request-{at}", *bodies, body(rng)))
    return found


def same(rng: random.Random) -> tuple[Any, Any]:
    p = rng.random()
    return [p], [p]


def near(rng: random.Random) -> tuple[Any, Any]:
    p = rng.random()
    return [p], [p + 1e-3]


def near_lists(rng: random.Random) -> tuple[Any, Any]:
    p = rng.random()
    return [[1 - p, p]], [[1 - p - 1e-3, p + 1e-3]]


def one_in_twenty(rng: random.Random) -> tuple[Any, Any]:
    p = rng.random()
    return [p], [p + (0.5 if rng.random() < 0.05 else 1e-3)]


def objects(rng: random.Random) -> tuple[Any, Any]:
    p, tags = rng.random(), rng.sample(["a", "b", "c", "d", "e"], 3)
    text = "a few words that say why"
    one = {"score": p, "band": "b", "tags": tags, "why": text, "id": rng.random()}
    return [one], [{**one, "score": p + 1e-3, "tags": tags[::-1], "why": text + " ", "id": rng.random()}]


def large(rng: random.Random) -> tuple[Any, Any]:
    one = [rng.random() for _ in range(1000)]
    return one, [p + 1e-3 for p in one]


FIELDS = {
    **WITHIN,
    "band": Tolerance(kind="label"),
    "tags": Tolerance(kind="set"),
    "why": Tolerance(kind="text"),
    "id": Tolerance(ignore=True),
}
SCENARIOS: dict[str, tuple[Callable[[random.Random], tuple[Any, Any]], int, dict[str, Any]]] = {
    "identical answers": (same, 1, {}),
    "numbers within the tolerance": (near, 1, {"tolerances": WITHIN}),
    "two probabilities, within the tolerance": (near_lists, 1, {"tolerances": WITHIN}),
    "numbers, 5 % disagree": (one_in_twenty, 1, {"tolerances": WITHIN}),
    "objects: label, set, text, number, ignored": (objects, 1, {"tolerances": FIELDS}),
    "numbers, 3 listed slices": (near, 1, {"tolerances": WITHIN, "slices": ("carrier", "origin", "x0")}),
    "numbers, slices found over 10 columns": (near, 1, {"tolerances": WITHIN, "find_slices": True}),
    "all of it, 5 % disagree": (
        one_in_twenty,
        1,
        {
            "tolerances": WITHIN,
            "slices": ("carrier", "origin", "x0"),
            "find_slices": True,
            "redact": ("x1",),
            "once_per": "x2",
            "keep_pairs": 20_000,
        },
    ),
    "1,000 numbers in each answer (answers/s x 1,000 = numbers/s)": (large, 100, {"tolerances": WITHIN}),
}


def speed(module: Any, found: Data, options: dict[str, Any]) -> float:
    """Pairs per second of processor time."""
    pairing = module.Pairing(**options)
    started = time.process_time()
    for request_id, one, two, request in found:
        pairing.add("champion", request_id, 200, one, request)
        pairing.add("challenger", request_id, 200, two)
    if "slices" in options or "find_slices" in options:
        pairing.by_slice()
    return len(found) / (time.process_time() - started)


def other(path: Path) -> Any:
    """Another `agreement` module, from a file."""
    spec = importlib.util.spec_from_file_location("other_agreement", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["other_agreement"] = module
    spec.loader.exec_module(module)
    return module


def print_speed(pairs: int, rounds: int, against: Path | None) -> None:
    modules = [agreement] + ([other(against)] if against else [])
    print(
        f"{'pairs per second, one core':62}"
        + "".join(f"{name:>10}" for name in ("here", "other", "ratio")[: len(modules) * 2 - 1])
    )
    for name, (answers, fewer, options) in SCENARIOS.items():
        found = data(pairs // fewer, answers)
        taken: list[list[float]] = [[] for _ in modules]
        for _ in range(rounds):
            for times, module in zip(taken, modules, strict=True):
                try:
                    times.append(speed(module, found, options))
                except TypeError:
                    times.append(float("nan"))
        figures = [median(times) for times in taken]
        ratio = f"{figures[0] / figures[1]:>10.1f}" if against else ""
        print(f"{name:62}" + "".join(f"{figure:>10,.0f}" for figure in figures) + ratio)


def resident() -> float:
    """This process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def stream(pairs: int) -> Iterator[tuple[str, bytes, bytes, bytes]]:
    """Pairs one by one, each with a session and a customer of its own, none of them kept here."""
    rng = random.Random(0)
    for at in range(pairs):
        p = rng.random()
        row = [rng.random(), f"customer {at}", f"session {at}", rng.choice("abc")]
        request = json.dumps({"dataframe_split": {"columns": ["x", "customer", "session", "kind"], "data": [row]}})
        one, two = (json.dumps({"predictions": [q]}).encode() for q in (p, p + rng.choice([0.001, 0.5])))
        yield f"request-{at}", one, two, request.encode()


def print_memory(pairs: int) -> None:
    options: dict[str, Any] = {
        "tolerances": WITHIN,
        "slices": ("kind", "customer"),
        "find_slices": True,
        "once_per": "session",
        "keep_pairs": 20_000,
        "max_waiting": 10_000,
        "max_slices": 1_000,
        "examples": 10,
    }
    print("\nmemory, everything turned on: 1,000 values a listed column, 10,000 waiting, 20,000 pairs kept")
    gc.collect()
    before = resident()
    pairing = agreement.Pairing(**options)
    for at, (request_id, one, two, request) in enumerate(stream(pairs), 1):
        pairing.add("champion", request_id, 200, one, request)
        # One answer in ten never gets its other half: the waiting room is full.
        if at % 10:
            pairing.add("challenger", request_id, 200, two)
        if at % max(1, pairs // 10) == 0:
            print(f"  after {at:>9,} requests: +{resident() - before:5.1f} MB")


def run(seed: int, bad: str, *, columns: int, values: int, pairs: int, bound: float) -> tuple[set[Outcome], int, str]:
    """One run, a look after every 50 pairs: the outcomes seen, the pairs at the first failure, and what it blamed."""
    rng = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(columns)]
    rows = rng.integers(0, values, (pairs, columns))
    rates = {
        "all at the bound": np.full(pairs, bound),
        "one at the bound, the rest perfect": np.where(rows[:, 0] == 0, bound, 0.0),
        "none bad": np.full(pairs, bound / 5),
        "one at 20 %": np.where(rows[:, 0] == 0, 0.2, bound / 5),
        "one at 50 %": np.where(rows[:, 0] == 0, 0.5, bound / 5),
        "two values that meet, at 100 %": np.where((rows[:, 0] == 0) & (rows[:, 1] == 0), 1.0, bound / 5),
    }[bad]
    disagree = (rng.random(pairs) < rates).tolist()
    slices, cells = Slices(find=True), rows.tolist()
    outcomes: set[Outcome] = set()
    for at, (row, differs) in enumerate(zip(cells, disagree, strict=True), 1):
        slices.add(names, [row], (0,) if differs else ())
        if at % 50 == 0 and (table := slices.table()):
            found = worst(table, 0.05, 0.05, pairs=at, at=(bound,))
            outcome = Bound(max=bound).judge(found)
            outcomes.add(outcome)
            if outcome is Outcome.FAILED:
                return outcomes, at, found.where
            if outcome is Outcome.PASSED and bad == "none bad":
                return outcomes, at, ""
    return outcomes, pairs, ""


def wilson(k: int, n: int) -> str:
    """A rate with its 95 % interval."""
    p, z = k / n, 1.96
    middle, half = p + z * z / (2 * n), z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return f"{p:6.1%} [{(middle - half) / (1 + z * z / n):.1%}, {(middle + half) / (1 + z * z / n):.1%}]"


def print_slices(runs: int) -> None:
    print(
        f"\nslices found over 40 columns of 5 values each; bound 5 %, 5 % error each way, {runs} runs of 2,500 pairs,"
    )
    print(f"a look after every 50 (the first {LEARN} only cut the columns)")
    print(f"{'disagreement':36}{'failed in':>24}{'passed in':>24}{'pairs, median':>15}{'p90':>7}  blamed rightly")
    for bad in (
        *("all at the bound", "one at the bound, the rest perfect", "none bad"),
        *("one at 20 %", "one at 50 %", "two values that meet, at 100 %"),
    ):
        seen = [run(seed, bad, columns=40, values=5, pairs=2500, bound=0.05) for seed in range(runs)]
        failed = [where for outcomes, _, where in seen if Outcome.FAILED in outcomes]
        passed = sum(Outcome.PASSED in outcomes for outcomes, _, _ in seen)
        right = {
            "one at 20 %": ("c0 = 0",),
            "one at 50 %": ("c0 = 0",),
            "two values that meet, at 100 %": ("c0, c1 = 0, 0", "c0 = 0", "c1 = 0"),
        }
        blamed = f"{sum(where in right[bad] for where in failed)} of {len(failed)}" if bad in right else ""
        decided = [at for outcomes, at, _ in seen if outcomes & {Outcome.FAILED, Outcome.PASSED}]
        times = (
            f"{median(decided):>15,.0f}{quantiles(decided, n=10)[-1]:>7,.0f}" if len(decided) > runs / 2 else f"{'':22}"
        )
        print(f"{bad:36}{wilson(len(failed), runs):>24}{wilson(passed, runs):>24}{times}  {blamed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--memory", type=int, default=1_000_000, help="requests of the second table; 0: leave it out")
    parser.add_argument("--runs", type=int, default=100, help="runs of the third table; 0: leave it out")
    options = parser.parse_args()
    print_speed(options.pairs, options.rounds, options.against)
    if options.memory:
        print_memory(options.memory)
    if options.runs:
        print_slices(options.runs)


if __name__ == "__main__":
    main()

"""What the features gate costs on 1,000,000 rows x 20 columns, beside the same checks written in pandas.

One parquet file, one suite (made from 100,000 of its rows), three ways to hold one against the other, each in a
process of its own, the best of three runs: the gate; the same checks written directly in pandas; and Great
Expectations by way of a data context and a batch, which is how the gate did it at first. Reading the file is
part of each. Prints seconds of processor time and by the clock, the ratio to pandas (of processor time, which a busy
machine moves less), and the process's peak memory (ru_maxrss, less what the imports had taken). Every way must come
to the same results.

Usage: python benchmarks/features.py [ROWS]
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROWS = 1_000_000
SAMPLE = 100_000
RUNS = 3


def main() -> None:
    """Make the file and the suite, time the three ways, and print the table."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # This process imports nothing heavy: a child's peak memory would begin at its parent's.
        size, count, made = _apart(prepare, folder, rows)
        print(f"{rows:,} rows x 20 columns: a parquet file of {size / 1e6:.0f} MB")
        print(f"{count} expectations; making a suite from all rows takes {made:.2f} s")
        found = {way: _apart(timed, way, folder) for way in WAYS}
    reference = found["pandas"]
    print(f"\n{'':<34}{'CPU s':>8}{'ratio':>8}{'clock s':>9}{'peak MB':>9}{'import CPU s':>14}")
    for way, (seconds, clock, peak, imported, results) in found.items():
        ratio = seconds / reference[0]
        print(f"{WAYS[way][0]:<34}{seconds:>8.2f}{ratio:>8.2f}{clock:>9.2f}{peak:>9.0f}{imported:>14.1f}")
        if results != reference[-1]:
            differing = [at for at, pair in enumerate(zip(results, reference[-1], strict=True)) if pair[0] != pair[1]]
            sys.exit(f"{way} and pandas differ in the expectations {differing}")
    unmet = sum(not met for met in reference[-1])
    print(f"\nall three: {len(reference[-1]) - unmet} expectations met, {unmet} unmet")


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def prepare(folder: Path, rows: int) -> tuple[int, int, float]:
    """Write file and suite. Returns the file's size, the number of expectations, and seconds for a suite from all."""
    from validations import expectations

    path = folder / "features.parquet"
    frame = _frame(rows)
    frame.to_parquet(path)
    started = time.perf_counter()
    expectations.suite_from(path, "bench")
    seconds = time.perf_counter() - started
    suite = expectations.suite_from(frame.sample(min(rows, SAMPLE), random_state=0), "bench")
    # One of each kind that is not met: what fails must be found, too, and costs more.
    for expectation in suite["expectations"]:
        kwargs = expectation["kwargs"]
        if kwargs["column"] == "number 9" and "max_value" in kwargs:
            kwargs["max_value"] = kwargs["min_value"] + 1e-3
        if kwargs["column"] == "text 3" and "value_set" in kwargs:
            kwargs["value_set"] = kwargs["value_set"][:2]
    expectations.save(suite, folder / "suite.json")
    return path.stat().st_size, len(suite["expectations"]), seconds


def _frame(rows: int) -> Any:
    """Ten floats (four with nulls), three counts, four texts of few values, free text, a flag, a time."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(0)
    columns: dict[str, Any] = {}
    for at in range(10):
        values = random.gamma(2, 500, rows) if at % 2 else random.normal(10, 3, rows)
        columns[f"number {at}"] = np.where(random.random(rows) < 0.03, np.nan, values) if at < 4 else values
    for at in range(3):
        columns[f"count {at}"] = random.integers(0, 50, rows)
    for at in range(4):
        names = np.array([f"c{n}" for n in range(5 + 20 * at)], dtype=object)
        values = names[np.minimum((random.exponential(0.2, rows) * names.size).astype(int), names.size - 1)]
        values[random.random(rows) < 0.02 * (at == 1)] = None
        columns[f"text {at}"] = values
    columns["free"] = [f"N{n}" for n in random.integers(0, 10**6, rows)]
    columns["flag"] = random.random(rows) < 0.3
    columns["when"] = pd.Timestamp("2013-01-01") + pd.to_timedelta(random.integers(0, 10**7, rows), unit="s")
    return pd.DataFrame(columns)


def timed(way: str, folder: Path) -> tuple[float, float, float, float, list[bool]]:
    """Seconds of processor and clock (the best run), peak megabytes over the imports', CPU seconds of import, and
    what was met.
    """
    from validations import expectations

    _, imports, run = WAYS[way]
    suite = expectations.load(folder / "suite.json")
    started = time.process_time()
    imports()
    imported = time.process_time() - started
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, clock, results = float("inf"), float("inf"), []
    for _ in range(RUNS):
        started, began = time.process_time(), time.perf_counter()
        results = run(suite, folder / "features.parquet")
        seconds = min(seconds, time.process_time() - started)
        clock = min(clock, time.perf_counter() - began)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return seconds, clock, peak, imported, results


def _import_great_expectations() -> None:
    import pandas as pd

    from validations import expectations

    # One small run, so that what is imported late, and metrics that are registered once, are behind it.
    frame = pd.DataFrame({"x": [1.0, 2.0, 3.0]})
    expectations.validate(expectations.suite_from(frame, "warm"), frame)


def _gate(suite: dict[str, Any], path: Path) -> list[bool]:
    from validations import expectations

    found = expectations.validate(suite, path).results
    return [result.success for result in found if result.expectation not in ("column_to_exist", "type_family")]


def _batch(suite: dict[str, Any], path: Path) -> list[bool]:
    import contextlib
    import io

    import great_expectations as gx
    import pandas as pd

    asked = [one for one in suite["expectations"] if one["type"] != "expect_column_to_exist"]
    numbered = [{**one, "meta": {"at": at}} for at, one in enumerate(asked)]
    with contextlib.redirect_stderr(io.StringIO()):
        context = gx.get_context(mode="ephemeral")
        source = context.data_sources.add_pandas("bench").add_dataframe_asset("bench")
        batch = source.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": pd.read_parquet(path)})
        found = batch.validate(gx.ExpectationSuite(name="bench", expectations=numbered), result_format="SUMMARY")
    met = {one.expectation_config.meta["at"]: bool(one.success) for one in found.results}
    return [met[at] for at in range(len(asked))]


def _pandas(suite: dict[str, Any], path: Path) -> list[bool]:
    import pandas as pd

    frame = pd.read_parquet(path)
    asked = [one for one in suite["expectations"] if one["type"] != "expect_column_to_exist"]
    return [bool(CHECKS[one["type"]](frame[one["kwargs"]["column"]], one["kwargs"])) for one in asked]


def _quantiles(values: Any, wanted: Mapping[str, Any]) -> bool:
    ranges = wanted["quantile_ranges"]
    found = values.quantile(ranges["quantiles"], interpolation="nearest")
    return all(low <= q <= high for q, (low, high) in zip(found, ranges["value_ranges"], strict=True))


def _divergence(values: Any, wanted: Mapping[str, Any]) -> bool:
    import numpy as np
    import pandas as pd

    held = wanted["tail_weight_holdout"]
    parts = wanted["partition_object"]
    seen = values.value_counts(normalize=True)
    expected = pd.Series(parts["weights"], index=parts["values"]) * (1 - held)
    both = pd.concat([seen, expected], axis=1, keys=["seen", "expected"]).fillna({"seen": 0.0})
    strange = both["expected"].isna()
    both.loc[strange, "expected"] = held / max(1, int(strange.sum()))
    some = both[both["seen"] > 0]
    return float((some["seen"] * np.log(some["seen"] / some["expected"])).sum()) <= wanted["threshold"]


CHECKS: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "expect_column_values_to_not_be_null": lambda v, k: v.notna().mean() >= k["mostly"],
    "expect_column_values_to_be_between": lambda v, k: (
        v.dropna().between(k["min_value"], k["max_value"]).mean() >= k["mostly"]
    ),
    "expect_column_values_to_be_in_set": lambda v, k: v.dropna().isin(k["value_set"]).mean() >= k["mostly"],
    "expect_column_mean_to_be_between": lambda v, k: k["min_value"] <= v.mean() <= k["max_value"],
    "expect_column_stdev_to_be_between": lambda v, k: k["min_value"] <= v.std() <= k["max_value"],
    "expect_column_quantile_values_to_be_between": _quantiles,
    "expect_column_kl_divergence_to_be_less_than": _divergence,
}
WAYS: dict[str, tuple[str, Callable[[], None], Callable[[dict[str, Any], Path], list[bool]]]] = {
    "pandas": ("the same checks in pandas", lambda: None, _pandas),
    "gate": ("the features gate", _import_great_expectations, _gate),
    "batch": ("Great Expectations by a batch", _import_great_expectations, _batch),
}
"""Its title, what it imports, and the way itself."""


if __name__ == "__main__":
    main()

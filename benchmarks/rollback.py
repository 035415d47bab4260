"""How long a bad version goes on answering once it is known to be bad: the rollback's own time under load.

    python -m benchmarks.rollback [--rounds 25] [--rates 50,500]

Version 2 serves with version 1 behind it, and begins to answer nonsense (with status 200: no retry hides it). As
soon as a client has been told the first nonsense, all traffic is routed back. Prints for each rate, in ms (p50, p95,
worst): from the first bad answer to the last one, how long `route` took of that, and how many answers were bad; and
what failed besides. How long a judge needs to see that a version is bad is not part of it: see docs/gates.md.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.routes import MODEL, VERSIONS, spread
from deployments.artifact import digest
from deployments.local.target import LocalTarget, Options
from deployments.target import Traffic, Version
from tests.chaos.models import MOODS, WRONG, make_model
from tests.chaos.prober import Prober, Record


def bad(records: Sequence[Record]) -> list[Record]:
    """The answers with nonsense in them, in the order of their ends."""
    return [one for one in records if one.wrong.startswith("wrong answer")]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rates", default="50,500", help="requests per second")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="ts.", dir="/tmp"))
    target = LocalTarget(home / "t", Options(environment={MOODS: str(home)}))
    rows = []
    try:
        target.start()
        fence = target.lease(MODEL, "benchmark")
        for number in VERSIONS:
            model = make_model(home / "models" / number, number)
            target.deploy(Version(MODEL, number, model, digest(model)), fence)
        for rate in map(float, options.rates.split(",")):
            target.route(Traffic(MODEL, "2", fallback="1"), target.lease(MODEL, "benchmark"))
            spans, calls, counts = [], [], []
            # A stream of these models takes one of a server's two places for 30 ms: few of them.
            shares = {"kept": 0.8 * (rate - 5), "fresh": 0.2 * (rate - 5), "stream": 5.0}
            with Prober(target.gateway(MODEL), allowed=VERSIONS, seconds=7200, **shares) as prober:
                for _ in range(options.rounds):
                    prober.wait_more(int(rate / 5) + 10, "2")
                    before = len(prober.records)
                    mood = home / "2"
                    mood.with_suffix(".new").write_text(WRONG)
                    mood.with_suffix(".new").replace(mood)
                    prober.wait(lambda records, n=before: bad(records[n:]), "nothing bad comes")  # type: ignore[misc]
                    begin = time.monotonic()
                    target.route(Traffic(MODEL, "1", fallback="2"), target.lease(MODEL, "benchmark"))
                    calls.append(time.monotonic() - begin)
                    prober.wait_more(int(rate / 5) + 10, "1")
                    mood.unlink()
                    found = bad(prober.records[before:])
                    spans.append(found[-1].end - found[0].end)
                    counts.append(len(found))
                    target.route(Traffic(MODEL, "2", fallback="1"), target.lease(MODEL, "benchmark"))
            result = prober.result
            for line in result.unsaid:
                print(line)
            others = len(result.failures) - len(bad(result.records))
            for failure in [one for one in result.failures if not one.why.startswith("wrong answer")][:3]:
                print(f"  {failure}")
            rows.append(
                f"{rate:>6g}{len(spans):>8}   {spread(spans)}   {spread(calls)}"
                f"{sorted(counts)[len(counts) // 2]:>7}{max(counts):>7}{others:>14}"
            )
    finally:
        target.stop()
        shutil.rmtree(home, ignore_errors=True)
    print(f"{'':<14}   {'first to last bad answer':<23}   {'route':<23}{'bad answers':>14}{'failed':>14}")
    three = f"{'p50':>7} {'p95':>7} {'worst':>7}"
    print(f"{'req/s':>6}{'rounds':>8}   {three}   {three}{'p50':>7}{'worst':>7}{'otherwise':>14}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

"""Which scanner sees how many of the corpus of malicious and broken artifacts, and what it wrongly alarms at.

    python -m benchmarks.scanners [--path DIR[:DIR...]] [--missed]

Compares the integrity gate's own look with modelscan, picklescan and fickling, where their commands are found on
PATH or in `--path` (each may live in an environment of its own). Each case is a model directory of one file, and
one call. "refused": it says that the file is unsafe; "stumbled": it ended with an error or ran out of time, which
says nothing about the file; "silent": it found nothing. No payload may run: where one did, the count is printed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.corpus.artifacts import BAD, HARMLESS, Case

LIMIT = 30
"""Seconds for one case: far more than any of them needs, unless it waits for a pipe."""


def _ours(folder: Path) -> str:
    from validations.integrity import scan

    try:
        return "refused" if scan(folder).unsafe else "silent"
    except Exception:  # noqa: BLE001 - the others are held to the same: an error says nothing about the file
        return "stumbled"


def _command(words: list[str], refused: int, silent: tuple[int, ...]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return "stumbled"
    return "refused" if done.returncode == refused else "silent" if done.returncode in silent else "stumbled"


def _scanners(path: str) -> dict[str, Callable[[Path], str]]:
    """The scanners that are here. Exit codes as each documents them; modelscan's 3 is "no file of a known kind"."""
    found: dict[str, Callable[[Path], str]] = {"titleshot": _ours}
    modelscan, picklescan, fickling = (
        shutil.which(name, path=path) for name in ("modelscan", "picklescan", "fickling")
    )
    if modelscan:
        found["modelscan"] = lambda folder: _command([modelscan, "scan", "-p", str(folder)], 1, (0, 3))
    if picklescan:
        found["picklescan"] = lambda folder: _command([picklescan, "-p", str(folder)], 1, (0,))
    if fickling:
        found["fickling"] = lambda folder: _fickling(fickling, folder)
    return found


def _fickling(command: str, folder: Path) -> str:
    """Fickling looks at one file and leaves its verdict in a report; it has no directory mode."""
    report = folder.parent / "fickling.json"
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files[:1]:
        report.unlink(missing_ok=True)
        try:
            done = subprocess.run(
                [command, "--check-safety", "--json-output", str(report), str(path)],
                capture_output=True,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "stumbled"
        if report.exists():
            return "silent" if "LIKELY_SAFE" in report.read_text() else "refused"
        return "stumbled" if done.returncode else "silent"
    return "silent"


def look(scanner: Callable[[Path], str], cases: dict[str, Case], marker: Path) -> dict[str, str]:
    """What the scanner says of each case: case to refused, stumbled or silent."""
    said = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as base:
            folder = Path(base) / "model"
            folder.mkdir()
            case.make(folder, marker)
            said[name] = scanner(folder)
    return said


def main() -> None:
    """Print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--path", default="", help="folders with scanners' commands, before those of PATH")
    asked.add_argument("--missed", action="store_true", help="also name what each scanner did not refuse")
    options = asked.parse_args()
    path = os.pathsep.join(filter(None, [options.path, str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    print(f"{len(BAD)} malicious or broken, {len(HARMLESS)} harmless artifacts\n")
    print(f"{'scanner':<12}{'refused':>9}{'stumbled':>10}{'silent':>8}", end="")
    print(f"{'false alarms':>14}{'executed':>10}{'ms a case':>11}")
    missed = {}
    for name, scanner in _scanners(path).items():
        with tempfile.TemporaryDirectory() as base:
            marker = Path(base) / "executed"
            started = time.perf_counter()
            said = look(scanner, BAD, marker)
            alarms = Counter(look(scanner, HARMLESS, marker).values())["refused"]
            each = (time.perf_counter() - started) / (len(BAD) + len(HARMLESS)) * 1000
            count = Counter(said.values())
            executed = int(marker.exists())
        print(
            f"{name:<12}{count['refused']:>9}{count['stumbled']:>10}{count['silent']:>8}"
            f"{alarms:>14}{executed:>10}{each:>11.0f}",
            flush=True,
        )
        missed[name] = [f"{case} ({what})" for case, what in said.items() if what != "refused"]
    for name, cases in missed.items() if options.missed else ():
        print(f"\n{name} did not refuse:\n  " + "\n  ".join(cases or ["nothing"]))


if __name__ == "__main__":
    main()

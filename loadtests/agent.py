"""One process of a load by several: Locust's master, or one of its workers, whose result ends up in its own log.

    python -m loadtests.agent master --plan FOLDER --digest D --host HOST --port PORT --patience SECONDS
    python -m loadtests.agent worker --part K ... (the same)

FOLDER holds the plan in pieces (`plan.0`, `plan.1`, ...). The result is written as numbered lines to standard output
(`loadtests.distributed.frames`). Exit code 1 and a line where there is none.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loadtests.distributed import Part, frames, pack_part, unpack
from loadtests.run import LoadError, locust, read_result

_LOCUSTFILE = Path(__file__).with_name("locustfile_distributed.py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run Locust, and print its result."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="titleshot-load-", dir=options.folder) as folder:
        try:
            data = _work(options, Path(folder))
        except LoadError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        sys.stdout.writelines(f"{line}\n" for line in frames(data))
        sys.stdout.flush()
    if options.role == "master" and (wrong := json.loads(data).get("error")):
        sys.stderr.write(f"{wrong}\n")
        return 3
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser("python -m loadtests.agent", allow_abbrev=False)
    found.add_argument("role", choices=["master", "worker"])
    found.add_argument("--plan", type=Path, required=True)
    found.add_argument("--digest", required=True)
    found.add_argument("--part", type=int, default=0)
    found.add_argument("--host", required=True)
    found.add_argument("--port", type=int, required=True)
    found.add_argument("--patience", type=float, required=True)
    found.add_argument("--folder", type=Path)
    return found


def _work(options: argparse.Namespace, folder: Path) -> bytes:
    pieces = sorted(options.plan.glob("plan.[0-9]*"), key=lambda path: int(path.suffix[1:]))
    plan, bodies = unpack(b"".join(piece.read_bytes() for piece in pieces), options.digest)
    payloads, result = folder / "payloads.jsonl", folder / "result.json"
    payloads.write_bytes(bodies)
    plan |= {
        "payloads": str(payloads),
        "result": str(result),
        "progress": str(folder / "progress.json"),
        "part": options.part,
        "digest": options.digest,
        "patience": options.patience,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    count, host, port = str(plan["parts"]), options.host, str(options.port)
    if options.role == "master":
        how = ["--master", "--master-bind-host", host, "--master-bind-port", port]
        # Our own master looks at the clock, and says who is missing; this is for when it cannot.
        how += ["--expect-workers", count, "--expect-workers-max-wait", str(round(options.patience) + 60)]
        how += ["--users", count, "--spawn-rate", count]
    else:
        how = ["--worker", "--master-host", host, "--master-port", port]
    command, environment = locust(folder / "plan.json", _LOCUSTFILE, *how)
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL)
    # As the first process of a container we would not end by ourselves.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(process.pid, signal.SIGTERM))
    code = process.wait()
    if not result.exists() or (code != 0 and options.role == "worker"):
        raise LoadError(f"Locust's {options.role} ended with exit code {code} and left no result")
    return result.read_bytes() if options.role == "master" else _part(result, options)


def _part(path: Path, options: argparse.Namespace) -> bytes:
    data = json.loads(path.read_text())
    return pack_part(
        Part(
            number=options.part,
            workers=data["workers"],
            digest=options.digest,
            begun=data["begun"],
            clock_error=data["clock_error"],
            result=read_result(path),
        )
    )


if __name__ == "__main__":
    sys.exit(main())

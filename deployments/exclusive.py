"""One at a time on this machine: a lock in a file, and a transaction in a small database."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from deployments.target import TargetUnavailable


@contextmanager
def locked(path: Path, seconds: float, busy: str) -> Iterator[None]:
    """Hold the lock in the file `path`; it ends with its process, however that ends. Raises `TargetUnavailable`: in the
    words `busy` where another has had it for all of these `seconds`, and where the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, timeout=seconds).acquire()
    except Timeout as error:
        raise TargetUnavailable(busy) from error
    except OSError as error:
        raise TargetUnavailable(f"{path}: {error}") from error
    with held:
        yield


@contextmanager
def transaction(path: Path, seconds: float) -> Iterator[sqlite3.Connection]:
    """One transaction of the SQLite database at `path`, which no other process is in at the same time: it is waited for
    so many `seconds`. It is taken back where the block raises. Raises `sqlite3.Error`.
    """
    with closing(sqlite3.connect(path, timeout=seconds, isolation_level=None)) as db:
        # No WAL: on a full disk it could not even be read.
        db.execute("PRAGMA journal_mode=DELETE")
        with db:  # commits, or rolls back
            db.execute("BEGIN IMMEDIATE")
            yield db

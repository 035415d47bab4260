"""What this machine serves, in one small database: leases, endpoints, gateway ports, the traffic in force.

Not a cache of the data plane: the target reads that back. This is what outlives a restart, and where leases
live, beside the thing they protect.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from deployments.target import Fence, LeaseHeld, StaleFence, TargetError, TargetUnavailable, Traffic

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lease (
    model TEXT PRIMARY KEY, holder TEXT, number INTEGER NOT NULL, since REAL NOT NULL, expires REAL NOT NULL);
CREATE TABLE IF NOT EXISTS endpoint (
    model TEXT, version TEXT, port INTEGER NOT NULL UNIQUE, path TEXT NOT NULL, digest TEXT NOT NULL,
    python TEXT NOT NULL, ready INTEGER NOT NULL, PRIMARY KEY (model, version));
CREATE TABLE IF NOT EXISTS gateway (model TEXT PRIMARY KEY, port INTEGER NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS traffic (model TEXT PRIMARY KEY, traffic TEXT NOT NULL, number INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS config (number INTEGER NOT NULL);
INSERT INTO config SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM config);
"""


@dataclass(frozen=True, slots=True)
class Deployed:
    """One version's server as recorded. `python` is the interpreter that runs it; `ready` says that it was,
    once: clusters are made of those.
    """

    model: str
    version: str
    port: int
    path: str
    digest: str
    python: str
    ready: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "ready", bool(self.ready))  # the database knows 0 and 1


class State:
    """The state database at `path`; every call is one transaction.

    `ttl` is how long a lease lasts without being renewed, in seconds. `clock` is wall-clock time, because
    leases outlive processes.
    """

    def __init__(self, path: Path, ttl: float = 60.0, clock: Callable[[], float] = time.time) -> None:
        self._path, self._ttl, self._clock = path, ttl, clock
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._transaction() as db:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                db.execute(statement)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
        except sqlite3.IntegrityError as error:
            raise TargetError(f"the state database {self._path} refuses a second use: {error}") from error
        except sqlite3.OperationalError as error:
            raise TargetUnavailable(f"the state database {self._path}: {error}") from error

    # --- leases

    def lease(self, model: str, holder: str) -> Fence:
        """Take or renew the lease. Raises `LeaseHeld`."""
        with self._transaction() as db:
            now = self._clock()
            row = db.execute("SELECT holder, number, since, expires FROM lease WHERE model=?", (model,)).fetchone()
            if row is not None and row[0] is not None and row[0] != holder and now < row[3]:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row[2]))
                raise LeaseHeld(f"{model} is held by {row[0]} since {when}")
            mine = row is not None and row[0] == holder
            number = row[1] if mine else (row[1] if row else 0) + 1
            db.execute(
                "INSERT OR REPLACE INTO lease VALUES (?,?,?,?,?)",
                (model, holder, number, row[2] if mine else now, now + self._ttl),
            )
            return Fence(model, holder, number)

    def release(self, fence: Fence) -> None:
        """Give the lease back; the number stays, so that it never comes again."""
        with self._transaction() as db:
            db.execute(
                "UPDATE lease SET holder=NULL, expires=0 WHERE model=? AND holder=? AND number=?",
                (fence.model, fence.holder, fence.number),
            )

    @contextlib.contextmanager
    def fenced(self, model: str, fence: Fence) -> Iterator[None]:
        """Hold off every other holder while the block runs, and renew the lease. Raises `StaleFence`.

        A lease that has expired, but that nobody else has taken, is still ours.
        """
        with self._transaction() as db:
            if fence.model != model:
                raise StaleFence(f"a fence for {fence.model} does not open {model}")
            row = db.execute("SELECT holder, number FROM lease WHERE model=?", (model,)).fetchone()
            if row is None or row != (fence.holder, fence.number):
                holder = row[0] if row and row[0] else "nobody"
                raise StaleFence(f"{fence.holder} holds fence {fence.number} of {model}; now it is {holder}'s")
            db.execute("UPDATE lease SET expires=? WHERE model=?", (self._clock() + self._ttl, model))
            yield

    def check(self, model: str, fence: Fence) -> None:
        """Raise `StaleFence` where `fence` is not the lease in force; renew it where it is."""
        with self.fenced(model, fence):
            pass

    # --- endpoints and gateways

    def endpoints(self, model: str | None = None) -> list[Deployed]:
        """What is recorded, by version; of all models where none is named."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT * FROM endpoint WHERE ?1 IS NULL OR model=?1 ORDER BY rowid",
                (model,),
            ).fetchall()
        return [Deployed(*row) for row in rows]

    def save(self, endpoint: Deployed) -> None:
        """Record an endpoint. Raises `TargetError` where its port is another one's."""
        values = tuple(asdict(endpoint).values())
        with self._transaction() as db:
            db.execute(
                "INSERT INTO endpoint VALUES (?,?,?,?,?,?,?) ON CONFLICT (model, version) DO UPDATE SET "
                "port=excluded.port, path=excluded.path, digest=excluded.digest, python=excluded.python, "
                "ready=excluded.ready",
                values,
            )

    def forget(self, model: str, version: str) -> None:
        """Forget an endpoint."""
        with self._transaction() as db:
            db.execute("DELETE FROM endpoint WHERE model=? AND version=?", (model, version))

    def gateways(self) -> Mapping[str, int]:
        """The gateway port of every model."""
        with self._transaction() as db:
            return dict(db.execute("SELECT model, port FROM gateway ORDER BY model").fetchall())

    def save_gateway(self, model: str, port: int) -> None:
        """Record a gateway port: once, for ever."""
        with self._transaction() as db:
            db.execute("INSERT INTO gateway VALUES (?,?)", (model, port))

    def ports(self) -> frozenset[int]:
        """All ports that are spoken for."""
        with self._transaction() as db:
            rows = db.execute("SELECT port FROM endpoint UNION SELECT port FROM gateway").fetchall()
        return frozenset(port for (port,) in rows)

    # --- traffic

    def next_number(self) -> int:
        """A configuration number; it only ever grows."""
        with self._transaction() as db:
            db.execute("UPDATE config SET number=number+1")
            return int(db.execute("SELECT number FROM config").fetchone()[0])

    def traffic(self, model: str) -> Traffic | None:
        """The traffic that was last made to hold."""
        with self._transaction() as db:
            row = db.execute("SELECT traffic FROM traffic WHERE model=?", (model,)).fetchone()
        return Traffic(**json.loads(row[0])) if row else None

    def save_traffic(self, traffic: Traffic, number: int) -> None:
        """Record the traffic that holds under this configuration number."""
        with self._transaction() as db:
            values = (traffic.model, json.dumps(asdict(traffic)), number)
            db.execute("INSERT OR REPLACE INTO traffic VALUES (?,?,?)", values)

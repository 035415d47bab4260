"""What this machine serves, in one small database: leases, the journal, endpoints, gateway ports, the traffic in force.

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

from pydantic import TypeAdapter

from deployments.exclusive import locked, transaction
from deployments.target import Entry, Fence, Holder, LeaseHeld, StaleFence, TargetError, TargetUnavailable, Traffic

_SCHEMA = """
CREATE TABLE IF NOT EXISTS holder (
    model TEXT PRIMARY KEY, holder TEXT, number INTEGER NOT NULL, since REAL NOT NULL, renewed REAL NOT NULL,
    boot TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS journal (
    number INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, promotion TEXT NOT NULL, kind TEXT NOT NULL,
    data TEXT NOT NULL, fence INTEGER NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS pool (model TEXT PRIMARY KEY, warm INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS endpoint (
    model TEXT, version TEXT, port INTEGER NOT NULL UNIQUE, path TEXT NOT NULL, digest TEXT NOT NULL,
    python TEXT NOT NULL, ready INTEGER NOT NULL, PRIMARY KEY (model, version));
CREATE TABLE IF NOT EXISTS gateway (model TEXT PRIMARY KEY, port INTEGER NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS traffic (model TEXT PRIMARY KEY, traffic TEXT NOT NULL, number INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS config (number INTEGER NOT NULL);
INSERT INTO config SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM config);
"""
_TRAFFIC = TypeAdapter(Traffic)
END = "end"
"""The kind of the line that closes a promotion in the journal."""
GUARD_TIMEOUT = 100.0
"""Seconds that a new holder waits for the old one's write to the registry: MLflow's client gives up before."""


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

    `ttl` is how long a lease lasts without being renewed, in seconds. `clock` counts seconds since the machine
    started, whatever is done to the time of day; `boot` names that start: no holder survives another.
    """

    def __init__(
        self, path: Path, ttl: float = 60.0, clock: Callable[[], float] = time.monotonic, boot: str | None = None
    ) -> None:
        self._path, self._ttl, self._clock = path, ttl, clock
        self._boot = _boot_id() if boot is None else boot
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._transaction() as db:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                db.execute(statement)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with transaction(self._path, 30) as db:
                yield db
        except sqlite3.IntegrityError as error:
            raise TargetError(f"the state database {self._path} refuses a second use: {error}") from error
        except sqlite3.OperationalError as error:
            raise TargetUnavailable(f"the state database {self._path}: {error}") from error

    # --- leases

    def lease(self, model: str, holder: str, *, take: bool = False) -> Fence:
        """Take or renew the lease. Raises `LeaseHeld`, unless it is to be taken from whoever has it."""
        before = self.holder(model)
        with contextlib.ExitStack() as stack:
            if before is not None and before.name != holder and (take or not before.left):
                # Whoever had it may be writing to the registry this very moment: see `guard`.
                stack.enter_context(self._guarded(model))
            db = stack.enter_context(self._transaction())
            held, number = self._held(db, model)
            if held is not None and held.name != holder and held.left and not take:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held.since))
                raise LeaseHeld(
                    f"{model} is held by {held.name} since {when}; its lease lapses in {held.left:.0f} s unless it is "
                    "renewed"
                )
            mine = held is not None and held.name == holder
            since = held.since if held is not None and mine else time.time()
            number += not mine
            values = (model, holder, number, since, self._clock(), self._boot)
            db.execute("INSERT OR REPLACE INTO holder VALUES (?,?,?,?,?,?)", values)
            return Fence(model, holder, number)

    def holder(self, model: str) -> Holder | None:
        """Who holds the lease, or did until it lapsed; None where it was given back."""
        with self._transaction() as db:
            return self._held(db, model)[0]

    def _held(self, db: sqlite3.Connection, model: str) -> tuple[Holder | None, int]:
        row = db.execute("SELECT * FROM holder WHERE model=?", (model,)).fetchone()
        _, name, number, since, renewed, boot = row or (model, None, 0, 0.0, 0.0, "")
        now = self._clock()
        left = self._ttl - (now - renewed) if boot == self._boot and now >= renewed else 0.0
        return None if name is None else Holder(name, since, max(0.0, left)), number

    def release(self, fence: Fence) -> None:
        """Give the lease back; the number stays, so that it never comes again."""
        with self._transaction() as db:
            db.execute(
                "UPDATE holder SET holder=NULL WHERE model=? AND holder=? AND number=?",
                (fence.model, fence.holder, fence.number),
            )

    @contextlib.contextmanager
    def fenced(self, model: str, fence: Fence) -> Iterator[None]:
        """Hold off every other holder while the block runs, and renew the lease. Raises `StaleFence`.

        A lease that has expired, but that nobody else has taken, is still ours.
        """
        with self._transaction() as db:
            self._check(db, model, fence)
            yield

    def check(self, model: str, fence: Fence) -> None:
        """Raise `StaleFence` where `fence` is not the lease in force; renew it where it is."""
        with self.fenced(model, fence):
            pass

    @contextlib.contextmanager
    def guard(self, fence: Fence) -> Iterator[None]:
        """As `fenced`, for blocks that take their time: they keep nobody from other models, and reads go on."""
        with self._guarded(fence.model):
            self.check(fence.model, fence)
            yield

    def _guarded(self, model: str) -> contextlib.AbstractContextManager[None]:
        busy = f"the last holder of {model} has been writing to the registry for {GUARD_TIMEOUT:g} s: is it stopped?"
        return locked(self._path.parent / "run" / f"guard.{model}.lock", GUARD_TIMEOUT, busy)

    def _check(self, db: sqlite3.Connection, model: str, fence: Fence) -> None:
        if fence.model != model:
            raise StaleFence(f"a fence for {fence.model} does not open {model}")
        row = db.execute("SELECT holder, number FROM holder WHERE model=?", (model,)).fetchone()
        if row is None or row != (fence.holder, fence.number):
            holder = row[0] if row and row[0] else "nobody"
            raise StaleFence(f"{fence.holder} holds fence {fence.number} of {model}; now it is {holder}'s")
        db.execute("UPDATE holder SET renewed=?, boot=? WHERE model=?", (self._clock(), self._boot, model))

    # --- the journal

    def write(self, entry: Entry, fence: Fence) -> None:
        """Append a line. An "end" takes the place of all that its promotion, and the one before, have left."""
        with self._transaction() as db:
            self._check(db, entry.model, fence)
            if entry.kind == END:
                db.execute(
                    "DELETE FROM journal WHERE model=? AND (promotion=? OR kind=?)",
                    (entry.model, entry.promotion, END),
                )
            values = (entry.model, entry.promotion, entry.kind, json.dumps(entry.data), fence.number, time.time())
            db.execute("INSERT INTO journal (model, promotion, kind, data, fence, at) VALUES (?,?,?,?,?,?)", values)

    def journal(self, model: str) -> tuple[Entry, ...]:
        """The lines of a model, oldest first."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT model, promotion, kind, data, number, fence, at FROM journal WHERE model=? ORDER BY number",
                (model,),
            ).fetchall()
        return tuple(Entry(one, promotion, kind, json.loads(data), *rest) for one, promotion, kind, data, *rest in rows)

    # --- the warm pool

    def keep(self, model: str, warm: int, fence: Fence) -> None:
        """Record how many versions stay warm."""
        with self._transaction() as db:
            self._check(db, model, fence)
            db.execute("INSERT OR REPLACE INTO pool VALUES (?,?)", (model, warm))

    def kept(self, model: str) -> int:
        """How many versions stay warm; 0 where nobody said."""
        with self._transaction() as db:
            row = db.execute("SELECT warm FROM pool WHERE model=?", (model,)).fetchone()
        return int(row[0]) if row else 0

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
        return _TRAFFIC.validate_json(row[0]) if row else None

    def save_traffic(self, traffic: Traffic, number: int) -> None:
        """Record the traffic that holds under this configuration number."""
        with self._transaction() as db:
            values = (traffic.model, _TRAFFIC.dump_json(traffic).decode(), number)
            db.execute("INSERT OR REPLACE INTO traffic VALUES (?,?,?)", values)


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""  # elsewhere a clock that has begun anew tells, when it shows less than was recorded

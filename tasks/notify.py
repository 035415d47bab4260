"""Who is told what happens: notices by Apprise, each once, none of which a promotion waits for.

Light: Apprise is imported by the thread that delivers.
"""

import contextlib
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from deployments.exclusive import transaction
from tasks.progress import say
from tasks.settings import Settings, region
from validations.promotion import Promotion
from validations.verdict import Value, Verdict

Kind = Literal["started", "promoted", "approval needed", "rejected", "rolled back", "problem", "degraded"]
Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
SEVERITY: dict[Kind, Severity] = {
    "started": "info",
    "promoted": "info",
    "approval needed": "warning",
    "rejected": "warning",
    "rolled back": "warning",
    "problem": "warning",
    "degraded": "critical",
}
PATIENCE = 4.0
"""Seconds that a promotion waits for a notice; its delivery goes on behind."""
GIVE_UP = 60.0
"""Seconds that a delivery waits for one URL."""
LAPSES = 2 * GIVE_UP
"""Seconds after which a delivery that has not ended was that of a process which has."""
TRIES = 5
AGAIN = 24 * 3600.0
"""Seconds after which a problem that stays is told again."""
KEPT = 90 * 24 * 3600.0
_FIRST_WAIT = 60.0
"""Seconds before the second try; each wait after it is four times as long."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS notice (
    key TEXT PRIMARY KEY, notice TEXT NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL, since REAL NOT NULL,
    at REAL NOT NULL)
"""
_said: set[str] = set()
"""What was said of the configuration in this process, and what was told in it where it could not be written down."""


class Notice(Value):
    """One thing to tell. Each `key` is told once; one without a `promotion` is a problem, and is told again a day later
    where it stays. `link` is where people see more.
    """

    kind: Kind
    model: str
    promotion: str
    title: str
    body: str
    link: str
    key: str

    @property
    def severity(self) -> Severity:
        """How bad it is; who is told depends on it."""
        return SEVERITY[self.kind]


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of a notice at one URL: `masked` without its secrets; `why` says why it did not arrive."""

    masked: str
    arrived: bool
    why: str = ""


def of(kind: Kind, promotion: Promotion, link: str = "", *, asked: int = 1) -> Notice:
    """The notice that a promotion has come to `kind`; `asked` counts its forms for approval. It names steps and
    numbers, and no value of a feature: not what a slice, a column or an error's text would show.
    """
    model, new, old = promotion.policy.model, f"v{promotion.challenger}", promotion.champion
    stays = f"v{old} answers as before." if old else "There is no champion yet."
    step = promotion.next_step()
    bodies: dict[Kind, str] = {
        "started": f"{new} is a challenger " + (f"for the place of v{old}." if old else "for a place that is free."),
        "approval needed": f"{new} has passed {_count(promotion)}. It waits for a person at "
        f"'{step.name if step else ''}'. Meanwhile: {stays}",
        "promoted": f"{new} answers every live request"
        + (f", in the place of v{old}" if old else "")
        + f". It has passed {_count(promotion)}.",
        "rejected": f"{_why(promotion.decided_by)} {stays}",
        "rolled back": f"{_why(promotion.decided_by)} Everything is as it was: {stays}",
        "degraded": f"{_why(promotion.decided_by)} The way back did not pass either: "
        f"{_why(promotion.verdicts[-1] if promotion.verdicts else None)} A person must look: `titleshot status`.",
    }
    key = f"{promotion.id} {kind}"
    if kind == "approval needed" and step is not None:
        key = f"{promotion.id} {step.name} {asked}"  # a policy may have several
    body = f"{bodies.get(kind, '')}\n\ntitleshot explain {promotion.id}"
    return Notice(
        kind=kind,
        model=model,
        promotion=promotion.id,
        title=f"{model} {new}{f' in {region()}' if region() else ''}: {kind}",
        body=body,
        link=link,
        key=key,
    )


def problem(model: str, text: str, link: str = "") -> Notice:
    """The notice of something that is not as it should be; its text is its key."""
    return Notice(
        kind="problem", model=model, promotion="", title=f"{model}: a problem", body=text, link=link, key=text
    )


def tell(settings: Settings, notice: Notice) -> None:
    """Tell whom it concerns, once. Never raises, and returns within a few seconds whatever the receivers do."""
    if settings.notices is not None:
        _aside(lambda: _tell(settings, notice), f"the notice '{notice.title}'")


def retry_late(settings: Settings) -> None:
    """Try again what reached nobody, after 1, 4, 16 and 64 minutes. Never raises, and waits no longer than `tell`."""
    if settings.notices is not None and _file(settings.home).exists():
        _aside(lambda: [line for one in _late(settings) for line in _tell(settings, one, late=True)], "what was late")


def forget(settings: Settings, keys: Collection[str]) -> None:
    """Forget the keys of problems that went away: should they come back they are told again."""
    if not keys or not _file(settings.home).exists():
        return
    _said.difference_update(keys)
    with contextlib.suppress(sqlite3.Error, OSError), _store(settings.home) as db:
        db.executemany("DELETE FROM notice WHERE key = ?", [(key,) for key in keys])


def examine(settings: Settings) -> str:
    """What is wrong with the configuration file, in one line; empty where nothing is, or there is none."""
    return "" if settings.notices is None else "; ".join(_configured(settings.notices)[1])


def test(settings: Settings) -> dict[Severity, list[Delivery]]:
    """Send one notice of each severity now, told before or not; what became of it at each URL that wants it."""
    servers, _ = ([], []) if settings.notices is None else _configured(settings.notices)
    kinds: dict[Severity, Kind] = {"info": "started", "warning": "problem", "critical": "degraded"}
    found: dict[Severity, list[Delivery]] = {}
    for severity, kind in kinds.items():
        title = f"Titleshot: a test, {severity}"
        body = f"Nothing has happened. Notices that are {severity} arrive here."
        notice = Notice(kind=kind, model="", promotion="", title=title, body=body, link="", key="")
        found[severity] = _deliver(_for(servers, severity), notice)
    return found


def _count(promotion: Promotion) -> str:
    passed = len(promotion.verdicts)
    return f"{passed} {'step' if passed == 1 else 'steps'}"


def _why(verdict: Verdict | None) -> str:
    """A verdict in numbers, without what they were seen in."""
    if verdict is None:
        return ""
    check = verdict.decisive
    if check is None or check.measured is None:
        return f"Step '{verdict.step}' was {verdict.outcome.value}."
    plain = check.model_copy(update={"measured": check.measured.model_copy(update={"where": "", "note": ""})})
    return f"Step '{verdict.step}' was {verdict.outcome.value}: {plain}."


# --- beside the promotion


def _aside(work: Callable[[], Sequence[str]], what: str) -> None:
    """Do `work` in a thread that nobody has to wait for, and say what it came to, where that is known in time."""
    lines: list[str] = []

    def run() -> None:
        try:
            lines.extend(work())
        except Exception as error:  # noqa: BLE001 - nothing that is wrong with notices is wrong with a promotion
            # Its text may hold a URL, and with it a password.
            lines.append(f"{what} could not be given: {type(error).__name__}")

    thread = threading.Thread(target=run, daemon=True, name="notice")
    try:
        thread.start()
        thread.join(PATIENCE)
    except RuntimeError:  # no thread more can be started
        lines.append(f"{what} could not be given: there are too many threads")
    for line in [*lines]:
        say(line)
    if thread.is_alive():
        say(f"{what} is still on its way after {PATIENCE:g} s: it is not waited for")


def _tell(settings: Settings, notice: Notice, *, late: bool = False) -> list[str]:
    """Deliver a notice if it is due; what there is to say about that."""
    assert settings.notices is not None
    if not late and not _due(settings.home, notice.key):
        return []  # most calls of one that looks again and again end here, without Apprise
    servers, wrong = _configured(settings.notices)
    lines = _once(f"notices: {'; '.join(wrong)}") if wrong else []
    wanted = _for(servers, notice.severity)
    claimed = _claim(settings.home, notice) if wanted else None
    if claimed is None:
        return lines
    tries, since = claimed
    if tries > 1 and time.time() - since > _FIRST_WAIT:
        when = f"{datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M} UTC"
        notice = notice.model_copy(update={"body": f"(Late: this was at {when}.)\n\n{notice.body}"})
    done = _deliver(wanted, notice)
    arrived = any(one.arrived for one in done)
    _settle(settings.home, notice.key, tries, arrived=arrived)
    lines += [f"the notice '{notice.title}' did not reach {_short(d.masked)}: {d.why}" for d in done if not d.arrived]
    if not arrived:
        lines.append(
            f"the notice '{notice.title}' reached nobody, "
            + (f"and is given up after {tries} tries" if tries >= TRIES else "and is tried again later")
        )
    return lines


def _once(line: str) -> list[str]:
    if line in _said:
        return []
    _said.add(line)
    return [line]


# --- what was told


def _file(home: Path) -> Path:
    return home / "notices.db"


@contextlib.contextmanager
def _store(home: Path) -> Iterator[sqlite3.Connection]:
    with transaction(_file(home), 10) as db:
        db.execute(_SCHEMA)
        yield db


def _state(db: sqlite3.Connection, key: str, now: float) -> tuple[bool, int, float]:
    """Whether the notice of this key is to be given `now`, how often that was tried, and since when it is due."""
    row = db.execute("SELECT notice, state, tries, since, at FROM notice WHERE key = ?", (key,)).fetchone()
    if row is None:
        return True, 0, now
    text, state, tries, since, at = row
    if not Notice.model_validate_json(text).promotion and now - since > AGAIN:
        return True, 0, now
    busy = state == "giving" and now - at < LAPSES
    return state != "told" and not busy and tries < TRIES, tries, since


def _due(home: Path, key: str) -> bool:
    if key in _said:
        return False
    try:
        with _store(home) as db:
            return _state(db, key, time.time())[0]
    except (sqlite3.Error, OSError):
        return True  # what to do then is for `_claim` to say


def _claim(home: Path, notice: Notice) -> tuple[int, float] | None:
    """Take it upon this process to give a notice: which try it is, and since when it is due. None where it was given,
    another process gives it, or it was given up.
    """
    now = time.time()
    try:
        with _store(home) as db:
            due, tries, since = _state(db, notice.key, now)
            if not due:
                return None
            db.execute("DELETE FROM notice WHERE at < ?", (now - KEPT,))
            row = (notice.key, notice.model_dump_json(), "giving", tries + 1, since, now)
            db.execute("INSERT OR REPLACE INTO notice VALUES (?, ?, ?, ?, ?, ?)", row)
            return tries + 1, since
    except (sqlite3.Error, OSError):
        # A full disk is a reason to tell somebody, once from here.
        if notice.key in _said:
            return None
        _said.add(notice.key)
        return 1, now


def _settle(home: Path, key: str, tries: int, *, arrived: bool) -> None:
    with contextlib.suppress(sqlite3.Error, OSError), _store(home) as db:
        state = ("told" if arrived else "late", time.time(), key, tries)
        db.execute("UPDATE notice SET state = ?, at = ? WHERE key = ? AND tries = ?", state)


def _late(settings: Settings) -> list[Notice]:
    """What reached nobody and is to be tried again now."""
    now = time.time()
    with _store(settings.home) as db:
        rows = db.execute("SELECT notice, state, tries, at FROM notice WHERE state != 'told'").fetchall()
    return [
        Notice.model_validate_json(text)
        for text, state, tries, at in rows
        if tries < TRIES and now - at >= (LAPSES if state == "giving" else _FIRST_WAIT * 4 ** (tries - 1))
    ]


# --- Apprise


class _Listener(logging.Handler):
    """Keeps what Apprise says in the thread that made this, instead of its being printed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._thread, self.lines = threading.get_ident(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line of ours, without values that may be secret."""
        if record.thread != self._thread:
            return
        line = " ".join(record.getMessage().split())
        if line.startswith("Failed to load Apprise configuration"):
            return  # that there is no URL at all is said in other words
        if found := re.match(r"Invalid Apprise TEXT configuration format found .* on line (\d+)", line):
            line = f"line {found[1]} is neither a URL nor an assignment of tags"
        path = Path(record.pathname)
        if "plugins" in path.parts and path.name != "__init__.py":
            line = re.sub(r"\([^()]*\)", "(...)", line)  # a plugin tells the token that it does not like
        self.lines.append(line.rstrip("."))


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    logger, listener = logging.getLogger("apprise"), _Listener()
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # below that it tells messages and addresses
    logger.addHandler(listener)
    try:
        yield listener.lines
    finally:
        logger.removeHandler(listener)


def _configured(path: Path) -> tuple[list[Any], list[str]]:
    """The URLs of a configuration file, and what is wrong with it, in words without secrets."""
    path = path.expanduser().resolve()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        return [], [f"{path} (TITLESHOT_NOTICES) cannot be read: {reason}"]
    with _listening() as said:
        from apprise import AppriseAsset, AppriseConfig
        from apprise.config.base import ConfigBase

        # No pictures from Apprise's own site, no files under the user's home, one message after the other.
        asset = AppriseAsset(
            app_id="Titleshot",
            app_desc="Titleshot",
            app_url="",
            image_url_mask="",
            image_url_logo="",
            storage_mode="memory",
            pgp_autogen=False,
            pem_autogen=False,
            async_mode=False,
        )
        base: Any = ConfigBase
        yaml = path.suffix.lower() in (".yaml", ".yml") or text.startswith("---")
        format_ = "yaml" if yaml else getattr(base.detect_config_format(text), "value", "text")
        said.clear()  # a format that it does not recognise is refused once more when it is read
        config = AppriseConfig(asset=asset, recursion=1)
        config.add(f"file://{quote(str(path))}?format={format_}")
        servers = config.servers()
    wrong = [f"{path}: {line}" for line in dict.fromkeys(said)]
    for server in servers:
        if not _least(server):
            tags = ", ".join(sorted(map(str, server.tags)))
            mend = f"tag it {', '.join(SEVERITIES[:-1])} or {SEVERITIES[-1]}, or not at all"
            wrong.append(f"{path}: nothing is told to {_short(_masked(server))}, tagged {tags}: {mend}")
    if not servers and not wrong:
        wrong.append(f"{path} names no URL, so nobody is told anything")
    return servers, wrong


def _least(server: Any) -> Severity | None:
    """The least severity that a URL wants to hear of; None where its tags name none."""
    tags = {str(tag).lower() for tag in server.tags}
    if not tags or "always" in tags:
        return SEVERITIES[0]
    return next((severity for severity in SEVERITIES if severity in tags), None)


def _for(servers: Sequence[Any], severity: Severity) -> list[Any]:
    level = SEVERITIES.index(severity)
    return [one for one in servers if (least := _least(one)) is not None and SEVERITIES.index(least) <= level]


def _masked(server: Any) -> str:
    """A URL as Apprise shows it to anybody, without its options."""
    return str(server.url(privacy=True)).partition("?")[0]


def _short(masked: str) -> str:
    """Service and host alone: a path may be a secret that Apprise does not know of."""
    scheme, _, rest = masked.partition("://")
    return f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"


def _deliver(servers: Sequence[Any], notice: Notice) -> list[Delivery]:
    """Give a notice to all of these at the same time, each for as long as is given to one."""
    done: list[Delivery | None] = [None] * len(servers)

    def give(place: int, server: Any) -> None:
        done[place] = _give(server, notice)

    threads = [threading.Thread(target=give, args=one, daemon=True) for one in enumerate(servers)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + GIVE_UP
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    late = f"no answer within {GIVE_UP:g} s"
    return [found or Delivery(_masked(one), False, late) for found, one in zip(done, servers, strict=True)]


def _give(server: Any, notice: Notice) -> Delivery:
    from apprise import Apprise, NotifyFormat, NotifyType

    types = {"info": NotifyType.INFO, "warning": NotifyType.WARNING, "critical": NotifyType.FAILURE}
    server.optional = False  # Apprise calls those delivered that were not
    one = Apprise(asset=server.asset)
    one.add(server)
    body = f"{notice.body}\n\n{notice.link}".strip()
    with _listening() as said:
        try:
            arrived = one.notify(body, notice.title, types[notice.severity], body_format=NotifyFormat.TEXT)
        except Exception as error:  # noqa: BLE001 - a plugin's own
            arrived = False
            said.append(type(error).__name__)
    return Delivery(
        _masked(server), bool(arrived), "" if arrived else (said[-1] if said else "Apprise does not say why")
    )

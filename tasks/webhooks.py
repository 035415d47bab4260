"""MLflow's webhooks: what a delivery must show to be believed, which event starts a promotion, and where both are set
up.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import sqlite3
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

import httpx
from pydantic import BaseModel, StringConstraints, ValidationError, model_validator

from deployments.exclusive import transaction
from tasks.flowruns import Unanswered, ask
from tasks.policies import policy_of
from tasks.settings import Mistake, Settings

NAME = "titleshot"
"""Our webhook's name in MLflow; there is one."""
EVENTS = {"alias": "model_version_alias.created", "tag": "model_version_tag.set", "version": "model_version.created"}
"""MLflow's event for each word of a policy's `trigger`."""
ASKS = {
    "alias": (EVENTS["alias"], "challenger", ""),
    "tag": (EVENTS["tag"], "titleshot.promote", "true"),
    "version": (EVENTS["version"], "", ""),
}
"""What asks for a promotion by such a policy: event, alias or key, value."""
EVENT = "titleshot.challenger"
"""Prefect's event: a version asks to be promoted. Its resource is `titleshot.model.<model>`."""
WINDOW = 300.0
"""Seconds that the clocks of sender and receiver may be apart, the way and MLflow's retries included."""
KEPT = 3600.0
"""Seconds that ids are remembered: longer than the window, for clocks that are set."""
LIMIT = 1 << 20
"""Bytes of a delivery: that of a new version holds all of its tags."""
PATIENCE = 5.0
"""Seconds that Prefect may take to accept an event."""
QUEUED = 20.0
"""Seconds that a delivery waits for those before it, at the most."""
_EVENT_IDS = uuid.UUID("6f1f3c1e-6a0c-5b8e-9d0a-5d6b7f1a2c3d")
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


class Refused(Exception):
    """A delivery that is not believed. `why` is one of few phrases, without anything that the sender wrote."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.why, self.status = why, status


@dataclass(frozen=True, slots=True)
class Delivery:
    """What MLflow says has happened. `named` is the alias that was set, or the tag's key; `value` is the tag's."""

    id: str
    event: str
    model: str
    version: str
    named: str = ""
    value: str = ""


class _Data(BaseModel):
    name: Annotated[str, StringConstraints(min_length=1)]
    version: Annotated[str, StringConstraints(pattern="^[1-9][0-9]{0,17}$")] | None = None
    alias: str | None = None
    key: str | None = None
    value: str | None = None


class _Body(BaseModel):
    entity: str
    action: str
    data: _Data

    @property
    def event(self) -> str:
        return f"{self.entity}.{self.action}"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = {"alias": ("version", "alias"), "tag": ("version", "key", "value"), "version": ("version",)}
        for word, fields in needed.items():
            if self.event == EVENTS[word] and any(getattr(self.data, field) is None for field in fields):
                raise ValueError(f"{self.event} without one of {fields}")
        return self


def sign(secret: str, identifier: str, sent: str, body: bytes) -> str:
    """The signature as MLflow makes it (Standard Webhooks, version 1)."""
    code = hmac.new(secret.encode(), f"{identifier}.{sent}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(code).decode()}"


def verify(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> Delivery:
    """The delivery that this request is. Raises `Refused` unless it was signed with `secret`, within the window, and
    has the shape of MLflow's.
    """
    if len(body) > LIMIT:
        raise Refused("too large", 413)
    given = {name.lower(): value for name, value in headers.items()}
    identifier, sent = given.get("x-mlflow-delivery-id", ""), given.get("x-mlflow-timestamp", "")
    signature = given.get("x-mlflow-signature", "")
    if not (identifier and sent and signature):
        raise Refused("not signed", 401)
    # In what is signed only dots part id, time and body: neither may hold one, nor anything else unexpected.
    known = _ID.fullmatch(identifier) and re.fullmatch(r"[0-9]{1,12}", sent)
    if not known or not hmac.compare_digest(signature.encode(), sign(secret, identifier, sent, body).encode()):
        raise Refused("wrong signature", 401)
    if float(sent) < now - WINDOW:
        raise Refused("too old", 403)
    if float(sent) > now + WINDOW:
        raise Refused("from the future", 403)
    try:
        read = _Body.model_validate_json(body)
    except ValidationError as error:
        broken = error.errors(include_input=False)[0]["type"] == "json_invalid"
        raise Refused("not JSON" if broken else "not of the shape of MLflow's events", 400) from None
    data = read.data
    return Delivery(
        identifier, read.event, data.name, data.version or "", data.alias or data.key or "", data.value or ""
    )


def asks(delivery: Delivery) -> str | None:
    """The word of a policy's `trigger` by which this event asks for a promotion. None by none: most events are tags
    that a promotion itself sets, and no policy is read for them.
    """
    asked = (delivery.event, delivery.named, delivery.value)
    return next((word for word, event in ASKS.items() if event == asked), None)


def why_not(settings: Settings, delivery: Delivery) -> str | None:
    """Why this event starts no promotion, in words; None where it does. Raises `Mistake` where the model's policy
    cannot be used.
    """
    word = asks(delivery)
    if word is None:
        asked = (delivery.event, delivery.named, delivery.value)
        return f"{' '.join((delivery.event, *(repr(one) for one in asked[1:] if one)))} starts no promotion"
    own = policy_of(settings, delivery.model)
    if own is None:
        return f"{delivery.model} has no policy in {settings.policy_folder}"
    if (trigger := own[2].trigger) == "hand":
        return f"by {own[0].name} promotions of {delivery.model} are started by hand"
    return None if trigger == word else f"{own[0].name} waits for {' '.join(one for one in ASKS[trigger] if one)}"


def emit(settings: Settings, delivery: Delivery) -> None:
    """Tell Prefect, whose automations start what is to be started. A delivery that comes again is the same event.
    It is told once, since MLflow tries again. Raises `Unanswered`.
    """
    event = {
        "id": str(uuid.uuid5(_EVENT_IDS, delivery.id)),
        "occurred": datetime.now(UTC).isoformat(),
        "event": EVENT,
        "resource": {
            "prefect.resource.id": f"titleshot.model.{delivery.model}",
            "prefect.resource.name": delivery.model,
        },
        "payload": {"model": delivery.model, "version": delivery.version, "delivery": delivery.id},
    }
    try:
        ask(settings, "POST", "/events", [event], seconds=PATIENCE, once=True)
    except Mistake as error:
        raise Unanswered(f"Prefect takes no event: {error}") from error


class Seen:
    """The ids of deliveries that were dealt with, in a file: they outlive the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with transaction(path, QUEUED) as db:
            db.execute("CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, at REAL NOT NULL)")

    def known(self, identifier: str) -> bool:
        """Whether a delivery was dealt with."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=10)) as db:
            return db.execute("SELECT 1 FROM seen WHERE id = ?", (identifier,)).fetchone() is not None

    @contextlib.contextmanager
    def taking(self, identifier: str, now: float) -> Iterator[bool]:
        """Whether this delivery is new; it counts as dealt with once the block has ended well. Meanwhile all others
        wait, in other processes as well.
        """
        with transaction(self._path, QUEUED) as db:
            db.execute("DELETE FROM seen WHERE at < ?", (now - KEPT,))
            yield db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (identifier, now)).rowcount == 1


# --- secrets


def seen_file(settings: Settings) -> Path:
    """Where the receiver of this home remembers deliveries."""
    return settings.home / "receiver.db"


def secret(settings: Settings) -> str:
    """What MLflow and the receiver share, made once. Raises `Mistake` where the file is empty."""
    return _kept(settings.home / "webhook.secret", lambda: secrets.token_urlsafe(32))


def encryption_key(settings: Settings) -> str:
    """What our MLflow server encrypts the secrets of webhooks with, made once: without a key that stays it cannot read
    them after a restart. Raises `Mistake` where the file is empty.
    """
    # A Fernet key.
    return _kept(settings.home / "mlflow.key", lambda: base64.urlsafe_b64encode(os.urandom(32)).decode())


def _kept(path: Path, make: Callable[[], str]) -> str:
    """What the file holds; made whole, for the owner only, where there is none."""
    if not path.exists():
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with open(new, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
            stream.write(make() + "\n")
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.hardlink_to(new)
        new.unlink()
    found = path.read_text().strip()
    if not found:
        raise Mistake(f"{path} is empty: remove it, then `titleshot down` and `up`, and `titleshot webhook install`")
    return found


# --- the webhook in MLflow


@dataclass(frozen=True, slots=True)
class Installed:
    """Our webhook as MLflow has it. `before` is where it pointed until now, where that was elsewhere."""

    url: str
    status: str
    events: Sequence[str]
    before: str | None = None


def address(settings: Settings) -> str:
    """Where the receiver is on this machine. Raises `Mistake` where there is none."""
    port = settings.stack().get("receiver_port")
    if port is None:
        raise Mistake(f"there is no receiver in {settings.home}: start the stack with `titleshot up`")
    return f"http://127.0.0.1:{port}"


def counts(settings: Settings) -> dict[str, Any]:
    """What the receiver has counted since it started. Raises `Mistake` where it does not answer."""
    where = address(settings)
    try:
        answer = httpx.get(f"{where}/health", timeout=5).raise_for_status()
        return dict(answer.json())
    except (httpx.HTTPError, ValueError) as error:
        raise Mistake(
            f"the receiver does not answer at {where} ({error or type(error).__name__}): `titleshot up` starts it, "
            f"its log is {settings.home / 'logs' / 'receiver.log'}"
        ) from error


def look(settings: Settings) -> Installed | None:
    """Our webhook, None where there is none. Raises `Mistake` where MLflow cannot say."""
    found = _ours(settings)
    return _installed(found[-1]) if found else None


def install(settings: Settings, url: str | None = None) -> Installed:
    """Register the webhook in MLflow, in the place of the one that is there, and see a delivery arrive. `url` is where
    MLflow reaches the receiver. Raises `Mistake`, which says what stands in the way and how to mend it; then everything
    is as it was before.
    """
    where = address(settings)
    wanted = f"{where}/mlflow" if url is None else _checked(url)
    counts(settings)
    from mlflow.exceptions import MlflowException

    from tasks.registry import client

    before, trouble = _ours(settings), "not tested"
    try:
        made = client().create_webhook(
            name=NAME,
            url=wanted,
            events=list(EVENTS.values()),
            secret=secret(settings),
            description="Tells Titleshot of versions that ask to be promoted.",
        )
        try:
            trouble = _trouble(settings, client().test_webhook(made.webhook_id, EVENTS["alias"]))
        finally:
            # The new one takes the place of the old one once it works: nobody can read the secret of that.
            for one in [made] if trouble else before:
                client().delete_webhook(one.webhook_id)
    except MlflowException as error:
        raise _refusal(settings, wanted, str(error.message)) from error
    elsewhere = ", ".join(one.url for one in before if one.url != wanted)
    if trouble:
        left = f"; the webhook still points at {elsewhere}" if elsewhere else ""
        raise Mistake(f"a test by MLflow at {settings.mlflow} does not arrive at {wanted}: {trouble}{left}")
    return _installed(made, elsewhere or None)


def _installed(found: Any, before: str | None = None) -> Installed:
    return Installed(found.url, str(found.status), [str(event) for event in found.events], before)


def _ours(settings: Settings) -> list[Any]:
    """The webhooks of our name: one, unless an installation was cut off."""
    from mlflow.exceptions import MlflowException

    from tasks.registry import client

    found: list[Any] = []
    token: str | None = None
    try:
        while True:
            page = client().list_webhooks(100, token)
            found += [one for one in page if one.name == NAME]
            token = page.token
            if not token:
                return found
    except MlflowException as error:
        raise _refusal(settings, "", str(error.message)) from error


def _refusal(settings: Settings, wanted: str, said: str) -> Mistake:
    """Why MLflow does not do as it is told, with the setting that it lacks."""
    server = "that server" if settings.mlflow_uri else "it anew (`titleshot down`, `titleshot up`)"
    lacking = ""
    if "Allowed schemes" in said:
        lacking = f"refuses {wanted} for its scheme: start {server} with MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https"
        if _private(wanted):
            lacking += " and MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true"
    elif "non-public" in said:
        lacking = f"refuses {wanted} for its private address: start {server} with "
        lacking += "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true"
    if lacking:
        return Mistake(f"MLflow at {settings.mlflow} {lacking}, or reach the receiver by https at a public name: --url")
    said = " ".join(said.split())[:300]
    if "500 error responses" in said or "INTERNAL_ERROR" in said:
        return Mistake(
            f"MLflow at {settings.mlflow} answers 500 when it is asked for its webhooks: start {server} with the "
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY that it had when they were made; where it had none they are lost: "
            "delete them from the tables webhooks and webhook_events of its database, set a key, and install again"
        )
    return Mistake(f"MLflow at {settings.mlflow} does not do as asked: {said}")


def _private(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    return host == "localhost" or re.match(r"(127|10|192\.168|172\.(1[6-9]|2[0-9]|3[01]))\.", host) is not None


def _trouble(settings: Settings, tested: Any) -> str:
    """Why MLflow's test did not reach the receiver of this home, and the mend; "" where it did."""
    status, mend = tested.response_status, "name where MLflow reaches the receiver with --url URL"
    said = " ".join(str(tested.error_message or tested.response_body or "").split())
    try:
        answer = dict(json.loads(tested.response_body or ""))
    except (ValueError, TypeError):
        answer = {}
    if status is None:
        short = re.search(r"\[Errno -?[0-9]+\] [\w ]+|timed out|certificate [\w ]+|non-public", said)
        return f"{short[0] if short else said[:200]}; {mend}"
    if answer.get("refused") in ("too old", "from the future"):
        return f"the clocks of the two machines are more than {WINDOW / 60:g} minutes apart"
    if status == 401:
        return f"whoever answers there has another secret; where that is the receiver of another home, {mend}"
    if status == 200 and Seen(seen_file(settings)).known(str(answer.get("delivery"))):
        return ""
    if status == 200:
        return f"something else than the receiver of this home answers there ({address(settings)}/mlflow is it); {mend}"
    return f"HTTP {status} {json.dumps(answer) if answer else ''}; {mend}".replace("  ", " ").replace(" ;", ";")


def _checked(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Mistake(f"--url {url}: say it like https://titleshot.example.com/mlflow", code=2)
    return url if parts.path.strip("/") else parts._replace(path="/mlflow").geturl()

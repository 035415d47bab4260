"""Who an approver is and how they prove it: a directory of people, one-time codes, and signed tokens.

Prefect knows no users, so a form proves nothing by the name in it. What proves it is a code of the approver's phone
(TOTP) or a token signed with the approver's key (Ed25519, as a JWT). The time is the caller's.
"""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pyotp
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock, Timeout
from jwt.types import Options
from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.settings import Mistake
from validations.approval import Asked, Decision

FILE = "approvers.json"
ISSUER = "Titleshot"
AUDIENCE = "titleshot"
ALGORITHM = "EdDSA"
STEP = 30
"""Seconds that a one-time code is shown."""
WINDOW = 1
"""How many steps a code may be early or late: clocks differ, and people type."""
NEARBY = 10
"""Codes of so many steps around are told apart from wrong ones: a clock is wrong then."""
GUESSES, PERIOD = 5, timedelta(minutes=5)
"""How many wrong codes of one approver, within which time, until all of them must wait."""
LASTS, LONGEST = timedelta(minutes=10), timedelta(hours=24)
"""How long a token is good unless its signer says otherwise, and at the most."""
LATE = timedelta(hours=1)
"""How much later than it was given a form may be looked at: until then a worker may have been busy."""
SKEW = timedelta(minutes=1)
"""How far the clock of the signer's machine may be ahead."""
BROKEN = "the token is broken: it was changed, or cut on the way"
BY_CODE, BY_TOKEN = "one-time code", "signed token"


class Unproven(Exception):
    """A form that proves nobody: the message is one sentence that says why."""


class _Person(BaseModel):
    """One approver: what they prove themselves with, and what has been used up of it.

    `last` is the time step of the last code that was accepted; `spent` are steps whose codes were given at the wrong
    time and are known since. `wrong` are the times of wrong codes, `tokens` the ids of used tokens with their ends.
    `form` is the last form that was accepted, `how` by what.
    """

    model_config = ConfigDict(extra="forbid")

    since: datetime
    secret: str = ""
    key: str = ""
    last: int = -1
    spent: list[int] = []
    wrong: list[float] = []
    tokens: dict[str, float] = {}
    form: str = ""
    how: str = ""


class _Book(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    approvers: dict[str, _Person] = {}


@dataclass(frozen=True, slots=True)
class Enrolled:
    """An approver as the list shows them: since when, whether by code, and the fingerprint of their key."""

    name: str
    since: datetime
    code: bool
    key: str


def enrol(home: Path, name: str, now: datetime, *, anew: bool = False) -> str:
    """Give `name` a secret for one-time codes; `anew` in place of the one they have. Returns the provisioning URI,
    which holds the secret. Raises `Mistake`.
    """
    secret = pyotp.random_base32()
    with _changed(home) as book:
        person = _enrolled(book, name, now, "one-time codes", "secret", anew=anew)
        book.approvers[name] = person.model_copy(
            update={"since": now, "secret": secret, "last": -1, "spent": [], "wrong": []}
        )
    return pyotp.TOTP(secret, interval=STEP).provisioning_uri(name=name, issuer_name=ISSUER)


def enrol_key(home: Path, name: str, now: datetime, *, anew: bool = False) -> str:
    """Give `name` a new key; `anew` in place of the one they have. Returns its private half (PEM), which is kept
    nowhere. Raises `Mistake`.
    """
    private = Ed25519PrivateKey.generate()
    _enrol_public(home, name, private.public_key(), now, anew=anew)
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def enrol_public(home: Path, name: str, key: str, now: datetime, *, anew: bool = False) -> None:
    """Enrol the public half (PEM or OpenSSH) of a key that `name` made, so that nobody else ever had the private one.
    Raises `Mistake`.
    """
    load = serialization.load_ssh_public_key if key.startswith("ssh-") else serialization.load_pem_public_key
    try:
        public = load(key.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Mistake(f"this is no public key in PEM or OpenSSH's format: {_line(error)}", code=2) from error
    if not isinstance(public, Ed25519PublicKey):
        raise Mistake("this key is of another kind: Ed25519 is wanted (`ssh-keygen -t ed25519`)", code=2)
    _enrol_public(home, name, public, now, anew=anew)


def _enrol_public(home: Path, name: str, public: Ed25519PublicKey, now: datetime, *, anew: bool) -> None:
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    with _changed(home) as book:
        person = _enrolled(book, name, now, "a key", "key", anew=anew)
        book.approvers[name] = person.model_copy(update={"since": now, "key": pem, "tokens": {}})


def _enrolled(book: _Book, name: str, now: datetime, what: str, field: str, *, anew: bool) -> _Person:
    if not name or name != " ".join(name.split()) or not name.isprintable() or ":" in name or len(name) > 64:
        raise Mistake(f"{name!r} is no name: one to 64 characters, no colon, no spaces around it", code=2)
    person = book.approvers.get(name, _Person(since=now))
    if getattr(person, field) and not anew:
        raise Mistake(
            f"{name} has {what} since {person.since:%Y-%m-%d}: "
            "to replace them, so that what they have now is worth nothing any more, add --anew"
            if field == "secret"
            else f"{name} has {what} since {person.since:%Y-%m-%d} ({fingerprint(person.key)}): "
            "to replace it, so that it is worth nothing any more, add --anew",
            code=2,
        )
    return person


def remove(home: Path, name: str) -> None:
    """Forget `name` and what they proved themselves with. Raises `Mistake` where they are not enrolled."""
    with _changed(home) as book:
        if book.approvers.pop(name, None) is None:
            raise Mistake(f"{name} is not enrolled: `titleshot approver list` shows who is", code=2)


def names(home: Path) -> list[str]:
    """Who is enrolled."""
    return sorted(_read(home / FILE).approvers)


def enrolled(home: Path) -> list[Enrolled]:
    """Who is enrolled, and how they prove themselves."""
    people = sorted(_read(home / FILE).approvers.items())
    return [
        Enrolled(name, one.since, bool(one.secret), fingerprint(one.key) if one.key else "") for name, one in people
    ]


def secret_of(uri: str) -> str:
    """The secret in a provisioning URI."""
    return pyotp.parse_uri(uri).secret


def fingerprint(key: str | Ed25519PublicKey) -> str:
    """A short name of a public key (PEM)."""
    public = serialization.load_pem_public_key(key.encode()) if isinstance(key, str) else key
    raw = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return "ed25519:" + hashlib.sha256(raw).hexdigest()[:16]


def sign(
    key: str,
    name: str,
    asked: Asked,
    decision: Decision,
    comment: str,
    now: datetime,
    lasts: timedelta = LASTS,
) -> str:
    """A token by which the owner of `key` (PEM or OpenSSH) says, as `name`, this to exactly what is `asked`. Raises
    `Mistake` for an unusable key.
    """
    private = _private(key)
    claims = {
        "sub": name,
        "aud": AUDIENCE,
        "promotion": asked.subject.promotion,
        "subject": asked.subject.digest,
        "shown": asked.subject.model_dump(exclude={"promotion"}),  # to say what has changed since
        "decision": decision,
        "comment": _digest(_plain(comment)),
        "iat": int(now.timestamp()),
        "exp": int((now + lasts).timestamp()),
        "jti": secrets.token_hex(16),
    }
    return jwt.encode(claims, private, algorithm=ALGORITHM, headers={"kid": fingerprint(private.public_key())})


def _private(key: str) -> Ed25519PrivateKey:
    load = serialization.load_ssh_private_key if "OPENSSH" in key[:40] else serialization.load_pem_private_key
    try:
        private = load(key.encode(), password=None)
    except TypeError as error:
        raise Mistake("the key is protected by a passphrase: a key without one is wanted", code=2) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Mistake(f"this is no private key in PEM or OpenSSH's format: {_line(error)}", code=2) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise Mistake("this key is of another kind: Ed25519 is wanted, as `titleshot approver add --key` makes", code=2)
    return private


def prove(
    home: Path,
    name: str,
    code: str,
    asked: Asked,
    decision: str,
    now: datetime,
    *,
    comment: str,
    given: datetime | None = None,
    form: str = "",
) -> str:
    """How the one who gave this form proved to be `name`. Raises `Unproven` with the reason; nothing is proven twice by
    one code or token. A token is bound to all of it, `comment` too.

    `given` is when the form was given, where that was before `now`: codes and tokens are judged by it, up to an hour
    back. `form` names the form: where its process died before it wrote the answer down, the same words in the same form
    get the same answer again. It must be a name that nobody but the caller can choose.
    """
    given = now if given is None else min(max(given, now - LATE), now)
    words = " ".join(map(_digest, (form, asked.subject.digest, name, code, decision, _plain(comment))))
    with _changed(home) as book:
        person = book.approvers.get(name)
        if person is None:
            raise Unproven(f"{_shown(name) or 'an approver without a name'} is not enrolled here")
        if form and _same(person.form, _digest(words)):
            return person.how
        digits = "".join(code.split())
        if re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]*", digits, re.ASCII) and len(digits) <= 4096:
            _token(book, name, person, digits, asked, decision, comment, given, now)
            how = BY_TOKEN
        elif re.fullmatch("[0-9]{6}", digits):
            _code(name, person, digits, given, now)
            how = BY_CODE
        else:
            raise Unproven("the code is not six digits, and no token either" if digits else "there is no code")
        if form:
            person.form, person.how = _digest(words), how
        return how


def _code(name: str, person: _Person, digits: str, given: datetime, now: datetime) -> None:
    if not person.secret:
        raise Unproven(f"{name} has no one-time codes enrolled, but a key: a signed token is wanted")
    seconds, period = now.timestamp(), PERIOD.total_seconds()
    person.wrong = [at for at in person.wrong if abs(seconds - at) < period]
    if len(person.wrong) >= GUESSES:
        end = datetime.fromtimestamp(min(person.wrong) + period, UTC)
        raise Unproven(
            f"{len(person.wrong)} wrong codes were given for {name} within {period / 60:.0f} minutes: "
            f"wait until {end:%H:%M:%S} UTC"
        )
    totp, step = pyotp.TOTP(person.secret, interval=STEP), int(given.timestamp()) // STEP
    steps = range(step - NEARBY, step + NEARBY + 1)
    known = [one for one in steps if hmac.compare_digest(totp.generate_otp(one), digits)]
    now_good = [one for one in known if abs(one - step) <= WINDOW]
    fresh = [one for one in now_good if one > person.last and one not in person.spent]
    if fresh:
        person.last = fresh[0]
        person.spent = [one for one in person.spent if one > person.last]
        return
    if now_good:
        raise Unproven(f"this code of {name}, or a later one, was used before: wait for the next one")
    person.wrong.append(seconds)
    if not known:
        raise Unproven(f"wrong code: it is not {name}'s")
    # It is known from now on, and its time may be still to come.
    person.spent = [*(one for one in person.spent if one > step - NEARBY), *known]
    of = datetime.fromtimestamp(known[0] * STEP, UTC)
    raise Unproven(
        f"this code of {name} is of another time, of {of:%H:%M:%S} UTC, and it was given at {given:%H:%M:%S} UTC: "
        "take the one that is shown now, and look whether the clocks are right"
    )


def _token(
    book: _Book,
    name: str,
    person: _Person,
    token: str,
    asked: Asked,
    decision: str,
    comment: str,
    given: datetime,
    now: datetime,
) -> None:
    claims = _verified(book, name, person, token)
    _in_time(claims["iat"], claims["exp"], given.timestamp())
    if not _same(claims["sub"], name):
        raise Unproven(f"the token speaks for {_shown(claims['sub'])}, and the form for {name}")
    if not _same(claims["promotion"], asked.subject.promotion):
        raise Unproven(f"the token is signed for another promotion: {_shown(claims['promotion'])}")
    if not _same(claims["subject"], asked.subject.digest):
        raise Unproven(_other(claims, asked))
    if not _same(claims["decision"], decision):
        raise Unproven(f"the token is signed for '{_shown(claims['decision'])}', and the form says '{decision}'")
    if not _same(claims["comment"], _digest(_plain(comment))):
        raise Unproven("the token is signed with another comment than the form has")
    identifier = claims["jti"]
    if not identifier or len(identifier) > 64:
        raise Unproven("the token's id is empty, or too long")
    person.tokens = {one: end for one, end in person.tokens.items() if end > (now - LATE - SKEW).timestamp()}
    if identifier in person.tokens:
        raise Unproven(f"this token of {name} was used before: sign anew")
    person.tokens[identifier] = claims["exp"]


def _in_time(begins: object, ends: object, at: float) -> None:
    if type(begins) is not int or type(ends) is not int or not 0 <= begins < ends < 2**37:
        raise Unproven("the token's times make no sense")
    if ends <= at:
        raise Unproven(f"the token expired at {datetime.fromtimestamp(ends, UTC):%Y-%m-%d %H:%M:%S} UTC: sign anew")
    if begins > at + SKEW.total_seconds():
        raise Unproven("the token was signed in the future: look whether the clocks are right")
    if ends - begins > LONGEST.total_seconds():
        raise Unproven(f"the token is good for longer than {LONGEST.total_seconds() / 3600:.0f} hours: none may be")


def _verified(book: _Book, name: str, person: _Person, token: str) -> dict[str, Any]:
    """The token's claims, the signature found to be `name`'s. The key is the one enrolled, whatever the token says."""
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise Unproven(BROKEN) from error
    if header.get("alg") != ALGORITHM:
        raise Unproven(f"the token is signed by '{_shown(header.get('alg'))}': only {ALGORITHM} counts")
    if not person.key:
        raise Unproven(f"{name} has no key enrolled: a one-time code is wanted")
    try:
        return _decoded(token, person.key)
    except jwt.InvalidSignatureError as error:
        for other, one in book.approvers.items():
            with contextlib.suppress(jwt.PyJWTError):
                if one.key and other != name and _decoded(token, one.key):
                    raise Unproven(f"the token is signed with the key of {other}, not with {name}'s") from error
        mine, kid = fingerprint(person.key), header.get("kid")
        if kid is not None and not _same(kid, mine):
            raise Unproven(f"the token is signed with another key ({_shown(kid)}) than {name}'s ({mine})") from error
        raise Unproven(BROKEN) from error
    except jwt.InvalidAudienceError as error:
        raise Unproven(f"the token is not meant for {AUDIENCE}") from error
    except jwt.PyJWTError as error:
        raise Unproven(f"the token does not say what it must: {_shown(error, 120)}") from error


def _decoded(token: str, key: str) -> dict[str, Any]:
    options: Options = {
        "require": ["sub", "aud", "promotion", "subject", "decision", "comment", "iat", "exp", "jti"],
        "strict_aud": True,
        # Its times are looked at by the caller's clock.
        "verify_exp": False,
        "verify_iat": False,
        "verify_nbf": False,
    }
    found: dict[str, Any] = jwt.decode(token, key, algorithms=[ALGORITHM], audience=AUDIENCE, options=options)
    return found


def _other(claims: dict[str, Any], asked: Asked) -> str:
    shown, now = claims.get("shown"), asked.subject.model_dump(exclude={"promotion"})
    was = shown if isinstance(shown, dict) else {}
    changed = [
        f"{what} {_shown(was.get(what), 24)} is now {_shown(value, 24)}"
        for what, value in now.items()
        if was.get(what) != value
    ]
    digests = f"{_shown(claims['subject'], 24)}, and {asked.subject.digest[:24]} is asked"
    return f"the token is signed for other evidence: {digests}" + (f" ({'; '.join(changed)})" if changed else "")


def _same(found: object, wanted: str) -> bool:
    """Whether they are the same, in a time that does not say where they differ."""
    return isinstance(found, str) and hmac.compare_digest(
        found.encode(errors="surrogatepass"), wanted.encode(errors="surrogatepass")
    )


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _plain(comment: str) -> str:
    # A browser's text box and a shell do not agree on line ends.
    return " ".join(comment.split())


def _shown(value: object, most: int = 80) -> str:
    """Something from outside, fit for a line of the history."""
    text = "".join(one if one.isprintable() else "?" for one in str(value))
    return text if len(text) <= most else text[:most] + "..."


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


@contextlib.contextmanager
def _changed(home: Path) -> Iterator[_Book]:
    """The book for one change, which nobody else changes meanwhile. What a refused proof leaves behind (a wrong code, a
    code that is known now) is kept as well; a `Mistake` changes nothing.
    """
    path = home / FILE
    try:
        home.mkdir(parents=True, exist_ok=True)
        held = FileLock(home / "approvers.lock", timeout=60, mode=0o600).acquire()
    except Timeout as error:
        raise Mistake(f"{path} is being changed by another process, for more than a minute now: try again") from error
    except OSError as error:
        raise Mistake(f"{path} cannot be written ({error.strerror}): make {home} writable") from error
    with held:
        book = _read(path)
        before = book.model_dump_json()
        try:
            yield book
        except Unproven:
            _write(path, book, before)
            raise
        _write(path, book, before)


def _read(path: Path) -> _Book:
    try:
        return _Book.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Book()
    except (OSError, ValidationError) as error:
        raise Mistake(
            f"{path} cannot be read ({_line(error)}): restore it, or remove it and enrol everybody"
        ) from error


def _write(path: Path, book: _Book, before: str) -> None:
    if book.model_dump_json() == before:
        return
    # Secrets: for the owner only, from the first byte. What is used up must stay so after a power cut.
    temporary = path.with_name(f".{FILE}.new")
    with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        stream.write(book.model_dump_json(indent=1))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)

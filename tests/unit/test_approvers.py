"""Who an approver is and how they prove it: every way to be refused, and that nothing is accepted twice or by chance."""

import base64
import contextlib
import json
import multiprocessing
import os
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pyotp
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows import cli
from tasks import approve, approvers, flowruns
from tasks.approvers import Unproven, enrol, enrol_key, enrol_public, prove, sign
from tasks.settings import Mistake
from validations.approval import Asked, Subject

NOW = datetime(2026, 11, 22, 12, 0, 10, tzinfo=UTC)
SUBJECT = Subject(
    promotion="m-v5-20261122-115500-ab12", step="approval", artifact="sha256:a", policy="sha256:p", evidence="sha256:e"
)


def asked(**changed) -> Asked:
    subject = SUBJECT.model_copy(update=changed)
    return Asked(subject=subject, round=1, requester="zoe", at=NOW, until=NOW + timedelta(hours=24), flow_run="f1")


ASKED = asked()


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def by_form(home, name, code, *, of=ASKED, decision="approve", comment="", now=NOW, **more) -> str:
    return prove(home, name, code, of, decision, now, comment=comment, **more)


def why_not(home, name, code, **more) -> str:
    with pytest.raises(Unproven) as refused:
        by_form(home, name, code, **more)
    text = str(refused.value)
    assert text
    assert "\n" not in text
    return text


class Phone:
    """An authenticator that has scanned the code of `name`."""

    def __init__(self, home: Path, name: str, **more) -> None:
        self.totp = pyotp.parse_uri(enrol(home, name, NOW, **more))

    def code(self, seconds: float = 0) -> str:
        return self.totp.at(later(seconds))

    def wrong(self, number: int = 0) -> str:
        """A code of no time nearby."""
        near = {self.code(30 * step) for step in range(-30, 31)}
        return [code for code in map("{:06}".format, range(1000)) if code not in near][number]


@pytest.fixture
def ana(tmp_path) -> Phone:
    return Phone(tmp_path, "ana")


@pytest.fixture
def key(tmp_path) -> str:
    return enrol_key(tmp_path, "bo", NOW)


def forged(key: str, headers=None, algorithm="EdDSA", **changed) -> str:
    """A token of `key` with other claims than `sign` would give it; None leaves one out."""
    claims = jwt.decode(sign(key, "bo", ASKED, "approve", "", NOW), options={"verify_signature": False})
    claims = {name: value for name, value in (claims | changed).items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers=headers)


# Enrolment.


def test_the_uri_is_what_authenticators_read(tmp_path) -> None:
    """Six digits each 30 s, issuer and name; the secret is new each time."""
    uri = enrol(tmp_path, "ana", NOW)
    read = pyotp.parse_uri(uri)
    assert (read.issuer, read.name, read.digits, read.interval) == ("Titleshot", "ana", 6, 30)
    assert len(read.secret) == 32
    assert approvers.secret_of(uri) == read.secret
    assert pyotp.parse_uri(enrol(tmp_path, "ana", NOW, anew=True)).secret != read.secret


def test_twice_is_refused_and_says_how_to_replace(tmp_path) -> None:
    """Codes and a key may be had side by side; none of them twice."""
    enrol(tmp_path, "ana", NOW)
    enrol_key(tmp_path, "ana", NOW)
    before = (tmp_path / approvers.FILE).read_bytes()
    for again in (enrol, enrol_key):
        with pytest.raises(Mistake, match=r"^ana has .* --anew$") as mistake:
            again(tmp_path, "ana", NOW)
        assert mistake.value.code == 2
    assert (tmp_path / approvers.FILE).read_bytes() == before
    assert approvers.names(tmp_path) == ["ana"]


def test_what_was_replaced_is_worth_nothing(tmp_path, ana, key) -> None:
    """Codes of a lost phone, tokens of a lost key."""
    again, other = Phone(tmp_path, "ana", anew=True), enrol_key(tmp_path, "bo", NOW, anew=True)
    assert why_not(tmp_path, "ana", ana.code()) == "wrong code: it is not ana's"
    assert by_form(tmp_path, "ana", again.code()) == "one-time code"
    assert "signed with another key" in why_not(tmp_path, "bo", sign(key, "bo", ASKED, "approve", "", NOW))
    assert by_form(tmp_path, "bo", sign(other, "bo", ASKED, "approve", "", NOW)) == "signed token"


def test_only_the_owner_may_read_the_file(tmp_path) -> None:
    """Also where the umask would let others; and of a key only the public half is in it."""
    before = os.umask(0)
    try:
        enrol(tmp_path, "ana", NOW)
        private = enrol_key(tmp_path, "bo", NOW)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [0o600, 0o600]
    text = (tmp_path / approvers.FILE).read_text()
    assert "PRIVATE" not in text
    assert private.splitlines()[1] not in text


@pytest.mark.parametrize("name", ["", " ana", "ana ", "a  b", "a:b", "a\nb", "a\x1b[2J", "a" * 65])
def test_a_name_that_lists_would_garble_is_none(tmp_path, name) -> None:
    """Names stand in histories, links and QR codes."""
    with pytest.raises(Mistake, match="is no name"):
        enrol(tmp_path, name, NOW)


def test_a_key_that_the_approver_made(tmp_path) -> None:
    """OpenSSH's and PEM; other kinds of keys and private halves are refused."""
    private = Ed25519PrivateKey.generate()
    ssh = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    ).decode()
    enrol_public(tmp_path, "cy", ssh + " cy@laptop", NOW)
    assert by_form(tmp_path, "cy", sign(secret, "cy", ASKED, "approve", "", NOW)) == "signed token"
    other = Ed448PrivateKey.generate().public_key()
    pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    for text, words in (
        (secret, "no public key"),
        ("", "no public key"),
        ("ssh-rsa x", "no public key"),
        (pem, "kind"),
    ):
        with pytest.raises(Mistake, match=words):
            enrol_public(tmp_path, "dee", text, NOW)
    for text in (ssh, "", "-----BEGIN"):
        with pytest.raises(Mistake, match="no private key"):
            sign(text, "cy", ASKED, "approve", "", NOW)
    locked = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    with pytest.raises(Mistake, match="passphrase"):
        sign(locked.decode(), "cy", ASKED, "approve", "", NOW)


def test_removed_is_unknown(tmp_path, ana) -> None:
    """And nobody is removed who is not there."""
    approvers.remove(tmp_path, "ana")
    assert approvers.names(tmp_path) == []
    assert why_not(tmp_path, "ana", ana.code()) == "ana is not enrolled here"
    with pytest.raises(Mistake, match="approver list"):
        approvers.remove(tmp_path, "ana")


def test_a_file_that_cannot_be_read_proves_nobody(tmp_path) -> None:
    """It is an error of the platform, not the approver's, and it is not written over."""
    (tmp_path / approvers.FILE).write_text("{")
    for ask in (lambda: by_form(tmp_path, "ana", "123456"), lambda: enrol(tmp_path, "ana", NOW)):
        with pytest.raises(Mistake, match="cannot be read"):
            ask()
    assert (tmp_path / approvers.FILE).read_text() == "{"


def _enrols(home: Path, letter: str, start) -> None:
    start.wait()
    for number in range(25):
        enrol(home, f"{letter}{number}", NOW)


def test_two_processes_that_enrol_at_once_lose_nothing(tmp_path) -> None:
    """All fifty are there."""
    spawn = multiprocessing.get_context("fork")
    start = spawn.Barrier(2)
    both = [spawn.Process(target=_enrols, args=(tmp_path, letter, start)) for letter in "xy"]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert [one.exitcode for one in both] == [0, 0]
    assert set(approvers.names(tmp_path)) == {f"{letter}{number}" for letter in "xy" for number in range(25)}


# One-time codes.


@pytest.mark.parametrize("off", [-30, 0, 30])
@pytest.mark.parametrize("shape", ["{}", " {} ", "{:.3} {}", "{}\n"])
def test_a_code_one_step_early_or_late_is_good(tmp_path, ana, off, shape) -> None:
    """With spaces as phones show them."""
    code = ana.code(off)
    text = f"{code[:3]} {code[3:]}" if "." in shape else shape.format(code)
    assert by_form(tmp_path, "ana", text) == "one-time code"


@pytest.mark.parametrize(
    "code",
    [
        "12345",
        "1234567",
        "12345a",
        "\uff11\uff12\uff13\uff14\uff15\uff16",
        "-12345",
        "12.456",
        "a.b",
        "x" * 9000,
        "\ud800.a.b",
    ],
)
def test_a_malformed_code_is_told_so(tmp_path, ana, code) -> None:
    """It is no guess: it does not count as a wrong one."""
    for _ in range(6):
        assert why_not(tmp_path, "ana", code) == "the code is not six digits, and no token either"
    assert why_not(tmp_path, "ana", " ") == "there is no code"
    assert by_form(tmp_path, "ana", ana.code()) == "one-time code"


def test_unknown_people_are_told_so(tmp_path, ana) -> None:
    """Names are compared as they are; what is not printable does not reach the history."""
    for name in ("bo", "Ana", "ana ", "ana\u200b"):
        assert why_not(tmp_path, name, ana.code()).endswith("is not enrolled here")
    assert "\x1b" not in why_not(tmp_path, "\x1b[2J", ana.code())
    assert why_not(tmp_path, "", ana.code()) == "an approver without a name is not enrolled here"


def test_a_code_is_its_owners_alone(tmp_path, ana) -> None:
    """Another approver's phone shows other codes."""
    bo = Phone(tmp_path, "bo")
    assert why_not(tmp_path, "bo", ana.code()) == "wrong code: it is not bo's"
    assert by_form(tmp_path, "bo", bo.code()) == "one-time code"


def test_a_used_code_is_refused_for_good(tmp_path, ana) -> None:
    """And every code before it; the next one is good."""
    used = "this code of ana, or a later one, was used before: wait for the next one"
    by_form(tmp_path, "ana", ana.code())
    assert why_not(tmp_path, "ana", ana.code()) == used
    assert why_not(tmp_path, "ana", ana.code(), now=later(20)) == used
    assert why_not(tmp_path, "ana", ana.code(-30)) == used
    assert why_not(tmp_path, "ana", ana.code(), of=asked(promotion="m-v6")) == used
    assert by_form(tmp_path, "ana", ana.code(30)) == "one-time code"


@pytest.mark.parametrize("off", [-300, -60, 60, 300])
def test_a_code_of_another_time_says_which(tmp_path, ana, off) -> None:
    """And is not good when its time comes: whoever read the answer knows it."""
    code = ana.code(off)
    assert f"is of another time, of {later(off - 10):%H:%M:%S} UTC" in why_not(tmp_path, "ana", code)
    if off > 0:
        assert "was used before" in why_not(tmp_path, "ana", code, now=later(off))
        assert by_form(tmp_path, "ana", ana.code(off + 30), now=later(off)) == "one-time code"


def test_all_codes_that_were_given_too_early_are_known(tmp_path, ana) -> None:
    """Not only the last one."""
    for off in (60, 90, 120):
        assert "of another time" in why_not(tmp_path, "ana", ana.code(off))
    for off in (60, 90, 120):
        assert "was used before" in why_not(tmp_path, "ana", ana.code(off), now=later(90))
    assert by_form(tmp_path, "ana", ana.code(150), now=later(150)) == "one-time code"


def test_five_wrong_codes_and_the_right_one_must_wait(tmp_path, ana) -> None:
    """Five minutes from the first one, stored: a new process knows them. Others go on meanwhile, and so does a key."""
    for number in range(5):
        assert why_not(tmp_path, "ana", ana.wrong(number), now=later(number)) == "wrong code: it is not ana's"
    wait = f"5 wrong codes were given for ana within 5 minutes: wait until {later(300):%H:%M:%S} UTC"
    assert why_not(tmp_path, "ana", ana.code(), now=later(5)) == wait
    assert why_not(tmp_path, "ana", ana.code(299), now=later(299)) == wait
    assert len(json.loads((tmp_path / approvers.FILE).read_text())["approvers"]["ana"]["wrong"]) == 5
    assert by_form(tmp_path, "bo", Phone(tmp_path, "bo").code()) == "one-time code"
    token = sign(enrol_key(tmp_path, "ana", NOW), "ana", ASKED, "approve", "", NOW)
    assert by_form(tmp_path, "ana", token) == "signed token"
    assert by_form(tmp_path, "ana", ana.code(300), now=later(300)) == "one-time code"


def test_a_form_that_waited_for_a_worker_is_judged_by_when_it_was_given(tmp_path, ana, key) -> None:
    """Up to an hour; a time that is still to come counts as now."""
    late, token = later(1800), sign(key, "bo", ASKED, "approve", "", NOW)
    assert "another time" not in why_not(tmp_path, "ana", ana.code(), now=late)
    assert by_form(tmp_path, "ana", ana.code(), now=late, given=NOW) == "one-time code"
    assert "expired" in why_not(tmp_path, "bo", token, now=late)
    assert by_form(tmp_path, "bo", token, now=late, given=NOW) == "signed token"
    assert "used before" in why_not(tmp_path, "bo", token, now=late, given=NOW)
    assert why_not(tmp_path, "ana", ana.code(60), now=later(7200), given=later(60)) == "wrong code: it is not ana's"
    assert "another time" in why_not(tmp_path, "ana", ana.code(120), now=later(30), given=later(120))


def test_a_form_whose_process_died_gets_its_answer_again(tmp_path, ana, key) -> None:
    """The same words in the same form; in another form, or with other words, the code is a used one."""
    form = "m-v5/approval/1"
    for name, code in (("ana", ana.code()), ("bo", sign(key, "bo", ASKED, "approve", "", NOW))):
        how = by_form(tmp_path, name, code, form=form)
        assert by_form(tmp_path, name, code, form=form, now=later(3000)) == how
        for other in ({"form": "m-v5/approval/2"}, {"form": ""}, {"form": form, "of": asked(evidence="sha256:f")}):
            assert why_not(tmp_path, name, code, **other)
        assert why_not(tmp_path, name, code, form=form, decision="reject")
        assert why_not(tmp_path, name, code, form=form, comment="no")


def test_of_many_threads_with_one_code_one_is_accepted(tmp_path, ana, key) -> None:
    """The step and the token's id are written before anybody is told that they were good."""
    for name, code in (("ana", ana.code()), ("bo", sign(key, "bo", ASKED, "approve", "", NOW))):
        said, start = [], threading.Barrier(4)

        def give(name=name, code=code, said=said, start=start) -> None:
            start.wait()
            try:
                said.append(by_form(tmp_path, name, code))
            except Unproven as unproven:
                said.append(str(unproven))

        threads = [threading.Thread(target=give) for _ in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(30)
        assert sum(word in ("one-time code", "signed token") for word in said) == 1
        assert sum("was used before" in word for word in said) == 3


# Tokens.


def test_a_token_is_good_once(tmp_path, key) -> None:
    """For all of its ten minutes; line breaks of a narrow terminal do not matter. Ids are forgotten when they are old."""
    token = sign(key, "bo", ASKED, "approve", "looks\r\ngood ", NOW)
    broken = "\n".join(re.findall(".{1,40}", token))
    assert by_form(tmp_path, "bo", broken, comment="looks good", now=later(599)) == "signed token"
    for now in (NOW, later(599)):
        assert (
            why_not(tmp_path, "bo", token, comment="looks good", now=now)
            == "this token of bo was used before: sign anew"
        )
    assert "expired" in why_not(tmp_path, "bo", token, comment="looks good", now=later(600))
    late = later(90000)
    by_form(tmp_path, "bo", sign(key, "bo", ASKED, "approve", "", late), now=late)
    assert len(json.loads((tmp_path / approvers.FILE).read_text())["approvers"]["bo"]["tokens"]) == 1


def test_a_token_is_bound_to_all_of_it(tmp_path, key) -> None:
    """To its promotion, to what was shown, to the decision, to the words, and to the name; each is told. None of this
    uses it up.
    """
    token = sign(key, "bo", ASKED, "approve", "fine", NOW)

    def refused(**changed) -> str:
        return why_not(tmp_path, changed.pop("name", "bo"), token, **({"comment": "fine"} | changed))

    other = refused(of=asked(promotion="m-v6"))
    assert other == f"the token is signed for another promotion: {SUBJECT.promotion}"
    for field in ("artifact", "policy", "evidence", "step"):
        of = asked(**{field: "sha256:z"})
        other = refused(of=of)
        was = getattr(SUBJECT, field)
        assert other.startswith(
            f"the token is signed for other evidence: {SUBJECT.digest[:24]}..., and {of.subject.digest[:24]}"
        )
        assert other.endswith(f"({field} {was} is now sha256:z)")
    assert refused(decision="reject") == "the token is signed for 'approve', and the form says 'reject'"
    assert refused(comment="never") == "the token is signed with another comment than the form has"
    enrol_key(tmp_path, "cy", NOW)
    assert refused(name="cy") == "the token is signed with the key of bo, not with cy's"
    assert by_form(tmp_path, "bo", token, comment="fine") == "signed token"


def test_a_token_with_another_name_in_it_speaks_for_nobody(tmp_path, key) -> None:
    """The key says whose it is, and the token must say the same."""
    assert (
        why_not(tmp_path, "bo", sign(key, "ana", ASKED, "approve", "", NOW))
        == "the token speaks for ana, and the form for bo"
    )


def test_a_token_of_another_key_is_refused(tmp_path, key, ana) -> None:
    """Whatever key it names; who has no key cannot sign, and who has no codes cannot give one."""
    stranger = enrol_key(tmp_path / "elsewhere", "bo", NOW)
    assert "is signed with another key (ed25519:" in why_not(
        tmp_path, "bo", sign(stranger, "bo", ASKED, "approve", "", NOW)
    )
    kid = jwt.get_unverified_header(sign(key, "bo", ASKED, "approve", "", NOW))["kid"]
    assert why_not(tmp_path, "bo", forged(stranger, headers={"kid": kid})) == approvers.BROKEN
    assert (
        why_not(tmp_path, "ana", sign(key, "ana", ASKED, "approve", "", NOW))
        == "ana has no key enrolled: a one-time code is wanted"
    )
    assert why_not(tmp_path, "bo", "123456") == "bo has no one-time codes enrolled, but a key: a signed token is wanted"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"iat": int(later(-601).timestamp()), "exp": int(later(-1).timestamp())},
            "the token expired at 2026-11-22 12:00:09 UTC",
        ),
        ({"iat": int(later(120).timestamp())}, "signed in the future"),
        ({"exp": int(later(90000).timestamp())}, "good for longer than 24 hours"),
        ({"exp": None}, '"exp" claim'),
        ({"exp": "soon"}, "times make no sense"),
        ({"exp": 1e999}, "times make no sense"),
        ({"exp": 10**40}, "times make no sense"),
        ({"exp": True}, "times make no sense"),
        ({"iat": None}, '"iat" claim'),
        ({"iat": -5}, "times make no sense"),
        ({"jti": None}, '"jti" claim'),
        ({"jti": 5}, "does not say what it must"),
        ({"jti": ""}, "id is empty"),
        ({"jti": "x" * 65}, "too long"),
        ({"sub": None}, '"sub" claim'),
        ({"sub": ["bo"]}, "does not say what it must"),
        ({"aud": None}, '"aud" claim'),
        ({"aud": "elsewhere"}, "not meant for titleshot"),
        ({"aud": ["titleshot"]}, "not meant for titleshot"),
        ({"subject": None}, '"subject" claim'),
        ({"subject": ""}, "other evidence"),
        ({"subject": {"digest": SUBJECT.digest}, "shown": 3}, "other evidence"),
        ({"promotion": None}, '"promotion" claim'),
        ({"promotion": "\x1b[2J" + "x" * 500}, "another promotion: ?[2J"),
        ({"decision": None}, '"decision" claim'),
        ({"decision": True}, "is signed for 'True'"),
        ({"comment": None}, '"comment" claim'),
        ({"comment": ""}, "another comment"),
    ],
)
def test_a_token_that_its_owner_signed_wrongly(tmp_path, key, changed, words) -> None:
    """The right key is not enough: every claim must be there and be right."""
    # PyJWT itself signs no such token.
    made = _raw if isinstance(changed.get("jti"), int) or isinstance(changed.get("sub"), list) else None
    token = made(key, changed) if made else forged(key, **changed)
    text = why_not(tmp_path, "bo", token)
    assert words in text
    assert text.isprintable()
    assert len(text) < 400


def _raw(key: str, changed, header=None) -> str:
    claims = jwt.decode(sign(key, "bo", ASKED, "approve", "", NOW), options={"verify_signature": False}) | changed
    private = serialization.load_pem_private_key(key.encode(), password=None)
    first = _part(header or {"alg": "EdDSA", "typ": "JWT"}) + "." + _part(claims)
    return first + "." + _bytes(private.sign(first.encode()))


def _part(value) -> str:
    return _bytes(json.dumps(value).encode())


def _bytes(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def test_the_algorithm_is_not_the_tokens_to_choose(tmp_path, key) -> None:
    """No signature, the public key as a shared secret (in each way it can be written), other names and other keys."""
    public = json.loads((tmp_path / approvers.FILE).read_text())["approvers"]["bo"]["key"]
    raw = serialization.load_pem_public_key(public.encode()).public_bytes(
        serialization.Encoding.Raw, serialization.PublicFormat.Raw
    )
    claims = jwt.decode(sign(key, "bo", ASKED, "approve", "", NOW), options={"verify_signature": False})
    import hashlib
    import hmac

    tried = [jwt.encode(claims, None, algorithm="none")]
    for name in ("none", "None", "NONE", "eddsa", "HS256", "RS256", "ES256", "", None, 1, ["EdDSA"]):
        first = _part({"alg": name, "typ": "JWT"}) + "." + _part(claims)
        tried.append(first + ".")
        tried += [
            first + "." + _bytes(hmac.new(secret, first.encode(), hashlib.sha256).digest())
            for secret in (public.encode(), public.strip().encode(), raw, b"", b"None")
        ]
        tried.append(_raw(key, {}, {"alg": name, "typ": "JWT"}))  # even signed with the right key
    for token in tried:
        text = why_not(tmp_path, "bo", token)
        assert "only EdDSA counts" in text or text == approvers.BROKEN
    for header in ({"alg": "EdDSA", "b64": False, "crit": ["b64"]}, {"alg": "EdDSA", "crit": ["x"], "x": 1}):
        assert why_not(tmp_path, "bo", _raw(key, {}, header))
    stranger = Ed25519PrivateKey.generate()
    jwk = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(stranger.public_key()))
    for header in ({"jwk": jwk}, {"jku": "http://127.0.0.1/keys"}, {"kid": "../../bo.pem"}):
        assert why_not(tmp_path, "bo", jwt.encode(claims, stranger, algorithm="EdDSA", headers=header))


def test_a_token_has_one_text(tmp_path, key) -> None:
    """The last letter of a signature has bits that nothing reads, and decoders skip what is no letter."""
    token = sign(key, "bo", ASKED, "approve", "", NOW)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = [token[:-1] + letter for letter in letters if letter != token[-1]]
    for other in ("a.b.c", *others, token + "A", token[:-1]):
        assert why_not(tmp_path, "bo", other) == approvers.BROKEN
    for other in (token + "=", token + "==", token + "!", token[:-9] + "\x00" + token[-9:], token + ".", ".."):
        assert why_not(tmp_path, "bo", other) == "the code is not six digits, and no token either"
    assert by_form(tmp_path, "bo", token) == "signed token"


@pytest.fixture(scope="module")
def signed(tmp_path_factory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("home")
    return home, sign(enrol_key(home, "bo", NOW), "bo", ASKED, "approve", "", NOW)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=st.data())
def test_a_token_changed_anywhere_is_never_accepted(signed, data) -> None:
    """Letters changed, cut out, doubled, swapped: if it says anything else, or says it otherwise, it is no token."""
    home, token = signed
    at, length = data.draw(st.integers(0, len(token) - 1)), data.draw(st.integers(0, 6))
    put = data.draw(st.text("abcXYZ019-_.=+/ \x00é", max_size=6))
    changed = token[:at] + put + token[at + length :]
    if "".join(changed.split()) != token:
        why_not(home, "bo", changed)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "zip"]), JSON, max_size=4),
    claims=JSON
    | st.dictionaries(
        st.sampled_from(["sub", "aud", "exp", "iat", "jti", "subject", "decision", "comment", "promotion"]), JSON
    ),
    tail=st.binary(max_size=80),
    right=st.booleans(),
)
def test_a_token_made_without_the_key_is_never_accepted(signed, header, claims, tail, right) -> None:
    """Any header, any claims (also the right ones), any signature."""
    home, token = signed
    parts = token.split(".")
    if right:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=="))
    header = {"alg": "EdDSA", **header}
    for signature in (_bytes(tail), parts[2]):
        made = f"{_part(header)}.{_part(claims)}.{signature}"
        if made != token:
            why_not(home, "bo", made)


@FUZZ
@given(name=st.text(max_size=12), code=st.text(max_size=40), decision=st.text(max_size=9), comment=st.text(max_size=20))
def test_whatever_is_typed_is_answered_in_a_sentence(signed, name, code, decision, comment) -> None:
    """No form raises anything else."""
    why_not(signed[0], name, code, decision=decision, comment=comment)
    why_not(signed[0], "bo", code, decision=decision, comment=comment)


# The command line.


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TITLESHOT_HOME", str(tmp_path / "h"))
    monkeypatch.setenv("TITLESHOT_PREFECT_API_URL", "http://127.0.0.1:9/api")
    return tmp_path / "h"


def test_add_shows_a_code_and_the_secret(home, capsys) -> None:
    """What is stored is what is shown, and what is shown once is not shown again."""
    assert cli.run(["approver", "add", "ana"]) == 0
    shown = capsys.readouterr().out
    secret = json.loads((home / approvers.FILE).read_text())["approvers"]["ana"]["secret"]
    assert secret in shown.replace(" ", "")
    assert "█" in shown
    assert cli.run(["approver", "add", "ana"]) == 2
    assert "--anew" in capsys.readouterr().err
    assert cli.run(["approver", "list"]) == 0
    shown = capsys.readouterr().out
    assert "ana" in shown
    assert secret not in shown.replace(" ", "")
    assert cli.run(["approver", "remove", "ana"]) == 0
    assert cli.run(["approver", "remove", "ana"]) == 2


def test_a_key_file_is_written_once_and_for_its_owner(home, tmp_path, capsys) -> None:
    """None is left where there is no enrolment, and no file is overwritten."""
    path = tmp_path / "bo.pem"
    assert cli.run(["approver", "add", "bo", "--key", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    assert cli.run(["approver", "add", "bo", "--anew", "--key", str(path)]) == 2
    assert path.read_bytes() == before
    assert cli.run(["approver", "add", "bo", "--key", str(tmp_path / "other.pem")]) == 2
    assert not (tmp_path / "other.pem").exists()
    assert cli.run(["approver", "add", "bo", "--key", str(tmp_path / "no" / "bo.pem")]) == 2
    assert by_form(home, "bo", sign(path.read_text(), "bo", ASKED, "approve", "", NOW)) == "signed token"
    capsys.readouterr()


@pytest.fixture
def waits(monkeypatch):
    """What waits for people, and what was handed in for it."""
    now, waiting, given_in = datetime.now(UTC), [], []
    monkeypatch.setattr(approve, "pending", lambda _: list(waiting))
    monkeypatch.setattr(flowruns, "resume", lambda _, run, form: given_in.append((run, form)))

    def wait(promotion: str, hours: float = 1) -> None:
        found = asked(promotion=promotion)
        waiting.append(found.model_copy(update={"at": now, "until": now + timedelta(hours=hours)}))

    wait.given, wait.all = given_in, waiting
    return wait


def test_approve_lists_what_waits(home, waits, capsys) -> None:
    """With who asked for it, until when, and its page."""
    assert cli.run(["approve"]) == 0
    assert "no promotion waits" in capsys.readouterr().out
    waits("m-v5-x")
    assert cli.run(["approve"]) == 0
    shown = capsys.readouterr().out
    assert "m-v5-x  m: asked for by zoe, until " in shown
    assert "http://127.0.0.1:9/runs/flow-run/f1" in shown
    assert cli.run(["approve", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["promotion"] == "m-v5-x"
    assert waits.given == []


def test_approve_hands_in_and_says_that_this_is_not_all(home, waits, tmp_path, capsys) -> None:
    """A code goes as it is; a key signs exactly what is asked, with the words."""
    waits("m-v5-x")
    assert cli.run(["approve", "--by", "ana", "--code", "123 456", "--comment", "fine"]) == 0
    assert waits.given.pop() == ("f1", {"decision": "approve", "approver": "ana", "code": "123 456", "comment": "fine"})
    shown = capsys.readouterr().out
    assert "not accepted yet" in shown
    assert "titleshot explain m-v5-x" in shown
    path = tmp_path / "bo.pem"
    cli.run(["approver", "add", "bo", "--key", str(path)])
    waits("m-v6-x")
    assert cli.run(["approve", "m-v6-x", "--by", "bo", "--key", str(path), "--reject", "--comment", "no"]) == 0
    ((_, form),) = waits.given
    proof = (home, "bo", form["code"], waits.all[1], "reject", datetime.now(UTC))
    assert prove(*proof, comment="no") == "signed token"
    capsys.readouterr()
    assert cli.run(["approve", "m-v5-x", "--by", "bo", "--key", str(path), "--token-only"]) == 0
    told = capsys.readouterr()
    assert prove(home, "bo", told.out.strip(), waits.all[0], "approve", datetime.now(UTC), comment="") == "signed token"
    assert "decision: approve, approver: bo" in told.err
    assert len(waits.given) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--reject"], 2, "--by NAME"),
        (["--code", "123456"], 2, "--by NAME"),
        (["--by", "ana"], 2, "--code CODE, or --key FILE"),
        (["--by", "ana", "--code", "1", "--key", "k"], 2, "one of them"),
        (["--by", "ana", "--code", "1", "--token-only"], 2, "which a key signs"),
        (["--by", "ana", "--key", "nowhere.pem"], 2, "nowhere.pem cannot be read"),
        (["--by", "ana", "--code", "1", "--comment", "x" * 2001], 2, "longer than 2,000"),
        (["--by", "ana", "--code", "1"], 2, "2 promotions wait, name one: m-v5-x, m-v6-x"),
        (["m-v9-x", "--by", "ana", "--code", "1"], 1, "m-v9-x does not wait for anybody"),
        (["m-v6-x", "--by", "ana", "--code", "1"], 1, "m-v6-x could be approved until "),
    ],
)
def test_approve_refuses_in_one_line(home, waits, capsys, arguments, code, words) -> None:
    """2 for wrong use, 1 where it is not possible."""
    waits("m-v5-x")
    waits("m-v6-x", hours=-1)
    assert cli.run(["approve", *arguments]) == code
    told = capsys.readouterr().err.strip()
    assert words in " ".join(told.split())
    assert waits.given == []


def test_approve_waits_for_the_form_and_not_for_ever(home, waits, monkeypatch, capsys) -> None:
    """That people are asked is written down before the run is suspended; a run that ended takes no form."""
    waits("m-v5-x")
    answers = [Mistake("the form was not accepted: Cannot resume"), Mistake("Run input schema not found."), None]

    def resume(*_) -> None:
        with contextlib.suppress(IndexError):
            if (answer := answers.pop(0)) is not None:
                raise answer

    def state(type_: str):
        return flowruns.FlowRun("f1", "n", type_, type_.title(), "", NOW, NOW, 1, "", None, {}, ())

    states = [state("RUNNING"), state("PAUSED")]
    monkeypatch.setattr(flowruns, "resume", resume)
    monkeypatch.setattr(flowruns, "find", lambda *_: states.pop(0))
    assert cli.run(["approve", "--by", "ana", "--code", "1"]) == 0
    assert (answers, states) == ([], [])
    answers.append(Mistake("the form was not accepted: Cannot resume"))
    states.append(state("CANCELLED"))
    assert cli.run(["approve", "--by", "ana", "--code", "1"]) == 1
    assert "m-v5-x: the form was not accepted: Cannot resume; its run is Cancelled" in capsys.readouterr().err

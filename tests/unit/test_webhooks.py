"""Deliveries of MLflow's webhooks: which are believed, which start something, and that each does so once."""

import asyncio
import json
import logging
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deployments.local.supervisor import wait_for
from tasks import receiver, webhooks
from tasks.settings import Mistake, Settings
from tasks.stack import free_port
from tasks.webhooks import Delivery, Refused, Seen, sign, verify
from tests.chaos import deliveries

NOW = 1_795_000_000.0
SECRET = "a-secret-for-tests"
ALIAS = ("model_version_alias.created", {"name": "m", "alias": "challenger", "version": "7"})
TAG = ("model_version_tag.set", {"name": "m", "version": "7", "key": "titleshot.promote", "value": "true"})
VERSION = ("model_version.created", {"name": "m", "version": "7", "source": "s", "run_id": None, "tags": {"k": "v"}})


def body(event: str, data: dict[str, Any]) -> bytes:
    entity, _, action = event.rpartition(".")
    return json.dumps({"entity": entity, "action": action, "timestamp": "2026-11-22", "data": data}).encode()


def signed(content: bytes, at: float = NOW, secret: str = SECRET, identifier: str | None = None) -> dict[str, str]:
    name, sent = identifier or str(uuid.uuid4()), str(int(at))
    return {
        "X-MLflow-Delivery-Id": name,
        "X-MLflow-Timestamp": sent,
        "X-MLflow-Signature": sign(secret, name, sent, content),
    }


# --- what is believed


def test_what_mlflow_signs_is_believed() -> None:
    """The signature is the one that MLflow 3.17 made of this; names of headers are of any case."""
    content = body(*ALIAS)
    headers = signed(content, identifier="d-1")
    assert headers["X-MLflow-Signature"] == "v1,eRpYSg8BWJhbpErk6t2u+1F1UChNLw87P6V3Fj4pFMc="
    for cased in (headers, {name.lower(): value for name, value in headers.items()}):
        assert verify(SECRET, cased, content, NOW) == Delivery("d-1", ALIAS[0], "m", "7", "challenger")


@pytest.mark.parametrize("event", [ALIAS, TAG, VERSION])
def test_each_kind_of_event_is_read(event: Any) -> None:
    """Alias, tag and version: model and version are known whichever it is."""
    content = body(*event)
    found = verify(SECRET, signed(content), content, NOW)
    assert (found.event, found.model, found.version) == (event[0], "m", "7")


def refusal(headers: dict[str, str], content: bytes, now: float = NOW) -> tuple[str, int]:
    with pytest.raises(Refused) as refused:
        verify(SECRET, headers, content, now)
    return refused.value.why, refused.value.status


@pytest.mark.parametrize("missing", ["X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature"])
def test_without_a_signature(missing: str) -> None:
    """Who does not sign is refused, whichever part is missing or empty."""
    headers = signed(body(*ALIAS))
    assert refusal(headers | {missing: ""}, body(*ALIAS)) == ("not signed", 401)
    del headers[missing]
    assert refusal(headers, body(*ALIAS)) == ("not signed", 401)


def test_forged() -> None:
    """Another secret, another body, another time, another id, another scheme, half a signature: all are refused."""
    content = body(*ALIAS)
    good = signed(content)
    signature = good["X-MLflow-Signature"]
    for change in (
        signed(content, secret="another"),
        signed(content, secret=""),
        {"X-MLflow-Delivery-Id": str(uuid.uuid4())},
        {"X-MLflow-Timestamp": str(int(NOW) + 1)},
        {"X-MLflow-Signature": signature.removeprefix("v1,")},
        {"X-MLflow-Signature": "v2" + signature[2:]},
        {"X-MLflow-Signature": signature[:-4]},
        {"X-MLflow-Signature": signature + " " + signature},
        {"X-MLflow-Signature": "v1,ü"},
    ):
        assert refusal(good | change, content) == ("wrong signature", 401), change
    assert refusal(good, content.replace(b'"7"', b'"8"')) == ("wrong signature", 401)
    assert refusal(good, b"") == ("wrong signature", 401)


@pytest.mark.parametrize("identifier", ["a.b", "a b", "a\nb", "x" * 101, "ü"])
def test_a_part_that_reads_as_two(identifier: str) -> None:
    """Id, time and body are signed with dots between: an id that holds one, or worse, is refused though it is signed."""
    content = body(*ALIAS)
    assert refusal(signed(content, identifier=identifier), content) == ("wrong signature", 401)


@pytest.mark.parametrize("sent", ["", "now", "-1", "1e9", "1_000", "\uff11\uff12", "1.5", "9" * 13])
def test_a_time_that_is_none(sent: str) -> None:
    """Seconds since 1970 in digits, and nothing else, though it is signed."""
    content = body(*ALIAS)
    headers = signed(content) | {"X-MLflow-Timestamp": sent}
    headers["X-MLflow-Signature"] = sign(SECRET, headers["X-MLflow-Delivery-Id"], sent, content)
    assert refusal(headers, content)[1] == 401


def test_the_window() -> None:
    """Five minutes either way: within it is believed, beyond it refused as old or early, replayed or not."""
    content = body(*ALIAS)
    for ago in (0, 299, -299):
        verify(SECRET, signed(content, NOW - ago), content, NOW)
    assert refusal(signed(content, NOW - 302), content) == ("too old", 403)
    assert refusal(signed(content, NOW + 302), content) == ("from the future", 403)


@pytest.mark.parametrize("content", [b"", b"{", b"nonsense", b"\xff\xfe", b"[" * 100_000])
def test_not_json(content: bytes) -> None:
    """What is no JSON is refused, though it is signed."""
    assert refusal(signed(content), content) == ("not JSON", 400)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b'{"entity": "model_version", "action": "created"}',
        body("model_version.created", {"name": "m"}),
        body("model_version.created", {"name": "", "version": "1"}),
        body("model_version.created", {"name": 7, "version": "1"}),
        *(
            body("model_version.created", {"name": "m", "version": bad})
            for bad in ("", "0", "-1", "1; x", "1\n", 1, {})
        ),
        body("model_version_alias.created", {"name": "m", "version": "1"}),
        body("model_version_tag.set", {"name": "m", "version": "1", "key": "titleshot.promote"}),
    ],
)
def test_of_another_shape(content: bytes) -> None:
    """What is not of the shape of MLflow's events is refused, though it is signed."""
    assert refusal(signed(content), content) == ("not of the shape of MLflow's events", 400)


def test_too_large() -> None:
    """More than a megabyte is refused before anything is computed."""
    content = body("model_version.created", {**VERSION[1], "tags": {"k": "v" * webhooks.LIMIT}})
    assert refusal(signed(content), content) == ("too large", 413)


# --- which event starts something


def policy(folder: Path, trigger: str | None, name: str = "m.yaml", model: str = "m") -> None:
    word = "" if trigger is None else f"trigger: {trigger}\n"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"version: 1\nmodel: {model}\n{word}gates:\n  - kind: integrity\n")


def said(settings: Settings, event: str, data: dict[str, Any]) -> str | None:
    content = body(event, data)
    return webhooks.why_not(settings, verify(SECRET, signed(content), content, NOW))


def test_the_policy_says_which_event_counts(tmp_path: Path) -> None:
    """Each word of `trigger` has its one event; without the word it is the alias."""
    settings = Settings(home=tmp_path)
    waits = {
        "alias": "m.yaml waits for model_version_alias.created challenger",
        "tag": "m.yaml waits for model_version_tag.set titleshot.promote true",
        "version": "m.yaml waits for model_version.created",
    }
    for word, event in (("alias", ALIAS), (None, ALIAS), ("tag", TAG), ("version", VERSION)):
        policy(settings.policy_folder, word)
        for other in (ALIAS, TAG, VERSION):
            assert said(settings, *other) == (None if other is event else waits[word or "alias"]), (word, other)
    policy(settings.policy_folder, "hand")
    for other in (ALIAS, TAG, VERSION):
        assert said(settings, *other) == "by m.yaml promotions of m are started by hand"


def test_other_aliases_tags_models_and_events(tmp_path: Path) -> None:
    """Only the alias challenger, only the tag with the value true, only models that have a policy."""
    settings = Settings(home=tmp_path)
    assert said(settings, *ALIAS) == f"m has no policy in {tmp_path / 'policies'}"
    policy(settings.policy_folder, "alias")
    assert said(settings, ALIAS[0], {**ALIAS[1], "alias": "champion"}) == (
        "model_version_alias.created 'champion' starts no promotion"
    )
    assert said(settings, ALIAS[0], {**ALIAS[1], "name": "n"}) == f"n has no policy in {tmp_path / 'policies'}"
    assert said(settings, "registered_model.created", {"name": "m", "tags": {}}) == (
        "registered_model.created starts no promotion"
    )
    policy(settings.policy_folder, "tag")
    for change in ({"value": "false"}, {"value": "True"}, {"key": "other"}):
        assert str(said(settings, TAG[0], TAG[1] | change)).endswith("starts no promotion"), change


def test_a_policy_is_read_only_for_what_may_ask(tmp_path: Path) -> None:
    """The tags that a promotion sets are many: a broken policy does not have MLflow repeat them all."""
    settings = Settings(home=tmp_path)
    policy(settings.policy_folder, "nonsense")
    assert said(settings, TAG[0], {**TAG[1], "key": "titleshot.phase"}) == (
        "model_version_tag.set 'titleshot.phase' 'true' starts no promotion"
    )
    with pytest.raises(Mistake):
        said(settings, *TAG)


# --- ids


def test_an_id_is_taken_once_and_stays_taken(tmp_path: Path) -> None:
    """Also for who opens the file again; it is forgotten long after it would be refused as old."""
    path = tmp_path / "receiver.db"
    with Seen(path).taking("a", NOW) as new:
        assert new
    again = Seen(path)
    assert again.known("a")
    with again.taking("a", NOW + webhooks.WINDOW) as new:
        assert not new
    with again.taking("b", NOW + webhooks.KEPT + 1) as new:
        assert new
    assert not again.known("a")
    assert again.known("b")
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_an_id_is_not_taken_where_its_event_was_not(tmp_path: Path) -> None:
    """What fails on the way leaves nothing: the next try is the first one."""
    seen = Seen(tmp_path / "receiver.db")
    with pytest.raises(RuntimeError), seen.taking("a", NOW):
        raise RuntimeError
    assert not seen.known("a")
    with seen.taking("a", NOW) as new:
        assert new


def test_one_of_many_at_once_takes_an_id(tmp_path: Path) -> None:
    """Eight threads, each with the file of its own, as eight processes would have it."""
    path, start = tmp_path / "receiver.db", threading.Barrier(8)

    def take(_: int) -> bool:
        seen = Seen(path)
        start.wait()
        with seen.taking("a", NOW) as new:
            return new

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(take, range(8))) == [False] * 7 + [True]


# --- the receiver


class Prefect:
    """Where events go: counts them, and is away when told so."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.away = False
        prefect = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/api/events" and not prefect.away:
                    prefect.events += given
                self.send_response(503 if prefect.away else 204)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def prefect() -> Iterator[Prefect]:
    one = Prefect()
    yield one
    one.server.shutdown()
    one.server.server_close()


class World:
    """A receiver that is asked through its application."""

    def __init__(self, home: Path, prefect: Prefect) -> None:
        self.settings = Settings(home=home, prefect_api_url=prefect.url)
        self.prefect, self.now = prefect, NOW
        (home / "webhook.secret").write_text(SECRET + "\n")
        policy(self.settings.policy_folder, "alias")
        self.restart()

    def restart(self) -> None:
        self.app = receiver.application(self.settings, lambda: self.now)

    def ask(self, *requests: tuple[bytes, dict[str, str]]) -> list[httpx.Response]:
        """Post all of these at once."""

        async def post() -> list[httpx.Response]:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://r") as client:
                return await asyncio.gather(
                    *(client.post("/mlflow", content=content, headers=headers) for content, headers in requests)
                )

        return asyncio.run(post())

    def post(self, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.ask((content, signed(content, self.now) if headers is None else headers))[0]

    def health(self) -> dict[str, Any]:
        async def get() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://r") as client:
                return await client.get("/health")

        found = asyncio.run(get()).json()
        found.pop("since")
        return found


@pytest.fixture
def world(tmp_path: Path, prefect: Prefect) -> World:
    return World(tmp_path, prefect)


def test_a_good_delivery_becomes_an_event(world: World) -> None:
    """Prefect gets model, version and delivery; the event's id follows from the delivery's."""
    content = body(*ALIAS)
    headers = signed(content)
    name = headers["X-MLflow-Delivery-Id"]
    answer = world.post(content, headers)
    assert (answer.status_code, answer.json()) == (200, {"delivery": name, "done": "event"})
    (event,) = world.prefect.events
    assert event["event"] == "titleshot.challenger"
    assert event["resource"]["prefect.resource.id"] == "titleshot.model.m"
    assert event["payload"] == {"model": "m", "version": "7", "delivery": name}
    assert event["id"] == str(uuid.uuid5(webhooks._EVENT_IDS, name))
    assert world.health() == {"taken": 1, "known": 0, "nothing": 0, "refused": {}, "again": {}}


def test_the_same_delivery_again(world: World) -> None:
    """Answered well and nothing is done, also by the receiver's next process; beyond the window it is refused."""
    content = body(*ALIAS)
    headers = signed(content)
    world.post(content, headers)
    for _ in range(2):
        answer = world.post(content, headers)
        assert (answer.status_code, answer.json()["why"]) == (200, "known already")
        world.restart()
    assert len(world.prefect.events) == 1
    for later in (webhooks.WINDOW + 1, webhooks.KEPT + 1):
        world.now = NOW + later
        assert world.post(content, headers).status_code == 403
    assert len(world.prefect.events) == 1
    assert world.health()["refused"] == {"too old": 2}


def test_the_same_delivery_eight_times_at_once(world: World) -> None:
    """One event."""
    content = body(*ALIAS)
    answers = world.ask(*[(content, signed(content, identifier="one"))] * 8)
    assert [one.status_code for one in answers] == [200] * 8
    assert sorted(one.json()["done"] for one in answers) == ["event"] + ["nothing"] * 7
    assert len(world.prefect.events) == 1


def test_an_event_that_does_not_matter(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Answered well, with the reason, and counted, but not logged: there are many; it is known from then on."""
    caplog.set_level(logging.INFO)
    content = body(ALIAS[0], {**ALIAS[1], "alias": "champion"})
    headers = signed(content)
    answer = world.post(content, headers)
    assert (answer.status_code, answer.json()["why"]) == (
        200,
        "model_version_alias.created 'champion' starts no promotion",
    )
    assert world.post(content, headers).json()["why"] == "known already"
    assert world.prefect.events == []
    assert world.health() == {"taken": 0, "known": 1, "nothing": 1, "refused": {}, "again": {}}
    assert [one for one in caplog.records if one.name == "titleshot.receiver"] == []


@pytest.mark.parametrize("how", ["refuses", "gone"])
def test_prefect_away(world: World, how: str) -> None:
    """MLflow is asked to try again, after a while; the id is not taken, and the next try makes the event."""
    content = body(*ALIAS)
    headers = signed(content)
    if how == "gone":
        there, world.settings.prefect_api_url = world.settings.prefect_api_url, "http://127.0.0.1:9/api"
    world.prefect.away = how == "refuses"
    answer = world.post(content, headers)
    assert (answer.status_code, answer.json()) == (503, {"again": "Prefect away"})
    assert answer.headers["Retry-After"] == str(receiver.RETRY_AFTER)
    assert world.health()["again"] == {"Prefect away": 1}
    world.prefect.away = False
    if how == "gone":
        world.settings.prefect_api_url = there
    assert world.post(content, headers).json()["done"] == "event"
    assert world.post(content, headers).json()["why"] == "known already"
    assert len(world.prefect.events) == 1


def test_a_policy_that_cannot_be_used(world: World) -> None:
    """Nothing is done and nothing is forgotten: it is tried again, and once the policy is mended it is taken."""
    policy(world.settings.policy_folder, "nonsense")
    content = body(*ALIAS)
    headers = signed(content)
    assert world.post(content, headers).status_code == 503
    policy(world.settings.policy_folder, "alias")
    assert world.post(content, headers).json()["done"] == "event"


def test_ids_that_cannot_be_kept(world: World) -> None:
    """Where the file is broken no event is made: it would be made twice."""
    (world.settings.home / "receiver.db").write_bytes(b"nonsense" * 1000)
    assert world.post(body(*ALIAS)).json() == {"again": "ids not kept"}
    assert world.prefect.events == []


def test_refusals_are_counted_and_logged_without_what_was_sent(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One line each, with the reason; neither bodies nor secrets nor signatures, of good deliveries neither."""
    caplog.set_level(logging.INFO)
    content = body(VERSION[0], {**VERSION[1], "tags": {"k": "PRIVATE"}})
    forged = signed(content, secret="GUESS")
    answers = [
        world.post(content, forged),
        world.post(content, {}),
        world.post(content, signed(content, NOW - 1000)),
        world.post(content, signed(content, NOW + 1000)),
        world.post(b"PRIVATE"),
        world.post(content),
    ]
    assert [one.status_code for one in answers] == [401, 401, 403, 403, 400, 200]
    reasons = ["wrong signature", "not signed", "too old", "from the future", "not JSON"]
    assert world.health()["refused"] == dict.fromkeys(reasons, 1)
    assert [one.json().get("refused") for one in answers] == [*reasons, None]
    lines = [one.getMessage() for one in caplog.records if one.name == "titleshot.receiver"]
    assert lines[:-1] == [f"refused: {why}" for why in reasons]
    for hidden in ("PRIVATE", SECRET, forged["X-MLflow-Signature"][3:]):
        assert hidden not in caplog.text
        assert all(hidden not in one.text for one in answers)
    assert world.prefect.events == []


def test_an_oversized_delivery_is_not_read_to_its_end(world: World) -> None:
    """Whoever sends without end is cut off."""
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 100 * webhooks.LIMIT:
            sent += 1 << 16
            yield bytes(1 << 16)

    async def read() -> None:
        parts = endless()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": await anext(parts), "more_body": True}

        from starlette.requests import Request

        with pytest.raises(Refused, match="too large"):
            await receiver._body(Request({"type": "http", "method": "POST", "headers": []}, receive))

    asyncio.run(read())
    assert sent <= webhooks.LIMIT + (1 << 17)


def test_only_what_is_there_is_served(world: World) -> None:
    """Posts to /mlflow and gets of /health; nothing else."""

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(world.app), base_url="http://r") as client:
            asked = [("GET", "/mlflow"), ("POST", "/health"), ("POST", "/"), ("GET", "/docs"), ("PUT", "/mlflow")]
            return [(await client.request(*one)).status_code for one in asked]

    assert asyncio.run(ask()) == [405, 405, 404, 404, 405]


def test_a_receiver_that_is_killed_in_a_storm(
    tmp_path: Path, prefect: Prefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process of its own, killed -9 in the midst of copies and forgeries: each delivery becomes one event (said
    twice at most, where death came between the event and its note), and every forgery is refused."""
    monkeypatch.setenv("TITLESHOT_HOME", str(tmp_path))
    monkeypatch.setenv("TITLESHOT_PREFECT_API_URL", prefect.url)
    settings, chance = Settings(home=tmp_path), random.Random(3)
    secret, port = webhooks.secret(settings), free_port()
    policy(settings.policy_folder, "alias")
    settings.stack_file.write_text(json.dumps({"receiver_port": port}))

    def up() -> bool:
        try:
            return "taken" in webhooks.counts(settings)
        except Mistake:
            return False

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tasks.receiver", str(port)]
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(up, 30, "the receiver does not start")
        return process

    kept = []
    for number in range(10, 30):
        content = body(ALIAS[0], {**ALIAS[1], "version": str(number)})
        kept.append(deliveries.Sent(signed(content, time.time(), secret), content))
    process = start()
    with ThreadPoolExecutor(1) as thread:
        posts = deliveries.storm(kept, 90, secret, chance)
        answers = thread.submit(deliveries.deliver, f"{webhooks.address(settings)}/mlflow", posts, 2, chance, 60)
        wait_for(lambda: len(prefect.events) > 5, 30, "nothing arrives")
        process.kill()
        process.wait()
        process = start()
        assert deliveries.refused_forgeries(answers.result()).total() == 30
    process.terminate()
    process.wait()
    assert {status for sent, status in answers.result() if sent.kind == "genuine"} == {200}
    assert {event["payload"]["delivery"] for event in prefect.events} == {sent.id for sent in kept}
    assert len({event["id"] for event in prefect.events}) == len(kept)
    assert secret not in (tmp_path / "log").read_text()


# --- secrets and set-up


def test_secrets_are_made_once_and_for_the_owner_only(tmp_path: Path) -> None:
    """Many processes that start at once come to the same ones; MLflow's key is one that its library takes."""
    from cryptography.fernet import Fernet

    settings = Settings(home=tmp_path)
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: webhooks.secret(settings), range(8)))) == 1
    key = webhooks.encryption_key(settings)
    assert key == webhooks.encryption_key(settings)
    assert Fernet(key).decrypt(Fernet(key).encrypt(b"x")) == b"x"
    assert len(webhooks.secret(settings)) >= 32
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["mlflow.key", "webhook.secret"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)


def test_another_secret_counts_at_once(world: World) -> None:
    """The file is the secret: who replaces it needs no restart. Without one nothing is believed, an empty one least."""
    content = body(*ALIAS)
    (world.settings.home / "webhook.secret").write_text("another\n")
    assert world.post(content).status_code == 401
    assert world.post(content, signed(content, secret="another")).status_code == 200
    (world.settings.home / "webhook.secret").write_text("\n")
    assert world.post(content, signed(content, secret="")).json() == {"again": "no secret"}


@pytest.mark.parametrize(
    ("url", "becomes"),
    [
        ("https://t.example.com", "https://t.example.com/mlflow"),
        ("http://10.0.0.3:8080/", "http://10.0.0.3:8080/mlflow"),
        ("https://t.example.com/hooks/a", "https://t.example.com/hooks/a"),
    ],
)
def test_a_url_without_a_path_gets_ours(url: str, becomes: str) -> None:
    assert webhooks._checked(url) == becomes


@pytest.mark.parametrize("url", ["t.example.com", "ftp://t.example.com", "http://", ""])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(Mistake, match="say it like"):
        webhooks._checked(url)


@pytest.mark.parametrize(
    ("mlflow_says", "url", "named"),
    [
        (
            "Invalid webhook URL scheme: 'http'. Allowed schemes are: https.",
            "http://127.0.0.1:1/mlflow",
            ["that server", "MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true"],
        ),
        (
            "Webhook URL must not resolve to a non-public IP",
            "https://10.0.0.3/mlflow",
            ["that server", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true"],
        ),
        ("too many 500 error responses", "http://x/mlflow", ["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", "tables"]),
        ("http://x:5000 says something else", "http://x/mlflow", ["does not do as asked", "something else"]),
    ],
)
def test_what_a_server_lacks_is_named(mlflow_says: str, url: str, named: list[str]) -> None:
    """One line, with the settings of MLflow's server that are missing."""
    message = str(webhooks._refusal(Settings(mlflow_uri="http://mlflow.example"), url, mlflow_says))
    assert all(one in message for one in named), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("status", "answer", "error", "named"),
    [
        (None, None, "ConnectionError([Errno 111] Connection refused')", "[Errno 111] Connection refused; name where"),
        (403, '{"refused":"too old"}', None, "clocks"),
        (401, '{"refused":"wrong signature"}', None, "another secret"),
        (502, "<html>\nproxy</html>", None, "HTTP 502; name where"),
        (503, '{"again":"ids not kept"}', None, 'HTTP 503 {"again": "ids not kept"}; name where'),
        (200, "hello", None, "something else"),
        (200, '{"delivery":"of another home"}', None, "something else"),
        (200, '{"delivery":"d-1"}', None, ""),
    ],
)
def test_what_keeps_a_delivery_away_is_named(
    world: World, status: int | None, answer: str | None, error: str | None, named: str
) -> None:
    """One line, with its mend; nothing where the delivery is one that the receiver of this home knows."""
    world.settings.stack_file.write_text('{"receiver_port": 9}')
    world.post(body(*ALIAS), signed(body(*ALIAS), identifier="d-1"))
    tested = SimpleNamespace(response_status=status, response_body=answer, error_message=error)
    message = webhooks._trouble(world.settings, tested)
    assert named in message
    assert bool(named) == bool(message)
    assert "\n" not in message


def test_without_a_receiver(tmp_path: Path) -> None:
    """Who asks for it is told to start it, in one line; at once, not after retries."""
    settings = Settings(home=tmp_path)
    with pytest.raises(Mistake, match="titleshot up"):
        webhooks.counts(settings)
    settings.stack_file.write_text('{"receiver_port": 9}')
    with pytest.raises(Mistake, match=r"does not answer at http://127.0.0.1:9"):
        webhooks.counts(settings)

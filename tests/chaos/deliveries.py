"""Deliveries as a bad network and a bad neighbour would have them: kept, dropped, doubled, shuffled, delayed, forged."""

import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from deployments.local.supervisor import wait_for
from tests.chaos.models import make_model

BAIT = "3"
"""The version that forgeries ask for; nobody else does."""
FORGERIES = ("altered", "guessed", "unsigned", "renamed", "postponed", "old", "early")
REFUSED = {401, 403}
CLIENT = httpx.Client(timeout=30, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass(frozen=True)
class Sent:
    """A delivery as it is to reach the receiver."""

    headers: dict[str, str]
    body: bytes
    kind: str = "genuine"

    @property
    def id(self) -> str:
        return self.headers["X-MLflow-Delivery-Id"]

    @property
    def about(self) -> tuple[str, str]:
        data = json.loads(self.body)["data"]
        return data["name"], data["version"]

    @property
    def event(self) -> str:
        read = json.loads(self.body)
        return f"{read['entity']}.{read['action']}"


class Between:
    """Stands between MLflow and the receiver. What comes is passed on, or kept; MLflow hears that all is well."""

    def __init__(self, receiver: str) -> None:
        self.kept: list[Sent] = []
        self.passing = True
        between = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                names = [name for name in self.headers if name.startswith("X-MLflow")]
                sent = Sent({name: self.headers[name] for name in names}, body)
                if between.passing:
                    status, answer = _post(receiver, sent)
                else:
                    between.kept.append(sent)
                    status, answer = 200, b"{}"
                self.send_response(status or 503)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/mlflow"

    def keep(self, client: Any, model: str) -> None:
        """Keep what comes from now on; returns when MLflow's cache of its webhooks knows this one."""
        self.passing = False
        number = 0

        def told() -> bool:
            nonlocal number
            number += 1
            client.set_model_version_tag(model, BAIT, "probe", str(number))
            time.sleep(0.1)
            return bool(self.kept)

        wait_for(told, 30, "MLflow delivers nothing", every=0.5)
        time.sleep(0.5)
        self.kept.clear()

    def genuine(self, expected: int) -> list[Sent]:
        """What was kept of events that matter, once there are so many."""

        def matter() -> list[Sent]:
            return [sent for sent in list(self.kept) if b'"probe"' not in sent.body]

        wait_for(lambda: len(matter()) >= expected, 30, f"MLflow has not delivered {expected} events")
        assert len(matter()) == expected, [sent.body for sent in matter()]
        return matter()


@contextmanager
def between(receiver: str) -> Iterator[Between]:
    """A `Between` that serves for as long as the context lasts."""
    one = Between(receiver)
    threading.Thread(target=one.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield one
    finally:
        one.server.shutdown()
        one.server.server_close()


def _post(receiver: str, sent: Sent) -> tuple[int, bytes]:
    """The receiver's answer; 0 where there is none."""
    try:
        answer = CLIENT.post(receiver, content=sent.body, headers=sent.headers)
    except httpx.HTTPError:
        return 0, b""
    return answer.status_code, answer.content


def forge(sent: Sent, kind: str, secret: str) -> Sent:
    """A delivery that must not be believed; it asks for the bait where it says anything new."""
    from tasks.webhooks import sign

    headers, body, now = dict(sent.headers), sent.body, int(time.time())
    read = json.loads(body)
    read["data"]["version"] = BAIT
    bait = json.dumps(read).encode()

    def signed(with_secret: str, at: int) -> dict[str, str]:
        name = str(uuid.uuid4())
        signature = sign(with_secret, name, str(at), bait)
        return {"X-MLflow-Delivery-Id": name, "X-MLflow-Timestamp": str(at), "X-MLflow-Signature": signature}

    match kind:
        case "altered":
            body = bait
        case "guessed":
            headers, body = signed("a guess", now), bait
        case "unsigned":
            body = bait
            del headers["X-MLflow-Signature"]
        case "renamed":
            headers["X-MLflow-Delivery-Id"] = str(uuid.uuid4())
        case "postponed":
            headers["X-MLflow-Timestamp"] = str(int(headers["X-MLflow-Timestamp"]) + 200)
        case "old":  # as one that was heard long ago, and is said again
            headers, body = signed(secret, now - 3600), bait
        case "early":
            headers, body = signed(secret, now + 3600), bait
    return Sent(headers, body, kind)


def storm(kept: Sequence[Sent], total: int, secret: str, chance: random.Random) -> list[Sent]:
    """So many deliveries in no order: each of those that were kept, copies of them, and a third of forgeries."""
    forged = [forge(chance.choice(kept), FORGERIES[number % len(FORGERIES)], secret) for number in range(total // 3)]
    doubled = [chance.choice(kept) for _ in range(total - len(forged) - len(kept))]
    whole = [*kept, *doubled, *forged]
    chance.shuffle(whole)
    return whole


def deliver(
    receiver: str, sent: Sequence[Sent], seconds: float, chance: random.Random, patience: float
) -> list[tuple[Sent, int]]:
    """Post all of these within so many seconds, at random times, many at once; the last answer to each. One that finds
    nobody is tried again for as long as `patience`, as MLflow does; a forgery until it is answered.
    """
    began = time.monotonic()
    times = sorted(chance.uniform(0, seconds) for _ in sent)

    def one(pair: tuple[float, Sent]) -> tuple[Sent, int]:
        at, what = pair
        time.sleep(max(0.0, began + at - time.monotonic()))
        give_up = time.monotonic() + (patience if what.kind == "genuine" else 300)
        while True:
            status, _ = _post(receiver, what)
            if status not in (0, 503) or time.monotonic() > give_up:
                return what, status
            time.sleep(1)

    with ThreadPoolExecutor(32) as threads:
        return list(threads.map(one, zip(times, sent, strict=True)))


def refused_forgeries(answers: Sequence[tuple[Sent, int]]) -> Counter[str]:
    """How many forgeries of each kind there were; every one was refused, and no genuine one was."""
    wrong = [(sent.kind, status) for sent, status in answers if (status in REFUSED) != (sent.kind != "genuine")]
    assert wrong == []
    return Counter(sent.kind for sent, _ in answers if sent.kind != "genuine")


# --- the stack


def register(client: Any, folder: Path, model: str) -> None:
    """A model with three versions, of which nobody has asked for any; the last one is the bait."""
    client.create_registered_model(model)
    for number in range(1, int(BAIT) + 1):
        run = client.create_run("0")
        client.log_artifacts(run.info.run_id, str(make_model(folder / model / str(number), str(number))), "m")
        client.create_model_version(model, f"{run.info.artifact_uri}/m", run.info.run_id)


def policy(folder: Path, model: str, trigger: str) -> Path:
    """A policy that lets everything pass."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model}.yaml"
    gate = {"kind": "hook", "command": ["true"]}
    path.write_text(json.dumps({"version": 1, "model": model, "trigger": trigger, "gates": [gate]}))
    return path


def restart(target: Any, name: str, answers: Callable[[], bool]) -> None:
    """Stop a program of the stack and start it; returns when it answers."""
    with target.supervisor._rpc() as rpc:
        rpc.stopProcess(name)
        rpc.startProcess(name, False)
    wait_for(answers, 180, f"{name} does not come back", every=0.2)


def restarts(settings: Any, target: Any) -> dict[str, Callable[[], None]]:
    """How to restart MLflow's server, Prefect's, and the receiver."""
    from tasks import webhooks

    addresses = {"mlflow": settings.mlflow, "prefect": settings.prefect, "receiver": webhooks.address(settings)}
    return {
        name: lambda name=name, address=address: restart(target, name, lambda: settings.answers(address))  # type: ignore[misc]
        for name, address in addresses.items()
    }


def under_way(settings: Any) -> list[str]:
    """The promotion's flow runs that have not ended, by name and state."""
    body = {
        "flows": {"name": {"any_": ["promote"]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]}}},
    }
    answer = httpx.post(f"{settings.prefect}/flow_runs/filter", json=body, timeout=20).raise_for_status()
    return [f"{run['name']} {run['state_name']}" for run in answer.json()]


def runs(settings: Any) -> Counter[tuple[str, str]]:
    """How many flow runs of the promotion there were for each challenger."""
    body = {"flows": {"name": {"any_": ["promote"]}}, "limit": 200}
    answer = httpx.post(f"{settings.prefect}/flow_runs/filter", json=body, timeout=20).raise_for_status()
    return Counter((run["parameters"].get("model"), str(run["parameters"].get("version"))) for run in answer.json())


def unwell(settings: Any, models: Sequence[str]) -> list[str]:
    """The promotion's flow runs of these models that did not complete: name, state and message."""
    body = {"flows": {"name": {"any_": ["promote"]}}, "limit": 200}
    answer = httpx.post(f"{settings.prefect}/flow_runs/filter", json=body, timeout=20).raise_for_status()
    return [
        f"{run['name']} {run['state_name']}: {run['state']['message']}"
        for run in answer.json()
        if run["parameters"].get("model") in models and run["state_type"] != "COMPLETED"
    ]


def promotions(models: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """The phases of all promotions in the history, by challenger."""
    from tasks import history

    found: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for entry in history.entries(model):
            if entry.kind == "promotion":
                found.setdefault((model, entry.challenger), []).append(entry.phase)
    return found


def settled(
    settings: Any, challengers: Sequence[tuple[str, str]], timeout: float, poll: Callable[[], object] = lambda: None
) -> dict[tuple[str, str], list[str]]:
    """Wait until each challenger was handled and nothing is under way; all promotions of their models, as phases."""
    models = sorted({model for model, _ in challengers})
    said = ""

    def there() -> bool:
        nonlocal said
        poll()
        found = promotions(models)
        missing = [one for one in challengers if not found.get(one) or "running" in found[one]]
        busy = under_way(settings)
        said = f"missing: {missing}; under way: {busy}"
        return not missing and not busy

    try:
        wait_for(there, timeout, "not everything was handled", every=1)
    except Exception as error:
        raise AssertionError(f"{error}: {said}") from error
    return promotions(models)


def ask(client: Any, model: str, version: str, trigger: str) -> None:
    """Do in the registry what the policy waits for."""
    if trigger == "alias":
        client.set_registered_model_alias(model, "challenger", version)
    else:
        client.set_model_version_tag(model, version, "titleshot.promote", "true")


def late(sent: Sequence[Sent], secret: str) -> list[Sent]:
    """The same as MLflow would have sent them, had it been slow: its clock stands in what it signs."""
    from tasks.webhooks import sign

    now = str(int(time.time()))
    return [
        replace(
            one,
            headers={
                **one.headers,
                "X-MLflow-Timestamp": now,
                "X-MLflow-Signature": sign(secret, one.id, now, one.body),
            },
        )
        for one in sent
    ]


def run_more(settings: Any, challenger: tuple[str, str], than: int) -> None:
    """Wait until a challenger has had more flow runs of the promotion than that."""
    wait_for(lambda: runs(settings)[challenger] > than, 60, f"no further run for {challenger}", every=0.5)

"""Challengers that ask by webhook while deliveries are lost, doubled and forged, and every server restarts once."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.settings import Mistake
from tests.chaos import deliveries
from tests.flows.conftest import take_down

ASKS = {"asks-alias": "alias", "asks-tag": "tag", "asks-lost": "tag"}
"""Models and what their policy waits for; of the last one nothing arrives."""


@pytest.fixture
def models(settings: Any, stack: Any, tmp_path: Path) -> Iterator[list[str]]:
    from tasks import registry

    files = []
    for hook in registry.client().list_webhooks():  # another test's
        registry.client().delete_webhook(hook.webhook_id)
    for model, trigger in ASKS.items():
        deliveries.register(registry.client(), tmp_path, model)
        files.append(deliveries.policy(settings.policy_folder, model, trigger))
    yield list(ASKS)
    for hook in registry.client().list_webhooks():
        registry.client().delete_webhook(hook.webhook_id)
    for path in files:
        path.unlink()
    for model in ASKS:
        take_down(model)


@pytest.mark.long
def test_every_challenger_once_and_no_forged_one(settings: Any, stack: Any, worker: Any, models: list[str]) -> None:
    """60 deliveries for three challengers, a third of them forged, most of the others copies, while MLflow, Prefect and
    the receiver restart: each challenger has one promotion, also the one that only a look at the registry finds, and
    also when its delivery comes late. Every forgery is refused."""
    from tasks import registry, triggers, webhooks

    chance, client, secret = random.Random(5), registry.client(), webhooks.secret(settings)
    challengers = [(model, "1") for model in models]
    receiver = f"{webhooks.address(settings)}/mlflow"
    with deliveries.between(receiver) as between:
        assert webhooks.look(settings) is None
        for _ in range(2):  # the second time in the place of the first
            assert webhooks.install(settings, between.url).before is None
        with pytest.raises(Mistake, match=f"HTTP 404.*still points at {between.url}"):
            webhooks.install(settings, settings.mlflow)
        assert len(client.list_webhooks()) == 1
        between.keep(client, models[0])
        for model, trigger in ASKS.items():
            deliveries.ask(client, model, "1", trigger)
        deliveries.ask(client, "asks-alias", "1", "alias")  # the same once more is another delivery
        kept = between.genuine(4)
        between.passing = True
        lost = [sent for sent in kept if sent.about[0] == "asks-lost"]
        posts = deliveries.storm([sent for sent in kept if sent not in lost], 60, secret, chance)

        again = [threading.Thread(target=one) for one in deliveries.restarts(settings, stack).values()]
        for thread in again:
            thread.start()
        answers = deliveries.deliver(receiver, posts, 10, chance, patience=120)
        for thread in again:
            thread.join()
        assert deliveries.refused_forgeries(answers).total() == 20
        assert {status for sent, status in answers if sent.kind == "genuine"} == {200}

        known: set[tuple[str, ...]] = set()
        deliveries.settled(settings, challengers, 200, lambda: triggers.start(settings, stack, known))
        answers = deliveries.deliver(receiver, deliveries.late(lost, secret), 0, chance, patience=10)
        assert [status for _, status in answers] == [200]
        deliveries.run_more(settings, challengers[-1], 1)
        found = deliveries.settled(settings, challengers, 120)
    assert found == {one: ["promoted"] for one in challengers}
    assert deliveries.unwell(settings, models) == []  # who has nothing to do says so, and is no failure

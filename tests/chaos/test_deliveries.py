"""A thousand deliveries, of which some are lost, most doubled and many forged, while every server restarts again and
again.
"""

import itertools
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.local.supervisor import wait_for
from tests.chaos import deliveries
from tests.chaos.deliveries import BAIT

TOTAL, SECONDS = 1000, 200.0  # MLflow's signatures count for five minutes
ASKS = {f"{trigger}-{number}": trigger for trigger in ("tag", "alias") for number in range(1, 5)}


@pytest.fixture
def settings() -> Iterator[Any]:
    """A stack of its own, whose watch looks every five seconds."""
    from tasks import settings, stack

    home = Path(tempfile.mkdtemp(prefix="td.", dir="/tmp"))
    own = {"TITLESHOT_HOME": str(home), "TITLESHOT_WATCH_SECONDS": "5", "TITLESHOT_LEASE_SECONDS": "10"}
    names = [*own, "PREFECT_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI"]
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(own)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, home, ignore_errors=True)
        undo.callback(lambda: os.environ.update({name: old for name, old in before.items() if old is not None}))
        undo.callback(lambda: [os.environ.pop(name, None) for name in names])
        loaded = settings.load()
        target = stack.up(loaded, {}, lambda _: None)
        undo.callback(target.stop)
        loaded.connect()
        promote = f"{loaded.prefect}/deployments/name/promote/promote"
        wait_for(lambda: httpx.get(promote, timeout=10).is_success, 120, "the worker deploys nothing", every=0.5)
        yield loaded


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_thousand_deliveries(settings: Any, tmp_path: Path) -> None:
    """Twelve challengers of eight models, asked for two or three times each, and 1,000 deliveries within 200 seconds,
    in which MLflow, Prefect and the receiver restart twice or more (7 to 11 minutes on two cores). Each challenger has
    exactly one promotion in the history in the end, those of which nothing arrived included; the forgeries, one in
    three, are all refused and the version that they ask for is never looked at. Deliveries that come after all was
    done change nothing."""
    from tasks import registry, webhooks
    from tasks.targets import local_target

    began = time.monotonic()
    target, client, secret = local_target(settings), registry.client(), webhooks.secret(settings)
    chance = random.Random(7)
    for model, trigger in ASKS.items():
        deliveries.register(client, tmp_path, model)
        deliveries.policy(settings.policy_folder, model, trigger)
    challengers = [(model, "1") for model in ASKS] + [(m, "2") for m, trigger in ASKS.items() if trigger == "tag"]
    receiver = f"{webhooks.address(settings)}/mlflow"
    with deliveries.between(receiver) as between:
        webhooks.install(settings, between.url)
        between.keep(client, "tag-1")
        asked = [(model, version) for model, version in challengers for _ in range(chance.choice((2, 3)))]
        chance.shuffle(asked)
        for model, version in asked:
            deliveries.ask(client, model, version, ASKS[model])
        kept = between.genuine(len(asked))
        between.passing = True
        # Of two challengers nothing arrives, of the others most; an alias and a tag are among the lost.
        silent = {("tag-1", "2"), ("alias-1", "1")}
        lost = [sent for sent in kept if sent.about in silent or chance.random() < 0.2]
        posts = deliveries.storm([sent for sent in kept if sent not in lost], TOTAL, secret, chance)

        over = threading.Event()
        times: Counter[str] = Counter()

        def restart_again_and_again() -> None:
            ways = deliveries.restarts(settings, target)
            for name in itertools.cycle(("prefect", "receiver", "mlflow")):
                if over.wait(8):
                    return
                ways[name]()
                times[name] += 1

        restarting = threading.Thread(target=restart_again_and_again)
        restarting.start()
        try:
            answers = deliveries.deliver(receiver, posts, SECONDS, chance, patience=7)
        finally:
            over.set()
            restarting.join()
        forged = deliveries.refused_forgeries(answers)
        assert len(answers) == TOTAL
        assert forged.total() == TOTAL // 3
        assert set(forged) == set(deliveries.FORGERIES)
        assert min(times[name] for name in ("prefect", "receiver", "mlflow")) >= 2, times

        deliveries.settled(settings, challengers, 1800)
        belated = deliveries.deliver(receiver, deliveries.late(lost, secret), 10, chance, patience=60)
        assert {status for _, status in belated} <= {200}
        deliveries.run_more(settings, ("tag-1", "2"), 1)
        found = deliveries.settled(settings, challengers, 600)
    assert set(found) == set(challengers)
    assert {one: len(phases) for one, phases in found.items()} == dict.fromkeys(challengers, 1), found
    runs = deliveries.runs(settings)
    assert not [one for one in runs if one[1] == BAIT]
    # It was put to the test: most challengers were asked for more than once.
    assert sum(runs.values()) > len(challengers) + 4, runs
    print(f"restarts: {dict(times)}; forgeries: {dict(forged)}; phases: {Counter(p[0] for p in found.values())}")
    unwell = deliveries.unwell(settings, list(ASKS))
    print(f"flow runs: {sum(runs.values())} for {len(challengers)} challengers, of which ended badly: {unwell}")
    print(f"answers: {Counter((one.kind == 'genuine', status) for one, status in answers)}")
    print(f"took {time.monotonic() - began:.0f} s")

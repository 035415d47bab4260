"""The only place that talks to an API server: what it makes of answers, silence and watches that end."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.kubernetes.client import Client, Conflict, Forbidden
from deployments.kubernetes.cluster import Cluster, Gateway, Json
from deployments.target import TargetError, TargetUnavailable
from tests.cluster.apiserver import ApiServer

LABELS = {"titleshot.io/model": "m"}


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


def client(api: ApiServer, tmp_path: Path, *, token: str | None = None, **settings: object) -> Client:
    file = api.kubeconfig(tmp_path / f"config-{len(list(tmp_path.iterdir()))}", token=token)
    given = {"gateway": Gateway(name="edge", url="http://127.0.0.1:1"), "patience": 5, **settings}
    return Client(Cluster(kubeconfig=file, **given))


def config(name: str = "one", **data: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": LABELS},
        "data": data,
    }


def test_what_is_created_is_read_replaced_and_deleted(api: ApiServer, tmp_path: Path) -> None:
    """An object goes there and back; what is not there is None, and deleting it again is no error."""
    one = client(api, tmp_path)
    assert one.get("ConfigMap", "one") is None
    made = one.create(config(a="1"))
    assert one.get("ConfigMap", "one") == made
    assert one.items("ConfigMap", LABELS) == [made]
    assert one.items("ConfigMap", {"titleshot.io/model": "other"}) == []
    assert one.replace({**made, "data": {"a": "2"}})["data"] == {"a": "2"}
    one.delete("ConfigMap", "one")
    one.delete("ConfigMap", "one")
    assert one.get("ConfigMap", "one") is None


def test_what_owns_nothing_is_gone_at_once(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the garbage collector has not heard of its kind yet; what owns pods waits for it."""
    monkeypatch.setattr(api.store, "collect", lambda: None)
    one = client(api, tmp_path)
    gateway = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r"}, "spec": {}}
    pod = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    spec = {"selector": {"matchLabels": {"a": "b"}}, "template": pod}
    for obj in (gateway, {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec}):
        one.create(obj)
        one.delete(obj["kind"], obj["metadata"]["name"])
    assert one.get("HTTPRoute", "r") is None
    left = one.get("Deployment", "d")
    assert left is not None
    assert left["metadata"]["finalizers"] == ["foregroundDeletion"]


def test_what_changed_since_it_was_read_is_a_conflict(api: ApiServer, tmp_path: Path) -> None:
    """Create, replace, apply and delete are all compare-and-set where they are given something to compare."""
    one = client(api, tmp_path)
    made = one.create(config())
    with pytest.raises(Conflict):
        one.create(config())
    now = one.replace({**made, "data": {"a": "1"}})
    with pytest.raises(Conflict):
        one.replace({**made, "data": {"a": "2"}})
    with pytest.raises(Conflict):
        one.apply({**config(a="3"), "metadata": {**config()["metadata"], "resourceVersion": "1"}})
    with pytest.raises(Conflict):
        one.delete("ConfigMap", "one", uid="another")
    with pytest.raises(Conflict):
        one.delete("ConfigMap", "one", version="1")
    assert one.get("ConfigMap", "one") == now
    one.delete("ConfigMap", "one", uid=now["metadata"]["uid"], version=now["metadata"]["resourceVersion"])
    with pytest.raises(Conflict):
        one.replace(now)


def test_a_dry_run_changes_nothing_and_an_unknown_field_is_refused(api: ApiServer, tmp_path: Path) -> None:
    """The API server's own words come back for what it refuses."""
    one = client(api, tmp_path)
    assert one.apply(config(a="1"), dry_run=True)["data"] == {"a": "1"}
    assert one.get("ConfigMap", "one") is None
    with pytest.raises(TargetError, match="dota"):
        one.apply({**config(), "dota": {}})
    with pytest.raises(TargetError, match="kind Frobnicator"):
        one.apply({"apiVersion": "v1", "kind": "Frobnicator", "metadata": {"name": "x"}})


def test_a_busy_or_absent_server_is_asked_again(api: ApiServer, tmp_path: Path) -> None:
    """429, 500, a cut connection, a server that is gone for a moment: none of them is seen."""
    one = client(api, tmp_path)
    made = one.create(config())
    for code in (429, 500, 503):
        api.faults.answer(code, 2, retry_after=0)
        assert one.get("ConfigMap", "one") == made
    api.faults.close(2)
    assert one.get("ConfigMap", "one") == made
    found: list[Json | None] = []
    with api.away():
        asking = threading.Thread(target=lambda: found.append(one.get("ConfigMap", "one")))
        asking.start()
        asking.join(0.3)
        assert asking.is_alive()
    asking.join(5)
    assert found == [made]


def test_patience_ends(api: ApiServer, tmp_path: Path) -> None:
    """A server that stays away is worth another try later, and the error says who is away."""
    one = client(api, tmp_path, patience=0.3, name="prod")
    api.faults.answer(503, None)
    with pytest.raises(TargetUnavailable, match=r"cluster prod .*get configmaps one.*503"):
        one.get("ConfigMap", "one")
    api.faults.clear()
    with api.away(), pytest.raises(TargetUnavailable, match="does not answer"):
        one.get("ConfigMap", "one")
    assert not Client(Cluster(kubeconfig=one.cluster.kubeconfig, context="none", gateway=one.cluster.gateway)).up()
    assert one.up()


def test_a_right_that_is_missing_is_named(api: ApiServer, tmp_path: Path) -> None:
    """Who may not do what, where: no second try, no traceback to guess from."""
    one = client(api, tmp_path, token=api.token("ann"))
    with pytest.raises(Forbidden, match=r"ann may not create configmaps in namespace default.*verb on configmaps"):
        one.create(config())
    with pytest.raises(TargetError, match="does not know us"):
        client(api, tmp_path, token="of-nobody").items("Pod", {})


def test_a_context_that_is_not_there_is_named(api: ApiServer, tmp_path: Path) -> None:
    """A wrong setting is one line."""
    with pytest.raises(TargetError, match="elsewhere"):
        client(api, tmp_path, context="elsewhere").get("Pod", "x")
    with pytest.raises(TargetError, match="cluster default"):
        Client(Cluster(kubeconfig=tmp_path / "no", gateway=Gateway(name="e", url="http://127.0.0.1:1"))).get("Pod", "x")


def test_a_watch_tells_what_happens_whatever_happens_to_it(api: ApiServer, tmp_path: Path) -> None:
    """Closed watches and forgotten versions lose nothing: what was deleted meanwhile is told, too."""
    one = client(api, tmp_path)
    one.create(config("a"))
    events = ((e["type"], e["object"]["metadata"]["name"]) for e in one.watch("ConfigMap", LABELS, 30))

    def until(event: tuple[str, str]) -> None:
        assert event in events

    until(("ADDED", "a"))
    one.create(config("b"))
    until(("ADDED", "b"))
    api.close_watches()
    one.delete("ConfigMap", "a")
    until(("DELETED", "a"))
    with api.away():
        pass
    one.create(config("c"))
    until(("ADDED", "c"))
    one.delete("ConfigMap", "b")
    api.compact()
    api.faults.answer(410, 1, verb="watch")
    api.close_watches()
    until(("DELETED", "b"))
    one.create(config("d"))
    until(("ADDED", "d"))


def test_a_watch_ticks_and_ends(api: ApiServer, tmp_path: Path) -> None:
    """Who waits for something else meanwhile is woken, and a watch does not outlive its time by much."""
    one = client(api, tmp_path)
    began = time.monotonic()
    assert [event["type"] for event in one.watch("ConfigMap", LABELS, 1.5, tick=1.0)] == ["TICK", "TICK"]
    assert time.monotonic() - began < 10


def test_the_clock_is_the_servers(api: ApiServer, tmp_path: Path) -> None:
    """Leases are reckoned by one clock, whoever asks."""
    one = client(api, tmp_path)
    assert abs(one.now() - time.time()) < 3
    assert one.now() <= one.now()


def test_what_the_cluster_does_not_know_is_said(api: ApiServer, tmp_path: Path) -> None:
    """A kind without a definition is an error that says so, not an empty list."""
    one = client(api, tmp_path)
    assert one.knows("Deployment")
    api.faults.answer(404, None, path="gateway.networking.k8s.io")
    assert not one.knows("HTTPRoute")

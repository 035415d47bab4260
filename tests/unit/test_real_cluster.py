"""The way to a real cluster (`make test-cluster`), tried on the tests' own cluster in its place: what it makes, and takes away again."""

from pathlib import Path

import pytest

from deployments.target import Traffic
from tests.cluster import real
from tests.cluster.gateway import GROUP
from tests.cluster.node import LocalCluster, until
from tests.cluster.rest import Api
from tests.cluster.schema import CRDS
from tests.cluster.world import KubernetesWorld
from tests.contract.clients import GOOD, MODEL, make_models

pytestmark = pytest.mark.skipif(not CRDS.is_dir(), reason=f"no definitions of the Gateway API in {CRDS}")
CONTEXT = "TITLESHOT_TEST_CONTEXT"


@pytest.fixture(scope="module")
def cluster():
    """A cluster that knows nothing of the Gateway API."""
    with LocalCluster(gateway=False) as own:
        resources = own.server.store.resources
        for kind in [kind for kind in resources if kind[0] == GROUP]:
            del resources[kind]
        yield own


@pytest.fixture
def there(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalCluster:
    """The cluster as the environment names it: not by the current context of the first file, with a plain image."""
    text = cluster.kubeconfig.read_text().replace("current-context: test", "current-context: none")
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{tmp_path / 'config'}")
    monkeypatch.setenv(CONTEXT, "test")
    monkeypatch.setenv("TITLESHOT_TEST_PLAIN", "1")
    monkeypatch.setenv("TITLESHOT_TEST_PYTHON", "python")
    monkeypatch.setenv("TITLESHOT_TEST_IMAGE", "titleshot:test")
    for name in ("CRDS", "GATEWAY", "HOST", "PULL_POLICY", "REACH"):
        monkeypatch.delenv(f"TITLESHOT_TEST_{name}", raising=False)
    monkeypatch.setattr(real, "_tried", [])
    monkeypatch.setattr(real, "GRACE", 0.3)
    return cluster


def left(api: Api) -> list[str]:
    """What of the tests is still in the cluster: namespaces, and the Gateway API itself."""
    names = [one["metadata"]["name"] for one in api.items("Namespace")]
    groups = [one["name"] for one in api.request("GET", "/apis")["groups"]]
    return [one for one in (*names, *groups) if one == GROUP or one.startswith("titleshot-test-")]


def test_what_is_made_on_a_real_cluster_goes_again_and_can_be_made_anew(there: LocalCluster, tmp_path: Path) -> None:
    """A version is deployed and routed in a part of it; another part right after that one does not stumble over what is
    still going."""
    models = make_models(tmp_path / "models")
    assert real.reason_to_skip() == ""
    with real.RealCluster():
        assert GROUP in left(there.api)
    with real.RealCluster() as part:
        settings = part.settings({"1": models / GOOD})
        assert (settings.context, settings.reach) == ("test", "proxy")
        world = KubernetesWorld(models, settings, part=part)
        fence = world.target.lease(MODEL, "me")
        world.target.deploy(world.version("1"), fence)
        world.target.route(Traffic(MODEL, "1"), fence)
        assert {reply.version for reply in world.send(3)} == {"1"}
        said = part.described()
        assert f"pod {MODEL}-v1-" in said
        assert f"route {MODEL}: Accepted=True" in said
    until(lambda: not left(there.api), message=there.state())


@pytest.mark.parametrize(
    ("variable", "value", "why", "event"),
    [
        ("IMAGE", "absent:1", 'ErrImageNeverPull: Container image "absent:1" is not present', "ErrImageNeverPull"),
        pytest.param("PYTHON", "no-python", 'exec: "no-python"', "Warning Failed", marks=pytest.mark.long),
        pytest.param("REACH", "nowhere", "see TITLESHOT_TEST_REACH", "Scheduled", marks=pytest.mark.long),
    ],
)
def test_a_cluster_that_cannot_run_the_tests_pods_says_so_at_once(
    there: LocalCluster, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, why: str, event: str
) -> None:
    """An image that is not on the node, a command that is not in it, a way that does not lead to pods: one line, with
    what the namespace tells as a note. Nothing stays behind, and nobody tries again."""
    monkeypatch.setenv(f"TITLESHOT_TEST_{variable}", value)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot run the tests' pods") as failure:
            real.RealCluster().__enter__()
        assert why in str(failure.value)
        assert "\n" not in str(failure.value)
        assert not real._tried[0][0]
        if "first" in "".join(failure.value.__notes__):
            assert event in failure.value.__notes__[0]
    assert "first" not in failure.value.__notes__[0]
    until(lambda: not left(there.api), message=there.state())


def test_a_gateway_that_is_there_must_tell_models_apart(there: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' models share it: without {model} in its hostname each would get the others' requests."""
    monkeypatch.setenv("TITLESHOT_TEST_GATEWAY", "infra/public=http://10.0.0.1")
    with pytest.raises(RuntimeError, match=r"must hold \{model\}"):
        real.RealCluster().__enter__()

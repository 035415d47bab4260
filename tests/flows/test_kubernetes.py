"""Whole promotions on a cluster, by the flows, the registry and the history of the real stack; the policy changes by one
word. On the tests' own cluster pods are processes and fetch their artifacts from MLflow; in `make test-cluster` it is a
real one, whose pods have them mounted."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from deployments.kubernetes import names
from deployments.kubernetes.client import Client
from deployments.kubernetes.cluster import Cluster
from flows import cli, screens
from tasks import history, registry
from tests.cluster import real
from tests.cluster.node import LocalCluster
from tests.contract.clients import FLAWED, GOOD, body, make_models
from tests.flows.conftest import promote, rollback

CHECKS = {"error_rate": {"max": 0.2}}
SHADOW = {
    "kind": "shadow",
    "min_sample": 30,
    "bursts": "none",
    "max_slowdown": 50,
    "max": "60s",
    "checks": {"error_rate": {"max": 0.3}, "disagreement": {"max": 0.3}},
}
CANARY = {"kind": "canary", "weights": [50], "min_sample": 30, "bursts": "none", "max": "60s", "checks": CHECKS}
LASTS = 1200 if os.environ.get("TITLESHOT_TEST_CLUSTER") else 280
"""Seconds that live requests go on: on a real cluster pods take their time to come and go."""
WATCH = {"kind": "watch", "run_time": "3s", "min_sample": 20, "bursts": "none", "checks": CHECKS}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("tiny"))


@contextmanager
def places(tiny: Path, uri: str, kinds: dict[str, str], name: str = "test", **more: Any) -> Iterator[Cluster]:
    """A cluster for versions of these kinds: the tests' own, or a part of a real one."""
    if os.environ.get("TITLESHOT_TEST_CLUSTER"):
        if why := real.reason_to_skip():
            pytest.skip(why)
        with real.RealCluster() as part:
            yield part.settings({number: tiny / kind for number, kind in kinds.items()}, name=name, **more)
        return
    with LocalCluster() as own:
        settings = {
            "name": name,
            "kubeconfig": own.kubeconfig,
            "namespace": own.namespace,
            "gateway": {"name": "gateway", "namespace": own.namespace, "section": "http", "url": own.gateway_url},
            "image": "titleshot:test",
            "replicas": 1,
            "autoscale": {"cpu": None},
            "artifact": {"by": "mlflow", "tracking_uri": uri},
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "2Gi"}},
            "ready_timeout": 90,
            "answer_timeout": 10,
            "patience": 20,
        }
        yield Cluster.model_validate({**settings, **more})


def clients(cluster: Cluster, model: str) -> str:
    """Where clients reach the model."""
    return cluster.gateway.url.replace("{model}", names.slug(model))


def written(cluster: Cluster) -> dict[str, str]:
    """What there is of what only Titleshot writes, and in which version."""
    client = Client(cluster)
    kinds = ("ServiceAccount", "Service", "PodDisruptionBudget", "HTTPRoute", "Lease", "ConfigMap")
    found = [one for kind in kinds for one in client.items(kind, {})]
    return {f"{one['kind']} {one['metadata']['name']}": one["metadata"]["resourceVersion"] for one in found}


def described(path: Path, *clusters: Cluster) -> Path:
    """The file of clusters."""
    path.write_text(yaml.safe_dump({"clusters": [json.loads(one.model_dump_json()) for one in clusters]}))
    return path


def register(uri: str, model: str, tiny: Path, kinds: dict[str, str]) -> None:
    """Versions of a model, each of its kind."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    client = registry.client()
    client.create_registered_model(model)
    for number, kind in kinds.items():
        with mlflow.start_run() as run:
            mlflow.log_artifacts(str(tiny / kind), "m")
        assert client.create_model_version(model, f"{run.info.artifact_uri}/m", run.info.run_id).version == number


@contextmanager
def under_load(url: str, folder: Path, rate: float = 30, but: float = 13) -> Iterator[Any]:
    """Live requests for as long as the context lasts, `but` for one of a hundred values: a flawed version fails for 13.
    `stop()` says how many there were, and how many failed.
    """
    from loadtests import run

    payloads = folder / "live.jsonl"
    payloads.write_text("".join(body(float(x)).decode() + "\n" for x in range(1, 100) if x != but))
    profile = run.Profile(rate=rate, seconds=LASTS, timeout=20)
    with run.start(profile, f"{url}/invocations", payloads, folder / "live") as traffic:
        yield traffic


def write(path: Path, model: str, *gates: dict[str, Any], target: Any = "kubernetes") -> str:
    path.write_text(json.dumps({"version": 1, "model": model, "target": target, "gates": list(gates)}))
    return str(path)


def test_a_promotion_and_a_rollback_on_a_cluster(
    stack: Any, settings: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Shadow with answers in pairs, canary, promotion, watch, then a rollback by hand: no request of a steady stream
    fails, and routes, aliases and history say the same at each end. A dry run and a rendering before it change nothing.
    """
    model, kinds = "clustered", {"1": GOOD, "2": GOOD}
    register(settings.mlflow, model, tiny, kinds)
    first = write(tmp_path / "first.yaml", model, {"kind": "schema"})
    policy = write(tmp_path / "policy.yaml", model, SHADOW, CANARY, WATCH)
    with places(tiny, settings.mlflow, kinds) as cluster:
        monkeypatch.setenv("TITLESHOT_CLUSTERS", str(described(tmp_path / "clusters.yaml", cluster)))
        crowned = promote(model=model, policy=first, version="1")
        assert crowned["phase"] == "promoted", crowned
        url = clients(cluster, model)
        before = written(cluster)
        assert cli.run(["promote", model, "--policy", policy, "--version", "2", "--dry-run", "--json"]) == 0
        steps = {one["step"]: one["changes"] for one in json.loads(capfd.readouterr().out)["steps"]}
        assert {"Deployment clustered-v2", "Service clustered-v2"} <= {one["what"] for one in steps["deploy"]}
        assert "weight: 5000" in steps["canary 50%"][0]["after"]
        assert cli.run(["render", model, "--version", "2", "--output", str(tmp_path / "base"), "--kustomize"]) == 0
        rendered = {path.name: yaml.safe_load(path.read_text()) for path in (tmp_path / "base").rglob("*.yaml")}
        rules = rendered["httproute.yaml"]["spec"]["rules"]
        assert [rule["matches"][0]["path"]["value"] for rule in rules] == ["/v/1", "/v/2", "/"]
        assert len(rendered["kustomization.yaml"]["resources"]) == len(rendered) - 1
        assert written(cluster) == before
        if folder := os.environ.get("TITLESHOT_SCREENSHOTS"):
            console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
            monkeypatch.setattr(screens, "out", console)
            cli.run(["promote", model, "--policy", policy, "--version", "2", "--dry-run"])
            console.save_svg(f"{folder}/dry-run.svg", title="titleshot promote clustered --dry-run")
        with under_load(url, tmp_path) as traffic:
            result = promote(model=model, policy=policy, version="2")
            assert result["phase"] == "promoted", result
            assert registry.aliased(model, "champion") == "2"
            back = rollback(model=model, reason="the night shift says so")
            assert back["phase"] == "rolled back", back
            answered = traffic.stop()
        assert (answered.failed, answered.sent > 100) == (0, True)
        assert registry.aliased(model, "champion") == "1"
        verdicts = history.stored(history.entry(result["promotion"]).run_id).verdicts
        assert [one.outcome.value for one in verdicts] == ["passed"] * len(verdicts)
        assert verdicts[1].evidence.measurements["disagreement"].sample >= 30
        capfd.readouterr()
        assert cli.run(["status", "--json"]) == 0
        found = {one["model"]: one for one in json.loads(capfd.readouterr().out)["models"]}
        assert (found[model]["serving"], found[model]["agrees"]) == ("1", True)


@pytest.mark.long
def test_a_challenger_that_fails_on_a_cluster_goes_back(
    stack: Any, settings: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that fails for some requests is rolled back by its canary; its objects are gone then."""
    model, kinds = "flawed-there", {"1": GOOD, "2": FLAWED}
    register(settings.mlflow, model, tiny, kinds)
    first = write(tmp_path / "first.yaml", model, {"kind": "schema"})
    policy = write(tmp_path / "p.yaml", model, {**CANARY, "checks": {"error_rate": {"max": 0.001}}})
    with places(tiny, settings.mlflow, kinds) as cluster:
        monkeypatch.setenv("TITLESHOT_CLUSTERS", str(described(tmp_path / "clusters.yaml", cluster)))
        promote(model=model, policy=first, version="1")
        with under_load(clients(cluster, model), tmp_path, but=0):
            result = promote(model=model, policy=policy, version="2")
        assert [result[key] for key in ("phase", "step", "outcome")] == ["rolled back", "canary 50%", "failed"], result
        from tasks.settings import load
        from tasks.targets import settings_target

        assert set(settings_target(load()).deployed(model)) == {"1"}


def in_two(tiny: Path, uri: str, kinds: dict[str, str]) -> Any:
    """Two clusters (on a real one: two namespaces), each a region."""
    from contextlib import ExitStack

    if os.environ.get("TITLESHOT_TEST_CLUSTER") and os.environ.get("TITLESHOT_TEST_GATEWAY"):
        pytest.skip("regions need a Gateway each, and TITLESHOT_TEST_GATEWAY names one")
    stack = ExitStack()
    found = [stack.enter_context(places(tiny, uri, kinds, name=name, region=True)) for name in ("eu", "us")]
    return stack, found


@pytest.mark.long
def test_a_promotion_goes_region_by_region(
    stack: Any, settings: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each region has its own canary and aliases; the alias champion moves last. A challenger that fails in the second
    region is taken back from the first one too, where the policy says `all`."""
    model, kinds = "everywhere", {"1": GOOD, "2": GOOD, "3": FLAWED}
    register(settings.mlflow, model, tiny, kinds)
    waves = {"waves": [["eu"], ["us"]], "on_failure": "all"}
    first = write(tmp_path / "first.yaml", model, {"kind": "schema"}, CANARY, target=waves)
    policy = write(tmp_path / "policy.yaml", model, CANARY, target=waves)
    strict = write(tmp_path / "strict.yaml", model, {**CANARY, "checks": {"error_rate": {"max": 0.02}}}, target=waves)
    undo, (eu, us) = in_two(tiny, settings.mlflow, kinds)
    with undo:
        monkeypatch.setenv("TITLESHOT_CLUSTERS", str(described(tmp_path / "clusters.yaml", eu, us)))
        assert promote(model=model, policy=first, version="1")["phase"] == "promoted"
        (tmp_path / "eu").mkdir()
        (tmp_path / "us").mkdir()
        with under_load(eu.gateway.url, tmp_path / "eu") as one, under_load(us.gateway.url, tmp_path / "us") as other:
            result = promote(model=model, policy=policy, version="2")
            assert [region["phase"] for region in result["regions"]] == ["promoted", "promoted"], result
            aliases = dict(registry.client().get_registered_model(model).aliases)
            assert {aliases[name] for name in ("champion", "champion-eu", "champion-us")} == {"2"}
            assert aliases["previous-us"] == "1"
            for traffic in (one, other):
                assert traffic.stop().failed == 0
        # In the first region nobody sends what it fails for.
        with under_load(eu.gateway.url, tmp_path / "eu"), failing(us.gateway.url, tmp_path / "us"):
            result = promote(model=model, policy=strict, version="3")
        assert (result["region"], result["outcome"]) == ("us", "failed"), result
        assert {region["region"]: region["phase"] for region in result["regions"]} == {
            "eu": "rolled back",
            "us": "rolled back",
        }, result
        aliases = dict(registry.client().get_registered_model(model).aliases)
        assert {aliases[name] for name in ("champion", "champion-eu", "champion-us")} == {"2"}


@contextmanager
def failing(url: str, folder: Path) -> Iterator[Any]:
    """Live requests that a flawed version fails."""
    from loadtests import run

    payloads = folder / "thirteen.jsonl"
    payloads.write_text(body(13.0).decode() + "\n")
    with run.start(
        run.Profile(rate=30, seconds=LASTS, timeout=20), f"{url}/invocations", payloads, folder / "x"
    ) as sent:
        yield sent

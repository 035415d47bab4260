"""Least rights in a cluster: what a promotion must do it may, and what it need not do it may not."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import kubernetes_validate
import pytest
import yaml

from deployments.kubernetes import names, rbac
from deployments.kubernetes.client import Client, Forbidden
from deployments.kubernetes.cluster import Cluster, Gateway, GitOps, Json
from deployments.kubernetes.hand import Direct
from deployments.kubernetes.lease import State
from deployments.kubernetes.manifests import version_objects
from deployments.kubernetes.pods import endpoints, events
from deployments.kubernetes.workload import serving
from deployments.target import Entry, Version
from tests.cluster.apiserver import ApiServer
from tests.cluster.rights import RUN, WORKER, granted, restricted, used

MODEL = "flights"
MLMODEL = "flavors:\n  python_function:\n    loader_module: tiny\n"


def settings(**more: object) -> Cluster:
    gateway = Gateway(name="shared", namespace="infra", url="http://127.0.0.1:1")
    return Cluster.model_validate({"namespace": "models", "gateway": gateway, "patience": 2, **more})


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        for name in ("models", "infra", "titleshot", "elsewhere"):
            server.add({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        yield server


ALL = [
    rbac.objects(settings(), targets=rbac.TARGETS),
    rbac.objects(settings(mirroring="replay"), load=False),
    rbac.objects(settings(gitops=GitOps(repository="/srv/cluster.git"))),
    rbac.pool(),
]


@pytest.mark.parametrize("made", ALL, ids=["all", "replay", "gitops", "pool"])
def test_the_objects_are_valid_and_give_no_more_than_they_say(made: list[Json]) -> None:
    """They fit the API's schemas; there is no wildcard, nothing that reads secrets, runs commands or gives rights."""
    for one in made:
        kubernetes_validate.validate(one, "1.36", strict=True)
    rules = [rule for one in made if one["kind"] in {"Role", "ClusterRole"} for rule in one["rules"]]
    said = {word for rule in rules for part in ("apiGroups", "resources", "verbs") for word in rule[part]}
    assert not said & {"*", "secrets", "pods/exec", "pods/attach", "pods/portforward", "nodes", "serviceaccounts/token"}
    assert not said & {"rbac.authorization.k8s.io", "roles", "bind", "escalate", "impersonate", "deletecollection"}
    cluster_wide = [rule for one in made if one["kind"] == "ClusterRole" for rule in one["rules"]]
    assert all(rule["resources"] == ["gatewayclasses"] and rule["verbs"] == ["get"] for rule in cluster_wide)


def test_settings_that_need_less_get_less() -> None:
    """With GitOps no version and no route is written; pods are asked through the API server only where they are
    reached so, and sent something only for a replay."""
    all_of_them = granted(settings())
    gitops = granted(settings(gitops=GitOps(repository="/srv/cluster.git")), load=False)
    assert gitops < all_of_them
    assert {plural for _, plural, verb, _ in gitops if verb == "create"} == {"leases", "configmaps"}
    assert not {right for right in gitops if right[2] in {"patch", "delete"}}
    assert not {right for right in granted(settings(reach="direct")) if right[1] == "pods/proxy"}
    replay = granted(settings(mirroring="replay"))
    assert replay - all_of_them == {("", "pods/proxy", "create", "models")}
    assert "deployments" not in {plural for _, plural, _, _ in granted(settings(), targets=("kserve",))}


def version(folder: Path) -> Version:
    (folder / "MLmodel").write_text(MLMODEL)
    return Version(MODEL, "3", folder, "sha256:" + "0" * 64)


@pytest.mark.usefixtures("schemas")
def test_what_a_promotion_does_it_may(server: ApiServer, tmp_path: Path) -> None:
    """Lease, journal, a version's objects, its route, pods, logs and events: all with these rights alone."""
    cluster = restricted(server, settings(artifact={"tracking_uri": "http://mlflow:5000"}), tmp_path)
    client, state = Client(cluster), State(Client(cluster), cluster)
    fence = state.lease(MODEL, "me")
    state.renew(fence)
    state.write(Entry(MODEL, "p", "begin", {}), fence)
    with state.guard(fence):
        assert state.holder(MODEL) is not None

    one = version(tmp_path)
    objects = version_objects(cluster, one, serving(one, cluster), promotion="p", fence=fence.number)
    hand = Direct(client)
    hand.check(objects)
    made = hand.apply(objects, why="a test")
    main = next(one for one in made if one["kind"] == "Deployment")
    client.replace({**main, "metadata": {**main["metadata"], "annotations": {"titleshot.io/admitted": "now"}}})
    for one_made in made:
        assert client.get(one_made["kind"], one_made["metadata"]["name"]) is not None
        assert client.items(one_made["kind"], names.labels(MODEL, "3"))
    server.add(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "p", "namespace": "models", "labels": names.labels(MODEL, "3")},
            "spec": {"containers": [{"name": "server", "image": "titleshot"}]},
        }
    )
    server.logs["models", "p", "server"] = lambda: b"ready\n"
    assert next(client.watch("Pod", names.labels(MODEL, "3"), 5))["type"] == "ADDED"
    assert client.log("p", "server", 10) == "ready\n"
    assert endpoints(client, names.of_version(MODEL, "3")) == frozenset()
    assert events(client, names.of_version(MODEL, "3")) == []
    # Through the proxy: the pod has no address, which only somebody who may ask is told.
    pod = server.objects("pods")[0]
    assert b"address not allowed" in client.pod_request("GET", pod, names.ADMIN, "/metrics").body
    with pytest.raises(Forbidden):
        client.pod_request("POST", pod, names.PORTS["shadow"], "/invocations")

    meta = {"name": MODEL, "labels": names.labels(MODEL)}
    route: Json = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta, "spec": {}}
    created = client.create(route)
    client.replace(created)
    client.apply(route)
    assert client.knows("HTTPRoute")
    assert client.get("Gateway", "shared", "infra") is None
    assert client.get("GatewayClass", "any") is None
    for gone in (*reversed(made), created):
        client.delete(gone["kind"], gone["metadata"]["name"])
    state.release(fence)


@pytest.fixture
def schemas() -> None:
    from tests.cluster.schema import CRDS

    if not CRDS.exists():
        pytest.skip(f"the Gateway API's definitions are not at {CRDS}")


CORE, APPS, RBAC = "/api/v1/namespaces", "/apis/apps/v1/namespaces", "/apis/rbac.authorization.k8s.io/v1"
REFUSED = [
    ("GET", f"{CORE}/models/secrets"),
    ("GET", f"{CORE}/models/secrets/any"),
    ("POST", f"{CORE}/models/secrets"),
    ("POST", f"{CORE}/models/pods"),
    ("DELETE", f"{CORE}/models/pods/p"),
    ("POST", f"{CORE}/models/pods/p/eviction"),
    ("POST", f"{CORE}/models/pods/p/proxy/invocations"),
    ("POST", f"{CORE}/models/serviceaccounts/default/token"),
    ("DELETE", "/apis/coordination.k8s.io/v1/namespaces/models/leases/titleshot-flights"),
    ("DELETE", f"{APPS}/models/deployments"),
    ("GET", f"{APPS}/elsewhere/deployments"),
    ("POST", f"{APPS}/elsewhere/deployments"),
    ("GET", f"{CORE}/titleshot/secrets"),
    ("GET", f"{CORE}/titleshot/configmaps/any"),
    ("GET", "/apis/gateway.networking.k8s.io/v1/namespaces/infra/gateways"),
    ("GET", "/apis/gateway.networking.k8s.io/v1/namespaces/infra/gateways/another"),
    ("GET", "/apis/gateway.networking.k8s.io/v1/gatewayclasses"),
    ("GET", "/api/v1/pods"),
    ("GET", "/api/v1/nodes"),
    ("GET", "/api/v1/namespaces"),
    ("POST", "/api/v1/namespaces"),
    ("POST", f"{RBAC}/namespaces/models/rolebindings"),
    ("PATCH", f"{RBAC}/namespaces/models/roles/titleshot-promoter"),
    ("POST", f"{RBAC}/clusterrolebindings"),
]


def test_what_a_promotion_need_not_do_it_may_not(server: ApiServer, tmp_path: Path) -> None:
    """Secrets, pods, other namespaces, nodes and rights are refused with a 403, whoever asks with its token."""
    cluster = restricted(server, settings(), tmp_path)
    token = yaml.safe_load(Path(str(cluster.kubeconfig)).read_text())["users"][0]["user"]["token"]
    refused(server, token, REFUSED)
    nobody = server.token("system:serviceaccount:models:flights-v3")
    own = [("GET", f"{CORE}/models/pods"), ("GET", f"{CORE}/models/configmaps"), ("GET", f"{APPS}/models/deployments")]
    refused(server, nobody, [*own, *REFUSED])


def test_prefects_worker_may_do_no_more_than_make_jobs(server: ApiServer) -> None:
    """It makes, follows and deletes Jobs in its own namespace, and nothing anywhere else."""
    for one in rbac.pool():
        server.add(one)
    token = server.token(WORKER)
    jobs = "/apis/batch/v1/namespaces/titleshot/jobs"
    for path in (jobs, f"{CORE}/titleshot/pods"):
        assert asked(server, token, "GET", path) == 200
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "run-"},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
    }
    assert asked(server, token, "POST", jobs, job) == 201
    name = server.objects("jobs")[0]["metadata"]["name"]
    assert asked(server, token, "DELETE", f"{jobs}/{name}") == 200
    more = [("PATCH", f"{jobs}/any"), ("POST", f"{CORE}/titleshot/pods"), ("GET", f"{CORE}/models/pods")]
    refused(server, token, [*more, *REFUSED])


def refused(server: ApiServer, token: str, requests: list[tuple[str, str]]) -> None:
    assert {(*one, asked(server, token, *one)) for one in requests} == {(*one, 403) for one in requests}


def asked(server: ApiServer, token: str, method: str, path: str, body: Json | None = None) -> int:
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    headers = {"authorization": f"Bearer {token}", "content-type": kind}
    return httpx.request(method, server.url + path, headers=headers, json=body or {}, timeout=10).status_code


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m deployments.kubernetes.rbac` prints what can be applied as it is."""
    rbac.main(["--models", "models", "--gateway", "infra/shared", "--replay"])
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    assert printed == [*rbac.pool(), *rbac.objects(settings(mirroring="replay"))]


@pytest.mark.long
@pytest.mark.usefixtures("schemas")
def test_a_whole_way_uses_these_rights_and_all_of_them(tmp_path: Path) -> None:
    """Deploy, route, observe, ask, change, retire on a cluster with pods and a gateway: nothing is refused, and what
    is granted beyond is what only KServe, loads and trouble need."""
    from deployments.target import FULL, Traffic
    from tests.cluster.node import LocalCluster
    from tests.cluster.world import KubernetesWorld, own_settings
    from tests.contract.clients import make_models

    models = make_models(tmp_path)
    with LocalCluster() as own:
        cluster = restricted(own.server, own_settings(own, models), tmp_path)
        world = KubernetesWorld(models, cluster, own)
        target, model = world.target, world.version("1").model
        fence = target.lease(model, "me")
        try:
            for number in ("1", "2"):
                target.deploy(world.version(number), fence)
            target.route(Traffic(model, "1"), fence)
            target.route(Traffic(model, "1", "2", weight=FULL // 2, mirror=FULL // 2), fence)
            world.send(20)
            assert sum(one.requests for one in target.observe(model).values()) >= 20
            assert list(target.answers(model, "1"))
            target.write(Entry(model, "p", "begin", {}), fence)
            fence = target.lease(model, "another", take=True)
            target.route(Traffic(model, "2"), fence)
            target.retire(model, "1", fence)
            target.release(fence)
        finally:
            seen = list(own.server.seen)
        denied = {(one.verb, one.path) for one in seen if one.user == RUN and one.code == 403}
        assert denied == set()
        wants, has = used(own.server, RUN), granted(cluster)
        assert wants <= has
        spare = {(plural, verb) for _, plural, verb, _ in has - wants}
        loads = {("jobs", verb) for verb in ("get", "list", *rbac.WRITE)}
        loads |= {("configmaps", verb) for verb in ("list", "patch", "delete")}
        trouble = {("pods/log", "get"), ("events", "list")}
        # A create by server-side apply is a patch in the record of requests.
        made = {(plural, "create") for plural in ("deployments", "services", "serviceaccounts")}
        made |= {("poddisruptionbudgets", "create"), ("horizontalpodautoscalers", "create")}
        dry = {(plural, "get") for plural, _ in made}
        scaling = {("horizontalpodautoscalers", verb) for verb in ("patch", "delete")}
        assert spare - loads - trouble - made - dry - scaling - {("httproutes", "delete")} == set()

"""A load by Jobs in a cluster: their manifests, what goes wrong, and real runs on the tests' own cluster.

`python -m tests.unit.test_load_jobs` writes the golden file anew; read the difference before you commit it.
"""

import base64
import hashlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import kubernetes_validate
import pytest
import yaml

from deployments.kubernetes import names
from deployments.kubernetes.client import Client
from deployments.kubernetes.cluster import Cluster, Gateway
from deployments.kubernetes.cluster import Load as Settings
from deployments.kubernetes.jobs import LOAD, PIECE, Jobs, hosts, master_job, plan_maps, worker_job
from deployments.kubernetes.rbac import rules
from deployments.target import TargetError
from loadtests.agent import parser
from loadtests.distributed import MAX_CLOCK_ERROR, run, unframe, unpack_part
from loadtests.run import LoadError, Profile
from tasks.senders import sender
from tests.cluster.node import LocalCluster
from tests.fakes import FakeTarget
from tests.unit.test_load import EASY, payloads, server  # noqa: F401 - fixtures

GOLDEN = Path(__file__).parent / "golden" / "kubernetes" / "load.yaml"
CLUSTER = Cluster(
    namespace="models",
    gateway=Gateway(name="gateway", url="http://{model}.models.test:8080"),
    image="titleshot:1",
    pull_policy="Never",
    pull_secrets=("registry",),
    load=Settings(by="jobs", pod={"nodeSelector": {"pool": "load"}, "affinity": None}),
)
PLAN = bytes(range(256)) * 6000  # 1.5 MB: two pieces


def manifests(cluster=CLUSTER, plan=PLAN):
    """All objects of a run of two workers."""
    more = {"promotion": "p-1", "seconds": 700.5}
    master = master_job(cluster, "Flight Delay", "flight-load-1a2b3c", plan, **more)
    made = {**master, "metadata": {**master["metadata"], "uid": "u-1"}}
    workers = worker_job(
        cluster, "Flight Delay", "flight-load-1a2b3c", plan, workers=2, master="10.1.2.3", owner=made, **more
    )
    return [master, workers, *plan_maps(cluster, "Flight Delay", "flight-load-1a2b3c", plan, owner=made)]


def test_the_manifests_are_the_golden_ones():
    """They are what was read and agreed to."""
    assert list(yaml.safe_load_all(GOLDEN.read_text())) == manifests(plan=b"a plan")


@pytest.mark.parametrize("version", ["1.30", "1.36"])
def test_the_api_knows_every_field(version):
    """By the API's own schemas, strictly, whatever is laid over the pods."""
    for cluster in (CLUSTER, Cluster(gateway=CLUSTER.gateway)):
        for found in manifests(cluster):
            kubernetes_validate.validate(found, version, strict=True)


def test_a_pod_may_nothing():
    """No token, not root, nothing writable but /tmp, no more privileges, no capabilities, no environment of Services'."""
    for found in manifests()[:2]:
        spec = found["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        assert writable == ["/tmp"]


def test_jobs_are_bounded_and_tried_once():
    """Their time, their number of pods, and how long the cluster keeps them; with the worst of names too."""
    master, workers, *_ = manifests()
    for job in (master, workers):
        assert job["spec"]["backoffLimit"] == 0
        assert job["spec"]["activeDeadlineSeconds"] == 701
        assert job["spec"]["ttlSecondsAfterFinished"] > 0
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert (workers["spec"]["completions"], workers["spec"]["parallelism"]) == (2, 2)
    longest = f"{names.slug('x' * 200)}-load-123456-w-{49}"
    assert len(longest) <= 63, "the host name of a worker's pod"


def test_no_version_is_made_of_a_loads_pods():
    """By a version's labels none of them is found: not by its Service, and not by us."""
    for found in manifests():
        assert names.MODEL not in found["metadata"]["labels"]
        assert names.MODEL not in found["spec"]["template"]["metadata"]["labels"] if "spec" in found else True
        assert found["metadata"]["labels"][LOAD] == names.slug("Flight Delay")


def test_pods_run_what_the_agent_understands():
    """The commands are the agent's own command line."""
    master, workers, *_ = manifests()
    for job, role in ((master, "master"), (workers, "worker")):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        python, _, module, *words = container["command"]
        assert (python, module) == ("python", "loadtests.agent")
        words = [{"$(JOB_COMPLETION_INDEX)": "1", "$(POD_IP)": "10.1.2.3"}.get(word, word) for word in words]
        options = parser().parse_args(words)
        assert (options.role, options.host, options.port) == (role, "10.1.2.3", 5557)
        assert options.digest == hashlib.sha256(PLAN).hexdigest()
        assert container["volumeMounts"][0]["mountPath"] == str(options.plan)


def test_a_plan_comes_in_pieces_that_fit():
    """A ConfigMap holds 1 MiB; put together they are the plan, and what needs too many is refused."""
    master, _, *maps = manifests()
    data = [base64.b64decode(found["binaryData"][f"plan.{n}"]) for n, found in enumerate(maps)]
    assert b"".join(data) == PLAN
    assert max(map(len, data)) == PIECE < 2**20
    sources = master["spec"]["template"]["spec"]["volumes"][0]["projected"]["sources"]
    assert [source["configMap"]["name"] for source in sources] == [found["metadata"]["name"] for found in maps]
    with pytest.raises(TargetError, match=r"7.4 MB, compressed.*at most 7.2"):
        plan_maps(CLUSTER, "m", "n", bytes(7_400_000), owner={"metadata": {}})


def test_load_goes_to_the_models_own_addresses_only():
    """Its gateway, and the Services of its versions."""
    found = hosts(CLUSTER, "flight", ["3"])
    assert "flight.models.test:8080" in found
    assert "flight-v3.models.svc:8082" in found
    assert not {"flight-v2.models.svc:8082", "other.models.test:8080"} & found


def test_who_sends_the_load_is_the_clusters_choice():
    """On this machine nobody else may be loaded; a cluster names its own addresses, and Jobs where it wants them."""
    assert sender(FakeTarget(), "flight", "p") == (None, frozenset())
    for by in ("here", "jobs"):
        known = CLUSTER.model_copy(update={"load": Settings(by=by)})
        place = SimpleNamespace(cluster=known, deployed=lambda _: {"3": None})
        crew, allowed = sender(place, "flight", "p")
        assert allowed == hosts(CLUSTER, "flight", ["3"])
        assert isinstance(crew, Jobs) == (by == "jobs")


# --- on the tests' cluster


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(gateway=False) as cluster:
        yield cluster


def settings_of(cluster, user, rights):
    """The cluster as somebody sees it who has these rights in its namespace and no others."""
    group, meta = "rbac.authorization.k8s.io", {"name": user, "namespace": cluster.namespace}
    binding = {
        "roleRef": {"apiGroup": group, "kind": "Role", "name": user},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }
    where = f"{cluster.server.url}/apis/{group}/v1/namespaces/{cluster.namespace}"
    for kind, plural, more in (("Role", "roles", {"rules": rights}), ("RoleBinding", "rolebindings", binding)):
        made = {"apiVersion": f"{group}/v1", "kind": kind, "metadata": meta, **more}
        httpx.post(f"{where}/{plural}", json=made).raise_for_status()
    path = cluster.directory / f"{user}.kubeconfig"
    cluster.server.kubeconfig(path, token=cluster.server.token(user), namespace=cluster.namespace)
    return Cluster(
        kubeconfig=path,
        namespace=cluster.namespace,
        gateway=Gateway(name="gateway", url="http://127.0.0.1:1"),
        image="titleshot:test",
        ready_timeout=60,
    )


@pytest.fixture(scope="module")
def settings(cluster):
    """Of somebody who may do what a load needs, and no more."""
    return settings_of(cluster, "loader", rules(CLUSTER))


def left(client):
    """What of loads there is in the cluster."""
    return [one["metadata"]["name"] for kind in ("Job", "ConfigMap", "Pod") for one in client.items(kind, {LOAD: "m"})]


def wait_until_nothing_is_left(client):
    until = time.monotonic() + 60
    while found := left(client):
        assert time.monotonic() < until, found
        time.sleep(0.2)


def loaded(settings, url, payloads, profile, *, workers=2, meanwhile=lambda: None, admin=None):  # noqa: F811
    crew = Jobs(Client(settings), settings, "m", promotion="p")
    host = url.removeprefix("http://").partition("/")[0]
    try:
        return run(
            profile,
            {"champion": f"{url}1", "challenger": f"{url}2"},
            payloads,
            workers=workers,
            crew=crew,
            hosts=[host],
            meanwhile=meanwhile,
        )
    finally:
        wait_until_nothing_is_left(admin or Client(settings))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_workers_of_a_cluster_load_both_versions(settings, server, payloads, monkeypatch):  # noqa: F811
    """A master and two pods send what a single worker would; every request comes back through their logs."""
    client, logs = Client(settings), []
    # What a process that was killed left behind is gone before anything begins.
    stray = manifests(settings, b"an old plan")[2]
    del stray["metadata"]["ownerReferences"]
    stray["metadata"] |= {"name": "m-load-000000-0", "labels": {**stray["metadata"]["labels"], LOAD: "m"}}
    client.apply(stray)
    read = Client.log
    monkeypatch.setattr(Client, "log", lambda *words, **more: logs.append(read(*words, **more)) or logs[-1])
    result = loaded(settings, server.url("/pods"), payloads, Profile(rate=100, seconds=2, arrivals="poisson", **EASY))
    lines = payloads.read_text().splitlines()
    for name, version in (("champion", "1"), ("challenger", "2")):
        assert sorted(server.seen(f"/pods{version}")) == sorted(lines[n % 7] for n in range(200))
        target = result.targets[name]
        assert (target.sent, target.failed, target.latencies.size) == (200, 0, 200)
        assert target.versions == {version: 200}
    assert result.seconds >= 2
    parts = [unpack_part(unframe(log, "")) for log in logs[:2]]
    assert [(part.number, part.result.sent) for part in parts] == [(0, 200), (1, 200)]
    assert all(part.clock_error < MAX_CLOCK_ERROR for part in parts)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_pod_that_is_lost_is_the_end_of_the_run(cluster, settings, server, payloads):  # noqa: F811
    """An evicted pod is not replaced, and the rest of the load is not taken for the whole."""
    client = Client(settings.model_copy(update={"kubeconfig": cluster.kubeconfig}))

    def evict():
        if len(server.seen("/lost1")) > 20:
            for pod in client.items("Pod", {LOAD: "m", "app.kubernetes.io/component": "worker"}):
                if pod["metadata"]["name"].rpartition("-")[0].endswith("-1"):
                    client.delete("Pod", pod["metadata"]["name"])

    profile = Profile(rate=30, seconds=120, **EASY)
    with pytest.raises((TargetError, LoadError), match=r"load's Job m-load-.* failed"):
        loaded(settings, server.url("/lost"), payloads, profile, meanwhile=evict)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_what_is_raised_meanwhile_removes_all_pods(settings, server, payloads):  # noqa: F811
    """A search that sees live requests hurt does not wait for the run's end."""

    class Hurt(Exception):
        pass

    def look():
        if server.seen("/stopped1"):
            raise Hurt

    with pytest.raises(Hurt):
        loaded(settings, server.url("/stopped"), payloads, Profile(rate=30, seconds=120, **EASY), meanwhile=look)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_pods_that_cannot_start_are_an_error_with_the_clusters_words(settings, server, payloads):  # noqa: F811
    """An image that is not there, at once; what does not fit on any node, after its time; nothing is sent."""
    profile = Profile(rate=30, seconds=1, **EASY)
    absent = settings.model_copy(update={"image": "absent:1", "pull_policy": "Never"})
    with pytest.raises(TargetError, match="cannot start: ErrImageNeverPull"):
        loaded(absent, server.url("/never"), payloads, profile)
    huge = Settings(pod={"nodeSelector": {"pool": "nowhere"}})
    lonely = settings.model_copy(update={"load": huge, "ready_timeout": 3})
    with pytest.raises(TargetError, match=r"0 of 1 pods of the load's Job .* started within 3 s \(.*Unschedulable"):
        loaded(lonely, server.url("/never"), payloads, profile)
    assert server.seen("/never1") == []


@pytest.mark.long
def test_a_right_that_is_missing_is_named(cluster, server, payloads):  # noqa: F811
    """Who has no rights to Jobs hears which one is missing; nothing is sent, and nothing is left."""
    admin = Client(CLUSTER.model_copy(update={"kubeconfig": cluster.kubeconfig}))
    less = settings_of(cluster, "reader", rules(CLUSTER, load=False))
    with pytest.raises(TargetError, match=r"reader may not list jobs in namespace models"):
        loaded(less, server.url("/denied"), payloads, Profile(rate=30, seconds=1, **EASY), admin=admin)
    assert server.seen("/denied1") == []


if __name__ == "__main__":
    plain = [json.loads(json.dumps(found)) for found in manifests(plan=b"a plan")]
    GOLDEN.write_text(yaml.safe_dump_all(plain, sort_keys=False))

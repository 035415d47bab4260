"""The tests' own cluster (tests/cluster): what its controllers, its node and its gateway promise to the tests that stand on them."""

import concurrent.futures
import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from tests.cluster.kubelet import Address, quantity
from tests.cluster.node import Gateways, Image, LocalCluster, until
from tests.cluster.rest import Api, ApiError

SPACE = "models"


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(capacity={"example.com/gpu": "1"}) as made:
        yield made


def pod_spec(name, **container):
    server = {
        "name": "server",
        "image": "titleshot:test",
        "imagePullPolicy": "Never",
        "command": ["python", "-m", "tests.cluster.stub", name, "$(POD_IP)", "8080", "8082"],
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        "ports": [{"name": "live", "containerPort": 8080}],
        "lifecycle": {"preStop": {"sleep": {"seconds": 3}}},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "live"}, "periodSeconds": 1},
        **container,
    }
    return {"terminationGracePeriodSeconds": 8, "containers": [server]}


def deploy(cluster, name, replicas=2, spec=None, **more):
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": spec or pod_spec(name)}
    meta = {"name": name, "namespace": SPACE}
    body = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template, **more}
    cluster.api.create({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": body})
    ports = [{"name": "live", "port": 8080, "targetPort": "live"}, {"name": "own", "port": 82, "targetPort": 8082}]
    cluster.api.create(
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": labels, "ports": ports}}
    )


def remove(cluster, *names):
    for name in names:
        cluster.api.delete("Deployment", SPACE, name, propagationPolicy="Background")
        cluster.api.delete("Service", SPACE, name)


def route(cluster, name, rules, gateway="gateway"):
    parents = [{"name": gateway}]
    meta = {"name": name, "namespace": SPACE}
    spec = {"parentRefs": parents, "hostnames": [f"{name}.test"], "rules": rules}
    cluster.api.apply(
        {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta, "spec": spec}
    )


def split(**weights):
    return [{"backendRefs": [{"name": name, "port": 8080, "weight": weight} for name, weight in weights.items()]}]


def obeyed(cluster, name):
    until(lambda: cluster.accepted(name, SPACE), message=f"route {name}: {cluster.state()}")


def ready(cluster, name, count):
    until(lambda: len(cluster.ready({"app": name})) == count, message=f"{count} ready {name}: {cluster.state()}")


def served(gateways, port=8080, **counts):
    """A pod that is ready has an endpoint a moment later, and Envoy knows of it another moment later."""
    until(lambda: all(gateways.endpoints(SPACE, name, port) == count for name, count in counts.items()))


def condition(obj, kind):
    return next((one for one in obj.get("status", {}).get("conditions", []) if one["type"] == kind), {})


def pod_of(cluster, name):
    return cluster.pods({"app": name})[0]


def reasons(cluster, name):
    return {one["reason"] for one in cluster.events(name)}


def test_weights_move_under_load_and_pods_come_and_go_without_a_failed_request(cluster):
    """Through the real Envoy: 90/10, then 0/100, then more and fewer pods, then a Deployment is deleted while its answers are in flight."""
    deploy(cluster, "one")
    deploy(cluster, "two")
    ready(cluster, "one", 2)
    ready(cluster, "two", 2)
    route(cluster, "model", split(one=90, two=10))
    obeyed(cluster, "model")
    served(cluster.gateways, one=2, two=2)
    over, codes, names = threading.Event(), [], []

    def load():
        with httpx.Client(base_url=cluster.gateway_url, headers={"host": "model.test"}) as client:
            while not over.is_set():
                answer = client.get("/score")
                codes.append(answer.status_code)
                names.append(answer.json()["name"] if answer.status_code == 200 else answer.text)
                over.wait(0.002)  # this process has the API server to run as well

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(load) for _ in range(2)]
        until(lambda: len(names) > 200)
        some = names[:200]
        slow = pool.submit(httpx.get, cluster.gateway_url + "/slow?s=0.3", headers={"host": "model.test"}, timeout=10)
        route(cluster, "model", split(one=0, two=100))
        obeyed(cluster, "model")
        mark = len(names) + 4  # two clients may have sent one just before
        cluster.api.patch("Deployment", SPACE, "two", {"spec": {"replicas": 3}})
        cluster.api.delete("Deployment", SPACE, "one", propagationPolicy="Foreground")
        ready(cluster, "two", 3)
        cluster.api.patch("Deployment", SPACE, "two", {"spec": {"replicas": 1}})
        until(
            lambda: len(cluster.pods({"app": "two"})) == 1 and not cluster.pods({"app": "one"}), message=cluster.state()
        )
        until(lambda: len(names) > mark + 50)
        over.set()
        assert slow.result().status_code == 200
        for one in running:
            one.result()
    assert {*codes} == {200}, [name for name in names if name not in {"one", "two"}][:3]
    assert 0 < some.count("two") < 60
    assert {*names[mark:]} == {"two"}
    assert cluster.api.get("Deployment", "one", SPACE) is None
    status = cluster.api.get("Deployment", "two", SPACE)["status"]
    assert (status["readyReplicas"], condition({"status": status}, "Available")["status"]) == (1, "True")
    remove(cluster, "one", "two")


def test_a_route_can_copy_match_rewrite_and_change_headers(cluster):
    """RequestMirror with the same x-request-id, exact headers, a version's own path rewritten, a port per kind of traffic."""
    deploy(cluster, "main", 1)
    deploy(cluster, "copy", 1)
    ready(cluster, "main", 1)
    ready(cluster, "copy", 1)
    mirror = {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "copy", "port": 82}, "percent": 100}}
    added = {
        "type": "RequestHeaderModifier",
        "requestHeaderModifier": {"set": [{"name": "x-set", "value": "50%"}], "remove": ["x-gone"]},
    }
    answer_header = {
        "type": "ResponseHeaderModifier",
        "responseHeaderModifier": {"add": [{"name": "x-answer", "value": "yes"}]},
    }
    rewrite = {"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}}}
    rules = [
        {"filters": [mirror, added, answer_header], "backendRefs": [{"name": "main", "port": 8080}]},
        {"matches": [{"path": {"value": "/v/2"}}], "filters": [rewrite], "backendRefs": [{"name": "copy", "port": 82}]},
        {
            "matches": [{"headers": [{"name": "X-Tenant", "value": "a"}]}],
            "backendRefs": [{"name": "copy", "port": 8080}],
        },
        {
            "matches": [{"path": {"value": "/slow"}}],
            "timeouts": {"request": "100ms"},
            "backendRefs": [{"name": "main", "port": 8080}],
        },
    ]
    route(cluster, "rich", rules)
    obeyed(cluster, "rich")
    served(cluster.gateways, main=1, copy=1)
    served(cluster.gateways, 82, copy=1)
    with httpx.Client(base_url=cluster.gateway_url, headers={"host": "rich.test"}) as client:
        answer = client.get("/score", headers={"x-gone": "1", "x-request-id": "abc"})
        told = answer.json()
        assert (told["name"], told["port"], answer.headers["x-answer"]) == ("main", 8080, "yes")
        assert (told["headers"]["x-set"], told["headers"]["x-request-id"]) == ("50%", "abc")
        assert "x-gone" not in told["headers"]
        copied = pod_of(cluster, "copy")["metadata"]["name"]
        until(lambda: b"GET /score" in cluster.node.log(SPACE, copied))
        own = client.get("/v/2/score?x=1").json()
        assert (own["name"], own["port"], own["path"]) == ("copy", 8082, "/score?x=1")
        assert client.get("/v/22").json()["name"] == "main"
        assert client.get("/score", headers={"x-tenant": "a"}).json()["name"] == "copy"
        assert client.get("/slow?s=0.5").status_code == 504
    remove(cluster, "main", "copy")


@pytest.mark.long
def test_a_second_gateway_reaches_pods_through_the_api_servers_proxy(cluster):
    """As on a real cluster whose pods are out of reach: a class of its own, statuses of its own, the same answers."""
    deploy(cluster, "main", 1)
    ready(cluster, "main", 1)
    outside = Gateways(cluster.kubeconfig, cluster.directory / "out", class_name="outside", reach="forward")
    try:
        outside.start()
        cluster.make_gateway("outside", SPACE, class_name="outside")
        route(cluster, "far", split(main=1), gateway="outside")
        obeyed(cluster, "far")
        served(outside, main=1)
        url = outside.url(SPACE, "outside")
        posted = httpx.post(url + "/score?a=%20b", headers={"host": "far.test"}, content=b"x" * 100_000)
        assert (posted.status_code, posted.json()["path"]) == (200, "/score?a=%20b")
    finally:
        outside.stop()
        cluster.api.delete("Gateway", SPACE, "outside")
    remove(cluster, "main")


def test_statuses_tell_only_what_envoy_obeys(cluster):
    """A backend that is not there, a feature that is refused, and a gateway that ignores what changes."""
    route(cluster, "lost", split(nowhere=1))
    found = until(lambda: (cluster.api.get("HTTPRoute", "lost", SPACE) or {}).get("status", {}).get("parents"))
    resolved = next(one for one in found[0]["conditions"] if one["type"] == "ResolvedRefs")
    assert (resolved["status"], resolved["reason"]) == ("False", "BackendNotFound")
    assert httpx.get(cluster.gateway_url, headers={"host": "lost.test"}).status_code == 500
    assert httpx.get(cluster.gateway_url, headers={"host": "other.test"}).status_code == 404
    deploy(cluster, "here", 0)
    cluster.gateways.refuse.add("HTTPRouteRequestMirror")
    mirror = {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "here", "port": 8080}}}
    route(cluster, "lost", [{"filters": [mirror], "backendRefs": [{"name": "here", "port": 8080}]}])

    def accepted():
        parents = cluster.api.get("HTTPRoute", "lost", SPACE)["status"]["parents"]
        return next(one for one in parents[0]["conditions"] if one["type"] == "Accepted")

    until(lambda: accepted()["reason"] == "UnsupportedValue")
    assert "HTTPRouteRequestMirror" in accepted()["message"]
    until(lambda: "HTTPRouteRequestMirror" not in cluster.supports_gateway)
    cluster.gateways.refuse.clear()
    cluster.gateways.ignore.set()
    seen = accepted()["observedGeneration"]
    route(cluster, "lost", split(here=1))
    with pytest.raises(AssertionError):
        until(lambda: accepted()["observedGeneration"] != seen, timeout=0.3)
    cluster.gateways.ignore.clear()
    obeyed(cluster, "lost")
    remove(cluster, "here")


def test_a_pod_gets_its_volumes_variables_and_init_containers_in_order(cluster):
    """Paths of mounts become directories, $(VAR) and references their values; a failing init container is tried again; a
    sidecar starts before the others, and sees a directory above its mounts.
    """
    for kind, data in (("ConfigMap", {"a.txt": "plain"}), ("Secret", {"key": "c2VjcmV0"})):
        cluster.api.create(
            {"apiVersion": "v1", "kind": kind, "metadata": {"name": "given", "namespace": SPACE}, "data": data}
        )
    fetch = (
        "import os,sys,pathlib; d=pathlib.Path('/models'); n=len(list(d.iterdir())); (d/f'try{n}').write_text(os.environ['KEY']);"
        "print('try', n); sys.exit(0 if n else 7)"
    )
    spec = pod_spec(
        "fed", command=["python", "-m", "tests.cluster.stub", "$(KEY)-$(A)-$(NOPE)-$$(A)", "$(POD_IP)", "8080"]
    )
    server = spec["containers"][0]
    server["env"] += [
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "given", "key": "key"}}},
        {"name": "WHERE", "value": "/models/3"},
        {"name": "A", "value": "$(POD)"},
    ]
    server["envFrom"] = [{"configMapRef": {"name": "given"}, "prefix": "C_"}]
    server["volumeMounts"] = [
        {"name": "models", "mountPath": "/models"},
        {"name": "config", "mountPath": "/etc/config"},
    ]
    check = "import os,pathlib; assert pathlib.Path('/etc/config/a.txt').read_text()=='plain'; assert os.environ['C_a.txt']=='plain'"
    server["startupProbe"] = {"exec": {"command": ["python", "-c", check]}, "timeoutSeconds": 10}
    spec["volumes"] = [{"name": "models", "emptyDir": {}}, {"name": "config", "configMap": {"name": "given"}}]
    init = {"name": "fetch", "image": "titleshot:test", "imagePullPolicy": "Never", "command": ["python", "-c", fetch]}
    init |= {"volumeMounts": server["volumeMounts"], "env": server["env"]}
    beside = (
        "import pathlib,time; root=pathlib.Path('/repository'); print(sorted(str(p.relative_to(root)) for p in root.glob('m/*')), flush=True);"
        "print((root/'m/3/try1').read_text(), flush=True); time.sleep(99)"
    )
    sidecar = {**init, "name": "beside", "restartPolicy": "Always", "command": ["python", "-c", beside]}
    sidecar["volumeMounts"] = [{"name": "models", "mountPath": "/repository/m/3"}]
    deploy(cluster, "fed", 1, {**spec, "initContainers": [init, sidecar]})
    ready(cluster, "fed", 1)
    pod = pod_of(cluster, "fed")
    name = pod["metadata"]["name"]
    status = pod["status"]["initContainerStatuses"][0]
    assert (status["restartCount"], status["state"]["terminated"]["reason"]) == (1, "Completed")
    assert status["lastState"]["terminated"]["exitCode"] == 7
    assert f"secret-{name}-$(NOPE)-$(A)".encode() in cluster.node.log(SPACE, name)
    text = cluster.api.request(
        "GET", Api.path("Pod", SPACE, name, "log"), query={"container": "fetch", "previous": "true"}, stream=True
    ).read()
    assert text == b"try 0\n"
    environment = Path(f"/proc/{cluster.node.pid(SPACE, name)}/environ").read_bytes().decode()
    where = environment.split("WHERE=")[1].split("\0")[0]
    assert where.endswith("/volumes/models/3")
    assert (Path(where).parent / "try1").read_text() == "secret"
    until(lambda: cluster.node.log(SPACE, name, "beside") == b"['m/3']\nsecret\n", message=cluster.state())
    remove(cluster, "fed")


@pytest.mark.long
def test_a_container_that_crashes_is_restarted_with_back_off_and_one_that_hangs_by_its_probe(cluster):
    """CrashLoopBackOff with the last state and the log before; a failing liveness probe restarts; readiness takes out of the endpoints."""
    bad = {
        "terminationGracePeriodSeconds": 1,
        "containers": [{**pod_spec("bad")["containers"][0], "command": ["python", "-c", "print('no'); exit(3)"]}],
    }
    deploy(cluster, "bad", 1, bad, progressDeadlineSeconds=1)
    live = pod_spec(
        "sick", livenessProbe={"httpGet": {"path": "/live", "port": 8080}, "periodSeconds": 1, "failureThreshold": 15}
    )
    deploy(cluster, "sick", 1, live)
    ready(cluster, "sick", 1)

    def waiting():
        status = pod_of(cluster, "bad")["status"]["containerStatuses"][0]
        return (
            status["restartCount"] > 0
            and status["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff"
            and status
        )

    status = until(waiting, message=cluster.state())
    assert status["lastState"]["terminated"]["exitCode"] == 3
    assert "back-off" in status["state"]["waiting"]["message"]
    name = pod_of(cluster, "bad")["metadata"]["name"]
    assert cluster.node.log(SPACE, name, previous=True) == b"no\n"
    until(lambda: {"BackOff", "Pulled", "Created", "Started", "Scheduled"} <= reasons(cluster, name))
    until(
        lambda: (
            condition(cluster.api.get("Deployment", "bad", SPACE), "Progressing").get("reason")
            == "ProgressDeadlineExceeded"
        )
    )
    address = pod_of(cluster, "sick")["status"]["podIP"]

    def endpoint():
        slices = cluster.api.items("EndpointSlice", SPACE, "kubernetes.io/service-name=sick")
        return [(one["addresses"][0], one["conditions"]["ready"]) for one in slices[0]["endpoints"]]

    until(lambda: endpoint() == [(address, True)])
    httpx.get(f"http://{address}:8080/ready/off")
    until(lambda: endpoint() == [(address, False)])
    with contextlib.suppress(httpx.HTTPError):  # the restart may be faster than the answer
        httpx.get(f"http://{address}:8080/live/off")
    until(lambda: pod_of(cluster, "sick")["status"]["containerStatuses"][0]["restartCount"] > 0)
    ready(cluster, "sick", 1)
    until(lambda: {"Unhealthy", "Killing"} <= reasons(cluster, pod_of(cluster, "sick")["metadata"]["name"]))
    assert pod_of(cluster, "sick")["status"]["containerStatuses"][0]["lastState"]["terminated"]["reason"] == "Completed"
    remove(cluster, "bad", "sick")


def test_what_cannot_run_here_says_why(cluster):
    """More than the node has: Unschedulable. An image that is not loaded: ErrImageNeverPull, or ImagePullBackOff; loaded later, it starts."""
    deploy(
        cluster,
        "big",
        1,
        pod_spec("big", resources={"limits": {"nvidia.com/gpu": 1}, "requests": {"nvidia.com/gpu": 1}}),
    )
    deploy(
        cluster,
        "small",
        1,
        pod_spec("small", resources={"limits": {"example.com/gpu": 1}, "requests": {"example.com/gpu": 1}}),
    )
    deploy(cluster, "never", 1, pod_spec("never", image="absent:1"))
    deploy(cluster, "pulled", 1, pod_spec("pulled", image="absent:1", imagePullPolicy="IfNotPresent"))
    scheduled = until(lambda: condition(pod_of(cluster, "big"), "PodScheduled"))
    assert (scheduled["status"], scheduled["reason"]) == ("False", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in scheduled["message"]
    until(lambda: "FailedScheduling" in reasons(cluster, pod_of(cluster, "big")["metadata"]["name"]))
    ready(cluster, "small", 1)

    def why(name):
        return pod_of(cluster, name)["status"]["containerStatuses"][0]["state"].get("waiting", {}).get("reason")

    until(lambda: why("never") == "ErrImageNeverPull")
    until(lambda: why("pulled") == "ImagePullBackOff")
    cluster.node.images["absent:1"] = Image((), cluster.node.images["titleshot:test"].environment)
    ready(cluster, "never", 1)
    ready(cluster, "pulled", 1)
    remove(cluster, "big", "small", "never", "pulled")


def test_jobs_end_well_or_after_their_back_off(cluster):
    """Completed with its pods' count, or Failed with BackoffLimitExceeded; a job that is done goes after its time to live."""

    def job(name, code, **spec):
        container = {
            "name": "main",
            "image": "titleshot:test",
            "imagePullPolicy": "Never",
            "command": ["python", "-c", f"exit({code})"],
        }
        template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
        meta = {"name": name, "namespace": SPACE}
        cluster.api.create(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": {"template": template, **spec}}
        )

    job("good", 0, completions=2, parallelism=2)
    job("poor", 5, backoffLimit=0)
    job("brief", 0, ttlSecondsAfterFinished=0)
    done = until(lambda: condition(cluster.api.get("Job", "good", SPACE), "Complete"), message=cluster.state())
    assert (done["status"], cluster.api.get("Job", "good", SPACE)["status"]["succeeded"]) == ("True", 2)
    failed = until(lambda: condition(cluster.api.get("Job", "poor", SPACE), "Failed"))
    assert (failed["status"], failed["reason"]) == ("True", "BackoffLimitExceeded")
    until(lambda: cluster.api.get("Job", "brief", SPACE) is None)


@pytest.mark.long
def test_it_goes_on_after_the_api_server_was_away_and_a_process_was_killed(cluster):
    """Watches are taken up again; a killed container is restarted; an evicted pod is replaced; a budget is counted."""
    deploy(cluster, "tough", 1)
    budget = {"selector": {"matchLabels": {"app": "tough"}}, "minAvailable": 1}
    meta = {"name": "tough", "namespace": SPACE}
    cluster.api.create({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": meta, "spec": budget})
    ready(cluster, "tough", 1)
    first = pod_of(cluster, "tough")["metadata"]["name"]
    with cluster.server.away():
        os.kill(cluster.node.pid(SPACE, first), signal.SIGKILL)
    cluster.server.compact()
    status = until(
        lambda: (s := pod_of(cluster, "tough")["status"]["containerStatuses"][0])["restartCount"] > 0 and s,
        message=cluster.state(),
    )
    assert status["lastState"]["terminated"]["exitCode"] == 137
    ready(cluster, "tough", 1)
    until(lambda: cluster.api.get("PodDisruptionBudget", "tough", SPACE)["status"].get("currentHealthy") == 1)
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first, "namespace": SPACE}}
    with pytest.raises(ApiError) as refused:
        cluster.api.request("POST", Api.path("Pod", SPACE, first, "eviction"), eviction)
    assert refused.value.code == 429
    cluster.node.evict(SPACE, first)
    until(
        lambda: any(one["metadata"]["name"] != first for one in cluster.ready({"app": "tough"})),
        message=cluster.state(),
    )
    gone = cluster.api.get("Pod", first, SPACE)["status"]
    assert (gone["phase"], gone["reason"]) == ("Failed", "Evicted")
    remove(cluster, "tough")


@pytest.mark.long
def test_a_new_template_rolls_out_and_quantities_and_addresses_are_understood(cluster):
    """The second ReplicaSet takes over; two pods never share an address."""
    deploy(cluster, "rolled", 2)
    ready(cluster, "rolled", 2)
    before = {one["metadata"]["name"] for one in cluster.pods({"app": "rolled"})}
    cluster.api.patch(
        "Deployment", SPACE, "rolled", {"spec": {"template": {"metadata": {"annotations": {"again": "1"}}}}}
    )

    def renewed():
        names = {one["metadata"]["name"] for one in cluster.ready({"app": "rolled"})}
        return len(names) == 2 and not names & before and len(cluster.pods({"app": "rolled"})) == 2

    until(renewed, message=cluster.state())
    assert (
        cluster.api.get("Deployment", "rolled", SPACE)["metadata"]["annotations"]["deployment.kubernetes.io/revision"]
        == "2"
    )
    assert [quantity(text) for text in ("500m", "1Gi", 2, "1e3")] == [0.5, 2**30, 2, 1000]
    two = [Address(cluster.node.network) for _ in range(2)]
    assert two[0].ip != two[1].ip
    for one in two:
        one.free()
    assert json.dumps(cluster.controllers.errors) == "[]"
    remove(cluster, "rolled")

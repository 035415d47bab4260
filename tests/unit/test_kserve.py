"""Versions as InferenceServices: golden files, the published CRD, and a target beside a KServe of the tests' own.

`python -m tests.unit.test_kserve` writes the golden files anew; read the difference before you commit it.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from deployments import recorder
from deployments.artifact import digest
from deployments.kserve import target as kserve
from deployments.kserve.manifests import ANSWERS, MODELS, version_objects
from deployments.kserve.manifests import MODEL as CONTAINER
from deployments.kserve.target import KServeTarget, standing
from deployments.kubernetes import names
from deployments.kubernetes.cluster import Artifact, Autoscale, Cluster, Gateway, Json, Program, Resources
from deployments.local.server import WRONG_DIGEST
from deployments.runtimes import serving
from deployments.target import NeverReady, TargetError, Traffic, Version
from tests.cluster import rest, schema
from tests.cluster.apiserver import ApiServer
from tests.cluster.rest import Api, ApiError
from tests.unit.test_manifests import DIGEST, MODEL, ONNX, PYFUNC, TRANSFORMERS, by_kind, version

GOLDEN = Path(__file__).parent / "golden" / "kserve"
CRD = schema.CRDS / "serving.kserve.io_inferenceservices.yaml"
PUBLISHED = pytest.mark.skipif(not CRD.exists(), reason="KServe's CRD is not beside the repository (shared/data/crds)")
rest.KINDS.setdefault("InferenceService", ("serving.kserve.io/v1beta1", "inferenceservices", True))
CLUSTER = Cluster(
    namespace="models",
    gateway=Gateway(name="edge", url="http://127.0.0.1:9"),
    artifact=Artifact(storage_uri="s3://models/{model}/{version}", secret="store"),
)
GPU = CLUSTER.model_copy(
    update={
        "resources": Resources(requests={"cpu": "4", "memory": "24Gi"}, limits={"memory": "24Gi", "nvidia.com/gpu": 1}),
        "autoscale": Autoscale(cpu=None),
        "artifact": Artifact(storage_uri="pvc://models/{model}/{digest}"),
        "pod": {"serviceAccountName": "reader", "nodeSelector": {"accelerator": "a100"}},
    }
)
TRITON = CLUSTER.model_copy(
    update={"kserve_runtime": "kserve-tritonserver", "autoscale": Autoscale(cpu=70, memory=60), "recorder": False}
)


LLAMA = "flavors:\n  python_function:\n    artifacts:\n      gguf:\n        path: artifacts/smol.gguf\n"
LLAMAS = {"titleshot.runtime": "llama.cpp"}


def objects(cluster: Cluster, mlmodel: str = PYFUNC, tags: dict[str, str] | None = None) -> list[Json]:
    known = {"triton": Program(image="KServe's"), "llama.cpp": Program(image="llama:1")} | dict(cluster.programs)
    how = serving(mlmodel, tags or {}, known)
    return version_objects(cluster, version(), how, promotion="brave-owl", fence=7)


def predictor(made: list[Json]) -> Json:
    found: Json = by_kind(made, "InferenceService")["spec"]["predictor"]
    return found


CASES: dict[str, Callable[[], list[Json]]] = {
    "version": lambda: objects(CLUSTER),
    "version.gpu": lambda: objects(GPU, TRANSFORMERS),
    "version.triton": lambda: objects(TRITON, ONNX),
    "version.custom": lambda: objects(CLUSTER, LLAMA, LLAMAS),
}


@pytest.fixture(scope="module")
def server():
    with ApiServer() as server:
        server.add({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}})
        yield server


@pytest.fixture
def api(server, tmp_path) -> Api:
    server.kubeconfig(tmp_path / "kubeconfig", namespace="models")
    return Api(tmp_path / "kubeconfig")


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    """The objects are what was read and agreed to."""
    assert CASES[name]() == list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text()))


@PUBLISHED
@pytest.mark.parametrize("name", CASES)
def test_the_api_server_would_take_them(name, api):
    """Every field is one of the published CRD, and of its type; none that it asks for is missing."""
    for one in CASES[name]():
        path = api.path(one["kind"], "models", one["metadata"]["name"])
        query = {"fieldManager": "tests", "fieldValidation": "Strict", "dryRun": "All"}
        api.request("PATCH", path, one, query=query, kind="application/apply-patch+yaml")


@PUBLISHED
def test_the_api_server_would_refuse_a_slip(api):
    """The check above sees something: a field that is not there, one of another type, one that is missing."""

    def refused(change: Callable[[Json], None]) -> str:
        one = by_kind(objects(CLUSTER), "InferenceService")
        change(one["spec"]["predictor"])
        path = api.path("InferenceService", "models", "x")
        query = {"fieldManager": "tests", "fieldValidation": "Strict", "dryRun": "All"}
        one["metadata"]["name"] = "x"
        with pytest.raises(ApiError) as error:
            api.request("PATCH", path, one, query=query, kind="application/apply-patch+yaml")
        return error.value.message

    assert "storageURI" in refused(lambda spec: spec["model"].update(storageURI="s3://x"))
    assert "minReplicas" in refused(lambda spec: spec.update(minReplicas="two"))
    assert "scaleMetric" in refused(lambda spec: spec.update(scaleMetric="gpu"))
    assert "modelFormat.name" in refused(lambda spec: spec["model"].update(modelFormat={}))


def test_requests_reach_kserves_pods_by_a_service_of_ours():
    """One that the same HTTPRoute names, with a port for each kind of traffic, before the pods of this predictor."""
    service = by_kind(objects(CLUSTER), "Service")
    assert service["metadata"]["name"] == "flight-delay-v3"
    assert {one["name"]: one["targetPort"] for one in service["spec"]["ports"]} == names.PORTS
    assert service["spec"]["selector"] == {
        "serving.kserve.io/inferenceservice": "flight-delay-v3",
        "component": "predictor",
    }
    assert predictor(objects(CLUSTER)).keys().isdisjoint({"canaryTrafficPercent"})


def test_pods_are_labelled_as_ours_and_not_annotated_by_a_promotion():
    """KServe hands labels and annotations on to the pods: so they are found by ours, and nothing restarts them."""
    found = by_kind(objects(CLUSTER), "InferenceService")
    assert found["metadata"]["labels"].items() >= names.labels(MODEL, "3").items()
    assert not {names.FENCE, names.PROMOTION} & {*found["metadata"]["annotations"]}
    later = version_objects(CLUSTER, version(), serving(PYFUNC, {}, {}), promotion="calm-fox", fence=8)
    assert by_kind(later, "InferenceService") == found


def test_the_recorder_gets_the_artifact_and_verifies_it():
    """KServe mounts it into this container; nobody else compares its digest with the one that was admitted."""
    (recorder,) = predictor(objects(CLUSTER))["containers"]
    command = recorder["command"]
    assert recorder["name"] == ANSWERS
    assert command[command.index("--path") + 1] == MODELS
    assert command[command.index("--digest") + 1] == DIGEST
    assert "--verify" in command
    # KServe's own Service leads to all ports that are named here.
    assert [one["containerPort"] for one in recorder["ports"]] == [names.PORTS["live"]]


def test_an_mlflow_model_is_mlservers_and_answers_as_ours_does():
    """MLServer listens where the recorder asks it, under a name that is the same for every version."""
    model = predictor(objects(CLUSTER))["model"]
    assert (model["modelFormat"], model["protocolVersion"]) == ({"name": "mlflow"}, "v2")
    assert model["storageUri"] == "s3://models/flight-delay/3"
    said = {one["name"]: one.get("value") for one in model["env"]}
    assert said["MLSERVER_MODEL_NAME"] == MODEL
    assert said["MLSERVER_HTTP_PORT"] == str(names.RUNTIME)
    assert said["MLSERVER_METRICS_PORT"] not in {str(port) for port in names.PORTS.values()}
    (recorder,) = predictor(objects(CLUSTER))["containers"]
    assert recorder["command"][recorder["command"].index("--infer-path") + 1] == "/invocations"


def test_what_kserve_has_no_runtime_for_it_gets_from_us():
    """llama.cpp comes with its own image and command; KServe fetches the artifact for it all the same."""
    runtime, recorder = predictor(objects(CLUSTER, LLAMA, LLAMAS))["containers"]
    assert "model" not in predictor(objects(CLUSTER, LLAMA, LLAMAS))
    assert (runtime["name"], runtime["image"], recorder["name"]) == (CONTAINER, "llama:1", ANSWERS)
    assert runtime["command"][:3] == ["/app/llama-server", "-m", "/mnt/models/artifacts/smol.gguf"]
    assert {"name": "STORAGE_URI", "value": "s3://models/flight-delay/3"} in runtime["env"]
    assert "STORAGE_URI" not in {one["name"] for one in recorder["env"]}


def test_a_serving_runtime_of_the_users_is_given_their_arguments():
    """Theirs alone: we do not know what it listens to."""
    cluster = CLUSTER.model_copy(update={"kserve_runtime": "llama"})
    with pytest.raises(TargetError, match=r"say in programs\.llama\.cpp\.command"):
        objects(cluster, LLAMA, LLAMAS)
    program = Program(image="here:1", command=("-m", "{path}", "--host", "{host}", "--port", "{port}"))
    cluster = cluster.model_copy(update={"programs": {"llama.cpp": program}})
    model = predictor(objects(cluster, LLAMA, LLAMAS))["model"]
    assert (model["runtime"], model["image"], "protocolVersion" in model) == ("llama", "here:1", False)
    assert model["args"] == ["-m", "/mnt/models/artifacts/smol.gguf", "--host", "$(POD_IP)", "--port", "8070"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"artifact": Artifact()}, r"artifact\.storage_uri is not set"),
        ({"autoscale": Autoscale(metric="tokens", average="4")}, r"knows cpu and memory only"),
        ({"resources": Resources(requests={"memory": "1Gi"}, limits={})}, r"requests no cpu"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, why):
    """Each is one line that says what to change."""
    with pytest.raises(TargetError, match=why):
        objects(CLUSTER.model_copy(update=change))


# --- how one stands


def isvc(*conditions: tuple[str, str], **status) -> Json:
    return {
        "metadata": {"name": "x", "generation": 1},
        "status": {"conditions": [{"type": kind, "status": said} for kind, said in conditions], **status},
    }


def warm(*ready: bool) -> list[Json]:
    said = [{"type": "Ready", "status": "True" if one else "False"} for one in ready]
    return [{"metadata": {"name": f"p{i}"}, "status": {"conditions": [one]}} for i, one in enumerate(said)]


def test_it_stands_when_kserve_and_the_pods_say_so():
    """Pods count once KServe calls all of it ready; a status about something older says nothing."""
    assert standing(isvc(("Ready", "True")), warm(True, False), 2).ready == 1
    late = standing(isvc(("Ready", "False"), ("PredictorReady", "Unknown")), warm(True, True), 2)
    assert (late.ready, late.refused) == (0, "")
    assert "PredictorReady: Unknown" in late.why
    assert standing(isvc(("Ready", "True"), observedGeneration=0), warm(True), 1).ready == 0
    assert standing({"metadata": {}}, warm(True), 1).why == "KServe has not looked at it yet"
    assert standing(None, warm(True), 1).ready == 0


def test_what_kserve_will_never_do_is_told_from_what_it_has_not_done_yet():
    """An unsupported format is final; a runtime that is not there may be installed."""
    failure = {"reason": "NoSupportingRuntime", "message": "No runtime found to support specified framework/version"}
    model = {"transitionStatus": "InvalidSpec", "lastFailureInfo": failure}
    assert (
        "NoSupportingRuntime: No runtime found" in standing(isvc(("Ready", "False"), modelStatus=model), [], 1).refused
    )
    waits = {"transitionStatus": "InvalidSpec", "lastFailureInfo": {"reason": "RuntimeNotRecognized"}}
    assert not standing(isvc(("Ready", "False"), modelStatus=waits), [], 1).refused


# --- the target, beside a KServe of the tests' own


class KServe:
    """What KServe and a Gateway's controller do about our objects, as far as the target can see: pods with the labels
    and annotations of the InferenceService (and new ones where those change), endpoints, statuses. Nothing runs.
    """

    OWN = ("modelFormat", "protocolVersion", "runtime", "storageUri")

    def __init__(self, api: Api, broken: bool = False) -> None:
        self.api, self.broken, self.stop = api, broken, threading.Event()

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield self
        finally:
            self.stop.set()
            thread.join()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            try:
                self.round()
            except ApiError as error:  # whatever is not a race is a mistake of these tests
                # Objects are applied in any order: a pod is tried again once its account is there.
                early = "error looking up service account" in str(error)
                if error.code not in {404, 409} and not early:
                    raise

    def round(self) -> None:
        wanted = {one["metadata"]["name"]: one for one in self.api.items("InferenceService", "models")}
        for pod in self.api.items("Pod", "models"):
            of = wanted.get(pod["metadata"]["labels"]["serving.kserve.io/inferenceservice"])
            if of is None or of["metadata"]["annotations"] != pod["metadata"]["annotations"]:
                self.api.delete("Pod", "models", pod["metadata"]["name"], gracePeriodSeconds=0)
        for name, one in wanted.items():
            self.pods(one)
            if one.get("status", {}).get("observedGeneration") != one["metadata"]["generation"]:
                said = {"type": "Ready", "status": "False" if self.broken else "True", "message": "as it is"}
                status = {"observedGeneration": one["metadata"]["generation"], "conditions": [said]}
                self.api.replace({**one, "status": status}, "status")
            self.slice(name)
        for route in self.api.items("HTTPRoute", "models"):
            self.route(route)

    def pods(self, one: Json) -> None:
        name = f"{one['metadata']['name']}-predictor-0"
        if self.api.get("Pod", name, "models") is not None:
            return
        spec = one["spec"]["predictor"]
        labels = {
            **one["metadata"]["labels"],
            "serving.kserve.io/inferenceservice": one["metadata"]["name"],
            "component": "predictor",
        }
        scaling = ("Replicas", "Metric", "Target", "Scaling", "Strategy")
        own = {
            key: value
            for key, value in spec.items()
            if key not in {"annotations", "model"} and not key.endswith(scaling)
        }
        model = {key: value for key, value in spec["model"].items() if key not in KServe.OWN}
        first = {"name": "kserve-container", "image": "mlserver:1", **model}
        pod_spec = {**own, "containers": [first, *spec.get("containers", [])]}
        meta = {"name": name, "namespace": "models", "labels": labels, "annotations": one["metadata"]["annotations"]}
        pod = self.api.create({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod_spec})
        ready = {"type": "Ready", "status": "False" if self.broken else "True"}
        crashed = {"terminated": {"exitCode": 3, "reason": "Error"}}
        status = {"name": ANSWERS, "image": "", "imageID": "", "ready": not self.broken, "restartCount": 1}
        status |= {"state": crashed} if self.broken else {"state": {"running": {}}}
        self.api.replace(
            {**pod, "status": {"phase": "Running", "conditions": [ready], "containerStatuses": [status]}}, "status"
        )

    def slice(self, name: str) -> None:
        service = self.api.get("Service", name, "models")
        if service is None or self.broken or self.api.get("EndpointSlice", name, "models") is not None:
            return
        pods = self.api.items("Pod", "models", ",".join(f"{k}={v}" for k, v in service["spec"]["selector"].items()))
        self.api.create(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "addressType": "IPv4",
                "metadata": {"name": name, "namespace": "models", "labels": {"kubernetes.io/service-name": name}},
                "ports": [{"name": one["name"], "port": one["targetPort"]} for one in service["spec"]["ports"]],
                "endpoints": [
                    {
                        "addresses": ["127.0.0.1"],
                        "conditions": {"ready": True},
                        "targetRef": {"kind": "Pod", "name": pod["metadata"]["name"]},
                    }
                    for pod in pods
                ],
            }
        )

    def route(self, route: Json) -> None:
        generation = route["metadata"]["generation"]
        conditions = [
            {
                "type": kind,
                "status": "True",
                "reason": kind,
                "message": "",
                "observedGeneration": generation,
                "lastTransitionTime": rest.now(),
            }
            for kind in ("Accepted", "ResolvedRefs")
        ]
        parents = [
            {"parentRef": ref, "controllerName": "example.test/gateway", "conditions": conditions}
            for ref in route["spec"].get("parentRefs", [])
        ]
        said = route.get("status", {}).get("parents", [])
        if [one["conditions"][0]["observedGeneration"] for one in said] != [generation] * len(parents):
            self.api.replace({**route, "status": {"parents": parents}}, "status")


@pytest.fixture
def clean(api):
    """Nothing of the tests before."""
    for kind in (
        "HTTPRoute",
        "InferenceService",
        "Service",
        "EndpointSlice",
        "Pod",
        "PodDisruptionBudget",
        "Lease",
        "ConfigMap",
    ):
        for one in api.items(kind, "models"):
            api.delete(kind, "models", one["metadata"]["name"], gracePeriodSeconds=0)
    return api


def downloaded(tmp_path: Path, number: str) -> Version:
    folder = tmp_path / f"v{number}"
    folder.mkdir()
    (folder / "MLmodel").write_text(f"{PYFUNC}run_id: {number}\n")
    return Version(MODEL, number, folder, digest(folder))


def at(tmp_path: Path, **more) -> KServeTarget:
    more = {
        "replicas": 1,
        "ready_timeout": 20,
        "answer_timeout": 1,
        "patience": 5,
        "autoscale": Autoscale(cpu=None),
        **more,
    }
    return KServeTarget(CLUSTER.model_copy(update={"kubeconfig": tmp_path / "kubeconfig", **more}))


def test_versions_are_deployed_routed_and_retired(clean, tmp_path):
    """The verbs are those of Kubernetes; that a version is admitted, and by which lease, restarts none of its pods."""
    target = at(tmp_path)
    fence = target.lease(MODEL, "p-1")
    with KServe(clean).running():
        for number in ("1", "2"):
            target.deploy(downloaded(tmp_path, number), fence)
        pods = {one["metadata"]["name"]: one["metadata"]["uid"] for one in clean.items("Pod", "models")}
        target.route(Traffic(MODEL, "1", "2", weight=500), fence)
        assert target.traffic(MODEL) == Traffic(MODEL, "1", "2", weight=500)
        assert set(target.deployed(MODEL)) == {"1", "2"}
        assert target.kind_of(MODEL) == "kserve"
        later = target.lease(MODEL, "p-2", take=True)
        target.deploy(Version(MODEL, "2", tmp_path / "v2", digest(tmp_path / "v2")), later)
        target.route(Traffic(MODEL, "2"), later)
        assert {one["metadata"]["name"]: one["metadata"]["uid"] for one in clean.items("Pod", "models")} == pods
        target.retire(MODEL, "1", later)
    assert set(target.deployed(MODEL)) == {"2"}
    assert [one["metadata"]["name"] for one in clean.items("InferenceService", "models")] == ["flight-delay-v2"]


def test_a_version_whose_artifact_is_another_is_its_own_fault(clean, tmp_path):
    """The recorder ends, KServe never calls it ready; nothing of it stays."""
    target = at(tmp_path)
    fence = target.lease(MODEL, "p-1")
    with KServe(clean, broken=True).running(), pytest.raises(NeverReady, match=f"container {ANSWERS} .* exit code 3"):
        target.deploy(downloaded(tmp_path, "1"), fence)
    assert not clean.items("InferenceService", "models")
    assert not target.deployed(MODEL)


def test_the_recorder_ends_before_it_listens_where_the_digest_is_another(tmp_path, monkeypatch, capsys):
    """What KServe has fetched is not what was admitted: one line, and the exit code that says so."""
    found = downloaded(tmp_path, "1")
    ports = ["--port", "1", "--ready-path", "/r", "--infer-path", "/i", "--verify"]
    told = ["--model", MODEL, "--version", "1", "--path", str(found.path), "--digest", "sha256:ab", *ports]
    monkeypatch.setattr("sys.argv", ["recorder", *told])
    assert recorder.main() == WRONG_DIGEST
    said = capsys.readouterr().err
    assert said == f"{MODEL} 1 is not what was admitted: its digest is {found.digest}, admitted was sha256:ab\n"


def test_an_image_is_the_serving_runtimes_affair(tmp_path):
    """Where our own target must be told an image, KServe has one; where KServe has none, an image is asked for."""
    folder = tmp_path / "v1"
    folder.mkdir()
    (folder / "MLmodel").write_text(ONNX)
    found = Version(MODEL, "1", folder, "sha256:ab")
    made = version_objects(CLUSTER, found, kserve.serving(found, CLUSTER), promotion="p", fence=1)
    assert "image" not in predictor(made)["model"]
    (folder / "MLmodel").write_text(f"{LLAMA}metadata:\n  titleshot.runtime: llama.cpp\n")
    with pytest.raises(TargetError, match=r"no image is known for llama\.cpp"):
        kserve.serving(found, CLUSTER)


if __name__ == "__main__":
    for name, make in CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(yaml.safe_dump_all(make(), sort_keys=False, width=120))

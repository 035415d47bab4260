"""A version's objects as values: golden files, the API's own schemas, and what every pod has, whatever serves.

`python -m tests.unit.test_manifests` writes the golden files anew; read the difference before you commit it.
"""

import re
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from deployments.kubernetes import manifests, names
from deployments.kubernetes.cluster import Artifact, Autoscale, Cluster, Gateway, Json, Program, Resources
from deployments.kubernetes.manifests import enough, overlay, version_objects
from deployments.runtimes import Runtime, Serving, serving
from deployments.target import TargetError, Version

GOLDEN = Path(__file__).parent / "golden" / "kubernetes"
MODEL = "flight-delay"
DIGEST = "sha256:0123456789abcdef"
CLUSTER = Cluster(
    namespace="models",
    gateway=Gateway(name="edge", url="http://127.0.0.1:8000"),
    artifact=Artifact(tracking_uri="http://mlflow.models:5000", env={"AWS_REGION": "eu"}, secret="store"),
    pull_secrets=("registry",),
)
PYFUNC = "flavors:\n  python_function:\n    loader_module: mlflow.sklearn\n  sklearn:\n    code: null\n"
ONNX = "flavors:\n  onnx:\n    data: model.onnx\n"
TRANSFORMERS = "flavors:\n  transformers:\n    model_binary: model\n    components:\n    - tokenizer\n"
TRITON = Program(image="mirror.example.test/tritonserver:25.10-py3")
GPU = CLUSTER.model_copy(
    update={
        "resources": Resources(requests={"cpu": "4", "memory": "24Gi"}, limits={"memory": "24Gi", "nvidia.com/gpu": 1}),
        "autoscale": Autoscale(cpu=None, metric="vllm_num_requests_waiting", average="4", maximum=4),
        "answer_timeout": 300.5,
        "ready_timeout": 1200,
        "enough": 1,
        "pod": {
            "nodeSelector": {"accelerator": "a100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "runtimeClassName": "nvidia",
            "containers": [{"name": "server", "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "WARNING"}]}],
        },
    }
)
CARRIED = CLUSTER.model_copy(
    update={
        "image": "registry.example.test/titleshot:1",
        "pull_policy": "Never",
        "python": "/opt/venv/bin/python",
        "artifact": Artifact(by="image", path="/opt/models/{model}/{version}"),
        "programs": {
            "mlflow-scoring": Program(image="registry.example.test/{model}:v{version}", env={"SEED": "{version}"})
        },
        "autoscale": Autoscale(cpu=None),
        "drain": 0,
    }
)
FOREIGN = CLUSTER.model_copy(
    update={
        "programs": {
            "triton": TRITON,
            "recorder": Program(resources=Resources(requests={"cpu": "200m", "memory": "1Gi"}, limits={})),
            "fetcher": Program(image="registry.example.test/fetch:1", pull_policy="Always", env={"TO": "{path}"}),
        }
    }
)


def version(model: str = MODEL, env_manager: str = "local") -> Version:
    return Version(model, "3", Path("/nowhere"), DIGEST, env_manager)


def objects(
    cluster: Cluster, mlmodel: str = PYFUNC, tags: dict[str, str] | None = None, model: str = MODEL
) -> list[Json]:
    how = serving(mlmodel, tags or {}, cluster.programs)
    return version_objects(cluster, version(model), how, promotion="brave-owl", fence=7)


CASES: dict[str, Callable[[], list[Json]]] = {
    "version": lambda: objects(CLUSTER),
    "version.gpu": lambda: objects(GPU, TRANSFORMERS),
    "version.image-carried": lambda: objects(CARRIED),
    "version.foreign": lambda: objects(FOREIGN, ONNX),
}
MLMODELS = {
    Runtime.MLFLOW_SCORING: PYFUNC,
    Runtime.LLAMA_CPP: "flavors:\n  python_function:\n    artifacts:\n      gguf:\n        path: artifacts/smol.gguf\n",
    Runtime.TORCHSERVE: "flavors:\n  python_function:\n    artifacts:\n      mar:\n        path: artifacts/m.mar\n",
}


def of(runtime: Runtime, cluster: Cluster = CLUSTER) -> list[Json]:
    """The objects of a version that `runtime` serves."""
    cluster = cluster.model_copy(update={"programs": {runtime: Program(image="here:1"), **cluster.programs}})
    return objects(cluster, MLMODELS.get(runtime, "flavors:\n  custom:\n    x: 1\n"), {"titleshot.runtime": runtime})


def by_kind(made: list[Json], kind: str) -> Json:
    return next(one for one in made if one["kind"] == kind)


def pod(made: list[Json]) -> Json:
    spec: Json = by_kind(made, "Deployment")["spec"]["template"]["spec"]
    return spec


def containers(made: list[Json]) -> dict[str, Json]:
    spec = pod(made)
    return {one["name"]: one for one in (*spec.get("initContainers", []), *spec["containers"])}


def environment(container: Json) -> dict[str, str | None]:
    return {one["name"]: one.get("value") for one in container["env"]}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """The objects are what was read and agreed to."""
    assert CASES[name]() == list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", [*CASES, *Runtime])
def test_the_api_server_would_take_them(name: str) -> None:
    """Each object has the fields of its kind and no others, by the API's own schema."""
    for one in CASES[name]() if name in CASES else of(Runtime(name)):
        kubernetes_validate.validate(one, "1.36", strict=True)


def test_what_is_made_and_in_which_order() -> None:
    """What others refer to comes first; there is an autoscaler only where something is to be measured."""
    kinds = ["ServiceAccount", "Service", "Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler"]
    assert [one["kind"] for one in objects(CLUSTER)] == kinds
    assert [one["kind"] for one in objects(CARRIED)] == kinds[:-1]
    for one in objects(CLUSTER):
        meta = one["metadata"]
        assert (meta["name"], meta["namespace"]) == ("flight-delay-v3", "models")
        assert meta["labels"] == names.labels(MODEL, "3")
        assert meta["annotations"] == {
            names.MODEL_NAME: MODEL,
            names.DIGEST: DIGEST,
            names.PROMOTION: "brave-owl",
            names.FENCE: "7",
        }


def test_no_two_objects_share_a_part() -> None:
    """Who writes a resourceVersion into one object has written it into no other."""
    first, *others = objects(CLUSTER)
    first["metadata"]["resourceVersion"] = "1"
    assert all("resourceVersion" not in one["metadata"] for one in others)


@pytest.mark.parametrize("runtime", Runtime)
def test_another_promotion_restarts_no_pod(runtime: Runtime) -> None:
    """Who promotes and under which lease is no part of the pods."""
    cluster = CLUSTER.model_copy(update={"programs": {runtime: Program(image="here:1")}})
    how = serving(MLMODELS.get(runtime, ONNX), {"titleshot.runtime": runtime}, cluster.programs)
    one, other = (
        version_objects(cluster, version(), how, promotion=promotion, fence=fence)
        for promotion, fence in (("brave-owl", 7), ("calm-fox", 8))
    )
    assert [part.get("spec") for part in one] == [part.get("spec") for part in other]


def test_who_sets_the_replicas() -> None:
    """The number of pods is the autoscaler's where there is one, from the first on; ours where there is none."""
    made = objects(CLUSTER)
    assert "replicas" not in by_kind(made, "Deployment")["spec"]
    scaler = by_kind(made, "HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 10)
    assert scaler["scaleTargetRef"]["name"] == by_kind(made, "Deployment")["metadata"]["name"]
    assert by_kind(objects(CARRIED), "Deployment")["spec"]["replicas"] == 2
    many = objects(CLUSTER.model_copy(update={"replicas": 20}))
    assert by_kind(many, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] == 20


def test_what_the_autoscaler_measures() -> None:
    """CPU, memory, or a metric of the pods; a share of what nobody requested is refused."""
    scale = Autoscale(cpu=70, memory=60, metric="tokens", average="100")
    (cpu, memory, metric) = by_kind(
        objects(CLUSTER.model_copy(update={"autoscale": scale})), "HorizontalPodAutoscaler"
    )["spec"]["metrics"]
    assert cpu["resource"] == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
    assert memory["resource"]["name"] == "memory"
    assert metric["pods"] == {
        "metric": {"name": "tokens"},
        "target": {"type": "AverageValue", "averageValue": "100"},
    }
    bare = CLUSTER.model_copy(update={"resources": Resources(requests={"memory": "1Gi"}, limits={})})
    with pytest.raises(TargetError, match="container server requests no cpu"):
        objects(bare)
    with pytest.raises(TargetError, match="go together"):
        objects(CLUSTER.model_copy(update={"autoscale": Autoscale(metric="tokens")}))


@pytest.mark.parametrize("runtime", Runtime)
def test_every_container_is_locked_in(runtime: Runtime) -> None:
    """Nobody is root, gains rights, writes outside /tmp, or has a token of the API."""
    made = of(runtime)
    spec = pod(made)
    assert (
        spec["automountServiceAccountToken"] is by_kind(made, "ServiceAccount")["automountServiceAccountToken"] is False
    )
    assert spec["serviceAccountName"] == "flight-delay-v3"
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for name, container in containers(made).items():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = [one["name"] for one in container["volumeMounts"] if not one.get("readOnly")]
        assert sorted({*writable} - {"shm"}) == (["models", "tmp"] if name == "fetch" else ["tmp"])
        assert environment(container)["HOME"] == "/tmp"
        assert environment(container)["DO_NOT_TRACK"] == "1"
        assert container["env"][0]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        assert container["resources"]["requests"]
        assert container["imagePullPolicy"] == "IfNotPresent"


@pytest.mark.parametrize("runtime", Runtime)
def test_every_container_ends_gently(runtime: Runtime) -> None:
    """A pod has longer than its longest answer, and a runtime ends after the recorder before it."""
    made = of(runtime, CLUSTER.model_copy(update={"answer_timeout": 59.5}))
    spec = pod(made)
    assert spec["terminationGracePeriodSeconds"] > 60 + 15
    last = containers(made)["server"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    if runtime is Runtime.MLFLOW_SCORING:
        assert last == 15
    else:
        assert containers(made)["recorder"]["lifecycle"]["preStop"]["sleep"]["seconds"] == 15
        assert last > 15 + 60
        assert spec["terminationGracePeriodSeconds"] > last


@pytest.mark.parametrize("runtime", Runtime)
def test_probes(runtime: Runtime) -> None:
    """Each container is asked at its own port, by its own paths, at the pod's address; loading may take its time."""
    made = of(runtime)
    for name, container in containers(made).items():
        if name == "fetch":
            continue
        port = names.RUNTIME if name == "server" and runtime is not Runtime.MLFLOW_SCORING else names.ADMIN
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            get = container[kind]["httpGet"]
            assert (get["port"], get.get("host")) == (port, None)
            assert port in [one["containerPort"] for one in container["ports"]]
            assert "{" not in get["path"]
        assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 300
    paths = [containers(made)["server"][kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe")]
    if runtime is Runtime.MLFLOW_SCORING:
        assert paths == ["/ping", "/ready"]
    if runtime is Runtime.TRITON:
        assert paths == ["/v2/models/flight-delay/ready"] * 2


@pytest.mark.parametrize("runtime", Runtime)
def test_nothing_is_left_to_be_filled_in(runtime: Runtime) -> None:
    """No placeholder reaches a container but the one that our servers fill in themselves, whose answer to pass on to;
    the only variable in a command is the pod's address."""
    for container in containers(of(runtime)).values():
        words = [*container["command"], *(value for value in environment(container).values() if value)]
        for word in words:
            left = re.findall(r"\{\w+\}", word)
            assert not left or word == "http://flight-delay-v{version}.models.svc:8080"
            assert "$(" not in word.replace("$(POD_IP)", "")
            assert "0.0.0.0" not in word


def test_our_server_understands_its_command() -> None:
    """The command is one that the server's own parser takes."""
    from deployments.local.server import parse

    _, module, name, *arguments = containers(objects(CLUSTER))["server"]["command"]
    assert (module, name) == ("-m", "deployments.local.server")
    options = parse(arguments)
    assert (options.model, options.version, options.digest, options.path) == (
        MODEL,
        "3",
        DIGEST,
        "/models/flight-delay-v3",
    )
    assert (options.host, options.timeout) == ("$(POD_IP)", 60)
    assert [options.port, options.shadow_port, options.own_port, options.pinned_port] == [*names.PORTS.values()]
    assert options.admin_port == names.ADMIN


@pytest.mark.parametrize("runtime", [one for one in Runtime if one is not Runtime.MLFLOW_SCORING])
def test_the_recorder_understands_its_command(runtime: Runtime) -> None:
    """The command is one that the recorder's own parser takes, with the runtime's paths in it."""
    from deployments.recorder import parse

    _, module, name, *arguments = containers(of(runtime))["recorder"]["command"]
    assert (module, name) == ("-m", "deployments.recorder")
    options = parse(arguments)
    assert options.upstream == f"http://$(POD_IP):{names.RUNTIME}"
    assert options.ready_path.startswith("/")
    assert all(path.startswith("/") and "{" not in path for path in options.infer_path)
    assert options.own_port == names.PORTS["own"]


def test_the_service_keeps_kinds_apart() -> None:
    """A port for each kind of traffic, and none for what is nobody's business; a bare runtime has one port for all."""
    ports = by_kind(objects(CLUSTER), "Service")["spec"]["ports"]
    assert {one["name"]: (one["port"], one["targetPort"]) for one in ports} == {
        name: (port, port) for name, port in names.PORTS.items()
    }
    bare = of(Runtime.VLLM, CLUSTER.model_copy(update={"recorder": False}))
    assert "recorder" not in containers(bare)
    assert {one["targetPort"] for one in by_kind(bare, "Service")["spec"]["ports"]} == {names.RUNTIME}
    selector = by_kind(bare, "Service")["spec"]["selector"]
    deployment = by_kind(bare, "Deployment")["spec"]
    assert selector == deployment["selector"]["matchLabels"] == {names.MODEL: MODEL, names.VERSION: "3"}
    assert selector.items() <= deployment["template"]["metadata"]["labels"].items()


def test_where_the_artifact_lies() -> None:
    """It is fetched to a folder of the version's own, or the image has it; a repository's layout is made by a mount."""
    made = containers(objects(FOREIGN, ONNX))
    assert made["fetch"]["command"][-2:] == ["--to", "/models/flight-delay-v3"]
    assert environment(made["fetch"])["TO"] == "/models/flight-delay-v3"
    assert made["fetch"]["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert environment(made["fetch"])["MLFLOW_TRACKING_URI"] == "http://mlflow.models:5000"
    assert "--model-repository=/repository" in made["server"]["command"]
    assert {
        "name": "models",
        "mountPath": "/repository/flight-delay/3",
        "subPath": "flight-delay-v3",
        "readOnly": True,
    } in (made["server"]["volumeMounts"])
    command = containers(objects(GPU, TRANSFORMERS))["server"]["command"]
    assert command[:3] == ["vllm", "serve", "/models/flight-delay-v3/model"]
    assert command[-2:] == ["--tokenizer", "/models/flight-delay-v3/components/tokenizer"]
    carried = objects(CARRIED)
    assert "fetch" not in containers(carried)
    assert "/opt/models/flight-delay/3" in containers(carried)["server"]["command"]
    assert [one["name"] for one in pod(carried)["volumes"]] == ["tmp"]


def test_what_settings_say_goes() -> None:
    """Image, pull policy, command, environment and resources of each program are settings."""
    everything = Program(
        image="mine:1",
        pull_policy="Never",
        command=("/serve", "{model}", "{version}", "{digest}", "{path}", "--bind={port}", '{"json": {}}', "$(POD_IP)"),
        env={"HOME": "/home", "NAME": "{model}"},
        resources=Resources(requests={"cpu": "1"}, limits={"cpu": "2"}),
    )
    programs = {"vllm": everything, "recorder": everything, "fetcher": everything}
    made = containers(objects(CLUSTER.model_copy(update={"programs": programs}), TRANSFORMERS))
    ports = {"server": "--bind=8070", "recorder": "--bind=8080", "fetch": "--bind={port}"}
    paths = {"server": "/models/flight-delay-v3/model"}
    assert set(made) == {"server", "recorder", "fetch"}
    for name, container in made.items():
        assert (container["image"], container["imagePullPolicy"]) == ("mine:1", "Never")
        path = paths.get(name, container["command"][4])
        assert container["command"] == [
            *("/serve", MODEL, "3", DIGEST, path, ports[name], '{"json": {}}', "$(POD_IP)"),
        ]
        assert environment(container)["HOME"] == "/home"
        assert environment(container)["NAME"] == MODEL
        assert container["resources"] == {"requests": {"cpu": "1"}, "limits": {"cpu": "2"}}
    assert containers(objects(CARRIED))["server"]["image"] == "registry.example.test/flight-delay:v3"
    assert pod(objects(CLUSTER))["imagePullSecrets"] == [{"name": "registry"}]


def test_names_that_look_like_variables_stay_as_they_are() -> None:
    """The kubelet replaces $(NAME) in commands: in a model's name it must not."""
    made = containers(objects(CLUSTER, model="cost $(HOME)"))
    assert "cost $$(HOME)" in made["server"]["command"]
    assert "cost $$(HOME)" in made["fetch"]["command"]
    probe = containers(objects(FOREIGN, ONNX, model="cost $(HOME)"))["server"]["readinessProbe"]
    assert probe["httpGet"]["path"] == "/v2/models/cost%20%24%28HOME%29/ready"


def test_overlay() -> None:
    """Objects merge, null takes away, named items merge by name, and any other list is replaced."""
    base = {
        "a": {"b": 1, "c": 2},
        "tolerations": [{"key": "x"}],
        "containers": [
            {
                "name": "server",
                "env": [{"name": "A", "value": "1"}],
                "volumeMounts": [{"mountPath": "/tmp", "name": "tmp"}],
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "models", "emptyDir": {}}],
    }
    over = {
        "a": {"b": None, "d": 3},
        "tolerations": [{"key": "y"}],
        "containers": [
            {
                "name": "server",
                "env": [{"name": "B", "value": "2"}, {"name": "A", "value": "3"}],
                "volumeMounts": [{"mountPath": "/tmp", "name": "fast"}],
            },
            {"name": "sidecar"},
        ],
        "volumes": [{"name": "models", "emptyDir": {"sizeLimit": "1Gi"}}],
        "new": {"x": {"y": 1}},
    }
    assert overlay(base, over) == {
        "a": {"c": 2, "d": 3},
        "tolerations": [{"key": "y"}],
        "containers": [
            {
                "name": "server",
                "env": [{"name": "A", "value": "3"}, {"name": "B", "value": "2"}],
                "volumeMounts": [{"mountPath": "/tmp", "name": "fast"}],
            },
            {"name": "sidecar"},
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "models", "emptyDir": {"sizeLimit": "1Gi"}}],
        "new": {"x": {"y": 1}},
    }
    assert overlay(base, {}) == base
    assert overlay({}, {"a": {"b": None, "c": [{"d": None}]}}) == {"a": {"c": [{"d": None}]}}
    assert overlay({"volumes": []}, {"volumes": [{"name": "x", "emptyDir": None}]}) == {"volumes": [{"name": "x"}]}
    with pytest.raises(TargetError, match=r"containers.*name"):
        overlay(base, {"containers": [{"image": "x"}]})


def test_another_kind_of_volume_takes_the_place_of_ours() -> None:
    """A claim instead of the emptyDir: null takes ours away."""
    claim = {"name": "models", "emptyDir": None, "persistentVolumeClaim": {"claimName": "models"}}
    made = objects(CLUSTER.model_copy(update={"pod": {"volumes": [claim]}}))
    assert {"name": "models", "persistentVolumeClaim": {"claimName": "models"}} in pod(made)["volumes"]
    for one in made:
        kubernetes_validate.validate(one, "1.36", strict=True)


def test_enough() -> None:
    """All replicas by default, fewer where settings say so, and never more than there are at first."""
    assert enough(CLUSTER) == 2
    assert enough(GPU) == 1
    with pytest.raises(TargetError, match=r"3 replicas .* there are 2"):
        objects(CLUSTER.model_copy(update={"enough": 3}))


def test_settings_that_do_not_fit_are_refused() -> None:
    """Each is one line that says what to change."""
    with pytest.raises(TargetError, match=r"artifact\.tracking_uri is not set"):
        objects(CLUSTER.model_copy(update={"artifact": Artifact()}))
    how: Serving = serving(PYFUNC, {}, {})
    with pytest.raises(TargetError, match=r"made by uv.*programs\.mlflow-scoring\.image"):
        version_objects(CLUSTER, version(env_manager="uv"), how, promotion="p", fence=1)
    assert manifests.SERVER in containers(objects(CLUSTER))


if __name__ == "__main__":
    for name, make in CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(yaml.safe_dump_all(make(), sort_keys=False, width=120))

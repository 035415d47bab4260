"""The objects of one model version on KServe, pure: an InferenceService, and a Service of ours before its pods.

KServe (0.16 or newer, in its Standard mode: a plain Deployment) chooses the program by the model's format, fetches the
artifact from `artifact.storage_uri` to /mnt/models, and makes Deployment, autoscaler and a Service of its own, which
nothing of ours uses. Who answers which share is the HTTPRoute's affair: `canaryTrafficPercent` would be a second
opinion, and one that some modes ignore.

Our recorder is the `transformer-container` of the pods: KServe gives containers of that name, and no others, the
artifact too, so the recorder can verify its digest, which KServe does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from deployments.kubernetes import manifests, names
from deployments.kubernetes.cluster import Artifact, Cluster, Json, Program
from deployments.runtimes import METRICS_PORT, Protocol, Runtime, Serving, fill
from deployments.target import TargetError, Version

API = "serving.kserve.io/v1beta1"
MODELS = "/mnt/models"
"""Where KServe puts the artifact."""
INFERENCE_SERVICE = "serving.kserve.io/inferenceservice"
"""KServe's label on pods: whose they are."""
MODEL = "kserve-container"
"""KServe's name of the container with the model."""
ANSWERS = "transformer-container"
"""The only name of a container beside KServe's own that gets the artifact, and that KServe's Service leads to."""
_MODE, _SCALER = "serving.kserve.io/deploymentMode", "serving.kserve.io/autoscalerClass"
_VISIBILITY = "networking.kserve.io/visibility"
_KSERVES_OWN = frozenset({"name", "image", "imagePullPolicy", "command"})
"""What the ServingRuntime says of its container, where the settings do not."""


@dataclass(frozen=True, slots=True)
class Format:
    """How KServe calls what a runtime of ours serves. `arguments` come after those of KServe's own ServingRuntime, and
    the last one wins; None: KServe has none, and gets the container from us. `ready`, `live` and `infer` are where it
    answers, where that is not what we know.
    """

    name: str
    protocol: str | None = None
    arguments: tuple[str, ...] | None = None
    ready: str | None = None
    live: str | None = None
    infer: str | None = None


_OIP_READY, _OIP_LIVE = "/v2/models/{model}/ready", "/v2/health/live"
FORMATS: Mapping[Runtime, Format] = {
    Runtime.MLSERVER: Format("mlflow", "v2", ()),
    Runtime.TRITON: Format(
        "triton", "v2", ("--http-address={host}", "--http-port={port}", f"--metrics-port={METRICS_PORT}")
    ),
    # KServe's own server around vLLM: it listens on all of the pod's addresses, and speaks OpenAI below /openai.
    Runtime.VLLM: Format(
        "huggingface",
        "v2",
        ("--model_name={model}", "--http_port={port}", "--model_dir={path}"),
        _OIP_READY,
        _OIP_LIVE,
        "/openai/v1/chat/completions",
    ),
    Runtime.TGI: Format("huggingface"),
    Runtime.LLAMA_CPP: Format("gguf"),
    Runtime.TENSORFLOW_SERVING: Format("tensorflow"),
    Runtime.TORCHSERVE: Format("pytorch"),
}
"""By what serves it elsewhere; what our own model server serves is MLServer's here."""
_MLSERVER = {
    "MLSERVER_HOST": "{host}",
    "MLSERVER_HTTP_PORT": "{port}",
    "MLSERVER_METRICS_PORT": str(METRICS_PORT),  # by itself it takes 8082, which is our port for own paths
    "MLSERVER_MODEL_NAME": "{model}",
    "MLSERVER_MODEL_VERSION": "{version}",
}


def version_objects(cluster: Cluster, version: Version, serving: Serving, *, promotion: str, fence: int) -> list[Json]:
    """ServiceAccount, Service, InferenceService and PodDisruptionBudget, in the order in which they are to be made.

    Raises `TargetError` for settings that do not fit. The InferenceService says neither fence nor promotion: KServe
    hands its annotations on to the pods, so each later word there would start all of them anew.
    """
    serving = answered_by(cluster, serving)
    name = names.of_version(version.model, version.number)
    # As if the image carried the artifact where KServe puts it.
    plain = cluster.model_copy(update={"artifact": Artifact(by="image", path=MODELS)})
    made = manifests.version_objects(plain, version, serving, promotion=promotion, fence=fence)
    by_kind = {one["kind"]: one for one in made}
    template: Json = by_kind["Deployment"]["spec"]["template"]
    pod: Json = template["spec"]
    selector = {INFERENCE_SERVICE: name, "component": "predictor"}
    account, service, budget = by_kind["ServiceAccount"], by_kind["Service"], by_kind["PodDisruptionBudget"]
    if cluster.artifact.secret is not None:
        account = {**account, "secrets": [{"name": cluster.artifact.secret}]}
    meta: Json = service["metadata"]
    inference = {
        "apiVersion": API,
        "kind": "InferenceService",
        "metadata": {
            **meta,
            # KServe makes no address for clients: they come by the model's HTTPRoute.
            "labels": {**meta["labels"], _VISIBILITY: "cluster-local"},
            "annotations": {
                **{key: meta["annotations"][key] for key in (names.MODEL_NAME, names.DIGEST)},
                _MODE: "Standard",
                _SCALER: "hpa",
            },
        },
        "spec": {
            "predictor": {
                "annotations": template["metadata"]["annotations"],
                **_predictor(cluster, version, serving, pod),
            }
        },
    }
    return [
        # By `cluster.pod` it may be another one, which may read the artifact store, say.
        *([account] if pod["serviceAccountName"] == name else []),
        {**service, "spec": {**service["spec"], "selector": selector}},
        inference,
        {**budget, "spec": {**budget["spec"], "selector": {"matchLabels": selector}}},
    ]


def answered_by(cluster: Cluster, serving: Serving) -> Serving:
    """What serves it on KServe, and where that answers.

    Our own model server is not KServe's: MLServer takes its place, which answers /invocations too.
    """
    if serving.ours:
        return replace(
            serving,
            runtime=Runtime.MLSERVER,
            protocol=Protocol.INVOCATIONS,
            startup=_OIP_READY,
            ready=_OIP_READY,
            live=_OIP_LIVE,
            image=None,
            command=(),
            env=_MLSERVER | dict(serving.env or {}),
            metrics_path="/metrics",
            metrics_port=METRICS_PORT,
            metrics=(),
        )
    known = FORMATS[serving.runtime]
    if custom(cluster, serving) or _theirs(cluster, serving):
        return serving
    if known.arguments is None:
        raise TargetError(
            f"kserve_runtime is {cluster.kserve_runtime}, and what makes it listen on {{host}}:{{port}} is not known:"
            f" say in programs.{serving.runtime}.command what is added to its arguments"
        )
    more = cluster.programs.get(serving.runtime, Program()).command or ()
    return replace(
        serving,
        command=(*known.arguments, *more),
        startup=known.ready or serving.startup,
        ready=known.ready or serving.ready,
        live=known.live or serving.live,
        infer=known.infer or serving.infer,
    )


def custom(cluster: Cluster, serving: Serving) -> bool:
    """Whether KServe has no runtime for it, and no ServingRuntime is named: then the container is the one that it would
    be without KServe.
    """
    return not serving.ours and FORMATS[serving.runtime].arguments is None and cluster.kserve_runtime is None


def _theirs(cluster: Cluster, serving: Serving) -> bool:
    """Whether the user's own ServingRuntime serves it: then their `command` is all that is added to its arguments."""
    program = cluster.programs.get(serving.runtime)
    return cluster.kserve_runtime is not None and program is not None and program.command is not None


def _predictor(cluster: Cluster, version: Version, serving: Serving, pod: Json) -> Json:
    """The pods as KServe takes them: its own container by its format, all others as they are."""
    runtime, *others = pod["containers"]
    containers = [_beside(cluster, one) for one in others]
    if custom(cluster, serving):
        uri = {"name": "STORAGE_URI", "value": _storage(cluster, version)}
        containers = [{**runtime, "name": MODEL, "env": [*runtime["env"], uri]}, *containers]
        model = {}
    else:
        model = {"model": _model(cluster, version, serving, runtime)}
    return {
        "minReplicas": cluster.replicas,
        **_scaling(cluster),
        # A pod that is made anew has a successor first.
        "deploymentStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        **{key: value for key, value in pod.items() if key != "containers"},
        **model,
        **({"containers": containers} if containers else {}),
    }


def _model(cluster: Cluster, version: Version, serving: Serving, runtime: Json) -> Json:
    """What goes into KServe's container, laid over what its ServingRuntime says there."""
    known, program = FORMATS[serving.runtime], cluster.programs.get(serving.runtime, Program())
    return {
        "modelFormat": {"name": known.name},
        # A ServingRuntime of the user's says itself what it speaks.
        **({"protocolVersion": known.protocol} if known.protocol and not _theirs(cluster, serving) else {}),
        **({"runtime": cluster.kserve_runtime} if cluster.kserve_runtime is not None else {}),
        "storageUri": _storage(cluster, version),
        **({"image": program.image} if program.image is not None else {}),
        **({"imagePullPolicy": program.pull_policy} if program.pull_policy is not None else {}),
        **({"args": runtime["command"]} if runtime["command"] else {}),
        **{key: value for key, value in runtime.items() if key not in _KSERVES_OWN},
    }


def _storage(cluster: Cluster, version: Version) -> str:
    """Where KServe fetches the artifact from."""
    uri = cluster.artifact.storage_uri
    if uri is None:
        raise TargetError(
            "artifact.storage_uri is not set: KServe fetches models by itself, and must be told from where"
            " (s3://, gs://, pvc:// ..., with {model}, {version} and {digest})"
        )
    return fill(uri, {"model": version.model, "version": version.number, "digest": version.digest})


def _scaling(cluster: Cluster) -> Json:
    """KServe's autoscaler knows CPU and memory. Without either there are as many pods at all times."""
    scale = cluster.autoscale
    if scale.metric is not None:
        raise TargetError(
            f"autoscale.metric is {scale.metric}: KServe's autoscaler knows cpu and memory only"
            " (target: kubernetes takes any metric of the pods)"
        )
    asked = {name: value for name, value in (("cpu", scale.cpu), ("memory", scale.memory)) if value is not None}
    most = max(scale.maximum, cluster.replicas)
    if not asked:
        return {"maxReplicas": cluster.replicas}
    if len(asked) == 1:
        ((name, value),) = asked.items()
        return {"maxReplicas": most, "scaleMetric": name, "scaleTarget": value}
    target = [(name, {"type": "Utilization", "averageUtilization": value}) for name, value in asked.items()]
    metrics = [{"type": "Resource", "resource": {"name": name, "target": one}} for name, one in target]
    return {"maxReplicas": most, "autoScaling": {"metrics": metrics}}


def _beside(cluster: Cluster, container: Json) -> Json:
    """Another container of the pod; our recorder verifies the artifact, since it is the first of us to see it."""
    if container["name"] != manifests.RECORDER:
        return container
    given = cluster.programs.get("recorder", Program()).command
    command = container["command"] if given is not None else [*container["command"], "--verify"]
    # KServe's Service leads to every port that is named here, and the admin port is for nobody outside.
    ports = [one for one in container["ports"] if one["name"] == "live"]
    return {**container, "name": ANSWERS, "command": command, "ports": ports}

"""The objects of one model version, pure: settings and a `Serving` to the dicts that an API server takes.

All but annotations about the promotion is the same whoever makes it, and nothing of it changes while the version lives:
an object that is made anew does not restart a pod.

A pod: an init container fetches the artifact and verifies it (or the image carries it), and then either our own model
server answers, or a foreign runtime with our recorder before it. They listen on the pod's own address. `cluster.pod` is
laid over the pod's spec at the end (`overlay`), so everything here can be put differently.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from deployments.kubernetes import names
from deployments.kubernetes.cluster import Cluster, Json, Program, Resources
from deployments.runtimes import Layout, Serving, fill, fill_path
from deployments.target import TargetError, Version

SERVER, RECORDER, FETCHER = "server", "recorder", "fetch"
"""Containers of a pod: what answers (our server, or a foreign runtime), what stands before a foreign one, and the init
container.
"""
USER = 10001
"""Whom all of it runs as: a number, or the kubelet cannot know that it is not root."""
REPOSITORY = "/repository"
"""Where the artifact lies for runtimes that want it as <model>/<version>/."""
HOST = "$(POD_IP)"
"""The pod's address, which the kubelet puts into commands and environment."""
PROBE_SECONDS = 5
SHARED_MEMORY = "1Gi"
END_SECONDS = 15
"""What a pod has to end beyond its longest answer."""
LINGER_SECONDS = 6
"""Of these: until the recorder, told to end, takes no more requests."""
_SMALL = Resources(requests={"cpu": "100m", "memory": "256Mi"}, limits={"memory": "1Gi"})
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1", "HOME": "/tmp"}  # noqa: S108
# One-row predictions: more threads per server only get in each other's way.
_SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_ADDRESS = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "ports": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
}
"""Lists whose items are known by one of their fields: `overlay` merges those."""


def enough(cluster: Cluster) -> int:
    """Replicas that must be ready and warm before a version counts as deployed. Raises `TargetError` for more than
    there are at first.
    """
    wanted = cluster.enough or cluster.replicas
    if wanted > cluster.replicas:
        raise TargetError(
            f"{wanted} replicas are to be ready before a version counts as deployed (enough), and there are "
            f"{cluster.replicas} at first (replicas)"
        )
    return wanted


def version_objects(cluster: Cluster, version: Version, serving: Serving, *, promotion: str, fence: int) -> list[Json]:
    """ServiceAccount, Service, Deployment, PodDisruptionBudget and, where it is asked for, HorizontalPodAutoscaler, in
    the order in which they are to be made. Raises `TargetError` for settings that do not fit.
    """
    enough(cluster)
    if version.env_manager != "local":
        raise TargetError(
            f"{version.model} {version.number} asks for an environment made by {version.env_manager}: a pod has its "
            f"image's. Build one with the model's requirements, set programs.{serving.runtime}.image, and ask for "
            "env_manager local"
        )
    made: list[tuple[str, str, Json]] = [
        ("v1", "ServiceAccount", {"automountServiceAccountToken": False}),
        ("v1", "Service", {"spec": _service(cluster, version, serving)}),
        ("apps/v1", "Deployment", {"spec": _deployment(cluster, version, serving)}),
        ("policy/v1", "PodDisruptionBudget", {"spec": _budget(version)}),
    ]
    scaling = _autoscaler(cluster, version, serving)
    if scaling is not None:
        made.append(("autoscaling/v2", "HorizontalPodAutoscaler", {"spec": scaling}))
    meta = {
        "name": names.of_version(version.model, version.number),
        "namespace": cluster.namespace,
        "labels": names.labels(version.model, version.number),
        "annotations": {
            **_annotations(version),
            names.PROMOTION: promotion,
            names.FENCE: str(fence),
        },
    }
    # Through JSON and back, so that no two objects share a part: whoever changes one changes that one.
    objects = [{"apiVersion": api, "kind": kind, "metadata": meta, **rest} for api, kind, rest in made]
    return [json.loads(json.dumps(one)) for one in objects]


def overlay(base: Any, over: Any, key: str = "") -> Any:
    """`over` laid over `base`: objects are merged field by field, and null takes a field away.

    Lists are replaced, but for those in which items have names: containers, initContainers, volumes, env, ports and
    imagePullSecrets are merged by `name`, volumeMounts by `mountPath`; what has a new name comes last. Raises
    `TargetError` for an item of theirs without that.
    """
    if isinstance(over, Mapping):
        under = base if isinstance(base, Mapping) else {}
        merged = {name: overlay(under.get(name), value, name) for name, value in over.items()}
        return {name: value for name, value in {**under, **merged}.items() if name not in over or value is not None}
    by = _KEYS.get(key)
    if by is None or not isinstance(base, list) or not isinstance(over, list):
        return over
    if any(by not in item for item in over):
        raise TargetError(f"an item of {key} in the settings' pod has no {by}: by that it is known")
    changes = {item[by]: item for item in over}
    there = [overlay(item, changes.pop(item[by])) if item[by] in changes else item for item in base]
    return [*there, *(overlay({}, item) for item in changes.values())]


# --- the smaller objects -----------------------------------------------------------------------------------


def _annotations(version: Version) -> dict[str, str]:
    return {names.MODEL_NAME: version.model, names.DIGEST: version.digest}


def _selector(version: Version) -> dict[str, str]:
    return {names.MODEL: names.slug(version.model), names.VERSION: version.number}


def _service(cluster: Cluster, version: Version, serving: Serving) -> Json:
    """A port for each kind of traffic. A foreign runtime without a recorder has one only, and all lead there."""
    own = _answered_by_us(cluster, serving)
    return {
        "type": "ClusterIP",
        "selector": _selector(version),
        "ports": [
            {
                "name": kind,
                "protocol": "TCP",
                "appProtocol": "http",
                "port": port,
                "targetPort": port if own else names.RUNTIME,
            }
            for kind, port in names.PORTS.items()
        ],
    }


def _budget(version: Version) -> Json:
    # One at a time, also where there is one only: a node must be drainable. What never became ready blocks nobody.
    return {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": _selector(version)},
    }


def _autoscaler(cluster: Cluster, version: Version, serving: Serving) -> Json | None:
    scale, metrics = cluster.autoscale, []
    for resource, percent in (("cpu", scale.cpu), ("memory", scale.memory)):
        if percent is not None:
            _refuse_unrequested(cluster, version, serving, resource)
            target = {"type": "Utilization", "averageUtilization": percent}
            metrics.append({"type": "Resource", "resource": {"name": resource, "target": target}})
    if (scale.metric is None) != (scale.average is None):
        raise TargetError(
            "autoscale.metric and autoscale.average go together: a metric of the pods, and how much per pod"
        )
    if scale.metric is not None:
        pods = {"metric": {"name": scale.metric}, "target": {"type": "AverageValue", "averageValue": scale.average}}
        metrics.append({"type": "Pods", "pods": pods})
    if not metrics:
        return None
    name = names.of_version(version.model, version.number)
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": cluster.replicas,
        "maxReplicas": max(scale.maximum, cluster.replicas),
        "metrics": metrics,
    }


def _refuse_unrequested(cluster: Cluster, version: Version, serving: Serving, resource: str) -> None:
    for container in pod(cluster, version, serving)["containers"]:
        resources = container.get("resources", {})
        if resource not in {**resources.get("limits", {}), **resources.get("requests", {})}:
            raise TargetError(
                f"autoscale.{resource} is in percent of what is requested, and the container {container['name']} "
                f"requests no {resource}: set its resources.requests, or autoscale.{resource} to null"
            )


# --- the pods ----------------------------------------------------------------------------------------------


def _deployment(cluster: Cluster, version: Version, serving: Serving) -> Json:
    # Where an autoscaler sets the replicas we may not: to apply a number would undo its work, and to apply one once
    # and leave it out later sets it back to 1. The autoscaler brings the first pod's companions at once.
    replicas = {} if _autoscaler(cluster, version, serving) else {"replicas": cluster.replicas}
    us = _answered_by_us(cluster, serving)
    port = names.ADMIN if us else serving.metrics_port or names.RUNTIME
    path = "/metrics" if us else serving.metrics_path
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": str(port), "prometheus.io/path": path}
    return {
        **replicas,
        "revisionHistoryLimit": 2,
        "progressDeadlineSeconds": max(math.ceil(cluster.ready_timeout), 1),
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "selector": {"matchLabels": _selector(version)},
        "template": {
            "metadata": {
                "labels": names.labels(version.model, version.number),
                "annotations": {**_annotations(version), **(scraped if path else {})},
            },
            "spec": pod(cluster, version, serving),
        },
    }


def pod(cluster: Cluster, version: Version, serving: Serving) -> Json:
    """The spec of a version's pods, `cluster.pod` included."""
    fetched = cluster.artifact.by == "mlflow"
    volumes: list[Json] = [{"name": "tmp", "emptyDir": {}}]
    if fetched:
        volumes.append({"name": "models", "emptyDir": {}})
    if serving.shared_memory:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}})
    runtime = _server(cluster, version, serving) if serving.ours else _foreign(cluster, version, serving)
    containers = [runtime]
    if not serving.ours and cluster.recorder:
        containers.append(_recorder(cluster, version, serving))
    spread = {"maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {"matchLabels": _selector(version)}}
    spec = {
        "serviceAccountName": names.of_version(version.model, version.number),
        "automountServiceAccountToken": False,
        # Services in the namespace would become variables: a Service called "vllm" sets VLLM_PORT.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": cluster.drain + math.ceil(cluster.answer_timeout) + END_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {"topologyKey": key, **spread} for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
        ],
        **({"imagePullSecrets": [{"name": name} for name in cluster.pull_secrets]} if cluster.pull_secrets else {}),
        **({"initContainers": [_fetcher(cluster, version)]} if fetched else {}),
        "containers": containers,
        "volumes": volumes,
    }
    made: Json = json.loads(json.dumps(overlay(spec, cluster.pod)))
    return made


def _answered_by_us(cluster: Cluster, serving: Serving) -> bool:
    return serving.ours or cluster.recorder


def _plain(text: str) -> str:
    """`text` as it is: the kubelet would replace $(NAME) in it."""
    return text.replace("$", "$$")


def _words(cluster: Cluster, version: Version, serving: Serving) -> dict[str, str]:
    """What the placeholders in commands and environment stand for."""
    artifact = _artifact(cluster, version)
    path = f"{artifact}/{serving.inside}" if serving.inside else artifact
    if serving.layout is Layout.REPOSITORY:
        path = REPOSITORY if cluster.artifact.by == "mlflow" else artifact
    folder, _, file = path.rpartition("/")
    words = {
        "model": version.model,
        "version": version.number,
        "digest": version.digest,
        "path": path,
        "artifact": artifact,
        "folder": folder,
        "file": file,
    }
    port = names.PORTS["live"] if serving.ours else names.RUNTIME
    return {**{name: _plain(value) for name, value in words.items()}, "host": HOST, "port": str(port)}


def _image(image: str, version: Version) -> str:
    """An image's name, which may hold {model} (as named in the cluster), {version} and {digest} (its hexadecimal part):
    so each version can have one that carries it.
    """
    digest = version.digest.rpartition(":")[2]
    return fill(image, {"model": names.slug(version.model), "version": version.number, "digest": digest})


def _artifact(cluster: Cluster, version: Version) -> str:
    """Where all of the artifact lies in the pod."""
    words = {"model": version.model, "version": version.number, "digest": version.digest}
    root = fill(cluster.artifact.path, words).rstrip("/")
    return f"{root}/{names.of_version(version.model, version.number)}" if cluster.artifact.by == "mlflow" else root


def _mounts(cluster: Cluster, version: Version, serving: Serving | None, *, write: bool = False) -> list[Json]:
    mounts: list[Json] = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the pod's own
    if cluster.artifact.by == "mlflow":
        root = _artifact(cluster, version).rpartition("/")[0]
        mounts.append({"name": "models", "mountPath": root, **({} if write else {"readOnly": True})})
        if serving is not None and serving.layout is Layout.REPOSITORY:
            inside = names.of_version(version.model, version.number) + (f"/{serving.inside}" if serving.inside else "")
            where = f"{REPOSITORY}/{version.model}/{version.number}"
            mounts.append({"name": "models", "mountPath": where, "subPath": inside, "readOnly": True})
    if serving is not None and serving.shared_memory:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 - the pod's own
    return mounts


def _container(
    name: str, image: str, policy: str, command: list[str], env: Mapping[str, str], resources: Resources
) -> Json:
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": policy,
        "command": command,
        # The address comes first: variables may refer to those before them only.
        "env": [_ADDRESS, *({"name": key, "value": value} for key, value in env.items() if key != _ADDRESS["name"])],
        "resources": {"requests": {**resources.requests}, "limits": {**resources.limits}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _program(cluster: Cluster, name: str) -> Program:
    return cluster.programs.get(name, Program())


def _probes(cluster: Cluster, port: int, startup: str, ready: str, live: str) -> Json:
    """Probes without a host: the kubelet asks at the pod's address."""

    def probe(path: str, period: int, failures: int) -> Json:
        get = {"httpGet": {"path": path, "port": port, "scheme": "HTTP"}}
        return {**get, "periodSeconds": period, "timeoutSeconds": PROBE_SECONDS, "failureThreshold": failures}

    return {
        "startupProbe": probe(startup, 1, max(math.ceil(cluster.ready_timeout), 1)),
        "readinessProbe": probe(ready, 2, 2),
        # A server that is only busy is not to be killed: it has a minute.
        "livenessProbe": probe(live, 10, 6),
    }


def _stop(seconds: int) -> Json:
    return {"lifecycle": {"preStop": {"sleep": {"seconds": seconds}}}} if seconds else {}


def _ports(ports: Mapping[str, int]) -> list[Json]:
    return [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()]


def _addresses(version: Version) -> list[str]:
    """The arguments that our server and our recorder share: who they are and where they listen."""
    return [
        *("--model", _plain(version.model), "--version", version.number, "--digest", version.digest),
        *("--host", HOST, "--port", str(names.PORTS["live"]), "--shadow-port", str(names.PORTS["shadow"])),
        *("--own-port", str(names.PORTS["own"]), "--pinned-port", str(names.PORTS["pinned"])),
        *("--admin-port", str(names.ADMIN)),
    ]


def _fallback(cluster: Cluster, version: Version) -> list[str]:
    """Where our programs pass on what they fail; the version is theirs to fill in."""
    if not cluster.fallback:
        return []
    service = names.of_version(version.model, "{version}")
    words = {"service": service, "namespace": cluster.namespace, "port": str(names.PORTS["live"])}
    return ["--fallback", fill(cluster.fallback, {**words, "version": "{version}"})]


def _times(cluster: Cluster) -> list[str]:
    return ["--timeout", f"{cluster.answer_timeout:g}", "--graceful", f"{cluster.answer_timeout:g}"]


def _server(cluster: Cluster, version: Version, serving: Serving) -> Json:
    """Our own model server. A command from the settings must answer the same ports."""
    program, words = _program(cluster, serving.runtime), _words(cluster, version, serving)
    command = [
        *(cluster.python, "-m", "deployments.local.server", *_addresses(version), "--path", words["path"]),
        *_times(cluster),
        *_fallback(cluster, version),
    ]
    given = [fill(part, words) for part in serving.command]
    env = {**_QUIET, **_SINGLE, **{key: fill(value, words) for key, value in (serving.env or {}).items()}}
    image, policy = _image(serving.image or cluster.image, version), program.pull_policy or cluster.pull_policy
    return {
        **_container(SERVER, image, policy, given or command, env, program.resources or cluster.resources),
        "ports": _ports({**names.PORTS, "admin": names.ADMIN}),
        "volumeMounts": _mounts(cluster, version, serving),
        **_probes(cluster, names.ADMIN, serving.startup, serving.ready, serving.live),
        **_stop(cluster.drain),
    }


def _foreign(cluster: Cluster, version: Version, serving: Serving) -> Json:
    """Another runtime. It gets requests from the recorder until that has ended, so it ends last: some of them cut off
    what is under way as soon as they are told to stop.
    """
    program, words = _program(cluster, serving.runtime), _words(cluster, version, serving)
    env = {**_QUIET, **{key: fill(value, words) for key, value in (serving.env or {}).items()}}
    policy = program.pull_policy or cluster.pull_policy
    command = [fill(part, words) for part in serving.command]
    paths = (fill_path(path, version.model, version.number) for path in (serving.startup, serving.ready, serving.live))
    return {
        **_container(
            SERVER, _image(str(serving.image), version), policy, command, env, program.resources or cluster.resources
        ),
        "ports": _ports({"runtime": names.RUNTIME}),
        "volumeMounts": _mounts(cluster, version, serving),
        **_probes(cluster, names.RUNTIME, *paths),
        **_stop(cluster.drain + LINGER_SECONDS + math.ceil(cluster.answer_timeout)),
    }


def _recorder(cluster: Cluster, version: Version, serving: Serving) -> Json:
    program = _program(cluster, "recorder")
    model, number = version.model, version.number
    paths = [fill_path(path, model, number) for path in (serving.infer, *serving.also)]
    command = [
        *(cluster.python, "-m", "deployments.recorder", *_addresses(version)),
        *("--path", _plain(_artifact(cluster, version)), "--upstream", f"http://{HOST}:{names.RUNTIME}"),
        *("--ready-path", fill_path(serving.ready, model, number)),
        *(part for path in paths for part in ("--infer-path", path)),
        *(("--metrics-path", serving.metrics_path) if serving.metrics_path is not None else ()),
        *(("--metrics-port", str(serving.metrics_port)) if serving.metrics_port is not None else ()),
        *_times(cluster),
        *_fallback(cluster, version),
    ]
    words = {**_words(cluster, version, serving), "port": str(names.PORTS["live"])}
    given = [fill(part, words) for part in program.command or ()]
    env = {**_QUIET, **{key: fill(value, words) for key, value in program.env.items()}}
    image, policy = _image(program.image or cluster.image, version), program.pull_policy or cluster.pull_policy
    return {
        **_container(RECORDER, image, policy, given or command, env, program.resources or _SMALL),
        "ports": _ports({**names.PORTS, "admin": names.ADMIN}),
        "volumeMounts": _mounts(cluster, version, None),
        **_probes(cluster, names.ADMIN, "/ping", "/ready", "/ping"),
        **_stop(cluster.drain),
    }


def _fetcher(cluster: Cluster, version: Version) -> Json:
    """The init container: the artifact from MLflow, with its digest verified."""
    program, artifact = _program(cluster, "fetcher"), cluster.artifact
    if artifact.tracking_uri is None:
        raise TargetError(
            "artifact.tracking_uri is not set: pods fetch the model from MLflow, and need its address as they see it "
            '(or set artifact.by to "image")'
        )
    model, number, digest = _plain(version.model), version.number, version.digest
    where = _plain(_artifact(cluster, version))
    words = {"model": model, "version": number, "digest": digest, "path": where, "artifact": where}
    command = [
        *(cluster.python, "-m", "deployments.fetch", "--model", model, "--version", number),
        *("--digest", digest, "--to", where),
    ]
    given = [fill(part, words) for part in program.command or ()]
    added = {key: fill(value, words) for key, value in program.env.items()}
    env = {**_QUIET, "MLFLOW_TRACKING_URI": artifact.tracking_uri, **artifact.env, **added}
    image, policy = _image(program.image or cluster.image, version), program.pull_policy or cluster.pull_policy
    return {
        **_container(FETCHER, image, policy, given or command, env, program.resources or _SMALL),
        **({"envFrom": [{"secretRef": {"name": artifact.secret}}]} if artifact.secret is not None else {}),
        "volumeMounts": _mounts(cluster, version, None, write=True),
    }

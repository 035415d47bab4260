"""One cluster as the settings describe it: where it is, what runs there and how it is counted. Pure: no I/O here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Json = dict[str, Any]
PullPolicy = Literal["Always", "IfNotPresent", "Never"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gateway(_Part):
    """The Gateway that the routes attach to. `url` is where clients reach it, "{model}" in it is replaced by the
    model's name in the cluster; so it is in `host`, the HTTPRoute's hostname, without which every model needs a Gateway
    of its own. `implementation` names a row of `metrics.queries` ("envoy-gateway", "istio", "nginx").
    """

    name: str
    namespace: str | None = None
    section: str | None = None
    url: str
    host: str | None = None
    implementation: str | None = None
    timeouts: bool = True
    """Whether routes say how long a request may take (`answer_timeout`); False for gateways that cannot."""


class Resources(_Part):
    """Requests and limits of one container, as Kubernetes writes them ("500m", "1Gi", "nvidia.com/gpu": 1)."""

    requests: Mapping[str, str | int] = {"cpu": "250m", "memory": "512Mi"}
    limits: Mapping[str, str | int] = {"memory": "2Gi"}


class Program(_Part):
    """Another program than our own for one runtime, or other settings of ours: whatever is None stays as it is.

    `command` replaces the image's own; in it and in `env`, {model}, {version}, {digest}, {path}, {host} and {port} are
    replaced (all of them: deployments/runtimes.py), in `image` the first three.
    """

    image: str | None = None
    pull_policy: PullPolicy | None = None
    command: tuple[str, ...] | None = None
    env: Mapping[str, str] = {}
    resources: Resources | None = None


class Autoscale(_Part):
    """When there are more replicas: average use in percent of the request, or a metric of the pods (`metric` with its
    average per pod, for tokens or GPUs). None of the three: no autoscaler.
    """

    maximum: int = Field(default=10, ge=1)
    cpu: int | None = Field(default=80, gt=0)
    memory: int | None = Field(default=None, gt=0)
    metric: str | None = None
    average: str | None = None


class Artifact(_Part):
    """How a version's artifact gets into its pods.

    "mlflow": an init container fetches it from `tracking_uri` (as pods reach it) and verifies its digest. "image": the
    runtime's image carries it at `path`, in which {model}, {version} and {digest} are replaced. `storage_uri` is for
    KServe, which fetches by itself: s3://, gs://, pvc://, with the same words replaced.
    """

    by: Literal["mlflow", "image"] = "mlflow"
    tracking_uri: str | None = None
    path: str = "/models"
    storage_uri: str | None = None
    env: Mapping[str, str] = {}
    secret: str | None = None
    """A Secret whose keys become the environment of the init container: the artifact store's credentials."""


class Metrics(_Part):
    """Where counts and latencies are read: from the pods themselves, or from a Prometheus server by `queries`.

    A query's text may hold {namespace}, {model} (as named in the cluster) and {window}; see docs/kubernetes.md.
    """

    source: Literal["pods", "prometheus"] = "pods"
    url: str | None = None
    queries: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    stale: float = Field(default=30, gt=0)
    """Seconds after which the last sample of a series counts as missing."""


class GitOps(_Part):
    """The repository that the cluster is made from: we commit there, Argo CD or Flux applies."""

    repository: str
    branch: str = "main"
    path: str = "."
    timeout: float = Field(default=600, gt=0)
    """Seconds that the cluster has to obey a commit."""


class Load(_Part):
    """Where a load gate's requests are sent from: "here", the machine of this process, or "jobs": Locust's master and
    the gate's `workers`, as Jobs in the cluster's namespace.
    """

    by: Literal["here", "jobs"] = "here"
    image: str | None = None
    """The image of the Jobs; None: the cluster's. It must have Locust, which images made for serving only have not."""
    resources: Resources = Resources(requests={"cpu": "500m", "memory": "512Mi"}, limits={"memory": "1Gi"})
    pod: Json = {}
    """Laid over the spec of the Jobs' pods."""


class Cluster(_Part):
    """One cluster, called `name`. Without `context` it is the kubeconfig's current one, or, in a pod, the pod's own."""

    name: str = "default"
    kubeconfig: Path | None = None
    context: str | None = None
    namespace: str = "default"
    region: bool = False
    """Whether it is one of several regions: then its champions have the aliases champion-<name>."""
    keeps_out: tuple[str, ...] = ()
    """Models that must not be served here, as shell patterns: a promotion through regions leaves this one out."""
    gateway: Gateway
    image: str = "titleshot:latest"
    """The image with our own programs (deployments/images/): model server, recorder, fetcher."""
    pull_policy: PullPolicy = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    python: str = "python"
    """The interpreter in our image."""
    programs: Mapping[str, Program] = {}
    """By runtime ("mlflow-scoring", "triton", ...); "recorder" and "fetcher" are ours beside one."""
    recorder: bool = True
    """Whether a recorder stands before runtimes that are not ours: without it there are no answers to compare."""
    replicas: int = Field(default=2, ge=1)
    enough: int | None = Field(default=None, ge=1)
    """Replicas that must be ready and warm before a version counts as deployed; None: all."""
    autoscale: Autoscale = Autoscale()
    resources: Resources = Resources()
    artifact: Artifact = Artifact()
    metrics: Metrics = Metrics()
    fallback: str = "http://{service}.{namespace}.svc:{port}"
    """Where pods reach another version's live port, to pass on what they fail: {service}, {namespace}, {port} and
    {version} are replaced. Empty: what a version fails is the caller's answer.
    """
    mirroring: Literal["gateway", "replay"] = "gateway"
    """Who copies live requests to the challenger: the Gateway's RequestMirror, or this process, from the champion's
    answers, where the Gateway cannot.
    """
    reach: Literal["proxy", "direct"] = "proxy"
    """How this process reaches a pod: through the API server, or, inside the cluster, at its address."""
    answer_timeout: float = Field(default=60, gt=0)
    """Seconds that the longest answer takes; a pod is given as long to end."""
    drain: int = Field(default=15, ge=0)
    """Seconds that a pod goes on as before when it is to end: so long every gateway takes to hear of it."""
    ready_timeout: float = Field(default=300, gt=0)
    route_timeout: float = Field(default=60, gt=0)
    """Seconds that the gateway has to say that it obeys a route."""
    patience: float = Field(default=90, ge=0)
    """Seconds that a busy or absent API server is asked again."""
    lease_seconds: float = Field(default=30, gt=0)
    pod: Json = {}
    """Laid over the pod's spec: nodeSelector, tolerations, affinity, volumes, runtimeClassName, securityContext ..."""
    load: Load = Load()
    gitops: GitOps | None = None
    kserve_runtime: str | None = None
    """The ServingRuntime that InferenceServices name; None: KServe chooses by the model's format."""

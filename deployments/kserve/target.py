"""The KServe serving target: the Kubernetes one, with an InferenceService for each version."""

from collections.abc import Sequence
from typing import Any

from deployments.kserve.manifests import FORMATS, version_objects
from deployments.kubernetes import pods
from deployments.kubernetes.client import Client
from deployments.kubernetes.cluster import Cluster, Json, Program
from deployments.kubernetes.hand import Hand
from deployments.kubernetes.lease import State
from deployments.kubernetes.target import KubernetesTarget
from deployments.kubernetes.workload import Standing
from deployments.kubernetes.workload import serving as _serving
from deployments.runtimes import Serving
from deployments.target import Version

KIND = "InferenceService"
_NOT_YET = frozenset({"RuntimeNotRecognized"})
"""What KServe calls an invalid spec and may still come: its runtimes are objects too."""


class Inference:
    """An InferenceService, and what belongs to it.

    What stands for the version is our Service before its pods: KServe hands annotations of an InferenceService on to
    the pods, so whatever is written on one (that it counts as deployed, by which lease) would start them anew.
    """

    kind = "Service"
    kinds: tuple[str, ...] = ("ServiceAccount", KIND, "PodDisruptionBudget", "Service")

    def __init__(self, cluster: Cluster, client: Client) -> None:
        self._cluster, self._client = cluster, client

    def objects(self, version: Version, *, promotion: str, fence: int) -> list[Json]:
        """See `Workload`."""
        made = version_objects(
            self._cluster, version, serving(version, self._cluster), promotion=promotion, fence=fence
        )
        return sorted(made, key=lambda one: self.kinds.index(one["kind"]))

    def standing(self, main: Json, pods: Sequence[Json]) -> Standing:
        """By the InferenceService's status, which is about its newest generation, and by the pods: theirs says who is
        warm.
        """
        return standing(self._client.get(KIND, main["metadata"]["name"]), pods, self._cluster.replicas)


def serving(version: Version, cluster: Cluster) -> Serving:
    """The runtime of a downloaded version. What KServe has a runtime for needs no image. Raises `TargetError`."""
    own = [one for one, known in FORMATS.items() if known.arguments is not None or cluster.kserve_runtime is not None]
    known = {str(one): cluster.programs.get(one, Program()) for one in own}
    imaged = {name: one.model_copy(update={"image": one.image or "KServe's"}) for name, one in known.items()}
    return _serving(version, cluster.model_copy(update={"programs": {**cluster.programs, **imaged}}))


def standing(found: Json | None, there: Sequence[Json], wanted: int) -> Standing:
    """How an InferenceService with these pods stands. No pod counts before KServe calls all of it ready."""
    if found is None:
        return Standing(0, wanted, "its InferenceService is not there")
    status: Json = found.get("status") or {}
    refused = _refused(status.get("modelStatus") or {})
    # Not every KServe says which generation its status is about; an InferenceService of ours has but one.
    observed = status.get("observedGeneration")
    if not status or (observed is not None and observed < found["metadata"].get("generation", 1)):
        return Standing(0, wanted, "KServe has not looked at it yet", refused)
    conditions: dict[str, Any] = {one["type"]: one for one in status.get("conditions") or ()}
    if conditions.get("Ready", {}).get("status") != "True":
        late = [f"{kind}: {_said(one)}" for kind, one in sorted(conditions.items()) if one["status"] != "True"]
        return Standing(0, wanted, f"KServe does not call it ready ({'; '.join(late) or 'and says nothing'})", refused)
    ready = sum(map(pods.ready, there))
    return Standing(ready, wanted, f"{ready} of {wanted} replicas are ready", refused)


def _refused(model: Json) -> str:
    """What KServe will never do as things are."""
    failure = model.get("lastFailureInfo") or {}
    if model.get("transitionStatus") != "InvalidSpec" or failure.get("reason") in _NOT_YET:
        return ""
    return f"KServe refuses the InferenceService: {failure.get('reason', 'InvalidSpec')}: {failure.get('message', '')}"


def _said(condition: Json) -> str:
    return str(condition.get("message") or condition.get("reason") or condition["status"])


class KServeTarget(KubernetesTarget):
    """A `ServingTarget` whose versions are InferenceServices; leases, routes and counts are those of Kubernetes."""

    def __init__(self, cluster: Cluster, *, hand: Hand | None = None) -> None:
        super().__init__(cluster, workload=Inference(cluster, Client(cluster)), hand=hand)
        # By this it is known, to whoever comes without a policy, that the model is KServe's.
        self._state = State(self.client, cluster, KIND)

"""What a version is made of in the cluster and how it says that it is ready: a seam, so that KServe can be one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments import runtimes
from deployments.kubernetes.cluster import Cluster, Json
from deployments.kubernetes.manifests import version_objects
from deployments.target import TargetError, Version


@dataclass(frozen=True, slots=True)
class Standing:
    """How many replicas of the newest generation are `ready` (so warm) of those `wanted`; `why` says what is missing,
    `refused` what the cluster says it will never do as things are (empty where there is no such thing).
    """

    ready: int
    wanted: int
    why: str = ""
    refused: str = ""


class Workload(Protocol):
    """The objects of a version. All are called `names.of_version` and have `names.labels`, and so have its pods, which
    answer `names.PORTS` and `names.ADMIN`; the one of `kind` bears the annotations of the version.
    """

    kind: str
    """The kind of the object that stands for the version ("Deployment", "InferenceService")."""
    kinds: tuple[str, ...]
    """The kinds of all objects made, in the order in which they are made; taken away in reverse."""

    def objects(self, version: Version, *, promotion: str, fence: int) -> list[Json]:
        """What to apply for `version`, `kinds` in their order (a kind may be left out). Raises `TargetError` for a
        model that no runtime here serves.
        """

    def standing(self, main: Json, pods: Sequence[Json]) -> Standing:
        """How the version stands by its main object and its pods, as the API server has them."""


class Plain:
    """A Deployment, and what belongs to it."""

    kind = "Deployment"
    kinds = ("ServiceAccount", "Service", "Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler")

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def objects(self, version: Version, *, promotion: str, fence: int) -> list[Json]:
        """See `Workload`."""
        made = serving(version, self._cluster)
        return version_objects(self._cluster, version, made, promotion=promotion, fence=fence)

    def standing(self, main: Json, pods: Sequence[Json]) -> Standing:  # noqa: ARG002
        """By the Deployment's status: only replicas of the newest ReplicaSet count."""
        status, wanted = main.get("status") or {}, int(main["spec"].get("replicas", 1))
        if (status.get("observedGeneration") or 0) < main["metadata"].get("generation", 1):
            return Standing(0, wanted, "the cluster has not looked at it yet")
        old = int(status.get("replicas") or 0) - int(status.get("updatedReplicas") or 0)
        ready = max(0, int(status.get("readyReplicas") or 0) - old)
        failed = [
            str(one.get("message") or one.get("reason"))
            for one in status.get("conditions") or ()
            if one["type"] == "ReplicaFailure" and one["status"] == "True"
        ]
        return Standing(ready, wanted, f"{ready} of {wanted} replicas are ready", failed[0] if failed else "")


def serving(version: Version, cluster: Cluster) -> runtimes.Serving:
    """The runtime of a downloaded version. Raises `TargetError`."""
    try:
        mlmodel = (version.path / "MLmodel").read_text()
    except OSError as error:
        raise TargetError(f"{version.model} {version.number} at {version.path}: {error}") from error
    return runtimes.serving(mlmodel, version.tags, cluster.programs)

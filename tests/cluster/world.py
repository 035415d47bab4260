"""The Kubernetes target with its clients, for the contract tests: on the tests' own cluster, or on a real one.

On a real cluster (`KUBECONFIG`, `make test-cluster`) the versions' artifacts are a ConfigMap each, mounted file by file, so that
a pod needs nothing but its image. What that image is, and how it is started, is said by the environment:

    TITLESHOT_TEST_IMAGE         an image with our programs (`make image`), as the node has it; titleshot:latest otherwise
    TITLESHOT_TEST_PULL_POLICY   Never (the default: loaded by hand), IfNotPresent or Always
    TITLESHOT_TEST_PYTHON        its interpreter; python otherwise, python3 in a plain image
    TITLESHOT_TEST_PLAIN         1: the image has a python3 and nothing of ours: tests/cluster/plain.py answers in the server's place
    TITLESHOT_TEST_REACH         proxy or direct: how this process asks pods; whichever works otherwise, proxy first
    TITLESHOT_TEST_DNS           1: pods resolve Services, so that fallbacks are tested
    TITLESHOT_TEST_GATEWAY       NAMESPACE/NAME=URL of a Gateway that is there; the tests run an Envoy of their own otherwise
"""

import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.artifact import digest
from deployments.kubernetes import names
from deployments.kubernetes.cluster import Cluster
from deployments.kubernetes.target import KubernetesTarget
from deployments.local.supervisor import wait_for
from deployments.target import Fence, ServingTarget, Version
from tests.cluster.node import LocalCluster
from tests.cluster.real import RealCluster
from tests.cluster.rest import Api
from tests.contract.clients import GOOD, MODEL, Clients

Json = dict[str, Any]


class KubernetesWorld(Clients):
    """A `World` on a cluster: the tests' `own`, or `part` of a real one."""

    def __init__(
        self, root: Path, cluster: Cluster, own: LocalCluster | None = None, part: RealCluster | None = None
    ) -> None:
        self.root, self.cluster, self.own, self.part = root, cluster, own, part
        self.kubernetes = KubernetesTarget(cluster)
        self.target: ServingTarget = self.kubernetes
        self.api = own.api if own is not None else Api(cluster.kubeconfig, cluster.context)

    def version(self, number: str, kind: str = GOOD) -> Version:
        carried = self.root / "carried" / number
        if self.own is not None and not carried.exists():  # what an image of this version would carry
            shutil.copytree(self.root / kind, carried)
        return Version(MODEL, number, self.root / kind, digest(self.root / kind))

    def pods(self, version: str, model: str = MODEL) -> list[Json]:
        """The pods of a version that are not on their way out."""
        labels = {names.MODEL: names.slug(model), names.VERSION: version}
        found = self.kubernetes.client.items("Pod", labels)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, version: str) -> bool:
        """Whether every pod of a version is ready."""

        def is_ready(pod: Json) -> bool:
            conditions = pod.get("status", {}).get("conditions") or []
            return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

        found = self.pods(version)
        return bool(found) and all(map(is_ready, found))

    def kill(self, version: str) -> None:
        for pod in self.pods(version):
            name = pod["metadata"]["name"]
            if self.own is not None:
                os.killpg(self.own.node.pid(self.cluster.namespace, name), signal.SIGKILL)
            else:
                self.api.delete("Pod", self.cluster.namespace, name, gracePeriodSeconds=0)
        wait_for(lambda: not self.ready(version), 30, f"{version} is ready all the same")

    def revived(self, version: str) -> None:
        name = names.of_version(MODEL, version)
        wait_for(lambda: self.ready(version) and self._endpoints(name) > 0, 120, f"{version} does not come back")

    def halt(self, version: str) -> None:
        self._scale(version, 0)
        name = names.of_version(MODEL, version)
        wait_for(lambda: not self.pods(version) and not self._endpoints(name), 90, f"{version} does not go")

    def resume(self, version: str) -> None:
        self._scale(version, 1)
        self.revived(version)

    def expire(self, fence: Fence) -> None:
        name = f"titleshot-{names.slug(fence.model)}"
        long_ago = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() - 3600))
        self.api.patch("Lease", self.cluster.namespace, name, {"spec": {"renewTime": long_ago}})

    def _scale(self, version: str, replicas: int) -> None:
        patch = {"spec": {"replicas": replicas}}
        self.api.patch("Deployment", self.cluster.namespace, names.of_version(MODEL, version), patch)

    def _endpoints(self, service: str) -> int:
        slices = self.kubernetes.client.items("EndpointSlice", {"kubernetes.io/service-name": service})
        ready = [one for each in slices for one in each.get("endpoints") or [] if one["conditions"].get("ready")]
        return len(ready)


def own_settings(own: LocalCluster, root: Path, **more: Any) -> Cluster:
    """The tests' own cluster as the settings describe it: one replica of each version, artifacts on this disk."""
    settings: Mapping[str, Any] = {
        "name": "test",
        "kubeconfig": own.kubeconfig,
        "namespace": own.namespace,
        "gateway": {"name": "gateway", "namespace": own.namespace, "section": "http", "url": own.gateway_url},
        "image": "titleshot:test",
        # No DNS and no kube-proxy here: the way from one version to another is the gateway's.
        "fallback": f"{own.gateway_url}/v/{{version}}",
        "replicas": 1,
        "autoscale": {"cpu": None},
        "artifact": {"by": "image", "path": f"{root}/carried/{{version}}"},
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "2Gi"}},
        "ready_timeout": 60,
        "answer_timeout": 10,
        "patience": 10,
    }
    return Cluster.model_validate({**settings, **more})

"""A whole cluster for a test: API server, controllers, one node that runs pods as processes, and a gateway (a real Envoy).

    with LocalCluster({"titleshot:test": ours(ROOT)}) as cluster:
        client = Client(Cluster(kubeconfig=cluster.kubeconfig, namespace=cluster.namespace, gateway=cluster.gateway_settings()))
        ... httpx.post(f"{cluster.gateway_url}/invocations")

What the parts do, and how they differ from a real cluster: docstrings of `apiserver`, `controllers`, `kubelet` and `gateway`.
"""

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.cluster.apiserver import ApiServer
from tests.cluster.controllers import Controllers, is_ready
from tests.cluster.gateway import CLASS, Gateways
from tests.cluster.kubelet import Image, Node, Processes, ours
from tests.cluster.rest import Api, ApiError, Json, matches

__all__ = ["Controllers", "Gateways", "Image", "LocalCluster", "Node", "Processes", "ours", "until"]

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def until(what: Callable[[], T], timeout: float = 30.0, message: str = "", every: float = 0.02) -> T:
    """What `what` returns as soon as it is true. Raises AssertionError after `timeout` seconds. API errors and what is not there yet are waited out."""
    end, last = time.monotonic() + timeout, "it never was"
    while True:
        try:
            if found := what():
                return found
        except (ApiError, LookupError, OSError) as error:
            last = f"{type(error).__name__}: {error}"
        if time.monotonic() > end:
            raise AssertionError(f"{message or 'what was waited for'}: not within {timeout:g} s ({last})")
        time.sleep(every)


class LocalCluster:
    """A context manager. Everything of it is gone at its end, and (by a helper process) when the test's process dies.

    `images` maps names to what stands for them (`Image`, or a tuple (prefix, environment)); "titleshot:latest" and "titleshot:test" are
    there always: this interpreter in this repository. With `gateway` (the default) there is a Gateway "gateway" with the listener "http" in
    `namespace`, and `gateway_url` is where it answers. `speed` divides the waits of probes and back-offs.
    """

    __test__ = False

    def __init__(
        self,
        images: Mapping[str, Image | tuple[Any, ...]] | None = None,
        *,
        namespace: str = "models",
        speed: float = 10.0,
        capacity: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        gateway: bool = True,
        anonymous: bool = True,
    ) -> None:
        self.namespace, self._with_gateway = namespace, gateway
        self.directory = Path(tempfile.mkdtemp(prefix="k.", dir="/tmp"))
        self.server = ApiServer(anonymous=anonymous)
        self._images = {"titleshot:latest": ours(ROOT), "titleshot:test": ours(ROOT), **(images or {})}
        self._speed, self._capacity, self._labels = speed, capacity, labels
        self.kubeconfig = self.directory / "kubeconfig"
        self._up = contextlib.ExitStack()
        self.api: Api
        self.node: Node
        self.controllers: Controllers
        self.gateways: Gateways

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.server.start()
            stack.callback(self.server.stop)
            self.server.kubeconfig(self.kubeconfig, namespace=self.namespace)
            self.api = Api(self.kubeconfig)
            # The cluster's own parts are another user than tests and what they test: `server.seen` can tell them apart.
            parts = self.server.token("tests-cluster", ("system:masters",))
            inner = self.server.kubeconfig(self.directory / "inner", token=parts)
            stack.callback(self.api.close)
            self.make_namespace(self.namespace)
            self.node = Node(
                *(Api(inner), self._images, self.directory / "node"),
                speed=self._speed,
                capacity=self._capacity,
                labels=self._labels,
                logs=self.server.logs,
            )
            stack.callback(self.node.stop)
            self.controllers = Controllers(Api(inner), self._speed)
            stack.callback(self.controllers.stop)
            if self._with_gateway:
                self.gateways = Gateways(*(inner, self.directory / "gw"), reach="direct", processes=self.node.processes)
                stack.callback(self.gateways.stop)
                self.gateways.start()
            self.node.start()
            self.controllers.start()
            if self._with_gateway:
                self.make_gateway("gateway", self.namespace)
                until(lambda: self.gateways.url(self.namespace, "gateway"), message=f"gateway: {self.gateways.errors}")
            self._up = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._up.close()

    # --- what tests need again and again

    def make_namespace(self, name: str) -> None:
        """No error where it is there."""
        with contextlib.suppress(ApiError):
            self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def make_gateway(self, name: str, namespace: str, hostname: str | None = None, class_name: str = CLASS) -> None:
        """A Gateway with one listener "http", open to routes of all namespaces."""
        listener: Json = {
            "name": "http",
            "port": 80,
            "protocol": "HTTP",
            "allowedRoutes": {"namespaces": {"from": "All"}},
        }
        if hostname:
            listener["hostname"] = hostname
        self.api.create(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {"gatewayClassName": class_name, "listeners": [listener]},
            }
        )

    @property
    def gateway_url(self) -> str:
        return self.gateways.url(self.namespace, "gateway")

    @property
    def supports_gateway(self) -> frozenset[str]:
        """The features that the GatewayClass tells of."""
        found = self.api.get("GatewayClass", CLASS) or {}
        return frozenset(one["name"] for one in found.get("status", {}).get("supportedFeatures") or [])

    def pods(self, labels: Mapping[str, str] | None = None, namespace: str | None = None) -> list[Json]:
        selector = {"matchLabels": dict(labels or {})}
        found = self.api.items("Pod", namespace or self.namespace)
        return [one for one in found if matches(selector, one["metadata"].get("labels"))]

    def ready(self, labels: Mapping[str, str] | None = None, namespace: str | None = None) -> list[Json]:
        """The pods that are ready and stay."""
        return [
            one
            for one in self.pods(labels, namespace)
            if is_ready(one) and not one["metadata"].get("deletionTimestamp")
        ]

    def accepted(self, route: str, namespace: str | None = None) -> bool:
        """Whether our gateway obeys a route as it is now."""
        found = self.api.get("HTTPRoute", route, namespace or self.namespace) or {}
        states = [one for parent in found.get("status", {}).get("parents") or [] for one in parent["conditions"]]
        generation = found.get("metadata", {}).get("generation")
        return bool(states) and all(
            one["status"] == "True" and one.get("observedGeneration") == generation for one in states
        )

    def events(self, name: str, namespace: str | None = None) -> list[Json]:
        """The events about an object."""
        found = self.api.items("Event", namespace or self.namespace)
        return [one for one in found if one["involvedObject"]["name"] == name]

    def state(self) -> str:
        """What there is, in words: for the message of a test that fails."""
        lines = [f"errors: {self.node.errors[-3:]} {self.controllers.errors[-3:]}"]
        if self._with_gateway:
            lines.append(f"gateway: {self.gateways.errors[-3:]}")
        for one in self.pods():
            states = [(s["name"], s["state"]) for s in one.get("status", {}).get("containerStatuses") or []]
            lines.append(f"{one['metadata']['name']}: {one.get('status', {}).get('phase')} {states}")
        return "\n".join(lines)

    def threads(self) -> list[str]:
        return [one.name for one in threading.enumerate()]

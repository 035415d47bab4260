"""A part of a real cluster for the tests alone: a namespace, the versions' artifacts in it, a Gateway; all of it gone in the end.

`KUBECONFIG` says which cluster (or ~/.kube/config), `TITLESHOT_TEST_CONTEXT` which context of it. `world.py` names the variables for images.
Without the Gateway API's definitions they are installed from the folder `TITLESHOT_TEST_CRDS` (../shared/data/crds beside this repository
where it is there), and taken away again. Where no Gateway is named the tests run an Envoy on this machine (`gateway.py`), which
reaches the pods at their addresses, or through the API server where it does not.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self

import yaml

from deployments.kubernetes.cluster import Cluster
from tests.cluster.gateway import CLASS, Gateways
from tests.cluster.node import until
from tests.cluster.rest import Api, ApiError

ROOT = Path(__file__).parents[2]
FILES = {"MLmodel": "MLmodel", "code": "code/tiny_{kind}.py", "kind": "kind", "example": "serving_input_example.json"}
"""A tiny model's files, by their keys in its ConfigMap."""
Json = dict[str, Any]


def reason_to_skip() -> str:
    """Why there is no real cluster to run on; empty where there is one."""
    kubeconfig = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if not Path(kubeconfig).is_file():
        return f"no cluster: KUBECONFIG names no file ({kubeconfig})"
    try:
        Api(kubeconfig, os.environ.get("TITLESHOT_TEST_CONTEXT")).request("GET", "/version", timeout=10.0)
    except Exception as error:  # whatever the library makes of a kubeconfig
        return f"the cluster of {kubeconfig} does not answer: {type(error).__name__}: {error}"
    return ""


class RealCluster:
    """A context manager. `settings(versions)` describes it, with versions (number to folder) mounted into every pod."""

    def __init__(self, namespace: str | None = None) -> None:
        self.kubeconfig = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
        self.context = os.environ.get("TITLESHOT_TEST_CONTEXT")
        self.namespace = namespace or f"titleshot-test-{secrets.token_hex(3)}"
        self.directory = Path(tempfile.mkdtemp(prefix="k.", dir="/tmp"))
        self.api = Api(self.kubeconfig, self.context)
        self._up = contextlib.ExitStack()
        self.gateway: Json = {}
        self.gateways: Gateways | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self._define(stack)
            self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
            stack.callback(self.api.delete, "Namespace", None, self.namespace)
            self._gateway(stack)
            self._up = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._up.close()

    def _define(self, stack: contextlib.ExitStack) -> None:
        """The Gateway API's definitions, where the cluster has none."""
        with contextlib.suppress(ApiError):
            self.api.request("GET", "/apis/gateway.networking.k8s.io/v1")
            return
        folder = Path(os.environ.get("TITLESHOT_TEST_CRDS") or ROOT.parent / "shared" / "data" / "crds")
        found = sorted(folder.glob("gateway.networking.k8s.io_*.yaml"))
        if not found:
            raise RuntimeError(f"the cluster knows no HTTPRoute, and there are no definitions in {folder}")
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for file in found:
            made = yaml.safe_load(file.read_text())
            name, query = made["metadata"]["name"], {"fieldManager": "tests", "force": "true"}
            self.api.request("PATCH", f"{path}/{name}", made, query=query, kind="application/apply-patch+yaml")
            stack.callback(self.api.request, "DELETE", f"{path}/{name}")
        until(lambda: self.api.items("HTTPRoute") is not None, 30, "the definitions are not served")

    def _gateway(self, stack: contextlib.ExitStack) -> None:
        named = os.environ.get("TITLESHOT_TEST_GATEWAY")
        if named:
            where, _, url = named.partition("=")
            space, _, name = where.partition("/")
            self.gateway = {"name": name, "namespace": space, "url": url, "host": os.environ.get("TITLESHOT_TEST_HOST")}
            return
        kind = f"{CLASS}-{self.namespace}"
        self.gateways = Gateways(self.kubeconfig, self.directory / "gw", context=self.context, class_name=kind)
        stack.callback(self.gateways.stop)
        self.gateways.start()
        listener = {"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "Same"}}}
        self.api.create(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "metadata": {"name": "gateway", "namespace": self.namespace},
                "spec": {"gatewayClassName": kind, "listeners": [listener]},
            }
        )
        gateways = self.gateways
        url = until(lambda: gateways.url(self.namespace, "gateway"), 60, f"the tests' gateway: {gateways.errors}")
        self.gateway = {"name": "gateway", "namespace": self.namespace, "section": "http", "url": url}

    def carry(self, versions: dict[str, Path]) -> Json:
        """Make a ConfigMap for each version's folder, and what to lay over a pod's spec so that each is at
        /carried/<number>: file by file, since the digest knows no links.
        """
        volumes, mounts = list[Json](), list[Json]()
        for number, folder in versions.items():
            kind = (folder / "kind").read_text()
            files = {key: name.format(kind=kind) for key, name in FILES.items()}
            data = {key: (folder / name).read_text() for key, name in files.items()}
            self._keep(f"carried-{number}", data)
            volumes.append({"name": f"carried-{number}", "configMap": {"name": f"carried-{number}"}})
            mounts += [
                {
                    "name": f"carried-{number}",
                    "mountPath": f"/carried/{number}/{name}",
                    "subPath": key,
                    "readOnly": True,
                }
                for key, name in files.items()
            ]
        return {"volumes": volumes, "containers": [{"name": "server", "volumeMounts": mounts}]}

    def _keep(self, name: str, data: dict[str, str]) -> None:
        meta = {"name": name, "namespace": self.namespace}
        self.api.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})

    def settings(self, versions: dict[str, Path], **more: Any) -> Cluster:
        """The cluster as titleshot's settings describe it: one replica of each version."""
        pod, programs = self.carry(versions), dict[str, Json]()
        if os.environ.get("TITLESHOT_TEST_PLAIN"):
            plain = Path(__file__).with_name("plain.py").read_text()
            ours = {name: (ROOT / "deployments" / name).read_text() for name in ("artifact.py", "counting.py")}
            self._keep("plain", {"plain.py": plain, **ours})
            pod["volumes"].append({"name": "plain", "configMap": {"name": "plain"}})
            pod["containers"][0]["volumeMounts"].append({"name": "plain", "mountPath": "/plain", "readOnly": True})
            words = ("--model", "{model}", "--version", "{version}", "--path", "{path}", "--digest", "{digest}")
            python = os.environ.get("TITLESHOT_TEST_PYTHON", "python3")
            programs["mlflow-scoring"] = {"command": [python, "/plain/plain.py", *words, "--host", "$(POD_IP)"]}
        settings: Json = {
            "name": "test",
            "kubeconfig": self.kubeconfig,
            "context": self.context,
            "namespace": self.namespace,
            "gateway": self.gateway,
            "image": os.environ.get("TITLESHOT_TEST_IMAGE", "titleshot:latest"),
            "pull_policy": os.environ.get("TITLESHOT_TEST_PULL_POLICY", "Never"),
            "python": os.environ.get("TITLESHOT_TEST_PYTHON", "python"),
            "reach": os.environ.get("TITLESHOT_TEST_REACH", "proxy"),
            "programs": programs,
            "replicas": 1,
            "autoscale": {"cpu": None},
            "artifact": {"by": "image", "path": "/carried/{version}"},
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}},
            "pod": pod,
            "ready_timeout": 180,
            "answer_timeout": 10,
            "patience": 30,
        }
        return Cluster.model_validate({**settings, **more})

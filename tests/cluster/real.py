"""A part of a real cluster for the tests alone: a namespace, the versions' artifacts in it, a Gateway; all of it gone in the end.

`KUBECONFIG` says which cluster (or ~/.kube/config), `TITLESHOT_TEST_CONTEXT` which context of it. `world.py` names the variables for images.
Without the Gateway API's definitions they are installed from the folder `TITLESHOT_TEST_CRDS` (../shared/data/crds beside this repository
where it is there), and taken away again. Where no Gateway is named the tests run an Envoy on this machine (`gateway.py`), which
reaches the pods at their addresses, or through the API server where it does not. Before anything else a pod of the same image, user and
place is tried: what it cannot do is said in one line. What fails later has `described` as a note of its error.
"""

import contextlib
import http.client
import os
import secrets
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Self

import yaml

from deployments.kubernetes import manifests, names, pods
from deployments.kubernetes.cluster import Cluster
from tests.cluster.gateway import CLASS, GROUP, Gateways
from tests.cluster.node import until
from tests.cluster.rest import Api, ApiError

ROOT = Path(__file__).parents[2]
FILES = {"MLmodel": "MLmodel", "code": "code/tiny_{kind}.py", "kind": "kind", "example": "serving_input_example.json"}
"""A tiny model's files, by their keys in its ConfigMap."""
DEFINED = {"GatewayClass": "gatewayclasses", "Gateway": "gateways", "HTTPRoute": "httproutes"}
"""What the tests need of the Gateway API."""
ANYWHERE = [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists", "effect": "NoSchedule"}]
"""The only node may be the control plane's."""
GRACE = 5.0
"""Seconds that something may be wrong with the first pod before it is believed."""
Json = dict[str, Any]
_tried: list[tuple[list[str], str]] = []
"""What the first pod has shown, once: how pods are reached ("proxy", "direct", or both), and why there is no point in going on."""


def reason_to_skip() -> str:
    """Why there is no real cluster to run on; empty where there is one."""
    kubeconfig = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if not any(Path(one).is_file() for one in kubeconfig.split(os.pathsep)):
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
            try:
                self._define(stack)
                meta = {"name": self.namespace, "labels": {"app.kubernetes.io/managed-by": "titleshot-tests"}}
                self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
                stack.callback(self.api.delete, "Namespace", None, self.namespace)
                self._try()
                self._gateway(stack)
            except Exception as error:
                error.add_note(self.described())
                raise
            self._up = stack.pop_all()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):
            error.add_note(self.described())
        self._up.close()

    # --- the Gateway API's definitions

    def _define(self, stack: contextlib.ExitStack) -> None:
        """The Gateway API's definitions, where the cluster has none."""
        # Those of the tests before may be on their way out: nothing can be created by them any more.
        until(lambda: not any(map(self._ending, DEFINED)), 120, "definitions of the Gateway API are being deleted")
        if self._served():
            return
        folder = Path(os.environ.get("TITLESHOT_TEST_CRDS") or ROOT.parent / "shared" / "data" / "crds")
        missing = [kind for kind in DEFINED if self.api.get("CustomResourceDefinition", _defined(kind)) is None]
        files = {kind: folder / f"{GROUP}_{DEFINED[kind]}.yaml" for kind in missing}
        if absent := [file for file in files.values() if not file.is_file()]:
            raise RuntimeError(
                f"the cluster has no {', '.join(missing)}, and there is no {absent[0]} to define them by (TITLESHOT_TEST_CRDS)"
            )
        stack.callback(self._undefine, missing)
        for file in files.values():
            self.api.apply(yaml.safe_load(file.read_text()))
        until(self._served, 60, "the Gateway API's definitions are not served")

    def _ending(self, kind: str) -> bool:
        found = self.api.get("CustomResourceDefinition", _defined(kind))
        return found is not None and "deletionTimestamp" in found["metadata"]

    def _served(self) -> bool:
        """Whether the API server has all of these kinds: a definition is served a moment after it is made."""
        try:
            page = self.api.request("GET", f"/apis/{GROUP}/v1")
            for kind in DEFINED:
                self.api.items(kind)
        except ApiError as error:
            if error.code != 404:
                raise
            return False
        return set(DEFINED.values()) <= {one["name"] for one in page["resources"]}

    def _undefine(self, kinds: list[str]) -> None:
        """Take the definitions away once nothing is made of them: with a definition goes all that anybody has made of it."""
        try:
            until(lambda: not any(self.api.items(kind) for kind in kinds), 120, "there are still objects of them")
        except AssertionError as error:
            warnings.warn(f"the Gateway API's definitions stay in the cluster: {error}", stacklevel=1)
            return
        for kind in kinds:
            self.api.delete("CustomResourceDefinition", None, _defined(kind))

    # --- a first pod

    def _try(self) -> None:
        """See once whether pods of this image start here, and how they are reached. Raises `RuntimeError` with what is wrong, in a line."""
        if not _tried:
            try:
                _tried.append((self._first_pod(), ""))
            except (RuntimeError, AssertionError, ApiError) as error:
                _tried.append(([], str(error)))
        if why := _tried[0][1]:
            raise RuntimeError(f"the cluster cannot run the tests' pods: {why}")

    def _first_pod(self) -> list[str]:
        name, code = "first", "" if os.environ.get("TITLESHOT_TEST_PLAIN") else "import deployments.local.server;"
        code += f"""
import os; from http.server import *
os.chdir("/")
print("it runs", flush=True)
HTTPServer((os.environ["POD_IP"], {names.ADMIN}), SimpleHTTPRequestHandler).serve_forever()"""
        made = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "restartPolicy": "Never",
                "tolerations": ANYWHERE,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": manifests.USER,
                    "runAsGroup": manifests.USER,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "first",
                        "image": _image(),
                        "imagePullPolicy": _policy(),
                        "command": [_python(), "-c", code],
                        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
                        "resources": _RESOURCES,
                        "readinessProbe": {"httpGet": {"path": "/", "port": names.ADMIN}, "periodSeconds": 1},
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"]},
                        },
                    }
                ],
            },
        }
        # The namespace's account comes a moment after the namespace.
        until(lambda: self.api.create(made), 20, f"a pod of {_image()} is refused")
        since: float | None = None
        end = time.monotonic() + 120
        while not pods.ready(found := self.api.get("Pod", name, self.namespace) or made):
            fault = pods.fault([found])
            since = None if fault is None else since or time.monotonic()
            if fault is not None and since is not None and (fault.own or time.monotonic() - since > GRACE):
                raise RuntimeError(f"{fault.why}: {self._log(name, 1).strip()}" if fault.own else fault.why)
            if time.monotonic() > end:
                raise RuntimeError(f"a pod of {_image()} is not ready after 120 s: {'; '.join(self._events()[-3:])}")
            time.sleep(0.2)
        if "it runs" not in (said := self._log(name, 1000)):
            warnings.warn(f"the API server does not get the logs of pods from their node: {said}", stacklevel=1)
        ways = {"proxy": self._asked_by_proxy(name), "direct": _asked(found["status"]["podIP"])}
        self.api.delete("Pod", self.namespace, name, gracePeriodSeconds=0)
        wanted = os.environ.get("TITLESHOT_TEST_REACH")
        fine = [way for way, why in ways.items() if not why]
        if not fine or (wanted and wanted not in fine):
            raise RuntimeError(
                f"its pods are ready and out of reach: {ways['proxy'] or 'through the API server it works'}; "
                f"{ways['direct'] or 'from this machine it works'} (see TITLESHOT_TEST_REACH)"
            )
        return fine

    def _asked_by_proxy(self, pod: str) -> str:
        """Why the API server does not reach a pod; empty where it does."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}:{names.ADMIN}/proxy/"
        answer = self.api.raw("GET", path, None, {})
        return (
            "" if answer.status == 200 else f"API server: {answer.status} {answer.data.decode(errors='replace')[:300]}"
        )

    def _log(self, pod: str, lines: int, container: str = "") -> str:
        """The end of a pod's log, or why there is none."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log?tailLines={lines}"
        try:
            answer = self.api.raw("GET", path + (f"&container={container}" if container else ""), None, {})
        except ApiError as error:
            return f"({error})"
        text = answer.data.decode(errors="replace")
        return text if answer.status == 200 else f"(no log: {ApiError(answer.status, text).message})"

    def _events(self) -> list[str]:
        """What the cluster says about the namespace's objects, oldest first."""
        found = self.api.items("Event", self.namespace)
        found.sort(key=lambda one: str(one.get("lastTimestamp") or one.get("eventTime") or "")[:19])
        about = [(one, one.get("involvedObject") or {}) for one in found]
        return [
            f"{one.get('type')} {one.get('reason')} {what.get('kind')} {what.get('name')}: {one.get('message')}"
            for one, what in about
        ]

    def described(self) -> str:
        """What the namespace looks like by now, for whoever reads of a failure: pods, routes, events, last lines."""
        lines = [f"--- the cluster's namespace {self.namespace} by then:"]
        try:
            for pod in self.api.items("Pod", self.namespace):
                name, status = pod["metadata"]["name"], pod.get("status", {})
                lines.append(
                    f"pod {name}: {pods.state(pod)}, at {status.get('podIP')} of {pod['spec'].get('nodeName')}"
                )
                bad = [one for one in status.get("conditions") or [] if one["status"] != "True" and one.get("message")]
                lines += [f"  {one['type']} is {one['status']}: {one['message']}" for one in bad]
                if not pods.ready(pod):
                    lines += [
                        f"  | {line}" for line in self._log(name, 10, pod["spec"]["containers"][0]["name"]).splitlines()
                    ]
            for route in self.api.items("HTTPRoute", self.namespace):
                for parent in route.get("status", {}).get("parents") or [{}]:
                    states = [
                        f"{one['type']}={one['status']} {one.get('message', '')}"
                        for one in parent.get("conditions") or []
                    ]
                    lines.append(f"route {route['metadata']['name']}: {'; '.join(states) or 'nobody reports on it'}")
            lines += [f"event: {one}" for one in self._events()[-25:]]
        except ApiError as error:
            lines.append(f"and no more: {error}")
        if self.gateways is not None:
            lines += [f"the tests' gateway: {one}" for one in self.gateways.errors[-3:]]
        return "\n".join(lines)

    # --- the Gateway

    def _gateway(self, stack: contextlib.ExitStack) -> None:
        named = os.environ.get("TITLESHOT_TEST_GATEWAY")
        if named:
            where, _, url = named.partition("=")
            space, _, name = where.partition("/")
            host = os.environ.get("TITLESHOT_TEST_HOST") or ""
            if "{model}" not in host or "{model}" not in url:
                raise RuntimeError(
                    "the tests' models share the Gateway of TITLESHOT_TEST_GATEWAY: its URL and TITLESHOT_TEST_HOST must "
                    f"hold {{model}}, and say {url!r} and {host!r}"
                )
            self.gateway = {"name": name, "namespace": space, "url": url, "host": host}
            return
        kind = f"{CLASS}-{self.namespace}"
        reach = "direct" if "direct" in _tried[0][0] else "forward"
        self.gateways = gateways = Gateways(
            *(self.kubeconfig, self.directory / "gw"), context=self.context, class_name=kind, reach=reach
        )
        stack.callback(gateways.stop)
        gateways.start()
        listener = {"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "Same"}}}
        self.api.create(
            {
                "apiVersion": f"{GROUP}/v1",
                "kind": "Gateway",
                "metadata": {"name": "gateway", "namespace": self.namespace},
                "spec": {"gatewayClassName": kind, "listeners": [listener]},
            }
        )
        url = until(lambda: gateways.url(self.namespace, "gateway"), 60, "the tests' gateway does not answer")
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
        pod, programs = {**self.carry(versions), "tolerations": ANYWHERE}, dict[str, Json]()
        if os.environ.get("TITLESHOT_TEST_PLAIN"):
            plain = Path(__file__).with_name("plain.py").read_text()
            ours = {name: (ROOT / "deployments" / name).read_text() for name in ("artifact.py", "counting.py")}
            self._keep("plain", {"plain.py": plain, **ours})
            pod["volumes"].append({"name": "plain", "configMap": {"name": "plain"}})
            pod["containers"][0]["volumeMounts"].append({"name": "plain", "mountPath": "/plain", "readOnly": True})
            words = ("--model", "{model}", "--version", "{version}", "--path", "{path}", "--digest", "{digest}")
            programs["mlflow-scoring"] = {"command": [_python(), "/plain/plain.py", *words, "--host", "$(POD_IP)"]}
        settings: Json = {
            "name": "test",
            "kubeconfig": self.kubeconfig,
            "context": self.context,
            "namespace": self.namespace,
            "gateway": self.gateway,
            "image": _image(),
            "pull_policy": _policy(),
            "python": _python(),
            "reach": os.environ.get("TITLESHOT_TEST_REACH") or _tried[0][0][0],
            "programs": programs,
            "replicas": 1,
            "autoscale": {"cpu": None},
            "artifact": {"by": "image", "path": "/carried/{version}"},
            "resources": _RESOURCES,
            "pod": pod,
            "ready_timeout": 180,
            "drain": 5,
            "answer_timeout": 10,
            "patience": 30,
        }
        return Cluster.model_validate({**settings, **more})


_RESOURCES = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}}


def _image() -> str:
    return os.environ.get("TITLESHOT_TEST_IMAGE") or "titleshot:latest"


def _policy() -> str:
    return os.environ.get("TITLESHOT_TEST_PULL_POLICY") or "Never"


def _python() -> str:
    return os.environ.get("TITLESHOT_TEST_PYTHON") or (
        "python3" if os.environ.get("TITLESHOT_TEST_PLAIN") else "python"
    )


def _defined(kind: str) -> str:
    return f"{DEFINED[kind]}.{GROUP}"


def _asked(address: str) -> str:
    """Why a pod does not answer this machine; empty where it does."""
    connection = http.client.HTTPConnection(address, names.ADMIN, timeout=3)
    try:
        connection.request("GET", "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"from this machine {address}:{names.ADMIN}: {error}"
    finally:
        connection.close()
    return "" if status == 200 else f"from this machine {address}:{names.ADMIN}: somebody else answers {status}"

"""Prefect's work pool for Kubernetes: the Job that its own worker makes of our template is one that a cluster takes."""

import asyncio
import copy
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from deployments.images import build
from deployments.kubernetes import rbac
from tasks.worker import ROOT

POOL = ROOT / "deployments" / "pools"
TEMPLATE = json.loads((POOL / "kubernetes.json").read_text())


def job(**values: Any) -> Any:
    """What prefect-kubernetes makes of the template for a run of the deployment `promote`."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import Flow, FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    values = {"image": "titleshot:latest", **values}
    # Nothing in the template refers to the server's blocks, so it is not asked; without a client Prefect starts one.
    nobody = PrefectClient(api="http://127.0.0.1:9/api")
    make = KubernetesWorkerJobConfiguration.from_template_and_values
    made = asyncio.run(make(copy.deepcopy(TEMPLATE), values, client=nobody))
    flow = Flow(id=uuid.uuid4(), name="promote")
    run = FlowRun(flow_id=flow.id, name="quiet-lynx", deployment_id=uuid.uuid4())
    made.prepare_for_flow_run(run, flow=flow)
    return json.loads(json.dumps(made.job_manifest))


def checked(manifest: Any) -> Any:
    """The pod of a valid manifest."""
    pod = manifest["spec"]["template"]["spec"]
    # prefect-kubernetes demands these two, which pods do not have; API servers drop them with a warning.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    kubernetes_validate.validate(manifest, "1.36", strict=True)
    return pod


def test_the_job_of_a_run_is_valid_and_runs_in_our_image() -> None:
    """The library's own code takes our template and makes a Job that fits the schema strictly, with the image's user,
    home and scratch, one try, and no token."""
    manifest = job()
    assert manifest["metadata"]["namespace"] == rbac.RUNS
    assert manifest["spec"]["backoffLimit"] == 0
    pod = checked(manifest)
    (container,) = pod["containers"]
    assert container["args"][:3] == ["prefect", "flow-run", "execute"]
    assert "command" not in container
    assert pod["serviceAccountName"] == rbac.RUN
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsUser"] == build.USER
    told = {one["name"]: one.get("value") for one in container["env"]}
    assert {name: told[name] for name in ("HOME", "TITLESHOT_HOME", "PREFECT_HOME")} == {
        name: build.ENVIRONMENT[name] for name in ("HOME", "TITLESHOT_HOME", "PREFECT_HOME")
    }
    # A pod that is evicted lets its run be tried again in another one, where the journal says how to go on.
    assert told["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    labels = manifest["spec"]["template"]["metadata"]["labels"]
    assert labels["prefect.io/flow-run-name"] == "quiet-lynx"


def test_what_a_deployment_or_a_person_fills_in_is_in_the_job() -> None:
    """Variables end up where they should, and the Job is still valid."""
    manifest = job(
        image_pull_policy="Never",
        mount_service_account_token=True,
        namespace="flows",
        memory_limit="8Gi",
        annotations={"example.com/team": "pricing"},
        env={"TITLESHOT_MLFLOW_URI": "http://mlflow:5000", "TITLESHOT_HOME": "/var/lib/titleshot"},
        name="quiet-lynx",
    )
    assert manifest["metadata"]["generateName"] == "quiet-lynx-"
    assert manifest["spec"]["template"]["metadata"]["annotations"] == {"example.com/team": "pricing"}
    pod = checked(manifest)
    assert pod["automountServiceAccountToken"] is True
    assert pod["containers"][0]["imagePullPolicy"] == "Never"
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "8Gi"
    assert {"name": "TITLESHOT_MLFLOW_URI", "value": "http://mlflow:5000"} in pod["containers"][0]["env"]


def test_the_workers_own_deployment_fits_pool_and_rights() -> None:
    """kubernetes-worker.yaml is valid, runs as the account that may make Jobs, and claims the home of the runs."""
    objects = list(yaml.safe_load_all((POOL / "kubernetes-worker.yaml").read_text()))
    for one in objects:
        kubernetes_validate.validate(one, "1.36", strict=True)
    found = {one["kind"]: one for one in objects}
    variables = TEMPLATE["variables"]["properties"]
    assert found["PersistentVolumeClaim"]["metadata"]["name"] == variables["home_claim"]["default"]
    assert {one["metadata"]["namespace"] for one in objects} == {rbac.RUNS} == {variables["namespace"]["default"]}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == rbac.WORKER
    (container,) = pod["containers"]
    watched = {one["name"]: one.get("value") for one in container["env"]}
    assert watched["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"] == rbac.RUNS
    assert container["command"][:3] == ["prefect", "worker", "start"]
    assert container["envFrom"] == [{"secretRef": {"name": variables["secret"]["default"]}}]


@pytest.mark.long
def test_prefects_own_worker_makes_the_job(tmp_path: Path) -> None:
    """A real Prefect server, a real worker with the rights of `rbac.pool` alone, and an API server: a run of a
    deployment becomes the Job that we expect, and nothing is refused."""
    from tests.cluster.apiserver import ApiServer
    from tests.cluster.rights import WORKER, used

    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_LOGGING_LEVEL": "INFO"}
    base = {**os.environ, **quiet, "PREFECT_HOME": str(tmp_path / "prefect"), "HOME": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    here = [sys.executable, "-m", "prefect"]
    started: list[subprocess.Popen[bytes]] = []
    with ApiServer() as api, (tmp_path / "log").open("wb") as log:
        api.add({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": rbac.RUNS}})
        for one in rbac.pool():
            api.add(one)
        config = api.kubeconfig(tmp_path / "config", token=api.token(WORKER), namespace=rbac.RUNS)
        env = {**base, "PREFECT_API_URL": url, "KUBECONFIG": str(config)}
        env["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"] = rbac.RUNS
        env["PREFECT_WORKER_QUERY_SECONDS"] = "1"

        def start(*command: str) -> None:
            started.append(subprocess.Popen([*here, *command], env=env, cwd=tmp_path, stdout=log, stderr=log))

        def wait(what: Any, seconds: float = 60) -> Any:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if found := what():
                    return found
                time.sleep(0.3)
            raise AssertionError((tmp_path / "log").read_text()[-4000:])

        def up() -> bool:
            try:
                return httpx.get(f"{url}/health", timeout=2).is_success
            except httpx.HTTPError:
                return False

        def ask(path: str, **body: Any) -> Any:
            answer = httpx.post(f"{url}{path}", json=body, timeout=20)
            assert answer.is_success, answer.text
            return answer.json()

        try:
            start("server", "start", "--host", "127.0.0.1", "--port", str(port))
            wait(up, 90)
            ask("/work_pools/", name="titleshot", type="kubernetes", base_job_template=TEMPLATE)
            flow = ask("/flows/", name="promote")
            deployment = ask(
                "/deployments/",
                name="promote",
                flow_id=flow["id"],
                entrypoint="flows.promote.promote",
                work_pool_name="titleshot",
                job_variables={"image": "titleshot:latest", "image_pull_policy": "Never"},
            )
            start("worker", "start", "--pool", "titleshot", "--type", "kubernetes", "--name", "here")
            wait(lambda: "Worker" in (tmp_path / "log").read_text())
            run = ask(f"/deployments/{deployment['id']}/create_flow_run", state={"type": "SCHEDULED"})
            (made,) = wait(lambda: api.objects("jobs", rbac.RUNS))
            pod = made["spec"]["template"]["spec"]
            assert made["metadata"]["labels"]["prefect.io/flow-run-id"] == run["id"]
            assert pod["containers"][0]["image"] == "titleshot:latest"
            assert pod["containers"][0]["args"][:3] == ["prefect", "flow-run", "execute"]
            assert pod["securityContext"]["runAsUser"] == build.USER
            assert "parallelism" not in pod
            told = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
            assert told["PREFECT__FLOW_RUN_ID"] == run["id"]
            # Its observer looks at Jobs and pods as well, in its own namespace. Watches are recorded at their end.
            looked = {("batch", "jobs", "list", rbac.RUNS), ("", "pods", "list", rbac.RUNS)}
            wait(lambda: looked <= used(api, WORKER))
            denied = {(one.verb, one.path) for one in api.seen if one.user == WORKER and one.code == 403}
            assert denied == set()
        finally:
            for program in reversed(started):
                program.terminate()
                try:
                    program.wait(20)
                except subprocess.TimeoutExpired:
                    program.kill()

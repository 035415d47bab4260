"""A load by several Locust workers in the cluster: one Job for the master, one indexed Job for all workers.

The workers find the master by its pod's address. Plan and requests come to the pods in ConfigMaps, in pieces, since one
of these holds 1 MiB; results come back in the pods' logs, so no volume is shared and nothing is asked of a pod (what is
written there, and what it proves, is `loadtests.distributed`'s affair). Everything belongs to the master's Job, which
the cluster removes some time after its end; we remove it at once, and what a run that was killed has left.

Nothing is tried again: a pod that fails, is evicted or does not start is the end of the run.
"""

import base64
import contextlib
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from deployments.kubernetes import names
from deployments.kubernetes.client import Client
from deployments.kubernetes.cluster import Cluster, Json
from deployments.kubernetes.manifests import USER, overlay
from deployments.target import TargetError

LOAD = f"{names.GROUP}/load"
"""The label of all that is part of a load: the model's name in the cluster. No version's objects have it."""
PORT = 5557
"""Where Locust's master listens, on its pod's own address."""
PIECE = 900_000
"""Bytes of the plan in one ConfigMap."""
PIECES = 8
PLAN = "/titleshot/plan"
CONTAINER = "locust"
KEPT = 600
"""Seconds after its end that the cluster keeps a Job which we could not remove."""
LINES = 20_000
_INDEX = "batch.kubernetes.io/job-completion-index"
_SLACK = 60.0
_LOOK = 1.0
_HOPELESS = frozenset({"ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError"})
_FRAME = "titleshot-load "  # lines of results, which are no message
# A mesh's sidecar would outlive Locust, and the Job would never be complete.
_ALONE = {"sidecar.istio.io/inject": "false"}
_LEFT_ALONE = {"linkerd.io/inject": "disabled", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}


def hosts(cluster: Cluster, model: str, versions: Sequence[str] = ()) -> frozenset[str]:
    """Where load may go ("name:port", or "name" where the URL has no port): to the Gateway's address of `model`, and to
    the Services of those of its versions. To nobody else.
    """
    gateway = urlsplit(cluster.gateway.url.replace("{model}", names.slug(model))).netloc
    services = {f"{names.of_version(model, version)}.{cluster.namespace}.svc" for version in versions}
    return frozenset({gateway} | {f"{service}:{port}" for service in services for port in names.PORTS.values()})


def plan_maps(cluster: Cluster, model: str, name: str, plan: bytes, *, owner: Json) -> list[Json]:
    """The plan in ConfigMaps that belong to the Job `owner`: `plan.0`, `plan.1` ... Raises `TargetError` for one that
    is too large.
    """
    pieces = [plan[start : start + PIECE] for start in range(0, len(plan), PIECE)]
    if len(pieces) > PIECES:
        raise TargetError(
            f"the load's requests are {len(plan) / 1e6:.1f} MB, compressed, and a cluster is given at most "
            f"{PIECE * PIECES / 1e6:.1f}: ask fewer different ones (`payloads`)"
        )
    meta = {"namespace": cluster.namespace, "labels": _labels(model, "plan"), "ownerReferences": [_owned_by(owner)]}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{name}-{number}", **meta},
            "immutable": True,
            "binaryData": {f"plan.{number}": base64.b64encode(piece).decode()},
        }
        for number, piece in enumerate(pieces)
    ]


def master_job(cluster: Cluster, model: str, name: str, plan: bytes, *, promotion: str, seconds: float) -> Json:
    """The Job of the master. `seconds` is its whole time, from the moment when it is made."""
    options = ["master", "--host", "$(POD_IP)"]
    return _job(cluster, model, f"{name}-m", options, name, plan, promotion=promotion, seconds=seconds)


def worker_job(
    cluster: Cluster,
    model: str,
    name: str,
    plan: bytes,
    *,
    promotion: str,
    seconds: float,
    workers: int,
    master: str,
    owner: Json,
) -> Json:
    """The indexed Job of all workers, who find the master at the address `master`."""
    options = ["worker", "--host", master, "--part", "$(JOB_COMPLETION_INDEX)"]
    job = _job(cluster, model, f"{name}-w", options, name, plan, promotion=promotion, seconds=seconds)
    job["metadata"]["ownerReferences"] = [_owned_by(owner)]
    job["spec"] |= {"completionMode": "Indexed", "completions": workers, "parallelism": workers}
    return job


class Jobs:
    """A crew of pods for loads on `model` (`loadtests.distributed.Crew`): under its lease, one load at a time."""

    def __init__(self, client: Client, cluster: Cluster, model: str, *, promotion: str = "") -> None:
        self._client, self._cluster, self._model, self._promotion = client, cluster, model, promotion

    def __call__(
        self, plan: bytes, workers: int, seconds: float, meanwhile: Callable[[], object]
    ) -> tuple[str, list[str]]:
        """Run one master and `workers` workers, for at most `seconds` from when all have started. Returns their logs.

        `meanwhile` is called about once a second. Raises `TargetError` where a pod fails, is lost or does not start in
        time (the settings' `ready_timeout`), with what the cluster says of it; leaves nothing behind.
        """
        client, cluster, model, patience = self._client, self._cluster, self._model, self._cluster.ready_timeout
        name = f"{names.slug(model)}-load-{secrets.token_hex(3)}"
        whole = 2 * patience + seconds + _SLACK  # the master's start, the workers', and the run
        self._sweep()
        try:
            master = client.apply(master_job(cluster, model, name, plan, promotion=self._promotion, seconds=whole))
            for piece in plan_maps(cluster, model, name, plan, owner=master):
                client.apply(piece)
            address = self._address(f"{name}-m", meanwhile)
            client.apply(
                worker_job(
                    cluster,
                    model,
                    name,
                    plan,
                    promotion=self._promotion,
                    seconds=whole,
                    workers=workers,
                    master=address,
                    owner=master,
                )
            )
            self._wait(name, workers, time.monotonic() + whole - patience, meanwhile)
            return self._logs(name, workers)
        finally:
            # Where this fails the cluster does it, later.
            with contextlib.suppress(TargetError):
                self._sweep()

    def _sweep(self) -> None:
        """Remove all that is part of a load on this model: nobody else may load it, so it is ours, or left behind."""
        for kind in ("Job", "ConfigMap"):
            for one in self._client.items(kind, {LOAD: names.slug(self._model)}):
                self._client.delete(kind, one["metadata"]["name"])

    def _pods(self, job: str) -> list[Json]:
        return self._client.items("Pod", {"batch.kubernetes.io/job-name": job})

    def _address(self, job: str, meanwhile: Callable[[], object]) -> str:
        """The address of the master's pod, once it runs."""
        until = time.monotonic() + self._cluster.ready_timeout
        while True:
            pods = self._pods(job)
            for pod in pods:
                status = pod.get("status", {})
                if status.get("phase") == "Running" and status.get("podIP"):
                    return str(status["podIP"])
            self._require_well(job, 1, pods)
            if time.monotonic() > until:
                self._refuse_late(job, 1, pods)
            meanwhile()
            time.sleep(_LOOK)

    def _wait(self, name: str, workers: int, until: float, meanwhile: Callable[[], object]) -> None:
        """Until both Jobs are complete."""
        jobs = {f"{name}-m": 1, f"{name}-w": workers}
        started, open_ = time.monotonic() + self._cluster.ready_timeout, set(jobs)
        while open_:
            for job in sorted(open_):
                pods = self._pods(job)
                if self._require_well(job, jobs[job], pods):
                    open_.discard(job)
                elif time.monotonic() > started and sum(map(_has_begun, pods)) < jobs[job]:
                    self._refuse_late(job, jobs[job], pods)
            if open_ and time.monotonic() > until:
                raise TargetError(f"the load's Jobs {', '.join(sorted(open_))} did not end in time, and were deleted")
            meanwhile()
            if open_:
                time.sleep(_LOOK)

    def _require_well(self, job: str, count: int, pods: Sequence[Json]) -> bool:
        """Whether the Job is complete. Raises `TargetError` where it, or one of its pods, can no longer be."""
        found = self._client.get("Job", job)
        if found is None:
            raise TargetError(f"the load's Job {job} was deleted by someone else")
        conditions = {
            one["type"]: one for one in found.get("status", {}).get("conditions") or () if one.get("status") == "True"
        }
        failed = conditions.get("Failed") or conditions.get("FailureTarget")
        bad = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
        if failed or bad or found.get("status", {}).get("failed"):
            why = f"{failed.get('reason')}: {failed.get('message')}" if failed else "a pod of it failed"
            raise TargetError(f"the load's Job {job} failed ({why}){self._told(job)}")
        for pod in pods:
            if (trouble := _trouble(pod)) and trouble.partition(":")[0] in _HOPELESS:
                raise TargetError(f"the load's pod {pod['metadata']['name']} cannot start: {trouble}")
        return "Complete" in conditions and found["status"].get("succeeded") == count

    def _refuse_late(self, job: str, count: int, pods: Sequence[Json]) -> None:
        begun = sum(map(_has_begun, pods))
        waiting = [f"{pod['metadata']['name']}: {_trouble(pod)}" for pod in pods if not _has_begun(pod)]
        raise TargetError(
            f"{begun} of {count} pods of the load's Job {job} started within {self._cluster.ready_timeout:g} s"
            + (f" ({'; '.join(waiting[:3])})" if waiting else "")
        )

    def _told(self, job: str) -> str:
        """What the pods of the run that failed say of it, the first to end first."""
        master = f"{job.rpartition('-')[0]}-m"
        pods = [pod for name in {job, master} for pod in self._pods(name)]
        failed = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
        told = []
        for pod in sorted(failed, key=_ended_at)[:3]:
            log = self._client.log(pod["metadata"]["name"], CONTAINER, 50)
            lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith(_FRAME)]
            status = pod["status"]
            why = [status.get("reason"), status.get("message"), *_exit(pod), lines[-1][:300] if lines else None]
            told.append(f"{pod['metadata']['name']}: {', '.join(filter(None, why))}")
        return f": {'; '.join(told)}" if told else ""

    def _logs(self, name: str, workers: int) -> tuple[str, list[str]]:
        masters = [pod for pod in self._pods(f"{name}-m") if pod["status"].get("phase") == "Succeeded"]
        found = {
            _index(pod): pod for pod in self._pods(f"{name}-w") if pod.get("status", {}).get("phase") == "Succeeded"
        }
        if len(masters) != 1 or sorted(found) != list(range(workers)):
            raise TargetError(
                f"of the load's {workers} workers {len(found)} are there to be read, and of its master {len(masters)}: "
                "someone else removed pods"
            )
        logs = [self._client.log(pod["metadata"]["name"], CONTAINER, LINES) for _, pod in sorted(found.items())]
        return self._client.log(masters[0]["metadata"]["name"], CONTAINER, LINES), logs


def _job(
    cluster: Cluster,
    model: str,
    name: str,
    options: Sequence[str],
    maps: str,
    plan: bytes,
    *,
    promotion: str,
    seconds: float,
) -> Json:
    role = options[0]
    labels = _labels(model, role)
    notes = {names.MODEL_NAME: model, names.PROMOTION: promotion}
    command = [cluster.python, "-m", "loadtests.agent", *options, "--port", str(PORT), "--plan", PLAN]
    command += ["--digest", hashlib.sha256(plan).hexdigest(), "--patience", f"{cluster.ready_timeout:g}"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": cluster.namespace, "labels": labels, "annotations": notes},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": math.ceil(seconds),
            "ttlSecondsAfterFinished": KEPT,
            "template": {
                "metadata": {"labels": {**labels, **_ALONE}, "annotations": {**notes, **_LEFT_ALONE}},
                "spec": overlay(_pod(cluster, model, labels, command, maps, plan), cluster.load.pod),
            },
        },
    }


def _pod(
    cluster: Cluster, model: str, labels: dict[str, str], command: list[str], maps: str, plan: bytes
) -> Json:  # fmt: skip
    pieces = range(math.ceil(len(plan) / PIECE))
    resources = cluster.load.resources
    spread = {"labelSelector": {"matchLabels": {LOAD: labels[LOAD]}}, "topologyKey": "kubernetes.io/hostname"}
    versions = {
        "labelSelector": {"matchLabels": {names.MODEL: names.slug(model)}},
        "topologyKey": spread["topologyKey"],
    }
    spec: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        # A Service called "locust" would set options of Locust's by its environment.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 10,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # Beside a model server a worker would measure itself.
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": versions}]
            }
        },
        "topologySpreadConstraints": [{**spread, "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}],
        "containers": [
            {
                "name": CONTAINER,
                "image": cluster.load.image or cluster.image,
                "imagePullPolicy": cluster.pull_policy,
                "command": command,
                "env": [
                    {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "HOME", "value": "/tmp"},  # noqa: S108
                    {"name": "PYTHONUNBUFFERED", "value": "1"},
                ],
                "resources": {"requests": dict(resources.requests), "limits": dict(resources.limits)},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [
                    {"name": "plan", "mountPath": PLAN, "readOnly": True},
                    {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
                ],
            }
        ],
        "volumes": [
            {
                "name": "plan",
                "projected": {"sources": [{"configMap": {"name": f"{maps}-{number}"}} for number in pieces]},
            },
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    if cluster.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in cluster.pull_secrets]
    return spec


def _labels(model: str, role: str) -> dict[str, str]:
    # Not `names.labels`: by those the pods of versions are found.
    return {
        "app.kubernetes.io/name": "titleshot-load",
        "app.kubernetes.io/component": role,
        "app.kubernetes.io/managed-by": names.MANAGER,
        "app.kubernetes.io/part-of": "titleshot",
        LOAD: names.slug(model),
    }


def _owned_by(job: Json) -> Json:
    meta = job["metadata"]
    return {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": meta["name"], "uid": meta["uid"]}


def _index(pod: Json) -> int:
    meta = pod["metadata"]
    return int({**(meta.get("labels") or {}), **(meta.get("annotations") or {})}.get(_INDEX, -1))


def _has_begun(pod: Json) -> bool:
    return pod.get("status", {}).get("phase") in {"Running", "Succeeded", "Failed"}


def _trouble(pod: Json) -> str:
    """Why the pod does not run yet, in the cluster's words; empty where it says nothing."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses") or ():
        if waiting := container.get("state", {}).get("waiting"):
            return f"{waiting.get('reason')}: {waiting.get('message', '')}"
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason')}: {condition.get('message', '')}"
    return ""


def _terminated(pod: Json) -> list[Json]:
    states = [one.get("state", {}).get("terminated") for one in pod.get("status", {}).get("containerStatuses") or ()]
    return [state for state in states if state]


def _exit(pod: Json) -> list[str]:
    return [f"{state.get('reason') or 'Error'} (exit code {state.get('exitCode')})" for state in _terminated(pod)]


def _ended_at(pod: Json) -> str:
    return max((str(state.get("finishedAt") or "") for state in _terminated(pod)), default="")

"""The controllers of the tests' cluster: they make pods of Deployments and Jobs, endpoints of Services, and statuses of all of these.

One thread looks at everything whenever anything has changed: a test's cluster has dozens of objects, not thousands. It
talks to the API server over HTTP with watches, as the real ones do, and meets the same conflicts and faults.

What is there: Deployment (RollingUpdate, Recreate, pause, revision, conditions Available, Progressing, ReplicaFailure with
ProgressDeadlineExceeded), ReplicaSet, Job (parallelism, completions, Indexed, backoffLimit, activeDeadlineSeconds, ttlSecondsAfterFinished,
suspend), EndpointSlice, PodDisruptionBudget status, HorizontalPodAutoscaler (keeps replicas within its bounds, measures nothing). What is not:
StatefulSets, DaemonSets, CronJobs, adoption of orphans, podFailurePolicy, the old Endpoints, and metrics.
"""

import contextlib
import copy
import hashlib
import json
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from tests.cluster.rest import (
    KINDS,
    Api,
    ApiError,
    Events,
    Informer,
    Json,
    condition,
    key_of,
    matches,
    name_of,
    namespace_of,
    now,
)

_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_HASH = "pod-template-hash"
_REVISION = "deployment.kubernetes.io/revision"
_SERVICE = "kubernetes.io/service-name"
_WATCHED = (
    *("Deployment", "ReplicaSet", "Pod", "Service", "EndpointSlice"),
    *("Job", "PodDisruptionBudget", "HorizontalPodAutoscaler"),
)


def suffix(length: int = 5) -> str:
    """A random ending as API servers make it."""
    return "".join(random.choices(_LETTERS, k=length))


def owner(obj: Json) -> Json:
    """An ownerReference to a controller."""
    version, _, _ = KINDS[obj["kind"]]
    return {
        "apiVersion": version,
        "kind": obj["kind"],
        "name": name_of(obj),
        "uid": obj["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def is_ready(pod: Json) -> bool:
    """Whether its condition Ready is true."""
    return any(
        one["type"] == "Ready" and one["status"] == "True" for one in pod.get("status", {}).get("conditions") or []
    )


def ended(pod: Json) -> bool:
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}


def leaving(obj: Json) -> bool:
    return bool(obj["metadata"].get("deletionTimestamp"))


def share(value: Any, of: int, *, up: bool) -> int:
    """An IntOrString: a number, or a percentage of `of`."""
    if isinstance(value, str) and value.endswith("%"):
        part = int(value[:-1]) * of / 100
        return math.ceil(part) if up else math.floor(part)
    return int(value)


class Controllers:
    """`start`, then `stop`. `speed` divides waiting times (minReadySeconds, back-off of jobs), never deadlines."""

    def __init__(self, api: Api, speed: float = 10.0) -> None:
        self._api, self._speed, self._events = api, speed, Events(api)
        self._dirty, self._stop = threading.Event(), threading.Event()
        self._caches = {kind: Informer(api, kind, self._dirty.set) for kind in _WATCHED}
        self._progress: dict[str, tuple[Any, float, bool]] = {}
        self._ready_since: dict[str, float] = {}
        self._job_wait: dict[str, float] = {}
        self._owned: dict[str, list[Json]] = {}
        self.errors: list[str] = []
        """What went wrong last: for those who look for the reason of a test's failure."""
        self.paused = threading.Event()
        """Set: nothing is done until it is cleared."""
        self._thread = threading.Thread(target=self._run, name="controllers", daemon=True)

    def start(self) -> "Controllers":
        for cache in self._caches.values():
            cache.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._dirty.set()
        for cache in self._caches.values():
            cache.stop()
        if self._thread.is_alive():
            self._thread.join(5)
        self._events.stop()

    def _all(self, kind: str) -> list[Json]:
        return self._caches[kind].all()

    def _run(self) -> None:
        if not all(cache.wait(self._stop) for cache in self._caches.values()):
            return
        while not self._stop.is_set():
            self._dirty.wait(0.25)
            if self.paused.is_set():
                self._stop.wait(0.05)
                continue
            self._dirty.clear()
            if not self._round():
                self._stop.wait(0.05)
                self._dirty.set()

    def _round(self) -> bool:
        """Everything once; whether nothing failed."""
        well = True
        works: list[tuple[str, Callable[[Json], None]]] = [
            ("Service", self._service),
            ("HorizontalPodAutoscaler", self._autoscaler),
            ("Deployment", self._deployment),
            ("ReplicaSet", self._replicas),
            ("Job", self._job),
            ("Deployment", self._deployment_status),
            ("PodDisruptionBudget", self._budget),
        ]
        for kind, work in works:
            self._owned = defaultdict(list)
            for pod in (*self._all("Pod"), *self._all("ReplicaSet")):
                for reference in pod["metadata"].get("ownerReferences") or []:
                    if reference.get("controller"):
                        self._owned[reference["uid"]].append(pod)
            for obj in self._all(kind):
                try:
                    work(obj)
                except ApiError as error:
                    if error.code not in {0, 404, 409, 429} and error.code < 500:
                        self.errors = [*self.errors[-20:], f"{kind} {name_of(obj)}: {error}"]
                    well = False
                except (KeyError, TypeError, ValueError) as error:
                    # An object that only a lenient server lets in: ours to look into, not to die of.
                    self.errors = [*self.errors[-20:], f"{kind} {name_of(obj)}: {type(error).__name__} {error}"]
        with contextlib.suppress(ApiError):
            self._strays()
        return well

    def _owns(self, obj: Json, kind: str) -> list[Json]:
        return [one for one in self._owned.get(obj["metadata"]["uid"], []) if one.get("kind", kind) == kind]

    def _create(self, obj: Json) -> Json:
        made = self._api.create(obj)
        self._caches[obj["kind"]].seen(made)
        for reference in made["metadata"].get("ownerReferences") or []:
            self._owned.setdefault(reference["uid"], []).append({"kind": obj["kind"], **made})
        return made

    def _change(self, obj: Json, **spec: Any) -> Json:
        kind = obj["kind"]
        made = self._api.patch(kind, namespace_of(obj), name_of(obj), {"spec": spec})
        self._caches[kind].seen(made)
        return made

    def _delete(self, obj: Json, **options: Any) -> None:
        options = {"preconditions": {"uid": obj["metadata"]["uid"]}, **options}
        with contextlib.suppress(ApiError):
            self._api.delete(obj["kind"], namespace_of(obj), name_of(obj), **options)
            marked = copy.deepcopy(obj)
            marked["metadata"]["deletionTimestamp"] = now()
            self._caches[obj["kind"]].seen(marked)

    def _status(self, obj: Json, status: Json) -> None:
        kept = {key: value for key, value in status.items() if value not in (0, None, [])} | {
            key: value for key, value in status.items() if key in {"replicas", "conditions"} and value is not None
        }
        if kept.get("conditions") == []:
            del kept["conditions"]
        if kept == obj.get("status"):
            return
        made = self._api.replace({**obj, "status": kept}, "status")
        self._caches[obj["kind"]].seen(made)

    # --- ReplicaSets

    def _available(self, pod: Json, seconds: float) -> bool:
        uid = pod["metadata"]["uid"]
        if not is_ready(pod) or leaving(pod):
            self._ready_since.pop(uid, None)
            return False
        since = self._ready_since.setdefault(uid, time.monotonic())
        if time.monotonic() - since >= seconds / self._speed:
            return True
        threading.Timer(seconds / self._speed, self._dirty.set).start()
        return False

    def _replicas(self, rs: Json) -> None:
        if leaving(rs):
            return
        pods = self._owns(rs, "Pod")
        active = [pod for pod in pods if not ended(pod) and not leaving(pod)]
        wanted, failed = rs["spec"].get("replicas", 1), ""
        for _ in range(wanted - len(active)):
            try:
                active.append(self._pod(rs, rs["spec"]["template"], f"{name_of(rs)}-"))
                self._events.say(
                    rs, "Normal", "SuccessfulCreate", f"Created pod: {name_of(active[-1])}", "replicaset-controller"
                )
            except ApiError as error:
                if error.code in {0, 409, 429} or error.code >= 500:
                    raise
                failed = error.message
                self._events.say(rs, "Warning", "FailedCreate", f"Error creating: {failed}", "replicaset-controller")
                threading.Timer(0.5, self._dirty.set).start()
                break
        if len(active) > wanted:
            # Those that are no use go first, then the youngest.
            def worth(pod: Json) -> tuple[bool, bool, str]:
                return (bool(pod["spec"].get("nodeName")), is_ready(pod), pod["metadata"].get("creationTimestamp", ""))

            ready = sorted(active, key=lambda pod: (worth(pod)[0], worth(pod)[1]))
            for pod in ready[: len(active) - wanted]:
                self._delete(pod)
                self._events.say(
                    rs, "Normal", "SuccessfulDelete", f"Deleted pod: {name_of(pod)}", "replicaset-controller"
                )
                active.remove(pod)
        seconds = rs["spec"].get("minReadySeconds", 0)
        conditions = [
            one
            for one in copy.deepcopy(rs.get("status", {}).get("conditions") or [])
            if one["type"] != "ReplicaFailure"
        ]
        if failed:
            condition(conditions, "ReplicaFailure", "True", "FailedCreate", failed)
        labels = rs["spec"]["template"]["metadata"].get("labels") or {}
        full = sum(1 for pod in active if labels.items() <= (pod["metadata"].get("labels") or {}).items())
        self._status(
            rs,
            {
                "replicas": len(active),
                "fullyLabeledReplicas": full,
                "readyReplicas": sum(1 for pod in active if is_ready(pod)),
                "availableReplicas": sum(1 for pod in active if self._available(pod, seconds)),
                "observedGeneration": rs["metadata"].get("generation", 0),
                "conditions": conditions,
            },
        )

    def _pod(self, parent: Json, template: Json, prefix: str, **more: Any) -> Json:
        template = copy.deepcopy(template)
        meta = template.get("metadata") or {}
        meta = {key: value for key, value in meta.items() if key in {"labels", "annotations", "finalizers"}}
        for key, value in more.items():
            meta[key] = {**(meta.get(key) or {}), **value}
        return self._create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    **meta,
                    "name": prefix[:58] + suffix(),
                    "generateName": prefix,
                    "namespace": namespace_of(parent),
                    "ownerReferences": [owner(parent)],
                },
                "spec": template["spec"],
            }
        )

    # --- Deployments

    def _deployment(self, deployment: Json) -> None:
        if leaving(deployment):
            return
        spec = deployment["spec"]
        sets = self._owns(deployment, "ReplicaSet")
        fresh, revision = self._newest(deployment, sets), self._revision(sets)
        desired = spec.get("replicas", 1)
        if fresh is None:
            if spec.get("paused"):
                return
            fresh = self._replica_set(deployment, revision + 1, 0 if sets else desired)
            self._events.say(
                *(deployment, "Normal", "ScalingReplicaSet"),
                *(f"Scaled up replica set {name_of(fresh)} from 0 to {desired}", "deployment-controller"),
            )
        number = fresh["metadata"].get("annotations", {}).get(_REVISION, "1")
        if (deployment["metadata"].get("annotations") or {}).get(_REVISION) != number:
            meta = {"metadata": {"annotations": {_REVISION: number}}}
            made = self._api.patch("Deployment", namespace_of(deployment), name_of(deployment), meta)
            self._caches["Deployment"].seen(made)
        old = [one for one in sets if one is not fresh and one["spec"].get("replicas", 0) and not leaving(one)]
        if spec.get("paused"):
            return
        if not old:
            self._scale(fresh, desired)
        elif (spec.get("strategy") or {}).get("type") == "Recreate":
            for one in old:
                self._scale(one, 0)
            if not any(self._owns(one, "Pod") for one in old):
                self._scale(fresh, desired)
        else:
            self._roll(deployment, fresh, old, desired)

    def _roll(self, deployment: Json, fresh: Json, old: list[Json], desired: int) -> None:
        surge, unavailable = self._bounds(deployment, desired)
        total = sum(one["spec"].get("replicas", 0) for one in (fresh, *old))
        room = desired + surge - total
        if fresh["spec"].get("replicas", 0) > desired:
            self._scale(fresh, desired)
        elif room > 0:
            self._scale(fresh, min(desired, fresh["spec"].get("replicas", 0) + room))
        waiting = max(0, fresh["spec"].get("replicas", 0) - fresh.get("status", {}).get("availableReplicas", 0))
        spare = total - (desired - unavailable) - waiting
        for sick_only in (True, False):
            for one in old:
                has = one["spec"].get("replicas", 0)
                sick = has - one.get("status", {}).get("availableReplicas", 0)
                cut = min(spare, sick if sick_only else has)
                if cut > 0:
                    one["spec"] = self._scale(one, has - cut)["spec"]
                    spare -= cut

    def _bounds(self, deployment: Json, desired: int) -> tuple[int, int]:
        rolling = (deployment["spec"].get("strategy") or {}).get("rollingUpdate") or {}
        surge = share(rolling.get("maxSurge", "25%"), desired, up=True)
        unavailable = share(rolling.get("maxUnavailable", "25%"), desired, up=False)
        return surge, unavailable if surge or unavailable else 1

    def _scale(self, rs: Json, replicas: int) -> Json:
        return (
            rs
            if rs["spec"].get("replicas") == replicas
            else self._change({"kind": "ReplicaSet", **rs}, replicas=replicas)
        )

    def _revision(self, sets: Iterable[Json]) -> int:
        return max((int((one["metadata"].get("annotations") or {}).get(_REVISION, 0)) for one in sets), default=0)

    def _newest(self, deployment: Json, sets: Iterable[Json]) -> Json | None:
        mark = _template_hash(deployment)
        return next((one for one in sets if one["metadata"]["labels"].get(_HASH) == mark and not leaving(one)), None)

    def _replica_set(self, deployment: Json, revision: int, replicas: int) -> Json:
        spec, mark = deployment["spec"], _template_hash(deployment)
        template = copy.deepcopy(spec["template"])
        labels = {**(template["metadata"].get("labels") or {}), _HASH: mark}
        template["metadata"]["labels"] = labels
        selector = copy.deepcopy(spec["selector"])
        selector["matchLabels"] = {**(selector.get("matchLabels") or {}), _HASH: mark}
        annotations = {
            key: value
            for key, value in (deployment["metadata"].get("annotations") or {}).items()
            if key not in {_REVISION, "kubectl.kubernetes.io/last-applied-configuration"}
        }
        return self._create(
            {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "metadata": {
                    "name": f"{name_of(deployment)}-{mark}",
                    "namespace": namespace_of(deployment),
                    "labels": labels,
                    "annotations": {**annotations, _REVISION: str(revision)},
                    "ownerReferences": [owner(deployment)],
                },
                "spec": {
                    "replicas": replicas,
                    "selector": selector,
                    "template": template,
                    **({"minReadySeconds": spec["minReadySeconds"]} if spec.get("minReadySeconds") else {}),
                },
            }
        )

    def _deployment_status(self, deployment: Json) -> None:
        if leaving(deployment):
            return
        sets = self._owns(deployment, "ReplicaSet")
        fresh = self._newest(deployment, sets)
        if fresh is None:
            return
        desired = deployment["spec"].get("replicas", 1)

        def total(what: str, of: Iterable[Json]) -> int:
            return sum(one.get("status", {}).get(what, 0) for one in of)

        old = deployment.get("status", {})
        status = {
            "observedGeneration": deployment["metadata"].get("generation", 0),
            "replicas": total("replicas", sets),
            "updatedReplicas": total("replicas", [fresh]),
            "readyReplicas": total("readyReplicas", sets),
            "availableReplicas": total("availableReplicas", sets),
        }
        status["unavailableReplicas"] = max(0, desired - status["availableReplicas"])
        conditions = copy.deepcopy(old.get("conditions") or [])
        _, unavailable = self._bounds(deployment, desired)
        if status["availableReplicas"] >= desired - unavailable:
            condition(
                conditions, "Available", "True", "MinimumReplicasAvailable", "Deployment has minimum availability."
            )
        else:
            text = "Deployment does not have minimum availability."
            condition(conditions, "Available", "False", "MinimumReplicasUnavailable", text)
        counts = (status["updatedReplicas"], status["readyReplicas"], status["availableReplicas"], desired)
        complete = status["updatedReplicas"] == status["availableReplicas"] == status["replicas"] == desired
        self._progressing(deployment, fresh, conditions, counts, complete=complete)
        failures = [one for one in fresh.get("status", {}).get("conditions") or [] if one["type"] == "ReplicaFailure"]
        conditions = [one for one in conditions if one["type"] != "ReplicaFailure"] + failures
        for one in conditions:
            before = next((b for b in old.get("conditions") or [] if b["type"] == one["type"]), {})
            same = all(before.get(key) == one.get(key) for key in ("status", "reason", "message"))
            one["lastUpdateTime"] = before.get("lastUpdateTime", now()) if same else now()
        self._status(deployment, {**status, "conditions": conditions})

    def _progressing(
        self, deployment: Json, fresh: Json, conditions: list[Json], counts: Any, *, complete: bool
    ) -> None:
        uid, name = fresh["metadata"]["uid"], name_of(fresh)
        seen, since, done = self._progress.get(uid, (None, 0.0, False))
        if seen != counts:
            since = time.monotonic()
        done = done or complete
        self._progress[uid] = (counts, since, done)
        deadline = deployment["spec"].get("progressDeadlineSeconds", 600)
        late = time.monotonic() - since > deadline
        if done:
            text = f'ReplicaSet "{name}" has successfully progressed.'
            condition(conditions, "Progressing", "True", "NewReplicaSetAvailable", text)
        elif late:
            text = f'ReplicaSet "{name}" has timed out progressing.'
            condition(conditions, "Progressing", "False", "ProgressDeadlineExceeded", text)
        elif seen is None:
            condition(conditions, "Progressing", "True", "NewReplicaSetCreated", f'Created new replica set "{name}"')
        else:
            condition(conditions, "Progressing", "True", "ReplicaSetUpdated", f'ReplicaSet "{name}" is progressing.')

    # --- Services

    def _service(self, service: Json) -> None:
        selector = service["spec"].get("selector")
        if not selector or leaving(service):
            return
        namespace, name = key_of(service)
        pods = [
            pod
            for pod in self._all("Pod")
            if namespace_of(pod) == namespace
            and selector.items() <= (pod["metadata"].get("labels") or {}).items()
            and pod.get("status", {}).get("podIP")
            and not ended(pod)
        ]
        groups: dict[str, tuple[list[Json], list[Json]]] = {}
        for pod in pods:
            ports = [port for port in (_target(one, pod) for one in service["spec"].get("ports") or []) if port]
            groups.setdefault(json.dumps(ports), (ports, []))[1].append(_endpoint(service, pod))
        if not groups:
            ports = [_port(one, one.get("targetPort", one["port"])) for one in service["spec"].get("ports") or []]
            groups["none"] = ([port for port in ports if isinstance(port["port"], int)], [])
        mine = [
            one
            for one in self._all("EndpointSlice")
            if namespace_of(one) == namespace
            and (one["metadata"].get("labels") or {}).get(_SERVICE) == name
            and not leaving(one)
        ]
        for ports, endpoints in groups.values():
            same = next((one for one in mine if _plain(one.get("ports")) == _plain(ports)), mine[0] if mine else None)
            if same is None:
                self._create(self._slice(service, ports, endpoints))
                continue
            mine.remove(same)
            if _plain(same.get("ports")) != _plain(ports) or _plain(same.get("endpoints")) != _plain(endpoints):
                made = self._api.replace({**same, "ports": ports, "endpoints": endpoints})
                self._caches["EndpointSlice"].seen(made)
        for one in mine:
            self._delete(one)

    def _slice(self, service: Json, ports: list[Json], endpoints: list[Json]) -> Json:
        labels = {
            **(service["metadata"].get("labels") or {}),
            _SERVICE: name_of(service),
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        }
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name_of(service)}-{suffix()}",
                "generateName": f"{name_of(service)}-",
                "namespace": namespace_of(service),
                "labels": labels,
                "ownerReferences": [owner({"kind": "Service", **service})],
            },
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": endpoints,
        }

    def _strays(self) -> None:
        """Slices whose Service is gone."""
        services = {one["metadata"]["uid"] for one in self._all("Service")}
        for one in self._all("EndpointSlice"):
            owners = [o["uid"] for o in one["metadata"].get("ownerReferences") or [] if o["kind"] == "Service"]
            if owners and not services & {*owners} and not leaving(one):
                self._delete(one)

    # --- Jobs

    def _job(self, job: Json) -> None:
        if leaving(job):
            return
        spec, old = job["spec"], job.get("status", {})
        finished = next(
            (c for c in old.get("conditions") or [] if c["type"] in {"Complete", "Failed"} and c["status"] == "True"),
            None,
        )
        uid = job["metadata"]["uid"]
        if finished:
            if (ttl := spec.get("ttlSecondsAfterFinished")) is not None:
                since = self._job_wait.setdefault(f"{uid}-ttl", time.monotonic())
                if time.monotonic() - since >= ttl:
                    self._delete(job, propagationPolicy="Background")
            return
        pods = self._owns(job, "Pod")
        good = [pod for pod in pods if pod.get("status", {}).get("phase") == "Succeeded"]
        bad = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
        active = [pod for pod in pods if not ended(pod) and not leaving(pod)]
        conditions = copy.deepcopy(old.get("conditions") or [])
        parallel, wanted = spec.get("parallelism", 1), spec.get("completions")
        started = old.get("startTime") or now()
        restarts = sum(
            s.get("restartCount", 0) for pod in active for s in pod.get("status", {}).get("containerStatuses") or []
        )
        fault = ""
        self._job_wait.setdefault(f"{uid}-start", time.monotonic())
        limit = spec.get("activeDeadlineSeconds")
        if len(bad) + restarts > spec.get("backoffLimit", 6):
            fault = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        elif limit is not None and time.monotonic() - self._job_wait[f"{uid}-start"] > limit:
            fault = "DeadlineExceeded", "Job was active longer than specified deadline"
        done = len(good) >= wanted if wanted is not None else bool(good) and not active
        completed = None
        if fault or spec.get("suspend"):
            for pod in active:
                self._delete(pod)
            active = []
        if fault:
            condition(conditions, "FailureTarget", "True", *fault)
            condition(conditions, "Failed", "True", *fault)
            self._events.say(job, "Warning", *fault, "job-controller")
        elif done and not active:
            reason = "CompletionsReached", "Reached expected number of succeeded pods"
            condition(conditions, "SuccessCriteriaMet", "True", *reason)
            condition(conditions, "Complete", "True", *reason)
            completed = now()
            self._events.say(job, "Normal", "Completed", "Job completed", "job-controller")
        elif not done and not spec.get("suspend"):
            left = parallel - len(active)
            if wanted is not None:
                left = min(left, wanted - len(good) - len(active))
            elif good:
                left = 0
            if left > 0 and self._may_retry(uid, len(bad)):
                self._job_pods(job, left, good, active)
        self._status(
            job,
            {
                "active": len(active),
                "ready": sum(1 for pod in active if is_ready(pod)),
                "succeeded": len(good),
                "failed": len(bad),
                "startTime": None if spec.get("suspend") else started,
                "completionTime": completed,
                "conditions": conditions,
                "uncountedTerminatedPods": {},
            },
        )

    def _may_retry(self, uid: str, failed: int) -> bool:
        """Failed pods are made anew after 10 s, 20 s, 40 s ... (divided by the speed)."""
        if not failed:
            return True
        since = self._job_wait.setdefault(f"{uid}-{failed}", time.monotonic())
        delay = min(600.0, 10.0 * 2 ** (failed - 1)) / self._speed
        return time.monotonic() - since >= delay

    def _job_pods(self, job: Json, count: int, good: list[Json], active: list[Json]) -> None:
        name, uid = name_of(job), job["metadata"]["uid"]
        labels = {
            "batch.kubernetes.io/controller-uid": uid,
            "batch.kubernetes.io/job-name": name,
            "controller-uid": uid,
            "job-name": name,
        }
        mark = "batch.kubernetes.io/job-completion-index"
        indexed = job["spec"].get("completionMode") == "Indexed"
        taken = {(pod["metadata"].get("annotations") or {}).get(mark) for pod in (*good, *active)}
        free = [str(i) for i in range(job["spec"].get("completions") or 0) if str(i) not in taken]
        for index in range(count):
            template, prefix, notes = copy.deepcopy(job["spec"]["template"]), f"{name}-", {}
            template.setdefault("metadata", {})
            if indexed:
                number = free[index]
                prefix, notes = f"{name}-{number}-", {mark: number}
                labels = {**labels, mark: number}
                for container in template["spec"]["containers"]:
                    container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "value": number})
            template["spec"].setdefault("restartPolicy", "Never")
            active.append(self._pod(job, template, prefix, labels=labels, annotations=notes))
            self._events.say(job, "Normal", "SuccessfulCreate", f"Created pod: {name_of(active[-1])}", "job-controller")

    # --- Budgets and autoscalers

    def _budget(self, budget: Json) -> None:
        namespace = namespace_of(budget)
        pods = [
            pod
            for pod in self._all("Pod")
            if namespace_of(pod) == namespace and matches(budget["spec"].get("selector"), pod["metadata"].get("labels"))
        ]
        pods = [pod for pod in pods if not ended(pod)]
        sets = {one["metadata"]["uid"]: one for one in self._all("ReplicaSet")}
        parents = {
            o["uid"] for pod in pods for o in pod["metadata"].get("ownerReferences") or [] if o.get("controller")
        }
        expected = sum(sets[uid]["spec"].get("replicas", 1) for uid in parents if uid in sets)
        expected += sum(1 for pod in pods if not pod["metadata"].get("ownerReferences"))
        healthy = sum(1 for pod in pods if is_ready(pod) and not leaving(pod))
        spec = budget["spec"]
        if spec.get("maxUnavailable") is not None:
            needed = max(0, expected - share(spec["maxUnavailable"], expected, up=True))
        else:
            needed = share(spec.get("minAvailable", 1), expected, up=True)
        allowed = max(0, healthy - needed) if expected else 0
        conditions = copy.deepcopy(budget.get("status", {}).get("conditions") or [])
        generation = budget["metadata"].get("generation", 0)
        condition(
            *(conditions, "DisruptionAllowed", "True" if allowed else "False"),
            *("SufficientPods" if allowed else "InsufficientPods", ""),
            observedGeneration=generation,
        )
        status = {
            "currentHealthy": healthy,
            "desiredHealthy": needed,
            "disruptionsAllowed": allowed,
            "expectedPods": expected,
            "observedGeneration": generation,
            "conditions": conditions,
        }
        if status != {key: value for key, value in budget.get("status", {}).items() if key != "disruptedPods"}:
            self._caches["PodDisruptionBudget"].seen(self._api.replace({**budget, "status": status}, "status"))

    def _autoscaler(self, autoscaler: Json) -> None:
        spec = autoscaler["spec"]
        target = self._caches["Deployment"].get(namespace_of(autoscaler), spec["scaleTargetRef"]["name"])
        conditions = copy.deepcopy(autoscaler.get("status", {}).get("conditions") or [])
        if spec["scaleTargetRef"]["kind"] != "Deployment" or target is None or leaving(target):
            text = "the HPA controller was unable to get the target's current scale"
            condition(conditions, "AbleToScale", "False", "FailedGetScale", text)
            self._status(autoscaler, {"currentMetrics": None, "desiredReplicas": 0, "conditions": conditions})
            return
        has = target["spec"].get("replicas", 1)
        wanted = min(max(has, spec.get("minReplicas", 1)), spec["maxReplicas"]) if has else 0
        if wanted != has:
            target = self._change(target, replicas=wanted)
        condition(
            conditions,
            "AbleToScale",
            "True",
            "SucceededGetScale",
            "the HPA controller was able to get the target's current scale",
        )
        text = "the HPA was unable to compute the replica count: unable to get metrics: no metrics API in the tests' cluster"
        condition(conditions, "ScalingActive", "False", "FailedGetResourceMetric", text)
        current = target.get("status", {}).get("replicas", 0)
        self._status(autoscaler, {"currentReplicas": current, "desiredReplicas": wanted, "conditions": conditions})


def _template_hash(deployment: Json) -> str:
    text = json.dumps(deployment["spec"]["template"], sort_keys=True).encode()
    number, made = int(hashlib.sha256(text).hexdigest()[:12], 16), ""
    while number and len(made) < 10:
        number, index = divmod(number, len(_LETTERS))
        made += _LETTERS[index]
    return made


def _plain(value: Any) -> str:
    """For comparison: what a server adds of defaults and orders by itself does not count."""
    items = [{k: v for k, v in one.items() if v not in (None, [], {})} for one in value or []]
    return json.dumps(sorted(items, key=lambda one: json.dumps(one, sort_keys=True)), sort_keys=True)


def _port(port: Json, number: Any) -> Json:
    more = {"appProtocol": port["appProtocol"]} if port.get("appProtocol") else {}
    return {"name": port.get("name", ""), "port": number, "protocol": port.get("protocol", "TCP"), **more}


def _target(port: Json, pod: Json) -> Json | None:
    """One port of an EndpointSlice; None where the pod has no port of that name."""
    target = port.get("targetPort", port["port"])
    if isinstance(target, str):
        containers = (*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"])
        named = [p["containerPort"] for c in containers for p in c.get("ports") or [] if p.get("name") == target]
        return _port(port, named[0]) if named else None
    return _port(port, target)


def _endpoint(service: Json, pod: Json) -> Json:
    going, serving = leaving(pod), is_ready(pod)
    ready = (serving and not going) or bool(service["spec"].get("publishNotReadyAddresses"))
    reference = {"kind": "Pod", "name": name_of(pod), "namespace": namespace_of(pod), "uid": pod["metadata"]["uid"]}
    return {
        "addresses": [pod["status"]["podIP"]],
        "conditions": {"ready": ready, "serving": serving, "terminating": going},
        "nodeName": pod["spec"].get("nodeName", ""),
        "targetRef": reference,
    }

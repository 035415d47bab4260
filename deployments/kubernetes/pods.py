"""What a version's pods, endpoints and events tell: what is ready, what went wrong, and whose fault it is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from deployments import fetch
from deployments.kubernetes.client import Client, Forbidden
from deployments.kubernetes.cluster import Json
from deployments.target import TargetError, TargetUnavailable

_LINES, _EVENTS, _PODS = 60, 20, 2
_NOT_STARTED = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "InvalidImageName",
        "ImageInspectError",
        "RegistryUnavailable",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "CreatePodSandboxError",
    }
)
"""Why a container waits for what is not the model's business: images, secrets, commands that are not in the image."""
_NOT_THE_MODEL = frozenset({"ContainerCannotRun", "StartError"})


@dataclass(frozen=True, slots=True)
class Fault:
    """What keeps a pod from being ready. `own`: the version's fault; otherwise the cluster's, or the settings'. `pod`
    and `container` name who could say more.
    """

    why: str
    own: bool
    pod: str = ""
    container: str = ""


def fault(pods: Iterable[Json]) -> Fault | None:
    """The worst that these pods tell; None where they may still come up. The version's own fault comes first."""
    found = [one for pod in pods if not leaving(pod) for one in _faults(pod)]
    return min(found, key=lambda one: not one.own, default=None)


def leaving(pod: Json) -> bool:
    """Whether a pod is being taken away, by us or by the cluster (evicted, its node shut down): not worth a word."""
    status = pod.get("status", {})
    return "deletionTimestamp" in pod["metadata"] or (status.get("phase") == "Failed" and bool(status.get("reason")))


def ready(pod: Json) -> bool:
    """Whether the kubelet calls it ready, and it is not leaving."""
    conditions = pod.get("status", {}).get("conditions") or ()
    return not leaving(pod) and any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def started(pod: Json) -> bool:
    """Whether anything of the version ever ran in it: before that, whatever is late is the cluster's."""
    states = [one.get(when) or {} for one in _statuses(pod) for when in ("state", "lastState")]
    return any("running" in one or "terminated" in one for one in states)


def state(pod: Json) -> str:
    """A pod in a word or two, as kubectl has it."""
    if "deletionTimestamp" in pod["metadata"]:
        return "Terminating"
    for one in _statuses(pod):
        waiting = one.get("state", {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            return str(waiting["reason"])
    status = pod.get("status", {})
    return str(status.get("reason") or status.get("phase") or "Unknown") + ("" if ready(pod) else ", not ready")


def _statuses(pod: Json) -> list[Json]:
    status = pod.get("status", {})
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _faults(pod: Json) -> Iterator[Fault]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for one in status.get("conditions") or ():
        if one["type"] == "PodScheduled" and one["status"] == "False" and one.get("reason") == "Unschedulable":
            yield Fault(f"pod {name} finds no node: {one.get('message', 'Unschedulable')}", own=False)
    init = {one["name"] for one in status.get("initContainerStatuses") or ()}
    for one in _statuses(pod):
        now, last = one.get("state") or {}, one.get("lastState") or {}
        what = f"{'init container' if one['name'] in init else 'container'} {one['name']} of pod {name}"
        waiting = now.get("waiting") or {}
        if waiting.get("reason") in _NOT_STARTED:
            words = f"{what} does not start: {waiting['reason']}: {waiting.get('message', '')}"
            yield Fault(words.rstrip(": "), own=False)
        ended = now.get("terminated") or last.get("terminated")
        if ended is None or (one["name"] in init and ended.get("exitCode") == 0):
            continue
        code, reason = ended.get("exitCode"), ended.get("reason", "")
        words = f"{what} ended with exit code {code}" + (f" ({reason})" if reason not in ("", "Error") else "")
        if reason in _NOT_THE_MODEL and ended.get("message"):
            words += f": {' '.join(ended['message'].split())}"
        # The fetcher tells apart what is not what was admitted from what could not be had: MLflow may be away.
        own = code == fetch.WRONG if one["name"] in init else reason not in _NOT_THE_MODEL
        yield Fault(words, own, name, one["name"])


def endpoints(client: Client, service: str) -> frozenset[str]:
    """The pods that the EndpointSlices of a Service list as ready (addresses, where they name no pods)."""
    found = set()
    for part in client.items("EndpointSlice", {"kubernetes.io/service-name": service}):
        for one in part.get("endpoints") or ():
            conditions = one.get("conditions") or {}
            if conditions.get("ready") is not False and not conditions.get("terminating"):
                target = one.get("targetRef") or {}
                found.add(str(target.get("name") or one["addresses"][0]))
    return frozenset(found)


def events(client: Client, name: str) -> list[str]:
    """What the cluster has to say about an object and whatever is named after it, oldest first."""
    try:
        said = client.items("Event", {})
    except Forbidden:
        return ["(we may not read events)"]
    except TargetUnavailable as error:
        return [f"(events could not be read: {error})"]
    mine = []
    for one in said:
        about = one.get("involvedObject") or one.get("regarding") or {}
        if about.get("name") == name or str(about.get("name", "")).startswith(f"{name}-"):
            mine.append(one)
    mine.sort(key=_when)
    return [_said(one) for one in mine[-_EVENTS:]]


def _when(event: Json) -> tuple[str, int]:
    meta = event["metadata"]
    # Times are whole seconds: what happened in the same one is told apart by when it was written.
    when = str(event.get("lastTimestamp") or event.get("eventTime") or meta.get("creationTimestamp"))[:19]
    return when, int(meta.get("resourceVersion") or 0)


def _said(event: Json) -> str:
    about = event.get("involvedObject") or event.get("regarding") or {}
    count = int(event.get("count") or (event.get("series") or {}).get("count") or 1)
    times = f" ({count} times)" if count > 1 else ""
    text = " ".join(str(event.get("message") or event.get("note") or "").split())
    whose = f"{about.get('kind', '')} {about.get('name', '')}"
    return f"{event.get('type', 'Normal')} {event.get('reason', '')}{times} {whose}: {text}"


def last_words(client: Client, name: str, pods: Sequence[Json]) -> str:
    """Events, and the last lines of every container of the pods that did worst, init containers first."""
    lines = [f"event: {one}" for one in events(client, name)]
    worst = sorted(pods, key=lambda pod: (leaving(pod), ready(pod), pod["metadata"]["name"]))[:_PODS]
    for pod in worst:
        for one in _statuses(pod):
            text = _log(client, pod["metadata"]["name"], one)
            if text.strip():
                lines += [f"--- container {one['name']} of pod {pod['metadata']['name']}:", text.rstrip()]
    return "\n".join(lines)


def last_line(client: Client, fault: Fault) -> str:
    """The last thing that a container said, empty where it said nothing."""
    if not fault.container:
        return ""
    try:
        text = client.log(fault.pod, fault.container, 5) or client.log(fault.pod, fault.container, 5, previous=True)
    except TargetError:
        return ""
    return (text.strip().splitlines() or [""])[-1]


def _log(client: Client, pod: str, status: Mapping[str, object]) -> str:
    try:
        text = client.log(pod, str(status["name"]), _LINES)
        if status.get("restartCount") and not _ended(status):
            # It runs again: what it said before it died is what counts.
            text = client.log(pod, str(status["name"]), _LINES, previous=True) or text
    except TargetError as error:
        return f"(its log could not be read: {error})"
    return text


def _ended(status: Mapping[str, object]) -> bool:
    state = status.get("state")
    return isinstance(state, dict) and bool(state.get("terminated"))

"""What the API server itself adds to built-in objects and refuses about them: the rules of Go, not of a schema.

Only what manifests of services like ours come across: pods and their controllers, Services, autoscalers, budgets, Leases, Jobs, RBAC.
"""

import base64
import binascii
import math
import re
import uuid
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from tests.cluster.schema import Json, bad, get, go, required, unsupported

Cause = tuple[str, str, str]
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?\Z")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?\Z")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]\Z")
_QUANTITY = re.compile(r"([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)\Z")
_FACTORS = {"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18} | {
    f"{letter}i": 1024 ** (n + 1) for n, letter in enumerate("KMGTPE")
}
_DECIMAL = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"]
_DNS_LABEL = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an "
    "alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_DNS_SUBDOMAIN = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end "
    "with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_DNS_1035 = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end "
    "with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_LABEL_VALUE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end "
    "with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_NAME_PART = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)


def quantity(text: Any) -> float:
    """A resource quantity as a number; raises ValueError."""
    match = _QUANTITY.match(str(text))
    if match is None:
        raise ValueError(text)
    number, suffix = match.groups()
    if suffix in _FACTORS:
        return float(number) * _FACTORS[suffix]
    return float(number + suffix)


def canonical(text: Any) -> str:
    """A quantity as Go writes it: "1000m" is "1", "0.5" is "500m", "1024Mi" is "1Gi"; raises ValueError."""
    match = _QUANTITY.match(str(text).strip())
    if match is None or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", match[1]) or not _suffix(match[2]):
        raise ValueError(r"quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")
    number, suffix = match.groups()
    if suffix.endswith("i"):
        value = Fraction(number) * 1024 ** ("KMGTPE".index(suffix[0]) + 1)
        whole = math.ceil(value)
        if abs(whole) >= 1024:
            power = 0
            while power < 6 and whole % 1024 == 0:
                whole, power = whole // 1024, power + 1
            return f"{whole}{['', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei'][power]}"
        suffix = ""
    else:
        exponent = int(suffix[1:]) if suffix[:1] in {"e", "E"} and suffix != "E" else 3 * (_DECIMAL.index(suffix) - 3)
        value = Fraction(number) * Fraction(10) ** exponent
    if value == 0:
        return "0"
    power = -3
    nanos = math.ceil(value * 10**9) if value > 0 else math.floor(value * 10**9)
    while power < 6 and nanos % 1000 == 0:
        nanos, power = nanos // 1000, power + 1
    if suffix[:1] in {"e", "E"} and suffix != "E":
        return f"{nanos}e{3 * power}" if power else str(nanos)
    return f"{nanos}{_DECIMAL[power + 3]}"


def _suffix(text: str) -> bool:
    return text in _FACTORS or bool(re.fullmatch(r"[eE][-+]?\d+", text))


# -------------------------------------------------------------------------------------------------------------- defaulting


def _set(obj: Json, **values: Any) -> None:
    for key, value in values.items():
        if obj.get(key) is None:
            obj[key] = value


def _probe(probe: Json | None) -> None:
    if probe:
        _set(probe, timeoutSeconds=1, periodSeconds=10, successThreshold=1, failureThreshold=3)
        if probe.get("httpGet"):
            _set(probe["httpGet"], path="/", scheme="HTTP")
        if probe.get("grpc") is not None:
            _set(probe["grpc"], service="")


def pull_policy(image: str) -> str:
    if "@" in image:
        return "IfNotPresent"
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    return "Always" if tag in {"", "latest"} else "IfNotPresent"


def _container(container: Json) -> None:
    _set(container, terminationMessagePath="/dev/termination-log", terminationMessagePolicy="File", resources={})
    _set(container, imagePullPolicy=pull_policy(container.get("image") or ""))
    for port in container.get("ports") or ():
        _set(port, protocol="TCP")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        _probe(container.get(name))
    for hook in (container.get("lifecycle") or {}).values():
        if isinstance(hook, dict) and hook.get("httpGet"):
            _set(hook["httpGet"], path="/", scheme="HTTP")
    for variable in container.get("env") or ():
        reference = get(variable, "valueFrom", "fieldRef")
        if reference:
            _set(reference, apiVersion="v1")
    resources = container["resources"]
    for name, limit in (resources.get("limits") or {}).items():
        resources.setdefault("requests", {}).setdefault(name, limit)


def _volume(volume: Json) -> None:
    if not set(volume) - {"name"}:
        volume["emptyDir"] = {}
    for source in ("configMap", "secret", "downwardAPI", "projected"):
        if volume.get(source) is not None:
            _set(volume[source], defaultMode=420)
    if volume.get("hostPath") is not None:
        _set(volume["hostPath"], type="")
    for item in get(volume, "downwardAPI", "items", otherwise=[]):
        if item.get("fieldRef"):
            _set(item["fieldRef"], apiVersion="v1")
    for source in get(volume, "projected", "sources", otherwise=[]):
        if source.get("serviceAccountToken"):
            _set(source["serviceAccountToken"], expirationSeconds=3600)


def pod_spec(spec: Json, *, restart: str = "Always") -> None:
    """The defaults of a pod's spec, wherever it stands."""
    _set(
        spec,
        restartPolicy=restart,
        terminationGracePeriodSeconds=30,
        dnsPolicy="ClusterFirst",
        schedulerName="default-scheduler",
        securityContext={},
    )
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account
    for kind in ("containers", "initContainers"):
        for container in spec.get(kind) or ():
            _container(container)
    for volume in spec.get("volumes") or ():
        _volume(volume)


def _template(spec: Json) -> None:
    template = spec.get("template")
    if template:
        pod_spec(template.setdefault("spec", {}))


def _deployment(obj: Json) -> None:
    spec = obj.setdefault("spec", {})
    _set(spec, replicas=1, strategy={}, revisionHistoryLimit=10, progressDeadlineSeconds=600)
    _set(spec["strategy"], type="RollingUpdate")
    if spec["strategy"]["type"] == "RollingUpdate":
        _set(spec["strategy"], rollingUpdate={})
        _set(spec["strategy"]["rollingUpdate"], maxUnavailable="25%", maxSurge="25%")
    _template(spec)


def _replica_set(obj: Json) -> None:
    spec = obj.setdefault("spec", {})
    _set(spec, replicas=1)
    _template(spec)


def _service(obj: Json) -> None:
    spec = obj.setdefault("spec", {})
    _set(spec, type="ClusterIP", sessionAffinity="None")
    if spec["type"] == "ExternalName":
        return
    _set(spec, internalTrafficPolicy="Cluster", ipFamilies=["IPv4"], ipFamilyPolicy="SingleStack")
    for port in spec.get("ports") or ():
        _set(port, protocol="TCP")
        if port.get("port") is not None:
            _set(port, targetPort=port["port"])


def _autoscaler(obj: Json) -> None:
    spec = obj.setdefault("spec", {})
    _set(spec, minReplicas=1)
    if not spec.get("metrics"):
        resource = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}
        spec["metrics"] = [{"type": "Resource", "resource": resource}]
    if spec.get("behavior"):
        up, down = spec["behavior"].setdefault("scaleUp", {}), spec["behavior"].setdefault("scaleDown", {})
        _set(up, stabilizationWindowSeconds=0, selectPolicy="Max")
        _set(down, selectPolicy="Max")
        percent = {"type": "Percent", "value": 100, "periodSeconds": 15}
        _set(up, policies=[{"type": "Pods", "value": 4, "periodSeconds": 15}, percent])
        _set(down, policies=[percent])


def _job(obj: Json) -> None:
    spec = obj.setdefault("spec", {})
    if spec.get("completions") is None and spec.get("parallelism") is None:
        _set(spec, completions=1)
    _set(spec, parallelism=1, backoffLimit=6, completionMode="NonIndexed", suspend=False)
    _set(spec, podReplacementPolicy="TerminatingOrFailed", manualSelector=False)
    _template(spec)
    uid = get(obj, "metadata", "uid")
    template = spec.get("template")
    if uid and template and not spec["manualSelector"] and not spec.get("selector"):
        labels = template.setdefault("metadata", {}).setdefault("labels", {})
        for prefix in ("", "batch.kubernetes.io/"):
            labels |= {f"{prefix}controller-uid": uid, f"{prefix}job-name": obj["metadata"]["name"]}
        spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}


def _endpoint_slice(obj: Json) -> None:
    for port in obj.get("ports") or ():
        _set(port, name="", protocol="TCP")


def _network_policy(obj: Json) -> None:
    spec = obj.setdefault("spec", {})
    if not spec.get("policyTypes"):
        spec["policyTypes"] = ["Ingress", *(["Egress"] if spec.get("egress") is not None else [])]
    for rule in [*(spec.get("ingress") or ()), *(spec.get("egress") or ())]:
        for port in rule.get("ports") or ():
            _set(port, protocol="TCP")


def _binding(obj: Json) -> None:
    if obj.get("roleRef"):
        _set(obj["roleRef"], apiGroup="rbac.authorization.k8s.io")
    for subject in obj.get("subjects") or ():
        if subject.get("kind") in {"User", "Group"}:
            _set(subject, apiGroup="rbac.authorization.k8s.io")


def _secret(obj: Json) -> None:
    _set(obj, type="Opaque")
    for key, value in (obj.pop("stringData", None) or {}).items():
        obj.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()


def _pod(obj: Json) -> None:
    pod_spec(obj.setdefault("spec", {}))
    _set(obj["spec"], enableServiceLinks=True)


def _namespace(obj: Json) -> None:
    _set(obj, spec={})
    _set(obj["spec"], finalizers=["kubernetes"])
    obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"].get("name", "")


_DEFAULTS: dict[str, Callable[[Json], None]] = {
    "Deployment": _deployment,
    "ReplicaSet": _replica_set,
    "Service": _service,
    "HorizontalPodAutoscaler": _autoscaler,
    "Job": _job,
    "EndpointSlice": _endpoint_slice,
    "NetworkPolicy": _network_policy,
    "RoleBinding": _binding,
    "ClusterRoleBinding": _binding,
    "Secret": _secret,
    "Pod": _pod,
    "Namespace": _namespace,
}


def default(obj: Json, kind: str) -> None:
    """Fill in, in place, what a built-in object has without being told."""
    if kind in _DEFAULTS:
        _DEFAULTS[kind](obj)


def first_status(kind: str, obj: Json) -> Json | None:
    """The status of a new object; None: it has none."""
    if kind == "Pod":
        return {"phase": "Pending", "qosClass": _quality(obj["spec"])}
    if kind == "PodDisruptionBudget":
        return dict.fromkeys(("disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"), 0)
    if kind == "HorizontalPodAutoscaler":
        return {"currentMetrics": None, "desiredReplicas": 0}
    first = {"Namespace": {"phase": "Active"}, "Service": {"loadBalancer": {}}, "ReplicaSet": {"replicas": 0}}
    return first.get(kind, {} if kind in {"Deployment", "Job"} else None)


def _quality(spec: Json) -> str:
    resources = [container.get("resources", {}) for container in spec.get("containers") or ()]
    if not any(part.get("requests") or part.get("limits") for part in resources):
        return "BestEffort"
    for part in resources:
        for name in ("cpu", "memory"):
            limit, request = get(part, "limits", name), get(part, "requests", name)
            if limit is None or (request is not None and str(request) != str(limit)):
                return "Burstable"
    return "Guaranteed"


# -------------------------------------------------------------------------------------------------------------- validation


def metadata(obj: Json, kind: str) -> Iterator[Cause]:
    """What is wrong with an object's name, labels and annotations."""
    meta = obj.get("metadata") or {}
    name = meta.get("name") or ""
    if not name:
        yield required("metadata.name", "name or generateName is required")
    elif kind in {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}:
        if "/" in name or "%" in name:
            yield bad("metadata.name", name, "may not contain '/'")
    elif kind == "Service":
        if not _SERVICE.match(name) or len(name) > 63:
            yield bad("metadata.name", name, _DNS_1035 if len(name) <= 63 else "must be no more than 63 characters")
    elif kind == "Namespace":
        if not _LABEL.match(name):
            yield bad("metadata.name", name, _DNS_LABEL)
        elif len(name) > 63:
            yield bad("metadata.name", name, "must be no more than 63 characters")
    elif not _SUBDOMAIN.match(name):
        yield bad("metadata.name", name, _DNS_SUBDOMAIN)
    elif len(name) > 253:
        yield bad("metadata.name", name, "must be no more than 253 characters")
    yield from labels(meta.get("labels"), "metadata.labels")
    for key in meta.get("annotations") or ():
        yield from _key(key.lower(), "metadata.annotations")
    size = sum(len(key) + len(value or "") for key, value in (meta.get("annotations") or {}).items())
    if size > 256 * 1024:
        yield "FieldValueTooLong", "Too long: may not be more than 262144 bytes", "metadata.annotations"


def labels(found: Json | None, path: str) -> Iterator[Cause]:
    for key, value in (found or {}).items():
        yield from _key(key, path)
        if len(value or "") > 63:
            yield bad(path, value, "must be no more than 63 characters")
        elif not _VALUE.match(value or ""):
            yield bad(path, value, _LABEL_VALUE)


def _key(key: str, path: str) -> Iterator[Cause]:
    prefix, slash, name = key.rpartition("/")
    if slash and not _SUBDOMAIN.match(prefix):
        yield bad(path, key, f"prefix part {_DNS_SUBDOMAIN}")
    if len(name) > 63:
        yield bad(path, key, "name part must be no more than 63 characters")
    elif not _QUALIFIED.match(name):
        yield bad(path, key, _NAME_PART)


def _non_negative(spec: Json, path: str, *names: str) -> Iterator[Cause]:
    for name in names:
        if isinstance(spec.get(name), int) and spec[name] < 0:
            yield bad(f"{path}.{name}", spec[name], "must be greater than or equal to 0")


def _port(value: Any, path: str) -> Iterator[Cause]:
    if isinstance(value, int) and not 1 <= value <= 65535:
        yield bad(path, value, "must be between 1 and 65535, inclusive")
    elif isinstance(value, str) and (len(value) > 15 or not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", value)):
        text = (
            "must be no more than 15 characters"
            if len(value) > 15
            else "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
        )
        yield bad(path, value, text)


def _check_probe(probe: Json, path: str, *, once: bool) -> Iterator[Cause]:
    handlers = [name for name in ("exec", "httpGet", "tcpSocket", "grpc") if probe.get(name) is not None]
    if not handlers:
        yield required(path, "must specify a handler type")
    for name in handlers[1:]:
        yield "FieldValueForbidden", "Forbidden: may not specify more than 1 handler type", f"{path}.{name}"
    for name in handlers:
        if name != "exec":
            yield from _port(probe[name].get("port"), f"{path}.{name}.port")
    yield from _non_negative(probe, path, "initialDelaySeconds")
    for name in ("timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        if isinstance(probe.get(name), int) and probe[name] < 1:
            yield bad(
                f"{path}.{name}",
                probe[name],
                "must be greater than or equal to 1" if probe[name] < 0 else "must be greater than 0",
            )
    if once and probe.get("successThreshold", 1) != 1:
        yield bad(f"{path}.successThreshold", probe["successThreshold"], "must be 1")


def _resources(resources: Json, path: str) -> Iterator[Cause]:
    numbers: dict[tuple[str, str], float] = {}
    for kind in ("limits", "requests"):
        for name, value in (resources.get(kind) or {}).items():
            try:
                numbers[kind, name] = quantity(value)
            except ValueError:
                pattern = r"^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$"
                yield bad(f"{path}.{kind}[{name}]", value, f"quantities must match the regular expression '{pattern}'")
    for (kind, name), value in numbers.items():
        limit = numbers.get(("limits", name))
        if kind == "requests" and limit is not None and value > limit:
            text = f"must be less than or equal to {name} limit of {resources['limits'][name]}"
            yield bad(f"{path}.requests", str(resources["requests"][name]), text)


def check_pod_spec(spec: Json, path: str) -> Iterator[Cause]:
    """What is wrong with a pod's spec."""
    volumes = [volume.get("name") for volume in spec.get("volumes") or ()]
    for n, volume in enumerate(spec.get("volumes") or ()):
        if volumes.index(volume.get("name")) != n:
            yield "FieldValueDuplicate", f"Duplicate value: {go(volume.get('name'))}", f"{path}.volumes[{n}].name"
        sources = sorted(set(volume) - {"name"})
        for source in sources[1:]:
            text = "Forbidden: may not specify more than 1 volume type"
            yield "FieldValueForbidden", text, f"{path}.volumes[{n}].{source}"
    if not spec.get("containers"):
        yield required(f"{path}.containers")
    names: set[str] = set()
    for kind in ("containers", "initContainers"):
        for n, container in enumerate(spec.get(kind) or ()):
            here = f"{path}.{kind}[{n}]"
            name = container.get("name") or ""
            if not name:
                yield required(f"{here}.name")
            elif not _LABEL.match(name):
                yield bad(f"{here}.name", name, _DNS_LABEL)
            if name in names:
                yield "FieldValueDuplicate", f"Duplicate value: {go(name)}", f"{here}.name"
            names.add(name)
            yield from _check_container(container, here, volumes)
    if spec.get("restartPolicy") not in {None, "Always", "OnFailure", "Never"}:
        yield unsupported(f"{path}.restartPolicy", spec["restartPolicy"], ["Always", "OnFailure", "Never"])
    yield from _non_negative(spec, path, "terminationGracePeriodSeconds")
    for n, spread in enumerate(spec.get("topologySpreadConstraints") or ()):
        here = f"{path}.topologySpreadConstraints[{n}]"
        if (spread.get("maxSkew") or 0) < 1:
            yield bad(f"{here}.maxSkew", spread.get("maxSkew"), "must be greater than zero")
        if spread.get("whenUnsatisfiable") not in {"DoNotSchedule", "ScheduleAnyway"}:
            known = ["DoNotSchedule", "ScheduleAnyway"]
            yield unsupported(f"{here}.whenUnsatisfiable", spread.get("whenUnsatisfiable"), known)


def _check_container(container: Json, path: str, volumes: list[Any]) -> Iterator[Cause]:
    if not container.get("image"):
        yield required(f"{path}.image")
    if container.get("imagePullPolicy") not in {"Always", "IfNotPresent", "Never"}:
        yield unsupported(f"{path}.imagePullPolicy", container["imagePullPolicy"], ["Always", "IfNotPresent", "Never"])
    ports: set[Any] = set()
    for n, port in enumerate(container.get("ports") or ()):
        yield from _port(port.get("containerPort"), f"{path}.ports[{n}].containerPort")
        if port.get("name"):
            yield from _port(port["name"], f"{path}.ports[{n}].name")
            if port["name"] in ports:
                yield "FieldValueDuplicate", f"Duplicate value: {go(port['name'])}", f"{path}.ports[{n}].name"
            ports.add(port["name"])
    for n, variable in enumerate(container.get("env") or ()):
        if not variable.get("name"):
            yield required(f"{path}.env[{n}].name")
        if variable.get("value") and variable.get("valueFrom"):
            yield bad(f"{path}.env[{n}].valueFrom", "", "may not be specified when `value` is not empty")
    mounts: set[Any] = set()
    for n, mount in enumerate(container.get("volumeMounts") or ()):
        if mount.get("name") not in volumes:
            yield "FieldValueNotFound", f"Not found: {go(mount.get('name'))}", f"{path}.volumeMounts[{n}].name"
        if mount.get("mountPath") in mounts:
            yield bad(f"{path}.volumeMounts[{n}].mountPath", mount["mountPath"], "must be unique")
        mounts.add(mount.get("mountPath"))
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(name):
            yield from _check_probe(container[name], f"{path}.{name}", once=name != "readinessProbe")
    for name, hook in (container.get("lifecycle") or {}).items():
        if isinstance(hook, dict) and not hook:
            yield required(f"{path}.lifecycle.{name}", "must specify a handler type")
    yield from _resources(container.get("resources") or {}, f"{path}.resources")
    context = container.get("securityContext") or {}
    if context.get("privileged") and context.get("allowPrivilegeEscalation") is False:
        text = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true"
        yield bad(f"{path}.securityContext", context, text)


def _check_template(obj: Json, path: str = "spec") -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    selector = spec.get("selector")
    template = spec.get("template") or {}
    own = get(template, "metadata", "labels", otherwise={})
    if not selector or not (selector.get("matchLabels") or selector.get("matchExpressions")):
        if selector is None:
            yield required(f"{path}.selector")
        else:
            yield bad(f"{path}.selector", selector, "empty selector is invalid for deployment")
    elif not matches(selector, own):
        yield bad(f"{path}.template.metadata.labels", own, "`selector` does not match template `labels`")
    yield from _non_negative(
        spec, path, "replicas", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"
    )
    yield from labels(own, f"{path}.template.metadata.labels")
    yield from check_pod_spec(template.get("spec") or {}, f"{path}.template.spec")
    policy = get(template, "spec", "restartPolicy")
    if policy not in {None, "Always"}:
        yield unsupported(f"{path}.template.spec.restartPolicy", policy, ["Always"])


def _check_deployment(obj: Json) -> Iterator[Cause]:
    yield from _check_template(obj)
    spec = obj["spec"]
    strategy = spec.get("strategy") or {}
    if strategy.get("type") == "Recreate" and strategy.get("rollingUpdate"):
        text = "Forbidden: may not be specified when strategy `type` is 'Recreate'"
        yield "FieldValueForbidden", text, "spec.strategy.rollingUpdate"
    rolling = strategy.get("rollingUpdate") or {}
    if all(str(rolling.get(name, "25%")).rstrip("%") == "0" for name in ("maxUnavailable", "maxSurge")):
        text = "may not be 0 when `maxSurge` is 0"
        yield bad("spec.strategy.rollingUpdate.maxUnavailable", rolling.get("maxUnavailable"), text)
    if (spec.get("progressDeadlineSeconds") or 600) <= (spec.get("minReadySeconds") or 0):
        yield bad(
            "spec.progressDeadlineSeconds", spec["progressDeadlineSeconds"], "must be greater than minReadySeconds"
        )


def _check_service(obj: Json) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    ports = spec.get("ports") or []
    if not ports and spec.get("type") != "ExternalName" and spec.get("clusterIP") != "None":
        yield required("spec.ports")
    known = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]
    if spec.get("type") not in known:
        yield unsupported("spec.type", spec.get("type"), known)
    names, pairs = set(), set()
    for n, port in enumerate(ports):
        here = f"spec.ports[{n}]"
        if not port.get("name"):
            if len(ports) > 1:
                yield required(f"{here}.name")
        elif not _LABEL.match(port["name"]):
            yield bad(f"{here}.name", port["name"], _DNS_LABEL)
        elif port["name"] in names:
            yield "FieldValueDuplicate", f"Duplicate value: {go(port['name'])}", f"{here}.name"
        names.add(port.get("name"))
        pair = (port.get("port"), port.get("protocol"))
        if pair in pairs:
            shown = {"port": pair[0], "protocol": pair[1]}
            yield "FieldValueDuplicate", f"Duplicate value: {go(shown)}", here
        pairs.add(pair)
        yield from _port(port.get("port"), f"{here}.port")
        yield from _port(port.get("targetPort"), f"{here}.targetPort")
        if port.get("protocol") not in {"TCP", "UDP", "SCTP"}:
            yield unsupported(f"{here}.protocol", port.get("protocol"), ["SCTP", "TCP", "UDP"])
    yield from labels(spec.get("selector"), "spec.selector")


def _check_autoscaler(obj: Json) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    lowest, highest = spec.get("minReplicas", 1), spec.get("maxReplicas") or 0
    if lowest < 1:
        yield bad("spec.minReplicas", lowest, "must be greater than or equal to 1")
    if highest < 1:
        yield bad("spec.maxReplicas", highest, "must be greater than 0")
    elif highest < lowest:
        yield bad("spec.maxReplicas", highest, "must be greater than or equal to `minReplicas`")
    kinds = {"Resource": "resource", "Pods": "pods", "Object": "object", "External": "external"}
    kinds["ContainerResource"] = "containerResource"
    for n, metric in enumerate(spec.get("metrics") or ()):
        here, kind = f"spec.metrics[{n}]", metric.get("type")
        if kind not in kinds:
            yield unsupported(f"{here}.type", kind, kinds)
            continue
        source = metric.get(kinds[kind])
        if source is None:
            yield required(f"{here}.{kinds[kind]}", "must populate information for the given metric source")
            continue
        target = source.get("target") or {}
        if not target.get("type"):
            yield required(f"{here}.{kinds[kind]}.target.type", "must specify a metric target type")
        values = [target.get(name) for name in ("averageUtilization", "averageValue", "value")]
        if all(value is None for value in values):
            yield required(
                f"{here}.{kinds[kind]}.target.averageUtilization",
                "must set either a target raw value or a target utilization",
            )


def _check_budget(obj: Json) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    if spec.get("minAvailable") is not None and spec.get("maxUnavailable") is not None:
        yield bad(
            "spec",
            {key: spec[key] for key in ("minAvailable", "maxUnavailable")},
            "minAvailable and maxUnavailable cannot be both set",
        )
    for name in ("minAvailable", "maxUnavailable"):
        value = spec.get(name)
        if isinstance(value, int) and value < 0:
            yield bad(f"spec.{name}", value, "must be greater than or equal to 0")
        if isinstance(value, str) and not re.fullmatch(r"[0-9]+%", value):
            text = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')"
            yield bad(f"spec.{name}", value, text)


def _check_lease(obj: Json) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    if spec.get("leaseDurationSeconds") is not None and spec["leaseDurationSeconds"] <= 0:
        yield bad("spec.leaseDurationSeconds", spec["leaseDurationSeconds"], "must be greater than 0")
    if (spec.get("leaseTransitions") or 0) < 0:
        yield bad("spec.leaseTransitions", spec["leaseTransitions"], "must be greater than or equal to 0")
    if spec.get("holderIdentity") == "":
        yield bad("spec.holderIdentity", "", "must not be empty")


def _check_job(obj: Json) -> Iterator[Cause]:
    spec = obj.get("spec") or {}
    yield from _non_negative(spec, "spec", "parallelism", "completions", "backoffLimit", "ttlSecondsAfterFinished")
    inner = get(spec, "template", "spec", otherwise={})
    yield from check_pod_spec(inner, "spec.template.spec")
    if inner.get("restartPolicy") not in {"OnFailure", "Never"}:
        yield unsupported("spec.template.spec.restartPolicy", inner.get("restartPolicy"), ["OnFailure", "Never"])


def _check_config(obj: Json) -> Iterator[Cause]:
    data = {**(obj.get("data") or {}), **(obj.get("binaryData") or {})}
    for key in data:
        if not re.fullmatch(r"[-._a-zA-Z0-9]+", key) or len(key) > 253:
            yield bad(
                f"data[{key}]",
                key,
                "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
            )
    if sum(len(value or "") for value in data.values()) > 1024 * 1024:
        yield "FieldValueTooLong", "Too long: may not be more than 1048576 bytes", ""


def _check_secret(obj: Json) -> Iterator[Cause]:
    yield from _check_config(obj)


def _check_pod(obj: Json) -> Iterator[Cause]:
    yield from check_pod_spec(obj.get("spec") or {}, "spec")


def _check_role(obj: Json) -> Iterator[Cause]:
    for n, rule in enumerate(obj.get("rules") or ()):
        if not rule.get("verbs"):
            yield required(f"rules[{n}].verbs", "verbs must contain at least one value")
        if not rule.get("nonResourceURLs"):
            if not rule.get("apiGroups"):
                yield required(f"rules[{n}].apiGroups", "resource rules must supply at least one api group")
            if not rule.get("resources"):
                yield required(f"rules[{n}].resources", "resource rules must supply at least one resource")


def _check_event(obj: Json) -> Iterator[Cause]:
    namespace = get(obj, "involvedObject", "namespace", otherwise="")
    if namespace != obj["metadata"].get("namespace") and (namespace or obj["metadata"].get("namespace") != "default"):
        yield bad("involvedObject.namespace", namespace, "does not match event.namespace")


_CHECKS: dict[str, Callable[[Json], Iterator[Cause]]] = {
    "Deployment": _check_deployment,
    "ReplicaSet": _check_template,
    "Service": _check_service,
    "HorizontalPodAutoscaler": _check_autoscaler,
    "PodDisruptionBudget": _check_budget,
    "Lease": _check_lease,
    "Job": _check_job,
    "ConfigMap": _check_config,
    "Secret": _check_secret,
    "Pod": _check_pod,
    "Event": _check_event,
    "Role": _check_role,
    "ClusterRole": _check_role,
}


def check(obj: Json, kind: str) -> Iterator[Cause]:
    """What is wrong with a built-in object."""
    if kind in _CHECKS:
        yield from _CHECKS[kind](obj)


def undecodable(obj: Json, kind: str) -> str | None:
    """Why Go could not read the object, beyond the types of its fields."""
    if kind == "Secret":
        for value in (obj.get("data") or {}).values():
            try:
                base64.b64decode(value or "", validate=True)
            except (binascii.Error, ValueError):
                return "illegal base64 data at input byte 0"
    return None


_FIXED = {
    "Deployment": ("selector",),
    "ReplicaSet": ("selector",),
    "Job": ("selector", "template", "completionMode"),
    "PodDisruptionBudget": (),
}
_POD_MAY = {"image", "imagePullPolicy", "resources"}


def check_change(old: Json, new: Json, kind: str, *, binding: bool = False) -> Iterator[Cause]:
    """What may not change; a pod is put on a node by `binding` only."""
    before, after = old.get("spec") or {}, new.get("spec") or {}
    for name in _FIXED.get(kind, ()):
        if before.get(name) != after.get(name):
            yield bad(f"spec.{name}", after.get(name), "field is immutable")
    address = before.get("clusterIP")
    if kind == "Service" and address and before.get("type") == after.get("type") and after.get("clusterIP") != address:
        yield bad("spec.clusterIP", after.get("clusterIP"), "field is immutable")
    frozen = kind in {"ConfigMap", "Secret"} and old.get("immutable")
    if frozen and any(old.get(name) != new.get(name) for name in ("data", "binaryData", "immutable")):
        yield "FieldValueForbidden", "Forbidden: field is immutable when `immutable` is set", "data"
    if kind in {"RoleBinding", "ClusterRoleBinding"} and old.get("roleRef") != new.get("roleRef"):
        yield bad("roleRef", new.get("roleRef"), "cannot change roleRef")
    if kind == "Pod" and _frozen(before, binding=binding) != _frozen(after, binding=binding):
        text = (
            "Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
            "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
            "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
        )
        yield "FieldValueForbidden", text, "spec"


def _frozen(spec: Json, *, binding: bool) -> Json:
    free = {"activeDeadlineSeconds", "tolerations", *(("nodeName",) if binding else ())}
    left = {key: value for key, value in spec.items() if key not in free}
    for kind in ("containers", "initContainers"):
        left[kind] = [{k: v for k, v in one.items() if k not in _POD_MAY} for one in spec.get(kind) or ()]
    return left


# ---------------------------------------------------------------------------------------------------------------- selectors


def matches(selector: Json | None, found: Json | None) -> bool:
    """Whether labels match a LabelSelector; a selector without requirements matches all, None nothing."""
    if selector is None:
        return False
    found = found or {}
    if any(found.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for rule in selector.get("matchExpressions") or ():
        value, values = found.get(rule["key"]), rule.get("values") or ()
        fits = {
            "In": value in values,
            "NotIn": value is None or value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not fits[rule["operator"]]:
            return False
    return True


def new_uid() -> str:
    return str(uuid.uuid4())

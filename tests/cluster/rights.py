"""Least rights on the tests' own cluster: a promotion that may do what `deployments.kubernetes.rbac` gives, and nothing else."""

import re
from pathlib import Path
from typing import Any

from deployments.kubernetes import rbac
from deployments.kubernetes.cluster import Cluster
from tests.cluster.apiserver import ApiServer

RUN = f"system:serviceaccount:{rbac.RUNS}:{rbac.RUN}"
WORKER = f"system:serviceaccount:{rbac.RUNS}:{rbac.WORKER}"
_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v\w+(?:/namespaces/(?P<namespace>[^/?]+))?/(?P<plural>\w+)"
    r"(?:/[^/?]+(?:/(?P<below>log|proxy|status|scale|exec|token|eviction))?)?(?:[/?].*)?"
)
Right = tuple[str, str, str, str]
"""API group, resource with its subresource, verb, namespace."""


def restricted(server: ApiServer, cluster: Cluster, folder: Path, **asked: Any) -> Cluster:
    """`cluster` for somebody who has only the rights of `rbac.objects(cluster, **asked)`."""
    for one in rbac.objects(cluster, **asked):
        server.add(one)
    path = server.kubeconfig(folder / "restricted", token=server.token(RUN), namespace=cluster.namespace)
    return cluster.model_copy(update={"kubeconfig": path, "context": None})


def granted(cluster: Cluster, **asked: Any) -> set[Right]:
    """What `rbac.objects` gives, right by right."""
    return {
        (group, plural, verb, role["metadata"].get("namespace", ""))
        for role in rbac.objects(cluster, **asked)
        if role["kind"] in {"Role", "ClusterRole"}
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for plural in rule["resources"]
        for verb in rule["verbs"]
    }


def used(server: ApiServer, user: str) -> set[Right]:
    """What `user` has asked for, right by right; discovery, which is everybody's, is left out."""
    found = set()
    for seen in server.seen:
        match = _PATH.fullmatch(seen.path)
        if seen.user != user or match is None:
            continue
        plural = match["plural"] + (f"/{match['below']}" if match["below"] else "")
        found.add((match["group"] or "", plural, seen.verb, match["namespace"] or ""))
    return found

"""What a promotion may do in a cluster, and Prefect's worker beside it: Roles with the verbs that are used. Pure.

    python -m deployments.kubernetes.rbac --models models --gateway infra/public | kubectl apply -f -

The runs (Jobs with the promotions) and the models live in two namespaces: whoever may make Deployments in a namespace
can, by a pod, read its Secrets, so nothing worth reading belongs among the models. Model servers have no rights and no
token.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Sequence

import yaml

from deployments.kubernetes import names
from deployments.kubernetes.cluster import Cluster, Gateway, GitOps, Json

GATEWAY_API = "gateway.networking.k8s.io"
WRITE = ("create", "patch", "delete")
"""Server-side apply is a patch, and a create where the object is not there yet."""
TARGETS = ("kubernetes", "kserve")
RUNS, RUN, WORKER = "titleshot", "titleshot-run", "titleshot-worker"
"""The namespace of the flow runs, their ServiceAccount, and that of Prefect's worker, as the work pool has them."""


def objects(
    cluster: Cluster,
    *,
    runs: str = RUNS,
    account: str = RUN,
    targets: Collection[str] = ("kubernetes",),
    load: bool = True,
) -> list[Json]:
    """The rights that promotions in `cluster` need, for the ServiceAccount `account` in the namespace `runs`: a Role in
    the models' namespace, one in the Gateway's, and a ClusterRole that reads GatewayClasses.

    `targets` are the policies' words for what versions are made of; `load`: load tests run in the cluster. What the
    settings do not need is not given: with `gitops` no version is written, with `reach: direct` pods are not asked
    through the API server, and only with mirroring "replay" is anything sent to them that way.
    """
    space, gateway = cluster.namespace, cluster.gateway
    where = gateway.namespace or space
    subject = {"kind": "ServiceAccount", "name": account, "namespace": runs}
    promoter, sees, classes = (f"{names.MANAGER}-{part}" for part in ("promoter", "gateway", "gateway-classes"))
    return [
        _role(promoter, space, rules(cluster, targets=targets, load=load)),
        _binding(promoter, space, subject),
        _role(sees, where, [_rule(GATEWAY_API, "gateways", "get", only=gateway.name)]),
        _binding(sees, where, subject),
        _role(classes, None, [_rule(GATEWAY_API, "gatewayclasses", "get")]),
        _binding(classes, None, subject),
    ]


def rules(cluster: Cluster, *, targets: Collection[str] = ("kubernetes",), load: bool = True) -> list[Json]:
    """The rules of the Role in the models' namespace."""
    writes = () if cluster.gitops else WRITE
    made = {("", "services"), ("", "serviceaccounts"), ("policy", "poddisruptionbudgets")}
    main: set[tuple[str, str]] = set()
    if "kubernetes" in targets:
        made.add(("autoscaling", "horizontalpodautoscalers"))
        main.add(("apps", "deployments"))
    if "kserve" in targets:
        made.add(("serving.kserve.io", "inferenceservices"))
        main.add(("", "services"))
    found = [
        # What stands for a version is also marked: admitted, or to be taken away.
        _rule(group, plural, "get", "list", *(("update",) if (group, plural) in main else ()), *writes)
        for group, plural in sorted(made | main)
    ]
    found += [
        # Who takes a lease over marks the route, where nobody else has written it meanwhile: an update.
        _rule(GATEWAY_API, "httproutes", "get", "list", "watch", "update", *writes),
        # Lease and journal are made once, then replaced as they were read, and never deleted; a load's plan is.
        _rule("coordination.k8s.io", "leases", "get", "create", "update"),
        _rule("", "configmaps", "get", "create", "update", *(("list", "patch", "delete") if load else ())),
        _rule("discovery.k8s.io", "endpointslices", "list"),
        _rule("", "pods", "list", "watch"),
        _rule("", "pods/log", "get"),
        _rule("", "events", "list"),
    ]
    if cluster.reach == "proxy":
        found.append(_rule("", "pods/proxy", "get", *(("create",) if cluster.mirroring == "replay" else ())))
    if load:
        found.append(_rule("batch", "jobs", "get", "list", *WRITE))
    return found


def pool(*, runs: str = RUNS, account: str = RUN, worker: str = WORKER) -> list[Json]:
    """Two ServiceAccounts in the namespace of the flow runs, theirs and that of Prefect's Kubernetes worker, and the
    worker's rights: it makes the Jobs, follows them and their pods, and reads what a crashed one has said.
    """
    allowed = [
        _rule("batch", "jobs", "get", "list", "watch", "create", "delete"),
        _rule("", "pods", "get", "list", "watch"),
        _rule("", "pods/log", "get"),
    ]
    subject = {"kind": "ServiceAccount", "name": worker, "namespace": runs}
    both = [_account(account, runs), _account(worker, runs)]
    return [*both, _role(worker, runs, allowed), _binding(worker, runs, subject)]


def _rule(group: str, plural: str, *verbs: str, only: str | None = None) -> Json:
    rule: Json = {"apiGroups": [group], "resources": [plural], "verbs": [*verbs]}
    return {**rule, "resourceNames": [only]} if only else rule


def _meta(name: str, namespace: str | None) -> Json:
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": names.MANAGER}
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": labels}


def _role(name: str, namespace: str | None, rules: list[Json]) -> Json:
    kind = "Role" if namespace else "ClusterRole"
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": _meta(name, namespace),
        "rules": rules,
    }


def _binding(role: str, namespace: str | None, subject: Json) -> Json:
    kind = "Role" if namespace else "ClusterRole"
    # A ClusterRole may be bound for the runs of several namespaces.
    name = role if namespace else f"{role}-{subject['namespace']}"
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": f"{kind}Binding",
        "metadata": _meta(name, namespace),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
        "subjects": [subject],
    }


def _account(name: str, namespace: str) -> Json:
    # A pod gets a token where its own spec says so.
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _meta(name, namespace),
        "automountServiceAccountToken": False,
    }


def render(made: Iterable[Json]) -> str:
    """Objects as YAML documents."""
    # Through JSON, so that no anchors are written for parts that two objects share.
    return str(yaml.safe_dump_all([json.loads(json.dumps(one)) for one in made], sort_keys=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the YAML; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.kubernetes.rbac", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", default="models", help="the namespace of the models (models)")
    parser.add_argument("--runs", default=RUNS, help=f"the namespace of the flow runs ({RUNS})")
    parser.add_argument("--gateway", required=True, help="the Gateway of the routes, as NAMESPACE/NAME or NAME")
    parser.add_argument("--target", action="append", choices=TARGETS, help="a policy's target (kubernetes)")
    parser.add_argument("--gitops", action="store_true", help="versions and routes are written by Argo CD or Flux")
    parser.add_argument("--replay", action="store_true", help='for `mirroring: "replay"`')
    parser.add_argument("--direct", action="store_true", help="for `reach: direct`: pods are asked at their addresses")
    parser.add_argument("--no-load", action="store_true", help="no load tests in the cluster")
    given = parser.parse_args(arguments)
    space, _, gateway = given.gateway.rpartition("/")
    cluster = Cluster(
        namespace=given.models,
        gateway=Gateway(name=gateway, namespace=space or None, url="http://localhost"),
        gitops=GitOps(repository=".") if given.gitops else None,
        mirroring="replay" if given.replay else "gateway",
        reach="direct" if given.direct else "proxy",
    )
    targets = given.target or ("kubernetes",)
    made = objects(cluster, runs=given.runs, targets=targets, load=not given.no_load)
    sys.stdout.write(render([*pool(runs=given.runs), *made]))


if __name__ == "__main__":
    main()

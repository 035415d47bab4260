"""The objects of a version as files: plain YAML and a kustomize base, for clusters that only Argo CD or Flux change."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import yaml

from deployments.kubernetes import names, route
from deployments.kubernetes.cluster import Cluster, Json
from deployments.kubernetes.manifests import version_objects
from deployments.runtimes import Serving
from deployments.target import Traffic, Version

KUSTOMIZATION = "kustomization.yaml"


class Objects(Protocol):
    """What a version is made of: `manifests.version_objects`, or KServe's."""

    def __call__(
        self, cluster: Cluster, version: Version, serving: Serving, *, promotion: str, fence: int
    ) -> list[Json]:
        """The objects, in the order in which they are to be made."""


def render(
    cluster: Cluster,
    version: Version,
    serving: Serving,
    traffic: Traffic | None,
    *,
    kustomize: bool = False,
    beside: Iterable[str] = (),
    objects: Objects = version_objects,
) -> dict[str, str]:
    """The files of `version`, and, where there is `traffic`, of the model's HTTPRoute: path to YAML, in the order in
    which they are to be applied. Their fence is 0, so whoever promotes later may change them.

    With `kustomize` there is one more, a base that names the others and those that are there already, `beside` them.
    Raises `TargetError` for settings that do not fit.
    """
    made = objects(cluster, version, serving, promotion="", fence=0)
    if traffic is not None:
        versions = sorted({*traffic.live, version.number}, key=_by_number)
        made = [*made, route.route(cluster, version.model, versions, traffic, fence=0)]
    files = {file_of(one): text_of(one) for one in made}
    return files | base(sorted({*beside, *files} - {KUSTOMIZATION}), cluster) if kustomize else files


def base(paths: Sequence[str], cluster: Cluster) -> dict[str, str]:
    """A kustomization.yaml that names the files at `paths`. Its labels leave the selectors alone: those of a Deployment
    cannot be changed, so a label added to them (`commonLabels`) would make every later change fail.
    """
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": cluster.namespace,
        "labels": [{"pairs": {"app.kubernetes.io/part-of": "titleshot"}, "includeSelectors": False}],
        "resources": [*paths],
    }
    return {KUSTOMIZATION: _yaml(content)}


def file_of(one: Json) -> str:
    """Where an object of ours is kept: "flight-delay/v3/deployment.yaml", and "flight-delay/httproute.yaml"."""
    meta = one["metadata"]
    labels: Mapping[str, str] = meta.get("labels", {})
    model, version = labels[names.MODEL], labels.get(names.VERSION)
    usual = model if version is None else f"{model}-v{version}"
    kind = one["kind"].lower()
    name = kind if meta["name"] == usual else f"{kind}-{meta['name']}"
    return f"{model}/{name}.yaml" if version is None else f"{model}/v{version}/{name}.yaml"


def text_of(one: Json) -> str:
    """An object as YAML: the same object, the same text."""
    return _yaml(one)


def _yaml(content: Json) -> str:
    return yaml.dump(content, Dumper=_Plain, sort_keys=False, width=110, allow_unicode=True)


class _Plain(yaml.SafeDumper):
    """Without anchors: they are correct, and nobody can review them."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        """No value is written by reference to another."""
        return True


def _by_number(version: str) -> tuple[int, str]:
    return (int(version), "") if version.isdigit() else (0, version)

"""The objects of a version as files: plain YAML and a kustomize base, for clusters that only Argo CD or Flux change."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
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
    deployed: Iterable[str] = (),
    objects: Objects = version_objects,
) -> dict[str, str]:
    """The files of `version`, and, where there is `traffic`, of the model's HTTPRoute: path to YAML, in the order in
    which they are to be applied. Their fence is 0, so whoever promotes later may change them. The route has own paths
    of the versions that are `deployed`, of those in the traffic, and of this one.

    With `kustomize` there is one more, a base that names the others and those that are there already, `beside` them,
    but for what another kustomization takes care of.
    Raises `TargetError` for settings that do not fit.
    """
    made = objects(cluster, version, serving, promotion="", fence=0)
    if traffic is not None:
        versions = [*{*deployed, *traffic.live, version.number}]
        made = [*made, route.route(cluster, version.model, versions, traffic, fence=0)]
    files = {file_of(one): text_of(one) for one in made}
    return files | base(sorted({*_free(beside), *files})) if kustomize else files


def base(paths: Sequence[str]) -> dict[str, str]:
    """A kustomization.yaml that names the files at `paths`, and changes nothing of them."""
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [*paths],
    }
    return {KUSTOMIZATION: _yaml(content)}


def _free(paths: Iterable[str]) -> list[str]:
    """Those that lie in no folder with a kustomization.yaml of its own, and in none that is hidden."""
    found = [PurePosixPath(path) for path in paths if path != KUSTOMIZATION]
    taken = {path.parent for path in found if path.name == KUSTOMIZATION}
    return [
        str(path)
        for path in found
        if taken.isdisjoint(path.parents) and not any(part.startswith(".") for part in path.parts)
    ]


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

"""The objects of a version as YAML, for clusters that are changed from a repository only."""

import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

from deployments.artifact import digest as digest_of
from deployments.kubernetes.cluster import Cluster
from deployments.target import TargetError, Traffic, Version
from tasks import registry
from tasks.clusters import cluster
from tasks.progress import say
from tasks.settings import Mistake, Settings
from validations.waves import Place


def render(
    settings: Settings, model: str, number: str, place: Place | None, *, kustomize: bool, beside: Iterable[str] = ()
) -> dict[str, str]:
    """Path to YAML, in the order in which the files are to be applied: the version's objects, and the model's route
    where the cluster can be asked for the traffic in force. With `kustomize`, a base that names them and those
    `beside` them.

    Nothing is changed anywhere. Raises `Mistake` where no cluster is described, or where the version is not what was
    admitted.
    """
    from deployments.kserve import manifests as of_kserve
    from deployments.kserve import target as kserve
    from deployments.kubernetes import manifests, rendering, workload

    meant = cluster(settings)
    if meant is None or place == "local":
        raise Mistake(
            "there is nothing to render: describe a cluster in clusters.yaml in the home or in TITLESHOT_CLUSTERS, and "
            "let the policy say `target: kubernetes` (docs/kubernetes.md)",
            code=2,
        )
    version = registry.find(model, number)
    with tempfile.TemporaryDirectory() as folder:
        path = registry.download(version, Path(folder) / number)
        found = digest_of(path)
        if (recorded := version.tags.get(registry.TAG + "digest", found)) != found:
            raise Mistake(f"{version.name} is not what was admitted: its digest is {found}, recorded was {recorded}")
        one = Version(model, number, path, found, settings.env_manager, dict(version.tags))
        try:
            traffic, deployed = _now(meant, model, place)
            serving = (kserve if place == "kserve" else workload).serving(one, meant)
            objects = (of_kserve if place == "kserve" else manifests).version_objects
            return rendering.render(
                *(meant, one, serving, traffic),
                kustomize=kustomize,
                beside=beside,
                deployed=deployed,
                objects=objects,
            )
        except TargetError as error:
            raise Mistake(str(error), code=2) from error


def _now(meant: Cluster, model: str, place: Place | None) -> tuple[Traffic | None, Collection[str]]:
    """The traffic in force and the versions that are deployed; no traffic where the cluster cannot be asked."""
    from deployments.kserve.target import KServeTarget
    from deployments.kubernetes.target import KubernetesTarget

    kind = KServeTarget if place == "kserve" else KubernetesTarget
    target = kind(meant.model_copy(update={"patience": 0.0}))
    try:
        return target.traffic(model), target.deployed(model).keys()
    except TargetError as error:
        say(f"the route is left out, since the cluster cannot be asked for its traffic: {error}")
        return None, ()


def write(files: dict[str, str], folder: Path) -> None:
    """Write the files below `folder`, made where it is not there. Raises `Mistake` where that cannot be."""
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise Mistake(f"{folder} cannot be written ({error.strerror}): name another folder with --output") from error

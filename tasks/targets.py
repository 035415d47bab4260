"""Every place where models are served, as one serving target: each model's verbs go to where that model is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

from deployments.kubernetes.cluster import Cluster
from deployments.local.target import LocalTarget, Options
from deployments.target import (
    Answer,
    Change,
    Endpoint,
    Entry,
    Fence,
    Holder,
    Served,
    ServingTarget,
    TargetError,
    Traffic,
    Unit,
    Version,
)
from tasks.clusters import cluster, clusters
from tasks.policies import policy_of
from tasks.settings import Mistake, Settings, within
from validations.waves import Place, Waves

if TYPE_CHECKING:  # the kubernetes client takes a second to import
    from deployments.kubernetes.target import KubernetesTarget


def local_target(settings: Settings) -> LocalTarget:
    """The local serving target of this home. Raises `Mistake` for a home too long for sockets."""
    try:
        return LocalTarget(
            settings.home, Options(ready_timeout=settings.deploy_timeout, lease_ttl=settings.lease_seconds)
        )
    except TargetError as error:
        raise Mistake(str(error)) from error


def settings_target(settings: Settings) -> "LocalTarget | Targets":
    """Where the models of these settings are served: this machine, and the cluster that is meant, if any."""
    meant = cluster(settings)
    return local_target(settings) if meant is None else Targets(meant, local_target(settings))


def everywhere(settings: Settings, patience: float | None = None) -> Iterator[tuple[Settings, ServingTarget]]:
    """Every place where models are served, each once, with the settings that speak of it: this machine, then each
    cluster of the file, a region's within the region. A region that is meant is all there is. `patience` is how many
    seconds a cluster is asked for, where not as long as its settings say.
    """
    if settings.region is None:
        yield settings, local_target(settings)
    meant = cluster(settings)
    for one in clusters(settings):
        if settings.region is not None and one != meant:
            continue
        with within(one.name if one.region else ""):
            own = {"region": one.name if one.region else None, "cluster": None if one.region else one.name}
            asked = one if patience is None else one.model_copy(update={"patience": min(patience, one.patience)})
            yield settings.model_copy(update=own), Targets(asked, None)


PATIENCE = 3.0
"""Seconds that a cluster is asked for, by who wants to see what there is."""


def regions_of(settings: Settings, model: str) -> dict[str, str]:
    """The regions that `model` is served in, in the order in which a promotion comes to them, each with why it does not
    answer ("" where it does): of one that does not it is not known. None where the model is served in one place, or
    where a region is meant.
    """
    if settings.region is not None or not any(one.region for one in clusters(settings)):
        return {}
    found = dict[str, str]()
    for own, target in everywhere(settings, patience=PATIENCE):
        try:
            there, why = model in target.models(), ""
        except TargetError as error:
            there, why = own.region is not None, str(error)
        if there and own.region is None:
            return {}
        if there:
            found[str(own.region)] = why
    waves = _waves(settings, model)
    order = [name for name in waves if name in found]
    if waves:  # what does not answer and is in no wave of the model's is no region of its
        order += [name for name, why in found.items() if name not in waves and not why]
    elif any(not why for why in found.values()):
        order = list(found)
    return {name: found[name] for name in order}


def _waves(settings: Settings, model: str) -> tuple[str, ...]:
    """The regions of the model's own policy; none where it has no policy that says so."""
    with suppress(Mistake):  # a broken policy must not be in the way of who goes back
        own = policy_of(settings, model)
        if own is not None and isinstance(own[2].target, Waves):
            return own[2].target.regions
    return ()


def choose(target: ServingTarget, model: str, kind: Place) -> None:
    """Let `model` be served where its policy says. Raises `Mistake` where it is served elsewhere already, or where
    nothing describes such a place.
    """
    if isinstance(target, Targets):
        target.choose(model, kind)
    elif kind != "local":
        raise Mistake(
            f"the policy of {model} says `target: {kind}`, and no cluster is described: write the file clusters.yaml "
            "in the home, or name one in TITLESHOT_CLUSTERS (docs/kubernetes.md)",
            code=2,
        )


class Targets:
    """A `ServingTarget` of the local one, if any, and of one cluster. A model is where something of it is; one that is
    nowhere yet is local, unless it was chosen to be elsewhere.
    """

    def __init__(self, cluster: Cluster, local: LocalTarget | None) -> None:
        self.local, self._cluster = local, cluster
        self._known: dict[str, ServingTarget] = {}
        self._remote: dict[str, KubernetesTarget] = {}

    def remote(self, kind: Place) -> "KubernetesTarget":
        """The cluster's target of this kind."""
        if kind not in self._remote:
            from deployments.kserve.target import KServeTarget
            from deployments.kubernetes.target import KubernetesTarget

            made = KServeTarget if kind == "kserve" else KubernetesTarget
            self._remote[kind] = made(self._cluster)
        return self._remote[kind]

    def choose(self, model: str, kind: Place) -> None:
        """Let `model` be served there. Raises `Mistake` where it is served elsewhere already."""
        now = self._where(model)
        if now not in (None, kind):
            raise Mistake(
                f"the policy of {model} says `target: {kind}`, but its target is {now}: go on with that, "
                "or take the model down there first",
                code=2,
            )
        self._known[model] = self._at(kind)

    def of(self, model: str) -> ServingTarget:
        """Where `model` is served."""
        if model not in self._known:
            kind = self._where(model)
            if kind is None:
                return self._at("local")
            self._known[model] = self._at(kind)
        return self._known[model]

    def _at(self, kind: Place) -> ServingTarget:
        if kind == "local" and self.local is not None:
            return self.local
        return self.remote("kserve" if kind == "kserve" else "kubernetes")

    def _where(self, model: str) -> Place | None:
        if self.local is not None and model in self.local.models():
            return "local"
        return self.remote("kubernetes").kind_of(model)

    # --- the verbs

    def up(self) -> bool:
        """Whether one of the places can be asked."""
        return (self.local is not None and self.local.up()) or self.remote("kubernetes").up()

    def models(self) -> tuple[str, ...]:
        """The models that are served anywhere."""
        here = self.local.models() if self.local is not None else ()
        return tuple(dict.fromkeys([*here, *self.remote("kubernetes").models()]))

    def lease(self, model: str, holder: str, *, take: bool = False) -> Fence:
        """See `ServingTarget`."""
        return self.of(model).lease(model, holder, take=take)

    def renew(self, fence: Fence) -> float:
        """See `ServingTarget`."""
        return self.of(fence.model).renew(fence)

    def holder(self, model: str) -> Holder | None:
        """See `ServingTarget`."""
        return self.of(model).holder(model)

    def release(self, fence: Fence) -> None:
        """See `ServingTarget`."""
        self.of(fence.model).release(fence)

    def guard(self, fence: Fence) -> AbstractContextManager[None]:
        """See `ServingTarget`."""
        return self.of(fence.model).guard(fence)

    def write(self, entry: Entry, fence: Fence) -> None:
        """See `ServingTarget`."""
        self.of(fence.model).write(entry, fence)

    def journal(self, model: str) -> tuple[Entry, ...]:
        """See `ServingTarget`."""
        return self.of(model).journal(model)

    def keep(self, model: str, warm: int, fence: Fence) -> None:
        """See `ServingTarget`."""
        self.of(model).keep(model, warm, fence)

    def kept(self, model: str) -> int:
        """See `ServingTarget`."""
        return self.of(model).kept(model)

    def deploy(self, version: Version, fence: Fence) -> Endpoint:
        """See `ServingTarget`."""
        return self.of(version.model).deploy(version, fence)

    def route(self, traffic: Traffic, fence: Fence) -> None:
        """See `ServingTarget`."""
        self.of(traffic.model).route(traffic, fence)

    def traffic(self, model: str) -> Traffic | None:
        """See `ServingTarget`."""
        return self.of(model).traffic(model)

    def observe(self, model: str) -> Mapping[str, Served]:
        """See `ServingTarget`."""
        return self.of(model).observe(model)

    def answers(self, model: str, version: str, after: int = -1) -> Iterable[Answer]:
        """See `ServingTarget`."""
        return self.of(model).answers(model, version, after)

    def retire(self, model: str, version: str, fence: Fence) -> None:
        """See `ServingTarget`."""
        self.of(model).retire(model, version, fence)

    def gateway(self, model: str) -> str:
        """See `ServingTarget`."""
        return self.of(model).gateway(model)

    def deployed(self, model: str) -> Mapping[str, Endpoint]:
        """See `ServingTarget`."""
        return self.of(model).deployed(model)

    def units(self, model: str) -> Mapping[str, Sequence[Unit]]:
        """See `ServingTarget`."""
        return self.of(model).units(model)

    def cannot(self, traffic: Traffic) -> tuple[str, ...]:
        """See `ServingTarget`."""
        return self.of(traffic.model).cannot(traffic)

    def changes(self, version: Version, traffics: Sequence[Traffic]) -> tuple[tuple[Change, ...], ...]:
        """See `ServingTarget`."""
        return self.of(version.model).changes(version, traffics)

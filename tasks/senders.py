"""Who sends the load for a model: processes of this machine, or Jobs in the cluster where the model is served."""

from deployments.kubernetes.cluster import Cluster
from deployments.target import ServingTarget
from loadtests.distributed import Crew
from tasks.targets import Targets


def sender(target: ServingTarget, model: str, promotion: str) -> tuple[Crew | None, frozenset[str]]:
    """The crew that runs Locust (None: processes of this machine), and the hosts that it may load (none: this one).

    With a cluster those are the addresses of `model` in it, and the cluster's `load.by` says who sends.
    """
    place = target.of(model) if isinstance(target, Targets) else target
    cluster = getattr(place, "cluster", None)
    if not isinstance(cluster, Cluster):
        return None, frozenset()
    from deployments.kubernetes.client import Client
    from deployments.kubernetes.jobs import Jobs, hosts

    allowed = hosts(cluster, model, list(place.deployed(model)))
    return (Jobs(Client(cluster), cluster, model, promotion=promotion) if cluster.load.by == "jobs" else None), allowed

"""Whose hand changes the cluster: ours, by server-side apply; GitOps has another one, which commits."""

from collections.abc import Sequence
from typing import Protocol

from deployments.kubernetes.client import Client, Conflict
from deployments.kubernetes.cluster import Json


class Hand(Protocol):
    """Brings objects into the cluster and takes them away; returns once the API server has them so."""

    def check(self, objects: Sequence[Json]) -> None:
        """Raise `TargetError` where the cluster would refuse one of them; nothing is changed."""

    def apply(self, objects: Sequence[Json], *, why: str) -> list[Json]:
        """Make them so, in this order; returns them as the API server has them then.

        A `metadata.resourceVersion` is a precondition for a hand that writes to the API server itself (`Conflict` where
        it does not hold any more); one that commits leaves it out. `why` is one line for who reads the history.
        """

    def delete(self, objects: Sequence[Json], *, why: str) -> None:
        """Take away objects as they were read (name, namespace, uid): another one of the same name stays, and so does,
        with a `Conflict`, one of another `metadata.resourceVersion` where that is given. Returns once they are gone or
        going; no error where they were gone already.
        """


class Direct:
    """Server-side apply, right now."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def check(self, objects: Sequence[Json]) -> None:
        """Let the API server say what it would refuse (a server-side dry run)."""
        for one in objects:
            self._client.apply(one, dry_run=True)

    def apply(self, objects: Sequence[Json], *, why: str) -> list[Json]:  # noqa: ARG002
        """Apply one after the other. Raises `Conflict` for an object that is another version by now."""
        return [self._client.apply(one) for one in objects]

    def delete(self, objects: Sequence[Json], *, why: str) -> None:  # noqa: ARG002
        """Delete one after the other, each only where it is still the one that was read."""
        for one in objects:
            meta, version = one["metadata"], one["metadata"].get("resourceVersion")
            try:
                self._client.delete(one["kind"], meta["name"], uid=meta.get("uid"), version=version)
            except Conflict:
                if version:
                    raise
                # Another object has its name by now: ours is gone.

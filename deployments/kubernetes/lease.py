"""A model's state in the cluster: its Lease (whose turn it is) and its ConfigMap (the journal, what is kept warm).

Both are written by compare-and-set only. Who writes reads first, then looks at the Lease, then writes what it read; and
who gains a new number touches the ConfigMap and the HTTPRoute before anything else. So a writer whose lease was taken
in between finds another resourceVersion, however late it wakes up.
"""

import base64
import binascii
import contextlib
import datetime as dt
import gzip
import json
import math
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from deployments.kubernetes import names
from deployments.kubernetes.client import KINDS, Client, Conflict
from deployments.kubernetes.cluster import Cluster, Json
from deployments.target import Entry, Fence, Holder, LeaseHeld, StaleFence, TargetError, TargetUnavailable

END = "end"
"""The kind of the line that closes a promotion in the journal."""
GUARD = f"{names.GROUP}/guard"
"""Annotation of the Lease: until when (the API server's clock) later holders wait, by guarded block (JSON)."""
WORKLOAD = f"{names.GROUP}/workload"
"""Annotation of the Lease: the kind of object that the model's versions are."""
GUARD_TIMEOUT = 100.0
"""Seconds that a new holder waits for the old one's write to the registry: MLflow's client gives up before."""
LIMIT = 1_000_000
"""Bytes that the journal of a model may take, compressed: a ConfigMap holds 1 MiB."""
_JOURNAL, _NEXT, _KEPT, _TOKEN = "journal.jsonl.gz", "next", "kept", "token"
_ATTEMPTS = 30


def name(model: str) -> str:
    """What the Lease and the ConfigMap of a model are called."""
    return f"{names.MANAGER}-{names.slug(model)}"


def fence_of(obj: Json) -> int:
    """The number of the lease under which an object was written last; 0 where nobody wrote one."""
    try:
        return int(obj.get("metadata", {}).get("annotations", {}).get(names.FENCE, 0))
    except ValueError as error:
        meta = obj["metadata"]
        raise TargetError(f"{obj.get('kind')} {meta['name']}: its annotation {names.FENCE} is no number") from error


def refuse_newer(obj: Json, fence: Fence) -> None:
    """Raise `StaleFence` where an object was written under a later lease than `fence`."""
    if (theirs := fence_of(obj)) > fence.number:
        what = f"{obj['kind']} {obj['metadata']['name']}"
        raise StaleFence(f"{fence.holder} holds fence {fence.number} of {fence.model}; {what} has {theirs} by now")


def again(attempt: Callable[[], bool], what: str) -> None:
    """Do `attempt` until it says so, or no `Conflict` comes any more. Raises the last one."""
    for count in range(_ATTEMPTS):
        try:
            if attempt():
                return
        except Conflict:
            if count == _ATTEMPTS - 1:
                raise
        time.sleep(random.uniform(0.005, 0.05) * min(count + 1, 10))  # noqa: S311
    raise Conflict(f"{what} changes faster than it can be written")


class State:
    """The state objects of every model in one cluster. Holds nothing but the client.

    `workload` is recorded with a model's first lease: the kind of the objects that its versions are.
    """

    def __init__(self, client: Client, cluster: Cluster, workload: str = "Deployment") -> None:
        self._client, self._ttl, self._workload = client, math.ceil(cluster.lease_seconds), workload
        # A cluster that is made from a repository has the fence of its route there.
        self._fenced = ("ConfigMap",) if cluster.gitops else ("ConfigMap", "HTTPRoute")

    def workload_of(self, model: str) -> str | None:
        """The kind of object that the versions of a model are; None where it never had a lease here."""
        found = self._find(model)
        return None if found is None else str(found["metadata"]["annotations"].get(WORKLOAD, "Deployment"))

    def in_use(self, model: str) -> bool:
        """Whether a promotion has the lease, or has left lines in the journal."""
        return self.holder(model) is not None or any(line.kind != END for line in self.journal(model))

    # --- leases

    def lease(self, model: str, holder: str, *, take: bool = False) -> Fence:
        """Take or renew the lease. Raises `LeaseHeld`, unless it is to be taken from whoever has it."""
        end = time.monotonic() + GUARD_TIMEOUT + 5.0
        number = 0

        def attempt() -> bool:
            nonlocal number
            found = self._find(model)
            now = self._client.now()
            held, last = _held(found, now)
            mine = held is not None and held.name == holder
            if held is not None and not mine and held.left and not take:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held.since))
                raise LeaseHeld(
                    f"{model} is held by {held.name} since {when}; its lease lapses in {held.left:.0f} s unless it is "
                    "renewed"
                )
            if not mine and found is not None:
                self._await_guards(model, found, end)
            number = last + (not mine)
            spec = {
                "holderIdentity": holder,
                "leaseDurationSeconds": self._ttl,
                "leaseTransitions": number,
                "acquireTime": found["spec"]["acquireTime"] if mine and found else _stamp(now),
                "renewTime": _stamp(now),
            }
            if found is None:
                bare = annotated(_bare("Lease", model, number), {WORKLOAD: self._workload})
                self._client.create({**bare, "spec": spec})
            else:
                fresh = {**found, "spec": {**(found.get("spec") or {}), **spec}}
                marks = {names.FENCE: str(number), WORKLOAD: self._workload} | ({} if mine else {GUARD: None})
                self._client.replace(annotated(fresh, marks))
            return True

        again(attempt, f"the lease of {model}")
        fence = Fence(model, holder, number)
        self._raise(fence)
        return fence

    def _await_guards(self, model: str, found: Json, end: float) -> None:
        """Return once nobody guards this Lease; as a `Conflict` where it had to be waited for."""
        if not _guards(found, self._client.now()):
            return
        while True:
            if time.monotonic() > end:
                raise TargetUnavailable(
                    f"the last holder of {model} has been writing to the registry for {GUARD_TIMEOUT:g} s: is it "
                    "stopped?"
                )
            time.sleep(0.2)
            found = self._find(model) or {}
            if not _guards(found, self._client.now()):
                raise Conflict(f"the lease of {model} was guarded until now")

    def _raise(self, fence: Fence) -> None:
        """Mark what stale writers could still write: whatever they have read is another version from here on."""
        model = fence.model
        for kind in self._fenced:
            self._mark(kind, name(model) if kind == "ConfigMap" else names.slug(model), fence)

    def _mark(self, kind: str, named: str, fence: Fence) -> None:
        def attempt() -> bool:
            found = self._client.get(kind, named)
            if found is None and kind == "ConfigMap":
                self._client.create({**_bare(kind, fence.model, fence.number), "data": {}})
            elif found is not None and belongs(found, fence.model) and fence_of(found) < fence.number:
                self._client.replace(annotated(found, {names.FENCE: str(fence.number)}))
            return True

        again(attempt, f"{kind} {named}")

    def holder(self, model: str) -> Holder | None:
        """Who holds the lease, or did until it lapsed; None where it was given back."""
        found = self._find(model)
        return _held(found, self._client.now())[0] if found else None

    def release(self, fence: Fence) -> None:
        """Give the lease back; the number stays, so that it never comes again."""

        def attempt() -> bool:
            found = self._find(fence.model)
            if found is None or not _is(found, fence):
                return True
            spec = {key: value for key, value in found["spec"].items() if key != "holderIdentity"}
            self._client.replace({**found, "spec": spec})
            return True

        again(attempt, f"the lease of {fence.model}")

    def renew(self, fence: Fence) -> float:
        """Make the lease last again; returns for how many seconds. Raises `StaleFence`."""
        self._change(fence, {}, always=True)
        return float(self._ttl)

    def check(self, model: str, fence: Fence) -> None:
        """Raise `StaleFence` where `fence` is not the lease in force; renew it where it is, and a quarter is gone.

        A lease that has expired, but that nobody else has taken, is still ours.
        """
        if fence.model != model:
            raise StaleFence(f"a fence for {fence.model} does not open {model}")
        self._change(fence, {})

    @contextlib.contextmanager
    def guard(self, fence: Fence) -> Iterator[None]:
        """Hold off every later holder while the block runs, and `GUARD_TIMEOUT` seconds at most: a process that dies in
        it leaves its mark behind.
        """
        token = uuid.uuid4().hex[:12]
        self._change(fence, {token: GUARD_TIMEOUT}, always=True)
        try:
            yield
        finally:
            # Whoever comes has waited; where we cannot say that we are done, the mark lapses by itself.
            with contextlib.suppress(TargetError):
                self._change(fence, {token: None}, always=True)

    def _change(self, fence: Fence, marks: Mapping[str, float | None], *, always: bool = False) -> None:
        """Renew the lease, with these guards added (seconds from now) or taken away."""

        def attempt() -> bool:
            found = self._find(fence.model)
            if found is None or not _is(found, fence):
                who = (found or {}).get("spec", {}).get("holderIdentity") or "nobody"
                raise StaleFence(f"{fence.holder} holds fence {fence.number} of {fence.model}; now it is {who}'s")
            now = self._client.now()
            held, _ = _held(found, now)
            if not always and held is not None and held.left > 0.75 * self._ttl:
                return True
            guards = _guards(found, now)
            for token, seconds in marks.items():
                guards.pop(token, None)
                if seconds is not None:
                    guards[token] = now + seconds
            spec = {**found["spec"], "leaseDurationSeconds": self._ttl, "renewTime": _stamp(now)}
            text = json.dumps(guards) if guards else None
            self._client.replace(annotated({**found, "spec": spec}, {GUARD: text}))
            return True

        again(attempt, f"the lease of {fence.model}")

    def _find(self, model: str) -> Json | None:
        found = self._client.get("Lease", name(model))
        if found is not None and not belongs(found, model):
            raise TargetError(f"the Lease {name(model)} is not that of {model}: whose is it?")
        return found

    # --- the journal

    def write(self, entry: Entry, fence: Fence) -> None:
        """Append a line. An "end" takes the place of all that its promotion, and the one before, have left.

        Raises `TargetError` where the cluster could not hold it.
        """
        token = uuid.uuid4().hex[:12]

        def change(found: Json) -> Json | None:
            data = found.get("data") or {}
            lines = _lines(found)
            if any(line.get(_TOKEN) == token for line in lines):
                return None  # it was written, only the answer was lost
            if entry.kind == END:
                lines = [one for one in lines if one["promotion"] != entry.promotion and one["kind"] != END]
            number = int(data.get(_NEXT, 1))
            fresh = replace(entry, number=number, fence=fence.number, at=self._client.now())
            lines.append({**asdict(fresh), _TOKEN: token})
            packed = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode(), mtime=0)
            if len(packed) > LIMIT:
                raise TargetError(
                    f"the journal of {entry.model} would take {len(packed):,} bytes, and a ConfigMap holds {LIMIT:,}: "
                    f"promotion {entry.promotion} writes more than a cluster can keep; end it, or take a smaller policy"
                )
            return {
                **found,
                "data": {**data, _NEXT: str(number + 1)},
                "binaryData": {_JOURNAL: base64.b64encode(packed).decode()},
            }

        self._rewrite(entry.model, fence, change)

    def journal(self, model: str) -> tuple[Entry, ...]:
        """The lines of a model, oldest first."""
        found = self._client.get("ConfigMap", name(model))
        lines = _lines(found) if found else []
        return tuple(Entry(**{key: value for key, value in line.items() if key != _TOKEN}) for line in lines)

    # --- the warm pool

    def keep(self, model: str, warm: int, fence: Fence) -> None:
        """Record how many versions stay warm."""
        self._rewrite(model, fence, lambda found: {**found, "data": {**(found.get("data") or {}), _KEPT: str(warm)}})

    def kept(self, model: str) -> int:
        """How many versions stay warm; 0 where nobody said."""
        found = self._client.get("ConfigMap", name(model))
        return int((found.get("data") or {}).get(_KEPT, 0)) if found else 0

    def _rewrite(self, model: str, fence: Fence, change: Callable[[Json], Json | None]) -> None:
        def attempt() -> bool:
            found = self._client.get("ConfigMap", name(model))
            self.check(model, fence)  # after reading, before writing: see above
            if found is None:
                self._client.create({**_bare("ConfigMap", model, fence.number), "data": {}})
                return False
            refuse_newer(found, fence)
            if (fresh := change(found)) is not None:
                self._client.replace(annotated(fresh, {names.FENCE: str(fence.number)}))
            return True

        again(attempt, f"ConfigMap {name(model)}")


def _bare(kind: str, model: str, fence: int) -> Json:
    annotations = {names.MODEL_NAME: model, names.FENCE: str(fence)}
    meta = {"name": name(model), "labels": names.labels(model), "annotations": annotations}
    return {"apiVersion": KINDS[kind].api, "kind": kind, "metadata": meta}


def annotated(obj: Json, more: Mapping[str, str | None]) -> Json:
    """The same object with other annotations; None takes one away."""
    meta = obj["metadata"]
    wanted = {**(meta.get("annotations") or {}), **more}
    left = {key: value for key, value in wanted.items() if value is not None}
    return {**obj, "metadata": {**meta, "annotations": left}}


def belongs(obj: Json, model: str) -> bool:
    """Whether an object says that it is of this model."""
    return bool((obj["metadata"].get("annotations") or {}).get(names.MODEL_NAME) == model)


def _is(found: Json, fence: Fence) -> bool:
    spec = found.get("spec") or {}
    return (spec.get("holderIdentity"), spec.get("leaseTransitions")) == (fence.holder, fence.number)


def _held(found: Json | None, now: float) -> tuple[Holder | None, int]:
    spec = (found or {}).get("spec") or {}
    number, who = int(spec.get("leaseTransitions") or 0), spec.get("holderIdentity")
    if not who:
        return None, number
    renewed = _seconds(spec.get("renewTime"))
    left = renewed + float(spec.get("leaseDurationSeconds") or 0) - now
    return Holder(str(who), _seconds(spec.get("acquireTime")), max(0.0, left)), number


def _guards(found: Json, now: float) -> dict[str, float]:
    """The guards that have not lapsed, by their token."""
    text = (found.get("metadata", {}).get("annotations") or {}).get(GUARD)
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        # A mark from another clock cannot hold anybody off for longer than one of ours.
        return {key: until for key, until in json.loads(text or "{}").items() if now < until <= now + GUARD_TIMEOUT + 5}
    return {}


def _lines(found: Json) -> list[dict[str, Any]]:
    text = (found.get("binaryData") or {}).get(_JOURNAL)
    if not text:
        return []
    try:
        return [json.loads(line) for line in gzip.decompress(base64.b64decode(text)).splitlines()]
    except (binascii.Error, OSError, EOFError, ValueError) as error:
        meta = found["metadata"]
        raise TargetError(f"ConfigMap {meta['name']}: its journal cannot be read ({error}): who changed it?") from error


def _stamp(seconds: float) -> str:
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _seconds(text: str | None) -> float:
    if not text:
        return 0.0
    try:
        return dt.datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise TargetError(f"a Lease says {text!r}, which is no time") from error

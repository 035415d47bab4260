"""The Kubernetes serving target: objects per version, one HTTPRoute per model, and waits until the cluster obeys."""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import httpx
import yaml

from deployments.artifact import digest
from deployments.kubernetes import names, pods, route
from deployments.kubernetes.answers import Answers
from deployments.kubernetes.client import KINDS, Client, Conflict, Forbidden
from deployments.kubernetes.cluster import Cluster, Json
from deployments.kubernetes.hand import Direct, Hand
from deployments.kubernetes.lease import State, again, annotated, belongs, refuse_newer
from deployments.kubernetes.manifests import enough
from deployments.kubernetes.pods import Fault
from deployments.kubernetes.workload import Plain, Standing, Workload
from deployments.target import (
    FULL,
    Answer,
    Change,
    Endpoint,
    Entry,
    Fence,
    Holder,
    NeverReady,
    Served,
    StaleFence,
    TargetError,
    TargetUnavailable,
    Traffic,
    Unit,
    Version,
)

if TYPE_CHECKING:
    from deployments.kubernetes.metrics import Metrics
    from deployments.kubernetes.replay import Replay

ADMITTED = f"{names.GROUP}/admitted"
"""Annotation of a version that was ready, warm and reachable once: those are the ones that count as deployed."""
_GRACE = 5.0
"""Seconds that the cluster may call something impossible before it is believed: controllers see things one by one."""
_PROOFS = 8
"""Answers in a row, each on a connection of its own, by versions that may answer."""
_MUTE = 300.0
"""Seconds for which a gateway that cannot be asked from here is not asked again."""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_NOISE = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink", "uid")
_LOG = logging.getLogger(__name__)


class KubernetesTarget:
    """A `ServingTarget` in one cluster. Safe to construct anywhere and for many threads: it connects when it is used.

    `workload` makes a version's objects (KServe has another one), `hand` brings objects into the cluster: by default
    at once, or by commits where the cluster's settings say `gitops`.
    """

    def __init__(self, cluster: Cluster, *, workload: Workload | None = None, hand: Hand | None = None) -> None:
        self.cluster, self.client = cluster, Client(cluster)
        self.workload = workload or Plain(cluster)
        self._hand = hand or _hand(self.client, cluster)
        self._state = State(self.client, cluster, self.workload.kind)
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        self._answers: dict[tuple[str, str], Answers] = {}
        self._replays: dict[str, Replay] = {}
        self._mute: dict[str, float] = {}
        self._counts: Metrics | None = None
        self._guard = threading.Lock()
        self._known_features: tuple[Fence, frozenset[str] | None] | None = None

    # --- what is there

    def up(self) -> bool:
        """Whether the API server answers."""
        return self.client.up()

    def kind_of(self, model: str) -> Literal["kubernetes", "kserve"] | None:
        """By what the model's versions are made of here; None where nothing of it is here."""
        found = self._state.workload_of(model)
        if found is None or (self._route(model) is None and not self._state.in_use(model)):
            return None
        return "kserve" if found == "InferenceService" else "kubernetes"

    def models(self) -> tuple[str, ...]:
        """The models that have a route here, by their names in the registry."""
        ours = {"app.kubernetes.io/managed-by": names.MANAGER}
        found = [one["metadata"].get("annotations") or {} for one in self.client.items("HTTPRoute", ours)]
        return tuple(sorted({one[names.MODEL_NAME] for one in found if names.MODEL_NAME in one}))

    def gateway(self, model: str) -> str:
        """The address that clients use. Raises `TargetError` where nothing of the model is deployed."""
        if self._route(model) is None:
            raise TargetError(f"{model} has no gateway yet: deploy a version of it first")
        return self._url(model)

    def deployed(self, model: str) -> Mapping[str, Endpoint]:
        """The deployed versions, by number."""
        return {number: self._endpoint(model, number) for number in self._admitted(model)}

    def units(self, model: str) -> Mapping[str, Sequence[Unit]]:
        """The pods of every deployed version."""
        found: dict[str, list[Unit]] = {number: [] for number in self._admitted(model)}
        for pod in self.client.items("Pod", {names.MODEL: names.slug(model)}):
            number = (pod["metadata"].get("labels") or {}).get(names.VERSION)
            if number in found:
                found[number].append(Unit(pod["metadata"]["name"], pods.state(pod)))
        return found

    def traffic(self, model: str) -> Traffic | None:
        """The traffic that the Gateway says it obeys; None where nothing was routed. Raises `TargetUnavailable` where
        it has not said so (yet), `TargetError` where the route is not one of ours.
        """
        found = self._route(model)
        if found is None:
            return None
        traffic = self._read(model, found)
        verdict = self._obeyed(found)
        if traffic is not None and verdict != "":
            raise TargetUnavailable(f"the gateway does not obey the route of {model} yet: {verdict}")
        return traffic

    def observe(self, model: str) -> Mapping[str, Served]:
        """What every version has answered: "3" live, "3-shadow" copies, "3-pinned" its own path, "3-header" pins."""
        with self._guard:
            if self._counts is None:
                from deployments.kubernetes.metrics import Metrics

                self._counts = Metrics(self.cluster, self.client)
            counts = self._counts
        return counts.observe(model, self._expected(model))

    def _expected(self, model: str) -> frozenset[str]:
        """The versions that must have counts, if only zeros."""
        found = self._route(model)
        traffic = self._read(model, found) if found is not None else None
        if traffic is None:
            return frozenset()
        expected = _answering(traffic)
        # A Prometheus has a series only once something was counted, and a small share takes its time.
        small = self.cluster.metrics.source == "prometheus" and len(expected) > 1
        return frozenset({traffic.champion}) if small else expected

    def answers(self, model: str, version: str, after: int = -1) -> Iterator[Answer]:
        """The answers that the version's pods still hold, oldest first, as this object numbers them."""
        if version not in self._admitted(model):
            raise TargetError(f"{model} {version} is not deployed")
        with self._guard:
            held = self._answers.setdefault((model, version), Answers(self.client, _selector(model, version)))
        return iter(held.after(after))

    # --- the model's state

    def lease(self, model: str, holder: str, *, take: bool = False) -> Fence:
        """Take the lease of `model`, or renew one's own. Raises `LeaseHeld`, unless it is to be taken."""
        _refuse_name("model", model)
        return self._state.lease(model, holder, take=take)

    def renew(self, fence: Fence) -> float:
        """Make the lease last again, for as many seconds as are returned."""
        return self._state.renew(fence)

    def holder(self, model: str) -> Holder | None:
        """Who holds the lease of `model`, or did until it lapsed; None where it was given back."""
        return self._state.holder(model)

    def release(self, fence: Fence) -> None:
        """Give the lease back; a stale fence is no error."""
        self._state.release(fence)

    def guard(self, fence: Fence) -> AbstractContextManager[None]:
        """Hold off every later holder of the lease while the block runs."""
        return self._state.guard(fence)

    def write(self, entry: Entry, fence: Fence) -> None:
        """Append to the journal; the API server has it once this returns."""
        self._state.write(entry, fence)

    def journal(self, model: str) -> tuple[Entry, ...]:
        """The journal of `model`, oldest line first."""
        return self._state.journal(model)

    def keep(self, model: str, warm: int, fence: Fence) -> None:
        """Record how many versions of `model` stay loaded."""
        self._state.keep(model, warm, fence)

    def kept(self, model: str) -> int:
        """How many versions of `model` stay loaded, whatever serves."""
        return self._state.kept(model)

    # --- deploying

    def deploy(self, version: Version, fence: Fence) -> Endpoint:
        """Make the version's objects and wait until enough replicas are ready and warm, its Service knows them and the
        gateway has its own path. The lease is renewed while it takes. A version that is deployed is not touched.

        Raises `NeverReady` with events and last lines where the version is to blame, `TargetError` with the events
        where the cluster or the settings are. What never worked is not left behind.
        """
        model, number = version.model, version.number
        _refuse_name("model", model)
        _refuse_name("version", number)
        self._state.check(model, fence)
        self._refuse_artifact(version)
        known = self._recorded(version, fence)
        admitted = known is not None and _is_admitted(known)
        try:
            if not admitted:
                objects = self.workload.objects(version, promotion=fence.holder, fence=fence.number)
                self._hand.check(objects)
                self._state.check(model, fence)
                with self._keeping(fence):
                    self._hand.apply(objects, why=f"deploy {model} {number}")
            self._await_ready(model, number, fence, admitted=admitted)
            with self._locks[model]:
                if not admitted:
                    versions = [*self._admitted(model), number]
                    self._publish(model, versions, None, fence, why=f"the own path of {model} {number}")
                    self._mark(model, number, fence, "true")
        except StaleFence:
            raise  # whoever has the lease now may be deploying the very same version
        except BaseException:
            if not admitted:
                self._take_back(model, number, fence)
            raise
        return self._endpoint(model, number)

    def _take_back(self, model: str, number: str, fence: Fence) -> None:
        """Leave nothing of a version that never worked, as far as the cluster can be asked."""
        with contextlib.suppress(TargetError), self._locks[model]:
            if names.of_version(model, number) in json.dumps((self._route(model) or {}).get("spec")):
                versions = self._admitted(model)
                self._publish(model, versions, None, fence, why=f"no path to {model} {number}", wait=False)
        with contextlib.suppress(TargetError):
            self._clear(model, number, fence)

    def _refuse_artifact(self, version: Version) -> None:
        try:
            found = digest(version.path)
        except (OSError, ValueError) as error:
            raise TargetError(f"{version.model} {version.number} at {version.path}: {error}") from error
        if found != version.digest:
            raise TargetError(
                f"{version.model} {version.number} is not what was admitted: its digest is {found}, "
                f"admitted was {version.digest}"
            )

    def _recorded(self, version: Version, fence: Fence | None) -> Json | None:
        """The object of a version that is there already; one that is going is waited for, with a fence."""
        model, number = version.model, version.number
        found = self._main(model, number)
        if found is not None and "deletionTimestamp" in found["metadata"]:
            if fence is not None:
                self._await_gone(model, number, fence)
            return None
        if found is None:
            return None
        said = (found["metadata"].get("annotations") or {}).get(names.DIGEST)
        if said != version.digest:
            raise TargetError(f"{model} {number} is deployed already, with the digest {said}")
        return found

    def _await_ready(self, model: str, number: str, fence: Fence, *, admitted: bool) -> None:
        """Return once enough replicas are ready, and the Service's EndpointSlices say so."""
        wanted, timeout = enough(self.cluster), self.cluster.ready_timeout
        there: dict[str, Json] = {}
        trouble = _Trouble(_GRACE)
        standing = Standing(0, wanted, "its pods do not come")
        for event in self._ticks("Pod", _selector(model, number), timeout, fence):
            if event["type"] != "TICK":
                _follow(there, event)
            closely = time.monotonic() + 1.0
            while True:
                standing = self._standing(model, number, list(there.values()))
                if standing.ready >= wanted:
                    return
                # Deployment and EndpointSlices follow their pods at once: no need to wait for the next second.
                if sum(map(pods.ready, there.values())) < wanted or time.monotonic() > closely:
                    break
                time.sleep(0.05)
            found = pods.fault(there.values())
            if standing.refused and not (found and found.own):
                found = Fault(standing.refused, own=False)
            if (fault := trouble.look(found)) is not None:
                self._blame(model, number, fault, list(there.values()), admitted=admitted)
        own = any(map(pods.started, there.values()))
        found = trouble.last or Fault(f"not ready after {timeout:g} s: {standing.why}", own=own)
        self._blame(model, number, found, list(there.values()), admitted=admitted)

    def _standing(self, model: str, number: str, there: Sequence[Json]) -> Standing:
        """How a version stands: a replica that its Service does not know is not ready."""
        main = self._main(model, number)
        if main is None or _going(main):
            name = names.of_version(model, number)
            raise TargetUnavailable(f"{self.workload.kind} {name} was deleted by somebody else while it started")
        standing = self.workload.standing(main, there)
        if standing.ready:
            known = len(pods.endpoints(self.client, names.of_version(model, number)))
            if known < standing.ready:
                why = f"{standing.ready} replicas are ready and the Service knows {known}"
                return dataclasses.replace(standing, ready=known, why=why)
        return standing

    def _blame(self, model: str, number: str, fault: Fault, there: Sequence[Json], *, admitted: bool) -> None:
        message = f"{model} {number}: {fault.why}"
        if admitted:
            raise TargetUnavailable(f"{message}; it was ready once, so the cluster brings it back")
        if fault.own:
            raise NeverReady(message, pods.last_words(self.client, names.of_version(model, number), there))
        if line := pods.last_line(self.client, fault):
            message = f"{message}: {line}"
        said = "; ".join(pods.events(self.client, names.of_version(model, number))[-5:])
        raise TargetError(f"{message} (events: {said})" if said else message)

    def _mark(self, model: str, number: str, fence: Fence, admitted: str | None) -> None:
        """Say on a version's object whether it counts as deployed."""

        def attempt() -> bool:
            found = self._main(model, number)
            self._state.check(model, fence)
            if found is None:
                if admitted is None:
                    return True
                raise TargetUnavailable(f"{model} {number} was deleted by somebody else")
            refuse_newer(found, fence)
            if (found["metadata"].get("annotations") or {}).get(ADMITTED) != admitted or admitted is None:
                self.client.replace(annotated(found, {ADMITTED: admitted, names.FENCE: str(fence.number)}))
            return True

        again(attempt, f"{self.workload.kind} {names.of_version(model, number)}")

    # --- routing

    def route(self, traffic: Traffic, fence: Fence) -> None:
        """Make the gateway obey `traffic`; return once it says that it does, and, where it can be asked, once nobody
        else answers. Raises `TargetError` where it refuses: then the last route is put back.
        """
        model = traffic.model
        self._state.check(model, fence)
        if missing := sorted(traffic.live - set(self._admitted(model))):
            raise TargetError(f"{model} {', '.join(missing)} is not deployed: no traffic can go there")
        if faults := route.cannot(self.cluster, traffic, self._supported(fence)):
            raise TargetError(f"{model} cannot be routed: {'; '.join(faults)}")
        with self._locks[model]:
            self._refuse_unhealthy(traffic)
            before = self._may_answer(model)
            self._publish(model, sorted(self._admitted(model)), traffic, fence, why=f"traffic of {model}")
            self._prove(traffic, before)
        self._replay(traffic)

    def _refuse_unhealthy(self, traffic: Traffic) -> None:
        model = traffic.model
        # A fallback answers only where others fail; whoever is to answer now must be able to.
        wanted = {traffic.champion, *(pin.version for pin in traffic.shape.pins)}
        if traffic.weight or traffic.mirror:
            wanted.add(str(traffic.challenger))
        end = time.monotonic() + _GRACE / 2
        while sick := sorted(one for one in wanted if not self._answering(model, one)):
            if time.monotonic() > end:
                said = "; ".join(f"{one}: none of its pods is ready" for one in sick)
                raise TargetError(f"{model} has versions that are not healthy, no traffic moves ({said})")
            time.sleep(0.2)

    def _answering(self, model: str, number: str) -> bool:
        """Whether the Service of a version has a ready endpoint whose pod is there: slices lag behind."""
        listed = pods.endpoints(self.client, names.of_version(model, number))
        there = self.client.items("Pod", _selector(model, number))
        return any(one["metadata"]["name"] in listed for one in there if pods.ready(one))

    def _publish(
        self,
        model: str,
        versions: Sequence[str],
        traffic: Traffic | None,
        fence: Fence,
        *,
        why: str,
        wait: bool = True,
    ) -> None:
        """Make the route one with the own paths of `versions`, and wait until the gateway obeys it. Without `traffic`
        that is what it was, without `versions` and traffic there is no route.
        """
        before: Json | None = None
        applied: Json = {}

        def attempt() -> bool:
            nonlocal before, applied
            before = self._route(model)
            if before is not None and _going(before) and self.cluster.gitops is None:
                if not versions and traffic is None:
                    return True
                # It has somebody's finalizer: what is applied now would go with it.
                raise Conflict(f"the HTTPRoute of {model} is being deleted")
            before = before or self._bare_route(model, fence)
            self._state.check(model, fence)  # after reading, before writing: see lease.py
            if before is not None:
                refuse_newer(before, fence)
            kept = traffic if traffic is not None or before is None else self._read(model, before)
            if not versions and kept is None:
                if before is not None:
                    self._hand.delete([before], why=f"{why}, by {fence.holder}")
                applied = {}
                return True
            wanted = route.route(self.cluster, model, versions, kept, fence=fence.number)
            if before is not None:
                wanted["metadata"] |= _still(before)
            with self._keeping(fence):
                [applied] = self._hand.apply([wanted], why=f"{why}, by {fence.holder}")
            return True

        again(attempt, f"HTTPRoute {names.slug(model)}")
        if applied and wait:
            self._await_obeyed(model, applied, before, fence, why)

    def _bare_route(self, model: str, fence: Fence) -> Json | None:
        """A route that does nothing yet: so that even the first one has a resourceVersion to be written against."""
        if self.cluster.gitops is not None:
            return None
        meta = {
            "name": names.slug(model),
            "labels": names.labels(model),
            "annotations": {names.MODEL_NAME: model, names.FENCE: str(fence.number)},
        }
        self._state.check(model, fence)
        return self.client.create(
            {"apiVersion": KINDS["HTTPRoute"].api, "kind": "HTTPRoute", "metadata": meta, "spec": {}}
        )

    def _await_obeyed(self, model: str, applied: Json, before: Json | None, fence: Fence, why: str) -> None:
        """Return once every parent of ours obeys what was applied. What is refused is taken back; what nobody reports
        on stays: when the gateway's controller comes back it must find the latest wish, not one from before.
        """
        generation = applied["metadata"].get("generation")
        said: str | None = "nobody has looked at it"
        trouble = _Trouble(_GRACE / 2)
        for event in self._ticks("HTTPRoute", {names.MODEL: names.slug(model)}, self.cluster.route_timeout, fence):
            found = event["object"] if event["type"] in {"ADDED", "MODIFIED"} else self._route(model)
            if found is None or event["type"] == "DELETED":
                raise TargetUnavailable(f"the route of {model} was deleted by somebody else")
            if (found["metadata"].get("generation") or 0) < (generation or 0):
                continue  # the watch is behind
            if found["metadata"].get("generation") != generation and found.get("spec") != applied.get("spec"):
                raise TargetUnavailable(f"the route of {model} was changed by somebody else while we waited")
            if (said := self._obeyed(found)) == "":
                return
            refused = self._refused(found)
            if (fault := trouble.look(Fault(refused, own=False) if refused else None)) is not None:
                self._put_back(model, before, fence, why)
                raise TargetError(f"the gateway refuses the route of {model}: {fault.why}")
        raise TargetUnavailable(
            f"the gateway {self.cluster.gateway.name} does not say within {self.cluster.route_timeout:g} s that it "
            f"obeys the route of {model}: {said}"
        )

    def _put_back(self, model: str, before: Json | None, fence: Fence, why: str) -> None:
        """The last good route again, by our own field manager."""
        if before is None or not before.get("spec", {}).get("parentRefs"):
            now = self._route(model)
            if now is not None:
                self._hand.delete([_unversioned(now)], why=f"back: {why}, by {fence.holder}")
            return

        def attempt() -> bool:
            now = self._route(model)
            self._state.check(model, fence)
            if now is None:
                return True
            ours = (*names.labels(model), names.MODEL_NAME, names.TRAFFIC, names.PROMOTION)
            meta = before["metadata"]
            old: Json = {
                "apiVersion": before["apiVersion"],
                "kind": "HTTPRoute",
                "metadata": {
                    "name": meta["name"],
                    "namespace": meta.get("namespace", self.cluster.namespace),
                    **_still(now),
                    "labels": {key: value for key, value in (meta.get("labels") or {}).items() if key in ours},
                    "annotations": {
                        **{key: value for key, value in (meta.get("annotations") or {}).items() if key in ours},
                        names.FENCE: str(fence.number),
                    },
                },
                "spec": before["spec"],
            }
            with self._keeping(fence):
                self._hand.apply([old], why=f"back: {why}, by {fence.holder}")
            return True

        again(attempt, f"HTTPRoute {names.slug(model)}")

    def _parents(self, found: Json) -> Iterator[tuple[Json, list[Json]]]:
        """Every parent that the route names, with what controllers report on it."""
        space = found["metadata"].get("namespace") or self.cluster.namespace

        def which(ref: Json) -> tuple[object, ...]:
            return ref["name"], ref.get("namespace") or space, ref.get("sectionName"), ref.get("port")

        reported = found.get("status", {}).get("parents") or ()
        for ref in found.get("spec", {}).get("parentRefs") or ():
            yield ref, [one for one in reported if which(one["parentRef"]) == which(ref)]

    def _obeyed(self, found: Json) -> str:
        """What is missing until the gateway obeys this very generation; empty where it does."""
        generation, any_parent = found["metadata"].get("generation"), False
        for ref, reports in self._parents(found):
            any_parent = True
            if not reports:
                return f"no controller reports on it for the gateway {ref['name']}"
            missing = [_missing(one, generation) for one in reports]
            if all(missing):
                return missing[0]
        return "" if any_parent else "it has no parent"

    def _refused(self, found: Json) -> str:
        """What a controller says about this very generation that it will not do; empty where it says no such thing."""
        generation = found["metadata"].get("generation")
        return next(
            (
                f"{one['type']} is false: {one.get('reason', '')}: {one.get('message', '')}".rstrip(": ")
                for _, reports in self._parents(found)
                for report in reports
                for one in report.get("conditions") or ()
                if one["status"] == "False"
                and one["type"] in {"Accepted", "ResolvedRefs", "Programmed"}
                and one.get("observedGeneration") == generation
            ),
            "",
        )

    def _may_answer(self, model: str) -> frozenset[str]:
        """Who answers live requests by the traffic that the gateway obeys; nobody where that is not certain."""
        with contextlib.suppress(TargetError):
            traffic = self.traffic(model)
            return frozenset() if traffic is None else _answering(traffic)
        return frozenset()

    def _prove(self, traffic: Traffic, before: frozenset[str]) -> None:
        """Ask the gateway until only those answer who may: statuses are the least proof. Where it cannot be asked from
        here, or answers do not say whose they are, the status is all there is. Nothing is asked where the same ones
        answered `before`: weights are proven by the share that is observed.
        """
        model, seen, may = traffic.model, 0, _answering(traffic)
        if may == before or not set(self._admitted(model)) - may or time.monotonic() < self._mute.get(model, 0.0):
            return  # whoever answers, it proves nothing; or nobody does
        url, headers = f"{self._url(model)}/ping", {}
        if self.cluster.gateway.host and "*" not in self.cluster.gateway.host:
            headers["host"] = self.cluster.gateway.host.replace("{model}", names.slug(model))
        end, mute = time.monotonic() + self.cluster.route_timeout, time.monotonic() + 2 * _GRACE
        while seen < _PROOFS:
            try:
                answer = self._clients.get(url, headers=headers)
            except httpx.HTTPError as error:
                _LOG.info("the gateway cannot be asked from here (%s: %s): its status is all we know", url, error)
                self._mute[model] = time.monotonic() + _MUTE
                return
            who = answer.headers.get("x-titleshot-version") or answer.headers.get("x-model-version")
            seen = seen + 1 if who in may else 0
            if who is None and time.monotonic() > mute:
                _LOG.info("%s: %s, and not by whom: the gateway's status is all we know", url, answer.status_code)
                self._mute[model] = time.monotonic() + _MUTE
                return
            if not seen and time.monotonic() > end:
                raise TargetUnavailable(
                    f"the gateway says that it obeys the route of {model}, and {url} is still answered by {who}"
                )
            if not seen:
                time.sleep(0.05)

    @functools.cached_property
    def _clients(self) -> httpx.Client:
        """Asks the gateway as its clients do: a connection for each question, so that any of its workers may answer."""
        return httpx.Client(trust_env=False, timeout=5, limits=httpx.Limits(max_keepalive_connections=0))

    def _replay(self, traffic: Traffic) -> None:
        """Copy live requests from here, where the gateway is not to do it."""
        if self.cluster.mirroring != "replay":
            return
        from deployments.kubernetes.replay import Replay

        model = traffic.model
        with self._guard:
            running = self._replays.get(model)
            if running is not None and running.running and running.traffic == traffic:
                return
            self._replays.pop(model, None)
        if running is not None:
            running.stop()
        if traffic.mirror and traffic.challenger is not None:

            def still() -> bool:
                found = self._route(model)
                return found is not None and self._read(model, found) == traffic

            with self._guard:
                self._replays[model] = Replay(self.client, traffic, still)

    # --- retiring

    def retire(self, model: str, version: str, fence: Fence) -> None:
        """Take the version's path away, wait until its requests have ended, then delete its objects and return once its
        pods are gone. Raises `TargetError` while it has traffic.
        """
        self._state.check(model, fence)
        with self._locks[model]:
            main = self._main(model, version)
            if main is not None and "deletionTimestamp" not in main["metadata"]:
                self._dismiss(model, version, fence)
            self._clear(model, version, fence)
        with self._guard:
            self._answers.pop((model, version), None)
        self._await_gone(model, version, fence)

    def _dismiss(self, model: str, version: str, fence: Fence) -> None:
        traffic = self.traffic(model)
        if traffic is not None and version in traffic.live:
            raise TargetError(f"{model} {version} has traffic: route it away first")
        if traffic is not None and traffic.challenger == version:
            traffic = dataclasses.replace(traffic, challenger=None)
        # From here on it is deployed no more: cut anywhere, a retire goes on and a deploy begins anew.
        self._mark(model, version, fence, None)
        if self._route(model) is not None:
            self._publish(model, sorted(self._admitted(model)), traffic, fence, why=f"no path to {model} {version}")
        end = time.monotonic() + self.cluster.answer_timeout
        while self._in_flight(model, version) and time.monotonic() < end:
            # Whoever is not done by then has the pod's own grace.
            self._state.check(model, fence)
            time.sleep(0.2)

    def _in_flight(self, model: str, version: str) -> float:
        """Requests under way in the version's pods; pods that cannot be asked have none that we know of."""
        total = 0.0
        for pod in self.client.items("Pod", _selector(model, version)):
            if not pods.leaving(pod) and pod.get("status", {}).get("podIP"):
                with contextlib.suppress(TargetError):
                    page = self.client.pod_get(pod, names.ADMIN, "/metrics", 5.0).decode()
                    total += sum(map(float, re.findall(r"(?m)^titleshot_in_flight(?:\{[^}]*\})? (\S+)", page)))
        return total

    def _clear(self, model: str, version: str, fence: Fence) -> None:
        """Delete whatever there is of a version that does not count as deployed."""
        for kind in reversed(self.workload.kinds):

            def attempt(kind: str = kind) -> bool:
                found = [
                    one
                    for one in self.client.items(kind, _selector(model, version))
                    if one["metadata"]["name"] == names.of_version(model, version) and not _going(one)
                ]
                self._state.check(model, fence)
                for one in found:
                    refuse_newer(one, fence)
                    if _is_admitted(one):
                        raise TargetError(f"{model} {version} was deployed anew by somebody else")
                    exact = kind == self.workload.kind and self.cluster.gitops is None
                    # What counts as deployed by the time that we delete it has another resourceVersion.
                    gone = one if exact else _unversioned(one)
                    with self._keeping(fence):
                        self._hand.delete([gone], why=f"retire {model} {version}, by {fence.holder}")
                return True

            again(attempt, f"{kind} {names.of_version(model, version)}")

    def _await_gone(self, model: str, version: str, fence: Fence) -> None:
        timeout = 2 * self.cluster.answer_timeout + 60
        for _ in self._ticks("Pod", _selector(model, version), timeout, fence):
            there = [pod for pod in self.client.items("Pod", _selector(model, version)) if not _over(pod)]
            if not there and self._main(model, version) is None:
                return
        raise TargetUnavailable(f"{model} {version} is deleted, and {timeout:g} s later its pods are still there")

    # --- before anything is done

    def cannot(self, traffic: Traffic) -> tuple[str, ...]:
        """What this cluster's gateway, or any, is not able to do of `traffic`; and what is not there at all."""
        wanted = self.cluster.gateway
        space, name = wanted.namespace or self.cluster.namespace, self.cluster.name
        try:
            if not self.client.knows("HTTPRoute"):
                return (f"cluster {name} knows no HTTPRoute: the Gateway API's definitions are not installed",)
            found = self.client.get("Gateway", wanted.name, space)
        except Forbidden:
            return tuple(route.cannot(self.cluster, traffic, None))
        if found is None:
            return (f"cluster {name} has no Gateway {wanted.name} in namespace {space}",)
        said = []
        listeners = {one.get("name") for one in found.get("spec", {}).get("listeners") or ()}
        if wanted.section and wanted.section not in listeners:
            said.append(f"the Gateway {wanted.name} has no listener {wanted.section}")
        conditions = {one["type"]: one for one in found.get("status", {}).get("conditions") or ()}
        kind = found.get("spec", {}).get("gatewayClassName")
        if conditions.get("Accepted", {}).get("status") != "True":
            why = conditions.get("Accepted", {}).get("message") or "its status says nothing"
            said.append(f"no controller has taken the Gateway {wanted.name} of class {kind}: {why}")
        elif conditions.get("Programmed", {}).get("status") == "False":
            said.append(f"the Gateway {wanted.name} is not programmed: {conditions['Programmed'].get('message', '')}")
        try:
            supported = self._features(kind)
        except TargetUnavailable:
            raise
        except TargetError as error:
            said.append(str(error))
            supported = None
        return (*said, *route.cannot(self.cluster, traffic, supported))

    def _features(self, kind: str | None) -> frozenset[str] | None:
        """What a GatewayClass says that it supports; None where it does not say, or we may not read it."""
        if not kind:
            return None
        try:
            found = self.client.get("GatewayClass", kind)
        except Forbidden:
            return None
        if found is None:
            raise TargetError(f"cluster {self.cluster.name} has no GatewayClass {kind}")
        features = found.get("status", {}).get("supportedFeatures")
        if not features:
            return None
        return frozenset(str(one["name"]) if isinstance(one, dict) else str(one) for one in features)

    def _supported(self, fence: Fence) -> frozenset[str] | None:
        """The features of our Gateway's class, asked for once per lease."""
        known = self._known_features
        if known is not None and known[0] == fence:
            return known[1]
        wanted = self.cluster.gateway
        found: frozenset[str] | None = None
        with contextlib.suppress(TargetError):  # what is not known bars nobody: `cannot` is asked before
            there = self.client.get("Gateway", wanted.name, wanted.namespace or self.cluster.namespace)
            if there is not None:
                found = self._features(there.get("spec", {}).get("gatewayClassName"))
        self._known_features = fence, found
        return found

    def changes(self, version: Version, traffics: Sequence[Traffic]) -> tuple[tuple[Change, ...], ...]:
        """What `deploy(version)` would make or change, then each route: by the API server's own dry run."""
        self._refuse_artifact(version)
        model, known = version.model, self._recorded(version, None)
        now = self._route(model)
        first: list[Change] = []
        if known is None or not _is_admitted(known):
            for one in self.workload.objects(version, promotion="", fence=0):
                there = self.client.get(one["kind"], one["metadata"]["name"])
                first += _change(there, self._dry(one))
        versions = sorted({*self._admitted(model), version.number})
        traffic = self._read(model, now) if now is not None else None
        routes = [now, self._dry(route.route(self.cluster, model, versions, traffic, fence=0))]
        for wanted in traffics:
            reached = sorted({*versions, *wanted.live})
            routes.append(self._dry(route.route(self.cluster, model, reached, wanted, fence=0)))
        pairs = [_change(*pair) for pair in itertools.pairwise(routes)]
        return ((*first, *pairs[0]), *map(tuple, pairs[1:]))

    def _dry(self, obj: Json) -> Json:
        try:
            return self.client.apply(obj, dry_run=True)
        except Forbidden:
            if self.cluster.gitops is None:
                raise
            return obj  # who only commits need have no right to apply

    # --- details

    @contextlib.contextmanager
    def _keeping(self, fence: Fence) -> Iterator[None]:
        """Keep the lease while a commit finds its way into the cluster: that may take minutes."""
        if self.cluster.gitops is None:
            yield
            return
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self.cluster.lease_seconds / 4):
                with contextlib.suppress(TargetError):  # whoever waits finds out by the fence
                    self._state.check(fence.model, fence)

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _ticks(self, kind: str, labels: Mapping[str, str], seconds: float, fence: Fence) -> Iterator[Json]:
        """What happens to these objects, and a look at least once a second; the lease is kept meanwhile."""
        renewed = time.monotonic()
        for event in self.client.watch(kind, labels, seconds, tick=1.0):
            if time.monotonic() - renewed > self.cluster.lease_seconds / 4:
                self._state.check(fence.model, fence)
                renewed = time.monotonic()
            yield event

    def _main(self, model: str, number: str) -> Json | None:
        """The object that stands for a version."""
        found = self.client.get(self.workload.kind, names.of_version(model, number))
        if found is not None and not belongs(found, model):
            raise TargetError(f"the {found['kind']} {found['metadata']['name']} is not one of ours: rename or move it")
        return found

    def _route(self, model: str) -> Json | None:
        found = self.client.get("HTTPRoute", names.slug(model))
        if found is not None and not belongs(found, model):
            raise TargetError(f"the HTTPRoute {names.slug(model)} is not that of {model}: rename or move it")
        return found

    def _read(self, model: str, found: Json) -> Traffic | None:
        if names.TRAFFIC not in (found["metadata"].get("annotations") or {}) and not found["spec"].get("parentRefs"):
            return None  # ours, and nothing in it yet
        try:
            return route.traffic_of(self.cluster, found)
        except (ValueError, KeyError, TypeError) as error:
            raise TargetError(f"the HTTPRoute of {model} is not as we wrote it: {error}") from error

    def _admitted(self, model: str) -> tuple[str, ...]:
        """The versions that count as deployed, by number."""
        found = [
            str(one["metadata"]["labels"][names.VERSION])
            for one in self.client.items(self.workload.kind, {names.MODEL: names.slug(model)})
            if _is_admitted(one) and not _going(one)
        ]
        return tuple(sorted(found, key=lambda number: (len(number), number)))

    def _endpoint(self, model: str, number: str) -> Endpoint:
        service = f"{names.of_version(model, number)}.{self.cluster.namespace}.svc"
        return Endpoint(model, number, f"{self._url(model)}/v/{number}", f"http://{service}:{names.PORTS['own']}")

    def _url(self, model: str) -> str:
        return self.cluster.gateway.url.replace("{model}", names.slug(model)).rstrip("/")


class _Trouble:
    """Something that is wrong for longer than a moment; what is the version's own fault needs no second look."""

    def __init__(self, grace: float) -> None:
        self.last: Fault | None = None
        self._grace, self._since = grace, 0.0

    def look(self, found: Fault | None) -> Fault | None:
        """Take what is wrong now; returns it once that is certain."""
        if found is None or self.last is None:
            self._since = time.monotonic()
        self.last = found
        if found is not None and (found.own or time.monotonic() - self._since > self._grace):
            return found
        return None


def _hand(client: Client, cluster: Cluster) -> Hand:
    if cluster.gitops is None:
        return Direct(client)
    from deployments.kubernetes.gitops import Committed

    return Committed(client, cluster)


def _answering(traffic: Traffic) -> frozenset[str]:
    """Who answers live requests that no pin catches."""
    champion = {traffic.champion} if traffic.weight < FULL else set()
    return frozenset(champion | ({str(traffic.challenger)} if traffic.weight else set()))


def _missing(report: Json, generation: int | None) -> str:
    """What one controller's report on a parent lacks."""
    conditions = {one["type"]: one for one in report.get("conditions") or ()}
    for kind in ("Accepted", "ResolvedRefs", "Programmed"):
        one = conditions.get(kind)
        if one is None:
            if kind != "Programmed":
                return f"{kind} is not reported"
            continue
        if one.get("observedGeneration") != generation:
            return f"{kind} is about generation {one.get('observedGeneration')}, now it is {generation}"
        if one["status"] != "True":
            return f"{kind} is {one['status']}: {one.get('reason', '')}: {one.get('message', '')}".rstrip(": ")
    return ""


def _follow(there: dict[str, Json], event: Json) -> None:
    one = event["object"]
    there.pop(one["metadata"]["uid"], None)
    if event["type"] != "DELETED":
        there[one["metadata"]["uid"]] = one


def _selector(model: str, version: str) -> dict[str, str]:
    return {names.MODEL: names.slug(model), names.VERSION: version}


def _is_admitted(one: Json) -> bool:
    return ADMITTED in (one["metadata"].get("annotations") or {})


def _going(one: Json) -> bool:
    return "deletionTimestamp" in one["metadata"]


def _over(pod: Json) -> bool:
    """Whether nothing of a pod runs any more."""
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}


def _still(one: Json) -> Json:
    """The precondition that an object is as it was read. Its version alone would let one that was deleted meanwhile be
    created anew.
    """
    return {name: one["metadata"][name] for name in ("resourceVersion", "uid")}


def _unversioned(one: Json) -> Json:
    meta = {key: value for key, value in one["metadata"].items() if key != "resourceVersion"}
    return {**one, "metadata": meta}


def _plain(one: Json | None) -> Json | None:
    """An object without what the API server adds, and without what is new with every lease. A Service's address in a
    dry run is not the one that it gets.
    """
    if one is None:
        return None
    meta = {key: value for key, value in one["metadata"].items() if key not in _NOISE}
    noise = {names.FENCE, names.PROMOTION, ADMITTED}
    meta["annotations"] = {key: value for key, value in (meta.get("annotations") or {}).items() if key not in noise}
    plain = {key: value for key, value in {**one, "metadata": meta}.items() if key != "status"}
    if one["kind"] == "Service":
        plain["spec"] = {key: value for key, value in one["spec"].items() if not key.startswith("clusterIP")}
    return plain


def _change(before: Json | None, after: Json | None) -> list[Change]:
    old, new = _plain(before), _plain(after)
    if after is None or old == new or after["kind"] == "Secret":
        return []
    texts = ["" if one is None else yaml.safe_dump(one, sort_keys=False, allow_unicode=True) for one in (old, new)]
    return [Change(f"{after['kind']} {after['metadata']['name']}", *texts)]


def _refuse_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name) or (what == "version" and len(name) > 20):
        raise TargetError(f"{name!r} cannot name a {what} here: letters, digits, '_', '-' and '.' only")

"""The warm pool of a model: the versions that stay loaded, so that a promotion or a rollback is one route change."""

import dataclasses
import os
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from deployments.target import Fence, NeverReady, ServingTarget, StaleFence, TargetError, Traffic, Version
from tasks import registry
from tasks.agreement import leased
from tasks.journal import agreed, opened
from tasks.progress import say
from tasks.settings import Mistake, Settings
from tasks.status import said

AT_ONCE = min(4, os.cpu_count() or 1)
"""How many models load at the same time: the imports of one keep a core busy."""


def order(names: Iterable[str | None], versions: Collection[str], refused: Collection[str]) -> list[str]:
    """Who is to be warm, first come first: those that `names` has (champion, previous, challenger), then the newest of
    `versions`; without the `refused`.
    """
    newest = sorted(versions, key=int, reverse=True)
    return [one for one in dict.fromkeys((*names, *newest)) if one is not None and one not in refused]


def spare(target: ServingTarget, model: str, keep: Collection[str | None], unwanted: Collection[str] = ()) -> list[str]:
    """The deployed versions that nothing needs: neither those of `keep` nor those of the warm pool, which are the
    newest. The `unwanted` (rejected, quarantined) are never part of a pool.
    """
    there = sorted(target.deployed(model), key=int)
    others = [number for number in there if number not in keep and number not in unwanted]
    room = max(0, target.kept(model) - sum(number in keep for number in there))
    bad = [number for number in there if number in unwanted and number not in keep]
    return bad + (others[: len(others) - room] if room else others)


def take_down(target: ServingTarget, model: str, numbers: Iterable[str], fence: Fence) -> None:
    """Retire versions that nobody needs; what cannot be taken down (it may have traffic still) is told, and stays."""
    for number in numbers:
        try:
            target.retire(model, number, fence)
        except StaleFence:
            raise
        except TargetError as error:
            say(f"v{number} could not be taken down: {error}")


def blamed(model: str) -> dict[str, str]:
    """The versions of `model` that are quarantined, and why: one that was blamed itself, or has the same artifact."""
    found = {str(v.version): dict(v.tags) for v in registry.client().search_model_versions(f"name = '{model}'")}
    name, digest = registry.TAG + "quarantine", registry.TAG + "digest"
    artifacts = {tags[digest]: tags[name] for tags in found.values() if tags.get(name) and tags.get(digest)}
    return {
        number: why
        for number, tags in found.items()
        if (why := tags.get(name) or artifacts.get(tags.get(digest, ""), ""))
    }


def serve(settings: Settings, target: ServingTarget, model: str, warm: int) -> dict[str, str]:
    """Keep `warm` versions of `model` loaded: champion, previous, challenger, then the newest that are not quarantined;
    what is more is taken down, but never what traffic needs. Where nothing is routed yet the champion serves from
    now on.

    Returns why versions were left out, by number. Raises `Mistake` where there is no champion, where gateway and
    registry disagree, or where a promotion was left behind, and `LeaseHeld` while one is under way.
    """
    if warm < 0:
        raise Mistake(f"--warm {warm}: it is a number of versions, 0 or more", code=2)
    versions = registry.versions(model)
    if not versions or registry.aliased(model, registry.CHAMPION) is None:
        raise Mistake(
            f"{model} has no champion to serve: promote a version, or set the alias champion in the MLflow UI", code=2
        )
    # The name is another for each process: a lease is renewed, not refused, for whoever has the name of its holder.
    with leased(target, model, f"serve {model} ({secrets.token_hex(2)})") as fence:
        loading = _Loading(settings, target, model, warm, fence)
        loading.settle()
        target.keep(model, warm, fence)
        loading.fill(versions)
        loading.trim()
        return loading.left_out


class _Loading:
    """One `serve` under way."""

    def __init__(self, settings: Settings, target: ServingTarget, model: str, warm: int, fence: Fence) -> None:
        self.settings, self.target, self.model, self.warm, self.fence = settings, target, model, warm, fence
        found = (registry.aliased(model, name) for name in (registry.CHAMPION, registry.PREVIOUS, registry.CHALLENGER))
        self.champion, self.previous, self.challenger = found
        self.left_out: dict[str, str] = {}
        self.blamed = blamed(model)
        self.waiting: str | None = None

    def settle(self) -> None:
        """Begin from agreement: the champion serves, and is made to where nothing does yet."""
        model, target, champion = self.model, self.target, self.champion
        assert champion is not None
        left = opened(target, model)
        if left is not None and not left.waiting:
            raise Mistake(f"{left.id} was left behind by its process: `titleshot recover {model}` first")
        self.waiting = left.promotion.challenger if left is not None and left.promotion is not None else None
        traffic = target.traffic(model)
        if traffic is not None and traffic.champion != champion:
            raise Mistake(
                f"the gateway serves {model} v{traffic.champion} and the alias champion names v{champion}: "
                "`titleshot doctor --mend` brings them together"
            )
        if champion not in target.deployed(model):
            say(f"{model} v{champion} is the champion and is not served here yet: loading it")
            started = time.monotonic()
            target.deploy(self._version(champion), self.fence)
            say(f"  v{champion} is warm after {time.monotonic() - started:.1f} s")
        self._route()

    def _route(self) -> None:
        """The champion answers where nothing is routed yet, and the version before it where the champion fails;
        whatever else is asked of the traffic stays.
        """
        now = self.target.traffic(self.model)
        assert self.champion is not None
        traffic = Traffic(self.model, self.champion) if now is None else now
        spare = self.previous if self.previous in self.target.deployed(self.model) else None
        # What was rolled back answers nobody, not even where the champion fails.
        if traffic.fallback is None and traffic.challenger is None and spare not in {self.champion, *self.blamed}:
            traffic = dataclasses.replace(traffic, fallback=spare)
        if traffic != now:
            self.target.route(traffic, self.fence)
            fallback = f", and where it fails v{traffic.fallback}" if traffic.fallback else ""
            say(f"v{self.champion} answers every live request{fallback}")

    def needed(self) -> set[str]:
        """The deployed versions that stay whatever the pool: they serve, did before, or wait for a person."""
        traffic, there = self.target.traffic(self.model), self.target.deployed(self.model)
        named = {self.champion, self.previous, self.waiting, *(traffic.live if traffic else ())}
        return {one for one in named if one is not None and one in there}

    def fill(self, versions: Collection[str]) -> None:
        """Load until enough are warm, or none is left that can be."""
        mine = [self.champion, self.previous]
        bad = {number: why for number, why in self.blamed.items() if number not in mine}
        ranked = order([*mine, self.challenger], versions, bad)
        self.pool = self.needed()
        while wanted := self._next(ranked):
            safe = [version for number in wanted if (version := self._safe(number)) is not None]
            there = self.target.deployed(self.model)
            for version in safe:
                if version.number not in there:
                    say(f"loading {self.model} v{version.number}")
            for number, seconds, error in self._load(safe):
                if error is None:
                    self.pool.add(number)
                    say(f"  v{number} is warm" + (" already" if number in there else f" after {seconds:.1f} s"))
                else:
                    self._leave_out(number, _reason(error))
        for number, why in bad.items() if self._room() else ():
            self._leave_out(number, f"it was {why}")
        if self.previous in self.pool:
            self._route()

    def _room(self) -> int:
        return max(0, self.warm - len(self.pool))

    def _next(self, ranked: list[str]) -> list[str]:
        todo = [one for one in ranked if one not in self.pool and one not in self.left_out]
        room = self._room()
        # The way back comes before all else that is asked for.
        return todo[: room or int(self.warm > 0 and self.previous is not None and self.previous in todo[:1])]

    def _safe(self, number: str) -> Version | None:
        """The version, unless it is not to be had, or loading it would run code that nobody reviewed: no gate may have
        seen it yet.
        """
        try:
            version = self._version(number)
        except Exception as error:
            if registry.unreachable(error):
                raise
            self._leave_out(number, " ".join(str(error).split()))
            return None
        if number in (self.champion, self.previous) or number in self.target.deployed(self.model):
            return version
        if registry.find(self.model, number).tags.get(registry.TAG + "phase") == "promoted":
            return version
        from validations.integrity import scan

        if found := scan(version.path).unsafe:
            self._leave_out(number, f"{found[0].path} {found[0].reason}; a promotion whose policy trusts it loads it")
            return None
        return version

    def _load(self, versions: list[Version]) -> Iterator[tuple[str, float, TargetError | None]]:
        """Deploy `versions` at the same time; each with its seconds, or with what speaks against it."""

        def deploy(version: Version) -> tuple[str, float, TargetError | None]:
            started = time.monotonic()
            try:
                self.target.deploy(version, self.fence)
            except StaleFence:
                raise
            except TargetError as error:
                return version.number, 0.0, error
            return version.number, time.monotonic() - started, None

        crew = ThreadPoolExecutor(AT_ONCE)
        try:
            for done in as_completed([crew.submit(deploy, version) for version in versions]):
                yield done.result()
        except KeyboardInterrupt:
            say("  interrupted: what was being loaded is taken down again, which takes some seconds")
            raise
        finally:
            # The lease is given back, and a deployment under its fence ends and cleans up after itself.
            crew.shutdown(wait=False, cancel_futures=True)

    def _version(self, number: str) -> Version:
        registered = registry.find(self.model, number)
        path, recorded, found = registry.admitted(registered, self.settings.home)
        if found != recorded:
            raise Mistake(
                f"{self.model} v{number} is not what was registered: its artifact's digest is {found}, recorded "
                f"was {recorded}"
            )
        return Version(self.model, number, path, recorded, self.settings.env_manager, dict(registered.tags))

    def _leave_out(self, number: str, why: str) -> None:
        self.left_out[number] = why
        say(f"  v{number} is left out: {why}")

    def trim(self) -> None:
        """Take down what is deployed and neither needed nor part of the pool."""
        stay = self.needed() | self.pool
        for number in sorted(set(self.target.deployed(self.model)) - stay, key=int):
            self.target.retire(self.model, number, self.fence)
            say(f"  v{number} was taken down")


def _reason(error: TargetError) -> str:
    log = error.log.splitlines() if isinstance(error, NeverReady) else []
    last = [line.strip() for line in log if line.strip() and not line.endswith("see above")]
    return f"{error}; its log says: {last[-1]}" if last else str(error)


def look(target: ServingTarget, model: str) -> dict[str, Any]:
    """What is deployed of `model` and what each version does: {"model", "gateway", "warm", "versions": [...]}.

    Raises `Mistake` where it is not served here.
    """
    if model not in target.models():
        there = ", ".join(target.models()) or "nothing yet"
        raise Mistake(
            f"{model} is not served here (served: {there}): promote a version of it, or `titleshot serve {model} "
            "--warm 1` serves the champion",
            code=2,
        )
    traffic, last, units = target.traffic(model), agreed(target, model), target.units(model)
    previous = last.previous if last else None
    rows = []
    for number in sorted(target.deployed(model), key=int, reverse=True):
        replicas = units.get(number, ())
        pid = replicas[0].pid if len(replicas) == 1 else 0
        rows.append(
            {
                "version": number,
                "role": ", ".join(_roles(traffic, previous, number)) or "warm",
                "state": ", ".join(dict.fromkeys(unit.state for unit in replicas)) or "GONE",
                "replicas": len(replicas),
                "pid": pid,
                "megabytes": _megabytes(pid),
            }
        )
    return {"model": model, "gateway": target.gateway(model), "warm": target.kept(model), "versions": rows}


def _roles(traffic: Traffic | None, previous: str | None, number: str) -> list[str]:
    roles = []
    if traffic is not None:
        shape = traffic.shape
        if number == traffic.champion:
            roles.append("champion")
        if number == traffic.challenger and traffic.weight:
            roles.append(f"challenger, answers {traffic.weight / 100:g}%")
        if number == traffic.challenger and traffic.mirror:
            roles.append(f"challenger, gets copies of {traffic.mirror / 100:g}%")
        if number in (traffic.fallback, shape.fallback):
            roles.append(f"answers where {said(traffic.champion)} fails")
        roles += [f"pinned for {p.match.header}: {p.match.value}" for p in shape.pins if p.version == number]
    if number == previous:
        roles.insert(0, "previous")
    return roles


def _megabytes(pid: int) -> int | None:
    """The memory that a process holds; None where this system does not say."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) // 1024
    return None


def summary(found: Mapping[str, Any]) -> str:
    """One sentence about a pool that `look` has found."""
    there, asked = len(found["versions"]), found["warm"]
    if not asked:
        return f"{there} loaded; no more than what serves and what served before is kept"
    short = "" if there >= asked else f": `titleshot serve {found['model']} --warm {asked}` loads more"
    return f"{there} loaded, {asked} are to be kept warm{short}"

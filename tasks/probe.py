"""Ask what serves now, as a client would: every deployed version its own stored example, through the gateway."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from deployments.target import Endpoint, ServingTarget, TargetError, Traffic
from tasks.progress import say
from tasks.registry import Registered, example_request, local_path
from tasks.settings import Mistake, Settings
from tasks.targets import PATIENCE
from tasks.targets import everywhere as places

REQUESTS = 5
TIMEOUT = 20.0
"""Seconds after which a request counts as not answered."""


@dataclass(frozen=True, slots=True)
class Probed:
    """What one version came to. `role` is champion, challenger, fallback or kept (nobody sends it live requests);
    `median_ms` and `slowest_ms` are of its answers, None where there were none; `why` is the first failure.
    """

    version: str
    role: str
    sent: int
    failed: int
    median_ms: float | None
    slowest_ms: float | None
    why: str = ""

    @property
    def silent(self) -> bool:
        """Whether it answered nothing at all."""
        return self.failed == self.sent


@dataclass(frozen=True, slots=True)
class Look:
    """One model: its versions, champion first, and what is not as it should be, in words."""

    model: str
    champion: str | None
    versions: Sequence[Probed]
    problems: Sequence[str]
    region: str = ""


def probe(
    settings: Settings,
    target: ServingTarget,
    model: str | None = None,
    *,
    requests: int = REQUESTS,
    slow_ms: float | None = None,
) -> list[Look]:
    """Probe `model`, or all that the target serves. Raises `Mistake` for a model that is not served.

    Each version gets `requests` requests, one after the other, on its own path through the gateway: its stored input
    example, or a question for its health where it has none. Asked by name they are no live traffic: no gate counts
    them, no copy of them goes to a shadow, no limit, pin or split is applied to them. So what is seen is that gateway
    and version answer, and how fast; not which version a client would have got, nor whether a fallback would have
    stepped in. `slow_ms` makes a slower median a problem. MLflow is not asked.
    """
    served = target.models()
    if model is not None and model not in served:
        raise Mistake(f"{model} is not served here: `titleshot status` lists what is", code=2)
    if requests < 1:
        raise Mistake(f"requests is {requests}: one at least", code=2)
    asked = served if model is None else (model,)
    return [_look(settings, target, name, requests, slow_ms) for name in asked]


def everywhere(
    settings: Settings, model: str | None = None, *, requests: int = REQUESTS, slow_ms: float | None = None
) -> list[Look]:
    """As `probe`, in every place where models are served: of one that does not answer that is the problem."""
    found, silent = list[Look](), list[Look]()
    for own, target in places(settings, patience=PATIENCE):
        name = own.region or ""
        try:
            if model is not None and model not in target.models():
                continue
            looks = probe(own, target, model, requests=requests, slow_ms=slow_ms)
        except TargetError as error:
            silent.append(Look(model or "", None, (), (str(error),), name))
            continue
        said = f" in {name}" if name else ""
        for one in looks:
            problems = [one.model + said + problem.removeprefix(one.model) for problem in one.problems]
            found.append(replace(one, problems=problems, region=name))
    if model is not None and not found and not silent:
        raise Mistake(f"{model} is not served here: `titleshot status` lists what is", code=2)
    return found + silent


def as_dict(looks: Sequence[Look]) -> dict[str, Any]:
    """The looks as they are returned and printed: {"models": [...], "problems": [...]}."""
    models = [
        {
            "model": look.model,
            "region": look.region,
            "champion": look.champion,
            "versions": [
                {
                    "version": one.version,
                    "role": one.role,
                    "sent": one.sent,
                    "failed": one.failed,
                    "median_ms": one.median_ms,
                    "slowest_ms": one.slowest_ms,
                    "why": one.why,
                }
                for one in look.versions
            ],
        }
        for look in looks
        if look.versions or not look.problems
    ]
    return {"models": models, "problems": [problem for look in looks for problem in look.problems]}


def _look(settings: Settings, target: ServingTarget, model: str, requests: int, slow_ms: float | None) -> Look:
    try:
        traffic, deployed = target.traffic(model), target.deployed(model)
    except TargetError as error:
        return Look(model, None, (), (f"{model}: {error}",))
    if traffic is None:
        return Look(model, None, (), ())  # its first champion is still to come
    found = [_ask(settings, one, _role(traffic, one.version), requests) for one in deployed.values()]
    found.sort(key=lambda one: (_ROLES.index(one.role), one.version))
    # Promotions go on meanwhile: what was taken down between our two looks did not fail.
    now, left = _again(target, model, traffic)
    found = [one for one in found if not one.failed or one.version in left]
    problems = [problem for one in found if (problem := _problem(model, one, slow_ms))]
    if now is not None and now.champion not in left:
        problems.insert(0, f"{model}: its champion v{now.champion} is not deployed")
    for one in found:
        fast = "" if one.median_ms is None else f", median {one.median_ms:.0f} ms, slowest {one.slowest_ms:.0f} ms"
        say(f"{model} v{one.version} ({one.role}): {one.sent - one.failed} of {one.sent} answered{fast}")
    return Look(model, traffic.champion, found, problems)


_ROLES = ("champion", "challenger", "fallback", "kept")


def _role(traffic: Traffic, version: str) -> str:
    if version == traffic.champion:
        return "champion"
    if version == traffic.challenger:
        return "challenger"
    return "fallback" if version in traffic.live else "kept"


def _again(target: ServingTarget, model: str, before: Traffic) -> tuple[Traffic | None, frozenset[str]]:
    try:
        return target.traffic(model), frozenset(target.deployed(model))
    except TargetError:
        return before, frozenset(before.live)


def _ask(settings: Settings, endpoint: Endpoint, role: str, requests: int) -> Probed:
    body = example_request(local_path(Registered(endpoint.model, endpoint.version, None, {}), settings.home))
    took, why = list[float](), ""
    with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
        for _ in range(requests):
            began = time.perf_counter()
            try:
                if body is None:
                    answer = client.get(f"{endpoint.url}/ping")
                else:
                    json = {"content-type": "application/json"}
                    answer = client.post(f"{endpoint.url}/invocations", content=body, headers=json)
            except httpx.HTTPError as error:
                why = why or f"no answer ({error or type(error).__name__})"
                continue
            if answer.is_success:
                took.append((time.perf_counter() - began) * 1000)
            else:
                why = why or f"status {answer.status_code}"
    return Probed(
        endpoint.version,
        role,
        requests,
        requests - len(took),
        round(statistics.median(took), 1) if took else None,
        round(max(took), 1) if took else None,
        why,
    )


def _problem(model: str, one: Probed, slow_ms: float | None) -> str:
    name = f"{model}: its champion v{one.version}" if one.role == "champion" else f"{model} v{one.version} ({one.role})"
    if one.silent:
        return f"{name} does not answer: {one.why}"
    if one.failed:
        return f"{name} failed {one.failed} of {one.sent} requests: {one.why}"
    if slow_ms is not None and one.median_ms is not None and one.median_ms > slow_ms:
        return f"{name} is slow: median {one.median_ms:.0f} ms, more than {slow_ms:g} ms"
    return ""

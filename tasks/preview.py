"""What a promotion would create and change, step by step, at the target and in the registry; nothing is touched."""

import difflib
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.artifact import digest as digest_of
from deployments.target import Change, Fence, ServingTarget, Traffic
from tasks import pool, registry
from tasks.context import Contender, Context
from tasks.journal import opened
from tasks.settings import Settings
from tasks.status import said
from validations.gates import Canary, Shadow, Watch
from validations.policy import Policy


@dataclass(frozen=True, slots=True)
class Preview:
    """What would happen: by step, what is made or changed; and what speaks against beginning at all, in sentences."""

    model: str
    champion: str | None
    challenger: str
    steps: Sequence[tuple[str, Sequence[Change]]]
    against: Sequence[str]


def routes(context: Context) -> Iterator[tuple[str, Traffic]]:
    """The traffic of every step of the policy that moves some, in order, where all steps pass."""
    policy, old, new = context.policy, context.champion, context.challenger.number
    assert policy is not None
    for step in policy.plan(first=old is None):
        gate = None if step.gate is None else policy.gates[step.gate]
        if step.kind == "promote":
            yield step.name, context.traffic(new)
        if old is None:
            continue
        if isinstance(gate, Shadow):
            yield step.name, context.traffic(old.number, new, mirror=round(gate.mirror * 100))
        elif isinstance(gate, Canary) and step.weight is not None:
            yield step.name, context.traffic(old.number, new, weight=round(step.weight * 100))
        elif isinstance(gate, Watch) and gate.holdback:
            yield step.name, context.traffic(new, old.number, weight=round(gate.holdback * 100))


def unable(context: Context) -> list[str]:
    """What the target is not able to do of what the policy asks for, in sentences."""
    found = (words for _, traffic in routes(context) for words in context.target.cannot(traffic))
    return list(dict.fromkeys(found))


def preview(
    settings: Settings, target: ServingTarget, policy: Policy, base: Path, version: registry.Registered
) -> Preview:
    """What promoting `version` by `policy` would do now. Its artifact is fetched into a temporary folder that is gone
    when this returns. Raises `TargetError` where the target cannot be asked.
    """
    model = version.model
    champion, previous = registry.aliased(model, registry.CHAMPION), registry.aliased(model, registry.PREVIOUS)
    with tempfile.TemporaryDirectory() as folder:
        path = registry.download(version, Path(folder) / secrets.token_hex(4))
        digest = digest_of(path)
        recorded = version.tags.get(registry.TAG + "digest", digest)
        context = Context(
            id="dry run",
            model=model,
            settings=settings,
            target=target,
            fence=Fence(model, "dry run", 0),
            base=base,
            folder=Path(folder),
            champion=None if champion is None else Contender(registry.find(model, champion), path, "", ""),
            challenger=Contender(version, path, digest, digest),
            previous=previous,
            blamed=frozenset(pool.blamed(model)),
            policy=policy,
        )
        traffic = target.traffic(model)
        if traffic is not None:
            context.shape = traffic.shape
        moves = list(routes(context))
        found = target.changes(context.challenger.version(settings.env_manager), [to for _, to in moves])
        # Where it would be, and not where it is for this moment.
        kept = str(registry.local_path(version, settings.home))
        found = tuple(tuple(_placed(one, str(path.resolve()), kept) for one in changes) for changes in found)
        against = [*_against(context, traffic, recorded), *unable(context)]
    steps = [("deploy", found[0]), *((name, changes) for (name, _), changes in zip(moves, found[1:], strict=True))]
    return Preview(model, champion, version.number, [*steps, ("registry", _aliases(context))], against)


def _placed(change: Change, here: str, there: str) -> Change:
    return Change(change.what, change.before, change.after.replace(here, there))


def _against(context: Context, traffic: Traffic | None, recorded: str) -> Iterator[str]:
    model, challenger = context.model, context.challenger
    if recorded != challenger.digest:
        yield (
            f"v{challenger.number} is not what was admitted: its digest is {challenger.digest}, recorded was {recorded}"
        )
    if reason := registry.quarantined(model, challenger.digest):
        yield f"v{challenger.number} is quarantined, its artifact unchanged: {reason}"
    if (left := opened(context.target, model)) is not None:
        yield f"{left.id} is under way, or was left behind"
    holder = context.target.holder(model)
    if holder is not None and holder.left > 0:
        yield f"{holder.name} holds the lease"
    champion = context.champion.number if context.champion else None
    if traffic is not None and traffic.champion != champion:
        yield f"the gateway serves {said(traffic.champion)} and the alias champion names {said(champion)}"


def _aliases(context: Context) -> list[Change]:
    """What moves in the registry after the cut-over."""
    model, new = context.model, context.challenger.number
    old = context.champion.number if context.champion else None
    challenger = registry.aliased(model, registry.CHALLENGER)
    moves = (
        (registry.CHAMPION, old, new),
        (registry.PREVIOUS, context.previous, old),
        (registry.CHALLENGER, challenger, None if challenger == new else challenger),
    )
    texts = ((alias, *(f"v{one}\n" if one else "" for one in numbers)) for alias, *numbers in moves)
    return [Change(f"alias {alias}", before, after) for alias, before, after in texts if before != after]


def as_json(found: Preview) -> Mapping[str, Any]:
    """A preview as data: {"model", "champion", "challenger", "against", "steps": [{"step", "changes": [...]}]}."""
    return {
        "model": found.model,
        "champion": found.champion,
        "challenger": found.challenger,
        "against": [*found.against],
        "steps": [
            {
                "step": step,
                "changes": [{"what": one.what, "before": one.before, "after": one.after} for one in changes],
            }
            for step, changes in found.steps
        ],
    }


def difference(change: Change) -> list[str]:
    """One change as lines of a unified diff, without its head; of what is new or gone, or has one line, all lines."""
    before, after = change.before.splitlines(), change.after.splitlines()
    lines = list(difflib.unified_diff(before, after, lineterm="", n=2))[2:]
    return lines if min(len(before), len(after)) > 1 else lines[1:]

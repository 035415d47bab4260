"""What a hand in the MLflow UI has moved: alias and stage beside traffic and journal, in words, and set back.

Light: what people read is read by MLflow's REST API; only what changes something needs MLflow's client.
"""

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deployments.target import Fence, ServingTarget, Traffic
from tasks import registry, registry_rest
from tasks.journal import agreed, opened
from tasks.policies import Own, policy_of
from tasks.registry import CHALLENGER, CHAMPION, PREVIOUS, STAGE
from tasks.settings import Mistake, Settings, region

PAUSE = 600.0
"""Seconds after which a version that could not be followed is tried again, as long as the alias names it."""


def said(number: str | None) -> str:
    """A version number as people read it."""
    return f"v{number}" if number else "nothing"


def sides(alias: str | None, journal: str | None, serving: str | None) -> str:
    """Who sees what, in words."""
    return (
        f"the gateway serves {said(serving)}, the alias champion names {said(alias)}, the journal says {said(journal)}"
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """What gateway, journal and registry say of one model.

    `journal` is who serves by the journal, `previous` who did before; `ended` whether a promotion has ended here, so
    that stages are ours. `stages` has every version; empty where the registry has no stages any more. `promoting`
    asks for the champion's place, in the promotion `promotion`, which waits for a person or a time.
    """

    model: str
    serving: str | None
    journal: str | None
    previous: str | None
    ended: bool
    aliases: Mapping[str, str]
    stages: Mapping[str, str]
    promoting: str | None = None
    promotion: str = ""

    @property
    def alias(self) -> str | None:
        """Which version the alias champion names."""
        return self.aliases.get(CHAMPION)

    @property
    def moved_to(self) -> str | None:
        """Where a hand has moved the alias champion to, while gateway and journal agree, and nothing is under way."""
        moved = self.serving is not None and self.journal == self.serving != self.alias
        return self.alias if moved and not self.promotion else None

    @property
    def settled(self) -> bool:
        """Whether it is clear who serves and did before, so that stages and the other aliases have to follow."""
        return self.ended and self.serving is not None and self.serving == self.journal

    @property
    def demoted(self) -> bool:
        """Whether the version that serves is in another stage than a champion's."""
        return self.settled and self.stages.get(self.serving or "", STAGE[CHAMPION]) != STAGE[CHAMPION]

    @property
    def pretenders(self) -> list[str]:
        """The versions in a champion's stage that do not serve."""
        there = [number for number, stage in self.stages.items() if stage == STAGE[CHAMPION] and number != self.serving]
        return sorted(there, key=int) if self.settled else []

    @property
    def misnamed(self) -> bool:
        """Whether the alias previous does not name who served before, where the registry still has that version."""
        known = self.previous in self.stages and self.previous != self.serving
        return self.settled and known and self.aliases.get(PREVIOUS) != self.previous

    @property
    def challenged(self) -> bool:
        """Whether the alias challenger does not name what is being promoted."""
        return self.promoting is not None and self.aliases.get(CHALLENGER) != self.promoting


def facts(settings: Settings, target: ServingTarget, model: str, traffic: Traffic | None) -> Facts:
    """What is said of `model` now. Raises what `tasks.registry_rest` raises."""
    serving, left, last = traffic.champion if traffic else None, opened(target, model), agreed(target, model)
    waiting = left.promotion if left is not None and left.waiting else None
    aliases, stages = _registry(settings, model)
    champion, previous = (last.champion, last.previous) if last else (serving, None)
    if left is not None and waiting is not None and (last is None or last.at < left.began):
        # A rollback while it waits ends after it began.
        champion, previous = waiting.champion, left.previous
    promoting = waiting.challenger if waiting else None
    if waiting is not None and waiting.stopped_by is None and any(one.step == "promote" for one in waiting.verdicts):
        # It waits with the watch to come: the challenger is champion by now.
        champion, previous, promoting = promoting, waiting.champion, None
    return Facts(
        model,
        serving,
        champion,
        previous,
        last is not None and last.phase != "degraded",
        aliases,
        stages,
        promoting,
        left.id if left and waiting else "",
    )


def _registry(settings: Settings, model: str) -> tuple[dict[str, str], dict[str, str]]:
    """Every alias of a model and every version's stage; a model that the registry has not has neither."""
    try:
        found = registry_rest.get(settings, "registered-models/get", {"name": model})["registered_model"]
    except registry_rest.Refused as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}, {}
    named = {str(one["alias"]): str(one["version"]) for one in found.get("aliases") or ()}
    usual = {alias: named.get(registry.regional(alias)) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    aliases = {alias: number for alias, number in usual.items() if number is not None}
    if region():  # stages are not a region's
        return aliases, {}
    stages: dict[str, str] = {}
    asked = {"filter": f"name = '{model}'", "max_results": 1000}
    while True:
        page = registry_rest.get(settings, "model-versions/search", asked)
        versions = page.get("model_versions") or ()
        stages.update({str(one["version"]): str(one["current_stage"]) for one in versions if "current_stage" in one})
        if not page.get("next_page_token"):
            return aliases, stages
        asked["page_token"] = page["next_page_token"]


def disagreements(found: Facts, follows: str = "", refused: str = "") -> list[str]:
    """What a hand has moved, in words: what, who sees what, and how to mend it. Empty where all agree.

    `follows` is the policy that lets traffic follow the alias (empty: none does); `refused` why it did not.
    """
    told = [one for one in (_champion(found, follows, refused), _stages(found)) if one]
    if found.misnamed:
        told.append(
            f"the alias previous of {found.model} was moved by hand: it names {said(found.aliases.get(PREVIOUS))}, and "
            f"the journal says that {said(found.previous)} served before: `titleshot doctor --mend` sets it back"
        )
    if found.challenged:
        named = found.aliases.get(CHALLENGER)
        later = f"; {said(named)} may be promoted when that has ended" if named else ""
        told.append(
            f"the alias challenger of {found.model} was moved by hand: it names {said(named)}, and "
            f"{said(found.promoting)} is being promoted ({found.promotion}){later}: `titleshot doctor --mend` sets it "
            "back"
        )
    return told


def _champion(found: Facts, follows: str, refused: str) -> str:
    model, alias, serving = found.model, found.alias, found.serving
    who = sides(alias, found.journal, serving)
    if alias == found.journal == serving:
        return ""
    if serving is None or found.journal != serving:
        return f"{who}: `titleshot doctor --mend` brings them together"
    back = f"`titleshot doctor --mend` lets it name {said(serving)} again"
    if alias is None:
        return f"the alias champion of {model} was removed by hand: {who}: {back}"
    if refused:
        more = f"{said(alias)} was not followed: {refused}"
    elif follows and found.promotion:
        more = f"traffic follows it, as {follows} says, when {found.promotion} has ended"
    elif follows:
        more = f"`titleshot watch` gives {said(alias)} all traffic, as {follows} says (`follow_alias`)"
    else:
        more = f"for {said(alias)} to serve, mend, then `titleshot promote {model} --version {alias}`"
    return f"the alias champion of {model} was moved by hand to {said(alias)}: {who}: {back}; {more}"


def _stages(found: Facts) -> str:
    what = [f"{said(number)} is in {STAGE[CHAMPION]} and does not serve" for number in found.pretenders]
    if found.demoted:
        stage = found.stages[found.serving or ""]
        what.insert(0, f"{said(found.serving)} serves and is in {stage}, not in {STAGE[CHAMPION]}")
    if not what:
        return ""
    return (
        f"the stages of {found.model} were changed by hand: {', '.join(what)}: a stage moves no traffic; "
        "`titleshot doctor --mend` sets them back"
    )


def restore(target: ServingTarget, fence: Fence, found: Facts) -> list[str]:
    """Set stages and the aliases previous and challenger back to what `found` has by traffic and journal; returns what
    was done, in words.
    """
    model, done = found.model, []
    if found.demoted and found.alias == found.serving:
        _name(target, fence, CHAMPION, found)
        done.append(f"{model} {said(found.serving)}, which serves, is in {STAGE[CHAMPION]} again")
    if found.misnamed:
        _name(target, fence, PREVIOUS, found)
        done.append(f"the alias previous of {model} names {said(found.previous)} again, which served before")
    if found.challenged:
        _name(target, fence, CHALLENGER, found)
        done.append(f"the alias challenger of {model} names {said(found.promoting)} again, which is being promoted")
    # Last: a version gets the stage of the alias that it has by now.
    for number in found.pretenders:
        if number == found.promoting:
            _name(target, fence, CHALLENGER, found)
        else:
            registry.unstage(model, number, target.guard(fence))
        done.append(f"{model} v{number} is in {STAGE[CHAMPION]} no more: it does not serve")
    return done


def _name(target: ServingTarget, fence: Fence, alias: str, found: Facts) -> None:
    number = {CHAMPION: found.serving, PREVIOUS: found.previous, CHALLENGER: found.promoting}[alias]
    of: Collection[str | None] = (found.aliases.get(alias), number)
    registry.move(found.model, alias, number, of=of, guard=target.guard(fence))


def followed_by(settings: Settings, model: str) -> Own | None:
    """The policy that lets traffic follow a hand's move of the alias champion; None where none does."""
    try:
        own = policy_of(settings, model)
    except Mistake:  # told by whoever looks for what is to be promoted
        return None
    return own if own is not None and own[2].follow_alias else None


def refuse(settings: Settings, model: str, number: str, why: str) -> None:
    """Remember that traffic could not follow the alias to this version, for whoever looks next."""
    path = _refusal(settings, model, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(why)


def refused(settings: Settings, model: str, number: str) -> str:
    """Why traffic did not follow the alias to this version a short while ago; empty where it may be tried."""
    path = _refusal(settings, model, number)
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime < PAUSE:
            return path.read_text()
    return ""


def forget(settings: Settings, model: str) -> None:
    """The alias names what serves: whatever was refused may be asked for again."""
    for path in _refusal(settings, model, "0").parent.glob("*"):
        path.unlink(missing_ok=True)


def _refusal(settings: Settings, model: str, number: str) -> Path:
    return settings.home / "run" / "follow" / model / number

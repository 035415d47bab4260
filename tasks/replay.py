"""Past promotions judged again from the evidence that their runs keep."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tasks import history
from tasks.settings import Mistake
from validations.policy import Policy
from validations.promotion import Promotion
from validations.replay import Replayed, different, replay


@dataclass(frozen=True, slots=True)
class Again:
    """One promotion judged again. `changed` are steps whose verdict is not the recorded one to the bit (own policy),
    `otherwise` whether it would have ended differently (another policy).
    """

    id: str
    was: str
    replayed: Replayed
    changed: tuple[str, ...]
    otherwise: bool


def again(name: str, policy: Policy | None, since: timedelta) -> list[Again]:
    """Judge the promotion called `name` again, or those of the model of that name that began within `since`.

    Raises `Mistake` where there is none, or where the policy is another model's.
    """
    found = [entry for entry in history.entries(name) if entry.kind == "promotion"]
    if found:
        oldest = datetime.now(UTC) - since
        found = [entry for entry in found if entry.started >= oldest and entry.phase not in ("running", "interrupted")]
        if not found:
            raise Mistake(f"{name} has no finished promotions in the last {since.days} days: name more with --days")
    else:
        found = [history.entry(name)]
        if found[0].kind != "promotion":
            raise Mistake(f"{name} is a rollback by hand: there are no verdicts to reach again", code=2)
    if policy is not None and policy.model != found[0].model:
        raise Mistake(f"the policy is for {policy.model}, and {name} is about {found[0].model}", code=2)
    return [_again(entry, policy) for entry in found]


def _again(entry: history.Entry, policy: Policy | None) -> Again:
    promotion = history.stored(entry.run_id)
    replayed = replay(promotion, history.evidence(entry.run_id, promotion), policy)
    was = _ended(promotion)
    return Again(
        id=entry.id,
        was=was,
        replayed=replayed,
        changed=tuple(different(promotion, replayed)) if policy is None else (),
        otherwise=replayed.ended != was,
    )


def _ended(promotion: Promotion) -> str:
    stopped = promotion.stopped_by
    return "promoted" if stopped is None else f"{stopped.outcome.value} at {stopped.step}"

"""One promotion: what it begins with, and its way through the gates, in as many processes as it takes."""

import secrets
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import BeforeValidator

from deployments.target import LeaseHeld, ServingTarget
from flows import approval, prepare, recover, regions
from flows.approval import Awaiting, Given, Held
from flows.drive import carry, flow_run_tags, outcome
from tasks import approve, history, pool, preview, registry, triggers
from tasks.agreement import leased, leased_soon
from tasks.clusters import clusters
from tasks.context import Contender, Context
from tasks.journal import Open, opened
from tasks.policies import policy_of, read_policy
from tasks.progress import listening, say
from tasks.settings import Mistake, Settings, region, within
from tasks.settings import load as load_settings
from tasks.targets import choose, settings_target
from validations.policy import Policy, read
from validations.promotion import Promotion
from validations.waves import Place, Waves

Trigger = Literal["hand", "event", "poll", "schedule"]
Text = Annotated[str, BeforeValidator(lambda given: "" if given is None else str(given))]
"""A field that may be left empty: one text field in the Prefect UI, where an optional one makes tabs."""
PATIENCE = 90.0
"""Seconds that a run which nobody waits for gives MLflow to come back."""
NOT_BEGUN = "Not begun"
"""What a run came to that was started by itself and had nothing to do."""


class Busy(Exception):
    """Another promotion of this model is under way."""


@dataclass(frozen=True, slots=True)
class Asks:
    """What a run is asked for: the parameters of `promote`."""

    model: str
    policy: Path | None = None
    version: str | None = None
    requester: str = ""
    again: bool = False
    anew: bool = False
    trigger: Trigger = "hand"
    promotion: str | None = None
    further: bool = False
    """Whether it is a further region's, where only some gates are repeated."""
    elsewhere: tuple[str, ...] = ()
    """The other regions that it goes through."""
    text: str = ""
    """The policy as it was when a promotion began that waits in a region; `policy` then says where its paths begin."""


def _run_name() -> str:
    asked = flow_run.parameters
    version = asked.get("version")
    return f"promote {asked['model']}" + (f" v{version}" if version else "")


@flow(
    name="promote",
    flow_run_name=_run_name,
    persist_result=False,
    retries=0,
    on_cancellation=[recover.soon],
)
def promote(
    model: str,
    policy: Text = "",
    version: Text = "",
    requester: Text = "",
    again: bool = False,  # noqa: FBT001, FBT002 - a form's field
    anew: bool = False,  # noqa: FBT001, FBT002
    trigger: Trigger = "hand",
    promotion: Text = "",
) -> dict[str, Any]:
    """Take a challenger of `model` through the gates of a policy, to the champion's place or back.

    Where the policy asks for people the run is suspended: press Resume and fill in the form. A rejected challenger is a
    completed run whose result says so; a failed run means that this program or its platform is broken, or that it was
    asked for something it cannot do. A run that was ended goes on with its promotion when it is retried.

    Args:
        model: Name of the registered model.
        policy: Path of the policy file, where the worker runs; the model's own in the policy folder otherwise.
        version: Version number; the version with the alias challenger otherwise.
        requester: Who asks for it: with four eyes, somebody else must approve.
        again: Admit a version that was rejected before, unchanged.
        anew: Forget what was observed of this very artifact before; it goes on counting otherwise.
        trigger: What started it. Whatever is not started by hand does nothing for a version that was handled before.
        promotion: Go on with this promotion, which waits; leave it empty.
    """
    logger = get_run_logger()
    asks = Asks(
        model,
        Path(policy) if policy else None,
        version or None,
        requester,
        again=again,
        anew=anew,
        trigger=trigger,
        promotion=promotion or None,
    )
    with listening(logger.info):
        try:
            result, name = run(asks), NOT_BEGUN
        except Busy as busy:
            result, name = _nothing(asks, str(busy)), triggers.LATER
    if result["phase"] != NOT_BEGUN:
        return result
    # Prefect takes a state as well, and its data for the result.
    return cast("dict[str, Any]", Completed(name=name, message=result["why"], data=result))


def run(asks: Asks) -> dict[str, Any]:
    """One promotion, inside a flow run: from its beginning, or from where it waited or was left.

    Returns the summary that `flows.drive.outcome` describes; of one that waits, `page` is where it goes on. Raises
    `Busy` where it was not started by hand and another promotion of the model is under way.
    """
    settings = load_settings()
    _connect(settings, 0 if asks.trigger == "hand" and asks.promotion is None else PATIENCE)
    return _here(settings, asks) if region() else _everywhere(settings, asks)


def _everywhere(settings: Settings, asks: Asks) -> dict[str, Any]:
    """Where the model is served, be it one place or one region after the other."""
    asks = _as_asked(settings, asks)
    waves = _policy(settings, asks)[2].target if asks.policy or asks.promotion is None else _waves(settings, asks.model)
    if not isinstance(waves, Waves):
        return _here(settings, asks)
    if asks.trigger != "hand" and (asks.version or registry.aliased(asks.model, registry.CHALLENGER)) is None:
        return _nothing(asks, "there is no challenger")
    number, begun = _challenger(asks.model, asks.version, None).number, False

    def one(further: bool, others: tuple[str, ...]) -> dict[str, Any]:  # noqa: FBT001 - the first thing that it is told
        nonlocal begun
        own = load_settings()
        left = opened(settings_target(own), asks.model)
        mine = asks.promotion if left is not None and left.id == asks.promotion else None
        # Once one region has it, that another cannot begin must be seen.
        trigger: Trigger = "hand" if begun else asks.trigger
        here = replace(asks, version=number, promotion=mine, further=further, elsewhere=others, trigger=trigger)
        result, begun = _here(own, here), True
        return result

    return regions.promote(waves, asks.model, number, one)


def _as_asked(settings: Settings, asks: Asks) -> Asks:
    """Of a run that goes on with a promotion which waits in a region, or with what it has begun in a further one since:
    what that was asked for, with which the regions to come go on too.
    """
    first = "" if asks.promotion is None else history.entry(asks.promotion).region
    me = str(approval.own_run() or "")
    for name in dict.fromkeys([first, *(one.name for one in clusters(settings) if one.region)]) if first else ():
        with within(name):
            left = opened(settings_target(load_settings()), asks.model)
        if left is None or left.promotion is None or (left.id != asks.promotion and left.flow_run != (me or None)):
            continue
        asks = replace(asks, policy=Path(left.base, "policy.yaml"), text=left.policy_text, promotion=left.id)
        return replace(asks, version=left.promotion.challenger, requester=left.requester)
    return asks


def _waves(settings: Settings, model: str) -> Place | Waves:
    own = policy_of(settings, model)
    return own[2].target if own else "local"


def _here(settings: Settings, asks: Asks) -> dict[str, Any]:
    target = settings_target(settings)
    mine = asks.promotion or _mine(target, asks.model)
    given: Given | None = None
    while True:
        try:
            if mine is None:
                return _begin(settings, target, asks)
            return _go_on(settings, target, asks.model, mine, given)
        except Held as held:
            page = approval.hand_over(settings, held, at=held.until)
            say(f"{held.promotion.id}: {held}")
            return {**outcome(held.promotion), "why": str(held), "page": page}
        except Awaiting as waiting:
            mine = waiting.promotion.id
            if not approval.can_suspend():
                page = approval.hand_over(settings, waiting)
                say(f"{mine}: {waiting}: {page}")
                return {**outcome(waiting.promotion), "why": str(waiting), "page": page}
            given = approval.wait_for_form(settings, waiting)


def dry_run(asks: Asks) -> dict[str, preview.Preview]:
    """What a promotion that is asked for so would create and change, by region ("" for the one place); nothing is
    touched. Raises `Mistake` as `run`.
    """
    settings = load_settings()
    settings.connect(needed=("MLflow",))
    waves = _policy(settings, asks)[2].target
    found = {}
    for index, name in enumerate([""] if region() or not isinstance(waves, Waves) else waves.regions):
        with within(name or region()):
            own, here = load_settings(), replace(asks, further=index > 0)
            target, (policy_file, _, policy) = settings_target(own), _policy(own, here)
            choose(target, asks.model, policy.place)
            registered = _challenger(asks.model, asks.version, registry.aliased(asks.model, registry.CHAMPION))
            found[name] = preview.preview(own, target, policy, policy_file.resolve().parent, registered)
    return found


def _connect(settings: Settings, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            return settings.connect(needed=("MLflow",))
        except Mistake:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def _mine(target: ServingTarget, model: str) -> str | None:
    """The promotion that this flow run began when it ran before; None where it began none."""
    me = approval.own_run()
    if me is None:
        return None
    left = opened(target, model)
    if left is not None and left.promotion is not None and left.flow_run == str(me):
        return left.id
    ended = history.of_flow_run(model, str(me))
    return None if ended is None else ended.id


def _begin(settings: Settings, target: ServingTarget, asks: Asks) -> dict[str, Any]:
    model, by_itself = asks.model, asks.trigger != "hand"
    policy_file, text, policy = _policy(settings, asks)
    choose(target, model, policy.place)
    reigns = registry.aliased(model, registry.CHAMPION)
    if by_itself and (asks.version or registry.aliased(model, registry.CHALLENGER)) in (None, reigns):
        return _nothing(asks, f"there is no challenger: v{reigns} is champion" if reigns else "there is no challenger")
    registered = _challenger(model, asks.version, reigns)
    at = f"{region()}-{datetime.now(UTC):%Y%m%d-%H%M%S}".lstrip("-")
    identifier = f"{model}-v{registered.number}-{at}-{secrets.token_hex(2)}"
    try:
        with leased(target, model, identifier) as fence:
            recover.finish(settings, target, model, fence)
            _refuse_busy(target, model, asks.elsewhere)
            champion = registry.aliased(model, registry.CHAMPION)
            # Another promotion may have ended since we looked.
            registered = _challenger(model, registered.number, champion)
            challenger = prepare.contender(registered, settings)
            before = by_itself and triggers.handled(model, challenger.number, challenger.digest, target)
            if before and not asks.further:  # what asked for the first region asked for all of them
                say(f"{registered.name}: {before}")
                return _nothing(asks, before)
            if not asks.again and (why := _quarantined(challenger)):
                if by_itself:
                    return _nothing(asks, why)
                raise Mistake(f"{why}. Mend the model and register it anew, or insist with --again", code=3)
            context = prepare.context(
                settings,
                target,
                model,
                fence,
                identifier=identifier,
                policy=policy,
                base=policy_file.resolve().parent,
                champion=champion,
                challenger=challenger,
                anew=asks.anew,
            )
            _refuse_unable(context, policy_file)
            _settle(context)
            context.began = target.observe(model)
            promotion = Promotion(
                id=identifier,
                champion=champion,
                challenger=registered.number,
                digest=challenger.digest,
                policy=policy,
            )
            say(f"{identifier}: {registered.name} asks for the place of {_title(context)}")
            if context.series:
                say(f"  what was observed of it before goes on counting: {', '.join(context.series)}")
            requester = asks.requester or registry.requester(registered)
            tags = {**flow_run_tags(), "requester": requester, "trigger": asks.trigger}
            tags |= {"anew": "true"} if asks.anew else {}
            tags |= {"region": region()} if region() else {}
            return outcome(carry(context, promotion, text, tags, requester=requester))
    except (Busy, LeaseHeld) as busy:
        if by_itself:
            return _while_busy(target, asks, registered.number, busy)
        if isinstance(busy, LeaseHeld):
            raise
        raise Mistake(str(busy), code=1) from busy


def _refuse_unable(context: Context, policy_file: Path) -> None:
    if sentences := preview.unable(context):
        raise Mistake(f"{policy_file.name} asks for what its target cannot do: {'; '.join(sentences)}", code=2)


def _while_busy(target: ServingTarget, asks: Asks, number: str, busy: Exception) -> dict[str, Any]:
    """What becomes of a run that started by itself while another promotion of the model is under way: nothing where it
    is this version's own; else it raises `Busy`.
    """
    other = opened(target, asks.model)
    if other is None or other.promotion is None or other.promotion.challenger != number:
        raise Busy(str(busy)) from busy
    return _nothing(asks, f"{other.id} is {other.promotion.phase.value}")


def _go_on(
    settings: Settings,
    target: ServingTarget,
    model: str,
    name: str,
    given: Given | None,
) -> dict[str, Any]:
    """Go on with the promotion `name`, with the form that was `given` where there is one."""
    me = str(approval.own_run() or "")
    if (now := opened(target, model)) is None or now.id != name:
        return _ended(name)
    with leased_soon(target, model, f"{name} goes on ({secrets.token_hex(2)})") as fence:
        left = opened(target, model)
        if left is None or left.id != name or left.promotion is None:
            return _ended(name)
        context = prepare.resumed(settings, target, model, fence, left)
        if me and left.flow_run != me:
            context.journal.taken_up(me)
        if given is not None:
            left = _take(context, left, given)
        assert left.promotion is not None
        ended = _changed(left, context)
        say(f"{name} goes on")
        return outcome(carry(context, left.promotion, left.policy_text, left.tags or {}, left, ended, resuming=True))


def _take(context: Context, left: Open, given: Given) -> Open:
    now, asked = left.promotion, given.asked
    step = None if now is None else now.next_step()
    if now is None or step is None or step.name != asked.subject.step or left.asked != asked:
        return left  # it was decided otherwise while the form was filled in
    form = None if given.form is None else given.form.model_dump(exclude_none=True)
    ballot = approve.take(context, now, approve.gate_of(now, step), left, form, given.at)
    told = f"{ballot.decision} by {ballot.approver}, proven by {ballot.how}" if ballot.accepted else ballot.reason
    say(f"{left.id}: form {asked.round}: {told if ballot.accepted else f'refused: {told}'}")
    again = opened(context.target, context.model)
    assert again is not None
    return again


def _changed(left: Open, context: Context) -> str:
    """Why a promotion cannot go on as it began: another version is champion now. Empty where it can."""
    now = left.promotion
    if now is None or (context.champion.number if context.champion else None) == now.champion:
        return ""
    return f"the champion changed from v{now.champion} to {_title(context)} while this promotion waited"


def _ended(name: str) -> dict[str, Any]:
    say(f"{name} has ended: nothing is done twice")
    return outcome(history.stored(history.entry(name).run_id))


def _refuse_busy(target: ServingTarget, model: str, elsewhere: tuple[str, ...]) -> None:
    other = opened(target, model)
    if other is None:
        if busy := regions.busy(model, elsewhere):
            raise Busy(f"{busy}: one promotion of a model goes through its regions at a time")
        return
    what = f"{other.id} is {other.promotion.phase.value}" if other.promotion else f"{other.id} is under way"
    if other.held:
        what = f"{other.id} waits: {other.held}"
    raise Busy(f"{what}: decide that first (Resume its flow run in the Prefect UI, or cancel it)")


def _nothing(asks: Asks, why: str) -> dict[str, Any]:
    return {
        "promotion": "",
        "model": asks.model,
        "champion": None,
        "challenger": asks.version or "",
        "phase": NOT_BEGUN,
        "step": "",
        "outcome": "",
        "why": why,
    }


def _policy(settings: Settings, asks: Asks) -> tuple[Path, str, Policy]:
    if asks.policy is not None and asks.text:
        return asks.policy, asks.text, _part(read(asks.text, asks.policy.name), asks)
    found = policy_of(settings, asks.model)
    if asks.policy is not None:
        if found is not None and approval.can_suspend() and asks.policy.resolve() != found[0].resolve():
            # Who can ask Prefect for a run must not be able to choose a policy that asks nobody.
            raise Mistake(
                f"{asks.model} has a policy of its own, {found[0].name} in the policy folder: a worker takes no other",
                code=2,
            )
        text, policy = read_policy(asks.policy, asks.model)
        return asks.policy, text, _part(policy, asks)
    if found is None:
        raise Mistake(
            f"no file in {settings.policy_folder} is the policy of {asks.model}: put it there, or name one with "
            "--policy",
            code=2,
        )
    return found[0], found[1], _part(found[2], asks)


def _part(policy: Policy, asks: Asks) -> Policy:
    """What of a policy is asked here: within a region, that region's part."""
    return policy.in_region(further=asks.further) if region() else policy


def _challenger(model: str, version: str | None, champion: str | None) -> registry.Registered:
    known = registry.versions(model)
    number = version or registry.aliased(model, registry.CHALLENGER)
    if number is None:
        hint = f"it has {', '.join(known)}" if known else "it has none"
        raise Mistake(
            f"which version of {model}? name one with --version, or set the alias challenger ({hint})", code=2
        )
    found = registry.find(model, number)
    if number == champion:
        raise Mistake(f"{found.name} is the champion already: there is nothing to promote", code=2)
    return found


def _quarantined(challenger: Contender) -> str:
    """Why this artifact is refused; empty where it is not."""
    reason = registry.quarantined(challenger.registered.model, challenger.digest)
    return f"{challenger.registered.name} is quarantined, its artifact unchanged: {reason}" if reason else ""


def _settle(context: Context) -> None:
    """Start from agreement: the champion alone serves, and nothing is deployed that nobody needs."""
    model, target = context.model, context.target
    traffic = target.traffic(model)
    if context.champion is None:
        return
    number = context.champion.number
    if traffic is None:
        say(f"{context.champion.registered.name} is the champion and is not served here yet: serving it")
        target.deploy(context.champion.version(context.settings.env_manager), context.fence)
        registry.move(model, registry.CHAMPION, number, of=(number,), guard=context.guard())  # and its stage
    elif traffic.champion != number:
        raise Mistake(
            f"the gateway serves {model} v{traffic.champion} and the alias champion names v{number}: "
            "set the alias, in the MLflow UI, to the version that serves, or `titleshot doctor --mend`"
        )
    else:
        context.shape = traffic.shape
    asked = context.policy.traffic.numbers if context.policy and context.policy.traffic else frozenset()
    if missing := sorted(asked - {*target.deployed(model), context.challenger.number}):
        raise Mistake(
            f"the policy's `traffic` names v{', v'.join(missing)} of {model}, which is not deployed: keep it warm with "
            f"`titleshot serve {model} --warm N`, or take it out of the policy",
            code=2,
        )
    target.route(context.traffic(number), context.fence)
    now = target.traffic(model)
    keep = {number, context.previous, *(now.live if now else ())}
    for other in pool.spare(target, model, keep, context.blamed):
        if other != context.challenger.number:
            target.retire(model, other, context.fence)


def _title(context: Context) -> str:
    return context.champion.registered.name if context.champion else "a champion that is not there yet"

"""One promotion: what it begins with, and its way through the gates."""

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from flows import recover
from flows.drive import carry, flow_run_tags, outcome
from tasks import history, pool, registry
from tasks.agreement import leased
from tasks.context import Contender, Context
from tasks.policies import read_policy
from tasks.progress import listening, say
from tasks.settings import Mistake, Settings
from tasks.settings import load as load_settings
from tasks.stack import settings_target
from validations.ledger import Ledger, weights
from validations.policy import Policy
from validations.promotion import Promotion


def _run_name() -> str:
    asked = flow_run.parameters
    version = asked.get("version")
    return f"promote {asked['model']}" + (f" v{version}" if version else "")


@flow(name="promote", flow_run_name=_run_name, persist_result=False, retries=0)
def promote(
    model: str,
    policy: str,
    version: int | str | None = None,
    again: bool = False,  # noqa: FBT001, FBT002 - a form's field
    anew: bool = False,  # noqa: FBT001, FBT002
) -> dict[str, Any]:
    """Take a challenger of `model` through the gates of a policy, to the champion's place or back.

    `policy` is the path of the policy file; `version` a version number, or the alias `challenger` where
    it is left out; `again` admits a version that was rejected before, unchanged. What was observed of this very
    artifact against this champion before goes on counting, unless it begins `anew`.

    A rejected challenger is a completed run whose result says so; a failed run means that this program or
    its platform is broken, or that it was asked for something it cannot do.
    """
    logger = get_run_logger()
    with listening(logger.info):
        return run(model, Path(policy), None if version is None else str(version), again=again, anew=anew)


def run(model: str, policy_file: Path, version: str | None, *, again: bool, anew: bool = False) -> dict[str, Any]:
    """One promotion, inside a flow run. Returns the summary that `flows.drive.outcome` describes."""
    settings = load_settings()
    settings.connect(needed=("MLflow",))
    text, policy = _policy(policy_file, model)
    target = settings_target(settings)
    registered = _challenger(model, version, registry.aliased(model, registry.CHAMPION))
    identifier = f"{model}-v{registered.number}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with leased(target, model, identifier) as fence:
        recover.finish(settings, target, model, fence)
        champion_number = registry.aliased(model, registry.CHAMPION)
        # Another promotion may have ended since we looked.
        registered = _challenger(model, registered.number, champion_number)
        challenger = contender(registered, settings)
        if not again:
            _refuse_quarantined(challenger)
        champion = None
        if champion_number is not None:
            champion = contender(registry.find(model, champion_number), settings, serving=True)
        context = Context(
            id=identifier,
            model=model,
            settings=settings,
            target=target,
            fence=fence,
            base=policy_file.resolve().parent,
            folder=settings.home / "promotions" / identifier,
            champion=champion,
            challenger=challenger,
            previous=registry.aliased(model, registry.PREVIOUS),
            blamed=frozenset(pool.blamed(model)),
            policy=policy,
            ledger=Ledger(weights(policy, first=champion is None)),
            series={}
            if anew
            else history.observed(model, challenger.digest, champion_number, settings.home / "promotions"),
        )
        context.folder.mkdir(parents=True)
        _settle(context)
        context.began = target.observe(model)
        promotion = Promotion(
            id=identifier,
            champion=champion_number,
            challenger=registered.number,
            digest=challenger.digest,
            policy=policy,
        )
        say(f"{identifier}: {registered.name} asks for the place of {_title(context)}")
        if context.series:
            say(f"  what was observed of it before goes on counting: {', '.join(context.series)}")
        return outcome(carry(context, promotion, text, flow_run_tags()))


def _policy(path: Path, model: str) -> tuple[str, Policy]:
    text, policy = read_policy(path, model)
    if any(gate.kind == "approval" for gate in policy.gates):
        raise Mistake(f"{path.name}: approvals are not built yet; take the `approval` gate out of the policy", code=2)
    return text, policy


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


def contender(registered: registry.Registered, settings: Settings, *, serving: bool = False) -> Contender:
    """A version with its artifacts, their digest compared with the one recorded at its first admission.

    Of one that is `serving` (or did) the copy on this disk will do. Raises `Mistake` for a version without
    signature.
    """
    path, recorded, found = (registry.admitted if serving else registry.admit)(registered, settings.home)
    if not registry.signature(path):
        raise Mistake(
            f"{registered.name} has no signature, so nothing can be compared: log the model with "
            "`signature=mlflow.models.infer_signature(inputs, outputs)` and register it anew"
        )
    return Contender(registered, path, recorded, found)


def _refuse_quarantined(challenger: Contender) -> None:
    reason = registry.quarantined(challenger.registered.model, challenger.digest)
    if reason:
        raise Mistake(
            f"{challenger.registered.name} is quarantined, its artifact unchanged: {reason}. "
            "Mend the model and register it anew, or insist with --again",
            code=3,
        )


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

"""What a promotion needs to know: gathered when it begins, and again when it goes on in another process."""

from pathlib import Path

from deployments.target import Fence, ServingTarget
from tasks import history, pool, registry, swap
from tasks.context import Contender, Context
from tasks.journal import Open
from tasks.settings import Mistake, Settings
from validations.ledger import Ledger, weights
from validations.policy import Policy
from validations.replay import ledger_of
from validations.series import Arm


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


def context(
    settings: Settings,
    target: ServingTarget,
    model: str,
    fence: Fence,
    *,
    identifier: str,
    policy: Policy,
    base: Path,
    champion: str | None,
    challenger: Contender,
    anew: bool = False,
) -> Context:
    """The context of a promotion that begins now: `champion` serves, and what was observed of this very challenger
    against it before goes on counting unless it begins `anew`.
    """
    reigning = None if champion is None else contender(registry.find(model, champion), settings, serving=True)
    made = Context(
        id=identifier,
        model=model,
        settings=settings,
        target=target,
        fence=fence,
        base=base,
        folder=settings.home / "promotions" / identifier,
        champion=reigning,
        challenger=challenger,
        previous=registry.aliased(model, registry.PREVIOUS),
        blamed=frozenset(pool.blamed(model)),
        policy=policy,
        ledger=Ledger(weights(policy, first=champion is None)),
        series={} if anew else history.observed(model, challenger.digest, champion, settings.home / "promotions"),
    )
    made.folder.mkdir(parents=True, exist_ok=True)
    return made


def resumed(settings: Settings, target: ServingTarget, model: str, fence: Fence, left: Open) -> Context:
    """The context of a promotion that goes on: as it was begun, by its journal, with the artifacts as the registry has
    them now. What its steps observed so far counts.
    """
    now = left.promotion
    assert now is not None
    champion, previous = swap.reigning(target, left)
    made = context(
        settings,
        target,
        model,
        fence,
        identifier=left.id,
        policy=now.policy,
        base=Path(left.base or settings.home),
        champion=champion,
        challenger=contender(registry.find(model, now.challenger), settings),
        anew=bool((left.tags or {}).get("anew")),
    )
    made.ledger = ledger_of(now, history.evidence(history.entry(left.id).run_id, now))
    made.previous, made.blamed = previous, left.blamed
    made.reference = None if left.reference is None else Arm.model_validate(left.reference)
    traffic = target.traffic(model)
    if traffic is not None:
        made.shape = traffic.shape
    made.began = target.observe(model) if traffic is not None else {}
    return made

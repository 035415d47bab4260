"""Drive one promotion to its end: ask the kernel for the next step, perform it, record the verdict."""

import json
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from deployments.target import Fence, ServingTarget, TargetError, Traffic
from tasks import custom, history, load, registry, report, serving, validate
from tasks.context import Contender, Context, Judged, Seen
from tasks.policies import read_policy
from tasks.progress import listening, say
from tasks.settings import Mistake, Settings
from tasks.settings import load as load_settings
from tasks.stack import settings_target
from validations.ledger import Ledger, weights
from validations.policy import Policy, Step
from validations.promotion import Promotion, drive
from validations.verdict import Artifact, Evidence, Measurement, Outcome, Verdict, judge


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
    """One promotion, inside a flow run. Returns the summary that `outcome` describes."""
    settings = load_settings()
    settings.connect()
    text, policy = _policy(policy_file, model)
    target = settings_target(settings)
    champion_number = registry.aliased(model, registry.CHAMPION)
    registered = _challenger(model, version, champion_number)
    identifier = f"{model}-v{registered.number}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with leased(target, model, identifier) as fence:
        challenger = contender(registered, settings)
        if not again:
            _refuse_quarantined(challenger)
        champion = None
        if champion_number is not None:
            champion = contender(registry.find(model, champion_number), settings, serving=True)
        context = Context(
            model=model,
            settings=settings,
            target=target,
            fence=fence,
            base=policy_file.resolve().parent,
            folder=settings.home / "promotions" / identifier,
            champion=champion,
            challenger=challenger,
            previous=registry.aliased(model, registry.PREVIOUS),
            policy=policy,
            ledger=Ledger(weights(policy, first=champion is None)),
            series={}
            if anew
            else history.observed(model, challenger.digest, champion_number, settings.home / "promotions"),
        )
        return _promote(context, policy, identifier, text)


def _promote(context: Context, policy: Policy, identifier: str, text: str) -> dict[str, Any]:
    model, number = context.model, context.challenger.number
    context.folder.mkdir(parents=True)
    _settle(context)
    context.began = context.target.observe(model)
    promotion = Promotion(
        id=identifier,
        champion=context.champion.number if context.champion else None,
        challenger=number,
        digest=context.challenger.digest,
        policy=policy,
    )
    run_id, chain = history.begin(promotion, text, flow_run_tags())
    registry.set_alias(model, registry.CHALLENGER, number)
    registry.tag(model, number, phase=promotion.phase.value, promotion=identifier, verdict="")
    say(f"{identifier}: {context.challenger.registered.name} asks for the place of {_title(context)}")
    if context.series:
        say(f"  what was observed of it before goes on counting: {', '.join(context.series)}")

    def save(now: Promotion) -> None:
        nonlocal chain
        verdict = now.verdicts[-1]
        say(f"{verdict.step}: {verdict.outcome.value} - {verdict.why}")
        chain = history.record(run_id, now, chain)
        decided = now.decided_by or verdict
        registry.tag(model, number, phase=now.phase.value, outcome=decided.outcome.value, verdict=decided.why)
        if now.phase.final and decided.outcome in (Outcome.FAILED, Outcome.PASSED):
            blamed = decided.outcome is Outcome.FAILED
            quarantine = f"{now.phase.value} in {identifier}: {decided.why}" if blamed else ""
            registry.tag(model, number, quarantine=quarantine)

    def act(now: Promotion, step: Step) -> Verdict:
        return perform(context, now, step, run_id)

    try:
        promotion = drive(promotion, act, save)
    except BaseException:
        # A bug, or someone ended this process: what can be done in a moment is to give all traffic back.
        _give_back(context)
        with suppress(Exception):  # the registry may be what broke
            history.interrupted(run_id)
            registry.tag(model, number, phase="interrupted", outcome="", verdict="")
        raise
    _tidy(context, promotion)
    links = registry.links(context.challenger.registered, context.settings.mlflow)
    page = report.write(promotion, context.folder, links)
    history.keep(run_id, page, "report")
    history.describe(run_id, f"{report.markdown(promotion)}\n\n[The version]({links['version']})")
    history.finish(run_id)
    create_markdown_artifact(
        key=f"verdicts-{model}".lower().replace("_", "-").replace(".", "-"),
        markdown=report.markdown(promotion),
        description=f"{identifier}: {promotion.phase.value}",
    )
    say(f"{identifier}: {promotion.phase.value}")
    return outcome(promotion)


def outcome(promotion: Promotion) -> dict[str, Any]:
    """What a promotion came to: promotion, model, champion, challenger, phase, step, outcome, why."""
    decided = promotion.decided_by
    return {
        "promotion": promotion.id,
        "model": promotion.policy.model,
        "champion": promotion.champion,
        "challenger": promotion.challenger,
        "phase": promotion.phase.value,
        "step": decided.step if decided else "",
        "outcome": decided.outcome.value if decided else "",
        "why": decided.why if decided else "",
    }


def perform(context: Context, promotion: Promotion, step: Step, run_id: str) -> Verdict:
    """Perform one step and judge what it saw. The one place where a platform's error becomes a verdict."""
    bounds = promotion.bounds(step)
    min_sample = promotion.policy.min_sample(step)
    started = datetime.now(UTC)
    say(f"{step.name} ...")

    def outcome_of(measured: Mapping[str, Measurement]) -> Outcome:
        return judge(step.name, bounds, Evidence(measurements=dict(measured)), min_sample).outcome

    try:
        seen = _perform(context, promotion.policy, step, outcome_of)
        artifacts = _keep(context, seen, step, run_id)
    except Exception as error:  # noqa: BLE001 - whatever the platform raises is evidence that nothing was proven
        note = f"{type(error).__name__}: {error}" if not isinstance(error, Mistake | TargetError) else str(error)
        evidence = Evidence(note=note, started=started, finished=datetime.now(UTC))
        return judge(step.name, bounds, evidence, min_sample)
    return judge(step.name, bounds, seen.evidence(artifacts, started), min_sample)


def _perform(context: Context, policy: Policy, step: Step, judged: Judged) -> Seen:
    """The task of this step, run under the step's name."""
    gate = None if step.gate is None else policy.gates[step.gate]
    performers: dict[str, tuple[Any, ...]] = {
        "integrity": (validate.integrity, gate),
        "schema": (validate.schema, gate),
        "features": (validate.features, gate),
        "quality": (validate.quality, gate),
        "custom": (custom.custom, gate),
        "deploy": (serving.deploy,),
        "shadow": (serving.shadow, gate, judged),
        "load": (load.load, gate),
        "canary": (serving.canary, gate, step.weight, judged),
        "promote": (serving.promote,),
        "watch": (serving.watch, gate, judged),
        "rollback": (serving.rollback,),
    }
    performer, *arguments = performers[step.kind]
    seen: Seen = performer.with_options(task_run_name=step.name)(context, *arguments)
    return seen


def _keep(context: Context, seen: Seen, step: Step, run_id: str) -> tuple[Artifact, ...]:
    """Store what a step keeps: its data as `<step>.json`, its lines as `<step>-<name>.jsonl`."""
    name, kept = history.slug(step.name), []
    files = {f"{name}-{lines}.jsonl": "\n".join(text) + "\n" for lines, text in seen.lines.items() if text}
    if seen.data:
        files[f"{name}.json"] = json.dumps(seen.data, sort_keys=True, default=str)
    for file, text in files.items():
        path = context.folder / file
        path.write_text(text)
        kept.append(history.keep(run_id, path))
    return tuple(kept)


@contextmanager
def leased(target: ServingTarget, model: str, holder: str) -> Iterator[Fence]:
    """Hold the model's lease, renewed in the background, for as long as this context lasts."""
    fence = target.lease(model, holder)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(15):
            try:
                target.lease(model, holder)
            except TargetError:
                # Lost: the next verb with this fence is refused, which is what must happen.
                return

    thread = threading.Thread(target=renew, daemon=True, name=f"lease of {model}")
    thread.start()
    try:
        yield fence
    finally:
        done.set()
        thread.join()
        target.release(fence)


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
    """Start from agreement: the champion alone serves, whatever a promotion that died left behind."""
    traffic = context.target.traffic(context.model)
    if context.champion is None:
        return
    wanted = Traffic(context.model, context.champion.number)
    if traffic is None:
        say(f"{context.champion.registered.name} is the champion and is not served here yet: serving it")
        context.target.deploy(context.champion.version(context.settings.env_manager), context.fence)
        context.target.route(wanted, context.fence)
        return
    if traffic.champion != wanted.champion:
        raise Mistake(
            f"the gateway serves {context.model} v{traffic.champion} and the alias champion names v{wanted.champion}: "
            "set the alias, in the MLflow UI, to the version that serves"
        )
    if traffic != wanted:
        context.target.route(wanted, context.fence)
    for number in context.target.deployed(context.model):
        if number not in (context.champion.number, context.previous):
            context.target.retire(context.model, number, context.fence)


def _give_back(context: Context) -> None:
    if context.champion is None:
        return
    try:
        traffic = context.target.traffic(context.model)
        if traffic is not None and traffic.champion == context.champion.number:
            context.target.route(Traffic(context.model, context.champion.number), context.fence)
    except TargetError as error:
        say(f"the traffic could not be given back: {error}")


def _tidy(context: Context, promotion: Promotion) -> None:
    """After a promotion the version before the previous one is taken down; the previous stays warm."""
    model, target = context.model, context.target
    keep = (
        {promotion.champion, promotion.challenger}
        if promotion.stopped_by is None
        else {promotion.champion, context.previous}
    )
    for number in target.deployed(model):
        if number not in keep:
            try:
                target.retire(model, number, context.fence)
            except TargetError as error:
                # After a rollback that failed it may have traffic still: that is told, and the record goes on.
                say(f"v{number} could not be taken down: {error}")
    if context.challenger.path != registry.local_path(context.challenger.registered, context.settings.home):
        shutil.rmtree(context.challenger.path, ignore_errors=True)
    if promotion.stopped_by is not None and registry.aliased(model, registry.CHALLENGER) == promotion.challenger:
        registry.set_alias(model, registry.CHALLENGER, None)
        registry.set_stage(model, promotion.challenger, "None")


def _title(context: Context) -> str:
    return context.champion.registered.name if context.champion else "a champion that is not there yet"


def flow_run_tags() -> dict[str, str]:
    """Tags that link a record to the Prefect flow run that made it."""
    run_context = FlowRunContext.get()
    if run_context is None or run_context.flow_run is None:
        return {}
    return {"flow_run": str(run_context.flow_run.id), "flow_run_name": run_context.flow_run.name}

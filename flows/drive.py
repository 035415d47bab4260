"""Carry one promotion to its end, fresh or left behind: journal, perform, judge, record, and close it in agreement."""

import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.exceptions import Pause

from deployments.target import StaleFence, TargetError, TargetUnavailable
from flows.approval import Waits, approval, hold, let_go
from tasks import approve, custom, history, hook, load, notify, pool, registry, report, serving, validate
from tasks.agreement import Unrecorded, patiently, without
from tasks.context import Context, Judged, Seen
from tasks.journal import Open, opened
from tasks.progress import say
from tasks.settings import Mistake
from tasks.waiting import REPEATABLE
from validations.policy import ROLLBACK, Policy, Step
from validations.promotion import Promotion, drive
from validations.verdict import Artifact, Evidence, Measurement, Outcome, Verdict, judge


class _Pen:
    """Writes what a promotion comes to: the journal at once, the record and the version's tags behind it. `behind` is
    why they cannot be written, once they could not for a while.
    """

    def __init__(self, context: Context, text: str, tags: Mapping[str, str]) -> None:
        self.context, self.record = context, history.Record(text, tags, context.folder)
        self.behind: Exception | None = None

    def tell(self, now: Promotion) -> None:
        self.record.catch_up(now)
        _label(self.context, now)

    def save(self, now: Promotion) -> None:
        verdict = now.verdicts[-1]
        self.context.journal.verdict(verdict)
        say(f"{verdict.step}: {verdict.outcome.value} - {verdict.why}")
        # What rolls back does not wait for a record: it is caught up with afterwards.
        if now.next_step() == ROLLBACK or self.behind:
            return
        try:
            patiently(lambda: self.tell(now), f"the verdict on {verdict.step} is in the journal")
        except StaleFence:
            raise
        except Exception as error:  # noqa: BLE001 - what cannot be recorded must not go on
            self.behind = error

    def act(self, now: Promotion, step: Step) -> Verdict:
        if self.context.paused is not None and _may_stand_still(self.context, step):
            raise self.context.paused
        self.context.journal.step(step.name)
        if self.behind and step != ROLLBACK:
            return _errored(now, step, f"what was found cannot be recorded: {self.behind}")
        if (bad := now.stopped_by) is not None and bad.evidence.started and bad.evidence.finished:
            self.context.stopped = bad.evidence.started.timestamp(), bad.evidence.finished.timestamp()
        return perform(self.context, now, step)


def carry(
    context: Context,
    promotion: Promotion,
    text: str,
    tags: Mapping[str, str],
    left: Open | None = None,
    ended: str = "",
    requester: str = "",
    *,
    resuming: bool = False,
) -> Promotion:
    """Take a promotion to its end and close it. `text` is its policy as written, `tags` what links to it, `requester`
    who asked for it.

    `left` is what the journal has of one that another process began: where its next step could be done twice, or where
    `ended` gives a reason, that step is ERRORED and the way goes back; else it goes on. Where it is `resuming` a step
    that touches nothing live is performed again. Raises `Waits` where it cannot go on now, `Unrecorded` where traffic
    is as it should be and MLflow could not be told, and `StaleFence` where another process has taken over: then nothing
    was changed any more.
    """
    pen = _Pen(context, text, tags)
    if left is None:
        journal, base = context.journal, str(context.base)
        journal.begin(promotion, text, context.previous, tags, context.blamed, base, requester)
    try:
        if left is None:
            pen.tell(promotion)
            _name_challenger(context)
            _announce(context, promotion, pen.record.run_id, "started")
        elif stopped := _stops(context, promotion, left, ended, resuming=resuming):
            promotion = promotion.record(stopped)
            pen.save(promotion)
        promotion = drive(promotion, pen.act, pen.save)
    except (StaleFence, Unrecorded, Waits):
        raise
    except Pause:
        # Somebody pressed Pause: the next step has not begun, and the champion has everything until it is resumed.
        _give_back(context)
        context.journal.hold(None, "paused in the Prefect UI")
        raise
    except BaseException:
        # A bug, or someone ended this process: what can be done in a moment is to give all traffic back.
        _give_back(context)
        with suppress(Exception):  # the registry may be what broke
            history.interrupted(pen.record.run_id)
            registry.tag(context.model, context.challenger.number, phase="interrupted", outcome="", verdict="")
        raise
    ended_as = f"{promotion.id} is {promotion.phase.value}, and traffic is as it should be"
    patiently(lambda: pen.tell(promotion), ended_as)
    asks = opened(context.target, context.model)
    patiently(lambda: _close(context, promotion, pen.record), ended_as)
    say(f"{promotion.id}: {promotion.phase.value}")
    _announce(context, promotion, pen.record.run_id, cast("notify.Kind", promotion.phase.value))
    if asks is not None:
        let_go(context.settings, asks, promotion.phase.value)
    return promotion


def _announce(context: Context, promotion: Promotion, run_id: str, kind: notify.Kind) -> None:
    """Tell whom it concerns; no promotion fails by it."""
    with suppress(Exception):
        page = history.page(run_id, context.settings.mlflow_page)
        notify.tell(context.settings, notify.of(kind, promotion, page))


def _name_challenger(context: Context) -> None:
    """Let the alias `challenger` name the version that is being promoted, whatever it named."""
    named = registry.aliased(context.model, registry.CHALLENGER)
    registry.move(context.model, registry.CHALLENGER, context.challenger.number, of=(named,), guard=context.guard())


def _stops(context: Context, promotion: Promotion, left: Open, ended: str, *, resuming: bool) -> Verdict | None:
    """The verdict that stops a promotion which its process left behind; None where it goes on.

    Once all traffic is with the challenger the way goes forward: registry and watch follow. What waited goes on where
    it stood, and where it is `resuming` so does what touches nothing live. Else it goes back.
    """
    step = promotion.next_step()
    if step is None or step == ROLLBACK:
        return None
    if not ended:
        if step.kind == "approval" or left.held or (resuming and step.kind in REPEATABLE):
            return None
        last = promotion.verdicts[-1].step if promotion.verdicts else ""
        if resuming and left.doing is None and last in _approvals(promotion):
            return None  # people have just decided, and nothing was begun since
        traffic = context.target.traffic(context.model)
        ahead = traffic is not None and traffic.champion == context.challenger.number
        not_begun = step.kind == "hook" and left.doing != step.name
        if step.kind == "watch" or (ahead and (step.kind == "promote" or not_begun)):
            return None
        when = f"while it performed `{left.doing}`" if left.doing == step.name else f"before `{step.name}` began"
        ended = f"the process that ran this promotion ended {when}"
    return _errored(promotion, step, ended)


def _approvals(promotion: Promotion) -> set[str]:
    return {step.name for step in promotion.plan if step.kind == "approval"}


def _errored(promotion: Promotion, step: Step, note: str) -> Verdict:
    evidence = Evidence(note=note, started=datetime.now(UTC), finished=datetime.now(UTC))
    return judge(step.name, promotion.bounds(step), evidence, promotion.policy.min_sample(step))


def _label(context: Context, now: Promotion) -> None:
    """The version's tags: where its promotion stands, and why."""
    decided, number = now.decided_by, now.challenger
    tags = {"phase": now.phase.value, "promotion": now.id, "verdict": decided.why if decided else ""}
    if decided:
        tags["outcome"] = decided.outcome.value
    if now.phase.final and decided and decided.outcome in (Outcome.FAILED, Outcome.PASSED):
        blamed = decided.outcome is Outcome.FAILED
        tags["quarantine"] = f"{now.phase.value} in {now.id}: {decided.why}" if blamed else ""
    with context.guard():
        registry.tag(context.model, number, **tags)


def perform(context: Context, promotion: Promotion, step: Step) -> Verdict:
    """Perform one step and judge what it saw. The one place where a platform's error becomes a verdict."""
    bounds = promotion.bounds(step)
    min_sample = promotion.policy.min_sample(step)
    started = datetime.now(UTC)
    say(f"{step.name} ...")

    def outcome_of(measured: Mapping[str, Measurement]) -> Outcome:
        return judge(step.name, bounds, Evidence(measurements=dict(measured)), min_sample).outcome

    try:
        hold(context, promotion, step)
        seen = (
            approval(context, promotion, step)
            if step.kind == "approval"
            else _perform(context, promotion.policy, step, outcome_of)
        )
        artifacts = _keep(context, seen, step)
    except (StaleFence, Waits):
        raise  # it is another process's promotion by now, or waits: there is nothing for us to judge
    except Exception as error:
        if isinstance(error, Unrecorded) and step == ROLLBACK:
            raise  # not over yet: whoever recovers it performs it again
        note = f"{type(error).__name__}: {error}" if not isinstance(error, Mistake | TargetError) else str(error)
        evidence = Evidence(note=note, started=started, finished=datetime.now(UTC))
        return judge(step.name, bounds, evidence, min_sample)
    return judge(step.name, bounds, seen.evidence(artifacts, started), min_sample)


def _perform(context: Context, policy: Policy, step: Step, judged: Judged) -> Seen:
    """The task of this step, run under the step's name where there is a flow run."""
    gate = None if step.gate is None else policy.gates[step.gate]
    performers: dict[str, tuple[Any, ...]] = {
        "integrity": (validate.integrity, gate),
        "schema": (validate.schema, gate),
        "features": (validate.features, gate),
        "quality": (validate.quality, gate),
        "custom": (custom.custom, gate),
        "hook": (hook.hook, gate),
        "deploy": (serving.deploy,),
        "shadow": (serving.shadow, gate, judged),
        "load": (load.load, gate),
        "canary": (serving.canary, gate, step.weight, judged),
        "promote": (serving.promote,),
        "watch": (serving.watch, gate, judged),
        "rollback": (serving.rollback,),
    }
    performer, *arguments = performers[step.kind]
    if not _watched_by_prefect(context):
        # Nothing waits for Prefect: its client would try for half a minute, with live requests at a bad challenger.
        for _ in range(performer.retries):
            with suppress(TargetUnavailable):
                return cast("Seen", performer.fn(context, *arguments))
            time.sleep(1)
        return cast("Seen", performer.fn(context, *arguments))
    kept: list[Seen] = []
    named = performer.with_options(task_run_name=step.name)
    named.fn = _keeping(performer.fn, kept)
    try:
        return cast("Seen", named(context, *arguments))
    except Pause as pause:
        context.paused = pause
        if kept:  # Prefect withholds what the step came to
            return kept[-1]
        if _may_stand_still(context, step):
            raise
        return cast("Seen", performer.fn(context, *arguments))


def _keeping(work: Callable[..., Seen], kept: list[Seen]) -> Callable[..., Seen]:
    @functools.wraps(work)
    def keeping(*given: Any, **named: Any) -> Seen:
        kept.append(work(*given, **named))
        return kept[-1]

    return keeping


def _may_stand_still(context: Context, step: Step) -> bool:
    """Whether a pause may be obeyed before `step`: not on the way back, and not while the challenger answers all."""
    traffic = context.target.traffic(context.model)
    return step != ROLLBACK and (traffic is None or traffic.champion != context.challenger.number)


def _watched_by_prefect(context: Context) -> bool:
    there = FlowRunContext.get() is not None and context.paused is None
    return there and context.settings.answers(context.settings.prefect)


def _keep(context: Context, seen: Seen, step: Step) -> tuple[Artifact, ...]:
    """Write what a step keeps: its data as `<step>.json`, its lines as `<step>-<name>.jsonl`."""
    name, kept = history.slug(step.name), []
    files = {f"{name}-{lines}.jsonl": "\n".join(text) + "\n" for lines, text in seen.lines.items() if text}
    if seen.data:
        files[f"{name}.json"] = json.dumps(seen.data, sort_keys=True, default=str)
    for file, text in files.items():
        path = context.folder / file
        path.write_text(text)
        kept.append(history.artifact(path))
    return tuple(kept)


def _give_back(context: Context) -> None:
    if context.champion is None:
        return
    try:
        traffic = context.target.traffic(context.model)
        if traffic is not None and traffic.champion == context.champion.number:
            context.target.route(context.traffic(context.champion.number), context.fence)
    except TargetError as error:
        say(f"the traffic could not be given back: {error}")


def _close(context: Context, promotion: Promotion, record: history.Record) -> None:
    """Take down what is needed no more, write report and description, and end the journal: all of it repeatable."""
    model, number = context.model, promotion.challenger
    passed = promotion.stopped_by is None
    # Who reigns may be another than when it began: a hand may have moved the champion while it waited.
    serving_now = number if passed else (context.champion.number if context.champion else None)
    before = promotion.champion if passed else context.previous
    digests = {number: promotion.digest}
    context.blamed = frozenset(pool.blamed(model))
    unwanted = {*context.blamed} if passed else {*context.blamed, number}
    _tidy(context, serving_now, before, unwanted)
    if not passed and registry.aliased(model, registry.CHALLENGER) == number:
        registry.move(model, registry.CHALLENGER, None, of=(number,), guard=context.guard())
        registry.unstage(model, number, context.guard())
    links = registry.links(registry.find(model, number), context.settings.mlflow)
    page = report.write(promotion, context.folder, links)
    history.keep(record.run_id, page, "report")
    history.describe(record.run_id, f"{report.markdown(promotion)}\n\n[The version]({links['version']})")
    history.finish(record.run_id)
    if _approvals(promotion):
        approve.asks_no_more(record.run_id)
    if context.champion is not None and context.champion.recorded:
        digests[context.champion.number] = context.champion.recorded
    # What is written is what serves, should that be another version after a rollback that failed.
    traffic = context.target.traffic(model)
    warm = promotion.policy.keep_previous if passed else None
    until = None if warm is None else time.time() + warm.total_seconds()
    context.journal.end(promotion.phase.value, traffic.champion if traffic else None, before, digests, until)
    if _watched_by_prefect(context):
        create_markdown_artifact(
            key=f"verdicts-{model}".lower().replace("_", "-").replace(".", "-"),
            markdown=report.markdown(promotion),
            description=f"{promotion.id}: {promotion.phase.value}",
        )


def _tidy(context: Context, champion: str | None, previous: str | None, unwanted: set[str]) -> None:
    """What serves and what served before stay, and whatever else is to be kept warm; the rest is taken down, and so are
    the `unwanted`.
    """
    model, target = context.model, context.target
    traffic = target.traffic(model)
    keep = {champion, previous, *(traffic.live if traffic else ())}
    try:
        if champion is not None and traffic is not None and traffic.champion == champion:
            # Where it fails, the one before answers; not one that has just been found wanting.
            wanted = context.traffic(champion)
            found_wanting = context.challenger.number
            target.route(wanted if champion == found_wanting else without(wanted, found_wanting), context.fence)
    except TargetError as error:
        say(f"{model} has no fallback for now: {error}")
    pool.take_down(target, model, pool.spare(target, model, keep, unwanted), context.fence)
    if context.challenger.path != registry.local_path(context.challenger.registered, context.settings.home):
        shutil.rmtree(context.challenger.path, ignore_errors=True)


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


def flow_run_tags() -> dict[str, str]:
    """Tags that link a record to the Prefect flow run that made it."""
    run_context = FlowRunContext.get()
    if run_context is None or run_context.flow_run is None:
        return {}
    return {"flow_run": str(run_context.flow_run.id), "flow_run_name": run_context.flow_run.name}

"""An approval: what people are shown and asked, whether a form proves one of them, and what waits for them."""

import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deployments.artifact import digest as digest_of
from tasks import history, registry, report
from tasks.approvers import Unproven, prove
from tasks.context import Context
from tasks.journal import Open
from tasks.settings import Settings, region
from validations.approval import ROUNDS, Asked, Ballot, Subject, entitled
from validations.gates import Approval
from validations.policy import Step
from validations.promotion import Promotion

ASKS = "asks"
"""The tag of a record that has what is asked, as JSON; empty where nothing is."""
SHOWN = ("verdicts", "evidence")
"""What of a record an approval rests on, besides its policy."""


def gate_of(promotion: Promotion, step: Step) -> Approval:
    """The approval that `step` is."""
    gate = promotion.policy.gates[step.gate or 0]
    assert isinstance(gate, Approval)
    return gate


def subject(context: Context, promotion: Promotion, step: Step, run_id: str) -> Subject:
    """What an approval would be bound to now: the artifacts as they were downloaded last, and policy, verdicts and
    evidence as the record, which is the run `run_id`, has them at this moment.
    """
    import mlflow.artifacts

    there = {info.path for info in registry.client().list_artifacts(run_id)}
    with tempfile.TemporaryDirectory() as folder:
        for part in SHOWN:
            if part in there:
                mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=part, dst_path=folder)
        (Path(folder) / "promotion.json").write_text(history.text_of(run_id, "promotion.json"))
        evidence = digest_of(Path(folder))
    policy = history.sha256(history.text_of(run_id, "policy.yaml").encode())
    return Subject(
        promotion=promotion.id, step=step.name, artifact=context.challenger.digest, policy=policy, evidence=evidence
    )


def ask(context: Context, promotion: Promotion, of: Subject, left: Open, flow_run: str, run_id: str) -> Asked:
    """Ask for a form: told to the journal, to the record `run_id`, and in a report of what was found so far.

    A round that was asked already and not answered is asked again, by another flow run than the one that did.
    """
    before, now = left.asked, datetime.now(UTC)
    step = promotion.next_step()
    assert step is not None
    answered = {ballot.round for ballot in left.ballots}
    number = 1 if before is None else before.round + (before.round in answered)
    until = now + gate_of(promotion, step).timeout if before is None else before.until
    who, here = left.requester, region()
    asked = Asked(subject=of, round=number, requester=who, at=now, until=until, flow_run=flow_run, region=here)
    context.journal.ask(asked)
    version = registry.find(context.model, promotion.challenger)
    page = report.write(promotion, context.folder, registry.links(version, context.settings.mlflow_page))
    history.keep(run_id, page, "report")
    registry.client().set_tag(run_id, registry.TAG + ASKS, asked.model_dump_json())
    return asked


def asks_no_more(run_id: str) -> None:
    """The record `run_id` has nothing to ask any more."""
    registry.client().set_tag(run_id, registry.TAG + ASKS, "")


def pending(settings: Settings) -> list[Asked]:
    """Everything that waits for people, oldest first, by MLflow's records. Raises `Mistake` without MLflow."""
    settings.connect(needed=("MLflow",))
    found = [Asked.model_validate_json(text) for text in history.tagged(ASKS) if text]
    return sorted(found, key=lambda asked: asked.at)


def take(
    context: Context,
    promotion: Promotion,
    gate: Approval,
    left: Open,
    form: Mapping[str, Any] | None,
    given_at: datetime,
) -> Ballot:
    """A form as it was given (None: the run was resumed without one), held against what it is bound to and against the
    proof that its approver gave; in the journal when this returns.
    """
    asked, ballots, now, given = left.asked, left.ballots, datetime.now(UTC), dict(form or {})
    assert asked is not None
    name, decision = given.get("approver", "").strip(), given.get("decision", "")
    how, reason, comment = "", "", given.get("comment", "")
    if form is None:
        reason = "the run was resumed without its form"
    elif decision not in ("approve", "reject"):
        reason = f"'{decision}' is no decision: approve or reject"
    else:
        step = promotion.next_step()
        assert step is not None
        reason = _void(context, promotion, step, asked) or entitled(
            gate, name, asked.requester, ballots, asked.subject.digest
        )
        if not reason and given_at >= asked.until:
            reason = f"the approval expired at {asked.until:%Y-%m-%d %H:%M} UTC"
        if not reason:
            try:
                how = prove(
                    context.settings.home,
                    name,
                    given.get("code", ""),
                    asked,
                    decision,
                    now,
                    comment=comment,
                    given=given_at,
                    form=f"{left.id} {asked.subject.step} {asked.round}",
                )
            except Unproven as unproven:
                reason = str(unproven)
    ballot = Ballot(
        round=asked.round,
        subject=asked.subject.digest,
        approver=name[:80],
        decision=decision[:20],
        comment=comment[:2000],
        how=how,
        accepted=not reason,
        reason=reason,
        at=now,
    )
    context.journal.ballot(asked.subject.step, ballot)
    return ballot


def _void(context: Context, promotion: Promotion, step: Step, asked: Asked) -> str:
    """Why what was shown is not what is so now; empty where it is."""
    now = subject(context, promotion, step, history.entry(promotion.id).run_id)
    if now.artifact != promotion.digest:
        return (
            f"void: the artifacts of v{promotion.challenger} in the registry are not those that the gates have seen "
            f"({now.artifact[:19]}, not {promotion.digest[:19]})"
        )
    parts = ("artifact", "policy", "evidence")
    changed = [name for name in parts if getattr(now, name) != getattr(asked.subject, name)]
    return f"void: the {' and the '.join(changed)} changed after this form was shown" if changed else ""


def kept(left: Open) -> dict[str, Any]:
    """All that was asked and said, as evidence."""
    return {
        "requester": left.requester,
        "asked": None if left.asked is None else left.asked.model_dump(mode="json"),
        "ballots": [ballot.model_dump(mode="json") for ballot in left.ballots],
    }


def shown(context: Context, promotion: Promotion, asked: Asked, ballots: tuple[Ballot, ...], run_id: str) -> str:
    """What the form shows, in Markdown: verdicts, links (to the record `run_id` for one), who asked, who said what, and
    the digests that it is bound to.
    """
    gate = gate_of(promotion, next(step for step in promotion.plan if step.name == asked.subject.step))
    links = registry.links(registry.find(context.model, promotion.challenger), context.settings.mlflow_page)
    place = f"v{promotion.champion}" if promotion.champion else "nobody yet"
    valid = [one for one in ballots if one.accepted and one.subject == asked.subject.digest]
    agreed = sorted({one.approver for one in valid})
    pages = f"[Report]({history.page(run_id, context.settings.mlflow_page)}) | [Model version]({links['version']})"
    all_of_them = gate.quorum == len(gate.approvers)
    must = " and ".join(gate.approvers) if all_of_them else f"{gate.quorum} of {', '.join(gate.approvers)}"
    must += " must agree" + (f"; {', '.join(agreed)} did" if agreed else "")
    if gate.four_eyes and asked.requester in gate.approvers:
        must += f"; not {asked.requester}, who asked for it"
    place += f" in the region **{asked.region}**" if asked.region else ""
    lines = [f"**{context.model} v{promotion.challenger}** for the place of {place} | {pages}", ""]
    if last := [one for one in ballots if one.round == asked.round - 1 and not one.accepted]:
        left = ROUNDS - _in_vain(ballots)
        lines += [f"**The last form was refused: {last[0].reason}.** {left} more may be.", ""]
    lines += [report.table(promotion), ""]
    lines.append(
        f"Requested by {asked.requester or 'nobody by name'}. {must}. Expires {asked.until:%Y-%m-%d %H:%M} UTC. "
        f"`titleshot explain {promotion.id}`"
    )
    bound = asked.subject
    parts = ", ".join(f"{name} `{getattr(bound, name)[:19]}`" for name in ("artifact", "policy", "evidence"))
    lines.append(f"Bound to {parts}: `{bound.digest[:19]}`")
    return "\n".join(lines)


def _in_vain(ballots: tuple[Ballot, ...]) -> int:
    number = 0
    for ballot in reversed(ballots):
        if ballot.accepted:
            break
        number += 1
    return number

"""What people are asked and what they said: subjects, ballots, and when they decide. Pure: the time is the caller's."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from validations.gates import Approval
from validations.verdict import Evidence, Measurement, Value

ROUNDS = 5
"""How many forms in a row may prove nobody before the approval is refused."""

Decision = Literal["approve", "reject"]


class Subject(Value):
    """What an approval is bound to: a promotion's step, and the digests of the artifacts, of the policy and of the
    evidence as they were shown.
    """

    promotion: str
    step: str
    artifact: str
    policy: str
    evidence: str

    @property
    def digest(self) -> str:
        """The subject's own digest, which tokens sign."""
        return "sha256:" + hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Asked(Value):
    """One form: the `round` counts from 1. `until` is when the approval as a whole expires, `flow_run` the suspended
    run that shows the form, `region` where the promotion is, of a model that is served in several.
    """

    subject: Subject
    round: int
    requester: str
    at: datetime
    until: datetime
    flow_run: str = ""
    region: str = ""


class Ballot(Value):
    """One form as it was given. `accepted` is whether it proved an approver who has a say; `reason` why not, `how` what
    proved it.
    """

    round: int
    subject: str
    approver: str
    decision: str
    comment: str = ""
    how: str = ""
    accepted: bool = False
    reason: str = ""
    at: datetime


def entitled(gate: Approval, approver: str, requester: str, ballots: Sequence[Ballot], subject: str) -> str:
    """Why `approver` has no say in `subject`; empty where they have. Nobody says twice what they said already."""
    if approver not in gate.approvers:
        return f"{approver or 'nobody'} is no approver of this policy: {', '.join(gate.approvers)} are"
    if gate.four_eyes and approver == requester:
        return f"{approver} asked for this promotion, and four eyes are wanted: somebody else must agree"
    if any(one.accepted and one.subject == subject and one.approver == approver for one in ballots):
        return f"{approver} has agreed already: {gate.quorum} different approvers are wanted"
    return ""


def decide(gate: Approval, ballots: Sequence[Ballot], subject: str, until: datetime, now: datetime) -> Evidence | None:
    """The evidence of an approval that is over: by enough approvals, an objection, forms that prove nobody, or the
    time; None while it goes on. Ballots on another subject than `subject` count for nothing.

    Who has not spoken may yet say yes: so the approvals of one that nobody decided lie between those given and all of
    them, and the judge calls that inconclusive. Where the policy calls it `failed`, silence is a no.
    """
    valid = [one for one in ballots if one.accepted and one.subject == subject]
    said_yes = sorted({one.approver for one in valid if one.decision == "approve"})
    said_no = [one for one in valid if one.decision == "reject"]
    people = len(gate.approvers)

    def evidence(note: str, *, open_: bool = False) -> Evidence:
        yes, most = float(len(said_yes)), float(people if open_ else len(said_yes))
        measured = {
            "approvals": Measurement(value=yes, low=yes, high=max(yes, most), sample=people, note=note),
            "objections": Measurement.exact(float(len(said_no)), note=note if said_no else ""),
        }
        return Evidence(measurements=measured, note=note)

    if said_no:
        words = f": {said_no[0].comment}" if said_no[0].comment else ""
        return evidence(f"{said_no[0].approver} rejected it{words}")
    if len(said_yes) >= gate.quorum:
        return evidence(f"{' and '.join(said_yes)} agreed")
    recent = ballots[-ROUNDS:]
    if len(recent) == ROUNDS and not any(one.accepted for one in recent):
        return evidence(
            f"refused after {ROUNDS} forms in a row that proved nobody; last: {recent[-1].reason}", open_=True
        )
    if now >= until:
        silent = f"{len(said_yes)} of {gate.quorum} agreed within the time"
        return evidence(silent, open_=gate.expired == "inconclusive")
    return None

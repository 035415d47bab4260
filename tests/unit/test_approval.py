"""What people said, and when that decides: quorum, objections, time, and forms that prove nobody."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validations.approval import ROUNDS, Ballot, Subject, decide, entitled
from validations.gates import Approval
from validations.policy import PolicyError, read
from validations.verdict import Evidence, Outcome, judge

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
UNTIL = NOW + timedelta(hours=1)
SUBJECT = Subject(promotion="m-v2-x", step="approval", artifact="sha256:a", policy="sha256:p", evidence="sha256:e")


def gate(**words: object) -> Approval:
    return Approval.model_validate({"approvers": ["ana", "bo", "cy"], **words})


def ballot(approver: str, decision: str = "approve", *, accepted: bool = True, subject: Subject = SUBJECT) -> Ballot:
    return Ballot(
        round=1, subject=subject.digest, approver=approver, decision=decision, accepted=accepted, reason="no", at=NOW
    )


def outcome(asked: Approval, evidence: Evidence | None) -> Outcome | None:
    return None if evidence is None else judge("approval", asked.bounds(), evidence, asked.min_sample).outcome


@pytest.mark.parametrize(
    ("words", "ballots", "now", "wanted"),
    [
        ({}, [], NOW, None),
        ({}, [ballot("ana")], NOW, Outcome.PASSED),
        ({"quorum": 2}, [ballot("ana")], NOW, None),
        ({"quorum": 2}, [ballot("ana"), ballot("ana")], NOW, None),
        ({"quorum": 2}, [ballot("ana"), ballot("bo")], NOW, Outcome.PASSED),
        ({"quorum": 2}, [ballot("ana"), ballot("bo", "reject")], NOW, Outcome.FAILED),
        ({}, [ballot("ana", accepted=False)], NOW, None),
        ({}, [ballot("ana", accepted=False)] * ROUNDS, NOW, Outcome.INCONCLUSIVE),
        ({"quorum": 2}, [*[ballot("x", accepted=False)] * 4, ballot("ana"), ballot("x", accepted=False)], NOW, None),
        ({}, [], UNTIL, Outcome.INCONCLUSIVE),
        ({"expired": "failed"}, [], UNTIL, Outcome.FAILED),
        ({"quorum": 2}, [ballot("ana")], UNTIL, Outcome.INCONCLUSIVE),
        ({"quorum": 2, "expired": "failed"}, [ballot("ana")], UNTIL, Outcome.FAILED),
    ],
)
def test_what_was_said_decides(words: dict, ballots: list[Ballot], now: datetime, wanted: Outcome | None) -> None:
    """Enough of them agree, one objects, five forms in a row prove nobody, or the time is over; else it goes on."""
    asked = gate(**words)
    assert outcome(asked, decide(asked, ballots, SUBJECT.digest, UNTIL, now)) == wanted


@pytest.mark.parametrize("part", ["promotion", "artifact", "policy", "evidence"])
def test_what_was_said_of_something_else_counts_for_nothing(part: str) -> None:
    """An approval is bound to what was shown: another artifact, policy or evidence makes it void."""
    other = SUBJECT.model_copy(update={part: "sha256:other"})
    assert decide(gate(), [ballot("ana", subject=other)], SUBJECT.digest, UNTIL, NOW) is None


def test_only_who_is_asked_has_a_say_and_only_once() -> None:
    """Strangers, whoever asked for the promotion, and who has agreed already are turned away, each with the reason."""
    digest = SUBJECT.digest
    assert "no approver" in entitled(gate(), "eve", "bo", [], digest)
    assert "four eyes" in entitled(gate(), "bo", "bo", [], digest)
    assert entitled(gate(four_eyes=False), "bo", "bo", [], digest) == ""
    assert "already" in entitled(gate(), "ana", "bo", [ballot("ana")], digest)
    assert entitled(gate(), "ana", "bo", [ballot("ana", accepted=False)], digest) == ""


@given(
    st.lists(
        st.builds(
            ballot,
            st.sampled_from(["ana", "bo", "cy", "eve"]),
            st.sampled_from(["approve", "reject", ""]),
            accepted=st.booleans(),
        )
    ),
    st.integers(1, 3),
    st.booleans(),
)
def test_it_never_passes_without_enough_different_people(ballots: list[Ballot], quorum: int, late: bool) -> None:
    """Whatever was said, in whatever order: a pass means a quorum of accepted approvals and no objection."""
    asked = gate(quorum=quorum)
    found = outcome(asked, decide(asked, ballots, SUBJECT.digest, UNTIL, UNTIL if late else NOW))
    valid = [one for one in ballots if one.accepted]
    if found is Outcome.PASSED:
        assert len({one.approver for one in valid if one.decision == "approve"}) >= quorum
        assert not any(one.decision == "reject" for one in valid)
    if late:
        assert found is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("approvers: []", "at least 1"),
        ("approvers: [ana, ana]", "twice"),
        ("approvers: [ana], quorum: 2", "1 approvers"),
        ("approvers: [ana], checks: {approvals: {min: 1}}", "no checks"),
        ("approvers: [ana], expired: passed", "inconclusive"),
    ],
)
def test_an_approval_that_cannot_be_is_refused(words: str, said: str) -> None:
    """Nobody to ask, one person twice, more than there are, checks of its own, silence that promotes."""
    with pytest.raises(PolicyError, match=said):
        read(f"version: 1\nmodel: m\ngates:\n- {{kind: approval, {words}}}\n")

"""The journal: what it makes of its lines, and who may write them."""

import pytest

from deployments.target import Entry, Fence, StaleFence
from tasks.journal import Agreed, Journal, agreed, opened
from tests.fakes import FakeTarget
from validations.policy import read
from validations.promotion import Promotion
from validations.verdict import Evidence, Measurement, Verdict, judge

POLICY = """\
version: 1
model: m
gates:
  - kind: integrity
  - kind: approval
    approvers: [ana]
  - kind: canary
    weights: [50]
    checks: { error_rate: { max: 0.1 } }
"""


def promotion() -> Promotion:
    """One with every verdict still to come."""
    return Promotion(id="p", champion="1", challenger="2", digest="d", policy=read(POLICY))


def passed(now: Promotion) -> Verdict:
    """The next step of a promotion, passed."""
    step = now.next_step()
    assert step is not None
    values = {
        metric: Measurement.exact(bound.min if bound.min is not None else 0.0)
        for metric, bound in now.bounds(step).items()
    }
    return judge(step.name, now.bounds(step), Evidence(measurements=values), 0)


@pytest.fixture
def target() -> FakeTarget:
    return FakeTarget()


def journal(target: FakeTarget, name: str = "p") -> Journal:
    """The journal of promotion `name`."""
    return Journal(target, target.lease("m", name), name)


def test_what_was_written_is_read_back(target: FakeTarget) -> None:
    """A promotion that was cut off has its verdicts, its policy, and the step that it was at."""
    pen, now = journal(target), promotion()
    pen.begin(now, "text", "0", {"flow_run": "f"})
    pen.step("integrity")
    left = opened(target, "m")
    assert left is not None
    assert (left.promotion, left.doing, left.policy_text, left.previous) == (now, "integrity", "text", "0")
    verdict = passed(now)
    pen.verdict(verdict)
    left = opened(target, "m")
    assert left is not None
    assert left.promotion == now.record(verdict)
    assert left.doing is None
    assert left.tags == {"flow_run": "f"}


def test_an_end_closes_it_and_takes_the_place_of_all_before(target: FakeTarget) -> None:
    """After its end nothing is open, and one line is left that says who serves; the next end replaces it."""
    for name, champion in (("p", "2"), ("q", "3")):
        pen = journal(target, name)
        pen.begin(promotion(), "", None, {})
        pen.end("promoted", champion, "1", {champion: "d"})
        assert opened(target, "m") is None
        assert len(target.journal("m")) == 1
        last = agreed(target, "m")
        assert isinstance(last, Agreed)
        assert (last.promotion, last.champion, last.previous, last.digests) == (name, champion, "1", {champion: "d"})
        target.release(pen.fence)


def test_what_waits_for_a_person_is_not_left_behind(target: FakeTarget) -> None:
    """A promotion whose next step is an approval waits; one that measures does not."""
    pen, now = journal(target), promotion()
    pen.begin(now, "", None, {})
    left = opened(target, "m")
    assert left is not None
    assert not left.waiting
    pen.verdict(passed(now))
    left = opened(target, "m")
    assert left is not None
    assert left.waiting


def test_the_cut_over_keeps_what_a_watch_compares_with(target: FakeTarget) -> None:
    """The line before the route has the old champion's counts, and does not hide which step it belongs to."""
    pen = journal(target)
    pen.begin(promotion(), "", None, {})
    pen.step("promote")
    pen.cut_over({"requests": 7})
    left = opened(target, "m")
    assert left is not None
    assert (left.doing, left.reference) == ("promote", {"requests": 7})


def test_a_rollback_by_hand_is_open_until_it_is_recorded(target: FakeTarget) -> None:
    """It has no promotion, and knows whose place whom takes, and why."""
    pen = journal(target, "r")
    pen.begin_rollback("2", "1", "too slow")
    left = opened(target, "m")
    assert left is not None
    assert (left.id, left.promotion, left.of, left.to, left.reason) == ("r", None, "2", "1", "too slow")


def test_who_has_lost_the_lease_writes_no_line(target: FakeTarget) -> None:
    """Every kind of line is refused from a run that comes back from the dead, and none is left of it."""
    pen = journal(target)
    target.lease("m", "other", take=True)
    lines = [
        lambda: pen.begin(promotion(), "", None, {}),
        lambda: pen.begin_rollback("2", "1", ""),
        lambda: pen.step("integrity"),
        lambda: pen.cut_over({}),
        lambda: pen.verdict(passed(promotion())),
        lambda: pen.end("promoted", "2", "1", {}),
        lambda: target.write(Entry("m", "p", "step", {}), Fence("m", "p", 99)),
    ]
    for line in lines:
        with pytest.raises(StaleFence):
            line()
    assert target.journal("m") == ()

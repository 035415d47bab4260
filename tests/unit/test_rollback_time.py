"""The time of a rollback: from the first bad live response of a version to its last live one."""

import pytest

from deployments.target import Answer, TargetError
from tasks import rollback_time as module
from tasks.rollback_time import rollback_time


def answer(number, at, status=200, seconds=0.1, **more):
    return Answer(number, f"r{number}", more.pop("shadow", False), status, b"{}", b"{}", at, seconds, **more)


class Kept:
    """A target whose version's server keeps `found`; what it cannot give it raises."""

    def __init__(self, *found, error=None, later=()):
        self.found, self.error, self.later = list(found), error, list(later)

    def answers(self, model, version, after=-1):
        if self.error:
            raise self.error
        yield from [one for one in self.found if one.number > after]
        # In flight while the first look was taken.
        self.found += [self.later.pop(0)] if self.later else []


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.03)


def seconds(target, after=100.0, stopped=107.0, obeyed=107.4):
    measured, words = rollback_time(target, "m", "5", after=after, stopped=stopped, obeyed=obeyed)
    assert measured.low == measured.high == measured.value
    assert words.startswith(f"callers met v5 for {measured.value:.2f} s: ")
    return measured.value, measured.note


def test_from_the_first_failure_to_the_last_answer() -> None:
    """A response counts when it ended; one that is still under way at the first look counts too."""
    target = Kept(answer(0, 101), answer(1, 103, 503), answer(2, 104, 500), later=[answer(3, 107.2, seconds=0.9)])
    found, note = seconds(target)
    assert found == pytest.approx(108.1 - 103.1)
    assert note == "from its first failed response to its last live response"


def test_only_live_answers_after_the_moment_count() -> None:
    """Failures before it, copies and requests on the version's own path are nobody's."""
    target = Kept(
        answer(0, 90, 500),
        answer(1, 101, 500, shadow=True),
        answer(2, 102, 500, own_path=True),
        answer(3, 105, 404),
        answer(4, 107.1),
        answer(5, 120, own_path=True),
    )
    found, note = seconds(target)
    assert found == pytest.approx(107.2 - 107.0)
    assert "from the verdict: none failed" in note


def test_a_version_that_was_silent_since_the_verdict_took_no_time() -> None:
    """Its last live response lies before the moment it was stopped."""
    assert seconds(Kept(answer(0, 101)))[0] == 0


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (Kept(error=TargetError("v5 is not deployed")), "its server's answers are gone"),
        (Kept(), "its server's answers are gone"),
        (Kept(answer(0, 101, shadow=True)), "its server has no live answer"),
    ],
)
def test_without_the_servers_account_the_gateways_word_counts(target, why) -> None:
    """A server that died, or began anew, knows nothing: then until the gateway had obeyed, and the note says so."""
    found, note = seconds(target)
    assert found == pytest.approx(0.4)
    assert note == f"{why}: from the verdict to the moment that the gateway obeyed"


def test_answers_that_were_not_kept_are_told() -> None:
    """Where the ring has lost its beginning the first failure may have been earlier, and the note says so."""
    late = Kept(answer(900, 104, 500), answer(901, 107.1))
    assert "its answers before 00:01:44 UTC were no longer kept" in seconds(late)[1]
    before = Kept(answer(900, 99), answer(901, 104, 500))
    assert "no longer kept" not in seconds(before)[1]


def test_an_endless_stream_of_answers_is_not_waited_for(monkeypatch) -> None:
    """Where live answers go on and on, the time is that of those seen when patience ended."""
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    endless = Kept(answer(0, 101, 500), later=[answer(number, 107, 200) for number in range(1, 10**5)])
    assert seconds(endless)[0] == pytest.approx(107.1 - 101.1)

"""Quiet hours: when they are, by whose clocks, and when they end."""

from datetime import UTC, datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validations.policy import PolicyError, read
from validations.quiet import DAYS, Quiet, quiet_until

NIGHT = Quiet(start=time(22), end=time(6, 30))
WEEKEND = Quiet(days=("sat", "sun"), timezone="Europe/Berlin")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("quiet", "now", "until"),
    [
        ((NIGHT,), "2026-11-20T12:00", None),
        ((NIGHT,), "2026-11-20T22:00", "2026-11-21T06:30"),
        ((NIGHT,), "2026-11-21T06:29", "2026-11-21T06:30"),
        ((NIGHT,), "2026-11-21T06:30", None),
        ((WEEKEND,), "2026-11-20T22:59", None),
        ((WEEKEND,), "2026-11-20T23:00", "2026-11-22T23:00"),
        ((NIGHT, WEEKEND), "2026-11-20T22:30", "2026-11-23T06:30"),
        ((Quiet(start=time(12), end=time(13), days=("mon",)),), "2026-11-23T12:30", "2026-11-23T13:00"),
        # The hour that summer time takes away, and the one that it gives back.
        ((Quiet(start=time(1), end=time(4), timezone="Europe/Berlin"),), "2026-03-29T00:30", "2026-03-29T02:00"),
        ((Quiet(start=time(1), end=time(4), timezone="Europe/Berlin"),), "2026-10-25T00:30", "2026-10-25T03:00"),
    ],
)
def test_quiet_hours_end(quiet: tuple[Quiet, ...], now: str, until: str | None) -> None:
    """By the clocks of their time zone, over midnight and weekends, stretches that meet as one."""
    assert quiet_until(quiet, at(now)) == (None if until is None else at(until))


def test_what_is_always_quiet_is_given_up_after_a_year() -> None:
    """It ends, so that nothing waits for ever in a loop."""
    now = at("2026-11-20T12:00")
    until = quiet_until((Quiet(),), now)
    assert until is not None
    assert until - now > timedelta(days=365)


@given(
    st.lists(
        st.builds(
            Quiet,
            days=st.lists(st.sampled_from(DAYS), min_size=1, max_size=3, unique=True).map(tuple),
            start=st.times(),
            end=st.times(),
            timezone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata"]),
        ),
        max_size=3,
    ),
    st.datetimes(min_value=datetime(2026, 1, 1), max_value=datetime(2027, 1, 1)),
)
def test_it_is_not_quiet_when_it_ends(quiet: list[Quiet], now: datetime) -> None:
    """Whatever the hours: at the end that is told nothing is quiet, and it lies ahead."""
    now = now.replace(tzinfo=UTC)
    until = quiet_until(tuple(quiet), now)
    if until is not None:
        assert until > now
        assert until - now > timedelta(days=360) or quiet_until(tuple(quiet), until) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{days: [mo]}", "mon"),
        ("{days: []}", "empty"),
        ("{start: 25:00}", "start"),
        ("{timezone: Mars/Olympus}", "no such time zone"),
        ("{form: '22:00'}", "unknown word 'form'"),
    ],
)
def test_hours_that_are_none_are_refused(words: str, said: str) -> None:
    """Unknown days, clocks, zones and words are told with their place."""
    with pytest.raises(PolicyError, match=said):
        read(f"version: 1\nmodel: m\nquiet: [{words}]\ngates:\n- {{kind: integrity}}\n")

"""Quiet hours: when nothing is promoted, and until when. Pure: the time is the caller's."""

from datetime import datetime, time, timedelta
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import BeforeValidator, Field, model_validator

from validations.units import refuse
from validations.verdict import Value

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _clock(value: object) -> object:
    # YAML 1.1 reads 22:00 as 1320, a number to the base of 60.
    if isinstance(value, int | float):
        if isinstance(value, bool | float) or not 60 <= value < 24 * 60:
            refuse(f"{value} is no time of day: one is written like '22:00'")
        return time(*divmod(value, 60))
    return value


def _zone(value: object) -> object:
    try:
        ZoneInfo(str(value))
    except (KeyError, ValueError, OSError):
        refuse(f"no such time zone: '{value}' (one is called like Europe/Berlin, or UTC)")
    return value


Clock = Annotated[time, BeforeValidator(_clock)]


class Quiet(Value):
    """From `start` until `end` by the clocks of `timezone`, on `days` (all of them where none is named). An `end` that
    is not after `start` is on the next day; without both the whole day is quiet.
    """

    days: tuple[Day, ...] = DAYS
    start: Clock = time(0)
    end: Clock = time(0)
    timezone: Annotated[str, BeforeValidator(_zone)] = Field(default="UTC")

    @model_validator(mode="after")
    def _some_day(self) -> Self:
        if not self.days:
            refuse("`days` is empty: name some, or leave it out for every day")
        return self

    def until(self, now: datetime) -> datetime | None:
        """The end of the quiet stretch that `now` lies in; None where it lies in none."""
        zone = ZoneInfo(self.timezone)
        here = now.astimezone(zone)
        for back in (1, 0):  # one that began yesterday may last into today
            day = here.date() - timedelta(days=back)
            if DAYS[day.weekday()] not in self.days:
                continue
            begins = datetime.combine(day, self.start, zone)
            last = day if self.end > self.start else day + timedelta(days=1)
            ends = datetime.combine(last, self.end, zone)
            if begins <= here < ends:
                return ends.astimezone(now.tzinfo)
        return None


def quiet_until(quiet: tuple[Quiet, ...], now: datetime) -> datetime | None:
    """When nothing is quiet any more; None where nothing is quiet `now`. Stretches that meet are one; what never ends
    is given up after a year.
    """
    end, limit = now, now + timedelta(days=366)
    while end < limit:
        further = [until for one in quiet if (until := one.until(end)) is not None]
        if not further:
            break
        end = max(further)
    return None if end == now else end

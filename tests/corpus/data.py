"""Changes of feature data: of one column (`old` is its name, `new` what becomes of it), or of the whole frame.

Every change is made to other rows of the same kind, so that a harmless one is not blocked for its sample.
"""

import decimal
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from tests.corpus.cases import Case, breaks, harmless

Values = "pd.Series[Any]"


def flights(rows: int, seed: int) -> pd.DataFrame:
    """Numbers with heavy tails and nulls, categories, free text, flags, dates, a constant, a column of nulls."""
    random = np.random.default_rng(seed)
    delay = random.exponential(30, rows) - 15
    delay[random.random(rows) < 0.03] = np.nan
    return pd.DataFrame(
        {
            "distance": random.gamma(2, 500, rows),
            "dep_delay": delay,
            "hour": random.integers(5, 23, rows),
            "temp": random.normal(12, 9, rows),
            "load": random.beta(6, 2, rows),
            "carrier": random.choice(["UA", "AA", "B6", "DL"], rows, p=[0.5, 0.3, 0.15, 0.05]),
            "origin": random.choice(["JFK", "LGA", "EWR"], rows),
            "dest": random.choice(["LAX", "SFO", "ORD", "ATL"], rows),
            "tail": [f"N{n}" for n in random.integers(0, 10**6, rows)],
            "weekend": random.random(rows) < 0.3,
            "sched": pd.Timestamp("2013-01-01") + pd.to_timedelta(random.integers(0, 10**7, rows), unit="s"),
            "year": np.full(rows, 2013),
            "gate": np.full(rows, None),
        }
    )


def some(values: Any, share: float, to: Any) -> Any:
    """A share of the values (spread evenly) replaced."""
    at = np.arange(len(values)) % round(1 / share) == 0
    return values.astype(object).where(~at, to) if isinstance(to, str) else values.where(~at, to)


def changed(column: str, change: Callable[[Any], Any], name: str) -> Case:
    return breaks(name, column, change, "wanted")


def kept(column: str, change: Callable[[Any], Any], name: str) -> Case:
    return harmless(name, column, change)


COLUMNS: list[Case] = [
    # units, scales, shifts
    changed("distance", lambda v: v * 1.609344, "kilometres for miles"),
    changed("distance", lambda v: v * 1000, "metres for kilometres"),
    changed("distance", lambda v: v / 1.852, "sea miles for kilometres"),
    changed("distance", np.log1p, "logarithms"),
    changed("distance", lambda v: (v - v.mean()) / v.std(), "standardised"),
    changed("distance", lambda v: v / v.max(), "between 0 and 1"),
    changed("distance", lambda v: -v, "another sign"),
    changed("distance", lambda v: v + 700, "shifted by a standard deviation"),
    changed("distance", lambda v: v.clip(upper=v.median()), "cut at the median"),
    changed("distance", lambda v: v.rank(), "ranks"),
    changed("distance", lambda v: v[::-1].reset_index(drop=True).rolling(60, min_periods=1).mean(), "averaged over sixty rows"),
    changed("distance", lambda v: v * 0 + 900.0, "a constant"),
    changed("distance", lambda v: v * 0, "nothing but zeros"),
    changed("dep_delay", lambda v: v / 60, "hours for minutes"),
    changed("dep_delay", lambda v: v * 60, "seconds for minutes"),
    changed("dep_delay", lambda v: v.abs() + 15, "only delays, no early departures"),
    changed("hour", lambda v: v + 12, "another time zone, twelve hours away"),
    changed("hour", lambda v: (v + 6) % 24, "another time zone, six hours away and round the clock"),
    changed("hour", lambda v: v * 100, "HHMM for hours"),
    changed("temp", lambda v: v * 9 / 5 + 32, "Fahrenheit for Celsius"),
    changed("temp", lambda v: v + 273.15, "Kelvin for Celsius"),
    changed("load", lambda v: v * 100, "percent for a share"),
    changed("load", lambda v: 1 - v, "free seats for taken ones"),
    changed("load", lambda v: np.log(v / (1 - v)), "log-odds for a share"),
    changed("year", lambda v: v + 1, "another constant"),
    changed("year", lambda v: v - 2000, "two digits of the year"),
    # nulls and what stands for them
    changed("distance", lambda v: some(v, 0.1, np.nan), "nulls in a tenth of the rows"),
    changed("distance", lambda v: v * np.nan, "nothing but nulls"),
    changed("distance", lambda v: some(v, 0.05, -9999.0), "-9999 for null"),
    changed("dep_delay", lambda v: some(v, 0.25, np.nan), "eight times as many nulls"),
    changed("carrier", lambda v: some(v, 0.2, "").replace("", None), "null carriers"),
    changed("carrier", lambda v: some(v, 0.1, ""), "empty text for null"),
    changed("origin", lambda v: some(v, 0.1, "nan"), "the text nan for null"),
    changed("hour", lambda v: some(v.astype(float), 0.1, np.nan), "hours that are not known"),
    # types
    changed("hour", lambda v: v.astype(str), "numbers as text"),
    changed("hour", lambda v: v > 12, "a flag for the hour"),
    changed("distance", lambda v: v.map("{:.1f} km".format), "text with a unit"),
    changed("carrier", lambda v: v.map({"UA": 0, "AA": 1, "B6": 2, "DL": 3}), "codes for names"),
    changed("carrier", lambda v: v.map(lambda name: [name]), "a list for a name"),
    changed("weekend", lambda v: v.astype(int), "0 and 1 for a flag"),
    changed("weekend", lambda v: v.map({True: "yes", False: "no"}), "yes and no for a flag"),
    changed("sched", lambda v: v.astype("int64"), "nanoseconds for a date"),
    changed("sched", lambda v: v.dt.strftime("%Y-%m-%d"), "text for a date"),
    changed("tail", lambda v: v.str[1:].astype(int), "numbers for free text"),
    # categories
    changed("carrier", lambda v: v.str.lower(), "small letters"),
    changed("carrier", lambda v: v + " ", "a space behind"),
    changed("carrier", lambda v: "carrier_" + v, "a prefix"),
    changed("carrier", lambda v: v.map({"UA": "DL", "AA": "UA", "B6": "AA", "DL": "B6"}), "a shifted coding"),
    changed("carrier", lambda v: some(v, 0.1, "WN"), "a carrier that was not there"),
    changed("carrier", lambda v: v.map({"UA": "United", "AA": "American", "B6": "JetBlue", "DL": "Delta"}), "long names"),
    changed("origin", lambda v: v.map({"JFK": "KJFK", "LGA": "KLGA", "EWR": "KEWR"}), "codes of four letters"),
    changed("carrier", lambda v: v.where(v == "DL", "DL"), "the rarest carrier alone"),
    changed("dest", lambda v: v.where(v == "LAX", "ORD"), "two of four destinations"),
    # harmless: representation
    kept("distance", lambda v: v, "other rows"),
    kept("distance", lambda v: v.astype(np.float32), "32 bits"),
    kept("distance", lambda v: v.astype("Float64"), "a nullable number"),
    kept("distance", lambda v: v.astype("float64[pyarrow]"), "an Arrow number"),
    kept("distance", lambda v: v.astype(object), "numbers as objects"),
    kept("distance", lambda v: v.map(lambda n: decimal.Decimal(f"{n:.2f}")), "decimals"),
    kept("distance", lambda v: v.round(), "rounded"),
    kept("distance", lambda v: v.sort_values().reset_index(drop=True), "sorted"),
    kept("hour", lambda v: v.astype(np.int32), "integers of 32 bits"),
    kept("hour", lambda v: v.astype(np.uint8), "integers of 8 bits"),
    kept("hour", lambda v: v.astype(np.float64), "integers as floats"),
    kept("hour", lambda v: v.astype("Int64"), "nullable integers"),
    kept("hour", lambda v: v.astype("category"), "integers as categories"),
    kept("carrier", lambda v: v.astype("category"), "text as categories"),
    kept("carrier", lambda v: v.astype("category").cat.set_categories(["B6", "DL", "UA", "AA", "WN"]), "categories in another order, one not used"),
    kept("carrier", lambda v: v.astype(object), "text as objects"),
    kept("carrier", lambda v: v.astype("string"), "text as text"),
    kept("weekend", lambda v: v.astype(object), "flags as objects"),
    kept("weekend", lambda v: v.astype("boolean"), "nullable flags"),
    kept("sched", lambda v: v.dt.as_unit("s"), "dates to the second"),
    kept("sched", lambda v: v.dt.tz_localize("UTC"), "dates that know their zone"),
    kept("sched", lambda v: v + pd.Timedelta(days=30), "a month later"),
    kept("gate", lambda v: v.astype(float), "NaN for None"),
    # harmless: values
    kept("distance", lambda v: v + np.random.default_rng(5).normal(0, 5, len(v)), "a little noise"),
    kept("distance", lambda v: v * 1.02, "two percent more"),
    kept("distance", lambda v: v + 50, "a little further"),
    kept("distance", lambda v: some(v, 0.002, 5_000.0), "a few giants"),
    kept("distance", lambda v: some(v, 0.01, np.nan), "one null in a hundred"),
    kept("distance", lambda v: v.where(v > 40, -0.0), "minus nothing"),
    kept("dep_delay", lambda v: v.fillna(v.median()), "nulls that are filled in"),
    kept("dep_delay", lambda v: some(v, 0.02, np.nan), "half as many nulls again"),
    kept("temp", lambda v: v + 2, "a warmer month"),
    kept("temp", lambda v: v * 1.1, "a more changeable month"),
    kept("temp", lambda v: v.clip(-12, 36), "the extremes cut off"),
    kept("load", lambda v: (v + 0.02).clip(upper=1), "fuller planes"),
    kept("carrier", lambda v: some(v, 0.005, "WN"), "a new carrier in few rows"),
    kept("carrier", lambda v: v.where(v != "DL", "UA"), "the rarest carrier gone"),
    kept("carrier", lambda v: some(v, 0.1, "AA"), "shares that moved a little"),
    kept("tail", lambda v: v.str.lower(), "other free text"),
    kept("weekend", lambda v: v | (np.arange(len(v)) % 20 == 0), "a few more weekends"),
    kept("gate", lambda v: v.map(lambda _: 7.0), "values where there were nothing but nulls"),
    kept("year", lambda v: v.astype(float), "a constant as a float"),
]  # fmt: skip

FRAMES: list[Case] = [
    breaks("a column is gone", None, lambda f: f.drop(columns="hour"), "'hour'"),
    breaks("a column is renamed", None, lambda f: f.rename(columns={"dep_delay": "departure_delay"}), "'dep_delay'"),
    breaks("a column is in capitals", None, lambda f: f.rename(columns={"temp": "TEMP"}), "'temp'"),
    breaks("two columns of numbers are swapped", None, lambda f: f.rename(columns={"distance": "temp", "temp": "distance"}), "'distance'"),
    breaks("two columns of text are swapped", None, lambda f: f.rename(columns={"origin": "dest", "dest": "origin"}), "'origin'"),
    breaks("the index has taken a column", None, lambda f: f.set_index("carrier"), "'carrier'"),
    breaks("all columns are numbered", None, lambda f: f.set_axis([str(n) for n in range(f.shape[1])], axis=1), "'distance'"),
    breaks("the names stand one column off", None, lambda f: f.set_axis([*f.columns[1:], f.columns[0]], axis=1), "'distance'"),
    breaks("one row is all there is, over and over", None, lambda f: f.iloc[[0] * len(f)].reset_index(drop=True), "wanted"),
    breaks("one carrier's flights alone", None, lambda f: f[f["carrier"] == "DL"], "'carrier'"),
    harmless("the rows are in another order", None, lambda f: f.sample(frac=1, random_state=3)),
    harmless("the columns are in another order", None, lambda f: f[f.columns[::-1]]),
    harmless("a column is new", None, lambda f: f.assign(wind=1.5)),
    harmless("the index is text", None, lambda f: f.set_axis([f"r{n}" for n in range(len(f))], axis=0)),
    harmless("the index counts from another number", None, lambda f: f.set_axis(range(500, 500 + len(f)), axis=0)),
    harmless("the index has every row twice", None, lambda f: f.set_axis(np.arange(len(f)) // 2, axis=0)),
    harmless("half of the rows", None, lambda f: f.iloc[::2]),
    harmless("the rows drawn anew with repetition", None, lambda f: f.sample(len(f), replace=True, random_state=4)),
    harmless("every row twice", None, lambda f: pd.concat([f, f])),
    harmless("a few rows twice", None, lambda f: pd.concat([f, f.head(30)], ignore_index=True)),
    harmless("300 rows", None, lambda f: f.head(300)),
]  # fmt: skip

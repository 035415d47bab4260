"""How far live values moved from reference ones, with the interval that the sample sizes leave.

Pure. The population stability index PSI = sum (p - q) ln(p / q) over bins is biased on small samples: ten bins
and 100 values on each side show 0.18 where nothing moved. With n_e = 1 / (1/n + 1/m) and B bins, n_e * PSI
follows a chi-square distribution with B - 1 degrees of freedom and non-centrality n_e * (true PSI)
(Yurdakul and Naranjo 2020); inverted, it gives an interval for the true PSI, and the judge does the rest.

Drift says that the population moved. It is never evidence that a model is bad.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from validations.statistics import NoSample, worst_of
from validations.verdict import Measurement, Value

Floats = NDArray[np.float64]
Places = NDArray[np.intp]
"""For each value the place of its bin."""
BINS = 10
LEAST = 5
"""Values that the smaller sample should have in a bin by the reference's share; bins with fewer are merged, unless
twice as many are seen: what is rare in the reference and frequent now is drift.
"""
OTHER, MISSING = "other", "missing"


class Drift(Value):
    """The drift of one column: counts by bin, and the distances computed from them.

    `reference` and `live` are counts, `bins` says what each bin holds. `psi` is the plain index, biased as it
    is; `jensen_shannon` the distance sqrt(JSD / ln 2), from 0 to 1; `ks` the largest distance of the two
    cumulative shares (numbers only) and `ks_margin` what of it the sample sizes explain at the confidence
    0.95. `effective` is n_e, where rows of one request count as far as they differ.
    """

    column: str
    kind: Literal["number", "category"]
    bins: tuple[str, ...]
    reference: tuple[int, ...]
    live: tuple[int, ...]
    psi: float
    jensen_shannon: float
    effective: float
    ks: float | None = None
    ks_margin: float | None = None

    @property
    def freedom(self) -> int:
        """The degrees of freedom: one less than there are bins, and never none."""
        return max(1, len(self.bins) - 1)

    @property
    def corrected(self) -> float:
        """The index without the bias of the sample sizes: unbiased, but for the cut at 0."""
        return max(0.0, self.psi - self.freedom / self.effective)


def drift(
    column: str,
    reference: "pd.Series[Any]",
    live: "pd.Series[Any]",
    *,
    numbers: bool,
    requests: ArrayLike | None = None,
) -> Drift:
    """Compare the values of one column. `requests` names the request of each live row, where one holds several.

    Numbers go into the reference's deciles, in which a value that fills a bin alone keeps it; anything
    else is taken as categories. Rare bins are merged. Nulls are a bin of their own. Rows of one
    request are alike, so the live sample counts as the size that its spread between requests shows (Rao
    and Scott 1981). Raises `NoSample` where either side has no values.
    """
    if not len(reference) or not len(live):
        raise NoSample(f"no values of '{column}' to compare")
    at_reference, at_live, names = (_by_number if numbers else _by_category)(reference, live)
    old, new = (np.bincount(at, minlength=len(names)) for at in (at_reference, at_live))
    kept = np.flatnonzero(old + new)
    size = len(live) / _design_effect(at_live, len(names), requests)
    p, q = _shares(new[kept]), _shares(old[kept])
    ks, margin = _ks(reference, live, size) if numbers else (None, None)
    return Drift(
        column=column,
        kind="number" if numbers else "category",
        bins=tuple(names[at][:60] for at in kept),
        reference=tuple(int(n) for n in old[kept]),
        live=tuple(int(n) for n in new[kept]),
        psi=float(np.sum((p - q) * np.log(p / q))),
        jensen_shannon=_jensen_shannon(p, q),
        effective=1 / (1 / len(reference) + 1 / size),
        ks=ks,
        ks_margin=margin,
    )


def measurement(found: Sequence[Drift], confidence: float, tolerated: float = 0.1) -> Measurement:
    """The true PSI of the column that moved most: bias-corrected, with its interval.

    Each column gets an interval at the Bonferroni level; the highest true PSI lies between the highest lower
    end and the highest upper end. The one named is the most surely moved. Where the interval spans
    `tolerated` (the bound) the note says how many live rows would tell. Raises `NoSample` for no columns.
    """
    if not found:
        raise NoSample("no column to measure drift of")
    alpha = (1 - confidence) / len(found)
    ends = [interval(one, 1 - alpha) for one in found]
    worst = max(range(len(found)), key=lambda at: (ends[at][0], found[at].corrected))
    low, value, high = ends[worst][0], found[worst].corrected, max(end for _, end in ends)
    widest = max(range(len(found)), key=lambda at: ends[at][1])
    undecided = found[worst if low > tolerated else widest]
    return Measurement(
        value=value,
        low=min(low, value),
        high=max(high, value),
        sample=sum(found[worst].live),
        where=found[worst].column,
        note=_note(found[worst], undecided, alpha, tolerated) if low <= tolerated < high else _moved(found[worst]),
    )


def interval(found: Drift, confidence: float) -> tuple[float, float]:
    """The values of the true PSI that the counts are compatible with.

    Less than chance alone brings is luck: the upper end takes the mean of no drift at the least, so a small sample
    proves nothing by looking too good (a power-constrained limit).
    """
    alpha, seen = 1 - confidence, found.psi * found.effective
    return (
        _centre(seen, found.freedom, 1 - alpha / 2) / found.effective,
        _centre(max(seen, found.freedom), found.freedom, alpha / 2) / found.effective,
    )


def _centre(seen: float, freedom: int, share: float) -> float:
    """The non-centrality at which `seen`, or less, has the probability `share`; 0 where none has."""

    def beyond(centre: float) -> float:
        return _below(seen, freedom, centre) - share

    if beyond(0.0) <= 0:
        return 0.0
    top = seen + 10
    while beyond(top) > 0:
        top *= 2
    return float(optimize.brentq(beyond, 0.0, top, xtol=1e-6))


def critical(tolerated: float, freedom: int, effective: float, alpha: float) -> float:
    """The plain PSI above which the true one exceeds `tolerated`, wrong with probability `alpha` at most."""
    return _quantile(1 - alpha, freedom, effective * tolerated) / effective


def rows_needed(found: Drift, alpha: float, tolerated: float) -> int | None:
    """How many live rows would tell, nine times in ten, on which side of `tolerated` a true PSI of the value seen
    lies; None where no number would, since it lies at the bound or the reference is too small.
    """
    old, now = sum(found.reference), sum(found.live)
    # What `now` rows count for, as they came in requests: kept for more of them.
    counted = 1 / (1 / found.effective - 1 / old) / now
    for rows in (math.ceil(now * 1.15**step) for step in range(1, 80)):
        effective = 1 / (1 / old + 1 / (rows * counted))
        centre, limit = effective * found.corrected, effective * tolerated
        if centre < limit:
            wrong = _below(_quantile(0.9, found.freedom, centre), found.freedom, limit)
        else:
            wrong = 1 - _below(_quantile(0.1, found.freedom, centre), found.freedom, limit)
        if wrong <= alpha / 2:
            return rows
    return None


def unseen(
    known: Mapping[str, Collection[str]], live: pd.DataFrame, requests: ArrayLike, confidence: float
) -> Measurement:
    """The share of live requests with a category that the reference never had, in the column where it is highest.

    `known` are the reference's categories by column, as text; `requests` names the request of each row of
    `live`. Clopper-Pearson intervals at the Bonferroni level; the note has the categories. Nulls are none.
    Raises `NoSample` where none of the columns is there, or there are no rows.
    """
    asked = np.asarray(requests)
    counted, strange = [], []
    for column in (name for name in known if name in live.columns):
        values = live[column].astype(object).map(str, na_action="ignore")
        new = (values.notna() & ~values.isin(list(known[column]))).to_numpy()
        counted.append((column, int(np.unique(asked[new]).size), int(np.unique(asked).size)))
        strange.append(values[new].value_counts())
    worst, measured = worst_of(counted, confidence)
    names = [f"'{str(name)[:60]}'" for name in strange[worst].index[:3]]
    more = f" and {len(strange[worst]) - 3} more" if len(strange[worst]) > 3 else ""
    told = f"{', '.join(names)}{more} in {measured.note} requests" if names else f"{measured.note} requests"
    return measured.model_copy(update={"note": told})


def _below(seen: float, freedom: int, centre: float) -> float:
    """P(X <= seen) of the non-central chi-square distribution."""
    return float(stats.ncx2.cdf(seen, freedom, centre) if centre else stats.chi2.cdf(seen, freedom))


def _quantile(share: float, freedom: int, centre: float) -> float:
    return float(stats.ncx2.ppf(share, freedom, centre) if centre else stats.chi2.ppf(share, freedom))


def _note(worst: Drift, undecided: Drift, alpha: float, tolerated: float) -> str:
    more = rows_needed(undecided, alpha, tolerated)
    few = critical(tolerated, undecided.freedom, undecided.effective, alpha / 2) > 3 * tolerated
    who = "" if undecided is worst else f" for '{undecided.column}'"
    if more is None:
        needed = "it lies at the bound, and more rows would hardly tell"
        if undecided.effective > 0.8 * sum(undecided.reference):
            needed = "the reference has too few rows to tell: log more of them"
    else:
        needed = f"about {_round(more):,} live rows would tell{who}, {sum(undecided.live):,} were there"
    return ("too few samples: " if few else "") + f"{needed}; {_moved(worst)}"


def _moved(found: Drift) -> str:
    """The bin that grew most, in words."""
    old, new = (np.asarray(side) / sum(side) for side in (found.reference, found.live))
    at = int(np.argmax(new - old))
    return f"{found.bins[at]}: {old[at]:.1%} in the reference, {new[at]:.1%} live"


def _round(rows: int) -> int:
    """Two digits: it is an estimate."""
    unit = 10 ** max(0, len(str(rows)) - 2)
    return int(math.ceil(rows / unit) * unit)


# Bins -----------------------------------------------------------------------------------------------------


def _by_number(reference: "pd.Series[Any]", live: "pd.Series[Any]") -> tuple[Places, Places, list[str]]:
    """The bin of every value, and the bins' names; the last bin is for nulls."""
    sides = [_floats(reference), _floats(live)]
    known = [np.sort(side[~np.isnan(side)]) for side in sides]
    smaller = min(side.size for side in sides)
    edges = _edges(known[0], known[1], smaller) if known[0].size else np.empty(0)
    names = [*_spans(np.sort(np.concatenate(known)), edges), MISSING]
    bins = []
    for side in sides:
        # The i-th bin ends with the i-th edge, which belongs to it.
        at = np.searchsorted(edges, side, side="left")
        bins.append(np.where(np.isnan(side), len(names) - 1, at))
    return *_without_rare(bins[0], bins[1], smaller, len(names)), names


def _edges(old: Floats, new: Floats, smaller: int) -> Floats:
    """The upper ends of the bins but for the last one: deciles of the reference `old` (both are sorted).

    A value that fills a bin alone is cut off on both sides. Rare bins are merged with their neighbour.
    """
    new = new if new.size else old
    deciles = np.unique(np.quantile(old, np.arange(1, BINS) / BINS, method="inverted_cdf"))
    heavy = [v for v in deciles if _upto(old, v) - _upto(old, np.nextafter(v, -np.inf)) >= 1 / BINS]
    cuts = np.unique(np.concatenate([deciles, [np.nextafter(v, -np.inf) for v in heavy]]))
    edges: list[float] = []
    below = np.zeros(2)
    for cut in cuts:
        upto = np.asarray([_upto(old, cut), _upto(new, cut)])
        if _frequent(upto - below, smaller) and _frequent(1 - upto, smaller):
            edges.append(float(cut))
            below = upto
    return np.asarray(edges)


def _frequent(shares: Floats, smaller: int) -> bool:
    return bool(max(shares[0], shares[1] / 2) * smaller >= LEAST)


def _upto(ordered: Floats, value: float) -> float:
    return float(np.searchsorted(ordered, value, side="right")) / max(ordered.size, 1)


def _spans(known: Floats, edges: Floats) -> list[str]:
    """What each bin holds, by the smallest and the largest value in it."""
    if not known.size:
        return ["any value"]
    starts = [0, *np.searchsorted(known, edges, side="right")]
    ends = [*(start - 1 for start in starts[1:]), known.size - 1]
    spans = [(f"{known[a]:.4g}", f"{known[b]:.4g}") for a, b in zip(starts, ends, strict=True)]
    return [low if low == high else f"{low} to {high}" for low, high in spans]


def _by_category(reference: "pd.Series[Any]", live: "pd.Series[Any]") -> tuple[Places, Places, list[str]]:
    """As `_by_number`, for categories: the rare ones are "other"."""
    sides = [side.astype(object).map(str, na_action="ignore") for side in (reference, live)]
    smaller = min(len(side) for side in sides)
    old, new = (side.value_counts() / len(side) for side in sides)
    shares = pd.concat([old, new], axis=1).fillna(0.0).to_numpy(dtype=np.float64)
    every = [str(name) for name in pd.concat([old, new], axis=1).index]
    names = [name for name, both in zip(every, shares, strict=True) if _frequent(both, smaller)]
    place = {name: at for at, name in enumerate(names)}
    bins = []
    for side in sides:
        at = side.map(place).fillna(len(names)).to_numpy(dtype=np.intp)
        bins.append(np.where(side.isna().to_numpy(), len(names) + 1, at))
    names += [OTHER, MISSING]
    return *_without_rare(bins[0], bins[1], smaller, len(names)), names


def _without_rare(old: Places, new: Places, smaller: int, bins: int) -> tuple[Places, Places]:
    """What is rare still joins the largest bin, where it does no harm."""
    shares = np.stack([np.bincount(side, minlength=bins) / side.size for side in (old, new)], axis=1)
    largest = int(np.argmax(shares.sum(axis=1)))
    into = np.asarray([at if _frequent(shares[at], smaller) else largest for at in range(bins)])
    return into[old], into[new]


def _floats(values: "pd.Series[Any]") -> Floats:
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


# Distances ------------------------------------------------------------------------------------------------


def _shares(counts: NDArray[np.integer[Any]]) -> Floats:
    """Shares, with half a value added to each bin: one that is empty would make the index infinite."""
    padded = counts + 0.5
    return np.asarray(padded / padded.sum(), dtype=np.float64)


def _jensen_shannon(p: Floats, q: Floats) -> float:
    middle = (p + q) / 2
    divergence = float(np.sum(p * np.log(p / middle)) + np.sum(q * np.log(q / middle))) / 2
    return math.sqrt(max(0.0, divergence) / math.log(2))


def _ks(reference: "pd.Series[Any]", live: "pd.Series[Any]", size: float) -> tuple[float | None, float | None]:
    """The Kolmogorov-Smirnov distance, and the margin sqrt(ln(2 / alpha) / 2) * sqrt(1/n + 1/m) at 0.95."""
    old, new = (np.sort(side[~np.isnan(side)]) for side in (_floats(reference), _floats(live)))
    if not old.size or not new.size:
        return None, None
    everywhere = np.concatenate([old, new])
    shares = [np.searchsorted(side, everywhere, side="right") / side.size for side in (old, new)]
    margin = math.sqrt(math.log(2 / 0.05) / 2) * math.sqrt(1 / old.size + 1 / min(size, new.size))
    return float(np.max(np.abs(shares[0] - shares[1]))), margin


def _design_effect(at: Places, bins: int, requests: ArrayLike | None) -> float:
    """By how much the rows of requests overstate the sample: 1 where each request has one row.

    Of each bin the variance of its share between requests, over that of independent rows, averaged with the
    weights 1 - share (Rao and Scott 1981, first order). A single request counts as a single row.
    """
    if requests is None:
        return 1.0
    _, request = np.unique(np.asarray(requests), return_inverse=True)
    many = int(request.max()) + 1
    rows = at.size
    if many == rows:
        return 1.0
    if many == 1:
        return float(rows)
    table = np.zeros((many, bins))
    np.add.at(table, (request, at), 1)
    share = table.sum(axis=0) / rows
    seen = (share > 0) & (share < 1)
    if not seen.any():
        # All rows alike: nothing tells how alike those of one request are, so each request counts once.
        return rows / many
    apart = table[:, seen] - table.sum(axis=1, keepdims=True) * share[seen]
    between = many / (many - 1) * (apart**2).sum(axis=0) / rows**2
    effect = between / (share[seen] * (1 - share[seen]) / rows)
    return float(max(1.0, np.average(effect, weights=1 - share[seen])))

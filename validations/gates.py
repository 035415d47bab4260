"""The kinds of gate: the fields of each, the checks it knows, and what it refuses."""

import itertools
import json
import math
import re
from datetime import timedelta
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from validations.units import Bursts, Duration, Percent, Rate, Share, duration_text, minutes, nearest, refuse
from validations.verdict import Bound, Value

Fact = Bound(min=1)


ERROR_METRICS = ("error_rate", "error_rate_delta")


LIVE_METRICS = (*ERROR_METRICS, "error_ceiling")


LABEL_METRICS = ("label_accuracy", "label_accuracy_delta", "label_loss_delta")
"""What a past shadow can be judged by once labels have come."""


LATENCY_METRICS = tuple(f"p{q}_{kind}" for kind in ("ms", "ratio") for q in (50, 90, 95, 99))


CAPACITY_METRICS = ("capacity", "capacity_ratio")


GENERATOR_METRICS = ("generator_lateness_ms", "generator_cpu")


MOST_REQUESTS = 2_000_000
"""The requests to one version (and in a search to all) of one load gate."""


MOST_OF_A_WORKER = 400_000
"""And those that one of several workers sends, to all versions, in one run."""


LONGEST_SEARCH = timedelta(hours=1)


Better = Literal["higher", "lower"]


OFFLINE_METRICS: dict[str, Better] = {
    **dict.fromkeys(("roc_auc", "average_precision", "f1", "precision", "recall"), "higher"),
    **dict.fromkeys(("accuracy", "balanced_accuracy", "r2"), "higher"),
    **{f"{name}_{kind}": "higher" for name in ("f1", "precision", "recall") for kind in ("macro", "weighted")},
    **dict.fromkeys(("roc_auc_ovr", "roc_auc_ovr_weighted"), "higher"),
    **dict.fromkeys(("log_loss", "brier", "rmse", "mse", "mae", "mape"), "lower"),
}
"""The offline metrics that are built in, and which way each is better."""


METRIC_ALIASES = {
    "accuracy_score": "accuracy",
    "balanced_accuracy_score": "balanced_accuracy",
    "f1_score": "f1",
    "precision_score": "precision",
    "recall_score": "recall",
    "roc_auc_score": "roc_auc",
    "precision_recall_auc": "average_precision",
    "average_precision_score": "average_precision",
    "brier_score_loss": "brier",
    "r2_score": "r2",
    "mean_absolute_error": "mae",
    "mean_squared_error": "mse",
    "root_mean_squared_error": "rmse",
    "mean_absolute_percentage_error": "mape",
}
"""What MLflow and scikit-learn call them."""


class Tolerance(Value):
    """How a field of the answer is compared, and how far apart its two values may lie and still agree.

    Numbers a (the champion's) and b: |a - b| <= abs + rel * |a|. Sets and texts: at least `similar` alike. `kind`
    "auto" takes the values as JSON has them. An `ignore`d field is not looked at.
    """

    abs: float = Field(default=0.0, ge=0)
    rel: float = Field(default=0.0, ge=0)
    kind: Literal["auto", "label", "number", "set", "text", "json"] = "auto"
    similar: float = Field(default=1.0, gt=0, le=1)
    case: bool = True
    ignore: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.similar < 1 and self.kind not in ("set", "text"):
            refuse("`similar` is for sets and texts: give `kind: set` or `kind: text`")
        if not self.case and self.kind != "text":
            refuse("`case` is for texts: give `kind: text`")
        if (self.abs or self.rel) and self.kind in ("label", "set", "text"):
            refuse(f"`abs` and `rel` are for numbers, not for `kind: {self.kind}`")
        return self


class BaseGate(Value):
    """What every gate has. `checks` given in the file are laid over the gate's own defaults."""

    METRICS: ClassVar[tuple[str, ...]] = ()
    DEFAULTS: ClassVar[dict[str, Bound]] = {}
    COMPARES: ClassVar[bool] = False
    """Whether the gate makes sense only against a champion."""

    name: str = Field(default="", max_length=40)
    checks: dict[str, Bound] = {}
    min_sample: int = Field(default=1, ge=1)

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9 _-]*", name):
            refuse(f"'{name}' names files too: use letters, digits, spaces, - and _")
        return name

    @field_validator("checks")
    @classmethod
    def _known(cls, checks: dict[str, Bound]) -> dict[str, Bound]:
        for metric in checks:
            if metric not in cls.METRICS:
                refuse(
                    f"no such check here: '{metric}'{nearest(metric, cls.METRICS)} "
                    f"(this gate knows: {', '.join(cls.METRICS)})"
                )
        return checks

    @model_validator(mode="after")
    def _proves_something(self) -> Self:
        if not self.bounds():
            refuse(f"a gate without checks proves nothing: give `checks` (of: {', '.join(self.METRICS)})")
        return self

    def bounds(self, *, first: bool = False) -> dict[str, Bound]:
        """The checks in force; without a champion (`first`) those that compare with one fall away."""
        # The policy's own come first: what people asked for is what the verdict's sentence speaks of.
        merged = {**self.checks, **{m: b for m, b in self.DEFAULTS.items() if m not in self.checks}}
        return {metric: b for metric, b in merged.items() if not (first and is_comparison(metric))}

    def falls_away(self) -> bool:
        """Whether there is nothing for this gate to do while there is no champion."""
        return self.COMPARES or not self.bounds(first=True)

    @property
    def needs_serving(self) -> bool:
        """Whether the challenger must be deployed before this gate."""
        return isinstance(self, SERVING)

    @property
    def after_promote(self) -> bool:
        """Whether the gate comes after the cut-over: a watch, and a hook that says so."""
        return False


class Sampled(BaseGate):
    """What the gates that look at a sample once have in common: the `confidence` of each interval."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)


class Looked(BaseGate):
    """What the gates that look at traffic again and again have in common.

    `bursts` is the longest stretch in which one server process may misbehave for reasons of its own (a collector's
    pause, a noisy neighbour): requests within it are not independent, so comparisons go by blocks three times as long.
    """

    bursts: Bursts = timedelta(seconds=10)

    def bounds(self, *, first: bool = False) -> dict[str, Bound]:
        """Also the hard ceiling for errors: 10 %, or what the policy tolerates as `error_rate`, if that is more."""
        bounds = super().bounds(first=first)
        tolerated = bounds.get("error_rate", Bound(max=0.1)).max
        bounds.setdefault("error_ceiling", Bound(max=max(0.1, 0.0 if tolerated is None else tolerated)))
        return bounds

    @model_validator(mode="after")
    def _proves_something(self) -> Self:
        if not {**self.DEFAULTS, **self.checks}:
            refuse(f"a gate without checks proves nothing: give `checks` (of: {', '.join(self.METRICS)})")
        return self

    def block(self, limit: timedelta) -> float:
        """The length of a block of traffic in seconds, when the gate lasts `limit`: at most a thousand of them."""
        if self.bursts is not None:
            return max(3 * self.bursts.total_seconds(), 1.0)
        return max(1.0, limit.total_seconds() / 1000)


def is_comparison(metric: str) -> bool:
    """Whether `metric` sets the challenger against the champion."""
    return metric.endswith(("_delta", "_ratio", "disagreement"))


class Integrity(BaseGate):
    """The artifact is the one that was registered, holds no unsafe serialisation, loads and answers, and its
    requirements are met where it will be served.

    `trusted` maps files of the model to the SHA-256 (hex) of the bytes that somebody reviewed; those are not
    counted as unsafe. `signed_by` is a public key (PEM): then the model must carry its signature.
    """

    METRICS: ClassVar = (
        *("digest_matches", "unsafe_files", "answers_example"),
        *("requirement_conflicts", "signature_valid"),
    )
    DEFAULTS: ClassVar = {
        "digest_matches": Fact,
        "unsafe_files": Bound(max=0),
        "answers_example": Fact,
        "requirement_conflicts": Bound(max=0),
    }
    kind: Literal["integrity"] = "integrity"
    trusted: dict[str, str] = {}
    signed_by: str | None = None

    @field_validator("trusted")
    @classmethod
    def _reviewed(cls, trusted: dict[str, str]) -> dict[str, str]:
        for path, digest in trusted.items():
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                refuse(f"'{path}' is trusted by the SHA-256 of the reviewed file: 64 digits, as `sha256sum` prints")
            if path.startswith("/") or ".." in path.split("/") or "*" in path:
                refuse(f"'{path}' is no path within the model: write it like `model.pkl` or `code/helper.py`")
        return trusted

    @model_validator(mode="after")
    def _key_named(self) -> Self:
        if "signature_valid" in self.checks and self.signed_by is None:
            refuse("`signature_valid` needs `signed_by`: the public key, a file beside the policy")
        return self

    def bounds(self, *, first: bool = False) -> dict[str, Bound]:
        """Also the signature, where a key is named."""
        bounds = super().bounds(first=first)
        if self.signed_by is not None:
            bounds.setdefault("signature_valid", Fact)
        return bounds


class Schema(BaseGate):
    """Every request that the champion accepts is accepted, and answered in the same shape.

    Signatures and declared classes are compared, and both models are asked the champion's input example and up
    to `live_sample` recent live requests (0: the example alone). Where there is nothing to ask,
    `breaking_answers` counts none, unless the policy names it: then it is not measured.
    """

    METRICS: ClassVar = ("breaking_changes", "breaking_answers")
    DEFAULTS: ClassVar = {"breaking_changes": Bound(max=0), "breaking_answers": Bound(max=0)}
    COMPARES: ClassVar = True
    kind: Literal["schema"] = "schema"
    live_sample: int = Field(default=100, ge=0)


class Freshness(Value):
    """How old features may be: the newest time in `column`, or without one the age of the file `source`.

    `source` is a parquet file, such as a feature store's export; without it the challenger's reference features
    are looked at.
    """

    max_age: Duration
    column: str | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _has_a_time(self) -> Self:
        if self.column is None and self.source is None:
            refuse("`freshness` needs a `column` that holds times, or a `source` file whose own age counts")
        return self


class Features(Sampled):
    """The challenger's reference features and a sample of live requests meet an expectation suite.

    `suite` is a JSON file beside the policy; without it the champion's run may hold one
    (`reference/suite.json`), and without that it is generated from the champion's reference features, without
    the columns of `exclude` (those that are meant to move). `reference` is a parquet file; without it the
    version's run must hold `reference/features.parquet`. `live_sample` live requests are looked at (0: none).
    Drift is measured wherever there are live requests, and judged where `checks` name it.
    """

    LIVE: ClassVar = ("unmet_live_expectations", "unseen_categories", "feature_drift", "prediction_drift")
    METRICS: ClassVar = ("unmet_expectations", "feature_age_hours", *LIVE)
    DEFAULTS: ClassVar = {"unmet_expectations": Bound(max=0)}
    kind: Literal["features"] = "features"
    suite: str | None = None
    exclude: tuple[str, ...] = ()
    reference: str | None = None
    live_sample: int = Field(default=300, ge=0, le=5000)
    freshness: Freshness | None = None

    def bounds(self, *, first: bool = False) -> dict[str, Bound]:
        """Also the live checks, where a live sample is asked for and there is live traffic, and the age."""
        bounds = super().bounds(first=first)
        if self.freshness:
            bounds.setdefault("feature_age_hours", Bound(max=self.freshness.max_age / timedelta(hours=1)))
        if self.live_sample and not first:
            bounds.setdefault("unmet_live_expectations", Bound(max=0))
        else:
            bounds = {metric: bound for metric, bound in bounds.items() if metric not in self.LIVE}
        if first and self.suite is None:
            # Without a champion there is nothing to generate a suite from.
            bounds.pop("unmet_expectations", None)
        return bounds

    @model_validator(mode="after")
    def _can_be_measured(self) -> Self:
        for metric in self.checks:
            if metric in self.LIVE and not self.live_sample:
                refuse(f"`{metric}` needs a `live_sample`: it is 0 here")
        if "feature_age_hours" in self.checks and self.freshness is None:
            refuse("`feature_age_hours` needs `freshness`: where the age is read, and the `max_age`")
        return self


class Function(Value):
    """A metric of the user's own: `path` is `file.py:name`, relative to the policy; `better` says which way."""

    path: str
    better: Better = "higher"

    @field_validator("path")
    @classmethod
    def _names_one(cls, path: str) -> str:
        return _function_path(path)


def _function_path(path: str) -> str:
    if not re.fullmatch(r".+\.py:[^\W\d]\w*", path):
        refuse(f"'{path}' names no function: write it like metrics.py:my_metric")
    return path


def _function(value: object) -> object:
    if not isinstance(value, str | dict | Function):
        refuse("a function is written like metrics.py:my_metric, or { path: metrics.py:my_metric, better: lower }")
    return {"path": value} if isinstance(value, str) else value


class Quality(Sampled):
    """Offline metrics on held-out rows (`data`, a parquet file with the column `label`).

    Checks are `<metric>`, or `<metric>_delta` for challenger minus champion on the same rows; with `slice_`
    before them they speak of the worst slice of the columns `slices`, of those with `min_slice` rows.
    `functions` are metrics of the user's own, by name; together they may take `timeout`. `classes` are the
    labels in the order of the columns that a classifier answers, where sorting them does not give it.
    """

    METRICS: ClassVar = (
        "scored",
        *(f"{metric}{suffix}" for metric in OFFLINE_METRICS for suffix in ("", "_delta")),
    )
    DEFAULTS: ClassVar = {"scored": Fact}
    kind: Literal["quality"] = "quality"
    data: str
    label: str
    checks: dict[str, Bound] = Field(min_length=1)
    min_sample: int = Field(default=100, ge=1)
    classes: tuple[str | int, ...] = ()
    slices: tuple[str, ...] = ()
    min_slice: int = Field(default=50, ge=2)
    functions: dict[str, Annotated[Function, BeforeValidator(_function)]] = {}
    timeout: Duration = timedelta(minutes=5)

    @field_validator("checks")
    @classmethod
    def _known(cls, checks: dict[str, Bound]) -> dict[str, Bound]:
        return checks  # they may name `functions`, so `_metrics_known` looks at them

    @field_validator("functions")
    @classmethod
    def _names_free(cls, functions: dict[str, Function]) -> dict[str, Function]:
        for name in functions:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
                refuse(f"'{name}' becomes the name of a check: use letters, digits and _")
            if name == "scored" or name in OFFLINE_METRICS or name in METRIC_ALIASES:
                refuse(f"'{name}' is built in: give your function another name")
            if is_comparison(name) or name.startswith("slice_") or name.endswith("_champion"):
                refuse(f"'{name}': `slice_`, `_delta`, `_ratio` and `_champion` are put there by the gate")
        return functions

    @model_validator(mode="after")
    def _metrics_known(self) -> Self:
        known = [*OFFLINE_METRICS, *METRIC_ALIASES, *self.functions]
        for check in self.checks:
            metric = offline_metric(check)
            if check == "scored" or metric in known:
                continue
            if metric == "max_error":
                refuse("`max_error` hangs on a single row, so no sample bounds it: take `rmse` or `mae`")
            near = nearest(metric, ["scored", *known])
            near = near.replace("'", f"'{check[: check.index(metric)]}", 1).replace("'?", f"{_suffix(check)}'?")
            refuse(
                f"no such check here: '{check}'{near} (this gate knows: {', '.join(['scored', *OFFLINE_METRICS])} and "
                "its `functions`; with `_delta` behind, and `slice_` before)"
            )
        sliced = [check for check in self.checks if check.startswith("slice_")]
        if sliced and not self.slices:
            refuse(f"`{sliced[0]}` needs `slices`: the columns of `data` to split by")
        if self.slices and not sliced:
            refuse(
                f"no check looks at the `slices`: name one that begins with `slice_`, "
                f"like slice_{next(iter(self.checks))}"
            )
        return self

    def better(self, metric: str) -> Better:
        """Which way `metric` (without `slice_` and `_delta`) is better."""
        own = self.functions.get(metric)
        return own.better if own else OFFLINE_METRICS[METRIC_ALIASES.get(metric, metric)]


def offline_metric(check: str) -> str:
    """The metric that a check of the quality gate is about: `slice_f1_delta` -> `f1`."""
    return check.removeprefix("slice_").removesuffix("_delta")


def _suffix(check: str) -> str:
    return "_delta" if check.endswith("_delta") else ""


class Shadow(Looked):
    """A copy of `mirror` percent of the live requests; answers are compared in pairs, then dropped.

    Answers agree within `tolerances` (by field; "*" is every other field). `slices` are request columns
    by which disagreement is split; with `find_slices` all others are, too, the numbers among them cut into ranges; a
    slice counts from `min_slice` pairs on. Of each value of the column `once_per` (a session, a user) only the first
    pair counts. What is called in `redact` is blotted out of everything that is kept. `keep_pairs` pairs are kept for
    labels that come later, which `labelled` is then judged with. Where live requests get slower than `max_slowdown`
    times what they were, or fail, copying ends. Ends when every check is decided, at `max` at the latest.
    """

    METRICS: ClassVar = (
        *("disagreement", "slice_disagreement"),
        *LIVE_METRICS,
        *LATENCY_METRICS,
    )
    COMPARES: ClassVar = True
    kind: Literal["shadow"] = "shadow"
    mirror: Percent = 100.0
    tolerances: dict[str, Tolerance] = {}
    slices: tuple[str, ...] = ()
    find_slices: bool = False
    min_slice: int = Field(default=30, ge=1)
    once_per: str = ""
    redact: tuple[str, ...] = ()
    keep_pairs: int = Field(default=20_000, ge=0)
    labelled: dict[str, Bound] = {}
    label_kind: Literal["auto", "class", "probability", "number"] = "auto"
    max_slowdown: float = Field(default=1.5, gt=1, le=100)
    min_sample: int = Field(default=200, ge=1)
    max: Duration = timedelta(minutes=10)

    @model_validator(mode="after")
    def _slices_named(self) -> Self:
        if "slice_disagreement" in self.checks and not (self.slices or self.find_slices):
            refuse("`slice_disagreement` needs `slices`: the request columns to split by, or `find_slices: true`")
        return self

    @field_validator("tolerances")
    @classmethod
    def _compares_something(cls, tolerances: dict[str, Tolerance]) -> dict[str, Tolerance]:
        everything = tolerances.get("*")
        if everything and everything.ignore and all(tolerance.ignore for tolerance in tolerances.values()):
            refuse("every field is ignored, so nothing is compared: name a field that is not")
        return tolerances

    @field_validator("labelled")
    @classmethod
    def _known_to_labels(cls, labelled: dict[str, Bound]) -> dict[str, Bound]:
        for metric in labelled:
            if metric not in LABEL_METRICS:
                refuse(
                    f"no such check on labels: '{metric}'{nearest(metric, LABEL_METRICS)} "
                    f"(there are: {', '.join(LABEL_METRICS)})"
                )
        return labelled

    @model_validator(mode="after")
    def _pairs_for_labels(self) -> Self:
        if self.labelled and not self.keep_pairs:
            refuse("`labelled` needs pairs to join the labels with: `keep_pairs` is 0 here")
        return self


class Load(Sampled):
    """Locust, open loop: challenger and champion at `rate` each, under one profile in one run; or, with
    `find: capacity`, the highest rate between `from` and `to` that keeps the bounds, for each by itself.

    Requests are recent live ones, or those of `payloads` (a file with one JSON body a line). `arrivals` says
    when they come; the `recorded` ones come with the gaps they had. The requests are spread over `workers` processes.
    """

    model_config = ConfigDict(serialize_by_alias=True)
    METRICS: ClassVar = (*ERROR_METRICS, *LATENCY_METRICS, *CAPACITY_METRICS, *GENERATOR_METRICS)
    DEFAULTS: ClassVar = {"generator_lateness_ms": Bound(max=100)}
    kind: Literal["load"] = "load"
    rate: Rate | None = None
    run_time: Duration
    arrivals: Literal["constant", "poisson", "recorded"] = "constant"
    request_timeout: Duration = timedelta(seconds=10)
    payloads: str | None = None
    workers: int = Field(default=1, ge=1, le=50)
    find: Literal["capacity"] | None = None
    start: Rate | None = Field(default=None, alias="from")
    to: Rate | None = None
    precision: Share = 0.1
    min_sample: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _about_the_versions(self) -> Self:
        if not self.checks.keys() - set(GENERATOR_METRICS):
            known = ", ".join(metric for metric in self.METRICS if metric not in GENERATOR_METRICS)
            refuse(f"a gate without checks proves nothing: give `checks` (of: {known})")
        for metric in GENERATOR_METRICS:
            if metric in self.checks and self.checks[metric].max is None:
                refuse(f"`{metric}` is better when smaller: give it a `max`")
        return self

    @model_validator(mode="after")
    def _one_rate_or_a_search(self) -> Self:
        if self.find is None:
            if self.start is not None or self.to is not None:
                refuse("`from` and `to` belong to a search: add `find: capacity`, or give one `rate`")
            if self.rate is None and self.arrivals != "recorded":
                refuse("`rate` is missing: give it, or `find: capacity`, or replay requests with `arrivals: recorded`")
            if asked := [metric for metric in CAPACITY_METRICS if metric in self.checks]:
                refuse(f"`{asked[0]}` is what a search finds: add `find: capacity`, with `from` and `to`")
        elif self.rate is not None:
            refuse("a search chooses its rates: give `from` and `to`, and no `rate`")
        elif self.start is None or self.to is None:
            refuse("a search needs its first rate and its highest: give `from` and `to`, like 10/s and 500/s")
        elif self.start > self.to:
            refuse(f"a search goes up: `from` is {self.start:g}/s and `to` is {self.to:g}/s")
        return self

    @model_validator(mode="after")
    def _search_can_find(self) -> Self:
        if self.find is None:
            return self
        kept = self.kept_bounds()
        if not kept:
            refuse("what shall hold at the highest rate? give absolute checks too: `error_rate` or `pNN_ms`")
        if not any(metric in self.checks for metric in CAPACITY_METRICS):
            refuse("nothing asks what the search finds: give `capacity: { min: ... }`, or `capacity_ratio`")
        for metric in self.checks:
            if metric != "capacity_ratio" and is_comparison(metric):
                refuse(f"`{metric}` compares at one rate, and a search has many: give it a load gate with a `rate`")
        wanted = self.checks["capacity"].min if "capacity" in self.checks else None
        if wanted is not None and self.to is not None and wanted > self.to:
            refuse(f"no search up to {self.to:g}/s proves a capacity of {wanted:g}/s: raise `to`")
        first = math.floor((self.start or 0) * self.run_time.total_seconds() + 1e-9)
        needed = max(self.min_sample, *(self._needed(metric, bound) for metric, bound in kept.items()))
        if math.isinf(needed):
            refuse("an `error_rate` of 0 is never proven by a sample: give a `max` above 0")
        if first < needed:
            refuse(
                f"{self.start:g}/s for {duration_text(self.run_time)} are {first:,} requests, and the checks need "
                f"{needed:,}: give a longer `run_time`, a higher `from` or a wider bound"
            )
        return self

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        seconds = self.run_time.total_seconds()
        requests = (self.rate or 0) * seconds
        if self.find is not None:
            # At worst every doubling holds up to `to`, and the rest is tried there: the doublings are twice `to`.
            requests = (2 + self._halvings()) * (self.to or 0) * seconds * self.searches
            longest = self.probes * (self.run_time + self.request_timeout) * self.searches
            if longest > LONGEST_SEARCH:
                refuse(
                    f"this search may take {minutes(longest)} (up to {self.probes * self.searches} runs), more than "
                    f"{minutes(LONGEST_SEARCH)}: give a shorter `run_time`, a higher `from` or a wider `precision`"
                )
        if requests > MOST_REQUESTS:
            refuse(
                f"this may be {requests:,.0f} requests, more than {MOST_REQUESTS:,}: give a shorter `run_time` "
                f"or a lower {'`to`' if self.find else '`rate`'}"
            )
        each = ((self.to or 0) if self.find else 2 * (self.rate or 0)) * seconds / self.workers
        if self.workers > 1 and each > MOST_OF_A_WORKER:
            refuse(
                f"each of {self.workers} workers would have {each:,.0f} requests, and keeps {MOST_OF_A_WORKER:,}: "
                "give more `workers`, or a shorter `run_time`"
            )
        return self

    def kept_bounds(self) -> dict[str, Bound]:
        """The absolute checks, which speak of one version by itself: those that a capacity keeps."""
        names = ("error_rate", *(metric for metric in LATENCY_METRICS if metric.endswith("_ms")))
        return {metric: bound for metric, bound in self.checks.items() if metric in names}

    def falls_away(self) -> bool:
        """Where nothing but the generator is left to look at."""
        return not self.bounds(first=True).keys() - set(GENERATOR_METRICS)

    @property
    def searches(self) -> int:
        """How many versions are searched: the champion only where it is compared with."""
        return 2 if "capacity_ratio" in self.checks else 1

    @property
    def probes(self) -> int:
        """How many runs the search of one version makes at the most: the doublings, then the halvings."""
        if self.start is None or self.to is None:
            return 1
        return math.ceil(math.log2(self.to / self.start) - 1e-9) + 1 + self._halvings()

    @property
    def probe_confidence(self) -> float:
        """The confidence of one interval in one run of a search, so that all of them together keep the gate's
        (Boole: the error probability is split evenly over runs and bounds).
        """
        return 1 - (1 - self.confidence) / (self.probes * self.searches * max(len(self.kept_bounds()), 1))

    def _halvings(self) -> int:
        # The bracket is a doubling at most, and each halving takes the square root of its ratio.
        return max(0, math.ceil(math.log2(math.log(2) / math.log1p(self.precision)) - 1e-9))

    def _needed(self, metric: str, bound: Bound) -> float:
        """The requests without which no outcome of one run could prove the bound: then the share of good ones
        that it asks for is exceeded by chance alone (q ** n > alpha / 2).
        """
        if bound.max is None:
            return 1
        share = 1 - bound.max if metric == "error_rate" else int(metric[1:3]) / 100
        if not 0 < share < 1:
            return math.inf if share >= 1 else 1
        return math.ceil(math.log((1 - self.probe_confidence) / 2) / math.log(share))


class Approval(BaseGate):
    """`quorum` of the `approvers` say yes and none says no, within `timeout`.

    With `four_eyes` who asked for the promotion has no say in it. Where time runs out before, the verdict is
    `expired`: the promotion stops either way, and `failed` quarantines the version.
    """

    METRICS: ClassVar = ("approvals", "objections")
    kind: Literal["approval"] = "approval"
    approvers: tuple[str, ...] = Field(min_length=1)
    quorum: int = Field(default=1, ge=1)
    four_eyes: bool = True
    timeout: Duration = timedelta(hours=24)
    expired: Literal["inconclusive", "failed"] = "inconclusive"

    @field_validator("checks")
    @classmethod
    def _known(cls, checks: dict[str, Bound]) -> dict[str, Bound]:
        if checks:
            refuse("an approval has no checks: say with `approvers` and `quorum` who must agree")
        return checks

    @field_validator("approvers")
    @classmethod
    def _once(cls, approvers: tuple[str, ...]) -> tuple[str, ...]:
        for name in approvers:
            if approvers.count(name) > 1:
                refuse(f"'{name}' stands here twice, and has one say")
        return approvers

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.quorum > len(self.approvers):
            refuse(f"`quorum` is {self.quorum}, and there are {len(self.approvers)} approvers")
        return self

    def bounds(self, *, first: bool = False) -> dict[str, Bound]:  # noqa: ARG002 - people compare nothing
        """Enough approvals, and no objection."""
        return {"approvals": Bound(min=self.quorum), "objections": Bound(max=0)}


class Canary(Looked):
    """Live requests, a growing share: one step per weight (percent), for `max` at the most each.

    At the last weight below 100 (`deciding`) every check is decided. The steps before only limit the exposure: each
    lasts for `min_sample` requests and `dwell`, and moves on while the ledger speaks for it. Evidence goes on from step
    to step.
    `weights: [100]` alone is blue-green.
    """

    METRICS: ClassVar = (*LIVE_METRICS, *LATENCY_METRICS)
    COMPARES: ClassVar = True
    kind: Literal["canary"] = "canary"
    weights: tuple[Percent, ...] = Field(min_length=1)
    min_sample: int = Field(default=100, ge=1)
    dwell: Duration | None = None
    max: Duration = timedelta(minutes=30)

    @property
    def deciding(self) -> float:
        """The weight from which on every check must be decided: the last one at which both versions answer."""
        return max((weight for weight in self.weights if weight < 100), default=100)

    @field_validator("weights")
    @classmethod
    def _grow(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        for before, after in itertools.pairwise(weights):
            if after <= before:
                refuse(f"weights grow: {after:g} comes after {before:g}")
        for weight in weights:
            if abs(round(weight * 100) - weight * 100) > 1e-9:
                refuse(f"weight {weight:g}: hundredths of a percent are the finest there is")
        return weights


class Watch(Looked):
    """After the promotion: `run_time` of live traffic with the previous champion warm; a regression
    brings it back. With a `holdback` (percent of live requests) the previous champion answers these meanwhile, and is
    compared with at the same time; without, with what it did before the cut-over.
    """

    METRICS: ClassVar = (*LIVE_METRICS, *LATENCY_METRICS)
    COMPARES: ClassVar = True
    kind: Literal["watch"] = "watch"
    run_time: Duration
    holdback: float = Field(default=0.0, ge=0, le=50)
    min_sample: int = Field(default=100, ge=1)

    @property
    def after_promote(self) -> bool:
        """Always."""
        return True


class Outside(BaseGate):
    """What the gates that ask a `command` or a `url` have in common: they tell it `parameters`, and what is known."""

    command: tuple[str, ...] = ()
    url: str | None = None
    parameters: dict[str, JsonValue] = {}

    @field_validator("command", mode="before")
    @classmethod
    def _no_shell(cls, command: object) -> object:
        if isinstance(command, str):
            refuse(f"a command is a list of words, for there is no shell: [{', '.join(command.split())}]")
        return command

    @field_validator("parameters", mode="before")
    @classmethod
    def _survive_json(cls, parameters: object) -> object:
        try:
            json.dumps(parameters, allow_nan=False)
        except (TypeError, ValueError):
            refuse("they travel as JSON, which has no dates, no .inf and no .nan: write such a value as 'text'")
        return parameters

    @field_validator("url")
    @classmethod
    def _web(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"https?://[^/\s]", url):
            refuse(f"'{url}' is no address: it begins with http:// or https://")
        return url


class Hook(Outside):
    """Something of the user's that is done before the promotion or `after` it: a `command`, or a `url` that is posted
    to; exactly one. It is told model, challenger, champion, addresses, the verdicts so far and `parameters`, and has
    `timeout` to succeed.
    """

    METRICS: ClassVar = ("succeeded",)
    DEFAULTS: ClassVar = {"succeeded": Fact}
    kind: Literal["hook"] = "hook"
    when: Literal["before", "after"] = "before"
    timeout: Duration = timedelta(minutes=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.command) == bool(self.url):
            refuse(f"a hook has a `command` or a `url`: here {'are both' if self.url else 'is none'}")
        return self

    @property
    def after_promote(self) -> bool:
        """Where the policy says so (`when: after`)."""
        return self.when == "after"


class Custom(Sampled, Outside):
    """Measurements from outside: a Python `function` (`file.py:name`), a `command` or a `url`; exactly one.

    It is told model, challenger, champion, addresses and `parameters`, and has `timeout` to answer with the
    metrics that `checks` bound. With `deployed` it is given the challenger deployed, at an address.
    """

    kind: Literal["custom"] = "custom"
    function: str | None = None
    timeout: Duration = timedelta(minutes=5)
    deployed: bool = False
    checks: dict[str, Bound] = Field(min_length=1)

    @field_validator("checks")
    @classmethod
    def _known(cls, checks: dict[str, Bound]) -> dict[str, Bound]:
        for metric in checks:
            if not re.fullmatch(r"[A-Za-z0-9_]+", metric):
                refuse(f"'{metric}': a metric's name is of letters, digits and _")
        return checks

    @field_validator("function")
    @classmethod
    def _names_one(cls, function: str | None) -> str | None:
        return None if function is None else _function_path(function)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [word for word in ("function", "command", "url") if getattr(self, word)]
        if len(given) != 1:
            found = " and ".join(f"`{word}`" for word in given) or "none"
            refuse(f"a custom gate has exactly one of `function`, `command` and `url`: here is {found}")
        return self

    @property
    def needs_serving(self) -> bool:
        """Where the policy says so (`deployed: true`)."""
        return self.deployed


Gate = Integrity | Schema | Features | Quality | Shadow | Load | Approval | Hook | Canary | Watch | Custom


GATES: dict[str, type[Gate]] = {
    gate.model_fields["kind"].default: gate
    for gate in (Integrity, Schema, Features, Quality, Shadow, Load, Approval, Hook, Canary, Watch, Custom)
}


SERVING = (Shadow, Load, Canary)
"""The kinds of gate that always need the challenger deployed."""

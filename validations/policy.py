"""The policy: which gates, in which order, with which bounds; read from YAML, refused where it is unclear.

Pure: `read` takes text. The policy is the plan: `plan()` lists the steps that will run.
"""

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from validations.verdict import Bound, Value


class PolicyError(ValueError):
    """The policy cannot be used; the message is one line: where, what, and how to mend it."""


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(value: object) -> object:
    if not isinstance(value, str):
        return value if isinstance(value, timedelta) else _refuse("a duration is written like 30s, 10m, 24h")
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value)
    if not parts or "".join(number + unit for number, unit in parts) != value.strip():
        _refuse(f"'{value}' is no duration: write it like 30s, 10m, 1h30m, 24h")
    return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in parts))


def _duration_text(value: timedelta) -> str:
    seconds = value.total_seconds()
    for unit in ("d", "h", "m"):
        if seconds and seconds % _UNITS[unit] == 0:
            return f"{int(seconds // _UNITS[unit])}{unit}"
    return f"{seconds:g}s"


def _rate(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*([smh])\s*", str(value))
    if match is None:
        return _refuse(f"'{value}' is no rate: write it like 100/s or 300/m")
    return float(match[1]) / _UNITS[match[2]]


def _refuse(message: str) -> object:
    raise PydanticCustomError("titleshot", "{text}", {"text": message})


Duration = Annotated[
    timedelta,
    BeforeValidator(_duration),
    PlainSerializer(_duration_text, return_type=str),
    Field(gt=timedelta(0)),
]
"""A length of time in a policy: `30s`, `10m`, `1h30m`, `24h`."""

Rate = Annotated[float, BeforeValidator(_rate), PlainSerializer(lambda r: f"{r!r}/s", return_type=str), Field(gt=0)]
"""Requests per second; written `100/s`, `300/m`."""

Percent = Annotated[float, Field(ge=0.01, le=100)]
"""A share of the traffic; a hundredth of a percent is the finest there is."""
Fact = Bound(min=1)
ERROR_METRICS = ("error_rate", "error_rate_delta")
LATENCY_METRICS = tuple(f"p{q}_{kind}" for kind in ("ms", "ratio") for q in (50, 90, 95, 99))
OFFLINE_METRICS = (
    *("roc_auc", "average_precision", "accuracy", "balanced_accuracy", "f1", "precision", "recall"),
    *("log_loss", "brier", "r2", "rmse", "mae"),
)


class Tolerance(Value):
    """How far two numbers may lie apart and still agree: |a - b| <= abs + rel * |a|."""

    abs: float = Field(default=0.0, ge=0)
    rel: float = Field(default=0.0, ge=0)


class _Gate(Value):
    """What every gate has. `checks` given in the file are laid over the gate's own defaults."""

    METRICS: ClassVar[tuple[str, ...]] = ()
    DEFAULTS: ClassVar[dict[str, Bound]] = {}
    COMPARES: ClassVar[bool] = False
    """Whether the gate makes sense only against a champion."""

    name: str = Field(default="", max_length=40)
    checks: dict[str, Bound] = {}
    min_sample: int = Field(default=1, ge=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9 _-]*", name):
            _refuse(f"'{name}' names files too: use letters, digits, spaces, - and _")
        return name

    @field_validator("checks")
    @classmethod
    def _known(cls, checks: dict[str, Bound]) -> dict[str, Bound]:
        for metric in checks:
            if metric not in cls.METRICS:
                _refuse(
                    f"no such check here: '{metric}'{_nearest(metric, cls.METRICS)} "
                    f"(this gate knows: {', '.join(cls.METRICS)})"
                )
        return checks

    @model_validator(mode="after")
    def _proves_something(self) -> Self:
        if not self.bounds():
            _refuse(f"a gate without checks proves nothing: give `checks` (of: {', '.join(self.METRICS)})")
        return self

    def bounds(self, *, first: bool = False) -> dict[str, Bound]:
        """The checks in force; without a champion (`first`) those that compare with one fall away."""
        # The policy's own come first: what people asked for is what the verdict's sentence speaks of.
        merged = {**self.checks, **{m: b for m, b in self.DEFAULTS.items() if m not in self.checks}}
        return {metric: b for metric, b in merged.items() if not (first and is_comparison(metric))}

    def falls_away(self) -> bool:
        """Whether there is nothing for this gate to do while there is no champion."""
        return self.COMPARES or not self.bounds(first=True)


def is_comparison(metric: str) -> bool:
    """Whether `metric` sets the challenger against the champion."""
    return metric.endswith(("_delta", "_ratio", "disagreement"))


class Integrity(_Gate):
    """The artifact is the one that was registered, holds no unsafe serialisation, loads and answers."""

    METRICS: ClassVar = ("digest_matches", "unsafe_files", "answers_example")
    DEFAULTS: ClassVar = {"digest_matches": Fact, "unsafe_files": Bound(max=0), "answers_example": Fact}
    kind: Literal["integrity"] = "integrity"


class Schema(_Gate):
    """Every request that the champion accepts is accepted, and answered in the same shape."""

    METRICS: ClassVar = ("breaking_changes",)
    DEFAULTS: ClassVar = {"breaking_changes": Bound(max=0)}
    COMPARES: ClassVar = True
    kind: Literal["schema"] = "schema"


class Features(_Gate):
    """The challenger's reference features and a sample of live requests meet an expectation suite.

    `suite` is a JSON file beside the policy; without it the suite is generated from the champion's
    reference features, without the columns of `exclude` (those that are meant to move). `reference` is a
    parquet file; without it the version's run must hold `reference/features.parquet`.
    `live_sample` live requests are looked at (0: none).
    """

    METRICS: ClassVar = ("unmet_expectations", "unmet_live_expectations")
    DEFAULTS: ClassVar = {"unmet_expectations": Bound(max=0)}
    kind: Literal["features"] = "features"
    suite: str | None = None
    exclude: tuple[str, ...] = ()
    reference: str | None = None
    live_sample: int = Field(default=300, ge=0)

    def bounds(self, *, first: bool = False) -> dict[str, Bound]:
        """Also the live check, where a live sample is asked for and there is live traffic."""
        bounds = super().bounds(first=first)
        if self.live_sample and not first:
            bounds.setdefault("unmet_live_expectations", Bound(max=0))
        else:
            bounds.pop("unmet_live_expectations", None)
        return bounds

    @model_validator(mode="after")
    def _live_is_sampled(self) -> Self:
        if "unmet_live_expectations" in self.checks and not self.live_sample:
            _refuse("`unmet_live_expectations` needs a `live_sample`: it is 0 here")
        return self

    def falls_away(self) -> bool:
        """Without a champion there is nothing to generate a suite from."""
        return self.suite is None


class Quality(_Gate):
    """Offline metrics on held-out rows (`data`, a parquet file with the column `label`).

    Checks are `<metric>`, or `<metric>_delta` for challenger minus champion on the same rows.
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


class Shadow(_Gate):
    """A copy of `mirror` percent of the live requests; answers are compared in pairs, then dropped.

    Numbers agree within `tolerances` (by field; "*" is every other field). `slices` are request columns
    by which disagreement is split; a slice counts from `min_slice` pairs on. Ends when every check is
    decided, at `max` at the latest.
    """

    METRICS: ClassVar = (
        *("disagreement", "slice_disagreement"),
        *ERROR_METRICS,
        *LATENCY_METRICS,
    )
    COMPARES: ClassVar = True
    kind: Literal["shadow"] = "shadow"
    mirror: Percent = 100.0
    tolerances: dict[str, Tolerance] = {}
    slices: tuple[str, ...] = ()
    min_slice: int = Field(default=30, ge=1)
    min_sample: int = Field(default=200, ge=1)
    max: Duration = timedelta(minutes=10)

    @model_validator(mode="after")
    def _slices_named(self) -> Self:
        if "slice_disagreement" in self.checks and not self.slices:
            _refuse("`slice_disagreement` needs `slices`: the request columns to split by")
        return self


class Load(_Gate):
    """Locust, open loop: challenger and champion at `rate` each, under one profile in one run.

    Requests are recent live ones, or those of `payloads` (a file with one JSON body a line).
    """

    METRICS: ClassVar = (*ERROR_METRICS, *LATENCY_METRICS)
    kind: Literal["load"] = "load"
    rate: Rate
    run_time: Duration
    request_timeout: Duration = timedelta(seconds=10)
    payloads: str | None = None
    min_sample: int = Field(default=100, ge=1)


class Approval(_Gate):
    """A person says yes, within `timeout`."""

    METRICS: ClassVar = ("approved",)
    DEFAULTS: ClassVar = {"approved": Fact}
    kind: Literal["approval"] = "approval"
    approvers: tuple[str, ...] = Field(min_length=1)
    timeout: Duration = timedelta(hours=24)


class Canary(_Gate):
    """Live requests, a growing share: one step per weight (percent), held until its checks are decided,
    for `max` at the most. `weights: [100]` alone is blue-green.
    """

    METRICS: ClassVar = (*ERROR_METRICS, *LATENCY_METRICS)
    COMPARES: ClassVar = True
    kind: Literal["canary"] = "canary"
    weights: tuple[Percent, ...] = Field(min_length=1)
    min_sample: int = Field(default=100, ge=1)
    max: Duration = timedelta(minutes=30)

    @field_validator("weights")
    @classmethod
    def _grow(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        for before, after in itertools.pairwise(weights):
            if after <= before:
                _refuse(f"weights grow: {after:g} comes after {before:g}")
        for weight in weights:
            if abs(round(weight * 100) - weight * 100) > 1e-9:
                _refuse(f"weight {weight:g}: hundredths of a percent are the finest there is")
        return weights


class Watch(_Gate):
    """After the promotion: `run_time` of live traffic with the previous champion warm; a regression
    brings it back. Ratios and deltas compare with the previous champion while it still served.
    """

    METRICS: ClassVar = (*ERROR_METRICS, *LATENCY_METRICS)
    COMPARES: ClassVar = True
    kind: Literal["watch"] = "watch"
    run_time: Duration
    min_sample: int = Field(default=100, ge=1)


Gate = Integrity | Schema | Features | Quality | Shadow | Load | Approval | Canary | Watch
GATES: dict[str, type[Gate]] = {
    gate.model_fields["kind"].default: gate
    for gate in (Integrity, Schema, Features, Quality, Shadow, Load, Approval, Canary, Watch)
}
SERVING = (Shadow, Load, Canary)
"""The gates that need the challenger deployed."""


class Step(Value):
    """One entry of the plan. `gate` is its place in the policy, None for deploy, promote and rollback;
    `weight` is a canary's share of live requests, in percent.
    """

    name: str
    kind: str
    gate: int | None = None
    weight: float | None = None


ACTIONS: dict[str, dict[str, Bound]] = {
    "deploy": {"ready": Fact},
    "promote": {"agreement": Fact},
    "rollback": {"agreement": Fact},
}
"""The steps that no gate asks for, and what each must show: the challenger is ready; traffic and registry
agree."""

ROLLBACK = Step(name="rollback", kind="rollback")


class Policy(Value):
    """What is good enough for one model. Where things are is settings, never policy."""

    version: Literal[1]
    model: str = Field(min_length=1)
    target: Literal["local"] = "local"
    gates: tuple[Annotated[Gate, Field(discriminator="kind")], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        watching = False
        for gate in self.gates:
            if watching and not isinstance(gate, Watch):
                _refuse(f"`{gate.kind}` comes after `watch`: a watch follows the promotion, so it is last")
            watching = isinstance(gate, Watch)
        # A gate that bears an action's name would be taken for it: `rollback` for one that was done.
        names = [ROLLBACK.name, *(step.name for step in self.plan())]
        for name in names:
            if names.count(name) > 1:
                _refuse(f"two steps are called '{name}': give one of the gates another `name`")
        return self

    def plan(self, *, first: bool = False) -> tuple[Step, ...]:
        """The steps in order. With no champion yet (`first`) the gates that compare fall away."""
        return tuple(self._steps(first=first))

    def _steps(self, *, first: bool) -> Iterator[Step]:
        deployed = promoted = False
        for index, gate in enumerate(self.gates):
            if first and gate.falls_away():
                continue
            if isinstance(gate, SERVING) and not deployed:
                deployed = True
                yield Step(name="deploy", kind="deploy")
            if isinstance(gate, Watch) and not promoted:
                yield from self._promote(deployed=deployed)
                deployed = promoted = True
            name = gate.name or gate.kind
            if isinstance(gate, Canary):
                for weight in gate.weights:
                    yield Step(name=f"{name} {weight:g}%", kind=gate.kind, gate=index, weight=weight)
            else:
                yield Step(name=name, kind=gate.kind, gate=index)
        if not promoted:
            yield from self._promote(deployed=deployed)

    @staticmethod
    def _promote(*, deployed: bool) -> Iterator[Step]:
        if not deployed:
            yield Step(name="deploy", kind="deploy")
        yield Step(name="promote", kind="promote")

    def bounds(self, step: Step, *, first: bool = False) -> dict[str, Bound]:
        """What `step` must show."""
        return ACTIONS[step.kind] if step.gate is None else self.gates[step.gate].bounds(first=first)

    def min_sample(self, step: Step) -> int:
        """The smallest sample that `step` is judged on."""
        return 1 if step.gate is None else self.gates[step.gate].min_sample

    @property
    def digest(self) -> str:
        """The policy's own digest: of its canonical form, so that comments and order of keys are free."""
        return "sha256:" + hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read(text: str, source: str = "policy") -> Policy:
    """Read a policy from YAML. `source` (a file name) begins the message of the `PolicyError` raised for
    whatever is not a policy: unknown words, bounds that bound nothing, gates without checks, ...
    """
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise PolicyError(f"{source}{place}: not YAML: {problem}") from error
    if tree is None or not isinstance(data, dict):
        raise PolicyError(f"{source}: a policy is a mapping that begins with `version: 1` and `model: ...`")
    _refuse_twice(tree, source)
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        # A misspelt word is the likeliest cause of a missing one, so it is told first.
        # An empty list behind a refused item is pydantic's echo of it.
        told = [e for e in error.errors() if e["type"] != "too_short"] or error.errors()
        first = min(told, key=lambda e: e["type"] != "extra_forbidden")
        path = _path(first["loc"])
        line = _line(tree, path)
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
        message = _sentence(first, data)
        raise PolicyError(f"{source}:{line}: {where + ': ' if where else ''}{message}{more}") from error


def _path(loc: tuple[int | str, ...]) -> list[int | str]:
    """The way into the file: pydantic's own, less the union tags it puts in."""
    if len(loc) > 2 and loc[0] == "gates":
        return [loc[0], loc[1], *loc[3:]]
    return list(loc)


def _sentence(error: Any, data: dict[str, Any]) -> str:
    loc = error["loc"]
    if error["type"] == "extra_forbidden":
        owner: Any = Policy
        if loc[0] == "gates" and len(loc) > 3:
            owner = GATES[str(loc[2])]
            if len(loc) > 4:
                owner = Tolerance if loc[3] == "tolerances" else Bound
        words = [name for name in owner.model_fields if name != "name"]
        return f"unknown word '{loc[-1]}'{_nearest(str(loc[-1]), words)}"
    if error["type"] == "union_tag_invalid":
        kind = data["gates"][loc[1]].get("kind")
        return f"no such kind of gate: '{kind}'{_nearest(str(kind), list(GATES))} (there are: {', '.join(GATES)})"
    if error["type"] == "union_tag_not_found":
        return f"a gate needs its `kind` (one of: {', '.join(GATES)})"
    if error["type"] == "model_type" and loc[-2:-1] == ("checks",):
        number = error["input"] if isinstance(error["input"], int | float) else "0.05"
        return f"a bound is written like {{ max: {number} }} or {{ min: {number} }}"
    if error["type"] == "missing":
        return f"`{loc[-1]}` is missing"
    return str(error["msg"]).removeprefix("Value error, ")


def _nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _line(node: Any, path: list[int | str]) -> int:
    """The line (from 1) of the place that `path` names, or of the nearest one above it."""
    line = node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return int(line)


def _refuse_twice(node: Any, source: str) -> None:
    """YAML keeps the last of two equal keys without a word; a policy may not."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, source)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise PolicyError(f"{source}:{line}: '{key.value}' stands here twice: keep one")
            seen.add(key.value)
            _refuse_twice(value, source)

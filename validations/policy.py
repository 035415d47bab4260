"""The policy: which gates, in which order, with which bounds; read from YAML, refused where it is unclear.

Pure: `read` takes text. The policy is the plan: `plan()` lists the steps that will run.
"""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from validations.gates import GATES, Canary, Fact, Freshness, Function, Gate, Hook, Load, Looked, Tolerance
from validations.quiet import Quiet
from validations.traffic import Shaping, record, shape_of
from validations.units import Chance, Duration, nearest, refuse
from validations.verdict import Bound, Value
from validations.waves import Place, Waves


def _place_or_waves(given: object) -> str:
    return "waves" if isinstance(given, dict | Waves) else "place"


Target = Annotated[Annotated[Place, Tag("place")] | Annotated[Waves, Tag("waves")], Discriminator(_place_or_waves)]


class PolicyError(ValueError):
    """The policy cannot be used; the message is one line: where, what, and how to mend it."""


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
    """What is good enough for one model. Where things are is settings, never policy.

    `false_rollback` is the chance that a whole promotion stops a challenger that is within every bound, over all
    checks that are looked at again and again, all steps and all looks together; `false_promotion` the chance that one
    which breaks a bound is promoted. `traffic` is what is asked of live requests besides weights (None: what is in
    force stays), `rollback_within` how long a rollback may take, `keep_previous` how long the previous champion stays
    warm after a promotion (None: until the next one). `trigger` is the registry's event that starts a promotion by
    itself, `quiet` when no live request is given to a challenger, and `follow_alias` lets the traffic follow an alias
    champion that a hand has moved.
    """

    version: Literal[1]
    model: str = Field(min_length=1)
    target: Target = "local"
    false_rollback: Chance = 0.05
    false_promotion: Chance = 0.05
    traffic: Shaping | None = None
    rollback_within: Duration | None = None
    keep_previous: Duration | None = None
    trigger: Literal["alias", "tag", "version", "hand"] = "alias"
    quiet: tuple[Quiet, ...] = ()
    follow_alias: bool = False
    gates: tuple[Annotated[Gate, Field(discriminator="kind")], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        after = ""
        for index, gate in enumerate(self.gates):
            if after and not gate.after_promote:
                mend = "give it `when: after`" if isinstance(gate, Hook) else "put it before"
                refuse(
                    f"`{gate.kind}` comes after `{after}`, which follows the promotion, so it is last: {mend}",
                    "gates",
                    index,
                )
            if gate.after_promote:
                after = gate.kind
        if isinstance(self.target, Waves) and not self._repeated(self.target):
            refuse(
                f"no gate of this policy is of a kind in its target's `again` ({', '.join(self.target.again)}), so "
                "further regions would prove nothing: add a canary, or name kinds that are there",
                "target",
                "again",
            )
        # A gate that bears an action's name would be taken for it: `rollback` for one that was done.
        taken = {ROLLBACK.name: ROLLBACK}
        for step in self.plan():
            if (other := taken.setdefault(step.name, step)) is not step:
                place = (other.gate if step.gate is None else step.gate) or 0
                refuse(f"two steps are called '{step.name}': give one of the gates another `name`", "gates", place)
        return self

    def _repeated(self, waves: Waves) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.gates if gate.kind in waves.again)

    @property
    def place(self) -> Place:
        """What kind of target serves the model, be it in one region or in several."""
        return self.target.kind if isinstance(self.target, Waves) else self.target

    def in_region(self, *, further: bool) -> "Policy":
        """The policy of one region: all gates in the first, in each `further` one those that are to be repeated."""
        if not isinstance(self.target, Waves):
            return self
        gates = self._repeated(self.target) if further else self.gates
        return self.model_copy(update={"target": self.target.kind, "gates": gates})

    def plan(self, *, first: bool = False) -> tuple[Step, ...]:
        """The steps in order. With no champion yet (`first`) the gates that compare fall away."""
        return tuple(self._steps(first=first))

    def _steps(self, *, first: bool) -> Iterator[Step]:
        deployed = promoted = False
        for index, gate in enumerate(self.gates):
            if first and gate.falls_away():
                continue
            if gate.needs_serving and not deployed:
                deployed = True
                yield Step(name="deploy", kind="deploy")
            if gate.after_promote and not promoted:
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
        """What `step` must show. The steps of a canary before the last show that nothing speaks against going on."""
        if step.gate is None:
            bounds = dict(ACTIONS[step.kind])
            # Without a champion there is no traffic to give back, and so no time that it took.
            if step.kind == "rollback" and self.rollback_within is not None and not first:
                bounds["rollback_s"] = Bound(max=self.rollback_within.total_seconds())
            return bounds
        gate = self.gates[step.gate]
        bounds = gate.bounds(first=first)
        if isinstance(gate, Canary) and step.weight is not None and step.weight < gate.deciding:
            bounds = {metric: bound for metric, bound in bounds.items() if metric == "error_ceiling"}
        if isinstance(gate, Looked) or (isinstance(gate, Load) and gate.find is None):
            bounds["ledger"] = Bound(max=1 / self.false_rollback)
        return bounds

    def min_sample(self, step: Step) -> int:
        """The smallest sample that `step` is judged on. Gates that look again and again see to it themselves: they
        move on after so many requests, and stop for evidence whenever there is enough.
        """
        gate = None if step.gate is None else self.gates[step.gate]
        return 1 if gate is None or isinstance(gate, Looked) else gate.min_sample

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
        path = [*_path(first["loc"]), *first.get("ctx", {}).get("at", ())]
        more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
        message = _sentence(first, data)
        raise PolicyError(f"{source}:{place_of(tree, path)}{message}{more}") from error


def _path(loc: tuple[int | str, ...]) -> list[int | str]:
    """The way into the file: pydantic's own, less the union tags it puts in."""
    if len(loc) > 2 and loc[0] == "gates":
        return [loc[0], loc[1], *loc[3:]]
    if len(loc) > 1 and loc[0] == "target":
        return [loc[0], *loc[2:]]
    return [part for part in loc if part != "[key]"]


def _sentence(error: Any, data: dict[str, Any]) -> str:
    loc = error["loc"]
    if error["type"] == "extra_forbidden":
        words = [field.alias or name for name, field in _record(loc).model_fields.items() if name != "name"]
        return f"unknown word '{loc[-1]}'{nearest(str(loc[-1]), words)}"
    if error["type"] == "union_tag_invalid":
        kind = data["gates"][loc[1]].get("kind")
        return f"no such kind of gate: '{kind}'{nearest(str(kind), list(GATES))} (there are: {', '.join(GATES)})"
    if error["type"] == "union_tag_not_found":
        return f"a gate needs its `kind` (one of: {', '.join(GATES)})"
    if error["type"] == "model_type" and loc[-2:-1] in (("checks",), ("labelled",)):
        number = error["input"] if isinstance(error["input"], int | float) else "0.05"
        return f"a bound is written like {{ max: {number} }} or {{ min: {number} }}"
    if error["type"] in ("model_type", "tuple_type", "dict_type") and loc[0] == "traffic":
        return shape_of(loc[1:])
    return f"`{loc[-1]}` is missing" if error["type"] == "missing" else str(error["msg"]).removeprefix("Value error, ")


def _record(loc: tuple[int | str, ...]) -> Any:
    """The record that an unknown word stands in."""
    if loc[0] == "gates" and len(loc) > 4:
        return {"tolerances": Tolerance, "functions": Function, "freshness": Freshness}.get(str(loc[3]), Bound)
    if loc[0] == "gates" and len(loc) > 3:
        return GATES[str(loc[2])]
    if loc[0] == "traffic":
        return record(loc[1:-1])
    return Quiet if loc[0] == "quiet" else Waves if loc[0] == "target" else Policy


def place_of(tree: Any, path: list[int | str]) -> str:
    """Where in a YAML file a mistake is, as a message begins: "12: gates[0].checks: "."""
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return f"{_line(tree, path)}: {where + ': ' if where else ''}"


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

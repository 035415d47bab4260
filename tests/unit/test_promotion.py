"""The promotion: it always ends, and only passes lead to the champion's place."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from validations.policy import Policy, Step
from validations.promotion import Phase, Promotion, drive
from validations.verdict import Bound, Evidence, Measurement, Outcome, Verdict, judge

ok = {"error_rate": {"max": 0.1}}
SHAPES = [
    {"kind": "integrity"},
    {"kind": "schema"},
    {"kind": "quality", "data": "d", "label": "y", "checks": {"f1": {"min": 0.5}}},
    {"kind": "shadow", "checks": ok},
    {"kind": "load", "rate": 1, "run_time": "1s", "checks": ok},
    {"kind": "approval", "approvers": ["ana"]},
    {"kind": "hook", "command": ["x"]},
    {"kind": "canary", "weights": [1, 50], "checks": ok},
]
AFTER = [
    {"kind": "watch", "run_time": "1s", "checks": ok},
    {"kind": "hook", "name": "after", "when": "after", "command": ["x"]},
    {"kind": "hook", "name": "after that", "when": "after", "url": "http://127.0.0.1:1"},
]


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    gates = draw(st.lists(st.sampled_from(SHAPES), min_size=1, unique_by=lambda g: g["kind"]))
    gates += draw(st.lists(st.sampled_from(AFTER), unique_by=lambda g: g.get("name", "")))
    return Policy(
        version=1, model="m", gates=gates, rollback_within=draw(st.sampled_from([None, timedelta(seconds=5)]))
    )


def measured(outcome: Outcome, bound: Bound) -> dict[str, Measurement]:
    inside = bound.max if bound.max is not None else bound.min
    assert inside is not None
    outside = bound.max + 1 if bound.max is not None else inside - 1
    low, high = min(inside, outside), max(inside, outside)
    return {
        Outcome.PASSED: {"m": Measurement(value=inside, low=inside, high=inside, sample=10**6)},
        Outcome.FAILED: {"m": Measurement(value=outside, low=outside, high=outside, sample=10**6)},
        Outcome.INCONCLUSIVE: {"m": Measurement(value=low, low=low, high=high, sample=10**6)},
        Outcome.ERRORED: {},
    }[outcome]


def performer(outcomes: list[Outcome]):
    """A `perform` that brings about `outcomes` in order, and passes from then on."""
    todo = iter(outcomes)

    def perform(promotion: Promotion, step: Step) -> Verdict:
        outcome = next(todo, Outcome.PASSED)
        bounds = promotion.bounds(step)
        found = {k: m for k, b in bounds.items() for m in measured(outcome, b).values()}
        return judge(step.name, bounds, Evidence(measurements=found), promotion.policy.min_sample(step))

    return perform


champions = st.sampled_from([None, "1"])
runs = st.lists(st.sampled_from(Outcome), max_size=12)


def begin(policy: Policy, champion: str | None) -> Promotion:
    return Promotion(id="p", champion=champion, challenger="2", digest="d", policy=policy)


@given(policies(), champions, runs)
def test_it_ends_and_only_passes_promote(policy: Policy, champion: str | None, outcomes: list[Outcome]) -> None:
    """Whatever happens a promotion ends, runs no step twice, and is promoted on passes alone."""
    end = drive(begin(policy, champion), performer(outcomes), lambda _: None)
    names = [v.step for v in end.verdicts]
    assert end.phase.final
    assert len(names) == len(set(names))
    passed = all(v.outcome is Outcome.PASSED for v in end.verdicts)
    assert (end.phase is Phase.PROMOTED) == (passed and names == [s.name for s in end.plan])
    if end.phase is Phase.ROLLED_BACK:
        assert end.verdicts[-1].step == "rollback"
        assert end.verdicts[-1].outcome is Outcome.PASSED
        assert end.reached_live
    if "rollback" in names and end.verdicts[-1].outcome is not Outcome.PASSED:
        assert end.phase is Phase.DEGRADED
    if end.phase is Phase.REJECTED:
        assert not end.reached_live
    if "deploy" in names and not passed:
        assert "rollback" in names


@given(policies(), champions)
def test_what_follows_the_cut_over_stands_behind_it(policy: Policy, champion: str | None) -> None:
    """Every gate that does not fall away is in the plan once, in the order of the file, with `deploy` and `promote` once
    each: watches and after-hooks behind them, all others before.
    """
    plan, first = begin(policy, champion).plan, champion is None
    kinds = [step.kind for step in plan]
    assert kinds.count("deploy") == kinds.count("promote") == 1
    assert kinds.index("deploy") < kinds.index("promote")
    places = [step.gate for step in plan if step.gate is not None]
    assert places == sorted(places)
    assert {*places} == {n for n, gate in enumerate(policy.gates) if not (first and gate.falls_away())}
    for place, step in enumerate(plan):
        if step.gate is not None:
            assert policy.gates[step.gate].after_promote == (place > kinds.index("promote"))


@given(policies(), champions, runs, st.integers(0, 12))
def test_cut_anywhere_it_goes_on_to_the_same_end(
    policy: Policy, champion: str | None, outcomes: list[Outcome], cut: int
) -> None:
    """Stored after any step and read back, a promotion goes on to the end it would have had."""
    saved: list[str] = []
    whole = drive(begin(policy, champion), performer(outcomes), lambda p: saved.append(p.model_dump_json()))
    if cut < len(saved):
        half = Promotion.model_validate_json(saved[cut])
        assert drive(half, performer(outcomes[cut + 1 :]), lambda _: None) == whole


@given(policies(), champions, runs)
def test_each_verdict_is_reached_again_from_its_evidence(
    policy: Policy, champion: str | None, outcomes: list[Outcome]
) -> None:
    """Bounds and stored evidence give every recorded verdict again."""
    end = drive(begin(policy, champion), performer(outcomes), lambda _: None)
    steps = {step.name: step for step in (*end.plan, Step(name="rollback", kind="rollback"))}
    for verdict in end.verdicts:
        step = steps[verdict.step]
        assert judge(step.name, end.bounds(step), verdict.evidence, policy.min_sample(step)) == verdict


def test_a_verdict_out_of_turn_is_refused() -> None:
    """Only the next step can be recorded, and a history that skips a step is not one."""
    start = begin(Policy(version=1, model="m", gates=[{"kind": "integrity"}]), "1")
    late = judge("promote", {"agreement": Bound(min=1)}, Evidence())
    with pytest.raises(ValueError, match="the next step is integrity, not promote"):
        start.record(late)
    with pytest.raises(ValidationError, match="do not follow the plan"):
        Promotion(**{**dict(start), "verdicts": (late,)})


@pytest.mark.parametrize(("seconds", "phase"), [(4.9, Phase.ROLLED_BACK), (5.1, Phase.DEGRADED)])
def test_a_rollback_over_its_time_is_degraded(seconds: float, phase: Phase) -> None:
    """Traffic is back with the champion, and a person is told that it took longer than the policy allows."""
    policy = Policy(version=1, model="m", gates=[SHAPES[-1]], rollback_within=timedelta(seconds=5))

    def perform(promotion: Promotion, step: Step) -> Verdict:
        met = {"ready": 1, "agreement": 1, "rollback_s": seconds, "error_ceiling": 1, "ledger": 1, "error_rate": 0}
        found = {name: Measurement.exact(value) for name, value in met.items()}
        return judge(step.name, promotion.bounds(step), Evidence(measurements=found))

    end = drive(begin(policy, "1"), perform, lambda _: None)
    assert end.phase is phase
    assert (end.verdicts[-1].why == "rollback_s 5.1 is outside the bound (at most 5)") == (phase is Phase.DEGRADED)


def test_an_approval_is_waited_for() -> None:
    """While a person is asked, the phase says so."""
    policy = Policy(version=1, model="m", gates=[{"kind": "approval", "approvers": ["ana"]}])
    assert begin(policy, "1").phase is Phase.AWAITING_APPROVAL


def test_without_a_champion_the_comparing_gates_fall_away() -> None:
    """The first version is held to what needs no champion, and to nothing else."""
    policy = Policy(version=1, model="m", gates=SHAPES)
    assert [s.kind for s in policy.plan(first=True)] == [
        "integrity",
        "quality",
        "deploy",
        "load",
        "approval",
        "hook",
        "promote",
    ]

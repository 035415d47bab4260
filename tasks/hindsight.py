"""A past shadow judged with the labels that came later, and the verdict kept with its promotion."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tasks import history
from tasks.labels import read
from tasks.settings import Mistake
from validations.gates import Shadow
from validations.labels import join, measurements, read_pairs
from validations.policy import Policy
from validations.promotion import Promotion
from validations.verdict import Evidence, Verdict, judge


@dataclass(frozen=True, slots=True)
class Hindsight:
    """One shadow step and what the labels say of it."""

    step: str
    verdict: Verdict


def judge_again(name: str, file: Path, policy: Policy | None, folder: Path) -> list[Hindsight]:
    """Judge every shadow of the promotion called `name` by the labels in `file` and the bounds in `labelled`.

    The bounds are those of the promotion's own policy, or of `policy`. Each verdict is kept in the run, as
    `labels/<step>-<time>.json`. Raises `Mistake`: no such promotion, no shadow, no kept pairs, no bounds, a bad file.
    """
    entry = history.entry(name)
    labels = read(file)
    promotion = history.stored(entry.run_id) if entry.kind == "promotion" else None
    steps = _shadows(promotion) if promotion else {}
    if promotion is None or not steps:
        raise Mistake(f"{name} had no shadow that was run: labels are joined with the pairs of one", code=2)
    asked = _shadows(promotion, policy) if policy else steps
    found = []
    for step, gate in steps.items():
        bounds = asked.get(step, next(iter(asked.values()), gate)).labelled
        if not bounds:
            raise Mistake(
                f"the policy has no `labelled` bounds for {step}: give them there, or judge by another with --policy",
                code=2,
            )
        slug, now = history.slug(step), datetime.now(UTC)
        path = history.fetch(entry, f"evidence/{slug}-pairs.jsonl", folder / entry.id)
        _refuse_changed(promotion, step, path)
        try:
            joined = join(read_pairs(path.read_text().splitlines()), labels, gate.label_kind)
        except ValueError as error:
            raise Mistake(f"{step} of {name}: {error}", code=2) from error
        # Each bound has its part of the error rate that blames the challenger; to pass, every one must be proven.
        share = promotion.policy.false_rollback / len(bounds)
        measured = measurements(joined, share, promotion.policy.false_promotion)
        note = f"{len(labels):,} labels of {file.name} ({history.sha256(file.read_bytes())[:19]})"
        verdict = judge(f"{step} labels", bounds, Evidence(measurements=measured, finished=now, note=note))
        history.attach(entry.run_id, f"labels/{slug}-{now:%Y%m%d-%H%M%S}.json", json.loads(verdict.model_dump_json()))
        found.append(Hindsight(step, verdict))
    return found


def _refuse_changed(promotion: Promotion, step: str, path: Path) -> None:
    verdict = next(verdict for verdict in promotion.verdicts if verdict.step == step)
    kept = next((artifact for artifact in verdict.evidence.artifacts if artifact.name == path.name), None)
    if kept is None or kept.sha256 != history.sha256(path.read_bytes()):
        raise history.Tampered(f"{path.name} of {promotion.id} is not what the verdict on {step} rests on")


def _shadows(promotion: Promotion, policy: Policy | None = None) -> dict[str, Shadow]:
    """The shadow steps that have a verdict, and their gates in `policy` (the promotion's own otherwise)."""
    done = {verdict.step for verdict in promotion.verdicts}
    asked = policy or promotion.policy
    gates = {step.name: asked.gates[step.gate] for step in asked.plan() if step.gate is not None}
    return {name: gate for name, gate in gates.items() if isinstance(gate, Shadow) and (policy or name in done)}

"""Past verdicts reached again from their evidence, with a table for the Prefect UI."""

import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from tasks import replay as replaying
from tasks.policies import read_policy
from tasks.settings import load as load_settings


@flow(name="replay", flow_run_name="replay {promotion}", persist_result=False, retries=0)
def replay(
    promotion: Annotated[str, Field(min_length=1, json_schema_extra={"title": "Promotion or model"})],
    policy: Annotated[str | None, Field(json_schema_extra={"title": "Policy file"})] = None,
    days: Annotated[int, Field(ge=1, json_schema_extra={"title": "Days"})] = 365,
) -> dict[str, Any]:
    """Reach past verdicts again from their evidence, or see how they would have been under another policy.

    The table is an artifact of the run. Returns promotions (each as `titleshot replay --json` has it) and changed: the
    promotions whose own policy does not give the recorded verdicts again, which must be none.

    Args:
        promotion: A promotion's name, as `titleshot history` lists it, or a model's for all of its promotions.
        policy: Path of another policy to judge by; the promotion's own otherwise, and then every verdict must be the
            same.
        days: How far back to go, for a model.
    """
    settings = load_settings()
    settings.connect()
    other = None if policy is None else read_policy(Path(policy))[1]
    found = replaying.again(promotion, other, timedelta(days=days))
    logger = get_run_logger()
    changed = [one.id for one in found if one.changed]
    for one in found:
        logger.info("%s was %s; now %s", one.id, one.was, one.replayed.ended)
        if one.changed:
            logger.warning("%s: by its own policy not the recorded verdict at %s", one.id, ", ".join(one.changed))
    create_markdown_artifact(
        _table(found),
        key="replay",
        description=f"{promotion}: verdicts reached again" + (f" by {Path(policy).name}" if policy else ""),
    )
    promotions = [dataclasses.asdict(one) | {"replayed": json.loads(one.replayed.model_dump_json())} for one in found]
    return {"promotions": promotions, "changed": changed}


def _table(found: list[replaying.Again]) -> str:
    rows = ["| promotion | was | now | why |", "| --- | --- | --- | --- |"]
    for one in found:
        last = one.replayed.steps[-1].verdict
        why = last.why if one.otherwise and last is not None else ""
        if one.changed:
            why = f"**not the recorded verdict at {', '.join(one.changed)}**"
        cells = (one.id, one.was, one.replayed.ended, why)
        rows.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(rows)

"""Synthetic monitoring: what serves now is asked, on a schedule or by hand, whatever live traffic there is."""

from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from tasks import probe as asking
from tasks.progress import listening
from tasks.settings import load as load_settings


@flow(name="probe", persist_result=False, retries=0)
def probe(
    model: Annotated[str | None, Field(json_schema_extra={"title": "Model"})] = None,
    requests: Annotated[int, Field(ge=1, le=1000, json_schema_extra={"title": "Requests"})] = asking.REQUESTS,
    slow_ms: Annotated[float | None, Field(gt=0, json_schema_extra={"title": "Slow from (ms)"})] = None,
) -> dict[str, Any]:
    """Ask every deployed version, through the gateway, its stored example; say who does not answer, or is slow.

    The requests go to the versions' own paths, so no gate counts them as live traffic and no shadow gets a copy: what
    is seen is that gateway and version answer, not whom the split would have chosen. Returns models (versions with
    sent, failed, median_ms, slowest_ms) and problems (sentences). A run that finds problems is a completed one, and
    its log has them as warnings.

    Args:
        model: Name of the registered model; all that are served otherwise.
        requests: How many requests each version gets, one after the other.
        slow_ms: A median above this many milliseconds is a problem; nothing is too slow otherwise.
    """
    logger = get_run_logger()
    settings = load_settings()
    settings.connect(needed=())
    with listening(logger.info):
        found = asking.as_dict(asking.everywhere(settings, model, requests=requests, slow_ms=slow_ms))
    for problem in found["problems"]:
        logger.warning(problem)
    return found

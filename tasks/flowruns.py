"""Prefect's flow runs by its REST API: asked for, looked at, resumed, ended.

Light: Prefect itself takes seconds to import.
"""

import os
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from tasks.settings import Mistake, Settings

PROMOTE = "promote/promote"
"""The deployment that runs a promotion: the flow's name and the deployment's."""


class Unanswered(Exception):
    """Prefect does not answer, or not as it should: worth another try."""


@dataclass(frozen=True, slots=True)
class FlowRun:
    """A flow run as Prefect has it. `type` is the state's type (SCHEDULED, PENDING, RUNNING, PAUSED, CANCELLING,
    CANCELLED, COMPLETED, FAILED, CRASHED), `state` its name as people see it (`Suspended`, `Late`, ...), which it has
    been in `since` then; `runs` is how often it was started.
    """

    id: str
    name: str
    type: str
    state: str
    message: str
    since: datetime
    runs: int
    deployment: str | None
    parameters: Mapping[str, Any]
    tags: Sequence[str]

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.type in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def find(settings: Settings, identifier: str) -> FlowRun | None:
    """The flow run of this id; None where there is none. Raises `Unanswered`."""
    answer = _ask(settings, "GET", f"/flow_runs/{identifier}", missing=True)
    return None if answer is None else _run(answer)


def tagged(settings: Settings, *tags: str) -> list[FlowRun]:
    """The flow runs that carry all of these tags, newest first. Raises `Unanswered`."""
    body = {"sort": "START_TIME_DESC", "flow_runs": {"tags": {"all_": list(tags)}}, "limit": 200}
    return [_run(one) for one in _ask(settings, "POST", "/flow_runs/filter", body)]


def create(
    settings: Settings,
    deployment: str,
    parameters: Mapping[str, Any],
    *,
    key: str | None = None,
    tags: Sequence[str] = (),
    at: datetime | None = None,
) -> FlowRun:
    """Ask for a run of `deployment` ("flow/deployment"), now or `at` a time. With the same `key` there is one run only,
    however often it is asked for. Raises `Mistake` where there is no such deployment, and `Unanswered`.
    """
    found = _ask(settings, "GET", f"/deployments/name/{deployment}", missing=True)
    if found is None:
        raise Mistake(
            f"Prefect has no deployment {deployment}: `titleshot up` makes it, or `prefect --no-prompt deploy --all`"
        )
    when = {"scheduled_time": (at or datetime.now(UTC)).isoformat()}
    body = {
        "parameters": dict(parameters),
        "state": {"type": "SCHEDULED", "state_details": when},
        "tags": list(tags),
        **({"idempotency_key": key} if key else {}),
    }
    return _run(_ask(settings, "POST", f"/deployments/{found['id']}/create_flow_run", body))


def resume(settings: Settings, identifier: str, given: Mapping[str, Any]) -> None:
    """Resume a suspended run with what its form asks for. Raises `Mistake` where Prefect refuses, and `Unanswered`."""
    answer = _ask(settings, "POST", f"/flow_runs/{identifier}/resume", {"run_input": dict(given)})
    _accepted(answer, "the form was not accepted")


def given_at(settings: Settings, identifier: str, key: str) -> datetime | None:
    """When the form of the suspension `key` was handed in; None where it was not. Raises `Unanswered`."""
    prefix = f"suspended-{key}-response"
    found = _ask(settings, "POST", f"/flow_runs/{identifier}/input/filter", {"prefix": prefix})
    return datetime.fromisoformat(found[0]["created"]) if found else None


def settle(settings: Settings, identifier: str, type_: str, message: str, name: str | None = None) -> None:
    """Give a flow run another state, whatever it is in. Raises `Mistake` where Prefect refuses, and `Unanswered`."""
    state = {"type": type_, "message": message, **({"name": name} if name else {})}
    answer = _ask(settings, "POST", f"/flow_runs/{identifier}/set_state", {"state": state, "force": True})
    _accepted(answer, f"the state {type_} was not accepted")


def logs(settings: Settings, identifier: str, after: datetime | None = None) -> list[tuple[datetime, str]]:
    """What a run has said, oldest first; `after` leaves out what is known already. Raises `Unanswered`."""
    chosen: dict[str, Any] = {"flow_run_id": {"any_": [identifier]}}
    if after is not None:
        chosen["timestamp"] = {"after_": after.isoformat()}
    body = {"logs": chosen, "sort": "TIMESTAMP_ASC", "limit": 200}
    found = [
        (datetime.fromisoformat(one["timestamp"]), str(one["message"]))
        for one in _ask(settings, "POST", "/logs/filter", body)
    ]
    return [one for one in found if after is None or one[0] > after]


def page(settings: Settings, identifier: str) -> str:
    """The run's page in the Prefect UI."""
    return f"{settings.prefect_page}/runs/flow-run/{identifier}"


def _accepted(answer: Any, what: str) -> None:
    # Prefect answers 200 to what it refuses as well.
    if answer["status"] != "ACCEPT":
        why = (answer.get("details") or {}).get("reason") or answer["status"]
        raise Mistake(f"{what}: {' '.join(str(why).split())}")


def _run(data: Mapping[str, Any]) -> FlowRun:
    state = data.get("state") or {}
    return FlowRun(
        id=str(data["id"]),
        name=str(data["name"]),
        type=str(data.get("state_type") or ""),
        state=str(data.get("state_name") or ""),
        message=str(state.get("message") or ""),
        since=datetime.fromisoformat(state["timestamp"]) if state.get("timestamp") else datetime.now(UTC),
        runs=int(data.get("run_count") or 0),
        deployment=data.get("deployment_id"),
        parameters=data.get("parameters") or {},
        tags=data.get("tags") or (),
    )


def _credentials() -> dict[str, str]:
    """What Prefect's own client would show a server that wants to know who asks."""
    if auth := os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {b64encode(auth.encode()).decode()}"}
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    return {}


def _ask(settings: Settings, method: str, path: str, body: Any = None, *, missing: bool = False) -> Any:
    try:
        for pause in (0.5, 1, 2, 0):
            answer = httpx.request(method, settings.prefect + path, json=body, headers=_credentials(), timeout=20)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(pause)  # its database was busy: nothing was done
        if answer.status_code == 404 and missing:
            return None
        if answer.status_code in (httpx.codes.CONFLICT, httpx.codes.UNPROCESSABLE_ENTITY):
            raise Mistake(f"Prefect refuses what it was asked at {path}: {' '.join(answer.text.split())[:300]}", code=2)
        answer.raise_for_status()
        return answer.json() if answer.content else None
    except httpx.HTTPError as error:
        raise Unanswered(
            f"Prefect does not answer at {settings.prefect}{path}: {error or type(error).__name__}"
        ) from error

"""Prefect by its REST API, and its flow runs above all: asked for, looked at, resumed, ended.

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
SECONDS = 20.0
"""How long Prefect has for an answer."""


class Unanswered(Exception):
    """Prefect does not answer, or not as it should: worth another try. The message is one line."""


class Unusable(Unanswered):
    """What answers is no Prefect, or lets nobody in who does not say who they are; the message says how to mend it."""


@dataclass(frozen=True, slots=True)
class FlowRun:
    """A flow run as Prefect has it. `type` is the state's type (SCHEDULED, PENDING, RUNNING, PAUSED, CANCELLING,
    CANCELLED, COMPLETED, FAILED, CRASHED), `state` its name as people see it (`Suspended`, `Late`, ...), which it has
    been in `since` then; `runs` is how often it was started, `key` what it was asked for by (idempotency).
    """

    id: str
    name: str
    type: str
    state: str
    message: str
    created: datetime
    since: datetime
    runs: int
    key: str
    deployment: str | None
    parameters: Mapping[str, Any]
    tags: Sequence[str]

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.type in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def find(settings: Settings, identifier: str) -> FlowRun | None:
    """The flow run of this id; None where there is none. Raises `Unanswered`."""
    answer = ask(settings, "GET", f"/flow_runs/{identifier}", missing=True)
    return None if answer is None else _run(answer)


def tagged(settings: Settings, *tags: str) -> list[FlowRun]:
    """The flow runs that carry all of these tags, newest first. Raises `Unanswered`."""
    return chosen(settings, {"flow_runs": {"tags": {"all_": list(tags)}}})


def chosen(settings: Settings, filters: Mapping[str, Any]) -> list[FlowRun]:
    """The flow runs that Prefect's `filters` let through, newest first, 200 at most. Raises `Unanswered`."""
    body = {**filters, "sort": "START_TIME_DESC", "limit": 200}
    found = ask(settings, "POST", "/flow_runs/filter", body, missing=True)
    if not isinstance(found, list):
        raise _odd(settings)
    return [_run(one) for one in found]


def deployment_id(settings: Settings, name: str) -> str:
    """Prefect's id of the deployment `name` ("flow/deployment"). Raises `Mistake` where there is none, and
    `Unanswered`.
    """
    found = ask(settings, "GET", f"/deployments/name/{name}", missing=True)
    if found is None:
        raise Mistake(
            f"Prefect has no deployment {name}: `titleshot up` makes it, or `prefect --no-prompt deploy --all`"
        )
    return str(found["id"])


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
    identifier = deployment_id(settings, deployment)
    when = {"scheduled_time": (at or datetime.now(UTC)).isoformat()}
    body = {
        "parameters": dict(parameters),
        "state": {"type": "SCHEDULED", "state_details": when},
        "tags": list(tags),
        **({"idempotency_key": key} if key else {}),
    }
    return _run(ask(settings, "POST", f"/deployments/{identifier}/create_flow_run", body))


def resume(settings: Settings, identifier: str, given: Mapping[str, Any]) -> None:
    """Resume a suspended run with what its form asks for. Raises `Mistake` where Prefect refuses, and `Unanswered`."""
    answer = ask(settings, "POST", f"/flow_runs/{identifier}/resume", {"run_input": dict(given)})
    _accepted(answer, "the form was not accepted")


def given_at(settings: Settings, identifier: str, key: str) -> datetime | None:
    """When the form of the suspension `key` was handed in; None where it was not. Raises `Unanswered`."""
    prefix = f"suspended-{key}-response"
    found = ask(settings, "POST", f"/flow_runs/{identifier}/input/filter", {"prefix": prefix})
    return datetime.fromisoformat(found[0]["created"]) if found else None


def settle(settings: Settings, identifier: str, type_: str, message: str, name: str | None = None) -> None:
    """Give a flow run another state, whatever it is in. Raises `Mistake` where Prefect refuses, and `Unanswered`."""
    state = {"type": type_, "message": message, **({"name": name} if name else {})}
    answer = ask(settings, "POST", f"/flow_runs/{identifier}/set_state", {"state": state, "force": True})
    _accepted(answer, f"the state {type_} was not accepted")


def logs(settings: Settings, identifier: str, after: datetime | None = None) -> list[tuple[datetime, str]]:
    """What a run has said, oldest first; `after` leaves out what is known already. Raises `Unanswered`."""
    wanted: dict[str, Any] = {"flow_run_id": {"any_": [identifier]}}
    if after is not None:
        wanted["timestamp"] = {"after_": after.isoformat()}
    body = {"logs": wanted, "sort": "TIMESTAMP_ASC", "limit": 200}
    found = [
        (datetime.fromisoformat(one["timestamp"]), str(one["message"]))
        for one in ask(settings, "POST", "/logs/filter", body)
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
    created = datetime.fromisoformat(data["created"]) if data.get("created") else datetime.now(UTC)
    return FlowRun(
        id=str(data["id"]),
        name=str(data["name"]),
        type=str(data.get("state_type") or ""),
        state=str(data.get("state_name") or ""),
        message=str(state.get("message") or ""),
        created=created,
        since=datetime.fromisoformat(state["timestamp"]) if state.get("timestamp") else created,
        runs=int(data.get("run_count") or 0),
        key=str(data.get("idempotency_key") or ""),
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


def ask(
    settings: Settings,
    method: str,
    path: str,
    body: Any = None,
    *,
    missing: bool = False,
    seconds: float | None = None,
    once: bool = False,
) -> Any:
    """What Prefect's API answers at `path` ("/flow_runs/filter"), None where that is nothing. Where something may be
    `missing`, None says that it is. Each try has `seconds` (20 by default); a Prefect that is busy is asked again for
    some seconds, unless it is to be asked `once`. Raises `Mistake` where it refuses, and `Unanswered`.
    """
    where, timeout = settings.prefect + path, SECONDS if seconds is None else seconds
    try:
        for pause in (0,) if once else (0.5, 1, 2, 0):
            answer = httpx.request(method, where, json=body, headers=_credentials(), timeout=timeout)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(pause)  # its database was busy: nothing was done
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unanswered(
            f"Prefect does not answer at {where}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if answer.status_code == httpx.codes.NOT_FOUND and missing:
        return None
    if answer.status_code in (httpx.codes.CONFLICT, httpx.codes.UNPROCESSABLE_ENTITY):
        raise Mistake(f"Prefect refuses what it was asked at {path}: {' '.join(answer.text.split())[:300]}", code=2)
    said = f"{answer.status_code} {answer.reason_phrase}"
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        mend = "set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY"
        raise Unusable(f"Prefect at {settings.prefect} wants to know who asks ({said}): {mend}")
    if not answer.is_success:
        raise Unanswered(f"Prefect does not answer at {where} as it should: {said}")
    try:
        return answer.json() if answer.content else None
    except ValueError as error:
        raise _odd(settings) from error


def _odd(settings: Settings) -> Unusable:
    return Unusable(f"what answers at {settings.prefect} is no Prefect: its API's address ends in /api")

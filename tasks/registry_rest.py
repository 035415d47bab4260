"""MLflow's registry by its REST API, with the credentials that MLflow's own client takes from the environment.

Light: MLflow's Python client costs four seconds to import.
"""

import os
from collections.abc import Mapping
from typing import Any

import httpx

from tasks.settings import Settings

API = "/api/2.0/mlflow/"
SECONDS = 5.0


class Unanswered(Exception):
    """MLflow does not answer, or not as it should: worth another try."""


class Refused(Exception):
    """MLflow answered no. `code` is its own word for it, RESOURCE_DOES_NOT_EXIST for one; `status` that of HTTP."""

    def __init__(self, message: str, code: str, status: int) -> None:
        super().__init__(message)
        self.code, self.status = code, status


def get(settings: Settings, path: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a GET of `path` ("registered-models/alias") answers. Raises `Refused` and `Unanswered`, and `Mistake` where
    there is no MLflow yet.
    """
    return _ask(settings, "GET", path, params=params)


def post(settings: Settings, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What a POST of `body` to `path` answers. Raises as `get` does."""
    return _ask(settings, "POST", path, json=body)


def credentials() -> tuple[httpx.Auth | None, dict[str, str]]:
    """What MLflow's client would show the server: name and password, else a token, else nothing."""
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{word}") for word in ("USERNAME", "PASSWORD"))
    if name and password:
        return httpx.BasicAuth(name, password), {}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return None, {"Authorization": f"Bearer {token}"} if token else {}


def _ask(settings: Settings, method: str, path: str, **how: Any) -> dict[str, Any]:
    # MLflow serves its newer parts, webhooks for one, at the same place.
    url = settings.mlflow + API + path
    auth, headers = credentials()
    try:
        answer = httpx.request(method, url, timeout=SECONDS, auth=auth, headers=headers, **how)
    except httpx.HTTPError as error:
        raise Unanswered(f"MLflow does not answer at {url}: {error or type(error).__name__}") from error
    data = _json(answer)
    if answer.is_success and data is not None:
        return data
    said = data or {}
    why = str(said.get("message") or f"{answer.status_code} {answer.reason_phrase}").strip()
    if answer.status_code in (401, 403):
        why += ": set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if answer.is_client_error:
        raise Refused(f"MLflow refuses {path}: {why}", str(said.get("error_code") or ""), answer.status_code)
    raise Unanswered(f"MLflow does not answer as it should at {url}: {why}")


def _json(answer: httpx.Response) -> dict[str, Any] | None:
    try:
        data = answer.json() if answer.content else {}
    except ValueError:
        return None
    return data if isinstance(data, dict) else None

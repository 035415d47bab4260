"""Prefect's deployments: what the stack's own worker makes of prefect.yaml, and what it runs."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks import flowruns, registry
from tasks.worker import DEPLOYMENTS
from tests.flows.conftest import Maker, promote


def ran(settings: Any, deployment: str, timeout: float = 200, **parameters: Any) -> flowruns.FlowRun:
    """A run of a deployment, asked for as the Prefect UI does, once it has ended."""
    asked = flowruns.create(settings, deployment, parameters)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = flowruns.find(settings, asked.id)
        assert found is not None
        if found.over:
            assert found.type == "COMPLETED", (found.message, flowruns.logs(settings, asked.id))
            return found
        time.sleep(0.3)
    raise AssertionError(f"{deployment} did not end in {timeout} s")


def test_the_worker_makes_every_deployment(worker: Any, settings: Any) -> None:
    """All five deployments are there, with forms that explain themselves and schedules that sleep."""
    for name in DEPLOYMENTS:
        made = httpx.get(f"{settings.prefect}/deployments/name/{name}").raise_for_status().json()
        assert made["description"], name
        assert not any(schedule["active"] for schedule in made["schedules"]), name
        fields = made["parameter_openapi_schema"]["properties"]
        assert all(field.get("description") for field in fields.values()), name


def test_an_event_starts_a_promotion(worker: Any, settings: Any) -> None:
    """Prefect has an automation that gives model and version of a challenger's event to a run of `promote`."""
    found = httpx.post(f"{settings.prefect}/automations/filter", json={}).raise_for_status().json()
    (made,) = [one for one in found if one["name"] == "titleshot-challenger"]
    assert made["enabled"]
    assert made["trigger"]["expect"] == ["titleshot.challenger"]
    assert made["trigger"]["match"] == {"prefect.resource.id": "titleshot.model.*"}
    (action,) = made["actions"]
    assert action["parameters"] == {
        "model": "{{ event.payload.model }}",
        "version": "{{ event.payload.version }}",
        "trigger": "event",
    }


@pytest.mark.long
def test_the_worker_runs_promotion_probe_replay_and_rollback(
    worker: Any, settings: Any, maker: Maker, policy: Any
) -> None:
    """What the Prefect UI can start does what the command line does, in a process of the stack's worker."""
    path: Path = policy({"kind": "integrity"})
    first, second = maker.version(), maker.version(seed=1)
    assert promote(model=maker.model, policy=str(path), version=first)["phase"] == "promoted"
    ran(settings, "promote/promote", model=maker.model, policy=str(path), version=second)
    assert registry.aliased(maker.model, "champion") == second
    asked = flowruns.create(settings, "probe/probe", {"model": maker.model})
    ran(settings, "replay/replay", promotion=maker.model)
    ran(settings, "rollback/rollback", model=maker.model)
    assert registry.aliased(maker.model, "champion") == first
    probed = flowruns.find(settings, asked.id)
    assert probed is not None
    assert probed.type == "COMPLETED"


def test_flow_runs_carry_readable_names(stack: Any) -> None:
    """A person who looks at the runs sees which model is meant."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        names = [run.name for run in client.read_flow_runs(limit=200)]
    assert any(n.startswith("promote ") for n in names), names

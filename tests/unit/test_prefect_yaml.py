"""prefect.yaml and the work pools' templates: what they name exists, and what people fill in is explained."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml

from tasks.worker import DEPLOYMENTS, POOL, ROOT

POOLS = ROOT / "deployments" / "pools"
DECLARED = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def schema(deployment: dict[str, Any]) -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    module, _, name = deployment["entrypoint"].rpartition(".")
    made: dict[str, Any] = parameter_schema(getattr(importlib.import_module(module), name).fn).model_dump()
    return made


def template(kind: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((POOLS / f"{kind}.json").read_text())
    return loaded


def names(text: str) -> set[str]:
    return set(re.findall(r"\{\{ (\w+) \}\}", text))


def test_what_the_worker_makes_is_what_is_declared() -> None:
    """The worker looks for exactly the deployments of prefect.yaml, in the pool that all of them name."""
    assert {f"{one['name']}/{one['name']}" for one in DECLARED} == set(DEPLOYMENTS)
    assert {one["work_pool"]["name"] for one in DECLARED} == {POOL}


@pytest.mark.parametrize("deployment", DECLARED, ids=lambda one: one["name"])
def test_the_run_form_explains_itself(deployment: dict[str, Any]) -> None:
    """Every field of a run form has a description, and the deployment has one, and tags."""
    fields = schema(deployment)["properties"]
    assert {name: field.get("description") for name, field in fields.items() if not field.get("description")} == {}
    assert deployment["description"]
    assert "titleshot" in deployment["tags"]


@pytest.mark.parametrize("deployment", DECLARED, ids=lambda one: one["name"])
def test_every_parameter_is_one_of_the_flow(deployment: dict[str, Any]) -> None:
    """Defaults, schedules and triggers give only parameters that the flow has; an event gives all that it needs."""
    form = schema(deployment)
    triggers, schedules = deployment.get("triggers", []), deployment.get("schedules", [])
    for given in (deployment.get("parameters", {}), *(one.get("parameters", {}) for one in (*triggers, *schedules))):
        assert set(given) <= set(form["properties"])
    for trigger in triggers:
        assert set(form.get("required", [])) <= set(trigger["parameters"])


def test_no_schedule_runs_unless_somebody_activates_it() -> None:
    """Whoever deploys to a server gets examples of schedules and not their runs."""
    schedules = [schedule for one in DECLARED for schedule in one.get("schedules", [])]
    assert len(schedules) == 3
    assert not any(schedule["active"] for schedule in schedules)


@pytest.mark.parametrize("kind", ["process", "kubernetes"])
def test_templates_and_variables_fit(kind: str) -> None:
    """What a template asks for is a variable of it, every variable is asked for, and Prefect's own are all there."""
    ours = template(kind)
    file = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
    collection = "prefect" if kind == "process" else "prefect-kubernetes"
    theirs = json.loads(file.read_text())[collection][kind]["default_base_job_configuration"]
    assert names(json.dumps(ours["job_configuration"])) == set(ours["variables"]["properties"])
    assert set(theirs["variables"]["properties"]) <= set(ours["variables"]["properties"])
    assert covers(ours["job_configuration"], theirs["job_configuration"])


def covers(ours: Any, theirs: Any) -> bool:
    """Whether `ours` has all of `theirs`, with more beside it."""
    if isinstance(theirs, dict):
        return all(key in ours and covers(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(covers, ours, theirs))
    return bool(ours == theirs)


def test_a_kubernetes_job_has_the_least_rights() -> None:
    """With the defaults of its variables a run is not root, writes only where it must, and knows no token."""
    from prefect.utilities.templating import apply_values

    made = template("kubernetes")
    defaults = {name: one["default"] for name, one in made["variables"]["properties"].items() if "default" in one}
    manifest = apply_values(made["job_configuration"]["job_manifest"], {**defaults, "image": "titleshot:1"})
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"] == {
        "requests": {"cpu": "500m", "memory": "1Gi"},
        "limits": {"cpu": "2", "memory": "4Gi"},
    }
    assert container["envFrom"] == [{"secretRef": {"name": "titleshot"}}]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", defaults["env"]["TITLESHOT_HOME"]}

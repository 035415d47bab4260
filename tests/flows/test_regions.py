"""A model in two regions by the real stack: approvals in each, promotions that meet, and the verbs of the command line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deployments.local.supervisor import wait_for
from flows import cli
from tasks import approve, flowruns, history, registry
from tasks.settings import Mistake, load, within
from tasks.targets import settings_target
from tests.cluster.node import LocalCluster
from tests.cluster.node import until as there_is
from tests.cluster.world import own_settings
from tests.contract.clients import GOOD, make_models
from tests.flows.conftest import People, promote, until
from tests.flows.test_kubernetes import described, register

MODEL = "in-two"
APPROVAL = {"kind": "approval", "approvers": ["ana", "bo", "cy"]}


@contextmanager
def regions(folder: Path, settings: Any) -> Iterator[None]:
    """Two clusters, which are namespaces of the tests' own, each with its gateway; described where a worker finds it."""
    with LocalCluster() as own:
        own.make_namespace("other")
        own.make_gateway("gateway", "other")
        url = there_is(lambda: own.gateways.url("other", "gateway"))
        artifact = {"by": "mlflow", "tracking_uri": settings.mlflow}
        eu = own_settings(own, folder, name="eu", region=True, artifact=artifact)
        gateway = {"name": "gateway", "namespace": "other", "section": "http", "url": url}
        more = {"namespace": "other", "gateway": gateway, "fallback": f"{url}/v/{{version}}"}
        us = own_settings(own, folder, name="us", region=True, artifact=artifact, **more)
        file = described(settings.home / "clusters.yaml", eu, us)
        try:
            yield
        finally:
            file.unlink()


def policy(path: Path, *gates: dict[str, Any]) -> str:
    """Two waves, and people are asked in each."""
    target = {"waves": [["eu"], ["us"]], "again": ["approval"]}
    path.write_text(json.dumps({"version": 1, "model": MODEL, "target": target, "gates": list(gates)}))
    return str(path)


def asked(settings: Any, region: str) -> Any:
    """What waits for people in a region, once its form can be filled in."""

    def there() -> Any:
        found = [one for one in approve.pending(settings) if one.region == region and one.flow_run]
        if not found:
            return None
        run = flowruns.find(settings, found[0].flow_run)
        assert run is not None
        assert run.type not in ("FAILED", "CRASHED"), run.message
        key = f"suspended-{region}-approval-{found[0].round}-"
        form = flowruns.ask(settings, "POST", f"/flow_runs/{run.id}/input/filter", {"prefix": key, "limit": 9})
        shown = [one["value"] for one in form if one["key"].endswith("description")]
        return (found[0], shown[0]) if run.type == "PAUSED" and shown else None

    def said() -> str:
        runs = flowruns.chosen(settings, {})
        return "\n".join(
            f"{one.name} {one.type} {one.message}\n"
            + "\n".join(f"  {line}" for _, line in flowruns.logs(settings, one.id))
            for one in runs
        ) + str(approve.pending(settings))

    return until(there, 60, f"nothing is asked in {region}", said)


def over(settings: Any, run: str) -> None:
    wait_for(lambda: flowruns.find(settings, run).over, 120, "the run does not end", every=0.3)
    assert flowruns.find(settings, run).type == "COMPLETED", flowruns.find(settings, run).message


def serving() -> dict[str, str | None]:
    found = {}
    for name in ("eu", "us"):
        with within(name):
            traffic = settings_target(load()).traffic(MODEL)
            found[name] = traffic.champion if traffic else None
    return found


@pytest.mark.long
def test_people_decide_in_each_region(
    stack: Any, worker: Any, settings: Any, people: People, tmp_path: Path, capfd: Any
) -> None:
    """Each region asks anew, by a form that names it, and one region's answer is no other's; who asked for a promotion
    in a terminal has no say in any region. While one waits in the second region no other begins in the first. A
    rollback without a region takes all of them back, and the alias with them."""

    def run(*words: str, code: int | None = 0) -> str:
        capfd.readouterr()
        got = cli.run(list(words))
        told = capfd.readouterr()
        assert code in (None, got), told
        return str(told.out + told.err)

    def yes(region: str, by: str) -> Any:
        one, shown = asked(settings, region)
        assert f"in the region **{region}**" in shown
        assert one.requester == "bo"
        handed = run("approve", "--region", region, "--by", by, "--code", people.code(by))
        assert f"in-two-v{one.subject.promotion.split('-v')[1][0]}-{region}" in handed
        return one

    register(settings.mlflow, MODEL, make_models(tmp_path / "tiny"), {"1": GOOD, "2": GOOD, "3": GOOD})
    plain = policy(tmp_path / "policy.yaml", APPROVAL)
    people.enrol("cy")
    with regions(tmp_path, settings):
        # In a terminal: what waits is handed over to the worker, with a policy that is in no folder of its own.
        assert promote(model=MODEL, policy=plain, version="1", requester="bo")["phase"] == "awaiting approval"
        yes("eu", "ana")
        one = yes("us", "cy")
        over(settings, one.flow_run)
        assert serving() == {"eu": "1", "us": "1"}
        # By the worker: one flow run, and a form in each region.
        parameters = {"model": MODEL, "policy": plain, "version": "2", "requester": "bo"}
        flow_run = flowruns.create(settings, flowruns.PROMOTE, parameters).id
        assert "in-two in eu: asked for by bo" in (asked(settings, "eu") and run("approve"))
        assert "in-two-v2-eu" in run("status", code=None)
        yes("eu", "ana")
        one, _ = asked(settings, "us")
        assert (one.flow_run, one.round, serving()) == (flow_run, 1, {"eu": "2", "us": "1"})
        with pytest.raises(Mistake, match=rf"{one.subject.promotion} is under way in the region us"):
            promote(model=MODEL, policy=plain, version="3")
        assert serving() == {"eu": "2", "us": "1"}
        form = {"decision": "approve", "approver": "cy", "code": people.code("cy")}
        flowruns.resume(settings, flow_run, form)  # as the UI does
        over(settings, flow_run)
        aliases = dict(registry.client().get_registered_model(MODEL).aliases)
        assert {aliases[name] for name in ("champion", "champion-eu", "champion-us")} == {"2"}
        assert [one.region for one in history.entries(MODEL)][:2] == ["us", "eu"]

        for words in (["status"], ["history", MODEL], ["serve", MODEL], ["route", MODEL], ["probe", MODEL]):
            assert {"eu", "us"} <= set(run(*words, code=None).replace(":", " ").split()), words
        assert "in eu" not in run("history", MODEL, "--region", "us")
        assert "served in eu, us: say which is meant with --region" in run("serve", MODEL, "--warm", "2", code=2)
        assert "acme" in run("route", MODEL, "--pin", "x-tenant=acme:1", "--region", "us")
        models = json.loads(run("status", "--json", code=None))["models"]
        assert [bool(one["shape"]["pins"]) for one in models if one["model"] == MODEL] == [False, True]
        assert "no region 'uss'" in run("serve", MODEL, "--region", "uss", code=2)
        told = run("rollback", MODEL)
        assert told.index("in-two in us: v1 is champion again") < told.index("in-two in eu: v1 is champion again")
        aliases = dict(registry.client().get_registered_model(MODEL).aliases)
        assert {aliases[name] for name in ("champion", "champion-eu", "champion-us")} == {"1"}
        assert {one.region for one in history.entries(MODEL) if one.kind == "rollback"} == {"eu", "us"}
        assert "eu v1, us v1" in run("rollback", MODEL, code=2)
        assert "in us: v2 is champion again" in run("rollback", MODEL, "--region", "us", code=0)
        assert serving() == {"eu": "1", "us": "2"}
        run("status", code=None)
        run("history", MODEL)

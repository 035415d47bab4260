"""Servers that are away, and hands that move things: nobody who asks notices, and all comes together again."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from deployments.local.supervisor import wait_for
from flows import cli
from tasks import registry
from tests.flows.conftest import Maker, live
from tests.flows.test_promote import CANARY, INTEGRITY, Policy, crown


@pytest.mark.long  # its client tries for a minute to tell a server that is away
def test_prefect_may_be_away(
    stack: Any, settings: Any, maker: Maker, policy: Policy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It stops amid a promotion: traffic and registry agree all the same. And the operator's rollback needs none."""
    champion, challenger = crown(maker, policy), maker.version(seed=5)

    def halt() -> None:
        def in_canary() -> bool:
            traffic = stack.traffic(maker.model)
            return traffic is not None and traffic.weight > 0

        wait_for(in_canary, 200, "no canary begins", every=0.05)
        with stack.supervisor._rpc() as rpc:
            rpc.stopProcess("prefect")

    halting = threading.Thread(target=halt)
    try:
        # Its client gives up sooner than it would, so that we do.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}), live(stack, maker.model, tmp_path) as traffic:
            halting.start()
            code = cli.run(["promote", maker.model, "--policy", str(policy(CANARY)), "--version", challenger])
            said = capfd.readouterr()
            assert code == cli.FINE, said
            assert "its flow run does not show how this ended" in said.err
            assert stack.traffic(maker.model).champion == registry.aliased(maker.model, "champion") == challenger
            assert cli.run(["rollback", maker.model]) == cli.FINE
            assert "Prefect does not answer" in capfd.readouterr().err
            answered = traffic.stop()
    finally:
        halting.join()
        with stack.supervisor._rpc() as rpc:
            rpc.startProcess("prefect", False)
        wait_for(lambda: settings.answers(settings.prefect), 120, "Prefect does not come back", every=0.2)
    assert answered.failed == 0
    assert stack.traffic(maker.model).champion == registry.aliased(maker.model, "champion") == champion


@pytest.mark.long
def test_a_hand_that_moves_the_alias_is_seen_and_mended(
    stack: Any, maker: Maker, policy: Policy, capfd: pytest.CaptureFixture[str]
) -> None:
    """Status is red and says who sees what; doctor lets the alias follow what serves, on request."""
    champion, other = crown(maker, policy), maker.version(seed=5)
    registry.client().set_registered_model_alias(maker.model, "champion", other)
    assert cli.run(["status", "--json"]) == cli.ERROR
    (found,) = [one for one in json.loads(capfd.readouterr().out)["models"] if one["model"] == maker.model]
    said = f"the gateway serves v{champion}, the alias champion names v{other}, the journal says v{champion}"
    assert said in found["problems"][0]
    assert cli.run(["promote", maker.model, "--policy", str(policy(INTEGRITY)), "--version", other]) != cli.FINE
    capfd.readouterr()
    assert cli.run(["doctor", "--mend"]) == cli.FINE
    assert f"names v{champion} again" in capfd.readouterr().out
    assert registry.aliased(maker.model, "champion") == champion

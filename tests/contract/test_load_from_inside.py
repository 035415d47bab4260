"""A load sent by Jobs in the cluster, through the gateway, to real versions."""

import os
from pathlib import Path

import pytest

from deployments.kubernetes.cluster import Load
from deployments.kubernetes.jobs import LOAD
from deployments.kubernetes.target import KubernetesTarget
from loadtests.distributed import run
from loadtests.run import Profile
from tasks.load import LOAD_HEADER
from tasks.senders import sender
from tests.cluster.world import KubernetesWorld
from tests.contract.clients import MODEL, body


@pytest.mark.long
@pytest.mark.timeout(400)
def test_jobs_load_two_versions_side_by_side(kubernetes_world: KubernetesWorld, tmp_path: Path) -> None:
    """Two workers in the cluster send each version what one would; all of it is answered, and nothing of it is left."""
    own = kubernetes_world.own is not None
    if not own and os.environ.get("TITLESHOT_TEST_PLAIN"):
        pytest.skip("the load's Jobs need an image with our programs (TITLESHOT_TEST_PLAIN)")
    settings = kubernetes_world.cluster.model_copy(update={"load": Load(by="jobs")})
    target = KubernetesTarget(settings)
    crew, hosts = sender(target, MODEL, "load-from-inside")
    assert crew is not None
    # A real cluster's pods may not reach the tests' gateway, and they have names for Services.
    found = {number: one.url if own else one.direct for number, one in target.deployed(MODEL).items()}
    (tmp_path / "payloads").write_bytes(body(1.0) + b"\n")
    result = run(
        Profile(rate=20, seconds=3, headers=LOAD_HEADER, max_lateness=30.0),
        {name: f"{found[number]}/invocations" for name, number in (("champion", "1"), ("challenger", "2"))},
        tmp_path / "payloads",
        workers=2,
        crew=crew,
        hosts=hosts,
    )
    for name, number in (("champion", "1"), ("challenger", "2")):
        one = result.targets[name]
        assert (one.sent, one.failed, one.latencies.size) == (60, 0, 60), one.reasons
        assert one.versions == {number: 60}
    assert result.seconds >= 3
    assert target.client.items("Job", {LOAD: MODEL}) == target.client.items("ConfigMap", {LOAD: MODEL}) == []

"""The real target across stops, crashes and restarts of its parts."""

import os
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest

from deployments.local import envoy
from deployments.local.supervisor import Supervisor, wait_for
from deployments.local.target import LocalTarget
from deployments.target import NeverReady, TargetError, Traffic, Version
from tests.contract.conftest import MODEL, LocalWorld, Reply


def _holds(real: LocalWorld, gateway: str, traffic: Traffic) -> None:
    assert real.target.gateway(MODEL) == gateway
    assert set(real.target.deployed(MODEL)) >= {"1", "2", "3"}
    assert real.target.traffic(MODEL) == traffic
    assert {(reply.status, reply.version) for reply in real.send(20)} == {(200, "2")}
    assert {reply.status for reply in real.send(2, version="3")} == {200}


def test_a_stop_and_a_start_serve_as_before(real: LocalWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop lets requests in flight end [trap 16] and leaves no process; a start brings back the same ports,
    versions and traffic, also where all generated files are gone; a port that another program took in
    between is named."""
    fence = real.target.lease(MODEL, "me")
    traffic = Traffic(MODEL, "2", "3", weight=0, mirror=0, fallback="1")
    real.target.route(traffic, fence)
    gateway = real.target.gateway(MODEL)
    pids = [status.pid for status in real.local.supervisor.status().values() if status.pid]
    replies: list[Reply] = []
    slow = threading.Thread(target=lambda: replies.extend(real.at_once(2, x=-1.5)))
    slow.start()
    clusters = envoy.involving(MODEL, "2", ["1", "3"])
    wait_for(lambda: real.local._gateway.active(clusters), 10, "the slow requests did not arrive")
    real.local.stop()
    slow.join()
    assert {reply.status for reply in replies} == {200}
    assert not real.local.supervisor.up()
    assert not real.local.ready()
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    real.local.stop()  # a second stop is no error

    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", httpx.URL(gateway).port or 0))
        thief.listen()
        with pytest.raises(TargetError, match=f"the gateway of {MODEL}"):
            real.local.start()
        assert not real.local.supervisor.up()

    for file in [*real.home.glob("run/xds/*/*.json"), *real.home.glob("run/conf.d/model-*")]:
        file.unlink()
    LocalTarget(real.home, real.options).start()  # another process would have its own object
    _holds(real, gateway, traffic)
    real.local.start()  # a second start is no error, and restarts nothing
    _holds(real, gateway, traffic)
    real.target.release(fence)


def test_a_killed_supervisor_is_replaced_and_its_orphans_ended(real: LocalWorld) -> None:
    """After kill -9 of supervisord a start ends what it left behind and serves as before."""
    fence = real.target.lease(MODEL, "me")
    real.target.route(Traffic(MODEL, "2"), fence)
    gateway, orphan = real.target.gateway(MODEL), real.pid("2")
    os.kill(int((real.home / "run" / "supervisord.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: not real.local.supervisor.up(), 10, "supervisord is still there")
    real.local.start()
    assert real.pid("2") != orphan
    _holds(real, gateway, Traffic(MODEL, "2"))
    real.target.release(fence)


def test_a_killed_gateway_comes_back_with_its_traffic(real: LocalWorld) -> None:
    """After kill -9 of Envoy the supervisor's new one obeys the same traffic."""
    fence = real.target.lease(MODEL, "me")
    traffic = Traffic(MODEL, "2", "3", weight=100)
    real.target.route(traffic, fence)
    pid = real.local.supervisor.status()["gateway"].pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: real.local.supervisor.status()["gateway"].pid not in {0, pid}, 20, "no new gateway")
    wait_for(real.local.ready, 20, "the gateway is not ready")
    assert real.target.traffic(MODEL) == traffic
    assert {reply.status for reply in real.send(20)} == {200}
    real.target.release(fence)


def test_a_home_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    """The error names TITLESHOT_HOME and what to do."""
    with pytest.raises(TargetError, match=r"TITLESHOT_HOME.*shorter"):
        Supervisor(tmp_path / ("x" * 100))


def test_an_environment_that_cannot_be_made_blames_nobody(real: LocalWorld) -> None:
    """Where MLflow cannot prepare a version's own environment it is the platform's error, in MLflow's words (no
    network is no fault of the version's), and nothing is left behind."""
    fence, good = real.target.lease(MODEL, "me"), real.version("7")
    with pytest.raises(TargetError, match=r"environment cannot be made: .*nonsense") as failure:
        real.target.deploy(Version(MODEL, "7", good.path, good.digest, env_manager="nonsense"), fence)
    assert not isinstance(failure.value, NeverReady)
    assert "7" not in real.target.deployed(MODEL)
    real.target.release(fence)

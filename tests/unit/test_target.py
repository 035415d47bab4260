"""The local target's smaller parts: the state database, supervisord's files, runtimes."""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from configparser import RawConfigParser
from pathlib import Path

import pytest
from supervisor.datatypes import dict_of_key_value_pairs

from deployments.local.state import Deployed, State
from deployments.local.supervisor import Program, Supervisor
from deployments.runtimes import Protocol, Runtime, flavours, runtime
from deployments.target import (
    Fence,
    Histogram,
    Holder,
    LeaseHeld,
    Served,
    StaleFence,
    TargetError,
    TargetUnavailable,
    Traffic,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(tmp_path: Path, clock: Clock) -> State:
    return State(tmp_path / "state.db", ttl=60, clock=clock)


def test_a_lease_is_renewed_by_its_holder(state: State, clock: Clock) -> None:
    """Taking one's own lease again extends it and keeps the number, so does each check."""
    fence = state.lease("m", "me")
    clock.now += 50
    assert state.lease("m", "me") == fence
    clock.now += 50
    state.check("m", fence)
    clock.now += 50
    with pytest.raises(LeaseHeld, match="me since"):
        state.lease("m", "other")


def test_a_lapsed_lease_goes_to_the_next(state: State, clock: Clock) -> None:
    """After its time another holder gets it under the next number, and the old fence is stale for ever."""
    old = state.lease("m", "me")
    clock.now += 61
    state.check("m", old)  # nobody took it: it is renewed
    clock.now += 61
    new = state.lease("m", "other")
    assert new.number == old.number + 1
    with pytest.raises(StaleFence, match="other"):
        state.check("m", old)
    state.release(old)
    state.check("m", new)
    state.release(new)
    with pytest.raises(StaleFence, match="nobody"):
        state.check("m", new)
    assert state.lease("m", "me").number == new.number + 1


def test_a_lease_that_is_taken_leaves_its_holder_with_a_stale_fence(state: State) -> None:
    """An operator waits for nobody; the one who had it can do nothing more, not even renew or release."""
    old = state.lease("m", "me")
    new = state.lease("m", "operator", take=True)
    assert new.number == old.number + 1
    for verb in (lambda: state.check("m", old), lambda: state.guard(old).__enter__()):
        with pytest.raises(StaleFence, match="operator"):
            verb()
    state.release(old)
    assert state.holder("m") == Holder("operator", pytest.approx(time.time(), abs=60), 60)


def test_who_is_told_that_it_is_held_is_told_by_whom_and_until_when(state: State, clock: Clock) -> None:
    """The refusal names the holder, since when, and when its lease lapses."""
    state.lease("m", "me")
    clock.now += 20
    with pytest.raises(LeaseHeld, match=r"m is held by me since 20\d\d-.*; its lease lapses in 40 s unless"):
        state.lease("m", "other")


def test_no_change_of_the_time_of_day_ends_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day forward or back: it is held as before, since leases count the machine's own seconds."""
    state = State(tmp_path / "state.db", ttl=60)
    fence, now = state.lease("m", "me"), time.time()
    for jump in (86_400, -86_400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        with pytest.raises(LeaseHeld):
            state.lease("m", "other")
        state.check("m", fence)


def test_a_lease_does_not_outlive_the_machine(tmp_path: Path, clock: Clock) -> None:
    """Its holder cannot have survived a start of the machine, whatever its clock shows."""
    path = tmp_path / "state.db"
    State(path, ttl=60, clock=clock, boot="first").lease("m", "me")
    assert State(path, ttl=60, clock=clock, boot="second").lease("m", "other").number == 2


def test_a_guard_holds_off_the_next_holder(state: State, clock: Clock) -> None:
    """While something is written that knows no fences, a lease that lapses meanwhile is not given to another."""
    fence, order = state.lease("m", "me"), []
    with ThreadPoolExecutor() as threads:
        with state.guard(fence):
            clock.now += 61

            def take() -> None:
                state.lease("m", "other")
                order.append("taken")

            taking = threads.submit(take)
            with pytest.raises(TimeoutError):
                taking.result(0.5)
            order.append("written")
        taking.result(10)
    assert order == ["written", "taken"]


def test_a_fence_is_for_its_model(state: State) -> None:
    """A lease of one model opens no other, and no lease opens nothing."""
    fence = state.lease("m", "me")
    with pytest.raises(StaleFence):
        state.check("n", fence)
    with pytest.raises(StaleFence):
        state.check("n", Fence("n", "me", 1))


def test_what_is_recorded_outlives_the_process(state: State, tmp_path: Path) -> None:
    """Endpoints, gateways, traffic and the growing number are there for the next one to look."""
    one = Deployed("m", "1", 18001, "/models/1", "sha256:a", "/usr/bin/python", ready=True)
    state.save(one)
    state.save_gateway("m", 18000)
    traffic = Traffic("m", "1", "2", weight=100, fallback="1")
    state.save_traffic(traffic, 4)
    numbers = [state.next_number() for _ in range(3)]
    again = State(tmp_path / "state.db")
    assert again.endpoints() == again.endpoints("m") == [one]
    assert again.endpoints("n") == []
    assert again.gateways() == {"m": 18000}
    assert again.ports() == {18000, 18001}
    assert again.traffic("m") == traffic
    assert again.next_number() > max(numbers) == 3
    again.forget("m", "1")
    assert state.endpoints() == []


def test_two_servers_never_share_a_port(state: State) -> None:
    """The database itself refuses one port for two versions, and a second port for a gateway."""
    state.save(Deployed("m", "1", 18001, "/models/1", "d", "python", ready=False))
    state.save(Deployed("m", "1", 18001, "/models/1", "d", "python", ready=True))
    with pytest.raises(TargetError, match="second use"):
        state.save(Deployed("m", "2", 18001, "/models/2", "d", "python", ready=True))
    assert [(one.version, one.ready) for one in state.endpoints()] == [("1", True)]
    state.save_gateway("m", 18000)
    with pytest.raises(TargetError, match="second use"):
        state.save_gateway("m", 18009)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    # Sockets need a short path, shorter than pytest's own.
    with tempfile.TemporaryDirectory(prefix="ts.", dir="/tmp") as home:
        yield Supervisor(Path(home))


def parsed(supervisor: Supervisor, program: Program) -> dict[str, str]:
    """The program's section, as supervisord reads it."""
    parser = RawConfigParser(inline_comment_prefixes=(";", "#"), strict=False)
    parser.read_string(supervisor._program_config(program))
    return {key: value.replace("%%", "%") for key, value in parser[f"program:{program.name}"].items()}


@pytest.mark.parametrize(
    "value", ["plain", "with space", "50%", "a,b=c", "it's", '{"json": 1}', "http://x:1/?a=b#c", ""]
)
def test_values_survive_supervisords_file(supervisor: Supervisor, value: str) -> None:
    """Arguments and environment reach the program as they were given."""
    import shlex

    found = parsed(supervisor, Program("p", ["cmd", value, "end"], {"NAME": value, "Z": "1"}))
    assert shlex.split(found["command"]) == ["cmd", value, "end"]
    assert dict_of_key_value_pairs(found["environment"]) == {"NAME": value, "Z": "1"}


@pytest.mark.parametrize("value", ["two\nlines", "a ;b", "a #b", "both ' and \"", "'quoted'"])
def test_values_that_would_not_survive_are_refused(supervisor: Supervisor, value: str) -> None:
    """What supervisord's format cannot hold is an error, never another value."""
    with pytest.raises(TargetError, match="cannot hold"):
        supervisor._program_config(Program("p", ["cmd"], {"NAME": value}))


def test_secrets_in_an_environment_are_for_the_owner_only(supervisor: Supervisor) -> None:
    """Program files are readable by their owner alone."""
    supervisor.prepare(Program("p", ["cmd"], {"KEY": "secret"}))
    file = supervisor.run / "conf.d" / "p.conf"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_supervisor_that_is_down_is_unavailable(supervisor: Supervisor) -> None:
    """Without supervisord the question is worth another try; a stop is no error."""
    assert not supervisor.up()
    with pytest.raises(TargetUnavailable):
        supervisor.status()
    supervisor.stop()
    assert supervisor.tail("nothing") == ""


MLMODEL = """\
artifact_path: model
flavors:
  python_function:
    env:
      conda: conda.yaml
    loader_module: mlflow.sklearn
  sklearn:
    code: null
signature:
  inputs: '[]'
"""


def test_runtimes() -> None:
    """A model with python_function is served by MLflow's scoring contract; any other is refused by name."""
    assert flavours(MLMODEL) == ("python_function", "sklearn")
    assert runtime(MLMODEL) == (Runtime.MLFLOW_SCORING, Protocol.INVOCATIONS)
    with pytest.raises(TargetError, match="flavours openai"):
        runtime("flavors:\n  openai:\n    data: x\nother:\n  python_function:\n")
    for text in ("", "flavors: {python_function: {}}", "flavors:\n", "nonsense"):
        with pytest.raises(TargetError, match="no flavours"):
            runtime(text)


def test_counts_that_went_backwards_are_not_evidence() -> None:
    """After a restart of the gateway a difference is an error, not a small number."""
    with pytest.raises(TargetUnavailable):
        Served({"200": 3}).since(Served({"200": 5}))
    with pytest.raises(TargetUnavailable):
        Served({}).since(Served({"200": 5}))
    later = Served({"200": 5, "500": 1}, Histogram((0.1,), (4, 2)))
    assert later.since(Served({"200": 2}, Histogram((0.1,), (1, 1)))) == Served(
        {"200": 3, "500": 1}, Histogram((0.1,), (3, 1))
    )
    assert (later.requests, later.errors) == (6, 1)

"""A full disk, a clock that jumps, configurations that are refused, cannot be written or never arrive."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.local.target import LocalTarget
from deployments.target import LeaseHeld, StaleFence, TargetError, Traffic
from tests.chaos.conftest import Arena, arena
from tests.contract.conftest import MODEL


def refused(arena: Arena, traffic: Traffic) -> str:
    """What `route` says when it cannot; it says it in one line, and nothing has changed."""
    before = arena.local.traffic(MODEL)
    with pytest.raises(TargetError) as failure:
        arena.local.route(traffic, arena.fence)
    message = str(failure.value)
    assert message
    assert "\n" not in message
    assert arena.local.traffic(MODEL) == before == arena.local._state.traffic(MODEL)
    return message


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of its own at a short path; skips where we may not mount one."""
    path = Path(tempfile.mkdtemp(prefix="ts.", dir="/tmp"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "titleshot-test", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        try:
            yield path
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
    finally:
        path.rmdir()


def test_a_full_disk(artifacts: Path) -> None:
    """Serving goes on. Every verb that has to write fails with one clear line and changes nothing; once there is space
    again all works, and the journal has what it had."""
    with small_disk(32) as home, arena(artifacts, home, ("1", "2"), lease_ttl=600.0) as one, one.prober("1") as prober:
        filler = home / "filler"
        with filler.open("wb", buffering=0) as stream:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while stream.write(bytes(size)):
                        pass
        prober.wait_more(50, "1")
        journal = one.local.journal(MODEL)
        said = refused(one, Traffic(MODEL, "2", fallback="1"))
        assert any(word in said for word in ("space", "full")), said
        for verb in (
            lambda: one.local.deploy(one.version("3"), one.fence),
            lambda: one.local.keep(MODEL, 2, one.fence),
            lambda: one.local.lease("another", "chaos"),
        ):
            with pytest.raises(TargetError) as failure:
                verb()
            assert "\n" not in str(failure.value)
            assert any(word in str(failure.value) for word in ("space", "full")), failure.value
        assert set(one.local.deployed(MODEL)) == {"1", "2"}
        assert one.local.journal(MODEL) == journal
        prober.wait_more(50, "1")

        filler.unlink()
        one.route(Traffic(MODEL, "2", fallback="1"), prober)
        one.local.deploy(one.version("3"), one.fence)
        one.route(Traffic(MODEL, "3", fallback="2"), prober)
        one.local.retire(MODEL, "1", one.fence)
        prober.wait_more(50, "3")
    prober.result.assert_clean()


def test_a_clock_that_jumps_a_day_ahead(calm: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that is held stays held, for its holder and against others; traffic moves as before."""
    with calm.prober("1") as prober:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 86_400)
        other = LocalTarget(calm.home, calm.local.options)  # as another process has it
        with pytest.raises(LeaseHeld, match="chaos"):
            other.lease(MODEL, "thief")
        calm.route(Traffic(MODEL, "2"), prober)
        monkeypatch.setattr(time, "time", lambda: real() - 86_400)
        with pytest.raises(LeaseHeld, match="chaos"):
            other.lease(MODEL, "thief")
        calm.route(Traffic(MODEL, "1"), prober)
        assert calm.local.lease(MODEL, "chaos") == calm.fence
        prober.wait_more(10)
    prober.result.assert_clean()


def test_a_lease_that_was_lost_moves_nothing(calm: Arena) -> None:
    """Who comes back after another holder took the lease is refused at each verb, and the traffic stays."""
    old = calm.fence
    calm.local.release(old)
    calm.fence = calm.local.lease(MODEL, "next")
    with calm.prober("1") as prober:
        for verb in (
            lambda: calm.local.route(Traffic(MODEL, "2"), old),
            lambda: calm.local.deploy(calm.version("4"), old),
            lambda: calm.local.retire(MODEL, "3", old),
            lambda: calm.local.keep(MODEL, 5, old),
        ):
            with pytest.raises(StaleFence):
                verb()
        prober.wait_more(20, "1")
    prober.result.assert_clean()
    assert set(calm.local.deployed(MODEL)) == {"1", "2", "3"}
    calm.local.release(calm.fence)


@pytest.mark.parametrize("what", ["no JSON", "empty", "unknown cluster"])
def test_a_broken_file_behind_our_back(calm: Arena, what: str) -> None:
    """The gateway keeps what it had, the traffic is told as it is, and the next route mends the file."""
    path = calm.local._gateway.path("rds", MODEL)
    good = path.read_text()
    content = {"no JSON": good[: len(good) // 2], "empty": "", "unknown cluster": good.replace(f"{MODEL}-1", "nowhere")}
    with calm.prober("1") as prober:
        broken = path.parent.parent / "broken"
        broken.write_text(content[what])
        broken.replace(path)
        prober.wait_more(30, "1")
        assert calm.local.traffic(MODEL) == Traffic(MODEL, "1")
        calm.route(Traffic(MODEL, "2"), prober)
        prober.wait_more(30, "2")
        calm.route(Traffic(MODEL, "1"), prober)
    prober.result.assert_clean()


@pytest.mark.parametrize("how", ["chattr", "in the way"])
def test_a_file_that_cannot_be_written(calm: Arena, how: str) -> None:
    """Where the routes' directory is read-only, or something is in the way, `route` says so and changes nothing."""
    path = calm.local._gateway.path("rds", MODEL)
    with calm.prober("1") as prober, contextlib.ExitStack() as stack:
        if how == "chattr":  # root may write where modes forbid it
            done = subprocess.run(["chattr", "+i", str(path.parent)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"a directory cannot be made immutable here: {done.stderr.strip()}")
            stack.callback(subprocess.run, ["chattr", "-i", str(path.parent)], check=True)
        else:
            kept = path.read_text()
            path.unlink()
            path.mkdir()
            (path / "file").touch()  # a rename cannot replace it

            def back() -> None:
                (path / "file").unlink()
                path.rmdir()
                path.write_text(kept)

            stack.callback(back)
        assert f"rds.{MODEL}" in refused(calm, Traffic(MODEL, "2"))
        prober.wait_more(30, "1")
        stack.close()
        calm.route(Traffic(MODEL, "2"), prober)
        prober.wait_more(30, "2")
    prober.result.assert_clean()


def test_an_update_that_never_arrives(calm: Arena) -> None:
    """Where the gateway hangs (SIGSTOP) `route` gives up, puts the last good file back and records nothing: when
    the gateway goes on it obeys what it obeyed, and those who waited are answered."""
    # Fewer than a server lets wait: all that comes meanwhile reaches it at once.
    with calm.prober("1", timeout=60, kept=10, fresh=5, stream=5) as prober:
        path = calm.local._gateway.path("rds", MODEL)
        good = path.read_text()
        before = calm.local._state.traffic(MODEL)
        with contextlib.ExitStack() as stack:
            for pid in calm.gateways().values():
                stack.enter_context(calm.stopped(pid))
            with pytest.raises(TargetError) as failure:
                calm.local.route(Traffic(MODEL, "2"), calm.fence)
            assert "\n" not in str(failure.value)
        assert path.read_text() == good
        assert calm.local._state.traffic(MODEL) == before == calm.local.traffic(MODEL)
        prober.wait_more(30, "1")
        calm.healthy("1", "2")
        calm.route(Traffic(MODEL, "2"), prober)
        prober.wait_more(30, "2")
    prober.result.assert_clean()


def test_one_gateway_of_two_that_never_obeys(calm: Arena) -> None:
    """Where one of two gateways hangs, `route` does not say that it is done: the two would disagree."""
    with calm.prober("1", timeout=60) as prober:
        before = calm.local._state.traffic(MODEL)
        name, pid = max(calm.gateways().items())
        if name == "gateway":
            pytest.skip("there is one gateway only")
        prober.allow({"1", "2"})  # the other one obeys until the first good file is back
        with calm.stopped(pid), pytest.raises(TargetError) as failure:
            calm.local.route(Traffic(MODEL, "2"), calm.fence)
        assert "\n" not in str(failure.value)
        assert calm.local._state.traffic(MODEL) == before == calm.local.traffic(MODEL)
        prober.allow({"1"})
        prober.wait_more(50, "1")
        calm.healthy("1", "2")
    prober.result.assert_clean()

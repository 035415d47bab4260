"""Loads by several workers: their plans and results put together, and a real run of two worker processes."""

import dataclasses
import itertools
import json
import math
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import loadtests.distributed as module
from loadtests.distributed import (
    MAX_CLOCK_ERROR,
    Part,
    Processes,
    frames,
    merge,
    nearest,
    pack,
    pack_part,
    run,
    share,
    unframe,
    unpack,
    unpack_part,
)
from loadtests.plan import Plan
from loadtests.report import slices, summary
from loadtests.run import Failure, LoadError, Profile, Result, Saturated, Target, plan_of
from tests.unit.test_load import EASY, ROOT, payloads, server, wait_for  # noqa: F401 - fixtures
from validations.gates import Load
from validations.policy import PolicyError, read
from validations.statistics import quantile, quantile_ratio

BOTH = ["champion", "challenger"]
BEGUN = 5000.0


# --- plans


@settings(deadline=None, max_examples=60)
@given(
    rate=some.floats(1, 500),
    seconds=some.floats(0.1, 5),
    arrivals=some.sampled_from(["constant", "poisson", "recorded"]),
    times=some.lists(some.floats(0, 0.09), min_size=1, max_size=40),
    workers=some.integers(1, 7),
    targets=some.integers(1, 3),
    seed=some.integers(0, 3),
)
def test_all_workers_together_send_what_a_single_one_would(
    rate, seconds, arrivals, times, workers, targets, seed, tmp_path_factory
):
    """The same requests at the same times, each by one worker; in each worker both versions have the same share."""
    more = {"times": tuple(sorted(times))} if arrivals == "recorded" else {}
    if arrivals != "recorded" and round(rate * seconds) < 1:
        return
    profile = Profile(rate, seconds, arrivals=arrivals, seed=seed, **more)
    names = {f"t{n}": f"http://127.0.0.1/{n}" for n in range(targets)}
    folder = tmp_path_factory.getbasetemp()
    (folder / "p").write_text("1\n2\n3\n")

    def schedule(**part):
        files = {"payloads": str(folder / "p"), "result": "r", "progress": "p"}
        (folder / "plan.json").write_text(json.dumps(plan_of(profile, names) | files | part))
        return list(Plan(folder / "plan.json").arrivals())

    whole = schedule()
    parts = [schedule(part=number, parts=workers) for number in range(workers)]
    assert sorted(itertools.chain.from_iterable(parts)) == sorted(whole)
    for number, part in enumerate(parts):
        assert part == sorted(part, key=lambda arrival: arrival[0])
        for name in names:
            assert sum(arrival[1] == name for arrival in part) == share(profile.planned, number, workers)


def test_a_plan_is_the_one_that_was_sent(tmp_path):
    """Plan and requests arrive as they were, or not at all."""
    (tmp_path / "p").write_text('{"a": 1}\n{"a": 2}\n')
    packed = pack(Profile(5, 2), {"a": "http://127.0.0.1/"}, tmp_path / "p", 2)
    digest = module.hashlib.sha256(packed).hexdigest()
    plan, bodies = unpack(packed, digest)
    assert (plan["parts"], plan["rate"], bodies) == (2, 5, b'{"a": 1}\n{"a": 2}\n')
    with pytest.raises(LoadError, match="not the one that was sent"):
        unpack(packed[:-1], digest)


def test_what_cannot_be_spread_is_refused(tmp_path):
    """Before anything is started: no targets or requests, strangers, too many workers, too few requests or too many."""
    (tmp_path / "p").write_text("{}\n")
    here = {"a": "http://127.0.0.1:1/"}
    for profile, targets, file, workers, hosts, message in (
        (Profile(5, 2), {}, "p", 2, (), "at least one target"),
        (Profile(5, 2), here, "nowhere", 2, (), "no payloads"),
        (Profile(5, 2), here, "p", 51, (), "from 1 to 50"),
        (Profile(1, 2), here, "p", 3, (), "too few for 3 workers"),
        (Profile(1000, 1000), here, "p", 2, (), "more workers are needed"),
        (Profile(5, 2), {"a": "http://models.test/"}, "p", 2, (), "only http on this machine"),
        (Profile(5, 2), {"a": "http://models.test/"}, "p", 2, ("others.test",), "only others.test is load-tested"),
        (Profile(5, 2), here, "p", 2, ("others.test",), "only others.test is load-tested"),
        (Profile(5, 2), {"a": "ftp://others.test/"}, "p", 2, ("others.test",), "only others.test is load-tested"),
    ):
        with pytest.raises(ValueError, match=message):
            run(profile, targets, tmp_path / file, workers=workers, hosts=hosts)


@given(
    offset=some.floats(-1e6, 1e6),
    delays=some.lists(some.tuples(some.floats(0, 5), some.floats(0, 5)), min_size=1, max_size=15),
)
def test_the_masters_clock_is_known_within_what_is_said(offset, delays):
    """Whatever the delays on the way and back, the true difference of the clocks lies within the error."""
    exchanges = [
        (10.0 * n, 10.0 * n + there + offset, 10.0 * n + there + back) for n, (there, back) in enumerate(delays)
    ]
    found, error = nearest(exchanges)
    assert abs(found - offset) <= error + 1e-6
    assert error <= min(there + back for there, back in delays) / 2 + 1e-6


# --- results


def whole_run(rounds, seed, *, failing=0.1):
    """What a single worker would have measured: both versions, some failures; requests end in another order than they began."""
    luck = np.random.default_rng(seed)
    at = np.sort(luck.uniform(0, 10, rounds))
    targets = {}
    for name in BOTH:
        latencies = luck.gamma(2, 0.01, rounds)
        latencies[luck.uniform(size=rounds) < failing] = math.inf
        ended = np.argsort(at + np.where(np.isinf(latencies), 10, latencies), kind="stable")
        failed = int(np.isinf(latencies).sum())
        reasons = {"HTTP 500": failed} if failed else {}
        targets[name] = Target(rounds, latencies[ended], at[ended], reasons, {"3": rounds - failed})
    lateness = luck.exponential(0.001, 2 * rounds)
    failures = tuple(Failure(1000.0 + n, "champion", "HTTP 500", 500, str(n)) for n in range(5))
    return Result(1000.0, 10.0, targets, failures, lateness, 0.5), at


def split(result, at, workers):
    """The same run by `workers`, whose calendars differ by hours."""
    parts = []
    for number in range(workers):
        mine = at[number::workers]
        targets = {}
        for name, target in result.targets.items():
            chosen = np.isin(target.at, mine)
            failed = int(np.isinf(target.latencies[chosen]).sum())
            targets[name] = Target(
                int(chosen.sum()),
                target.latencies[chosen],
                target.at[chosen],
                {"HTTP 500": failed} if failed else {},
                {"3": int(chosen.sum()) - failed},
            )
        lateness = result.lateness.reshape(-1, 2)[number::workers].reshape(-1)
        began = 1000.0 + 3600 * number
        failures = tuple(
            dataclasses.replace(failure, time=failure.time + 3600 * number)
            for failure in result.failures[number::workers]
        )
        # What the first worker's calendar says is what counts.
        own = Result(began, 10.0 + number / 100, targets, failures, lateness, 0.5 - number / 100)
        parts.append(Part(number, workers, "d", BEGUN, 0.001, own))
    return parts


def profile_of(rounds, **changes):
    return Profile(rounds / 10, 10, **{"max_lateness": 1.0, **changes})


@settings(deadline=None, max_examples=40)
@given(rounds=some.integers(8, 300), workers=some.integers(1, 8), seed=some.integers(0, 99), luck=some.randoms())
def test_parts_put_together_are_the_whole(rounds, workers, seed, luck):
    """The same percentiles, intervals, slices, counts and lateness as of one worker who had sent everything, and bit by
    bit the same measurements, in whatever order the workers' logs come.
    """
    result, at = whole_run(rounds, seed)
    parts = [unpack_part(pack_part(part)) for part in split(result, at, workers)]
    luck.shuffle(parts)
    merged = merge(parts, profile_of(rounds), BOTH, "d")
    for name in BOTH:
        one, other = result.targets[name], merged.targets[name]
        assert sorted(zip(one.at, one.latencies, strict=True)) == sorted(zip(other.at, other.latencies, strict=True))
        assert (one.sent, one.reasons, one.versions) == (other.sent, other.reasons, other.versions)
        for q in (0.5, 0.9, 0.95, 0.99):
            assert quantile(other.latencies, q, 0.95) == quantile(one.latencies, q, 0.95)
    new, old = merged.targets["challenger"].latencies, merged.targets["champion"].latencies
    before = [result.targets[name].latencies for name in reversed(BOTH)]
    assert quantile_ratio(new, old, 0.95, 0.95) == quantile_ratio(*before, 0.95, 0.95)
    assert (merged.lateness == result.lateness).all()
    assert (merged.started, merged.seconds, merged.cpu) == (1000.0, 10.0 + (workers - 1) / 100, 0.5)
    assert merged.failures == result.failures
    told, known = summary(merged), summary(result)
    assert told["load"] == known["load"]
    for cut, expected in zip(slices(merged, 1.0), slices(result, 1.0), strict=True):
        for name in BOTH:
            assert sorted(cut[name]) == sorted(expected[name])


def changed(part, **changes):
    """The part with another result."""
    return dataclasses.replace(part, result=dataclasses.replace(part.result, **changes))


def shorter(part):
    target = part.result.targets["champion"]
    less = dataclasses.replace(target, sent=target.sent - 1, latencies=target.latencies[1:], at=target.at[1:])
    return changed(part, targets={**part.result.targets, "champion": less})


WRONG = {
    "a worker is missing": (lambda a, b: [a], "not those of 1 workers: there are 0 of 2"),
    "one is there twice": (lambda a, b: [a, a], "there are 0 of 2, 0 of 2"),
    "one is of a larger crew": (lambda a, b: [a, dataclasses.replace(b, workers=3)], "0 of 2, 1 of 3"),
    "another plan": (lambda a, b: [a, dataclasses.replace(b, digest="e")], "not of one run"),
    "another beginning": (lambda a, b: [a, dataclasses.replace(b, begun=1.0)], "not of one run"),
    "an unknown clock": (
        lambda a, b: [a, dataclasses.replace(b, clock_error=2 * MAX_CLOCK_ERROR)],
        "worker 1 of 2 knows the master's clock to 200 ms only",
    ),
    "a request too few": (lambda a, b: [a, shorter(b)], "worker 1 of 2 sent 9 of its 10 requests to champion"),
    "a target too few": (
        lambda a, b: [changed(a, targets={"champion": a.result.targets["champion"]}), b],
        "worker 0 of 2 loaded champion instead of champion, challenger",
    ),
    "lateness lost": (lambda a, b: [a, changed(b, lateness=b.result.lateness[1:])], "lost measurements"),
    "an early end": (lambda a, b: [a, changed(b, seconds=4.0)], "worker 1 of 2 ended after 4.0 of 10 s"),
    "one was late": (
        lambda a, b: [a, changed(b, lateness=np.full(20, 1.5))],
        "saturated: 1 % of the requests of worker 1 of 2 left 1500 ms late",
    ),
    "one was busy": (lambda a, b: [a, changed(b, cpu=0.95)], "saturated: worker 1 of 2 used 95% of a core"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_smaller_load_is_never_taken_for_the_whole(how):
    """Whatever is missing, late, of another run or measured by a worker that could not keep up is an error."""
    result, at = whole_run(20, 1)
    parts, (spoil, message) = split(result, at, 2), WRONG[how]
    merge(parts, profile_of(20, max_cpu=0.9), BOTH, "d")
    error = Saturated if "saturated" in message else LoadError
    with pytest.raises(error, match=message):
        merge(spoil(*parts), profile_of(20, max_cpu=0.9), BOTH, "d")


@given(data=some.binary(max_size=20_000), noise=some.lists(some.text(max_size=30), max_size=5))
def test_data_survives_a_log(data, noise):
    """Also among other lines."""
    lines = list(frames(data))
    text = "\n".join([*noise, *lines, "the end"])
    assert unframe(text, "worker 1") == data


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [], "holds no result"),
        (lambda lines: lines[:-1], "holds no result: Traceback"),
        (lambda lines: lines[2:], r"holds 2 of its result's 3 lines: was it rotated\?"),
        (lambda lines: [lines[0], lines[1].replace("A", "B"), *lines[2:]], "is not what was written there"),
        (lambda lines: [*lines, lines[-1]], "holds no result"),
    ],
)
def test_a_log_that_was_cut_is_an_error(spoil, message):
    """A rotated log, a lost line or a changed letter is never half a result."""
    lines = ["Traceback", *frames(bytes(6000))]
    with pytest.raises(LoadError, match=message):
        unframe("\n".join(spoil(lines)), "worker 1")


def test_a_part_that_was_cut_is_an_error():
    """Fewer numbers than are announced are no result."""
    result, at = whole_run(10, 1)
    whole = zlib.decompress(pack_part(split(result, at, 1)[0]))
    with pytest.raises(LoadError, match="worker 0 lost some"):
        unpack_part(zlib.compress(whole[:-8]))


# --- processes


@pytest.mark.long
def test_two_workers_load_both_versions_as_one_would(server, payloads, tmp_path):  # noqa: F811
    """The servers see what a single worker sends, for the whole time; every request is there, at its time."""
    targets = {"champion": server.url("/da1"), "challenger": server.url("/db2")}
    looks = []
    result = run(
        Profile(rate=100, seconds=1, arrivals="poisson", headers={"x-tenant": "t"}, **EASY),
        targets,
        payloads,
        workers=2,
        folder=tmp_path / "run",
        meanwhile=lambda: looks.append(1),
    )
    lines = payloads.read_text().splitlines()
    for path in ("/da1", "/db2"):
        assert sorted(server.seen(path)) == sorted(lines[n % 7] for n in range(100))
    for name, version in (("champion", "1"), ("challenger", "2")):
        target = result.targets[name]
        assert (target.sent, target.failed, target.latencies.size) == (100, 0, 100)
        assert target.versions == {version: 100}
        assert (np.diff(target.at) >= 0).all()
        assert 0 <= target.at[0] < target.at[-1] < 1
    assert result.seconds >= 1
    assert result.lateness.size == 200
    assert (result.lateness >= 0).all()
    assert result.cpu > 0
    assert looks
    sent = [unpack_part(unframe((tmp_path / "run" / f"worker-{n}.log").read_text(), "")) for n in range(2)]
    assert [part.result.sent for part in sent] == [100, 100]
    assert all(part.clock_error < MAX_CLOCK_ERROR for part in sent)


@pytest.mark.long
def test_a_worker_that_dies_is_the_end_of_the_run(server, payloads, tmp_path):  # noqa: F811
    """The error says who, nothing is left running, and no smaller load is the result."""
    folder = tmp_path / "run"
    began = lambda: len(server.seen("/dying")) > 20  # noqa: E731

    def kill():
        if began():
            (child,) = locusts(folder / "worker-1")
            subprocess.run(["kill", "-9", str(child)], check=True)

    with pytest.raises(LoadError, match=r"worker 1 .*exit code"):
        run(
            Profile(rate=50, seconds=120, **EASY),
            {"a": server.url("/dying")},
            payloads,
            workers=2,
            folder=folder,
            meanwhile=kill,
        )
    wait_for(lambda: not locusts(folder))


@pytest.mark.long
def test_a_worker_that_does_not_come_is_the_end_of_the_run(server, payloads, tmp_path, monkeypatch):  # noqa: F811
    """The master waits for all, and then says who is missing; nothing was sent."""
    monkeypatch.setattr(module, "START", 15.0)
    start = Processes._start

    def absent(self, name, options):
        if name == "worker-1":
            return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        return start(self, name, options)

    monkeypatch.setattr(Processes, "_start", absent)
    with pytest.raises(LoadError, match=r"1 of 2 workers came within 15 s, and ready were: none"):
        run(Profile(rate=50, seconds=1), {"a": server.url("/absent")}, payloads, workers=2, folder=tmp_path / "run")
    assert server.seen("/absent") == []


@pytest.mark.long
def test_what_is_raised_meanwhile_ends_all_processes(server, payloads, tmp_path):  # noqa: F811
    """A search that sees live requests hurt does not wait for the run's end."""

    class Hurt(Exception):
        pass

    def look():
        if server.seen("/hurting"):
            raise Hurt

    with pytest.raises(Hurt):
        run(
            Profile(rate=50, seconds=120, **EASY),
            {"a": server.url("/hurting")},
            payloads,
            workers=2,
            folder=tmp_path / "run",
            meanwhile=look,
        )
    wait_for(lambda: not locusts(tmp_path / "run"))


@pytest.mark.long
def test_a_port_that_is_taken_is_an_error_and_not_a_hang(tmp_path):
    """A master that cannot listen ends with Locust's own words."""
    (tmp_path / "p").write_text("{}\n")
    packed = pack(Profile(5, 2), {"a": "http://127.0.0.1:1/"}, tmp_path / "p", 1)
    (tmp_path / "plan.0").write_bytes(packed)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = f"master --plan {tmp_path} --host 127.0.0.1 --port {taken.getsockname()[1]} --patience 5"
        words += f" --digest {module.hashlib.sha256(packed).hexdigest()} --folder {tmp_path}"
        command = [sys.executable, "-m", "loadtests.agent", *words.split()]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "Address already in use" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("Locust's master ended with exit code 1")


def locusts(folder):
    """The processes of Locust that work below `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in str((place / "cwd").readlink()) and b"locust" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return [pid for pid in found if b"loadtests.agent" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


# --- the policy's word


def gate(words):
    return f"version: 1\nmodel: m\ngates:\n  - {{kind: load, checks: {{p95_ms: {{max: 9}}}}, {words}}}\n"


def test_one_worker_is_what_there_is_without_a_word():
    """As before; more are asked for by `workers`, and bounded."""
    assert Load.model_fields["workers"].default == 1
    (load,) = (
        step for step in read(gate("rate: 9/s, run_time: 9s, workers: 4"), "p.yaml").gates if step.kind == "load"
    )
    assert load.workers == 4
    for words, message in (
        ("rate: 9/s, run_time: 9s, workers: 0", "workers"),
        ("rate: 9/s, run_time: 9s, workers: 51", "workers"),
        ("rate: 250/s, run_time: 1h, workers: 2", "each of 2 workers would have 900,000 requests, and keeps 400,000"),
    ):
        with pytest.raises(PolicyError, match=message):
            read(gate(words), "p.yaml")


def test_locust_is_never_imported_beside_us():
    """Prefect hangs in a process that has imported Locust: what tasks import does not, nor does the agent itself."""
    code = "import sys, loadtests.distributed, loadtests.agent; sys.exit(bool({'locust', 'gevent'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

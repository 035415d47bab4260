"""What people do to flow runs in the Prefect UI, and what happens to them: cancelled, paused, retried, killed."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from deployments.target import LeaseHeld
from tasks import approve, flowruns, history, registry
from tasks.journal import opened
from tests.flows.conftest import Maker, People, live, promote, until

Policy = Callable[..., Path]
INTEGRITY = {"kind": "integrity"}
APPROVAL = {"kind": "approval", "approvers": ["ana", "bo"]}
WIDE = {"checks": {"error_rate": {"max": 0.3}}, "bursts": "none"}
SHADOW = {"kind": "shadow", "min_sample": 300, "max": "120s", **WIDE}
CANARY = {"kind": "canary", "weights": [30, 60], "min_sample": 50, "dwell": "6s", "max": "120s", **WIDE}
WATCH = {"kind": "watch", "run_time": "60s", "min_sample": 20, **WIDE}


class Case:
    """A champion, a challenger, and the flow run that was asked for."""

    def __init__(self, stack: Any, settings: Any, maker: Maker, policy: Policy) -> None:
        self.stack, self.settings, self.maker, self.policy, self.model = stack, settings, maker, policy, maker.model
        self.champion, self.challenger = maker.version(), maker.version(seed=1)
        first = promote(model=self.model, policy=str(policy(INTEGRITY, name="first")), version=self.champion)
        assert first["phase"] == "promoted", first
        self.run = ""

    def ask(self, *gates: dict[str, Any]) -> None:
        asked = {"model": self.model, "policy": str(self.policy(*gates)), "version": self.challenger}
        self.run = flowruns.create(self.settings, flowruns.PROMOTE, asked).id

    @property
    def state(self) -> Any:
        found = flowruns.find(self.settings, self.run)
        assert found is not None
        return found

    @property
    def left(self) -> Any:
        return opened(self.stack, self.model)

    def said(self) -> str:
        lines = [f"{self.state}", f"{self.left}"]
        lines += [f"{at:%H:%M:%S} {line}" for at, line in flowruns.logs(self.settings, self.run)]
        lines += [f"{entry.kind} {str(entry.data)[:150]}" for entry in self.stack.journal(self.model)]
        return "\n".join([*lines, self.stack.supervisor.tail("worker", 15), self.stack.supervisor.tail("watch", 15)])

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 150) -> Any:
        return until(condition, seconds, what, self.said)

    def asks(self, number: int = 1, runs: int = 1) -> Any:
        """Wait until the form of this round can be filled in."""

        def there() -> Any:
            left, state = self.left, self.state
            if left is None or left.asked is None or left.asked.round != number or state.type != "PAUSED":
                return None
            prefix = {"prefix": f"suspended-approval-{number}-{runs}-description"}
            stored = flowruns.ask(self.settings, "POST", f"/flow_runs/{self.run}/input/filter", prefix)
            return left.asked if stored else None

        return self.until(there, f"round {number} is not asked")

    def says_yes(self, people: People) -> None:
        form = {"decision": "approve", "approver": "ana", "code": people.code("ana")}
        flowruns.resume(self.settings, self.run, form)

    def doing(self, step: str) -> None:
        """Wait until the flow run performs `step`, in its task: a pause is noticed where the next one begins."""

        def there() -> bool:
            left, traffic = self.left, self.stack.traffic(self.model)
            moved = traffic.mirror or traffic.weight or traffic.champion == self.challenger
            return left is not None and left.doing == step and moved

        self.until(there, f"{step} is not performed")
        assert self.alive()

    def alive(self) -> bool:
        """Whether a process performs the flow run."""
        for child in self.worker().children(recursive=True):
            with suppress(psutil.Error):
                if child.environ().get("PREFECT__FLOW_RUN_ID") == self.run:
                    return True
        return False

    def worker(self) -> psutil.Process:
        return psutil.Process(self.stack.supervisor.status()["worker"].pid)

    def kill_worker(self) -> None:
        worker = self.worker()
        for process in [worker, *worker.children(recursive=True)]:
            with suppress(psutil.Error):
                process.kill()

    def looks(self) -> bool:
        """One look by `watch`, beside that of the stack."""
        from flows import watch

        with suppress(LeaseHeld):
            watch.run()
        return True

    def over(self, phase: str) -> Any:
        """Wait until the promotion has ended, `watch` looking; its record."""
        self.until(lambda: self.looks() and self.left is None, "the promotion does not end")
        entry = history.of_flow_run(self.model, self.run)
        assert entry is not None
        stored = history.stored(entry.run_id)
        assert stored.phase.value == entry.phase == phase, self.said()
        expected = self.challenger if phase == "promoted" else self.champion
        assert registry.aliased(self.model, "champion") == expected
        traffic = self.stack.traffic(self.model)
        assert (traffic.champion, traffic.weight, traffic.mirror) == (expected, 0, 0)
        assert not [asked for asked in approve.pending(self.settings) if asked.subject.promotion == entry.id]
        tags = dict(registry.client().get_model_version(self.model, self.challenger).tags)
        assert not tags.get("titleshot.quarantine")
        return stored

    def ends_as(self, type_: str) -> None:
        self.until(lambda: self.state.type == type_, f"the run does not become {type_}", 60)

    def press(self, type_: str, name: str, **details: Any) -> dict[str, Any]:
        """A button of the Prefect UI."""
        body = {"state": {"type": type_, "name": name, "state_details": details}, "force": True}
        answer = flowruns.ask(self.settings, "POST", f"/flow_runs/{self.run}/set_state", body)
        assert isinstance(answer, dict)
        return answer

    def cancel(self) -> None:
        self.press("CANCELLING", "Cancelling")

    def pause(self, seconds: float = 300) -> None:
        end = datetime.now(UTC) + timedelta(seconds=seconds)
        answer = self.press("PAUSED", "Suspended", pause_timeout=end.isoformat(), pause_reschedule=True)
        assert answer["status"] == "ACCEPT"

    def retry(self) -> None:
        assert self.press("SCHEDULED", "AwaitingRetry")["status"] == "ACCEPT"


@pytest.fixture
def case(stack: Any, worker: Any, settings: Any, maker: Maker, policy: Policy) -> Case:
    return Case(stack, settings, maker, policy)


def stopped(record: Any) -> tuple[str, str, str]:
    bad = record.stopped_by
    return bad.step, bad.outcome.value, bad.evidence.note


@pytest.mark.long
def test_cancelled_while_it_waits(case: Case) -> None:
    """A run that is suspended for an approval and cancelled ends its promotion, and blames nobody."""
    case.ask(INTEGRITY, APPROVAL)
    case.asks()
    case.cancel()
    step, outcome, note = stopped(case.over("rejected"))
    assert (step, outcome) == ("approval", "errored")
    assert "cancelled" in note
    assert case.state.type == "CANCELLED"


@pytest.mark.long
def test_killed_while_it_waits_and_retried(case: Case, people: People) -> None:
    """A killed worker loses nothing that waits, neither does a run started without its form, which gains nothing; once
    it has ended, it is not done twice by a retry.
    """
    case.ask(INTEGRITY, APPROVAL)
    case.asks()
    case.kill_worker()
    case.press("SCHEDULED", "Scheduled")
    again = case.asks(1, runs=2)
    assert not case.left.ballots
    assert again.flow_run == case.run
    case.says_yes(people)
    case.ends_as("COMPLETED")
    record, lines = case.over("promoted"), case.stack.journal(case.model)
    case.retry()
    case.until(lambda: case.state.type == "COMPLETED" and case.state.runs > 2, "the retry does not end")
    assert case.over("promoted") == record
    assert case.stack.journal(case.model) == lines
    case.until(lambda: "nothing is done twice" in case.said(), "the retried run does not say how it ended", 30)


@pytest.mark.long
def test_killed_in_a_step_that_touches_nothing_live(case: Case, tmp_path: Path) -> None:
    """Worker and run are killed while it compares in the shadow: the run goes on with that step, by itself."""
    case.ask(INTEGRITY, SHADOW)
    with live(case.stack, case.model, tmp_path):
        case.doing("shadow")
        killed = datetime.now(UTC)
        case.kill_worker()
        record = case.over("promoted")
    begun = [(v.step, v.evidence.started > killed) for v in record.verdicts]
    assert begun == [("integrity", False), ("deploy", False), ("shadow", True), ("promote", True)]
    case.ends_as("COMPLETED")


@pytest.mark.long
def test_killed_with_live_traffic(case: Case, tmp_path: Path) -> None:
    """Worker and run are killed while the challenger answers live requests: it goes back, and no run seems to go on."""
    case.ask(INTEGRITY, CANARY)
    with live(case.stack, case.model, tmp_path) as traffic:
        case.doing("canary 30%")
        case.kill_worker()
        record = case.over("rolled back")
        assert traffic.stop().failed == 0
    step, outcome, note = stopped(record)
    assert (step, outcome) == ("canary 30%", "errored")
    assert "while it performed" in note
    case.ends_as("CRASHED")


@pytest.mark.long
def test_paused_and_resumed(case: Case, tmp_path: Path) -> None:
    """Paused while it runs it stands still at the end of its step, all live requests with the champion; once resumed
    it goes on with the next one.
    """
    case.ask(INTEGRITY, CANARY)
    with live(case.stack, case.model, tmp_path):
        case.doing("canary 30%")
        case.pause()
        case.until(lambda: case.left.held, "it does not stand still")
        assert "paused" in case.left.held
        assert case.left.waiting
        traffic = case.stack.traffic(case.model)
        assert (traffic.champion, traffic.weight) == (case.champion, 0)
        assert case.looks()
        assert case.left.held
        case.until(lambda: not case.alive(), "its process does not end")
        resumed = datetime.now(UTC)
        flowruns.resume(case.settings, case.run, {})
        record = case.over("promoted")
    begun = [(v.step, v.evidence.started > resumed) for v in record.verdicts][2:]
    assert begun == [("canary 30%", False), ("canary 60%", True), ("promote", True)]
    case.ends_as("COMPLETED")


@pytest.mark.long
def test_a_pause_runs_out(case: Case, tmp_path: Path) -> None:
    """A pause that nobody ends in time ends the promotion."""
    case.ask(INTEGRITY, CANARY)
    with live(case.stack, case.model, tmp_path):
        case.doing("canary 30%")
        case.pause(12)
        record = case.over("rolled back")
    step, outcome, note = stopped(record)
    assert (step, outcome) == ("canary 60%", "errored")
    assert "paused" in note


@pytest.mark.long
def test_paused_before_people_are_asked(case: Case, people: People, tmp_path: Path) -> None:
    """A run that was paused before its approval asks for it once it is resumed."""
    case.ask(INTEGRITY, {**SHADOW, "min_sample": 200}, APPROVAL)
    with live(case.stack, case.model, tmp_path):
        case.doing("shadow")
        case.pause()
        case.until(lambda: case.left.held and not case.alive(), "it does not stand still")
    flowruns.resume(case.settings, case.run, {})
    case.asks()
    case.says_yes(people)
    case.over("promoted")


@pytest.mark.long
def test_a_pause_after_the_cut_over_holds_nothing_back(case: Case, tmp_path: Path) -> None:
    """While the challenger answers every live request somebody has to watch: the promotion goes on to its end."""
    case.ask(INTEGRITY, {**WATCH, "run_time": "12s"}, {**WATCH, "name": "second", "run_time": "6s"})
    with live(case.stack, case.model, tmp_path):
        case.doing("watch")
        case.pause()
        record = case.over("promoted")
    assert [v.step for v in record.verdicts] == ["integrity", "deploy", "promote", "watch", "second"]
    case.until(lambda: not case.alive(), "its process does not end")
    assert case.state.state == "Suspended"
    flowruns.resume(case.settings, case.run, {})
    case.ends_as("COMPLETED")


@pytest.mark.long
def test_cancelled_after_the_cut_over(case: Case, tmp_path: Path) -> None:
    """Cancelled while the new champion is watched, the old one reigns again, without a look by `watch`."""
    case.ask(INTEGRITY, WATCH)
    with live(case.stack, case.model, tmp_path):
        case.doing("watch")
        assert registry.aliased(case.model, "champion") == case.challenger
        case.cancel()
        case.until(lambda: case.left is None, "it is not brought to its end by the hook", 60)
        record = case.over("rolled back")
    step, outcome, note = stopped(record)
    assert (step, outcome) == ("watch", "errored")
    assert "cancelled" in note
    case.ends_as("CANCELLED")


@pytest.mark.long
def test_servers_are_restarted_while_it_waits(case: Case, people: People) -> None:
    """Prefect and MLflow are killed while people are asked: the form finds its run, and it goes on."""
    case.ask(INTEGRITY, APPROVAL)
    case.asks()
    for name in ("prefect", "mlflow"):
        os.kill(case.stack.supervisor.status()[name].pid, signal.SIGKILL)
    addresses = (case.settings.prefect, case.settings.mlflow)
    case.until(lambda: all(map(case.settings.answers, addresses)), "the servers do not come back")
    case.says_yes(people)
    case.over("promoted")
    case.ends_as("COMPLETED")

"""A promotion that is asked for through Prefect, and how it ends: for CI jobs, and for machines that serve nothing."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tasks import flowruns, history, registry
from tasks.flowruns import FlowRun, Unanswered
from tasks.settings import Mistake, Settings
from validations.promotion import Phase

LOOK_EVERY = 2.0
FORGIVEN = 300.0
"""Seconds that servers may be away while one waits for an outcome."""


def ask(settings: Settings, parameters: Mapping[str, Any]) -> FlowRun:
    """Ask for a promotion. Raises `Mistake` where Prefect has no deployment for it, or does not answer."""
    try:
        return flowruns.create(settings, flowruns.PROMOTE, parameters, tags=[f"model/{parameters['model']}"])
    except Unanswered as error:
        raise Mistake(str(error)) from error


def outcome(
    settings: Settings, run: FlowRun, timeout: float | None, say: Callable[[str], None]
) -> tuple[history.Entry | None, FlowRun]:
    """Wait for how a promotion ends, telling what its flow run says meanwhile. Returns its record, None where it never
    began; of one that is not over when `timeout` (seconds) ends, the record has no final phase.

    Raises `Mistake` where the flow run is gone, or Prefect or MLflow stay away.
    """
    begun = well = time.monotonic()
    listener = _Listener(settings, run, say)
    while True:
        try:
            entry = listener.look()
            well = time.monotonic()
            if _over(listener.run, entry) or (timeout is not None and well - begun > timeout):
                return entry, listener.run
        except Exception as error:
            if not isinstance(error, Unanswered) and not registry.unreachable(error):
                raise
            if time.monotonic() - well > FORGIVEN:
                raise Mistake(f"{error}: the promotion goes on without us") from error
        time.sleep(LOOK_EVERY)


@dataclass(slots=True)
class _Listener:
    settings: Settings
    run: FlowRun
    say: Callable[[str], None]
    heard: datetime | None = None
    told: str = ""

    def look(self) -> history.Entry | None:
        """Say what is new, and return the promotion's record where there is one."""
        found = flowruns.find(self.settings, self.run.id)
        if found is None:
            raise Mistake(f"the flow run {self.run.id} is gone from Prefect: `titleshot history` shows what it came to")
        self.run = found
        for at, line in flowruns.logs(self.settings, found.id, self.heard):
            self.heard = at
            self.say(line.splitlines()[0] if line else "")  # a traceback is for the log
        if found.type != "PAUSED":
            self.told = ""
        elif self.told != found.id:
            self.told = found.id
            self.say(f"{found.state}: {flowruns.page(self.settings, found.id)}")
        return history.of_flow_run(str(found.parameters["model"]), found.id, anywhere=True)


def _over(run: FlowRun, entry: history.Entry | None) -> bool:
    if entry is None or entry.region:  # another region may be to come
        return run.over
    # A run that was ended leaves a promotion that `watch` brings to its end.
    return entry.phase in {phase.value for phase in Phase if phase.final}

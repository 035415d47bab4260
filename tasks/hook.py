"""The hook: something of the user's that is done before or after the cut-over, and whose success is a verdict."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import outside
from tasks.context import Context, Seen
from tasks.custom import about
from tasks.journal import opened
from tasks.settings import Mistake
from validations.gates import Hook
from validations.verdict import Measurement

NO_WORD = (401, 403, 404, 405, 407, 408, 425, 429)
"""What a server answers to a wrong address, to a stranger, or at the wrong time: no word on the challenger."""


@task(cache_policy=NO_CACHE)
def hook(context: Context, gate: Hook) -> Seen:
    """Run the gate's command or post to its URL, once. Raises `Mistake` where there is no telling what it did."""
    told = about(context, gate) | {"promotion": context.id, "when": gate.when, "verdicts": _so_far(context)}
    return outcome(context, gate, told)


def outcome(context: Context, gate: Hook, told: dict[str, Any]) -> Seen:
    """What came of telling the hook what is `told`: `succeeded` is 1, or 0 with what it said last."""
    seconds = gate.timeout.total_seconds()
    if gate.url is not None:
        what = gate.url
        status, answer = outside.post(what, told, seconds)
        if status < 200 or status >= 500 or status in NO_WORD:
            raise Mistake(f"{what}: {outside.answered(status, answer)}")
        succeeded, ended = status < 300, outside.answered(status, answer)
    else:
        what = " ".join(gate.command)
        done = outside.run(gate.command, told, context.base, what, seconds)
        said = done.said or outside.last_line(done.answer[-2000:])
        succeeded, ended = done.code == 0, f"exit code {done.code}{': ' + said if said else ''}"
    measured = {"succeeded": Measurement.exact(float(succeeded), note=ended)}
    return Seen(measured, f"{what}: {ended}", {"hook": {"told": told, "ended": ended}})


def _so_far(context: Context) -> list[dict[str, str]]:
    left = opened(context.target, context.model)
    verdicts = left.promotion.verdicts if left is not None and left.promotion is not None else ()
    return [{"step": one.step, "outcome": one.outcome.value} for one in verdicts]

"""What is looked after between promotions: those that their process left behind, and versions whose time has passed."""

from typing import Any

from prefect import flow, get_run_logger

from deployments.target import LeaseHeld, TargetError
from flows.recover import follow, recover
from tasks.agreement import Unrecorded
from tasks.lookout import Lookout
from tasks.progress import listening, say
from tasks.settings import Mistake, Settings
from tasks.settings import load as load_settings
from tasks.targets import everywhere, settings_target


@flow(name="watch", persist_result=False, retries=0)
def watch() -> dict[str, Any]:
    """Look once: bring to its end what was left behind, take down what is kept no longer, report what disagrees.

    Returns recovered (what each promotion came to) and problems (sentences), both empty where all is well.
    """
    logger = get_run_logger()
    with listening(logger.info):
        return run()


def run() -> dict[str, Any]:
    """One look, inside a flow run or not."""
    settings = load_settings()
    settings.connect(needed=())
    recovered, problems = list[dict[str, Any] | None](), list[str]()
    for index, (own, target) in enumerate(everywhere(settings)):
        lookout = Lookout(own, target, settings_target(settings) if index == 0 else None)
        try:
            _look(own, lookout, recovered, problems)
        except TargetError as error:  # other places are looked after all the same
            problems.append(str(error))
    for line in problems:
        say(line)
    return {"recovered": [one for one in recovered if one], "problems": problems}


def _look(settings: Settings, lookout: Lookout, recovered: list[dict[str, Any] | None], problems: list[str]) -> None:
    """One look at one place."""
    found = lookout.look()
    problems += found.problems
    for model in found.left_behind:
        try:
            recovered.append(recover(settings, model, patience=0))
        except LeaseHeld:  # somebody else is at it by now
            continue
        except Unrecorded as error:
            problems.append(str(error))
    for model in found.to_follow:
        try:
            recovered.append(follow(settings, model))
        except Unrecorded as error:
            problems.append(str(error))
        except (Mistake, TargetError) as error:
            problems.append(f"the alias champion of {model} was moved by hand and is not followed: {error}")
    for line in found.news:
        say(line)

"""Who needs help: promotions left behind, versions kept longer than asked, disagreements. Light enough to run for
ever.
"""

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from deployments.local.target import LocalTarget
from deployments.target import LeaseHeld, TargetError
from tasks import moved, notify, triggers
from tasks.agreement import leased
from tasks.flowruns import Unanswered
from tasks.journal import agreed, opened
from tasks.registry import half_downloads
from tasks.settings import Mistake, Settings
from tasks.status import status
from tasks.waiting import Waiting


@dataclass(slots=True)
class Found:
    """What a look came to: models with something left behind, models whose alias champion a hand has moved where their
    policy lets the traffic follow, what was started, and what else is not as it should be, in words.
    """

    left_behind: list[str] = field(default_factory=list)
    to_follow: list[str] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Lookout:
    """Looks at every model of a target, by its journal and its traffic."""

    def __init__(self, settings: Settings, target: LocalTarget) -> None:
        self.settings, self.target = settings, target
        self._known = set[tuple[str, ...]]()
        self._waiting = Waiting(settings, target)

    def look(self) -> Found:
        """One look at everything. What was kept warm for as long as its policy said is taken down on the way."""
        found = Found()
        for model in self.target.models():
            left, holder = opened(self.target, model), self.target.holder(model)
            if left is None:
                found.problems += self._expire(model)
            elif not (holder is not None and holder.left):
                try:
                    if self._waiting.tend(left):
                        found.left_behind.append(model)
                except (Unanswered, Mistake) as error:
                    found.problems.append(f"{left.id}: {error}")
        for one in status(self.settings)["models"]:
            if one["agrees"]:
                moved.forget(self.settings, one["model"])
            if one["follow"]:
                found.to_follow.append(one["model"])
            elif one["model"] not in found.left_behind:
                found.problems += [f"{one['model']}: {problem}" for problem in one["problems"]]
        asked = triggers.start(self.settings, self.target, self._known)
        found.news += asked.news
        found.problems += asked.problems
        return found

    def _expire(self, model: str) -> list[str]:
        last, kept = agreed(self.target, model), self.target.kept(model)
        if last is None or last.keep_until is None or time.time() < last.keep_until or last.previous is None or kept:
            return []
        if last.previous not in self.target.deployed(model):
            return []
        try:
            with leased(
                self.target, model, f"end of the time of {model} v{last.previous} ({secrets.token_hex(2)})"
            ) as fence:
                traffic = self.target.traffic(model)
                if traffic is not None and traffic.fallback == last.previous:
                    self.target.route(replace(traffic, fallback=None), fence)
                self.target.retire(model, last.previous, fence)
        except LeaseHeld:
            return []
        except TargetError as error:
            return [f"{model} v{last.previous} has been kept for as long as asked and could not be taken down: {error}"]
        return []


def leftovers(settings: Settings, target: LocalTarget, *, mend: bool = False) -> list[str]:
    """What nobody needs any more, in words: servers, records, files of gateways, and downloads of models that nobody
    promotes. With `mend` all of it is cleaned away.
    """
    found = target.orphans(mend=mend)
    for model in target.models():
        holder = target.holder(model)
        for path in () if holder is not None and holder.left else half_downloads(settings.home, model):
            found.append(f"{path} is a download that nobody uses")
            if mend:
                shutil.rmtree(path, ignore_errors=True)
    return found


def for_ever(settings: Settings, target: LocalTarget, every: float, say: Callable[[str], None]) -> None:
    """Look `every` so many seconds; recover what was left behind in a process of its own, and say what is found
    once.
    """
    lookout, told = Lookout(settings, target), set[str]()
    while True:
        try:
            found = lookout.look()
        except (TargetError, Mistake) as error:
            found = Found(problems=[str(error)])
        for model in found.left_behind:
            say(f"{model} has a promotion that was left behind: bringing it to its end")
            _recover(model, say)
        for model in found.to_follow:
            say(f"the alias champion of {model} was moved by hand, and its policy lets the traffic follow")
            _recover(model, say)
        for news in found.news:
            say(news)
        for problem in found.problems:
            if problem not in told:
                say(problem)
            notify.tell(settings, notify.problem(_model(problem), problem))
        notify.forget(settings, told - {*found.problems})
        notify.retry_late(settings)
        told = set(found.problems)
        time.sleep(every)


def _model(problem: str) -> str:
    """What a problem speaks of, for a notice's title: sentences begin with it."""
    return problem.partition(":")[0][:60]


def _recover(model: str, say: Callable[[str], None]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows", "recover", model], capture_output=True, text=True, check=False
    )
    say((done.stdout + done.stderr).strip())

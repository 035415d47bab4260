"""Who needs help: promotions left behind, versions kept longer than asked, disagreements. Light enough to run for
ever.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from deployments.local.target import LocalTarget
from deployments.target import LeaseHeld, ServingTarget, TargetError
from tasks import moved, notify, triggers
from tasks.agreement import leased
from tasks.flowruns import Unanswered
from tasks.journal import agreed, opened
from tasks.registry import half_downloads
from tasks.settings import Mistake, Settings
from tasks.status import models_of
from tasks.targets import everywhere, local_target, settings_target
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
    """Looks at every model of a target, by its journal and its traffic. Promotions that are due are asked for as well
    where it is told on which target: `starts`.
    """

    def __init__(self, settings: Settings, target: ServingTarget, starts: ServingTarget | None = None) -> None:
        self.settings, self.target, self._starts = settings, target, starts
        self._known = set[tuple[str, ...]]()
        self._waiting = Waiting(settings, target)

    def look(self) -> Found:
        """One look at everything. What was kept warm for as long as its policy said is taken down on the way."""
        found = Found()
        for model in self.target.models():
            self._tend(model, found)
        for one in models_of(self.settings, self.target):
            if one["agrees"]:
                moved.forget(self.settings, one["model"])
            if one["follow"]:
                found.to_follow.append(one["model"])
            elif one["model"] not in found.left_behind:
                found.problems += [f"{one['model']}: {problem}" for problem in one["problems"]]
        if self._starts is not None:
            self._start(found, self._starts)
        return found

    def _tend(self, model: str, found: Found) -> None:
        left, holder = opened(self.target, model), self.target.holder(model)
        if left is None:
            found.problems += self._expire(model)
        elif not (holder is not None and holder.left):
            try:
                if self._waiting.tend(left):
                    found.left_behind.append(model)
            except (Unanswered, Mistake) as error:
                found.problems.append(f"{left.id}: {error}")

    def _start(self, found: Found, target: ServingTarget) -> None:
        asked = triggers.start(self.settings, target, self._known)
        found.news += asked.news
        found.problems += asked.problems

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


def leftovers(settings: Settings, *, mend: bool = False) -> list[str]:
    """What nobody needs any more on this machine, in words: servers, records, files of gateways, and downloads of
    models that nobody promotes. With `mend` all of it is cleaned away.
    """
    target = local_target(settings)
    found = target.orphans(mend=mend)
    for model in target.models():
        holder = target.holder(model)
        for path in () if holder is not None and holder.left else half_downloads(settings.home, model):
            found.append(f"{path} is a download that nobody uses")
            if mend:
                shutil.rmtree(path, ignore_errors=True)
    return found


def for_ever(settings: Settings, every: float, say: Callable[[str], None]) -> None:
    """Look at every place `every` so many seconds; recover what was left behind in a process of its own, and say what
    is found once.
    """
    lookouts, told = dict[str | None, Lookout](), set[str]()
    while True:
        found = Found()
        for own, target in everywhere(settings):
            place = None if isinstance(target, LocalTarget) else own.region or own.cluster
            if place not in lookouts:
                lookouts[place] = Lookout(own, target, None if lookouts else settings_target(settings))
            try:
                here = lookouts[place].look()
            except (TargetError, Mistake) as error:
                here = Found(problems=[str(error)])
            for model in here.left_behind:
                say(f"{model} has a promotion that was left behind: bringing it to its end")
                _recover(own, model, say)
            for model in here.to_follow:
                say(f"the alias champion of {model} was moved by hand, and its policy lets the traffic follow")
                _recover(own, model, say)
            found.news += here.news
            found.problems += here.problems
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


def _recover(settings: Settings, model: str, say: Callable[[str], None]) -> None:
    place = {"TITLESHOT_REGION": settings.region, "TITLESHOT_CLUSTER": settings.cluster}
    environment = {**os.environ, **{name: value for name, value in place.items() if value is not None}}
    command = [sys.executable, "-m", "flows", "recover", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    say((done.stdout + done.stderr).strip())

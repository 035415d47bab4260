"""Challengers that start by themselves: which are due by the registry, and one run of the promotion asked for each.

Light: the lookout does this for ever. Events come faster, and get lost; this finds what they left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from deployments.target import ServingTarget, TargetError
from tasks import registry_rest
from tasks.flowruns import PROMOTE, FlowRun, Unanswered, Unusable, chosen, create, deployment_id, page, tagged
from tasks.journal import opened
from tasks.policies import policies_of
from tasks.registry import CHALLENGER, CHAMPION, TAG
from tasks.settings import Mistake, Settings
from tasks.targets import PATIENCE, everywhere
from validations.policy import Policy
from validations.waves import Waves

PAUSES = (timedelta(seconds=10), timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=15))
"""How long after its last run a challenger is asked for again: so often, where its runs fail. The first is short: a run
that starts while Prefect's server restarts crashes at once, which is no fault of the challenger.
"""
LOST = timedelta(minutes=10)
"""A run that goes on for this long and holds no lease has lost its process; Prefect does not notice."""
LATE = timedelta(minutes=10)
"""A run that waits for a worker for this long is told of."""
LATER = "Later"
"""The state in which a run completes that had to leave its challenger for later: it is asked for again."""
_EXPERIMENT = "promotions/"  # tasks.history has it, and takes seconds to import


@dataclass(frozen=True, slots=True)
class Due:
    """A version that its model's policy wants promoted, and that no promotion was begun for. `digest` is empty where
    the version was never admitted; `source` is where the registry has it from, `created` since when.
    """

    model: str
    version: str
    digest: str
    source: str
    created: datetime
    why: str

    @property
    def name(self) -> str:
        """As people say it."""
        return f"{self.model} v{self.version}"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A model, or one version of it, that is not due, and why."""

    model: str
    version: str | None
    why: str


@dataclass(slots=True)
class Looked:
    """What a look at the registry came to; of each model the oldest version first."""

    due: list[Due] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Intent:
    """What becomes of a due challenger now: a run is asked for, the `attempt`th; one is waited for; it is left alone.
    `problem` says that a person should know.
    """

    due: Due
    does: Literal["ask", "wait", "leave"]
    why: str
    attempt: int = 1
    problem: bool = False


@dataclass(slots=True)
class Asked:
    """What asking came to: what was started, and what a person should know, in words."""

    news: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def start(settings: Settings, target: ServingTarget, known: set[tuple[str, ...]] | None = None) -> Asked:
    """Ask for a run of the promotion of whatever is due. Raises nothing where MLflow or Prefect does not answer: that
    is a problem, in the same words at each look.
    """
    looked = due(settings, target, known)
    asked = ask(settings, looked.due)
    return Asked(asked.news, [*looked.problems, *asked.problems])


# --- what is due


def due(settings: Settings, target: ServingTarget, known: set[tuple[str, ...]] | None = None) -> Looked:
    """What the policies want promoted and no promotion was begun for, by MLflow's registry and history.

    `known` is where the handled ones are kept between two looks: they stay handled. A model with something under way
    is left for later; it has one promotion at a time.
    """
    policies = policies_of(settings)
    looked, known = Looked(problems=list(policies.problems)), set() if known is None else known
    for model, (path, _, policy) in policies.usable.items():
        try:
            if policy.trigger == "hand":
                looked.skipped.append(Skipped(model, None, f"{path.name} says `trigger: hand`"))
            elif busy := _busy_anywhere(settings, target, model, policy):
                looked.skipped.append(Skipped(model, None, busy))
            else:
                _look(settings, model, policy.trigger, looked, known)
        except registry_rest.Refused as refused:
            looked.problems.append(f"{model} cannot be looked at: {refused}")
        except registry_rest.Unanswered:
            # The same for all models, and for each the time that one waits for an answer.
            looked.problems.append(f"MLflow does not answer at {settings.mlflow}: no challenger is found until it does")
            break
        except Mistake as mistake:
            looked.problems.append(str(mistake))
            break
        except (AttributeError, KeyError, TypeError, ValueError):
            looked.problems.append(f"{model} cannot be looked at: what answers at {settings.mlflow} is no MLflow")
    return looked


def _busy_anywhere(settings: Settings, target: ServingTarget, model: str, policy: Policy) -> str:
    """What is under way with `model` wherever its policy lets it be served; empty where nothing is."""
    if not isinstance(policy.target, Waves):
        return _busy(target, model)
    try:
        for name in policy.target.regions:
            for _, place in everywhere(settings.model_copy(update={"region": name}), patience=PATIENCE):
                if busy := _busy(place, model):
                    return busy
    except (Mistake, TargetError) as error:
        return f"whether something is under way in every region of its policy is not known: {error}"
    return ""


def _busy(target: ServingTarget, model: str) -> str:
    if (left := opened(target, model)) is not None:
        return f"{left.id} is under way: others come later"
    holder = target.holder(model)
    return f"{holder.name} holds the model: others come later" if holder is not None and holder.left else ""


def _look(settings: Settings, model: str, trigger: str, looked: Looked, known: set[tuple[str, ...]]) -> None:
    registered = _unless_missing(lambda: registry_rest.get(settings, "registered-models/get", {"name": model}))
    if registered is None:
        looked.skipped.append(Skipped(model, None, "the registry has no such model"))
        return
    aliases = {one["alias"]: str(one["version"]) for one in registered["registered_model"].get("aliases") or ()}
    champion = aliases.get(CHAMPION)
    found = _candidates(settings, model, trigger, champion, aliases.get(CHALLENGER))
    if not found:
        looked.skipped.append(Skipped(model, None, _nothing(trigger, champion)))
    for version in found:
        number = str(version["version"])
        tags = {one["key"]: str(one.get("value") or "") for one in version.get("tags") or ()}
        one = Due(
            model=model,
            version=number,
            digest=tags.get(TAG + "digest", ""),
            source=str(version.get("source") or ""),
            created=datetime.fromtimestamp(int(version["creation_timestamp"]) / 1000, UTC),
            why=_wanted(trigger, champion),
        )
        if number == champion:
            looked.skipped.append(Skipped(model, number, "it is the champion"))
        elif (status := version.get("status", "READY")) != "READY":
            looked.skipped.append(Skipped(model, number, f"MLflow calls it {status}"))
        elif _began(settings, one, known):
            looked.skipped.append(Skipped(model, number, f"it was promoted before: `titleshot history {model}`"))
        else:
            looked.due.append(one)


def _candidates(
    settings: Settings, model: str, trigger: str, champion: str | None, challenger: str | None
) -> list[dict[str, Any]]:
    """The versions that the trigger speaks of, oldest first."""
    if trigger == "alias":
        if challenger is None:
            return []
        asked = {"name": model, "version": challenger}
        found = _unless_missing(lambda: registry_rest.get(settings, "model-versions/get", asked))
        return [found["model_version"]] if found else []
    where = f"tags.`{TAG}promote` = 'true'" if trigger == "tag" else f"version_number > {champion or 0}"
    quoted = f'"{model}"' if "'" in model else f"'{model}'"
    query = {"filter": f"name = {quoted} AND {where}", "max_results": 200}
    versions: list[dict[str, Any]] = []
    while True:
        answer = registry_rest.get(settings, "model-versions/search", query)
        versions += answer.get("model_versions") or ()
        if not answer.get("next_page_token"):
            return sorted(versions, key=lambda version: int(version["version"]))
        query["page_token"] = answer["next_page_token"]


def _wanted(trigger: str, champion: str | None) -> str:
    return {
        "alias": f"the alias {CHALLENGER} names it",
        "tag": f"it has the tag {TAG}promote=true",
        "version": f"it is newer than the champion, v{champion}" if champion else "there is no champion",
    }[trigger]


def _nothing(trigger: str, champion: str | None) -> str:
    return {
        "alias": f"the alias {CHALLENGER} names no version",
        "tag": f"no version has the tag {TAG}promote=true",
        "version": f"no version is newer than the champion, v{champion}" if champion else "it has no version",
    }[trigger]


def _began(settings: Settings, one: Due, known: set[tuple[str, ...]]) -> bool:
    """Whether the history has a promotion of this very artifact."""
    key = (settings.mlflow, one.model, one.version, one.digest)
    if not one.digest:
        # It was never admitted: a promotion of this number was one of a model that was deleted since.
        return False
    if key not in known:
        asked = {"experiment_name": _EXPERIMENT + one.model}
        experiment = _unless_missing(lambda: registry_rest.get(settings, "experiments/get-by-name", asked))
        if experiment is None:
            return False
        body = {
            "experiment_ids": [experiment["experiment"]["experiment_id"]],
            "filter": _of(one.version, one.digest),
            "max_results": 1,
        }
        if registry_rest.post(settings, "runs/search", body).get("runs"):
            known.add(key)
    return key in known


def _of(number: str, digest: str) -> str:
    """MLflow's filter for the records of promotions of one version."""
    ours = {"kind": "promotion", "challenger": number, "digest": digest}
    return " AND ".join(f"tags.`{TAG}{name}` = '{value}'" for name, value in ours.items())


def _unless_missing(answer: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return answer()
    except registry_rest.Refused as refused:
        if refused.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def handled(model: str, number: str, digest: str, target: ServingTarget | None = None) -> str:
    """The promotion that was begun for this version with this very artifact, and its phase; "" where there is none.

    Asked under the model's lease, and before a promotion begins, this is exact: only who holds the lease begins one.
    One that has ended is in MLflow's record, since that is written before its journal ends; one that has not is in the
    journal of `target` (where none is given: it was brought to its end under the same lease). So of any number of runs
    for one challenger, whoever asked for them, the first begins a promotion and each later one sees it.
    """
    from tasks.history import EXPERIMENT
    from tasks.registry import client

    left = opened(target, model) if target is not None else None
    if left is not None and left.promotion and (left.promotion.challenger, left.promotion.digest) == (number, digest):
        return f"{left.id} ({left.promotion.phase.value})"
    experiment = client().get_experiment_by_name(EXPERIMENT + model)
    if experiment is None:
        return ""
    newest = ["attributes.start_time DESC"]
    found = client().search_runs([experiment.experiment_id], _of(number, digest), order_by=newest, max_results=1)
    return next((f"{run.data.tags[TAG + 'id']} ({run.data.tags.get(TAG + 'phase', '')})" for run in found), "")


# --- asking for it


def ask(settings: Settings, dues: Sequence[Due], now: datetime | None = None) -> Asked:
    """Ask Prefect for what `intents` says, once each: by its key a run that is asked for twice is one."""
    asked = Asked()
    with _told(settings, asked.problems):
        for intent in intents(settings, dues, now):
            if intent.does == "ask":
                one = intent.due
                run = create(
                    settings,
                    PROMOTE,
                    {"model": one.model, "version": one.version, "trigger": "poll"},
                    key=f"{one.model}/{one.version}/{one.digest or one.source}/{intent.attempt}",
                    tags=["titleshot", f"model/{one.model}", _tag(one)],
                )
                asked.news.append(f"{one.name}: {intent.why}; a run was asked for: {page(settings, run.id)}")
            elif intent.problem:
                asked.problems.append(intent.why)
    return asked


def preview(settings: Settings, target: ServingTarget) -> dict[str, list[Any]]:
    """What a look would come to now, and nothing is asked for: {"due": [...], "skipped": [...], "problems": [...]}."""
    looked = due(settings, target)
    planned = [Intent(one, "wait", "it is not asked for: see the problem") for one in looked.due]
    with _told(settings, looked.problems):
        found = intents(settings, looked.due)
        looked.problems += [intent.why for intent in found if intent.problem]
        if found:
            deployment_id(settings, PROMOTE)
        planned = found
    return {
        "due": [
            {"model": one.due.model, "version": one.due.version, "digest": one.due.digest, "does": one.does}
            | {"why": one.why, "attempt": one.attempt}
            for one in planned
        ],
        "skipped": [asdict(one) for one in looked.skipped],
        "problems": looked.problems,
    }


@contextmanager
def _told(settings: Settings, problems: list[str]) -> Iterator[None]:
    """Say in words, the same at each look, why Prefect could not be asked."""
    try:
        yield
    except Unusable as error:
        problems.append(f"{error}: no promotion is asked for until it is mended")
    except (AttributeError, KeyError, TypeError, ValueError):
        problems.append(f"what answers at {settings.prefect} is no Prefect: no promotion is asked for")
    except Unanswered:
        problems.append(f"Prefect does not answer at {settings.prefect}: no promotion is asked for until it does")
    except Mistake as mistake:
        mend = " (TITLESHOT_WORKERS is 0: this stack has no worker of its own)" if not settings.workers else ""
        problems.append(f"challengers are due and no promotion starts by itself: {mistake}{mend}")


def intents(settings: Settings, dues: Sequence[Due], now: datetime | None = None) -> list[Intent]:
    """What becomes of each due challenger, by the runs that Prefect has: of one model one goes, the oldest first.

    A run of somebody else's (an event's, a person's) counts as ours: while it is on its way there is no other. Raises
    `Unanswered` and `Mistake`.
    """
    now = now or datetime.now(UTC)
    flow, deployment = PROMOTE.split("/")
    of_it = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [deployment]}}}
    lately = chosen(settings, of_it) if dues else []
    found, taken = list[Intent](), dict[str, str]()
    for one in dues:
        if one.model in taken:
            found.append(Intent(one, "wait", f"{taken[one.model]} comes first"))
            continue
        runs = {run.id: run for run in (*tagged(settings, _tag(one)), *lately) if _is_of(run, one, now)}
        intent = _intent(settings, one, sorted(runs.values(), key=lambda run: run.created), now)
        found.append(intent)
        if intent.does != "leave":
            taken[one.model] = one.name
    return found


def _is_of(run: FlowRun, one: Due, now: datetime) -> bool:
    """Whether a run is one of this challenger, as far as can be told. One that named no version may be, while it goes
    on; one older than the version was of another one, of a model of this name that was deleted.
    """
    version = str(run.parameters.get("version") or "")
    same = version == one.version or (not version and not _over(run, now))
    return run.parameters.get("model") == one.model and same and run.created > one.created - timedelta(minutes=1)


def _intent(settings: Settings, one: Due, runs: Sequence[FlowRun], now: datetime) -> Intent:
    if not runs:
        return Intent(one, "ask", one.why)
    last = runs[-1]
    where, by_hand = page(settings, last.id), f"`titleshot promote {one.model} --version {one.version}` does it by hand"
    for run in runs:
        if not _over(run, now):
            late = run.state == "Late" and now - run.since > LATE
            waits = f"{one.name} waits for a worker: is there one?" if late else f"its run is {run.state}:"
            return Intent(one, "wait", f"{waits} {page(settings, run.id)}", problem=late)
    cancelled = last.type in ("CANCELLED", "CANCELLING")
    if cancelled or (last.type == "COMPLETED" and last.state != LATER):
        ended = "was cancelled" if cancelled else "found nothing to do"
        return Intent(one, "leave", f"its run {ended}: {where}; {by_hand}")
    failures = [run for run in runs if _failed(run, now)]
    # Runs of several events begin together and fail together: they count as one.
    tries = len({_attempt(run) for run in failures})
    if tries > len(PAUSES):
        said = " ".join(failures[-1].message.split())[:300] or "its process is gone"
        why = f"{one.name}: {len(failures)} runs ended before its promotion began, the last one so: {said}: {where}"
        return Intent(one, "leave", f"{why}; {by_hand}", problem=True)
    # However often it was put off, because another promotion of the model was under way: its time comes, and that is
    # soon, since it is looked at only while its model is free.
    again = last.since + PAUSES[tries - 1 if _failed(last, now) else 0]
    ended = "failed" if _failed(last, now) else "was put off"
    if now < again:
        return Intent(one, "wait", f"its last run {ended}, it is asked for again at {again:%H:%M:%S} UTC: {where}")
    attempt = 1 + max(map(_attempt, runs))
    return Intent(one, "ask", f"{one.why}, and its last run {ended}", attempt=attempt)


def _tag(one: Due) -> str:
    return f"challenger/{one.model}/{one.version}"


def _lost(run: FlowRun, now: datetime) -> bool:
    """Whether nobody performs it any more; its model is free, or it would not have been looked for."""
    return run.type in ("RUNNING", "PENDING", "CANCELLING") and now - run.since > LOST


def _over(run: FlowRun, now: datetime) -> bool:
    return run.over or _lost(run, now)


def _failed(run: FlowRun, now: datetime) -> bool:
    return run.type in ("FAILED", "CRASHED") or (_lost(run, now) and run.type != "CANCELLING")


def _attempt(run: FlowRun) -> int:
    """Which attempt of ours it is; 0 where somebody else asked for it."""
    attempt, ours = run.key.rpartition("/")[2], any(tag.startswith("challenger/") for tag in run.tags)
    return int(attempt) if ours and attempt.isdecimal() else 0

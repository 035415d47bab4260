"""The `titleshot` command: what people type. Heavy libraries are imported by the command that needs them."""

import dataclasses
import getpass
import json
import os
import sys
import time
from collections.abc import Callable
from contextvars import copy_context
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from cyclopts import App, CycloptsError, Parameter
from rich.markup import escape
from rich.table import Table

from deployments.target import TargetError
from flows import screens
from flows.screens import STYLES, err, out
from tasks import settings as settings_of
from tasks.settings import Mistake

FINE, ERROR, WRONG_USE, REFUSED, WAITING = 0, 1, 2, 3, 4

app = App(
    name="titleshot",
    help="A challenger model takes the champion's place in production, with no failed request on the way "
    "and the way back always open.",
    help_epilogue="Exit codes: 0 promoted or fine, 3 the challenger was rejected or rolled back, 4 it waits for "
    "people, 1 an error, 2 wrong use, 130 interrupted.\n\nState lives in TITLESHOT_HOME (default .titleshot/).",
    help_format="plaintext",
    version=lambda: version("titleshot"),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # `run` has a line for it
)
Json = Annotated[bool, Parameter(name="--json", negative=())]
Flag = Annotated[bool, Parameter(negative=())]
Many = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
Region = Annotated[str | None, Parameter(show_default=False)]


@app.command
def up(
    *,
    mlflow_port: int | None = None,
    prefect_port: int | None = None,
    receiver_port: int | None = None,
    restart: Flag = False,
) -> int:
    """Start the local stack: MLflow, Prefect, the gateway, and the champions as they served before.

    Args:
        restart: Where it is up, start the gateway's processes anew, one after the other; no request is lost.
        mlflow_port: Port for MLflow's server and UI; a free one is chosen otherwise, and kept.
        prefect_port: Port for Prefect's server and UI; a free one is chosen otherwise, and kept.
        receiver_port: Port for the receiver of MLflow's webhooks; a free one is chosen otherwise, and kept.
    """
    from tasks import stack
    from tasks.targets import local_target

    settings = settings_of.load()
    if restart and local_target(settings).up():
        screens.say("starting the gateway anew, one process after the other")
        local_target(settings).restart_gateway()
        screens.print_status(_status())
        return FINE
    stack.up(settings, {"mlflow": mlflow_port, "prefect": prefect_port, "receiver": receiver_port}, screens.say)
    screens.print_status(_status())
    return FINE


@app.command
def down() -> int:
    """Stop everything that `titleshot up` or `titleshot demo` started."""
    from tasks import stack

    stack.down(settings_of.load(), screens.say)
    screens.say("stopped")
    return FINE


@app.command
def status(*, region: Region = None, json_: Json = False) -> int:
    """Show what runs, what serves, and whether registry and traffic agree.

    Args:
        region: Of models that are served in several regions, this one; every region otherwise.
    """
    found = _status(region)
    if json_:
        screens.as_json(found)
    else:
        screens.print_status(found)
    agree = all(model["agrees"] for model in found["models"])
    return FINE if found["up"] and agree and not found["problems"] else ERROR


@app.command
def demo(*, json_: Json = False) -> int:
    """Take six real challengers through one policy under live traffic (about 6 minutes).

    Starts the local stack where it is not up, trains and registers real models on the flights of New York
    2013, and leaves everything up for looking around.
    """
    from flows.demo.show import run

    result = run(screens.say)
    if json_:
        screens.as_json({key: result[key] for key in ("challengers", "live", "seconds")})
    else:
        screens.print_demo(result)
    return FINE if result["as_intended"] else ERROR


@app.command
def promote(
    model: str,
    /,
    *,
    policy: Path | None = None,
    version: str | None = None,
    by: str | None = None,
    again: Flag = False,
    anew: Flag = False,
    wait: Flag = False,
    request: Flag = False,
    timeout: Annotated[str | None, Parameter(show_default=False)] = None,
    dry_run: Flag = False,
    region: Region = None,
    json_: Json = False,
) -> int:
    """Take a challenger through the gates of a policy, to the champion's place or back.

    Args:
        model: Name of the registered model.
        policy: The policy file; the model's own in the policy folder otherwise.
        version: Version number; the version with the alias `challenger` otherwise.
        by: Who asks for it; your user name otherwise. With four eyes, somebody else must approve.
        again: Admit a version that was rejected before, unchanged.
        anew: Forget what was observed of this very artifact before; it goes on counting otherwise.
        wait: Let the worker do it, and wait for the outcome: for CI.
        request: Let the worker do it, and wait for nothing.
        timeout: With --wait: how long at most, like 2h; exit code 4 where people have not decided by then.
        dry_run: Show what would be created and changed, as a diff; nothing is touched.
        region: Of the policy's regions this one alone, with all gates; region by region otherwise.
    """
    settings = _settings(region)
    if dry_run:
        return _dry_run(settings, model, policy, version, json_=json_)
    settings.connect()
    asked: dict[str, Any] = {
        "model": model,
        "policy": None if policy is None else str(policy.resolve()),
        "version": version,
        "requester": by or getpass.getuser(),
        "again": again,
        "anew": anew,
    }
    if wait or request:
        if region is not None:
            raise Mistake("--region is for a promotion in this terminal: the worker goes region by region", WRONG_USE)
        return _request(settings, asked, wait=wait, timeout=timeout, json_=json_)
    if timeout is not None:
        raise Mistake("--timeout is for --wait: a promotion in this terminal takes its time", code=WRONG_USE)
    from flows.promote import promote as flow
    from tasks.progress import listening

    begun = time.time()
    with listening(screens.say):
        try:
            result = flow(**asked)
        except httpx.TransportError as error:
            result = _ended(settings, model, begun, error)
    if json_:
        screens.as_json(result)
    else:
        screens.print_outcome(result)
    return _code(result)


def _dry_run(
    settings: settings_of.Settings, model: str, policy: Path | None, version: str | None, *, json_: bool
) -> int:
    settings.connect(needed=("MLflow",))
    from flows.promote import Asks
    from flows.promote import dry_run as dry
    from tasks import preview

    found = dry(Asks(model, policy, version))
    if json_:
        data = [{"region": name, **preview.as_json(one)} for name, one in found.items()]
        screens.as_json(data if "" not in found else data[0])
    else:
        for name, one in found.items():
            screens.print_region(name)
            screens.print_preview(one)
    return REFUSED if any(one.against for one in found.values()) else FINE


def _request(
    settings: settings_of.Settings, asked: dict[str, Any], *, wait: bool, timeout: str | None, json_: bool
) -> int:
    from tasks import flowruns
    from tasks import request as asking

    seconds = None if timeout is None else _seconds(timeout)
    # A policy's path would be this machine's: where it is not this home's worker that reads it, its folder has its own.
    run = asking.ask(settings, {name: value for name, value in asked.items() if value is not None})
    page = flowruns.page(settings, run.id)
    screens.say(f"asked for: {page}")
    if not wait:
        screens.as_json({"flow_run": run.id, "page": page}) if json_ else out.print(run.id)
        return FINE
    entry, run = asking.outcome(settings, run, seconds, screens.say)
    from flows.drive import outcome
    from tasks import history

    if entry is None:
        why = run.message or run.state
        if run.type == "COMPLETED":
            screens.as_json({"phase": run.state, "why": why, "page": page}) if json_ else out.print(
                escape(f"{run.state}: {why}")
            )
            return FINE
        if run.over:
            raise Mistake(f"nothing was promoted: {why} (its log is at {page})")
        raise Mistake(f"it did not begin within {timeout}, and is still asked for: {page}")
    result = {**outcome(history.stored(entry.run_id)), "page": page}
    if json_:
        screens.as_json(result)
    else:
        screens.print_outcome(result)
    return _code(result)


def _seconds(text: str) -> float:
    from pydantic import TypeAdapter, ValidationError

    from validations.units import Duration

    try:
        return float(TypeAdapter(Duration).validate_python(text).total_seconds())
    except ValidationError as error:
        raise Mistake(f"--timeout {text}: a time is written like 30s, 10m or 2h", code=WRONG_USE) from error


def _code(result: dict[str, Any]) -> int:
    """The exit code that says how a promotion ended, or that it has not."""
    if result["phase"] == "promoted":
        return FINE
    if result["phase"] in ("awaiting approval", "running", "rolling back"):
        return WAITING
    # The platform's errors are not the challenger's: a caller that waits must tell them apart.
    return ERROR if result["phase"] == "degraded" or result["outcome"] == "errored" else REFUSED


@app.command
def plan(model: str, /, *, policy: Path, rate: float | None = None, region: Region = None, json_: Json = False) -> int:
    """Say what a promotion would need at the present traffic, and what it could see, before anything runs.

    Args:
        model: Name of the registered model.
        policy: The policy file.
        rate: Live requests per second to reckon with; those of the last hour otherwise.
        region: Of the policy's regions this one; all of them otherwise.
    """
    settings = _settings(region)
    settings.connect()
    from tasks import plan as planning
    from tasks import registry
    from tasks.policies import read_policy
    from tasks.targets import settings_target
    from validations.waves import Waves

    if rate is not None and rate <= 0:
        raise Mistake(f"--rate {rate:g}: requests per second are more than 0", code=WRONG_USE)
    registry.versions(model)
    _, asked = read_policy(policy, model)
    waves = asked.target.regions if isinstance(asked.target, Waves) else ()
    found, took = {}, planning.usual(model)
    for name in (settings.region or "",) if settings.region or not waves else waves:
        with settings_of.within(name):
            target, part = settings_target(settings_of.load()), asked.in_region(further=name in waves[1:])
            found[name] = planning.plan(target, part, registry.aliased(model, registry.CHAMPION), rate)
    if json_:
        data = [{"region": name, **planning.as_json(steps, took, policy)} for name, steps in found.items()]
        screens.as_json(data if len(data) > 1 else data[0])
    else:
        for name, steps in found.items():
            screens.print_region(name)
            screens.print_plan(steps, took)
    return FINE if all(step.decidable for steps in found.values() for step in steps) else REFUSED


@app.command
def render(
    model: str,
    /,
    *,
    version: str,
    policy: Path | None = None,
    output: Path | None = None,
    kustomize: Flag = False,
    region: Region = None,
) -> int:
    """Write the objects by which a cluster serves a version, as YAML; nothing is changed anywhere.

    Args:
        model: Name of the registered model.
        version: Version number.
        policy: A policy file, whose `target` says which kind of objects; a Deployment and what belongs to it otherwise.
        output: The folder for the files; they are printed otherwise.
        kustomize: A kustomization.yaml besides, which names all files of the folder.
        region: The cluster of this region.
    """
    settings = _settings(region)
    settings.connect(needed=("MLflow",))
    from tasks import rendering
    from tasks.policies import read_policy
    from tasks.progress import listening

    place = None if policy is None else read_policy(policy, model)[1].place
    there = [] if output is None else [str(path.relative_to(output)) for path in output.rglob("*.yaml")]
    with listening(screens.say):
        files = rendering.render(settings, model, version, place, kustomize=kustomize, beside=there)
    if output is None:
        sys.stdout.write("---\n".join(files.values()))
        return FINE
    rendering.write(files, output)
    for name in files:
        out.print(escape(str(output / name)))
    return FINE


@app.command
def replay(promotion: str, /, *, policy: Path | None = None, days: int = 365, json_: Json = False) -> int:
    """Reach past verdicts again from their evidence, or see how they would have been under another policy.

    Args:
        promotion: A promotion's name, as `titleshot history` lists it, or a model's for all of its promotions.
        policy: Another policy to judge by; the promotion's own otherwise, and then every verdict must be the same.
        days: How far back to go, for a model.
    """
    settings_of.load().connect()
    from datetime import timedelta

    from tasks import replay as replaying
    from tasks.policies import read_policy

    asked = None if policy is None else read_policy(policy)[1]
    found = replaying.again(promotion, asked, timedelta(days=days))
    if json_:
        screens.as_json(
            [dataclasses.asdict(one) | {"replayed": json.loads(one.replayed.model_dump_json())} for one in found]
        )
    else:
        screens.print_replay(found, other=policy is not None)
    return ERROR if any(one.changed for one in found) else FINE


@app.command
def probe(
    model: str | None = None,
    /,
    *,
    requests: int = 5,
    slow_ms: float | None = None,
    region: Region = None,
    json_: Json = False,
) -> int:
    """Ask every deployed version, through the gateway, its stored example; say who does not answer, or is slow.

    Args:
        model: Name of the registered model; all that are served otherwise.
        requests: How many requests each version gets, one after the other.
        slow_ms: A median above this many milliseconds is a problem; nothing is too slow otherwise.
        region: Of models that are served in several regions, this one; every region otherwise.
    """
    settings = _settings(region)
    from tasks import probe as asking
    from tasks.targets import everywhere

    _refuse_down(settings, any(target.up() for _, target in everywhere(settings)))
    found = asking.as_dict(asking.everywhere(settings, model, requests=requests, slow_ms=slow_ms))
    if json_:
        screens.as_json(found)
    else:
        screens.print_probe(found)
    return ERROR if found["problems"] else FINE


@app.command
def labels(promotion: str, file: Path, /, *, policy: Path | None = None, json_: Json = False) -> int:
    """Judge a past shadow by the labels that came later: which of the two models was right.

    Args:
        promotion: Its name, as `titleshot history` lists it.
        file: CSV, Parquet or JSON lines with the columns request_id and label.
        policy: A policy whose `labelled` bounds to judge by; the promotion's own otherwise.
    """
    settings = settings_of.load()
    settings.connect()
    from tasks import hindsight
    from tasks.policies import read_policy

    asked = None if policy is None else read_policy(policy)[1]
    found = hindsight.judge_again(promotion, file, asked, settings.home / "promotions")
    if json_:
        screens.as_json([json.loads(one.verdict.model_dump_json()) for one in found])
    else:
        for one in found:
            out.print(
                f"[bold]{one.verdict.step}[/]: {one.verdict.outcome.value}  [dim]{escape(one.verdict.evidence.note)}[/]"
            )
            for check in one.verdict.checks:
                out.print(f"  - {escape(str(check))}")
    return FINE if all(one.verdict.outcome.value == "passed" for one in found) else REFUSED


@app.command
def rollback(model: str, /, *, reason: str = "by hand", region: Region = None, json_: Json = False) -> int:
    """Give all traffic, and the alias, back to the previous champion.

    Args:
        model: Name of the registered model.
        reason: Kept in the history and on the version that loses its place.
        region: This region alone, of several; all that have the version which came last otherwise, newest wave first.
    """
    settings = _settings(region)
    settings.connect(needed=())
    from tasks import swap
    from tasks.progress import listening
    from tasks.targets import regions_of, settings_target

    if names := regions_of(settings, model):
        return _rollback_everywhere(settings, model, reason, names, json_=json_)
    target = settings_target(settings)
    _refuse_down(settings, target.up())
    with listening(screens.say):
        # Before anything that takes seconds to import, or that may not answer.
        ordered = swap.order(settings, target, model, reason).id
        from flows.rollback import rollback as flow
        from flows.rollback import run

        if settings.answers(settings.prefect):
            result = flow(model=model, reason=reason, ordered=ordered, region=settings.region or "")
        else:
            screens.say("Prefect does not answer: this rollback has no flow run")
            result = run(model, reason, ordered)
    if json_:
        screens.as_json(result)
    else:
        screens.print_rollback(model, {"region": settings.region or "", **result})
    return FINE if result["phase"] == "rolled back" else ERROR


def _rollback_everywhere(
    settings: settings_of.Settings, model: str, reason: str, names: dict[str, str], *, json_: bool
) -> int:
    from tasks import regions
    from tasks.progress import listening

    with listening(screens.say):
        # All regions have their traffic back before anything that takes seconds to import, or that may not answer.
        ordered = regions.order(model, names, reason)
        from flows.rollback import everywhere, run
        from flows.rollback import rollback as flow

        def one(name: str, of: str) -> dict[str, Any]:
            return flow(model=model, reason=reason, ordered=of, region=name)

        answers = settings.answers(settings.prefect)
        if not answers:
            screens.say("Prefect does not answer: this rollback has no flow run")
        result = everywhere(model, reason, ordered, one if answers else lambda _, of: run(model, reason, of))
    if json_:
        screens.as_json(result)
    else:
        for each in result["regions"]:
            screens.print_rollback(model, each)
    return FINE if result["phase"] == "rolled back" else ERROR


@app.command
def recover(model: str | None = None, /, *, region: Region = None, json_: Json = False) -> int:
    """Bring promotions to their end that their process left behind: forward or back, by the journal.

    Traffic follows an alias champion that was moved by hand in MLflow where the model's policy says `follow_alias`.

    Args:
        model: Name of the registered model; all of them otherwise.
        region: Of models that are served in several regions, this one; every region otherwise.
    """
    settings = _settings(region)
    settings.connect(needed=())
    from tasks.progress import listening
    from tasks.targets import everywhere

    _refuse_down(settings, any(target.up() for _, target in everywhere(settings)))
    done, known, failed = list[dict[str, Any] | None](), False, list[Mistake | TargetError]()
    with listening(screens.say):
        from flows.recover import follow
        from flows.recover import recover as bring

        for own, target in everywhere(settings):
            try:
                there = [name for name in target.models() if model in (None, name)]
                known = known or bool(there)
                done += [bring(own, name, own.lease_seconds + 5) or follow(own, name) for name in there]
            except (Mistake, TargetError) as error:  # other places are looked after all the same
                failed.append(error)
    if model is not None and not known and not failed:
        raise Mistake(f"{model} is not served here: `titleshot status` lists what is", code=WRONG_USE)
    ended = [one for one in done if one is not None]
    if json_:
        screens.as_json(ended)
    else:
        for one in ended:
            out.print(f"{one['promotion']}: [{STYLES.get(one['phase'], '')}]{one['phase']}[/]  {escape(one['why'])}")
        if not ended and not failed:
            out.print("nothing was left behind")
    for other in failed[:-1]:
        err.print(escape(f"titleshot: {other}"), style="red")
    if failed:
        raise failed[-1]
    return ERROR if any(one["phase"] == "degraded" for one in ended) else FINE


@app.command
def watch(*, every: float | None = None) -> int:
    """Look for promotions left behind and for disagreements, and mend the first; `titleshot up` starts it by itself.

    Args:
        every: Seconds between two looks, for ever; one look otherwise.
    """
    settings = settings_of.load()
    settings.connect(needed=())
    from tasks.targets import everywhere

    _refuse_down(settings, any(target.up() for _, target in everywhere(settings)))
    if every is not None:
        from tasks.lookout import for_ever

        for_ever(settings, every, screens.say)
    from flows.watch import run
    from tasks.progress import listening

    with listening(screens.say):
        found = run()
    if not found["recovered"] and not found["problems"]:
        out.print("all is well")
    return ERROR if found["problems"] else FINE


@app.command
def due(*, json_: Json = False) -> int:
    """Show which challengers start by themselves now, which do not, and why; nothing is started by it."""
    settings = settings_of.load()
    settings.connect(needed=("MLflow",))
    from tasks import triggers
    from tasks.targets import settings_target

    found = triggers.preview(settings, settings_target(settings))
    if json_:
        screens.as_json(found)
        return ERROR if found["problems"] else FINE
    does = {"ask": "[green]starts[/]", "wait": "[yellow]waits[/]", "leave": "[dim]left alone[/]"}
    for one in found["due"]:
        out.print(f"[bold]{escape(one['model'])} v{one['version']}[/] {does[one['does']]}: {escape(one['why'])}")
    for one in found["skipped"]:
        name = one["model"] + (f" v{one['version']}" if one["version"] else "")
        out.print(f"[bold]{escape(name)}[/] [dim]is not due[/]: {escape(one['why'])}")
    for problem in found["problems"]:
        out.print(f"[red]{escape(problem)}[/]")
    if not any(found.values()):
        out.print(f"there is no policy in {escape(str(settings.policy_folder))}: nothing starts by itself")
    return ERROR if found["problems"] else FINE


@app.command
def serve(model: str, /, *, warm: int | None = None, region: Region = None, json_: Json = False) -> int:
    """Keep versions of a model loaded, so that a promotion to one of them or back loads nothing; or show which are.

    Args:
        model: Name of the registered model.
        warm: How many: champion, previous, challenger, then the newest; 0 keeps the first two alone. Each is a process.
        region: Of a model that is served in several regions, this one; to show them all are looked at otherwise.
    """
    settings = _settings(region)
    if warm is not None:
        settings.connect(needed=("MLflow",))
    from tasks import pool
    from tasks.progress import listening
    from tasks.targets import settings_target

    def one(own: settings_of.Settings) -> dict[str, Any]:
        target, left_out = settings_target(own), {}
        _refuse_down(own, target.up())
        if warm is not None:
            with listening(screens.say):
                left_out = pool.serve(own, target, model, warm)
        return {**pool.look(target, model), "left_out": left_out}

    return _in_each(settings, model, one, screens.print_pool, acts=warm is not None, json_=json_)


@app.command
def route(
    model: str,
    /,
    *,
    pin: Many = (),
    unpin: Many = (),
    sticky: str | None = None,
    limit: Many = (),
    priority: str | None = None,
    fallback: str | None = None,
    clear: Many = (),
    region: Region = None,
    json_: Json = False,
) -> int:
    """Show what the gateway obeys, or change what is asked of live traffic besides weights; versions may be aliases.

    Args:
        model: Name of the registered model.
        pin: HEADER=VALUE:VERSION: requests with this header are answered by this version.
        unpin: HEADER=VALUE: these requests go where all others go again.
        sticky: A header that a user keeps: who sends the same value stays on the same version while weights grow.
        limit: VERSION=RATE, like 3=20/s: live requests that reach this version; `none` for no limit.
        priority: HEADER=VALUE: requests that are taken before others.
        fallback: The version that answers what champion and previous champion both fail.
        clear: What to take away first: pins, sticky, limits, priority, fallback, all.
        region: Of a model that is served in several regions, this one; to show them all are looked at otherwise.
    """
    settings = _settings(region)
    from tasks import shape
    from tasks.targets import settings_target

    words: dict[str, Any] = {"sticky": sticky, "limit": limit, "priority": priority, "fallback": fallback}
    asked = shape.read(pin=pin, unpin=unpin, clear=clear, **words)
    settings.connect(needed=())
    traffic: Any = None

    def one(own: settings_of.Settings) -> dict[str, Any]:
        nonlocal traffic
        target = settings_target(own)
        _refuse_down(own, target.up())
        traffic = shape.route(target, model, asked) if asked.anything else shape.obeyed(target, model)
        return shape.as_json(traffic, target.gateway(model))

    def show(found: dict[str, Any]) -> None:
        screens.print_route(traffic, found["gateway"])

    return _in_each(settings, model, one, show, acts=asked.anything, json_=json_)


def _settings(region: str | None) -> settings_of.Settings:
    """The settings in force; those of a region where one is meant. Raises `Mistake` for one that is not."""
    if region is not None:
        settings_of.mean(region)
    settings = settings_of.load()
    if settings.region is not None and settings.clusters_file is not None:  # to approve from anywhere takes no file
        from tasks.clusters import cluster

        cluster(settings)
    return settings


def _in_each(
    settings: settings_of.Settings,
    model: str,
    one: Callable[[settings_of.Settings], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    *,
    acts: bool,
    json_: bool,
) -> int:
    """Show what `one` finds where a model is served, region by region where that is in several. Raises `Mistake` where
    it `acts`, and has several to choose from.
    """
    from tasks.targets import regions_of

    names = regions_of(settings, model)
    if acts and len(names) > 1:
        raise Mistake(f"{model} is served in {', '.join(names)}: say which is meant with --region", code=WRONG_USE)
    found = list[dict[str, Any]]()
    for name, why in (names or {"": ""}).items():
        with settings_of.within(name or settings.region or ""):
            found.append({"problem": why} if why else one(settings_of.load()))
        if not json_:
            out.print(end="\n" if found[1:] else "")
            screens.print_region(name)
            screens.print_problem(why) if why else show(found[-1])
    if json_:
        data = [{"region": name, **each} for name, each in zip(names, found, strict=True)] if names else found[0]
        screens.as_json(data)
    return ERROR if any(names.values()) else FINE


webhook = App(name="webhook", help="MLflow's webhook, by which registry events start promotions.")
app.command(webhook)


@webhook.command(name="install")
def webhook_install(*, url: str | None = None, json_: Json = False) -> int:
    """Register the webhook in MLflow, or mend it, and see a delivery arrive.

    Args:
        url: Where MLflow reaches the receiver; the receiver's address on this machine otherwise.
    """
    settings = settings_of.load()
    settings.connect(needed=("MLflow",))
    from tasks import webhooks

    found = webhooks.install(settings, url)
    if json_:
        screens.as_json(dataclasses.asdict(found))
        return FINE
    if found.before is not None:
        screens.say(f"it pointed at {found.before} before")
    out.print(f"MLflow at {settings.mlflow} tells {escape(found.url)} of: {', '.join(found.events)}")
    out.print("a test delivery has arrived, rightly signed")
    return FINE


@webhook.command(name="status")
def webhook_status(*, json_: Json = False) -> int:
    """Show the webhook as MLflow has it, and what the receiver has counted since it started."""
    settings = settings_of.load()
    settings.connect(needed=("MLflow",))
    from tasks import webhooks

    counts, found = webhooks.counts(settings), webhooks.look(settings)
    if json_:
        screens.as_json({"webhook": None if found is None else dataclasses.asdict(found), "receiver": counts})
    else:
        if found is None:
            out.print("[red]MLflow has no webhook of ours[/]: `titleshot webhook install`")
        else:
            out.print(f"webhook   {escape(found.url)}  {found.status}  {', '.join(found.events)}")
        out.print(f"receiver  {webhooks.address(settings)}/mlflow  since {counts['since']}")
        for what in ("taken", "known", "nothing"):
            out.print(f"  {what:<8} {counts[what]}")
        for what in ("refused", "again"):
            for why, times in counts[what].items():
                out.print(f"  {what:<8} {times}  {escape(why)}")
    return FINE if found is not None and found.status == "ACTIVE" else ERROR


def _refuse_down(settings: settings_of.Settings, up: bool) -> None:  # noqa: FBT001
    if not up:
        file = settings.clusters_file
        more = "" if file is None else f", and the cluster of {file} does not answer"
        raise Mistake(f"nothing is up in {settings.home}{more}: start it with `titleshot up`")


@app.command
def history(model: str, /, *, region: Region = None, json_: Json = False) -> int:
    """List the promotions and rollbacks of a model, newest first.

    Args:
        model: Name of the registered model.
        region: Of a model that is served in several regions, this one; every region otherwise.
    """
    settings = _settings(region)
    settings.connect()
    from tasks import history as record
    from tasks import registry

    registry.versions(model)
    found = [e for e in record.entries(model) if settings.region in (None, e.region)]
    if json_:
        screens.as_json([dataclasses.asdict(entry) for entry in found])
        return FINE
    for e in found:
        way = f"v{e.champion} -> v{e.challenger}" if e.champion else f"v{e.challenger}"
        way += f" in {e.region}" if e.region else ""
        at = f" at {e.step}" if e.step else ""
        style, began = STYLES.get(e.phase, ""), f"{e.started:%Y-%m-%d %H:%M} UTC"
        out.print(f"[bold]{e.id}[/]  {way}  [{style}]{e.phase}[/]{at}  [dim]{began}[/]")
        out.print(f"    {escape(e.why)}")
    if not found:
        out.print(f"{model} has no promotions yet" + (f" in {settings.region}" if settings.region else ""))
    return FINE


@app.command
def explain(promotion: str, /, *, json_: Json = False) -> int:
    """Say in words and numbers what was asked, measured and decided, and why.

    Args:
        promotion: Its name, as `titleshot history` lists it.
    """
    settings_of.load().connect()
    from tasks import history as record
    from tasks import report

    entry = record.entry(promotion)
    if entry.kind == "by hand":
        screens.as_json(dataclasses.asdict(entry)) if json_ else out.print(
            f"{entry.id}: v{entry.challenger} took the place of v{entry.champion}: {entry.why}"
        )
        return FINE
    if entry.kind == "rollback":
        screens.as_json(dataclasses.asdict(entry)) if json_ else out.print(
            f"{entry.id}: v{entry.challenger} took the place of v{entry.champion} again: {entry.why}"
        )
        return FINE
    found = record.stored(entry.run_id)
    if json_:
        out.print_json(found.model_dump_json())
    else:
        out.print(escape(report.explain(found)))
    return FINE


@app.command
def show(promotion: str, /, *, open_: Annotated[bool, Parameter(name="--open", negative=())] = False) -> int:
    """Fetch the report of a promotion and print where it is.

    Args:
        promotion: Its name, as `titleshot history` lists it.
        open_: Open it in the browser.
    """
    settings = settings_of.load()
    settings.connect()
    from tasks import history as record

    entry = record.entry(promotion)
    page = record.fetch(entry, "report/report.html", settings.home / "promotions" / entry.id)
    out.print(str(page))
    out.print(f"{settings.mlflow}/#/runs/{entry.run_id}")
    if open_:
        import webbrowser

        webbrowser.open(page.as_uri())
    return FINE


@app.command
def suite(model: str, /, *, to: Path = Path("suite.json"), version: str | None = None, log: Flag = False) -> int:
    """Write an expectation suite generated from a version's training features, to be edited by hand.

    Args:
        model: Name of the registered model.
        to: The file to write; never overwritten.
        version: Version number; the champion otherwise.
        log: Keep it in the version's MLflow run, for the features gate; a file that is there already is kept as it is.
    """
    settings = settings_of.load()
    settings.connect()
    from tasks import registry
    from tasks.validate import write_suite

    number = version or registry.aliased(model, registry.CHAMPION)
    if number is None:
        raise Mistake(f"{model} has no champion: name a version with --version", code=WRONG_USE)
    count = write_suite(registry.find(model, number), settings.home, to, log=log)
    out.print(f"{to}: {count} expectations from the features that {model} v{number} was trained on")
    return FINE


approver = App(
    name="approver", help="Who may approve promotions, and what they prove themselves with.", help_format="plaintext"
)
app.command(approver)


@approver.command
def add(
    name: str, /, *, key: Path | None = None, public: Path | None = None, anew: Flag = False, json_: Json = False
) -> int:
    """Enrol an approver: a QR code for the authenticator of their phone, or a key.

    Args:
        name: As policies name them.
        key: Instead of one-time codes: make a key and write its private half to this file, which must not exist.
        public: Instead of one-time codes: enrol the key whose public half is in this file (PEM, or OpenSSH's ed25519).
        anew: Replace what they have, where a phone or a key is lost.
    """
    from tasks import approvers

    home, now = settings_of.load().home, datetime.now(UTC)
    if key is not None and public is not None:
        raise Mistake("--key makes a key and --public takes one: give one of them", code=WRONG_USE)
    if public is not None:
        approvers.enrol_public(home, name, _text(public), now, anew=anew)
    elif key is not None:
        _new_file(key, lambda: approvers.enrol_key(home, name, now, anew=anew))
    else:
        uri = approvers.enrol(home, name, now, anew=anew)
        if json_:
            screens.as_json({"name": name, "uri": uri})
        else:
            screens.print_uri(name, uri, approvers.secret_of(uri))
        return FINE
    (found,) = [one for one in approvers.enrolled(home) if one.name == name]
    if json_:
        screens.as_json(dataclasses.asdict(found))
        return FINE
    out.print(f"{escape(name)} is enrolled with the key {found.key}")
    if key is not None:
        out.print(f"{escape(str(key))} is its private half: it is kept nowhere else, and for {escape(name)} alone")
    return FINE


@approver.command(name="list")
def list_(*, json_: Json = False) -> int:
    """List who is enrolled, and what they prove themselves with."""
    from tasks import approvers

    found = approvers.enrolled(settings_of.load().home)
    if json_:
        screens.as_json([dataclasses.asdict(one) for one in found])
        return FINE
    if not found:
        out.print("nobody is enrolled: `titleshot approver add NAME`")
        return FINE
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("approver", "one-time codes", "key", "since"):
        table.add_column(column)
    for one in found:
        table.add_row(escape(one.name), "yes" if one.code else "no", one.key or "no", f"{one.since:%Y-%m-%d %H:%M} UTC")
    out.print(table)
    return FINE


@approver.command
def remove(name: str, /) -> int:
    """Forget an approver: their codes and tokens are worth nothing any more.

    Args:
        name: As `titleshot approver list` has it.
    """
    from tasks import approvers

    approvers.remove(settings_of.load().home, name)
    out.print(f"{escape(name)} is not enrolled any more; policies that name them still do")
    return FINE


@app.command
def approve(
    promotion: str | None = None,
    /,
    *,
    by: str | None = None,
    code: str | None = None,
    key: Path | None = None,
    reject: Flag = False,
    comment: str = "",
    token_only: Flag = False,
    region: Region = None,
    json_: Json = False,
) -> int:
    """Say yes or no to a promotion that waits for people; without --by, list what waits.

    Args:
        promotion: Its name; where only one waits, that one.
        by: Your name, as the policy has it.
        code: Your one-time code.
        key: The file with your private key, which signs what you say instead.
        reject: Say no.
        comment: Kept in the history.
        token_only: Do not hand it in: print the token, for the form's field `code`.
        region: What waits in this region; whatever waits otherwise.
    """
    settings = _settings(region)
    _refuse_unsaid(by, code, key, any_=reject or bool(comment) or token_only)
    if token_only and key is None:
        raise Mistake("--token-only prints a token, which a key signs: --key FILE", code=WRONG_USE)
    if len(comment) > 2000:
        raise Mistake("the comment is longer than 2,000 characters", code=WRONG_USE)
    signer = None if key is None else _text(key)
    from tasks.approve import pending

    waiting = [one for one in pending(settings) if promotion in (None, one.subject.promotion)]
    waiting = [one for one in waiting if settings.region in (None, one.region)]
    if promotion is not None and not waiting:
        where = f" in {settings.region}" if settings.region else ""
        raise Mistake(f"{promotion} does not wait for anybody{where}: `titleshot approve` lists what does")
    if by is None:
        screens.print_waiting(settings, waiting, json_=json_)
        return FINE
    asked = _the_one(waiting)
    from tasks import approvers, flowruns

    decision: Literal["approve", "reject"] = "reject" if reject else "approve"
    if signer is not None:
        code = approvers.sign(signer, by, asked, decision, comment, datetime.now(UTC))
    form = {"decision": decision, "approver": by, "code": code or "", "comment": comment}
    if token_only:
        if json_:
            screens.as_json(form)
        else:
            sys.stdout.write(form["code"] + "\n")
            rest = f", comment: {comment}" if comment else ", no comment"
            screens.say(f"for the form, within 10 minutes, with decision: {decision}, approver: {by}{rest}")
        return FINE
    _hand_in(settings, asked, form)
    page = flowruns.page(settings, asked.flow_run)
    if json_:
        screens.as_json({"promotion": asked.subject.promotion, "decision": decision, "by": by, "page": page})
        return FINE
    what = f"{escape(asked.subject.promotion)} ({asked.subject.digest[:19]})"
    out.print(f"handed in: {escape(by)} says [bold]{decision}[/] to {what}")
    out.print("  It is not accepted yet: the promotion looks at it when its run goes on. What became of it:")
    out.print(f"  {page}")
    out.print(f"  titleshot explain {escape(asked.subject.promotion)}")
    return FINE


def _refuse_unsaid(by: str | None, code: str | None, key: Path | None, *, any_: bool) -> None:
    if by is None and (any_ or code is not None or key is not None):
        raise Mistake("say who you are: --by NAME", code=WRONG_USE)
    if by is not None and (code is None) == (key is None):
        raise Mistake("prove who you are: --code CODE, or --key FILE, and one of them", code=WRONG_USE)


def _the_one(waiting: list[Any]) -> Any:
    """What waits, where that is one, and still does."""
    if not waiting:
        raise Mistake("no promotion waits for anybody")
    if len(waiting) > 1:
        which = ", ".join(one.subject.promotion for one in waiting)
        raise Mistake(f"{len(waiting)} promotions wait, name one: {which}", code=WRONG_USE)
    if datetime.now(UTC) >= waiting[0].until:
        promotion, until = waiting[0].subject.promotion, waiting[0].until
        raise Mistake(f"{promotion} could be approved until {until:%Y-%m-%d %H:%M} UTC")
    return waiting[0]


def _hand_in(settings: settings_of.Settings, asked: Any, form: dict[str, str]) -> None:
    from tasks import flowruns

    if not asked.flow_run:
        raise Mistake(f"{asked.subject.promotion} has no flow run that could take a form: look at `titleshot watch`")
    until = time.monotonic() + 30
    while True:
        try:
            return flowruns.resume(settings, asked.flow_run, form)
        except flowruns.Unanswered as error:
            raise Mistake(f"{error}: check TITLESHOT_PREFECT_API_URL") from error
        except Mistake as mistake:
            # It is written down that people are asked before the run is suspended, and its form comes after that.
            found = flowruns.find(settings, asked.flow_run)
            early = found is not None and (found.type in ("RUNNING", "PENDING") or "schema not found" in str(mistake))
            if not early or time.monotonic() > until:
                state = f"; its run is {found.state}" if found else "; its run is gone"
                raise Mistake(f"{asked.subject.promotion}: {mistake}{state}") from mistake
        time.sleep(0.5)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise Mistake(f"{path} cannot be read: {why}", code=WRONG_USE) from error


def _new_file(path: Path, make: Callable[[], str]) -> None:
    """Write what `make` makes to a file that must not exist, for the owner only; where it fails there is none."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError as error:
        raise Mistake(f"{path} exists, and is not overwritten: name another file", code=WRONG_USE) from error
    except OSError as error:
        raise Mistake(f"{path} cannot be written: {error.strerror}", code=WRONG_USE) from error
    with os.fdopen(descriptor, "w") as stream:
        try:
            stream.write(make())
        except BaseException:
            path.unlink()
            raise


notify = App(name="notify", help="Who is told what happens: TITLESHOT_NOTICES names a configuration file of Apprise's.")
app.command(notify)


@notify.command(name="test")
def notify_test(*, json_: Json = False) -> int:
    """Send one notice of each severity to whom it concerns, and say where it arrived."""
    from tasks import notify as notices

    settings = settings_of.load()
    if settings.notices is None:
        raise Mistake("TITLESHOT_NOTICES is not set: name a file of Apprise URLs there", code=WRONG_USE)
    wrong, found = notices.examine(settings), notices.test(settings)
    if json_:
        sent = {severity: [dataclasses.asdict(one) for one in done] for severity, done in found.items()}
        screens.as_json({"problem": wrong, "sent": sent})
    else:
        for severity, done in found.items():
            out.print(f"[bold]{severity}[/]{'' if done else ': no URL wants it'}")
            for one in done:
                mark = "[green]arrived[/]" if one.arrived else "[red]failed [/]"
                out.print(f"  {mark} {escape(one.masked)}  [dim]{escape(one.why)}[/]")
        if wrong:
            out.print(f"[red]{escape(wrong)}[/]")
    return ERROR if wrong or not all(one.arrived for done in found.values() for one in done) else FINE


@app.command
def doctor(*, mend: Flag = False, json_: Json = False) -> int:
    """Check this machine and this environment for what is known to break the stack, each with its mend.

    Args:
        mend: First bring alias, journal and traffic together where they disagree, and clean up what nobody needs.
    """
    from tasks.doctor import examine

    if mend:
        _mend()
    found = examine(settings_of.load())
    if json_:
        screens.as_json([dataclasses.asdict(finding) for finding in found])
    else:
        for finding in found:
            mark = "[green]ok  [/]" if finding.fine else "[red]MEND[/]"
            out.print(f"{mark} {finding.what}: {escape(finding.found)}")
            if not finding.fine:
                out.print(f"     [yellow]{escape(finding.mend)}[/]")
    return FINE if all(finding.fine for finding in found) else ERROR


def _ended(settings: settings_of.Settings, model: str, begun: float, error: Exception) -> dict[str, Any]:
    """How a promotion ended whose flow run Prefect, which is away, could not be told of; the error where it did not."""
    from flows.drive import outcome
    from tasks import history
    from tasks.journal import agreed
    from tasks.targets import everywhere

    ends = [last for _, target in everywhere(settings) if (last := agreed(target, model)) is not None]
    last = max(ends, key=lambda one: one.at, default=None)
    if last is None or last.at < begun:
        raise error
    screens.say(f"Prefect does not answer at {settings.prefect}: its flow run does not show how this ended")
    return outcome(history.stored(history.entry(last.promotion).run_id))


def _mend() -> None:
    from tasks.lookout import leftovers
    from tasks.progress import listening
    from tasks.status import models_of
    from tasks.targets import PATIENCE, everywhere

    settings = settings_of.load()
    with listening(screens.say):
        for own, target in everywhere(settings, patience=PATIENCE):
            for one in models_of(own, target) if target.up() else ():
                if one["problems"]:
                    from flows.recover import mend

                    for words in mend(own, one["model"], own.lease_seconds + 5):
                        out.print(f"[green]mended[/] {escape(words)}")
    for words in leftovers(settings, mend=True):
        out.print(f"[green]cleaned[/] {escape(words)}")


def _status(region: str | None = None) -> dict[str, Any]:
    from tasks.status import status as look

    return look(_settings(region))


def run(arguments: list[str] | None = None) -> int:
    """Run one command line. Returns the exit code; a user's mistake is one line on stderr."""
    return copy_context().run(_run, arguments)  # the region that it means is meant until its end


def _run(arguments: list[str] | None) -> int:
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        err.print(escape(f"titleshot: {' '.join(str(error).split())} (see `titleshot --help`)"), style="red")
        return WRONG_USE
    except Mistake as mistake:
        err.print(escape(f"titleshot: {mistake}"), style="red")
        return mistake.code
    except TargetError as error:
        err.print(escape(f"titleshot: {error}"), style="red")
        return ERROR
    except KeyboardInterrupt:
        err.print("titleshot: interrupted; `titleshot status` shows what serves", style="red")
        return 130
    except Exception as error:
        if os.environ.get("TITLESHOT_DEBUG"):
            raise
        # Whatever is left is the platform's: one line for the person, the traceback for who asks for it.
        text = " ".join(str(error).split())[:600]
        err.print(escape(f"titleshot: {type(error).__name__}: {text} (TITLESHOT_DEBUG=1 shows where)"), style="red")
        return ERROR
    return code if isinstance(code, int) else FINE


def main() -> None:
    """Entry point of the `titleshot` command."""
    sys.exit(run())

"""What the command line shows: tables, outcomes and lines of progress."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.settings import Settings

STYLES = {
    "promoted": "green",
    "rejected": "red",
    "rolled back": "red",
    "degraded": "bold magenta",
    "running": "yellow",
    "awaiting approval": "yellow",
    "RUNNING": "green",
}

# Names and values are printed as they are: `:x:` is no picture.
out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def print_outcome(result: dict[str, Any]) -> None:
    """How a promotion ended, or what it waits for."""
    style = STYLES.get(result["phase"], "")
    at = f" at {result['step']}" if result["step"] else ""
    out.print(f"{result['model']} v{result['challenger']}: [{style}]{result['phase']}[/]{at}")
    out.print(f"  {escape(result['why'])}")
    for one in result.get("regions", ()):
        out.print(f"  {one['region']}: [{STYLES.get(one['phase'], '')}]{one['phase']}[/]  {escape(one['promotion'])}")
    if result["phase"] == "awaiting approval":
        out.print(f"  {escape(result.get('page', ''))}")
    out.print(f"  titleshot explain {result['promotion']}")


def print_status(found: dict[str, Any]) -> None:
    """What runs and what serves."""
    if not found["up"]:
        out.print(f"[red]nothing is up[/] in {found['home']}: start it with `titleshot up`")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("program", "state", "pid", "address"):
        table.add_column(column)
    for program in found["programs"]:
        state = program["state"]
        table.add_row(
            program["name"],
            f"[{STYLES.get(state, 'red')}]{state}[/]",
            str(program["pid"]),
            program["address"],
        )
    if found["programs"]:
        out.print(table)
    for model in found["models"]:
        _print_model(model)
    for problem in found["problems"]:
        out.print(f"\n[red]{escape(problem)}[/]")


def _print_model(model: dict[str, Any]) -> None:
    challenger = (
        f", v{model['challenger']} answers {model['weight']:g}% and mirrors {model['mirror']:g}%"
        if model["challenger"]
        else ""
    )
    where = f" in {model['region']}" if model["region"] else ""
    out.print(f"\n[bold]{model['model']}[/]{where}: v{model['serving']} serves{challenger}")
    out.print(f"  POST {model['gateway']}/invocations")
    if model["fallback"]:
        out.print(f"  [dim]where it fails, v{model['fallback']} answers[/]")
    if model["under_way"]:
        out.print(f"  [yellow]under way: {escape(model['under_way'])}[/]")
        if model["waits"]:
            out.print(f"  [yellow]waits[/] {escape(model['waits'])}")
    for problem in model["problems"]:
        out.print(f"  [red]{escape(problem)}[/]")


def print_region(name: str) -> None:
    """Of which region the next lines are; nothing of a model that is served in one place."""
    if name:
        out.print(f"[bold]region {escape(name)}[/]")


def print_problem(text: str) -> None:
    """What is not as it should be."""
    out.print(f"[red]{escape(text)}[/]")


def print_rollback(model: str, one: dict[str, Any]) -> None:
    """What a rollback came to, in one place or in one region."""
    name = escape(f"{model} in {one['region']}" if one["region"] else model)
    why = escape(one["why"])
    if one["phase"] in ("rolled back", "rejected") and one.get("to"):
        out.print(f"{name}: [bold]v{one['to']}[/] is champion again: {why}")
    elif one["phase"] in ("", "rejected", "rolled back"):
        out.print(f"{name}: [dim]{why}[/]")
    elif one["phase"] == "failed":
        out.print(f"{name}: [red]did not go back[/]: {why}")
    else:
        out.print(f"{name}: [bold magenta]degraded[/], look at `titleshot status`: {why}")


def print_pool(found: dict[str, Any]) -> None:
    """The versions of a model that are loaded."""
    from tasks.pool import summary

    out.print(f"[bold]{found['model']}[/]  POST {found['gateway']}/invocations")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("version", "role", "state", "pid", "memory"):
        table.add_column(column)
    for one in found["versions"]:
        memory = "" if one["megabytes"] is None else f"{one['megabytes']} MB"
        state = f"[{STYLES.get(one['state'], 'red')}]{one['state']}[/]"
        table.add_row(f"v{one['version']}", escape(one["role"]), state, str(one["pid"] or ""), memory)
    out.print(table)
    out.print(summary(found))


def print_route(traffic: Any, gateway: str) -> None:
    """What the gateway obeys for a model."""
    from tasks import shape

    out.print(f"[bold]{traffic.model}[/]  POST {gateway}/invocations")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("requests", "share", "answered by"):
        table.add_column(column)
    for row in shape.rows(traffic):
        table.add_row(*map(escape, row))
    out.print(table)
    for note in shape.notes(traffic):
        out.print(escape(note))


def print_preview(found: Any) -> None:
    """What a promotion would create and change, as a diff by step."""
    from tasks.preview import difference

    old = f"v{found.champion}" if found.champion else "a champion that is not there yet"
    out.print(f"[bold]{escape(found.model)} v{found.challenger}[/] in the place of {old}; nothing is touched by this")
    for step, changes in found.steps:
        out.print(f"\n[bold]{escape(step)}[/]" + ("" if changes else "  [dim]nothing changes[/]"), highlight=False)
        for change in changes:
            sign = "[green]+[/]" if not change.before else "[red]-[/]" if not change.after else "[yellow]~[/]"
            out.print(f"{sign} {escape(change.what)}", highlight=False)
            for line in difference(change):
                style = {"+": "green", "-": "red", "@": "cyan dim"}.get(line[:1], "dim")
                out.print(f"    [{style}]{escape(line)}[/]", soft_wrap=True, highlight=False)
    for why in found.against:
        out.print(f"\n[red]it would not begin[/]: {escape(why)}")


def print_plan(steps: list[Any], took: dict[str, float]) -> None:
    """What each step of a policy needs, and can see."""
    from validations.monitor import duration

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", "takes", "check", "passes after", "stops from"):
        table.add_column(column, overflow="fold", no_wrap=column in ("step", "passes after", "stops from"))
    for step in steps:
        if step.seconds is None:
            takes = f"{duration(took[step.step])} last time" if step.step in took else ""
        else:
            takes = duration(step.seconds) + (f" to {duration(step.long)}" if step.long > step.seconds * 1.2 else "")
        rows = [
            (
                f"{escape(check.metric)} [dim]{check.bound}[/]",
                f"{check.requests:,} requests" if check.requests else "[red]never[/]",
                check.smallest,
            )
            for check in step.checks
        ] or [("", "", "")]
        for index, row in enumerate(rows):
            table.add_row(*(("", "") if index else (f"[bold]{escape(step.step)}[/]", takes)), *row)
    out.print(table)
    for step in steps:
        for check in step.checks:
            if check.mend:
                out.print(f"[red]{escape(step.step)}: {escape(check.metric)}[/] {escape(check.mend)}")
    known = sum(step.seconds or took.get(step.step, 0.0) for step in steps)
    out.print(f"\nabout {duration(known)} in all, for a challenger that is like the champion")


def print_replay(found: list[Any], *, other: bool) -> None:
    """Past verdicts, reached again."""
    for one in found:
        if not other:
            same = (
                f"[red]not the same at {', '.join(one.changed)}[/]" if one.changed else "[green]the same to the bit[/]"
            )
            out.print(f"[bold]{one.id}[/]  {escape(one.was)}: {same}")
            continue
        mark = "[yellow]otherwise[/]" if one.otherwise else "[dim]as it was[/]"
        out.print(f"[bold]{one.id}[/]  was {escape(one.was)}; now {escape(one.replayed.ended)}  {mark}")
        last = one.replayed.steps[-1].verdict
        if one.otherwise and last is not None:
            out.print(f"    {escape(last.why)}")
    if other and len(found) > 1:
        out.print(f"{sum(one.otherwise for one in found)} of {len(found)} promotions would have ended otherwise")


def print_probe(found: dict[str, Any]) -> None:
    """Who answered, and how fast."""
    table = Table(box=None, header_style="dim")
    for column in ("model", "version", "role", "answered", "median", "slowest"):
        table.add_column(column)
    for model in found["models"]:
        for one in model["versions"]:
            times = ("-" if one[key] is None else f"{one[key]:.0f} ms" for key in ("median_ms", "slowest_ms"))
            table.add_row(
                escape(f"{model['model']} in {model['region']}" if model["region"] else model["model"]),
                f"v{one['version']}",
                one["role"],
                f"{one['sent'] - one['failed']} of {one['sent']}",
                *times,
            )
    out.print(table)
    for problem in found["problems"]:
        out.print(f"[red]{escape(problem)}[/]")


def print_demo(result: dict[str, Any]) -> None:
    """What the demo came to."""
    table = Table(
        title=f"\n{result['model']}: six challengers, one policy",
        title_justify="left",
        header_style="dim",
        box=None,
        pad_edge=False,
    )
    for column in ("challenger", "phase", "step", "why"):
        table.add_column(column, overflow="fold", no_wrap=column != "why")
    for row in result["challengers"]:
        style = STYLES.get(row["phase"], "")
        table.add_row(row["challenger"], f"[{style}]{row['phase']}[/]", row["step"], escape(row["why"]))
    out.print(table)
    live = result["live"]
    colour = "green" if live["failed"] == 0 else "red"
    out.print(
        f"\nlive requests: {live['requests']:,}, failed: [{colour}]{live['failed']}[/], in {result['seconds']:.0f} s"
    )
    for name, address in result["addresses"].items():
        out.print(f"  {name:<8} {address}")
    out.print("\nnext:")
    for line in result["next"]:
        out.print(f"  {line}")


def print_uri(name: str, uri: str, secret: str) -> None:
    """How an approver enrols: the QR code, and its secret as text."""
    import io

    import segno

    code = segno.make(uri, error="l", micro=False)
    if out.width >= code.symbol_size()[0]:
        drawn = io.StringIO()
        code.terminal(drawn, compact=True)
        for line in drawn.getvalue().splitlines():
            # Colours of its own: an inverted code, as a light terminal would show it, not every phone reads.
            out.print(line, style="#ffffff on #000000", markup=False)
    out.print(f"{escape(name)} is enrolled. Scan this with an authenticator, or type there:")
    groups = " ".join(secret[at : at + 4] for at in range(0, len(secret), 4))
    out.print(f"  secret   [bold]{groups}[/]")
    out.print(f"  account  Titleshot:{escape(name)} (by time, 6 digits, 30 seconds)")
    out.print("It is not shown again. Who sees it can approve in this name.")


def print_waiting(settings: Settings, waiting: list[Any], *, json_: bool) -> None:
    """What waits for people."""
    from tasks import flowruns

    rows = [
        {
            "promotion": one.subject.promotion,
            "model": one.subject.promotion.rpartition("-v")[0],
            "region": one.region,
            "step": one.subject.step,
            "round": one.round,
            "requester": one.requester,
            "until": f"{one.until:%Y-%m-%d %H:%M} UTC",
            "subject": one.subject.digest,
            "page": flowruns.page(settings, one.flow_run) if one.flow_run else "",
        }
        for one in waiting
    ]
    if json_:
        as_json(rows)
        return
    for row in rows:
        where = f" in {row['region']}" if row["region"] else ""
        out.print(
            f"[bold]{escape(str(row['promotion']))}[/]  {escape(str(row['model']))}{where}: asked for by "
            f"{escape(str(row['requester'] or 'nobody by name'))}, until {row['until']}"
        )
        out.print(f"  bound to {str(row['subject'])[:19]}  {row['page']}")
    if not rows:
        out.print("no promotion waits for anybody")


def say(text: str) -> None:
    """One line of progress, on stderr."""
    err.print(escape(text), style="dim" if text.startswith(" ") else "")


def as_json(data: object) -> None:
    """Data for programs, on stdout."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")

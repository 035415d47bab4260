"""One promotion as a page with pictures, as a table, and in words."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from tasks.history import slug
from validations.promotion import Promotion
from validations.verdict import Bound, Verdict

CHAMPION, CHALLENGER = "#6b7a90", "#0b63ce"


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture of the report, as inline SVG."""

    title: str
    caption: str
    svg: str


def write(promotion: Promotion, folder: Path, links: dict[str, str]) -> Path:
    """Write `report.html` into `folder`, from the promotion and the evidence files that lie there.

    The page is whole in itself: no script, and nothing fetched from anywhere. Returns its path.
    """
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    reached = {verdict.step for verdict in promotion.verdicts}
    page = environment.get_template("report.html.j2").render(
        p=promotion,
        plots=plots(promotion, folder),
        links=links,
        seconds=_seconds,
        remaining=[step for step in promotion.plan if step.name not in reached],
        policy=yaml.safe_dump(json.loads(promotion.policy.model_dump_json(exclude_defaults=False)), sort_keys=False),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def table(promotion: Promotion) -> str:
    """The verdicts as a table in Markdown."""
    rows = [
        f"| {verdict.step} | {verdict.outcome.value} | {verdict.why.replace('|', '/')} |"
        for verdict in promotion.verdicts
    ]
    return "\n".join(["| step | outcome | why |", "|---|---|---|", *rows])


def markdown(promotion: Promotion) -> str:
    """Where a promotion stands and its verdict table in Markdown, for the Prefect UI."""
    title = f"# {promotion.policy.model} v{promotion.challenger}: {promotion.phase.value}"
    return f"{title}\n\n{table(promotion)}"


def explain(promotion: Promotion) -> str:
    """What was asked, measured and decided, and why: in words and numbers."""
    model = promotion.policy.model
    place = f"v{promotion.champion}" if promotion.champion else "a first champion"
    lines = [
        f"{promotion.id}: {model} v{promotion.challenger} is {promotion.phase.value}.",
        f"It asked for the place of {place}, with the artifact {promotion.digest[:19]},",
        f"under policy {promotion.policy.digest[:19]}.",
        "",
    ]
    for verdict in promotion.verdicts:
        lines.append(f"{verdict.step}: {verdict.outcome.value} ({_seconds(verdict)} s)")
        lines += [f"  - {check}" for check in verdict.checks] or ["  - nothing was checked"]
        if verdict.evidence.note:
            lines += [f"    {line}" for line in verdict.evidence.note.splitlines()]
    rest = [step.name for step in promotion.plan if step.name not in {v.step for v in promotion.verdicts}]
    if rest:
        lines.append(f"not reached: {', '.join(rest)}")
    decided = promotion.decided_by
    if decided is not None:
        lines += ["", f"Decided by {decided.step}: {decided.why}"]
    return "\n".join(lines)


def _seconds(verdict: Verdict) -> str:
    evidence = verdict.evidence
    if evidence.started is None or evidence.finished is None:
        return ""
    return f"{(evidence.finished - evidence.started).total_seconds():.1f}"


def plots(promotion: Promotion, folder: Path) -> list[Plot]:
    """The pictures for which there is evidence: intervals over time, slices, latencies, canary."""
    found: list[Plot] = []
    canaries: list[tuple[str, dict[str, Any]]] = []
    courses: dict[str, list[tuple[Verdict, list[dict[str, Any]]]]] = {}
    gates = {step.name: step.gate for step in promotion.plan}
    for verdict in promotion.verdicts:
        try:
            data = json.loads((folder / f"{slug(verdict.step)}.json").read_text())
        except FileNotFoundError:
            continue
        if "agreement" in data and data["agreement"].get("slices"):
            found.append(_slices(data["agreement"]))
        if "load" in data:
            found.append(_latencies(data["load"]))
        if data.get("trace") and (index := gates[verdict.step]) is not None:
            gate = promotion.policy.gates[index]
            courses.setdefault(gate.name or gate.kind, []).append((verdict, data["trace"]))
        if "weight" in data:
            canaries.append((verdict.step, data))
    found += [_course(name, parts) for name, parts in courses.items()]
    if canaries:
        found.append(_canary(canaries))
    return found


def _course(gate: str, parts: list[tuple[Verdict, list[dict[str, Any]]]]) -> Plot:
    """Each check's interval over the time of its gate, with its bound: a decision is where the band has crossed it."""
    bounds = {check.metric: check.bound for verdict, _ in parts for check in verdict.checks}
    metrics = [m for m in bounds if any(m in point["measured"] for _, trace in parts for point in trace)]
    figure, axes = _figure(height=0.9 + 1.5 * len(metrics), rows=len(metrics))
    panels = list(axes) if len(metrics) > 1 else [axes]
    starts = [0.0]
    for _, trace in parts:
        starts.append(starts[-1] + max(trace[-1]["seconds"], 1.0))
    for panel, metric in zip(panels, metrics, strict=True):
        # In the beginning nothing is known, and what was known last holds to the end.
        rows = [(0.0, [None, None, None])]
        for start, (_, trace) in zip(starts, parts, strict=False):
            rows += [(start + at["seconds"], at["measured"][metric]) for at in trace if metric in at["measured"]]
        rows.append((1.02 * starts[-1], rows[-1][1]))
        _band(panel, metric, rows, bounds[metric])
        for start in starts[1:-1]:
            panel.axvline(start, color="#c4ccd6", linewidth=0.8)
    for start, (verdict, _) in zip(starts, parts, strict=False):
        note = panels[0].annotate(verdict.step, (start, 1), xycoords=("data", "axes fraction"), xytext=(4, -10),
                                  textcoords="offset points", fontsize=8, color=CHAMPION)  # fmt: skip
        note.set_in_layout(False)
    panels[-1].set_xlabel("seconds")
    return Plot(
        f"What was known, moment by moment: {gate}",
        "The band is the interval at that moment, and holds at all moments at once; the red line is the bound. A check "
        "is decided once the whole band is on one side.",
        _svg(figure),
    )


def _band(axis: Any, metric: str, rows: list[tuple[float, list[Any]]], bound: Bound) -> None:
    limits = [limit for limit in (bound.min, bound.max) if limit is not None]
    values = [row[0] for _, row in rows if row[0] is not None]
    top = max([*(2.2 * limit for limit in limits), *(1.3 * value for value in values)])
    bottom = min([0.0, *(1.5 * limit for limit in limits), *values])
    seconds = [at for at, _ in rows]
    low = [bottom if row[1] is None else max(row[1], bottom) for _, row in rows]
    high = [top if row[2] is None else min(row[2], top) for _, row in rows]
    axis.fill_between(seconds, low, high, color=CHALLENGER, alpha=0.18, step="post", linewidth=0)
    axis.step(seconds, [row[0] for _, row in rows], where="post", color=CHALLENGER, linewidth=1.6)
    for limit in limits:
        axis.axhline(limit, color="#b3261e", linewidth=1.2, linestyle="--")
    axis.set_ylim(bottom, top or 1)
    axis.set_xlim(0, seconds[-1])
    axis.set_title(f"{metric}: {bound}", loc="left", fontsize=9)


def _slices(agreement: dict[str, Any]) -> Plot:
    """Disagreement with its interval, slice by slice, worst first."""
    figure, axes = _figure(height=0.8 + 0.26 * len(agreement["slices"][:25]))
    rows = sorted(agreement["slices"], key=lambda row: float(row["low"]))[-25:]
    for index, row in enumerate(rows):
        axes.plot(
            [float(row["low"]), min(float(row["high"]), 1)],
            [index, index],
            color=CHALLENGER,
            linewidth=2.5,
            alpha=0.5,
        )
        axes.plot(float(row["value"]), index, "o", color=CHALLENGER, markersize=6)
    axes.set_yticks(range(len(rows)), [f"{row['where']}  ({row['pairs']})" for row in rows])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of paired requests that the two answer differently")
    return Plot(
        "Where the answers differ",
        "Disagreement between champion and challenger by slice of live traffic, with its confidence interval; "
        "the number of pairs in brackets.",
        _svg(figure),
    )


def _latencies(load: dict[str, Any]) -> Plot:
    """Both distributions as survival curves: the tail is what the gate is about."""
    figure, axes = _figure(height=3.4)
    for name, color in (("champion", CHAMPION), ("challenger", CHALLENGER)):
        side = load.get(name)
        if not side or not side["latencies_ms"]:
            continue
        values, total = side["latencies_ms"], side["requests"]
        slower = [1 - i / total for i in range(len(values))]
        label = f"{name}: {total} requests, {side['failures']} failed"
        axes.step(values, slower, where="post", color=color, linewidth=2, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("milliseconds from the intended start to the answer")
    axes.set_ylabel("share of requests slower")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    for share, label in ((0.5, "p50"), (0.05, "p95"), (0.01, "p99")):
        axes.axhline(share, color="#c4ccd6", linewidth=0.8, zorder=0)
        axes.annotate(
            label,
            (1, share),
            xycoords=("axes fraction", "data"),
            xytext=(4, -3),
            textcoords="offset points",
            fontsize=8,
        )
    axes.legend(frameon=False, loc="lower left")
    return Plot(
        "Latency under load",
        "Share of requests slower than x: the curve further left is the faster model, and failures never come down.",
        _svg(figure),
    )


def _canary(canaries: list[tuple[str, dict[str, Any]]]) -> Plot:
    """The weight over time, and the errors that each version made."""
    figure, axes = _figure(height=3.6, rows=2)
    above, below = axes
    offset = 0.0
    times: list[float] = [0.0]
    weights: list[float] = [0.0]
    for _, data in canaries:
        blocks = data["series"].get("blocks", [])
        end = offset + sum(block["seconds"] for block in blocks)
        times += [offset, end]
        weights += [data["weight"], data["weight"]]
        for side, color in (("champion", CHAMPION), ("challenger", CHALLENGER)):
            points = _failing(blocks, side, offset)
            if points:
                first = canaries[0][1] is data
                below.plot(*zip(*points, strict=True), color=color, linewidth=2, label=side if first else None)
        offset = end
    above.plot(times, weights, color=CHALLENGER, linewidth=2, drawstyle="default")
    above.fill_between(times, weights, color=CHALLENGER, alpha=0.15)
    above.set_ylabel("weight, %")
    above.set_ylim(0, max(weights) * 1.15 or 1)
    below.set_ylabel("failed attempts, %")
    below.set_xlabel("seconds of canary")
    below.set_ylim(0, max(1.0, below.get_ylim()[1]))
    below.legend(frameon=False, loc="upper left")
    return Plot(
        "Canary",
        "The challenger's share of live requests, and the share of attempts that failed at each version since the "
        "weight was set (attempts that a retry hid from the client count).",
        _svg(figure),
    )


def _failing(blocks: list[dict[str, Any]], side: str, offset: float) -> list[tuple[float, float]]:
    """The share of attempts that failed so far (percent), after each block."""
    points, requests, errors = [], 0, 0
    for block in blocks:
        offset += block["seconds"]
        requests += sum(arm.get("requests", 0) for arm in block.get(side, ()))
        errors += sum(arm.get("errors", 0) for arm in block.get(side, ()))
        if requests:
            points.append((offset, 100 * errors / requests))
    return points


def _figure(height: float, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=9)
    return figure, axes if rows > 1 else axes[0]


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    text = io.StringIO()
    # A fixed salt and no date: the same evidence gives the same page.
    with mpl.rc_context({"svg.hashsalt": "titleshot", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])  # noqa: S704 - our own drawing, no text of a user's is markup in it

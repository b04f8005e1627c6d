"""The plots of the report, drawn by matplotlib as SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.figure import Figure

from modelcache import format_seconds
from modelcache.ab.comparison import Comparison
from modelcache.ab.journal import Run
from modelcache.ab.metrics import LATENCY, Metric
from modelcache.ab.verdicts import Judgement
from modelcache.page_style import LIGHT, page_colour

# Colours that nothing else has; the page's own are put in their place.
_INK, _DIM, _LINE = "#010203", "#010204", "#010205"
_VARIABLES = {_INK: "var(--fg)", _DIM: "var(--dim)", _LINE: "var(--line)"}
_NUM_COLOURS = len(LIGHT)
# More points than that say no more, and make the page large.
_MOST_POINTS = 600
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "modelcache",
    "font.family": ["sans-serif"],
    "font.size": 10,
    # Names are taken literally, dollars too.
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _DIM,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _DIM,
    "ytick.color": _DIM,
    "legend.frameon": False,
}


def _colour(index: int) -> str:
    return f"#0a00{index % _NUM_COLOURS:02x}"


def _draw(width: float, height: float, label: str, draw: Callable[[Figure], None]) -> str:
    """A figure of so many inches as an SVG element."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height))
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # What identifies the format and the licence of its vocabulary: addresses that a page from one file has no use for.
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\swidth="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    for colour, variable in (*_VARIABLES.items(), *((_colour(i), page_colour(i)) for i in range(_NUM_COLOURS))):
        svg = svg.replace(colour, variable)
    # The names that matplotlib gives are the same in each figure, and all figures are on one page.
    # A label of its own makes an id of its own: what is not a plain letter is written as its number.
    prefix = re.sub(r"[^a-z0-9]", lambda found: f"_{ord(found[0]):x}_", label)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)


def forest(result: Comparison) -> str:
    """The differences with their intervals and a line at none, one row each on its own scale."""
    rows, colours = result.judgements, _colours(result)

    def draw(figure: Figure) -> None:
        height = 1 / (len(rows) + 0.2)
        for place, one in enumerate(rows):
            axes = figure.add_axes((0.36, 1 - (place + 0.75) * height, 0.6, 0.5 * height))
            _forest_row(axes, one, colours[one.differences.arm])

    return _draw(9.6, 0.75 * len(rows) + 0.2, "differences", draw)


def _forest_row(axes: Any, one: Judgement, colour: str) -> None:
    metric, ends = one.differences.metric, (one.interval.low, one.interval.high)
    finite = [abs(end) for end in (*ends, one.mean) if math.isfinite(end)]
    reach = 1.25 * max([*finite, metric.margin or 0.0, 1e-9])
    axes.axvline(0, color=_DIM, linewidth=1)
    if metric.margin is not None:
        axes.axvline(-metric.sign * metric.margin, color=_DIM, linewidth=1, linestyle=":")
    axes.plot([max(ends[0], -reach), min(ends[1], reach)], [0, 0], color=colour, linewidth=4, solid_capstyle="butt")
    axes.plot([one.mean], [0], "o", color=colour, markersize=8)
    axes.set(xlim=(-reach, reach), ylim=(-1, 1), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", labelsize=8, length=2)
    if metric.scale == "ratio":
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:+.3g} %")
    axes.annotate(
        f"{one.differences.arm}: {metric.name}",
        (-0.02, 0.5),
        xycoords="axes fraction",
        ha="right",
        va="center",
        color=_INK,
    )


def latencies(result: Comparison) -> str:
    """The share of calls that took no longer than so long, by arm; and how long models took to arrive."""

    def draw(figure: Figure) -> None:
        calls, arrivals = figure.subplots(1, 2, gridspec_kw={"width_ratios": (3, 2)})
        for arm, colour in _colours(result).items():
            steady = [sum(run.seconds.values()) for run in result.runs if run.arm == arm and not run.error]
            _steps(calls, steady, colour, arm)
        for summary, colour in zip(result.arms, _colours(result).values(), strict=True):
            _steps(arrivals, summary.switch_s, colour, f"{summary.arm.name} from RAM")
            if summary.cold_s is not None:
                arrivals.plot([summary.cold_s], [1], "D", color=colour, markersize=6, label=f"{summary.arm.name} cold")
        calls.set_title("calls, steady", loc="left", fontsize=10)
        arrivals.set_title("arrivals", loc="left", fontsize=10)
        for axes in (calls, arrivals):
            _seconds_axis(axes.xaxis, axes)
            axes.set(ylim=(0, 1.05))
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
            axes.grid(axis="y", linewidth=0.6)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, loc="lower right")
        figure.subplots_adjust(left=0.06, right=0.98, bottom=0.14, top=0.9, wspace=0.18)

    return _draw(9.6, 3.6, "latencies", draw)


def _steps(axes: Any, seconds: Sequence[float], colour: str, label: str) -> None:
    ordered = _thinned(sorted(seconds))
    if ordered:
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.step([ordered[0], *ordered], [0, *shares], where="post", color=colour, linewidth=2, label=label)


def _seconds_axis(axis: Any, axes: Any) -> None:
    axes.set_xscale("log") if axis is axes.xaxis else axes.set_yscale("log")
    axis.set_major_formatter(lambda s, _: format_seconds(s))
    axis.set_minor_formatter(ticker.NullFormatter())
    low, high = axis.get_view_interval()
    if low > 0 and high / low < 10:
        # A logarithmic axis of less than a decade has one tick, if any.
        axis.set_major_locator(ticker.MaxNLocator(4))
    axis.set_tick_params(labelsize=8)


def scatter(result: Comparison, metric: Metric) -> str:
    """Each item as a point: the baseline's figure across, the arm's up; on the line they are the same."""
    base, *others = result.plan.arms

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(1, len(others), squeeze=False)[0]
        for axes, arm in zip(all_axes, others, strict=True):
            pairs = [
                (x, y)
                for item in _thinned(result.complete_items)
                if (x := result.value(metric, base.name, item)) is not None
                and (y := result.value(metric, arm.name, item)) is not None
            ]
            if not pairs:
                continue
            low, high = min(map(min, pairs)), max(map(max, pairs))
            axes.plot([low, high], [low, high], color=_DIM, linewidth=1)
            axes.plot(*zip(*pairs, strict=True), "o", color=_colours(result)[arm.name], markersize=4, alpha=0.6)
            if metric.unit == "s":
                _seconds_axis(axes.xaxis, axes)
                _seconds_axis(axes.yaxis, axes)
            axes.set_xlabel(f"{base.name}, {metric.name}")
            axes.set_ylabel(f"{arm.name}")
            axes.tick_params(labelsize=8)
            axes.grid(linewidth=0.6)
        figure.subplots_adjust(left=0.1 / len(others) + 0.03, right=0.98, bottom=0.16, top=0.96, wspace=0.3)

    return _draw(min(9.6, 4.8 * len(others)), 3.9, f"{metric.name} by item", draw)


def quality_against_latency(result: Comparison, metric: Metric) -> str:
    """Each arm as a disc: time across, the metric up, its area what it holds in memory."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.1, 0.16, 0.86, 0.78))
        largest = max([arm.vram_bytes for arm in result.arms] + [1])
        for arm, colour in zip(result.arms, _colours(result).values(), strict=True):
            if LATENCY not in arm.means or metric.name not in arm.means:
                continue
            x, y = arm.means[LATENCY], arm.means[metric.name]
            axes.scatter([x], [y], s=60 + 840 * arm.vram_bytes / largest, color=colour, alpha=0.8)
            axes.annotate(arm.arm.name, (x, y), xytext=(18, 0), textcoords="offset points", va="center", color=_INK)
        axes.margins(0.35)
        axes.xaxis.set_major_formatter(lambda s, _: format_seconds(max(s, 0.0)))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.set_xlabel("median time of a call")
        axes.set_ylabel(metric.name)
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.6)

    return _draw(9.6, 3.4, "quality against latency", draw)


def timeline(result: Comparison) -> str:
    """Where the comparison's own time went: the calls of each arm, and what was spent to bring models up."""
    lanes = [arm.name for arm in result.plan.arms]

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.2, 0.24, 0.78, 0.72))
        for lane, (arm, colour) in enumerate(zip(result.plan.arms, _colours(result).values(), strict=True)):
            spans = _merged([r for r in result.entries if isinstance(r, Run) and r.arm == arm.name], result.elapsed_s)
            axes.broken_barh(spans, (lane - 0.35, 0.7), color=colour, linewidth=0)
            waits = [(a.start_s, a.seconds) for a in result.arrivals if a.model == arm.model]
            axes.broken_barh(waits, (lane - 0.45, 0.9), facecolor="none", edgecolor=_INK, linewidth=0.8)
        axes.set(yticks=range(len(lanes)), xlim=(0, max(result.elapsed_s, 1e-9)), ylim=(len(lanes) - 0.4, -0.6))
        axes.set_yticklabels(lanes, color=_INK)
        axes.xaxis.set_major_formatter(lambda s, _: format_seconds(max(s, 0.0)))
        axes.tick_params(labelsize=8)

    return _draw(9.6, 0.55 * len(lanes) + 0.7, "timeline", draw)


def _merged(runs: Sequence[Run], whole_s: float) -> list[tuple[float, float]]:
    """Spans of calls; those closer than a pixel to each other are one."""
    spans: list[tuple[float, float]] = []
    for run in runs:
        seconds = sum(run.seconds.values())
        if spans and run.start_s - sum(spans[-1]) < whole_s / 1000:
            spans[-1] = (spans[-1][0], run.start_s + seconds - spans[-1][0])
        else:
            spans.append((run.start_s, seconds))
    return spans


def _colours(result: Comparison) -> dict[str, str]:
    return {arm.name: _colour(i) for i, arm in enumerate(result.plan.arms)}


def _thinned(values: Sequence[Any]) -> list[Any]:
    """At most `_MOST_POINTS` of them, evenly."""
    if len(values) <= _MOST_POINTS:
        return list(values)
    return [values[i * (len(values) - 1) // (_MOST_POINTS - 1)] for i in range(_MOST_POINTS)]

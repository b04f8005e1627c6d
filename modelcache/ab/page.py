"""The report: one HTML file with the verdicts, the plots and the largest disagreements. Nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from modelcache import format_bytes, format_seconds
from modelcache.ab import plots
from modelcache.ab.comparison import Comparison
from modelcache.ab.metrics import FAILURES, Metric
from modelcache.ab.table import fine_print, p_words
from modelcache.ab.verdicts import Judgement, Verdict
from modelcache.page_style import page_colour, style_sheet

#: Items shown side by side.
_NUM_DISAGREEMENTS = 10
_STYLE = """
svg{display:block;width:100%;max-width:960px;height:auto}.pair{display:grid;gap:8px;
grid-template-columns:repeat(auto-fit,minmax(240px,1fr))}.pair>div{border-left:4px solid var(--c);padding-left:10px}
.tag{display:inline-block;border:1px solid currentColor;border-radius:4px;padding:0 7px;font-weight:600;
white-space:nowrap}
.better{color:var(--good)}.worse{color:var(--bad)}.same{color:var(--dim)}figure{margin:8px 0}
figcaption{color:var(--dim);margin:2px 0 10px}
"""
_CLASSES = {Verdict.BETTER: "better", Verdict.NO_WORSE: "better", Verdict.WORSE: "worse", Verdict.CANNOT_TELL: "same"}


def write_page(path: Path, result: Comparison) -> None:
    """Write the report of a comparison."""
    title = " vs ".join(arm.name for arm in result.plan.arms)
    body = "".join([_head(result, title), _verdicts(result), *_plots(result), _disagreements(result), _arms(result)])
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style_sheet()}{_STYLE}</style></head><body>{body}</body></html>\n",
        encoding="utf-8",
        # Half a character, as a tokenizer may give, is no reason to have no report.
        errors="replace",
    )


def _head(result: Comparison, title: str) -> str:
    keys = "".join(
        f'<span style="--c:{page_colour(i)}">{escape(arm.arm.name)} {format_bytes(arm.vram_bytes)}</span>'
        for i, arm in enumerate(result.arms)
    )
    sentences = "".join(f"<p>{escape(one.sentence)}.</p>" for one in result.judgements if _is_primary(result, one))
    return (
        f'<h1>{escape(title)}</h1><p class="dim">{escape(result.ends)}; the others are compared with '
        f"{escape(result.plan.arms[0].name)}</p>"
        f'<div class="key">{keys}</div>{sentences}'
    )


def _is_primary(result: Comparison, one: Judgement) -> bool:
    return one.differences.metric.name in result.plan.primary


def _verdicts(result: Comparison) -> str:
    rows = "".join(map(_verdict_row, result.judgements))
    heads = "".join(
        f"<th{' class=n' if numeric else ''}>{word}</th>"
        for word, numeric in (
            ("arm", 0),
            ("metric", 0),
            ("difference", 1),
            ("interval", 1),
            ("p", 1),
            ("detectable", 1),
            ("n", 1),
            ("verdict", 0),
        )
    )
    return (
        f'<h2>Verdicts</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f'<p class="dim">{escape(fine_print(result))}</p>'
    )


def _verdict_row(one: Judgement) -> str:
    metric = one.differences.metric
    numbers = (
        metric.change(one.mean),
        f"{metric.change(one.interval.low)} .. {metric.change(one.interval.high)}",
        p_words(one),
        metric.amount(one.detectable),
        f"{len(one.differences.values)} {one.differences.unit}s",
    )
    cells = "".join(f'<td class="n">{escape(number)}</td>' for number in numbers)
    tag = f'<span class="tag {_CLASSES[one.verdict]}">{escape(str(one.verdict))}</span>'
    return f"<tr><td>{escape(one.differences.arm)}</td><td>{escape(metric.name)}</td>{cells}<td>{tag}</td></tr>"


def _plots(result: Comparison) -> Sequence[str]:
    scores, (latency, *_) = result.plan.scores, result.plan.times
    if not result.num_items:
        return ["<h2>Plots</h2><p>No item was answered by every arm yet.</p>"]
    margin = "; dotted, the margin" if any(one.differences.metric.margin for one in result.judgements) else ""
    drawn = [
        _section(
            f"Differences from {result.plan.arms[0].name}",
            plots.forest(result),
            f"Mean and interval; the line is no difference{margin}. Each row has its own scale.",
        ),
        _section(
            "Time",
            plots.latencies(result),
            "Left: calls that count, model in place. Right: models brought up for a block, and the first load.",
        ),
    ]
    drawn += (
        _section(
            f"Item by item: {metric.name}",
            plots.scatter(result, metric),
            f"Each point is an item; on the line both are the same. {metric.better.capitalize()} is better.",
        )
        for metric in (*scores[:2], latency)
    )
    if scores:
        words = "The larger the disc, the more memory the arm's model takes."
        drawn.append(_section("Quality against time", plots.quality_against_latency(result, scores[0]), words))
    drawn.append(
        _section(
            "Where the comparison's own time went",
            plots.timeline(result),
            f"Filled: calls. Outlined: waiting for the model. {result.residency}.",
        )
    )
    return drawn


def _section(heading: str, svg: str, words: str) -> str:
    return f"<h2>{escape(heading)}</h2><figure>{svg}<figcaption>{escape(words)}</figcaption></figure>"


def _disagreements(result: Comparison) -> str:
    if not result.plan.scores or not result.num_items:
        return ""
    metric = result.plan.scores[0]
    shown = "".join(_disagreement(result, metric, item) for item in result.disagreements(metric)[:_NUM_DISAGREEMENTS])
    return f"<h2>The largest disagreements, by {escape(metric.name)}</h2>{shown}"


def _disagreement(result: Comparison, metric: Metric, item: int) -> str:
    words = result.items[item] if item < len(result.items) else f"item {item}"
    sides = "".join(
        f'<div style="--c:{page_colour(i)}"><span class="dim">{escape(arm.name)}, '
        f"{escape(_score(result, metric, arm.name, item))}"
        f"</span><pre>{escape(result.output_of(arm.name, item))}</pre></div>"
        for i, arm in enumerate(result.plan.arms)
    )
    return f'<p><span class="dim">item {item}:</span> {escape(words)}</p><div class="pair">{sides}</div>'


def _score(result: Comparison, metric: Metric, arm: str, item: int) -> str:
    value = result.value(metric, arm, item)
    return "-" if value is None else metric.number(value)


def _arms(result: Comparison) -> str:
    metrics = [m for m in result.plan.metrics if m.name != FAILURES]
    heads = ("calls", "failed", *(m.name for m in metrics), "first load", "switch", "switches", "memory")
    head = "<th>arm</th>" + "".join(f'<th class="n">{escape(word)}</th>' for word in heads)
    rows = ""
    for arm in result.arms:
        switch = format_seconds(sum(arm.switch_s) / len(arm.switch_s)) if arm.switch_s else "-"
        cells = (
            str(arm.num_calls),
            str(arm.num_failed),
            *(m.number(arm.means[m.name]) if m.name in arm.means else "-" for m in metrics),
            "-" if arm.cold_s is None else format_seconds(arm.cold_s),
            switch,
            str(len(arm.switch_s)),
            format_bytes(arm.vram_bytes),
        )
        rows += (
            f"<tr><td>{escape(arm.arm.name)}</td>" + "".join(f'<td class="n">{escape(c)}</td>' for c in cells) + "</tr>"
        )
    errors = "".join(f"<p>{escape(text)}</p>" for text in result.error_lines)
    return (
        f'<h2>The arms</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{errors}"
        f'<p class="dim">Seed {result.plan.seed}; modelcache {escape(result.plan.version)}. Scores are means, times '
        "medians. Times of a call do not include bringing its model up.</p>"
    )

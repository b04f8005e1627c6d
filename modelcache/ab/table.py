"""The result on a terminal: the arms, the verdicts, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelcache import format_bytes, format_seconds
from modelcache.ab.comparison import Comparison
from modelcache.ab.metrics import FAILURES
from modelcache.ab.verdicts import Judgement, Verdict

_STYLES = {Verdict.BETTER: "green", Verdict.WORSE: "red", Verdict.NO_WORSE: "cyan", Verdict.CANNOT_TELL: "yellow"}
_WIDTH = 132


def as_text(result: Comparison) -> str:
    """The table without colours."""
    out = StringIO()
    print_table(result, out)
    return out.getvalue().rstrip("\n")


def print_table(result: Comparison, stream: IO[str]) -> None:
    """Write the table."""
    console = Console(file=stream, width=None if stream.isatty() else _WIDTH, highlight=False)
    console.print(Text(f"{' vs '.join(arm.name for arm in result.plan.arms)}: {result.ends}", "bold"))
    console.print(_arms(result))
    console.print(verdict_table(result.judgements))
    for one in result.judgements:
        console.print(Text(one.sentence + "."))
    for line in result.error_lines:
        console.print(Text(line, "red"))
    console.print(Text(fine_print(result), "dim"))


def fine_print(result: Comparison) -> str:
    """How to read it."""
    level = f"{100 * (1 - result.plan.level):g} %"
    how = (
        "Intervals and p-values hold however often the run was looked at (confidence sequences)."
        if result.is_peeked
        else "Intervals: BCa bootstrap; p-values: flipped signs, corrected for all comparisons (Holm)."
    )
    if not result.is_finished and not result.plan.stops_early:
        how += " They are wider than those of all items will be: the run is unfinished."
    if len(result.plan.groups) > 1:
        how += (
            " Arms that do not fit together ran in turns: their times are compared by pairs of blocks, and what ran "
            "beside them differs."
        )
    return f"{result.residency}. {result.plan.reach}. {how} Intervals are {level}; seed {result.plan.seed}."


def new_table(*headings: str) -> Table:
    """A table without lines; a leading ``>`` aligns a column to the right. Names are taken literally."""
    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for heading in headings:
        drawn.add_column(
            Text(heading.removeprefix(">").upper()), justify="right" if heading[0] == ">" else "left", overflow="fold"
        )
    return drawn


def _arms(result: Comparison) -> Table:
    metrics = [m for m in result.plan.metrics if m.name != FAILURES]
    drawn = new_table("arm", ">calls", ">failed", *(f">{m.name}" for m in metrics), ">first load", ">switch", ">memory")
    for arm in result.arms:
        means = [m.number(arm.means[m.name]) if m.name in arm.means else "-" for m in metrics]
        switch = format_seconds(sum(arm.switch_s) / len(arm.switch_s)) if arm.switch_s else "-"
        cold = "-" if arm.cold_s is None else format_seconds(arm.cold_s)
        drawn.add_row(
            Text(arm.arm.name),
            str(arm.num_calls),
            str(arm.num_failed),
            *means,
            cold,
            switch,
            format_bytes(arm.vram_bytes),
        )
    return drawn


def verdict_table(judgements: Sequence[Judgement]) -> Table:
    """One row a verdict."""
    drawn = new_table("arm", "metric", ">difference", ">interval", ">p", ">detectable", ">n", "verdict")
    for one in judgements:
        metric = one.differences.metric
        drawn.add_row(
            Text(one.differences.arm),
            Text(metric.name),
            Text(metric.change(one.mean)),
            Text(f"{metric.change(one.interval.low)} .. {metric.change(one.interval.high)}"),
            p_words(one),
            Text(metric.amount(one.detectable)),
            f"{len(one.differences.values)} {one.differences.unit}s",
            Text(str(one.verdict), _STYLES[one.verdict]),
        )
    return drawn


def p_words(one: Judgement) -> str:
    """The corrected p-value in words."""
    return "<0.001" if one.adjusted_p < 0.001 else f"{one.adjusted_p:.3f}"

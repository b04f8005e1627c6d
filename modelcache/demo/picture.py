"""The measured switches as one drawing that stands alone: light and dark, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from modelcache import format_bytes, format_seconds
from modelcache.demo.records import Budgets, Outcome, Title, quantile
from modelcache.demo.timeline import INK, WIDTH, draw
from modelcache.demo.variants import Workload
from modelcache.page_style import colours

_MARGIN, _NAME, _BAR = 20, 220, 480
_ROW, _THICK = 30, 16


def write_picture(path: Path, title: Title, workload: Workload, budgets: Budgets, outcomes: Sequence[Outcome]) -> None:
    """Write how long the same requests waited for their models each way, and what was where with the cache.

    Args:
        path: The file, SVG.
        title: Which weights these are, on which device.
        workload: The models, whose order is that of their colours.
        budgets: Of the cache.
        outcomes: The runs of the trace, delete-and-reload first, then the cache.
    """
    heading = (
        f"{len(workload.names)} models share {format_bytes(budgets.vram_bytes)} of VRAM and "
        f"{format_bytes(budgets.ram_bytes)} of RAM: {len(outcomes[0].served)} requests, "
        f"{len(outcomes[0].switch_s)} switches"
    )
    below = f"{title.weights}; {title.device}{title.mark}. Bars: time spent waiting for models."
    pieces = [_text(0, 18, heading, "head"), _text(0, 40, below)]
    y = 58.0
    for outcome in outcomes:
        pieces.append(_row(outcome, max(each.waited_s for each in outcomes), y))
        y += _ROW
    y += 14
    for index, name in enumerate(workload.names):
        x = index * (WIDTH / max(len(workload.names), 1))
        pieces.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="12" height="12" rx="3" fill="var(--m{index})"/>')
        pieces.append(_text(x + 18, y + 11, name))
    y += 22
    cached = outcomes[1]
    drawn, height = draw(cached, workload.names, budgets, has_tips=False)
    pieces.append(f'<g transform="translate(0 {y:.0f})">{drawn}</g>')
    width, height = WIDTH + 2 * _MARGIN, y + height + 2 * _MARGIN
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(heading)}"><style>{colours()}{INK}'
        "svg text.head{fill:var(--fg);font-size:17px;font-weight:600}</style>"
        f'<rect width="100%" height="100%" fill="var(--bg)"/>'
        f'<g transform="translate({_MARGIN} {_MARGIN})">{"".join(pieces)}</g></svg>\n',
        encoding="utf-8",
    )


def _row(outcome: Outcome, longest_s: float, y: float) -> str:
    width = max(1.0, _BAR * outcome.waited_s / max(longest_s, 1e-9))
    middle = format_seconds(quantile(outcome.switch_s, 0.5))
    bar = f'<rect x="{_NAME}" y="{y:.0f}" width="{width:.1f}" height="{_THICK}" rx="3" fill="var(--m0)"/>'
    words = f"{format_seconds(outcome.waited_s)} in all, {middle} for the median switch"
    return _text(0, y + 13, outcome.title, "name") + bar + _text(_NAME + width + 10, y + 13, words)


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{escape(words)}</text>'

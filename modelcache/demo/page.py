"""The page the demo writes: one file, nothing from the network, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from modelcache import format_bytes, format_seconds
from modelcache.demo.records import Budgets, Check, Outcome, Rescue, Title
from modelcache.demo.report import FINE_PRINT, comparison
from modelcache.demo.timeline import INK, timeline
from modelcache.demo.variants import Workload
from modelcache.page_style import style_sheet

_STYLE = """
.bar{height:14px;border-radius:3px;background:var(--m0);min-width:2px}
svg{display:block;width:100%;min-width:760px;height:auto}
svg .piece:hover,svg .area:hover{opacity:.7}
#tip{position:fixed;pointer-events:none;background:var(--fg);color:var(--bg);font-size:13px;padding:4px 8px;
border-radius:5px;max-width:360px;display:none;z-index:2}
"""
# Says what is under the pointer; the tables have the same figures for whoever runs no scripts.
_SCRIPT = """
const tip=document.getElementById('tip');
document.addEventListener('mousemove',e=>{const t=e.target.closest('[data-tip]');
if(!t){tip.style.display='none';return}
tip.textContent=t.dataset.tip;tip.style.display='block';
tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+'px';tip.style.top=(e.clientY+16)+'px'});
"""


def write_page(
    path: Path,
    title: Title,
    workload: Workload,
    sizes: Mapping[str, int],
    budgets: Budgets,
    rescued: Rescue,
    outcomes: Sequence[Outcome],
    checks: Sequence[Check],
) -> None:
    """Write the page.

    Args:
        path: The file.
        title: Which weights these are, on which device.
        workload: The models, whose order is that of their colours.
        sizes: Bytes of each model.
        budgets: Of the cache.
        rescued: The dispatched model.
        outcomes: The runs of the trace, delete-and-reload first.
        checks: Everything the demo claims.
    """
    sections = [
        _head(title, workload, sizes, budgets, checks),
        _rescue(rescued, title),
        _comparison(outcomes, title),
        *(_timeline(outcome, workload, budgets, title) for outcome in outcomes),
        _checks(checks, title),
    ]
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title.line)}</title><style>{style_sheet()}{INK}{_STYLE}</style></head><body>"
        + "".join(sections)
        + f'<div id="tip"></div><script>{_SCRIPT}</script></body></html>\n',
        encoding="utf-8",
    )


def _heading(words: str, title: Title) -> str:
    return f"<h2>{escape(words + title.mark)}</h2>"


def _timeline(outcome: Outcome, workload: Workload, budgets: Budgets, title: Title) -> str:
    words = "what was where" if outcome.samples else "the requests"
    return _heading(f"{outcome.title}: {words}", title) + timeline(outcome, workload.names, budgets)


def _head(title: Title, workload: Workload, sizes: Mapping[str, int], budgets: Budgets, checks: Sequence[Check]) -> str:
    failed = sum(not check.holds for check in checks)
    verdict = (
        f'<span class="good">all {len(checks)} checks passed</span>'
        if not failed
        else f'<span class="bad">{failed} of {len(checks)} checks failed</span>'
    )
    keys = "".join(
        f'<span style="--c:var(--m{i})">{escape(name)} {format_bytes(sizes[name])}</span>'
        for i, name in enumerate(workload.names)
    )
    return (
        f"<h1>modelcache demo{escape(title.mark)}</h1>"
        f'<p class="dim">{escape(title.weights)}; {escape(title.device)}</p>'
        f"<p>{verdict}</p>"
        f"<p>{len(workload.names)} models share {format_bytes(budgets.vram_bytes)} of VRAM and "
        f"{format_bytes(budgets.ram_bytes)} of RAM: room for the two largest up there, and for the four largest below."
        "</p>"
        f'<div class="key">{keys}</div>'
    )


def _rescue(rescued: Rescue, title: Title) -> str:
    # The first two checks are the errors themselves, shown above the table.
    rows = "".join(_check_row(check) for check in rescued.checks[2:])
    return (
        _heading("A model that accelerate had split", title)
        + f"<p>{rescued.num_meta} of its tensors were on the meta device, their data on disk. Moving it failed:</p>"
        f'<pre>model.to("cpu")  {escape(rescued.to_error)}</pre><pre>model.cpu()      {escape(rescued.cpu_error)}</pre>'
        f"<p>Materialized, it moves, parks and comes back ({format_bytes(rescued.size_bytes)}; all of this took "
        f"{format_seconds(rescued.seconds)}):</p><table><tbody>{rows}</tbody></table>"
    )


def _comparison(outcomes: Sequence[Outcome], title: Title) -> str:
    headings, rows = comparison(outcomes)
    head = "".join(f'<th class="{"n" if i else ""}">{escape(text)}</th>' for i, text in enumerate(headings))
    body = "".join(
        "<tr>" + "".join(f'<td class="{"n" if i else ""}">{escape(cell)}</td>' for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        _heading("The same requests, three ways", title)
        + f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        + f'<p class="dim">{escape(FINE_PRINT)}</p>'
        + _bars("Time spent waiting for models", outcomes, [o.waited_s for o in outcomes], format_seconds)
        + _bars("Bytes moved", outcomes, [float(o.moved_bytes) for o in outcomes], lambda size: format_bytes(int(size)))
    )


def _bars(caption: str, outcomes: Sequence[Outcome], numbers: Sequence[float], words: object) -> str:
    assert callable(words)
    largest = max([*numbers, 1e-9])
    rows = "".join(
        f'<tr><td style="width:230px">{escape(outcome.title)}</td>'
        f'<td><div class="bar" style="width:{100 * number / largest:.1f}%"></div></td>'
        f'<td class="n" style="width:110px">{escape(words(number))}</td></tr>'
        for outcome, number in zip(outcomes, numbers, strict=True)
    )
    return f'<p class="dim" style="margin-top:16px">{escape(caption)}</p><table><tbody>{rows}</tbody></table>'


def _checks(checks: Sequence[Check], title: Title) -> str:
    rows = "".join(_check_row(check) for check in checks)
    return f"{_heading('Checks', title)}<table><tbody>{rows}</tbody></table>"


def _check_row(check: Check) -> str:
    mark = '<td class="good">✓</td>' if check.holds else '<td class="bad">✗</td>'
    return f"<tr>{mark}<td>{escape(check.claim)}</td><td>{escape(check.number)}</td></tr>"

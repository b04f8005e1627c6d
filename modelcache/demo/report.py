"""The final report on standard output: the comparison, and the table of checks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelcache import format_bytes, format_seconds
from modelcache.demo.records import Check, Outcome, Title, quantile

_PIPE_WIDTH = 160
FINE_PRINT = (
    "Each run answers the same requests on the same device. A switch is measured from asking for the model until it is "
    "usable. Loads read from the disk: before each, the weights are dropped from the system's page cache."
)


def comparison(outcomes: Sequence[Outcome]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: each run next to the others."""
    headings = ("", *(outcome.title for outcome in outcomes))
    rows = [
        ("found in VRAM / RAM / disk", *("{vram} / {ram} / {disk}".format(**o.hits) for o in outcomes)),
        ("switches to another model", *(str(len(o.switch_s)) for o in outcomes)),
        ("switch, p50", *(format_seconds(quantile(o.switch_s, 0.5)) for o in outcomes)),
        ("switch, p95", *(format_seconds(quantile(o.switch_s, 0.95)) for o in outcomes)),
        ("waited for models", *(format_seconds(o.waited_s) for o in outcomes)),
        ("whole run", *(format_seconds(o.seconds) for o in outcomes)),
        ("read from disk", *(format_bytes(o.link_bytes.get("disk to ram", 0)) for o in outcomes)),
        ("moved to VRAM", *(format_bytes(o.link_bytes.get("ram to vram", 0)) for o in outcomes)),
        ("moved in all", *(format_bytes(o.moved_bytes) for o in outcomes)),
    ]
    return headings, rows


def print_report(title: Title, outcomes: Sequence[Outcome], checks: Sequence[Check]) -> None:
    """Write both tables to standard output."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    headings, rows = comparison(outcomes)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0), title=None)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(Text(title.line, "bold"))
    console.print()
    console.print(Text(f"The same requests, three ways{title.mark}", "bold"))
    console.print(table)
    console.print(Text(FINE_PRINT, "dim"))
    console.print()
    listing = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    listing.add_column("")
    listing.add_column("check", overflow="fold")
    listing.add_column("number", overflow="fold")
    for check in checks:
        mark = Text("✓", "green") if check.holds else Text("✗", "bold red")
        listing.add_row(mark, Text(check.claim), Text(check.number))
    console.print(Text(f"Checks{title.mark}", "bold"))
    console.print(listing)
    console.print()
    num_failed = sum(not check.holds for check in checks)
    verdict = "all checks passed" if not num_failed else f"checks failed: {num_failed}"
    console.print(
        Text(f"{verdict} ({len(checks) - num_failed} of {len(checks)})", "green" if not num_failed else "red")
    )

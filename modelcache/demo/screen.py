"""What the demo shows while it runs, on standard error: a live view on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from modelcache import format_bytes
from modelcache.page_style import terminal_colour

if TYPE_CHECKING:
    from modelcache import CacheStats

_LINES_PER_RUN = 4
_REDRAW_S = 0.1
_BAR_WIDTH = 52
# Without a terminal there is no width to keep to.
_PIPE_WIDTH = 200


class Screen:
    """Standard error, for people."""

    def __init__(self) -> None:
        is_terminal = sys.stderr.isatty()
        self._console = Console(file=sys.stderr, width=None if is_terminal else _PIPE_WIDTH, highlight=False)
        self._began_s = time.perf_counter()

    def say(self, text: str, style: str = "") -> None:
        """One line, with the seconds since the start."""
        self._console.print(Text(f"{time.perf_counter() - self._began_s:6.1f} s  ", "dim") + Text(text, style))

    def act(self, title: str) -> None:
        """A heading."""
        self.say(title, "bold")

    @contextmanager
    def run(self, title: str, total: int) -> Iterator[RunView]:
        """The view of one run of `total` requests."""
        if not self._console.is_terminal:
            yield RunView(self, title, total, None)
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            yield RunView(self, title, total, live)


class RunView:
    """One run: how many requests are done, and where the models are."""

    def __init__(self, screen: Screen, title: str, total: int, live: Live | None) -> None:
        self._screen, self._title, self._total, self._live = screen, title, total, live
        self._done = 0
        self._stats: CacheStats | None = None
        self._drawn_s = 0.0

    def show(self, stats: CacheStats) -> None:
        """The cache as it is now; called from the thread that watches it."""
        self._stats = stats
        self._draw()

    def tell(self, done: int) -> None:
        """So many requests are done."""
        self._done = done
        every = max(1, self._total // _LINES_PER_RUN)
        if self._live is None:
            if done % every == 0 or done == self._total:
                self._screen.say(f"  {self._title}: {done} of {self._total} requests{self._counts()}")
        elif self._stats is None:
            self._draw()

    def _counts(self) -> str:
        if self._stats is None:
            return ""
        hits = self._stats.counters
        tiers = ", ".join(
            f"{tier.tier} {format_bytes(tier.resident_bytes)} of {format_bytes(tier.budget_bytes)}"
            for tier in self._stats.tiers
            if tier.budget_bytes
        )
        return f"; found in vram {hits.vram_hits}, ram {hits.ram_hits}, disk {hits.disk_hits}; {tiers}"

    def _draw(self) -> None:
        now_s = time.perf_counter()
        if self._live is None or now_s - self._drawn_s < _REDRAW_S:
            return
        self._drawn_s = now_s
        lines: list[RenderableType] = [_progress(self._done, self._total)]
        if self._stats is not None:
            lines += [_bars(self._stats), _legend(self._stats), Text(self._counts().removeprefix("; "), "dim")]
        self._live.update(Panel(Group(*lines), title=self._title, title_align="left", width=88), refresh=True)


def _progress(done: int, total: int) -> Text:
    filled = _BAR_WIDTH * done // max(1, total)
    return Text.assemble(
        ("requests  ", "bold"),
        ("━" * filled, "green"),
        ("━" * (_BAR_WIDTH - filled), "bright_black"),
        f"  {done}/{total}",
    )


def _bars(stats: CacheStats) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for tier in stats.tiers:
        held = [int(getattr(model, f"{tier.tier}_bytes")) for model in stats.models]
        # Image files take what they take; their budget is far away and would leave an empty bar.
        whole = tier.budget_bytes if str(tier.tier) != "disk" else max(sum(held), sum(_sizes(stats)), 1)
        bar, used = Text(), 0
        for i, size in enumerate(held):
            cells = round(_BAR_WIDTH * size / whole) if whole else 0
            cells = min(max(cells, 1 if size else 0), _BAR_WIDTH - used)
            bar.append("█" * cells, terminal_colour(i))
            used += cells
        bar.append("░" * (_BAR_WIDTH - used), "bright_black")
        table.add_row(Text(f"{str(tier.tier).upper():8}", "bold"), bar, format_bytes(sum(held)))
    return table


def _sizes(stats: CacheStats) -> list[int]:
    return [model.size_bytes or 0 for model in stats.models]


def _legend(stats: CacheStats) -> Text:
    legend = Text()
    for i, model in enumerate(stats.models):
        # Joined by a space that no line breaks at.
        legend.append("■\N{NO-BREAK SPACE}", terminal_colour(i))
        legend.append(model.name, "bold" if model.num_leases else "")
        legend.append("  ")
    return legend

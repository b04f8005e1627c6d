"""A bar for what takes longer than two seconds: bytes and GiB/s, on a terminal or in a notebook, and nowhere else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Loads and moves shorter than this show nothing.
QUIET_S = 2.0


def has_audience() -> bool:
    """Somebody sees standard error live: a terminal, or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ProgressBars:
    """Told how far loads and moves are, from worker threads; one bar for each that lasts.

    Args:
        now_s: A clock.
        watched: Whether anybody looks.
    """

    def __init__(self, now_s: Callable[[], float], watched: Callable[[], bool] = has_audience) -> None:
        self._now_s = now_s
        self._watched = watched
        self._lock = threading.Lock()
        self._started: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bars: Progress | None = None

    def __call__(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Note how far `name` is; the last call of a move has done it all."""
        with self._lock:
            now_s = self._now_s()
            started_s = self._started.setdefault(name, now_s)
            if done_bytes >= total_bytes:
                self._end(name)
            elif now_s - started_s > QUIET_S and self._watched():
                self._show(name, done_bytes, total_bytes)

    def _show(self, name: str, done_bytes: int, total_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        if self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeElapsedColumn(),
            )
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total_bytes)
        self._bars.update(self._tasks[name], completed=done_bytes, total=total_bytes)

    def _end(self, name: str) -> None:
        self._started.pop(name, None)
        task = self._tasks.pop(name, None)
        if self._bars is not None and task is not None:
            self._bars.remove_task(task)
            if not self._tasks:
                self._bars.stop()
                self._bars = None

    def close(self) -> None:
        """Take every bar away."""
        with self._lock:
            for name in list(self._started):
                self._end(name)

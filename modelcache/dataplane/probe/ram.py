"""How much RAM this process may use: the least of what the host has and what every control group above it allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelcache.dataplane.probe.cgroup import cgroup_limits
from modelcache.dataplane.probe.facts import Figure, Reading, reconcile


class RamProbe:
    """Reads total and available RAM, from psutil and from the whole ancestry of control groups.

    Holds no state between readings: a limit that is lowered at run time is seen by the next one. Any thread may read.
    """

    def __init__(
        self,
        root: str | Path = "/",
        *,
        psutil: Any = None,
        now_s: Callable[[], float] = time.monotonic,
        all_file_cache: bool = False,
    ) -> None:
        """Prepare to read.

        Args:
            root: Where ``/proc`` and the control groups are found.
            psutil: A module like `psutil`; the real one when left out.
            now_s: The clock of the readings.
            all_file_cache: Count the file cache of a control group as free that was used again lately, as the kernel
                does for the machine; else only the rest of it.
        """
        if psutil is None:
            import psutil
        self._root = Path(root)
        self._psutil = psutil
        self._now_s = now_s
        self._all_file_cache = all_file_cache

    def read(self, *, ours_bytes: int | None = None) -> Reading:
        """Measure now.

        Args:
            ours_bytes: What this process holds; its resident set when left out.
        """
        at_s = self._now_s()
        host = self._psutil.virtual_memory()
        figures = [
            Figure("total", int(host.total), "psutil", at_s),
            Figure("free", int(host.available), "psutil", at_s),
        ]
        for limit in cgroup_limits(self._root, all_file_cache=self._all_file_cache):
            figures.append(Figure("limit", limit.limit_bytes, limit.source, at_s))
            if limit.available_bytes is not None:
                figures.append(Figure("free", limit.available_bytes, limit.source, at_s))
        if ours_bytes is None:
            ours_bytes = int(self._psutil.Process().memory_info().rss)
        return reconcile(tuple(figures), ours_bytes, at_s)

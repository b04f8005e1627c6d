"""Watches a cache from outside while it serves: samples of its tiers, and what its events and log lines say."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from modelcache.demo.records import TIERS, Sample

if TYPE_CHECKING:
    from modelcache import CacheStats, ModelCache, MoveEvent

_EVERY_S = 0.02
#: Lines of other kinds, such as the budgets at the start, have no reason.
_MOVE_LINE = "reason="


class Watch:
    """Samples a cache every 20 ms and at each of its moves, on a thread of its own, until it is stopped.

    Args:
        cache: To look at; looking is never a use.
        names: Of its models.
        allocated_bytes: What the device says is held on it.
        show: Is given each snapshot, for people.
    """

    def __init__(
        self,
        cache: ModelCache,
        names: tuple[str, ...],
        allocated_bytes: Callable[[], int],
        show: Callable[[CacheStats], None],
    ) -> None:
        self.began_s = time.perf_counter()
        self.num_told = 0
        self._cache, self._names, self._allocated, self._show = cache, names, allocated_bytes, show
        self._samples: list[Sample] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._end = cache.on("move", self._told)
        self._thread = threading.Thread(target=self._watch, name="demo-watch", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[Sample, ...]:
        """End it; the samples in order of time, repetitions left out."""
        self._stopped.set()
        self._thread.join()
        self._end()
        self._look()
        kept: list[Sample] = []
        for sample in sorted(self._samples, key=lambda sample: sample.at_s):
            if not kept or _differs(sample, kept[-1]):
                kept.append(sample)
        return (*kept, self._samples[-1])

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_S):
            self._show(self._look())

    def _told(self, event: MoveEvent) -> None:
        del event
        self.num_told += 1
        self._look()

    def _look(self) -> CacheStats:
        with self._lock:
            stats = self._cache.status()
            models = {model.name: model for model in stats.models}
            held = {tier: tuple(int(getattr(models[name], f"{tier}_bytes")) for name in self._names) for tier in TIERS}
            charged = {
                str(tier.tier): tier.resident_bytes + tier.reserved_bytes + tier.draining_bytes for tier in stats.tiers
            }
            now_s = time.perf_counter() - self.began_s
            self._samples.append(Sample(now_s, held, charged["vram"], charged["ram"], self._allocated()))
        return stats


def _differs(one: Sample, other: Sample) -> bool:
    return (one.held, one.vram_charged_bytes, one.ram_charged_bytes, one.allocated_bytes) != (
        other.held,
        other.vram_charged_bytes,
        other.ram_charged_bytes,
        other.allocated_bytes,
    )


class MoveLines(logging.Handler):
    """Counts the log lines about moves, and lets none of them through to the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.num_lines = 0
        self._log = logging.getLogger("modelcache")
        self._level, self._propagates = self._log.level, self._log.propagate

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record if it is about a move."""
        self.num_lines += _MOVE_LINE in record.getMessage()

    def __enter__(self) -> MoveLines:
        self._log.setLevel(logging.INFO)
        self._log.propagate = False
        self._log.addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._log.removeHandler(self)
        self._log.propagate = self._propagates
        self._log.setLevel(self._level)

"""The memory under the tiers, read again and again while a cache runs, and what happens when a source vanishes.

A limit that can no longer be read is not a limit that is gone: the last figures are handed out again, with the reason
why there are no newer ones, and the reader must not act on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcache.dataplane.probe.facts import Figure, Reading, Unavailable, reconcile
from modelcache.dataplane.probe.machine import cuda_figures
from modelcache.dataplane.probe.pressure import Stalls, stalls
from modelcache.dataplane.probe.ram import RamProbe
from modelcache.dataplane.probe.vram import VramProbe
from modelcache.stats import MemoryReading
from modelcache.tier import Tier

if TYPE_CHECKING:
    from modelcache.dataplane.device.protocol import Device

# Beside a limit, the file that says what is used below it.
_USE_OF = {
    "memory.limit_in_bytes": ("memory.usage_in_bytes",),
    "memory.max": ("memory.current",),
    "memory.high": ("memory.current",),
}
#: A reading of the execution device's memory, or why there is none.
ReadVram = Callable[[], Reading | Unavailable]


def gauge_of(
    device: Device, now_s: Callable[[], float], *, visible: str | None = None, order: str | None = None
) -> MachineGauge:
    """The gauge of the machine that `device` is in.

    Args:
        device: Where models run.
        now_s: The clock of the readings.
        visible: As for `VramProbe`.
        order: As for `VramProbe`.
    """
    if not device.holds_copies:
        return MachineGauge(None, now_s=now_s)
    kind, _, index = device.name.partition(":")
    if kind != "cuda":
        return MachineGauge(lambda: _own_figures(device, now_s()), now_s=now_s)
    number = int(index or 0)
    first = cuda_figures(number)
    probe = VramProbe(
        number,
        uuid=first.uuid if first else None,
        integrated=first.integrated if first else None,
        visible=visible,
        order=order,
        now_s=now_s,
    )

    def read() -> Reading | Unavailable:
        figures = cuda_figures(number)
        if figures is None:
            return probe.read()
        return probe.read(allocator=figures.allocator, driver=figures.driver)

    return MachineGauge(read, now_s=now_s)


def _own_figures(device: Device, at_s: float) -> Reading:
    """What a device without a driver says of itself."""
    figures = (
        Figure("total", device.total_bytes(), device.name, at_s),
        Figure("free", device.free_bytes(), device.name, at_s),
    )
    return reconcile(figures, device.allocated_bytes(), at_s)


class MachineGauge:
    """Reads RAM with the whole ancestry of control groups and stalls, and VRAM as `vram` does. For one thread.

    Args:
        vram: Reads the device; `None` without one of its own memory.
        root: Where ``/proc`` and the control groups are found.
        psutil: As for `RamProbe`.
        now_s: The clock of the readings.
    """

    def __init__(
        self,
        vram: ReadVram | None,
        *,
        now_s: Callable[[], float],
        root: str | Path = "/",
        psutil: Any = None,
    ) -> None:
        self._root = Path(root)
        self._now_s = now_s
        # A group that reads model files fills up with their cache; that is no shortage, whether used once or twice.
        self._ram = RamProbe(root, psutil=psutil, now_s=now_s, all_file_cache=True)
        self._vram = vram
        # The group that the last complete reading was of, what that consisted of, and the reading itself.
        self._group = ""
        self._known: frozenset[tuple[str, str]] = frozenset()
        self._stalled_source = ""
        self._last: dict[Tier, MemoryReading] = {}

    def read(self, tier: Tier) -> MemoryReading | None:
        """Measure now; `None` for a tier whose memory nobody can measure here."""
        if tier is Tier.RAM:
            return self._read_ram()
        if tier is not Tier.VRAM or self._vram is None:
            return None
        try:
            found = self._vram()
        except RuntimeError as error:
            # torch raises this for everything CUDA refuses to say, a lost or poisoned device included.
            found = Unavailable(f"the device does not answer ({error})".splitlines()[0], "restart the process")
        if isinstance(found, Reading) and not found.stale:
            return self._keep(tier, found)
        problem = found if isinstance(found, Unavailable) else found.problem
        return self._old(tier, "no answer" if problem is None else problem.reason)

    def _read_ram(self) -> MemoryReading:
        found, stalled = self._ram.read(), stalls(self._root)
        lost = self._lost(found, stalled)
        if lost:
            return self._old(Tier.RAM, lost)
        reading = self._keep(Tier.RAM, found)
        if stalled is None:
            return reading
        return replace(reading, stalled_percent=stalled.some_percent, stalled_source=stalled.source)

    def _lost(self, found: Reading, stalled: Stalls | None) -> str:
        """Which file of the last complete reading cannot be read any more; empty when none."""
        group, problem = self._text(self._root / "proc/self/cgroup")
        if problem and self._known:
            return problem
        now = frozenset((figure.what, figure.source) for figure in found.figures)
        if group == self._group:
            for _, source in sorted(self._known - now):
                problem = self._unreadable(source)
                if problem:
                    return problem
            if self._stalled_source and self._stalled_source != (stalled.source if stalled else ""):
                _, problem = self._text(self._root / self._stalled_source.lstrip("/"))
                if problem:
                    return problem
        self._group, self._known = group, frozenset(pair for pair in now if pair[1].startswith("/"))
        self._stalled_source = stalled.source if stalled else ""
        return ""

    def _unreadable(self, source: str) -> str:
        """Why a limit is not told any more; empty for a limit that was lifted."""
        limit = self._root / source.split(maxsplit=1)[0].lstrip("/")
        for name in (limit.name, *_USE_OF.get(limit.name, ())):
            _, problem = self._text(limit.with_name(name))
            if problem:
                return problem
        return ""

    def _text(self, path: Path) -> tuple[str, str]:
        try:
            return path.read_text(encoding="utf-8", errors="replace"), ""
        except OSError as error:
            return "", f"/{path.relative_to(self._root)} cannot be read ({error.strerror})"

    def _keep(self, tier: Tier, found: Reading) -> MemoryReading:
        reading = MemoryReading(
            found.total_bytes, found.free_bytes, found.others_bytes, found.free_source or found.source, found.at_s
        )
        self._last[tier] = reading
        return reading

    def _old(self, tier: Tier, problem: str) -> MemoryReading:
        last = self._last.get(tier) or MemoryReading(0, 0, 0, "", self._now_s())
        return replace(last, problem=problem)

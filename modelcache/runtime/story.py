"""What is told of a run: one event per committed move, and a few counts. Written under the driver's lock."""

from __future__ import annotations

from collections.abc import Iterable

from modelcache.core.machine import Machine
from modelcache.core.records import Loading, Part, State
from modelcache.move import Move, Moved, MoveKind
from modelcache.stats import Counters, MoveEvent
from modelcache.tier import Tier


class Story:
    """Counts and events since the start."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(("vram_hits", "ram_hits", "disk_hits", "timeouts", "refusals"), 0)
        self._num_events = 0
        self._asked_ticks = 0
        self._victims: dict[str, dict[str, None]] = {}

    def count(self, what: str) -> None:
        """One more of something."""
        self._counts[what] += 1

    def arrived(self, machine: Machine, names: Iterable[str], wasted_ticks: int) -> None:
        """Somebody asks for leases: count where each model is found."""
        self._asked_ticks += wasted_ticks
        for name in names:
            model = machine.books.models.get(name)
            if model is None:
                continue
            self._asked_ticks += 1
            state = machine.books.state_of(model)
            if state is State.READY:
                self.count("vram_hits")
            elif model.loading is not Loading.LOADED or state in (State.COLD, State.STAGING):
                self.count("disk_hits")
            else:
                self.count("ram_hits")

    def counters(self, drawn_ticks: int) -> Counters:
        """All counts; `drawn_ticks` are leases and those drawn in vain, of which the askers' are known."""
        free_hits = max(0, drawn_ticks - self._asked_ticks)
        counts = self._counts
        return Counters(
            counts["vram_hits"] + free_hits,
            counts["ram_hits"],
            counts["disk_hits"],
            counts["timeouts"],
            counts["refusals"],
        )

    def tell(self, machine: Machine, part: Part, move: Move, moved: Moved, at_s: float, wait_s: float) -> MoveEvent:
        """The event of a move that was just committed."""
        self._num_events += 1
        before, after = part.room(move.before), part.room(move.after)
        source, target, size_bytes = _ends(move, before.vram, after.vram, before.ram, after.ram)
        name = next(iter(part.models), move.part)
        if move.kind in (MoveKind.TRIM, MoveKind.EVICT) and move.on_behalf_of not in (None, name):
            self._victims.setdefault(str(move.on_behalf_of), {})[name] = None
        books = machine.books
        return MoveEvent(
            self._num_events,
            at_s,
            name,
            move.kind,
            source,
            target,
            size_bytes,
            moved.copied_bytes,
            moved.seconds,
            move.reason,
            move.on_behalf_of,
            wait_s if move.kind in (MoveKind.STAGE, MoveKind.PROMOTE) else 0.0,
            books.vram.resident_bytes,
            books.ram.resident_bytes,
        )

    def evicted_for(self, event: MoveEvent) -> tuple[str, ...]:
        """Who was given up for the model that has just come up; told once."""
        if event.kind is not MoveKind.PROMOTE:
            return ()
        return tuple(self._victims.pop(event.model, ()))


def _ends(move: Move, vram: int, vram_after: int, ram: int, ram_after: int) -> tuple[Tier, Tier, int]:
    match move.kind:
        case MoveKind.STAGE:
            return Tier.DISK, Tier.RAM, ram_after - ram
        case MoveKind.PROMOTE:
            return Tier.RAM, Tier.VRAM, vram_after - vram
        case MoveKind.TRIM:
            return Tier.VRAM, Tier.RAM, vram - vram_after
        case MoveKind.SHED:
            return Tier.RAM, Tier.VRAM, ram - ram_after
        case MoveKind.EVICT:
            return (Tier.VRAM if vram else Tier.RAM), Tier.DISK, max(vram, ram)

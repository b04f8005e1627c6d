"""Where the bytes of fakes live: a byte-exact account of each tier, which refuses what may never happen."""

from __future__ import annotations

import threading

from modelcache.core.ledger import Room
from modelcache.tier import Tier


class Oracle:
    """Remembers what broke a promise. A cache may catch the exception; `require_nothing` shows it all the same."""

    def __init__(self) -> None:
        self.violations: list[str] = []

    def refuse(self, what: str) -> AssertionError:
        """Note a broken promise; returns what to raise."""
        self.violations.append(what)
        return AssertionError(what)

    def require_nothing(self) -> None:
        """Assert that no promise was broken."""
        assert not self.violations, "\n".join(self.violations)


class Arena:
    """The memory of one tier.

    Attributes:
        capacity_bytes: More than this is never held; may be changed.
        peak_bytes: The most that was ever held.
    """

    def __init__(self, tier: Tier, capacity_bytes: int, oracle: Oracle) -> None:
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.peak_bytes = 0
        self._oracle = oracle
        self._lock = threading.Lock()
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """What is held now."""
        return self._held_bytes

    def take(self, size_bytes: int, whose: str) -> None:
        """Hold more.

        Raises:
            AssertionError: The budget is exceeded: the ledger let something start whose room was not free.
        """
        with self._lock:
            held = self._held_bytes + size_bytes
            if held > self.capacity_bytes:
                raise self._oracle.refuse(
                    f"{whose} takes {size_bytes} bytes of {self.tier}, where {self._held_bytes} of "
                    f"{self.capacity_bytes} are held"
                )
            self._held_bytes = held
            self.peak_bytes = max(self.peak_bytes, held)

    def give(self, size_bytes: int, whose: str) -> None:
        """Hold less.

        Raises:
            AssertionError: More is given than is held.
        """
        with self._lock:
            if size_bytes > self._held_bytes:
                raise self._oracle.refuse(
                    f"{whose} gives {size_bytes} bytes of {self.tier}, of {self._held_bytes} held"
                )
            self._held_bytes -= size_bytes


class Arenas:
    """One arena for each tier."""

    def __init__(self, *, vram_bytes: int, ram_bytes: int, disk_bytes: int, oracle: Oracle) -> None:
        self.of = {
            Tier.VRAM: Arena(Tier.VRAM, vram_bytes, oracle),
            Tier.RAM: Arena(Tier.RAM, ram_bytes, oracle),
            Tier.DISK: Arena(Tier.DISK, disk_bytes, oracle),
        }

    def take(self, room: Room, whose: str) -> None:
        """Hold more on every tier, or on none."""
        taken: list[Tier] = []
        try:
            for tier, arena in self.of.items():
                arena.take(room.of(tier), whose)
                taken.append(tier)
        except AssertionError:
            for tier in taken:
                self.of[tier].give(room.of(tier), whose)
            raise

    def give(self, room: Room, whose: str) -> None:
        """Hold less on every tier."""
        for tier, arena in self.of.items():
            arena.give(room.of(tier), whose)

    @property
    def held(self) -> Room:
        """What is held now."""
        return Room(*(self.of[tier].held_bytes for tier in (Tier.VRAM, Tier.RAM, Tier.DISK)))

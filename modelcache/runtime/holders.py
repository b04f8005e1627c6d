"""Who holds the open leases of a gate, in words: the thread or task, and where it took the lease if that was noted."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakValueDictionary

from modelcache.core.cycles import name_of
from modelcache.runtime.gate import Gate


class Sited(Protocol):
    """A lease that knows where it was taken."""

    @property
    def site(self) -> str | None:
        """``file:line``, if it was noted."""


class Sites:
    """Where leases were taken. It knows them by their tick, and only for as long as they live."""

    def __init__(self) -> None:
        self._leases: WeakValueDictionary[int, Sited] = WeakValueDictionary()

    def note(self, tick: int, lease: Sited) -> None:
        """Remember a lease."""
        self._leases[tick] = lease

    def holders(self, gate: Gate, *, known: bool = False) -> tuple[str, ...]:
        """One for each open lease; with `known`, leave those out that nobody took yet."""
        return tuple(
            name_of(holder) + self._place(tick)
            for tick, holder in gate.open.copy().items()
            if holder is not None or not known
        )

    def _place(self, tick: int) -> str:
        lease = self._leases.get(tick)
        return f" at {lease.site}" if lease is not None and lease.site is not None else ""

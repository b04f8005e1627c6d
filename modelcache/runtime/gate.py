"""The gate of one model: what a hit touches without the lock."""

from __future__ import annotations


class Gate:
    """Open leases, the tick of the last use, and whether a hit must ask.

    Only the driver closes, opens, watches and limits a gate; callers enter and leave it freely. Both publish first and
    read second: a caller writes its lease, then reads `closed`; the driver writes `closed`, then reads `num_leases`.
    Whichever write came second, its author sees the other, so a model is never taken for idle with a caller inside.
    Likewise a caller takes its lease out, then reads `closed` and `watched`: a driver that still saw it has written one
    of them first (`watched` before it opens, or it reads `num_leases` again) and is told. A refused caller shows for an
    instant: a gate may look busy that is not, and of two callers at a limit of one both may be refused, never let in.

    The hit path has these few steps written out, in the same order: `enter` in `door.FrontDoor.lease` and `first_use`,
    `leave` in `lease.Lease.__exit__`.

    This needs ``open[tick] = x``, ``open.pop`` and ``len(open)`` to be one step each, and every thread to see writes in
    one order. The GIL gives both; a free-threaded build has per-dictionary locks and atomic attribute stores instead.
    """

    __slots__ = ("closed", "limit", "open", "tick", "watched")

    def __init__(self) -> None:
        self.open: dict[int, object] = {}
        self.tick, self.limit = 0, 0
        self.closed, self.watched = True, False

    def enter(self, tick: int, holder: object) -> bool:
        """Take a lease under `tick`; False, and none is taken, if the gate is closed or full: ask the driver."""
        self.open[tick] = holder
        if self.closed or (self.limit and len(self.open) > self.limit):
            self.open.pop(tick, None)
            return False
        self.tick = tick
        return True

    def admit(self, tick: int, holder: object) -> None:
        """Grant a lease although the gate may be closed: the driver's right, under its lock."""
        self.open[tick] = holder
        self.tick = max(self.tick, tick)

    def leave(self, tick: int) -> bool:
        """Give the lease of `tick` up; True for exactly one call of each lease, from any thread."""
        return self.open.pop(tick, self) is not self

    def close(self) -> None:
        """Refuse who comes from now on; read `num_leases` after it."""
        self.closed = True

    def open_(self) -> None:
        """Let hits in without asking."""
        self.closed = False

    @property
    def num_leases(self) -> int:
        """Leases open now."""
        return len(self.open)

    def holders(self) -> tuple[object, ...]:
        """Who holds the open leases, as each said on entering."""
        return tuple(self.open.copy().values())

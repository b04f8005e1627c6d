"""Callers that hold models and wait for each other.

After Habermann's banker's algorithm: whoever could be served if everybody else's leases were returned will return his
own; repeated until nothing changes. Who is left waits for ever.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from modelcache.core.messages import WantLease
from modelcache.core.planner import Plan
from modelcache.core.records import Waiting

if TYPE_CHECKING:
    from modelcache.core.machine import Machine
    from modelcache.core.wants import Wants


def deadlocked(machine: Machine, wants: Wants) -> tuple[Waiting, tuple[str, ...]] | None:
    """The youngest ticket of a set that waits for itself, with the cycle in words; `None` if everybody can be served.

    Only leases of callers who wait themselves are in doubt: anybody else returns his in time. While anything moves,
    nothing can be said.
    """
    if not machine.flights.is_idle or any(w.claims is not None for w in machine.waiting.values()):
        return None
    if machine.loading_names:
        return None
    stuck = [
        w
        for w in machine.waiting.values()
        if isinstance(w.want, WantLease) and w.want.holder is not None and w.blocked_on
    ]
    while True:
        holders = {w.want.holder for w in stuck if isinstance(w.want, WantLease)}
        served = [w for w in stuck if _could_be_served(machine, wants, w, holders)]
        if not served:
            break
        stuck = [w for w in stuck if w not in served]
    if not stuck:
        return None
    return stuck[-1], tuple(_in_words(machine, w) for w in stuck)


def _could_be_served(machine: Machine, wants: Wants, waiting: Waiting, stuck_holders: set[object]) -> bool:
    want = waiting.want
    assert isinstance(want, WantLease)

    def may_take(name: str) -> bool:
        return stuck_holders.isdisjoint(machine.gates[name].holders())

    if wants.is_too_large(want.names):
        return True  # its own step refuses it, or lets it run from its dispatch
    for name in want.names:
        limit = machine.books.models[name].lease_limit
        if limit and sum(holder in stuck_holders for holder in machine.gates[name].holders()) >= limit:
            return False
    needs = wants.needs_up(waiting, want.names, machine.books.top)
    if needs is None:
        return True
    spare = [part.facts.part for part in machine.books.parts_of(want.names)]
    return isinstance(machine.planner.plan(needs, may_take, spare), Plan)


def _in_words(machine: Machine, waiting: Waiting) -> str:
    want = waiting.want
    assert isinstance(want, WantLease)
    held = [name for name in machine.books.models if want.holder in machine.gates[name].holders()]
    holds = " and ".join(repr(name) for name in held) or "nothing"
    return f"{name_of(want.holder)} holds {holds} and waits for {' + '.join(repr(name) for name in want.names)}"


def name_of(holder: object) -> str:
    """A holder for people: the name of a thread or task."""
    target = holder() if isinstance(holder, weakref.ref) else holder
    if hasattr(target, "get_name"):
        return str(target.get_name())
    return str(getattr(target, "name", "a first use" if target is None else target))

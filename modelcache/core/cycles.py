"""Callers that hold models and wait for each other.

After Habermann's banker's algorithm: whoever could be served if everybody else's leases were returned will return his
own; repeated until nothing changes. Who is left waits for ever.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from modelcache.core.ledger import Room
from modelcache.core.messages import WantDown, WantLease, WantRoom
from modelcache.core.planner import Plan
from modelcache.core.records import Waiting
from modelcache.tier import Tier

if TYPE_CHECKING:
    from modelcache.core.machine import Machine
    from modelcache.core.wants import Wants


def deadlocked(machine: Machine, wants: Wants) -> tuple[Waiting, tuple[str, ...]] | None:
    """The youngest ticket of a set that waits for itself, with the cycle in words; `None` if everybody can be served.

    Only leases and room of callers who wait themselves are in doubt: anybody else returns his in time. While anything
    moves, nothing can be said.
    """
    if not machine.flights.is_idle or any(w.claims is not None for w in machine.waiting.values()):
        return None
    if machine.loading_names or not machine.waiting:
        return None
    holding = all_holders(machine)
    is_promised = machine.held or machine.bars
    stuck = [
        w
        for w in machine.waiting.values()
        if holder_of(w) is not None and (w.blocked_on or ((is_promised or w.is_behind) and holder_of(w) in holding))
    ]
    while True:
        served = [w for w in stuck if _could_be_served(machine, wants, w, stuck)]
        if not served:
            break
        stuck = [w for w in stuck if w not in served]
    # Whoever holds nothing keeps nobody waiting: refusing him would not help.
    stuck = [w for w in stuck if holder_of(w) in holding]
    if not stuck:
        return None
    return stuck[-1], tuple(_in_words(machine, w) for w in stuck)


def all_holders(machine: Machine) -> set[object]:
    """Everybody who holds leases or room."""
    holders = {room.holder for room in machine.held.values()}
    for name in machine.books.models:
        holders.update(machine.gates[name].holders())
    return holders


def holder_of(waiting: Waiting) -> object:
    """Who asked, as far as it can be among those that wait for each other."""
    want = waiting.want
    return want.holder if isinstance(want, WantLease | WantRoom | WantDown) else None


def _could_be_served(machine: Machine, wants: Wants, waiting: Waiting, stuck: list[Waiting]) -> bool:
    holders = {holder_of(w) for w in stuck}
    before = [w for w in stuck if w.ticket < waiting.ticket]
    promised = {name for w in before if isinstance(w.want, WantLease) for name in w.names}

    def may_take(name: str) -> bool:
        return name not in promised and holders.isdisjoint(machine.gates[name].holders())

    match waiting.want:
        case WantLease(names):
            if not all(name in machine.books.models for name in names) or wants.is_too_large(names):
                return True  # its own step refuses it, or lets it run from its dispatch
            if any(_is_kept_out(machine, waiting, name, before, holders) for name in names):
                return False
            needs = wants.needs_up(waiting, names, machine.books.top)
        case WantRoom(tier, size):
            names, needs = (), Room(**{tier.value: size})
        case _:
            return all(holders.isdisjoint(machine.gates[name].holders()) for name in waiting.blocked_on)
    if needs is None:
        return True
    if waiting.is_behind and before:
        return False
    spare = [part.facts.part for part in machine.books.parts_of(names)]
    back = [room for room in machine.held.values() if room.holder not in holders]
    vram, ram = (sum(room.size_bytes for room in back if room.tier is tier) for tier in (Tier.VRAM, Tier.RAM))
    needs = Room(needs.vram - vram, needs.ram - ram, needs.disk)
    return isinstance(machine.planner.plan(needs, may_take, spare, names), Plan)


def _is_kept_out(
    machine: Machine, waiting: Waiting, name: str, before: list[Waiting], stuck_holders: set[object]
) -> bool:
    """Whether a model is full, or promised to an earlier ticket, for as long as those who are stuck are."""
    holders = machine.gates[name].holders()
    if holder_of(waiting) in holders:
        return False
    limit = machine.books.models[name].lease_limit
    if limit and sum(holder in stuck_holders for holder in holders) >= limit:
        return True
    return any(w.ticket == machine.bars.get(name) for w in before)


def _held_by(machine: Machine, holder: object) -> list[str]:
    held = [repr(name) for name in machine.books.models if holder in machine.gates[name].holders()]
    return held + ["reserved room"] * any(room.holder == holder for room in machine.held.values())


def _in_words(machine: Machine, waiting: Waiting) -> str:
    holder = holder_of(waiting)
    held = " and ".join(_held_by(machine, holder))
    wanted = " + ".join(repr(name) for name in waiting.names) or waiting.label
    return f"{name_of(holder)} holds {held} and waits for {wanted}"


def name_of(holder: object) -> str:
    """A holder for people: the name of a thread or task."""
    target = holder() if isinstance(holder, weakref.ref) else holder
    if target is None and holder is not None:
        return "a task that is gone"
    if hasattr(target, "get_name"):
        return str(target.get_name())
    return str(getattr(target, "name", "a first use" if target is None else target))

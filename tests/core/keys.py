"""What tells one state of a world from another: equal keys, and the same can happen."""

from __future__ import annotations

from collections.abc import Hashable

from worlds import Gate, World

from modelcache.core.ledger import Room
from modelcache.core.messages import Done, Grant, Instruction, Refuse, StartLoad, StartMove, Unload
from modelcache.core.records import Loading, Part, Waiting

#: Tickets by the caller whose they are; one that is nobody's any more, or the machine's own.
_Owners = dict[int, int]
_NOBODY = 9


def key_of(world: World) -> tuple[Hashable, ...]:
    """The facts of a state; times and numbers that only name things are left out.

    Whatever `World.check` reads is in it, so that one of several equal worlds may be checked for all of them.
    """
    machine, books = world.machine, world.machine.books
    order = {t: i for i, t in enumerate(sorted({gate.tick for gate in world.gates.values()}))}
    owner = {caller.ticket: i for i, caller in enumerate(world.callers) if caller.ticket}
    return (
        *[_model_key(world, name, gate, owner, order) for name, gate in world.gates.items()],
        *[(c.at, owner.get(c.ticket, -1), c.holds, c.room > 0, c.gave_up, c.took) for c in world.callers],
        books.vram.figures(),
        books.ram.figures(),
        books.disk.figures(),
        tuple([_waiting_key(waiting, owner) for waiting in machine.waiting.values()]),
        _rest_key(world, owner),
        # Last, since there are more or fewer of them.
        *[_part_key(world, part, owner) for _, part in sorted(books.parts.items())],
    )


def _rest_key(world: World, owner: _Owners) -> Hashable:
    """What is empty most of the time, or seldom changes."""
    machine, closing = world.machine, world.machine.closing
    return (
        (world.failures, world.cancels, world.writes, world.ooms, world.poisons, world.lates),
        tuple(sorted(world.loads)),
        tuple(sorted(world.moves)),
        tuple(sorted(world.going)),
        tuple([_order_key(each, owner) for each in world.todo]),
        tuple(sorted(set(world.notices))),
        tuple([(name, owner.get(by, _NOBODY)) for name, by in sorted(machine.bars.items())]),
        closing and (tuple(sorted(closing.pending)), closing.is_busy, closing.plan, owner.get(closing.ticket, -1)),
        tuple(sorted(machine.touched)) if world.todo else (),
        tuple(sorted(world.early.items())),
        machine.is_closed,
        machine.poison is None,
        world.is_rough,
        _look_key(world),
    )


def _look_key(world: World) -> Hashable:
    """What matters of the looks for writes: who is due and was used since, who was found clean and is it still."""
    machine = world.machine
    if machine.budgets.check_after_s is None:
        return ()
    due = tuple((n, world.gates[n].tick == t, at <= world.now_s) for n, (t, at) in machine.checks.due.items())
    running = machine.checks.running
    tick_of = machine.planner.tick_of
    parts = machine.books.parts
    now = running and running[0] in parts and (parts[running[0]].generation, tick_of(parts[running[0]])) == running[1:]
    clean = tuple((n, p.clean_tick == tick_of(p), p.looked_tick == tick_of(p)) for n, p in sorted(parts.items()))
    truth = tuple((n, world.clean.get(n) == u, world.seen.get(n) == u) for n, u in sorted(world.uses.items()))
    return due, running and running[0], now, clean, truth


def _part_key(world: World, p: Part, owner: _Owners) -> Hashable:
    name, flight, books = p.facts.part, p.flight, world.machine.books
    place = world.places.get(name)
    return (
        name,
        p.vram,
        p.ram,
        flight
        and (
            flight.move.after.vram,
            flight.move.after.ram,
            flight.started,
            flight.arriving,
            flight.move.write_image,
            _bytes(flight.needs),
            _bytes(flight.frees),
            owner.get(flight.ticket, -1),
        ),
        owner.get(p.covered_by, p.covered_by and _NOBODY),
        p.has_image,
        p.source_stale,
        p.kept_tick >= 0 and p.kept_tick == world.machine.planner.tick_of(p),
        p.ooms,
        tuple(p.models),
        p.top,
        place and (place.vram, place.ram),
        name in world.written,
        name in world.images,
        name in books.resident,
        name in books.in_use and (p.vram > 0 or any([books.models[n].workspace_charged for n in p.models])),
    )


def _model_key(world: World, name: str, gate: Gate, owner: _Owners, order: dict[int, int]) -> Hashable:
    model = world.machine.books.models.get(name)
    if model is None:
        return (tuple(gate.open), order[gate.tick], gate.closed, gate.watched)
    return (
        tuple(gate.open),
        order[gate.tick],
        gate.closed,
        gate.watched,
        model.loading is Loading.LOADED,
        model.loading is Loading.LOADING,
        model.gate_is_open,
        model.gate_is_watched,
        model.workspace_charged,
        owner.get(model.workspace_covered_by, model.workspace_covered_by and _NOBODY),
        model.is_leaving,
        model.failures,
        model.spec.size_bytes,
        model.spec.pin,
        model.is_dispatched,
        model.too_large,
    )


def _waiting_key(w: Waiting, owner: _Owners) -> Hashable:
    # What a caller wants is known by how far he is.
    who = owner[w.ticket] if w.ticket in owner else w.want
    claims = None if w.claims is None else _bytes(w.claims)
    return (who, claims, w.planned, w.overtaken, w.attempts, w.blocked_on, w.is_behind)


def _bytes(room: Room) -> tuple[int, int, int]:
    return room.vram, room.ram, room.disk


def _order_key(instruction: Instruction, owner: _Owners) -> Hashable:
    """An instruction that is not carried out yet, without the numbers and the error that only this run gave it."""
    match instruction:
        case StartMove(move):
            return "move", move.part, move.after, move.write_image, move.check
        case Grant(ticket) | Done(ticket) | Refuse(ticket):
            return type(instruction), owner.get(ticket, -1)
        case StartLoad(name) | Unload(name):
            return type(instruction), name
        case _:
            return instruction

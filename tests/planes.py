"""The shipped `Machine` between gates, callers and a data plane that does as it is told and sees what it should not be.

The driver's part is played as it is written: gate instructions are carried out one by one under the lock, while
lock-free hits and returns of leases happen in between; everything else waits for the lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from modelcache.core.machine import Budgets, Machine
from modelcache.core.messages import (
    Asked,
    CloseGate,
    Closing,
    Done,
    DropImage,
    Event,
    Forget,
    GateBusy,
    GateClosed,
    Grant,
    Instruction,
    LoadFailed,
    MoveFailed,
    MoveKept,
    OpenGate,
    Pinned,
    Refuse,
    Registered,
    StartCheck,
    StartLoad,
    StartMove,
    Unload,
    UnwatchGate,
    Want,
    WantBudget,
    WantRoom,
    WatchGate,
)
from modelcache.errors import CapacityError
from modelcache.move import LoadedFacts, Move, MoveKind, PartFacts, Residency
from modelcache.spec import LoaderSpec, ModelSpec
from modelcache.tier import Tier

#: After one of these, a request may be refused although others gave up what they had for it.
_ROUGH = (MoveFailed, MoveKept, LoadFailed, Pinned, Closing)


def spec(name: str, **facts: object) -> ModelSpec:
    return ModelSpec(name, LoaderSpec(entry=f"m:{name}"), **facts)


def part(
    name: str, *sizes: int, readable: bool = True, vram: tuple[int, ...] | None = None, offloaded: bool = False
) -> PartFacts:
    return PartFacts(name, vram or sizes, sizes, sum(sizes), readable, offloaded)


@dataclass(slots=True)
class Gate:
    """What the machine reads of a gate; tokens are callers."""

    open: dict[Hashable, Hashable] = field(default_factory=dict)
    tick: int = 0
    closed: bool = True
    watched: bool = False
    limit: int = 0

    @property
    def num_leases(self) -> int:
        return len(self.open)

    def holders(self) -> tuple[Hashable, ...]:
        return tuple(self.open.values())

    def copy(self) -> Gate:
        return Gate(dict(self.open), self.tick, self.closed, self.watched, self.limit)


@dataclass(slots=True, eq=False)
class Caller:
    """Somebody with a list of things to want, one after the other; a want that names its holder may come before what
    was had is given back. An event among them is told when its turn comes.
    """

    wants: tuple[Want | Event, ...]
    at: int = 0
    ticket: int = 0
    holds: tuple[str, ...] = ()
    room: int = 0
    gave_up: int = 0
    #: Something was given up for what is wanted now.
    took: bool = False
    #: What the last want came to; looked at by scenario tests.
    answer: Instruction | None = None

    def copy(self) -> Caller:
        return Caller(self.wants, self.at, self.ticket, self.holds, self.room, self.gave_up, self.took, self.answer)


class Plane:
    """The machine, and all that it orders about: gates, callers, loads and moves."""

    def __init__(
        self,
        budgets: Budgets,
        models: dict[str, tuple[ModelSpec, LoadedFacts]],
        callers: list[tuple[Want | Event, ...]],
        policy: object = None,
    ) -> None:
        self.models = models
        self._sizes = {each.part: each.ram_bytes for _, facts in models.values() for each in facts.parts}
        self.gates = {name: Gate() for name in models}
        self.machine = Machine(budgets, self.gates, policy)
        self.callers = [Caller(wants) for wants in callers]
        self.loads: dict[str, int] = {}
        self.moves: dict[str, Move] = {}
        #: Where the bytes of each part really are; whether anything went otherwise than the machine had to expect, and
        #: whether that was the loss of the device.
        self.places: dict[str, Residency] = {}
        self.is_rough = self.is_lost = False
        #: Parts whose source no longer describes them, and those of which an image file does.
        self.written: set[str] = set()
        self.images: set[str] = set()
        #: What the data plane is letting go of; for a load that ends so, how it ends.
        self.going: dict[str, tuple[int, Exception] | None] = {}
        self.todo: deque[Instruction] = deque()
        self.notices: tuple[str, ...] = ()
        self.tickets = self.ticks = 0
        self.now_s = 0.0
        self.moved: list[Move] = []
        #: The part that is looked at for writes, how often each was used, and how often it was when found clean.
        self.looking: str | None = None
        self.uses: dict[str, int] = {}
        self.seen: dict[str, int] = {}
        self.clean: dict[str, int] = {}
        #: Leases granted before the last segments had landed, by caller and model; true once these failed to.
        self.early: dict[tuple[int, str], bool] = {}
        self.has_early = any(getattr(want, "early", False) for wants in callers for want in wants)
        for model_spec, _ in models.values():
            self.tell(Registered(model_spec))

    # --- the driver's part ----------------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """One event under the lock, up to the next gate instruction."""
        want = event.want if isinstance(event, Asked) else None
        self.is_rough |= isinstance(event, _ROUGH) or isinstance(want, WantBudget | WantRoom)
        self.todo.extend(self.machine.handle(event, self.now_s))
        self.carry_out()

    def carry_out(self) -> None:
        while self.todo and not isinstance(self.todo[0], CloseGate | WatchGate):
            self._do(self.todo.popleft())

    def do_gate(self) -> None:
        """The gate instruction at the head: what `carry_out` stops at, since others race with it."""
        instruction = self.todo.popleft()
        gate = self.gates.get(instruction.name)
        if isinstance(instruction, CloseGate):
            gate.closed = True
            answer = GateBusy if gate.num_leases else GateClosed
            self.todo.extend(self.machine.handle(answer(instruction.name), self.now_s))
        elif gate is not None:
            gate.watched = True
            if not gate.num_leases:
                self.notices = (*self.notices, instruction.name)
        self.carry_out()

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case OpenGate(name, limit):
                self.gates[name].closed, self.gates[name].limit = False, limit
            case UnwatchGate(name):
                self.gates[name].watched = False
            case StartLoad(name, generation):
                assert name not in self.loads, f"{name} is loaded twice at a time"
                assert not self.is_lost, f"{name} is loaded for a device that is lost"
                self.loads[name] = generation
            case StartMove(move):
                self._start(move)
            case StartCheck(name):
                assert self.looking is None, "two parts are looked at at a time"
                for model in self.machine.books.parts[name].models:
                    assert not self.gates[model].num_leases
                self.looking = name
                self.seen[name] = self.uses.get(name, 0)
            case Grant(ticket, names):
                caller = self._caller(ticket)
                caller.ticket, caller.answer, caller.took = 0, instruction, False
                caller.holds = (*caller.holds, *names)
                for name in names:
                    self._enter(caller, name)
            case Done(ticket):
                caller = self._caller(ticket)
                want = caller.wants[caller.at - 1]
                caller.room = ticket if getattr(want, "hold", False) else 0
                caller.ticket, caller.answer, caller.took = 0, instruction, False
            case Refuse(ticket, error):
                caller = self._caller(ticket)
                if isinstance(error, CapacityError):
                    assert self.is_rough or not caller.took, f"others gave up what they had, for nothing: {error}"
                caller.ticket, caller.answer, caller.took = 0, instruction, False
            case Forget(name):
                assert not self.gates[name].num_leases
                self.going[name] = None
                self.written &= self.machine.books.parts.keys()
                self.images &= self.machine.books.parts.keys()
                for gone in self.places.keys() - self.machine.books.parts.keys():
                    where, sizes = self.places.pop(gone), self._sizes[gone]
                    assert where == Residency(0, len(sizes)), f"{gone} is forgotten, but {where} holds bytes of it"
            case Unload(name, generation, error):
                self.going[name] = (generation, error)
            case DropImage(name):
                self.images.discard(name)

    def _start(self, move: Move) -> None:
        assert move.part not in self.moves, f"{move.part} moves twice at a time"
        part = self.machine.books.parts[move.part]
        for name in part.models:
            assert not self.gates[name].num_leases, f"{name} is moved under a lease"
            assert self.gates[name].closed
        lets_go = move.kind is MoveKind.EVICT and not (move.check or move.write_image)
        assert lets_go or not self.is_lost, f"{move} is asked of a device that is lost"
        assert move.before == self.places.get(move.part, Residency(0, part.n)), f"{move} does not start where it is"
        self._require_look(move)
        self.moves[move.part] = move
        for caller in self.callers:
            caller.took |= caller.ticket == part.flight.ticket and bool(part.flight.frees)

    def _require_look(self, move: Move) -> None:
        """Whatever may have been written to is looked at before it is given up, unless its model is leaving."""
        is_leaving = any(self.machine.books.models[n].is_leaving for n in self.machine.books.parts[move.part].models)
        if move.kind is MoveKind.TRIM and not move.check and not is_leaving:
            assert self.clean.get(move.part) == self.uses.get(move.part, 0), f"{move.part} may have been written to"
        if move.kind is MoveKind.EVICT and not move.write_image and not is_leaving:
            is_in_source = self.machine.books.parts[move.part].facts.readable and move.part not in self.written
            assert is_in_source or move.part in self.images, f"the last copy of {move.part} is given up"

    def _caller(self, ticket: int) -> Caller:
        return next(caller for caller in self.callers if caller.ticket == ticket)

    def _enter(self, caller: Caller, name: str) -> None:
        self.ticks += 1
        gate = self.gates[name]
        gate.open[self.callers.index(caller)] = self.callers.index(caller)
        gate.tick = self.ticks
        books = self.machine.books
        assert self.machine.is_charged(books.models[name]), f"{name} is leased and its workspace may be others'"
        for part_id in books.models[name].parts:
            self.uses[part_id] = self.uses.get(part_id, 0) + 1
            if books.parts[part_id].is_arriving and caller.wants[caller.at - 1].early:
                self.early[self.callers.index(caller), name] = False
                continue
            assert books.parts[part_id].is_up, f"{name} is leased although {part_id} is not up"
            assert books.parts[part_id].flight is None, f"{name} is leased although {part_id} is moving"

    # --- what must hold -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every promise that one state can break."""
        machine = self.machine
        machine.validate()
        for name, gate in self.gates.items():
            is_early = [self.early.get((caller, name)) for caller in gate.open]
            if not all(is_early):  # at least one that nothing has failed under
                for part_id in machine.books.models[name].parts:
                    part = machine.books.parts[part_id]
                    if part.is_arriving and None not in is_early:
                        continue
                    assert part.is_up, f"{name} is leased and not up"
                    assert part.flight is None, f"{name} is leased and moving"
        ordered = {each.move.part for each in self.todo if isinstance(each, StartMove)}
        started = {n for n, p in machine.books.parts.items() if p.flight and p.flight.started}
        assert self.moves.keys() | ordered == started
        assert self.moves.keys().isdisjoint(ordered)
        assert not (machine.is_closed and machine.waiting), "somebody waits for a cache that is closed"
        self._check_bytes()
        if not (self.todo or self.moves or self.loads or self.going or self.notices or machine.waiting or machine.held):
            self._check_targets()

    def _check_targets(self) -> None:
        """Nothing is under way, so a lowered budget has been reached, as far as what is there may go."""
        books = self.machine.books
        is_used = any(gate.num_leases for gate in self.gates.values())
        is_pinned = any(model.spec.pin is not None for model in books.models.values())
        is_kept = any(part.kept_tick >= 0 or not part.rereadable for part in books.parts.values())
        if not (is_used or is_kept or self.is_lost or is_pinned):
            assert not books.vram.deficit_bytes, books.vram
            assert not books.ram.deficit_bytes, books.ram

    def _check_bytes(self) -> None:
        """What the data plane has allocated never exceeds a budget, whatever the books say."""
        vram = ram = 0
        for name, where in self.places.items():
            part = self.machine.books.parts[name]
            vram += part.vram_sums[where.vram]
            ram += part.ram_sums[-1] - part.ram_sums[where.ram]
        for name, move in self.moves.items():
            part = self.machine.books.parts[name]
            vram += max(0, part.vram_sums[move.after.vram] - part.vram_sums[move.before.vram])
            ram += max(0, part.ram_sums[move.before.ram] - part.ram_sums[move.after.ram])
        books = self.machine.books
        workspaces = sum([model.workspace_bytes for model in books.models.values() if model.workspace_charged])
        if books.top is Tier.VRAM:
            vram += workspaces
        else:
            ram += workspaces
        assert vram <= books.vram.budget_bytes, f"{vram} of {books.vram.budget_bytes} bytes of VRAM are taken"
        assert ram <= books.ram.budget_bytes, f"{ram} of {books.ram.budget_bytes} bytes of RAM are taken"

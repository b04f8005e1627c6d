"""Small worlds around the shipped `Machine`: gates, callers and a data plane whose every answer is a choice.

A world is a state. `steps()` lists what could happen next, `after(step)` is the world after it. The driver's part is
played as it is written: gate instructions are carried out one by one under the lock, while lock-free hits and returns
of leases happen in between; everything else waits for the lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from modelcache.core.ledger import Account
from modelcache.core.machine import Budgets, Machine
from modelcache.core.messages import (
    Arriving,
    Asked,
    Checked,
    CloseGate,
    Done,
    DropImage,
    Event,
    Forget,
    Forgotten,
    GateBusy,
    GateClosed,
    Grant,
    Instruction,
    LeaseReturned,
    Left,
    LoadDone,
    LoadFailed,
    MoveDone,
    MoveFailed,
    MoveKept,
    OpenGate,
    Refuse,
    Registered,
    RoomReturned,
    StartCheck,
    StartLoad,
    StartMove,
    Tick,
    Unload,
    UnwatchGate,
    Want,
    WantDown,
    WantGone,
    WantLease,
    WatchGate,
)
from modelcache.core.records import Loading
from modelcache.errors import MoveError
from modelcache.move import LoadedFacts, Move, Moved, MoveKind, PartFacts
from modelcache.spec import LoaderSpec, ModelSpec
from modelcache.tier import Tier


def spec(name: str, **facts: object) -> ModelSpec:
    return ModelSpec(name, LoaderSpec(entry=f"m:{name}"), **facts)


def part(
    name: str, *sizes: int, readable: bool = True, vram: tuple[int, ...] | None = None, offloaded: bool = False
) -> PartFacts:
    return PartFacts(name, vram or sizes, sizes, sum(sizes), readable, offloaded)


@dataclass
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


@dataclass
class Caller:
    """Somebody with a list of things to want, one after the other."""

    wants: tuple[Want, ...]
    at: int = 0
    ticket: int = 0
    holds: tuple[str, ...] = ()
    room: int = 0
    gave_up: int = 0
    #: What the last want came to; looked at by scenario tests.
    answer: Instruction | None = None

    def copy(self) -> Caller:
        return Caller(self.wants, self.at, self.ticket, self.holds, self.room, self.gave_up, self.answer)


class World:
    """One state of everything."""

    def __init__(
        self,
        budgets: Budgets,
        models: dict[str, tuple[ModelSpec, LoadedFacts]],
        callers: list[tuple[Want, ...]],
        *,
        failures: int = 0,
        cancels: int = 0,
        writes: int = 0,
        policy: object = None,
    ) -> None:
        self.models = models
        self.gates = {name: Gate() for name in models}
        self.machine = Machine(budgets, self.gates, policy)
        self.callers = [Caller(wants) for wants in callers]
        self.failures, self.cancels, self.writes = failures, cancels, writes
        self.loads: dict[str, int] = {}
        self.moves: dict[str, Move] = {}
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

    def copy(self) -> World:
        twin = object.__new__(World)
        twin.models = self.models
        twin.gates = {name: gate.copy() for name, gate in self.gates.items()}
        twin.machine = self.machine.copy(twin.gates)
        twin.callers = [caller.copy() for caller in self.callers]
        twin.failures, twin.cancels, twin.writes = self.failures, self.cancels, self.writes
        twin.loads, twin.moves, twin.going = dict(self.loads), dict(self.moves), dict(self.going)
        twin.todo = deque(self.todo)
        twin.notices = self.notices
        twin.tickets, twin.ticks, twin.now_s = self.tickets, self.ticks, self.now_s
        twin.moved = list(self.moved)
        twin.looking, twin.uses = self.looking, dict(self.uses)
        twin.seen, twin.clean = dict(self.seen), dict(self.clean)
        twin.early, twin.has_early = dict(self.early), self.has_early
        return twin

    # --- the driver's part ----------------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """One event under the lock, up to the next gate instruction."""
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
                self.loads[name] = generation
            case StartMove(move):
                assert move.part not in self.moves, f"{move.part} moves twice at a time"
                for name in self.machine.books.parts[move.part].models:
                    assert not self.gates[name].num_leases, f"{name} is moved under a lease"
                    assert self.gates[name].closed
                self._require_look(move)
                self.moves[move.part] = move
            case StartCheck(name):
                assert self.looking is None, "two parts are looked at at a time"
                for model in self.machine.books.parts[name].models:
                    assert not self.gates[model].num_leases
                self.looking = name
                self.seen[name] = self.uses.get(name, 0)
            case Grant(ticket, names):
                caller = self._caller(ticket)
                caller.ticket, caller.answer = 0, instruction
                caller.holds = names
                for name in names:
                    self._enter(caller, name)
            case Done(ticket):
                caller = self._caller(ticket)
                want = caller.wants[caller.at - 1]
                caller.room = ticket if getattr(want, "hold", False) else 0
                caller.ticket, caller.answer = 0, instruction
            case Refuse(ticket):
                caller = self._caller(ticket)
                caller.ticket, caller.answer = 0, instruction
            case Forget(name):
                assert not self.gates[name].num_leases
                self.going[name] = None
            case Unload(name, generation, error):
                self.going[name] = (generation, error)
            case DropImage():
                pass

    def _require_look(self, move: Move) -> None:
        """Whatever may have been written to is looked at before it is given up, unless its model is leaving."""
        is_leaving = any(self.machine.books.models[n].is_leaving for n in self.machine.books.parts[move.part].models)
        if move.kind is MoveKind.TRIM and not move.check and not is_leaving:
            assert self.clean.get(move.part) == self.uses.get(move.part, 0), f"{move.part} may have been written to"

    def _caller(self, ticket: int) -> Caller:
        return next(caller for caller in self.callers if caller.ticket == ticket)

    def _enter(self, caller: Caller, name: str) -> None:
        self.ticks += 1
        gate = self.gates[name]
        gate.open[self.callers.index(caller)] = self.callers.index(caller)
        gate.tick = self.ticks
        books = self.machine.books
        for part_id in books.models[name].parts:
            self.uses[part_id] = self.uses.get(part_id, 0) + 1
            if books.parts[part_id].is_arriving and caller.wants[caller.at - 1].early:
                self.early[self.callers.index(caller), name] = False
                continue
            assert books.parts[part_id].is_up, f"{name} is leased although {part_id} is not up"
            assert books.parts[part_id].flight is None, f"{name} is leased although {part_id} is moving"

    # --- what could happen ----------------------------------------------------------------------------------------

    def steps(self) -> Iterator[tuple[str, int | str]]:
        """Names of what could happen next, in a fixed order."""
        for i, caller in enumerate(self.callers):
            if caller.holds:
                yield "leave", i
            elif caller.ticket == 0 and not caller.room and caller.at < len(caller.wants):
                want = caller.wants[caller.at]
                is_hit = isinstance(want, WantLease) and len(want.names) == 1 and self._is_open(want.names[0])
                if is_hit:
                    yield "hit", i
                elif not self.todo:
                    yield "ask", i
        if self.todo:
            yield "gate", 0
            return
        for name in dict.fromkeys(self.notices):
            yield "notice", name
        for i, caller in enumerate(self.callers):
            if caller.ticket and self.cancels:
                yield "cancel", i
            if caller.room:
                yield "give room back", i
        for name in self.loads:
            yield "load", name
            if self.failures:
                yield "fail load", name
        for name in self.going:
            yield "let go", name
        if self.looking is not None:
            yield "find clean", self.looking
            if self.writes:
                yield "find written", self.looking
        if self.machine.checks.due and self.looking is None:
            yield "time passes", 0
        for name, move in self.moves.items():
            yield "move", name
            flight = self.machine.books.parts[name].flight
            if self.has_early and move.kind is MoveKind.PROMOTE and flight is not None and not flight.arriving:
                yield "arrive", name
            if self.failures:
                yield "fail move", name
            if self.writes and move.kind in (MoveKind.TRIM, MoveKind.EVICT, MoveKind.SHED) and move.check:
                yield "find writes", name

    def _is_open(self, name: str) -> bool:
        gate = self.gates[name]
        return not gate.closed and not (gate.limit and gate.num_leases >= gate.limit)

    def do(self, step: tuple[str, int | str]) -> None:
        """Let it happen, in place."""
        kind, which = step
        if kind in ("hit", "ask", "leave", "cancel", "give room back"):
            self._do_caller(kind, self.callers[which])
        elif kind == "gate":
            self.do_gate()
        elif kind == "notice":
            self.notices = tuple(name for name in self.notices if name != which)
            self.tell(LeaseReturned(which))
        elif kind == "time passes":
            self.now_s = max(at_s for _, at_s in self.machine.checks.due.values())
            self.tell(Tick())
        elif kind in ("find clean", "find written"):
            self.looking = None
            self.writes -= kind == "find written"
            if kind == "find clean":
                self.clean[which] = self.seen[which]
            self.tell(Checked(which, kind == "find clean"))
        elif kind == "let go":
            how = self.going.pop(which)
            self.tell(Forgotten(which) if how is None else LoadFailed(which, *how))
        elif kind == "load":
            self.tell(LoadDone(which, self.loads.pop(which), self.models[which][1]))
        elif kind == "arrive":
            self.tell(Arriving(which, self.moves[which].generation))
        elif kind == "fail load":
            self.failures -= 1
            self.tell(LoadFailed(which, self.loads.pop(which), OSError("disk")))
        else:
            self._do_move(kind, self.moves.pop(which))

    def _do_move(self, kind: str, move: Move) -> None:
        if kind == "move":
            self.moved.append(move)
            self.tell(MoveDone(move.part, move.generation, Moved(0, 0.0)))
        elif kind == "fail move":
            self.failures -= 1
            holders = self.machine.books.parts[move.part].models
            self.early.update({key: True for key in self.early if key[1] in holders})
            self.tell(MoveFailed(move.part, move.generation, MoveError(move.part, "a", "b", "broke")))
        else:
            self.writes -= 1
            keeps = move.kind is not MoveKind.TRIM and not move.write_image
            if keeps:
                self.tell(MoveKept(move.part, move.generation))
            else:
                self.moved.append(move)
                self.tell(MoveDone(move.part, move.generation, Moved(0, 0.0, written=True)))

    def _do_caller(self, kind: str, caller: Caller) -> None:
        if kind == "hit":
            want = caller.wants[caller.at]
            caller.at += 1
            caller.holds = want.names
            self._enter(caller, want.names[0])
        elif kind == "ask":
            self.tickets += 1
            caller.ticket = self.tickets
            caller.at += 1
            self.tell(Asked(caller.ticket, caller.wants[caller.at - 1]))
        elif kind == "leave":
            names, caller.holds = caller.holds, ()
            for name in names:
                gate = self.gates[name]
                del gate.open[self.callers.index(caller)]
                self.early.pop((self.callers.index(caller), name), None)
                if (gate.closed or gate.watched) and name not in self.notices:
                    self.notices = (*self.notices, name)
        elif kind == "cancel":
            self.cancels -= 1
            ticket, caller.ticket = caller.ticket, 0
            caller.gave_up += 1
            self.tell(Left(ticket))
        else:
            room, caller.room = caller.room, 0
            self.tell(RoomReturned(room))

    def after(self, step: tuple[str, int | str]) -> World:
        world = self.copy()
        world.do(step)
        return world

    # --- who is it ------------------------------------------------------------------------------------------------

    def key(self) -> Hashable:
        """Equal for worlds in which the same can happen; times and numbers that only name things are left out."""
        machine, books = self.machine, self.machine.books
        order = {t: i for i, t in enumerate(sorted({gate.tick for gate in self.gates.values()}))}
        owner = {caller.ticket: i for i, caller in enumerate(self.callers) if caller.ticket}
        return (
            tuple(self._part_key(name, owner) for name in sorted(books.parts)),
            tuple(self._model_key(name, owner, order) for name in self.gates),
            tuple(_account_key(account) for account in (books.vram, books.ram, books.disk)),
            tuple(self._waiting_key(ticket, owner) for ticket in machine.waiting),
            tuple((name, owner.get(by, 9)) for name, by in sorted(machine.bars.items())),
            tuple((c.at, owner.get(c.ticket, -1), c.holds, bool(c.room), c.gave_up) for c in self.callers),
            (self.failures, self.cancels, self.writes),
            tuple(sorted(self.loads)),
            tuple(sorted(self.going)),
            tuple(self.todo),
            tuple(sorted(set(self.notices))),
            repr(machine.closing and (sorted(machine.closing.pending), machine.closing.is_busy, machine.closing.plan)),
            tuple(sorted(machine.touched)) if self.todo else (),
            tuple(sorted(self.early.items())),
            self._look_key(),
        )

    def _look_key(self) -> Hashable:
        """What matters of the looks for writes: who is due and was used since, who was found clean and is it still."""
        if self.machine.budgets.check_after_s is None:
            return ()
        due = tuple((n, self.gates[n].tick == t, at <= self.now_s) for n, (t, at) in self.machine.checks.due.items())
        running = self.machine.checks.running
        tick_of = self.machine.planner.tick_of
        parts = self.machine.books.parts
        now = (
            running
            and running[0] in parts
            and (parts[running[0]].generation, tick_of(parts[running[0]])) == running[1:]
        )
        clean = tuple((n, p.clean_tick == tick_of(p), p.looked_tick == tick_of(p)) for n, p in sorted(parts.items()))
        truth = tuple((n, self.clean.get(n) == u, self.seen.get(n) == u) for n, u in sorted(self.uses.items()))
        return due, running and running[0], now, clean, truth

    def _part_key(self, name: str, owner: dict[int, int]) -> Hashable:
        p = self.machine.books.parts[name]
        flight = p.flight and (
            p.flight.move.after,
            p.flight.started,
            p.flight.arriving,
            p.flight.move.write_image,
            p.flight.needs,
        )
        kept = p.kept_tick >= 0 and p.kept_tick == self.machine.planner.tick_of(p)
        covered = owner.get(p.covered_by, p.covered_by and 9)
        return (name, p.vram, p.ram, flight, covered, p.has_image, p.source_stale, kept, p.ooms, tuple(p.models), p.top)

    def _model_key(self, name: str, owner: dict[int, int], order: dict[int, int]) -> Hashable:
        gate, model = self.gates[name], self.machine.books.models.get(name)
        facts = model and (
            model.loading is Loading.LOADED,
            model.loading is Loading.LOADING,
            model.gate_is_open,
            model.gate_is_watched,
            model.workspace_charged,
            owner.get(model.workspace_covered_by, model.workspace_covered_by and 9),
            model.is_leaving,
            model.failures,
            model.spec.size_bytes,
            model.is_dispatched,
            model.too_large,
        )
        return (facts, tuple(gate.open), order[gate.tick], gate.closed, gate.watched)

    def _waiting_key(self, ticket: int, owner: dict[int, int]) -> Hashable:
        w = self.machine.waiting[ticket]
        return (owner.get(ticket, -1), w.want, w.claims, w.planned, w.overtaken, w.attempts, w.blocked_on)

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


def _account_key(account: Account) -> Hashable:
    return account.figures()


__all__ = ["Gate", "World", "part", "spec", "WantDown", "WantGone", "Tier"]

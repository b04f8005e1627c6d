"""Small worlds around the shipped `Machine`, in which whatever could happen is a choice.

A world is a state. `steps()` lists what could happen next, `do(step)` lets it happen.
"""

from __future__ import annotations

from collections.abc import Iterator

from planes import Caller, Gate, Plane, part, spec

from modelcache.core.machine import Budgets
from modelcache.core.messages import (
    Arriving,
    Asked,
    Checked,
    Closing,
    Event,
    Forgotten,
    LeaseReturned,
    Left,
    LoadDone,
    LoadFailed,
    MoveDone,
    MoveFailed,
    MoveKept,
    Pinned,
    Registered,
    RoomReturned,
    Tick,
    Want,
    WantLease,
)
from modelcache.errors import DeviceMemoryError, DevicePoisonedError, MoveError
from modelcache.move import LoadedFacts, Move, Moved, MoveKind
from modelcache.spec import ModelSpec


class World(Plane):
    """One state of everything."""

    def __init__(
        self,
        budgets: Budgets,
        models: dict[str, tuple[ModelSpec, LoadedFacts]],
        callers: list[tuple[Want | Event, ...]],
        *,
        failures: int = 0,
        cancels: int = 0,
        writes: int = 0,
        ooms: int = 0,
        poisons: int = 0,
        lates: int = 0,
        policy: object = None,
    ) -> None:
        super().__init__(budgets, models, callers, policy)
        #: How often each thing that need not happen still may.
        self.failures, self.cancels, self.writes = failures, cancels, writes
        self.ooms, self.poisons, self.lates = ooms, poisons, lates

    def copy(self) -> World:
        """The same state again; only `moved` begins anew."""
        twin = object.__new__(World)
        vars(twin).update(vars(self))
        twin.gates = {name: gate.copy() for name, gate in self.gates.items()}
        twin.machine = self.machine.copy(twin.gates)
        twin.callers = [caller.copy() for caller in self.callers]
        twin.loads, twin.moves, twin.going = self.loads.copy(), self.moves.copy(), self.going.copy()
        twin.places = self.places.copy()
        twin.todo = self.todo.copy()
        twin.moved = []
        twin.uses, twin.seen, twin.clean = self.uses.copy(), self.seen.copy(), self.clean.copy()
        twin.early, twin.written, twin.images = self.early.copy(), self.written.copy(), self.images.copy()
        return twin

    def let_go(self) -> None:
        """Nobody looks at this state again: its machine, which refers to itself, needs no collector to be freed."""
        vars(self.machine).clear()

    # --- what could happen ----------------------------------------------------------------------------------------

    def steps(self) -> Iterator[tuple[str, int | str]]:
        """Names of what could happen next, in a fixed order."""
        for i, caller in enumerate(self.callers):
            if caller.ticket:
                continue
            if caller.holds:
                yield "leave", i
            if caller.at < len(caller.wants) and (kind := self._next_step(caller)):
                yield kind, i
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
            if self.ooms and move.kind is MoveKind.PROMOTE:
                yield "run out of memory", name
            if self.poisons and move.kind is not MoveKind.STAGE:
                yield "lose the device", name
            if self.writes and move.kind in (MoveKind.TRIM, MoveKind.EVICT, MoveKind.SHED) and move.check:
                yield "find writes", name
        if self.lates:
            for name, part in self.machine.books.parts.items():
                if part.generation > (name in self.moves):
                    yield "come late", name

    def _next_step(self, caller: Caller) -> str:
        """How a caller that waits for nothing could go on to his next want, if he can."""
        want = caller.wants[caller.at]
        if (caller.holds or caller.room) and getattr(want, "holder", None) is None:
            return ""
        if isinstance(want, WantLease) and len(want.names) == 1 and self._is_open(want.names[0]):
            return "hit"
        if self.todo:
            return ""
        if isinstance(want, Registered):
            name = want.spec.name
            return "tell" if name not in self.machine.books.models and name not in self.going else ""
        if isinstance(want, Pinned):
            model = self.machine.books.models.get(want.name)
            return "tell" if model is not None and not model.is_leaving else ""
        return "tell" if isinstance(want, Closing) else "ask"

    def _require_in_use(self, name: str) -> None:
        """Once every order is carried out, no gate is open in front of what nobody may have any more."""
        machine = self.machine
        assert not machine.books.models[name].is_leaving, f"{name} is leased although it leaves"
        assert not machine.is_closed, f"{name} is leased although the cache is closed"
        assert not self.is_lost, f"{name} is leased although the device is lost"

    def _is_open(self, name: str) -> bool:
        gate = self.gates[name]
        return not gate.closed and not (gate.limit and gate.num_leases >= gate.limit)

    def do(self, step: tuple[str, int | str]) -> None:
        """Let it happen, in place."""
        kind, which = step
        if kind in ("hit", "ask", "tell", "leave", "cancel", "give room back"):
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
        elif kind == "come late":
            self._come_late(which)
        elif kind == "fail load":
            self._fail_load(which)
        else:
            self._do_move(kind, self.moves.pop(which))

    def _fail_load(self, name: str) -> None:
        self.failures -= 1
        told = [
            ticket for ticket, w in self.machine.waiting.items() if isinstance(w.want, WantLease) and name in w.names
        ]
        self.tell(LoadFailed(name, self.loads.pop(name), OSError("disk")))
        assert self.machine.waiting.keys().isdisjoint(told), f"not everybody is told that {name} cannot be loaded"

    def _do_move(self, kind: str, move: Move) -> None:
        name, generation = move.part, move.generation
        if kind == "move":
            self._land(move, Moved(0, 0.0))
            return
        if kind == "find writes":
            self.is_rough = True
            self.writes -= 1
            self.written.add(name)
            self.images.discard(name)
            if move.kind is not MoveKind.TRIM and not move.write_image:
                self.tell(MoveKept(name, generation))
            else:
                self._land(move, Moved(0, 0.0, written=True))
            return
        holders = self.machine.books.parts[name].models
        self.early.update({key: True for key in self.early if key[1] in holders})
        if kind == "fail move":
            self.failures -= 1
            error = MoveError(name, "a", "b", "broke")
        elif kind == "run out of memory":
            self.ooms -= 1
            error = DeviceMemoryError(name, "sim:0", 1, 0)
        else:
            self.poisons -= 1
            self.is_lost = True
            error = DevicePoisonedError("sim:0", "lost")
        self.tell(MoveFailed(name, generation, error))

    def _land(self, move: Move, moved: Moved) -> None:
        self.moved.append(move)
        self.places[move.part] = move.after
        if move.write_image:
            self.images.add(move.part)
        self.tell(MoveDone(move.part, move.generation, moved))

    def _come_late(self, name: str) -> None:
        """The end of a move that has ended before is told once more, and changes nothing of the part."""
        self.lates -= 1
        part = self.machine.books.parts[name]
        before, flight = part.residency, part.flight
        self.tell(MoveDone(name, part.generation - (name in self.moves), Moved(0, 0.0)))
        assert part.residency == before, f"{name} has moved because of a move that had ended"
        assert part.flight is flight or flight is None, f"the move of {name} has ended with one that had ended"

    def _do_caller(self, kind: str, caller: Caller) -> None:
        if kind == "hit":
            want = caller.wants[caller.at]
            caller.at += 1
            caller.holds = (*caller.holds, *want.names)
            if not self.todo:
                self._require_in_use(want.names[0])
            self._enter(caller, want.names[0])
        elif kind == "ask":
            self.tickets += 1
            caller.ticket = self.tickets
            caller.at += 1
            self.tell(Asked(caller.ticket, caller.wants[caller.at - 1]))
        elif kind == "tell":
            caller.at += 1
            self.tell(caller.wants[caller.at - 1])
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
            ticket, caller.ticket, caller.took = caller.ticket, 0, False
            caller.gave_up += 1
            self.tell(Left(ticket))
        else:
            room, caller.room = caller.room, 0
            self.tell(RoomReturned(room))


__all__ = ["Caller", "Gate", "World", "part", "spec"]

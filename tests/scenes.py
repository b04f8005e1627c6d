"""A world with a script: one thing after the other, instead of everything that could happen."""

from __future__ import annotations

from dataclasses import replace

from worlds import Caller, World, part, spec

from modelcache.core.machine import Budgets
from modelcache.core.messages import (
    Event,
    Grant,
    LeaseReturned,
    Left,
    LoadFailed,
    MoveFailed,
    MoveKept,
    Pinned,
    Refuse,
    RoomReturned,
    Tick,
    Want,
    WantLease,
)
from modelcache.move import LoadedFacts, MoveKind, PartFacts
from modelcache.spec import LoaderSpec, ModelSpec
from modelcache.tier import Tier


class Scene(World):
    """Callers come and go as told; loads and moves stand still until `settle` or `step` lets them end."""

    def __init__(self, budgets: Budgets, *models: tuple[ModelSpec, LoadedFacts], policy: object = None) -> None:
        #: Somebody takes a lease of this model right before its gate is closed, once.
        self.slips_in: str | None = None
        super().__init__(budgets, {model[0].name: model for model in models}, [], policy=policy)

    # --- callers ---

    def ask(self, want: Want) -> Caller:
        caller = Caller((want,))
        self.callers.append(caller)
        self.do(("ask", len(self.callers) - 1))
        self.gates_answer()
        return caller

    def lease(self, *names: str, holder: object = None, inside: str | None = None) -> Caller:
        return self.ask(WantLease(names, holder, inside))

    def get(self, *names: str) -> Caller:
        """A lease, had."""
        caller = self.lease(*names)
        self.settle()
        assert isinstance(caller.answer, Grant), caller.answer
        return caller

    def leave(self, caller: Caller) -> None:
        self.do(("leave", self.callers.index(caller)))
        for name in self.notices:
            self.notices = tuple(other for other in self.notices if other != name)
            self.tell(LeaseReturned(name))
            self.gates_answer()

    def use(self, *names: str) -> None:
        """Get and return leases, one after the other."""
        for name in names:
            self.leave(self.get(name))
            self.settle()

    def hit(self, name: str) -> Caller:
        """A lease that asks nobody; the gate must be open."""
        assert self._is_open(name), f"{name} is closed"
        caller = Caller((WantLease((name,), None),), holds=(name,), answer=len(self.callers))
        self.callers.append(caller)
        self._enter(caller, name)
        return caller

    def give_up(self, caller: Caller) -> None:
        ticket, caller.ticket = caller.ticket, 0
        self.event(Left(ticket))

    def return_room(self, caller: Caller) -> None:
        self.event(RoomReturned(caller.room))
        self.settle()

    # --- what happens ---

    def event(self, event: Event) -> None:
        self.tell(event)
        self.gates_answer()

    def gates_answer(self) -> None:
        while self.todo:
            if self.slips_in == self.todo[0].name and self._is_open(self.slips_in):
                self.hit(self.slips_in)
                self.slips_in = None
            self.do_gate()
        self.check()

    def step(self) -> bool:
        """Let one load or move end well; False when nothing is left to happen."""
        self.gates_answer()
        for kind, waiting in (
            ("notice", self.notices),
            ("load", self.loads),
            ("let go", self.going),
            ("move", self.moves),
        ):
            for name in waiting:
                self.do((kind, name))
                self.gates_answer()
                return True
        return False

    def settle(self) -> None:
        while self.step():
            pass

    def load_fails(self, name: str, error: Exception) -> None:
        self.event(LoadFailed(name, self.loads.pop(name), error))

    def move_fails(self, part_id: str, error: Exception) -> None:
        self.event(MoveFailed(part_id, self.moves.pop(part_id).generation, error))

    def writes_are_kept(self, part_id: str) -> None:
        self.event(MoveKept(part_id, self.moves.pop(part_id).generation))

    def pin(self, name: str, tier: Tier | None) -> None:
        self.event(Pinned(name, tier))

    def at(self, now_s: float) -> None:
        self.now_s = now_s
        self.event(Tick())

    # --- what is so ---

    def states(self) -> dict[str, str]:
        return {name: str(self.machine.books.state_of(model)) for name, model in self.machine.books.models.items()}

    def state(self, name: str) -> str:
        return self.states()[name]

    def where(self, part_id: str) -> tuple[int, int]:
        """VRAM holds ``[0, first)``, RAM holds ``[second, n)``."""
        part_ = self.machine.books.parts[part_id]
        return part_.vram, part_.ram

    def given_up(self) -> list[tuple[str, str]]:
        """(kind, part) of every finished move down, in order; asked for once each."""
        down = (MoveKind.TRIM, MoveKind.SHED, MoveKind.EVICT)
        found = [(str(move.kind), move.part) for move in self.moved if move.kind in down]
        self.moved.clear()
        return found


def error_of(caller: Caller) -> Exception:
    assert isinstance(caller.answer, Refuse), caller.answer
    return caller.answer.error


def got(caller: Caller) -> bool:
    return isinstance(caller.answer, Grant)


def of_kind(model: tuple[ModelSpec, LoadedFacts], kind: str = "safetensors") -> tuple[ModelSpec, LoadedFacts]:
    """The same model from a loader of the library, which dispatches nothing."""
    return replace(model[0], loader=LoaderSpec(kind=kind)), model[1]


def model(
    name: str,
    *sizes: int,
    readable: bool = True,
    limit: int = 0,
    parts: tuple[PartFacts, ...] = (),
    known: bool = True,
    **facts: object,
) -> tuple[ModelSpec, LoadedFacts]:
    """A registered model of one part of its own name, or of `parts`; of unknown size before its first load if not `known`."""
    parts = parts or (part(name, *sizes, readable=readable),)
    size = sum(sum(each.ram_bytes) for each in parts)
    return spec(name, size_bytes=size if known else None, **facts), LoadedFacts(parts, limit, "Net")

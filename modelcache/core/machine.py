"""The one mutator: `Machine.handle(event, now_s) -> instructions`.

It is called under the driver's lock and never blocks. Decisions are made in one place, `_advance`, after every event:
each ticket in order is taken one step further, as far as bytes, moves and leases allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

from modelcache.core.checks import Checks
from modelcache.core.flights import Flights
from modelcache.core.ledger import Account, Room
from modelcache.core.messages import (
    ArmTimer,
    Arriving,
    Asked,
    Checked,
    CloseGate,
    Closing,
    Done,
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
    Pinned,
    Refuse,
    Registered,
    RoomReturned,
    StartLoad,
    Tick,
    UnwatchGate,
    WantBudget,
    WantCopy,
    WantDown,
    WantGone,
    WantLease,
    WantRoom,
    WatchGate,
)
from modelcache.core.planner import Plan, Planner
from modelcache.core.policy import LRU, EvictionPolicy
from modelcache.core.records import Books, GateReading, Loading, Model, Part, Waiting
from modelcache.core.wants import Wants
from modelcache.errors import (
    CacheClosedError,
    CapacityError,
    DeviceMemoryError,
    DevicePoisonedError,
    InvalidTransitionError,
    LeaseError,
    QueueFullError,
    UnknownModelError,
)
from modelcache.move import MoveKind, Reason
from modelcache.spec import ModelSpec
from modelcache.tier import Tier

#: A refused ticket is tried again at most this often against gates that turn out busy, before it waits for a lease.
MAX_ATTEMPTS = 3
#: From this many failed first loads in a row, a request within the back-off gets the last error at once.
FAILURES_BEFORE_BACKOFF = 3
MAX_BACKOFF_S = 60.0
#: How long what could not be given up is left alone, unless it is used before.
LEFT_ALONE_S = 5.0


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes per tier, and how many callers may wait. On a host-only machine `vram` is 0 and `top` is RAM.

    `check_after_s`: a copy unused for so long is looked at for writes; `None` looks only when it is given up.
    """

    ram: int
    vram: int = 0
    disk: int = 0
    top: Tier = Tier.VRAM
    max_waiters: int = 512
    wait_when_full: bool = True
    check_after_s: float | None = None


@dataclass(slots=True)
class _Closing:
    """A plan whose gates are being closed; nothing else is decided until every one has answered."""

    ticket: int
    plan: Plan
    reason: Reason
    check: bool
    pending: set[str]
    is_busy: bool = False


class Machine:
    """Which model is where, who waits for what, and what must happen next.

    Invariants, asserted by `validate`: the books of every tier balance; a part has at most one move in flight; a gate
    is open only in front of a model that is whole on the top tier with its workspace charged.

    Args:
        budgets: Bytes per tier.
        gates: By model name; kept by the caller, read here.
        policy: Which copies go first.
    """

    def __init__(
        self, budgets: Budgets, gates: Mapping[str, GateReading], policy: EvictionPolicy | None = None
    ) -> None:
        self.budgets = budgets
        self.policy = policy or LRU()
        self.gates = gates
        self.books = Books(budgets.top, Account(budgets.vram), Account(budgets.ram), Account(budgets.disk))
        self.planner = Planner(self.books, gates, self.policy)
        self.flights = Flights(self.books, self._emit)
        self.checks = Checks(self.books, gates, budgets.check_after_s, self._emit, self.planner.tick_of)
        self.waiting: dict[int, Waiting] = {}
        self.held: dict[int, WantRoom] = {}
        self.bars: dict[str, int] = {}
        self.touched: dict[str, None] = {}
        self.closing: _Closing | None = None
        self.poison: DevicePoisonedError | None = None
        self.is_closed = False
        self.loading_unsized: str | None = None
        self.loading_names: dict[str, None] = {}
        self.changed = False
        self.now_s = 0.0
        #: Leases ordered by the present call; their gates know of them once the orders are carried out.
        self._granted: dict[str, int] = {}
        #: Models that the last plan found leased. A lease may be returned before its gate is read again.
        self.seen_leased: dict[str, None] = {}
        self._next_own_ticket = -1
        self._out: list[Instruction] = []
        self._idle_models: dict[str, None] = {}
        self.forgetting: set[str] = set()
        self._awaited: set[str] = set()
        #: Gates ordered closed for another cause than a plan: until each has answered, hits may still get in, and
        #: nothing is decided that counts on its being closed.
        self._unanswered: set[str] = set()
        #: Parts that could not be given up, and until when they are not asked to again.
        self._left_alone: dict[str, float] = {}
        self._wants = Wants(self)

    # --- the one mutator ------------------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take one event and say what must be done.

        After `CloseGate`, the answer for each such gate is the next event; nothing else may come in between. What
        follows from an answer is carried out behind what was ordered before it.
        """
        self.now_s = now_s
        self._take(event)
        # A registration serves nobody: with very many, looking at every ticket for each would be felt.
        if self.closing is None and not self._unanswered and not isinstance(event, Registered):
            self._advance()
        out, self._out = self._out, []
        # The caller carries out the grants before it says or asks anything more.
        self._granted.clear()
        return out

    def _take(self, event: Event) -> None:
        match event:
            case GateClosed(name):
                self._gate_answered(name, is_busy=False)
            case GateBusy(name):
                self._gate_answered(name, is_busy=True)
            case Registered(spec):
                self._register(spec)
            case Asked(ticket, want):
                self._ask(Waiting(ticket, want))
            case Left(ticket):
                self._drop(ticket)
            case LeaseReturned(name):
                self._lease_returned(name)
            case RoomReturned(ticket):
                self._return_room(ticket)
            case Pinned(name, tier):
                # Whoever pins may have been overtaken by somebody who unregistered it.
                if (pinned := self.books.models.get(name)) is not None:
                    pinned.spec = replace(pinned.spec, pin=tier)
            case LoadDone(name, generation, facts):
                if (model := self._loading(name, generation)) is not None:
                    self._wants.loaded(model, facts)
            case LoadFailed(name, generation, error):
                if (model := self._loading(name, generation)) is not None:
                    self._load_failed(model, error)
            case Arriving(name, generation):
                if (part := self._moving(name, generation)) is not None and part.flight is not None:
                    part.flight.arriving = True
            case MoveDone(name, generation, moved):
                if (part := self._moving(name, generation)) is not None:
                    self.flights.landed(part, moved)
                    self._settle_part(part)
                    self._wants.serve(part)
            case MoveKept(name, generation):
                if (part := self._moving(name, generation)) is not None:
                    self._kept(part)
            case MoveFailed(name, generation, error):
                if (part := self._moving(name, generation)) is not None:
                    self._failed(part, error)
            case Checked(name, is_clean):
                self.checks.answered(name, is_clean=is_clean)
                self._look_for_writes()
            case Forgotten(name):
                self._forgotten(name)
            case Tick():
                self._look_for_idle()
                self._look_for_writes()
                self._ask_again()
            case Closing():
                self._close()
            case _:
                assert_never(event)

    def _advance(self) -> None:
        for waiting in self.waiting.values():
            waiting.attempts = 0
        self.changed = True
        while self.changed and self.closing is None:
            self.changed = False
            self.flights.launch()
            self._wants.step_all()
        if self.closing is None:
            self._settle_gates()

    def _emit(self, instruction: Instruction) -> None:
        self._out.append(instruction)

    emit = _emit

    # --- registration and tickets -----------------------------------------------------------------------------------

    def model(self, name: str) -> Model:
        """The record of a registered model.

        Raises:
            UnknownModelError: It is not registered, or leaving.
        """
        model = self.books.models.get(name)
        if model is None or model.is_leaving:
            raise UnknownModelError(name)
        return model

    def _register(self, spec: ModelSpec) -> None:
        if spec.name in self.books.models:
            raise InvalidTransitionError(spec.name, "registered", "Registered")
        self.books.models[spec.name] = Model(spec)
        if spec.idle_s is not None:
            self._idle_models[spec.name] = None

    def _ask(self, waiting: Waiting) -> None:
        if self.is_closed:
            self.emit(Refuse(waiting.ticket, CacheClosedError()))
        elif len(self.waiting) >= self.budgets.max_waiters and isinstance(waiting.want, WantLease):
            name, limit = waiting.want.names[0], self.budgets.max_waiters
            self.emit(Refuse(waiting.ticket, QueueFullError(name, len(self.waiting), limit)))
        else:
            self.waiting[waiting.ticket] = waiting
            if isinstance(waiting.want, WantBudget):
                self.books.account(waiting.want.tier).retarget(waiting.want.budget_bytes, waiting.want.why)
            elif isinstance(waiting.want, WantGone) and waiting.want.name in self.books.models:
                self.books.models[waiting.want.name].is_leaving = True
                self.touched[waiting.want.name] = None

    def ask_for_target(self, tier: Tier) -> None:
        """Give up what a lowered budget no longer covers, if anything idle has it."""
        waiting = Waiting(self._next_own_ticket, WantBudget(tier, self.books.account(tier).target_bytes))
        plan = self.planner.plan_toward_target(self.may_take(waiting))
        if plan.givings or plan.workspaces:
            self._next_own_ticket -= 1
            self.waiting[waiting.ticket] = waiting
            self.carry_out(waiting, plan, Reason.PRESSURE)

    def ask_ourselves(self, want: WantDown) -> None:
        """Queue a want that nobody waits for; its ticket is below 0."""
        self.waiting[self._next_own_ticket] = Waiting(self._next_own_ticket, want)
        self._next_own_ticket -= 1

    def finish(self, waiting: Waiting, instruction: Instruction) -> None:
        """Answer a ticket and forget it."""
        self._drop(waiting.ticket)
        if waiting.ticket > 0:
            self.emit(instruction)

    def refuse(self, waiting: Waiting, error: Exception) -> None:
        """Answer a ticket with an error."""
        self.finish(waiting, Refuse(waiting.ticket, error))

    def _drop(self, ticket: int) -> None:
        waiting = self.waiting.pop(ticket, None)
        if waiting is None:
            return
        self.changed = True
        self.dissolve(waiting)
        for name in [name for name, by in self.bars.items() if by == ticket]:
            del self.bars[name]
            self.touched[name] = None
        for name in waiting.blocked_on:
            self.touched[name] = None

    def dissolve(self, waiting: Waiting) -> None:
        """Give back what a ticket claimed. Moves already started go on, for whoever needs them next."""
        claims, waiting.claims = waiting.claims, None
        if claims is None:
            return
        self.changed = True
        for tier in (Tier.VRAM, Tier.RAM, Tier.DISK):
            self.books.account(tier).unclaim(claims.of(tier))
        for part in self.books.parts.values():
            if part.covered_by == waiting.ticket:
                part.covered_by = 0
        for name in waiting.names:
            model = self.books.models.get(name)
            if model is not None and model.workspace_covered_by == waiting.ticket:
                model.workspace_covered_by = 0

    def _return_room(self, ticket: int) -> None:
        room = self.held.pop(ticket, None)
        if room is not None:
            self.books.account(room.tier).cancel(room.size_bytes)

    def needs_of(self, waiting: Waiting, loaded: tuple[str, ...], others: tuple[Model, ...]) -> Room:
        """The bytes that bringing up takes now; models not loaded yet count with the size they were registered with."""
        needs = self._wants.needs_up(waiting, loaded, self.books.top) or Room()
        for model in others:
            size, workspace = model.spec.size_bytes or 0, model.workspace_bytes
            needs += Room(size + workspace, size) if self.books.top is Tier.VRAM else Room(0, size + workspace)
        return needs

    # --- gates and leases ---------------------------------------------------------------------------------------------

    def may_take(self, waiting: Waiting) -> Callable[[str], bool]:
        """Whether a model may lose something for this ticket: no leases, and no earlier ticket counts on it."""
        promised = {
            name
            for other in self.waiting.values()
            if isinstance(other.want, WantLease)
            and other is not waiting
            and (other.ticket < waiting.ticket or isinstance(waiting.want, WantCopy))
            for name in other.want.names
        }

        def may(name: str) -> bool:
            if name in promised or self.is_barred(name, waiting):
                return False
            if self.num_leases(name) == 0:
                return True
            self.seen_leased[name] = None
            return False

        self.seen_leased.clear()
        return may

    def is_barred(self, name: str, waiting: Waiting) -> bool:
        """Whether a model is kept for an earlier ticket; one that is kept for a later ticket is free to an earlier."""
        return self.bars.get(name, waiting.ticket) < waiting.ticket

    def carry_out(self, waiting: Waiting, plan: Plan, reason: Reason, *, check: bool = True) -> bool:
        """Commit a plan, or first close the gates it needs closed; True when it is committed."""
        if plan.gates:
            self.closing = _Closing(waiting.ticket, plan, reason, check, set(plan.gates))
            waiting.attempts += 1
            for name in plan.gates:
                self.books.models[name].gate_is_open = False
                self.touched[name] = None
                self.emit(CloseGate(name))
            return False
        self._commit(waiting, plan, reason, check=check)
        return True

    def _commit(self, waiting: Waiting, plan: Plan, reason: Reason, *, check: bool) -> None:
        unseen = frozenset(giving.part for giving in plan.givings if check and self.checks.must_look(giving))
        self.flights.commit(plan, waiting, reason, next(iter(waiting.names), None), unseen)
        waiting.planned = True
        waiting.blocked_on, waiting.why = (), ""
        if plan.needs or not (plan.givings or plan.workspaces):
            # Else it only gives up, see `give_up_extra`: nothing was claimed that could bring anything up.
            self._wants.cover(waiting)
        self._wants.note_overtaking(waiting, plan)

    def _gate_answered(self, name: str, *, is_busy: bool) -> None:
        closing = self.closing
        self._unanswered.discard(name)
        if closing is None or name not in closing.pending:
            return  # A gate that was closed for another cause than a plan: its leases are read where they matter.
        closing.pending.discard(name)
        closing.is_busy |= is_busy
        if closing.pending:
            return
        self.closing = None
        waiting = self.waiting[closing.ticket]
        if not closing.is_busy:
            self._commit(waiting, closing.plan, closing.reason, check=closing.check)
            self._continue()
        elif waiting.attempts < MAX_ATTEMPTS:
            self._continue()
        else:
            self._wants.wait_for_leases(waiting, closing.plan.gates)
            self._settle_gates()

    def _continue(self) -> None:
        # Not `_advance`: attempts count until the next outside event.
        self.changed = True
        while self.changed and self.closing is None:
            self.changed = False
            self.flights.launch()
            self._wants.step_all()

    def num_leases(self, name: str) -> int:
        """Leases open or ordered on a model."""
        return self.gates[name].num_leases + self._granted.get(name, 0)

    def grant(self, waiting: Waiting, names: tuple[str, ...]) -> None:
        """Answer a ticket with its leases."""
        self.finish(waiting, Grant(waiting.ticket, names))
        for name in names:
            self._granted[name] = self._granted.get(name, 0) + 1
            self.touched[name] = None

    def _lease_returned(self, name: str) -> None:
        self.touched[name] = None
        for waiting in self.waiting.values():
            if name in waiting.blocked_on:
                waiting.overtaken += 1
        model = self.books.models.get(name)
        if model is not None and not self.is_closed:
            self.checks.returned(model, self.now_s)

    def _look_for_writes(self) -> None:
        if not self.is_closed and self.poison is None:
            self.touched.update(dict.fromkeys(self.checks.look(self.now_s)))

    def _settle_gates(self) -> None:
        """Open the gates of what is usable without asking, close the others, and watch those somebody waits for."""
        watched = {name for waiting in self.waiting.values() for name in waiting.blocked_on}
        watched |= self._over_target()
        self.touched.update(dict.fromkeys(watched))
        touched, self.touched = self.touched, {}
        for name in touched:
            model = self.books.models.get(name)
            if model is None:
                continue
            if model.gate_is_open != (is_open := self._may_open(model)):
                model.gate_is_open = is_open
                if not is_open:
                    self._unanswered.add(name)
                self.emit(OpenGate(name, model.lease_limit) if is_open else CloseGate(name))
            if model.gate_is_watched != (is_watched := name in watched or self.checks.watches(model)):
                model.gate_is_watched = is_watched
                self.emit(WatchGate(name) if model.gate_is_watched else UnwatchGate(name))

    def _over_target(self) -> set[str]:
        """The leased models whose bytes a lowered budget waits for; nobody waits under a ticket for these."""
        before, self._awaited = self._awaited, set()
        self.touched.update(dict.fromkeys(before))
        if not self.is_closed and any(a.deficit_bytes for a in (self.books.vram, self.books.ram)):
            for part in self.books.resident:
                self._awaited.update(name for name in self.books.parts[part].models if self.num_leases(name))
        return self._awaited

    def _may_open(self, model: Model) -> bool:
        name = model.spec.name
        return (
            self.books.is_up(model)
            and self.is_charged(model)
            and not model.is_leaving
            and not self.is_closed
            and name not in self.bars
            and (self.poison is None or self.books.top is not Tier.VRAM)
            and not (model.lease_limit and self._wants.is_queued_for(name))
        )

    def is_charged(self, model: Model) -> bool:
        """The top tier holds its workspace, or it has none."""
        return model.workspace_charged or not model.workspace_bytes

    # --- loads and moves ------------------------------------------------------------------------------------------

    def start_load(self, model: Model, *, is_nested: bool) -> None:
        """Start a first load; one at a time among those of unknown size, unless a running load asks for it."""
        if model.spec.size_bytes is None and not is_nested:
            if self.loading_unsized is not None:
                return
            self.loading_unsized = model.spec.name
        model.loading = Loading.LOADING
        self.loading_names[model.spec.name] = None
        model.generation += 1
        self.emit(StartLoad(model.spec.name, model.generation))

    def _loading(self, name: str, generation: int) -> Model | None:
        model = self.books.models.get(name)
        if model is None or model.generation != generation or model.loading is not Loading.LOADING:
            return None
        self.loading_names.pop(name, None)
        if self.loading_unsized == name:
            self.loading_unsized = None
        return model

    def _load_failed(self, model: Model, error: Exception) -> None:
        model.loading = Loading.FAILED
        model.error = error
        if isinstance(error, CapacityError):
            # The loader did its part; its model is too large for now, which the next request is told before a load.
            self.refuse_all(model.spec.name, error)
            return
        model.failures += 1
        over = model.failures - FAILURES_BEFORE_BACKOFF
        model.retry_at_s = self.now_s + min(MAX_BACKOFF_S, 2.0**over) if over >= 0 else self.now_s
        self.refuse_all(model.spec.name, error)

    def refuse_all(self, name: str, error: Exception) -> None:
        """Refuse every ticket that wants `name` brought up."""
        for waiting in list(self.waiting.values()):
            want = waiting.want
            if (isinstance(want, WantLease) and name in want.names) or (
                isinstance(want, WantCopy) and name == want.name
            ):
                self.refuse(waiting, error)

    def _moving(self, name: str, generation: int) -> Part | None:
        part = self.books.parts.get(name)
        if part is None or part.flight is None or part.generation != generation:
            return None
        # One that has not begun yet has no generation of its own: this is the end of the move before it, told twice.
        return part if part.flight.started else None

    def _settle_part(self, part: Part) -> None:
        self.touched.update(dict.fromkeys(part.models))
        if part.covered_by and (part.is_up or part.covered_by not in self.waiting):
            part.covered_by = 0

    def _kept(self, part: Part) -> None:
        flight = self.flights.turned_back(part, self._make_room)
        self._settle_part(part)
        is_drop = flight.move.kind in (MoveKind.EVICT, MoveKind.SHED) and not flight.move.write_image
        refusal = None
        if not (is_drop and part.rereadable):
            self._left_alone.pop(part.facts.part, None)
            part.kept_tick = self.planner.tick_of(part)
            name = next(iter(part.models), part.facts.part)
            refusal = LeaseError(
                f"{name!r} was written to and is not given up (on_write, or no file to keep the writes in); undo the "
                "writes, register it with on_write='writeback' or 'discard', or set budgets.disk"
            )
        else:
            # Its source no longer describes it: from now on it is spilled, not dropped.
            part.source_stale = True
            self.flights.drop_image(part)
        self._wants.giving_failed(flight.ticket, part, refusal)

    def _failed(self, part: Part, error: Exception) -> None:
        flight = self.flights.turned_back(part, self._make_room)
        self._settle_part(part)
        if isinstance(error, DevicePoisonedError) and self.poison is None:
            self._poisoned(error)
        elif flight.frees:
            part.kept_tick = self.planner.tick_of(part)
            self._left_alone[part.facts.part] = self.now_s + LEFT_ALONE_S
            self.emit(ArmTimer(self.now_s + LEFT_ALONE_S))
            self._wants.giving_failed(flight.ticket, part, error)
        elif isinstance(error, DeviceMemoryError) and part.ooms == 0:
            # The device refused what the ledger allowed. Give as much again up and try once more.
            part.ooms += 1
            self._wants.give_up_extra(flight)
        else:
            part.ooms = 0
            for name in list(part.models):
                self.refuse_all(name, error)

    def _poisoned(self, error: DevicePoisonedError) -> None:
        self.poison = error
        self.checks.due.clear()
        self.touched.update(dict.fromkeys(self.books.models))
        for waiting in list(self.waiting.values()):
            if isinstance(waiting.want, WantGone):
                # Nothing of it has to come from the device, and its name is not free before it is forgotten.
                self.dissolve(waiting)
                waiting.planned = False
            else:
                self.refuse(waiting, error)

    def _make_room(self, tier: Tier, n_bytes: int) -> None:
        account = self.books.account(tier)
        for waiting in reversed(list(self.waiting.values())):
            if account.claimed_bytes <= account.free_bytes + account.draining_bytes - n_bytes:
                return
            self.dissolve(waiting)
        # What others are about to give up may count on it as well, to be moved there.
        for name in reversed(list(self.flights.pending)):
            if account.claimed_bytes <= account.free_bytes + account.draining_bytes - n_bytes:
                return
            if name in self.flights.pending:
                part = self.books.parts[name]
                flight = self.flights.call_off(part, self._make_room)
                self._settle_part(part)
                self._wants.giving_failed(flight.ticket, part, None)

    def _ask_again(self) -> None:
        """What could not be given up a while ago may be tried again: by now its disk may have room."""
        for name, until_s in list(self._left_alone.items()):
            if until_s <= self.now_s:
                del self._left_alone[name]
                if name in self.books.parts:
                    self.books.parts[name].kept_tick = -1

    # --- time and the end ---------------------------------------------------------------------------------------------

    def _look_for_idle(self) -> None:
        """Park what was not used for its idle time, seen at a granularity of a quarter of it; then look again."""
        next_s = None
        for name in self._idle_models:
            model = self.books.models.get(name)
            if model is None or model.spec.idle_s is None or model.loading is not Loading.LOADED:
                continue
            gate = self.gates[name]
            if gate.tick != model.idle_tick or self.num_leases(name):
                model.idle_tick, model.idle_since_s = gate.tick, self.now_s
            elif self.now_s - model.idle_since_s >= model.spec.idle_s and self._is_parkable(model):
                down = Tier.RAM if self.books.top is Tier.VRAM else Tier.DISK
                self.ask_ourselves(WantDown(name, down, None, Reason.IDLE))
            if self._is_parkable(model):
                step_s = max(model.spec.idle_s / 4, 0.05)
                next_s = min(next_s or self.now_s + step_s, self.now_s + step_s)
        if next_s is not None:
            self.emit(ArmTimer(next_s))

    def _is_parkable(self, model: Model) -> bool:
        if model.spec.pin is not None or any(
            isinstance(w.want, WantDown) and w.want.name == model.spec.name for w in self.waiting.values()
        ):
            return False
        parts = [self.books.parts[part] for part in model.parts]
        return any(part.vram if self.books.top is Tier.VRAM else not part.is_cold for part in parts)

    def arm_idle(self, model: Model) -> None:
        """Begin looking for idleness of a model that came up."""
        if model.spec.idle_s is not None:
            model.idle_tick, model.idle_since_s = -1, self.now_s
            self.emit(ArmTimer(self.now_s + max(model.spec.idle_s / 4, 0.05)))

    def _close(self) -> None:
        self.is_closed = True
        self.checks.due.clear()
        self.touched.update(dict.fromkeys(self.books.models))
        for waiting in list(self.waiting.values()):
            self.refuse(waiting, CacheClosedError())

    def leave_parts(self, model: Model) -> None:
        """Drop the parts of a model that nobody else holds; their bytes are gone, or still the loader's."""
        for part_id in model.parts:
            part = self.books.parts[part_id]
            part.models.remove(model.spec.name)
            if not part.models:
                self.flights.drop_image(part)
                del self.books.parts[part_id]
                self.books.resident.discard(part_id)
                self.books.in_use.discard(part_id)
            else:
                # Its last use may have been that of the model that leaves.
                for order in (self.books.resident, self.books.in_use):
                    if part_id in order:
                        order.discard(part_id)
                        order.add(part_id)
        model.parts = ()

    def _forgotten(self, name: str) -> None:
        self.forgetting.discard(name)
        for waiting in list(self.waiting.values()):
            if isinstance(waiting.want, WantGone) and waiting.want.name == name:
                self.finish(waiting, Done(waiting.ticket, waiting.freed.vram, waiting.freed.ram))

    def forget(self, model: Model) -> None:
        """Drop every record of a model whose bytes are gone; whoever wanted that is answered when it is so."""
        name = model.spec.name
        self.leave_parts(model)
        self.forgetting.add(name)
        self.flights.give_workspace(name)
        self._idle_models.pop(name, None)
        del self.books.models[name]
        self.touched.pop(name, None)
        self.bars.pop(name, None)
        self.emit(Forget(name))

    # --- copies, for whoever explores what could happen ----------------------------------------------------------

    def copy(self, gates: Mapping[str, GateReading]) -> Machine:
        """A machine of its own in the same state, reading `gates`. Not while gates are being closed by `handle`."""
        twin = Machine(self.budgets, gates, self.policy)
        books = twin.books
        books.vram, books.ram, books.disk = self.books.vram.copy(), self.books.ram.copy(), self.books.disk.copy()
        books.parts = {name: part.copy() for name, part in self.books.parts.items()}
        books.models = {name: model.copy() for name, model in self.books.models.items()}
        books.resident, books.in_use = self.books.resident.copy(), self.books.in_use.copy()
        twin.flights.pending = dict(self.flights.pending)
        twin.flights.num_started = self.flights.num_started
        twin.waiting = {ticket: waiting.copy() for ticket, waiting in self.waiting.items()}
        twin.held, twin.bars, twin.touched = dict(self.held), dict(self.bars), dict(self.touched)
        if self.closing is not None:
            twin.closing = replace(self.closing, pending=set(self.closing.pending))
        twin.poison, twin.is_closed = self.poison, self.is_closed
        twin.loading_unsized, twin.loading_names = self.loading_unsized, dict(self.loading_names)
        twin.checks.copy_from(self.checks)
        twin.now_s, twin._next_own_ticket = self.now_s, self._next_own_ticket
        twin._idle_models, twin._awaited = dict(self._idle_models), set(self._awaited)
        twin._unanswered = set(self._unanswered)
        twin.forgetting = set(self.forgetting)
        twin._left_alone = dict(self._left_alone)
        return twin

    # --- checks -------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Assert every invariant; for tests, exploration and debugging."""
        books = self.books
        for account in (books.vram, books.ram, books.disk):
            account.validate()
        held, moving, draining = Room(), Room(), Room()
        for part in books.parts.values():
            at = part.room(part.residency)
            frees = part.flight.frees if part.flight else Room()
            held += Room(at.vram - frees.vram, at.ram - frees.ram, part.image_bytes)
            draining += frees
            if part.flight is not None and part.flight.started:
                moving += part.flight.needs
            assert part.vram >= part.ram or part.is_cold or part.vram == 0, part
            assert (part.facts.part in books.resident) == (not part.is_cold), part
            assert not part.vram or part.facts.part in books.in_use, part
        for room in self.held.values():
            moving += Room(**{room.tier.value: room.size_bytes})
        top = books.account(books.top)
        workspaces = sum(m.workspace_bytes for m in books.models.values() if m.workspace_charged)
        for tier in (Tier.VRAM, Tier.RAM, Tier.DISK):
            account = books.account(tier)
            extra = workspaces if account is top else 0
            assert account.resident_bytes == held.of(tier) + extra, (tier, account, held, extra)
            assert account.reserved_bytes == moving.of(tier), (tier, account, moving)
            assert account.draining_bytes == draining.of(tier), (tier, account, draining)
        for model in books.models.values():
            if model.workspace_charged and model.parts:
                parts = [books.parts[part] for part in model.parts]
                assert all(part.facts.part in books.in_use for part in parts), model
            if model.gate_is_open:
                assert books.is_up(model), model
                assert self.is_charged(model), model

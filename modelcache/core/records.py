"""What the machine remembers of parts, models and waiting callers, and the states these facts amount to.

Records are data: only `Machine` writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import Protocol

from modelcache.core.ledger import Account, Room
from modelcache.core.messages import Want, WantCopy, WantDown, WantGone, WantLease
from modelcache.core.recency import ByUse
from modelcache.errors import InvalidTransitionError
from modelcache.move import Move, MoveKind, PartFacts, Residency
from modelcache.spec import ModelSpec
from modelcache.tier import Tier


class GateReading(Protocol):
    """What may be read of a gate at any time. The figures are advisory until the gate was closed."""

    @property
    def num_leases(self) -> int:
        """Leases open now."""

    @property
    def tick(self) -> int:
        """The sequence number of the last use."""

    def holders(self) -> Iterable[object]:
        """Who holds the open leases; `None` for a lease that is returned by itself soon."""


class State(Enum):
    """Where a model or a part is. Derived from facts, so that it cannot disagree with them."""

    COLD = "cold"  # source or image file only
    STAGING = "staging"  # disk -> RAM, in flight
    PARKED = "parked"  # every segment in RAM, none in VRAM
    PARTIAL = "partial"  # some segments in VRAM, the rest in RAM
    PROMOTING = "promoting"  # RAM -> VRAM, in flight
    READY = "ready"  # every segment on the top tier
    TRIMMING = "trimming"  # segments being given up, by whatever kind of move
    FAILED = "failed"  # a first load failed, no tier holds it

    __hash__ = object.__hash__

    def __str__(self) -> str:
        return self.value


_MOVING = {
    MoveKind.STAGE: State.STAGING,
    MoveKind.PROMOTE: State.PROMOTING,
    MoveKind.TRIM: State.TRIMMING,
    MoveKind.SHED: State.TRIMMING,
    MoveKind.EVICT: State.TRIMMING,
}

#: Which move may start in which state, and where it may end; a failed move returns to where it began.
TRANSITIONS: dict[tuple[State, MoveKind], frozenset[State]] = {
    (State.COLD, MoveKind.STAGE): frozenset({State.PARKED, State.READY}),
    (State.PARKED, MoveKind.PROMOTE): frozenset({State.PARTIAL, State.READY}),
    (State.PARTIAL, MoveKind.PROMOTE): frozenset({State.PARTIAL, State.READY}),
    (State.READY, MoveKind.TRIM): frozenset({State.PARTIAL, State.PARKED}),
    (State.PARTIAL, MoveKind.TRIM): frozenset({State.PARTIAL, State.PARKED}),
    (State.READY, MoveKind.SHED): frozenset({State.READY}),
    (State.PARTIAL, MoveKind.SHED): frozenset({State.PARTIAL}),
    (State.READY, MoveKind.EVICT): frozenset({State.COLD}),
    (State.PARTIAL, MoveKind.EVICT): frozenset({State.COLD}),
    (State.PARKED, MoveKind.EVICT): frozenset({State.COLD}),
}


@dataclass(slots=True)
class Flight:
    """One move that was decided on, with the bytes it is charged on each side.

    Until `started`, it waits for the RAM that a write-back needs to be confirmed free. While it is `arriving`, a lease
    that can start early may be granted: should it fail then, whoever has one is told by the data plane.
    """

    move: Move
    needs: Room
    frees: Room
    ticket: int
    started: bool = False
    arriving: bool = False

    def copy(self) -> Flight:
        """A record of its own with the same facts."""
        return Flight(self.move, self.needs, self.frees, self.ticket, self.started, self.arriving)


@dataclass(slots=True)
class Part:
    """One part: its sizes, where its segments are, and the one move that may be in flight.

    Attributes:
        facts: What the data plane measured; replaced when its source no longer describes it.
        top: The tier on which it is usable: that of the machine, or RAM while its model runs from its dispatch.
        models: The models that hold it.
        vram: VRAM holds segments ``[0, vram)``.
        ram: RAM holds segments ``[ram, n)``.
        covered_by: The ticket whose plan brings it up; 0 for nobody.
        has_image: An image file holds its present bytes.
        image_bytes: What its image file occupies on disk; 0 without one.
        source_stale: It was written to, so its source no longer describes it.
        kept_tick: It refused to be given up when its gates showed this tick; -1 when it never did.
        ooms: Promotions refused by the device in a row.
        looked_tick: Its bytes in VRAM were looked at when its gates showed this tick; -1 never.
        clean_tick: They were found unwritten then.
    """

    facts: PartFacts
    top: Tier
    models: list[str] = field(default_factory=list)
    vram: int = 0
    ram: int = -1
    generation: int = 0
    flight: Flight | None = None
    covered_by: int = 0
    has_image: bool = False
    image_bytes: int = 0
    source_stale: bool = False
    kept_tick: int = -1
    ooms: int = 0
    looked_tick: int = -1
    clean_tick: int = -1
    vram_sums: tuple[int, ...] = ()
    ram_sums: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.ram = self.n if self.ram < 0 else self.ram
        self.vram_sums = tuple(accumulate(self.facts.vram_bytes, initial=0))
        self.ram_sums = tuple(accumulate(self.facts.ram_bytes, initial=0))

    @property
    def n(self) -> int:
        """Number of segments."""
        return len(self.facts.ram_bytes)

    @property
    def residency(self) -> Residency:
        """The two numbers."""
        return Residency(self.vram, self.ram)

    @property
    def is_cold(self) -> bool:
        """No tier above disk holds anything."""
        return self.vram == 0 and self.ram == self.n

    @property
    def is_up(self) -> bool:
        """The top tier holds every segment."""
        return self.vram == self.n if self.top is Tier.VRAM else self.ram == 0

    @property
    def is_arriving(self) -> bool:
        """The top tier has memory for every segment, and the last of them are on their way there."""
        flight = self.flight
        return flight is not None and flight.arriving and flight.move.after.vram == self.n

    @property
    def rereadable(self) -> bool:
        """Its present bytes are on disk, so a clean copy may be dropped."""
        return self.has_image or (self.facts.readable and not self.source_stale)

    def room(self, where: Residency) -> Room:
        """The bytes it is charged at a residency."""
        return Room(vram=self.vram_sums[where.vram], ram=self.ram_sums[-1] - self.ram_sums[where.ram])

    @property
    def state(self) -> State:
        """What the facts amount to."""
        if self.flight is not None and self.flight.started:
            return _MOVING[self.flight.move.kind]
        return self.resting_state

    @property
    def resting_state(self) -> State:
        """The same, as if nothing was in flight."""
        if self.is_up:
            return State.READY
        if self.is_cold:
            return State.COLD
        return State.PARTIAL if self.vram else State.PARKED

    def begin(self, move: Move) -> None:
        """Assert that a move may start here."""
        if (self.resting_state, move.kind) not in TRANSITIONS or move.before != self.residency:
            raise InvalidTransitionError(self.facts.part, str(self.state), str(move.kind), (str(move),))

    def arrive(self, move: Move) -> None:
        """Take the residency that a finished move leads to."""
        allowed = TRANSITIONS[self.resting_state, move.kind]
        self.vram, self.ram = move.after.vram, move.after.ram
        if self.resting_state not in allowed:
            raise InvalidTransitionError(self.facts.part, str(move.kind), str(self.resting_state), (str(move),))

    def copy(self) -> Part:
        """A record of its own with the same facts."""
        twin = object.__new__(Part)
        twin.facts, twin.top, twin.models = self.facts, self.top, self.models.copy()
        twin.vram, twin.ram, twin.generation = self.vram, self.ram, self.generation
        twin.flight = self.flight and self.flight.copy()
        twin.covered_by, twin.kept_tick, twin.ooms = self.covered_by, self.kept_tick, self.ooms
        twin.has_image, twin.image_bytes, twin.source_stale = self.has_image, self.image_bytes, self.source_stale
        twin.looked_tick, twin.clean_tick = self.looked_tick, self.clean_tick
        twin.vram_sums, twin.ram_sums = self.vram_sums, self.ram_sums
        return twin


class Loading(Enum):
    """How far the first load of a model is."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(slots=True)
class Model:
    """One registered model.

    Attributes:
        spec: As registered; `pin` follows the operator.
        loading: How far its first load is.
        parts: Ids, in first-use order; empty until loaded, and for a model without bytes.
        limit: Leases at a time; 0 is unlimited.
        onload_bytes: What a forward brings onto the device at once when the model runs from its dispatch.
        is_dispatched: It does not fit whole, so it runs from its dispatch: its offloaded parts stay in RAM.
        whole_only: Why it can only run whole although it was dispatched.
        too_large: What it was measured to need at least, when that was more than the budgets.
        gate_is_open: What the machine ordered last.
        workspace_charged: The top tier holds its workspace.
        workspace_covered_by: The ticket whose plan charges it; 0 for nobody.
        is_leaving: Unregistered; nobody gets it any more.
        failures: First loads that failed in a row.
        retry_at_s: Until then, a request is refused with `error` at once.
        idle_tick: The tick at the last look for idleness, and `idle_since_s` when it was first seen.
    """

    spec: ModelSpec
    generation: int = 0
    loading: Loading = Loading.UNLOADED
    parts: tuple[str, ...] = ()
    limit: int = 0
    onload_bytes: int = 0
    is_dispatched: bool = False
    too_large: Room | None = None
    whole_only: str = ""
    type_name: str = ""
    gate_is_open: bool = False
    gate_is_watched: bool = False
    workspace_charged: bool = False
    workspace_covered_by: int = 0
    is_leaving: bool = False
    failures: int = 0
    retry_at_s: float = 0.0
    error: Exception | None = None
    idle_tick: int = -1
    idle_since_s: float = 0.0

    @property
    def workspace_bytes(self) -> int:
        """What it takes of the top tier beside its parts, while it is in use."""
        return self.spec.workspace_bytes + (self.onload_bytes if self.is_dispatched else 0)

    @property
    def lease_limit(self) -> int:
        """Leases at a time; 0 is unlimited. A forward of a dispatched model takes away what another one would use."""
        return 1 if self.is_dispatched else self.limit

    def copy(self) -> Model:
        """A record of its own with the same facts."""
        twin = object.__new__(Model)
        twin.spec, twin.generation, twin.loading, twin.parts = self.spec, self.generation, self.loading, self.parts
        twin.limit, twin.onload_bytes, twin.is_dispatched = self.limit, self.onload_bytes, self.is_dispatched
        twin.too_large, twin.whole_only, twin.type_name = self.too_large, self.whole_only, self.type_name
        twin.gate_is_open, twin.gate_is_watched = self.gate_is_open, self.gate_is_watched
        twin.workspace_charged, twin.workspace_covered_by = self.workspace_charged, self.workspace_covered_by
        twin.is_leaving, twin.failures, twin.error = self.is_leaving, self.failures, self.error
        twin.retry_at_s, twin.idle_tick, twin.idle_since_s = self.retry_at_s, self.idle_tick, self.idle_since_s
        return twin


@dataclass(slots=True)
class Waiting:
    """One ticket: what is wanted, what was claimed for it, and how long it has been overtaken.

    Attributes:
        claims: Bytes claimed and not yet reserved. `None`: there is no plan.
        planned: A plan was made for it at least once.
        overtaken: Leases that went to others while this one waited for them.
        attempts: Plans thwarted by a busy gate since the last event.
        freed: What was given up for it so far.
        is_behind: It is not planned for, because of those who came before it.
        blocked_on: The models whose leases it waits for.
        why: What it waits for, for people.
    """

    ticket: int
    want: Want
    claims: Room | None = None
    planned: bool = False
    overtaken: int = 0
    attempts: int = 0
    freed: Room = field(default_factory=Room)
    is_behind: bool = False
    blocked_on: tuple[str, ...] = ()
    why: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The models it is about."""
        match self.want:
            case WantLease(names=names):
                return names
            case WantCopy(name=name) | WantDown(name=name) | WantGone(name=name):
                return (name,)
            case _:
                return ()

    @property
    def label(self) -> str:
        """What it is about, for people."""
        return " + ".join(self.names) or "room"

    def copy(self) -> Waiting:
        """A record of its own with the same facts."""
        twin = object.__new__(Waiting)
        twin.ticket, twin.want, twin.claims, twin.planned = self.ticket, self.want, self.claims, self.planned
        twin.overtaken, twin.attempts, twin.freed = self.overtaken, self.attempts, self.freed
        twin.is_behind, twin.blocked_on, twin.why = self.is_behind, self.blocked_on, self.why
        return twin


@dataclass(slots=True)
class Books:
    """Everything the planner reads: parts, models and accounts. Written by the machine alone.

    `resident` has the parts that a tier above disk holds; `in_use` those that the top tier holds anything of, or of
    whose models it holds the workspace (be the part there or not), and perhaps some more.
    """

    top: Tier
    vram: Account
    ram: Account
    disk: Account
    parts: dict[str, Part] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    resident: ByUse = field(default_factory=ByUse)
    in_use: ByUse = field(default_factory=ByUse)

    def account(self, tier: Tier) -> Account:
        """The account of a tier."""
        if tier is Tier.VRAM:
            return self.vram
        return self.ram if tier is Tier.RAM else self.disk

    def parts_of(self, names: Iterable[str]) -> Iterator[Part]:
        """The parts of some models, each once, in order."""
        seen: set[str] = set()
        for name in names:
            for part in self.models[name].parts:
                if part not in seen:
                    seen.add(part)
                    yield self.parts[part]

    def may_change_form(self, model: Model) -> bool:
        """Whether it has two forms and nothing of it is on its way, in VRAM of its offloaded parts, or charged."""
        parts = [self.parts[part] for part in model.parts]
        is_fixed = model.workspace_charged or model.workspace_covered_by
        if self.top is not Tier.VRAM or is_fixed or not any(part.facts.offloaded for part in parts):
            return False
        return not any(part.flight or part.covered_by or (part.facts.offloaded and part.vram) for part in parts)

    def take_form(self, model: Model, *, dispatched: bool) -> None:
        """From now on it is usable whole, or with its offloaded parts in RAM."""
        model.is_dispatched = dispatched
        for part in (self.parts[part] for part in model.parts):
            if part.facts.offloaded:
                part.top = Tier.RAM if dispatched else self.top

    def is_up(self, model: Model) -> bool:
        """Loaded, whole on the top tier, and nothing of it in flight."""
        return model.loading is Loading.LOADED and all(
            self.parts[part].is_up and self.parts[part].flight is None for part in model.parts
        )

    def state_of(self, model: Model) -> State:
        """The state of a model: that of the part furthest from ready."""
        if model.loading is Loading.LOADING:
            return State.STAGING
        if model.loading is Loading.FAILED:
            return State.FAILED
        if model.loading is Loading.UNLOADED:
            return State.COLD
        parts = [self.parts[part] for part in model.parts]
        states = [part.state for part in parts]
        for state in (State.TRIMMING, State.STAGING, State.PROMOTING, State.COLD):
            if state in states:
                return state
        if all(state is State.READY for state in states):
            return State.READY
        # What a dispatch keeps in RAM is where it belongs, whether the rest is on the device or not.
        moving = [part.state for part in parts if part.top is self.top]
        return State.PARKED if all(state is State.PARKED for state in moving) else State.PARTIAL

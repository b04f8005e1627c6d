"""What a cache should say of itself, kept in the plainest way: who is registered, who holds what, who waits for what.

It decides nothing about victims or order. It knows what may never be, and, of quiet moments, what must be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stateful.stage import Asked

from modelcache import errors
from modelcache.spec import OnWrite
from modelcache.testing import FakeModel
from modelcache.testing.models import FakePart
from modelcache.tier import Tier

#: Parts that several models may hold, by label.
SHARED = {"shared-x": (100,), "shared-y": (7, 300)}
#: What the errors that a test injects say.
INJECTED = "injected"


@dataclass(eq=False)
class Known:
    """One registration, and the object that its loader built last."""

    name: str
    sizes: dict[str, tuple[int, ...]]
    workspace: int = 0
    reload: bool = True
    on_write: OnWrite = OnWrite.WRITEBACK
    concurrency: int = 0
    priority: str = "normal"
    pin: Tier | None = None
    idle: str | None = None
    sized: bool = True
    fails: int = 0
    model: FakeModel | None = None
    num_loads: int = 0
    ever_failed: bool = False
    #: Its loader has raised, and nobody has looked yet at who was told.
    has_failed_now: bool = False
    #: The moment of its last use, counted in rules; equal for those used in one.
    used: int = 0
    #: The last moment when it may have been granted to somebody who gave it back unused: perhaps its last use.
    used_perhaps: int = 0

    def load(self) -> FakeModel:
        self.num_loads += 1
        if self.fails:
            self.fails -= 1
            self.ever_failed = self.has_failed_now = True
            raise ValueError(INJECTED)
        self.model = FakeModel(parts=self.sizes) if list(self.sizes) != [""] else FakeModel(*self.sizes[""])
        return self.model

    @property
    def size(self) -> int:
        return sum(map(sum, self.sizes.values()))

    @property
    def shares(self) -> bool:
        return any(self.sizes)


@dataclass(eq=False)
class Held:
    """Something that somebody has: open leases, a handle with its first use to come, or reserved room."""

    kind: str
    who: str
    thing: Any
    known: tuple[Known, ...] = ()
    models: tuple[FakeModel, ...] = ()
    first_until_s: float | None = None

    def num_leases(self, now_s: float) -> int:
        """How many leases it is on each of its models."""
        if self.kind == "handle":
            return int(self.first_until_s is not None and now_s < self.first_until_s)
        return int(self.kind != "room")

    def __repr__(self) -> str:
        return f"<{self.who} holds {self.kind} {' + '.join(known.name for known in self.known)}>"


@dataclass
class Past:
    """What happened in the life of a cache that may make it refuse what it would not otherwise."""

    faults: bool = False
    kept: bool = False
    written: bool = False
    mutable: bool = False
    poison: bool = False


@dataclass
class Reference:
    """The plain model of one cache."""

    top: Tier
    target: dict[Tier, int]
    disk: int
    reject: bool
    max_waiters: int
    registered: dict[str, Known] = field(default_factory=dict)
    leaving: dict[str, Known] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    open: list[Asked] = field(default_factory=list)
    bytes_of: dict[FakePart, list[set[bytes]]] = field(default_factory=dict)
    past: Past = field(default_factory=Past)
    moment: int = 0
    is_closed: bool = False

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def everybody(self) -> list[Known]:
        return [*self.registered.values(), *self.leaving.values()]

    def leases_on(self, known: Known, now_s: float) -> int:
        having = sum(held.num_leases(now_s) * held.known.count(known) for held in self.held)
        return having + sum(got is known for asked in self.open for got in asked.got)

    def has_leases(self, now_s: float) -> bool:
        return any(held.num_leases(now_s) for held in self.held) or any(asked.got for asked in self.open)

    @property
    def has_room_held(self) -> bool:
        return any(held.kind == "room" for held in self.held)

    def holds_any(self, who: str) -> bool:
        return any(held.who == who for held in self.held)

    def needs(self, known: Iterable[Known]) -> dict[Tier, int]:
        """What these take together, with nothing else there; parts pass through RAM one by one."""
        parts = {label or each.name: sizes for each in known for label, sizes in each.sizes.items()}
        total, workspace = sum(map(sum, parts.values())), sum(each.workspace for each in known)
        if self.top is Tier.RAM:
            return {Tier.RAM: total + workspace}
        return {Tier.VRAM: total + workspace, Tier.RAM: max(map(sum, parts.values()), default=0)}

    @property
    def may_refuse_room(self) -> bool:
        """Something that is loaded could be unable to make room."""
        past, everybody = self.past, self.everybody
        if past.kept or past.poison or any(each.pin for each in everybody):
            return True
        if past.written and any(each.on_write is OnWrite.REFUSE for each in everybody):
            return True
        needs_disk = past.written or any(not each.reload for each in everybody)
        return needs_disk and 2 * sum(each.size for each in everybody) > self.disk

    @property
    def may_keep(self) -> bool:
        """Something could have stayed where it was: it is tried again after its next use, of which nobody is told."""
        return self.past.kept or (self.past.written and any(k.on_write is OnWrite.REFUSE for k in self.everybody))

    def is_quiet(self, now_s: float) -> bool:
        return not (self.open or self.leaving or self.has_leases(now_s) or self.has_room_held or self.is_closed)

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(self, asked: Asked) -> None:
        asked.candidates = {name: [self.registered[name]] for name in asked.names if name in self.registered}
        asked.was_unknown = len(asked.candidates) < len(set(asked.names))
        if "of" in asked.facts:
            # A handle stands for the object that it was got with, whatever is registered now.
            asked.candidates.setdefault(asked.names[0], []).append(asked.facts["of"])
        asked.least, asked.most = dict(self.target), dict(self.target)
        asked.held_meanwhile = self.holds_any(asked.who) or len(asked.names) > 1
        self.open.append(asked)

    def register(self, known: Known) -> None:
        self.registered[known.name] = known
        for asked in self.open:
            if known.name in asked.names:
                asked.candidates.setdefault(known.name, []).append(known)

    def unregister(self, name: str) -> None:
        self.leaving[name] = self.registered.pop(name)
        for asked in self.open:
            asked.was_unknown |= name in asked.names

    def retarget(self, tier: Tier, size: int) -> None:
        self.target[tier] = size
        for asked in self.open:
            asked.least[tier] = min(asked.least[tier], size)
            asked.most[tier] = max(asked.most[tier], size)

    def must_be_served(self, known: Known, now_s: float) -> bool:
        """Asked for now, in a quiet moment, it must come at once."""
        needs = self.needs((known,))
        fits = all(needs[tier] <= self.target[tier] for tier in needs)
        is_well = not (self.may_refuse_room or known.fails or known.ever_failed)
        # A first load builds the whole model in RAM, so its whole size must fit there.
        return self.is_quiet(now_s) and is_well and fits and known.size <= self.target[Tier.RAM]

    # --- answers ------------------------------------------------------------------------------------------------------

    def is_excused(self, asked: Asked, error: BaseException, now_s: float) -> bool:
        """Whether there was a reason for this error."""
        candidates = [known for each in asked.candidates.values() for known in each]
        match type(error):
            case errors.CacheClosedError:
                return self.is_closed
            case errors.UnknownModelError:
                return asked.was_unknown
            case errors.LeaseTimeoutError:
                return asked.is_late(now_s) or asked.facts.get("later") is not None
            case errors.ModelTooLargeError:
                return self._is_too_large(asked, asked.least) or any(k.size > asked.least[Tier.RAM] for k in candidates)
            case errors.BudgetExhaustedError:
                return not asked.must_succeed
            case errors.QueueFullError:
                return self.max_waiters < 512
            case errors.LeaseCycleError:
                return asked.held_meanwhile
            case errors.LeaseClosedError:
                return asked.kind in ("call", "enter") and asked.facts["of"] is not self.registered.get(asked.names[0])
            case errors.LeaseError:
                return asked.kind in ("down", "free") and (any(known.pin for known in candidates) or self.past.mutable)
            case errors.DevicePoisonedError:
                return self.past.poison
            case errors.LoaderError | errors.MoveError | errors.DeviceMemoryError:
                return INJECTED in str(error) and (self.past.faults or any(k.ever_failed for k in candidates))
            case _:
                return asked.is_cancelled

    def _is_too_large(self, asked: Asked, budgets: dict[Tier, int]) -> bool:
        if "sizes" in asked.facts:
            return any(size > budgets[tier] for tier, size in asked.facts["sizes"].items())
        needs = self.needs([each[-1] for each in asked.candidates.values()])
        return any(needs[tier] > budgets[tier] for tier in needs)

    def could_fit(self, asked: Asked) -> bool:
        """Whether its models ever fitted the top tier while it was asked for; they may be there without a twin in RAM."""
        return self.needs([each[-1] for each in asked.candidates.values()])[self.top] <= asked.most[self.top]

    def known_as(self, asked: Asked, name: str, model: FakeModel) -> Known:
        """The registration that this object came from, one of those valid while it was asked for."""
        found = [known for known in asked.candidates.get(name, ()) if known.model is model]
        assert found, f"{asked} got {model.name!r}, which was not registered as {name!r} while it waited"
        return found[0]

    # --- contents -----------------------------------------------------------------------------------------------------

    def learn(self, model: FakeModel) -> None:
        """Parts not seen before hold what their loader built."""
        for part in model.parts:
            self.bytes_of.setdefault(part, [{bytes(segment)} for segment in part.source])

    def wrote(self, part: FakePart, segment: int, data: bytes) -> None:
        """The bytes of a segment are others from now on; where writes are discarded, perhaps the old ones again."""
        old = self.bytes_of[part][segment]
        new = {(data + each[len(data) :])[: len(each)] for each in old}
        self.bytes_of[part][segment] = old | new if part.on_write is OnWrite.DISCARD else new
        self.past.written = True
        self.past.mutable |= part.on_write is not OnWrite.DISCARD

    def require_bytes(self) -> None:
        """Whatever a tier above disk holds of a model is what it was built with or what was written."""
        for part, segments in self.bytes_of.items():
            for i, expected in enumerate(segments):
                now = part.bytes_of(i) if part.models else None
                assert now is None or bytes(now) in expected, f"segment {i} of {part.part} has other bytes"

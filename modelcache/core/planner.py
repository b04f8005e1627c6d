"""From a need in bytes to one complete set of victims, or a refusal with its reason.

Pure: asked speculatively, it changes nothing. Nobody is given up unless what is given up suffices.

Where VRAM is short, candidates are trimmed from the tail, only as many segments as needed; a trim whose bytes are not
in RAM needs room there too. Where RAM is short, the duplicates of segments that VRAM holds go first, then whole
copies: dropped if their bytes can be read again, else spilled to an image file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import chain

from modelcache.core.ledger import Room
from modelcache.core.policy import Candidate, EvictionPolicy
from modelcache.core.recency import ByUse
from modelcache.core.records import Books, GateReading, Model, Part
from modelcache.move import Residency
from modelcache.tier import Tier

#: What makes copies from a callable loader evictable.
SPILL_HINT = " (a loader that may be called again: reload=True; or a budget for image files: budgets.disk)"


@dataclass(frozen=True, slots=True)
class Giving:
    """What one part gives up for a plan."""

    part: str
    after: Residency
    needs: Room
    frees: Room
    write_image: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete victim set.

    Attributes:
        needs: The bytes asked for.
        givings: One move for each part that gives something up.
        workspaces: Idle models that lose only their workspace, or that too.
        gates: The models whose gates must be closed and found empty first.
    """

    needs: Room
    givings: tuple[Giving, ...]
    workspaces: tuple[str, ...]
    gates: tuple[str, ...]


class Cause(Enum):
    """Why there is no plan."""

    TOO_LARGE = "too large"  # exceeds the whole budget
    BUSY = "busy"  # what could go is leased, moving or promised: it may become free
    HELD = "held"  # what is there may never go: pins, copies that nothing could bring back


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a need cannot be met now."""

    cause: Cause
    tier: Tier
    needed_bytes: int
    free_bytes: int
    leased: tuple[str, ...] = ()
    reason: str = ""


class _Draft:
    """A plan in the making: what was taken so far, per tier."""

    def __init__(self, books: Books, needs: Room) -> None:
        self.books = books
        self.needs = needs
        self.givings: dict[str, Giving] = {}
        self.workspaces: dict[str, None] = {}
        self.vram = books.vram.available_bytes - needs.vram
        self.ram = books.ram.available_bytes - needs.ram
        self.disk = books.disk.available_bytes - needs.disk

    def take(self, part: Part, after: Residency, *, write_image: bool = False) -> None:
        """Let a part give up everything between where it is and `after`; a later call for it replaces an earlier."""
        self.untake(part)
        held, kept = part.room(part.residency), part.room(after)
        needs = Room(
            ram=max(0, kept.ram - held.ram),
            disk=part.facts.image_bytes if write_image else 0,
        )
        frees = Room(vram=held.vram - kept.vram, ram=max(0, held.ram - kept.ram))
        self.givings[part.facts.part] = Giving(part.facts.part, after, needs, frees, write_image)
        self.vram += frees.vram
        self.ram += frees.ram - needs.ram
        self.disk -= needs.disk

    def untake(self, part: Part) -> None:
        """Undo `take`."""
        giving = self.givings.pop(part.facts.part, None)
        if giving is not None:
            self.vram -= giving.frees.vram
            self.ram -= giving.frees.ram - giving.needs.ram
            self.disk += giving.needs.disk

    def ram_left(self, part: Part) -> int:
        """What giving a part up whole would free in RAM beyond what was taken of it so far."""
        giving = self.givings.get(part.facts.part)
        taken = giving.frees.ram - giving.needs.ram if giving is not None else 0
        return part.room(part.residency).ram - taken

    def take_workspace(self, model: Model) -> None:
        """Let an idle model give up its workspace."""
        name, size = model.spec.name, model.workspace_bytes
        if not model.workspace_charged or name in self.workspaces:
            return
        self.workspaces[name] = None
        if self.books.top is Tier.VRAM:
            self.vram += size
        else:
            self.ram += size

    def finish(self) -> Plan:
        """The plan, and the gates it needs closed: every open gate in front of what it takes."""
        touched = dict(self.workspaces)
        for part in self.givings:
            touched.update(dict.fromkeys(self.books.parts[part].models))
        gates = tuple(name for name in touched if self.books.models[name].gate_is_open)
        return Plan(self.needs, tuple(self.givings.values()), tuple(self.workspaces), gates)


class Planner:
    """Finds victims in `books`, as `policy` ranks them and `gates` date them."""

    def __init__(self, books: Books, gates: Mapping[str, GateReading], policy: EvictionPolicy) -> None:
        self._books = books
        self._gates = gates
        self._policy = policy

    def plan(
        self, needs: Room, may_take: Callable[[str], bool], spare: Iterable[str] = (), names: Iterable[str] = ()
    ) -> Plan | Refusal:
        """A complete victim set for `needs`, or why there is none now.

        Args:
            needs: Bytes wanted free, per tier.
            may_take: Whether a model may lose something now: not leased, not promised to somebody else.
            spare: Parts that must not be given up for this: what it is for.
            names: The models that it is for, whose parts those are.
        """
        spared = frozenset(spare)
        draft = _Draft(self._books, needs)
        result = self._complete(draft, may_take, spared)
        if isinstance(result, Refusal) and self._take_workspaces_of_sharers(draft, may_take, spared, frozenset(names)):
            return draft.finish()
        return result

    def _take_workspaces_of_sharers(
        self, draft: _Draft, may_take: Callable[[str], bool], spared: frozenset[str], names: frozenset[str]
    ) -> bool:
        """Last, the workspaces of idle models that hold the spared parts too; whether that is enough."""
        for name in {name: None for part in spared for name in self._books.parts[part].models}:
            if name not in names and self._may_lose_workspace(self._books.models[name]) and may_take(name):
                draft.take_workspace(self._books.models[name])
        return draft.vram >= 0 and draft.ram >= 0 and draft.disk >= 0

    def _may_lose_workspace(self, model: Model) -> bool:
        may_leave = self.may_leave_vram if self._books.top is Tier.VRAM else self.may_leave_whole
        return any(may_leave(self._books.parts[part]) for part in model.parts)

    def plan_toward_target(self, may_take: Callable[[str], bool]) -> Plan:
        """Whatever may go now of what lowered budgets no longer cover, be it enough or not."""
        draft = _Draft(self._books, Room())
        ram = min(0, draft.ram)
        self._free(draft, may_take, frozenset())
        for giving in reversed(tuple(draft.givings.values())):
            # What would go to RAM stays where it is when nothing there makes room for it.
            if draft.ram < ram and giving.needs.ram:
                draft.untake(self._books.parts[giving.part])
        return draft.finish()

    def plan_down(self, parts: Iterable[Part], tier: Tier, may_take: Callable[[str], bool]) -> Plan | Refusal:
        """A plan that gives `parts` up to `tier`, and makes the room that takes; everything is clean or spilled."""
        draft = _Draft(self._books, Room())
        spared = set()
        for part in parts:
            spared.add(part.facts.part)
            for name in part.models:
                draft.take_workspace(self._books.models[name])
            if tier is Tier.RAM and part.vram:
                draft.take(part, Residency(0, 0))
            elif tier is Tier.DISK and not part.is_cold:
                if not part.rereadable and not self.may_spill(part):
                    why = f"its bytes are in no file to read them from again{SPILL_HINT}"
                    return Refusal(Cause.HELD, Tier.DISK, part.facts.image_bytes, max(0, draft.disk), reason=why)
                draft.take(part, Residency(0, part.n), write_image=not part.rereadable)
        return self._complete(draft, may_take, frozenset(spared))

    def could_ever_fit(self, needs: Room, spare: Iterable[str] = (), names: Iterable[str] = ()) -> Refusal | None:
        """`None` if `needs` fit once everything that can go is gone; else what stands in the way for good."""
        spared = frozenset(spare)
        fixed = {Tier.VRAM: 0, Tier.RAM: 0}
        for name in self._books.resident:
            part = self._books.parts[name]
            held = part.room(part.residency)
            if name in spared:
                fixed[Tier.VRAM] += held.vram
                fixed[Tier.RAM] += held.ram if not self._has_spare_twins(part) else 0
                continue
            if self._books.top is Tier.VRAM and not self.may_leave_vram(part):
                fixed[Tier.VRAM] += held.vram
            if not self.may_leave_whole(part) or not (part.rereadable or self.may_spill(part)):
                sheddable = self.may_leave_ram(part) and part.rereadable and self._books.top is Tier.VRAM
                fixed[Tier.RAM] += held.ram if not sheddable else 0
        fixed[self._books.top] += self._workspaces_that_stay(spared, frozenset(names))
        for tier, fixed_bytes in fixed.items():
            target = self._books.account(tier).target_bytes
            if needs.of(tier) > target - fixed_bytes:
                why = "the rest is pinned, or in no file to read it from again" + (
                    SPILL_HINT if tier is Tier.RAM else ""
                )
                return Refusal(Cause.HELD, tier, needs.of(tier), max(0, target - fixed_bytes), reason=why)
        return None

    def _has_spare_twins(self, part: Part) -> bool:
        """Whether it is wholly in VRAM, so that RAM can give up what it has of it even for the model's other parts."""
        if self._books.top is not Tier.VRAM or part.vram < part.n or part.flight is not None or part.covered_by:
            return False
        return part.rereadable and self.may_leave_ram(part)

    def _workspaces_that_stay(self, spared: frozenset[str], names: frozenset[str]) -> int:
        """Charged workspaces of models none of whose parts may go: a workspace is given up with a part.

        One whose parts are still on their way up is not among them: they will be there to give it up with. Nor is one
        that only shares what is spared for others.
        """
        may_leave = self.may_leave_vram if self._books.top is Tier.VRAM else self.may_leave_whole

        def stays(model: Model) -> bool:
            known = [name for name in model.parts if name in spared or name in self._books.resident]
            keeps = spared if model.spec.name in names else frozenset()
            return bool(known) and not any(name not in keeps and may_leave(self._books.parts[name]) for name in known)

        return sum(m.workspace_bytes for m in self._books.models.values() if m.workspace_charged and stays(m))

    def _complete(self, draft: _Draft, may_take: Callable[[str], bool], spared: frozenset[str]) -> Plan | Refusal:
        self._free(draft, may_take, spared)
        needs = draft.needs
        if draft.vram >= 0 and draft.ram >= 0 and draft.disk >= 0:
            return draft.finish()
        tier = Tier.VRAM if draft.vram < 0 else Tier.RAM if draft.ram < 0 else Tier.DISK
        wanted = needs.of(tier)
        short = {Tier.VRAM: draft.vram, Tier.RAM: draft.ram, Tier.DISK: draft.disk}[tier]
        return Refusal(Cause.BUSY, tier, wanted, max(0, wanted + short))

    def _free(self, draft: _Draft, may_take: Callable[[str], bool], spared: frozenset[str]) -> None:
        if self._books.top is Tier.VRAM:
            self._free_vram(draft, may_take, spared)
        self._free_ram(draft, may_take, spared)

    # --- VRAM ----------------------------------------------------------------------------------------------------

    def _free_vram(self, draft: _Draft, may_take: Callable[[str], bool], spared: frozenset[str]) -> None:
        if draft.vram >= 0:
            return
        with self._ranked(self._books.in_use, Tier.VRAM, may_take, spared) as ranked:
            for part in ranked:
                for name in part.models:
                    draft.take_workspace(self._books.models[name])
                if draft.vram < 0 and part.vram:
                    self._trim(draft, part)
                if draft.vram >= 0:
                    return
        for give_up in (self._spill, self._trim_into_ram):
            with self._ranked(self._books.in_use, Tier.VRAM, may_take, spared) as ranked:
                for part in ranked:
                    if part.vram:
                        give_up(draft, part)
                    if draft.vram >= 0:
                        return

    def _trim(self, draft: _Draft, part: Part) -> None:
        """Take tail segments of one part until enough is free; whole to disk if RAM has no room for what it lacks."""
        is_dispatched = any(self._books.models[name].is_dispatched for name in part.models)
        # Nothing of a model that runs from its dispatch is of use before all of it is back.
        keep = 0 if is_dispatched else part.vram
        while keep and part.vram_sums[part.vram] - part.vram_sums[keep] < -draft.vram:
            keep -= 1
        lacking = part.ram_sums[part.ram] - part.ram_sums[min(keep, part.ram)]
        if lacking <= draft.ram or lacking == 0:
            draft.take(part, Residency(keep, min(keep, part.ram)))
        elif self.may_leave_whole(part) and part.rereadable:
            draft.take(part, Residency(0, part.n))
        elif not is_dispatched:
            self._trim_what_ram_holds(draft, part)

    def _spill(self, draft: _Draft, part: Part) -> None:
        """Give one part up to an image file, for want of room in RAM."""
        if not part.rereadable and self.may_leave_whole(part) and part.facts.image_bytes <= draft.disk:
            draft.take(part, Residency(0, part.n), write_image=True)

    def _trim_into_ram(self, draft: _Draft, part: Part) -> None:
        """Give one part up to RAM although that has no room for it: others then give theirs up."""
        draft.untake(part)
        keep = 0 if any(self._books.models[name].is_dispatched for name in part.models) else part.vram
        while keep and part.vram_sums[part.vram] - part.vram_sums[keep] < -draft.vram:
            keep -= 1
        draft.take(part, Residency(keep, min(keep, part.ram)))

    def _trim_what_ram_holds(self, draft: _Draft, part: Part) -> None:
        keep = min(part.ram, part.vram)
        if keep < part.vram:
            draft.take(part, Residency(keep, part.ram))

    # --- RAM -----------------------------------------------------------------------------------------------------

    def _free_ram(self, draft: _Draft, may_take: Callable[[str], bool], spared: frozenset[str]) -> None:
        if draft.ram >= 0:
            return
        if self._books.top is Tier.VRAM:
            self._shed_duplicates(draft, may_take, spared)
        else:
            self._take_workspaces(draft, may_take, spared)
        if draft.ram >= 0:
            return
        with self._ranked(self._books.resident, Tier.RAM, may_take, spared) as ranked:
            for part in ranked:
                self._give_up_whole(draft, part)
                if draft.ram >= 0:
                    return

    def _take_workspaces(self, draft: _Draft, may_take: Callable[[str], bool], spared: frozenset[str]) -> None:
        with self._ranked(self._books.in_use, Tier.RAM, may_take, spared) as ranked:
            for part in ranked:
                for name in part.models:
                    if draft.ram < 0:
                        draft.take_workspace(self._books.models[name])
                if draft.ram >= 0:
                    return

    def _give_up_whole(self, draft: _Draft, part: Part) -> None:
        if self._books.top is Tier.RAM:
            for name in part.models:
                draft.take_workspace(self._books.models[name])
        if part.is_cold or draft.ram >= 0 or not self.may_leave_whole(part):
            return
        if draft.vram >= 0 and draft.ram_left(part) <= 0:
            # All that RAM has of it goes already: giving up what VRAM holds too would bring nothing.
            return
        if part.rereadable:
            draft.take(part, Residency(0, part.n))
        elif part.facts.image_bytes <= draft.disk:
            draft.take(part, Residency(0, part.n), write_image=True)

    def _shed_duplicates(self, draft: _Draft, may_take: Callable[[str], bool], spared: frozenset[str]) -> None:
        """Take the RAM twins of what VRAM goes on holding, if their bytes are on disk too; last those of the spared."""
        own = [self._books.parts[name] for name in sorted(spared) if name in self._books.resident]
        twins = [part for part in own if self._has_spare_twins(part) and all(map(may_take, part.models))]
        with self._ranked(self._books.in_use, Tier.RAM, may_take, spared) as ranked:
            for part in chain(ranked, twins):
                if draft.ram >= 0:
                    return
                self._shed_duplicate(draft, part)

    def _shed_duplicate(self, draft: _Draft, part: Part) -> None:
        if part.facts.part in draft.givings or not part.rereadable or part.ram >= part.vram:
            return
        head = part.ram
        while head < part.vram and part.ram_sums[head] - part.ram_sums[part.ram] < -draft.ram:
            head += 1
        draft.take(part, Residency(part.vram, head))

    # --- who may go -------------------------------------------------------------------------------------------------

    @contextmanager
    def _ranked(
        self, order: ByUse, tier: Tier, may_take: Callable[[str], bool], spared: frozenset[str]
    ) -> Iterator[Iterator[Part]]:
        """The parts of `order` that may give something up of a tier, first to go first; looked at as they are read."""
        books = self._books

        def candidates(names: Iterator[str]) -> Iterator[Candidate]:
            for name in names:
                part = books.parts[name]
                if order is books.in_use and not part.vram and not any(map(self._has_workspace, part.models)):
                    books.in_use.discard(name)
                    continue
                may_leave = self.may_leave_vram(part) if tier is Tier.VRAM else self.may_leave_ram(part)
                if name in spared or part.flight is not None or part.covered_by or not may_leave:
                    continue
                if all(may_take(model) for model in part.models):
                    yield self._candidate(part, tier)

        with closing(order.ranked(self._rank_of)) as names:
            yield (books.parts[c.part] for c in self._policy.rank(candidates(names)))

    def _has_workspace(self, model: str) -> bool:
        return self._books.models[model].workspace_charged

    def _rank_of(self, name: str) -> tuple[int, int]:
        part = self._books.parts[name]
        return max(self._books.models[model].spec.priority.rank for model in part.models), self.tick_of(part)

    def _candidate(self, part: Part, tier: Tier) -> Candidate:
        models = [self._books.models[name] for name in part.models]
        return Candidate(
            part.facts.part,
            max(model.spec.priority.rank for model in models),
            self.tick_of(part),
            part.room(part.residency).of(tier),
        )

    def tick_of(self, part: Part) -> int:
        """When it was last used, as a sequence number."""
        return max((self._gates[name].tick for name in part.models), default=0)

    def may_leave_vram(self, part: Part) -> bool:
        """Whether pins and refused writes let VRAM give it up, leases aside."""
        return Tier.VRAM not in self._pins(part) and not self._is_kept(part)

    def may_leave_ram(self, part: Part) -> bool:
        """Whether they let RAM give up what VRAM holds too."""
        return Tier.RAM not in self._pins(part) and not self._is_kept(part)

    def may_leave_whole(self, part: Part) -> bool:
        """Whether they let every tier above disk give it up."""
        return self._pins(part) <= {None, Tier.DISK} and not self._is_kept(part)

    def may_spill(self, part: Part) -> bool:
        """Whether the disk budget has room for its image file."""
        return part.facts.image_bytes <= self._books.disk.available_bytes

    def _pins(self, part: Part) -> set[Tier | None]:
        return {self._books.models[name].spec.pin for name in part.models}

    def _is_kept(self, part: Part) -> bool:
        return part.kept_tick >= 0 and part.kept_tick == self.tick_of(part)

"""How each kind of ticket is taken one step further. Called by `Machine` only, which owns every record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from modelcache.core.cycles import all_holders, deadlocked, holder_of
from modelcache.core.ledger import Room
from modelcache.core.messages import (
    Done,
    Unload,
    WantBudget,
    WantCopy,
    WantDown,
    WantGone,
    WantLease,
    WantRoom,
)
from modelcache.core.planner import Cause, Giving, Plan, Refusal
from modelcache.core.records import Flight, Loading, Model, Part, Waiting
from modelcache.errors import (
    BudgetExhaustedError,
    CapacityError,
    LeaseCycleError,
    LeaseError,
    ModelTooLargeError,
    UnknownModelError,
)
from modelcache.move import LoadedFacts, Reason, Residency
from modelcache.tier import Tier
from modelcache.units import format_bytes

if TYPE_CHECKING:
    from modelcache.core.machine import Machine

#: A ticket is overtaken at most this often before what it waits for is kept from others.
MAX_OVERTAKEN = 8
#: Once this many tickets of a pass are blocked, those behind them are not planned for.
MAX_BLOCKED_PLANS = 8


class Wants:
    """One step for each ticket, in the order they came; copies that nobody leases yet come last."""

    def __init__(self, machine: Machine) -> None:
        self._m = machine
        self._num_blocked = 0
        self._holders: set[object] | None = None

    def step_all(self) -> None:
        """Take every ticket one step further, until one waits for its gates to answer."""
        self._num_blocked, self._holders = 0, None
        for ticket in sorted(self._m.waiting, key=lambda ticket: _turn(self._m.waiting[ticket])):
            waiting = self._m.waiting.get(ticket)
            if waiting is not None:
                self._step(waiting)
            if self._m.closing is not None:
                return
        self._reach_targets()
        if not self._m.changed and self._m.closing is None:
            self._refuse_who_waits_for_himself()

    def _step(self, waiting: Waiting) -> None:
        match waiting.want:
            case WantLease(names, _):
                self._step_up(waiting, names, self._m.books.top)
            case WantCopy(name, tier):
                top = self._m.books.top
                self._step_up(waiting, (name,), top if tier is Tier.VRAM else tier)
            case WantDown():
                self._step_down(waiting, waiting.want)
            case WantRoom():
                self._step_room(waiting, waiting.want)
            case WantBudget(tier, _):
                self._step_budget(waiting, tier)
            case WantGone(name, holder):
                self._step_gone(waiting, name, holder)
            case _:
                assert_never(waiting.want)

    def _refuse_who_waits_for_himself(self) -> None:
        stuck = deadlocked(self._m, self)
        if stuck is not None:
            victim, cycle = stuck
            self._m.refuse(victim, LeaseCycleError(victim.label, cycle))

    # --- up -------------------------------------------------------------------------------------------------------

    def _step_up(self, waiting: Waiting, names: tuple[str, ...], tier: Tier) -> None:
        m = self._m
        for name in names:
            if name not in m.books.models or m.books.models[name].is_leaving:
                m.refuse(waiting, UnknownModelError(name))
                return
        if m.poison is not None and tier is Tier.VRAM:
            m.refuse(waiting, m.poison)
        elif self._are_loaded(waiting, names):
            if not self._is_there(names, tier):
                self._bring_up(waiting, names, tier)
            if waiting.ticket in m.waiting and m.closing is None and self._is_usable(waiting, names, tier):
                self._finish_up(waiting, names)

    def _are_loaded(self, waiting: Waiting, names: tuple[str, ...]) -> bool:
        m = self._m
        models = [m.books.models[name] for name in names]
        for model in models:
            if model.loading is Loading.FAILED and m.now_s < model.retry_at_s and model.error is not None:
                m.refuse(waiting, model.error)
                return False
            if model.loading in (Loading.UNLOADED, Loading.FAILED):
                error = self._known_too_large(model)
                if error is not None:
                    m.refuse(waiting, error)
                    return False
        want = waiting.want
        inside = want.inside if isinstance(want, WantLease | WantCopy) else None
        # Whoever wants a copy need not wait for it, but of itself it can never have one.
        is_sure = inside in names or isinstance(want, WantLease)
        if inside is not None and is_sure and self._waits_for_loader(names, inside, waiting.ticket, set()):
            cycle = f"the loader of {inside!r} waits for {waiting.label}, whose loader waits for {inside!r}"
            m.refuse(waiting, LeaseCycleError(waiting.label, (cycle,)))
            return False
        for model in models:
            if model.loading in (Loading.UNLOADED, Loading.FAILED):
                m.start_load(model, is_nested=inside is not None)
        behind = m.loading_unsized
        is_behind = behind is not None and behind not in names
        waiting.why = (
            f"the first load of {behind!r} (pass size= to load side by side)" if is_behind else "its first load"
        )
        return all(model.loading is Loading.LOADED for model in models)

    def _waits_for_loader(self, names: Iterable[str], inside: str, before: int, seen: set[str]) -> bool:
        """Whether bringing `names` up needs the loader of `inside` to end; only tickets from `before` this one count.

        So it is the youngest of a circle that sees it, and is refused.
        """
        m = self._m
        for name in names:
            if name == inside:
                return True
            if name in seen or name not in m.loading_names:
                continue
            seen.add(name)
            for other in m.waiting.values():
                is_nested = isinstance(other.want, WantLease) and other.want.inside == name
                if is_nested and other.ticket < before and self._waits_for_loader(other.names, inside, before, seen):
                    return True
        return False

    def _known_too_large(self, model: Model) -> CapacityError | None:
        """Whether a load could only end in a refusal.

        A size above the VRAM budget does not say so for a loader of the user's own: it may dispatch.
        """
        books, size, workspace = self._m.books, model.spec.size_bytes, model.spec.workspace_bytes
        if model.too_large is not None:
            needs = model.too_large
        elif size is None:
            return None
        elif books.top is Tier.RAM:
            needs = Room(ram=size + workspace)
        else:
            needs = Room(size + workspace if model.spec.loader.kind is not None else workspace, size)
        for tier in (Tier.VRAM, Tier.RAM):
            if needs.of(tier) > books.account(tier).target_bytes:
                return self._over_budget(model.spec.name, tier, needs.of(tier))
        return None

    def _over_budget(self, label: str, tier: Tier, needed_bytes: int, detail: str = "") -> CapacityError:
        """Why that much can never be had; where the budget is lowered for a while, why it cannot be had now."""
        account = self._m.books.account(tier)
        if needed_bytes > account.configured_bytes or not account.pressure:
            return ModelTooLargeError(label, str(tier), needed_bytes, account.target_bytes, detail)
        why = account.pressure_on(tier)
        return BudgetExhaustedError(label, str(tier), needed_bytes, account.target_bytes, (), detail, why)

    def loaded(self, model: Model, facts: LoadedFacts) -> None:
        """Take the facts of a first load; a model that no budget could hold is dropped at once."""
        m, name = self._m, model.spec.name
        model.loading, model.failures, model.error = Loading.LOADED, 0, None
        model.type_name = facts.type_name
        model.limit = facts.concurrency if model.spec.concurrency is None else model.spec.concurrency
        model.parts = tuple(part.part for part in facts.parts)
        for part_facts in facts.parts:
            part = m.books.parts.setdefault(part_facts.part, Part(part_facts, m.books.top))
            part.models.append(name)
            # A part that came up for one model is not usable for another before its workspace is charged.
        m.touched[name] = None
        model.onload_bytes, model.whole_only = facts.onload_bytes, facts.whole_only
        error = self._too_large((name,))
        if error is not None and m.books.may_change_form(model):
            m.books.take_form(model, dispatched=True)
            error = self._too_large((name,))
        if error is not None:
            self._unload(model, error)
        else:
            m.arm_idle(model)

    def _unload(self, model: Model, error: CapacityError) -> None:
        # Its bytes are still the loader's. Its size is known now, so that the next request is refused before anything
        # is read. Until they are let go, the load is not over.
        m, name = self._m, model.spec.name
        model.too_large = self._needs_alone((name,))
        known = sum(sum(m.books.parts[part].facts.ram_bytes) for part in model.parts)
        model.spec = replace(model.spec, size_bytes=known)
        m.leave_parts(model)
        model.loading = Loading.LOADING
        m.loading_names[name] = None
        m.emit(Unload(name, model.generation, error))

    def _too_large(self, names: Iterable[str]) -> CapacityError | None:
        m = self._m
        names = tuple(names)
        needs, label = self._needs_alone(names), " + ".join(names)
        if needs.vram > m.books.vram.target_bytes:
            models = [m.books.models[name] for name in names]
            return self._over_budget(label, Tier.VRAM, needs.vram, _detail(needs.vram, models))
        if needs.ram > m.books.ram.target_bytes:
            return self._over_budget(label, Tier.RAM, needs.ram)
        return None

    def _needs_alone(self, names: tuple[str, ...]) -> Room:
        """What `names` take together with nothing else there. Parts pass through RAM one by one, unless they stay."""
        m = self._m
        parts = list(m.books.parts_of(names))
        workspace = sum(m.books.models[name].workspace_bytes for name in names)
        if m.books.top is not Tier.VRAM:
            return Room(ram=sum(part.ram_sums[-1] for part in parts) + workspace)
        vram = sum(part.vram_sums[-1] for part in parts if part.top is Tier.VRAM)
        stays = sum(part.ram_sums[-1] for part in parts if part.top is Tier.RAM)
        return Room(vram + workspace, max([stays, *(part.ram_sums[-1] for part in parts)]))

    def _is_there(self, names: tuple[str, ...], tier: Tier) -> bool:
        m = self._m
        if tier is not m.books.top:
            return all(not part.is_cold and part.flight is None for part in m.books.parts_of(names))
        return all(m.books.is_up(m.books.models[name]) and m.is_charged(m.books.models[name]) for name in names)

    def _is_usable(self, waiting: Waiting, names: tuple[str, ...], tier: Tier) -> bool:
        """Whether what is wanted is there, or on its way for a caller who can start early."""
        if self._is_there(names, tier):
            return True
        if not (isinstance(waiting.want, WantLease) and waiting.want.early):
            return False
        m = self._m
        return all(
            model.loading is Loading.LOADED
            and m.is_charged(model)
            and all(p.is_arriving or (p.is_up and p.flight is None) for p in m.books.parts_of((model.spec.name,)))
            for model in (m.books.models[name] for name in names)
        )

    def _bring_up(self, waiting: Waiting, names: tuple[str, ...], tier: Tier) -> None:
        """Plan for what nobody else brings up, then start every move whose room is free."""
        if waiting.claims is None and not self._plan_up(waiting, names, tier):
            return
        m, mine = self._m, False
        reason = Reason.PREFETCH if isinstance(waiting.want, WantCopy) else Reason.REQUEST
        for part in m.books.parts_of(names):
            if part.covered_by != waiting.ticket:
                continue
            if tier is not m.books.top and not part.is_cold and part.flight is None:
                part.covered_by = 0  # there already, before another part of the same model
                continue
            mine = True
            # Whoever was let in early still holds a lease on a part whose last segments then did not arrive.
            if part.flight is None and not any(m.num_leases(model) for model in part.models):
                if part.ooms and m.flights.is_giving_up_for(waiting):
                    continue  # By the books there is room, but the device said no: what was given up must be gone.
                m.flights.bring_up(part, waiting, tier, reason)
        for name in names:
            model = m.books.models[name]
            if model.workspace_covered_by != waiting.ticket:
                continue
            if m.flights.charge_workspace(name, waiting):
                model.workspace_covered_by = 0
                m.touched[name] = None
            else:
                mine = True
        waiting.why = "its move up"
        if not mine:
            # Everything planned has landed. What is still missing (a RAM budget that holds one part at a time, or a
            # part that was moving when the plan was made) is planned next.
            m.dissolve(waiting)

    def _plan_up(self, waiting: Waiting, names: tuple[str, ...], tier: Tier) -> bool:
        m = self._m
        self._choose_forms(waiting, names, tier)
        needs = self.needs_up(waiting, names, tier)
        if needs is None:
            waiting.why = "a move that another request has started"
            return False
        error = self._too_large(names)
        if error is not None:
            if not self._give_up_offloaded(waiting, names):
                m.refuse(waiting, error)
            return False
        spare = [part.facts.part for part in m.books.parts_of(names)]
        return self._plan(waiting, needs, spare, Reason.LRU)

    def _choose_forms(self, waiting: Waiting, names: tuple[str, ...], tier: Tier) -> None:
        """Whole, unless these can never be there together so: then from their dispatches, as far as they have any."""
        m = self._m
        models = [model for name in names if m.books.may_change_form(model := m.books.models[name])]
        for model in models:
            m.books.take_form(model, dispatched=False)
        if not models:
            return
        spare = [part.facts.part for part in m.books.parts_of(names)]
        needs = self.needs_up(waiting, names, tier)
        never = needs is not None and m.planner.could_ever_fit(needs, spare, names)
        if never or self._too_large(names) is not None:
            for model in models:
                m.books.take_form(model, dispatched=True)

    def is_too_large(self, names: tuple[str, ...]) -> bool:
        """Whether these can never be there together as they are now."""
        return self._too_large(names) is not None

    def _give_up_offloaded(self, waiting: Waiting, names: tuple[str, ...]) -> bool:
        """Let models that came up whole, before a budget was lowered, give up what keeps them so; False if none can."""
        m = self._m
        models = [m.books.models[name] for name in names]
        models = [model for model in models if model.onload_bytes and not model.is_dispatched]
        parts = list(m.books.parts_of(model.spec.name for model in models))
        waiting.why = "its offloaded weights to leave VRAM"
        if any(part.flight is not None or part.covered_by for part in parts):
            return True
        whole = [part for part in parts if part.facts.offloaded and part.vram]
        charged = [model.spec.name for model in models if model.workspace_charged]
        if not all(m.planner.may_leave_vram(part) for part in whole) or not (whole or charged):
            return False
        if whole:
            result = m.planner.plan_down(whole, Tier.RAM, m.may_take(waiting))
            if isinstance(result, Refusal):
                self._no_plan(waiting, result)
            else:
                m.carry_out(waiting, result, Reason.PRESSURE)
                m.dissolve(waiting)
        for name in charged if not whole else ():
            m.flights.give_workspace(name)
            m.changed = True
        return True

    def needs_up(self, waiting: Waiting, names: tuple[str, ...], tier: Tier) -> Room | None:
        """The bytes that bringing `names` up takes beyond what others have planned; `None` if nothing."""
        m = self._m
        top = m.books.top
        vram, rams = 0, []
        for part in self._missing(names, tier):
            if part.top is Tier.VRAM and tier is top:
                vram += part.vram_sums[-1] - part.vram_sums[part.vram]
            if part.is_cold:
                rams.append(part.ram_sums[-1])
        missing = bool(rams or vram) or any(True for _ in self._missing(names, tier))
        workspace = 0
        if tier is top:
            for name in names:
                model = m.books.models[name]
                if not m.is_charged(model) and not model.workspace_covered_by:
                    workspace += model.workspace_bytes
        if not missing and not workspace:
            return None
        if sum(rams) > m.books.ram.target_bytes:
            rams = rams[:1]
        ram = sum(rams)
        return Room(vram + workspace, ram) if top is Tier.VRAM else Room(0, ram + workspace)

    def _missing(self, names: tuple[str, ...], tier: Tier) -> Iterable[Part]:
        for part in self._m.books.parts_of(names):
            there = part.is_up if tier is self._m.books.top else not part.is_cold
            if not there and part.flight is None and not part.covered_by:
                yield part

    def cover(self, waiting: Waiting) -> None:
        """After a plan was committed: what it brings up is its own until it is there."""
        want, m = waiting.want, self._m
        match want:
            case WantLease(names, _):
                tier = m.books.top
            case WantCopy(name, wanted):
                names, tier = (name,), (m.books.top if wanted is Tier.VRAM else wanted)
            case _:
                return
        ram = waiting.claims.ram if waiting.claims else 0
        for part in self._missing(names, tier):
            if part.is_cold:
                if part.ram_sums[-1] > ram:
                    continue
                ram -= part.ram_sums[-1]
            part.covered_by = waiting.ticket
        if tier is m.books.top:
            for name in names:
                model = m.books.models[name]
                if not m.is_charged(model) and not model.workspace_covered_by:
                    model.workspace_covered_by = waiting.ticket

    def _finish_up(self, waiting: Waiting, names: tuple[str, ...]) -> None:
        m = self._m
        if not isinstance(waiting.want, WantLease):
            m.finish(waiting, Done(waiting.ticket, waiting.freed.vram, waiting.freed.ram))
            return
        for name in names:
            model, gate = m.books.models[name], m.gates[name]
            if waiting.want.holder is not None and waiting.want.holder in gate.holders():
                continue  # A second lease for whoever is inside already: making it wait would be waiting for itself.
            if m.is_barred(name, waiting):
                self._block(waiting, (), f"{name!r}, which is promised to a request that came earlier")
                return
            if model.lease_limit and m.num_leases(name) >= model.lease_limit:
                self.wait_for_leases(waiting, (name,))
                return
        m.grant(waiting, names)
        for name in names:
            for other in m.waiting.values():
                if other.ticket < waiting.ticket and name in other.blocked_on:
                    other.overtaken += 1

    def serve(self, part: Part) -> None:
        """Grant what has just come up to those who wait for it: an earlier ticket that lacks room may take it then."""
        m = self._m
        for waiting in list(m.waiting.values()):
            names = waiting.names
            if not isinstance(waiting.want, WantLease) or m.poison is not None or not set(names) & set(part.models):
                continue
            models = [m.books.models.get(name) for name in names]
            is_known = all(model is not None and not model.is_leaving for model in models)
            if is_known and self._is_there(waiting.want.names, m.books.top):
                self._finish_up(waiting, waiting.want.names)

    def is_queued_for(self, name: str) -> bool:
        """Somebody waits for a lease of this model."""
        return any(isinstance(w.want, WantLease) and name in w.want.names for w in self._m.waiting.values())

    # --- plans ----------------------------------------------------------------------------------------------------

    def _plan(self, waiting: Waiting, needs: Room, spare: Iterable[str], reason: Reason) -> bool:
        """Plan and commit; False if the ticket waits or was refused."""
        m, spare = self._m, tuple(spare)
        is_late = self._num_blocked >= MAX_BLOCKED_PLANS or self._is_behind_a_barrier(waiting)
        waiting.is_behind = is_late and not self._is_awaited(waiting)
        if waiting.is_behind:
            self._block(waiting, waiting.blocked_on, "room that is promised to a request that came earlier")
            return False
        result = m.planner.plan(needs, m.may_take(waiting), spare, waiting.names)
        if isinstance(result, Plan):
            return m.carry_out(waiting, result, reason)
        never = m.planner.could_ever_fit(needs, spare, waiting.names)
        self._no_plan(waiting, never or result)
        return False

    def _no_plan(self, waiting: Waiting, refusal: Refusal) -> None:
        m = self._m
        leased = self._leased(waiting)
        gives_up = isinstance(waiting.want, WantCopy) and bool(leased)
        is_vain = not leased and self._is_at_rest(waiting)
        if refusal.cause is Cause.HELD or not m.budgets.wait_when_full or gives_up or is_vain:
            m.refuse(waiting, self._exhausted(waiting, refusal, leased))
            return
        self.wait_for_leases(waiting, leased)
        if pressure := m.books.account(refusal.tier).pressure_on(refusal.tier):
            waiting.why += f"; {pressure}"

    def _is_at_rest(self, waiting: Waiting) -> bool:
        """Whether nobody would ever wake this ticket: nothing is in flight, and nobody came before it."""
        m = self._m
        if m.held or m.loading_names or m.forgetting or not m.flights.is_idle:
            return False
        others = (other for other in m.waiting.values() if other is not waiting)
        return all(_turn(other) > _turn(waiting) and other.claims is None for other in others)

    def _exhausted(self, waiting: Waiting, refusal: Refusal, leased: tuple[str, ...]) -> BudgetExhaustedError:
        pressure = self._m.books.account(refusal.tier).pressure_on(refusal.tier)
        return BudgetExhaustedError(
            waiting.label,
            str(refusal.tier),
            refusal.needed_bytes,
            refusal.free_bytes,
            leased,
            refusal.reason,
            pressure,
        )

    def _leased(self, waiting: Waiting) -> tuple[str, ...]:
        names = dict(self._m.seen_leased)
        for part in self._m.books.resident:
            for name in self._m.books.parts[part].models:
                if self._m.num_leases(name):
                    names[name] = None
        return tuple(names)

    def wait_for_leases(self, waiting: Waiting, names: Iterable[str]) -> None:
        """Wait until one of these models loses a lease."""
        names = tuple(names)
        held = ", ".join(repr(name) for name in names)
        self._block(waiting, names, _awaited(held, bool(self._m.held)))
        if waiting.overtaken >= MAX_OVERTAKEN:
            for name in names:
                self._m.bars.setdefault(name, waiting.ticket)

    def _block(self, waiting: Waiting, names: tuple[str, ...], why: str) -> None:
        self._num_blocked += 1
        self._m.touched.update(dict.fromkeys(waiting.blocked_on))
        self._m.touched.update(dict.fromkeys(names))
        waiting.blocked_on, waiting.why = names, why

    def _is_awaited(self, waiting: Waiting) -> bool:
        """Whether its caller holds a lease that an earlier one waits for: behind that one, both would wait for ever."""
        m, holder = self._m, holder_of(waiting)
        if holder is None:
            return False
        if self._holders is None:
            self._holders = all_holders(m)
        if holder not in self._holders:
            return False
        names = {n for other in m.waiting.values() if _turn(other) < _turn(waiting) for n in other.blocked_on}
        return any(holder in m.gates[name].holders() for name in names if name in m.gates)

    def _is_behind_a_barrier(self, waiting: Waiting) -> bool:
        return any(
            other.ticket < waiting.ticket and other.overtaken >= MAX_OVERTAKEN and other.claims is None
            for other in self._m.waiting.values()
            if isinstance(other.want, WantLease) and other.blocked_on
        )

    def note_overtaking(self, waiting: Waiting, plan: Plan) -> None:
        """Room went to a ticket although an earlier one waits for room."""
        if plan.needs:
            for other in self._m.waiting.values():
                if 0 < other.ticket < waiting.ticket and other.blocked_on and isinstance(other.want, WantLease):
                    other.overtaken += 1

    def giving_failed(self, ticket: int, part: Part, error: Exception | None) -> None:
        """A victim of this ticket's plan stayed where it was: what was claimed is given back, to plan again."""
        waiting = self._m.waiting.get(ticket)
        if waiting is None:
            return
        self._m.dissolve(waiting)
        waiting.planned = False
        if isinstance(waiting.want, WantDown) and error is not None:
            self._m.refuse(waiting, error)

    def give_up_extra(self, flight: Flight) -> None:
        """After the device refused a promotion: let go of as many bytes again, as far as anybody idle has them."""
        m = self._m
        waiting = m.waiting.get(flight.ticket)
        if waiting is None:
            return
        m.dissolve(waiting)
        result = m.planner.plan(
            Room(vram=min(2 * flight.needs.vram, m.books.vram.target_bytes)),
            m.may_take(waiting),
            (flight.move.part,),
        )
        if isinstance(result, Plan):
            m.carry_out(waiting, Plan(Room(), result.givings, result.workspaces, result.gates), Reason.PRESSURE)
            m.dissolve(waiting)

    # --- down -----------------------------------------------------------------------------------------------------

    def _step_down(self, waiting: Waiting, want: WantDown) -> None:
        m = self._m
        model = m.books.models.get(want.name)
        if model is None or model.is_leaving:
            m.refuse(waiting, UnknownModelError(want.name))
            return
        if want.reason is Reason.EXPLICIT and _forbids(model.spec.pin, want.tier):
            m.refuse(waiting, LeaseError(f"{want.name!r} is pinned to {model.spec.pin}; unpin it first"))
            return
        parts = [m.books.parts[part] for part in model.parts]
        if waiting.planned or model.loading is not Loading.LOADED or all(_is_down(p, want.tier) for p in parts):
            if not any(part.flight is not None for part in parts):
                m.finish(waiting, Done(waiting.ticket, waiting.freed.vram, waiting.freed.ram))
            return
        if any(part.flight is not None or part.covered_by for part in parts):
            waiting.why = "a move in flight"
            return
        if not self._are_idle(waiting, parts, want.holder):
            return
        parts = [part for part in parts if not _is_down(part, want.tier)]
        result = m.planner.plan_down(parts, want.tier, m.may_take(waiting))
        if isinstance(result, Refusal):
            if want.reason is Reason.EXPLICIT:
                self._no_plan(waiting, result)
            else:
                m.finish(waiting, Done(waiting.ticket))
            return
        m.carry_out(waiting, result, want.reason)

    def _are_idle(self, waiting: Waiting, parts: list[Part], holder: object) -> bool:
        """Whether no model of these parts is leased; else new leases are kept away until none is."""
        m = self._m
        names = {name: None for part in parts for name in part.models}
        busy = tuple(name for name in names if m.num_leases(name))
        if not busy:
            return True
        if isinstance(waiting.want, WantDown) and waiting.want.reason is Reason.IDLE:
            m.finish(waiting, Done(waiting.ticket))
            return False
        if holder is not None and any(holder in m.gates[name].holders() for name in busy):
            held = ", ".join(repr(name) for name in busy)
            m.refuse(waiting, LeaseCycleError(waiting.label, (f"the caller itself holds a lease on {held}",)))
            return False
        for name in names:
            m.bars.setdefault(name, waiting.ticket)
        self._block(waiting, busy, f"the leases on {', '.join(repr(name) for name in busy)} to be returned")
        return False

    def _step_room(self, waiting: Waiting, want: WantRoom) -> None:
        m = self._m
        account = m.books.account(want.tier)
        needs = Room(**{want.tier.value: want.size_bytes})
        if waiting.claims is None:
            if want.size_bytes > account.target_bytes:
                m.refuse(waiting, self._over_budget("room", want.tier, want.size_bytes))
                return
            reason = Reason.PRESSURE if want.hold else Reason.EXPLICIT
            if not self._plan(waiting, needs, (), reason):
                return
        if account.free_bytes < want.size_bytes:
            waiting.why = "moves in flight"
            return
        if want.hold:
            account.reserve(want.size_bytes)
            waiting.claims = Room()
            m.held[waiting.ticket] = want
        m.finish(waiting, Done(waiting.ticket, waiting.freed.vram, waiting.freed.ram))

    def _step_budget(self, waiting: Waiting, tier: Tier) -> None:
        m = self._m
        if m.books.account(tier).deficit_bytes <= 0:
            m.finish(waiting, Done(waiting.ticket, waiting.freed.vram, waiting.freed.ram))
            return
        parts = m.books.parts.values()
        if any(part.flight is not None and part.flight.ticket == waiting.ticket for part in parts):
            return
        plan = m.planner.plan_toward_target(m.may_take(waiting))
        if plan.givings or plan.workspaces:
            m.carry_out(waiting, plan, Reason.PRESSURE)
        elif m.flights.is_idle:
            # Leases or pins hold the rest. It is given up when they are returned, see `_reach_targets`.
            m.finish(waiting, Done(waiting.ticket, waiting.freed.vram, waiting.freed.ram))

    def _reach_targets(self) -> None:
        """Give up what a lowered budget no longer covers, as soon as leases allow; nobody waits for it."""
        m = self._m
        for tier in (Tier.VRAM, Tier.RAM):
            if m.books.account(tier).available_bytes >= 0 or m.closing is not None:
                continue
            if not any(isinstance(w.want, WantBudget) and w.want.tier is tier for w in m.waiting.values()):
                m.ask_for_target(tier)

    def _step_gone(self, waiting: Waiting, name: str, holder: object) -> None:
        m = self._m
        model = m.books.models.get(name)
        if model is None:
            if name not in m.forgetting:
                m.finish(waiting, Done(waiting.ticket))
            return
        parts = [m.books.parts[part] for part in model.parts]
        if model.loading is Loading.LOADING or any(part.flight is not None for part in parts):
            waiting.why = "a load or move in flight"
            return
        if any(part.covered_by in m.waiting for part in parts if part.covered_by):
            waiting.why = "a move that another request has started"
            return
        if m.num_leases(name):
            self._block(waiting, (name,), f"the leases on {name!r} to be returned")
            return
        own = [part for part in parts if part.models == [name] and not part.is_cold]
        if own:
            givings = tuple(
                Giving(part.facts.part, Residency(0, part.n), Room(), part.room(part.residency)) for part in own
            )
            gates = (name,) if model.gate_is_open else ()
            m.carry_out(waiting, Plan(Room(), givings, (name,), gates), Reason.EXPLICIT, check=False)
            return
        waiting.why = "its bytes to be let go"
        m.forget(model)


def _turn(waiting: Waiting) -> tuple[bool, int]:
    """When it is looked at: in the order they came, copies that nobody leases yet after all others."""
    return isinstance(waiting.want, WantCopy), abs(waiting.ticket)


def _awaited(held: str, is_reserved: bool) -> str:
    if held:
        return f"a lease on {held} to be returned"
    return "room that reserve() holds" if is_reserved else "moves in flight"


def _detail(needed: int, models: list[Model]) -> str:
    workspace = sum(model.spec.workspace_bytes for model in models)
    onloaded = sum(model.onload_bytes for model in models if model.is_dispatched)
    parts = [
        f"weights {format_bytes(needed - workspace - onloaded)}",
        *([f"weights brought in at a time {format_bytes(onloaded)}"] if onloaded else []),
        *([f"workspace {format_bytes(workspace)}"] if workspace else []),
    ]
    whole = [f"runs only whole: {model.whole_only}" for model in models if model.whole_only]
    return "; ".join([" + ".join(parts)] * (len(parts) > 1) + whole)


def _forbids(pin: Tier | None, tier: Tier) -> bool:
    return pin is Tier.VRAM or (pin is Tier.RAM and tier is Tier.DISK)


def _is_down(part: Part, tier: Tier) -> bool:
    return part.is_cold or (tier is Tier.RAM and part.vram == 0)

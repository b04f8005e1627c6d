"""Moves in flight, and their bytes in double entry: nothing starts without its room, nothing ends without its books."""

from __future__ import annotations

from collections.abc import Callable

from modelcache.core.ledger import Account, Room
from modelcache.core.messages import DropImage, Instruction, StartMove
from modelcache.core.planner import Plan
from modelcache.core.records import Books, Flight, Part, Waiting
from modelcache.move import Move, Moved, MoveKind, Reason, Residency
from modelcache.tier import Tier


class Flights:
    """Starts and ends moves in `books`, and says so through `emit`.

    A giving drains its bytes when its plan is committed, and starts when the RAM its write-back needs is free. A
    bringing reserves its room from what its ticket has claimed, as soon as that much is free.
    """

    def __init__(self, books: Books, emit: Callable[[Instruction], None]) -> None:
        self._books = books
        self._emit = emit
        self.pending: dict[str, None] = {}
        self.num_started = 0

    @property
    def is_idle(self) -> bool:
        """Nothing is in flight or about to be."""
        return self.num_started == 0 and not self.pending

    def is_giving_up_for(self, waiting: Waiting) -> bool:
        """Something of the top tier is still on its way out for this ticket."""
        flights = [part.flight for part in self._books.parts.values() if part.flight is not None]
        return any(flight.ticket == waiting.ticket and flight.frees.vram for flight in flights)

    # --- starting -------------------------------------------------------------------------------------------------

    def commit(
        self,
        plan: Plan,
        waiting: Waiting,
        reason: Reason,
        on_behalf_of: str | None,
        unseen: frozenset[str],
    ) -> None:
        """Take the victims of a plan, and claim what it is for; in those `unseen`, writes are looked for first."""
        for name in plan.workspaces:
            self.give_workspace(name)
        for giving in plan.givings:
            part = self._books.parts[giving.part]
            move = Move(
                giving.part,
                part.generation + 1,
                part.residency,
                giving.after,
                part.n,
                write_image=giving.write_image,
                check=giving.part in unseen,
                reason=reason,
                on_behalf_of=on_behalf_of,
            )
            part.begin(move)
            self._books.vram.drain(giving.frees.vram)
            self._books.ram.drain(giving.frees.ram)
            part.flight = Flight(move, giving.needs, giving.frees, waiting.ticket)
            self.pending[giving.part] = None
            waiting.freed += giving.frees
        for giving in plan.givings:
            self._books.ram.claim(giving.needs.ram)
            self._books.disk.claim(giving.needs.disk)
        self._books.vram.claim(plan.needs.vram)
        self._books.ram.claim(plan.needs.ram)
        self._books.disk.claim(plan.needs.disk)
        waiting.claims = (waiting.claims or Room()) + plan.needs
        self.launch()

    def launch(self) -> None:
        """Start every giving whose needs are free by now."""
        for name in list(self.pending):
            part = self._books.parts[name]
            flight = part.flight
            assert flight is not None
            if flight.needs.ram > self._books.ram.free_bytes or flight.needs.disk > self._books.disk.free_bytes:
                continue
            del self.pending[name]
            self._books.ram.reserve(flight.needs.ram)
            self._books.disk.reserve(flight.needs.disk)
            self._start(part, flight)

    def bring_up(self, part: Part, waiting: Waiting, tier: Tier, reason: Reason) -> None:
        """Start the next move of a part towards `tier`, if the room claimed for it is free."""
        claims = waiting.claims
        assert claims is not None
        assert part.flight is None
        if part.is_cold:
            needs, after = Room(ram=part.ram_sums[-1]), Residency(0, 0)
        else:
            assert tier is Tier.VRAM
            needs, after = Room(vram=part.vram_sums[-1] - part.vram_sums[part.vram]), Residency(part.n, part.ram)
        assert needs.vram <= claims.vram
        assert needs.ram <= claims.ram
        if needs.vram > self._books.vram.free_bytes or needs.ram > self._books.ram.free_bytes:
            return
        self._books.vram.reserve(needs.vram)
        self._books.ram.reserve(needs.ram)
        waiting.claims = Room(claims.vram - needs.vram, claims.ram - needs.ram, claims.disk)
        name = next(iter(waiting.names), None)
        move = Move(
            part.facts.part, part.generation + 1, part.residency, after, part.n, reason=reason, on_behalf_of=name
        )
        part.begin(move)
        part.flight = Flight(move, needs, Room(), waiting.ticket)
        self._start(part, part.flight)

    def _start(self, part: Part, flight: Flight) -> None:
        part.generation = flight.move.generation
        flight.started = True
        self.num_started += 1
        self._emit(StartMove(flight.move))

    # --- ending ---------------------------------------------------------------------------------------------------

    def landed(self, part: Part, moved: Moved) -> None:
        """A move was carried out."""
        flight = self._end(part)
        part.arrive(flight.move)
        part.looked_tick = part.clean_tick = -1
        for account, needs, frees in self._sides(flight):
            account.commit(needs)
            account.drained(frees)
        if moved.written:
            part.source_stale = True
            if not flight.move.write_image:
                self.drop_image(part)
        if flight.move.write_image:
            part.has_image, part.image_bytes = True, flight.needs.disk
        if flight.move.kind is MoveKind.PROMOTE:
            part.ooms = 0
        if part.is_cold:
            self._books.resident.discard(part.facts.part)
        else:
            self._books.resident.add(part.facts.part)
            if part.vram:
                self._books.in_use.add(part.facts.part)

    def turned_back(self, part: Part, make_room: Callable[[Tier, int], None]) -> Flight:
        """A move ended where it began; `make_room` gives claims back that counted on what it would have freed."""
        flight = self._end(part)
        for account, needs, _ in self._sides(flight):
            account.cancel(needs)
        self._stays(flight, make_room)
        return flight

    def call_off(self, part: Part, make_room: Callable[[Tier, int], None]) -> Flight:
        """A giving that has not begun does not; see `turned_back`."""
        flight = part.flight
        assert flight is not None
        assert not flight.started
        part.flight = None
        del self.pending[part.facts.part]
        for account, needs, _ in self._sides(flight):
            account.unclaim(needs)
        self._stays(flight, make_room)
        return flight

    def _stays(self, flight: Flight, make_room: Callable[[Tier, int], None]) -> None:
        for tier in (Tier.VRAM, Tier.RAM):
            frees = flight.frees.of(tier)
            if frees:
                make_room(tier, frees)
                self._books.account(tier).undrain(frees)

    def _end(self, part: Part) -> Flight:
        flight = part.flight
        assert flight is not None
        assert flight.started
        part.flight = None
        self.num_started -= 1
        return flight

    def _sides(self, flight: Flight) -> list[tuple[Account, int, int]]:
        return [
            (self._books.account(tier), flight.needs.of(tier), flight.frees.of(tier))
            for tier in (Tier.VRAM, Tier.RAM, Tier.DISK)
        ]

    # --- bytes that no move carries -------------------------------------------------------------------------------

    def charge_workspace(self, name: str, waiting: Waiting) -> bool:
        """Charge the workspace of a model from what its ticket claimed; False while that is not free yet."""
        model, claims = self._books.models[name], waiting.claims
        assert claims is not None
        size, account = model.workspace_bytes, self._books.account(self._books.top)
        if size > account.free_bytes:
            return False
        account.reserve(size)
        account.commit(size)
        model.workspace_charged = True
        # Wherever they are: whoever it was charged for may leave before they come up.
        for part in model.parts:
            self._books.in_use.add(part)
        waiting.claims = (
            Room(claims.vram - size, claims.ram, claims.disk)
            if self._books.top is Tier.VRAM
            else Room(claims.vram, claims.ram - size, claims.disk)
        )
        return True

    def give_workspace(self, name: str) -> None:
        """Give the workspace of an idle model up."""
        model, account = self._books.models[name], self._books.account(self._books.top)
        if model.workspace_charged:
            model.workspace_charged = False
            account.drain(model.workspace_bytes)
            account.drained(model.workspace_bytes)

    def drop_image(self, part: Part) -> None:
        """Forget an image file that no longer describes its part."""
        if part.has_image:
            self._books.disk.drain(part.image_bytes)
            self._books.disk.drained(part.image_bytes)
            part.has_image, part.image_bytes = False, 0
            self._emit(DropImage(part.facts.part))

"""One example: what people do to a cache, what comes of it, and what must hold whenever nothing moves any more."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import islice
from typing import Any, ClassVar

from stateful.reference import INJECTED, Held, Known, Reference
from stateful.stage import Actor, Asked, Stage

from modelcache.core.ledger import Room
from modelcache.core.machine import Machine
from modelcache.core.messages import RoomReturned
from modelcache.errors import BudgetExhaustedError, CapacityError
from modelcache.lease import FIRST_USE_S
from modelcache.testing import FakeModel
from modelcache.tier import Tier

#: Steps that give something up; one that fails marks its part as kept.
DOWN = ("trim", "shed", "evict")


class Play:
    """What is done goes to the cache and to the reference; `look` compares the two."""

    #: How often what came about, over all examples.
    marks: ClassVar[Counter[str]] = Counter()

    def __init__(self, stage: Stage, *, top: Tier, disk: int, reject: bool, max_waiters: int, **options: Any) -> None:
        self.stage = stage
        stage.open(top=top, disk=disk, when_full="reject" if reject else "wait", max_waiters=max_waiters, **options)
        self.cache, self.mover = stage.cache, stage.mover
        self.reference = Reference(top, self._capacities(), disk, reject, max_waiters)
        self.num_told = 0
        self.cache.on("move", self._told)

    def _capacities(self) -> dict[Tier, int]:
        return {tier: self.mover.arenas.of[tier].capacity_bytes for tier in (Tier.VRAM, Tier.RAM)}

    def _held(self) -> Room:
        """What the data plane says it holds."""
        return self.mover.arenas.held

    @property
    def now_s(self) -> float:
        return self.stage.clock.now_s()

    def _told(self, _event: object) -> None:
        """A subscriber that looks at the cache and raises, as subscribers do."""
        self.num_told += 1
        self.cache.status()
        if self.num_told % 3 == 0:
            raise RuntimeError("a subscriber's own error")

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(self, actor: Actor, kind: str, names: tuple[str, ...], act: Callable[[], object], **facts: Any) -> Asked:
        """Let a thread ask for something, and wait until it has it or nothing moves any more."""
        asked = self._noted(kind, names, actor.name, **facts)
        actor.do(asked, act)
        return asked

    def start(self, kind: str, names: tuple[str, ...], body: Callable[[Asked], Any], **facts: Any) -> Asked:
        """Let a task ask for something."""
        asked = self._noted(kind, names, f"task-{self.reference.moment}", **facts)
        self.stage.loop.start(asked, body(asked))
        return asked

    def _noted(self, kind: str, names: tuple[str, ...], who: str, **facts: Any) -> Asked:
        reference = self.reference
        asked = Asked(kind, names, who=who, now_s=self.now_s, **facts)
        asked.is_alone = reference.is_quiet(self.now_s) and self.stage.is_clear
        wanted = [reference.registered[name] for name in names if name in reference.registered]
        if kind in ("lease", "get", "aget", "aenter", "call", "enter") and len(names) == 1 and wanted:
            asked.must_succeed = asked.is_alone and reference.must_be_served(wanted[0], self.now_s)
            asked.must_succeed &= asked.timeout_s is None and asked.facts.get("of", wanted[0]) is wanted[0]
        asked.calls_before = len(self.mover.calls)
        asked.on_top, asked.moment = self._on_top(), self.reference.moment
        reference.ask(asked)
        return asked

    def _on_top(self) -> dict[str, int]:
        """The bytes that each part has on the top tier."""
        known = [known for known in self.reference.everybody if known.model is not None]
        return {part: size for each in known for part, size in self._parts_of(each).items()}

    def _parts_of(self, known: Known) -> dict[str, int]:
        """The parts of a model, and the bytes that each has on the top tier."""
        is_ram = self.reference.top is Tier.RAM
        return {
            part.part: sum(
                size for size, held in zip(part.sizes, part.ram if is_ram else part.vram) if held is not None
            )
            for part in known.model.parts
        }

    def register(self, known: Known) -> None:
        self.cache.register(
            known.name,
            known.load,
            size=known.size if known.sized and known.size else None,
            workspace=known.workspace,
            reload=known.reload,
            on_write=str(known.on_write),
            concurrency=known.concurrency,
            priority=known.priority,
            pin=known.pin.value if known.pin else None,
            idle=known.idle,
        )
        self.reference.register(known)

    def write(self, model: FakeModel, part: int, segment: int, data: bytes) -> None:
        part %= len(model.parts)
        held = model.parts[part]
        segment %= held.num_segments
        data = data[: held.sizes[segment]]
        self.reference.wrote(held, segment, data)
        model.write(data, part=part, segment=segment)

    def prefetch(self, name: str, tier: Tier) -> None:
        asked = self._noted("copy", (name,), "prefetcher")
        try:
            asked.facts["future"] = self.cache.prefetch(name, tier)
        except BaseException as error:
            asked.fail(error)

    def lease(self, names: tuple[str, ...], timeout: float | None) -> Callable[[], object]:
        return partial(self.cache.lease_many, *names, timeout=timeout)

    async def aenter(self, names: tuple[str, ...], timeout_s: float | None, asked: Asked) -> None:
        """Enter one model after the other, and hold them all until told to leave."""
        async with AsyncExitStack() as stack:
            models = []
            for name in names:
                model = await stack.enter_async_context(self.cache.aget(name, timeout=timeout_s))
                models.append(model)
                asked.got.append(self.reference.known_as(asked, name, model))
            leave = asyncio.get_running_loop().create_future()
            asked.answer((models, leave))
            await leave

    async def aget(self, name: str, timeout_s: float | None, _asked: Asked) -> object:
        return await self.cache.aget(name, timeout=timeout_s)

    async def aprefetch(self, name: str, _asked: Asked) -> None:
        await asyncio.wrap_future(self.cache.prefetch(name))

    def cancel(self, asked: Asked) -> None:
        """Cancel a task, or a prefetch that nobody awaits."""
        asked.is_cancelled = True
        if asked in self.stage.loop.tasks:
            self.stage.loop.tasks[asked].cancel()
        else:
            asked.facts["future"].cancel()

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Wait until nothing moves, take what was given, and check everything."""
        self.reference.moment += 1
        self.stage.settle()
        self.collect()
        self.require_all()

    def collect(self) -> None:
        reference = self.reference
        failed = [known for known in reference.everybody if known.has_failed_now]
        for asked in tuple(reference.open):
            self._read_future(asked)
            if len(asked.names) == 1 and any(known in failed for known in asked.candidates.get(asked.names[0], ())):
                is_told = asked.error is not None or asked.kind == "down"
                assert is_told, f"its load failed, and {asked} was not told"
            if not asked.is_open:
                reference.open.remove(asked)
                if asked.error is not None:
                    self._refused(asked, asked.error)
                else:
                    self._served(asked)
        for known in failed:
            known.has_failed_now = False
        for name in tuple(reference.leaving):
            if self.cache._leaving[name].done():
                del reference.leaving[name]

    def _read_future(self, asked: Asked) -> None:
        future = asked.facts.get("future")
        if future is not None and asked.is_open and future.done():
            if future.cancelled():
                asked.fail(asyncio.CancelledError())
            elif (error := future.exception()) is not None:
                asked.fail(error)
            else:
                asked.answer(None)

    def _refused(self, asked: Asked, error: BaseException) -> None:
        self.marks[f"{asked.kind} refused: {type(error).__name__}"] += 1
        for known in (known for each in asked.candidates.values() for known in each):
            known.used_perhaps = self.reference.moment
        assert self.reference.is_excused(asked, error, self.now_s), f"{asked} was refused for no reason: {error}"
        assert not asked.must_succeed, f"{asked} was refused when it could have been served: {error}"
        is_one = asked.is_alone and not asked.got and not self.reference.past.faults
        if isinstance(error, CapacityError) and is_one:
            steps = {step for step, _ in islice(self.mover.calls, asked.calls_before, None)} & set(DOWN)
            if self.reference.past.written:  # what was to go may have proved to be kept
                now = self._on_top()
                steps = {part for part, size in asked.on_top.items() if now.get(part, 0) < size}
            assert not steps, f"{asked} was refused, and others gave something up: {steps}"

    def _served(self, asked: Asked) -> None:
        self.marks[f"{asked.kind} served{' after a wait' * (asked.moment < self.reference.moment - 1)}"] += 1
        value, asked.value = asked.value, None
        if asked.is_alone:
            self._require_oldest_first(asked)
        match asked.kind:
            case "lease":
                self._have(asked, "lease", value, value.models)
            case "get" | "aget":
                self._have(asked, "handle", value, (value.__wrapped__,), self.now_s + FIRST_USE_S)
            case "enter":
                self._have(asked, "entered", asked.facts["handle"], (value,))
            case "aenter":
                models, leave = value
                self._have(asked, "task", leave, tuple(models))
                asked.got.clear()
            case "room":
                self.reference.held.append(Held("room", asked.who, asked.facts["block"]))
            case "call":
                self._used(asked.facts["of"])
        if asked.is_alone and asked.names and asked.kind not in ("copy", "down"):
            could = self.reference.could_fit(asked) or self.reference.may_refuse_room
            assert could, f"{asked} was served, and fits no budget"

    def _have(
        self, asked: Asked, kind: str, thing: object, models: tuple[FakeModel, ...], until_s: float | None = None
    ) -> None:
        known = tuple(self.reference.known_as(asked, name, model) for name, model in zip(asked.names, models))
        for each in known:
            self.reference.learn(each.model)
            if not asked.facts.get("takes_over"):
                self._used(each)
        self.reference.held.append(Held(kind, asked.who, thing, known, models, until_s))

    def _used(self, known: Known) -> None:
        known.used = self.reference.moment

    def _require_oldest_first(self, asked: Asked) -> None:
        """Of what was idle when it was asked for, whatever was given up was used before whatever was not."""
        reference, before = self.reference, asked.on_top
        calls = list(islice(self.mover.calls, asked.calls_before, None))
        only = {"evict"} if reference.top is Tier.RAM else {"trim"}
        if {step for step, _ in calls} & set(DOWN) != only or reference.may_refuse_room or reference.past.faults:
            return
        given_up = {part for step, part in calls if step in DOWN}
        ranks = {"low": 0, "normal": 1, "high": 2}
        idle = {
            part: ((ranks[known.priority], known.used), (ranks[known.priority], max(known.used, known.used_perhaps)))
            for known in reference.everybody
            if known.model is not None and known.name not in asked.names and not known.shares
            for part in self._parts_of(known)
            if before.get(part)
        }
        self.marks["victims compared"] += 1
        kept = [latest for part, (_, latest) in idle.items() if part not in given_up]
        gone = [earliest for part, (earliest, _) in idle.items() if part in given_up]
        assert not kept or not gone or max(gone) <= min(kept), f"{asked}: gave up {given_up}, of {idle}"

    # --- giving back --------------------------------------------------------------------------------------------------

    def give_back(self, held: Held) -> None:
        """Return whatever it is, in the way that it is returned."""
        self.reference.held.remove(held)
        match held.kind:
            case "lease":
                held.thing.close()
            case "room":
                held.thing.__exit__(None, None, None)
            case "entered":
                next(a for a in self.stage.actors if a.name == held.who).do(
                    Asked("exit", who=held.who, now_s=self.now_s), partial(held.thing.__exit__, None, None, None)
                )
            case "task":
                if not held.thing.done():
                    held.thing.set_result(None)
        held.thing, held.models = None, ()

    def drop(self, held: Held) -> None:
        """Let go of the object without returning it."""
        self.reference.held.remove(held)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            held.thing, held.models = None, ()
            gc.collect(0)

    def can_give_back(self, held: Held) -> bool:
        return held.kind != "entered" or next(a for a in self.stage.actors if a.name == held.who).is_free

    # --- what must hold -----------------------------------------------------------------------------------------------

    def require_all(self) -> None:
        cache, reference = self.cache, self.reference
        self.mover.oracle.require_nothing()
        assert cache._driver._bug is None, repr(cache._driver._bug)
        cache._driver.look(self._require_books)
        reference.require_bytes()
        for known in reference.registered.values():
            stats = cache.info(known.name)
            assert stats.num_leases == reference.leases_on(known, self.now_s), (stats, reference.held)
        assert set(cache.names()) == set(reference.registered)
        for held in reference.held:
            if held.kind in ("lease", "entered", "task"):
                for model in held.models:
                    model()
        for asked in reference.open:
            assert not asked.is_late(self.now_s), f"{asked} waits although its time is up"
        if reference.open and not reference.may_keep:
            self._require_no_wake_up_was_lost()
        self._require_nobody_waits_for_nothing()

    def _require_books(self, machine: Machine) -> None:
        machine.validate()
        books, held = machine.books, self._held()
        workspaces = sum(m.workspace_bytes for m in books.models.values() if m.workspace_charged)
        for tier in Tier:
            account = books.account(tier)
            sure = account.resident_bytes + account.draining_bytes - workspaces * (tier is books.top)
            rooms = sum(room.size_bytes for room in machine.held.values() if room.tier is tier)
            moving = account.reserved_bytes - rooms
            assert sure <= held.of(tier) <= sure + moving, (tier, account, held)
        if not self.reference.open and not self.reference.leaving and self.stage.is_clear:
            assert machine.flights.is_idle
            assert not machine.waiting, machine.waiting

    def _require_no_wake_up_was_lost(self) -> None:
        """Whoever waits, waits for something: an event without content changes nothing."""
        before = [asked for asked in self.reference.open if asked.is_open]
        calls = len(self.mover.calls)
        self.cache._driver.tell(RoomReturned(0))
        self.stage.settle()
        woken = [asked for asked in before if not (asked.is_open or self._has_given_up(asked))]
        assert not woken, f"{woken} waited for nothing"
        assert len(self.mover.calls) == calls, f"{list(self.mover.calls)[calls:]} waited for nothing"

    def _has_given_up(self, asked: Asked) -> bool:
        """Whether it is a copy that a lease leaves no room for: of a hit nobody is told before something lands."""
        return asked.kind == "copy" and isinstance(asked.error, BudgetExhaustedError) and bool(self.stage.holds)

    def _require_nobody_waits_for_nothing(self) -> None:
        reference = self.reference
        if self.stage.holds or reference.has_leases(self.now_s) or reference.has_room_held:
            return
        assert not reference.open, f"nothing moves, nothing is leased, and these wait: {reference.open}"
        assert not reference.leaving, f"nobody leases {list(reference.leaving)}, and they are still there"
        if not reference.may_refuse_room and not reference.is_closed:
            self.cache._driver.look(self._require_budgets)

    def _require_budgets(self, machine: Machine) -> None:
        for tier, target in self.reference.target.items():
            resident = machine.books.account(tier).resident_bytes
            assert resident <= target, f"{tier} holds {resident} bytes of {target}, and nobody is there"

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Nothing goes wrong any more and everything is returned: whoever waits is served, and so is whoever comes."""
        self.stage.heal()
        self.look()
        while self.reference.held:
            held = next((held for held in self.reference.held if self.can_give_back(held)), None)
            assert held is not None, f"{self.reference.held} wait for each other: {self.reference.open}"
            self.give_back(held)
            self.look()
        assert not self.reference.open, self.reference.open

    def close(self, *, late_s: float = 0.0) -> None:
        """Close it with everything under way, and require that nothing is left."""
        stage, reference = self.stage, self.reference
        closing = Asked("close", who="closer", now_s=self.now_s)
        reference.is_closed = True
        stage.closer.do(closing, self.cache.close)
        stage.settle()
        if late_s:
            stage.clock.advance(late_s)
            stage.settle()
        self.collect()
        assert not reference.open, f"the cache closes, and these wait: {reference.open}"
        stage.heal()
        stage.settle()
        assert not closing.is_open, "it does not close"
        assert closing.error is None, closing.error
        for held in tuple(reference.held):
            self.give_back(held)
        stage.settle()
        names = {actor.name for actor in (*stage.actors, stage.closer)}
        assert set(stage.pool.thread_names) == names, stage.pool.thread_names
        self.mover.oracle.require_nothing()
        assert not self._held(), self._held()


def injected(step: str) -> BaseException:
    """What is raised where a step is to fail."""
    return OSError(28, INJECTED) if step == "evict" else RuntimeError(INJECTED)

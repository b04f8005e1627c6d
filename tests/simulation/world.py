"""One schedule: a real cache over simulated threads, a few callers with random programs, and what must hold throughout.

The driver, links, waiters, herald, doors and leases are those that ship. A task of the simulation counts as a thread:
the names under which the shipped code asks who runs are pointed at the scheduler for the length of a schedule.
"""

from __future__ import annotations

import atexit
import gc
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

from simulation.ports import SimClock, SimPool
from simulation.scheduler import Scheduler, Task

import modelcache.cache
import modelcache.door
import modelcache.handle
import modelcache.lease
import modelcache.runtime.driver
from modelcache.errors import (
    CacheClosedError,
    CapacityError,
    DeviceMemoryError,
    LeaseCycleError,
    LeaseError,
    LeaseTimeoutError,
    LoaderError,
    ModelCacheError,
    ModelNotResidentError,
    MoveError,
    UnknownModelError,
)
from modelcache.futures import MoveFuture
from modelcache.runtime.gate import Gate
from modelcache.testing import FakeModel, FakeMover, cache_of
from modelcache.tier import Tier

VRAM, RAM, DISK = 40, 70, 60
EXPECTED = (
    CacheClosedError,
    CapacityError,
    LeaseCycleError,
    LeaseError,
    LeaseTimeoutError,
    LoaderError,
    MoveError,
    UnknownModelError,
)
SIZES = {"a": (10, 10), "b": (20,), "c": (5, 5, 5), "d": (15, 10)}


class SimMover(FakeMover):
    """Every step takes a while, and in half of the schedules some of them fail."""

    def __init__(self, scheduler: Scheduler, pool: SimPool, marks: Counter[str]) -> None:
        super().__init__(pool, vram_bytes=VRAM, ram_bytes=RAM, disk_bytes=DISK)
        self._scheduler = scheduler
        self._marks = marks
        draw = scheduler.random
        # Each kind of fault is on in half of the faulty schedules, so that rare combinations meet.
        self.faults = [kind for kind in ("load", "move", "memory") if draw.random() < 0.5] * (draw.random() < 0.5)

    def _reach(self, step: str, names: object) -> None:
        scheduler = self._scheduler
        scheduler.note(f"{step} of {sorted(names)} begins")
        scheduler.sleep(scheduler.random.choice((0.0, 0.0, 0.1, 1.0, 3.0)), step)
        self._marks[f"{step} carried out"] += 1
        if self.faults and scheduler.random.random() < 0.15:
            fault = scheduler.random.choice(self.faults)
            if fault == "load" and step == "load":
                self._marks["load fails"] += 1
                raise LoaderError(next(iter(names)), "a loader", "injected")
            if fault == "memory" and step == "promote":
                self._marks["device out of memory"] += 1
                raise DeviceMemoryError(next(iter(names)), "fake:0", 1, 0)
            if fault == "move" and step in ("stage", "promote", "trim", "evict"):
                self._marks[f"{step} fails"] += 1
                raise MoveError(next(iter(names)), "here", "there", "injected")
        super()._reach(step, names)


@contextmanager
def threads_of(scheduler: Scheduler, pool: SimPool) -> Generator[None]:
    """Let a task count as a thread, and every read and write at a gate be a place to switch."""
    outside = SimpleNamespace(name="outside")

    def here() -> Task | SimpleNamespace:
        return scheduler.current or outside

    class SwitchingGate(Gate):
        __slots__ = ("_is_closed",)

        @property
        def closed(self) -> bool:
            scheduler.switch("gate read")
            return self._is_closed

        @closed.setter
        def closed(self, is_closed: bool) -> None:
            self._is_closed = is_closed
            scheduler.switch("gate write")

    def result(future: MoveFuture, timeout: float | None = None) -> None:
        scheduler.wait(future.done, "future")
        Future.result(future, 0)

    asking = SimpleNamespace(get_ident=lambda: id(here()), current_thread=here, Lock=pool.lock)
    with ExitStack() as patches:
        for module, names in (
            (modelcache.door, {"current_thread": here, "current_holder": here, "threading": asking}),
            (modelcache.handle, {"current_thread": here, "get_ident": asking.get_ident}),
            (modelcache.cache, {"threading": asking}),
            (MoveFuture, {"result": result}),
            (modelcache.runtime.driver, {"get_ident": asking.get_ident, "Gate": SwitchingGate}),
        ):
            for name, stand_in in names.items():
                patches.enter_context(patch.object(module, name, stand_in))
        yield


class Schedule:
    """One seed, played to its end."""

    def __init__(self, seed: int, marks: Counter[str] | None = None) -> None:
        self.marks: Counter[str] = Counter() if marks is None else marks
        self.scheduler = Scheduler(seed)
        self.random = self.scheduler.random
        self.pool = SimPool(self.scheduler)
        self.mover = SimMover(self.scheduler, self.pool, self.marks)
        self.cache = None
        self.expected: dict[str, bytes] = {}
        self.unfinished: set[str] = set()
        self.is_closing = False

    def play(self) -> None:
        """Run it; an `AssertionError` says what did not hold, when, and how to see it again."""
        gc.disable()
        try:
            with threads_of(self.scheduler, self.pool):
                self._play()
        except BaseException as error:
            raise AssertionError(self._report(error)) from error
        finally:
            gc.enable()
            if self.cache is not None:
                atexit.unregister(self.cache.close)

    def _play(self) -> None:
        scheduler = self.scheduler
        self.cache = cache = cache_of(
            self.mover, SimClock(scheduler), self.pool, ram=RAM, vram=VRAM, disk=DISK, max_waiters=16
        )
        gates = cache._driver.gates

        def leases_of(name: str) -> tuple[int, ...]:
            # A caller who was refused shows for an instant: let it go on.
            scheduler.step_back("look at leases")
            gate = gates.get(name)
            return () if gate is None else tuple(gate.open.copy())

        self.mover.leases_of = leases_of
        scheduler.watch = self._watch
        cache.on("move", lambda event: self.marks.update([f"{event.kind} because of {event.reason}"]))
        for name in SIZES:
            self._register(name)
        for number in range(self.random.randint(2, 4)):
            self._start(f"caller-{number}", self._program())
        if self.random.random() < 0.2:
            self._start("early closer", [self._close_early])
        scheduler.run()
        self._at_rest()
        self.is_closing = True
        self._start("closer", [cache.close])
        scheduler.run()
        self._after_the_end()

    def _register(self, name: str) -> None:
        sizes = SIZES[name]
        self.cache.register(name, lambda: FakeModel(*sizes), size=sum(sizes), reload=name != "c")

    def _start(self, name: str, steps: list[Callable[[], None]]) -> None:
        def run() -> None:
            for step in steps:
                self._do(name, step)
            self.unfinished.discard(name)

        self.unfinished.add(name)
        self.scheduler.spawn(name, run)

    def _do(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except EXPECTED as error:
            is_for_the_end = isinstance(error, (CacheClosedError, ModelNotResidentError))
            assert self.is_closing or not is_for_the_end, f"{name} got {error!r} before the end"
            self.marks[f"refused: {type(error).__name__}"] += 1
            self.scheduler.note(f"got {type(error).__name__}")
        except ModelCacheError as error:
            raise AssertionError(f"{name} got an error nobody expects: {error!r}") from error

    # --- programs -------------------------------------------------------------------------------------------------

    def _program(self) -> list[Callable[[], None]]:
        draw = self.random
        steps: list[Callable[[], None]] = []
        for _ in range(draw.randint(2, 6)):
            name, other = draw.sample(sorted(SIZES), 2)
            timeout_s = draw.choice((None, None, None, 0.5, 2.0))
            hold_s = draw.choice((0.0, 0.0, 0.5, 2.5))
            steps.append(
                draw.choices(
                    (
                        lambda n=name, t=timeout_s, h=hold_s: self._use((n,), t, h),
                        lambda n=name, o=other, t=timeout_s, h=hold_s: self._use((n, o), t, h),
                        lambda n=name, t=timeout_s: self._get(n, t),
                        lambda n=name: self._prefetch(n),
                        lambda n=name, t=timeout_s: self._mark("park", self.cache.park, n, timeout=t),
                        lambda n=name, t=timeout_s: self._mark("evict", self.cache.evict, n, timeout=t),
                        lambda t=timeout_s: self._mark("free", self.cache.free, vram=20, timeout=t),
                        lambda t=timeout_s, h=hold_s: self._reserve(t, h),
                        lambda: self._resize(draw.choice((20, 30, VRAM))),
                        lambda n=name: self._pin(n),
                        lambda n=name, h=hold_s: self._write(n, h),
                        self._register_again,
                    ),
                    (10, 3, 5, 2, 2, 2, 1, 1, 1, 1, 3, 1),
                )[0]
            )
        return steps

    def _mark(self, what: str, do: Callable[..., object], *args: object, **options: object) -> None:
        self.scheduler.note(f"asks for {what} {args}")
        do(*args, **options)
        self.marks[f"{what} done"] += 1

    def _use(self, names: tuple[str, ...], timeout_s: float | None, hold_s: float) -> None:
        self.scheduler.note(f"wants {' and '.join(names)} within {timeout_s}")
        with self.cache.lease_many(*names, timeout=timeout_s) as models:
            self.marks["two leased together" if len(names) > 1 else "one leased"] += 1
            for name, model in zip(names, models, strict=True):
                model(lambda: self._hold(hold_s))
                self._check_bytes(name, model)

    def _hold(self, hold_s: float) -> None:
        if hold_s:
            self.scheduler.sleep(hold_s, "uses it")

    def _get(self, name: str, timeout_s: float | None) -> None:
        self.scheduler.note(f"gets {name} within {timeout_s}")
        handle = self.cache.get(name, timeout=timeout_s)
        self.scheduler.switch("has a handle")
        with handle as model:
            self.marks["handle used"] += 1
            model(lambda: self.scheduler.switch("works"))
            self._check_bytes(name, model)

    def _check_bytes(self, name: str, model: FakeModel) -> None:
        assert model.name == name, f"wanted {name}, got {model.name}"
        now = model.weights
        assert now == self.expected.setdefault(name, now), f"the bytes of {name} changed"

    def _prefetch(self, name: str) -> None:
        future = self.cache.prefetch(name)
        self.scheduler.switch("prefetch asked")
        if self.random.random() < 0.5:
            self.marks["prefetch cancelled" if future.cancel() else "prefetch done before its cancel"] += 1

    def _reserve(self, timeout_s: float | None, hold_s: float) -> None:
        with self.cache.reserve(vram=15, timeout=timeout_s):
            self.marks["room reserved"] += 1
            self._hold(hold_s)

    def _resize(self, vram: int) -> None:
        self.cache.resize(vram=vram)
        self.marks["resized"] += 1
        self._hold(0.5)
        self.cache.resize(vram=VRAM)

    def _pin(self, name: str) -> None:
        self.cache.pin(name)
        self._use((name,), 5.0, 0.0)
        self.cache.unpin(name)
        self.marks["pinned and unpinned"] += 1

    def _write(self, name: str, hold_s: float) -> None:
        # The one that is registered again loses what was written to it, and may.
        if name == "d":
            return
        with self.cache.lease_many(name) as (model,):
            self._check_bytes(name, model)
            model.write(self.random.randbytes(4), segment=self.random.randrange(len(SIZES[name])))
            self.expected[name] = model.weights
            self.marks["written to on the device"] += 1
            self._hold(hold_s)

    def _register_again(self) -> None:
        self.cache.unregister("d")
        self.marks["unregistered"] += 1
        self.scheduler.switch("unregistered")
        try:
            self._register("d")
        except ValueError as error:
            assert "still leased" in str(error) or "already registered" in str(error), error
            self.marks["registered while its former self is leased"] += 1

    def _close_early(self) -> None:
        self.scheduler.sleep(self.random.uniform(0.0, 12.0), "will close")
        self.is_closing = True
        self.scheduler.note("closes")
        self.cache.close()
        self.marks["closed while others work"] += 1

    # --- what must hold -------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        violations = self.mover.oracle.violations
        assert not violations, "; ".join(violations)

    def _at_rest(self) -> None:
        assert not self.unfinished, f"nothing can happen any more, and these wait: {self._waiting()}"
        assert self.cache._driver._bug is None, f"the driver met a bug: {self.cache._driver._bug!r}"
        if self.is_closing:
            return
        machine = self.cache._driver._machine
        machine.validate()
        assert not machine.waiting, f"tickets are left behind: {machine.waiting}"
        assert machine.flights.is_idle
        held = self.mover.arenas.held
        for tier in Tier:
            account = machine.books.account(tier)
            assert account.resident_bytes == held.of(tier), (tier, account, held)
            assert account.reserved_bytes == account.draining_bytes == account.claimed_bytes == 0, (tier, account)
        for name, gate in self.cache._driver.gates.items():
            assert not gate.open, f"{name} is leased, and nobody is there"

    def _waiting(self) -> str:
        return ", ".join(f"{task.name} ({task.why})" for task in self.scheduler.tasks if task.name in self.unfinished)

    def _after_the_end(self) -> None:
        assert not self.unfinished, f"close does not end: {self._waiting()}"
        left = [task.name for task in self.scheduler.tasks if not task.is_over]
        assert not left, f"threads are left behind: {left}"
        self.mover.oracle.require_nothing()
        assert not self.mover.arenas.held

    def _report(self, error: BaseException) -> str:
        scheduler, held = self.scheduler, self.mover.arenas.held
        events = "\n  ".join(scheduler.trace)
        return (
            f"{type(error).__name__}: {error}\n"
            f"seed {scheduler.seed} ({scheduler.strategy}), after {scheduler.num_switches} switches, "
            f"{scheduler.now_s:.2f} s of its own time; again with: python tools/replay.py {scheduler.seed}\n"
            f"held: vram {held.vram} of {VRAM}, ram {held.ram} of {RAM}, disk {held.disk} of {DISK} bytes\n"
            f"the last events:\n  {events}"
        )

"""One schedule: a real cache over simulated threads, a few callers with random programs, and what must hold throughout.

The driver, links, waiters, herald, doors and leases are those that ship. What moves the bytes is said by the worlds:
`fake_world.py` and `shipped_world.py`.

A live schedule has more faults, and none any more after a while: then everything must end within so many switches, and
whoever asks for anything that can be had gets it.
"""

from __future__ import annotations

import atexit
import gc
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from simulation.ports import SimPool
from simulation.scheduler import Scheduler
from simulation.stand_ins import threads_of
from simulation.strands import GreenletStrand
from simulation.swizzle import Swizzle

from modelcache import ModelCache
from modelcache.core.machine import MAX_BACKOFF_S
from modelcache.errors import (
    CacheClosedError,
    CapacityError,
    LeaseCycleError,
    LeaseError,
    LeaseTimeoutError,
    LoaderError,
    ModelCacheError,
    ModelNotResidentError,
    MoveError,
    UnknownModelError,
)
from modelcache.tier import Tier

EXPECTED: tuple[type[ModelCacheError], ...] = (
    CacheClosedError,
    CapacityError,
    LeaseCycleError,
    LeaseError,
    LeaseTimeoutError,
    LoaderError,
    MoveError,
    UnknownModelError,
)
NAMES = ("a", "b", "c", "d")
#: The one that is registered again now and then; the one that its loader gives only once.
AGAIN, ONCE = "d", "c"
#: What may happen in a live schedule once it is healed until all is over, and again until everybody is served.
LIVE_SWITCHES = 6_000


class Schedule:
    """One seed, played to its end.

    Args:
        seed: Decides everything.
        marks: Counts what was reached.
        is_live: Faults end, and then everything must.
    """

    flag: ClassVar[str] = ""
    expected: ClassVar[tuple[type[ModelCacheError], ...]] = EXPECTED
    #: What the tiers hold at most, and what is freed, reserved and left by programs, in bytes.
    vram: ClassVar[int]
    ram: ClassVar[int]
    disk: ClassVar[int]
    freed: ClassVar[int]
    reserved: ClassVar[int]
    lowered: ClassVar[tuple[int, ...]]
    strand: ClassVar[Any] = GreenletStrand
    #: After how many switches a live schedule is healed at the latest.
    healed_by: ClassVar[int]

    def __init__(self, seed: int, marks: Counter[str] | None = None, *, is_live: bool = False) -> None:
        self.marks: Counter[str] = Counter() if marks is None else marks
        self.is_live = is_live
        self.scheduler = Scheduler(seed, self.strand)
        self.random = self.scheduler.random
        self.pool = SimPool(self.scheduler)
        self.swizzle = Swizzle(self.scheduler, self.marks)
        self.cache: Any = None
        self.unfinished: set[str] = set()
        self.is_closing = False
        self.must_serve = False
        self.heal_at = self.random.randrange(50, self.healed_by) if is_live else 0

    # --- what a world says ----------------------------------------------------------------------------------------

    def make_cache(self) -> ModelCache:
        """The cache; called within the stand-ins."""
        raise NotImplementedError

    def register(self, name: str) -> None:
        raise NotImplementedError

    def work(self, name: str, model: Any, hold_s: float) -> None:
        """Use a leased model for so long, and look at its bytes."""
        raise NotImplementedError

    def write(self, name: str, model: Any) -> None:
        """Write to a leased model."""
        raise NotImplementedError

    def look(self) -> None:
        """Called after every switch."""
        raise NotImplementedError

    def heal(self) -> None:
        """No more faults."""
        raise NotImplementedError

    def held(self) -> dict[Tier, int]:
        """What the tiers hold now, as the data plane says."""
        raise NotImplementedError

    def after_the_end(self) -> None:
        """The cache is closed."""
        raise NotImplementedError

    def stand_ins(self) -> AbstractContextManager[None]:
        return threads_of(self.scheduler, self.pool)

    # --- a play ---------------------------------------------------------------------------------------------------

    def play(self) -> None:
        """Run it; an `AssertionError` says what did not hold, when, and how to see it again."""
        gc.disable()
        try:
            with self.stand_ins():
                self._play()
        except BaseException as error:
            raise AssertionError(self._report(error)) from error
        finally:
            gc.enable()
            if self.cache is not None:
                atexit.unregister(self.cache.close)

    def _play(self) -> None:
        scheduler = self.scheduler
        self.cache = cache = self.make_cache()
        scheduler.watch = self._watch
        cache.on("move", lambda event: self.marks.update([f"{event.kind} because of {event.reason}"]))
        for name in NAMES:
            self.register(name)
        for number in range(self.random.randint(2, 4)):
            self._start(f"caller-{number}", self._program())
        if self.is_live:
            if self.random.random() < 0.7:
                self._start("swizzler", [self.swizzle.run])
        elif self.random.random() < 0.2:
            self._start("early closer", [self._close_early])
        scheduler.run()
        self._at_rest()
        if self.is_live:
            self._serve_everybody()
        self.is_closing = True
        self._start("closer", [cache.close])
        scheduler.run()
        self._after_the_end()

    def _serve_everybody(self) -> None:
        """Nothing is broken and nobody holds anything: whoever asks is served."""
        cache, scheduler = self.cache, self.scheduler
        if self.heal_at:
            self._heal()
        self.must_serve = True

        def restore() -> None:
            cache.resize(vram=self.vram, ram=self.ram)
            for name in NAMES:
                if name not in cache:
                    self.register(name)
                cache.unpin(name)
            # A loader that failed again and again is left alone for so long.
            scheduler.sleep(MAX_BACKOFF_S, "lets time pass")

        self._start("operator", [restore])
        scheduler.run()
        scheduler.max_switches = scheduler.num_switches + LIVE_SWITCHES
        for number in range(3):
            names = self.random.sample(NAMES, len(NAMES))
            self._start(f"served-{number}", [lambda n=name: self._use((n,), None, 0.0) for name in names])
        scheduler.run()
        self._at_rest()
        self.marks["everybody served after healing"] += 1

    def _heal(self) -> None:
        self.heal_at = 0
        self.heal()
        self.scheduler.note("everything is healed")
        self.scheduler.max_switches = self.scheduler.num_switches + LIVE_SWITCHES
        self.marks["healed while others work"] += bool(self.unfinished)

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
        except self.expected as error:
            is_for_the_end = isinstance(error, (CacheClosedError, ModelNotResidentError))
            assert self.is_closing or not is_for_the_end, f"{name} got {error!r} before the end"
            assert not self.must_serve, f"{name} got {error!r}, and nothing is in its way"
            self.marks[f"refused: {type(error).__name__}"] += 1
            self.scheduler.note(f"got {type(error).__name__}")
        except ModelCacheError as error:
            raise AssertionError(f"{name} got an error nobody expects: {error!r}") from error

    # --- programs -------------------------------------------------------------------------------------------------

    def _program(self) -> list[Callable[[], None]]:
        draw = self.random
        steps: list[Callable[[], None]] = []
        for _ in range(draw.randint(2, 6)):
            name, other = draw.sample(sorted(NAMES), 2)
            timeout_s = draw.choice((None, None, None, 0.5, 2.0))
            hold_s = draw.choice((0.0, 0.0, 0.5, 2.5))
            choices: tuple[Callable[[], None], ...] = (
                lambda n=name, t=timeout_s, h=hold_s: self._use((n,), t, h),
                lambda n=name, o=other, t=timeout_s, h=hold_s: self._use((n, o), t, h),
                lambda n=name, t=timeout_s: self.get(n, t),
                lambda n=name: self._prefetch(n),
                lambda n=name, t=timeout_s: self._mark("park", self.cache.park, n, timeout=t),
                lambda n=name, t=timeout_s: self._mark("evict", self.cache.evict, n, timeout=t),
                lambda t=timeout_s: self._mark("free", self.cache.free, vram=self.freed, timeout=t),
                lambda t=timeout_s, h=hold_s: self._reserve(t, h),
                lambda: self._resize(draw.choice((*self.lowered, self.vram))),
                lambda n=name: self._pin(n),
                lambda n=name, h=hold_s: self._write(n, h),
                self._register_again,
            )
            steps.append(draw.choices(choices, (10, 3, 5, 2, 2, 2, 1, 1, 1, 1, 3, 1))[0])
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
                self.work(name, model, hold_s)

    def hold(self, hold_s: float) -> None:
        """Time passes while something is in use."""
        if hold_s:
            self.scheduler.sleep(hold_s, "uses it")

    def get(self, name: str, timeout_s: float | None) -> None:
        """Use it by a handle."""
        raise NotImplementedError

    def _prefetch(self, name: str) -> None:
        future = self.cache.prefetch(name)
        self.scheduler.switch("prefetch asked")
        if self.random.random() < 0.5:
            self.marks["prefetch cancelled" if future.cancel() else "prefetch done before its cancel"] += 1

    def _reserve(self, timeout_s: float | None, hold_s: float) -> None:
        with self.cache.reserve(vram=self.reserved, timeout=timeout_s):
            self.marks["room reserved"] += 1
            self.hold(hold_s)

    def _resize(self, vram: int) -> None:
        self.cache.resize(vram=vram)
        self.marks["resized"] += 1
        self.hold(0.5)
        self.cache.resize(vram=self.vram)

    def _pin(self, name: str) -> None:
        self.cache.pin(name)
        self._use((name,), 5.0, 0.0)
        self.cache.unpin(name)
        self.marks["pinned and unpinned"] += 1

    def _write(self, name: str, hold_s: float) -> None:
        # The one that is registered again loses what was written to it, and may.
        if name == AGAIN:
            return
        with self.cache.lease_many(name) as (model,):
            self.work(name, model, 0.0)
            self.write(name, model)
            self.marks["written to on the device"] += 1
            self.hold(hold_s)

    def _register_again(self) -> None:
        self.cache.unregister(AGAIN)
        self.marks["unregistered"] += 1
        self.scheduler.switch("unregistered")
        try:
            self.register(AGAIN)
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
        self.look()
        if self.heal_at and self.scheduler.num_switches >= self.heal_at:
            self._heal()

    def _at_rest(self) -> None:
        assert not self.unfinished, f"nothing can happen any more, and these wait: {self._waiting()}"
        assert self.cache._driver._bug is None, f"the driver met a bug: {self.cache._driver._bug!r}"
        if self.is_closing:
            return
        machine = self.cache._driver._machine
        machine.validate()
        assert not machine.waiting, f"tickets are left behind: {machine.waiting}"
        assert machine.flights.is_idle
        held = self.held()
        for tier in Tier:
            account = machine.books.account(tier)
            assert account.resident_bytes == held[tier], (tier, account, held)
            assert account.reserved_bytes == account.draining_bytes == account.claimed_bytes == 0, (tier, account)
        for name, gate in self.cache._driver.gates.items():
            assert not gate.open, f"{name} is leased, and nobody is there"

    def _waiting(self) -> str:
        return ", ".join(f"{task.name} ({task.why})" for task in self.scheduler.tasks if task.name in self.unfinished)

    def _after_the_end(self) -> None:
        assert not self.unfinished, f"close does not end: {self._waiting()}"
        left = [task.name for task in self.scheduler.tasks if not task.is_over]
        assert not left, f"threads are left behind: {left}"
        self.after_the_end()

    def _report(self, error: BaseException) -> str:
        scheduler, held = self.scheduler, self.held()
        flags = " ".join(flag for flag in (self.flag, "--live" * self.is_live) if flag)
        events = "\n  ".join(scheduler.trace)
        return (
            f"{type(error).__name__}: {error}\n"
            f"seed {scheduler.seed} ({scheduler.strategy}), after {scheduler.num_switches} switches, "
            f"{scheduler.now_s:.2f} s of its own time; again with: python tools/replay.py {flags}{' ' * bool(flags)}"
            f"{scheduler.seed}\n"
            f"held: vram {held[Tier.VRAM]} of {self.vram}, ram {held[Tier.RAM]} of {self.ram}, "
            f"disk {held[Tier.DISK]} of {self.disk} bytes\n"
            f"the last events:\n  {events}"
        )

"""One cache of fakes on simulated threads, a few callers, and one seed that decides who runs when and what takes long.

The driver, links, waiters, doors and leases are those that ship. `simulation.world` plays random programs on the same
stage; here it is the program that somebody else's users ran into.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from benches import Bench
from simulation.ports import SimClock, SimPool
from simulation.scheduler import Scheduler
from simulation.stand_ins import threads_of

from modelcache import ModelCache
from modelcache.move import MoveKind
from modelcache.testing import FakeModel, FakeMover, cache_of
from modelcache.tier import Tier

#: More switches than this, and nobody is being served.
MAX_SWITCHES = 5_000
#: How long a step of the data plane may take, in seconds of the play.
STEPS_S = (0.0, 0.0, 0.1, 1.0, 3.0)
LOOKS = 100
MOVES = tuple(kind.value for kind in MoveKind)


class SlowMover(FakeMover):
    """Every step takes a while, as the seed says or the scar.

    Attributes:
        takes_s: How long a step of one model takes: by (step, name).
        began_s: When it last began.
    """

    def __init__(self, scheduler: Scheduler, pool: SimPool, steps_s: Sequence[float], **sizes: int) -> None:
        super().__init__(pool, **sizes)  # type: ignore[arg-type]
        self._scheduler, self._steps_s = scheduler, steps_s
        self.takes_s: dict[tuple[str, str], float] = {}
        self.began_s: dict[tuple[str, str], float] = {}

    def _reach(self, step: str, names: Any) -> None:
        scheduler, (name, *_) = self._scheduler, tuple(names)
        scheduler.note(f"{step} of {name!r} begins")
        self.began_s[step, name] = scheduler.now_s
        takes_s = self.takes_s.get((step, name))
        scheduler.sleep(scheduler.random.choice(self._steps_s) if takes_s is None else takes_s, step)
        if step in MOVES:
            self._require_unleased(step, name)
        super()._reach(step, names)

    def _require_unleased(self, step: str, name: str) -> None:
        """No lease came in while it moved. One that is refused shows for a few switches."""
        leases = set(self.leases_of(name))
        for _ in range(LOOKS):
            if not leases:
                return
            leases &= set(self.leases_of(name))
        raise self.oracle.refuse(f"{step} of {name!r} goes on while it is leased: {sorted(leases)}")


class Play:
    """A cache and its callers; make one with `playing`.

    Args:
        scheduler: Decides everything by its seed.
        pool: Over the same.
        vram: Of the device, in bytes, as `ram` and `disk`.
        steps_s: How long steps may take.
        options: Further keywords of `cache_of`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: SimPool,
        *,
        vram: int = 20,
        ram: int = 200,
        disk: int = 0,
        steps_s: Sequence[float] = STEPS_S,
        **options: Any,
    ) -> None:
        self.scheduler, self.random = scheduler, scheduler.random
        scheduler.max_switches = MAX_SWITCHES
        self.mover = SlowMover(scheduler, pool, steps_s, vram_bytes=vram, ram_bytes=ram, disk_bytes=disk)
        self.cache: ModelCache = cache_of(self.mover, SimClock(scheduler), pool, **options)  # type: ignore[arg-type]
        self.mover.leases_of = self._leases_of
        scheduler.watch = self._watch
        self.unfinished: dict[str, None] = {}

    def _leases_of(self, name: str) -> tuple[int, ...]:
        # A caller who was refused shows at the gate for an instant: let it go on.
        self.scheduler.step_back("look at leases")
        gate = self.cache._driver.gates.get(name)
        return () if gate is None else tuple(gate.open.copy())

    def _watch(self) -> None:
        violations = self.mover.oracle.violations
        assert not violations, "; ".join(violations)

    @property
    def now_s(self) -> float:
        return self.scheduler.now_s

    def add(self, *names: str, size: int = 20, **options: Any) -> None:
        for name in names:
            self.cache.register(name, lambda: FakeModel(size), **{"size": size, "reload": True, **options})

    def caller(self, name: str, *steps: Callable[[], object]) -> None:
        """Somebody who does these things, one after the other, on a thread of his own; an error fails the play."""

        def run() -> None:
            for step in steps:
                step()
            self.unfinished.pop(name)

        self.unfinished[name] = None
        self.scheduler.spawn(name, run)

    def use(self, name: str, hold_s: float = 0.0, timeout: float | None = None) -> FakeModel:
        """Lease it and compute with it for so long; its bytes must be there before and after."""
        with self.cache.lease_many(name, timeout=timeout) as (model,):
            model(lambda: self.spend(hold_s))
        return model

    def spend(self, seconds: float) -> None:
        """Let the caller's time pass."""
        self.scheduler.sleep(seconds, "spends time")

    def count(self, step: str, name: str) -> int:
        """How often the data plane was asked for a step of a model."""
        return self.mover.num_calls(step, name if step in ("load", "forget") else f"{name}#0")

    def run(self) -> None:
        """Play on; afterwards everybody was served, and the books are those of the data plane, to the byte."""
        self.scheduler.run()
        waiting = [f"{task.name} ({task.why})" for task in self.scheduler.tasks if task.name in self.unfinished]
        assert not waiting, f"nothing can happen any more, and these wait: {', '.join(waiting)}"
        driver = self.cache._driver
        assert driver.is_sound, f"the driver met a bug: {driver._bug!r}"
        machine = driver._machine
        machine.validate()
        assert not machine.waiting, f"tickets are left behind: {machine.waiting}"
        for tier in Tier:
            account, held = machine.books.account(tier), self.mover.arenas.held.of(tier)
            assert (account.resident_bytes, account.reserved_bytes, account.draining_bytes) == (held, 0, 0), account
        for name, gate in driver.gates.items():
            assert not gate.open, f"{name} is leased, and nobody is there"
        health = self.cache.health()
        assert health.is_ready, health

    def end(self) -> None:
        self.caller("closer", self.cache.close)
        self.scheduler.run()
        left = [task.name for task in self.scheduler.tasks if not task.is_over]
        assert not left, f"threads are left behind: {left}"
        self.mover.oracle.require_nothing()


@contextmanager
def playing(seed: int, **options: Any) -> Generator[Play]:
    """A play that is closed at the end. What fails says by which seed, and after which events."""
    scheduler = Scheduler(seed)
    pool = SimPool(scheduler)
    play: Play | None = None
    gc.disable()
    try:
        with threads_of(scheduler, pool):
            play = Play(scheduler, pool, **options)
            yield play
            play.end()
    except BaseException as error:
        events = "\n  ".join(scheduler.trace)
        raise AssertionError(
            f"{type(error).__name__}: {error}\nseed {seed} ({scheduler.strategy}), after {scheduler.num_switches} "
            f"switches, {scheduler.now_s:.2f} s of its own time; the last events:\n  {events}"
        ) from error
    finally:
        gc.enable()
        if play is not None:
            atexit.unregister(play.cache.close)


@contextmanager
def benched(**options: Any) -> Generator[Bench]:
    """A bench that is closed whatever happens: nobody is left waiting for what failed."""
    bench = Bench(**options)
    try:
        yield bench
    except BaseException:
        bench.cache.close()
        raise
    bench.close()

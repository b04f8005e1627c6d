"""Schedules over a mover without tensors: thousands in a second, and an oracle that counts every byte."""

from __future__ import annotations

from collections import Counter
from typing import Any

from simulation.ports import SimClock, SimPool
from simulation.scheduler import Scheduler
from simulation.swizzle import Swizzle
from simulation.world import ONCE, Schedule

from modelcache import ModelCache
from modelcache.errors import DeviceMemoryError, LoaderError, MoveError
from modelcache.testing import FakeModel, FakeMover, cache_of
from modelcache.tier import Tier

SIZES = {"a": (10, 10), "b": (20,), "c": (5, 5, 5), "d": (15, 10)}


class SimMover(FakeMover):
    """Every step takes a while, and in half of the schedules some of them fail."""

    def __init__(
        self, scheduler: Scheduler, pool: SimPool, marks: Counter[str], swizzle: Swizzle, *, is_live: bool
    ) -> None:
        super().__init__(pool, vram_bytes=FakeSchedule.vram, ram_bytes=FakeSchedule.ram, disk_bytes=FakeSchedule.disk)
        self._scheduler = scheduler
        self._marks = marks
        self._swizzle = swizzle
        draw = scheduler.random
        # Each kind of fault is on in half of the faulty schedules, so that rare combinations meet.
        kinds = [kind for kind in ("load", "move", "memory") if draw.random() < 0.5]
        self.faults = kinds * (draw.random() < 0.5 or is_live)
        self._frequency = 0.4 if is_live else 0.15

    def _reach(self, step: str, names: Any) -> None:
        scheduler = self._scheduler
        scheduler.note(f"{step} of {sorted(names)} begins")
        scheduler.sleep(scheduler.random.choice((0.0, 0.0, 0.1, 1.0, 3.0)), step)
        self._swizzle.stand(step)
        self._marks[f"{step} carried out"] += 1
        if self.faults and scheduler.random.random() < self._frequency:
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


class FakeSchedule(Schedule):
    vram, ram, disk = 40, 70, 60
    freed, reserved, lowered = 20, 15, (20, 30)
    healed_by = 400

    def __init__(self, seed: int, marks: Counter[str] | None = None, *, is_live: bool = False) -> None:
        super().__init__(seed, marks, is_live=is_live)
        self.mover = SimMover(self.scheduler, self.pool, self.marks, self.swizzle, is_live=is_live)
        self.bytes_of: dict[str, bytes] = {}

    def make_cache(self) -> ModelCache:
        cache = cache_of(
            self.mover,  # type: ignore[arg-type]
            SimClock(self.scheduler),
            self.pool,
            ram=self.ram,
            vram=self.vram,
            disk=self.disk,
            max_waiters=16,
        )
        gates = cache._driver.gates

        def leases_of(name: str) -> tuple[int, ...]:
            # A caller who was refused shows for an instant: let it go on.
            self.scheduler.step_back("look at leases")
            gate = gates.get(name)
            return () if gate is None else tuple(gate.open.copy())

        self.mover.leases_of = leases_of
        return cache

    def register(self, name: str) -> None:
        sizes = SIZES[name]
        self.cache.register(name, lambda: FakeModel(*sizes), size=sum(sizes), reload=name != ONCE)

    def work(self, name: str, model: FakeModel, hold_s: float) -> None:
        if hold_s:
            model(lambda: self.hold(hold_s))
        else:
            model()
        self._check_bytes(name, model)

    def get(self, name: str, timeout_s: float | None) -> None:
        self.scheduler.note(f"gets {name} within {timeout_s}")
        handle = self.cache.get(name, timeout=timeout_s)
        self.scheduler.switch("has a handle")
        with handle as model:
            self.marks["handle used"] += 1
            model(lambda: self.scheduler.switch("works"))
            self._check_bytes(name, model)

    def write(self, name: str, model: FakeModel) -> None:
        model.write(self.random.randbytes(4), segment=self.random.randrange(len(SIZES[name])))
        self.bytes_of[name] = model.weights

    def _check_bytes(self, name: str, model: FakeModel) -> None:
        assert model.name == name, f"wanted {name}, got {model.name}"
        now = model.weights
        assert now == self.bytes_of.setdefault(name, now), f"the bytes of {name} changed"

    def look(self) -> None:
        violations = self.mover.oracle.violations
        assert not violations, "; ".join(violations)

    def heal(self) -> None:
        self.mover.faults = []

    def held(self) -> dict[Tier, int]:
        return {tier: self.mover.arenas.held.of(tier) for tier in Tier}

    def after_the_end(self) -> None:
        self.mover.oracle.require_nothing()
        assert not self.mover.arenas.held

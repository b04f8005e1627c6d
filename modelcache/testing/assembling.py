"""A real `ModelCache` over fakes."""

from __future__ import annotations

from modelcache.cache import ModelCache
from modelcache.core.machine import Budgets
from modelcache.core.policy import EvictionPolicy
from modelcache.runtime.governor import Gauge
from modelcache.runtime.ports import Progress
from modelcache.testing.mover import FakeMover
from modelcache.testing.time_and_threads import FakeClock, FakePool
from modelcache.tier import Tier
from modelcache.wiring import Parts


def cache_of(
    mover: FakeMover,
    clock: FakeClock,
    pool: FakePool,
    *,
    vram: int | None = None,
    ram: int | None = None,
    disk: int | None = None,
    policy: EvictionPolicy | None = None,
    when_full: str = "wait",
    idle_s: float | None = None,
    max_waiters: int = 512,
    progress: Progress | None = None,
    lease_sites: bool = False,
    check_after_s: float | None = None,
    gauge: Gauge | None = None,
) -> ModelCache:
    """A cache whose models are `FakeModel` objects, whose time is `clock`, and whose threads `pool` can wait for.

    Args:
        mover: The data plane; it is told of the cache's leases.
        clock: Deadlines and idle times.
        pool: The pool `mover` was made with.
        vram: Budget in bytes, as `ram` and `disk`; what the mover has of that tier when not given.
        ram: See `vram`.
        disk: See `vram`.
        policy: Which copies go first; LRU when not given.
        when_full: ``"wait"`` or ``"reject"``.
        idle_s: For models that do not say.
        max_waiters: More callers than this get `QueueFullError`.
        progress: Told how far loads and moves are.
        lease_sites: Note where each lease is taken.
        check_after_s: Copies on the device unused for so long are looked at for writes; `None` never does.
        gauge: Measures the memory under the budgets, which are lowered and raised by it; `None` leaves them.
    """
    given = {Tier.VRAM: vram, Tier.RAM: ram, Tier.DISK: disk}
    sizes = {tier: mover.arenas.of[tier].capacity_bytes if size is None else size for tier, size in given.items()}
    has_vram = mover.top is Tier.VRAM
    budgets = Budgets(
        ram=sizes[Tier.RAM],
        vram=sizes[Tier.VRAM] if has_vram else 0,
        disk=sizes[Tier.DISK],
        top=mover.top,
        max_waiters=max_waiters,
        wait_when_full=when_full == "wait",
        check_after_s=check_after_s,
    )
    cache = ModelCache._of(
        Parts(
            budgets=budgets,
            mover=mover,
            clock=clock,
            pool=pool,
            device_name="fake:0" if has_vram else "cpu",
            execution_device=lambda: "fake:0" if has_vram else "cpu",
            measure=mover.measure,
            close=mover.close,
            policy=policy,
            progress=progress,
            idle_s=idle_s,
            lease_sites=lease_sites,
            gauge=gauge,
        )
    )
    gates = cache._driver.gates

    def leases_of(name: str) -> tuple[int, ...]:
        gate = gates.get(name)
        return () if gate is None else tuple(gate.open.copy())

    mover.leases_of = leases_of
    return cache

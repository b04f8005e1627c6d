"""Snapshots: what is where, who waits, what moved. Frozen; taking one is never a use."""

from __future__ import annotations

from dataclasses import dataclass

from modelcache.move import MoveKind, Reason
from modelcache.tier import Tier


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier. All sizes are bytes.

    Attributes:
        budget_bytes: What it may hold; `deficit_bytes` of it are to be given up after the budget was lowered.
        resident_bytes: What it holds, workspaces of usable models included.
        reserved_bytes: Promised to moves in flight and to `reserve` blocks.
        draining_bytes: Given up and not yet confirmed free.
        configured_bytes: The budget that it returns to when it was lowered for a while; 0 when it was not.
        pressure: Why it was lowered; empty when it was not.
    """

    tier: Tier
    budget_bytes: int
    deficit_bytes: int
    resident_bytes: int
    reserved_bytes: int
    draining_bytes: int
    configured_bytes: int = 0
    pressure: str = ""

    @property
    def free_bytes(self) -> int:
        """What is neither held, promised, nor on its way out."""
        return self.budget_bytes - self.resident_bytes - self.reserved_bytes - self.draining_bytes


@dataclass(frozen=True, slots=True)
class ModelStats:
    """One model.

    Attributes:
        name: The registered name.
        type_name: Of the object; empty before the first load.
        state: One of ``cold, staging, parked, partial, promoting, ready, trimming, failed``.
        size_bytes: Of its weights and buffers as RAM holds them; `None` while nobody knows.
        vram_bytes: What VRAM holds of it; `ram_bytes` and `disk_bytes` (its image file) likewise.
        workspace_bytes: What it needs beside its weights while it runs.
        num_leases: Open now.
        holders: Who has them.
        pin: The tier it is held on by an operator, or `None`.
        priority: ``low``, ``normal`` or ``high``.
        last_use: The sequence number of its last use; 0 for never.
        error: Of its last failed load, in words.
    """

    name: str
    type_name: str
    state: str
    size_bytes: int | None
    vram_bytes: int
    ram_bytes: int
    disk_bytes: int
    workspace_bytes: int
    num_leases: int
    holders: tuple[str, ...]
    pin: Tier | None
    priority: str
    last_use: int
    error: str = ""

    @property
    def tier(self) -> Tier:
        """The fastest tier that holds all of it."""
        if self.state == "ready":
            return Tier.VRAM if self.vram_bytes else Tier.RAM
        return Tier.RAM if self.state in ("parked", "partial", "promoting", "trimming") else Tier.DISK


@dataclass(frozen=True, slots=True)
class MoveEvent:
    """One committed move.

    Attributes:
        seq: Counts from 1.
        at_s: When it was committed, in seconds since the cache was made.
        model: Whose bytes; of a part held by several, the first that was registered.
        kind: ``stage``, ``promote``, ``trim``, ``shed`` or ``evict``.
        source: The tier the bytes were on.
        target: The tier they are on now.
        size_bytes: How many of them: what the destination gained, or the source gave up.
        copied_bytes: Bytes that crossed a link; 0 when a clean copy was dropped.
        seconds: How long the mover worked.
        reason: From the closed list.
        on_behalf_of: The model somebody asked for, when that is why this one moved.
        wait_s: For a move up, how long the longest waiting caller has waited for this model.
        vram_bytes: What VRAM holds of all models after it; `ram_bytes` likewise.
    """

    seq: int
    at_s: float
    model: str
    kind: MoveKind
    source: Tier
    target: Tier
    size_bytes: int
    copied_bytes: int
    seconds: float
    reason: Reason
    on_behalf_of: str | None
    wait_s: float
    vram_bytes: int
    ram_bytes: int


@dataclass(frozen=True, slots=True)
class BudgetChange:
    """A budget was changed because of what was measured, see `policy.pressure`.

    Attributes:
        seq: Counts from 1.
        at_s: When, in seconds since the cache was made.
        tier: Whose budget.
        before_bytes: The budget until then.
        after_bytes: The budget from then on.
        configured_bytes: What it returns to.
        reason: In words, with the figures.
        source: Who gave them: a file, ``psutil``, ``nvml``, the device.
        age_s: How old they were.
    """

    seq: int
    at_s: float
    tier: Tier
    before_bytes: int
    after_bytes: int
    configured_bytes: int
    reason: str
    source: str
    age_s: float


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """What is measured of the memory under a tier while the cache runs. All sizes are bytes.

    Attributes:
        total_bytes: What there is, or what a control group allows.
        free_bytes: What can still be had of it.
        others_bytes: What is held by anything but this process's own allocations.
        source: Who said so.
        at_s: When, on the clock of the cache.
        stalled_percent: How much of the last ten seconds some process stood still for want of memory; `None` when
            nobody says.
        stalled_source: Who says that.
        problem: Why there are no newer figures; empty when these are current. Sizes are then the last known, or 0.
    """

    total_bytes: int
    free_bytes: int
    others_bytes: int
    source: str
    at_s: float
    stalled_percent: float | None = None
    stalled_source: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the cache was made.

    Attributes:
        vram_hits: Leases had on a model that was usable at arrival, without asking anybody.
        ram_hits: Leases of models that came up from RAM.
        disk_hits: Leases of models that came up from disk, first loads included.
        timeouts: Callers who left because their time was up.
        refusals: Callers who got another error.
    """

    vram_hits: int = 0
    ram_hits: int = 0
    disk_hits: int = 0
    timeouts: int = 0
    refusals: int = 0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Everything at one instant; `budget_changes` are the last ones, oldest first."""

    device: str
    tiers: tuple[TierStats, ...]
    models: tuple[ModelStats, ...]
    num_waiting: int
    num_moving: int
    counters: Counters
    budget_changes: tuple[BudgetChange, ...] = ()

    def tier(self, tier: Tier) -> TierStats:
        """The figures of one tier."""
        return next(stats for stats in self.tiers if stats.tier is tier)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the cache makes progress.

    A loader that says nothing for `STALL_S` (10 s) looks the same as one that hangs.

    Attributes:
        is_ready: No device error, the driver and its workers run, it is not stuck, and nobody has waited for `STALL_S`
            while what he waits for gave no sign of life, or nothing did.
        oldest_wait_s: Age of the oldest waiting request; `None` if nobody waits.
        last_step_s: Seconds since the driver last did something.
        device: ``ok``, or what it failed with.
        pressure: Which budgets are lowered for a while, and which figures are no longer to be had, in words.
        stalled: What gave no sign of life for `STALL_S`: a load, a move, a look for writes, a reading of memory, the
            driver itself; in words, with how long. Also a thread of the cache that has ended.
    """

    is_ready: bool
    oldest_wait_s: float | None
    last_step_s: float
    device: str
    pressure: tuple[str, ...] = ()
    stalled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Freed:
    """What an explicit move gave up, in bytes.

    Attributes:
        vram_bytes: As the device measured it after its cached memory was given back.
        ram_bytes: RAM given back to the system.
    """

    vram_bytes: int
    ram_bytes: int

"""When a budget is lowered for a while and when it comes back: decisions over readings, with hysteresis. Pure.

Two rules look at one reading each (`ram_ask`, `vram_ask`); `Regulator` is what they have in common, time: a lowering is
given the time to show before the next, and a budget comes back only after a quiet while, which gets longer each time
that it did not last. The core gives up idle copies when a budget is lowered; what is leased it never touches.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelcache.stats import MemoryReading
from modelcache.units import format_bytes

#: Above so many per cent in use, RAM is given up; it comes back once a full budget would stay below `LOW`.
HIGH, LOW = 90, 80
#: Per cent of the last ten seconds in which some process stood still for want of memory: give up above, quiet below.
STALLED, QUIET = 10.0, 2.0
#: A lowering that shows at once in the next readings; stalls are averaged over ten seconds.
SETTLE_S, STALL_SETTLE_S = 2.0, 10.0
#: How long all must be quiet before a budget is raised, at first and at most.
CALM_S, MAX_CALM_S = 30.0, 480.0
#: A raise that was undone within so many quiet whiles did not last.
RELAPSE_CALMS = 4
#: Changes smaller than this share of the configured budget are not worth an event.
GRAIN = 1 / 16
#: How much of the configured budget is given up at a time while processes stall, and how much of it is left at last:
#: stalls say that somebody wants memory, not that it is what is held here.
STALL_STEP = 1 / 8


@dataclass(frozen=True, slots=True)
class Standing:
    """One tier as its books have it, in bytes; `deficit_bytes` are those that an earlier lowering still waits for."""

    budget_bytes: int
    configured_bytes: int
    held_bytes: int
    deficit_bytes: int

    @property
    def grain_bytes(self) -> int:
        """The least change worth making."""
        return max(1, int(self.configured_bytes * GRAIN))


@dataclass(frozen=True, slots=True)
class Ask:
    """What one reading speaks for.

    Attributes:
        lower_to: A budget below the present one, or `None`.
        why: In words.
        settle_s: How long the next readings may still show what this lowering has already changed.
        raise_to: How far the budget could come back by this reading.
        source: Whose figures they are.
    """

    lower_to: int | None
    why: str
    settle_s: float
    raise_to: int
    source: str


@dataclass(frozen=True, slots=True)
class Change:
    """A budget to set, and why."""

    budget_bytes: int
    why: str
    source: str


def ram_ask(standing: Standing, reading: MemoryReading) -> Ask:
    """What RAM's figures speak for: what is used and what the budget may still take, and whether processes stall."""
    total, free, held = reading.total_bytes, reading.free_bytes, standing.held_bytes
    # The budgets at which the memory would be filled up to the marks, with everybody else as now.
    high_bytes = total * HIGH // 100 - (total - held - free)
    low_bytes = total * LOW // 100 - (total - held - free)
    of = f"of the {format_bytes(total)} of RAM"
    stalled = reading.stalled_percent
    quiet = stalled is None or stalled < QUIET
    raise_to = low_bytes if quiet else standing.budget_bytes
    used = 1 - free / total
    if total - free > total * HIGH // 100:
        why = f"{used:.0%} {of} are in use, above {HIGH}%"
        return Ask(max(0, low_bytes), why, SETTLE_S, 0, reading.source)
    if stalled is not None and stalled > STALLED:
        step = max(standing.grain_bytes, int(standing.configured_bytes * STALL_STEP))
        why = f"processes stood still for memory {stalled:.0f}% of the last 10 s, above {STALLED:.0f}%"
        # Of what is held one step goes at once, whatever else the budget would have allowed; if no more than that is
        # held, only the budget goes down.
        base = min(standing.budget_bytes, held) if held > step else standing.budget_bytes
        lower_to = min(standing.budget_bytes, max(step, base - step))
        return Ask(lower_to, why, STALL_SETTLE_S, 0, reading.stalled_source)
    if standing.budget_bytes >= high_bytes + standing.grain_bytes:
        full = 1 - (free - (standing.budget_bytes - held)) / total
        why = f"with the budget full, {full:.0%} {of} would be in use, above {HIGH}%"
        return Ask(max(0, high_bytes), why, SETTLE_S, raise_to, reading.source)
    return Ask(None, f"{used:.0%} {of} are in use", SETTLE_S, raise_to, reading.source)


def vram_ask(standing: Standing, reading: MemoryReading, share: float) -> Ask:
    """What VRAM's figures speak for: others' memory is theirs, and the budget is `share` of the rest.

    Where the configured budget is a larger share of the device, somebody has set it so since, and that share counts.
    A device that is full of our own copies is as it should be, so nothing here looks at what is in use.
    """
    if reading.total_bytes > 0:
        share = max(share, min(1.0, standing.configured_bytes / reading.total_bytes))
    rest_bytes = max(0, int(share * (reading.total_bytes - reading.others_bytes)))
    others, total = format_bytes(reading.others_bytes), format_bytes(reading.total_bytes)
    why = f"others hold {others} of the device's {total}"
    lower_to = rest_bytes if standing.budget_bytes >= rest_bytes + standing.grain_bytes else None
    return Ask(lower_to, why, SETTLE_S, rest_bytes, reading.source)


class Regulator:
    """One tier's budget over time. Told of every reading, it says now and then what to change.

    The number of changes is bounded: lowerings are `SETTLE_S` apart at least and none comes while the last is not
    reached, and raises are a quiet while apart, which doubles up to `MAX_CALM_S` while raises do not last.
    """

    def __init__(self) -> None:
        self._not_before_s = 0.0
        self._calm_s = CALM_S
        self._calm_since_s: float | None = None
        self._raised_at_s: float | None = None

    def missed(self) -> None:
        """There is no current reading: the budget stays, and a quiet while begins anew."""
        self._calm_since_s = None

    def decide(self, standing: Standing, ask: Ask, now_s: float) -> Change | None:
        """What to change now, if anything.

        Args:
            standing: The tier as it is.
            ask: What the present reading speaks for.
            now_s: When that is.
        """
        if ask.lower_to is not None and ask.lower_to < standing.budget_bytes:
            return self._lower(standing, ask, ask.lower_to, now_s)
        if not self._is_worth(standing, ask):
            self._calm_since_s = None
            return None
        if self._calm_since_s is None:
            self._calm_since_s = now_s
        if now_s - self._calm_since_s < self._calm_s:
            return None
        self._calm_since_s, self._raised_at_s = None, now_s
        return Change(min(ask.raise_to, standing.configured_bytes), ask.why, ask.source)

    def _lower(self, standing: Standing, ask: Ask, budget_bytes: int, now_s: float) -> Change | None:
        self._calm_since_s = None
        # While leases hold what the last lowering is waiting for, a further one would give up nothing more.
        if standing.deficit_bytes or now_s < self._not_before_s:
            return None
        self._not_before_s = now_s + ask.settle_s
        if self._raised_at_s is not None:
            lasted = now_s - self._raised_at_s >= RELAPSE_CALMS * self._calm_s
            self._calm_s = CALM_S if lasted else min(2 * self._calm_s, MAX_CALM_S)
            self._raised_at_s = None
        return Change(budget_bytes, ask.why, ask.source)

    def _is_worth(self, standing: Standing, ask: Ask) -> bool:
        if standing.budget_bytes >= standing.configured_bytes:
            return False
        return ask.raise_to >= min(standing.configured_bytes, standing.budget_bytes + standing.grain_bytes)

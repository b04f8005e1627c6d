"""Double-entry bytes: what each tier holds, has promised, and is waiting to get back."""

from __future__ import annotations

from dataclasses import dataclass

from modelcache.tier import Tier
from modelcache.units import format_bytes


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes per tier."""

    vram: int = 0
    ram: int = 0
    disk: int = 0

    def of(self, tier: Tier) -> int:
        """The bytes on one tier."""
        if tier is Tier.VRAM:
            return self.vram
        return self.ram if tier is Tier.RAM else self.disk

    def __add__(self, other: Room) -> Room:
        return Room(self.vram + other.vram, self.ram + other.ram, self.disk + other.disk)

    def __bool__(self) -> bool:
        return bool(self.vram or self.ram or self.disk)


@dataclass(slots=True)
class Account:
    """The bytes of one tier on one device.

    Bytes are claimed when planned, reserved when their room is confirmed, committed when landed, cancelled when
    failed; given-up bytes drain until they are confirmed free. A lowered budget is a target first, and binds as fast
    as bytes are given up. `configured_bytes` is what the target returns to when `pressure`, the reason why it was
    lowered for a while, is over.

    Invariant: ``resident + reserved + draining <= budget`` and ``claimed <= free + draining``, all in bytes, none
    below 0, where ``budget`` is `budget_bytes`.
    """

    budget_bytes: int
    target_bytes: int = -1
    resident_bytes: int = 0
    reserved_bytes: int = 0
    draining_bytes: int = 0
    claimed_bytes: int = 0
    configured_bytes: int = -1
    pressure: str = ""

    def __post_init__(self) -> None:
        if self.target_bytes < 0:
            self.target_bytes = self.budget_bytes
        if self.configured_bytes < 0:
            self.configured_bytes = self.target_bytes

    @property
    def free_bytes(self) -> int:
        """What is neither held, promised nor on its way out."""
        return self.budget_bytes - self.resident_bytes - self.reserved_bytes - self.draining_bytes

    @property
    def available_bytes(self) -> int:
        """What a new plan may count on without giving up anything more; below 0 when the target was lowered."""
        return self.free_bytes + self.draining_bytes - self.claimed_bytes - (self.budget_bytes - self.target_bytes)

    @property
    def deficit_bytes(self) -> int:
        """How far the budget still is above its target."""
        return self.budget_bytes - self.target_bytes

    def pressure_on(self, tier: Tier) -> str:
        """Why the budget of `tier`, whose account this is, is lower than configured; empty when it is not."""
        if not self.pressure:
            return ""
        configured, target = format_bytes(self.configured_bytes), format_bytes(self.target_bytes)
        return f"budgets.{tier} is lowered from {configured} to {target} for now: {self.pressure}"

    def claim(self, n_bytes: int) -> None:
        """Count on bytes that are free now or will be when the planned drains are confirmed."""
        assert 0 <= n_bytes <= self.free_bytes + self.draining_bytes - self.claimed_bytes, (n_bytes, self)
        self.claimed_bytes += n_bytes

    def unclaim(self, n_bytes: int) -> None:
        """Give a claim back."""
        assert 0 <= n_bytes <= self.claimed_bytes, (n_bytes, self)
        self.claimed_bytes -= n_bytes
        self.settle()

    def reserve(self, n_bytes: int) -> None:
        """Turn a claim whose room is confirmed into a promise."""
        assert 0 <= n_bytes <= min(self.claimed_bytes, self.free_bytes), (n_bytes, self)
        self.claimed_bytes -= n_bytes
        self.reserved_bytes += n_bytes

    def commit(self, n_bytes: int) -> None:
        """The promised bytes have landed."""
        assert 0 <= n_bytes <= self.reserved_bytes, (n_bytes, self)
        self.reserved_bytes -= n_bytes
        self.resident_bytes += n_bytes

    def cancel(self, n_bytes: int) -> None:
        """The promised bytes will not land."""
        assert 0 <= n_bytes <= self.reserved_bytes, (n_bytes, self)
        self.reserved_bytes -= n_bytes
        self.settle()

    def drain(self, n_bytes: int) -> None:
        """Held bytes are being given up."""
        assert 0 <= n_bytes <= self.resident_bytes, (n_bytes, self)
        self.resident_bytes -= n_bytes
        self.draining_bytes += n_bytes

    def drained(self, n_bytes: int) -> None:
        """They are confirmed free."""
        assert 0 <= n_bytes <= self.draining_bytes, (n_bytes, self)
        self.draining_bytes -= n_bytes
        self.settle()

    def undrain(self, n_bytes: int) -> None:
        """They were not given up after all. Claims that counted on them must have been given back."""
        assert 0 <= n_bytes <= self.draining_bytes, (n_bytes, self)
        self.draining_bytes -= n_bytes
        self.resident_bytes += n_bytes
        self.validate()

    def retarget(self, budget_bytes: int, why: str = "") -> None:
        """Change the budget, at once where it grows, as bytes are given up where it shrinks.

        With a reason it is for a while: the configured budget stays what it was, and is never exceeded.
        """
        assert budget_bytes >= 0
        if not why:
            self.configured_bytes = budget_bytes
        self.target_bytes = min(budget_bytes, self.configured_bytes)
        self.pressure = why if self.target_bytes < self.configured_bytes else ""
        self.settle()

    def settle(self) -> None:
        """Let the budget follow its target as far as the bytes held and claimed allow."""
        promised = self.resident_bytes + self.reserved_bytes + max(self.draining_bytes, self.claimed_bytes)
        self.budget_bytes = max(self.target_bytes, min(self.budget_bytes, promised))

    def validate(self) -> None:
        """Assert the invariant."""
        assert min(self.figures()) >= 0, self
        assert self.target_bytes <= self.configured_bytes, self
        assert self.free_bytes >= 0, self
        assert self.claimed_bytes <= self.free_bytes + self.draining_bytes, self

    def copy(self) -> Account:
        """An account of its own with the same figures."""
        twin = object.__new__(Account)
        twin.budget_bytes, twin.target_bytes = self.budget_bytes, self.target_bytes
        twin.resident_bytes, twin.reserved_bytes = self.resident_bytes, self.reserved_bytes
        twin.draining_bytes, twin.claimed_bytes = self.draining_bytes, self.claimed_bytes
        twin.configured_bytes, twin.pressure = self.configured_bytes, self.pressure
        return twin

    def figures(self) -> tuple[int, ...]:
        """All figures, to compare or to hash."""
        return (
            self.budget_bytes,
            self.target_bytes,
            self.resident_bytes,
            self.reserved_bytes,
            self.draining_bytes,
            self.claimed_bytes,
            self.configured_bytes,
        )

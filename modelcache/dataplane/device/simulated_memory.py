"""The books of a simulated device's memory: a capacity, a rounding, and every byte until its last tensor dies."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Literal, get_args

import torch

from modelcache.units import format_bytes

if TYPE_CHECKING:
    from modelcache.dataplane.device.simulated_ranges import AddressRanges

# Smaller memory is cheap to get from the system.
_SMALLEST_SPARE_BYTES = 1 << 20

Rounding = Literal["exact", "512", "2MiB", "power_of_two"]


def round_up(size_bytes: int, rounding: Rounding) -> int:
    """What an allocator with this rounding takes for `size_bytes`; 0 for 0."""
    if size_bytes <= 0 or rounding == "exact":
        return max(size_bytes, 0)
    if rounding == "power_of_two":
        return max(512, 1 << (size_bytes - 1).bit_length())
    unit = 512 if rounding == "512" else 2 << 20
    return -(-size_bytes // unit) * unit


class Memory:
    """The bytes of one device.

    Invariant: ``0 <= allocated <= capacity``.

    Memory dies wherever its last tensor does, perhaps in the garbage collector inside this very class, so giving back
    appends to a deque and takes no lock.

    A real device has its memory from the start. This one would pay for page faults at every allocation, more than the
    copy that follows, so large flat blocks are kept for the next allocation of their size, and so are pages that were
    mapped. Such spares and what is allocated are never more than the capacity together, and count as free.

    Attributes:
        ranges: Where memory is mapped; `None` where it is only allocated.
    """

    def __init__(self, device: str, capacity_bytes: int, rounding: Rounding) -> None:
        if rounding not in get_args(Rounding):
            raise ValueError(f"unknown rounding {rounding!r}; choose one of {', '.join(get_args(Rounding))}")
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self.device, self.capacity_bytes, self.rounding = device, capacity_bytes, rounding
        self._lock = threading.Lock()
        self._allocated_bytes = 0
        self.ranges: AddressRanges | None = None
        self._given_back: deque[tuple[int, torch.Tensor | None]] = deque()
        self._spares: deque[torch.Tensor] = deque()
        self._spare_bytes = 0

    def charge_bytes(self, size_bytes: int) -> int:
        """What an allocation of this size takes."""
        return round_up(size_bytes, self.rounding)

    def allocated_bytes(self) -> int:
        """What is taken now."""
        with self._lock:
            return self._balance()

    def take(self, size_bytes: int) -> int:
        """Take room for `size_bytes`; returns the charge to give back.

        Raises:
            torch.OutOfMemoryError: There is no room; nothing was taken.
        """
        return self.take_charge(self.charge_bytes(size_bytes))

    def take_charge(self, charge: int, *, spared_bytes: int = 0) -> int:
        """Take room, rounded already; returns it.

        Args:
            charge: How much.
            spared_bytes: Spares that may stay beyond the capacity, because they will be used for it: see `trim`.

        Raises:
            torch.OutOfMemoryError: There is no room; nothing was taken.
        """
        with self._lock:
            free_bytes = self.capacity_bytes - self._balance()
            if charge > free_bytes:
                raise torch.OutOfMemoryError(
                    f"{self.device} is out of memory: tried to allocate {format_bytes(charge)} ({charge} bytes), "
                    f"{format_bytes(free_bytes)} ({free_bytes} bytes) of {format_bytes(self.capacity_bytes)} are free"
                )
            self._allocated_bytes += charge
            self._drop_spares(self.capacity_bytes - self._allocated_bytes + spared_bytes)
        return charge

    def trim(self) -> None:
        """Give spares beyond the capacity back to the system."""
        with self._lock:
            self._drop_spares(self.capacity_bytes - self._balance())

    def give_back(self, charge: int, raw: torch.Tensor | None = None) -> None:
        """Give room back: the device's last tensor over `raw` died, or memory was unmapped."""
        self._given_back.append((charge, raw))

    def block(self, size_bytes: int) -> torch.Tensor:
        """Flat CPU memory, a spare if there is one of this size; not yet taken."""
        with self._lock:
            self._balance()
            for spare in self._spares:
                if spare.numel() == size_bytes:
                    # By identity: comparing tensors would compare their elements.
                    self._spares = deque(other for other in self._spares if other is not spare)
                    self._spare_bytes -= size_bytes
                    return spare
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")

    def drop_spares(self) -> None:
        """Give the spares back to the system."""
        with self._lock:
            self._balance()
            self._drop_spares(0)

    def _drop_spares(self, allowed_bytes: int) -> None:
        while self._spares and self._spare_bytes > allowed_bytes:
            self._spare_bytes -= self._spares.popleft().numel()
        if self.ranges is not None:
            self.ranges.drop_warm(max(0, allowed_bytes - self._spare_bytes))

    def _balance(self) -> int:
        while self._given_back:
            charge, raw = self._given_back.popleft()
            self._allocated_bytes -= charge
            if raw is not None and raw.dtype is torch.uint8 and raw.dim() == 1 and raw.numel() >= _SMALLEST_SPARE_BYTES:
                self._spares.append(raw)
                self._spare_bytes += raw.numel()
        assert 0 <= self._allocated_bytes <= self.capacity_bytes
        return self._allocated_bytes


class Allocation:
    """CPU memory that is the device's until the last tensor over it dies.

    Raises:
        torch.OutOfMemoryError: There is no room.
    """

    __slots__ = ("_charge", "_memory", "raw")

    def __init__(self, memory: Memory, raw: torch.Tensor) -> None:
        self._memory, self._charge, self.raw = memory, 0, raw
        self._charge = memory.take(raw.untyped_storage().nbytes())

    def __del__(self) -> None:
        if self._charge:
            self._memory.give_back(self._charge, self.raw)

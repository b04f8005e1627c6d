"""The address ranges of a simulated device: reserved for life, with memory behind them or not."""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING

import torch

from modelcache.dataplane.device.alias import alias, require_flat
from modelcache.dataplane.device.simulated_access import UNMAPPED, AddressRange, Poison
from modelcache.dataplane.device.simulated_pages import (
    PAGE_BYTES,
    Pages,
    close_addresses,
    release_addresses,
    reserve_addresses,
)
from modelcache.dataplane.process_lock import process_lock

if TYPE_CHECKING:
    from modelcache.dataplane.device.simulated_memory import Memory

# One for all devices: what is refused is found by address, whatever device the tensor names. Taken after a
# `Memory`'s own lock where both are.
_LOCK = process_lock()


class _Owner:
    """What the tensors over a range keep alive."""

    __slots__ = ("_ranges", "_spaces")

    def __init__(self, spaces: AddressRanges, owned: AddressRange) -> None:
        self._spaces, self._ranges = spaces, owned

    def __del__(self) -> None:
        self._spaces.abandon(self._ranges)


def _require_unmapped(found: AddressRange) -> None:
    if found.is_mapped:
        raise ValueError(f"the range at {found.address:#x} is mapped already; unmap it first")


class AddressRanges:
    """The ranges of one device.

    Args:
        memory: The device's books.
        granularity_bytes: Of what is mapped; a multiple of the system's page.
        poison: What an illegal access fills.

    Raises:
        ValueError: A granularity that cannot be.
        RuntimeError: This system cannot map memory as is needed.
    """

    def __init__(self, memory: Memory, granularity_bytes: int, poison: Poison) -> None:
        if granularity_bytes <= 0 or granularity_bytes % PAGE_BYTES:
            raise ValueError(f"granularity_bytes must be a multiple of {PAGE_BYTES}, got {granularity_bytes}")
        self._memory, self._poison = memory, poison
        self._pages = Pages(memory.capacity_bytes, granularity_bytes)
        self._ranges: dict[int, AddressRange] = {}
        # Ranges whose last tensor died, wherever that was: perhaps in the garbage collector, below one of these locks.
        self._abandoned: deque[AddressRange] = deque()

    def charge_bytes(self, size_bytes: int) -> int:
        """What mapping that many bytes takes."""
        unit = self._pages.unit_bytes
        return -(-size_bytes // unit) * unit

    def reserve(self, size_bytes: int, device: torch.device) -> torch.Tensor:
        """A tensor over a new range.

        Raises:
            torch.OutOfMemoryError: The process has no addresses left.
        """
        if size_bytes == 0:
            return alias(0, (0,), (1,), torch.uint8, device=device, keep=None)
        length = self.charge_bytes(size_bytes)
        try:
            address = reserve_addresses(length)
        except OSError as error:
            raise torch.OutOfMemoryError(f"{device}: {error.strerror}") from error
        reserved = AddressRange(address, size_bytes, length, self._poison)
        with _LOCK:
            self._ranges[address] = reserved
            UNMAPPED.add(reserved)
        owner = _Owner(self, reserved)
        return alias(address, (size_bytes,), (1,), torch.uint8, device=device, keep=owner)

    def map(self, memory: torch.Tensor) -> None:
        """Put memory behind the range of a tensor.

        Raises:
            ValueError: It is mapped already, or is no such range.
            torch.OutOfMemoryError: There is no room; nothing was mapped.
        """
        if (found := self._find(memory)) is None:
            return
        self.let_go_of_abandoned()
        _require_unmapped(found)
        charge = self._memory.take_charge(found.length_bytes, spared_bytes=found.length_bytes)
        try:
            with _LOCK:
                _require_unmapped(found)
                found.homes = self._pages.put_behind(found.address, found.length_bytes)
                found.is_mapped = True
                UNMAPPED.remove(found)
        except OSError as error:
            self._memory.give_back(charge)
            raise torch.OutOfMemoryError(f"{self._memory.device} is out of memory: {error.strerror}") from error
        except ValueError:
            self._memory.give_back(charge)
            raise
        self._memory.trim()

    def unmap(self, memory: torch.Tensor) -> None:
        """Take the memory behind the range of a tensor away, if there is any.

        Raises:
            ValueError: It is no such range.
        """
        found = self._find(memory)
        if found is not None:
            with _LOCK:
                self._unmap(found)
        self.let_go_of_abandoned()

    def _unmap(self, found: AddressRange) -> None:
        if not found.is_mapped:
            return
        found.is_mapped = False
        UNMAPPED.add(found)
        homes, found.homes = found.homes, []
        self._pages.take_back(found.address, homes)
        close_addresses(found.address, found.length_bytes)
        # After the pages: whoever gets the charge finds them.
        self._memory.give_back(found.length_bytes)

    def _find(self, memory: torch.Tensor) -> AddressRange | None:
        """The range that a tensor is the whole of; `None` for one of no bytes."""
        require_flat(memory, "memory")
        if memory.numel() == 0:
            return None
        with _LOCK:
            found = self._ranges.get(memory.data_ptr())
        if found is None or found.size_bytes != memory.numel():
            raise ValueError(
                f"the {memory.numel()} bytes at {memory.data_ptr():#x} are not a whole range of {self._memory.device}; "
                "pass what reserve() answered"
            )
        return found

    @property
    def warm_bytes(self) -> int:
        """Pages that take RAM and are behind no range."""
        return self._pages.warm_bytes

    def drop_warm(self, allowed_bytes: int) -> None:
        """Give such pages back to the system until no more than this take RAM."""
        with _LOCK:
            self._pages.drop_warm(allowed_bytes)

    def abandon(self, abandoned: AddressRange) -> None:
        """The last tensor over a range died."""
        self._abandoned.append(abandoned)
        if not sys.is_finalizing():
            self.let_go_of_abandoned()

    def let_go_of_abandoned(self) -> None:
        """Give back the ranges that nobody refers to, unless another thread, or this one further up, is at it.

        Whoever holds the lock meanwhile comes here when it is done or at the next call.
        """
        while self._abandoned and _LOCK.acquire(blocking=False):
            try:
                while self._abandoned:
                    each = self._abandoned.popleft()
                    self._unmap(each)
                    UNMAPPED.remove(each)
                    del self._ranges[each.address]
                    release_addresses(each.address, each.length_bytes)
            finally:
                _LOCK.release()

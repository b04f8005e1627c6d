"""What of a simulated device may not be touched: a device that is lost, and addresses without memory.

Without memory an operator or a copy is refused as CUDA refuses it, with an error that costs the device. Code that goes
around torch, by the address, is ended by the system.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field

import torch

from modelcache.errors import DevicePoisonedError


class Poison:
    """Why a device cannot be used any more; empty while it can."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.problem: str | None = None

    def error(self) -> DevicePoisonedError | None:
        """What every call raises, or `None`."""
        return None if self.problem is None else DevicePoisonedError(self.device, self.problem)

    def lose(self, problem: str) -> None:
        """From now on it cannot be used; the first problem stays."""
        if self.problem is None:
            self.problem = problem

    def check(self) -> None:
        """Refuse to go on when poisoned.

        Raises:
            DevicePoisonedError: The device failed for good earlier.
        """
        error = self.error()
        if error is not None:
            raise error


@dataclass(slots=True, eq=False)
class AddressRange:
    """One range.

    Attributes:
        address: Where it begins.
        size_bytes: Of its tensor.
        length_bytes: Of its addresses, and of the memory behind them.
        poison: Of its device.
        is_mapped: Memory is behind it.
        homes: Where the pages behind it are at home.
    """

    address: int
    size_bytes: int
    length_bytes: int
    poison: Poison
    is_mapped: bool = False
    homes: list[tuple[int, int]] = field(default_factory=list)

    def refuse(self) -> torch.AcceleratorError:
        """The device is lost; what the program that touched it gets."""
        self.poison.lose("an illegal memory access was encountered: nothing is mapped there")
        return torch.AcceleratorError(f"{self.poison.device}: {self.poison.problem}")


class Unmapped:
    """The ranges of the process that have no memory, by address; read by every operator, without a lock."""

    def __init__(self) -> None:
        # Replaced as a whole, so that a reader sees one state of both.
        self._now: tuple[list[int], dict[int, AddressRange]] = ([], {})

    def add(self, added: AddressRange) -> None:
        """From now on it is refused."""
        starts, ranges = self._now
        starts = starts.copy()
        insort(starts, added.address)
        self._now = (starts, {**ranges, added.address: added})

    def remove(self, removed: AddressRange) -> None:
        """From now on it is not refused."""
        starts, ranges = self._now
        self._now = (
            [start for start in starts if start != removed.address],
            {start: each for start, each in ranges.items() if each is not removed},
        )

    def find(self, address: int) -> AddressRange | None:
        """The range without memory that an address is in."""
        starts, ranges = self._now
        place = bisect_right(starts, address)
        if not place:
            return None
        found = ranges[starts[place - 1]]
        return found if address < found.address + found.length_bytes else None

    def is_missing(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor is not there."""
        return bool(self._now[0]) and self.find(tensor.data_ptr()) is not None and tensor.numel() > 0

    def require_memory(self, tensor: torch.Tensor) -> None:
        """Refuse a tensor whose memory is not there.

        Raises:
            torch.AcceleratorError: An illegal memory access; its device is lost.
        """
        if self._now[0] and (found := self.find(tensor.data_ptr())) is not None and tensor.numel():
            raise found.refuse()


UNMAPPED = Unmapped()

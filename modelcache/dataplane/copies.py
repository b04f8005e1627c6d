"""One segment's bytes on one tier, and the tensors laid over them.

Not here: when a copy is made or given up. `NewCopies` is how a move builds everything before it changes anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch

from modelcache.dataplane.device.alias import view_over
from modelcache.dataplane.device.protocol import Device, DeviceEvent
from modelcache.dataplane.image import View, WeightImage
from modelcache.dataplane.images.files import ImageFiles
from modelcache.dataplane.memory.blocks import RamBlocks, RamPiece


@dataclass(frozen=True, slots=True)
class Tiers:
    """What the tiers are made of. `files` is `None` where there is no directory for image files."""

    device: Device
    blocks: RamBlocks
    files: ImageFiles | None


@dataclass(frozen=True, slots=True)
class Done:
    """What a move did; `written` says that writes were found and are kept."""

    copied_bytes: int
    written: bool = False


class Place(Protocol):
    """Which view of which storage somebody reads."""

    storage: int
    view: View


class Copy:
    """The bytes of one segment on one tier.

    Each storage of the layout has a torch storage of its own over its range, made once and shared by all views of it.

    Attributes:
        memory: The whole segment, flat uint8.
        piece: Its RAM piece; `None` on the device.
    """

    __slots__ = ("_image", "_laid", "_open", "_storages", "_views", "_wholes", "memory", "piece")

    def __init__(
        self,
        image: WeightImage,
        memory: torch.Tensor,
        piece: RamPiece | None,
        open_storage: Callable[[int, int], torch.Tensor],
    ) -> None:
        self._image, self.memory, self.piece, self._open = image, memory, piece, open_storage
        self._storages: dict[int, torch.Tensor] = {}
        self._wholes: dict[int, torch.Tensor] = {}
        self._views: dict[tuple[int, View], torch.Tensor] = {}
        self._laid: tuple[Sequence[Place], list[torch.Tensor]] = ((), [])

    def storage(self, index: int) -> torch.Tensor:
        """Storage `index` of the layout, flat uint8 with a torch storage of its own."""
        if index not in self._storages:
            place, whole = self._image.storages[index], self._wholes.get(index)
            if whole is None:
                self._storages[index] = self._open(place.offset_bytes, place.size_bytes)
            else:
                count = place.size_bytes // whole.dtype.itemsize
                self._storages[index] = whole.as_strided((count,), (1,), 0).view(torch.uint8)
        return self._storages[index]

    def view(self, index: int, view: View) -> torch.Tensor:
        """One tensor over storage `index`, the same object each time."""
        key = (index, view)
        if key not in self._views:
            self._views[key] = self._make(index, view)
        return self._views[key]

    def _make(self, index: int, view: View) -> torch.Tensor:
        place = self._image.storages[index]
        is_first = index not in self._storages and index not in self._wholes
        if self.piece is None and is_first and (view.offset_bytes, view.extent_bytes) == (0, place.size_bytes):
            # The view of a whole storage can make it, in a third of the time.
            whole = view_over(self.memory, place.offset_bytes, view.dtype, view.shape, view.stride)
            self._wholes[index] = whole
            return whole
        return view.over(self.storage(index))

    def laid(self, places: Sequence[Place]) -> list[torch.Tensor]:
        """The views that these places name, one for each; the same list for the same sequence."""
        if self._laid[0] is not places:
            self._laid = (places, [self.view(place.storage, place.view) for place in places])
        return self._laid[1]

    def unlay(self) -> None:
        """Forget the places `laid` was last asked for: one of them is no more."""
        self._laid = ((), [])


class NewCopies:
    """Copies that a move makes before it changes anything; given up, all of them, unless `keep` is called.

    Leaving the block waits for every copy under way first: memory is never released below one.

    Args:
        tiers: Where memory comes from.
        image: The layout.
        ranges: By segment, the copy in the address range that it has on the device for good; written here.
    """

    def __init__(self, tiers: Tiers, image: WeightImage, ranges: dict[int, Copy]) -> None:
        self._tiers, self._image, self._ranges = tiers, image, ranges
        self.ram: dict[int, Copy] = {}
        self.vram: dict[int, Copy] = {}
        self._under_way: list[tuple[DeviceEvent, int]] = []
        self._kept = False

    def __enter__(self) -> NewCopies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._kept:
            return
        for event, _ in self._under_way:
            # Whatever it failed with: only that it is over matters now.
            with contextlib.suppress(Exception):
                event.wait()
        if self.vram and self._tiers.device.keeps_addresses:
            # Calls that started early may still compute with it, and it is about to be unmapped.
            with contextlib.suppress(Exception):
                self._tiers.device.settle()
        for copy in (*self.ram.values(), *self.vram.values()):
            give_up(self._tiers, copy)
        self.ram.clear()
        self.vram.clear()

    def keep(self) -> None:
        """The move is committed: its copies belong to the part now."""
        self._kept = True

    def add_ram(self, segment: int) -> Copy:
        """A zeroed RAM piece for a segment."""
        self.ram[segment] = ram_copy(self._tiers, self._image, segment)
        return self.ram[segment]

    def add_vram(self, segment: int) -> Copy:
        """Device memory for a segment, uninitialized."""
        self.vram[segment] = device_copy(self._tiers, self._image, segment, self._ranges)
        return self.vram[segment]

    def copy_in(self, segment: int, source: Copy) -> None:
        """Enqueue the copy of a segment from RAM to its new device memory."""
        event = self._tiers.device.copy_in(self.vram[segment].memory, source.memory)
        self._under_way.append((event, source.memory.numel()))

    def copy_out(self, target: Copy, source: Copy) -> None:
        """Enqueue the copy of a segment from the device to RAM."""
        event = self._tiers.device.copy_out(target.memory, source.memory)
        self._under_way.append((event, source.memory.numel()))

    @property
    def under_way(self) -> dict[int, DeviceEvent]:
        """The copies to the device that were not landed yet, by segment; for a move that copies nothing else."""
        segments = list(self.vram)[len(self.vram) - len(self._under_way) :]
        return {segment: event for segment, (event, _) in zip(segments, self._under_way, strict=True)}

    def land_next(self, tell: Callable[[int], None]) -> int:
        """Wait for the first copy under way and tell its bytes, which are returned."""
        event, size_bytes = self._under_way[0]
        event.wait()
        del self._under_way[0]
        tell(size_bytes)
        return size_bytes

    def land(self, tell: Callable[[int], None]) -> int:
        """Wait for all copies enqueued, in order, telling the bytes of each; returns their sum."""
        landed = 0
        while self._under_way:
            landed += self.land_next(tell)
        return landed


def ram_copy(tiers: Tiers, image: WeightImage, segment: int) -> Copy:
    """A copy of a segment over a new RAM piece."""
    piece = tiers.blocks.allocate(image.segments[segment].size_bytes)
    return Copy(image, piece.memory, piece, piece.storage)


def device_copy(tiers: Tiers, image: WeightImage, segment: int, ranges: dict[int, Copy]) -> Copy:
    """A copy of a segment over device memory, in the address range that `ranges` keeps for it if the device can."""
    device, size_bytes = tiers.device, image.segments[segment].size_bytes
    if not device.keeps_addresses:
        return _over(device, image, device.allocate(size_bytes))
    copy = ranges.get(segment)
    if copy is None:
        copy = ranges[segment] = _over(device, image, device.reserve(size_bytes))
    device.map(copy.memory)
    return copy


def _over(device: Device, image: WeightImage, memory: torch.Tensor) -> Copy:
    return Copy(image, memory, None, lambda offset, size: device.storage(memory, offset, size))


def give_up(tiers: Tiers, copy: Copy) -> None:
    """Release a copy that no tensor of a model points at any more, and that nothing reads or writes.

    Device memory that was allocated goes with its last reference.
    """
    if copy.piece is not None:
        tiers.blocks.release(copy.piece)
    elif tiers.device.keeps_addresses:
        tiers.device.unmap(copy.memory)

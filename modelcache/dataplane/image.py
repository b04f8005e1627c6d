"""The layout of one part as one block of bytes, cut into segments.

Pure arithmetic over what `inventory.py` found: which storage lies where, and which views of it the model's tensors are.
Ties, strides and offsets are facts of the layout, so a copy on any tier has them by construction. The layout owns no
memory; `copies.py` lays tensors over a block that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 512
SEGMENT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class View:
    """How one tensor reads its storage; `offset_bytes` counts from the start of the storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset_bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor, offset_bytes: int) -> View:
        """The view that `tensor` is, starting `offset_bytes` into its storage."""
        return cls(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), offset_bytes)

    @property
    def extent_bytes(self) -> int:
        """From its first byte to behind its last one; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        steps = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (steps + 1) * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether the tensor touches every byte of its extent."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize == self.extent_bytes

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def over(self, storage: torch.Tensor) -> torch.Tensor:
        """This view of a flat uint8 tensor that begins where the storage begins, sharing its memory."""
        itemsize = self.dtype.itemsize
        whole = storage[: storage.numel() // itemsize * itemsize].view(self.dtype)
        return whole.as_strided(self.shape, self.stride, self.offset_bytes // itemsize)


@dataclass(frozen=True, slots=True)
class StorageRange:
    """Where one storage lies: in which segment, and `offset_bytes` from that segment's start."""

    segment: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of whole storages; `offset_bytes` from the start of the block, both figures aligned."""

    offset_bytes: int
    size_bytes: int
    storages: range


@dataclass(frozen=True, slots=True)
class WeightImage:
    """The layout of one part.

    `storages[i]` is storage i of the inventory. Segments hold them in order: first registered first, until a recorded
    first-use order says better.
    """

    storages: tuple[StorageRange, ...]
    segments: tuple[Segment, ...]

    @property
    def size_bytes(self) -> int:
        """Of the whole block, alignment included."""
        return sum(segment.size_bytes for segment in self.segments)


def lay_out(sizes_bytes: Sequence[int], segment_bytes: int = SEGMENT_BYTES) -> WeightImage:
    """Place storages of these sizes one after the other and cut between them.

    A segment is closed before the storage that would take it above `segment_bytes`; one larger storage is a segment of
    its own.

    Raises:
        ValueError: `segment_bytes` is below the alignment.
    """
    if segment_bytes < ALIGNMENT_BYTES:
        raise ValueError(f"segment_bytes must be at least {ALIGNMENT_BYTES}, got {segment_bytes}")
    storages: list[StorageRange] = []
    segments: list[Segment] = []
    block_offset, filled, first = 0, 0, 0
    for i, size in enumerate(sizes_bytes):
        room = _aligned(size)
        if filled and filled + room > segment_bytes:
            segments.append(Segment(block_offset, filled, range(first, i)))
            block_offset, filled, first = block_offset + filled, 0, i
        storages.append(StorageRange(len(segments), filled, size))
        filled += room
    if filled:
        segments.append(Segment(block_offset, filled, range(first, len(sizes_bytes))))
    return WeightImage(tuple(storages), tuple(segments))


def covered(views: Sequence[View], size_bytes: int) -> list[tuple[int, int]]:
    """The byte ranges ``[start, stop)`` of a storage that the views can touch, merged and in order."""
    ranges = sorted((view.offset_bytes, min(view.offset_bytes + view.extent_bytes, size_bytes)) for view in views)
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if stop <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

"""RAM pieces: exact size, page-locked where the device can, counted while anything refers to them.

Each piece is an anonymous mapping of its own, so that giving one up returns its pages to the system. A tensor over a
piece keeps the mapping alive; nothing here unmaps memory that somebody can still read.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import weakref
from contextlib import AbstractContextManager
from threading import Lock

import torch

from modelcache.dataplane.device.protocol import Device

log = logging.getLogger("modelcache.dataplane")


def charge_bytes(size_bytes: int) -> int:
    """What a piece of `size_bytes` really takes: whole pages."""
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class RamPiece:
    """One mapping. Made by `RamBlocks.allocate`, ended by `RamBlocks.release`.

    Attributes:
        memory: A flat uint8 tensor over the payload, zero at first.
        size_bytes: What it takes of RAM, whole pages.
        locked: It is page-locked.
    """

    __slots__ = ("_map", "locked", "memory", "size_bytes")

    def __init__(self, mapping: mmap.mmap, payload_bytes: int) -> None:
        self._map: mmap.mmap | None = mapping
        self.size_bytes = len(mapping)
        self.locked = False
        self.memory: torch.Tensor = torch.frombuffer(mapping, dtype=torch.uint8, count=payload_bytes)

    def storage(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor over a range of the piece with a torch storage of its own."""
        assert self._map is not None
        if not size_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size_bytes, offset=offset_bytes)

    def buffer(self) -> memoryview:
        """The payload, for files; release it when done."""
        assert self._map is not None
        return memoryview(self._map)[: self.memory.numel()]

    def let_go(self) -> None:
        """Drop this object's own references; the pages go back to the system with the last tensor over them."""
        self._map = None
        self.memory = torch.empty(0, dtype=torch.uint8)


class RamBlocks:
    """Makes, counts and page-locks pieces.

    Thread-safe. Its lock guards the page-locked figure only and is never held across a call of the device.
    """

    def __init__(self, device: Device, page_locked_bytes: int = 0) -> None:
        self._device = device
        self._page_locked_budget_bytes = page_locked_bytes
        self._page_locked_bytes = 0
        self._refused = False
        self._lock: AbstractContextManager[object] = Lock()
        # Finalizers run on any thread at any point: one pop from a dictionary is all that they do.
        self._live: dict[int, int] = {}
        self._next_key = 0

    @property
    def page_locked_bytes(self) -> int:
        """Page-locked now."""
        return self._page_locked_bytes

    @property
    def live_bytes(self) -> int:
        """Mapped now, including pieces given up here to which somebody else's tensors still refer."""
        return sum(list(self._live.values()))

    def allocate(self, size_bytes: int) -> RamPiece:
        """A piece for `size_bytes` of payload, all zero.

        Raises:
            OSError: The system has no memory left to give.
        """
        mapping = mmap.mmap(-1, charge_bytes(size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with self._lock:
            self._next_key += 1
            key = self._next_key
        self._live[key] = len(mapping)
        weakref.finalize(mapping, self._live.pop, key, None).atexit = False
        piece = RamPiece(mapping, size_bytes)
        self._page_lock(piece)
        return piece

    def release(self, piece: RamPiece) -> None:
        """Give a piece up. No copy that reads or writes it may still be under way."""
        if piece.locked:
            try:
                self._device.page_unlock(piece.memory)
            except Exception as error:  # the device may be lost; the memory is given up all the same
                log.warning("%s could not unlock %d bytes of RAM: %s", self._device.name, piece.size_bytes, error)
            piece.locked = False
            with self._lock:
                self._page_locked_bytes -= piece.size_bytes
        piece.let_go()

    def _page_lock(self, piece: RamPiece) -> None:
        if not self._page_locked_budget_bytes or not self._device.holds_copies:
            return
        with self._lock:
            if self._page_locked_bytes + piece.size_bytes > self._page_locked_budget_bytes:
                return
            self._page_locked_bytes += piece.size_bytes
        piece.locked = self._device.page_lock(piece.memory)
        if piece.locked:
            return
        with self._lock:
            self._page_locked_bytes -= piece.size_bytes
            first, self._refused = not self._refused, True
        if first:
            log.warning(
                "%s refused to page-lock %d bytes of RAM; copies go on from ordinary memory, more slowly: raise the "
                "limit of locked memory (ulimit -l) or set budgets.page_locked to 0",
                self._device.name,
                piece.size_bytes,
            )


def return_freed_heap() -> None:
    """Ask the C library to give freed heap memory back to the system; where it cannot, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

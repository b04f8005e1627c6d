"""Mappings that have their pages and are all zero, kept for whoever wants memory next.

Bookkeeping only: who makes them, and on which thread, is said in `blocks.py`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import torch

from modelcache.dataplane.memory.fresh_pages import ask_for_huge_pages, ask_for_pages

_STEP_BYTES = 4 << 20  # after which whoever makes pages looks whether they are still wanted


def charge_bytes(size_bytes: int) -> int:
    """What a piece of `size_bytes` really takes: whole pages."""
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass(slots=True, eq=False)
class Pages:
    """One anonymous mapping.

    Attributes:
        locked: It is page-locked, all of it.
    """

    mapping: mmap.mmap
    locked: bool = False

    @classmethod
    def of_size(cls, size_bytes: int) -> Pages:
        """A new mapping of whole pages, all zero, that has none of them yet.

        Raises:
            OSError: The system has no memory left to give.
        """
        return cls(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    @property
    def size_bytes(self) -> int:
        """Of the mapping."""
        return len(self.mapping)

    def memory(self) -> torch.Tensor:
        """All of it, flat uint8."""
        return torch.frombuffer(self.mapping, dtype=torch.uint8)

    def cut(self, size_bytes: int) -> None:
        """Give the pages behind so many bytes back. Nothing may refer to it, and it must not be page-locked."""
        if size_bytes < self.size_bytes:
            self.mapping.resize(size_bytes)

    def prefer_huge(self) -> None:
        """Have its pages made huge from now on: made and page-locked faster, but nobody should wait for them."""
        with memoryview(self.mapping) as memory:
            ask_for_huge_pages(memory)

    def touch(self, is_wanted: Callable[[], bool]) -> None:
        """Have the system make the pages, whose contents stay, for as long as they are wanted."""
        with memoryview(self.mapping) as memory:
            for start in range(0, len(memory), _STEP_BYTES):
                if not is_wanted():
                    return
                with memory[start : start + _STEP_BYTES] as step:
                    ask_for_pages(step)

    def wipe(self, is_wanted: Callable[[], bool]) -> None:
        """Make it all zero again, without giving its pages back, for as long as it is wanted."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        for start in range(0, self.size_bytes, _STEP_BYTES):
            if not is_wanted():
                return
            ctypes.memset(address + start, 0, min(_STEP_BYTES, self.size_bytes - start))


class SparePages:
    """At most so many bytes of mappings: ready ones, those being made, and those promised back.

    Thread-safe; its lock guards the figures and the list of ready ones.

    Args:
        spare_bytes: At most so many.
        piece_bytes: The size of those that are made ahead of demand.
    """

    def __init__(self, spare_bytes: int, piece_bytes: int) -> None:
        self._spare_bytes, self._piece_bytes = charge_bytes(spare_bytes), charge_bytes(piece_bytes)
        self._lock = Lock()
        self._ready: list[Pages] = []
        self._ready_bytes = 0
        self._coming_bytes = 0

    @property
    def ready_bytes(self) -> int:
        """What `take` can choose from."""
        return self._ready_bytes

    @property
    def is_complete(self) -> bool:
        """Nothing is to be made, being made, or promised back."""
        with self._lock:
            return not self._coming_bytes and not self._missing()

    def take(self, size_bytes: int) -> Pages | None:
        """A mapping of this size, or a larger one that is to be cut; `None` when none can be had at little cost.

        A larger one only if at least half of it is used, and rather one that is not page-locked.
        """
        with self._lock:
            found = min(
                (pages for pages in self._ready if size_bytes <= pages.size_bytes <= 2 * size_bytes),
                key=lambda pages: (pages.size_bytes, pages.locked is not (pages.size_bytes == size_bytes)),
                default=None,
            )
            if found is None:
                return None
            self._ready.remove(found)
            self._ready_bytes -= found.size_bytes
        return found

    def expect_back(self, size_bytes: int) -> bool:
        """Whether there is room for a mapping that is about to be given up, which is kept for it from now on."""
        with self._lock:
            if 4 * size_bytes < self._piece_bytes or size_bytes > self._room():
                return False
            self._coming_bytes += size_bytes
            return True

    def expect_new(self) -> int:
        """The size of a mapping that ought to be made, for which room is kept from now on; 0 when there are enough."""
        with self._lock:
            size_bytes = self._missing()
            self._coming_bytes += size_bytes
            return size_bytes

    def put(self, pages: Pages) -> None:
        """A mapping that was expected, all zero, and that nothing refers to, is ready."""
        with self._lock:
            self._coming_bytes -= pages.size_bytes
            self._ready.append(pages)
            self._ready_bytes += pages.size_bytes

    def forgo(self, size_bytes: int) -> None:
        """A mapping that was expected does not come."""
        with self._lock:
            self._coming_bytes -= size_bytes

    def clear(self) -> list[Pages]:
        """Give up those that are ready."""
        with self._lock:
            ready, self._ready, self._ready_bytes = self._ready, [], 0
        return ready

    def _room(self) -> int:
        return self._spare_bytes - self._ready_bytes - self._coming_bytes

    def _missing(self) -> int:
        size_bytes = min(self._piece_bytes, self._room())
        # Mappings a fraction of the usual size would hardly ever fit.
        return size_bytes if 2 * size_bytes >= min(self._piece_bytes, self._spare_bytes) > 0 else 0

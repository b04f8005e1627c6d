"""The pages behind a simulated device's address ranges: moved below a range and home again, never copied.

The device's memory is one area of ordinary private pages, their *home*. Putting memory behind a range moves page table
entries there (``mremap``), 10 us for 64 MiB; what was written stays in the pages, and so does the cost of having
touched them. An address that has no memory traps: the area of a range is mapped without any access.

Not covered: systems other than Linux 5.7 or newer.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from bisect import bisect_left
from functools import cache
from typing import Any

PAGE_BYTES = mmap.PAGESIZE
_HUGE_PAGE_BYTES = 2 << 20

_NO_ACCESS, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
# What Python's mmap module does not name.
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_HUGEPAGE, _MADV_DONTNEED = 14, 4
# Move, to this address, and leave the source mapped without pages: no other thread's memory can come into the hole.
_MOVE_FIXED_KEEP = 1 | 2 | 4
_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> Any:
    """The C library with the types of what is called.

    Raises:
        RuntimeError: This system cannot move pages.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError("the simulated device maps memory on Linux only; use memory='allocated'")
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = address, (address, size, number, number, number, ctypes.c_int64)
    libc.mremap.restype, libc.mremap.argtypes = address, (address, size, size, number, address)
    libc.munmap.restype, libc.munmap.argtypes = number, (address, size)
    libc.madvise.restype, libc.madvise.argtypes = number, (address, size, number)
    return libc


def reserve_addresses(length_bytes: int) -> int:
    """The address of a new range without memory, at a multiple of 2 MiB.

    Raises:
        OSError: The process has no addresses or mappings left.
    """
    return _new_area(length_bytes, _NO_ACCESS)


def release_addresses(address: int, length_bytes: int) -> None:
    """Give a range back to the system."""
    _libc().munmap(address, length_bytes)


def close_addresses(address: int, length_bytes: int) -> None:
    """Let every access to a range trap; pages that are there are dropped.

    Raises:
        OSError: The system refused.
    """
    _map(address, length_bytes, _NO_ACCESS, _MAP_FIXED)


def _new_area(length_bytes: int, access: int) -> int:
    start = _map(None, length_bytes + _HUGE_PAGE_BYTES, access, 0)
    address = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    if address > start:
        _libc().munmap(start, address - start)
    _libc().munmap(address + length_bytes, start + _HUGE_PAGE_BYTES - address)
    return address


def _map(address: int | None, length_bytes: int, access: int, flags: int) -> int:
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | flags
    found: int | None = _libc().mmap(address, length_bytes, access, kind, -1, 0)
    if found is None or found == _FAILED:
        raise _os_error(f"cannot map {length_bytes} bytes of addresses")
    return found


def _os_error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


class Extents:
    """Pieces of an area, neighbours joined.

    Attributes:
        size_bytes: Of all of them.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []
        self.size_bytes = 0

    def add(self, start: int, length_bytes: int) -> None:
        """Add a piece, which must not overlap another."""
        self.size_bytes += length_bytes
        place = bisect_left(self._runs, (start, 0))
        first = last = place
        end = start + length_bytes
        if place and sum(self._runs[place - 1]) == start:
            first, start = place - 1, self._runs[place - 1][0]
        if place < len(self._runs) and self._runs[place][0] == end:
            last, end = place + 1, sum(self._runs[place])
        self._runs[first:last] = [(start, end - start)]

    def take(self, length_bytes: int) -> list[tuple[int, int]]:
        """Take up to that many bytes, in one piece if there is one that long."""
        for place, (start, size) in enumerate(self._runs):
            if size >= length_bytes:
                self._runs[place : place + 1] = [(start + length_bytes, size - length_bytes)] * (size > length_bytes)
                self.size_bytes -= length_bytes
                return [(start, length_bytes)] * (length_bytes > 0)
        taken: list[tuple[int, int]] = []
        while length_bytes and self._runs:
            start, size = self._runs.pop()
            part = min(size, length_bytes)
            if part < size:
                self._runs.append((start + part, size - part))
            taken.append((start, part))
            length_bytes -= part
            self.size_bytes -= part
        return taken


class Pages:
    """The memory of one device: pages that are at home, or behind one of its ranges.

    Not thread-safe: the caller holds a lock.

    Attributes:
        unit_bytes: What may be moved is a multiple of this.

    Args:
        size_bytes: Of all pages.
        unit_bytes: A multiple of the system's page.

    Raises:
        RuntimeError: This system cannot move pages, or has no room for so many addresses.
    """

    def __init__(self, size_bytes: int, unit_bytes: int) -> None:
        self.unit_bytes = unit_bytes
        self._length_bytes = size_bytes // unit_bytes * unit_bytes
        self._home = 0
        # Free pages: touched before, so that they cost no page faults, or not.
        self._warm, self._cold = Extents(), Extents()
        _require_moving()
        if self._length_bytes:
            try:
                self._home = _new_area(self._length_bytes, _READ_WRITE)
            except OSError as error:
                raise RuntimeError(
                    f"the simulated device cannot map its {self._length_bytes} bytes ({error.strerror}); "
                    "lower its capacity or use memory='allocated'"
                ) from error
            # An area with a page in it keeps its identity when parts of it move, and they join again at home.
            ctypes.c_uint8.from_address(self._home).value = 0
            if unit_bytes % _HUGE_PAGE_BYTES == 0:
                _libc().madvise(self._home, self._length_bytes, _MADV_HUGEPAGE)
            self._cold.add(self._home, self._length_bytes)

    @property
    def warm_bytes(self) -> int:
        """Free pages that take RAM."""
        return self._warm.size_bytes

    def put_behind(self, address: int, length_bytes: int) -> list[tuple[int, int]]:
        """Move free pages to a range; returns where they are at home, in order, as `take_back` wants it.

        Raises:
            OSError: The system refused; nothing was moved.
        """
        runs = self._warm.take(min(length_bytes, self._warm.size_bytes))
        runs += self._cold.take(length_bytes - sum(size for _, size in runs))
        moved: list[tuple[int, int]] = []
        target = address
        try:
            for start, size in runs:
                _move(start, target, size, self.unit_bytes)
                moved.append((start, size))
                target += size
        except OSError:
            self.take_back(address, moved)
            close_addresses(address, length_bytes)
            for start, size in runs[len(moved) :]:
                self._cold.add(start, size)
            raise
        return runs

    def take_back(self, address: int, runs: list[tuple[int, int]]) -> None:
        """Move the pages behind a range home; the range is left open, see `close_addresses`."""
        for start, size in runs:
            try:
                _move(address, start, size, self.unit_bytes)
            except OSError:
                # They are dropped with the range, and home was kept mapped: only the pages are new next time.
                self._cold.add(start, size)
            else:
                self._warm.add(start, size)
            address += size

    def drop_warm(self, allowed_bytes: int) -> None:
        """Give free pages back to the system until no more than this take RAM."""
        excess = max(0, self._warm.size_bytes - allowed_bytes)
        for start, size in self._warm.take(-(-excess // self.unit_bytes) * self.unit_bytes):
            _libc().madvise(start, size, _MADV_DONTNEED)
            self._cold.add(start, size)

    def __del__(self) -> None:
        # Every range that has pages of this area refers to it, so all are at home. The process's end needs no help.
        if getattr(self, "_home", 0) and not sys.is_finalizing():
            release_addresses(self._home, self._length_bytes)


def _move(source: int, target: int, length_bytes: int, unit_bytes: int) -> None:
    """Move pages, in pieces where the system keeps them as several areas.

    Raises:
        OSError: The system refused.
    """
    while length_bytes:
        piece = length_bytes
        while _libc().mremap(source, piece, piece, _MOVE_FIXED_KEEP, target) != target:
            if ctypes.get_errno() != errno.EFAULT or piece == unit_bytes:
                raise _os_error(f"cannot move {piece} bytes of pages")
            piece = max(piece // 2 // unit_bytes, 1) * unit_bytes
        source, target, length_bytes = source + piece, target + piece, length_bytes - piece


@cache
def _require_moving() -> None:
    """Try it once.

    Raises:
        RuntimeError: This system cannot move pages and keep the place.
    """
    source, target = _new_area(PAGE_BYTES, _READ_WRITE), _new_area(PAGE_BYTES, _NO_ACCESS)
    ctypes.c_uint8.from_address(source).value = 1
    try:
        _move(source, target, PAGE_BYTES, PAGE_BYTES)
    except OSError as error:
        raise RuntimeError(
            f"the simulated device maps memory on Linux 5.7 or newer only ({error.strerror}); use memory='allocated'"
        ) from error
    finally:
        release_addresses(source, PAGE_BYTES)
        release_addresses(target, PAGE_BYTES)

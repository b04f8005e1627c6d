"""What the system has of a file in memory: asked about, and given back where reading brought it in."""

from __future__ import annotations

import ctypes
import mmap
import os

_CACHESTAT = 451  # a system call of Linux since 6.5, with the same number on every architecture

_libc = ctypes.CDLL(None)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("size_bytes", ctypes.c_uint64))


class _Found(ctypes.Structure):
    _fields_ = (
        ("cached", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("in_writing", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("evicted_lately", ctypes.c_uint64),
    )


def is_absent(descriptor: int, offset: int, size_bytes: int) -> bool:
    """Whether the system is known to have nothing in memory of a stretch of a file, the pages at its ends excepted."""
    begin, end = _inside(offset, size_bytes)
    return begin < end and cached_bytes(descriptor, begin, end - begin) == 0


def cached_bytes(descriptor: int, offset: int, size_bytes: int) -> int | None:
    """How much of a stretch of a file is in memory, in whole pages; `None` where the system does not say."""
    if not size_bytes:
        return 0
    asked, found = _Range(offset, size_bytes), _Found()
    arguments = (ctypes.c_long(_CACHESTAT), ctypes.c_long(descriptor), ctypes.byref(asked), ctypes.byref(found))
    if _syscall(*arguments, ctypes.c_long(0)):
        return None
    return int(found.cached) * mmap.PAGESIZE


def forget(descriptor: int, offset: int, size_bytes: int) -> None:
    """Let the system drop what it has of a stretch of a file, the pages at its ends excepted."""
    begin, end = _inside(offset, size_bytes)
    if begin < end:
        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _inside(offset: int, size_bytes: int) -> tuple[int, int]:
    page = mmap.PAGESIZE
    return -(-offset // page) * page, (offset + size_bytes) // page * page

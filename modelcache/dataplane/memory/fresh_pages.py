"""Pages for memory that is about to be written to, many at a time.

The first write to each page of fresh memory interrupts whoever writes. Asking for the pages of a stretch before it is
written takes one call for all of them, and they are still in the processor's cache when the data comes.
"""

from __future__ import annotations

import ctypes
import mmap

_POPULATE_WRITE = 23  # of Linux since 5.14; an older one refuses, and the pages come one by one as ever

_HUGE_PAGES = 14  # large stretches are made of pages of 2 MiB, where the system has them: made, locked, given up faster

_libc = ctypes.CDLL(None)
_madvise, _mincore = _libc.madvise, _libc.mincore
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def has_pages(memory: memoryview) -> bool:
    """Whether this memory, of one page or more, seems to have its pages: the one in its middle stands for all.

    Those at both ends may be there for the sake of the neighbours.
    """
    is_there = ctypes.create_string_buffer(1)
    known = _mincore(_page_of(_address_of(memory) + memory.nbytes // 2), 1, is_there) == 0
    return known and bool(is_there.raw[0] & 1)


def ask_for_pages(memory: memoryview) -> None:
    """Have the system make all pages of this memory now; what they hold stays. Does nothing where it cannot."""
    if not memory.nbytes:
        return
    address = _address_of(memory)
    first = _page_of(address)
    # A refusal is no harm: it is only about when the pages come.
    _madvise(first, address + memory.nbytes - first, _POPULATE_WRITE)


def ask_for_huge_pages(memory: memoryview) -> None:
    """Have the system prefer huge pages for this memory, which begins at a page. Does nothing where it cannot.

    Making them may take the system long when memory is scattered: not for memory that somebody waits for.
    """
    if memory.nbytes:
        _madvise(_address_of(memory), memory.nbytes, _HUGE_PAGES)


def _address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _page_of(address: int) -> int:
    return address // mmap.PAGESIZE * mmap.PAGESIZE

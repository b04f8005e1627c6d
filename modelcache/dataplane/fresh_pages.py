"""Pages for memory that is about to be written to, many at a time.

The first write to each page of fresh memory interrupts whoever writes. Asking for the pages of a stretch before it is
written takes one call for all of them, and they are still in the processor's cache when the data comes.
"""

from __future__ import annotations

import ctypes
import mmap

_POPULATE_WRITE = 23  # of Linux since 5.14; an older one refuses, and the pages come one by one as ever

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def ask_for_pages(memory: memoryview) -> None:
    """Have the system make all pages of this memory now; what they hold stays. Does nothing where it cannot."""
    if not memory.nbytes:
        return
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    # A refusal is no harm: it is only about when the pages come.
    _madvise(first, address + memory.nbytes - first, _POPULATE_WRITE)

"""Reading past the system's page cache, for files of which it has little.

The disk alone is waited for, and what was read is in memory once. Offset, size and address of such a read are whole
blocks, and tensors lie anywhere: so what is read is a stretch of whole blocks around them, into a bounce buffer of the
thread that reads, from where each range goes to its place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

BLOCK_BYTES = 4096  # of no disk are blocks larger
BOUNCE_BYTES = 1 << 20  # larger ones no longer stay in the processor's cache until they are copied

_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
_libc = ctypes.CDLL(None)


class NotDirectError(Exception):
    """The file cannot be read in this way. Stays inside the data plane."""


class EndsError(Exception):
    """The file ends inside of what was to be read. Stays inside the data plane.

    Attributes:
        offset: Where.
    """

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Range:
    """A range of a file, and where it goes. The memory is writable and as large as the range."""

    offset: int
    memory: memoryview

    @property
    def end(self) -> int:
        """Of the range in the file."""
        return self.offset + self.memory.nbytes


class Bounces:
    """A buffer for each thread that asks, for as long as this lives."""

    def __init__(self) -> None:
        self._own = threading.local()

    def mine(self) -> mmap.mmap:
        """That of the calling thread."""
        found: mmap.mmap | None = getattr(self._own, "buffer", None)
        if found is None:
            found = self._own.buffer = mmap.mmap(-1, BOUNCE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return found


@contextmanager
def direct(descriptor: int) -> Iterator[None]:
    """This descriptor reads past the page cache inside.

    Raises:
        NotDirectError: The file system does not have that.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError as error:
        raise NotDirectError(str(error)) from error
    try:
        yield
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def read_direct(descriptor: int, ranges: Sequence[Range], bounce: mmap.mmap) -> None:
    """Fill ranges by way of the buffer. Inside of `direct`.

    Ranges that nearly touch are read at once if they are in file order.

    Raises:
        NotDirectError: The file system refuses such reads after all, or ends one where no block ends; nothing is said
            about what the ranges hold.
        EndsError: The file ends too early.
        OSError: The system could not read.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(bounce))
    with memoryview(bounce) as buffer:
        for begin, end, first, last in _stretches(ranges, len(bounce)):
            have = begin + _fill(descriptor, buffer[: end - begin], begin)
            for each in ranges[first:last]:
                start, stop = max(each.offset, begin), min(each.end, end)
                if stop > have:
                    raise EndsError(have)
                if start < stop:
                    target = ctypes.addressof(ctypes.c_char.from_buffer(each.memory)) + start - each.offset
                    ctypes.memmove(target, address + start - begin, stop - start)


def _stretches(ranges: Sequence[Range], limit_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Whole blocks to read at once: where they begin and end, and which ranges they have something of."""
    first = 0
    while first < len(ranges):
        begin = _floor(ranges[first].offset)
        last = first + 1
        while (
            last < len(ranges)
            and ranges[last].offset >= ranges[last - 1].offset  # or the stretch would begin behind it
            and ranges[last].offset - ranges[last - 1].end <= BLOCK_BYTES
            and _ceil(ranges[last].end) - begin <= limit_bytes
        ):
            last += 1
        end = _ceil(max(each.end for each in ranges[first:last]))
        for start in range(begin, end, limit_bytes):
            yield start, min(start + limit_bytes, end), first, last
        first = last


def _fill(descriptor: int, buffer: memoryview, offset: int) -> int:
    """How many bytes there were; fewer than asked for only at the end of the file."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            if error.errno in _REFUSALS:
                raise NotDirectError(str(error)) from error
            raise
        done += count
        # To go on where no block ends would be refused. It is the end of the file, unless the file is longer: file
        # systems of the network may give less than was asked for.
        if not count or done % BLOCK_BYTES:
            if done < len(buffer) and offset + done < os.fstat(descriptor).st_size:
                raise NotDirectError(f"a read at {offset} ended after {done} bytes, before the file does")
            break
    return done


def _floor(offset: int) -> int:
    return offset // BLOCK_BYTES * BLOCK_BYTES


def _ceil(offset: int) -> int:
    return -(-offset // BLOCK_BYTES) * BLOCK_BYTES

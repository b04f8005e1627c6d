"""Reads segments of an image file into memory: several threads, and the digest of what was read is taken as it comes.

Bytes with the digest that was written have the fingerprint that was written. Only when they have not, the checksum of
each storage is computed, to name the tensor. Read with ``pread``, never mapped: a mapping of a
truncated file kills the process. What the system does not have in memory is read around its page cache, where it would
only lie a second time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from xxhash import xxh3_64, xxh3_64_intdigest

from modelcache.dataplane.image import WeightImage
from modelcache.dataplane.images.format import CHUNK_BYTES, ImageFile, UnusableError, digest_of
from modelcache.dataplane.memory.fresh_pages import ask_for_pages, has_pages

_NUM_WORKERS = 4
_CACHESTAT = 451  # the system call, of Linux since 6.5
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)

Report = Callable[[int], None]


class DamagedError(UnusableError):
    """A segment holds other bytes than were written."""

    def __init__(self, segment: int) -> None:
        super().__init__("is damaged: its checksum does not match")
        self.segment = segment


def read_segments(
    descriptor: int, file: ImageFile, image: WeightImage, targets: Mapping[int, memoryview], report: Report
) -> dict[int, int]:
    """Read segments into memory of their size; returns the fingerprint of each.

    No thread is left behind, and nothing writes to the targets any more, when this returns or raises.

    Args:
        descriptor: Of the file.
        file: What was written.
        image: The layout.
        targets: Where each segment goes.
        report: Called in this thread with the bytes read since the last call. What it raises ends the work.

    Raises:
        UnusableError: The file cannot be read, ends too early, or holds other bytes than were written (`DamagedError`).
    """
    order = sorted(targets)
    chunks: dict[int, list[bytes]] = {segment: [] for segment in order}
    direct = None if is_in_memory(descriptor) else _around_cache(descriptor)
    pool = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="modelcache-read")
    ahead: deque[tuple[int, int, Future[bytes]]] = deque()

    def land() -> None:
        segment, size_bytes, future = ahead.popleft()
        chunks[segment].append(future.result())
        report(size_bytes)

    try:
        for segment in order:
            offset, size_bytes = file.data_offset + image.segments[segment].offset_bytes, len(targets[segment])
            for start in range(0, size_bytes, CHUNK_BYTES):
                if len(ahead) == 2 * _NUM_WORKERS:
                    land()
                stop = min(start + CHUNK_BYTES, size_bytes)
                work = pool.submit(_read_chunk, descriptor, direct, targets[segment], start, stop, offset + start)
                ahead.append((segment, stop - start, work))
        while ahead:
            land()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if direct is not None:
            os.close(direct)
    for segment in order:
        if digest_of(chunks[segment]) != file.digests[segment]:
            raise DamagedError(segment)
    return {segment: file.prints[segment] for segment in order}


def damaged_storages(file: ImageFile, image: WeightImage, segment: int, data: memoryview) -> Iterator[int]:
    """Which storages of a segment do not have the checksum that they were written with."""
    for storage in image.segments[segment].storages:
        place = image.storages[storage]
        if (
            xxh3_64_intdigest(data[place.offset_bytes : place.offset_bytes + place.size_bytes])
            != file.checksums[storage]
        ):
            yield storage


def is_in_memory(descriptor: int) -> bool:
    """Whether the system has most of a file in memory, or will not say."""
    size_bytes = os.fstat(descriptor).st_size
    asked, found = (ctypes.c_uint64 * 2)(0, size_bytes), (ctypes.c_uint64 * 5)()
    if _libc.syscall(_CACHESTAT, descriptor, asked, found, 0):
        return True
    return 2 * found[0] * _PAGE_BYTES >= size_bytes


def _around_cache(descriptor: int) -> int | None:
    """The same file, opened to be read without the page cache; `None` where that cannot be had."""
    with contextlib.suppress(OSError):
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    return None


def _read_chunk(descriptor: int, direct: int | None, memory: memoryview, start: int, stop: int, offset: int) -> bytes:
    """Any thread. Returns the XXH3 of what was read."""
    with memory[start:stop] as target:  # ended here, or the frame of an error would keep the memory
        if not has_pages(target):
            ask_for_pages(target)
        _read_all(descriptor, direct, target, offset)
        return xxh3_64(target).digest()


def _read_all(descriptor: int, direct: int | None, target: memoryview, offset: int) -> None:
    done = 0 if direct is None else _read_around(direct, target, offset)
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise UnusableError(f"cannot be read at byte {offset + done}: {error.strerror}") from error
        if not count:
            raise UnusableError(f"is truncated: it ends before byte {offset + done + 1}")
        done += count


def _read_around(direct: int, target: memoryview, offset: int) -> int:
    """How much of a chunk could be read without the page cache."""
    try:
        return os.preadv(direct, [target], offset)
    except OSError:
        return 0  # some disks want another alignment; whatever is wrong, an ordinary read will say it

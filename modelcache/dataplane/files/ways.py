"""How each file is read: from the system's page cache, or past it where the system has little of the file.

What was decided for a file holds as long as the `Ways`, that is for one reading.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from threading import Lock

from modelcache.dataplane.files.direct import Bounces
from modelcache.dataplane.files.page_cache import cached_bytes, forget, is_absent

CACHED_WORKERS = min(4, max(2, os.cpu_count() or 1))  # what the system has is copied at the speed of memory
DISK_WORKERS = 8  # disks are fast only when much is asked for at a time

_SMALL_BYTES = 1 << 20  # a smaller file is not worth the question
_NUM_LOOKED_AT = 16  # files, before it is decided how many threads there are


class Way(Enum):
    """How a file is read."""

    CACHED = "cached"  # through the page cache, which has most of it, or nobody knows
    DIRECT = "direct"  # past the page cache, which has less than half of it
    PASSING = "passing"  # through the page cache, which is to forget again what only this reading brought in


class Ways:
    """Thread-safe. Its lock guards what was decided, and is held while the system is asked."""

    def __init__(self) -> None:
        self.bounces = Bounces()
        self._lock = Lock()
        self._ways: dict[tuple[int, int], Way] = {}

    def of(self, descriptor: int, found: os.stat_result) -> Way:
        """How to read this file."""
        key = (found.st_dev, found.st_ino)
        with self._lock:
            if key not in self._ways:
                self._ways[key] = _way(descriptor, found.st_size)
            return self._ways[key]

    def refused(self, found: os.stat_result) -> None:
        """The file system cannot read this file past the page cache."""
        with self._lock:
            self._ways[found.st_dev, found.st_ino] = Way.PASSING

    def num_workers(self, paths: Sequence[str]) -> int:
        """How many threads had better read these files."""
        for path in list(dict.fromkeys(paths))[:_NUM_LOOKED_AT]:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            except OSError:
                continue  # whoever reads it says what is wrong, in better words
            try:
                if self.of(descriptor, os.fstat(descriptor)) is not Way.CACHED:
                    return DISK_WORKERS
            finally:
                os.close(descriptor)
        return CACHED_WORKERS


class Passing:
    """A stretch of a file is read through the page cache, which forgets it afterwards if it had nothing of it before.

    What others brought in is left alone.
    """

    def __init__(self, descriptor: int, offset: int, size_bytes: int) -> None:
        self._descriptor, self._offset, self._size_bytes = descriptor, offset, size_bytes
        # Or the system would read ahead what is somebody else's turn, who would take it for brought in by others.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._was_absent = is_absent(descriptor, offset, size_bytes)

    def end(self) -> None:
        """It was read."""
        if self._was_absent:
            forget(self._descriptor, self._offset, self._size_bytes)


def _way(descriptor: int, size_bytes: int) -> Way:
    if size_bytes < _SMALL_BYTES:
        return Way.CACHED
    cached = cached_bytes(descriptor, 0, size_bytes)
    return Way.DIRECT if cached is not None and 2 * cached < size_bytes else Way.CACHED

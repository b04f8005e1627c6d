"""Files as a disk gives them: without this, a file that was read before would come from the system's page cache.

The page cache is RAM that no budget counts. Somebody whose models are larger than their RAM does not have it, and the
demo's models are small enough to live in it, so it is emptied of the weights before each load, for every run alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def forget_pages(paths: Iterable[Path]) -> bool:
    """Drop the files' pages that nobody has mapped from the page cache; False where the system has no way to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        # A cache may delete its image files at any time.
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    return True

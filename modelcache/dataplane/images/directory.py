"""A directory that belongs to one process, and is swept by the next one if that process was killed.

``process-X.lock`` is locked for as long as the process lives, and ``process-X/`` holds its files. Locks end with their
process, so a lock that can be taken is one whose process is gone. Nothing with another name is ever touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path
from threading import Lock

_TRIES = 8


class OwnDirectory:
    """The directory of this process below `parent`; made when first asked for.

    Its lock guards the making.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._made_parent = False
        self._path: Path | None = None
        self._descriptor = -1
        self._lock = Lock()

    def make(self) -> Path:
        """Where files go; for the user of this process only.

        Raises:
            OSError: It could not be made.
        """
        with self._lock:
            if self._path is None:
                if not self._parent.is_dir():
                    self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    self._made_parent = True
                _sweep(self._parent)
                self._path = self._claim()
            return self._path

    def close(self) -> None:
        """Remove the directory if it is empty, and the parent if it was made for it. Idempotent."""
        with self._lock:
            if self._path is None:
                return
            with contextlib.suppress(OSError):
                self._path.rmdir()
            _lock_of(self._path).unlink(missing_ok=True)
            os.close(self._descriptor)
            if self._made_parent:
                with contextlib.suppress(OSError):
                    self._parent.rmdir()
            self._path, self._descriptor = None, -1

    def _claim(self) -> Path:
        for _ in range(_TRIES):
            path = self._parent / f"process-{os.getpid()}-{secrets.token_hex(4)}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(_lock_of(path), flags, 0o600)
            try:
                # A sweeper may have been faster than this line; then the name is its, and we take another one.
                if _try_lock(descriptor):
                    path.mkdir(mode=0o700)
                    self._descriptor = descriptor
                    return path
            except BaseException:
                _lock_of(path).unlink(missing_ok=True)
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise OSError("another process removes the lock file each time")


def _sweep(parent: Path) -> None:
    """Remove what processes left that are gone."""
    for lock in parent.glob("process-*-*.lock"):
        with contextlib.suppress(OSError):  # somebody else's, or being swept by another process
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid() and _try_lock(descriptor):
                    _remove(lock.with_suffix(""))
                    lock.unlink()
            finally:
                os.close(descriptor)


def _remove(directory: Path) -> None:
    if directory.is_symlink() or not directory.is_dir():
        return
    for file in [*directory.glob("*.image"), *directory.glob("*.tmp")]:
        file.unlink()
    directory.rmdir()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_of(directory: Path) -> Path:
    return directory.with_name(directory.name + ".lock")

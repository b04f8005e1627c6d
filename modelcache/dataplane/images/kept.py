"""Image files that outlive their process: named by what they were made from, found again by the next one.

They lie in ``kept/`` below the folder for image files, all of whose users are processes of one user. A file is written
under a temporary name and renamed when complete. While its writer lives it holds a lock on the temporary file; readers
hold a shared one on the file. Whatever changes the folder holds a lock on the folder. Locks end with their process.

Deleted are: temporary files whose writer is gone, files whose source changed or is gone, files that proved damaged, and
when room is needed those that were not used for the longest time. Each must be a regular file of this user, with a name
of the right form, that begins as our files do; anything else is left alone and never read. Bytes in a folder that
others may write to could be anybody's, so there nothing is kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from modelcache.dataplane.image import lay_out
from modelcache.dataplane.images import format as image_format
from modelcache.dataplane.images.format import Contents, Described, ImageFile, Sums, UnusableError, write_all
from modelcache.dataplane.images.origin import Origin

log = logging.getLogger("modelcache.dataplane")

_FOLDER = "kept"
_FINAL = re.compile(r"[0-9a-f]{64}\.image")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{8}\.tmp")
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# Others hold the lock of the folder for as long as it takes to look through it.
_TRIES, _PAUSE_S = 40, 0.05
_AHEAD_BYTES = 64 << 20  # what is written before the disk must have it


class AbandonedError(Exception):
    """There is no use in writing on. Stays inside the data plane."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of ours in the folder, and when it was last used."""

    name: str
    size_bytes: int
    used_ns: int


class KeptImages:
    """The kept images below one folder, as one process sees them. Thread-safe.

    Its lock guards two figures.

    Args:
        parent: The folder for image files.
        budget_bytes: What these files and those of this process alone may take together.
        segment_bytes: About how large a segment is; files that were cut otherwise are not looked for.
    """

    def __init__(self, parent: Path, budget_bytes: int, segment_bytes: int) -> None:
        self._parent, self._folder = parent, parent / _FOLDER
        self._budget_bytes = budget_bytes
        self.segment_bytes = segment_bytes
        self._lock = Lock()
        self._own_bytes = 0
        self._warned = False

    def find(self, origin: Origin) -> Described | None:
        """The file made from this source, by its header; it counts as used now. Its bytes are not looked at.

        A damaged one is deleted, with a warning; one that cannot be read now may be another time.
        """
        name = _name_of(origin)
        with self._opened() as folder:
            if folder is None:
                return None
            with _file(folder, name) as descriptor:
                if descriptor is None:
                    return None
                try:
                    found = image_format.describe(descriptor, self._folder / name)
                    self._require_fit(found, origin)
                except OSError as error:
                    log.warning("%s cannot be read: %s; loading without it", self._folder / name, error)
                    return None
                except UnusableError as error:
                    log.warning("%s %s; loading without it", self._folder / name, error)
                else:
                    with contextlib.suppress(OSError):
                        os.utime(descriptor)
                    return found
        self._remove_soon(name)
        return None

    @staticmethod
    def hold(descriptor: int) -> None:
        """See to it that nobody deletes this open file while it is read, if that can be had."""
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def write(
        self,
        origin: Origin,
        contents: Contents,
        about: dict[str, object],
        fill: Callable[[Callable[[memoryview], None]], tuple[list[int], Sums]],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> ImageFile | None:
        """Write a file and let it be found; `None` if there is no room, or another process writes it or has written it.

        Args:
            origin: What it is made from.
            contents: What is written; it holds for all processes, so its part has no id.
            about: To be found with it.
            fill: Called once, with what takes the bytes of the segments in order; returns the fingerprints of the
                segments, and the sums of what was written.
            is_wanted: Asked before each step at the end that may take a disk long.

        Raises:
            OSError: It could not be written.
            AbandonedError: It is not wanted any more, its source changed, or `fill` raised it; whatever is raised,
                nothing is left.
        """
        about = {**about, **origin.described()}
        name = _name_of(origin)
        temporary = f"{origin.key}.{secrets.token_hex(4)}.tmp"
        offset = image_format.data_offset(contents, about)
        size_bytes = offset + contents.image.size_bytes
        with self._opened(make=True) as folder:
            if folder is None or (descriptor := self._begin(folder, name, temporary, size_bytes)) is None:
                return None
            try:
                os.lseek(descriptor, offset, os.SEEK_SET)
                prints, sums = fill(_Steadily(descriptor).write)
                os.lseek(descriptor, 0, os.SEEK_SET)
                write_all(descriptor, memoryview(image_format.header(contents, prints, sums, offset, about)))
                _require(is_wanted(), "nobody waits for it")
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                _require(is_wanted(), "nobody waits for it")
                _require(Origin.is_current(about), "its source changed")
                with self._changing(folder):
                    _require(not _lies_there(folder, name), "somebody else was faster")
                    os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                if is_wanted():  # it is whole; at worst its name is lost
                    os.fsync(folder)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            finally:
                os.close(descriptor)
        path = self._folder / name
        return ImageFile(path, size_bytes, offset, tuple(prints), sums.digests, sums.checksums, is_kept=True)

    def make_room(self, own_bytes: int, needed_bytes: int = 0) -> None:
        """Files of this process alone take so many bytes now: give up kept ones until the budget holds.

        Nobody is waited for: while others change the folder, kept files stay until the next time.

        Args:
            own_bytes: All of them.
            needed_bytes: What is about to be written; should the disk have less, kept files go as well.
        """
        with self._lock:
            self._own_bytes = own_bytes
        if not own_bytes:
            return
        with contextlib.suppress(OSError, AbandonedError), self._opened() as folder:
            if folder is not None and self._is_short(folder, own_bytes, needed_bytes):
                with self._changing(folder, tries=1):
                    self._shrink(folder, 0)
                    if needed_bytes:
                        self._free_disk(folder, needed_bytes)

    def sweep(self) -> None:
        """Delete what writers left that are gone, and files whose source is another one by now."""
        with contextlib.suppress(OSError, AbandonedError), self._opened() as folder:
            if folder is not None:
                with self._changing(folder):
                    self._sweep(folder)

    def reject(self, file: ImageFile) -> None:
        """Delete a file that proved damaged, if it is there."""
        self._remove_soon(file.path.name)

    def close(self) -> None:
        """Remove the folder if it is empty."""
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    # --- the folder ---

    @contextlib.contextmanager
    def _opened(self, *, make: bool = False) -> Iterator[int | None]:
        """A descriptor of the folder; `None` if there is none, or one that others may write to."""
        try:
            if make:
                self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    self._folder.mkdir(mode=0o700)
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            self._warn(f"cannot be used: {error.strerror}")
            yield None
            return
        try:
            if _is_ours(os.fstat(descriptor)):
                yield descriptor
            else:
                self._warn("belongs to another user, or others may write to it")
                yield None
        finally:
            os.close(descriptor)

    def _warn(self, problem: str) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            log.warning(
                "%s %s: no image outlives this process; set image_dir to a folder of your own", self._folder, problem
            )

    @contextlib.contextmanager
    def _changing(self, folder: int, tries: int = _TRIES) -> Iterator[None]:
        """Nobody else changes what the folder holds.

        Raises:
            AbandonedError: Somebody else changes it all the time.
            OSError: The file system has no locks.
        """
        # A descriptor of its own: a lock belongs to an opened file, and threads must exclude each other as well.
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        try:
            pause = Event()
            while not _try_lock(descriptor):
                tries -= 1
                if tries <= 0:
                    raise AbandonedError("another process has the folder for itself")
                pause.wait(_PAUSE_S)
            yield
        finally:
            os.close(descriptor)

    def _begin(self, folder: int, name: str, temporary: str, size_bytes: int) -> int | None:
        """A locked temporary file of its final size, which others count with; `None` if it should not be written."""
        with self._changing(folder):
            self._sweep(folder)
            if _lies_there(folder, name):
                return None
            key = name.partition(".")[0]
            if any(entry.name.startswith(key) for entry in _entries(folder)):
                return None  # somebody writes it: the temporary files of others are gone by now
            if not self._shrink(folder, size_bytes) or not self._free_disk(folder, size_bytes):
                log.info("not kept image=%s bytes=%d: budgets.disk has no room", name, size_bytes)
                return None
            descriptor = os.open(temporary, _CREATE, 0o600, dir_fd=folder)
            try:
                _require(_try_lock(descriptor), "somebody locked a file that was just made")
                os.write(descriptor, image_format.MAGIC)
                os.ftruncate(descriptor, size_bytes)
            except BaseException:
                os.close(descriptor)
                os.unlink(temporary, dir_fd=folder)
                raise
            return descriptor

    def _is_short(self, folder: int, own_bytes: int, needed_bytes: int) -> bool:
        """Whether the budget or the disk has too little room; needs no lock."""
        if own_bytes + sum(entry.size_bytes for entry in _entries(folder)) > self._budget_bytes:
            return True
        return bool(needed_bytes) and shutil.disk_usage(folder).free < needed_bytes

    def _shrink(self, folder: int, extra_bytes: int) -> bool:
        """Delete files, first those not used for the longest time, until so many bytes more fit; whether they do."""
        with self._lock:
            over_bytes = self._own_bytes + extra_bytes - self._budget_bytes
        return _give_up(folder, over_bytes + sum(entry.size_bytes for entry in _entries(folder))) <= 0

    def _free_disk(self, folder: int, needed_bytes: int) -> bool:
        """The same, until the disk has so many bytes."""
        return _give_up(folder, needed_bytes - shutil.disk_usage(folder).free) <= 0

    def _sweep(self, folder: int) -> None:
        for entry in _entries(folder):
            if _TEMPORARY.fullmatch(entry.name) or not self._is_current(folder, entry.name):
                _remove(folder, entry.name)

    def _is_current(self, folder: int, name: str) -> bool:
        """Whether a file can still be found: its header is sound, and what it was made from is as it was."""
        with _file(folder, name) as descriptor:
            if descriptor is None:
                return True  # not ours to judge
            try:
                return Origin.is_current(image_format.describe(descriptor, self._folder / name).about)
            except UnusableError:
                return False

    def _require_fit(self, found: Described, origin: Origin) -> None:
        if found.about.get("key") != origin.key:
            raise UnusableError("was made from something else")
        if found.image != lay_out([place.size_bytes for place in found.image.storages], self.segment_bytes):
            raise UnusableError("has segments of another kind")

    def _remove_soon(self, name: str) -> None:
        with contextlib.suppress(OSError, AbandonedError), self._opened() as folder:
            if folder is not None:
                with self._changing(folder):
                    _remove(folder, name)


class _Steadily:
    """Writes to a file, and has the system write it to the disk as it comes and keep no copy of it in memory."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ahead_bytes = 0

    def write(self, data: memoryview) -> None:
        write_all(self._descriptor, data)
        self._ahead_bytes += len(data)
        if self._ahead_bytes >= _AHEAD_BYTES:
            self._ahead_bytes = 0
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _name_of(origin: Origin) -> str:
    return f"{origin.key}.image"


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o022


@contextlib.contextmanager
def _file(folder: int, name: str) -> Iterator[int | None]:
    """A descriptor of a regular file of ours that begins as such files do; `None` for anything else."""
    try:
        descriptor = os.open(name, _READ, dir_fd=folder)
    except OSError:
        yield None
        return
    try:
        found = os.fstat(descriptor)
        is_empty = not found.st_size and _TEMPORARY.fullmatch(name)  # its writer was ended before its first byte
        yield (
            descriptor
            if stat.S_ISREG(found.st_mode) and _is_ours(found) and (is_empty or image_format.has_magic(descriptor))
            else None
        )
    finally:
        os.close(descriptor)


def _entries(folder: int) -> list[_Entry]:
    """The files of ours, the one not used for the longest time first."""
    entries = []
    for name in os.listdir(folder):
        if _FINAL.fullmatch(name) or _TEMPORARY.fullmatch(name):
            with _file(folder, name) as descriptor:
                if descriptor is not None:
                    found = os.fstat(descriptor)
                    entries.append(_Entry(name, found.st_size, found.st_mtime_ns))
    return sorted(entries, key=lambda entry: entry.used_ns)


def _give_up(folder: int, excess_bytes: int) -> int:
    """Delete files that nobody reads until so many bytes are gone; returns what is still missing."""
    for entry in _entries(folder) if excess_bytes > 0 else ():
        if excess_bytes > 0 and _remove(folder, entry.name):
            excess_bytes -= entry.size_bytes
    return excess_bytes


def _remove(folder: int, name: str) -> bool:
    """Delete a file of ours that nobody has in use; the folder is locked."""
    with _file(folder, name) as descriptor:
        if descriptor is None or not _try_lock(descriptor):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        return True


def _lies_there(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _require(fact: bool, otherwise: str) -> None:
    if not fact:
        raise AbandonedError(otherwise)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

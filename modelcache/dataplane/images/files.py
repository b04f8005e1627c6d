"""The DISK tier: a part's block as one file, with its manifest and a checksum for each storage.

Written under a temporary name, synced, renamed; only complete files ever have the final name. What a file looks like is
said in `format.py`.

The files written here belong to one process: they lie in a directory that it made, readable by its user only
(`directory.py`), and nothing else is ever deleted. Files that other processes may find again are in
`kept.py`; they are read here as well.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock

from modelcache.dataplane.images import format as image_format
from modelcache.dataplane.images.directory import OwnDirectory
from modelcache.dataplane.images.format import Contents, ImageFile, Sums, UnusableError, write_all
from modelcache.dataplane.images.kept import KeptImages
from modelcache.dataplane.images.reading import DamagedError, damaged_storages, read_segments
from modelcache.errors import MoveError, WeightsError
from modelcache.units import format_bytes

__all__ = ["Contents", "ImageFile", "ImageFiles"]


class ImageFiles:
    """Writes, reads and deletes the image files of one process.

    Calls for different parts may come from several threads at once. Its lock guards the sizes of its files.

    Args:
        directory: Where they go; made when the first file is written.
        write: Writes some bytes to a file descriptor, as `os.write` does.
        kept: The files that processes share; they make room for those of this one.
    """

    def __init__(
        self,
        directory: Path,
        write: Callable[[int, memoryview], int] = os.write,
        kept: KeptImages | None = None,
    ) -> None:
        self._parent = directory
        self._own = OwnDirectory(directory)
        self._write = write
        self._kept = kept
        self._lock = Lock()
        self._sizes: dict[str, int] = {}

    @staticmethod
    def size_bytes(contents: Contents) -> int:
        """What the file of these contents takes, to the byte."""
        return image_format.size_bytes(contents)

    def write(
        self, contents: Contents, prints: Sequence[int], segment: Callable[[int], Iterable[memoryview]]
    ) -> ImageFile:
        """Write a part's file, replacing an earlier one when complete.

        Args:
            contents: What is written.
            prints: The fingerprint of each segment.
            segment: Gives the bytes of segment i, in pieces; called once for each, in order.

        Raises:
            MoveError: The directory or the file could not be written; an earlier file is as it was.
        """
        name = hashlib.sha256(contents.part.encode()).hexdigest()[:32]
        final = temporary = self._parent
        self._take_note(name, self.size_bytes(contents), self.size_bytes(contents))
        try:
            directory = self._own.make()
            final, temporary = directory / f"{name}.image", directory / f"{name}.{secrets.token_hex(4)}.tmp"
            written = self._write_new(temporary, final, contents, prints, segment)
            temporary.rename(final)
            _sync_directory(directory)
        except BaseException as error:
            with contextlib.suppress(OSError):  # it may not exist yet, or be the directory that could not be made
                temporary.unlink()
            if not (final != self._parent and final.exists()):
                self._take_note(name, 0)
            if isinstance(error, OSError):
                raise self._unwritable(error, final, contents) from error
            raise
        return written

    def read(
        self, file: ImageFile, contents: Contents, segments: Mapping[int, memoryview], report: Callable[[int], None]
    ) -> dict[int, int]:
        """Read segments of a file into memory of their size and verify them; returns their fingerprints.

        Raises:
            WeightsError: The file is missing, truncated or damaged.
        """
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise WeightsError(contents.model, str(file.path), f"cannot be opened: {error.strerror}") from error
        try:
            if file.is_kept:
                KeptImages.hold(descriptor)
            return read_segments(descriptor, file, contents.image, segments, report)
        except DamagedError as error:
            damaged = damaged_storages(file, contents.image, error.segment, segments[error.segment])
            name = next((name for storage in damaged for name in contents.views[storage]), None)
            raise WeightsError(contents.model, str(file.path), str(error), name) from error
        except UnusableError as error:
            raise WeightsError(contents.model, str(file.path), str(error)) from error
        finally:
            os.close(descriptor)

    def delete(self, file: ImageFile) -> None:
        """Delete a file that is not needed any more; one that is gone already is fine, and a kept one stays."""
        if file.is_kept:
            return
        with contextlib.suppress(OSError):
            file.path.unlink()
        self._take_note(file.path.stem, 0)

    def reject(self, file: ImageFile) -> None:
        """Delete a file that cannot be used."""
        if file.is_kept and self._kept is not None:
            self._kept.reject(file)
        else:
            self.delete(file)

    def close(self) -> None:
        """Remove the directory when it is empty. Idempotent."""
        if self._kept is not None:
            self._kept.close()
        self._own.close()

    def _take_note(self, name: str, size_bytes: int, needed_bytes: int = 0) -> None:
        with self._lock:
            self._sizes[name] = size_bytes
            total_bytes = sum(self._sizes.values())
        if self._kept is not None:
            self._kept.make_room(total_bytes, needed_bytes)

    def _write_new(
        self,
        temporary: Path,
        final: Path,
        contents: Contents,
        prints: Sequence[int],
        segment: Callable[[int], Iterable[memoryview]],
    ) -> ImageFile:
        offset = image_format.data_offset(contents)
        sums = Sums(contents.image)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            for index in range(len(contents.image.segments)):
                start = 0
                for data in segment(index):
                    with data:
                        sums.add(index, start, data)
                        write_all(descriptor, data, self._write)
                        start += len(data)
            os.lseek(descriptor, 0, os.SEEK_SET)
            write_all(descriptor, memoryview(image_format.header(contents, prints, sums, offset)), self._write)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return ImageFile(final, offset + contents.image.size_bytes, offset, tuple(prints), sums.digests, sums.checksums)

    def _unwritable(self, error: OSError, path: Path, contents: Contents) -> MoveError:
        need = format_bytes(self.size_bytes(contents))
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = format_bytes(shutil.disk_usage(self._parent).free)
            problem = f"{path}: {error.strerror}: needs {need}, {free} free; free disk space or set another directory"
        else:
            problem = f"{path}: cannot be written: {error.strerror or error}"
        return MoveError(contents.model, "ram", "disk", problem)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

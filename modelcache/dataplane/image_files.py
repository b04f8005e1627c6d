"""The DISK tier: a part's block as one file, with its manifest and a checksum for each storage.

File: 8 bytes of magic, the CRC-32 and the length of the manifest (little-endian, 4 and 8 bytes), the manifest (JSON,
UTF-8, padded with spaces), then the segments one after the other as they are in memory. Written under a temporary name,
synced, renamed; only complete files ever have the final name. Read with ``pread``, never mapped: a mapping of a
truncated file kills the process.

Files belong to one process: they lie in a directory that this process made, readable by its user only
(`image_directory.py`), and nothing else is ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelcache.dataplane.image import View, WeightImage
from modelcache.dataplane.image_directory import OwnDirectory
from modelcache.errors import MoveError, WeightsError
from modelcache.units import format_bytes

_MAGIC = b"MCIMAGE1"
_PREFIX = struct.Struct("<8sIQ")
_VERSION = 1
_PAGE_BYTES = 4096
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file that was written.

    Attributes:
        path: Where it is.
        size_bytes: Of the file.
        data_offset: Where the first segment starts.
        checksums: CRC-32 of each storage.
        prints: The fingerprint of each segment, which say what bytes it holds.
    """

    path: Path
    size_bytes: int
    data_offset: int
    checksums: tuple[int, ...]
    prints: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What an image file describes.

    Attributes:
        part: The part's id.
        model: The model that errors are about.
        image: The layout.
        views: For each storage, the tensors over it by full name.
    """

    part: str
    model: str
    image: WeightImage
    views: tuple[Mapping[str, View], ...]


class ImageFiles:
    """Writes, reads and deletes the image files of one process.

    Calls for different parts may come from several threads at once.

    Args:
        directory: Where they go; made when the first file is written.
        write: Writes some bytes to a file descriptor, as `os.write` does.
    """

    def __init__(self, directory: Path, write: Callable[[int, memoryview], int] = os.write) -> None:
        self._parent = directory
        self._own = OwnDirectory(directory)
        self._write = write

    @staticmethod
    def size_bytes(contents: Contents) -> int:
        """What the file of these contents takes, to the byte."""
        return _data_offset(contents) + contents.image.size_bytes

    def write(self, contents: Contents, prints: Sequence[int], segment: Callable[[int], memoryview]) -> ImageFile:
        """Write a part's file, replacing an earlier one when complete.

        Args:
            contents: What is written.
            prints: The fingerprint of each segment.
            segment: Gives the bytes of segment i; called once for each, in order.

        Raises:
            MoveError: The directory or the file could not be written; an earlier file is as it was.
        """
        name = hashlib.sha256(contents.part.encode()).hexdigest()[:32]
        final = temporary = self._parent
        try:
            directory = self._own.make()
            final, temporary = directory / f"{name}.image", directory / f"{name}.{secrets.token_hex(4)}.tmp"
            written = self._write_new(temporary, final, contents, prints, segment)
            temporary.rename(final)
            _sync_directory(directory)
        except BaseException as error:
            with contextlib.suppress(OSError):  # it may not exist yet, or be the directory that could not be made
                temporary.unlink()
            if isinstance(error, OSError):
                raise self._unwritable(error, final, contents) from error
            raise
        return written

    def read(
        self, file: ImageFile, contents: Contents, segments: Mapping[int, memoryview], report: Callable[[int], None]
    ) -> None:
        """Read segments of a file into memory of their size and verify every storage of them.

        Raises:
            WeightsError: The file is missing, truncated or damaged.
        """
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise WeightsError(contents.model, str(file.path), f"cannot be opened: {error.strerror}") from error
        try:
            for index, target in sorted(segments.items()):
                place = contents.image.segments[index]
                _read_exactly(descriptor, target, file.data_offset + place.offset_bytes, report)
                _verify(target, index, file, contents)
        except _ReadError as error:
            raise WeightsError(contents.model, str(file.path), str(error)) from error
        finally:
            os.close(descriptor)

    def delete(self, file: ImageFile) -> None:
        """Delete a file; one that is gone already is fine."""
        with contextlib.suppress(OSError):
            file.path.unlink()

    def close(self) -> None:
        """Remove the directory when it is empty. Idempotent."""
        self._own.close()

    def _write_new(
        self,
        temporary: Path,
        final: Path,
        contents: Contents,
        prints: Sequence[int],
        segment: Callable[[int], memoryview],
    ) -> ImageFile:
        offset = _data_offset(contents)
        checksums = [0] * len(contents.image.storages)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            for index, place in enumerate(contents.image.segments):
                with segment(index) as data:
                    for storage in place.storages:
                        checksums[storage] = zlib.crc32(_range_of(data, contents.image, storage))
                    self._write_all(descriptor, data)
            os.lseek(descriptor, 0, os.SEEK_SET)
            self._write_all(descriptor, memoryview(_header(contents, prints, checksums, offset)))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return ImageFile(final, offset + contents.image.size_bytes, offset, tuple(checksums), tuple(prints))

    def _write_all(self, descriptor: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._write(descriptor, data[done : done + _CHUNK_BYTES])

    def _unwritable(self, error: OSError, path: Path, contents: Contents) -> MoveError:
        need = format_bytes(self.size_bytes(contents))
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = format_bytes(shutil.disk_usage(self._parent).free)
            problem = f"{path}: {error.strerror}: needs {need}, {free} free; free disk space or set another directory"
        else:
            problem = f"{path}: cannot be written: {error.strerror or error}"
        return MoveError(contents.model, "ram", "disk", problem)


def _range_of(data: memoryview, image: WeightImage, storage: int) -> memoryview:
    place = image.storages[storage]
    return data[place.offset_bytes : place.offset_bytes + place.size_bytes]


def _manifest(contents: Contents, prints: Sequence[int], checksums: Sequence[int]) -> bytes:
    # Checksums and prints have a fixed width, so that the size of the file is known before its bytes are.
    storages = [
        {
            "segment": place.segment,
            "offset": place.offset_bytes,
            "size": place.size_bytes,
            "crc32": f"{checksum:08x}",
            "tensors": {
                name: [str(view.dtype), view.shape, view.stride, view.offset_bytes] for name, view in views.items()
            },
        }
        for place, checksum, views in zip(contents.image.storages, checksums, contents.views, strict=True)
    ]
    segments = [
        {"offset": segment.offset_bytes, "size": segment.size_bytes, "fingerprint": f"{fingerprint:016x}"}
        for segment, fingerprint in zip(contents.image.segments, prints, strict=True)
    ]
    manifest = {"version": _VERSION, "part": contents.part, "segments": segments, "storages": storages}
    return json.dumps(manifest, separators=(",", ":")).encode()


def _data_offset(contents: Contents) -> int:
    empty = _manifest(contents, [0] * len(contents.image.segments), [0] * len(contents.image.storages))
    return -(-(_PREFIX.size + len(empty)) // _PAGE_BYTES) * _PAGE_BYTES


def _header(contents: Contents, prints: Sequence[int], checksums: Sequence[int], data_offset: int) -> bytes:
    manifest = _manifest(contents, prints, checksums).ljust(data_offset - _PREFIX.size)
    return _PREFIX.pack(_MAGIC, zlib.crc32(manifest), len(manifest)) + manifest


class _ReadError(Exception):
    """What is wrong with a file, in words."""


def _read_exactly(descriptor: int, target: memoryview, offset: int, report: Callable[[int], None]) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done : done + _CHUNK_BYTES]], offset + done)
        except OSError as error:
            raise _ReadError(f"cannot be read at byte {offset + done}: {error.strerror}") from error
        if not count:
            raise _ReadError(f"is truncated: it ends before byte {offset + done + 1}")
        done += count
        report(count)


def _verify(data: memoryview, segment: int, file: ImageFile, contents: Contents) -> None:
    for storage in contents.image.segments[segment].storages:
        if zlib.crc32(_range_of(data, contents.image, storage)) != file.checksums[storage]:
            name = next(iter(contents.views[storage]), None)
            raise WeightsError(contents.model, str(file.path), "is damaged: its checksum does not match", name)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

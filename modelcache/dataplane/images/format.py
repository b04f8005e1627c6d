"""What an image file looks like, and how one that somebody else wrote is understood.

File: 8 bytes of magic, the CRC-32 and the length of the manifest (little-endian, 4 and 8 bytes), the manifest (JSON,
UTF-8, padded with spaces), then the segments one after the other as they are in memory. Only complete files have a
header: it is written last.

Bytes are known by XXH3 (64 bits): of each storage, and of each segment as the XXH3 of those of its chunks, which
several threads can compute.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from xxhash import xxh3_64

from modelcache.dataplane.image import Segment, StorageRange, View, WeightImage

MAGIC = b"MCIMAGE1"
VERSION = 2
CHUNK_BYTES = 4 << 20
"""What is read and checked at once, of each segment from its beginning."""
_PREFIX = struct.Struct("<8sIQ")
_PAGE_BYTES = 4096
_MAX_MANIFEST_BYTES = 256 << 20
_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file that was written.

    Attributes:
        path: Where it is.
        size_bytes: Of the file.
        data_offset: Where the first segment starts.
        prints: The fingerprint of each segment, which is what writes are looked for with.
        digests: The digest of each segment, which is what a reading is checked with.
        checksums: XXH3 of each storage.
        is_kept: It outlives this process and is shared with others, any of which may delete it.
    """

    path: Path
    size_bytes: int
    data_offset: int
    prints: tuple[int, ...]
    digests: tuple[int, ...]
    checksums: tuple[int, ...]
    is_kept: bool = False


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


@dataclass(frozen=True, slots=True)
class Described:
    """What the header of a file says; `about` is what its writer wanted to be found with it."""

    file: ImageFile
    image: WeightImage
    views: tuple[Mapping[str, View], ...]
    about: Mapping[str, Any]


class UnusableError(Exception):
    """What is wrong with an image file, in words. Stays inside the data plane."""


def size_bytes(contents: Contents, about: Mapping[str, object] = _NOTHING) -> int:
    """What the file of these contents takes, to the byte."""
    return data_offset(contents, about) + contents.image.size_bytes


def data_offset(contents: Contents, about: Mapping[str, object] = _NOTHING) -> int:
    """Where its first segment starts."""
    # Sums have a fixed width, so that the size of the file is known before its bytes are.
    of_segments = [0] * len(contents.image.segments)
    empty = _manifest(contents, of_segments, of_segments, [0] * len(contents.image.storages), about)
    return -(-(_PREFIX.size + len(empty)) // _PAGE_BYTES) * _PAGE_BYTES


def header(
    contents: Contents,
    prints: Sequence[int],
    sums: Sums,
    offset: int,
    about: Mapping[str, object] = _NOTHING,
) -> bytes:
    """Everything before the first segment, which starts at `offset`."""
    manifest = _manifest(contents, prints, sums.digests, sums.checksums, about).ljust(offset - _PREFIX.size)
    return _PREFIX.pack(MAGIC, zlib.crc32(manifest), len(manifest)) + manifest


def has_magic(descriptor: int) -> bool:
    """Whether an open file begins as ours do."""
    return os.pread(descriptor, len(MAGIC), 0) == MAGIC


class Sums:
    """The digests and checksums of what is written, as its bytes come: segment after segment, each from its beginning.

    Args:
        image: The layout.
    """

    def __init__(self, image: WeightImage) -> None:
        self._image = image
        self._storages = [xxh3_64() for _ in image.storages]
        self._chunks: list[list[bytes]] = [[] for _ in image.segments]
        self._chunk = xxh3_64()

    def add(self, segment: int, start: int, data: memoryview) -> None:
        """Bytes of a segment, from its byte `start`."""
        place, end = self._image.segments[segment], start + len(data)
        for storage in place.storages:
            where = self._image.storages[storage]
            first, last = where.offset_bytes - start, where.offset_bytes + where.size_bytes - start
            if first < len(data) and last > 0:
                self._storages[storage].update(data[max(first, 0) : last])
        while start < end:
            stop = min(end, (start // CHUNK_BYTES + 1) * CHUNK_BYTES)
            self._chunk.update(data[: stop - start])
            if stop % CHUNK_BYTES == 0 or stop == place.size_bytes:
                self._chunks[segment].append(self._chunk.digest())
                self._chunk.reset()
            data, start = data[stop - start :], stop

    @property
    def digests(self) -> tuple[int, ...]:
        """Of the segments."""
        return tuple(map(digest_of, self._chunks))

    @property
    def checksums(self) -> tuple[int, ...]:
        """Of the storages."""
        return tuple(each.intdigest() for each in self._storages)


def digest_of(chunks: Iterable[bytes]) -> int:
    """The digest of a segment, from the XXH3 of its chunks in order."""
    return xxh3_64(b"".join(chunks)).intdigest()


def write_all(descriptor: int, data: memoryview, write: Callable[[int, memoryview], int] = os.write) -> None:
    """Write all of it where the file is, however little each call takes."""
    done = 0
    while done < len(data):
        done += write(descriptor, data[done : done + (8 << 20)])


def describe(descriptor: int, path: Path) -> Described:
    """Read the header of an open file, believing nothing of it.

    Raises:
        UnusableError: It is no image file, of another version, damaged or cut short.
        OSError: It cannot be read.
    """
    prefix = os.pread(descriptor, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size or prefix[: len(MAGIC)] != MAGIC:
        raise UnusableError("is no image file")
    _, checksum, length = _PREFIX.unpack(prefix)
    found_bytes = os.fstat(descriptor).st_size
    if not 0 < length <= min(_MAX_MANIFEST_BYTES, found_bytes - _PREFIX.size):
        raise UnusableError("is damaged: its manifest has an impossible length")
    manifest = _pread(descriptor, length, _PREFIX.size)
    if zlib.crc32(manifest) != checksum:
        raise UnusableError("is damaged: the checksum of its manifest does not match")
    try:
        found = _understood(json.loads(manifest), path, found_bytes, _PREFIX.size + length)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise UnusableError(f"has a manifest that cannot be understood: {error!r}") from error
    if found.file.data_offset + found.image.size_bytes != found_bytes:
        raise UnusableError(f"is truncated: it has {found_bytes:,} bytes")
    return found


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    pieces = []
    while size and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return b"".join(pieces)


def _understood(manifest: Any, path: Path, found_bytes: int, offset: int) -> Described:
    if manifest["version"] != VERSION:
        raise ValueError(f"version {manifest['version']}")
    storages = tuple(
        StorageRange(_count(each["segment"]), _count(each["offset"]), _count(each["size"]))
        for each in manifest["storages"]
    )
    of_segment: list[list[int]] = [[] for _ in manifest["segments"]]
    for index, place in enumerate(storages):
        of_segment[place.segment].append(index)
    segments = tuple(
        Segment(_count(each["offset"]), _count(each["size"]), range(indices[0], indices[-1] + 1))
        for each, indices in zip(manifest["segments"], of_segment, strict=True)
    )
    file = ImageFile(
        path,
        found_bytes,
        offset,
        tuple(int(each["fingerprint"], 16) for each in manifest["segments"]),
        tuple(int(each["xxh3"], 16) for each in manifest["segments"]),
        tuple(int(each["xxh3"], 16) for each in manifest["storages"]),
        is_kept=True,
    )
    views = tuple({name: _view(*view) for name, view in each["tensors"].items()} for each in manifest["storages"])
    for place, tensors in zip(storages, views, strict=True):
        if place.offset_bytes + place.size_bytes > segments[place.segment].size_bytes:
            raise ValueError("a storage beyond its segment")
        if any(view.offset_bytes + view.extent_bytes > place.size_bytes for view in tensors.values()):
            raise ValueError("a tensor beyond its storage")
    return Described(file, WeightImage(storages, segments), views, manifest["about"])


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value


def _view(dtype: str, shape: list[int], stride: list[int], offset_bytes: int) -> View:
    found = getattr(torch, dtype.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{dtype!r} is no dtype")
    return View(found, tuple(map(_count, shape)), tuple(map(_count, stride)), _count(offset_bytes))


def _manifest(
    contents: Contents,
    prints: Sequence[int],
    digests: Sequence[int],
    checksums: Sequence[int],
    about: Mapping[str, object],
) -> bytes:
    storages = [
        {
            "segment": place.segment,
            "offset": place.offset_bytes,
            "size": place.size_bytes,
            "xxh3": f"{checksum:016x}",
            "tensors": {
                name: [str(view.dtype), view.shape, view.stride, view.offset_bytes] for name, view in views.items()
            },
        }
        for place, checksum, views in zip(contents.image.storages, checksums, contents.views, strict=True)
    ]
    segments = [
        {
            "offset": segment.offset_bytes,
            "size": segment.size_bytes,
            "fingerprint": f"{fingerprint:016x}",
            "xxh3": f"{digest:016x}",
        }
        for segment, fingerprint, digest in zip(contents.image.segments, prints, digests, strict=True)
    ]
    manifest: dict[str, object] = {"version": VERSION, "part": contents.part, "about": dict(about)}
    manifest |= {"segments": segments, "storages": storages}
    return json.dumps(manifest, separators=(",", ":")).encode()

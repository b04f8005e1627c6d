"""Tensors in files, found by their headers and read with `preadv` straight into memory of their own.

Covers safetensors files and the ``.dat`` files of accelerate. Nothing is mapped: a mapping would still depend on the
file after the tensor is handed out, and a file cut short underneath it would end the process.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from modelcache.errors import WeightsError
from modelcache.headers import Header, read_header

_MAX_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB less a page at a time
_BATCH_BYTES = 32 << 20
_BATCH_TENSORS = 256

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class FileProblemError(Exception):
    """A file that cannot give a tensor; the text says which and why. Stays inside the data plane."""


@dataclass(frozen=True, slots=True)
class FileBytes:
    """The bytes of one tensor in a file, in row-major order.

    Attributes:
        cast: The dtype to have after reading, when the index of the dispatch wants another than the file's.
    """

    path: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    cast: torch.dtype | None = None

    @property
    def size_bytes(self) -> int:
        """How many bytes are read."""
        return math.prod(self.shape) * self.dtype.itemsize


class Headers:
    """The headers of safetensors files, each read once."""

    def __init__(self) -> None:
        self._headers: dict[str, Header | WeightsError] = {}

    def find(self, path: str, name: str, cast: torch.dtype | None) -> FileBytes:
        """Where tensor `name` is in the file.

        Raises:
            FileProblemError: The file is missing, damaged or cut short, or has no such tensor.
        """
        entry = self._header(path).tensors.get(name)
        if entry is None:
            raise FileProblemError(f"{path} has no tensor {name!r}")
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise FileProblemError(f"{path} has {name!r} as {entry.dtype}, which torch cannot hold plainly")
        return FileBytes(path, entry.begin, dtype, tuple(entry.shape), cast)

    def names(self, path: str) -> list[str]:
        """Every tensor of the file.

        Raises:
            FileProblemError: As for `find`.
        """
        return list(self._header(path).tensors)

    def _header(self, path: str) -> Header:
        if path not in self._headers:
            try:
                self._headers[path] = read_header(path)
            except WeightsError as error:
                # Kept, so that a thousand tensors of one bad file do not read it a thousand times.
                self._headers[path] = error
        header = self._headers[path]
        if isinstance(header, WeightsError):
            raise FileProblemError(str(header)) from header
        return header


def find_dat(path: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> FileBytes:
    """The bytes of one of accelerate's ``.dat`` files, its size checked.

    Raises:
        FileProblemError: The file is missing or has another size than its index says, or the dtype is unknown.
    """
    if dtype is None:
        raise FileProblemError(f"the index of {path} gives no dtype that torch knows")
    found = FileBytes(path, 0, dtype, shape)
    try:
        status = Path(path).stat()
    except OSError as error:
        raise FileProblemError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise FileProblemError(f"{path} is not a regular file")
    # A file for no elements still has a byte or so: an empty file cannot be mapped, which is how they are written.
    if found.size_bytes and status.st_size != found.size_bytes:
        raise FileProblemError(f"{path} has {status.st_size} bytes, its index says {found.size_bytes}")
    return found


@dataclass(frozen=True, slots=True)
class Wanted:
    """One tensor to read and how it shall be: `key` is the caller's."""

    key: int
    place: FileBytes
    dtype: torch.dtype
    stride: tuple[int, ...]


def batches(wanted: Iterable[Wanted]) -> list[list[Wanted]]:
    """Cut into pieces for one worker each: in file order, so that each file is opened once per piece."""
    pieces: list[list[Wanted]] = []
    room_bytes = 0
    for item in sorted(wanted, key=lambda item: (item.place.path, item.place.offset)):
        if not pieces or room_bytes <= 0 or len(pieces[-1]) == _BATCH_TENSORS:
            pieces.append([])
            room_bytes = _BATCH_BYTES
        pieces[-1].append(item)
        room_bytes -= item.place.size_bytes
    return pieces


def read_batch(batch: Sequence[Wanted]) -> list[tuple[int, torch.Tensor | FileProblemError]]:
    """Read one piece; a tensor that cannot be read is answered with its problem and ends the piece. Any thread."""
    results: list[tuple[int, torch.Tensor | FileProblemError]] = []
    descriptor, open_path = -1, ""
    # Both modes are per thread, and a tensor made under the first could never be written to.
    with torch.inference_mode(False), torch.no_grad():
        try:
            for item in batch:
                if descriptor < 0 or item.place.path != open_path:
                    if descriptor >= 0:
                        os.close(descriptor)
                        descriptor = -1
                    descriptor, open_path = os.open(item.place.path, os.O_RDONLY | os.O_CLOEXEC), item.place.path
                results.append((item.key, _read(descriptor, item)))
        except OSError as error:
            results.append((item.key, FileProblemError(f"cannot read {item.place.path}: {error}")))
        except FileProblemError as problem:
            results.append((item.key, problem))
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    return results


def _read(descriptor: int, item: Wanted) -> torch.Tensor:
    place = item.place
    raw = new_tensor(place.shape, place.dtype)
    _fill(descriptor, raw, place)
    if place.cast is not None:
        raw = raw.to(place.cast)
    if raw.dtype == item.dtype and raw.stride() == item.stride:
        return raw
    shaped = new_tensor(place.shape, item.dtype, item.stride)
    return shaped.copy_(raw)


def new_tensor(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> torch.Tensor:
    """Uninitialized memory on the CPU, whatever default device or patched constructors are in force."""
    # accelerate's `init_empty_weights` replaces torch.empty, zeros, ones and full, but not this one.
    if stride is None:
        sizes = [max(size, 1) for size in shape]
        stride = [math.prod(sizes[position + 1 :]) for position in range(len(sizes))]
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="cpu")


def _fill(descriptor: int, tensor: torch.Tensor, place: FileBytes) -> None:
    if not place.size_bytes:
        return
    memory = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < place.size_bytes:
        count = os.preadv(descriptor, [memory[done : done + _MAX_READ_BYTES]], place.offset + done)
        if count == 0:
            raise FileProblemError(f"{place.path} is cut short at byte {place.offset + done}")
        done += count


def index_of(folder: Path, headers: Headers) -> Mapping[str, dict[str, str]]:
    """An offload index over every safetensors file in a folder.

    Raises:
        FileProblemError: One of the files is damaged.
    """
    return {
        name: {"safetensors_file": str(path), "weight_name": name}
        for path in sorted(folder.glob("*.safetensors"))
        for name in headers.names(str(path))
    }

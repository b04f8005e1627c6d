"""Where tensors are in files: safetensors files and the ``.dat`` files of accelerate, found by their headers and sizes.

Which file it was is noted with every place, so that another one is never taken for it. Nothing is read but headers; the
bytes are read in `reading.py`.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modelcache.errors import WeightsError
from modelcache.headers import FileIdentity, Header, TensorEntry, read_header

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
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


class FileProblemError(Exception):
    """A file that cannot give a tensor; the text says which and why. Stays inside the data plane."""


def torch_dtype(entry: TensorEntry) -> torch.dtype | None:
    """The dtype of a stored tensor; `None` for the packed ones, which torch has no plain tensors of."""
    return _DTYPES.get(entry.dtype)


@dataclass(frozen=True, slots=True)
class FileBytes:
    """The bytes of one tensor in a file, in row-major order.

    Attributes:
        cast: The dtype to have after reading, when the index of the dispatch wants another than the file's.
        identity: Which file it was when the tensor was found in it; another one is refused before and after reading.
    """

    path: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    cast: torch.dtype | None = None
    identity: FileIdentity | None = None

    @property
    def size_bytes(self) -> int:
        """How many bytes are read."""
        return math.prod(self.shape) * self.dtype.itemsize


def place_of(path: str, header: Header, name: str, cast: torch.dtype | None = None) -> FileBytes:
    """Where tensor `name` is in the safetensors file that has this header.

    Raises:
        FileProblemError: The file has no such tensor, or one of a packed dtype.
    """
    entry = header.tensors.get(name)
    if entry is None:
        raise FileProblemError(f"{path} has no tensor {name!r}")
    dtype = torch_dtype(entry)
    if dtype is None:
        raise FileProblemError(f"{path} has {name!r} as {entry.dtype}, which torch cannot hold plainly")
    return FileBytes(path, entry.begin, dtype, tuple(entry.shape), cast, header.identity)


class Headers:
    """The headers of safetensors files, each read once."""

    def __init__(self) -> None:
        self._headers: dict[str, Header | WeightsError] = {}

    def find(self, path: str, name: str, cast: torch.dtype | None) -> FileBytes:
        """Where tensor `name` is in the file.

        Raises:
            FileProblemError: The file is missing, damaged or cut short, or has no such tensor.
        """
        return place_of(path, self._header(path), name, cast)

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
    try:
        status = os.stat(path)  # noqa: PTH116, making a path of each of thousands of files takes longer than asking
    except OSError as error:
        raise FileProblemError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise FileProblemError(f"{path} is not a regular file")
    found = FileBytes(path, 0, dtype, shape, identity=FileIdentity.of(status))
    # A file for no elements still has a byte or so: an empty file cannot be mapped, which is how they are written.
    if found.size_bytes and status.st_size != found.size_bytes:
        raise FileProblemError(f"{path} has {status.st_size} bytes, its index says {found.size_bytes}")
    return found


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

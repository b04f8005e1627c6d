"""What a model was made from: enough to know in another process that it would be made from the same again.

Files are known by name, size, times of writing and of change, and inode; small ones by their content as well. Beside
them count the loader with its options, the classes, and the versions of every library that has a say in what the bytes
become. There is no origin for what a function of the user's makes: nobody can tell when that changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from modelcache.dataplane.images.format import VERSION
from modelcache.headers import MAX_CONFIG_BYTES

#: Libraries that convert what they read.
_LIBRARIES = ("transformers", "safetensors", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class Origin:
    """One source in one state, and one way to read it.

    Attributes:
        key: Equal for what gives the same bytes; 64 hexadecimal digits.
        files: Each with its size, time of writing, time of change and inode; all -1 for one that is not there.
    """

    key: str
    files: tuple[tuple[str, int, int, int, int], ...]

    @classmethod
    def of(cls, facts: Mapping[str, object], files: Iterable[Path], small: Iterable[Path] = ()) -> Origin:
        """The origin that these files are now.

        Args:
            facts: How they are read: JSON values, or what has a meaning as text.
            files: Weights.
            small: Files whose content counts too; they may be missing.

        Raises:
            OSError: A file cannot be read.
        """
        files, small = sorted(set(files)), sorted(set(small))
        stats = tuple((str(path.absolute()), *_stat_of(path)) for path in (*files, *small))
        contents = [hashlib.sha256(_content(path)).hexdigest() for path in small]
        known = {"image": VERSION, "torch": torch.__version__, **{name: _version(name) for name in _LIBRARIES}}
        text = json.dumps([dict(facts), known, stats, contents], sort_keys=True, default=str)
        return cls(hashlib.sha256(text.encode()).hexdigest(), stats)

    def described(self) -> dict[str, object]:
        """For the header of an image file."""
        return {"key": self.key, "files": self.files}

    @staticmethod
    def is_current(described: Mapping[str, Any]) -> bool:
        """Whether the files are what `described` says."""
        try:
            return all(_stat_of(Path(path)) == tuple(found) for path, *found in described["files"])
        except (OSError, ValueError, TypeError, LookupError):
            return False


def _stat_of(path: Path) -> tuple[int, int, int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (-1, -1, -1, -1)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is no regular file")
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _content(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_CONFIG_BYTES)


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

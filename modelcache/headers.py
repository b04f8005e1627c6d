"""Safetensors files, read without torch: their headers, and which files make up a model.

Everything here reads with `pread` from one descriptor of a regular file and never maps it: a mapping of a file that
shrinks kills the process. Headers are parsed strictly and under caps (`header_grammar.py`). The bytes of the tensors
are not read here.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

from modelcache.errors import WeightsError
from modelcache.header_grammar import BITS_OF, MAX_HEADER_BYTES, HeaderParser, Refused, TensorEntry
from modelcache.units import format_bytes

__all__ = [
    "FileIdentity",
    "Header",
    "TensorEntry",
    "listing",
    "model_files",
    "model_headers",
    "part_of",
    "read_header",
    "read_json",
    "regular_file",
    "weight_places",
    "weights_bytes",
]

MAX_INDEX_BYTES = 16 * 2**20
MAX_CONFIG_BYTES = 2**20
_MAX_FILE_NAME_BYTES = 255
_MAX_PATH_BYTES = 1024  # of what a file names, beneath the folder that it is in
_INDEX_SUFFIX = ".safetensors.index.json"
_STEMS = ("model", "diffusion_pytorch_model")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_BITS_OF_DTYPE = MappingProxyType({"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16})
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which bytes a path led to: the same numbers mean the same file, not written to with a call since."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileIdentity:
        """The identity in the answer of `os.stat` or `os.fstat`."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds, and which file it was. Offsets of the tensors count from the file's start."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    identity: FileIdentity

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(entry.size_bytes for entry in self.tensors.values())


@contextmanager
def regular_file(path: Path, *, name: str = "") -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file for reading; yields its descriptor and the answer of `fstat`.

    Args:
        path: The file; links are followed.
        name: The model it belongs to, for errors.

    Raises:
        WeightsError: It is missing, may not be read, or is a folder, pipe, socket or device.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise WeightsError(name, str(path.parent), _no_file(path.parent, path.name)) from None
    except (OSError, ValueError) as error:
        raise WeightsError(name, str(path), _cannot_open(path, error)) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise WeightsError(name, str(path), f"this is {_kind(found.st_mode)}, not a regular file; not loaded.")
        yield descriptor, found
    finally:
        os.close(descriptor)


def read_header(path: Path | str, *, name: str = "") -> Header:
    """Parse the header of one safetensors file, strictly.

    Args:
        path: The file.
        name: The model it belongs to, for errors.

    Raises:
        WeightsError: The file is missing, damaged, cut off, hostile, or something else than safetensors.
    """
    path = Path(path)
    with regular_file(path, name=name) as (descriptor, found):
        try:
            header = _header_json(descriptor, found.st_size)
            tensors, metadata = HeaderParser(header, found.st_size).parse()
        except Refused as refused:
            raise WeightsError(name, str(path), refused.problem, refused.tensor) from None
        except OSError as error:
            raise WeightsError(name, str(path), f"reading the header failed: {error.strerror}.") from error
    return Header(path, MappingProxyType(tensors), MappingProxyType(metadata), FileIdentity.of(found))


def _header_json(descriptor: int, file_bytes: int) -> bytes:
    if file_bytes == 0:
        raise Refused("the file is empty. The download is incomplete.")
    start = _pread(descriptor, min(file_bytes, 512), 0)
    size_bytes = int.from_bytes(start[:8], "little")
    if size_bytes > MAX_HEADER_BYTES:
        _refuse_what_is_no_safetensors(start, file_bytes)
    if file_bytes < 8:
        raise Refused(f"{file_bytes} bytes are too few for a safetensors file. The download is incomplete.")
    if size_bytes > MAX_HEADER_BYTES:
        raise Refused(
            f"the header claims {size_bytes:,} bytes, above the {format_bytes(MAX_HEADER_BYTES)} allowed. "
            "The file is damaged or malicious; not loaded."
        )
    if size_bytes > file_bytes - 8:
        raise Refused(
            f"the header claims {size_bytes:,} bytes, but the file has only {file_bytes:,}. "
            "The download is incomplete or the file is damaged."
        )
    if size_bytes < 2:
        raise Refused("the header is empty. The file is damaged; not loaded.")
    if start[8:9] != b"{":
        raise Refused(f"the header must start with '{{', but starts with {start[8:11]!r}. Not loaded.")
    return _pread(descriptor, size_bytes, 8)


def _pread(descriptor: int, size_bytes: int, offset: int) -> bytes:
    pieces: list[bytes] = []
    while size_bytes:
        piece = os.pread(descriptor, size_bytes, offset)
        if not piece:
            raise Refused("the file shrank while its header was read. Get it again.")
        pieces.append(piece)
        size_bytes, offset = size_bytes - len(piece), offset + len(piece)
    return b"".join(pieces)


def _refuse_what_is_no_safetensors(start: bytes, file_bytes: int) -> None:
    """Name the common things saved under the name of a weight file; return when it is none of them.

    Asked only when the first 8 bytes are no length that we would accept, so that no real header is mistaken.
    """
    trust = "Convert it to safetensors, or load it in a loader of your own if you trust its author."
    text = start.lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise Refused(f"{file_bytes} bytes, a Git LFS pointer, not the weights. Run 'git lfs pull' in that folder.")
    if text[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        shown = text.split(b">", 1)[0][:39].decode("ascii", "replace") + ">"
        raise Refused(f"starts with {shown!r}: the download saved an error page. Download it again.")
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        shown = start[:2].hex(" ")
        raise Refused(f"this is a pickle (starts with {shown}), which can run code when loaded. {trust}")
    if start.startswith(b"PK\x03\x04"):
        raise Refused(f"this is a ZIP archive as torch.save writes it, which can run code when loaded. {trust}")
    if start.startswith(b"GGUF"):
        raise Refused("this is a GGUF file, not safetensors. Get the model's safetensors files instead.")
    if start.startswith((b"\x89HDF", b"\x93NUMPY", b"\x1f\x8b")):
        raise Refused(f"starts with {start[:4]!r}: this is no safetensors file. Get the model's safetensors files.")
    if text.startswith(b"{"):
        raise Refused("starts with '{': this is JSON, not weights. The download may have saved an error answer.")


def model_files(folder_or_file: Path | str, *, name: str = "") -> tuple[Path, ...]:
    """The safetensors files that make up one model, in order.

    A file stands for itself, an index for its shards. In a folder: ``model.safetensors``, else the shards of
    ``model.safetensors.index.json``, else every ``*.safetensors``.

    Args:
        folder_or_file: Where to look; nothing below a folder is looked at.
        name: The model it belongs to, for errors.

    Raises:
        WeightsError: There is none, or the index names shards that are missing or outside the folder.
    """
    place = Path(folder_or_file)
    if not place.is_dir():
        if place.name.endswith(_INDEX_SUFFIX):
            return tuple(sorted({place.parent / shard for shard in set(_weight_map(place, name).values())}))
        if place.suffix in _PICKLES:
            raise WeightsError(name, str(place), "a pickle by its name, which can run code when loaded; not loaded.")
        with regular_file(place, name=name):
            return (place,)
    for stem in _STEMS:
        if (place / f"{stem}.safetensors").exists():
            return (place / f"{stem}.safetensors",)
        if (place / f"{stem}{_INDEX_SUFFIX}").exists():
            return model_files(place / f"{stem}{_INDEX_SUFFIX}", name=name)
    if found := tuple(sorted(place.glob("*.safetensors"))):
        return found
    raise WeightsError(name, str(place), _no_file(place, "model.safetensors"))


def model_headers(folder_or_file: Path | str, *, name: str = "") -> tuple[Header, ...]:
    """The headers of `model_files`, checked against each other and against the index.

    Raises:
        WeightsError: As `model_files` and `read_header`, or a tensor is in two files, or not in the one the index says.
    """
    headers = tuple(read_header(path, name=name) for path in model_files(folder_or_file, name=name))
    place: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor in place:
                raise WeightsError(
                    name,
                    str(header.path),
                    f"tensor {tensor!r} is in {place[tensor].name} too. Name one file, or remove the one not wanted.",
                )
            place[tensor] = header.path
    if (index := _index_of(Path(folder_or_file), headers)) is not None:
        for tensor, shard in _weight_map(index, name).items():
            if tensor not in place or place[tensor].name != shard:
                raise WeightsError(name, str(index), f"says it is in {shard}, which does not have it.", tensor)
    return headers


def weights_bytes(folder_or_file: Path | str, *, dtype: str | None = None, name: str = "") -> int:
    """Bytes of a model's tensors, from headers alone.

    Args:
        folder_or_file: As for `model_files`; the parts of a sentence-transformers or diffusers folder are summed.
        dtype: What floating-point tensors are loaded as, such as ``"bfloat16"``; `None` as they are.
        name: The model it belongs to, for errors.

    Raises:
        WeightsError: As `model_headers`.
    """
    total = 0
    for place in weight_places(folder_or_file, name=name):
        for header in model_headers(place, name=name):
            for entry in header.tensors.values():
                kept = dtype not in _BITS_OF_DTYPE or entry.dtype not in _FLOATS
                bits = BITS_OF[entry.dtype] if kept else _BITS_OF_DTYPE[str(dtype)]
                total += prod(entry.shape) * bits // 8
    return total


def weight_places(folder_or_file: Path | str, *, name: str = "") -> tuple[Path, ...]:
    """Where the weights of a model are: the place itself, and the folders its ``modules.json`` or pipeline names.

    Raises:
        WeightsError: None of them has weights, or the list of parts is damaged.
    """
    place = Path(folder_or_file)
    places = [place]
    if (modules := place / "modules.json").is_file():
        listed = read_json(modules, name=name)
        parts = [part.get("path") for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
        places += [part_of(place, part, name=name) for part in parts if isinstance(part, str) and part]
    elif (pipeline := place / "model_index.json").is_file():
        listed = read_json(pipeline, name=name)
        places += [part_of(place, part, name=name) for part in listed] if isinstance(listed, dict) else []
    if len(places) == 1:
        return (place,)
    once = {part.resolve(): part for part in reversed(places)}
    with_weights = tuple(part for part in reversed(once.values()) if part.is_dir() and any(part.glob("*.safetensors")))
    if not with_weights:
        raise WeightsError(name, str(place), _no_file(place, "model.safetensors"))
    return with_weights


def part_of(folder: Path, part: str, *, name: str = "") -> Path:
    """The folder of a part that a file in `folder` names; it may be `folder` itself, and need not exist.

    Raises:
        WeightsError: It is outside of `folder`, also by way of links, or what is named is no path.
    """
    is_path = part.isprintable() and len(part.encode()) <= _MAX_PATH_BYTES
    if not is_path or any(len(each.encode()) > _MAX_FILE_NAME_BYTES for each in part.split("/")):
        raise WeightsError(name, str(folder), f"its list of parts names {_short(part)}, which is no path.")
    found = folder / part
    try:
        root, place = folder.resolve(), found.resolve()
        is_inside = place == root or root in place.parents
    except (OSError, RuntimeError):  # links in a circle
        is_inside = False
    if not is_inside:
        raise WeightsError(name, str(folder), f"its list of parts names {_short(str(found))}, outside the folder.")
    return found


def read_json(path: Path, *, name: str = "", max_bytes: int = MAX_CONFIG_BYTES) -> object:
    """Parse a JSON file that came with a model: a size cap, and no duplicate keys.

    Raises:
        WeightsError: It is missing, too large, nested too deeply, or not JSON.
    """
    with regular_file(path, name=name) as (descriptor, found):
        if found.st_size > max_bytes:
            raise WeightsError(name, str(path), f"{found.st_size:,} bytes are more than the {max_bytes:,} allowed.")
        try:
            value: object = json.loads(_pread(descriptor, found.st_size, 0), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError, Refused) as error:
            raise WeightsError(name, str(path), f"this is no usable JSON: {error}. Get it again.") from error
        except OSError as error:
            raise WeightsError(name, str(path), f"reading it failed: {error.strerror}.") from error
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key!r} appears twice")
        made[key] = value
    return made


def _weight_map(index: Path, name: str) -> dict[str, str]:
    content = read_json(index, name=name, max_bytes=MAX_INDEX_BYTES)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(name, str(index), "has no 'weight_map' of tensor names to files. Get it again.")
    for tensor, shard in weight_map.items():
        is_name = isinstance(shard, str) and shard.isprintable() and len(shard.encode()) <= _MAX_FILE_NAME_BYTES
        if not is_name or not shard.endswith(".safetensors"):
            raise WeightsError(name, str(index), f"names {_short(shard)}, which is no .safetensors file.", tensor[:80])
        if "/" in shard or "\\" in shard or shard.startswith("."):
            raise WeightsError(name, str(index), f"names {_short(shard)}, outside its folder; not loaded.", tensor[:80])
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).exists():
            raise WeightsError(name, str(index), f"shard {shard!r} is missing. {listing(index.parent)}")
    return weight_map


def _short(value: object) -> str:
    """A value from a file as a message may carry it."""
    if not isinstance(value, str):
        return json.dumps(value)[:80]
    return repr(value if len(value) <= 80 else value[:77] + "...")


def _index_of(place: Path, headers: Sequence[Header]) -> Path | None:
    """The index that `model_files` followed, if it did."""
    if not place.is_dir():
        return place if place.name.endswith(_INDEX_SUFFIX) else None
    if any(header.path.name == f"{stem}.safetensors" for header in headers for stem in _STEMS):
        return None
    return next(
        (place / f"{stem}{_INDEX_SUFFIX}" for stem in _STEMS if (place / f"{stem}{_INDEX_SUFFIX}").exists()), None
    )


def _no_file(folder: Path, wanted: str) -> str:
    return f"no file {wanted!r}. {listing(folder)}"


def listing(folder: Path) -> str:
    """What a folder has, as a sentence for errors."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return "There is no such folder."
    shown = [f"{name} (pickle, not loaded)" if Path(name).suffix in _PICKLES else name for name in names[:12]]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"The folder has: {', '.join(shown)}{more}." if shown else "The folder is empty."


def _cannot_open(path: Path, error: OSError | ValueError) -> str:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        return f"this is {_kind(mode)}, not a regular file; not loaded."
    return f"cannot be opened: {getattr(error, 'strerror', None) or error}. Check the path and its permissions."


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((words for is_kind, words in kinds if is_kind(mode)), "a device")

"""The grammar of a safetensors header: bytes in, tensors out, or the first fault in words.

Stricter than the format's own parser, which accepts duplicate names, unknown keys and absurd ranks. It takes one entry
after the other and stops at the first fault, so refusing costs little time and memory however large the header is.
Which files are read, and how, is in `headers.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import NoReturn

from modelcache.units import format_bytes

MAX_HEADER_BYTES = 32 * 2**20
MAX_METADATA_BYTES = 2**20
MAX_TENSORS = 500_000
MAX_RANK = 32
MAX_DIMENSION = 2**48
MAX_NAME_BYTES = 1024
_MAX_ENTRY_CHARS = 4096  # of one tensor: 32 dimensions of 20 digits, the keys, and room for white space

BITS_OF = MappingProxyType(
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
    | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
)

_W = r"[ \t\n\r]*+"
_V = r"[ \t\n\r]{0,64}+"  # as common writers use it
_INT = r"(?:0|[1-9][0-9]{0,19})"
_SPACE = re.compile(_W)
_PADDING = re.compile(" *+")
_COLON = re.compile(f"{_W}:{_W}")
_NEXT = re.compile(f"{_W}([,}}])")
_STRING = re.compile(r'"((?:[^"\\\x00-\x1f]|\\.){0,6144}+)"')
_LONG_STRING = re.compile(r'"([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"')
# One entry as every common writer puts it. What does not match is parsed slowly, and refused or accepted there.
_ENTRY = re.compile(
    rf'"([^"\\\x00-\x1f]{{1,1024}})"{_V}:{_V}\{{{_V}"dtype"{_V}:{_V}"([A-Z0-9_]{{1,16}})"{_V},'
    rf'{_V}"shape"{_V}:{_V}\[{_V}((?:{_INT}{_V},{_V}){{0,31}}{_INT}{_V}|)\]{_V},'
    rf'{_V}"data_offsets"{_V}:{_V}\[{_V}({_INT}){_V},{_V}({_INT}){_V}\]{_V}\}}'
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `begin` and `end` are offsets from the start of the file; `dtype` is the format's code."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.begin


class Refused(Exception):  # noqa: N818, it never leaves the reading of one file
    """A fault in a header. Whoever read it knows the file, and raises `WeightsError` with both."""

    def __init__(self, problem: str, tensor: str | None = None) -> None:
        super().__init__(problem, tensor)
        self.problem, self.tensor = problem, tensor


class _Inexact(str):
    """A JSON number that is no non-negative integer in plain digits."""

    __slots__ = ()


class HeaderParser:
    """The header's JSON, one entry at a time, stopping at the first fault.

    Args:
        header: The JSON, starting with ``{``, without the 8 bytes of length before it.
        file_bytes: The size of the whole file, which the tensors must fill.
    """

    def __init__(self, header: bytes, file_bytes: int) -> None:
        # Each tensor holds this key literally (escapes in keys are refused), so counting it bounds the work.
        num_tensors = header.count(b'"data_offsets"')
        if num_tensors > MAX_TENSORS:
            raise Refused(f"the header holds {num_tensors:,} tensors; at most {MAX_TENSORS:,} are allowed. Not loaded.")
        try:
            self._text = header.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused(f"the header is not UTF-8 at byte {error.start}. The file is damaged; not loaded.") from None
        self._data_begin = 8 + len(header)
        self._file_bytes = file_bytes
        self._tensors: dict[str, TensorEntry] = {}
        self._metadata: dict[str, str] | None = None

    def parse(self) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        """The tensors and the metadata.

        Raises:
            Refused: The header is at fault.
        """
        text, position = self._text, self._skip_space(1)
        if text[position : position + 1] == "}":
            position += 1
        else:
            while True:
                position = self._entry(position)
                found = _NEXT.match(text, position)
                if found is None:
                    self._no_json(position)
                position = found.end()
                if found.group(1) == "}":
                    break
                position = self._skip_space(position)
        position = _PADDING.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing as well
        if position != len(text):
            raise Refused(f"text follows the header's last '}}': {text[position : position + 20]!r}. Not loaded.")
        self._check_layout()
        return self._tensors, self._metadata or {}

    def _entry(self, position: int) -> int:
        """Take one ``"name": {...}`` at `position`; returns the position after it."""
        found = _ENTRY.match(self._text, position)
        if found is not None and found.group(1) != "__metadata__":
            name, dtype, shape, begin, end = found.groups()
            self._add(name, dtype, tuple(map(int, shape.split(","))) if shape else (), int(begin), int(end))
            return found.end()
        key = _STRING.match(self._text, position)
        if key is None:
            self._no_json(position, "a tensor's name is damaged or longer than 1,024 bytes")
        name = self._unescaped(key.group(1), position)
        colon = _COLON.match(self._text, key.end())
        if colon is None:
            self._no_json(key.end())
        if name == "__metadata__":
            return self._metadata_object(colon.end())
        _check_name(name)
        return self._unusual_entry(name, colon.end())

    def _unusual_entry(self, name: str, position: int) -> int:
        text = self._text
        if text[position : position + 1] != "{":
            raise Refused("its entry is not an object. The file is damaged; not loaded.", name)
        close = text.find("}", position, position + _MAX_ENTRY_CHARS)
        rank = self._rank(position, close if close >= 0 else position + _MAX_ENTRY_CHARS)
        if rank > MAX_RANK:
            raise Refused(f"has rank {rank:,}; at most {MAX_RANK} is allowed. Not loaded.", name)
        if close < 0:
            raise Refused(f"its entry is longer than {_MAX_ENTRY_CHARS:,} characters. Not loaded.", name)
        try:
            pairs = _DECODER.decode(text[position : close + 1])
        except (ValueError, RecursionError):
            raise Refused("its entry is not valid JSON. The file is damaged; not loaded.", name) from None
        dtype, shape, offsets = _fields(name, pairs)
        self._add(name, dtype, shape, offsets[0], offsets[1])
        return close + 1

    def _rank(self, position: int, stop: int) -> int:
        """How many numbers the longer of the two arrays begun before `stop` has, without making any of them."""
        rank = 0
        for _ in range(2):
            opened = self._text.find("[", position, stop)
            if opened < 0:
                break
            closed = self._text.find("]", opened)
            closed = len(self._text) if closed < 0 else closed
            rank, position = max(rank, self._text.count(",", opened, closed) + 1), closed
        return rank

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> None:
        _check_name(name)
        if name in self._tensors:
            raise Refused(
                f"tensor {name!r} appears twice in the header. Refused: readers would disagree on which one counts."
            )
        if dtype not in BITS_OF:
            raise Refused(f"has the dtype {dtype!r}, which is not one of {', '.join(BITS_OF)}. Not loaded.", name)
        if len(shape) > MAX_RANK:
            raise Refused(f"has rank {len(shape)}; at most {MAX_RANK} is allowed. Not loaded.", name)
        if shape and max(shape) > MAX_DIMENSION:
            raise Refused(f"has a dimension of {max(shape):,}; at most 2^48 is allowed. Not loaded.", name)
        num_bits = prod(shape) * BITS_OF[dtype]
        if num_bits % 8:
            raise Refused(f"holds {prod(shape):,} values of {dtype}, which is no whole number of bytes.", name)
        if end < begin:
            raise Refused(f"its data_offsets [{begin}, {end}] run backwards. The file is damaged; not loaded.", name)
        if num_bits // 8 != end - begin:
            raise Refused(
                f"shape {list(shape)} of {dtype} takes {num_bits // 8:,} bytes, but its data_offsets span "
                f"{end - begin:,}. The file is damaged; not loaded.",
                name,
            )
        self._tensors[name] = TensorEntry(dtype, shape, self._data_begin + begin, self._data_begin + end)

    def _metadata_object(self, position: int) -> int:
        text, begin = self._text, position
        stop = begin + MAX_METADATA_BYTES
        if self._metadata is not None:
            raise Refused("__metadata__ appears twice in the header. Not loaded.")
        if text[position : position + 1] != "{":
            raise Refused("__metadata__ is not an object of strings. Not loaded.")
        self._metadata = {}
        position = self._skip_space(position + 1)
        if text[position : position + 1] == "}":
            return position + 1
        while True:
            key, position = self._metadata_string(position, stop)
            colon = _COLON.match(text, position)
            if colon is None:
                self._no_json(position)
            if key in self._metadata:
                raise Refused(f"the key {key!r} appears twice in __metadata__. Not loaded.")
            self._metadata[key], position = self._metadata_string(colon.end(), stop, key)
            found = _NEXT.match(text, position)
            if found is None:
                self._no_json(position)
            position = found.end()
            if found.group(1) == "}":
                if len(text[begin:position].encode()) > MAX_METADATA_BYTES:
                    raise Refused("__metadata__ is larger than 1 MiB, the most allowed. Not loaded.")
                return position
            position = self._skip_space(position)

    def _metadata_string(self, position: int, stop: int, key: str | None = None) -> tuple[str, int]:
        found = _LONG_STRING.match(self._text, position, stop)
        if found is not None:
            return self._unescaped(found.group(1), position), found.end()
        if self._text[position : position + 1] != '"':
            what = "a key" if key is None else f"the value of {key[:80]!r}"
            raise Refused(f"{what} in __metadata__ is not a string. Not loaded.")
        if len(self._text) > stop:
            raise Refused("__metadata__ is larger than 1 MiB, the most allowed. Not loaded.")
        return self._no_json(position)

    def _check_layout(self) -> None:
        """The tensors must tile the data: no overlap, no hole, nothing after the last, nothing beyond the file."""
        entries = sorted(self._tensors.items(), key=lambda item: (item[1].begin, item[1].end))
        last_end = max((entry.end for _, entry in entries), default=self._data_begin)
        if last_end > self._file_bytes:
            raise Refused(
                f"{format_bytes(self._file_bytes)} of {format_bytes(last_end)} present "
                f"(header promises {last_end:,} bytes). The download is incomplete."
            )
        position, before = self._data_begin, ""
        for name, entry in entries:
            if entry.begin < position:
                overlap = f"{entry.begin - self._data_begin}-{min(entry.end, position) - self._data_begin}"
                raise Refused(
                    f"tensors {before!r} and {name!r} claim the same bytes {overlap}. "
                    "The file is damaged or malicious; not loaded."
                )
            if entry.begin > position:
                raise Refused(
                    f"bytes {position - self._data_begin}-{entry.begin - self._data_begin} before tensor {name!r} "
                    "belong to no tensor. The file is damaged or malicious; not loaded."
                )
            position, before = entry.end, name
        if last_end < self._file_bytes:
            raise Refused(
                f"{self._file_bytes - last_end:,} bytes follow the last tensor and belong to none. Some tools write "
                "such files: save it again with safetensors, or get the original; not loaded."
            )

    def _unescaped(self, raw: str, position: int) -> str:
        if "\\" not in raw:
            return raw
        try:
            text = str(json.loads(f'"{raw}"'))
            text.encode()  # a lone surrogate is no text
        except ValueError:
            self._no_json(position)
        return text

    def _skip_space(self, position: int) -> int:
        found = _SPACE.match(self._text, position)
        return position if found is None else found.end()

    def _no_json(self, position: int, why: str = "the header is not valid JSON") -> NoReturn:
        shown = self._text[position : position + 20]
        raise Refused(f"{why}, at character {position}: {shown!r}. The file is damaged; not loaded.")


def _exact(digits: str) -> int | _Inexact:
    return int(digits) if digits.isdigit() and len(digits) <= 20 else _Inexact(digits[:40])


_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_int=_exact, parse_float=_Inexact, parse_constant=_Inexact)


def _fields(name: str, pairs: Sequence[tuple[str, object]]) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise Refused(f"the key {key!r} appears twice in its entry. Not loaded.", name)
        if key not in {"dtype", "shape", "data_offsets"}:
            raise Refused(f"unknown key {key!r} in its entry; known: dtype, shape, data_offsets. Not loaded.", name)
    for key in ("dtype", "shape", "data_offsets"):
        if key not in keys:
            raise Refused(f"the key {key!r} is missing in its entry. The file is damaged; not loaded.", name)
    fields = dict(pairs)
    offsets = _integers(name, "data_offsets", fields["data_offsets"])
    if len(offsets) != 2:
        raise Refused(f"data_offsets holds {len(offsets)} numbers, not 2. The file is damaged; not loaded.", name)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or isinstance(dtype, _Inexact):
        raise Refused("its dtype is not a string. The file is damaged; not loaded.", name)
    return dtype, _integers(name, "shape", fields["shape"]), offsets


def _integers(name: str, key: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise Refused(f"its {key} is not a list. The file is damaged; not loaded.", name)
    for value in values:
        if type(value) is not int:
            shown = str(value) if isinstance(value, _Inexact) else json.dumps(value)[:40]
            raise Refused(f"its {key} holds {shown}, not an exact non-negative integer. Not loaded.", name)
    return tuple(values)


def _check_name(name: str) -> None:
    if not name:
        raise Refused("a tensor has an empty name. Not loaded.")
    # Only printable names: no control characters, line ends, lone surrogates or text that displays in another order.
    if not name.isprintable():
        raise Refused("the name holds characters that do not print. Not loaded.", name[:80])
    if len(name.encode()) > MAX_NAME_BYTES:
        raise Refused(f"the name is longer than {MAX_NAME_BYTES:,} bytes. Not loaded.", name[:80])

"""What is compared on: items from a list, JSONL or CSV; and the error of bad input."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle  # nosec B403
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO, StringIO
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import uuid4

from modelcache import ModelCacheError


class InputError(ModelCacheError, ValueError):
    """What a comparison or an experiment was given cannot be used; the message says where, what and how to mend it.

    Attributes:
        problem: What was found, and the fix.
        path: The file; empty for an argument.
        line: Counts from 1; `None` where it is not one line.
    """

    def __init__(self, problem: str, path: str = "", line: int | None = None) -> None:
        super().__init__(problem, path, line)
        self.problem = problem
        self.path = path
        self.line = line

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.path, self.line) if part not in ("", None))
        return f"{place}: {self.problem}" if place else self.problem


@dataclass(frozen=True, slots=True)
class Items:
    """What is compared on, in order.

    Attributes:
        values: The items.
        path: The file they are from; empty for a list.
        lines: The line of each item, if they are from a file.
    """

    values: tuple[Any, ...]
    path: str = ""
    lines: tuple[int, ...] = ()

    def place(self, index: int) -> str:
        """Where an item is from, for messages."""
        return f"{self.path}:{self.lines[index]}" if self.path else f"item {index}"

    @property
    def digest(self) -> str:
        """A name for these very items, in this order: a run is only taken up again with the same ones."""
        hashed = hashlib.sha256()
        for value in self.values:
            hashed.update(identity(value).encode("utf-8", "surrogatepass") + b"\n")
        return hashed.hexdigest()


def identity(value: object) -> str:
    """A text that is the same for the same value in any process: its JSON, and a hash of what JSON does not know.

    What cannot be pickled either is known by its `repr`. If that is an address, which may be that of another value next
    time, the text is another one each time: a run with such items is not taken up, rather than mixed with another.
    """
    try:
        return json.dumps(value, sort_keys=True, default=_hashed)
    except (TypeError, ValueError, RecursionError):
        # Keys that cannot be sorted or that JSON does not have, or a value that holds itself.
        return str(_hashed(value))


def _hashed(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(map(identity, value))  # Their order is another one in each process.
    pickled = BytesIO()
    try:
        _Pickler(pickled, protocol=5).dump(value)
    except Exception:  # noqa: BLE001  # It runs the value's own code, which may raise anything.
        text = repr(value)
        return str(uuid4()) if " at 0x" in text else text
    return hashlib.sha256(pickled.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Nothing is unpickled. Tensors go in as their bytes: torch's own pickle of one is another in each process."""

    def reducer_override(self, value: object) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(value, torch.Tensor):
            return NotImplemented
        data = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return tuple, ((str(value.dtype), tuple(value.shape), data),)


def read_items(items: Iterable[Any] | str | PathLike[str]) -> Items:
    """The items of a list, or of a file.

    Args:
        items: Anything iterable, or the path of a ``.jsonl`` file (one JSON value a line) or a ``.csv`` file (a
            heading, then one item a line, as a dictionary of strings).

    Raises:
        InputError: No items, one only, another kind of file, or a line that cannot be read.
    """
    if isinstance(items, (str, PathLike)):
        path = Path(items)
        readers = {".jsonl": _jsonl, ".csv": _csv}
        if path.suffix.lower() not in readers:
            raise InputError(f"items are read from .jsonl or .csv files, not from {path.name!r}", str(path))
        if not path.is_file():
            raise InputError("there is no such file of items; give an existing one, or a list", str(path))
        numbered = list(readers[path.suffix.lower()](path))
        found = Items(tuple(item for _, item in numbered), str(path), tuple(line for line, _ in numbered))
    elif isinstance(items, Iterable):
        found = Items(tuple(items))
    else:
        raise InputError(f"items is a list, or the path of a .jsonl or .csv file, got {items!r}")
    if len(found.values) < 2:
        count = "one item" if found.values else "no items"
        raise InputError(f"{count}: a comparison needs two at the least, and some thirty to tell much", found.path)
    return found


def is_finite(number: object) -> bool:
    """Whether it is a number that a float holds; JSON has others."""
    return isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= sys.float_info.max


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers and lines that are not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in json_lines(path):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise InputError(f"this line is not JSON ({error}); each line is one item", str(path), number) from None


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(StringIO(_text_of(path), newline=""), strict=True)
    heading: list[str] = []
    try:
        for row in filter(None, reader):
            if not heading:
                heading = row
                doubled = sorted({name for name in row if row.count(name) > 1})
                if doubled:
                    words = f"two columns are called {doubled[0]!r}; give one of them another name"
                    raise InputError(words, str(path), reader.line_num)
            elif len(row) != len(heading):
                raise InputError(
                    f"this line has {len(row)} cells, the heading has {len(heading)}; quote cells that hold commas",
                    str(path),
                    reader.line_num,
                )
            else:
                yield reader.line_num, dict(zip(heading, row, strict=True))
    except csv.Error as error:
        raise InputError(f"this line is not CSV ({error})", str(path), reader.line_num) from None


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"this line is not in UTF-8 ({error.reason}); save the file as UTF-8", str(path), line
        ) from None

"""A YAML file as a tree of words that know where they stand. It says nothing about what the words mean.

The tree is built from parser events, one by one: no recursion, no construction of objects, and every refusal
(anchors, tags, depth, duplicates) has its line and column. Caps hold before anything is parsed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from modelcache.config.values import Scalar
from modelcache.errors import ConfigError, Finding

LARGEST_FILE_BYTES = 64 << 10
DEEPEST_LEVEL = 32
MOST_FINDINGS = 100

Path: TypeAlias = tuple[str | int, ...]
Tree: TypeAlias = "Scalar | dict[str, Tree] | list[Tree]"

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands in a file; lines and columns count from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Document:
    """One file, read.

    Attributes:
        path: As the operator wrote it.
        tree: The top-level mapping; empty for an empty file.
        keys: Where each key stands.
        values: Where each value begins.
        findings: What is wrong with the form of the file.
    """

    path: str
    tree: dict[str, Tree] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def report(self, place: Place | None, key: Path, message: str) -> None:
        """Note one problem."""
        line, column = (place.line, place.column) if place else (None, None)
        self.findings.append(Finding(self.path, line, column, spell(key), message))


def spell(path: Path) -> str:
    """A key for people: ``models.qwen.path``, ``preload[0]``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
            continue
        # A key may be anything a file holds; a message stays one short printable line.
        shown = step if step.isprintable() and len(step) <= 80 else repr(step[:77] + "..." if len(step) > 80 else step)
        text += f".{shown}" if text else shown
    return text


def read_file(path: str) -> bytes:
    """The bytes of a configuration file, no more than the cap.

    Raises:
        ConfigError: There is no such file, it is no regular file, it is too large, or it cannot be read.
    """
    try:
        # Non-blocking, because opening a pipe would wait for somebody to write to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise _unreadable(path, "no such file; write one with 'modelcache config init'") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    # Looked at before a file object is made, which a folder would refuse in words of its own.
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _unreadable(path, "is not a regular file; name the YAML file itself")
    with os.fdopen(handle, "rb") as file:
        try:
            data = file.read(LARGEST_FILE_BYTES + 1)
        except OSError as error:
            raise _unreadable(path, f"cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_FILE_BYTES:
        raise _unreadable(path, "is larger than 64 KiB; this does not look like a modelcache configuration")
    return data


def _unreadable(path: str, message: str) -> ConfigError:
    return ConfigError((Finding(path, None, None, "", message),))


def parse(data: bytes, path: str) -> Document:
    """Build the tree of a file. Never raises: what is wrong is in `findings`, the tree holds what could be read."""
    document = Document(path)
    text = _decode(data, document)
    if text is not None:
        try:
            _Builder(document).build(_events(text))
        except _Stopped:
            pass
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = Place(mark.line + 1, mark.column + 1) if mark else None
            document.report(place, (), f"this is not YAML: {_words(error)}")
        except (yaml.YAMLError, ValueError, OverflowError):
            # The scanner lets the last two escape for numbers too large in an escape or a directive.
            document.report(None, (), "this is not YAML: an escape or a directive cannot be read")
    return document


def _decode(data: bytes, document: Document) -> str | None:
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        document.report(Place(1, 1), (), "begins with a byte order mark; save the file as plain UTF-8")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        document.report(_place(before), (), "this is not UTF-8; save the file as plain UTF-8")
        return None
    strange = _UNPRINTABLE.search(text)
    if strange:
        code = ord(strange.group())
        document.report(_place(text[: strange.start()]), (), f"control character U+{code:04X}; remove it")
        return None
    for number, line in enumerate(text.split("\n"), start=1):
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        if "\t" in indent and line.strip():
            document.report(Place(number, indent.index("\t") + 1), (), "a tab in the indentation; use spaces")
    return None if document.findings else text


def _place(before: str) -> Place:
    """The place right after this text."""
    lines = _BREAK.split(before)
    return Place(len(lines), len(lines[-1]) + 1)


def _words(error: yaml.MarkedYAMLError) -> str:
    context = f" {error.context}" if error.context else ""
    words = f"{error.problem or 'it cannot be read'}{context}"
    return " ".join(words.split())[:200] + "; check quotes, colons and indentation"


def _events(text: str) -> Iterator[yaml.Event]:
    # The parser in Python, not the faster one in C: its messages are the same everywhere.
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_event():
            yield loader.get_event()  # type: ignore[no-untyped-call]
    finally:
        loader.dispose()


class _Stopped(Exception):  # noqa: N818 - it ends a walk, it is no error.
    """Nothing after this can be trusted."""


@dataclass(slots=True)
class _Frame:
    """One collection that is being read. `key` is the next value's; `None` in a mapping that expects a key."""

    into: dict[str, Tree] | list[Tree]
    path: Path
    key: str | None = None


class _Builder:
    """Turns events into a tree, with a stack of its own."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.stack: list[_Frame] = []
        self.num_documents = 0

    def build(self, events: Iterator[yaml.Event]) -> None:
        for event in events:
            self._form(event)
            if isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                self._open(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self.stack.pop()
            elif isinstance(event, yaml.AliasEvent) and self.stack:
                self._place_value(Scalar("", quoted=True), event)

    def _form(self, event: yaml.Event) -> None:
        """Report what no configuration needs and attacks are made of."""
        place = _start(event)
        if isinstance(event, yaml.DocumentStartEvent):
            self.num_documents += 1
            if self.num_documents > 1:
                self._stop(place, "a second document begins here; keep one document per file")
            if event.version or event.tags:
                self.document.report(
                    place, (), "directives (lines that begin with %) are not allowed here; remove them"
                )
        elif isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self.document.report(place, (), "anchors and aliases are not allowed here; write the value out")
        if _has_tag(event):
            self.document.report(place, (), "tags (words that begin with !) are not allowed here; remove it")
        if len(self.document.findings) >= MOST_FINDINGS:
            self._stop(place, "more problems follow; fix these first")

    def _stop(self, place: Place, message: str) -> None:
        self.document.report(place, (), message)
        raise _Stopped

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        place = _start(event)
        if len(self.stack) >= DEEPEST_LEVEL:
            self._stop(
                place,
                f"nested deeper than {DEEPEST_LEVEL} levels; this does not look like a modelcache configuration",
            )
        if not self.stack:
            if isinstance(event, yaml.SequenceStartEvent):
                self._stop(place, "a configuration is a mapping of keys to values, not a list")
            self.stack.append(_Frame(self.document.tree, ()))
            return
        frame = self.stack[-1]
        into: dict[str, Tree] | list[Tree] = {} if isinstance(event, yaml.MappingStartEvent) else []
        if _wants_key(frame):
            self.document.report(place, frame.path, "a key must be a word, not a mapping or a list")
            # What is inside is still read, for its form, into nothing.
            frame.key = ""
            self.stack.append(_Frame(into, (*frame.path, "")))
            return
        self.stack.append(_Frame(into, self._place_value(into, event)))

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        quoted = event.style is not None
        if _SURROGATE.search(event.value):
            # An escape can spell half a character, which no file name and no terminal takes.
            self.document.report(_start(event), (), "an escape in this text is no character; write the text itself")
            event.value = _SURROGATE.sub("?", event.value)
        if not self.stack:
            if event.value or quoted:
                self._stop(_start(event), "a configuration is a mapping of keys to values, such as 'version: 1'")
            return
        frame = self.stack[-1]
        if _wants_key(frame):
            frame.key = self._key(frame, event)
        else:
            self._place_value(Scalar(event.value, quoted=quoted), event)

    def _key(self, frame: _Frame, event: yaml.ScalarEvent) -> str:
        path, place = (*frame.path, event.value), _start(event)
        first = self.document.keys.setdefault(path, place)
        if first is not place:
            self.document.report(
                place, path, f"is already set on line {first.line}; YAML would silently keep one: remove the other"
            )
        return str(event.value)

    def _place_value(self, value: Tree, event: yaml.Event) -> Path:
        """Hang a value where it belongs and give its path; the second of two values for one key is dropped."""
        frame = self.stack[-1]
        if isinstance(frame.into, list):
            path: Path = (*frame.path, len(frame.into))
            frame.into.append(value)
        elif frame.key is None:
            # An alias stands where a key should; it is reported already, and its value goes nowhere.
            frame.key = ""
            return frame.path
        else:
            path, key = (*frame.path, frame.key), frame.key
            frame.key = None
            if key in frame.into:
                # Its inside is read for its form only, and must not count as a repetition key by key.
                return (*frame.path, f"{key} (again)")
            frame.into[key] = value
        self.document.values.setdefault(path, _start(event))
        return path


def _wants_key(frame: _Frame) -> bool:
    return isinstance(frame.into, dict) and frame.key is None


def _start(event: yaml.Event) -> Place:
    mark = event.start_mark
    assert mark is not None, "events of the pure parser know where they stand"
    return Place(mark.line + 1, mark.column + 1)


def _has_tag(event: yaml.Event) -> bool:
    return getattr(event, "tag", None) is not None

"""What a model is and what it costs, before anything is loaded; the rules for names and loaders."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from types import MappingProxyType

from modelcache.tier import Tier


class OnWrite(Enum):
    """What an eviction does with bytes that were written since their block was filled."""

    WRITEBACK = "writeback"
    REFUSE = "refuse"
    DISCARD = "discard"

    def __str__(self) -> str:
        return self.value


class Priority(Enum):
    """Which models are given up first: every `LOW` copy before any `NORMAL`, those before any `HIGH`."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def rank(self) -> int:
        """0 for the first to go."""
        return _RANKS[self]

    def __str__(self) -> str:
        return self.value


_RANKS = {Priority.LOW: 0, Priority.NORMAL: 1, Priority.HIGH: 2}


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """How a model comes into being. Exactly one of the three forms is set.

    `call` is a Python callable. `entry` is ``"pkg.module:function"``, imported when first used. `kind` is a named
    loader (``transformers``, ``sentence-transformers``, ``safetensors``) with its `options` (`path`, `dtype`,
    `model`, `weights`, ...).
    """

    call: object | None = None
    entry: str | None = None
    kind: str | None = None
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        if self.call is not None:
            module = getattr(self.call, "__module__", "?")
            return f"{module}:{getattr(self.call, '__qualname__', type(self.call).__qualname__)}"
        return self.entry or str(self.kind)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One registered model. Sizes are bytes, durations seconds; `None` means not set.

    Attributes:
        name: The registered name.
        loader: How it is built.
        size_bytes: Weights and buffers, when known before the first load.
        workspace_bytes: What a running model needs beside its weights (activations, KV cache).
        pin: The tier this model is never given up from, or `None`.
        priority: Which copies go first.
        idle_s: Park after this long without a lease; `None` never.
        concurrency: Leases at a time; 0 is unlimited, `None` takes the adapter's default.
        reload: A callable loader may be called again to re-read the weights.
        on_write: What an eviction does with written bytes.
    """

    name: str
    loader: LoaderSpec
    size_bytes: int | None = None
    workspace_bytes: int = 0
    pin: Tier | None = None
    priority: Priority = Priority.NORMAL
    idle_s: float | None = None
    concurrency: int | None = None
    reload: bool = False
    on_write: OnWrite = OnWrite.WRITEBACK


#: What a model may be called, to be matched in full.
NAME_PATTERN = "[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
_NAME = re.compile(NAME_PATTERN, re.ASCII)
# Names become file names; these open a device instead of a file on some systems, with any ending.
_DEVICE_NAMES = frozenset({"con", "nul", "prn", "aux"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)})


def check_name(name: object) -> str:
    """The name itself, if a model may be called so.

    Raises:
        TypeError: Not text.
        ValueError: Not 1 to 64 of ``a-z 0-9 . _ -`` between a letter or digit and another, or a path, or a device.
    """
    if not isinstance(name, str):
        raise TypeError(f"a model's name is text such as 'qwen-7b', got {type(name).__name__}")
    if _NAME.fullmatch(name) is None or ".." in name:
        shown = repr(name if len(name) <= 80 else name[:77] + "...")
        lower = name.strip().lower().replace(" ", "-")
        hint = f"; did you mean {lower!r}?" if _NAME.fullmatch(lower) and ".." not in lower else ""
        raise ValueError(
            f"{shown} is not a valid name{hint or ';'} use a-z, 0-9, '.', '_', '-', 1 to 64 characters, beginning and "
            "ending with a letter or digit; paths go in 'path'"
        )
    if name.partition(".")[0] in _DEVICE_NAMES:
        raise ValueError(f"{name!r} is the name of a device on some systems; add something to it, such as 'my-{name}'")
    return name


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause that names the closest of `known`, or nothing: ``"; did you mean 'vram'?"``."""
    matches = get_close_matches(word[:64].lower(), tuple(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


@dataclass(frozen=True, slots=True)
class LoaderKind:
    """A named loader: what it is told, beside what every model may be told. Nothing else is accepted.

    Attributes:
        options: Names of its options.
        required: Those it cannot do without.
    """

    options: tuple[str, ...]
    required: tuple[str, ...]


LOADER_KINDS: Mapping[str, LoaderKind] = MappingProxyType(
    {
        "transformers": LoaderKind(options=("path", "dtype", "model", "task"), required=("path",)),
        "sentence-transformers": LoaderKind(options=("path", "dtype"), required=("path",)),
        "safetensors": LoaderKind(options=("model", "weights", "dtype"), required=("model", "weights")),
    }
)


def is_entry(text: str) -> bool:
    """Whether this is ``"package.module:name"``, the way to write a function or class of the operator's own."""
    module, colon, attribute = text.partition(":")
    words = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(word.isidentifier() and not keyword.iskeyword(word) for word in words)


def check_loader(text: str) -> str:
    """The text itself, if it names a loader: a kind of `LOADER_KINDS`, or ``"package.module:function"``.

    Raises:
        ValueError: Neither; the message lists the kinds.
    """
    if text in LOADER_KINDS or is_entry(text):
        return text
    shown = text if len(text) <= 60 else text[:57] + "..."
    kinds = ", ".join(LOADER_KINDS)
    raise ValueError(
        f"unknown loader {shown!r}{did_you_mean(text, LOADER_KINDS) or ';'} a loader is one of {kinds}, or your own "
        'function, "package.module:function"'
    )


def option_problems(loader: str, given: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """What is wrong with the options given to a loader: (option, message) each, in order; empty when all is well."""
    kind = LOADER_KINDS.get(loader, LoaderKind(options=(), required=()))
    names = tuple(given)
    takes = ", ".join(kind.options) or "no options; give them inside the function"
    strange = [
        (name, f"is no option of the loader {loader!r}{did_you_mean(name, kind.options) or ';'} it takes {takes}")
        for name in names
        if name not in kind.options
    ]
    missing = [(name, f"is missing; the loader {loader!r} needs it") for name in kind.required if name not in names]
    return (*strange, *missing)

"""Single values as people write them: read strictly, refused in words.

A reader takes what stood in a file, in the environment, or what Python passed, and gives the plain value or raises
`ValueError` with a message that says what to write. Where the value stood is the business of `layers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import TypeVar

from modelcache import units
from modelcache.spec import check_loader, check_name, did_you_mean, is_entry

E = TypeVar("E", bound=Enum)

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_LOOSE_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_NO_NUMBER = re.compile(r"[-+]?\.?(?:nan|inf)", re.ASCII | re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
_COUNT = re.compile(r"[1-9]\d{0,8}", re.ASCII)
_ZERO_PERCENT = re.compile(r"\s*0+(\.0+)?\s*%\s*", re.ASCII)
_DEVICE = re.compile(r"cuda:(?:0|[1-9]\d{0,2})", re.ASCII)
_DEVICES = ("auto", "cuda:0", "simulated", "host_only")
_DEVICE_NICKNAMES = {"cuda": "cuda:0", "gpu": "cuda:0", "cpu": "host_only", "sim": "simulated", "sim:0": "simulated"}
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
_DTYPE_NICKNAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
_SMALLEST_BUDGET_BYTES = 1024
_SEGMENT_STEP_BYTES = 512
_SMALLEST_SEGMENT_BYTES = 4096
_LARGEST_TEXT = 4096
_SIZE_KEYS = frozenset({"segment", "capacity", "size", "workspace"})
_EXACT_UNITS = (
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("TB", 10**12),
    ("GB", 10**9),
    ("MiB", 1 << 20),
    ("MB", 10**6),
    ("KiB", 1024),
)


@dataclass(frozen=True, slots=True)
class Scalar:
    """One word of a file or of the environment, as it was written: nothing has guessed at its type.

    YAML would read ``010`` as 8 and ``3:30`` as 210; here each key reads its own text.

    Attributes:
        text: What was written, without quotes.
        quoted: It stood in quotes, so it is text even if it looks like something else.
        loose: It comes from the environment or a command line, where ``1`` may stand for ``true``.
    """

    text: str
    quoted: bool = False
    loose: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written."""
        return not self.quoted and self.text in _NULLS


@dataclass(frozen=True, slots=True)
class Absolute:
    """So many bytes."""

    size_bytes: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Share:
    """A fraction of what is there, less what others hold."""

    fraction: float
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Auto:
    """What suits the machine; `budgets.py` says what that is for each tier."""

    def __str__(self) -> str:
        return "auto"


Size = Absolute | Share | Auto
NOTHING = Absolute(0, "none")


def show(value: object) -> str:
    """A value as a message may carry it: escaped, short, and without a type name of ours."""
    if isinstance(value, Scalar):
        if value.is_empty:
            return "nothing"
        if not value.quoted and _NO_NUMBER.fullmatch(value.text):
            return f"the number {value.text.lower().replace('.', '')}"
        if not value.quoted and _NUMBER.fullmatch(value.text) and len(value.text) <= 40:
            return f"the number {value.text}"
        value = value.text
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"the number {value}"
    return str(value) if isinstance(value, bool) else f"an object of type {type(value).__name__}"


def word(value: object) -> str | None:
    """The text that was written, or `None` where there is none."""
    if isinstance(value, Scalar):
        return None if value.is_empty else value.text
    return value if isinstance(value, str) else None


def _integer(value: object) -> int | None:
    """An int of Python; a bool is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _refusal(what: str, value: object) -> ValueError:
    if isinstance(value, Scalar) and value.is_empty:
        return ValueError(f"is empty; write {what}, or remove the key")
    return ValueError(f"must be {what}, got {show(value)}")


def read_size(value: object) -> int:
    """Bytes, from ``"3GiB"``, or from an int in Python, where it means bytes."""
    text = word(value)
    if text is not None and _NO_NUMBER.fullmatch(text) is None:
        return units.parse_bytes(text)
    integer = _integer(value)
    if integer is None:
        raise _refusal('a size such as "3GiB"', value)
    if integer <= 0:
        raise ValueError(f"must be greater than 0, got {integer}")
    return integer


def read_segment(value: object) -> int:
    """Bytes of one segment: a whole number of 512, because files are read in such steps."""
    size_bytes = read_size(value)
    if size_bytes < _SMALLEST_SEGMENT_BYTES or size_bytes % _SEGMENT_STEP_BYTES:
        raise ValueError(f"must be a multiple of 512 bytes, 4KiB or more, got {show(value)}")
    return size_bytes


def read_budget(value: object) -> Size:
    """``"20GiB"``, ``"80%"`` or ``"auto"``; an int in Python means bytes."""
    if isinstance(value, (Absolute, Share, Auto)):
        return value
    what = 'a size such as "16GiB" or "80%"'
    integer = _integer(value)
    if integer is not None and integer > 0:
        if integer < _SMALLEST_BUDGET_BYTES:
            raise ValueError(f'{integer} bytes is smaller than any model; add a unit: "{integer}GiB"')
        return Absolute(integer, f"{integer}B")
    text = word(value)
    if text is None or _NO_NUMBER.fullmatch(text):
        hint = f'; write "{value:.0%}"' if isinstance(value, float) and 0 < value <= 1 else ""
        raise ValueError(f"{_refusal(what, value)}{hint}")
    if text.strip() == "auto":
        return Auto()
    fraction = units.parse_percent(text)
    if fraction is not None:
        return Share(fraction, text.strip())
    if _NUMBER.fullmatch(text) and 0 < float(text) <= 1 and text != "1":
        raise ValueError(f'{_refusal(what, value)}; for a share write "{float(text):.0%}"')
    return Absolute(units.parse_bytes(text), text.strip())


def read_optional_budget(value: object) -> Size:
    """As `read_budget`, or ``"none"`` (in Python also 0): nothing of this kind is used."""
    return NOTHING if word(value) == "none" or _integer(value) == 0 else read_budget(value)


def read_rate(value: object) -> int:
    """Bytes per second, from ``"8GB/s"``; an int in Python means bytes per second."""
    text = word(value)
    if text is not None:
        return units.parse_rate(text)
    integer = _integer(value)
    if integer is None or integer <= 0:
        raise _refusal('a speed such as "8GB/s"', value)
    return integer


def read_idle(value: object) -> float | None:
    """Seconds, from ``"10m"``; ``"never"`` is `None`. A number in Python means seconds."""
    text = word(value)
    if text is not None:
        seconds = units.parse_duration(text)
        if seconds == 0:
            raise ValueError(f"must be longer than nothing, got {show(value)}")
        return seconds
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    raise _refusal('a duration such as "10m", or "never"', value)


def read_flag(value: object) -> bool:
    """``true`` or ``false``. YAML's ``yes``, ``no``, ``on`` and ``off`` mean different things to different readers."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Scalar) and not value.quoted:
        if value.text in {"true", "false"}:
            return value.text == "true"
        if value.loose and value.text.lower() in _LOOSE_FLAGS:
            return _LOOSE_FLAGS[value.text.lower()]
    raise _refusal("true or false", value)


def read_count(value: object) -> int:
    """A whole number, 1 or more."""
    integer = _integer(value)
    if isinstance(value, Scalar) and not value.quoted and _COUNT.fullmatch(value.text):
        integer = int(value.text)
    if integer is None or integer < 1:
        raise _refusal("a whole number, 1 or more", value)
    return integer


def read_seed(value: object) -> int:
    """A whole number, 0 or more."""
    if value == 0 or (isinstance(value, Scalar) and value.text == "0" and not value.quoted):
        return 0
    try:
        return read_count(value)
    except ValueError:
        raise _refusal("a whole number, 0 or more", value) from None


def read_fraction(value: object) -> float:
    """A share of a whole, from ``"50%"``, ``"0%"`` included; a number in Python is a fraction of 1."""
    text = word(value)
    if text is not None and _ZERO_PERCENT.fullmatch(text):
        return 0.0
    fraction = units.parse_percent(text) if text is not None else None
    if fraction is None and isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        fraction = float(value)
    if fraction is None:
        raise _refusal('a share such as "50%"', value)
    return fraction


def read_amount(value: object) -> float:
    """A number above 0."""
    number = _number(value)
    if number is None or not 0 < number < float("inf"):
        raise _refusal("a number above 0", value)
    return number


def read_number(value: object) -> float:
    """A number."""
    number = _number(value)
    if number is None or not float("-inf") < number < float("inf"):
        raise _refusal("a number", value)
    return number


def _number(value: object) -> float | None:
    if isinstance(value, Scalar) and not value.quoted and _NUMBER.fullmatch(value.text):
        return float(value.text)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def read_entry(value: object) -> str:
    """``"package.module:function"``. Nothing is imported."""
    text = word(value)
    if text is None or not is_entry(text):
        raise _refusal('a function, "package.module:function"', value)
    return text


def read_concurrency(value: object) -> int:
    """Leases at a time; 0 stands for ``"unlimited"``."""
    if word(value) == "unlimited":
        return 0
    try:
        return read_count(value)
    except ValueError:
        raise _refusal('a whole number, 1 or more, or "unlimited"', value) from None


def read_version(value: object) -> int:
    """The version of the configuration's format: 1."""
    if value == 1 or (isinstance(value, Scalar) and value.text == "1" and not value.quoted):
        return 1
    raise _refusal("1, the only version of this format", value)


def read_text(value: object) -> str:
    """Some text without control characters."""
    text = word(value)
    if text is None or not text.strip():
        raise _refusal("text", value)
    if len(text) > _LARGEST_TEXT or not text.isprintable():
        raise ValueError(f"must be printable text of at most {_LARGEST_TEXT} characters, got {show(value)}")
    return text


def read_path(value: object) -> str:
    """A path as written; `layers.py` resolves it against the folder of the file."""
    if isinstance(value, PurePath):
        value = str(value)
    text = word(value)
    if text is None or not text.strip():
        raise _refusal("a path", value)
    text = read_text(value)
    if text.startswith("~"):
        raise ValueError(f"'~' is not expanded here; write the whole path instead of {show(value)}")
    if "://" in text:
        raise ValueError(f"must be a path on this machine, got {show(value)}; nothing is downloaded: fetch it first")
    return text


def read_name(value: object) -> str:
    """A model's name."""
    text = word(value)
    if text is None:
        raise _refusal("a model's name", value)
    return check_name(text)


def read_loader(value: object) -> str:
    """A named loader or ``"package.module:function"``. Nothing is imported."""
    text = word(value)
    if text is None:
        raise _refusal('the name of a loader, or "package.module:function"', value)
    return check_loader(text)


def read_device(value: object) -> str:
    """``auto``, ``cuda:N``, ``simulated`` or ``host_only``."""
    text = word(value)
    if text is not None and (text in _DEVICES or _DEVICE.fullmatch(text)):
        return text
    raise _choice_refusal("auto, cuda:N (such as cuda:0), simulated or host_only", value, _DEVICES, _DEVICE_NICKNAMES)


def read_dtype(value: object) -> str:
    """The name of a floating point type, or ``auto``."""
    text = word(value)
    if text in DTYPES:
        return text
    raise _choice_refusal(_listed(DTYPES), value, DTYPES, _DTYPE_NICKNAMES)


def one_of(*words: str) -> Callable[[object], str]:
    """A reader of one of these words."""

    def read(value: object) -> str:
        text = word(value)
        if text in words:
            return text
        raise _choice_refusal(_listed(words), value, words, {})

    return read


def write_bytes(size_bytes: int) -> str:
    """A size as `read_size` reads it back, exactly: ``"64MiB"``, ``"1500MB"``."""
    for unit, factor in _EXACT_UNITS:
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def spell_value(path: Sequence[str | int], value: object) -> str | None:
    """A value that was read, as a file would say it; `None` where nothing is set."""
    key = path[-1] if path else ""
    if key in {"idle", "max_time"}:
        return "never" if value is None else _spell_seconds(value)
    if value is None:
        return None
    if key in _SIZE_KEYS and isinstance(value, int):
        return write_bytes(value)
    if key == "link":
        return f"{write_bytes(value)}/s" if isinstance(value, int) else str(value)
    if key == "concurrency" and value == 0:
        return "unlimited"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _spell_seconds(seconds: object) -> str:
    for unit, factor in (("h", 3600), ("m", 60), ("s", 1)):
        if isinstance(seconds, float) and seconds % factor == 0:
            return f"{seconds / factor:.0f}{unit}"
    return f"{seconds}s"


def member_of(members: Sequence[E]) -> Callable[[object], E]:
    """A reader of one of these members, by its value; the member itself is taken as well."""
    by_word = {str(member.value): member for member in members}
    read_word = one_of(*by_word)

    def read(value: object) -> E:
        return next((member for member in members if member is value), None) or by_word[read_word(value)]

    return read


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _choice_refusal(what: str, value: object, words: Sequence[str], nicknames: Mapping[str, str]) -> ValueError:
    text = word(value)
    if text is None:
        return _refusal(what, value)
    nickname = nicknames.get(text.lower())
    hint = f"; did you mean {nickname!r}?" if nickname else did_you_mean(text, words)
    return ValueError(f"must be {what}, got {show(value)}{hint}")

"""Sizes and durations as people write them. The only place that knows suffixes."""

from __future__ import annotations

import re
from decimal import Decimal

_SIZES = {"B": 1} | {
    prefix + suffix: base**power
    for base, suffix in ((1024, "iB"), (1000, "B"))
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
}
_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# The number of digits is bounded, so that no text becomes an infinity or a conversion that takes long.
_NUMBER = r"(\d{1,20}(?:\.\d{1,20})?)"
_SIZE = re.compile(_NUMBER + r" *([A-Za-z]*)", re.ASCII)
_PERCENT = re.compile(_NUMBER + r" *%", re.ASCII)
_DURATION = re.compile(_NUMBER + r"(ms|s|m|h|d)", re.ASCII)
_SMALLEST_MODEL_BYTES = 1 << 20


def parse_bytes(text: str) -> int:
    """Read a size such as ``"24GiB"`` (1024-based) or ``"24GB"`` (1000-based), in bytes, rounded down.

    Raises:
        ValueError: Not a size above 0 with a known unit; the message says what to write.
    """
    stripped = text.strip()
    match = _SIZE.fullmatch(stripped.removeprefix("-"))
    if match is None:
        raise ValueError(
            f'cannot read {_shown(text)}; write a size such as "18GiB" (1024-based) or "18GB" (1000-based)'
        )
    if stripped.startswith("-"):
        raise ValueError(f"must be greater than 0, got {stripped}")
    number, unit = match.groups()
    if not unit:
        raise ValueError(_no_unit(number))
    if unit not in _SIZES:
        raise ValueError(_unknown_unit(number, unit))
    # Decimal, because a binary fraction makes "4.35GB" one byte less than it says.
    size_bytes = int(Decimal(number) * _SIZES[unit])
    if size_bytes <= 0:
        raise ValueError(f"must be greater than 0, got {stripped}")
    return size_bytes


def parse_rate(text: str) -> int:
    """Read a link speed such as ``"8GB/s"``, in bytes per second, rounded down.

    Raises:
        ValueError: Not a speed above 0 with a known unit; the message says what to write.
    """
    size, slash, second = text.strip().partition("/")
    if not slash or second.strip() != "s":
        raise ValueError(f'cannot read {_shown(text)}; write a speed such as "8GB/s" or "25GiB/s"')
    return parse_bytes(size.rstrip())


def _shown(text: str) -> str:
    """The text as a message may carry it: escaped, and no longer than a line."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _no_unit(number: str) -> str:
    if Decimal(number) == 0:
        return f"must be greater than 0, got {number}"
    if Decimal(number) < _SMALLEST_MODEL_BYTES:
        return f'{number} bytes is smaller than any model; add a unit: "{number}GiB"'
    return f'{number} has no unit; write "{number}B", or a size such as "16GiB"'


def _unknown_unit(number: str, unit: str) -> str:
    letter = unit[0].upper()
    hint = f'{letter}B or {letter}iB, e.g. "{number}{letter}iB"' if letter in "KMGT" else 'GB or GiB, e.g. "16GiB"'
    bits = " (gigabits?)" if unit == "Gb" else ""
    return f"unknown unit {unit!r}{bits}; use {hint}"


def parse_percent(text: str) -> float | None:
    """The fraction of ``"80%"`` as 0.8; `None` when the text is no percentage.

    Raises:
        ValueError: Below or at 0 %, or above 100 %.
    """
    match = _PERCENT.fullmatch(text.strip())
    if match is None:
        return None
    percent = float(match.group(1))
    if percent > 100:
        raise ValueError(f"{text.strip()} is above 100%")
    if percent <= 0:
        raise ValueError(f"must be greater than 0%, got {text.strip()}")
    return percent / 100


def parse_duration(text: str) -> float | None:
    """Read a duration such as ``"10m"`` or ``"1m30s"``, in seconds; ``"never"`` is `None`.

    Raises:
        ValueError: Not a duration; the message says what to write.
    """
    stripped = text.strip()
    if stripped == "never":
        return None
    pieces = _DURATION.findall(stripped)
    if not pieces or "".join(number + unit for number, unit in pieces) != stripped:
        raise ValueError(f'cannot read {_shown(text)}; write a duration such as "90s", "10m", "1m30s" or "never"')
    return sum(float(number) * _DURATIONS[unit] for number, unit in pieces)


def format_bytes(size_bytes: int) -> str:
    """A size for people, in binary units: ``"22.1 GiB"``, ``"87 MiB"``."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        number = f"{size:.1f}" if abs(size) < 10 or unit == "GiB" else f"{size:.0f}"
        # What rounds up to 1024 of one unit is 1.0 of the next.
        if abs(float(number)) < 1024:
            break
    return f"{number} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration for people: ``"0.92 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.1:
        return f"{seconds * 1e3:.1f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"

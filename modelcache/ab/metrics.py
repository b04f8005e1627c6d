"""What is measured of each call: the time of each stage, failures, and scores given by callables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modelcache import format_seconds
from modelcache.ab.inputs import InputError

#: The whole call, in seconds, and the share of items that failed: measured of every run.
LATENCY, FAILURES = "latency", "failures"


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of each call.

    Args:
        name: What it is called in the report.
        measure: ``measure(output, item)`` gives a finite number. `None` for what is measured anyway.
        better: Which way is better.
        scale: Arms are compared by ``difference``, or by ``ratio`` (times: the numbers must be positive).
        margin: How much worse is still acceptable: in the metric's unit, or relative for a ratio (0.05 is 5 %). Without
            it no arm is called "no worse".
        unit: Of the numbers: ``""`` or ``"s"``.

    Raises:
        InputError: The margin is not a positive number, or the name is taken by what is measured anyway.
    """

    name: str
    measure: Callable[[Any, Any], float] | None = None
    better: Literal["higher", "lower"] = "higher"
    scale: Literal["difference", "ratio"] = "difference"
    margin: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise InputError(f"metric {self.name!r}: better is 'higher' or 'lower', got {self.better!r}")
        if self.scale not in ("difference", "ratio"):
            raise InputError(f"metric {self.name!r}: scale is 'difference' or 'ratio', got {self.scale!r}")
        if self.margin is not None and not (isinstance(self.margin, (int, float)) and 0 < self.margin < math.inf):
            raise InputError(f"metric {self.name!r}: a margin is a positive number, got {self.margin!r}")
        if self.measure is not None and self.name in (LATENCY, FAILURES):
            raise InputError(f"metric {self.name!r} is measured of every run; give yours another name")

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.better == "higher" else -1

    @property
    def margin_on_scale(self) -> float:
        """The margin as a difference: of logarithms for a ratio."""
        assert self.margin is not None
        if self.scale == "difference":
            return self.margin
        return math.log1p(self.margin) if self.better == "lower" else -math.log1p(-min(self.margin, 0.999))

    def on_scale(self, number: float) -> float:
        """The number as it is compared."""
        return math.log(number) if self.scale == "ratio" else number

    def relative(self, difference: float) -> float:
        """A difference as it is shown: for a ratio the relative change."""
        if self.scale == "difference":
            return difference
        return math.expm1(difference) if difference < 700 else math.inf

    def change(self, shown: float) -> str:
        """A difference in words, with its sign."""
        if not math.isfinite(shown) or (self.scale == "ratio" and shown <= -1):
            return "unbounded"
        return (
            f"{shown:+.2%}".replace("%", " %")
            if self.scale == "ratio"
            else f"{shown:+.4g}{self.unit and ' '}{self.unit}"
        )

    def amount(self, shown: float) -> str:
        """A difference in words, without its sign."""
        return self.change(abs(shown)).removeprefix("+")

    def number(self, value: float) -> str:
        """One figure in words."""
        return format_seconds(value) if self.unit == "s" else f"{value:.4g}"

    def as_json(self) -> dict[str, object]:
        """Everything but the callable."""
        return {
            "name": self.name,
            "better": self.better,
            "scale": self.scale,
            "margin": self.margin,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Metric:
        """What `as_json` gave; it measures nothing again."""
        return cls(found["name"], None, found["better"], found["scale"], found["margin"], found["unit"])


def latency(stage: str = "", margin: float | None = None) -> Metric:
    """The time of a whole call, or of one stage of it, compared by ratio."""
    return Metric(f"{stage} {LATENCY}".strip(), None, "lower", "ratio", margin, "s")


def failures() -> Metric:
    """The share of items on which an arm failed."""
    return Metric(FAILURES, None, "lower")

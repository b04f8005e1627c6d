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
        bounds: The least and the most that the number can be: ``(0.0, 1.0)`` of a share. Only with it can a run that is
            looked at find an arm "no worse", as can any run in which few items make a difference; and the worse of the
            two is the score of an item on which an arm failed. Scores that are all 0 or 1 need none.

    Raises:
        InputError: The margin is not a positive number, the bounds are not two numbers of which the first is less (and
            positive, for a ratio), or the name is taken by what is measured anyway.
    """

    name: str
    measure: Callable[[Any, Any], float] | None = None
    better: Literal["higher", "lower"] = "higher"
    scale: Literal["difference", "ratio"] = "difference"
    margin: float | None = None
    unit: str = ""
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise InputError(f"metric {self.name!r}: better is 'higher' or 'lower', got {self.better!r}")
        if self.scale not in ("difference", "ratio"):
            raise InputError(f"metric {self.name!r}: scale is 'difference' or 'ratio', got {self.scale!r}")
        if self.margin is not None and not (isinstance(self.margin, (int, float)) and 0 < self.margin < math.inf):
            raise InputError(f"metric {self.name!r}: a margin is a positive number, got {self.margin!r}")
        if self.bounds is not None:
            self._require_bounds(self.bounds)
        if self.measure is not None and self.name in (LATENCY, FAILURES):
            raise InputError(f"metric {self.name!r} is measured of every run; give yours another name")

    def _require_bounds(self, bounds: tuple[float, float]) -> None:
        are_numbers = len(bounds) == 2 and all(isinstance(end, (int, float)) and math.isfinite(end) for end in bounds)
        if not are_numbers or not bounds[0] < bounds[1] or (self.scale == "ratio" and bounds[0] <= 0):
            least = " above nought" if self.scale == "ratio" else ""
            raise InputError(
                f"metric {self.name!r}: bounds are the least and the most that it can be{least}, got {bounds!r}"
            )

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

    @property
    def reach(self) -> float:
        """The most by which two figures can differ, as they are compared; infinite where no bounds are stated."""
        if self.name == FAILURES:
            return 1.0
        if self.bounds is None:
            return math.inf
        return self.on_scale(self.bounds[1]) - self.on_scale(self.bounds[0])

    @property
    def worst(self) -> float | None:
        """The worse of the bounds; `None` where none are stated."""
        return None if self.bounds is None else self.bounds[0 if self.better == "higher" else 1]

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
            "bounds": None if self.bounds is None else list(self.bounds),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Metric:
        """What `as_json` gave; it measures nothing again."""
        bounds = found.get("bounds")
        return cls(
            found["name"],
            None,
            found["better"],
            found["scale"],
            found["margin"],
            found["unit"],
            None if bounds is None else tuple(bounds),
        )


def latency(stage: str = "", margin: float | None = None) -> Metric:
    """The time of a whole call, or of one stage of it, compared by ratio."""
    return Metric(f"{stage} {LATENCY}".strip(), None, "lower", "ratio", margin, "s")


def failures() -> Metric:
    """The share of items on which an arm failed."""
    return Metric(FAILURES, None, "lower")

"""Who gets which arm: a pure function of the experiment's name and the unit, the same in any process and language.

The place of a unit is the first 53 bits of ``SHA-256(name + NUL + unit)`` as a fraction of one, in UTF-8. Each arm
owns a range of places that begins where the arms before it would end at full share, and is as wide as its weight times
the share. So raising the share adds units at the end of each range, and takes none away.

The place of a unit in a layer is that of ``NUL + "layer" + NUL + layer``, which no experiment can be called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from types import MappingProxyType

from modelcache.ab.inputs import InputError, is_finite

_BITS = 53
# How far from 1 the weights may add up: thirds written in decimals leave a crack of that width, out of share.
_TOLERANCE = 1e-3


class Why(StrEnum):
    """Why a unit has the arm that it has."""

    ASSIGNED = "assigned"
    OVERRIDE = "override"
    OUT_OF_SHARE = "out of share"
    OTHER_SLICE = "other slice"
    SWITCHED_OFF = "switched off"


@dataclass(frozen=True, slots=True)
class Layer:
    """Experiments of one layer that have slices apart never have a unit in common.

    Args:
        name: The same for all of them.
        start: Where this one's slice begins, of 0 to 1; `end` is where it ends.
        end: Not included.

    Raises:
        InputError: The slice is empty or out of range.
    """

    name: str
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not (is_finite(self.start) and is_finite(self.end) and 0 <= self.start < self.end <= 1):
            raise InputError(f"a slice of layer {self.name!r} lies between 0 and 1, got {self.start!r} to {self.end!r}")

    def has(self, unit: str) -> bool:
        """Whether a unit is in the slice."""
        return self.start <= place_of(f"\0layer\0{self.name}", unit) < self.end


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a unit gets.

    Attributes:
        arm: Its name; the first arm for whoever takes no part.
        why: Only units that are ``assigned`` count in an analysis.
    """

    arm: str
    why: Why

    @property
    def takes_part(self) -> bool:
        """Whether it counts."""
        return self.why is Why.ASSIGNED


@dataclass(frozen=True, slots=True)
class Split:
    """How an experiment shares out its units.

    Args:
        name: Of the experiment; another name shares out anew.
        weights: Of each arm, adding up to 1. The first arm is the control.
        share: Of all units, how many take part: raise it to ramp up, and nobody who takes part is moved.
        layer: Where it must not overlap with others.
        overrides: Units that get an arm without taking part.
        is_on: `False` sends everybody to the control.

    Raises:
        InputError: Weights that do not add up, a share out of range, an override to an arm that is not there, or of a
            unit that is not text.
    """

    name: str
    weights: Mapping[str, float]
    share: float = 1.0
    layer: Layer | None = None
    overrides: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    is_on: bool = True

    def __post_init__(self) -> None:
        where = f"experiment {self.name!r}"
        if not self.name or "\0" in self.name:
            raise InputError(f"an experiment needs a name without NUL, got {self.name!r}")
        if len(self.weights) < 2:
            raise InputError(f"{where} needs two arms or more, got {list(self.weights)!r}")
        bad = {arm: weight for arm, weight in self.weights.items() if not (is_finite(weight) and 0 < weight < 1)}
        if bad:
            arm, weight = next(iter(bad.items()))
            raise InputError(f"{where}: the weight of {arm!r} must lie between 0 and 1, got {weight!r}")
        total = sum(self.weights.values())
        if abs(total - 1) > _TOLERANCE:
            listed = " + ".join(f"{weight:g}" for weight in self.weights.values())
            raise InputError(f"{where}: weights must add up to 1, got {listed} = {total:g}; use 'share' to ramp up")
        if not (is_finite(self.share) and 0 <= self.share <= 1):
            raise InputError(f"{where}: share must lie between 0 and 1, got {self.share!r}")
        if not isinstance(self.is_on, bool):
            raise InputError(f"{where}: is_on is True or False, got {self.is_on!r}")
        for unit in self.overrides:
            _require_text(self.name, unit)
        strange = {unit: arm for unit, arm in self.overrides.items() if arm not in self.weights}
        if strange:
            unit, arm = next(iter(strange.items()))
            raise InputError(
                f"{where}: the override of {unit!r} names the arm {arm!r}, but there are "
                f"{', '.join(map(repr, self.weights))}"
            )

    @property
    def control(self) -> str:
        """The first arm."""
        return next(iter(self.weights))

    def assign(self, unit: str) -> Assignment:
        """What a unit gets; always the same for the same split.

        Raises:
            InputError: The unit is not text: a number and its digits would be two units to some and one to others.
        """
        _require_text(self.name, unit)
        if not self.is_on:
            return Assignment(self.control, Why.SWITCHED_OFF)
        override = self.overrides.get(unit)
        if override is not None:
            return Assignment(override, Why.OVERRIDE)
        if self.layer is not None and not self.layer.has(unit):
            return Assignment(self.control, Why.OTHER_SLICE)
        place = place_of(self.name, unit)
        starts = (0.0, *accumulate(self.weights.values()))
        for (arm, weight), start in zip(self.weights.items(), starts, strict=False):
            if start <= place < start + weight * self.share:
                return Assignment(arm, Why.ASSIGNED)
        return Assignment(self.control, Why.OUT_OF_SHARE)


def _require_text(name: str, unit: object) -> None:
    if not isinstance(unit, str):
        kind = type(unit).__name__
        raise InputError(
            f"experiment {name!r}: a unit is text, got {unit!r:.80} ({kind}); give the user's name or id as str"
        )


def place_of(name: str, unit: str) -> float:
    """Where a unit lies, from 0 to below 1."""
    return (int.from_bytes(_sha256(f"{name}\0{unit}").digest()[:8], "big") >> (64 - _BITS)) / (1 << _BITS)


def mask(name: str, unit: str) -> str:
    """A name for a unit that does not tell who it is, 16 hex digits; the same within an experiment."""
    return _sha256(f"unit\0{name}\0{unit}").hexdigest()[:16]


def _sha256(text: str) -> hashlib._Hash:
    # What a client sends as its name may hold half a character, and is served all the same.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass"))

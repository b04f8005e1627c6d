"""An arm: a registered model and the settings it is called with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from modelcache import ModelCache
from modelcache.ab.inputs import InputError


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a comparison.

    Args:
        name: In the report.
        model: The name it is registered under; `name` when not given.
        settings: Keyword arguments of each call, so that one model can be compared with itself.

    Raises:
        InputError: A name is not a text, or the settings are not a mapping.
    """

    name: str
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name and isinstance(self.model, str)):
            raise InputError(f"an arm and its model have names, got {self.name!r} and {self.model!r}")
        if not isinstance(self.settings, Mapping):
            raise InputError(f"arm {self.name!r}: settings are keyword arguments by name, got {self.settings!r}")
        object.__setattr__(self, "model", self.model or self.name)


def read_arms(cache: ModelCache, given: Iterable[Arm | str]) -> tuple[Arm, ...]:
    """The arms; the first one is the baseline.

    A name given twice is an A/A comparison: the second is called ``name (again)``.

    Raises:
        InputError: Fewer than two arms, two with one name, or a model that is not registered.
    """
    if isinstance(given, str):
        raise InputError(f"arms is a list of names, got the string {given!r}; write [{given!r}, ...]")
    if not isinstance(given, Iterable):
        raise InputError(f"arms is a list of names, or of Arm, got {given!r}")
    arms: list[Arm] = []
    for one in given:
        if not isinstance(one, (Arm, str)):
            raise InputError(f"an arm is the name of a registered model, or an Arm, got {one!r}")
        arm = one if isinstance(one, Arm) else Arm(one)
        if isinstance(one, str) and [a.name for a in arms] == [one]:
            arm = Arm(f"{one} (again)", one)
        arms.append(arm)
    if len(arms) < 2:
        raise InputError(
            f"a comparison needs two arms or more, got {[arm.name for arm in arms]!r}; name one model twice to compare "
            "it with itself"
        )
    names = [arm.name for arm in arms]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InputError(f"two arms are called {doubled[0]!r}; give one of them another name: Arm('other', model=...)")
    missing = sorted({arm.model for arm in arms if arm.model not in cache})
    if missing:
        listed = ", ".join(map(repr, missing))
        raise InputError(f"not registered: {listed}; the cache knows {', '.join(map(repr, sorted(cache.names())))}")
    return tuple(arms)

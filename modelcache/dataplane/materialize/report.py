"""What materializing would do, as data and as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from modelcache.dataplane.files.weight_files import FileBytes
from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.plan import Plan, Unit
from modelcache.dataplane.materialize.slots import size_bytes
from modelcache.dataplane.materialize.ties import Claim
from modelcache.units import format_bytes

_ROWS_SHOWN = 50


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of a plan: its names (more than one when it is tied), its size, and where its data is, in words."""

    names: tuple[str, ...]
    size_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class MaterializePlan:
    """What `materialize_meta_tensors` would do. Printing it gives a table.

    Attributes:
        tensors: Every tensor that would be made real.
        needed_bytes: The new memory that takes on the target, tensors that are only moved there included.
        missing: Names of tensors with no data anywhere.
        problems: Names of tensors whose data cannot be used, with the reason.
        ties: Names said to be one tensor, to be checked against the data.
        target_device: Where everything would be.
        moved_bytes: What of `needed_bytes` is for tensors that are real already, elsewhere.
    """

    tensors: tuple[PlannedTensor, ...]
    needed_bytes: int
    missing: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    ties: tuple[tuple[str, ...], ...]
    target_device: str
    moved_bytes: int

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors that would be made real, whether they need memory of their own or not."""
        return sum(one.size_bytes for one in self.tensors)

    def __str__(self) -> str:
        rows = [(format_bytes(one.size_bytes), " = ".join(one.names), one.source) for one in self.tensors]
        if len(rows) > _ROWS_SHOWN:
            rest_bytes = sum(one.size_bytes for one in self.tensors[_ROWS_SHOWN:])
            rows[_ROWS_SHOWN:] = [(format_bytes(rest_bytes), f"{len(rows) - _ROWS_SHOWN:,} more tensors", "")]
        rows += _shortened([("missing", name, "no data anywhere") for name in self.missing])
        rows += _shortened([("unusable", name, problem) for name, problem in self.problems])
        rows += _shortened([("tied", " = ".join(names), "if their data is the same") for names in self.ties])
        return "\n".join([*_table(rows), self._summary()])

    def _summary(self) -> str:
        lacking = len(self.missing) + len(self.problems)
        noun = "tensor" if len(self.tensors) == 1 else "tensors"
        parts = [f"{len(self.tensors):,} {noun} to make real, {format_bytes(self.total_bytes)}"]
        parts += [f"{format_bytes(self.moved_bytes)} to move to {self.target_device}"] if self.moved_bytes else []
        parts += [f"{lacking:,} cannot be made real"] if lacking else []
        return f"{'; '.join(parts)}; {format_bytes(self.needed_bytes)} of new memory needed on {self.target_device}"


def _shortened(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    if len(rows) <= _ROWS_SHOWN:
        return rows
    return [*rows[:_ROWS_SHOWN], (rows[0][0], f"{len(rows) - _ROWS_SHOWN:,} more", "")]


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return []
    size_width, name_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{size:>{size_width}}  {name:<{name_width}}  {source}".rstrip() for size, name, source in rows]


def as_report(
    plan: Plan, claims: Iterable[Claim], needed_bytes: Mapping[Unit, int], target: torch.device
) -> MaterializePlan:
    """A plan for people.

    Args:
        plan: The plan to carry out.
        claims: Its evidence of ties.
        needed_bytes: What each tensor newly takes on the target.
        target: Where everything would be.
    """
    ties = [tuple(name for unit in claim.units for name in _names(unit)) for claim in claims if len(claim.units) > 1]
    return MaterializePlan(
        tensors=tuple(PlannedTensor(_names(unit), size_bytes(unit.tensor), _in_words(unit)) for unit in plan.loads),
        needed_bytes=sum(needed_bytes.values()),
        missing=tuple(plan.missing),
        problems=tuple(plan.problems.items()),
        ties=tuple(dict.fromkeys(ties)),
        target_device=str(target),
        moved_bytes=sum(size for unit, size in needed_bytes.items() if unit.is_live),
    )


def _names(unit: Unit) -> tuple[str, ...]:
    return tuple(name for slot in unit.slots for name in slot.names)


def _in_words(unit: Unit) -> str:
    match unit.found:
        case FileBytes(path=path):
            return f"file {path}"
        case state.KeptTensor(tensor=tensor):
            return f"memory of the dispatch on {tensor.device}"
        case _:
            return "a mapping of the dispatch"

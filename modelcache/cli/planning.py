"""What a configuration would do, in bytes: which models fit together and what each switch gives up. Pure.

The forecast asks for the models in turn, in the order of the file, and gives up the least recently used first: tail
segments, only as many as needed. It is a forecast of one request order, not a promise about yours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

SEGMENT_BYTES = 64 << 20
_MOST_MODELS_FOR_ALL_SETS = 14


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """One model of the file, as far as it is known without loading it.

    Attributes:
        name: Its name.
        weights_bytes: Weights and buffers; `None` when only loading would tell.
        size_from: Where that comes from: ``headers``, ``size`` or ``unknown``.
        workspace_bytes: What it needs beside them while it runs.
        pin: The tier it is never given up from, ``"vram"`` or ``"ram"``; `None` for neither.
        problem: Why its size could not be read; empty when it could.
        priority: Its rank; lower ranks give up first.
    """

    name: str
    weights_bytes: int | None
    size_from: str
    workspace_bytes: int = 0
    pin: str | None = None
    problem: str = ""
    priority: int = 0

    @property
    def running_bytes(self) -> int:
        """What it needs to run: weights and workspace."""
        return (self.weights_bytes or 0) + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Switch:
    """Bringing one model up while the others were used before it.

    Attributes:
        to: The model.
        incoming_bytes: What must cross the link.
        gives_up: Who gives up how many bytes for it, first to go first.
        refused: Why it cannot come up at all; empty when it can.
    """

    to: str
    incoming_bytes: int
    gives_up: tuple[tuple[str, int], ...] = ()
    refused: str = ""


def together(models: Sequence[PlannedModel], budget_bytes: int) -> tuple[tuple[str, ...], ...]:
    """The largest sets of models that can all run at once, in file order; none is part of another.

    With many models only the set that file order fills first is given: all sets would be too many to read.
    """
    known = [model for model in models if model.weights_bytes is not None and model.running_bytes <= budget_bytes]
    if len(known) > _MOST_MODELS_FOR_ALL_SETS:
        return (_first_fit(known, budget_bytes),)
    found: list[tuple[PlannedModel, ...]] = []
    for size in range(len(known), 0, -1):
        for group in combinations(known, size):
            fits = sum(model.running_bytes for model in group) <= budget_bytes
            if fits and not any(set(group) <= set(larger) for larger in found):
                found.append(group)
    return tuple(tuple(model.name for model in group) for group in found)


def _first_fit(models: Sequence[PlannedModel], budget_bytes: int) -> tuple[str, ...]:
    names, used_bytes = [], 0
    for model in models:
        if used_bytes + model.running_bytes <= budget_bytes:
            names.append(model.name)
            used_bytes += model.running_bytes
    return tuple(names)


def switches(
    models: Sequence[PlannedModel], budget_bytes: int, top_tier: str = "vram", segment_bytes: int = SEGMENT_BYTES
) -> tuple[Switch, ...]:
    """What each switch costs once every model has been used before, one switch per model of known size.

    Args:
        models: In the order they are asked for.
        budget_bytes: Of the tier they run on.
        top_tier: That tier. ``pin: vram`` means the top one, whichever that is.
        segment_bytes: The unit in which a model gives up room.
    """
    known = [model for model in models if model.weights_bytes is not None]
    tier = TopTier(budget_bytes, segment_bytes, {model.name: model.priority for model in known})
    for model in known:
        if model.pin in {"vram", top_tier}:
            tier.pinned.add(model.name)
            tier.resident[model.name] = model.weights_bytes or 0
    second_round: list[Switch] = []
    for _ in range(2):
        second_round = [tier.bring_up(model) for model in known]
    return tuple(second_round)


@dataclass(slots=True)
class TopTier:
    """What the top tier holds while the forecast runs.

    Attributes:
        budget_bytes: Never exceeded by what is resident and the workspace of the model that runs.
        segment_bytes: The unit in which a model gives up room.
        priorities: Model -> rank; lower ranks give up first.
        resident: Model -> bytes, least recently used first.
        pinned: Who never gives up.
    """

    budget_bytes: int
    segment_bytes: int
    priorities: Mapping[str, int]
    resident: dict[str, int] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)

    def bring_up(self, model: PlannedModel) -> Switch:
        """Make room for one model and bring it up; a refusal changes nothing."""
        weights_bytes = model.weights_bytes or 0
        incoming_bytes = weights_bytes - self.resident.get(model.name, 0)
        others_bytes = sum(size for name, size in self.resident.items() if name != model.name)
        short_bytes = others_bytes + model.running_bytes - self.budget_bytes
        gives_up = tuple(self._victims(model.name, short_bytes))
        if short_bytes > sum(size for _, size in gives_up):
            return Switch(model.name, incoming_bytes, refused=self._refusal(model))
        for name, size in gives_up:
            self.resident[name] -= size
            if not self.resident[name]:
                del self.resident[name]
        self.resident.pop(model.name, None)
        self.resident[model.name] = weights_bytes
        return Switch(model.name, incoming_bytes, gives_up)

    def _victims(self, to: str, short_bytes: int) -> Iterator[tuple[str, int]]:
        # Sorting is stable: within one priority the order stays that of use.
        for name in sorted(self.resident, key=lambda name: self.priorities.get(name, 0)):
            if short_bytes <= 0:
                return
            if name != to and name not in self.pinned:
                whole_segments_bytes = -(-short_bytes // self.segment_bytes) * self.segment_bytes
                given_bytes = min(self.resident[name], whole_segments_bytes)
                short_bytes -= given_bytes
                yield name, given_bytes

    def _refusal(self, model: PlannedModel) -> str:
        if model.running_bytes > self.budget_bytes:
            return "larger than the whole budget"
        blockers = ", ".join(sorted(name for name in self.resident if name in self.pinned and name != model.name))
        return f"does not fit beside what is pinned: {blockers}"

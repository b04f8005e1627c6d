"""Give the tensors of a materialized model back to the groups of diffusers that carried them.

A group knows its tensors as objects and replaces their memory. So each object comes back to its place, with its data
where the group expects it between two forwards: in its file, or in RAM. A group with changed weights stays in RAM from
then on, because diffusers never writes a file twice. Its other weights stay there with them. Should diffusers apply
group offloading anew (it does when adapters are loaded), it reads the files again, without the changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from modelcache.dataplane.files.reading import read_tensor
from modelcache.dataplane.files.weight_files import FileBytes, FileProblemError, Headers
from modelcache.dataplane.materialize import diffusers_state
from modelcache.dataplane.materialize.diffusers_state import Carried, LeftHooks
from modelcache.dataplane.materialize.journal import Entry, Memory, Swap
from modelcache.dataplane.materialize.slots import Slot, is_wrapper
from modelcache.dataplane.materialize.ties import has_same_bits
from modelcache.errors import MaterializeError


@dataclass(frozen=True, slots=True)
class CarriedSlot:
    """One place of the model whose tensor a group carried. `was` has shape and dtype of that time, and no data."""

    slot: Slot
    carried: Carried
    was: torch.Tensor


@dataclass(frozen=True, slots=True)
class TakenGroups:
    """The group offloading that a model had.

    Attributes:
        places: Every place with a carried tensor, by group.
        hooks: What was left on the modules.
    """

    places: Mapping[int, Sequence[CarriedSlot]] = field(default_factory=dict)
    hooks: Sequence[LeftHooks] = ()


def take_groups(
    carried: Iterable[tuple[Slot, torch.Tensor, Sequence[Carried]]], modules: Iterable[torch.nn.Module]
) -> TakenGroups:
    """Remember who carried what, before the hooks are taken off.

    Args:
        carried: Slots, what they hold, and who carries that.
        modules: Every module.
    """
    places: dict[int, list[CarriedSlot]] = {}
    for slot, tensor, carriers in carried:
        for one in carriers:
            was = tensor if is_wrapper(tensor) else tensor.detach().to("meta")
            places.setdefault(id(one.group), []).append(CarriedSlot(slot, one, was))
    hooks = [left for module in modules if (left := diffusers_state.left_hooks(module)) is not None]
    return TakenGroups(places, hooks)


def give_back(taken: TakenGroups, on_modified: str) -> Iterator[Swap]:
    """The swaps that bring every tensor home to its group.

    Args:
        taken: What was remembered.
        on_modified: As for `restore_dispatch`.

    Raises:
        MaterializeError: Weights were changed and may not be, or the groups cannot take them; nothing was changed.
    """
    if not all(left.are_unchanged for left in taken.hooks):
        raise MaterializeError(
            (), "cannot restore the dispatch: diffusers hooks were added or removed since; undo that first"
        )
    headers = Headers()
    if on_modified == "discard":
        changed: dict[int, list[CarriedSlot]] = {}
        for place in (one for places in taken.places.values() for one in places if one.carried.path):
            _find(place, headers)
    else:
        changed = {key: [one for one in places if _is_changed(one, headers)] for key, places in taken.places.items()}
    names = tuple(dict.fromkeys(one.slot.names[0] for places in changed.values() for one in places))
    if names and on_modified == "error":
        raise MaterializeError(names, "the model was written to while it was materialized; restore it with 'write'")
    as_they_are = _with_their_ties(taken, {key for key, places in changed.items() if places})
    homes = _Homes()
    for key, places in taken.places.items():
        yield from homes.as_it_is(places) if key in as_they_are else homes.as_it_was(places)


def _with_their_ties(taken: TakenGroups, groups: set[int]) -> set[int]:
    """These groups, and all that share a tensor with one of them: a tied tensor cannot be both in RAM and in a file."""
    while True:
        tensors = {id(one.carried.tensor) for key in groups for one in taken.places[key]}
        tied = {k for k, places in taken.places.items() if any(id(one.carried.tensor) in tensors for one in places)}
        if tied <= groups:
            return groups
        groups = groups | tied


def _now(place: CarriedSlot) -> torch.Tensor:
    now = place.slot.table.get(place.slot.key)
    if now is None:
        raise MaterializeError(place.slot.names[:1], "cannot restore the dispatch: this tensor was removed since")
    carried = place.carried
    is_other = is_wrapper(now) and now is not carried.tensor
    if is_other and diffusers_state.knows_by_object(carried.group, carried.tensor):
        # The outer tensor has no memory to point elsewhere, so the object that the group knows cannot follow.
        raise MaterializeError(
            place.slot.names[:1],
            "cannot restore the dispatch: this quantized tensor was replaced, and diffusers knows it by its object",
        )
    return now


def _is_changed(place: CarriedSlot, headers: Headers) -> bool:
    """Whether the model has another tensor than the one that its group would bring."""
    now, carried = _now(place), place.carried
    if carried.path:
        return (now.shape, now.dtype) != (place.was.shape, place.was.dtype) or not has_same_bits(
            _stored(place, headers).to(now.dtype), now
        )
    copy = diffusers_state.copy_of(carried.group, carried.tensor)
    if copy is None or is_wrapper(now):
        return False  # what the tensor holds is all there is
    return not has_same_bits(copy, now)


def _stored(place: CarriedSlot, headers: Headers) -> torch.Tensor:
    try:
        return read_tensor(_find(place, headers))
    except FileProblemError as problem:
        raise _lost(place, problem) from problem


def _find(place: CarriedSlot, headers: Headers) -> FileBytes:
    try:
        return headers.find(place.carried.path, place.carried.key, None)
    except FileProblemError as problem:
        raise _lost(place, problem) from problem


def _lost(place: CarriedSlot, problem: FileProblemError) -> MaterializeError:
    return MaterializeError(place.slot.names[:1], f"cannot restore the dispatch: {problem}")


class _Homes:
    """Points the objects that groups know at the memory that they shall have; a tied one once."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    def as_it_was(self, places: Sequence[CarriedSlot]) -> Iterator[Swap]:
        """With the stored data, or with what the model has where nothing is stored."""
        for place in places:
            now, carried = _now(place), place.carried
            home = diffusers_state.home_of(carried.group)
            if is_wrapper(now):
                continue  # the group's next forward brings it home by itself
            if carried.path:
                # No data, just as diffusers leaves it.
                data = torch.empty_like(place.was, device=home)
            else:
                copy = diffusers_state.copy_of(carried.group, carried.tensor)
                data = now.detach().to(home) if copy is None else copy
            yield from self._bring(place, now, data)

    def as_it_is(self, places: Sequence[CarriedSlot]) -> Iterator[Swap]:
        """With the model's data, which the group keeps in RAM from now on."""
        group = places[0].carried.group
        copies: dict[torch.Tensor, torch.Tensor] = {}
        for place in places:
            now, tensor = _now(place), place.carried.tensor
            if is_wrapper(now):
                continue
            data = now.detach().to(diffusers_state.home_of(group))
            if diffusers_state.has_stream(group):
                data = copies[tensor] = copies[tensor] if tensor in copies else diffusers_state.for_stream(group, data)
            yield from self._bring(place, now, data)
        yield from diffusers_state.kept_in_ram(group)
        yield from diffusers_state.with_copies(group, copies)

    def _bring(self, place: CarriedSlot, now: torch.Tensor, data: torch.Tensor) -> Iterator[Swap]:
        slot, tensor = place.slot, place.carried.tensor
        if now is not tensor:
            yield Entry(slot.table, slot.key, now, tensor)
        if id(tensor) in self._memory:
            return
        self._memory[id(tensor)] = data
        is_there = now is tensor and data.device == tensor.device and data.data_ptr() == tensor.data_ptr()
        if not is_there:
            grad = tensor.grad
            yield Memory(tensor, tensor.data, data, grad, None if grad is None else grad.to(data.device))

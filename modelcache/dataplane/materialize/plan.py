"""What materializing a model would do: for every tensor where its data is, and what is missing. Nothing is written.

Headers and sizes of files are looked at, so that a file that cannot give its tensor is found before any byte is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from modelcache.dataplane.files.weight_files import FileBytes, FileProblemError, Headers, find_dat, index_of
from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.accelerate_state import (
    Kept,
    KeptElsewhere,
    KeptInDat,
    KeptInSafetensors,
    KeptTensor,
    Offload,
)
from modelcache.dataplane.materialize.diffusers_state import Carried, Groups
from modelcache.dataplane.materialize.rewrap import bitsandbytes_problem, is_packed
from modelcache.dataplane.materialize.slots import Places, Slot, inner_tensors, is_wrapper, join

Found = FileBytes | KeptTensor | KeptElsewhere


@dataclass(slots=True, eq=False)
class Unit:
    """One tensor that the model will have: all slots that share it, what they hold now, and where its data is.

    Attributes:
        tensor: The live tensor, or the placeholder on ``meta``.
        kept: How the dispatch remembers the data; `None` for a live tensor.
        found: Where the data is; `None` for a live tensor.
        weights: The mapping that knew it.
        key: The key of the data in `weights`.
        carriers: The groups of diffusers that carry this very object, which therefore stays the model's.
    """

    slots: list[Slot]
    tensor: torch.Tensor
    kept: dict[Slot, Kept] = field(default_factory=dict)
    found: Found | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    carriers: tuple[Carried, ...] = ()

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.slots[0].names[0]

    @property
    def is_live(self) -> bool:
        """Whether the model holds the data already."""
        return self.found is None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two units must have in common to become one."""
        shape = tuple(self.tensor.shape)
        slot = self.slots[0]
        return slot.is_parameter, shape, self.tensor.dtype, self.tensor.requires_grad, type(self.tensor)


@dataclass(slots=True)
class Plan:
    """Everything found out.

    Attributes:
        places: The model as it was walked.
        loads: Units to make real.
        live: Units that are real already.
        missing: Names of placeholders with no data anywhere.
        problems: Names of placeholders whose data cannot be used, and why.
        trusts_ties: False after an old accelerate mixed up its record of ties.
    """

    places: Places
    loads: list[Unit] = field(default_factory=list)
    live: list[Unit] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    trusts_ties: bool = True

    def units(self) -> list[Unit]:
        """All of them, in the order of the model's slots."""
        order = {slot: position for position, slot in enumerate(self.places.slots)}
        return sorted([*self.loads, *self.live], key=lambda unit: order[unit.slots[0]])


@dataclass(slots=True)
class _Base:
    """A mapping of a dispatch, and the paths of the modules that were dispatched with it, each with its dot."""

    weights: Mapping[str, Any]
    roots: set[str] = field(default_factory=set)


def make_plan(places: Places, extra: Sequence[Mapping[str, Any]] = ()) -> Plan:
    """Find the data of every placeholder.

    Args:
        places: The model.
        extra: Further mappings to look in, by full name.
    """
    offloads = {module: offloads for module in places.modules if (offloads := state.offloads_of(module))}
    owners = _owners(offloads)
    finder = _Finder(owners, _bases(places, offloads), extra)
    confused = any(state.has_confused_ties(offload) for owned in owners.values() for offload, _ in owned)
    plan = Plan(places, trusts_ties=not confused)
    headers = Headers()
    groups = Groups(places.modules)
    for unit in _units(places, owners, confused=confused):
        slot = unit.slots[0]
        unit.carriers = groups.carriers(unit.tensor)
        if unit.carriers:
            _plan_carried(plan, unit, groups, headers)
            continue
        if unit.tensor.is_meta or (confused and slot.is_parameter and slot.module in owners):
            finder.find(unit)
        if is_lazy(unit.tensor) or not unit.kept:
            if unit.tensor.is_meta:
                plan.missing += [slot.names[0] for slot in unit.slots]
            else:
                plan.live.append(unit)
            continue
        try:
            unit.found = _locate(next(iter(unit.kept.values())), headers)
            _check(unit, unit.found)
            plan.loads.append(unit)
        except FileProblemError as problem:
            try:
                # What the dispatch knows is of no use. The caller may have said where else the data is.
                if not finder.find_elsewhere(unit):
                    raise
                unit.found = _locate(next(iter(unit.kept.values())), headers)
                _check(unit, unit.found)
                plan.loads.append(unit)
            except FileProblemError:
                plan.problems[unit.name] = str(problem)
    plan.loads = _one_per_source(plan.loads)
    return plan


def _plan_carried(plan: Plan, unit: Unit, groups: Groups, headers: Headers) -> None:
    """A carried tensor is not on meta: only its group knows whether it holds the data or what was there before."""
    try:
        unit.found = groups.locate(unit.tensor, headers)
        (plan.live if unit.found is None else plan.loads).append(unit)
    except FileProblemError as problem:
        plan.problems[unit.name] = str(problem)


_Offloads = Mapping[torch.nn.Module, Sequence[Offload]]


def _owners(offloads: _Offloads) -> dict[torch.nn.Module, list[tuple[Offload, str]]]:
    """For each module the hooks that keep its weights, with the module's path below the hook's module."""
    owners: dict[torch.nn.Module, list[tuple[Offload, str]]] = {}
    for module, own in offloads.items():
        for offload in own:
            covered = module.named_modules() if offload.covers_subtree else [("", module)]
            for path, child in covered:
                owners.setdefault(child, []).append((offload, path))
    return owners


def _bases(places: Places, offloads: _Offloads) -> list[_Base]:
    bases: dict[int, _Base] = {}
    for module, own in offloads.items():
        for offload in own:
            weights, prefix = state.base_of(offload.weights)
            base = bases.setdefault(id(weights), _Base(weights))
            # The prefix is the module's path at dispatch: what stands before it now is where the dispatch began.
            # Hooks that moved to another module since do not fit and tell nothing.
            for path in (join(path.plain, "") for path in places.modules[module]):
                root = path[: len(path) - len(prefix)]
                if path == root + prefix and (not root or root.endswith(".")):
                    base.roots.add(root)
    return list(bases.values())


def _units(places: Places, owners: Mapping[torch.nn.Module, object], *, confused: bool) -> Iterable[Unit]:
    """Slots that hold the same object are one unit."""
    units: dict[object, Unit] = {}
    for slot in places.slots:
        # A confused dispatch hands one object to weights that have nothing to do with each other.
        apart = confused and (slot.tensor.is_meta or slot.module in owners)
        key: object = slot if apart else id(slot.tensor)
        if key in units:
            units[key].slots.append(slot)
        else:
            units[key] = Unit([slot], slot.tensor)
    return units.values()


@dataclass(slots=True)
class _Finder:
    owners: Mapping[torch.nn.Module, list[tuple[Offload, str]]]
    bases: Sequence[_Base]
    extra: Sequence[Mapping[str, Any]]

    def find(self, unit: Unit) -> None:
        """Fill in how the dispatch remembers the data of each slot; leave nothing when it does not."""
        for slot in unit.slots:
            for weights, key in self._candidates(slot):
                kept = state.find_kept(weights, key)
                if kept is None:
                    continue
                if not unit.kept:
                    unit.weights, unit.key = weights, key
                unit.kept[slot] = kept
                break

    def find_elsewhere(self, unit: Unit) -> bool:
        """Look only where the caller says; whether the data of each slot is there."""
        unit.kept.clear()
        for slot in unit.slots:
            for weights, name in (
                (weights, name) for weights in self.extra for name in (*slot.names, *slot.plain_names)
            ):
                kept = state.find_kept(weights, name)
                if kept is not None:
                    unit.weights, unit.key = weights, name
                    unit.kept[slot] = kept
                    break
        return len(unit.kept) == len(unit.slots)

    def _candidates(self, slot: Slot) -> Iterable[tuple[Mapping[str, Any], str]]:
        # Only the hook knows its weights for sure: a module may have been renamed below it since.
        for offload, path in self.owners.get(slot.module, ()):
            yield offload.weights, join(path, slot.key)
        for base in self.bases:
            for root in sorted(base.roots) or [""]:
                for name in slot.plain_names:
                    if name.startswith(root):
                        yield base.weights, name[len(root) :]
        for weights in self.extra:
            for name in (*slot.names, *slot.plain_names):
                yield weights, name


def _locate(kept: Kept, headers: Headers) -> Found:
    match kept:
        case KeptInSafetensors(path=path, tensor_name=name, dtype=dtype):
            return headers.find(path, name, dtype)
        case KeptInDat(path=path, dtype=dtype, shape=shape):
            return find_dat(path, dtype, shape)
        case _:
            return kept


def _check(unit: Unit, found: Found) -> None:
    """Refuse data that cannot be what the placeholder stands for."""
    placeholder = unit.tensor
    problem = bitsandbytes_problem(placeholder, unit.weights, unit.key)
    if problem:
        raise FileProblemError(problem)
    if is_packed(placeholder):
        return  # its shape is that of the packed bytes, which the placeholder may not have
    plain = isinstance(found, FileBytes) or (isinstance(found, KeptTensor) and not is_wrapper(found.tensor))
    if is_wrapper(placeholder) and plain:
        raise FileProblemError(
            f"the stored data is a plain tensor, but the placeholder is a {type(placeholder).__name__}: it was stored "
            "before it was quantized"
        )
    shape = None
    if isinstance(found, FileBytes):
        shape = found.shape
    elif isinstance(found, KeptTensor):
        shape = tuple(found.tensor.shape)
    if shape is not None and placeholder.is_meta and shape != tuple(placeholder.shape):
        raise FileProblemError(f"the stored data has shape {shape}, the model wants {tuple(placeholder.shape)}")


def _one_per_source(loads: Sequence[Unit]) -> list[Unit]:
    """Unite placeholders whose data is the same bytes at the same place: they were one tensor."""
    first: dict[object, Unit] = {}
    united: list[Unit] = []
    for unit in loads:
        source = _identity(unit)
        twin = first.setdefault((source, unit.kind), unit) if source is not None else unit
        if twin is unit:
            united.append(unit)
        else:
            twin.slots += unit.slots
            twin.kept |= unit.kept
    return united


def _identity(unit: Unit) -> object | None:
    if unit.carriers:
        return None  # an object of its own, and it stays that
    match unit.found:
        case FileBytes(path=path, offset=offset, size_bytes=size, cast=cast) if size:
            return path, offset, cast
        case KeptTensor(tensor=tensor):
            # A state dict detaches: of a wrapper it makes another object around the same inner tensors.
            inner = [_memory(one) for one in inner_tensors(tensor)]
            return tuple(inner) if any(inner) else None
    return None


def _memory(tensor: torch.Tensor) -> object | None:
    if not tensor.numel() or tensor.layout != torch.strided:
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device)


def open_extra(extra: Any) -> list[Mapping[str, Any]]:
    """Turn what a caller gives as `extra_sources` into mappings.

    Args:
        extra: A folder of ``.dat`` or safetensors files, a mapping or loader, or a list of these.

    Raises:
        TypeError: It is none of these.
        ValueError: A folder holds nothing that we can read.
    """
    if extra is None:
        return []
    if isinstance(extra, Mapping):
        return [extra]
    if isinstance(extra, str | Path):
        return [_open_folder(Path(extra))]
    if isinstance(extra, Iterable):
        return [weights for one in extra for weights in open_extra(one)]
    raise TypeError(f"extra_sources must be folders, mappings or a list of them, not {type(extra).__name__}")


def _open_folder(folder: Path) -> Mapping[str, Any]:
    if (folder / "index.json").is_file():
        return state.open_folder(folder)
    try:
        index = index_of(folder, Headers())
    except FileProblemError as problem:
        raise ValueError(f"extra_sources: {problem}") from problem
    if not index:
        raise ValueError(f"extra_sources: {folder} has neither an index.json nor a safetensors file")
    return state.OpenedFolder(index=index)

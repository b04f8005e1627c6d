"""Models that their loader dispatched: taken over whole, without a byte read, and able to run from their dispatch.

What the dispatch keeps in files stays on ``meta`` until its part is staged, and is read into the part then; what it
keeps in RAM moves into the part, and the dispatch is pointed at it there. So RAM holds one copy.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from modelcache.dataplane.device.protocol import Device
from modelcache.dataplane.dispatch.form import Dispatch, Mapped
from modelcache.dataplane.dispatch.source import DispatchSource
from modelcache.dataplane.dispatch.taken_over import TakenOver
from modelcache.dataplane.files.weight_files import FileBytes
from modelcache.dataplane.loading.source import Source
from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.entry_points import materialize_meta_tensors, of_pipeline, planned
from modelcache.dataplane.materialize.journal import Entry, Swap, swap_all
from modelcache.dataplane.materialize.plan import Plan, Unit
from modelcache.dataplane.materialize.record import marked
from modelcache.dataplane.materialize.rewrap import as_buffer, as_parameter, is_bitsandbytes
from modelcache.dataplane.materialize.slots import Slot, is_wrapper, size_bytes
from modelcache.dataplane.materialize.stage import Staged, fetch, stride_for
from modelcache.dataplane.materialize.ties import collect_claims, unite

log = logging.getLogger("modelcache.dataplane")
_CPU = torch.device("cpu")


@dataclass(slots=True)
class _Unread(Staged):
    """Tensors whose bytes are still in files; those that must be compared are read for that alone."""

    def content(self, unit: Unit) -> torch.Tensor:
        tensor = self.tensors[unit]
        return fetch(next(iter(unit.kept.values()))).to(tensor.dtype) if tensor.is_meta else tensor


def take_over(model: object, rest: Source | None, device: Device, *, name: str) -> TakenOver:
    """Take a dispatched model's hooks off and find out where its bytes are.

    Args:
        model: What the loader made.
        rest: Its source, for what the dispatch has in no file.
        device: On which the model will run.
        name: The model's, for errors.

    Raises:
        MaterializeError: A tensor has no data anywhere. The model is as it was.
    """
    plan = planned(model, [])
    if not all(_is_plain(unit) for unit in plan.loads):
        # Quantized weights and foreign mappings are rebuilt by asking their libraries, which read what they read.
        materialize_meta_tensors(model, "cpu", keep_dispatch=False)
        return TakenOver(rest, None, "its weights are quantized, or in a mapping of another library")
    staged = _Unread(tensors={unit: unit.tensor for unit in plan.live})
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        staged.tensors |= {unit: _unread(unit) for unit in plan.loads}
    stands_for = unite(collect_claims(plan, None), staged)
    tensors = {unit: staged.tensors[stands_for.get(unit, unit)] for unit in plan.units()}
    swaps = _swaps(model, plan, tensors, device)
    dispatch, reason = _dispatch(plan, tensors, swaps, device)
    if reason:
        log.info("model=%s runs only whole: %s", name, reason)
    ties = [swap for module in plan.places.modules for swap in state.without_ties(module)] if dispatch else []
    done = [*ties, *swaps]
    swap_all(done, check=lambda: None)
    return TakenOver(_source(plan, tensors, rest, name), dispatch, reason, done)


def _is_plain(unit: Unit) -> bool:
    """Whether its bytes are all there is to it."""
    tensors = [unit.tensor, *([unit.found.tensor] if isinstance(unit.found, state.KeptTensor) else [])]
    if unit.carriers or isinstance(unit.found, state.KeptElsewhere):
        return False
    return not any(
        is_wrapper(tensor) or is_bitsandbytes(tensor) or is_lazy(tensor) or tensor.layout != torch.strided
        for tensor in tensors
    )


def _unread(unit: Unit) -> torch.Tensor:
    """The tensor that the model will have: on ``meta`` for bytes in a file, over the dispatch's memory otherwise."""
    if isinstance(unit.found, state.KeptTensor):
        kept, dtype = unit.found.tensor.detach(), unit.tensor.dtype
        is_usable = kept.device == _CPU and kept.dtype == dtype and not kept.is_inference()
        value = kept if is_usable else kept.to("cpu", dtype, copy=True)
    else:
        assert isinstance(unit.found, FileBytes)
        shape, dtype = unit.found.shape, unit.tensor.dtype
        value = torch.empty_strided(shape, stride_for(unit.tensor, shape), dtype=dtype, device="meta")
    return as_parameter(value, unit.tensor) if unit.slots[0].is_parameter else as_buffer(value, unit.tensor)


def _swaps(model: object, plan: Plan, tensors: Mapping[Unit, torch.Tensor], device: Device) -> list[Swap]:
    swaps: list[Swap] = [
        Entry(slot.table, slot.key, slot.tensor, tensor)
        for unit, tensor in tensors.items()
        for slot in unit.slots
        if slot.tensor is not tensor
    ]
    swaps += [swap for module in plan.places.modules for swap in state.unhooking(module)]
    return [*swaps, *of_pipeline(model, device.torch_device)]


def _source(plan: Plan, tensors: Mapping[Unit, torch.Tensor], rest: Source | None, name: str) -> Source | None:
    unread = [unit for unit in plan.loads if tensors[unit].is_meta]
    places = {known: unit.found for unit in unread for known in _names(unit.slots) if isinstance(unit.found, FileBytes)}
    marks = {known: mark for unit in unread for _, mark in marked(unit) for known in _names(unit.slots)}
    return DispatchSource(places, marks, rest, model_name=name) if places or rest else None


def _names(slots: Iterable[Slot]) -> Iterator[str]:
    for slot in slots:
        yield from slot.names
        yield from slot.plain_names


# --- the other form ---------------------------------------------------------------------------------------------------


def _dispatch(
    plan: Plan, tensors: Mapping[Unit, torch.Tensor], swaps: Sequence[Swap], device: Device
) -> tuple[Dispatch | None, str]:
    """The form with hooks, or why there is none that could run on `device`, in words."""
    if not device.holds_copies or not plan.loads:
        return None, ""
    top = device.torch_device
    elsewhere = {each for module in plan.places.modules for each in state.devices_to_run_on(module)} - {top}
    away = [unit.name for unit in plan.live if unit.tensor.numel() and unit.tensor.device != top]
    if elsewhere or away:
        places = ", ".join(sorted(map(str, elsewhere))) or "the CPU"
        return None, f"its dispatch computes on {places} too, and the cache runs models on {top}"
    offloads = {module: state.offloads_of(module) for module in plan.places.modules}
    sizes: dict[torch.nn.Module, int] = {}
    mapped: list[Mapped] = []
    for unit in plan.loads:
        for slot in unit.slots:
            kept = unit.kept.get(slot)
            place = None if kept is None else state.place_for_writing(kept)
            if place is None:
                return None, f"the hooks' weights for {slot.names[0]!r} cannot be exchanged"
            offload, local = _looked_up(slot, offloads[slot.module], place)
            mapped.append(Mapped(slot, tensors[unit], *place, offload, local))
            charge = device.charge_bytes(size_bytes(unit.tensor)) if unit.tensor.numel() else 0
            sizes[slot.module] = sizes.get(slot.module, 0) + charge
    brought = _brought_in(offloads)
    orphan = next((slot.names[0] for unit in plan.loads for slot in unit.slots if slot.module not in brought), None)
    if orphan is not None:
        return None, f"no hook brings {orphan!r} in"
    live = {id(unit.tensor): unit.tensor for unit in plan.live}
    offloaded = {id(tensors[unit]): tensors[unit] for unit in plan.loads if id(tensors[unit]) not in live}
    if not any(tensor.numel() for tensor in live.values()):
        # Something must tell a model that is parked from one that runs: what it has on the device.
        offloaded.pop(min(offloaded, key=lambda key: size_bytes(offloaded[key]) or sys.maxsize))
    named = {id(vars(module)): paths[0].shown for module, paths in plan.places.modules.items()}
    forwards = [(named[id(swap.table)], swap) for swap in swaps if isinstance(swap, Entry) and swap.key == "forward"]
    return Dispatch(swaps, forwards, offloaded, mapped, _most_at_once(offloads, sizes)), ""


def _looked_up(
    slot: Slot, offloads: Sequence[state.Offload], place: tuple[Mapping[str, Any], str]
) -> tuple[state.Offload | None, str]:
    """The hook on the slot's own module that finds its weight in `place`, and under which name."""
    for offload in offloads:
        kept = state.find_kept(offload.weights, slot.key)
        if kept is not None and state.place_for_writing(kept) == place:
            return offload, slot.key
    return None, slot.key


def _brought_in(offloads: Mapping[torch.nn.Module, Sequence[state.Offload]]) -> set[torch.nn.Module]:
    """The modules whose weights some hook brings in for a forward."""
    brought: set[torch.nn.Module] = set()
    for module, kept in offloads.items():
        if kept:
            brought.update(module.modules() if any(each.covers_subtree for each in kept) else (module,))
    return brought


def _most_at_once(
    offloads: Mapping[torch.nn.Module, Sequence[state.Offload]], sizes: Mapping[torch.nn.Module, int]
) -> int:
    """The most that any forward has brought in at a time: a module's own, and one child's after the other."""
    known: dict[torch.nn.Module, int] = {}

    def at_once(module: torch.nn.Module) -> int:
        if module not in known:
            if any(each.covers_subtree for each in offloads.get(module, ())):
                known[module] = sum(sizes.get(each, 0) for each in module.modules())
            else:
                known[module] = sizes.get(module, 0) + max(map(at_once, module.children()), default=0)
        return known[module]

    return max(map(at_once, offloads), default=0)

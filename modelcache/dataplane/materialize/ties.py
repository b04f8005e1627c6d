"""Which placeholders were one tensor before the dispatch.

A dispatch forgets which weights were the same object. Evidence is collected from whoever recorded it, and every claim
is checked against the data: equal content without a claim is no tie (two fresh norms are equal), and a claim whose
contents differ is no tie either (transformers lists ties that a checkpoint broke).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.plan import Plan, Unit
from modelcache.dataplane.materialize.record import recorded_ties
from modelcache.dataplane.materialize.slots import Slot, is_wrapper, join
from modelcache.dataplane.materialize.stage import Staged
from modelcache.errors import MaterializeError


@dataclass(frozen=True, slots=True)
class Claim:
    """Units said to be one tensor.

    Attributes:
        groups_apart: The claim names members of one or more ties without saying which belong together.
        is_order: The caller said so: contents that differ are an error then, not a wrong claim.
    """

    units: tuple[Unit, ...]
    groups_apart: bool = False
    is_order: bool = False


TiedNames = Sequence[Sequence[str]] | Mapping[str, str]


def collect_claims(plan: Plan, tied_params: TiedNames | None) -> list[Claim]:
    """All evidence, the strongest first; with a warning when accelerate has mixed up its own.

    Args:
        plan: The model.
        tied_params: Groups of full names, or a mapping of names to names.

    Raises:
        TypeError: `tied_params` is a list of names and not of groups.
        ValueError: It names no tensor of the model.
    """
    unit_of = {slot: unit for unit in plan.units() for slot in unit.slots}
    slots = plan.places.slots_by_name()
    claims = [*_ordered(tied_params, slots, unit_of), *_recorded(plan, slots, unit_of), *_listed(plan, slots, unit_of)]
    if plan.trusts_ties:
        return [*claims, *_flagged(plan, slots, unit_of)]
    _warn_of_confusion(plan)
    return claims


def _warn_of_confusion(plan: Plan) -> None:
    names = [unit.name for unit in plan.loads if unit.slots[0].is_parameter]
    warnings.warn(
        f"accelerate 1.14 and older mix up {len(names)} weights of this model, such as {', '.join(names[:3])}, because "
        "tied ones are on disk: while it is dispatched, a forward can compute with wrong weights or fail. What is made "
        "whole has the right ones; with accelerate 1.15 the dispatch has too",
        stacklevel=4,
    )


def _ordered(tied_params: TiedNames | None, slots: Mapping[str, Slot], unit_of: Mapping[Slot, Unit]) -> Iterator[Claim]:
    groups = tied_params.items() if isinstance(tied_params, Mapping) else tied_params or ()
    for group in groups:
        if isinstance(group, str):
            raise TypeError(f"tied_params must be groups of names, such as [[{group!r}, ...]], not names")
        unknown = [name for name in group if name not in slots]
        if unknown:
            raise ValueError(f"tied_params: the model has no tensor {unknown[0]!r}")
        yield Claim(_unique(unit_of[slots[name]] for name in group if slots[name] in unit_of), is_order=True)


def _recorded(plan: Plan, slots: Mapping[str, Slot], unit_of: Mapping[Slot, Unit]) -> Iterator[Claim]:
    """What `modelcache.dispatch_model` saw before it let accelerate take the weights."""
    for tied in recorded_ties(plan.places, slots):
        yield Claim(_unique(unit_of[slot] for slot in tied if slot in unit_of))


def _listed(plan: Plan, slots: Mapping[str, Slot], unit_of: Mapping[Slot, Unit]) -> Iterator[Claim]:
    """What transformers lists on each of its models, by names below that model."""
    for module, paths in plan.places.modules.items():
        listed = vars(module).get("all_tied_weights_keys")
        if not isinstance(listed, dict):
            continue
        for pair in listed.items():
            pair_slots = [slots.get(join(paths[0].plain, str(name))) for name in pair]
            units = [unit_of[slot] for slot in pair_slots if slot is not None and slot in unit_of]
            if len(units) == 2:
                yield Claim(_unique(units))


def _flagged(plan: Plan, slots: Mapping[str, Slot], unit_of: Mapping[Slot, Unit]) -> Iterator[Claim]:
    """What accelerate flagged as tied when it took the weights away, per dispatch."""
    flagged: dict[int, list[Unit]] = {}
    memories: dict[int, Mapping[int, Mapping[object, torch.Tensor]]] = {}
    for module, paths in plan.places.modules.items():
        for offload in state.offloads_of(module):
            if offload.tied_memory is None:
                continue
            memories[id(offload.tied_memory)] = offload.tied_memory
            for name in sorted(offload.tied_names):
                slot = slots.get(join(paths[0].shown, name))
                if slot is not None and slot in unit_of:
                    flagged.setdefault(id(offload.tied_memory), []).append(unit_of[slot])
    for key, units in flagged.items():
        addresses = set(memories[key])
        copies = {id(copy) for copies in memories[key].values() for copy in copies.values()}
        # The other half of a tie may never have been offloaded. Its address alone proves nothing, because freed
        # addresses are used again; the comparison of contents decides.
        partners = [
            unit
            for unit in plan.live
            if unit.slots[0].is_parameter and (id(unit.tensor) in copies or _address(unit.tensor) in addresses)
        ]
        yield Claim(_unique([*partners, *units]), groups_apart=True)


def _address(tensor: torch.Tensor) -> int | None:
    if is_wrapper(tensor) or tensor.layout != torch.strided or torch.nn.parameter.is_lazy(tensor):
        return None
    return tensor.data_ptr() or None


def _unique(units: Iterable[Unit]) -> tuple[Unit, ...]:
    return tuple(dict.fromkeys(units))


def unite(claims: Iterable[Claim], staged: Staged) -> dict[Unit, Unit]:
    """For each unit that is really another one, which; a live tensor stands for the others.

    Raises:
        MaterializeError: The caller ordered a tie of tensors that differ.
    """
    stands_for: dict[Unit, Unit] = {}
    sizes: dict[Unit, int] = {}

    def head(unit: Unit) -> Unit:
        while unit in stands_for:
            unit = stands_for[unit]
        return unit

    for claim in claims:
        heads: list[Unit] = []
        for unit in sorted(dict.fromkeys(map(head, claim.units)), key=lambda unit: not unit.is_live):
            twin = next((other for other in heads if other is unit or _is_same(other, unit, staged)), None)
            if twin is None:
                if claim.is_order and heads:
                    raise MaterializeError(
                        (heads[0].name, unit.name), "tied_params says these are one tensor, but their data differs"
                    )
                heads.append(unit)
            elif twin is not unit and not (claim.groups_apart and (sizes.get(twin, 1) > 1 and sizes.get(unit, 1) > 1)):
                # Better evidence made two ties of what this one lumps together.
                stands_for[unit] = twin
                sizes[twin] = sizes.get(twin, 1) + sizes.get(unit, 1)
    return {unit: head(unit) for unit in stands_for}


def _is_same(one: Unit, other: Unit, staged: Staged) -> bool:
    return one.kind == other.kind and has_same_bits(staged.content(one), staged.content(other))


def has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two plain tensors hold the same bytes in the same shape and dtype; a NaN equals itself here."""
    if one.shape != other.shape or one.dtype != other.dtype or is_wrapper(one) or is_wrapper(other):
        return False
    with torch.inference_mode(False), torch.no_grad():
        flat = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
        return torch.equal(*flat)

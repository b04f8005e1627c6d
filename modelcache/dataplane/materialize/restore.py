"""Put a materialized model back into the dispatch it came with: the same placeholders, the same hooks.

The dispatch is not made anew: accelerate would keep a stale index, and the arguments it was called with are not
recorded. What was taken off is put back instead, by the same kind of swaps that took it off.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from modelcache.dataplane.files.weight_files import FileProblemError, Headers
from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.groups import TakenGroups, give_back, take_groups
from modelcache.dataplane.materialize.journal import ABSENT, ClassEntry, Entry, Memory, Swap, swap_all
from modelcache.dataplane.materialize.plan import Plan, Unit
from modelcache.dataplane.materialize.rewrap import as_buffer, as_parameter, is_bitsandbytes
from modelcache.dataplane.materialize.slots import Slot, find_places, is_wrapper
from modelcache.dataplane.materialize.stage import Staged, fetch, relocated
from modelcache.dataplane.materialize.ties import has_same_bits
from modelcache.errors import MaterializeError

OnModified = Literal["write", "error", "discard"]

# On the object itself and not in a table on the side: hooks and wrappers refer to the model, so a table would keep it
# alive for ever.
ATTRIBUTE = "_modelcache_dispatch"


@dataclass(frozen=True, slots=True)
class MadeReal:
    """One slot that held a placeholder."""

    slot: Slot
    placeholder: torch.Tensor
    kept: state.Kept | None
    tensor: torch.Tensor
    version: int | None


@dataclass(slots=True)
class Snapshot:
    """What a model was before it was materialized. A copy or a pickle of the model does not take it along.

    Attributes:
        hooks: The swaps that took accelerate's hooks and wrappers off.
        others: Further attributes that were changed with them.
        made_real: The slots that held placeholders.
        homes: Live tensors that were moved, and from where.
        modules: The modules there were.
        groups: The group offloading of diffusers.
    """

    hooks: Sequence[Swap]
    others: Sequence[Swap]
    made_real: Sequence[MadeReal] = ()
    homes: Sequence[tuple[Slot, torch.device]] = ()
    modules: frozenset[int] = field(default_factory=frozenset)
    groups: TakenGroups = field(default_factory=TakenGroups)

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return (type(None), ())


def take_snapshot(
    plan: Plan, staged: Staged, stands_for: Mapping[Unit, Unit], hooks: Sequence[Swap], others: Sequence[Swap]
) -> Snapshot:
    """Remember what `plan` found. The memory that live tensors had is not held: it was to become free.

    Args:
        plan: What was found.
        staged: What will be put in.
        stands_for: Units that turned out to be another one.
        hooks: The swaps of accelerate's hooks.
        others: The swaps of other attributes.
    """
    return Snapshot(
        hooks=hooks,
        others=[*others, *staged.swaps],
        made_real=[
            MadeReal(slot, slot.tensor, unit.kept.get(slot), tensor, _version(tensor))
            for unit in plan.loads
            if not unit.carriers
            for slot in unit.slots
            for tensor in (staged.tensors[stands_for.get(unit, unit)],)
        ],
        homes=[(slot, home) for unit, home in _moved(plan, staged) if not unit.carriers for slot in unit.slots],
        modules=frozenset(map(id, plan.places.modules)),
        groups=take_groups(
            ((slot, unit.tensor, unit.carriers) for unit in plan.units() for slot in unit.slots), plan.places.modules
        ),
    )


def _version(tensor: torch.Tensor) -> int | None:
    """How often the tensor was written to in place; nobody counts for one made in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _moved(plan: Plan, staged: Staged) -> Iterator[tuple[Unit, torch.device]]:
    for unit in plan.live:
        if unit in staged.memory:
            yield unit, staged.memory[unit].before.device
        elif staged.tensors[unit] is not unit.tensor:
            yield unit, unit.tensor.device


def put_back(
    snapshot: Snapshot, components: Mapping[str, torch.nn.Module], owner: dict[str, Any], on_modified: OnModified
) -> None:
    """Restore what the snapshot remembers.

    Args:
        snapshot: What to restore.
        components: The model's modules now, to warn about new ones.
        owner: The attributes that hold the snapshot, which is taken out.
        on_modified: What to do with weights that were written to meanwhile.

    Raises:
        MaterializeError: Weights were changed and may not be, or cannot be written back; or hooks were added since.
            Nothing was changed.
    """
    _refuse_changed_hooks(snapshot)
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        swaps: list[Swap] = list(_placeholders(snapshot, on_modified))
        swaps += _homewards(snapshot)
        swaps += give_back(snapshot.groups, on_modified)
    swaps += [_reversed(swap) for swap in reversed([*snapshot.hooks, *snapshot.others])]
    swaps.append(Entry(owner, ATTRIBUTE, snapshot, ABSENT))
    _warn_of_new_modules(snapshot, components)
    swap_all(swaps, check=lambda: None)


def _refuse_changed_hooks(snapshot: Snapshot) -> None:
    for swap in snapshot.hooks:
        match swap:
            case Entry(table=table, key=key, after=after):
                now = table.get(key, ABSENT)
            case ClassEntry(owner=owner, key=key, after=after):
                now = getattr(owner, key, ABSENT)
            case _:
                continue
        if now is not after:
            raise MaterializeError(
                (),
                f"cannot restore the dispatch: {key!r} of a module was set after it was materialized; undo that first",
            )


def _reversed(swap: Swap) -> Swap:
    match swap:
        case Entry(table=table, key=key, before=before):
            return Entry(table, key, table.get(key, ABSENT), before)
        case ClassEntry(owner=owner, key=key, before=before, after=after):
            return ClassEntry(owner, key, after, before)
        case _:
            raise AssertionError(f"a snapshot holds no {type(swap).__name__}")


def _placeholders(snapshot: Snapshot, on_modified: OnModified) -> Iterator[Swap]:
    headers = Headers()
    changed: list[MadeReal] = []
    for made in snapshot.made_real:
        now = made.slot.table.get(made.slot.key)
        if now is None:
            raise MaterializeError(made.slot.names[:1], "cannot restore the dispatch: this tensor was removed since")
        is_changed = on_modified != "discard" and _is_changed(made, now, headers, strict=on_modified == "error")
        if is_changed:
            changed.append(made)
        follows = is_changed and not is_wrapper(now) and not is_bitsandbytes(now)
        yield Entry(made.slot.table, made.slot.key, now, _placeholder_like(made, now) if follows else made.placeholder)
    if changed and on_modified == "error":
        names = tuple(made.slot.names[0] for made in changed)
        raise MaterializeError(names, "the model was written to while it was materialized; restore it with 'write'")
    for made in changed:
        yield _written_back(made)


def _placeholder_like(made: MadeReal, now: torch.Tensor) -> torch.Tensor:
    """The placeholder again, or one of the tensor's new shape, dtype or flag: those are what a forward obeys."""
    old = made.placeholder
    if old.is_meta and (old.shape, old.dtype, old.requires_grad) == (now.shape, now.dtype, now.requires_grad):
        return old
    meta = now.detach().to("meta")
    return as_parameter(meta, now) if made.slot.is_parameter else as_buffer(meta, now)


def _is_changed(made: MadeReal, now: torch.Tensor, headers: Headers, *, strict: bool) -> bool:
    """Whether the model's tensor and the one the dispatch keeps differ.

    Memory that both share cannot differ; `strict` asks whether it was written to.
    """
    if is_wrapper(now) or is_bitsandbytes(now):
        return now is not made.tensor or _version(now) != made.version
    if (now.shape, now.dtype) != (made.tensor.shape, made.placeholder.dtype):
        return True
    kept = made.kept
    if isinstance(kept, state.KeptTensor) and _is_same_memory(kept.table.get(kept.key), now):
        return strict and (now is not made.tensor or _version(now) != made.version)
    if kept is None:
        return _version(now) != made.version
    try:
        stored = fetch(kept, headers)
    except FileProblemError as problem:
        raise MaterializeError(made.slot.names[:1], f"cannot restore the dispatch: {problem}") from problem
    return not has_same_bits(stored.to(made.placeholder.dtype), now)


def _is_same_memory(kept: torch.Tensor | None, now: torch.Tensor) -> bool:
    return kept is not None and kept.device == now.device and kept.data_ptr() == now.data_ptr() and now.numel() > 0


def _written_back(made: MadeReal) -> Swap:
    now = made.slot.table[made.slot.key]
    place = None if made.kept is None else state.place_for_writing(made.kept)
    if now is None or place is None or is_wrapper(now) or is_bitsandbytes(now):
        raise MaterializeError(
            made.slot.names[:1],
            "this tensor was changed, and the dispatch has no place to keep the change; keep the model materialized, "
            "or restore it with 'discard'",
        )
    table, key = place
    return Entry(table, key, table.get(key, ABSENT), now.detach().to("cpu"))


def _homewards(snapshot: Snapshot) -> Iterator[Swap]:
    away: dict[torch.device, dict[int, torch.Tensor]] = {}
    for slot, home in snapshot.homes:
        now = slot.table.get(slot.key)
        if now is None or now.is_meta or now.device == home:
            continue
        if is_wrapper(now):
            moved = now.detach().to(home)
            yield Entry(slot.table, slot.key, now, as_parameter(moved, now) if slot.is_parameter else moved)
        else:
            away.setdefault(home, {})[id(now)] = now
    for home, tensors in away.items():
        for tensor, data in relocated([(tensor, tensor.detach()) for tensor in tensors.values()], home):
            grad = tensor.grad
            yield Memory(tensor, tensor.data, data, grad, None if grad is None else grad.to(home))


def _warn_of_new_modules(snapshot: Snapshot, components: Mapping[str, torch.nn.Module]) -> None:
    new = [
        paths[0].shown
        for module, paths in find_places(components).modules.items()
        if id(module) not in snapshot.modules and any(True for _ in module.parameters(recurse=False))
    ]
    if new:
        warnings.warn(
            f"{len(new)} modules with weights were added after the dispatch and stay as they are: {', '.join(new[:3])}",
            stacklevel=4,
        )

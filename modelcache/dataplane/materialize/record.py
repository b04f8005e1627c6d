"""What a model was before accelerate took its weights away: which tensors were one, and what went into files.

A dispatch forgets both. It remembers ties only in passing, and it never rewrites a folder that has an ``index.json``,
so that a model can silently run with the weights of another one. The record hangs on the very mapping that keeps the
weights: a deep copy of the model takes it along, it is found through the hooks wherever the model ends up, and it
is gone with the dispatch that it is about.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from accelerate.utils import OffloadedWeightsLoader

from modelcache.dataplane.files.weight_files import FileProblemError
from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.plan import Plan, Unit
from modelcache.dataplane.materialize.rewrap import is_bitsandbytes
from modelcache.dataplane.materialize.slots import Places, Slot, is_wrapper, join
from modelcache.dataplane.materialize.stage import Staged, fetch
from modelcache.errors import MaterializeError

_ATTRIBUTE = "_modelcache_record"
_NUM_WORKERS = 4  # checksums are computed at the speed of the memory with a few threads, and leave the others alone


@dataclass(frozen=True, slots=True)
class Mark:
    """What one tensor held: its shape, its dtype and a CRC-32 of its bytes in row-major order.

    It tells another model or an older version of this one; it is no defence against somebody who looks for a collision.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: int


@dataclass(frozen=True, slots=True)
class Record:
    """One model just before its dispatch.

    Attributes:
        ties: Groups of full names that were one tensor, or several over the very same memory.
        stored: What each tensor held that goes to the folder of the dispatch, by full name.
    """

    ties: tuple[tuple[str, ...], ...]
    stored: Mapping[str, Mark]

    def __deepcopy__(self, memo: object) -> Record:
        return self


def take_record(model: torch.nn.Module, names_for_disk: Sequence[str]) -> Record:
    """Look at a model that is about to be dispatched.

    Args:
        model: All of it is read that is about to be stored.
        names_for_disk: The names in its state dict that the dispatch will store in files. Those already on ``meta``
            are left out: what they should be, nobody knows.
    """
    tensors = model.state_dict()
    real = {name: tensors[name] for name in names_for_disk if _is_plain(tensors[name])}
    ties, stored = _ties(model), dict[str, Mark]()
    for start, record in _records_in(model.named_modules(remove_duplicate=False)):
        # Dispatched before: what is on meta by now was known then.
        ties += tuple(tuple(start + name for name in names) for names in record.ties)
        stored |= {start + name: mark for name, mark in record.stored.items()}
    with ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="modelcache-record") as pool:
        stored |= zip(real, pool.map(mark_of, real.values()), strict=True)
    return Record(tuple(dict.fromkeys(ties)), {name: stored[name] for name in names_for_disk if name in stored})


def _is_plain(tensor: object) -> TypeGuard[torch.Tensor]:
    """Whether the bytes of a tensor are all there is to it. A state dict may hold other things than tensors as well."""
    if not isinstance(tensor, torch.Tensor):
        return False
    return not (tensor.is_meta or is_wrapper(tensor) or is_bitsandbytes(tensor)) and tensor.layout == torch.strided


def _ties(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[object, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        groups.setdefault(_memory(tensor), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _memory(tensor: torch.Tensor) -> object:
    """What two tensors have in common when a write to one is a write to the other, all of it."""
    if not _is_plain(tensor) or not tensor.data_ptr():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def mark_of(tensor: torch.Tensor) -> Mark:
    """What a plain tensor holds."""
    with torch.inference_mode(False), torch.no_grad():
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        return Mark(tuple(tensor.shape), tensor.dtype, zlib.crc32(flat.numpy().data))


def refuse_stale_folder(folder: Path, record: Record) -> None:
    """Refuse to dispatch into a folder whose old index accelerate would keep, unless it holds these very weights.

    Raises:
        MaterializeError: It holds other weights, or not all of them; ``.names`` has those that differ.
        ValueError: Its index cannot be read.
    """
    if not record.stored or not (folder / "index.json").is_file():
        return
    loader = state.open_folder(folder)
    other = [name for name, mark in record.stored.items() if not _is_stored(loader, name, mark)]
    if other:
        raise MaterializeError(
            tuple(other),
            f"offload_dir {str(folder)!r} already holds other weights, and accelerate would run the model with those; "
            "nothing was dispatched. Give the model a folder of its own, or delete this one",
        )


def _is_stored(loader: OffloadedWeightsLoader, name: str, mark: Mark) -> bool:
    kept = state.find_kept(loader, name)
    try:
        return kept is not None and mark_of(fetch(kept).to(mark.dtype)) == mark
    except FileProblemError:
        return False


def loaders_of(model: torch.nn.Module) -> list[OffloadedWeightsLoader]:
    """The loaders that keep weights of this model, each once."""
    loaders = {
        id(weights): weights
        for module in model.modules()
        for offload in state.offloads_of(module)
        for weights, _ in (state.base_of(offload.weights),)
        if isinstance(weights, OffloadedWeightsLoader)
    }
    return list(loaders.values())


def put_record(loader: OffloadedWeightsLoader, record: Record) -> None:
    """Attach the record of a dispatch to the mapping that keeps the weights."""
    setattr(loader, _ATTRIBUTE, record)


def _record_on(weights: object) -> Record | None:
    found = getattr(weights, "__dict__", {}).get(_ATTRIBUTE)
    return found if isinstance(found, Record) else None


def _records_in(modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[tuple[str, Record]]:
    """Every record among these modules, with what stands now before the names in it: the model may be below another."""
    seen: set[tuple[int, str]] = set()
    for path, module in modules:
        for offload in state.offloads_of(module):
            weights, prefix = state.base_of(offload.weights)
            record, shown = _record_on(weights), join(path, "")
            # The prefix is where the module was at the dispatch. A hook that has moved since tells nothing.
            start = shown.removesuffix(prefix)
            if record is not None and shown.endswith(prefix) and (id(weights), start) not in seen:
                seen.add((id(weights), start))
                yield start, record


def recorded_ties(places: Places, slots: Mapping[str, Slot]) -> Iterator[list[Slot]]:
    """The slots of each tie that a record in this model knows.

    Args:
        places: The model.
        slots: Its slots by name.
    """
    for start, record in _records_in(
        (path.shown, module) for module, paths in places.modules.items() for path in paths
    ):
        for names in record.ties:
            yield [slots[start + name] for name in names if start + name in slots]


def refuse_other_weights(plan: Plan, staged: Staged) -> None:
    """Compare what was read from files with what the model held when it was dispatched.

    Raises:
        MaterializeError: Another model, or another version of this one, is in the files.
    """
    stored = [(unit, kept, mark) for unit in plan.loads for kept, mark in marked(unit)]
    if not stored:
        return
    with ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="modelcache-record") as pool:
        holds = list(pool.map(lambda one: _holds(*one, staged=staged), stored))
    other = [(unit, kept) for (unit, kept, _), is_same in zip(stored, holds, strict=True) if not is_same]
    if other:
        folder = str(Path(other[0][1].path).parent)
        raise MaterializeError(
            tuple(dict.fromkeys(unit.name for unit, _ in other)),
            f"offload_dir {folder!r} no longer holds the weights that this model was dispatched with: another model, "
            "or another version of it, was stored there since. Load it again, into a folder of its own",
        )


def marked(unit: Unit) -> Iterator[tuple[state.KeptInDat, Mark]]:
    """The files of a unit whose content was recorded. What lies in memory is not: it may well be changed there."""
    for kept in {kept.path: kept for kept in unit.kept.values() if isinstance(kept, state.KeptInDat)}.values():
        record = _record_on(kept.loader)
        if record is not None and kept.key in record.stored:
            yield kept, record.stored[kept.key]


def _holds(unit: Unit, kept: state.KeptInDat, mark: Mark, *, staged: Staged) -> bool:
    content = staged.content(unit)
    if not _is_plain(content) or content.dtype != mark.dtype:
        # The model was given another dtype since the dispatch. The file was not.
        try:
            content = fetch(kept).to(mark.dtype)
        except FileProblemError:
            return False
    return mark_of(content) == mark

"""What a user did to a model's structure behind our back, found before its bytes are moved.

Tensors that were moved (``model.to(...)``) or exchanged for others of the same shape and type are taken back in: their
bytes are copied to where the part's bytes are, and they point there again. That counts as a write. Tensors that were
removed keep their bytes and follow them, so that they can be put back. Tensors that were added or changed in shape or
type cannot be taken in; they are named, and nothing is touched.
"""

from __future__ import annotations

import torch

from modelcache.dataplane.inventory import Slot, walk
from modelcache.dataplane.loaded import LoadedModel
from modelcache.dataplane.parts import Member, Part, point
from modelcache.dataplane.structure import Structure
from modelcache.errors import MoveError
from modelcache.move import Move

_SHOWN = 4


def take_back(model: LoadedModel, part: Part, move: Move) -> None:
    """Compare a model with what is known of it and adopt what moved, as far as it lies in `part`.

    Raises:
        MoveError: Its structure changed; the error names the tensors.
    """
    with model.lock:
        if model.dispatch is not None and model.dispatch.is_on:
            try:
                model.dispatch.adopt_foreign()
                model.dispatch.take_off()  # placeholders are no change of the user's
            except ValueError as error:
                raise _drifted(model, move, [str(error)]) from error
        _adopt_exchanged(model, part, move)
    strays = [
        member for member in part.members.values() if model.spec.name in member.holders and _strayed(part, member)
    ]
    if not strays:
        return
    problems = [problem for problem in (_unlike(part, member) for member in strays) if problem is not None]
    if problems:
        raise _drifted(model, move, problems)
    for member in strays:
        copy = part.counts(part.image.storages[member.storage].segment)
        assert copy is not None
        copy.view(member.storage, member.view).copy_(member.tensor.detach())
        point(member, copy)


def strays(model: LoadedModel, part: Part) -> bool:
    """Whether anything of a model is not as it was laid out, as far as it lies in `part`. Changes nothing."""
    with model.lock:
        if _has_other_tensors(model):
            return True
    return any(
        _strayed(part, member)
        for segment in range(part.num_segments)
        if not _are_in_place(part, segment)
        for member in part.members_of(segment)
        if model.spec.name in member.holders
    )


def _has_other_tensors(model: LoadedModel) -> bool:
    if model.structure is not None and model.structure.is_same():
        return False
    on = model.dispatch if model.dispatch is not None and model.dispatch.is_on else None
    if on is not None and on.has_foreign():
        return True
    mapped = set() if on is None else {id(each.tensor) for each in on.mapped}
    present = {id(slot.tensor) for slot in walk(model.modules).slots if on is None or not slot.tensor.is_meta}
    known = {id(tensor) for tensor in model.names.values()}
    if not known - mapped <= present <= known:
        return True
    is_plain = on is None and not model.wrappers
    model.structure = Structure.of(model.modules.values()) if is_plain else None
    return False


def _are_in_place(part: Part, segment: int) -> bool:
    """Whether every tensor of a segment is as it was laid over the copy that counts; `_strayed` for many at once."""
    copy = part.counts(segment)
    if copy is None:
        return False
    members = part.members_of(segment)
    return all(
        tensor.data_ptr() == view.data_ptr()
        and tensor.dtype is view.dtype
        and tensor.shape == view.shape
        and tensor.stride() == view.stride()
        and tensor.device == view.device
        for tensor, view in zip((member.tensor for member in members), copy.laid(members), strict=True)
    )


def _adopt_exchanged(model: LoadedModel, part: Part, move: Move) -> None:
    found = walk(model.modules)
    waiting: dict[str, torch.Tensor] = {}
    for old, slot in _exchanged(model, found.slots, move):
        if any(id(old) in other.members for other in model.parts if other is not part):
            waiting[slot.name] = old  # another part's, which may be on its way: adopted when that one moves
        else:
            _adopt(model, part, old, slot)
    model.names = {slot.name: slot.tensor for slot in found.slots} | waiting
    model.structure = None
    model.wrappers = found.wrappers


def _exchanged(model: LoadedModel, slots: list[Slot], move: Move) -> list[tuple[torch.Tensor, Slot]]:
    """Old tensor and new slot for each that was exchanged; refuses what was added or is no longer tied."""
    known = {id(tensor) for tensor in model.names.values()}
    present = {id(slot.tensor) for slot in slots}
    if known == present:
        return []
    # What was removed earlier is back if the same object is. While it was gone it was a member all along: the memory
    # under a tensor that somebody else may still hold is not given up without it.
    members = [each for part in model.parts for each in list(part.members.values())]
    known |= {id(each.tensor) for each in members if model.spec.name in each.holders}
    known |= {id(empty.tensor) for empty in model.empties}
    problems: list[str] = []
    successor: dict[int, torch.Tensor] = {}
    exchanged: dict[int, tuple[torch.Tensor, Slot]] = {}
    for slot in slots:
        if id(slot.tensor) in known:
            continue
        old = model.names.get(slot.name)
        if old is None:
            problems.append(f"{slot.name!r} was added")
        elif id(old) in present or successor.setdefault(id(old), slot.tensor) is not slot.tensor:
            problems.append(f"{slot.name!r} was tied to another tensor and is not any more")
        else:
            exchanged[id(slot.tensor)] = (old, slot)
    if problems:
        raise _drifted(model, move, problems)
    return list(exchanged.values())


def _adopt(model: LoadedModel, part: Part, old: torch.Tensor, slot: Slot) -> None:
    """Let the new tensor object take the place of the old one."""
    member = part.members.get(id(old))
    model.first_use = None  # its tensors are others now
    if member is not None:
        part.drop(member, model.spec.name)
        part.add(Member(slot.name, slot.tensor, member.storage, member.view, {model.spec.name}))
    for i, empty in enumerate(model.empties):
        if empty.tensor is old:
            model.empties[i] = slot


def _strayed(part: Part, member: Member) -> bool:
    """Whether a tensor does not point where the part put it."""
    segment = part.image.storages[member.storage].segment
    copy = part.counts(segment)
    tensor, view = member.tensor, member.view
    if copy is None and not part.with_loader[segment]:
        return tensor.numel() > 0
    if tensor.dtype != view.dtype or tuple(tensor.shape) != view.shape:
        return True
    if copy is None:
        return False
    expected = copy.view(member.storage, view)
    return (
        tensor.data_ptr() != expected.data_ptr()
        or tensor.stride() != expected.stride()
        or tensor.device != expected.device
    )


def _unlike(part: Part, member: Member) -> str | None:
    """Why the bytes of a stray cannot be taken back, or `None` when they can."""
    tensor, view = member.tensor, member.view
    if tensor.dtype != view.dtype:
        return f"{member.name!r} was changed from {view.dtype} to {tensor.dtype}"
    if tuple(tensor.shape) != view.shape:
        return f"{member.name!r} was changed from shape {view.shape} to {tuple(tensor.shape)}"
    if tensor.is_meta:
        return f"{member.name!r} was moved to meta and has no data any more"
    if part.counts(part.image.storages[member.storage].segment) is None:
        return f"{member.name!r} was given data while the model was on disk"
    return None


def _drifted(model: LoadedModel, move: Move, problems: list[str]) -> MoveError:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    problem = (
        f"its structure changed since it was loaded: {'; '.join(problems[:_SHOWN])}{more}; nothing was given up: "
        "unregister it and register it again to cache it as it is now"
    )
    source, target = ends(move)
    return MoveError(model.spec.name, source, target, problem)


def ends(move: Move) -> tuple[str, str]:
    """The tiers a move goes between, for errors."""
    return {
        "stage": ("disk", "ram"),
        "promote": ("ram", "vram"),
        "trim": ("vram", "ram"),
        "shed": ("ram", "vram"),
        "evict": ("ram" if move.before.vram == 0 else "vram", "disk"),
    }[str(move.kind)]

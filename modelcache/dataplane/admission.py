"""From the loader's object to a loaded model in parts; what cannot be moved is refused here, in words.

A storage that a loaded model already brought in stays in its part, which the new model lists whole; the rest forms one
part of its own. Nothing is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modelcache.dataplane.guard import ResidencyGuard
from modelcache.dataplane.image import View, lay_out
from modelcache.dataplane.inventory import (
    Found,
    Reader,
    Slot,
    Walk,
    group,
    refusal_of,
    storage_key,
    view_from,
    walk,
)
from modelcache.dataplane.loaded import LoadedModel
from modelcache.dataplane.loading import adapters
from modelcache.dataplane.loading.source import Built, Source
from modelcache.dataplane.parts import Member, Part
from modelcache.dataplane.whereabouts import Share, Whereabouts
from modelcache.errors import LoaderError
from modelcache.spec import ModelSpec

if TYPE_CHECKING:
    from modelcache.dataplane.dispatch.form import Dispatch

_counter = itertools.count(1)
# A part may move between being found and being locked; after that many rounds somebody moves it all the time.
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Admission:
    """Admits models.

    Args:
        segment_bytes: About how large a segment is.
        make_lock: Where locks come from.
        whereabouts: Knows the parts of all loaded models.
    """

    segment_bytes: int
    make_lock: Callable[[], AbstractContextManager[object]]
    whereabouts: Whereabouts

    def admit(self, spec: ModelSpec, built: Built, dispatch: Dispatch | None = None) -> LoadedModel:
        """Lay a model out and join it to the parts that it shares.

        Args:
            spec: As registered.
            built: What the loader made, whole.
            dispatch: Its other form, taken off; its offloaded tensors get a part of their own.

        Raises:
            LoaderError: Something cannot be moved.
        """
        modules = _modules_of(spec, built.model)
        found = walk(modules)
        self.require_free(spec, modules, found)
        for slot in found.slots:
            if (reason := refusal_of(slot)) is not None:
                raise _broken(spec, reason)
        _require_data(spec, found, built.source)
        for _ in range(_ROUNDS):
            shared = self.whereabouts.shared(found.slots)
            with ExitStack() as stack:
                for part in sorted({each.part for each in shared.values()}, key=lambda part: part.id):
                    stack.enter_context(part.lock)
                if not shared or self.whereabouts.shared(found.slots) == shared:
                    return self._join(spec, built, modules, found, shared, dispatch)
        raise _broken(spec, "returned tensors of another loaded model that is on the move; lease that model meanwhile")

    def require_free(self, spec: ModelSpec, modules: Mapping[str, torch.nn.Module], found: Walk) -> None:
        """Do nothing for a model that no other cache moves, and whose weights no cache has given up.

        Raises:
            LoaderError: It is another cache's, or was one's.
        """
        for guard in _guards_of(modules):
            if guard.is_gone:
                raise _broken(
                    spec, f"returned the object that was the model {guard.name!r} until {guard.gone}; build a new one"
                )
        if (part := self.whereabouts.elsewhere(found.slots)) is not None:
            raise _broken(
                spec,
                f"returned tensors of {part.model!r} of another cache, and only one can move them; build a model for "
                "each cache",
            )

    def _join(
        self,
        spec: ModelSpec,
        built: Built,
        modules: Mapping[str, torch.nn.Module],
        found: Walk,
        shared: dict[int, Share],
        dispatch: Dispatch | None,
    ) -> LoadedModel:
        _require_no_offloaded(spec, shared)
        own = [slot for slot in found.slots if id(slot.tensor) not in shared]
        if dispatch is not None and not shared.keys().isdisjoint(dispatch.offloaded):
            dispatch = None  # what another model has on the device is not off it
        away = frozenset() if dispatch is None else dispatch.offloaded.keys()
        try:
            storages, offloaded = (
                group([slot for slot in own if (id(slot.tensor) in away) is is_away]) for is_away in (False, True)
            )
            members = [
                (shared[id(slot.tensor)].part, _joining(shared[id(slot.tensor)], slot, spec.name))
                for slot in found.slots
                if id(slot.tensor) in shared
            ]
        except ValueError as error:
            raise _broken(spec, f"returned a model that cannot be laid out: {error}") from error
        parts: list[Part] = []
        for slot in found.slots:
            if id(slot.tensor) in shared:
                parts.append(shared[id(slot.tensor)].part)
            elif slot.tensor.numel() and id(slot.tensor) in away and offloaded:
                parts.append(self._part(spec, built.source, offloaded))
                parts[-1].is_offloaded = True
                offloaded = []
            elif slot.tensor.numel() and id(slot.tensor) not in away and storages:
                parts.append(self._part(spec, built.source, storages))
                storages = []
        distinct = tuple({part.id: part for part in parts}.values())
        model = LoadedModel(
            spec=spec,
            model=built.model,
            modules=modules,
            parts=distinct,
            names={slot.name: slot.tensor for slot in found.slots},
            wrappers=found.wrappers,
            empties=[slot for slot in own if not slot.tensor.numel()],
            idea=adapters.remember(built.model),
            lock=self.make_lock(),
            dispatch=dispatch,
        )
        try:
            for part in distinct:
                part.policies[spec.name] = spec.on_write
            for part, member in members:
                part.add(member)
            model.guard(found)
            if dispatch is not None:
                _point_hooks(dispatch, distinct, spec.name)
        except BaseException:
            model.unguard()
            for part in distinct:
                part.leave(spec.name)
            raise
        return model

    def _part(self, spec: ModelSpec, source: Source | None, storages: list[Found]) -> Part:
        image = lay_out([storage.size_bytes for storage in storages], self.segment_bytes)
        names: tuple[dict[str, View], ...] = tuple(
            {reader.slot.name: reader.view for reader in storage.readers} for storage in storages
        )
        part = Part(f"{spec.name}#{next(_counter)}", spec.name, image, names, source, self.make_lock())
        for index, storage in enumerate(storages):
            for reader in storage.readers:
                part.add(_member(reader, index, spec.name))
        return part


def _point_hooks(dispatch: Dispatch, parts: Iterable[Part], model: str) -> None:
    """Let the weights that hooks bring in be the bytes of the model's parts, wherever they are."""
    known = {key: (part, member) for part in parts for key, member in part.members.items()}
    for mapped in dispatch.mapped:
        mapped.entry = mapped.tensor.detach()
        if id(mapped.tensor) in known:
            part, member = known[id(mapped.tensor)]
            part.add(Member(f"{member.name} (of its dispatch)", mapped.entry, member.storage, member.view, {model}))
    for mapped in dispatch.mapped:
        mapped.table[mapped.key] = mapped.entry


def _require_no_offloaded(spec: ModelSpec, shared: Mapping[int, Share]) -> None:
    for share in shared.values():
        if share.part.is_offloaded:
            raise _broken(
                spec,
                f"returned tensors that {share.part.model!r} keeps off the device by its dispatch; load them apart, or "
                f"load {share.part.model!r} without a device map",
            )


def _joining(share: Share, slot: Slot, model: str) -> Member:
    """The member that a tensor becomes of the part that it lies in."""
    part = share.part
    known = part.members.get(id(slot.tensor))
    if known is not None:
        return Member(slot.name, slot.tensor, known.storage, known.view, {model})
    assert share.start is not None
    view = view_from(slot, share.start)
    stop = view.offset_bytes + view.extent_bytes
    if view.offset_bytes < 0 or stop > part.image.storages[share.storage].size_bytes:
        raise ValueError(f"tensor {slot.name!r} reaches beyond the memory it shares with {part.model!r}")
    return Member(slot.name, slot.tensor, share.storage, view, {model})


def _member(reader: Reader, storage: int, model: str) -> Member:
    return Member(reader.slot.name, reader.slot.tensor, storage, reader.view, {model})


def _modules_of(spec: ModelSpec, model: object) -> Mapping[str, torch.nn.Module]:
    try:
        modules = adapters.modules_of(model)
        reason = adapters.refusal(model)
    except TypeError as error:
        raise _broken(spec, f"returned something that cannot be cached: {error}") from error
    if (place := adapters.handle_in(model)) is not None:
        raise _broken(spec, f"returned a handle of a registered model{f' at {place!r}' if place else ''}, not a model")
    if reason is not None:
        raise _broken(spec, f"returned a model that cannot be moved: {reason}")
    return modules


def _guards_of(modules: Mapping[str, torch.nn.Module]) -> Iterator[ResidencyGuard]:
    for root in modules.values():
        for module in root.modules():
            yield from (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, ResidencyGuard))


def _require_data(spec: ModelSpec, found: Walk, source: Source | None) -> None:
    """Every tensor without data must be one that the source fills, itself or through a tensor it is tied to."""
    offered = frozenset() if source is None else source.names()
    filled = {storage_key(slot.tensor) for slot in found.slots if slot.tensor.is_meta and slot.name in offered}
    missing = [slot.name for slot in found.slots if slot.tensor.is_meta and storage_key(slot.tensor) not in filled]
    if missing:
        shown = ", ".join(repr(name) for name in missing[:4]) + (f" and {len(missing) - 4} more" if missing[4:] else "")
        raise _broken(spec, f"returned a model with tensors on meta that no source can fill: {shown}")


def _broken(spec: ModelSpec, problem: str) -> LoaderError:
    return LoaderError(spec.name, str(spec.loader), problem)

"""Where the parts of all loaded models are in memory, so that a new model finds what it shares without a look at each.

Told by a part whenever its copies or tensor objects change. A part that the loader still has in its own tensors cannot
tell: somebody may point those elsewhere unseen, so they are looked at each time until the part is staged.

What a copy is, and whether it is still one that counts, is the part's to say: an entry that is found is held against
it. A part tells of a copy before it points anything there, and takes that back only when it points elsewhere or is
about to; so an entry that is not found means that no part has its bytes there.
"""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from modelcache.dataplane.image import View
from modelcache.dataplane.inventory import Slot

if TYPE_CHECKING:
    from modelcache.dataplane.copies import Copy
    from modelcache.dataplane.parts import Part


@dataclass(frozen=True, slots=True)
class Share:
    """Where a tensor lies in a part that is there already.

    Attributes:
        part: That part.
        storage: Which of its storages.
        start: The address of the storage; `None` where the tensor object itself is known to the part.
    """

    part: Part
    storage: int
    start: int | None


class _Span(NamedTuple):
    start: int
    stop: int
    tensor: torch.Tensor


#: Of every cache of the process. Single dictionary operations only: it has no lock that a fork could leave taken.
_ALL: weakref.WeakValueDictionary[int, Whereabouts] = weakref.WeakValueDictionary()


class Whereabouts:
    """Which part a tensor object, or an address, belongs to.

    Args:
        lock: Taken below all others, and for a few steps only.
    """

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self._lock = lock
        _ALL[id(self)] = self
        self._objects: dict[int, tuple[Part, ...]] = {}
        # By device: where copies start, in order, and which copy of which part starts there.
        self._starts: dict[torch.device, list[int]] = {}
        self._copies: dict[torch.device, dict[int, tuple[Part, int, Copy]]] = {}
        self._with_loader: dict[str, Part] = {}

    # --- told by the mover and by parts ---

    def enter(self, part: Part) -> None:
        """A part that others may share from now on; it tells of its changes itself. Known ones are fine."""
        if part.whereabouts is self:
            return
        part.whereabouts = self
        for member in part.members.values():
            self.joined(part, member.tensor)
        for copies in (part.vram, part.ram):
            for segment, copy in enumerate(copies):
                if copy is not None:
                    self.holds(part, segment, copy)
        with self._lock:
            self._with_loader[part.id] = part

    def leave(self, part: Part) -> None:
        """Forget a part; its lock is held."""
        part.whereabouts = None
        for member in part.members.values():
            self.parted(part, member.tensor)
        for copy in (*part.vram, *part.ram):
            if copy is not None:
                self.gave_up(copy)
        with self._lock:
            self._with_loader.pop(part.id, None)

    def joined(self, part: Part, tensor: torch.Tensor) -> None:
        """A tensor object is the part's now; an exchanged one may be another part's too, until that one moves."""
        with self._lock:
            self._objects[id(tensor)] = (*self._objects.get(id(tensor), ()), part)

    def parted(self, part: Part, tensor: torch.Tensor) -> None:
        """A tensor object is not the part's any more."""
        with self._lock:
            others = tuple(each for each in self._objects.pop(id(tensor), ()) if each is not part)
            if others:
                self._objects[id(tensor)] = others

    def holds(self, part: Part, segment: int, copy: Copy) -> None:
        """The part is about to point tensors at a copy of a segment."""
        device, start = copy.memory.device, copy.memory.data_ptr()
        with self._lock:
            copies = self._copies.setdefault(device, {})
            if start not in copies:
                bisect.insort(self._starts.setdefault(device, []), start)
            copies[start] = (part, segment, copy)

    def gave_up(self, copy: Copy) -> None:
        """A copy is no part's any more; its memory is still there. One that was never told of is fine."""
        device, start = copy.memory.device, copy.memory.data_ptr()
        with self._lock:
            found = self._copies.get(device, {}).get(start)
            if found is not None and found[2] is copy:
                del self._copies[device][start]
                starts = self._starts[device]
                del starts[bisect.bisect_left(starts, start)]

    # --- asked ---

    def shared(self, slots: Iterable[Slot]) -> dict[int, Share]:
        """Which tensors lie in a part, by ``id``: the same object, or memory inside one of its storages.

        A part that moves meanwhile may move away from what was found; ask again with its lock held.
        """
        tensors = {id(slot.tensor): slot.tensor for slot in slots}
        shares = {key: share for key, tensor in tensors.items() if (share := self._of_object(tensor)) is not None}
        placed = [t for key, t in tensors.items() if key not in shares and t.numel() and not t.is_meta]
        # In this order: what leaves the loader in between is in a copy by then.
        shares |= self._of_loaders(placed)
        for tensor in placed:
            if id(tensor) not in shares and (share := self._of_copy(tensor)) is not None:
                shares[id(tensor)] = share
        return shares

    def elsewhere(self, slots: Iterable[Slot]) -> Part | None:
        """A part of another cache of this process that has one of these tensor objects; two would move it at once."""
        others = [other._objects for ref in _ALL.valuerefs() if (other := ref()) is not None and other is not self]
        for slot in slots if any(others) else ():
            for objects in others:
                for part in objects.get(id(slot.tensor), ()):
                    return part
        return None

    def _of_object(self, tensor: torch.Tensor) -> Share | None:
        for part in reversed(self._objects.get(id(tensor), ())):
            member = part.members.get(id(tensor))
            if member is not None:
                return Share(part, member.storage, None)
        return None

    def _of_copy(self, tensor: torch.Tensor) -> Share | None:
        # No tensor over a copy reaches beyond it: what it has of torch's storage ends there.
        device, address = tensor.device, tensor.data_ptr()
        with self._lock:
            starts = self._starts.get(device, [])
            at = bisect.bisect_right(starts, address)
            found = self._copies[device][starts[at - 1]] if at else None
        if found is None:
            return None
        part, segment, copy = found
        if not part.points_at(segment, copy):
            return None
        offset, storages = address - copy.memory.data_ptr(), part.image.segments[segment].storages
        index = bisect.bisect_right(storages, offset, key=lambda each: part.image.storages[each].offset_bytes) - 1
        if index < 0:
            return None
        place = part.image.storages[storages[index]]
        if offset >= place.offset_bytes + place.size_bytes:
            return None
        return Share(part, storages[index], copy.memory.data_ptr() + place.offset_bytes)

    def _of_loaders(self, tensors: list[torch.Tensor]) -> dict[int, Share]:
        shares: dict[int, Share] = {}
        if not tensors or not self._with_loader:
            return shares
        spans = sorted(map(_span, tensors), key=lambda span: span[:2])
        starts = [span.start for span in spans]
        reach = list(itertools.accumulate((span.stop for span in spans), max))
        for part in list(self._with_loader.values()):
            if not any(part.with_loader):
                self._with_loader.pop(part.id, None)  # once staged, a part does not return to its loader
                continue
            for storage, start, stop, first in _in_loader(part):
                before = bisect.bisect_left(starts, stop)
                if before and reach[before - 1] > start and not first.is_meta:
                    for span in spans[:before]:
                        if span.stop > start and span.tensor.device == first.device:
                            shares.setdefault(id(span.tensor), Share(part, storage, start))
        return shares


def _span(tensor: torch.Tensor) -> _Span:
    start = tensor.data_ptr()
    return _Span(start, start + View.of(tensor, 0).extent_bytes, tensor)


def _in_loader(part: Part) -> Iterable[tuple[int, int, int, torch.Tensor]]:
    """Number, start and stop of each storage that was never staged, and a tensor over it."""
    for index, (place, readers) in enumerate(zip(part.image.storages, part.readers, strict=True)):
        if part.with_loader[place.segment]:
            for first in readers[:1]:  # its last reader may just leave
                start = first.tensor.data_ptr() - first.view.offset_bytes
                yield index, start, start + place.size_bytes, first.tensor

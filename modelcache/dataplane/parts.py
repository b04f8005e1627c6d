"""One part: its layout, its copies on every tier, the tensors that read it, and what is known of its bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from modelcache.dataplane.copies import Copy
from modelcache.dataplane.image import View, WeightImage, covered
from modelcache.dataplane.images.files import Contents, ImageFile
from modelcache.dataplane.loading.source import Source
from modelcache.move import Residency
from modelcache.spec import OnWrite

if TYPE_CHECKING:
    from modelcache.dataplane.arrival import Arrival
    from modelcache.dataplane.whereabouts import Whereabouts

_STRICTNESS = {OnWrite.DISCARD: 0, OnWrite.WRITEBACK: 1, OnWrite.REFUSE: 2}
# Bytes that the source cannot give (buffers that no file holds) stay with the skeleton up to this size, so that the
# part can still be given up whole; above it, the part counts as not readable.
RESIDUE_LIMIT_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class Member:
    """One tensor object over a storage of the part, and the models that hold it."""

    name: str
    tensor: torch.Tensor
    storage: int
    view: View
    holders: set[str]


@dataclass(slots=True, eq=False)
class Part:
    """The state of one part.

    The bytes of segment s that count are those its tensors point at: in VRAM when VRAM holds it, else in RAM, else
    (until first staged) in the loader's own tensors; a segment on none of them is on disk, and its tensors are empty.

    Attributes:
        id: Unique in the process.
        model: Named in errors: the model that brought the part in.
        image: The layout.
        names: For each storage, the tensors over it when it was brought in, by full name.
        source: Where its bytes can be read again.
        lock: Held for the length of a move, and while a model joins or leaves. One thread holds several only in the
            order of their ids.
        is_offloaded: The dispatch of its model keeps it off the device, if the model does not fit whole.
        policies: What an eviction does with writes, by model.
        members: The tensor objects, by ``id``.
        readers: The same, for each storage.
        given: For each storage, one name for each distinct view of it that the source can fill.
        is_readable: The source can be read again and gives all bytes but a small residue.
        vram: Copies by segment; ``None`` where VRAM does not hold it.
        ram: The same for RAM.
        with_loader: Per segment: never staged, its bytes are still in the loader's tensors (or on ``meta``).
        original: The fingerprint of each segment when it was first staged; what the source gives.
        digests: By segment, what the source said of each name when it gave the bytes that `original` is of.
        reference: The fingerprint of the bytes that were last known to be in RAM, an image file or the source.
        torn: Segments whose RAM copy was being overwritten when a copy failed; VRAM holds their bytes.
        diverged: Writes were kept: the source does not describe the part any more, for ever.
        file: Its image file.
        residue: Storages that the source cannot give, by index.
        ranges: By segment, the copy over its address range on a device that keeps addresses, memory below it or not.
        arrival: Of its last promotion, if calls started during it.
        whereabouts: Told of its tensor objects and copies while other models may share them.
    """

    id: str
    model: str
    image: WeightImage
    names: tuple[Mapping[str, View], ...]
    source: Source | None
    lock: AbstractContextManager[object]
    is_offloaded: bool = False
    policies: dict[str, OnWrite] = field(default_factory=dict)
    members: dict[int, Member] = field(default_factory=dict)
    readers: list[list[Member]] = field(default_factory=list)
    given: tuple[Mapping[str, View], ...] = ()
    is_readable: bool = False
    vram: list[Copy | None] = field(default_factory=list)
    ram: list[Copy | None] = field(default_factory=list)
    with_loader: list[bool] = field(default_factory=list)
    original: list[int | None] = field(default_factory=list)
    digests: dict[int, Mapping[str, Hashable]] = field(default_factory=dict)
    reference: list[int | None] = field(default_factory=list)
    torn: set[int] = field(default_factory=set)
    diverged: bool = False
    file: ImageFile | None = None
    residue: dict[int, torch.Tensor] = field(default_factory=dict)
    ranges: dict[int, Copy] = field(default_factory=dict)
    arrival: Arrival | None = None
    whereabouts: Whereabouts | None = None
    _ahead: dict[int, Copy] = field(default_factory=dict)
    _members: list[tuple[Member, ...] | None] = field(default_factory=list)
    _tensors: list[list[torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.image.segments)
        self.vram, self.ram = [None] * n, [None] * n
        self.with_loader, self.original, self.reference = [True] * n, [None] * n, [None] * n
        self.readers = [[] for _ in self.names]
        self._members, self._tensors = [None] * n, [[] for _ in range(n)]
        offered = frozenset() if self.source is None else self.source.names()
        self.given = tuple(_given(names, offered) for names in self.names)
        rest = sum(place.size_bytes for i, place in enumerate(self.image.storages) if not self.gives(i))
        self.is_readable = self.source is not None and rest <= RESIDUE_LIMIT_BYTES

    @property
    def num_segments(self) -> int:
        """How many segments there are."""
        return len(self.image.segments)

    @property
    def residency(self) -> Residency:
        """What the tiers hold."""
        n = self.num_segments
        vram = sum(copy is not None for copy in self.vram)
        return Residency(vram, n - sum(copy is not None for copy in self.ram))

    @property
    def on_write(self) -> OnWrite:
        """The strictest of what its holders ask for."""
        return max(self.policies.values(), key=_STRICTNESS.__getitem__, default=OnWrite.WRITEBACK)

    @property
    def contents(self) -> Contents:
        """What its image file describes."""
        return Contents(self.id, self.model, self.image, tuple(self.names))

    @property
    def restorable_from_source(self) -> bool:
        """Whether the source can be read again and still describes the part."""
        return self.is_readable and not self.diverged

    def gives(self, storage: int) -> bool:
        """Whether the source gives every byte of a storage that a tensor can see."""
        size = self.image.storages[storage].size_bytes
        wanted = covered(list(self.names[storage].values()), size)
        return covered(list(self.given[storage].values()), size) == wanted

    def counts(self, segment: int) -> Copy | None:
        """The copy whose bytes count, or `None` while the loader or the disk has them."""
        return self.vram[segment] or self.ram[segment]

    def points_at(self, segment: int, copy: Copy) -> bool:
        """Whether the bytes in a copy count, or will as soon as the move under way is over."""
        return self._ahead.get(segment) is copy or self.counts(segment) is copy

    def is_on_device(self, segment: int) -> bool:
        """Whether its tensors point at the device, where a segment is or arrives."""
        return self.vram[segment] is not None or segment in self._ahead

    def members_of(self, segment: int) -> tuple[Member, ...]:
        """The tensors over the storages of a segment; the same tuple while they are the same."""
        known = self._members[segment]
        if known is None:
            storages = self.image.segments[segment].storages
            known = self._members[segment] = tuple(each for storage in storages for each in self.readers[storage])
            self._tensors[segment] = [member.tensor for member in known]
        return known

    def _forget_members(self, storage: int) -> None:
        segment = self.image.storages[storage].segment
        self._members[segment], self._tensors[segment] = None, []
        for copy in (self.vram[segment], self.ram[segment], self.ranges.get(segment)):
            if copy is not None:
                copy.unlay()

    @property
    def needs_file(self) -> bool:
        """Whether the image file is the last place that holds its bytes."""
        in_memory = all(self.counts(s) is not None or self.with_loader[s] for s in range(self.num_segments))
        return not in_memory and not (self.restorable_from_source and self.reference == self.original)

    def add(self, member: Member) -> None:
        """Note that a tensor object reads a storage."""
        known = self.members.get(id(member.tensor))
        if known is None:
            self.members[id(member.tensor)] = member
            self.readers[member.storage].append(member)
            self._forget_members(member.storage)
            if self.whereabouts is not None:
                self.whereabouts.joined(self, member.tensor)
        else:
            known.holders |= member.holders

    def drop(self, member: Member, model: str) -> bool:
        """Forget that a model holds a tensor object; True when nobody does any more."""
        member.holders.discard(model)
        if member.holders:
            return False
        del self.members[id(member.tensor)]
        self.readers[member.storage].remove(member)
        self._forget_members(member.storage)
        if self.whereabouts is not None:
            self.whereabouts.parted(self, member.tensor)
        return True

    def leave(self, model: str) -> list[torch.Tensor]:
        """Forget a model's tensors; those that nobody else holds become empty, unless the loader still has them.

        Returns those that became empty.
        """
        emptied = []
        self.policies.pop(model, None)
        for member in [each for each in self.members.values() if model in each.holders]:
            segment = self.image.storages[member.storage].segment
            if self.drop(member, model) and not self.with_loader[segment]:
                point(member, None)
                emptied.append(member.tensor)
        return emptied

    def install(self, vram: list[Copy | None], ram: list[Copy | None], then: Callable[[], None]) -> list[Copy]:
        """Make these the part's copies, point its tensors at them and call `then`: all of it, or nothing.

        Returns the copies that were given up, which nothing of the part points at any more.
        """
        before = (self.vram, self.ram)
        changed = [s for s in range(self.num_segments) if (vram[s] or ram[s]) is not self._pointed_at(s)]
        for copies in (vram, ram):
            for segment, copy in enumerate(copies):
                self._tell_of(segment, copy)
        try:
            self.vram, self.ram = vram, ram
            self._point(changed)
            then()
        except BaseException:
            self.vram, self.ram = before
            self._take_back(_lacking((*vram, *ram), before))
            self._point([*changed, *self._ahead])
            self._ahead.clear()
            raise
        gone = _lacking((*before[0], *before[1]), (vram, ram))
        self._take_back(gone)
        return gone

    def _tell_of(self, segment: int, copy: Copy | None) -> None:
        if self.whereabouts is not None and copy is not None:
            self.whereabouts.holds(self, segment, copy)

    def _take_back(self, copies: Iterable[Copy]) -> None:
        for copy in copies:
            if self.whereabouts is not None:
                self.whereabouts.gave_up(copy)

    @contextlib.contextmanager
    def pointed_ahead(self) -> Iterator[Callable[[int, Copy], None]]:
        """Point single segments at copies that `install` will make the part's, and back if it does not."""

        def point_ahead(segment: int, copy: Copy) -> None:
            self._tell_of(segment, copy)
            self._ahead[segment] = copy
            self._point_segment(segment, copy)

        try:
            yield point_ahead
        finally:
            lost = {segment: copy for segment, copy in self._ahead.items() if self.counts(segment) is not copy}
            self._ahead.clear()
            self._take_back(lost.values())
            self._point(list(lost))

    def _pointed_at(self, segment: int) -> Copy | None:
        return self._ahead.get(segment) or self.counts(segment)

    def _point(self, segments: list[int]) -> None:
        for segment in segments:
            copy = self.counts(segment)
            if copy is not None or not self.with_loader[segment]:
                self._point_segment(segment, copy)

    def _point_segment(self, segment: int, copy: Copy | None) -> None:
        members = self.members_of(segment)
        if copy is not None:
            try:
                for tensor, data in zip(self._tensors[segment], copy.laid(members), strict=True):
                    tensor.data = data
            except RuntimeError:
                pass  # at least one is on meta
            else:
                return
        for member in members:
            point(member, copy)


def _lacking(copies: Iterable[Copy | None], kept: Iterable[Iterable[Copy | None]]) -> list[Copy]:
    """The copies that are not among those kept."""
    ids = {id(copy) for each in kept for copy in each}
    return [copy for copy in copies if copy is not None and id(copy) not in ids]


def _given(names: Mapping[str, View], offered: frozenset[str]) -> dict[str, View]:
    chosen: dict[View, str] = {}
    for name, view in names.items():
        if name in offered and view.is_dense:
            chosen.setdefault(view, name)
    return {name: view for view, name in chosen.items()}


def point(member: Member, copy: Copy | None) -> None:
    """Point a tensor object at its bytes in a copy; at an empty tensor without one.

    The caller is outside of `inference_mode`: what is made inside it could not be written to later.
    """
    data = _empty(member.view.dtype) if copy is None else copy.view(member.storage, member.view)
    if member.tensor.is_meta:
        _swap(member.tensor, data)
    else:
        member.tensor.data = data


def _swap(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give a tensor on ``meta`` real data: torch refuses `.data` from there, but can exchange what two objects are."""
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    # Calling a subclass would run its constructor, of which we know nothing.
    real = torch.Tensor._make_subclass(type(tensor), data, tensor.requires_grad) if is_parameter else data.detach()
    vars(real).update(vars(tensor))
    torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]


def _empty(dtype: torch.dtype) -> torch.Tensor:
    if dtype not in _EMPTY:
        _EMPTY[dtype] = torch.empty(0, dtype=dtype, device="cpu")
    return _EMPTY[dtype]


# What the tensors of a part on disk point at: one tensor without elements for each type.
_EMPTY: dict[torch.dtype, torch.Tensor] = {}

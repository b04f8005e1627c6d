"""From disk to RAM: fill a part's RAM pieces.

The first time from the loader's own tensors, later from the image file or the source. What was read is fingerprinted;
bytes that differ from those first seen are refused.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from modelcache.dataplane.copies import Copy, NewCopies, Tiers
from modelcache.dataplane.fingerprint import fingerprint
from modelcache.dataplane.image import View, covered
from modelcache.dataplane.inventory import Slot, flat_bytes, storage_key
from modelcache.dataplane.memory.blocks import return_freed_heap
from modelcache.dataplane.parts import Member, Part, point
from modelcache.errors import MoveError, WeightsError

log = logging.getLogger("modelcache.dataplane")

# The heap is given back after so many bytes were let go, or this share of them all: a look at it takes longer the more
# there is of it.
_TRIM_BYTES, _TRIM_SHARE = 8 << 20, 1 / 32

Tell = Callable[[int], None]


def fill(part: Part, new: NewCopies, tiers: Tiers, segments: Sequence[int], tell: Tell) -> None:
    """Make a RAM copy of each of these segments of a part that is on disk or with its loader.

    Whatever was read is looked at, each time: a file can be written to without a sign of it in its times. A digest that
    a source takes while it reads stands for the fingerprint when it is that of the first time.

    The loader's memory is let go storage by storage as it is copied, so that little exists twice. If the move fails
    after that, the tensors keep the new memory alive for themselves: they are with the loader as before.

    Raises:
        WeightsError: The file is damaged, or its bytes are not those of the first time.
        LoaderError: The source's loader failed.
        MoveError: Nothing holds the bytes.
    """
    from_disk = [s for s in segments if not part.with_loader[s]]
    from_meta = [s for s in segments if part.with_loader[s] and any(m.tensor.is_meta for m in part.members_of(s))]
    ahead = [*from_disk, *from_meta]
    tiers.blocks.expect(sum(part.image.segments[segment].size_bytes for segment in ahead))
    for segment in ahead:
        new.add_ram(segment)
    prints: dict[int, int] = {}
    if from_disk:
        prints = _fill_from_disk(part, new, tiers, from_disk, tell)
    if from_meta:
        storages = [i for s in from_meta for i in part.image.segments[s].storages if part.readers[i][0].tensor.is_meta]
        prints |= _fill_from_source(part, new, storages, tell)
    with_loader = [segment for segment in segments if part.with_loader[segment]]
    let_go = _LetGo(sum(part.image.segments[segment].size_bytes for segment in with_loader))
    for segment in with_loader:
        copy = new.ram[segment] if segment in new.ram else new.add_ram(segment)
        _take_from_loader(part, copy, tiers, segment, tell, let_go)
    _check(part, new, segments, prints)
    tiers.blocks.prepare()


class _LetGo:
    """Gives the heap back now and then while a loader's tensors are let go.

    The C library keeps what was freed on its heap; without this, that much of the model would exist twice.
    """

    def __init__(self, total_bytes: int) -> None:
        self._step_bytes = max(_TRIM_BYTES, int(total_bytes * _TRIM_SHARE))
        self._freed_bytes = 0

    def add(self, size_bytes: int) -> None:
        self._freed_bytes += size_bytes
        if self._freed_bytes >= self._step_bytes:
            return_freed_heap()
            self._freed_bytes = 0


def _fill_from_disk(part: Part, new: NewCopies, tiers: Tiers, segments: list[int], tell: Tell) -> dict[int, int]:
    """Returns the fingerprints that were taken on the way."""
    if part.file is not None and tiers.files is not None:
        try:
            return _fill_from_file(part, new, tiers, segments, tell)
        except WeightsError as error:
            if not part.restorable_from_source:
                raise
            log.warning("%s; reading model=%s again from its source", str(error), part.model)
            tiers.files.reject(part.file)
            part.file = None
            # The source gives what was first read; a file written later may have held something else.
            part.reference = list(part.original)
            for segment in segments:
                new.ram[segment].memory.zero_()  # what the source does not write must not be what the file had there
    if not part.restorable_from_source:
        raise MoveError(part.model, "disk", "ram", "neither an image file nor a readable source holds its bytes")
    return _fill_from_source(part, new, [i for s in segments for i in part.image.segments[s].storages], tell)


def _fill_from_file(part: Part, new: NewCopies, tiers: Tiers, segments: list[int], tell: Tell) -> dict[int, int]:
    assert part.file is not None
    assert tiers.files is not None
    buffers = {s: piece.buffer() for s in segments if (piece := new.ram[s].piece) is not None}
    try:
        return tiers.files.read(part.file, part.contents, buffers, tell)
    finally:
        for buffer in buffers.values():
            buffer.release()


def _fill_from_source(part: Part, new: NewCopies, storages: list[int], tell: Tell) -> dict[int, int]:
    """Let the source write into its tensors' places; what it cannot give comes from the residue.

    Returns the fingerprints of the segments that were complete before the rest was.
    """
    assert part.source is not None
    targets: dict[str, torch.Tensor] = {}
    bent: list[tuple[torch.Tensor, torch.Tensor]] = []
    segment_of: dict[str, int] = {}
    later = {part.image.storages[index].segment for index in set(_all_of(part, storages)).difference(storages)}
    for index in storages:
        segment = part.image.storages[index].segment
        copy = new.ram[segment]
        if index in part.residue:
            copy.storage(index).copy_(part.residue[index])
        else:
            for name, view in part.given[index].items():
                target = copy.view(index, view)
                if not view.is_contiguous:
                    # Sources write rows of bytes; another memory format is put right afterwards.
                    bent.append((target, torch.empty(view.shape, dtype=view.dtype, device="cpu")))
                    target = bent[-1][1]
                    later.add(segment)
                targets[name], segment_of[name] = target, segment
    if not targets:
        return {}
    with _Meanwhile(part, new, {name: s for name, s in segment_of.items() if s not in later}) as meanwhile:
        part.source.fill(targets, tell, meanwhile.landed)
        for target, straight in bent:
            target.copy_(straight)
        return meanwhile.prints()


def _all_of(part: Part, storages: Sequence[int]) -> Iterator[int]:
    """All storages of the segments in which these are."""
    for segment in {part.image.storages[index].segment for index in storages}:
        yield from part.image.segments[segment].storages


class _Meanwhile:
    """Looks at segments that are complete while others are still being read: a disk leaves processors idle.

    Args:
        part: Its `digests` are those of the bytes that have its `original` fingerprints; others are added.
        new: Where the segments are.
        segment_of: The segment of each target whose segment has nothing but such targets in it.
    """

    def __init__(self, part: Part, new: NewCopies, segment_of: dict[str, int]) -> None:
        self._part, self._new, self._segment_of = part, new, segment_of
        self._left = Counter(segment_of.values())
        self._workers = ThreadPoolExecutor(_num_workers(), thread_name_prefix="modelcache-check")
        self._digests: dict[int, dict[str, Hashable]] = {segment: {} for segment in self._left}
        self._found: dict[int, Future[int]] = {}
        self._same: dict[int, int] = {}

    def landed(self, name: str, digest: Hashable) -> None:
        """A target is complete."""
        segment = self._segment_of.get(name)
        if segment is None:
            return
        self._left[segment] -= 1
        self._digests[segment][name] = digest
        if self._left[segment]:
            return
        original = self._part.original[segment]
        if original is not None and self._digests[segment] == self._part.digests.get(segment):
            self._same[segment] = original
        else:
            self._found[segment] = self._workers.submit(fingerprint, self._new.ram[segment].memory)

    def prints(self) -> dict[int, int]:
        """Of the segments that were complete."""
        found = {segment: future.result() for segment, future in self._found.items()}
        for segment, value in found.items():
            is_first_seen = self._part.original[segment] in (None, value)
            if is_first_seen and None not in self._digests[segment].values():
                self._part.digests[segment] = self._digests[segment]
        return found | self._same

    def __enter__(self) -> _Meanwhile:
        return self

    def __exit__(self, *exc: object) -> None:
        # Whoever failed gives the memory back, and nobody may be reading it then.
        self._workers.shutdown(wait=True, cancel_futures=True)


def _take_from_loader(part: Part, copy: Copy, tiers: Tiers, segment: int, tell: Tell, let_go: _LetGo) -> None:
    for index in part.image.segments[segment].storages:
        members = part.readers[index]
        real = [member for member in members if not member.tensor.is_meta]
        if real:
            _copy_storage(copy.storage(index), real, tiers)
            tell(part.image.storages[index].size_bytes)
        if part.is_readable and not part.gives(index):
            part.residue[index] = copy.storage(index).clone()
        for member in members:
            point(member, copy)
        let_go.add(part.image.storages[index].size_bytes)


def _copy_storage(target: torch.Tensor, members: list[Member], tiers: Tiers) -> None:
    """Copy the bytes that these tensors can see; the rest of the storage stays zero, as when the source gives it."""
    by_storage: dict[int, list[Member]] = {}
    for member in members:
        by_storage.setdefault(storage_key(member.tensor), []).append(member)
    for same in by_storage.values():
        flat = flat_bytes([Slot(member.name, member.tensor) for member in same])
        first = same[0]
        own_offset = first.tensor.storage_offset() * first.tensor.dtype.itemsize
        shift = first.view.offset_bytes - own_offset
        views = [_shifted(member.view, -shift) for member in same]
        for start, stop in covered(views, flat.numel()):
            _copy(target[shift + start : shift + stop], flat[start:stop], tiers)


def _copy(target: torch.Tensor, source: torch.Tensor, tiers: Tiers) -> None:
    device = tiers.device
    if device.holds_copies and source.device == device.torch_device:
        device.copy_out(target, source).wait()
    elif source.device.type == "cpu":
        # torch would divide this among threads that wait for each other, and for very long on a busy machine.
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def _shifted(view: View, by_bytes: int) -> View:
    return View(view.dtype, view.shape, view.stride, view.offset_bytes + by_bytes)


def _check(part: Part, new: NewCopies, segments: Sequence[int], prints: dict[int, int]) -> None:
    """Fingerprint what was read, unless `prints` has it, and compare it with what is known."""
    unknown = [segment for segment in segments if segment not in prints]
    for segment, found in {**prints, **_fingerprints(new, unknown)}.items():
        expected = part.reference[segment]
        if part.with_loader[segment]:
            part.original[segment] = expected = found
        if found != expected:
            where = str(part.file.path) if part.file is not None else _describe(part)
            problem = (
                "gave other bytes than when the model was first loaded; unregister the model and register it again"
            )
            names = part.names[part.image.segments[segment].storages[0]]
            raise WeightsError(part.model, where, problem, next(iter(names), None))
        part.reference[segment] = found


def _fingerprints(new: NewCopies, segments: Sequence[int]) -> dict[int, int]:
    """Computed by several threads where there are processors for them: it takes one longer than reading the bytes."""
    memories = [new.ram[segment].memory for segment in segments]
    num_workers = min(_num_workers(), len(segments))
    if num_workers < 2:
        return dict(zip(segments, map(fingerprint, memories), strict=True))
    with ThreadPoolExecutor(num_workers, thread_name_prefix="modelcache-check") as workers:
        return dict(zip(segments, workers.map(fingerprint, memories), strict=True))


def _num_workers() -> int:
    return min(4, os.cpu_count() or 1)


def _describe(part: Part) -> str:
    return "" if part.source is None else part.source.describe()

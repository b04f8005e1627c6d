"""What the top tiers give up: trims, sheds and evictions. Bytes that were written to are never among them unasked.

Each function builds what the move needs and then hands the part its new copies in one step; what it raises has changed
nothing. `then` is called in that step, and undone with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from modelcache.dataplane.copies import Copy, Done, NewCopies, Tiers, give_up
from modelcache.dataplane.fingerprint import CHUNK_BYTES
from modelcache.dataplane.images.files import ImageFile
from modelcache.dataplane.parts import Part
from modelcache.dataplane.written import believed, changed, print_of
from modelcache.errors import DevicePoisonedError, MoveError
from modelcache.move import Move
from modelcache.spec import OnWrite

Tell = Callable[[int], None]
Then = Callable[[], None]


def trim(part: Part, move: Move, tiers: Tiers, tell: Tell, then: Then) -> Done | None:
    """VRAM gives up its tail; RAM holds or receives it. `None`: the writes found may not be moved.

    Segments that were written to go back to their RAM copy in place. While that is under way there is no RAM copy:
    should it fail, the segment is marked torn, its bytes are those in VRAM, and the next trim writes them back again.
    """
    tiers.device.settle()
    leaving = range(move.after.vram, move.before.vram)
    missing = range(move.after.ram, move.before.ram)
    prints = {s: print_of(_in_vram(part, s), tiers) for s in leaving} if move.check else believed(part, leaving)
    dirty = changed(part, prints)
    if dirty and part.on_write is OnWrite.REFUSE:
        return None
    keeps = part.on_write is OnWrite.WRITEBACK
    again = {s for s in leaving if part.ram[s] is not None and (s in part.torn or (keeps and s in dirty))}
    with NewCopies(tiers, part.image, part.ranges) as new:
        for segment in missing:
            new.copy_out(new.add_ram(segment), _in_vram(part, segment))
        part.torn |= again
        for segment in sorted(again):
            new.copy_out(_in_ram(part, segment), _in_vram(part, segment))
        copied = new.land(tell)
        part.torn -= again
        for segment in dirty.intersection(again, leaving) | dirty.intersection(missing):
            part.reference[segment] = prints[segment]
        vram = [copy if s < move.after.vram else None for s, copy in enumerate(part.vram)]
        ram = [new.ram.get(s, copy) if s >= move.after.ram else None for s, copy in enumerate(part.ram)]
        gone = part.install(vram, ram, then)
        new.keep()
    written = bool(dirty) and keeps
    part.diverged |= written
    _release(tiers, gone)
    return Done(copied, written)


def shed(part: Part, move: Move, tiers: Tiers, then: Then) -> Done:
    """RAM gives up head segments that VRAM holds.

    No look for writes: the bytes that count stay where they are, and so does the fingerprint they are held against.
    """
    ram = [copy if s >= move.after.ram else None for s, copy in enumerate(part.ram)]
    gone = part.install(list(part.vram), ram, then)
    part.torn -= set(range(move.after.ram))
    _release(tiers, gone)
    return Done(0)


def evict(part: Part, move: Move, tiers: Tiers, tell: Tell, then: Then) -> Done | None:
    """VRAM and RAM give up everything, after writing the image file if the move says so. `None`: bytes would be lost.

    A move that says not to look and to write no file gives the bytes up whatever they are: an unregistered model's.

    Raises:
        MoveError: It was never staged, or the file could not be written.
    """
    look = move.check or move.write_image
    if look and any(part.with_loader):
        raise _not_evictable(part, "it was never staged whole; stage it first, or unregister it")
    if move.before.vram:
        # A device that is lost has nothing left that could still use the memory.
        with contextlib.suppress(*(() if look else (DevicePoisonedError,))):
            tiers.device.settle()
    # Where writes are to be thrown away, the RAM copy is what they were made to a copy of.
    discards = part.on_write is OnWrite.DISCARD
    last = [
        copy
        for s in range(part.num_segments)
        if (copy := (_clean_in_ram(part, s) if discards else None) or part.counts(s)) is not None
    ]
    everything = range(part.num_segments)
    prints = {s: print_of(copy, tiers) for s, copy in enumerate(last)} if look else believed(part, everything)
    dirty = changed(part, prints)
    if dirty and part.on_write is OnWrite.REFUSE:
        return None
    copied = 0
    if move.write_image:
        copied = _spill(part, prints, last, tiers, tell)
    elif move.check and not _settle_on_a_holder(part, prints, tiers):
        return None
    nothing: list[Copy | None] = [None] * part.num_segments
    del last
    gone = part.install(nothing, list(nothing), then)
    part.torn.clear()
    written = bool(dirty) and part.on_write is OnWrite.WRITEBACK
    part.diverged |= written
    _release(tiers, gone)
    return Done(copied, written)


def _spill(part: Part, prints: dict[int, int], last: list[Copy], tiers: Tiers, tell: Tell) -> int:
    """Write the image file unless it holds these bytes already; returns the bytes that crossed a link."""
    copied = 0
    if not _describes(part, prints):
        part.file, copied = _write_file(part, prints, last, tiers, tell)
    part.reference = [prints[s] for s in range(part.num_segments)]
    return copied


def _write_file(
    part: Part, prints: dict[int, int], last: list[Copy], tiers: Tiers, tell: Tell
) -> tuple[ImageFile, int]:
    """Segment by segment; what VRAM holds passes through a small buffer, for RAM may have no room for it."""
    if tiers.files is None:
        raise _not_evictable(part, "there is no directory for image files; set one, or keep the model in RAM")
    copied = 0

    def segment(index: int) -> Iterator[memoryview]:
        nonlocal copied
        copy = last[index]
        size_bytes = copy.memory.numel()
        if copy.piece is not None:
            yield copy.piece.buffer()
        else:
            yield from _passing(copy, tiers)
            copied += size_bytes
        copied += size_bytes
        tell(size_bytes)

    file = tiers.files.write(part.contents, [prints[s] for s in range(part.num_segments)], segment)
    return file, copied


def _passing(copy: Copy, tiers: Tiers) -> Iterator[memoryview]:
    size_bytes = copy.memory.numel()
    buffer = torch.empty(min(CHUNK_BYTES, size_bytes), dtype=torch.uint8, device="cpu")
    for start in range(0, size_bytes, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, size_bytes)
        tiers.device.copy_out(buffer[: stop - start], copy.memory[start:stop]).wait()
        yield buffer[: stop - start].numpy().data


def _settle_on_a_holder(part: Part, prints: dict[int, int], tiers: Tiers) -> bool:
    """Choose what the bytes are read from next time, the image file or the source; False when they would be lost."""
    by_source = {s: known for s, known in enumerate(part.original) if known is not None}
    discards = part.on_write is OnWrite.DISCARD
    if _describes(part, prints):
        return True
    if part.restorable_from_source and (discards or prints == by_source):
        if part.file is not None and tiers.files is not None:
            tiers.files.delete(part.file)
            part.file = None
        part.reference = list(part.original)
        return True
    if discards and part.file is not None and not part.file.is_kept:
        part.reference = list(part.file.prints)
        return True
    return False


def _describes(part: Part, prints: dict[int, int]) -> bool:
    # A file that others may delete must not be the last to hold any bytes.
    file = None if part.file is not None and part.file.is_kept and part.diverged else part.file
    return file is not None and dict(enumerate(file.prints)) == prints


def _in_vram(part: Part, segment: int) -> Copy:
    copy = part.vram[segment]
    assert copy is not None
    return copy


def _in_ram(part: Part, segment: int) -> Copy:
    copy = part.ram[segment]
    assert copy is not None
    return copy


def _clean_in_ram(part: Part, segment: int) -> Copy | None:
    return None if segment in part.torn else part.ram[segment]


def _release(tiers: Tiers, copies: Iterable[Copy]) -> None:
    for copy in copies:
        give_up(tiers, copy)


def _not_evictable(part: Part, problem: str) -> MoveError:
    return MoveError(part.model, "ram", "disk", problem)

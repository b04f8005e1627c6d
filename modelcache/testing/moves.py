"""What each kind of move does to the bytes of a `FakePart`. Its caller has seen to room, and to what may be lost."""

from __future__ import annotations

from modelcache.errors import MoveError
from modelcache.move import Move
from modelcache.spec import OnWrite
from modelcache.testing.models import FakePart


def is_on_disk(part: FakePart, dirty: set[int]) -> bool:
    """Whether an image file or the source holds the bytes that count."""
    if part.with_loader is not None:
        raise MoveError(part.part, "ram", "disk", "it was never staged whole; stage it first, or unregister it")
    if dirty and part.on_write is not OnWrite.DISCARD:
        return False
    return part.image is not None or (part.is_readable and not part.has_diverged)


def stage(part: FakePart) -> int:
    """Fill RAM from the loader's bytes, the image file or the source; bytes copied."""
    source = part.with_loader or part.image or (part.source if part.is_readable else None)
    if source is None:
        raise MoveError(part.part, "disk", "ram", "nothing holds its bytes any more")
    part.ram = [bytearray(segment) for segment in source]
    part.reference = [bytes(segment) for segment in source]
    part.with_loader = None
    return sum(part.sizes)


def promote(part: FakePart, move: Move) -> int:
    """Copy to VRAM what it lacks; bytes copied."""
    coming = range(move.before.vram, move.after.vram)
    part.vram[coming.start : coming.stop] = [bytearray(part.ram[i] or b"") for i in coming]
    part.ram[: move.after.ram] = [None] * move.after.ram
    return sum(part.sizes[i] for i in coming)


def trim(part: FakePart, move: Move, dirty: set[int]) -> int:
    """Let VRAM give up its tail; RAM receives what it lacks, and what was written; bytes copied."""
    copied = 0
    for i in range(min(move.after.vram, move.after.ram), move.before.vram):
        is_missing = i >= move.after.ram and part.ram[i] is None
        goes_back = i in dirty and part.on_write is OnWrite.WRITEBACK and i >= move.after.vram
        if is_missing or goes_back:
            part.ram[i] = bytearray(part.vram[i] or b"")
            copied += part.sizes[i]
            if i in dirty:
                part.reference[i] = bytes(part.vram[i] or b"")
    part.vram[move.after.vram :] = [None] * (part.num_segments - move.after.vram)
    return copied


def evict(part: FakePart, move: Move) -> int:
    """Give everything up, to an image file where the move says so; bytes copied."""
    copied = 0
    if move.write_image:
        is_discarded = part.on_write is OnWrite.DISCARD
        part.image = [
            bytes((is_discarded and part.ram[i]) or part.bytes_of(i) or b"") for i in range(part.num_segments)
        ]
        copied = sum(part.sizes)
    n = part.num_segments
    part.vram, part.ram = [None] * n, [None] * n
    return copied

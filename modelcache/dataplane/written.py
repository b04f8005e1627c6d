"""Has a part been written to? Looks at its bytes where they are, one segment at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from modelcache.dataplane.copies import Copy, Tiers
from modelcache.dataplane.fingerprint import CHUNK_BYTES, fingerprint
from modelcache.dataplane.parts import Part


def print_of(copy: Copy, tiers: Tiers) -> int:
    """The fingerprint of a copy, computed on the device or, when that has no room for it, in RAM."""
    full = False
    view = tiers.device.host_view(copy.memory) if copy.piece is None else None
    if view is not None:
        return fingerprint(view)
    if copy.piece is None:
        try:
            return fingerprint(copy.memory)
        except torch.OutOfMemoryError:
            full = True
    if full:
        # Outside of the handler: the error holds the device memory that was got before it.
        return _through_ram(copy, tiers)
    return fingerprint(copy.memory)


def _through_ram(copy: Copy, tiers: Tiers) -> int:
    buffer = torch.empty(min(CHUNK_BYTES, copy.memory.numel()), dtype=torch.uint8, device="cpu")

    def fetch(start: int, stop: int) -> torch.Tensor:
        target = buffer[: stop - start]
        tiers.device.copy_out(target, copy.memory[start:stop]).wait()
        return target

    return fingerprint(copy.memory, fetch)


def believed(part: Part, segments: Iterable[int]) -> dict[int, int]:
    """What the fingerprints should be when nobody wrote; used where a move says not to look."""
    return {segment: known for segment in segments if (known := part.reference[segment]) is not None}


def changed(part: Part, prints: dict[int, int]) -> set[int]:
    """The segments whose bytes are not those last known to be in RAM, an image file or the source."""
    return {segment for segment, found in prints.items() if found != part.reference[segment]}

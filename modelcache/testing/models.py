"""A model made of a few real bytes, for caches over a `FakeMover`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelcache.errors import ModelNotResidentError
from modelcache.move import Residency
from modelcache.spec import OnWrite
from modelcache.tier import Tier


class FakePart:
    """The bytes of one part, segment by segment, on every tier."""

    def __init__(self, part: str, sizes: Sequence[int], *, is_readable: bool) -> None:
        self.part = part
        self.sizes = tuple(sizes)
        self.is_readable = is_readable
        self.source = [random.Random(f"{part} {i}").randbytes(size) for i, size in enumerate(self.sizes)]  # noqa: S311
        self.with_loader: list[bytes] | None = list(self.source)
        self.reference: list[bytes] = list(self.source)
        self.vram: list[bytearray | None] = [None] * len(self.sizes)
        self.ram: list[bytearray | None] = [None] * len(self.sizes)
        self.image: list[bytes] | None = None
        self.has_diverged = False
        self.on_write = OnWrite.WRITEBACK
        self.models: dict[str, FakeModel] = {}

    @property
    def num_segments(self) -> int:
        """How many segments it has."""
        return len(self.sizes)

    @property
    def residency(self) -> Residency:
        """The two numbers, as the bytes say."""
        n = self.num_segments
        vram = next((i for i, held in enumerate(self.vram) if held is None), n)
        ram = next((i for i, held in enumerate(self.ram) if held is not None), n)
        return Residency(vram, ram)

    def bytes_of(self, segment: int) -> bytes | bytearray | None:
        """The bytes that count: VRAM's, else RAM's, else the loader's; `None` if only disk has them."""
        for held in (self.vram[segment], self.ram[segment]):
            if held is not None:
                return held
        return self.with_loader[segment] if self.with_loader is not None else None

    @property
    def written(self) -> set[int]:
        """The segments that were written to since their RAM block was filled."""
        return {
            i for i in range(self.num_segments) if (now := self.bytes_of(i)) is not None and now != self.reference[i]
        }


class FakeModel:
    """What the loader of a model returns: some bytes, and calls that fail unless all of them are where they must be.

    Args:
        sizes: Of its segments, in bytes; each segment is an allocation of its own.
        parts: Sizes by part instead, for models that share: a part of the same label is one part, of whichever model.
        concurrency: The adapter's default number of leases at a time; 0 is unlimited.
    """

    def __init__(self, *sizes: int, parts: Mapping[str, Sequence[int]] | None = None, concurrency: int = 0) -> None:
        self.sizes_by_label: dict[str, tuple[int, ...]] = (
            {"": sizes} if parts is None else {label: tuple(of) for label, of in parts.items()}
        )
        self.concurrency = concurrency
        self.name = ""
        self.top = Tier.VRAM
        self.parts: tuple[FakePart, ...] = ()
        #: One token for each call that runs now. Single dictionary operations only, so that the oracle is atomic.
        self.running: dict[object, None] = {}

    def __call__(self, work: Callable[[], Any] | None = None) -> Any:
        """Use the model: `work` runs meanwhile, and its result is returned.

        Raises:
            ModelNotResidentError: Some byte is not on the top tier, before or after.
        """
        token = object()
        self.running[token] = None
        try:
            self._require_resident()
            result = work() if work is not None else None
            self._require_resident()
        finally:
            del self.running[token]
        return result

    def _require_resident(self) -> None:
        for part in self.parts:
            held = part.vram if self.top is Tier.VRAM else part.ram
            if any(segment is None for segment in held):
                raise ModelNotResidentError(self.name)

    @property
    def weights(self) -> bytes:
        """Its bytes, wherever they are.

        Raises:
            ModelNotResidentError: They are on disk only.
        """
        pieces = [part.bytes_of(i) for part in self.parts for i in range(part.num_segments)]
        if any(piece is None for piece in pieces):
            raise ModelNotResidentError(self.name)
        return b"".join(piece for piece in pieces if piece is not None)

    def write(self, data: bytes, *, segment: int = 0, part: int = 0) -> None:
        """Write to the beginning of a segment, in the way that nothing but its bytes shows.

        Raises:
            ModelNotResidentError: They are on disk only.
        """
        held = self.parts[part].bytes_of(segment)
        if not isinstance(held, bytearray):
            raise ModelNotResidentError(self.name)
        held[: len(data)] = data

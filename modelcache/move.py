"""One move: some segments of one part, from where they are to where they are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Why a move was made. A closed list: logs, events and metrics use these words and no others."""

    REQUEST = "request"  # somebody asked for the model
    PREFETCH = "prefetch"  # somebody will
    LRU = "lru"  # room was needed for another model
    IDLE = "idle"  # its idle time passed
    PRESSURE = "pressure"  # a budget was lowered, or room was reserved for other work
    EXPLICIT = "explicit"  # park, evict, free, unregister
    SHUTDOWN = "shutdown"  # the cache is closing

    def __str__(self) -> str:
        return self.value


class MoveKind(Enum):
    """What a move does; derived from its two ends, so that it cannot disagree with them."""

    STAGE = "stage"  # disk -> RAM
    PROMOTE = "promote"  # RAM -> VRAM
    TRIM = "trim"  # VRAM gives up tail segments; RAM holds or receives them
    SHED = "shed"  # RAM gives up head segments that VRAM holds
    EVICT = "evict"  # every tier above disk gives up everything

    __hash__ = object.__hash__

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Residency:
    """Which of a part's n segments each tier holds: VRAM ``[0, vram)``, RAM ``[ram, n)``.

    Nothing in VRAM is ``vram == 0``, nothing in RAM is ``ram == n``.
    """

    vram: int
    ram: int


@dataclass(frozen=True, slots=True)
class Move:
    """Bring one part from residency `before` to residency `after`, whole or not at all.

    Attributes:
        part: The part's id.
        generation: Of the part; a completion that carries another one is stale and dropped.
        before: What the tiers hold now.
        after: What they hold when the move is done.
        num_segments: n.
        write_image: Write the image file before RAM gives up the bytes (an `EVICT` that spills).
        check: Look for writes first; a move that would lose some ends as `KeptWritten` and changes nothing.
        reason: Why, from the closed list.
        on_behalf_of: The model somebody asked for, when that is why this one moves.
    """

    part: str
    generation: int
    before: Residency
    after: Residency
    num_segments: int
    write_image: bool = False
    check: bool = True
    reason: Reason = Reason.REQUEST
    on_behalf_of: str | None = None

    @property
    def kind(self) -> MoveKind:
        """What this move does."""
        before, after, n = self.before, self.after, self.num_segments
        if after.vram > before.vram:
            return MoveKind.PROMOTE
        if after.ram < before.ram and after.vram == before.vram:
            return MoveKind.STAGE
        if after.vram == 0 and after.ram == n:
            return MoveKind.EVICT
        if after.vram < before.vram:
            return MoveKind.TRIM
        return MoveKind.SHED


@dataclass(frozen=True, slots=True)
class Moved:
    """A move that was carried out.

    Attributes:
        copied_bytes: Bytes that crossed a link; 0 when a clean copy was dropped.
        seconds: How long the mover worked.
        written: The part had been written to since its block was filled, and the writes are kept: what it was read
            from no longer describes it.
        freed_bytes: What the top tier's allocator measured as given back; `None` when it cannot say.
    """

    copied_bytes: int
    seconds: float
    written: bool = False
    freed_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class KeptWritten:
    """The move would have lost writes, so nothing was given up."""

    seconds: float


@dataclass(frozen=True, slots=True)
class PartFacts:
    """What the data plane measured of one part. All sizes are what the allocators really charge, in bytes.

    Attributes:
        part: The part's id, unique in the process.
        vram_bytes: Per segment, in VRAM.
        ram_bytes: Per segment, in RAM.
        image_bytes: Of its image file.
        readable: Its source can be read again.
        offloaded: The dispatch that its model came with keeps it off the device. A model that does not fit whole runs
            with it in RAM.
    """

    part: str
    vram_bytes: tuple[int, ...]
    ram_bytes: tuple[int, ...]
    image_bytes: int
    readable: bool
    offloaded: bool = False


@dataclass(frozen=True, slots=True)
class LoadedFacts:
    """What a first load found out. Until staged, the bytes are still the loader's.

    Attributes:
        parts: In first-use order. A part that another model already brought in appears with the same id.
        concurrency: The adapter's default number of leases at a time; 0 is unlimited.
        type_name: Of the object, for people.
        whole_only: Why a model that was dispatched can only run whole; empty otherwise.
        onload_bytes: What a forward brings onto the device at once while the offloaded parts stay in RAM.
    """

    parts: tuple[PartFacts, ...]
    concurrency: int
    type_name: str
    seconds: float = 0.0
    onload_bytes: int = 0
    whole_only: str = ""

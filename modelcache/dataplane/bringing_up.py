"""What the upper tiers receive: RAM from disk or the loader, VRAM from RAM.

Everything new is built first and handed to the part in one step; what raises has changed nothing. `then` is called in
that step, and undone with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelcache.dataplane import staging
from modelcache.dataplane.arrival import Arrival, must_land_first
from modelcache.dataplane.copies import Done, NewCopies, Tiers, give_up
from modelcache.dataplane.first_use import FirstUse
from modelcache.dataplane.loaded import Root
from modelcache.dataplane.memory.blocks import return_freed_heap
from modelcache.dataplane.parts import Part
from modelcache.move import Move


def stage(part: Part, move: Move, tiers: Tiers, tell: Callable[[int], None], then: Callable[[], None]) -> Done:
    """RAM receives tail segments."""
    segments = range(move.after.ram, move.before.ram)
    with NewCopies(tiers, part.image, part.ranges) as new:
        staging.fill(part, new, tiers, segments, tell)
        part.install(list(part.vram), [new.ram.get(s, copy) for s, copy in enumerate(part.ram)], then)
        new.keep()
    first = any(part.with_loader[segment] for segment in segments)
    for segment in segments:
        part.with_loader[segment] = False
    if first:
        # What the loader held is on the C library's heap; the system wants it back.
        return_freed_heap()
    return Done(sum(part.image.segments[s].size_bytes for s in segments))


@dataclass(frozen=True, slots=True)
class Early:
    """That calls may start while segments arrive.

    Attributes:
        uses: What was recorded of every model with a tensor of the part.
        roots: The modules of these models that have one.
        arriving: Told when calls may start.
    """

    uses: Sequence[FirstUse]
    roots: Sequence[Root]
    arriving: Callable[[], None]


class StrayedError(Exception):
    """The part is not as it was laid out, so what was copied is not all of it. Stays inside the data plane."""


def promote(
    part: Part,
    move: Move,
    tiers: Tiers,
    tell: Callable[[int], None],
    then: Callable[[], None],
    has_strayed: Callable[[], bool],
    early: Early | None = None,
) -> Done:
    """VRAM receives the segments it lacks, in order; RAM may give up head segments in the same step.

    Whatever takes time beside the copies is done while they are under way: `has_strayed` is asked, views are prepared,
    and the tensors of each segment are pointed at it as soon as it has landed, or when calls may start.

    Raises:
        StrayedError: `has_strayed` said so. Nothing was changed.
    """
    with NewCopies(tiers, part.image, part.ranges) as new, part.pointed_ahead() as point_ahead:
        coming = range(move.before.vram, move.after.vram)
        first = frozenset(coming) if early is None else must_land_first(part, early.uses)
        # Sorting is stable: otherwise they come in order.
        for segment in sorted(coming, key=lambda s: s not in first):
            source = part.ram[segment]
            assert source is not None
            new.add_vram(segment)
            new.copy_in(segment, source)
        if has_strayed():
            raise StrayedError
        copied = 0
        with contextlib.ExitStack() as calls:
            for segment, copy in new.vram.items():
                if early is not None and part.arrival is None and segment not in first:
                    for later in new.under_way:
                        point_ahead(later, new.vram[later])
                    arrival = Arrival(part, tiers.device, new.vram, new.under_way, early.roots)
                    part.arrival = calls.enter_context(arrival)
                    then()
                    early.arriving()
                copy.laid(part.members_of(segment))
                copied += new.land_next(tell)
                if part.arrival is None:
                    point_ahead(segment, copy)
                else:
                    part.arrival.landed(segment)
        ram = [copy if s >= move.after.ram else None for s, copy in enumerate(part.ram)]
        gone = part.install([new.vram.get(s, copy) for s, copy in enumerate(part.vram)], ram, then)
        new.keep()
    part.arrival = None
    for copy in gone:
        give_up(tiers, copy)
    return Done(copied)

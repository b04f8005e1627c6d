"""Names in the order of their last use, repaired as it is read: uses are not told, they only show in ticks.

Looking at the first few of a thousand costs a few heap operations, not a thousand. What a name is ranked by may only
grow while it is in here; whoever lets it shrink takes the name out and puts it in again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from heapq import heappop, heappush

_Entry = tuple[tuple[int, int], str]

#: Below every rank: priorities and ticks are not negative.
_FIRST = (-1, -1)


class ByUse:
    """Names and the rank each was last seen with, which is never above its present one.

    Invariant: the heap holds the present entry of every name, and perhaps entries that are not present any more.
    """

    __slots__ = ("_entries", "_heap")

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._heap: list[_Entry] = []

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """In the order in which they came in."""
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str) -> None:
        """Put a name in, ranked when it is next read; no-op if it is in."""
        if name not in self._entries:
            self._enter((_FIRST, name))

    def discard(self, name: str) -> None:
        """Take a name out; no-op if it is not in."""
        self._entries.pop(name, None)

    def ranked(self, rank_of: Callable[[str], tuple[int, int]]) -> Generator[str, None, None]:
        """All names, lowest rank first, equal ones by name; lazily. Close it before anything else is done with this.

        Names may be taken out meanwhile, none put in.
        """
        read: list[_Entry] = []
        try:
            while self._heap:
                entry = heappop(self._heap)
                if self._entries.get(entry[1]) is not entry:
                    continue
                read.append(entry)
                rank = rank_of(entry[1])
                if rank > entry[0]:
                    read.pop()
                    self._enter((rank, entry[1]))
                    continue
                yield entry[1]
        finally:
            for entry in read:
                if self._entries.get(entry[1]) is entry:
                    heappush(self._heap, entry)

    def copy(self) -> ByUse:
        """One of its own with the same names."""
        twin = object.__new__(ByUse)
        twin._entries, twin._heap = self._entries.copy(), self._heap.copy()
        return twin

    def _enter(self, entry: _Entry) -> None:
        self._entries[entry[1]] = entry
        heappush(self._heap, entry)

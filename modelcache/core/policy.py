"""Which copies go first when room is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """One part that may be given up.

    Attributes:
        part: Its id.
        priority: The highest priority rank of the models that hold it; lower goes first.
        tick: The sequence number of its last use; no clock.
        size_bytes: What giving it all up frees on the tier in question.
    """

    part: str
    priority: int
    tick: int
    size_bytes: int


class EvictionPolicy(Protocol):
    """Choose which copies to give up.

    Asked speculatively, many times for each real eviction: it must not log, mutate, or read a clock. The caller logs
    the move it actually starts.
    """

    @property
    def name(self) -> str:
        """As ``policy.evict`` spells it."""

    def rank(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yield candidates lazily, first to go first; the caller stops when it has enough.

        They come lazily too, by priority, then by last use, then by name: one that is not looked at costs nothing.
        """


class LRU:
    """Least recently used first, every low priority before any normal, those before any high."""

    name = "lru"

    def rank(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yield as they come."""
        yield from candidates


class CostAware:
    """Greedy-dual: old and large first, so that one large idle copy goes before several small ones of like age.

    The weight of a copy is its age in uses times its size, after Young's Landlord algorithm with a uniform cost a byte.
    """

    name = "cost"

    def rank(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yield by priority, then by size times age, largest first."""
        pool = list(candidates)
        newest = max((c.tick for c in pool), default=0)
        heap = [(c.priority, -(newest - c.tick + 1) * max(c.size_bytes, 1), c.part, c) for c in pool]
        heapify(heap)
        while heap:
            yield heappop(heap)[3]


POLICIES: dict[str, EvictionPolicy] = {policy.name: policy for policy in (LRU(), CostAware())}

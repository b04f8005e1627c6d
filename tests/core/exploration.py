"""Every reachable state of a world, breadth first: what each must keep, and that whoever waits can still be served."""

from __future__ import annotations

import gc
from array import array
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from core.keys import key_of
from worlds import World

Step = tuple[str, int | str]

#: What nobody may count on: who waits must be served if none of this happens any more.
MISHAPS = frozenset(
    {
        *("ask", "hit", "tell", "cancel", "time passes"),
        *("fail load", "fail move", "run out of memory", "lose the device", "find writes", "find written", "come late"),
    }
)


class Exploration:
    """All states that can be reached from one, numbered in the order in which they were found.

    Attributes:
        num_steps: How many steps were taken; several lead to the same state.
    """

    def __init__(self, world: World) -> None:
        self.num_steps = 0
        self._first = world
        self._facts: dict[Hashable, int] = {}
        self._ids: dict[tuple[int, ...], int] = {}
        self._waiting: list[frozenset[int]] = []
        #: The way to each state: from where it was found first, and how.
        self._from = array("q")
        self._by: list[Step | None] = []
        #: Every step that is no mishap, by its two ends.
        self._tails, self._heads = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._from)

    def run(self) -> Exploration:
        """Visit every state; a promise that breaks is shown with the shortest way to it."""
        with _uncollected():
            self._number(key_of(self._first))
            self._found(-1, None, self._first)
            queue = deque([self._first])
            at = 0
            while queue:
                self._visit(at, queue.popleft(), queue)
                at += 1
        self._everybody_is_served()
        return self

    def _visit(self, at: int, state: World, queue: deque[World]) -> None:
        steps = list(state.steps())
        self.num_steps += len(steps)
        if not steps:
            state.let_go()
        for i, step in enumerate(steps):
            # The last one needs no copy: nobody looks at this state again.
            successor = state if i == len(steps) - 1 else state.copy()
            try:
                successor.do(step)
                number = self._number(key_of(successor))
                if number == len(self):
                    successor.check()
                    self._found(at, step, successor)
                    queue.append(successor)
                else:
                    successor.let_go()
            except AssertionError as error:
                raise AssertionError(f"{error}\nafter: {self._way(at)} {step}") from error
            if step[0] not in MISHAPS:
                self._tails.append(at)
                self._heads.append(number)

    def _number(self, key: tuple[Hashable, ...]) -> int:
        """Of the state with this key; the next free one if it is new. Facts repeat, so each is kept once."""
        facts = self._facts
        short = tuple([facts.setdefault(fact, len(facts)) for fact in key])
        return self._ids.setdefault(short, len(self._ids))

    def _found(self, at: int, step: Step | None, world: World) -> None:
        self._from.append(at)
        self._by.append(step)
        self._waiting.append(frozenset([i for i, caller in enumerate(world.callers) if caller.ticket]))

    def _everybody_is_served(self) -> None:
        """However what goes on ends: it ends, and nobody waits then.

        Taken away one after the other, the states with nothing ahead but states that were taken away: where none is
        left, there is no way to go on for ever. So every way from every state ends, and where it does, nobody waits.
        """
        num_ahead = [0] * len(self)
        behind: list[list[int]] = [[] for _ in num_ahead]
        for tail, head in zip(self._tails, self._heads, strict=True):
            num_ahead[tail] += 1
            behind[head].append(tail)
        ends = deque(state for state, num in enumerate(num_ahead) if not num)
        for state in ends:
            assert not self._waiting[state], (
                f"caller {min(self._waiting[state])} waits for ever after: {self._way(state)}"
            )
        num_left = len(self)
        while ends:
            num_left -= 1
            for state in behind[ends.popleft()]:
                num_ahead[state] -= 1
                if not num_ahead[state]:
                    ends.append(state)
        if num_left:
            first = next(state for state, num in enumerate(num_ahead) if num)
            raise AssertionError(f"{num_left} states may follow each other for ever, after: {self._way(first)}")

    def _way(self, state: int) -> list[Step]:
        steps: list[Step] = []
        while (step := self._by[state]) is not None:
            steps.append(step)
            state = self._from[state]
        return steps[::-1]


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is looked for meanwhile: there is none, and looking through all states took half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def explore(world: World) -> int:
    """How many states can be reached; each keeps every promise, and nobody waits for ever."""
    return len(Exploration(world).run())

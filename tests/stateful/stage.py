"""A real cache over fakes, the people who ask it for things, and what they were given.

Nobody sleeps: an actor is a thread of the pool, so `FakePool.settle` sees whether it works, waits or is done. Tasks live
on a loop that the test turns by hand.
"""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partialmethod
from typing import Any
from unittest.mock import patch

from modelcache.cache import ModelCache
from modelcache.futures import MoveFuture
from modelcache.testing import FakeClock, FakeMover, FakePool, Hold, cache_of
from modelcache.tier import Tier

#: The figures of a cache that examples are played on.
VRAM, RAM, DISK = 1024, 2048, 8192


class Asked:
    """One thing that somebody asked the cache for, and what came of it."""

    def __init__(self, kind: str, names: tuple[str, ...] = (), *, who: str, now_s: float, **facts: Any) -> None:
        self.kind, self.names, self.who, self.asked_s = kind, names, who, now_s
        self.timeout_s: float | None = facts.pop("timeout", None)
        self.facts = facts
        self.is_open, self.is_cancelled = True, False
        self.value: Any = None
        self.error: BaseException | None = None
        #: The registrations valid meanwhile, and the least and the most that budgets were; by the reference.
        self.candidates: dict[str, list[Any]] = {}
        self.was_unknown = False
        self.least: dict[Tier, int] = {}
        self.most: dict[Tier, int] = {}
        self.held_meanwhile = False
        #: The registrations that a task holds while it waits for more.
        self.got: list[Any] = []
        #: The bytes that each part had on the top tier when it was asked for.
        self.on_top: dict[str, int] = {}
        self.must_succeed = False
        self.is_alone = False
        self.calls_before = self.moment = 0

    def answer(self, value: object) -> None:
        self.value, self.is_open = value, False

    def fail(self, error: BaseException) -> None:
        # The frames of a traceback would keep alive what the call held.
        self.error, self.is_open = error.with_traceback(None), False

    def is_late(self, now_s: float) -> bool:
        """Whether its time is up at an instant."""
        return self.timeout_s is not None and now_s >= self.asked_s + self.timeout_s

    def __repr__(self) -> str:
        came = "open" if self.is_open else repr(self.error if self.error is not None else self.value)
        return f"<{self.who}: {self.kind} {' + '.join(self.names)} {self.facts or ''} {came}>"


class Actor:
    """A thread that does one thing after the other, each of which may block."""

    def __init__(self, name: str, pool: FakePool, clock: FakeClock) -> None:
        self.name = name
        self.doing: Asked | None = None
        self._jobs: Any = pool.mailbox(clock)
        self.thread = pool.spawn(name, self._run)

    @property
    def is_free(self) -> bool:
        return self.doing is None or not self.doing.is_open

    def do(self, asked: Asked, act: Callable[[], object]) -> None:
        self.doing = asked
        self._jobs.put((asked, act))

    def end(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get(None)) is not None:
            asked, act = job
            del job
            try:
                asked.answer(act())
            except BaseException as error:
                asked.fail(error)
            # What it holds in its frame, nobody else could drop.
            del asked, act


class Loop:
    """An event loop that runs when told to, until nothing is left to do."""

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self.loop = asyncio.new_event_loop()
        self.tasks: dict[Asked, asyncio.Task[None]] = {}

    def start(self, asked: Asked, coro: Coroutine[Any, Any, object]) -> None:
        self.tasks[asked] = self.loop.create_task(self._run(asked, coro))

    async def _run(self, asked: Asked, coro: Coroutine[Any, Any, object]) -> None:
        try:
            value = await coro
        except BaseException as error:
            if asked.is_open:
                asked.fail(error)
            elif not isinstance(error, asyncio.CancelledError):
                raise
        else:
            if asked.is_open:
                asked.answer(value)

    def turn(self) -> None:
        """Run until every task waits and every thread of the pool does."""
        self._pool.settle()
        while self.loop._ready:
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
            self._pool.settle()
        for asked in [asked for asked, task in self.tasks.items() if task.done()]:
            self.tasks.pop(asked).result()

    def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        self.turn()
        self.loop.close()


def _result(future: MoveFuture, pool: FakePool, timeout: float | None = None) -> None:
    with pool.standing(lambda: not future.done()):
        Future.result(future, timeout)


class Stage:
    """One cache at a time over a clock, a pool, actors and a loop that outlive it."""

    def __init__(self, num_actors: int = 4) -> None:
        self.clock, self.pool = FakeClock(), FakePool()
        self.actors = [Actor(f"actor-{i}", self.pool, self.clock) for i in range(num_actors)]
        self.closer = Actor("closer", self.pool, self.clock)
        self.loop = Loop(self.pool)
        self.is_spoiled = False
        # Whoever waits for a future stands still too, which only the pool's own events would show.
        self._seen = patch.object(MoveFuture, "result", partialmethod(_result, self.pool))
        self._seen.start()
        self.mover: FakeMover
        self.cache: ModelCache
        self.holds: list[Hold] = []

    def open(self, *, top: Tier = Tier.VRAM, ram: int = RAM, disk: int = DISK, **options: Any) -> None:
        self.mover = FakeMover(self.pool, vram_bytes=VRAM, ram_bytes=ram, disk_bytes=disk, top=top)
        self.cache = cache_of(self.mover, self.clock, self.pool, **options)

    def give_up(self) -> None:
        """After an example that failed: nothing of it may be used again, or be in the way of the end."""
        self.heal()
        self._seen.stop()
        atexit.unregister(self.cache.close)

    @property
    def top(self) -> Tier:
        return self.mover.top

    def settle(self) -> None:
        """Until nothing happens any more by itself."""
        self.loop.turn()

    def hold(self, step: str, name: str | None) -> None:
        self.holds.append(self.mover.hold(step, name))

    def release(self, at: int | None = None) -> None:
        """Let one step go on, or all of them."""
        going = self.holds if at is None else [self.holds[at]]
        for hold in going:
            hold.release()
        self.holds = [] if at is None else [hold for hold in self.holds if hold is not going[0]]

    def heal(self) -> None:
        """Nothing goes wrong any more, and nothing stands still."""
        with self.mover._lock:
            self.mover._planned.clear()
        self.release()

    @property
    def num_planned(self) -> int:
        """Failures and standstills that are still to come."""
        return len(self.mover._planned)

    @property
    def is_clear(self) -> bool:
        """Nothing stands still, and nothing is to fail or to stand still."""
        return not (self.holds or self.mover._planned)

    def held_on(self, tier: Tier) -> int:
        return self.mover.arenas.of[tier].held_bytes

    def end(self) -> None:
        self._seen.stop()
        self.loop.close()
        for actor in (*self.actors, self.closer):
            actor.end()
            actor.thread.join(10.0)
        assert self.pool.thread_names == ()

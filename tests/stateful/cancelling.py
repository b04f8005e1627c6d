"""States that a request can find, and ways to stop whoever waits at the n-th place where he waits."""

from __future__ import annotations

import asyncio
import gc
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any
from unittest.mock import patch

from benches import Bench

from modelcache.errors import ModelCacheError
from modelcache.futures import MoveFuture
from modelcache.testing import FakeModel
from modelcache.testing.time_and_threads import FakeEvent

#: What a request for model `a` may find.
STATES = (
    "cold",
    "parked",
    "ready",
    "another makes room",
    "another leases what must go",
    "another leases the only place",
    "another loads it",
    "another brings it up",
    "its load fails",
    "its move fails",
)


class Scenery:
    """A cache in one of `STATES`. `go_on` lets happen what a request may wait for."""

    def __init__(self, state: str) -> None:
        self.bench = Bench(vram=40, ram=100, disk=100)
        self.fails = state == "its load fails"
        self.bench.cache.register("a", self._load, size=30, reload=True, concurrency=int("place" in state))
        self.bench.add("b", size=30)
        self.ends: list[Callable[[], object]] = []
        self._make(state)
        self.bench.pool.settle()

    def _load(self) -> FakeModel:
        if self.fails:
            raise OSError("injected")
        return FakeModel(20, 10)

    def _make(self, state: str) -> None:
        bench, cache, mover = self.bench, self.bench.cache, self.bench.mover
        if state in ("parked", "ready", "another leases the only place", "another brings it up", "its move fails"):
            bench.use("a")
        if state in ("parked", "another brings it up", "its move fails"):
            cache.park("a")
        if state == "its move fails":
            mover.fail("promote", name="a")
        if state == "another makes room":
            bench.use("b")
        if state == "another leases what must go":
            self.ends.append(cache.lease_many("b").close)
        if state == "another leases the only place":
            self.ends.append(cache.lease_many("a").close)
        if state in ("another loads it", "another brings it up"):
            hold = mover.hold("load" if "loads" in state else "promote", "a")
            cache.prefetch("a")
            hold.wait_reached()
            self.ends.append(hold.release)

    def go_on(self) -> None:
        """Whatever others do or hold comes to its end."""
        while self.ends:
            self.ends.pop()()

    def heal(self) -> None:
        self.go_on()
        self.fails = False
        with self.bench.mover._lock:
            self.bench.mover._planned.clear()

    def require_nothing_is_lost(self) -> None:
        """The books are exact, nobody holds or waits for anything, and the next one is served."""
        bench, driver = self.bench, self.bench.cache._driver
        gc.collect()
        bench.validate()
        assert {name: gate.num_leases for name, gate in driver.gates.items() if gate.num_leases} == {}
        assert bench.cache.status().num_waiting == 0
        assert not driver._waiters
        assert not driver._machine.held
        assert not bench.cache._door._first_uses._claims
        for name in bench.cache.names():
            with bench.cache.lease_many(name) as (model,):
                model()
        bench.validate()

    def close(self) -> None:
        self.heal()
        self.bench.close()


# --- tasks ------------------------------------------------------------------------------------------------------------


@types.coroutine
def counted(coro: Coroutine[Any, Any, Any], suspensions: list[object]) -> Generator[Any, Any, Any]:
    """Run a coroutine, and note what it waits for each time that it is suspended."""
    try:
        waits_for = coro.send(None)
        while True:
            suspensions.append(waits_for)
            try:
                sent = yield waits_for
            except BaseException as error:
                waits_for = coro.throw(error)
            else:
                waits_for = coro.send(sent)
    except StopIteration as end:
        return end.value


class Cancelled:
    """One run of a coroutine that is cancelled at its n-th suspension.

    Args:
        when: ``"at once"``; ``"answered"``, when the answer is there but its wake-up is not; or ``"woken"``, when only
            the task has yet to run.
    """

    def __init__(self, scenery: Scenery, body: Callable[[], Coroutine[Any, Any, Any]], nth: int, when: str) -> None:
        self.scenery, self.pool = scenery, scenery.bench.pool
        self.loop = asyncio.new_event_loop()
        suspensions: list[object] = []
        self.task = self.loop.create_task(_driven(body, suspensions))
        #: Somebody who wants the same, and is not to notice.
        self.other = self.loop.create_task(_quietly(scenery))
        self._turn_until(lambda: self.task.done() or len(suspensions) >= nth)
        #: It has that many suspensions; and it was still at one of them when it was cancelled.
        self.was_reached = not self.task.done()
        self.was_cancelled = self.was_reached and self._cancel(when)
        self._turn_until(lambda: self.task.done() and self.other.done())
        self.outcome = self._outcome()
        self.other_served = self.other.result()
        self.task = self.other = None
        self.loop.close()

    def _cancel(self, when: str) -> bool:
        if when != "at once":
            self.scenery.go_on()
            self.pool.settle()
        if when == "woken":
            self._turn()
        return self.task.cancel()

    def _turn(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def _turn_until(self, is_so: Callable[[], bool]) -> None:
        idle = 0
        while not is_so():
            self._turn()
            idle = 0 if self.loop._ready else idle + 1
            if idle > 2:
                # Nobody can go on by himself.
                self.scenery.go_on()
                self.pool.settle()
                assert idle < 50, f"{self.task} and {self.other} are stuck"

    def _outcome(self) -> str:
        if self.task.cancelled():
            return "cancelled"
        error = self.task.exception()
        if error is None:
            return "finished"
        if not isinstance(error, ModelCacheError):
            raise error
        return "refused"


async def _driven(body: Callable[[], Coroutine[Any, Any, Any]], suspensions: list[object]) -> None:
    await counted(body(), suspensions)


async def _quietly(scenery: Scenery) -> bool:
    try:
        async with scenery.bench.cache.aget("a") as model:
            return model(lambda: True)
    except ModelCacheError:
        return False


# --- threads ----------------------------------------------------------------------------------------------------------


class InterruptedWaits:
    """Ctrl-C at the n-th place where this thread waits: before it waits, or with the answer there."""

    def __init__(self, scenery: Scenery, nth: int, *, late: bool) -> None:
        self._scenery, self._late = scenery, late
        self._left = nth
        self._thread = threading.get_ident()
        self.was_struck = False

    def __enter__(self) -> InterruptedWaits:
        self._patches = [
            patch.object(FakeEvent, "wait", self._wrap(FakeEvent.wait)),
            patch.object(MoveFuture, "result", self._wrap(MoveFuture.result)),
        ]
        for each in self._patches:
            each.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for each in self._patches:
            each.stop()

    def _wrap(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(waited: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread or self.was_struck:
                return wait(waited, *args, **kwargs)
            self._left -= 1
            self.was_struck = self._left < 0
            if self.was_struck and not self._late:
                raise KeyboardInterrupt
            self._scenery.go_on()
            result = wait(waited, *args, **kwargs)
            if self.was_struck:
                raise KeyboardInterrupt
            return result

        return waiting

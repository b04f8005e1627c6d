"""Callbacks of futures are user code: they run under no lock, and one that hangs holds nobody up."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from concurrent.futures import as_completed, wait

import pytest
from benches import Bench
from lifecycle.room import Stop, until

from modelcache.core.messages import WantCopy
from modelcache.errors import CacheClosedError, UnknownModelError
from modelcache.futures import MoveFuture
from modelcache.tier import Tier


def test_a_callback_may_call_the_cache():
    bench = Bench()
    bench.add("a", "b")
    seen: list[object] = []

    def look(future):
        assert not bench.pool.is_locked_here
        seen.append(bench.cache.status().num_moving)
        with bench.cache.get("b") as model:
            seen.append(model)
        seen.append(threading.current_thread().name)

    bench.cache.prefetch("a", Tier.RAM).add_done_callback(look)
    until(lambda: len(seen) == 3, "the callback is through")
    assert seen[0] == 0
    assert str(seen.pop()).startswith("modelcache-callback")
    seen.clear()
    bench.close()


def test_a_callback_that_hangs_holds_up_no_move_and_no_other_future(caplog):
    bench = Bench()
    bench.add("a", "b")
    with Stop() as stop:
        bench.cache.prefetch("a", Tier.RAM).add_done_callback(lambda _: stop.stand())
        stop.wait_reached()
        bench.cache.prefetch("b", Tier.RAM).result()
        assert wait([bench.cache.prefetch("a")], timeout=10).done
        assert bench.cache.health().is_ready
        with bench.cache.get("a"), bench.cache.get("b"):
            pass
    bench.close()


def test_a_callback_that_raises_is_reported_and_the_next_one_runs(caplog):
    bench = Bench()
    bench.add("a")
    ran = threading.Event()
    with bench.mover.hold("stage") as hold, caplog.at_level(logging.ERROR, "modelcache"):
        future = bench.cache.prefetch("a", Tier.RAM)
        assert hold.wait_reached()
        future.add_done_callback(lambda _: 1 / 0)
        future.add_done_callback(lambda _: ran.set())
        hold.release()
        assert ran.wait(10)
    assert "a callback of a prefetch failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    bench.close()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_an_exit_or_an_interrupt_ends_no_thread(error, caplog):
    bench = Bench()
    bench.add("a", "b")
    ran = threading.Event()

    def leave(_):
        raise error

    with bench.mover.hold("stage") as hold:
        future = bench.cache.prefetch("a", Tier.RAM)
        assert hold.wait_reached()
        future.add_done_callback(leave)
        future.add_done_callback(lambda _: ran.set())
        hold.release()
        assert ran.wait(10)
    assert error.__name__ in caplog.text

    async def main():
        await asyncio.wait_for(asyncio.wrap_future(bench.cache.prefetch("b", Tier.RAM)), 10)

    asyncio.run(main())
    assert bench.cache.health().is_ready
    bench.close()


def test_on_the_callers_own_thread_an_exit_is_the_callers():
    bench = Bench()
    bench.add("a")
    future = bench.cache.prefetch("a", Tier.RAM)
    future.result()
    with pytest.raises(SystemExit):
        future.add_done_callback(lambda _: sys.exit(1))
    bench.close()


def test_an_exit_while_the_cache_ends_keeps_nobody_waiting():
    bench = Bench()
    bench.add("a")
    driver, stopping, late = bench.cache._driver, threading.Event(), []
    stop = driver._callbacks.stop

    def say_so():
        stopping.set()
        return stop()

    driver._callbacks.stop = say_so

    def ask_late(_):
        assert stopping.wait(10)
        for _ in range(2):
            late.append(MoveFuture(driver, WantCopy("a", Tier.RAM), None))
            late[-1].add_done_callback(lambda _: sys.exit(1))

    with bench.mover.hold("stage") as hold:
        future = bench.cache.prefetch("a", Tier.RAM)
        assert hold.wait_reached()
        future.add_done_callback(ask_late)
        hold.release()
    bench.close()
    assert [type(each.exception(10)) for each in late] == [CacheClosedError, CacheClosedError]


def test_health_tells_that_a_thread_of_the_cache_has_ended():
    bench = Bench()
    bench.add("a", "b")
    bench.cache.prefetch("a", Tier.RAM).result()
    assert bench.cache.health().is_ready
    bench.cache._driver._ups._jobs.put(None)
    bench.pool.settle()
    health = bench.cache.health()
    assert not health.is_ready
    assert health.stalled == ("modelcache-up-0: the thread has ended",)
    bench.close()


def test_a_future_that_is_done_or_cancelled_calls_back_at_once_on_the_callers_thread():
    bench = Bench()
    bench.add("a", "b")
    here: list[bool] = []
    me = threading.get_ident()
    future = bench.cache.prefetch("a", Tier.RAM)
    future.result()
    future.add_done_callback(lambda f: here.append(f is future and threading.get_ident() == me))
    with bench.mover.hold("stage") as hold:
        other = bench.cache.prefetch("b")
        assert hold.wait_reached()
        other.add_done_callback(lambda f: here.append(f.cancelled() and threading.get_ident() == me))
        assert other.cancel()
        assert here == [True, True]
    bench.close()


def test_a_cancelled_future_counts_as_done_for_whoever_waits_for_several():
    bench = Bench()
    bench.add("a")
    seen: list[bool] = []
    with bench.mover.hold("stage") as hold:
        future = bench.cache.prefetch("a")
        assert hold.wait_reached()
        future.add_done_callback(lambda f: seen.append(f in wait([f], timeout=10).done))
        assert future.cancel()
        assert future.cancel()
        assert seen == [True]
        assert wait([future], timeout=10).done == {future}
        assert list(as_completed([future], timeout=10)) == [future]
    bench.close()


def test_a_future_whose_answer_came_first_is_not_cancelled():
    bench = Bench()
    bench.add("a")
    cancelled: list[bool] = []
    with bench.mover.hold("stage") as hold:
        future = bench.cache.prefetch("a", Tier.RAM)
        assert hold.wait_reached()
        wake = future._waiter._wake
        future._waiter._wake = lambda: (cancelled.append(future.cancel()), wake())
        hold.release()
        assert wait([future], timeout=10).done
    assert cancelled == [False]
    assert future.result() is None
    bench.close()


def test_a_future_can_be_awaited_and_ends_with_its_cache():
    bench = Bench()
    bench.add("a", "b")

    async def main():
        await asyncio.wrap_future(bench.cache.prefetch("a", Tier.RAM))
        with bench.mover.hold("stage") as hold:
            future = asyncio.wrap_future(bench.cache.prefetch("b"))
            assert hold.wait_reached()
            closing = asyncio.create_task(bench.cache.aclose())
            with pytest.raises(CacheClosedError):
                await future
            hold.release()
            await closing

    asyncio.run(main())
    with pytest.raises((CacheClosedError, UnknownModelError)):
        bench.cache.prefetch("a")
    bench.close()

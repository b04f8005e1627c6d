"""A lease that nobody returns has a name: who took it, of what, and, if that is to be noted, where."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys

import pytest
from benches import Bench, Call

from modelcache.errors import CacheClosedError, LeaseTimeoutError


def the_line_above() -> str:
    """The line before that of the caller, as a site is written."""
    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno - 1}"


@pytest.mark.parametrize("way", ["hit", "asked", "many", "task"])
def test_an_open_lease_is_named_with_its_site_wherever_somebody_looks(way, caplog):
    bench = Bench(lease_sites=True)
    bench.add("a", "b", size=30)
    if way in ("hit", "many"):
        bench.use("a")
    if way == "task":

        async def take():
            block = bench.cache.aget("a")
            await block.__aenter__()
            sites.append(the_line_above())
            return block

        sites: list[str] = []
        held = asyncio.run(take())
        site, who = sites[0], "a task that is gone"
    elif way == "many":
        held = bench.cache.lease_many("a")
        site = the_line_above()
        who = "MainThread"
    else:
        handle = bench.cache.get("a")
        held = bench.cache._door.lease("a", None)
        site = the_line_above()
        del handle
        who = "MainThread"
    bench.pass_time(5.0)
    (holder,) = bench.cache.info("a").holders
    assert holder.startswith(who)
    assert holder.endswith(f" at {site}")
    assert bench.cache.status().models[0].holders == (holder,)

    waiting = bench.call(lambda: bench.cache.get("b", timeout=1.0))
    bench.pool.settle(num_callers=1)
    bench.clock.advance(1.0)
    error = waiting.failure()
    assert isinstance(error, LeaseTimeoutError)
    assert f"a ({holder})" in str(error)
    waiting.error = error = None

    with caplog.at_level(logging.WARNING, "modelcache"):
        bench.cache.close()
    assert f"closed with open leases={{'a': [{holder!r}]}}" in caplog.text
    if way == "task":
        held = held._leases.pop()
    held.close()
    bench.close()


def test_a_lease_dropped_open_is_named_with_its_site_and_is_nobodys_any_more():
    bench = Bench(lease_sites=True)
    bench.add("a")
    bench.use("a")
    with pytest.warns(ResourceWarning) as caught:  # noqa: PT031  the site is the line of the lease
        lease = bench.cache.lease_many("a")
        line = sys._getframe().f_lineno - 1
        del lease
        gc.collect()
    (warning,) = [str(each.message) for each in caught]
    assert "a lease on 'a'" in warning
    assert f"taken at {__file__}:{line}," in warning
    assert bench.cache.info("a").holders == ()
    bench.close()


def test_without_sites_the_thread_is_named(caplog):
    bench = Bench()
    bench.add("a")
    taken = []
    Call(lambda: taken.append(bench.cache.lease_many("a")), "worker-7").result()
    assert bench.cache.info("a").holders == ("worker-7",)
    assert not bench.cache._driver.sites._leases
    with caplog.at_level(logging.WARNING, "modelcache"):
        bench.cache.close()
    assert "closed with open leases={'a': ['worker-7']}" in caplog.text
    taken.pop().close()
    with pytest.raises(CacheClosedError):
        bench.cache.info("a")
    bench.close()


def test_a_lease_that_is_kept_for_ever_holds_up_only_those_who_need_its_room():
    bench = Bench(vram=60)
    bench.add("a", "b", "c", size=20)
    bench.add("large", size=60)
    lease = bench.cache.lease_many("a")
    waiting = bench.call(lambda: bench.cache.get("large", timeout=100.0))
    bench.pool.settle(num_callers=1)
    for _ in range(3):
        bench.use("b")
    assert bench.cache.health().is_ready
    bench.clock.advance(100.0)
    assert "a (MainThread)" in str(waiting.failure())
    waiting.error = None
    lease.close()
    bench.use("large")
    bench.close()


def test_a_task_that_is_gone_may_have_left_a_lease_behind_and_others_wait_for_it():
    """Nobody can say whose it was, and asking may not harm: a weak reference to what is gone has no hash to give."""
    bench = Bench()
    bench.add("a", "b", size=40)

    async def take():
        block = bench.cache.aget("a")
        await block.__aenter__()
        return block

    block = asyncio.run(take())
    gc.collect()
    waiting = bench.call(lambda: bench.cache.lease_many("b"))
    bench.pool.settle(num_callers=1)
    assert bench.cache.info("a").holders == ("a task that is gone",)
    assert bench.cache.health().is_ready
    asyncio.run(block.__aexit__(None, None, None))
    waiting.result().close()
    waiting.value = None
    bench.close()

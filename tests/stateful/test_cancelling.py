"""Cancel at the n-th await for every n, and Ctrl-C at the n-th wait for every n: nothing is lost, nobody is disturbed."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from stateful.cancelling import STATES, Cancelled, InterruptedWaits, Scenery

from modelcache.cache import ModelCache
from modelcache.errors import ModelCacheError


@pytest.fixture(autouse=True, scope="module")
def collecting_is_cheap() -> Iterator[None]:
    """What was there before is not looked at each time that a test looks for what it left behind."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


async def get(cache: ModelCache) -> None:
    handle = await cache.aget("a")
    handle()


async def get_and_drop(cache: ModelCache) -> None:
    await cache.aget("a")
    await asyncio.sleep(0)


async def use(cache: ModelCache) -> None:
    async with cache.aget("a") as model:
        await asyncio.sleep(0)
        model()


async def use_one_in_the_other(cache: ModelCache) -> None:
    async with cache.aget("small"):
        await asyncio.sleep(0)
        async with cache.aget("a") as model:
            await asyncio.sleep(0)
            model()
        await asyncio.sleep(0)


async def get_with_a_deadline(cache: ModelCache) -> None:
    async with asyncio.timeout(None):
        await cache.aget("a", timeout=1000)


async def prefetch(cache: ModelCache) -> None:
    await asyncio.wrap_future(cache.prefetch("a"))


async def gather(cache: ModelCache) -> None:
    await asyncio.gather(use(cache), get(cache), use(cache))


async def call_what_awaits(cache: ModelCache) -> None:
    """A model whose call is a coroutine keeps its lease until that ends."""

    async def work() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    handle = await cache.aget("a")
    await handle(work)


TASKS = (get, get_and_drop, use, use_one_in_the_other, get_with_a_deadline, prefetch, gather, call_what_awaits)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("body", TASKS)
def test_a_task_cancelled_at_any_await_loses_nothing_and_disturbs_nobody(
    state: str, body: Callable[[ModelCache], Any], figure: Callable[..., None]
):
    for when in ("at once", "answered", "woken"):
        for nth in itertools.count(1):
            scenery = Scenery(state)
            scenery.bench.add("small", size=10)
            run = Cancelled(scenery, lambda: body(scenery.bench.cache), nth, when)  # noqa: B023
            where = f"{body.__name__}, {state}, cancelled {when} at await {nth}"
            if "fails" not in state:
                assert run.other_served, f"{where}: whoever waited beside it was refused"
                assert run.outcome == ("cancelled" if run.was_cancelled else "finished"), where
            scenery.heal()
            scenery.require_nothing_is_lost()
            scenery.close()
            if not run.was_reached:
                break
    figure("schedules", "a cancel at every await", 3 * nth)


def lease(cache: ModelCache) -> None:
    with cache.lease_many("a"):
        pass


def lease_two(cache: ModelCache) -> None:
    with cache.lease_many("a", "small"):
        pass


def call(cache: ModelCache) -> None:
    cache.get("a")()


def enter(cache: ModelCache) -> None:
    with cache.get("a") as model:
        model()


def wait_for_a_prefetch(cache: ModelCache) -> None:
    cache.prefetch("a").result()


def park(cache: ModelCache) -> None:
    cache.park("a")


def evict(cache: ModelCache) -> None:
    cache.evict("a")


def free(cache: ModelCache) -> None:
    cache.free(vram=15, ram=60)


def reserve(cache: ModelCache) -> None:
    with cache.reserve(vram=15, ram=60):
        pass


def resize(cache: ModelCache) -> None:
    try:
        cache.resize(vram=30, ram=40)
    finally:
        cache.resize(vram=40, ram=100)


def unregister(cache: ModelCache) -> None:
    cache.unregister("a")


THREADS = (lease, lease_two, call, enter, wait_for_a_prefetch, park, evict, free, reserve, resize, unregister)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("act", THREADS)
def test_an_interrupt_at_any_wait_loses_nothing(
    state: str, act: Callable[[ModelCache], None], figure: Callable[..., None]
):
    for late in (False, True):
        for nth in itertools.count():
            scenery = Scenery(state)
            scenery.bench.add("small", size=10)
            with InterruptedWaits(scenery, nth, late=late) as waits:
                try:
                    act(scenery.bench.cache)
                except KeyboardInterrupt:
                    assert waits.was_struck
                except ModelCacheError:
                    assert "fails" in state or act is wait_for_a_prefetch, f"{act.__name__}, {state}, wait {nth}"
            scenery.heal()
            scenery.require_nothing_is_lost()
            scenery.close()
            if not waits.was_struck:
                break
    figure("schedules", "an interrupt at every wait", 2 * (nth + 1))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_a_close_that_is_interrupted_can_be_repeated(state: str, late: bool):
    for nth in itertools.count():
        scenery = Scenery(state)
        with InterruptedWaits(scenery, nth, late=late) as waits:
            try:
                scenery.bench.cache.close()
            except KeyboardInterrupt:
                assert waits.was_struck
        scenery.heal()
        scenery.bench.close()
        assert not scenery.bench.mover.arenas.held
        if not waits.was_struck:
            break

"""Whoever is refused keeps nothing alive once he has dealt with the error, and needs no garbage collector for that."""

from __future__ import annotations

import gc
import weakref

import pytest

from modelcache.errors import CacheClosedError, LoaderError
from modelcache.testing import FakeClock, FakeModel, FakeMover, FakePool, cache_of


class Input:
    """What a caller has in his hands while he asks; in life it may be gigabytes on the device."""


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


def refused(cache, error: type[Exception], ask) -> weakref.ref[Input]:
    held = Input()
    kept = weakref.ref(held)
    with pytest.raises(error):
        ask(held)
    return kept


def ask_of(cache):
    """The ways to be refused, each with something in its frame."""
    return (
        lambda held: (held, cache.get("a")),
        lambda held: (held, cache.lease_many("a")),
        lambda held: (held, cache.evict("a")),
        lambda held: (held, cache.prefetch("a")),
    )


def test_a_caller_whose_loader_raised_keeps_nothing(no_collector):
    def broken() -> FakeModel:
        raise RuntimeError("no weights")

    pool, clock = FakePool(), FakeClock()
    cache = cache_of(FakeMover(pool), clock, pool)
    cache.register("a", broken, size=10)
    for ask in ask_of(cache)[:2]:
        assert refused(cache, LoaderError, ask)() is None
    cache.close()


def test_a_caller_of_a_closed_cache_keeps_nothing(no_collector):
    pool, clock = FakePool(), FakeClock()
    cache = cache_of(FakeMover(pool), clock, pool)
    cache.register("a", lambda: FakeModel(10), size=10)
    handle = cache.get("a")
    handle()
    asks = ask_of(cache)
    cache.close()
    for ask in (*asks, lambda held: (held, handle())):
        assert refused(cache, CacheClosedError, ask)() is None

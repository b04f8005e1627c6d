"""A signal handler may use the cache, whatever the thread that it interrupts does there; closing it ends nothing twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from benches import Call
from lifecycle.room import net, until

from modelcache import ModelCache
from modelcache.errors import CacheClosedError


@pytest.fixture
def cache() -> Iterator[ModelCache]:
    """On real threads: what stands in for them elsewhere waits in Python, where a handler may run as well."""
    with ModelCache(device="simulated", vram="64MiB", ram="64MiB", progress=False) as cache:
        for name in ("a", "b"):
            cache.register(name, lambda name=name: net(name), concurrency=1, reload=True)
        yield cache


@pytest.fixture
def handling() -> Iterator[Callable[[Callable[[], object]], Callable[[], None]]]:
    """Handle a signal so; returns what sends it to the main thread."""
    main, before = threading.main_thread().ident, signal.getsignal(signal.SIGUSR1)
    assert main is not None

    def by(act: Callable[[], object]) -> Callable[[], None]:
        signal.signal(signal.SIGUSR1, lambda number, frame: act())
        return lambda: signal.pthread_kill(main, signal.SIGUSR1)

    yield by
    signal.signal(signal.SIGUSR1, before)


def test_who_looks_and_fails_has_the_error_himself_and_the_driver_goes_on(cache):
    with pytest.raises(ZeroDivisionError):
        cache._driver.look(lambda machine: 1 / 0)
    assert Call(lambda: pytest.raises(ZeroDivisionError, cache._driver.look, lambda machine: 1 / 0)).result()
    with cache.get("a"):
        pass
    assert cache.health().is_ready


def test_it_may_look_while_the_thread_that_it_interrupts_looks(cache, handling):
    seen = []
    send = handling(lambda: seen.append((cache.status(), cache.explain("a"))))
    assert cache._driver.look(lambda machine: (send(), len(machine.books.models))[1]) == 2
    until(lambda: seen, "the signal was handled")
    assert {model.name for model in seen[0][0].models} == {"a", "b"}


def test_it_may_close_the_cache_while_the_thread_that_it_interrupts_looks(cache, handling):
    closed = []
    send = handling(lambda: closed.append(cache.close()))
    cache._driver.look(lambda machine: send())
    until(lambda: closed, "the signal was handled")
    with pytest.raises(CacheClosedError):
        cache.get("a")


def test_it_may_close_the_cache_while_the_thread_that_it_interrupts_does(cache, handling, monkeypatch):
    closed = []
    send = handling(lambda: closed.append(cache.close()))
    monkeypatch.setattr(
        ModelCache,
        "_give_up",
        lambda self, end=ModelCache._give_up: (send(), until(lambda: closed, "handled"), end(self)),
    )
    cache.close()
    assert closed == [None]
    assert cache._is_given_up


@pytest.mark.parametrize("what", ["closes", "looks"])
def test_it_is_served_while_the_thread_that_it_interrupts_waits_for_a_lease(cache, handling, what):
    lease = Call(lambda: cache.lease_many("a")).result()
    handled = []
    send = handling(lambda: handled.append(cache.close() if what == "closes" else cache.status().num_waiting))

    def come() -> None:
        until(lambda: cache.status().num_waiting, "somebody waits")
        send()
        until(lambda: handled, "the signal was handled")
        lease.close()

    caller = Call(come)
    if what == "closes":
        with pytest.raises(CacheClosedError):
            cache.get("a")
    else:
        with cache.get("a"):
            pass
        assert handled == [1]
    caller.result()


def test_it_may_register_while_the_thread_that_it_interrupts_does(cache, handling, monkeypatch):
    handled = []
    send = handling(lambda: handled.append(cache.register("d", net)))
    add = cache._registry.add
    monkeypatch.setattr(cache._registry, "add", lambda spec: (add(spec), send() if spec.name == "c" else None, None)[2])
    cache.register("c", lambda: net("c"))
    until(lambda: handled, "the signal was handled")
    assert cache.names() == ("a", "b", "c", "d")

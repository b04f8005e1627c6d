"""The way from a name to a lease: what it costs, what it counts, and what it never does."""

from __future__ import annotations

import threading

import pytest
from benches import Bench

from modelcache.errors import LeaseTimeoutError


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.close()


def test_a_hit_asks_nobody(bench):
    bench.add("a")
    bench.use("a")
    steps = bench.cache._driver._last_step_s
    bench.clock.advance(0.0)
    bench.pool.settle()
    tickets = next(bench.cache._driver._tickets)
    for _ in range(100):
        with bench.cache.get("a"):
            pass
    assert next(bench.cache._driver._tickets) == tickets + 1
    assert bench.cache._driver._last_step_s == steps


def test_the_first_hit_after_a_prefetch_has_the_model(bench):
    bench.add("a")
    bench.cache.prefetch("a").result(10)
    with bench.cache.get("a") as model:
        assert model is bench.mover.object_of("a")


def test_a_lease_that_several_could_not_get_together_is_given_back(bench):
    bench.add("a", "b", size=30)
    bench.use("a")
    with pytest.raises(Exception, match="needs 60 B"):
        bench.cache.lease_many("a", "b")
    assert bench.cache.info("a").num_leases == 0


def test_leases_are_held_in_the_callers_name(bench):
    bench.add("a")
    with bench.cache.get("a"):
        assert bench.cache.info("a").holders == ("MainThread",)
    handle = bench.cache.get("a")
    assert bench.cache.info("a").holders == ("a first use",)
    handle()


def test_the_place_a_lease_was_taken_is_told_when_it_is_dropped():
    bench = Bench(lease_sites=True)
    bench.add("a")
    bench.use("a")
    with pytest.warns(ResourceWarning, match=r"a lease on 'a', taken at .*test_door\.py:\d+, was dropped"):
        bench.cache._door.lease("a", None)
    bench.close()


def test_a_ctrl_c_while_waiting_leaves_the_queue(bench):
    bench.add("a", "b", size=40)
    with bench.cache.get("a"):
        driver = bench.cache._driver
        event = bench.pool.event()

        class Interrupted:
            def set(self):
                event.set()

            def wait(self, timeout=None):
                bench.pool.settle()
                raise KeyboardInterrupt

        make, bench.pool.event = bench.pool.event, Interrupted
        try:
            with pytest.raises(KeyboardInterrupt):
                bench.cache.get("b")
        finally:
            bench.pool.event = make
        bench.pool.settle()
        assert driver.look(lambda machine: dict(machine.waiting)) == {}
    bench.use("b")


def test_a_timeout_of_zero_takes_what_is_there_and_waits_for_nothing(bench):
    bench.add("a", "b")
    bench.use("a")
    assert bench.cache.get("a", timeout=0)(lambda: 1) == 1
    with bench.mover.hold("load", "b"), pytest.raises(LeaseTimeoutError):
        bench.cache.get("b", timeout=0)


def test_many_threads_hit_one_model_and_every_lease_is_counted(bench):
    bench.add("a")
    bench.use("a")

    def hit():
        for _ in range(200):
            with bench.cache.get("a") as model:
                model()

    calls = [bench.call(hit) for _ in range(8)]
    for call in calls:
        call.result()
    assert bench.cache.info("a").num_leases == 0
    assert bench.cache.status().counters.vram_hits == 1600
    assert threading.current_thread().name == "MainThread"

"""The way from a name to a lease: what it costs, what it counts, and what it never does."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
from benches import Bench
from interrupts import interrupted

from modelcache.errors import LeaseTimeoutError, UnknownModelError


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


def test_several_of_which_one_is_unknown_lease_nothing(bench):
    # A lease dropped on the way would warn its user of a mistake that is not his.
    bench.add("a")
    bench.use("a")
    with pytest.raises(UnknownModelError):
        bench.cache.lease_many("a", "nobody")
    assert bench.cache.info("a").num_leases == 0


def test_a_first_hit_beside_another_callers_first_lease_has_the_model(bench):
    bench.add("a")
    bench.cache.prefetch("a").result(10)
    door = bench.cache._door
    entry = door.entries["a"]

    class FilledMeanwhile(type(entry.gate)):
        """Another caller's lease brings the model right after this one has entered."""

        __slots__ = ()

        @property
        def closed(self) -> bool:
            entry.model = door._object_of("a")
            return False

    entry.gate = FilledMeanwhile.__new__(FilledMeanwhile)
    entry.gate.open, entry.gate.tick, entry.gate.limit, entry.gate.watched = {}, 0, 0, False
    with door.lease("a", None) as model:
        assert model is bench.mover.object_of("a")
    entry.model = None
    lease = door.first_use("a", None)
    assert lease.model is bench.mover.object_of("a")
    lease.close()


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


def lease_one(bench: Bench) -> None:
    with bench.cache.lease_many("a"):
        pass


def lease_both(bench: Bench) -> None:
    with bench.cache.lease_many("a", "b"):
        pass


def get_and_enter(bench: Bench) -> None:
    with bench.cache.get("a"):
        pass


def get_and_call(bench: Bench) -> None:
    bench.cache.get("a")()


def get_and_drop(bench: Bench) -> None:
    bench.cache.get("a")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("use", [lease_one, lease_both, get_and_enter, get_and_call, get_and_drop])
def test_an_interrupt_at_any_bytecode_of_a_hit_loses_no_lease(bench: Bench, use: Callable[[Bench], None]):
    bench.add("a", "b")
    bench.use("a")
    bench.use("b")
    gates = [bench.cache._door.entries[name].gate for name in ("a", "b")]
    for after in itertools.count():
        struck = interrupted(lambda: use(bench), after)
        assert [gate.num_leases for gate in gates] == [0, 0], after
        assert not bench.cache._door._first_uses._claims, after
        if not struck:
            break
    assert after > 50


def test_a_first_use_that_nobody_makes_ends_after_two_seconds_however_many_were_made_before(bench):
    bench.add("a")
    bench.use("a")
    for _ in range(3):
        bench.cache.get("a")()
        bench.clock.advance(0.5)
    kept = bench.cache.get("a")
    bench.clock.advance(1.75)
    bench.pool.settle()
    assert bench.cache.info("a").num_leases == 1
    bench.clock.advance(0.25)
    bench.pool.settle()
    assert bench.cache.info("a").num_leases == 0
    del kept


def test_one_model_leased_in_company_of_none_is_yielded_in_a_tuple(bench):
    bench.add("a")
    bench.use("a")
    leases = bench.cache.lease_many("a")
    with leases as models:
        assert models == leases.models == (bench.mover.object_of("a"),)
    assert repr(leases) == "<Leases 'a'>"


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

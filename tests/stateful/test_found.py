"""What the state machine and the enumerator found once, each as a plain story."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from benches import Bench

from modelcache.errors import BudgetExhaustedError, LeaseCycleError, LeaseTimeoutError, ModelTooLargeError
from modelcache.testing import FakeModel


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(vram=40, ram=60)
    yield bench
    bench.close()


# --- circles ----------------------------------------------------------------------------------------------------------


def test_whoever_holds_a_model_is_not_told_of_a_circle_because_a_third_one_holds_room(bench: Bench):
    bench.add("a", "b")
    block = bench.cache.reserve(vram=15)
    bench.call(block.__enter__, "somebody").result()

    def use_both() -> str:
        with bench.cache.lease_many("a"), bench.cache.lease_many("b"):
            return "served"

    caller = bench.call(use_both)
    bench.pool.settle(num_callers=1)
    assert bench.cache.status().num_waiting == 1
    block.__exit__(None, None, None)
    assert caller.result() == "served"


def test_whoever_reserves_room_that_his_own_lease_takes_is_refused(bench: Bench):
    bench.add("a", size=30)
    with bench.cache.lease_many("a"), pytest.raises(LeaseCycleError, match="holds 'a' and waits for room"):
        bench.cache.free(vram=20)
    block = bench.cache.reserve(vram=20)
    with bench.cache.lease_many("a"), pytest.raises(LeaseCycleError, match="holds 'a' and waits for room"):
        block.__enter__()
    bench.validate()


def test_whoever_asks_for_a_model_that_his_own_room_keeps_out_is_refused(bench: Bench):
    bench.add("a", size=30)
    cycle = "MainThread holds reserved room and waits for 'a'"
    with bench.cache.reserve(vram=20), pytest.raises(LeaseCycleError, match=cycle):
        bench.cache.get("a")
    bench.cache.get("a")


def test_whoever_waits_for_others_to_leave_what_he_gives_up_can_be_part_of_a_circle(bench: Bench):
    bench.add("a", "b", concurrency=1)

    def give_up_what_the_other_has() -> str:
        with bench.cache.lease_many("b"):
            bench.cache.park("a")
            return "parked"

    with bench.cache.lease_many("a"):
        other = bench.call(give_up_what_the_other_has, "other")
        bench.pool.settle(num_callers=1)
        with pytest.raises(LeaseCycleError, match="other holds 'b' and waits for 'a'"):
            bench.cache.get("b")
    assert other.result() == "parked"


def test_a_model_that_is_kept_for_whoever_gives_it_up_can_close_a_circle(bench: Bench):
    bench.add("a", "b")

    def hold_a_and_park_b() -> str:
        with bench.cache.lease_many("a"):
            bench.cache.park("b")
            return "parked"

    with bench.cache.lease_many("b"):
        parking = bench.call(hold_a_and_park_b, "parking")
        bench.pool.settle(num_callers=1)
        also = bench.call(lambda: bench.cache.park("a"), "also")
        bench.pool.settle(num_callers=2)
        # `a` is kept for `also`, who waits for `parking`, who waits for this thread.
        with pytest.raises(LeaseCycleError, match="MainThread holds 'b' and waits for 'a'"):
            bench.cache.get("a")
    assert parking.result() == "parked"
    also.result()


def test_a_circle_is_not_blamed_on_somebody_who_holds_nothing(bench: Bench):
    bench.add("a", "b", concurrency=1)

    def use_b_then_a() -> str:
        with bench.cache.lease_many("b"):
            bench.cache.park("a")
            return "served"

    with bench.cache.lease_many("a"):
        other = bench.call(use_b_then_a, "other")
        bench.pool.settle(num_callers=1)
        outsider = bench.call(lambda: bench.cache.get("b"), "outsider")
        bench.pool.settle(num_callers=2)
        with pytest.raises(LeaseCycleError):
            bench.cache.get("b")
        assert bench.cache.status().num_waiting == 2
    assert other.result() == "served"
    outsider.result()


@pytest.mark.parametrize("num_waiting", [3, 8, 12])
def test_whoever_holds_what_a_long_queue_waits_for_gets_what_fits_beside_it(bench: Bench, num_waiting: int):
    bench.add("a", "b")
    bench.add("large", size=40)

    def use_large() -> None:
        with bench.cache.lease_many("large"):
            pass

    with bench.cache.lease_many("a"):
        queue = []
        for i in range(num_waiting):
            queue.append(bench.call(use_large, f"caller-{i}"))
            bench.pool.settle(num_callers=i + 1)
        with bench.cache.lease_many("b"):
            pass
    for caller in queue:
        caller.result()
    bench.validate()


# --- room -------------------------------------------------------------------------------------------------------------


def test_a_lowered_budget_moves_nothing_into_ram_that_has_no_room_either(bench: Bench):
    bench.add("a")
    bench.use("a")
    bench.cache.resize(ram=10)
    assert bench.cache.info("a").ram_bytes == 0
    bench.cache.pin("a", "ram")
    bench.cache.resize(vram=10)
    assert bench.cache.info("a").vram_bytes == 20
    bench.cache.resize(ram=60)
    bench.pool.settle()
    assert bench.cache.info("a").vram_bytes == 0
    bench.validate()


def test_an_idle_model_gives_its_workspace_up_to_one_that_has_the_same_weights(bench: Bench):
    for name in ("a", "b"):
        bench.cache.register(name, lambda: FakeModel(parts={"same": (10,)}), size=10, workspace=20, reload=True)
    for _ in range(2):
        bench.use("a", "b")
    with bench.cache.lease_many("a"):
        assert bench.cache.status().num_waiting == 0
        with pytest.raises(ModelTooLargeError):
            bench.cache.lease_many("a", "b")
        late = bench.call(lambda: bench.cache.get("b", timeout=0))
        assert isinstance(late.failure(), LeaseTimeoutError)
    bench.validate()


def test_parking_what_ram_has_no_room_for_is_refused_when_nothing_could_make_room(bench: Bench):
    bench.add("a")
    bench.use("a")
    bench.cache.resize(ram=10)
    bench.cache.pin("a", "ram")
    with pytest.raises(BudgetExhaustedError):
        bench.cache.park("a")
    bench.validate()

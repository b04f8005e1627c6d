"""The front door over fakes: time is moved by hand, steps stand still where a test wants them to."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref

import pytest
from benches import Bench

from modelcache import Tier
from modelcache.errors import (
    BudgetExhaustedError,
    CacheClosedError,
    DevicePoisonedError,
    LeaseClosedError,
    LeaseCycleError,
    LeaseTimeoutError,
    LoaderError,
    ModelNotResidentError,
    ModelTooLargeError,
    MoveError,
    QueueFullError,
    UnknownModelError,
)
from modelcache.lease import current_holder
from modelcache.testing import FakeModel


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.close()


def bench_of(request, **options):
    bench = Bench(**options)
    request.addfinalizer(bench.close)
    return bench


# --- time is up -------------------------------------------------------------------------------------------------------


def test_a_caller_whose_time_is_up_learns_what_it_waited_for_and_who_holds_it(bench):
    bench.add("a", "b", size=40)
    with bench.cache.get("a"):
        late = bench.call(lambda: bench.cache.get("b", timeout=5))
        bench.pool.settle(num_callers=1)
        bench.pass_time(4.9)
        assert late.thread.is_alive()
        bench.pass_time(0.1)
        error = late.failure()
        assert isinstance(error, LeaseTimeoutError)
        assert isinstance(error, TimeoutError)
        assert error.waited_s == pytest.approx(5.0)
        assert error.held_by == ("a (MainThread)",)
        assert "'b' was not usable after 5.00 s: waiting for a lease on 'a' to be returned" in str(error)
    bench.validate()
    assert bench.cache.status().counters.timeouts == 1


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 10**30])
def test_a_timeout_that_never_ends_is_none(bench, timeout):
    bench.add("a", "b", size=40)
    with bench.cache.get("a"):
        patient = bench.call(lambda: bench.cache.get("b", timeout=timeout)(lambda: "served"))
        bench.pool.settle(num_callers=1)
        bench.pass_time(1e9)
        assert patient.thread.is_alive()
    assert patient.result() == "served"
    bench.validate()


@pytest.mark.parametrize(
    ("timeout", "error"), [(float("nan"), ValueError), ("5", TypeError), (True, TypeError), ([], TypeError)]
)
@pytest.mark.parametrize("what", ["get", "lease_many", "park", "evict"])
def test_a_timeout_that_is_no_time_is_refused_and_nobody_else_feels_it(bench, what, timeout, error):
    bench.add("a", "b")
    with pytest.raises(error, match="timeout must be seconds, or None to wait, got"):
        getattr(bench.cache, what)("a", timeout=timeout)
    with bench.cache.get("b"):
        late = bench.call(lambda: bench.cache.park("b", timeout=5))
        bench.pool.settle(num_callers=1)
        bench.pass_time(5.0)
        assert isinstance(late.failure(), LeaseTimeoutError)
    bench.validate()


def test_a_timeout_while_loading_names_the_load_and_the_load_goes_on(bench):
    bench.add("a")
    with bench.mover.hold("load", "a"):
        late = bench.call(lambda: bench.cache.get("a", timeout=1))
        bench.pool.settle(num_callers=1)
        bench.pass_time(1.0)
        error = late.failure()
        assert isinstance(error, LeaseTimeoutError)
        assert "its first load" in str(error)
    bench.use("a")
    assert bench.mover.num_calls("load") == 1


def test_a_timeout_during_the_move_lets_it_land_for_the_next(bench):
    bench.add("a")
    with bench.mover.hold("promote") as hold:
        late = bench.call(lambda: bench.cache.get("a", timeout=1))
        assert hold.wait_reached()
        bench.pool.settle(num_callers=1)
        bench.pass_time(1.0)
        assert isinstance(late.failure(), LeaseTimeoutError)
    bench.validate()
    bench.use("a")
    assert bench.mover.num_calls("promote") == 1


def test_one_callers_timeout_changes_nothing_for_another(bench):
    bench.add("a")
    with bench.mover.hold("stage") as hold:
        short = bench.call(lambda: bench.cache.get("a", timeout=1))
        patient = bench.call(lambda: bench.cache.get("a", timeout=100)(lambda: 7))
        assert hold.wait_reached()
        bench.pool.settle(num_callers=2)
        bench.pass_time(1.0)
        assert isinstance(short.failure(), LeaseTimeoutError)
    assert patient.result() == 7


# --- loaders ----------------------------------------------------------------------------------------------------------


def test_a_hundred_threads_on_one_cold_model_are_one_load(bench):
    bench.add("a")
    with bench.mover.hold("load", "a") as hold:
        calls = [bench.call(lambda: bench.cache.get("a")(lambda: 1)) for _ in range(100)]
        assert hold.wait_reached()
        bench.pool.settle(num_callers=100)
    assert sum(call.result() for call in calls) == 100
    assert [bench.mover.num_calls(step) for step in ("load", "stage", "promote")] == [1, 1, 1]
    bench.validate()


def test_when_a_loader_fails_each_waiter_gets_an_exception_of_its_own_with_the_same_cause(bench):
    attempts = []

    def load():
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("no such file")
        return FakeModel(20)

    bench.cache.register("a", load, size=20)
    with bench.mover.hold("load", "a") as hold:
        calls = [bench.call(lambda: bench.cache.get("a")) for _ in range(5)]
        assert hold.wait_reached()
        bench.pool.settle(num_callers=5)
    errors = [call.failure() for call in calls]
    assert {type(error) for error in errors} == {LoaderError}
    assert len({id(error) for error in errors}) == 5
    assert len({id(error.__cause__) for error in errors}) == 1
    assert isinstance(errors[0].__cause__, OSError)
    assert "raised OSError: no such file" in str(errors[0])
    assert bench.state("a") == "failed"
    assert "no such file" in bench.cache.info("a").error
    assert bench.cache.get("a")(lambda: "fine") == "fine"


@pytest.mark.parametrize("wrong", [None, 7, object()])
def test_a_loader_that_returns_something_else_is_named(bench, wrong):
    bench.cache.register("a", lambda: wrong, size=20)
    with pytest.raises(LoaderError, match=f"returned {type(wrong).__name__}"):
        bench.cache.get("a")
    bench.validate()


def test_a_loader_that_raises_no_exception_but_an_exit_keeps_the_workers_alive(bench):
    def load():
        raise SystemExit(3)

    bench.cache.register("a", load, size=20)
    bench.add("b")
    with pytest.raises(LoaderError, match="SystemExit"):
        bench.cache.get("a")
    bench.use("b")


def test_a_loader_may_get_another_model(bench):
    bench.add("base")

    def load():
        with bench.cache.get("base") as base:
            return FakeModel(len(base.weights))

    bench.cache.register("a", load)
    assert bench.cache.get("a")(lambda: 1) == 1
    bench.validate()


def test_loaders_that_wait_for_each_other_are_told_and_both_models_stay_usable_later(bench):
    in_circles = True

    def load_a():
        if in_circles:
            bench.cache.get("b")
        return FakeModel(20)

    def load_b():
        if in_circles:
            bench.cache.get("a")
        return FakeModel(20)

    bench.cache.register("a", load_a)
    bench.cache.register("b", load_b)
    with pytest.raises(LeaseCycleError) as caught:
        bench.cache.get("a")
    assert "the loader of 'b' waits for a, whose loader waits for 'b'" in str(caught.value)
    in_circles = False
    bench.use("a", "b")


def test_a_loader_may_wait_for_a_copy_of_another_model(bench):
    bench.add("b")

    def load_a():
        bench.cache.prefetch("b").result()
        return FakeModel(20)

    bench.cache.register("a", load_a)
    bench.use("a")
    assert bench.cache.info("b").vram_bytes == 20


def test_a_loader_that_waits_for_a_copy_of_its_own_model_is_told(bench):
    bench.cache.register("a", lambda: bench.cache.prefetch("a").result())
    with pytest.raises(LeaseCycleError, match="the loader of 'a' waits for a"):
        bench.cache.get("a")


def test_loaders_may_ask_for_copies_of_each_other_and_go_on(bench):
    bench.cache.register("a", lambda: (bench.cache.prefetch("b"), FakeModel(20))[1])
    bench.cache.register("b", lambda: (bench.cache.get("a"), FakeModel(20))[1])
    bench.use("a")
    bench.pool.settle()
    bench.use("b")


def test_a_loader_that_gets_its_own_model_is_told(bench):
    bench.cache.register("a", lambda: bench.cache.get("a"))
    with pytest.raises(LeaseCycleError, match="the loader of 'a' waits for a"):
        bench.cache.get("a")


def test_a_model_larger_than_a_budget_is_refused_and_nobody_is_evicted(bench):
    bench.add("a", "b")
    bench.use("a", "b")
    bench.add("huge", size=41)
    for _ in range(2):
        with pytest.raises(ModelTooLargeError, match="no model was evicted"):
            bench.cache.get("huge")
    assert bench.states() == {"a": "ready", "b": "ready", "huge": "failed"}
    # Its loader might have dispatched it, so it was called; what came is known from then on.
    assert bench.mover.num_calls("load", "huge") == 1


# --- moves that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["stage", "promote"])
def test_a_move_that_fails_is_the_callers_and_the_next_one_is_served(bench, step):
    bench.add("a")
    bench.mover.fail(step, MoveError("a", "here", "there", "broke"))
    with pytest.raises(MoveError, match="broke"):
        bench.cache.get("a")
    bench.validate()
    weights = bench.cache.get("a")(lambda: b"".join(bench.mover.object_of("a").parts[0].source))
    assert bench.mover.object_of("a").weights == weights


def test_an_unexpected_error_of_the_data_plane_is_wrapped_and_survived(bench):
    bench.add("a")
    bench.mover.fail("promote", ZeroDivisionError("oops"))
    with pytest.raises(MoveError, match="ZeroDivisionError: oops") as caught:
        bench.cache.get("a")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    bench.use("a")


def test_a_victim_that_fails_to_go_is_left_and_another_goes(bench):
    bench.add("a", "b", "c")
    bench.use("a", "b")
    bench.mover.fail("trim", name="a")
    bench.use("c")
    assert bench.states() == {"a": "ready", "b": "parked", "c": "ready"}
    bench.validate()


def test_a_poisoned_device_refuses_everybody_and_says_so_in_health(bench):
    bench.add("a", "b")
    bench.use("a")
    bench.mover.fail("promote", DevicePoisonedError("fake:0", "illegal access"))
    for name in ("b", "a", "b"):
        with pytest.raises(DevicePoisonedError, match="illegal access"):
            bench.cache.get(name)
    health = bench.cache.health()
    assert not health.is_ready
    assert "illegal access" in health.device
    calls = len(bench.mover.calls)
    with pytest.raises(DevicePoisonedError):
        bench.cache.get("a")
    assert len(bench.mover.calls) == calls


def test_writes_made_on_the_device_survive_being_parked_and_evicted(request):
    bench = bench_of(request, disk=100)
    bench.add("a", "b", "c")
    with bench.cache.get("a") as model:
        model.write(b"merged")
    bench.use("b", "c")
    assert bench.state("a") == "parked"
    assert model.weights.startswith(b"merged")
    bench.cache.evict("a")
    assert bench.state("a") == "cold"
    with bench.cache.get("a") as again:
        assert again.weights.startswith(b"merged")
    bench.validate()


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_leased_model_stays_until_its_lease_is_returned(bench):
    bench.add("a", "b", size=40)
    with bench.cache.get("a") as model:
        waiting = bench.call(lambda: bench.cache.get("b")(lambda: 1))
        bench.pool.settle(num_callers=1)
        assert model(lambda: "still here") == "still here"
    assert waiting.result() == 1
    assert bench.states() == {"a": "parked", "b": "ready"}


def test_a_model_that_was_got_stays_for_its_first_use_and_for_two_seconds_at_most(bench):
    bench.add("a", "b", size=40)
    handle = bench.cache.get("a")
    assert bench.cache.info("a").num_leases == 1
    waiting = bench.call(lambda: bench.cache.get("b")(lambda: 1))
    bench.pool.settle(num_callers=1)
    bench.pass_time(1.9)
    assert waiting.thread.is_alive()
    bench.pass_time(0.2)
    assert waiting.result() == 1
    assert handle(lambda: "back again") == "back again"


def test_a_handle_that_is_dropped_gives_its_first_use_lease_back(bench):
    bench.add("a")
    handle = bench.cache.get("a")
    del handle
    gc.collect()
    assert bench.cache.info("a").num_leases == 0


def test_a_use_ends_the_first_use_lease(bench):
    bench.add("a")
    handle = bench.cache.get("a")
    handle()
    assert bench.cache.info("a").num_leases == 0


def test_a_hit_waits_for_no_other_models_move(bench):
    bench.add("a", "b")
    bench.use("a")
    with bench.mover.hold("stage", "b") as hold:
        slow = bench.call(lambda: bench.cache.get("b"))
        assert hold.wait_reached()
        assert bench.cache.get("a")(lambda: "at once") == "at once"
    slow.result()


def test_one_lease_at_a_time_is_one_lease_at_a_time(bench):
    bench.add("a", concurrency=1)
    inside, most = set(), []

    def work():
        token = object()
        inside.add(token)
        most.append(len(inside))
        inside.discard(token)

    calls = [bench.call(lambda: bench.cache.get("a")(work)) for _ in range(20)]
    for call in calls:
        call.result()
    assert max(most) == 1
    assert len(most) == 20


def test_the_same_thread_may_enter_twice_even_where_one_lease_is_allowed(bench):
    bench.add("a", concurrency=1)
    handle = bench.cache.get("a")
    with handle as outer, handle as inner:
        assert outer is inner


def test_several_models_are_leased_at_once(bench):
    bench.add("a", "b", "c")
    with bench.cache.lease_many("a", "b") as (a, b):
        assert (a.name, b.name) == ("a", "b")
        with pytest.raises(LeaseCycleError, match="lease_many"):
            bench.cache.get("c")
    bench.use("c")
    bench.validate()


def test_two_callers_of_several_in_opposite_order_never_wait_for_each_other(bench):
    bench.add("a", "b")

    def work(*names):
        for _ in range(50):
            with bench.cache.lease_many(*names) as models:
                assert len(models) == 2

    calls = [bench.call(lambda names=names: work(*names)) for names in (("a", "b"), ("b", "a"))]
    for call in calls:
        call.result()


def test_callers_that_hold_and_wait_in_a_circle_are_told_apart(bench):
    bench.add("a", "b", "c", "d")
    both = threading.Barrier(2)

    def work(mine, other):
        with bench.cache.get(mine):
            both.wait(5)
            with bench.cache.get(other):
                return "served"

    bench.use("a", "b")
    calls = [bench.call(lambda: work("a", "c"), "first"), bench.call(lambda: work("b", "d"), "second")]
    outcomes = []
    for call in calls:
        call.thread.join(10)
        assert not call.thread.is_alive()
        outcomes.append(call.value or type(call.error).__name__)
    assert sorted(outcomes) == ["LeaseCycleError", "served"]
    error = next(call.error for call in calls if call.error)
    assert "holds 'a' and waits for 'c'" in str(error)
    assert "holds 'b' and waits for 'd'" in str(error)
    assert "first" in str(error)
    assert "second" in str(error)


@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_lease_many_takes_each_model_once(bench, names):
    bench.add("a")
    with pytest.raises(ValueError, match="each model once"):
        bench.cache.lease_many(*names)


def test_a_lease_cannot_be_used_once_it_was_returned(bench):
    bench.add("a")
    leases = bench.cache.lease_many("a")
    leases.close()
    leases.close()
    with pytest.raises(LeaseClosedError, match="already returned"):
        _ = leases.models


def test_too_many_waiting_callers_are_refused(request):
    bench = bench_of(request, max_waiters=2)
    bench.add("a", "b", size=40)
    with bench.cache.get("a"):
        calls = [bench.call(lambda: bench.cache.get("b")) for _ in range(2)]
        bench.pool.settle(num_callers=2)
        third = bench.call(lambda: bench.cache.get("b"))
        assert isinstance(third.failure(), QueueFullError)
    for call in calls:
        call.result()
        call.value = None


def test_with_reject_nobody_waits_for_leases(request):
    bench = bench_of(request, when_full="reject")
    bench.add("a", "b", size=40)
    with bench.cache.get("a"), pytest.raises(BudgetExhaustedError, match="leased: a"):
        bench.cache.get("b")


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_tasks_get_handles_and_models(bench):
    bench.add("a")

    async def main():
        handle = await bench.cache.aget("a")
        assert handle(lambda: 3) == 3
        async with bench.cache.aget("a") as model:
            assert model(lambda: 4) == 4
            assert bench.cache.info("a").num_leases == 1
        assert bench.cache.info("a").num_leases == 0

    asyncio.run(main())


def test_a_waiting_task_does_not_block_its_loop(bench):
    bench.add("a", "b", size=40)

    async def main():
        async with bench.cache.aget("a"):
            waiting = asyncio.ensure_future(wait_for("b"))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not waiting.done()
        assert await waiting == 1

    async def wait_for(name):
        async with bench.cache.aget(name) as model:
            return model(lambda: 1)

    asyncio.run(main())


def test_a_tasks_time_passes_on_the_caches_clock(bench):
    bench.add("a", "b", size=40)

    async def main():
        async with bench.cache.aget("a"):
            late = asyncio.ensure_future(bench.cache.aget("b", timeout=5)._handle())
            await asyncio.sleep(0)
            bench.pool.settle()
            bench.pass_time(5)
            with pytest.raises(LeaseTimeoutError) as caught:
                await late
            assert caught.value.held_by[0].startswith("a (Task-")

    asyncio.run(main())


@pytest.mark.parametrize("at", range(12))
def test_a_task_cancelled_at_any_suspension_loses_no_lease_and_disturbs_nobody(bench, at):
    bench.add("a", "b", size=40)

    async def use():
        async with bench.cache.aget("a") as model:
            model()
            await asyncio.sleep(0)
        handle = await bench.cache.aget("b")
        handle()
        async with bench.cache.aget("a"):
            await asyncio.sleep(0)

    async def main():
        task = asyncio.ensure_future(use())
        other = asyncio.ensure_future(use())
        for _ in range(at):
            await asyncio.sleep(0)
            bench.pool.settle()
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        await other

    asyncio.run(main())
    gc.collect()
    bench.validate()
    assert [bench.cache.info(name).num_leases for name in "ab"] == [0, 0]
    assert bench.cache.status().num_waiting == 0


def test_a_loop_that_closes_while_its_task_waits_leaves_nothing_behind(bench):
    bench.add("a", "b", size=40)
    loop = asyncio.new_event_loop()
    with bench.cache.get("a"):
        task = loop.create_task(bench.cache.aget("b")._handle())
        loop.run_until_complete(asyncio.sleep(0))
        bench.pool.settle()
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
    bench.validate()
    assert bench.cache.status().num_waiting == 0


def test_a_task_that_dies_with_a_lease_gives_it_back(bench):
    bench.add("a")

    async def main():
        holder = current_holder()
        assert isinstance(holder, weakref.ref)
        lease = bench.cache._door.lease("a", None)
        del lease

    with pytest.warns(ResourceWarning, match="a lease on 'a' was dropped"):
        asyncio.run(main())
    assert bench.cache.info("a").num_leases == 0


# --- explicit moves ---------------------------------------------------------------------------------------------------


def test_park_and_evict_say_what_was_freed_as_it_was_measured(request):
    bench = bench_of(request, disk=100)
    bench.add("a")
    bench.use("a")
    assert bench.cache.park("a").vram_bytes == 20
    assert bench.cache.evict("a").ram_bytes == 20
    assert bench.mover.num_released == 2
    assert bench.state("a") == "cold"


def test_parking_waits_for_leases_and_its_time_can_be_up(bench):
    bench.add("a")
    with bench.cache.get("a"):
        park = bench.call(lambda: bench.cache.park("a", timeout=3))
        bench.pool.settle(num_callers=1)
        bench.pass_time(3)
        assert isinstance(park.failure(), LeaseTimeoutError)
        other = bench.call(lambda: bench.cache.get("a")(lambda: 1))
        assert other.result() == 1


def test_parking_what_one_holds_oneself_is_refused(bench):
    bench.add("a")
    with bench.cache.get("a"), pytest.raises(LeaseCycleError, match="the caller itself"):
        bench.cache.park("a")


def test_a_model_is_not_given_up_to_vram(bench):
    bench.add("a")
    with pytest.raises(ValueError, match=r"Tier\.RAM or Tier\.DISK"):
        bench.cache.evict("a", to=Tier.VRAM)


def test_freeing_makes_room_least_recently_used_first(bench):
    bench.add("a", "b")
    bench.use("a", "b", "a")
    assert bench.cache.free(vram=20).vram_bytes == 20
    assert bench.states() == {"a": "ready", "b": "parked"}


def test_freeing_asks_for_a_size(bench):
    with pytest.raises(ValueError, match="say how much"):
        bench.cache.free()


def test_reserved_room_is_other_peoples_until_the_block_ends(bench):
    bench.add("a", "b")
    bench.use("a", "b")
    with bench.cache.reserve(vram=30):
        assert bench.cache.status().tier(Tier.VRAM).reserved_bytes == 30
        assert "ready" not in bench.states().values()
        waiting = bench.call(lambda: bench.cache.get("a")(lambda: 1))
        bench.pool.settle(num_callers=1)
        assert waiting.thread.is_alive()
    assert waiting.result() == 1
    bench.validate()
    assert bench.cache.status().tier(Tier.VRAM).reserved_bytes == 0


def test_room_that_is_not_to_be_had_in_time_holds_nothing(bench):
    bench.add("a", size=40)
    with bench.cache.get("a"):

        def reserve():
            with bench.cache.reserve(vram=10, timeout=2):
                pass

        late = bench.call(reserve)
        bench.pool.settle()
        bench.pass_time(2)
        assert isinstance(late.failure(), LeaseTimeoutError)
    bench.validate()


def test_a_lowered_budget_is_reached_as_leases_are_returned(bench):
    bench.add("a", "b")
    with bench.cache.get("a"):
        bench.use("b")
        bench.cache.resize(vram=10)
        vram = bench.cache.status().tier(Tier.VRAM)
        assert (vram.resident_bytes, vram.deficit_bytes) == (20, 10)
        assert bench.states() == {"a": "ready", "b": "parked"}
    bench.pool.settle()
    vram = bench.cache.status().tier(Tier.VRAM)
    assert (vram.resident_bytes, vram.deficit_bytes, vram.budget_bytes) == (0, 0, 10)
    with pytest.raises(ModelTooLargeError):
        bench.cache.get("a")
    bench.cache.resize(vram=40)
    bench.use("a")


def test_a_pinned_model_stays_and_what_needs_its_room_is_refused(bench):
    bench.add("a", "b", size=40)
    bench.use("a")
    bench.cache.pin("a")
    with pytest.raises(BudgetExhaustedError, match="pinned"):
        bench.cache.get("b")
    bench.cache.unpin("a")
    bench.use("b")


def test_a_prefetch_is_a_future(bench):
    bench.add("a", "b")
    future = bench.cache.prefetch("a")
    future.result(10)
    assert bench.state("a") == "ready"
    bench.cache.prefetch("b", Tier.RAM).result(10)
    assert bench.state("b") == "parked"


def test_a_cancelled_prefetch_lets_what_is_in_flight_land_and_starts_nothing_more(bench):
    bench.add("a")
    with bench.mover.hold("stage") as hold:
        future = bench.cache.prefetch("a")
        assert hold.wait_reached()
        assert future.cancel()
        assert future.cancelled()
    bench.validate()
    assert bench.state("a") == "parked"


def test_a_prefetch_without_room_is_given_up(bench):
    bench.add("a", "b", size=40)
    with bench.cache.get("a"), pytest.raises(BudgetExhaustedError):
        bench.cache.prefetch("b").result(10)


def test_an_idle_model_is_parked_after_its_time(bench):
    bench.add("a", idle="10s")
    bench.add("b", idle="never")
    bench.use("a", "b")
    bench.pass_time(9.9, step=2.5)
    assert bench.states() == {"a": "ready", "b": "ready"}
    bench.pass_time(6.0, step=0.5)
    assert bench.states() == {"a": "parked", "b": "ready"}
    assert bench.cache.get("a")(lambda: 1) == 1


# --- registering ------------------------------------------------------------------------------------------------------


def test_a_name_is_registered_once(bench):
    bench.add("a")
    with pytest.raises(ValueError, match="registered already"):
        bench.add("a")
    assert "a" in bench.cache
    assert len(bench.cache) == 1


def test_an_unknown_name_is_an_error_that_knows_the_nearest(bench):
    bench.add("llama")
    for ask in (bench.cache.get, bench.cache.info, bench.cache.park, bench.cache.pin, bench.cache.explain):
        with pytest.raises(UnknownModelError, match="did you mean 'llama'"):
            ask("lama")


def test_the_decorator_registers_and_returns_the_loader(bench):
    @bench.cache.model("a", size=20)
    def load():
        return FakeModel(20)

    assert load() is not load()
    bench.use("a")


def test_an_unregistered_model_is_gone_with_its_bytes_and_its_name_is_free(bench):
    bench.add("a")
    bench.use("a")
    bench.cache.unregister("a")
    bench.validate()
    assert bench.cache.names() == ()
    assert bench.mover.arenas.held.vram == bench.mover.arenas.held.ram == 0
    with pytest.raises(UnknownModelError):
        bench.cache.get("a")
    bench.add("a")
    bench.use("a")


def test_a_leased_model_leaves_when_its_lease_is_returned(bench):
    bench.add("a")
    with bench.cache.get("a") as model:
        bench.cache.unregister("a")
        with pytest.raises(UnknownModelError):
            bench.cache.get("a")
        with pytest.raises(ValueError, match="still leased"):
            bench.add("a")
        assert model(lambda: 1) == 1
    bench.validate()
    assert bench.mover.arenas.held.vram == 0
    bench.add("a")
    bench.use("a")


def test_unregistering_twice_is_an_error_that_says_so(bench):
    bench.add("a")
    bench.cache.unregister("a")
    with pytest.raises(UnknownModelError):
        bench.cache.unregister("a")


def test_models_that_share_a_part_keep_it_while_one_of_them_holds_it(bench):
    for name in ("a", "b"):
        bench.cache.register(name, lambda name=name: FakeModel(parts={"common": (10,), f"own-{name}": (5,)}))
    bench.use("a", "b")
    assert bench.mover.arenas.held.vram == 20
    bench.cache.unregister("a")
    bench.validate()
    assert bench.mover.arenas.held.vram == 15
    assert bench.cache.get("b")(lambda: 1) == 1


# --- looking ----------------------------------------------------------------------------------------------------------


def test_looking_is_never_a_use(bench):
    bench.add("a", "b")
    bench.use("a", "b")
    before = [bench.cache.info(name).last_use for name in "ab"]
    for name in "ab":
        bench.cache.info(name)
        bench.cache.explain(name)
        bench.cache.plan(name)
    bench.cache.status()
    bench.cache.health()
    bench.cache.events()
    repr(bench.cache)
    assert [bench.cache.info(name).last_use for name in "ab"] == before
    assert bench.cache.status().counters.vram_hits == 0


def test_hits_are_counted_by_where_the_model_was_found(bench):
    bench.add("a", "b", size=40)
    bench.use("a", "b", "a", "a", "a")
    counters = bench.cache.status().counters
    assert (counters.disk_hits, counters.ram_hits, counters.vram_hits) == (2, 1, 2)


def test_events_tell_the_whole_story_in_order(bench):
    bench.add("a", "b", size=40)
    bench.use("a", "b")
    told = [(str(e.kind), e.model, str(e.reason), e.on_behalf_of) for e in bench.cache.events()]
    promoted = ("promote", "b", "request", "b")
    assert told[:2] == [("stage", "a", "request", "a"), ("promote", "a", "request", "a")]
    # Bringing b to RAM and giving a's VRAM up go on at the same time; b comes up after both.
    assert set(told[2:4]) == {("stage", "b", "request", "b"), ("trim", "a", "lru", "b")}
    assert told[4:] == [promoted]
    assert [event.seq for event in bench.cache.events()] == [1, 2, 3, 4, 5]


def test_subscribers_are_told_until_they_end_it_and_one_that_raises_disturbs_nobody(bench, caplog):
    bench.add("a", "b")
    told = []

    def raises(event):
        raise ValueError("mine")

    bench.cache.on("move", raises)
    end = bench.cache.on("promote", lambda event: told.append(event.model))
    bench.use("a")
    bench.pool.settle()
    assert told == ["a"]
    end()
    with caplog.at_level(logging.ERROR, "modelcache"):
        bench.use("b")
        bench.pool.settle()
    assert told == ["a"]
    assert "subscriber failed" in caplog.text


def test_a_subscriber_that_blocks_holds_up_no_move(bench):
    bench.add("a", "b")
    with bench.pool.hold() as hold:
        bench.cache.on("move", lambda event: hold.stand())
        bench.use("a", "b")
        assert hold.is_reached


def test_a_subscriber_may_call_the_cache(bench):
    bench.add("a", "b")
    seen = []
    bench.cache.on("stage", lambda event: seen.append(bench.cache.info(event.model).state))
    bench.use("a")
    bench.pool.settle()
    assert len(seen) == 1


def test_an_unknown_topic_is_an_error(bench):
    with pytest.raises(ValueError, match="choose one of"):
        bench.cache.on("evicted", print)


def test_a_plan_says_what_would_happen_and_nothing_does(bench):
    bench.add("a", "b", "c")
    bench.use("a", "b")
    plan = bench.cache.plan("c")
    assert (plan.fits, plan.vram_bytes, plan.gives_up) == (True, 20, ("a",))
    assert not bench.cache.plan("a", "b", "c").fits
    assert bench.states() == {"a": "ready", "b": "ready", "c": "cold"}


def test_an_explanation_is_in_words(bench):
    bench.add("a", "b", size=40, pin="ram")
    with bench.cache.get("a"):
        waiting = bench.call(lambda: bench.cache.get("b")(lambda: 1))
        bench.pool.settle(num_callers=1)
        assert "it is leased 1 time(s), so it does not move" in bench.cache.explain("a")
        assert "waits for a lease on 'a' to be returned" in bench.cache.explain("b")
    waiting.result()
    assert "coming up takes 40 B of vram, and b would give room" in bench.cache.explain("a")


def test_health_turns_bad_when_somebody_waits_and_nothing_moves(bench):
    bench.add("a", "b", size=40)
    assert bench.cache.health().is_ready
    with bench.cache.get("a"):
        waiting = bench.call(lambda: bench.cache.get("b"))
        bench.pool.settle(num_callers=1)
        bench.pass_time(30)
        health = bench.cache.health()
        assert health.oldest_wait_s == pytest.approx(30)
    waiting.result()
    waiting.value = None
    assert bench.cache.health().oldest_wait_s is None


# --- the end ----------------------------------------------------------------------------------------------------------


def test_closing_wakes_everybody_who_waits(bench):
    bench.add("a", "b", "c", size=40)
    holder = bench.cache.lease_many("a")
    calls = [bench.call(lambda: bench.cache.get("b", timeout=60)) for _ in range(3)]
    futures = [bench.cache.prefetch("c", Tier.RAM)]
    bench.pool.settle(num_callers=3)
    bench.cache.close()
    for call in calls:
        assert isinstance(call.failure(), CacheClosedError)
    for future in futures:
        assert future.done()
    holder.close()


def test_a_task_that_waits_is_woken_by_closing(bench):
    bench.add("a", "b", size=40)

    async def main():
        async with bench.cache.aget("a"):
            waiting = asyncio.ensure_future(bench.cache.aget("b")._handle())
            await asyncio.sleep(0)
            bench.pool.settle()
            await bench.cache.aclose()
            with pytest.raises(CacheClosedError):
                await waiting

    asyncio.run(main())


@pytest.mark.parametrize("step", ["load", "stage", "promote"])
def test_closing_in_the_middle_of_a_step_lets_it_end_and_leaves_nothing(step):
    bench = Bench()
    bench.add("a")
    with bench.mover.hold(step) as hold:
        caller = bench.call(lambda: bench.cache.get("a"))
        assert hold.wait_reached()
        closing = bench.call(bench.cache.close)
        assert isinstance(caller.failure(), CacheClosedError)
        assert closing.thread.is_alive()
    closing.result()
    bench.close()
    assert not bench.mover.arenas.held


def test_closing_does_not_wait_for_ever_for_a_loader(caplog):
    bench = Bench()
    stuck, go = threading.Event(), threading.Event()

    def load():
        stuck.set()
        go.wait()
        return FakeModel(20)

    bench.cache.register("a", load)
    caller = bench.call(lambda: bench.cache.get("a"))
    assert stuck.wait(10)
    with caplog.at_level(logging.WARNING, "modelcache"):
        closing = bench.call(bench.cache.close)
        assert isinstance(caller.failure(), CacheClosedError)
        while closing.thread.is_alive():
            bench.clock.advance(1.0)
            closing.thread.join(0.05)
    closing.result()
    assert "closed while loading models=['a']" in caplog.text
    go.set()
    loaders = [t for t in threading.enumerate() if t.name.startswith("modelcache-load")]
    for loader in loaders:
        loader.join(10)
    bench.close()


def test_closing_twice_and_from_many_threads_is_fine(bench):
    bench.add("a")
    bench.use("a")
    calls = [bench.call(bench.cache.close) for _ in range(8)]
    for call in calls:
        call.result()
    bench.cache.close()
    assert repr(bench.cache) == "<ModelCache, closed>"


def test_a_closed_cache_refuses_everything_in_words(bench):
    bench.add("a")
    handle = bench.cache.get("a")
    handle()
    bench.cache.close()
    asks = [
        lambda: bench.cache.get("a"),
        lambda: bench.cache.lease_many("a"),
        lambda: bench.cache.prefetch("a"),
        lambda: bench.cache.park("a"),
        lambda: bench.cache.free(vram=1),
        lambda: bench.cache.resize(vram=1),
        lambda: bench.cache.register("b", FakeModel),
        lambda: bench.cache.unregister("a"),
        lambda: bench.cache.info("a"),
        lambda: handle(),
    ]
    for number, ask in enumerate(asks):
        with pytest.raises(CacheClosedError, match="create a new ModelCache"):
            pytest.fail(f"{number}: {ask()}")


def test_closing_with_open_leases_names_who_holds_them(caplog):
    bench = Bench()
    bench.add("a")
    with bench.cache.get("a"), caplog.at_level(logging.WARNING, "modelcache"):
        bench.cache.close()
    assert "closed with open leases={'a': ['MainThread']}" in caplog.text
    bench.close()


def test_a_model_leased_while_its_cache_closes_can_be_used_to_the_end():
    bench = Bench()
    bench.add("a", "b", size=30)
    bench.use("b")
    lease = bench.cache.lease_many("a")
    (model,) = lease.models
    other = bench.mover.object_of("b")
    bench.cache.close()
    model()
    with pytest.raises(ModelNotResidentError):
        other()
    lease.close()
    bench.close()


def test_a_handle_that_was_not_used_yet_is_refused_once_its_cache_is_closed():
    bench = Bench()
    bench.add("a")
    handle = bench.cache.get("a")
    bench.cache.close()
    with pytest.raises(CacheClosedError):
        handle()
    bench.close()


def test_a_block_closes_its_cache():
    bench = Bench()
    bench.add("a")
    with bench.cache as cache:
        cache.get("a")()
    with pytest.raises(CacheClosedError):
        bench.cache.get("a")
    bench.close()


def test_a_machine_without_an_accelerator_uses_ram_as_its_top(request):
    bench = bench_of(request, top=Tier.RAM, ram=40)
    bench.add("a", "b", "c")
    bench.use("a", "b", "c")
    assert bench.states() == {"a": "cold", "b": "ready", "c": "ready"}
    assert bench.mover.arenas.held.vram == 0
    bench.validate()


def test_memory_comes_back_when_a_cache_is_gone():
    bench = Bench()
    bench.add("a")
    bench.use("a")
    model = weakref.ref(bench.mover.object_of("a"))
    cache = weakref.ref(bench.cache)
    bench.close()
    del bench
    gc.collect()
    assert model() is None
    assert cache() is None

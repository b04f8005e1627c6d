"""The driver alone: its clock, its waiters, its end, and what it does about a bug of its own."""

from __future__ import annotations

import pickle
import threading

import pytest
from benches import Bench, Call

from modelcache.core.cycles import name_of
from modelcache.core.messages import WantCopy, WantLease, WantRoom
from modelcache.errors import (
    CacheClosedError,
    InvalidTransitionError,
    LeaseTimeoutError,
    LoaderError,
    MoveError,
)
from modelcache.lease import Lease
from modelcache.runtime.driver import _caused, own_copy
from modelcache.runtime.gate import Gate
from modelcache.testing import FakeModel
from modelcache.tier import Tier


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.close()


def test_a_bug_of_its_own_stops_deciding_leaves_nobody_waiting_and_says_so(caplog):
    bench = Bench()
    bench.add("a", "b", size=40)
    driver = bench.cache._driver
    with bench.cache.get("a"):
        waiting = bench.call(lambda: bench.cache.get("b"))
        bench.pool.settle(num_callers=1)
        driver._machine._lease_returned = lambda name: 1 / 0
        driver.lease_returned("a")
        error = waiting.failure()
    assert isinstance(error, InvalidTransitionError)
    assert "bug in modelcache" in str(error)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert not bench.cache.health().is_ready
    with pytest.raises(InvalidTransitionError):
        bench.cache.get("b")
    assert "the driver met a bug" in caplog.text
    bench.cache.close()
    assert bench.pool.thread_names == ()


def test_a_bug_while_something_moves_does_not_hold_up_the_end():
    bench = Bench()
    bench.add("a")
    with bench.mover.hold("stage") as hold:
        waiting = bench.call(lambda: bench.cache.get("a"))
        assert hold.wait_reached()
        bench.cache._driver._machine._lease_returned = lambda name: 1 / 0
        bench.cache._driver.lease_returned("a")
        assert isinstance(waiting.failure(), InvalidTransitionError)
        closing = bench.call(bench.cache.close)
    closing.result()
    assert bench.pool.thread_names == ()


def test_an_answer_that_comes_with_the_timeout_is_one_of_them_and_loses_nothing(bench):
    bench.add("a")
    for _ in range(30):
        with bench.mover.hold("promote") as hold:
            caller = bench.call(lambda: bench.cache.get("a", timeout=1))
            assert hold.wait_reached()
            bench.pool.settle(num_callers=1)
            hold.release()
            bench.clock.advance(1.0)
            caller.thread.join(10)
            assert (caller.error is None) or isinstance(caller.error, LeaseTimeoutError)
            caller.value = None
        bench.pool.settle()
        assert bench.cache.info("a").num_leases == 0
        bench.cache.park("a")


def test_leaving_gives_back_leases_that_came_first(bench):
    bench.add("a")
    bench.use("a")
    driver = bench.cache._driver
    woken = threading.Event()
    waiter = driver.waiter(woken.set)
    driver.post(WantLease(("a",), None), waiter, None, bench.cache._door._lender(Lease))
    assert woken.wait(10)
    assert bench.cache.info("a").num_leases == 1
    driver.leave(waiter)
    bench.pool.settle()
    assert bench.cache.info("a").num_leases == 0


def test_a_lease_granted_to_a_caller_who_has_just_left_is_given_back(bench):
    bench.add("a")
    driver = bench.cache._driver
    waiter = driver.waiter(lambda: None)
    waiter.leave()
    driver.post(WantLease(("a",), None), waiter, None, bench.cache._door._lender(Lease))
    bench.pool.settle()
    assert bench.state("a") == "ready"
    assert bench.cache.info("a").num_leases == 0


class EnteredWhileClosing(Gate):
    """A caller gets in at the last moment before it is closed."""

    __slots__ = ()

    def close(self) -> None:
        self.enter(10**6, "the last one in")
        super().close()


def test_a_caller_who_gets_in_right_before_the_gate_closes_keeps_the_model(bench):
    bench.add("a")
    bench.use("a")
    driver = bench.cache._driver
    gate = driver.gates["a"] = EnteredWhileClosing()
    gate.open_()
    parking = bench.call(lambda: bench.cache.park("a"))
    bench.pool.settle(num_callers=1)
    assert gate.num_leases == 1
    assert bench.state("a") == "ready"
    gate.leave(10**6)
    driver.lease_returned("a")
    parking.result()
    assert bench.state("a") == "parked"


class LeftUnseen(Gate):
    """Its last lease comes back right before it is watched, so its holder tells nobody."""

    __slots__ = ("is_seen",)

    def __init__(self) -> None:
        self.is_seen = False
        super().__init__()

    @property
    def watched(self) -> bool:
        return self.is_seen

    @watched.setter
    def watched(self, is_seen: bool) -> None:
        if is_seen:
            self.open.clear()
        self.is_seen = is_seen


def test_a_lease_that_came_back_right_before_its_gate_was_watched_still_makes_room(bench):
    bench.add("a", "b", size=40)
    bench.use("a")
    driver = bench.cache._driver
    gate = driver.gates["a"] = LeftUnseen()
    gate.open_()
    gate.enter(10**6, "somebody")
    bench.call(lambda: bench.use("b")).result()
    assert bench.state("b") == "ready"


def test_a_stored_cause_keeps_no_frame_of_the_loader_alive():
    try:
        1 / 0
    except ZeroDivisionError as error:
        stored = _caused(LoaderError("a", "m:load", "broke"), error)
    assert stored.__cause__.__traceback__ is None
    assert "1 / 0" in stored.__notes__[0]


def test_room_that_is_granted_to_nobody_is_given_back(bench):
    driver = bench.cache._driver
    waiter = driver.waiter(lambda: None)
    waiter.leave()
    driver.post(WantRoom(Tier.VRAM, 10, hold=True), waiter, None)
    bench.pool.settle()
    bench.validate()
    assert bench.cache.status().tier(Tier.VRAM).reserved_bytes == 0


def test_what_is_asked_after_the_end_is_refused():
    bench = Bench()
    bench.add("a")
    driver = bench.cache._driver
    bench.close()
    with pytest.raises(CacheClosedError):
        driver.ask(WantCopy("a", Tier.RAM))
    driver.stop()


def test_things_that_last_equally_long_end_in_order(bench):
    ended = []
    for n in range(3):
        bench.cache._driver.at_latest(2.0, lambda n=n: ended.append(n))
        bench.clock.advance(0.5)
    bench.pool.settle()
    assert ended == []
    for expected in ([0], [0, 1], [0, 1, 2]):
        bench.pass_time(0.5)
        assert ended == expected


def test_the_age_of_the_oldest_request_is_told(bench):
    bench.add("a")
    with bench.mover.hold("load") as hold:
        caller = bench.call(lambda: bench.cache.get("a"))
        assert hold.wait_reached()
        bench.pool.settle(num_callers=1)
        bench.clock.advance(7.0)
        assert bench.cache._driver.waits()[0] == pytest.approx(7.0)
    caller.result()
    caller.value = None


def test_nothing_of_users_or_of_the_data_plane_runs_under_the_lock(bench):
    seen = []
    bench.cache.on("move", lambda event: seen.append(bench.pool.is_locked_here))
    bench.cache.register("a", lambda: seen.append(bench.pool.is_locked_here) or FakeModel(5))
    bench.use("a")
    assert seen == [False, False, False]


def test_moves_of_different_models_go_on_at_the_same_time(bench):
    bench.add("a", "b")
    with bench.mover.hold("stage", "a") as first, bench.mover.hold("stage", "b") as second:
        calls = [bench.call(lambda name=name: bench.cache.get(name)(lambda: 1)) for name in "ab"]
        assert first.wait_reached()
        assert second.wait_reached()
    assert [call.result() for call in calls] == [1, 1]


def test_every_waiter_gets_a_copy_that_keeps_fields_and_cause():
    error = LoaderError("a", "load", "raised OSError")
    error.__cause__ = OSError("x")
    own = own_copy(error)
    assert own is not error
    assert (str(own), own.name, own.__cause__) == (str(error), "a", error.__cause__)
    assert pickle.loads(pickle.dumps(own)).problem == own.problem
    assert str(own_copy(MoveError("a", "ram", "vram", "broke"))) == str(MoveError("a", "ram", "vram", "broke"))


def test_holders_have_names():
    assert name_of(threading.main_thread()) == "MainThread"
    assert name_of(None) == "a first use"
    assert name_of(7) == "7"


def test_a_call_of_this_suite_that_fails_says_so():
    with pytest.raises(ZeroDivisionError):
        Call(lambda: 1 / 0).result()

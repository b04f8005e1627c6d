"""What clocks, mailboxes and pools must do, the real ones and the fakes."""

import gc
import threading

import pytest

from modelcache.runtime.threads import SystemClock, ThreadPool
from modelcache.testing import FakeClock, FakePool


class Real:
    def __init__(self):
        self.clock, self.pool = SystemClock(), ThreadPool()

    def pass_time(self, seconds):
        """Real time passes by itself."""


class Fake:
    def __init__(self):
        self.clock, self.pool = FakeClock(), FakePool()

    def pass_time(self, seconds):
        self.clock.advance(seconds)


@pytest.fixture(params=[Real, Fake])
def world(request):
    return request.param()


def started(world, do):
    found = []
    thread = world.pool.spawn("modelcache-test", lambda: found.append(do()))
    return thread, found


def test_time_never_goes_back(world):
    first = world.clock.now_s()
    world.pass_time(1.0)
    assert world.clock.now_s() >= first


def test_a_mailbox_gives_things_in_the_order_they_came(world):
    mailbox = world.pool.mailbox(world.clock)
    for item in (1, "two", None, 3.0):
        mailbox.put(item)
    assert [mailbox.get(None) for _ in range(4)] == [1, "two", None, 3.0]


def test_a_mailbox_gives_what_is_there_although_its_time_is_up(world):
    mailbox = world.pool.mailbox(world.clock)
    mailbox.put("late")
    assert mailbox.get(world.clock.now_s() - 10) == "late"
    assert mailbox.get(world.clock.now_s() - 10) is None


def test_a_mailbox_wakes_its_reader_for_an_item_and_for_the_time(world):
    mailbox = world.pool.mailbox(world.clock)
    thread, found = started(world, lambda: (mailbox.get(None), mailbox.get(world.clock.now_s() + 0.05)))
    mailbox.put("item")
    while thread.is_alive():
        world.pass_time(0.05)
        thread.join(0.01)
    assert found == [("item", None)]


def test_what_is_put_before_the_time_is_not_lost_to_it(world):
    mailbox = world.pool.mailbox(world.clock)
    until_s = world.clock.now_s() + 1000.0
    thread, found = started(world, lambda: mailbox.get(until_s))
    world.pass_time(1.0)
    mailbox.put("soon")
    thread.join(10)
    assert found == ["soon"]


@pytest.mark.parametrize("until_s", [1e10, 1e300, float("inf")])
def test_a_time_that_never_comes_can_be_waited_for(world, until_s):
    mailbox = world.pool.mailbox(world.clock)
    thread, found = started(world, lambda: mailbox.get(until_s))
    mailbox.put("soon")
    thread.join(10)
    assert found == ["soon"]


def test_a_finalizer_may_put_while_a_reader_waits(world):
    mailbox = world.pool.mailbox(world.clock)

    class Dropped:
        def __del__(self):
            mailbox.put("dropped")

    thread, found = started(world, lambda: mailbox.get(None))
    circle = Dropped()
    circle.itself = circle
    del circle
    gc.collect()
    thread.join(10)
    assert found == ["dropped"]


def test_several_readers_share_a_mailbox(world):
    mailbox = world.pool.mailbox(world.clock)
    readers = [started(world, lambda: mailbox.get(None)) for _ in range(3)]
    for item in range(3):
        mailbox.put(item)
    for thread, _ in readers:
        thread.join(10)
    assert sorted(found[0] for _, found in readers) == [0, 1, 2]


def test_an_event_wakes_who_waits_and_can_be_waited_for_in_vain(world):
    event = world.pool.event()
    assert not event.is_set()
    assert not event.wait(0.0)
    thread, found = started(world, event.wait)
    event.set()
    thread.join(10)
    assert found == [True]
    assert event.is_set()
    event.clear()
    assert not event.wait(0.0)


def test_an_event_wakes_all_who_wait_and_none_who_was_late(world):
    event = world.pool.event()
    late = started(world, lambda: event.wait(0.0))
    late[0].join(10)
    waiting = [started(world, lambda s=s: event.wait(s)) for s in (None, 1000.0, None, 1000.0)]
    event.set()
    event.set()
    for thread, _ in waiting:
        thread.join(10)
    assert [found for _, found in waiting] == [[True]] * 4
    assert late[1] == [False]
    assert event.wait(None)


def test_a_lock_lets_one_thread_in(world):
    lock = world.pool.lock()
    inside = threading.Event()

    def enter():
        with lock:
            inside.set()

    with lock:
        thread, _ = started(world, enter)
        assert not inside.wait(0.02)
    thread.join(10)
    assert inside.is_set()


def test_a_thread_is_alive_until_it_ends(world):
    event = world.pool.event()
    thread, _ = started(world, event.wait)
    assert thread.is_alive()
    event.set()
    thread.join(10)
    assert not thread.is_alive()


# --- the fakes alone --------------------------------------------------------------------------------------------------


def test_settling_waits_until_every_thread_waits():
    fake = Fake()
    mailbox, done = fake.pool.mailbox(fake.clock), []

    def work():
        while (item := mailbox.get(None)) is not None:
            done.append(item)

    fake.pool.spawn("modelcache-test", work)
    for item in range(1, 1000):
        mailbox.put(item)
    fake.pool.settle()
    assert len(done) == 999
    mailbox.put(None)
    fake.pool.settle()
    assert fake.pool.thread_names == ()


def test_settling_sees_threads_that_stand_at_a_hold_and_callers_that_wait():
    fake = Fake()
    hold, event = fake.pool.hold(), fake.pool.event()
    worker = fake.pool.spawn("modelcache-test", hold.stand)
    caller = threading.Thread(target=event.wait)
    caller.start()
    fake.pool.settle(num_callers=1)
    assert hold.is_reached
    assert worker.is_alive()
    hold.release()
    event.set()
    caller.join()
    fake.pool.settle()


def test_the_fakes_refuse_what_could_never_end():
    fake = Fake()
    with pytest.raises(ValueError, match="0 seconds or more"):
        fake.clock.advance(-1)
    with pytest.raises(TypeError, match="both fakes or neither"):
        fake.pool.mailbox(SystemClock())
    with fake.pool.lock() as _, pytest.raises(AssertionError):
        lock = fake.pool.lock()
        with lock, lock:
            pass

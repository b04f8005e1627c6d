"""Ctrl-C reaches whoever waits, and nobody else: the cache is as it was, and closes as ever."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from benches import Call
from interrupts import interrupted
from lifecycle.room import Footprint, Room, Stop, until

from modelcache.errors import CacheClosedError
from modelcache.tier import Tier


@pytest.fixture(autouse=True)
def pressed_once() -> Iterator[Callable[[Callable[[], bool]], Call]]:
    """Press Ctrl-C when something has come to be; in the test only, where SIGINT means what it means in a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    assert main is not None
    keys: list[Call] = []
    is_over = threading.Event()

    def at(fact: Callable[[], bool]) -> Call:
        def press() -> None:
            until(lambda: is_over.is_set() or fact(), "the moment for Ctrl-C")
            if not is_over.is_set():
                signal.pthread_kill(main, signal.SIGINT)

        keys.append(Call(press, "keyboard"))
        return keys[-1]

    yield at
    is_over.set()
    for key in keys:
        key.thread.join()
    signal.signal(signal.SIGINT, before)


def is_unharmed(room: Room, *names: str) -> bool:
    """The books balance, nobody waits, and every model can be had."""
    room.pool.settle()
    gc.collect()
    room.pool.settle()
    assert room.cache.status().num_waiting == 0
    assert all(model.num_leases == 0 for model in room.cache.status().models)
    room.cache._driver.look(lambda machine: machine.validate())
    return all(room.answers_right(name) for name in names) and room.cache.health().is_ready


def test_ctrl_c_while_waiting_for_a_lease_is_the_callers_alone(room_of, pressed_once):
    room = room_of(vram=1)
    room.add("a", "b")
    lease = Call(lambda: room.cache.lease_many("a")).result()
    other = Call(lambda: room.cache.lease_many("b"))
    key = pressed_once(lambda: room.cache.status().num_waiting == 2)
    with pytest.raises(KeyboardInterrupt):
        room.cache.get("b")
    key.result()
    assert other.thread.is_alive(), "somebody else was interrupted as well"
    lease.close()
    other.result().close()
    other.value = None
    assert is_unharmed(room, "a", "b")


def test_ctrl_c_while_a_model_is_loaded_lets_the_load_end(room_of, pressed_once):
    room = room_of()
    with Stop() as stop:
        room.add("a", at=stop)
        key = pressed_once(stop.reached.is_set)
        with pytest.raises(KeyboardInterrupt):
            room.cache.get("a")
        key.result()
    assert is_unharmed(room, "a")
    # The load that was begun for nobody was used.
    assert [event.model for event in room.cache.events()].count("a") == 2


@pytest.mark.parametrize("what", ["evict", "reserve", "prefetch", "unregister", "resize"])
def test_ctrl_c_in_the_middle_of_a_move_lets_it_land(room_of, pressed_once, what):
    room = room_of()
    room.add("a", reload=False)
    room.add("b")
    room.use("a")
    stop = room.hold_writes()
    key = pressed_once(stop.reached.is_set)

    def reserve() -> None:
        with room.cache.reserve(ram="28KiB"):
            raise AssertionError("there is no room yet")

    def prefetch() -> None:
        room.cache.prefetch("a").result()

    acts = {
        "evict": lambda: room.cache.evict("a"),
        "reserve": lambda: (room.cache.resize(ram="32KiB"), reserve()),
        "prefetch": lambda: (Call(lambda: room.cache.evict("a")), stop.wait_reached(), prefetch()),
        "unregister": lambda: (Call(lambda: room.cache.evict("a")), stop.wait_reached(), room.cache.unregister("a")),
        "resize": lambda: (Call(lambda: room.cache.evict("a")), room.cache.resize(ram=4096), Stop().stand()),
    }
    with pytest.raises(KeyboardInterrupt):
        acts[what]()
    key.result()
    stop.release()
    room.cache.resize(ram=1 << 20)
    assert is_unharmed(room, *(() if what == "unregister" else "a"), "b")


# A finalizer that is struck is reported by the interpreter, which swallows what it raised; its lease is returned.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_storm_of_ctrl_c_harms_nobody(room_of):
    room = room_of(vram=1)
    room.add("a", "b", "c")
    room.use("a", "b", "c")
    main, over, pause = threading.main_thread().ident, threading.Event(), threading.Event()
    assert main is not None
    armed, num_struck = [False], 0

    def strike(number: int, frame: object) -> None:
        if armed[0]:
            armed[0] = False
            raise KeyboardInterrupt

    def press() -> None:
        for _ in range(40):
            pause.wait(0.003)
            signal.pthread_kill(main, signal.SIGINT)
        over.set()

    signal.signal(signal.SIGINT, strike)
    keyboard = Call(press, "keyboard")
    while not over.is_set():
        try:
            armed[0] = True
            room.use("a", "b", "c")
            armed[0] = False
        except KeyboardInterrupt:
            num_struck += 1
    keyboard.result()
    assert num_struck
    assert is_unharmed(room, "a", "b", "c")


def close_interrupted(room: Room, after: int) -> bool:
    """Interrupt `close` at the n-th moment at which it can be, then close again; whether it came to that."""
    room.add("a", reload=False)
    room.add("b", "c")
    room.use("a", "b")
    room.cache.evict("a")
    room.cache.prefetch("c", Tier.RAM).result()
    try:
        return interrupted(room.cache.close, after, anywhere=False)
    finally:
        room.cache.close()


def closes_all_the_same(folder, after: int) -> bool:
    footprint = Footprint(folder)
    room = Room(folder)
    struck = close_interrupted(room, after)
    with pytest.raises(CacheClosedError):
        room.cache.get("a")
    assert room.pool.thread_names == ()
    gc.collect()
    assert (room.device.allocated_bytes(), room.mover.live_ram_bytes) == (0, 0)
    del room
    footprint.require_unchanged()
    return struck


@pytest.mark.timeout(300)
def test_a_close_that_was_interrupted_can_be_done_again_and_leaves_nothing(tmp_path):
    after = 0
    while closes_all_the_same(tmp_path, after):
        after += 1
    assert after > 20

"""Twelve ways to stand still, each seen by `health` ten seconds later, by the clock of the cache; and it never blocks."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import Call
from lifecycle.room import Room, Stop, until
from safetensors.torch import save_file

from modelcache.core.messages import WantCopy
from modelcache.errors import DevicePoisonedError, InvalidTransitionError
from modelcache.stats import Health, MemoryReading
from modelcache.tier import Tier

#: Within this, on the clock of the cache.
SEEN_S = 10.0


class Scene:
    """A cache in which something is about to stand still.

    `calls` are the callers who wait then; `seen` is what `health` must say beside not being ready.
    """

    def __init__(self, room: Room, folder: Path) -> None:
        self.room, self.folder = room, folder
        self.calls: list[Call] = []

    def call(self, do: Callable[[], Any]) -> Call:
        self.calls.append(Call(do))
        return self.calls[-1]

    def pass_time(self, seconds: float) -> None:
        """Move the clock, and let the driver have seen it."""
        self.room.clock.advance(seconds)
        until(lambda: self.room.cache._driver._step_since_s is None, "the driver has done its step")

    def stand_until(self, is_seen: Callable[[Health], bool]) -> Health:
        """Move the clock by `SEEN_S`, and on while a sign that was on its way still came; at most twice as far again."""
        for _ in range(10):
            self.room.clock.advance(SEEN_S / 10)
        health = self.health()
        for _ in range(20):
            if is_seen(health):
                break
            self.room.clock.advance(SEEN_S / 10)
            health = self.health()
        return health

    def health(self) -> Health:
        """As another thread has it, which must not be held up by anything."""
        health = Call(self.room.cache.health, "prober").result()
        assert isinstance(health, Health)
        return health


@contextmanager
def a_loader_hangs(scene: Scene) -> Iterator[str]:
    with Stop() as stop:
        scene.room.add("a", at=stop)
        scene.call(lambda: scene.room.cache.get("a"))
        stop.wait_reached()
        yield r"the load of 'a': no sign for"


@contextmanager
def a_reading_thread_hangs(scene: Scene) -> Iterator[str]:
    """On a file system that gives no answer."""
    path = scene.folder / "weights.safetensors"
    save_file({f"{n}.weight": torch.ones(32, 32) for n in range(4)}, path)
    with Stop() as stop, pytest.MonkeyPatch.context() as patch:
        preadv = os.preadv

        def hanging(*args: Any) -> int:
            stop.stand()
            return preadv(*args)

        def shape() -> torch.nn.Module:
            return torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(4)))

        scene.room.cache.register("a", "safetensors", model=shape, weights=str(path))
        patch.setattr(os, "preadv", hanging)
        scene.call(lambda: scene.room.cache.get("a"))
        stop.wait_reached()
        yield r"the stage of 'a#\d+': no sign for"
        stop.release()
        scene.calls[0].thread.join(10)


@contextmanager
def a_copy_to_the_device_hangs(scene: Scene) -> Iterator[str]:
    scene.room.add("a")
    with scene.room.faults.hold("copy_in", nth=2) as hold:
        scene.call(lambda: scene.room.cache.get("a"))
        assert hold.wait_reached(10)
        yield r"the promote of 'a#\d+': no sign for"


@contextmanager
def a_copy_from_the_device_hangs(scene: Scene) -> Iterator[str]:
    scene.room.add("a", reload=False)
    with scene.room.cache.get("a") as model:
        for layer in model:
            layer.weight.data += 1
    del model
    with scene.room.faults.hold("copy_out", nth=2) as hold:
        scene.call(lambda: scene.room.cache.park("a"))
        assert hold.wait_reached(10)
        yield r"the trim of 'a#\d+': no sign for"


@contextmanager
def a_write_to_the_disk_hangs(scene: Scene) -> Iterator[str]:
    scene.room.add("a", reload=False)
    scene.room.use("a")
    with scene.room.hold_writes(nth=2) as stop:
        scene.call(lambda: scene.room.cache.evict("a"))
        stop.wait_reached()
        yield r"the evict of 'a#\d+': no sign for"


@contextmanager
def a_lease_is_never_returned(scene: Scene) -> Iterator[str]:
    scene.room.add("a", "b", "c", "d")
    with scene.room.cache.lease_many("a", "b", "c"):
        scene.call(lambda: scene.room.cache.get("d"))
        # What can be brought up to RAM meanwhile has been.
        scene.room.pool.settle(num_callers=1)
        yield ""


@contextmanager
def a_thread_keeps_the_lock(scene: Scene) -> Iterator[str]:
    """Say, in a debugger."""
    scene.room.add("a")
    with Stop() as stop:
        looking = Call(lambda: scene.room.cache._driver.look(lambda machine: stop.stand()), "looking")
        stop.wait_reached()
        scene.call(lambda: scene.room.cache.get("a"))
        until(lambda: scene.health().oldest_wait_s is not None, "somebody waits")
        # The driver is as old as the cache; its step begins with what it was asked now.
        until(lambda: scene.room.cache._driver._step_since_s is not None, "the driver's step has begun")
        yield r"the driver: in one step for"
    looking.result()


@contextmanager
def the_drivers_thread_hangs(scene: Scene) -> Iterator[str]:
    scene.room.add("a")
    with Stop() as stop:
        scene.room.cache._driver.at_latest(0.0, stop.stand)
        stop.wait_reached()
        scene.call(lambda: scene.room.cache.get("a"))
        until(lambda: scene.health().oldest_wait_s is not None, "somebody waits")
        yield r"the driver: in one step for"


@contextmanager
def the_driver_met_a_bug(scene: Scene) -> Iterator[str]:
    scene.room.add("a")
    driver = scene.room.cache._driver
    driver._machine._lease_returned = lambda name: 1 / 0
    driver.lease_returned("a")
    until(lambda: not driver.is_sound, "the bug is met")
    scene.call(lambda: scene.room.cache.get("a"))
    yield ""
    assert isinstance(scene.calls[0].failure(), InvalidTransitionError)
    scene.calls.clear()


@contextmanager
def an_event_loop_is_blocked(scene: Scene) -> Iterator[str]:
    """Its task holds a lease, and does something that takes long without awaiting it."""
    scene.room.add("a", "b", "c", "d")

    async def work() -> None:
        async with scene.room.cache.aget("a"), scene.room.cache.aget("b"), scene.room.cache.aget("c"):
            stop.stand()

    with Stop() as stop:
        loop = Call(lambda: asyncio.run(work()), "loop")
        stop.wait_reached()
        scene.call(lambda: scene.room.cache.get("d"))
        # What can be brought up to RAM meanwhile has been.
        scene.room.pool.settle(num_callers=1)
        yield ""
    loop.result()


@contextmanager
def forgetting_hangs(scene: Scene) -> Iterator[str]:
    """The deletion of a file, on a file system that gives no answer."""
    scene.room.add("a", reload=False)
    scene.room.use("a")
    scene.room.cache.evict("a")
    with Stop() as stop:
        files = scene.room.mover._tiers.files
        delete = files.delete

        def hanging(file: Any) -> None:
            stop.stand()
            delete(file)

        files.delete = hanging
        scene.call(lambda: scene.room.cache.unregister("a"))
        stop.wait_reached()
        yield "forgetting a: no sign for"


@contextmanager
def the_device_is_lost(scene: Scene) -> Iterator[str]:
    scene.room.add("a")
    scene.room.faults.fail("copy_in", failure="sticky")
    scene.call(lambda: scene.room.cache.get("a"))
    assert scene.calls[0].failure()
    with pytest.raises(DevicePoisonedError):
        scene.room.cache.get("a")
    scene.calls.clear()
    yield ""


STALLS = [
    a_loader_hangs,
    a_reading_thread_hangs,
    a_copy_to_the_device_hangs,
    a_copy_from_the_device_hangs,
    a_write_to_the_disk_hangs,
    a_lease_is_never_returned,
    a_thread_keeps_the_lock,
    the_drivers_thread_hangs,
    the_driver_met_a_bug,
    an_event_loop_is_blocked,
    forgetting_hangs,
    the_device_is_lost,
]


@pytest.mark.parametrize("stall", STALLS, ids=lambda stall: stall.__name__)
def test_what_stands_still_is_seen(room_of, tmp_path, stall, figure):
    scene = Scene(room_of(), tmp_path)
    with stall(scene) as words:
        waiting = bool(scene.calls)
        before = scene.health()
        # Nothing has stood for long: only what is known for certain is said so soon.
        assert before.is_ready is (stall not in (the_device_is_lost, the_driver_met_a_bug))
        assert before.stalled == ()

        def is_seen(health: Health) -> bool:
            said = any(re.match(words, each) for each in health.stalled) if words else health.stalled == ()
            return said and not health.is_ready

        health = scene.stand_until(is_seen)
        assert is_seen(health), health
        if waiting and stall is not the_driver_met_a_bug:
            assert SEEN_S - 1e-9 <= health.oldest_wait_s <= 3 * SEEN_S
        assert (health.device == "ok") is (stall is not the_device_is_lost)
    for call in scene.calls:
        call.thread.join(10)
        call.value = call.error = None
    if stall not in (the_device_is_lost, the_driver_met_a_bug):
        # All is well again once it moves.
        until(lambda: scene.health().is_ready, "ready")
        assert scene.health().stalled == ()
    scene.room.cache.close()
    assert not scene.health().is_ready
    figure("stalls", stall.__name__.replace("_", " "), 1)


class Hanging:
    """A probe that does not come back: NVML on a card that fell off the bus, /proc on a sick host."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def read(self, tier: Tier) -> MemoryReading | None:
        self._stop.stand()
        return None


def test_a_probe_that_hangs_is_seen_and_everybody_is_served_meanwhile(room_of, tmp_path, figure):
    with Stop() as stop:
        scene = Scene(room_of(gauge=Hanging(stop)), tmp_path)
        scene.room.add("a")
        scene.room.clock.advance(1.0)
        stop.wait_reached()
        scene.room.clock.advance(SEEN_S)
        health = scene.health()
        assert health.is_ready
        assert any("the reading of the memory under budgets." in each for each in health.stalled)
        assert scene.room.answers_right("a")
    scene.room.cache.close()
    figure("stalls", "a probe hangs", 1)


def test_a_look_for_writes_that_hangs_is_seen_and_others_are_served_meanwhile(room_of, tmp_path, figure):
    scene = Scene(room_of(), tmp_path)
    scene.room.add("a", "b")
    with Stop() as stop:
        scene.room.mover.is_unwritten = lambda part: stop.stand()
        scene.room.use("a")
        scene.room.pool.settle()
        scene.room.clock.advance(1.0)
        stop.wait_reached()
        scene.room.clock.advance(SEEN_S)
        health = scene.health()
        assert health.is_ready
        assert any(re.match(r"the look for writes to 'a#\d+'", each) for each in health.stalled)
        assert scene.room.answers_right("b")
    scene.room.cache.close()
    figure("stalls", "a look for writes hangs", 1)


def test_a_loader_that_hangs_is_seen_although_others_are_served(room_of, tmp_path, figure):
    scene = Scene(room_of(), tmp_path)
    with a_loader_hangs(scene):
        scene.room.add("b")
        for _ in range(11):
            scene.room.clock.advance(1.0)
            assert scene.room.answers_right("b")
            scene.room.cache.park("b")
        health = scene.health()
        assert not health.is_ready
        assert health.last_step_s == 0
    scene.calls[0].result()
    scene.calls[0].value = None
    scene.room.cache.close()
    figure("stalls", "a loader hangs and others are served", 1)


def test_slow_is_not_stuck(room_of, tmp_path):
    """A load that takes a minute and says how far it is, and a queue that goes on, leave the cache ready."""
    scene = Scene(room_of(), tmp_path)
    scene.room.add("a", concurrency=1)
    lease = scene.room.cache.lease_many("a")
    first = scene.call(lambda: scene.room.cache.lease_many("a"))
    second = scene.call(lambda: scene.room.cache.lease_many("a"))
    until(lambda: scene.room.cache.status().num_waiting == 2, "two wait")
    scene.pass_time(9.0)
    lease.close()
    until(lambda: not (first.thread.is_alive() and second.thread.is_alive()), "one is served")
    scene.pass_time(9.0)
    health = scene.health()
    assert health.oldest_wait_s == 18.0
    assert health.is_ready
    served = first if first.value is not None else second
    served.value.close()
    for call in (first, second):
        call.result().close()
        call.value = None

    with Stop() as stop:
        scene.room.add("slow", at=stop)
        scene.call(lambda: scene.room.cache.get("slow"))
        stop.wait_reached()
        (work,) = scene.room.cache._driver.watch.silent(0.0)
        for step in range(6):
            scene.pass_time(9.0)
            assert scene.health().is_ready, step
            work("slow", step, 6)
        scene.pass_time(SEEN_S)
        assert not scene.health().is_ready
    scene.calls[-1].result()
    scene.calls[-1].value = None
    scene.room.cache.close()


def test_somebody_who_gave_up_does_not_count_as_waiting_even_while_the_driver_is_stuck(room_of, tmp_path):
    scene = Scene(room_of(), tmp_path)
    scene.room.add("a")
    driver = scene.room.cache._driver
    with Stop() as stop:
        driver.at_latest(0.0, stop.stand)
        stop.wait_reached()
        waiter = driver.waiter(lambda: None)
        driver.post(WantCopy("a", Tier.RAM), waiter, None)
        assert scene.health().oldest_wait_s == 0.0
        driver.leave(waiter)
        assert scene.health().oldest_wait_s is None
    scene.room.pool.settle()
    assert not driver._unheard
    scene.room.cache.close()


def test_health_is_had_in_the_middle_of_closing(room_of, tmp_path):
    scene = Scene(room_of(), tmp_path)
    with Stop() as stop:
        scene.room.add("a", at=stop)
        scene.call(lambda: scene.room.cache.get("a"))
        stop.wait_reached()
        closing = Call(scene.room.cache.close)
        scene.calls[0].failure()
        assert not scene.health().is_ready
        assert closing.thread.is_alive()
    closing.result()

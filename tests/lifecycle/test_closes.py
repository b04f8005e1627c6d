"""`close` in the middle of everything: eight loads, a write to disk, a copy to the device, and people who wait."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time

import pytest
import torch
from benches import Call
from lifecycle.room import MODEL_BYTES, Footprint, Room, Stop, net, until

from modelcache.cache import ModelCache
from modelcache.errors import CacheClosedError
from modelcache.move import MoveKind
from modelcache.runtime.driver import GRACE_S

NUM_LOADS = 8
#: What closing may take on the clock of the cache.
LIMIT_S = 5.0


class Rush:
    """A cache in which everything is under way: eight loads, of which some can run, a spill and a promotion."""

    def __init__(self, folder, seed: int) -> None:
        self.chance = random.Random(seed)
        self.room = Room(folder, vram=5, ram=12, page_locked=4 * MODEL_BYTES, ram_spare=2 * 4096)
        self.loaders = [Stop() for _ in range(NUM_LOADS)]
        self.room.add("spilled", reload=False)
        self.room.add("promoted", "busy")
        self.room.use("spilled", "promoted", "busy")
        self.room.cache.park("promoted")
        self.lease = self.room.cache.lease_many("busy")
        for number, stop in enumerate(self.loaders):
            self.room.add(f"m{number}", at=stop)
        self.write = self.room.hold_writes(self.chance.randint(1, 5))
        self.copy = self.room.faults.hold("copy_in", nth=self.chance.randint(1, 4))
        self.calls: list[Call] = []
        self.start()

    def start(self) -> None:
        cache = self.room.cache
        self._call(lambda: cache.evict("spilled"))
        self.write.wait_reached()
        self._call(lambda: cache.get("promoted"))
        assert self.copy.wait_reached(10)
        for number in range(NUM_LOADS):
            self._call(lambda name=f"m{number}": cache.get(name))
        self._call(lambda: cache.park("busy"))
        self._call(lambda: cache.lease_many("m0", "m7"))
        until(lambda: sum(stop.reached.is_set() for stop in self.loaders) == 4, "four loads that run")
        until(lambda: cache.status().num_waiting == len(self.calls), "everybody waits")

    def _call(self, do) -> None:
        self.calls.append(Call(do, f"caller-{len(self.calls)}"))

    def everybody_is_refused(self) -> None:
        for call in self.calls:
            assert isinstance(call.failure(), CacheClosedError), call.thread.name
            call.error = None
        self.calls.clear()

    def let_everything_end(self) -> None:
        """In some order."""
        stops = [*self.loaders, self.write, self.copy]
        self.chance.shuffle(stops)
        for stop in stops:
            stop.release()


def close_in_a_rush(folder, seed: int) -> tuple[float, float]:
    """Close one; how long it took on the cache's own clock, and on the wall's."""
    footprint = Footprint(folder)
    rush = Rush(folder, seed)
    room, device, mover = rush.room, rush.room.device, rush.room.mover
    started_s, started = room.clock.now_s(), time.perf_counter()
    closing = Call(room.cache.close, "closing")
    # Whoever waits is told at once, while all that is in flight stands still.
    rush.everybody_is_refused()
    assert closing.thread.is_alive()
    rush.lease.close()
    is_abandoned = seed % 5 == 4
    if is_abandoned:
        rush.write.release()
        rush.copy.release()
        room.clock.advance(GRACE_S - 0.01)
        assert closing.thread.is_alive(), "the loaders had time left"
        room.clock.advance(0.01)
    else:
        rush.let_everything_end()
    closing.result()
    took = room.clock.now_s() - started_s, time.perf_counter() - started
    if is_abandoned:
        # They were named in a warning, and go on by themselves; what they build is dropped.
        left = [thread for thread in threading.enumerate() if thread.name.startswith("modelcache-load")]
        assert len(left) == 4
        rush.let_everything_end()
        for thread in left:
            thread.join(10)
    assert sum(stop.reached.is_set() for stop in rush.loaders) == 4, "a load was started that nobody waits for"
    gc.collect()
    assert (device.allocated_bytes(), mover.live_ram_bytes, mover.page_locked_bytes) == (0, 0, 0)
    assert room.pool.thread_names == ()
    del rush, room
    footprint.require_unchanged()
    return took


def test_closing_with_eight_loads_in_flight_leaves_nothing(tmp_path, figure, record_property):
    took_s, wall_s = close_in_a_rush(tmp_path, 0)
    assert took_s <= LIMIT_S
    record_property("seconds of wall time", wall_s)
    figure("closes", "with eight loads in flight, nothing left", 1)


def test_closing_gives_loaders_that_hang_their_time_and_names_them(tmp_path, figure, caplog):
    with caplog.at_level(logging.WARNING, "modelcache"):
        took_s, _ = close_in_a_rush(tmp_path, 4)
    assert took_s == pytest.approx(GRACE_S)
    assert took_s <= LIMIT_S
    (line,) = [line for line in caplog.messages if "closed while loading" in line]
    assert "m0" in line
    figure("closes", "with eight loads in flight, four of which hang", 1)


@pytest.mark.proof
@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(1, 51))
def test_fifty_times_of_fifty(tmp_path, figure, record_property, seed):
    took_s, wall_s = close_in_a_rush(tmp_path, seed)
    assert took_s <= LIMIT_S
    record_property("seconds of wall time", wall_s)
    figure("closes", "with eight loads in flight, nothing left", 1)


@pytest.mark.parametrize("at", ["load", "spill", "promotion"])
def test_closing_twice_at_once_waits_for_the_same_end(room_of, at):
    room = room_of()
    stop = Stop()
    room.add("loaded", at=stop)
    room.add("other", reload=False)
    room.use("other")
    if at == "load":
        first = Call(lambda: room.cache.get("loaded"))
    elif at == "spill":
        stop = room.hold_writes()
        first = Call(lambda: room.cache.evict("other"))
    else:
        room.cache.park("other")
        copy = room.faults.hold("copy_in", nth=2)
        first = Call(lambda: room.cache.get("other"))
        assert copy.wait_reached(10)
        stop = copy
    if at != "promotion":
        stop.wait_reached()
    closings = [Call(room.cache.close) for _ in range(3)]
    assert isinstance(first.failure(), CacheClosedError)
    assert all(call.thread.is_alive() for call in closings)
    stop.release()
    for call in closings:
        call.result()
    assert room.mover.live_ram_bytes == room.device.allocated_bytes() == 0
    assert not room.images.exists()


def test_a_finalizer_that_closes_the_cache_may_run_because_it_is_closed(room_of):
    room = room_of()
    room.add("a")
    finalized = []

    class Owner(torch.nn.Linear):
        def __del__(self) -> None:
            room.cache.close()
            finalized.append(threading.current_thread().name)

    room.cache.register("owner", lambda: Owner(8, 8), reload=True)
    room.use("a")
    with room.cache.get("owner"):
        pass
    room.cache.close()
    gc.collect()
    assert finalized
    with pytest.raises(CacheClosedError):
        room.cache.get("a")


def test_a_model_leased_while_closing_is_whole_until_it_is_returned(room_of):
    room = room_of()
    room.add("a")
    room.use("a")
    stop = Stop()
    room.add("slow", at=stop)
    first = Call(lambda: room.cache.get("slow"))
    stop.wait_reached()
    with room.cache.get("a") as model:
        closing = Call(room.cache.close)
        assert isinstance(first.failure(), CacheClosedError)
        x = torch.arange(32.0).reshape(1, 32)
        assert torch.allclose(model(x.to(room.device.name)).cpu(), net("a")(x))
        assert closing.thread.is_alive()
        del model
    stop.release()
    closing.result()


@pytest.mark.parametrize(
    "options",
    [
        {"device": "simulated", "vram": "8MiB"},
        {"device": "simulated", "vram": "8MiB", "memory": "mapped"},
        {"device": "host_only"},
    ],
    ids=["allocated", "mapped", "host_only"],
)
def test_a_model_leased_when_its_cache_is_closed_computes_until_nobody_holds_it(options):
    cache = ModelCache(ram="64MiB", segment="2MiB", progress=False, **options)
    for name in ("used", "idle"):
        cache.register(name, lambda name=name: net(name))
        cache.get(name)(torch.ones(1, 32))
    mover, device = cache._parts.mover, cache._parts.mover._device
    with cache.lease_many("used") as (model,):
        cache.close()
        x = torch.arange(32.0).reshape(1, 32)
        assert torch.allclose(model(x.to(device.torch_device)).cpu(), net("used")(x))
    assert model.state_dict()["0.weight"].shape == (32, 32)
    assert mover.live_ram_bytes <= 2 << 20
    del model
    gc.collect()
    assert mover.live_ram_bytes == 0
    assert device.allocated_bytes() == 0


def test_what_is_queued_when_the_cache_closes_is_never_begun(room_of):
    room = room_of()
    room.add("a", "b", reload=False)
    room.use("a", "b")
    write = room.hold_writes()
    calls = [Call(lambda name=name: room.cache.evict(name)) for name in "ab"]
    write.wait_reached()
    until(lambda: room.cache.status().num_moving == 2, "two files to be written, one after the other")
    closing = Call(room.cache.close)
    for call in calls:
        assert isinstance(call.failure(), CacheClosedError)
    write.release()
    closing.result()
    written = [event.model for event in room.cache.events() if event.kind is MoveKind.EVICT]
    assert len(written) == 1, written

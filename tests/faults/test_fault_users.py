"""What users do and clocks say: F04, F50, F59, F60."""

from __future__ import annotations

import gc
import itertools
import time

import pytest
import torch
from faults.standing import MODEL_BYTES, net, unharmed

from modelcache.errors import DeviceMemoryError
from modelcache.tier import Tier


def test_f04_what_a_loader_leaves_on_the_device_is_not_counted_as_the_models_and_is_named_when_it_is_in_the_way(
    house_of,
):
    house = house_of(names="ab", capacity=2.25)
    left: list[torch.Tensor] = []

    def load() -> torch.nn.Module:
        left.append(torch.ones(MODEL_BYTES // 4, device="sim:0"))
        return net("c").to("sim:0")

    # Its own weights are taken from where it put them; what it keeps beside them is room that nobody has.
    house.cache.register("c", load, size=MODEL_BYTES)
    assert house.answers_right("c")
    assert house.cache.info("c").vram_bytes == MODEL_BYTES
    assert house.cache.status().tier(Tier.VRAM).resident_bytes == MODEL_BYTES
    assert house.device.allocated_bytes() == 2 * MODEL_BYTES
    with house.cache.get("c"), pytest.raises(DeviceMemoryError, match="another program may hold the memory"):
        house.cache.get("a")
    house.cache.evict("c", to=Tier.RAM)
    assert house.answers_right("a")
    left.clear()
    gc.collect()
    unharmed(house)


def test_f50_a_wall_clock_that_jumps_changes_neither_the_order_of_use_nor_a_deadline(house_of, monkeypatch):
    jumps = itertools.cycle([1.8e9, 1.8e9 - 3600.0, 1.8e9 + 31_536_000.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(jumps) * 1e9))
    house = house_of(names="abcd", vram=2)
    for last, before, new in ["abc", "bcd", "cda", "dab"]:
        if last == "a" and new == "c":
            house.use("a", "b")
        house.use(new)
        assert [name for name, state in house.states().items() if state == "ready"] == sorted([before, new])
    waiting = house.cache.prefetch("c")
    house.pool.settle()
    assert waiting.done()
    unharmed(house)


@pytest.mark.parametrize("said", [MODEL_BYTES // 2, 2 * MODEL_BYTES])
def test_f59_a_size_that_is_not_the_models_is_put_right_by_its_load_and_others_give_what_is_lacking(house_of, said):
    house = house_of(names="ab", vram=2)
    house.use("a", "b")
    house.add("c", size=said)
    assert house.answers_right("c")
    assert house.cache.info("c").size_bytes == MODEL_BYTES
    assert house.states()["c"] == "ready"
    assert house.cache.status().tier(Tier.VRAM).resident_bytes <= 2 * MODEL_BYTES
    house.use("a", "c")
    assert house.states() == {"a": "ready", "b": "parked", "c": "ready"}
    unharmed(house)


def test_f60_a_hundred_thousand_leases_on_one_model_are_counted_and_returned(bench_of):
    bench = bench_of()
    bench.add("a")
    with bench.cache.get("a"):
        pass
    leases = [bench.cache._door.lease("a", None) for _ in range(100_000)]
    assert bench.cache.info("a").num_leases == 100_000
    for lease in leases:
        lease.close()
    assert bench.cache.info("a").num_leases == 0
    unharmed(bench)

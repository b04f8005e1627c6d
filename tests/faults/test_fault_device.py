"""The device refuses, fails, stands still or lies: F06-F08, F10, F20."""

from __future__ import annotations

import gc

import pytest
import torch
from faults.standing import LAYERS, MODEL_BYTES, unharmed

from modelcache.errors import DeviceMemoryError, DevicePoisonedError, MoveError
from modelcache.tier import Tier


@pytest.mark.parametrize("chunk", range(1, LAYERS + 1))
def test_f06_a_device_out_of_memory_at_any_chunk_gives_others_room_and_tries_once_more(house_of, chunk):
    house = house_of()
    house.use("a", "b")
    house.use("a")
    house.faults.fail("allocate", nth=chunk, failure="out_of_memory")
    assert house.answers_right("c")
    # As much again was given up before the second try: both of the others are parked, not one.
    assert house.states() == {"a": "parked", "b": "parked", "c": "ready"}
    unharmed(house)


@pytest.mark.parametrize("chunk", range(1, LAYERS + 1))
def test_f06_a_second_refusal_in_a_row_is_an_error_with_its_numbers(house_of, chunk):
    house = house_of()
    house.use("a", "b")
    house.faults.fail("allocate", nth=chunk, failure="out_of_memory")
    house.faults.fail("allocate", nth=chunk + chunk, failure="out_of_memory")
    with pytest.raises(DeviceMemoryError) as caught:
        house.cache.get("c")
    error = caught.value
    assert (error.name, error.device, error.needed_bytes) == ("c", "sim:0", MODEL_BYTES)
    assert error.free_bytes is not None
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert error.__cause__.__traceback__ is None or not torch.is_tensor(error.__cause__.args)
    # Held here, the error holds nothing of the device, and the model is whole in RAM.
    assert house.state("c") == "parked"
    unharmed(house)


def test_f07_a_device_that_is_fuller_than_the_books_know_refuses_and_serves_again_when_it_is_not(house_of):
    house = house_of(capacity=2.25)
    house.use("a")
    house.take_from_device(0.5)
    assert house.cache.status().tier(Tier.VRAM).free_bytes == MODEL_BYTES
    # A second model fits the ledger and not the device: room is made for one more try, which then succeeds.
    assert house.answers_right("b")
    assert house.state("a") == "parked"
    house.validate()
    house.cache.park("b")
    house.take_from_device(1)
    with pytest.raises(DeviceMemoryError, match="another program may hold the memory") as caught:
        house.cache.get("c")
    assert caught.value.free_bytes == MODEL_BYTES * 3 // 4
    house.validate()
    assert "ready" not in house.states().values()
    house.ballast.clear()
    gc.collect()
    unharmed(house)


def test_f08_after_a_sticky_error_at_any_chunk_the_device_is_never_asked_again(house_of):
    for chunk in range(1, LAYERS + 1):
        house = house_of()
        house.use("a")
        with house.cache.get("a") as model:
            house.faults.fail("copy_in", nth=chunk, failure="sticky")
            first = house.call(lambda house=house: house.cache.get("b"))
            error = first.failure()
            assert isinstance(error, (DevicePoisonedError, MoveError))
            with pytest.raises(DevicePoisonedError):
                house.cache.get("c")
            asked = dict(house.faults._calls)
            for name in "abc":
                with pytest.raises(DevicePoisonedError) as caught:
                    house.cache.get(name)
                assert "restart" in str(caught.value)
            assert house.faults._calls == asked
            del model
        # The lease on the lost device was returned like any other.
        health = unharmed(house, healthy=False, served=False)
        assert health.device != "ok"
        assert house.state("b") == "parked"
        house.close()


def test_f10_a_source_is_not_let_go_before_its_copy_has_landed(house_of):
    # RAM for one model only: b must push a's duplicate out, and a's bytes on the device must be whole by then.
    house = house_of(ram=2, vram=2, names="ab")
    with house.faults.hold("copy_in", nth=2) as hold:
        first = house.call(lambda: house.cache.get("a")(torch.ones(1, 32, device="sim:0")).shape)
        assert hold.wait_reached(10)
        info = house.cache.info("a")
        assert (info.ram_bytes, info.vram_bytes, info.state) == (MODEL_BYTES, 0, "promoting")
        assert house.mover.live_ram_bytes == MODEL_BYTES
    assert first.result() == (1, 32)
    first.value = None
    unharmed(house)


@pytest.mark.parametrize("segment", range(1, LAYERS + 1))
def test_f10_what_was_written_on_the_device_stays_there_until_it_has_landed_in_ram(house_of, segment):
    house = house_of(names="ab")
    with house.cache.get("a") as model:
        for layer in model:
            layer.weight.data += 1
        written = [layer.weight.cpu() for layer in model]
    with house.faults.hold("copy_out", nth=segment) as hold:
        park = house.call(lambda: house.cache.park("a"))
        assert hold.wait_reached(10)
        assert house.device.allocated_bytes() >= MODEL_BYTES
    park.result()
    assert all(torch.equal(layer.weight, now) for layer, now in zip(model, written, strict=True))
    del model
    unharmed(house, but="a")


def test_f20_another_program_takes_half_the_device_and_nobody_who_is_there_is_harmed(house_of):
    house = house_of(vram=2, capacity=3)
    with house.cache.get("a") as model:
        at = [layer.weight.data_ptr() for layer in model]
        house.take_from_device(1.5)
        with pytest.raises(DeviceMemoryError):
            house.cache.get("b")
        assert [layer.weight.data_ptr() for layer in model] == at
        assert model(torch.ones(1, 32, device="sim:0")).shape == (1, 32)
        del model
    house.validate()
    assert house.answers_right("a")
    house.ballast.clear()
    gc.collect()
    unharmed(house)

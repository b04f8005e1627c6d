"""Scars of memory that was kept, bytes that were torn and devices that were lost: LocalAI, vLLM, Triton, ds4."""

from __future__ import annotations

import ctypes
import gc
import weakref

import pytest
import torch
from scars.on_device import LAYER_BYTES, MODEL_BYTES, bits, net, on_device
from scars.playing import Play, playing

from modelcache.errors import DeviceMemoryError, DevicePoisonedError, LoaderError, MoveError
from modelcache.testing import FakeModel


@pytest.fixture
def scar(figure):
    """Count a scar, once."""
    return lambda name: figure("scars", name, 1)


def test_s14_a_model_that_cannot_be_loaded_is_not_loaded_in_a_storm(scar):
    """LocalAI #10719: each retry of a failing model left its context behind, up to 58 GB and a reboot of the host.

    Here all who wait share one attempt and its error; from the third failure on requests are refused for a time that
    doubles, and nothing refers to what an attempt had built.
    """
    for seed in (1,):
        with playing(seed, steps_s=(0.0, 0.1)) as play:
            attempts: list[float] = []

            def load(play: Play = play, attempts: list[float] = attempts) -> FakeModel:
                attempts.append(play.now_s)
                raise RuntimeError("no kernel image")

            play.cache.register("broken", load, size=20, reload=True)
            play.add("sound")

            def retry(play: Play = play) -> None:
                while play.now_s < 60.0:
                    with pytest.raises(LoaderError, match="no kernel image"):
                        play.use("broken")
                    play.spend(play.random.choice((0.5, 1.0)))

            for number in range(3):
                play.caller(f"client-{number}", retry)
            play.caller("other", *(lambda play=play: (play.use("sound"), play.spend(5.0)) for _ in range(10)))
            play.run()
            # Three at once, then after 1, 2, 4, 8, 16 and 32 s.
            assert len(attempts) <= 9, f"{len(attempts)} attempts in a minute"
    with on_device() as house:
        contexts: list[weakref.ref[torch.nn.Module]] = []

        def load_half() -> torch.nn.Module:
            model = net(1)
            contexts.append(weakref.ref(model))
            raise RuntimeError(f"no kernel image for {len(list(model.parameters()))} tensors")

        house.cache.register("broken", load_half, size=MODEL_BYTES, reload=True)
        for _ in range(8):
            with pytest.raises(LoaderError, match="no kernel image"):
                house.cache.get("broken")
            house.clock.advance(100.0)
            assert house.held() == (0, 0)
        assert len(contexts) == 8
        assert not [context for context in contexts if context() is not None]
    scar("S14")


def test_s18_what_is_still_being_computed_is_written_back_too(scar):
    """vLLM #45704 (June 2026): a copy to the CPU ran beside the kernel that wrote what it copied.

    The host's bookkeeping said "computed", and the restored bytes were wrong. Here whatever gives memory up waits until
    the device has nothing left to do, before it looks at a byte.
    """
    for down in ("park", "evict for another"):
        with on_device(vram=1) as house:
            for name, seed in (("a", 1), ("b", 2)):
                house.cache.register(name, lambda seed=seed: net(seed), size=MODEL_BYTES, reload=True)
            with house.cache.get("a") as model:
                written = model[1].weight.detach()
                # A kernel that was launched under the lease, and goes on after it was returned.
                kernel = house.device.begin_compute()
            del model
            if down == "park":
                going = house.call(lambda house=house: house.cache.park("a"))
            else:
                going = house.call(lambda house=house: house.cache.get("b"))
            house.pool.settle()
            ctypes.memset(written.data_ptr(), 0x3F, LAYER_BYTES)
            del written
            house.device.end_compute(kernel)
            going.result()
            del going
            expected = net(1)
            ctypes.memset(expected[1].weight.data_ptr(), 0x3F, LAYER_BYTES)
            with house.cache.get("a", timeout=60) as model:
                assert bits(model) == bits(expected)
            del model
            house.held()
    scar("S18")


def test_s19_what_failed_to_load_holds_no_memory(scar):
    """Triton #8969 (September 2026): each failed load kept memory of the GPU that no unload gave back.

    Here whatever was allocated for a move that fails is given up before anybody learns of it, at whichever segment it
    fails; the books are held against the device and the system after each.
    """
    with on_device() as house:
        house.cache.register("a", lambda: net(1), size=MODEL_BYTES, reload=True)
        for cycle in range(4):
            for segment in (1, 2, 3):
                house.faults.fail("copy_in", nth=segment)
                with pytest.raises(MoveError):
                    house.cache.get("a")
                # What was staged stays in RAM, and is all that is left.
                assert house.held() == (0, MODEL_BYTES), (cycle, segment)
                # It is tried once more after a refusal.
                house.faults.fail("allocate", nth=segment, failure="out_of_memory")
                house.faults.fail("allocate", nth=2 * segment, failure="out_of_memory")
                with pytest.raises(DeviceMemoryError):
                    house.cache.get("a")
                assert house.held() == (0, MODEL_BYTES), (cycle, segment)
            house.cache.evict("a")
            assert house.held() == (0, 0)
        with house.cache.get("a") as model:
            assert bits(model) == bits(net(1))
        del model
        assert house.held() == (MODEL_BYTES, MODEL_BYTES)
    scar("S19")


def test_s20_a_lost_device_is_asked_for_nothing_more_and_says_so(scar, caplog):
    """antirez/ds4 #759 (August 2026): after an illegal access the server answered errors for 22 hours, and lived on.

    Here everybody who waits and everybody who comes is told at once that the device cannot be used again by this
    process; it is asked for nothing more, leases can be returned, the cache can be closed, and readiness is false, so
    that whatever watches the process can end it.
    """
    with on_device() as house:
        for number, name in enumerate("abc"):
            house.cache.register(name, lambda number=number: net(number), size=MODEL_BYTES, reload=True)
        with house.cache.get("a"):
            house.faults.fail("copy_in", failure="sticky")
            waiting = [house.call(lambda name=name: house.cache.get(name)) for name in "bcb"]
            errors = [call.failure() for call in waiting]
            assert all(isinstance(error, DevicePoisonedError) for error in errors), errors
            assert len({id(error) for error in errors}) == 3
            house.pool.settle()
            calls = dict(house.faults._calls)
            for name in "abc":
                with pytest.raises(DevicePoisonedError):
                    house.cache.get(name)
        health = house.cache.health()
        assert not health.is_ready
        assert "sticky" in health.device
        house.pool.settle()
        assert house.faults._calls == calls, "a lost device was asked for something"
        assert house.cache.info("a").num_leases == 0
        del waiting, errors
        gc.collect()
    scar("S20")

"""Copies looked at for writes in the background: by the clock, on threads, and with real models."""

import threading

import pytest
import torch
from benches import Bench

from modelcache import ModelCache
from modelcache.wiring import CHECK_AFTER_S


def wait_for_looks(cache: ModelCache) -> None:
    """Until the cache has looked at everything that is due."""
    pause = threading.Event()
    for _ in range(400):
        pause.wait(CHECK_AFTER_S / 10)
        if cache._driver.look(lambda machine: not machine.checks.due and machine.checks.running is None):
            return
    raise AssertionError("something stays due for ever")


@pytest.fixture
def bench():
    made = Bench(check_after_s=1.0)
    yield made
    made.close()


def test_a_model_is_looked_at_once_its_last_lease_has_been_back_for_a_moment(bench):
    bench.add("a", "b")
    with bench.cache.get("a"):
        bench.pass_time(5.0, step=0.5)
        assert bench.mover.num_calls("is_unwritten") == 0
    bench.pool.settle()
    bench.pass_time(0.9)
    assert bench.mover.num_calls("is_unwritten") == 0
    bench.pass_time(0.2)
    assert bench.mover.num_calls("is_unwritten") == 1
    bench.pass_time(60.0, step=1.0)
    assert bench.mover.num_calls("is_unwritten") == 1
    bench.use("a")
    bench.pass_time(2.2, step=1.1)
    assert bench.mover.num_calls("is_unwritten") == 2
    bench.validate()


def test_hits_of_a_busy_model_tell_nobody_and_put_the_look_off(bench):
    bench.add("a")
    for _ in range(20):
        bench.use("a")
        bench.pass_time(0.6)
    assert bench.mover.num_calls("is_unwritten") == 0
    bench.pass_time(3.0, step=1.0)
    assert bench.mover.num_calls("is_unwritten") == 1


def test_writes_on_the_device_survive_whether_or_not_somebody_looked_before():
    with ModelCache(device="simulated", vram="8MiB", ram="32MiB", progress=False) as cache:
        cache.register("net", lambda: torch.nn.Linear(512, 512))
        with torch.no_grad():
            expected = torch.nn.utils.parameters_to_vector(cache.get("net").parameters()).cpu()
            for _ in range(3):
                with cache.get("net") as net:
                    for parameter in net.parameters():
                        parameter.data.add_(1)
                expected += 1
                wait_for_looks(cache)
                cache.park("net")
                with cache.get("net") as net:
                    assert torch.equal(torch.nn.utils.parameters_to_vector(net.parameters()).cpu(), expected)
                wait_for_looks(cache)
                cache.park("net")
